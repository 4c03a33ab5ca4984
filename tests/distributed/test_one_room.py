"""Knowledge of launchers and ports lies in `amclr_scale/distributed` alone; messages say what they are for."""

import ast
from pathlib import Path

import torch

from amclr_scale.distributed.collectives import all_sum, gather
from amclr_scale.distributed.purpose import STATISTICS, current_purpose, purpose
from amclr_scale.planner.messages import MessageCounter

PACKAGE = Path(__file__).parents[2] / "amclr_scale"
LAUNCHERS_SAY = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def strings(path: Path) -> set[str]:
    text = path.read_text()
    if not any(word in text for word in (*LAUNCHERS_SAY, "SLURM_")):
        return set()
    return {
        node.value
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def test_nobody_else_reads_what_launchers_say():
    elsewhere = [path for path in PACKAGE.rglob("*.py") if path.parent.name != "distributed"]
    assert len(elsewhere) > 100
    readers = {
        str(path.relative_to(PACKAGE)): found
        for path in elsewhere
        if (found := {s for s in strings(path) if s in LAUNCHERS_SAY or (s.startswith("SLURM_") and s.isupper())})
    }
    assert readers == {}


def test_a_purpose_holds_inside_its_block():
    assert current_purpose() == STATISTICS
    with purpose("features"):
        with purpose("moments"):
            assert current_purpose() == "moments"
        assert current_purpose() == "features"
    assert current_purpose() == STATISTICS


class _Labelled(MessageCounter):
    def purpose(self) -> str:
        return current_purpose()


def labels() -> list[tuple[str, str]]:
    x = torch.ones(2, 3, requires_grad=True)
    with _Labelled() as counted:
        with purpose("features"):
            y = gather(x)
        (all_sum(y.sum()) * 2).backward()
    return [(message.collective, message.purpose) for message in counted.messages.found]


def test_backward_is_for_what_forward_was_for(ranks):
    for found in ranks(2, labels):
        assert [collective for collective, _ in found] == ["all_gather", "all_reduce", "all_reduce", "all_to_all"]
        assert [words for _, words in found] == ["features", STATISTICS, STATISTICS, "features"]
