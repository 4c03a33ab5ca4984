"""Samples and operations per second, for metrics.jsonl."""

from dataclasses import dataclass

from amclr_scale.metrics.flops import ModelFlops


@dataclass(frozen=True)
class Throughput:
    """What turns a rate of samples into rates of operations.

    Attributes:
        world_size: number of ranks.
        flops: the model's, per sample.
        second_forwards: share of micro-batches that the gradient cache encodes twice.
        recomputed_image, recomputed_text: share of a tower's blocks that backward runs again.
        peak: FLOP/s of one device; None where it is not known.
    """

    world_size: int
    flops: ModelFlops
    second_forwards: float
    recomputed_image: float
    recomputed_text: float
    peak: float | None

    def record(self, samples_per_second: float) -> dict[str, float]:
        """Rates per second; utilisation (mfu of useful, hfu of all operations) where the peak is known."""
        per_rank = samples_per_second / self.world_size
        useful = self.flops.useful() * per_rank
        hardware = per_rank * self.flops.hardware(
            second_forwards=self.second_forwards,
            recomputed_image=self.recomputed_image,
            recomputed_text=self.recomputed_text,
        )
        rates = {
            "samples_per_second": samples_per_second,
            "samples_per_second_per_rank": per_rank,
            "useful_tflops_per_rank": useful / 1e12,
            "hardware_tflops_per_rank": hardware / 1e12,
        }
        return rates if self.peak is None else {**rates, "mfu": useful / self.peak, "hfu": hardware / self.peak}
