"""The training objectives, by name.

    objective = objectives.create("sogclr", num_samples=len(data), temperature=0.07)
    loss = objective(Embeddings(image=z, text=t, ids=ids))
    loss.value.backward()

Every module of this folder, and of folders in it, is imported here, so adding an objective is adding one file
(docs/objectives.md).
"""

import dataclasses
import inspect
import pkgutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import nn

from amclr_scale.config.source_files import NOT_OPTIONS
from amclr_scale.errors import UserError
from amclr_scale.objectives.banks.shared_queue import SharedQueue
from amclr_scale.objectives.base import Layout, Objective, nearest
from amclr_scale.objectives.layers import with_layers
from amclr_scale.objectives.options import parse_options
from amclr_scale.objectives.outside import outside

__all__ = ["Description", "Objective", "available", "create", "from_section", "has_parts", "parts_of", "without_sizes"]

for _module in pkgutil.walk_packages(__path__, f"{__name__}."):
    import_module(_module.name)


@dataclass(frozen=True)
class Description:
    """One line about an objective, and its options with their defaults (a required one has `...`)."""

    summary: str
    options: dict[str, Any]


def available() -> dict[str, Description]:
    """Name -> description of every objective."""
    return {
        name: Description((objective.__doc__ or "").strip().splitlines()[0], _defaults(objective))
        for name, objective in sorted(Objective.registry.items())
    }


def _defaults(objective: type[Objective]) -> dict[str, Any]:
    fields = dataclasses.fields(objective.Config)  # type: ignore[arg-type]
    return {f.name: ... if f.default is dataclasses.MISSING else f.default for f in fields}


def create(name: str, *, sample_state: Layout = "auto", module: str | None = None, **options: Any) -> Objective:
    """Make the objective called `name`.

    Args:
        name: a key of `available()`, or an objective in `module`.
        sample_state: where per-sample state lives. "replicated": every rank holds all of it; "sharded": rank r holds
            the samples whose id is r modulo the number of ranks; "auto": sharded once it is large. Same answers.
        module: a Python file outside the package.
        options: the objective's options. `num_samples`, the size of the data set, is ignored by objectives that
            keep no state per sample.

    Raises:
        UserError: (a ValueError) an unknown name or option, answered with the nearest; a missing or wrong value.
    """
    return _made({"name": name, **options, **({} if module is None else {"module": module})}, sample_state)


def from_section(section: Mapping[str, Any], sample_state: Layout = "auto", **changes: Any) -> Objective:
    """Make the objective that a section of a configuration describes.

    Args:
        section: `name`, `module` where it is in a file outside the package, and options.
        sample_state: see `create`.
        changes: options over those of the section, such as num_samples.

    Raises:
        UserError: see `create`; naming the key of the configuration.
    """
    with _in_section():
        return _made({**section, **changes}, sample_state)


@contextmanager
def _in_section() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        key = "" if str(error).startswith("objective.") else "objective."
        raise UserError(f"{key}{error}") from error


def _made(section: Mapping[str, Any], sample_state: Layout) -> Objective:
    if sample_state not in ("auto", "replicated", "sharded"):
        raise UserError(f"sample_state: expected 'auto', 'replicated' or 'sharded', got {sample_state!r}")
    objective = class_of(section)
    keeps_state = "sample_state" in inspect.signature(objective.__init__).parameters
    construct: Any = objective

    def make(config: Any) -> Objective:
        made: Objective = construct(config, sample_state) if keeps_state else construct(config)
        if getattr(config, "queue", None) is not None and config.queue.size:
            made.queue = SharedQueue(config.queue, sample_state)
        return made

    made = make(config_of(objective, section))
    with_layers(made, make)
    return made


def class_of(section: Mapping[str, Any]) -> type[Objective]:
    """The objective that `name`, and `module` where it is given, mean."""
    name = section["name"]
    if section.get("module") is not None:
        return outside(section["module"], name, section.get("module_sha256"))
    if name not in Objective.registry:
        raise UserError(f"name: no objective is called {name!r}{nearest(name, Objective.registry)}")
    return Objective.registry[name]


def config_of(objective: type[Objective], section: Mapping[str, Any]) -> Any:
    """Its options, checked; `num_samples` is left aside where it is none of them."""
    options = {key: value for key, value in section.items() if key not in NOT_OPTIONS}
    if "num_samples" not in _defaults(objective):
        options.pop("num_samples", None)
    return parse_options(objective.name, objective.Config, options)


def without_sizes(section: Mapping[str, Any]) -> dict[str, Any]:
    """The section without the options that count samples of the data set, for another set."""
    return {key: value for key, value in section.items() if key not in ("num_samples", "num_texts")}


def has_parts(section: Mapping[str, Any]) -> bool:
    """Whether the objective may have parts in the model: cheap, nothing is made."""
    return class_of(section).model_parts is not Objective.model_parts


def parts_of(section: Mapping[str, Any], width: int) -> nn.Module | None:
    """Fresh parts of the model that the objective wants, for embeddings of this width."""
    objective = class_of(section)
    with _in_section():
        config = config_of(objective, {"num_samples": 1, **section})
    return objective.model_parts(config, width)
