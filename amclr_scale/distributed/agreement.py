"""What has to be the same on every rank, compared before anything is trained on it.

A rank with another learning rate, other data or another version of the code takes part in every collective as if
nothing were wrong, and the run ends with a model that no recipe describes. So each rank brings what it goes by, as
named facts. Their digests are gathered; only where those differ are the facts themselves.
"""

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from amclr_scale.distributed.launcher import where
from amclr_scale.distributed.process_group import broadcast_object, gather_objects
from amclr_scale.errors import AgreedError

SHOWN = 20  # facts that a message names; further ones are counted
NOTHING = "nothing"


def check_agreement(facts: Mapping[str, Any]) -> None:
    """Refuse to go on where two ranks differ. All ranks call it together.

    Args:
        facts: what can be written as JSON, by the key to change where it differs.

    Raises:
        AgreedError: on every rank; for each key that differs, who has what.
    """
    mine = {key: json.dumps(value, sort_keys=True, ensure_ascii=False) for key, value in facts.items()}
    digest = hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest()
    if len(set(gather_objects(digest))) == 1:
        return
    first = broadcast_object(mine)
    other = {key: mine.get(key, NOTHING) for key in {**first, **mine} if mine.get(key) != first.get(key)}
    everyone = gather_objects((platform.node(), other))
    raise AgreedError("\n".join(_differences(first, everyone)))


def _differences(first: Mapping[str, str], everyone: Sequence[tuple[str, Mapping[str, str]]]) -> list[str]:
    """One line for each key.

    Args:
        first: rank 0's facts.
        everyone: of each rank its host, and where its facts are others.
    """
    hosts = [host for host, _ in everyone]
    keys = dict.fromkeys(key for _, other in everyone for key in other)
    lines = []
    for key in keys:
        holders: dict[str, list[int]] = {}
        for rank, (_, other) in enumerate(everyone):
            holders.setdefault(other.get(key, first.get(key, NOTHING)), []).append(rank)
        got = ", ".join(f"{value} on {where(ranks, hosts)}" for value, ranks in holders.items())
        lines.append(f"{key}: expected the same on all ranks, got {got}")
    more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return [*lines[:SHOWN], *more, "start every node with the same command, code and data"]
