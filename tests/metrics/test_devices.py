"""Profiles are found by any spelling, hold their data sheets' figures, and CPUs are measured."""

import pytest
import torch

from amclr_scale.errors import UserError
from amclr_scale.metrics import devices
from amclr_scale.metrics.devices import device_peak, find_profile, measure_cpu, profile_of, profiles


@pytest.mark.parametrize(
    ("words", "name"), [("h100", "H100"), ("A100-40GB", "A100 40GB"), ("a100", "A100 80GB"), ("rtx_4090", "RTX 4090")]
)
def test_found_by_any_spelling(words, name):
    assert find_profile(words).name == name


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"device: expected cpu or one of H100.*did you mean 'RTX 4090"):
        find_profile("rtx 4091")


def test_figures_are_in_units_and_order():
    h100 = find_profile("h100")
    assert h100.memory_bytes == 80 * 2**30
    assert h100.peak("bf16") == pytest.approx(989.4e12)
    assert h100.peak("fp32") < h100.peak("fp32", tf32=True) < h100.peak("bf16")
    for profile in profiles().values():
        assert profile.source
        assert profile.node_link <= profile.link <= profile.memory_bandwidth


@pytest.mark.parametrize(
    ("device_name", "profile"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce GT 710", None),
    ],
)
def test_a_gpu_is_known_by_its_name(monkeypatch, device_name, profile):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: device_name)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: type("P", (), {"total_memory": 5 * 2**30})()
    )
    found = profile_of(torch.device("cuda"))
    assert (found and found.name) == profile
    assert found is None or found.memory_bytes == 5 * 2**30  # what this one has, not what the data sheet says


def test_float32_counts_as_it_is_computed(monkeypatch):
    monkeypatch.setattr(devices, "profile_of", lambda device: find_profile("a100"))
    before = torch.get_float32_matmul_precision()
    try:
        for precision, peak in (("highest", 19.5e12), ("high", 156e12)):
            torch.set_float32_matmul_precision(precision)
            assert device_peak(torch.device("cuda"), "fp32") == pytest.approx(peak)
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_cpu_is_measured():
    assert device_peak(torch.device("cpu"), "fp32") is None
    here = measure_cpu(threads=1, ranks=2)
    assert here.measured
    assert here.peak("fp32") > 1e8
    assert here.memory_bandwidth > here.link > 1e6
    assert torch.get_num_threads() == 1
