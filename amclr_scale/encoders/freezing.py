"""Towers that keep their weights: all of them, or all but those of the last blocks.

Zhai et al., "LiT: Zero-Shot Transfer with Locked-image text Tuning", CVPR 2022, arXiv:2111.07991.

What is frozen is in evaluation mode while the rest trains: no dropout, no dropped paths, BatchNorm with its stored
statistics. So a tower that is frozen as a whole gives a sample the same features whenever it is asked, and one forward
of a step is enough (engine/gradient_cache.py).
"""

from collections.abc import Callable

from torch import Tensor, nn

from amclr_scale.config.schema import ImageTower, TextTower
from amclr_scale.encoders.depths import call_order
from amclr_scale.encoders.recomputation import blocks
from amclr_scale.encoders.trial import UntriedError
from amclr_scale.errors import UserError

Kept = dict[str, list[nn.Module]]  # by side: of a tower that is frozen, the modules that train all the same


def is_trained(module: nn.Module) -> bool:
    """Whether any parameter of it is."""
    return any(p.requires_grad for p in module.parameters())


def freeze_tower(
    tower: nn.Module, head: nn.Module, section: ImageTower | TextTower, *, key: str, example: Callable[[], Tensor]
) -> list[nn.Module] | None:
    """Take the gradient from what the section says. Returns the tower's modules that train on; None: it all does.

    Args:
        key: of the section.
        example: an input of the tower, for a look at the order in which its modules are called.

    Raises:
        UserError: the tower has fewer blocks than are to be trained, or no norms.
    """
    if section.frozen_head:
        head.requires_grad_(False)
    if not section.frozen:
        return None
    last = _last_blocks(tower, section, key, example) if section.unfrozen_blocks else []
    inside = set(map(id, last))
    norms = [m for m in tower.modules() if id(m) not in inside and _is_norm(m)] if section.unfrozen_norms else []
    if section.unfrozen_norms and not norms:
        raise UserError(f"{key}.unfrozen_norms: {section.name} has no norms that are frozen; expected false, got true")
    training = inside | set(map(id, norms))
    of_frozen = {id(p) for m in tower.modules() if id(m) not in training for p in m.parameters(recurse=False)}
    for parameter in tower.parameters():
        parameter.requires_grad_(id(parameter) not in of_frozen)
    return last


def _is_norm(module: nn.Module) -> bool:
    own = [p.dim() for p in module.parameters(recurse=False)]
    return "norm" in type(module).__name__.lower() and bool(own) and max(own) == 1


def _last_blocks(
    tower: nn.Module, section: ImageTower | TextTower, key: str, example: Callable[[], Tensor]
) -> list[nn.Module]:
    """The last blocks with all that is in them, and what the tower calls after the first of them and not before.

    In the order of calls: some towers declare their last norm before their blocks.
    """
    stack, number = blocks(tower), section.unfrozen_blocks
    if number > len(stack):
        raise UserError(
            f"{key}.unfrozen_blocks: expected at most {len(stack)} for {section.name}, which has so many, got {number}"
        )
    try:
        called = call_order(tower, example())
    except UntriedError as error:
        raise UserError(
            f"{key}.unfrozen_blocks: {section.name} cannot be looked at without its weights; expected 0, got {number}"
        ) from error
    order = {id(module): at for at, module in enumerate(called)}
    begin = order[id(stack[-number])]
    earlier = {id(module) for module in called[:begin]}
    found = {id(m): m for one in called[begin:] for m in one.modules() if id(m) not in earlier}
    return list(found.values())


def hold_still(tower: nn.Module, kept: list[nn.Module] | None) -> None:
    """Put what is frozen into evaluation mode, after a tower has been put into training mode.

    Args:
        kept: the modules that train on; None: all do, unless no parameter does.
    """
    if kept is None and is_trained(tower):
        return
    tower.eval()
    for module in kept or ():
        module.training = True
