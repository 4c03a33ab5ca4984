"""Clusters of embeddings that follow training: k-means by moving averages, the same on any number of ranks.

A cluster c is a moving sum S_c of its members' rows and a moving mass p_c; its mean is mu_c = S_c / p_c. Kept are
p_c and mu_c: where nobody joins, S_c and p_c fade out of float32, and the mean stays. In each step, of the B rows x_j
of all ranks and with weight gamma of the newest batch:

    a cluster without members for `idle_steps` steps begins anew, with the row farthest from its nearest mean
    c(j) = the cluster whose mean is nearest to x_j, in Euclidean distance
    p_c <- (1 - gamma) p_c + gamma |{j : c(j) = c}| / B,      S_c <- (1 - gamma) S_c + gamma sum_{c(j) = c} x_j / B

These are the updates of van den Oord et al., "Neural Discrete Representation Learning", NeurIPS 2017, arXiv:1711.00937,
appendix A.1. At first all clusters begin, so with as many as there are rows each row has one of its own.

Rows stay where they are: C (D + 1) sums, B distances and C D numbers of new clusters travel. Which cluster a row joins
has no gradient. S_c has one into the newest rows, 1 / gamma of their share in it: they stand for all that is in it, so
on average keys are pushed as much as anchors are. With their own share alone, keys would hardly be pushed, and anchors
drift away from means of the past: all embeddings then gather on one side.

Numerics: float32, float64 where embeddings are.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from amclr_scale.distributed.purpose import purpose
from amclr_scale.objectives.base import global_batch_size
from amclr_scale.objectives.inner import Inner
from amclr_scale.objectives.sample_state import STATE
from amclr_scale.similarity import all_gather, all_sum, rank


@dataclass(frozen=True)
class Clustering:
    """C clusters; means have a gradient into the newest rows, as if these were all of them."""

    means: Tensor  # (C, D); 0 where nothing has joined
    mass: Tensor  # (C,), 0 where nothing has joined; the sum grows to 1
    idle: Tensor  # (C,), steps since somebody joined, up to `idle_steps`

    @property
    def log_shares(self) -> Tensor:
        """(C,): the logarithm of each cluster's share of the mass; -inf where nothing has joined."""
        return self.mass.log() - self.mass.sum().log()

    @property
    def number(self) -> Tensor:
        """How many clusters of one size would be as mixed, exp(entropy): C at most."""
        shares = self.log_shares
        return (-torch.where(self.mass > 0, shares.exp() * shares, 0.0).sum()).exp()


class Clusters(Inner):
    """Several clusterings, by name, as state of an objective."""

    def __init__(self, counts: Mapping[str, int], gamma: float, idle_steps: int) -> None:
        """Nothing yet.

        Args:
            counts: name -> C.
            gamma: weight of the newest batch.
            idle_steps: after so many steps without a member a cluster begins anew.
        """

        def shapes(width: int) -> dict[str, tuple[int, ...]]:
            found: dict[str, tuple[int, ...]] = {}
            for name, count in counts.items():
                found |= {f"{name}.means": (count, width), f"{name}.mass": (count,), f"{name}.idle": (count,)}
            return found

        super().__init__(shapes, ("weights",), ())
        self.gamma, self.idle_steps, self._numbers = gamma, idle_steps, dict(counts)

    def fill(self) -> None:
        """Be as in the midst of a run."""
        self.weights.normal_()
        at = self.shaped(self.weights)
        for name, count in self._numbers.items():
            at[f"{name}.mass"].fill_(1 / count)
            at[f"{name}.idle"].zero_()

    def of(self, name: str, rows: Tensor) -> Clustering:
        """As stored, as precise as these rows (b, D); empty before the first step."""
        if not self.width:
            count = self._numbers[name]
            return Clustering(*(rows.new_zeros(shape) for shape in ((count, rows.shape[1]), (count,), (count,))))
        self.ready(rows)
        at = self.shaped(self.weights)
        return Clustering(*(at[f"{name}.{what}"].to(rows.dtype) for what in ("means", "mass", "idle")))

    def join(self, name: str, rows: Tensor) -> tuple[Tensor, Clustering]:
        """What a step makes of a clustering, which is not kept yet, and whom each row joins, (b,) int64.

        Args:
            name: of the clustering.
            rows: (b, D) of this rank, at least float32.
        """
        old, x = self.of(name, rows), rows.detach()
        with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
            alive = (old.mass > 0) & (old.idle < self.idle_steps)
            means, new = self._begin(old.means, alive, x)
            mine = _distances(x, means, alive | new).argmin(1)
            member = (mine[:, None] == torch.arange(len(means), device=rows.device)).to(rows.dtype)  # (b, C)
        with torch.autocast(rows.device.type, enabled=False), purpose(STATE):
            fresh = all_sum(torch.cat([member.T @ rows, member.sum(0)[:, None]], 1)) / global_batch_size(rows)
        least = torch.finfo(rows.dtype).tiny if self.gamma < 1 else 0.0  # what is idle is there until it begins anew
        before = torch.where(alive, ((1 - self.gamma) * old.mass).clamp(min=least), 0.0)
        share, newest = fresh[:, -1].detach(), fresh[:, :-1]
        mass = before + self.gamma * share
        idle = torch.where(share > 0, 0.0, old.idle + 1).clamp(max=self.idle_steps)
        sums = before[:, None] * old.means + self.gamma * newest.detach() + (newest - newest.detach())
        joined, held = (share > 0)[:, None], (mass > 0)[:, None]
        moved = sums / torch.where(joined, mass[:, None], 1.0)
        return mine, Clustering(torch.where(joined, moved, torch.where(held, old.means, 0.0)), mass, idle)

    @purpose(STATE)
    def _begin(self, means: Tensor, alive: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The means, of those that begin anew too, and which ones do."""
        b = len(rows)
        farthest = all_gather(_distances(rows, means, alive).amin(1)).sort(descending=True, stable=True).indices
        place = (~alive).cumsum(0) - 1  # the n-th of those that are free gets the n-th farthest row
        new = ~alive & (place < len(farthest))
        source = farthest[place.clamp(0, len(farthest) - 1)] - rank() * b
        here = new & (source >= 0) & (source < b)
        begun = all_sum(torch.where(here[:, None], rows[source.clamp(0, b - 1)], 0.0))
        return torch.where(new[:, None], begun, means), new

    def store(self, clusterings: Mapping[str, Clustering]) -> None:
        """Keep what `join` made of all clusterings, once the step has been applied."""
        if not self.width:
            means = next(iter(clusterings.values())).means
            self.make(means.shape[1], means.device)
            self.ready(means)
        parts = {
            f"{name}.{what}": getattr(one, what).detach()
            for name, one in clusterings.items()
            for what in ("means", "mass", "idle")
        }
        self.keep({}, weights=self.flat(parts))


def _distances(rows: Tensor, means: Tensor, alive: Tensor) -> Tensor:
    """(b, C) squared; infinite from what is not alive."""
    squares = rows.square().sum(1, keepdim=True) + means.square().sum(1)
    return torch.where(alive, squares - 2 * (rows @ means.T), torch.inf)
