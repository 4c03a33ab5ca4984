"""Features of inner layers go through every export of ours, and where a library has none, the command says so."""

from unittest import mock

import pytest
import torch

import amclr_scale
from amclr_scale.commands import export
from tests.trained import test_export
from tests.trained.test_export import TEXTS, TREE, make_run, pixels

pytestmark = pytest.mark.slow
IMAGE, TEXT = (
    ["stages.3", {"module": "stages.2", "head": "none"}],
    ["layers.0", {"module": "layers.0.up", "head": "none"}],
)
TAPPED = {
    **TREE,
    "objective": {"name": "fifo_bank", "size": 64, "layers": [1, 1, 1]},
    "model": {
        "embedding_width": 16, "image": {"width": 16, "taps": IMAGE}, "text": {"width": 16, "taps": TEXT},
        "momentum": {"decay": 0.75},
    },
}  # fmt: skip


def make_tapped(folder):
    """On each rank: as make_run, with taps."""
    with mock.patch.object(test_export, "TREE", TAPPED):
        make_run(folder)


@pytest.fixture(scope="module")
def run(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    ranks(2, make_tapped, folder)
    return folder


@torch.no_grad()
def layers(module, tokenizer):
    out = module(images=(pixels(),), texts=(tokenizer(TEXTS),))
    return *out["image_layers"], *out["text_layers"]


@pytest.mark.parametrize("form", ["safetensors", "transformers"])
def test_an_export_has_the_taps_of_its_run(run, tmp_path, form):
    trained = amclr_scale.load(run)
    want = layers(trained.module, trained.tokenizer)
    assert [x.shape for x in want] == [(5, 16), (5, 64), (3, 16), (3, 64)]
    assert export.main([str(run), "--to", form, "--out", str(tmp_path / form)]) == 0
    (tmp_path / form).rename(tmp_path / "moved")
    loaded = amclr_scale.load(tmp_path / "moved")
    torch.testing.assert_close(layers(loaded.module, loaded.tokenizer), want, rtol=0, atol=1e-6)
    if form == "transformers":
        from transformers import AutoModel

        theirs = AutoModel.from_pretrained(str(tmp_path / "moved")).eval()
        torch.testing.assert_close(layers(theirs.model, loaded.tokenizer), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", ["open_clip", "transformers_dual_encoder", "safetensors"])
def test_a_library_without_inner_layers_is_told_of(run, tmp_path, monkeypatch, capsys, form):
    monkeypatch.setitem(export.FORMS, form, lambda: None)  # what it writes is tested elsewhere
    assert export.main([str(run), "--to", form, "--out", str(tmp_path / "out")]) == 0
    said = f"--to {form}: model.image.taps and model.text.taps are not in that library's files"
    assert (said in capsys.readouterr().err) is (form != "safetensors")
