"""One optimizer step: gradients by the cache, checked, clipped, applied; the learned scale kept in its bounds."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amclr_scale.distributed.collectives import world_size
from amclr_scale.distributed.process_group import gather_objects
from amclr_scale.encoders.dual_encoder import LOG_SCALE_BOUNDS
from amclr_scale.encoders.norms import has_batch_norm, keep_statistics
from amclr_scale.engine.gradient_cache import CachedStep, cached_backward
from amclr_scale.engine.optimizers import set_learning_rate
from amclr_scale.engine.teacher import Teacher
from amclr_scale.engine.zero.gradient_sums import GradientSums
from amclr_scale.engine.zero.master_weights import clamp_
from amclr_scale.metrics.phases import Phases
from amclr_scale.objectives.base import Objective
from amclr_scale.objectives.staging import staged
from amclr_scale.precision import products_of
from amclr_scale.types import Batch, Embeddings, Loss


class NonFiniteError(RuntimeError):
    """A loss or gradient that is not a number. The message names step, rank and sample ids; no weight was updated."""


class OutOfMemoryError(RuntimeError):
    """A step did not fit. The message names the key that shrinks what was being computed."""


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error means that: only torch's CUDA allocator has a class of its own for it."""
    words = str(error).lower()  # of the CPU's allocator; of the driver, for pinned memory, and NCCL; of cuBLAS, cuDNN
    says_so = any(mark in words for mark in ("can't allocate memory", "out of memory", "alloc_failed"))
    return isinstance(error, torch.OutOfMemoryError) or says_so


@dataclass(frozen=True)
class StepReport:
    """What one step left behind, as it is on the device."""

    loss: Loss
    embeddings: Embeddings  # what the objective saw, with gradients
    grad_norm: float  # L2, of the whole gradient, before clipping
    scale: Tensor  # 1 / temperature, as it was in this step

    @property
    def logit_scale(self) -> float:
        """1 / temperature as a number; the first look waits for the device."""
        return float(self.scale)


class TrainStep:
    """`step(batch, lr)` trains on one batch, of which this rank holds its share.

    Args:
        engine: from `build_engine`.
        objective: embeddings of this rank -> this rank's mean.
        micro_batch_sizes: images and texts encoded at once.
        kept: micro-batches whose graphs are kept between the two passes.
        teacher: a moving average that follows every step, and lends what the objective asks for.
        trim_texts: encode captions of like length together, and no further than the longest of their micro-batch
            (execution.trim_texts).
        advice: what to turn down, given the phase in which memory ran out. Asked only then; may take seconds.
    """

    def __init__(
        self,
        engine: Any,
        objective: Objective,
        *,
        micro_batch_sizes: tuple[int, int],
        device: torch.device,
        phases: Phases,
        kept: int = 1,
        teacher: Teacher | None = None,
        trim_texts: bool = False,
        advice: Callable[[str], str] | None = None,
    ):
        self.engine, self.objective, self.device, self.phases = engine, objective, device, phases
        self.advice, self.teacher = advice, teacher
        self.micro_batch_sizes, self.kept = micro_batch_sizes, kept
        self.lengths = engine.module.caption_lengths if trim_texts else None
        self.by_length = not has_batch_norm(engine.module)  # its statistics are those of who is in a micro-batch
        computes_in = getattr(engine.module, "computes_in", "fp32")
        self._backward_in = "tf32" if computes_in == "tf32" else "fp32"  # what else it is, the graph says
        self.stage = int(engine.zero_optimization_stage())
        self.sums = GradientSums(engine.module.parameters())
        self._orders = getattr(engine, "module_orders", None) or nullcontext()  # of modules, which ranks compare
        self.steps = 0

    def _encode(self, images: tuple[Tensor, ...], texts: tuple[Tensor, ...]) -> dict[str, Any]:
        outputs: dict[str, Any] = self.engine(images, texts)
        return outputs

    def _backward(self, surrogate: Tensor) -> None:
        if self.stage == 0:  # no coalesce_grad_reduction there: short of the boundary, ranks exchange nothing
            self.engine.set_gradient_accumulation_boundary(False)
        with products_of(self._backward_in, self.device):
            self.engine.backward(surrogate, scale_wrt_gas=False)
        self.sums.flush()

    @contextmanager
    def _one_reduction(self, local_batch: int) -> Iterator[None]:
        """Around all backward passes of a step: what they leave is summed, and at the end exchanged once."""
        several = min(self.micro_batch_sizes) < local_batch
        exchange = self.engine.coalesce_grad_reduction() if self.stage > 0 else nullcontext()
        with exchange, self.sums if several else nullcontext():
            yield
        if self.stage == 0:
            self.engine.set_gradient_accumulation_boundary(True)
            if world_size() > 1:
                self.engine.allreduce_gradients()
            else:  # a message to itself would wait for gloo's thread, or copy all gradients
                self._complete_gradients()

    def __call__(self, batch: Batch, lr: float) -> StepReport:
        """Train on one batch.

        Raises:
            NonFiniteError: before any weight is touched.
            OutOfMemoryError: says which key to turn down, and to what.
        """
        set_learning_rate(self.engine.optimizer.param_groups, lr)
        try:
            return self._step(batch)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not _is_out_of_memory(error):
                raise
            raise OutOfMemoryError(self._advice(len(batch), error)) from error

    def _step(self, batch: Batch) -> StepReport:
        with self._orders, staged() as commit:
            report = self._backward_and_update(batch, commit)
        return report

    def _backward_and_update(self, batch: Batch, commit: Callable[[], None]) -> StepReport:
        teacher = self.teacher
        lends = teacher is not None and bool(teacher.lends)
        done = cached_backward(
            self._encode,
            self.objective,
            batch,
            micro_batch_sizes=self.micro_batch_sizes,
            device=self.device,
            kept=self.kept,
            backward=self._backward,
            one_reduction=self._one_reduction(len(batch)),
            again=lambda: keep_statistics(self.engine.module),
            phases=self.phases,
            lengths=self.lengths,
            by_length=self.by_length,
            lend=(lambda: teacher.lend(batch, self.micro_batch_sizes)) if teacher and lends else None,
            lend_first=teacher is None or teacher.first,
        )
        with self.phases("optimizer"):
            grad_norm = self._grad_norm()
            if self.stage == 0 and not math.isfinite(grad_norm):  # DeepSpeed checks at the other stages
                self._fail(done, batch)
            self.engine.set_gradient_accumulation_boundary(True)
            may_skip = self.stage > 0 and self._may_skip()  # at the scale that this step has: DeepSpeed lowers it
            self.engine.step()
            if self.stage > 0:
                grad_norm = float(self.engine.get_global_grad_norm())
                overflowed = not math.isfinite(grad_norm) or not self.engine.was_step_applied()
                if overflowed and not may_skip:
                    self._fail(done, batch)
            if self.stage == 0 or self.engine.was_step_applied():
                commit()  # the objective's state: a skipped step leaves no trace in it
            if self.engine.module.logit_scale.requires_grad:
                clamp_(self.engine.module.logit_scale, *LOG_SCALE_BOUNDS)
            if teacher and (self.stage == 0 or self.engine.was_step_applied()):
                teacher.follow(self.steps + 1)
        self.steps += 1
        return StepReport(done.loss, done.embeddings, grad_norm, done.leaves["logit_scale"].detach())

    def _advice(self, local_batch: int, error: BaseException) -> str:
        largest = max(self.micro_batch_sizes)
        encoding = (
            f"execution.micro_batch_size: {max(1, largest // 2)} instead of {largest} halves the activations (the "
            "gradient cache keeps the result the same); execution.recompute_image=full and "
            "execution.recompute_text=full shrink them further"
        )
        advice = {
            "objective": "execution.similarity.chunk: a smaller one (512, say) shrinks the similarity blocks; "
            "execution.similarity.gather=ring keeps one rank's features at a time; execution.similarity.cache_mib=0",
            "optimizer": "execution.zero_stage: each higher stage divides more of the model's state by the number of "
            "ranks; execution.offload=optimizer moves it to the host",
        }.get(self.phases.current, encoding)
        if self.kept > 1:
            advice += f"; execution.kept_micro_batches={self.kept - 1} keeps fewer graphs"
        place = f"step {self.steps}, phase {self.phases.current}, {local_batch} samples on this rank"
        told = f"out of memory ({place}): {str(error).splitlines()[0]}\n{advice}"
        return told if self.advice is None else f"{told}\n{self.advice(self.phases.current)}"

    def _may_skip(self) -> bool:
        """fp16: a scaled loss that overflows is skipped and scaled down, until the scale has nothing left to give.

        A scale that is fixed (deepspeed.fp16.loss_scale) has nothing to give: every further step might be skipped.
        """
        if not self.engine.fp16_enabled():
            return False
        scaler = self.engine.optimizer.loss_scaler
        scaler.raise_error_at_min_scale = False  # what then fails is told with its samples, by `_fail`
        return bool(scaler.dynamic) and float(scaler.cur_scale) > scaler.min_scale

    def _complete_gradients(self) -> None:
        """What nothing depended on has a gradient of 0, as on several ranks: its moments and decay go on."""
        for p in self.engine.module.parameters():
            if p.requires_grad and p.grad is None:
                p.grad = torch.zeros_like(p)

    def _grad_norm(self) -> float:
        """L2 norm of the whole gradient before clipping; at stages 1 to 3 DeepSpeed tells it after the step."""
        if self.stage > 0:
            return math.nan
        gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def _fail(self, done: CachedStep, batch: Batch) -> None:
        """Say where it came from: the samples whose features or feature gradients are not finite, on every rank."""
        bad = torch.zeros(len(batch), dtype=torch.bool)
        for leaf in done.leaves.values():
            for tensor in (leaf.detach(), leaf.grad):
                if tensor is not None and len(tensor) == len(batch):
                    bad |= ~tensor.flatten(1).isfinite().all(1).cpu() if tensor.dim() > 1 else ~tensor.isfinite().cpu()
        mine = (float(done.loss.value.detach()), batch.ids.cpu()[bad].tolist())
        lines = [
            f"  rank {rank}: loss {loss}; "
            + (
                f"ids with non-finite features or gradients: {ids[:8]}{' ...' if len(ids) > 8 else ''}"
                if ids
                else "its features are finite"
            )
            for rank, (loss, ids) in enumerate(gather_objects(mine))
        ]
        raise NonFiniteError(
            f"step {self.steps}: the gradient is not finite; no weight was updated. A lower optimizer.lr, a longer "
            "optimizer.warmup_samples or optimizer.max_grad_norm usually mend it.\n" + "\n".join(lines)
        )
