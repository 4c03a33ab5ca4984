"""What a tower needs for one micro-batch, from running it once on tensors that have a shape and no memory.

The tower is built without weights (accelerate's `init_empty_weights`), so that one of ten billion parameters is traced
on a laptop in seconds. Its forward and backward then run on tensors of the meta device under a `Tracker`, which gives
the sequence of allocations and releases, a micro-batch of m = 10,007 samples at a time: sizes that m divides grow with
the micro-batch, the others do not (m is prime, and no parameter has a multiple of m elements). So what is alive at each
moment is known for any micro-batch, and the peak is the largest of these affine functions, exact also where the moment
of the peak moves.

Autocast knows no meta device: for `amp_bf16` tensors without memory say that they are a CPU's (`kernels.py` does what
CUDA's autocast does otherwise).
"""

import copy
import gc
import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from amclr_scale import objectives
from amclr_scale.config import schema
from amclr_scale.config.objective_options import declared
from amclr_scale.data.beside.features import sides_of
from amclr_scale.data.beside.references import reference_widths
from amclr_scale.data.tokenizers import load_tokenizer
from amclr_scale.encoders.build import build_model
from amclr_scale.encoders.dual_encoder import DualEncoder
from amclr_scale.encoders.recomputation import Recomputation, set_recomputation
from amclr_scale.encoders.tokens import check_tokens, token_sides
from amclr_scale.engine.optimizers import freeze
from amclr_scale.memory.kernels import kernels_of
from amclr_scale.memory.timeline import Timeline
from amclr_scale.memory.tracker import Tracker
from amclr_scale.memory.zero3.coordinator import Visit
from amclr_scale.memory.zero3.hooks import Events, Visits
from amclr_scale.metrics.flops import flop_counter, frozen_operations
from amclr_scale.precision import DTYPES
from amclr_scale.types import FROZEN_FEATURES, flatten, is_shared

Modality = Literal["image", "text"]
Partitioned = Literal["no", "yes", "plain linear"]  # whether stage 3 cuts parameters, and which linear layers it leaves
MODALITIES: tuple[Modality, ...] = ("image", "text")
PRIMES = (10_007, 10_009, 10_037, 10_039)
CLIP = (49_408, 0, 49_407)  # entries, padding and end of data.tokenizer: clip, whose package takes a second to import


@dataclass(frozen=True)
class Tower:
    """A tower with its head, as a micro-batch goes through it.

    Attributes:
        with_graph: forward and backward.
        without_graph: the forward alone, as in the first pass of the gradient cache.
        again: forward and backward of its second pass: of a frozen tower, from its features on.
        flops: floating-point operations of one sample's forward, all of its views.
        frozen_flops: of these, what no backward follows.
        once_flops: of these, what the second pass does not repeat.
        outputs: bytes of what the model gives per sample, embeddings of all views and outputs of an objective's parts.
        features: bytes of what a frozen tower gave per sample, which wait for the second pass.
        shared: bytes of what such parts give once for all samples.
    """

    with_graph: Timeline
    without_graph: Timeline
    again: Timeline
    flops: float
    frozen_flops: float
    once_flops: float
    outputs: int
    features: int
    shared: int


def trace(config: schema.Config, modality: Modality, device: str = "cuda", *, partitioned: bool = False) -> Tower:
    """The tower of a configuration, with its recomputation and precision. Cached.

    Args:
        device: cpu or cuda; they differ in attention with dropout, which is fused on CUDA alone.
        partitioned: parameters are, as at ZeRO's stage 3 on several ranks.
    """
    recomputation = config.execution.recompute_image if modality == "image" else config.execution.recompute_text
    wrapped = config.deepspeed.get("zero_optimization", {}).get("memory_efficient_linear", True)
    cut: Partitioned = "no" if not partitioned else "yes" if wrapped else "plain linear"
    return _trace(_key(config), modality, recomputation, config.execution.precision, device, cut)


def skeleton(config: schema.Config) -> DualEncoder:
    """The model of a configuration on the meta device: shapes without memory. Cached."""
    return _skeleton(_key(config))


def parameter_sizes(config: schema.Config) -> tuple[int, ...]:
    """Elements of each parameter of the model, in its order. Cached."""
    return _parameter_sizes(_key(config))


def token_counts(config: schema.Config) -> dict[str, int]:
    """How many tokens there are that the objective reads, by the name of their kind: {"image_tokens": 50}."""
    sides = token_sides(declared(config.objective).inputs)
    if not sides:
        return {}
    place = skeleton(config).image_tokens
    counts = {"image": place.count if place else 0, "text": config.data.context_length}
    return {f"{side}_tokens": counts[side] for side in sides}


def input_sizes(config: schema.Config) -> dict[str, int]:
    """Sizes of what an objective reads that embeddings do not tell: R, n, and of layers F, by flat name."""
    found = reference_widths(config.data)[0] | token_counts(config)
    for side in MODALITIES if config.model.image.taps or config.model.text.taps else ():
        taps = skeleton(config).taps_of(side)
        found |= {f"{side}_layers.{number}": width for number, width in enumerate(taps.widths if taps else ())}
    return found


@lru_cache(maxsize=16)
def _parameter_sizes(key: str) -> tuple[int, ...]:
    return tuple(p.numel() for p in _skeleton(key).parameters())


def _key(config: schema.Config) -> str:
    """What the towers depend on; an objective's parts are traced with that tower whose outputs they read.

    Of the optimizer, the parts that it leaves frozen.
    """
    data = {"tokenizer", "context_length", "image_size", "image_views", "text_views", "image_negatives",
            "text_negatives"}  # fmt: skip
    factors = config.optimizer.lr_factors.model_dump()
    found = {
        "model": config.model.model_dump(mode="json"),
        "data": config.data.model_dump(include=data),
        "features": sides_of(config.data),
        "depths": config.optimizer.layer_decay < 1,
        "frozen": {part: 0.0 for part, factor in factors.items() if factor == 0},
        "tokens": token_sides(declared(config.objective).inputs),
    }
    return json.dumps(found | ({"objective": config.objective} if objectives.has_parts(config.objective) else {}))


@lru_cache(maxsize=16)
def _skeleton(key: str) -> DualEncoder:
    from accelerate import init_empty_weights

    recipe = json.loads(key)
    data = recipe["data"]
    vocab_size, pad_id, end_id = _vocabulary(data["tokenizer"], data["context_length"])
    with init_empty_weights(include_buffers=False):
        model = build_model(
            schema.Model(**recipe["model"]), vocab_size=vocab_size, pad_id=pad_id, end_id=end_id,
            context_length=data["context_length"], image_size=data["image_size"],
            image_mean=(0.0, 0.0, 0.0), image_std=(1.0, 1.0, 1.0), weights=False, with_depths=recipe["depths"],
        )  # fmt: skip
    for side in recipe["features"]:
        model.rest(side)
    model.further_views = {"image": data["image_views"], "text": data["text_views"]}
    model.tokens = tuple(recipe["tokens"])
    check_tokens(model.tokens, model.image_tokens)
    if "objective" in recipe:
        with torch.device("meta"):
            model.take_parts(objectives.parts_of(recipe["objective"], recipe["model"]["embedding_width"]))
    freeze(model.named_parameters(), schema.Optimizer(lr_factors=recipe["frozen"]), model.learning_rate_factors())
    return model.train().to("meta")


def _vocabulary(spec: str, length: int) -> tuple[int, int, int]:
    """Size, padding and end of a tokenizer's vocabulary."""
    if spec == "clip":
        return CLIP
    tokenizer = load_tokenizer(spec, length)
    return tokenizer.vocab_size, tokenizer.pad_id, tokenizer.end_id


@lru_cache(maxsize=64)
def _trace(
    key: str, modality: Modality, recomputation: Recomputation, precision: str, device: str, partitioned: Partitioned
) -> Tower:
    wanted = key, modality, recomputation, precision, device, partitioned
    if precision != "amp_bf16":
        try:
            return _traced(*wanted, nullcontext())
        except (RuntimeError, NotImplementedError):  # the tower asks for numbers, unless it sees that there are none
            pass
    return _traced(*wanted, FakeTensorMode(allow_non_fake_inputs=True))


def _traced(
    key: str, modality: Modality, recomputation: Recomputation, precision: str, device: str, partitioned: Partitioned,
    mode: AbstractContextManager[Any],
) -> Tower:  # fmt: skip
    """Run the tower under a mode: none, or fake tensors, which give the same in twice the time."""
    recipe = json.loads(key)
    data, rests = recipe["data"], modality in recipe["features"]
    model = copy.deepcopy(_skeleton(key)).to(DTYPES[precision])  # on the meta device a copy costs nothing
    model.computes_in = precision
    setattr(model.text_tower, "filled", True)  # noqa: B010  captions are as long as they may be
    place = "cpu" if precision == "amp_bf16" else "meta"
    if not rests:
        set_recomputation(getattr(model, f"{modality}_tower"), recomputation)
    m = next(p for p in PRIMES if all(numel % p for numel in (x.numel() for x in model.parameters())))
    views = 1 + data[f"{modality}_views"] + data[f"{modality}_negatives"]
    with _uncollected(), mode, kernels_of(device):
        if isinstance(mode, FakeTensorMode):
            model._apply(cache(partial(torch.empty_like, device=place)))  # type: ignore[no-untyped-call]
        if rests:
            row = m, model.widths[modality]
            inputs = [torch.empty(row, dtype=DTYPES[precision], device=place) for _ in range(views)]
        elif modality == "image":
            side = data["image_size"]
            inputs = [torch.empty(m, 3, side, side, dtype=torch.uint8, device=place) for _ in range(views)]
        else:
            length = data["context_length"]
            inputs = [torch.empty(m, length, dtype=torch.int64, device=place) for _ in range(views)]
        plain = partitioned == "plain linear"
        visits = None if partitioned == "no" else Visits(model, linear_saves_weight=not plain)
        while True:
            counter = flop_counter()
            with frozen_operations(model, modality, counter) as of_frozen:
                without_graph = _record(model, modality, inputs, visits, counter=counter)
            if visits is None or not visits.learned():
                break
        with_graph = again = _record(model, modality, inputs, visits)
        features = with_graph.features
        if features is not None:
            rows = [torch.empty(m, *features[1:], dtype=with_graph.features_in, device=place) for _ in range(views)]
            again = _record(model, modality, rows, visits)
        if visits is not None:
            visits.close()
    per_sample = sum(size for name, size in with_graph.outputs.items() if not is_shared(name)) // m
    shared = sum(size for name, size in with_graph.outputs.items() if name.startswith("shared."))
    whole = _timeline(with_graph, m)
    return Tower(
        whole, _timeline(without_graph, m), whole if features is None else _timeline(again, m),
        counter.get_total_flops() / m, of_frozen.no_backward / m, of_frozen.once / m, per_sample,
        0 if features is None else views * math.prod(features[1:]) * with_graph.features_in.itemsize, shared,
    )  # fmt: skip


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's collector: what waits for it would be alive for longer in one trace than in another."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@dataclass(frozen=True)
class _Recording:
    events: Events
    gradients: dict[int, int]  # the storages in which parameters' gradients ended, and the event at which each came
    forward_end: int
    outputs: dict[str, int]  # bytes by flat name
    visits: tuple[Visit, ...] = ()
    features: tuple[int, ...] | None = None  # (rows, width), or (rows, 1 + n, width), of a frozen tower's
    features_in: torch.dtype = torch.float32


def _encode(model: DualEncoder, modality: Modality, inputs: list[Tensor]) -> dict[str, Any]:
    outputs: dict[str, Any] = model(tuple(inputs), ()) if modality == "image" else model((), tuple(inputs))
    return outputs


def _record(
    model: DualEncoder, modality: Modality, inputs: list[Tensor], visits: Visits | None,
    *, counter: FlopCounterMode | None = None,
) -> _Recording:  # fmt: skip
    """Run a forward and, unless operations are counted, a backward."""
    events: Events = []
    tracker = Tracker(inputs[0].device.type, on_change=lambda size, storage: events.append((size, storage)))
    tracker.add([*model.parameters(), *model.buffers(), *inputs], "before")
    events.clear()
    came, gradients, forward_end = dict[int, int](), dict[int, int](), 0
    sizes = dict[str, int]()
    waits = dict[str, Any]()
    parameters = list(model.parameters())
    hooks = [
        p.register_hook(lambda _, number=n: came.update({number: len(events)}))
        for n, p in enumerate(parameters)
        if p.requires_grad
    ]
    forward: Callable[[], AbstractContextManager[Any]] = nullcontext if visits is None else visits.forward
    with nullcontext() if visits is None else visits.listen(events):
        if counter is not None:
            with torch.no_grad(), counter, tracker, forward():
                outputs = _encode(model, modality, inputs)
            forward_end = len(events)
        else:
            with tracker:
                with forward():
                    outputs = _encode(model, modality, inputs)
                forward_end = len(events)
                flat = flatten(outputs)
                del outputs
                frozen = flat.pop(f"{FROZEN_FEATURES}.{modality}", None)
                if frozen is not None:
                    waits = {"features": tuple(frozen.shape), "features_in": frozen.dtype}
                del frozen
                rows = [x for name, x in flat.items() if x.requires_grad and name not in ("logit_scale", "logit_bias")]
                terms = [(x * torch.empty_like(x)).sum() for x in rows]
                if terms:  # frozen otherwise
                    torch.stack(terms).sum().backward()
                sizes = {name: x.nbytes for name, x in flat.items()}
                del flat, rows, terms
            gradients = {
                p.grad.untyped_storage()._cdata: came[n] for n, p in enumerate(parameters) if p.grad is not None
            }
        recorded = list(events)
    for hook in hooks:
        hook.remove()
    for parameter in parameters:
        parameter.grad = None
    if visits is None:
        return _Recording(recorded, gradients, forward_end, sizes, **waits)
    kept, seen, numbering = visits.take(recorded)
    gradients = {storage: numbering[at] for storage, at in gradients.items()}
    return _Recording(kept, gradients, numbering[forward_end], sizes, seen, **waits)


def _timeline(recording: _Recording, m: int) -> Timeline:
    sizes = torch.tensor([0, *(size for size, _ in recording.events)], dtype=torch.int64)
    per_sample, grows = sizes // m, sizes % m == 0
    born, arriving, added = (torch.zeros_like(sizes) for _ in range(3))
    last = {s: at for at, (size, s) in enumerate(recording.events, 1) if size > 0 and s in recording.gradients}
    for storage, at in sorted(last.items(), key=lambda pair: pair[1]):
        born[at] = sizes[at]
        arriving[at:] = sizes[at]
        added[at:] = sizes[at] if at <= recording.gradients[storage] else 0
    return Timeline(
        slope=torch.where(grows, per_sample, 0).cumsum(0),
        constant=(torch.where(grows, 0, sizes) - born).cumsum(0),
        gradients=born.cumsum(0),
        arriving=arriving,
        added=added,
        forward_end=recording.forward_end,
        visits=recording.visits,
    )
