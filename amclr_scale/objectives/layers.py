"""The option `layers`: an objective of several layers of the towers at once, each with a state of its own.

    objective: {name: fifo_bank, size: 65536, layers: [1, 1]}
    model: {image: {taps: [blocks.11.mlp.fc1]}, text: {taps: [encoder.layer.11.intermediate]}}

With w_0 the weight of the embeddings, w_k that of the k-th tapped layer (encoders/taps.py), and L_k the objective, with
the layer's features in place of the embeddings:

    value = sum_k w_k L_k / sum_k w_k

Banks, tables and counts are kept for each layer by itself, in the widths that the layers have; the learned scale, ids
and what else the objective reads are the same for all. Where the objective reads features of a teacher, each layer
reads the teacher's of that layer. Two layers of each tower are what the notes "Increasing negative examples for ITC"
contrast.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from amclr_scale.declarations import mistakes_of_layers
from amclr_scale.errors import UserError
from amclr_scale.types import Embeddings, Loss

OF_LAYERS = ("image_layers", "text_layers", "image_momentum_layers", "text_momentum_layers")


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """The option of every objective that can be taken of several layers."""

    layers: tuple[float, ...] | None = (
        None  # weights of the embeddings and of each tapped layer; null: embeddings alone
    )


class Layers(nn.ModuleList):
    """The same objective once more for each tapped layer.

    Attributes:
        weights: w_0 of the embeddings, then w_k of each.
    """

    def __init__(self, weights: Sequence[float], objectives: Sequence[nn.Module]):
        super().__init__(objectives)
        self.weights = tuple(weights)

    def around(self, first: Callable[[Embeddings], Loss], embeddings: Embeddings, epoch: float) -> Loss:
        """The objective of the embeddings, by `first`, and of each layer."""
        found = [first(embeddings)]
        for number, one in enumerate(self):
            one.set_epoch(epoch)  # type: ignore[operator]
            found.append(one(of_layer(embeddings, number)))
        total = sum(self.weights)
        value = sum(
            (w * loss.value for w, loss in zip(self.weights[1:], found[1:], strict=True)),
            self.weights[0] * found[0].value,
        )
        return Loss(value / total, OfLayers([loss.metrics for loss in found], self.weights))


class OfLayers(Mapping[str, float]):
    """Numbers to log: those of the embeddings; of the k-th tapped layer, `layer_k_...`; and `objective`, of all."""

    def __init__(self, found: Sequence[Mapping[str, float]], weights: Sequence[float]):
        self._found, self._weights = found, weights
        self._of = {name: (0, name) for name in found[0]}
        self._of |= {f"layer_{k}_{name}": (k, name) for k, one in enumerate(found) if k for name in one}

    def __getitem__(self, name: str) -> float:
        layer, own = self._of[name]
        if name != "objective":
            return self._found[layer][own]
        weighted = (w * one["objective"] for w, one in zip(self._weights, self._found, strict=True))
        return sum(weighted) / sum(self._weights)

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)

    def __len__(self) -> int:
        return len(self._of)


def of_layer(embeddings: Embeddings, number: int) -> Embeddings:
    """What an objective is given of a tapped layer, the first of which is 0."""
    given = {name: rows for name, rows in embeddings.given.items() if name not in OF_LAYERS}
    for side in ("image", "text"):
        if f"{side}_momentum" in given:
            given[f"{side}_momentum"] = getattr(embeddings, f"{side}_momentum_layers")[number]
    return replace(
        embeddings, image=embeddings.image_layers[number], text=embeddings.text_layers[number], image_views=(),
        text_views=(), given=given,
    )  # fmt: skip


def with_layers(made: Any, again: Callable[[Any], Any]) -> None:
    """Give an objective its layers, where its options ask for some.

    Args:
        made: the objective.
        again: makes another one of these options.

    Raises:
        UserError: weights that are none, or an objective that cannot be taken of several layers.
    """
    weights = getattr(made.config, "layers", None)
    if weights is None:
        return
    for line in mistakes_of_layers(made.inputs_of(made.config), made.config):
        raise UserError(line)
    if made.model_parts(made.config, 8) is not None:
        raise UserError(f"layers: expected null, for {made.name} trains parts that read the embeddings, got {weights}")
    made.layers = Layers(weights, [again(_of_any_width(made.config)) for _ in weights[1:]])


def _of_any_width(options: Any) -> Any:
    """The options for a layer, whose features have a width of their own."""
    changes: dict[str, Any] = {"layers": None}
    if hasattr(options, "width"):
        changes["width"] = None
    if (queue := getattr(options, "queue", None)) is not None:
        changes["queue"] = replace(queue, width=None)
    return replace(options, **changes)


def allocate(objective: Any, width: int, layers: Sequence[int] = ()) -> None:
    """Have state made that waits for the first embeddings to know their width.

    Args:
        width: D.
        layers: the width of each tapped layer.
    """
    objective.allocate(width)
    for one, own in zip(objective.layers or (), layers or [width] * len(objective.layers or ()), strict=True):
        one.allocate(own)


def rehearse(objective: Any, width: int, slots: int, layers: Sequence[int] = ()) -> None:
    """Be as in the midst of a run (see `Objective.rehearse`)."""
    objective.rehearse(width, slots)
    for one, own in zip(objective.layers or (), layers or [width] * len(objective.layers or ()), strict=True):
        one.rehearse(own, slots)
