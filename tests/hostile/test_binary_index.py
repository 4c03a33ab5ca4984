"""Binary indexes that were damaged or forged: refused in words, in little memory."""

import hashlib
import json
import os
import struct
import tracemalloc
import zlib
from dataclasses import replace

import numpy as np
import pytest

from amclr_scale.data.indexes.binary import BinaryShards, write_binary_index
from amclr_scale.data.indexing import open_index
from amclr_scale.errors import UserError
from tests.data.shards import settings
from tests.hostile.test_tables import MOST
from tests.hostile.test_tables import home as home_of_json

home = home_of_json  # a folder with a shard of ten samples, its table, and an index.json


@pytest.fixture
def honest(home):
    """The binary index of that shard, its path and what it says."""
    (shard,) = open_index(settings(str(home))).shards
    (home / "index.json").unlink()
    write_binary_index(home / "index.bin", [shard])
    return home / "index.bin", shard


def refused(path):
    """What reading everything is told; it takes little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as told:
            read_everything(path)
        assert tracemalloc.get_traced_memory()[1] < MOST
    finally:
        tracemalloc.stop()
    assert "index" in str(told.value)
    return str(told.value)


def read_everything(path):
    index = open_index(settings(str(path), cache=str(path.parent / "cache")))
    assert index.shards.file_sizes.shape == (1,)
    assert index.fingerprint_of(slice(0, 0))
    for row in range(index.num_samples):
        index.reader(0).read(row, frozenset(("png", "txt")))


def test_the_honest_one_is_read(honest):
    read_everything(honest[0])


def test_any_bit_that_is_turned_is_found(honest):
    path, _ = honest
    content = path.read_bytes()
    for place in np.random.default_rng(0).permutation(len(content))[:400].tolist():
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(UserError):
            read_everything(path)


@pytest.mark.parametrize("length", [0, 3, 15, 16, 40, 500, -1])
def test_a_file_that_is_cut(honest, length):
    path, _ = honest
    path.write_bytes(path.read_bytes()[:length])
    assert "index.bin: expected an index that amclr-scale shards index wrote" in refused(path)


FORGED = [
    {"num_samples": -1}, {"num_samples": 10**9}, {"num_samples": 2**62}, {"num_samples": 11},
    {"url": "x" * 5000 + ".tar"}, {"url": "a\0.tar"}, {"url": ""}, {"digest": "0" * 64},
    {"extensions": {"png": -1, "txt": 10}}, {"extensions": []}, {"file_size": 100}, {"file_size": -5},
    {"sha256": "../../x"}, {"damage": (3,)}, {"file_size": 2**60},
]  # fmt: skip


@pytest.mark.parametrize("changed", FORGED, ids=[str(entry)[:40] for entry in FORGED])
def test_a_forged_entry(honest, changed, monkeypatch):
    path, shard = honest
    monkeypatch.setattr(type(shard), "kind", ())
    write_binary_index(path, [replace(shard, **changed)])
    refused(path)


def forge(path, block=None, end=0, **said):
    """Another block or header, with all checksums as they should be."""
    content = path.read_bytes()
    _, version, length = struct.unpack("<8sII", content[:16])
    header, columns = json.loads(content[16 : 16 + length]), content[16 + length + 32 :]
    own = BinaryShards(path)
    first = own._first_block
    block = content[first:] if block is None else block
    columns = bytearray(columns[: first - 16 - length - 32])
    columns[17:25] = struct.pack("<q", first + len(block) + end)
    columns[25:29] = struct.pack("<I", zlib.crc32(block))
    header["end"], header["crc"] = (hashlib.sha256(columns[a:b]).hexdigest() for a, b in ((17, 25), (25, 29)))
    text = json.dumps({**header, **said}).encode().ljust(length)
    path.write_bytes(
        struct.pack("<8sII", b"AMCLRIDX", version, len(text)) + text + hashlib.sha256(text).digest() + columns + block
    )


def test_forging_nothing_changes_nothing(honest):
    path, _ = honest
    before = path.read_bytes()
    forge(path)
    assert path.read_bytes() == before


def bomb():
    """A GiB of zeros, compressed in a moment: a piece of it, 128 times, an empty last block, and Adler's checksum."""
    raw, size = zlib.compressobj(9, zlib.DEFLATED, -15), 1 << 30
    piece = raw.compress(bytes(size // 128)) + raw.flush(zlib.Z_FULL_FLUSH)
    return b"\x78\xda" + piece * 128 + b"\x03\x00" + struct.pack(">I", size % 65521 << 16 | 1)


BLOCKS = {
    "no zlib": b"nothing",
    "a bomb": bomb(),
    "more behind it": zlib.compress(b"[{}]") + b"x",
    "not JSON": zlib.compress(b"{"),
    "deep": zlib.compress(b"[" * 100_000),
    "no list": zlib.compress(b"{}"),
    "numbers": zlib.compress(b"[3]"),
    "too few": zlib.compress(b"[]"),
    "no table": zlib.compress(b'[{"url": "a.tar", "extensions": {}}]'),
    "no address": zlib.compress(b'[{"members": "a.npz", "extensions": {}}]'),
    "elsewhere": zlib.compress(b'[{"url": "https://a/b.tar", "members": "a.npz", "extensions": {}}]'),
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_forged_block(honest, kind):
    forge(honest[0], BLOCKS[kind])
    refused(honest[0])


SAID = [
    {"shards": 0}, {"shards": -1}, {"shards": 2**21}, {"shards": 10**30}, {"shards": 1.0}, {"shards": True},
    {"samples": 11}, {"samples": None}, {"fingerprint": 3}, {"content": "x" * 12}, {"digest": "0" * 64, "crc": "?"},
]  # fmt: skip


@pytest.mark.parametrize("said", SAID, ids=[str(one) for one in SAID])
def test_a_forged_header(honest, said):
    forge(honest[0], **said)
    assert "expected an index" in refused(honest[0])


def test_ends_outside_of_the_file(honest):
    forge(honest[0], end=1000)
    refused(honest[0])


def test_another_version_and_a_long_header(honest):
    path, _ = honest
    content = path.read_bytes()
    path.write_bytes(content[:8] + struct.pack("<I", 9) + content[12:])
    assert "version 9, where this release reads 1" in refused(path)
    path.write_bytes(content[:12] + struct.pack("<I", 1 << 31) + content[16:])
    assert "a header of" in refused(path)


def test_a_named_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.bin")
    with pytest.raises(UserError, match="no such index"):  # which a named pipe is not
        open_index(settings(str(tmp_path / "pipe.bin")))
    with pytest.raises(UserError, match="expected an index"):
        BinaryShards(tmp_path / "pipe.bin")
