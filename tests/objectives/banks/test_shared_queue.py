"""The option `queue` gives every softmax objective the same further keys, and no queue changes nothing."""

import math

import pytest
import torch

from amclr_scale.config.load import load
from amclr_scale.config.objective_options import declared
from amclr_scale.errors import UserError
from amclr_scale.objectives import Objective
from amclr_scale.objectives.masking import MaskOptions
from amclr_scale.types import Embeddings
from tests.objectives.banks.plain import banks_of, log_sum
from tests.objectives.harness import (
    NUM_SAMPLES,
    STEPS,
    B,
    assert_same,
    close,
    defined,
    global_batch,
    goes_on,
    joined,
    make,
    my_rows,
    run,
)

OWN = torch.eye(B, dtype=torch.bool)
QUEUE = {"queue": {"size": 13}}
TEACHER = {"queue": {"size": 16, "source": "momentum", "init": "batch", "key_gradient": False}}


def definition(name, *, queue, temperature=0.1, gamma=0.6, intra_weight=1.0, mask_duplicates="none"):
    """Of clip (at its learned temperature), dcl, sogclr and xamclr at omega = 1."""

    def loss(state, e: Embeddings, step: int):
        t = 1 / e.logit_scale if name == "clip" else temperature
        banks = banks_of(state, queue["size"], queue.get("init", "empty"))
        stored = (e.image_momentum, e.text_momentum) if queue.get("source") == "momentum" else (e.image, e.text)
        for bank, rows in zip(banks, stored, strict=True):
            bank.first_look(rows, e.ids)

        def against(anchors, keys, bank):
            """(B,) log-sums less the positive's logit, and how many keys they are of."""
            keys = keys if queue.get("key_gradient", True) else keys.detach()
            x, same = anchors @ keys.T, bank.same(e.ids)
            drop = OWN & (name != "clip")
            if mask_duplicates == "text":
                drop = drop | (e.text_content[:, None] == e.text_content) & ~OWN
            x, others = x.masked_fill(drop, -1e9), (~drop & ~OWN).sum(1)  # whose share is 0, and so is its gradient
            positive = (anchors * keys).sum(1) / t
            return log_sum(x, anchors @ bank.keys().T, same, t) - positive, others + (~same).sum(1)

        image_list, text_list = [(e.image, e.text, banks[1])], [(e.text, e.image, banks[0])]
        if name == "xamclr":
            (z1,), (t1,) = e.image_views, e.text_views
            z, y = (e.image, z1), (e.text, t1)
            image_list = [(a, k, banks[1]) for a in z for k in y] + [(z[0], z1, banks[0]), (z1, z[0], banks[0])]
            text_list = [(a, k, banks[0]) for a in y for k in z] + [(y[0], t1, banks[1]), (t1, y[0], banks[1])]
        value = objective = 0
        for side, entries in (("image", image_list), ("text", text_list)):
            log_us = []
            for k, entry in enumerate(entries):
                log_s, n = against(*entry)
                if name in ("clip", "dcl"):
                    value = value + log_s.mean() * (0.5 if name == "clip" else 1)
                    continue
                log_g = log_s - n.double().log()
                old = state.get(f"{side}_state.log_u", torch.full((NUM_SAMPLES, len(entries)), -torch.inf).double())
                before = old.view(NUM_SAMPLES, -1)[e.ids, k]
                u = torch.logaddexp(before + math.log(1 - gamma), log_g + math.log(gamma))
                u = torch.where(before.isinf(), log_g, u).detach()
                log_us.append(u)
                value = value + (t * (log_g - u).exp()).mean()
                objective = objective + (t * u).mean()
            if log_us:
                table = old.view(NUM_SAMPLES, -1).clone()
                table[e.ids] = torch.stack(log_us, 1)
                state[f"{side}_state.log_u"] = table.squeeze(1) if name == "sogclr" else table
        for side, bank, rows in zip(("image", "text"), banks, stored, strict=True):
            bank.put(rows, e.ids)
            bank.into(state, f"queue.{side}")
        value = value.squeeze()
        return value, value if name in ("clip", "dcl") else objective

    return loss


def options_of(name, queue):
    own = {"clip": {}, "dcl": {"temperature": 0.1}, "sogclr": {"temperature": 0.1, "gamma": 0.6}}
    return {**own.get(name, {"temperature": 0.1, "gamma": 0.6, "intra_weight": 1.0}), **queue}


MASKED_QUEUE = {**QUEUE, "mask_duplicates": "text"}
CASES = [("clip", QUEUE), ("clip", TEACHER), ("dcl", QUEUE), ("sogclr", TEACHER), ("xamclr", QUEUE)]
CASES += [("clip", MASKED_QUEUE), ("sogclr", MASKED_QUEUE)]


@pytest.mark.parametrize(("name", "queue"), CASES, ids=str)
def test_the_queue_adds_keys(name, queue):
    batch = {"views": 1, "duplicate": name in ("clip", "dcl")}
    want = defined(definition(name, **queue), batch=batch)
    for chunk in (3, "auto"):
        assert_same(run(name, options_of(name, queue), chunk=chunk, batch=batch), want)


def every_case(layout):
    return [run(name, options_of(name, queue), batch={"views": 1}, sample_state=layout) for name, queue in CASES]


@pytest.mark.parametrize(("world_size", "layout"), [(4, "sharded"), (2, "replicated")])
def test_ranks_are_one_batch(ranks, world_size, layout):
    for (name, queue), *answers in zip(CASES, *ranks(world_size, every_case, layout), strict=True):
        assert_same(joined(answers), defined(definition(name, **queue), batch={"views": 1}))


@pytest.mark.parametrize(("name", "queue"), [CASES[1], CASES[3]], ids=str)
def test_a_state_goes_on_bit_for_bit_on_other_ranks(ranks, name, queue):
    goes_on(ranks, name, options_of(name, queue), {"duplicate": name == "clip"})


MASKED = [name for name, kind in sorted(Objective.registry.items()) if issubclass(kind.Config, MaskOptions)]
TAKERS = [name for name in MASKED if name not in ("simclr", "drrho", "filip")]  # drrho: stored rows have no reference


@pytest.mark.parametrize("name", TAKERS)
def test_every_softmax_objective_takes_one(name):
    own = {"cyclip": {"inmodal": True}, "one_to_k": {"texts": 2}}.get(name, {})
    assert len(TAKERS) > 10
    with_queue, without = make(name, **own, queue={"size": 13}), make(name, **own)
    for step in range(2):
        e, same = (my_rows(global_batch(step, views=2, negatives=4, heads=True)) for _ in range(2))
        loss, plain = with_queue(e), without(same)
        loss.value.backward()
        plain.value.backward()
        assert loss.metrics["bank_filled"] == (0, 8)[step]
        close(e.image.grad, same.image.grad, 1e-12, "before anything is in it") if step == 0 else None
    assert (e.image.grad - same.image.grad).abs().max() > 1e-8
    assert e.image.grad.isfinite().all()
    assert declared({"name": name, "queue": {"size": 13}}).negatives(B) == declared({"name": name}).negatives(B) + 13


def test_a_queue_of_no_slots_is_none():
    a, b = (run("clip", {"queue": queue}, epochs=(0.0,) * STEPS) for queue in (None, {"size": 0}))
    assert all(torch.equal(x.rows["image"], y.rows["image"]) for x, y in zip(a[0], b[0], strict=True))
    assert make("clip").queue is None
    assert make("clip", queue={"size": 0}).queue is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make("clip", queue=5), "queue: expected a section with some of size, width, "),
        (lambda: make("clip", queue={"sise": 5}), r"queue\.sise: queue has no such option; did you mean 'size'"),
        (lambda: make("clip", queue={"size": -5}), r"queue\.size: expected at least as many slots"),
        (lambda: make("simclr", queue={"size": 8}), "queue: expected null"),
        (lambda: make("filip", queue={"size": 8}), "queue: expected null: it would hold the tokens"),
        (lambda: make("clip", queue={"size": 8}, label_smoothing=0.1), "label_smoothing: expected 0 beside"),
        (lambda: make("sogclr", queue={"size": 8}, surrogate="squared_hinge"), "surrogate: expected without masks"),
        (
            lambda: load("configs/quickstart.yaml", ["objective.queue.size=64"]),
            r"objective\.queue\.size: expected at least .* = 128 slots",
        ),
        (lambda: load("configs/quickstart.yaml", ["objective.queue.sise=64"]), r"objective\.queue\.sise: no such key"),
        (
            lambda: load("configs/quickstart.yaml", ["objective.queue.size=9223372036854775807"]),
            r"objective\.queue\.size: expected at most 2\^48, got 9223",
        ),
        (
            lambda: load("configs/quickstart.yaml", ["objective.queue={size: 512, width: 5}"]),
            r"objective\.queue\.width: expected model\.embedding_width = 128, or null, got 5",
        ),
        (
            lambda: load("configs/quickstart.yaml", ["objective.queue={size: 512, source: momentum}"]),
            r"model\.momentum: objective clip reads",
        ),
    ],
)
def test_mistakes_are_answered_in_words(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_it_is_a_section_of_the_configuration():
    config = load("configs/quickstart.yaml", ["objective.name=sogclr", "objective.queue.size=512"])
    assert config.objective["queue"] == {
        "size": 512, "width": None, "dtype": "float32", "init": "empty", "exclude_same_id": True, "source": "student",
        "key_gradient": True, "wait_epochs": 0.0,
    }  # fmt: skip
    assert load("configs/quickstart.yaml", ["objective.name=sogclr"]).objective["queue"] is None


def test_a_queue_that_waits_is_filled_and_is_no_key_yet():
    waiting, plain = (make("clip", queue={"size": 16, "wait_epochs": wait}) for wait in (1.0, 0.0))
    without = make("clip")
    for epoch in (0.0, 0.5, 1.0):
        e = my_rows(global_batch(round(2 * epoch), duplicate=True))
        for objective in (waiting, plain, without):
            objective.set_epoch(epoch)
        got, full, none = (objective(e).value.item() for objective in (waiting, plain, without))
        assert got == (none if epoch < 1 else full)
    assert full > none
    assert make("momentum_queue", size=16, wait_epochs=1.0).bank.wait_epochs == 1
    with pytest.raises(ValueError, match="wait_epochs: expected 0, since queue_only leaves no other negatives"):
        make("momentum_queue", queue_only=True, wait_epochs=1.0)
