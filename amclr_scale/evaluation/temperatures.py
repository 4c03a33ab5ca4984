"""The temperatures that an objective has learned for every sample: iSogCLR, AmCLR and xAmCLR with iSogCLR's rule.

They are state of the objective, not of the model: `objective.safetensors` of a run or a checkpoint holds
`image_state.temperature` and `text_state.temperature`, (N,) or, with one per pairing, (N, K). A sample that training
has not met yet has the temperature it began with; its estimator log u is -inf, and it is counted apart.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from amclr_scale.evaluation.geometry import temperatures
from amclr_scale.objectives.table import ROWS

SIDES = ("image", "text")
BINS = 20
BAR = 40  # characters


@dataclass(frozen=True)
class Histogram:
    """How the temperatures of one side are spread."""

    mean: float
    percentiles: dict[str, float]  # p05, p25, p50, p75, p95
    edges: list[float]  # of bins of equal width, one more than counts
    counts: list[int]
    not_met: int  # samples (or pairings of samples) without a visit

    def lines(self, side: str) -> list[str]:
        """As text: a heading, and a bar for each bin."""
        spread = ", ".join(f"{int(name[1:])} % {value:.4f}" for name, value in self.percentiles.items())
        rest = f"; {self.not_met:,} not met yet" if self.not_met else ""
        heading = f"temperatures of {sum(self.counts):,} {side}s: mean {self.mean:.4f}, {spread}{rest}"
        most = max(self.counts)
        return [heading] + [
            f"  {low:.4f} .. {high:.4f} {count:>12,}  {'#' * -(-count * BAR // most)}".rstrip()
            for low, high, count in zip(self.edges[:-1], self.edges[1:], self.counts, strict=True)
        ]


def histogram(values: Tensor, bins: int = BINS) -> Histogram:
    """Of values of any shape; nan: not met.

    Raises:
        ValueError: all are nan.
    """
    found = temperatures(values.flatten())
    seen = values[values.isfinite()].double()
    low, high = float(seen.min()), float(seen.max())
    bins = bins if high > low else 1
    edges = torch.linspace(low, high, bins + 1, dtype=torch.float64)
    places = ((seen - low) / max(high - low, 1e-300) * bins).long().clamp(max=bins - 1)
    counts = torch.bincount(places, minlength=bins)
    percentiles = {name: value for name, value in found.items() if name != "mean"}
    return Histogram(found["mean"], percentiles, edges.tolist(), counts.tolist(), values.numel() - len(seen))


def read_temperatures(state: Path | None) -> dict[str, Histogram]:
    """Histograms by side from an `objective.safetensors`, or, where each rank of a checkpoint has saved its own rows,
    from the files beside it; none where there are no such files or they hold none.
    """
    if state is None:
        return {}
    tensors = load_file(state) if state.is_file() else {}
    found = {}
    for side in SIDES:
        values, log_u = (_column(state, tensors, f"{side}_state.{name}") for name in ("temperature", "log_u"))
        if values is not None and log_u is not None:
            met = log_u.isfinite()
            if met.any():
                found[side] = histogram(values.masked_fill(~met, float("nan")))
    return found


def _column(state: Path, tensors: dict[str, Tensor], name: str) -> Tensor | None:
    """All rows, in any order, which is the same for all columns of a table."""
    if name in tensors:
        return tensors[name]
    parts = []
    for file in sorted(state.parent.glob("rank_*.safetensors")):
        with safe_open(file, "pt") as opened:
            if ROWS + name not in opened.keys():  # noqa: SIM118 - no dictionary
                return None
            parts.append(opened.get_tensor(ROWS + name))
    return torch.cat(parts) if parts else None
