"""What is measured per item survives a file, and says the same afterwards."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from amclr_scale.errors import UserError
from amclr_scale.evaluation.items import load_items, save_items
from amclr_scale.evaluation.numbers import compare, mean_of, number
from amclr_scale.evaluation.zero_shot import accuracies


def test_numbers_come_back_as_they_were(tmp_path):
    torch.manual_seed(0)
    clusters = torch.arange(40) // 2
    first = number(torch.rand(40).round(), clusters=clusters, chance=0.1)
    both = mean_of(first, number(torch.rand(40), clusters=clusters, weights=torch.rand(40)))
    save_items(tmp_path / "items.safetensors", {"split/a": {"R@1": first, "mean": both}, "b": {"R@1": first}})
    found = load_items(tmp_path / "items.safetensors")
    assert list(found) == ["split/a/R@1", "split/a/mean", "b/R@1"]
    assert found["split/a/mean"].value == both.value
    assert found["split/a/mean"].chance is None
    assert found["b/R@1"].chance == 0.1
    assert compare(found["b/R@1"], found["split/a/R@1"]).difference == 0
    assert found["split/a/mean"].standard_error == both.standard_error


def test_another_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="expected a file of evaluated items"):
        load_items(tmp_path / "missing")
    (tmp_path / "other").write_text("{}")
    with pytest.raises(UserError, match="expected a file of evaluated items"):
        load_items(tmp_path / "other")


def of_format_1(path, numbers):
    """A file as it was before there were formats: a mean per class has hits, weighed by 1 / images of the class."""
    save_items(path, {"val": numbers})
    about = {f"val/{name}": [len(one.parts), one.chance] for name, one in numbers.items()}
    save_file(load_file(path), path, metadata={"numbers": json.dumps(about)})


def test_a_number_in_an_older_form_is_refused_and_the_rest_of_its_file_is_not(tmp_path):
    ranks, labels = torch.tensor([1, 1, 2, 1, 3, 1]), torch.tensor([0, 0, 0, 0, 1, 1])
    today = accuracies(ranks, labels, 2)
    before = number((ranks <= 1).double(), weights=1 / torch.bincount(labels)[labels].double(), chance=0.5)
    mean = "val/zero_shot_mean_per_class"
    assert before.value == pytest.approx(today["zero_shot_mean_per_class"].value)  # nothing else tells the two apart
    assert torch.equal(before.parts[0].weights, today["zero_shot_mean_per_class"].parts[0].weights)
    assert not torch.allclose(before.parts[0].sums, today["zero_shot_mean_per_class"].parts[0].sums)
    old, new = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    save_items(new, {"val": today})
    assert torch.equal(load_items(new)[mean].parts[0].sums, today["zero_shot_mean_per_class"].parts[0].sums)
    of_format_1(old, today | {"zero_shot_mean_per_class": before})
    with pytest.raises(
        UserError, match=rf"^{old}: expected items of format 2, got 1, in which {mean} has.*evaluate the"
    ):
        load_items(old)
    with pytest.raises(UserError, match=r"remove its evaluation\.json and start it"):
        load_items(old, ["val/zero_shot_top1", mean])
    assert list(load_items(old, ["val/zero_shot_top1", "elsewhere"])) == ["val/zero_shot_top1"]
    of_format_1(old, {"zero_shot_top1": today["zero_shot_top1"]})
    assert list(load_items(old)) == ["val/zero_shot_top1"]


def test_a_file_of_a_newer_format_is_refused(tmp_path):
    save_file({}, tmp_path / "new", metadata={"format": "3", "numbers": "{}"})
    with pytest.raises(
        UserError, match="expected items of format 2 or older, got 3; read it with the version that wrote"
    ):
        load_items(tmp_path / "new")
