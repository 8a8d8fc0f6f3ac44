"""Options of a command from a YAML file: strict, and weaker than what the command line says."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from intraslice_jax.errors import InputError
from intraslice_jax.reading_yaml import read_yaml


def load_settings(path: str | Path, options: type) -> dict[str, Any]:
    """Reads a YAML file of options.

    Args:
        path: the file; its top level is a mapping. Keys are fields of `options`; the fields of a nested
            dataclass (a section) may stand under the section's name or directly at the top. Dashes and
            underscores are the same.
        options: a dataclass type, whose fields are values or dataclasses of values.

    Returns:
        New defaults of `options`: field name to value, a section being a whole dataclass.

    Raises:
        InputError: the file is missing or not such a mapping, or a key is unknown, given twice, of a wrong
            type or out of range.
    """
    data = _read(Path(path))
    try:
        return _defaults(data, options)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def with_defaults(options: type, defaults: Mapping[str, Any]) -> type:
    """A subclass of the dataclass `options` whose fields have other defaults."""
    every = get_type_hints(options, include_extras=True)  # inherited ones as well
    hints = {name: every[name] for name in defaults}
    namespace = {"__annotations__": hints, "__doc__": options.__doc__, "__module__": options.__module__}
    fields = {
        name: dataclasses.field(default_factory=lambda value=value: value) if _is_section(value) else value
        for name, value in defaults.items()
    }
    return dataclasses.dataclass(frozen=True, kw_only=True)(type(options.__name__, (options,), namespace | fields))


def as_settings(options: Any) -> dict[str, Any]:
    """The options of a run as plain JSON/YAML data that `load_settings` reads back; unset ones left out."""
    return {
        field.name: as_settings(value) if _is_section(value) else _plain(value)
        for field in dataclasses.fields(options)
        if (value := getattr(options, field.name)) is not None and field.name != "config"
    }


def closest(name: str, known: Collection[str]) -> str:
    """The end of an error message about an unknown name: the likeliest known one, or all of them."""
    matches = difflib.get_close_matches(name[:60], known, n=1)
    return f"did you mean {matches[0]!r}?" if matches else f"known are {', '.join(sorted(known))}"


def shortened(value: Any) -> str:
    """A value as a message shows it."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}..."


def _is_section(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _read(path: Path) -> dict[str, Any]:
    data = read_yaml(path, "`config` takes a YAML file")
    if data is not None and not (isinstance(data, dict) and all(isinstance(key, str) for key in data)):
        raise InputError(f"{path} must hold `key: value` lines, found {_show(data)}")
    return {key.replace("-", "_"): value for key, value in (data or {}).items()}


def _defaults(data: Mapping[str, Any], options: type) -> dict[str, Any]:
    fields = {f.name: f for f in dataclasses.fields(options) if f.name != "config"}
    hints = get_type_hints(options)
    sections = {name: hints[name] for name in fields if dataclasses.is_dataclass(hints[name])}
    owner = {f.name: name for name, section in sections.items() for f in dataclasses.fields(section)}
    values: dict[str, Any] = {}
    inside: dict[str, dict[str, Any]] = {name: {} for name in sections}

    def put(section: str, key: str, value: Any) -> None:
        if key in inside[section]:
            raise InputError(f"{key} is given twice, at the top and under {section}")
        (field,) = (f for f in dataclasses.fields(sections[section]) if f.name == key)
        value = field.metadata.get("names", {}).get(value, value) if isinstance(value, str) else value
        inside[section][key] = convert(value, get_type_hints(sections[section])[key], key)

    for key, value in data.items():
        if key in sections and isinstance(value, dict):
            known = [name for name, of in owner.items() if of == key]
            for inner, item in value.items():
                name = str(inner).replace("-", "_")
                if name not in known:
                    raise InputError(f"unknown key {shortened(inner)} under {key}; {closest(name, known)}")
                put(key, name, item)
        elif key in fields and key not in sections:
            values[key] = convert(value, hints[key], key)
        elif key in owner:
            put(owner[key], key, value)
        elif key in sections:
            raise InputError(f"{key} must hold `key: value` lines, found {_show(value)}")
        else:
            raise InputError(f"unknown key {shortened(key)}; {closest(key, {*fields, *owner})}")
    for name, given in inside.items():
        if given:
            values[name] = dataclasses.replace(_default(fields[name]), **given)
    return values


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def convert(value: Any, hint: Any, name: str) -> Any:
    """A YAML value as the annotated type, without guessing.

    Raises:
        InputError: the value is of another type.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (hint,) = (a for a in arguments if a is not type(None))
        return convert(value, hint, name)
    if origin is Literal:
        if value in arguments:
            return value
        raise InputError(f"{name} must be one of {', '.join(map(str, arguments))}; found {_show(value)}")
    if origin is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(convert(item, arguments[0], name) for item in items)
    # YAML 1.1 reads 1e-3 as text.
    if hint is float and isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)
    wanted, accepted = {
        bool: ("true or false", (bool,)),
        int: ("a whole number", (int,)),
        float: ("a number", (int, float)),
        str: ("text", (str,)),
        Path: ("a path", (str,)),
    }[hint]
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        raise InputError(f"{name} must be {wanted}, found {_show(value)}")
    return hint(value)


def _show(value: Any) -> str:
    kinds = {
        str: "text",
        bool: "true/false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "keys",
    }
    return f"{shortened(value)} ({kinds.get(type(value), type(value).__name__)})" if value is not None else "nothing"
