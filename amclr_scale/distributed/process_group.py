"""The process group, the device, and the seeds of one rank."""

import contextlib
import os
import random
import sys
import threading
import time
from collections.abc import Iterator
from typing import Literal, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist

from amclr_scale.distributed.launcher import RankInfo, end_with_launcher, export
from amclr_scale.errors import UserError

T = TypeVar("T")
_SHELLS = ("bash", "sh", "zsh", "fish", "interactive")  # what SLURM calls a job that is a shell


def device_type() -> Literal["cuda", "cpu"]:
    """What this process trains on: CUDA where there is a GPU, unless DS_ACCELERATOR=cpu says otherwise."""
    return "cuda" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu" else "cpu"


def start(rank_info: RankInfo, threads: int | None = None) -> torch.device:
    """Join the process group (NCCL on CUDA, gloo on CPU) and take this rank's device.

    Args:
        rank_info: this process among the others.
        threads: CPU threads of this rank; None: the machine's cores over the ranks on it.

    Raises:
        UserError: this rank has no device of its own.
    """
    cuda = device_type() == "cuda"
    if cuda and rank_info.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"CUDA_VISIBLE_DEVICES: expected a device for each of the {rank_info.local_world_size} ranks on this node, "
            f"got {torch.cuda.device_count()} for local rank {rank_info.local_rank}; start no more ranks than devices, "
            "and let every rank see all of its node's (SLURM: --gpus-per-node, not --gpus-per-task)"
        )
    export(rank_info)
    if rank_info.world_size > 1:
        end_with_launcher()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if cuda else "cpu")
    torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // rank_info.local_world_size))
    device = torch.device("cuda", rank_info.local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    keep_float32()

    import deepspeed

    leave_messages_to_gloo()
    if not dist.is_initialized():
        with told_while_joining(rank_info):
            deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", auto_mpi_discovery=False, verbose=False)
    return device


@contextlib.contextmanager
def told_while_joining(rank_info: RankInfo, first: float = 10.0, every: float = 60.0) -> Iterator[None]:
    """Say that this rank waits for others, if it has to.

    Args:
        rank_info: this process among the others.
        first: seconds after which it is said.
        every: seconds from then on.

    Raises:
        UserError: rank 0's port is taken.
    """
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    joined, began = threading.Event(), time.monotonic()
    shell = ""
    if "SLURM_PROCID" in os.environ and os.environ.get("SLURM_JOB_NAME") in _SHELLS:
        shell = "; started from an interactive srun shell? It holds one of the tasks: put srun before the command"

    def tell() -> None:
        pause = first
        while not joined.wait(pause):
            waited, pause = time.monotonic() - began, every
            print(
                f"rank {rank_info.rank} has waited {waited:.0f} s for the other {rank_info.world_size - 1} of "
                f"{rank_info.world_size} ranks to come to {host}:{port}{shell}",
                file=sys.stderr,
                flush=True,
            )

    thread = threading.Thread(target=tell, name="joining", daemon=True)
    if rank_info.world_size > 1 and (rank_info.rank == 0 or rank_info.local_rank == 0):
        thread.start()
    try:
        yield
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            f"MASTER_PORT: expected a free port on {host}, got {port}, on which another program listens, perhaps "
            "another run; choose another (deepspeed --master_port N, torchrun --master-port N, else MASTER_PORT=N)"
        ) from error
    finally:
        joined.set()
        if thread.is_alive():
            thread.join()


def leave_messages_to_gloo() -> None:
    """Keep DeepSpeed from compiling shared-memory collectives for CPUs at first use.

    Minutes of waiting for what gloo does already, and a compile that is killed leaves a lock behind that hangs every
    later run.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def keep_float32() -> None:
    """Convolutions of float32 in float32 on CUDA, as matrix products are: torch's default rounds to TF32's ten bits."""
    torch.backends.cudnn.allow_tf32 = False


def stop() -> None:
    """Leave the process group, so that the last messages of all ranks are through before any ends."""
    if dist.is_initialized():
        if dist.get_world_size() > 1:
            dist.barrier()
        dist.destroy_process_group()


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed python, numpy and torch (all devices). Ranks with different numbers draw different dropout masks."""
    random.seed(seed * 1_000_003 + rank)
    np.random.seed((seed * 1_000_003 + rank) % 2**32)
    torch.manual_seed(seed * 1_000_003 + rank)


def broadcast_object(value: T | None) -> T:
    """Rank 0's object, on every rank; what the others bring does not count."""
    box = [value]
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return cast(T, box[0])


def gather_objects(value: T) -> list[T]:
    """Every rank's object, in rank order, on every rank."""
    everyone = [value]
    if dist.is_initialized() and dist.get_world_size() > 1:
        everyone = [value] * dist.get_world_size()
        dist.all_gather_object(everyone, value)
    return everyone
