"""A tower at rest: frozen, not run in training, for its features are read from a file.

It is no part of the module around it, so that no parameter of it is moved to the device, cut up, averaged or saved with
a checkpoint. Where pictures or captions come nevertheless, which is in evaluation, a copy comes to the device, in the
precision of the rest, and stays until training goes on.
"""

import copy
import hashlib
from typing import Any

import torch
from torch import Tensor, nn


class RestingTower(nn.Module):
    """Stands for a tower where it would be.

    Args:
        tower: fp32, on the host.

    Attributes:
        bytes: of its weights, on the host.
    """

    def __init__(self, tower: nn.Module):
        super().__init__()
        self._held = [tower.eval()]  # in a list: no child of this module
        self.bytes = sum(part.nbytes for part in (*tower.parameters(), *tower.buffers()))

    @property
    def inner(self) -> nn.Module:
        """The tower."""
        return self._held[0]

    def awake(self, like: Tensor) -> nn.Module:
        """The tower, where and in which precision another parameter of the model is."""
        if len(self._held) == 1:
            here = next(self.inner.parameters(), like)
            same = (here.device, here.dtype) == (like.device, like.dtype)
            self._held.append(self.inner if same else in_precision(copy.deepcopy(self.inner), like.device, like.dtype))
        return self._held[1]

    def rest(self) -> None:
        """Give up the copy on the device."""
        del self._held[1:]

    def forward(self, *_: Any) -> Any:
        raise RuntimeError("a tower at rest is woken before it is called")


def inner_of(tower: nn.Module) -> nn.Module:
    """A tower, or the one that rests."""
    return tower.inner if isinstance(tower, RestingTower) else tower


def resting_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers of what rests, by the names that they would have in the model."""
    return {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        if isinstance(module, RestingTower)
        for key, value in module.inner.state_dict().items()
    }


def in_precision(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Moved to a device, its parameters in a type. Buffers keep theirs, as under DeepSpeed."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module.to(device)


def digest(tower: nn.Module) -> str:
    """16 hex digits of all weights and buffers, with their names and shapes."""
    found = hashlib.blake2b(digest_size=8)
    for name, value in sorted(tower.state_dict().items()):
        found.update(f"{name} {tuple(value.shape)} {value.dtype} ".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
