"""Pictures are known by their bytes, and what is passed over is told: in folders, class folders, shards."""

import io
import json
import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin, TiffImagePlugin

from amclr_scale.commands.make_shards import main as make_shards
from amclr_scale.data.decoding import BadSampleError, Sample, decode, readable_formats
from amclr_scale.data.evaluation_split import EvaluationSplit
from amclr_scale.data.formats.picture_files import Classes, find_pictures
from amclr_scale.data.formats.tar import scan
from amclr_scale.data.indexing import open_index
from amclr_scale.data.ingestion import Annotations, read_records
from amclr_scale.errors import UserError
from amclr_scale.evaluation.image_files import picture_folder
from tests.data.shards import settings, write_tar

KINDS = {"jpg": "JPEG", "tif": "TIFF", "gif": "GIF", "jfif": "JPEG", "avif": "AVIF", "jp2": "JPEG2000", "jpe": "JPEG",
         "bmp": "BMP", "png": "PNG"}  # fmt: skip


def saved(kind="JPEG", colour=(90, 30, 99), **options):
    out = io.BytesIO()
    Image.new("RGB", (40, 40), colour).save(out, kind, **options)
    return out.getvalue()


def sample(data):
    return decode(Sample({"jpg": data}, 10**6, 1).image())


HEIC = b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf" + bytes(20)  # how such a file begins


@pytest.fixture
def no_heif(monkeypatch):
    """As where pillow-heif is not installed."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    readable_formats.cache_clear()
    yield
    readable_formats.cache_clear()


@pytest.fixture
def classes(tmp_path, no_heif):
    """Two folders with a picture of every kind, one of them under a name that says nothing; and what is none."""
    for colour, name in ((0, "tabby_cat"), (200, "fire_truck")):
        (tmp_path / name).mkdir()
        for i, (extension, kind) in enumerate(KINDS.items()):
            (tmp_path / name / f"{i}.{extension}").write_bytes(saved(kind, (colour, 9 * i, 99)))
        (tmp_path / name / "no_ending").write_bytes(saved())
        (tmp_path / name / "photo.heic").write_bytes(HEIC)
        (tmp_path / name / "film.mov").write_bytes(bytes(100))
        (tmp_path / name / ".DS_Store").write_bytes(bytes(9))
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".ipynb_checkpoints" / "0.jpg").write_bytes(saved())
    return tmp_path


PASSED_OVER = "passed over 4 files that are no readable pictures: 2 .heic (needs pillow-heif), 2 .mov"


def test_a_picture_of_any_kind_counts_and_the_others_are_told(classes, caplog, capsys):
    found = find_pictures(classes)
    assert (len(found.pictures), found.told()) == (2 * (len(KINDS) + 1), PASSED_OVER)
    records = read_records("folder", Annotations(None, classes))
    assert [record.captions for record in records.records] == [("fire truck",)] * 10 + [("tabby cat",)] * 10
    items = picture_folder(classes)
    assert [item.label for item in items] == ["fire_truck"] * 10 + ["tabby_cat"] * 10
    assert PASSED_OVER in caplog.text
    assert make_shards(["folder", "--images", str(classes), "--out", str(classes / ".out"), "--encode", "png"]) == 0
    said = capsys.readouterr()
    assert f"a folder of pictures; {PASSED_OVER}; read 20\n" in said.err
    assert "read 20, wrote 20 samples in 1 shards, rejected 0" in said.out


def test_heic_without_a_decoder_is_named(tmp_path, no_heif, capsys):
    """In a folder and where annotations name it; other files of the family are known by their brands."""
    for brand in (b"heic", b"mif1"):
        with pytest.raises(BadSampleError) as caught:
            sample(HEIC.replace(b"ftypheic", b"ftyp" + brand))
        assert (caught.value.kind, caught.value.detail) == ("no decoder", "HEIC: pip install pillow-heif")
    (tmp_path / "0.heic").write_bytes(HEIC)
    assert make_shards(["folder", "--images", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    told = (
        "expected pictures, found none; passed over 1 files that are no readable pictures: 1 .heic (needs pillow-heif)"
    )
    assert capsys.readouterr().err.endswith(f"--images: {tmp_path}: {told}\n")
    (tmp_path / "0.jpg").write_bytes(saved())
    pairs = [{"image": name, "caption": "a"} for name in ("0.heic", "0.jpg")]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    assert (
        make_shards(["annotations", "--annotations", str(tmp_path / "pairs.json"), "--out", str(tmp_path / "out")]) == 0
    )
    assert "read 2, wrote 1 samples in 1 shards, rejected 1 (1 no decoder; rejects.jsonl)" in capsys.readouterr().out


def test_heic_with_its_decoder(tmp_path, capsys):
    """It is a picture like others, and becomes PNG in shards, which everybody can read."""
    pytest.importorskip("pillow_heif")
    readable_formats()  # registers it
    Image.new("RGB", (64, 48), (90, 30, 99)).save(tmp_path / "0.heic", quality=95)
    (tmp_path / "0.txt").write_text("a plum")
    assert decode(Sample({"heic": (tmp_path / "0.heic").read_bytes()}, 10**6, 1).image()).size == (64, 48)
    assert make_shards(["folder", "--images", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert "read 1, wrote 1 samples in 1 shards, rejected 0" in capsys.readouterr().out
    split = EvaluationSplit(str(tmp_path / "out"), settings(str(tmp_path / "out"), image_size=32))
    (batch,) = split.batches(2)
    assert (batch.images[0][0].float().mean((1, 2)) - torch.tensor([90.0, 30.0, 99.0])).abs().max() < 4
    (item,) = picture_folder(tmp_path)
    assert (item.path.name, item.captions) == ("0.heic", ["a plum"])


def test_folders_inside_picture_folder(tmp_path):
    """class/images/*.jpg is the class; of train/class and val/class one has to be named."""
    for name in ("cat/images/0.jpg", "dog/images/0.jpg", "dog/images/1.jpg"):
        (tmp_path / "deep" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "deep" / name).write_bytes(saved())
    items = picture_folder(tmp_path / "deep")
    assert [(item.label, item.path.name) for item in items] == [("cat", "0.jpg"), ("dog", "0.jpg"), ("dog", "1.jpg")]
    records = read_records("folder", Annotations(None, tmp_path / "deep")).records
    assert [record.captions for record in records] == [("cat",), ("dog",), ("dog",)]
    for name in ("animals/cat/0.jpg", "animals/dog/0.jpg", "things/cup/0.jpg", "things/jar/a/0.jpg"):
        (tmp_path / "nested" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "nested" / name).write_bytes(saved())
    assert [item.label for item in picture_folder(tmp_path / "nested")] == ["cat", "cup", "dog", "jar"]
    for name in ("train/cat/0.jpg", "train/dog/0.jpg", "val/cat/0.jpg", "val/dog/0.jpg"):
        (tmp_path / "parts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "parts" / name).write_bytes(saved())
    with pytest.raises(
        UserError, match="both train/cat and val/cat hold the class cat; name the folder of one of them"
    ):
        picture_folder(tmp_path / "parts")
    (tmp_path / "deep" / "empty").mkdir()
    (tmp_path / "deep" / "empty" / "a.mov").touch()
    with pytest.raises(UserError, match=r"the class empty has no images; .*passed over 1 files .*: 1 \.mov"):
        picture_folder(tmp_path / "deep")


def test_a_picture_beside_the_picture_folder_has_no_class(tmp_path):
    pictures = [tmp_path / "0.jpg", tmp_path / "cat" / "0.jpg"]
    assert [Classes(tmp_path, pictures).folder(one) for one in pictures] == [None, tmp_path / "cat"]


def test_the_text_in_a_png_is_no_reason_to_refuse_its_pixels():
    about = PngImagePlugin.PngInfo()
    about.add_text("prompt", "x" * 3_000_000, zip=True)
    assert sample(saved("PNG", (1, 2, 3), pnginfo=about)).getpixel((5, 5)) == (1, 2, 3)


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_pixels_of_32_bits_have_the_range_that_their_file_names(kind):
    ramp = np.linspace(-50, 950, 256).astype(kind).reshape(16, 16)
    out = io.BytesIO()
    Image.fromarray(ramp).save(out, "TIFF")
    with pytest.raises(BadSampleError, match="pixels of unknown range"):
        sample(out.getvalue())
    tags, out = TiffImagePlugin.ImageFileDirectory_v2(), io.BytesIO()
    for tag, value in ((340, -50.0), (341, 950.0)):
        tags.tagtype[tag], tags[tag] = 12, value
    Image.fromarray(ramp).save(out, "TIFF", tiffinfo=tags)
    want = ((ramp.astype(np.float64) + 50) / 1000 * 255).round()
    np.testing.assert_array_equal(np.asarray(sample(out.getvalue()))[:, :, 0], want)


def members(names, count=40):
    return [
        (name.format(i), saved() if "txt" not in name else f"c{i}".encode()) for i in range(count) for name in names
    ]


def test_shards_hold_pictures_of_every_kind(tmp_path):
    write_tar(tmp_path / "0.tar", [m for i, (extension, kind) in enumerate(KINDS.items())
                                   for m in ((f"{i}.{extension}", saved(kind)), (f"{i}.txt", b"c"))])  # fmt: skip
    split = EvaluationSplit(str(tmp_path), settings(str(tmp_path)))
    assert len(next(split.batches(20)).ids) == len(KINDS)


def test_the_rule_about_dots_is_told(tmp_path, caplog):
    rule = "the key ends at the first dot of a file's name"
    write_tar(tmp_path / "few" / "0.tar", members(["clip.{:03d}.jpg", "clip.{:03d}.txt"]))
    with pytest.raises(UserError, match=rf"expected images .*found 1 \.000\.jpg, .* and 72 other kinds; {rule}"):
        open_index(settings(str(tmp_path / "few")))
    write_tar(tmp_path / "many" / "0.tar", members(["clip.{:03d}.jpg", "clip.{:03d}.txt"], 300))
    with pytest.raises(UserError, match=rf"got 600 different extensions, such as \.000\.jpg, .*{rule}"):
        open_index(settings(str(tmp_path / "many")))
    some = [*members(["{:05d}.jpg", "{:05d}.txt"]), ("v1.0.jpg", saved()), ("v1.0.txt", b"c")]
    write_tar(tmp_path / "some" / "0.tar", some)
    open_index(settings(str(tmp_path / "some")))
    assert rule in caplog.text


def test_an_unsorted_tar_is_told(tmp_path):
    tidy = members(["{:05d}.jpg", "{:05d}.txt"])
    write_tar(tmp_path / "0.tar", sorted(tidy, key=lambda member: member[0][-3:]))
    message = r"side by side, got 00000.txt apart .*, and so in 40 of 40 samples; sort the members by name"
    with pytest.raises(UserError, match=message):
        scan(tmp_path / "0.tar")
    write_tar(tmp_path / "1.tar", [*tidy[:1], *tidy[2:], tidy[1]])
    (damage,) = scan(tmp_path / "1.tar").damage
    assert damage.startswith("1 samples have members apart from the others, the first is 00000.txt")


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_hard_links_are_the_files_that_they_are_linked_to(tmp_path, form):
    source = tmp_path / ("source" if form == tarfile.USTAR_FORMAT else "a long folder name " * 8)
    source.mkdir()
    for i in range(8):
        (source / f"{i}.txt").write_text(f"caption {i}")
        if i % 4 == 3:
            os.link(source / f"{i - 1}.jpg", source / f"{i}.jpg")
        else:
            (source / f"{i}.jpg").write_bytes(saved("JPEG", (30 * i, 0, 0)))
    with tarfile.open(tmp_path / "0.tar", "w", format=form) as tar:
        for path in sorted(source.iterdir()):
            tar.add(path, f"{source.name}/{path.name}")
    table = scan(tmp_path / "0.tar")
    assert (len(table), table.damage) == (8, [])
    split = EvaluationSplit(str(tmp_path / "0.tar"), settings(str(tmp_path / "0.tar")))
    images = next(split.batches(8)).images[0]
    assert split.captions == [f"caption {i}" for i in range(8)]
    assert [bool((images[i] == images[i - 1]).all()) for i in range(1, 8)] == [i % 4 == 3 for i in range(1, 8)]


def test_gnu_tars_links_too(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s/0.jpg").write_bytes(saved())
    os.link(tmp_path / "s/0.jpg", tmp_path / "s/1.jpg")
    for i in range(2):
        (tmp_path / f"s/{i}.json").write_text(json.dumps({"caption": "c"}))
    subprocess.run(["tar", "-C", tmp_path / "s", "--sort=name", "-cf", tmp_path / "0.tar", "."], check=True)
    table = scan(tmp_path / "0.tar")
    assert (len(table), table.counts()) == (2, {"jpg": 2, "json": 2})
    assert table.offset[0] == table.offset[2]


def test_a_link_to_nothing_is_told(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        link = tarfile.TarInfo("0.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "gone.jpg"
        tar.addfile(link)
    (damage,) = scan(tmp_path / "0.tar").damage
    assert damage == "0.jpg is a hard link to gone.jpg, which is not in the file before it"
