"""Runs that are kept in a store, on several ranks and as their users start them; and an upload that is killed.

The store is a folder here, by file://. With moto and s3fs installed (`pip install 'moto[server]' s3fs`, neither of
which the project asks for) an upload is killed that goes to a server of S3.
"""

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from safetensors.torch import load_file

from amclr_scale.checkpoint import files
from amclr_scale.checkpoint.fetch import fetch, source_of
from amclr_scale.checkpoint.remote import RemoteRun
from amclr_scale.checkpoint.remote_copy import RemoteCopy
from amclr_scale.checkpoint.signals import UnsavedError
from amclr_scale.checkpoint.start import agree_on_start
from amclr_scale.data import remote as stores
from amclr_scale.errors import AgreedError
from tests.checkpoint.test_files import configuration, write
from tests.checkpoint.trainer import CPU, ROOT
from tests.commands.test_train import SMALL

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
OFTEN = ["checkpoint.every_samples=256", "run.name=first"]  # after 8, 16 and 20 steps


def copied(home, store, *, minutes=1.0, spoil=lambda hook: None):
    """On each rank: what a run that saves after steps 10 and 20 says, and how it ends."""
    rank, words, end = dist.get_rank(), [], ""
    config = configuration(home, run__remote=f"file://{store}", run__remote_minutes=minutes)
    log = SimpleNamespace(say=words.append, write=lambda record: words.append(sorted(record)))
    saver = SimpleNamespace(rank=rank, device=CPU, whole=0, log=log)
    stores.FIRST_PAUSE, before = 0.0, stores.FIRST_PAUSE
    folder = Path(home) / "a"
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "environment.json").write_text('{"time": "now", "host": "here"}')
    try:
        with RemoteCopy(folder, config, saver) as hook:
            for step in (10, 20):
                if rank == 0:
                    write(Path(home), step, config)
                    if step == 20:
                        spoil(hook.mirror)
                    saver.whole = step
                hook.after_step(SimpleNamespace(step=step, samples=64 * step))
                while step == 10 and hook.mirror and hook.mirror.busy:
                    time.sleep(0.01)
                hook.after_step(SimpleNamespace(step=step, samples=64 * step))
    except (AgreedError, UnsavedError) as error:
        end = f"{type(error).__name__}: {error}"
    stores.FIRST_PAUSE = before
    return words, end


def blocked(mirror):
    """From here on there is no room for step 20 in the store."""
    (Path(mirror.remote._root) / "checkpoints" / files.name_of(20)).write_text("a file")


def slow(mirror):
    upload = mirror.remote.put
    mirror.remote.put = lambda path, name: (time.sleep(0.5), upload(path, name))


@pytest.mark.slow
def test_all_ranks_wait_for_the_last_upload_and_end_alike(ranks, tmp_path):
    (words, end), (nothing, other) = ranks(2, copied, tmp_path / "fine", tmp_path / "store")
    assert (end, other, nothing) == ("", "", [])
    assert words[0].startswith(f"checkpoint step_00000010: 0.0 MiB are at file://{tmp_path}/store/a, in 0.")
    assert words[1] == ["checkpoint/upload_seconds", "samples", "step"]
    assert words[2].startswith("checkpoint step_00000020: ")
    assert files.steps(tmp_path / "store" / "a" / "checkpoints") == [20, 10]

    told = ranks(2, copied, tmp_path / "full", tmp_path / "small", spoil=blocked)
    assert told[0][1] == told[1][1]
    assert told[0][1].startswith("UnsavedError: run.remote: the last checkpoint or records are not in the store (file:")
    assert f"they are in {tmp_path}/full/a: the same command with resume={tmp_path}/full/a uploads" in told[0][1]
    assert any("training goes on, and the next checkpoint tries again" in str(line) for line in told[0][0])
    assert list(RemoteRun(f"file://{tmp_path}/small/a", "resume").candidates([])) == [10]

    told = ranks(2, copied, tmp_path / "late", tmp_path / "far", minutes=0.005, spoil=slow)
    assert "(the upload has not ended within run.remote_minutes, 0.005)" in told[0][1]
    assert told[0][1] == told[1][1]

    (tmp_path / "no_folder").write_text("a file")
    told = ranks(2, copied, tmp_path / "none", tmp_path / "no_folder")
    assert told[0][1] == told[1][1]
    assert told[0][1].startswith(f"AgreedError: run.remote: file://{tmp_path}/no_folder/a")


def begun(home, url, slowly):
    """On each rank: where a run begins that goes on from an address."""
    config = configuration(home, resume=url)
    get = RemoteRun.get
    if slowly:
        RemoteRun.get = lambda self, name, path: (time.sleep(0.1), get(self, name, path))
    try:
        tokenizer = SimpleNamespace(fingerprint=lambda: "t")
        found, folder, lock = agree_on_start(config, Path(home) / "a", "f", tokenizer, dist.get_rank())
        with lock:
            return str(found.checkpoint), folder, files.fault(found.checkpoint), threading.active_count()
    except AgreedError as error:
        return str(error)
    finally:
        RemoteRun.get = get


def test_rank_0_fetches_and_all_ranks_see_it(ranks, tmp_path):
    ranks(2, copied, tmp_path / "one", tmp_path / "store")
    url = f"file://{tmp_path}/store/a"
    for checkpoint, folder, fault, _ in ranks(2, begun, tmp_path / "two", url, slowly=True):
        assert checkpoint == f"{tmp_path}/two/a/checkpoints/step_00000020"
        assert (folder, fault) == (tmp_path / "two" / "a", None)
    one, other = ranks(2, begun, tmp_path / "three", f"{url}n_other", slowly=False)
    assert one == other == f"resume: no checkpoint that can be used at {url}n_other"
    assert not (tmp_path / "three").exists()


def started(*words, **environment):
    environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "launch/train.py", *SMALL, *words], cwd=ROOT, env={**os.environ, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def done(*words, **environment):
    run = started(*words, **environment)
    said, _ = run.communicate(timeout=600)
    assert run.returncode == 0, said
    return said


def everything(folder, step=20):
    found = {}
    for file in sorted((folder / "checkpoints" / files.name_of(step)).glob("*.safetensors")):
        found |= {f"{file.name}/{name}": value for name, value in load_file(file).items()}
    return found


def same(one, other):
    assert list(one) == list(other)
    return [name for name, value in one.items() if not value.equal(other[name])] == []


@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_goes_on_from_its_address_with_the_same_bits(tmp_path):
    """From a store in which the upload of the next checkpoint was cut off."""
    store = tmp_path / "store"
    words = [*OFTEN, f"run.remote=file://{store}", "checkpoint.keep=3"]
    said = done(*words, f"run.folder={tmp_path / 'one'}")
    assert f"checkpoint step_00000020: 7.7 MiB are at file://{store}/first" in said
    whole = everything(tmp_path / "one" / "first")
    kept = store / "first" / "checkpoints"
    assert files.steps(kept) == [20, 16, 8]
    assert (store / "first" / "evaluation.json").is_file()
    assert not (store / "first" / "weights.safetensors").exists()
    shutil.rmtree(kept / files.name_of(20))
    (kept / files.name_of(16) / files.MANIFEST).unlink()

    said = done(*words, f"run.folder={tmp_path / 'two'}", f"resume=file://{store}/first")
    assert f"note: fetched from file://{store}/first" in said
    again = tmp_path / "two" / "first"
    assert f"note: resumed from {again / 'checkpoints' / files.name_of(8)}" in said
    assert same(whole, everything(again))
    assert files.steps(kept) == [20, 16, 8]
    assert files.fault(kept / files.name_of(16)) is None
    lines = [line for line in (again / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert len(lines) == 20  # those of before were fetched too


UPLOADER = """
import sys, time
from pathlib import Path
from amclr_scale.checkpoint.mirror import Mirror
from amclr_scale.checkpoint.fetch import fetch, source_of
from amclr_scale.checkpoint.remote import RemoteRun
from amclr_scale.config.execution import Checkpoint
mirror = Mirror(Path(sys.argv[1]), RemoteRun(sys.argv[2], "run.remote"), Checkpoint())
mirror.claim()
mirror.wake()
while mirror.busy:
    time.sleep(0.01)
print(mirror.problem or [mirror.news.get().step for _ in range(mirror.news.qsize())])
"""


def uploader(folder, url):
    return subprocess.Popen(
        [sys.executable, "-c", UPLOADER, str(folder), url], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip


@pytest.fixture
def s3(monkeypatch):
    """A server of S3 with a bucket, which holds back what `hold` names: (hold, arrived, go on)."""
    pytest.importorskip("s3fs", reason="needs s3fs: pip install 's3fs' 'moto[server]'")
    pytest.importorskip("moto.server", reason="needs moto: pip install 's3fs' 'moto[server]'")
    import s3fs
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    application, hold = DomainDispatcherApplication(create_backend_app), list[str]()
    arrived, go_on = threading.Event(), threading.Event()

    def gate(environ, start_response):
        if environ["REQUEST_METHOD"] == "PUT" and any(name in environ["PATH_INFO"] for name in hold):
            arrived.set()
            go_on.wait(120)
        return application(environ, start_response)

    server = make_server("127.0.0.1", 0, gate, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in {**KEYS, "FSSPEC_S3_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"}.items():
        monkeypatch.setenv(name, value)
    from fsspec.config import conf, set_conf_env

    set_conf_env(conf)  # which was read when fsspec was imported
    s3fs.S3FileSystem().mkdir("bucket")
    yield hold, arrived, go_on
    conf.pop("s3", None)
    server.shutdown()


def test_killed_while_it_uploads_to_a_server_of_s3(s3, tmp_path):
    hold, arrived, go_on = s3
    config, url = configuration(tmp_path), "s3://bucket/runs/a"
    folder = tmp_path / "a"
    write(tmp_path, 10, config)
    (folder / "environment.json").write_text('{"time": "now", "host": "here"}')
    said, _ = uploader(folder, url).communicate(timeout=120)
    assert said == "[10]\n"
    write(tmp_path, 20, config, number=2)
    hold.append("step_00000020/rank_00001")
    run = uploader(folder, url)
    try:
        assert arrived.wait(120)
    finally:
        run.kill()
        run.communicate()
    hold.clear()
    go_on.set()
    store = RemoteRun(url, "resume")
    assert store.steps() == {20: False, 10: True}
    away = configuration(tmp_path / "away", resume=url)  # an empty disk
    found = source_of(away, tmp_path / "away" / "a").bring()
    assert found.checkpoint == tmp_path / "away" / "a" / "checkpoints" / files.name_of(10)
    assert files.fault(found.checkpoint) is None
    assert "step_00000020 is not used: its upload has not come to its end" in found.complaints[0]
    write(tmp_path / "away", 20, away, number=2)
    said, _ = uploader(tmp_path / "away" / "a", url).communicate(timeout=120)
    assert said == "[20]\n"
    for step in (10, 20):
        assert files.fault(fetch(store, step, tmp_path / "back")) is None
