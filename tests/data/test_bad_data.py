"""Every fault that a sample can have: counted by kind, logged with shard and key, replaced the same way everywhere."""

import gzip
import io
import itertools
import json
import logging
import os
import signal
import struct
import zlib
from unittest import mock

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from amclr_scale.data.decoding import BadSampleError, Field, Sample, decode
from amclr_scale.data.loader import TrainLoader
from amclr_scale.errors import UserError
from tests.data.shards import pair, picture, settings, write_tar
from tests.data.test_loader import assert_same, joined, take

GOOD = 60


def bomb():
    """A small PNG of a large empty picture."""
    out = io.BytesIO()
    Image.new("L", (2000, 2000)).save(out, "PNG")
    return out.getvalue()


def with_member(i, extension, data):
    """Sample i with one member replaced, or left out where data is None."""
    members = [(name, data if name.endswith(extension) else old) for name, old in pair(i)]
    return [(name, content) for name, content in members if content is not None]


FAULTS = {
    "corrupt image": lambda i: with_member(i, "png", picture(i)[:60]),
    "empty member": lambda i: with_member(i, "png", b""),
    "missing image": lambda i: with_member(i, "png", None),
    "missing caption": lambda i: with_member(i, "txt", None),
    "text not UTF-8": lambda i: with_member(i, "txt", b"caf\xe9"),
    "too many pixels": lambda i: with_member(i, "png", bomb()),
    "huge caption": lambda i: with_member(i, "txt", b"a " * 600),
    "corrupt json": lambda i: with_member(i, "json", b'{"captions": ['),
}


@pytest.fixture
def planted(tmp_path):
    """60 whole samples, one of each fault among them, a duplicate key, and a second shard that is cut."""
    members = [m for i in range(GOOD // 2) for m in pair(i)]
    for number, make in enumerate(FAULTS.values()):
        members += make(GOOD + number)
    members += [m for i in range(GOOD // 2, GOOD) for m in pair(i)] + pair(0)
    write_tar(tmp_path / "00000.tar", members)
    cut = write_tar(tmp_path / "00001.tar", [m for i in range(100, 110) for m in pair(i)])
    text = cut.read_bytes().index(b"the picture 105")
    cut.write_bytes(cut.read_bytes()[: text - 2])  # inside the JSON of the sixth
    return tmp_path


def recipe(folder, **keys):
    limits = {"max_image_pixels": 1_000_000, "max_caption_characters": 1000, "max_bad_fraction": 0.5}
    return settings(str(folder), text_views=1, **{**limits, **keys})


EXPECTED = {**dict.fromkeys(FAULTS, 1), "duplicate key": 1, "truncated": 1}
NUM_SAMPLES = GOOD + len(FAULTS) + 1 + 6


def test_training_goes_through_and_counts_every_fault(planted, caplog):
    epochs = 4
    loader = TrainLoader(recipe(planted), seed=0, global_batch_size=12)
    assert loader.num_samples == NUM_SAMPLES == 75
    visits = 0
    with caplog.at_level(logging.WARNING):
        while visits < epochs * NUM_SAMPLES:
            batch = next(loader)
            visits += len(batch)
            whole = [
                i < GOOD // 2 or GOOD // 2 + len(FAULTS) <= i < GOOD + len(FAULTS) or 69 <= i < 74 for i in batch.ids
            ]
            assert all(whole), batch.ids  # a replacement carries its own id
            numbers = [int(i) if i < 30 else int(i) - 8 if i < 68 else int(i) + 31 for i in batch.ids]
            assert batch.images[0][:, 0, 0, 0].tolist() == numbers
    assert visits == epochs * NUM_SAMPLES
    assert loader.counts == {kind: epochs * times for kind, times in EXPECTED.items()}
    for kind, i in zip(FAULTS, range(GOOD, GOOD + len(FAULTS)), strict=True):
        assert any(
            f"sample {i:06d} " in r.message and kind in r.message and "00000.tar" in r.message for r in caplog.records
        )


@pytest.mark.launch
def test_replacements_do_not_depend_on_ranks_and_workers(planted):
    one = take(recipe(planted), 20)
    for world_size, workers in [(2, 0), (4, 0), (2, 2)]:
        ranks = [take(recipe(planted), 20, rank=r, world_size=world_size, workers=workers) for r in range(world_size)]
        assert_same(joined(ranks), one)


@pytest.mark.launch
def test_counts_over_ranks_are_those_of_one(planted):
    def counts(world_size, workers):
        total = dict.fromkeys(EXPECTED, 0)
        for rank in range(world_size):
            options = {"rank": rank, "world_size": world_size, "workers": workers}
            loader = TrainLoader(recipe(planted), seed=0, global_batch_size=8, **options)
            for _ in range(19):
                next(loader)
            loader.close()
            for kind, n in loader.counts.items():
                total[kind] += n
        return total

    assert counts(2, 0) == counts(4, 1) == counts(1, 0)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_too_many_stop_the_run(planted, workers):
    loader = TrainLoader(recipe(planted, max_bad_fraction=0.05), seed=0, global_batch_size=8, workers=workers)
    with pytest.raises(
        UserError, match=r"data\.max_bad_fraction: \d+ of \d+ samples cannot be used .*more than 5\.00%"
    ):
        list(itertools.islice(loader, 100))
    assert loader._seen <= loader.num_samples  # one pass over a small data set says enough
    loader.close()


def test_few_are_no_reason_to_stop(planted):
    """One bad sample early is 12 % of eight, but not of the data set."""
    loader = TrainLoader(recipe(planted, max_bad_fraction=0.25), seed=0, global_batch_size=8)
    for _ in range(60):
        next(loader)
    assert loader.counts.total() > 60


def test_a_data_set_without_a_good_sample_stops(tmp_path):
    write_tar(tmp_path / "0.tar", [m for i in range(8) for m in with_member(i, "png", b"no picture")])
    loader = TrainLoader(settings(str(tmp_path), max_bad_fraction=1.0), seed=0, global_batch_size=4)
    with pytest.raises(
        UserError, match=r"cannot be used .corrupt image: no known format., and neither can 1,000 others"
    ):
        next(loader)


def test_a_log_is_not_flooded(tmp_path, caplog):
    members = [m for i in range(60) for m in (with_member(i, "png", b"no") if i % 2 else pair(i))]
    write_tar(tmp_path / "0.tar", members)
    with caplog.at_level(logging.WARNING):
        take(settings(str(tmp_path), max_bad_fraction=1.0), 30)
    assert sum("corrupt image" in r.message for r in caplog.records) == 20


def test_a_decompression_bomb_is_not_decoded(tmp_path, monkeypatch):
    members = [m for i in range(4) for m in pair(i)] + with_member(9, "png", bomb())
    write_tar(tmp_path / "0.tar", members)
    loader = TrainLoader(recipe(tmp_path, max_bad_fraction=1.0), seed=0, global_batch_size=4)
    sizes, load = [], Image.Image.load
    monkeypatch.setattr(Image.Image, "load", lambda image: (sizes.append(image.size), load(image))[1])
    for _ in range(6):
        next(loader)
    assert loader.counts["too many pixels"] > 0
    assert max(sizes) == (12, 10)


def test_transparency_becomes_white_and_grey_becomes_rgb(tmp_path):
    members = []
    for i, (mode, colour) in enumerate(
        [("RGBA", (9, 9, 9, 0)), ("LA", (9, 0)), ("L", 255), ("1", 1), ("CMYK", (0, 0, 0, 0))]
    ):
        out = io.BytesIO()
        Image.new(mode, (12, 12), colour).save(out, "JPEG" if mode == "CMYK" else "PNG")
        members += with_member(i, "png", out.getvalue())
    write_tar(tmp_path / "0.tar", members)
    for batch in take(settings(str(tmp_path), lanes=1), 5, global_batch_size=1):
        assert (batch.images[0] == 255).all(), batch.ids


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_keep_their_shades(form):
    """X-rays and scans. Pillow's own conversion makes all of it white that is above 255 of 65,535."""
    shades = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    out = io.BytesIO()
    Image.fromarray(shades).save(out, form)
    found = np.asarray(decode(Sample({"png": out.getvalue()}, 1000, 1).image()))
    assert np.array_equal(found, np.repeat(np.arange(256).reshape(16, 16, 1), 3, axis=2))


def png(samples, colour_type, bits, left_out):
    """A file of samples (height, width, channels) without alpha, one colour of which is transparent (tRNS)."""
    rows = samples.reshape(len(samples), -1)
    wide = (rows[..., None] >> np.arange(bits)[::-1]) & 1  # bits, the highest first; rows begin at whole bytes
    packed = np.packbits(wide.reshape(len(rows), -1).astype(np.uint8), axis=1)
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", samples.shape[1], len(samples), bits, colour_type, 0, 0, 0),
        b"tRNS": np.asarray(left_out).astype(">u2").tobytes(),
        b"IDAT": zlib.compress(b"".join(b"\0" + row.tobytes() for row in packed)),
        b"IEND": b"",
    }
    chunks = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts.items()]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize(
    ("colour_type", "channels", "bits"), [*((0, 1, bits) for bits in (1, 2, 4, 8, 16)), (2, 3, 8), (2, 3, 16)]
)
def test_the_one_colour_that_a_png_leaves_out_becomes_white(colour_type, channels, bits):
    """Grey, and RGB of 8 and 16 bits, name a single transparent colour, in as many bits as they have. No other goes."""
    samples = np.random.default_rng(0).integers(0, 2**bits, (9, 8, channels))
    left_out = samples[0, 0] = samples[2:4, 2:6] = 2 ** (bits - 1) + 0x28 % 2 ** (bits - 1)
    left_out = np.full(channels, left_out)
    samples[5:7, :, 0] = left_out[0] ^ 1  # 16 bits: as the transparent colour, but for the lowest bit
    samples[5:7, :, 1:] = left_out[1:]
    expected = samples >> 8 if bits == 16 else samples * 255 // (2**bits - 1)
    expected = np.where((samples == left_out).all(-1, keepdims=True), 255, expected)
    found = np.asarray(decode(Sample({"png": png(samples, colour_type, bits, left_out)}, 1000, 1).image()))
    assert np.array_equal(found, np.broadcast_to(expected, found.shape))


def test_what_is_over_a_limit_names_the_key_of_the_limit():
    with pytest.raises(BadSampleError, match=r"3 characters: more than data\.max_caption_characters=2"):
        Sample({"txt": b"cat"}, 1, 2).captions(Field("txt"))
    out = io.BytesIO()
    Image.new("RGB", (4, 4)).save(out, "PNG")
    with pytest.raises(BadSampleError, match=r"4 x 4: more than data\.max_image_pixels=15"):
        Sample({"png": out.getvalue()}, 15, 1).image()


def test_pictures_of_other_kinds_are_bad_samples():
    out = io.BytesIO()
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(out, "TIFF")
    with pytest.raises(BadSampleError, match="floating-point"):
        decode(Sample({"png": out.getvalue()}, 1000, 1).image())
    out = io.BytesIO()
    Image.new("RGB", (4, 4)).save(out, "EPS")  # to read it, Pillow would run Ghostscript on what the web has sent
    with pytest.raises(BadSampleError, match="no known format"):
        Sample({"png": out.getvalue()}, 1000, 1).image()


def test_a_byte_order_mark_is_no_text():
    sample = Sample({"txt": b"\xef\xbb\xbfa cat", "json": b'\xef\xbb\xbf{"n": 1}'}, 1, 9)
    assert sample.captions(Field("txt")) == ["a cat"]
    assert sample.value(Field("json", ("n",))) == 1


def test_nothing_is_unpickled(tmp_path):
    """A member that webdataset's default decoder would unpickle is only bytes to us."""
    trap = tmp_path / "sprung"
    payload = b"cposix\nsystem\n(S'touch " + str(trap).encode() + b"'\ntR."
    members = [m for i in range(8) for m in [*pair(i), (f"{i:06d}.pyd", payload), (f"{i:06d}.pth", payload)]]
    write_tar(tmp_path / "0.tar", members)
    take(settings(str(tmp_path)), 4, global_batch_size=4)
    assert not trap.exists()


def _die(_):
    os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory runs out


@pytest.mark.parametrize("in_thread", [False, True])
def test_a_worker_that_is_killed_is_told(tmp_path, in_thread):
    write_tar(tmp_path / "0.tar", [m for i in range(40) for m in pair(i)])
    loader = TrainLoader(settings(str(tmp_path)), seed=0, global_batch_size=8, workers=1, in_thread=in_thread)
    loader._parts.pipeline = _die
    with pytest.raises(UserError, match=r"execution\.workers: a worker process died"):
        next(loader)
    loader.close()


def test_a_worker_that_is_killed_while_it_sends_is_told(tmp_path, monkeypatch):
    write_tar(tmp_path / "0.tar", [m for i in range(40) for m in pair(i)])
    loader = TrainLoader(settings(str(tmp_path)), seed=0, global_batch_size=8)
    for ended in (EOFError(), ConnectionResetError(104, "Connection reset by peer")):  # of torch's file descriptors
        monkeypatch.setattr(loader, "_next_part", mock.Mock(side_effect=ended))
        with pytest.raises(UserError, match=r"execution\.workers: a worker process died \(.*(EOFError|reset)"):
            next(loader)
    loader.close()


def test_workers_outlive_signals_to_the_whole_process_tree(tmp_path):
    """As Ctrl-C, schedulers and deepspeed's launcher send them: without workers no rank comes to its step's end."""
    write_tar(tmp_path / "0.tar", [m for i in range(40) for m in pair(i)])
    before = set(psutil.Process().children())
    loader = TrainLoader(settings(str(tmp_path)), seed=0, global_batch_size=8, workers=1)
    next(loader)
    started = set(psutil.Process().children()) - before
    (worker,) = (child for child in started if "resource_tracker" not in " ".join(child.cmdline()))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        worker.send_signal(number)
    for _ in range(6):  # more than was fetched ahead
        assert len(next(loader).ids) == 8
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's raises wherever this process then is
    worker.send_signal(signal.SIGTERM)
    worker.wait(20)
    signal.signal(signal.SIGCHLD, handler)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
    loader.close()


def test_faults_inside_compressed_shards_are_the_same(planted, tmp_path):
    packed = tmp_path / "packed"
    packed.mkdir()
    for path in sorted(planted.glob("*.tar")):
        (packed / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert_same(take(recipe(packed), 10), take(recipe(planted), 10))


def test_json_that_is_not_an_object_has_no_captions(tmp_path):
    members = [m for i in range(6) for m in pair(i)] + with_member(7, "json", json.dumps([1, 2]).encode())
    write_tar(tmp_path / "0.tar", members)
    loader = TrainLoader(
        settings(str(tmp_path), caption="json.captions", max_bad_fraction=1.0), seed=0, global_batch_size=4
    )
    ids = torch.cat([next(loader).ids for _ in range(8)])
    assert 6 not in ids
    assert loader.counts["missing caption"] > 0


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        (3, "json.caption: expected a text or a list of texts, got 3"),
        ([None, 4], "json.caption: expected a text or a list of texts, got [null, 4]"),
        (None, "json.caption"),
        ("", "json.caption"),
    ],
)
def test_what_stands_where_no_caption_is_is_told(caption, words):
    with pytest.raises(BadSampleError) as bad:
        Sample({"json": json.dumps({"caption": caption}).encode()}, 10**6, 1000).captions(Field.parse("json.caption"))
    assert (bad.value.kind, bad.value.detail) == ("missing caption", words)
