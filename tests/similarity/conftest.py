"""Tests of the modules in `BOTH` hold every backend to the definition: torch here, triton in a process of its own.

`test_triton_interpreted.py` starts that process with TRITON_INTERPRET=1. Triton reads it once, when it is imported, and
from then on interprets every kernel of the process: no other test may see that, and no user.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from amclr_scale.similarity import using

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BOTH = {"test_contrast", "test_extra_keys", "test_masks", "test_contrast_ranks", "test_pairwise", "test_backends"}
TORCH_ONLY = {  # too slow interpreted, or nothing that depends on the backend
    "test_gradcheck", "test_feature_gradients_travel_only_in_reduce_scatter", "test_mistakes_are_named",
    "test_a_ring_gathers_numbers_per_sample_only", "test_an_anchor_without_keys_is_a_constant",
    "test_the_kernels_compile_for_a_card_that_is_not_here",
    "test_measured_tiles_are_kept_on_disk_for_their_card_and_width",
    "test_which_backend_and_precision_is_in_force", "test_aligned_pairs_give_no_negative_loss",
    "test_float32_is_as_good_as_plain_autograd_at_small_temperatures", "test_groups_contrast_among_themselves",
    "test_backward_holds_features_and_numbers_per_anchor", "test_unequal_numbers_of_keys_are_asked_of_a_side",
    "test_the_effective_gradient_is_the_global_one_for_any_number_of_ranks", "test_features_of_16_bits",
    "test_groups_that_do_not_divide_are_refused",
    "test_an_uneven_batch_is_refused_everywhere_and_names_the_rank",
    "test_masks_on_ranks", "test_one_temperature_on_ranks_is_exact_to_1e_12",
    "test_ranks_that_scale_their_losses_differently_are_refused",
}  # fmt: skip
INTERPRETED_VALUES = {  # of parameters whose other values the kernels cannot tell apart
    "W": {2}, "world_size": {2}, "B": {37}, "temperature": {0.002, 0.004, 0.05},
    "which": {"image", "text_temperature"},
    "exclude_positive": {True},
    "kind": {"aligned", "positives worst"},
}  # fmt: skip


def _interpreted(item: pytest.Item) -> bool:
    module, function = item.nodeid.split("::")[:2]
    values = item.callspec.params if hasattr(item, "callspec") else {}
    return (
        Path(module).stem in BOTH
        and function.split("[")[0] not in TORCH_ONLY
        and all(values[name] in kept for name, kept in INTERPRETED_VALUES.items() if name in values)
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if INTERPRETED:
        left_out = [item for item in items if not _interpreted(item)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def _backend() -> Iterator[str]:
    name = "triton" if INTERPRETED else "auto"
    with using(backend=name):
        yield name


def with_backend(name: str, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with using(backend=name):
        return fn(*args, **kwargs)


@pytest.fixture
def ranks(ranks: Callable[..., list[Any]], _backend: str) -> Callable[..., list[Any]]:
    """`ranks` of all tests, with this test's backend on each of them."""
    return lambda world_size, fn, *args, **kwargs: ranks(world_size, with_backend, _backend, fn, *args, **kwargs)
