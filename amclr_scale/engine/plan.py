"""The arithmetic of a run: shares, micro-batches, steps, epochs. Imports no torch."""

from dataclasses import dataclass

from amclr_scale.config.schema import Config


@dataclass(frozen=True)
class Plan:
    """The arithmetic of a run."""

    num_samples: int  # N, in the data set
    total_steps: int
    global_batch_size: int
    world_size: int
    micro_batch_size: int

    @property
    def local_batch_size(self) -> int:
        return self.global_batch_size // self.world_size

    @property
    def total_samples(self) -> int:
        return self.total_steps * self.global_batch_size

    def __str__(self) -> str:
        micro_batches = -(-self.local_batch_size // self.micro_batch_size)
        return (
            f"global batch {self.global_batch_size} = {self.world_size} ranks x {self.local_batch_size}, "
            f"encoded {self.micro_batch_size} at once ({micro_batches} per step and rank"
            f"{', through the gradient cache' if micro_batches > 1 else ''})\n"
            f"{self.total_steps} steps = {self.total_samples} samples = "
            f"{self.total_samples / self.num_samples:.2f} epochs of {self.num_samples}"
        )


def make_plan(config: Config, num_samples: int, world_size: int) -> Plan:
    """Steps from samples or epochs: the nearest whole number of global batches, at least one."""
    batch = config.train.global_batch_size
    samples = config.train.samples or (config.train.epochs or 0) * num_samples
    local = batch // world_size
    micro = min(config.execution.micro_batch_size or local, local)
    return Plan(num_samples, max(1, round(samples / batch)), batch, world_size, micro)
