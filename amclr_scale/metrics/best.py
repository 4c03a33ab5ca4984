"""How the scores of a run stand as it goes: a line for each evaluation, and which was the best. Imports no torch."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from amclr_scale.metrics.scores import is_share, lower_is_better, score_of, words_of

PREFIX = "eval/"  # of an evaluation's numbers in metrics.jsonl


class BestSoFar:
    """The best value of every number that has been measured, and the step it is of.

    Args:
        file: metrics.jsonl of a run that goes on; None, or absent: nothing has been measured yet.
    """

    def __init__(self, file: Path | None = None):
        self.best: dict[str, tuple[int, float]] = {}
        if file is not None and file.exists():
            with file.open(encoding="utf-8") as lines:
                for line in lines:
                    if f'"{PREFIX}' in line:  # most records are of training
                        record = json.loads(line)
                        found = {key.removeprefix(PREFIX): v for key, v in record.items() if key.startswith(PREFIX)}
                        self.add(record["step"], found)

    def add(self, step: int, results: Mapping[str, Any]) -> None:
        """Take in one evaluation. Of equal values the earliest counts."""
        for name, value in results.items():
            if score_of(name) is None or value is None or not math.isfinite(value):
                continue
            before = self.best.get(name)
            sign = -1 if lower_is_better(name) else 1
            if before is None or sign * value > sign * before[1]:
                self.best[name] = (step, value)

    def step(self, name: str) -> int | None:
        """At which step a number was best; None: it has never been measured."""
        return self.best[name][0] if name in self.best else None

    def line(self, step: int, samples: int, results: Mapping[str, Any]) -> str:
        """An evaluation in one line, after it was added: the numbers that the learning curve shows, and their best."""
        said = []
        for name, value in results.items():
            score = score_of(name)
            if score is None or not score.drawn or name not in self.best:
                continue
            best_step, best = self.best[name]
            beside = "the best" if best_step == step else f"best {_written(name, best)}"
            said.append(f"{name.rpartition('/')[0]} {words_of(name)} {_written(name, value)} ({beside})")
        return f"eval at {samples:,} samples: {', '.join(said) or f'{len(results)} numbers, in metrics.jsonl'}"


def _written(name: str, value: float) -> str:
    return f"{100 * value:.1f}" if is_share(name) else f"{value:.4g}"
