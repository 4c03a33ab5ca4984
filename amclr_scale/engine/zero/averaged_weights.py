"""A moving average of the trained weights in fp32, at every ZeRO stage, and the module computing with it for a while.

The average follows the fp32 masters that the optimizer steps, not the weights that the module computes with: in bf16 a
weight that moves by a thousandth of itself does not move at all, and the average of a run in bf16 is that of the run.

    stage 0        a copy of each parameter
    stages 1, 2    each rank averages the share of the masters that it has, and the shares are sent round: all ranks
                   have the whole, 4 bytes a parameter, for one all-gather per step
    stage 3        each rank has its share alone, cut as the parameters are, and nothing is sent

There is no second module. `in_module` puts the average where the weights are, so that whatever runs the module (the
engine, with its hooks at stage 3) runs the average, and puts the weights back, bit for bit.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amclr_scale.distributed.collectives import all_gather, gather_shares, rank, world_size
from amclr_scale.distributed.process_group import gather_objects
from amclr_scale.distributed.purpose import purpose
from amclr_scale.engine.zero.flat_shards import Piece, shards_of


@dataclass(frozen=True)
class Share:
    """What this rank averages of some parameters, in fp32.

    Attributes:
        own: the average; of a whole parameter in its shape (stage 0), or flat.
        master: the tensor that the optimizer steps, of the same shape.
        pieces: names of the parameters in it, and where they lie.
        whole: (W n,) of which `own` is a part (stages 1 and 2).
    """

    own: Tensor
    master: Tensor
    pieces: tuple[tuple[str, Piece], ...]
    whole: Tensor | None = None


class AveragedWeights:
    """The average, at first the weights themselves. All ranks make it, and call everything, together.

    Attributes:
        shares: what this rank averages.
        everywhere: whether all ranks average the same (stage 0).
    """

    def __init__(self, engine: Any):
        self.engine, self.stage = engine, int(engine.zero_optimization_stage())
        self.everywhere = self.stage == 0
        self._parameters: dict[str, Any] = dict(engine.module.named_parameters())
        self._whole: dict[str, Tensor] = {}  # by name, at stages 0 to 2
        self.shares = list(self._of_parameters() if self.stage == 0 else self._of_flat_tensors())
        self.follow(0.0)

    def _of_parameters(self) -> Iterator[Share]:
        for name, parameter in self._parameters.items():
            if parameter.requires_grad:
                self._whole[name] = own = parameter.detach().clone()
                yield Share(own, parameter.detach(), ((name, Piece(0, 0, 0, own.numel())),))

    def _of_flat_tensors(self) -> Iterator[Share]:
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        for master, parameters, shard in shards_of(self.engine.optimizer, self.stage):
            pieces = tuple((names[id(parameters[piece.parameter])], piece) for piece in shard.pieces)
            if self.stage == 3:
                yield Share(torch.zeros_like(master), master, pieces)
                continue
            n = master.numel()
            whole = torch.zeros(world_size() * n, dtype=torch.float32, device=parameters[0].device)
            places = {
                (name, owner * n + piece.start - piece.offset)
                for owner, theirs in enumerate(gather_objects(pieces))
                for name, piece in theirs
            }
            begins = dict(places)
            assert len(begins) == len(places) == len(parameters), "a parameter's pieces do not lie end to end"
            for name, begin in begins.items():
                shape = self._parameters[name].shape
                self._whole[name] = whole[begin : begin + shape.numel()].view(shape)
            yield Share(whole[rank() * n : (rank() + 1) * n], master, pieces, whole)

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Become decay * average + (1 - decay) * masters; 0: the masters."""
        if self.everywhere:
            torch._foreach_lerp_([s.own for s in self.shares], [s.master for s in self.shares], 1 - decay)
            return
        for share in self.shares:
            share.own.lerp_(share.master.to(share.own.device), 1 - decay)
        self.send_round()

    def send_round(self) -> None:
        """After a change of `own`: have all ranks know it, where they keep the whole."""
        with purpose("moving average"):
            for share in self.shares:
                if share.whole is not None:
                    gather_shares(share.whole)

    @contextmanager
    def in_module(self, dtype: torch.dtype, but: Collection[str] = ()) -> Iterator[None]:
        """Inside it the module computes with the average, without gradient; then its weights are what they were.

        Args:
            dtype: what the average computes in. At stage 3 it is that of the weights.
            but: names of parameters that stay as they are.
        """
        if self.stage == 3:
            with self._in_shares_of_weights(but):
                yield
            return
        before = {name: self._parameters[name].data for name in self._whole if name not in but}
        try:
            for name in before:
                self._parameters[name].data = self._whole[name].to(dtype)
            yield
        finally:
            for name, weights in before.items():
                self._parameters[name].data = weights

    @contextmanager
    def _in_shares_of_weights(self, but: Collection[str]) -> Iterator[None]:
        """DeepSpeed gathers what it finds in the shares: nothing may be gathered already when they change."""
        zero = self.engine.optimizer
        weights = {n: p.ds_tensor for n, p in self._parameters.items() if p.requires_grad and n not in but}
        before = {name: tensor.detach().clone() for name, tensor in weights.items()}
        zero.parameter_offload.partition_all_parameters()
        with torch.no_grad():
            try:
                for share in self.shares:
                    for name, piece in share.pieces:
                        if name in weights:
                            weights[name][: piece.numel].copy_(share.own[piece.start : piece.start + piece.numel])
                yield
            finally:
                zero.parameter_offload.partition_all_parameters()
                for name, tensor in weights.items():
                    tensor.copy_(before[name])
                zero.invalidate_secondary_tensor()
                if zero.persistent_parameters:  # as after an optimizer step
                    zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def state(self) -> Iterator[tuple[str, int, Tensor]]:
        """This rank's part, for a checkpoint: name of the parameter, offset in it when flattened, (n,) fp32."""
        for share in self.shares:
            for name, piece in share.pieces:
                yield name, piece.offset, share.own.reshape(-1)[piece.start : piece.start + piece.numel]

    @torch.no_grad()
    def load(self, share: Share, piece: Piece, values: Tensor) -> None:
        """Put values (n,) where a piece of a parameter lies; `send_round` afterwards."""
        if self.everywhere:
            share.own.copy_(values.view(share.own.shape))
        else:
            share.own[piece.start : piece.start + piece.numel].copy_(values)

    @torch.no_grad()
    def whole(self) -> dict[str, Tensor]:
        """The average of every trained parameter in its shape, fp32, on the host."""
        if self.stage < 3:
            return {n: self._whole[n].to("cpu", copy=True) for n in self._parameters if n in self._whole}
        found = {}
        mine = {name: (share, piece) for share in self.shares for name, piece in share.pieces}
        for name, parameter in self._parameters.items():
            if not parameter.requires_grad:
                continue
            part = torch.zeros(parameter.ds_tensor.ds_numel, dtype=torch.float32, device=self.engine.device)
            if name in mine:
                share, piece = mine[name]
                part[: piece.numel].copy_(share.own[piece.start : piece.start + piece.numel])
            found[name] = all_gather(part)[: parameter.ds_numel].view(parameter.ds_shape).cpu()
        return found
