"""Similarities in excess of a frozen reference model's: DRRho-CLIP, and the option `reference`.

Wei et al., "Model Steering: Learning with a Reference Model Improves Generalization Bounds and Scaling Laws", ICML
2025, arXiv:2505.06699. With r_i and o_i the unit features that a frozen model gives image i and text i,

    s_ij becomes s_ij - r_i.o_j

which is the similarity of [z_i, r_i] and [t_j, -o_j], for text anchors as well: one stream of tiles that are wider, no
second matrix, and gradient through z and t alone. Rows are longer than 1 then, and similarities within 2.

Cost: similarities are made twice, each time with D + R multiplications, and two products of D make the gradients. So a
step takes 1 + R / (2 D) times the products that it takes without a reference.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from amclr_scale.objectives.base import at_least_float32, require
from amclr_scale.objectives.masking import Masking, MaskOptions
from amclr_scale.types import Embeddings


def check_reference(options: MaskOptions, referred: bool) -> None:
    """Raise where a queue would have to hold references of earlier batches too."""
    empty = options.queue is None or options.queue.size == 0
    require(not referred or empty, "queue", "null beside a reference: stored rows have none", options.queue)


def in_excess(embeddings: Embeddings) -> Embeddings:
    """The same samples, image and text (b, D + R) each, whose similarities are those in excess of the reference's.

    Raises:
        UserError: (a ValueError) references of the two modalities have different widths.
    """
    of_image, of_text = (at_least_float32(x) for x in (embeddings.image_reference, embeddings.text_reference))
    require(
        of_image.ndim == 2 and of_image.shape == of_text.shape,
        "embeddings.text_reference",
        f"features as wide as those of images, {tuple(of_image.shape)}, for the two are compared",
        tuple(of_text.shape),
    )
    image = _beside(embeddings.image, F.normalize(of_image, dim=1))
    return replace(embeddings, image=image, text=_beside(embeddings.text, -F.normalize(of_text, dim=1)))


def without_references(masking: Masking, embeddings: Embeddings) -> Masking:
    """The same for samples `in_excess`: what was put beside their features gets no gradient."""
    return replace(masking, gradient_width=embeddings.image.shape[1] - embeddings.image_reference.shape[1])


def _beside(rows: Tensor, more: Tensor) -> Tensor:
    """Joined, (b, D + R), in float32 at least: references do not lose digits to a run in 16 bits."""
    rows = at_least_float32(rows)
    return torch.cat([rows, more.detach().to(rows)], 1)
