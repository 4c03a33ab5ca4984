"""SCENT is its proximal step, step after step; and the schedules of gamma that all moving averages share."""

import math

import pytest
import torch

from amclr_scale.objectives.estimator import dual_step, log_moving_average
from amclr_scale.types import Embeddings
from tests.objectives.harness import NUM_SAMPLES, STEPS, B, assert_same, close, defined, joined, make, off_diagonal, run


def visited(state, side, e, g, change):
    """The next u = exp(nu) of a step's samples, in float64; the last of several equal ids is kept."""
    log_u = state.setdefault(f"{side}_state.log_u", torch.full((NUM_SAMPLES,), -math.inf, dtype=torch.float64))
    old = log_u[e.ids].exp()
    u = torch.where(old == 0, g, change(old, g)).detach()
    for i, row in enumerate(e.ids.tolist()):
        log_u[row] = u[i].log()
    return u


def sides(e: Embeddings, t):
    s = e.image @ e.text.T
    for side, sim in (("image", s), ("text", s.T)):
        yield side, off_diagonal((sim - sim.diagonal()[:, None]) / t).exp().sum(1) / (len(s) - 1)


def scent(log_alpha, t=0.07, rho=0.0):
    """u' = u (1 + a g) / (1 + a u), as it is written."""
    a = math.exp(log_alpha)

    def loss(state, e: Embeddings, step: int):
        learned = t is None
        temperature = 1 / e.logit_scale.squeeze() if learned else torch.tensor(t, dtype=torch.float64)
        held, value, objective = temperature.detach(), 0, 0
        for side, g in sides(e, temperature):
            u = visited(state, side, e, g.detach(), lambda old, g: old * (1 + a * g) / (1 + a * old))
            value = value + held * (g / u).mean()
            objective = objective + temperature * (rho + u.log().mean())
        return (value + objective if learned else value), objective

    return loss


SETTINGS = [
    ({"log_alpha": 3.0}, scent(3.0)),
    ({"log_alpha": -0.5, "temperature": 0.2}, scent(-0.5, 0.2)),
    ({"log_alpha": 2.0, "temperature": None, "rho": 2.0}, scent(2.0, None, 2.0)),
]
DUPLICATE = {"duplicate": True}


@pytest.mark.parametrize("which", range(len(SETTINGS)))
def test_matches_its_definition(which):
    options, define = SETTINGS[which]
    want = defined(define)
    for chunk in (3, 100):
        assert_same(run("scent", options, chunk=chunk), want)
    assert want[1]["image_state.log_u"].isfinite().sum() < B * STEPS / 2, "ids come back"


def in_two_parts(options, others):
    """Three steps, and two from their state."""
    first, state = run("scent", options, chunk=3, batch=DUPLICATE, epochs=(0.0,) * 3, **others)
    return first, state


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_are_one_batch_and_go_on_from_a_state(ranks, world_size):
    for number, (options, define) in enumerate(SETTINGS):
        layout = ("sharded", "replicated", "sharded")[number]
        want = defined(define, batch=DUPLICATE)
        first = joined(ranks(world_size, in_two_parts, options, {"sample_state": layout}))
        rest = {"first": 3, "epochs": (0.0, 0.0), "batch": DUPLICATE, "state": first[1]}
        assert_same((first[0], {}), (want[0][:3], {}))
        assert_same(run("scent", options, **rest), (want[0][3:], want[1]))
        if not number:
            again = joined(ranks(world_size, run, "scent", options, sample_state=layout, **rest))
            assert_same(again, (want[0][3:], want[1]))


def test_limits_of_the_step():
    """A step of any size ends between the estimate and the batch's; infinite, at the batch's; and it is an average."""
    g = torch.Generator().manual_seed(0)
    old, new = (40 * torch.randn(400, generator=g, dtype=torch.float64) for _ in range(2))
    for log_alpha in (-60.0, -3.0, 0.0, 10.0, 60.0):
        got = dual_step(old, new, log_alpha)
        assert (got >= torch.minimum(old, new) - 1e-9).all()
        assert (got <= torch.maximum(old, new) + 1e-9).all()
        some = (log_alpha + old).abs() < 8  # beyond, a gamma near 1 has lost its digits
        average = log_moving_average(old, new, (log_alpha + old).sigmoid())
        close(got[some], average[some], 1e-9, f"average at {log_alpha}")
        close(dual_step(old, old, log_alpha), old, 1e-12, "fixed point")
        single = dual_step(old.float(), new.float(), log_alpha)
        close(single.double(), got, 2e-5, f"float32 at {log_alpha}")
    close(dual_step(old, new, 1e4), new, 1e-9, "an infinite step")
    close(dual_step(old, new, -1e4), old, 1e-9, "no step")
    unseen, nothing = torch.full_like(new, -math.inf), torch.full_like(new, -math.inf)
    assert torch.equal(dual_step(unseen, new, 3.0), new)
    assert torch.equal(dual_step(old, nothing, 3.0), old)


def test_an_infinite_step_is_sogclr_without_memory():
    got, want = run("scent", {"log_alpha": 1e4}), run("sogclr", {"gamma": 1.0})
    assert_same((got[0], {}), (want[0], {}))
    close(got[1]["image_state.log_u"], want[1]["image_state.log_u"], 1e-10, "state")


def test_a_learned_temperature_is_that_of_fastclip():
    """At an infinite step: twice FastCLIP v3, whose directions are averaged."""
    got, _ = run("scent", {"log_alpha": 1e4, "temperature": None, "rho": 3.0})
    options = {"gamma": 1.0, "gamma_schedule": "constant", "eps": 1e-300, "rho": 3.0}
    want, _ = run("fastclip", options)
    for a, b in zip(got, want, strict=True):
        close(a.rows["text"], 2 * b.rows["text"], 1e-10, "text")
        close(a.shared["logit_scale"], 2 * b.shared["logit_scale"], 1e-10, "logit_scale")


def by_visits(least, t=0.07):
    def loss(state, e: Embeddings, step: int):
        value = objective = 0
        for side, g in sides(e, t):
            counts = state.setdefault(f"{side}_state.visits", torch.zeros(NUM_SAMPLES, dtype=torch.float64))
            gamma = (1 / (counts[e.ids] + 1)).clamp(min=least)
            counts[e.ids] += 1  # an id that comes twice in a batch is one visit
            u = visited(state, side, e, g, lambda old, g, gamma=gamma: (1 - gamma) * old + gamma * g)
            value, objective = value + (t * g / u).mean(), objective + t * u.log().mean()
        return value, objective

    return loss


def test_gamma_by_visits_is_the_plain_mean_down_to_gamma(ranks):
    for least in (0.01, 0.4):
        options = {"gamma": least, "gamma_schedule": "visits"}
        want = defined(by_visits(least), batch=DUPLICATE)
        assert want[1]["image_state.visits"].max() >= 3
        assert_same(run("sogclr", options, batch=DUPLICATE), want)
        got = ranks(2, run, "sogclr", options, batch=DUPLICATE, sample_state="sharded")
        assert_same(joined(got), want)


FAMILY = [
    ("sogclr", {}),
    ("isogclr", {}),
    ("isogclr_net", {}),
    ("fastclip", {}),
    ("fastclip", {"version": "v2"}),
    ("amclr", {}),
    ("amclr", {"state": "shared_sequential"}),
    ("xamclr", {"state": "shared_mean"}),
    ("amclr_dro", {}),
    ("xamclr_dro", {"state": "shared_mean"}),
]


@pytest.mark.parametrize(("name", "options"), FAMILY, ids=str)
def test_the_family_shares_the_schedules(name, options):
    """Two that are equal by definition are equal to the bit, or the rounding, in each of them."""
    how = {"batch": {"views": 1}, "epochs": (0.0,) * 3}
    constant = run(name, {**options, "gamma": 0.3, "gamma_schedule": "constant"}, **how)
    mean = run(name, {**options, "gamma": 1e-9, "gamma_schedule": "visits"}, **how)
    floor = run(name, {**options, "gamma": 1.0, "gamma_schedule": "visits"}, **how)
    one = run(name, {**options, "gamma": 1.0, "gamma_schedule": "constant"}, **how)
    step = run(name, {**options, "gamma_schedule": "scent", "log_alpha": 1e4}, **how)
    small = run(name, {**options, "gamma_schedule": "scent", "log_alpha": 1.0}, **how)
    without = {key: x for key, x in one[1].items() if "visits" not in key}
    assert_same((floor[0], {key: floor[1][key] for key in without}), (one[0], without))
    assert_same((step[0], {key: step[1][key] for key in without}), (one[0], without), 1e-8)
    for a, b in ((mean, constant), (small, constant), (small, mean)):
        assert not torch.allclose(a[0][-1].rows["image"], b[0][-1].rows["image"], rtol=1e-6, atol=0)


def test_scent_as_a_schedule_of_sogclr_is_scent():
    got = run("sogclr", {"gamma_schedule": "scent", "log_alpha": 2.0})
    assert_same(got, run("scent", {"log_alpha": 2.0}))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("scent", {"log_alpha": math.inf}, "log_alpha: expected the logarithm .*, got inf"),
        ("scent", {"temperature": 0.0}, "temperature: expected a positive number"),
        ("scent", {"rho": 1.0}, "rho: expected 0 for a fixed temperature"),
        ("scent", {"temperature": None, "rho": -1.0}, "rho: expected a divergence"),
        ("scent", {"gamma": 0.5}, "gamma: scent has no such option"),
        ("sogclr", {"gamma_schedule": "visit"}, "gamma_schedule: expected 'constant' or 'cosine' or 'visits'"),
        ("fastclip", {"gamma_schedule": "scent", "compat": True}, "gamma_schedule: expected constant or cosine with"),
    ],
)
def test_options_are_checked(name, options, message):
    with pytest.raises(ValueError, match=message):
        make(name, **options)
