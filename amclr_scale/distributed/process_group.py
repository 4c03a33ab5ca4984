"""The process group, the device, and the seeds of one rank."""

import os
import random
from typing import Literal, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from amclr_scale.config.execution import Run
from amclr_scale.distributed.announcing import Announcer, Waiting
from amclr_scale.distributed.launcher import RankInfo, end_with_launcher, export, ranks_on_node
from amclr_scale.distributed.network import LISTENS
from amclr_scale.distributed.rendezvous import meet, open_store, told_while_joining
from amclr_scale.errors import UserError

T = TypeVar("T")
# In one message, for NCCL as for gloo: ranks whose disk is fast wait there for the last save of those whose disk is
# slow. NCCL's own ten minutes would end them; ranks that are lost are found by the watchdog, much sooner.
LONGEST = default_pg_timeout


def device_type() -> Literal["cuda", "cpu"]:
    """What this process trains on: CUDA where there is a GPU, unless DS_ACCELERATOR=cpu says otherwise."""
    return "cuda" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu" else "cpu"


def named_device(name: str | torch.device) -> torch.device:
    """A device by torch's name for it, such as cpu or cuda:1.

    Raises:
        UserError: torch knows no such name, or has no such device here.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, ImportError) as error:  # no CUDA, no plug-in
        here = "cpu, cuda" if torch.cuda.is_available() else "cpu"
        raise UserError(f"device: expected one that torch has here ({here}), got {name}") from error
    return device


def start(
    rank_info: RankInfo, threads: int | None = None, run: Run | None = None, announcer: Announcer | None = None
) -> torch.device:
    """Join the process group (NCCL on CUDA, gloo on CPU) and take this rank's device.

    Args:
        rank_info: this process among the others.
        threads: CPU threads of this rank; None: OMP_NUM_THREADS, or the machine's cores over the ranks on it.
        run: how long the other ranks are waited for; and whether all see the run folder, which otherwise goes through
            messages over gloo, beside NCCL.
        announcer: has told the others what this rank prepared.

    Raises:
        UserError: this rank has no device of its own, or its port is taken.
        AgreedError: another rank has met a mistake, or does not reach the others.
        AbsentError: other ranks have not come in time.
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
    device = torch.device("cuda", rank_info.local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    keep_float32()

    import deepspeed

    leave_messages_to_gloo()
    backend, waiting, run = "nccl" if cuda else "gloo", Waiting(), run or Run()
    minutes = run.rendezvous_minutes
    if LISTENS in os.environ and rank_info.world_size == 1 and not dist.is_initialized():
        dist.init_process_group(backend, store=open_store(rank_info, 60 * minutes), rank=0, world_size=1)
    if rank_info.world_size > 1 and not dist.is_initialized():
        with told_while_joining(rank_info, minutes, waiting=waiting):
            store, hosts = meet(
                rank_info, backend, minutes, longest=run.prepare_minutes, waiting=waiting, announcer=announcer,
                gloo_too=not run.shared,
            )  # fmt: skip
            if not rank_info.counted:
                os.environ["LOCAL_WORLD_SIZE"] = str(hosts.count(hosts[rank_info.rank]))
            dist.init_process_group(
                backend, store=store, rank=rank_info.rank, world_size=rank_info.world_size, timeout=LONGEST
            )
    with told_while_joining(rank_info, minutes):  # one rank by itself binds its port here
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    torch.set_num_threads(threads or _threads_here())
    return device


def _threads_here() -> int:
    """CPU threads of a rank where nobody has said: torchrun sets OMP_NUM_THREADS for its ranks, and users do."""
    said = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(said) if said.isdigit() and int(said) else max(1, len(os.sched_getaffinity(0)) // ranks_on_node())


def leave_messages_to_gloo() -> None:
    """Keep DeepSpeed from compiling shared-memory collectives for CPUs at first use.

    Minutes of waiting for what gloo does already, and a compile that is killed leaves a lock behind that hangs every
    later run. Nor does it look for compilers and devices for all of its other operators, as it does the first time that
    it is asked for this list, from which it reads this entry alone.
    """
    import deepspeed.ops

    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False


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
