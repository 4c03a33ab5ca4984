"""What crosses the wire in a step: bytes that one rank sends, by what they are for, before the job exists.

    found = on_the_wire(config, world_size=8, num_samples=2_900_000)
    print(found.table())

W  ranks    P  parameters    e  bytes of one    n  micro-batches, k of them kept    L  parameters of large tensors

The objective's part (features, statistics, per-sample state) comes from running the objective (objective_trace.py) and
is exact. DeepSpeed's part (0.19), as payloads of collectives:

    stage 0       all_reduce of P gradients, 4 bytes each
    stage 1, 2    all_reduce of P gradients, 4 bytes each (a bucket goes to all ranks, each keeps its share), and
                  all_gather of P parameters, e bytes each
    stage 3       reduce_scatter of P gradients, 4 bytes each, all_gather of P - L parameters once, and
                  all_gather of L parameters 3 (n - k) + 2 k times: in each first forward, second forward and backward.
                  k = n = 1 and P below stage3_max_reuse_distance: once, they stay between forward and backward.
                  0 < k < n, 1 < k, or towers with micro-batches of their own: P parameters once more, since DeepSpeed
                  records the irregular order anew

e is 2 for bf16 and fp16. Large tensors have more than stage3_param_persistence_threshold elements (default 100,000);
recomputed activations fetch nothing more. Held against measurement in tests: stages 0 to 2, and 3 with k = 0 or n = 1,
within 1 %; the irregular orders of stage 3 within 35 %. Left out: norms, overflow flags, losses (some numbers each),
sums of layerwise optimizers (two per layer), BatchNorm's of norm=sync.

Offload, to and from the host, beside that: gradients down and parameters up per step, and at stage 3 with
offload=parameters a rank's share of every fetch.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from amclr_scale import objectives
from amclr_scale.config.schema import Config
from amclr_scale.encoders.dual_encoder import DualEncoder
from amclr_scale.engine.plan import make_plan
from amclr_scale.memory.messages import Message, Messages
from amclr_scale.memory.objective_trace import ObjectiveTrace, trace_objective
from amclr_scale.memory.towers import skeleton
from amclr_scale.memory.units import in_words
from amclr_scale.objectives.base import Layout
from amclr_scale.objectives.sample_state import REPLICATED_BYTES, SampleState
from amclr_scale.similarity.collectives import Group
from amclr_scale.similarity.distribution import choose

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
PERSISTENCE_THRESHOLD, MAX_REUSE_DISTANCE = 100_000, 1_000_000_000  # DeepSpeed's defaults, in elements


@dataclass(frozen=True)
class Sizes:
    """Numbers of elements of the model's parameters: all, and those of large tensors by tower."""

    all: int
    large_image: int
    large_text: int

    @property
    def large(self) -> int:
        return self.large_image + self.large_text

    @classmethod
    def of(cls, model: nn.Module, threshold: int = PERSISTENCE_THRESHOLD) -> "Sizes":
        """Of a model, also one without memory; `threshold` separates large tensors from small ones, in elements."""

        def large(part: str) -> int:
            named = model.named_parameters()
            return sum(p.numel() for name, p in named if name.startswith(part) and p.numel() > threshold)

        return cls(sum(p.numel() for p in model.parameters()), large("image_"), large("text_"))


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
    calls = tuple(-(-plan.local_batch_size // size) for size in plan.micro_batch_sizes)
    sizes = sizes_of(config)
    to_host, from_host = host_traffic(config, sizes, world_size, calls)
    messages = trace.messages(plan.local_batch_size)
    if world_size > 1:
        messages += zero_messages(config, sizes, world_size, calls)
    return Wire(messages.merged(), to_host, from_host)


def sizes_of(config: Config) -> Sizes:
    """The parameters of a configuration's model."""
    zero = config.deepspeed.get("zero_optimization", {})
    return _sizes(skeleton(config), zero.get("stage3_param_persistence_threshold", PERSISTENCE_THRESHOLD))


@lru_cache(maxsize=16)
def _sizes(model: DualEncoder, threshold: int) -> Sizes:
    return Sizes.of(model, threshold)


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
    )  # fmt: skip


def state_layout(config: Config, num_samples: int) -> Layout:
    """How the per-sample state of the largest table will lie: what `auto` comes to."""
    if config.execution.sample_state != "auto":
        return config.execution.sample_state
    options = {key: value for key, value in config.objective.items() if key not in ("name", "num_samples", "num_texts")}
    one = objectives.create(config.objective["name"], num_samples=1, sample_state="replicated", **options)
    tables = [module for module in one.modules() if isinstance(module, SampleState)]
    samples = max(num_samples, config.objective.get("num_texts") or 0)
    largest = max((samples * sum(buffer.nbytes for buffer in table.buffers()) for table in tables), default=0)
    return "sharded" if largest > REPLICATED_BYTES else "replicated"


def kept_of(config: Config) -> int:
    """Kept micro-batches, as a number: predictions come after it is settled."""
    kept = config.execution.kept_micro_batches
    assert kept != "auto", "kept_micro_batches is not settled yet"
    return kept


def _fetches(config: Config, sizes: Sizes, calls: tuple[int, ...]) -> list[int]:
    """Parameters that stage 3 gathers in a step: elements of each gathering."""
    kept = kept_of(config)
    reuse = config.deepspeed.get("zero_optimization", {}).get("stage3_max_reuse_distance", MAX_REUSE_DISTANCE)
    images, texts = calls
    same = images == texts
    n = images if same else images + texts
    k = min(kept, n)
    if n == 1 and k == 1 and sizes.all <= reuse:
        return [sizes.large, sizes.all - sizes.large]
    if same:
        gathered = [sizes.large] * (3 * (n - k) + 2 * k)
    else:  # images come first, texts last: those are the ones that are kept
        kept_texts, kept_images = min(k, texts), max(0, k - texts)
        gathered = [sizes.large_image] * (3 * (images - kept_images) + 2 * kept_images)
        gathered += [sizes.large_text] * (3 * (texts - kept_texts) + 2 * kept_texts)
    again = [sizes.all] if 0 < k < n or k > 1 or not same else []
    return [*gathered, *again, sizes.all - sizes.large]


def zero_messages(config: Config, sizes: Sizes, world_size: int, calls: tuple[int, ...]) -> Messages:
    """What DeepSpeed sends in a step, by the rules above.

    Args:
        calls: forward calls of the image and of the text tower per step and rank; equal numbers: together.
    """
    stage, e = config.execution.zero_stage, BYTES[config.execution.precision]

    def message(collective: str, elements: int, itemsize: int, purpose: str) -> Message:
        return Message(collective, world_size, elements * itemsize, purpose=purpose)

    if stage == 3:
        found = [message("reduce_scatter", sizes.all, 4, "gradients")]
        found += [message("all_gather", size, e, "parameters") for size in _fetches(config, sizes, calls) if size]
        return Messages(tuple(found)).merged()
    found = [message("all_reduce", sizes.all, 4, "gradients")]
    if stage > 0:
        found.append(message("all_gather", sizes.all, e, "parameters"))
    return Messages(tuple(found))


def host_traffic(config: Config, sizes: Sizes, world_size: int, calls: tuple[int, ...]) -> tuple[int, int]:
    """Bytes per step and rank from the device to the host and back, for offloaded states; inputs are not counted."""
    execution = config.execution
    if execution.offload == "none":
        return 0, 0
    e = BYTES[execution.precision]

    def share(elements: int) -> int:
        return -(-elements // world_size)

    up = share(sizes.all) * e
    if execution.offload == "parameters":
        up = sum(share(size) for size in _fetches(config, sizes, calls)) * e
    return share(sizes.all) * 4, up
