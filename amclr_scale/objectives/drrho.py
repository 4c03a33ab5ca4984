"""DRRho-CLIP: FastCLIP on similarities in excess of a frozen reference model's.

Wei et al., "Model Steering: Learning with a Reference Model Improves Generalization Bounds and Scaling Laws", ICML
2025, arXiv:2505.06699.

With r_i, o_i the reference's unit features of image i and text i, and everything else as in fastclip.py:

    h_ij = (s_ij - s_ii) - (r_i.o_j - r_i.o_i)                    h'_ij = (s_ji - s_ii) - (r_j.o_i - r_i.o_i)

A negative that the reference finds as near as the model does weighs as much as any: the gradient goes where the model
is worse than its reference. Where the two agree everywhere, x = 0 and all negatives weigh alike.

Numerics: one log-sum over tiles of width D + R (reference.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from amclr_scale.declarations import read_by_masks
from amclr_scale.objectives.base import require
from amclr_scale.objectives.fastclip import FastCLIP
from amclr_scale.objectives.masking import Masking
from amclr_scale.objectives.reference import check_reference, in_excess, without_references
from amclr_scale.types import Embeddings, Loss


class DRRho(FastCLIP, name="drrho"):
    """FastCLIP steered by a frozen reference model: what counts is where the model is worse than it."""

    @dataclass(frozen=True, kw_only=True)
    class Config(FastCLIP.Config):
        """Options of `drrho`."""

        version: Literal["v0", "v1", "v2", "v3"] = "v1"  # of fastclip; v1: a fixed temperature, as published
        temperature: float | None = 0.01  # v1: fixed (null: 0.07); v2: every sample's first (null: 0.03); v0, v3: null
        gamma: float = 0.35  # weight of the newest batch in u at the end; published: 4.177 / epochs^0.7265, at most 1
        gamma_epochs: float | None = 30.0  # epochs the cosine takes; published: all
        eps: float = 1e-4  # added to u

        def __post_init__(self) -> None:
            super().__post_init__()
            require(not self.compat, "compat", "false: that is the published code of fastclip", self.compat)
            check_reference(self, True)

    @staticmethod
    def inputs_of(options: Any) -> Mapping[str, Any]:
        return {**read_by_masks(options), "ids": True, "image_reference": True, "text_reference": True}

    def forward(self, embeddings: Embeddings) -> Loss:
        return super().forward(in_excess(embeddings))

    def masks(self, embeddings: Embeddings) -> Masking:
        return without_references(super().masks(embeddings), embeddings)
