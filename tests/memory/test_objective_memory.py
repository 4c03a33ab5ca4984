"""What objectives allocate: state, changes of it that wait, and the worst moment of a step, on any rows and ranks."""

import json
from contextlib import nullcontext
from typing import Any

import pytest

from amclr_scale import objectives
from amclr_scale.config.load import build
from amclr_scale.memory import objective_memory as accounts
from amclr_scale.memory.account import account
from amclr_scale.memory.objective_memory import (
    create,
    host_state_bytes,
    objective_memory,
    pretended,
    sample_state_bytes,
    staged_bytes,
)
from amclr_scale.memory.random_embeddings import random_embeddings, tensors_of
from amclr_scale.memory.tracker import Tracker
from amclr_scale.objectives.layers import rehearse
from amclr_scale.objectives.staging import forgotten, staged
from amclr_scale.similarity import using
from amclr_scale.similarity.blocks import Workspace
from tools.memory_pages import formulas

N = 4096
SAMPLES = 512  # of a data set
SMALLER = {"barlip": {"coordinates": 256, "hidden": 64}}


@pytest.mark.parametrize("name", sorted(objectives.available()))
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.slow
def test_every_objective_on_other_rows_than_it_was_run_on(name, world_size):
    rows, chunk, width = 48, 16, 32
    section = {"name": name, **SMALLER.get(name, {})}
    memory = objective_memory(
        section,
        width=width,
        world_size=world_size,
        gather="all",
        distribution="column_sums",
        layout="replicated",
        num_samples=SAMPLES,
    )
    with pretended(world_size), using(chunk=chunk, distribution="column_sums"):
        made = create(json.dumps(section), SAMPLES, "replicated", None)
        made.rehearse(width, rows * world_size)
        embeddings = random_embeddings(made, rows, width, world_size)
        tracker = Tracker()
        tracker.add([*made.buffers(), *tensors_of(embeddings)], "before")
        before = tracker.total
        with tracker, forgotten() if made.stores_features else nullcontext():
            made(embeddings).value.backward()
    assert sum(memory.peak(rows, workspace=Workspace(chunk, chunk, 12), rows_at_once=chunk)) == pytest.approx(
        tracker.peak - before, rel=0.02
    )


@pytest.mark.parametrize("name", ["clip", "simclr"])
def test_matrices_that_are_kept_for_backward(name):
    rows, chunk, width, ask = 48, 16, 32, {"gather": "all", "distribution": "column_sums", "layout": "replicated"}
    memory = objective_memory({"name": name}, width=width, world_size=2, num_samples=SAMPLES, **ask)
    with pretended(2), using(chunk=chunk, distribution="column_sums", cache_bytes=2**30):
        made = create(json.dumps({"name": name}), SAMPLES, "replicated", None)
        embeddings, tracker = random_embeddings(made, rows, width, 2), Tracker()
        tracker.add(tensors_of(embeddings), "before")
        before = tracker.total
        with tracker:
            made(embeddings).value.backward()
    held = memory.peak(rows, workspace=Workspace(chunk, chunk, 12), rows_at_once=chunk, cache_bytes=2**30)
    assert sum(held) == pytest.approx(tracker.peak - before, rel=0.02)
    assert held[0] - memory.peak(rows, workspace=Workspace(chunk, chunk, 12), rows_at_once=chunk)[0] >= 4 * rows * rows


@pytest.mark.parametrize("name", ["sogclr", "isogclr", "amclr_dro", "momentum_queue", "full_bank", "layers"])
def test_changes_of_state_that_wait_for_the_end_of_a_step(name):
    section = {"name": "fifo_bank", "layers": [1, 1]} if name == "layers" else {"name": name}
    layers = (20,) if name == "layers" else ()
    made = create(json.dumps(section), 48, "replicated", None)
    rehearse(made, 32, 48, layers)
    embeddings = random_embeddings(made, 48, 32, 1, {f"{side}_layers.0": 20 for side in ("image", "text")})
    tracker = Tracker()
    tracker.add([*made.buffers(), *tensors_of(embeddings)], "before")
    with tracker:
        with staged():
            made(embeddings).value.backward()
            held = tracker.total
        held -= tracker.total
    assert held == staged_bytes(section, 48, 1, "replicated", width=32, layers=layers)


def test_more_ranks_follow_from_few():
    ask = {"width": 32, "gather": "all", "distribution": "column_sums", "layout": "replicated", "num_samples": N}
    few, many = (objective_memory({"name": "clip"}, world_size=w, **ask) for w in (4, 64))
    gathered = 60 * 48 * 32 * 4  # the features of 60 more ranks
    assert (
        many.peak(48, workspace=Workspace(48, 48, 12), rows_at_once=48)[1]
        - few.peak(48, workspace=Workspace(48, 48, 12), rows_at_once=48)[1]
        > 2 * gathered
    )


@pytest.mark.parametrize(("image", "text", "chunk"), [(20, 11, 64), (5, 30, 70), (7, 4, 400)])
def test_tiles_of_tokens_are_counted_for_any_number_of_tokens(image, text, chunk):
    rows, width, sizes = 48, 32, {"image_tokens": image, "text_tokens": text}
    section = {"name": "filip"}
    memory = objective_memory(
        section, width=width, world_size=2, gather="all", distribution="reduce_scatter", layout="replicated",
        num_samples=SAMPLES, sizes=sizes,
    )  # fmt: skip
    with pretended(2), using(chunk=chunk):
        made = create(json.dumps(section), SAMPLES, "replicated", None)
        embeddings = random_embeddings(made, rows, width, 2, sizes)
        tracker = Tracker()
        tracker.add(tensors_of(embeddings), "before")
        before = tracker.total
        with tracker:
            made(embeddings).value.backward()
    held = memory.peak(rows, workspace=Workspace(chunk, chunk, 12), rows_at_once=chunk)
    assert sum(held) == pytest.approx(tracker.peak - before, rel=0.02)


def test_groups_of_four_ranks_follow_from_few_too():
    ask = {"width": 32, "gather": "all", "distribution": "column_sums", "layout": "replicated", "num_samples": N}
    found = [
        objective_memory({"name": "clip"}, world_size=w, group_share=4.0, **ask).peak(
            48, workspace=Workspace(16, 16, 12), rows_at_once=16
        )
        for w in (8, 16, 64)
    ]
    assert found[0] == found[1] == found[2]  # a rank meets its own group alone
    alone = objective_memory({"name": "clip"}, world_size=4, group_share=None, **ask)
    assert sum(found[0]) == pytest.approx(
        sum(alone.peak(48, workspace=Workspace(16, 16, 12), rows_at_once=16)), rel=0.1
    )


@pytest.mark.parametrize("name", ["fifo_bank", "momentum_queue"])
def test_banks_are_counted_to_the_byte(name):
    """Two banks of 65,536 x 3,072 floats, and an id and a step of 8 bytes for every slot."""
    section, each = {"name": name, "size": 65_536}, 805_306_368 + 65_536 * 16
    assert sample_state_bytes(section, N, 1, "replicated", width=3072) == (2 * each, "replicated")
    assert sample_state_bytes(section, N, 8, "auto", width=3072) == (2 * each // 8, "sharded")
    assert sample_state_bytes({**section, "dtype": "bfloat16"}, N, 1, "replicated", width=768)[0] == 2 * (
        65_536 * (768 * 2 + 16)
    )
    assert formulas.queue(65_536, 3072) == 805_306_368
    # the notes' four banks, of two layers, and the two that they kept
    both = [sample_state_bytes(section, N, 1, "replicated", width=width)[0] - 2 * 65_536 * 16 for width in (768, 3072)]
    assert (sum(both), both[0]) == (2_013_265_920, 402_653_184)
    of_layers = sample_state_bytes({**section, "layers": [1, 1]}, N, 1, "replicated", width=768, layers=(3072,))[0]
    assert of_layers - 4 * 65_536 * 16 == 2_013_265_920
    assert sample_state_bytes({**section, "layers": [1, 1]}, N, 8, "sharded", width=768, layers=(3072,)) == (
        of_layers // 8, "sharded",
    )  # fmt: skip


LAYERS: dict[str, Any] = {"layers": [1, 0.5]}


@pytest.mark.parametrize("section", [{"name": "clip"}, {"name": "momentum_queue"}, {"name": "full_bank"}], ids=str)
def test_an_objective_of_layers_of_other_widths(section):
    section, widths, rows, chunk = {**section, **LAYERS}, {"image_layers.0": 20, "text_layers.0": 20}, 48, 16
    memory = objective_memory(
        section, width=32, world_size=2, gather="all", distribution="column_sums", layout="replicated",
        num_samples=SAMPLES, sizes=widths,
    )  # fmt: skip
    with pretended(2), using(chunk=chunk, distribution="column_sums"):
        made = create(json.dumps(section), SAMPLES, "replicated", None)
        rehearse(made, 32, rows * 2, (20,))
        embeddings, tracker = random_embeddings(made, rows, 32, 2, widths), Tracker()
        tracker.add([*made.buffers(), *tensors_of(embeddings)], "before")
        before = tracker.total
        with tracker, forgotten():
            made(embeddings).value.backward()
    peak = sum(memory.peak(rows, workspace=Workspace(chunk, chunk, 12), rows_at_once=chunk))
    assert tracker.peak - before == pytest.approx(peak, rel=0.02)


def test_the_account_of_a_run_has_its_layers():
    """Without a head, hidden units of 64: beside banks of 32, and beside features and gradients of 32."""
    taps = {"image": {"width": 8, "taps": [{"module": "stages.3", "head": "none"}]}}
    taps["text"] = {"width": 16, "layers": 1, "taps": [{"module": "layers.0.up", "head": "none"}]}
    tree = {
        "model": {**taps, "embedding_width": 32, "momentum": {"decay": 0.9}}, "train": {"epochs": 1},
        "objective": {"name": "momentum_queue", "size": 256},
    }  # fmt: skip
    plain = {side: {**section, "taps": []} for side, section in taps.items()}
    without = account(build({**tree, "model": {**tree["model"], **plain}}), world_size=1, num_samples=N, device="cpu")
    found = account(
        build({**tree, "objective": {**tree["objective"], "layers": [1, 1]}}), world_size=1, num_samples=N, device="cpu"
    )

    def more(name: str) -> int:
        ours, theirs = (next(c for c in one.components if c.name == name) for one in (found, without))
        return ours.by_phase["objective"] - theirs.by_phase["objective"]

    assert more("sample state") == 2 * 256 * (64 * 4 + 16)
    B = 128
    assert more("features and their gradients") == 2 * 2 * B * 64 * 4
    assert more("features of the teacher") == 2 * B * 64 * 4


def test_a_row_for_every_sample_is_counted_where_it_lies():
    rows = 2 * 4 * 768 * N
    for device, (on_device, on_host) in {"gpu": (rows, 0), "host": (0, rows), "sharded": (rows // 8, 0)}.items():
        ask = ({"name": "full_bank", "device": device, "negatives": 512}, N, 8, "replicated")
        assert sample_state_bytes(*ask, width=768)[0] == on_device
        assert host_state_bytes(*ask, width=768) == on_host


def test_stored_rows_that_are_cut_over_the_ranks_follow_from_few_as_well(monkeypatch):
    """With as many stored rows of each rank, more ranks only add what grows with them."""
    monkeypatch.setattr(accounts, "TABLES", (53, 101))  # quicker, and further away from what follows
    ask = {"width": 8, "gather": "all", "distribution": "column_sums", "layout": "sharded"}
    few, many = (
        objective_memory({"name": "full_bank", "device": "sharded"}, world_size=W, num_samples=10**6 * W, **ask).peak(
            32, workspace=Workspace(32, 32, 12), rows_at_once=32
        )[1]
        for W in (4, 64)
    )
    assert 10**6 < few <= many < 1.05 * few


def test_sample_state_is_sharded_when_it_is_large():
    assert sample_state_bytes({"name": "sogclr"}, N, 8, "auto") == (2 * 4 * N, "replicated")
    assert sample_state_bytes({"name": "sogclr"}, N, 8, "sharded") == (2 * 4 * N // 8, "sharded")
    size, layout = sample_state_bytes({"name": "sogclr"}, 400_000_000, 8, "auto")
    assert layout == "sharded"
    assert size == 2 * 4 * 400_000_000 // 8


@pytest.mark.parametrize(("ranks", "device"), [(1, "gpu"), pytest.param(2, "sharded", marks=pytest.mark.slow)])
def test_many_drawn_rows_follow_from_few(ranks, device, monkeypatch):
    """As if all of them had been traced; a trace of 65,536 takes minutes."""
    section = {"name": "full_bank", "negatives": 400, "key_gradient": False, "device": device}
    ask = {"width": 24, "world_size": ranks, "gather": "all", "distribution": "column_sums", "layout": "auto"}

    def peak():
        found = objective_memory(section, num_samples=4000, **ask)
        return sum(found.peak(48, workspace=Workspace(32, 32, 24), rows_at_once=32))

    whole = peak()
    monkeypatch.setattr(accounts, "MANY", 300)
    assert peak() == pytest.approx(whole, rel=0.002)
