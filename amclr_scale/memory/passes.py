"""Activations, features and gradients over the two passes of the gradient cache (engine/gradient_cache.py).

n  micro-batches    k  of them whose graphs are kept, the last ones    b  local batch    D  embedding width

    pass_1      n - k forwards without graph, of which the outputs stay; then k with, of which the graphs stay
    objective   outputs, one per micro-batch, and leaves, their concatenation; leaves get gradients
    pass_2      n - k forwards and backwards one after another, beside the k kept graphs; then backwards of those

Within one call the image tower goes first, and backward the text tower does. Gradients of parameters begin to exist in
a tower's first backward; later ones are added to them one by one, in half precision to fp32 sums. Leaves and their
gradients live until the next step is done, in the report of this one.
"""

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from amclr_scale.config.schema import Config
from amclr_scale.engine.plan import Plan
from amclr_scale.memory.components import Component, Phase
from amclr_scale.memory.towers import MODALITIES, PRECISIONS, Modality, Tower, trace

Rows = tuple[tuple[Modality, int], ...]  # what one call of the model encodes, in its order
Run = tuple[Rows, int]  # a call, and how often in a row


@dataclass(frozen=True)
class Moment:
    """Bytes alive at one moment: activations of each tower, features, gradients of parameters."""

    image: int = 0
    text: int = 0
    features: int = 0
    gradients: int = 0
    released: int = 0  # of gathered parameters, which count elsewhere

    @property
    def activations(self) -> int:
        return self.image + self.text

    @property
    def held_by_backward(self) -> int:
        return self.activations + self.gradients

    @property
    def total(self) -> int:
        return self.activations + self.features + self.gradients - self.released

    def and_also(
        self, modality: Modality | None = None, size: int = 0, *, features: int = 0, gradients: int = 0,
        released: int = 0,
    ) -> "Moment":  # fmt: skip
        """This moment with more alive."""
        return Moment(
            self.image + (size if modality == "image" else 0),
            self.text + (size if modality == "text" else 0),
            self.features + features,
            self.gradients + gradients,
            self.released + released,
        )


class Passes:
    """One step of one rank.

    Args:
        device: cpu or cuda.
        copies: bytes of the copy of all gradients that stage 0 makes to exchange them.

    Attributes:
        leaf_bytes: of all embeddings of a rank, as the objective gets them.
    """

    def __init__(self, config: Config, plan: Plan, device: str, *, copies: int = 0):
        self.plan, self.copies = plan, copies
        self.releases = config.execution.zero_stage == 3 and plan.world_size > 1
        self.widening = widening(config, plan)
        self.towers: dict[Modality, Tower] = {modality: trace(config, modality, device) for modality in MODALITIES}
        views = {"image": 1 + config.data.image_views, "text": 1 + config.data.text_views}
        self._row = {m: 4 * config.model.embedding_width * views[m] for m in MODALITIES}  # bytes of a sample's outputs
        self.runs = list(_runs(plan))
        kept = config.execution.kept_micro_batches
        self.kept = min(1 if kept == "auto" else kept, plan.micro_batches)
        self.leaf_bytes = plan.local_batch_size * sum(self._row.values())

    @cached_property
    def peaks(self) -> dict[Phase, Moment]:
        """The worst moment of each phase."""
        before = Moment(features=2 * self.leaf_bytes)  # the report of the step before
        without, kept = _cut(self.runs, self.plan.micro_batches - self.kept)
        found: dict[Phase, Moment] = {"data": before}
        found["pass_1"] = _worst(self._first_pass(before, without, kept))
        graphs = self._with_graphs(before.and_also(features=self._outputs(without)), kept)
        with_leaves = graphs.and_also(features=2 * self.leaf_bytes)
        found["objective"] = with_leaves
        found["pass_2"] = _worst(self._second_pass(with_leaves, without, kept))
        found["reduce"] = Moment(features=5 * self.leaf_bytes)
        found["optimizer"] = Moment(features=4 * self.leaf_bytes)
        return found

    @cached_property
    def last_gathering(self) -> Moment:
        """When stage 3 gathers parameters for the last second forward; without one, the end of pass 2."""
        without, kept = _cut(self.runs, self.plan.micro_batches - self.kept)
        if not without:
            return Moment(gradients=self.peaks["pass_2"].gradients)
        modalities = [modality for call, count in without for _ in range(min(count, 2)) for modality, _ in call]
        before = set(modalities[: -len(without[-1][0])])
        gradients = self.widening * sum(int(self.towers[m].with_graph.gradients[-1]) for m in before)
        return self._with_graphs(Moment(gradients=gradients), kept)

    def components(self) -> list[Component]:
        """Activations of each tower, features, and gradients during the second pass."""
        images, texts = self.plan.micro_batch_sizes
        keeping = (
            f"execution.kept_micro_batches: {max(0, self.kept - 1)}, "
            if self.kept and self.plan.micro_batches > 1
            else ""
        )
        found = [
            Component(
                f"{modality} activations",
                {phase: getattr(moment, modality) for phase, moment in self.peaks.items()},
                f"{keeping}execution.micro_batch_size below {m}, or execution.recompute_{modality}: full",
                "activations",
            )
            for modality, m in (("image", images), ("text", texts))
        ]
        features = {phase: moment.features for phase, moment in self.peaks.items()}
        found.append(
            Component("features and their gradients", features, "train.global_batch_size over more ranks", "features")
        )
        return found

    # Of equal calls in a row, those are looked at that can be the worst: a batch may have a million of them.

    def _first_pass(self, moment: Moment, without: list[Run], kept: list[Run]) -> Iterator[Moment]:
        for call, count in without:  # the last one meets the most outputs
            now = moment.and_also(features=(count - 1) * self._outputs([(call, 1)]))
            for modality, m in call:
                yield now.and_also(modality, self.towers[modality].without_graph.forward_peak(m))
                now = now.and_also(features=self._row[modality] * m)
            moment = now
        for call, count in kept:  # and the most graphs
            moment = self._with_graphs(moment, [(call, count - 1)])
            for modality, m in call:
                yield moment.and_also(modality, self.towers[modality].with_graph.forward_peak(m))
                moment = moment.and_also(modality, self.towers[modality].with_graph.kept(m))

    def _with_graphs(self, moment: Moment, runs: list[Run], sign: int = 1) -> Moment:
        for call, count in runs:
            for modality, m in call:
                moment = moment.and_also(modality, sign * count * self.towers[modality].with_graph.kept(m))
        return moment

    def _second_pass(self, moment: Moment, without: list[Run], kept: list[Run]) -> Iterator[Moment]:
        done: set[Modality] = set()
        before = 0  # outputs of the call before, which its name still holds
        for call, count in without:  # the first one, and one more beside the outputs of the call before
            for _ in range(min(count, 2)):
                now = moment.and_also(features=before)
                for modality, m in call:
                    yield now.and_also(modality, self.towers[modality].with_graph.forward_peak(m))
                    now = now.and_also(modality, self.towers[modality].with_graph.kept(m))
                now = yield from self._backward(now, call, done)
                moment, before = now.and_also(features=-before), self._outputs([(call, 1)])
        for call, count in kept:  # the first, the second with all gradients in place, and the last
            for looked_at in range(min(count, 3)):
                if looked_at == 2:  # those between are gone
                    moment = self._with_graphs(moment, [(call, count - 3)], sign=-1)
                    moment = moment.and_also(features=self._outputs([(call, count - 3)]))
                moment = yield from self._backward(moment, call, done)
                moment = moment.and_also(features=self._outputs([(call, 1)]))  # which its graph had held
        yield moment.and_also(gradients=self.copies)

    def _backward(self, moment: Moment, call: Rows, done: set[Modality]) -> Generator[Moment, None, Moment]:
        for modality, m in reversed(call):
            timeline = self.towers[modality].with_graph
            moment = moment.and_also(modality, -timeline.kept(m))
            alive, gradients, released = timeline.backward_peak(
                m, first=modality not in done, releases=self.releases, widening=self.widening
            )
            yield moment.and_also(modality, alive, gradients=gradients, released=released)
            whole = int(timeline.gradients[-1])
            moment = moment.and_also(
                gradients=0 if modality in done else self.widening * whole, released=whole if self.releases else 0
            )
            done.add(modality)
        return replace(moment, released=0)  # the next call gathers them again

    def _outputs(self, runs: Iterable[Run]) -> int:
        return sum(count * self._row[modality] * m for call, count in runs for modality, m in call)


def widening(config: Config, plan: Plan) -> int:
    """Bytes of a summed gradient's element over those of a parameter's (engine/accumulation.py)."""
    several = min(plan.micro_batch_sizes) < plan.local_batch_size
    return 4 // PRECISIONS[config.execution.precision].itemsize if several else 1


def _worst(moments: Iterable[Moment]) -> Moment:
    return max(moments, key=lambda moment: moment.total, default=Moment())


def _runs(plan: Plan) -> Iterator[Run]:
    """What each call encodes, as `gradient_cache.split` cuts the batch."""
    images, texts = plan.micro_batch_sizes

    def sizes(at_once: int) -> Iterator[tuple[int, int]]:
        whole, rest = divmod(plan.local_batch_size, at_once)
        yield from ((m, count) for m, count in ((at_once, whole), (rest, 1)) if m and count)

    if images == texts:
        yield from (((("image", m), ("text", m)), count) for m, count in sizes(images))
    else:
        yield from (((("image", m),), count) for m, count in sizes(images))
        yield from (((("text", m),), count) for m, count in sizes(texts))


def _cut(runs: list[Run], first: int) -> tuple[list[Run], list[Run]]:
    """The first so many calls, and the others."""
    before: list[Run] = []
    after: list[Run] = []
    for call, count in runs:
        here = min(count, first)
        first -= here
        before += [(call, here)] if here else []
        after += [(call, count - here)] if count > here else []
    return before, after
