"""How a metric's numbers are written: shares in percent and their differences in points, others as they are."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from amclr_scale.metrics.scores import is_share
from amclr_scale.study.analysis.results import Metric, Run
from amclr_scale.study.statistics.decisions import Estimate


@dataclass(frozen=True)
class Unit:
    """How a metric's numbers are written."""

    share: bool

    @property
    def factor(self) -> float:
        return 100 if self.share else 1

    @property
    def name(self) -> str:
        return "%" if self.share else ""

    def score(self, value: float) -> str:
        return f"{100 * value:.1f}" if self.share else f"{value:.4g}"

    def difference(self, value: float) -> str:
        return f"{100 * value:+.2f}" if self.share else f"{value:+.4g}"

    def estimate(self, one: Estimate) -> str:
        return self.score(one.value) + self._ends(one, self.score)

    def change(self, one: Estimate) -> str:
        return self.difference(one.value) + self._ends(one, self.difference)

    def margin(self, value: float) -> str:
        return f"{100 * value:g} point{'' if value == 0.01 else 's'}" if self.share else f"{value:g}"

    def _ends(self, one: Estimate, write: Callable[[float], str]) -> str:
        low, high = one.interval()
        return "" if math.isnan(low) else f" [{write(low)}, {write(high)}]"


def unit_of(metric: Metric, runs: Sequence[Run]) -> Unit:
    """By what a result is described as; one that nobody has described is a share if it has a standard error."""
    return Unit(any(is_share(metric.keys[0], run.results) for run in runs))


def words_of(one: Estimate | None, digits: str = ".3g") -> str:
    """A number without a unit of its own, with its interval where it has one; a dash for None.

    Args:
        digits: format of the numbers.
    """
    if one is None:
        return "-"
    value, low, high = (format(number, digits) for number in (one.value, *one.interval()))
    return value if one.n < 2 else f"{value} [{low}, {high}]"


def columns_of(name: str, one: Estimate | None) -> dict[str, Any]:
    """Its columns of a CSV."""
    low, high = one.interval() if one else (None, None)
    return {name: one.value if one else None, f"{name}_low": low, f"{name}_high": high}
