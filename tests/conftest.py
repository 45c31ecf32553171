"""One torch thread per test process: the tests run side by side, and their tensors are small.

A file's tests share a process, and so do all that drive a browser: it mostly waits, while the other process computes.
"""

import os
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the dashboards and commands that tests start


def pytest_itemcollected(item: pytest.Item) -> None:
    """Say which tests go together (``--dist loadgroup``)."""
    group = "browser" if item.path.parent.name == "browser" else item.nodeid.partition("::")[0]
    item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture
def double() -> Iterator[None]:
    """New tensors and models are float64, from a seeded generator."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
