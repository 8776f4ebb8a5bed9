"""What a type checker is told: that there are types, of every public name. `make lint` runs one."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import qadapter
import qadapter_kernels

ROOT = Path(__file__).parents[1]
OWN = ("self", "cls")
MYPY = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]


@pytest.mark.parametrize("package", [qadapter, qadapter_kernels])
def test_says_that_it_is_typed(package):
    assert (Path(package.__file__).parent / "py.typed").is_file()


def test_what_is_imported_on_first_use_is_told_to_a_type_checker():
    """Which sees the imports that never run, and not the table that they go by."""
    tree = ast.parse(Path(qadapter.__file__).read_text())
    (told,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in told.body if isinstance(node, ast.ImportFrom)]
    names = {name.name: node.module for node in imports for name in node.names}
    del names["Any"]
    assert names == qadapter._HOMES
    assert sorted(names) == qadapter.__all__


@pytest.mark.parametrize("package", [qadapter, qadapter_kernels])
def test_every_public_name_is_used_before_the_type_checker(package):
    tree = ast.parse((ROOT / "tests/typed_use.py").read_text())
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert set(package.__all__) <= used
    assert "tests/typed_use.py" in MYPY["files"]


def public_packages() -> list[str]:
    found = []
    for file in (ROOT / "qadapter").rglob("__init__.py"):
        if re.search(r"^__all__ = ", file.read_text(), re.MULTILINE):
            found.append(".".join(file.relative_to(ROOT).parent.parts))
    return [*sorted(found), "qadapter_kernels"]


def functions(name: str, public: object) -> Iterator[tuple[str, object]]:
    """What can be called of a public name, by dotted names."""
    if not inspect.isclass(public):
        if inspect.isfunction(public):
            yield name, public
        return
    for own, member in vars(public).items():
        member = getattr(member, "__func__", getattr(member, "fget", member))
        ours = getattr(member, "__module__", "").startswith("qadapter")  # no NamedTuple's
        if inspect.isfunction(member) and ours and (own[0] != "_" or own == "__call__"):
            yield f"{name}.{own}", member


@pytest.mark.parametrize("package", public_packages())
def test_every_public_function_says_its_types(package):
    module = importlib.import_module(package)
    untold = []
    for name in module.__all__:
        for place, function in functions(name, getattr(module, name)):
            signature = inspect.signature(function)
            told = [p.annotation for p in signature.parameters.values() if p.name not in OWN]
            if inspect.Parameter.empty in (*told, signature.return_annotation):
                untold.append(place)
    assert untold == []


def test_modules_that_the_type_checker_is_lenient_with_are_there():
    ours = [
        name for override in MYPY["overrides"] for name in override["module"]
        if name.startswith("qadapter") and not name.endswith("*")
    ]
    files = [name.replace(".", "/") for name in ours]
    places = [ROOT, ROOT / "kernels"]
    there = [any((place / f"{file}.py").is_file() for place in places) for file in files]
    assert [name for name, found in zip(ours, there, strict=True) if not found] == []
    assert ours and MYPY["strict"]
