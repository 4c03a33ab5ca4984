"""What the package's own accounts say of a job of that size, and a piece of a checkpoint on this machine's disk."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from amclr_scale.checkpoint import files
from amclr_scale.checkpoint.pieces import PieceReader
from amclr_scale.checkpoint.state import Snapshot, file_of
from amclr_scale.config.load import load
from amclr_scale.config.schema import Config
from amclr_scale.memory.account import Account, account
from amclr_scale.memory.objective_memory import sample_state_bytes
from amclr_scale.metrics.devices import DeviceProfile, find_profile
from amclr_scale.planner.step_time import Cost, by_link, estimate
from amclr_scale.planner.traffic import Wire, on_the_wire
from tools.scale.data import Size

PER_NODE = 8
DEVICE = "h100"
MASTERS = ("fp32 masters", "optimizer states")  # what a rank's file of a checkpoint holds of the model


@dataclass(frozen=True)
class Job:
    """One number of ranks."""

    config: Config
    ranks: int
    account: Account
    wire: Wire
    cost: Cost
    profile: DeviceProfile
    num_samples: int

    @property
    def state(self) -> int:
        """Bytes of the per-sample state on one rank."""
        return self._state(self.ranks)[0]

    @property
    def whole_state(self) -> int:
        """Bytes of all its rows."""
        return self._state(1)[0]

    def _state(self, ranks: int) -> tuple[int, str]:
        return sample_state_bytes(
            self.config.objective, self.num_samples, ranks, self.config.execution.sample_state,
            width=self.config.model.embedding_width,
        )  # fmt: skip

    @property
    def own_pieces(self) -> int:
        """Bytes of masters, optimizer states and rows of its own that one rank writes into a checkpoint."""
        model = sum(c.by_phase.get("pass_1", 0) for c in self.account.components if c.name in MASTERS)
        return model + (self.state if self.sharded else 0)

    @property
    def written_for_all(self) -> int:
        """Bytes that rank 0 writes: the per-sample state, unless it is cut over ranks."""
        return 0 if self.sharded else self.whole_state

    @property
    def sharded(self) -> bool:
        """Whether it is."""
        return self._state(self.ranks)[1] == "sharded"

    @property
    def checkpoint(self) -> int:
        """Bytes of all its files."""
        return self.ranks * self.own_pieces + self.written_for_all

    def by_purpose(self) -> dict[str, tuple[float, float]]:
        """Purpose -> bytes that a step sends over a rank's link in its node, and over its own network card."""
        found = {}
        for purpose, messages in self.wire.messages.by_purpose().items():
            pairs = [by_link(message, self.ranks, PER_NODE) for message in messages]
            found[purpose] = (sum(inside for inside, _ in pairs), sum(outside for _, outside in pairs))
        return found


def make_job(words: list[str], size: Size, ranks: int) -> Job:
    """The account of that many ranks, in nodes of eight."""
    words = [*words, f"data.lanes={size.lanes}", f"train.global_batch_size={size.batch}"]
    config = load(None, words, ranks)
    profile = find_profile(DEVICE)
    return Job(
        config,
        ranks,
        account(config, world_size=ranks, num_samples=size.num_samples),
        on_the_wire(config, world_size=ranks, num_samples=size.num_samples, ranks_per_node=PER_NODE),
        estimate(config, profile, world_size=ranks, num_samples=size.num_samples, ranks_per_node=PER_NODE),
        profile,
        size.num_samples,
    )


@dataclass(frozen=True)
class Disk:
    """Bytes per second of a checkpoint's file on this machine: written (flushed and hashed), checked, and read."""

    write: float
    check: float
    read: float


def measure_disk(folder: Path, mib: int) -> Disk:
    """Write one rank's file as a run does, and read it as a run that goes on does."""
    here = files.staging(folder, 1)
    here.mkdir(parents=True)
    column = torch.arange(mib * 2**18, dtype=torch.float32)
    notes = {"shapes": {"w": [len(column)]}, "scalars": {}, "counters": {}, "loss_scale": {}}
    snapshot = Snapshot({"step": 1, "ranks": 1}, {"parameter/w@0": column}, notes, {}, rank=0)
    began = time.perf_counter()
    written = snapshot.write(here)
    times = [time.perf_counter() - began]
    checkpoint = files.commit(folder, 1, written)
    began = time.perf_counter()
    for file in written:
        assert files.describe(checkpoint / file.name).sha256 == file.sha256
    times.append(time.perf_counter() - began)
    began = time.perf_counter()
    found = open_pieces_of(checkpoint, 1).whole("w")
    assert torch.equal(found, column)
    times.append(time.perf_counter() - began)
    return Disk(*(column.nbytes / seconds for seconds in times))


def open_pieces_of(checkpoint: Path, ranks: int) -> PieceReader:
    """Its pieces, whatever its state.json says."""
    return PieceReader([checkpoint / file_of(rank) for rank in range(ranks)])


def open_many(folder: Path, ranks: int) -> float:
    """Seconds that a rank takes to find what the files of so many ranks hold; each has a few pieces."""
    folder.mkdir(parents=True)
    notes = {"shapes": {"w": [ranks]}, "scalars": {}, "counters": {}, "loss_scale": {}}
    for rank in range(ranks):
        pieces = {f"{kind}/w@{rank}": torch.zeros(1) for kind in ("parameter", "exp_avg", "exp_avg_sq")}
        save_file(pieces, folder / file_of(rank), metadata={"notes": json.dumps(notes)})
    began = time.perf_counter()
    open_pieces_of(folder, ranks).whole("w")
    return time.perf_counter() - began
