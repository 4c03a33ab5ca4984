"""Reading a study's folder, grouping, fair comparison: against what was put into synthetic folders."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from amclr_scale.errors import UserError
from amclr_scale.evaluation.items import FILE, save_items
from amclr_scale.evaluation.numbers import number
from amclr_scale.study.analysis.comparability import differences, surroundings, uneven_rate
from amclr_scale.study.analysis.comparison import Outcome, compare
from amclr_scale.study.analysis.families import analyse
from amclr_scale.study.analysis.groups import baseline_of, find, groups_of, reference_of
from amclr_scale.study.analysis.reading import read_study
from amclr_scale.study.analysis.results import Metric
from amclr_scale.study.analysis.units import unit_of
from amclr_scale.study.report.brief import brief
from amclr_scale.study.report.tables import needed_seeds, same_mathematics, sensitivity_table
from amclr_scale.study.statistics.decisions import Verdict, paired
from amclr_scale.study.statistics.selection import select
from tests.study.synthetic import ITEMS, KEYS, SAMPLES, SPLIT, make_study


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_study(
        tmp_path_factory.mktemp("studies") / "one", arms=("clip", "dcl", "sogclr_gamma1", "amclr"), batches=(128, 256),
        failed=["dcl-B128-s0"], unfinished=["amclr-B256-s2"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def study(folder):
    return read_study(folder)


def outcome(study, **options):
    return Outcome(study.metrics[0], groups_of(study), resamples=400, **options)


def test_every_cell_is_finished_or_missing_with_its_reason(study):
    assert len(study.runs) == 22
    assert {one.cell.cell: one.status for one in study.missing} == {
        "dcl-B128-s0": "failed",
        "amclr-B256-s2": "not run",
    }
    assert "step 3" in study.missing[0].message


def test_a_run_says_what_it_cost(study):
    run = next(run for run in study.runs if run.cell.cell == "amclr-B128-s1")
    assert run.samples_per_second == pytest.approx(200)
    assert run.training_seconds == pytest.approx(SAMPLES / 200)
    assert run.hours == pytest.approx(72 / 3600)  # the attempt, not the training alone
    assert run.peak_gib == pytest.approx(0.625)
    assert run.useful_flops == pytest.approx(0.02e12 / 200 * SAMPLES)


def test_a_run_of_another_recipe_is_stale_and_one_without_the_metric_unmeasured(tmp_path):
    folder = make_study(tmp_path / "s", arms=("clip",), batches=(128,), seeds=(0, 1))
    config = folder / "runs/clip-B128-s0/config.yaml"
    config.write_text(config.read_text().replace("# recipe ", "# recipe f00"))
    results = folder / "runs/clip-B128-s1/evaluation.json"
    results.write_text(json.dumps({KEYS[0]: 0.3}))
    found = read_study(folder)
    assert not found.runs
    assert [one.status for one in found.missing] == ["stale", "unmeasured"]
    assert "f00" in found.missing[0].message
    assert KEYS[1] in found.missing[1].message


def test_a_damaged_run_is_missing_not_fatal(tmp_path):
    folder = make_study(tmp_path / "s", arms=("clip",), batches=(128,), seeds=(0, 1, 2))
    (folder / "runs/clip-B128-s0/evaluation.json").write_text('{"half')
    (folder / "runs/clip-B128-s1/config.yaml").unlink()
    (folder / "runs/clip-B128-s2/evaluation_items.safetensors").write_bytes(b"torn")
    assert [one.status for one in read_study(folder).missing] == ["unreadable"] * 3


@pytest.mark.parametrize("outcome", [KEYS[0], f"{SPLIT}/zero_shot_mean_per_class"])
def test_items_of_an_older_format_are_refused_where_an_outcome_is_compared_by_them(tmp_path, outcome):
    folder = make_study(tmp_path / "s", arms=("clip",), batches=(128,), seeds=(0, 1))
    for run in (folder / "runs").iterdir():
        results = json.loads((run / "evaluation.json").read_text())
        (run / "evaluation.json").write_text(json.dumps(results | {f"{SPLIT}/zero_shot_mean_per_class": 0.25}))
        hits = number(torch.tensor([0.0, 0.0, 0.0, 1.0]))
        save_items(run / FILE, {SPLIT: {KEYS[0].rpartition("/")[2]: hits, "zero_shot_mean_per_class": hits}})
    first = folder / "runs/clip-B128-s0" / FILE
    with safe_open(first, framework="pt") as file:
        metadata = {"numbers": file.metadata()["numbers"]}  # as it was before there were formats
    save_file(load_file(first), first, metadata=metadata)
    listed = json.loads((folder / "cells.json").read_text())
    (folder / "cells.json").write_text(json.dumps(listed | {"metrics": [outcome]}))
    found = read_study(folder)
    assert [one.items.keys() for one in found.runs] == [{outcome}] * (2 if outcome in KEYS else 1)
    if outcome not in KEYS:
        (missing,) = found.missing
        assert (missing.cell.cell, missing.status) == ("clip-B128-s0", "unreadable")
        assert "evaluate the run again: remove its evaluation.json" in missing.message


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "cells.json").unlink(), "cells.json: expected a file that launch/study.py wrote"),
        (lambda folder: (folder / "cells.json").write_text("{}"), "cells.json: expected the cells of a study"),
        (lambda folder: (folder / "study.yaml").unlink(), "study.yaml: expected the plan"),
    ],
)
def test_a_folder_that_is_no_study_is_refused_in_words(tmp_path, damage, message):
    folder = make_study(tmp_path / "s", arms=("clip",), batches=(128,), seeds=(0,))
    damage(folder)
    with pytest.raises(UserError, match=message):
        read_study(folder)


def test_groups_hold_the_seeds_in_the_plans_order(study):
    found = outcome(study)
    groups = found.groups
    assert [(g.arm, g.global_batch_size) for g in groups] == [
        (arm, batch) for arm in ("clip", "dcl", "sogclr_gamma1", "amclr") for batch in (128, 256)
    ]
    assert found.seeds(*groups[:2]) == [0, 1, 2]
    assert found.seeds(find(groups, "dcl", 128), groups[0]) == [1, 2]  # the failed seed has no partner
    assert reference_of(study, groups) is find(groups, "clip", 256)
    assert baseline_of(groups, "clip", find(groups, "amclr", 128)) is find(groups, "clip", 128)


def test_a_metric_is_the_mean_of_its_keys(study):
    metric, run = study.metrics[0], study.runs[0]
    assert metric.score(run.results) == pytest.approx((run.results[KEYS[0]] + run.results[KEYS[1]]) / 2)
    assert metric.number(run.items).value == pytest.approx(metric.score(run.results))
    assert metric.chance(run.results) == pytest.approx(1 / ITEMS)


def test_differences_are_paired_by_seed_and_widened_by_items(study):
    found = outcome(study)
    groups = found.groups
    first, second = find(groups, "clip", 128), find(groups, "amclr", 256)
    both = found.difference(second, first)
    scores = [[run.results[KEYS[0]] for run in group.runs if run.cell.seed < 2] for group in (first, second)]
    assert both.seeds == paired(*scores)
    low, high = both.items.interval()
    assert low < both.seeds.interval()[0]
    assert high > both.seeds.interval()[1]
    assert (found.clusters, both.items.n) == (ITEMS, 2)


def test_a_large_true_difference_is_found_and_identical_cells_match(study):
    found = outcome(study)
    groups = found.groups
    pairs = [
        (find(groups, "amclr", 128), find(groups, "clip", 128)),
        (find(groups, "sogclr_gamma1", 256), find(groups, "dcl", 256)),
        (find(groups, "clip", 128), find(groups, "clip", 256)),
    ]
    verdicts = [one.decision.verdict for one in compare(found, pairs, study.margin)]
    assert verdicts[:2] == [Verdict.BETTER, Verdict.MATCHES]
    assert verdicts[2] in {Verdict.WORSE, Verdict.UNDECIDED}


def test_the_slope_over_doublings_is_the_true_one(tmp_path):
    study = read_study(make_study(tmp_path / "s", arms=("clip", "dcl"), seeds=range(8)))
    found = outcome(study)
    rows = {row["arm"]: row for row in sensitivity_table(found, unit_of(study.metrics[0], study.runs), "clip").raw}
    assert rows["clip"]["per_doubling_low"] < 0.04 < rows["clip"]["per_doubling_high"]
    assert rows["dcl"]["beside_reference_arm_low"] < -0.02 < rows["dcl"]["beside_reference_arm_high"]
    assert rows["clip"]["beside_reference_arm"] is None
    scores = np.array([found.values(group, range(8)) for group in found.groups[:3]])
    slopes = np.polyfit([0, 1, 2], scores, 1)[0]
    assert rows["clip"]["per_doubling"] == pytest.approx(slopes.mean())


def test_without_items_there_are_seeds_alone(tmp_path):
    study = read_study(make_study(tmp_path / "s", arms=("clip",), batches=(128, 256), items=False))
    found = outcome(study)
    groups = found.groups
    assert found.difference(*groups).items is None
    assert found.clusters == 0


def test_runs_measured_on_other_items_are_refused(tmp_path, monkeypatch):
    folder = make_study(tmp_path / "s", arms=("clip",), batches=(128,), seeds=(0,))
    monkeypatch.setattr("tests.study.synthetic.ITEMS", 200)
    other = read_study(make_study(tmp_path / "t", arms=("clip",), batches=(256,), seeds=(0,)))
    groups = groups_of(read_study(folder)) + groups_of(other)
    with pytest.raises(UserError, match="R@1, both ways: numbers"):
        Outcome(other.metrics[0], groups, resamples=10)


def test_a_swept_learning_rate_is_chosen_by_the_other_seeds(tmp_path):
    rates = [0.0005, 0.001, 0.002]
    study = read_study(
        make_study(
            tmp_path / "s", arms=("clip",), batches=(128,), seeds=(0, 1, 2), axes={"optimizer.lr": rates},
            shift={("optimizer.lr", 0.001): 0.2},
        )
    )  # fmt: skip
    found = outcome(study)
    (group,) = found.groups
    assert group.rates == rates
    assert found.selection(group).best == 1
    best = group.at_rate(0.001)
    assert found.scores[group] == {seed: run.results[KEYS[0]] for seed, run in best.items()}


def test_keys_that_change_no_result_are_no_differences(tmp_path):
    folder = make_study(tmp_path / "s", arms=("clip", "dcl"), batches=(128,), seeds=(0,),
                        words={"dcl": ["data.allow_pipe=true", "train.max_hours=2"]})  # fmt: skip
    found = {one.key for one in differences(read_study(folder).runs)}
    assert "objective.name" in found
    assert not [key for key in found if key.startswith(("data.", "train."))]


def test_other_axes_make_groups_of_their_own(tmp_path):
    study = read_study(
        make_study(tmp_path / "s", arms=("sogclr",), batches=(128,), axes={"objective.gamma": [0.2, 0.8]})
    )
    assert [group.title for group in groups_of(study)] == ["SogCLR, gamma 0.2", "SogCLR, gamma 0.8"]


def test_an_axis_is_compared_at_its_own_value(tmp_path):
    study = read_study(
        make_study(tmp_path / "s", arms=("clip", "dcl"), batches=(128,), axes={"optimizer.weight_decay": [0.1, 0.2]})
    )
    groups = groups_of(study)
    for group in groups[2:]:
        base = baseline_of(groups, "clip", group)
        assert (base.arm, base.variant) == ("clip", group.variant)
    assert find(groups, "clip", 128, (("optimizer.weight_decay", 0.3),)) is None
    assert find(groups, "clip", 128, (("objective.gamma", 0.3),)) is groups[0]  # an axis that CLIP has not


def test_a_rank_is_better_when_it_is_lower(tmp_path):
    folder = make_study(tmp_path / "s", arms=("clip", "amclr"), batches=(128,), items=False)
    listed = json.loads((folder / "cells.json").read_text())
    key = "emoji/val_style/image_to_text_median_rank"
    listed |= {"metrics": [{"name": "median rank", "keys": [key]}], "margin": 1.0}
    (folder / "cells.json").write_text(json.dumps(listed))
    for run in (folder / "runs").iterdir():
        rank = (10.0 if "amclr" in run.name else 90.0) + int(run.name[-1])
        results = json.loads((run / "evaluation.json").read_text())
        (run / "evaluation.json").write_text(json.dumps({**results, key: rank}))
    study = read_study(folder)
    found = outcome(study)
    (one,) = compare(found, [(found.groups[1], found.groups[0])], study.margin)
    assert (one.difference.seeds.value, one.decision.verdict) == (-80.0, Verdict.BETTER)
    text = brief(study, "?", analyse(study, found.groups), found.groups)
    assert "**Scores.** Lowest median rank, mean over seeds: at B = 128 AmCLR 11 (CLIP 91)." in text
    assert select(np.array([[10.0, 11.0], [20.0, 21.0]]), lower_is_better=True).best == 0


def test_cells_that_must_agree_are_found_by_their_configurations(tmp_path):
    study = read_study(
        make_study(
            tmp_path / "s", arms=("clip", "dcl", "sogclr_gamma1", "sogclr"), batches=(128, 256), seeds=(0,),
            axes={"objective.temperature": [0.05, 0.07]},
        )
    )  # fmt: skip
    found = {(a.name, b.name) for a in groups_of(study) for b in groups_of(study) if same_mathematics(a, b)}
    assert found == {
        (f"SogCLR, gamma 1, temperature {t}, B = {batch}", f"DCL, temperature {t}, B = {batch}")
        for t in (0.05, 0.07)
        for batch in (128, 256)
    }


def test_a_group_as_large_as_the_batch_must_agree_with_clip(tmp_path):
    axes = {"objective.group_size": [None, 64, 128]}
    groups = groups_of(read_study(make_study(tmp_path / "s", arms=("clip",), batches=(128,), seeds=(0,), axes=axes)))
    found = [(a.variant, b.variant) for a in groups for b in groups if same_mathematics(a, b)]
    assert found == [((("objective.group_size", 128),), (("objective.group_size", None),))]


def test_what_differs_is_explained_and_unfair_differences_are_pointed_out(tmp_path):
    folder = make_study(
        tmp_path / "s", arms=("clip", "dcl"), batches=(128, 256), seeds=(0, 1),
        words={"dcl": ["model.image.width=8", "optimizer.weight_decay=0.2"]},
    )  # fmt: skip
    found = {one.key: one for one in differences(read_study(folder).runs)}
    assert (found["seed"].by, found["train.global_batch_size"].by) == ("seed", "batch size")
    assert found["objective.name"].by == "arm"
    assert not found["objective.name"].warn
    assert found["model.image.width"].warn
    assert found["model.image.width"].values == (("clip", "16"), ("dcl", "8"))
    assert found["optimizer.weight_decay"].warn
    assert "objective.label_smoothing" not in found  # DCL has no such option
    assert "data.train" not in found


def test_a_section_that_others_leave_out_is_one_difference(tmp_path):
    words = {"dcl": ["model.momentum.decay=0.5"]}
    folder = make_study(tmp_path / "s", arms=("clip", "dcl"), batches=(128,), seeds=(0,), words=words)
    found = {one.key: one for one in differences(read_study(folder).runs)}
    assert {key for key in found if key.startswith("model.momentum")} == {"model.momentum"}
    (_, plain), (_, changed) = found["model.momentum"].values
    assert plain == "null"
    assert '"decay": 0.5' in changed


def test_surroundings_of_resumed_runs_count(tmp_path):
    folder = make_study(tmp_path / "s", arms=("clip",), batches=(128,), seeds=(0, 1))
    file = folder / "runs/clip-B128-s0/environment.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "resumed": [{**content, "host": "there"}]}))
    assert surroundings(read_study(folder).runs)["host"] == ["here", "there"]


def test_a_machine_that_did_other_work_shows(tmp_path):
    folder = make_study(tmp_path / "s", arms=("clip",), batches=(128, 256), seeds=(0, 1))
    groups = groups_of(read_study(folder))
    assert uneven_rate(group.runs for group in groups) == 1
    file = folder / "runs/clip-B128-s1/metrics.jsonl"
    file.write_text(file.read_text().replace('"samples_per_second": 400.0', '"samples_per_second": 100.0'))
    groups = groups_of(read_study(folder))
    assert uneven_rate(group.runs for group in groups) == pytest.approx(4)


def test_seeds_needed_carries_the_uncertainty_of_the_spread():
    from amclr_scale.study.statistics.decisions import estimate

    middle, least, most = needed_seeds(estimate([0.0, 0.01, 0.02]), 0.01)
    assert least < middle < most
    assert needed_seeds(estimate([0.1]), 0.01) is None
    assert needed_seeds(estimate([0.1, 0.1]), 0.01) == (2, 2, 2)


def test_a_metric_is_a_name_or_a_mean():
    assert Metric("a", ("a", "b")).score({"a": 1.0, "b": 2.0}) == 1.5
    assert np.isnan(Metric("a", ("a",)).score({"a": float("nan")}))
