"""A bank: the last M rows of features that a run has made, first in, first out, as further negatives.

b  samples on this rank    B = b W  samples of the global batch    M  slots    D  width    W  ranks

A step reads what the bank holds and then puts the global batch into the slots pointer ... pointer + B - 1 modulo M, so
M need not be a multiple of B. Two layouts give the same answers. Replicated: every rank holds all slots. Sharded: rank
r holds the slots that are r modulo W. `state_dict` has all M slots in either layout, so a checkpoint fits any number of
ranks. Pointer, number of filled slots and number of steps are plain numbers that every rank counts alike; a checkpoint
has them as tensors. A row that is not finite leaves its slot as it was.

Age is in steps: what the last step put in has age 1. Before it has been filled, a bank holds, by `init`,

    empty                nothing: only filled slots are keys
    batch                the first batch, over and over
    randn, rand          unit rows of random direction; of random direction among those with positive entries
    zeros                zeros, each of which counts as a key with the similarity 0
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from amclr_scale.distributed import collectives
from amclr_scale.distributed.purpose import purpose
from amclr_scale.objectives.base import Layout, require
from amclr_scale.objectives.sample_state import REPLICATED_BYTES, STATE
from amclr_scale.objectives.staging import is_staged, when_applied
from amclr_scale.objectives.table import Saving, Table, saving

Init = Literal["empty", "batch", "randn", "rand", "zeros"]
Dtype = Literal["float32", "bfloat16", "float16"]
NOBODY = -1  # the id of what no sample has made
COUNTS = ("pointer", "filled", "steps")
TABLES = ("features", "ids", "written")
AT_ONCE = 4096  # random rows that are made at a time, whatever the layout


class Bank(Table):
    """M slots as buffers: features (M, D), ids (M,) int64, and the step (M,) int64 that has written each.

    Where the width is not given, they are made when the first features or a checkpoint come.
    """

    features: Tensor
    ids: Tensor
    written: Tensor

    def __init__(
        self,
        size: int,
        width: int | None = None,
        *,
        init: Init = "empty",
        dtype: Dtype = "float32",
        layout: Layout = "auto",
        seed: int = 0,
    ) -> None:
        """An unused bank.

        Args:
            size: M.
            width: D; None: that of the first features.
            init: what it holds before it has been filled.
            dtype: of the stored features; float32 becomes float64 when float64 features come.
            layout: see `objectives.create`.
            seed: of random initial rows.
        """
        super().__init__()
        self.size, self.width, self.init, self.layout, self.seed = size, width, init, layout, seed
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.shards = (1, 0)  # their number, and which of them this is
        self.pointer = self.steps = 0
        self.filled = 0 if init in ("empty", "batch") else size
        if width is not None:
            self.make(width)

    def make(self, width: int, device: torch.device | None = None) -> None:
        """Allocate the slots for features of this width, with what they hold at first."""
        self.width = width
        sharded = self.layout == "sharded"
        if self.layout == "auto":
            sharded = self.size * width * self.dtype.itemsize > REPLICATED_BYTES
        self.shards = (collectives.world_size(), collectives.rank()) if sharded else (1, 0)
        rows = len(self._mine(self.size))
        device = device or torch.empty(0).device  # what torch.device(...) as a context says
        self.register_buffer("features", torch.zeros(rows, width, dtype=self.dtype, device=device))
        self.register_buffer("ids", torch.full((rows,), NOBODY, device=device))
        self.register_buffer("written", torch.zeros(rows, dtype=torch.int64, device=device))
        if self.init in ("randn", "rand") and device.type != "meta":
            self._draw()

    @property
    def slots(self) -> int:
        return self.size

    def staged_bytes(self, width: int) -> int:
        return width * self.dtype.itemsize + 16 if self.size else 0  # features, id, slot

    def rehearse(self, width: int, slots: int) -> None:
        """Be a full bank of so many slots, for who asks what a step costs."""
        self.size, self.init = slots, "zeros"
        self.make(width)
        self.filled, self.steps = slots, 1

    def contents(self, features: Tensor, ids: Tensor) -> "Contents":
        """What the bank holds at this step. Every rank calls it, with equally many rows.

        Args:
            features: (b, D), which this step will put in; with init="batch", what the first step finds.
            ids: (b,) int64, their samples.

        Raises:
            UserError: (a ValueError) more rows than slots, or rows of another width.
        """
        B, width = len(features) * collectives.world_size(), features.shape[1]
        require(self.size >= B, "size", f"at least as many slots as the global batch has samples, {B}", self.size)
        require(self.width in (None, width), "width", f"{width}, the width of the embeddings", self.width)
        if self.width is None:
            self.make(width, features.device)
        if features.dtype == torch.float64 and self.dtype == torch.float32:
            self.features = self.features.double()
        num_shards, shard = self.shards
        if num_shards > 1 and self.shards != (collectives.world_size(), collectives.rank()):
            raise RuntimeError(
                f"bank: made as shard {shard} of {num_shards}, used on rank {collectives.rank()} of "
                f"{collectives.world_size()}; create the objective after the process group"
            )
        step = self.steps + 1
        if self.init == "batch" and self.steps == 0:
            every, of = self._gather(features, ids)
            slots = torch.tensor(self._mine(self.size), device=of.device) % len(of)
            return Contents(every[slots], of[slots], torch.zeros_like(slots), step, 0, self.size, self.shards)
        rows = len(self._mine(self.filled))
        first = self.pointer if self.filled == self.size else 0
        return Contents(
            self.features[:rows], self.ids[:rows], self.written[:rows], step, first, self.filled, self.shards
        )  # fmt: skip

    @torch.no_grad()
    def put(self, features: Tensor, ids: Tensor) -> None:
        """Put this step's rows (b, D) and ids (b,) in; inside of `staged`, when the step is committed."""
        every, of = self._gather(features, ids)
        slots = (self.pointer + torch.arange(len(of))) % self.size  # here and below on the host: nobody waits
        if self.init == "batch" and self.steps == 0:
            slots = torch.arange(self.size)
        here = (slots % self.shards[0] == self.shards[1]).nonzero()[:, 0]
        rows, mine = slots[here].to(self.ids.device) // self.shards[0], here.to(of.device) % len(of)
        every, of, batch, in_place = every[mine].to(self.features), of[mine].to(self.ids), len(of), is_staged()
        full = min(self.size, self.filled + len(slots))

        def write() -> None:
            self.steps += 1
            self.pointer, self.filled = (self.pointer + batch) % self.size, full
            finite = every.isfinite().all(1)
            for name, new in (("features", every), ("ids", of), ("written", torch.full_like(of, self.steps))):
                table: Tensor = getattr(self, name)
                if not in_place:  # in a plain loop the backward that needs the old rows is still to come
                    table = table.clone()
                    setattr(self, name, table)
                table[rows] = torch.where(finite[:, None] if new.ndim > 1 else finite, new, table[rows])

        when_applied(write)

    @purpose(STATE)
    def _gather(self, features: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return collectives.all_gather(features.to(self.features.dtype)), collectives.all_gather(ids)

    def _mine(self, slots: int) -> range:
        """Of so many first slots, those of this rank."""
        return range(self.shards[1], slots, self.shards[0])

    def _draw(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        draw, (num_shards, shard) = (torch.randn if self.init == "randn" else torch.rand), self.shards
        for start in range(0, self.size, AT_ONCE):
            rows = draw(min(AT_ONCE, self.size - start), self.features.shape[1], generator=generator)
            mine = F.normalize(rows, dim=1)[(shard - start) % num_shards :: num_shards]
            first = len(self._mine(start))
            self.features[first : first + len(mine)] = mine.to(self.features)

    @purpose(STATE)
    def table(self, name: str) -> Tensor:
        """All M slots' features, ids or writing steps, on the CPU. Where sharded, every rank must call it."""
        local: Tensor = getattr(self, name)
        num_shards, _ = self.shards
        if num_shards == 1:
            return local.detach() if local.is_meta else local.detach().cpu()  # which has shapes only
        rows = -(-self.size // num_shards)
        padded = local.new_zeros(rows, *local.shape[1:])
        padded[: len(local)] = local
        by_shard = collectives.all_gather(padded).cpu().view(num_shards, rows, *local.shape[1:])
        return by_shard.transpose(0, 1).flatten(0, 1)[: self.size].clone()  # row k of shard r is slot k W + r

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name in COUNTS:
            destination[prefix + name] = torch.tensor(getattr(self, name))
        cut = self.shards[0] > 1
        if self.width is not None and not (cut and saving() is Saving.APART):
            for name in TABLES:
                table = self.table(name)
                if not cut or saving() is Saving.EVERYWHERE or self.shards[1] == 0:
                    destination[prefix + name] = table

    def shares(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in TABLES} if self.shards[0] > 1 and self.width is not None else {}

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *rest: Any) -> None:
        _, strict, missing_keys, unexpected_keys, error_msgs = rest
        saved = {key.removeprefix(prefix): x for key, x in state_dict.items() if key.startswith(prefix)}
        known = COUNTS + TABLES if "features" in saved or self.width is not None else COUNTS
        missing_keys.extend(prefix + name for name in known if name not in saved)
        if strict:
            unexpected_keys.extend(prefix + name for name in saved if name not in known)
        if any(name not in saved for name in known):
            return
        if known != COUNTS:
            shape = saved["features"].shape
            if self.width is None and len(shape) == 2:
                self.make(shape[1])
            for name in TABLES:
                expected = (self.size, self.width) if name == "features" else (self.size,)
                if saved[name].shape != expected:
                    error_msgs.append(
                        f"{prefix}{name}: expected {expected} (slots, width), got {tuple(saved[name].shape)}; the "
                        "state was saved with other options"
                    )
                    return
            num_shards, shard = self.shards
            for name in TABLES:
                ours, mine = getattr(self, name), saved[name][shard::num_shards]
                wide = torch.promote_types(ours.dtype, mine.dtype) if ours.dtype == torch.float32 else ours.dtype
                setattr(self, name, mine.to(device=ours.device, dtype=wide, copy=True))
        for name, most in (("pointer", max(0, self.size - 1)), ("filled", self.size), ("steps", 2**62)):
            if not 0 <= (count := int(saved[name])) <= most:
                error_msgs.append(f"{prefix}{name}: expected 0 to {most}, got {count}; the state is damaged")
                return
            setattr(self, name, count)


@dataclass(frozen=True)
class Contents:
    """What a bank holds at one step, as far as this rank has it."""

    features: Tensor  # (m, D)
    ids: Tensor  # (m,) int64, NOBODY where no sample has made the row
    written: Tensor  # (m,) int64, the number of the step whose batch it was
    step: int  # the number of this step, from 1
    first: int  # the oldest slot
    filled: int  # rows of all ranks
    shards: tuple[int, int]

    @property
    def sharded(self) -> bool:
        """Whether other ranks have the other rows."""
        return self.shards[0] > 1

    @purpose(STATE)
    def age(self) -> Tensor:
        """Mean age of the rows of all ranks, (), in steps; 0 where there are none. Every rank calls it."""
        total = (self.step - self.written).sum().double()
        return (collectives.all_sum(total) if self.sharded else total) / max(1, self.filled)

    @torch.no_grad()
    @purpose(STATE)
    def own(self, ids: Tensor) -> "Own":
        """What each sample of this rank, ids (b,), has put in before. Every rank calls it, with equally many ids."""
        num_shards, shard = self.shards
        if not self.filled:
            return Own(torch.zeros_like(ids), self.features.new_zeros(len(ids), self.width))
        every = collectives.all_gather(ids) if self.sharded else ids
        if len(self.ids):
            oldest = len(range(shard, self.first, num_shards))  # of the rows here
            ordered, order = self.ids.roll(-oldest).sort(stable=True)
            last = torch.searchsorted(ordered, every, right=True)  # the newest of an id is the last of it
            count = last - torch.searchsorted(ordered, every)
            row = (order[(last - 1).clamp(min=0)] + oldest) % len(self.ids)
        else:
            count = row = torch.zeros_like(every)
        if not self.sharded:
            return Own(count, self.features[row])
        turn = torch.where(count > 0, (row * num_shards + shard - self.first) % self.filled, -1)
        counts, turns = collectives.all_gather(torch.stack([count, turn])[None]).unbind(1)  # (W, B) each
        mine = (turns.argmax(0) == shard) & (turns.amax(0) >= 0)
        found = self.features[row] if len(self.ids) else self.features.new_zeros(len(every), self.width)
        rows = collectives.reduce_scatter(found * mine[:, None])
        here = slice(collectives.rank() * len(ids), (collectives.rank() + 1) * len(ids))
        return Own(counts.sum(0)[here], rows)

    @property
    def width(self) -> int:
        """D."""
        return self.features.shape[1]


@dataclass(frozen=True)
class Own:
    """What the samples of a rank have put into a bank before."""

    count: Tensor  # (b,) int64, rows in the bank
    rows: Tensor  # (b, D), the newest of them; anything where there is none

    @property
    def there(self) -> Tensor:
        """(b,) bool."""
        return self.count > 0
