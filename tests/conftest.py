"""Pools of CPU ranks over gloo, started once a session: `ranks(n, fn, *args)` runs fn on n ranks.

`gpu(fn, *args)` runs it on one rank with a GPU over NCCL.

`fn` is a function of a test module (it travels by name) and may use torch.distributed freely. The answers come
back in rank order; an error in any rank is raised in the test with that rank's traceback.
"""

import faulthandler
import functools
import gc
import os
import re
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

torch.set_num_threads(1)

SECONDS_PER_CALL = 240
TESTS = Path(__file__).parent

# `make test-fast` leaves them out, their imports too: what is long here by its nature.
LONG_FILES = {
    "commands/test_agreement", "commands/test_dry_run", "data/test_resident", "encoders/test_decay",
    "encoders/test_depths", "encoders/test_start", "encoders/test_start_hub", "encoders/test_start_open_clip",
    "encoders/test_towers", "encoders/test_trial",
    "evaluation/test_evaluate",
    "evaluation/test_foreign", "memory/test_towers", "metrics/test_flops", "objectives/banks/test_learning",
    "study/test_report", "study/test_report_cases", "study/test_statistics", "study/test_statistics_resampling",
    "study/test_statistics_sweeps", "study/test_tuning", "trained/test_text_towers",
}  # fmt: skip

# The longest first, so that processes that share the files end together: what takes more than 20 s, and waits a lot.
FIRST = (
    "cluster/test_cluster", "checkpoint/test_interruptions", "commands/test_train", "checkpoint/test_supervise_elastic",
    "engine/test_step", "memory/test_objective_memory", "engine/test_product", "objectives/test_outside",
    "planner/test_traffic", "trained/test_text_towers", "similarity/test_triton_interpreted", "test_wheel",
    "study/test_launchers", "similarity/test_memory", "commands/test_additions", "objectives/test_family",
    "test_examples", "test_walkthroughs", "planner/test_search", "engine/test_teacher", "engine/test_stage3_init",
    "commands/test_randomness", "evaluation/test_evaluate", "objectives/test_amclr", "tools/test_benchmark_step",
    "checkpoint/test_supervise", "checkpoint/test_remote_copy", "objectives/banks/test_shared_queue",
    "engine/precision/test_amp", "engine/zero/test_module_order", "memory/test_towers", "engine/test_device",
    "data/test_tokenizers",
)  # fmt: skip


def _name(path: Path) -> str:
    return path.relative_to(TESTS).with_suffix("").as_posix() if path.is_relative_to(TESTS) else ""


def _is_long(path: Path) -> bool:
    return _name(path) in LONG_FILES


MARKED = re.compile(r"^pytestmark = \[?\s*pytest\.mark\.(\w+)", re.MULTILINE)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files of which no test is asked for need not be imported: long ones, and those that are marked as a whole."""
    wanted = config.option.markexpr
    left_out = set() if " or " in wanted else set(re.findall(r"\bnot (\w+)", wanted))
    if "slow" in left_out and _is_long(collection_path):
        return True
    if left_out and collection_path.match("test_*.py"):
        return True if left_out & set(MARKED.findall(collection_path.read_text("utf-8"))) else None
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what starts ranks or builds an engine by what it uses, and long files: `make test-fast` leaves them out."""
    for item in items:
        if " at 0x" in item.nodeid:  # processes that share the work would not know each other's tests
            raise pytest.UsageError(f"{item.nodeid}: expected a name without an address; give its parameters ids")
        if _is_long(item.path):
            item.add_marker("slow")
        if {"ranks", "gpu"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("ranks")
        if hasattr(getattr(item, "module", None), "build_engine"):
            item.add_marker("deepspeed")
    place = {name: number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(_name(item.path), len(FIRST)))


def pytest_collection_finish() -> None:
    """What is imported by now stays: the garbage collector need not look at it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """What a test draws without a seed of its own, and how sums are cut, does not depend on the tests before it."""
    if torch.cuda.is_initialized():
        torch.manual_seed(0)
    else:  # without noting a stack for every kind of device that may be found later
        torch.default_generator.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    """A test that leaves variables of several ranks behind would have later ones wait for ranks that never come."""
    yield
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        left = {name: os.environ.pop(name, None) for name in names}
        pytest.fail(f"expected no ranks in os.environ after a test, got {left}; set them with monkeypatch")


def _serve(rank: int, world_size: int, store: str, pipe: Connection, device: str) -> None:
    import torch.distributed as dist

    faulthandler.enable()  # a rank that dies without a traceback says where it was
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), DS_ACCELERATOR=device)
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world_size)
    while True:
        fn, args, kwargs = pipe.recv()
        try:
            pipe.send((True, fn(*args, **kwargs)))
        except Exception:
            pipe.send((False, traceback.format_exc()))


@functools.cache
def _fork_server() -> Any:
    """One process imports what ranks need, and each rank of every pool is a copy of it: 0.1 s instead of 2.5 s."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.engine.towers", "torch._dynamo"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")  # or DeepSpeed would ask for GPUs, which copies could not use
        forkserver.ensure_running()
    return context


class RankPool:
    """`world_size` processes that wait for functions to run."""

    def __init__(self, world_size: int, folder: str, device: str = "cpu"):
        context = _fork_server() if device == "cpu" else mp.get_context("spawn")
        store = os.path.join(folder, f"store{world_size}")  # a file, not a port: nothing to collide with
        self.pipes, self.processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, store, theirs, device), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def __call__(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((fn, args, kwargs))
        answers: dict[int, Any] = {}
        while len(answers) < len(self.pipes):
            waiting = [p for r, p in enumerate(self.pipes) if r not in answers]
            ready = wait_for(waiting, timeout=SECONDS_PER_CALL)
            if not ready:
                raise TimeoutError(f"{fn.__name__}: ranks {set(range(len(self.pipes))) - set(answers)} did not answer")
            for pipe in ready:
                rank = self.pipes.index(pipe)  # type: ignore[arg-type]
                ok, answer = pipe.recv()  # type: ignore[union-attr]
                if not ok:
                    raise RuntimeError(f"rank {rank} of {len(self.pipes)}:\n{answer}")
                answers[rank] = answer
        return [answers[rank] for rank in range(len(self.pipes))]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


@contextmanager
def _pools(device: str) -> Iterator[Callable[..., list[Any]]]:
    """A function that runs functions on any number of ranks, in processes that it keeps."""
    with tempfile.TemporaryDirectory() as folder:
        pools: dict[int, RankPool] = {}

        def run(world_size: int, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
            if world_size not in pools:
                pools[world_size] = RankPool(world_size, tempfile.mkdtemp(dir=folder), device)
            try:
                return pools[world_size](fn, *args, **kwargs)
            except BaseException:  # also what ends a test whose time is over, or the next one would read its answers
                pools.pop(world_size).close()  # its ranks may be out of step with one another: start afresh
                raise

        try:
            yield run
        finally:
            for pool in pools.values():
                pool.close()


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[..., list[Any]]]:
    """`ranks(n, fn, *args, **kwargs)`: fn on n gloo ranks; a list of answers in rank order."""
    with _pools("cpu") as run:
        yield run


@pytest.fixture(scope="module")
def gpu() -> Iterator[Callable[..., Any]]:
    """`gpu(fn, *args, **kwargs)`: fn in a process with a GPU, the only rank over NCCL."""
    with _pools("cuda") as run:
        yield lambda fn, *args, **kwargs: run(1, fn, *args, **kwargs)[0]
