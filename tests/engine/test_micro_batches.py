"""Copies beside kernels: what waits for what on CUDA, on streams that are pretended."""

from contextlib import contextmanager
from unittest import mock

import pytest
import torch

from amclr_scale import objectives
from amclr_scale.config.load import build
from amclr_scale.config.schema import ImageTower, Model, TextTower
from amclr_scale.distributed.collectives import rank, world_size
from amclr_scale.encoders.build import build_model
from amclr_scale.engine import micro_batches
from amclr_scale.engine.deepspeed_setup import build_engine, prepare_towers
from amclr_scale.engine.gradient_cache import cached_backward
from amclr_scale.engine.micro_batches import MicroBatch, on_device, split
from amclr_scale.engine.step import TrainStep
from amclr_scale.engine.zero.master_weights import full_fp32
from amclr_scale.errors import UserError
from amclr_scale.metrics.phases import Phases
from amclr_scale.types import Batch
from tests.encoders.test_frozen import WHOLE, model
from tests.engine.towers import config, global_batch

CPU, CUDA, N = torch.device("cpu"), torch.device("cuda", 0), 6


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


LENGTHS = (3, 5, 2, 8, 20, 1, 2, 11)


def captions(views: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Of 8 samples; in further views the first is the longest."""
    g, found = torch.Generator().manual_seed(seed), []
    for view in range(1 + views):
        found.append(torch.randint(1, 30, (8, 24), generator=g))
        for row, length in enumerate(LENGTHS if view == 0 else (21, 1, 1, 1, 1, 1, 1, 1)):
            found[-1][row, length:] = 0
    return tuple(found)


def gradients_of(text, sizes, how, *, views=0, kept=1):
    """Of all parameters and of what the objective saw; how many tokens the tower was given, which cuts none itself."""
    made, seen = model(WHOLE, text, length=24).double(), []
    texts, g = captions(views), torch.Generator().manual_seed(1)
    images = tuple(torch.randint(0, 256, (8, 3, 16, 16), generator=g, dtype=torch.uint8) for _ in texts)
    lengths = made.caption_lengths(texts)
    made.text_tower.filled = True
    made.text_tower.tokens.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    objective = objectives.create("amclr", num_samples=8, omega=views) if views else objectives.create("clip")
    done = cached_backward(
        made, objective, Batch(torch.arange(8), images, texts), micro_batch_sizes=sizes, device=torch.device("cpu"),
        kept=kept, lengths=(lambda _: lengths) if how != "whole" else None, by_length=how == "by length",
    )  # fmt: skip
    found = {name: p.grad for name, p in made.named_parameters() if p.grad is not None}
    for name, leaf in done.leaves.items():
        found |= {f"leaf {name}": leaf.detach()} | ({} if leaf.grad is None else {f"gradient of {name}": leaf.grad})
    return found, seen


@pytest.mark.parametrize("text", [{}, WHOLE])
@pytest.mark.parametrize(
    ("how", "sizes", "columns"),
    [
        ("cut", (4, 4), [8, 24]),
        ("cut", (2, 2), [8, 8, 24, 16]),
        ("by length", (2, 2), [8, 8, 8, 24]),
        ("by length", (3, 3), [8, 8, 24]),
        ("by length", (8, 2), [8, 8, 8, 24]),
        ("by length", (2, 8), [24]),
    ],
)
def test_captions_are_cut_after_the_longest_of_their_micro_batch(text, how, sizes, columns):
    """The tower, which cuts by itself on a CPU, is kept from it; the gradient is that of whole captions."""
    plain, _ = gradients_of(text, (4, 4), "whole")
    found, seen = gradients_of(text, sizes, how)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-12)
    again = [] if text else columns[:-1]  # the last is kept; a frozen tower is not run again
    assert seen == columns + again


@pytest.mark.parametrize("kept", [0, 1, 4])
def test_a_sample_is_as_long_as_its_longest_view(kept):
    """Samples of like length are encoded together; averages of single samples stay with these."""
    plain, _ = gradients_of({}, (8, 8), "whole", views=1)
    found, seen = gradients_of({}, (2, 2), "by length", views=1, kept=kept)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-12)
    assert seen == [8, 8, 16, 24, 8, 8, 16, 24][: 8 - kept]


def of_ranks(stage: int, norm: str) -> tuple[list[list[torch.Tensor]], list[list[int]], bool]:
    """Weights and averages after three steps with whole captions and with cut ones; the tokens encoded at once."""
    weights, seen, by_length = [], [], False
    for trim in (False, True):
        torch.manual_seed(0)
        sections = Model(
            image=ImageTower(width=8, norm=norm), text=TextTower(width=16, layers=1, heads=2, dropout=0.0),
            embedding_width=8,
        )  # fmt: skip
        ones = (1.0, 1.0, 1.0)
        made = build_model(
            sections, vocab_size=30, pad_id=0, context_length=24, image_size=16, image_mean=ones, image_std=ones
        )
        settings = config(16, execution__zero_stage=stage, optimizer__name="sgd")
        prepare_towers(made, settings.execution)
        engine, _ = build_engine(settings, made, no_decay=made.no_weight_decay(), device=CPU, world_size=world_size())
        made.text_tower.filled = True  # cuts nothing by itself
        made.caption_lengths = lambda texts: (texts[0] != 0).sum(1)
        seen.append([])
        made.text_tower.tokens.register_forward_pre_hook(lambda _, inputs: seen[-1].append(inputs[0].shape[1]))
        objective = objectives.create("sogclr", num_samples=40)
        step = TrainStep(
            engine, objective, micro_batch_sizes=(2, 2), device=CPU, phases=Phases(CPU), kept=2, trim_texts=trim
        )
        by_length = step.by_length
        for n in range(3):
            g = torch.Generator().manual_seed(n * 10 + rank())
            images = torch.randint(0, 256, (8, 3, 16, 16), generator=g, dtype=torch.uint8)
            texts = torch.randint(1, 30, (8, 24), generator=g)
            texts[torch.arange(24) >= torch.tensor(LENGTHS)[:, None]] = 0
            step(Batch(torch.arange(8) + 16 * rank() + 4 * n, (images,), (texts,)), 0.01)
        weights.append([full_fp32(p) for p in made.parameters()] + [*objective.state_dict().values()])
        engine.destroy()
    return weights, seen, by_length


@pytest.mark.parametrize(("stage", "norm"), [(0, "group"), (3, "group"), (0, "batch")])
def test_ranks_train_alike_whatever_is_encoded_together(ranks, stage, norm):
    """BatchNorm's statistics are of those in a micro-batch, who then stay where they are."""
    for (whole, cut), (_, seen), by_length in ranks(2, of_ranks, stage, norm):
        assert len(cut) == len(whole)
        for found, plain in zip(cut, whole, strict=True):
            torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)
        assert by_length == (norm == "group")
        assert seen[:4] == ([8, 8, 8, 24] if by_length else [8, 8, 24, 16])


def test_captions_that_something_else_compares_stay_whole():
    made = model({}, {})
    texts = (torch.tensor([[1, 2, 0, 0, 0]]),)
    assert made.caption_lengths(texts).tolist() == [2]
    assert made.caption_lengths(()) is None
    made.tokens = ("text",)
    assert made.caption_lengths(texts) is None
    made.tokens = ()
    made.rest("text")
    assert made.caption_lengths(texts) is None
    execution = {"trim_texts": True, "compile": True}
    with pytest.raises(UserError, match=r"execution\.trim_texts: expected false beside execution\.compile"):
        build({"train": {"samples": 256}, "execution": execution})
