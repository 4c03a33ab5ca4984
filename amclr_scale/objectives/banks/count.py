"""A number that every rank counts alike, on the host; a checkpoint has it as a tensor."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from amclr_scale.objectives.staging import when_applied


class Count(nn.Module):
    """How many samples, or steps, there have been."""

    def __init__(self) -> None:
        super().__init__()
        self.value = 0

    def add(self, more: int) -> None:
        """Count so many more; inside of `staged`, when the step is committed."""

        def change() -> None:
            self.value += more

        when_applied(change)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "value"] = torch.tensor(self.value)

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *rest: Any) -> None:
        missing_keys = rest[2]
        if prefix + "value" in state_dict:
            self.value = int(state_dict[prefix + "value"])
        else:
            missing_keys.append(prefix + "value")
