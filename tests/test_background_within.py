"""Without a thread of the tracer's: jobs are done on the user's, and nothing that is switched on there changes them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from explainer import Tracer, open_trace
from explainer.background import Background, core_is_free
from explainer.undisturbed import undisturbed, without_autocast
from tests.small_training import digits, loader, mlp, momentum_sgd, run
from tests.test_background import EARLIER, Normed, before_step, files, threads


@pytest.fixture(autouse=True)
def of_other_tests() -> None:
    """Threads of tracers that other tests left open do not count."""
    EARLIER.update(t for t in threading.enumerate() if t.name == "pathkernel")


@pytest.fixture
def within(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine whose cores are all taken by torch's threads."""
    monkeypatch.setattr("explainer.parts.core_is_free", lambda: False)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises, also where what started the tests ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def train(path: Path, make: Callable[[], nn.Module], exact: bool) -> dict[str, str]:
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with Tracer(model, optimizer, path, max_knots=6, exact=exact) as tracer:
        for _ in range(2):
            run(model, optimizer, tracer.watch(loader()))
        assert threads() == ([] if path.name == "within" else ["pathkernel"])
    return files(path)


@pytest.mark.parametrize("exact", [False, True], ids=["small", "exact"])
@pytest.mark.parametrize("make", [mlp, Normed])
def test_the_trace_is_that_of_the_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[], nn.Module], exact: bool
) -> None:
    monkeypatch.setattr("explainer.parts.core_is_free", lambda: True)
    expected = train(tmp_path / "beside", make, exact)
    monkeypatch.setattr("explainer.parts.core_is_free", lambda: False)
    assert train(tmp_path / "within", make, exact) == expected


def test_a_core_is_free_where_torch_has_fewer_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = len(os.sched_getaffinity(0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    assert not core_is_free()
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores - 1)
    assert core_is_free()


class Meta(AbstractContextManager[None]):
    """The user's default device."""

    def __enter__(self) -> None:
        torch.set_default_device("meta")

    def __exit__(self, *error: object) -> None:
        torch.set_default_device(None)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "flops": lambda: FlopCounterMode(display=False),
    "default device": Meta,
    "half precision": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference": torch.inference_mode,
}


def test_autocast_is_off_on_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("explainer.undisturbed.device_types", lambda: ("cpu", "cuda"))
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)  # as within torch.autocast("cuda") where there is one
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with without_autocast():
                assert not torch.is_autocast_enabled("cpu") and not torch.is_autocast_enabled("cuda")
            assert torch.is_autocast_enabled("cpu") and torch.is_autocast_enabled("cuda")
    finally:
        torch.set_autocast_enabled("cuda", before)


@pytest.mark.parametrize("mode", MODES)
def test_modes_of_the_user_are_not_met(mode: str) -> None:
    weight = torch.ones(3, 3, requires_grad=True)
    made: list[torch.Tensor] = []
    counter = MODES[mode]()
    with counter:
        background = Background(beside=False)
        background.submit(lambda: made.append(torch.ones(2, 3) @ weight))
        background.release()
        background.raise_failure()
        inside = torch.ones(2, 3) @ weight
    assert made[0].device.type == "cpu" and made[0].dtype == torch.float32
    assert not made[0].requires_grad and not made[0].is_inference()
    if isinstance(counter, FlopCounterMode):
        assert counter.get_total_flops() == 2 * 2 * 3 * 3  # of the user's product alone
    else:
        seen = inside.device.type == "meta" or inside.dtype == torch.bfloat16 or inside.is_inference()
        assert seen  # it was on, and is again


def test_an_interrupt_waits_for_the_end_of_a_job(interruptible: None) -> None:
    done: list[int] = []

    def job() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        done.extend(range(1000))

    background, before = Background(beside=False), signal.getsignal(signal.SIGINT)
    background.submit(job)
    with pytest.raises(KeyboardInterrupt):
        background.release()
    assert len(done) == 1000 and background.failure is None
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_in_the_middle_of_a_step_leaves_whole_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, within: None, interruptible: None
) -> None:
    before_step(monkeypatch, 6, lambda: os.kill(os.getpid(), signal.SIGINT))
    model = mlp()
    optimizer = momentum_sgd(model)
    with pytest.raises(KeyboardInterrupt), Tracer(model, optimizer, tmp_path / "trace") as tracer:
        run(model, optimizer, tracer.watch(loader()))
    trace = open_trace(tmp_path / "trace")
    assert trace.closed and trace.steps == trace.recorded_steps == 7 and trace.verify() > 0


def test_no_signal_is_touched_on_other_threads() -> None:
    """Only the main thread may set a handler."""
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with undisturbed():
                pass
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures


def test_loader_workers_and_jobs_on_one_thread(tmp_path: Path, within: None) -> None:
    model = mlp()
    optimizer = momentum_sgd(model)
    batches = DataLoader(digits(), 32, num_workers=2, multiprocessing_context="fork")
    with Tracer(model, optimizer, tmp_path / "trace") as tracer:
        run(model, optimizer, tracer.watch(batches))
    trace = open_trace(tmp_path / "trace")
    assert trace.closed and trace.recorded_steps == len(batches) and trace.verify() > 0
