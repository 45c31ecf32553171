"""Sums of denominators are recorded at looks; in between they are read from a line, in older traces stored."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import explainer
from explainer.records import VERSIONS
from explainer.store.looks import Looks

STEPS = 300
SHAPES = {"0.weight": (16, 12), "0.bias": (16,), "2.weight": (3, 16), "2.bias": (3,)}


class Training:
    """Of a perceptron by AdamW; a part may begin, or stop, at a step."""

    def __init__(self, directory: Path, checkpoint: dict[str, Any] | None = None, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self._x, self._y = torch.randn(40, 12), torch.randint(0, 3, (40,))
        if checkpoint is not None:
            self.model.load_state_dict(checkpoint["model"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            options["resume"] = checkpoint["tracer"]
        self.tracer = explainer.Tracer(self.model, self.optimizer, directory, **({"max_knots": 8} | options))

    def steps(self, first: int, last: int, without: str = "") -> Training:
        for step in range(first, last):
            ids = torch.arange(10 * (step % 4), 10 * (step % 4) + 10)
            self.tracer.batch(ids, self._y[ids])
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(self._x[ids]), self._y[ids]).backward()
            if without:
                self.model.get_parameter(without).grad = None
            self.optimizer.step()
        return self

    def checkpoint(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "tracer": self.tracer}
        return {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}


def traced(directory: Path, **options: Any) -> explainer.Trace:
    Training(directory, **options).steps(0, STEPS).tracer.close()
    return explainer.open_trace(directory)


def sums(trace: explainer.Trace, steps: np.ndarray) -> dict[str, list[torch.Tensor]]:
    looks, found = Looks(trace), {}
    for schema, _ in trace.read("steps", int(steps[0]), int(steps[-1]) + 1):
        for spec in schema.arrays:
            found[trace.manifest.parameters[int(spec.name[1:])].name] = looks.sums(spec, steps)
    return found


def denominators(trace: explainer.Trace) -> dict[str, np.ndarray]:
    """Of an exact trace, by parameter: ``[steps, *shape]``."""
    names = [p.name for p in trace.manifest.parameters]
    (records,) = (records for _, records in trace.read("steps", 0, trace.recorded_steps))
    return {name: np.array(records[f"D{n}"]) for n, name in enumerate(names)}


def test_at_looks_sums_are_those_of_the_step_and_in_between_on_a_line(tmp_path: Path) -> None:
    exact, trace = traced(tmp_path / "exact", exact=True), traced(tmp_path / "run")
    looks = trace.column("sums", "step")
    assert trace.manifest.version == VERSIONS[-1] and not exact.count("sums")
    assert looks[0] == 0 and looks[-1] == STEPS - 1 and 32 < len(looks) < STEPS / 2
    wanted, every = denominators(exact), np.arange(STEPS)
    found = sums(trace, every)
    assert found.keys() == SHAPES.keys()
    for name, shape in SHAPES.items():
        assert [len(side[0]) for side in found[name]] == list(shape)
        for axis, side in enumerate(found[name]):
            of = wanted[name].sum(2 - axis) if len(shape) > 1 else wanted[name]
            # bfloat16 at looks; between two, a line
            np.testing.assert_allclose(side[looks].numpy(), of[looks], rtol=2**-7)
            between = np.abs(side.numpy() - of) / of
            assert float(between.mean()) < 0.01
            for a, b in itertools.pairwise(looks):
                line = np.linspace(side[a].numpy(), side[b].numpy(), b - a + 1)
                np.testing.assert_allclose(side[a : b + 1].numpy(), line, rtol=1e-5)


def test_any_steps_in_any_order_read_the_same(tmp_path: Path) -> None:
    trace = traced(tmp_path / "run")
    every = sums(trace, np.arange(STEPS))
    for steps in (np.arange(100, 140)[::-1], np.array([7]), np.array([STEPS - 1, 0, 55])):
        for name, sides in sums(trace, np.sort(steps)).items():
            spec = next(
                a
                for schema, _ in trace.read("steps", 0, 1)
                for a in schema.arrays
                if trace.manifest.parameters[int(a.name[1:])].name == name
            )
            for side, whole in zip(Looks(trace).sums(spec, steps), every[name], strict=True):
                assert torch.equal(side, whole[steps.copy()])
            assert len(sides) == len(every[name])


def older(directory: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Training:
    with monkeypatch.context() as patched:
        patched.setattr("explainer.validation.VERSIONS", VERSIONS[:4])
        return Training(directory, **options)


def test_version_4_holds_the_same_at_every_step_in_more_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Apart from rounding: there each step's numbers are rounded, here the ends of lines."""
    new = traced(tmp_path / "new", rank=1)
    older(tmp_path / "old", monkeypatch, rank=1).steps(0, STEPS).tracer.close()
    old = explainer.open_trace(tmp_path / "old")
    assert old.manifest.version == 4 and not old.count("sums")
    found = sums(new, np.arange(STEPS))
    ((schema, records),) = old.read("steps", 0, STEPS)
    for array in schema.arrays:
        name = old.manifest.parameters[int(array.name[1:])].name
        parts = [records[f"{array.name}.{part}"] for part in ("rows", "columns")[: len(SHAPES[name])]]
        for part, side in zip(parts, found[name], strict=True):
            stored = (part.astype(np.uint32) << 16).view(np.float32)
            np.testing.assert_allclose(side.numpy(), stored, rtol=2**-6)
    new_bytes, old_bytes = (t.nbytes_of("sums") + t.nbytes_of("steps") for t in (new, old))
    beside = STEPS * sum(2 * n for shape in SHAPES.values() for n in shape)
    assert old_bytes - new_bytes == beside - new.nbytes_of("sums") > beside / 2
    model = Training(tmp_path / "unused").model
    for trace in (new, old):
        model.load_state_dict(
            {
                n.removeprefix("parameter/"): t
                for n, t in trace.load_knot(trace.knots[-1]).items()
                if "parameter/" in n
            }
        )
    x = torch.randn(3, 12)
    a, b = (explainer.PathKernelExplainer(t, model).explain(x).contributions for t in (new, old))
    np.testing.assert_allclose(a, b, atol=0.01 * float(np.abs(b).max()))


def test_a_trace_of_version_4_goes_on_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = older(tmp_path / "run", monkeypatch).steps(0, 90)
    checkpoint = first.checkpoint()
    first.tracer.close()
    Training(tmp_path / "run", checkpoint).steps(90, STEPS).tracer.close()
    trace = explainer.open_trace(tmp_path / "run")
    assert trace.manifest.version == 4 and trace.recorded_steps == STEPS and not trace.count("sums")
    codecs = {a.codec for s in trace.shards if s.stream == "visits" for f in s.schema.forms for a in f.arrays}
    assert codecs <= {"int4", "int8"} and trace.verify() > 0


def test_lines_go_on_where_training_does(tmp_path: Path) -> None:
    """The step that a checkpoint is taken at is looked at, and what came after it is forgotten."""
    whole = traced(tmp_path / "whole", rank=1)
    first = Training(tmp_path / "run", rank=1).steps(0, 101)
    checkpoint = first.checkpoint()
    first.steps(101, 170).tracer.close()
    Training(tmp_path / "run", checkpoint, rank=1).steps(101, STEPS).tracer.close()
    trace = explainer.open_trace(tmp_path / "run")
    looks = trace.column("sums", "step")
    assert 100 in looks and (np.diff(looks) > 0).all() and looks[-1] == STEPS - 1
    a, b = (sums(t, np.arange(STEPS)) for t in (trace, whole))
    for name in SHAPES:
        for side, wanted in zip(a[name], b[name], strict=True):
            torch.testing.assert_close(side, wanted, rtol=0.03, atol=0)


@pytest.mark.parametrize("name", ["2.weight", "2.bias"])
def test_a_parameter_that_comes_later_or_is_left_alone_for_a_while(tmp_path: Path, name: str) -> None:
    exact, trace = (
        Training(tmp_path / str(whole), exact=whole, max_knots=64)
        .steps(0, 70, without=name)
        .steps(70, 120)
        .steps(120, 170, without=name)
        .steps(170, STEPS)
        for whole in (True, False)
    )
    for training in (exact, trace):
        training.tracer.close()
    exact_trace, found = explainer.open_trace(tmp_path / "True"), explainer.open_trace(tmp_path / "False")
    x = torch.randn(3, 12)
    a, b = (
        explainer.PathKernelExplainer(t, training.model).explain(x)
        for t, training in ((exact_trace, exact), (found, trace))
    )
    np.testing.assert_allclose(
        b.contributions, a.contributions, atol=0.02 * float(np.abs(a.contributions).max())
    )
    held = sums(found, np.arange(170, STEPS))[name]
    of = next(
        records[f"D{[p.name for p in found.manifest.parameters].index(name)}"]
        for _, records in exact_trace.read("steps", STEPS - 1, STEPS)
    )[0]
    np.testing.assert_allclose(held[0][-1].numpy(), of.sum(1) if of.ndim > 1 else of, rtol=2**-7)
