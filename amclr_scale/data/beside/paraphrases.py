"""Paraphrases beside a shard: NAME.paraphrases.jsonl, in one folder for all shards of a data set.

The first line says what the paraphrases are of and where they come from; line 1 + r is the JSON list of row r. So
shards are never rewritten, a reader needs the place of each line only, and paraphrases of another shard are refused.
"""

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

from amclr_scale.data.formats.members import ChangedShardError
from amclr_scale.data.indexes.entries import Shard
from amclr_scale.errors import UserError


def paraphrase_file(folder: Path, shard: Shard) -> Path:
    """Where the paraphrases of a shard are."""
    name = shard.url.rstrip("/").rsplit("/", 1)[-1]
    return folder / f"{name.split('.tar')[0].removesuffix('.tgz')}.paraphrases.jsonl"


def write_paraphrases(folder: Path, shard: Shard, origin: dict[str, Any], rows: list[list[str]]) -> None:
    """Write one shard's file, whole or not at all."""
    assert len(rows) == shard.num_samples
    path = paraphrase_file(folder, shard)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    lines = [json.dumps({"digest": shard.digest, **origin}), *(json.dumps(row) for row in rows)]
    partial.write_text("\n".join(lines) + "\n", "utf-8")
    partial.replace(path)


class ParaphraseReader:
    """One shard's paraphrases, by row.

    Raises:
        UserError: there are none, or they are of another shard.
    """

    def __init__(self, folder: Path, shard: Shard):
        self.path = paraphrase_file(folder, shard)
        try:
            content = self.path.read_bytes()
            origin = json.loads(content.split(b"\n", 1)[0])
        except (OSError, ValueError) as error:
            raise UserError(
                f"data.paraphrases: {self.path}: expected paraphrases of {shard.url}, got {error}; "
                "amclr-scale shards paraphrase writes them"
            ) from error
        ends = [i for i, byte in enumerate(content) if byte == ord("\n")]
        if origin.get("digest") != shard.digest or len(ends) != shard.num_samples + 1:
            raise ChangedShardError(f"data.paraphrases: {self.path}: these are paraphrases of another {shard.url}")
        self._places = [(a + 1, b) for a, b in pairwise(ends)]
        self._file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, row: int) -> bytes:
        """The JSON list of a row."""
        start, end = self._places[row]
        return os.pread(self._file, end - start, start)

    def close(self) -> None:
        os.close(self._file)
