"""How long cells train where compute is held equal, beside what test_cells.py has of the other modes."""

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
