"""A tower's weights from a local file: a library's, or one of our own checkpoints. Nothing is ever downloaded."""

from pathlib import Path

import torch
from torch import Tensor, nn

from amclr_scale.errors import UserError

CLASSIFIERS = ("fc.", "head.", "heads.", "classifier.")  # what a classification checkpoint has and a tower has not
OF_OBJECTIVES = ("parts.", "temperatures.")  # what an objective trained beside the towers; the second before 0.2
NESTED = ("state_dict", "model")  # where training scripts put the weights inside what they save


def saved_parts(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
    """The parameters and the buffers that `state_dict` names, as they are.

    A tensor that stands in several places is there under each name; buffers that are made anew with every model
    (positions, rotary frequencies) are not there. At ZeRO's stage 3 parameters are what DeepSpeed leaves of them.
    """
    names = set(model.state_dict())
    parameters = {n: p for n, p in model.named_parameters(remove_duplicate=False) if n in names}
    return parameters, {n: b for n, b in model.named_buffers(remove_duplicate=False) if n in names}


def load_weights(tower: nn.Module, path: str, *, key: str, prefix: str, extra: tuple[str, ...] = CLASSIFIERS) -> None:
    """Copy a file's weights into a tower (or a whole model), all of them by name.

    Args:
        path: .safetensors, or a file of torch.save that holds tensors only.
        key: the configuration key to name in errors.
        prefix: the tower's place in a checkpoint of ours, such as "image_tower."; used where the file has it.
        extra: how names may begin that the file has and the tower has not.

    Raises:
        UserError: no such file, not weights, or not this tower's.
    """
    state = _read(path, key)
    if any(name.startswith(prefix) for name in state):
        state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    own = tower.state_dict()
    state = _under_every_name(state, tower)
    made_anew = dict(tower.named_buffers(remove_duplicate=False)).keys() - own.keys()  # which older runs saved
    missing = [name for name in own if name not in state]
    foreign = [n for n in state if n not in own and n not in made_anew and not n.startswith(extra)]
    if missing or foreign:
        raise UserError(
            f"{key}: {path} does not hold this tower's weights: {len(missing)} of its {len(own)} tensors are missing"
            f"{_some(missing)}, {len(foreign)} are unknown{_some(foreign)}; choose the tower that it was made from"
        )
    shapes = [f"{n} {tuple(state[n].shape)} for {tuple(own[n].shape)}" for n in own if state[n].shape != own[n].shape]
    if shapes:
        raise UserError(
            f"{key}: {path} holds tensors of other shapes{_some(shapes)}; use the width, depth and data.image_size (or "
            "tokenizer) that the file was made with"
        )
    tower.load_state_dict({name: state[name] for name in own})


def _under_every_name(state: dict[str, Tensor], tower: nn.Module) -> dict[str, Tensor]:
    """With tensors that stand in several places of the tower under all of their names, where the file has one."""
    names: dict[int, list[str]] = {}
    for name, part in [*tower.named_parameters(remove_duplicate=False), *tower.named_buffers(remove_duplicate=False)]:
        names.setdefault(id(part), []).append(name)
    found = dict(state)
    for same in names.values():
        known = next((name for name in same if name in state), None)
        if known is not None:
            found |= {name: state[known] for name in same if name not in state}
    return found


def _read(path: str, key: str) -> dict[str, Tensor]:
    if not Path(path).is_file():
        raise UserError(f"{key}: expected a local file with weights, got {path}, which does not exist")
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the two readers raise about a broken file
        raise UserError(f"{key}: {path} cannot be read as weights: {type(error).__name__}: {error}") from error
    for name in NESTED:
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{key}: {path} holds no plain table of tensors; save model.state_dict()")
    return {name.removeprefix("module."): value for name, value in state.items()}


def _some(names: list[str]) -> str:
    return f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
