"""What verdicts after a swept learning rate are worth: studies whose truth is known, decided as reports decide.

    python tools/simulate_sweeps.py                  # the table of docs/studies.md, minutes
    python tools/simulate_sweeps.py --studies 500

Two arms with the same true means over the rates, so that no method is better. Rates are chosen on k tuning seeds, n
other seeds are scored at the chosen rate; a run scatters by 1 around its rate's mean.

    equal        every rate is equally good
    peak         one rate is best, its neighbours are half of a run's deviation lower
    cliff        one rate is best, all others far lower but one, which is close: tuning may miss it
    interaction  rates suit some items more than others, by 0.7: the same in all seeds, other for other items; rates are
                 chosen on a validation split, and what is promised is about new items

coverage        of the 95 % interval over seeds, for the difference at the chosen rates (interaction: with new items)
false decision  better or worse is said
false match     a match is said when one method is better by the margin, 2
scored seeds    the same where the rate is chosen on the scored seeds, leaving one out, as plans without tuning seeds do
"""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from amclr_scale.study.statistics.decisions import Component, Estimate, paired, with_further
from amclr_scale.study.statistics.selection import allowance, select

Array = NDArray[np.float64]
PROFILES = {
    "equal": (0.0, 0.0, 0.0, 0.0, 0.0),
    "peak": (-1.0, -0.5, 0.0, -0.5, -1.0),
    "cliff": (-3.0, -0.8, 0.0, -3.0, -3.0),
    "interaction": (0.0, 0.0, 0.0, 0.0, 0.0),
}
INTERACTION, CLUSTERS, MARGIN = 0.7, 400, 2.0
DRAWS = 1000


@dataclass(frozen=True)
class Shares:
    """How often something was said or held.

    Attributes:
        bias: mean score of an arm at its chosen rate over new items, minus that rate's true mean.
    """

    coverage: float
    false_decision: float
    false_match: float
    bias: float


@dataclass(frozen=True)
class Arm:
    """One arm of one study: scores of its seeds, their true mean at the chosen rate, and what tuning leaves open."""

    scores: Array
    truth: float
    here: float  # the same on these test items
    open: Component


def tuned_arm(rng: np.random.Generator, profile: Array, of_seed: tuple[Array, Array], interaction: float) -> Arm:
    """An arm whose rate is chosen on tuning seeds, by a validation split where items and rates interact.

    Args:
        of_seed: what each tuning seed and each scored seed adds to every arm.
    """
    test, validation = interaction * rng.normal(size=(2, len(profile)))
    tuning = (profile + test)[:, None] + of_seed[0] + rng.normal(size=(len(profile), len(of_seed[0])))
    judged = tuning if not interaction else tuning - test[:, None] + validation[:, None]
    chosen = int(judged.mean(1).argmax())
    here = profile[chosen] + test[chosen]
    scores = here + of_seed[1] + rng.normal(size=len(of_seed[1]))
    return Arm(scores, profile[chosen], here, allowance(tuning, chosen, draws=DRAWS))


def differs(one: Estimate) -> bool:
    """Whether a difference is shown: p below 5 %, which is a 95 % interval without zero."""
    low, high = one.interval()
    return low > 0 or high < 0


def matches(one: Estimate) -> bool:
    """Whether equivalence is shown: both one-sided p below 5 %, which is a 90 % interval within the margin."""
    low, high = one.interval(0.9)
    return low > -MARGIN and high < MARGIN


def simulate(scenario: str, tuning: int, seeds: int, studies: int, seed: int = 0) -> Shares:
    """Studies of two arms, decided on the estimates that `analysis.comparison.compare` decides on."""
    rng, profile = np.random.default_rng(seed), np.array(PROFILES[scenario])
    interaction = INTERACTION if scenario == "interaction" else 0.0
    items = Component(interaction * 2**0.5, CLUSTERS - 1)
    held, decided, matched, bias = 0, 0, 0, 0.0
    for _ in range(studies):
        of_seed = rng.normal(size=tuning), rng.normal(size=seeds)
        first, second = (tuned_arm(rng, profile, of_seed, interaction) for _ in range(2))
        difference = with_further(paired(list(first.scores), list(second.scores)), items)
        low, high = difference.interval()
        held += low <= second.truth - first.truth <= high
        claim = with_further(difference, first.open, second.open)
        decided += differs(claim)
        matched += matches(replace(claim, value=claim.value + MARGIN))
        bias += float((first.here - first.truth + second.here - second.truth) / 2)
    return Shares(held / studies, decided / studies, matched / studies, bias / studies)


def simulate_scored(scenario: str, seeds: int, studies: int, seed: int = 0) -> Shares:
    """The same where each seed is scored at the rate that the other scored seeds choose, and nothing is added."""
    rng, profile = np.random.default_rng(seed), np.array(PROFILES[scenario])
    interaction = INTERACTION if scenario == "interaction" else 0.0
    items = Component(interaction * 2**0.5, CLUSTERS - 1)
    held, decided, matched, bias = 0, 0, 0, 0.0
    for _ in range(studies):
        of_seed, arms = rng.normal(size=seeds), []
        for _ in range(2):
            test = interaction * rng.normal(size=len(profile))
            runs = (profile + test)[:, None] + of_seed + rng.normal(size=(len(profile), seeds))
            found = select(runs)
            arms.append(np.array(found.scores))
            bias += float(test[list(found.chosen)].mean()) / 2
        difference = with_further(paired(list(arms[0]), list(arms[1])), items)
        low, high = difference.interval()
        held += low <= 0 <= high
        decided += differs(difference)
        matched += matches(replace(difference, value=difference.value + MARGIN))
    return Shares(held / studies, decided / studies, matched / studies, bias / studies)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=4000)
    options = parser.parse_args()
    print("| scenario | tuning seeds | scored seeds | coverage | false decision | false match | bias |")
    print("|---|---|---|---|---|---|---|")
    for scenario in PROFILES:
        rows = [
            (str(k), n, simulate(scenario, k, n, options.studies)) for k, n in ((2, 3), (3, 3), (3, 5), (5, 5), (3, 10))
        ]
        rows += [("none", n, simulate_scored(scenario, n, options.studies)) for n in (3, 5, 10)]
        for tuning, seeds, one in rows:
            shares = " | ".join(f"{share:.1%}" for share in (one.coverage, one.false_decision, one.false_match))
            print(f"| {scenario} | {tuning} | {seeds} | {shares} | {one.bias:+.2f} |", flush=True)


if __name__ == "__main__":
    main()
