"""ZeRO stage 3 from the start: one whole model on rank 0's host, and nowhere else.

Rank 0 builds the model as at every other stage. The other ranks build its shape alone, without memory for parameters.
Then each parameter goes from rank 0 to everybody and is cut up before the next one does: a device never holds more than
its share and one parameter, a host none or (rank 0's) one whole copy.

`deepspeed.zero.Init` around the constructors would need no whole copy at all, but it cuts parameters up before the
modules around them have initialised them, so that training would silently begin from other weights than at stages 0
to 2. And a model that is handed to `deepspeed.initialize` whole is moved to the device whole first.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def shape_only(zero_stage: int, rank: int) -> AbstractContextManager[Any]:
    """Where modules are built: as usual, or, at stage 3 on other ranks than 0, with parameters that have no memory.

    Buffers are real everywhere, and random numbers are still drawn from the global generators.
    """
    if zero_stage < 3 or rank == 0:
        return nullcontext()
    from accelerate import init_empty_weights

    elsewhere: AbstractContextManager[Any] = init_empty_weights(include_buffers=False)
    return elsewhere


def undo_linear() -> None:
    """Give `torch.nn.functional.linear` back, where an engine at stage 3 in this process has replaced it for good.

    DeepSpeed's keeps less for backward, and in 16 bits it rounds once more, between the product and its bias.
    """
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses as Patches

    nn.functional.linear = getattr(Patches, "linear_bk", nn.functional.linear)


def partition(model: nn.Module, deepspeed_config: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    """Cut the model's parameters up, one after another, with rank 0's values. All ranks call it.

    Args:
        model: built under `shape_only` on every rank. Ranks other than 0 get new Parameter objects.
        dtype: what parameters are kept in between steps (their fp32 masters are made from it).
        device: where the shares live, and buffers.
    """
    import deepspeed

    # DeepSpeed finds the process group that torch has; without this it takes the job for one of a single rank.
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    if dist.get_world_size() > 1:
        for buffer in model.buffers():  # rank 0's may come from a file of weights
            sent = buffer.to(device)
            dist.broadcast(sent, 0)
            buffer.copy_(sent)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    deepspeed.zero.Init(module=_OneByOne(model, dtype), config_dict_or_path=deepspeed_config, dtype=dtype)


class _OneByOne(nn.Module):
    """Stands for a model whose parameters get their memory when they are asked for, one at a time."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        self._model, self._dtype = (model,), dtype  # in a tuple: no child of this module

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        made: dict[int, nn.Parameter] = {}  # one object may stand in several places
        for module in self._model[0].modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in made:
                    made[id(parameter)] = self._real(parameter)
                    module._parameters[name] = made[id(parameter)]
                    yield made[id(parameter)]
                module._parameters[name] = made[id(parameter)]

    def _real(self, parameter: nn.Parameter) -> nn.Parameter:
        dtype = self._dtype if parameter.is_floating_point() else parameter.dtype
        if parameter.is_meta:
            return nn.Parameter(torch.empty(parameter.shape, dtype=dtype), requires_grad=parameter.requires_grad)
        parameter.data = parameter.data.to(dtype)
        return parameter
