"""Features of frozen towers from files: the same weights as running the towers, with no picture opened for it."""

import json
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from amclr_scale.checkpoint.resume import parts
from amclr_scale.commands.embed import main as embed
from amclr_scale.commands.embedding.of_towers import write_features
from amclr_scale.config.load import build, dump
from amclr_scale.data.pipeline import Pipeline
from amclr_scale.distributed.collectives import rank, world_size
from amclr_scale.distributed.launcher import RankInfo
from amclr_scale.distributed.process_group import seed_everything
from amclr_scale.encoders.resting import RestingTower
from amclr_scale.encoders.weights import read_weights
from amclr_scale.engine.build import Inputs, build_trainer, model_of, open_data
from amclr_scale.engine.features import rest_towers
from amclr_scale.engine.step import TrainStep
from amclr_scale.errors import UserError
from amclr_scale.memory.account import account
from amclr_scale.memory.towers import trace
from amclr_scale.metrics.phases import Phases
from amclr_scale.metrics.stopwatch import Stopwatch
from amclr_scale.trained.export import _at_rest
from amclr_scale.trained.weights import save_weights
from tests.data.shards import pair, write_tar

CPU, B, STEPS = torch.device("cpu"), 8, 3
BOTH = ("image", "text")


def config(folder: Path, sides: tuple[str, ...] = (), world: int = 1, **changed: Any) -> Any:
    """Two frozen towers (image alone where `sides` says no text), and one sample of 24 that cannot be read."""
    tree: dict[str, Any] = {
        "data": {
            "train": str(folder / "0.tar"), "image_size": 16, "context_length": 8, "lanes": 2,
            "augmentation": {"crop_scale": [1, 1], "flip": 0}, "max_bad_fraction": 0.5, "cache": str(folder),
            "features": {side: str(folder / f"{side}.npy") for side in sides},
        },
        "train": {"global_batch_size": B, "samples": B * STEPS},
        "optimizer": {"name": "sgd", "lr": 0.1, "max_grad_norm": 1.0},
        "model": {
            "embedding_width": 8, "image": {"width": 8, "frozen": True},
            "text": {"width": 8, "layers": 1, "heads": 2, "dropout": 0.0, "frozen": True},
        },
        "execution": {"threads": 1, "micro_batch_size": 2},
    }  # fmt: skip
    for key, value in changed.items():
        *sections, name = key.split("__")
        inside = tree
        for section in sections:
            inside = inside.setdefault(section, {})
        inside[name] = value
    return build(tree, world)


def samples(folder: Path, first: int = 0, **fields: Any) -> Path:
    members = [member for i in range(first, first + 24) for member in pair(i, **fields)]
    members[3 * 5] = members[3 * 5][0], b"no picture"
    write_tar(folder / "0.tar", members)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with samples, and features of both towers."""
    folder = samples(tmp_path_factory.mktemp("features"))
    assert len(list(write_features(config(folder, BOTH), device="cpu", batch_size=7))) == 2
    return folder


def trained(folder: Path, sides: tuple[str, ...], **changed: Any) -> dict[str, Any]:
    """On each rank: all weights after some steps, what evaluation then gives, and what was read."""
    settings = config(folder, sides, world_size(), **changed)
    inputs = open_data(settings, RankInfo(rank(), rank(), world_size(), world_size()))
    trainer = build_trainer(settings, inputs, device=CPU, world_size=world_size(), folder=Path(), stopwatch=Stopwatch())
    step = TrainStep(
        trainer.engine, trainer.objective, micro_batch_sizes=inputs.plan.micro_batch_sizes, kept=inputs.plan.kept,
        device=CPU, phases=Phases(CPU),
    )  # fmt: skip
    decoded, ids = [], []
    whole, Pipeline._decoded = Pipeline._decoded, lambda self, content: decoded.append(1) or whole(self, content)
    try:
        for batch in islice(inputs.loader, STEPS):
            ids += batch.ids.tolist()
            step(batch, 0.1)
    finally:
        Pipeline._decoded = whole
    model = trainer.model
    model.eval()
    with torch.no_grad():
        pictures = torch.arange(2 * 3 * 16 * 16, dtype=torch.uint8).reshape(2, 3, 16, 16)
        seen = trainer.engine((pictures,), (torch.tensor([[1, 2, 3], [1, 5, 3]]),))
    held = [tower for tower in (model.image_tower, model.text_tower) if isinstance(tower, RestingTower)]
    assert len(held) == len(sides)
    model.train()
    assert all(len(tower._held) == 1 for tower in held)
    out = folder / f"out{rank()}"
    out.mkdir(exist_ok=True)
    save_weights(out, model, trainer.objective, speaks=True)
    trainer.engine.destroy()
    return {
        "weights": read_weights(str(out / "weights.safetensors"), "weights"), "ids": ids, "decoded": len(decoded),
        "seen": [seen["image"].float(), seen["text"].float()], "flops": trainer.flops, "count": trainer.parameters,
    }  # fmt: skip


def compared(folder: Path, sides: tuple[str, ...], **changed: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return trained(folder, (), **changed), trained(folder, sides, **changed)


def near(found: dict[str, Tensor], plain: dict[str, Tensor], bound: float) -> None:
    assert found.keys() == plain.keys()
    for name, want in plain.items():
        assert (found[name] - want).norm() <= bound * want.norm() + 1e-9, name


@pytest.mark.parametrize(("sides", "stage"), [(("image",), 0), (BOTH, 0), (BOTH, 3)])
def test_two_ranks_train_as_with_the_towers(ranks, made, sides, stage):
    for plain, found in ranks(2, compared, made, sides, execution__zero_stage=stage):
        near(found["weights"], plain["weights"], 1e-6)
        assert any(not torch.equal(value, plain["weights"][name]) for name, value in _start(made).items())
        torch.testing.assert_close(found["seen"], plain["seen"], rtol=1e-5, atol=1e-6)
        assert found["ids"] == plain["ids"]  # the same sample stands for the one that cannot be read
        assert 5 not in found["ids"]
        assert plain["decoded"] >= B * STEPS // 2
        assert found["decoded"] == 0
        assert found["count"] < plain["count"] / 2
        assert found["flops"].image == 2 * 64 * 8  # the head's


def _start(folder: Path) -> dict[str, Tensor]:
    settings = config(folder)
    seed_everything(settings.seed)
    return model_of(settings, opened(settings).tokenizer).state_dict()


def opened(settings: Any) -> Inputs:
    return open_data(settings, RankInfo(0, 0, 1, 1))


@pytest.mark.parametrize("precision", ["bf16", "amp_bf16"])
def test_in_bf16_the_rows_are_the_towers_own_bits(ranks, made, tmp_path, precision):
    folder = samples(tmp_path)
    half = {"execution__precision": precision, "execution__zero_stage": 1}
    list(write_features(config(folder, BOTH, **half), device="cpu", batch_size=2))  # as many at once as the run
    assert np.load(folder / "image.npy").dtype == np.uint16
    ((plain, found),) = ranks(1, compared, folder, BOTH, **half)
    of_heads = [{n: w for n, w in one["weights"].items() if "tower" not in n} for one in (found, plain)]
    near(*of_heads, 1e-6)
    near(found["weights"], plain["weights"], 5e-3)  # a tower that is run was rounded to bf16, one that rests was not
    with pytest.raises(
        UserError, match=r"features\.image: .*has as execution\.precision, fp32, got those made with (amp_)?bf"
    ):
        rest(config(folder, BOTH))


def rest(settings: Any) -> None:
    inputs = opened(settings)
    seed_everything(settings.seed)
    rest_towers(model_of(settings, inputs.tokenizer), settings, inputs.loader.features)


def test_nothing_is_written_twice_and_exports_have_the_towers(made, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump(config(made)))
    words = [f"data.features.{side}={made / side}.npy" for side in BOTH]
    before = (made / "image.npy").stat().st_mtime_ns
    assert embed(["--config", str(recipe), *words]) == 0
    assert capsys.readouterr().out.count("rows of the") == 2
    assert (made / "image.npy").stat().st_mtime_ns == before
    start = _start(made)
    towers = _at_rest(config(made, ("image",)))
    assert towers.keys() == {name for name in start if name.startswith("image_tower.")}
    assert all(torch.equal(value, start[name]) for name, value in towers.items())
    assert _at_rest(config(made)) == {}
    assert embed(["--config", str(recipe)]) == 2
    assert "data.features: expected the files to write" in capsys.readouterr().err


def test_a_file_that_was_made_anew_is_told_by_its_key(made):
    said = parts(opened(config(made, BOTH)).loader.fingerprint)
    assert said.keys() == {"train", "features.image", "features.text"}


OTHERS = {  # what a run has otherwise than the features' maker: the words
    r"features\.image: .*has as the weights of the tower, \w{16}, got those made with \w{16}; .*embed --config": {
        "seed": 1
    },
    r"features\.image: .*has as data\.image_size, 24, got those made with 16": {"data__image_size": 24},
    r"features\.image: .*has as data\.image_mean, \[0\.5, 0\.5, 0\.5\], got": {"data__image_mean": [0.5, 0.5, 0.5]},
    r"features\.text: .*has as data\.context_length, 9, got those made with 8": {"data__context_length": 9},
    r"features\.text: .*has as data\.caption, json\.x, got those made with txt": {"data__caption": "json.x"},
    r"data\.augmentation\.flip: expected 0 beside data\.features\.image.*got 0\.5": {"data__augmentation__flip": 0.5},
    r"data\.augmentation\.crop_scale: expected \[1\.0, 1\.0\] beside": {"data__augmentation__crop_scale": [0.9, 1]},
    r"data\.caption: expected one place beside data\.features\.text": {"data__caption": ["txt", "json.captions"]},
    r"features\.text: expected model\.text\.frozen=true of the whole": {"model__text__unfrozen_norms": True},
    r"data\.image_view_from: expected group beside data\.features\.image": {"data__image_views": 1},
    r"data\.resident: expected host or none beside data\.features\.image": {"data__resident": "device"},
    r"features\.image: objective filip reads image_tokens, which they": {"objective": {"name": "filip"}},
    r"features\.text: objective clip asks which captions are the same word for word.*mask_duplicates": {
        "objective": {"name": "clip", "mask_duplicates": "both"}
    },
    r"features\.text: objective supcon asks which captions": {"objective": {"name": "supcon", "positives": "text"}},
    r"features\.image: nowhere\.npy: expected a .npy file, got: .*; .*embed --config": {
        "data__features__image": "nowhere.npy"
    },
}  # fmt: skip


@pytest.mark.parametrize("words", OTHERS)
def test_features_of_anything_else_are_refused(made, words):
    with pytest.raises(UserError, match=words):
        rest(config(made, BOTH, **OTHERS[words]))


def test_features_of_other_samples_or_damaged_ones_are_refused(made, tmp_path):
    folder = samples(tmp_path, first=1)
    for name in ("image.npy", "image.npy.json"):
        shutil.copyfile(made / name, folder / name)
    with pytest.raises(
        UserError, match=r"features\.image: .*expected rows of the samples in data\.train, got those of"
    ):
        rest(config(folder, ("image",)))
    samples(tmp_path)
    rows, beside = np.load(folder / "image.npy"), folder / "image.npy.json"
    np.save(folder / "image.npy", rows[:20])
    with pytest.raises(UserError, match=r"expected 24 rows, .* got 20: sample 20 \(000020 of .*0\.tar\) has none; am"):
        rest(config(folder, ("image",)))
    rows[7] = np.nan
    np.save(folder / "image.npy", rows)
    with pytest.raises(
        UserError, match=r"expected finite numbers for sample 7 \(000007 of .*tar\), got others; .*anew"
    ):
        list(islice(opened(config(folder, ("image",))).loader, STEPS))
    np.save(folder / "image.npy", rows.astype(np.float16))
    with pytest.raises(UserError, match=r"expected rows of float32; .*embed --config"):
        rest(config(folder, ("image",)))
    beside.write_text(json.dumps({"samples": "x"}))
    with pytest.raises(UserError, match=r"image\.npy"):
        rest(config(folder, ("image",)))


def test_captions_of_which_one_is_drawn_have_no_features(tmp_path):
    samples(tmp_path)
    with pytest.raises(
        UserError, match=r"features\.text: expected one caption for each sample, got 3 of 000000 in .*tar"
    ):
        list(write_features(config(tmp_path, ("text",), data__caption="json.captions"), device="cpu", batch_size=8))


@pytest.mark.slow
def test_account_without_the_tower(made, tmp_path):
    """Known before the file is there: no activations and no weights of the tower on the device, no pictures."""
    big = {"model__image__width": 32, "data__image_size": 64, "execution__micro_batch_size": 8}
    plain, resting = config(made, **big), config(tmp_path, ("image",), **big)
    assert trace(resting, "image", "cpu").flops == 2 * 256 * 8
    with_tower, without = (account(one, world_size=1, num_samples=24, device="cuda") for one in (plain, resting))
    sizes = [{c.name: c.bytes for c in found.components} for found in (with_tower, without)]
    weights = 4 * sum(p.numel() for name, p in _parameters(plain) if name.startswith("image_tower."))
    assert sizes[0]["parameters"] - sizes[1]["parameters"] == weights
    assert weights <= sizes[1]["towers at rest"] <= weights + 4096
    assert sizes[1]["image activations"] < sizes[0]["image activations"] / 100
    assert sizes[0]["batch"] > 5 * sizes[1]["batch"]
    assert without.peak_bytes < with_tower.peak_bytes


def _parameters(settings: Any) -> Any:
    return model_of(settings, opened(settings).tokenizer).named_parameters()
