"""JSON objects that tell by themselves whether they are what was written: they hold a digest of all
else in them. Results that are kept, and read again much later, are such objects."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from qadapter.errors import QAdapterError

SEAL = "sha256"


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """The object with its digest, as its last entry; an older one is replaced."""
    content = {name: x for name, x in value.items() if name != SEAL}
    return {**content, SEAL: _digest(content)}


def opened(value: Any) -> dict[str, Any]:
    """The object without its digest. One that has none is taken as it is: those written before
    have none.

    Raises:
        QAdapterError: no object, or not what was written.
    """
    if not isinstance(value, dict):
        raise QAdapterError("it is no object")
    content = {name: x for name, x in value.items() if name != SEAL}
    if SEAL in value and value[SEAL] != _digest(content):
        raise QAdapterError(f"it is not what was written: its {SEAL} is of something else")
    return content


def _digest(content: dict[str, Any]) -> str:
    text = json.dumps(json.loads(json.dumps(content)), sort_keys=True)  # keys are text by then
    return hashlib.sha256(text.encode()).hexdigest()
