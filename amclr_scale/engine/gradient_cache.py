"""Train on a batch of any size with the activations of one micro-batch, exactly.

Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021, arXiv:2101.06983.

    1. encode the micro-batches without a graph; keep their outputs and the random state each began from
    2. the objective on all outputs together, as leaves; backward gives the gradient of every output: the cache
    3. encode each micro-batch again, with a graph, and push sum(output * its cached gradient) through the engine

The graphs of the last `kept` micro-batches are kept in step 1 and need no step 3: with n micro-batches the second
forward costs (n - kept) / n of the first. When all are kept this is ordinary training, by the same lines of code.

Everything the model returns is an output and is treated alike, whatever its name. Outputs that belong to no sample
(the learned scale and bias) come with every micro-batch, which each push 1/n of their gradient: DeepSpeed's stage 3
traces the order of parameters and is silently wrong where one is used in the last micro-batch only.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from amclr_scale.engine.random_state import RandomState
from amclr_scale.metrics.phases import Phases
from amclr_scale.types import Batch, Embeddings, Loss

Outputs = dict[str, Tensor | tuple[Tensor, ...]]
Encode = Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], Outputs]

SHARED = ("logit_scale", "logit_bias")  # outputs of the whole model rather than of one sample


@dataclass(frozen=True)
class CachedStep:
    """What one batch left behind: the objective's answer, and the leaves with their gradients."""

    loss: Loss
    leaves: Mapping[str, Tensor]


def split(batch: Batch, size: int) -> list[Batch]:
    """Cut a batch into micro-batches of `size` (the last may be smaller), still where the loader left them."""
    return [
        Batch(
            ids=batch.ids[start : start + size],
            images=tuple(view[start : start + size] for view in batch.images),
            texts=tuple(view[start : start + size] for view in batch.texts),
        )
        for start in range(0, len(batch), size)
    ]


def _flat(outputs: Outputs) -> dict[str, Tensor]:
    """`image_views: (a, b)` becomes `image_views.0: a, image_views.1: b`."""
    flat: dict[str, Tensor] = {}
    for name, value in outputs.items():
        if isinstance(value, tuple):
            flat.update({f"{name}.{i}": part for i, part in enumerate(value)})
        else:
            flat[name] = value
    return flat


def _embeddings(leaves: Mapping[str, Tensor], ids: Tensor, text_ids: Tensor | None) -> Embeddings:
    def views(name: str) -> tuple[Tensor, ...]:
        return tuple(leaf for key, leaf in leaves.items() if key.startswith(f"{name}."))

    plain = {name: leaf for name, leaf in leaves.items() if "." not in name}
    return Embeddings(**plain, image_views=views("image_views"), text_views=views("text_views"), ids=ids, text_ids=text_ids)


def cached_backward(
    encode: Encode,
    objective: Callable[[Embeddings], Loss],
    batch: Batch,
    *,
    micro_batch_size: int,
    device: torch.device,
    kept: int = 1,
    backward: Callable[[Tensor, bool], None] = lambda surrogate, last: surrogate.backward(),
    one_reduction: AbstractContextManager[None] | None = None,
    phases: Phases | None = None,
) -> CachedStep:
    """Leave in every parameter the gradient of `objective` over the whole batch.

    Args:
        encode: the engine: image views and token views of one micro-batch -> the model's outputs.
        objective: its backward may talk to other ranks.
        batch: this rank's samples, b of them, on the host or the device.
        micro_batch_size: samples encoded at once.
        device: where encoding happens; micro-batches move there one ahead of their use.
        kept: micro-batches whose graph stays alive between the passes, at least 0.
        backward: `backward(surrogate, last)`: the engine's, so that ZeRO sees each one.
        one_reduction: the engine's `coalesce_grad_reduction()`; gradients meet across ranks once, at its exit.
        phases: where seconds go.
    """
    phases = phases or Phases(device)
    micro_batches = split(batch, micro_batch_size)
    first_kept = max(0, len(micro_batches) - kept)
    states: list[RandomState] = []
    graphs: list[dict[str, Tensor]] = []

    def encoded(micro_batch: Batch) -> dict[str, Tensor]:
        images = tuple(view.to(device, non_blocking=True) for view in micro_batch.images)
        texts = tuple(view.to(device, non_blocking=True) for view in micro_batch.texts)
        return _flat(encode(images, texts))

    parts: list[dict[str, Tensor]] = []
    with phases("pass_1"):
        for index, micro_batch in enumerate(micro_batches):
            states.append(RandomState(device))
            if index < first_kept:
                with torch.no_grad():
                    parts.append(encoded(micro_batch))
            else:
                graphs.append(encoded(micro_batch))
                parts.append({name: output.detach() for name, output in graphs[-1].items()})

    with phases("objective"):
        leaves = {
            name: (parts[0][name].clone() if name in SHARED else torch.cat([part[name] for part in parts])).requires_grad_()
            for name in parts[0]
        }
        ids = batch.ids.to(device, non_blocking=True)
        text_ids = None if batch.text_ids is None else batch.text_ids.to(device, non_blocking=True)
        loss = objective(_embeddings(leaves, ids, text_ids))
        loss.value.backward()

    with phases("pass_2"), one_reduction or nullcontext():
        for index, micro_batch in enumerate(micro_batches):
            if index < first_kept:
                with states[index]:
                    outputs = encoded(micro_batch)
            else:
                outputs = graphs[index - first_kept]
                graphs[index - first_kept] = {}  # its graph is freed by its backward
            rows = slice(index * micro_batch_size, index * micro_batch_size + len(micro_batch))
            backward(_surrogate(outputs, leaves, rows, len(micro_batches)), index == len(micro_batches) - 1)
    return CachedStep(loss, leaves)


def _surrogate(outputs: dict[str, Tensor], leaves: Mapping[str, Tensor], rows: slice, num_micro_batches: int) -> Tensor:
    """A number whose gradient with respect to this micro-batch's outputs is their cached gradient."""
    terms: Sequence[Tensor] = [
        (output * (leaf.grad / num_micro_batches if name in SHARED else leaf.grad[rows])).sum()
        for name, output in outputs.items()
        if (leaf := leaves[name]).grad is not None
    ]
    return torch.stack(list(terms)).sum()
