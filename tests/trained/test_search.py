"""From a folder of pictures to what is nearest to a picture or a text, by the commands alone."""

import io
import json

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

    refused("--images: expected a folder, got nowhere", embed, "run", "nowhere")
    refused("index: expected NAME.npy with NAME.txt", search, "gone.npy", "x")
    (folder / "said.txt").write_text("a\nb\n")
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


def test_of_equals_the_earlier_one_comes_first():
    table = torch.nn.functional.normalize(torch.tensor([[1.0, 1], [1, 0], [1, 0], [0, 1]]), dim=-1).numpy()
    assert [row for row, _ in search.nearest(table, np.array([1, 0], dtype=np.float32), 3)] == [1, 2, 0]
