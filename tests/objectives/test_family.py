"""Objectives with several positives, more views or corrected negatives are their definitions, and one another."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from amclr_scale.types import Embeddings
from tests.objectives.harness import B, assert_same, defined, global_batch, joined, make, my_rows, off_diagonal, run

EYE = torch.eye(B, dtype=torch.bool)
Side = Callable[[Tensor, Tensor, Tensor, Any], Tensor]


def both_ways(side: Side, e: Embeddings, t: Any) -> tuple[Tensor, Tensor]:
    """The mean over both directions of a loss per row, from x = s / t."""
    s = e.image @ e.text.T
    value = (side(s / t, s, e, t) + side(s.T / t, s.T, e, t)).mean() / 2
    return value, value


def softmax(x: Tensor) -> Tensor:
    return x.logsumexp(1) - x.diagonal()


def nt_xent(a: Tensor, b: Tensor, t: Any) -> Tensor:
    rows = torch.cat([a, b])
    x = off_diagonal(rows @ rows.T / t)
    pairs = x[torch.arange(2 * B), torch.arange(2 * B).roll(B)]
    return (x.logsumexp(1) - pairs).mean()


def simclr(state, e, step):
    value = nt_xent(e.text, e.text_views[0], 0.1)
    return value, value


def slip(state, e, step):
    clip = both_ways(lambda x, *_: softmax(x), e, 1 / e.logit_scale)[0]
    value = clip + 0.5 * nt_xent(*e.image_views[:2], 0.2) + 2.0 * nt_xent(*e.text_views[:2], 0.2)
    return value, value


def with_positives(x: Tensor, same: Tensor, log: str) -> Tensor:
    """SupCon of rows x with -inf where there is no key."""
    n, everything = same.sum(1), x.logsumexp(1)
    if log == "out":
        return everything - torch.where(same, x, 0.0).sum(1) / n
    return everything - x.masked_fill(~same, -torch.inf).logsumexp(1) + n.double().log()


def supcon(log: str, inside: bool):
    def definition(state, e, step):
        same = e.labels[:, None] == e.labels
        if not inside:
            return both_ways(lambda x, *_: with_positives(x, same, log), e, 0.07)
        rows = torch.cat([e.image, e.image_views[0]])
        same = same.repeat(2, 2) & ~torch.eye(2 * B, dtype=torch.bool)
        value = with_positives(off_diagonal(rows @ rows.T / 0.07), same, log).mean()
        return value, value

    return definition


def decoupled(state, e, step):
    same = e.labels[:, None] == e.labels

    def rows(x, *_):
        negatives = x.masked_fill(same, -torch.inf).logsumexp(1, keepdim=True)
        return (torch.where(same, F.softplus(negatives - x, threshold=1e9), 0.0)).sum(1) / same.sum(1)

    return both_ways(rows, e, 1 / e.logit_scale)


def one_to_k(siblings: str):
    def definition(state, e, step):
        x = torch.stack([e.image @ t.T * e.logit_scale for t in (e.text, *e.text_views[:2])])  # (K, B, B)
        own, texts = x.diagonal(dim1=1, dim2=2), x.mT  # (K, B)
        if siblings == "keep":
            of_image = torch.cat(list(x), 1).logsumexp(1) - own.mean(0)
        else:
            rest = torch.cat([y.masked_fill(EYE, -torch.inf) for y in x], 1).logsumexp(1)
            of_image = (rest.exp() / own.exp() + 1).log().mean(0)
        value = (of_image.mean() + (texts.logsumexp(2) - own).mean()) / 2
        return value, value

    return definition


def siglip_plus(state, e, step):
    y = 2.0 * (e.text_content[:, None] == e.text_content) - 1
    r = e.logit_scale * (e.image @ e.text.T) + e.logit_bias
    value = torch.logaddexp(-y * r, torch.zeros_like(r)).sum() / B
    return value, value


def debiased(prior: float, hardness: float, t: float):
    def rows(x, s, e, _):
        negatives, positive = off_diagonal(x).exp(), x.diagonal().exp()
        weights = off_diagonal(hardness * x).exp()
        mean = (negatives * weights).sum(1) / weights.sum(1)
        least = torch.tensor(-1 / t, dtype=torch.float64).exp()
        left = torch.maximum((mean - prior * positive) / (1 - prior), least)
        return ((positive + (B - 1) * left) / positive).log()

    return lambda state, e, step: both_ways(rows, e, t)


VIEWS = {"views": 2}
CASES: list[tuple[str, dict[str, Any], Any, dict[str, Any]]] = [
    ("simclr", {"modality": "text"}, simclr, VIEWS),
    ("slip", {"intra_image": 0.5, "intra_text": 2.0, "intra_temperature": 0.2}, slip, VIEWS),
    ("supcon", {}, supcon("out", False), {}),
    ("supcon", {"log": "in"}, supcon("in", False), {}),
    ("supcon", {"between": "image"}, supcon("out", True), VIEWS),
    ("supcon", {"between": "image", "log": "in"}, supcon("in", True), VIEWS),
    ("decoupled", {"positives": "label"}, decoupled, {}),
    ("one_to_k", {"texts": 3}, one_to_k("keep"), VIEWS),
    ("one_to_k", {"texts": 3, "siblings": "mask"}, one_to_k("mask"), VIEWS),
    ("siglip_plus", {"positives": "text"}, siglip_plus, {}),
    ("debiased", {"temperature": 0.1, "prior": 0.3}, debiased(0.3, 0.0, 0.1), {}),
    ("debiased", {"temperature": 0.1, "prior": 0.01, "hardness": 0.7}, debiased(0.01, 0.7, 0.1), {}),
]


IDS = [f"{case[0]}-{case[1]}" for case in CASES]
ONCE = (0.0,)  # nothing is kept from step to step


@pytest.mark.parametrize(("name", "options", "definition", "batch"), CASES, ids=IDS)
def test_matches_its_definition(name, options, definition, batch):
    want = defined(definition, batch=batch)
    for chunk in (3, "auto"):
        assert_same(run(name, options, chunk=chunk, batch=batch), want)


def all_of_them(chunk):
    return [run(name, options, chunk=chunk, batch=batch, epochs=ONCE) for name, options, _, batch in CASES]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_are_one_batch(ranks, world_size):
    answers = ranks(world_size, all_of_them, 2)
    for (_, _, definition, batch), *parts in zip(CASES, *answers, strict=True):
        assert_same(joined(parts), defined(definition, batch=batch, epochs=ONCE))


def test_debiasing_meets_its_bound():
    """Both branches are in the case above."""
    e = global_batch(0)
    s = e.image @ e.text.T
    mean = off_diagonal((s - s.diagonal()[:, None]) / 0.1).exp().sum(1) / (B - 1)
    assert 0 < (mean < 0.3).sum() < B


ALIKE = [
    ("supcon", {"between": "image", "log": "in"}, "simclr", {"temperature": 0.07}, 1e-12),
    ("supcon", {"between": "text"}, "simclr", {"temperature": 0.07, "modality": "text"}, 1e-12),
    ("supcon", {"temperature": None}, "clip", {}, 1e-12),
    ("decoupled", {"positives": "label"}, "clip", {}, 1e-12),
    ("siglip_plus", {"positives": "label"}, "siglip", {}, 1e-12),
    ("one_to_k", {"texts": 1}, "clip", {}, 1e-12),
    ("one_to_k", {"texts": 1, "siblings": "mask"}, "clip", {}, 1e-12),
    ("debiased", {"prior": 0.0}, "clip", {}, 1e-12),
    ("slip", {"intra_image": 0.0}, "clip", {}, 1e-12),
]


@pytest.mark.parametrize(("name", "options", "other", "others", "tolerance"), ALIKE, ids=str)
def test_without_its_addition_it_is_another(name, options, other, others, tolerance, monkeypatch):
    """Where every label is unique, or K is 1, or nothing is corrected: values and gradients."""
    original = global_batch

    def alone(step, **batch):
        e = original(step, **batch)
        e.given["labels"] = torch.where(torch.arange(B) < 3, -1, torch.arange(B))  # negative: of no class
        return e

    monkeypatch.setattr("tests.objectives.harness.global_batch", alone)
    got, want = run(name, options, batch=VIEWS), run(other, others, batch=VIEWS)
    assert_same(got, want, tolerance)
    assert want[0][0].rows["image" if others.get("modality") != "text" else "text"].abs().max() > 1e-3


def test_small_temperatures_stay_finite():
    for name, options, _, _ in CASES:
        e = my_rows(global_batch(0, views=2, scale=200.0)).map(
            lambda _, x: x.detach().float().requires_grad_() if x.is_floating_point() else x
        )
        kept = {key: value for key, value in options.items() if "temperature" not in key}
        cold = {key: 0.005 for key in ("temperature", "intra_temperature") if key in options}
        loss = make(name, **kept, **cold)(e)
        loss.value.backward()
        assert loss.value.isfinite(), name
        assert all(x.grad.isfinite().all() for x in e.flat().values() if x.grad is not None), name
