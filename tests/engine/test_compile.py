"""Compiled towers under the gradient cache train as plain ones do, at every ZeRO stage.

Compiled with everything but code generation (backend aot_eager): tracing, functional random numbers and the split of
forward from backward are what could break the cache; generating C++ takes minutes.
"""

from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from amclr_scale import objectives
from amclr_scale.config.schema import Execution, ImageTower, Model, TextTower
from amclr_scale.encoders.build import build_model
from amclr_scale.engine.setup import build_engine, prepare_towers
from amclr_scale.engine.step import TrainStep
from amclr_scale.engine.weights import full_fp32
from amclr_scale.metrics.phases import Phases
from amclr_scale.similarity.collectives import rank, world_size
from amclr_scale.types import Batch
from tests.engine.towers import config

CPU = torch.device("cpu")


def trained(stage: int, compiled: bool, kept: int) -> tuple[list[Tensor], bool]:
    settings = config(16, execution__zero_stage=stage, optimizer__name="sgd")
    torch.manual_seed(0)
    sections = Model(
        image=ImageTower(width=8), text=TextTower(width=16, layers=1, heads=2, dropout=0.0), embedding_width=8
    )
    ones = (1.0, 1.0, 1.0)
    model = build_model(
        sections, vocab_size=30, pad_id=0, context_length=5, image_size=16, image_mean=ones, image_std=ones
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with mock.patch.object(nn.Module, "compile", without_code_generation(nn.Module.compile)):
        prepare_towers(model, Execution(compile=compiled))
    engine, _ = build_engine(settings, model, no_decay=model.no_weight_decay(), device=CPU, world_size=world_size())
    step = TrainStep(
        engine, objectives.create("clip"), micro_batch_sizes=(4, 4), device=CPU, phases=Phases(CPU), kept=kept
    )
    for n in range(3):
        g = torch.Generator().manual_seed(n * 10 + rank())
        images = torch.randint(0, 256, (8, 3, 16, 16), generator=g, dtype=torch.uint8)
        step(Batch(torch.arange(8), (images,), (torch.randint(1, 30, (8, 5), generator=g),)), 0.01)
    weights = [full_fp32(p) for p in model.parameters()]
    engine.destroy()
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
