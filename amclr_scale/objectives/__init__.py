"""The training objectives, by name.

    objective = objectives.create("sogclr", num_samples=len(data), temperature=0.07)
    loss = objective(Embeddings(image=z, text=t, ids=ids))
    loss.value.backward()

Every module of this folder is imported here, so adding an objective is adding one file (docs/objectives.md).
"""

import dataclasses
import pkgutil
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from amclr_scale.errors import UserError
from amclr_scale.objectives.base import Layout, Objective, nearest, parse_options

__all__ = ["Description", "Objective", "available", "create"]

for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")


@dataclass(frozen=True)
class Description:
    """One line about an objective, and its options with their defaults (a required one has `...`)."""

    summary: str
    options: dict[str, Any]


def available() -> dict[str, Description]:
    """Name -> description of every objective."""
    found = {}
    for name, objective in sorted(Objective.registry.items()):
        summary = (objective.__doc__ or "").strip().splitlines()[0]
        fields = dataclasses.fields(objective.Config)  # type: ignore[arg-type]
        found[name] = Description(
            summary, {f.name: ... if f.default is dataclasses.MISSING else f.default for f in fields}
        )
    return found


def create(name: str, *, sample_state: Layout = "auto", **options: Any) -> Objective:
    """Make the objective called `name`.

    Args:
        name: a key of `available()`.
        sample_state: where per-sample state lives. "replicated": every rank holds all of it; "sharded": rank r holds
            the samples whose id is r modulo the number of ranks; "auto": sharded once it is large. Same answers.
        options: the objective's options. `num_samples`, the size of the data set, is ignored by objectives that
            keep no state per sample.

    Raises:
        UserError: (a ValueError) an unknown name or option, answered with the nearest; a missing or wrong value.
    """
    if name not in Objective.registry:
        raise UserError(f"name: no objective is called {name!r}{nearest(name, Objective.registry)}")
    if sample_state not in ("auto", "replicated", "sharded"):
        raise UserError(f"sample_state: expected 'auto', 'replicated' or 'sharded', got {sample_state!r}")
    objective = Objective.registry[name]
    if "num_samples" not in available()[name].options:
        options.pop("num_samples", None)
    config = parse_options(name, objective.Config, options)
    return objective(config, sample_state) if objective.needs_ids else objective(config)
