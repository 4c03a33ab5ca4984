"""Study folders with known truth, as launch/study.py would leave them: real configurations, made-up scores."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from amclr_scale.config.load import dump, load, recipe_hash
from amclr_scale.evaluation.items import FILE, save_items
from amclr_scale.evaluation.numbers import number
from amclr_scale.evaluation.run import flatten
from amclr_scale.study.planning.cells import base_tree, make_cells
from amclr_scale.study.planning.load import load_plan
from amclr_scale.study.planning.plan import RANKS
from amclr_scale.study.running.corpora import check_corpora, keep_corpora
from amclr_scale.study.running.folder import StudyFolder

SPLIT = "emoji/val_style"
KEYS = [f"{SPLIT}/image_to_text_R@1", f"{SPLIT}/text_to_image_R@1"]
ITEMS = 300
SAMPLES = 8192

# Truth: score at B = 128, what a doubling of B adds, words, label, encoder cost.
ARMS: dict[str, tuple[float, float, tuple[str, ...], str, float]] = {
    "clip": (0.30, 0.04, ("objective.name=clip",), "CLIP", 1.0),
    "dcl": (0.36, 0.02, ("objective.name=dcl",), "DCL", 1.0),
    "sogclr_gamma1": (0.36, 0.02, ("objective.name=sogclr", "objective.gamma=1.0"), "SogCLR, gamma 1", 1.0),
    "sogclr": (0.37, 0.02, ("objective.name=sogclr", "objective.gamma=0.8"), "SogCLR", 1.0),
    "amclr": (
        0.45,
        0.0,
        ("objective.name=amclr", "objective.reduce=mean", "data.image_views=1", "data.text_views=1"),
        "AmCLR",
        2.0,
    ),
}


def make_study(
    folder: Path,
    *,
    arms: Sequence[str] = tuple(ARMS),
    batches: Sequence[int] = (128, 256, 512),
    seeds: Sequence[int] = (0, 1, 2),
    axes: Mapping[str, Sequence[Any]] | None = None,
    shift: Mapping[tuple[str, Any], float] | None = None,
    held_equal: str = "samples",
    failed: Sequence[str] = (),
    unfinished: Sequence[str] = (),
    items: bool = True,
    curves: bool = False,
    noise: float = 0.01,
    margin: float = 0.02,
    words: Mapping[str, Sequence[str]] | None = None,
    like: Mapping[str, str] | None = None,
    probe: bool = False,
    tuning_seeds: Sequence[int] = (),
    chosen: float | None = None,
    validation: str = "emoji/val_concept/R@mean",
) -> Path:
    """Write one.

    Args:
        axes: further axes for all arms.
        shift: what a value of an axis adds to the score.
        failed, unfinished: cells without a result.
        items: whether what was measured per item is kept.
        curves: whether the runs were evaluated while they trained, and logged diagnostics.
        noise: standard deviation of a run's score.
        words: further overrides of an arm's configuration.
        like: the known arms that arms began as.
        probe: whether the runs logged the probe (`run.probe`); `probed` says what.
        tuning_seeds: seeds that choose a learning rate; the others are then scored at the `chosen` one alone.
        validation: what the rate is chosen by.
    """
    folder.mkdir(parents=True)
    values = [{}] if not axes else [{key: value} for key, listed in axes.items() for value in listed]
    cells, attempts = [], []
    clock = 1_700_000_000.0
    for arm in arms:
        truth, slope, own, label, cost = ARMS[arm]
        for batch in batches:
            for axis in values:
                tuned = bool(tuning_seeds) and "optimizer.lr" in axis
                scored = () if tuned and axis["optimizer.lr"] != chosen else seeds
                for seed in (*(tuning_seeds if tuned else ()), *scored):
                    end = "".join(f"-{key.rpartition('.')[2]}{value}" for key, value in axis.items())
                    name = f"{arm}-B{batch}-s{seed}{end}"
                    overrides = [
                        *own, *(words or {}).get(arm, ()), f"train.global_batch_size={batch}", f"seed={seed}",
                        f"train.samples={SAMPLES}",
                        *(f"{key}={json.dumps(value)}" for key, value in axis.items() if key != RANKS),
                    ]  # fmt: skip
                    config = load("configs/quickstart.yaml", overrides, 1)
                    cells.append({
                        "cell": name, "arm": arm, "label": label, "global_batch_size": batch, "seed": seed,
                        "axes": axis, "recipe_hash": recipe_hash(config), "words": overrides, "samples": SAMPLES,
                        "steps": SAMPLES // batch, "epochs": 1.66, "lr": config.optimizer.lr, "encoder_cost": cost,
                        "negatives": batch - 1, "comparisons": int(batch - 1) * (4 if cost > 1 else 1), "flops": None,
                        "role": "tuning" if seed in tuning_seeds else "scored",
                    })  # fmt: skip
                    clock += 60
                    attempt = {"cell": name, "started": clock, "seconds": 36.0 * cost}
                    if name in failed:
                        attempts.append(
                            {**attempt, "exit_code": 1, "status": "failed", "message": "step 3: loss is <nan> | `x`"}
                        )
                        continue
                    if name in unfinished:
                        continue
                    attempts.append({**attempt, "exit_code": 0, "status": "done", "message": ""})
                    rng = np.random.default_rng([seed, batch, sum(map(ord, arm))])
                    if arm == "sogclr_gamma1":  # the same mathematics, up to rounding
                        rng = np.random.default_rng([seed, batch, sum(map(ord, "dcl"))])
                    score = truth + slope * np.log2(batch / batches[0]) + rng.normal(0, noise)
                    score += sum((shift or {}).get((key, value), 0.0) for key, value in axis.items())
                    run = folder / "runs" / name
                    run.mkdir(parents=True)
                    resolved = dump(config)
                    if probe:
                        tree = yaml.safe_load(resolved)
                        tree["run"]["probe"] = {"samples": 2048, "every_samples": None}
                        resolved = yaml.safe_dump(tree, sort_keys=False)
                    (run / "config.yaml").write_text(f"# recipe {recipe_hash(config)}\n{resolved}")
                    ranks = axis.get(RANKS, 1)
                    surroundings = {"device": "cpu", "host": "here", "ranks": ranks, "commit": "abc", "packages": {}}
                    (run / "environment.json").write_text(json.dumps(surroundings))
                    _write_results(run, score, rng, items)
                    _write_records(run, batch, score, throughput(cost, ranks, seed), curves)
                    if probe:
                        _write_probe(run, arm, batch, seed)
    named = [{"name": arm, "like": (like or {}).get(arm)} for arm in arms]
    plan = {"name": "synthetic", "question": "Does it add up?", "margin": margin, "arms": named}
    (folder / "study.yaml").write_text(yaml.safe_dump(plan))
    (folder / "attempts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in attempts) + '{"cell": "cut o')
    listed = {
        "plan": "synthetic", "held_equal": held_equal, "metrics": [{"name": "R@1, both ways", "keys": KEYS}],
        "margin": margin, "reference": {"arm": "clip", "global_batch_size": max(batches)}, "cells": cells,
        "tuning": {"seeds": list(tuning_seeds), "metric": validation} if tuning_seeds else None,
    }  # fmt: skip
    (folder / "cells.json").write_text(json.dumps(listed))
    return folder


def _write_results(run: Path, score: float, rng: np.random.Generator, items: bool) -> None:
    """Hits of fixed, unequally hard items whose share is the score."""
    hardness = np.random.default_rng(99).permutation(ITEMS)
    numbers = {}
    for key in KEYS:
        hits = torch.from_numpy((hardness < round(score * ITEMS)).astype(float))
        numbers[key.rpartition("/")[2]] = number(hits, chance=1 / ITEMS)
    numbers["R@mean"] = number(torch.full((ITEMS,), 0.5))
    results = flatten(SPLIT, numbers, {"images": float(ITEMS)}, resamples=0) | {"emoji/val_concept/R@mean": score / 2}
    (run / "evaluation.json").write_text(json.dumps(results))
    if items:
        save_items(run / FILE, {SPLIT: numbers})


def throughput(cost: float, ranks: int, seed: int) -> float:
    """Samples per second: ranks lose a little each, and seeds differ where there are several ranks."""
    return 400 / cost * ranks**0.8 * (1 + 0.01 * seed * (ranks - 1))


def _write_records(run: Path, batch: int, score: float, rate: float, curves: bool) -> None:
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(8, SAMPLES // batch + 1, 8):
            seen = step * batch
            record = {
                "step": step, "samples": seen, "objective/objective": 3 * 0.9**step, "loss": 1.0,
                "peak_memory_gib": 0.5 + batch / 1024, "samples_per_second": rate,
                "samples_per_second_per_rank": rate, "useful_tflops_per_rank": 0.02,
            }  # fmt: skip
            if curves:
                record["diagnostics/estimator_error"] = 1 / step
            file.write(json.dumps(record) + "\n")
            if curves:
                evaluated = {f"eval/{key}": score * seen / SAMPLES for key in KEYS}
                file.write(json.dumps({"step": step, "samples": seen, **evaluated}) + "\n")


def probed(arm: str, batch: int, seed: int, samples: int) -> dict[str, float | None]:
    """What a run logs of the probe: averages that come nearer, gradients that are nearer at larger batches."""
    share = samples / SAMPLES
    gradient: dict[str, float | None] = {
        "probe/gradient_cosine": 1 - (1 + seed / 10) / batch, "probe/gradient_norm_ratio": 1 + 10 / batch,
        "probe/expected_gradient_cosine": 1 - 0.5 / batch,
        "probe/expected_gradient_norm_ratio": None if batch == 128 else 1.0,  # left out where estimates contradict
        "probe/drift_image": None if samples == 2048 else 0.3 * (1 - share),  # the first has nothing before it
        "probe/drift_text": None if samples == 2048 else 0.2 * (1 - share),
    }  # fmt: skip
    if arm not in ("sogclr", "amclr"):
        return gradient
    error = 64 / batch * 0.01**share * (1 + seed / 10)
    return {"probe/estimator_error": error, "probe/estimator_error_p90": 3 * error,
            **{f"probe/estimator_error_age_{k}": error * k for k in range(1, 11)},
            "probe/estimator_log_ratio": -error / 2, "probe/estimator_visited": share, **gradient}  # fmt: skip


def _write_probe(run: Path, arm: str, batch: int, seed: int) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        for samples in range(2048, SAMPLES + 1, 2048):
            record = {"step": samples // batch, "samples": samples, **probed(arm, batch, seed, samples)}
            file.write(json.dumps(record) + "\n")


def begin(file: Path, words: Sequence[str]) -> Path:
    """The run folder of the first cell of a plan, which is at work."""
    plan = load_plan(file, words)
    folder, cells = StudyFolder(plan.place), make_cells(plan, base_tree(plan), 8.0)
    folder.write(plan, base_tree(plan), cells)
    keep_corpora(folder, check_corpora(plan, folder, cells))
    run = folder.runs / cells[0].name
    run.mkdir()
    (run / "config.yaml").write_text(f"# recipe {cells[0].recipe_hash}\n")
    return run
