"""Learning rates chosen on tuning seeds: which cells run when, what is scored, and what the report says of it."""

import json
import math
import sys
from pathlib import Path

import pytest

from amclr_scale.errors import UserError
from amclr_scale.study.analysis.comparison import Outcome, compare
from amclr_scale.study.analysis.groups import find, groups_of
from amclr_scale.study.analysis.reading import read_study
from amclr_scale.study.planning.cells import base_tree
from amclr_scale.study.planning.load import load_plan
from amclr_scale.study.planning.plan import StudyPlan
from amclr_scale.study.planning.planned import Planned
from amclr_scale.study.report.compose import compose
from amclr_scale.study.running import run as run_module
from amclr_scale.study.running.folder import StudyFolder
from amclr_scale.study.running.phases import run_phases
from amclr_scale.study.running.pilot import pilot_plan
from amclr_scale.study.running.preview import preview
from amclr_scale.study.running.run import Outcome as Ran
from amclr_scale.study.running.slurm import write_jobs
from amclr_scale.study.running.tuning import plan_cells
from amclr_scale.study.statistics.decisions import Verdict, paired
from amclr_scale.study.statistics.selection import narrowness
from tests.study.synthetic import KEYS, make_study
from tests.study.test_plan import PLAN

KEY = "emoji/val_style/image_to_text_R@1"
RATES = [0.001, 0.002]
# what a run scores: clip's best rate is the second one, sogclr's the first
SCORES = {("clip", 0.001): 0.2, ("clip", 0.002): 0.3, ("sogclr", 0.001): 0.4, ("sogclr", 0.002): 0.1}
TRAIN = """
import json, pathlib, sys
folder, recipe, score = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
if score == "fails":
    sys.exit(1)
folder.mkdir(parents=True)
(folder / "config.yaml").write_text(f"# recipe {recipe}\\n")
(folder / "evaluation.json").write_text(json.dumps({sys.argv[4]: float(score), sys.argv[4] + "/chance": 0.001}))
"""


class Study:
    """A plan with a sweep whose cells take milliseconds."""

    def __init__(self, tmp_path: Path, *words: str):
        file = tmp_path / "tiny.yaml"
        file.write_text(PLAN)
        sweep = [f"axes={{optimizer.lr: {RATES}}}", "batch_sizes=[32]", "execution.retries=0"]
        self.plan: StudyPlan = load_plan(file, [f"folder={tmp_path / 'study'}", *sweep, *words])
        self.tree, self.folder = base_tree(self.plan), StudyFolder(self.plan.place)
        self.ran: list[str] = []
        self.said: list[str] = []
        self.failing: set[str] = set()

    def cells(self) -> list[Planned]:
        return plan_cells(self.plan, self.tree, 4938.0, self.folder)[0]

    def command(self, _: StudyPlan, folder: StudyFolder, cell: Planned, slot: int) -> list[str]:
        self.ran.append(cell.name)
        score = "fails" if cell.name in self.failing else SCORES[cell.arm, cell.axes["optimizer.lr"]]
        return [sys.executable, "-S", "-c", TRAIN, str(folder.runs / cell.name), cell.recipe_hash, str(score), KEY]

    def run(self, pattern: str | None = None) -> Ran:
        cells = self.cells()
        self.folder.write(self.plan, {}, [])
        write = self.folder.write
        self.folder.write = lambda plan, tree, cells: write(plan, {}, [])  # counting operations takes seconds
        return run_phases(
            self.plan, self.tree, 4938.0, self.folder, cells, self.said.append, pattern=pattern,
            make_command=self.command,
        )  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "POLL", 0.02)


def test_tuning_cells_run_first_and_then_the_scored_ones_at_the_rates_they_choose(tmp_path: Path) -> None:
    study = Study(tmp_path)
    told = preview(study.plan, study.folder, study.cells(), 4938.0, memory=False)
    assert "16 cells: 12 on seeds 2, 3, 4 choose a learning rate by R@1, then 4 are scored at it, 2 seeds" in told
    assert [line.split()[3:5] for line in told.splitlines() if line.startswith("  sogclr")] == [
        ["tuning", "3"], ["tuning", "3"], ["verdicts", "2"],
    ]  # fmt: skip
    assert study.run().exit_code == 0
    tuning = [f"{arm}-B32-lr{rate}-s{seed}" for seed in (2, 3, 4) for arm in ("clip", "sogclr") for rate in RATES]
    scored = [name for seed in (0, 1) for name in (f"clip-B32-lr0.002-s{seed}", f"sogclr-B32-lr0.001-s{seed}")]
    assert study.ran == tuning + scored
    assert "clip-B32: optimizer.lr 0.002, by R@1 (0.001: 0.2, 0.002: 0.3)" in study.said
    assert study.said[-1] == "16 of 16 cells are finished"
    assert study.run().done == 16
    assert len(study.ran) == 16  # nothing twice
    assert [cell.name for cell in study.cells() if cell.role == "scored"] == sorted(scored)


def test_a_rate_that_failed_is_not_chosen_and_what_cannot_be_chosen_is_not_scored(tmp_path: Path) -> None:
    study = Study(tmp_path)
    study.failing = {"clip-B32-lr0.002-s3", "sogclr-B32-lr0.001-s2", "sogclr-B32-lr0.002-s4"}
    assert study.run().exit_code == 1
    assert "clip-B32: optimizer.lr 0.001, by R@1 (0.001: 0.2); failed at 0.002" in study.said
    scored = [name for name in study.ran if name.endswith(("-s0", "-s1"))]
    assert scored == ["clip-B32-lr0.001-s0", "clip-B32-lr0.001-s1"]
    assert study.said[-1].startswith("11 of 16 cells are finished; 2 wait for a learning rate; failed: ")


def test_cells_that_are_asked_for_wait_for_their_own_tuning_only(tmp_path: Path) -> None:
    study = Study(tmp_path)
    study.run("clip-*-s0")
    assert study.ran == []
    assert study.said == ["0 of 1 cells are finished; 1 wait for a learning rate"]
    study.run("clip-*")
    assert len(study.ran) == 8
    assert {name.partition("-")[0] for name in study.ran} == {"clip"}


def test_a_margin_that_the_tuning_runs_show_to_be_absurd_ends_a_study_before_it_is_scored(tmp_path: Path) -> None:
    study = Study(tmp_path, "margin=20 points")
    with pytest.raises(
        UserError, match=r"margin: expected at most 15 points, half of what clip-B32-lr0.002-s\d scores"
    ):
        study.run()
    assert len(study.ran) == 12


def test_a_job_array_has_the_tuning_cells_first(tmp_path: Path) -> None:
    study = Study(tmp_path)
    write_jobs(study.plan, study.folder, study.cells(), tmp_path / "jobs")
    assert len((tmp_path / "jobs" / "tiny.commands").read_text().splitlines()) == 12
    study.run()
    for seed in (0, 1):
        (study.folder.runs / f"clip-B32-lr0.002-s{seed}" / "evaluation.json").unlink()
    write_jobs(study.plan, study.folder, study.cells(), tmp_path / "jobs")
    lines = (tmp_path / "jobs" / "tiny.commands").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["clip-B32-lr0.002-s0", "clip-B32-lr0.002-s1"]


def test_a_pilot_measures_one_rate_of_a_sweep(tmp_path: Path) -> None:
    study = Study(tmp_path)
    short = pilot_plan(study.plan)
    assert (short.tuning_seeds, short.seeds) == ([], [0])


def tuned_study(tmp_path: Path, **options: object) -> Path:
    return make_study(
        tmp_path / "s", arms=("clip", "dcl"), batches=(128,), axes={"optimizer.lr": [0.0005, 0.001, 0.002]},
        tuning_seeds=(10, 11, 12), chosen=0.001, **options,
    )  # fmt: skip


def test_only_scored_seeds_are_in_scores_and_verdicts_let_the_rate_vary(tmp_path: Path) -> None:
    study = read_study(tuned_study(tmp_path, shift={("optimizer.lr", 0.001): 0.05}, noise=0.01, items=False))
    assert (len(study.runs), len(study.tuning), len(study.cells), len(study.tuning_cells)) == (6, 18, 6, 18)
    found = Outcome(study.metrics[0], groups_of(study), resamples=0)
    clip, dcl = found.groups
    assert found.seeds(clip, dcl) == [0, 1, 2]
    tuned = found.tuned(dcl)
    assert (tuned.rates, tuned.chosen, tuned.scores.shape) == ((0.0005, 0.001, 0.002), 1, (3, 3))
    both = found.difference(dcl, clip)
    values = [list(found.values(group, [0, 1, 2])) for group in (clip, dcl)]
    assert both.seeds == paired(*values)
    assert both.claim.p_different() >= both.seeds.p_different()
    assert both.regrets == (tuned.regret, found.tuned(clip).regret)


def test_a_choice_that_tuning_leaves_open_takes_a_verdict_away(tmp_path: Path) -> None:
    """The same scored runs; tuning seeds that scatter by 10 points say nothing about which rate is best."""
    folder = tuned_study(tmp_path, noise=0.003, items=False)
    sure = _verdict(folder)
    for run in (folder / "runs").glob("*-s1[012]-*"):
        file, rate = run / "evaluation.json", run.name.rpartition("lr")[2]
        results = json.loads(file.read_text())
        shift = 0.1 * ((int(run.name.partition("-s1")[2][0]) + len(rate)) % 3)
        file.write_text(json.dumps(results | {key: results[key] + shift for key in KEYS}))
    assert (sure, _verdict(folder)) == (Verdict.BETTER, Verdict.UNDECIDED)
    study = read_study(folder)
    found = Outcome(study.metrics[0], groups_of(study), resamples=0)
    first, second = found.groups
    open_ = [found.regret(group).error for group in (first, second)]
    both = found.contrast([(-0.25, first), (2.0, second)])  # as of a slope: what is open of a score counts as it does
    assert [part.error for part in both.regrets] == [0.25 * open_[0], 2.0 * open_[1]]
    assert min(open_) > 0


def _verdict(folder: Path) -> Verdict:
    study = read_study(folder)
    found = Outcome(study.metrics[0], groups_of(study), resamples=0)
    (one,) = compare(found, [(find(found.groups, "dcl"), find(found.groups, "clip"))], study.margin)
    return one.decision.verdict


def test_without_the_runs_that_chose_nothing_is_decided(tmp_path: Path) -> None:
    folder = tuned_study(tmp_path, noise=0.003, items=False)
    for run in (folder / "runs").glob("dcl-*-s1[012]-lr0.001"):
        (run / "evaluation.json").unlink()
    study = read_study(folder)
    found = Outcome(study.metrics[0], groups_of(study), resamples=0)
    assert found.tuned(find(found.groups, "dcl")) is None
    (one,) = compare(found, [(found.groups[1], found.groups[0])], study.margin)
    assert math.isnan(one.decision.p_different)
    assert one.decision.verdict == Verdict.UNDECIDED


@pytest.mark.parametrize("same", [False, True])
def test_nothing_is_said_about_new_items_when_the_rate_was_chosen_on_these(tmp_path: Path, same: bool) -> None:
    study = read_study(tuned_study(tmp_path, **({"validation": KEYS[0]} if same else {})))
    found = Outcome(study.metrics[0], groups_of(study), resamples=200)
    assert (found.difference(*found.groups).items is None) is same
    assert [found.chose_on_items(group) for group in found.groups] == [same, same]


@pytest.mark.usefixtures("undrawn")
def test_the_report_says_how_rates_were_chosen(tmp_path: Path) -> None:
    folder = tuned_study(tmp_path, shift={("optimizer.lr", 0.001): 0.05}, unfinished=["clip-B128-s11-lr0.002"])
    composed = compose(read_study(folder))
    text = composed.markdown
    assert "1 of its 24 cells have no result yet" in text
    assert "3 seeds each, with equal samples, learning rates chosen on 3 others" in text
    assert (
        "- learning rates: chosen by `emoji/val_concept/R@mean` on tuning seeds 10, 11, 12, which no verdict uses"
        in text
    )
    assert "too narrow" not in text
    assert "p-values and verdicts also allow for what another of the tried rates may bring" in text
    [rows] = [one.raw for one in composed.tables if one.name == "learning_rates"]
    assert [(row["group"], row["chosen"], row["rates"]) for row in rows] == [
        ("CLIP, B = 128", 0.001, "0.0005 0.001"), ("DCL, B = 128", 0.001, "0.0005 0.001 0.002"),
    ]  # fmt: skip
    assert "not finished at 0.002" in text
    assert "No learning rate was swept" not in text


@pytest.mark.usefixtures("undrawn")
def test_a_study_without_tuning_seeds_says_how_narrow_its_intervals_are_and_gives_no_match(tmp_path: Path) -> None:
    """Two names of one method, which matched before."""
    folder = make_study(
        tmp_path / "s", arms=("dcl", "sogclr_gamma1"), batches=(128,), axes={"optimizer.lr": [0.0005, 0.001, 0.002]},
        shift={("optimizer.lr", 0.001): 0.05}, noise=0.001,
    )  # fmt: skip
    cells = json.loads((folder / "cells.json").read_text())
    (folder / "cells.json").write_text(json.dumps(cells | {"reference": {"arm": "dcl", "global_batch_size": 128}}))
    study = read_study(folder)
    found = Outcome(study.metrics[0], groups_of(study), resamples=200)
    (one,) = compare(found, [(found.groups[1], found.groups[0])], study.margin)
    assert abs(one.difference.seeds.value) < study.margin / 10
    assert one.decision.verdict == Verdict.UNDECIDED
    assert math.isnan(one.decision.p_equivalent)
    assert one.with_items is None
    figure = narrowness(3, 3)
    assert one.difference.narrow == figure.factor > 1.3
    composed = compose(study)
    told = (
        "Rate chosen on the scored seeds: intervals are too narrow. With 3 rates and 3 seeds one of 95 % for a "
        f"difference holds the truth in {figure.coverage:.0%} of simulated studies, and would have to be "
        f"{figure.factor:.1f} times as wide. Verdicts are decided on intervals so wide, and nothing is said to match."
    )
    assert composed.markdown.count(told) == 5  # in brief, design, learning rates, verdicts, limits
    assert "Rates were chosen on the very items that are measured" in composed.markdown
    assert "**matches**" not in composed.markdown
