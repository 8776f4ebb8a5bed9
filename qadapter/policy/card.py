"""The model card: README.md beside every saved adapter.

It says what the adapter is and what to load it with; its header is what the hub reads. It ends with
a comment that holds the digest of all before it, so that a card that people edited, or a README of
their own, is known for theirs and never written over.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCardData

from qadapter.system.markup import markdown_code, markdown_table, markdown_text
from qadapter.system.scratch import replacing

if TYPE_CHECKING:
    from qadapter.trunk.identity import BaseIdentity

CARD_NAME = "README.md"
TAGS = ("qadapter", "q-adapter", "preference-optimization")
_MARK = re.compile(
    r"\n<!-- Written by qadapter; once edited, it is never written over: ([0-9a-f]{64}) -->\n\Z"
)
_MOST_BYTES = 2**22


def adapter_card(
    name: str, base: BaseIdentity, described: Mapping[str, Any], *,
    results: Sequence[EvalResult] = (), datasets: str | Sequence[str] | None = None,
    license: str | None = None, tags: Iterable[str] = (), sections: Iterable[str] = (),
    packages: Sequence[str] = ("qadapter", "transformers", "torch"),
) -> str:
    """The card of an adapter, as ``write_card`` takes it.

    Args:
        name: what it is called, by its folder or on a hub.
        described: adapter and objective.
        results: what was measured, for the header.
        datasets: names on the hub.
        sections: Markdown that stands before the versions.
        packages: whose versions it names.
    """
    on_hub = is_hub_name(base.name)
    header = ModelCardData(
        base_model=base.name if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        library_name="qadapter", pipeline_tag="text-generation",
        datasets=datasets if datasets is None or isinstance(datasets, str) else list(datasets),
        license=license, tags=list(dict.fromkeys([*TAGS, *tags])),
        model_name=name if results else None, eval_results=list(results) or None,
    )
    versions = {package: importlib.metadata.version(package) for package in packages}
    return "\n\n".join([
        f"---\n{header.to_yaml()}\n---",
        f"# {markdown_text(name)}",
        "A [Q-Adapter](https://arxiv.org/abs/2407.03856) for "
        f"{markdown_code(base.name if on_hub else Path(base.name).name)}: a residual "
        "Q-function learned from preference pairs. Together with the frozen base it is the "
        "customised policy; what the base knew, it keeps.",
        "```python\nfrom qadapter import QAdapterModel\n\n"
        f"model = QAdapterModel.from_pretrained({_python(name)})  # loads its base too\n"
        "model.set_policy(strength=1.0)  # 0 is the base, more than 1 goes further\n```",
        "## Adapter and objective",
        table(described),
        *sections,
        "## Versions",
        table(versions),
    ])


def write_card(folder: str | Path, text: str) -> bool:
    """Write README.md, unless one is there that people wrote or edited.

    Returns:
        Whether it was written.

    Raises:
        OSError: the folder can't be written.
    """
    path = Path(folder) / CARD_NAME
    if not _is_ours(path):
        return False
    body = (text.rstrip("\n") + "\n").encode("utf-8", "backslashreplace")
    mark = ("\n<!-- Written by qadapter; once edited, it is never written over: "
            f"{hashlib.sha256(body).hexdigest()} -->\n")
    with replacing(path, "saving") as written:
        written.write_bytes(body + mark.encode())
    return True


def table(entries: Mapping[str, object]) -> str:
    """Two columns of texts."""
    return markdown_table(("", ""), entries.items())


def _is_ours(path: Path) -> bool:
    """Whether there is none, or it is as it was written here."""
    try:
        if not path.is_symlink() and not path.exists():
            return True
        if path.is_symlink() or not path.is_file() or path.stat().st_size > _MOST_BYTES:
            return False
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return False
    mark = _MARK.search(text)
    return mark is not None and hashlib.sha256(text[: mark.start()].encode()).hexdigest() == mark[1]


def is_hub_name(name: str) -> bool:
    """Whether it can be a repository's, and no folder is called so."""
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is not None and not is_place(name)


def is_place(name: str) -> bool:
    """Whether a base's name is a place of this machine."""
    path = Path(name).expanduser()
    return bool(name) and (path.is_absolute() or path.exists() or name.startswith("."))


def _python(text: str) -> str:
    """As a string of Python on one line."""
    plain = text.isprintable() and not set(text) & set('"\\')
    return f'"{text}"' if plain else repr(text)
