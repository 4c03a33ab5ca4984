"""Rows that each rank has written apart: any number of ranks reads them, and from as few files as can be."""

from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from amclr_scale import objectives
from amclr_scale.checkpoint import state
from amclr_scale.checkpoint.rows import StoredRows
from amclr_scale.evaluation.temperatures import read_temperatures
from amclr_scale.objectives import sample_state
from amclr_scale.objectives.banks.bank import Bank
from amclr_scale.objectives.table import ROWS, own_rows, rows_apart, whole_on_first


class Part:
    """What safetensors gives of a tensor before it is read."""

    def __init__(self, rows):
        self.rows, self.reads = rows, 0

    def get_shape(self):
        return list(self.rows.shape)

    def __getitem__(self, where):
        self.reads += where == slice(None)
        return self.rows[where]


def stored(whole, ranks):
    parts = [Part(whole[rank::ranks]) for rank in range(ranks)]
    return StoredRows("x", parts), parts


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8, 24])
def test_any_number_of_ranks_reads_its_own(ranks):
    for total in (1, 5, 23, 48, 100):
        whole = torch.arange(3 * total).view(total, 3)
        rows, _ = stored(whole, ranks)
        assert rows.shape == whole.shape
        for others in (1, 2, 3, 4, 5, 6, 8, 16):
            for rank in range(others):
                assert torch.equal(rows[rank::others], whole[rank::others]), (total, others, rank)


@pytest.mark.parametrize(
    ("ranks", "others", "files"), [(1024, 64, 16), (64, 1024, 1), (64, 64, 1), (96, 64, 3), (8, 1, 8)]
)
def test_a_rank_reads_few_files(ranks, others, files):
    rows, parts = stored(torch.arange(5000), ranks)
    assert torch.equal(rows[others - 1 :: others], torch.arange(5000)[others - 1 :: others])
    assert [part.reads for part in parts if part.reads] == [1] * files


@pytest.mark.parametrize("lengths", [(3, 5), (4, 4, 5), (5, 3), (0, 1)])
def test_rows_that_make_up_no_table_are_refused(lengths):
    with pytest.raises(ValueError, match="make up no table"):
        StoredRows("x", [Part(torch.zeros(n)) for n in lengths])
    with pytest.raises(ValueError, match="make up no table"):
        StoredRows("x", [Part(torch.zeros(4, 2)), Part(torch.zeros(4, 3))])
    with pytest.raises(ValueError, match="no rows"):
        StoredRows("x", [Part(torch.tensor(1.0))])


def filled(layout):
    """An objective whose every row is another number."""
    made = objectives.create("isogclr", num_samples=11, sample_state=layout)
    for table in (made.image_state, made.text_state):
        shards, shard = table.shards
        for k, name in enumerate(table.columns):
            rows = torch.arange(shard, shards * len(getattr(table, name)), shards)
            getattr(table, name).copy_(rows + 100.0 * k)
    return made


def saved_by(rank_count, folder):
    """What a rank of some saves in each way, and how many rows it has held of one table."""
    made = filled("sharded")
    rank = made.image_state.shards[1]
    engine = SimpleNamespace(global_rank=rank, world_size=rank_count)
    with mock.patch.object(state.pieces, "collect", return_value=({}, {"shapes": {}})):
        snapshot = state.take(engine, made, {"step": 1}, torch.device("cpu"))
    with mock.patch.object(sample_state, "AT_ONCE", 4):  # less than there are
        with whole_on_first():
            first = made.state_dict()
        everywhere = made.state_dict()
    with rows_apart():
        apart = made.state_dict()
    save_file(snapshot.tensors, Path(folder) / state.file_of(rank))
    return snapshot.tensors, snapshot.shared, first, everywhere, apart


def test_no_rank_holds_the_rows_of_others(ranks, tmp_path):
    whole = filled("replicated").state_dict()
    saved = ranks(2, saved_by, 2, str(tmp_path))
    for rank, (tensors, shared, first, everywhere, apart) in enumerate(saved):
        own = {name: tensors[ROWS + name] for name in whole if ROWS + name in tensors}
        assert len(own) == 2 * len({name.partition(".")[2] for name in own}) > 2
        for name, rows in own.items():
            assert torch.equal(rows, whole[name][rank::2])
            assert torch.equal(everywhere[name], whole[name])
            assert (name in first) == (rank == 0)
            assert name not in apart
        assert not any(name in part for part in shared.values() for name in own)
    assert all(torch.equal(saved[0][2][name], whole[name]) for name in own)
    # The temperatures of a checkpoint are those of its ranks' files.
    save_file(whole, tmp_path / "whole.safetensors")
    (tmp_path / "apart").mkdir()
    for rank in range(2):
        (tmp_path / state.file_of(rank)).rename(tmp_path / "apart" / state.file_of(rank))
    want = read_temperatures(tmp_path / "whole.safetensors")
    assert read_temperatures(tmp_path / "apart" / state.OBJECTIVE) == want != {}
    assert load_file(tmp_path / "apart" / state.file_of(1)).keys() >= {ROWS + name for name in own}


def test_what_is_not_cut_is_saved_whole():
    made = filled("replicated")
    assert own_rows(made) == {}
    with rows_apart():
        assert len(made.state_dict()) == len(filled("replicated").state_dict())


def bank_saved(folder):
    """A sharded bank's rows of this rank, its state without them, and all of them."""
    bank = Bank(7, layout="sharded")
    bank.make(4)
    rank = bank.shards[1]
    bank.features.copy_(torch.arange(28.0).view(7, 4)[rank::2])
    bank.ids.copy_(torch.arange(7)[rank::2])
    bank.filled, bank.steps = 7, 3
    with rows_apart():
        apart = bank.state_dict()
    with whole_on_first():
        first = bank.state_dict()
    return own_rows(bank), apart, first, bank.state_dict()


def test_banks_are_saved_so_too(ranks, tmp_path):
    saved = ranks(2, bank_saved, str(tmp_path))
    whole = saved[0][3]
    assert torch.equal(whole["features"], torch.arange(28.0).view(7, 4))
    for rank, (own, apart, first, _) in enumerate(saved):
        assert own.keys() == {"features", "ids", "written"}
        assert not own.keys() & apart.keys()
        assert ("features" in first) == (rank == 0)
        assert all(torch.equal(rows, whole[name][rank::2]) for name, rows in own.items())
    parts = {name: [Part(own[name]) for own, *_ in saved] for name in saved[0][0]}
    bank = Bank(7, layout="replicated")
    bank.load_state_dict(saved[0][1] | {name: StoredRows(name, each) for name, each in parts.items()})
    assert all(torch.equal(value, whole[name]) for name, value in bank.state_dict().items())
