"""What a device can do: GPUs by their vendor's data sheet (devices.yaml), this machine's CPU by measuring it.

    find_profile("h100").peak("bf16")       # FLOP/s
    profile_of(torch.device("cuda"))        # by the device's name; None where no data sheet is on file
    measure_cpu(threads=1, ranks=2)         # a second of products, copies and messages

A data sheet's figures are peaks. What of them a job reaches is the business of whoever uses a profile.
"""

import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import psutil
import torch
import yaml

from amclr_scale.errors import UserError, nearest
from amclr_scale.precision import DTYPES, PRODUCTS

FILE = Path(__file__).with_name("devices.yaml")
GIGA, TERA, GIB = 1e9, 1e12, 2**30


@dataclass(frozen=True)
class Utilisation:
    """Shares of a peak that a whole training step reaches: where most lie between `least` and `most`."""

    least: float
    usual: float
    most: float
    source: str


USUAL = Utilisation(0.15, 0.3, 0.5, "a guess")


@dataclass(frozen=True)
class DeviceProfile:
    """One device; rates are per second, links per direction."""

    name: str
    type: str  # cpu or cuda, as torch.device says
    source: str
    match: str
    memory_bytes: int
    peaks: tuple[tuple[str, float], ...]  # FLOP/s of dense matrix products by bf16, fp16, tf32, fp32
    memory_bandwidth: float  # bytes/s
    link: float  # bytes/s to the other devices of the node
    host_link: float  # bytes/s to the host's memory
    node_link: float  # bytes/s to other nodes
    measured: bool = False  # here, rather than stated by its vendor
    utilisation: Utilisation = USUAL

    def peak(self, precision: str, *, tf32: bool = False) -> float:
        """FLOP/s of dense matrix products.

        Args:
            precision: as execution.precision.
            tf32: whether float32 products go through tensor cores (torch.set_float32_matmul_precision("high")).
        """
        return dict(self.peaks)["tf32" if precision == "fp32" and tf32 else PRODUCTS[precision]]


@cache
def profiles() -> dict[str, DeviceProfile]:
    """Name -> profile of every device on file."""
    return {
        name: DeviceProfile(
            name=name,
            type="cuda",
            source=" ".join(entry["source"].split()),
            match=entry["match"],
            memory_bytes=round(entry["memory_gib"] * GIB),
            peaks=tuple((p, entry[p] * TERA) for p in ("bf16", "fp16", "tf32", "fp32")),
            memory_bandwidth=entry["memory_gbs"] * GIGA,
            link=entry["link_gbs"] * GIGA,
            host_link=entry["host_gbs"] * GIGA,
            node_link=entry["node_gbs"] * GIGA,
            utilisation=Utilisation(*entry["utilisation"]) if "utilisation" in entry else USUAL,
        )
        for name, entry in yaml.safe_load(FILE.read_text()).items()
    }


def find_profile(name: str) -> DeviceProfile:
    """A profile by name, whatever its case and punctuation: `h100`, `a100-40gb`, `rtx4090`; `a100` is the 80 GB one.

    Raises:
        UserError: none is called so.
    """

    def plain(text: str) -> str:
        return "".join(c for c in text.lower() if c.isalnum())

    known = {plain(key): profile for key, profile in profiles().items()}
    found = known.get(plain(name)) or next((p for key, p in known.items() if key.startswith(plain(name) or "?")), None)
    if found is None:
        hint = "".join(f"; did you mean {known[key].name!r}?" for key in nearest(plain(name), known))
        raise UserError(f"device: expected cpu or one of {', '.join(profiles())}, got {name!r}{hint}")
    return found


def profile_of(device: torch.device) -> DeviceProfile | None:
    """The profile of a CUDA device, with the memory that it really has; None for a CPU, and where none is on file."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    found = max((p for p in profiles().values() if p.match in name), key=lambda p: len(p.match), default=None)
    memory = torch.cuda.get_device_properties(device).total_memory
    return None if found is None else replace(found, memory_bytes=memory)


def device_peak(device: torch.device, precision: str) -> float | None:
    """FLOP/s of one device, as its float32 products are computed now; None where no data sheet is on file (CPUs)."""
    found = profile_of(device)
    return None if found is None else found.peak(precision, tf32=torch.get_float32_matmul_precision() != "highest")


def _best(run: Callable[[], object], seconds: float = 0.15) -> float:
    """Seconds of the fastest of some runs: what the machine can do when nobody else uses it."""
    run()
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        begin = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begin)
    return best


def _loopback_rate(size: int = 2**24) -> float:
    """Bytes per second between two threads over TCP on this machine, which is what gloo's ranks do."""
    payload, buffer = bytes(size), bytearray(size)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as sender:
        receiver, _ = server.accept()

        def once() -> None:
            thread = threading.Thread(target=sender.sendall, args=(payload,))
            thread.start()
            left = memoryview(buffer)
            while left:
                left = left[receiver.recv_into(left) :]
            thread.join()

        with receiver:
            return size / _best(once)


def measure_cpu(*, threads: int, ranks: int = 1) -> DeviceProfile:
    """Measure this machine with so many threads per rank, and share its memory among the ranks on it. Takes a second.

    Half precision is measured too: on CPUs without units for it, it is slower than float32.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        peaks = {}
        for name in ("fp32", "bf16", "fp16"):
            dtype = DTYPES[name]
            n = 1024 if dtype == torch.float32 else 256
            a, b = (torch.randn(n, n).to(dtype) for _ in range(2))
            peaks[name] = 2 * n**3 / _best(partial(torch.mm, a, b))
        source, target = torch.zeros(2**25, dtype=torch.uint8), torch.zeros(2**25, dtype=torch.uint8)
        copied = 2 * len(source) / _best(lambda: target.copy_(source))  # read and written
    finally:
        torch.set_num_threads(before)
    link = _loopback_rate()
    return DeviceProfile(
        name=f"CPU, {threads} thread{'s' * (threads > 1)} per rank",
        type="cpu",
        source=f"measured here: products of 1024 x 1024, a copy of 32 MiB, TCP on the loopback; {os.cpu_count()} cores",
        match="",
        memory_bytes=psutil.virtual_memory().total // ranks,
        peaks=tuple((p, peaks["fp32" if p == "tf32" else p]) for p in ("bf16", "fp16", "tf32", "fp32")),
        memory_bandwidth=copied,
        link=link,
        host_link=copied,
        node_link=link,
        measured=True,
    )
