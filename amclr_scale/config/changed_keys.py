"""Whether resume_changed names keys: a misspelt one would accept nothing, and say nothing. Imports no torch."""

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel

from amclr_scale.config.objective_options import option_models
from amclr_scale.config.schema import Config
from amclr_scale.config.section import section_of
from amclr_scale.config.source_files import NOT_OPTIONS
from amclr_scale.errors import did_you_mean


def changed_keys(config: Config) -> list[str]:
    """One line for each word of resume_changed that is no key. Keys that have not changed may stand there."""
    known = dict(_keys(Config, ""))
    for options in option_models().values():  # the checkpoint's objective may be another one
        known |= dict(_keys(options, "objective."))
    known |= {f"objective.{name}": False for name in NOT_OPTIONS}
    known["objective"] = config.objective.get("module") is not None  # whose options only that file knows
    return [
        f"resume_changed: expected keys, such as optimizer.lr,train.epochs, got {word}{did_you_mean(word, known)}"
        for word in config.resume_changed
        if word not in known and not any(known.get(above) for above in _above(word))
    ]


def _keys(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, bool]]:
    """Every section and key, dotted, and whether names of others' making stand below it."""
    for name, field in model.model_fields.items():
        key, section = f"{prefix}{name}", section_of(field.annotation)
        yield key, _is_open(field.annotation)
        if section:
            yield from _keys(section, f"{key}.")


def _is_open(annotation: Any) -> bool:
    return dict in (annotation, getattr(annotation, "__origin__", None)) or any(map(_is_open, get_args(annotation)))


def _above(word: str) -> Iterator[str]:
    """Sections around a key."""
    return (word[:at] for at, letter in enumerate(word) if letter == ".")
