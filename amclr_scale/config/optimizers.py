"""What each update rule is: who builds it, what it keeps, where it is right. Imports no torch.

Configuration, engine, memory account, cost model and documentation ask this table. A new rule is a file with the
optimizer and a function that builds it, and an entry in RULES; tests/commands/additions/optimizer.py is one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from amclr_scale.config.section import Section

if TYPE_CHECKING:
    from amclr_scale.config.recipe import Optimizer


@dataclass(frozen=True)
class UpdateRule:
    """One rule.

    Attributes:
        build: "module:function", from the section, parameter groups and an `engine.optimizers.Where` to a torch
            optimizer and the name of whoever provides it. Its groups keep `lr_factor`, `weight_decay` and `lr`, and
            weight decay is decoupled.
        source: whose code it is, for the documentation.
        moments: fp32 numbers kept beside each number of a parameter; what is kept once per tensor does not count.
        keys: of the section `optimizer` that it reads, beside lr and weight_decay.
        options: keys of its own, as a section whose defaults hold: `optimizer.options`.
        layerwise: it looks at whole layers or rows, not at each number by itself.
        offloadable: its states may live on the host (`execution.offload`).
        stages: of ZeRO, at which it is right.
        on_cuda: one by one, each parameter by torch's plain operations; together, all of them at once (foreach);
            fused, in a kernel without temporaries.
    """

    build: str
    source: str
    moments: Callable[["Optimizer"], int]
    keys: tuple[str, ...] = ()
    options: type[Section] | None = None
    layerwise: bool = False
    offloadable: bool = False
    stages: tuple[int, ...] = (0, 1, 2, 3)
    on_cuda: Literal["one by one", "together", "fused"] = "one by one"

    def builder(self) -> Callable[..., Any]:
        """The function that `build` names."""
        module, _, function = self.build.partition(":")
        found: Callable[..., Any] = getattr(import_module(module), function)
        return found


def _two(_: "Optimizer") -> int:
    return 2


ADAM = ("betas", "eps")
OURS = "amclr_scale/engine/zero/layerwise.py"

RULES: dict[str, UpdateRule] = {
    "adamw": UpdateRule(
        "amclr_scale.engine.optimizers:adamw",
        "on CUDA NVIDIA apex where `apex.optimizers` really imports (not at stage 3), else torch's fused one; "
        "DeepSpeed's CPU Adam under offload; on a CPU torch",
        _two, ADAM, offloadable=True, on_cuda="fused",
    ),
    "sgd": UpdateRule(
        "amclr_scale.engine.optimizers:sgd", "timm", lambda o: int(o.momentum > 0), ("momentum", "nesterov"),
        offloadable=True, on_cuda="together",
    ),
    "adamp": UpdateRule(
        "amclr_scale.engine.optimizers:adamp", OURS, _two, (*ADAM, "nesterov"), layerwise=True, offloadable=True
    ),
    "lamb": UpdateRule("amclr_scale.engine.optimizers:lamb", OURS, _two, ADAM, layerwise=True, offloadable=True),
    "lars": UpdateRule(
        "amclr_scale.engine.optimizers:lars", OURS, lambda _: 1, ("momentum",), layerwise=True, offloadable=True
    ),
    "lion": UpdateRule("amclr_scale.engine.optimizers:lion", "timm", lambda _: 1, ("betas",)),
    "nadam": UpdateRule("amclr_scale.engine.optimizers:nadam", "torch", _two, ADAM, on_cuda="together"),
    "radam": UpdateRule("amclr_scale.engine.optimizers:radam", "torch", _two, ADAM, on_cuda="together"),
}  # fmt: skip
