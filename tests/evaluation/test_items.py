"""What is measured per item survives a file, and says the same afterwards."""

import pytest
import torch

from amclr_scale.errors import UserError
from amclr_scale.evaluation.items import load_items, save_items
from amclr_scale.evaluation.numbers import compare, mean_of, number


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
