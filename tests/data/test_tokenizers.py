"""Every vocabulary gives rows of [start] tokens [end] padding."""

import json

import pytest
import torch

from amclr_scale.data.tokenizers import EMOJI, load_tokenizer
from amclr_scale.errors import UserError

CAPTIONS = ["a photo of a cat", "", "Caf\u00e9 \U0001f600 " * 30, "RED APPLE"]


@pytest.fixture
def bert(tmp_path):
    """A folder as transformers saves it, with a vocabulary of a few words."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "cat", "red", "apple"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True})
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    return str(tmp_path)


@pytest.mark.parametrize("spec", ["emoji", pytest.param("clip", marks=pytest.mark.slow), "bert"])
def test_rows_have_one_shape(spec, bert):
    tokenizer = load_tokenizer(bert if spec == "bert" else spec, 12)
    rows = tokenizer(CAPTIONS)
    assert rows.dtype == torch.int64
    assert rows.shape == (4, 12)
    assert (rows[:, 0] == tokenizer.start_id).all()
    assert (rows >= 0).all()
    assert (rows < tokenizer.vocab_size).all()
    for row in rows:
        last = int((row == tokenizer.end_id).nonzero()[0])
        assert (row[last + 1 :] == tokenizer.pad_id).all()
        assert tokenizer.end_id not in row[:last]
    assert rows[1].tolist() == [tokenizer.start_id, tokenizer.end_id] + [tokenizer.pad_id] * 10
    assert rows[2, -1] == tokenizer.end_id  # cut, and still ended
    assert tokenizer([]).shape == (0, 12)


@pytest.mark.parametrize("spec", ["emoji", "clip", "bert"])
def test_half_of_a_surrogate_pair_is_one_unknown_character(spec, bert):
    """What JSON holds of a caption that was cut inside an emoji; the library raises a TypeError about its input."""
    tokenizer = load_tokenizer(bert if spec == "bert" else spec, 12)
    cut, whole = json.loads('["a cat \\ud83d", "a cat \\ud83d\\ude00"]')
    assert tokenizer([cut, whole]).equal(tokenizer(["a cat \ufffd", "a cat \U0001f600"]))


@pytest.mark.parametrize("reader", ["tokenizer.json", "transformers"])
def test_numbers_with_holes(tmp_path, reader):
    """The end token far behind the words, as in several published vocabularies: the largest number decides."""
    words = ["<pad>", "<s>", "[UNK]", "a", "photo", "of", "cat"]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": i, "content": token, **special} for i, token in ((0, "<pad>"), (1, "<s>"), (40, "</s>"))]
    vocabulary = {**{word: i for i, word in enumerate(words)}, "</s>": 40}
    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
    }  # fmt: skip
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(content))
    if reader == "transformers":
        named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "[UNK]"}
        about = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
    tokenizer = load_tokenizer(str(file if reader == "tokenizer.json" else tmp_path), 8)
    rows = tokenizer(["a photo of a cat"])
    assert rows.tolist() == [[1, 3, 4, 5, 3, 6, 40, 0]]
    assert tokenizer.vocab_size == 41
    assert torch.nn.Embedding(tokenizer.vocab_size, 2)(rows).shape == (1, 8, 2)


def test_known_ids(bert):
    assert load_tokenizer("clip", 9)(["a photo of a cat"]).tolist() == [[49406, 320, 1125, 539, 320, 2368, 49407, 0, 0]]
    assert load_tokenizer(bert, 9)(["a photo of a cat"]).tolist() == [[2, 5, 6, 7, 5, 8, 3, 0, 0]]


def test_open_clips_own_rows_are_ours():
    open_clip = pytest.importorskip("open_clip")
    captions = [caption.strip() for caption in CAPTIONS]
    torch.testing.assert_close(
        load_tokenizer("clip", 16)(captions), open_clip.SimpleTokenizer()(captions, context_length=16)
    )


def test_the_emoji_vocabulary_knows_its_captions():
    tokenizer = load_tokenizer("emoji", 32)
    assert tokenizer.vocab_size == 4096
    assert (tokenizer(["grinning face with smiling eyes"]) != tokenizer.pad_id).sum() == 7  # a word is a token
    torch.testing.assert_close(tokenizer(["Red  Apple"][:1]) != 0, tokenizer(["red  apple"]) != 0)


def test_a_file_is_the_same_vocabulary():
    torch.testing.assert_close(load_tokenizer(str(EMOJI), 20)(CAPTIONS), load_tokenizer("emoji", 20)(CAPTIONS))


@pytest.mark.slow
def test_its_files_are_saved_and_loaded_again(tmp_path, bert):
    for spec in ("emoji", bert, "clip"):
        first = load_tokenizer(spec, 12)
        kept = tmp_path / f"kept_{first.vocab_size}"
        first.save(kept)
        again = load_tokenizer(str(kept), 12)
        torch.testing.assert_close(again(CAPTIONS), first(CAPTIONS))
        assert (again.vocab_size, again.pad_id, again.end_id) == (first.vocab_size, first.pad_id, first.end_id)
        assert again.fingerprint() == first.fingerprint()
        again.check_saved(kept)
        assert {name: (kept / name).read_bytes() for name in first.files()} == first.files()


def changed_vocabulary(content):
    vocabulary = content["model"]["vocab"]
    a, b = sorted(vocabulary)[-2:]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]


def changed_merges(content):
    content["model"]["merges"] = content["model"]["merges"][:-1]


def changed_case(content):
    content["normalizer"] = None


@pytest.mark.parametrize("change", [changed_vocabulary, changed_merges, changed_case])
@pytest.mark.slow
def test_a_changed_file_is_noticed(tmp_path, change):
    load_tokenizer("emoji", 12).save(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content))  # other white space: the same tokenizer
    load_tokenizer(str(tmp_path), 12).check_saved(tmp_path)
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="does not give the token ids that the model was trained with"):
        load_tokenizer(str(tmp_path), 12).check_saved(tmp_path)


@pytest.mark.parametrize("spec", ["bert-base-uncased", "openai/clip-vit-base-patch32", "nothing.json"])
def test_a_hub_name_is_told_at_once(spec):
    with pytest.raises(UserError, match="names on a hub are not downloaded"):
        load_tokenizer(spec, 12)


def test_broken_files_are_told(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"data\.tokenizer: .*expected a tokenizer\.json"):
        load_tokenizer(str(tmp_path / "tokenizer.json"), 12)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"data\.tokenizer: .*expected a folder of a transformers tokenizer"):
        load_tokenizer(str(tmp_path / "folder"), 12)
