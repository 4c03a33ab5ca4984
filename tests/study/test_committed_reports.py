"""The reports under docs/studies say nothing that today's rules would not let them say."""

import json
from pathlib import Path
from typing import Any

import pytest

from amclr_scale.study.planning.amounts import MOST_OF_EFFECT
from amclr_scale.study.statistics.selection import narrowness

STUDIES = Path(__file__).parents[2] / "docs" / "studies"
REPORTS = sorted(STUDIES.glob("*/report.json"))
CHANCE = 0.00058  # of R@1 on emoji/val_style: 1 of 1,724


@pytest.mark.parametrize("file", REPORTS, ids=lambda file: file.parent.name)
def test_verdicts_of_committed_reports(file: Path) -> None:
    """`mini_scale_clip` said better three times, after rates chosen on the scored seeds; `mini_scale_efficiency` said
    matches of methods that had learned nothing.
    """
    tables: dict[str, list[dict[str, Any]]] = json.loads(file.read_text())
    text = file.with_name("report.md").read_text()
    swept = next((row for row in tables.get("learning_rates", ()) if "interval_needs_factor" in row), None)
    scores = {(row["title"], row["global_batch_size"]): row["score"] for row in tables["runs"]}
    decided = [row for name, rows in tables.items() if name.startswith("verdicts_") for row in rows]
    assert "tuning_seeds" in str(tables.get("learning_rates")) or "learning_rates" not in tables or swept
    if swept:
        figure = narrowness(len(swept["rates"].split()), swept["seeds"])
        assert f"would have to be {figure.factor:.1f} times as wide" in text
        assert {row["verdict_with_items"] for row in decided} == {None}
    for row in decided:
        title, _, batch = row["against"].rpartition(", B = ")
        effect = scores[title, int(batch.replace(",", ""))] - CHANCE
        matched = "matches" in (row["verdict"], row["verdict_with_items"])
        assert not matched or (not swept and row["margin"] <= MOST_OF_EFFECT * effect), row["arm"]
        assert f"| {row['verdict']} |" in text


@pytest.mark.parametrize("file", REPORTS, ids=lambda file: file.parent.name)
def test_equivalent_batch_sizes_of_committed_reports_tell_what_was_not_measured(file: Path) -> None:
    rows = json.loads(file.read_text()).get("equivalent_batch", ())
    text = file.with_name("report.md").read_text()
    for row in rows:
        assert row["neighbours_apart"] >= 1
        if row["neighbours_apart"] > 2:
            assert f"between sizes {row['neighbours_apart']:.3g} times apart" in text
    assert not rows or "what was not measured" in text


@pytest.mark.parametrize(
    ("study", "heading", "outcome"),
    [
        ("mini_rivals", "### Every estimator", "scores_mean_R_1"),
        ("icons_frozen_probe_cpu", "### Batches against 32,768", "scores_mean_R_1_held_out_concepts"),
    ],
)
def test_the_page_on_estimators_has_the_numbers_of_its_study(study, heading, outcome):
    tables = json.loads((STUDIES / study / "report.json").read_text())
    lasts = {(row["title"], row["global_batch_size"]): row for row in tables["probe_last"]}
    scores = {(row["title"], row["global_batch_size"]): row["score"] for row in tables[outcome]}
    ages = {
        (row["title"], row["global_batch_size"], row["age"]): row["estimator_error"]
        for row in tables["probe_error_by_age"]
    }
    page = (STUDIES.parent / "estimators.md").read_text().partition(heading)[2]
    columns = (
        "estimator_error", "expected_gradient_cosine", "gradient_bias", "gradient_noise",
        "layer_expected_gradient_cosine",
    )  # fmt: skip
    seen = set()
    for line in page.partition("\n- **")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("| ") or not cells[1].isdigit():
            continue
        title = max((one for one, _ in lasts if cells[0].startswith(one)), key=len)
        key = title, int(cells[1])
        error, *others = ("-" if (value := lasts[key][name]) is None else f"{value:.2f}" for name in columns)
        age = f"{ages[*key, 1]:.2f} to {ages[*key, 10]:.2f}" if (*key, 1) in ages else "-"
        assert cells[2:] == [error, age, *others, f"{100 * scores[key]:.1f}"], key
        seen.add(key)
    assert seen == {key for key in lasts if key[0] != "CLIP, the model that others read"}
