"""Tables as people hold them: every row is read or listed with its reason, whatever the dialect."""

import csv
import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from amclr_scale.commands.make_shards import main as make_shards
from amclr_scale.data.ingestion import Annotations, read_records
from amclr_scale.errors import UserError


@pytest.fixture
def read(tmp_path):
    def call(name, content, form="table", **options):
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_records(form, Annotations(file, tmp_path, **options))

    return call


def captions(found):
    return [(record.image, *record.captions) for record in found.records]


CASES = {
    "quoted_tabs.tsv": (
        'filepath\ttitle\n0.jpg\t"a ""quoted"" cat"\n1.jpg\t"a\ttab"\n2.jpg\tplain\n',
        [("0.jpg", 'a "quoted" cat'), ("1.jpg", "a\ttab"), ("2.jpg", "plain")],
    ),
    "newline.tsv": (
        'filepath\ttitle\n0.jpg\t"two\nlines"\n1.jpg\ta dog\n',
        [("0.jpg", "two\nlines"), ("1.jpg", "a dog")],
    ),
    "bar_in_header.csv": ("image,caption|en\n0.jpg,a cat\n1.jpg,b\n", [("0.jpg", "a cat"), ("1.jpg", "b")]),
    "bar_first_row.csv": (
        '"red | blue dress",0.jpg\na cat,1.jpg\na dog,2.jpg\n',
        [("0.jpg", "red | blue dress"), ("1.jpg", "a cat"), ("2.jpg", "a dog")],
    ),
    "semicolons.csv": ("filepath;title\n0.jpg;a, cat\n1.jpg;a dog\n", [("0.jpg", "a, cat"), ("1.jpg", "a dog")]),
    "cc3m.tsv": (  # no header, no quoting: quotes are marks of the captions
        'a "big" cat\t0.jpg\n"so said" he, it is\t1.jpg\n"\t2.jpg\n',
        [("0.jpg", 'a "big" cat'), ("1.jpg", '"so said" he, it is'), ("2.jpg", '"')],
    ),
    "quotes_that_close_by_chance.tsv": (  # read as CSV, without an error, two rows would become one
        '"hello\t0.jpg\na pipe of 5"\t1.jpg\nb\t2.jpg\n',
        [("0.jpg", '"hello'), ("1.jpg", 'a pipe of 5"'), ("2.jpg", "b")],
    ),
    "a_comma_each.txt": ("a cat, black\t0.jpg\na, b\t1.jpg\n", [("0.jpg", "a cat, black"), ("1.jpg", "a, b")]),
    "german_excel.csv": ("a cat, black;0.jpg\na, b;1.jpg\n", [("0.jpg", "a cat, black"), ("1.jpg", "a, b")]),
    "quoted_all.tsv": ('"image"\t"caption"\n"0.jpg"\t"a"\n"1.jpg"\t"b"\n', [("0.jpg", "a"), ("1.jpg", "b")]),
    "pandas_index.csv": (",filepath,title\n0,0.jpg,a cat\n1,1.jpg,b\n", [("0.jpg", "a cat"), ("1.jpg", "b")]),
    "many_columns.csv": ("filepath,title,caption\n0.jpg,a title,a caption\n", [("0.jpg", "a caption")]),
    "commas_in_all.tsv": ("title\tfilepath\na, b\t0.jpg\nc, d\t1.jpg\n", [("0.jpg", "a, b"), ("1.jpg", "c, d")]),
    "trailing.csv": ("image,caption,,\n0.jpg,a cat,,\n1.jpg,a dog,,\n", [("0.jpg", "a cat"), ("1.jpg", "a dog")]),
    "two.jsonl": (
        '{"image": "0.jpg", "caption": "a cat"}\n\n{"image": "1.jpg", "caption": ["b", "c"]}\n',
        [("0.jpg", "a cat"), ("1.jpg", "b", "c")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_dialect_is_decided(read, name):
    content, want = CASES[name]
    found = read(name, content)
    assert captions(found) == want
    assert found.rejects == []
    assert found.decided.startswith(f"{name}: ")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_encodings_of_spreadsheets(read, encoding):
    found = read("a.csv", "image,caption\n0.jpg,größe\n".encode(encoding))
    assert captions(found) == [("0.jpg", "größe")]


def test_another_encoding_is_told(read):
    with pytest.raises(UserError, match=r"expected text in UTF-8 or UTF-16, got byte 0xf6"):
        read("a.csv", "image,caption\n0.jpg,größe\n".encode("latin-1"))


def test_rows_that_do_not_fit_are_listed(read):
    found = read("short_row.csv", "filepath,title\n0.jpg,a cat\n1.jpg\n2.jpg,a, dog\n3.jpg,\n,a bird\n")
    assert captions(found) == [("0.jpg", "a cat")]
    kinds = [(reject.row, reject.kind) for reject in found.rejects]
    assert kinds == [(1, "short row"), (2, "long row"), (3, "no caption"), (4, "no image path")]


def test_a_huge_cell_is_a_reject(read):
    found = read("a.csv", f"image,caption\n0.jpg,{'x' * 200_000}\n1.jpg,b\n")
    assert captions(found) == [("1.jpg", "b")]
    assert [(reject.row, reject.kind) for reject in found.rejects] == [(0, "huge cell")]


def test_an_unclosed_quote_is_told_with_its_line(read):
    content = 'filepath,title\n0.jpg,"a cat"\n1.jpg,"a dog\n2.jpg,a bird\n'
    with pytest.raises(UserError, match=r"open_quote.csv, line 3: a quote that is opened there is never closed"):
        read("open_quote.csv", content)
    assert captions(read("open_quote.csv", content, quoting="none")) == [
        ("0.jpg", '"a cat"'), ("1.jpg", '"a dog'), ("2.jpg", "a bird"),
    ]  # fmt: skip


def test_in_a_table_whose_quotes_hold_rows_together_too(read):
    content = 'filepath\ttitle\n0.jpg\t"a\ttab"\n1.jpg\t"open\n2.jpg\tb\n'
    with pytest.raises(UserError, match=r"a.tsv, line 3: a quote that is opened there is never closed"):
        read("a.tsv", content)


def test_a_quote_that_swallows_rows_is_told(read):
    """It is closed by the quote that the next caption ends with, so that the text is well-formed CSV."""
    content = 'filepath,title\n0.jpg,"a dog\n1.jpg,a cat\n2.jpg,a pipe of 5"\n3.jpg,b\n'
    with pytest.raises(UserError, match=r"a.csv, line 2: a quote that is opened there joins 3 lines which are rows of"):
        read("a.csv", content)
    assert [row[0] for row in captions(read("a.csv", content, quoting="csv"))] == ["0.jpg", "3.jpg"]
    assert len(captions(read("a.csv", content, quoting="none"))) == 4


def test_options_override_what_is_decided(read):
    found = read("a.txt", "x;0.jpg;a|b\ny;1.jpg;c\n", separator="semicolon", image_column="1", caption_column="2")
    assert captions(found) == [("0.jpg", "a|b"), ("1.jpg", "c")]
    found = read("a.csv", "foo,bar\n0.jpg,a\n", image_column="foo", caption_column="bar")
    assert captions(found) == [("0.jpg", "a")]
    with pytest.raises(UserError, match=r"^--caption-column: .*expected baz, got the columns image, caption"):
        read("a.csv", "image,caption\n0.jpg,a\n", caption_column="baz")


def test_parquet(tmp_path):
    pq.write_table(pa.table({"path": ["0.jpg", "1.jpg", None], "text": ["a", None, "c"]}), tmp_path / "t.parquet")
    found = read_records("table", Annotations(tmp_path / "t.parquet", tmp_path))
    assert captions(found) == [("0.jpg", "a")]
    assert [(reject.row, reject.kind) for reject in found.rejects] == [(1, "no caption"), (2, "no image path")]


def pictures(count):
    """`count` tiny PNGs, each of a colour of its own."""
    found = []
    for number in range(count):
        out = io.BytesIO()
        Image.new("RGB", (8, 8), (number, 0, 0)).save(out, "PNG")
        found.append(out.getvalue())
    return found


def saved_by_datasets(folder, splits):
    """What `datasets.DatasetDict.save_to_disk` leaves: a folder per split, its arrow streams and their list."""
    number = iter(pictures(100))
    for split, sizes in splits.items():
        (folder / split).mkdir(parents=True)
        names = [f"data-{i:05d}-of-{len(sizes):05d}.arrow" for i in range(len(sizes))]
        for name, size in zip(names, sizes, strict=True):
            image = [{"bytes": next(number), "path": "same.png"} for _ in range(size)]
            table = pa.table({"image": image, "caption": [[f"{name} {i}", "second"] for i in range(size)]})
            with pa.OSFile(str(folder / split / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table, max_chunksize=2)
        (folder / split / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
        (folder / split / "dataset_info.json").write_text("{}")
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))


def colours(folder):
    """Caption -> the colour of the picture, of everything in a folder's shards."""
    found = {}
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            members = {info.name: tar.extractfile(info).read() for info in tar}
        for name, data in members.items():
            if name.endswith(".png"):
                found[members[name.replace(".png", ".txt")].decode()] = Image.open(io.BytesIO(data)).getpixel((0, 0))[0]
    return found


def test_what_datasets_has_saved(tmp_path, capsys):
    saved_by_datasets(tmp_path / "saved", {"train": [5, 3], "test": [2]})
    arguments = ["table", "--annotations", str(tmp_path / "saved"), "--out", str(tmp_path / "out"), "--per-shard", "3"]
    assert make_shards(arguments) == 2
    assert "--split: expected one or several of train, test" in capsys.readouterr().err
    assert make_shards([*arguments, "--split", "train"]) == 0
    said = capsys.readouterr()
    assert "saved: 2 .arrow files; images in column image, captions in caption; read 8\n" in said.err
    assert "read 8, wrote 8 samples in 3 shards, rejected 0" in said.out
    want = [f"data-00000-of-00002.arrow {i}" for i in range(5)] + [f"data-00001-of-00002.arrow {i}" for i in range(3)]
    assert colours(tmp_path / "out") == {caption: number for number, caption in enumerate(want)}


def test_pictures_inside_parquet(tmp_path, capsys):
    """Bytes, bytes that are none, and a path in the place of bytes."""
    images = [{"bytes": data, "path": None} for data in pictures(5)]
    images[1] = {"bytes": None, "path": "beside.png"}
    images[3] = {"bytes": None, "path": None}
    (tmp_path / "beside.png").write_bytes(pictures(1)[0])
    table = pa.table({"image": images, "text": [f"c{i}" for i in range(5)]})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=2)
    out = tmp_path / "out"
    assert make_shards(["table", "--annotations", str(tmp_path / "t.parquet"), "--out", str(out)]) == 0
    assert "read 5, wrote 4 samples in 1 shards, rejected 1 (1 no such image; rejects.jsonl)" in capsys.readouterr().out
    assert colours(out) == {"c0": 0, "c1": 0, "c2": 2, "c4": 4}
    (reject,) = (json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines())
    assert (reject["row"], reject["image"]) == (3, "t.parquet#3")


def test_webdataset_s_writer_gives_our_bytes_a_member_at_a_time_alone(tmp_path):
    """Of a whole sample it sorts the members by name; docs/data.md says why shards are written without it."""
    folder, out = tmp_path / "K\u00e4se", tmp_path / "out"
    folder.mkdir()
    for number, picture in enumerate(pictures(3)):
        (folder / f"{number}.png").write_bytes(picture)
        (folder / f"{number}.txt").write_text(f"caption {number}")
    assert make_shards(["folder", "--images", str(folder), "--out", str(out)]) == 0
    ours = (out / "00000.tar").read_bytes()
    with tarfile.open(out / "00000.tar") as tar:
        members = [(*info.name.partition(".")[::2], tar.extractfile(info).read()) for info in tar]
    as_ours = {"encoder": False, "mtime": 0, "user": "", "group": "", "mode": 0o644}
    single, whole, samples = io.BytesIO(), io.BytesIO(), {}
    with wds.TarWriter(single, **as_ours) as writer:
        for key, kind, content in members:
            writer.write({"__key__": key, kind: content})
            samples.setdefault(key, {"__key__": key})[kind] = content
    assert single.getvalue() == ours
    with wds.TarWriter(whole, **as_ours) as writer:
        for sample in samples.values():
            writer.write(sample)
    assert whole.getvalue() != ours


def test_where_everything_is_rejected_nothing_is_done(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("image,caption\n0.jpg\n1.jpg,x\n2.jpg,\n")
    assert make_shards(["table", "--annotations", str(tmp_path / "a.csv"), "--out", str(tmp_path / "out")]) == 2
    assert "all 3 of 3 records were rejected (1 short row, 1 no caption, 1 no such image" in capsys.readouterr().err


def coco(*captions):
    """COCO's file of one image."""
    listed = [{"image_id": 1, "caption": caption} for caption in captions]
    return {"images": [{"id": 1, "file_name": "0.jpg"}], "annotations": listed}


def karpathy(*captions):
    """Karpathy's file of one image."""
    sentences = [{"raw": caption} for caption in captions]
    return {"images": [{"filename": "0.jpg", "split": "train", "sentences": sentences}]}


NO_CAPTIONS = ["null caption", "blank caption", "caption that is a number", "caption that is a number"]
ODD = ["a", None, " ", 5, float("nan")]


@pytest.mark.parametrize(
    ("form", "content", "records", "rejects"),
    [
        ("annotations", [{"image": "0.jpg", "caption": ODD}], [("0.jpg", "a")], NO_CAPTIONS),
        ("coco", coco(*ODD), [("0.jpg", "a")], NO_CAPTIONS),
        ("karpathy", karpathy(*ODD), [("0.jpg", "a")], NO_CAPTIONS),
        ("coco", coco(None), [], ["no caption"]),
        ("karpathy", karpathy(None), [], ["no caption"]),
        ("annotations", [{"image": "0.jpg", "caption": None}, {"image": "1.jpg"}], [], ["no caption"] * 2),
        ("annotations", [{"image": None, "caption": "a"}, 7], [], ["no image path"] * 2),
        ("annotations", [{"image": "d\\0.jpg", "caption": "a"}], [("d/0.jpg", "a")], []),
    ],
)
def test_what_is_no_caption_never_becomes_one(read, form, content, records, rejects):
    found = read("a.json", json.dumps(content), form)
    assert captions(found) == records
    assert [reject.kind for reject in found.rejects] == rejects


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_json_lines_are_a_list_of_annotations(read, name):
    lines = '{"image": "0.jpg", "caption": "a"}\n\n{"image": "1.jpg", "caption": ["b", "c"]}\n'
    assert captions(read(name, lines, "annotations")) == [("0.jpg", "a"), ("1.jpg", "b", "c")]
    with pytest.raises(UserError, match=r"a.jsonl?, line 3: expected a JSON object, got "):
        read(name, lines.replace("]}", "]"), "annotations")


def test_other_keys_and_backslashes_are_told(read):
    (reject, _) = read("a.json", '[{"image_path": "0.jpg", "text": "a"}, 1]', "annotations").rejects
    assert (reject.kind, reject.detail) == ("no image path", '{"image_path": "0.jpg", "text": "a"}')
    with pytest.raises(UserError, match=r"in JSON a backslash is written twice, or use / in paths"):
        read("a.json", '[{"image": "d\\0.jpg", "caption": "a"}]', "annotations")


CELL = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")) | st.sampled_from('",;|\t\n'), max_size=12)
ROW = st.tuples(st.sampled_from(["whole", "whole", "short", "long"]), CELL)


def written(rows, separator, quoted, ending):
    """A table as spreadsheets write it: a name and a caption; ragged rows have a cell more, or less."""
    out = io.StringIO(newline="")
    style = {"quoting": csv.QUOTE_ALL if quoted else csv.QUOTE_MINIMAL, "lineterminator": ending}
    writer = csv.writer(out, delimiter=separator, **style)
    writer.writerow(["filepath", "title"])
    for number, (kind, caption) in enumerate(rows):
        cells = [f"{number}.jpg", caption]
        writer.writerow({"whole": cells, "short": cells[:1], "long": [*cells, "more"]}[kind])
    return out.getvalue()


def is_plain_too(kind, caption, separator):
    """Whether what is cut from a quoted cell at its newlines may be whole rows as well: between tabs and bars, where
    quotes may be marks, such a table has two meanings."""
    return "\n" in caption and (kind == "long" or separator in caption)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(ROW, min_size=1, max_size=8), separator=st.sampled_from(",\t;|"), quoted=st.booleans(),
    ending=st.sampled_from(["\n", "\r\n"]), encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)  # fmt: skip
@example(rows=[("short", "a")], separator=",", quoted=False, ending="\n", encoding="utf-8")
@example(rows=[("whole", '"\t'), ("long", "")], separator="\t", quoted=False, ending="\n", encoding="utf-8")
def test_every_row_is_found_again(tmp_path_factory, rows, separator, quoted, ending, encoding):
    assume(separator in ",;" or not any(is_plain_too(*row, separator) for row in rows))
    folder = tmp_path_factory.mktemp("t")
    file = folder / "table.csv"
    file.write_bytes(written(rows, separator, quoted, ending).encode(encoding))
    found = read_records("table", Annotations(file, folder))
    whole = {f"{n}.jpg": text.strip() for n, (kind, text) in enumerate(rows) if kind == "whole" and text.strip()}
    assert {record.image: record.captions[0] for record in found.records} == whole
    places = [one.row for one in found.records] + [one.row for one in found.rejects]
    assert sorted(places) == list(range(len(rows)))
