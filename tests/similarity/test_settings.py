"""Settings: where they hold, and what they refuse."""

import threading

import pytest
import torch

from amclr_scale.distributed.collectives import Group
from amclr_scale.similarity import configure, current, distribution, using
from amclr_scale.similarity.distribution import choose


def test_a_block_changes_them_and_gives_them_back():
    before = current()
    with using(chunk=5, gather="ring") as inner:
        assert current() is inner
        assert (inner.chunk, inner.gather) == (5, "ring")
        with using(chunk=6):
            assert (current().chunk, current().gather) == (6, "ring")
        assert current() is inner
    assert current() == before


def test_the_process_has_its_own_and_threads_see_them():
    seen = []
    try:
        configure(chunk=9)
        with using(chunk=1):
            thread = threading.Thread(target=lambda: seen.append(current().chunk))
            thread.start()
            thread.join()
    finally:
        configure(chunk="auto")
    assert seen == [9]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk": 0}, "chunk: expected 'auto' or a positive number of rows, got 0"),
        ({"chunk": True}, "chunk: expected"),
        ({"gather": "some"}, "gather: expected one of all, ring, got 'some'"),
        ({"backend": "cuda"}, "backend: expected one of auto, torch, triton, got 'cuda'"),
        ({"precision": "tf32"}, "precision: expected one of auto, fp32, split, bf16, got 'tf32'"),
        ({"run_precision": "fp8"}, "run_precision: expected one of fp32, tf32, amp_bf16, bf16, fp16"),
        ({"distribution": "fast"}, "distribution: expected one of auto, reduce_scatter, column_sums, two_blocks"),
        ({"cache_bytes": -1}, "cache_bytes: expected a number of bytes"),
        ({"chunks": 3}, "chunks: no such similarity setting"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError, match=message), using(**change):
        pass


def test_the_automatic_distribution_follows_its_rule(monkeypatch):
    cpu, cuda, ranks = torch.device("cpu"), torch.device("cuda"), Group(0, 8, 0)
    assert choose("auto", Group(0, 1, 0), 8, cpu) == "reduce_scatter"
    assert choose("auto", ranks, 100, cpu) == "column_sums"
    assert choose("auto", ranks, 4096, cpu) == "reduce_scatter"
    monkeypatch.setattr(distribution, "world_size", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert choose("auto", ranks, 4096, cuda) == "reduce_scatter"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert choose("auto", ranks, 4096, cuda) == "column_sums"
    assert choose("two_blocks", ranks, 4096, cuda) == "two_blocks"
