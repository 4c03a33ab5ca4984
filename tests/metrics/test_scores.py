"""What numbers are described as: everything that an evaluation gives has its words, unit and direction, once."""

from itertools import permutations

import pytest
import torch

from amclr_scale.evaluation.chance import guessed
from amclr_scale.evaluation.report import comparison_lines, markdown
from amclr_scale.evaluation.table import table
from amclr_scale.metrics.curve import _is_drawn
from amclr_scale.metrics.scores import (
    GEOMETRY,
    RETRIEVAL,
    Group,
    Score,
    describe,
    is_share,
    lower_is_better,
    score_of,
    words_of,
)
from amclr_scale.study.analysis.results import Metric
from amclr_scale.study.planning.amounts import unit_of_key


@pytest.mark.parametrize(
    ("name", "words", "unit"),
    [
        ("image_to_text_R@1", "R@1 image to text", "points"),
        ("text_to_image_filtered_R@mean", "mean text to image, filtered", "points"),
        ("R@mean", "R@mean", "points"),
        ("text_to_image_median_rank", "median rank text to image", "ranks"),
        ("zero_shot_top1", "zero-shot top 1", "points"),
        ("probe_tower_top5", "linear, before head top 5", "points"),
        ("knn_mean_per_class", "kNN mean per class", "points"),
        ("composition_word_order", "right composition", "points"),
        ("text_uniformity", "text uniformity", ""),
        ("modality_gap", "modality gap", ""),
        ("images", "images", None),
        ("probe_l2", "probe l2", None),
    ],
)
def test_numbers_by_their_names(name, words, unit):
    key = f"emoji/val_style/{name}"
    assert words_of(key) == words
    score = score_of(key)
    assert (score.unit if score else None) == unit
    assert unit_of_key(key) == (unit or "")
    assert is_share(key, {}) == (unit == "points")
    assert is_share(key, {f"{key}/stderr": 0.1}) == (unit in ("points", None))


def test_directions():
    lower = ["image_to_text_median_rank", "alignment", "image_uniformity", "cross_uniformity"]
    assert all(map(lower_is_better, lower))
    assert not any(map(lower_is_better, ["R@mean", "zero_shot_top1", "modality_gap", "images"]))
    assert describe("alignment")[0] is GEOMETRY


@pytest.fixture
def mean_rank(monkeypatch):
    monkeypatch.setitem(RETRIEVAL.scores, "mean_rank", Score("mean rank", "ranks", True, of=lambda ranks: ranks))
    monkeypatch.setitem(RETRIEVAL.scores, "MRR", Score("MRR", of=lambda ranks: 1 / ranks.double(), drawn=True))


def test_a_new_score_is_known_everywhere(mean_rank):
    results = {"a/image_to_text_mean_rank": 12.5, "a/image_to_text_mean_rank/stderr": 0.5,
               "a/image_to_text_mean_rank/chance": 20.0, "a/image_to_text_mean_rank/low": 11.5,
               "a/image_to_text_mean_rank/high": 13.5, "a/image_to_text_MRR": 0.25,
               "a/image_to_text_MRR/stderr": 0.01, "a/image_to_text_R@1": 0.125}  # fmt: skip
    shown = table(results)
    assert "mean rank" in shown
    assert "12.5 [11.5, 13.5]" in shown
    assert "25.0 +- 1.0" in shown
    page = markdown({"model": results}, {})
    assert "| a/image_to_text_mean_rank | 12.5 [11.5, 13.5] | 20 |" in page
    change = type("Change", (), {"difference": -1.5, "low": -2.0, "high": -1.0})
    assert comparison_lines({"a/image_to_text_mean_rank": change, "a/image_to_text_MRR": change}) == [
        "a/image_to_text_mean_rank: -1.5 [-2, -1] *",
        "a/image_to_text_MRR: -150.00 [-200.00, -100.00] *",
    ]
    assert Metric("mean rank", ("a/image_to_text_mean_rank",)).lower_is_better
    assert not Metric("MRR", ("a/image_to_text_MRR",)).lower_is_better
    assert unit_of_key("a/text_to_image_mean_rank") == "ranks"
    assert [key for key in results if _is_drawn(key)] == ["a/image_to_text_MRR", "a/image_to_text_R@1"]


def definition(score: Score, right: int, wrong: int) -> float:
    """The mean over all orders of the candidates."""
    orders = list(permutations([True] * right + [False] * wrong))
    best = torch.tensor([1 + order.index(True) for order in orders])
    return float(score.values(best).double().mean())


SCORES = [
    Score("", within=2), Score("", of=lambda ranks: (ranks <= 2).double()),
    Score("", of=lambda ranks: 1 / ranks.double()), Score("", "ranks", of=lambda ranks: ranks),
]  # fmt: skip


@pytest.mark.parametrize("score", SCORES)
def test_what_guessing_gives(score):
    right, wrong = torch.tensor([1, 2, 3, 2, 2]), torch.tensor([4, 3, 2, 0, 3])
    want = sum(definition(score, r, w) for r, w in zip(right.tolist(), wrong.tolist(), strict=True)) / 5
    assert guessed(score, right, wrong) == pytest.approx(want, abs=1e-12)
    alone = sum(definition(score, 1, w) for w in wrong.tolist()) / 5
    assert guessed(score, None, wrong) == pytest.approx(alone, abs=1e-12)


def test_longer_rows_come_first():
    group = Group("x", {"a": "A", "a_b": "A with B"}, {"c": Score("C"), "b_c": Score("BC")})
    assert group.find("a_b_c") == ("a_b", group.scores["c"])
    assert group.find("c") is None
