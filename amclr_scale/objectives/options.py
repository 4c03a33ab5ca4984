"""Options of an objective from plain values: unknown names, missing ones and wrong types are answered in words."""

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

from amclr_scale.errors import UserError
from amclr_scale.objectives.base import nearest, require


def parse_options(name: str, config: Callable[..., Any], options: dict[str, Any]) -> Any:
    """`config(**options)`, with unknown names, missing ones and wrong types answered in words."""
    assert isinstance(config, type)
    hints = typing.get_type_hints(config)
    fields = {field.name: field for field in dataclasses.fields(config)}
    for option, value in options.items():
        if option not in fields:
            raise UserError(f"{option}: {name} has no such option{nearest(option, fields)}")
        options[option] = _as_type(option, hints[option], value)
    for option, field in fields.items():
        if field.default is dataclasses.MISSING and option not in options:
            raise UserError(f"{option}: {name} needs it, got nothing; pass {option}=...")
    return config(**options)


def _as_section(option: str, kind: Any, value: Any) -> Any:
    if isinstance(value, kind):
        return value
    names = ", ".join(field.name for field in dataclasses.fields(kind))
    require(isinstance(value, Mapping), option, f"a section with some of {names}", value)
    try:
        return parse_options(option, kind, dict(value))
    except UserError as error:
        raise UserError(f"{option}.{error}") from error


def _as_type(option: str, hint: Any, value: Any) -> Any:
    choices = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    for choice in choices:
        if typing.get_origin(choice) is Literal:
            if value in typing.get_args(choice):
                return value
        elif typing.get_origin(choice) is tuple:
            if isinstance(value, list | tuple):
                return tuple(_as_type(option, typing.get_args(choice)[0], one) for one in value)
        elif choice in (int, float):
            nan = isinstance(value, float) and math.isnan(value)
            if isinstance(value, int | choice) and not isinstance(value, bool) and not nan:
                return choice(value)
        elif dataclasses.is_dataclass(choice) and value is not None:
            return _as_section(option, choice, value)
        elif isinstance(value, choice):
            return value
    wanted: list[str] = []
    for choice in choices:
        if typing.get_origin(choice) is Literal:
            wanted += [repr(literal) for literal in typing.get_args(choice)]
        else:
            of = f"a list of {typing.get_args(choice)[0].__name__}" if typing.get_origin(choice) is tuple else None
            wanted.append(of or ("None" if choice is types.NoneType else choice.__name__))
    raise UserError(f"{option}: expected {' or '.join(wanted)}, got {value!r}")
