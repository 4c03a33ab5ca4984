"""Plain files of a trained model: full fp32 weights by name, a teacher's, and the objective's per-sample state."""

from pathlib import Path

import torch
from torch import nn

from amclr_scale.disk import save_tensors
from amclr_scale.encoders.rank_buffers import averaged_buffers
from amclr_scale.encoders.resting import resting_weights
from amclr_scale.encoders.weights import saved_parts
from amclr_scale.engine.teacher import Teacher
from amclr_scale.engine.zero.master_weights import full_fp32
from amclr_scale.objectives.table import whole_on_first

MOMENTUM = "momentum.safetensors"


def save_weights(
    folder: Path, model: nn.Module, objective: nn.Module, *, speaks: bool, teacher: Teacher | None = None
) -> None:
    """Write `weights.safetensors`, a teacher's `momentum.safetensors`, and `objective.safetensors` where it has state.

    All ranks call it.

    Buffers that ranks have apart (BatchNorm's statistics) are averaged.

    Args:
        folder: the run folder.
        model: the module inside the engine.
        objective: its state is gathered if it is cut over ranks.
        speaks: whether this rank writes, which is rank 0.
        teacher: the run's.
    """
    average = teacher.saved() if teacher else {}
    weights = {name: full_fp32(parameter).cpu() for name, parameter in saved_parts(model)[0].items()}
    weights |= {name: buffer.detach().to("cpu", copy=True) for name, buffer in averaged_buffers(model).items()}
    resting = resting_weights(model)
    weights |= resting
    average |= resting if average else {}
    with whole_on_first():
        state = {
            name: value.cpu().contiguous()
            for name, value in objective.state_dict().items()
            if isinstance(value, torch.Tensor)
        }
    if not speaks:
        return
    save_tensors({name: value.contiguous() for name, value in weights.items()}, folder / "weights.safetensors")
    if average:
        save_tensors({name: value.contiguous() for name, value in average.items()}, folder / MOMENTUM)
    if state:
        save_tensors(state, folder / "objective.safetensors")
