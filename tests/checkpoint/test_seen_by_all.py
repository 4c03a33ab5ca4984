"""A run folder or a checkpoint that some ranks do not see is told in words, on all of them."""

from pathlib import Path

import torch.distributed as dist

from amclr_scale.checkpoint import files, lock, start
from amclr_scale.checkpoint.resume import Found
from amclr_scale.errors import AgreedError


def told(home: str) -> list[str]:
    """What this rank is told of rank 1's folder: the same, one that is absent, another one, one that is late."""
    me, shared = dist.get_rank(), Path(home) / "shared"
    absent, other, proc = Path(home) / "absent", Path(home) / "other", Path("/proc/1/fdinfo")
    lock.LATE = 0.3
    found = []

    def attempt(mine: Path) -> None:
        try:
            start.lock_new(mine, me).release()
            found.append("")
        except AgreedError as error:
            found.append(str(error))

    for theirs in (shared, absent, other, proc):
        attempt(theirs if me else shared)
    place = shared / "step_00000010"
    if me == 0:
        place.mkdir()
        (place / files.MANIFEST).write_text("{}")
    mark = start.broadcast_object(files.mark(place))
    for theirs in (place, absent):
        try:
            start._check_seen(Found(theirs if me else place, shared, 0, 0, "", None, (), ()), mark)
            found.append("")
        except AgreedError as error:
            found.append(str(error))
    return found


def test_what_some_ranks_do_not_see_is_told_on_all(ranks, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / lock.HOLDER).write_text('{"token": "of another job"}')
    zero, one = ranks(2, told, str(tmp_path))
    assert zero == one
    same, absent, another, proc, seen, unseen = zero
    assert same == seen == ""
    expected = "run.folder: expected a folder that all ranks see and can write, got: "
    assert absent.startswith(f"{expected}{tmp_path}/absent does not have what rank 0 wrote there (No such file")
    assert another.startswith(f"{expected}{other} holds another job's .holder.json on rank 1 (")
    assert "/proc/1/fdinfo does not have what rank 0 wrote there" in proc
    assert unseen.startswith("resume: expected all ranks to see the checkpoint that rank 0 has found, got: ")
    assert not (tmp_path / "shared" / lock.HOLDER).exists()  # what is refused leaves no lock
    assert not (tmp_path / "absent").exists()
