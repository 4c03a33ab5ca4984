"""`run.shared=false`: rank 0's node keeps the run, and the ranks of other nodes send there what they have to write.

A rank is *away* when the folder at the run's path is not the one that rank 0 sees. Away ranks write into their own
node's folder, as ranks of a shared one would. Once all have written, one rank per node, the *carrier*, sends the
files to rank 0, one after the other, in chunks; each is hashed again where it arrives, before the checkpoint becomes
valid. On resume, rank 0 sends the checkpoint to the carriers in the same way, and each node's ranks read from its copy
whatever their layout asks for. So no rank ever holds more than a chunk, any number of ranks can go on, and what reads
and writes checkpoints is the same as with a shared folder. Sending is done in a thread, over gloo, while all ranks ask
one another whether it is done: however long it takes, no rank waits in one message for longer than a moment.
"""

import contextlib
import hashlib
import os
import platform
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from amclr_scale.checkpoint import files, marks
from amclr_scale.checkpoint.files import CHECKPOINTS, Written
from amclr_scale.checkpoint.lock import RunLock
from amclr_scale.checkpoint.resume import Found
from amclr_scale.checkpoint.signals import UnsavedError
from amclr_scale.checkpoint.start import Beside, together
from amclr_scale.disk import free_at
from amclr_scale.distributed.launcher import where
from amclr_scale.distributed.process_group import broadcast_object, gather_objects
from amclr_scale.errors import UserError

T = TypeVar("T")
CHUNK = 16 * 2**20  # bytes
RECEIVED = ".received"  # in the run folder of a node that keeps nothing: the checkpoint that a run goes on from
FURTHER = ("profile",)  # folders of a run that every rank writes into
ASKS = 1.0  # seconds between two questions whether all has been sent


@dataclass(frozen=True)
class Delivery:
    """Between rank 0 and the nodes that do not see its folder. All ranks call its methods together.

    Args:
        folder: the run's; on away ranks, the one at the same path on their node.
        hosts: of all ranks.
        carriers: of all ranks, which one carries for it; None: it sees rank 0's folder.
        group: rank 0 and the carriers, over gloo.
        asked: the file by which supervisors are asked to end.
    """

    folder: Path
    rank: int
    hosts: Sequence[str]
    carriers: Sequence[int | None]
    group: Any
    asked: marks.Changes

    @property
    def away(self) -> bool:
        """Whether this rank does not see rank 0's folder."""
        return self.carriers[self.rank] is not None

    @property
    def carries(self) -> bool:
        """Whether this rank sends and receives for its node."""
        return self.carriers[self.rank] == self.rank

    def collect(self, place: Path, written: Sequence[Sequence[Written]]) -> tuple[int, str]:
        """Have the files of away ranks in a folder of rank 0's node, and no more on theirs.

        Args:
            place: the folder, on each node.
            written: by each rank, known to all.

        Returns:
            The bytes that were sent; and, on rank 0, what went wrong.

        Raises:
            RuntimeError: on every rank: a connection between nodes was lost.
        """
        by_carrier: dict[int, list[tuple[int, Written]]] = {}
        for rank, carrier in enumerate(self.carriers):
            if carrier is not None:
                by_carrier.setdefault(carrier, []).extend((rank, file) for file in written[rank])
        problems = list[str]()
        for carrier, carried in by_carrier.items():  # one after the other, and none waits for its turn in a message
            if carried:
                here = partial(self._carry, carrier, place, carried)
                problems += self._while_all_wait(here, self.rank in (0, carrier)) or ()
        return sum(file.size for carried in by_carrier.values() for _, file in carried), "; ".join(problems)

    def _while_all_wait(self, work: Callable[[], T], works: bool) -> T | None:
        """Have some ranks send and receive, while none waits in one message of all ranks for longer than a moment."""
        sending = Beside(work) if works else None
        while True:
            runs = sending is not None and sending.runs(ASKS)
            said = gather_objects((runs, sending is not None and sending.error is not None))
            failed = [rank for rank, (_, wrong) in enumerate(said) if wrong]
            if failed and not (sending and sending.error):
                raise RuntimeError(f"run.shared: sending between nodes has failed on {where(failed, self.hosts)}")
            if failed or not any(runs for runs, _ in said):
                return sending.result() if sending else None

    def _carry(self, carrier: int, place: Path, carried: Sequence[tuple[int, Written]]) -> list[str]:
        problems = list[str]()
        for rank, file in carried:
            if self.rank == 0:
                words = _receive(place / file.name, file, partial(dist.recv, src=carrier, group=self.group))
                if words:
                    problems.append(f"{file.name} of {where([rank], self.hosts)} {words}")
            else:
                for chunk in _chunks(place / file.name, file.size):
                    dist.send(chunk, 0, self.group)
                (place / file.name).unlink(missing_ok=True)
        return problems

    def fetch(self, found: Found) -> Found:
        """The checkpoint to go on from, where this rank can read it; `forget` removes it again.

        Raises:
            AgreedError: on every rank: it could not be written or read somewhere.
        """
        content: list[Written] = []
        if self.rank == 0:
            manifest = found.checkpoint / files.MANIFEST
            named = files.parse_manifest(manifest.read_bytes())["files"]
            content = [*(Written(**file) for file in named), files.describe(manifest)]
        content = broadcast_object(content)
        here, words = self.folder / RECEIVED / found.checkpoint.name, ""
        if self.carries:
            words = _room(here, sum(file.size for file in content))
        together(words, "run.folder: expected room on each node for the checkpoint that the run goes on from")
        spread = partial(self._spread, found.checkpoint, here, content)
        wrong = self._while_all_wait(spread, self.rank == 0 or self.carries)
        if self.carries and not wrong:
            try:  # also where nothing is saved any more: what this node may have kept itself is older
                self.note(files.step_of(found.checkpoint))
            except OSError as error:
                wrong = f"{self.folder.absolute()} cannot be written: {error.strerror}"
        together(wrong or "", "resume: expected the checkpoint to arrive on every node")
        return replace(found, checkpoint=here) if self.away else found

    def _spread(self, source: Path, here: Path, content: Sequence[Written]) -> str:
        words = ""
        for file in content:
            if self.rank == 0:
                for chunk in _chunks(source / file.name, file.size):
                    dist.broadcast(chunk, 0, self.group)
            else:
                wrong = _receive(here / file.name, file, partial(dist.broadcast, src=0, group=self.group))
                words = words or (f"{file.name} {wrong}" if wrong else "")
        return words

    def forget(self) -> None:
        """Remove what `fetch` has brought: all have read it."""
        gather_objects(None)
        if self.carries:
            shutil.rmtree(self.folder / RECEIVED, ignore_errors=True)

    def clean(self) -> None:
        """Remove what an interrupted run was sending or receiving. Called by each rank for itself."""
        if self.carries:
            files.clean(self.folder / CHECKPOINTS)
            shutil.rmtree(self.folder / RECEIVED, ignore_errors=True)

    def note(self, step: int) -> None:
        """Leave word on the other nodes of a checkpoint that rank 0's has. Called by each rank for itself.

        Raises:
            OSError: it cannot be written.
        """
        if self.carries:
            marks.note_elsewhere(self.folder, self.hosts[0], step)

    def pass_on_request(self) -> None:
        """Supervisors of all nodes know when that of one was asked to end all."""
        known = self.asked.happened
        if any(gather_objects(known)) and not known and (self.rank == 0 or self.carries):
            self.asked.tell()

    def finish(self) -> None:
        """What else away ranks have written goes to rank 0's node, and word that the run is finished to the others.

        Raises:
            UnsavedError: on every rank: some node does not take it.
        """
        mine = list[Written]()
        if self.carries:
            found = sorted(path for name in FURTHER for path in (self.folder / name).rglob("*") if path.is_file())
            mine = [files.describe(path, self.folder) for path in found]
        _, problem = self.collect(self.folder, gather_objects(mine))
        together(
            problem, "run.folder: expected what other nodes have written to arrive on rank 0's", error=UnsavedError
        )
        result = self.folder / marks.RESULT
        text = broadcast_object(result.read_text() if self.rank == 0 and result.exists() else "")
        if self.carries and text:
            try:
                result.write_text(text)
            except OSError as error:
                problem = f"{result.absolute()} cannot be written: {error.strerror}"
        expected = "run.folder: expected a folder of its own on every node (run.shared=false)"
        together(problem, expected, error=UnsavedError)


def arrange(folder: Path, lock: RunLock, rank: int) -> Delivery | None:
    """Who sends for whom; None where all ranks see the folder that rank 0 has locked. All ranks call it together.

    Raises:
        AgreedError: on every rank: a node has no folder of its own that can be written.
    """
    hosts = gather_objects(platform.node())
    if rank == 0:
        (folder / marks.ELSEWHERE).unlink(missing_ok=True)
    if not any(gather_objects(lock.away)):
        return None
    token, words = broadcast_object(secrets.token_hex(8)), ""
    here = folder / f".node_{token}"
    if lock.away:
        try:
            here.mkdir(parents=True, exist_ok=True)
            (here / str(rank)).touch()
            # Now that it has written there, a node that shares rank 0's folder sees what its file system may have shown
            # late: a piece that it sent would be written over the one that it reads, and then removed.
            lock.look_again()
        except UserError as error:
            words = str(error)
        except OSError as error:
            words = f"{folder.absolute()} cannot be written: {error.strerror}"
    together(words, "run.folder: expected a folder of its own on every node (run.shared=false)")
    seen = min(int(path.name) for path in here.iterdir()) if lock.away else None
    carriers = gather_objects(seen)  # after which nobody looks any more
    if rank in (seen, 0):
        shutil.rmtree(here, ignore_errors=True)
    if not any(carrier is not None for carrier in carriers):
        return None
    members = sorted({0, *(carrier for carrier in carriers if carrier is not None)})
    group = dist.new_group(members, backend="gloo")
    asked = marks.Changes(folder / marks.ASKED)
    made = Delivery(folder, rank, hosts, carriers, group, asked)
    made.clean()
    return made


def _room(place: Path, size: int) -> str:
    """Make a folder; why it cannot take so many bytes, or ""."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        free = free_at(place)
    except OSError as error:
        return f"{place.absolute()} cannot be written: {error.strerror}"
    return "" if free > size else f"{free / 2**20:,.0f} MiB free in {place.absolute()} of {size / 2**20:,.0f} MiB"


def _sizes(size: int) -> Iterator[int]:
    """Of the chunks that make up a file."""
    for begin in range(0, size, CHUNK):
        yield min(CHUNK, size - begin)


def _chunks(path: Path, size: int) -> Iterator[Tensor]:
    """A file's bytes, chunk by chunk, (n,), uint8. What cannot be read is sent as zeros: the receiver's hash tells."""
    file: BinaryIO | None = None
    with contextlib.suppress(OSError):
        file = path.open("rb")
    buffer = torch.zeros(min(CHUNK, size), dtype=torch.uint8)
    try:
        for length in _sizes(size):
            chunk = buffer[:length]
            try:
                if file is None or file.readinto(chunk.numpy()) != length:  # type: ignore[attr-defined]
                    chunk.zero_()
            except OSError:
                chunk.zero_()
            yield chunk
    finally:
        if file:
            file.close()


def _receive(path: Path, file: Written, next_chunk: Callable[[Tensor], Any]) -> str:
    """Write a file from its chunks, flushed to the disk; what is wrong with it, in words.

    Where it cannot be written the rest of its chunks is taken all the same: the sender goes on.
    """
    buffer, digest, problem = torch.empty(min(CHUNK, file.size), dtype=torch.uint8), hashlib.sha256(), ""
    out: BinaryIO | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        out = path.open("wb")
    except OSError as error:
        problem = f"cannot be written: {error}"
    for length in _sizes(file.size):
        chunk = buffer[:length]
        next_chunk(chunk)
        digest.update(chunk.numpy().data)
        try:
            if out and not problem:
                out.write(chunk.numpy().data)
        except OSError as error:
            problem = f"cannot be written: {error}"
    try:
        if out:
            out.flush()
            os.fsync(out.fileno())
            out.close()
    except OSError as error:
        problem = problem or f"cannot be written: {error}"
    if not problem and digest.hexdigest() != file.sha256:
        problem = "has not arrived as it was written"
    return problem
