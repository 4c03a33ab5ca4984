"""What the words of a command line mean."""

from amclr_scale.config.load import load
from tests.config.test_load import refused


def test_numbers_are_numbers():
    config = load(None, ["train.samples=1e6", "optimizer.lr=1e-4", "optimizer.eps=1.E-6", "optimizer.betas=[.9, 0.95]"])
    assert (config.train.samples, config.optimizer.lr, config.optimizer.eps) == (1_000_000, 1e-4, 1e-6)
    assert config.optimizer.betas == (0.9, 0.95)


def test_null_does_not_take_the_alternative_s_place():
    for words in (["train.samples=640", "train.epochs=null"], ["train.epochs=null", "train.samples=640"]):
        assert load("quickstart", words).train.samples == 640
    assert load("quickstart", ["train.samples=null"]).train == load("quickstart").train


def test_off_is_a_word_and_true_is_not():
    assert load(None, ["train.epochs=1", "run.wandb=off"]).run.wandb == "off"
    assert "model.text.pretrained: expected true or false" in refused("train.epochs=1", "model.text.pretrained=7")


def test_what_looks_like_octal_minutes_or_a_date_is_not():
    config = load(None, ["train.samples=1_000", "seed=010", "run.name=2026-11-22", "run.folder=1:30"])
    assert (config.train.samples, config.seed, config.run.name, config.run.folder) == (1000, 10, "2026-11-22", "1:30")
    assert [load(None, ["train.epochs=1", f"seed={n}"]).seed for n in ("0x1F", "0o17", "-3", "+4")] == [31, 15, -3, 4]
    assert "train.max_hours: expected a valid number" in refused("train.epochs=1", "train.max_hours=1:30")


def test_a_window_has_no_meaning_where_communities_are_permuted():
    words = ["train.epochs=1", "data.batches=similar", "data.communities=c.npy"]
    assert load(None, words).data.shuffle_window == 16
    said = refused(*words, "data.shuffle_window=4")
    assert said.startswith(
        "data.shuffle_window: has no meaning with data.batches=similar, which permutes all communities"
    )
    assert said.endswith("remove it (it is 16), got 4")
