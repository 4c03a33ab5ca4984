"""Train on a batch of any size with the activations of one micro-batch, exactly.

Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021, arXiv:2101.06983.

    1. encode the micro-batches without a graph; keep their outputs and the random state each began from
    2. the objective on all outputs together, as leaves; backward gives the gradient of every output: the cache
    3. encode each micro-batch again, with a graph, and push sum(output * its cached gradient) through the engine

The graphs of the last `kept` micro-batches are kept in step 1 and need no step 3: with n micro-batches the second
forward costs (n - kept) / n of the first. When all are kept this is ordinary training, by the same lines of code.

Everything the model returns is an output and is treated alike, whatever its name. Outputs that belong to no sample
(the learned scale and bias, what parts of the objective share) come with every micro-batch, which each push 1/n of
their gradient: DeepSpeed's stage 3 traces the order of parameters and is silently wrong where one is used in the last
micro-batch only.

A tower that is frozen as a whole is run in step 1 alone: what it gave is kept, (b, width), and step 3 begins there.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from amclr_scale.engine.micro_batches import MicroBatch, Views, on_device, split
from amclr_scale.engine.random_state import RandomState
from amclr_scale.metrics.phases import Phases
from amclr_scale.types import Batch, Embeddings, Loss, Outputs, flatten, frozen_side, is_shared, takes_gradient

Encode = Callable[[Views, Views], Outputs]


@dataclass(frozen=True)
class CachedStep:
    """What one batch left behind: the objective's answer, and the leaves with their gradients."""

    loss: Loss
    leaves: Mapping[str, Tensor]
    embeddings: Embeddings  # the same leaves, as the objective saw them


def cached_backward(
    encode: Encode,
    objective: Callable[[Embeddings], Loss],
    batch: Batch,
    *,
    micro_batch_sizes: tuple[int, int],
    device: torch.device,
    kept: int = 1,
    backward: Callable[[Tensor], None] = lambda surrogate: surrogate.backward(),
    one_reduction: AbstractContextManager[None] | None = None,
    again: Callable[[], AbstractContextManager[None]] = nullcontext,
    phases: Phases | None = None,
    lend: Callable[[], Mapping[str, Tensor]] | None = None,
    lend_first: bool = True,
    see: Callable[[Mapping[str, Tensor]], Any] = Embeddings.from_flat,
    lengths: Callable[[Views], Tensor | None] | None = None,
    by_length: bool = True,
) -> CachedStep:
    """Leave in every parameter the gradient of `objective` over the whole batch.

    Args:
        encode: the engine: image views and token views of one micro-batch -> the model's outputs. Where it gives
            `frozen_features` of a side, it takes them in step 3 instead of that side's views.
        objective: its backward may talk to other ranks.
        batch: this rank's samples, b of them, on the host or the device.
        micro_batch_sizes: images and texts encoded at once.
        device: where encoding happens; micro-batches move there one ahead of their use.
        kept: micro-batches whose graph stays alive between the passes, at least 0.
        backward: `backward(surrogate)`: the engine's, so that ZeRO sees each one.
        one_reduction: around all of them; gradients meet across ranks once, at its exit.
        again: entered around each second forward: what a forward leaves behind (BatchNorm's statistics) is left once.
        phases: where seconds go.
        lend: what else the objective sees, by flat name: features of a teacher, without gradient.
        lend_first: ask for it before step 1, while no graph is alive, or after it.
        lengths: token views -> (b,) after how many tokens a sample's captions may be cut, or None for not at all. A
            micro-batch is cut after its longest, to a multiple of 8.
        by_length: micro-batches then hold samples of like length, whatever their places in the batch. The objective
            sees the batch in its own order.
        see: makes what the objective is given of everything by flat name.
    """
    phases = phases or Phases(device)
    lent: Mapping[str, Tensor] = {}
    if lend and lend_first:
        with phases("teacher"):
            lent = lend()
    micro_batches, order = _micro_batches(batch, micro_batch_sizes, lengths, by_length)
    first_kept = max(0, len(micro_batches) - kept)
    states: list[RandomState] = []
    graphs: list[dict[str, Tensor]] = []
    again_from: list[MicroBatch] = []  # what step 3 encodes

    parts: dict[str, list[Tensor]] = {}
    with phases("pass_1"):
        for index, micro_batch in enumerate(on_device(micro_batches, device)):
            states.append(RandomState(device))
            with nullcontext() if index >= first_kept else torch.no_grad():
                outputs = flatten(encode(micro_batch.images, micro_batch.texts))
            frozen = {side: outputs.pop(name) for name in tuple(outputs) if (side := frozen_side(name))}
            if index >= first_kept:
                graphs.append(outputs)
            else:
                again_from.append(micro_batches[index].with_features(frozen))
            del frozen
            for name, output in outputs.items():
                if name not in parts or not is_shared(name):  # what is shared comes with every micro-batch
                    parts.setdefault(name, []).append(output.detach())

    if lend and not lend_first:
        with phases("teacher"):
            lent = lend()

    with phases("objective"):
        leaves = {name: found[0].clone() if is_shared(name) else torch.cat(found) for name, found in parts.items()}
        leaves = _ordered(leaves, order if order is None else order.argsort())
        for name, leaf in leaves.items():
            leaf.requires_grad_(leaf.is_floating_point() and takes_gradient(name))
        beside = {name: rows.to(device, non_blocking=True) for name, rows in batch.beside().items()}
        embeddings = see({**leaves, **lent, **beside})
        loss = objective(embeddings)
        loss.value.backward()
        gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        gradients = _ordered(gradients, order)

    def push(outputs: dict[str, Tensor], rows: slice) -> None:
        surrogate = _surrogate(outputs, gradients, rows, len(micro_batches))
        if surrogate is not None:
            backward(surrogate)

    with ExitStack() as reduction:
        reduction.enter_context(one_reduction or nullcontext())
        with phases("pass_2"):
            for index, micro_batch in enumerate(on_device(again_from, device)):
                with states[index], again():
                    outputs = flatten(encode(micro_batch.images, micro_batch.texts))
                push({name: x for name, x in outputs.items() if not frozen_side(name)}, micro_batch.rows)
            again_from.clear()
            for index in range(first_kept, len(micro_batches)):
                outputs, graphs[index - first_kept] = graphs[index - first_kept], {}  # its backward frees its graph
                push(outputs, micro_batches[index].rows)
        with phases("reduce"):
            reduction.close()
    return CachedStep(loss, leaves, embeddings)


def _surrogate(
    outputs: dict[str, Tensor], gradients: Mapping[str, Tensor], rows: slice, num_micro_batches: int
) -> Tensor | None:
    """A number whose gradient with respect to this micro-batch's outputs is their cached gradient.

    None where nothing that made them is trained.
    """
    terms = [
        (output * (gradient / num_micro_batches if is_shared(name) else gradient[rows])).sum()
        for name, output in outputs.items()
        if (gradient := gradients.get(name)) is not None and output.requires_grad
    ]
    return torch.stack(terms).sum() if terms else None


def _micro_batches(
    batch: Batch, sizes: tuple[int, int], lengths: Callable[[Views], Tensor | None] | None, by_length: bool
) -> tuple[list[MicroBatch], Tensor | None]:
    """Micro-batches, and the sample (b,) that is encoded at each place; None: the batch's own order."""
    found = lengths(batch.texts) if lengths and batch.texts else None
    if found is None:
        return split(batch, *sizes), None
    order = found.argsort(stable=True) if by_length and sizes[1] < len(batch) else None
    encoded = found if order is None else found[order]
    # To a multiple of 8: kernels like these, and there are fewer shapes.
    return [
        replace(one, columns=-(-int(encoded[one.rows].max()) // 8) * 8) for one in split(batch, *sizes, order)
    ], order


def _ordered(found: dict[str, Tensor], order: Tensor | None) -> dict[str, Tensor]:
    """The rows (b, ...) of all tensors that belong to samples, in an order (b,)."""
    if order is None:
        return found
    return {name: rows if is_shared(name) else rows[order.to(rows.device)] for name, rows in found.items()}
