"""Runs the code blocks of the pages, with what ``stand_ins`` puts in place of what they name."""

from __future__ import annotations

import ast
import builtins
import importlib
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from pages import Block, read
from stand_ins import ALWAYS, COMPILED, GIVEN, MADE, NAMES, PARSED, PROGRAMS, REST, SHORTER
from tiny_models import cli

from qadapter.compare import read_config
from qadapter.data import as_preferences


class Page:
    """What the blocks of one page share: their folder, and the names that its Python made."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder = folder
        self.names: dict = {}
        self.monkeypatch = monkeypatch

    def run(self, block: Block) -> None:
        """Run or check a block by its language.

        Raises:
            AssertionError: it fails; nothing says how to run it; it has no language.
        """
        way = {"sh": self._shell, "python": self._python, "json": _json, "jsonl": _json,
               "yaml": self._yaml, "text": lambda block: None}.get(block.language)
        assert way is not None, f"{block.place}: a language that nothing runs: {block.language!r}"
        way(block)

    # --- shell ------------------------------------------------------------------------------------

    def _shell(self, block: Block) -> None:
        for words in commands(block.text):
            text = " ".join(words)
            reason = next((PARSED[x] for x in PARSED if f"{text} ".startswith(f"{x} ")), None)
            if reason is None and words[0] in PROGRAMS:
                PROGRAMS[words[0]](words, self.folder)
                continue
            assert reason or words[0] == "qadapter", (
                f"{block.place}: {text}: say in tests/docs/stand_ins.py how it is checked"
            )
            assert "qadapter" in words, f"{block.place}: {text}"
            arguments = words[words.index("qadapter") + 1:]
            with self.monkeypatch.context() as patch:
                if reason:
                    patch.setattr(f"{_module(arguments[0])}.run", lambda *a, **k: None)
                    patch.setenv("HF_TOKEN", "hf_login")  # as after hf auth login
                code = cli(*self._stood_in(arguments, run=not reason))
            assert code == 0, f"{block.place}: {text} ended with {code}"

    def _stood_in(self, arguments: list[str], run: bool) -> list[str]:
        """The arguments with what stands in for names, for ``…`` and for a command's usual size."""
        name, *rest = [NAMES.get(word, word) for word in arguments]
        if "…" in rest:
            rest.remove("…")
            rest += _missing(rest, REST)
        if run:
            rest += _missing([x for x in rest if x not in ALWAYS], SHORTER.get(name, ()))
            if name in ("train", "export") and "--output_dir" in rest:  # another way to make it
                shutil.rmtree(rest[rest.index("--output_dir") + 1], ignore_errors=True)
        return [name, *rest]

    # --- the rest ---------------------------------------------------------------------------------

    def _python(self, block: Block) -> None:
        for name, stand_in in NAMES.items():
            block = block._replace(text=block.text.replace(f'"{name}"', f'"{stand_in}"'))
        code = compile("\n" * block.line + block.text, block.page, "exec")
        if any(page == block.page and block.text.startswith(beginning)
               for page, beginning in COMPILED):
            return
        for name in _free(block.text) - set(self.names):
            assert name in GIVEN, f"{block.place}: {name} is made nowhere"
            self.names[name] = GIVEN[name](self.folder)
        exec(code, self.names)

    def _yaml(self, block: Block) -> None:
        """A comparison, or options of ``train``."""
        values = yaml.safe_load(block.text)
        path = self.folder / "block.yaml"
        path.write_text(block.text, encoding="utf-8")
        if "methods" in values:
            for name in re.findall(r"(?:dataset_name|file): ([\w.-]+\.jsonl?)", block.text):
                (self.folder / name).touch()
            read_config(path)
        else:
            with self.monkeypatch.context() as patch:
                patch.setattr(f"{_module('train')}.run", lambda *a, **k: None)
                assert cli("train", "--config", path) == 0, block.place


def _json(block: Block) -> None:
    """Rows of preferences, none of which is dropped (of domains the first is chosen), or anything
    else."""
    rows = ([json.loads(block.text)] if block.language == "json"
            else [json.loads(line) for line in block.text.splitlines()])
    columns = set(rows[0]) if isinstance(rows[0], dict) else set()
    if columns & {"chosen", "chosen_ids", "responses"}:
        domain = next(iter(rows[0]["responses"])) if "responses" in columns else None
        assert len(as_preferences(rows, domain=domain)) >= len(rows), block.place


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a shell block, comments and the environment's settings left out;
    those that end in a backslash or within quotes go on in the next line."""
    pending = ""
    for line in text.splitlines():
        pending += line
        if pending.endswith("\\"):
            pending = pending[:-1] + " "
            continue
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:  # a quote is open
            pending += "\n"
            continue
        pending = ""
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words.pop(0)
        if words:
            yield words
    assert not pending, f"a command that doesn't end: {pending}"


def _missing(given: list[str], flags: tuple[str, ...]) -> list[str]:
    """Of the flags, each with its value, those that aren't given."""
    there = {word.replace("-", "_") for word in given if word.startswith("--")}
    pairs = zip(flags[::2], flags[1::2], strict=True)
    return [x for flag, value in pairs if flag.replace("-", "_") not in there
            for x in (flag, value)]


def _module(command: str) -> str:
    name = {"eval": "evaluate"}.get(command, command)
    importlib.import_module(f"qadapter.commands.{name}")
    return f"qadapter.commands.{name}"


def _free(text: str) -> set[str]:
    """Names that Python reads at its top level and doesn't make itself."""
    tree = ast.parse(text)
    made = {name.asname or name.name.partition(".")[0] for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom) for name in node.names}
    made |= {node.name for node in ast.walk(tree)
             if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    made |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    made |= {node.id for node in names if isinstance(node.ctx, ast.Store)}
    return {node.id for node in names} - made - set(dir(builtins))


def furnish(folder: Path, place: Path, page: str) -> None:
    """What a page finds in its folder: what every page does, and what it alone names."""
    shutil.copytree(place, folder, dirs_exist_ok=True)
    for name, make in MADE.items():
        if name in read(page):
            make(folder, name)
