"""Real conversions: the embedded corpus, written out in each format of the field, comes back as it was."""

import csv
import io
import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

from amclr_scale.commands.main import main
from amclr_scale.config import schema
from amclr_scale.data.decoding import Field, Sample
from amclr_scale.data.evaluation_split import EvaluationSplit, class_names
from amclr_scale.data.indexing import open_index
from amclr_scale.data.ingestion import Annotations, pairs, read_records
from amclr_scale.data.loader import TrainLoader
from amclr_scale.data.text_views import clean_caption
from amclr_scale.errors import UserError
from tests.data.shards import pair, settings, write_shards, write_tar

N = 60


def run(tool, *arguments):
    command = [sys.executable, "-m", "amclr_scale", "shards", tool, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def here(capsys, tool, *arguments):
    """The same in this process, which has imported it all: exit code, standard output, standard error."""
    code = main(["shards", tool, *map(str, arguments)])
    return code, *capsys.readouterr()


def contents(name, n=None):
    """caption, captions and image bytes of a data set's samples, by image bytes."""
    index = open_index(schema.Data(), str(name))
    found = {}
    for i in range(n or index.num_samples):
        shard, row = index.locate(i)
        members = index.reader(shard).read(row, frozenset({"txt", "json", "webp", "png", "jpg"}))
        sample = Sample(members, 10**9, 10**9)
        image = next(members[kind] for kind in ("webp", "png", "jpg") if kind in members)
        found[image] = (sample.value(Field("txt")), sample.captions(Field("json", ("captions",))), sample)
    return found


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """60 samples of the embedded corpus as loose files, and their captions."""
    folder = tmp_path_factory.mktemp("loose")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        real = contents("emoji/val_concept", N)
    (folder / "images/sub").mkdir(parents=True)
    rows = []
    for i, (image, (_, captions, _)) in enumerate(real.items()):
        name = f"{'sub/' if i % 2 else ''}{i:04d}.webp"
        (folder / "images" / name).write_bytes(image)
        rows.append((name, captions, image))
    return folder, rows


def write_annotations(file, rows):
    file.write_text(
        json.dumps(
            [{"image": name, "caption": captions, "image_id": 7 * i} for i, (name, captions, _) in enumerate(rows)]
        )
    )


def write_coco(file, rows):
    images = [{"id": 1000 - i, "file_name": name} for i, (name, _, _) in enumerate(rows)]
    captions = [{"image_id": 1000 - i, "id": 9, "caption": c} for i, (_, found, _) in enumerate(rows) for c in found]
    file.write_text(json.dumps({"images": images, "annotations": captions}))


def write_karpathy(file, rows):
    images = [
        {"filepath": "sub" if "/" in name else "", "filename": name.rsplit("/", 1)[-1], "cocoid": i,
         "split": "val" if i < 10 else "train" if i % 2 else "restval", "sentences": [{"raw": c} for c in captions]}
        for i, (name, captions, _) in enumerate(rows)
    ]  # fmt: skip
    file.write_text(json.dumps({"images": images}))


def write_flickr30k(file, rows):
    lines = ["image_name| comment_number| comment"]
    lines += [f"{name}| {k}| {c}" for name, captions, _ in rows for k, c in enumerate(captions)]
    file.write_text("\n".join(lines) + "\nbroken row\n")


WRITERS = {
    "annotations": write_annotations,
    "coco": write_coco,
    "karpathy": write_karpathy,
    "flickr30k": write_flickr30k,
}


@pytest.mark.parametrize("form", WRITERS)
def test_records_round_trip(corpus, tmp_path, form):
    folder, rows = corpus
    WRITERS[form](tmp_path / "file", rows)
    records = read_records(form, Annotations(tmp_path / "file", folder / "images")).records
    assert [(r.image, list(r.captions)) for r in records] == [(name, captions) for name, captions, _ in rows]
    assert len(pairs(records)) == sum(len(captions) for _, captions, _ in rows)


def test_splits_are_chosen(corpus, tmp_path):
    folder, rows = corpus
    write_karpathy(tmp_path / "file", rows)
    sizes = [
        len(read_records("karpathy", Annotations(tmp_path / "file", folder / "images", s)).records)
        for s in ("val", "train,restval")
    ]
    assert sizes == [10, N - 10]
    with pytest.raises(UserError, match="expected records of split test, found none"):
        read_records("karpathy", Annotations(tmp_path / "file", folder / "images", "test"))


def test_tables_with_and_without_header_paths_and_urls(corpus, tmp_path):
    folder, rows = corpus
    images = folder / "images"
    (tmp_path / "cc3m.tsv").write_text(
        "".join(f"{c[0]}\thttp://host/x/{i}?size=big\n" for i, (_, c, _) in enumerate(rows))
    )
    (tmp_path / "names.tsv").write_text("".join(f"{c[0]}\thttps://host/{name[-9:]}\n" for name, c, _ in rows))
    with (tmp_path / "paths.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["Title", "split", "filepath"])
        table.writerows((c[0], "train", name) for name, c, _ in rows)
    for file in ("cc3m.tsv", "names.tsv", "paths.csv"):
        records = read_records("table", Annotations(tmp_path / file, images)).records
        assert [(r.image, *r.captions) for r in records] == [(name, c[0]) for name, c, _ in rows]


@pytest.mark.parametrize("named", ["rows", "urls"])
def test_a_picture_that_was_not_downloaded_is_not_replaced_by_another_one(tmp_path, named):
    """Rows and the last parts of urls are both numbers here, and most of them are missing or shared."""
    urls = [f"http://host/{last}.jpg" for last in (3, 9, 7, 5, 4, 6, 11)] + ["http://a/2.jpg", "http://b/2.jpg"]
    (tmp_path / "table.tsv").write_text("".join(f"caption {row}\t{url}\n" for row, url in enumerate(urls)))
    there = {"rows": [0, 2, 3, 5, 7], "urls": [3, 7, 4, 6, 11, 2]}[named]  # missing: 1 4 6 8, and 9 5
    for number in there:
        (tmp_path / f"{number}.jpg").touch()
    records = read_records("table", Annotations(tmp_path / "table.tsv", tmp_path)).records
    found = {row: r.image for row, r in enumerate(records) if "://" not in r.image}
    rows = {"rows": {row: row for row in there}, "urls": {0: 3, 2: 7, 4: 4, 5: 6, 6: 11}}[named]
    assert found == {row: f"{number}.jpg" for row, number in rows.items()}


def test_marks_and_brackets_in_front(tmp_path):
    """A byte order mark is no part of the first column's name, and not every bracket begins a JSON list."""
    (tmp_path / "a.csv").write_text('image,caption\na.jpg,[A man] sits\na.jpg,"[""one"", ""two""]"\n', "utf-8-sig")
    (records,) = read_records("flickr30k", Annotations(tmp_path / "a.csv", tmp_path)).records
    assert records.captions == ("[A man] sits", "one", "two")
    records, _ = read_records("table", Annotations(tmp_path / "a.csv", tmp_path)).records
    assert (records.image, records.captions) == ("a.jpg", ("[A man] sits",))
    (tmp_path / "a.json").write_text('[{"image": "a.jpg", "caption": "x"}]', "utf-8-sig")
    assert len(read_records("annotations", Annotations(tmp_path / "a.json", tmp_path)).records) == 1


def test_folders_of_text_and_of_classes(corpus, tmp_path):
    _, rows = corpus
    for i, (_, captions, image) in enumerate(rows[:10]):
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / f"text/{i}.webp").write_bytes(image)
        (tmp_path / f"text/{i}.txt").write_text("\n".join(captions))
        (tmp_path / f"class/red_{i % 2}").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"class/red_{i % 2}/{i}.webp").write_bytes(image)
    records = read_records("folder", Annotations(None, tmp_path / "text")).records
    assert [list(r.captions) for r in records] == [captions for _, captions, _ in rows[:10]]
    records = read_records("folder", Annotations(None, tmp_path / "class")).records
    assert (
        sorted((r.captions[0], r.fields["class"]) for r in records)
        == [("red 0", "red_0")] * 5 + [("red 1", "red_1")] * 5
    )


@pytest.mark.slow
@pytest.mark.launch
def test_annotations_to_shards_and_back(corpus, tmp_path, capsys):
    """The whole tool: images byte for byte, every caption, ids by image; then a second run finds nothing to do."""
    folder, rows = corpus
    write_annotations(tmp_path / "train.json", rows)
    out = tmp_path / "out"
    arguments = ["annotations", "--annotations", tmp_path / "train.json", "--images", folder / "images", "--out", out]
    arguments += ["--per-shard", 25]
    first = run("make", *arguments, "--workers", 2)
    assert first.returncode == 0, first.stderr
    assert "read 60, wrote 60 samples in 3 shards, rejected 0" in first.stdout
    found = contents(out)
    assert {image: captions for image, (_, captions, _) in found.items()} == {image: c for _, c, image in rows}
    assert all(text == captions[0] for text, captions, _ in found.values())
    times = [path.stat().st_mtime_ns for path in sorted(out.glob("*.tar"))]
    (out / "00001.tar").unlink()  # as if it had been interrupted there
    code, _, said = here(capsys, "make", *arguments)
    assert code == 0, said
    after = [path.stat().st_mtime_ns for path in sorted(out.glob("*.tar"))]
    assert [a == b for a, b in zip(times, after, strict=True)] == [True, False, True]
    assert contents(out).keys() == found.keys()
    code, _, said = here(capsys, "make", *arguments, "--clean")
    assert code == 2
    assert "--out:" in said
    assert "made with other arguments" in said


def test_pairs_share_an_image_id_and_rejects_are_listed(corpus, tmp_path, capsys):
    _, rows = corpus
    images = tmp_path / "images"
    images.mkdir()
    entries = []
    odd = {5: "gone.webp", 9: os.fsdecode(b"caf\xe9.webp")}  # a name that is not UTF-8
    for i, (_, captions, data) in enumerate(rows[:20]):
        if i != 5:
            (images / odd.get(i, f"{i}.webp")).write_bytes(data if i != 3 else data[:50])
        said = {7: ["", " "], 11: [captions[0] + " \ud83d", *captions[1:]]}  # half of an emoji
        entries.append({"image": odd.get(i, f"{i}.webp"), "caption": said.get(i, captions)})
    (tmp_path / "train.json").write_text(json.dumps(entries))
    out = tmp_path / "out"
    code, _, said = here(
        capsys, "make", "annotations", "--annotations", tmp_path / "train.json", "--images", images, "--out", out,
        "--layout", "pairs", "--resize", 32, "--encode", "png",
    )  # fmt: skip
    assert code == 0, said
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    kinds = {(reject["row"], reject["image"], reject["kind"]) for reject in rejects}
    assert kinds == {(3, "3.webp", "corrupt image"), (5, "gone.webp", "no such image"), (7, "7.webp", "no caption")}
    expected = sum(len(c) for i, (_, c, _) in enumerate(rows[:20]) if i not in (3, 5, 7))
    data = settings(str(out), image_id="json.image_id", lanes=1, image_size=32)
    loader = TrainLoader(data, seed=0, global_batch_size=expected)
    assert loader.num_samples == expected
    batch = next(loader)
    assert sorted(batch.text_ids.tolist()) == list(range(expected))
    assert set(batch.ids.tolist()) == set(range(19)) - {3, 5}  # numbers of the 19 images that have captions
    assert Image.open(next(iter((tmp_path / "images").glob("1.webp")))).size == (64, 64)
    split = EvaluationSplit(str(out), data)
    assert len(split.image_ids.unique()) == 17
    assert sum("\ufffd" in caption for caption in split.captions) == 1


def test_a_picture_of_a_kind_that_its_name_does_not_say(tmp_path):
    """Cameras write several pictures into one .jpeg, and the web calls a GIF so."""
    from amclr_scale.data.formats.encoding import Encoding, encode

    Image.new("RGB", (40, 20), "red").save(
        tmp_path / "a.jpeg", "MPO", save_all=True, append_images=[Image.new("L", (4, 4))]
    )
    Image.new("P", (40, 20)).save(tmp_path / "b.jpeg", "GIF")
    for name, kind in (("a.jpeg", ("jpg", "JPEG")), ("b.jpeg", ("png", "PNG"))):
        extension, data, size = encode((tmp_path / name).read_bytes(), Encoding(10, "keep", 95, clean=False))
        assert (extension, Image.open(io.BytesIO(data)).format, size) == (*kind, (20, 10))
    whole = (tmp_path / "b.jpeg").read_bytes()
    assert encode(whole, Encoding(None, "keep", 95, clean=False)) == ("gif", whole, (40, 20))


def test_what_an_interrupted_run_has_left_goes(tmp_path):
    from amclr_scale.commands.make_shards import check_plan

    check_plan(tmp_path, {"records": 1})
    for name in (".00000.tar.1234", "00001.tar"):
        (tmp_path / name).touch()
    check_plan(tmp_path, {"records": 1})
    assert {path.name for path in tmp_path.glob("*.tar*")} | {path.name for path in tmp_path.glob(".*")} == {
        "00001.tar"
    }


def test_clip_benchmarks_layout_round_trips(corpus, tmp_path):
    """wds_* folders: test/0.tar ..., one caption a line, classes beside; no conversion at all."""
    _, rows = corpus
    root = tmp_path / "wds_emoji"
    for shard in range(12):
        members = []
        for i in range(shard * 5, shard * 5 + 5):
            _, captions, image = rows[i]
            members += [(f"s{i:07d}.webp", image), (f"s{i:07d}.txt", "\n".join(captions).encode())]
            members += [(f"s{i:07d}.cls", str(i % 3).encode())]
        write_tar(root / f"test/{shard}.tar", members)
    (root / "test/nshards.txt").write_text("12")
    (root / "classnames.txt").write_text("one\ntwo\nthree\n")
    data = schema.Data(image_size=64)
    split = EvaluationSplit(str(root), data, classes="cls")
    assert split.caption_lists == [captions for _, captions, _ in rows]  # 2.tar before 10.tar
    assert split.labels == [i % 3 for i in range(N)]
    assert class_names(str(root), data, "cls") == ["one", "two", "three"]
    ours = torch.cat([batch.images[0] for batch in split.batches(16)])
    theirs = EvaluationSplit("emoji/val_concept", data)
    torch.testing.assert_close(ours, next(theirs.batches(N)).images[0], rtol=0, atol=0)


def test_two_data_sets_with_image_ids_do_not_collide(tmp_path):
    for name in "ab":
        write_tar(tmp_path / name / "0.tar", [m for i in range(6) for m in pair(i, image_id=i // 2)])
    data = settings([str(tmp_path / "a"), str(tmp_path / "b")], image_id="json.image_id", lanes=1)
    batch = next(TrainLoader(data, seed=0, global_batch_size=12))
    assert sorted(batch.ids.tolist()) == [0, 0, 1, 1, 2, 2, 6, 6, 7, 7, 8, 8]
    by_text = dict(zip(batch.text_ids.tolist(), batch.ids.tolist(), strict=True))
    assert by_text == {i: (i // 6) * 6 + i % 6 // 2 for i in range(12)}
    write_tar(tmp_path / "c/0.tar", [m for i in range(6) for m in pair(i, image_id=i if i < 5 else 77)])
    loader = TrainLoader(
        settings(str(tmp_path / "c"), image_id="json.image_id", lanes=1, max_bad_fraction=0.5),
        seed=0,
        global_batch_size=6,
    )
    next(loader)
    assert loader.counts == {"bad image id": 1}


def test_albefs_clean_up():
    assert clean_caption("A <person>, in-the sun: it's (very) hot!") == "a person in the sun its very hot"
    assert clean_caption("Half-time\t at 5/6; #1 `quoted` & 50% [x]\n") == "half time at 5 6 1 `quoted` & 50% [x]"
    assert len(clean_caption("word " * 50).split()) == 30


@pytest.mark.parametrize(
    ("form", "content", "words"),
    [
        ("annotations", "[", "expected JSON"),
        ("annotations", "[]", "expected records, found none"),
        ("annotations", "null", "expected a list"),
        ("coco", "{}", "expected COCO captions"),
        ("karpathy", '{"images": [{}]}', "expected an image with its split"),
        ("flickr30k", "a,b\n", "expected a header"),
    ],
)
def test_a_file_of_another_format_is_told(tmp_path, form, content, words):
    (tmp_path / "file").write_text(content)
    with pytest.raises(UserError, match=f"^--annotations: .*{words}"):
        read_records(form, Annotations(tmp_path / "file", tmp_path))


@pytest.mark.slow
@pytest.mark.launch
def test_the_index_tool(tmp_path, capsys):
    write_shards(tmp_path, [3, 4])
    result = run("index", tmp_path, "--workers", 2)
    assert result.returncode == 0, result.stderr
    assert "7 samples in 2 shards, fingerprint" in result.stdout
    index = open_index(settings(str(tmp_path)))
    assert index.shards[0].members.parent == tmp_path / "members"
    assert index.fingerprint in result.stdout
    code, _, said = here(capsys, "index", tmp_path / "nothing.tar")
    assert code == 2
    assert said.startswith("shards: no such shard")
