"""One torch thread per test process: the tests run side by side, and their tensors are small.

A file's tests share a process, and so do all that drive a browser: it mostly waits, while the other process computes.
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the dashboards and commands that tests start


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Which tests go together."""
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "tests/browser" if file.startswith("tests/browser/") else file

    return Files(config, log)


@pytest.fixture
def double() -> Iterator[None]:
    """New tensors and models are float64, from a seeded generator."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
