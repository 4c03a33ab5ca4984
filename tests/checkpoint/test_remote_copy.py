"""Runs that are kept in a store, as their users start them: killed while they upload, and gone on with elsewhere.

The store is a folder here, by file://. With moto and s3fs installed (`pip install 'moto[server]' s3fs`, neither of
which the project asks for) the same is done against a server that speaks S3.
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
    said, _ = run.communicate(timeout=240)
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


@pytest.mark.launch
@pytest.mark.slow
def test_killed_while_it_uploads_to_a_server_of_s3(tmp_path):
    pytest.importorskip("s3fs", reason="needs s3fs: pip install 's3fs' 'moto[server]'")
    pytest.importorskip("moto.server", reason="needs moto: pip install 's3fs' 'moto[server]'")
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    application, begun, go_on = DomainDispatcherApplication(create_backend_app), threading.Event(), threading.Event()

    def gate(environ, start_response):
        if environ["REQUEST_METHOD"] == "PUT" and "step_00000016/rank_00000" in environ["PATH_INFO"]:
            begun.set()
            go_on.wait(60)
        return application(environ, start_response)

    server = make_server("127.0.0.1", 0, gate, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {**KEYS, "FSSPEC_S3_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"}
    os.environ.update(environment)
    import s3fs

    s3fs.S3FileSystem(endpoint_url=environment["FSSPEC_S3_ENDPOINT_URL"]).mkdir("bucket")
    words = [*OFTEN, "run.remote=s3://bucket/runs", "checkpoint.keep=3", "resume=auto"]
    run = started(*words, f"run.folder={tmp_path / 'one'}", **environment)
    assert begun.wait(120)
    run.kill()
    run.communicate()
    go_on.set()
    store = RemoteRun("s3://bucket/runs/first", "resume")
    assert store.steps() == {16: False, 8: True}

    said = done(*words, f"run.folder={tmp_path / 'two'}", **environment)  # an empty disk
    assert "note: fetched from s3://bucket/runs/first" in said
    assert "checkpoints/step_00000016 is not used: its upload has not come to its end" in said
    assert store.steps() == {20: True, 16: True, 8: True}
    done(*OFTEN, f"run.folder={tmp_path / 'whole'}", **environment)
    assert same(everything(tmp_path / "whole" / "first"), everything(tmp_path / "two" / "first"))
    server.shutdown()
