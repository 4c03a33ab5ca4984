"""Duplicates and likely false negatives are left out, by whatever objective is asked to."""

import dataclasses

import pytest
import torch
from torch import Tensor

from amclr_scale import objectives
from amclr_scale.errors import UserError
from amclr_scale.types import Embeddings, content
from tests.objectives.harness import (
    NUM_SAMPLES,
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

COPIES = {"copies": True}
MASKED = [
    ("clip", {"mask_duplicates": "image"}),
    ("clip", {"mask_duplicates": "both", "false_negative_margin": 0.2}),
    ("clip", {"mask_duplicates": "text", "group_size": 4}),
    ("dcl", {"mask_duplicates": "both", "temperature": 0.1}),
    ("dclw", {"mask_duplicates": "image", "false_negative_margin": 0.1}),
    ("sogclr", {"mask_duplicates": "text", "gamma": 0.6}),
]


def left_out(e: Embeddings, options: dict, s: Tensor) -> Tensor:
    """(B, B), of anchors in rows."""
    drop = torch.zeros(B, B, dtype=torch.bool)
    if options["mask_duplicates"] in ("image", "both"):
        drop |= e.ids[:, None] == e.ids
    if options["mask_duplicates"] in ("text", "both"):
        drop |= e.text_content[:, None] == e.text_content
    if "false_negative_margin" in options:
        drop |= s > s.diagonal()[:, None] + options["false_negative_margin"]
    g = options.get("group_size", B)
    others = torch.arange(B)[:, None] // g != torch.arange(B) // g
    return (drop & ~torch.eye(B, dtype=torch.bool)) | others


def definition(name: str, options: dict):
    def loss(state, e: Embeddings, step: int):
        t = options.get("temperature", {"clip": 1 / e.logit_scale}.get(name, 0.07))
        s, own = e.image @ e.text.T, torch.eye(B, dtype=torch.bool)
        sides = []
        for k, m in enumerate((s, s.T)):
            drop, x = left_out(e, options, m.detach()), m / t
            positive = x.diagonal()
            if name == "clip":
                sides.append((x.masked_fill(drop, -torch.inf).logsumexp(1) - positive) / 2)
                continue
            drop = drop | own
            some = ~drop.all(1)
            log_sum = torch.where(some[:, None], x.masked_fill(drop, -torch.inf), 0.0).logsumexp(1)
            if name.startswith("dcl"):
                density = (s.diagonal() / 0.5).exp()
                weight = 1.0 if name == "dcl" else 2 - density / density.mean()
                sides.append(torch.where(some, log_sum - weight * positive, 0.0))
            else:
                key, g = f"{('image', 'text')[k]}_state.log_u", (log_sum - positive).exp() / (~drop).sum(1)
                old = state.setdefault(key, torch.full((NUM_SAMPLES,), -torch.inf, dtype=torch.float64))
                before = old[e.ids].exp()
                u = torch.where(before == 0, g, 0.4 * before + 0.6 * g).detach()
                u = torch.where(some, u, before)
                state[key] = old.clone()
                state[key][e.ids] = u.log()
                sides.append(torch.where(some, t * g / u, 0.0))
        value = (sides[0] + sides[1]).mean()
        return value, t * sum(state[k][e.ids] for k in state).mean() if name == "sogclr" else value

    return loss


def batch_of(name: str) -> dict:
    return {} if name == "sogclr" else COPIES  # where a table is written, ids come once


@pytest.mark.parametrize(("name", "options"), MASKED, ids=str)
def test_the_option_is_a_hole_in_the_matrix(name, options):
    want = defined(definition(name, options), batch=batch_of(name))
    for chunk in (3, "auto"):
        assert_same(run(name, options, chunk=chunk, batch=batch_of(name)), want)


def pairings(state: str, t: float = 0.1, gamma: float = 0.6, margin: float = 0.0):
    """AmCLR where a pairing of an anchor may have no key: it has no term and leaves its average as it was."""

    def loss(tables, e: Embeddings, step: int):
        value: Tensor | float = 0.0
        images, texts = (e.image, *e.image_views), (e.text, *e.text_views)
        lists = {"image": [(z, x) for z in images for x in texts], "text": [(x, z) for x in texts for z in images]}
        for side, entries in lists.items():
            width = len(entries) if state == "per_pair" else 1
            table = tables.setdefault(
                f"{side}_state.log_u", torch.full((NUM_SAMPLES, width), -torch.inf, dtype=torch.float64)
            )
            for i, row in enumerate(e.ids.tolist()):
                gs = {}
                for k, (anchors, keys) in enumerate(entries):
                    s = anchors[i] @ keys.T
                    near = [j for j in range(B) if j != i and s[j] <= s[i] + margin]
                    if near:
                        gs[k] = ((s[near] - s[i]) / t).exp().sum() / (B - 1)
                before = table[row].exp().tolist()
                us = list(before)
                for k, g in gs.items():
                    at = k if width > 1 else 0
                    new = sum(gs.values()) / len(gs) if state == "shared_mean" else g
                    last = us[at] if state == "shared_sequential" else before[at]
                    us[at] = new.item() if before[at] == 0 else (1 - gamma) * last + gamma * new.item()
                    value = value + t * g / us[at] / B
                table[row] = torch.tensor(us, dtype=torch.float64).log()
        return value, value

    return loss


def turned(step: int) -> Embeddings:
    """Half of the texts turned away from their images, further than all others, and of the other half the views."""
    e = global_batch(step, views=1)
    even = torch.where(torch.arange(B) % 2 == 0, -1.0, 1.0)[:, None]
    text, view = even * e.text.detach(), -even * e.text_views[0].detach()
    return dataclasses.replace(e, text=text.requires_grad_(), text_views=(view.requires_grad_(),))


@pytest.mark.parametrize("state", ["per_pair", "shared_sequential", "shared_mean"])
def test_a_pairing_without_keys_says_nothing(state):
    objective = make("amclr", temperature=0.1, gamma=0.6, state=state, false_negative_margin=0.0)
    define, tables = pairings(state), {}
    for step in range(4):
        ours, theirs = turned(step), turned(step)
        got, (want, _) = objective(ours).value, define(tables, theirs, step)
        got.backward()
        want.backward()
        assert got.item() == pytest.approx(want.item(), rel=1e-10)
        rows, wanted_rows = ((e.image, e.text, *e.image_views, *e.text_views) for e in (ours, theirs))
        for x, y in zip(rows, wanted_rows, strict=True):
            close(x.grad, y.grad, 1e-10, "gradient")
    kept = objective.state_dict()
    for name, wanted in tables.items():
        torch.testing.assert_close(kept[name].double(), wanted, rtol=1e-10, atol=1e-10)
    unknown = tables["image_state.log_u"].isneginf()
    assert (unknown.any(1) & ~unknown.all(1)).any() == (state == "per_pair")


@pytest.mark.parametrize("world_size", [2])
def test_ranks_are_one_batch(ranks, world_size):
    for name, options in MASKED:
        got = joined(ranks(world_size, run, name, options, chunk=3, batch=batch_of(name)))
        assert_same(got, defined(definition(name, options), batch=batch_of(name)))


HAVE = [name for name, found in objectives.available().items() if "mask_duplicates" in found.options]


WITHOUT = {
    "siglip",
    "siglip_plus",
    "vicreg",
    "supcon",
    "decoupled",
    "fifo_bank",
    "momentum_queue",
    "full_bank",
    "gram",
    "cacr",
    "cwcl",
    "distill",
    "mochi",
    "meow",
    "pamc",
    "m3col",
}


def test_every_softmax_objective_has_the_options():
    assert set(objectives.available()) - set(HAVE) == WITHOUT


@pytest.mark.parametrize("name", HAVE)
def test_unique_ids_change_nothing_and_copies_do(name):
    """Bit for bit; and an anchor without negatives leaves value, gradients and state finite."""
    found = []
    for options, change in (
        ({}, {}),
        ({"mask_duplicates": "both"}, {}),
        ({"mask_duplicates": "both"}, {"text_content": torch.arange(B) // 2}),
        ({"mask_duplicates": "text"}, {"text_content": torch.zeros(B, dtype=torch.int64)}),
        ({"false_negative_margin": 0.0}, {"text": -global_batch(0).image.detach()}),
    ):  # fmt: skip
        e = my_rows(global_batch(0, views=2, negatives=4, heads=True, tokens=True))
        e.given["text_content"] = change.get("text_content", 7 * torch.arange(B))
        e = dataclasses.replace(e, text=change["text"].requires_grad_()) if "text" in change else e
        objective = make(name, **options)
        loss = objective(e)
        loss.value.backward()
        gradient = (e.image if name != "filip" else e.image_tokens).grad
        found.append((loss.value.detach(), gradient, dict(objective.state_dict())))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][1], found[2][1])
    for value, gradient, state in found[3:]:
        assert value.isfinite()
        assert gradient.isfinite().all()
        assert not any(x.isnan().any() or x.isposinf().any() for x in state.values())


def test_what_cannot_be_masked_is_refused():
    for name, options, key in (
        ("sogclr", {"surrogate": "squared_hinge"}, "surrogate"),
        ("isogclr", {"surrogate": "squared_hinge"}, "surrogate"),
        ("clip", {"label_smoothing": 0.1}, "label_smoothing"),
    ):
        with pytest.raises(UserError, match=f"^{key}: expected"):
            make(name, mask_duplicates="image", **options)
        with pytest.raises(UserError, match=f"^{key}: expected"):
            make(name, false_negative_margin=0.1, **options)
    with pytest.raises(UserError, match=r"embeddings\.text_content: clip needs them"):
        make("clip", mask_duplicates="text")(Embeddings(torch.eye(3), torch.eye(3), logit_scale=torch.ones(1)))
    with pytest.raises(UserError, match=r"false_negative_margin: expected"):
        make("dcl", false_negative_margin=-1.0)


def test_captions_are_known_by_their_words():
    tokens = torch.randint(0, 300, (2000, 20), generator=torch.Generator().manual_seed(0))
    tokens[1000:, 3] += 1  # one token apart
    tokens[1000:] = torch.where(torch.arange(1000)[:, None] < 500, tokens[1000:], tokens[1000:].flip(1))  # other orders
    tokens[1000:, 3] -= 1
    found = content(tokens)
    assert found.min() >= 0
    assert len(found.unique()) == len(tokens.unique(dim=0))
    assert torch.equal(content(tokens[7:8]), found[7:8])
    close(found.double().mean() / 2**62, torch.tensor(1.0, dtype=torch.float64), 0.1, "spread evenly")
