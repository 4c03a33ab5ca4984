"""Every backend in every precision is the definition, as nearly as its operands allow, on one rank and on two."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from amclr_scale.similarity import backends, contrast, current, describe, using
from amclr_scale.similarity.precision import form_of
from amclr_scale.similarity.settings import Settings
from tests.similarity import test_contrast_ranks as over_ranks
from tests.similarity import test_pairwise as sigmoid
from tests.similarity.definition import Inputs, draw, relative_error
from tests.similarity.test_contrast import OPTIONS, worst_error

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ROWS_OF_16_BITS = [torch.bfloat16, torch.float16]
ERRORS = {"fp32": 2e-6, "split": 3e-5, "bf16": 1e-2}  # worst of values and gradients


def batch(dtype: torch.dtype, **options) -> Inputs:
    inputs = draw(45, 40, 0, dtype=torch.float32, extra=7, **options)
    inputs.upstream.abs_()
    inputs.image, inputs.text = inputs.image.to(dtype), inputs.text.to(dtype)
    return inputs


@pytest.mark.parametrize("precision", list(ERRORS))
@pytest.mark.parametrize("options", OPTIONS)
def test_operands_are_as_exact_as_they_say(precision, options):
    with using(precision=precision, chunk=32):
        error = worst_error(batch(torch.float32), **options)
    assert error < ERRORS[precision]
    if precision == "bf16":
        assert error > 1e-4  # rounding happened


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("precision", list(ERRORS))
def test_sizes_that_tiles_divide(precision, far, monkeypatch):
    """Where nothing is masked, with offsets of 32 bits and of 64."""
    if current().backend == "triton":
        monkeypatch.setattr("amclr_scale.similarity.triton_backend.FAR", 1 if far else 2**31)
    inputs = draw(128, 32, 0, dtype=torch.float32)
    inputs.upstream.abs_()
    with using(precision=precision):
        assert worst_error(inputs, exclude_positive=far, centred=True) < ERRORS[precision]
    error = sigmoid.worst_error(128, 32, 0, {"precision": precision}, dtype="float32")
    assert error < ERRORS[precision]


@pytest.mark.parametrize("dtype", ROWS_OF_16_BITS)
@pytest.mark.parametrize("per_anchor", [False, True])
def test_16_bit_features_have_exact_similarities_and_gradients_to_4e_3(dtype, per_anchor):
    inputs = batch(dtype, per_anchor=per_anchor)
    inputs.extra_text, inputs.extra_image = inputs.extra_text.to(dtype), inputs.extra_image.to(dtype)
    mine = inputs.part(slice(None))
    exact = mine.double()
    found = []
    for x in (mine, exact):
        c = contrast(
            x.image, x.text, temperature=(x.image_temperature, x.text_temperature),
            extra_text_keys=x.extra_text, extra_image_keys=x.extra_image, centred=True,
        )  # fmt: skip
        sums = [c.image.log_sum, c.text.log_sum]
        found.append([*sums, *torch.autograd.grad(sum(s.mean() for s in sums), x.leaves)])
    errors = [relative_error(x, y) for x, y in zip(*found, strict=True)]
    assert max(errors[:2] + errors[4:]) < 2e-6
    assert max(errors[2:4]) < 4e-3


@pytest.mark.parametrize("precision", list(ERRORS))
def test_sigmoid_losses(precision):
    assert sigmoid.worst_error(45, 40, 0, {"precision": precision, "chunk": 32}, dtype="float32") < ERRORS[precision]


@pytest.mark.parametrize("precision", list(ERRORS))
@pytest.mark.parametrize("how", [{"gather": "ring"}, {"distribution": "reduce_scatter"}])
def test_two_ranks(ranks, precision, how):
    how = how | {"precision": precision}
    errors = ranks(2, over_ranks.worst_error, 20, 24, 0, how, centred=True, dtype="float32", extra=5)
    assert max(errors) < ERRORS[precision]
    assert max(ranks(2, sigmoid.worst_error, 20, 24, 0, how, dtype="float32")) < ERRORS[precision]


@pytest.mark.parametrize("temperature", [0.05, 0.004])
def test_one_exponential_is_taken_where_it_is_exact_enough(temperature):
    """A common temperature; at the smaller one, shifts lie further apart than one exponential can span."""
    inputs = draw(45, 40, 0, dtype=torch.float32, lowest_temperature=temperature, per_anchor=False)
    inputs.upstream.abs_()
    inputs.image_temperature = inputs.text_temperature
    inputs.image[:9] *= 0.2  # rows whose largest similarity is far from the others'
    inputs.image, inputs.text = inputs.image.bfloat16(), inputs.text.bfloat16()
    mine = inputs.part(slice(None))
    exact = mine.double()
    gradients = []
    for x in (mine, exact):
        c = contrast(x.image, x.text, temperature=x.image_temperature)
        value = (c.image.log_sum.mean() + c.text.log_sum.mean() - 2 * c.image.positive.mean() / temperature) / 2
        gradients.append(torch.autograd.grad(value, (x.image, x.text)))
    for x, y in zip(*gradients, strict=True):
        assert relative_error(x, y) < 4e-3


def test_which_backend_and_precision_is_in_force(monkeypatch):
    assert describe(Settings(), CPU).startswith("torch backend on cpu, float32 operands")
    assert describe(Settings(run_precision="bf16"), CPU).startswith("torch backend on cpu, float32 operands")
    assert "split" in describe(Settings(precision="split"), CPU)
    assert form_of(Settings(run_precision="bf16"), torch.float32, fast_narrow=True) == "split"
    assert form_of(Settings(run_precision="bf16"), torch.bfloat16, fast_narrow=True) == "bf16"
    assert form_of(Settings(run_precision="fp32"), torch.float32, fast_narrow=True) == "fp32"
    assert "float64" in describe(Settings(), CPU, torch.float64)
    backends._triton_missing.cache_clear()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend: expected one that works on cpu, got triton: Triton"):
        backends.chosen(Settings(backend="triton"), CPU)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    backends._triton_missing.cache_clear()
    assert "torch backend on cuda" in describe(Settings(), CUDA)
    assert "not triton: Triton is not installed" in describe(Settings(), CUDA)
    backends._triton_missing.cache_clear()


@pytest.mark.skipif(not backends.importlib.util.find_spec("triton"), reason="needs triton")
def test_measured_tiles_are_kept_on_disk_for_their_card_and_width(monkeypatch, tmp_path):
    """What `tools/tune_similarity.py --save` has found, as a later process on the same card reads it."""
    from amclr_scale.similarity import triton_tiles as tiles

    def forget() -> None:
        tiles._tuned.cache_clear()
        tiles._narrow.cache_clear()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    forget()
    try:
        table, found = tiles.tile_of("weights", "bf16", 512, CUDA), tiles.Tile(64, 64, 64, 4, 2)
        assert tiles.save({tiles.key("weights", 512, CUDA): found}).is_relative_to(tmp_path)
        tiles.save({tiles.key("accumulate", 768, CUDA): found})  # beside what was kept before
        forget()
        assert tiles.tile_of("weights", "bf16", 512, CUDA) == tiles.tile_of("weights", "fp16", 512, CUDA) == found
        assert tiles.tile_of("accumulate", "bf16", 768, CUDA) == found
        assert tiles.tile_of("weights", "bf16", 768, CUDA) == table
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another")
        forget()
        assert tiles.tile_of("weights", "bf16", 512, CUDA) == table
    finally:
        forget()


@pytest.mark.slow
@pytest.mark.skipif(not backends.importlib.util.find_spec("triton"), reason="needs triton")
def test_the_kernels_compile_for_a_card_that_is_not_here():
    tool = Path(__file__).parents[2] / "tools" / "compile_kernels.py"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, tool, "--quick"], env=environment, capture_output=True, text=True, check=False, timeout=200
    )
    assert "accumulate_kernel" in done.stdout, done.stderr
    assert done.returncode == 0, done.stdout
