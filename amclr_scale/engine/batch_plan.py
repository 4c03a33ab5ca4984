"""The arithmetic of a run: shares, micro-batches, steps, epochs. Imports no torch."""

from dataclasses import dataclass, field
from typing import Literal

from amclr_scale.config.checks import too_short
from amclr_scale.config.schema import Config, Optimizer
from amclr_scale.engine.schedules import learning_rate
from amclr_scale.errors import UserError


@dataclass(frozen=True)
class Position:
    """Where a run is after a step."""

    step: int  # steps done
    samples: int  # seen
    epoch: float  # passes over the data
    lr: float  # of the step, before the parts' factors
    last: bool


@dataclass(frozen=True)
class Plan:
    """The arithmetic of a run."""

    samples_per_epoch: float  # N, but for a mixture with weights
    total_steps: int
    global_batch_size: int
    world_size: int
    micro_batch_sizes: tuple[int, int]  # images, texts
    kept_micro_batches: int | Literal["auto"] = 1
    optimizer: Optimizer = field(default_factory=Optimizer)  # with the learning rate's course

    def position(self, step: int) -> Position:
        """Where the run is after so many steps, one at least."""
        samples = step * self.global_batch_size
        middle = samples - self.global_batch_size / 2
        lr = learning_rate(self.optimizer, middle, self.total_samples, self.global_batch_size)
        return Position(step, samples, self.epoch(step), lr, step == self.total_steps)

    def epoch(self, step: int) -> float:
        """Passes over the data after so many steps."""
        return step * self.global_batch_size / self.samples_per_epoch

    def reaches(self, done: Position, every: float) -> bool:
        """Whether the step has reached a multiple of `every` samples."""
        return done.samples // every > (done.samples - self.global_batch_size) // every

    @property
    def kept(self) -> int:
        """Micro-batches whose graphs are kept, once that is settled (planner/auto_execution.py)."""
        assert self.kept_micro_batches != "auto", "kept_micro_batches is not settled yet"
        return min(self.kept_micro_batches, self.micro_batches)

    @property
    def micro_batches(self) -> int:
        """Forward calls per step and rank."""
        images, texts = self.micro_batch_sizes
        calls = -(-self.local_batch_size // images)
        return calls if images == texts else calls - (-self.local_batch_size // texts)

    @property
    def local_batch_size(self) -> int:
        return self.global_batch_size // self.world_size

    @property
    def total_samples(self) -> int:
        return self.total_steps * self.global_batch_size

    def __str__(self) -> str:
        images, texts = self.micro_batch_sizes
        at_once = f"{images}" if images == texts else f"{images} images or {texts} texts"
        lines = [
            f"global batch {self.global_batch_size} = {self.world_size} ranks x {self.local_batch_size}, "
            f"encoded {at_once} at once ({self.micro_batches} per step and rank"
            f"{', through the gradient cache' if self.micro_batches > 1 else ''})",
            f"{self.total_steps} steps = {self.total_samples} samples = "
            f"{self.total_samples / self.samples_per_epoch:.2f} epochs of {self.samples_per_epoch:g}",
        ]
        if self.global_batch_size > self.samples_per_epoch:
            epochs = self.global_batch_size / self.samples_per_epoch
            lines.append(f"a global batch holds {epochs:.1f} epochs: samples meet themselves in it")
        warmup = self.optimizer.warmup_samples
        if warmup > self.total_samples:
            lines.append(
                f"its warm-up of {warmup} samples is longer than the run: the learning rate ends below its peak"
            )
        return "\n".join(lines)


def make_plan(config: Config, samples_per_epoch: float, world_size: int) -> Plan:
    """Steps from samples or epochs: the nearest whole number of global batches, at least one.

    Raises:
        UserError: so many epochs are too short for the warm-up and the cooldown.
    """
    batch = config.train.global_batch_size
    epochs = config.train.epochs
    samples = config.train.samples or (epochs or 0) * samples_per_epoch
    if epochs is not None and config.train.samples is None:  # else it has been refused before
        length = f"{epochs:g} epochs of {samples_per_epoch:g} samples"
        if lines := too_short(config.optimizer, samples, length):
            raise UserError(lines[0])
    local = batch // world_size
    wanted = config.execution.micro_batch_size or local
    sizes = (min(wanted, local), min(config.execution.text_micro_batch_size or wanted, local))
    kept = config.execution.kept_micro_batches
    return Plan(samples_per_epoch, max(1, round(samples / batch)), batch, world_size, sizes, kept, config.optimizer)
