"""What each technique buys: memory per rank against batch size, ranks, ZeRO stage and recomputation.

    curves = against_batch(config, world_size=8, batches=[...], num_samples=N)      # method -> bytes per batch

b  local batch    B = b W  global batch    D  embedding width    M  queue length    P  parameters

The methods, each with what the one before has:

    all B x B on every rank    the whole share of the batch is encoded at once; DENSE tensors of B x B float32, as
                               autograd keeps them (measured 4.06 for open_clip's loss, docs/similarity.md), and the
                               gathered features with their gradients
    local rows, b x B          the same with a rank's rows only
    blocks                     blocks of similarities, made again in backward: this toolkit without the gradient cache
    gradient cache             MICRO_BATCH samples encoded at once, one graph kept
    + state per sample         SogCLR's tables of N samples
    + queue                    M features of both modalities, as extra keys
    + momentum encoder         a copy of the parameters that makes those features

The first three grow with the batch because activations do; that is why CLIP's batch took hundreds of GPUs. State,
features and activations come from the account; dense losses, queue and copy from formulas.py.
"""

from collections.abc import Iterable
from typing import Any

from amclr_scale.config.load import build
from amclr_scale.config.schema import Config
from amclr_scale.memory.account import Account, account
from amclr_scale.planner.settings import changed, with_batch
from amclr_scale.planner.traffic import parameters_of
from tools.memory_pages.formulas import gathered_features, momentum_copy, queue, similarity_matrix

DENSE = 4
MICRO_BATCH = 64
QUEUE = 65_536
Curves = dict[str, list[int]]  # name -> bytes per rank, one per abscissa


def _account(config: Config, batch: int, world_size: int, num_samples: int, **settings: Any) -> Account:
    wanted = changed(with_batch(config, batch), **settings)
    return account(wanted, world_size=world_size, num_samples=num_samples, device="cuda")


def _with_objective(config: Config, **objective: Any) -> Config:
    tree = config.model_dump()
    return build({**tree, "objective": objective})


def _dense_peak(found: Account, rows: int, batch: int, width: int) -> int:
    """The account's peak with a loss that keeps rows x B instead of blocks."""
    similarity = [c for c in found.components if c.kind == "similarity"]
    dense = similarity_matrix(rows, batch, matrices=DENSE) + 2 * gathered_features(batch, width)
    phases = dict(found.by_phase)
    phases["objective"] += dense - sum(c.by_phase.get("objective", 0) for c in similarity)
    return max(phases.values())


def methods(config: Config, batch: int, world_size: int, num_samples: int) -> dict[str, int]:
    """Bytes per rank of each method for one batch on so many ranks."""
    width, local = config.model.embedding_width, batch // world_size
    whole = _account(config, batch, world_size, num_samples, micro_batch_size=None, kept_micro_batches=1)
    small = {"micro_batch_size": min(MICRO_BATCH, local), "kept_micro_batches": 1}
    cached = _account(config, batch, world_size, num_samples, **small)
    tables = _with_objective(config, name="sogclr")
    stateful = _account(tables, batch, world_size, num_samples, **small).peak_bytes
    queued = cached.peak_bytes + queue(QUEUE, width, banks=2)
    itemsize = 4 if config.execution.precision == "fp32" else 2
    return {
        "all B x B on every rank": _dense_peak(whole, batch, batch, width),
        "local rows, b x B": _dense_peak(whole, local, batch, width),
        "blocks": whole.peak_bytes,
        "gradient cache": cached.peak_bytes,
        "+ state per sample": stateful,
        "+ queue": queued,
        "+ momentum encoder": queued + momentum_copy(parameters_of(config), itemsize=itemsize),
    }


def _curves(found: Iterable[dict[str, int]]) -> Curves:
    curves: Curves = {}
    for point in found:
        for name, size in point.items():
            curves.setdefault(name, []).append(size)
    return curves


def against_batch(config: Config, *, world_size: int, batches: list[int], num_samples: int) -> Curves:
    """Every method, for growing global batches on so many ranks."""
    return _curves(methods(config, batch, world_size, num_samples) for batch in batches)


def against_ranks(config: Config, *, batch: int, ranks: list[int], num_samples: int) -> Curves:
    """Every method, for one global batch on growing numbers of ranks."""
    return _curves(methods(config, batch, world_size, num_samples) for world_size in ranks)


def against_stage(config: Config, *, batch: int, world_size: int, num_samples: int) -> Curves:
    """Through the gradient cache: each recomputation, at ZeRO stages 1, 2, 3 and 3 with everything offloaded."""
    stages = ((1, "none"), (2, "none"), (3, "none"), (3, "parameters"))
    return {
        f"recomputation: {how}": [
            _account(
                config, batch, world_size, num_samples, zero_stage=stage, offload=offload,
                recompute_image=how, recompute_text=how, micro_batch_size=MICRO_BATCH,
            ).peak_bytes
            for stage, offload in stages
        ]
        for how in ("none", "full")
    }  # fmt: skip


STAGES = ("1", "2", "3", "3, offloaded")
