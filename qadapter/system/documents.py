"""JSON and YAML that others wrote: one way in, with limits.

Whatever a document holds, reading it ends soon, with plain values or with one ``QAdapterError``
that names the file and, where there is one, the line. What the limits let through can be walked,
compared, printed and written down without a thought for its size.
"""

from __future__ import annotations

import json
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from qadapter.errors import QAdapterError, shown
from qadapter.system.textfiles import is_unicode, read_text

MAX_DEPTH = 100
"""Lists and objects within each other."""
MAX_DIGITS = 40
"""Of a whole number: one of 128 bits has 39."""
MAX_JSON_BYTES = 256 * 2**20
"""Of a JSON file that is read whole."""
MAX_CONFIG_BYTES = 2**20
"""Of a JSON file that describes an adapter."""
MAX_YAML_BYTES = 2**18
"""Of a YAML file, which a person writes."""
MAX_YAML_EXPANDED = 2**20
"""Characters and values of a YAML document when every alias is replaced by what it stands for."""


# --- JSON -----------------------------------------------------------------------------------------


def parse_json(
    text: str, name: str | Path, *, line: int | None = None, surrogates: bool = False
) -> Any:
    """The value of a JSON text.

    Args:
        name: of the file, or what else the text is, for messages.
        line: of the file, in which the text begins; None: no line is named.
        surrogates: let strings through that hold half of a surrogate pair, for a caller who tells
            what becomes of them.

    Raises:
        QAdapterError: not JSON, or beyond ``MAX_DEPTH`` or ``MAX_DIGITS``.
    """
    where = f"{name}" if line is None else f"{name}:{line}"
    try:
        value = json.loads(text, parse_int=_whole)
    except JSONDecodeError as error:
        if line is not None:
            where = f"{name}:{line + error.lineno - 1}"
        raise QAdapterError(f"{where} is not JSON: {error.msg} (column {error.colno})") from error
    except RecursionError as error:
        raise QAdapterError(f"{where} can't be read: {_TOO_DEEP}") from error
    except ValueError as error:
        raise QAdapterError(f"{where} can't be read: {error}") from error
    # Fewer brackets than that can't nest too deeply: lines of data files aren't walked.
    if not surrogates or text.count("[") + text.count("{") > MAX_DEPTH:
        _check(value, where, surrogates)
    return value


def read_json(path: str | Path, *, most: int = MAX_JSON_BYTES) -> Any:
    """The value of a JSON file.

    Args:
        most: bytes it may have.

    Raises:
        QAdapterError: as ``parse_json``; it can't be read, or is larger.
    """
    return parse_json(read_text(path, most=most), path, line=1)


_TOO_DEEP = f"lists and objects are more than {MAX_DEPTH} deep in each other"


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(_too_long(len(digits)))
    return int(digits)


def _too_long(digits: int) -> str:
    return f"a whole number has {digits:,} digits, more than {MAX_DIGITS}"


def _check(value: Any, where: str, surrogates: bool) -> None:
    """Raises QAdapterError for what is too deep and, unless they may be there, for surrogates."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        found: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                found += item.values()
                found += item
            elif isinstance(item, list):
                found += item
            elif not surrogates and isinstance(item, str) and not is_unicode(item):
                raise QAdapterError(
                    f"{where} holds half of a surrogate pair, which is no character: {shown(item)}"
                )
        level = found
        if not level:
            return
    raise QAdapterError(f"{where} can't be read: {_TOO_DEEP}")


# --- YAML -----------------------------------------------------------------------------------------


def parse_yaml(text: str, name: str | Path) -> Any:
    """The value of a YAML document: null, bool, int, float, str, list and dict.

    A date is text. A key that stands twice is an error: the first one would be lost without a word.

    Args:
        name: of the file, or what else the text is, for messages.

    Raises:
        QAdapterError: not YAML, a tag that makes something else of a value, or beyond
            ``MAX_DEPTH``, ``MAX_DIGITS``, ``MAX_YAML_BYTES`` or ``MAX_YAML_EXPANDED``.
    """
    if len(text) > MAX_YAML_BYTES:
        raise QAdapterError(f"{name} can't be read: YAML of more than {MAX_YAML_BYTES:,} bytes")
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        except (ValueError, OverflowError) as error:  # of an escape that is no character
            line = loader.get_mark().line + 1
            raise QAdapterError(f"{name}:{line} is not YAML: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else str(name)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise QAdapterError(f"{where} is not YAML: {problem}") from error


def read_yaml(path: str | Path) -> Any:
    """The value of a YAML file.

    Raises:
        QAdapterError: as ``parse_yaml``, or it can't be read.
    """
    return parse_yaml(read_text(path, most=4 * MAX_YAML_BYTES), path)


class _Loader(yaml.SafeLoader):
    """YAML's own types alone, within the limits."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > MAX_DEPTH + 1:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise ConstructorError(None, None, _TOO_DEEP, mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _measure(node, {})
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, OverflowError, TypeError) as error:
            # What a tag says doesn't fit: `!!int x`, `!!bool 7`.
            kind = node.tag.rpartition(":")[2]
            raise ConstructorError(
                None, None, f"{shown(node.value)} is no {kind} ({error})", node.start_mark
            ) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode) or key.tag == f"{_YAML}merge":
                continue
            value = self.construct_object(key)  # 1 and 0x1 are one key
            if value in seen:
                raise ConstructorError(
                    None, None, f"the key {shown(value)} stands there twice", key.start_mark
                )
            seen.add(value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if (digits := len(self.construct_scalar(node))) > MAX_DIGITS:
            raise ConstructorError(None, None, _too_long(digits), node.start_mark)
        return super().construct_yaml_int(node)

    def construct_yaml_str(self, node: yaml.ScalarNode) -> str:
        text: str = self.construct_scalar(node)
        if not is_unicode(text) or "\0" in text:
            what = "a zero byte" if "\0" in text else "half of a surrogate pair"
            raise ConstructorError(None, None, f"{what} is no character", node.start_mark)
        return text

    def construct_unknown(self, node: yaml.Node) -> None:
        raise ConstructorError(
            None, None, f"the tag {shown(node.tag)} means nothing here", node.start_mark
        )


_YAML = "tag:yaml.org,2002:"
_Loader.yaml_constructors = {
    _YAML + kind: getattr(_Loader, f"construct_yaml_{kind}")
    for kind in ("null", "bool", "int", "float", "str", "seq", "map")
} | {None: _Loader.construct_unknown}
# Dates, and what else YAML guesses from plain text, stay text.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found
            if tag == f"{_YAML}merge" or tag in _Loader.yaml_constructors]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _measure(node: yaml.Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """(characters and values, depth) of a node with every alias replaced by what it stands for.

    Args:
        known: of the nodes seen so far, by their ids; None within a node itself.

    Raises:
        ConstructorError: it holds itself, or is beyond the limits.
    """
    if id(node) in known:
        if (measured := known[id(node)]) is None:
            raise ConstructorError(None, None, "an alias stands for itself", node.start_mark)
        return measured
    known[id(node)] = None
    size, depth = 1, 1
    if isinstance(node, yaml.ScalarNode):
        size += len(node.value)
    else:
        pairs = isinstance(node, yaml.MappingNode)
        children = [child for pair in node.value for child in pair] if pairs else node.value
        for child in children:
            more, below = _measure(child, known)
            size, depth = size + more, max(depth, below + 1)
    if size > MAX_YAML_EXPANDED:
        raise ConstructorError(
            None, None, f"with its aliases written out it holds more than {MAX_YAML_EXPANDED:,} "
            "characters", node.start_mark,
        )
    if depth > MAX_DEPTH + 1:
        raise ConstructorError(None, None, _TOO_DEEP, node.start_mark)
    known[id(node)] = size, depth
    return size, depth
