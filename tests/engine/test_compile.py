"""Compiled towers under the gradient cache train as plain ones do, at every ZeRO stage.

Compiled with everything but code generation (backend aot_eager): tracing, functional random numbers and the split of
forward from backward are what could break the cache; generating C++ takes minutes.
"""

from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from amclr_scale.config.schema import Execution
from amclr_scale.encoders.dual_encoder import DualEncoder
from amclr_scale.engine.deepspeed_setup import prepare_towers
from tests.engine.towers import real_run


def trained(stage: int, compiled: bool, kept: int) -> tuple[list[Tensor], bool]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def prepare(model: DualEncoder) -> None:
        with mock.patch.object(nn.Module, "compile", without_code_generation(nn.Module.compile)):
            prepare_towers(model, Execution(compile=compiled))

    weights = real_run(stage, prepare, layers=1, dropout=0.2, micro=4, kept=kept)
    return weights, torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def without_code_generation(method):
    return lambda self, *args, **kwargs: method(self, *args, backend="aot_eager", **kwargs)


@pytest.mark.parametrize(("stage", "kept"), [(0, 0), (0, 1), (2, 0)])
def test_compiled_towers_train_the_same(ranks, stage, kept):
    plain, compiled = (ranks(2, trained, stage, choice, kept) for choice in (False, True))
    for (want, was), (got, is_compiled) in zip(plain, compiled, strict=True):
        assert is_compiled
        assert not was
        for x, y in zip(want, got, strict=True):
            torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-6)
