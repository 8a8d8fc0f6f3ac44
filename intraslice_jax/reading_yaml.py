"""YAML of somebody else's: numbers, text, lists and mappings, within bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from intraslice_jax.errors import InputError
from intraslice_jax.reading import read_bytes

MAX_BYTES = 2**18
"""PyYAML reads some 100 KB in a second; settings have less than one, ratios of a large model some ten."""

MAX_DEPTH = 50

_KINDS = ("null", "bool", "int", "float", "str", "seq", "map")


class _Loader(yaml.SafeLoader):
    """PyYAML without dates, merged keys and references to other places, which can nest and repeat without end."""

    yaml_constructors = {
        tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if str(tag).rpartition(":")[2] in _KINDS
    } | {None: yaml.SafeLoader.construct_undefined}
    # What looks like a date is text.
    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in found if tag.rpartition(":")[2] in _KINDS]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            raise ConstructorError(None, None, "references (*name) are not read here; write the value again", mark)
        if self.depth == MAX_DEPTH:  # PyYAML slows down with the square of it
            raise ConstructorError(None, None, "it is nested too deeply", mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except (ValueError, LookupError) as error:  # `!!int ""`, `!!bool x`, thousands of digits
            kind = node.tag.rpartition(":")[2]
            raise ConstructorError(
                None, None, f"{node.value!r:.60} cannot be read as {kind}", node.start_mark
            ) from error
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ConstructorError(None, None, "a number has more than 63 bits", node.start_mark)
        if isinstance(value, str) and ("\0" in value or not _encodes(value)):
            raise ConstructorError(None, None, "text holds what is no character", node.start_mark)
        return value

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        pairs, seen = node.value if isinstance(node, yaml.MappingNode) else (), set()
        for key, _ in pairs:  # PyYAML keeps the last of two equal keys
            if not isinstance(key, yaml.ScalarNode):
                raise ConstructorError(None, None, "a list or mapping cannot be a key", key.start_mark)
            if key.value in seen:
                raise ConstructorError(None, None, f"{key.value!r:.60} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, advice: str) -> Any:
    """What a YAML file holds: None, numbers, text, lists, mappings.

    Args:
        path: the file, UTF-8.
        advice: what is expected there, for the message when there is no such file.

    Raises:
        InputError: the file is missing, larger than `MAX_BYTES`, nested too deeply, or not such YAML.
    """
    content = read_bytes(path, advice)
    if len(content) > MAX_BYTES:
        raise InputError(f"{path} has {len(content)} bytes, expected at most {MAX_BYTES}")
    try:
        return yaml.load(content.decode("utf-8"), _Loader)
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} is not readable as YAML: {_one_line(error)}") from error


def _encodes(text: str) -> bool:
    """Whether it can be written to a file: halves of a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _one_line(error: Exception) -> str:
    """What is wrong and where, without the lines of the file that PyYAML shows."""
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    if problem and mark:
        return f"{problem[:200]} (line {mark.line + 1})"
    return " ".join(str(error).split())[:200]
