"""Indexes and member tables that somebody forged: refused in words, at once, and in little memory."""

import io
import json
import tracemalloc
import zipfile

import numpy as np
import pytest

from amclr_scale.data.formats.members import ChangedShardError, Flag, Members
from amclr_scale.data.formats.tar import scan
from amclr_scale.data.indexing import open_index
from amclr_scale.data.loader import TrainLoader
from amclr_scale.errors import UserError
from tests.data.shards import settings, write_shards

MOST = 100 << 20  # bytes of memory, for refusing


@pytest.fixture
def home(tmp_path):
    """A folder with a shard of ten samples, its member table, and an index of them."""
    (url,) = write_shards(tmp_path, [10])
    members = scan(tmp_path / "00000.tar")
    members.save(tmp_path / "00000.npz")
    entry = {"url": url, "nsamples": 10, "members": "00000.npz", "digest": members.digest,
             "extensions": members.counts(), "filesize": members.length}  # fmt: skip
    write_index(tmp_path, entry)
    return tmp_path


def write_index(home, entry):
    (home / "index.json").write_text(json.dumps({"shardlist": [entry]}))


def read_everything(home):
    index = open_index(settings(str(home), cache=str(home / "cache")))
    for row in range(index.num_samples):
        index.reader(0).read(row, frozenset(("png", "txt")))


def refused(home):
    """What reading everything is told; it takes little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as told:
            read_everything(home)
        assert tracemalloc.get_traced_memory()[1] < MOST
    finally:
        tracemalloc.stop()
    return str(told.value)


def test_the_honest_one_is_read(home):
    index = open_index(settings(str(home)))
    assert index.reader(0).read(3, frozenset(("txt",))) == {"txt": b"sample 3"}


ENTRIES = [
    {"nsamples": -1}, {"nsamples": True}, {"nsamples": 1.5}, {"nsamples": "10"}, {"nsamples": 10**30},
    {"nsamples": None},
    {"nsamples": 10**9}, {"nsamples": 10**15, "filesize": 2**55}, {"nsamples": 10**12, "filesize": None}, {"url": None},
    {"url": "x" * 5000 + ".tar"}, {"url": "a\0.tar"}, {"url": []}, {"members": {}}, {"members": "\0"},
    {"digest": 3}, {"digest": "of another"}, {"extensions": []}, {"extensions": {"png": "many", "txt": 10}},
    {"extensions": {"png": -1, "txt": 10}}, {"filesize": "large"}, {"filesize": -1}, {"damage": "words"},
    {"damage": [3]}, {"sha256": "../../../tmp/x"}, {"sha256": 7},
]  # fmt: skip


@pytest.mark.parametrize("changed", ENTRIES, ids=[str(entry)[:40] for entry in ENTRIES])
def test_a_forged_entry(home, changed):
    entry = json.loads((home / "index.json").read_text())["shardlist"][0]
    write_index(home, {**entry, **changed})
    refused(home)


TEXTS = ["null", "[]", "3", '{"shardlist": 3}', '{"shardlist": [3]}', '{"shardlist": [[]]}', "[" * 100_000, "\udc80",
         '{"shardlist":' + "[" * 50_000, '{"a":' * 50_000,
         '{"shardlist": [{"url": "a.tar", "nsamples": ' + "9" * 5000 + "}]}"]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS, ids=[text[:20] for text in TEXTS])
def test_a_forged_index(home, text):
    (home / "index.json").write_text(text, "utf-8", "surrogateescape")
    assert "index.json: expected an index" in refused(home)


def huge_shape(columns):
    """An array that says it has 10^12 numbers, and brings none."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "<i8", "fortran_order": False, "shape": (10**12,)})
    return {**columns, "offset": out.getvalue()}


def bomb(columns):
    return {**columns, "offset": np.zeros(1 << 20, np.int64)}


TABLES = {
    "a column is missing": lambda c: {name: c[name] for name in c if name != "size"},
    "offsets outside": lambda c: {**c, "offset": c["offset"] + 10**9},
    "offsets before the beginning": lambda c: {**c, "offset": c["offset"] * 0},
    "negative offsets": lambda c: {**c, "offset": -c["offset"]},
    "sizes past the end": lambda c: {**c, "size": c["size"] + 2**40},
    "sizes that overflow": lambda c: {**c, "size": c["size"] * 0 + np.int64(2**63 - 1)},
    "negative sizes": lambda c: {**c, "size": -1 - c["size"]},
    "floating point": lambda c: {**c, "offset": c["offset"].astype(float)},
    "fewer offsets": lambda c: {**c, "offset": c["offset"][:-1]},
    "two dimensions": lambda c: {**c, "offset": c["offset"][:, None]},
    "rows that go back": lambda c: {**c, "row_start": c["row_start"][::-1].copy()},
    "a row without members": lambda c: {**c, "row_start": np.r_[0, 0, c["row_start"][2:]]},
    "rows that begin later": lambda c: {**c, "row_start": np.r_[1, c["row_start"][1:]]},
    "rows past the members": lambda c: {**c, "row_start": c["row_start"] * 2},
    "an extension that has no name": lambda c: {**c, "extension": c["extension"] + 200},
    "one extension too few": lambda c: {**c, "extensions": c["extensions"][:-1]},
    "extensions in two dimensions": lambda c: {**c, "extensions": c["extensions"][:, None]},
    "no extensions": lambda c: {**c, "extensions": np.array([], dtype=np.str_)},
    "other rows": lambda c: {**c, "flag": c["flag"][:3], "row_start": np.array([0, 1, 2, len(c["offset"])])},
    "another shard's": lambda c: {**c, "digest": np.array("0" * 64)},
    "objects": lambda c: {**c, "flag": np.array([{}] * 10, dtype=object)},
    "a shape without numbers": huge_shape,
    "a bomb": bomb,
    "no array": lambda c: {**c, "offset": b"\x93NUMPY\x01\x00"},
    "a version of the future": lambda c: {**c, "offset": b"\x93NUMPY\x09\x00" + bytes(100)},
}  # fmt: skip


@pytest.mark.parametrize("kind", TABLES)
def test_a_forged_table(home, kind):
    with np.load(home / "00000.npz") as table:
        columns = TABLES[kind]({name: table[name] for name in table.files})
    with zipfile.ZipFile(home / "00000.npz", "w", zipfile.ZIP_DEFLATED) as file:
        for name, column in columns.items():
            out = io.BytesIO()
            out.write(column) if isinstance(column, bytes) else np.lib.format.write_array(out, column)
            file.writestr(f"{name}.npy", out.getvalue())
    assert "index" in refused(home)  # what to do about it


def test_training_is_told_in_words_too(home):
    table = Members.load(home / "00000.npz")
    table.size = table.size + 2**40
    table.save(home / "00000.npz")
    with pytest.raises(UserError, match=r"not inside the .* bytes of the shard"):
        next(TrainLoader(settings(str(home)), seed=0, global_batch_size=4))


def test_a_sample_that_is_cut_may_end_outside(home):
    """As tables of earlier versions have it: it is never read."""
    table = Members.load(home / "00000.npz")
    table.flag = table.flag.copy()
    table.size = table.size.copy()
    table.flag[-1], table.size[-1] = Flag.CUT, 10**9
    table.save(home / "00000.npz")
    index = open_index(settings(str(home)))
    assert index.reader(0).read(0, frozenset(("txt",))) == {"txt": b"sample 0"}
    assert issubclass(ChangedShardError, UserError)
