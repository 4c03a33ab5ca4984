"""An objective that reads tokens and nothing else: CLIP of their means."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F

from amclr_scale.objectives.base import Objective, numbers
from amclr_scale.objectives.clip import softmax_loss
from amclr_scale.similarity import contrast
from amclr_scale.types import Embeddings, Loss


class ComparesTokens(Objective, name="compares_tokens"):
    """Means of tokens against means of tokens."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """None."""

    @staticmethod
    def inputs_of(options: Any) -> Mapping[str, Any]:
        return {"image_tokens": True, "text_tokens": True, "text_token_mask": True}

    def forward(self, embeddings: Embeddings) -> Loss:
        image = F.normalize(embeddings.image_tokens.square().mean(1), dim=1)
        weights = embeddings.text_token_mask[:, :, None].to(image.dtype)
        text = F.normalize((embeddings.text_tokens * weights).square().sum(1), dim=1)
        loss = softmax_loss(contrast(image, text, temperature=0.1, centred=True))
        return Loss(loss, numbers(objective=loss))
