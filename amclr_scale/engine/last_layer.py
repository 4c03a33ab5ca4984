"""From gradients of embeddings to those of the last layer's parameters, without touching a parameter.

A head ends in a linear layer, y = W x + b, and the embedding is z = y / |y|. With c_i the gradient of z_i,

    v_i = (c_i - (c_i.z_i) z_i) / |y_i|                of y_i
    dW  = sum_i v_i x_i^T,   db = sum_i v_i

so what the layer read and gave, noted while samples are encoded, is all that is needed, at any stage of ZeRO. Tokens
are embeddings like others, n of them for each sample.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amclr_scale.similarity import all_sum

Note = tuple[Tensor, Tensor]  # of some rows: x, y; of tokens with n of them in each


class LastLayer:
    """`layer(gradient, mine)`: what a gradient of embeddings is for the last linear layer of each head.

    Args:
        views: of a sample, by head: {"image": 2, "text": 1}.
        negatives: how many of these, the last ones, are hard negatives.
    """

    def __init__(self, views: Mapping[str, int], negatives: Mapping[str, int] | None = None):
        self.views, self.negatives = dict(views), dict(negatives or {})
        # Flat name of an embedding -> x (k, F), y (k, D) of this rank's samples; of tokens (k, n, F), (k, n, D).
        self.notes: dict[str, Note] = {}
        self.biases: set[str] = set()  # heads whose layer has one

    @contextmanager
    def noted(self, model: nn.Module) -> Iterator[None]:
        """Take notes of what is encoded meanwhile, this rank's samples in their order, all views of some in a call.

        A head without a linear layer, of an encoder from elsewhere, has none.
        """
        calls: dict[str, list[Note]] = {}
        handles = []
        for side in self.views:
            layer = _last_linear(getattr(model, f"{side}_head", None))
            if layer is not None:
                into = calls[side] = []
                handles.append(layer.register_forward_hook(_note_in(into)))
                self.biases |= {side} if layer.bias is not None else set()
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        for side, found in calls.items():
            for view in range(self.views[side]):  # views lie one after another in every call
                rows = [[x.chunk(self.views[side])[view] for x in call] for call in found]
                hard = view - (self.views[side] - self.negatives.get(side, 0))
                further = f"{side}_views.{view - 1}" if hard < 0 else f"{side}_negatives.{hard}"
                name = further if view else side
                x, y = torch.cat([x for x, _ in rows]), torch.cat([y for _, y in rows])
                if x.dim() == 3:  # tokens stand behind the pooled features
                    if not view:
                        self.notes[f"{side}_tokens"] = x[:, 1:], y[:, 1:]
                    x, y = x[:, 0], y[:, 0]
                self.notes[name] = x, y

    def __call__(self, gradient: Mapping[str, Tensor], mine: slice) -> dict[str, Tensor]:
        """Those of its weight (D, F) and bias (D,) of each head, summed over all ranks' samples, in float64.

        Args:
            gradient: of embeddings of all samples, (K, D) by flat name; what no head gives is passed over.
            mine: this rank's rows of them.
        """
        found: dict[str, Tensor] = {}
        for name, (given, made) in self.notes.items():
            if name not in gradient:
                continue
            side = name.partition("_")[0]
            x, y = given.flatten(0, -2), made.flatten(0, -2).double()
            c, length = gradient[name][mine].flatten(0, -2).double(), y.norm(dim=1, keepdim=True).clamp(min=1e-12)
            z = y / length
            v = (c - (c * z).sum(1, keepdim=True) * z) / length
            parts = {"weight": v.T @ x.double(), **({"bias": v.sum(0)} if side in self.biases else {})}
            for what, part in parts.items():
                key = f"{side}.{what}"
                found[key] = found[key] + part if key in found else part
        return {key: all_sum(x) for key, x in found.items()}

    def forget_others(self, embeddings: Mapping[str, Tensor], mine: slice) -> None:
        """Leave aside heads that do more after their last linear layer than to bring it to unit length.

        Args:
            embeddings: of all samples, (K, D) by flat name.
            mine: this rank's rows.
        """
        for name, (_, y) in list(self.notes.items()):
            z = embeddings[name][mine].double()
            if y.shape == z.shape:
                far = (F.normalize(y.double(), dim=-1) - z).abs().amax(-1) > 0.05  # 16 bits are right to 0.004
                if all_sum(far.double().sum()) == 0:
                    continue
            del self.notes[name]


def _note_in(calls: list[Note]) -> Any:
    def note(_: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        calls.append((given[0].detach(), out.detach()))

    return note


def _last_linear(head: nn.Module | None) -> nn.Linear | None:
    layers = [] if head is None else [module for module in head.modules() if isinstance(module, nn.Linear)]
    return layers[-1] if layers else None
