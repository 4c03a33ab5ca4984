"""What asks a tensor for its value waits for a GPU: a step asks as often for eight micro-batches as for one."""

from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from amclr_scale import objectives
from amclr_scale.distributed.collectives import rank, world_size
from amclr_scale.engine.deepspeed_setup import build_engine, prepare_towers
from amclr_scale.engine.step import TrainStep
from amclr_scale.metrics.phases import Phases
from tests.engine.towers import CPU, config, local_batch, towers

SIZE = 16
ASKING = {"_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero", "_unique2"}


class Asked(TorchDispatchMode):
    """Counts operations whose answer the host needs before it can go on."""

    def __init__(self) -> None:
        super().__init__()
        self.times = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.times += func.overloadpacket.__name__ in ASKING
        return func(*args, **(kwargs or {}))


def asked(micro_batches: int, stage: int, precision: str, texts: int = 1, kept: int = 1) -> int:
    """How often the fourth step asks; the first one looks at its features, and at stage 3 two look at its order.

    Args:
        texts: captions are encoded this many times as many at once as pictures.
    """
    settings = config(SIZE, execution__zero_stage=stage, execution__precision=precision)
    model: Any = towers()
    prepare_towers(model, settings.execution)
    engine, _ = build_engine(settings, model, no_decay=model.no_weight_decay(), device=CPU, world_size=world_size())
    size = SIZE // world_size() // micro_batches
    clip, phases = objectives.create("clip"), Phases(CPU)
    step = TrainStep(engine, clip, micro_batch_sizes=(size, size * texts), device=CPU, phases=phases, kept=kept)
    for n in range(4):
        with Asked() as counting:
            step(local_batch(n, SIZE, rank(), world_size()), 0.01)
    engine.destroy()
    return counting.times


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (2, "bf16"), (3, "fp32"), (3, "bf16")])
def test_eight_micro_batches_ask_as_often_as_one(ranks, stage, precision):
    """On a CPU every answer counts, also those of numbers that lie on the host beside a GPU."""
    (whole,), (parts,) = (ranks(1, asked, n, stage, precision) for n in (1, 8))
    assert 0 < parts <= whole
    if stage > 0:
        assert parts < 8  # for any number of parameters: norms and overflow are one answer


def test_at_stage_3_no_order_of_modules_asks_more_often(ranks):
    """Two ranks, whose orders would be compared; several kept graphs, none, and towers that are cut differently."""
    whole = ranks(2, asked, 1, 3, "fp32")
    for kept, texts in ((0, 1), (1, 1), (3, 1), (1, 2)):
        assert ranks(2, asked, 8, 3, "fp32", texts, kept) == whole
