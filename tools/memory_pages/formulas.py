"""Sizes in bytes as functions of a few numbers: what papers and planning sheets use, and what needs no model at hand.

b  local batch    B = b W  global batch    D  embedding width    N  data-set size    M  queue length    W  ranks
P  parameters    omega  further views per modality
"""

import math

FP32 = 4


def model_states(num_parameters: int, world_size: int, zero_stage: int, *, moments: int = 2) -> int:
    """Parameters, gradients, fp32 master and optimizer states of mixed-precision training, per rank.

    The textbook's sum, 2 P + 2 P + 4 P + 4 P per moment, with what each ZeRO stage divides by W; without buffers. What
    this toolkit's engine really allocates is in `state.py`.
    """
    parameters, gradients, optimizer = 2 * num_parameters, 2 * num_parameters, (4 + 4 * moments) * num_parameters
    if zero_stage >= 1:
        optimizer = math.ceil(optimizer / world_size)
    if zero_stage >= 2:
        gradients = math.ceil(gradients / world_size)
    if zero_stage >= 3:
        parameters = math.ceil(parameters / world_size)
    return parameters + gradients + optimizer


def similarity_matrix(rows: int, columns: int, *, matrices: int = 1, itemsize: int = FP32) -> int:
    """`matrices` x rows x columns: B x B where every rank holds everything, b x B with local rows, c x B chunked."""
    return matrices * rows * columns * itemsize


def gathered_features(global_batch: int, width: int, *, omega: int = 0, itemsize: int = FP32) -> int:
    """All ranks' features of both modalities and all views: 2 (1 + omega) B D."""
    return 2 * (1 + omega) * global_batch * width * itemsize


def queue(length: int, width: int, *, banks: int = 1, itemsize: int = FP32) -> int:
    """`banks` queues of features: M D each. With length = N it is a bank of the whole data set."""
    return banks * length * width * itemsize


def momentum_copy(num_parameters: int, *, itemsize: int = FP32, world_size: int = 1) -> int:
    """A second set of parameters, without gradients and optimizer states; over W ranks where it is sharded."""
    return math.ceil(num_parameters / world_size) * itemsize


def sample_state(num_samples: int, tables: int, *, width: int = 1, world_size: int = 1, itemsize: int = FP32) -> int:
    """`tables` of one number (or `width` of them) for each sample; over W ranks where they are sharded."""
    return math.ceil(num_samples / world_size) * tables * width * itemsize
