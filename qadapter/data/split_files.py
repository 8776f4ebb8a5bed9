"""Which files of a folder make up a split: as its README says, or as the files are named.

A split's name is taken whole: `train` is neither `train_prefs` nor `train_sft`. Where no file has
that very name, the one split that is of its kind will do (`my-data-train.jsonl`, `dev.jsonl` for
"validation"); where several are, none is guessed.
"""

import re
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from qadapter.errors import QAdapterError, listed, nearest, shown
from qadapter.system.documents import parse_yaml
from qadapter.system.textfiles import read_text

# The words by which `datasets` tells splits apart.
_KINDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_KIND_OF = {word: kind for kind, words in _KINDS.items() for word in words}
# How the hub names files: NAME-00000-of-00002, and a hash in older ones.
_SHARD = re.compile(r"(?P<name>.+?)-\d{4,6}-of-\d{4,6}(-[0-9a-f]+)?")
_NUMBER = re.compile(r"[-_. ]*\d+$")
_MOST_README = 2**24
_BETWEEN_WORDS = re.compile(r"[-_. \d]+")


class SplitName(NamedTuple):
    """What a file's path says about its split.

    Attributes:
        name: of the split; the file's own where no word tells.
        kind: "train", "validation" or "test" if it is one of that kind.
        others: further names that it answers to.
        sharded: named as the hub names files, so that the name is one for sure.
    """

    name: str
    kind: str | None = None
    others: tuple[str, ...] = ()
    sharded: bool = False


def split_name(file: PurePath, suffixes: Sequence[str]) -> SplitName:
    """The split of a file, by its path below the data's folder."""
    stem = next((file.name.removesuffix(s) for s in suffixes if file.name.endswith(s)), file.name)
    if shard := _SHARD.fullmatch(stem):
        name = shard["name"]
        # The hub's split names are words: in one with other signs, the split is a part.
        known = name in _KIND_OF or not name.replace(".", "").isidentifier()
        return SplitName(name, _kind(name) if known else None, sharded=True)
    unnumbered = _NUMBER.sub("", stem)
    folders = file.parts[-2::-1]
    # A name that is nothing but the word says it best; files come before their folders.
    for name in (unnumbered, *folders):
        if name in _KIND_OF:
            return SplitName(name, _KIND_OF[name], (stem,))
    for name in (unnumbered, *folders):
        if kind := _kind(name):
            return SplitName(name, kind, (stem,))
    return SplitName(stem, None, folders)


def _kind(name: str) -> str | None:
    kinds = {_KIND_OF.get(word) for word in _BETWEEN_WORDS.split(name.lower())} - {None}
    return kinds.pop() if len(kinds) == 1 else None


def choose_files(
    folder: Path, files: Sequence[Path], split: str, suffixes: Sequence[str]
) -> list[Path]:
    """The files of a split, in order.

    Raises:
        QAdapterError: none, or several splits of its kind; lists those there.
    """
    named = {file: split_name(file.relative_to(folder), suffixes) for file in files}
    exact = [file for file, found in named.items() if split in (found.name, *found.others)]
    if exact:
        return exact
    kind = _KIND_OF.get(split)
    like = [file for file, found in named.items() if kind is not None and found.kind == kind]
    if len({named[file].name for file in like}) == 1:
        return like
    if not like and split == "train" and not any(f.kind or f.sharded for f in named.values()):
        return list(files)  # nothing is said about splits: it is one
    names = list(dict.fromkeys(found.name for found in named.values()))
    where = listed(str(file.relative_to(folder)) for file in files)
    raise QAdapterError(
        f"folder {folder} has no file named for split {split!r}; it has {listed(names)} ({where})"
        + nearest(split, names)
    )


# --- README.md ----------------------------------------------------------------------------------


def files_of_readme(folder: Path, config: str | None, split: str) -> list[Path] | None:
    """The files that `configs` in the header of a hub dataset's README names; None without it.

    Raises:
        QAdapterError: no such configuration, several to choose from, no such split, or its files
            are not there.
    """
    found = _configs(folder / "README.md")
    if not found:
        return None
    readme = folder / "README.md"
    if config is None:
        config = next((name for name, entry in found.items() if entry.get("default")), "default")
        if len(found) == 1:
            (config,) = found
        elif config not in found:
            raise QAdapterError(
                f"{readme} has the configurations {listed(found)}; choose one with config "
                "(--dataset_config)"
            )
    elif config not in found:
        raise QAdapterError(
            f"{readme} has no configuration {config!r}; it has {listed(found)}"
            + nearest(config, found)
        )
    patterns = _patterns(found[config].get("data_files"))
    root = str(found[config].get("data_dir") or "")
    if split not in patterns:
        raise QAdapterError(
            f"{readme} has no split {split!r} in configuration {config!r}; it has "
            f"{listed(patterns)}" + nearest(split, patterns)
        )
    for name in (root, *patterns[split]):
        if name.startswith(("/", "~")) or ".." in name.split("/") or "\\" in name:
            raise QAdapterError(f"{readme} names {shown(name)}, which is not within {folder}")
    try:
        found_files = [sorted((folder / root).glob(pattern)) for pattern in patterns[split]]
    except (NotImplementedError, ValueError, OSError, RecursionError) as error:
        raise QAdapterError(f"{readme}: {listed(patterns[split])}: {error}") from error
    files = [file for files in found_files for file in files]
    if not files:
        raise QAdapterError(
            f"{readme} names {listed(patterns[split])} for split {split!r}; no such file is there"
        )
    return list(dict.fromkeys(files))


def _configs(readme: Path) -> dict[str, dict[str, Any]]:
    """Name → entry, of those that say which files they have."""
    if not readme.is_file():
        return {}
    try:
        text = read_text(readme, most=_MOST_README)
        _, header, _ = re.split(r"^---\s*$", text, maxsplit=2, flags=re.MULTILINE)
        entries = parse_yaml(header, readme)["configs"]
        return {str(e["config_name"]): e for e in entries if _patterns(e.get("data_files"))}
    except (QAdapterError, ValueError, TypeError, KeyError, AttributeError):
        return {}  # a README is free to be anything


def _patterns(data_files: Any) -> dict[str, list[str]]:
    """Split → glob patterns, of all that `data_files` may be."""
    if isinstance(data_files, str):
        data_files = [data_files]
    if isinstance(data_files, list):
        entries = [e if isinstance(e, dict) else {"split": "train", "path": e} for e in data_files]
    else:
        entries = [{"split": name, "path": path} for name, path in (data_files or {}).items()]
    found: dict[str, list[str]] = {}
    for entry in entries:
        paths = entry["path"] if isinstance(entry["path"], list) else [entry["path"]]
        found.setdefault(str(entry["split"]), []).extend(map(str, paths))
    return found
