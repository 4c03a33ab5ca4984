"""How deep in its tower a parameter is: blocks that follow it, for rates that fall with depth.

Clark et al., "ELECTRA", ICLR 2020, arXiv:2003.10555; Bao et al., "BEiT", ICLR 2022, arXiv:2106.08254.
"""

from torch import Tensor, nn

from amclr_scale.encoders.recomputation import blocks
from amclr_scale.encoders.trial import trial


def call_order(tower: nn.Module, example: Tensor) -> list[nn.Module]:
    """The modules that a tower calls, in the order of their first calls.

    Some towers declare their last norm before their blocks, so the order of names says little.

    Args:
        example: an input.

    Raises:
        UntriedError: the tower looks at numbers, and has none.
    """
    called: dict[int, nn.Module] = {}

    def note(module: nn.Module, _: object) -> None:
        called.setdefault(id(module), module)

    hooks = [module.register_forward_pre_hook(note) for module in tower.modules()]
    try:
        trial(tower, example)
    finally:
        for hook in hooks:
            hook.remove()
    return list(called.values())


def depths(tower: nn.Module, example: Tensor) -> dict[str, int]:
    """Of each parameter of a tower with n blocks: 0 after the last block, 1 in it, n in the first, n + 1 before it.

    Raises:
        UntriedError: as `call_order`.
    """
    stack = {id(block): at for at, block in enumerate(blocks(tower))}
    n, begun = len(stack), 0
    of_module: dict[int, int] = {}
    for module in call_order(tower, example):
        if id(module) in of_module:
            continue
        if id(module) in stack:
            begun += 1
            of_module |= {id(part): n + 1 - begun for part in module.modules()}
        else:
            of_module[id(module)] = 0 if begun == n else n + 1 - begun
    found: dict[str, int] = {}

    def walk(module: nn.Module, prefix: str, above: int) -> None:
        own = of_module.get(id(module), above)  # some are never called: their parent reads their parameters
        for name, _ in module.named_parameters(recurse=False):
            found.setdefault(prefix + name, own)
        for name, child in module.named_children():
            walk(child, f"{prefix}{name}.", own)

    walk(tower, "", n + 1)
    return found
