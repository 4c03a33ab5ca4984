"""Who computes what on several ranks.

b  rows of a rank    B = b W    D  width    one unit = a product of 2 b B D operations per rank

                      units                                      crosses ranks beside the features and B numbers
    reduce_scatter    4 = 1 forward + 3 backward                 the gradient of one tower, B D float32
    column_sums       5 = 1 forward + 4 backward                 nothing
    two_blocks        6 = 2 forward + 4 backward                 nothing

`reduce_scatter` makes each block of similarities once per pass and both gradients from it; the part that belongs to
other ranks is sent to them. The others make each rank's gradients from a block of its rows and a block of its columns.
With F operations per second and L bytes per second, a unit takes 2 b B D / F and the gradient 4 B D / L: sending wins
from b = 2 F / L rows per rank on. That is the rule of `auto`, with these rates.
"""

import torch

from amclr_scale.distributed.collectives import Group, world_size
from amclr_scale.distributed.launcher import ranks_on_node
from amclr_scale.similarity.settings import Distribution

CPU_OPERATIONS, CPU_LINK = 1e11, 1e9  # one core; 10 Gbit/s
CUDA_OPERATIONS = 4e14  # bfloat16 with the element-wise work between the products
CUDA_NODE_LINK, CUDA_CLUSTER_LINK = 3e11, 4e10  # NVLink; 400 Gbit/s


def choose(
    distribution: Distribution, ranks: Group, local_rows: int, device: torch.device, *, one_node: bool | None = None
) -> Distribution:
    """The distribution to use: the one asked for, or for `auto` the faster one by the rule above.

    Args:
        one_node: whether all ranks share one; None: as the launcher's variables say.
    """
    if ranks.size == 1:
        return "reduce_scatter"  # nothing to send: 4 units
    if distribution != "auto":
        return distribution
    if device.type == "cuda":
        # All ranks have to choose alike: this says the same on every node, also where nodes differ.
        if one_node is None:
            one_node = ranks_on_node() == world_size()
        rows = 2 * CUDA_OPERATIONS / (CUDA_NODE_LINK if one_node else CUDA_CLUSTER_LINK)
    else:
        rows = 2 * CPU_OPERATIONS / CPU_LINK
    return "reduce_scatter" if local_rows >= rows else "column_sums"
