"""Every family of text towers, from training to use: what one verb writes, the next ones read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import amclr_scale
from amclr_scale.evaluation.models import load_model
from amclr_scale.torchvision_ops import import_torchvision
from tests.evaluation.shards import write_split
from tests.trained.journey import FORMS

ROOT = Path(__file__).parents[2]
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TEXTS = ["picture 3 line 0 red", "the same caption"]


def towers() -> dict[str, tuple[str, dict, list[str]]]:
    """Kind -> (configuration of transformers, its options, further words); tiny, with weights at random."""
    narrow = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16}
    rotary = {**SIZES, "num_key_value_heads": 1, "head_dim": 8}
    # Trained with a larger vocabulary than the tokenizer has, as published ones are.
    larger = {**SIZES, "vocab_size": 5000, "pad_token_id": 0, "max_position_embeddings": 40}
    return {
        "bert": ("BertConfig", SIZES, []),
        "roberta": ("RobertaConfig", SIZES, []),
        "distilbert": ("DistilBertConfig", narrow, []),
        "clip": ("CLIPTextConfig", SIZES, []),
        "qwen3": ("Qwen3Config", rotary, ["execution.recompute_text=full"]),
        "albert": ("AlbertConfig", {**SIZES, "embedding_size": 8}, ["model.text.pooling=mean"]),
        "pretrained": ("BertConfig", larger, ["model.text.pretrained=true"]),
    }


pytestmark = [pytest.mark.launch, pytest.mark.slow]


@pytest.fixture(scope="module")
def travelled(tmp_path_factory) -> tuple[Path, dict[str, dict[str, int]]]:
    """Where each family's runs and exports are, and the verbs' exit codes."""
    import_torchvision()
    import transformers

    root = tmp_path_factory.mktemp("journey")
    write_split(root / "split", 32)
    lines = []
    for kind, (config, options, words) in towers().items():
        made = getattr(transformers, config)(**options)
        if kind == "pretrained":
            transformers.AutoModel.from_config(made).save_pretrained(root / "towers" / kind)
        else:
            made.save_pretrained(root / "towers" / kind)
        lines.append(" ".join([kind, *words]))
    (root / "towers.txt").write_text("\n".join(lines))
    quiet = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.trained.journey", str(root)],
        cwd=ROOT, env={**os.environ, **quiet}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (root / "said.txt").write_text(done.stderr)
    return root, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", towers())
def test_every_verb_reads_what_training_wrote(travelled, kind):
    root, codes = travelled
    in_open_clip = kind in ("bert", "roberta", "pretrained")  # it has no others
    said = (root / "said.txt").read_text()[-3000:]
    assert codes[kind] == dict.fromkeys(codes[kind], 0) | {"open_clip": 0 if in_open_clip else 2}, said

    run = root / "runs" / kind
    loaded = load_model(str(run)).model
    assert load_file(run / "weights.safetensors").keys() == loaded.state_dict().keys()
    trained = json.loads((run / "evaluation.json").read_text())
    evaluated = json.loads((root / "evaluated" / kind / "results.json").read_text())["results"][kind]
    assert evaluated == trained

    want = amclr_scale.load(run).encode_text(TEXTS)
    assert (want[0] - want[1]).norm() > 1e-4
    for form in FORMS[: 3 if in_open_clip else 2]:
        (root / form / kind).rename(root / form / f"moved {kind}")
        torch.testing.assert_close(
            amclr_scale.load(root / form / f"moved {kind}").encode_text(TEXTS), want, rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("kind", towers())
def test_transformers_gives_the_same_embeddings(travelled, kind):
    from transformers import AutoModel

    import amclr_scale.trained.as_transformers

    root, _ = travelled
    folder = next((root / "transformers").glob(f"*{kind}"))
    ours = amclr_scale.load(folder)
    theirs = AutoModel.from_pretrained(str(folder)).eval()
    with torch.no_grad():
        got = theirs.get_text_features(ours.tokenizer(TEXTS))
    torch.testing.assert_close(got, ours.encode_text(TEXTS), rtol=0, atol=1e-6)


def test_a_run_that_saved_buffers_that_are_made_anew(travelled):
    """As all of them did: BERT's position numbers were in the file, and in no state_dict."""
    root, _ = travelled
    file = root / "runs" / "bert" / "weights.safetensors"
    weights = load_file(file)
    want = amclr_scale.load(file.parent).encode_text(TEXTS)
    inner = "text_tower.tokens.model.embeddings"
    old = {f"{inner}.position_ids": torch.arange(512)[None], f"{inner}.token_type_ids": torch.zeros(1, 512).long()}
    save_file(weights | old, file)
    torch.testing.assert_close(amclr_scale.load(file.parent).encode_text(TEXTS), want, rtol=0, atol=0)
    save_file(weights, file)
