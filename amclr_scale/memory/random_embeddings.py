"""Random rows of everything that an objective reads, to run it on where only sizes matter."""

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from amclr_scale import objectives
from amclr_scale.config.objective_options import declared
from amclr_scale.declarations import KINDS
from amclr_scale.objectives.base import Objective
from amclr_scale.types import Embeddings, flatten, takes_gradient

FEW_TOKENS = (3, 4)  # from which more follow, where that is affine in the number of a side's
MOST_TOKENS = 8  # are run as they are, and one more
Sizes = tuple[tuple[str, int], ...]  # R of each reference, n of each side's tokens, F of each layer by flat name


def fewer_tokens(sizes: Sizes) -> Sizes:
    """Few tokens, in about the proportion of both sides, so that the worst moment is the same one."""
    most = max((n for name, n in sizes if name.endswith("_tokens")), default=0)
    if most <= MOST_TOKENS + 1:
        return sizes
    share = MOST_TOKENS / most
    few = {name: max(min(n, FEW_TOKENS[0]), round(n * share)) for name, n in sizes if name.endswith("_tokens")}
    return tuple({**dict(sizes), **few}.items())


def layer_widths(sizes: Mapping[str, int] | None) -> tuple[int, ...]:
    """F of each tapped layer."""
    found = {name: width for name, width in (sizes or {}).items() if name.startswith("image_layers.")}
    return tuple(found[f"image_layers.{number}"] for number in range(len(found)))


def tensors_of(embeddings: Embeddings) -> list[Tensor]:
    """All of them."""
    return list(embeddings.flat().values())


def random_embeddings(
    objective: Objective, rows: int, width: int, world_size: int, sizes: Mapping[str, int] | None = None
) -> Embeddings:
    """All that the objective reads, outputs of its parts among it, as leaves: random rows of a rank.

    Args:
        sizes: by kind of input: R of references, where it is not the width; n of tokens, where it is not the least;
            F of layers, by flat name.
    """
    torch.manual_seed(0)
    given = sizes or {}
    made: dict[str, Any] = {}
    for name in ("image", "text", *(kind for kind in objective.inputs if not KINDS[kind].several)):
        side = name.partition("_")[0]
        n, K = given.get(f"{side}_tokens", FEW_TOKENS[0]), objective.inputs.count(f"{side}_negatives")
        made[name] = _random(name, rows, width, {"R": given.get(name, width), "K": K, "n": n})
    for name, kind in KINDS.items():
        if kind.several and name in objective.inputs:
            flat = [f"{name.replace('_momentum', '')}.{k}" for k in range(objective.inputs.count(name))]
            made[name] = tuple(_random(name, rows, width, {"F": given.get(one, width)}) for one in flat)
    made["logit_scale"], made["logit_bias"] = torch.full((1,), 10.0), torch.full((1,), -10.0)
    parts = objective.model_parts(objective.config, width)
    if parts is not None:
        with torch.no_grad():
            made |= parts(made)
    made["ids"] = torch.arange(rows) * world_size  # of samples whose state this rank holds: nobody else answers
    leaves = {name: x.detach().clone() for name, x in flatten(made).items()}
    for name, leaf in leaves.items():
        leaf.requires_grad_(leaf.is_floating_point() and takes_gradient(name))
    return Embeddings.from_flat(leaves)


@lru_cache(maxsize=64)
def made_together(key: str, width: int) -> tuple[str, ...]:
    """Outputs of an objective's parts that come only where images and texts are encoded in one call.

    Args:
        key: the objective's section, as JSON.
        width: D.
    """
    section = json.loads(key)
    inputs, parts = declared(section).inputs, objectives.parts_of(section, width)
    if parts is None:
        return ()
    state = torch.get_rng_state()
    given: dict[str, dict[str, Any]] = {}
    for side in ("image", "text"):
        views = tuple(_random(side, 2, width) for _ in range(inputs.count(f"{side}_views")))
        given[side] = {side: _random(side, 2, width), f"{side}_views": views}
    shared = {"logit_scale": torch.full((1,), 10.0), "logit_bias": torch.full((1,), -10.0)}
    with torch.no_grad():
        both = flatten(parts({**given["image"], **given["text"], **shared}))
        alone = {name for outputs in given.values() for name in flatten(parts({**outputs, **shared}))}
    torch.set_rng_state(state)
    return tuple(name for name in both if name not in alone)


def _random(name: str, rows: int, width: int, others: Mapping[str, int] | None = None) -> Tensor:
    """Rows of a kind of input."""
    kind, sizes = KINDS[name], {"D": width, **(others or {})}
    shape = [sizes[side] if isinstance(side, str) else side for side in kind.shape]
    if kind.dtype == "float":
        x = torch.randn(rows, *shape)
        return F.normalize(x, dim=-1) if shape else x
    return torch.ones(rows, *shape, dtype=getattr(torch, kind.dtype))
