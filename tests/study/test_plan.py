"""Plans: what a mistake in one is answered with, and that every ready plan can be planned."""

import re
import sys
from pathlib import Path

import pytest

from amclr_scale.config.shipped import shipped
from amclr_scale.errors import UserError
from amclr_scale.study.planning.cells import base_tree, make_cells
from amclr_scale.study.planning.lengths import samples_per_epoch
from amclr_scale.study.planning.load import dump_plan, load_plan
from amclr_scale.study.planning.plan import StudyPlan
from amclr_scale.study.planning.planned import Planned
from amclr_scale.study.planning.warnings import warnings
from amclr_scale.study.running.folder import StudyFolder
from amclr_scale.study.running.preview import expectation, preview

PLANS = Path(__file__).parents[2] / "configs" / "studies"
PLAN = f"""
name: tiny
config: {PLANS.parent / "quickstart.yaml"}
words: ["evaluation.splits=[emoji/val_style]"]
arms: [clip, sogclr]
batch_sizes: [32, 64]
seeds: [0, 1]
held_equal: samples
budget: {{samples: 640}}
num_samples: 4938
metrics: [{{name: R@1, keys: [emoji/val_style/image_to_text_R@1]}}]
margin: 1 point
execution: {{device: cpu}}
"""


SWEEP = "axes={optimizer.lr: [1e-3, 2e-3]}"


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(PLAN)
    return file


def plan_cells(file: Path, *words: str) -> list[Planned]:
    plan = load_plan(file, words)
    return make_cells(plan, base_tree(plan), 4938.0)


def refusal(file: Path, *words: str) -> str:
    """What a plan with these words is refused with."""
    with pytest.raises(UserError) as told:
        plan_cells(file, *words)
    return str(told.value)


def test_arms_of_one_label_are_one_method_by_choice_alone(plan_file: Path) -> None:
    def labels(arms: str, *words: str) -> dict[str, str]:
        return {cell.arm: cell.label for cell in plan_cells(plan_file, f"arms=[clip, {arms}]", *words)}

    large = "{name: large, like: clip, batch_sizes: [128], words: [optimizer.eps=1e-7]}"
    assert labels(large) == {"clip": "CLIP", "large": "large"}
    assert labels(large.replace("like: clip", "like: clip, label: CLIP")) == {"clip": "CLIP", "large": "CLIP"}
    assert labels("{name: mine, like: dcl}") == {"clip": "CLIP", "mine": "DCL"}
    assert labels("dcl, {name: mine, like: dcl}") == {"clip": "CLIP", "dcl": "DCL", "mine": "mine"}
    own = "{name: a, like: sogclr, label: S, axes: {objective.gamma: [0.1, 0.2]}}, {name: b, like: sogclr, label: S"
    assert labels(f"{own}, axes: {{objective.gamma: [0.3]}}}}") == {"clip": "CLIP", "a": "S", "b": "S"}


@pytest.mark.parametrize(
    ("arms", "words", "told"),
    [
        ("{name: mine, like: dcl, label: CLIP, batch_sizes: [64, 128]}", [], "mine.label: .* that of clip, .*(64)"),
        ("{name: a, like: sogclr, label: S}, {name: b, like: sogclr, label: S, axes: {objective.gamma: [0.5]}}",
         ["axes={objective.gamma: [0.5, 0.8]}"], "b.label: .* that of a, .*(32, 64)"),
        ("{name: a, like: clip, label: CLIP, axes: {objective.group_size: [32]}}",
         ["held_equal=grid", "group_sizes=[32, 64]"], "a.label: .* that of clip, .*(32, 64)"),
    ],
)  # fmt: skip
def test_arms_that_no_table_could_tell_apart_are_refused(
    plan_file: Path, arms: str, words: list[str], told: str
) -> None:
    answer = refusal(plan_file, f"arms=[clip, {arms}]", *words)
    assert re.search(rf"^arms\.{told.replace('(', '[(]').replace(')', '[)]')} that no table could", answer)


def test_a_plan_written_out_reads_back_as_the_same_plan(plan_file: Path, tmp_path: Path) -> None:
    plan = load_plan(plan_file, ["arms=[clip, {name: mine, like: sogclr, words: [objective.gamma=0.3]}]"])
    again = tmp_path / "again.yaml"
    again.write_text(dump_plan(plan))
    assert load_plan(again) == plan


def test_all_mistakes_are_told_at_once_and_begin_with_their_key(plan_file: Path) -> None:
    told = refusal(plan_file, "marginn=0.1", "held_equal=everything", "seeds=[]", "execution.job=2").splitlines()
    assert {line.partition(":")[0] for line in told} == {"marginn", "held_equal", "seeds", "execution.job"}
    assert "did you mean 'margin'?" in "\n".join(told)
    assert "did you mean 'jobs'?" in "\n".join(told)


def test_mistakes_of_the_plan_of_its_cells_and_of_the_configuration_are_told_together(plan_file: Path) -> None:
    told = refusal(
        plan_file, "marginn=0.1", "arms=[clip, sogcrl, {name: mine, like: dcl, words: [objective.gama=1]}]", "sigma=1",
        "budget.steps=10", "reference.arm=dcl", "metrics=[{name: x, keys: [coco/R@1]}]", "execution.job=2",
        "words=['evaluation.splits=[emoji/val_style]']", "lr={base: 1e-3, rul: sqrt}",
    ).splitlines()  # fmt: skip
    assert sorted(line.partition(":")[0] for line in told) == [
        "arms", "budget.steps", "execution.job", "lr.rul", "marginn", "metrics", "objective.gama",
        "reference.arm", "sigma",
    ]  # fmt: skip


def test_a_margin_and_a_spread_are_in_the_unit_of_the_outcome(plan_file: Path) -> None:
    for words, value in ((["margin=0.5 points"], 0.005), (["margin='1 point'"], 0.01), (["margin=.5points"], 0.005)):
        assert load_plan(plan_file, words).equal_within == value
    rank = "metrics=[{name: x, keys: [emoji/val_style/image_to_text_median_rank]}]"
    plan = load_plan(plan_file, [rank, "margin=2 ranks", "sigma=1 rank"])
    assert (plan.equal_within, plan.margin, plan.sigma) == (2.0, "2 ranks", "1 rank")
    plain = load_plan(plan_file, ["metrics=[{name: x, keys: [emoji/val_style/alignment]}]", "margin=0.1"])
    assert (plain.equal_within, plain.margin) == (0.1, "0.1")


@pytest.mark.parametrize("key", ["held_equal", "margin", "arms", "metrics", "budget"])
def test_what_decides_the_answer_has_no_default(plan_file: Path, key: str, tmp_path: Path) -> None:
    lines = [line for line in PLAN.splitlines() if not line.startswith(f"{key}:")]
    plan_file.write_text("\n".join(lines))
    assert refusal(plan_file) == f"{key}: this key is needed, and there is none"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["arms=[clip, sogcrl]"], "arms: no such arm 'sogcrl'; did you mean 'sogclr'?"),
        (["arms=[clip, queue]"], "arms: queue: its size is to be chosen: {name: queue, like: clip"),
        (["arms=[clip, clip]"], "arms: clip is there 2 times"),
        (["budget.steps=10"], "budget.steps: has no meaning when held_equal is samples; remove it"),
        (["budget.samples=null"], "budget: held_equal samples needs exactly one of"),
        (["held_equal=steps"], "budget: held_equal steps needs exactly one of budget.steps, got samples"),
        (["held_equal=memory"], "budget.gib: held_equal memory needs the peak GiB per rank, got none"),
        (["held_equal=grid"], "group_sizes: held_equal grid needs them"),
        (["group_sizes=[16]"], "group_sizes: has no meaning when held_equal is samples"),
        (["batch_sizes=[32, 32]"], "batch_sizes: expected different values, got [32, 32]"),
        (["reference.arm=dcl"], "reference.arm: expected one of the arms (clip, sogclr), got dcl"),
        (["pairs=[[sogclr, dcl]]"], "pairs: expected two of the arms (clip, sogclr), got dcl"),
        (["pairs=[[clip, clip]]"], "pairs: expected two arms, got clip twice"),
        (
            ["reference.global_batch_size=128"],
            "reference: expected one of the cells (clip at 32, clip at 64), got clip",
        ),
        (["skip=['*']"], "skip: leaves no cell to run"),
        (["batch_sizes=[36]"], "train.global_batch_size: expected a multiple of data.lanes = 8, got 36"),
        (["metrics=[{name: x, keys: [coco/R@1]}]"], "metrics: coco/R@1: the configuration measures no such split"),
        (
            ["metrics=[{name: x, keys: [emoji/val_style/R@7]}]"],
            "metrics: emoji/val_style/R@7: expected a number such as",
        ),
        (["expected={count: 8}"], "expected: needs exactly one of expected.device and expected.samples_per_second"),
        (["words=[seed=3]"], "words: seed follows from seeds of the plan; set that instead"),
        (["axes={train.epochs: [1, 2]}"], "axes: train.epochs follows from budget of the plan; set that instead"),
        (["arms=[{name: clip, words: [optimizer.lr_rule=sqrt]}]"], "arms.clip: optimizer.lr_rule follows from lr.rule"),
        (["execution.words=[optimizer.lr=1]"], "execution.words: optimizer.lr is no matter of execution"),
        (["words=[train.global_batchsize=3]"], "train.global_batchsize: no such key"),
        (["axes={objective.omicron: [1]}"], "axes.objective.omicron: no arm's objective has this option"),
        (["axes={optimizer.lr: [0.0010000001, 0.0010000002]}"], "axes: two cells are called"),
        (["arms=[clip, local_negatives]", "batch_sizes=[32, 36]"], "batch_sizes: expected multiples of 8, for"),
        (["config=nowhere.yaml"], "config: expected a YAML file or the name of a shipped one, got"),
        (
            ["margin=0.5"],
            "margin: expected a number with its unit, got 0.5: '50 points' if that is a share of one, as R@1",
        ),
        (["sigma=0.01"], "sigma: expected a number with its unit, got 0.01: '1 point' if that is a share of one"),
        (["margin=2 ranks"], "margin: R@1 is in points; expected such as '2 points', got 2 ranks"),
        (["margin=1 pint"], "margin: expected a number above 0 with its unit, such as '0.5 points', got '1 pint'"),
        (
            ["margin=-1 points"],
            "margin: expected a number above 0 with its unit, such as '0.5 points', got '-1 points'",
        ),
        (["margin=50 points"], "margin: expected less than 50 points, half of everything that can be scored, got 50 p"),
        (
            ["metrics=[{name: x, keys: [emoji/val_style/image_to_text_median_rank]}]", "margin=1 point"],
            "margin: x is in ranks; expected such as '1 ranks', got 1 point",
        ),
        (
            ["metrics=[{name: x, keys: [emoji/val_style/R@mean, emoji/val_style/image_to_text_median_rank]}]"],
            "metrics: x is the mean of results in different units; give one outcome each",
        ),
        (
            [
                "metrics=[{name: x, keys: [emoji/val_style/R@1]}, {name: y, keys: [emoji/val_style/alignment]}]",
                "words=['evaluation.splits=[emoji/val_style]', evaluation.geometry=true]",
            ],
            "metrics: one margin decides all outcomes, got y (no unit) beside points",
        ),
        (
            ["tuning.seeds=[5, 6]"],
            "tuning.seeds: has no meaning where no arm has several values of optimizer.lr; remove",
        ),
        (
            [SWEEP, "tuning.seeds=[1, 2]"],
            "tuning.seeds: expected others than those of seeds, which verdicts use, got 1",
        ),
        (
            [SWEEP, "tuning.seeds=[2]"],
            "tuning.seeds: expected two or more, which show how sure a choice is, or [], got [2]",
        ),
        ([SWEEP, "tuning.seeds=[2, 2]"], "tuning.seeds: expected different values, got [2, 2]"),
        (
            [SWEEP, "tuning.metric={name: v, keys: [emoji/val_style/R@5]}"],
            "tuning.metric: expected a result on a split that no outcome uses, got one on emoji/val_style",
        ),
        (
            [SWEEP, "tuning.metric={name: v, keys: [emoji/val_concept/R@5]}"],
            "tuning.metric: emoji/val_concept/R@5: the configuration measures no such split",
        ),
        (
            [SWEEP, "tuning={seeds: [], metric: {name: v, keys: [emoji/val_concept/R@5]}}"],
            "tuning.metric: has no meaning where tuning.seeds is []; remove it",
        ),
        (["warmup_samples=10", "warmup_share=0.1"], "warmup_share: give this or warmup_samples, not both"),
        (["execution.ranks=2"], "execution.launcher: python starts one rank, got execution.ranks 2"),
        (["axes={execution.ranks: [1, 4]}"], "execution.launcher: python starts one rank, got execution.ranks 4"),
        (["axes={execution.ranks: [1, two]}"], "axes.execution.ranks: expected numbers of ranks, 1 or more, got"),
        (
            ["axes={execution.ranks: [1]}", "execution.jobs=2"],
            "execution.jobs: expected 1 where execution.ranks varies",
        ),
        (
            ["axes={execution.ranks: [1, 3]}", "execution.launcher=torchrun"],
            "data.lanes",
        ),
        (["execution.words=[execution.zero_stag=1]"], "execution.zero_stag: no such key"),
        (["budget.samples=8"], "budget: 8 samples are less than one step at a global batch of 32"),
        (
            ["held_equal=wall_clock", "budget.samples=null", "budget.hours=1"],
            "budget.hours: held_equal wall_clock needs samples per second",
        ),
        (["name='a study'"], "name: expected characters of [A-Za-z0-9_.-] alone, got 'a study'"),
    ],
)
def test_a_bad_plan_is_refused_in_words(plan_file: Path, words: list[str], told: str) -> None:
    assert told in refusal(plan_file, *words)


def test_the_configuration_is_found_from_the_plans_folder() -> None:
    plan = load_plan(PLANS / "mini_amclr.yaml")
    assert isinstance(plan, StudyPlan)
    assert Path(plan.config) == (PLANS.parent / "quickstart.yaml").resolve()
    assert plan.name == "mini_amclr"
    assert str(plan.place) == "studies/mini_amclr"


def test_the_configuration_may_be_a_shipped_one(plan_file: Path) -> None:
    assert Path(load_plan(plan_file, ["config=quickstart"]).config) == shipped() / "quickstart.yaml"


def test_a_plan_that_is_built_on_another_one_may_have_a_name_of_its_own(plan_file: Path, tmp_path: Path) -> None:
    above = tmp_path / "above.yaml"
    above.write_text("base: tiny.yaml\nname: another\nmargin: 2 points\n")
    plan = load_plan(above, ["budget.epochs=2"])
    assert (plan.name, plan.margin, plan.seeds) == ("another", "2 points", [0, 1])
    assert plan.equal_within == 0.02
    assert (plan.budget.samples, plan.budget.epochs) == (None, 2)


def test_a_study_is_planned_without_the_reports_packages(plan_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("power", "decisions"):
        monkeypatch.delitem(sys.modules, f"amclr_scale.study.statistics.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "scipy", None)
    said = list(warnings(load_plan(plan_file), plan_cells(plan_file), 4938.0))
    assert "statistics need scipy: pip install 'amclr_scale[report]'; nothing is said about seeds here" in said


@pytest.mark.parametrize("file", sorted(PLANS.glob("*.yaml")), ids=lambda file: file.stem)
@pytest.mark.slow
def test_every_ready_plan_is_planned_without_its_data_and_says_how_long_it_takes(file: Path) -> None:
    plan = load_plan(file)
    tree = base_tree(plan)
    epoch = samples_per_epoch(plan, tree)
    cells = make_cells(plan, tree, epoch)
    said = preview(plan, StudyFolder(plan.place), cells, epoch, memory=False)
    assert plan.expected
    assert expectation(plan.expected, cells).partition(" (two")[0] in file.read_text().replace("\n# ", " ")
    assert plan.question
    assert f"{len(cells)} cells" in said
    fewest, most = min(cell.steps for cell in cells), max(cell.steps for cell in cells)
    steps = f", in {fewest:,} steps\n" if fewest == most else f", in {fewest:,} to {most:,} steps\n"
    assert steps in said
    mini, on_cpu = file.stem.startswith("mini_"), file.stem.startswith("mini_") or file.stem.endswith("_cpu")
    twin = re.search(r"mini_\w+\.yaml", file.read_text())
    assert mini or (twin and (PLANS / twin[0]).is_file())
    assert bool(plan.needs) is not mini
    assert plan.execution.device == ("cpu" if on_cpu else "cuda")
