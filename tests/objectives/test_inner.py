"""Networks that objectives train themselves are alternating training in plain torch, on any number of ranks."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from amclr_scale.objectives.amorlip import initial
from amclr_scale.objectives.inner import Inner
from amclr_scale.objectives.staging import staged
from tests.objectives.harness import (
    B,
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

EPOCHS = (0.0, 0.6, 1.0, 1.5, 2.0)
F64 = torch.float64


def sides(e, t):
    """Of each direction: name, anchors, keys, log of the sum over negatives, x_ii; all of the whole batch."""
    s = e.image @ e.text.T
    for name, anchors, keys, sim in (("image", e.image, e.text, s), ("text", e.text, e.image, s.T)):
        yield name, anchors, keys, off_diagonal(sim / t).logsumexp(1), sim.diagonal() / t


def neuclip(m, steps, lr, restart, eps, t=0.07, rho=0.0):
    """Prototypes in torch.optim.Adagrad, begun anew with whatever rows come where it is time."""

    def loss(state, e, step):
        temperature = 1 / e.logit_scale.squeeze() if t is None else torch.tensor(t, dtype=F64)
        held = temperature.detach()
        if not hasattr(state, "rows"):
            state.rows, state.squares, state.position = [torch.zeros(m, D, dtype=F64) for _ in "it"], [0.0, 0.0], m
            state.squares, state.filled = [torch.zeros(m, D, dtype=F64) for _ in "it"], 0
        if step % restart == 0:
            state.position = 0
        if state.position < m:
            n = min(B, m - state.position)
            here = slice(state.position, state.position + n)
            for k, keys in enumerate((e.text, e.image)):
                state.rows[k][here], state.squares[k][here] = keys.detach()[:n], 0.0
            state.position += n
            state.filled = max(state.filled, state.position)
        parameters = [nn.Parameter(rows.clone()) for rows in state.rows]
        optimizer = torch.optim.Adagrad(parameters, lr=lr)
        for parameter, squares in zip(parameters, state.squares, strict=True):
            optimizer.state[parameter]["sum"] = squares.clone()

        def alpha(k, anchors, own):
            x = anchors.detach() @ F.normalize(parameters[k][: state.filled], dim=1).T / held - own.detach()[:, None]
            return (eps + x.exp().mean(1)).log()

        gs = [(name, a, (log_sum - own).exp() / (B - 1), own) for name, a, _, log_sum, own in sides(e, temperature)]
        for _ in range(steps):
            optimizer.zero_grad()
            inner = 0
            for k, (_, anchors, g, own) in enumerate(gs):
                al = alpha(k, anchors, own)
                inner = inner + held * (((eps + g.detach()) / al.exp()) + al).mean()
            inner.backward()
            optimizer.step()
        value = dual = 0
        for k, (_, anchors, g, own) in enumerate(gs):
            state.rows[k], state.squares[k] = parameters[k].detach(), optimizer.state[parameters[k]]["sum"]
            al = alpha(k, anchors, own).detach()
            value = value + held * (g / al.exp()).mean()
            dual = dual + (al + (eps + g.detach()) / al.exp() - 1 + rho).mean()
        state["network.weights"] = torch.cat([x.flatten() for x in state.rows])
        state["network.squares"] = torch.cat([x.flatten() for x in state.squares])
        return (value + temperature * dual if t is None else value), held * dual

    return loss


class Network(nn.Module):
    """AmorLIP's, of one side."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, D), nn.LayerNorm(D)])
        self.out = nn.Linear(D, 1)

    def forward(self, f):
        first, norm, second, other = self.layers
        return self.out((other(second(norm(first(f).relu())).relu()) + f).relu())[:, 0]

    def begin(self, side, seed):
        drawn = initial(D, seed)
        with torch.no_grad():
            for number, layer in enumerate(("1", "2")):
                self.layers[2 * number].weight.copy_(drawn[f"{side}.{layer}.weight"])
                self.layers[2 * number].bias.copy_(drawn[f"{side}.{layer}.bias"])
            self.out.weight.copy_(drawn[f"{side}.out.weight"][None])
            self.out.bias.copy_(drawn[f"{side}.out.bias"])


def flat(networks):
    rows = []
    for network in networks:
        for k in (0, 2):
            linear, norm = network.layers[k], network.layers[k + 1]
            rows += [linear.weight, linear.bias, norm.weight, norm.bias]
        rows += [network.out.weight, network.out.bias]
    return torch.cat([x.detach().flatten() for x in rows])


def amorlip(steps, lr, p, fit="log_l2", estimate="mixture", t=None, rho=0.0, share=0.92, beta_max=0.8, last=4.0):
    def loss(state, e, step):
        temperature = 1 / e.logit_scale.squeeze() if t is None else torch.tensor(t, dtype=F64)
        held, epoch = temperature.detach(), math.floor(EPOCHS[step])
        if not hasattr(state, "epoch"):
            state.epoch, state.before, state.average, state.steps = None, None, None, 0
        if epoch != state.epoch:
            state.before, state.epoch = state.average, epoch
            state.networks, state.average = ([Network().double() for _ in "it"] for _ in range(2))
            for networks in (state.networks, state.average):
                for side, network in zip(("image", "text"), networks, strict=True):
                    network.begin(side, epoch)
            parameters = [x for network in state.networks for x in network.parameters()]
            state.optimizer = torch.optim.Adam(parameters, lr=lr)
        beta = beta_max * (1 - math.cos(math.pi * min(epoch / last, 1))) / 2
        found = []
        for k, (_, anchors, _, log_sum, own) in enumerate(sides(e, temperature)):
            target = (log_sum.exp() + p * own.exp()).log()
            mixed = target.detach()
            if beta and state.before is not None:
                mixed = (beta * state.before[k](anchors.detach()).detach().exp() + (1 - beta) * mixed.exp()).log()
            found.append((anchors.detach(), target, mixed, own))
        for _ in range(steps):
            state.optimizer.zero_grad()
            inner = 0
            for network, (f, target, mixed, _) in zip(state.networks, found, strict=True):
                lam, fresh = network(f), target.detach()
                square = (lam - mixed).square().mean()
                inner = inner + (
                    square if fit == "log_l2" else square / 10 + ((fresh - lam).exp() * (fresh - lam)).mean()
                )
            inner.backward()
            state.optimizer.step()
        state.steps += 1
        if state.steps % 2 == 0:
            with torch.no_grad():
                for ours, theirs in zip(state.average, state.networks, strict=True):
                    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
                        a.copy_(share * a + (1 - share) * b)
        value = objective = 0
        for network, (f, target, mixed, own) in zip(state.average, found, strict=True):
            lam = mixed if estimate == "mixture" else network(f).detach()
            value = value + held * ((target - lam).exp() - own).mean()
            objective = objective + held * (target - own).mean()
        state["network.weights"], state["network.average"] = flat(state.networks), flat(state.average)
        return (value + rho * temperature if t is None else value), objective

    return loss


NEUCLIP = {"prototypes": 12, "inner_steps": 3, "inner_lr": 0.05, "restart_steps": 3, "eps": 1e-3}
AMORLIP = {"inner_steps": 2, "inner_lr": 0.01, "positive": 0.3, "beta_epochs": 4.0}
SETTINGS = [
    ("neuclip", NEUCLIP, neuclip(12, 3, 0.05, 3, 1e-3)),
    (
        "neuclip",
        {**NEUCLIP, "prototypes": 5, "restart_steps": 2, "temperature": None, "rho": 1.5},
        neuclip(5, 3, 0.05, 2, 1e-3, None, 1.5),
    ),
    ("amorlip", AMORLIP, amorlip(2, 0.01, 0.3)),
    (
        "amorlip",
        {**AMORLIP, "estimate": "network", "fit": "kl", "temperature": 0.2},
        amorlip(2, 0.01, 0.3, "kl", "network", 0.2),
    ),
    ("amorlip", {**AMORLIP, "rho": 2.0, "average": 0.5}, amorlip(2, 0.01, 0.3, rho=2.0, share=0.5)),
]
TOLERANCE = 1e-9  # Adam divides by roots of small squares, which a rounding moves


@pytest.mark.parametrize("which", range(len(SETTINGS)))
def test_matches_its_definition(which):
    name, options, define = SETTINGS[which]
    assert_same(run(name, options, chunk=3, epochs=EPOCHS), defined(define, epochs=EPOCHS), TOLERANCE)


def everything():
    return [run(name, options, chunk=3, epochs=EPOCHS[:3]) for name, options, _ in SETTINGS]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_are_one_batch_and_go_on_from_a_state(ranks, world_size):
    answers = ranks(world_size, everything)
    for (name, options, define), *parts in zip(SETTINGS, *answers, strict=True):
        want, got = defined(define, epochs=EPOCHS), joined(parts)
        assert_same((got[0], {}), (want[0][:3], {}), TOLERANCE)
        rest = run(name, options, first=3, epochs=EPOCHS[3:], state=got[1])
        assert_same(rest, (want[0][3:], want[1]), TOLERANCE)


def test_a_step_that_is_not_applied_leaves_the_network_alone():
    for name, options, _ in SETTINGS[::2]:
        objective = make(name, **options)
        objective(my_rows(global_batch(0)))
        before = {key: x.clone() for key, x in objective.state_dict().items()}
        with staged():
            objective(my_rows(global_batch(1)))
        objective.eval()(my_rows(global_batch(2)))
        assert all(torch.equal(x, before[key]) for key, x in objective.state_dict().items())
        objective.train()(my_rows(global_batch(1)))
        assert not torch.equal(objective.state_dict()["network.weights"], before["network.weights"])


def test_a_step_that_is_not_finite_is_not_counted():
    """Else prototypes would count as filled, and a network as begun, that are all zeros."""
    network = Inner(lambda width: {"a": (width,)}, ("weights",), ("filled",))
    network.make(2)
    network.keep({"filled": 2}, weights=torch.tensor([1.0, math.nan]))
    assert network.counts == {"filled": 0}
    assert not network.weights.any()
    network.keep({"filled": 2}, weights=torch.ones(2))
    assert network.counts == {"filled": 2}
    assert network.weights.all()


def test_the_controls_are_known_objectives():
    """With the batch's own normaliser: SogCLR without memory, and CLIP at twice the temperature."""
    got, _ = run("neuclip", {"estimate": "batch", "eps": 1e-300})
    want, _ = run("sogclr", {"gamma": 1.0})
    clip, _ = run("clip", {"temperature": 0.1})
    amorlip, _ = run("amorlip", {"estimate": "batch", "positive": 1.0, "temperature": 0.1})
    for number in range(len(got)):
        close(got[number].rows["image"], want[number].rows["image"], 1e-10, "neuclip")
        close(amorlip[number].rows["text"], 0.2 * clip[number].rows["text"], 1e-10, "amorlip")


def test_prototypes_that_are_the_anchors_negatives_give_the_batch_s_normaliser():
    """One anchor, whose negatives the prototypes of the next batch are."""
    objective = make("neuclip", prototypes=B, inner_steps=1, inner_lr=1e-12, eps=1e-300)
    e = my_rows(global_batch(0))
    objective(e)
    alone = torch.cat([e.text.detach()[1:], e.text.detach()[:1]])  # none is the anchor's own
    assert objective.network.shaped(objective.network.weights)["image"].shape == alone.shape
    close(objective.network.shaped(objective.network.weights)["image"], e.text.detach(), 1e-9, "prototypes")
    loss = objective(my_rows(global_batch(0)))
    assert 0 < loss.metrics["alpha_against_batch"] < 5  # the positive is among the prototypes


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("neuclip", {"inner_steps": 0}, "inner_steps: expected at least 1, got 0"),
        ("neuclip", {"prototypes": 0}, "prototypes: expected at least 1, got 0"),
        ("neuclip", {"rho": 1.0}, "rho: expected 0 for a fixed temperature"),
        ("amorlip", {"inner_steps": 0}, "inner_steps: expected at least 1, got 0"),
        ("amorlip", {"beta_max": 1.0}, r"beta_max: expected a share in \[0, 1\)"),
        ("amorlip", {"positive": -1.0}, "positive: expected a weight of at least 0"),
    ],
)
def test_options_are_checked(name, options, message):
    with pytest.raises(ValueError, match=message):
        make(name, **options)
