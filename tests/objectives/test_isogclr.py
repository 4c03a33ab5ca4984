"""iSogCLR is its definition, its temperatures included, and so is the form whose temperatures the model generates."""

import math
from dataclasses import replace

import pytest
import torch

from amclr_scale.types import Embeddings
from tests.objectives.harness import (
    NUM_SAMPLES,
    STEPS,
    D,
    assert_same,
    close,
    defined,
    global_batch,
    joined,
    make,
    my_rows,
    off_diagonal,
    run,
)


def table(state, name, initial):
    return state.setdefault(name, torch.full((NUM_SAMPLES,), initial, dtype=torch.float64))


def definition(*, etas=(0.03,) * STEPS, margin=None, gamma=0.8, rho=8.0, beta=0.9, clip=5.0, bounds=(0.005, 0.05)):
    """The temperature's gradient is taken by autograd from t (log g(t) + rho), with u in the denominator."""

    def loss(state, e: Embeddings, step: int):
        s = e.image @ e.text.T
        value = objective = 0
        for side, sim in (("image", s), ("text", s.T)):
            log_us = table(state, f"{side}_state.log_u", -math.inf)
            ts = table(state, f"{side}_state.temperature", 0.01)
            vs = table(state, f"{side}_state.v", 0.0)
            t = ts[e.ids].clone().requires_grad_()
            h = sim - sim.diagonal()[:, None]
            f = h if margin is None else (h + margin).clamp(min=0) ** 2
            g = off_diagonal(f / t[:, None]).exp().sum(1) / (len(s) - 1)
            old = log_us[e.ids].exp()
            u = torch.where(old == 0, g, (1 - gamma) * old + gamma * g).detach()
            (inner,) = torch.autograd.grad((t.detach() * g / u).sum(), t, retain_graph=True)
            r = u.log() + rho + inner
            v = (1 - beta) * vs[e.ids] + beta * r.clamp(-clip, clip)
            value = (
                value + (t.detach() * (off_diagonal(f / t.detach()[:, None]).exp().sum(1) / (len(s) - 1)) / u).mean()
            )
            objective = objective + (t.detach() * (u.log() + rho)).mean()
            for i, row in enumerate(e.ids.tolist()):
                log_us[row] = u[i].log()
                vs[row] = v[i]
                ts[row] = (t.detach()[i] - etas[step] * v[i]).clamp(*bounds)
        return value, objective

    return loss


SETTINGS = [
    # small steps, so that temperatures move inside their bounds; then the defaults, which reach them
    ({"eta": 0.001, "rho": 2.0}, definition(etas=(0.001,) * STEPS, rho=2.0)),
    ({}, definition()),
    (
        {"surrogate": "squared_hinge", "margin": 0.5, "eta": 0.001, "gradient_clip": 0.5, "gamma": 0.4, "beta": 0.5},
        definition(etas=(0.001,) * STEPS, margin=0.5, clip=0.5, gamma=0.4, beta=0.5),
    ),
]


@pytest.mark.parametrize("which", range(len(SETTINGS)))
@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_matches_its_definition(which, chunk):
    options, define = SETTINGS[which]
    assert_same(run("isogclr", options, chunk=chunk), defined(define))


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_are_one_batch(ranks, world_size):
    batch = {"duplicate": True}
    for sample_state in ("replicated", "sharded"):
        for options, define in SETTINGS:
            got = ranks(world_size, run, "isogclr", options, chunk=3, batch=batch, sample_state=sample_state)
            assert_same(joined(got), defined(define, batch=batch))


def test_temperatures_move_apart():
    """The first settings leave temperatures strictly inside the bounds, so the comparison above saw them."""
    _, state = run("isogclr", SETTINGS[0][0])
    t = state["image_state.temperature"]
    visited = t[t != 0.01]
    assert len(visited) >= 8
    assert visited.unique().numel() > 8


def test_frozen_temperatures_are_sogclr():
    frozen, _ = run("isogclr", {"eta": 0.0, "temperature": 0.04, "gamma": 0.6})
    sogclr, _ = run("sogclr", {"temperature": 0.04, "gamma": 0.6})
    for a, b in zip(frozen, sogclr, strict=True):
        close(a.rows["image"], b.rows["image"], 1e-12, "image")
        close(a.rows["text"], b.rows["text"], 1e-12, "text")


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.1] * 3),
        ("cosine", [0.1, 0.01 + 0.09 * math.cos(math.pi / 8), 0.01]),
        ("exponential", [0.01 + 0.09 / 0.8, 0.01 + 0.09, 0.01 + 0.09 * 0.8**8]),
    ],
)
def test_the_step_size_follows_its_schedule_by_whole_epochs(schedule, expected):
    read = {"constant": {}, "cosine": {"eta_min": 0.01, "eta_epochs": 4}, "exponential": {"eta_min": 0.01}}[schedule]
    descent = make("isogclr", eta=0.1, eta_schedule=schedule, **read).descent
    for epoch, eta in zip((0.7, 1.2, 9.0), expected, strict=True):
        assert descent.eta_at(epoch) == pytest.approx(eta, abs=1e-12)


def net_definition(diversity=0.0, gamma=0.8, rho=7.0):
    """t (log g(t) + rho) with u in the denominator, differentiated in t by autograd, in features with t held."""

    def loss(state, e: Embeddings, step: int):
        s = e.image @ e.text.T
        value = objective = 0
        for side, sim, z, t in (
            ("image", s, e.image, e.image_temperature),
            ("text", s.T, e.text, e.text_temperature),
        ):
            log_us = table(state, f"{side}_state.log_u", -math.inf)
            h = sim - sim.diagonal()[:, None]

            def g_at(h, t):
                return off_diagonal(h / t[:, None]).exp().sum(1) / (len(h) - 1)

            g = g_at(h, t.detach())
            old = log_us[e.ids].exp()
            u = torch.where(old == 0, g, (1 - gamma) * old + gamma * g).detach()
            features = (t.detach() * g / u).mean()
            # zero, with the gradient of t (log u + rho) where log u depends on t through this batch's g
            through_t = (t * (u.log() + rho) + t.detach() * g_at(h.detach(), t) / u).mean()
            r = torch.autograd.grad(through_t, t, retain_graph=True)[0] * len(s)
            value = value + features + (r * t).mean()
            objective = objective + (t.detach() * (u.log() + rho)).mean()
            if diversity:
                gram = (z @ z.T).masked_fill(torch.eye(len(z), dtype=torch.bool), 0.0)
                penalty = diversity * (gram.clamp(min=0) ** 2).sum() / (len(z) * (len(z) - 1))
                value, objective = value + penalty, objective + penalty
            for i, row in enumerate(e.ids.tolist()):
                log_us[row] = u[i].log()
        return value, objective

    return loss


@pytest.mark.parametrize("diversity", [0.0, 0.5])
def test_generated_temperatures_match_their_definition(ranks, diversity):
    options, define = {"rho": 7.0, "diversity": diversity}, net_definition(diversity)
    assert_same(run("isogclr_net", options, chunk=3), defined(define))
    for world_size in (2, 4):
        assert_same(joined(ranks(world_size, run, "isogclr_net", options, chunk=5)), defined(define))


def test_the_generators_learn_from_the_objective():
    """Their gradient is that of sum_i r_i t_i / B, which the definition above gives per sample."""
    objective = make("isogclr_net", num_prototypes=4, temperature_min=0.02, temperature_max=0.3)
    torch.manual_seed(0)
    generators = objective.model_parts(objective.config, D).double().eval()
    e = my_rows(global_batch(0))
    image_t, text_t = generators({"image": e.image, "text": e.text}).values()
    given = replace(e, image_temperature=image_t.detach().requires_grad_(), text_temperature=text_t.detach())
    make("isogclr_net")(given).value.backward()
    want = torch.autograd.grad(image_t, generators.image.bias, given.image_temperature.grad, retain_graph=True)[0]
    objective(replace(e, image_temperature=image_t, text_temperature=text_t)).value.backward()
    close(generators.image.bias.grad, want, 1e-12, "bias of the image generator")
    assert want.abs() > 1e-6
    assert ((image_t > 0.02) & (image_t < 0.3)).all()


def test_generated_temperatures_must_be_there():
    e = replace(my_rows(global_batch(0)), text_temperature=None)
    with pytest.raises(
        ValueError,
        match=r"embeddings\.text_temperature: the objective reads it, got nothing",
    ):
        make("isogclr_net")(e)
    with pytest.raises(ValueError, match=r"embeddings\.image_temperature: expected one temperature per sample"):
        make("isogclr_net")(replace(e, image_temperature=torch.ones(3)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta: expected a weight"),
        ({"temperature_min": 0.1, "temperature_max": 0.05}, "temperature_min: expected 0 < temperature_min"),
        ({"eta_schedule": "cosine"}, "eta_epochs: expected a positive number"),
        (
            {"eta_schedule": "exponential", "eta_epochs": 4.0},
            "eta_epochs: expected null, the default, for only eta_sche",
        ),
        ({"eta_min": 0.01}, "eta_min: expected 0.0001, the default, for only eta_schedule cosine or exponential reads"),
        ({"gradient_clip": 0.0}, "gradient_clip: expected a positive bound"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        make("isogclr", **options)
