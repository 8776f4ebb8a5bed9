"""YAML files in which a key that stands twice is an error: the first one would be lost without a
word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from qadapter.errors import QAdapterError
from qadapter.system.textfiles import read_text


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands there twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read(path: str | Path) -> Any:
    """What a YAML file holds.

    Raises:
        QAdapterError: it can't be read, is no YAML, or a key stands in it twice; names file and
            line.
    """
    try:
        return yaml.load(read_text(path), _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or error
        raise QAdapterError(f"{where} is not YAML: {problem}") from error
