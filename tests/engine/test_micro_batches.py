"""Copies beside kernels: what waits for what on CUDA, on streams that are pretended."""

from contextlib import contextmanager
from unittest import mock

import pytest
import torch

from amclr_scale import objectives
from amclr_scale.config.load import build
from amclr_scale.engine import micro_batches
from amclr_scale.engine.gradient_cache import cached_backward
from amclr_scale.engine.micro_batches import MicroBatch, on_device, split
from amclr_scale.errors import UserError
from amclr_scale.types import Batch
from tests.encoders.test_frozen import WHOLE, model
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


@pytest.mark.parametrize("text", [{}, WHOLE])
def test_captions_are_cut_after_the_longest_of_their_micro_batch(text):
    """The tower, which cuts by itself on a CPU, is kept from it; the gradient is that of whole captions."""
    g, gradients, seen = torch.Generator().manual_seed(0), [], []
    texts = torch.randint(1, 30, (8, 24), generator=g)
    for row, length in enumerate((3, 5, 2, 8, 20, 1, 2, 11)):
        texts[row, length:] = 0
    images = torch.randint(0, 256, (8, 3, 16, 16), generator=g, dtype=torch.uint8)
    for cut in (False, True):
        made = model(WHOLE, text, length=24).double()
        columns = [made.caption_columns((texts[rows],)) for rows in (slice(0, 4), slice(4, 8))]
        made.text_tower.filled = True
        made.text_tower.tokens.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
        given = iter(columns)
        cached_backward(
            made, objectives.create("clip"), Batch(torch.arange(8), (images,), (texts,)), micro_batch_sizes=(4, 4),
            device=torch.device("cpu"), kept=1, columns=(lambda _, given=given: next(given)) if cut else None,
        )  # fmt: skip
        assert columns == [8, 24]
        gradients.append({name: p.grad for name, p in made.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-12)
    runs = 2 if text else 3  # a frozen tower is not run again
    assert seen == [24] * runs + [8, 24, 8][:runs]


def test_captions_that_something_else_compares_stay_whole():
    made = model({}, {})
    texts = (torch.tensor([[1, 2, 0, 0, 0]]),)
    assert made.caption_columns(texts) == 5
    assert made.caption_columns(()) is None
    made.tokens = ("text",)
    assert made.caption_columns(texts) is None
    made.tokens = ()
    made.rest("text")
    assert made.caption_columns(texts) is None
    execution = {"trim_texts": True, "compile": True}
    with pytest.raises(UserError, match=r"execution\.trim_texts: expected false beside execution\.compile"):
        build({"train": {"samples": 256}, "execution": execution})
