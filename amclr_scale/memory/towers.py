"""What a tower needs for one micro-batch, from running it once on tensors that have a shape and no memory.

The tower is built without weights (accelerate's `init_empty_weights`), so that one of ten billion parameters is traced
on a laptop in seconds. Its forward and backward then run on fake tensors of the meta device under a `Tracker`, which
gives the sequence of allocations and releases, a micro-batch of m = 10,007 samples at a time: sizes that m divides grow
with the micro-batch, the others do not (m is prime, and no parameter has a multiple of m elements). So what is alive at
each moment is known for any micro-batch, and the peak is the largest of these affine functions, exact also where the
moment of the peak moves.
"""

import copy
import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from amclr_scale.config import schema
from amclr_scale.data.tokenizers import load_tokenizer
from amclr_scale.encoders.build import build_model
from amclr_scale.encoders.dual_encoder import DualEncoder
from amclr_scale.encoders.recomputation import Recomputation, set_recomputation
from amclr_scale.memory.tracker import Tracker

Modality = Literal["image", "text"]
MODALITIES: tuple[Modality, ...] = ("image", "text")
PRIMES = (10_007, 10_009, 10_037, 10_039)
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, eq=False)
class Timeline:
    """What is alive after each allocation or release of a forward and its backward, for a micro-batch of m samples.

    Attributes:
        slope, constant: (events,) bytes alive: slope m + constant, without gradients of parameters.
        gradients: (events,) bytes of parameters' gradients, where they are made now and stay (first micro-batch).
        arriving: (events,) those that were just made, where they are added to earlier ones (later micro-batches).
        forward_end: events of the forward; what is alive after them is kept for the backward.
    """

    slope: Tensor
    constant: Tensor
    gradients: Tensor
    arriving: Tensor
    forward_end: int

    @lru_cache(maxsize=4096)  # noqa: B019  traces are few and stay
    def kept(self, m: int) -> int:
        """Bytes alive between forward and backward: the graph and the outputs."""
        return int(self._alive(m)[self.forward_end - 1])

    @lru_cache(maxsize=4096)  # noqa: B019
    def forward_peak(self, m: int) -> int:
        """Most bytes during the forward."""
        return int(self._alive(m)[: self.forward_end].max())

    @lru_cache(maxsize=4096)  # noqa: B019
    def backward_peak(self, m: int, *, first: bool, releases: bool = False, widening: int = 1) -> tuple[int, int, int]:
        """The worst moment of the backward: activations, with gradients on their way; those in place by then, where
        they begin to exist now; and bytes of parameters that are no longer needed.

        Args:
            first: gradients of parameters begin to exist now; otherwise they are there already and not counted.
            releases: parameters are given up once their gradient is made, as at ZeRO's stage 3.
            widening: more than 1: gradients move into sums of so many times their size, as soon as they are there.
        """
        begin = self.forward_end - 1
        arriving, done = self.arriving[begin:], (self.gradients - self.arriving)[begin:]
        moving = self._alive(m)[begin:] + arriving
        none = torch.zeros_like(done)
        settled, released = widening * done if first else none, done if releases else none
        if widening > 1 and first:
            just_made = self.gradients[begin:].diff(prepend=none[:1]) > 0
            moving += arriving * torch.where(just_made, widening, widening - 1)
        moment = int((moving + settled - released).argmax())
        return int(moving[moment]), int(settled[moment]), int(released[moment])

    def _alive(self, m: int) -> Tensor:
        return self.slope * m + self.constant


@dataclass(frozen=True)
class Tower:
    """A tower with its head, as a micro-batch goes through it.

    Attributes:
        with_graph: forward and backward.
        without_graph: the forward alone, as in the first pass of the gradient cache.
        flops: floating-point operations of one sample's forward, all of its views.
    """

    with_graph: Timeline
    without_graph: Timeline
    flops: float


def trace(config: schema.Config, modality: Modality, device: str = "cuda") -> Tower:
    """The tower of a configuration, with its recomputation and precision. Cached.

    Args:
        device: cpu or cuda; they differ in attention with dropout, which is fused on CUDA alone.
    """
    recomputation = config.execution.recompute_image if modality == "image" else config.execution.recompute_text
    return _trace(_key(config), modality, recomputation, config.execution.precision, device)


def skeleton(config: schema.Config) -> DualEncoder:
    """The model of a configuration on the meta device: shapes without memory. Cached."""
    return _skeleton(_key(config))


def _key(config: schema.Config) -> str:
    """What the towers depend on."""
    data = {"tokenizer", "context_length", "image_size", "image_views", "text_views"}
    return json.dumps({"model": config.model.model_dump(mode="json"), "data": config.data.model_dump(include=data)})


@lru_cache(maxsize=16)
def _skeleton(key: str) -> DualEncoder:
    from accelerate import init_empty_weights

    recipe = json.loads(key)
    data, tokenizer = recipe["data"], load_tokenizer(recipe["data"]["tokenizer"], recipe["data"]["context_length"])
    with init_empty_weights(include_buffers=False):
        model = build_model(
            schema.Model(**recipe["model"]), vocab_size=tokenizer.vocab_size, pad_id=tokenizer.pad_id,
            end_id=tokenizer.end_id, context_length=data["context_length"], image_size=data["image_size"],
            image_mean=(0.0, 0.0, 0.0), image_std=(1.0, 1.0, 1.0), weights=False,
        )  # fmt: skip
    return model.to("meta")


@lru_cache(maxsize=64)
def _trace(key: str, modality: Modality, recomputation: Recomputation, precision: str, device: str) -> Tower:
    model, data = _skeleton(key), json.loads(key)["data"]
    model = _copy_of(model).to(PRECISIONS[precision])
    set_recomputation(getattr(model, f"{modality}_tower"), recomputation)
    m = next(p for p in PRIMES if all(numel % p for numel in (x.numel() for x in model.parameters())))
    views = 1 + data[f"{modality}_views"]
    with _fake(model), _fused_attention(device):
        if modality == "image":
            side = data["image_size"]
            inputs = [torch.empty(m, 3, side, side, dtype=torch.uint8, device="meta") for _ in range(views)]
        else:
            length = data["context_length"]
            inputs = [torch.empty(m, length, dtype=torch.int64, device="meta") for _ in range(views)]
        counter = FlopCounterMode(display=False)
        with_graph = _record(model, modality, inputs)
        without_graph = _record(model, modality, inputs, counter=counter)
    return Tower(_timeline(with_graph, m), _timeline(without_graph, m), counter.get_total_flops() / m)


def _copy_of(model: DualEncoder) -> DualEncoder:
    """Another one that may be changed: on the meta device a copy costs nothing."""
    return copy.deepcopy(model)


@contextmanager
def _fused_attention(device: str) -> Iterator[None]:
    """Attention by one kernel, as both devices have it; left to itself, the meta device takes it apart.

    The kernel of a CPU stands for all: each keeps its output and one number per row for the backward. It is put in the
    function's place, rather than by a mode, because recomputation inside a backward runs outside of such modes.
    """
    plain = F.scaled_dot_product_attention

    def fused(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        if enable_gqa or (dropout_p > 0 and device == "cpu"):
            return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        mask = attn_mask
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), -torch.inf)
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out: Tensor = kernel(query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale)[0]
        return out

    with mock.patch.object(F, "scaled_dot_product_attention", fused):
        yield


@contextmanager
def _fake(model: DualEncoder) -> Iterator[None]:
    """Inside it, operations compute shapes only; the model's tensors become fake ones."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # what waits for a collection would be alive for longer in one trace than in another
    try:
        with mode:
            model._apply(mode.from_tensor)  # type: ignore[no-untyped-call]
            yield
    finally:
        if collecting:
            gc.enable()


@dataclass(frozen=True)
class _Recording:
    events: list[tuple[int, int]]  # signed bytes, storage
    gradients: set[int]  # the storages in which parameters' gradients ended
    forward_end: int


def _record(
    model: DualEncoder, modality: Modality, inputs: list[Tensor], *, counter: FlopCounterMode | None = None
) -> _Recording:
    """Run a forward and, unless operations are counted, a backward."""
    events = list[tuple[int, int]]()
    tracker = Tracker("meta", on_change=lambda size, storage: events.append((size, storage)))
    tracker.add([*model.parameters(), *model.buffers(), *inputs], "before")
    events.clear()
    views, none = tuple(inputs), tuple[Tensor, ...]()
    arguments = (views, none) if modality == "image" else (none, views)
    if counter is not None:
        with torch.no_grad(), counter, tracker:
            outputs = model(*arguments)
        return _Recording(list(events), set(), len(events))
    with tracker:
        outputs = model(*arguments)
        forward_end = len(events)
        rows = [outputs[modality], *outputs[f"{modality}_views"]]
        terms = [(x * torch.empty_like(x)).sum() for x in rows]
        torch.stack(terms).sum().backward()
        del outputs, rows, terms
    gradients = {p.grad.untyped_storage()._cdata for p in model.parameters() if p.grad is not None}
    recording = _Recording(list(events), gradients, forward_end)
    for parameter in model.parameters():
        parameter.grad = None
    return recording


def _timeline(recording: _Recording, m: int) -> Timeline:
    sizes = torch.tensor([size for size, _ in recording.events], dtype=torch.int64)
    per_sample, grows = sizes // m, sizes % m == 0
    born, arriving = torch.zeros_like(sizes), torch.zeros_like(sizes)
    last = {s: index for index, (size, s) in enumerate(recording.events) if size > 0 and s in recording.gradients}
    for index in sorted(last.values()):
        born[index] = sizes[index]
        arriving[index:] = sizes[index]
    return Timeline(
        slope=torch.where(grows, per_sample, 0).cumsum(0),
        constant=(torch.where(grows, 0, sizes) - born).cumsum(0),
        gradients=born.cumsum(0),
        arriving=arriving,
        forward_end=recording.forward_end,
    )
