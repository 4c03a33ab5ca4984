"""run.shared=false: ranks that do not see rank 0's folder send it their pieces, and are sent what they go on from.

Nodes are folders: `a` is that of ranks 0 and 1 of four, or of rank 0 of two, and `b` that of the others.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from amclr_scale.checkpoint import delivery, files, marks, state
from amclr_scale.checkpoint import lock as locking
from amclr_scale.checkpoint.checkpointer import Checkpointer
from amclr_scale.checkpoint.delivery import arrange
from amclr_scale.checkpoint.files import Written
from amclr_scale.checkpoint.resume import Found
from amclr_scale.checkpoint.signals import Signals, StoppedError, UnsavedError
from amclr_scale.checkpoint.start import lock_new
from amclr_scale.data.tokenizers import load_tokenizer
from amclr_scale.engine.batch_plan import make_plan
from amclr_scale.errors import AgreedError
from amclr_scale.metrics.log import RunLog
from tests.checkpoint.trainer import CPU, SAMPLES, SIZE, Trainer

CHUNK = 7000  # bytes
HOW = {"objective": "sogclr", "layout": "sharded"}


def node_of(home: Path) -> Path:
    """This rank's run folder."""
    return home / ("a" if dist.get_rank() < max(1, dist.get_world_size() // 2) else "b") / "run"


def found_in(run: Path) -> Found:
    checkpoint, _ = files.newest_valid(run / "checkpoints")
    assert checkpoint
    return Found(checkpoint, run, files.step_of(checkpoint) * SIZE, 1, "f", None, (), ())


def begun(run: Path, shared: bool) -> tuple:
    """The lock on a run folder and the delivery; of a job that goes on, the checkpoint."""
    delivery.CHUNK = CHUNK
    (run / "metrics.jsonl").unlink(missing_ok=True)
    lock = lock_new(run, dist.get_rank(), shared)
    carrying = None if shared else arrange(run, lock, dist.get_rank())
    assert (carrying is None) == shared
    return lock, carrying


def trained(home: Path, shared: bool, steps: int, begin: int = 0, act=lambda run, done, signals: None, **keys):
    """Train and save after every second step; the words of the log, how it ended, and the model."""
    rank, run = dist.get_rank(), home / "a" / "run" if shared else node_of(home)
    trainer = Trainer(**HOW, **keys)
    settings = {"every_minutes": None, "every_samples": 2 * SIZE, "keep": 9}
    checkpoint = trainer.config.checkpoint.model_copy(update=settings)
    train = trainer.config.train.model_copy(update={"samples": steps * SIZE})
    config = trainer.config.model_copy(update={"checkpoint": checkpoint, "train": train})
    plan = make_plan(config, SAMPLES, dist.get_world_size())
    lock, carrying = begun(run, shared)
    found = None
    if begin:
        found = dist_found(home)
        found = carrying.fetch(found) if carrying else found
        state.restore(found.checkpoint, trainer.engine, trainer.objective, CPU, teacher=trainer.teacher)
        if carrying:
            carrying.forget()
    words, end = [], ""
    with lock, RunLog(run, config, speaks=rank == 0, total_steps=steps) as log, Signals() as signals:
        log.say, signals.saves = words.append, True
        saver = Checkpointer(
            run, config, plan, engine=trainer.engine, objective=trainer.objective, fingerprint="f",
            tokenizer=load_tokenizer("emoji", 8), log=log, signals=signals, device=CPU, teacher=trainer.teacher,
            delivery=carrying, found=found,
        )  # fmt: skip
        try:
            with saver:
                for done in range(begin + 1, steps + 1):
                    trainer.train(done - 1, done)
                    act(run, done, signals)
                    saver.after_step(plan.position(done))
            if carrying:
                carrying.finish()
        except (StoppedError, UnsavedError) as error:
            end = f"{type(error).__name__}: {error}"
    everything = trainer.everything()
    dist.barrier()
    trainer.close()
    return words, end, everything


def dist_found(home: Path) -> Found:
    """What rank 0 finds, known to all."""
    return delivery.broadcast_object(found_in(home / "a" / "run") if dist.get_rank() == 0 else None)


def listed(checkpoint: Path) -> list[dict]:
    return files.parse_manifest((checkpoint / files.MANIFEST).read_bytes())["files"]


def hashes(checkpoint: Path) -> dict[str, str]:
    """Of all files but the one that holds the time."""
    assert files.fault(checkpoint) is None
    return {file["name"]: file["sha256"] for file in listed(checkpoint) if file["name"] != files.STATE}


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def equal(run, other):
    """Models, objectives and generators on all ranks."""
    for (*_, one), (*_, two) in zip(run, other, strict=True):
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_a_run_in_two_folders_is_the_one_in_a_shared_folder(ranks, tmp_path):
    """Each file of its checkpoint, on the node that keeps it; and what goes on from it, on as many ranks or not."""
    together, apart = tmp_path / "together", tmp_path / "apart"
    whole = ranks(4, trained, together, True, 3, zero_stage=3)
    words, *_ = ranks(4, trained, apart, False, 2, zero_stage=3)[0]
    assert sum("MiB of them sent in" in line for line in words) == 1
    checkpoints = [home / "a" / "run" / "checkpoints" / files.name_of(2) for home in (together, apart)]
    wanted, got = map(hashes, checkpoints)
    assert {f"rank_{rank:05}.safetensors" for rank in range(4)} < wanted.keys()
    assert got == wanted
    assert names(apart / "b") == [f"run/{marks.ELSEWHERE}"]  # no piece stays where nobody would look for it
    assert marks.step_elsewhere(apart / "b" / "run")[1] == 2
    (record,) = map(json.loads, (apart / "a" / "run" / "metrics.jsonl").read_text().splitlines())
    sent = ("rank_00002.safetensors", "rank_00003.safetensors")
    sizes = [file["size"] for file in listed(checkpoints[1]) if file["name"] in sent]
    assert record["checkpoint/sent_bytes"] == sum(sizes) > 2 * CHUNK
    equal(whole, ranks(4, trained, apart, False, 3, begin=2, zero_stage=3))
    for checkpoint in checkpoints:
        files.remove(checkpoint.with_name(files.name_of(3)))
    equal(*(ranks(2, trained, home, home == together, 3, begin=2, zero_stage=2) for home in (together, apart)))
    assert names(apart / "b") == [f"run/{marks.ELSEWHERE}"]


def block(run, done, signals):
    """Rank 0's disk does not take rank 1's file of step 2; before step 4 it does."""
    place = files.staging(run / "checkpoints", 2) / "rank_00001.safetensors"
    if dist.get_rank() == 0 and done == 2:
        place.mkdir(parents=True)
    if dist.get_rank() == 1 and done == 4:
        signals.ask("somebody asked")


@pytest.mark.slow
def test_a_piece_that_cannot_be_written_is_told_and_the_next_one_arrives(ranks, tmp_path):
    """And a request to end reaches the supervisor of the node that did not hear it."""
    (words, end, _), _ = ranks(2, trained, tmp_path, False, 6, act=block, zero_stage=1)
    (failed,) = [line for line in words if "could not be written" in line]
    assert failed.startswith("checkpoint: step 2 could not be written (rank_00001.safetensors of rank 1 (")
    assert "cannot be written" in failed
    assert end.startswith("StoppedError: ")
    assert files.steps(tmp_path / "a" / "run" / "checkpoints") == [4]
    assert names(tmp_path / "b") == [f"run/{marks.ELSEWHERE}"]


def messages(home: str) -> list[str]:
    """What is said of a piece that was damaged on its way, and of nodes that cannot take the checkpoint."""
    run, me, told = node_of(Path(home)), dist.get_rank(), []
    lock, carrying = begun(run, shared=False)
    run.mkdir(exist_ok=True)
    (run / "piece").write_bytes(b"x" * 2500)
    right = Written("piece", 2500, files.describe(run / "piece").sha256)
    told.append(carrying.collect(run, [[], [right]]))
    (run / "piece").write_bytes(b"x" * 2400)  # it was longer when it was described
    told.append(carrying.collect(run, [[], [right]]))
    told.append(carrying.collect(run, [[], [right]]))  # it is not there
    found, usage = dist_found(Path(home)), delivery.shutil.disk_usage

    def attempt() -> None:
        try:
            carrying.fetch(found)
        except AgreedError as error:
            told.append(str(error))

    if me:
        delivery.shutil.disk_usage = lambda _: usage("/")._replace(free=0)
    attempt()
    delivery.shutil.disk_usage = usage
    if not me:
        (found.checkpoint / files.STATE).write_text("{}")
    attempt()
    if me:
        carrying.asked.tell()
    carrying.pass_on_request()
    told.append((run / marks.ASKED).exists())
    if me:
        (run / "profile").mkdir()
        (run / "profile" / "rank1.json").write_text("{}")
        (run / marks.RESULT).unlink(missing_ok=True)
    else:
        (run / marks.RESULT).write_text('{"a": 1}')
    carrying.finish()
    told.append((run / marks.RESULT).read_text())
    if me:
        (run / marks.RESULT).unlink()
        (run / marks.RESULT).mkdir()
    try:
        carrying.finish()
    except UnsavedError as error:  # as for a save that failed: no mistake of a user's
        told.append(str(error))
    lock.release()
    return told


@pytest.mark.slow
def test_what_does_not_arrive_whole_is_not_taken(ranks, tmp_path):
    ranks(2, trained, tmp_path, False, 2, zero_stage=1)
    (whole, short, absent, *rest), (_, _, _, *other) = ranks(2, messages, str(tmp_path))
    assert whole == (2500, "")
    for size, words in (short, absent):
        assert size == 2500
        assert words.startswith("piece of rank 1 (")
        assert words.endswith("has not arrived as it was written")
    assert rest == other
    room, damage, asked, result, unfinished = rest
    assert result == '{"a": 1}'
    assert unfinished.startswith("run.folder: expected a folder of its own on every node (run.shared=false), got: ")
    assert "evaluation.json cannot be written: Is a directory on rank 1 (" in unfinished
    assert names(tmp_path / "a" / "run" / "profile") == ["rank1.json"]
    assert names(tmp_path / "b" / "run" / "profile") == []
    assert room.startswith("run.folder: expected room on each node for the checkpoint that the run goes on from, got: ")
    assert "0 MiB free in" in room
    assert damage.startswith("resume: expected the checkpoint to arrive on every node, got: state.json has not arrived")
    assert asked


def unwritable(home: str) -> str:
    run = Path(home) / "a" if dist.get_rank() == 0 else Path("/proc/1/fdinfo/run")
    lock = lock_new(run, dist.get_rank(), shared=False)
    try:
        arrange(run, lock, dist.get_rank())
    except AgreedError as error:
        return str(error)
    finally:
        lock.release()
    return ""


def test_a_node_without_a_folder_of_its_own_is_told_on_all(ranks, tmp_path):
    for told in ranks(2, unwritable, str(tmp_path)):
        assert told.startswith("run.folder: expected a folder of its own on every node (run.shared=false), got: ")
        assert "/proc/1/fdinfo/run cannot be written" in told


def seen_by_all(home: str) -> bool:
    run = Path(home) / "a"
    with lock_new(run, dist.get_rank(), shared=False) as lock:
        return arrange(run, lock, dist.get_rank()) is None


def test_nothing_is_sent_where_all_see_the_folder(ranks, tmp_path):
    assert ranks(2, seen_by_all, str(tmp_path)) == [True, True]


def late(home: str) -> tuple[bool, bool]:
    """The folder is shared, and shows rank 1 what rank 0 wrote there only the second time that it looks."""
    run, unseen, looks = Path(home) / "a", locking._unseen, iter(["not there yet"])
    locking._unseen = lambda folder, token: next(looks, "") or unseen(folder, token)
    try:
        with lock_new(run, dist.get_rank(), shared=False) as lock:
            away = lock.away
            return away, arrange(run, lock, dist.get_rank()) is None and not lock.away
    finally:
        locking._unseen = unseen


def test_a_shared_folder_that_shows_its_files_late_is_no_other_node(ranks, tmp_path):
    """Else a rank would send rank 0 the file that rank 0 writes over, and remove what has arrived."""
    assert ranks(2, late, str(tmp_path)) == [(False, True), (True, True)]
    assert not list((tmp_path / "a").glob(".node_*"))
