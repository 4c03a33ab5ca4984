"""What an objective sends and computes, found by running it once on a few rows in a group of ranks that pretend.

    trace = trace_objective({"name": "sogclr"}, world_size=64, ...)
    trace.messages(local_rows=512)      # exact: every message is affine in the rows of a rank
    trace.flops(local_rows=512)         # matrix products are quadratic in them

torch.distributed's `fake` process group has any number of ranks, of which this process is one, and sends nothing: every
other rank answers with this one's data. The objective runs in it unchanged, so nothing here repeats what objectives
or the similarity engine do, and a new objective needs no line in this file. Runs on 8, 16 and 24 rows give the rest.
"""

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor

from amclr_scale import objectives
from amclr_scale.config.objective_options import declared
from amclr_scale.distributed import collectives
from amclr_scale.distributed.purpose import current_purpose
from amclr_scale.memory.objective_memory import create
from amclr_scale.memory.random_embeddings import FEW_TOKENS, Sizes, layer_widths, random_embeddings
from amclr_scale.objectives.base import Layout
from amclr_scale.objectives.layers import rehearse
from amclr_scale.objectives.staging import forgotten
from amclr_scale.objectives.table import tables_of
from amclr_scale.planner.messages import Message, MessageCounter, Messages
from amclr_scale.similarity import settings
from amclr_scale.similarity.settings import Distribution, Gather

ROWS = (8, 16, 24)  # of a rank in the three runs


@dataclass(frozen=True)
class Work:
    """What one run did."""

    messages: tuple[Message, ...]
    flops: int  # of matrix products
    products: int  # elements that those of the forward pass have as their result
    bytes: int  # that element-wise operations read and write


@dataclass(frozen=True)
class ObjectiveTrace:
    """One objective on so many ranks, for any number of rows."""

    runs: tuple[Work, ...]  # with the numbers of rows in ROWS
    stored: int = 0  # rows of the data set that each anchor is compared with

    def messages(self, local_rows: int) -> Messages:
        """What one rank sends in a step, forward and backward."""
        found = []
        for calls in zip(*(run.messages for run in self.runs), strict=True):
            first, second, third = (call.payload for call in calls)
            assert third - second == second - first, "a message is not affine in the rows"
            slope = (second - first) // (ROWS[1] - ROWS[0])
            found.append(replace(calls[0], payload=first + slope * (local_rows - ROWS[0])))
        return Messages(tuple(found))

    def flops(self, local_rows: int) -> float:
        """Operations of matrix products, forward and backward, on one rank."""
        return _quadratic([run.flops for run in self.runs], local_rows)

    @property
    def products(self) -> int:
        """Products of all rows with all rows in the forward pass, and of all with the stored ones.

        Results of the first are quadratic in the rows; where rows are stored, what is linear in them is the second.
        """
        first, second, third = (run.products for run in self.runs)
        quadratic = (third - 2 * second + first) // (2 * (ROWS[1] - ROWS[0]) ** 2)
        linear = (second - first) // (ROWS[1] - ROWS[0]) - quadratic * (ROWS[0] + ROWS[1])
        return quadratic + (round(linear / self.stored) if self.stored else 0)

    def bytes(self, local_rows: int) -> float:
        """Bytes that element-wise operations read and write on one rank; tiles that stay in a cache are counted too."""
        return _quadratic([run.bytes for run in self.runs], local_rows)


def _quadratic(values: list[int], rows: int) -> float:
    """The parabola through the three runs, by Lagrange."""
    total = 0.0
    for i, (x, y) in enumerate(zip(ROWS, values, strict=True)):
        others = [other for j, other in enumerate(ROWS) if j != i]
        total += y * math.prod((rows - other) / (x - other) for other in others)
    return total


def trace_objective(
    objective: dict[str, Any], *, world_size: int, width: int, local_rows: int,
    distribution: Distribution, gather: Gather, layout: Layout, num_samples: int, device_type: str = "cpu",
    sizes: Mapping[str, int] | None = None,
) -> ObjectiveTrace:  # fmt: skip
    """Run an objective on random rows. Cached; only outside of a real process group.

    Args:
        objective: name and options, as in a configuration.
        width: D.
        local_rows: of a rank in the job, to which groups of pairs are scaled.
        distribution, layout: what the job will use, not auto.
        num_samples: N, which matters where all stored rows are read.
        sizes: by kind of input: R of references, where it is not D; n of tokens; F of layers by flat name.
        device_type: cpu or cuda, which differ in the collectives that they use.

    Raises:
        RuntimeError: a process group exists already and this combination has not been traced before.
    """
    key = json.dumps(objectives.without_sizes(objective), sort_keys=True)
    works = []
    said = declared(objective)
    for rows in ROWS:
        group = said.group_size
        if group is not None:  # whole ranks stay whole ranks; groups inside a rank send nothing, whatever their size
            group = group // local_rows * rows or rows
        given = tuple(sorted((sizes or {}).items()))
        ask = (world_size, width, rows, distribution, gather, layout, group, device_type, given)
        if said.stored_rows == "all":
            tables = (ROWS[-1] * world_size, 2 * ROWS[-1] * world_size)
            works.append(_at(num_samples, tables, *(_run(key, table, *ask) for table in tables)))
        else:
            works.append(_run(key, rows * world_size, *ask))
    return ObjectiveTrace(tuple(works), num_samples if said.stored_rows == "all" else said.stored_rows)


def _at(table: int, tables: tuple[int, int], few: Work, more: Work) -> Work:
    """The work with so many stored rows, or tokens, from that with two other numbers: all of it is linear in them."""

    def line(x: int, y: int) -> int:
        return round(x + (y - x) * (table - tables[0]) / (tables[1] - tables[0]))

    pairs = zip(few.messages, more.messages, strict=True)
    messages = tuple(replace(one, payload=line(one.payload, other.payload)) for one, other in pairs)
    counts = (line(getattr(few, name), getattr(more, name)) for name in ("flops", "products", "bytes"))
    return Work(messages, *counts)


@lru_cache(maxsize=256)
def _run(
    key: str, num_samples: int, world_size: int, width: int, rows: int,
    distribution: Distribution, gather: Gather, layout: Layout, group_size: int | None, device_type: str,
    sizes: Sizes,
) -> Work:  # fmt: skip
    import torch.testing._internal.distributed.fake_pg  # registers the backend called "fake"

    for name, n in sizes:
        if name.endswith("_tokens") and n > FEW_TOKENS[1]:
            of_few = (tuple({**dict(sizes), name: few}.items()) for few in FEW_TOKENS)
            ask = (world_size, width, rows, distribution, gather, layout, group_size, device_type)
            return _at(n, FEW_TOKENS, *(_run(key, num_samples, *ask, one) for one in of_few))
    if dist.is_initialized():
        raise RuntimeError("trace_objective: ask before the process group starts; it pretends to be one")
    random_state, hook, threads = torch.get_rng_state(), sys.excepthook, torch.get_num_threads()
    dist.init_process_group("fake", rank=0, world_size=world_size, store=torch._C._distributed_c10d.HashStore())
    try:
        torch.set_num_threads(1)  # what runs here is small
        made = create(key, num_samples, layout, group_size)
        slots = max((table.slots for table in tables_of(made)), default=0)
        rehearse(made, width, max(slots, ROWS[-1] * world_size), layer_widths(dict(sizes)))
        embeddings = random_embeddings(made, rows, width, world_size, dict(sizes))
        there = mock.patch.object(collectives, "exchanges_sums", return_value=device_type == "cpu")
        with settings.using(gather=gather, distribution=distribution), forgotten(), there, _Counter() as counted:
            value = made(embeddings).value
            products = counted.products
            value.backward()
    finally:
        torch.set_num_threads(threads)
        dist.destroy_process_group()
        torch.set_rng_state(random_state)
        sys.excepthook = hook  # which a process group replaces by one that names its rank
    return Work(counted.messages.found, counted.flops, products, counted.bytes)


class _Counter(MessageCounter):
    """Also counts operations of matrix products, and bytes of everything else that computes."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.products = self.bytes = 0

    def purpose(self) -> str:
        return current_purpose()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled in here, and torch's guard against it takes longer than counting

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        name = func._schema.name.partition("::")[2].strip("_")
        if func.namespace != "aten":
            return out
        matrices = [x for x in args if isinstance(x, Tensor)]
        if name in ("mm", "addmm", "bmm"):
            left, right = matrices[-2:]
            self.flops += 2 * left.numel() * right.shape[-1]
            self.products += out.numel()
        elif not func.is_view and isinstance(out, Tensor):
            self.bytes += out.nbytes + sum(x.nbytes for x in matrices)
        return out
