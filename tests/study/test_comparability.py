"""Runs of several versions of the package: what differs by the version alone is told from the rest."""

from dataclasses import replace

from amclr_scale.study.analysis.comparability import differences
from amclr_scale.study.analysis.reading import read_study
from tests.study.synthetic import make_study


def test_keys_that_an_older_version_did_not_have_are_no_differences(tmp_path):
    folder = make_study(tmp_path / "s", arms=("clip", "dcl"), batches=(128,), seeds=(0, 1),
                        words={"dcl": ["objective.name=fifo_bank", "objective.size=512"]})  # fmt: skip
    runs = read_study(folder).runs
    new = ("model.image.taps", "data.communities", "evaluation.sheet", "objective.wait_epochs", "optimizer.layer_decay")
    old = [replace(run, config={k: v for k, v in run.config.items() if k not in new}) for run in runs if run.cell.seed]
    assert all(set(new[:3]) <= run.config.keys() for run in runs)
    found = {one.key: one.by for one in differences([*(run for run in runs if not run.cell.seed), *old])}
    assert not found.keys() & {*new, "objective.queue"}
    assert (found["seed"], found["objective.name"]) == ("seed", "arm")
    # What the older did otherwise than at the default stays a difference.
    changed = [replace(run, config={**run.config, "model.image.taps": ["stages.2"]}) for run in runs if run.cell.seed]
    assert "model.image.taps" in {one.key for one in differences([*old, *changed])}


def test_a_file_for_each_seed_of_an_arm_is_explained(tmp_path):
    runs = read_study(make_study(tmp_path / "s", arms=("clip", "dcl"), batches=(128,), seeds=(0, 1))).runs
    read = [
        replace(
            run, config={**run.config, "data.communities": f"{run.cell.seed}.npy" if run.cell.arm == "dcl" else None}
        )
        for run in runs
    ]
    found = {one.key: (one.by, one.values) for one in differences(read)}
    assert found["data.communities"][0] == "arm and seed"
    assert ("dcl, 1", "1.npy") in found["data.communities"][1]


def test_options_that_an_older_version_did_not_have_are_given_to_their_objective_alone(tmp_path):
    bank = ["objective.name=fifo_bank", "objective.size=512"]
    queue = ["objective.name=clip", "objective.queue={size: 512}", "data.image_views=0", "data.text_views=0"]
    folder = make_study(
        tmp_path / "s", arms=("clip", "dcl", "sogclr", "amclr"), batches=(128,), seeds=(0, 1),
        words={"dcl": bank, "sogclr": [*bank, "objective.wait_epochs=4"],
               "amclr": queue},
    )  # fmt: skip
    new = ("objective.wait_epochs", "objective.queue.wait_epochs")
    runs = [
        replace(run, config={k: v for k, v in run.config.items() if k not in new})
        if run.cell.seed and run.cell.arm != "sogclr"
        else run
        for run in read_study(folder).runs
    ]
    found = {one.key: one for one in differences(runs)}
    waits, queues = found["objective.wait_epochs"], found["objective.queue"]
    assert (waits.by, queues.by) == ("arm", "arm")
    assert {value: where for where, value in waits.values} == {
        "(absent)": "clip, amclr", "0.0": "dcl", "4.0": "sogclr",
    }  # fmt: skip
    assert {where for where, value in queues.values if value == "null"} == {"clip"}
    assert not [key for key in found if key.startswith("objective.queue.")]
