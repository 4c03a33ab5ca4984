"""When memory has run out, the message names the largest component and a value of its key that fits."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from amclr_scale.config.load import load
from amclr_scale.config.schema import Config
from amclr_scale.distributed.launcher import RankInfo
from amclr_scale.engine.step import OutOfMemoryError, TrainStep
from amclr_scale.memory.account import account
from amclr_scale.memory.units import MIB
from amclr_scale.metrics.phases import Phases
from amclr_scale.planner import oom_advice
from amclr_scale.types import Batch

CPU = torch.device("cpu")
WORDS = ["data.image_size=32", "data.context_length=16", "train.epochs=1", "execution.threads=1"]


def config(*words: str) -> Config:
    return load(None, [*WORDS, "train.global_batch_size=64", *words], 1)


def peak(of: Config) -> int:
    return account(of, world_size=1, num_samples=256, device="cpu").peak_bytes


@pytest.mark.parametrize("words", [["execution.micro_batch_size=32"], ["execution.text_micro_batch_size=16"]])
def test_the_number_that_is_named_fits_and_the_next_larger_does_not(words):
    limit = 24 * MIB
    told = oom_advice.sentence(config(*words), world_size=1, num_samples=256, device="cpu", phase="pass_2", limit=limit)
    assert "more than 24.0 MiB" in told
    assert "largest: image activations" in told
    named = [word for word in told.splitlines()[1].split() if word.startswith("execution.")]
    assert peak(config(*words, *named)) <= limit
    assert named[0].startswith("execution.micro_batch_size")
    doubled = [f"{key}={2 * int(size)}" for key, _, size in (word.partition("=") for word in named)]
    assert peak(config(*words, *doubled)) > limit


def test_what_does_not_fit_whatever_one_key_is_says_so():
    told = oom_advice.sentence(config(), world_size=1, num_samples=256, device="cpu", phase="optimizer", limit=MIB)
    assert "no single key is enough" in told
    assert "amclr-scale fit --memory 1.0MiB" in told


@pytest.mark.launch
def test_a_failed_allocation_gets_the_advice_of_another_process(monkeypatch):
    monkeypatch.setattr(oom_advice, "limit_of", lambda *_: 24 * MIB)
    run = config("execution.micro_batch_size=32")

    class Starved:
        """An engine for which there is no memory."""

        module, optimizer = nn.Linear(1, 1), SimpleNamespace(param_groups=[])

        def zero_optimization_stage(self) -> int:
            return 0

        def __call__(self, *_: object) -> torch.Tensor:
            return torch.empty(2**50)

    step = TrainStep(
        Starved(),
        lambda embeddings: None,
        micro_batch_sizes=(32, 32), device=CPU, phases=Phases(CPU),
        advice=lambda phase: oom_advice.advise(run, rank_info=RankInfo(), num_samples=256, device=CPU, phase=phase),
    )  # fmt: skip
    batch = Batch(
        ids=torch.arange(64),
        images=(torch.zeros(64, 3, 32, 32, dtype=torch.uint8),),
        texts=(torch.ones(64, 16, dtype=torch.int64),),
    )
    with pytest.raises(OutOfMemoryError, match=r"out of memory .*phase pass_1") as failed:
        step(batch, 1e-3)
    told = str(failed.value)
    assert "execution.micro_batch_size: 16 instead of 32" in told  # what the step knows by itself
    assert "largest: image activations" in told
    assert " fits: " in told


def test_an_account_that_fails_does_not_hide_the_error(monkeypatch):
    monkeypatch.setattr(oom_advice, "TIMEOUT", 0.01)
    told = oom_advice.advise(config(), rank_info=RankInfo(), num_samples=256, device=CPU, phase="pass_2")
    assert told.startswith("the memory account gave no answer")
