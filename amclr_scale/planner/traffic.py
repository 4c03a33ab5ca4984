"""What crosses the wire in a step: bytes that one rank sends, by what they are for, before the job exists.

    found = on_the_wire(config, world_size=8, num_samples=2_900_000)
    print(found.table())

W  ranks    P  trained parameters    e  bytes of one    n  micro-batches, k of them kept    L  those of large tensors

The objective's part (features, statistics, per-sample state) comes from running the objective (objective_trace.py) and
is exact. DeepSpeed's part (0.19), as payloads of collectives:

    stage 0       all_reduce of P gradients, 4 bytes each
    stage 1, 2    all_reduce of P gradients, 4 bytes each (a bucket goes to all ranks, each keeps its share), and
                  all_gather of P parameters, e bytes each
    stage 3       reduce_scatter of P gradients, 4 bytes each, and all_gather of parameters. Which and how often follows
                  from the order of modules over both passes, and DeepSpeed's decisions are followed one by one
                  (replay.py). In a regular order, k = 0, they come to P - L parameters once and L parameters 3 n times:
                  in each first forward, second forward and backward. k = n = 1 and P below
                  stage3_max_reuse_distance: each once, as they stay between forward and backward. Beside them one
                  number of every rank, 8 bytes, in place of the broadcasts with which DeepSpeed compares orders of
                  modules (engine/zero/module_order.py)

A moving average of the weights: at stages 1 and 2 an all_gather of P numbers, 4 bytes each. At stage 3 one that lends
features gathers parameters as another first pass does, and those below the threshold twice more.

e is 2 for bf16 and fp16. Large tensors, L, have more than stage3_param_persistence_threshold elements (default
100,000); recomputed activations fetch nothing more. Held against measurement in tests, within 0.5 %. Left out: norms,
overflow flags, losses (some numbers each), sums of layerwise optimizers (two per layer), BatchNorm's of norm=sync.

Offload, to and from the host, beside that: gradients down and parameters up per step, and at stage 3 with
offload=parameters a rank's share of every fetch.
"""

from collections import Counter
from dataclasses import dataclass

import torch

from amclr_scale import objectives
from amclr_scale.config.schema import Config
from amclr_scale.distributed.collectives import Group
from amclr_scale.engine.batch_plan import Plan, make_plan
from amclr_scale.memory.passes import gathers
from amclr_scale.memory.random_embeddings import layer_widths
from amclr_scale.memory.towers import input_sizes, skeleton
from amclr_scale.memory.units import in_words
from amclr_scale.objectives.base import Layout
from amclr_scale.objectives.layers import allocate
from amclr_scale.objectives.sample_state import REPLICATED_BYTES
from amclr_scale.objectives.table import tables_of
from amclr_scale.planner.messages import Message, Messages
from amclr_scale.planner.objective_traffic import ObjectiveTrace, trace_objective
from amclr_scale.precision import DTYPES
from amclr_scale.similarity.distribution import choose

Fetches = Counter[int]  # messages that gather parameters, by their elements


@dataclass(frozen=True)
class Wire:
    """What one rank sends in a step."""

    messages: Messages
    to_host: int  # bytes from the device to the host's memory
    from_host: int

    @property
    def wire_bytes(self) -> float:
        """To other ranks."""
        return self.messages.wire_bytes

    def table(self) -> str:
        """Text: one line per purpose and collective."""
        lines = [f"{'per rank and step':34}{'collective':16}{'calls':>7}{'payload':>12}{'sent':>12}"]
        for purpose, messages in self.messages.by_purpose().items():
            for collective, found in messages.by_collective().items():
                sent = in_words(round(found.wire_bytes))
                lines.append(
                    f"{purpose:34}{collective:16}{found.calls:>7}{in_words(found.payload_bytes):>12}{sent:>12}"
                )
        lines.append(f"{'all':34}{'':16}{self.messages.calls:>7}{'':12}{in_words(round(self.wire_bytes)):>12}")
        for name, size in (("device to host", self.to_host), ("host to device", self.from_host)):
            lines += [f"{name:69}{in_words(size):>12}"] if size else []
        return "\n".join(lines)


def on_the_wire(
    config: Config, *, world_size: int, num_samples: int, device_type: str = "cuda", ranks_per_node: int | None = None
) -> Wire:
    """Everything that one rank sends in a step.

    Args:
        num_samples: N, the size of the data set.
        device_type: cpu or cuda.
        ranks_per_node: None: all on one.

    Raises:
        RuntimeError: inside a process group, for an objective that was not traced before.
    """
    plan = make_plan(config, num_samples, world_size)
    trace = objective_trace(config, world_size, num_samples, device_type, ranks_per_node)
    fetched = fetches(config, plan, device_type)
    to_host, from_host = host_traffic(config, world_size, fetched)
    messages = trace.messages(plan.local_batch_size)
    if world_size > 1:
        messages += zero_messages(config, world_size, fetched)
    return Wire(messages.merged(), to_host, from_host)


def parameters_of(config: Config) -> int:
    """P: elements of all trained parameters of a configuration's model."""
    return sum(p.numel() for p in skeleton(config).parameters() if p.requires_grad)


def fetches(config: Config, plan: Plan, device_type: str) -> Fetches:
    """What stage 3 gathers in a step, from other ranks or the host; nothing at the other stages."""
    return gathers(config, plan, device_type) if config.execution.zero_stage == 3 else Fetches()


def objective_trace(
    config: Config, world_size: int, num_samples: int, device_type: str = "cuda", ranks_per_node: int | None = None
) -> ObjectiveTrace:
    """The objective's work, by the rules that `auto` settings follow in the job."""
    local_rows = config.train.global_batch_size // world_size
    similarity = config.execution.similarity
    return trace_objective(
        config.objective,
        world_size=world_size,
        width=config.model.embedding_width,
        local_rows=local_rows,
        distribution=choose(
            similarity.distribution, Group(0, world_size, 0), local_rows, torch.device(device_type),
            one_node=ranks_per_node is None or ranks_per_node >= world_size,
        ),
        gather=similarity.gather,
        layout=state_layout(config, num_samples),
        num_samples=num_samples,
        device_type=device_type,
        sizes=input_sizes(config),
    )  # fmt: skip


def state_layout(config: Config, num_samples: int) -> Layout:
    """How the per-sample state of the largest table will lie: what `auto` comes to."""
    if config.execution.sample_state != "auto":
        return config.execution.sample_state
    with torch.device("meta"):
        made = objectives.from_section(config.objective, "replicated", num_samples=num_samples)
        allocate(made, config.model.embedding_width, layer_widths(input_sizes(config)))
    tables = tables_of(made)
    largest = max((sum(x.nbytes for x in table.buffers() if x.is_floating_point()) for table in tables), default=0)
    return "sharded" if largest > REPLICATED_BYTES else "replicated"


def kept_of(config: Config) -> int:
    """Kept micro-batches, as a number: predictions come after it is settled."""
    kept = config.execution.kept_micro_batches
    assert kept != "auto", "kept_micro_batches is not settled yet"
    return kept


def zero_messages(config: Config, world_size: int, fetched: Fetches) -> Messages:
    """What DeepSpeed sends in a step, by the rules above."""
    execution, parameters = config.execution, parameters_of(config)
    stage, e = execution.zero_stage, DTYPES[execution.precision].itemsize

    def message(collective: str, elements: int, itemsize: int, purpose: str, calls: int = 1) -> Message:
        return Message(collective, world_size, elements * itemsize, calls, purpose)

    if stage == 3:
        found = [message("reduce_scatter", parameters, 4, "gradients")]
        found += [message("all_gather", size, e, "parameters", calls) for size, calls in fetched.items()]
        found.append(message("all_gather", world_size, 8, "orders of modules"))
        return Messages(tuple(found))
    found = [message("all_reduce", parameters, 4, "gradients")]
    if stage > 0:
        found.append(message("all_gather", parameters, e, "parameters"))
        if config.model.momentum is not None:
            found.append(message("all_gather", parameters, 4, "moving average"))
    return Messages(tuple(found))


def host_traffic(config: Config, world_size: int, fetched: Fetches) -> tuple[int, int]:
    """Bytes per step and rank from the device to the host and back, for offloaded states; inputs are not counted."""
    execution = config.execution
    if execution.offload == "none":
        return 0, 0
    e, parameters = DTYPES[execution.precision].itemsize, parameters_of(config)

    def share(elements: int) -> int:
        return -(-elements // world_size)

    up = share(parameters) * e
    if execution.offload == "parameters":
        up = sum(share(size) * calls for size, calls in fetched.items()) * e
    return share(parameters) * 4, up
