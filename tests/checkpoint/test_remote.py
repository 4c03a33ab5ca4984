"""A run in an object store: it holds a whole checkpoint at any moment, and gives back every byte."""

import shutil
import threading

import fsspec
import pytest

from amclr_scale.checkpoint import files
from amclr_scale.checkpoint.fetch import fetch
from amclr_scale.checkpoint.mirror import Mirror, Uploaded, check_remote, remote_of
from amclr_scale.checkpoint.remote import RemoteError, RemoteRun, name_in, root_of
from amclr_scale.config.schema import Config
from amclr_scale.data import remote as stores
from amclr_scale.errors import UserError
from amclr_scale.metrics.run_folder import METRICS
from tests.checkpoint.test_files import configuration, write


class Killed(BaseException):
    """The process ends here."""


class Faulty:
    """A file system whose writes fail when `fails(number, path)` says so."""

    def __init__(self, inner, fails):
        self.inner, self.fails, self.writes = inner, fails, []

    def __getattr__(self, name):
        found = getattr(self.inner, name)
        if name not in ("put_file", "cp_file", "rm", "rm_file"):
            return found

        def call(*words, **how):
            path = words[-1] if name in ("put_file", "cp_file") else words[0]
            self.writes.append((name, path.rpartition("first/")[2]))
            if error := self.fails(len(self.writes), path):
                raise error
            return found(*words, **how)

        return call


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A run's folder with one checkpoint, and the address of an empty store."""
    monkeypatch.setattr(stores, "FIRST_PAUSE", 0.0)
    config = configuration(tmp_path)
    write(tmp_path, 10, config)
    folder = tmp_path / "a"
    (folder / "environment.json").write_text('{"time": "now", "host": "here"}')
    (folder / METRICS).write_text('{"step": 10}\n')
    (folder / "weights.safetensors").write_bytes(b"large")
    yield folder, f"memory://{tmp_path.name}/first", config
    fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)


def fetched_aside(remote, step, folder):
    """What a store has set aside, in a folder of checkpoints."""
    place = folder / files.name_of(step)
    for name in remote.sizes(f"checkpoints/set_aside_{files.name_of(step)}"):
        remote.get(name, place / name.split("/", 2)[2])
    return place


def mirror(place, fails=lambda number, path: None, **settings):
    folder, url, config = place
    remote = RemoteRun(url, "run.remote")
    remote._files = Faulty(remote._files, fails)
    made = Mirror(folder, remote, config.checkpoint.model_copy(update=settings))
    made._serve = lambda: None  # the tests call it themselves
    return made


def there(url):
    remote = RemoteRun(url, "resume")
    return list(remote.candidates([])), remote.steps()


def test_what_was_uploaded_comes_back_with_every_byte_and_without_weights(place, tmp_path):
    folder, url, _ = place
    one = mirror(place)
    one.claim()
    one._bring_up_to_date()
    names = list(RemoteRun(url, "resume").sizes())
    assert "environment.json" in names
    assert METRICS in names
    assert "weights.safetensors" not in names
    writes = [name for _, name in one.remote._files.writes]
    assert writes[2:8] == [f"checkpoints/step_00000010/{name}" for name in (
        "state.json", "objective.safetensors", "rank_00000.safetensors", "rank_00001.safetensors",
        "tokenizer/tokenizer.json", "manifest.json",
    )]  # fmt: skip
    back = fetch(RemoteRun(url, "resume"), 10, tmp_path / "elsewhere")
    assert files.fault(back) is None
    for path in (folder / "checkpoints" / files.name_of(10)).rglob("*.*"):
        assert (back / path.relative_to(folder / "checkpoints" / files.name_of(10))).read_bytes() == path.read_bytes()
    one.remote._files.writes.clear()
    one._bring_up_to_date()
    assert one.remote._files.writes == []  # nothing has changed


def test_wherever_an_upload_is_killed_the_store_holds_a_whole_checkpoint(place, tmp_path):
    """And whoever goes on clears away what was left of it."""
    folder, url, config = place
    first = mirror(place)
    first.claim()
    first._bring_up_to_date()
    write(tmp_path, 20, config, number=2)
    newest = []
    for at in range(1, 40):
        one = url.replace("/first", f"/{at}/first")
        fsspec.filesystem("memory").cp(url, one, recursive=True)
        second = mirror((folder, one, config), lambda number, path, at=at: Killed() if number == at else None, keep=1)
        try:
            second.claim()
            second._bring_up_to_date()
        except Killed:
            newest.append(next(iter(there(one)[0])))
            assert files.fault(fetch(RemoteRun(one, "resume"), newest[-1], tmp_path / f"cut_{at}")) is None
            third = mirror((folder, one, config), keep=1)
            third.claim()
            third._bring_up_to_date()
            assert there(one) == ([20], {20: True})
        else:
            break
    assert newest == sorted(newest)
    assert newest.count(10) == 8  # two claims, five files, the manifest
    assert newest.count(20) >= 3  # the pointer, the old manifest, what else is removed


def test_a_request_that_fails_is_tried_again_and_one_that_goes_on_failing_is_told(place, tmp_path):
    folder, url, config = place
    flaky = mirror(place, lambda number, path: OSError("reset") if number % 2 else None)
    flaky.claim()
    flaky._bring_up_to_date()
    assert there(url)[0] == [10]
    inside = [path for path in (folder / "checkpoints" / files.name_of(10)).rglob("*.*") if path.name != files.MANIFEST]
    size = sum(path.stat().st_size for path in inside)
    assert flaky.news.get() == Uploaded(10, size, pytest.approx(0, abs=5))

    write(tmp_path, 20, config, number=2)
    down = mirror(place, lambda number, path: OSError("no route") if "rank_00001" in path else None)
    down.claim()
    with pytest.raises(
        RemoteError, match=r"step_00000020/rank_00001.safetensors cannot be written after 5 attempts: no"
    ):
        down._bring_up_to_date()
    assert there(url) == ([10], {20: False, 10: True})
    refused = mirror(place, lambda number, path: PermissionError("forbidden"))
    with pytest.raises(RemoteError, match=r"holder.json cannot be written: forbidden"):
        refused.claim()
    assert len(refused.remote._files.writes) == 1  # it will be the same next time


def test_a_file_that_arrived_short_is_no_part_of_a_checkpoint(place):
    _, url, _ = place
    one = mirror(place)
    one.claim()
    upload = one.remote._files.inner.put_file

    def cut(path, name):
        upload(path, name)
        if name.endswith("rank_00000.safetensors"):
            one.remote._files.inner.pipe_file(name, b"short")

    one.remote._files.put_file = cut
    with pytest.raises(RemoteError, match=r"rank_00000.safetensors has 5 bytes instead of 441"):
        one._bring_up_to_date()
    assert there(url) == ([], {10: False})


def test_the_store_keeps_what_the_disk_would_keep(place, tmp_path):
    folder, url, config = place
    for step in range(20, 90, 10):
        write(tmp_path, step, config, number=step // 10)
        if step == 30:
            files.point_at_best(folder / "checkpoints", 30)
        one = mirror(place, keep=2, keep_every=4)
        one.claim()
        one._bring_up_to_date()
        if step == 50:  # the disk was emptied, and the run has gone on elsewhere
            for old in (10, 20):
                shutil.rmtree(folder / "checkpoints" / files.name_of(old), ignore_errors=True)
    files.thin_out(folder / "checkpoints", 2, 4, (30,))
    assert list(there(url)[1]) == files.steps(folder / "checkpoints") == [80, 70, 40, 30]
    assert list(RemoteRun(f"{url}/checkpoints/best", "resume").candidates([])) == [30]
    assert list(RemoteRun(f"{url}/checkpoints/step_00000040", "resume").candidates([])) == [40]

    files.set_aside_after(folder / "checkpoints", 40)  # the run goes back: what it has left is not its newest any more
    back = mirror(place, keep=2, keep_every=4)
    back.claim()
    back._bring_up_to_date()
    assert list(there(url)[1]) == [40, 30]
    assert RemoteRun(url, "resume").pointed("latest") == 40
    kept = RemoteRun(url, "resume")
    for step in (80, 70):  # of another line of the run, and nobody has said that it may go
        old = fetched_aside(kept, step, tmp_path / "aside")
        assert files.fault(old) is None
    write(tmp_path, 50, config, number=5)
    back._bring_up_to_date()
    assert there(url)[0] == [50, 40, 30]
    assert fetched_aside(kept, 80, tmp_path / "again")


def test_latest_names_what_is_whole_there_while_a_newer_one_is_on_the_disk_alone(place, tmp_path):
    """The newest one comes while the one before it is uploaded, and its own upload is killed."""
    _, url, config = place

    def newer(number, path):
        if path.endswith("step_00000010/rank_00001.safetensors"):
            write(tmp_path, 20, config)
        return Killed() if "step_00000020" in path else None

    one = mirror(place, newer)
    one.claim()
    with pytest.raises(Killed):
        one._bring_up_to_date()
    assert there(url)[0] == [10]
    assert RemoteRun(url, "resume").pointed("latest") == 10
    again = mirror(place)  # while the older one is uploaded after the newer one, latest stays
    again.claim()
    again._bring_up_to_date()
    assert RemoteRun(url, "resume").pointed("latest") == 20


def test_what_is_being_uploaded_stays_on_the_disk(place, tmp_path):
    folder, _, config = place
    begun, go_on = threading.Event(), threading.Event()

    def wait(number, path):
        if "step_00000010/rank_00000" in path:
            begun.set()
            go_on.wait(10)

    one = mirror(place, wait)
    del one._serve
    one.claim()
    one.wake()
    assert begun.wait(10)
    for step in (20, 30, 40):
        write(tmp_path, step, config)
        files.thin_out(folder / "checkpoints", 1, None, (one.held,))
    assert files.steps(folder / "checkpoints") == [40, 10]
    one.wake()
    assert one.busy
    go_on.set()
    while one.busy:
        pass
    assert one.problem == ""
    assert [one.news.get().step for _ in range(2)] == [10, 40]


def test_a_store_that_another_run_or_another_job_has_is_left_alone(place, tmp_path):
    folder, url, config = place
    old = mirror(place)
    old.claim()
    old._bring_up_to_date()
    mirror(place).claim()  # the same run, on another machine
    write(tmp_path, 20, config)
    with pytest.raises(RemoteError, match="taken over by another job"):
        old._bring_up_to_date()
    assert there(url)[0] == [10]
    (folder / "environment.json").write_text('{"time": "later", "host": "here"}')
    with pytest.raises(UserError, match=r"run.remote: .* holds another run \(now on here\); choose another"):
        mirror(place).claim()
    home = url.removesuffix("/first")
    new = configuration(tmp_path, run__name="first", run__remote=home)
    with pytest.raises(UserError, match=r"run.name: .*/first holds a run already; go on with it \(resume=auto\)"):
        check_remote(new)


def test_a_job_that_was_taken_over_leaves_the_records_alone_too(place):
    folder, url, _ = place
    shutil.rmtree(folder / "checkpoints")
    old = mirror(place)
    old.claim()
    mirror(place).claim()
    with pytest.raises(RemoteError, match="taken over by another job"):
        old._bring_up_to_date()
    assert METRICS not in RemoteRun(url, "resume").sizes()


def test_what_came_after_a_listing_is_read(place):
    """Stores' packages remember listings, and take what is not in them for absent."""
    _, url, _ = place

    class Remembering:
        def __init__(self, inner):
            self.inner, self.listed = inner, None

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def invalidate_cache(self):
            self.listed = None

        def find(self, path, **how):
            self.listed = self.inner.find(path, **how)
            return self.listed

        def cat_file(self, path):
            if self.listed is not None and path not in self.listed:
                raise FileNotFoundError(path)
            return self.inner.cat_file(path)

    reader, writer = RemoteRun(url, "resume"), RemoteRun(url, "run.remote")
    reader._files = Remembering(reader._files)
    writer.write("environment.json", b"1")
    assert list(reader.sizes()) == ["environment.json"]
    writer.write("holder.json", b"2")
    assert reader.read("holder.json") == b"2"
    assert reader.read("nothing.json") is None


def test_addresses(tmp_path):
    for tail in ("", "/", "/checkpoints", "/checkpoints/", "/checkpoints/step_00000010", "/checkpoints/best"):
        assert root_of(f"s3://bucket/runs/first{tail}") == "s3://bucket/runs/first"
    assert name_in("s3://bucket/runs/first/checkpoints/latest") == "first"
    assert RemoteRun("memory://x/first/checkpoints/best", "resume").asked == "best"
    assert root_of("s3://bucket/checkpoints_of_mine/first") == "s3://bucket/checkpoints_of_mine/first"
    with pytest.raises(UserError, match=r"run.remote: nothing://x/first is no address that fsspec can use"):
        RemoteRun("nothing://x/first", "run.remote")
    for none in ("://x/first", "__default__://x/first"):
        with pytest.raises(UserError, match=r"run.remote: expected an address with its protocol, such as s3://BUCKET"):
            RemoteRun(none, "run.remote")
    for url, shown in (
        ("sftp://me:hush@host/runs", "sftp://...@host/runs"), ("s3://key:hush@bucket/runs", "s3://...@bucket/runs"),
        ("https://hush@host/runs", "https://...@host/runs"), ("https://host/runs?token=hush", "https://host/runs?token=..."),
        ("abfs://c@account/x?sig=hush", "abfs://c@account/x?sig=..."), ("https://host/x?v=hush", "https://host/x?..."),
    ):  # fmt: skip
        with pytest.raises(UserError, match=r"run.remote: expected .* without ") as told:
            check_remote(Config.model_validate({"run": {"remote": url, "name": "a"}}))
        assert f"got {shown}" in str(told.value)
        assert "hush" not in str(told.value)
    assert RemoteRun("memory://me@host:80/first", "resume").url == "memory://me@host:80/first"
    for run in ("s3://bucket/checkpoints/first", "s3://checkpoints/first", "s3://checkpoints", "file:///checkpoints"):
        assert root_of(run) == run
        assert root_of(f"{run}/checkpoints/step_00000010") == run
    home = configuration(tmp_path, run__remote="memory://bucket/checkpoints/")
    assert remote_of(home, "first").url == "memory://bucket/checkpoints/first"
