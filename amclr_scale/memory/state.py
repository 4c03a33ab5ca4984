"""Parameters, gradients and optimizer states of one rank, as DeepSpeed's stages and the optimizers allocate them.

P  elements of trained parameters    W  ranks    K  elements of DeepSpeed's reduction bucket    e  bytes of an element

Between steps, beside e P of parameters (stage 3: e P / W, and the small ones whole):

    stage 0       moments 4 P each; weights are their own masters (fp32 only)
    stages 1, 2   fp32 masters 4 P / W, moments 4 P / W each; each group of parameters is padded to 2 W elements
    stage 3       the same, each parameter padded to W elements; and for ever: a bucket e K, gradient shares e P / W

Gradients are whole on every rank during the second pass at EVERY stage: the gradient cache needs one reduction per step
(`coalesce_grad_reduction`), so each backward leaves its gradients with the parameters, or, in half precision with more
than one micro-batch, in fp32 sums, 4 P. What a stage saves of them, it saves after the reduction. How the reduction and
the step then allocate is followed below bucket by bucket and group by group, in DeepSpeed's order.
"""

import itertools
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch

from amclr_scale.config.schema import Config, Optimizer
from amclr_scale.engine.optimizers import build_optimizer
from amclr_scale.engine.zero.gradient_sums import AT_ONCE
from amclr_scale.memory.components import Component, Place, always
from amclr_scale.memory.tracker import Tracker
from amclr_scale.precision import DTYPES

BUCKET = 500_000_000  # DeepSpeed's default, in elements

Groups = tuple[tuple[int, ...], ...]  # elements of each parameter, by optimizer group


@dataclass(frozen=True)
class Sizes:
    """What the formulas need."""

    groups: Groups
    world_size: int
    stage: int
    item: int  # bytes of a parameter's element
    bucket: int  # K
    gloo: bool  # collectives on a CPU make copies of their own
    parts: tuple[int, ...]  # elements of each group that this rank steps
    temporaries: int  # bytes per element while the optimizer steps
    together: bool  # it steps all parameters at once

    @cached_property
    def numels(self) -> list[int]:
        return list(itertools.chain.from_iterable(self.groups))

    @cached_property
    def total(self) -> int:
        return sum(self.numels)


def stepped(config: Config, groups: Groups, world_size: int, device: str, buffers: int) -> tuple[int, int, Place]:
    """What a moving average copies: elements with padding (stage 3: this rank's), bytes of buffers; and its place."""
    stage = config.execution.zero_stage
    part = sum(_part(group, world_size, stage) for group in groups)
    numel = part if stage == 3 else part * world_size if stage else sum(map(sum, groups))
    return numel, buffers, "host" if device == "cuda" and config.execution.offload != "none" else "device"


def state_components(
    config: Config, groups: Groups, frozen: tuple[int, ...], buffers: int, world_size: int, device: str, *,
    gradients_in_pass_2: int, widening: int,
) -> list[Component]:  # fmt: skip
    """Parameters, what the optimizer keeps, and gradients.

    Args:
        groups: elements of each trained parameter, in the optimizer's groups.
        frozen: elements of each parameter that is not trained.
        buffers: bytes of the model's buffers.
        gradients_in_pass_2: bytes of gradients at the worst moment of that phase.
        widening: bytes of a summed gradient's element over those of a parameter's.
        device: cpu or cuda.
    """
    zero = config.deepspeed.get("zero_optimization", {})
    execution, cuda = config.execution, device == "cuda"
    step = _step_costs(config.optimizer.model_dump_json(), cuda)
    item, stage = DTYPES[execution.precision].itemsize, execution.zero_stage
    total = sum(map(sum, groups))
    parts = tuple(_part(group, world_size, stage) for group in groups)
    sizes = Sizes(
        groups, world_size, stage, item, int(zero.get("reduce_bucket_size", min(BUCKET, total))), not cuda, parts,
        step.temporaries, step.together,
    )  # fmt: skip
    aside: Place = "host" if cuda and execution.offload != "none" else "device"  # where the optimizer works
    part = sum(parts)
    padded = part * world_size if stage in (1, 2) else sizes.total
    kept = sum(-(-numel // world_size) if stage == 3 else numel for numel in frozen)
    more = "execution.zero_stage: a higher one divides it by the ranks" if world_size > 1 else "a smaller model"
    parameters_at: Place = "host" if cuda and execution.offload == "parameters" else "device"

    found = [
        Component(
            "parameters", always(item * ((part if stage == 3 else padded) + kept)),
            "execution.zero_stage: 3, or execution.precision: bf16", "state", parameters_at,
        ),
        Component("buffers of the model", always(buffers), "a smaller model", "state"),
        Component(
            "fp32 masters", always(4 * part if stage else 0), f"execution.offload: optimizer, or {more}", "state", aside
        ),
        Component(
            "optimizer states", always(step.states * (part if stage else sizes.total)),
            f"{more}, or execution.offload: optimizer", "state", aside,
        ),
    ]  # fmt: skip
    if stage == 3:
        found += [
            Component(
                "reduction bucket", always(4 * sizes.bucket),  # in the type that is sent: fp32
                "deepspeed.zero_optimization.reduce_bucket_size: a smaller one, in elements", "gradients",
            ),
            Component("gradient shares", always(item * part), "execution.offload: optimizer", "gradients", aside),
        ]  # fmt: skip
    knob = (
        "execution.precision: bf16 halves them where one micro-batch holds all; execution.zero_stage does not, before "
        "they are reduced"
    )
    # Stage 0 exchanges gradients as one flat copy, where there is anybody to exchange them with.
    reduction = _reduce_peak(sizes) if stage else (2 if world_size > 1 else 1) * item * sizes.total
    if widening > 1:
        reduction = max(reduction, item * _rounding_peak(sizes, widening))
    found.append(Component("gradients", {"pass_2": gradients_in_pass_2, "reduce": reduction}, knob, "gradients"))
    if cuda and widening > 1:
        waiting = min(AT_ONCE + AT_ONCE // 8, sum(n for n in sizes.numels if n <= AT_ONCE // 8))
        found.append(
            Component(
                "gradients on their way into sums", {"pass_2": (item + 4) * waiting}, "a smaller model", "gradients"
            )
        )
    found.append(
        Component(
            "optimizer step", {"optimizer": _step_peak(sizes)},
            "execution.zero_stage: 1 or more steps a rank's part alone" if stage == 0 else more, "gradients", aside,
        )
    )  # fmt: skip
    return found


@lru_cache(maxsize=256)
def _rounding_peak(s: Sizes, widening: int) -> int:
    """Most elements while sums are rounded one after another, and freed; those of a sum count `widening` times."""
    done = itertools.accumulate(s.numels, initial=0)
    return max(widening * (s.total - d) + d + n for d, n in zip(done, s.numels, strict=False))


def _part(group: tuple[int, ...], world_size: int, stage: int) -> int:
    """Elements of a group that one rank steps, with padding."""
    if stage == 3:
        return sum(-(-numel // world_size) for numel in group)
    unit = 2 * world_size
    return -(-sum(group) // unit) * unit // (world_size if stage else 1)


@lru_cache(maxsize=256)
def _reduce_peak(s: Sizes) -> int:
    """Most bytes while gradients are reduced: those still with the parameters, the bucket, its copies, the result.

    The bucket of stage 3 is not counted: it is always there.
    """
    bucket = 0 if s.stage == 3 else s.item * s.bucket
    waiting, inside, result, peak = s.item * s.total, 0, 0, 0
    owned = _owned(s)

    def flush() -> int:
        """Bytes of the copies that a reduction of `inside` elements makes."""
        if s.stage == 3:  # whose bucket is fp32 already
            return 4 * inside * (2 if s.gloo else 1)
        wide = 4 * inside if s.item != 4 else 0  # fp32 is sent
        return (s.item * inside if s.world_size > 1 else 0) + wide

    for numel in s.numels:
        if inside + numel > s.bucket and inside:
            peak = max(peak, waiting + bucket + result + flush())
            result, inside = owned, 0
        peak = max(peak, waiting + bucket + result)
        if numel <= s.bucket:
            waiting -= s.item * numel
        inside += numel
    return max(peak, waiting + bucket + result + flush(), bucket + owned)


@lru_cache(maxsize=256)
def _owned(s: Sizes) -> int:
    """Bytes of the whole gradients of which a part is this rank's (stages 1 and 2): of the rank that has most."""
    if s.stage == 3:
        return 0
    most = 0
    for rank in range(s.world_size):
        held = 0
        for group, part in zip(s.groups, s.parts, strict=True):
            begin, end, at = rank * part, (rank + 1) * part, 0
            for numel in group:
                if at < end and at + numel > begin:
                    held += numel
                at += numel
        most = max(most, held)
    return s.item * most


@lru_cache(maxsize=256)
def _step_peak(s: Sizes) -> int:
    """Most bytes while the optimizer steps, with what is left of the gradients."""
    largest = max(s.numels)
    if s.stage == 0:
        at_once = s.total if s.together else largest
        return s.item * s.total + s.temporaries * at_once
    owned, peak = _owned(s), 0
    norm = 8 * (largest if s.world_size == 1 else min(largest, max(s.parts)))  # taken in float64, one by one
    peak = owned + norm
    last = len(s.parts) - 1
    for index, part in enumerate(s.parts):
        flat = 4 * part + (s.item * part if s.item != 4 else 0)
        peak = max(peak, owned + flat)
        left = owned if index < last else 0
        peak = max(peak, left + (4 + s.temporaries) * part)
    return peak


@dataclass(frozen=True)
class StepCosts:
    """Of an update rule, in bytes per element."""

    states: int
    temporaries: int
    together: bool  # temporaries of all parameters at once, rather than of one after another


@lru_cache(maxsize=32)
def _step_costs(optimizer: str, cuda: bool) -> StepCosts:
    """States as the rule says; temporaries are found by stepping a small parameter twice."""
    options = Optimizer.model_validate_json(optimizer)
    rule, size = options.rule, 4 * options.rule.moments(options)
    if cuda and rule.on_cuda == "fused":
        return StepCosts(size, 0, together=False)
    together = cuda and rule.on_cuda == "together"
    weight = torch.nn.Parameter(torch.ones(128, 128))
    group: dict[str, Any] = {"params": [weight], "lr_factor": 1.0, "weight_decay": options.weight_decay}
    made, _ = build_optimizer(options, [group], torch.device("cpu"))
    if together:
        made.param_groups[0]["foreach"] = True
    weight.grad = torch.ones_like(weight)
    made.step()
    states = [v for state in made.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    tracker = Tracker("cpu")
    tracker.add([weight, weight.grad, *states], "before")
    before = tracker.total
    with tracker:
        made.step()
    return StepCosts(size, (tracker.peak - before) // weight.numel(), together)
