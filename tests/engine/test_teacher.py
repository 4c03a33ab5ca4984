"""The teacher after 20 steps is a plain moving average of a plain run: any ZeRO stage, bf16, with and without a cache.

The student learns from the teacher's features, so that a teacher who is late by a step, or cut wrongly, changes both.
"""

import copy
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amclr_scale.config.schema import Momentum
from amclr_scale.distributed.collectives import rank, world_size
from amclr_scale.engine.deepspeed_setup import build_engine
from amclr_scale.engine.schedules import averaging_decay
from amclr_scale.engine.step import TrainStep
from amclr_scale.engine.teacher import Teacher
from amclr_scale.engine.zero.master_weights import full_fp32
from amclr_scale.metrics.phases import Phases
from amclr_scale.objectives.base import Objective
from amclr_scale.objectives.clip import CLIP
from amclr_scale.types import Batch, Embeddings, Loss
from tests.engine.towers import CPU, config, global_batch, local_batch, towers

SIZE, STEPS, LR = 16, 20, 0.01
COSINE = Momentum(decay=0.95, decay_schedule="cosine", start_decay=0.5)


class FollowsTeacher(Objective):
    """clip, and the squared distance to the teacher's features of the other modality."""

    @dataclass(frozen=True)
    class Config:
        """None."""

    @staticmethod
    def inputs_of(options: Any) -> dict[str, bool]:
        return {"image_momentum": True, "text_momentum": True}

    def __init__(self) -> None:
        super().__init__(self.Config())
        self.name = "follows_teacher"
        self.clip, self.seen = CLIP(CLIP.Config()), list[Tensor]()

    def forward(self, e: Embeddings) -> Loss:
        self.seen.append(torch.cat([e.image_momentum, e.text_momentum], 1))
        assert not e.image_momentum.requires_grad
        assert not e.text_momentum.requires_grad
        return Loss(self.clip(e).value + distance(e.image, e.text, e.image_momentum, e.text_momentum))


def distance(image: Tensor, text: Tensor, image_momentum: Tensor, text_momentum: Tensor) -> Tensor:
    return ((image - text_momentum).square().sum(1) + (text - image_momentum).square().sum(1)).mean()


@cache
def plain() -> tuple[dict[str, Tensor], list[Tensor]]:
    """The teacher's weights after the last step, and its features of every step."""
    student = towers()
    teacher: Any = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.SGD(student.parameters(), lr=LR, momentum=0.9, nesterov=True)
    seen = []
    for number in range(STEPS):
        batch = global_batch(number, SIZE)
        out, lent = student(batch.images, batch.texts), teacher(batch.images, batch.texts)
        logits, labels = out["logit_scale"] * out["image"] @ out["text"].T, torch.arange(SIZE)
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        optimizer.zero_grad()
        (loss + distance(out["image"], out["text"], lent["image"], lent["text"])).backward()
        optimizer.step()
        seen.append(torch.cat([lent["image"], lent["text"]], 1))
        with torch.no_grad():
            student.logit_scale.clamp_(0, math.log(100))
            m = 0.95 - 0.45 * (1 + math.cos(math.pi * (number + 0.5) / STEPS)) / 2
            for average, weight in zip(teacher.parameters(), student.parameters(), strict=True):
                average.copy_(m * average + (1 - m) * weight)
    return {name: p.clone() for name, p in teacher.named_parameters()}, seen


def taught(
    stage: int,
    sizes: tuple[int, int],
    *,
    precision: str = "fp32",
    settings: Momentum = COSINE,
    steps: int = STEPS,
    dropout: float = 0.0,
    device: torch.device = CPU,
    offload: str = "none",
) -> dict[str, Any]:
    """The teacher's weights after so many steps, all its features on this rank, the student's weights, and so on."""
    changes: dict[str, Any] = {"name": "sgd", "weight_decay": 0.0, "max_grad_norm": 0.0}
    execution = {"zero_stage": stage, "precision": precision, "offload": offload}
    named = {f"optimizer__{key}": value for key, value in changes.items()}
    run = config(SIZE, **named, **{f"execution__{key}": value for key, value in execution.items()})
    model: Any = towers(dropout)
    engine, _ = build_engine(run, model, no_decay=model.no_weight_decay(), device=device, world_size=world_size())
    teacher = Teacher(
        settings, engine, precision=precision, total_steps=steps, lends=("image", "text"), device=device
    )  # fmt: skip
    objective = FollowsTeacher()
    step = TrainStep(
        engine, objective, micro_batch_sizes=sizes, device=device, phases=Phases(device), kept=1, teacher=teacher
    )
    torch.manual_seed(rank())
    averages = {name: full_fp32(p) for name, p in model.named_parameters()}
    for number in range(steps):
        step(local_batch(number, SIZE, rank(), world_size()), LR)
        m = averaging_decay(settings, (number + 0.5) / steps)
        for name, p in model.named_parameters() if precision == "bf16" else ():
            averages[name] = m * averages[name] + (1 - m) * full_fp32(p)
    found = {
        "teacher": teacher.weights.whole(),
        "averages": {name: value.cpu() for name, value in averages.items()},
        "seen": torch.stack(objective.seen).cpu(),
        "student": {name: full_fp32(p).cpu() for name, p in model.named_parameters()},
    }
    engine.destroy()
    return found


def all_runs(stage: int) -> dict[str, dict[str, Any]]:
    """On each rank, one engine after another in the same process."""
    last = COSINE.model_copy(update={"order": "last"})
    runs = {"whole share": taught(stage, (8, 8), settings=last), "cache": taught(stage, (3, 4))}
    if stage in (0, 3):
        runs["dropout, first"] = taught(stage, (3, 3), steps=2, dropout=0.4)
        runs["dropout, last"] = taught(stage, (3, 3), steps=2, dropout=0.4, settings=last)
    if stage in (1, 3):  # and with masters on the host, where there is another place
        slow = Momentum(decay=0.9999)
        runs["bf16"] = taught(stage, (3, 3), precision="bf16", settings=slow, offload="optimizer")
    return runs


def close(a: Tensor, b: Tensor, bound: float = 1e-6) -> bool:
    return bool((a - b).norm() <= bound * b.norm())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_teacher_is_a_plain_average_of_a_plain_run(ranks, stage):
    weights, features = plain()
    everyone = ranks(2, all_runs, stage)
    for number, runs in enumerate(everyone):
        for name in ("whole share", "cache"):
            found = runs[name]
            assert found["teacher"].keys() == weights.keys()
            wrong = [key for key, value in weights.items() if not close(found["teacher"][key], value)]
            assert not wrong, f"{name}: {wrong}"
            for step, whole in enumerate(features):
                mine = whole[number * 8 : number * 8 + 8]
                assert (found["seen"][step] - mine).abs().max() < 1e-5, f"{name}: features of step {step}"
        if stage in (0, 3):
            first, last = runs["dropout, first"], runs["dropout, last"]
            assert torch.equal(first["seen"], last["seen"]), "the order changes the teacher's features"
            for key, value in first["student"].items():
                assert torch.equal(value, last["student"][key]), f"the order changes {key}"
        if stage in (1, 3):
            found = runs["bf16"]
            for key, value in found["teacher"].items():
                assert key == "logit_bias" or not torch.equal(value, value.bfloat16().float()), f"{key}: did not move"
            wrong = [key for key, value in found["averages"].items() if not close(found["teacher"][key], value)]
            assert not wrong, f"bf16: {wrong}"


def statistics_run(buffers: str) -> dict[str, Any]:
    """Two steps of towers with a BatchNorm, whose statistics both ranks have apart."""
    model: Any = towers()
    model.image_tower = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(108), *list(model.image_tower)[1:])
    run = config(SIZE)
    engine, _ = build_engine(run, model, no_decay=set(), device=CPU, world_size=world_size())
    settings = Momentum.model_validate({"decay": 0.75, "buffers": buffers, "scale": True})
    teacher = Teacher(settings, engine, precision="fp32", total_steps=2, lends=("image",), device=CPU)
    step = TrainStep(engine, CLIP(CLIP.Config()), micro_batch_sizes=(4, 4), device=CPU, phases=Phases(CPU))
    step.teacher = teacher
    states = [{name: x.clone() for name, x in model.state_dict().items()}]
    for number in range(2):
        step(local_batch(number, SIZE, rank(), world_size()), LR)
        states.append({name: x.clone() for name, x in model.state_dict().items()})
    batch = local_batch(7, SIZE, rank(), world_size())
    batch = Batch(batch.ids, (*batch.images, 255 - batch.images[0]), batch.texts)  # a further view, which is not lent
    lent = teacher.lend(batch, (3, 5))
    after = {name: x.clone() for name, x in model.state_dict().items()}
    plain: Any = towers()
    plain.image_tower = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(108), *list(plain.image_tower)[1:])
    plain.load_state_dict({**teacher.weights.whole(), **teacher.buffers})
    with torch.no_grad():
        want = plain.eval()(batch.images, ())["image"]
    engine.destroy()
    return {"states": states, "buffers": teacher.buffers, "lent": lent, "want": want, "after": after}


@pytest.mark.parametrize("buffers", ["average", "copy"])
def test_stored_statistics_are_averaged_or_copied_and_the_student_gets_its_own_back(ranks, buffers):
    for found in ranks(2, statistics_run, buffers):
        before, between, last = found["states"]
        assert found["buffers"].keys() == {
            f"image_tower.1.{x}" for x in ("running_mean", "running_var", "num_batches_tracked")
        }
        for name, value in found["buffers"].items():
            want = last[name]
            if buffers == "average" and value.is_floating_point():
                want = 0.75 * (0.75 * before[name] + 0.25 * between[name]) + 0.25 * last[name]
                assert not torch.allclose(want, last[name], atol=1e-3)
            assert torch.allclose(value, want, rtol=1e-5), name
        assert found["lent"].keys() == {"image_momentum"}
        assert torch.allclose(found["lent"]["image_momentum"], found["want"], atol=1e-6)
        for name, value in last.items():
            assert torch.equal(value, found["after"][name]), f"lending changed {name}"
