"""What a checkpoint's JSON may say: numbers that are some, names that are ours. A forged one is told in words.

Hashes show that a checkpoint is what somebody wrote, not who wrote it. Imports no torch.
"""

import json
import math
from pathlib import PurePosixPath
from typing import Any

MOST = 1 << 53  # of anything that is counted
COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")  # of DeepSpeed's engine
_COUNTS = ("step", "samples", "total_steps", "number", "ranks")
_TEXTS = ("recipe", "data_fingerprint", "time")
_TYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32")


def parse(text: str) -> Any:
    """JSON of any origin.

    Raises:
        ValueError: it is none, or nested so deeply that Python cannot read it.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def check_manifest(manifest: Any) -> None:
    """Raise `ValueError` unless every file in it has a name inside the checkpoint, a size and a hash."""
    for file in manifest["files"]:
        name, size, digest = file["name"], file["size"], file["sha256"]
        if not isinstance(name, str) or not isinstance(digest, str) or not _counts(size):
            raise ValueError(f"an entry {str(file)[:100]}")
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\0" in name:
            raise ValueError(f"a file outside the checkpoint: {name[:100]!r}")


def check_state(state: Any, step: int | None) -> None:
    """Raise `ValueError` unless what state.json holds are numbers, words and a configuration.

    Args:
        step: of the checkpoint's name.
    """
    if not isinstance(state, dict):
        raise ValueError("it is no object")
    for key in _COUNTS:
        if key in state and not _counts(state[key]):
            raise ValueError(f"{key} is {str(state[key])[:40]!r}")
    for key in _TEXTS:
        if key in state and not isinstance(state[key], str):
            raise ValueError(f"{key} is {str(state[key])[:40]!r}")
    if not isinstance(state.get("tokenizer_fingerprint", ""), str | None):
        raise ValueError("tokenizer_fingerprint is no text")
    if not isinstance(state.get("config", {}), dict):
        raise ValueError("config is no section")
    if step is not None and state.get("step", step) != step:
        raise ValueError(f"step is {state['step']:,} in a folder of step {step:,}")
    batch = state.get("config", {}).get("train", {})
    size = batch.get("global_batch_size") if isinstance(batch, dict) else None
    if {"step", "samples"} <= state.keys() and _counts(size) and state["samples"] != state["step"] * size:
        raise ValueError(f"samples are {state['samples']:,} after {state['step']:,} steps of {size:,}")


def check_notes(notes: Any) -> None:
    """Raise `ValueError` unless what a rank wrote beside its tensors is what `pieces.collect` makes."""
    try:
        shapes, scalars = notes["shapes"], notes["scalars"]
        good = all(isinstance(n, str) and all(map(_counts, shape)) for n, shape in shapes.items())
        good &= all(isinstance(n, str) and all(map(_counter, saved.values())) for n, saved in scalars.items())
        good &= all(name in COUNTERS and _counts(value) for name, value in notes["counters"].items())
        good &= all(isinstance(value, int | float) for value in notes["loss_scale"].values())
        if "random" in notes:
            (version, numbers, gauss), (kind, keys, position, has, cached) = (
                notes["random"]["python"], notes["random"]["numpy"],
            )  # fmt: skip
            good &= version == 3 and all(map(_word, numbers[:-1])) and _counts(numbers[-1]) and len(numbers) == 625
            good &= gauss is None or isinstance(gauss, float)
            good &= kind == "MT19937" and len(keys) == 624 and all(map(_word, keys)) and 0 <= position <= 624
            good &= has in (0, 1) and isinstance(cached, int | float)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"notes that no run writes ({type(error).__name__}: {error})") from error
    if not good:
        raise ValueError("notes that no run writes")


def _counts(value: Any) -> bool:
    return type(value) is int and 0 <= value < MOST


def _word(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 32


def _counter(saved: Any) -> bool:
    """Of an optimizer's state: a number, and the type and shape that it had as a tensor of one."""
    value, shape = saved["value"], saved.get("shape", [])
    number = isinstance(value, int | float) and math.isfinite(value)
    return number and saved.get("dtype", "float32") in _TYPES and math.prod(shape) == 1 and len(shape) < 5
