"""Parts that an objective trains beside the towers: two ranks at any ZeRO stage are one plain big batch."""

import dataclasses
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from amclr_scale import objectives
from amclr_scale.config.schema import ImageTower, Model, TextTower
from amclr_scale.distributed.collectives import rank, world_size
from amclr_scale.encoders.build import build_model
from amclr_scale.encoders.dual_encoder import DualEncoder
from amclr_scale.engine.deepspeed_setup import adapt_to_objective, build_engine
from amclr_scale.engine.gradient_cache import cached_backward
from amclr_scale.engine.optimizers import parameter_groups, set_learning_rate
from amclr_scale.engine.step import TrainStep
from amclr_scale.engine.zero.master_weights import full_fp32
from amclr_scale.metrics.phases import Phases
from amclr_scale.objectives.base import Objective
from amclr_scale.types import Batch, Embeddings, Loss, flatten
from tests.engine.towers import CPU, config

SIZE, STEPS, LR = 16, 3, 0.05
TOY = Path(__file__).parents[1] / "objectives" / "toy.py"
ONES = (1.0, 1.0, 1.0)
SETTINGS = {"optimizer__name": "sgd", "optimizer__lr_factors": {"heads": 0.5}, "optimizer__max_grad_norm": 0.0}


def model_and_objective() -> tuple[DualEncoder, Objective]:
    torch.manual_seed(0)
    sections = Model(image=ImageTower(width=8), text=TextTower(width=16, layers=1, heads=2), embedding_width=8)
    model = build_model(
        sections, vocab_size=30, pad_id=0, context_length=5, image_size=16, image_mean=ONES, image_std=ONES
    )
    objective = objectives.create("toy", module=str(TOY))
    adapt_to_objective(model, objective, 8)
    return model, objective


def batch(step: int, mine: slice = slice(None)) -> Batch:
    g = torch.Generator().manual_seed(step)
    images = [torch.randint(0, 256, (SIZE, 3, 16, 16), generator=g, dtype=torch.uint8)[mine] for _ in range(3)]
    return Batch(torch.arange(SIZE)[mine], tuple(images), (torch.randint(1, 30, (SIZE, 5), generator=g)[mine],))


@cache
def plain() -> dict[str, Tensor]:
    settings = config(SIZE, **SETTINGS)
    model, objective = model_and_objective()
    o = settings.optimizer
    groups = parameter_groups(model.named_parameters(), model.no_weight_decay(), o, model.learning_rate_factors())
    decays = [group.pop("weight_decay") for group in groups]
    optimizer = torch.optim.SGD(groups, lr=LR, momentum=o.momentum, nesterov=o.nesterov)
    set_learning_rate(optimizer.param_groups, LR)
    for step in range(STEPS):
        whole = batch(step)
        outputs = flatten(model(whole.images, whole.texts))
        optimizer.zero_grad()
        objective(Embeddings.from_flat({**outputs, **whole.beside()})).value.backward()
        with torch.no_grad():
            for group, decay in zip(optimizer.param_groups, decays, strict=True):
                for p in group["params"]:
                    p.mul_(1 - group["lr"] * decay)
        optimizer.step()
        model.clamp_logit_scale()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def train(stage: int, sizes: tuple[int, int]) -> dict[str, Tensor]:
    settings = config(SIZE, **SETTINGS, execution__zero_stage=stage)
    model, objective = model_and_objective()
    engine, _ = build_engine(
        settings, model, no_decay=model.no_weight_decay(), factors=model.learning_rate_factors(), device=CPU,
        world_size=world_size(),
    )  # fmt: skip
    step = TrainStep(engine, objective, micro_batch_sizes=sizes, device=CPU, phases=Phases(CPU), kept=1)
    share = SIZE // world_size()
    for number in range(STEPS):
        step(batch(number, slice(rank() * share, (rank() + 1) * share)), LR)
    weights = {name: full_fp32(p).cpu() for name, p in model.named_parameters()}
    engine.destroy()
    return weights


@pytest.mark.parametrize(
    ("stage", "sizes"), [(0, (8, 8)), (0, (3, 4)), (1, (3, 3)), (2, (8, 8)), (3, (3, 4)), (3, (3, 3))]
)
def test_two_ranks_are_one_plain_big_batch(ranks, stage, sizes):
    start = {name: p.detach().clone() for name, p in model_and_objective()[0].named_parameters()}
    for weights in ranks(2, train, stage, sizes):
        for name, want in plain().items():
            moved = (want - start[name]).norm()
            assert (weights[name] - want).norm() <= 1e-4 * moved + 1e-7, name
    for name in ("parts.prototypes", "parts.predict.weight"):
        assert (plain()[name] - start[name]).norm() > 1e-3, name


class Outputs(torch.nn.Module):
    """What a model may give beside embeddings: a shared table, a mask, features without gradient, tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = torch.nn.Linear(6, 4), torch.nn.Linear(5, 4)
        self.table = torch.nn.Parameter(torch.randn(4, 3))
        self.double()

    def forward(self, images: tuple[Tensor, ...], texts: tuple[Tensor, ...]) -> dict[str, object]:
        out: dict[str, object] = {"shared": {"table": self.table.tanh()}}
        if images:
            out |= {"image": self.image(images[0]), "image_momentum": self.image(images[0]).detach() + 1}
        if texts:
            tokens = self.text(texts[0])
            out |= {"text": tokens.mean(1), "text_tokens": tokens, "text_token_mask": texts[0][..., 0] > 0}
        return out


def uses_all(e: Embeddings) -> Loss:
    weights = e.text_token_mask.double()[:, :, None]
    pooled = (e.text_tokens * weights).sum(1) / weights.sum(1).clamp(min=1)
    logits = (e.image @ pooled.T).exp() + (e.image_momentum * e.text).sum(1) + (e.text @ e.table).square().sum(1)
    return Loss(logits.logsumexp(1)[e.labels > 0].sum() + e.table.square().sum() ** 2)


@pytest.mark.parametrize(("sizes", "kept"), [((8, 8), 1), ((3, 3), 0), ((2, 5), 1)])
def test_the_cache_is_exact_for_every_kind_of_input(sizes, kept):
    g = torch.Generator().manual_seed(0)
    images = torch.randn(8, 6, generator=g, dtype=torch.float64)
    texts = torch.randn(8, 3, 5, generator=g, dtype=torch.float64)
    given = {"labels": torch.arange(8) % 3}
    torch.manual_seed(0)
    model = Outputs()
    whole = Batch(torch.arange(8), (images,), (texts,), given=given)
    done = cached_backward(model, uses_all, whole, micro_batch_sizes=sizes, device=CPU, kept=kept)
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss = uses_all(Embeddings.from_flat({**flatten(model((images,), (texts,))), **whole.beside()}))
    loss.value.backward()
    torch.testing.assert_close(done.loss.value, loss.value, rtol=1e-13, atol=0)
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-12, atol=1e-14, msg=name)
    assert done.leaves["image_momentum"].grad is None
    assert dataclasses.replace(done.embeddings, ids=None).labels is done.embeddings.labels
