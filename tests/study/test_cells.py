"""Cells: what each control mode derives, by numbers worked out by hand, and what the known arms compute."""

from pathlib import Path
from typing import Any

import pytest

from amclr_scale.config.load import merge, recipe
from amclr_scale.config.schema import Momentum
from amclr_scale.errors import UserError
from amclr_scale.study.planning import cells as cells_module
from amclr_scale.study.planning.arms import ABSENT, CONTROLS
from amclr_scale.study.planning.cells import base_tree, make_cells
from amclr_scale.study.planning.cost import encoder_cost, encoder_flops, pairwise_flops
from amclr_scale.study.planning.load import load_plan
from amclr_scale.study.planning.planned import Planned, reference_of
from amclr_scale.study.planning.warnings import warnings
from tests.study.test_plan import PLAN

N = 4938.0


def planned(tmp_path: Path, *words: str, **options: Any) -> dict[str, Planned]:
    """Cells by name."""
    file = tmp_path / "tiny.yaml"
    file.write_text(PLAN)
    plan = load_plan(file, words)
    return {cell.name: cell for cell in make_cells(plan, base_tree(plan), N, **options)}


def test_every_arm_batch_size_and_seed_is_a_cell_with_a_recipe_of_its_own(tmp_path: Path) -> None:
    cells = planned(tmp_path)
    names = [f"{arm}-B{batch}-s{seed}" for arm in ("clip", "sogclr") for batch in (32, 64) for seed in (0, 1)]
    assert list(cells) == names
    assert len({cell.recipe_hash for cell in cells.values()}) == 8


def test_equal_samples(tmp_path: Path) -> None:
    cells = planned(tmp_path, "batch_sizes=[32, 256]")
    assert (cells["clip-B32-s0"].samples, cells["clip-B32-s0"].steps) == (640, 20)
    assert (cells["clip-B256-s0"].samples, cells["clip-B256-s0"].steps) == (512, 2)  # 640 / 256 = 2.5 is even rounded
    cells = planned(tmp_path, "budget={samples: null, epochs: 2}")
    assert cells["clip-B32-s0"].steps == 309
    assert cells["clip-B64-s0"].steps == 154


def test_equal_steps(tmp_path: Path) -> None:
    cells = planned(tmp_path, "held_equal=steps", "budget={samples: null, steps: 7}")
    assert {cell.steps for cell in cells.values()} == {7}
    assert cells["clip-B64-s0"].samples == 448


def test_equal_compute_halves_the_samples_of_two_views(tmp_path: Path) -> None:
    words = ["arms=[clip, amclr]", "batch_sizes=[32]", "held_equal=compute"]
    cells = planned(tmp_path, *words)
    assert cells["clip-B32-s0"].samples == 640
    assert cells["amclr-B32-s0"].samples == 320
    assert cells["clip-B32-s0"].flops[0] == cells["amclr-B32-s0"].flops[0]
    # four times the matrices at half the samples
    assert cells["amclr-B32-s0"].flops[1] == 2 * cells["clip-B32-s0"].flops[1]

    per_sample = encoder_flops(cells["clip-B32-s0"].config)
    cells = planned(tmp_path, *words, "budget.samples=null", f"budget.flops={960 * per_sample}")
    assert cells["clip-B32-s0"].samples == 960
    assert cells["amclr-B32-s0"].samples == 480


def test_operations_are_those_that_training_counts(tmp_path: Path) -> None:
    from amclr_scale.encoders.build import build_model
    from amclr_scale.engine.deepspeed_setup import sample_views
    from amclr_scale.metrics.flops import count

    config = planned(tmp_path, "arms=[clip, amclr]")["amclr-B32-s0"].config
    model = build_model(
        config.model, vocab_size=1000, pad_id=0, context_length=config.data.context_length,
        image_size=config.data.image_size, image_mean=(0.0, 0.0, 0.0), image_std=(1.0, 1.0, 1.0),
    )  # fmt: skip
    assert encoder_flops(config) == pytest.approx(
        count(model, *sample_views(config, 0, model.widths)).useful(), rel=1e-6
    )
    factors = config.optimizer.lr_factors.model_copy(update={"image_tower": 0.0})
    frozen = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"lr_factors": factors})})
    model.image_tower.requires_grad_(False)
    less = count(model, *sample_views(config, 0, model.widths)).useful()
    assert encoder_flops(frozen) == pytest.approx(less, rel=1e-6)
    assert less < 0.8 * encoder_flops(config)
    taught = planned(tmp_path, "arms=[clip]")["clip-B32-s0"].config
    words = {"model": taught.model.model_copy(update={"momentum": Momentum()}), "objective": {"name": "momentum_queue"}}
    assert encoder_flops(taught.model_copy(update=words)) == pytest.approx(4 / 3 * encoder_flops(taught), rel=1e-6)
    assert encoder_cost(taught.model_copy(update=words)) == pytest.approx(4 / 3)
    # 2 x 2 matrices of 32 keys of width 128: forward 2 D per similarity, backward to both sides and once again 6 D
    assert pairwise_flops(config, 4938) == 4 * 32 * (2 * 128 + 6 * 128)


@pytest.mark.parametrize(
    ("objective", "products", "flops"),
    [
        ("clip", 1, 8 * 32 * 128),
        (
            "uniformity",
            4,
            4 * 8 * 32 * 128,
        ),  # image-text, image-image, text-text, and image-text at another temperature
        ("siglip", 1, 6 * 32 * 128),  # keeps no log-sum: nothing is made twice
        ("vicreg", 0, 2 * 6 * 128**2),  # two Gram matrices of D x D, no negatives at any batch size
        ("xamclr", 6, 6 * 8 * 32 * 128),
    ],
)
def test_similarities_are_counted_from_what_the_objective_multiplies(
    tmp_path: Path, objective: str, products: int, flops: int
) -> None:
    views = ["data.image_views=1", "data.text_views=1"] if objective == "xamclr" else []
    arm = f"{{name: mine, like: clip, words: [{', '.join([f'objective.name={objective}', *views])}]}}"
    cell = planned(tmp_path, f"arms=[{arm}]", "reference.arm=mine", "seeds=[0]")["mine-B32-s0"]
    assert (cell.negatives, cell.comparisons) == ((31, 31 * products) if products else (0, 0))
    assert pairwise_flops(cell.config, cell.num_samples) == pytest.approx(flops)


def test_equal_hours_follow_the_measured_rates(tmp_path: Path) -> None:
    words = ["held_equal=wall_clock", "budget={samples: null, hours: 0.01}", "batch_sizes=[32]"]
    cells = planned(tmp_path, *words, rates={"clip-B32": 103.0, "sogclr-B32": 50.0})
    assert cells["clip-B32-s0"].samples == 3680  # 36 s at 103 / s = 3,708 = 115.875 steps, of which no part is made
    assert cells["sogclr-B32-s1"].samples == 1792
    with pytest.raises(UserError, match="needs samples per second measured"):
        planned(tmp_path, *words, rates={"clip-B32": 100.0})


def test_equal_memory_takes_the_largest_batch_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need = {("clip", 32): 1.0, ("clip", 64): 2.0, ("amclr", 32): 1.9, ("amclr", 64): 3.9}
    monkeypatch.setattr(cells_module, "predicted_gib", lambda plan, cell, epoch: need[cell.arm, cell.global_batch_size])
    words = ["held_equal=memory", "arms=[clip, amclr]"]
    cells = planned(tmp_path, *words, "budget.gib=2")
    assert list(cells) == ["clip-B64-s0", "clip-B64-s1", "amclr-B32-s0", "amclr-B32-s1"]
    with pytest.raises(UserError, match=r"budget.gib: amclr needs 1.90 GiB at its smallest batch of 32, got 1.5"):
        planned(tmp_path, *words, "budget.gib=1.5")


def test_a_grid_has_every_group_size_up_to_the_batch_and_other_arms_once(tmp_path: Path) -> None:
    cells = planned(tmp_path, "held_equal=grid", "group_sizes=[16, 32, 64]", "seeds=[0]")
    assert list(cells) == [
        "clip-B32-group_size16-s0", "clip-B32-group_size32-s0",
        "clip-B64-group_size16-s0", "clip-B64-group_size32-s0", "clip-B64-group_size64-s0",
        "sogclr-B32-s0", "sogclr-B64-s0",
    ]  # fmt: skip
    assert cells["clip-B64-group_size16-s0"].negatives == 15
    assert {cell.samples for cell in cells.values()} == {640}


def test_an_axis_of_an_objective_varies_only_the_arms_that_have_it(tmp_path: Path) -> None:
    cells = planned(tmp_path, "axes={objective.gamma: [0.2, 1.0]}", "seeds=[0]", "batch_sizes=[32]")
    assert list(cells) == ["clip-B32-s0", "sogclr-B32-gamma0.2-s0", "sogclr-B32-gamma1-s0"]
    assert cells["sogclr-B32-gamma0.2-s0"].config.objective["gamma"] == 0.2


def test_omega_as_an_axis_sets_the_views(tmp_path: Path) -> None:
    cells = planned(tmp_path, "arms=[amclr]", "reference.arm=amclr", "axes={objective.omega: [1, 4]}", "seeds=[0]")
    data = cells["amclr-B32-omega4-s0"].config.data
    assert (data.image_views, data.text_views) == (4, 4)
    assert cells["amclr-B32-omega4-s0"].encoder_cost == 5
    assert cells["amclr-B32-omega4-s0"].comparisons == 25 * 31


def test_where_further_captions_lie_is_said_once_for_all_arms(tmp_path: Path) -> None:
    """An arm without further views forgets it; what an arm says itself, and does not read, is a mistake."""
    said = ["arms=[clip, amclr]", "seeds=[0]", "batch_sizes=[32]", "words=['data.text_view=json.paraphrase']"]
    cells = planned(tmp_path, *said)
    assert cells["clip-B32-s0"].config.data.text_view == "json.captions"
    assert cells["amclr-B32-s0"].config.data.text_view == "json.paraphrase"
    mine = "arms=[clip, {name: mine, like: clip, words: ['data.image_view={flip: 0}']}]"
    with pytest.raises(UserError, match=r"data\.image_view: data\.image_views reads it, got \{'flip': 0\.0\}"):
        planned(tmp_path, mine, *said[1:3])


def test_an_axis_without_an_input_takes_its_file_away(tmp_path: Path) -> None:
    axes = "axes={objective.reference: [true, false]}"
    files = "'data.image_reference=i.npy', 'data.text_reference=t.npy'"
    arms = f"arms=[{{name: clip, words: [{files}]}}]"
    cells = planned(tmp_path, arms, axes, "seeds=[0]", "batch_sizes=[32]")
    found = [(cell.config.data.image_reference, cell.config.data.text_reference) for cell in cells.values()]
    assert found == [("i.npy", "t.npy"), (None, None)]


def test_learning_rates_of_one_arm_only(tmp_path: Path) -> None:
    arms = "arms=[clip, {name: sogclr, axes: {optimizer.lr: [1e-3, 2e-3]}}]"
    words = ["seeds=[0]", "batch_sizes=[256]", "lr={rule: linear, base: 4e-3}", "tuning.seeds=[]"]
    cells = planned(tmp_path, arms, *words)
    assert [cell.lr for cell in cells.values()] == [4e-3, 1e-3, 2e-3]
    assert {cell.role for cell in cells.values()} == {"scored"}


SWEEP = ("axes={optimizer.lr: [1e-3, 2e-3, 4e-3]}", "seeds=[0, 1]", "batch_sizes=[32]")


def test_learning_rates_are_chosen_on_other_seeds_than_those_that_are_scored(tmp_path: Path) -> None:
    cells = list(planned(tmp_path, *SWEEP, "arms=[clip]").values())
    tuning, scored = ([cell for cell in cells if cell.role == role] for role in ("tuning", "scored"))
    assert [(cell.lr, cell.seed) for cell in tuning] == [(lr, seed) for lr in (1e-3, 2e-3, 4e-3) for seed in (2, 3, 4)]
    assert [(cell.name, cell.seed, cell.waits) for cell in scored] == [
        ("clip-B32-s0", 0, True),
        ("clip-B32-s1", 1, True),
    ]
    assert scored[0].entry()["lr"] is None
    assert scored[0].entry()["recipe_hash"] == ""
    chosen = planned(tmp_path, *SWEEP, "arms=[clip]", chosen={"clip-B32": 2e-3})
    assert [cell.waits for cell in chosen.values()] == [False] * 11
    one = chosen["clip-B32-lr0.002-s0"]
    assert (one.lr, one.axes, one.setting, one.role) == (2e-3, {"optimizer.lr": 2e-3}, "clip-B32", "scored")
    same = planned(tmp_path, "arms=[clip]", "seeds=[0]", "batch_sizes=[32]", "lr.base=2e-3")["clip-B32-s0"]
    assert one.recipe_hash == same.recipe_hash


def test_every_setting_of_an_arm_has_a_choice_of_its_own_and_arms_without_a_sweep_have_none(tmp_path: Path) -> None:
    arms = "arms=[clip, {name: sogclr, axes: {optimizer.lr: [1e-3, 2e-3]}}]"
    words = [arms, "seeds=[0]", "axes={objective.gamma: [0.2, 0.8]}", "tuning.seeds=[7, 8]"]
    chosen = {"sogclr-B32-gamma0.2": 1e-3, "sogclr-B64-gamma0.8": 2e-3}
    cells = planned(tmp_path, *words, chosen=chosen)
    scored = {name: cell.waits for name, cell in cells.items() if cell.role == "scored"}
    assert scored == {
        "clip-B32-s0": False, "clip-B64-s0": False,
        "sogclr-B32-gamma0.2-lr0.001-s0": False, "sogclr-B32-gamma0.8-s0": True,
        "sogclr-B64-gamma0.2-s0": True, "sogclr-B64-gamma0.8-lr0.002-s0": False,
    }  # fmt: skip
    assert {cell.seed for cell in cells.values() if cell.role == "tuning"} == {7, 8}
    assert sum(cell.role == "tuning" for cell in cells.values()) == 16


def test_another_optimizer_keeps_the_shared_settings(tmp_path: Path) -> None:
    """In a configuration a changed name drops the other keys of its section: between arms, a silent difference."""
    cells = planned(tmp_path, "axes={optimizer.name: [adamw, lion]}", "seeds=[0]", "batch_sizes=[32]")
    adamw, lion = (cells[f"clip-B32-{name}-s0"].config.optimizer for name in ("adamw", "lion"))
    assert lion == adamw.model_copy(update={"name": "lion"})
    assert adamw.warmup_samples == 5000


def test_an_arm_may_have_a_larger_share_of_the_budget(tmp_path: Path) -> None:
    cells = planned(tmp_path, "arms=[clip, {name: twice, like: clip, budget_factor: 2}]", "seeds=[0]")
    assert (cells["clip-B64-s0"].samples, cells["twice-B64-s0"].samples) == (640, 1280)


def test_one_temperature_for_all_arms_unless_an_arm_names_its_own(tmp_path: Path) -> None:
    arms = "arms=[clip, sogclr, isogclr, {name: learned, like: clip, words: [objective.temperature=null]}]"
    cells = planned(tmp_path, arms, "temperature=0.1", "seeds=[0]", "batch_sizes=[32]")
    found = {cell.arm: cell.config.objective["temperature"] for cell in cells.values()}
    assert found == {"clip": 0.1, "sogclr": 0.1, "isogclr": 0.05, "learned": None}


@pytest.mark.parametrize("arm", CONTROLS)
def test_every_known_arm_builds(tmp_path: Path, arm: str) -> None:
    cells = planned(tmp_path, f"arms=[{arm}]", f"reference.arm={arm}", "seeds=[0]", "temperature=0.07")
    cell = cells[f"{arm}-B64-s0"]
    group = {"accumulation": 32, "local_negatives": 8, "grouped2": 32, "grouped4": 16}.get(arm, 64)
    assert cell.negatives == group - 1
    doubled = arm in ("clip_views", "amclr", "xamclr", "amclr_dro")
    assert cell.encoder_cost == (2 if doubled else 1)
    assert cell.comparisons == {"xamclr": 6}.get(arm, 4 if doubled else 1) * (group - 1)


def test_sogclr_without_memory_trains_as_dcl_does(tmp_path: Path) -> None:
    """The recipes differ in the objective alone: METHODS' self-check is run as two cells of a study."""
    cells = planned(tmp_path, "arms=[dcl, sogclr_gamma1]", "reference.arm=dcl", "seeds=[0]", "temperature=0.07")
    there, here = recipe(cells["dcl-B32-s0"].config), recipe(cells["sogclr_gamma1-B32-s0"].config)
    assert all(key.startswith("objective.") for key in there.keys() | here if there.get(key) != here.get(key))
    assert cells["sogclr_gamma1-B32-s0"].config.objective["gamma"] == 1.0


def test_execution_is_no_part_of_the_recipe(tmp_path: Path) -> None:
    plain = planned(tmp_path)["clip-B64-s0"]
    other = planned(tmp_path, "execution.words_by_batch={64: [execution.micro_batch_size=16]}")["clip-B64-s0"]
    assert other.config.execution.micro_batch_size == 16
    assert other.recipe_hash == plain.recipe_hash
    assert other.words == plain.words


def test_the_words_of_a_cell_make_its_recipe(tmp_path: Path) -> None:
    """A cell is run as words over the study's configuration: they have to say everything."""
    from amclr_scale.config.load import build, from_words, recipe_hash

    file = tmp_path / "tiny.yaml"
    file.write_text(PLAN)
    plan = load_plan(file, ["arms=[clip, amclr]", "axes={optimizer.weight_decay: [0.1], model.image.norm: [group]}"])
    tree = base_tree(plan)
    for cell in make_cells(plan, tree, N):
        assert recipe_hash(build(merge(tree, from_words(cell.words)))) == cell.recipe_hash


def test_the_reference_is_the_largest_batch_of_its_arm(tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(PLAN)
    plan = load_plan(file)
    assert reference_of(plan, make_cells(plan, base_tree(plan), N)) == ("clip", 64)


def told(tmp_path: Path, *words: str) -> str:
    file = tmp_path / "tiny.yaml"
    file.write_text(PLAN)
    plan = load_plan(file, words)
    return "\n".join(warnings(plan, make_cells(plan, base_tree(plan), N), N))


def test_warnings_name_what_the_study_cannot_say(tmp_path: Path) -> None:
    lines = told(tmp_path, "arms=[clip, amclr]", "batch_sizes=[32, 8192]", "budget.samples=81920")
    assert "10 optimizer steps at a global batch of 8192" in lines
    assert "global batch 8192 is larger than the data set of 4,938" in lines
    assert "AmCLR: up to 2 times the encoder work of the other arms at equal samples" in lines
    assert "one learning rate per batch size" in lines
    lines = told(tmp_path, "arms=[clip, amclr]", "held_equal=compute", "budget.samples=640000")
    assert "encoder work" not in lines
    assert "optimizer steps" not in lines
    swept = told(tmp_path, "axes={optimizer.lr: [1e-4, 2e-4, 5e-4, 1e-3, 2e-3]}")
    assert "the fair curve" not in swept
    three = told(tmp_path, "axes={optimizer.lr: [1e-4, 2e-4, 5e-4]}")
    assert "a sweep of 3 values" in three
    assert "chosen on an outcome's own items, so nothing is said about new ones" in three
    validation = "words=['evaluation.splits=[emoji/val_style, emoji/val_concept]']"
    metric = "tuning.metric={name: v, keys: [emoji/val_concept/R@mean]}"
    assert "own items" not in told(tmp_path, *SWEEP, validation, metric)
    assert "tuning.seeds: what two seeds say" in told(tmp_path, *SWEEP, "tuning.seeds=[7, 8]")
    assert "tuning.seeds" not in told(tmp_path, *SWEEP)
    assert "tuning.seeds: [] chooses learning rates on the seeds that are scored" in told(
        tmp_path, *SWEEP, "tuning.seeds=[]"
    )


def test_two_arms_of_one_recipe_are_told_before_both_are_paid(tmp_path: Path) -> None:
    again = "{name: again, like: clip, label: CLIP again, words: [%s]}"
    twice = "arms: clip-B64 and again-B64 are one recipe, run in one way, so 2 of their cells are paid twice"
    assert twice in told(tmp_path, f"arms=[clip, {again % ''}]")
    assert "one recipe" not in told(tmp_path, f"arms=[clip, {again % 'optimizer.weight_decay=0.2'}]")
    ways = "axes={execution.micro_batch_size: [8, 16]}"  # one recipe in two ways: that they agree is the question
    assert "one recipe" not in told(tmp_path, "arms=[clip]", ways)


def test_too_few_seeds_for_the_margin_are_told(tmp_path: Path) -> None:
    told_of = told(tmp_path, "sigma=1 point", "margin=1 point")
    assert "takes 11 seeds at 80% power, and more in a table of several comparisons" in told_of
    assert "seeds" not in told(tmp_path, "sigma=0.01 points", "margin=1 point", "seeds=[0, 1, 2, 3, 4]")
    assert (
        "2 seeds show a match within 1 point, at 80% power in a single comparison, only where paired differences "
        "spread by at most 0.16 points"
    ) in told(tmp_path)
    assert "1 seed: no spread" in told(tmp_path, "seeds=[3]")


def test_queues_and_momentum_encoders_are_arms_as_the_answer_to_their_names_says(tmp_path: Path) -> None:
    for name, said in ABSENT.items():
        arm = said[said.index("{") :]
        cell = planned(tmp_path, f"arms=[clip, {arm}]")[f"{name}-B32-s0"]
        assert cell.config.objective["size"] == 512
        assert cell.encoder_cost == pytest.approx(4 / 3 if name == "momentum" else 1)
