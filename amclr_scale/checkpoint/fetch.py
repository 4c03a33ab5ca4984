"""A checkpoint in an object store brought to the disk, every byte of it held against its hashes. Imports no torch.

`resume: URL` brings it into the run's folder, and `resume: auto` with `run.remote` does where the store has a newer one
than the disk; evaluate, export and embed bring it into the cache (checkpoint/cached.py).
"""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amclr_scale.checkpoint import files
from amclr_scale.checkpoint.files import CHECKPOINTS, MANIFEST, STATE, Newest, newest_valid
from amclr_scale.checkpoint.marks import step_elsewhere
from amclr_scale.checkpoint.remote import RemoteRun, identity_in, is_record, is_url, name_in
from amclr_scale.checkpoint.resume import Found, opened
from amclr_scale.config.schema import Config
from amclr_scale.disk import check_room, unwritten
from amclr_scale.errors import UserError
from amclr_scale.metrics.run_folder import METRICS


@dataclass(frozen=True)
class Source:
    """A run in a store that a run here goes on from."""

    remote: RemoteRun
    folder: Path  # of the run here
    config: Config
    here: Path | None = None  # the newest whole checkpoint of the run on the disk: an older one is not fetched
    complaints: tuple[str, ...] = ()  # newer ones on the disk that cannot be used, and why

    def bring(self) -> Found:
        """Fetch the newest checkpoint that is whole, and, of the same run, its records; or take the disk's.

        Raises:
            UserError: there is none, it was made by another recipe, another run is in the folder, or the disk is full.
            RemoteError: the store does not answer.
        """
        folder, remote = self.folder, self.remote
        if (folder / METRICS).exists() and identity_in(folder) != remote.identity():
            raise UserError(
                f"run.name: {folder} holds another run than the one at {remote.url}; choose another name, or move it"
            )
        complaints = list(self.complaints)
        for step in self._newer(complaints):
            try:
                self._look(step, complaints)  # so that one of another recipe is refused before all of it is fetched
                checkpoint = fetch(remote, step, folder / CHECKPOINTS)
                if folder.name == name_in(remote.url) and not (folder / METRICS).exists():
                    fetch_records(remote, folder)
            except UserError:
                raise
            except ValueError as error:
                complaints.append(not_used(remote, step, error))
            except OSError as error:
                raise unwritten(error, "run.folder", folder) from error
            else:
                return opened(checkpoint, [*complaints, f"fetched from {remote.url}"], self.config)
        if self.here is not None:
            return opened(self.here, complaints, self.config)
        raise nothing(remote, complaints)

    def look(self) -> tuple[Found, str]:
        """What `bring` would find, without its weights, and the checkpoint's address; "": it is the disk's.

        Raises:
            UserError, RemoteError: as `bring`.
        """
        complaints = list(self.complaints)
        for step in self._newer(complaints):
            try:
                return self._look(step, complaints)
            except UserError:
                raise
            except ValueError as error:
                complaints.append(not_used(self.remote, step, error))
        if self.here is not None:
            return opened(self.here, complaints, self.config), ""
        raise nothing(self.remote, complaints)

    def _newer(self, complaints: list[str]) -> Iterator[int]:
        for step in self.remote.candidates(complaints):
            if self.here is not None and step <= files.step_of(self.here):
                return
            yield step

    def _look(self, step: int, complaints: list[str]) -> tuple[Found, str]:
        name = files.name_of(step)
        called = f"{self.remote.url}/{CHECKPOINTS}/{name}"
        listed = self.remote.manifest(step)["files"]
        hashes = {file["name"]: file["sha256"] for file in listed}
        try:
            _check_room(self.folder / CHECKPOINTS, step, listed)
        except OSError as error:
            raise unwritten(error, "run.folder", self.folder) from error
        if STATE not in hashes:
            raise ValueError(f"{STATE} is missing")
        with tempfile.TemporaryDirectory() as temporary:
            state = Path(temporary) / name / STATE
            try:
                self.remote.get(f"{CHECKPOINTS}/{name}/{STATE}", state)
            except OSError as error:
                raise unwritten(error, "TMPDIR", Path(temporary)) from error
            if files.describe(state).sha256 != hashes[STATE]:
                raise ValueError(f"{STATE} is damaged: its bytes are not those that were written")
            return opened(Path(temporary) / name, complaints, self.config, called), called


def source_of(config: Config, folder: Path, newest: Newest = newest_valid) -> Source | None:
    """Where a run goes on from, if that is in a store; None: it is on the disk, or the run begins.

    Args:
        folder: of the run, if it has a name.
        newest: finds the checkpoint on the disk that the store's are compared with, by default a whole one: what is
            damaged there may be whole in the store.

    Raises:
        UserError: the address cannot be used.
        RemoteError: the store does not answer.
    """
    named = config.run.name is not None
    if is_url(config.resume):
        remote = RemoteRun(config.resume, "resume")
        return Source(remote, folder if named else Path(config.run.folder) / name_in(remote.url), config)
    if config.resume != "auto" or config.run.remote is None or not named:
        return None
    remote = RemoteRun(f"{config.run.remote.rstrip('/')}/{folder.name}", "run.remote")
    there = next(remote.candidates([]), None)
    if there is None:
        return None
    here, complaints = newest(folder / CHECKPOINTS)
    if here is not None and files.step_of(here) >= there:
        return None
    host, elsewhere = step_elsewhere(folder)
    if elsewhere > there:
        complaints = [*complaints, f"{host} has this run up to step {elsewhere:,}, the store up to {there:,}"]
    return Source(remote, folder, config, here, tuple(complaints))


def not_used(remote: RemoteRun, step: int, why: Exception) -> str:
    """That a checkpoint in the store is passed over, in words."""
    return f"{remote.url}/{CHECKPOINTS}/{files.name_of(step)} is not used: {why}"


def nothing(remote: RemoteRun, complaints: list[str]) -> UserError:
    """That there is no other, in words."""
    asked = f"{remote.url}/{CHECKPOINTS}/{remote.asked}".rstrip("/") if remote.asked else remote.url
    return UserError("\n".join([f"{remote.key}: no checkpoint that can be used at {asked}", *complaints]))


def _check_room(folder: Path, step: int, listed: Sequence[Mapping[str, Any]]) -> None:
    """Raise `FullError` where a folder of checkpoints has no room for one that is not there yet."""
    if (folder / files.name_of(step) / MANIFEST).is_file():
        return  # it may be whole; if it is not, writing another tells
    begun = files.staging(folder, step)  # of a killed process; it goes before anything is written
    held = sum(path.stat().st_size for path in begun.rglob("*") if path.is_file())
    check_room(folder, sum(file["size"] for file in listed) - held, f"checkpoint {files.name_of(step)}")


def same(remote: RemoteRun, step: int, folder: Path) -> bool:
    """Whether the checkpoint in a folder of checkpoints is, by its manifest, the one in the store.

    Raises:
        RemoteError: the store does not answer.
    """
    here = folder / files.name_of(step) / MANIFEST
    return here.is_file() and here.read_bytes() == remote.read(f"{CHECKPOINTS}/{files.name_of(step)}/{MANIFEST}")


def fetch(remote: RemoteRun, step: int, folder: Path) -> Path:
    """Bring one checkpoint into a folder of checkpoints, whole or not at all; nothing is read where it is there.

    Raises:
        ValueError: what is in the store is not what was written, and why.
        OSError: the disk does not take it.
        RemoteError: the store does not give it.
    """
    there, here, name = (
        folder / files.name_of(step),
        files.staging(folder, step),
        f"{CHECKPOINTS}/{files.name_of(step)}",
    )
    text = remote.read(f"{name}/{MANIFEST}")
    if text is None:
        raise ValueError(f"{MANIFEST} is missing")
    manifest = files.parse_manifest(text)
    if (there / MANIFEST).is_file() and (there / MANIFEST).read_bytes() == text and files.fault(there) is None:
        return there
    _check_room(folder, step, manifest["files"])
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir(parents=True)
    try:
        for file in manifest["files"]:
            remote.get(f"{name}/{file['name']}", here / file["name"])
        (here / MANIFEST).write_bytes(text)
        if wrong := files.fault(here):
            raise ValueError(wrong)
        return files.publish(folder, step)
    finally:
        shutil.rmtree(here, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.rmdir()  # if nothing else is in it


def fetch_records(remote: RemoteRun, folder: Path) -> None:
    """Bring what is in the run's folder beside its checkpoints: configuration, records, results, tokenizer.

    Raises:
        OSError, RemoteError: as `fetch`.
    """
    for name in remote.sizes():
        if is_record(name):  # whatever else a store holds, it changes no lock and brings no weights without a hash
            remote.get(name, folder / name)
