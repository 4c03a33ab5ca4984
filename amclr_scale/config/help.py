"""Every key with its type, default and meaning, for `--help`. Imports no torch."""

import textwrap

from pydantic import BaseModel

from amclr_scale.config.objective_options import option_models
from amclr_scale.config.optimizers import RULES
from amclr_scale.config.schema import Config
from amclr_scale.config.section import section_of


def section(model: type[BaseModel], prefix: str) -> list[str]:
    """The keys of a section and those inside it."""
    lines: list[str] = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            lines += section(inner, f"{prefix}{name}.")
            continue
        default = "needed" if field.is_required() else repr(field.get_default(call_default_factory=True))
        lines.append(f"  {prefix}{name} = {default}")
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
