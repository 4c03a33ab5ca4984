"""A dry run reads one sample of everything that the run would read, and says what it will need."""

import re
import shutil

import pytest
import torch
from safetensors.torch import save_file

from amclr_scale.commands import index_shards
from amclr_scale.commands.fit import samples_of
from amclr_scale.commands.job import prepare
from amclr_scale.commands.preview import preview
from amclr_scale.commands.train import arguments, check_dry_run
from amclr_scale.config.load import build
from amclr_scale.data.indexing import UnlistedShardsError
from amclr_scale.data.loader import TrainLoader
from amclr_scale.data.tokenizers import load_tokenizer
from amclr_scale.distributed.launcher import RankInfo
from amclr_scale.errors import UserError
from tests.checkpoint.test_files import truncated, write
from tests.evaluation.shards import picture, write_split, write_tar

TREE = {
    "data": {"image_size": 16, "context_length": 12, "lanes": 4},
    "model": {"embedding_width": 8, "image": {"width": 8}, "text": {"width": 16}},
    "train": {"global_batch_size": 64, "samples": 640},
    "optimizer": {"lr": 1e-3, "lr_rule": "sqrt", "lr_reference_batch": 16},
}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    """What `export` sets lasts no longer than a test."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def said(tree, *options):
    given = arguments(["--dry-run", *options])
    check_dry_run(given)
    return "\n".join(preview(build(tree, given.ranks or 1), RankInfo(), given))


def with_data(folder, **evaluation):
    data = {**TREE["data"], "train": str(write_split(folder / "train", 40))}
    return {**TREE, "data": data, "evaluation": evaluation}


def test_it_reads_a_sample_of_everything_and_says_what_there_is(tmp_path):
    held = str(write_split(tmp_path / "held", 6))
    (tmp_path / "classes" / "cat").mkdir(parents=True)
    (tmp_path / "classes" / "cat" / "0.png").write_bytes(picture(0))
    tree = with_data(tmp_path, splits={"mine": held, "animals": str(tmp_path / "classes")})
    tree["objective"] = {"name": "amclr"}
    tree["data"] |= {"image_views": 1, "text_views": 1, "text_view": "json.concept"}
    lines = said(tree)
    assert "data.train: 40 samples; read 4: 2 images and 2 texts each, 3x16x16" in lines
    assert "evaluation.splits: mine: 6 images, retrieval; read the first" in lines
    assert "evaluation.splits: animals: 1 images, 1 classes; read the first" in lines
    assert re.search(r"[\d,]+ parameters \([\d,]+ image tower, [\d,]+ text tower\); 4,096 tokens", lines)
    assert "global batch 64 = 1 ranks x 64" in lines
    assert "10 steps = 640 samples = 16.00 epochs of 40" in lines
    assert "learning rate: 0.002 at its peak (0.001 for a batch of 16, by the sqrt rule)" in lines
    assert "predicted memory of a rank:" in lines
    assert "predicted speed" not in lines
    assert "global_batch_size" not in lines


def test_ranks_and_a_device_are_pretended_and_the_data_need_not_be_here():
    tree = {**TREE, "data": {**TREE["data"], "train": "/nowhere/shards"}}
    with pytest.raises(UserError, match=r"^data.train: .*\n--num-samples: with it, the data need not be here"):
        said(tree)
    lines = said(tree, "--num-samples", "1000000", "--ranks", "4", "--device", "h100")
    assert "data.train: not looked at; 1,000,000 samples (--num-samples)" in lines
    assert "global batch 64 = 4 ranks x 16" in lines
    assert "predicted memory of a rank of H100" in lines or "predicted memory of a rank of h100" in lines
    assert re.search(
        r"predicted speed: [\d,]+ samples/s \([\d,]+ to [\d,]+\), .* s per step, [\d.]+ hours in all \(", lines
    )
    alone = said(tree, "--num-samples", "1000000", "--device", "h100")
    assert "global batch 64 = 1 ranks x 64" in alone
    with pytest.raises(UserError, match=r"^--device: expected cpu or one of"):
        said(tree, "--num-samples", "10", "--device", "h1000x")


@pytest.mark.parametrize("asked", [said, lambda tree: samples_of(build(tree))])
def test_that_the_data_need_not_be_here_is_only_said_where_they_are_not(tmp_path, asked):
    tree = with_data(tmp_path)
    (tmp_path / "empty").mkdir()
    absent = [{"train": name} for name in ("/nowhere/index.json", "/nowhere/{0..3}.tar", str(tmp_path / "empty"))]
    absent.append({"batches": "similar", "communities": "/nowhere/communities.npy"})
    for change in absent:
        with pytest.raises(UserError, match=rf"^data.{list(change)[-1]}: .*\n--num-samples: "):
            asked({**tree, "data": {**tree["data"], **change}})
    for change in ({"caption": "cls"}, {"tokenizer": "none"}):
        with pytest.raises(UserError, match=f"^data.{list(change)[-1]}: ") as told:
            asked({**tree, "data": {**tree["data"], **change}})
        assert "--num-samples" not in str(told.value)


def test_what_training_could_not_read_is_told(tmp_path):
    """The picture behind a whole index, of training and of a split; the file of weights."""
    bad = {"png": b"no picture", "txt": "c", "json": {}}
    for name in ("train", "held"):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "0.tar", [bad] * 40)
    tree = {**TREE, "data": {**TREE["data"], "train": str(tmp_path / "train")}}
    with pytest.raises(UserError, match="corrupt image"):
        said(tree)
    tree = with_data(tmp_path / "good", splits=[str(tmp_path / "held")])
    with pytest.raises(UserError, match=r"^evaluation.splits: .*cannot be used: corrupt image"):
        said(tree)
    save_file({"other.weight": torch.zeros(1)}, tmp_path / "weights.safetensors")
    tree = with_data(tmp_path / "good")
    weights = {"name": "torchvision/resnet18", "weights": str(tmp_path / "weights.safetensors")}
    tree["model"] = {"embedding_width": 8, "image": weights, "text": {"width": 16}}
    with pytest.raises(UserError, match=r"^model.image.weights: "):
        said(tree)


@pytest.mark.slow
def test_the_checkpoint_to_go_on_from_is_checked(tmp_path):
    """Found, whole, and of this recipe, data and tokenizer, as the run itself would find out in its job."""
    tree = with_data(tmp_path) | {"run": {"folder": str(tmp_path / "runs"), "name": "a"}}
    assert "resume: auto finds nothing to go on from: the run begins anew" in said({**tree, "resume": "auto"})
    assert "resume" not in said(tree)
    content = TrainLoader(build(tree).data, seed=0, global_batch_size=4).fingerprint
    about = {"data_fingerprint": content, "tokenizer_fingerprint": load_tokenizer("emoji", 12).fingerprint()}
    saved = write(tmp_path / "runs", 4, build(tree), **about)
    tree["resume"] = str(tmp_path / "runs" / "a")
    lines = said(tree)
    assert "resume: 256 samples seen, 6 of 10 steps left" in lines
    assert f"note: resumed from {saved}" in lines
    assert "6 of 10 steps left" in said({**tree, "data": {**tree["data"], "train": "/nowhere"},
                                         "resume_changed": ["data.train"]}, "--num-samples", "40")  # fmt: skip
    faster = {**TREE["optimizer"], "lr": 1}
    mistakes = {
        "resume: .*was made by another recipe(.|\n)*optimizer.lr: 0.001 in": {"optimizer": faster},
        "train.global_batch_size: expected a divisor of the 256 samples": {
            "train": {"global_batch_size": 96, "samples": 640}, "resume_changed": ["train"]
        },
        "resume: expected never, auto, or a folder with a checkpoint, got ": {"resume": str(tmp_path / "none")},
    }  # fmt: skip
    for words, change in mistakes.items():
        with pytest.raises(UserError, match=f"^{words}"):
            said({**tree, **change})
    write_split(tmp_path / "other", 39)
    data = {**tree["data"], "train": str(tmp_path / "other")}
    with pytest.raises(UserError, match=r"^resume: .* was made by another recipe"):
        said({**tree, "data": data})
    write(tmp_path / "runs", 5, build(tree), **{**about, "data_fingerprint": "another"})
    with pytest.raises(UserError, match=r"^data.train: the shards are not those that .*step_00000005"):
        said(tree)
    write(tmp_path / "runs", 6, build(tree), **{**about, "tokenizer_fingerprint": "another"})
    with pytest.raises(UserError, match=r"^data.tokenizer: emoji is not what it was"):
        said(tree)
    last = tmp_path / "runs" / "a" / "checkpoints" / "step_00000006"
    truncated(last / "rank_00000.safetensors")
    tree["resume"] = str(last)
    with pytest.raises(UserError, match=r"^resume: .*step_00000006 cannot be used: rank_00000.safetensors"):
        said(tree)


def test_a_run_goes_on_beside_shards_that_have_come_since_and_none_begins(tmp_path, caplog):
    train = write_split(tmp_path / "train", 40).parent
    tree = {**TREE, "data": {**TREE["data"], "train": str(train)}, "resume": "auto"}
    tree["run"] = {"folder": str(tmp_path / "runs"), "name": "a"}
    assert index_shards.main([str(train)]) == 0
    content = TrainLoader(build(tree).data, seed=0, global_batch_size=4).fingerprint
    about = {"data_fingerprint": content, "tokenizer_fingerprint": load_tokenizer("emoji", 12).fingerprint()}
    shutil.copy(next(train.glob("*.tar")), train / "later.tar")
    with pytest.raises(UserError, match=r"^data.train: .* got 1 that is not \(later.tar\)"):
        said(tree)
    assert prepared_by(build(tree)) is None
    write(tmp_path / "runs", 4, build(tree), **about)
    assert "resume: 256 samples seen, 6 of 10 steps left" in said(tree)
    assert f"data.train: {train}/index.json does not name later.tar" in caplog.text
    assert prepared_by(build(tree)) == 40
    with pytest.raises(UserError, match=r"^data.train: .* got 1 that is not"):
        said({**tree, "resume": "never"})


@pytest.mark.parametrize("key", ["splits", "probes"])
def test_a_run_goes_on_beside_shards_that_have_come_to_what_it_measures(tmp_path, caplog, key):
    held = write_split(tmp_path / "held", 6).parent
    probes = [{"train": str(held), "test": str(held), "classes": "json.concept"}]
    tree = with_data(tmp_path, **{key: probes if key == "probes" else [str(held)]}) | {"resume": "auto"}
    tree["run"] = {"folder": str(tmp_path / "runs"), "name": "a"}
    assert index_shards.main([str(held)]) == 0
    content = TrainLoader(build(tree).data, seed=0, global_batch_size=4).fingerprint
    about = {"data_fingerprint": content, "tokenizer_fingerprint": load_tokenizer("emoji", 12).fingerprint()}
    shutil.copy(next(held.glob("*.tar")), held / "later.tar")
    named = {"splits": "evaluation.splits", "probes": "evaluation.probes.train"}[key]
    with pytest.raises(UserError, match=rf"^{named}: .* got 1 that is not \(later.tar\)"):
        said(tree)
    assert prepared_by(build(tree)) is None
    write(tmp_path / "runs", 4, build(tree), **about)
    assert "6 images" in said(tree)
    assert f": {held}/index.json does not name later.tar: this run goes on with what it began with" in caplog.text
    assert prepared_by(build(tree)) == 40


def prepared_by(config):
    """How many samples a run of it would train on; None: it is refused."""
    try:
        prepared = prepare(config, RankInfo())
    except UnlistedShardsError:
        return None
    prepared.inputs.loader.close()
    return prepared.inputs.loader.num_samples


@pytest.mark.parametrize("words", [["--ranks", "4"], ["--device", "h100"], ["--num-samples", "9"], ["--verbose"]])
def test_its_options_are_no_options_of_a_run(words):
    with pytest.raises(UserError, match=f"^{words[0]}: expected it beside --dry-run"):
        check_dry_run(arguments(words))
    with pytest.raises(UserError, match=r"^--ranks: expected at least 1, got 0"):
        check_dry_run(arguments(["--dry-run", "--ranks", "0"]))
