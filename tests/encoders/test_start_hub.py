"""`model.init` by a name of the hub: one commit, fetched once, read from the cache after that, refused in words."""

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from amclr_scale.checkpoint.own_files import settled
from amclr_scale.data.tokenizers import load_tokenizer
from amclr_scale.encoders.start.hub import fetch
from amclr_scale.encoders.start.hub_names import hint, parse, same_start
from amclr_scale.encoders.start.taken import resolve
from amclr_scale.engine.build import model_of
from amclr_scale.errors import UserError
from amclr_scale.evaluation.models import load_model
from tests.checkpoint.test_own_files import begun
from tests.encoders.test_start import recipe, saved
from tests.encoders.test_start_open_clip import check
from tests.encoders.test_start_open_clip import folder as of_open_clip
from tests.hub import serving
from tests.study.test_cells import planned

OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two commits of a tiny CLIP, with what a repository has beside it."""
    home = tmp_path_factory.mktemp("clips")
    for name in ("old", "new"):
        torch.manual_seed(len(name) if name == "old" else 7)
        saved("clip", home / name)
        (home / name / "evil.py").write_text("raise SystemExit('code of the hub was run')")
        (home / name / "tf_model.h5").write_bytes(b"of another library")
    return home


@pytest.fixture
def hub(monkeypatch, tmp_path, clips):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with serving(monkeypatch, tmp_path / "cache") as server:
        server.holds("them/clip", clips / "old", OLD, "v1")
        server.holds("them/clip", clips / "new", NEW, "main")
        yield server


def weights(config):
    model = model_of(config, load_tokenizer(config.data.tokenizer, config.data.context_length))
    return model, model.state_dict()["image_head.1.weight"]


def test_names():
    found = parse("transformers/them/clip@v1@" + OLD)
    assert (found.library, found.name, found.asked, found.commit) == ("transformers", "them/clip", "v1", OLD)
    assert str(found) == "transformers/them/clip@v1@" + OLD
    assert str(parse("hf-hub:them/clip@" + OLD[:7]).at(OLD)) == "hf-hub:them/clip@" + OLD
    assert str(parse("them/clip@refs/pr/3").at(OLD)) == "them/clip@refs/pr/3@" + OLD
    for path in ("a", "/a/b", "./a/b", "~/a", "a/b/c", "tests/nothing", "a/clip.pt", "open_clip/ViT-B-32:x.pt",
                 "them/clip@../../x", "a/..", "transformers/vit", "s3://a/b"):  # fmt: skip
        assert parse(path) is None, path
    kept = "them/clip@v1@" + OLD
    for init in ("them/clip", "them/clip@v1", "them/clip@" + OLD, "them/clip@" + OLD[:7]):
        assert same_start(kept, init), init
    for init in ("them/clip@v2", "them/clip@" + NEW, "them/clap", "transformers/them/clip", "clip"):
        assert not same_start(kept, init), init


def test_what_looks_like_a_name_is_told_how_the_hub_s_is_written(tmp_path, monkeypatch):
    """A folder that is called as an owner, as `hf download OWNER/NAME --local-dir OWNER/NAME` makes it; links."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "them" / "run").mkdir(parents=True)
    told = {
        "them/clip": "if a model of the hub is meant: hf-hub:them/clip",
        "them/clip@v1": "if a model of the hub is meant: hf-hub:them/clip@v1",
        "them/runn": r"did you mean 'run'\?",
        "https://huggingface.co/them/clip": "a model of the hub is named them/clip",
        "https://huggingface.co/them/clip/tree/main": "a model of the hub is named them/clip",
        "hf://them/clip": "a model of the hub is named them/clip",
    }
    for init, words in told.items():
        with pytest.raises(UserError, match=rf"^model\.init: expected .*, got {init}: .*; {words}$"):
            resolve(recipe(init))
        if "://" not in init:
            with pytest.raises(UserError, match=rf"^checkpoint: expected .*, got {init}: .*; {words}$"):
                load_model(init)
    for init in ("them", "them/a/b", "them/clip.pt", "hf-hub:them", "them/run", "nowhere/clip"):
        assert hint(init) == ""


def test_one_commit_is_fetched_once_and_then_needs_no_hub(hub, clips, monkeypatch, capsys):
    config = resolve(recipe("them/clip"))
    assert config.model.init == "them/clip@" + NEW
    model, head = weights(config)
    assert head.equal(weights(resolve(recipe(clips / "new")))[1])
    assert model.notes[-1].partition(" weights from ")[2].startswith(f"them/clip@{NEW}, and model.embedding_width=16")
    assert f"model.init: fetching them/clip@{NEW}, " in capsys.readouterr().out
    assert hub.fetched("model.safetensors") == 1
    assert not any(path.endswith((".py", ".h5")) for _, path in hub.asked)
    before = len(hub.asked)
    assert resolve(recipe("them/clip@" + NEW)) == config.model_copy()  # the cache has it: nobody is asked
    assert resolve(config) == config
    assert len(hub.asked) == before
    # A revision by its name is looked up, and another commit fetched.
    pinned = resolve(recipe("transformers/them/clip@v1"))
    assert pinned.model.init == f"transformers/them/clip@v1@{OLD}"
    assert weights(pinned)[1].equal(weights(resolve(recipe(clips / "old")))[1])
    # Offline, and with the server gone, the last that was seen stands.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve(recipe("them/clip")) == config
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.shutdown()
    hub.server_close()
    assert resolve(recipe("them/clip")) == config
    assert resolve(recipe("them/clip@v1")).model.init == f"them/clip@v1@{OLD}"
    assert load_model("them/clip").name == "them/clip@" + NEW  # evaluate takes it too


def test_mistakes_are_told_in_words_and_at_once(hub, clips, monkeypatch, tmp_path):
    hub.holds("them/closed", clips / "old", OLD, "main")
    hub.gated["them/closed"] = 403
    hub.holds("them/page", clips / "old", OLD, "main")
    hub.repositories["them/page"][1][OLD] = {"README.md": b""}
    told = {
        "them/clap": "neither a folder here nor a model of http.*, or a private one: check the name, or log in by `hf",
        "them/clip@v3": "it has no revision v3",
        "them/closed": r"its owner lets in whom he knows: ask at http://.*/them/closed, and log in by `hf auth login`",
    }
    for init, words in told.items():
        with pytest.raises(UserError, match=rf"^model.init: {init}: {words}.* --local-dir FOLDER .*model.init=FOLDER"):
            resolve(recipe(init))
    with pytest.raises(UserError, match=r"^model.init: expected config.yaml .*, got them/page, which holds README.md$"):
        resolve(recipe("them/page"))
    with pytest.raises(UserError, match=r"^model.init: expected open_clip_config.json with weights, got them/clip"):
        resolve(recipe("open_clip/them/clip"))
    hub.gated["them/closed"] = 401
    with pytest.raises(UserError, match=r"^model.init: them/closed: its owner lets in"):
        resolve(recipe("them/closed"))
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert resolve(recipe("them/closed")).model.init == "them/closed@" + OLD
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"^model.init: them/clip: HF_HUB_OFFLINE is set, and the cache has not all"):
        resolve(recipe("them/clip"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.shutdown()
    hub.server_close()
    began = time.monotonic()
    with pytest.raises(UserError, match=r"^model.init: them/clip: no folder here, the cache has .* was not reached"):
        resolve(recipe("them/clip"))
    assert time.monotonic() - began < 5


def test_half_a_download_is_no_model_and_goes_on(hub, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the library's attempts
    hub.cut = 2000  # configurations arrive, weights do not
    with pytest.raises(
        UserError, match=r"^model.init: them/clip@b{40}: it was not fetched to its end \(.*same command"
    ):
        resolve(recipe("them/clip"))
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set, and the cache has not all of it"):
            resolve(recipe("them/clip@" + NEW))
    hub.cut = 0
    before = hub.fetched("/config.json")
    assert resolve(recipe("them/clip")).model.init == "them/clip@" + NEW
    assert hub.fetched("/config.json") == before


def test_processes_of_a_node_fetch_it_once(hub, tmp_path):
    """Threads stand for them here: the lock is one of the file system, which each opens for itself."""
    with ThreadPoolExecutor(3) as several:
        found = list(several.map(lambda _: fetch(parse("them/clip"), "model.init"), range(3)))
    places = {str(one.place) for one in found}
    assert places == {str(tmp_path / "cache" / "models--them--clip" / "snapshots" / NEW)}
    assert hub.fetched("model.safetensors") == hub.fetched("/tokenizer.json") == 1


def test_a_run_goes_on_at_its_commit_without_hub_and_cache(hub, clips, tmp_path):
    runs, cache = tmp_path / "runs", tmp_path / "cache"
    named = {"run": {"folder": str(runs), "name": "a"}}
    before, _ = begun("them/clip", runs / "a", **named)
    hub.holds("them/clip", clips / "old", OLD, "main")  # the branch goes on
    asked = len(hub.asked)
    again = settled(recipe("them/clip", **named, resume="auto"), 1)
    assert again.model == before.model
    assert len(hub.asked) == asked
    shutil.rmtree(cache)
    third = settled(recipe("them/clip", **named, resume="auto"), 1)
    assert (third.model.init, third.data.tokenizer) == (before.model.init, str(runs / "a" / "tokenizer"))
    assert third.model.image.name == f"transformers/{runs}/a/image_tower"
    assert len(hub.asked) == asked
    unnamed = {"run": {"folder": str(runs)}, "resume": "auto"}
    (runs / "a" / "checkpoints").mkdir()
    (runs / "a" / "checkpoints" / "latest").touch()
    assert settled(recipe("them/clip", **unnamed), 1).model.init == before.model.init
    other = settled(recipe("them/clip", optimizer={"lr": 0.5}, **unnamed), 1)  # no run of this recipe: it begins
    assert other.model.init == "them/clip@" + OLD


def test_open_clip_s_names(hub, tmp_path, monkeypatch):
    """A repository as open_clip publishes it, and a pair of architecture and weights, with how these want pictures."""
    import open_clip

    theirs = of_open_clip(tmp_path / "source")
    hub.holds("laion/tiny", tmp_path / "source", OLD, "main")
    tokens = load_tokenizer("clip", 12)
    for init in ("hf-hub:laion/tiny", "laion/tiny", "open_clip/laion/tiny@main"):
        made = resolve(recipe(init))
        assert made.model.init == init.removesuffix("@main") + "@main" * ("@" in init) + "@" + OLD
        check(model_of(made, tokens), tokens, theirs)
    described = json.loads((tmp_path / "source" / "open_clip_config.json").read_text())
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", described["model_cfg"])
    entry = {"hf_hub": "laion/tiny/", "mean": (0.4,) * 3, "std": (0.3,) * 3, "resize_mode": "squash"}
    tags = {"one_b1k": {**entry, "quick_gelu": True}, "two_b1k": {**entry, "quick_gelu": False}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", tags)
    for init in ("tiny/one_b1k", "open_clip/tiny/one_b1k@" + OLD):
        made = resolve(recipe(init))
        assert made.model.init == init.removesuffix("@" + OLD) + "@" + OLD
        assert (made.model.image.name, made.evaluation.resize) == ("open_clip/tiny", "squash")
        assert made.data.image_mean == (0.4, 0.4, 0.4)
        check(model_of(made, tokens), tokens, theirs)
    loaded = load_model("tiny/one_b1k")
    assert loaded.config.data.image_mean == (0.4, 0.4, 0.4)
    with pytest.raises(
        UserError, match=r"^model.init: expected weights of tiny .*\(one_b1k or two_b1k\), got onebk; d"
    ):
        resolve(recipe("tiny/onebk"))
    with pytest.raises(UserError, match=r"two_b1k were trained with GELU: expected such as tiny-?.*/two_b1k, got tiny"):
        resolve(recipe("tiny/two_b1k"))


def test_a_run_of_ours_that_was_published(hub, clips, tmp_path):
    _, model = begun(clips / "old", tmp_path / "run")
    head = model.state_dict()["image_head.1.weight"]
    save_file(
        {name: x.contiguous() for name, x in model.state_dict().items()}, tmp_path / "run" / "weights.safetensors"
    )
    (tmp_path / "run" / "objective.py").write_text("raise SystemExit")
    hub.holds("me/run", tmp_path / "run", NEW, "main")
    made = resolve(recipe("me/run"))
    assert weights(made)[1].equal(head)
    assert not any(path.endswith(".py") for _, path in hub.asked)


def test_a_model_of_the_hub_is_one_commit_in_all_cells(tmp_path):
    with pytest.raises(UserError, match=r"model.init: expected them/clip@v1@COMMIT .* in a plan, .* got them/clip@v1"):
        planned(tmp_path, "words=[model.init=them/clip@v1]")
