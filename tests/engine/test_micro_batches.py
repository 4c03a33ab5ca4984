"""Copies beside kernels: what waits for what on CUDA, on streams that are pretended."""

from contextlib import contextmanager
from unittest import mock

import torch

from amclr_scale.engine import micro_batches
from amclr_scale.engine.micro_batches import MicroBatch, on_device, split
from tests.engine.towers import global_batch

CUDA, N = torch.device("cuda", 0), 6


class Stream:
    """Work in order. `before` holds, for each piece of work, what is certain to be done when it begins."""

    def __init__(self):
        self.certain: set[str] = set()
        self.before: dict[str, set[str]] = {}

    def run(self, work: str) -> None:
        self.before[work] = set(self.certain)
        self.certain.add(work)

    def wait_stream(self, other: "Stream") -> None:
        self.certain |= other.certain


def two_passes() -> tuple[Stream, Stream]:
    """The device's own stream and that of the copies, after both passes over six micro-batches."""
    kernels, copies = Stream(), Stream()
    current, turn = [kernels], 0

    @contextmanager
    def stream(chosen: Stream):
        current.append(chosen)
        yield
        current.pop()

    def to(waiting: MicroBatch, device: torch.device) -> MicroBatch:
        assert device == CUDA
        current[-1].run(f"copy {turn}.{waiting.rows.start}")
        return waiting

    micro_batches._stream_for_copies.cache_clear()
    with (
        mock.patch.multiple(torch.cuda, Stream=lambda _: copies, current_stream=lambda _: current[-1], stream=stream),
        mock.patch.object(MicroBatch, "to", to),
    ):
        for turn in range(2):
            for part in on_device(split(global_batch(0, N), 1, 1), CUDA):
                current[-1].run(f"encode {turn}.{part.rows.start}")
    micro_batches._stream_for_copies.cache_clear()
    return kernels, copies


def test_copies_run_beside_kernels_and_wait_for_whoever_may_still_read_their_memory():
    kernels, copies = two_passes()
    assert list(kernels.before) == [f"encode {turn}.{n}" for turn in range(2) for n in range(N)]
    assert len(copies.before) == 2 * N
    for turn in range(2):
        for n in range(N):
            assert f"copy {turn}.{n}" in kernels.before[f"encode {turn}.{n}"], "encoded before it is there"
            if n + 1 < N:
                assert f"copy {turn}.{n + 1}" not in kernels.before[f"encode {turn}.{n}"], "kernels wait for the next"
                assert f"encode {turn}.{n}" not in copies.before[f"copy {turn}.{n + 1}"], "a copy waits for kernels"
            if 0 < n < N - 1:
                assert f"encode {turn}.{n - 1}" in copies.before[f"copy {turn}.{n + 1}"], "its memory may be read yet"
    assert f"encode 0.{N - 1}" in copies.before["copy 1.0"]
