"""A process group that is none: collectives of so many ranks, in one process, that send nothing."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


@contextmanager
def pretended(world_size: int) -> Iterator[None]:
    """A process group of so many ranks that sends nothing, and one thread: what runs in it is small.

    Leaves random numbers and threads as they were.
    """
    import torch.testing._internal.distributed.fake_pg  # registers the backend called "fake"

    if dist.is_initialized():
        raise RuntimeError("account: ask before the process group starts; it pretends to be one")
    random_state, hook, threads = torch.get_rng_state(), sys.excepthook, torch.get_num_threads()
    dist.init_process_group("fake", rank=0, world_size=world_size, store=torch._C._distributed_c10d.HashStore())
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        dist.destroy_process_group()
        torch.set_rng_state(random_state)
        sys.excepthook = hook  # which a process group replaces by one that names its rank
