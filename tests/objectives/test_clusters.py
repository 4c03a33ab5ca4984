"""Objectives over clusters are their definitions, with k-means by moving averages in plain loops, on any ranks."""

import math

import pytest
import torch
from torch import Tensor

from amclr_scale.config.objective_options import declared
from amclr_scale.errors import UserError
from amclr_scale.objectives.clusters import Clusters
from amclr_scale.types import Embeddings
from tests.objectives.harness import (
    B,
    assert_same,
    close,
    defined,
    global_batch,
    joined,
    make,
    my_rows,
    run,
)

EYE = torch.eye(B, dtype=torch.bool)


class Plain:
    """One clustering of all ranks' rows."""

    def __init__(self, count: int, width: int):
        self.sums, self.mass, self.idle = torch.zeros(count, width).double(), [0.0] * count, [0] * count

    def join(self, rows: Tensor, gamma: float, idle_steps: int) -> tuple[list[int], Tensor]:
        """Whom each row joins; and the sums, with a gradient as if the newest part were all of them."""
        count, x = len(self.mass), rows.detach()
        centres = {c: self.sums[c] / self.mass[c] for c in range(count) if self.mass[c] and self.idle[c] < idle_steps}
        kept = set(centres)

        def away(j: int, c: int) -> float:
            return float((x[j] - centres[c]).square().sum())

        nearest = [min((away(j, c) for c in kept), default=math.inf) for j in range(len(x))]
        order = sorted(range(len(x)), key=lambda j: -nearest[j])
        free = [c for c in range(count) if c not in kept]
        centres |= {c: x[j] for c, j in zip(free, order, strict=False)}
        mine = [min(sorted(centres), key=lambda c, j=j: away(j, c)) for j in range(len(x))]
        sums = []
        for c in range(count):
            members = [j for j in range(len(x)) if mine[j] == c]
            old = 1 - gamma if c in kept else 0.0
            self.mass[c] = old * self.mass[c] + gamma * len(members) / len(x)
            self.idle[c] = 0 if members else min(self.idle[c] + 1, idle_steps)
            new = rows[members].sum(0) / len(x)
            sums.append(old * self.sums[c] + gamma * new.detach() + (new - new.detach()))
        found = torch.stack(sums)
        self.sums = found.detach()
        return mine, found

    def flat(self) -> list[Tensor]:
        means = self.sums / torch.tensor([mass or 1.0 for mass in self.mass], dtype=torch.float64)[:, None]
        return [means.flatten(), *(torch.tensor(x, dtype=torch.float64) for x in (self.mass, self.idle))]


def pamc(count: int, gamma: float, idle_steps: int, temperature: float | None):
    def loss(state, e: Embeddings, step: int):
        if step == 0:
            state.plain = {side: Plain(count, e.image.shape[1]) for side in ("image", "text")}
        t = 1 / e.logit_scale if temperature is None else temperature
        own, value = (e.image * e.text).sum(1) / t, 0
        for side, keys, anchors in (("image", e.image, e.text), ("text", e.text, e.image)):
            plain = state.plain[side]
            _, sums = plain.join(keys, gamma, idle_steps)
            z = sum(
                plain.mass[c] / sum(plain.mass) * (anchors @ (sums[c] / plain.mass[c]) / t).exp()
                for c in range(count)
                if plain.mass[c]
            )
            value = value + ((B * z).log() - own).mean() / 2
        state["clusters.weights"] = torch.cat([x for plain in state.plain.values() for x in plain.flat()])
        return value, value

    return loss


def meow(counts: tuple[int, ...], gamma: float, idle_steps: int, temperature: float | None):
    def loss(state, e: Embeddings, step: int):
        if step == 0:
            state.plain = [Plain(count, e.image.shape[1]) for count in counts]
        t = 1 / e.logit_scale if temperature is None else temperature
        weights = torch.zeros(B, B).double()
        rows = (e.image + e.text).detach() / 2
        rows = rows - rows.mean(0)
        rows = rows / rows.square().sum(1).mean().sqrt()
        for plain in state.plain:
            mine = torch.tensor(plain.join(rows, gamma, idle_steps)[0])
            weights += (mine[:, None] != mine).double() / len(counts)
        state["clusters.weights"] = torch.cat([x for plain in state.plain for x in plain.flat()])
        state.weights = weights
        s, value = e.image @ e.text.T / t, 0
        for x in (s, s.T):
            total = (weights * x.exp()).sum(1)
            some = total > 0
            value = value + torch.where(some, torch.where(some, total, 1.0).log() - x.diagonal(), 0.0).mean()
        return value, value

    return loss


SETTINGS = [
    ("pamc", {"clusters": 5, "gamma": 0.1, "idle_steps": 2, "temperature": 0.1}, pamc(5, 0.1, 2, 0.1)),
    ("pamc", {"clusters": 20, "gamma": 0.6}, pamc(20, 0.6, 100, None)),
    ("meow", {"clusters": [2, 5], "gamma": 0.3, "idle_steps": 1}, meow((2, 5), 0.3, 1, 0.07)),
    ("meow", {"clusters": [2], "temperature": None}, meow((2,), 0.1, 100, None)),
]


@pytest.mark.parametrize("which", range(len(SETTINGS)))
def test_matches_its_definition(which):
    name, options, define = SETTINGS[which]
    for chunk in (3, "auto"):
        assert_same(run(name, options, chunk=chunk), defined(define))


def everything(steps):
    return [run(name, options, chunk=3, epochs=(0.0,) * steps) for name, options, _ in SETTINGS]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_are_one_batch_and_go_on_from_a_state(ranks, world_size):
    for (name, options, define), *parts in zip(SETTINGS, *ranks(world_size, everything, 3), strict=True):
        want, got = defined(define), joined(parts)
        assert_same((got[0], {}), (want[0][:3], {}))
        assert_same(run(name, options, first=3, epochs=(0.0,) * 2, state=got[1]), (want[0][3:], want[1]))


def test_clusters_move_begin_anew_and_leave_keys_out():
    """What the settings above have to meet for their comparison to say something."""
    plain, again = Plain(5, 6), 0
    for step in range(5):
        before = list(plain.idle)
        plain.join(global_batch(step).text, 0.1, 2)
        again += sum(idle == 2 for idle in before)
    assert again > 0
    objective = make("meow", clusters=[2])
    loss = [objective(my_rows(global_batch(step))) for step in range(2)][1]
    assert loss.value < make("dcl")(my_rows(global_batch(1))).value - 0.1


ALL_ANEW = {"gamma": 1.0, "idle_steps": 0}  # every row a cluster of its own, in every step


@pytest.mark.parametrize(
    ("name", "options", "other", "others"),
    [
        ("pamc", {"clusters": B, **ALL_ANEW}, "clip", {}),
        ("pamc", {"clusters": B + 3, "temperature": 0.1, **ALL_ANEW}, "clip", {"temperature": 0.1}),
        ("pamc", {"estimate": "batch"}, "clip", {}),
        ("meow", {"clusters": [B, 2 * B], **ALL_ANEW}, "dcl", {}),
    ],
    ids=str,
)
def test_where_nothing_is_clustered_it_is_another(name, options, other, others):
    assert_same((run(name, options)[0], {}), (run(other, others)[0], {}), 1e-12)


def test_where_nothing_is_mixed_m3col_is_clip():
    """Values, and gradients along the sphere: what is mixed is made unit length, so it has none along itself."""
    got, want = (run(*which, epochs=(0.0,))[0][0] for which in (("m3col", {"mix_share": 0.0, "temperature": None}),
                                                                ("clip", {})))  # fmt: skip
    assert abs(got.value - want.value) < 1e-12
    for side in ("image", "text"):
        x = getattr(global_batch(0), side).detach()
        along = [g - (g * x).sum(1, keepdim=True) * x for g in (got.rows[side], want.rows[side])]
        close(along[0], along[1], 1e-12, side)
    close(got.shared["logit_scale"], want.shared["logit_scale"], 1e-12, "scale")


def test_means_give_less_than_the_keys_do():
    """Jensen: with clusters of this batch alone, a lower bound for every anchor."""
    e = my_rows(global_batch(0))
    objective, batch = make("pamc", clusters=3, gamma=1.0), make("pamc", estimate="batch")
    objective(e)
    for found, exact in zip(objective.log_means(e, B), batch.log_means(e, B), strict=True):
        assert (found < exact).all()
    assert objective(e).metrics["clusters"] <= 3 + 1e-9


def test_a_cluster_that_nobody_joins_stays_until_it_begins_anew():
    """In float32 too, of which its mass has long gone out: 0.2^100."""
    far, near = torch.eye(8)[:1], torch.nn.functional.normalize(torch.eye(8)[1:2] + 0.1 * torch.eye(8)[2:6], dim=1)
    clusters = Clusters({"x": 2}, 0.8, 100)
    for step in range(102):
        _, found = clusters.join("x", torch.cat([far if step == 0 else near[:1], near]))
        clusters.store({"x": found})
        if step <= 100:
            assert torch.equal(found.means[0], far[0])
            assert (found.idle[0], found.mass[0] > 0) == (step, True)
    assert found.means[0] @ far[0] == 0
    assert found.mass.sum() > 0.5


def test_an_anchor_whose_keys_all_have_weight_0_says_nothing():
    e = my_rows(global_batch(0))
    same = torch.ones_like(e.image).requires_grad_()
    rows = Embeddings(torch.nn.functional.normalize(same, dim=1), torch.nn.functional.normalize(same, dim=1))
    objective = make("meow", clusters=[2], idle_steps=50)
    objective.eval()
    loss = objective(rows).value
    loss.backward()
    assert loss.item() == 0
    assert not same.grad.any()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pamc", {"clusters": 0}, "clusters: expected at least 1, got 0"),
        ("pamc", {"gamma": 0.0}, r"gamma: expected a weight in \(0, 1\]"),
        ("pamc", {"mask_duplicates": "text"}, "mask_duplicates: pamc has no such option"),
        ("meow", {"clusters": [5, 5]}, "clusters: expected one or more different numbers"),
        ("meow", {"queue": {"size": 9}}, "queue: meow has no such option"),
        ("m3col", {"mix_beta": 1e-30}, r"mix_beta: expected a number from 0\.01 to 1000"),
        ("m3col", {"false_negative_margin": 0.1}, "false_negative_margin: m3col has no such option"),
    ],
)
def test_options_are_checked(name, options, message):
    with pytest.raises(UserError, match=message):
        make(name, **options)


def test_what_it_says_of_itself():
    assert declared({"name": "pamc", "clusters": 7}).negatives(B) == 7
    assert declared({"name": "pamc", "estimate": "batch"}).equals(B).name == "clip"
    assert declared({"name": "meow", "clusters": [7, 9]}).negatives(B) == B - 1


@pytest.mark.parametrize(("name", "options"), [("pamc", {"clusters": 3}), ("meow", {"clusters": [3]})])
def test_a_small_temperature_stays_finite(name, options):
    objective = make(name, temperature=0.005, **options)
    for step in range(2):
        e = my_rows(global_batch(step)).map(
            lambda _, x: x.detach().float().requires_grad_() if x.is_floating_point() else x
        )
        loss = objective(e).value
        loss.backward()
        assert loss.isfinite()
        assert e.image.grad.isfinite().all()
        assert e.image.grad.abs().max() > 1e-3


def test_clusters_of_16_bit_embeddings_are_float32():
    objective = make("pamc", clusters=4).bfloat16()
    e = my_rows(global_batch(0)).map(lambda _, x: x.detach().bfloat16() if x.is_floating_point() else x)
    objective(e)
    assert isinstance(objective.clusters, Clusters)
    assert objective.clusters.weights.dtype == torch.float32
    assert objective.bfloat16().clusters.weights.dtype == torch.float32
