"""Dual encoders of others are measured as their own library encodes, or refused by name."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import amclr_scale
from amclr_scale.errors import UserError
from amclr_scale.evaluation.models import check_reading, load_model
from amclr_scale.evaluation.run import Evaluator
from amclr_scale.torchvision_ops import import_torchvision
from tests.evaluation.shards import write_split
from tests.evaluation.test_run import recipe

WORDS = ["a", "photo", "of", "cat", "dog", "red", "blue", "house", "on", "the", "mat", "sleeping"]
TEXTS = ["a photo of a cat", "a dog", "a blue cat sleeping on a red mat"]
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {**SMALL, "image_size": 32, "patch_size": 16}
SQUARE = {"height": 32, "width": 32}


def tokenizer(special: list[str], template: str, **named):
    """Words by number behind the special tokens, which the template puts where it says."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate([*special, *WORDS, "[UNK]"])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    places = [(token, vocabulary[token]) for token in special]
    made.post_processor = processors.TemplateProcessing(single=template, special_tokens=places)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", **named)


def build(kind: str):
    """Model, tokenizer, image processor, and whether captions are always filled up and never masked."""
    import_torchvision()
    import transformers as T

    torch.manual_seed(0)
    if kind.startswith("siglip"):
        special, ends = (["<pad>", "<eos>", "<bos>"], "<eos>") if kind == "siglip2" else (["<pad>", "</s>"], "</s>")
        named = {"bos_token": "<bos>"} if kind == "siglip2" else {}  # it exists, and the template does not add it
        words = tokenizer(special, f"$A {ends}", eos_token=ends, pad_token="<pad>", **named)
        text = {**SMALL, "vocab_size": len(words), "max_position_embeddings": 16}
        model = T.SiglipModel(T.SiglipConfig(text_config=text, vision_config=VISION))
        return model, words, T.SiglipImageProcessor(size=SQUARE), True
    if kind == "clip":
        start, ends = "<|startoftext|>", "<|endoftext|>"
        words = tokenizer([start, ends], f"{start} $A {ends}", bos_token=start, eos_token=ends, pad_token=ends)
        ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
        text = {**SMALL, "vocab_size": len(words), "max_position_embeddings": 16, **ids}
        model = T.CLIPModel(T.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16))
        return model, words, T.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE), False
    if kind == "altclip":  # positions begin behind the padding's number
        named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
        words = tokenizer(["<s>", "<pad>", "</s>"], "<s> $A </s>", **named)
        text = {**SMALL, "vocab_size": len(words), "max_position_embeddings": 18, "pad_token_id": 1, "project_dim": 16}
        model = T.AltCLIPModel(T.AltCLIPConfig(text_config=text, vision_config=VISION, projection_dim=16))
        return model, words, T.CLIPImageProcessor(size={"shortest_edge": 40}, crop_size=SQUARE), False
    named = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    words = tokenizer(["[PAD]", "[CLS]", "[SEP]"], "[CLS] $A [SEP]", **named)
    text = {**SMALL, "vocab_size": len(words), "max_position_embeddings": 16, "pad_token_id": 0}
    if kind == "chinese_clip":
        model = T.ChineseCLIPModel(T.ChineseCLIPConfig(text_config=text, vision_config=VISION, projection_dim=16))
        return model, words, T.ChineseCLIPImageProcessor(size=SQUARE, do_center_crop=False), False
    if kind == "align":  # pixels from -1 to 1, and then normalised
        narrow = {"image_size": 32, "width_coefficient": 0.2, "depth_coefficient": 0.2, "hidden_dim": 32}
        model = T.AlignModel(T.AlignConfig(text_config=text, vision_config=narrow, projection_dim=32))
        seen = {"size": SQUARE, "do_center_crop": False, "include_top": False, "rescale_offset": True}
        return model, words, T.EfficientNetImageProcessor(**seen), False
    both = {"vision_config": T.ViTConfig(**VISION), "text_config": T.BertConfig(**text), "projection_dim": 16}
    model = T.VisionTextDualEncoderModel(
        T.VisionTextDualEncoderConfig.from_vision_text_configs(
            both["vision_config"], both["text_config"], projection_dim=16
        )
    )
    return model, words, T.ViTImageProcessor(size=SQUARE, do_normalize=False), False


KINDS = ("siglip", "siglip2", "clip", "altclip", "chinese_clip", "align", "vision-text-dual-encoder")


def features(out) -> torch.Tensor:
    return F.normalize(out if isinstance(out, torch.Tensor) else out.pooler_output, dim=-1)


def wide_picture() -> Image.Image:
    """Black edges that a crop does not see, and noise that shows how pixels are resized."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return Image.fromarray(np.concatenate([np.zeros((64, 32, 3), np.uint8), noise, np.zeros((64, 32, 3), np.uint8)], 1))


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_and_captions_encode_as_at_home(tmp_path, kind):
    model, words, processor, filled = build(kind)
    for part in (model.eval(), words, processor):
        part.save_pretrained(tmp_path)
    texts = words(TEXTS, padding="max_length" if filled else True, max_length=16, truncation=True, return_tensors="pt")
    keys = ("input_ids",) if filled else ("input_ids", "attention_mask")
    with torch.no_grad():
        want_text = features(model.get_text_features(**{key: texts[key] for key in keys}))
        want_image = features(model.get_image_features(**processor(wide_picture(), return_tensors="pt")))
    loaded = amclr_scale.load(f"transformers/{tmp_path}")
    torch.testing.assert_close(loaded.encode_text(TEXTS), want_text, rtol=0, atol=1e-5)
    length = float(want_image.norm())  # 1, but for a random EfficientNet, which gives next to nothing
    torch.testing.assert_close(loaded.encode_image(wide_picture()), want_image, rtol=0, atol=1e-5 * length)
    assert (loaded.config.data.context_length, loaded.config.data.image_size) == (16, 32)


def test_a_folder_of_transformers_5(tmp_path):
    """The image processor stands inside of processor_config.json; and its splits are read its way."""
    from transformers import CLIPProcessor

    model, words, processor, _ = build("clip")
    model.bfloat16().save_pretrained(tmp_path / "model")
    CLIPProcessor(image_processor=processor, tokenizer=words).save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / "preprocessor_config.json").exists()
    loaded = load_model(f"transformers/{tmp_path}/model")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    with pytest.raises(UserError, match=r"^data.context_length: expected 16, as transformers/.* got 8; leave it away"):
        check_reading(loaded, loaded.config.data.model_copy(update={"context_length": 8}))
    split = write_split(tmp_path / "split", 6)
    config = recipe(str(split)).model_copy(update={"data": loaded.config.data})
    evaluator = Evaluator(config, reading=loaded.reading)
    assert evaluator.tasks[0].split.reading.view(wide_picture()).shape == (3, 32, 32)
    with torch.no_grad():
        assert evaluator.measure(loaded.model)["split/images"] == 6


def test_what_cannot_be_encoded_as_at_home_is_refused_by_name(tmp_path, monkeypatch):
    from amclr_scale.evaluation.foreign import of_transformers

    model, words, processor, _ = build("siglip2")
    for part in (model, words):
        part.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"^checkpoint: .*expected an image processor \(preprocessor_config.json or"):
        load_model(f"transformers/{tmp_path}")
    processor.save_pretrained(tmp_path)
    masked = of_transformers._Captions.__init__
    monkeypatch.setattr(of_transformers._Captions, "__init__", lambda *a, **_: masked(*a, masked=True))
    with pytest.raises(UserError, match=r"^checkpoint: .*SiglipModel would not be measured as transformers encodes"):
        load_model(f"transformers/{tmp_path}")


def test_siglip_of_open_clip(tmp_path):
    """As a folder that open_clip publishes: its tokenizer, squashed pictures, its own statistics."""
    import_torchvision()
    import open_clip
    from safetensors.torch import save_file

    words = tokenizer(["<pad>", "</s>"], "$A </s>", eos_token="</s>", pad_token="<pad>")
    words.save_pretrained(tmp_path)
    text = {
        "context_length": 16, "vocab_size": len(words), "width": 32, "heads": 2, "layers": 1, "no_causal_mask": True,
        "pool_type": "last", "proj_bias": True, "hf_tokenizer_name": "timm/on-a-hub",
        "tokenizer_kwargs": {"clean": "canonicalize"},
    }  # fmt: skip
    vision = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16}
    described = {
        "model_cfg": {"embed_dim": 16, "custom_text": True, "vision_cfg": vision, "text_cfg": text},
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
    torch.manual_seed(0)
    inner, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}", load_weights=False)
    save_file(inner.state_dict(), tmp_path / "open_clip_model.safetensors")
    ids = words([text.lower() for text in TEXTS], padding="max_length", max_length=16, return_tensors="pt").input_ids
    loaded = amclr_scale.load(f"open_clip/{tmp_path}")
    with torch.no_grad():
        want = inner.eval().encode_image(preprocess(wide_picture())[None], normalize=True)
        torch.testing.assert_close(loaded.encode_image(wide_picture()), want, rtol=0, atol=1e-5)
        want = inner.encode_text(ids, normalize=True)
        torch.testing.assert_close(loaded.encode_text(["A Photo, of a cat!", *TEXTS[1:]]), want, rtol=0, atol=1e-5)


def test_what_a_file_of_open_clip_does_not_say(tmp_path, caplog):
    from amclr_scale.encoders.start.of_open_clip import preprocessing

    assert preprocessing("ViT-B-16-SigLIP")["resize_mode"] == "squash"
    assert preprocessing("ViT-B-16-SigLIP")["mean"] == (0.5, 0.5, 0.5)
    assert not caplog.text
    assert preprocessing("ViT-L-14") == {}  # LAION's are other than OpenAI's
    assert "a file does not say which: CLIP's is taken" in caplog.text
    (tmp_path / "weights.pt").touch()
    with pytest.raises(UserError, match=r"^checkpoint: .*its text model's configuration is roberta-base, on a hub"):
        load_model(f"open_clip/roberta-ViT-B-32:{tmp_path}/weights.pt")
