"""llama.cpp's own converter, for what isn't written here."""

from __future__ import annotations

import shutil
from pathlib import Path

from qadapter.errors import QAdapterError
from qadapter.exporting import processes

SCRIPT = "convert_hf_to_gguf.py"


def find_converter(llama_cpp_dir: str | Path | None) -> Path | None:
    """The script in llama.cpp's folder, else on PATH; None where there is none.

    Raises:
        QAdapterError: the folder that was named has none.
    """
    if llama_cpp_dir is None:
        found = shutil.which(SCRIPT)
        return None if found is None else Path(found)
    script = Path(llama_cpp_dir).expanduser() / SCRIPT
    if not script.is_file():
        raise QAdapterError(f"llama_cpp_dir {llama_cpp_dir} holds no {SCRIPT}")
    return script


def convert(script: Path, checkpoint: Path, file: Path, kind: str) -> None:
    """Run it in a process of its own.

    Raises:
        QAdapterError: it refuses; its last line says why.
    """
    processes.run(
        [str(script), str(checkpoint), "--outfile", str(file), "--outtype", kind], file,
        lambda reason: QAdapterError(f"{script} can't convert the checkpoint ({reason})"),
    )
