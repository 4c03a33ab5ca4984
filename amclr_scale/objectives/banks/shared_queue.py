"""The option `queue` of every softmax objective: what the last batches held are further keys, whatever the objective.

    objective: {name: sogclr, queue: {size: 4096}}

Each contrast of the objective meets the rows of the bank of the modality that its keys have, except those of the
anchor's own sample. They count like other negatives: in a denominator, and in the number that a mean divides by. No
gradient flows into them; so the positive's pull on a key is met by less push from anchors than without a queue.
"""

from collections import ChainMap
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from amclr_scale.objectives.banks.queues import BankOptions, Look, Queues, ids_of
from amclr_scale.objectives.base import Layout, Objective, numbers, require
from amclr_scale.types import Embeddings, Loss


@dataclass(frozen=True, kw_only=True)
class Queue(BankOptions):
    """Options of the queue."""

    source: Literal["student", "momentum"] = "student"  # whose features are stored; momentum: model.momentum's
    key_gradient: bool = True  # false: neither the batch's keys nor positives as keys get one, as stored ones get none


class SharedQueue(Queues):
    """The two banks, and what they give to the step that is under way."""

    def __init__(self, options: Queue, layout: Layout) -> None:
        super().__init__(options, layout)
        self.source, self.key_gradient = options.source, options.key_gradient
        self._look: Look | None = None
        self._read = False

    def around(self, forward: Callable[[Embeddings], Loss], embeddings: Embeddings, objective: Objective) -> Loss:
        """The objective's forward with the queue, into which the batch goes afterwards."""
        ids, stored = ids_of(embeddings), (embeddings.image, embeddings.text)
        if self.source == "momentum":
            stored = (embeddings.image_momentum, embeddings.text_momentum)
        self._look, self._read = self.look(*stored, ids, objective.epoch), False
        metrics = numbers(**self._look.metrics)
        try:
            loss = forward(embeddings)
        finally:
            self._look = None
        require(self._read, "queue", f"null, for {objective.name} reads none", self.size)
        if objective.learns:
            self.put(*stored, ids)
        return replace(loss, metrics=ChainMap(cast(Any, loss.metrics), cast(Any, metrics)))

    def beside(self, masking: Any) -> Any:
        """A `Masking` with the queue's keys."""
        assert self._look is not None, "outside of a step"
        self._read = True
        return replace(
            masking, images=self._look.extra_images, texts=self._look.extra_texts, key_gradient=self.key_gradient
        )
