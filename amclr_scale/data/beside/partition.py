"""Communities of equal size in a graph of neighbours.

The paper of communities.py takes METIS. Here they grow one after another: from a sample that is in none, always by the
sample that has the most edges into what has grown so far, until there are K; where no neighbour is left, by another
sample that is in none. Every one has exactly K samples, but for the last one. Exact, the same everywhere, and O(edges).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from amclr_scale.data.randomness import Purpose, permutation


@dataclass(frozen=True)
class Graph:
    """Undirected: sample i has edges to others[first[i] : first[i + 1]], which weigh 1, or 2 where both point there."""

    first: NDArray[np.int64]  # (N + 1,)
    others: NDArray[np.int64]  # (E,)
    weights: NDArray[np.int64]  # (E,)

    def __len__(self) -> int:
        return len(self.first) - 1


def graph_of(neighbours: NDArray[np.int64]) -> Graph:
    """Of what each sample points to, (N, m); itself does not count. Takes some 48 N m bytes."""
    N, m = neighbours.shape
    one, other = np.repeat(np.arange(N), m), neighbours.reshape(-1)
    apart = one != other
    one, other = one[apart], other[apart]
    edges, weights = np.unique(np.concatenate([one * N + other, other * N + one]), return_counts=True)
    return Graph(np.searchsorted(edges, np.arange(N + 1) * N), edges % N, weights)


def communities_of(graph: Graph, size: int, seed: int) -> NDArray[np.int64]:
    """(N,): which community each sample is in, counted from 0.

    Args:
        graph: of N samples.
        size: K.
        seed: of the order in which communities begin.
    """
    found = np.full(len(graph), -1, np.int64)
    begins = iter(permutation(len(graph), seed, Purpose.COMMUNITIES).tolist())
    for number in range(-(-len(graph) // size)):
        edges = dict[int, int]()  # into this community, of samples that are in none
        by_edges: list[list[int]] = [[]]  # those that had so many; what has more by now is also further up
        for _ in range(min(size, len(graph) - number * size)):
            sample = _nearest(edges, by_edges)
            while sample is None:
                candidate = next(begins)
                sample = candidate if found[candidate] < 0 else None
            found[sample] = number
            edges.pop(sample, None)
            here = slice(graph.first[sample], graph.first[sample + 1])
            for other, weight in zip(graph.others[here].tolist(), graph.weights[here].tolist(), strict=True):
                if found[other] < 0:
                    edges[other] = now = edges.get(other, 0) + weight
                    while len(by_edges) <= now:
                        by_edges.append([])
                    by_edges[now].append(other)
    return found


def _nearest(edges: dict[int, int], by_edges: list[list[int]]) -> int | None:
    while by_edges:
        while by_edges[-1]:
            sample = by_edges[-1].pop()
            if edges.get(sample) == len(by_edges) - 1:
                return sample
        if len(by_edges) == 1:
            return None
        by_edges.pop()
    return None


def inside(graph: Graph, communities: NDArray[np.int64]) -> float:
    """The share of edges, by weight, whose two ends are in one community."""
    one = np.repeat(np.arange(len(graph)), np.diff(graph.first))
    same = communities[one] == communities[graph.others]
    return float(graph.weights[same].sum() / max(1, graph.weights.sum()))
