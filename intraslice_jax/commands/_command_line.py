"""The command that a run can be repeated with."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any, get_type_hints

from intraslice_jax.commands._types import Checkpoint, Model
from intraslice_jax.config import PruneConfig, preset
from intraslice_jax.settings import as_settings

_LEFT_OUT = ("overwrite", "resume")
"""They say what to do with an output that is there already, not what is made."""


def command_line(command: str, options: Any) -> str:
    """`intraslice COMMAND ...` with every option that differs from its default.

    Args:
        command: its name.
        options: an instance of its options.
    """
    hints = get_type_hints(type(options), include_extras=True)
    positional: list[str] = []
    flags: list[str] = []
    named = preset(options.preset) if hasattr(options, "preset") else None
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if hints[field.name] in (Model, Checkpoint):
            positional.append(str(value))
        elif dataclasses.is_dataclass(value):
            flags += _flags(value, named if isinstance(value, PruneConfig) and named else type(value)())
        elif field.name not in (*_LEFT_OUT, "config"):
            flags += _flag(field.name, as_settings(options).get(field.name), _default(type(options), field.name))
    return shlex.join(["intraslice", *command.split(" "), *positional, *flags])


def _flags(section: Any, usual: Any) -> list[str]:
    settings, defaults = as_settings(section), as_settings(usual)
    return [
        part
        for field in dataclasses.fields(section)
        for part in _flag(field.name, settings.get(field.name), defaults.get(field.name))
    ]


def _flag(name: str, value: Any, default: Any) -> list[str]:
    if value is None or value is False or value == default:
        return []
    flag = f"--{name.replace('_', '-')}"
    if value is True:
        return [flag]
    return [flag, *(map(str, value) if isinstance(value, list) else [str(value)])]


def _default(kind: type, name: str) -> Any:
    """What the class that has the field first says, not what a file changed; as `as_settings` writes it."""
    first = next(base for base in reversed(kind.__mro__) if name in getattr(base, "__dataclass_fields__", {}))
    default = first.__dataclass_fields__[name].default
    if default is dataclasses.MISSING:
        return None
    return list(default) if isinstance(default, tuple) else default
