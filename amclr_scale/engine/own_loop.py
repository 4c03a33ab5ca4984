"""The gradient cache for training loops of one's own: plain PyTorch, DistributedDataParallel, FSDP2, accelerate.

    cache = GradientCache(model, micro_batch_size=64)
    value = cache(loss, images, texts)       # loss(model's outputs for the whole batch) -> a number
    optimizer.step()

It is the engine's own cache (gradient_cache.py), with any encoder, any inputs and any loss of its outputs.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from amclr_scale.encoders.norms import keep_statistics
from amclr_scale.engine.gradient_cache import cached_backward
from amclr_scale.errors import UserError
from amclr_scale.types import Batch, Loss


@dataclass(frozen=True)
class _Rows(Batch):
    """A batch of which the objective is given nothing but what the encoder makes."""

    def beside(self) -> dict[str, Tensor]:
        return {}


class GradientCache:
    """`cache(loss, *inputs)` leaves the gradient of `loss` over the whole batch in `.grad`, and returns the loss.

    The encoder runs twice on each micro-batch, once without a graph and once with, from the same random state: the
    gradient is that of one pass, dropout included, in the memory of one micro-batch. Gradients add to what is in
    `.grad` already, as those of `backward` do. Across ranks they are averaged once, with the last micro-batch, by
    DistributedDataParallel or FSDP2, as for any loop that averages the losses of its ranks; `loss` may gather from
    other ranks, as `amclr_scale.similarity.contrast` does.

    Args:
        encode: a module or a function of the inputs of one micro-batch, m rows of each. What it returns, a tensor, a
            tuple or a dictionary of tensors, has m rows in each. It may call several towers, or one of them twice.
        micro_batch_size: m, rows encoded at once; the last micro-batch may have fewer.
        models: modules that `encode` calls, where it is a function: their BatchNorm statistics are taken once, and
            DistributedDataParallel or FSDP2 among them exchange gradients once.
        shared: names in a dictionary of outputs that are one for all rows, such as a learned scale. (What the loss
            itself owns needs no name, unless a wrapper has to average its gradient, or `backward` scales gradients as
            fp16 needs it; then return it with the outputs.)
        backward: instead of `tensor.backward()`: `accelerator.backward`, or Lightning's `self.manual_backward`.
        kept: micro-batches whose graphs are kept from the first run and not run again. None: 1, or, where a wrapper
            exchanges gradients, 0.

    Raises:
        UserError: inputs without rows, or of different numbers of rows; outputs that have other rows than the inputs;
            towers on several GPUs of one process.

    Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021, arXiv:2101.06983.
    """

    def __init__(
        self,
        encode: Callable[..., Any],
        micro_batch_size: int,
        *,
        models: Iterable[nn.Module] = (),
        shared: Iterable[str] = (),
        backward: Callable[[Tensor], Any] = torch.Tensor.backward,
        kept: int | None = None,
    ):
        if micro_batch_size < 1:
            raise UserError(f"micro_batch_size: expected at least 1, got {micro_batch_size}")
        self.encode, self.micro_batch_size, self.backward = encode, micro_batch_size, backward
        self.models = [*([encode] if isinstance(encode, nn.Module) else []), *models]
        places = sorted({str(p.device) for model in self.models for p in model.parameters() if p.device.type == "cuda"})
        if len(places) > 1:  # the state of one device's generator is kept
            raise UserError(
                f"models: expected parameters on one GPU, got {' and '.join(places)}: what the second run draws on the "
                "others would differ; put the towers on one, or shard them with FSDP2"
            )
        self.shared = frozenset(shared)
        self._wrappers = [part for model in self.models for part in model.modules() if _exchange(part)]
        if kept and self._wrappers:
            raise UserError(
                "kept: expected 0 or None with DistributedDataParallel or FSDP2, which meet in the last forward, got "
                f"{kept}"
            )
        self.kept = (0 if self._wrappers else 1) if kept is None else kept

    def __call__(self, loss: Callable[[Any], Tensor], *inputs: Any) -> Tensor:
        """Encode, differentiate, push back. Returns the loss, without a graph.

        Args:
            loss: what `encode` returns, with the rows of the whole batch -> a number.
            inputs: tensors, or dictionaries and tuples of tensors, such as a tokenizer's answer, b rows in each.
        """
        views, form = tree_flatten(tuple(dict(one) if isinstance(one, Mapping) else one for one in inputs))
        rows = _rows(views)
        num = -(-rows // self.micro_batch_size)
        kept = 1 if num == 1 else self.kept
        run = _Run(self, form, last=2 * num - min(kept, num) - 1)
        device = next((p.device for model in self.models for p in model.parameters()), views[0].device)

        def objective(outputs: Any) -> Loss:
            return Loss(loss(outputs), {})

        with self._once():
            done = cached_backward(
                run.encode,
                objective,
                _Rows(torch.arange(rows), tuple(views), ()),
                micro_batch_sizes=(self.micro_batch_size, self.micro_batch_size),
                device=device,
                kept=kept,
                backward=self.backward,
                again=self._again,
                see=run.restored,
            )
        return done.loss.value.detach()

    @contextmanager
    def _again(self) -> Iterator[None]:
        """Around a second forward: statistics of BatchNorm are those of the first."""
        with ExitStack() as entered:
            for model in self.models:
                entered.enter_context(keep_statistics(model))
            yield

    @contextmanager
    def _once(self) -> Iterator[None]:
        """Wrappers exchange gradients at the last backward alone, and afterwards always again."""
        try:
            yield
        finally:
            self.exchange(True)

    def exchange(self, now: bool) -> None:
        """Have the wrappers exchange what the next backward leaves, or keep it to their own rank."""
        for wrapper in self._wrappers:
            _EXCHANGES[_exchange(wrapper)](wrapper, now)


_EXCHANGES: dict[str, Callable[[Any, bool], None]] = {
    "require_backward_grad_sync": lambda wrapper, now: setattr(wrapper, "require_backward_grad_sync", now),  # DDP
    "set_requires_gradient_sync": lambda wrapper, now: wrapper.set_requires_gradient_sync(now, recurse=False),  # FSDP2
}


def _exchange(part: nn.Module) -> str:
    """By which attribute a module is told when to exchange gradients; "" for one that exchanges none."""
    return next((name for name in _EXCHANGES if hasattr(part, name)), "")


class _Run:
    """One batch: calls of the encoder are counted, and its outputs have names that the cache knows."""

    def __init__(self, cache: GradientCache, form: TreeSpec, last: int):
        self.cache, self.form, self.last, self.calls = cache, form, last, 0
        self.outputs: TreeSpec | None = None
        self.names: list[str] = []

    def encode(self, views: tuple[Tensor, ...], _: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """One micro-batch, by the names of `name`."""
        self.cache.exchange(self.calls == self.last)
        self.calls += 1
        found = self.cache.encode(*tree_unflatten(list(views), self.form))
        found = dict(found) if isinstance(found, Mapping) else found
        tensors, self.outputs = tree_flatten(found)
        keys = list(found) if isinstance(found, Mapping) and len(found) == len(tensors) else [""] * len(tensors)
        self.names = [f"{'shared' if key in self.cache.shared else 'rows'}.{i}" for i, key in enumerate(keys)]
        for name, key, one in zip(self.names, keys, tensors, strict=True):
            if not isinstance(one, Tensor) or (name.startswith("rows") and one.shape[:1] != views[0].shape[:1]):
                got = f"shape {tuple(one.shape)}" if isinstance(one, Tensor) else type(one).__name__
                raise UserError(
                    f"encode: expected tensors with {len(views[0])} rows, as its inputs have, got {got}"
                    f"{f' at {key!r}; name it in shared, if it is one for all rows' if key else ''}"
                )
        return dict(zip(self.names, tensors, strict=True))

    def restored(self, flat: Mapping[str, Tensor]) -> Any:
        """What the encoder would have returned for the whole batch."""
        assert self.outputs is not None
        return tree_unflatten([flat[name] for name in self.names], self.outputs)


def _rows(views: list[Any]) -> int:
    strange = [type(one).__name__ for one in views if not isinstance(one, Tensor) or not one.dim()]
    if strange or not views:
        raise UserError(f"inputs: expected tensors with a row for each sample, got {(*strange, 'none')[0]}")
    rows = {len(one) for one in views}
    if len(rows) > 1 or not rows - {0}:
        raise UserError(f"inputs: expected as many rows in each, at least 1, got {', '.join(map(str, sorted(rows)))}")
    return rows.pop()
