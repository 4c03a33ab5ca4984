"""What an objective allocates, found by running it on a few rows in a group of ranks that pretends.

torch.distributed's `fake` process group has any number of ranks, of which this process is one, and sends nothing. The
objective runs in it unchanged under a `Tracker`, so a new objective needs no line here. With b rows of a rank, B of all
ranks, blocks of c rows and width D, every storage is one of

    a tile of similarities   min(c, b) x min(c, B)    `contrast`, `pairwise`
    a block of rows          min(c, b) x B            `map_rows`
    a matrix of moments      D x D                    `gram`
    a tile of tokens         r n1 x c n2              `token_contrast`, for so many samples, and its best matches, r n1
                                                      x c, r x c n2 and r x c; in one tile when it is run here
    anything else            affine in b              features, their gradients, numbers per anchor

which its size tells, since c is prime. At each moment so many of all but the last are alive; for every such combination
two runs give the rest as a function of b, and the peak is that of the worst combination. At the job's own width and
number of ranks this is exact, whatever the rows. Many tokens follow from a few, in the same proportion.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from typing import Any
from unittest import mock

import torch

from amclr_scale import objectives
from amclr_scale.config.objective_options import declared
from amclr_scale.memory.pretended_group import pretended
from amclr_scale.memory.random_embeddings import (
    FEW_TOKENS,
    Sizes,
    fewer_tokens,
    layer_widths,
    random_embeddings,
    tensors_of,
)
from amclr_scale.memory.tracker import Tracker
from amclr_scale.objectives.base import Layout, Objective
from amclr_scale.objectives.layers import allocate, rehearse
from amclr_scale.objectives.staging import forgotten
from amclr_scale.objectives.table import tables_of
from amclr_scale.similarity import settings, token_blocks
from amclr_scale.similarity.blocks import Workspace
from amclr_scale.similarity.settings import Distribution, Gather
from amclr_scale.similarity.token_blocks import token_tile
from amclr_scale.similarity.torch_backend import BUFFERS
from amclr_scale.types import Embeddings

BLOCKS = (3, 4)  # of rows: from three on, gradients of two are added while another is to come
GROUPS_TRACED = 4  # of more groups inside a rank, so many: each adds what the others did
PRIMES = (13, 11, 17, 19)  # c; the first that does not divide D
ITEMSIZES = ((4,), (1, 4, 8), (4,), (4,), (4, 8), (4, 8), (4, 8))  # of each; also masks and indices
TRACED = 4 * BUFFERS  # bytes per entry of what the traced backend, torch, holds of a tile
TABLES = (263, 521)  # stored rows, likewise; of no size that tiles and blocks have
MANY = 2048  # drawn rows that are traced as they are; of more, what these tables' numbers of rows would hold
FEW = 2  # ranks; from these and twice as many larger groups follow: everything is affine in their number
Alive = tuple[int, ...]  # bytes per element of what is alive of tiles, blocks, moments, and four of tokens
Tokens = tuple[int, int]  # n1, n2


@dataclass(frozen=True)
class ObjectiveMemory:
    """Bytes beyond the embeddings themselves; gradients of the embeddings are counted.

    Attributes:
        moments: what is alive -> constant and slope of the rest, bytes and bytes per row.
        contrasts: says how many matrices of b x B may be kept from forward to backward, which takes a third run.
        tokens: of an image and of a text.
    """

    moments: dict[Alive, tuple[float, float]]
    contrasts: Callable[[], int] = field(compare=False)
    width: int
    world_size: int
    tokens: Tokens = (1, 1)

    def peak(self, rows: int, *, workspace: Workspace, rows_at_once: int, cache_bytes: int = 0) -> tuple[int, int]:
        """Bytes of similarities, and of everything else, at the worst moment of forward and backward.

        Args:
            rows: b.
            workspace: of the backend in use.
            rows_at_once: of `map_rows`.
            cache_bytes: what may be kept of each matrix.
        """
        keys = rows * self.world_size
        tile, block = workspace.bytes(rows, keys, self.width), min(rows_at_once, rows) * keys
        kept = self.contrasts() * min(cache_bytes, 4 * rows * keys) if cache_bytes else 0
        found = [
            (
                round(tiles / TRACED * tile) + blocks * block + self._of_tokens(tokens, rows, keys, workspace),
                round(constant + slope * rows) + grams * self.width**2,
            )
            for (tiles, blocks, grams, *tokens), (constant, slope) in self.moments.items()
        ]
        worst = max(found, key=sum)
        return worst[0] + kept, worst[1]

    def _of_tokens(self, alive: Sequence[int], rows: int, keys: int, workspace: Workspace) -> int:
        """Bytes of a tile of tokens, and of the best matches and similarities in it."""
        n1, n2 = self.tokens
        r, c = token_tile((workspace.rows, workspace.columns), self.tokens)
        r, c = min(r, rows * n1), min(c, keys * n2)
        areas = r * c, r * c // n2, r // n1 * c, (r // n1) * (c // n2)
        return sum(bytes_ * area for bytes_, area in zip(alive, areas, strict=True))


def objective_memory(
    objective: dict[str, Any], *, width: int, world_size: int, gather: Gather, distribution: Distribution,
    layout: Layout, num_samples: int, group_share: float | None = None, sizes: Mapping[str, int] | None = None,
) -> ObjectiveMemory:  # fmt: skip
    """Run an objective on random rows. Cached; only outside of a real process group.

    Args:
        objective: name and options, as in a configuration.
        width: D.
        sizes: by kind of input: R of references, where it is not D; n of tokens; F of layers by flat name.
        distribution, layout: what the job will use, not auto.
        num_samples: N.
        group_share: where the objective has groups of pairs: their size over a rank's rows.

    Raises:
        RuntimeError: a process group exists already and this combination is not known yet.
    """
    given = tuple(sorted((sizes or {}).items()))
    ask = (_key(objective), width, world_size, gather, distribution, layout, group_share, given)
    rows = declared(objective).stored_rows
    drawn = rows != "all"
    if isinstance(rows, int) and rows <= MANY:
        return replace(_fit(*ask, None), tokens=_tokens(given))
    wide = (width, layer_widths(sizes))
    one, two = ([_state(ask[0], TABLES[0], W, wide, layout, host) for host in (False, True)] for W in (1, 2))
    cut = one != two  # over the ranks, of which each has its share
    low, high = (_fit(*ask, size, cut, drawn) for size in TABLES)
    stored = (num_samples if rows == "all" else rows) / (world_size if cut else 1)
    found = _extrapolated(low, high, (stored - TABLES[0]) / (TABLES[1] - TABLES[0]), world_size)
    return replace(found, tokens=_tokens(given))


def _tokens(sizes: Sizes) -> Tokens:
    given = dict(sizes)
    return given.get("image_tokens", FEW_TOKENS[0]), given.get("text_tokens", FEW_TOKENS[0])


def sample_state_bytes(
    objective: dict[str, Any], num_samples: int, world_size: int, layout: Layout, *, width: int | None = None,
    layers: tuple[int, ...] = (),
) -> tuple[int, Layout]:  # fmt: skip
    """Bytes of an objective's buffers on one rank, and where its state will be: replicated or sharded.

    Args:
        width: D, which banks of features need.
        layers: the width of each tapped layer.
    """
    ask = (_key(objective), num_samples, world_size, (width, layers))
    sizes = {where: _state(*ask, where) for where in ("auto", "replicated")}
    if layout != "auto":
        return _state(*ask, layout), layout
    return sizes["auto"], "replicated" if sizes["auto"] == sizes["replicated"] else "sharded"


def staged_bytes(
    objective: dict[str, Any], rows: int, world_size: int, layout: Layout, *, width: int | None = None,
    layers: tuple[int, ...] = (),
) -> int:  # fmt: skip
    """Bytes of what waits for the end of a step to be written to the state of its samples, and of their positions.

    Args:
        rows: b.
        layout: replicated or sharded, where a rank holds about as many samples of a batch as it encodes.
    """
    per_row = _bytes_per_sample(_key(objective), width, layers)
    return rows * (world_size if layout == "replicated" else 1) * per_row


@lru_cache(maxsize=256)
def _bytes_per_sample(key: str, width: int | None, layers: tuple[int, ...]) -> int:
    with torch.device("meta"):
        made = create(key, 1, "replicated", None)
        if width is not None:
            allocate(made, width, layers)
    widths = {id(table): own for one, own in zip(made.layers or (), layers, strict=False) for table in tables_of(one)}
    return sum(table.staged_bytes(widths.get(id(table), width or 0)) for table in tables_of(made))


def _key(objective: dict[str, Any]) -> str:
    return json.dumps({k: v for k, v in objective.items() if k != "num_samples"}, sort_keys=True)


@lru_cache(maxsize=256)
def _state(
    key: str, num_samples: int, world_size: int, widths: tuple[int | None, tuple[int, ...]], layout: Layout,
    on_host: bool = False,
) -> int:  # fmt: skip
    width, layers = widths
    with pretended(world_size), torch.device("meta"):
        made = create(key, num_samples, layout, None)
        if width is not None:
            allocate(made, width, layers)
    tables = [module for module in made.modules() if getattr(module, "on_host", False) is on_host]
    return sum(buffer.nbytes for table in tables for buffer in table.buffers(recurse=False))


def host_state_bytes(
    objective: dict[str, Any], num_samples: int, world_size: int, layout: Layout, *, width: int | None = None,
    layers: tuple[int, ...] = (),
) -> int:  # fmt: skip
    """Bytes of an objective's tables that stay on the host, for each rank."""
    return _state(_key(objective), num_samples, world_size, (width, layers), layout, on_host=True)


def create(
    key: str, num_samples: int, layout: Layout, group_size: int | None, *, drawn: bool = False
) -> Objective:  # fmt: skip
    """The objective of a section, as JSON, for so many samples, or as many as it needs.

    Args:
        drawn: as many stored rows as there are samples are drawn, instead of its own number.
    """
    section = json.loads(key)
    stored, kind = declared(section).stored_rows, objectives.class_of(section)
    if isinstance(stored, int) and not drawn:
        num_samples = max(num_samples, stored)
    changes = {} if group_size is None else {str(kind.group_option): group_size}
    changes |= {str(kind.drawn_option): num_samples} if drawn else {}
    return objectives.from_section(section, layout, num_samples=num_samples, **changes)


@lru_cache(maxsize=256)
def _fit(
    key: str, width: int, world_size: int, gather: Gather, distribution: Distribution, layout: Layout,
    group_share: float | None, sizes: Sizes, table: int | None, cut: bool = False, drawn: bool = False,
) -> ObjectiveMemory:  # fmt: skip
    fewer = fewer_tokens(sizes)
    if fewer != sizes:

        def at(some: Sizes) -> ObjectiveMemory:
            return _fit(key, width, world_size, gather, distribution, layout, group_share, some, table, cut, drawn)

        found = base = at(fewer)
        for name, n in sizes:
            if (share := n - dict(fewer)[name]) > 0:
                one_more = at(tuple({**dict(fewer), name: dict(fewer)[name] + 1}.items()))
                found = _extrapolated(base, one_more, share, world_size, found)
        return found
    least = max(FEW, round(group_share or 1))  # whole groups of ranks
    if world_size > 2 * least:
        ask = (gather, distribution, layout, group_share, sizes, table, cut, drawn)
        low, high = (_fit(key, width, ranks, *ask) for ranks in (least, 2 * least))
        return _extrapolated(low, high, (world_size - least) / least, world_size)
    layers = layer_widths(dict(sizes))
    chunk = next(prime for prime in PRIMES if all(own % prime for own in (width, *layers)))

    # Groups inside a rank: rows in whole groups, as many of them as the job's rank has, or enough to see what one adds.
    parts = 1 if group_share is None else max(1, min(GROUPS_TRACED, round(1 / group_share)))

    reads_tokens = any(name.endswith("_tokens") for name in declared(json.loads(key)).inputs)

    def run(rows: int, cache_bytes: int = 0) -> dict[Alive, int]:
        group_size = None if group_share is None else rows // parts * max(1, round(group_share))
        with (
            pretended(world_size),
            settings.using(
                gather=gather,
                distribution=distribution,
                chunk=chunk,
                cache_bytes=cache_bytes,
                backend="torch",
                precision="fp32",
            ),
            mock.patch.object(token_blocks, "token_tile", return_value=(2**31, 2**31)),  # all in one
        ):
            size = (table or rows) * (1 if table and not cut else world_size)
            made = create(key, size, layout, group_size, drawn=drawn)
            rehearse(made, width, rows * world_size, layers)  # the banks' own bytes are state
            n1, n2 = _tokens(sizes)
            pairs = rows * rows * world_size
            of_tokens = (pairs * n1 * n2, pairs * n1, pairs * n2, pairs) if reads_tokens else ()
            areas = (chunk * chunk, chunk * rows * world_size, width * width, *of_tokens)
            return _moments(made, random_embeddings(made, rows, width, world_size, dict(sizes)), areas)

    # With tokens, numbers of rows of which a matrix of all pairs is no block of any item size.
    few, more = (blocks * chunk * parts for blocks in ((3, 5) if reads_tokens else BLOCKS))
    least = few if reads_tokens else 2 * chunk * parts
    one, two = run(few), run(more)
    moments = {}
    for alive in one.keys() & two.keys():
        slope = (two[alive] - one[alive]) / (more - few)
        moments[alive] = (one[alive] - slope * few, slope)

    @cache
    def contrasts() -> int:
        kept = max(tiles for tiles, *_ in run(least, 2**40)) - max(tiles for tiles, *_ in one)
        return round(kept * chunk * chunk / (4 * least * least * world_size))

    return ObjectiveMemory(moments, contrasts, width, world_size)


def _extrapolated(
    low: ObjectiveMemory, high: ObjectiveMemory, share: float, world_size: int, start: ObjectiveMemory | None = None
) -> ObjectiveMemory:
    """Where low is at 0 and high at 1; or so far from where another one, in place of low, is."""
    begin = (start or low).moments

    def moved(alive: Alive, part: int) -> float:
        return begin[alive][part] + share * (high.moments[alive][part] - low.moments[alive][part])

    there = high.moments.keys() & low.moments.keys() & begin.keys()
    moments = {alive: (moved(alive, 0), moved(alive, 1)) for alive in begin if alive in there}
    return ObjectiveMemory(moments, low.contrasts, low.width, world_size)


def _moments(objective: Objective, embeddings: Embeddings, areas: tuple[int, ...]) -> dict[Alive, int]:
    """For every combination of tiles, blocks, moments and so on that is ever alive, the most bytes of the rest."""
    kinds = {area * item: (kind, item) for kind, area in reversed([*enumerate(areas)]) for item in ITEMSIZES[kind]}
    alive, rest, most = [0] * len(ITEMSIZES), 0, dict[Alive, int]()

    def note(size: int, _: int) -> None:
        nonlocal rest
        kind, item = kinds.get(abs(size), (None, 0))
        if kind is None:
            rest += size
        else:
            alive[kind] += item if size > 0 else -item
        now = tuple(alive)
        most[now] = max(most.get(now, 0), rest)

    tracker = Tracker("cpu")
    tracker.add([*objective.buffers(), *tensors_of(embeddings)], "before")
    tracker.on_change = note
    stores = objective.stores_features or objective.queue is not None
    with tracker, forgotten() if stores else nullcontext():  # what waits for the end of the step: `staged_bytes`
        objective(embeddings).value.backward()
    return most
