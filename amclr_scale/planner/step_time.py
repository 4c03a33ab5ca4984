"""How long a step will take: a small model, good enough to put execution settings in order.

    estimate(config, profile, world_size=8, num_samples=2_900_000).seconds

A step is the sum of these, per rank; nothing is taken to overlap but stage 3's parameters with the towers on CUDA:

    towers       for each call the larger of operations / (peak u) and bytes / memory bandwidth; backward: twice the
                 operations, and what recomputation runs again. Launches x their time run beside that on a GPU, so the
                 larger counts, and before it on a CPU. Operations, bytes and launches (allocations) are traced
                 (towers.py); u is the utilisation that matrix products reach
    objective    operations of its products / (peak u), in the precision that they run in there (`split`: three bfloat16
                 products for one), + bytes / memory bandwidth, traced (objective_traffic.py)
    messages     bytes on the wire (traffic.py) / link + calls x their latency. A ring passes a node's border once, so
                 gathering and reducing run at the smaller of the link inside and all network cards of a node together.
                 Of what goes to everybody (all_to_all), the part for other nodes takes a device's own card and the rest
                 the link inside, at the same time; what goes to the neighbour (send) waits for the one card at a border
    optimizer    every state read and written once / memory bandwidth; offloaded states at the speed of the host's link
    host         offloaded gradients and parameters / the host's link

Waiting for data and evaluation are not in it. `Rates` holds what no data sheet says: u was measured for some devices
(devices.yaml) and is a guess for the others; `--utilisation` of `amclr-scale fit`, the hfu that a run logged, replaces
it. `between` gives the times for the least and the most u, and nobody should read more than two digits of any. Orders
are more reliable than times.
"""

from dataclasses import dataclass, fields, replace
from functools import lru_cache

import torch

from amclr_scale.config.schema import Config
from amclr_scale.config.teacher import lent_sides
from amclr_scale.encoders.dual_encoder import DualEncoder
from amclr_scale.encoders.recomputation import Recomputation, recomputed_share
from amclr_scale.engine.batch_plan import make_plan
from amclr_scale.memory.teacher import computes_in, encodes
from amclr_scale.memory.timeline import Timeline
from amclr_scale.memory.towers import Modality, Tower, skeleton, trace
from amclr_scale.metrics.devices import USUAL, DeviceProfile
from amclr_scale.metrics.flops import ModelFlops
from amclr_scale.planner.messages import Message, Messages
from amclr_scale.planner.traffic import (
    fetches,
    host_traffic,
    kept_of,
    objective_trace,
    parameters_of,
    zero_messages,
)
from amclr_scale.precision import DTYPES
from amclr_scale.similarity.precision import form_of
from amclr_scale.similarity.settings import Settings

SPREAD = 0.2  # one run's hfu says so much about another's: a plain and a cached step on the same card (measurements.md)


@dataclass(frozen=True)
class Rates:
    """What a job reaches of a device's peak; guesses unless measured."""

    utilisation: float = USUAL.usual  # of the peak of matrix products
    launch: float = 1.5e-5  # seconds that the host takes for each allocation of a tower, operations between included
    message: float = 3e-5  # seconds before a collective's first byte

    least: float | None = None  # utilisations to be expected; None: `utilisation`, give or take `SPREAD`
    most: float | None = None

    def ends(self) -> tuple["Rates", "Rates"]:
        """The same with the least and with the most utilisation."""
        least, most = self.least or self.utilisation * (1 - SPREAD), self.most or self.utilisation * (1 + SPREAD)
        return replace(self, utilisation=least), replace(self, utilisation=min(1.0, most))


# Of a peak that was measured, not stated.
CPU_RATES = Rates(utilisation=0.7, launch=3e-5, message=2e-4, least=0.5, most=0.9)


def default_rates(profile: DeviceProfile) -> Rates:
    """For a GPU or for this machine's CPU."""
    if profile.type == "cpu":
        return CPU_RATES
    reached = profile.utilisation
    return Rates(utilisation=reached.usual, least=reached.least, most=reached.most)


@dataclass(frozen=True)
class Cost:
    """Seconds of one step on one rank, by what they are spent on, and bytes that one rank sends."""

    towers: float
    objective: float
    messages: float
    optimizer: float
    host: float
    wire_bytes: float
    global_batch_size: int
    flops: float  # useful operations per sample
    bound: float  # seconds of the towers where every forward is run twice and nothing but operations costs time

    @property
    def seconds(self) -> float:
        return self.towers + self.objective + self.messages + self.optimizer + self.host

    @property
    def samples_per_second(self) -> float:
        """Over all ranks."""
        return self.global_batch_size / self.seconds

    @property
    def shares(self) -> dict[str, float]:
        """Part of the step -> seconds, the largest first."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)[:5]}
        return dict(sorted(parts.items(), key=lambda item: -item[1]))


def estimate(
    config: Config,
    profile: DeviceProfile,
    *,
    world_size: int,
    num_samples: int,
    ranks_per_node: int | None = None,
    rates: Rates | None = None,
) -> Cost:
    """The cost of one step.

    Args:
        config: its kept_micro_batches is a number.
        world_size: W.
        num_samples: N, the size of the data set.
        ranks_per_node: None: all ranks share one.
        rates: None: `default_rates`.
    """
    rates = rates or default_rates(profile)
    plan = make_plan(config, num_samples, world_size)
    b, execution = plan.local_batch_size, config.execution
    calls = tuple(-(-b // m) for m in plan.micro_batch_sizes)
    kept = _kept_by_tower(kept_of(config), *calls)
    towers = 0.0
    peak = profile.peak(execution.precision) * rates.utilisation
    modalities: tuple[Modality, Modality] = ("image", "text")
    for modality, m, n, k in zip(modalities, plan.micro_batch_sizes, calls, kept, strict=True):
        passes = _passes(config, modality)
        together = sum if profile.type == "cpu" else max  # a CPU has nobody to launch for it
        first, whole, again, back = (
            together((p.launches * rates.launch, max(p.flops * m / peak, p.bytes(m) / profile.memory_bandwidth)))
            for p in passes
        )
        towers += b / (n * m) * ((n - k) * (first + again) + k * whole + n * back)
    lent = 0.0  # operations per sample of a teacher's forward
    for modality in lent_sides(config):
        m, forward = plan.micro_batch_sizes[modality == "text"], _passes(encodes(config), modality)[0]
        moves = forward.bytes(m) / profile.memory_bandwidth
        works = forward.flops * m / (profile.peak(computes_in(config)) * rates.utilisation)
        together = sum if profile.type == "cpu" else max
        towers += b / m * together((forward.launches * rates.launch, max(works, moves)))
        lent += forward.flops

    image, text = (trace(config, modality) for modality in modalities)
    model_flops = ModelFlops(
        round(image.flops), round(text.flops), round(image.frozen_flops), round(text.frozen_flops),
        round(image.once_flops), round(text.once_flops), round(lent),
    )  # fmt: skip
    useful = model_flops.useful()
    work = objective_trace(config, world_size, num_samples, profile.type, ranks_per_node)
    products, kind = _products(config, profile)
    objective = products * work.flops(b) / (profile.peak(kind) * rates.utilisation)
    objective += work.bytes(b) / profile.memory_bandwidth
    if execution.similarity.cache_mib:  # kept tiles save the first of backward's products, about 1 in 4
        tiles = min(1.0, execution.similarity.cache_mib * 2**20 / (b * b * world_size * 4))
        objective *= 1 - tiles / 4

    parameters, gathered = parameters_of(config), fetches(config, plan, profile.type)
    messages = gathers = 0.0
    wire = 0.0
    if world_size > 1:
        own, zero = work.messages(b), zero_messages(config, world_size, gathered)
        fetched = Messages(tuple(m for m in zero if m.purpose == "parameters" and execution.zero_stage == 3))
        others = Messages(tuple(m for m in zero if m not in fetched.found))
        messages = _seconds(own + others, profile, rates, world_size, ranks_per_node)
        gathers = _seconds(fetched, profile, rates, world_size, ranks_per_node)
        wire = (own + zero).wire_bytes
    exposed = max(0.0, gathers - towers) if profile.type == "cuda" else gathers

    share = parameters / (world_size if execution.zero_stage else 1)
    states = 1 + config.optimizer.rule.moments(config.optimizer)
    touched = share * 4 * (2 * states + 1) + parameters * (DTYPES[execution.precision].itemsize + 4)
    touched += share * 4 * 3 * (config.model.momentum is not None)  # the masters read, the average read and written
    offloaded = execution.offload != "none" and profile.type == "cuda"
    to_host, from_host = host_traffic(config, world_size, gathered) if offloaded else (0, 0)
    return Cost(
        towers=towers,
        objective=objective,
        messages=messages + exposed,
        optimizer=touched / (profile.host_link if offloaded else profile.memory_bandwidth),
        host=(to_host + from_host) / profile.host_link,
        wire_bytes=wire,
        global_batch_size=plan.global_batch_size,
        flops=useful,
        bound=model_flops.hardware(second_forwards=1, recomputed_image=0, recomputed_text=0) * b / peak,
    )


def between(
    config: Config,
    profile: DeviceProfile,
    *,
    world_size: int,
    num_samples: int,
    ranks_per_node: int | None = None,
    rates: Rates | None = None,
) -> tuple[Cost, Cost, Cost]:
    """The cost of one step where the device reaches the least of its peak, as much as usual, and the most."""
    rates = rates or default_rates(profile)
    slow, usual, fast = (
        estimate(
            config, profile, world_size=world_size, num_samples=num_samples, ranks_per_node=ranks_per_node, rates=one
        )
        for one in (rates.ends()[0], rates, rates.ends()[1])
    )
    return slow, usual, fast


def _kept_by_tower(kept: int, images: int, texts: int) -> tuple[int, int]:
    """Kept micro-batches of each tower: the last ones, and with sizes of their own texts come last."""
    if images == texts:
        return min(kept, images), min(kept, texts)
    return min(images, max(0, kept - texts)), min(kept, texts)


def _products(config: Config, profile: DeviceProfile) -> tuple[int, str]:
    """How many products an objective's one is, and in which precision the device multiplies."""
    settings = Settings(precision=config.execution.similarity.precision, run_precision=config.execution.precision)
    form = form_of(settings, torch.float32, fast_narrow=profile.type == "cuda")  # of the float32 rows that towers give
    if form == "split":
        return (3, "bf16") if profile.type == "cuda" else (3, "fp32")
    return 1, form if profile.type == "cuda" else "fp32"  # a CPU multiplies rounded operands as float32


@dataclass(frozen=True)
class _Pass:
    """One call of a tower."""

    flops: float  # per sample
    slope: float  # bytes moved: slope m + constant
    constant: float
    launches: int

    def bytes(self, m: int) -> float:
        return self.slope * m + self.constant


def _passes(config: Config, modality: Modality) -> tuple[_Pass, _Pass, _Pass, _Pass]:
    """The forward without a graph, the forward with one, the second forward, and the backward."""
    recomputation = config.execution.recompute_image if modality == "image" else config.execution.recompute_text
    model = skeleton(config)
    share, item = _share(model, modality, recomputation), DTYPES[config.execution.precision].itemsize
    whole, head = (item * _parameters(model, part) for part in (modality, f"{modality}_head"))
    return _passes_of(trace(config, modality), share, whole, head)


@lru_cache(maxsize=64)
def _share(model: DualEncoder, modality: Modality, recomputation: Recomputation) -> float:
    return recomputed_share(getattr(model, f"{modality}_tower"), recomputation)


@lru_cache(maxsize=64)
def _parameters(model: DualEncoder, beginning: str) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if name.startswith(beginning))


@lru_cache(maxsize=64)
def _passes_of(tower: Tower, share: float, whole_weights: int, head_weights: int) -> tuple[_Pass, _Pass, _Pass, _Pass]:
    def moved(timeline: Timeline, begin: int, end: int, weights: int = whole_weights) -> tuple[float, float, int]:
        """Bytes of what is made there, which is written once and read about twice; and how many things are made."""
        slope, constant = (torch.diff(x.double())[begin:end].clamp(min=0) for x in (timeline.slope, timeline.constant))
        return 3 * float(slope.sum()), 3 * float(constant.sum()) + weights, int(((slope > 0) | (constant > 0)).sum())

    end, last = tower.with_graph.forward_end, tower.with_graph.end
    first = _Pass(tower.flops, *moved(tower.without_graph, 0, tower.without_graph.end))
    whole = _Pass(tower.flops, *moved(tower.with_graph, 0, end))
    read = head_weights if tower.features else whole_weights
    again = _Pass(tower.flops - tower.once_flops, *moved(tower.again, 0, tower.again.forward_end, read))
    back = (2 + share) * (tower.flops - tower.frozen_flops)
    return first, whole, again, _Pass(back, *moved(tower.with_graph, end, last))


def _seconds(
    messages: Messages, profile: DeviceProfile, rates: Rates, world_size: int, ranks_per_node: int | None
) -> float:
    total = 0.0
    for message in messages:
        inside, outside = by_link(message, world_size, ranks_per_node)
        total += max(inside / profile.link, outside / profile.node_link) + message.calls * rates.message
    return total


def by_link(message: Message, world_size: int, ranks_per_node: int | None) -> tuple[float, float]:
    """Bytes that pass a device's link inside of its node, and its share of the node's network cards, at once."""
    here = min(ranks_per_node or world_size, world_size)
    sent = message.wire_bytes
    if here == world_size:
        return sent, 0.0
    if message.collective == "all_to_all":  # each rank to each other, of which so many are elsewhere
        return sent * (here - 1) / (world_size - 1), sent * (world_size - here) / (world_size - 1)
    return sent, sent if message.collective == "send" else sent / here
