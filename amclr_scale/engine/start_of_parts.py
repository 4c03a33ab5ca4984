"""Parts of an objective that begin with data, such as prototypes that are embeddings of the first samples.

Rank 0 encodes the samples before the engine is built: on the host, in float32, without dropout. DeepSpeed gives
everybody rank 0's weights, so the parts begin with the same numbers on any number of ranks and at every stage.
"""

from typing import Any

import torch
from torch import Tensor

from amclr_scale.data.loader import TrainLoader
from amclr_scale.distributed.collectives import all_gather, rank
from amclr_scale.encoders.dual_encoder import DualEncoder
from amclr_scale.engine.random_state import RandomState
from amclr_scale.errors import UserError

_AT_ONCE = 32  # samples encoded at once


def start_parts(model: DualEncoder, loader: TrainLoader, device: torch.device) -> None:
    """Let parts that ask for it begin with the first samples of training. All ranks call it, before a run's first step.

    Args:
        model: whole on rank 0's host.
        loader: has given no batch yet; it is left as it was.
        device: over which ranks exchange tensors.

    Raises:
        UserError: there are fewer samples than a part asks for.
    """
    parts: Any = model.parts
    wanted = getattr(parts, "start_samples", 0)
    if parts is None or not wanted:
        return
    if loader.num_samples < wanted:
        raise UserError(
            f"objective: expected at least {wanted} samples in data.train, which its parts begin with "
            f"(num_prototypes), got {loader.num_samples}; ask for fewer prototypes"
        )
    batches = [(_of_all(batch.images[0], device), _of_all(batch.texts[0], device)) for batch in loader.peek(wanted)]
    if rank() != 0:
        return
    images, texts = (torch.cat(views)[:wanted] for views in zip(*batches, strict=True))
    training = model.training
    model.eval()
    with RandomState(torch.device("cpu")), torch.no_grad():
        rows = [
            model.raw_embeddings(images[start : start + _AT_ONCE], texts[start : start + _AT_ONCE])
            for start in range(0, wanted, _AT_ONCE)
        ]
        parts.start_from(*(torch.cat(side) for side in zip(*rows, strict=True)))
    model.train(training)


def _of_all(rows: Tensor, device: torch.device) -> Tensor:
    """A batch's rows of all ranks, on the host."""
    return all_gather(rows.to(device)).cpu()
