"""Kill a training run again and again, resume it each time, and compare it with the run that nobody killed.

    python tools/kill_test.py --kills 30

The run is two ranks of the quickstart with per-sample state, a checkpoint every few steps, written beside training.
It is killed with signal 9: one of its ranks or the launcher, at random moments, and about every other time while a
checkpoint is being written. Then the same command starts again with resume=auto. In the end the losses of all steps,
the weights, the optimizer's states, the per-sample state and the evaluation must equal the uninterrupted run's bit for
bit. Prints a JSON summary; exit code 1 where anything differs.
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[1]
BATCH = 32
EVERY = 3  # steps between two checkpoints
PATIENCE = 180.0  # seconds for a run to take its next step, or to be gone


@dataclass
class Tally:
    """What happened to the run."""

    victims: list[str] = field(default_factory=list)
    in_save: int = 0
    steps_lost: list[int] = field(default_factory=list)
    seconds_to_resume: list[float] = field(default_factory=list)
    seconds_to_end: list[float] = field(default_factory=list)


def launch(folder: Path, name: str, steps: int, ranks: int, words: list[str]) -> subprocess.Popen[bytes]:
    """Start the run, or go on with it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launcher = Path(sys.executable).parent / "deepspeed"
    command = [str(launcher), "-q", "--num_gpus", str(ranks), "--master_port", port, "launch/train.py"]
    command += [
        "--config", "configs/quickstart.yaml", "objective.name=isogclr", "train.epochs=null",
        f"train.samples={steps * BATCH}", f"train.global_batch_size={BATCH}", "evaluation.splits=[emoji/val_concept]",
        "evaluation.every_samples=null", "evaluation.resamples=0", "run.log_every_steps=1", "execution.threads=1",
        f"run.folder={folder}", f"run.name={name}", f"checkpoint.every_samples={EVERY * BATCH}", "resume=auto", *words,
    ]  # fmt: skip
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{launcher.parent}{os.pathsep}{environment['PATH']}"
    with (folder / f"{name}.log").open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def last_step(run: Path) -> int:
    """The last step in metrics.jsonl."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return 0
    steps = [0]
    for line in lines:
        try:
            steps.append(int(json.loads(line)["step"]))
        except ValueError:  # half a line
            continue
    return max(steps)


def processes(launcher: subprocess.Popen[bytes]) -> dict[str, psutil.Process]:
    """The run's processes that may be killed: `launcher` (of this node), `rank 0`, `rank 1`, ..."""
    found = {}
    for process in psutil.Process(launcher.pid).children(recursive=True):
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        local = [word.partition("=")[2] for word in words if word.startswith("--local_rank")]
        if "deepspeed.launcher.launch" in words:
            found["launcher"] = process
        elif local and local[0] not in {name.removeprefix("rank ") for name in found}:
            found[f"rank {local[0]}"] = process
    return found


def wait_until(
    condition: Callable[[], bool], launcher: subprocess.Popen[bytes], what: str, every: float = 0.02
) -> bool:
    """Wait for something; False when the run ended first."""
    began = time.monotonic()
    while not condition():
        if launcher.poll() is not None:
            return False
        if time.monotonic() - began > PATIENCE:
            raise TimeoutError(f"{what}: nothing for {PATIENCE} s")
        time.sleep(every)
    return True


def kill_once(folder: Path, args: argparse.Namespace, number: int, tally: Tally) -> bool:
    """Start the run, kill it at a random moment, wait until all of it is gone. False: it came to its end instead."""
    run, before = folder / "killed", last_step(folder / "killed")
    steps_kept = [int(path.name.removeprefix("step_")) for path in run.glob("checkpoints/step_*")]
    resumed = max(steps_kept, default=0)
    began = time.monotonic()
    launcher = launch(folder, "killed", args.steps, args.ranks, args.words)
    victim = random.choice([*(f"rank {rank}" for rank in range(args.ranks)), "launcher"])
    if number % 5 == 4:  # while it starts
        time.sleep(random.uniform(0.5, 8))
        during = False
    else:
        log, size = folder / "killed.log", (folder / "killed.log").stat().st_size
        stepping = f"step {resumed + 1:>6}/".encode()
        if not wait_until(lambda: stepping in log.read_bytes()[size:], launcher, "first step"):
            raise RuntimeError(f"it ended by itself before step {resumed + 1}; see {log}")
        if before:
            tally.steps_lost.append(before - resumed)
            tally.seconds_to_resume.append(round(time.monotonic() - began, 2))
        time.sleep(random.uniform(0, 1.5))
        during = number % 2 == 0
    everyone = processes(launcher)
    if during and not wait_until(lambda: any(run.glob("checkpoints/.writing_*")), launcher, "a save", 0.0005):
        return False
    if victim not in everyone:  # so early that there is nobody but the command itself
        victim, everyone["deepspeed"] = "deepspeed", psutil.Process(launcher.pid)
    target = everyone[victim]
    try:
        target.send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        return False
    killed_at = time.monotonic()
    inside = during and any(run.glob("checkpoints/.writing_*"))
    _, alive = psutil.wait_procs(list(everyone.values()), timeout=PATIENCE)
    if alive:
        raise RuntimeError(f"{len(alive)} processes are still there {PATIENCE} s after {victim} was killed")
    tally.seconds_to_end.append(round(time.monotonic() - killed_at, 2))
    if launcher.poll() is None:
        launcher.wait(PATIENCE)
    if (run / "evaluation.json").exists():  # (not the exit code: deepspeed's is 0 when its launcher is killed)
        return False
    tally.victims.append(victim)
    tally.in_save += inside
    return True


def compare(folder: Path) -> list[str]:
    """What differs between the two runs."""
    whole, killed = folder / "whole", folder / "killed"
    found = []

    def records(run: Path, key: str) -> list[tuple[int, object]]:
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        return [(line["step"], line[key]) for line in lines if key in line]

    for key in ("loss", "grad_norm", "lr", "logit_scale"):
        if records(whole, key) != records(killed, key):
            found.append(f"metrics.jsonl: {key}")
    if json.loads((whole / "evaluation.json").read_text()) != json.loads((killed / "evaluation.json").read_text()):
        found.append("evaluation.json")
    checkpoint = Path("checkpoints") / (whole / "checkpoints" / "latest").read_text().strip()
    names = [checkpoint / path.name for path in (whole / checkpoint).glob("*.safetensors")]
    for name in [Path("weights.safetensors"), Path("objective.safetensors"), *names]:
        mine, other = load_file(whole / name), load_file(killed / name)
        if mine.keys() != other.keys() or any(mine[key].tobytes() != other[key].tobytes() for key in mine):
            found.append(str(name))
    return found


def main(argv: list[str]) -> int:
    """Run, kill, resume, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, help="of the run; default: enough for so many kills")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and victims")
    parser.add_argument("--folder", type=Path, help="where the runs are kept; default: a temporary folder")
    parser.add_argument("words", nargs="*", metavar="key=value", help="further configuration of both runs")
    args = parser.parse_intermixed_args(argv)
    args.steps = args.steps or 40 + 25 * args.kills
    random.seed(args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("whole", "killed"):
            (folder / f"{name}.log").touch()
        if launch(folder, "whole", args.steps, args.ranks, args.words).wait() != 0:
            print((folder / "whole.log").read_text()[-3000:], file=sys.stderr)
            return 1
        tally, number = Tally(), 0
        while len(tally.victims) < args.kills:
            if not kill_once(folder, args, number, tally):
                break
            number += 1
        code = launch(folder, "killed", args.steps, args.ranks, args.words).wait()
        if code != 0:
            print((folder / "killed.log").read_text()[-3000:], file=sys.stderr)
            return 1
        different = compare(folder)
    survived = {"kills": len(tally.victims), "asked": args.kills, **vars(tally), "different": different}
    print(json.dumps(survived))
    return 1 if different or len(tally.victims) < args.kills else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
