"""Standard errors by their formulas, intervals by what they promise."""

import pytest
import torch

from amclr_scale.evaluation.numbers import compare, intervals, mean_of, mean_of_groups, number


def hits(n: int, p: float, seed: int) -> torch.Tensor:
    return (torch.rand(n, generator=torch.Generator().manual_seed(seed)) < p).double()


def test_single_items_have_the_textbook_error():
    values = hits(500, 0.3, 0)
    one = number(values)
    p = float(values.mean())
    assert one.value == pytest.approx(p)
    assert one.standard_error == pytest.approx((p * (1 - p) / 500) ** 0.5)


def test_clusters_that_agree_count_once():
    values = hits(200, 0.4, 1)
    five = number(values.repeat_interleave(5), clusters=torch.arange(200).repeat_interleave(5))
    once = number(values)
    assert five.value == pytest.approx(once.value)
    assert five.standard_error == pytest.approx(once.standard_error)
    assert intervals({"x": five})["x"] == pytest.approx(intervals({"x": once})["x"])


def test_weights_are_a_weighted_mean():
    values, weights = torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([0.5, 0.5, 1.0, 2.0])
    assert number(values, weights=weights).value == pytest.approx(3.5 / 4)


def test_a_mean_over_groups_has_the_error_of_resampled_clusters():
    """Groups of different size and difficulty, one of which does not count; pictures with one to three items."""
    g = torch.Generator().manual_seed(0)
    clusters = torch.arange(400).repeat_interleave(1 + torch.randint(3, (400,), generator=g))
    groups = torch.multinomial(torch.tensor([0.1, 0.2, 0.3, 0.4]), len(clusters), replacement=True, generator=g)
    values = (torch.rand(len(clusters), generator=g) < torch.tensor([0.05, 0.95, 0.5, 0.9])[groups]).double()
    found = mean_of_groups(values, groups, kept=groups != 2, clusters=clusters)

    def mean(counts):
        weights = counts[clusters]
        own = [(weights * values)[groups == k].sum() / weights[groups == k].sum() for k in (0, 1, 3)]
        return torch.stack(own).mean()

    draws = torch.randint(400, (2000, 400), generator=g)
    drawn = torch.stack([mean(torch.bincount(draw, minlength=400).double()) for draw in draws])
    assert found.value == pytest.approx(float(mean(torch.ones(400))), abs=1e-12)
    assert found.standard_error == pytest.approx(float(drawn.std()), rel=0.07)
    ends = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    assert intervals({"x": found}, resamples=2000)["x"] == pytest.approx(ends, abs=0.3 * found.standard_error)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("items", [1, 2])
def test_a_mean_over_small_groups_is_as_uncertain_as_other_items_make_it(size, items):
    """Groups of few clusters, of equal difficulty: the error is that over other draws of the items, not less."""
    g = torch.Generator().manual_seed(0)
    clusters = torch.arange(200 * size).repeat_interleave(items)  # items of a cluster are alike
    groups = clusters // size
    drawn = [(torch.rand(200 * size, generator=g) < 0.4).double()[clusters] for _ in range(400)]
    found = [mean_of_groups(values, groups, clusters=clusters) for values in drawn]
    spread = torch.tensor([one.value for one in found]).std()
    assert [one.value for one in found] == pytest.approx([float(values.mean()) for values in drawn], abs=1e-12)
    error = torch.tensor([one.standard_error for one in found]).mean()
    assert float(error) == pytest.approx(float(spread), rel=0.1)
    low, high = intervals({"x": found[0]})["x"]
    assert high - low == pytest.approx(4 * float(spread), rel=0.2)


def test_a_share_by_group_has_an_interval_between_0_and_1():
    """Few hits in small groups: distances from the groups' means alone would allow a share below 0."""
    groups = torch.arange(300) // 2
    few = torch.zeros(300)
    few[0] = 1
    found = {"few": mean_of_groups(few, groups), "most": mean_of_groups(1 - few, groups)}
    found["both"] = mean_of(found["few"], found["few"])
    ends = intervals(found)
    assert ends["few"][0] == ends["both"][0] == 0 < ends["few"][1] < 0.02
    assert 0.98 < ends["most"][0] < 1 == ends["most"][1]


def test_groups_that_do_not_count_move_neither_the_mean_nor_its_error():
    values, groups = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0]), torch.tensor([0, 1, 2, 3, 3])
    kept = mean_of_groups(values, groups, kept=groups != 2)
    without = mean_of_groups(values[groups != 2], groups[groups != 2])
    assert (
        (kept.value, kept.standard_error)
        == (without.value, without.standard_error)
        == (0.5, pytest.approx(0.75**0.5 / 3))
    )


def test_a_mean_of_numbers_knows_that_they_move_together():
    a, b = hits(300, 0.5, 2), hits(300, 0.5, 3)
    both = mean_of(number(a, chance=0.1), number(b, chance=0.3))
    assert both.value == pytest.approx(float((a + b).mean()) / 2)
    assert both.chance == pytest.approx(0.2)
    assert both.standard_error == pytest.approx(number((a + b) / 2).standard_error)
    same = mean_of(number(a), number(a))
    assert same.standard_error == pytest.approx(number(a).standard_error)


def test_intervals_are_seeded_and_as_wide_as_the_error_says():
    one = number(hits(1000, 0.3, 4))
    low, high = intervals({"x": one})["x"]
    assert intervals({"x": one})["x"] == (low, high)
    assert intervals({"x": one}, seed=1)["x"] != (low, high)
    assert low < one.value < high
    assert high - low == pytest.approx(2 * 1.96 * one.standard_error, rel=0.1)


def test_intervals_cover_the_truth_as_often_as_they_say():
    """120 samples from a world with p = 0.3: about 95 % of the intervals hold it (114 +- 2.4)."""
    covered = 0
    for seed in range(120):
        low, high = intervals({"x": number(hits(400, 0.3, seed))}, resamples=400)["x"]
        covered += low <= 0.3 <= high
    assert 106 <= covered <= 120


def test_chunks_of_resamples_do_not_matter(monkeypatch):
    from amclr_scale.evaluation import numbers

    one = number(hits(100, 0.5, 5))
    want = intervals({"x": one}, resamples=50)
    monkeypatch.setattr(numbers, "CHUNK", 700)
    assert intervals({"x": one}, resamples=50) == want


def test_a_paired_comparison_sees_what_two_intervals_do_not():
    first = hits(1000, 0.5, 6)
    second = first.clone()
    second[torch.where(first == 0)[0][:15]] = 1  # right on everything the first is right on, and on 15 more
    a, b = number(first), number(second)
    assert intervals({"a": a})["a"][1] > intervals({"b": b})["b"][0]
    better = compare(a, b)
    assert better.difference == pytest.approx(0.015)
    assert 0 < better.low < 0.015 < better.high
    assert better.share_of_resamples_above_zero > 0.99
    with pytest.raises(ValueError, match=r"^second: a paired comparison needs the same items"):
        compare(a, number(second[:-1]))
