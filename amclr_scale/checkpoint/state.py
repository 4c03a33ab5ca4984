"""The whole state of a run between two steps: taken, written, read, put back.

    state.json                  step, samples, resolved configuration, fingerprint of the data, versions, layout
    objective.safetensors       per-sample estimators and temperatures, all N rows, unless they are cut over ranks
    probe.safetensors ...       what hooks go on from (run.probe's last measurement), by their names
    rank_00000.safetensors ...  that rank's pieces of parameters, optimizer states and a teacher, its own rows of what
                                is kept per sample, buffers, random generators
    tokenizer/                  the files of the tokenizer, from which it can be made again

No file holds code: everything is JSON or safetensors. The position in the data is the step, and schedules are
functions of it, so neither has a state of its own.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from amclr_scale.checkpoint import objective_state, pieces
from amclr_scale.checkpoint.files import STATE, Written, describe, read_state, write_json
from amclr_scale.checkpoint.rows import stored_rows
from amclr_scale.disk import save_tensors
from amclr_scale.engine.teacher import Teacher
from amclr_scale.errors import UserError
from amclr_scale.objectives.table import ROWS, own_rows, rows_apart

if TYPE_CHECKING:
    from amclr_scale.engine.hooks import Hook

OBJECTIVE = "objective.safetensors"
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
        save_tensors(self.tensors, file, metadata={"notes": json.dumps(self.notes)})
        written = [describe(file)]
        if self.rank == 0:
            for name, tensors in self.shared.items():
                if tensors:
                    save_tensors(tensors, folder / name)
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


def file_of_hook(hook: "Hook") -> str:
    """The file of a hook's state."""
    return f"{hook.name}.safetensors"


def take(
    engine: Any,
    objective: nn.Module,
    state: dict[str, Any],
    device: torch.device,
    tokenizer: Mapping[str, bytes] | None = None,
    hooks: "Sequence[Hook]" = (),
    teacher: Teacher | None = None,
) -> Snapshot:
    """Copy everything that training changes. All ranks call it together, between two steps.

    Args:
        state: what goes into state.json.
        tokenizer: its files, which rank 0 writes.
        hooks: the run's.
        teacher: the run's.
    """
    rank, world_size = int(engine.global_rank), int(engine.world_size)
    tensors, notes = pieces.collect(engine, rank, world_size)
    if teacher:
        tensors |= pieces.collect_average(teacher, rank, world_size)
    with rows_apart():
        states = {OBJECTIVE: objective.state_dict()}
    tensors |= {f"{ROWS}{name}": rows.detach().to("cpu", copy=True) for name, rows in own_rows(objective).items()}
    for hook in hooks:
        if hook.name:
            assert file_of_hook(hook) not in states, f"two parts of a checkpoint are called {hook.name}"
            states[file_of_hook(hook)] = hook.state_dict()
    shared = {file: _copy(part) for file, part in states.items()} if rank == 0 else {}
    tensors["random/cpu"] = torch.get_rng_state()
    if device.type == "cuda":
        tensors["random/cuda"] = torch.cuda.get_rng_state(device)
    legacy: Any = np.random.get_state(legacy=True)
    notes["random"] = {"python": random.getstate(), "numpy": [legacy[0], legacy[1].tolist(), *legacy[2:]]}
    return Snapshot({**state, "ranks": world_size}, tensors, notes, shared, rank, tokenizer or {})


def _copy(part: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in part.items()}


def open_pieces(checkpoint: Path) -> pieces.PieceReader:
    """The pieces of all ranks that wrote.

    Raises:
        UserError: a file is missing, or holds what no run writes.
    """
    ranks = int(read_state(checkpoint).get("ranks", 0))
    there = len(list(checkpoint.glob("rank_*.safetensors")))
    if ranks != there or not ranks:
        raise UserError(f"{checkpoint}: expected files of {ranks:,} ranks, as its {STATE} says, found {there:,}")
    try:
        return pieces.PieceReader([checkpoint / file_of(rank) for rank in range(ranks)])
    except (ValueError, OSError, SafetensorError) as error:
        raise UserError(f"{checkpoint} cannot be used: {error}") from error


def restore(
    checkpoint: Path,
    engine: Any,
    objective: nn.Module,
    device: torch.device,
    hooks: "Sequence[Hook]" = (),
    teacher: Teacher | None = None,
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
        if teacher:
            pieces.restore_average(teacher, reader, rank, int(engine.world_size))
        objective_state.load(objective, _load(checkpoint / OBJECTIVE) | stored_rows(reader))
        _restore_random(reader, rank, device)
    except (ValueError, RuntimeError, SafetensorError) as error:
        words = str(error).removeprefix("checkpoint: ")
        raise UserError(f"resume: {checkpoint} does not fit this run: {words}") from error
    for hook in hooks:
        if hook.name:
            hook.load_state_dict(_load(checkpoint / file_of_hook(hook)))


def _restore_random(reader: pieces.PieceReader, rank: int, device: torch.device) -> None:
    cpu, cuda = reader.tensor("random/cpu", rank), reader.tensor("random/cuda", rank)
    if cpu is not None:
        if cpu.dtype != torch.uint8 or cpu.shape != torch.get_rng_state().shape:
            raise ValueError(f"random/cpu is {cpu.dtype} of shape {tuple(cpu.shape)}")
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
