"""FastCLIP's four versions are the gradients of their objectives, and `compat` is the published procedure."""

import math

import pytest
import torch

from amclr_scale.types import Embeddings
from tests.objectives.harness import NUM_SAMPLES, assert_same, close, defined, joined, make, off_diagonal, run

EPOCHS = (0.0, 0.6, 1.0, 1.5, 9.0)
GAMMAS = [1.0, 1.0, *[0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2] * 2, 0.2]  # by whole epochs, over 4 of them
SCHEDULE = {"gamma": 0.2, "gamma_epochs": 4.0}
EPS = 1e-3  # large, so that it shows
RHO = {"v0": 0.0, "v1": 0.0, "v2": 7.0, "v3": 6.5}


def table(state, name, initial):
    return state.setdefault(name, torch.full((NUM_SAMPLES,), initial, dtype=torch.float64))


def sides(e: Embeddings):
    s = e.image @ e.text.T
    return ("image", s), ("text", s.T)


def g_of(sim, t):
    h = sim - sim.diagonal()[:, None]
    return off_diagonal(h / (t[:, None] if t.ndim else t)).exp().sum(1) / (len(sim) - 1)


def moving(log_us, e, g, gamma):
    old = log_us[e.ids].exp()
    u = torch.where(old == 0, g, (1 - gamma) * old + gamma * g).detach()
    for i, row in enumerate(e.ids.tolist()):
        log_us[row] = u[i].log()
    return u


def definition(version, gammas=GAMMAS):
    rho = RHO[version]

    def loss(state, e: Embeddings, step: int):
        learned = 1 / e.logit_scale.squeeze()
        value = objective = 0
        for side, sim in sides(e):
            log_us = table(state, f"{side}_state.log_u", -math.inf)
            if version == "v2":
                ts, ms, vs, visits = (
                    table(state, f"{side}_state.{n}", x)
                    for n, x in (("temperature", 0.03), ("m", 0.0), ("v", 0.0), ("visits", 0.0))
                )
                t = ts[e.ids].clone().requires_grad_()
            else:
                t = torch.tensor(0.07, dtype=torch.float64) if version == "v1" else learned
            g = g_of(sim, t)
            u = moving(log_us, e, g, gammas[step])
            f = (u + EPS).log()
            held = t.detach()
            m = {"v0": 1.0, "v1": 1.0, "v2": held, "v3": held}[version]
            value = value + (m * g / (u + EPS)).mean() / 2
            objective = objective + (f.mean() if version in ("v0", "v1") else (held * (f + rho)).mean()) / 2
            if version == "v3":
                value = value + t * (rho + f.mean()) / 2
            if version == "v2":
                (inner,) = torch.autograd.grad((held * g / (u + EPS)).sum(), t, retain_graph=True)
                r = (f + rho + inner).clamp(-5, 5)
                for i, row in enumerate(e.ids.tolist()):
                    visits[row] += 1
                    ms[row] = 0.9 * ms[row] + 0.1 * r[i]
                    vs[row] = 0.999 * vs[row] + 0.001 * r[i] ** 2
                    step_size = ms[row] / (1 - 0.9 ** visits[row])
                    step_size = step_size / ((vs[row] / (1 - 0.999 ** visits[row])).sqrt() + 1e-8)
                    ts[row] = (held[i] - 0.0133 * step_size).clamp(0.01, 1.0)
        return value, objective

    return loss


def published(version):
    """Two half-losses: local anchors against all keys, then all anchors against local keys (here: the same rows)."""
    rho = RHO[version]

    def loss(state, e: Embeddings, step: int):
        epoch = math.floor(EPOCHS[step])
        gamma = 1.0 if epoch == 0 else GAMMAS[step]
        scale = e.logit_scale.squeeze() if version in ("v0", "v3") else torch.tensor(1 / 0.07, dtype=torch.float64)
        halves, log_us_now = 0, 0
        for side, a, k in (("image", e.image, e.text), ("text", e.text, e.image)):
            us = table(state, f"{side}_u", 0.0)
            bounds = table(state, f"{side}_state.bound", 0.0)
            ts = table(state, f"{side}_state.temperature", 0.03)
            ms, vs = table(state, f"{side}_state.m", 0.0), table(state, f"{side}_state.v", 0.0)
            t = ts[e.ids][:, None].clone()
            factor = 1 / t if version == "v2" else scale
            x = (a @ k.detach().T - (a * k).sum(1, keepdim=True)) * factor
            fixed = (a.detach() @ k.T - (a * k).sum(1, keepdim=True).detach()) * factor
            old_b = bounds[e.ids]
            b = (
                torch.maximum(old_b, x.detach().amax(1))
                if version == "v2"
                else torch.zeros(len(a), dtype=torch.float64)
            )
            mask = 1 - torch.eye(len(a), dtype=torch.float64)
            e1, e2 = (x - b[:, None]).exp() * mask, (fixed - b[:, None]).exp() * mask
            g1, g2 = e1.sum(1) / (len(a) - 1), e2.sum(1) / (len(a) - 1)
            old = us[e.ids]
            u = (1 - gamma) * old * (old_b - b).exp() + gamma * g1.detach()
            u = torch.where((old < 1e-35) & (gamma < 1), g1.detach(), u)
            halves = halves + ((g1 / (u + EPS)).mean() + (g2 / (u + EPS)).mean()) / 2
            log_us_now = log_us_now + u.log().mean()
            if version == "v2":
                r = -(e1 * x).sum(1) / (u + EPS) / (len(a) - 1) + (u + EPS).log() + b + rho
                r = r.detach().clamp(-5, 5)
                beta1, beta2 = (0.0, 0.0) if epoch == 0 else (0.9, 0.999)
                m, v = beta1 * ms[e.ids] + (1 - beta1) * r, beta2 * vs[e.ids] + (1 - beta2) * r**2
                m_hat, v_hat = m / (1 - beta1 ** (epoch + 1)), v / (1 - beta2 ** (epoch + 1))
                new_t = (t[:, 0] - 0.0133 * m_hat / (v_hat.sqrt() + 1e-8)).clamp(0.01, 1.0)
            for i, row in enumerate(e.ids.tolist()):
                us[row], bounds[row] = u[i], b[i]
                if version == "v2":
                    ms[row], vs[row], ts[row] = m[i], v[i], new_t[i]
        value = halves
        if version == "v3":
            value = value / scale.detach() + rho / scale + log_us_now / 2 / scale
        return value, torch.tensor(math.nan)

    return loss


@pytest.mark.parametrize("version", ["v0", "v1", "v2", "v3"])
def test_matches_its_definition(ranks, version):
    options = {"version": version, "eps": EPS, **SCHEDULE}
    want = defined(definition(version))
    for chunk in (1, 5, 100):
        assert_same(run("fastclip", options, chunk=chunk, epochs=EPOCHS), want)
    for world_size in (2, 4):
        got = ranks(world_size, run, "fastclip", options, chunk=3, epochs=EPOCHS, sample_state="sharded")
        assert_same(joined(got), want)


@pytest.mark.parametrize("version", ["v0", "v1", "v2", "v3"])
def test_compat_is_the_published_procedure(ranks, version):
    options = {"version": version, "eps": EPS, "compat": True, **SCHEDULE}
    steps, state = defined(published(version))
    wanted = {k: v for k, v in state.items() if version == "v2" and k in (
        "image_state.temperature", "text_state.temperature", "image_state.bound", "text_state.m", "text_state.v"
    )}  # fmt: skip
    for answers in ([run("fastclip", options, epochs=EPOCHS)], ranks(2, run, "fastclip", options, epochs=EPOCHS)):
        got_steps, got_state = joined(answers)
        for ours, theirs in zip(got_steps, steps, strict=True):
            theirs.objective = ours.objective  # the published code has no such number
        assert_same((got_steps, got_state), (steps, wanted))


@pytest.mark.parametrize("version", ["v0", "v1", "v3"])
def test_without_memory_the_gradient_is_that_of_the_objective(version):
    """Autograd of the whole objective, temperature included: the estimator is exact where u is this batch's g."""
    rho = RHO[version]

    def objective(state, e: Embeddings, step: int):
        t = torch.tensor(0.07, dtype=torch.float64) if version == "v1" else 1 / e.logit_scale.squeeze()
        mean_f = sum((g_of(sim, t) + EPS).log().mean() for _, sim in sides(e)) / 2
        f = t * (rho + mean_f) if version == "v3" else mean_f
        return f, f

    ours, _ = run("fastclip", {"version": version, "eps": EPS, "gamma": 1.0, "gamma_schedule": "constant"})
    theirs, _ = defined(objective)
    for a, b in zip(ours, theirs, strict=True):
        assert a.objective == pytest.approx(b.objective, abs=1e-12)
        for name in ("image", "text"):
            close(a.rows[name], b.rows[name], 1e-10, name)
        close(a.shared["logit_scale"], b.shared["logit_scale"], 1e-10, "logit_scale")
    assert version == "v1" or theirs[0].shared["logit_scale"].abs() > 1e-4


def test_v1_without_memory_is_half_of_dcl():
    tiny = {"version": "v1", "temperature": 0.05, "eps": 1e-30, "gamma": 1.0, "gamma_schedule": "constant"}
    fastclip, _ = run("fastclip", tiny)
    dcl, _ = run("dcl", {"temperature": 0.05})
    for a, b in zip(fastclip, dcl, strict=True):
        close(a.rows["image"], b.rows["image"] / 2, 1e-12, "image")


def test_compat_doubles_the_softmax_part_of_the_temperature_gradient():
    """F = t (rho + mean f) has the gradient A - S; the published code has A - 2 S, with equal feature gradients."""
    options = {"gamma": 1.0, "gamma_schedule": "constant", "eps": 1e-30}
    right, _ = run("fastclip", options)
    theirs, _ = run("fastclip", {**options, "compat": True})
    for a, b in zip(right, theirs, strict=True):
        close(a.rows["image"], b.rows["image"], 1e-12, "image")
        t = 1 / 12.0
        to_t = -(t**2)  # d/dscale = -t^2 d/dt
        mean_f = a.objective / t - 6.5
        softmax = (6.5 + mean_f) - a.shared["logit_scale"] / to_t
        close(b.shared["logit_scale"] / to_t, (6.5 + mean_f) - 2 * softmax, 1e-8, "logit_scale")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.1}, "temperature: expected null for v3"),
        ({"version": "v1", "temperature": 0.0}, "temperature: expected a positive number"),
        ({"gamma_epochs": None}, "gamma_epochs: expected a positive number"),
        ({"version": "v4"}, "version: expected 'v0' or 'v1' or 'v2' or 'v3', got 'v4'"),
        ({"eps": 0.0}, "eps: expected a positive number"),
        ({"version": "v1", "rho": 2.0}, "rho: expected null for v1, which has no robust loss, got 2.0"),
        ({"temperature_max": 0.5}, "temperature_max: expected 1.0, the default, for only version v2 reads it, got 0.5"),
        (
            {"version": "v0", "temperature_lr": 0.0},
            "temperature_lr: expected 0.0133, the default, for only version v2 reads it",
        ),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        make("fastclip", **options)
