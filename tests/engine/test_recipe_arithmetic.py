"""What the engine's own tests take from the code on both sides, held against numbers worked out by hand."""

import math

import pytest

from amclr_scale.config.load import load
from amclr_scale.config.schema import LearningRateFactors, Optimizer
from amclr_scale.distributed.launcher import RankInfo, export, read_rank_info
from amclr_scale.engine.batch_plan import make_plan
from amclr_scale.engine.optimizers import parameter_groups, set_learning_rate
from amclr_scale.engine.schedules import learning_rate
from amclr_scale.errors import UserError
from amclr_scale.metrics.flops import ModelFlops
from amclr_scale.metrics.throughput import Throughput
from tests.engine.towers import towers


def test_warm_up_and_cosine():
    o = Optimizer(lr=2.0, min_lr=0.5, warmup_samples=100)
    at = [learning_rate(o, samples, 1100, 64) for samples in (0, 50, 100, 600, 1100, 2000)]
    assert at == pytest.approx([0.0, 1.0, 2.0, 1.25, 0.5, 0.5])
    assert learning_rate(o, 350, 1100, 64) == pytest.approx(0.5 + 1.5 * (1 + math.cos(math.pi / 4)) / 2)


def test_constant_and_steps():
    constant = Optimizer(lr=2.0, schedule="constant", warmup_samples=10)
    assert [learning_rate(constant, s, 100, 1) for s in (5, 10, 100)] == [1.0, 2.0, 2.0]
    steps = Optimizer(lr=2.0, schedule="step", step_samples=(30, 60), step_factor=0.5)
    assert [learning_rate(steps, s, 100, 1) for s in (0, 29, 30, 59, 60, 99)] == [2, 2, 1, 1, 0.5, 0.5]


def test_cooldown_and_inverse_square_root():
    stable = {"lr": 2.0, "schedule": "constant", "warmup_samples": 100, "cooldown_samples": 400, "min_lr": 0.4}
    linear, root = (Optimizer(**stable, cooldown_shape=shape) for shape in ("linear", "sqrt"))
    places = (50, 100, 600, 700, 1000)
    assert [learning_rate(linear, s, 1000, 1) for s in places] == pytest.approx([1.0, 2.0, 2.0, 1.6, 0.4])
    assert [learning_rate(root, s, 1000, 1) for s in places] == pytest.approx([1.0, 2.0, 2.0, 1.2, 0.4])
    slow = Optimizer(lr=2.0, schedule="inverse_sqrt", warmup_samples=100)
    assert [learning_rate(slow, s, 1000, 1) for s in (100, 200, 400)] == pytest.approx([2.0, 2 / math.sqrt(2), 1.0])
    given = Optimizer(lr=2.0, schedule="inverse_sqrt", timescale_samples=50, cooldown_samples=200)
    at = [learning_rate(given, s, 800, 1) for s in (150, 600, 700, 800)]
    assert at == pytest.approx([1.0, 2 / math.sqrt(13), 1 / math.sqrt(15), 0.0])
    low = Optimizer(lr=2.0, schedule="inverse_sqrt", timescale_samples=1, cooldown_samples=400, min_lr=0.4)
    at = [learning_rate(low, s, 1000, 1) for s in (0, 3, 24, 99, 600, 800, 1000)]
    assert at == pytest.approx([2.0, 1.0, 0.4, 0.4, 0.4, 0.4, 0.4])  # it does not rise to min_lr at the end
    for run in (1000, 2000):  # a longer run is the same until its cooldown
        assert learning_rate(linear, 599, run, 1) == 2.0


SCHEDULES = {
    "optimizer.cooldown_samples: schedule constant and inverse_sqrt": ["optimizer.cooldown_samples=64"],
    "optimizer.cooldown_samples: expected at most train.samples": [
        "optimizer.cooldown_samples=300",
        "schedule=constant",
    ],
    "optimizer.warmup_samples: expected at most train.samples = 256, got 300": [
        "optimizer.warmup_samples=300",
        "schedule=constant",
    ],
    "optimizer.timescale_samples: schedule inverse_sqrt needs it": ["schedule=inverse_sqrt"],
    "optimizer.timescale_samples: schedule inverse_sqrt reads it": ["optimizer.timescale_samples=9"],
}


@pytest.mark.parametrize("message", SCHEDULES)
def test_keys_of_schedules_that_do_not_fit(message):
    words = [word if word.startswith("optimizer") else f"optimizer.{word}" for word in SCHEDULES[message]]
    with pytest.raises(UserError, match=message):
        load(None, ["train.samples=256", "train.global_batch_size=64", *words])


def test_a_run_in_epochs_that_is_shorter_than_its_warm_up_and_cooldown():
    words = ["train.epochs=2", "train.global_batch_size=64", "optimizer.warmup_samples=100"]
    cooled = [*words, "optimizer.schedule=constant", "optimizer.cooldown_samples=160"]
    told = r"^optimizer\.cooldown_samples: expected at most 2 epochs of 128 samples - .* = 156, got 160"
    with pytest.raises(UserError, match=told):
        make_plan(load(None, cooled), 128, 1)
    told = r"^optimizer\.warmup_samples: expected at most 2 epochs of 45 samples = 90, got 100"
    with pytest.raises(UserError, match=told):
        make_plan(load(None, [*cooled, "optimizer.cooldown_samples=0"]), 45, 1)
    make_plan(load(None, cooled), 130, 1)
    assert "warm-up" not in str(make_plan(load(None, words), 64, 1))
    for length in (["train.epochs=2"], ["train.epochs=null", "train.samples=64"]):
        assert "its warm-up of 100 samples is longer than the run" in str(make_plan(load(None, words + length), 32, 1))


@pytest.mark.parametrize(("rule", "factor"), [("none", 1), ("sqrt", 4), ("linear", 16)])
def test_the_learning_rate_grows_with_the_batch_as_the_rule_says(rule, factor):
    o = Optimizer(lr=0.5, lr_rule=rule, lr_reference_batch=64, schedule="constant")
    assert learning_rate(o, 0, 1, 1024) == pytest.approx(0.5 * factor)


def test_no_weight_decay_on_biases_norms_scale_and_bias_and_a_rate_for_each_part():
    model = towers()
    o = Optimizer(weight_decay=0.3, lr_factors=LearningRateFactors(temperature=0.1, image_tower=0.5))
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model.named_parameters(), model.no_weight_decay(), o)
    set_learning_rate(groups, 2.0)
    found = {names[id(p)]: (g["weight_decay"], g["lr"]) for g in groups for p in g["params"]}
    assert found.keys() == {name for name, _ in model.named_parameters()}
    for name, (decay, lr) in found.items():
        matrix = name == "words.weight" or name.endswith((".linear.weight", "_head.weight", "image_tower.1.weight"))
        assert decay == (0.3 if matrix else 0.0), name
        factor = {"logit_scale": 0.1, "logit_bias": 0.1, "image_tower": 0.5}.get(name.partition(".")[0], 1.0)
        assert lr == pytest.approx(2.0 * factor), name


def test_the_plan():
    config = load(None, ["train.epochs=2.5", "train.global_batch_size=64", "execution.micro_batch_size=10"])
    plan = make_plan(config, 100, 2)
    assert (plan.total_steps, plan.total_samples, plan.local_batch_size) == (4, 256, 32)
    assert (plan.micro_batch_sizes, plan.micro_batches) == ((10, 10), 4)
    other = load(None, ["train.samples=64", "train.global_batch_size=64", "execution.text_micro_batch_size=100"])
    plan = make_plan(other, 16, 1)
    assert (plan.total_steps, plan.micro_batch_sizes, plan.micro_batches) == (1, (64, 64), 1)
    assert "a global batch holds 4.0 epochs" in str(plan)
    each = load(None, ["train.samples=64", "train.global_batch_size=64", "execution.micro_batch_size=16",
                       "execution.text_micro_batch_size=32"])  # fmt: skip
    assert make_plan(each, 16, 1).micro_batches == 4 + 2


def test_where_a_run_is_after_a_step():
    """A step of samples 64 .. 127 has the rate of sample 96, and the run has seen 128 samples then."""
    words = ["train.samples=256", "train.global_batch_size=64", "optimizer.lr=2.0", "optimizer.warmup_samples=128"]
    plan = make_plan(load(None, words), 100, 1)
    places = [plan.position(step) for step in (1, 2, 3, 4)]
    assert [(one.samples, one.epoch, one.last) for one in places] == [
        (64, 0.64, False), (128, 1.28, False), (192, 1.92, False), (256, 2.56, True)
    ]  # fmt: skip
    falling = [1 + math.cos(math.pi * share) for share in (0.25, 0.75)]
    assert [one.lr for one in places] == pytest.approx([0.5, 1.5, *falling])
    for every, reached in ((100, [2, 4]), (64, [1, 2, 3, 4]), (10, [1, 2, 3, 4]), (192, [3]), (256.5, [])):
        assert [one.step for one in places if plan.reaches(one, every)] == reached


def test_operations_per_second():
    rates = Throughput(2, ModelFlops(100, 50), 0.5, 1.0, 0.0, peak=10_000.0).record(20.0)
    assert rates["samples_per_second_per_rank"] == 10
    assert rates["mfu"] == pytest.approx(10 * 3 * 150 / 10_000)
    assert rates["hfu"] == pytest.approx(10 * (3 * 150 + 75 + 100) / 10_000)
    assert "mfu" not in Throughput(1, ModelFlops(1, 1), 0, 0, 0, peak=None).record(1.0)


def test_every_launcher_is_recognised():
    assert read_rank_info({}) == RankInfo(0, 0, 1, 1)
    torchrun = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    assert read_rank_info(torchrun) == RankInfo(5, 1, 8, 4)
    srun = {
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    }
    assert read_rank_info(srun) == RankInfo(5, 1, 8, 4)
    batch_script = {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}  # no step: plain python in a batch script is one rank
    assert read_rank_info(batch_script) == RankInfo(0, 0, 1, 1)
    with pytest.raises(UserError, match="environment: the launcher's variables do not fit together"):
        read_rank_info({"RANK": "x", "WORLD_SIZE": "8"})


@pytest.mark.parametrize("port", ["", "port", "-1", "29500.0", "65536"])
def test_a_port_that_is_none(monkeypatch, port):
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "0" if "RANK" in name else "1")  # to be as before afterwards
    with pytest.raises(UserError, match=f"^MASTER_PORT: expected the number of a port, at most 65535, got '{port}'"):
        export(RankInfo())
    monkeypatch.setenv("MASTER_PORT", "65535")
    export(RankInfo())
