"""Every key with its default, the values that it takes, and its meaning, for `--help`. Imports no torch."""

import json
import textwrap
import types
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from amclr_scale.config.objective_options import option_models
from amclr_scale.config.optimizers import RULES
from amclr_scale.config.schema import Config
from amclr_scale.config.section import section_of
from amclr_scale.errors import one_of


def allowed(annotation: Any, bounds: Sequence[Any] = ()) -> str:
    """The values that a key takes, in words, such as `whole number above 0, or null`."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        metadata = [one for part in parts[1:] for one in (getattr(part, "metadata", None) or [part])]
        return allowed(parts[0], [*bounds, *metadata])
    if origin in (Union, types.UnionType):
        known = [allowed(part, bounds) for part in parts if part is not type(None)]
        return ", or ".join([*dict.fromkeys(known), *(["null"] if type(None) in parts else [])])
    if origin is Literal:
        return one_of(map(_written, parts))
    if origin in (list, tuple):
        inside = [part for part in parts if part is not Ellipsis]
        several = (
            f"{len(inside)} values, each " if origin is tuple and Ellipsis not in parts and len(inside) > 1 else ""
        )
        return f"a list: {several}{' or '.join(dict.fromkeys(map(allowed, inside)))}"
    if origin is dict or annotation is dict:
        return "a mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a section"
    return _PLAIN.get(annotation, "anything") + _bounds(bounds)


_PLAIN = {bool: "true or false", int: "whole number", float: "number", str: "text"}


def _bounds(metadata: Sequence[Any]) -> str:
    """What pydantic checks of a number, in words."""
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    found = [
        f"{word} {getattr(one, name):g}"
        for one in metadata
        for name, word in words.items()
        if getattr(one, name, None) is not None
    ]
    return f" {' and '.join(found)}" if found else ""


def _written(value: Any) -> str:
    """As YAML has it."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    return json.dumps(value, ensure_ascii=False, default=list) if not isinstance(value, str) else value or '""'


def section(model: type[BaseModel], prefix: str) -> list[str]:
    """The keys of a section and those inside it."""
    lines: list[str] = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            lines += section(inner, f"{prefix}{name}.")
            continue
        default = "needed" if field.is_required() else _written(field.get_default(call_default_factory=True))
        lines.append(f"  {prefix}{name} = {default}  ({allowed(inner, field.metadata)})")
        lines += textwrap.wrap(field.description or "", 104, initial_indent="      ", subsequent_indent="      ")
        if optional := section_of(inner):
            lines += section(optional, f"{prefix}{name}.")
    return lines


def describe() -> str:
    """The keys of a configuration, one paragraph each."""
    lines = ["keys (give them in the file or as words; docs/objectives.md explains each objective's options):"]
    lines += section(Config, "")
    lines.append("optimizers and the keys that each reads, beside lr and weight_decay:")
    for name, rule in sorted(RULES.items()):
        own = [f"options.{key}" for key in (rule.options.model_fields if rule.options else ())]
        lines.append(f"  {name}: {', '.join([*rule.keys, *own])}")
    lines.append("objectives and their options:")
    for name, model in sorted(option_models().items()):
        options = ", ".join(
            f"{key}={'needed' if f.is_required() else f.default}" for key, f in model.model_fields.items()
        )
        lines.append(f"  {name}: {options or 'no options'}")
    return "\n".join(lines)
