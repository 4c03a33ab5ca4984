"""Paraphrases are made once, beside the shards, and are further captions of the right samples."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from amclr_scale.commands import paraphrase
from amclr_scale.config import schema
from amclr_scale.data.beside.paraphrases import ParaphraseReader, paraphrase_file, write_paraphrases
from amclr_scale.data.formats.members import ChangedShardError
from amclr_scale.data.indexing import open_index
from amclr_scale.data.loader import TrainLoader
from amclr_scale.data.tokenizers import EMOJI
from amclr_scale.errors import UserError
from amclr_scale.torchvision_ops import import_torchvision
from tests.data.shards import settings, write_shards
from tests.data.test_loader import assert_same, joined, take


def write_all(data, folder, make):
    index = open_index(data)
    folder.mkdir(exist_ok=True)
    first = 0
    for shard in index.shards:
        rows = [make(i) for i in range(first, first + shard.num_samples)]
        write_paraphrases(folder, shard, {"model": "test", "candidates": 1, "kept": 1}, rows)
        first += shard.num_samples
    return index


@pytest.fixture
def data(tmp_path):
    write_shards(tmp_path / "shards", [5, 1, 6])
    folder = tmp_path / "paraphrases"
    return settings(str(tmp_path / "shards"), text_views=1, text_view="paraphrases", paraphrases=str(folder))


def test_they_are_further_captions_of_their_own_sample(data):
    write_all(data, Path(data.paraphrases), lambda i: [f"picture {i}", f"image {i}"] if i != 7 else [])
    loader = TrainLoader(data, seed=0, global_batch_size=4)
    kinds = set()
    for _ in range(12):
        batch = next(loader)
        for i, tokens in zip(batch.ids.tolist(), batch.texts[1], strict=True):
            expected = [f"picture {i}", f"image {i}"] if i != 7 else ["sample 7"]  # none: its own caption
            matches = [text for text in expected if torch.equal(loader.tokenizer([text])[0], tokens)]
            assert len(matches) == 1
            kinds.add(matches[0].split()[0])
    assert kinds == {"picture", "image", "sample"}


def test_they_do_not_depend_on_ranks_and_workers(data):
    write_all(data, Path(data.paraphrases), lambda i: [f"picture {i}", f"image {i}"])
    parts = [take(data, 6, rank=rank, world_size=2, workers=rank) for rank in range(2)]
    assert_same(joined(parts), take(data, 6))


def test_those_of_another_shard_are_refused(data, tmp_path):
    index = write_all(data, Path(data.paraphrases), lambda i: [str(i)])
    first, third = (paraphrase_file(Path(data.paraphrases), index.shards[k]) for k in (0, 2))
    shutil.copy(third, first)
    with pytest.raises(ChangedShardError, match="paraphrases of another"):
        TrainLoader(data, seed=0, global_batch_size=4)
    first.unlink()
    with pytest.raises(UserError, match=r"data\.paraphrases: .*expected paraphrases of"):
        TrainLoader(data, seed=0, global_batch_size=4)
    with pytest.raises(UserError, match=r"data\.paraphrases: expected the folder"):
        TrainLoader(data.model_copy(update={"paraphrases": None}), seed=0, global_batch_size=4)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A T5 and a sentence encoder with random weights and the emoji vocabulary."""
    import_torchvision()
    import transformers

    folder = tmp_path_factory.mktemp("models")
    special = {"pad_token": "[PAD]", "eos_token": "[SEP]", "unk_token": "[PAD]", "cls_token": "[CLS]"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(EMOJI), **special)
    sizes = {"vocab_size": 4096, "d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    torch.manual_seed(0)
    t5 = transformers.T5Config(**sizes, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0)
    bert = transformers.BertConfig(
        vocab_size=4096, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    for name, model in (("t5", transformers.T5ForConditionalGeneration(t5)), ("bert", transformers.BertModel(bert))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(capsys):
    """The tool, in this process: importing transformers takes longer than everything that it does here."""

    def call(*arguments):
        code = paraphrase.main([*map(str, arguments), "--device", "cpu"])
        return Result(code, *capsys.readouterr())

    call.keep = paraphrase.keep
    return call


@pytest.mark.slow
def test_the_tool_goes_on_where_it_stopped_and_shares_its_work(models, run, data, tmp_path):
    shards = data.train
    options = ["--model", models / "t5", "--max-tokens", "6", "--count", "2"]
    whole = run(shards, *options, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    assert "paraphrases of 12 samples kept, out of 48 candidates" in whole.stdout
    index = open_index(data)
    for rank in range(2):
        part = run(shards, *options, "--out", tmp_path / "parts", "--rank", rank, "--ranks", 2)
        assert part.returncode == 0, part.stderr
    files = sorted((tmp_path / "whole").iterdir())
    assert len(files) == 3
    assert all(file.read_bytes() == (tmp_path / "parts" / file.name).read_bytes() for file in files)
    kept = files[0].read_bytes()
    files[0].unlink()  # as if it had been interrupted there
    times = files[1].stat().st_mtime_ns
    assert run(shards, *options, "--out", tmp_path / "whole").returncode == 0
    assert files[0].read_bytes() == kept
    assert files[1].stat().st_mtime_ns == times
    for other in (["--seed", "1"], ["--max-tokens", "5"], ["--model", models / "bert"]):
        changed = run(shards, *options, *other, "--out", tmp_path / "whole")
        assert changed.returncode == 2
        assert changed.stderr.startswith(f"{other[0]}: expected ")
        assert "choose another --out" in changed.stderr
    assert files[0].read_bytes() == kept
    with pytest.MonkeyPatch.context() as patched:  # another spelling of the same folder, and the same folder elsewhere
        patched.chdir(models)
        for spelling in ("t5", shutil.copytree(models / "t5", tmp_path / "moved")):
            again = run(shards, *options[2:], "--model", spelling, "--out", tmp_path / "whole")
            assert again.returncode == 0, again.stderr
    assert files[0].read_bytes() == kept
    reader = ParaphraseReader(tmp_path / "whole", index.shards[2])
    rows = [json.loads(reader.read(row)) for row in range(6)]
    assert all(len(row) <= 2 for row in rows)
    assert sum(map(len, rows)) > 6
    take(data.model_copy(update={"paraphrases": str(tmp_path / "whole")}), 4)


@pytest.mark.slow
def test_the_filter_of_meaning(models, run, data, tmp_path):
    options = ["--model", models / "t5", "--filter", models / "bert", "--max-tokens", "6", "--out", tmp_path / "out"]
    strict = run(data.train, *options, "--min-cosine", "0.9999", "--max-cosine", "1.1")
    assert strict.returncode == 0, strict.stderr
    assert " 0 paraphrases of 12 samples kept" in strict.stdout
    wrong = run(data.train, "--model", tmp_path / "nothing", "--out", tmp_path / "out2")
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[-1].startswith("--model:")
    assert "Traceback" not in wrong.stderr


@pytest.fixture
def made_by(data, tmp_path):
    """A folder of paraphrases that were made by a model `old`, whose first lines have what is given besides."""

    def make(**origin):
        (tmp_path / "old").mkdir()
        (tmp_path / "old" / "config.json").write_text("{}")
        (tmp_path / "out").mkdir()
        known = {"candidates": 8, "kept": 1, "count": 3, **origin}
        for shard in open_index(data).shards:
            write_paraphrases(tmp_path / "out", shard, known, [[]] * shard.num_samples)
        return tmp_path / "old"

    return make


def test_a_model_whose_digest_was_not_kept_is_known_by_its_place(run, data, tmp_path, made_by, monkeypatch):
    old = made_by(model=str(tmp_path / "old"), filter=None, min_cosine=0.5, max_cosine=0.9)
    monkeypatch.chdir(tmp_path)
    for spelling in (old, "old", "./old/", f"{old}/../old"):
        same = run(data.train, "--model", spelling, "--out", tmp_path / "out")  # limits without a filter mean nothing
        assert same.returncode == 0, same.stderr
    (tmp_path / "new").mkdir()
    for other in ("new", "owner/old"):
        told = run(data.train, "--model", other, "--out", tmp_path / "out").stderr
        assert told.startswith(f"--model: expected {str(old)!r}, by which ")


def test_a_folder_whose_model_is_another_now_is_refused(run, data, tmp_path, made_by):
    old = made_by(model=str(tmp_path / "old"), filter=None, model_sha256="0" * 64)
    told = run(data.train, "--model", old, "--out", tmp_path / "out")
    assert (told.returncode, told.stderr.strip().split(" when ")[0]) == (
        2,
        f"--model: expected the files that {old} had",
    )
    hub = {"model": "old", "model_sha256": None, "filter": None}  # a folder of that name came later
    assert paraphrase.same_model("model", hub, hub)
    assert not paraphrase.same_model("model", {**hub, "model_sha256": "0" * 64}, hub)
    digest = paraphrase.digest_of(str(old))
    (old / "README.md").write_text("nothing that transformers reads")
    assert paraphrase.digest_of(str(old)) == digest
    (old / "generation_config.json").write_text("{}")
    assert paraphrase.digest_of(str(old)) != digest


def test_limits_of_cosines_belong_to_a_filter(run, data, tmp_path, made_by):
    old = made_by(model=str(tmp_path / "old"), filter=str(tmp_path / "old"), min_cosine=0.5, max_cosine=0.995)
    told = run(data.train, "--model", old, "--filter", old, "--out", tmp_path / "out").stderr.strip()
    assert told.startswith("--min-cosine: expected 0.5, by which ")
    went = run(data.train, "--model", old, "--filter", old, "--min-cosine", "0.5", "--out", tmp_path / "out")
    assert went.returncode == 0, went.stderr
    told = run(data.train, "--model", old, "--min-cosine", "0.5", "--out", tmp_path / "out").stderr
    assert told == "--min-cosine: expected --filter beside it, whose cosines it limits, got none; leave it out\n"


@pytest.mark.parametrize("option", ["--count", "--top-k", "--max-tokens", "--batch"])
def test_numbers_that_are_none(run, data, tmp_path, option):
    refused = run(data.train, "--model", "x", "--out", tmp_path / "out", option, "0")
    assert (refused.returncode, refused.stderr) == (2, f"{option}: expected at least 1, got 0\n")
    assert not (tmp_path / "out").exists()


def test_only_new_and_close_ones_are_kept(run):
    keep = run.keep
    candidates = ["A dog.", "a DOG", "", "a hound", "the hound", "a cat"]
    assert keep("a dog", candidates, None, (0, 1), 3) == ["a hound", "the hound", "a cat"]
    assert keep("a dog", candidates, [1, 1, 0, 0.9, 0.5, 0.2], (0.4, 0.95), 3) == ["a hound", "the hound"]
    assert keep("a dog", candidates, None, (0, 1), 1) == ["a hound"]


def test_defaults_need_no_paraphrases():
    assert schema.Data().paraphrases is None
