"""Choosing the chat template of a tokenizer: for bases that have none, or instead of theirs."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import CHAT_TEMPLATE_FILE

from qadapter.data.chat import ChatTemplate
from qadapter.data.encoding import special_prefix
from qadapter.errors import QAdapterError
from qadapter.system.textfiles import read_text

PLAIN = "plain"
"""Names the template that comes with us: roles as words, as HH-RLHF's transcripts have them."""


def use_chat_template(tokenizer: PreTrainedTokenizerBase, source: str) -> str:
    """Give a tokenizer a chat template, in place.

    Args:
        source: "plain"; a .jinja file; a folder or hub name whose tokenizer has one.

    Returns:
        A line that says which template it is; nothing where it is the tokenizer's own.

    Raises:
        QAdapterError: not there, not Jinja, or it leaves out what is said.
    """
    text = _plain(tokenizer) if source == PLAIN else _read(source)
    return set_chat_template(
        tokenizer, text, f"{source} (roles as words)" if source == PLAIN else source
    )


def set_chat_template(tokenizer: PreTrainedTokenizerBase, text: str, source: str) -> str:
    """`use_chat_template` of a template's text.

    Args:
        source: where it came from, for messages.
    """
    before = tokenizer.chat_template
    if text == default_of(before):
        return ""
    tokenizer.chat_template = text
    try:
        _check(ChatTemplate(tokenizer, "the chat template"))
    except QAdapterError as error:
        tokenizer.chat_template = before
        raise QAdapterError(f"chat_template {source}: {error}") from error
    own = "which has none" if not before else "in place of its own"
    return f"chat template: {source}, for the tokenizer of {tokenizer.name_or_path}, {own}"


def default_of(template: str | dict[str, str] | None) -> str | None:
    """A tokenizer's template, or the one it calls its default."""
    return template.get("default") if isinstance(template, dict) else template


def _check(chat: ChatTemplate) -> None:
    """Raises QAdapterError unless a question and its answer are rendered, whole and with an end."""
    asked = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    chat.end  # noqa: B018 - first: it says why the template can't be used
    if chat.lost(asked, {}):
        raise QAdapterError(
            "the chat template renders a question and its answer without the question"
        )


def _plain(tokenizer: PreTrainedTokenizerBase) -> str:
    """Behind what the tokenizer puts before plain text."""
    text = Path(__file__).with_name("plain.jinja").read_text(encoding="utf-8")
    prefix = tokenizer.decode(special_prefix(tokenizer))
    return (f"{{{{- {json.dumps(prefix)} -}}}}\n" if prefix else "") + text


def _read(source: str) -> str:
    path = Path(source).expanduser()
    if path.is_file():
        text = read_text(path)
    elif (path / CHAT_TEMPLATE_FILE).is_file():
        text = read_text(path / CHAT_TEMPLATE_FILE)
    elif not path.is_dir() and (path.suffix == ".jinja" or source[:1] in "./~"):
        raise QAdapterError(f"chat_template {source}: no such file or folder")
    else:
        text = _of_tokenizer(source)
    if not text.strip():
        raise QAdapterError(f"chat_template {source} is empty")
    return text


def _of_tokenizer(source: str) -> str:
    try:
        found = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # transformers and the hub raise many kinds
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise QAdapterError(
            f"chat_template {source}: neither {PLAIN!r}, nor a file, nor a tokenizer that can be "
            f"loaded ({reason})"
        ) from error
    if not (text := default_of(found.chat_template)):
        raise QAdapterError(f"chat_template {source}: its tokenizer has no chat template")
    return text
