"""A tower's weights from a local file: a library's, or one of our own checkpoints. Nothing is ever downloaded."""

import argparse
import os
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn

from amclr_scale.errors import UserError, one_of

CLASSIFIERS = ("fc.", "head.", "heads.", "classifier.")  # what a classification checkpoint has and a tower has not
OF_OBJECTIVES = ("parts.", "temperatures.")  # what an objective trained beside the towers; the second before 0.2
# Where training scripts put the weights inside what they save, the first one that is there.
NESTED = ("state_dict", "model_state_dict", "model", "module", "state_dict_ema", "model_ema")
_INSIDE = "_orig_mod."  # what torch.compile puts before the names of a module that it wraps, wherever that stands


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

    The tower may be a part of what the file holds, under whatever prefix has all of its names: module., model.,
    visual.trunk.; what torch.compile wraps has the names of what is inside.

    Args:
        path: .safetensors, or a file of torch.save that holds tensors only.
        key: the configuration key to name in errors.
        prefix: the tower's place in a checkpoint of ours, such as "image_tower.", which decides between several.
        extra: how names may begin that the file has and the tower has not.

    Raises:
        UserError: no such file, not weights, or not this tower's.
    """
    whole, own = read_weights(path, key), tower.state_dict()
    state = _part(whole, tower, prefix, f"{key}: {path}")
    made_anew = dict(tower.named_buffers(remove_duplicate=False)).keys() - own.keys()  # which older runs saved
    missing = [name for name in own if name not in state]
    foreign = [n for n in state if n not in own and n not in made_anew and not n.startswith(extra)]
    if missing or foreign:
        raise UserError(
            f"{key}: {path} does not hold this tower's weights: {len(missing)} of its {len(own)} tensors are missing"
            f"{_some(missing)}, {len(foreign)} are unknown{_some(foreign)}; its names begin with {_beginnings(whole)}, "
            f"the tower's with {_beginnings(own)}; choose the tower that it was made from"
        )
    shapes = [f"{n} {tuple(state[n].shape)} for {tuple(own[n].shape)}" for n in own if state[n].shape != own[n].shape]
    if shapes:
        raise UserError(
            f"{key}: {path} holds tensors of other shapes{_some(shapes)}; use the width, depth and data.image_size (or "
            "tokenizer) that the file was made with"
        )
    tower.load_state_dict({name: state[name] for name in own})


def _part(state: dict[str, Tensor], tower: nn.Module, prefix: str, where: str) -> dict[str, Tensor]:
    """The tower's tensors under its own names, from under the prefix that has all of them; else what there is.

    Raises:
        UserError: several have, and none of them is `prefix`.
    """
    own = list(tower.state_dict())
    prefixes = {name.removesuffix(one) for one in own[:8] for name in state if name.endswith(one)}
    whole: dict[str, dict[str, Tensor]] = {}
    for before in sorted((one for one in prefixes if one == "" or one.endswith(".")), key=len):
        inside = {name.removeprefix(before): value for name, value in state.items() if name.startswith(before)}
        inside = _under_every_name(inside, tower)
        if all(name in inside for name in own):
            whole[before] = inside
    if "" in whole or not whole:
        return whole.get("") or _under_every_name(state, tower)
    meant = [before for before in whole if prefix and before.endswith(prefix)] or list(whole)
    if len(meant) > 1:
        raise UserError(f"{where} holds such a tower several times, under {one_of(meant)}; save the one that is meant")
    return whole[meant[0]]


def _beginnings(names: Iterable[str]) -> str:
    """The first words of tensors' names, the most frequent first."""
    counts = Counter(name.partition(".")[0] + "." * ("." in name) for name in names)
    return ", ".join([word for word, _ in counts.most_common(3)] + ["..."] * (len(counts) > 3))


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


def look_into(path: str, key: str, wanted: tuple[str, ...]) -> tuple[set[str], dict[str, Tensor]]:
    """The names of a file's tensors, and some of the tensors; of .safetensors nothing else is read."""
    if path.endswith(".safetensors") and Path(path).is_file():
        from safetensors import safe_open

        try:
            with safe_open(path, "pt") as file:
                names = set(file.keys())
                return names, {name: file.get_tensor(name) for name in wanted if name in names}
        except Exception as error:  # whatever it raises about a broken file
            raise UserError(f"{key}: {path} cannot be read as weights: {type(error).__name__}: {error}") from error
    found = read_weights(path, key)
    return set(found), {name: found[name] for name in wanted if name in found}


def read_weights(path: str, key: str, *, mapped: bool = False) -> dict[str, Tensor]:
    """The tensors of a file, by name. mapped: those of torch.save stay on the disk until they are used."""
    if not Path(path).is_file():
        raise UserError(f"{key}: expected a local file with weights, got {path}, which does not exist")
    if not os.access(path, os.R_OK):
        raise UserError(f"{key}: expected a file that this user can read, got {path}: no permission")
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # options of a training script: plain values
            mapped = mapped and zipfile.is_zipfile(path)
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped or None)
    except UnpicklingError as error:
        raise UserError(
            f"{key}: {path} cannot be read as weights: it holds Python objects beside tensors, which are never "
            "unpickled, or is damaged; save model.state_dict() alone"
        ) from error
    except Exception as error:  # whatever the two readers raise about a broken file
        raise UserError(f"{key}: {path} cannot be read as weights: {type(error).__name__}: {error}") from error
    while isinstance(state, dict) and (inner := next((n for n in NESTED if isinstance(state.get(n), dict)), None)):
        state = state[inner]
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{key}: {path} holds no plain table of tensors; save model.state_dict()")
    return {name.replace(_INSIDE, ""): value for name, value in state.items()}


def _some(names: list[str]) -> str:
    return f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
