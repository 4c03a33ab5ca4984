"""How long cells train where compute is held equal, at which rate and after which warm-up."""

from pathlib import Path

import pytest

from tests.study.test_cells import planned


def test_equal_compute_counts_the_work_of_each_tower(tmp_path: Path) -> None:
    """Another caption costs what the text tower takes, a teacher a third of what it encodes; also of a frozen tower."""
    arms = [
        "clip",
        "{name: two_texts, like: clip, words: [objective.name=one_to_k, objective.texts=2, data.text_views=1]}",
        "{name: two_images, like: clip, words: [objective.name=slip, data.image_views=2]}",
        "{name: taught, like: clip, words: [objective.name=byolip, 'model.momentum={decay: 0.99}']}",
    ]
    words = [
        f"arms=[{', '.join(arms)}]",
        "batch_sizes=[32]",
        "seeds=[0]",
        "held_equal=compute",
        "budget.samples=160000",
    ]
    for further in ([], ["optimizer.lr_factors.image_tower=0"]):
        cells = planned(tmp_path, *words, f"words={further}")
        work = {name: cell.flops[0] for name, cell in cells.items()}
        assert work == pytest.approx(dict.fromkeys(work, work["clip-B32-s0"]), rel=0.001)
        image, text = cells["two_images-B32-s0"].samples, cells["two_texts-B32-s0"].samples
        assert cells["clip-B32-s0"].samples == 160000 > max(image, text)
        assert image != text


def test_learning_rate_rule_and_warm_up(tmp_path: Path) -> None:
    cells = planned(tmp_path, "lr={rule: sqrt, base: 1e-3, reference_batch: 16}", "warmup_share=0.1")
    assert cells["clip-B64-s0"].lr == pytest.approx(2e-3)
    assert cells["clip-B64-s0"].config.optimizer.warmup_samples == 64


def test_what_an_arm_says_of_its_rate_and_warm_up_goes_before_what_the_plan_says(tmp_path: Path) -> None:
    own = "{name: dcl, words: [optimizer.warmup_samples=192, optimizer.lr=5e-3]}"
    axis = "{name: sogclr, axes: {optimizer.warmup_samples: [32, 96]}}"
    plan = ["lr={rule: sqrt, base: 1e-3, reference_batch: 16}", f"arms=[clip, {own}, {axis}]"]
    for of_all in ("warmup_share=0.1", "warmup_samples=64"):
        cells = planned(tmp_path, *plan, of_all)
        assert {cell.arm: cell.lr for cell in cells.values() if cell.global_batch_size == 64} == pytest.approx(
            {"clip": 2e-3, "dcl": 1e-2, "sogclr": 2e-3}
        )
        warmup = {cell.variant: cell.config.optimizer.warmup_samples for cell in cells.values()}
        assert (warmup["clip-B64"], warmup["dcl-B64"]) == (64, 192)
        assert {value for name, value in warmup.items() if name.startswith("sogclr-B64")} == {32, 96}
