"""The reports under docs/studies say nothing that today's rules would not let them say."""

import json
from pathlib import Path
from typing import Any

import pytest

from amclr_scale.study.planning.amounts import MOST_OF_EFFECT
from amclr_scale.study.statistics.selection import narrowness

REPORTS = sorted((Path(__file__).parents[2] / "docs" / "studies").glob("*/report.json"))
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
