"""FILIP: images and texts are compared patch by patch and word by word, each with its best match on the other side.

Yao et al., "FILIP: Fine-grained Interactive Language-Image Pre-Training", ICLR 2022, arXiv:2111.07783.

With tokens f_ik of image i and g_jr of text j, of which n1_i and n2_j count:

    s1_ij = (1 / n1_i) sum_k max_r f_ik.g_jr              s2_ij = (1 / n2_j) sum_r max_k f_ik.g_jr
    L_i   = log sum_j exp(s1_ij / t) - s1_ii / t           L'_j = log sum_i exp(s2_ij / t) - s2_jj / t
    value = (1/2) mean_i (L_i + L'_i)

Padding counts neither in a maximum nor in a mean. With one token on each side this is CLIP. Of equal matches the first
has the gradient. All tokens take part: the authors keep a quarter of them, chosen within each batch, to save messages.

Numerics: centred on the positive of each direction; similarities and sums in float32, a tile of tokens at a time.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from amclr_scale.declarations import read_by_masks
from amclr_scale.objectives.base import Objective, learned_temperature, numbers, require
from amclr_scale.objectives.clip import check_temperature, softmax_loss
from amclr_scale.objectives.masking import MaskOptions
from amclr_scale.similarity import token_contrast
from amclr_scale.types import Embeddings, Loss


class FILIP(Objective, name="filip"):
    """Softmax loss on best matches between patches and words, in both directions."""

    @dataclass(frozen=True, kw_only=True)
    class Config(MaskOptions):
        """Options of `filip`."""

        temperature: float | None = None  # fixed; null: learned, 1 / logit_scale

        def __post_init__(self) -> None:
            super().__post_init__()
            check_temperature(self.temperature)
            fix = "null: it would hold the tokens of earlier batches, n times what a queue of embeddings holds"
            require(self.queue is None, "queue", fix, self.queue)
            require(self.layers is None, "layers", "null: it compares tokens, which are of one layer", self.layers)

    config: Config

    @staticmethod
    def inputs_of(options: Any) -> Mapping[str, Any]:
        tokens = {f"{side}_{what}": True for side in ("image", "text") for what in ("tokens", "token_mask")}
        return {**read_by_masks(options), **tokens}

    def forward(self, embeddings: Embeddings) -> Loss:
        t = learned_temperature(embeddings, self.config.temperature)
        masks = self.masks(embeddings).of()
        both = token_contrast(
            embeddings.image_tokens, embeddings.text_tokens, embeddings.image_token_mask, embeddings.text_token_mask,
            temperature=t, image_groups=masks["image_groups"], text_groups=masks["text_groups"], margin=masks["margin"],
        )  # fmt: skip
        loss = softmax_loss(both)
        return Loss(loss, numbers(objective=loss, temperature=t))
