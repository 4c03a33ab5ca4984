"""Encode a split's images, or any captions, on all ranks at once.

Every rank makes the same number of calls (ZeRO's stage 3 gathers parameters in each of them); a rank that has run out
encodes a blank item and drops it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from amclr_scale.data.reading import Tokens
from amclr_scale.evaluation.shares import largest_share, share
from amclr_scale.evaluation.splits import Split

Encode = Callable[..., dict[str, Any]]  # the engine's call: images=(...), texts=(...) -> the model's outputs


@torch.no_grad()
def encode_images(
    encode: Encode, split: Split, batch_size: int, outputs: Sequence[str] = ("image",), **options: Any
) -> tuple[Tensor, ...]:
    """Encode a rank's share of a split's images: (n_r, ...) of every output that is asked for."""
    batches = split.batches(batch_size)
    kept: list[list[Tensor]] = [[] for _ in outputs]
    for _ in range(-(-largest_share(split.num_samples) // batch_size)):
        batch = next(batches, None)
        encoded = encode(images=(split.reading.blank if batch is None else batch.images[0],), **options)
        for rows, name in zip(kept, outputs, strict=True):
            rows.append(encoded[name][: 0 if batch is None else len(batch)])
    return tuple(torch.cat(rows) for rows in kept)


@torch.no_grad()
def encode_texts(
    encode: Encode, tokenizer: Tokens, texts: Sequence[str], batch_size: int, outputs: Sequence[str] = ("text",),
    **options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Encode a rank's share of the texts: (m_r, ...) of every output that is asked for."""
    mine = share(len(texts))
    kept: list[list[Tensor]] = [[] for _ in outputs]
    for index in range(-(-largest_share(len(texts)) // batch_size)):
        start = mine.start + index * batch_size
        captions = list(texts[start : min(start + batch_size, mine.stop)])
        encoded = encode(texts=(tokenizer(captions or [""]),), **options)
        for rows, name in zip(kept, outputs, strict=True):
            rows.append(encoded[name][: len(captions)])
    return tuple(torch.cat(rows) for rows in kept)
