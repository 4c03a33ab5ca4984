"""Ranks that have buffers of their own compute with the mean of them while they measure, and go on with their own."""

import torch

from amclr_scale.encoders.rank_buffers import averaged_buffers, mean_of, one_set_of_buffers

SEEN = torch.tensor([1 / 3, 0.1, 1e-7, 5.5])  # no short binary numbers: a sum of three divided by three differs


def network(rank: int) -> torch.nn.Module:
    made = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Module())
    made[1].register_buffer("same", SEEN.clone())
    made[1].register_buffer("anew", torch.full((2,), float(rank)), persistent=False)
    x = torch.randn(9, 3, generator=torch.Generator().manual_seed(rank))
    made[0](x)
    if rank == 1:
        made[0].num_batches_tracked += 1
    return made


def on_a_rank():
    rank = torch.distributed.get_rank()
    made = network(rank)
    before = {name: buffer.clone() for name, buffer in made.named_buffers()}
    with one_set_of_buffers(made):
        inside = {name: buffer.clone() for name, buffer in made.named_buffers()}
    after = dict(made.named_buffers())
    assert all(torch.equal(after[name], before[name]) for name in before)
    return inside, averaged_buffers(made)


def test_the_mean_over_ranks_and_then_their_own_again(ranks):
    apart = [dict(network(rank).named_buffers()) for rank in range(3)]
    want = {name: torch.stack([buffers[name] for buffers in apart]).double().mean(0) for name in apart[0]}
    for rank, (inside, averaged) in enumerate(ranks(3, on_a_rank)):
        assert averaged.keys() == {"0.running_mean", "0.running_var", "0.num_batches_tracked", "1.same"}
        for name in ("0.running_mean", "0.running_var"):
            torch.testing.assert_close(inside[name].double(), want[name], rtol=0, atol=1e-7)
            torch.testing.assert_close(mean_of([buffers[name] for buffers in apart]), averaged[name])
        assert all(torch.equal(inside[name], value) for name, value in averaged.items())
        assert inside["0.num_batches_tracked"] == 1  # rank 0's
        assert torch.equal(inside["1.same"], SEEN)  # to the bit
        assert inside["1.anew"].tolist() == [rank, rank]
