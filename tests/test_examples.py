"""The scripts of examples/ run as they stand, on few samples, and learn."""

import contextlib
import importlib.util
import io
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from amclr_scale.config.load import load
from amclr_scale.objectives import create
from amclr_scale.types import Embeddings

EXAMPLES = Path(__file__).parents[1] / "examples"
SENTENCES = "sentence_transformers_loop.py"
FURTHER = {SENTENCES: "sentence_transformers", "lightning_loop.py": "lightning"}  # packages
READ = {"own_objective.py"}  # by `objective.module`, and no script


def need(name):
    """Skip an example whose package is not installed."""
    if name in FURTHER and importlib.util.find_spec(FURTHER[name]) is None:
        pytest.skip(f"{FURTHER[name]} is not installed")


def scripts(names):
    """What imports packages of others for seconds is slow."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in FURTHER else name for name in sorted(names)]


def learned(said):
    losses = [float(one) for one in re.findall(r"loss ([\d.]+)", said)]
    assert len(losses) == 12
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("name", scripts({path.name for path in EXAMPLES.glob("*_loop.py")} - {SENTENCES}))
def test_a_loop_learns(name, monkeypatch, capsys):
    need(name)
    for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr(sys, "argv", [name, "160", "12"])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    learned(capsys.readouterr().out)


def in_a_process(name, *words, then=""):
    """What a script says that a user starts: nothing is imported before it, and it may make a process group.

    Args:
        then: statements after it, for which `made` is what it has made.
    """
    code = (
        f"import runpy, sys; sys.argv = sys.argv[1:]; made = runpy.run_path(sys.argv[0], run_name='__main__'); {then}"
    )
    command = [sys.executable, "-c", code, str(EXAMPLES / name), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=EXAMPLES.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.launch
def test_sentence_transformers_learn_and_their_gradient_is_the_plain_one():
    """In a process whose first import of torchvision is the example's own."""
    need(SENTENCES)
    check = "from tests.test_examples import check_sentences; check_sentences(made)"
    said = in_a_process(SENTENCES, 160, 12, then=check)
    learned(said)
    assert said.splitlines()[-1] == "the gradient is the plain one"


def check_sentences(made):
    """150 questions and answers of different lengths, 64 at a time, in float64."""
    model = made["model"].double().eval()  # dropout draws other numbers for 64 rows than for 150
    texts = [f"word{n} " * (1 + n % 5) for n in range(300)]
    sides = [dict(model.preprocess(texts[k::2])) for k in range(2)]
    sides = [{name: side[name] for name in ("input_ids", "attention_mask")} for side in sides]
    model.zero_grad()
    plain = made["loss"](made["encode"](*sides))
    plain.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    torch.testing.assert_close(made["cache"](made["loss"], *sides), plain, rtol=0, atol=1e-12)
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(found) == len(expected) > 20
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    refuses(SENTENCES)
    print("the gradient is the plain one")


@pytest.mark.parametrize("name", scripts({path.name for path in EXAMPLES.glob("*.py")} - READ - {SENTENCES}))
def test_words_that_a_script_cannot_use_are_told(name):
    """Those that miss, too."""
    need(name)
    refuses(name)


def refuses(name):
    assert f"python examples/{name}" in (EXAMPLES / name).read_text()  # its first words say how it is started
    words = sys.argv
    for wrong in ["--nonsense"], ["none"] if name.endswith("_loop.py") else []:
        sys.argv, said = [name, *wrong], io.StringIO()
        try:
            with pytest.raises(SystemExit) as ended, contextlib.redirect_stderr(said):
                runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        finally:
            sys.argv = words
        assert ended.value.code == 2
        assert said.getvalue().startswith(f"usage: {name} [-h]")
        told = "(the following arguments are required|unrecognized arguments: --nonsense|argument batch: invalid)"
        assert re.search(f"error: {told}", said.getvalue())


@pytest.mark.launch  # workers
def test_a_pipeline_of_webdatasets_stages_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    """The same losses and samples as without a stop."""

    def steps(until, saved):
        monkeypatch.setattr(sys, "argv", ["webdataset_pipeline.py", "64", str(until), str(tmp_path / saved)])
        runpy.run_path(str(EXAMPLES / "webdataset_pipeline.py"), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    whole = steps(4, "whole.pt")
    assert len(whole) == 4
    assert steps(2, "cut.pt") + steps(4, "cut.pt") == whole


def test_an_objective_of_ones_own_is_what_it_says():
    """Its file is read as `objective.module` reads it; equal to its definition in float64."""
    torch.manual_seed(0)
    file = str(EXAMPLES / "own_objective.py")
    load("quickstart", ["objective.name=mean_margin", f"objective.module={file}", "objective.margin=0.1"])
    objective = create("mean_margin", module=file)
    image, text = (torch.nn.functional.normalize(torch.randn(6, 4, dtype=torch.float64), dim=1) for _ in range(2))
    scale = torch.tensor(10.0, dtype=torch.float64)
    value = objective(Embeddings(image=image, text=text, ids=torch.arange(6), logit_scale=scale)).value
    s = image @ text.T
    others = s.masked_fill(torch.eye(6, dtype=torch.bool), -torch.inf)
    mean = [((10 * x).logsumexp(1) - torch.tensor(5.0).log()) - 10 * (s.diagonal() - 0.2) for x in (others, others.T)]
    torch.testing.assert_close(value, torch.nn.functional.softplus(torch.stack(mean)).mean(), rtol=0, atol=1e-6)


def test_accounts_and_reports_are_read(monkeypatch, capsys):
    report = EXAMPLES.parent / "docs" / "studies" / "mini_amclr" / "report.json"
    for words in (["memory_account.py", "quickstart", "1024", "1"], ["read_study.py", str(report)]):
        monkeypatch.setattr(sys, "argv", words)
        runpy.run_path(str(EXAMPLES / words[0]), run_name="__main__")
    said = capsys.readouterr().out
    assert re.search(r"micro-batches of 64: [\d.]+ MiB per rank", said)
    assert "execution." in said
    assert re.search(r"CLIP, B = 128: [\d.]+ % \[", said)
    assert re.search(r"against CLIP, B = 128: \w+", said)


@pytest.mark.slow
@pytest.mark.launch
def test_lit_reads_what_embed_wrote(tmp_path):
    said = in_a_process("lit_on_features.py", tmp_path, 64, 256)
    assert "samples: features of float32, 64 wide ->" in said
    assert "data.features.image: the image tower rests on the host" in said
    assert re.search(r"R@10, image to text: [\d.]+ %", said)


@pytest.mark.slow
@pytest.mark.launch
def test_a_clip_is_tuned_on_photos_and_held_against_what_it_was(tmp_path):
    from tests.encoders.test_start import saved  # with what it imports
    from tests.test_walkthroughs import photos

    saved("clip", tmp_path / "clip")
    words = photos(tmp_path / "photos", 48), photos(tmp_path / "held_out", 8), tmp_path / "clip", tmp_path
    said = in_a_process("finetune_on_own_photos.py", *words, "optimizer.lr=1e-2")
    assert re.search(r"R@1, text to image: [\d.]+ % before, [\d.]+ % after", said)
    assert "wrote 48 samples in 1 shards" in said
