"""AmCLR, xAmCLR and their robust forms are their definitions, for every kind of state."""

import math
from functools import cache

import pytest
import torch

from amclr_scale.types import Embeddings
from tests.objectives.harness import (
    NUM_SAMPLES,
    assert_same,
    close,
    defined,
    global_batch,
    joined,
    make,
    off_diagonal,
    run,
)


def lists(e: Embeddings, omega: int, intra: bool):
    """(anchors, keys) of the image list and of the text list, in the published order."""
    images, texts = [e.image, *e.image_views[:omega]], [e.text, *e.text_views[:omega]]
    image_list = [(z, t) for z in images for t in texts]
    text_list = [(t, z) for t in texts for z in images]
    if intra:
        for z, t in zip(images[1:], texts[1:], strict=True):
            image_list += [(images[0], z), (z, images[0])]
            text_list += [(texts[0], t), (t, texts[0])]
    return image_list, text_list


def definition(*, omega=1, state="per_pair", reduce="sum", intra_weight=None, t=0.05, gamma=0.8, dro=None):
    def loss(tables, e: Embeddings, step: int):
        value = objective = 0
        for side, pairs in zip(("image", "text"), lists(e, omega, intra_weight is not None), strict=True):
            n_cross, n = (1 + omega) ** 2, len(pairs)
            weights = [1.0] * n_cross + [intra_weight] * (n - n_cross)
            width = n if state == "per_pair" else 1

            def table(name, initial, side=side, width=width):
                full = torch.full((NUM_SAMPLES, width), initial, dtype=torch.float64)
                return tables.setdefault(f"{side}_state.{name}", full)

            log_us = table("log_u", -math.inf)
            old = log_us[e.ids].exp()  # (B, width)
            new = old.clone()
            ts = table("temperature", t)[e.ids] if dro else torch.full_like(old, t)
            gs, inners = [], []
            for k, (anchors, keys) in enumerate(pairs):
                tk = ts[:, k if width > 1 else 0].clone().requires_grad_()
                sim = anchors @ keys.T
                h = sim - sim.diagonal()[:, None]
                gs.append(off_diagonal(h / tk[:, None]).exp().sum(1) / (len(sim) - 1))
                (inner,) = torch.autograd.grad(gs[-1].sum(), tk, retain_graph=True)
                inners.append(inner)
            us = []
            for k, g in enumerate(gs):
                if state == "shared_mean":
                    g = sum(gs) / n  # noqa: PLW2901 - the mean takes the entry's place
                column, before = (k, old) if state == "per_pair" else (0, new if state == "shared_sequential" else old)
                unseen = old[:, column] == 0
                u = torch.where(unseen, g, (1 - gamma) * before[:, column] + gamma * g).detach()
                new[:, column] = u
                us.append(u)
            scale = sum(weights) if reduce == "mean" else 1
            rs = []
            for k, (g, u) in enumerate(zip(gs, us, strict=True)):
                tk = ts[:, k if width > 1 else 0].detach()
                value = value + weights[k] / scale * (tk * g / u).mean()
                objective = objective + weights[k] / scale * (tk * (u.log() + (dro["rho"] if dro else 0))).mean()
                rs.append((u.log() + (dro["rho"] if dro else 0) + tk * inners[k] / u).detach())
            for i, row in enumerate(e.ids.tolist()):
                log_us[row] = new[i].detach().log()
            if dro:
                shared = sum(w * r for w, r in zip(weights, rs, strict=True)) / sum(weights)
                r = torch.stack(rs, 1) if width > 1 else shared[:, None]
                v = 0.1 * table("v", 0.0)[e.ids] + 0.9 * r.clamp(-5, 5)
                for i, row in enumerate(e.ids.tolist()):
                    table("v", 0.0)[row] = v[i]
                    table("temperature", t)[row] = (ts[i] - dro["eta"] * v[i]).clamp(0.005, 0.2)
        return value, objective

    return loss


SETTINGS = [
    ("amclr", {}, {}),
    ("amclr", {"state": "shared_sequential"}, {"state": "shared_sequential"}),
    ("amclr", {"state": "shared_mean", "reduce": "mean"}, {"state": "shared_mean", "reduce": "mean"}),
    ("amclr", {"omega": 2, "reduce": "mean"}, {"omega": 2, "reduce": "mean"}),
    ("xamclr", {}, {"intra_weight": 1.0}),
    (
        "xamclr",
        {"state": "shared_sequential", "intra_weight": 0.3, "reduce": "mean"},
        {"state": "shared_sequential", "intra_weight": 0.3, "reduce": "mean"},
    ),
    ("xamclr", {"omega": 2, "state": "shared_mean"}, {"omega": 2, "state": "shared_mean", "intra_weight": 1.0}),
]
DRO = {"eta": 0.002, "rho": 3.0}
DRO_SETTINGS = [
    ("amclr_dro", {}, {}),
    ("amclr_dro", {"state": "shared_sequential"}, {"state": "shared_sequential"}),
    ("xamclr_dro", {"reduce": "mean", "intra_weight": 0.5}, {"reduce": "mean", "intra_weight": 0.5}),
    (
        "xamclr_dro",
        {"state": "shared_mean", "intra_weight": 0.5},
        {"state": "shared_mean", "intra_weight": 0.5},
    ),
]


def everything():
    for name, options, defining in SETTINGS:
        yield name, {"temperature": 0.05, **options}, definition(**defining), options.get("omega", 1)
    for name, options, defining in DRO_SETTINGS:
        settings = {"temperature": 0.05, "temperature_max": 0.2, **DRO, **options}
        yield name, settings, definition(t=0.05, dro=DRO, **defining), 1


@pytest.mark.parametrize("chunk", [5, 100])
@pytest.mark.parametrize("which", range(len(SETTINGS) + len(DRO_SETTINGS)))
@pytest.mark.slow
def test_matches_its_definition(which, chunk):
    name, options, define, omega = list(everything())[which]
    batch = {"views": omega}
    assert_same(run(name, options, chunk=chunk, batch=batch), defined(define, batch=batch))


@cache
def with_duplicates(number: int):
    """Setting, its batch, and its steps by the definition."""
    name, options, define, omega = list(everything())[number]
    batch = {"views": omega, "duplicate": True}
    return name, options, batch, defined(define, batch=batch)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_are_one_batch(ranks, world_size):
    for number in range(len(SETTINGS) + len(DRO_SETTINGS)):
        name, options, batch, want = with_duplicates(number)
        layout = ("replicated", "sharded")[number % 2]
        assert_same(joined(ranks(world_size, run, name, options, chunk=3, batch=batch, sample_state=layout)), want)


def test_identical_views_are_four_times_sogclr():
    """With per-pair state and a sum over pairings; and once SogCLR with a mean."""
    amclr, sogclr = make("amclr", temperature=0.05), make("sogclr", temperature=0.05)
    for step in range(3):
        a, b = global_batch(step), global_batch(step)
        views = Embeddings(a.image, a.text, a.ids, image_views=(a.image,), text_views=(a.text,))
        amclr(views).value.backward()
        sogclr(b).value.backward()
        close(a.image.grad, 4 * b.image.grad, 1e-12, "image")
        close(a.text.grad, 4 * b.text.grad, 1e-12, "text")
        assert b.image.grad.abs().max() > 1e-3


def test_omega_and_weights_are_checked():
    for options, message in (({"omega": 0}, "omega: expected 1 to 8"), ({"omega": 9}, "omega: expected 1 to 8")):
        with pytest.raises(ValueError, match=message):
            make("amclr", **options)
    with pytest.raises(ValueError, match="intra_weight: expected a positive weight"):
        make("xamclr", intra_weight=0.0)
    with pytest.raises(ValueError, match=r"embeddings\.image_views: amclr needs 2, got 1; set data\.image_views"):
        make("amclr", omega=2)(global_batch(0, views=1))
