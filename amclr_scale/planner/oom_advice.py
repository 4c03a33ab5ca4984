"""What to turn down when memory has run out: the largest component, its key, and a value of that key that fits.

    advise(config, phase="pass_2", ...)      # in a process of its own: seconds, and only when it has happened

The account pretends to be many ranks, which it cannot do inside a process group, and the process that ran out has none
to spare. So a fresh one is asked, on the host: it reads the configuration and prints a line.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from amclr_scale.config.schema import Config
from amclr_scale.distributed.launcher import RankInfo
from amclr_scale.errors import UserError
from amclr_scale.memory.account import Account, account
from amclr_scale.memory.components import Phase
from amclr_scale.memory.units import in_words
from amclr_scale.planner.settings import changed

TIMEOUT = 180.0  # seconds; a run that has failed waits no longer


def limit_of(device: torch.device, ranks_here: int) -> int:
    """Bytes that this process may have on its device: what it holds, and its share of what is free.

    Args:
        ranks_here: on this host, which share its memory.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) + int(torch.cuda.memory_reserved(device))
    return int(psutil.Process().memory_info().rss) + int(psutil.virtual_memory().available) // ranks_here


def advise(config: Config, *, rank_info: RankInfo, num_samples: int, device: torch.device, phase: str) -> str:
    """A sentence for an error message. Never raises: an error is being told already.

    Args:
        config: of the run, settled.
        num_samples: N, the size of the data set.
        phase: where memory ran out.
    """
    asked = {
        "config": config.model_dump(mode="json"), "world_size": rank_info.world_size, "num_samples": num_samples,
        "device": device.type, "phase": phase, "limit": limit_of(device, rank_info.local_world_size),
    }  # fmt: skip
    package = str(Path(__file__).resolve().parents[2])  # found from anywhere, also where it is not installed
    command = [sys.executable, "-W", "ignore", "-m", "amclr_scale.planner.oom_advice"]
    elsewhere = os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}  # where memory is full
    elsewhere["PYTHONPATH"] = os.pathsep.join(path for path in (package, os.environ.get("PYTHONPATH")) if path)
    try:
        answer = subprocess.run(
            command, input=json.dumps(asked), capture_output=True, text=True, timeout=TIMEOUT, check=True,
            env=elsewhere,
        )  # fmt: skip
    except (subprocess.SubprocessError, OSError) as error:
        return f"the memory account gave no answer: {str(error).splitlines()[0]}"
    return str(json.loads(answer.stdout.splitlines()[-1]))


def sentence(config: Config, *, world_size: int, num_samples: int, device: str, phase: Phase, limit: int) -> str:
    """The largest component of a phase, and the first change of one key with which the whole fits.

    Args:
        limit: bytes of the device that one rank may take.
    """

    def predicted(settings: dict[str, Any]) -> Account:
        wanted = changed(config, **settings)
        return account(wanted, world_size=world_size, num_samples=num_samples, device=device)

    now = predicted({})
    told = f"predicted {now.advice(limit, phase)}"
    if now.peak_bytes <= limit:
        return f"{told}\nthat should fit {in_words(limit)}: something beside this run takes memory"
    for settings in _changes(config, now.largest(phase).kind, now.micro_batch_sizes, world_size):
        try:
            peak = predicted(settings).peak_bytes
        except UserError:
            continue
        if peak <= limit:
            words = " ".join(f"execution.{key}={value}" for key, value in settings.items())
            return f"{told}\n{words} fits: {in_words(peak)} of {in_words(limit)}"
    return f"{told}\nno single key is enough: amclr-scale fit --memory {in_words(limit).replace(' ', '')} looks at all"


def _changes(
    config: Config, kind: str, micro_batch_sizes: tuple[int, int], world_size: int
) -> Iterator[dict[str, Any]]:
    """Changes of one key, those for this kind of component first."""
    execution, largest = config.execution, max(micro_batch_sizes)

    def smaller_micro_batches() -> Iterator[dict[str, Any]]:
        text, size = execution.text_micro_batch_size, largest // 2
        while size:
            yield {"micro_batch_size": size} | ({} if text is None else {"text_micro_batch_size": min(text, size)})
            size //= 2

    def similarity() -> Iterator[dict[str, Any]]:
        for chunk in (1024, 512, 256, 128):
            if execution.similarity.chunk == "auto" or chunk < execution.similarity.chunk:
                yield {"similarity.chunk": chunk}
        if world_size > 1:
            yield {"similarity.gather": "ring"}

    def stages() -> Iterator[dict[str, Any]]:
        if world_size > 1:
            yield from ({"zero_stage": stage} for stage in range(execution.zero_stage + 1, 4))

    first = {"activations": smaller_micro_batches, "similarity": similarity, "features": similarity}.get(kind, stages)
    for changes in (first, *(each for each in (smaller_micro_batches, similarity, stages) if each is not first)):
        yield from changes()


if __name__ == "__main__":
    given = json.load(sys.stdin)
    torch.set_num_threads(1)
    print(json.dumps(sentence(Config(**given.pop("config")), **given)))
