"""Whether what an objective keeps from step to step carries over to the one of another recipe, and why it does not.

Asked twice: of two recipes, before anything is built, and of the checkpoint's tensors when they are loaded. What is
asked of recipes is asked of objectives that have shapes only, so a table of any size costs nothing.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from amclr_scale import objectives
from amclr_scale.config.load import build, keys_of
from amclr_scale.config.schema import Config
from amclr_scale.errors import UserError
from amclr_scale.objectives.layers import allocate

SECTION = "objective."
_SAMPLES = 2**20  # of both, since a data set's own number is no matter here: more than any option counts


def obstacles(saved: dict[str, Any], config: Config, changed: Mapping[str, str], fix: str) -> dict[str, str]:
    """Changed keys of the objective with which its state does not carry over, each with words for that.

    Args:
        saved: the checkpoint's configuration.
        changed: keys that differ.
        fix: what to do about it, in words.
    """
    keys = [key for key in changed if key.startswith(SECTION)]
    before, now = dict(build(saved, trusted=False).objective), dict(config.objective)
    if not keys or not _with_our_file(before, now) or _carries_over(before, now, config):
        return {}
    if before["name"] != now["name"]:  # options go with the name
        keys = [f"{SECTION}name"]
    elif alone := [key for key in keys if not _carries_over(before, _with_key(before, now, key), config)]:
        keys = alone
    values = [dict(keys_of(section, SECTION)) for section in (before, now)]
    return {
        key: f"{key}: expected {values[0].get(key, 'nothing')}, as in the checkpoint, got "
        f"{values[1].get(key, 'nothing')}: the objective's state does not carry over; {fix}"
        for key in keys
    }


def _with_our_file(before: dict[str, Any], now: Mapping[str, Any]) -> bool:
    """Let an objective outside the package be read from this run's file; False: from no file that the user named.

    A checkpoint may come from anywhere, and its file is code. Then loading tells.
    """
    if before.get("module") is None:
        return True
    before["module"] = now.get("module")
    return now.get("module") is not None and before.get("module_sha256") == now.get("module_sha256")


def _with_key(before: Mapping[str, Any], now: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The section of before with this key alone as it is now; with its whole section where that is there only once."""
    made = copy.deepcopy(dict(before))
    inner, source = made, now
    *sections, last = key.removeprefix(SECTION).split(".")
    for name in sections:
        if not isinstance(inner.get(name), dict) or not isinstance(source.get(name), dict):
            last = name
            break
        inner, source = inner[name], source[name]
    inner[last] = source.get(last)
    return made


def _carries_over(before: Mapping[str, Any], now: Mapping[str, Any], config: Config) -> bool:
    """Whether the second section's objective takes the state of the first's, and the model has the same parts."""
    width = config.model.embedding_width
    try:
        old, new = _shapes_only(before, width), _shapes_only(now, width)
        state = old.state_dict()
        if not state.keys() & new.state_dict().keys():  # what the first embeddings make may begin now
            new = _shapes_only(now, None)
        load(new, state)
    except UserError:  # of an option that does not go with others alone: it is all of them together
        return True
    except ValueError:
        return False
    return _shapes_of_parts(old, width) == _shapes_of_parts(new, width)


def _shapes_only(section: Mapping[str, Any], width: int | None) -> objectives.Objective:
    with torch.device("meta"):
        made = objectives.from_section(section, "replicated", num_samples=_SAMPLES)
        if width is not None:
            allocate(made, width)
    return made


def _shapes_of_parts(objective: objectives.Objective, width: int) -> dict[str, torch.Size]:
    with torch.device("meta"):
        parts = objective.model_parts(objective.config, width)
    return {name: value.shape for name, value in parts.state_dict().items()} if parts is not None else {}


def load(objective: nn.Module, saved: Mapping[str, Any]) -> None:
    """`load_state_dict`, with words for what does not fit.

    Raises:
        ValueError: the state is not one of this objective and these options.
    """
    shapes = {name: tuple(value.shape) for name, value in objective.named_buffers()}
    try:
        odd = objective.load_state_dict(saved, strict=False)
    except RuntimeError as error:
        raise ValueError(_misfits(str(error), saved, shapes)) from error
    wrong = [f"lacks {name}" for name in odd.missing_keys] + [f"has {name} too many" for name in odd.unexpected_keys]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"its state of the objective is that of another objective, or of other options: it {', '.join(wrong[:3])}"
            f"{more}"
        )


def _misfits(said: str, saved: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What torch says of tensors, in a sentence; tables have words of their own, which stand."""
    lines = []
    for line in map(str.strip, said.splitlines()[1:]):
        name = line.removeprefix("size mismatch for ").partition(":")[0]
        if line.startswith("size mismatch for ") and name in saved and name in shapes:
            lines.append(f"{name}: expected {shapes[name]} numbers, got {tuple(saved[name].shape)}")
        else:
            lines.append(line)
    return "its state of the objective does not fit: " + ("; ".join(lines) or said)
