"""A job past what fits here: 5 billion pairs in 500,000 shards on 1,024 ranks, played rank by rank and computed.

    python -m tools.scale.simulate             # the table of docs/clusters.md, two minutes of one core
    python -m tools.scale.simulate --write     # and put it there
    python -m tools.scale.simulate --small     # the same things of a small size, in seconds

run        one rank of the job did it here, at full size, in a process of its own
simulated  all ranks' parts were played one after another, or a piece of the whole was run and scaled
computed   by the package's own accounts of memory, traffic and time; nothing was run
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from amclr_scale.config.schema import Data
from amclr_scale.data.evaluation_split import EvaluationSplit
from amclr_scale.data.prefetch import shards_at_once
from amclr_scale.metrics.devices import GIGA
from amclr_scale.objectives.sample_state import STATE
from tools.memory_table import MODEL
from tools.scale import data, job
from tools.scale.data import JSON_PART, SMALL, Size, in_own_process

PAGE = Path(__file__).resolve().parents[2] / "docs" / "clusters.md"
MARKS = ("<!-- scale -->", "<!-- scale end -->")
WORDS = [
    *MODEL, "objective.name=sogclr", "execution.micro_batch_size=64", "execution.kept_micro_batches=0",
]  # fmt: skip
SMALL_WORDS = [
    "objective.name=sogclr",
    "model.image.width=8",
    "train.epochs=1",
    "execution.zero_stage=1",
    "execution.sample_state=sharded",
]
EVALUATED = 50_000  # samples of a split, as ImageNet's
SPLIT = "emoji/val_concept"


Jobs = tuple[job.Job, job.Job]


@dataclass(frozen=True)
class Row:
    """A line of the table: what, its figures for few and for many ranks, and how they are known."""

    what: str
    few: str
    many: str
    how: str

    def line(self) -> str:
        return f"| {self.what} | {self.few} | {self.many} | {self.how} |"


def size_in_words(size: float) -> str:
    """Bytes, in decimal units."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size:.0f} B"


def seconds_in_words(seconds: float) -> str:
    """Two digits."""
    unit, name = (60.0, "min") if seconds >= 100 else (1.0, "s") if seconds >= 1 else (1e-3, "ms")
    amount = seconds / unit
    return f"{float(f'{amount:.2g}'):g} {name}"


def simulate(size: Size, words: list[str], folder: Path, mib: int) -> list[Row]:
    """All rows."""
    made = in_own_process(data.write_data, folder, size)
    few, many = size.ranks
    played = {}
    for ranks in size.ranks:
        rank = ranks // 2 + 1
        data.link(folder, size, data.shards_of(size, rank, ranks))
        played[ranks] = in_own_process(data.play_rank, folder, size, rank, ranks)
    as_json = in_own_process(data.read_json, folder)
    jobs = (job.make_job(words, size, few), job.make_job(words, size, many))
    return [
        *_data_rows(size, made, as_json, played[few], played[many]),
        *_state_rows(size, jobs),
        *_checkpoint_rows(folder, jobs, mib),
        *_evaluation_rows(jobs),
        *_wire_rows(jobs),
    ]


def _data_rows(
    size: Size, made: dict[str, float], as_json: dict[str, float], few: dict[str, float], many: dict[str, float]
) -> list[Row]:
    def both(what: str, key: str, words: Callable[[float], str] = seconds_in_words) -> Row:
        return Row(what, words(few[key]), words(many[key]), "run")

    def one(what: str, figure: str, how: str) -> Row:
        return Row(what, figure, figure, how)

    def cached(ranks: int) -> str:
        return size_in_words(job.PER_NODE * shards_at_once(size.lanes // ranks, size.window) * made["shard"])

    table, opened = made["table.npz"], few["readers memory"] / max(1.0, few["readers"])
    scaled = f"simulated: 1 shard in {JSON_PART}"
    return [
        one("index on disk, as JSON", size_in_words(JSON_PART * made["part.json"]), scaled),
        one("JSON index: time to open, each rank", seconds_in_words(JSON_PART * as_json["open"]), scaled),
        one("JSON index: memory of each rank", size_in_words(JSON_PART * as_json["memory"]), scaled),
        one("index on disk, binary", size_in_words(made["index.bin"]), "run"),
        both("binary index: time to open, with files looked at", "open"),
        both("binary index: memory of a rank, mapped pages counted", "index memory", size_in_words),
        both("order: time to make", "order"),
        both("first batch of ids", "first batch"),
        both("next batch of ids", "next batch"),
        both("batch at a far step (seven epochs on)", "seek"),
        both("memory of a rank, index and order", "memory", size_in_words),
        one("member tables on disk", size_in_words(size.shards * table), "computed from one"),
        both("shards that a rank's first batch opens", "opened first", "{:,.0f}".format),
        both("shards that a later batch opens", "opened later", "{:,.0f}".format),
        both("time in looking up and opening, a later batch", "opening"),
        Row("memory of one open shard's table", size_in_words(opened), size_in_words(opened), "run"),
        Row(
            "cache of a node of 8 ranks, where shards are remote",
            cached(size.ranks[0]),
            cached(size.ranks[1]),
            "computed",
        ),
    ]


def _of(jobs: Jobs, what: str, figure: Callable[[job.Job], str], how: str = "computed") -> Row:
    few, many = jobs
    return Row(what, figure(few), figure(many), how)


def _state_rows(size: Size, jobs: Jobs) -> list[Row]:
    ids = data.global_batch(size)

    def held(one: job.Job) -> str:
        rows = np.bincount(ids % one.ranks, minlength=one.ranks)
        return f"{rows.mean():,.0f}, {rows.max():,}"

    def sent(one: job.Job) -> str:
        return size_in_words(one.wire.messages.by_purpose()[STATE].wire_bytes)

    return [
        _of(jobs, "per-sample state of a rank (SogCLR)", lambda one: size_in_words(one.state)),
        _of(jobs, "rows of a real batch that one rank holds: mean, most", held, "simulated: all ranks' ids"),
        _of(jobs, "bytes that a rank sends to look them up and to set them", sent),
    ]


def _checkpoint_rows(folder: Path, jobs: Jobs, mib: int) -> list[Row]:
    disk = job.measure_disk(folder / "checkpoints", mib)
    scaled = f"simulated: a file of {mib} MiB on this disk, scaled"

    def opening(one: job.Job) -> str:
        return seconds_in_words(job.open_many(folder / f"pieces_{one.ranks}", one.ranks))

    return [
        _of(jobs, "checkpoint, all files", lambda one: size_in_words(one.checkpoint)),
        _of(jobs, "checkpoint: a rank's file", lambda one: size_in_words(one.own_pieces)),
        _of(
            jobs, "time to write, flush and hash a rank's file",
            lambda one: seconds_in_words(one.own_pieces / disk.write), scaled,
        ),
        _of(jobs, "checkpoint: state that rank 0 writes for all", lambda one: size_in_words(one.written_for_all)),
        _of(
            jobs, "time of rank 0 to check all files before a run goes on",
            lambda one: seconds_in_words(one.checkpoint / disk.check), scaled,
        ),
        _of(jobs, "time of a rank to find the pieces in the files of all", opening, "run, on small files"),
    ]  # fmt: skip


def _evaluation_rows(jobs: Jobs) -> list[Row]:
    began = time.perf_counter()
    split = EvaluationSplit(SPLIT, Data(), rank=0, world_size=jobs[1].ranks)
    seconds = (time.perf_counter() - began) / split.num_samples
    split.close()
    return [
        _of(
            jobs, f"evaluation on {EVALUATED:,} pairs: time of each rank to read all captions",
            lambda _: seconds_in_words(seconds * EVALUATED), f"simulated: {split.num_samples:,} pairs, scaled",
        ),
        _of(
            jobs, "evaluation: embeddings of all pairs, on each rank",
            lambda one: size_in_words(2 * 4 * one.config.model.embedding_width * EVALUATED),
        ),
    ]  # fmt: skip


def _wire_rows(jobs: Jobs) -> list[Row]:
    def sent(purpose: str) -> Row:
        what = f"a step's bytes, {purpose}: a rank's NVLink, its network card"
        return _of(jobs, what, lambda one: ", ".join(map(size_in_words, one.by_purpose().get(purpose, (0, 0)))))

    rows = [sent(purpose) for purpose in jobs[1].by_purpose()]
    profile = jobs[1].profile
    links = f"computed: {profile.link / GIGA:.0f} and {profile.node_link / GIGA:.0f} GB/s"
    return [
        *rows,
        _of(jobs, "messages of a step, if nothing overlaps", lambda one: seconds_in_words(one.cost.messages), links),
        _of(jobs, "a step", lambda one: seconds_in_words(one.cost.seconds), f"computed: {profile.name}"),
    ]


def table(size: Size, rows: list[Row]) -> str:
    """Markdown."""
    head = f"| what | {size.ranks[0]:,} ranks | {size.ranks[1]:,} ranks | how it is known |"
    return "\n".join([head, "|---|---|---|---|", *(row.line() for row in rows)])


def main() -> int:
    """Print the table, or write it into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a small size")
    parser.add_argument("--write", action="store_true", help="also put the table into docs/clusters.md")
    options = parser.parse_args()
    size, words, mib = (SMALL, SMALL_WORDS, 4) if options.small else (Size(), WORDS, 256)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = table(size, simulate(size, words, Path(folder), mib))
    print(found)
    processes = psutil.Process().cpu_times()
    cpu = processes.user + processes.system + processes.children_user + processes.children_system
    took = f"{time.perf_counter() - began:.0f} s ({cpu:.0f} s of one core), {size_in_words(data.peak_memory())} at most"
    print(f"\n{took}", file=sys.stderr)
    if options.write:
        before, _, rest = PAGE.read_text("utf-8").partition(MARKS[0])
        _, _, after = rest.partition(MARKS[1])
        PAGE.write_text(f"{before}{MARKS[0]}\n\n{found}\n\n{MARKS[1]}{after}", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
