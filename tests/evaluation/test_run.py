"""An evaluation of whole splits: the same on any number of ranks, every item once, as many calls everywhere."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from amclr_scale.config.schema import Config
from amclr_scale.data.names import probe_name, short_names
from amclr_scale.data.tokenizers import load_tokenizer
from amclr_scale.distributed.collectives import rank, world_size
from amclr_scale.encoders.build import build_model
from amclr_scale.errors import UserError
from amclr_scale.evaluation.evaluators import numbers_of
from amclr_scale.evaluation.frozen_features.measure import numbers_of_probe
from amclr_scale.evaluation.run import Evaluator
from amclr_scale.metrics.scores import score_of
from tests.evaluation.shards import write_split, write_tar

N = 23


def recipe(*splits: str, batch_size: int = 4, **evaluation) -> Config:
    return Config.model_validate(
        {
            "data": {"image_size": 16, "context_length": 12},
            "model": {"embedding_width": 8, "image": {"width": 8}, "text": {"width": 16}},
            "evaluation": {
                "splits": splits,
                "batch_size": batch_size,
                "resamples": 50,
                "classes": "json.concept",
                **evaluation,
            },
        }
    )


def called(split: str) -> str:
    """The name of a split's numbers: that of its folder."""
    return short_names([split])[split]


def model(config: Config) -> torch.nn.Module:
    torch.manual_seed(0)
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.context_length)
    return build_model(
        config.model, vocab_size=tokenizer.vocab_size, pad_id=tokenizer.pad_id,
        context_length=config.data.context_length, image_size=config.data.image_size,
        image_mean=config.data.image_mean, image_std=config.data.image_std,
    )  # fmt: skip


class Counting(torch.nn.Module):
    """The model, and how often it was called with what."""

    def __init__(self, inner: torch.nn.Module):
        super().__init__()
        self.inner, self.calls = inner, []

    def forward(self, images=(), texts=(), **options):
        assert not self.training
        assert not torch.is_grad_enabled()
        self.calls.append(("images", len(images[0])) if images else ("texts", len(texts[0])))
        return self.inner(images, texts, **options)


def evaluated(splits: tuple[str, ...], batch_size: int) -> tuple[dict[str, float], list[tuple[str, int]], bool]:
    config = recipe(*splits, batch_size=batch_size)
    counting = Counting(model(config)).train()
    results = Evaluator(config, rank=rank(), world_size=world_size())(counting)
    return results, counting.calls, counting.training


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> str:
    return str(write_split(tmp_path_factory.mktemp("split"), N, captions=2, copies=3, shared_images=2))


def test_any_number_of_ranks_and_any_batch_size_give_the_same(ranks, split, tmp_path):
    tiny = str(write_split(tmp_path, 2))  # fewer samples than ranks
    want, _, training = evaluated((split, tiny), 100)
    assert training
    assert want[f"{called(split)}/images"] == N - 2
    assert want[f"{called(split)}/texts"] == 2 * N
    assert want[f"{called(split)}/shared_captions"] == 2 * 3
    for W, batch_size in ((2, 4), (3, 5)):
        answers = ranks(W, evaluated, (split, tiny), batch_size)
        for got, calls, _ in answers:
            assert list(got) == list(want)
            for name, value in want.items():
                assert got[name] == pytest.approx(value, abs=1e-9), name
            assert [kind for kind, _ in calls] == [kind for kind, _ in answers[0][1]]  # ZeRO's stage 3 would hang


def test_numbers_are_known_before_they_are_measured(split):
    probe = {"train": split, "test": split, "classes": "json.concept", "l2": [1e-3], "neighbours": [1]}
    config = recipe(split, geometry=True, probes=[probe])
    evaluator = Evaluator(config)
    ((options, train, _),) = evaluator.probes
    known = {called(split): numbers_of(evaluator.tasks[0], config.evaluation)}
    known[probe_name(options, config.evaluation)] = numbers_of_probe(options, train)
    found = [key.rpartition("/") for key in evaluator(model(config)) if score_of(key) is not None]
    assert known == {name: {number for of, _, number in found if of == name} for name in known}
    assert numbers_of(evaluator.tasks[0], config.evaluation.model_copy(update={"evaluators": ["mine"]})) is None


def test_numbers_are_those_of_the_features(split):
    """Encoded one by one, ranked by plain comparisons."""
    config = recipe(split)
    encoder = model(config).eval()
    evaluator = Evaluator(config, rank=0, world_size=1)
    results = evaluator(encoder)
    data = evaluator.tasks[0].split
    with torch.no_grad():
        image = torch.cat([encoder(images=batch.images)["image"] for batch in data.batches(1)])
        names = ["black", "blue", "green", "red", "white", "yellow"]
        weights = [
            sum(
                encoder(texts=(data.reading.tokenizer([t.replace("{}", name)]),))["text"]
                for t in evaluator.tasks[0].templates
            )
            for name in names
        ]
    scores = image @ F.normalize(torch.cat(weights), dim=-1).T
    right = torch.tensor([names.index(label) for label in data.labels])
    assert results[f"{called(split)}/zero_shot_top1"] == pytest.approx(
        float((scores.argmax(1) == right).double().mean())
    )
    assert results[f"{called(split)}/zero_shot_top1/chance"] == pytest.approx(1 / 6)
    low, high = results[f"{called(split)}/zero_shot_top1/low"], results[f"{called(split)}/zero_shot_top1/high"]
    assert low <= results[f"{called(split)}/zero_shot_top1"] <= high
    table = evaluator.table(results)
    assert f"{100 * results[f'{called(split)}/zero_shot_top1']:.1f} [{100 * low:.1f}, {100 * high:.1f}]" in table
    assert "shared captions 6" in table
    assert "stderr" not in table


def test_a_perfect_model_is_perfect(tmp_path):
    """Captions encode to what their pictures encode to, so every number is 1 (and the median rank is 1)."""
    split = str(write_split(tmp_path, N))
    config = recipe(split, classes=None)
    evaluator = Evaluator(config, rank=0, world_size=1)
    data = evaluator.tasks[0].split
    pixels = torch.cat([batch.images[0] for batch in data.batches(N)]).flatten(1).double()
    tokens = data.reading.tokenizer([captions[0] for captions in data.caption_lists])

    def encode(images=(), texts=()):
        if images:
            return {"image": F.normalize(images[0].flatten(1).double() - 127, dim=-1)}
        rows = [int((tokens == caption).all(1).nonzero()[0]) for caption in texts[0]]
        return {"text": F.normalize(pixels[rows] - 127, dim=-1)}

    results = evaluator.measure(encode)
    shares = {name: value for name, value in results.items() if "R@" in name and name.count("/") == 1}
    assert len(shares) == 9
    assert set(shares.values()) == {1.0}
    assert results[f"{called(split)}/image_to_text_median_rank"] == 1


def test_the_embedded_corpus_has_the_sizes_that_are_documented():
    config = Config.model_validate(
        {"evaluation": {"splits": ["emoji/val_style", "emoji/val_concept"], "classes": "json.concept"}}
    )
    evaluator = Evaluator(config, rank=0, world_size=1)
    assert [task.split.num_samples for task in evaluator.tasks] == [1724, 678]
    assert {len(task.class_names) for task in evaluator.tasks} == {1906}


def test_mistakes(split, tmp_path: Path):
    def refused(message: str, *splits: str, **evaluation):
        with pytest.raises(UserError, match=message):
            Evaluator(recipe(*splits, **evaluation), rank=0, world_size=1)

    refused(r"^evaluation.splits: ", str(tmp_path / "nowhere.tar"))
    refused(r"^evaluation.templates: expected one slot", split, templates=["a photo"])
    refused(r"^evaluation.templates: expected at least one", split, templates=[])
    write_tar(tmp_path / "plain.tar", [{"png": b"", "json": {"concept": "red"}}])
    refused(r"^data.caption: .*expected captions in .txt", str(tmp_path / "plain.tar"))
    refused(r"^evaluation.classes: .*json.colour", split, classes="json.colour")
