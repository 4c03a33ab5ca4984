"""Masks, margins and a queue in objectives of several log-sums: by whole matrices with holes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from amclr_scale.config.objective_options import declared
from amclr_scale.errors import UserError
from amclr_scale.types import Embeddings
from tests.objectives.banks.plain import banks_of
from tests.objectives.harness import B, D, assert_same, defined, global_batch, joined, make, my_rows, run
from tests.objectives.test_family import decoupled

EYE = torch.eye(B, dtype=torch.bool)
MARGIN = 0.02
MASKS = {"mask_duplicates": "both", "false_negative_margin": MARGIN}
BATCH = {"copies": True, "views": 2, "negatives": 2, "tokens": True}
ONCE = (0.0,)


def duplicates(e: Embeddings) -> Tensor:
    """(B, B), without the diagonal."""
    ids, words = e.ids, e.text_content
    return ((ids[:, None] == ids) | (words[:, None] == words)) & ~EYE


def above(s: Tensor, positive: Tensor, margin: float | None = MARGIN) -> Tensor:
    return s > positive.detach()[:, None] + (9 if margin is None else margin)


def kept(x: Tensor, drop: Tensor) -> Tensor:
    """Log-sums (n,) of what is not dropped; -inf, without gradient, where nothing is left."""
    some = ~drop.all(1)
    found = torch.where(some[:, None], x.masked_fill(drop, -torch.inf), 0.0).logsumexp(1)
    return torch.where(some, found, -torch.inf)


def sides(e: Embeddings, text: Tensor | None = None) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Similarities, positives, and what is left out beside the positives, of either direction."""
    s = e.image @ (e.text if text is None else text).T
    return [(m, m.diagonal(), duplicates(e) | above(m, m.diagonal()) & ~EYE) for m in (s, s.T)]


def clip(e: Embeddings, t: Any) -> Tensor:
    return sum((kept(s / t, drop) - p / t).mean() for s, p, drop in sides(e)) / 2


def nt_xent(a: Tensor, b: Tensor, t: float, e: Embeddings) -> Tensor:
    rows = torch.cat([a, b])
    s, own = rows @ rows.T, torch.eye(2 * B, dtype=torch.bool)
    pair = own.roll(B, 0)
    positive = s[pair]
    drop = duplicates(e).repeat(2, 2) | above(s, positive)
    return (kept(s / t, (drop & ~pair) | own) - positive / t).mean()


def slip(e: Embeddings, t: Any) -> Tensor:
    return clip(e, t) + 0.5 * nt_xent(*e.image_views[:2], 0.2, e) + 2.0 * nt_xent(*e.text_views[:2], 0.2, e)


def one_to_k(e: Embeddings, t: Any) -> Tensor:
    found = [sides(e, text) for text in (e.text, *e.text_views)]
    of_image, of_text = zip(*found, strict=True)
    every = torch.cat([(s / t).masked_fill(drop, -torch.inf) for s, _, drop in of_image], 1).logsumexp(1)
    own = torch.stack([p / t for _, p, _ in of_image])
    texts = torch.stack([kept(s / t, drop) - p / t for s, p, drop in of_text])
    return ((every - own.mean(0)).mean() + texts.mean()) / 2


def negclip(e: Embeddings, t: Any) -> Tensor:
    (s, p, drop), (back, _, other) = sides(e)
    there = zip(e.text_negatives, e.text_negative_mask.T, strict=True)
    wrong = torch.cat([e.image @ rows[those].T / t for rows, those in there], 1)
    of_image = torch.logaddexp(kept(s / t, drop), wrong.logsumexp(1)) - p / t
    return (of_image + kept(back / t, other) - p / t).mean() / 2


def mixed_points(e: Embeddings, share: float) -> tuple[Tensor, Tensor]:
    """The points, and the pairs' cosines."""
    cosine = (e.image * e.text).sum(1)
    theta = cosine.acos()[:, None]
    return ((share * theta).sin() * e.image + ((1 - share) * theta).sin() * e.text) / theta.sin(), cosine


def m2_mixup(e: Embeddings, t: Any, margin: float | None = MARGIN, masked: bool = True) -> Tensor:
    """Beside CLIP's part, with as much weight."""
    points, p = mixed_points(e, SHARE)
    parts = []
    for anchors in (e.image, e.text):
        s = anchors @ points.T
        drop = (duplicates(e) & masked) | above(s, p, margin) | EYE
        x = kept((s - p[:, None]) / 0.07, drop)
        parts.append(torch.where(x.isinf(), 0.0, F.softplus(x, threshold=1e9)).mean())
    return parts[0] + parts[1]


SHARE = 0.3


def debiased(prior: float, hardness: float) -> Callable[[Embeddings, Any], Tensor]:
    def value(e: Embeddings, t: Any) -> Tensor:
        total = 0
        for s, p, drop in sides(e):
            n = (~duplicates(e) & ~EYE).sum(1)
            x = (s - p[:, None]) / t
            some = ~(drop | EYE).all(1)
            sums = [kept(x * f, drop | EYE) for f in (1 + hardness, hardness)]
            log_g = sums[0] - (sums[1] if hardness else n.double().log())
            left = torch.maximum((log_g.exp() - prior) / (1 - prior), (-(1 + p) / t).exp())
            total = total + torch.where(some, (n * left + 1).log(), 0.0).mean() / 2
        return total

    return value


def filip(e: Embeddings, t: Any) -> Tensor:
    best = []
    for a, b in (("image", "text"), ("text", "image")):
        anchors, keys = getattr(e, f"{a}_tokens"), getattr(e, f"{b}_tokens")
        products = torch.einsum("ikd,jrd->ijkr", anchors, keys)
        products = products.masked_fill(~getattr(e, f"{b}_token_mask")[None, :, None], -torch.inf)
        there = getattr(e, f"{a}_token_mask")
        best.append((products.amax(3) * there[:, None]).sum(2) / there.sum(1)[:, None])
    drops = [duplicates(e) | above(s, s.diagonal()) & ~EYE for s in best]
    assert all((drop & ~duplicates(e)).any() for drop in drops)
    return sum((kept(s / t, drop) - s.diagonal() / t).mean() for s, drop in zip(best, drops, strict=True)) / 2


CASES: list[tuple[str, dict[str, Any], Callable[[Embeddings, Any], Tensor]]] = [
    ("simclr", {"temperature": None}, lambda e, t: nt_xent(e.image, e.image_views[0], t, e)),
    ("slip", {"intra_image": 0.5, "intra_text": 2.0, "intra_temperature": 0.2}, slip),
    ("one_to_k", {"texts": 3}, one_to_k),
    ("negclip", {"negatives": 2}, negclip),
    ("m2_mixup", {"mix_weight": 1.0}, lambda e, t: clip(e, t) + m2_mixup(e, t)),
    ("debiased", {"prior": 0.05}, debiased(0.05, 0.0)),
    ("filip", {}, filip),
    ("debiased", {"prior": 0.05, "hardness": 0.5}, debiased(0.05, 0.5)),
]


def same(name: str, options: dict[str, Any], value: Callable[[Embeddings, Any], Tensor]) -> None:
    def definition(state: Any, e: Embeddings, step: int) -> tuple[Tensor, Tensor]:
        found = value(e, 1 / e.logit_scale).squeeze()
        return found, found

    assert_same(run(name, options, batch=BATCH, epochs=ONCE), defined(definition, batch=BATCH, epochs=ONCE))


@pytest.fixture(autouse=True)
def _share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amclr_scale.objectives.m2_mixup.place", lambda *_: SHARE)


@pytest.mark.parametrize(("name", "options", "value"), CASES, ids=lambda x: str(x) if isinstance(x, str | dict) else "")
def test_masks_and_margins_are_holes_in_the_matrices(name, options, value):
    e = global_batch(0, **BATCH)
    assert duplicates(e).any()
    assert any((drop & ~duplicates(e)).any() for _, _, drop in sides(e))
    same(name, {**options, **MASKS}, value)


def test_ranks_leave_out_the_same_tokens(ranks):
    def definition(state: Any, e: Embeddings, step: int) -> tuple[Tensor, Tensor]:
        return (found := filip(e, 1 / e.logit_scale).squeeze()), found

    got = joined(ranks(2, run, "filip", MASKS, chunk=9, batch=BATCH, epochs=ONCE))
    assert_same(got, defined(definition, batch=BATCH, epochs=ONCE))


def test_an_anchor_without_keys_says_nothing_to_debiased():
    for options in ({}, {"hardness": 0.7}):
        e = my_rows(global_batch(0))
        e.given["text_content"] = torch.zeros(B, dtype=torch.int64)
        loss = make("debiased", mask_duplicates="text", **options)(e).value
        loss.backward()
        assert loss.item() == 0
        assert not e.image.grad.any()


def one_way(e: Embeddings, t: Any, side: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """Both directions of `side(logits, pairs, pairs' logits)`, whose keys have no gradient."""
    found = []
    for a, k in ((e.image, e.text.detach()), (e.text, e.image.detach())):
        p = (a * k).sum(1)
        found.append(side(a @ k.T / t, p, p / t))
    return found[0] + found[1]


def clip_one_way(e: Embeddings, t: Any) -> Tensor:
    return one_way(e, t, lambda x, _, p: (x.logsumexp(1) - p).mean() / 2)


def dclw(e: Embeddings, t: Any) -> Tensor:
    def side(x: Tensor, s: Tensor, p: Tensor) -> Tensor:
        density = (s / 0.5).exp()
        return (x.masked_fill(EYE, -torch.inf).logsumexp(1) - (2 - density / density.mean()) * p).mean()

    return one_way(e, t, side)


@pytest.mark.parametrize(
    ("name", "options", "value"),
    [
        ("uniformity", {"uniformity": 0.0, "cross_uniformity": 0.0},
         lambda e, t: clip_one_way(e, t) + (2 - 2 * (e.image * e.text).sum(1)).mean()),
        ("dclw", {"temperature": None}, dclw),
        ("m2_mixup", {"mix_weight": 1.0}, lambda e, t: clip_one_way(e, t) + m2_mixup(e, t, None, masked=False)),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_keys_without_gradient_are_those_of_the_log_sums_alone(name, options, value):
    same(name, {**options, "queue": {"size": 13, "key_gradient": False}}, value)


def test_an_image_meets_a_queue_of_texts_once():
    def definition(state: Any, e: Embeddings, step: int) -> tuple[Tensor, Tensor]:
        t, banks, value = 1 / e.logit_scale, banks_of(state, 13, "empty"), 0
        x = [e.image @ text.T / t for text in (e.text, e.text_views[0])]
        images = (e.image @ banks[1].keys().T / t).masked_fill(banks[1].same(e.ids), -torch.inf)
        own = torch.stack([y.diagonal() for y in x])
        value = torch.cat([*x, images], 1).logsumexp(1).mean() - own.mean()
        for y, rows, p in zip(x, (e.text, e.text_views[0]), own, strict=True):
            further = (rows @ banks[0].keys().T / t).masked_fill(banks[0].same(e.ids), -torch.inf)
            value = value + (torch.cat([y.T, further], 1).logsumexp(1) - p).mean() / 2
        for bank, rows in zip(banks, (e.image, e.text), strict=True):
            bank.put(rows, e.ids)
        return value.squeeze() / 2, value.squeeze() / 2

    options, batch = {"texts": 2, "queue": {"size": 13}}, {"views": 1}
    assert_same(run("one_to_k", options, batch=batch), defined(definition, batch=batch))


def test_pairs_of_one_group_come_in_blocks(monkeypatch):
    monkeypatch.setattr("amclr_scale.similarity.groups.PAIR_NUMBERS", 3 * D)
    assert_same(
        run("decoupled", {"positives": "label"}, epochs=ONCE), defined(decoupled, epochs=ONCE)
    )  # of 8 anchors and about 20 pairs


@pytest.mark.parametrize("name", ["swav", "barlip", "siamlip"])
def test_masks_are_of_clips_part(name):
    for options in (MASKS, {"queue": {"size": 16}}, {"false_negative_margin": 0.1}):
        with pytest.raises(UserError, match=r"^clip: expected more than 0 with masks or a queue"):
            make(name, clip=0.0, **options)


def test_negatives_are_counted():
    for name, options, n in (
        ("one_to_k", {"texts": 3}, 3 * (B - 1)),
        ("negclip", {"negatives": 2}, B - 1 + 2 * B),
        ("supcon", {}, B - 1),
        ("supcon", {"between": "text"}, 2 * B - 2),
        ("simclr", {}, 2 * B - 2),
        ("swav", {"clip": 0.0}, 0),
    ):
        assert declared({"name": name, **options}).negatives(B) == n, name


def test_a_beta_that_python_cannot_draw_from_is_refused():
    for beta in (1e-30, 1e30):
        with pytest.raises(UserError, match=r"^mix_beta: expected a number from 0\.01 to 1000, got"):
            make("m2_mixup", mix_beta=beta)


@pytest.mark.parametrize(("name", "part"), [("m2_mixup", "mixup"), ("slip", "intra")])
def test_a_queue_is_of_clips_part(name, part):
    with_queue, without = make(name, queue={"size": 13}), make(name)
    for step in range(2):
        found, plain = (x(my_rows(global_batch(step, views=2))).metrics for x in (with_queue, without))
        assert found[part] == plain[part]
    assert found["clip"] > plain["clip"] + 0.01


def test_another_objective_that_computes_the_same_has_the_same_masks():
    for name, options in (("clip", {"group_size": B}), ("debiased", {"prior": 0.0}), ("sogclr", {"gamma": 1.0})):
        equal = declared({"name": name, **options, **MASKS}).equals(B)
        assert equal is not None
        assert MASKS.items() <= dict(equal.options).items(), name
    assert declared({"name": "fifo_bank", "size": 0}).equals(B).name == "clip"
    assert declared({"name": "fifo_bank", "size": 0, "key_gradient": False}).equals(B) is None


def test_volumes_of_rounded_rows_that_agree_stay_finite():
    rows = F.normalize(torch.randn(B, 64), dim=1).bfloat16()  # lengths are 1 but for 0.004
    e = Embeddings(rows.clone().requires_grad_(), rows.clone().requires_grad_(), logit_scale=torch.tensor([10.0]))
    assert (e.image.float().square().sum(1) > 1 + 1e-5).any()
    loss = make("gram")(e)
    loss.value.backward()
    assert loss.value.isfinite()
    assert e.image.grad.isfinite().all()
