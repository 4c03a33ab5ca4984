"""Throughput over ranks: cells of one recipe that differ in the number of ranks, from their logged samples per second.

With r(W) samples per second on W ranks, all of them together, and W_0 the fewest ranks that were run:

    speed-up     r(W) / r(W_0)
    efficiency   (r(W) / W) / (r(W_0) / W_0), at the same global batch (strong scaling: a rank's share shrinks), or at
                 the same share b = B / W (weak scaling: the global batch grows)

Ratios are formed seed by seed. Evaluation, checkpoints and the first logged steps are not in r.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from amclr_scale.study.analysis.groups import Group
from amclr_scale.study.analysis.results import Axes, Run, titled
from amclr_scale.study.analysis.units import columns_of, words_of
from amclr_scale.study.planning.plan import RANKS
from amclr_scale.study.report.document import Figure, Table
from amclr_scale.study.report.plots import WIDTH, Looks, finish, legend, plain_number, pyplot, ticks_of
from amclr_scale.study.statistics.decisions import Estimate, estimate

DIGITS = ".2f"  # of ratios


@dataclass(frozen=True)
class Point:
    """One recipe on W ranks.

    Attributes:
        method: its title, with its axes, ranks left out.
        arm: the first one of the method.
        rates: samples per second by seed.
    """

    method: str
    arm: str
    variant: Axes
    global_batch_size: int
    ranks: int
    rates: Mapping[int, float]

    @property
    def name(self) -> str:
        return f"{self.method}, B = {self.global_batch_size:,}"

    @property
    def local_batch_size(self) -> float:
        return self.global_batch_size / self.ranks


def ranks_of(run: Run) -> int | None:
    """The ranks of a run; None where it does not say, or went on with another number."""
    starts = {one.get("ranks") for one in (run.environment, *run.environment.get("resumed", []))} - {None}
    return int(starts.pop()) if len(starts) == 1 else None


def points(groups: Sequence[Group]) -> list[Point]:
    """Every recipe on every number of ranks, for methods that were run on several; ranks as the runs say."""
    found: dict[tuple[str, Axes, int, int], tuple[str, dict[int, float]]] = {}
    for group in groups:
        if group.swept:  # which of its runs would speak for a seed?
            continue
        variant = tuple((key, value) for key, value in group.variant if key != RANKS)
        for run in group.runs:
            ranks, rate = ranks_of(run), run.samples_per_second
            if ranks and rate:
                key = (group.method, variant, group.global_batch_size, ranks)
                found.setdefault(key, (titled(run.cell.label, variant), {}))[1][run.cell.seed] = rate
    several = {
        key[:2] for key in found for other in found if key[:2] == other[:2] and key[3] != other[3]
    }  # fmt: skip
    made = [Point(name, *key, rates) for key, (name, rates) in found.items() if key[:2] in several]
    return sorted(made, key=lambda one: list(found).index((one.arm, one.variant, one.global_batch_size, one.ranks)))


def baseline(point: Point, among: Sequence[Point], *, weak: bool = False) -> Point | None:
    """The same method on the fewest ranks: at the same global batch, or at the same batch per rank."""
    alike = [
        one
        for one in among
        if (one.arm, one.variant) == (point.arm, point.variant)
        and (
            one.local_batch_size == point.local_batch_size if weak else one.global_batch_size == point.global_batch_size
        )
    ]
    fewest = min(alike, key=lambda one: one.ranks)
    return fewest if fewest.ranks < max(one.ranks for one in alike) else None


def ratio(point: Point, base: Point, *, per_rank: bool) -> Estimate | None:
    """Rate over the baseline's, by seed; None where they share no seed."""
    scale = base.ranks / point.ranks if per_rank else 1.0
    shared = sorted(point.rates.keys() & base.rates.keys())
    return estimate([scale * point.rates[seed] / base.rates[seed] for seed in shared]) if shared else None


def scaling_table(found: Sequence[Point]) -> Table:
    """A row per recipe and number of ranks."""
    rows, raw = [], []
    weakly = any(baseline(one, found, weak=True) for one in found)
    for one in found:
        strong, weak = baseline(one, found), baseline(one, found, weak=True)
        rate = estimate(list(one.rates.values()))
        speed = ratio(one, strong, per_rank=False) if strong else None
        efficiency = ratio(one, strong, per_rank=True) if strong else None
        at_same_share = ratio(one, weak, per_rank=True) if weak else None
        rows.append([
            one.method, f"{one.global_batch_size:,}", str(one.ranks), f"{one.local_batch_size:,g}", str(rate.n),
            words_of(rate, ",.0f"), f"{rate.value / one.ranks:,.0f}", words_of(speed, DIGITS),
            words_of(efficiency, DIGITS), *([words_of(at_same_share, DIGITS)] if weakly else []),
        ])  # fmt: skip
        raw.append({
            "arm": one.arm, "title": one.method, "global_batch_size": one.global_batch_size, "ranks": one.ranks,
            "local_batch_size": one.local_batch_size, "seeds": rate.n, **columns_of("samples_per_second", rate),
            **columns_of("speed_up", speed), **columns_of("efficiency", efficiency),
            **columns_of("efficiency_at_equal_local_batch", at_same_share),
        })  # fmt: skip
    header = [
        "arm", "B", "W", "b", "seeds", "samples/s", "per rank", "speed-up", "efficiency",
        *(["efficiency at equal b"] if weakly else []),
    ]  # fmt: skip
    return Table("scaling", header, rows, raw)


def scaling_figure(found: Sequence[Point]) -> Figure | None:
    """Throughput and efficiency against ranks, a line per method and batch size."""
    lines: dict[str, list[Point]] = {}
    for one in found:
        if baseline(one, found):
            lines.setdefault(one.name, []).append(one)
    if not lines:
        return None
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.3), layout="constrained")
    looks, raw = Looks(lines), list[dict[str, Any]]()
    for name, members in lines.items():
        members.sort(key=lambda one: one.ranks)
        ranks = [one.ranks for one in members]
        rates = [estimate(list(one.rates.values())).value for one in members]
        left.plot(ranks, rates, **looks(name))
        ideal = [rates[0] / ranks[0] * count for count in ranks]
        left.plot(ranks, ideal, color=looks(name)["color"], linewidth=0.8, linestyle=(0, (1, 1.5)), alpha=0.7)
        known = [(one, share) for one in members if (share := ratio(one, members[0], per_rank=True))]
        halves = [share.interval()[1] - share.value if share.n > 1 else 0.0 for _, share in known]
        right.errorbar(
            [one.ranks for one, _ in known], [share.value for _, share in known], halves, elinewidth=0.9, capsize=2,
            **looks(name),
        )  # fmt: skip
        raw += [
            {"line": name, "ranks": count, "samples_per_second": rate, "linear": line,
             **columns_of("efficiency", next((share for one, share in known if one.ranks == count), None))}
            for count, rate, line in zip(ranks, rates, ideal, strict=True)
        ]  # fmt: skip
    every = sorted({one.ranks for members in lines.values() for one in members})
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(every, [f"{count:,}" for count in every])
        axes.minorticks_off()
        axes.set_xlabel("ranks W")
    drawn = [value for row in raw for value in (row["samples_per_second"], row["linear"])]
    left.set_yscale("log")
    left.set_yticks(ticks_of(min(drawn), max(drawn)))
    left.yaxis.set_major_formatter(plain_number)
    left.yaxis.minorticks_off()
    left.set_ylim(min(drawn) / 1.5, max(drawn) * 1.5)
    left.set_ylabel("samples/s; dotted: linear")
    right.axhline(1.0, color="0.5", linewidth=0.8, linestyle=(0, (1, 1.5)))
    right.set_ylim(bottom=0)
    right.set_ylabel("efficiency")
    legend(figure, left, columns=3)
    caption = "Throughput and efficiency against ranks at the same recipe; bars: 95 % t intervals over seeds."
    return finish("by_ranks", caption, figure, raw)


def sentences(found: Sequence[Point], arms: Sequence[str]) -> list[str]:
    """What a claim is answered with: the speed-up of every recipe of some arms."""
    lines = []
    for one in found:
        base = baseline(one, found)
        if base is None or base is one or one.arm not in arms:
            continue
        speed = ratio(one, base, per_rank=False)
        if speed:
            lines.append(f"{one.name}: {one.ranks} ranks {words_of(speed, DIGITS)} times the samples/s of {base.ranks}")
    return lines
