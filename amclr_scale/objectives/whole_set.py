"""How far an objective that is fed with batches is from the same objective fed with the whole data set at once.

A moving average per sample promises that batches of B stand in for the data set. On K samples, present embeddings:

    estimator     stored u_i against g_i, the mean over the K samples' negatives: what u_i is an estimate of
    gradient      with respect to the embeddings: g, of batches of B with the present state, against G, of all K at once
                  with u_i = g_i. K / B batches, together every sample once, make one estimate of G; several random
                  partitions into batches make several
    bias, noise   two estimates g, g' share what all batches get wrong but not the luck of the draw, so for independent
                  partitions mean(g . g') is |E g|^2, without noise, and mean(g . G) is E g . G

    ages          the error of samples by how long ago their last visit was: what a moving average pays for memory

`cosine` is that of one estimate with G, noise and all; `expected_cosine` is that of E g, what a step size that goes to
zero follows. Both are 1 where B = K, for any objective, once its state has been visited or where it has none. Where
rows of features are stored for every sample, those of G are the present ones of the K samples.

`bias` is |E g - G| / |G| and `noise` the standard deviation of one estimate, sqrt(E |g - E g|^2) / |G|. All of it is
also had of the gradient of the parameters of the last layer, a linear function of the embeddings' one (`layer`).

Numerics: products of gradients are summed in float64.
"""

import math
from collections.abc import Callable
from typing import Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor

from amclr_scale.declarations import KINDS
from amclr_scale.objectives.base import Objective, numbers
from amclr_scale.objectives.sample_state import SampleState
from amclr_scale.similarity import all_gather, all_sum, rank, world_size
from amclr_scale.types import Embeddings, is_shared, takes_gradient

Gradient = dict[str, Tensor]  # by flat name

SIDES = ("image", "text")
TENTHS = 10
ESTIMATE = "log_u"  # the column that a batch estimates; others (temperatures) are what they are


def compare_with_whole_set(
    objective: Objective,
    whole: Objective,
    embeddings: Embeddings,
    *,
    global_batch_size: int,
    partitions: int = 2,
    seed: int = 0,
    ages: Tensor | None = None,
    layer: Callable[[Gradient], Gradient] | None = None,
) -> dict[str, float]:
    """Compare stored averages and gradients of batches with those of all K samples as one batch.

    The objective's state is read, never changed. All ranks call it, each with all K rows.

    Args:
        objective: the one in training, with its state.
        whole: a new one with the same options and num_samples = K; `whole_set_options` names options that differ.
        embeddings: (K, D) per field, the same on every rank, with ids.
        global_batch_size: B; divides K, and is a multiple of the number of ranks.
        partitions: random ones, at least 2.
        seed: of the partitions.
        ages: (K,) of any unit, how long ago each sample was visited; negative: never.
        layer: a linear map of gradients with respect to all K rows of every view, such as that to the gradient of the
            last layer's parameters; the same on every rank. Where it gives nothing there are no numbers of it.

    Returns:
        For an objective with averages per sample, or with a network that estimates (`Predicts`), `estimator_error`, the
        median of |u - g| / g, `estimator_error_p90`,
        its 90th percentile (the mean says little: g may be tiny), `estimator_log_ratio`, the mean of log(u / g), all
        over entries that were visited, and `estimator_visited`, their share. For every objective `gradient_cosine`,
        `gradient_norm_ratio` |g| / |G|; `expected_gradient_cosine`, `expected_gradient_norm_ratio` of E g, left out
        where the estimates of E g contradict one another; `gradient_bias` and `gradient_noise`. With `layer` the same
        numbers of what it makes, `layer_gradient_cosine` and so on. With `ages`, `estimator_error_age_1` to `_10`: the
        median error of the tenth of the samples that were visited last, to that of those visited longest ago.
    """
    ids, text_ids = embeddings.ids, embeddings.text_ids
    assert ids is not None, "the probe gives every sample its id"
    K = len(ids)
    numbered = {"image": ids, "text": ids if text_ids is None else text_ids}
    rows = {side: of.unique(return_inverse=True)[1] for side, of in numbered.items()}  # (K,) below K
    stored = {side: _carry_over(objective, whole, side, numbered[side], rows[side]) for side in SIDES}
    for one, other in zip(objective.layers or (), whole.layers or (), strict=True):
        for side in SIDES:
            _carry_over(one, other, side, numbered[side], rows[side])

    whole.train()
    whole.set_epoch(objective.epoch)
    everything = torch.arange(K, device=ids.device)
    if whole.stores_features:
        _gradient(whole, embeddings, [everything], rows)  # what it stores is then of the present
    G = _gradient(whole, embeddings, [everything], rows)
    pairs = [(stored[side], _column(whole, side, rows[side])) for side in SIDES]
    if isinstance(objective, Predicts) and isinstance(whole, Predicts) and objective.predicts:
        pairs = _predicted(objective, whole, embeddings, numbered, rows, global_batch_size)
    found = _estimator_error(pairs, ages)

    generator = torch.Generator().manual_seed(seed)
    was_training = objective.training
    objective.eval()  # reads its state and leaves it as it is
    try:
        gs = [
            _gradient(objective, embeddings, list(order.to(ids.device).split(global_batch_size)), numbered)
            for order in (torch.randperm(K, generator=generator) for _ in range(partitions))
        ]
    finally:
        objective.train(was_training)
    found |= _likeness(G, gs)
    if layer is not None and (of_whole := layer(G)):
        of_layer = _likeness(of_whole, [layer(g) for g in gs])
        found |= {f"layer_{key}": value for key, value in of_layer.items()}
    return found


@runtime_checkable
class Predicts(Protocol):
    """An objective that keeps no estimates but computes them: see `NeuCLIP.log_means`."""

    @property
    def predicts(self) -> bool: ...

    def log_means(self, embeddings: Embeddings, trained_with: int) -> tuple[Tensor, Tensor]: ...


def _predicted(
    objective: Predicts,
    whole: Predicts,
    embeddings: Embeddings,
    ids: dict[str, Tensor],
    rows: dict[str, Tensor],
    B: int,
) -> list[tuple[Tensor | None, Tensor | None]]:
    """What it estimates of all K samples, and what they say themselves, (K,) of images and of texts."""
    share = len(ids["image"]) // world_size()
    mine = slice(rank() * share, (rank() + 1) * share)
    flat = {name: x if is_shared(name) else x[mine] for name, x in embeddings.flat().items()}
    found: list[tuple[Tensor, Tensor]] = []
    for one, numbers_of in ((objective, ids), (whole, rows)):
        told = {"ids": numbers_of["image"][mine], "text_ids": numbers_of["text"][mine]}
        found.append(one.log_means(Embeddings.from_flat({**flat, **told}), B))
    return [(all_gather(a), all_gather(b)) for a, b in zip(*found, strict=True)]


def _carry_over(objective: Objective, whole: Objective, side: str, ids: Tensor, rows: Tensor) -> Tensor | None:
    """Give `whole` the present temperatures of its samples; returns the stored estimates, (K,) or (K, width)."""
    state, new = getattr(objective, f"{side}_state", None), getattr(whole, f"{side}_state", None)
    if not _estimates(state):
        return None
    assert isinstance(new, SampleState)
    share = len(ids) // world_size()
    mine = state.visit(ids[rank() * share : (rank() + 1) * share]).read()
    columns = {name: all_gather(column) for name, column in mine.items()}
    for name in set(columns) - {ESTIMATE}:
        table: Tensor = getattr(new, name)
        table[rows.to(table.device)] = columns[name].to(table).expand(-1, *table.shape[1:])
    return columns[ESTIMATE]


def _column(objective: Objective, side: str, rows: Tensor) -> Tensor | None:
    state = getattr(objective, f"{side}_state", None)
    return state.column(ESTIMATE)[rows.cpu()].to(rows.device) if _estimates(state) else None


def _estimates(state: object) -> TypeGuard[SampleState]:
    return isinstance(state, SampleState) and ESTIMATE in state.columns


def _estimator_error(sides: list[tuple[Tensor | None, Tensor | None]], ages: Tensor | None) -> dict[str, float]:
    log_ratios: list[Tensor] = []  # (K, width) each: log(u / g), -inf where never visited
    for log_u, log_g in sides:
        if log_u is not None and log_g is not None:
            log_ratios.append(log_u.reshape(len(log_u), -1) - log_g.reshape(len(log_g), -1))
    if not log_ratios:
        return {}
    by_sample = torch.cat(log_ratios, 1).double()
    log_ratio = by_sample.flatten()
    visited = log_ratio.isfinite()
    share = {"estimator_visited": visited.double().mean()}
    if not visited.any():
        return dict(numbers(**share))
    log_ratio = log_ratio[visited]
    error = log_ratio.expm1().abs()
    return dict(numbers(
        estimator_error=_percentile(error, 50), estimator_error_p90=_percentile(error, 90),
        estimator_log_ratio=log_ratio.mean(), **share, **({} if ages is None else _by_age(by_sample, ages)),
    ))  # fmt: skip


def _by_age(log_ratios: Tensor, ages: Tensor) -> dict[str, Tensor]:
    """The median error of each tenth of the visited samples, the youngest first; nothing for fewer than ten.

    Args:
        log_ratios: (K, entries of a sample).
        ages: (K,), negative where never visited.
    """
    visited = (ages >= 0) & log_ratios.isfinite().all(1)
    order = ages[visited].argsort(stable=True)
    if len(order) < TENTHS:
        return {}
    errors = log_ratios[visited][order].expm1().abs()
    tenths = errors.tensor_split(TENTHS)
    return {f"estimator_error_age_{k}": _percentile(x.flatten(), 50) for k, x in enumerate(tenths, 1)}


def _percentile(x: Tensor, percent: float) -> Tensor:
    """torch.quantile takes 16 million numbers at most; the probe may be larger."""
    return x.kthvalue(max(1, math.ceil(percent / 100 * len(x)))).values


def _gradient(objective: Objective, embeddings: Embeddings, batches: list[Tensor], ids: dict[str, Tensor]) -> Gradient:
    """Gradient of the mean over these batches with respect to all K rows of every view, the same on every rank.

    Args:
        batches: (B,) each, the rows of one global batch, of which this rank takes its share.
        ids: by modality, (K,), as this objective's state counts them.
    """
    flat = embeddings.flat()
    encoded = [
        name for name in flat if name.partition(".")[0] in KINDS and takes_gradient(name) and not is_shared(name)
    ]
    total = {name: torch.zeros_like(flat[name]) for name in encoded}
    for batch in batches:
        b = len(batch) // world_size()
        mine = batch[rank() * b : (rank() + 1) * b]
        rows = {name: x if is_shared(name) else x[mine] for name, x in flat.items()}
        leaves = {name: rows[name].requires_grad_() for name in encoded}
        with torch.enable_grad():
            seen = Embeddings.from_flat({**rows, "ids": ids["image"][mine], "text_ids": ids["text"][mine]})
            value = objective(seen).value
            value.backward()
        for name, x in leaves.items():
            if x.grad is not None:  # of the sum over ranks of their means: W times that of the global mean
                total[name][mine] += x.grad / (world_size() * len(batches))
    return {name: all_sum(x) for name, x in total.items()}


def _dot(a: Gradient, b: Gradient) -> Tensor:
    return torch.stack([(a[name].double() * b[name].double()).sum() for name in a]).sum()


def _likeness(G: Gradient, gs: list[Gradient]) -> dict[str, float]:
    norm = _dot(G, G).sqrt()
    norms = torch.stack([_dot(g, g).sqrt() for g in gs])
    along = torch.stack([_dot(g, G) for g in gs]) / norm  # component of each estimate in the direction of G
    found = dict(numbers(gradient_cosine=(along / norms).mean(), gradient_norm_ratio=norms.mean() / norm))
    pairs = [(i, j) for i in range(len(gs)) for j in range(i)]
    squared = float(torch.stack([_dot(gs[i], gs[j]) for i, j in pairs]).mean())  # of E g
    length, shadow = float(norm), float(along.mean())  # |G|, and E g . G / |G|
    variance, off = float(norms.square().mean()) - squared, squared - 2 * shadow * length + length**2
    scale = 1 / length if length else math.nan  # no number is relative to a gradient of 0
    found |= {"gradient_noise": _root(variance) * scale, "gradient_bias": _root(off) * scale}
    if squared > 0:
        expected = math.sqrt(squared)
        found["expected_gradient_cosine"] = float(along.mean()) / expected
        found["expected_gradient_norm_ratio"] = expected * scale
    return found


def _root(x: float) -> float:
    """Of a square that is only estimated, and may come out below 0."""
    return math.sqrt(max(x, 0.0))
