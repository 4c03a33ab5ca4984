"""While files go from node to node, however slowly, no rank waits in one message of all ranks for long.

Nodes are folders, as in test_delivery: `a` is that of the first half of the ranks.
"""

import time
from pathlib import Path

import pytest
import torch.distributed as dist

from amclr_scale.checkpoint import delivery, files
from amclr_scale.checkpoint import start as starting
from amclr_scale.checkpoint.resume import Found
from tests.checkpoint.test_delivery import begun, names, node_of

SLOW = 2.0  # seconds that a disk takes for a file


def waiting(home: Path) -> tuple[float, str, list[str]]:
    """The longest that this rank waited in one message of all, while files were saved and fetched; and what came."""
    run, rank, receive, gather = node_of(home), dist.get_rank(), delivery._receive, delivery.gather_objects
    lock, carrying = begun(run, shared=False)
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run / f"piece{rank}").write_bytes(b"x" * 2500)
    written = gather([files.describe(run / f"piece{rank}")])
    if rank == 0:
        here = files.staging(run / "checkpoints", 10)
        here.mkdir()
        files.commit(run / "checkpoints", 10, [files.write_json(here / files.STATE, {"step": 10})])
    longest, told = [], []

    def slowly(*words):
        time.sleep(SLOW)
        return receive(*words)

    def timed(value):
        began = time.monotonic()
        try:
            return gather(value)
        finally:
            longest.append(time.monotonic() - began)

    asks = getattr(delivery, "ASKS", 1.0)
    delivery._receive, delivery.gather_objects, starting.gather_objects = slowly, timed, timed
    delivery.ASKS = SLOW / 20
    try:
        told.append(carrying.collect(run, written))
        timed(None)  # as the checkpointer's, in which ranks that carry nothing would wait
        place = home / "a" / "run" / "checkpoints" / files.name_of(10)
        found = carrying.fetch(Found(place, place.parent.parent, 640, 1, "f", None, (), ()))
        told.append(found.checkpoint.name)
    finally:
        delivery._receive, delivery.gather_objects, starting.gather_objects, delivery.ASKS = (
            receive,
            gather,
            gather,
            asks,
        )
        lock.release()
    return max(longest), str(told), names(run)


@pytest.mark.slow
def test_no_rank_waits_in_a_message_while_others_send(ranks, tmp_path):
    """NCCL would end those that carry nothing, after ten minutes."""
    found = ranks(4, waiting, tmp_path)
    assert max(seconds for seconds, *_ in found) < SLOW / 2
    assert [told for _, told, _ in found] == ["[(5000, ''), 'step_00000010']"] * 4
    assert {name for name in found[0][2] if "piece" in name} == {f"piece{rank}" for rank in range(4)}


def lost(home: Path) -> str:
    """Rank 0 receives nothing any more."""
    run, receive = node_of(home), delivery._receive
    lock, carrying = begun(run, shared=False)
    run.mkdir(exist_ok=True)
    (run / "piece").write_bytes(b"")
    written = delivery.gather_objects([files.describe(run / "piece")])

    def breaks(*words):
        raise RuntimeError("connection reset")

    delivery._receive = breaks
    try:
        carrying.collect(run, written)
    except RuntimeError as error:
        return str(error)
    finally:
        delivery._receive = receive
        lock.release()
    return ""


def test_a_lost_connection_is_told_to_those_that_wait(ranks, tmp_path):
    first, other = ranks(2, lost, tmp_path)
    assert first == "connection reset"
    assert other.startswith("run.shared: sending between nodes has failed on rank 0 (")
