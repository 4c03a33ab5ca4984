"""A run's folder in an object store, or wherever else fsspec reaches.

    URL/first/checkpoints/step_00000200/...     as on the disk; manifest.json is written last and removed first
    URL/first/checkpoints/latest, best          as on the disk
    URL/first/holder.json                       which job writes here
    URL/first/config.yaml, metrics.jsonl, ...   what else is in the run's folder, without weights

A store knows no renaming, so a checkpoint counts as whole once its manifest is there, names itself rightly, and all
files of it have the sizes that it says. Whoever fetches it holds every byte against its hashes too. Every request is
tried again with growing pauses when it fails. Imports no torch.
"""

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from amclr_scale.addresses import refusal
from amclr_scale.checkpoint import files
from amclr_scale.checkpoint.files import BEST, CHECKPOINTS, LATEST, MANIFEST
from amclr_scale.data.remote import GaveUpError, partial_of, persist
from amclr_scale.data.sources import names_protocol
from amclr_scale.disk import is_full
from amclr_scale.errors import UserError

HOLDER = "holder.json"
_ELSEWHERE = (CHECKPOINTS, HOLDER, "wandb", "profile")  # in the run's folder, and none of its records
_WITHIN = re.compile(rf"(?P<run>.+://.+)/{CHECKPOINTS}(/({LATEST}|{BEST}|step_[0-9]+))?")
ENVIRONMENT = "environment.json"
T = TypeVar("T")


class RemoteError(Exception):
    """A request failed for good; `str()` says which, and why."""


def is_url(name: str) -> bool:
    """Whether a name is that of something in a store, and no path."""
    return "://" in name


def is_record(name: str) -> bool:
    """Whether a file of a run's folder goes to the store beside checkpoints, and comes back: not hidden, no weights.

    Args:
        name: from the run's folder on.
    """
    path = PurePosixPath(name)
    outside = path.is_absolute() or not path.parts or any(part.startswith(".") for part in path.parts)
    return not outside and path.parts[0] not in _ELSEWHERE and path.suffix != ".safetensors"


def name_in(url: str) -> str:
    """The run's name in its address."""
    return PurePosixPath(root_of(url).partition("://")[2]).name


def root_of(url: str) -> str:
    """The address of the run that a checkpoint, or the folder of its checkpoints, belongs to."""
    url = url.rstrip("/")
    within = _WITHIN.fullmatch(url)  # a run may lie in a folder called checkpoints: what follows decides
    return within["run"] if within else url


class RemoteRun:
    """The folder of one run at an address.

    Args:
        url: of the run's folder, or of something in it.
        key: that the address was given as, for messages.

    Raises:
        UserError: no package here knows its protocol, the address is none, or it holds a secret.
    """

    def __init__(self, url: str, key: str):
        if words := refusal(key, url):
            raise UserError(words)
        path, mark, _ = url.partition("?")
        if mark:
            raise UserError(f"{key}: expected the address of a folder, without a query, got {path}?...")
        self.url, self.key = root_of(url), key
        self.asked = url.rstrip("/").removeprefix(self.url).removeprefix(f"/{CHECKPOINTS}").strip("/")
        import fsspec

        if is_url(url) and not names_protocol(url):
            raise UserError(f"{key}: expected an address with its protocol, such as s3://BUCKET/RUNS, got {url}")
        protocol = self.url.partition("://")[0]
        settings = {"auto_mkdir": True} if protocol in ("file", "local") else {}
        try:
            self._files, root = fsspec.core.url_to_fs(self.url, **settings)
        except ImportError as error:
            raise UserError(f"{key}: {self.url} needs a package that is not installed: {error}") from error
        except Exception as error:  # each protocol has its own
            raise UserError(f"{key}: {self.url} is no address that fsspec can use: {error}") from error
        self._root = str(root).rstrip("/")

    def _try(self, name: str, action: str, attempt: Callable[[], T]) -> T:
        where = f"{self.url}/{name}".rstrip("/")
        try:
            return persist(where, attempt)
        except GaveUpError as error:
            raise RemoteError(f"{where} cannot be {action}{error}") from error

    def sizes(self, within: str = "") -> dict[str, int]:
        """The files below a folder, by their names from the run's on, with their bytes."""

        def look() -> dict[str, int]:
            self._files.invalidate_cache()
            try:
                found = self._files.find(f"{self._root}/{within}".rstrip("/"), detail=True)
            except FileNotFoundError:
                return {}
            below = len(self._root) + 1
            return {name[below:]: int(info["size"]) for name, info in found.items() if info["type"] == "file"}

        return self._try(within, "listed", look)

    def put(self, path: Path, name: str) -> None:
        """Upload a file."""
        self._try(name, "written", lambda: self._files.put_file(str(path), f"{self._root}/{name}"))

    def write(self, name: str, content: bytes) -> None:
        """Upload a small file's content."""
        with tempfile.NamedTemporaryFile() as file:
            file.write(content)
            file.flush()
            self.put(Path(file.name), name)

    def get(self, name: str, path: Path) -> None:
        """Download a file, whole or not at all.

        Raises:
            OSError: the disk is full, or cannot be written.
            RemoteError: the store does not give it.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_of(path)

        def download() -> None:
            self._files.get_file(f"{self._root}/{name}", str(partial))
            partial.replace(path)

        try:
            self._try(name, "read", download)
        except RemoteError as error:
            if error.__cause__ and is_full(why := error.__cause__.__cause__):
                assert why
                raise why from None
            raise
        finally:
            partial.unlink(missing_ok=True)

    def read(self, name: str) -> bytes | None:
        """A small file's content; None: it is not there."""

        def look() -> bytes | None:
            self._files.invalidate_cache()  # what is not in a listing of before may be there now
            try:
                return bytes(self._files.cat_file(f"{self._root}/{name}"))
            except FileNotFoundError:
                return None

        return self._try(name, "read", look)

    def remove_checkpoint(self, step: int) -> None:
        """Delete one, its manifest first, so that half of it is never taken for one."""
        self._remove(f"{CHECKPOINTS}/{files.name_of(step)}/{MANIFEST}")
        self._remove(f"{CHECKPOINTS}/{files.name_of(step)}", folder=True)

    def remove(self, name: str) -> None:
        """Delete a file; nothing happens where there is none."""
        self._remove(name)

    def _remove(self, name: str, folder: bool = False) -> None:
        def remove() -> None:
            try:
                if folder:
                    self._files.rm(f"{self._root}/{name}", recursive=True)
                else:
                    self._files.rm_file(f"{self._root}/{name}")
            except FileNotFoundError:
                return

        self._try(name, "removed", remove)

    def set_aside(self, step: int) -> None:
        """Give one the name that it would have on the disk; it is whole under its own until it is under that one."""
        folder, aside = f"{CHECKPOINTS}/{files.name_of(step)}", f"{CHECKPOINTS}/{files.aside(step)}"
        self._remove(aside, folder=True)  # of an earlier time
        for name in sorted(self.sizes(folder), key=lambda name: name == f"{folder}/{MANIFEST}"):
            self._copy(name, f"{aside}{name.removeprefix(folder)}")
        if self.pointed(BEST) == step:
            self._remove(f"{CHECKPOINTS}/{BEST}")
        self.remove_checkpoint(step)

    def _copy(self, name: str, to: str) -> None:
        def copy() -> None:
            try:
                self._files.cp_file(f"{self._root}/{name}", f"{self._root}/{to}")
            except NotImplementedError:  # as of sftp
                with tempfile.NamedTemporaryFile() as file:
                    self._files.get_file(f"{self._root}/{name}", file.name)
                    self._files.put_file(file.name, f"{self._root}/{to}")

        self._try(to, "written", copy)

    def steps(self) -> dict[int, bool]:
        """Steps of the checkpoints there, the newest first, and whether their upload has come to its end."""
        found: dict[int, bool] = {}
        for name in self.sizes(CHECKPOINTS):
            folder, _, file = name.removeprefix(f"{CHECKPOINTS}/").partition("/")
            number = folder.removeprefix("step_")
            if file and number.isdecimal() and folder.startswith("step_"):
                found[int(number)] = found.get(int(number), False) or file == MANIFEST
        return dict(sorted(found.items(), reverse=True))

    def manifest(self, step: int) -> dict[str, Any]:
        """Of a checkpoint that is whole, as far as can be told without reading it.

        Raises:
            ValueError: it is not, and why.
        """
        folder = f"{CHECKPOINTS}/{files.name_of(step)}"
        text = self.read(f"{folder}/{MANIFEST}")
        if text is None:
            raise ValueError("its upload has not come to its end")
        manifest = files.parse_manifest(text)
        there = self.sizes(folder)
        for file in manifest["files"]:
            size = there.get(f"{folder}/{file['name']}")
            if size != file["size"]:
                got = "is missing" if size is None else f"has {size:,} bytes instead of {file['size']:,}"
                raise ValueError(f"{file['name']} {got}")
        return manifest

    def pointed(self, name: str) -> int | None:
        """The step that `latest` or `best` names."""
        text = (self.read(f"{CHECKPOINTS}/{name}") or b"")[:200].decode(errors="replace").strip()
        number = text.removeprefix("step_")
        return int(number) if text.startswith("step_") and number.isdecimal() else None

    def candidates(self, complaints: list[str]) -> Iterator[int]:
        """The steps that the address may mean, the newest first, each whole as far as can be told without reading it.

        Args:
            complaints: gets what was passed over, in words.
        """
        best = self.pointed(BEST) if self.asked == BEST else None
        for step in self.steps():
            if self.asked in ("", LATEST) or step == best or files.name_of(step) == self.asked:
                try:
                    self.manifest(step)
                except ValueError as error:
                    complaints.append(f"{self.url}/{CHECKPOINTS}/{files.name_of(step)} is not used: {error}")
                else:
                    yield step

    def identity(self) -> str:
        """When and where the run that is there began; "" where nothing says it."""
        return identity_of(self.read(ENVIRONMENT) or b"")


def identity_of(environment: bytes) -> str:
    """When and where a run began, as its environment.json says; "": it does not."""
    try:
        found = json.loads(environment)
        return f"{found['time']} on {found['host']}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""


def identity_in(folder: Path) -> str:
    """The same of a run's folder."""
    file = folder / ENVIRONMENT
    return identity_of(file.read_bytes()) if file.is_file() else ""


def address_key(url: str) -> str:
    """A short name for an address."""
    return hashlib.sha256(url.encode()).hexdigest()[:16]
