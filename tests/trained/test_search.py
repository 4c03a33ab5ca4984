"""From a folder of pictures to what is nearest to a picture or a text, by the commands alone."""

import io
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import amclr_scale
from amclr_scale.commands import embed, search
from amclr_scale.errors import UserError
from tests.evaluation.shards import picture
from tests.evaluation.test_models import write_run
from tests.evaluation.test_run import model, recipe


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run, eight pictures, and the folder as the place to stand in."""
    write_run(tmp_path / "run", model(recipe()), recipe())
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for i in range(8):
        (tmp_path / "photos" / ("more" if i % 2 else ".") / f"{i}.png").write_bytes(picture(i))
    (tmp_path / "photos" / "film.mov").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_a_picture_is_nearest_to_itself_and_a_text_has_neighbours(folder, capsys, kind, monkeypatch):
    out = [] if kind == "npy" else ["--out", "photos.parquet"]
    assert embed.main(["run", "photos", *out]) == 0
    said = capsys.readouterr()
    assert f"8 rows -> photos.{kind}" in said.out
    assert "passed over 1 files that are no readable pictures: 1 .mov" in said.err
    assert search.main([f"photos.{kind}", "photos/more/3.png", "--count", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1.000  photos/more/3.png"
    assert len(lines) == 3
    assert Image.open("photos_search.png").size[0] > 3 * 160
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")  # the index knows where its model and its pictures are
    assert search.main([f"../photos.{kind}", "a red apple", "--sheet", "found.png"]) == 0
    found = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    trained = amclr_scale.load(folder / "run")
    images = [str(folder / name) for _, name in found]
    want = trained.encode_image(images) @ trained.encode_text(["a red apple"])[0]
    assert len(found) == 8
    assert [float(score) for score, _ in found] == pytest.approx(want.tolist(), abs=6e-4)
    assert bool((want[:-1] >= want[1:]).all())
    assert Image.open("found.png").size[1] > 2 * 160


def test_a_picture_that_cannot_be_used_is_told_by_its_name_or_its_place(folder):
    good, cut = folder / "good.jpg", folder / "cut.jpg"
    Image.effect_noise((64, 64), 50).save(good)
    cut.write_bytes(good.read_bytes()[:1000])
    trained = amclr_scale.load(folder / "run")
    for given in ([good, cut], [good, str(cut)], cut, [good, Image.open(cut)]):
        with pytest.raises(UserError, match=f"^images: {cut} cannot be used: corrupt image"):
            trained.encode_image(given)
    nameless = Image.open(io.BytesIO(cut.read_bytes()))
    with pytest.raises(UserError, match=r"^images: number 2 \(from 0\) cannot be used: corrupt image"):
        trained.encode_image([good, good, nameless], batch_size=2)


def test_a_picture_that_cannot_be_used_has_no_row(folder, capsys):
    (folder / "bad").mkdir()
    (folder / "bad" / "1.jpg").write_bytes(b"not a picture")
    (folder / "bad" / "3.png").write_bytes(b"")
    words = ["run", "bad", "--batch-size", "2"]
    assert embed.main(words) == 2
    assert (
        "1.jpg cannot be used: corrupt image (no known format); nor can any other of the 2" in capsys.readouterr().err
    )
    assert not [*folder.glob("*bad.*")]  # nothing half written
    for number in range(0, 12, 2):
        (folder / "bad" / f"{number}.png").write_bytes(picture(number))
    assert embed.main(words) == 0
    said = capsys.readouterr()
    assert "6 rows" in said.out
    assert "3.png cannot be used: empty member (.jpg)\n2 pictures have no row" in said.err
    names = (folder / "bad.txt").read_text().splitlines()
    assert names == [f"bad/{number}.png" for number in (0, 10, 2, 4, 6, 8)]
    want = amclr_scale.load(folder / "run").encode_image(names)
    np.testing.assert_allclose(np.load(folder / "bad.npy"), want.numpy(), atol=1e-6)


def test_mistakes_are_told(folder, capsys):
    def refused(words, command, *argv):
        assert command.main(list(argv)) == 2
        assert words in capsys.readouterr().err

    refused("--images: expected a folder, got nowhere; shards are --shards nowhere", embed, "run", "nowhere")
    (folder / "shards").mkdir()
    (folder / "shards" / "0.tar").touch()
    said = "--images: expected a folder with images, got shards; shards are --shards shards"
    refused(said, embed, "run", "shards", "--out", "shards.npy")
    refused("index: expected NAME.npy with NAME.txt", search, "gone.npy", "x")
    (folder / "said.txt").write_text("a\nb\n")
    refused("a file with a text on each line is --texts said.txt", embed, "run", "said.txt")
    (folder / "one.png").write_bytes(b"\x89PNG")
    refused("put the picture into one", embed, "run", "one.png")
    refused("--out: said.npy would write names of rows over said.txt", embed, "run", "--texts", "said.txt",
            "--out", "said.npy")  # fmt: skip
    assert embed.main(["run", "--texts", "said.txt"]) == 0
    assert np.load("said_embedded.npy").shape == (2, 8)
    assert embed.main(["run", "photos"]) == 0
    refused("--count: expected at least 1, got 0", search, "photos.npy", "x", "--count", "0")
    (folder / "photos.npy.json").write_text(json.dumps({}))
    refused("--model: expected the model that photos.npy was made with", search, "photos.npy", "x")
    np.save("photos.npy", np.zeros((8, 3), dtype=np.float32))
    refused("--model: expected one whose embeddings are 3 wide", search, "photos.npy", "x", "--model", "run")


@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_a_mark_inside_a_text_shifts_no_names(folder, capsys, kind):
    (folder / "said.txt").write_bytes("one\na\rb\u2028c\x0bd\nthree\n".encode())
    out = f"rows.{kind}"
    assert embed.main(["run", "--texts", "said.txt", "--out", out]) == 0
    assert len(search.read_index(folder / out)[0]) == 3
    capsys.readouterr()
    assert search.main([out, "three", "--count", "1"]) == 0
    assert capsys.readouterr().out == "1.000  three\n"


def test_names_that_the_file_of_names_cannot_hold_are_refused(folder, capsys):
    broken, no_utf8 = folder / "broken", folder / "no_utf8"
    for place, name in ((broken, b"a\nb.png"), (no_utf8, b"\xff.png")):
        place.mkdir()
        (place / "0.png").write_bytes(picture(0))
        with open(os.path.join(os.fsencode(place), name), "wb") as file:
            file.write(picture(1))
    assert embed.main(["run", "broken"]) == 2
    assert "--out: expected names without a line break, since broken.txt has one a line" in capsys.readouterr().err
    assert embed.main(["run", "no_utf8", "--out", "no_utf8.parquet"]) == 2
    assert "--out: expected names in UTF-8, as no_utf8.parquet holds them" in capsys.readouterr().err
    assert not [*folder.glob("broken.*"), *folder.glob("no_utf8.*"), *folder.glob(".*unfinished")]
    for name, out in (("broken", "broken.parquet"), ("no_utf8", "no_utf8.npy")):
        assert embed.main(["run", name, "--out", out]) == 0
        capsys.readouterr()
        assert search.main([out, str(folder / "run" / ".." / name / "0.png")]) == 0
        printed = capsys.readouterr().out
        printed.encode("utf-8")  # as a terminal wants it
        assert printed.startswith(f"1.000  {name}/0.png\n")


def test_an_index_of_another_number_of_names_is_refused(folder, capsys):
    assert embed.main(["run", "photos"]) == 0
    names = (folder / "photos.txt").read_text()
    (folder / "photos.txt").write_text(names + "one more\n")
    assert search.main(["photos.npy", "x"]) == 2
    assert "8 rows, and 9 names in photos.txt" in capsys.readouterr().err
    (folder / "photos.txt").write_text(names)
    np.save("photos.npy", np.zeros(8, dtype=np.float32))
    assert search.main(["photos.npy", "x"]) == 2
    assert "it holds no table of numbers" in capsys.readouterr().err


def test_a_model_that_has_changed_since_is_refused(folder, capsys):
    assert embed.main(["run", "photos"]) == 0
    assert search.main(["photos.npy", "a red apple"]) == 0
    other = model(recipe())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.01)
    write_run(folder / "other", other, recipe())  # as wide, another space
    shutil.copytree(folder / "run", folder / "moved")
    assert search.main(["photos.npy", "a red apple", "--model", "moved"]) == 0
    capsys.readouterr()
    assert search.main(["photos.npy", "a red apple", "--model", "other"]) == 2
    told = "--model: expected the model that photos.npy was made with, got {}, which has other weights"
    assert told.format("other") in capsys.readouterr().err
    shutil.copy(folder / "other" / "weights.safetensors", folder / "run")  # it was trained on
    assert search.main(["photos.npy", "a red apple"]) == 2
    assert told.format(folder / "run") in capsys.readouterr().err


def test_a_file_that_embed_did_not_write_is_not_written_over(folder, capsys):
    (folder / "photos.txt").write_text("my own notes\n")
    assert embed.main(["run", "photos"]) == 2
    assert "--out: photos.npy would write names of rows over photos.txt" in capsys.readouterr().err
    assert (folder / "photos.txt").read_text() == "my own notes\n"
    assert embed.main(["run", "photos", "--out", "other.npy"]) == 0
    assert embed.main(["run", "photos", "--out", "other.npy"]) == 0  # its own names


def test_numbers_and_devices_that_are_none_are_told(folder, capsys):
    for size in ("0", "-1"):
        assert embed.main(["run", "photos", "--batch-size", size]) == 2
        assert f"--batch-size: expected at least 1, got {size}" in capsys.readouterr().err
    for device in ("gpu", "cuda:99", "hpu"):
        assert embed.main(["run", "photos", "--device", device]) == 2
        assert "device: expected one that torch has here (cpu" in capsys.readouterr().err
    assert not [*folder.glob("photos.*")]


def test_a_place_that_no_sheet_can_have_is_told_before_the_search(folder, capsys):
    assert embed.main(["run", "photos"]) == 0
    capsys.readouterr()
    for sheet, told in (
        ("nowhere/x.png", "--sheet: expected a name in a folder that is there, got nowhere/x.png"),
        ("x.nope", "--sheet: expected the name of a picture, such as found.png, got x.nope"),
    ):
        assert search.main(["photos.npy", "red", "--sheet", sheet]) == 2
        assert capsys.readouterr() == ("", f"{told}\n")


def test_a_picture_that_is_not_there_is_no_text(folder, capsys):
    assert embed.main(["run", "photos"]) == 0
    assert search.main(["photos.npy", "photos/mistyped.JPG"]) == 2
    assert "query: expected a text, or the path of a picture, got photos/mistyped.JPG" in capsys.readouterr().err


def test_pixels_in_another_form_are_refused(folder):
    trained = amclr_scale.load(folder / "run")
    size = trained.config.data.image_size
    good = torch.rand(2, 3, size, size)
    for pixels in (good, good.bfloat16(), (good * 255).to(torch.uint8), good[0]):
        assert trained.encode_image(pixels).isfinite().all()
    for bad, words in (
        (good * 255, "floats from"),
        (good - 0.5, "floats from"),
        (good * float("nan"), "floats from nan"),
        ((good * 255).long(), "got int64"),
        (good[:, :1], "got one of shape"),
        (torch.rand(2, 3, size, 2 * size), "got one of shape"),
    ):
        with pytest.raises(UserError, match=f"^images: expected a tensor .*{words}"):
            trained.encode_image(bad)
    for encode, what in ((trained.encode_image, good), (trained.encode_text, ["a"])):
        with pytest.raises(UserError, match=r"^batch_size: expected at least 1, got -1"):
            encode(what, -1)


def test_of_equals_the_earlier_one_comes_first():
    table = torch.nn.functional.normalize(torch.tensor([[1.0, 1], [1, 0], [1, 0], [0, 1]]), dim=-1).numpy()
    assert [row for row, _ in search.nearest(table, np.array([1, 0], dtype=np.float32), 3)] == [1, 2, 0]
