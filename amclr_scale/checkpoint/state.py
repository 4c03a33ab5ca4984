"""The whole state of a run between two steps: taken, written, read, put back.

    state.json                  step, samples, resolved configuration, fingerprint of the data, versions, layout
    objective.safetensors       per-sample estimators and temperatures, all N rows whatever the number of ranks
    probe.safetensors           what run.probe goes on from, where there is one
    rank_00000.safetensors ...  that rank's pieces of parameters and optimizer states, buffers, random generators
    tokenizer/                  the files of the tokenizer, from which it can be made again

No file holds code: everything is JSON or safetensors. The position in the data is the step, and schedules are
functions of it, so neither has a state of its own.
"""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from amclr_scale.checkpoint import pieces
from amclr_scale.checkpoint.files import Written, describe, write_json
from amclr_scale.errors import UserError

if TYPE_CHECKING:
    from amclr_scale.engine.batch_probe import Probe

STATE = "state.json"
OBJECTIVE = "objective.safetensors"
PROBE = "probe.safetensors"
TOKENIZER = "tokenizer"


@dataclass(frozen=True)
class Snapshot:
    """One rank's part of a checkpoint, in host memory: training may go on while it is written."""

    state: dict[str, Any]
    tensors: dict[str, Tensor]
    notes: dict[str, Any]
    shared: dict[str, dict[str, Tensor]]  # by file: what rank 0 writes for all
    rank: int
    tokenizer: Mapping[str, bytes] = field(default_factory=dict)  # its files by name

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        parts = (self.tensors, *self.shared.values())
        return sum(t.nbytes for part in parts for t in part.values())

    def write(self, folder: Path) -> list[Written]:
        """Write this rank's files; rank 0's are also those that all ranks share.

        Raises:
            OSError, SafetensorError: the disk does not take them.
        """
        file = folder / file_of(self.rank)
        save_file(self.tensors, file, metadata={"notes": json.dumps(self.notes)})
        written = [describe(file)]
        if self.rank == 0:
            for name, tensors in self.shared.items():
                if tensors:
                    save_file(tensors, folder / name)
                    written.append(describe(folder / name))
            for name, content in self.tokenizer.items():
                path = folder / TOKENIZER / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                written.append(describe(path, folder))
            written.append(write_json(folder / STATE, self.state))
        return written


def file_of(rank: int) -> str:
    """The file that a rank writes."""
    return f"rank_{rank:05d}.safetensors"


def take(
    engine: Any,
    objective: nn.Module,
    state: dict[str, Any],
    device: torch.device,
    tokenizer: Mapping[str, bytes] | None = None,
    probe: "Probe | None" = None,
) -> Snapshot:
    """Copy everything that training changes. All ranks call it together, between two steps.

    Args:
        state: what goes into state.json.
        tokenizer: its files, which rank 0 writes.
        probe: the run's, if it has one.
    """
    rank, world_size = int(engine.global_rank), int(engine.world_size)
    tensors, notes = pieces.collect(engine, rank, world_size)
    own: dict[str, Tensor] = {}
    for name, value in objective.state_dict().items():  # gathered over ranks where it is cut
        assert isinstance(value, Tensor), name
        if rank == 0:
            own[name] = value.detach().to("cpu", copy=True).contiguous()
    tensors["random/cpu"] = torch.get_rng_state()
    if device.type == "cuda":
        tensors["random/cuda"] = torch.cuda.get_rng_state(device)
    legacy: Any = np.random.get_state(legacy=True)
    notes["random"] = {"python": random.getstate(), "numpy": [legacy[0], legacy[1].tolist(), *legacy[2:]]}
    shared = {OBJECTIVE: own, PROBE: {} if probe is None else probe.state_dict()}
    return Snapshot({**state, "ranks": world_size}, tensors, notes, shared, rank, tokenizer or {})


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What state.json says."""
    state: dict[str, Any] = json.loads((checkpoint / STATE).read_text("utf-8"))
    return state


def open_pieces(checkpoint: Path) -> pieces.PieceReader:
    """The pieces of all ranks that wrote."""
    ranks = int(read_state(checkpoint)["ranks"])
    return pieces.PieceReader([checkpoint / file_of(rank) for rank in range(ranks)])


def restore(
    checkpoint: Path, engine: Any, objective: nn.Module, device: torch.device, probe: "Probe | None" = None
) -> None:
    """Continue from a checkpoint, in any layout. All ranks call it together, after the engine is built.

    A rank that the checkpoint has no random generators of (more ranks than wrote it) keeps its own.

    Raises:
        UserError: the checkpoint is of another model or another objective.
    """
    rank = int(engine.global_rank)
    reader = open_pieces(checkpoint)
    try:
        pieces.restore(engine, reader, rank)
        objective.load_state_dict(_load(checkpoint / OBJECTIVE))
    except (ValueError, RuntimeError) as error:
        words = str(error).removeprefix("checkpoint: ")
        raise UserError(f"resume: {checkpoint} does not fit this run: {words}") from error
    if probe is not None:
        probe.load_state_dict(_load(checkpoint / PROBE))
    cpu, cuda = reader.tensor("random/cpu", rank), reader.tensor("random/cuda", rank)
    if cpu is not None:
        torch.set_rng_state(cpu)
        saved_random = reader.notes[rank]["random"]
        version, numbers, gauss = saved_random["python"]
        random.setstate((version, tuple(numbers), gauss))
        name, keys, *rest = saved_random["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    if cuda is not None and device.type == "cuda":
        torch.cuda.set_rng_state(cuda, device)


def _load(file: Path) -> dict[str, Tensor]:
    return load_file(file) if file.exists() else {}
