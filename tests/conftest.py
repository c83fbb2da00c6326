"""What every test relies on: a seed, memory that does not forgive, and one thread a worker."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():  # before Triton is imported, which reads it once
    os.environ.setdefault("TRITON_INTERPRET", "1")

hypothesis.settings.register_profile("adamac", deadline=None, max_examples=60, derandomize=True)
hypothesis.settings.load_profile("adamac")


def pytest_configure() -> None:
    # Tensors in tests are small: more threads gain nothing, and waiting for each other on busy cores costs a lot.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan():
    """Fill new memory with NaN, so that an output that is never written cannot pass by luck."""
    former = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(former[0], warn_only=former[1])


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device that operations are tested on: the accelerator if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
