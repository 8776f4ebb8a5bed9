"""Adapters on the Hugging Face hub: their files and no others, in one commit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from transformers.utils import CHAT_TEMPLATE_FILE

from qadapter.errors import QAdapterError
from qadapter.policy.adapter_files import (
    CONFIG_NAME,
    PEFT_CONFIG_NAME,
    WEIGHTS_NAME,
    AdapterFiles,
)
from qadapter.policy.card import CARD_NAME, is_place
from qadapter.system import manifest

_OWN = (CONFIG_NAME, WEIGHTS_NAME, PEFT_CONFIG_NAME, CHAT_TEMPLATE_FILE)
"""What ``storage.write`` writes."""


@contextmanager
def telling(repo: str, way_out: str) -> Iterator[None]:
    """Around what is asked of the hub: whatever it fails of becomes one line.

    Args:
        way_out: what is safe, and how it goes on.

    Raises:
        QAdapterError: no network, no token, no permission, a name that can't be one.
    """
    try:
        yield
    except QAdapterError:
        raise
    except Exception as error:  # of several libraries
        raise QAdapterError(f"push_to_hub: {repo}: {first_line(error)}; {way_out}") from error


def first_line(error: BaseException) -> str:
    """The rest are hints to other libraries' users."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def create(repo: str, token: str | None = None, private: bool | None = None) -> str:
    """The repository's full name, once it is there.

    Raises:
        QAdapterError: as ``telling``.
    """
    with telling(repo, "nothing was sent: look at the name, the network and the token (hf auth "
                 "login)"):
        return HfApi(token=token).create_repo(repo, private=private, exist_ok=True).repo_id


def adapter_operations(
    folder: str | Path, more: Mapping[str, Path] | None = None
) -> list[CommitOperationAdd]:
    """What a saved adapter consists of, as it is now: the files that a load reads, a manifest of
    these alone, and the card. Nothing else of its folder is sent, and no place of this machine: a
    base that is known by one goes by the last part of its name.

    Args:
        more: other files, by their names in the repository.

    Raises:
        QAdapterError: a file is missing, or not what was saved.
    """
    folder = Path(folder)
    contents = {name: path.read_bytes() for name, path in (more or {}).items()}
    parts = _add_adapter(contents, folder, "")
    for part in parts:
        _add_adapter(contents, folder / part, f"{part}/")
    listed = [f"{part}/{manifest.MANIFEST_NAME}" for part in parts]
    own = [name for name in contents if name in _OWN]
    contents[manifest.MANIFEST_NAME] = manifest.text(contents, [*own, *listed])
    card = folder / CARD_NAME
    if card.is_file():
        contents[CARD_NAME] = card.read_bytes()
    return [CommitOperationAdd(name, content) for name, content in sorted(contents.items())]


def push(
    folder: str | Path, repo: str, way_out: str, *, commit_message: str = "Upload adapter",
    token: str | None = None, **kwargs: Any,
) -> str:
    """Send a saved adapter; the commit's address.

    Args:
        kwargs: of ``HfApi.create_commit``.

    Raises:
        QAdapterError: as ``telling``.
    """
    return commit(
        repo, adapter_operations(folder), message=commit_message, way_out=way_out, token=token,
        **kwargs,
    ).commit_url


def _add_adapter(contents: dict[str, bytes], folder: Path, prefix: str) -> list[str]:
    """Adds an adapter's files and, of a part, their manifest; gives the parts that it has."""
    files = AdapterFiles(folder)
    listed = files.manifest.files if files.manifest else ()
    own = {name: _without_places(name, files.checked(name).read_bytes())
           for name in listed if name in _OWN}
    contents |= {prefix + name: content for name, content in own.items()}
    if prefix:
        contents[prefix + manifest.MANIFEST_NAME] = manifest.text(own, own)
    return [name.partition("/")[0] for name in listed
            if name.endswith(f"/{manifest.MANIFEST_NAME}")]


def _without_places(name: str, content: bytes) -> bytes:
    if name not in (CONFIG_NAME, PEFT_CONFIG_NAME):
        return content
    described = json.loads(content)
    told, key = (described["base"], "name") if name == CONFIG_NAME else (
        described, "base_model_name_or_path"
    )
    if told.get(key) is None or not is_place(told[key]):
        return content
    told[key] = Path(told[key]).name
    return (json.dumps(described, indent=2) + "\n").encode()


def commit(
    repo: str, operations: list[CommitOperationAdd], *, message: str, way_out: str,
    token: str | None = None, **kwargs: Any,
) -> Any:
    """What ``HfApi.create_commit`` gives.

    Raises:
        QAdapterError: as ``telling``.
    """
    with telling(repo, way_out):
        return HfApi(token=token).create_commit(
            repo, operations, commit_message=message, **kwargs
        )
