"""The place of the right class among the scores of all: one rule for choosing settings and for measuring."""

from torch import Tensor


def places(scores: Tensor, target: Tensor) -> Tensor:
    """1 + the number of other classes that score at least as high; ties, and scores that are no numbers, count against.

    Others take the class of the smallest number (scikit-learn, `argmax`) or of the nearest neighbour. The first favours
    a classifier whose right classes have small numbers; the second says nothing of votes that are weighed by nearness,
    which tie where neighbours are equally near: pictures that are there twice, or features that are all the same.

    Args:
        scores: (n, K).
        target: (n,) int64.

    Returns:
        (n,) int64, 1 ... K.
    """
    return (~(scores < scores.gather(1, target[:, None]))).sum(1)
