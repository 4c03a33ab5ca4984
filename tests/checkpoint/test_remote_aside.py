"""What a run has gone back from is set aside in the store, what is half there or old is removed, and nothing else."""

import shutil

import fsspec
import pytest

from amclr_scale.checkpoint import files
from amclr_scale.checkpoint.remote import RemoteRun
from amclr_scale.metrics.run_folder import set_aside_results
from tests.checkpoint import test_remote
from tests.checkpoint.test_files import write
from tests.checkpoint.test_remote import Killed, fetched_aside, mirror, there

place = test_remote.place  # a fixture


def test_a_line_that_comes_to_the_same_step_is_set_aside_too(place, tmp_path):
    """Wherever that is killed, both are there, and one of them is whole under the name of a checkpoint."""
    folder, url, config = place
    write(tmp_path, 20, config, number=2)
    first = mirror(place)
    first.claim()
    first._bring_up_to_date()
    files.set_aside_after(folder / "checkpoints", 10)
    write(tmp_path, 20, config, number=3)
    old, new = (
        (folder / "checkpoints" / name / files.MANIFEST).read_bytes()
        for name in ("set_aside_step_00000020", "step_00000020")
    )
    assert old != new
    for at in range(1, 60):
        one = url.replace("/first", f"/{at}/first")
        fsspec.filesystem("memory").cp(url, one, recursive=True)
        second = mirror((folder, one, config), lambda number, path, at=at: Killed() if number == at else None)
        try:
            second.claim()
            second._bring_up_to_date()
        except Killed:
            assert there(one)[0]
            third = mirror((folder, one, config))
            third.claim()
            third._bring_up_to_date()
        remote = RemoteRun(one, "resume")
        assert there(one) == ([20, 10], {20: True, 10: True})
        assert remote.read("checkpoints/step_00000020/manifest.json") == new
        assert remote.read("checkpoints/set_aside_step_00000020/manifest.json") == old
        assert files.fault(fetched_aside(remote, 20, tmp_path / f"cut_{at}")) is None
        if at > len(second.remote._files.writes):
            break
    assert 15 < at < 59


def test_stores_that_copy_nothing_themselves(place, monkeypatch):
    _, url, _ = place
    one = mirror(place)
    one.claim()
    one._bring_up_to_date()

    def missing(path, to):
        raise NotImplementedError

    monkeypatch.setattr(one.remote._files, "cp_file", missing, raising=False)
    one.remote.set_aside(10)
    assert there(url) == ([], {})
    assert len(one.remote.sizes("checkpoints/set_aside_step_00000010")) == 6


@pytest.mark.parametrize("cut", [False, True])
def test_results_of_an_earlier_end_leave_their_place_in_the_store(place, cut):
    """A run that had ended trains on: who reads the store does not take its numbers for those of now."""
    folder, url, _ = place
    (folder / "evaluation").mkdir()
    for name in ("evaluation.json", "evaluation/results.json", "evaluation/step_00000010.json"):
        (folder / name).write_text(f"of {name}")
    one = mirror(place)
    one.claim()
    one._bring_up_to_date()
    set_aside_results(folder)
    if cut:  # between upload and removal; what goes on is another process
        two = mirror(place, lambda number, path: Killed() if path.endswith("first/evaluation.json") else None)
        two.claim()
        with pytest.raises(Killed):
            two._bring_up_to_date()
        one = mirror(place)
        one.claim()
    one._bring_up_to_date()
    remote = RemoteRun(url, "resume")
    for name in ("evaluation.json", "evaluation/results.json"):
        assert remote.read(name) is None
        assert remote.read(f"set_aside_results/{name}") == f"of {name}".encode()
    assert remote.read("evaluation/step_00000010.json") is not None
    (folder / "evaluation.json").write_text("of now")  # it ends again
    one._bring_up_to_date()
    assert remote.read("evaluation.json") == b"of now"
    set_aside_results(folder)  # and trains on again
    one._bring_up_to_date()
    assert remote.read("evaluation.json") is None
    assert remote.read("set_aside_results_2/evaluation.json") == b"of now"


def test_what_is_removed_in_the_store_and_what_is_not(place, tmp_path):
    """Half an upload goes; nothing does before the newest is there, nor what may be one to keep for ever."""
    folder, url, config = place
    one = mirror(place, lambda number, path: Killed() if "step_00000010/objective" in path else None)
    one.claim()
    with pytest.raises(Killed):
        one._bring_up_to_date()
    for step in (20, 30):
        write(tmp_path, step, config, number=step // 10)
    shutil.rmtree(folder / "checkpoints" / files.name_of(10))
    again = mirror(place, keep=9)
    again.claim()
    again._bring_up_to_date()
    assert there(url)[1] == {30: True, 20: True}  # not step 10, of which a part was there

    strict = mirror(place, keep=1, keep_every=5)
    strict.claim()
    write(tmp_path, 40, config, number=4)
    strict._thin_out()
    assert list(there(url)[1]) == [30, 20]
    strict.remote._remove("checkpoints/step_00000020/state.json")
    strict._bring_up_to_date()
    assert list(there(url)[1]) == [40, 20]  # nobody can say which number it has
