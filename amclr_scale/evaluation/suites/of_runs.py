"""`evaluation.suites`: suites of papers at the end of a training run, as `evaluate RUN --suite` measures them after it.

The same files as that command leaves, RUN/evaluation/SUITE.json and the finished data sets beside it, with the same
digests: a run that is interrupted there goes on behind the last finished data set, and the command finds all done.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from amclr_scale.config.schema import Config
from amclr_scale.distributed.collectives import rank
from amclr_scale.errors import UserError
from amclr_scale.evaluation.models import compute_in, load_model
from amclr_scale.evaluation.run import as_measured
from amclr_scale.evaluation.suites.catalogue import Suite
from amclr_scale.evaluation.suites.catalogue import suite as suite_of
from amclr_scale.evaluation.suites.command import configured
from amclr_scale.evaluation.suites.run import Measured, check, measured_table, prepared
from amclr_scale.evaluation.suites.summary import in_terminal

PLACE = "evaluation"  # in a run's folder
DETAILS = ("chance", "stderr", "low", "high")


class RunSuites:
    """The suites of a recipe, looked for when it is made, measured when it is called.

    Attributes:
        suites: by name, with the folder that holds its data sets.
        words: what was found of each.

    Raises:
        UserError: there is no such suite, its folder is not there or holds none of its data sets, or one is not whole.
    """

    def __init__(self, config: Config):
        self.suites: dict[str, tuple[Suite, Path]] = {}
        self.words: list[str] = []
        for name, place in config.evaluation.suites.items():
            with _key(name):
                suite = suite_of(name)
                if place is None:
                    raise UserError("--data: expected the folder that holds its data sets on this machine, got null")
                folder = Path(place).expanduser()
                found = check(suite, folder)
            self.suites[name] = (suite, folder)
            gone = [one.title for one in suite.sets if one.name not in found]
            missing = f"; missing: {', '.join(gone)}" if gone else ""
            self.words.append(f"{name}: {len(found)} of {len(suite.sets)} data sets in {folder}{missing}")

    def __call__(self, engine: nn.Module, config: Config, run: Path) -> tuple[dict[str, float], str]:
        """Measure what a run has just saved. All ranks call it together.

        Args:
            engine: the model as it was trained, on all ranks.
            config: the run's, with nothing left at auto.
            run: its folder, in which rank 0 has its weights.

        Returns:
            Numbers for evaluation.json: each column as SUITE/suite_COLUMN, and each data set's own as
            SUITE/DATA_SET/NUMBER with chance and interval; and the tables.
        """
        on = _digested(engine, configured(config, ()), run)
        flat: dict[str, float] = {}
        tables = []
        with as_measured(engine):
            for name, (suite, folder) in self.suites.items():
                with _key(name):
                    found = measured_table(suite, folder, on)
                flat |= numbers_of(found)
                tables.append(in_terminal({on.name: found}))
        return flat, "\n\n".join(tables)


def outcomes(name: str) -> set[str]:
    """The numbers that a suite may have in evaluation.json, without details and without the suite before them."""
    suite = suite_of(name)
    return {_column(one.title) for one in suite.columns} | {_own(one.name, one.number) for one in suite.sets}


def _column(title: str) -> str:
    return f"suite_{title.replace(' ', '_')}"


def _own(data_set: str, number: str) -> str:
    return f"{data_set.replace('/', '-')}/{number}"


def numbers_of(found: Mapping[str, Any]) -> dict[str, float]:
    """A suite's numbers, flat: columns that have a value, and what each data set counts with."""
    name = found["suite"]
    columns = {
        f"{name}/{_column(title)}": one["value"] for title, one in found["columns"].items() if one["value"] is not None
    }
    for place, one in found["sets"].items():
        for key in (one["number"], *(f"{one['number']}/{detail}" for detail in DETAILS)):
            if key in one["numbers"]:
                columns[f"{name}/{_own(place, key)}"] = one["numbers"][key]
    return columns


def _digested(engine: nn.Module, config: Config, run: Path) -> Measured:
    """The engine, under the digest of the weights that rank 0 has saved: that of the command."""
    precision: str = config.execution.precision
    model = engine
    if rank() == 0:
        loaded = load_model(str(run))
        precision, model = compute_in(loaded, "run", next(engine.parameters()).device), loaded.model
    on = prepared(run.name, model, config, None, precision, run / PLACE)
    return replace(on, model=engine)


@contextmanager
def _key(name: str) -> Iterator[None]:
    """What is wrong with a suite, by the key of the recipe instead of the option of the command."""
    try:
        yield
    except UserError as error:
        key = f"evaluation.suites.{name}"
        words = str(error).removeprefix("--suite: ").removeprefix("with --data, ").removeprefix("--data: ")
        raise UserError(f"{key}: {words}") from error
