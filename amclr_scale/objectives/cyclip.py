"""CyCLIP: CLIP plus two penalties that make the geometry of the two modalities agree.

Goel et al., "CyCLIP: Cyclic Contrastive Language-Image Pretraining", NeurIPS 2022, arXiv:2205.14459.

With Z, T the unit rows of all ranks, s = Z T^T:

    in-modal     (lambda_in / B) sum_ij (z_i.z_j - t_i.t_j)^2       two images are as alike as their texts are
    cross-modal  (lambda_cross / B) sum_ij (s_ij - s_ji)^2          s is symmetrical
    value        CLIP + in-modal + cross-modal

Both sums are functions of three D x D matrices, so no B x B matrix is needed. With A = Z^T Z, C = T^T T, M = T^T Z:

    sum_ij (z_i.z_j - t_i.t_j)^2 = |A|^2 + |C|^2 - 2 |M|^2          sum_ij (s_ij - s_ji)^2 = 2 (tr A C - tr M M)

With `inmodal`, the contrastive part is the mean of CLIP and (CE(Z, Z') + CE(T, T')) / 2, where CE contrasts the rows
of an embedding with its augmented view.

Numerics: sums of D^2 products in float32; their difference keeps an absolute error of about 1e-7 B / D.
"""

from dataclasses import dataclass

from torch import Tensor

from amclr_scale.objectives.base import Objective, learned_temperature, numbers, require
from amclr_scale.objectives.clip import check_temperature, softmax_loss
from amclr_scale.similarity import contrast, gram
from amclr_scale.types import Embeddings, Loss


class CyCLIP(Objective, name="cyclip"):
    """CLIP with cyclic consistency inside and between modalities."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of `cyclip`."""

        temperature: float | None = None  # fixed; null: learned, 1 / logit_scale
        lambda_in: float = 0.25  # weight of the in-modal penalty
        lambda_cross: float = 0.25  # weight of the cross-modal penalty
        inmodal: bool = False  # also contrast each modality with an augmented view of itself

        def __post_init__(self) -> None:
            check_temperature(self.temperature)
            require(self.lambda_in >= 0, "lambda_in", "a weight of at least 0", self.lambda_in)
            require(self.lambda_cross >= 0, "lambda_cross", "a weight of at least 0", self.lambda_cross)

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.needs_views = 1 if config.inmodal else 0

    def forward(self, embeddings: Embeddings) -> Loss:
        config, image, text = self.config, embeddings.image, embeddings.text
        t = learned_temperature(embeddings, config.temperature)
        both = contrast(image, text, temperature=t)
        contrastive = softmax_loss(both, t)
        if config.inmodal:
            among_images = _cross_entropy(image, embeddings.image_views[0], t)
            among_texts = _cross_entropy(text, embeddings.text_views[0], t)
            contrastive = (contrastive + (among_images + among_texts) / 2) / 2
        in_modal, cross_modal = cyclic_sums(image, text)
        in_modal, cross_modal = in_modal / both.num_keys, cross_modal / both.num_keys
        loss = contrastive + config.lambda_in * in_modal + config.lambda_cross * cross_modal
        return Loss(
            loss,
            numbers(objective=loss, contrastive=contrastive, in_modal=in_modal, cross_modal=cross_modal, temperature=t),
        )


def _cross_entropy(anchors: Tensor, keys: Tensor, temperature: Tensor | float) -> Tensor:
    side = contrast(anchors, keys, temperature=temperature).image
    return (side.log_sum - side.positive / temperature).mean()


def cyclic_sums(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over all pairs of (z_i.z_j - t_i.t_j)^2 and of (s_ij - s_ji)^2: two tensors (), the same on all ranks."""
    a, c, m = gram(image, image), gram(text, text), gram(text, image)  # (D, D) each
    in_modal = a.square().sum() + c.square().sum() - 2 * m.square().sum()
    cross_modal = 2 * ((a * c).sum() - (m * m.T).sum())
    return in_modal, cross_modal
