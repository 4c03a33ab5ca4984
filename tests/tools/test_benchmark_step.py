"""The step's benchmark runs at toy size on a CPU, and what it says of a trace is right."""

import json

import pytest
import torch

from tools import benchmark_step, step_profile

VARIANTS = ["plain", "cached", "recomputed", "unaligned", "open_clip", "accumulated", "checkpointed"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("benchmark_step")


def run(ranks, folder, *words):
    words = ["--towers", "toy", "--batch", "8", "--micro-batch", "4", "--device", "cpu", "--out", str(folder), *words]
    (answer,) = ranks(1, benchmark_step.main, words)
    return answer, json.loads((folder / "benchmark_step.json").read_text())


def test_every_variant_has_its_figures(ranks, folder):
    words = ("--rounds", "1", "--steps", "2", "--variants", *VARIANTS, "--profile", "cached")
    answer, report = run(ranks, folder, *words)
    assert answer == 0
    assert list(report["variants"]) == VARIANTS
    for row in report["variants"].values():
        assert row["samples_per_s"] == pytest.approx(8e3 / row["ms"])
        assert len(row["times_ms"]) == 2
    assert report["versions"]["torch"] == torch.__version__
    trace = (folder / "profile_cached.txt").read_text()
    assert "phases: pass_1" in trace
    assert "aten::addmm" in trace or "aten::mm" in trace  # linear layers, as they are after stage 3 in this process
    assert (folder / "benchmark_step.png").stat().st_size > 1000


def test_a_variant_that_fails_takes_nothing_with_it(ranks, folder):
    """Five pairs are no batch for our recipes; open_clip's loop does not mind."""
    words = ("--batch", "5", "--micro-batch", "2", "--rounds", "1", "--steps", "1")
    answer, report = run(ranks, folder, *words, "--variants", "cached", "accumulated")
    assert answer == 1
    assert "UserError: train.global_batch_size" in report["variants"]["cached"]["error"]
    assert report["variants"]["accumulated"]["ms"] > 0


def test_device_time_is_counted_once_where_kernels_overlap():
    Stretch = step_profile.Stretch
    trace = [Stretch("a", 0, 10), Stretch("b", 5, 12), Stretch("c", 20, 21), Stretch("inside a", 1, 2)]
    assert step_profile.union(trace) == 13
    assert step_profile.gaps(trace) == [(8, "b", "c")]
