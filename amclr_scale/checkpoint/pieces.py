"""What an engine holds, as named pieces in one portable form: every ZeRO stage and number of ranks reads it.

ZeRO lays parameters end to end in flat tensors and cuts those over ranks. A *piece* is a range of one flattened
parameter, or of an optimizer state of it, under a name that says so:

    parameter/text_tower.token.weight@4096      fp32 master values from element 4096 on
    exp_avg/text_tower.token.weight@4096        Adam's first moment of the same elements
    average/text_tower.token.weight@4096        what a teacher has there (engine/teacher.py)

Each rank writes the pieces that it holds (what all ranks hold alike, they share out), so saving moves nothing between
ranks and no rank ever holds the whole. Loading reads whatever ranges the new layout asks for. The values are copies,
bit for bit: restored in the layout that they were saved in, training goes on as if nothing had happened.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from amclr_scale.checkpoint import contents
from amclr_scale.checkpoint.contents import COUNTERS
from amclr_scale.encoders.rank_buffers import mean_of
from amclr_scale.encoders.weights import saved_parts
from amclr_scale.engine.teacher import Teacher
from amclr_scale.engine.zero.flat_shards import shards_of

MASTER = "parameter"
AVERAGE = "average"
BUFFER, AVERAGED_BUFFER = "buffer/", "averaged_buffer/"


@dataclass(frozen=True)
class Part:
    """A piece, and where it begins in a flat tensor."""

    name: str  # of the parameter
    offset: int  # in the flattened parameter
    start: int  # in the flat tensor
    numel: int


@dataclass(frozen=True)
class Flat:
    """A tensor that the optimizer steps: a whole parameter (stage 0) or this rank's flat share of a group."""

    tensor: Tensor
    parts: tuple[Part, ...]
    everywhere: bool  # all ranks hold the same


def flats(engine: Any) -> Iterator[Flat]:
    """What this rank's optimizer steps."""
    stage = int(engine.zero_optimization_stage())
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    if stage == 0:
        for group in engine.optimizer.param_groups:
            for p in group["params"]:
                yield Flat(p, (Part(names[id(p)], 0, 0, p.numel()),), everywhere=True)
        return
    for tensor, parameters, shard in shards_of(engine.optimizer, stage):
        parts = (Part(names[id(parameters[p.parameter])], p.offset, p.start, p.numel) for p in shard.pieces)
        yield Flat(tensor, tuple(parts), everywhere=False)


def _base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The optimizer that was given to DeepSpeed, inside whatever wraps it."""
    optimizer: torch.optim.Optimizer = engine.optimizer
    return optimizer if int(engine.zero_optimization_stage()) == 0 else engine.optimizer.optimizer


def _state_of(optimizer: torch.optim.Optimizer, tensor: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What is shaped like the tensor, itself among it, and the counters beside it."""
    columns, counters = {MASTER: tensor}, dict[str, Any]()
    for key, value in optimizer.state.get(tensor, {}).items():
        if isinstance(value, Tensor) and value.shape == tensor.shape:
            columns[key] = value
        elif value is not None:
            counters[key] = _to_json(key, value)
    if _counts_in_groups(optimizer) and len(columns) > 1:
        counters = {"step": _to_json("step", max(group.get("step", 0) for group in optimizer.param_groups))}
    return columns, counters


def collect(engine: Any, rank: int, world_size: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Copies of this rank's pieces on the CPU, and what is no tensor, for JSON. All ranks call it together."""
    optimizer, stage = _base_optimizer(engine), int(engine.zero_optimization_stage())
    pieces: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    trained: set[str] = set()
    for index, flat in enumerate(flats(engine)):
        columns, counters = _state_of(optimizer, flat.tensor)
        for part in flat.parts:
            trained.add(part.name)
            if counters:
                scalars[part.name] = counters
            if flat.everywhere and index % world_size != rank:
                continue
            for kind, column in columns.items():
                piece = column.detach().reshape(-1)[part.start : part.start + part.numel]
                pieces[f"{kind}/{part.name}@{part.offset}"] = piece.to("cpu", copy=True)
    parameters = dict(engine.module.named_parameters())
    for index, (name, parameter) in enumerate(parameters.items()):
        if not parameter.requires_grad:
            value = _whole(parameter)
            if index % world_size == rank:
                pieces[f"{MASTER}/{name}@0"] = value.reshape(-1).to("cpu", copy=True)
    for name, buffer in saved_parts(engine.module)[1].items():
        pieces[f"{BUFFER}{name}"] = buffer.detach().to("cpu", copy=True).contiguous()
    notes = {
        "shapes": {name: list(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()},
        "scalars": scalars,
        "counters": {name: int(getattr(engine, name)) for name in COUNTERS},
        "loss_scale": _numbers(engine.optimizer.loss_scaler) if stage and engine.fp16_enabled() else {},
    }
    return pieces, notes


def collect_average(teacher: Teacher, rank: int, world_size: int) -> dict[str, Tensor]:
    """Copies of this rank's pieces of a teacher on the CPU."""
    pieces = {}
    for index, (name, offset, piece) in enumerate(teacher.weights.state()):
        if not teacher.weights.everywhere or index % world_size == rank:
            pieces[f"{AVERAGE}/{name}@{offset}"] = piece.to("cpu", copy=True)
    for name, buffer in teacher.buffers.items():
        pieces[f"{AVERAGED_BUFFER}{name}"] = buffer.to("cpu", copy=True).contiguous()
    return pieces


def restore_average(teacher: Teacher, reader: "PieceReader", rank: int, world_size: int) -> None:
    """Put the pieces where this teacher wants them; where none were saved it is the student, as it was restored.

    All ranks call it together, after `restore`.
    """
    teacher.begin()
    if not reader.has_average:
        return
    for share in teacher.weights.shares:
        for name, piece in share.pieces:
            found = reader.read(AVERAGE, name, piece.offset, piece.numel)
            if found is not None:  # None: it was frozen then
                teacher.weights.load(share, piece, found)
    teacher.weights.send_round()
    for name, buffer in reader.buffers(rank, world_size, AVERAGED_BUFFER).items():
        teacher.buffers[name].copy_(buffer)


def _whole(parameter: Any) -> Tensor:
    if not hasattr(parameter, "ds_id"):
        return parameter.detach()  # type: ignore[no-any-return]
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()  # type: ignore[no-any-return]


def _numbers(scaler: Any) -> dict[str, float]:
    return {key: value for key, value in vars(scaler).items() if isinstance(value, int | float)}


def _to_json(key: str, value: Any) -> dict[str, Any]:
    """A step counter: a number, or a tensor of one."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return {"value": value.item(), "dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
    if isinstance(value, int | float):
        return {"value": value}
    raise TypeError(f"optimizer state {key}: expected a number or a tensor like the parameter, got {type(value)}")


def _counts_in_groups(optimizer: torch.optim.Optimizer) -> bool:
    """NVIDIA apex's optimizers keep the number of steps in their groups, and no counter in their states."""
    return type(optimizer).__module__.startswith("apex.")


def _set_counter(optimizer: torch.optim.Optimizer, tensor: Tensor, key: str, saved: dict[str, Any]) -> None:
    """Put a counter where this optimizer looks for it and in its form, whoever saved it (offload changes the rule).

    torch's optimizers hold it as a tensor, DeepSpeed's as a number, apex's in its groups; others as they saved it.
    """
    value, kind = saved["value"], type(optimizer).__module__
    if kind.startswith("torch.optim.") or ("dtype" in saved and not kind.startswith(("deepspeed.", "apex."))):
        # on the CPU unless fused or capturable
        beside = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
        shape, dtype = tuple(saved.get("shape", ())), getattr(torch, saved.get("dtype", "float32"))
        optimizer.state[tensor][key] = torch.full(shape, value, dtype=dtype, device=tensor.device if beside else "cpu")
        return
    number = int(value) if key == "step" else value
    if _counts_in_groups(optimizer):
        for group in optimizer.param_groups:
            group[key] = number
    else:
        optimizer.state[tensor][key] = number


class PieceReader:
    """The pieces of a checkpoint, whoever wrote them; reads only what is asked for."""

    def __init__(self, files: Sequence[Path]):
        self.files: list[Any] = [safe_open(file, "pt") for file in files]
        self.notes: list[dict[str, Any]] = [contents.parse((f.metadata() or {}).get("notes", "")) for f in self.files]
        for notes in self.notes:
            contents.check_notes(notes)
        self.keys: list[set[str]] = [set(file.keys()) for file in self.files]
        self._pieces: dict[str, list[tuple[int, int, Any, str]]] = {}
        for file, keys in zip(self.files, self.keys, strict=True):
            for key in keys:
                name, at, offset = key.rpartition("@")
                if at:
                    shape = file.get_slice(key).get_shape()
                    if len(shape) != 1 or not offset.isdecimal():
                        raise ValueError(f"a piece {key[:100]!r} of shape {shape}")
                    (numel,) = shape
                    self._pieces.setdefault(name, []).append((int(offset), numel, file, key))
        for found in self._pieces.values():
            found.sort(key=lambda piece: piece[0])
        self.shapes: dict[str, list[int]] = self.notes[0]["shapes"]
        kinds = {name.partition("/")[0] for name in self._pieces}
        self.kinds = sorted(kinds - {MASTER, AVERAGE})  # of the optimizer's states
        self.has_average = AVERAGE in kinds
        self.scalars = {name: saved for notes in self.notes for name, saved in notes["scalars"].items()}

    def has(self, kind: str, name: str) -> bool:
        """Whether a parameter has such a state."""
        return f"{kind}/{name}" in self._pieces

    def read(self, kind: str, name: str, offset: int, numel: int) -> Tensor | None:
        """Elements [offset, offset + numel) of a flattened parameter or state, (numel,); None: it has no such state.

        Raises:
            ValueError: the files do not hold all of them.
        """
        pieces = self._pieces.get(f"{kind}/{name}")
        if pieces is None:
            return None
        found, at = [], offset
        for begin, length, file, key in pieces:
            stop = min(begin + length, offset + numel)
            if begin <= at < stop:
                found.append(file.get_slice(key)[at - begin : stop - begin])
                at = stop
        if at != offset + numel:
            raise ValueError(f"checkpoint: {kind}/{name} ends at element {at}, expected {offset + numel}")
        return found[0] if len(found) == 1 else torch.cat(found)

    def whole(self, name: str, kind: str = MASTER) -> Tensor:
        """A parameter (or a state of it) in its own shape, fp32."""
        shape = torch.Size(self.shapes[name])
        found = self.read(kind, name, 0, shape.numel())
        if found is None:
            raise ValueError(f"checkpoint: it holds no {kind} of {name}")
        return found.view(shape)

    def tensor(self, key: str, rank: int) -> Tensor | None:
        """A tensor that each rank wrote for itself; None where the checkpoint had no such rank."""
        if rank >= len(self.files) or key not in self.keys[rank]:
            return None
        tensor: Tensor = self.files[rank].get_tensor(key)
        return tensor

    def buffers(self, rank: int, ranks: int, kind: str = BUFFER) -> dict[str, Tensor]:
        """The model's buffers, as this rank of so many had them; those of all averaged where other ranks wrote."""
        return self._buffers_of(rank, kind) if ranks == len(self.files) else self.averaged_buffers(kind)

    def averaged_buffers(self, kind: str = BUFFER) -> dict[str, Tensor]:
        """One set of the model's buffers (or a teacher's), whatever the ranks had."""
        everyone = [self._buffers_of(rank, kind) for rank in range(len(self.files))]
        return {name: mean_of([buffers[name] for buffers in everyone]) for name in everyone[0]}

    def _buffers_of(self, rank: int, kind: str) -> dict[str, Tensor]:
        keys = (key for key in self.keys[rank] if key.startswith(kind))
        return {key.removeprefix(kind): self.files[rank].get_tensor(key) for key in keys}


@torch.no_grad()
def restore(engine: Any, reader: PieceReader, rank: int) -> None:
    """Put masters, optimizer states, weights and buffers where this engine wants them. All ranks call it together.

    Raises:
        ValueError: the checkpoint is of another model.
    """
    parameters = dict(engine.module.named_parameters())
    shapes = {name: list(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()}
    if shapes != reader.shapes:
        wrong = sorted(n for n in {*shapes, *reader.shapes} if shapes.get(n) != reader.shapes.get(n))
        raise ValueError(f"checkpoint: it holds another model; {wrong[0]} and {len(wrong) - 1} more differ")
    optimizer = _base_optimizer(engine)
    optimizer.state.clear()
    for flat in flats(engine):
        _restore_flat(flat, optimizer, reader)
    for name, parameter in parameters.items():
        _set(parameter, reader, name, rank)
    buffers = reader.buffers(rank, int(engine.world_size))
    for name, buffer in saved_parts(engine.module)[1].items():
        buffer.copy_(buffers[name])
    notes = reader.notes[0]
    for name, value in notes["counters"].items():
        setattr(engine, name, value)
    if engine.fp16_enabled():
        known = _numbers(engine.optimizer.loss_scaler)
        for name, value in notes["loss_scale"].items():
            if name not in known:
                raise ValueError(f"checkpoint: a loss scaler's {name[:40]!r}, which it does not have")
            setattr(engine.optimizer.loss_scaler, name, value)


def _restore_flat(flat: Flat, optimizer: torch.optim.Optimizer, reader: PieceReader) -> None:
    """The masters in a flat tensor and the optimizer's state of it."""
    _fill(flat, flat.tensor, MASTER, reader)
    names = [part.name for part in flat.parts] or list(reader.scalars)[:1]  # no parts: padding alone
    counters = [reader.scalars[name] for name in names if name in reader.scalars]
    for kind in reader.kinds:
        if flat.everywhere and not reader.has(kind, names[0]):
            continue
        column = torch.zeros_like(flat.tensor)
        _fill(flat, column, kind, reader)
        optimizer.state[flat.tensor][kind] = column
    furthest: dict[str, Any] = max(counters, key=lambda saved: max(v["value"] for v in saved.values()), default={})
    for key, saved in furthest.items():
        _set_counter(optimizer, flat.tensor, key, saved)


def _fill(flat: Flat, column: Tensor, kind: str, reader: PieceReader) -> None:
    """Copy a kind's pieces into a tensor shaped like the flat one; what was never saved stays."""
    for part in flat.parts:
        found = reader.read(kind, part.name, part.offset, part.numel)
        if found is None:
            continue
        if flat.everywhere:
            column.copy_(found.view(column.shape))
        else:
            column.view(-1)[part.start : part.start + part.numel].copy_(found)


def _set(parameter: nn.Parameter | Any, reader: PieceReader, name: str, rank: int) -> None:
    """The weight that the module computes with."""
    if not hasattr(parameter, "ds_id"):
        parameter.copy_(reader.whole(name))
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        if rank == 0:  # the others are sent it
            parameter.copy_(reader.whole(name))
