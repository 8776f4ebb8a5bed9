"""Folders as a stranger may send them: whole, and full of what could run where someone runs it."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

CODE = (
    "modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "evil.py", "__init__.py",
    "setup.py", "conftest.py", "sitecustomize.py", "usercustomize.py", "qadapter.py", "torch.py",
    "custom_generate/generate.py", "evil/__init__.py", "transformers/__init__.py", "handler.py",
    "judge.py", "chat_template.py", "peft.py", "data.py",
)
PICKLES = (
    "adapter_model.bin", "adapter_model.pt", "pytorch_model.bin", "model.pt", "model.pkl",
    "training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state.pth",
    "scaler.pt", "qadapter_config.pkl", "cache.pkl", "data.pt", "custom_checkpoint_0.pkl",
)
AUTO_MAP = {
    "AutoConfig": "configuration_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model",
    "AutoModel": "modeling_evil.Model", "AutoTokenizer": ["tokenization_evil.Tokenizer", None],
}


class Mark:
    """A folder that appears when a stranger's code runs: what was run has its name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)

    def __call__(self) -> list[str]:
        """What has run."""
        return sorted(path.name for path in self.folder.iterdir())

    def code(self, name: str) -> str:
        """Python that leaves its mark when it is run."""
        return f"import os\nos.makedirs({str(self.folder / name)!r}, exist_ok=True)\n"

    def pickle(self, name: str) -> _Bomb:
        """An object that leaves its mark when its pickle is read."""
        return _Bomb(str(self.folder / name))


class _Bomb:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.makedirs, (self.path, 0o777, True)


def litter(folder: Path, mark: Mark, *, pickles: bool = True) -> Path:
    """Put Python and pickles beside what is there; nothing that is there is replaced."""
    for name in CODE:
        file = folder / name
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(mark.code(file.name))
    for number, name in enumerate(PICKLES if pickles else ()):
        if not (folder / name).exists():
            write_pickle(folder / name, mark, zipped=number % 2 == 0)
    return folder


def write_pickle(file: Path, mark: Mark, *, zipped: bool) -> None:
    """As torch saves it, or as Python does."""
    if zipped:
        torch.save({"state": mark.pickle(file.name)}, file)
    else:
        file.write_bytes(pickle.dumps({"state": mark.pickle(file.name)}))


def name_code(folder: Path) -> None:
    """Let the JSON files that are there name the Python beside them."""
    for file, more in {
        "config.json": {"auto_map": AUTO_MAP, "custom_pipelines": {"text-generation": {
            "impl": "evil.Pipeline", "pt": ["AutoModelForCausalLM"]}}},
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": AUTO_MAP["AutoTokenizer"]},
                                  "trust_remote_code": True},
        "generation_config.json": {"custom_generate": "./custom_generate",
                                   "trust_remote_code": True},
        "adapter_config.json": {"auto_mapping": {"base_model_class": "Model",
                                                 "parent_library": "evil"}},
    }.items():
        if (folder / file).is_file():
            found = json.loads((folder / file).read_text())
            (folder / file).write_text(json.dumps(found | more))


class Watch:
    """What a stretch of a test makes Python do, by its audit events."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.programs: list[str] = []
        """Programs and shells started."""
        self.connections: list[str] = []
        """To other machines, names of them looked up."""
        self.imported: list[str] = []

    def __call__(self, event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            self.opened.append(os.path.abspath(os.fsdecode(arguments[0])))
        elif event == "import":
            self.imported.append(arguments[0])
        elif event in _PROGRAMS:
            self.programs.append(f"{event} {arguments!r:.400}")
        elif event in _CONNECTIONS:
            self.connections.append(f"{event} {arguments!r:.400}")

    def opened_in(self, folder: Path) -> set[str]:
        """Names of what was opened in a folder, relative to it."""
        paths = {Path(path) for path in self.opened}
        return {p.relative_to(folder).as_posix() for p in paths if p.is_relative_to(folder)}


_PROGRAMS = {
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile",
    "pty.spawn", "webbrowser.open",
}
_CONNECTIONS = {
    "socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto",
    "urllib.Request", "http.client.connect", "ftplib.connect",
}
_watches: list[Watch] = []
_hooked = False


@contextlib.contextmanager
def watching() -> Iterator[Watch]:
    """Watch what is done in it. (Python has no way to take such a hook away again: one is kept,
    that looks whether anyone watches.)"""
    global _hooked
    if not _hooked:
        sys.addaudithook(_hear)
        _hooked = True
    watch = Watch()
    _watches.append(watch)
    try:
        yield watch
    finally:
        _watches.remove(watch)


def _hear(event: str, arguments: tuple) -> None:
    for watch in _watches:
        watch(event, arguments)
