"""What a study starts in place of launch/train.py, in tests of the runner: a run folder in milliseconds.

    python fake_training.py RUN_FOLDER RECIPE_HASH HOW

HOW   done      trains and ends well
      slow      takes until somebody ends it; saves on SIGTERM as a run does (exit code 75)
      stubborn  takes no notice of SIGTERM
      fails     ends with 1, always
      once      ends with 1 the first time
      early     ends with 75 the first time
      mistake   ends with 2
      meets     ends well once another cell is running, with 1 when none comes
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

folder, recipe_hash, how = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
folder.mkdir(parents=True, exist_ok=True)
started = folder / "started"
first = not started.exists()
with started.open("a") as file:
    file.write(f"{os.getpid()} {time.time()}\n")
(folder / "config.yaml").write_text(f"# recipe {recipe_hash}\n")
print(f"training in {folder.name}, {how}", flush=True)


def save(*_: object) -> None:
    (folder / "saved").touch()
    sys.exit(75)


if how == "slow" and first:
    signal.signal(signal.SIGTERM, save)
if how == "stubborn" and first:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
(folder / "ready").touch()
if how in ("slow", "stubborn") and first:
    time.sleep(60)
if how == "meets":
    until = time.monotonic() + 120
    while len(list(folder.parent.glob("*/ready"))) < 2 and time.monotonic() < until:
        time.sleep(0.02)
    if time.monotonic() >= until:
        sys.exit(1)
if how == "fails" or (how == "once" and first):
    print("the reason, in the last line", flush=True)
    sys.exit(1)
if how == "early" and first:
    sys.exit(75)
if how == "mistake":
    sys.exit(2)
time.sleep(0.2)
records = [{"step": step, "samples": 32 * step, "samples_per_second": 100.0 * step} for step in range(1, 7)]
(folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
(folder / "evaluation.json").write_text("{}")
