"""Nodes that share no run folder (run.shared=false): node 2 has a file system of its own where node 1 has the run."""

import json
from dataclasses import dataclass
from pathlib import Path

from amclr_scale.checkpoint import files, marks
from tools.cluster.runs import Runs

WORDS = ("run.shared=false", "execution.zero_stage=2")  # each rank has half of the state


@dataclass
class Saving:
    """What saving to node 1 cost, over all checkpoints."""

    checkpoints: int
    bytes: int  # of one
    sent: int  # of them
    seconds: float  # median of sending
    written: float  # median of writing, each rank on its own node

    def words(self) -> str:
        """For people."""
        return (
            f"Of a run whose nodes share no folder: {self.checkpoints} checkpoints of {self.bytes / 2**20:.1f} MiB, "
            f"written in {1e3 * self.written:.0f} ms on the nodes (median); {self.sent / 2**20:.1f} MiB of each were "
            f"then sent to node 1, in {1e3 * self.seconds:.0f} ms."
        )


def separate(runs: Runs, home: Path) -> None:
    """Have node 2 see nothing of a folder, also after it was switched off."""
    node = runs.cluster.nodes[1]
    home.mkdir(exist_ok=True)
    if str(home) not in node.run("cat", "/proc/self/mounts"):
        node.run("mount", "-t", "tmpfs", "none", str(home))


def saving_of(runs: Runs, run: Path) -> Saving:
    """From the records of a run that has ended.

    Raises:
        RuntimeError: node 1 has not all of its newest checkpoint, or node 2 more than the word that it has.
    """
    checkpoint, complaints = files.newest_valid(run / "checkpoints")
    ranks = sorted(path.name for path in checkpoint.glob("rank_*")) if checkpoint else []
    if complaints or ranks != ["rank_00000.safetensors", "rank_00001.safetensors"]:
        raise RuntimeError(f"unshared: node 1 has {ranks} in {checkpoint}; {complaints}")
    there = set(runs.cluster.nodes[1].run("find", str(run), "-type", "f", "-printf", "%P\n").split())
    if there != {marks.ELSEWHERE, marks.RESULT}:
        raise RuntimeError(f"unshared: node 2 has {sorted(there)}")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [record for record in records if "checkpoint/sent_bytes" in record]
    sending, writing = (
        sorted(record[f"checkpoint/{key}"] for record in found)[len(found) // 2]
        for key in ("send_seconds", "write_seconds")
    )
    return Saving(len(found), found[-1]["checkpoint/bytes"], found[-1]["checkpoint/sent_bytes"], sending, writing)
