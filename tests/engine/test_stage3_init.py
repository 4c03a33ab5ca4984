"""Stage 3 begins from the weights of every other stage, with one whole copy of the model in the whole job."""

import torch
from torch import Tensor

from amclr_scale import objectives
from amclr_scale.config.schema import ImageTower, Model, TextTower
from amclr_scale.distributed.collectives import rank, world_size
from amclr_scale.encoders.build import build_model
from amclr_scale.engine.deepspeed_setup import build_engine
from amclr_scale.engine.step import TrainStep
from amclr_scale.engine.zero.master_weights import full_fp32
from amclr_scale.engine.zero.stage3_init import shape_only
from amclr_scale.metrics.phases import Phases
from amclr_scale.types import Batch
from tests.engine.towers import config

CPU = torch.device("cpu")


def trained(stage: int, steps: int, norm: str = "group") -> tuple[int, dict[str, Tensor], dict[str, Tensor]]:
    """How many parameters had memory before the engine was built; the weights and buffers after some steps."""
    torch.manual_seed(3 if rank() == 0 else 4)  # what other ranks would draw must not matter
    ones = (1.0, 1.0, 1.0)
    sections = Model(
        image=ImageTower(name="torchvision/resnet18", norm=norm), text=TextTower(width=16), embedding_width=8
    )
    with shape_only(stage, rank()):
        model = build_model(
            sections, vocab_size=30, pad_id=0, context_length=5, image_size=16, image_mean=ones, image_std=ones
        )
    if rank() == 0 and norm == "batch":  # as a file of weights would bring them
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.add_(0.01)
    real = sum(p.numel() for p in model.parameters() if not p.is_meta)
    settings = config(8, execution__zero_stage=stage, optimizer__name="sgd", optimizer__lr=0.01)
    no_decay = model.no_weight_decay()
    engine, _ = build_engine(settings, model, no_decay=no_decay, device=CPU, world_size=world_size())
    step = TrainStep(engine, objectives.create("clip"), micro_batch_sizes=(2, 2), device=CPU, phases=Phases(CPU))
    for n in range(steps):
        g = torch.Generator().manual_seed(n * 10 + rank())
        images = torch.randint(0, 256, (4, 3, 16, 16), generator=g, dtype=torch.uint8)
        step(Batch(torch.arange(4), (images,), (torch.randint(1, 30, (4, 5), generator=g),)), 0.01)
    weights = {name: full_fp32(p) for name, p in model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    engine.destroy()
    return real, weights, buffers


def test_only_rank_0_ever_holds_a_whole_model(ranks):
    (first, *_), (second, *_) = ranks(2, trained, 3, 0)
    assert first > 11_000_000
    assert second == 0


def test_weights_and_buffers_are_rank_0s(ranks):
    (_, weights, buffers), (_, got, kept) = ranks(2, trained, 3, 0, "batch")
    assert len(buffers) > 60
    assert all(torch.equal(got[name], weights[name]) for name in weights)
    assert all(torch.equal(kept[name], buffers[name]) for name in buffers)


def test_training_is_that_of_stage_2(ranks):
    (_, want, _), (_, begun, _), (_, later, _) = (ranks(2, trained, *how)[1] for how in ((2, 2), (3, 0), (3, 2)))
    assert sum(not torch.equal(want[name], begun[name]) for name in want) > 50
    for name, value in want.items():
        assert (later[name] - value).norm() <= 1e-5 * value.norm() + 1e-7, name
