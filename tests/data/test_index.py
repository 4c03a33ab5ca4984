"""An index says how many samples there are and where; a data set that is not what it says is refused."""

import gzip
import json
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest

from amclr_scale.commands import index_shards
from amclr_scale.config import schema
from amclr_scale.data.formats.members import ChangedShardError
from amclr_scale.data.indexes.entries import write_index
from amclr_scale.data.indexing import build, open_index
from amclr_scale.data.sources import CORPORA, embedded_splits
from amclr_scale.data.storage import Storage
from amclr_scale.errors import UserError
from tests.data.shards import pair, settings, write_shards, write_tar


def captions(index):
    found = []
    for sample in range(index.num_samples):
        shard, row = index.locate(sample)
        found.append(index.reader(shard).read(row, frozenset({"txt"}))["txt"].decode())
    return found


def write_own_index(folder: Path) -> Path:
    """What amclr-scale shards index does."""
    urls = sorted(map(str, folder.glob("*.tar*")))
    tables = [folder / "members" / f"{Path(url).name}.npz" for url in urls]
    write_index(folder / "index.json", "test", build(urls, tables, Storage(folder / "cache")))
    return folder / "index.json"


@pytest.mark.parametrize(("split", "n"), [("train", 4938), ("val_style", 1724), ("val_concept", 678)])
def test_the_embedded_corpus_is_whole(split, n):
    index = open_index(schema.Data(), f"emoji/{split}")
    assert index.num_samples == n
    for sample in (0, n // 2, n - 1):
        shard, row = index.locate(sample)
        members = index.reader(shard).read(row, frozenset({"txt", "webp", "json"}))
        content = json.loads(members["json"])
        assert content["caption"] == members["txt"].decode()
        assert members["webp"][8:12] == b"WEBP"


def test_its_tables_are_those_that_a_scan_finds(tmp_path):
    """The shipped member tables are not only plausible: building them again gives the same index."""
    shipped = open_index(schema.Data(), "emoji/val_concept")
    shutil.copy(CORPORA / "emoji/val_concept/00000.tar.gz", tmp_path)
    built = open_index(settings(str(tmp_path)))
    assert built.fingerprint == shipped.fingerprint
    assert captions(built)[:50] == captions(shipped)[:50]


def test_credits_and_licences_are_shipped():
    credits = (CORPORA / "emoji/CREDITS.md").read_text()
    for licence in ("CC-BY-4.0", "CC-BY-SA-4.0", "OFL-1.1", "Unicode-3.0"):
        assert licence in credits
        assert len((CORPORA / f"emoji/licences/{licence}.txt").read_text()) > 1500


@pytest.mark.parametrize("sizes", [[3, 2], [1], [0, 4, 0, 1], [2, 0]])
def test_ids_are_shards_laid_end_to_end(tmp_path, sizes):
    urls = write_shards(tmp_path, sizes)
    index = open_index(settings(urls))
    assert captions(index) == [f"sample {i}" for i in range(sum(sizes))]
    assert index.num_samples == sum(sizes)


def test_every_kind_of_name_means_the_same_samples(tmp_path):
    urls = write_shards(tmp_path / "a", [3, 2])
    names = [str(tmp_path / "a"), str(tmp_path / "a/{00000..00001}.tar"), urls, str(write_own_index(tmp_path / "a"))]
    found = [open_index(settings(name)) for name in names]
    assert [captions(index) for index in found] == [[f"sample {i}" for i in range(5)]] * 4
    assert len({index.fingerprint for index in found}) == 1


def test_several_data_sets_follow_one_another(tmp_path):
    write_shards(tmp_path / "a", [3])
    write_shards(tmp_path / "b", [1, 2], first=3)
    index = open_index(settings([str(tmp_path / "a"), str(tmp_path / "b")]))
    assert captions(index) == [f"sample {i}" for i in range(6)]
    assert index.parts == [1, 2]


def test_compressed_shards_read_like_plain_ones(tmp_path):
    members = [m for i in range(4) for m in pair(i)]
    plain = open_index(settings(str(write_tar(tmp_path / "a.tar", members))))
    packed = open_index(settings(str(write_tar(tmp_path / "b.tar.gz", members, "w:gz"))))
    assert captions(packed) == captions(plain)


def test_an_index_of_the_webdataset_family_is_enough(tmp_path):
    """Only url and nsamples, as wids writes them."""
    urls = write_shards(tmp_path, [3, 2])
    shards = [{"url": Path(url).name, "nsamples": n} for url, n in zip(urls, [3, 2], strict=True)]
    (tmp_path / "own.json").write_text(json.dumps({"wids_version": 1, "shardlist": shards}))
    assert captions(open_index(settings(str(tmp_path / "own.json")))) == [f"sample {i}" for i in range(5)]


def test_a_folder_of_img2dataset_is_read_as_it_stands(tmp_path):
    write_shards(tmp_path, [2, 2])
    for name in ("00000.parquet", "00000_stats.json", "00001.parquet", "00001_stats.json"):
        (tmp_path / name).write_bytes(b"beside the shards")
    assert open_index(settings(str(tmp_path))).num_samples == 4


def test_the_fingerprint_follows_the_content_and_not_the_place(tmp_path):
    write_shards(tmp_path / "a", [3, 2])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    write_shards(tmp_path / "c", [2, 3])
    write_shards(tmp_path / "d", [3, 2], first=1)
    prints = [open_index(settings(str(tmp_path / name))).fingerprint for name in "abcd"]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


# Mistakes


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("emoji/trian", "expected a split of the embedded corpus"),
        ("/nowhere/index.json", "no such index"),
        ("/nowhere/{00000..00003}.tar", r"no such shard: /nowhere/00000.tar \(4 of 4 are missing\)"),
        ("/nowhere/{0..3.tar", "braces do not match"),
        ("__default__:///nowhere/{0..3}.tar", r"their protocol, such as s3://BUCKET/00000.tar, got __default__:///now"),
        ("{s3,}://nowhere/0.tar", "their protocol, such as .*, got ://nowhere/0.tar, which names none"),
        ([], "at least one name"),
    ],
)
def test_a_wrong_name_is_told(name, words):
    with pytest.raises(UserError, match=words) as caught:
        open_index(settings(name))
    assert str(caught.value).startswith("data.train")


@pytest.mark.parametrize("name", ["0.tar", "0.tar.gz"])
def test_a_file_that_is_no_shard_is_told_under_its_key(tmp_path, name):
    (tmp_path / name).write_bytes(b"hello" * 1000)
    with pytest.raises(UserError, match=rf"^evaluation\.splits: .*{name}: ") as told:
        open_index(settings(str(tmp_path)), str(tmp_path), "evaluation.splits")
    assert str(told.value).count("evaluation.splits") == 1


def test_an_empty_folder_is_told(tmp_path):
    with pytest.raises(UserError, match=r"expected a folder with an index\.json or with \.tar shards"):
        open_index(settings(str(tmp_path)))


def test_a_missing_shard_is_told(tmp_path):
    write_shards(tmp_path, [3, 2])
    index = write_own_index(tmp_path)
    (tmp_path / "00001.tar").unlink()
    with pytest.raises(UserError, match=r"data\.train: no such shard: .*00001\.tar"):
        open_index(settings(str(index)))


def test_a_shard_without_captions_or_images_is_told(tmp_path):
    write_tar(tmp_path / "a/0.tar", [m for m in pair(0) if not m[0].endswith("txt")])
    write_tar(tmp_path / "b/0.tar", [m for m in pair(0) if not m[0].endswith("png")])
    with pytest.raises(UserError, match=r"data\.caption: .*0\.tar: expected captions in \.txt members, found 1 \.json"):
        open_index(settings(str(tmp_path / "a")))
    assert open_index(settings(str(tmp_path / "a"), caption="json.captions")).num_samples == 1
    with pytest.raises(UserError, match=r"0\.tar: expected images"):
        open_index(settings(str(tmp_path / "b")))


def test_a_shard_of_another_size_is_refused(tmp_path):
    write_shards(tmp_path, [3, 2])
    index = write_own_index(tmp_path)
    write_tar(tmp_path / "00001.tar", [m for i in range(50) for m in pair(i)])
    with pytest.raises(ChangedShardError, match=r"00001\.tar: expected [\d,]+ bytes"):
        open_index(settings(str(index)))


def test_a_shard_of_the_same_size_but_other_content_is_refused_when_it_is_read(tmp_path):
    write_shards(tmp_path, [3, 2])
    index = open_index(settings(str(write_own_index(tmp_path))))
    write_tar(tmp_path / "00000.tar", [m for i in (2, 1, 0) for m in pair(i)])
    with pytest.raises(ChangedShardError, match="has changed since it was indexed"):
        captions(index)


def test_a_shard_that_is_cut_while_it_is_read_is_refused(tmp_path):
    write_shards(tmp_path, [3])
    index = open_index(settings(str(write_own_index(tmp_path))))
    offset, size, _ = index.reader(0).members.of_row(2)["txt"]
    os.truncate(tmp_path / "00000.tar", offset + size - 3)  # its header is there, and most of the caption
    with pytest.raises(ChangedShardError, match="has changed since it was indexed"):
        captions(index)


def test_an_index_with_another_count_is_refused(tmp_path):
    write_shards(tmp_path, [3])
    (tmp_path / "own.json").write_text(json.dumps({"shardlist": [{"url": "00000.tar", "nsamples": 4}]}))
    with pytest.raises(ChangedShardError, match=r"expected 4 samples .* got 3"):
        open_index(settings(str(tmp_path / "own.json")))


def test_a_compressed_shard_with_another_checksum_is_refused(tmp_path):
    write_tar(tmp_path / "0.tar.gz", pair(0), "w:gz")
    path = write_own_index(tmp_path)
    content = json.loads(path.read_text())
    content["shardlist"][0]["sha256"] = "0" * 64
    path.write_text(json.dumps(content))
    with pytest.raises(ChangedShardError, match="expected sha256 0000"):
        captions(open_index(settings(str(path))))


def test_a_cut_gzip_is_told(tmp_path):
    (tmp_path / "0.tar.gz").write_bytes(gzip.compress(write_tar(tmp_path / "0.tar", pair(0)).read_bytes())[:-30])
    with pytest.raises(UserError, match=r"0\.tar\.gz: cannot be unpacked"):
        open_index(settings(str(tmp_path / "0.tar.gz")))


@pytest.mark.parametrize("content", ["{}", "[", '{"shardlist": [{"url": 3}]}', '{"shardlist": []}'])
def test_a_file_that_is_no_index_is_told(tmp_path, content):
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(UserError, match=r"index\.json: expected"):
        open_index(settings(str(tmp_path)))


def test_a_cache_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache: expected a folder that can be written"):
        open_index(settings("emoji/train", cache=str(tmp_path / "file" / "cache")))


def test_a_home_that_cannot_be_written_or_is_not_there(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    (tmp_path / "home").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(UserError, match=r"^data\.cache: .*; set data\.cache, or the variable XDG_CACHE_HOME, to ano"):
        open_index(settings("emoji/train"))
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda _: {}[0])  # a container's user whose number has no name
    with pytest.raises(UserError, match=r"^data\.cache: expected a user with a home folder, got none; set data\.cache"):
        open_index(settings("emoji/train"))


def _open(data, start, answers):
    start.wait()
    answers.put(captions(open_index(data)))


def test_the_index_command_says_how_many_keys_come_again(tmp_path, capsys):
    write_shards(tmp_path, [2])
    write_tar(tmp_path / "1.tar", [m for key in (5, 6, 5, 7, 6) for m in pair(key)])
    write_tar(tmp_path / "2.tar", [m for key in (8, 9, 8) for m in pair(key)])
    for _ in range(2):  # the second time from the member tables of the first
        assert index_shards.main([str(tmp_path)]) == 0
        assert [line.partition(" that")[0] for line in capsys.readouterr().err.splitlines() if "tar:" in line] == [
            f"{tmp_path}/1.tar: 2 of 5 samples have keys", f"{tmp_path}/2.tar: 1 of 3 samples has a key",
        ]  # fmt: skip


def test_processes_that_start_at_once_agree(tmp_path):
    """No index, packed shards, an empty cache: one process works, and none sees half a file."""
    for number in range(3):
        members = [m for i in range(number * 20, number * 20 + 20) for m in pair(i)]
        write_tar(tmp_path / f"{number}.tar.gz", members, "w:gz")
    context = multiprocessing.get_context("fork")
    start, answers = context.Event(), context.Queue()
    data = settings(str(tmp_path))
    processes = [context.Process(target=_open, args=(data, start, answers)) for _ in range(6)]
    for process in processes:
        process.start()
    start.set()
    found = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert found == [[f"sample {i}" for i in range(60)]] * 6


def test_the_names_of_the_embedded_splits():
    assert embedded_splits() == ["emoji/train", "emoji/val_concept", "emoji/val_style"]
