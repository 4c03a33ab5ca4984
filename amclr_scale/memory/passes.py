"""Activations, features and gradients over the two passes of the gradient cache (engine/gradient_cache.py).

n  micro-batches    k  of them whose graphs are kept, the last ones    b  local batch    D  embedding width

    pass_1      n - k forwards without graph, of which the outputs stay; then k with, of which the graphs stay
    objective   outputs, one per micro-batch, and leaves, their concatenation; leaves get gradients
    pass_2      n - k forwards and backwards one after another, beside the k kept graphs; then backwards of those

Of a tower that is frozen as a whole, features stay from pass_1 on, and pass_2 begins with them.

Within one call the image tower goes first, and backward the text tower does. Gradients of parameters begin to exist in
a tower's first backward; later ones are added to them one by one, in half precision to fp32 sums. Leaves and their
gradients live until the step is done and logged.
"""

from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, repeat

from amclr_scale.config.schema import Config
from amclr_scale.config.teacher import lent_sides
from amclr_scale.engine.batch_plan import Plan
from amclr_scale.memory.components import Component, Phase
from amclr_scale.memory.stage3_gathers import LOOKED_AT, Both, Calls, Replay, fewer, looked_at, replay
from amclr_scale.memory.timeline import Gathered, Peak
from amclr_scale.memory.towers import MODALITIES, Modality, Tower, parameter_sizes, trace
from amclr_scale.memory.zero3.coordinator import Limits
from amclr_scale.precision import DTYPES

NOTHING: dict[Modality, Gathered] = {}  # is gathered in a call
NONE: tuple[None, None] = (None, None)
NOTHING_TWICE: Both = {}

Rows = tuple[tuple[Modality, int], ...]  # what one call of the model encodes, in its order
Run = tuple[Rows, int]  # a call, and how often in a row


@dataclass(frozen=True)
class Moment:
    """Bytes alive at one moment: activations of each tower, features, gradients of parameters, gathered parameters."""

    image: int = 0
    text: int = 0
    features: int = 0
    gradients: int = 0
    gathered: int = 0

    @property
    def total(self) -> int:
        return self.image + self.text + self.features + self.gradients + self.gathered

    def and_also(
        self, modality: Modality | None = None, size: int = 0, *, features: int = 0, gradients: int = 0,
        gathered: int = 0,
    ) -> "Moment":  # fmt: skip
        """This moment with more alive."""
        return Moment(
            self.image + (size if modality == "image" else 0),
            self.text + (size if modality == "text" else 0),
            self.features + features,
            self.gradients + gradients,
            self.gathered + gathered,
        )

    def at(self, modality: Modality, peak: Peak) -> "Moment":
        """This moment with what a tower has at its worst."""
        return self.and_also(modality, peak.activations, gradients=peak.gradients, gathered=peak.gathered)


class Passes:
    """One step of one rank.

    Args:
        device: cpu or cuda.
        sizes: elements of each trained parameter, in any order, of the towers and beside them.

    Attributes:
        leaf_bytes: of all embeddings of a rank, as the objective gets them.
        widening: bytes of a summed gradient's element over those of a parameter's.
    """

    def __init__(self, config: Config, plan: Plan, device: str, *, sizes: Sequence[int] = ()):
        self.plan = plan
        self.widening = widening(config, plan)
        cut = config.execution.zero_stage == 3 and plan.world_size > 1
        self.towers: dict[Modality, Tower] = {m: trace(config, m, device, partitioned=cut) for m in MODALITIES}
        self._row = {m: self.towers[m].outputs for m in MODALITIES}  # bytes of a sample's outputs
        # and of what frozen towers gave, which waits for the second pass
        self._waits = {m: self._row[m] + self.towers[m].features for m in MODALITIES}
        self.kept = _kept(config, plan)
        self._without, self._with = _cut(list(runs_of(plan)), plan.micro_batches - self.kept)
        shared = max(tower.shared for tower in self.towers.values())
        self.leaf_bytes = plan.local_batch_size * sum(self._row.values()) + shared
        self._replay = self._follow(config, device, sizes) if cut else None

    def _follow(self, config: Config, device: str, trained: Sequence[int]) -> Replay:
        """What stage 3 gathers in these passes."""
        found, (without, _) = _replayed(config, self.plan, device, trained, self._without, self._with)
        entries = list(_entries(self._without))
        entries += _entries(self._with, sum(min(count, LOOKED_AT) for _, count in without))
        return replace(
            found,
            first_pass=[found.first_pass[entry] for entry in entries],
            second_pass=[found.second_pass[entry] for entry in entries],
        )

    @cached_property
    def peaks(self) -> dict[Phase, Moment]:
        """The worst moment of each phase."""
        gathered: dict[Phase, int] = {} if self._replay is None else self._replay.between
        before = Moment()
        with_leaves = self.after_first_pass.and_also(features=2 * self.leaf_bytes)
        return {
            "data": before.and_also(gathered=gathered.get("data", 0)),
            "pass_1": _worst(self._first_pass(before)),
            "objective": with_leaves.and_also(gathered=gathered.get("objective", 0)),
            "pass_2": _worst(self._second_pass(with_leaves)),
            "reduce": Moment(features=3 * self.leaf_bytes, gathered=gathered.get("reduce", 0)),
            "optimizer": Moment(features=2 * self.leaf_bytes),
        }

    @property
    def after_first_pass(self) -> Moment:
        """Outputs and kept graphs."""
        return self._with_graphs(Moment(features=self._outputs(self._without, self._waits)), self._with)

    @property
    def gathered_in_first_pass(self) -> list[int]:
        """Bytes of gathered parameters at the worst moment of each forward that is looked at."""
        calls = self._replay.first_pass if self._replay else []
        return [int(found.bytes.max()) for call in calls for found in call.values()]

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
        gathered = {phase: moment.gathered for phase, moment in self.peaks.items()}
        found.append(
            Component(
                "gathered parameters", gathered,
                "deepspeed.zero_optimization.stage3_max_live_parameters: fewer stay whole between their uses", "state",
            )
        )  # fmt: skip
        return found

    def _first_pass(self, moment: Moment) -> Iterator[Moment]:
        gathered = iter(self._replay.first_pass if self._replay else repeat(NOTHING))
        for call, count in self._without:
            for index in looked_at(count):
                whole = next(gathered)
                now = moment.and_also(features=index * self._outputs([(call, 1)], self._waits))
                for modality, m in call:
                    yield now.at(modality, self.towers[modality].without_graph.forward_peak(m, whole.get(modality)))
                    now = now.and_also(features=self._waits[modality] * m)
            moment = moment.and_also(features=self._outputs([(call, count)], self._waits))
        for call, count in self._with:
            for index in looked_at(count):
                whole = next(gathered)
                now = self._with_graphs(moment, [(call, index)])
                for modality, m in call:
                    timeline = self.towers[modality].with_graph
                    yield now.at(modality, timeline.forward_peak(m, whole.get(modality)))
                    now = now.and_also(modality, timeline.kept(m))
            moment = self._with_graphs(moment, [(call, count)])

    def _with_graphs(self, moment: Moment, runs: list[Run], sign: int = 1) -> Moment:
        for call, count in runs:
            for modality, m in call:
                moment = moment.and_also(modality, sign * count * self.towers[modality].with_graph.kept(m))
        return moment

    def _second_pass(self, moment: Moment) -> Iterator[Moment]:
        gathered = iter(self._replay.second_pass if self._replay else repeat(NOTHING_TWICE))
        done: set[Modality] = set()
        before = 0  # outputs of the call before, which its name still holds
        for call, count in self._without:
            for _ in looked_at(count):
                whole = next(gathered)
                now = moment.and_also(features=before)
                for modality, m in call:
                    timeline = self.towers[modality].again
                    yield now.at(modality, timeline.forward_peak(m, whole.get(modality, NONE)[0]))
                    now = now.and_also(modality, timeline.kept(m))
                now = yield from self._backward(now, call, whole, done, again=True)
                moment, before = now.and_also(features=-before), self._outputs([(call, 1)])
        for call, count in self._with:
            last = 0
            for index in looked_at(count):
                between = index - last - 1  # those are gone
                if between > 0:
                    moment = self._with_graphs(moment, [(call, between)], sign=-1)
                    moment = moment.and_also(features=self._outputs([(call, between)]))
                moment = yield from self._backward(moment, call, next(gathered), done)
                moment = moment.and_also(features=self._outputs([(call, 1)]))  # which its graph had held
                last = index

    def _backward(
        self, moment: Moment, call: Rows, whole: Both, done: set[Modality], *, again: bool = False
    ) -> Generator[Moment, None, Moment]:
        for modality, m in reversed(call):
            tower, first = self.towers[modality], modality not in done
            timeline = tower.again if again else tower.with_graph
            moment = moment.and_also(modality, -timeline.kept(m))
            gathered = whole.get(modality, NONE)[1]
            yield moment.at(modality, timeline.backward_peak(m, gathered, first=first, widening=self.widening))
            if first:
                moment = moment.and_also(gradients=self.widening * int(timeline.gradients[-1]))
            done.add(modality)
        return moment

    def _outputs(self, runs: Iterable[Run], row: Mapping[Modality, int] | None = None) -> int:
        row = row or self._row
        return sum(count * row[modality] * m for call, count in runs for modality, m in call)


def gathers(config: Config, plan: Plan, device: str) -> Counter[int]:
    """Messages by which stage 3 gathers parameters in a step, by their elements: followed as DeepSpeed decides them.

    Args:
        device: cpu or cuda.
    """
    cut = _cut(list(runs_of(plan)), plan.micro_batches - _kept(config, plan))
    found, calls = _replayed(config, plan, device, parameter_sizes(config), *cut)
    in_order = calls[0] + calls[1]
    sent = found.sent_in(in_order)
    if lent_sides(config):
        sent.update(found.sent_in_first_pass(in_order))
        limit = Limits.of(config.deepspeed).persistent  # they are given up before the teacher encodes, and after it
        sent.update({numel: 2 for numel in parameter_sizes(config) if numel <= limit})
    return sent


def _kept(config: Config, plan: Plan) -> int:
    kept = config.execution.kept_micro_batches
    return min(1 if kept == "auto" else kept, plan.micro_batches)


def _replayed(
    config: Config, plan: Plan, device: str, trained: Sequence[int], without: list[Run], kept: list[Run]
) -> tuple[Replay, tuple[Calls, Calls]]:
    """What stage 3 gathers in calls of which no graph is kept and then in calls of which it is, and their kinds.

    Args:
        trained: elements of each parameter, also of what belongs to neither tower, in any order.
    """
    item, limits = DTYPES[config.execution.precision].itemsize, Limits.of(config.deepspeed)
    sizes = parameter_sizes(config)
    others = (Counter(trained) - Counter(sizes)).elements()
    coordinator = (*sizes, *others), item, plan.world_size, limits
    image, text = (trace(config, modality, device, partitioned=True) for modality in MODALITIES)
    calls = _kinds(without), _kinds(kept)
    return replay(image, text, coordinator, *(fewer(several, image, text) for several in calls)), calls


def widening(config: Config, plan: Plan) -> int:
    """Bytes of a summed gradient's element over those of a parameter's (engine/zero/gradient_sums.py)."""
    several = min(plan.micro_batch_sizes) < plan.local_batch_size
    return 4 // DTYPES[config.execution.precision].itemsize if several else 1


def _worst(moments: Iterable[Moment]) -> Moment:
    return max(moments, key=lambda moment: moment.total, default=Moment())


def runs_of(plan: Plan) -> Iterator[Run]:
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


def _kinds(runs: list[Run]) -> Calls:
    """What the calls encode, those of the same kind in a row together."""
    found = list[tuple[tuple[Modality, ...], int]]()
    for kinds, several in groupby(runs, lambda run: tuple(modality for modality, _ in run[0])):
        found.append((kinds, sum(count for _, count in several)))
    return tuple(found)


def _entries(runs: list[Run], base: int = 0) -> Iterator[int]:
    """Of each call that is looked at, which of the replayed ones stands for it: its size makes no difference there."""
    for _, several in groupby(runs, lambda run: tuple(modality for modality, _ in run[0])):
        before = 0
        for _, count in several:
            yield from (base + min(before + index, LOOKED_AT - 1) for index in looked_at(count))
            before += count
        base += min(before, LOOKED_AT)


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
