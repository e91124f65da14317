"""YAML of people's recipes, read so that nothing in it is taken otherwise than it reads."""

from __future__ import annotations

import reprlib
from typing import Any

from surgery.headers import require_shallow

_MOST, _DEEPEST = 100_000, 20  # values with every alias written out, and levels of nesting


def load_yaml(text: str) -> Any:
    """The content of a YAML text: plain data. Raises yaml.YAMLError for what is none, and ValueError for a key that is there twice, for
    nesting too deep for a recipe, and for aliases that multiply or form a circle.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
    require_shallow(text)
    found = yaml.load(text, Loader)
    _bounded(found, {}, 0)
    return found


def _mapping(loader: Any, node: Any) -> dict[Any, Any]:
    """A mapping in which no key is written twice; what ``<<`` brings along may be written over."""
    written: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key = loader.construct_object(key_node, deep=True)
        if key in written:
            raise ValueError(f"line {key_node.start_mark.line + 1}: the key {reprlib.repr(key)} is there twice")
        written.add(key)
    loader.flatten_mapping(node)
    pairs = ((loader.construct_object(k, deep=True), loader.construct_object(v, deep=True)) for k, v in node.value)
    return dict(pairs)


def _bounded(value: Any, seen: dict[int, int], depth: int) -> int:
    """How many values there are with every alias written out. Raises ValueError where they are too many or too deep for a recipe."""
    if id(value) in seen:
        count = seen[id(value)]
        if count < 0:
            raise ValueError("it contains itself")
        return count
    if not isinstance(value, dict | list):
        return 1
    if depth > _DEEPEST:
        raise ValueError(f"it is nested more than {_DEEPEST} deep")
    seen[id(value)] = -1
    parts = list(value.values()) if isinstance(value, dict) else value
    seen[id(value)] = count = 1 + sum(_bounded(part, seen, depth + 1) for part in parts)
    if count > _MOST:
        raise ValueError(f"its aliases stand for more than {_MOST:,} values")
    return count
