"""Similarities in excess of a reference's are the definition with two matrices: of drrho, and of sogclr and clip."""

import math

import pytest
import torch
import torch.nn.functional as F

from amclr_scale.types import Embeddings
from tests.objectives.harness import (
    NUM_SAMPLES,
    STEPS,
    assert_same,
    close,
    defined,
    global_batch,
    joined,
    make,
    off_diagonal,
    run,
)

EPS = 1e-3
DUPLICATE = {"duplicate": True}


def gaps(e: Embeddings):
    """((s_ij - s_ii) - (r_i.o_j - r_i.o_i)) of each direction, (B, B)."""
    s, r = e.image @ e.text.T, e.image_reference @ e.text_reference.T
    for side, sim, ref in (("image", s, r), ("text", s.T, r.T)):
        yield side, (sim - sim.diagonal()[:, None]) - (ref - ref.diagonal()[:, None])


def estimate(state, side, e, g, gamma):
    log_u = state.setdefault(f"{side}_state.log_u", torch.full((NUM_SAMPLES,), -math.inf, dtype=torch.float64))
    old = log_u[e.ids].exp()
    u = torch.where(old == 0, g, (1 - gamma) * old + gamma * g).detach()
    for i, row in enumerate(e.ids.tolist()):
        log_u[row] = u[i].log()
    return u


def drrho(learned: bool, gamma: float):
    """FastCLIP v1, or v3 with a radius of 2."""

    def loss(state, e, step):
        t = 1 / e.logit_scale.squeeze() if learned else torch.tensor(0.07, dtype=torch.float64)
        value = mean_f = 0
        for side, h in gaps(e):
            g = off_diagonal(h / t).exp().sum(1) / (len(h) - 1)
            u = estimate(state, side, e, g, gamma)
            mean_f = mean_f + (u + EPS).log().mean() / 2
            value = value + (t.detach() if learned else 1) * (g / (u + EPS)).mean() / 2
        objective = t * (2 + mean_f) if learned else mean_f
        return (value + objective if learned else value), objective

    return loss


def sogclr(state, e, step):
    value = objective = 0
    for side, h in gaps(e):
        g = off_diagonal(h / 0.1).exp().sum(1) / (len(h) - 1)
        u = estimate(state, side, e, g, 0.6)
        value, objective = value + 0.1 * (g / u).mean(), objective + 0.1 * u.log().mean()
    return value, objective


def clip(state, e, step):
    value = sum((h * e.logit_scale).logsumexp(1).mean() for _, h in gaps(e)) / 2
    return value, value


CONSTANT = {"eps": EPS, "gamma": 0.4, "gamma_schedule": "constant"}
SETTINGS = [
    ("drrho", {"temperature": 0.07, **CONSTANT}, drrho(False, 0.4)),
    ("drrho", {"version": "v3", "temperature": None, "rho": 2.0, **CONSTANT}, drrho(True, 0.4)),
    ("sogclr", {"reference": True, "temperature": 0.1, "gamma": 0.6}, sogclr),
    ("clip", {"reference": True}, clip),
]


@pytest.mark.parametrize(
    ("name", "options", "define"), SETTINGS, ids=[f"{name}-{options}" for name, options, _ in SETTINGS]
)
def test_matches_its_definition(name, options, define):
    for chunk in (3, 100):
        assert_same(run(name, options, chunk=chunk), defined(define))


def everything(layout, epochs):
    return [
        run(name, options, chunk=3, batch=DUPLICATE, sample_state=layout, epochs=epochs)
        for name, options, _ in SETTINGS
    ]


@pytest.mark.parametrize(("world_size", "layout"), [(2, "sharded"), (4, "sharded"), (4, "replicated")])
def test_ranks_are_one_batch_and_go_on_from_a_state(ranks, world_size, layout):
    answers = ranks(world_size, everything, layout, (0.0,) * 4)
    for (name, options, define), *parts in zip(SETTINGS, *answers, strict=True):
        want, got = defined(define, batch=DUPLICATE), joined(parts)
        assert_same((got[0], {}), (want[0][:4], {}))
        rest = run(name, options, batch=DUPLICATE, first=4, epochs=(0.0,) * (STEPS - 4), state=got[1])
        assert_same(rest, (want[0][4:], want[1]))


def changed(monkeypatch, change):
    original = global_batch

    def other(step, **batch):
        e = original(step, **batch)
        e.given.update(change(e))
        return e

    monkeypatch.setattr("tests.objectives.harness.global_batch", other)


def test_a_reference_that_knows_no_difference_changes_nothing(monkeypatch):
    """Alike for all, of whatever length."""
    changed(monkeypatch, lambda e: dict.fromkeys(("image_reference", "text_reference"), 3 * torch.ones(8, 4).double()))
    options = {"version": "v1", "temperature": 0.07}
    assert_same(run("drrho", {**options, **CONSTANT}), run("fastclip", {**options, **CONSTANT}))
    assert_same(run("clip", {"reference": True}), run("clip", {}))


def test_the_model_as_its_own_reference_weighs_all_negatives_alike(monkeypatch):
    changed(monkeypatch, lambda e: {"image_reference": e.image.detach(), "text_reference": e.text.detach()})
    steps, _ = run("drrho", {"temperature": 0.07, "eps": 1e-300, "gamma": 1.0, "gamma_schedule": "constant"})
    for number, step in enumerate(steps):
        e = global_batch(number)
        mean = (e.image @ e.text.T).mean() * 64 / 56 - (e.image * e.text).sum(1).mean() * 8 / 7
        mean.backward()
        close(step.rows["image"], e.image.grad / 0.07, 1e-10, f"step {number}: the gradient of the mean gap / t")


@pytest.mark.parametrize(("name", "options", "_"), SETTINGS, ids=[f"{name}-{options}" for name, options, _ in SETTINGS])
def test_small_temperatures_stay_right_in_float32(name, options, _):
    cold = {"temperature": 0.005} if options.get("version") != "v3" else {}
    found = []
    for dtype in (torch.float32, torch.float64):
        e = global_batch(0, scale=200.0).map(
            lambda _, x, dtype=dtype: x.detach().float().to(dtype).requires_grad_() if x.is_floating_point() else x
        )
        make(name, **{**options, **cold})(e).value.backward()
        found.append(e.image.grad.double())
    assert F.cosine_similarity(found[0].flatten(), found[1].flatten(), dim=0) > 1 - 1e-8
    assert (found[0] - found[1]).norm() < 1e-4 * found[1].norm()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("drrho", {"compat": True}, "compat: expected false"),
        ("drrho", {"queue": {"size": 64}}, "queue: expected null beside a reference"),
        ("sogclr", {"reference": True, "queue": {"size": 64}}, "queue: expected null beside a reference"),
        ("clip", {"reference": True, "omega": 1}, "omega: expected 0 beside a reference"),
        ("drrho", {"version": "v3"}, "temperature: expected null for v3"),
    ],
)
def test_options_are_checked(name, options, message):
    with pytest.raises(ValueError, match=message):
        make(name, **options)


def test_references_are_asked_for_and_must_fit():
    e = global_batch(0)
    bare = Embeddings(e.image, e.text, e.ids, logit_scale=e.logit_scale)
    for name, options, _ in SETTINGS:
        with pytest.raises(ValueError, match=rf"embeddings\.image_reference: {name} needs them, got None; set data\."):
            make(name, **options)(bare)
    assert "image_reference" not in make("sogclr").inputs
    narrow = {"image_reference": e.image_reference[:, :2], "text_reference": e.text_reference}
    with pytest.raises(ValueError, match=r"embeddings\.text_reference: expected features as wide"):
        make("drrho")(Embeddings(e.image, e.text, e.ids, given=narrow))
