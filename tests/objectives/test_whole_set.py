"""Batches against the whole set: definitions in float64, on one rank and on two; and what must agree does."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from amclr_scale import objectives
from amclr_scale.objectives.amorlip import predicted
from amclr_scale.objectives.whole_set import compare_with_whole_set
from amclr_scale.types import Embeddings
from tests.objectives.harness import D, off_diagonal

K, B, N, T = 12, 4, 30, 0.1
AGES = torch.tensor([5, 3, 8, 1, 9, 9, 2, 30, 7, 4, 12, 6])  # steps since the visit of each sample
IDS = torch.randperm(N, generator=torch.Generator().manual_seed(3))[:K]


def embeddings(seed: int = 0, views: int = 0) -> Embeddings:
    g = torch.Generator().manual_seed(seed)

    def near(x, noise):
        return F.normalize(x + noise * torch.randn(K, D, generator=g, dtype=torch.float64), dim=1)

    image = near(torch.zeros(K, D, dtype=torch.float64), 1.0)
    text = near(image, 0.5)
    return Embeddings(
        image, text, IDS, image_views=tuple(near(image, 0.3) for _ in range(views)),
        text_views=tuple(near(text, 0.3) for _ in range(views)),
        logit_scale=torch.tensor([1 / T], dtype=torch.float64),
        logit_bias=torch.tensor([-4.0], dtype=torch.float64),
        image_temperature=0.05 + 0.1 * torch.rand(K, generator=g, dtype=torch.float64),
        text_temperature=0.05 + 0.1 * torch.rand(K, generator=g, dtype=torch.float64),
        text_content=torch.arange(K) // 2,
    )  # fmt: skip


def compare(name, options, *, train_on=None, batch=B, views=0, sample_state="replicated"):
    """With a state from one step on `train_on`, or none."""
    options = {"num_samples": N, **options}
    objective = objectives.create(name, sample_state=sample_state, **options)
    if train_on is not None:
        size = K // objectives.whole_set.world_size()
        mine = slice(objectives.whole_set.rank() * size, (objectives.whole_set.rank() + 1) * size)
        share = {"image": train_on.image[mine].clone().requires_grad_(), "text": train_on.text[mine], "ids": IDS[mine]}
        share |= {name: tuple(v[mine] for v in getattr(train_on, name)) for name in ("image_views", "text_views")}
        share |= {f"{side}_temperature": getattr(train_on, f"{side}_temperature")[mine] for side in ("image", "text")}
        objective(replace(train_on, **share))
    before = {key: value.clone() for key, value in objective.state_dict().items()}
    whole = objectives.create(name, **{**options, **objective.whole_set_options, "num_samples": K})
    found = compare_with_whole_set(objective, whole, embeddings(1, views), global_batch_size=batch, ages=AGES)
    after = objective.state_dict()
    assert objective.training
    assert all(torch.equal(after[key], value) for key, value in before.items())
    return found


def dense_means(image, text):
    """g of both directions, (2, K): over the negatives among these rows."""
    s = image @ text.T / T
    return torch.stack([(off_diagonal(h - h.diagonal()[:, None])).exp().sum(1) / (len(h) - 1) for h in (s, s.T)])


def dense_sogclr(gamma=0.3):
    """The numbers for SogCLR from their definitions, by autograd on matrices."""
    old, new = embeddings(0), embeddings(1)
    u = dense_means(old.image, old.text)  # from the visit
    g = dense_means(new.image, new.text)

    def gradient(batches, state):
        image, text = new.image.clone().requires_grad_(), new.text.clone().requires_grad_()
        total = 0
        for rows in batches:
            batch_g = dense_means(image[rows], text[rows])
            average = (1 - gamma) * state[:, rows] + gamma * batch_g.detach() if state is not None else batch_g.detach()
            total = total + (T * batch_g / average).sum(0).mean() / len(batches)
        total.backward()
        return torch.cat([image.grad, text.grad]).flatten()

    G = gradient([torch.arange(K)], None)
    orders = torch.Generator().manual_seed(0)
    gs = [gradient(torch.randperm(K, generator=orders).split(B), u) for _ in range(2)]
    error = (u / g - 1).abs().flatten().sort().values
    squared = (gs[0] @ gs[1]).item()
    onto = sum((x @ G).item() for x in gs) / 2
    order = AGES.argsort(stable=True)
    tenths = [(u / g - 1).abs()[:, rows].T.flatten().sort().values for rows in order.tensor_split(10)]
    ages = {f"estimator_error_age_{k}": x[math.ceil(len(x) / 2) - 1].item() for k, x in enumerate(tenths, 1)}
    return ages | {
        "gradient_bias": math.sqrt(max(squared - 2 * onto + (G @ G).item(), 0)) / G.norm().item(),
        "gradient_noise": math.sqrt(sum((x @ x).item() for x in gs) / 2 - squared) / G.norm().item(),
        "estimator_error": error[K - 1].item(),  # of 2 K
        "estimator_error_p90": error[math.ceil(0.9 * 2 * K) - 1].item(),
        "estimator_log_ratio": (u / g).log().mean().item(),
        "estimator_visited": 1.0,
        "gradient_cosine": sum((x @ G / x.norm() / G.norm()).item() for x in gs) / 2,
        "gradient_norm_ratio": sum((x.norm() / G.norm()).item() for x in gs) / 2,
        "expected_gradient_cosine": sum((x @ G / G.norm()).item() for x in gs) / 2 / math.sqrt(squared),
        "expected_gradient_norm_ratio": math.sqrt(squared) / G.norm().item(),
    }


@pytest.mark.parametrize("sample_state", ["replicated", "sharded"])
def test_sogclr_is_its_definition_on_any_number_of_ranks(ranks, sample_state):
    want = dense_sogclr()
    options = {"temperature": T, "gamma": 0.3}
    one = compare("sogclr", options, train_on=embeddings(0))
    two = ranks(2, compare, "sogclr", options, train_on=embeddings(0), sample_state=sample_state)
    assert want["expected_gradient_cosine"] < 0.99  # there is something to see
    for got in (one, *two):
        assert got == pytest.approx(want, rel=1e-6)  # the visit that reads the old state is float32's


def test_a_linear_map_of_gradients_has_the_same_numbers():
    """Of itself, those of the embeddings' gradient; of something else, others under the same names."""
    objective, e = objectives.create("dcl", temperature=T), embeddings(0)
    whole = objectives.create("dcl", temperature=T)
    for layer, same in ((dict, True), (lambda g: {"w": e.image.T @ g["image"]}, False)):
        found = compare_with_whole_set(objective, whole, e, global_batch_size=B, layer=layer)
        of_layer = {key.removeprefix("layer_"): x for key, x in found.items() if key.startswith("layer_")}
        plain = {key: x for key, x in found.items() if not key.startswith("layer_")}
        assert (
            {"gradient_cosine", "gradient_norm_ratio", "gradient_bias", "gradient_noise"} <= set(of_layer) <= set(plain)
        )
        assert (of_layer == plain) is same


def test_what_was_never_visited_has_no_error():
    got = compare("sogclr", {"temperature": T})
    assert got["estimator_visited"] == 0
    assert "estimator_error" not in got


ERRORS_BY_AGE = [f"estimator_error_age_{k}" for k in range(1, 11)]
VISITED = {  # with these options the second visit of the same embeddings finds what the first one left
    "sogclr": {}, "isogclr": {"eta": 0.0}, "isogclr_net": {}, "fastclip": {"version": "v2", "temperature_lr": 0.0},
    "amclr": {}, "xamclr": {}, "amclr_dro": {"eta": 0.0}, "xamclr_dro": {"eta": 0.0}, "onlineclr": {"gamma": 1.0},
    "clip": {}, "dcl": {}, "dclw": {}, "uniformity": {}, "siglip": {}, "cyclip": {}, "vicreg": {},
    "simclr": {}, "slip": {}, "supcon": {"positives": "text"}, "decoupled": {"positives": "text"}, "one_to_k": {},
    "siglip_plus": {"positives": "text"}, "debiased": {}, "gram": {}, "m2_mixup": {}, "cacr": {}, "rankclip": {},
    "scent": {}, "vrns": {"target": -0.03}, "full_bank": {},
}  # fmt: skip


def test_every_objective_is_here():
    others = {"fifo_bank", "momentum_queue"}  # what they hold is of other batches
    others |= {"swav", "siamlip", "barlip", "negclip", "cwcl", "drrho"}  # they read more than these embeddings have
    others |= {"neuclip", "amorlip"}  # what their networks say is no batch's
    others |= {"byolip", "count", "degla", "distill", "filip", "mochi"}
    others |= {"m3col", "meow", "pamc"}  # partners are drawn; clusters are no batch's
    assert set(VISITED) | others == set(objectives.available())


@pytest.mark.parametrize("name", sorted(VISITED))
def test_a_batch_of_all_samples_is_the_whole_set(name):
    views = {"slip": 2, "simclr": 1, "one_to_k": 1}.get(name, int("amclr" in name))
    got = compare(name, VISITED[name], train_on=embeddings(1, views), batch=K, views=views)
    ours = dict(got)
    if "estimator_visited" in got:
        assert ours.pop("estimator_visited") == 1
        for key in ("estimator_error", "estimator_error_p90", "estimator_log_ratio", *ERRORS_BY_AGE):
            assert ours.pop(key) == pytest.approx(0, abs=1e-6)
    for key in ("gradient_bias", "gradient_noise"):
        assert ours.pop(key) == pytest.approx(0, abs=3e-4)
    assert set(ours) == {f"{kind}gradient_{what}" for kind in ("", "expected_") for what in ("cosine", "norm_ratio")}
    assert ours == pytest.approx(dict.fromkeys(ours, 1.0), rel=1e-6)


@pytest.mark.parametrize("name", ["isogclr", "fastclip"])
def test_all_samples_at_once_have_the_temperatures_of_every_layer(name):
    objective = objectives.create(name, **VISITED[name], num_samples=N, layers=[1.0, 3.0])
    g, e = torch.Generator().manual_seed(5), embeddings(1)
    for side in ("image", "text"):
        rows = F.normalize(torch.randn(K, D - 1, generator=g, dtype=torch.float64), dim=1)
        e.given[f"{side}_layers"] = (rows,)
        for one in (objective, objective.layers[0]):
            getattr(one, f"{side}_state").temperature.uniform_(0.02, 0.05, generator=g)  # inside the bounds
    objective(e)
    whole = objectives.create(name, **VISITED[name], num_samples=K, layers=[1.0, 3.0])
    found = compare_with_whole_set(objective, whole, e, global_batch_size=K)
    assert found["gradient_cosine"] == pytest.approx(1, abs=1e-9)
    assert found["gradient_norm_ratio"] == pytest.approx(1, abs=1e-9)


def test_what_makes_up_for_small_batches_is_off_in_the_whole_set():
    """CLIP in groups, AmCLR with one average for all pairings and drawn rows are far from what they stand in for."""
    drawn = compare("full_bank", {"negatives": 20}, train_on=embeddings(1), batch=K)
    assert drawn["expected_gradient_cosine"] < 0.95
    assert compare("clip", {"temperature": T, "group_size": 4}, batch=K)["expected_gradient_cosine"] < 0.999
    visited = embeddings(1, 1)
    shared = {"temperature": T, "state": "shared_sequential"}
    assert compare("amclr", shared, train_on=visited, batch=K, views=1)["estimator_error"] > 0.05


def test_a_gradient_of_zero_is_no_measure_of_others():
    """As of a squared hinge whose negatives are all far away: nothing to divide by, and no reason to stop a run."""
    found = objectives.whole_set._likeness({"image": torch.zeros(2)}, [{"image": torch.ones(2)}] * 2)
    assert len(found) == 6
    assert all(math.isnan(found[f"gradient_{what}"]) for what in ("cosine", "bias"))


NETWORKS = {
    "pamc": {"clusters": 6, "temperature": T},
    "neuclip": {"prototypes": 5, "inner_steps": 3, "temperature": T, "eps": 1e-3},
    "amorlip": {"positive": 0.3, "inner_steps": 3, "temperature": T, "average": 0.5},
}


def network_error(name):
    """By the probe, and from the definition of what the network estimates; and before the first step."""
    options = NETWORKS[name]
    found = compare(name, options, train_on=embeddings(0))
    objective = objectives.create(name, num_samples=N, **options)
    size = K // objectives.whole_set.world_size()
    mine = slice(objectives.whole_set.rank() * size, (objectives.whole_set.rank() + 1) * size)
    old, new = embeddings(0), embeddings(1)
    objective(replace(old, image=old.image[mine].clone().requires_grad_(), text=old.text[mine], ids=IDS[mine]))
    s = new.image @ new.text.T / T
    own = s.diagonal()
    if name == "pamc":
        estimates, exact = [], [x.exp().mean(1) / own.exp() for x in (s, s.T)]
        for z, side in ((new.image, "text"), (new.text, "image")):
            clusters = objective.clusters.of(side, z)
            shares = clusters.mass / clusters.mass.sum()
            estimates.append((shares * (z @ clusters.means.T / T - own[:, None]).exp()).sum(1))
    elif name == "neuclip":
        sides = zip((new.image, new.text), objective.network.shaped(objective.network.weights).values(), strict=True)
        estimates = [
            (
                1e-3
                + (z @ F.normalize(w[: objective.network.counts["filled"]], dim=1).T / T - own[:, None]).exp().mean(1)
            )
            for z, w in sides
        ]
        exact = [1e-3 + g for g in dense_means(new.image, new.text)]
    else:
        lams = predicted([new.image, new.text], objective.network.shaped(objective.network.average))
        estimates = [lam.exp() / (B - 1) for lam in lams]
        exact = [(off_diagonal(x).exp().sum(1) + 0.3 * own.exp()) / (K - 1) for x in (s, s.T)]
    errors = torch.cat([(u / g - 1).abs() for u, g in zip(estimates, exact, strict=True)])
    return found, float(errors.sort().values[K - 1]), compare(name, options)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_error_of_a_network_is_that_of_what_it_predicts_for_all(ranks, name):
    for W in (1, 2):
        for found, wanted, before in ranks(W, network_error, name):
            assert found["estimator_error"] == pytest.approx(wanted, rel=1e-9)
            assert found["estimator_visited"] == 1
            assert "estimator_error_age_10" in found
            assert before["estimator_visited"] == 0
            assert "estimator_error" not in before
    assert "estimator_error" not in compare(name, {**NETWORKS[name], "estimate": "batch"}, train_on=embeddings(0))
