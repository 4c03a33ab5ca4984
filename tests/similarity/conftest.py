"""Tests of modules named here run once per backend: torch, and triton where it is installed, interpreted on the CPU."""

import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from amclr_scale.similarity import using

BOTH = {"test_contrast", "test_contrast_ranks", "test_pairwise", "test_public_faults", "test_backends"}
INTERPRETED = importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"
TORCH_ONLY = {  # too slow interpreted, and nothing that depends on the backend
    "test_gradcheck", "test_feature_gradients_travel_only_in_reduce_scatter", "test_mistakes_are_named",
    "test_a_ring_gathers_numbers_per_sample_only", "test_without_gradients_no_gradient_is_made",
    "test_the_kernels_compile_for_a_card_that_is_not_here", "test_which_backend_and_precision_is_in_force",
}  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.module.__name__.rpartition(".")[2] in BOTH and metafunc.function.__name__ not in TORCH_ONLY:
        marks = [] if INTERPRETED else [pytest.mark.skip(reason="needs triton, with TRITON_INTERPRET=1 and no GPU")]
        backends = ["torch", pytest.param("triton", marks=marks)]
        metafunc.parametrize("_backend", backends, indirect=True, scope="function")


@pytest.fixture(autouse=True)
def _backend(request: pytest.FixtureRequest) -> Iterator[str]:
    name = getattr(request, "param", "auto")
    with using(backend=name):
        yield name


def with_backend(name: str, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with using(backend=name):
        return fn(*args, **kwargs)


@pytest.fixture
def ranks(ranks: Callable[..., list[Any]], _backend: str) -> Callable[..., list[Any]]:
    """`ranks` of all tests, with this test's backend on each of them."""
    return lambda world_size, fn, *args, **kwargs: ranks(world_size, with_backend, _backend, fn, *args, **kwargs)
