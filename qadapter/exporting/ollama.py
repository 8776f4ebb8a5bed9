"""A Modelfile for Ollama: the GGUF file's prompts, in the template language that Ollama has.

A chat template is a program, and Ollama's is another one. What nearly all of them write is one
text before and one behind each message, by its role: those are read off what the given one renders
for conversations of known content, and are taken only if they make up what it renders for others.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from qadapter.data.templates import default_of
from qadapter.exporting.engines import OLLAMA_UNCUT

Render = Callable[["Conversation"], str]
Conversation = Sequence[tuple[str, str]]
"""(role, content): an optional system message, then user and assistant in turns."""

_NEWLINES = {"\n", "\r"}
_S, _U, _A, _V = (f"{name}0q{name}" for name in ("Sys", "Uno", "Ans", "Due"))
_PROBES: tuple[Conversation, ...] = tuple(
    [*system, *turns]
    for system in ((), (("system", "Talk like\na {{pirate}}."),))
    for turns in (
        (("user", "What is 1 + 1?"),),
        (("user", "a"), ("assistant", "b\n\nc"), ("user", "日本語 <b> \"d\" 'e' {% f %}")),
        (("user", "g"), ("assistant", "h"), ("user", "i"), ("assistant", "j"), ("user", "k")),
    )
)


@dataclasses.dataclass(frozen=True)
class ChatFormat:
    """The texts around messages. A conversation is ``start``, its messages, ``prompt``."""

    start: str
    before: dict[str, str]
    """By role, of user and assistant; of system, where there can be one."""
    behind: dict[str, str]
    prompt: str
    """What asks for an answer."""
    system_default: str | None = None
    """What the template says where no system message is; "": nothing, in a message of its own;
    None: no message."""
    system_in: str | None = None
    """"first" or "last": the user's message that it is put before the content of; None: it is a
    message of its own."""

    def render(self, conversation: Conversation) -> str:
        """As Ollama does by ``template``."""
        messages = [m for m in conversation if m[0] != "system"]
        system = "".join(content for role, content in conversation if role == "system")
        taking = {"first": 0, "last": len(messages) - 1}.get(self.system_in)
        whole = system or self.system_default or ""
        if "system" in self.before:
            whole = self.before["system"] + whole + self.behind["system"]
        text = self.start
        if self.system_in is None and (system or self.system_default is not None):
            text += whole
        for i, (role, content) in enumerate(messages):
            text += self.before[role]
            if i == taking and system:
                text += whole
            text += content + self.behind[role]
        return text + self.prompt

    def template(self) -> str:
        """In the template language of Go."""
        before = {role: _literal(text) for role, text in self.before.items()}
        behind = {role: _literal(text) for role, text in self.behind.items()}
        system = taken_in = ""
        if self.system_in is not None:
            # The first message is the system's: the user's first one is that or the next.
            place = "le $i 1" if self.system_in == "first" else "eq (len (slice $.Messages $i)) 1"
            taken_in = (
                f"{{{{ if and $.System ({place}) }}}}{before['system']}{{{{ $.System }}}}"
                f"{behind['system']}{{{{ end }}}}"
            )
        elif "system" in before:
            system = f"{before['system']}{{{{ .System }}}}{behind['system']}"
            if self.system_default != "":
                system = f"{{{{ if .System }}}}{system}{{{{ end }}}}"
        return (
            f"{_literal(self.start)}{system}"
            '{{ range $i, $m := .Messages }}{{ if eq .Role "user" }}'
            f"{before['user']}{taken_in}{{{{ .Content }}}}{behind['user']}"
            '{{ else if eq .Role "assistant" }}'
            f"{before['assistant']}{{{{ .Content }}}}{behind['assistant']}"
            f"{{{{ end }}}}{{{{ end }}}}{_literal(self.prompt)}"
        )


# --- reading a format off a template ------------------------------------------------------------


def chat_format(tokenizer: PreTrainedTokenizerBase, adds_bos: bool) -> ChatFormat | None:
    """The format that a tokenizer's chat template renders, or None if it is not of this kind.

    Args:
        adds_bos: whether the engine puts a bos before what is rendered; then it is not in it.
    """
    if default_of(tokenizer.chat_template) is None:
        return None

    def render(conversation: Conversation) -> str:
        text: str = tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in conversation],
            tokenize=False, add_generation_prompt=True,
        )
        bos = tokenizer.bos_token
        return text.removeprefix(bos) if adds_bos and bos else text

    special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    try:
        found = _turns(render, special, tokenizer.bos_token or "")
        if found is not None:
            found = _with_system(render, found)
        if found is None:
            return None
        has_system = "system" in found.behind
        same = all(
            found.render(probe) == render(probe)
            for probe in _PROBES if has_system or probe[0][0] != "system"
        )
    except (TemplateError, ValueError):
        return None
    if '"' in (found.system_default or ""):  # Modelfiles can't quote all of them
        return None
    return found if same else None


def _turns(render: Render, special: Sequence[str], bos: str) -> ChatFormat | None:
    """The texts around a user's and an assistant's messages; a system's may be in the start."""
    first = _around(render([("user", _U)]), _U)
    more = _around(render([("user", _U), ("assistant", _A), ("user", _V)]), _U, _A, _V)
    if first is None or more is None or more[0] != first[0] or more[-1] != first[-1]:
        return None
    opening, asking = first
    to_assistant, to_user = more[1:3]
    end = re.match(rf"(?:{'|'.join(map(re.escape, special)) or '(?!)'})\s*", to_user)
    if end and opening.endswith(to_user[end.end():]):
        before_user = to_user[end.end():]
    else:
        before_user = _common_end(opening.removeprefix(bos), to_user)
    behind_assistant = to_user.removesuffix(before_user)
    behind_user = _common_start(asking, to_assistant)
    if behind_assistant and behind_user.startswith(behind_assistant):
        behind_user = behind_assistant  # what ends one turn ends the other
    return ChatFormat(
        opening.removesuffix(before_user),
        {"user": before_user, "assistant": to_assistant.removeprefix(behind_user)},
        {"user": behind_user, "assistant": behind_assistant},
        asking.removeprefix(behind_user),
    )


def _with_system(render: Render, turns: ChatFormat) -> ChatFormat | None:
    """How a system message comes in, if one is taken at all."""
    talk = [("user", _U), ("assistant", _A), ("user", _V)]
    before, behind = turns.before, turns.behind
    opening = turns.start + before["user"]
    try:
        whole = render([("system", _S), *talk])
    except (TemplateError, ValueError):
        return turns  # refused, or left out below
    if _S not in whole:
        return turns
    for place, contents in (("first", (_S, _U, _A, _V)), ("last", (_U, _A, _S, _V))):
        parts = _around(whole, *contents)
        if parts is None:
            continue
        at = contents.index(_S)
        ahead = opening if place == "first" else behind["assistant"] + before["user"]
        if parts[at].startswith(ahead):
            return dataclasses.replace(
                turns, before=before | {"system": parts[at].removeprefix(ahead)},
                behind=behind | {"system": parts[at + 1]}, system_in=place,
            )
        if place == "first" and parts[1].endswith(before["user"]):
            return _own_message(turns, parts[0], parts[1].removesuffix(before["user"]))
    return None


def _own_message(turns: ChatFormat, ahead: str, behind: str) -> ChatFormat | None:
    """A system message between two texts; the start may hold one that is said by default."""
    start, default = turns.start, None
    if ahead + behind and len(start) >= len(ahead + behind) and (
        start.startswith(ahead) and start.endswith(behind)
    ):
        start, default = "", start[len(ahead) : len(start) - len(behind)]
    elif ahead.startswith(start):
        ahead = ahead.removeprefix(start)
    else:
        return None
    return dataclasses.replace(
        turns, start=start, before=turns.before | {"system": ahead},
        behind=turns.behind | {"system": behind}, system_default=default,
    )


def _around(text: str, *contents: str) -> list[str] | None:
    """What stands before, between and behind contents, each of which is there once, in order."""
    parts = re.split("|".join(map(re.escape, contents)), text)
    found = re.findall("|".join(map(re.escape, contents)), text)
    return parts if found == list(contents) else None


def _common_start(a: str, b: str) -> str:
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
    return "".join(x for x, _ in same)


def _common_end(a: str, b: str) -> str:
    return _common_start(a[::-1], b[::-1])[::-1]


# --- writing ------------------------------------------------------------------------------------


def write_modelfile(
    folder: Path, gguf_name: str, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int],
    temperature: float,
) -> tuple[str, ...]:
    """Write ``Modelfile``.

    Args:
        gguf_name: the file beside it. end_ids: tokens that end an answer.
        temperature: that samples the policy.

    Returns:
        What there is to know of it.
    """
    begins = tokenizer("a")["input_ids"]
    found = chat_format(tokenizer, bool(begins) and begins[0] == tokenizer.bos_token_id)
    ends = dict.fromkeys(i for i in (tokenizer.eos_token_id, *end_ids) if i is not None)
    stops = tokenizer.convert_ids_to_tokens(list(ends))
    text = modelfile(gguf_name, found, stops, temperature)
    (folder / "Modelfile").write_text(text, encoding="utf-8")
    return tuple(_known(tokenizer, found))


def _known(tokenizer: PreTrainedTokenizerBase, found: ChatFormat | None) -> Iterator[str]:
    template = default_of(tokenizer.chat_template)
    if template is None:
        yield "The base has no chat template: Ollama gives it prompts as they are."
    elif found is None:
        yield (
            "The chat template is more than texts around messages, and is not translated: Ollama "
            "gives the model prompts as they are (write a TEMPLATE, or ask in its raw mode)."
        )
    else:
        yield (
            "TEMPLATE is the chat template in Ollama's language: compared on "
            f"{len(_PROBES)} conversations, they are the same prompts. Ollama itself was not run."
        )
        if "trim" in template or "strip" in template:
            yield "The chat template trims messages, Ollama's language can't."
        if "strftime_now" in template:
            yield "The date in it is that of the export."
        if "system" not in found.before:
            yield "It takes no system message."


def modelfile(
    gguf_name: str, found: ChatFormat | None, stops: Sequence[str], temperature: float
) -> str:
    """The Modelfile of a GGUF file beside it. Sampling is the policy's own: nothing is cut off.

    Args:
        found: how messages become a prompt; None: the prompt is what is given.
        stops: texts that end an answer.
    """
    place = f"./{gguf_name}"
    lines = [f"FROM {_quoted(place) if set(place) & _NEWLINES else place}"]
    if found is None:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    else:
        lines.append(f'TEMPLATE """{found.template()}"""')
        if found.system_default:
            lines.append(f"SYSTEM {_quoted(found.system_default)}")
    lines += [f"PARAMETER stop {_quoted(text)}" for text in stops if '"""' not in text]
    lines += [f"PARAMETER temperature {temperature:.6g}", *OLLAMA_UNCUT]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """As Modelfiles quote: nothing is escaped in them."""
    quotes = '"""' if ({'"'} | _NEWLINES) & set(text) else '"'
    return f"{quotes}{text}{quotes}"


def _literal(text: str) -> str:
    """A text in a template of Go, between the quotes of a Modelfile."""
    if "{{" in text or text.endswith("{") or '"' in text:
        return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}"
    return text
