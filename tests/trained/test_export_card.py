"""The numbers on the card of an exported folder are those of its weights."""

import pytest

from amclr_scale.checkpoint import files
from amclr_scale.trained.export import _results


@pytest.mark.parametrize("which", ["weights", "momentum"])
@pytest.mark.parametrize(("step", "told"), [(10, True), (5, False)])
def test_numbers_of_the_last_step_are_on_no_card_of_an_earlier_one(tmp_path, step, told, which):
    """evaluation.json is of what the run ended with."""
    (tmp_path / "evaluation.json").write_text('{"emoji/R@1": 0.5, "momentum/emoji/R@1": 0.75}')
    checkpoint = tmp_path / files.CHECKPOINTS / files.name_of(step)
    found = _results(checkpoint, {"step": step, "total_steps": 10}, which)
    assert found == ({"emoji/R@1": {"weights": 0.5, "momentum": 0.75}[which]} if told else {})
