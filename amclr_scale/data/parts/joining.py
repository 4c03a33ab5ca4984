"""Parts become a batch, in pinned memory where there is a GPU."""

import torch
from torch import Tensor

from amclr_scale.data.parts.part import Part
from amclr_scale.types import Batch


def batch_of(parts: list[Part], images: tuple[Tensor, ...]) -> Batch:
    text_ids = [part.text_ids for part in parts if part.text_ids is not None]
    return Batch(
        ids=join([part.ids for part in parts]),
        text_ids=join(text_ids) if text_ids else None,
        given={name: join([part.given[name] for part in parts]) for name in parts[0].given},
        images=images,
        texts=tuple(join(list(view)) for view in zip(*(part.texts for part in parts), strict=True)),
    )


def join(parts: list[Tensor]) -> Tensor:
    """One tensor, in pinned memory where this process has a GPU to copy it to.

    Asked of the process, not of the machine: pinning before it has chosen a GPU would open a context on the first one.
    """
    pinned = torch.cuda.is_initialized()
    if len(parts) == 1 and not pinned:
        return parts[0]
    shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
    return torch.cat(parts, out=torch.empty(shape, dtype=parts[0].dtype, pin_memory=pinned))
