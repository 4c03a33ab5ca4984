"""What is exported gives the embeddings of the model that was trained, wherever the folder is moved to."""

import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import amclr_scale
from amclr_scale.checkpoint import files, state
from amclr_scale.commands import embed
from amclr_scale.commands.export import main
from amclr_scale.commands.main import main as amclr_scale_command
from amclr_scale.config.load import build, dump, recipe_hash
from amclr_scale.data.evaluation_split import EvaluationSplit
from amclr_scale.data.tokenizers import load_tokenizer
from amclr_scale.encoders.build import build_model
from amclr_scale.engine.deepspeed_setup import build_engine
from amclr_scale.engine.teacher import Teacher
from amclr_scale.errors import UserError
from amclr_scale.trained.export import export
from amclr_scale.trained.model import open_model
from amclr_scale.trained.weights import save_weights
from tests.checkpoint.trainer import ROOT
from tests.evaluation.shards import write_split

TEXTS = ["a red apple", "two dogs on a sofa", ""]
CPU = torch.device("cpu")
TREE = {
    "data": {"image_size": 32, "context_length": 12},
    "train": {"global_batch_size": 8, "samples": 80},
    "model": {"embedding_width": 16, "text": {"width": 16}, "momentum": {"decay": 0.75}},
    "execution": {"zero_stage": 2},
}


def make_run(folder):
    """On each rank: a model at stage 2, and a teacher, saved as the checkpointer does. Returns embeddings of both."""
    import torch.distributed as dist

    config = build(TREE)
    torch.manual_seed(1)
    words = load_tokenizer("emoji", 12)
    model = build_model(
        config.model, vocab_size=words.vocab_size, pad_id=words.pad_id, context_length=12, image_size=32,
        image_mean=config.data.image_mean, image_std=config.data.image_std,
    )  # fmt: skip
    engine, _ = build_engine(config, model, no_decay=set(), device=CPU, world_size=2)
    teacher = Teacher(config.model.momentum, engine, precision="fp32", total_steps=10, lends=(), device=CPU)
    for share in teacher.weights.shares:
        share.own.add_(0.02 * torch.randn(share.own.shape))
    teacher.weights.send_round()
    with torch.no_grad():
        out = model.eval()(images=(pixels(),), texts=(words(TEXTS),))
        with teacher.in_place():
            lent = engine(images=(pixels(),), texts=(words(TEXTS),))
    save_weights(folder, model, torch.nn.Module(), speaks=dist.get_rank() == 0, teacher=teacher)
    (folder / "weights.safetensors").unlink(missing_ok=True)  # this run has not come to its end
    checkpoints = folder / "checkpoints"
    here = files.staging(checkpoints, 10)
    here.mkdir(parents=True, exist_ok=True)
    described = {
        "step": 10, "samples": 80, "total_steps": 10, "number": 1, "recipe": recipe_hash(config), "time": "now",
        "config": config.model_dump(mode="json"), "data_fingerprint": "f", "num_samples": 40, "packages": {},
    }  # fmt: skip
    written = state.take(engine, torch.nn.Module(), described, CPU, teacher=teacher).write(here)
    every = [None, None]
    dist.all_gather_object(every, written)
    if dist.get_rank() == 0:
        files.commit(checkpoints, 10, [file for part in every for file in part])
        (folder / "evaluation.json").write_text('{"emoji/R@1": 0.5, "momentum/emoji/R@1": 0.75}')
        (folder / "config.yaml").write_text(dump(config))
    dist.barrier()
    engine.destroy()
    return out["image"], out["text"], lent["image"], lent["text"]


def pixels():
    return torch.randint(0, 256, (5, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture(scope="module")
def run(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, *ranks(2, make_run, folder)[0]


def check(model, run):
    torch.testing.assert_close(model.encode_image(pixels()), run[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(model.encode_text(TEXTS, batch_size=2), run[2], rtol=0, atol=1e-6)


def test_three_lines_of_python(run):
    for path in (run[0], run[0] / "checkpoints" / files.name_of(10)):
        check(amclr_scale.load(path), run)


def test_a_picture_is_the_same_from_a_file_and_from_memory(run, tmp_path):
    picture = Image.new("RGBA", (40, 32), (200, 30, 30, 0))  # all transparent: white, in training too
    picture.save(tmp_path / "a.png")
    model = amclr_scale.load(run[0])
    from_file, from_memory, white = model.encode_image(
        [str(tmp_path / "a.png"), picture, Image.new("RGB", (40, 32), "white")]
    )
    assert from_file.equal(white)
    assert from_memory.equal(white)


def test_one_text_and_one_picture_by_themselves(run, tmp_path):
    """A string is one text, not one for each of its letters; a path is one picture."""
    model = amclr_scale.load(run[0])
    assert torch.equal(model.encode_text("a cat"), model.encode_text(["a cat"]))
    assert model.encode_text("a cat").shape == (1, 16)
    assert model.tokenizer("a cat").shape == (1, 12)
    picture = Image.new("RGB", (40, 32), (200, 30, 30))
    picture.save(tmp_path / "a.png")
    want = model.encode_image([picture])
    for one in (picture, tmp_path / "a.png", str(tmp_path / "a.png")):
        assert torch.equal(model.encode_image(one), want)
    assert torch.equal(model.encode_image(pixels()[0]), model.encode_image(pixels()[:1]))
    assert torch.equal(model.encode_text(text for text in TEXTS), model.encode_text(TEXTS))
    with pytest.raises(UserError, match="texts: expected strings, got None"):
        model.encode_text(["a", None])
    with pytest.raises(UserError, match="images: expected files, PIL images or one tensor of all, got ndarray"):
        model.encode_image([np.zeros((32, 32, 3), np.uint8)])


def test_a_checkpoint_is_opened_for_evaluation(run, tmp_path):
    for name in (run[0], run[0] / "checkpoints", run[0] / "checkpoints" / files.name_of(10)):
        loaded = open_model(str(name))
        assert (loaded.name, loaded.folder, loaded.step) == (f"{run[0].name}/step_00000010", run[0], "step_00000010")
        words = load_tokenizer(loaded.config.data.tokenizer, 12)
        with torch.no_grad():
            out = loaded.model(images=(pixels(),), texts=(words(TEXTS),))
        torch.testing.assert_close(out["image"], run[1], rtol=0, atol=1e-6)
        torch.testing.assert_close(out["text"], run[2], rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="checkpoint: expected a run folder"):
        open_model(str(tmp_path))


def test_an_exported_folder_can_be_moved(run, tmp_path):
    export(run[0], tmp_path / "there")
    (tmp_path / "there").rename(tmp_path / "elsewhere")
    check(amclr_scale.load(tmp_path / "elsewhere"), run)
    card = (tmp_path / "elsewhere" / "README.md").read_text()
    assert "80 samples seen (2.00 epochs of 40)" in card
    assert "| emoji | R@1, % | 50.0 |  |" in card
    (tmp_path / "file").touch()
    for taken in ("elsewhere", "file"):
        with pytest.raises(UserError, match="--out: expected a new or an empty folder"):
            export(run[0], tmp_path / taken)


def test_transformers_reads_it(run, tmp_path):
    from amclr_scale.trained.as_transformers import DualEncoderModel, write

    export(run[0], tmp_path / "out")
    write(tmp_path / "out")
    from transformers import AutoModel

    model = AutoModel.from_pretrained(str(tmp_path / "out")).eval()
    assert isinstance(model, DualEncoderModel)
    words = load_tokenizer(str(tmp_path / "out" / "tokenizer"), 12)
    with torch.no_grad():
        torch.testing.assert_close(model.get_image_features(pixels()), run[1], rtol=0, atol=1e-6)
        torch.testing.assert_close(model.get_text_features(words(TEXTS)), run[2], rtol=0, atol=1e-6)


def test_a_damaged_checkpoint_is_not_exported(run, tmp_path):
    import shutil

    shutil.copytree(run[0], tmp_path / "run")
    file = next((tmp_path / "run" / "checkpoints").glob("step_*/rank_00001.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"rank_00001\.safetensors is damaged"):
        export(tmp_path / "run", tmp_path / "out")


def test_the_tokenizer_goes_with_the_checkpoint(run, tmp_path):
    import json
    import shutil

    shutil.copytree(run[0], tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / files.name_of(10)
    checkpoint.rename(files.staging(checkpoint.parent, 10))
    here = files.staging(checkpoint.parent, 10)
    described = json.loads((here / "state.json").read_text())
    described["config"]["data"]["tokenizer"] = str(tmp_path / "gone.json")  # where it was, and is no more
    load_tokenizer("emoji", 12).save(here / "tokenizer")
    (here / "state.json").write_text(json.dumps(described))
    names = [path for path in here.rglob("*") if path.is_file() and path.name != "manifest.json"]
    files.commit(checkpoint.parent, 10, [files.describe(path, here) for path in names])
    check(amclr_scale.load(checkpoint), run)
    export(checkpoint, tmp_path / "out")
    file = tmp_path / "out" / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["normalizer"] = None
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"data\.tokenizer: .*does not give the token ids"):
        amclr_scale.load(tmp_path / "out")


def test_embedding_a_folder_of_pictures(run, tmp_path):
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 255, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "pictures" / f"{number}.png")
    export(run[0], tmp_path / "out")
    command = [
        sys.executable,
        "-m",
        "amclr_scale",
        "embed",
        str(tmp_path / "out"),
        "--images",
        str(tmp_path / "pictures"),
    ]
    subprocess.run([*command, "--out", str(tmp_path / "rows.npy")], cwd=ROOT, check=True)
    rows = np.load(tmp_path / "rows.npy")
    names = (tmp_path / "rows.txt").read_text().splitlines()
    want = amclr_scale.load(run[0]).encode_image(names)
    np.testing.assert_allclose(rows, want.numpy(), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("side", ["image", "text"])
def test_embedding_a_data_set(run, tmp_path, monkeypatch, side):
    out = tmp_path / "rows.npy"
    words = [str(run[0]), "--shards", "emoji/val_concept", "--side", side, "--out", str(out), "--batch-size", "100"]
    assert embed.main(words) == 0
    rows, names = np.load(out), (tmp_path / "rows.txt").read_text().splitlines()
    assert rows.shape == (678, 16)
    assert len(set(names)) == 678
    split = EvaluationSplit("emoji/val_concept", build(TREE).data)
    assert names[5] == split.key(5)
    model = amclr_scale.load(run[0])
    batch = next(split.batches(8))
    want = model.encode_image(batch.images[0]) if side == "image" else model.encode_text(split.captions[:8])
    np.testing.assert_allclose(rows[:8], want.numpy(), atol=1e-6)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name in ("rows.parquet", "nowhere/rows.npy"):  # told before the work
        assert embed.main([*words[:5], "--out", str(tmp_path / name)]) == 2


def test_embedding_to_parquet(run, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = ["a", "", "b\u2028b\x0b\rb", "c"]  # four lines, though str.splitlines would make seven of them
    (tmp_path / "texts.txt").write_bytes(("\n".join(texts) + "\n").encode())
    words = [str(run[0]), "--texts", str(tmp_path / "texts.txt"), "--batch-size", "2"]
    assert embed.main([*words, "--out", str(tmp_path / "rows.parquet")]) == 0
    table = parquet.read_table(tmp_path / "rows.parquet").to_pydict()
    assert table["name"] == texts
    want = amclr_scale.load(run[0]).encode_text(texts)
    np.testing.assert_allclose(np.array(table["embedding"]), want.numpy(), atol=1e-6)


def test_a_file_of_texts_that_is_missing_is_told(run, tmp_path, capsys):
    assert embed.main([str(run[0]), "--texts", str(tmp_path / "gone.txt"), "--out", str(tmp_path / "rows.npy")]) == 2
    assert capsys.readouterr().err.startswith(f"--texts: {tmp_path / 'gone.txt'}: expected a file")


def test_every_weight_is_there(run, tmp_path):
    export(run[0], tmp_path / "out")
    assert "image_tower" in " ".join(load_file(tmp_path / "out" / "weights.safetensors"))


def test_a_moving_average_of_the_weights_is_exported_and_loaded(run, tmp_path, capsys):
    folder, *_, image, text = run
    assert main([str(folder), "--which", "momentum", "--out", str(tmp_path / "out")]) == 0
    for path in (tmp_path / "out", folder / "momentum.safetensors"):
        check(amclr_scale.load(path), (folder, image, text))
    assert not torch.allclose(image, run[1], atol=1e-3)
    export(folder, tmp_path / "student")
    written, student = (load_file(tmp_path / name / "weights.safetensors") for name in ("out", "student"))
    assert torch.equal(written["logit_scale"], student["logit_scale"])  # model.momentum.scale is false
    said = (tmp_path / "out" / "README.md").read_text()
    assert "their moving average (decay 0.75)" in said
    assert ("75.0" in said, "50.0" in said) == (True, False)
    assert "75.0" not in (tmp_path / "student" / "README.md").read_text()
    without = {"config": {**TREE, "model": {}}}  # as older ones say
    with mock.patch("amclr_scale.trained.export.read_state", return_value=without):
        assert main([str(folder), "--which", "momentum", "--out", str(tmp_path / "none")]) == 2
    assert "--which: expected weights, got momentum" in capsys.readouterr().err


def test_an_exported_model_says_which_splits_it_needs(run, tmp_path, capsys, monkeypatch):
    split = write_split(tmp_path / "photos", 6)
    config = build({**TREE, "evaluation": {"splits": [str(split)], "resamples": 0}})
    monkeypatch.setattr("amclr_scale.trained.export.build", lambda tree, trusted: config)
    main([str(run[0]), "--out", str(tmp_path / "out")])
    assert str(tmp_path) not in (tmp_path / "out" / "config.yaml").read_text()
    capsys.readouterr()
    assert amclr_scale_command(words := ["evaluate", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert told.startswith("\nevaluation.splits: expected where photos lies on this machine, got null")
    assert told.endswith("; set evaluation.splits={photos: PATH}\n")
    assert amclr_scale_command([*words, "--set", f"evaluation.splits={{photos: {split}}}"]) == 0
    assert "photos" in capsys.readouterr().out
    assert open_model(str(run[0])).config.evaluation.splits == [str(split)]  # the run itself keeps its paths


def test_open_clip_reads_it(tmp_path):
    import json

    from safetensors.torch import save_file

    from amclr_scale.trained import as_open_clip

    bert = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    (tmp_path / "text_tower").mkdir()
    (tmp_path / "text_tower" / "config.json").write_text(json.dumps({**bert, "intermediate_size": 16}))
    towers = {"image": {"name": "timm/vit_tiny_patch16_224"}, "text": {"name": f"transformers/{tmp_path}/text_tower"}}
    config = build({**TREE, "data": {"context_length": 12}, "model": {"embedding_width": 16, **towers}})
    words = load_tokenizer("emoji", 12)
    model = build_model(
        config.model, vocab_size=words.vocab_size, pad_id=words.pad_id, context_length=12, image_size=224,
        image_mean=config.data.image_mean, image_std=config.data.image_std,
    ).eval()  # fmt: skip
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()}, tmp_path / "weights.safetensors"
    )
    (tmp_path / "config.yaml").write_text(dump(config))
    words.save(tmp_path / "tokenizer")
    as_open_clip.write(tmp_path)
    import open_clip

    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    reads = theirs.visual.preprocess_cfg
    assert (tuple(reads["mean"]), tuple(reads["std"])) == (config.data.image_mean, config.data.image_std)
    assert (reads["size"], reads["resize_mode"], reads["interpolation"]) == ((224, 224), "shortest", "bicubic")
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = model(images=(images,), texts=(words(TEXTS),))
        got = theirs.eval().encode_image(model.normalise(images, torch.float32), normalize=True)
        torch.testing.assert_close(got, ours["image"], rtol=0, atol=1e-6)
        torch.testing.assert_close(theirs.encode_text(words(TEXTS), normalize=True), ours["text"], rtol=0, atol=1e-6)
    torch.testing.assert_close(amclr_scale.load(tmp_path).encode_text(TEXTS), ours["text"], rtol=0, atol=1e-6)


def test_open_clip_has_no_small_towers(run, tmp_path):
    from amclr_scale.trained import as_open_clip

    with pytest.raises(UserError, match=r"model\.image\.name: expected timm/NAME"):
        export(run[0], tmp_path / "out", as_open_clip.write)
    assert not (tmp_path / "out").exists()  # nor half of an export
