"""A backend of similarities of one's own: all of a block at once, as one matrix. It leaves masks to others."""

import torch
import torch.nn.functional as F

from amclr_scale.config.backends import SIMILARITY_BACKENDS
from amclr_scale.similarity.backends import Backend
from amclr_scale.similarity.blocks import MASKED, Workspace

MATRICES = 4  # of the block's size that are alive at once


def positives(matrix, diagonal):
    """The positives' entries of a matrix (b, n), and the anchors that have one."""
    first = max(0, -diagonal)
    found = matrix[first:, first + diagonal :].diagonal()
    return found, slice(first, first + len(found))


class Dense:
    def __init__(self, settings, dtype, form, device):
        self.dtype = dtype

    def matrix(self, anchors, keys, mask=None):
        if mask is not None:
            raise NotImplementedError("dense: it has no masks; choose backend torch")
        return anchors.to(self.dtype) @ keys.to(self.dtype).T

    def accumulate(
        self, anchors, keys, rows, columns=None, *, diagonal=None, positive=None, exclude_positive=False, mask=None,
        cache=None,
    ):  # fmt: skip
        s = self.matrix(anchors, keys, mask)
        if diagonal is not None:
            entries, of = positives(s, diagonal)
            if positive is not None:
                positive[of] = entries
            if exclude_positive:
                entries.fill_(MASKED)
        for side, matrix in ((rows, s), (columns, s.T)):
            if side is not None:
                shift = torch.maximum(matrix.amax(1), side.shift)
                x = (matrix - shift[:, None]) * side.rate[:, None]
                side.add(shift, x.exp2().sum(1), (x * x.exp2()).sum(1))

    def differentiate(
        self, anchors, keys, rows, columns=None, *, d_anchors=None, d_keys=None, diagonal=None, positive_weight=None,
        mask=None, cache=None,
    ):  # fmt: skip
        s = self.matrix(anchors, keys, mask)
        weights = torch.zeros_like(s)
        for side, matrix, out in ((rows, s, weights), (columns, s.T, weights.T)):
            if side is not None:
                out.add_(((matrix - side.shift[:, None]) * side.rate[:, None]).exp2() * side.factor[:, None])
        if diagonal is not None and positive_weight is not None:
            entries, of = positives(weights, diagonal)
            entries.copy_(positive_weight[of])
        self.add(weights, anchors, keys, d_anchors, d_keys)

    def sigmoid(self, anchors, keys, numbers, *, d_anchors=None, d_keys=None, diagonal=None):
        s = self.matrix(anchors, keys)
        sign = torch.ones_like(s)  # -y
        if diagonal is not None:
            positives(sign, diagonal)[0].fill_(-1)
        logits = sign * (s * numbers.scale + numbers.bias)
        weights = sign * logits.sigmoid()
        numbers.loss.add_(F.softplus(logits).double().sum())
        numbers.d_scale.add_((weights * s).double().sum())
        numbers.d_bias.add_(weights.double().sum())
        self.add(weights, anchors, keys, d_anchors, d_keys)

    def add(self, weights, anchors, keys, d_anchors, d_keys):
        if d_anchors is not None:
            d_anchors += weights @ keys.to(self.dtype)
        if d_keys is not None:
            d_keys += weights.T @ anchors.to(self.dtype)


DENSE = Backend(
    make=Dense,
    missing=lambda device: "",
    workspace=lambda settings, form, device: Workspace(2**40, 2**40, MATRICES * (8 if form == "fp64" else 4)),
    fast_narrow=lambda device: False,
)
SIMILARITY_BACKENDS["dense"] = f"{__name__}:DENSE"
