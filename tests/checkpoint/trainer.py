"""A trainer of a tiny model that can be stopped and continued in another layout, for the pools of ranks."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amclr_scale import objectives
from amclr_scale.checkpoint import files, state
from amclr_scale.config.load import build
from amclr_scale.config.schema import Momentum
from amclr_scale.distributed.process_group import seed_everything
from amclr_scale.engine.deepspeed_setup import build_engine
from amclr_scale.engine.schedules import learning_rate
from amclr_scale.engine.step import TrainStep
from amclr_scale.engine.teacher import Teacher
from amclr_scale.engine.zero.master_weights import full_fp32
from amclr_scale.metrics.phases import Phases
from amclr_scale.similarity import all_gather, all_sum, rank, world_size
from amclr_scale.types import Batch
from tests.engine.towers import LENGTH, PIXELS, WORDS, TinyTowers

SIZE, SAMPLES = 16, 40
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
OPTIONS: dict[str, dict[str, Any]] = {
    "clip": {},
    "sogclr": {"gamma": 0.6},
    "isogclr": {"gamma": 0.6},
    "amclr": {"gamma": 0.6, "temperature": 0.05},
}


class Towers(TinyTowers):
    """With further views, a buffer that training changes, and a weight that it does not."""

    def __init__(self, dropout: float):
        super().__init__(dropout)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.frozen = torch.nn.Parameter(torch.randn(3), requires_grad=False)

    def forward(self, images: tuple[Tensor, ...], texts: tuple[Tensor, ...]) -> dict[str, Any]:
        self.calls += 1
        out: dict[str, Any] = super().forward(images, texts)
        if images:
            out["image_views"] = tuple(map(self.embed_image, images[1:]))
        if texts:
            out["text_views"] = tuple(map(self.embed_text, texts[1:]))
        return out


def local_batch(step: int) -> Batch:
    """This rank's share of a global batch that differs from step to step, ids drawn from all samples."""
    g = torch.Generator().manual_seed(step)
    images = [torch.randint(0, 256, (SIZE, 3, PIXELS, PIXELS), generator=g, dtype=torch.uint8) for _ in range(2)]
    texts = [torch.randint(0, WORDS, (SIZE, LENGTH), generator=g) for _ in range(2)]
    ids = torch.randperm(SAMPLES, generator=g)[:SIZE]
    share = SIZE // world_size()
    mine = slice(rank() * share, (rank() + 1) * share)
    return Batch(ids[mine], tuple(v[mine] for v in images), tuple(v[mine] for v in texts))


class Trainer:
    def __init__(self, objective: str, *, dropout: float = 0.0, layout: str = "auto", **keys: Any):
        tree: dict[str, Any] = {
            "data": {"lanes": 4},
            "train": {"global_batch_size": SIZE, "samples": 1000},
            "optimizer": {"lr": 0.02, "max_grad_norm": 0.5, "name": keys.pop("optimizer", "adamw")},
            "execution": keys,
        }
        self.config = build(tree)
        seed_everything(0)
        self.model = Towers(dropout)
        self.engine, _ = build_engine(
            self.config, self.model, no_decay=self.model.no_weight_decay(), device=CPU, world_size=world_size()
        )
        self.objective = objectives.create(objective, num_samples=SAMPLES, sample_state=layout, **OPTIONS[objective])
        self.teacher = Teacher(
            Momentum(decay=0.6), self.engine, precision=self.config.execution.precision, total_steps=62, lends=(),
            device=CPU,
        )  # fmt: skip
        self.step = TrainStep(
            self.engine, self.objective, micro_batch_sizes=(2, 2), device=CPU, phases=Phases(CPU), kept=1,
            teacher=self.teacher,
        )  # fmt: skip
        seed_everything(0, rank() + 1)

    def train(self, begin: int, end: int) -> list[float]:
        """The loss of the global batch at each step."""
        losses = []
        for n in range(begin, end):
            self.objective.set_epoch(n * SIZE / SAMPLES)
            report = self.step(local_batch(n), learning_rate(self.config.optimizer, (n + 0.5) * SIZE, 1000, SIZE))
            losses.append(float(all_sum(report.loss.value.detach().double())) / world_size())
        return losses

    def save(self, folder: Path, step: int) -> None:
        """What the checkpointer does, without its clock."""
        here = files.staging(folder, step)
        here.mkdir(parents=True, exist_ok=True)
        snapshot = state.take(self.engine, self.objective, {"step": step, "number": 1}, CPU, teacher=self.teacher)
        written = snapshot.write(here)
        every: list[Any] = [written]
        if world_size() > 1:
            every = [None] * world_size()
            torch.distributed.all_gather_object(every, written)
        if rank() == 0:
            files.commit(folder, step, [file for part in every for file in part])
        all_sum(torch.zeros(1))  # nobody reads before it is there

    def load(self, folder: Path) -> None:
        found, complaints = files.newest_valid(folder)
        assert found
        assert not complaints
        state.restore(found, self.engine, self.objective, CPU, teacher=self.teacher)

    def everything(self) -> dict[str, Tensor]:
        """Weights, objective state, buffers, a teacher, the generator: on every rank."""
        found = {name: full_fp32(p) for name, p in self.model.named_parameters()}
        found |= dict(self.model.named_buffers()) | dict(self.objective.state_dict())
        found |= {f"teacher.{name}": p for name, p in (self.teacher.weights.whole() | self.teacher.buffers).items()}
        return found | {"random": all_gather(torch.get_rng_state())}

    def close(self) -> None:
        self.engine.destroy()


def run(folder: str, begin: int, end: int, save_at: int | None = None, **how: Any) -> tuple[list[float], dict]:
    """Train steps begin .. end - 1, loading first if begin > 0, saving after `save_at` steps (and going on)."""
    trainer = Trainer(**how)
    if begin:
        trainer.load(Path(folder))
    losses = []
    if save_at is not None:
        losses = trainer.train(begin, save_at)
        trainer.save(Path(folder), save_at)
        begin = save_at
    losses += trainer.train(begin, end)
    everything = trainer.everything()
    trainer.close()
    return losses, everything
