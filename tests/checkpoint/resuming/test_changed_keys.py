"""What resume_changed names are keys."""

import pytest

from amclr_scale.config.load import build
from amclr_scale.errors import UserError

TREE = {"train": {"samples": 6400}}


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("optimiser.lr", "; did you mean 'optimizer.lr'?"),
        ("train.epoch", "; did you mean 'train.epochs'?"),
        ("objective.gama", "; did you mean 'objective.gamma'?"),
        ("model.momentum.decays", "; did you mean 'model.momentum.decay'?"),
        ("optimizer.lr.x", "; did you mean 'optimizer.lr'?"),
        ("nonsense", ""),
    ],
)
def test_a_word_that_is_no_key_is_refused(word, meant):
    tree = {**TREE, "resume_changed": f"train.samples,{word}"}
    with pytest.raises(UserError) as refused:
        build(tree)
    assert str(refused.value) == (
        f"resume_changed: expected keys, such as optimizer.lr,train.epochs, got {word}{meant}"
    )
    assert build(tree, trusted=False).resume_changed[1] == word  # what older versions wrote down can be opened


@pytest.mark.parametrize(
    "word",
    [
        "optimizer", "optimizer.lr", "model.momentum.decay", "run.name", "optimizer.options.betas",
        "objective.gamma", "objective.queue.size", "objective.name",  # of the checkpoint's objective, or of this one
        "data.train.photos", "evaluation.splits.photos",  # names of the user's own
    ],
)  # fmt: skip
def test_keys_may_stand_there_whether_they_changed_or_not(word):
    assert build({**TREE, "resume_changed": [word]}).resume_changed == [word]


def test_options_of_an_objective_outside_the_package_are_its_own(tmp_path):
    file = tmp_path / "ours.py"
    file.write_text(
        "from dataclasses import dataclass\n"
        "from amclr_scale.objectives.base import Objective\n\n\n"
        'class Ours(Objective, name="ours"):\n'
        '    """Ours."""\n\n'
        "    @dataclass(frozen=True)\n"
        "    class Config:\n"
        "        strength: float = 1.0\n"
    )
    objective = {"name": "ours", "module": str(file)}
    tree = {**TREE, "objective": objective, "resume_changed": ["objective.strength"]}
    assert build(tree).resume_changed == ["objective.strength"]
