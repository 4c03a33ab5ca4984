"""A step counter goes on wherever the next optimizer keeps its own: offload, or a GPU, changes who provides AdamW."""

import json
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from amclr_scale.checkpoint import pieces

OPTIONS = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}


class Counting(torch.optim.Optimizer):
    """AdamW that asks its subclasses how many steps have been taken."""

    def __init__(self, groups):
        super().__init__(groups, OPTIONS)

    def count(self, group, p) -> int:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                steps, state = self.count(group, p), self.state[p]
                assert type(steps) is int
                state["exp_avg"].lerp_(p.grad, 1 - group["betas"][0])
                state["exp_avg_sq"].lerp_(p.grad.square(), 1 - group["betas"][1])
                first = state["exp_avg"] / (1 - group["betas"][0] ** steps)
                second = state["exp_avg_sq"] / (1 - group["betas"][1] ** steps)
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(
                    group["lr"] * first / (second.sqrt() + group["eps"])
                )


class InStates(Counting):
    """As DeepSpeed's CPU Adam: a number beside the moments."""

    __module__ = "deepspeed.ops.adam.cpu_adam"

    def count(self, group, p) -> int:
        self.state[p]["step"] = self.state[p].get("step", 0) + 1
        return self.state[p]["step"]


class InGroups(Counting):
    """As NVIDIA apex's FusedAdam: a number in each group."""

    __module__ = "apex.optimizers.fused_adam"

    def count(self, group, p) -> int:
        group["step"] = group.get("step", 0) + (p is group["params"][0])
        return group["step"]


OPTIMIZERS = {
    "torch": lambda groups: torch.optim.AdamW(groups, **OPTIONS),
    "torch, fused": lambda groups: torch.optim.AdamW(groups, fused=True, **OPTIONS),
    "in states": InStates,
    "in groups": InGroups,
}


def engine(name: str) -> SimpleNamespace:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    groups = [{"params": list(part.parameters())} for part in module]
    made = SimpleNamespace(
        module=module, optimizer=OPTIMIZERS[name](groups), world_size=1, **dict.fromkeys(pieces.COUNTERS, 0)
    )
    made.zero_optimization_stage, made.fp16_enabled = lambda: 0, lambda: False
    return made


def train(made: SimpleNamespace, begin: int, end: int) -> list[Tensor]:
    for step in range(begin, end):
        generator = torch.Generator().manual_seed(step)
        for p in made.module.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        made.optimizer.step()
    return [p.detach() for p in made.module.parameters()]


@pytest.mark.parametrize(("writer", "reader"), product(OPTIMIZERS, OPTIMIZERS))
@pytest.mark.slow
def test_steps_are_counted_on(tmp_path, writer, reader):
    before, after = engine(writer), engine(reader)
    train(before, 0, 3)
    tensors, notes = pieces.collect(before, 0, 1)
    save_file(tensors, tmp_path / "rank", metadata={"notes": json.dumps(notes)})
    pieces.restore(after, pieces.PieceReader([tmp_path / "rank"]), 0)
    for got, want in zip(train(after, 3, 6), train(engine("torch"), 0, 6), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.deepspeed
def test_buffers_that_are_made_anew_are_neither_written_nor_asked_for(tmp_path):
    """And one tensor in two places is written once."""
    made = engine("torch")
    made.module.register_buffer("places", torch.arange(3), persistent=False)
    made.module.register_buffer("seen", torch.arange(2))
    made.module.append(made.module[1])
    tensors, notes = pieces.collect(made, 0, 1)
    assert [key for key in tensors if key.startswith("buffer/")] == ["buffer/seen"]
    assert len([key for key in tensors if key.startswith("parameter/")]) == 4
    save_file(tensors, tmp_path / "rank", metadata={"notes": json.dumps(notes)})
    made.module.seen.zero_()
    made.module.places.add_(1)
    pieces.restore(made, pieces.PieceReader([tmp_path / "rank"]), 0)
    assert made.module.seen.tolist() == [0, 1]
    assert made.module.places.tolist() == [1, 2, 3]
