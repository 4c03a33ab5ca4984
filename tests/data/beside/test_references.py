"""Features of a frozen model go with their samples, whoever reads them, and are told apart from those of others."""

import json
from contextlib import closing

import numpy as np
import pytest
import torch

from amclr_scale.commands.embed import main as embed
from amclr_scale.config.load import load
from amclr_scale.data.beside import fingerprint as prints
from amclr_scale.data.beside import references
from amclr_scale.data.beside.references import References, open_references
from amclr_scale.data.indexing import open_index
from amclr_scale.data.loader import TrainLoader
from amclr_scale.errors import UserError
from amclr_scale.memory.account import account
from tests.data.shards import pair, settings, write_shards, write_tar
from tests.data.test_loader import take
from tests.evaluation.test_models import write_run
from tests.evaluation.test_run import model, recipe

R = 5


def written(path, n, about=None, first=0):
    """Row i of a file of n rows is (first + i, ...)."""
    rows = (first + np.arange(n, dtype=np.float32))[:, None].repeat(R, 1)
    np.save(path, rows)
    if about is not None:
        path.with_name(f"{path.name}.json").write_text(json.dumps({"samples": about}))
    return str(path)


def test_rows_belong_to_ids_on_any_number_of_ranks_and_workers(tmp_path):
    write_shards(tmp_path, [12, 20])
    data = settings(str(tmp_path), image_reference=written(tmp_path / "r.npy", 32))
    whole = take(data, 5)
    for batch in whole:
        assert batch.given["image_reference"].dtype == torch.float32
        assert batch.given["image_reference"].tolist() == [[float(i)] * R for i in batch.ids.tolist()]
    halves = zip(take(data, 5, rank=0, world_size=2, workers=1), take(data, 5, rank=1, world_size=2), strict=True)
    for batch, parts in zip(whole, halves, strict=True):
        assert torch.equal(batch.given["image_reference"], torch.cat([p.given["image_reference"] for p in parts]))


def test_several_captions_of_an_image_have_rows_of_their_own(tmp_path):
    members = [member for i in range(16) for member in pair(i, image_id=i // 2)]
    write_tar(tmp_path / "0.tar", members)
    data = settings(str(tmp_path), image_id="json.image_id", text_reference=written(tmp_path / "r.npy", 16))
    batch = take(data, 1)[0]
    assert batch.given["text_reference"][:, 0].tolist() == batch.text_ids.tolist()
    assert batch.ids.tolist() == [i // 2 for i in batch.text_ids.tolist()]


def test_a_replaced_sample_brings_the_row_of_its_replacement(tmp_path):
    members = [member for i in range(16) for member in pair(i)]
    members[0] = (members[0][0], b"no picture")
    write_tar(tmp_path / "0.tar", members)
    data = settings(str(tmp_path), image_reference=written(tmp_path / "r.npy", 16), max_bad_fraction=1.0)
    rows = [(b.ids.tolist(), b.given["image_reference"][:, 0].tolist()) for b in take(data, 2)]
    assert all(ids == found for ids, found in rows)
    assert 0 not in [i for ids, _ in rows for i in ids]


def test_a_data_set_of_several_has_a_file_each_or_one(tmp_path):
    write_shards(tmp_path / "a", [12])
    write_shards(tmp_path / "b", [8, 8], first=12)
    both = [str(tmp_path / "a"), str(tmp_path / "b")]
    files = [written(tmp_path / "a.npy", 12), written(tmp_path / "b.npy", 16, first=12)]
    with closing(open_index(settings(both))) as index:
        for named in (files, written(tmp_path / "all.npy", 28)):
            rows = References("data.image_reference", named, index)([27, 0, 12, 11])
            assert rows[:, 0].tolist() == [27, 0, 12, 11]
        with pytest.raises(UserError, match=r"expected one file, or one for each of 2 in data\.train, got 3"):
            References("data.image_reference", [*files, files[0]], index)
        with pytest.raises(UserError, match=r"b\.npy: expected 12 rows.*got 16"):
            References("data.image_reference", files[::-1], index)


def test_what_does_not_fit_is_told_with_the_sample(tmp_path):
    write_shards(tmp_path, [16])

    def refused(file, samples=(0,)):
        data = settings(str(tmp_path), image_reference=file)
        with closing(open_index(data)) as index, pytest.raises(UserError) as told:
            open_references(data, index)["image_reference"](samples)
        assert str(told.value).startswith("data.image_reference: ")
        return str(told.value)

    said = refused(written(tmp_path / "few.npy", 13))
    assert "expected 16 rows, one for each sample in the order of ids, got 13: sample 13 (000013 of" in said
    assert "got 17; is this of the same data set?" in refused(written(tmp_path / "more.npy", 17))
    assert "got those of another data set (16 rows" in refused(written(tmp_path / "other.npy", 16, about="0" * 32))
    rows = np.ones((16, R))
    rows[9, 1] = np.nan
    np.save(tmp_path / "nan.npy", rows)
    assert "expected finite numbers for sample 9 (000009 of" in refused(str(tmp_path / "nan.npy"), (3, 9))
    np.save(tmp_path / "whole.npy", np.ones((16, R), np.int64))
    assert "got int64 of shape (16, 5)" in refused(str(tmp_path / "whole.npy"))
    assert "No such file" in refused(str(tmp_path / "none.npy"))
    np.save(tmp_path / "code.npy", np.array([{"a": 1}] * 16))  # would be unpickled
    assert "expected a .npy file" in refused(str(tmp_path / "code.npy"))


def test_a_file_that_was_written_anew_is_another_data_set(tmp_path, monkeypatch):
    write_shards(tmp_path, [12, 20])
    plain, file = settings(str(tmp_path)), written(tmp_path / "r.npy", 32)
    data = plain.model_copy(update={"image_reference": file})

    def fingerprint(data=data):
        with closing(TrainLoader(data, seed=0, global_batch_size=8)) as loader:
            return loader.fingerprint

    first = fingerprint()
    written(tmp_path / "again.npy", 32)
    assert fingerprint(plain.model_copy(update={"image_reference": str(tmp_path / "again.npy")})) == first
    assert fingerprint(plain.model_copy(update={"text_reference": file})) != first
    written(tmp_path / "r.npy", 32, first=1)
    assert fingerprint() != first
    shards = fingerprint(plain)
    found = prints.parts(first)
    assert found == {"train": shards, "image_reference": found["image_reference"]}
    for small in (references._SMALL, 0):  # of a large file some rows all over it count, and its size
        monkeypatch.setattr(references, "_SMALL", small)
        monkeypatch.setattr(references, "_ROWS", 3)
        digests = set()
        for changed in (None, 0, 31, 5):
            rows = np.ones((32, R), np.float32)
            if changed is not None:
                rows[changed] += 1
            np.save(file, rows)
            digests.add(fingerprint())
        assert len(digests) == (4 if small else 3)
        np.save(file, np.ones((32, R + 1), np.float32))
        assert fingerprint() not in digests


def test_embed_writes_what_training_reads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / "train", [9, 7])
    write_shards(tmp_path / "held", [16], first=16)
    write_run(tmp_path / "run", model(recipe()), recipe())
    for side in ("image", "text"):
        assert embed(["run", "--shards", "train", "--side", side, "--out", f"{side}.npy"]) == 0
    data = settings("train", image_reference="image.npy", text_reference="text.npy")
    batch = take(data, 1)[0]
    for side in ("image", "text"):
        rows = batch.given[f"{side}_reference"]
        assert torch.equal(rows, torch.from_numpy(np.load(f"{side}.npy"))[batch.ids])
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(8))
    with pytest.raises(UserError, match="another data set"):
        take(data.model_copy(update={"train": "held"}), 1)


@pytest.mark.slow
def test_the_account_knows_their_width(tmp_path):
    write_shards(tmp_path, [16])
    np.save(tmp_path / "wide.npy", np.ones((16, 300), np.float32))
    words = ["objective.name=cwcl", "train.epochs=1", "train.global_batch_size=64", "execution.threads=1"]
    found = {}
    for file in ("wide.npy", "none.npy"):
        config = load(None, [*words, f"data.image_reference={tmp_path / file}"])
        for device in ("cpu", "cuda"):
            found[file, device] = account(config, world_size=1, num_samples=4096, device=device)

    def part(name, *which):
        return next(c.bytes for c in found[which].components if c.name == name)

    assert part("labels, references and masks", "wide.npy", "cuda") == 64 * 4 * 300
    assert part("labels, references and masks", "none.npy", "cuda") == 64 * 4 * 128
    assert part("batch", "wide.npy", "cpu") - part("batch", "none.npy", "cpu") == 2 * 64 * 4 * (
        300 - 128
    )  # one in use, one made
    sums = [part("gathered features and sums", file, "cpu") for file in ("wide.npy", "none.npy")]
    assert sums[0] - sums[1] >= 128 * 4 * (300 - 128)  # the D x R moments
    assert any("data.image_reference: the file is not here" in note for note in found["none.npy", "cpu"].notes)
    assert not any("data.image_reference" in note for note in found["wide.npy", "cpu"].notes)
