"""Records of long runs: they are drawn and cut in seconds, with little memory."""

import json
import time
import tracemalloc

import pytest

from amclr_scale.metrics import curve
from amclr_scale.metrics.run_folder import DROPPED, METRICS, drop_records_after

LINES = 200_000


def line(step, **keys):
    numbers = {"step": step, "samples": 64 * step, "objective/objective": 1 / step, "note": "x" * 200}
    return json.dumps({**numbers, **keys}) + "\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Lines of one length each, made once for each thousand: what is read does not depend on what they say."""
    folder = tmp_path_factory.mktemp("run")
    with (folder / METRICS).open("w") as file:
        for thousand in range(LINES // 1000):
            file.write(line(1000 * thousand + 1) * 999)
            file.write(line(1000 * thousand + 1, **{"eval/a": 0.5}))
    return folder


@pytest.mark.slow
def test_records_in_seconds_and_little_memory(run):
    began = time.monotonic()
    tracemalloc.start()
    records = curve.read(run)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.monotonic() - began < 20
    assert peak < 20 << 20
    assert sum("eval/a" in record for record in records) == LINES // 1000
    assert curve.POINTS * 0.9 < len(records) < curve.POINTS * 1.2 + LINES // 1000
    assert (records[0]["step"], records[-1]["step"]) == (1, LINES - 999)


def test_the_end_is_found_from_behind(run):
    began, size = time.monotonic(), (run / METRICS).stat().st_size
    drop_records_after(run, LINES - 1000)
    assert time.monotonic() - began < 2
    assert len((run / DROPPED).read_bytes().splitlines()) == 1000
    assert (run / DROPPED).stat().st_size + (run / METRICS).stat().st_size == size
    drop_records_after(run, LINES)
    assert len((run / DROPPED).read_bytes().splitlines()) == 1000


@pytest.mark.parametrize(
    "tail", ["", '{"step": 4, "lo', '{"step": 2}', "\n\n", "[3]\n", "\udc80\n", line(9) * 3, "x" * 200_000],
    ids=range(8),
)  # fmt: skip
def test_whatever_a_killed_run_left(tmp_path, tail):
    kept = line(1) + line(2) + '{"checkpoint/bytes": 3, "step": 2}\n'
    (tmp_path / METRICS).write_text(kept + tail, "utf-8", "surrogateescape")
    drop_records_after(tmp_path, 2)
    whole = tail == '{"step": 2}'
    assert (tmp_path / METRICS).read_text() == kept + (f"{tail}\n" if whole else "")
    dropped = (tmp_path / DROPPED).read_bytes() if (tmp_path / DROPPED).exists() else b""
    assert dropped == b"" if whole or not tail else dropped.endswith(b"\n")


def test_an_empty_file_and_none(tmp_path):
    drop_records_after(tmp_path, 0)
    (tmp_path / METRICS).write_text("")
    drop_records_after(tmp_path, 0)
    (tmp_path / METRICS).write_text(line(3))
    drop_records_after(tmp_path, 0)
    assert (tmp_path / METRICS).read_text() == ""
    assert (tmp_path / DROPPED).read_text() == line(3)
