"""What a judging model is asked, and how its reply is read: a file that can be replaced."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from qadapter.errors import QAdapterError, nearest, shown
from qadapter.system.documents import read_yaml
from qadapter.system.patterns import Pattern

PROMPT_FILE = Path(__file__).with_name("endpoint_prompt.yaml")
_PLACES = ("prompt", "answer_a", "answer_b")


@dataclass(frozen=True)
class JudgePrompt:
    """The content of a prompt file."""

    user: str
    verdict: str
    first: str
    second: str
    tie: str
    system: str = ""
    request: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path = PROMPT_FILE) -> JudgePrompt:
        """
        Raises:
            QAdapterError: unreadable, or not what a prompt file must hold.
        """
        try:
            values = read_yaml(path)
            _check_keys(values, cls)
            found = cls(**values)
            for name, value in vars(found).items():
                wanted = dict if name == "request" else str
                if not isinstance(value, wanted):  # 1 without quotes is a number, "1" is text
                    kind = "keys and values" if wanted is dict else "text (in quotes)"
                    raise TypeError(f"{name} must be {kind}, got {shown(value)}")
            _check_request(found.request)
            groups = Pattern(found.verdict).groups
        except (QAdapterError, ValueError, TypeError) as error:
            raise QAdapterError(
                f"judge prompt {path} can't be used: {shortened(str(error), 400)}"
            ) from error
        if missing := [name for name in _PLACES if f"{{{name}}}" not in found.user]:
            raise QAdapterError(f"judge prompt {path}: user has no {{{missing[0]}}}")
        if groups != 1:
            raise QAdapterError(f"judge prompt {path}: verdict must have one group, has {groups}")
        return found

    def messages(self, prompt: str, first: str, second: str) -> list[dict[str, str]]:
        values = dict(zip(_PLACES, (prompt, first, second), strict=True))
        # In one pass: an answer that holds "{answer_b}" stays as it is.
        user = re.sub(
            r"\{(" + "|".join(_PLACES) + r")\}", lambda match: values[match[1]], self.user
        )
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": user}]

    def read_verdict(self, reply: str) -> float | None:
        """1 if the first answer is better, 0 if the second is, 0.5 for a tie; None: unreadable.

        Raises:
            QAdapterError: ``verdict`` comes to no end on it.
        """
        matches = Pattern(self.verdict).findall(reply)
        said = {self.first: 1.0, self.second: 0.0, self.tie: 0.5}
        return said.get(matches[-1]) if matches else None


def _check_keys(values: Any, cls: type) -> None:
    """Raises TypeError unless the file's content makes a prompt."""
    if not isinstance(values, dict):
        raise TypeError("it must hold keys and values")
    known = {found.name: found for found in fields(cls)}
    if unknown := [key for key in values if key not in known]:
        raise TypeError(f"unknown key {shown(unknown[0])}{nearest(str(unknown[0]), known)}")
    for name, found in known.items():
        if name not in values and found.default is found.default_factory is MISSING:
            raise TypeError(f"{name} is missing")


def _check_request(request: dict[str, Any]) -> None:
    """Raises TypeError or ValueError for what the client would refuse, but after all answers are
    drawn."""
    try:
        from openai.resources.chat.completions import Completions
    except ImportError:
        return  # without the client nothing is asked; EndpointJudge says so
    known = inspect.signature(Completions.create).parameters.keys()
    known = known - {"self", "model", "messages", "stream"}
    for name, value in request.items():
        if name not in known:
            raise TypeError(
                f"request takes no {shown(name)}{nearest(str(name), sorted(known))} (a server's "
                "own arguments go into extra_body)"
            )
        if str(name).startswith("extra_") and not isinstance(value, dict):
            raise TypeError(f"request: {name} must be keys and values, got {shown(value)}")
    json.dumps(request, allow_nan=False)  # YAML has infinity


def shortened(text: str, length: int = 200) -> str:
    """On one line."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"
