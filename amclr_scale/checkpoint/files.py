"""Folders that are either whole or not there: how a checkpoint gets to the disk, and which ones may be read.

    checkpoints/step_00000200/manifest.json     every file's size and SHA-256, and its own
    checkpoints/latest                          the name of the newest one, moved last
    checkpoints/best                            the name of the one that scored best, where one is kept for that

All files are written into a hidden folder, flushed to the disk and hashed; then the manifest is written, the folder
renamed, and `latest` replaced. Whenever a process or the machine stops, what is there is an old checkpoint or a new
one. A folder whose files are not what its manifest says is never read. Imports no torch.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amclr_scale.checkpoint import contents
from amclr_scale.errors import UserError

CHECKPOINTS = "checkpoints"  # in a run's folder
MANIFEST, STATE = "manifest.json", "state.json"
LATEST, BEST = "latest", "best"
FORMAT = 1
Newest = Callable[[Path], tuple[Path | None, list[str]]]  # of a folder of checkpoints, as `newest_valid`


@dataclass(frozen=True)
class Written:
    """One file of a checkpoint."""

    name: str
    size: int  # bytes
    sha256: str


def name_of(step: int) -> str:
    """A checkpoint's folder."""
    return f"step_{step:08d}"


def aside(step: int) -> str:
    """What it is called once its run has gone on from an older one."""
    return f"set_aside_{name_of(step)}"


def staging(folder: Path, step: int) -> Path:
    """Where it is written before it is whole."""
    return folder / f".writing_{name_of(step)}"


def sync(path: Path) -> None:
    """Have a file's content, or a folder's list of names, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def describe(path: Path, folder: Path | None = None) -> Written:
    """Size and hash of a file, flushed to the disk; its name within the checkpoint's folder, if that is not its own."""
    sync(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Written(str(path.relative_to(folder or path.parent)), path.stat().st_size, digest)


def write_json(path: Path, content: dict[str, Any]) -> Written:
    """Write a JSON file to the disk."""
    path.write_text(json.dumps(content, indent=1) + "\n")
    return describe(path)


def replace_text(path: Path, text: str) -> None:
    """A small file's new content, or its old one; nothing between."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    sync(new)
    new.replace(path)
    sync(path.parent)


def _own_hash(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def commit(folder: Path, step: int, files: list[Written]) -> Path:
    """Turn the staging folder into a checkpoint, and point `latest` at it.

    Raises:
        OSError: the disk does not take it; earlier checkpoints are as they were.
    """
    manifest: dict[str, Any] = {"format": FORMAT, "step": step, "files": [vars(file) for file in files]}
    write_json(staging(folder, step) / MANIFEST, {**manifest, "sha256": _own_hash(manifest)})
    return publish(folder, step)


def publish(folder: Path, step: int) -> Path:
    """Give a staging folder that has its manifest the name of a checkpoint, and point `latest` at it.

    Raises:
        OSError: the disk does not take it; earlier checkpoints are as they were.
    """
    here, there = staging(folder, step), folder / name_of(step)
    for inner in (*here.rglob("*/"), here):
        sync(inner)
    if there.exists():
        remove(there)
    here.rename(there)
    sync(folder)
    replace_text(folder / LATEST, there.name + "\n")
    return there


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint, so that half of it is never taken for one."""
    doomed = checkpoint.with_name(f".deleting_{checkpoint.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def clean(folder: Path) -> None:
    """Remove what an interrupted run was writing or deleting."""
    for path in (*folder.glob(".writing_*"), *folder.glob(".deleting_*")):
        shutil.rmtree(
            path, ignore_errors=True
        )  # NFS keeps what another process still reads; the next start tries again


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step_"))


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, whole or not, newest first."""
    found = (path.name.removeprefix("step_") for path in folder.glob("step_*"))
    return sorted((int(number) for number in found if number.isdecimal()), reverse=True)


def fault(checkpoint: Path) -> str | None:
    """Why a checkpoint may not be read, in words; None: every byte is as it was written, and says what one can say."""
    try:
        manifest = parse_manifest((checkpoint / MANIFEST).read_bytes())
        for file in manifest["files"]:
            path = checkpoint / file["name"]
            if not path.is_file():
                return f"{file['name']} is missing"
            if path.stat().st_size != file["size"]:
                return f"{file['name']} has {path.stat().st_size:,} bytes instead of {file['size']:,}"
        for file in manifest["files"]:
            if describe(checkpoint / file["name"]).sha256 != file["sha256"]:
                return f"{file['name']} is damaged: its bytes are not those that were written"
        if (checkpoint / STATE).is_file():
            read_state(checkpoint)
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except OSError as error:
        return f"it cannot be read: {error}"
    except ValueError as error:
        return str(error)
    return None


def parse_manifest(text: bytes) -> dict[str, Any]:
    """Raise `ValueError` unless it is whole, of this version, and names files of the checkpoint."""
    try:
        manifest = contents.parse(text.decode("utf-8"))
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict) or manifest.get("sha256") != _own_hash(manifest):
        raise ValueError(f"{MANIFEST} is damaged")
    if manifest.get("format") != FORMAT:
        raise ValueError(f"its format is {manifest.get('format')}; this version reads {FORMAT}")
    try:
        contents.check_manifest(manifest)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{MANIFEST} names what no checkpoint holds: {error}") from error
    return manifest


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What state.json says.

    Raises:
        UserError: that cannot be what a run has written.
        OSError: it is not there.
    """
    number = checkpoint.name.removeprefix("step_")
    try:
        state = contents.parse((checkpoint / STATE).read_text("utf-8"))
        contents.check_state(state, int(number) if number.isdecimal() else None)
    except ValueError as error:
        raise UserError(f"{checkpoint}: {STATE} is not what a run has written: {error}") from error
    return dict(state)


def mark(checkpoint: Path) -> str:
    """Of its manifest, and so of every byte that it should have; "" where there is none."""
    try:
        return hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()
    except OSError:
        return ""


def newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and what was passed over on the way to it, in words."""
    complaints = []
    pointed = folder / LATEST
    if pointed.is_file():
        name = pointed.read_bytes()[:200].decode(errors="replace").strip()
        if not (folder / name).is_dir() or not name:
            complaints.append(f"{pointed} points to {name or 'nothing'}, which is not there")
    for step in steps(folder):
        checkpoint = folder / name_of(step)
        wrong = fault(checkpoint)
        if wrong is None:
            return checkpoint, complaints
        complaints.append(f"{checkpoint} is not used: {wrong}")
    return None, complaints


def newest_named(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint by its name, whole or not: nothing is read."""
    return next((folder / name_of(step) for step in steps(folder)), None), []


def locate(path: Path, key: str, expected: str) -> tuple[Path, list[str]]:
    """The checkpoint that a path means, itself or the newest valid one of a run; and what was passed over, in words.

    Raises:
        UserError: there is none, or it is damaged: `key: expected ..., got ...`.
    """
    if (path / CHECKPOINTS).is_dir():
        path = path / CHECKPOINTS
    if path.name in (LATEST, BEST) and path.is_file():
        path = path.parent / path.read_bytes()[:200].decode(errors="replace").strip()
    if path.name.startswith("step_"):
        wrong = fault(path) if path.is_dir() else "it does not exist"
        if wrong:
            raise UserError(f"{key}: {path} cannot be used: {wrong}")
        return path, []
    found, complaints = newest_valid(path)
    if found is None:
        raise UserError("\n".join([f"{key}: expected {expected}, got {path}", *complaints]))
    return found, complaints


def set_aside_after(folder: Path, step: int) -> None:
    """Take what is newer than the step that a run goes on from out of the way of what it will write."""
    for later in steps(folder):
        if later > step:
            source = folder / name_of(later)
            target = folder / aside(later)
            shutil.rmtree(target, ignore_errors=True)
            source.rename(target)
    best = folder / BEST
    if best.is_file() and not (folder / best.read_text().strip()).is_dir():
        best.unlink()


def point_at_best(folder: Path, step: int) -> None:
    """Let `best` name a checkpoint, if it is there.

    Raises:
        OSError: it cannot be written.
    """
    if (folder / name_of(step)).is_dir():
        replace_text(folder / BEST, name_of(step) + "\n")


def thin_out(folder: Path, keep: int, keep_every: int | None, kept: Collection[int | None] = ()) -> None:
    """Delete all but the newest `keep` and every `keep_every`-th checkpoint, and older ones that cannot be read.

    Args:
        kept: the steps of those that are kept all the same.

    Raises:
        OSError: one cannot be deleted.
    """
    for step in steps(folder)[keep:]:
        checkpoint = folder / name_of(step)
        if step in kept:
            continue
        if keep_every is None or _number(checkpoint) % keep_every:
            remove(checkpoint)


def _number(checkpoint: Path) -> float:
    """How many checkpoints its run had made with it; nan (which no number divides) where it is damaged."""
    try:
        return int(read_state(checkpoint)["number"])
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        return float("nan")
