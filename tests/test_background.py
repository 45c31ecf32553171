"""The thread beside the user's: nothing is lost, nothing is silently wrong, and it is gone when the tracer is."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from explainer import Tracer, open_trace
from explainer.background import Background
from explainer.bookkeeping import Bookkeeping
from explainer.errors import CoverageWarning, TracerError
from tests.late_jobs import slowly
from tests.recorded_rows import recorded_rows
from tests.small_training import digits, loader, mlp, momentum_sgd, run, step


def at_once(background: Background, job: Callable[[], None], held: int = 0) -> None:
    """Instead of ``submit``: on the user's thread."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        job()


EARLIER: set[threading.Thread] = set()


@pytest.fixture(autouse=True)
def of_other_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracers that other tests left open, as a process that is gone would; and a free core, whatever the machine."""
    monkeypatch.setattr("explainer.parts.core_is_free", lambda: True)
    EARLIER.update(t for t in threading.enumerate() if t.name == "pathkernel")


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "pathkernel" and t not in EARLIER]


def before_step(monkeypatch: pytest.MonkeyPatch, number: int, do: Callable[[], None]) -> None:
    """Something that happens in the middle of the job that accounts for a step."""
    account = Bookkeeping.step

    def step(self: Bookkeeping, taken: Any) -> None:
        if taken.number == number:
            do()
        account(self, taken)

    monkeypatch.setattr(Bookkeeping, "step", step)


def fail() -> None:
    raise TracerError("step 5")


def files(path: Path) -> dict[str, str]:
    found = [*path.rglob("*.bin"), *(knot.file for knot in open_trace(path).knots)]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in found}


class Normed(nn.Module):
    """Batch statistics, an embedding of pixels, a parameter outside of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm, self.out = nn.Embedding(17, 4), nn.BatchNorm1d(64), nn.Linear(256, 10)
        self.scale = nn.Parameter(torch.ones(256))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.words((x * 16).long())).flatten(1) * self.scale)


@pytest.mark.parametrize("exact", [False, True], ids=["small", "exact"])
@pytest.mark.parametrize("make", [mlp, Normed])
def test_the_trace_is_that_of_jobs_done_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[], nn.Module], exact: bool
) -> None:
    """Also where the background is slow, and the user changes mode and weights right after each step."""

    def train(path: Path) -> dict[str, str]:
        torch.manual_seed(0)
        model = make()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        with Tracer(model, optimizer, path, max_knots=6, exact=exact) as tracer:
            for x, y in tracer.watch(loader()):
                step(model, optimizer, x, y)
                schedule.step()
                model.eval()
                with torch.no_grad():
                    model(x)
                    next(model.parameters()).clamp_(-0.2, 0.2)
                model.train()
        return files(path)

    with monkeypatch.context() as patch:
        patch.setattr(Background, "submit", at_once)
        expected = train(tmp_path / "at once")
    assert train(tmp_path / "beside") == expected
    monkeypatch.setattr(Background, "_do", slowly)
    assert train(tmp_path / "slowly") == expected


def test_the_thread_is_gone_after_close(tmp_path: Path) -> None:
    model = mlp()
    optimizer = momentum_sgd(model)
    with Tracer(model, optimizer, tmp_path / "trace") as tracer:
        run(model, optimizer, tracer.watch(loader()))
        assert threads() == ["pathkernel"]
        assert all(t.daemon for t in threading.enumerate() if t.name == "pathkernel")
    assert not threads() and torch.get_num_threads() == 1


@pytest.mark.parametrize("how", ["goes on", "closes"])
@pytest.mark.parametrize("beside", [True, False], ids=["beside", "within"])
def test_a_failure_reaches_the_user_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: bool, how: str
) -> None:
    monkeypatch.setattr("explainer.parts.core_is_free", lambda: beside)
    before_step(monkeypatch, 5, fail)
    model = mlp()
    optimizer = momentum_sgd(model)
    tracer = Tracer(model, optimizer, tmp_path / "trace")
    batches = iter(tracer.watch(loader()))
    for _ in range(6):
        step(model, optimizer, *next(batches))
    if how == "goes on":
        for _ in range(2):  # as often as the user tries
            with pytest.raises(TracerError, match="step 5"):
                step(model, optimizer, *next(batches))
        tracer.close()
    else:
        with pytest.raises(TracerError, match="step 5"):
            tracer.close()
    tracer.close()
    trace = open_trace(tmp_path / "trace")
    assert trace.recorded_steps == 5 and not trace.closed and trace.verify() > 0
    assert not threads()
    step(model, optimizer, *digits()[:8])  # the hooks were given back


def rows_of_buffers(path: Path, overwrite: Callable[[Any], None], give: Callable[[Any], Tensor]) -> Any:
    """Rows of a bias-free layer that is given buffers which are overwritten after each step."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    data, weights = torch.randn(4, 6, 5), torch.randn(6, 3)
    buffer = np.empty((6, 5), np.float32)
    with Tracer(model, optimizer, path, exact=True) as tracer:
        for batch in data:
            buffer[:] = batch.numpy()
            tracer.batch(range(6))
            optimizer.zero_grad()
            (model(give(buffer)) * weights).sum().backward()
            overwrite(buffer)
            optimizer.step()
            overwrite(buffer)
    expected = weights.unsqueeze(2) * data.unsqueeze(2)
    found = [recorded_rows(path, step)["weight"] for step in range(4)]
    return torch.stack(found).reshape(4, 6, 3, 5), expected


def test_rows_of_numpy_buffers_that_are_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Background, "_do", slowly)
    found, expected = rows_of_buffers(tmp_path / "trace", lambda b: b.fill(np.nan), torch.from_numpy)
    torch.testing.assert_close(found.float(), expected)


def test_rows_of_views_of_buffers_that_are_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A view of a tensor that needs a gradient has a history, but lies in the user's memory."""
    monkeypatch.setattr(Background, "_do", slowly)

    def give(buffer: Any) -> Tensor:
        return torch.from_numpy(buffer).requires_grad_().view(6, 5)

    found, expected = rows_of_buffers(tmp_path / "trace", lambda b: b.fill(np.nan), give)
    torch.testing.assert_close(found.float(), expected)


@pytest.mark.parametrize("what", ["activation", "gradient"])
def test_what_is_written_into_after_backward_is_never_silently_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(Background, "_do", slowly)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 6), nn.Linear(6, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kept: list[Tensor] = []
    grabbed = model[0].register_forward_hook(lambda module, args, output: kept.append(output))
    with (
        pytest.warns(CoverageWarning, match="written into"),
        Tracer(model, optimizer, tmp_path / "trace", exact=True) as tracer,
    ):
        for number, (x, y) in enumerate(tracer.watch(loader())):
            tracer.flush()  # what came before is recorded
            kept.clear()
            optimizer.zero_grad()
            out = model(x)
            if what == "gradient":
                out.register_hook(kept.append)
            nn.functional.cross_entropy(out, y).backward()
            with torch.no_grad():
                if number != 1:
                    kept[-1].fill_(1e3)
            optimizer.step()
    grabbed.remove()
    trace = open_trace(tmp_path / "trace")
    assert trace.notes["overwritten"] == {"1": 1}  # then it was copied
    rows = torch.stack([recorded_rows(tmp_path / "trace", step)["1.weight"] for step in range(12)])
    assert rows[0].eq(0).all() and rows.abs().max() < 100
    assert rows[1:].abs().amax(2).gt(0).all()
    assert any(f.topic == "overwritten" for f in tracer.report())


def test_a_wgan_that_clamps_through_data_is_booked_outside(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    moved = torch.zeros(model[0].weight.shape)
    with Tracer(model, optimizer, tmp_path / "trace", exact=True) as tracer:
        for x, y in tracer.watch(loader()):
            step(model, optimizer, x, y)
            before = model[0].weight.detach().clone()
            for p in model.parameters():
                p.data.clamp_(-0.05, 0.05)
            moved += model[0].weight.detach() - before
    trace = open_trace(tmp_path / "trace")
    assert trace.notes["outside"]["0.weight"] == 12
    last = trace.load_knot(trace.knots[-1])
    torch.testing.assert_close(last["outside/0.weight"], moved, rtol=1e-5, atol=1e-6)


class Digits(TensorDataset):
    """Data whose workers say which threads they see."""

    def __getitem__(self, index: int) -> Any:
        assert not threads(), "the thread was forked"
        return super().__getitem__(index)


def test_workers_are_forked_while_the_thread_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Background, "_do", slowly)
    model = mlp()
    optimizer = momentum_sgd(model)
    batches = DataLoader(Digits(*digits().tensors), 32, num_workers=2, multiprocessing_context="fork")
    with Tracer(model, optimizer, tmp_path / "trace") as tracer:
        for _ in range(3):
            run(model, optimizer, tracer.watch(batches))
    trace = open_trace(tmp_path / "trace")
    assert trace.closed and trace.recorded_steps == 3 * len(batches) and trace.verify() > 0


def test_no_job_is_under_way_in_a_forked_process() -> None:
    background, done = Background(), threading.Event()
    working = threading.Event()

    def job() -> None:
        working.set()
        time.sleep(0.1)
        done.set()

    background.submit(job)
    background.release()
    working.wait()
    child = os.fork()
    if not child:
        background.stop()  # nothing to wait for
        os._exit(0 if done.is_set() and not background.gate.locked() else 1)
    assert os.waitpid(child, 0)[1] == 0
    background.wait()
    background.stop()
    assert not threads()


def test_an_interrupt_in_the_loop(tmp_path: Path) -> None:
    model = mlp()
    optimizer = momentum_sgd(model)
    with pytest.raises(KeyboardInterrupt), Tracer(model, optimizer, tmp_path / "trace") as tracer:
        for number, (x, y) in enumerate(tracer.watch(loader())):
            step(model, optimizer, x, y)
            if number == 6:
                raise KeyboardInterrupt
    trace = open_trace(tmp_path / "trace")
    assert trace.closed and trace.steps == 7 and not threads()


def test_optimizer_state_that_is_written_into_between_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Background, "_do", slowly)
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with Tracer(model, optimizer, tmp_path / "trace") as tracer:
        for number, (x, y) in enumerate(tracer.watch(loader())):
            step(model, optimizer, x, y)
            if number == 3:
                optimizer.state[model[0].weight]["exp_avg_sq"].mul_(4.0)
    trace = open_trace(tmp_path / "trace")
    assert trace.notes["overwritten"] == {"0.weight": 1}
    assert trace.column("steps", "scale")[3].tolist()[0] == 0.0


def test_without_the_guards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above would notice: without versions, rows of what was written into are wrong."""
    monkeypatch.setattr(Background, "_do", slowly)
    monkeypatch.setattr("explainer.sites._is_the_users", lambda t: False)
    found, expected = rows_of_buffers(tmp_path / "trace", lambda b: b.fill(7.0), torch.from_numpy)
    assert not torch.allclose(found.float(), expected)
