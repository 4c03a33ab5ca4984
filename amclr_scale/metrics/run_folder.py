"""A run's folder: config.yaml, environment.json, metrics.jsonl, evaluation.json, learning_curve.png, weights.

An objective that is in a file outside the package leaves a copy of it there, objective.py, which config.yaml names.

Imports no torch: whether the folder can be written is checked before any process group starts.
"""

import itertools
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import psutil

from amclr_scale.config.load import dump, recipe_hash
from amclr_scale.config.schema import Config
from amclr_scale.config.source_files import digest, source_of
from amclr_scale.errors import UserError

PACKAGES = ("amclr_scale", "torch", "torchvision", "deepspeed", "transformers", "timm", "webdataset", "numpy", "triton")
METRICS = "metrics.jsonl"
MODULE = "objective.py"
DROPPED = "metrics_dropped.jsonl"
# What a run leaves at its end, that which says so first.
RESULTS = (
    "evaluation.json", "evaluation_items.safetensors", "weights.safetensors", "momentum.safetensors",
    "objective.safetensors",
)  # fmt: skip
ASIDE = "set_aside_results"
_CHUNK = 1 << 16  # bytes read at once from the end of a file


def check_writable(config: Config) -> None:
    """Refuse a folder that cannot be made or written, or that holds a run already which is not to be resumed.

    Raises:
        UserError: naming run.folder.
    """
    folder = Path(config.run.folder).absolute()
    if config.resume == "never" and config.run.name and (folder / config.run.name / METRICS).exists():
        raise UserError(
            f"run.name: {folder / config.run.name} holds a run already; go on with it (resume=auto), choose another "
            "name or remove it"
        )
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"run.folder: expected a folder, got {existing}, which is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"run.folder: expected a folder that can be written, got {folder}: no permission in {existing}")


def name_run(config: Config, source: str | None) -> Path:
    """The folder of this run: run.name, or made of configuration, objective, batch size and time."""
    stem = Path(source).stem if source else "defaults"
    made = f"{stem}_{config.objective['name']}_B{config.train.global_batch_size}_{time.strftime('%Y%m%d-%H%M%S')}"
    return Path(config.run.folder) / (config.run.name or made)


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def installed_packages() -> dict[str, str]:
    """Versions of what a run's numbers may depend on."""
    return {name: found for name in PACKAGES if (found := _installed(name))}


def _commit() -> str | None:
    """The commit of the code that runs, marked when the tree differs from it."""
    here = Path(__file__).parent
    try:
        text = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=here,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return None
    return text.stdout.strip() or None


def environment(device: str, world_size: int) -> dict[str, Any]:
    """Versions, commit and hardware of this run."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "packages": installed_packages(),
        "commit": _commit(),
        "host": platform.node(),
        "system": platform.platform(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "device": device,
        "ranks": world_size,
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def create(
    folder: Path, config: Config, device: str, world_size: int, *, no_weight_decay: Mapping[str, str] | None = None,
    resumed_at: int | None = None,
) -> None:  # fmt: skip
    """Make the folder and write what is known before the first step. Rank 0 calls it.

    A resumed run adds its surroundings to `resumed` in environment.json, and takes the records of steps that are run
    again out of metrics.jsonl.

    Args:
        no_weight_decay: parameters that weight decay leaves alone, and why.
        resumed_at: the step that the run goes on from.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(f"# recipe {recipe_hash(config)}\n{dump(keep_module(folder, config))}")
        file, now = folder / "environment.json", environment(device, world_size)
        now |= {"no_weight_decay": no_weight_decay or {}}
        if resumed_at is not None:
            first = json.loads(file.read_text("utf-8")) if file.exists() else {}
            now = {**first, "resumed": [*first.get("resumed", []), {"step": resumed_at, **now}]}
        drop_records_after(folder, resumed_at or 0)  # a run that was killed before its first checkpoint leaves some too
        file.write_text(json.dumps(now, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"run.folder: {folder} cannot be written: {error}") from error


def set_aside_results(folder: Path) -> Path | None:
    """Take the results of an earlier end out of the way of a run that trains on: they are of other weights.

    Until it ends again the folder is then that of an unfinished run, of which the newest checkpoint is read. Nothing is
    deleted. What was measured of single checkpoints (evaluation/step_...) stays. Rank 0 calls it.

    Returns:
        Where they are now; None where there were none.

    Raises:
        OSError: they cannot be moved.
    """
    found = [folder / name for name in RESULTS if (folder / name).exists()]
    measured = folder / "evaluation"
    if measured.is_dir():
        found += [path for path in sorted(measured.iterdir()) if not path.name.startswith("step_")]
    if not found:
        return None
    numbers = itertools.count(2)
    aside = folder / ASIDE
    while aside.exists():
        aside = folder / f"{ASIDE}_{next(numbers)}"
    for path in found:
        target = aside / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    return aside


def keep_module(folder: Path, config: Config) -> Config:
    """Copy the file of an objective outside the package; returns the configuration that names the copy beside it.

    Raises:
        UserError: the file has changed since the configuration was read.
        OSError: the copy cannot be written.
    """
    module = config.objective.get("module")
    if module is None:
        return config
    text = source_of(Path(module))
    if digest(text) != config.objective["module_sha256"]:
        raise UserError(f"objective.module: {module} has changed since the configuration was read; start again")
    (folder / MODULE).write_text(text, "utf-8")
    return config.model_copy(update={"objective": {**config.objective, "module": MODULE}})


def drop_records_after(folder: Path, step: int) -> None:
    """Move the records of later steps, and a line that was cut off, from metrics.jsonl to metrics_dropped.jsonl.

    So metrics.jsonl holds every step once, as if nothing had interrupted the run.
    """
    file = folder / METRICS
    if not file.exists():
        return
    end = _end_of_records(file, step)
    if end < file.stat().st_size:
        with file.open("rb") as records, (folder / DROPPED).open("ab") as aside:
            records.seek(end)
            shutil.copyfileobj(records, aside)
        with (folder / DROPPED).open("rb+") as aside:
            _end_line(aside)
        os.truncate(file, end)
    with file.open("rb+") as records:
        _end_line(records)


def _end_of_records(file: Path, step: int) -> int:
    """Where what a run of so many steps has written ends: records are in order, so it is looked for from the end."""
    with file.open("rb") as records:
        end = records.seek(0, os.SEEK_END)
        while end:
            start, line = end, b""
            while start and b"\n" not in line[:-1]:  # the last line, with the end of the one before
                start = max(0, start - _CHUNK)
                records.seek(start)
                line = records.read(end - start)
            line = line[line[:-1].rfind(b"\n") + 1 :]
            if _is_of(line, step):
                return end
            end -= len(line)
    return 0


def _is_of(line: bytes, step: int) -> bool:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and record.get("step", 0) <= step


def _end_line(file: IO[bytes]) -> None:
    """Add what a line lacks that was cut off at its very end."""
    size = file.seek(0, os.SEEK_END)
    if size:
        file.seek(size - 1)
        if file.read(1) != b"\n":
            file.write(b"\n")
