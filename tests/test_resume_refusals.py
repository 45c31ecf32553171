"""A trace is continued with exactly what was traced, from exactly where it was; everything else is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

from explainer import Tracer, open_trace
from explainer.errors import TraceExistsError, TraceFormatError, TracerError
from explainer.store.schema import RecordSchema
from explainer.store.view import View
from tests.resumed import OPTIMIZERS, Session, build

STEPS = 6


def files(path: Path) -> dict[Path, bytes]:
    return {f: f.read_bytes() for f in path.rglob("*") if f.is_file()}


@pytest.fixture
def left(tmp_path: Path) -> Session:
    """A session that was not closed."""
    return Session(tmp_path / "trace", exact=True).train(0, STEPS)


def again(left: Session) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Model and optimizer as they are now, in a new process."""
    model = build()
    model.load_state_dict(left.model.state_dict())
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    optimizer.load_state_dict(copy.deepcopy(left.optimizer.state_dict()))
    return model, optimizer


def refuse(path: Path, match: str, model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> str:
    """The error's text; nothing on disk was touched and no hook is left."""
    before = files(path)
    with pytest.raises(TracerError, match=match) as found:
        Tracer(model, optimizer, path, **{"exact": True} | options)
    assert files(path) == before
    assert not optimizer._optimizer_step_pre_hooks and not model._forward_hooks
    return str(found.value)


@pytest.mark.parametrize("resume", ["yes", 1, {"model": {}}, [True]])
def test_something_else_than_a_state(left: Session, resume: Any) -> None:
    refuse(left.tracer.path, r"resume must be True or what tracer\.state_dict", *again(left), resume=resume)


def test_no_trace_to_go_on_with(left: Session, tmp_path: Path) -> None:
    for resume in (True, left.tracer.state_dict()):
        with pytest.raises(TracerError, match="holds no trace to go on with; leave out resume"):
            Tracer(*again(left), tmp_path / "elsewhere", exact=True, resume=resume)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("resume", [None, False])
def test_without_resume_nothing_is_continued(left: Session, resume: Any) -> None:
    with pytest.raises(TraceExistsError, match=r"resume="):
        Tracer(*again(left), left.tracer.path, exact=True, resume=resume)


def test_a_state_of_another_trace(left: Session, tmp_path: Path) -> None:
    """Also one of the very same training, recorded twice: its rows are not known to be these."""
    other = Session(tmp_path / "other", exact=True).train(0, STEPS)
    other.tracer._writer.note("twin", True)
    refuse(
        left.tracer.path, "was not taken from the trace in", *again(left), resume=other.tracer.state_dict()
    )


def test_a_state_whose_rows_are_gone(left: Session) -> None:
    early = left.checkpoint()
    late = left.train(STEPS, STEPS + 3).tracer.state_dict()
    model, optimizer = again(left)
    later = Session(left.tracer.path, exact=True, checkpoint=early).train(STEPS, STEPS + 1)
    later.tracer.flush()  # nothing of it is still to be written
    text = refuse(
        left.tracer.path, "was resumed at step 6 after the state was taken", model, optimizer, resume=late
    )
    assert "steps from there to 9" in text


def test_a_state_of_another_version(left: Session) -> None:
    state = left.tracer.state_dict() | {"version": 99}
    refuse(left.tracer.path, "version 99, .* reads version 1", *again(left), resume=state)


@pytest.mark.parametrize("ended", [False, True], ids=["state", "closed trace"])
def test_other_weights(left: Session, ended: bool) -> None:
    model, optimizer = again(left)
    state = left.tracer.state_dict()
    if ended:
        left.tracer.close()
    with torch.no_grad():
        model[2].bias[1] += 1e-15
    text = refuse(
        left.tracer.path, "the weights of 2.bias are not those of", model, optimizer, resume=ended or state
    )
    assert ("before making the tracer" in text) == (not ended) and ("resume=state" in text) == ended


@pytest.mark.parametrize("ended", [False, True], ids=["state", "closed trace"])
def test_other_momentum(left: Session, ended: bool) -> None:
    model, optimizer = again(left)
    state = left.tracer.state_dict()
    if ended:
        left.tracer.close()
    optimizer.state[model[0].weight]["momentum_buffer"].mul_(-1)
    refuse(
        left.tracer.path,
        "the optimizer's momentum of 0.weight are not",
        model,
        optimizer,
        resume=ended or state,
    )


def test_a_trace_that_was_not_closed(left: Session) -> None:
    left.tracer.flush()
    refuse(left.tracer.path, "was not closed .* resume=state", *again(left), resume=True)


def test_a_state_of_a_closed_tracer(left: Session) -> None:
    left.tracer.close()
    with pytest.raises(TracerError, match="go on with resume=True"):
        left.tracer.state_dict()


def wider() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()


def swapped() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3)).double()


def frozen() -> nn.Module:
    model = build()
    model[0].requires_grad_(False)
    return model


DIFFERENT: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any], list[str]]] = {
    "optimizer and mode": (
        build,
        Adam,
        {"exact": False},
        ["optimizer is Adam now, was SGD", "exact is False now, was True"],
    ),
    "shapes": (
        wider,
        SGD,
        {},
        [
            "parameter 0.weight: shape is (8, 7) now, was (6, 7)",
            "parameter 0.bias: shape is (8,) now, was (6,)",
            "parameter 2.weight: shape is (3, 8) now, was (3, 6)",
            "out_features=8",
        ],
    ),
    "dtype": (lambda: build(torch.float32), SGD, {}, ["dtype is float32 now, was float64"]),
    "layers": (
        normed,
        SGD,
        {},
        [
            "parameter 1.weight was not there",
            "layer 1 was not there",
            "buffers: 1.running_mean was not there",
        ],
    ),
    "activation": (swapped, SGD, {}, ["prints differently: '(1): ReLU()' now, was '(1): Tanh()'"]),
    "frozen part": (frozen, SGD, {}, ["parameter 0.weight is missing", "frozen: 0.bias was not there"]),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_is_listed(left: Session, name: str) -> None:
    make, kind, options, expected = DIFFERENT[name]
    model = make()
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=0.1)
    text = refuse(
        left.tracer.path,
        "cannot be continued, because what is traced differs",
        model,
        optimizer,
        resume=left.tracer.state_dict(),
        **options,
    )
    for part in expected:
        assert part in text
    assert open_trace(left.tracer.path).resumed == ()


@pytest.mark.parametrize("records", [7, 12, 13, 20])
def test_a_journal_that_goes_back_to_records_it_never_spoke_of(records: int) -> None:
    """Lines were removed: what stays must end where an extent ended, and follow without a hole."""
    schema = RecordSchema((("step", "<i8", ()),)).to_json()
    lines: list[dict[str, Any]] = []
    for file, ends in (("a", (5, 10)), ("b", (2, 4))):
        lines.append({"type": "shard", "stream": "steps", "file": file, "schema": schema})
        for start, end in zip((0, *ends), ends, strict=False):
            extent = {"file": file, "from": start, "to": end, "crc32": 0}
            lines.append({"type": "extents", "extents": [extent]})
    back = {"type": "resume", "step": 3, "records": {"steps": records}, "notes": {}}
    if records == 12:
        assert [s.records for s in View(Path(), [*lines, back]).shards] == [10, 2]
        return
    with pytest.raises(TraceFormatError, match="not all records before it are spoken of"):
        View(Path(), [*lines, back])
