"""Arguments to options with tyro, whose messages become one line."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib.resources
import io
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Union, get_origin, get_type_hints

import tyro

from intraslice_jax.errors import InputError

DESCRIPTION = "IntraSlice: makes language models smaller by PCA inside each attention and MLP module."


def parse(args: Sequence[str], options: Mapping[str, type]) -> Any:
    """An instance of the options of the command that `args` names.

    Args:
        args: command name and its arguments.
        options: dataclass of each command.

    Raises:
        InputError: the arguments are wrong.
        SystemExit: help was asked for, and printed.
    """
    kinds = tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in options.items())
    union: Any = Union[kinds]  # noqa: UP007  (made at run time)
    errors = io.StringIO()
    markers = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(union, prog="intraslice", description=DESCRIPTION, args=args, config=markers)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise InputError(one_line(errors.getvalue())) from None


def one_line(box: str) -> str:
    """What tyro says in a box of several lines, without the help texts of options in it."""
    parts = [""]
    for line in (line[1:-1].rstrip() for line in box.splitlines() if line[:1] == "│"):
        if line.strip().startswith(("For full helptext", "Argument helptext")):
            break
        if not line.strip("─ "):
            parts.append("")
        elif not line.startswith(" " * 8):  # help texts are indented by eight, names of options by four
            parts[-1] += " " + line.strip()
    text = "; ".join(part.strip() for part in parts if part) or box.strip()
    return f"{re.sub('Error parsing __[^:]*: ', '', text)} (see --help)"


def in_flags(message: str, options: type) -> str:
    """A message in which `setting` or `setting=value`, as Python has them, are options of the command line."""
    names = field_names(options)

    def flag(found: re.Match[str]) -> str:
        name, value = found.groups()
        if name not in names:
            return found[0]
        return f"--{name.replace('_', '-')}" + ("" if value in (None, "True") else f" {value}")

    return re.sub(r"`([a-z_]+)(?:=([^`]*))?`", flag, message)


def field_names(options: type) -> set[str]:
    """Of the options and of their sections."""
    names: set[str] = set()
    for name, hint in get_type_hints(options).items():
        names |= field_names(hint) if dataclasses.is_dataclass(hint) else {name}  # pyright: ignore[reportArgumentType]
    return names


def check_flags(args: Sequence[str], command: str, options: type) -> None:
    """Raises InputError for an option that the command does not have, with the likeliest one that it has."""
    known = {"help", *(name.replace("_", "-") for name in field_names(options))}
    known |= {f"no-{name}" for name in known}
    for argument in args:
        name = argument.partition("=")[0].removeprefix("--").replace("_", "-")
        if argument.startswith("--") and name and name not in known:
            matches = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean --{matches[0]}?" if matches else f"`intraslice {command} --help` lists all"
            raise InputError(f"there is no option --{name}; {hint}")


def merge_repeated(args: Sequence[str], options: type) -> list[str]:
    """Arguments in which an option of several values that is given several times is given once with all."""
    flags = {f"--{name.replace('_', '-')}" for name in _several(options)}
    merged: list[str] = []
    collected: dict[str, list[str]] = {}
    flag = ""
    for argument in args:
        head, _, value = argument.partition("=")
        if argument.startswith("-"):
            flag = head if head in flags else ""
            argument = value if flag and value else argument
        if flag and argument == flag:
            collected.setdefault(flag, [])
        elif flag:
            collected.setdefault(flag, []).append(argument)
        else:
            merged.append(argument)
    return merged + [part for flag, values in collected.items() for part in (flag, *values)]


def numbers_for_names(args: Sequence[str], options: type) -> list[str]:
    """Arguments in which the names of an option's values (`--align gpu`) are those values."""
    known = {f"--{name.replace('_', '-')}": names for name, names in _named(options).items()}
    replaced: list[str] = []
    for argument in args:
        flag, given, value = argument.partition("=")
        if given and flag in known:
            argument = f"{flag}={known[flag].get(value, value)}"
        elif replaced and replaced[-1] in known:
            argument = str(known[replaced[-1]].get(argument, argument))
        replaced.append(argument)
    return replaced


def _named(options: type) -> dict[str, Mapping[str, Any]]:
    """Options whose values have names, those of sections included."""
    hints, found = get_type_hints(options), {}
    for field in dataclasses.fields(options):
        if dataclasses.is_dataclass(hints[field.name]):
            found |= _named(hints[field.name])
        elif "names" in field.metadata:
            found[field.name] = field.metadata["names"]
    return found


def _several(options: type) -> list[str]:
    names = []
    for name, hint in get_type_hints(options).items():
        if dataclasses.is_dataclass(hint):
            names += _several(hint)  # pyright: ignore[reportArgumentType]
        elif get_origin(hint) is tuple:
            names.append(name)
    return names


def value_of(option: str, args: Sequence[str]) -> str | None:
    """What the last `--option VALUE` or `--option=VALUE` gives, before the arguments are parsed."""
    found = None
    for i, argument in enumerate(args):
        flag, given, value = argument.partition("=")
        if flag == option:
            found = value if given else "".join(args[i + 1 : i + 2])
    return found


def config_file(args: Sequence[str], default: str | None) -> Path | None:
    """The file that `--config` names, else the default: a path, or the name of a ready recipe."""
    name = value_of("--config", args)
    name = default if name is None else name
    return recipe(name) if name else None


def recipe(name: str) -> Path:
    """A path as it is, or, if there is no such file, the recipe of that name in the package's configs.

    Raises:
        InputError: there is neither.
    """
    folder = Path(str(importlib.resources.files("intraslice_jax") / "configs"))
    ready = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    if not os.path.exists(name) and Path(name).name == name:
        stem = name.removesuffix(".yaml")
        if stem not in ready:
            raise InputError(f"--config: {name} does not exist; ready recipes are {', '.join(ready)}")
        return ready[stem]
    return Path(name)
