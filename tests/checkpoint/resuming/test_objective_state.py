"""A run does not go on with an objective that the checkpoint's state does not fit, and is told so before it begins."""

import pytest
import torch

from amclr_scale import objectives
from amclr_scale.checkpoint.objective_state import load, obstacles
from amclr_scale.checkpoint.resume import find
from amclr_scale.errors import UserError
from tests.checkpoint.test_files import configuration, write


def recipe_of(tmp_path, objective, **keys):
    """A configuration with the views that amclr reads, whose number may change with it."""
    views = objective.get("omega", 0)
    return configuration(tmp_path, objective=objective, data={"image_views": views, "text_views": views}, **keys)


def saved_then(tmp_path, before, now, *accepted, **keys):
    """What stands against going on, after a run of one objective, with another one; "" where nothing does."""
    saved = write(tmp_path, 10, recipe_of(tmp_path, before))
    config = recipe_of(tmp_path, now, resume_changed=["data", *accepted], **{"resume": "auto", **keys})
    try:
        find(config)
    except UserError as error:
        return str(error).replace(str(saved), "CHECKPOINT")
    return ""


@pytest.mark.parametrize(("before", "now"), [("sogclr", "clip"), ("clip", "sogclr"), ("sogclr", "swav")])
@pytest.mark.parametrize("accepted", [[], ["objective"], ["objective.name"]])
def test_an_objective_that_keeps_something_else_is_no_change_to_accept(tmp_path, before, now, accepted):
    said = saved_then(tmp_path, {"name": before}, {"name": now}, *accepted)
    assert said == (
        f"objective.name: expected {before}, as in the checkpoint, got {now}: the objective's state does not carry "
        "over; go back to it, or start a run of its own from these weights: amclr-scale export CHECKPOINT "
        "--out FOLDER, then model.init=FOLDER and another run.name"
    )


def test_parts_of_the_model_are_part_of_it(tmp_path):
    """Prototypes are the model's: the objective itself keeps nothing."""
    said = saved_then(tmp_path, {"name": "clip"}, {"name": "swav"}, "objective")
    assert said.startswith("objective.name: expected clip, as in the checkpoint, got swav")


@pytest.mark.parametrize(
    ("before", "now", "key"),
    [
        ({"name": "sogclr"}, {"gamma_schedule": "visits"}, "gamma_schedule: expected constant"),
        ({"name": "amclr", "omega": 2}, {"omega": 3}, "omega: expected 2"),
        ({"name": "fifo_bank", "size": 64}, {"size": 128}, "size: expected 64"),
        ({"name": "clip", "queue": {"size": 64}}, {"queue": {"size": 128}}, "queue.size: expected 64"),
        ({"name": "swav"}, {"prototypes": 10}, "prototypes: expected 3000"),
    ],
)
def test_the_option_that_changes_a_table_is_named_and_the_others_may_be_accepted(tmp_path, before, now, key):
    said = saved_then(tmp_path, before, {**before, **now, "temperature": 0.03})
    first, advice, other = said.splitlines()
    assert first.startswith(f"objective.{key}, as in the checkpoint, got ")
    assert advice.endswith("accept the changes with resume_changed=objective.temperature")
    assert other.startswith("objective.temperature: ")


def test_every_option_that_changes_a_table_is_named(tmp_path):
    now = {"name": "amclr", "omega": 3, "gamma_schedule": "visits"}
    said = saved_then(tmp_path, {"name": "amclr", "omega": 2}, now)
    assert {line.split(":")[0] for line in said.splitlines()} == {"objective.omega", "objective.gamma_schedule"}


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("clip", "cyclip"),  # neither keeps anything
        ("sogclr", "fastclip"),  # the same tables
        ("clip", "mochi"),  # which counts its steps from wherever it begins
        ("clip", "meow"),  # whose clusters the first embeddings make
    ],
)
def test_what_carries_over_may_be_accepted(tmp_path, before, now):
    said = saved_then(tmp_path, {"name": before}, {"name": now})
    assert "accept the changes with resume_changed=objective.name" in said
    assert saved_then(tmp_path / "b", {"name": before}, {"name": now}, "objective") == ""


def test_a_run_that_is_named_by_its_path_is_told_not_to_resume(tmp_path):
    said = saved_then(tmp_path, {"name": "sogclr"}, {"name": "clip"}, resume=str(tmp_path / "a"))
    assert said.endswith("then model.init=FOLDER, resume=never and another run.name")


def test_a_checkpoints_own_file_is_not_run(tmp_path):
    """It may come from anywhere: what it keeps is known once it is loaded."""
    config = configuration(tmp_path)
    file = tmp_path / "theirs.py"
    file.write_text("raise AssertionError('run')")
    saved = config.model_dump(mode="json")
    saved["objective"] = {"name": "theirs", "module": str(file), "module_sha256": "0" * 64}
    assert obstacles(saved, config, {"objective.name": ""}, "") == {}


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        (
            ("sogclr", {}),
            ("clip", {}),
            r"of another objective, or of other options: it has image_state\.log_u too many",
        ),
        (("clip", {}), ("sogclr", {}), r"of another objective, or of other options: it lacks image_state\.log_u"),
        (("isogclr", {}), ("clip", {}), "too many, and 3 more$"),
        (("amclr", {"omega": 2}), ("amclr", {"omega": 3}), r"image_state\.log_u: expected \(8, \d+\) numbers"),
        (("onlineclr", {}), ("onlineclr", {}), r"log_u_negative: expected \(1,\) numbers, got \(2,\)$"),
    ],
)
def test_what_is_loaded_all_the_same_is_refused_in_words(before, now, said):
    old, new = (objectives.create(name, num_samples=8, **options) for name, options in (before, now))
    state = old.state_dict()
    if before[0] == now[0] == "onlineclr":
        state["log_u_negative"] = torch.zeros(2)
    with pytest.raises(ValueError, match=said) as refused:
        load(new, state)
    assert "state_dict" not in str(refused.value)
    assert "size mismatch" not in str(refused.value)
