"""Objectives with several positives, more views or corrected negatives are their definitions, and one another."""

import random
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from amclr_scale.types import Embeddings
from tests.objectives.harness import B, assert_same, defined, global_batch, joined, make, my_rows, off_diagonal, run
from tests.objectives.taught import (
    barlip,
    byolip,
    count,
    cwcl,
    degla,
    distill,
    filip,
    m3col,
    mochi,
    negclip,
    negclip_of_both,
    siamlip,
    softmax_of,
    swav,
)

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


def volume(*vectors: Tensor) -> Tensor:
    """(B, B), of unit rows that broadcast, by the determinant of their Gram matrix: ones on its diagonal."""
    stacked = torch.stack(torch.broadcast_tensors(*vectors), -2)  # (B, B, n, D)
    ones = torch.eye(len(vectors), dtype=torch.float64)
    return (((stacked @ stacked.mT) * (1 - ones) + ones).det().clamp(min=0) + 1e-6).sqrt()


def gram(third: str | None, smoothing: float):
    def definition(state, e, step):
        others = [] if third is None else [getattr(e, f"{third}_views")[0][None]]
        x = -volume(e.text[:, None], e.image[None], *others) * e.logit_scale
        target = (1 - smoothing) * EYE.double() + smoothing / B
        value = -((target * x.log_softmax(1)).sum() + (target * x.T.log_softmax(1)).sum()) / (2 * B)
        return value, value

    return definition


def m2_mixup(t: float, beta: float, scheduled: bool):
    def definition(state, e, step):
        share = random.Random(f"7 {EPOCHS[step]!r}").betavariate(beta, beta)
        theta = (e.image * e.text).sum(1).acos()[:, None]
        mixed = ((share * theta).sin() * e.image + ((1 - share) * theta).sin() * e.text) / theta.sin()
        own = (e.image * e.text).sum(1) / t
        x = [off_diagonal(a @ mixed.T / t) for a in (e.image, e.text)]
        parts = [(m.logsumexp(1).exp() / own.exp() + 1).log().mean() for m in x]
        weight = 0.3 / (1 + int(EPOCHS[step])) if scheduled else 0.3
        value = softmax_of(e, 0.1) + weight * (parts[0] + parts[1])
        return value, value

    return definition


def cacr(state, e, step):
    value = 0.0
    for anchors, positives in ((e.image, (e.text, e.text_views[0])), (e.text, (e.image, e.image_views[0]))):
        near = torch.stack([2 - 2 * (anchors * x).sum(1) for x in positives], 1)  # squared distances of unit rows
        away = 2 - 2 * anchors @ positives[0].T
        weights = off_diagonal(-1.5 * away).softmax(1)
        near_weights = (0.6 * near).softmax(1)
        value = value + (0.8 * (near_weights * near).sum(1) - 0.5 * (weights * away).sum(1)).mean() / 2
    return value, value


def rankclip(most: float):
    def list_mle(e, pred, true):
        total = 0.0
        for row, order in zip(pred * e.logit_scale, true.argsort(stable=True, dim=1, descending=True), strict=True):
            x = row[order]
            total = total + sum(x[k:].logsumexp(0) - x[k] for k in range(B))
        return total / B

    def definition(state, e, step):
        z, t = e.image @ e.image.T, e.text @ e.text.T
        s = e.image @ e.text.T
        lists = list_mle(e, z, t) + list_mle(e, t, z) + list_mle(e, s, s.T) + list_mle(e, s.T, s)
        value = softmax_of(e, 1 / e.logit_scale) + min(3 * int(EPOCHS[step]) / 4, most) * lists / (32 * B)
        return value, value

    return definition


EPOCHS = (0.0, 0.4, 1.2, 2.0, 3.9)
VIEWS = {"views": 2}
HEADS = {"heads": True}
GROUNDING = {"image_weight": 0.2, "text_weight": 0.3, "text_temperature": 0.25}
SHARPNESS = {"positive_sharpness": 0.6, "negative_sharpness": 1.5}
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
    ("gram", {}, gram(None, 0.1), {}),
    ("gram", {"third": "image", "label_smoothing": 0.0}, gram("image", 0.0), VIEWS),
    ("gram", {"third": "text"}, gram("text", 0.1), VIEWS),
    ("m2_mixup", {"temperature": 0.1, "mix_weight": 0.3, "mix_seed": 7}, m2_mixup(0.07, 0.5, True), {}),
    (
        "m2_mixup",
        {
            "temperature": 0.1,
            "mix_weight": 0.3,
            "mix_seed": 7,
            "mix_temperature": 0.2,
            "mix_beta": 2.0,
            "mix_schedule": False,
        },
        m2_mixup(0.2, 2.0, False),
        {},
    ),
    ("cacr", {"omega": 1, "attraction": 0.8, "repulsion": 0.5, **SHARPNESS}, cacr, VIEWS),
    ("swav", {"temperature": 0.1, "clip": 0.5, "freeze_epochs": 0.0}, swav(0.5, False), HEADS),
    ("swav", {"clip": 0.0, "freeze_epochs": 9.0}, swav(0.0, True), HEADS),
    (
        "swav",
        {
            "clip": 0.0,
            "freeze_epochs": 0.0,
            "swap_weight": 0.7,
            "swap_temperature": 0.2,
            "epsilon": 0.3,
            "iterations": 2,
        },
        swav(0.0, False, 0.7, 0.2, 0.3, 2),
        HEADS,
    ),
    ("siamlip", {"temperature": 0.1, "clip": 0.7, "predict_weight": 0.3}, siamlip, HEADS),
    ("barlip", {"clip": 0.0, "weight": 0.04, "redundancy": 0.02}, barlip, HEADS),
    ("negclip", {"negatives": 2}, negclip, {"negatives": 2}),
    ("negclip", {"negatives": 2, "image_negatives": 2}, negclip_of_both, {"negatives": 2}),
    ("byolip", {"temperature": 0.1, "clip": 0.7, "predict_weight": 0.3}, byolip, HEADS),
    ("count", {"temperature": 0.1, "count_weight": 0.7, "negatives": 2}, count, {"negatives": 2}),
    ("degla", {"negatives": 2, "distill_weight": 0.5, **GROUNDING}, degla, {"negatives": 2}),
    ("distill", {}, distill("momentum", 0.4, None), {}),
    (
        "distill",
        {"teacher": "reference", "teacher_temperature": 0.2, "alpha": 0.8, "alpha_ramp_epochs": 2.0},
        distill("reference", (0.0, 0.16, 0.48, 0.8, 0.8), 0.2),
        {},
    ),
    ("mochi", {"hardest": 3, "mixed": 4, "mixed_with_anchor": 2, "mix_seed": 7}, mochi(3, 4, 2, EPOCHS), {}),
    ("cwcl", {}, cwcl("image"), {}),
    ("cwcl", {"reference": "both"}, cwcl("both"), {}),
    ("rankclip", {"ramp_epochs": 5.0, "weight": 1.3}, rankclip(1.3), {}),
    ("filip", {}, filip, {"tokens": True}),
    ("m3col", {"mix_seed": 7, "soft_epoch": 2.0, "soft_temperature": 0.3}, m3col(0.5, 2.0, EPOCHS, 0.1), {}),
    ("m3col", {"mix_seed": 7, "mix_share": 1.0, "temperature": None}, m3col(1.0, 9.0, EPOCHS, None), {}),
]


IDS = [f"{case[0]}-{case[1]}" for case in CASES]
ONCE = EPOCHS[:1]  # nothing is kept from step to step
defined_once = cache(lambda case: defined(CASES[case][2], batch=CASES[case][3], epochs=ONCE))


@pytest.mark.parametrize(("name", "options", "definition", "batch"), CASES, ids=IDS)
def test_matches_its_definition(name, options, definition, batch):
    want = defined(definition, batch=batch, epochs=EPOCHS)
    assert_same(run(name, options, chunk=3, batch=batch, epochs=EPOCHS), want)
    assert_same(run(name, options, batch=batch, epochs=ONCE), (want[0][:1], want[1]))


def all_of_them(chunk):
    return [run(name, options, chunk=chunk, batch=batch, epochs=ONCE) for name, options, _, batch in CASES]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_are_one_batch(ranks, world_size):
    answers = ranks(world_size, all_of_them, 2)
    for case, *parts in zip(range(len(CASES)), *answers, strict=True):
        assert_same(joined(parts), defined_once(case))


def test_debiasing_meets_its_bound():
    """Both branches are in the case above."""
    e = global_batch(0)
    s = e.image @ e.text.T
    mean = off_diagonal((s - s.diagonal()[:, None]) / 0.1).exp().sum(1) / (B - 1)
    assert 0 < (mean < 0.3).sum() < B


WEIGHTS = ("image_weight", "text_weight", "distill_weight")
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
    ("m2_mixup", {"mix_weight": 0.0}, "clip", {}, 1e-12),
    ("siamlip", {"predict_weight": 0.0}, "clip", {}, 1e-12),
    ("byolip", {"predict_weight": 0.0}, "clip", {}, 1e-12),
    ("count", {"count_weight": 0.0}, "clip", {}, 1e-12),
    ("distill", {"alpha": 0.0}, "clip", {}, 1e-12),
    ("mochi", {"mixed": 0, "mixed_with_anchor": 0}, "clip", {}, 1e-12),
    ("degla", {"negatives": 1, **dict.fromkeys(WEIGHTS, 0.0)}, "negclip", {}, 1e-12),
    ("swav", {"swap_weight": 0.0}, "clip", {}, 1e-12),
    ("barlip", {"weight": 0.0}, "clip", {}, 1e-12),
    ("rankclip", {"weight": 0.0}, "clip", {}, 1e-12),
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
    everything = {**VIEWS, **HEADS, "negatives": 1}
    got, want = (run(*which, batch=everything, epochs=(0.0, 0.0)) for which in ((name, options), (other, others)))
    assert_same(got, want, tolerance)
    assert want[0][0].rows["image" if others.get("modality") != "text" else "text"].abs().max() > 1e-3


def test_small_temperatures_stay_finite():
    for name, options, _, _ in CASES:
        e = my_rows(global_batch(0, views=2, scale=200.0, negatives=2, heads=True, tokens=True)).map(
            lambda _, x: x.detach().float().requires_grad_() if x.is_floating_point() else x
        )
        kept = {key: value for key, value in options.items() if "temperature" not in key}
        cold = {key: 0.005 for key in ("temperature", "intra_temperature", "mix_temperature") if key in options}
        loss = make(name, **kept, **cold)(e)
        loss.value.backward()
        assert loss.value.isfinite(), name
        assert all(x.grad.isfinite().all() for x in e.flat().values() if x.grad is not None), name
