"""What a report says of studies of a kind: an axis, a grid, ranks, pairs, one seed, a reference that hardly learned."""

import json
import re
import statistics
from pathlib import Path

import pytest
import yaml

from amclr_scale.evaluation.items import FILE, load_items, save_items
from amclr_scale.evaluation.numbers import number
from amclr_scale.study.analysis.comparison import Outcome, compare
from amclr_scale.study.analysis.groups import groups_of, reference_of
from amclr_scale.study.analysis.reading import read_study
from amclr_scale.study.analysis.units import unit_of
from amclr_scale.study.report import plots
from amclr_scale.study.report.brief import brief
from amclr_scale.study.report.claims import load_claims
from amclr_scale.study.report.compose import compose
from amclr_scale.study.statistics.decisions import estimate
from tests.study import synthetic
from tests.study.synthetic import make_study

ROOT = Path(__file__).parents[2]


@pytest.mark.usefixtures("undrawn")
def test_arms_are_known_by_what_they_began_as(tmp_path, monkeypatch):
    base = synthetic.ARMS["sogclr"]
    for name, optimizer in (("sogclr_adamw", "adamw"), ("sogclr_nesterov", "sgd")):
        words = (*base[2], f"optimizer.name={optimizer}")
        monkeypatch.setitem(synthetic.ARMS, name, (base[0], base[1], words, f"SogCLR, {optimizer}", 1.0))
    folder = make_study(
        tmp_path / "s", arms=("clip", "sogclr_adamw", "sogclr_nesterov"), batches=(128,), seeds=(0, 1),
        like={"sogclr_adamw": "sogclr", "sogclr_nesterov": "sogclr"},
    )  # fmt: skip
    composed = compose(read_study(folder))
    tables = {table.name: table.raw for table in composed.tables}
    claims = {row["id"]: row["measured_here"] for row in tables["claims"]}
    assert claims["C10"].startswith("sogclr at B = 128, by optimizer.name: adamw: ")
    assert "SogCLR, adamw - CLIP" in claims["C6"]
    assert "SogCLR, sgd - CLIP" not in claims["C6"]  # another optimizer
    numbers = {row["published"]: row["here"] for row in tables["published_numbers"]}
    assert numbers["SogCLR, AdamW"].startswith("SogCLR, adamw, B = 128")
    assert numbers["SogCLR, Nesterov"].startswith("SogCLR, sgd, B = 128")


@pytest.mark.usefixtures("undrawn")
def test_an_axis_and_a_grid_speak(tmp_path):
    folder = make_study(
        tmp_path / "s", arms=("sogclr",), batches=(128,), seeds=(0, 1), axes={"objective.gamma": [0.2, 0.8]}
    )
    text = compose(read_study(folder)).markdown
    assert "sogclr at B = 128, by objective.gamma: 0.2: " in text
    grid = make_study(
        tmp_path / "g", arms=("clip",), batches=(128, 256), seeds=(0, 1), held_equal="grid",
        axes={"objective.group_size": [64, 128]}, items=False,
    )  # fmt: skip
    cells = json.loads((grid / "cells.json").read_text())
    for cell in cells["cells"]:
        cell["negatives"] = cell["comparisons"] = cell["axes"]["objective.group_size"] - 1
    (grid / "cells.json").write_text(json.dumps(cells))
    study = read_study(grid)
    found = Outcome(study.metrics[0], groups_of(study))
    reference = reference_of(study, found.groups)
    assert reference.variant == (("objective.group_size", 128),)  # the largest groups, wherever they come in the plan
    assert reference.global_batch_size == 256
    figure = plots.heat_map(found, unit_of(study.metrics[0], study.runs), "grid")
    assert {(row["global_batch_size"], row["negatives"]) for row in figure.raw} == {
        (batch, size - 1) for batch in (128, 256) for size in (64, 128)
    }


@pytest.mark.usefixtures("undrawn")
@pytest.mark.slow
def test_ranks_speed_up_a_recipe_and_are_held_to_the_same_scores(tmp_path):
    folder = make_study(
        tmp_path / "s", arms=("clip", "dcl"), batches=(128, 256, 512), axes={"execution.ranks": [1, 2, 4]},
        unfinished=["clip-B128-s1-ranks2"],
    )  # fmt: skip
    composed = compose(read_study(folder))
    [table] = [one for one in composed.tables if one.name == "scaling"]
    rows = {(row["title"], row["global_batch_size"], row["ranks"]): row for row in table.raw}
    assert len(rows) == 2 * 3 * 3
    for (_, batch, ranks), row in rows.items():
        seeds = (0, 2) if row["title"] == "CLIP" and (batch, ranks) == (128, 2) else (0, 1, 2)
        speed = [synthetic.throughput(1, ranks, seed) / synthetic.throughput(1, 1, seed) for seed in seeds]
        assert (row["seeds"], row["local_batch_size"]) == (len(seeds), batch / ranks)
        assert row["speed_up"] == pytest.approx(statistics.mean(speed))
        assert row["efficiency"] == pytest.approx(statistics.mean(speed) / ranks)
        assert (row["efficiency_low"], row["efficiency_high"]) == pytest.approx(
            estimate([one / ranks for one in speed]).interval()
        )
    # b = 128: 128 on one rank, 256 on two, 512 on four; 32 samples a rank were only run on four
    weak = rows["DCL", 512, 4]["efficiency_at_equal_local_batch"]
    assert weak == pytest.approx(rows["DCL", 512, 4]["efficiency"])  # throughput here does not depend on B
    assert rows["DCL", 128, 4]["efficiency_at_equal_local_batch"] is None
    assert {(row["line"], row["ranks"]) for row in composed.figures["by_ranks"].raw} == {
        (f"{arm}, B = {batch}", ranks) for arm in ("CLIP", "DCL") for batch in (128, 256, 512) for ranks in (1, 2, 4)
    }
    tables = {one.name: one.raw for one in composed.tables}
    assert not tables.keys() & composed.figures.keys()  # each has a CSV of its own
    assert {row["why"] for row in tables["agreement"]} == {"one recipe, run in two ways"}
    claims = {row["id"]: row["measured_here"] for row in tables["claims"]}
    assert "CLIP, B = 256: 2 ranks 1.76 [1.72, 1.80] times the samples/s of 1" in claims["C17"]
    apart = max(100 * row["largest_difference"] for row in tables["agreement"])
    assert re.search(rf"- \*\*Must agree\.\*\* 18 pairs of cells;.*, {apart:.2f} points\.\n", composed.markdown)


@pytest.mark.usefixtures("undrawn")
def test_the_head_says_which_batch_size_a_method_is_worth(tmp_path):
    folder = make_study(tmp_path / "s", arms=("clip", "dcl"), batches=(128, 512, 2048), noise=0.0005, items=False)
    composed = compose(read_study(folder))
    head = composed.markdown.partition("## In brief")[2].partition("## Question and design")[0]
    [rows] = [one.raw for one in composed.tables if one.name == "equivalent_batch"]
    known = [row for row in rows if row["crossings"] and not (row["low_open"] and row["high_open"])]
    assert known
    for row in known:
        same = f"scores what CLIP scores at B = {float(row['crossings']):,.0f} (95 % interval: "
        assert f"DCL, B = {row['global_batch_size']:,} {same}" in head.partition("**Equivalent batch size.**")[2]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("axes", [None, {"execution.ranks": [1, 2, 4]}], ids=["plain", "ranks"])
def test_arms_of_one_label_are_one_method_at_other_batch_sizes(tmp_path, axes):
    folder = make_study(tmp_path / "s", arms=("clip", "dcl"), noise=0.0005, items=False, axes=axes)
    plan = yaml.safe_load((folder / "study.yaml").read_text()) | {"pairs": [["dcl", "clip"], ["clip", "dcl"]]}
    (folder / "study.yaml").write_text(yaml.safe_dump(plan))
    whole = compose(read_study(folder))

    plan["arms"].append({"name": "clip_large", "like": "clip"})
    (folder / "study.yaml").write_text(yaml.safe_dump(plan))
    listed = json.loads((folder / "cells.json").read_text())
    for cell in listed["cells"]:
        if (cell["arm"], cell["global_batch_size"]) == ("clip", 512):
            cell["arm"] = "clip_large"
    listed["reference"]["arm"] = "clip_large"
    (folder / "cells.json").write_text(json.dumps(listed))
    parted = compose(read_study(folder))

    names = [table.name for table in parted.tables]
    assert {"scaling"} < set(names) if axes else {"equivalent_batch", "sensitivity"} < set(names)
    assert any("same_batch" in name for name in names)
    assert [(one.name, one.header, one.rows) for one in parted.tables if one.name != "differences"] == [
        (one.name, one.header, one.rows) for one in whole.tables if one.name != "differences"
    ]
    head, of_whole = (one.markdown.partition("## Question and design")[0] for one in (parted, whole))
    assert head == of_whole


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("shared", ["DCL", "CLIP"])
def test_arms_of_one_label_at_one_batch_size_stay_apart(tmp_path, shared):
    """Folders of earlier versions have them."""
    folder = make_study(tmp_path / "s", arms=("clip", "dcl", "sogclr"), batches=(128, 256), items=False)
    before = {row["arm"]: row for row in read_tables(folder)["sensitivity"]}
    listed = json.loads((folder / "cells.json").read_text())
    for cell in listed["cells"]:
        cell["label"] = shared if cell["arm"] in ("sogclr", shared.lower()) else cell["label"]
    (folder / "cells.json").write_text(json.dumps(listed))
    tables = read_tables(folder)
    scores = {(row["arm"], row["global_batch_size"]) for row in tables["scores_R_1_both_ways"]}
    assert scores == {(arm, batch) for arm in ("clip", "dcl", "sogclr") for batch in (128, 256)}
    assert {row["arm"]: row["per_doubling"] for row in tables["sensitivity"]} == {
        arm: row["per_doubling"] for arm, row in before.items()
    }


def read_tables(folder: Path):
    return {table.name: table.raw for table in compose(read_study(folder)).tables}


@pytest.mark.usefixtures("undrawn")
def test_an_outcome_on_several_splits_has_seeds_alone(tmp_path):
    folder = make_study(tmp_path / "s", arms=("clip", "dcl"), batches=(128,))
    whole = compose(read_study(folder))
    listed = json.loads((folder / "cells.json").read_text())
    other = "emoji/val_pairs/image_to_text_R@1"
    listed["metrics"][0]["keys"][1] = other
    (folder / "cells.json").write_text(json.dumps(listed))
    for run in (folder / "runs").iterdir():
        results = json.loads((run / "evaluation.json").read_text())
        results[other] = results[listed["metrics"][0]["keys"][0]]
        (run / "evaluation.json").write_text(json.dumps(results))
        kept = {key.rpartition("/")[2]: one for key, one in load_items(run / FILE).items()}
        fewer = {name: number(one.parts[0].sums[:200]) for name, one in kept.items()}
        save_items(run / FILE, {synthetic.SPLIT: kept, "emoji/val_pairs": fewer})
    tables = {table.name: table.raw for table in compose(read_study(folder)).tables}
    assert all(row["score_low"] is not None and row["score_low_with_items"] is None for row in tables["runs"])
    assert all(row["score_low_with_items"] is not None for row in next(t.raw for t in whole.tables if t.name == "runs"))


def test_numbers_of_claims_that_were_measured_elsewhere_stand_on_the_pages_that_they_name():
    cited = {}
    for claim in load_claims()["claims"]:
        page = re.search(r"\(([\w/]+\.md)", said := claim.get("elsewhere", ""))
        if not page:
            continue
        text, numbers = (ROOT / page[1]).read_text(), re.findall(r"\d+[.,]\d+", said[: page.start()])
        cited[claim["id"]] = len(numbers)
        assert [number for number in numbers if not re.search(rf"(?<![\d.]){re.escape(number)}", text)] == [], claim[
            "id"
        ]
    assert {claim for claim, numbers in cited.items() if numbers} >= {"C11", "C12", "C13", "C14", "C15", "C16", "C17"}


@pytest.mark.usefixtures("undrawn")
def test_time_given_is_held_against_time_taken(tmp_path):
    folder = make_study(
        tmp_path / "s", arms=("clip", "amclr"), batches=(128,), seeds=(0,), held_equal="wall_clock", items=False
    )
    plan = yaml.safe_load((folder / "study.yaml").read_text())
    plan["budget"] = {"hours": synthetic.SAMPLES / 400 / 3600}  # what CLIP takes; AmCLR has half the samples/s
    (folder / "study.yaml").write_text(yaml.safe_dump(plan))
    text = compose(read_study(folder)).markdown
    assert "The logged steps took 100% to 200% of it. More than 10% off: amclr-B128-s0 (200%)." in text


@pytest.mark.usefixtures("undrawn")
def test_one_seed_decides_nothing(tmp_path):
    folder = make_study(tmp_path / "s", arms=("clip", "amclr"), batches=(128,), seeds=(0,))
    text = compose(read_study(folder)).markdown
    assert "One seed: there is no interval, and nothing can be decided." in text
    assert "**better**" not in text
    assert not re.search(r"\bnan\b", text)


@pytest.mark.usefixtures("undrawn")
def test_a_reference_that_has_hardly_learned_is_pointed_out(tmp_path, monkeypatch):
    monkeypatch.setitem(synthetic.ARMS, "clip", (0.008, 0.0, ("objective.name=clip",), "CLIP", 1.0))
    folder = make_study(tmp_path / "s", arms=("clip", "amclr"), batches=(128,), noise=0.0)
    text = compose(read_study(folder)).markdown
    assert "**Hardly trained**: CLIP, B = 128 (0.7 % after 64 steps)" in text
    assert "**The reference is among them**" in text
    head = text.partition("## In brief")[2].partition("## Question and design")[0]
    assert "- **Beware.** Hardly trained, the reference among them: CLIP (B = 128)." in head
    assert "The margin is 600% of what CLIP, B = 128 scores above guessing, and nothing is said to match it." in head


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("margin", "matches"), [(0.2, False), (0.14, True)])
def test_an_arm_that_learned_half_as_much_matches_at_no_margin(tmp_path, monkeypatch, margin, matches):
    """`matches` at a margin of 20 points, were a margin of two thirds of the reference's score to decide."""
    monkeypatch.setitem(synthetic.ARMS, "amclr", (0.18, *synthetic.ARMS["amclr"][1:]))
    folder = make_study(tmp_path / "s", arms=("clip", "amclr"), batches=(128,), noise=0.003, margin=margin, items=False)
    composed = compose(read_study(folder))
    [rows] = [one.raw for one in composed.tables if one.name.startswith("verdicts_reference")]
    assert [row["verdict"] for row in rows] == ["matches" if matches else "worse"]
    assert ("nothing is said to match it" in composed.markdown) is not matches


@pytest.mark.usefixtures("undrawn")
def test_a_wide_range_of_costs_is_drawn_on_a_log_axis(tmp_path):
    study = read_study(make_study(tmp_path / "s", arms=("clip",), batches=(16, 512), seeds=(0,), items=False))
    found = Outcome(study.metrics[0], groups_of(study))
    looks, unit = plots.Looks(["CLIP"]), unit_of(study.metrics[0], study.runs)
    figure = plots.score_by_cost(found, unit, looks, "optimizer_steps", "optimizer steps", "by_steps", "")
    assert [row["optimizer_steps"] for row in figure.raw] == [512, 16]
    assert plots.ticks_of(16, 512) == [10, 20, 50, 100, 200, 500, 1000]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("batches", "tables"), [((128,), 1), ((128, 256), 2)])
def test_at_one_batch_size_a_comparison_is_told_once(tmp_path, batches, tables):
    composed = compose(read_study(make_study(tmp_path / "s", arms=("clip", "dcl"), batches=batches)))
    assert sum(table.name.startswith("verdicts_") for table in composed.tables) == tables
    assert f"- global batch size{'s' if tables == 2 else ''}: 128" in composed.markdown


@pytest.mark.usefixtures("undrawn")
def test_pairs_that_a_plan_names_are_a_family_of_their_own(tmp_path):
    folder = make_study(tmp_path / "s", arms=("clip", "sogclr", "amclr"), batches=(128, 256))
    plan = yaml.safe_load((folder / "study.yaml").read_text())
    (folder / "study.yaml").write_text(yaml.safe_dump(plan | {"pairs": [["amclr", "sogclr"]]}))
    study = read_study(folder)
    composed = compose(study)
    [rows] = [one.raw for one in composed.tables if one.name.startswith("verdicts_pairs_")]
    assert [(row["arm"], row["against"]) for row in rows] == [
        (f"AmCLR, B = {batch}", f"SogCLR, B = {batch}") for batch in (128, 256)
    ]
    found = Outcome(study.metrics[0], groups_of(study))
    pairs = [
        tuple(
            next(g for g in found.groups if (g.arm, g.global_batch_size) == (arm, batch)) for arm in ("amclr", "sogclr")
        )
        for batch in (128, 256)
    ]
    for row, one in zip(rows, compare(found, pairs, study.margin), strict=True):
        assert row["difference"] == one.difference.seeds.value
        assert row["p_different_holm"] == one.decision.p_different
    head = composed.markdown.partition("## Question and design")[0]
    assert "Pairs that the plan names: AmCLR, B = 128, against SogCLR: better; AmCLR, B = 256, against SogCLR: " in head


@pytest.mark.usefixtures("undrawn")
def test_what_some_arms_get_beyond_what_is_held_equal_is_said(tmp_path):
    folder = make_study(tmp_path / "s", arms=("clip", "sogclr", "amclr"), batches=(128,), seeds=(0,), items=False)
    plan = yaml.safe_load((folder / "study.yaml").read_text())
    assert "another share" not in compose(read_study(folder)).markdown
    plan["arms"] = [
        {"name": "clip"},
        {"name": "sogclr", "budget_factor": 2.0},
        {"name": "amclr", "features_of": "clip-B128", "budget_factor": None},
    ]
    (folder / "study.yaml").write_text(yaml.safe_dump(plan))
    text = compose(read_study(folder)).markdown
    assert "- another share of it: SogCLR x 2\n" in text
    told = "- beside features of another cell, whose training and embedding are not counted: AmCLR (of clip-B128"
    assert f"{told})\n" in text
    plan["arms"][2]["features_of"] = "clip-B128-s0"
    (folder / "study.yaml").write_text(yaml.safe_dump(plan))
    text = compose(read_study(folder)).markdown
    assert f"{told}-s0: one model for all seeds, and intervals are for it)\n" in text


@pytest.mark.usefixtures("undrawn")
def test_a_swept_rate_stands_in_the_runs_as_it_was_trained_at(tmp_path):
    """The axis says it at the rule's reference batch size."""
    folder = make_study(tmp_path / "s", arms=("clip",), batches=(128,), seeds=(0, 1), axes={"optimizer.lr": [1e-3]})
    file = folder / "cells.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "cells": [{**cell, "lr": 4e-3} for cell in content["cells"]]}))
    (row,) = next(one.raw for one in compose(read_study(folder)).tables if one.name == "runs")
    assert row["learning_rates"] == "0.004"


@pytest.mark.parametrize(
    ("unfinished", "said"),
    [
        ([], "2 seeds each"),
        (["clip-B128-s1", "sogclr-B128-s1"], "1 of 2 seeds each"),
        (["clip-B128-s0", "clip-B128-s1", "sogclr-B128-s1"], "0 to 1 of 2 seeds each"),
    ],
)
def test_the_head_of_a_partial_report_counts_the_seeds_that_have_run(tmp_path, unfinished, said):
    study = read_study(
        make_study(
            tmp_path / "s", arms=("clip", "sogclr"), batches=(128,), seeds=(0, 1), unfinished=unfinished, items=False
        )
    )
    text = brief(study, "", [], [])
    assert f" 128, {said}, with equal" in text
    assert ("one seed has no interval" in text) == bool(unfinished)
