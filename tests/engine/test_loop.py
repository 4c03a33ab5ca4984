"""The training loop holds nothing of a step while the next one runs."""

import weakref
from itertools import repeat
from unittest import mock

import torch

from amclr_scale.engine.batch_plan import Plan
from amclr_scale.engine.loop import train
from amclr_scale.engine.step import StepReport
from amclr_scale.metrics.phases import Phases
from amclr_scale.types import Embeddings, Loss
from tests.engine.towers import config, global_batch

CPU = torch.device("cpu")


def test_embeddings_of_the_last_step_are_gone_when_the_next_one_begins():
    seen: list[weakref.ref[torch.Tensor]] = []

    def step(batch, lr) -> StepReport:
        assert not any(alive() is not None for alive in seen), "a step's embeddings are alive in the next step"
        image = torch.ones(4, 2, requires_grad=True)
        image.sum().backward()
        seen.append(weakref.ref(image))
        return StepReport(Loss(torch.ones(()), {"objective": 1.0}), Embeddings(image, image), 1.0, 10.0)

    settings = config(4, run__log_every_steps=2)
    parts = {name: mock.MagicMock() for name in ("log", "throughput", "profiler", "objective")}
    parts["throughput"].record.return_value = {}
    train(
        settings, Plan(100.0, 5, 4, 1, (4, 4)), step=step, batches=repeat(global_batch(0, 4)), evaluate=None,
        phases=Phases(CPU), device=CPU, **parts,
    )  # fmt: skip
    assert len(seen) == 5
    assert parts["log"].step.call_count == 4  # of the first, the last, and every second step
