"""Zero-shot classification: a class is the mean of what its name's prompts encode to.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021, arXiv:2103.00020.

    w_k = unit(mean_t unit(encode(template_t with class k's name)))       class of an image = argmax_k image . w_k

A class's place is 1 + the number of other classes that do not score lower: ties count against the model, and scores
nearer than rounding (1e-6 in float32) are ties, as is any score beside one that is no number. So a class that is listed
twice is never right at place 1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from amclr_scale.errors import UserError
from amclr_scale.evaluation.chance import guessed
from amclr_scale.evaluation.numbers import Number, mean_of_groups, number
from amclr_scale.evaluation.retrieval import tie
from amclr_scale.evaluation.shares import gather_rows
from amclr_scale.metrics.scores import CLASSIFICATION, Score

ROWS = 1024  # images compared with all classes at once


def prompts(names: list[str], templates: list[str]) -> list[str]:
    """Every class name in every template, class by class. The slot is {} or CLIP_benchmark's {c}.

    Raises:
        UserError: no templates, or one without a slot.
    """
    if not templates:
        raise UserError("evaluation.templates: expected at least one prompt such as 'a photo of a {}', got none")
    for template in templates:
        if ("{}" in template) + ("{c}" in template) != 1:
            raise UserError(
                f"evaluation.templates: expected one slot {{}} (or {{c}}) for the class name, got {template!r}"
            )
    return [t.replace("{c}", "{}").replace("{}", name) for name in names for t in templates]


def ensemble(encoded: Tensor, templates: int) -> Tensor:
    """Encoded prompts (K T, D), class by class -> one unit vector per class (K, D)."""
    by_class = F.normalize(encoded, dim=-1).view(-1, templates, encoded.shape[1])
    return F.normalize(by_class.mean(1), dim=-1)


def _fits(score: Score, num_classes: int) -> bool:
    return score.ranked and (score.within is None or score.within == 1 or score.within < num_classes)


def accuracy_names(num_classes: int, *, name: str = "zero_shot") -> set[str]:
    """What `accuracies` will call its numbers."""
    fit = (column for column, score in CLASSIFICATION.scores.items() if _fits(score, num_classes))
    return {f"{name}_{column}" for column in (*fit, "mean_per_class")}


@torch.no_grad()
def class_ranks(image: Tensor, classes: Tensor, labels: Tensor) -> Tensor:
    """The place of each image's class, 1 = first, of all ranks' images: (N,).

    Args:
        image: (n_r, D), unit length: this rank's.
        classes: (K, D), unit length: all of them, on every rank.
        labels: (n_r,) int64.
    """
    places = [torch.empty(0, dtype=torch.int64, device=image.device)]
    tolerance = tie(image.dtype)
    for block, label in zip(torch.split(image, ROWS), torch.split(labels.to(image.device), ROWS), strict=True):
        scores = block @ classes.T  # (c, K)
        own = scores.gather(1, label[:, None])
        places.append((~(scores < own - tolerance)).sum(1))  # counts the class itself: so it starts at 1
    return gather_rows(torch.cat(places)).cpu()


def accuracies(ranks: Tensor, labels: Tensor, num_classes: int, *, name: str = "zero_shot") -> dict[str, Number]:
    """Every score of CLASSIFICATION, from places (N,) and labels (N,); the mean per class over the classes present."""
    wrong = torch.tensor([num_classes - 1])
    numbers = {
        f"{name}_{column}": number(score.values(ranks).double(), chance=guessed(score, None, wrong))
        for column, score in CLASSIFICATION.scores.items()
        if _fits(score, num_classes)
    }
    numbers[f"{name}_mean_per_class"] = mean_of_groups((ranks <= 1).double(), labels, chance=1 / num_classes)
    return numbers
