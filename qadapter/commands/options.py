"""Dataclasses as command-line flags and YAML keys: declared once, named alike, checked alike.

A value is looked for on the command line, then in the file that ``--config`` names, then in the
dataclass. Text is converted by the field's type wherever it came from: to YAML, ``1e-4`` is text.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperCommand

from qadapter.errors import QAdapterError, nearest, shown
from qadapter.system.documents import parse_yaml, read_yaml

_METAVARS = {int: "INTEGER", float: "NUMBER", str: "TEXT", None: "YAML"}
_NONE = ("none", "null")
_ARGUMENT = "argument"


@dataclasses.dataclass(frozen=True)
class Group:
    """Fields of one dataclass that the help shows under one heading.

    Attributes:
        arguments: the dataclass.
        title: the heading.
        fields: which of its fields, in this order; None: all that no earlier group has.
        hidden: shown by ``--help_all`` only.
    """

    arguments: type
    title: str
    fields: Sequence[str] | None = None
    hidden: bool = False


@dataclasses.dataclass(frozen=True)
class Option:
    """One field as a flag ``--flag`` and a YAML key ``flag``: the field's name, or what its
    metadata calls ``flag``; the name is taken too then."""

    name: str
    flag: str
    arguments: type
    kind: type | None
    """int, float, str or bool; None: what YAML can say of ``types``."""
    types: tuple[type, ...]
    """Of which the value is one, or one that becomes it."""
    nullable: bool
    default: Any
    help: str
    choices: tuple[str, ...]
    title: str
    hidden: bool

    def convert(self, value: Any, source: str) -> Any:
        """A value of the field's type.

        Raises:
            QAdapterError: not of that type, or none of the choices; names ``source``.
        """
        if self.nullable and (value is None or str(value).lower() in _NONE):
            return None
        converted = _convert(value, self.kind)
        if self.kind is None and type(converted) in (bool, int, float):
            if type(converted) not in self.types:  # text that reads as a number may be text
                converted = value if isinstance(value, str) else _FAILED
        if converted is _FAILED:
            raise QAdapterError(f"{source}: expected {_wanted(self)}, got {shown(value)}")
        if self.choices and converted not in self.choices:
            raise QAdapterError(
                f"{source}: {shown(value)} is none of {', '.join(self.choices)}"
                + nearest(str(value), self.choices)
            )
        return converted

    def parameter(self, show_hidden: bool) -> inspect.Parameter:
        """What typer takes; None where the flag is not given."""
        if self.kind is bool:
            flags, metavar, type_ = [f"--{self.flag}/--no_{self.flag}"], None, bool
        else:
            metavar = "|".join(self.choices) or _METAVARS[self.kind]
            flags, type_ = [f"--{name}" for name in dict.fromkeys((self.flag, self.name))], str
        option = typer.Option(
            *flags, help=self._help_with_default(), metavar=metavar, rich_help_panel=self.title,
            show_default=False, hidden=self.hidden and not show_hidden,
        )
        return inspect.Parameter(
            self.name, inspect.Parameter.KEYWORD_ONLY, default=None,
            annotation=Annotated[type_ | None, option],
        )

    def _help_with_default(self) -> str:
        default = self.default.value if isinstance(self.default, enum.Enum) else self.default
        if default is None or default == "":
            return escape(self.help)
        default = str(default).lower() if isinstance(default, bool) else str(default)
        return f"{escape(self.help)} [dim]{escape(f'[default: {default}]')}[/dim]"


def options(
    groups: Sequence[Group], *, defaults: Mapping[str, Any] | None = None,
    helps: Mapping[str, str] | None = None, without: Sequence[str] = (),
) -> dict[str, Option]:
    """The options of a command, by name, in the order of the groups.

    Args:
        defaults, helps: what stands in for a field's own default or help in this command.
        without: fields that have no meaning for it.
    """
    found: dict[str, Option] = {}
    for group in groups:
        hints = typing.get_type_hints(group.arguments)
        fields = {f.name: f for f in dataclasses.fields(group.arguments) if f.init}
        for name in fields if group.fields is None else group.fields:
            if name in found or name in without:
                continue
            field = fields[name]
            kinds, nullable = _types(hints[name])
            kind = kinds[0] if len(kinds) == 1 and kinds[0] in _PLAIN else None
            default = field.default
            if default is dataclasses.MISSING:
                factory = field.default_factory
                default = None if factory is dataclasses.MISSING else factory()
            found[name] = Option(
                name, field.metadata.get("flag", name), group.arguments, kind, kinds, nullable,
                (defaults or {}).get(name, default),
                " ".join((helps or {}).get(name, field.metadata.get("help", "")).split()),
                tuple(map(str, field.metadata.get("choices", ()))), group.title, group.hidden,
            )
    return found


def read_config(path: str | Path, known: Mapping[str, Option]) -> dict[str, Any]:
    """Values of a YAML file.

    Raises:
        QAdapterError: missing, not YAML (with its line), not a mapping, an unknown key (with the
            nearest known one), a value of the wrong type.
    """
    values = read_yaml(path) or {}
    if not isinstance(values, dict):
        raise QAdapterError(f"{path} holds a {type(values).__name__}; it must map names to values")
    keys = {option.flag: option for option in known.values()} | known
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key not in keys:
            raise QAdapterError(f"{path}: unknown key {shown(key)}" + nearest(str(key), keys))
        option = keys[key]
        if option.name in found:
            raise QAdapterError(f"{path}: {option.flag} and {option.name} are one option")
        found[option.name] = option.convert(value, f"{path}: {key}")
    return found


def build(
    arguments: Sequence[type], known: Mapping[str, Option], values: Mapping[str, Any]
) -> list[Any]:
    """One instance of each dataclass from the values given and the command's defaults.

    Raises:
        QAdapterError: a dataclass refuses its values.
    """
    built = []
    for cls in arguments:
        mine = {o.name: values.get(o.name, o.default) for o in known.values() if o.arguments is cls}
        try:
            built.append(cls(**mine))
        except Exception as error:  # transformers' may raise anything for a value of another type
            raise QAdapterError(str(error) or type(error).__name__) from error
    return built


def command(
    name: str, help_text: str, groups: Sequence[Group], run: Callable[..., None], *,
    defaults: Mapping[str, Any] | None = None, helps: Mapping[str, str] | None = None,
    without: Sequence[str] = (), note: str | None = None, show_hidden: bool = False,
    argument: str | None = None,
) -> typer.Typer:
    """A typer app of one command, whose flags are the groups' fields and ``--config``.

    Args:
        argument: name of a field that may also be given without its flag; of a list, one by one.
        run: called with one instance of each dataclass, in the groups' order, and ``given``: the
            set of names that were set by a flag or in the file.
        note: a line under the help.
        show_hidden: put the hidden groups' flags into the help.
    """
    known = options(groups, defaults=defaults, helps=helps, without=without)
    classes = list(dict.fromkeys(group.arguments for group in groups))

    def callback(**flags: Any) -> None:
        config = flags.pop("config", None)
        values = read_config(config, known) if config is not None else {}
        plain = flags.pop(_ARGUMENT, None)
        if plain and flags[argument] is not None:
            raise QAdapterError(f"{argument} is given twice: {plain} and {flags[argument]}")
        if plain:
            flags[argument] = plain
        values |= {
            key: known[key].convert(value, f"--{known[key].flag}")
            for key, value in flags.items()
            if value is not None
        }
        run(*build(classes, known, values), given=set(values))

    config = typer.Option(
        "--config", metavar="FILE", help="YAML file of these options by name; flags win over it."
    )
    parameters = [
        inspect.Parameter(
            "config", inspect.Parameter.KEYWORD_ONLY, default=None,
            annotation=Annotated[str | None, config],
        ),
        *(option.parameter(show_hidden) for option in known.values()),
    ]
    if argument is not None:
        plain = typer.Argument(
            metavar=argument.upper(), help=f"--{argument}, without the flag.",
            show_default=False,
        )
        parameters.append(inspect.Parameter(
            _ARGUMENT, inspect.Parameter.KEYWORD_ONLY, default=None,
            annotation=Annotated[
                list[str] | None if list in known[argument].types else str | None, plain
            ],
        ))
    callback.__signature__ = inspect.Signature(parameters)
    callback.__annotations__ = {p.name: p.annotation for p in parameters}
    app = typer.Typer(add_completion=False, rich_markup_mode="rich")
    app.command(
        name, cls=_Command, help=help_text, epilog=note,
        # --learning-rate is --learning_rate.
        context_settings={"token_normalize_func": lambda token: token.replace("-", "_")},
    )(callback)
    return app


class _Command(TyperCommand):
    """Takes ``--flag true`` and ``--flag=false`` too, as transformers' parser does."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        flags = {}
        for parameter in self.params:
            if getattr(parameter, "secondary_opts", None):
                [yes], [no] = parameter.opts, parameter.secondary_opts
                flags[yes] = {"true": yes, "false": no}
        plain, rest = [], list(args)
        while rest:
            given = rest.pop(0)
            name, equals, value = given.partition("=")
            name = f"--{name[2:].replace('-', '_')}" if name.startswith("--") else name
            if name in flags and not equals and rest and rest[0].lower() in flags[name]:
                equals, value = "=", rest.pop(0)
            known = name in flags and equals and value.lower() in flags[name]
            plain.append(flags[name][value.lower()] if known else given)
        return super().parse_args(ctx, plain)


# --- types ------------------------------------------------------------------------------------

_FAILED = object()
_PLAIN = (int, float, str, bool)
_NAMES = {
    int: "a whole number", float: "a number", bool: "true or false", str: "text",
    dict: "keys and values", list: "a list",
}


def _types(hint: Any) -> tuple[tuple[type, ...], bool]:
    """(The types that a value may have, whether None is one too)."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    members = set(typing.get_args(hint)) if union else {hint}
    nullable = type(None) in members
    members -= {type(None)}
    # An enum or a literal beside str is only a nicer spelling of the same text.
    members -= {m for m in members if isinstance(m, type) and issubclass(m, enum.Enum)}
    if members == {int, float}:
        members = {float}
    found = {typing.get_origin(m) or m for m in members}
    return tuple(t for t in (*_PLAIN, dict, list) if t in found) or (str,), nullable


def _convert(value: Any, kind: type | None) -> Any:
    """``value`` as ``kind``, or ``_FAILED``."""
    if kind is None:
        return _from_yaml(value) if isinstance(value, str) else value
    if kind is bool:
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        return value if isinstance(value, bool) else _FAILED
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return _FAILED
    try:
        if kind is int and isinstance(value, float) and not value.is_integer():
            return _FAILED
        converted = kind(value)
    except (ValueError, OverflowError):
        return _FAILED
    return _FAILED if kind is int and abs(converted) >= 2**63 else converted


def _from_yaml(text: str) -> Any:
    try:
        return parse_yaml(text, "the value")
    except QAdapterError:
        return text


def _wanted(option: Option) -> str:
    names = [_NAMES[kind] for kind in option.types] + ["none"] * option.nullable
    return " or ".join(names)
