"""Factors and offsets that public code gets wrong across ranks: ours is x 1 for any number of them.

The engine averages over ranks, so a feature row's effective gradient is its own over W, and the scale's the mean.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from amclr_scale.similarity import contrast, rank, world_size

B, D = 12, 5
SCALE = 7.0


def global_features() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return tuple(F.normalize(torch.randn(B, D, generator=g, dtype=torch.float64), dim=1) for _ in range(2))


def one_rank() -> dict[str, Tensor]:
    """This rank's part of a CLIP loss, as an engine would run it."""
    b = B // world_size()
    rows = slice(rank() * b, (rank() + 1) * b)
    image, text = (x[rows].clone().requires_grad_() for x in global_features())
    scale = torch.tensor([SCALE], dtype=torch.float64, requires_grad=True)
    both = contrast(image, text, temperature=1 / scale)
    loss = sum((side.log_sum - scale * side.positive).mean() for side in (both.image, both.text)) / 2
    loss.backward()
    return {
        "image": image.grad / world_size(),
        "text": text.grad / world_size(),
        "scale": scale.grad,
        "positive": both.image.positive.detach(),
        "loss": loss.detach(),
    }


@pytest.fixture(scope="module")
def dense() -> dict[str, Tensor]:
    image, text = (x.requires_grad_() for x in global_features())
    scale = torch.tensor([SCALE], dtype=torch.float64, requires_grad=True)
    logits, labels = scale * image @ text.T, torch.arange(B)
    loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    loss.backward()
    positive = (image * text).sum(1).detach()
    return {"image": image.grad, "text": text.grad, "scale": scale.grad, "positive": positive, "loss": loss.detach()}


@pytest.mark.parametrize("number", [1, 2, 4])
def test_feature_gradients_are_not_divided_by_the_number_of_ranks(ranks, dense, number):
    """Gather layers whose backward keeps the own slice only: x 1/W."""
    answers = ranks(number, one_rank)
    for modality in ("image", "text"):
        got = torch.cat([answer[modality] for answer in answers])
        torch.testing.assert_close(got, dense[modality], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("number", [2, 4])
def test_positives_of_later_ranks_are_their_own(ranks, dense, number):
    """A diagonal taken of a b x B block: wrong positives on every rank but the first."""
    answers = ranks(number, one_rank)
    torch.testing.assert_close(torch.cat([answer["positive"] for answer in answers]), dense["positive"])
    torch.testing.assert_close(torch.stack([answer["loss"] for answer in answers]).mean(), dense["loss"])


@pytest.mark.parametrize("number", [1, 2, 4])
def test_the_scale_gradient_is_not_multiplied_by_the_number_of_ranks(ranks, dense, number):
    """A sum over ranks of per-rank means, averaged by no one: x W."""
    answers = ranks(number, one_rank)
    got = torch.stack([answer["scale"] for answer in answers]).mean(0)
    torch.testing.assert_close(got, dense["scale"], rtol=1e-12, atol=1e-14)
