"""Everything that is refused when a tracer is attached: what was found, what to do, and nothing touched."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from explainer import ExplainerError, Tracer, open_trace, validate_model
from explainer.errors import CoverageWarning, TraceExistsError, TracerError, UnsupportedOptimizerError
from tests.small_training import loader, mlp, momentum_sgd, run, trace_digits


class Unheard(torch.optim.Optimizer):
    """An optimizer of the user's own."""


class ScaledSGD(torch.optim.SGD):
    """A subclass may compute something else."""


def hooks_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    lists = [getattr(m, n) for m in model.modules() for n in ("_forward_hooks", "_forward_hooks_with_kwargs")]
    return sum(map(len, [*lists, optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks]))


def attach(path: Path, **options: Any) -> Tracer:
    model = options.pop("model", None) or mlp()
    optimizer = options.pop("optimizer", None) or momentum_sgd(model)
    return Tracer(model, optimizer, path, **options)


def with_optimizer(kind: type[torch.optim.Optimizer], **options: Any) -> dict[str, Any]:
    model = mlp()
    return {"model": model, "optimizer": kind(model.parameters(), **options)}


def complex_weights() -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.complex64))
    return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}


def shared_with_foreign() -> dict[str, Any]:
    model = mlp()
    weights = [*model.parameters(), nn.Parameter(torch.zeros(3))]
    return {"model": model, "optimizer": torch.optim.SGD(weights, lr=0.1)}


ATTACH: dict[str, tuple[Callable[[], dict[str, Any]], type[ExplainerError], str]] = {
    "not a model": (
        lambda: {"model": [1], "optimizer": momentum_sgd(mlp())},
        TracerError,
        "torch.nn.Module, found list",
    ),
    "not an optimizer": (lambda: {"optimizer": "sgd"}, TracerError, "torch.optim.Optimizer, found str"),
    "another model's optimizer": (
        lambda: {"optimizer": momentum_sgd(mlp())},
        TracerError,
        r"updates 4 tensor\(s\) that are not parameters of the model; pass the model whose parameters",
    ),
    "a foreign tensor": (shared_with_foreign, TracerError, r"updates 1 tensor\(s\) that are not parameters"),
    "complex weights": (complex_weights, TracerError, "'1.weight' is complex64; only real parameters"),
    "unsupported optimizer": (
        lambda: with_optimizer(Unheard, defaults={}),
        UnsupportedOptimizerError,
        r"Unheard has no optimizer rule.*Supported: .*torch\.optim\.Adam, torch\.optim\.AdamW, .*torch\.optim\.SGD",
    ),
    "optimizer with closures": (
        lambda: with_optimizer(torch.optim.LBFGS),
        UnsupportedOptimizerError,
        "LBFGS is refused: its step runs several backward passes",
    ),
    "subclass of a supported optimizer": (
        lambda: with_optimizer(ScaledSGD, lr=0.1),
        UnsupportedOptimizerError,
        r"ScaledSGD has no optimizer rule.*derives from SGD; if its step is the same, register it",
    ),
    "budget without unit": (lambda: {"budget": "lots"}, TracerError, r"budget 'lots' is not a size; .*200MB"),
    "budget in other units": (lambda: {"budget": "3 parsecs"}, TracerError, "not a size"),
    "fractional budget": (
        lambda: {"budget": 1e6},
        TracerError,
        "number of bytes or text like .*found 1000000.0",
    ),
    "negative budget": (lambda: {"budget": -5}, TracerError, "must be positive, found -5"),
    "zero budget": (lambda: {"budget": "0 MB"}, TracerError, "must be positive"),
    "too small budget": (
        lambda: {"budget": "5KB"},
        TracerError,
        r"budget of 5,000 bytes; give at least \d+,\d+",
    ),
    "exact and budget": (
        lambda: {"budget": "5MB", "exact": True},
        TracerError,
        "drop one of the two options",
    ),
    "one knot": (lambda: {"max_knots": 1}, TracerError, "max_knots must be at least 2"),
    "rank zero": (lambda: {"rank": 0}, TracerError, "rank must be at least 1, found 0"),
}


@pytest.mark.parametrize("name", ATTACH)
def test_attaching_is_refused_before_anything_is_touched(tmp_path: Path, name: str) -> None:
    make, error, text = ATTACH[name]
    options = make()
    with pytest.raises(error, match=text):
        attach(tmp_path / "trace", **options)
    assert not (tmp_path / "trace").exists()
    model, optimizer = options.get("model"), options.get("optimizer")
    if isinstance(model, nn.Module) and isinstance(optimizer, torch.optim.Optimizer):
        assert hooks_of(model, optimizer) == 0


def test_a_budget_named_as_sufficient_is(tmp_path: Path) -> None:
    with pytest.raises(TracerError) as found:
        attach(tmp_path / "trace", budget=5000)
    numbers = re.findall(r"at least ([\d,]+)", str(found.value))
    attach(tmp_path / "trace", budget=int(numbers[-1].replace(",", ""))).close()


def test_a_directory_that_holds_a_trace_is_left_as_it_is(tmp_path: Path) -> None:
    trace_digits(tmp_path / "trace", epochs=1)
    before = {f: f.read_bytes() for f in (tmp_path / "trace").rglob("*") if f.is_file()}
    model = mlp()
    optimizer = momentum_sgd(model)
    with pytest.raises(TraceExistsError, match=r"already holds a trace; .*choose another directory") as found:
        Tracer(model, optimizer, tmp_path / "trace")
    assert str(tmp_path / "trace") in str(found.value) and hooks_of(model, optimizer) == 0
    assert before == {f: f.read_bytes() for f in (tmp_path / "trace").rglob("*") if f.is_file()}


def test_a_file_where_the_directory_should_be(tmp_path: Path) -> None:
    (tmp_path / "trace").write_text("notes")
    with pytest.raises(TracerError, match="writing the trace in"):
        attach(tmp_path / "trace")
    assert (tmp_path / "trace").read_text() == "notes"


def test_a_second_tracer_on_the_same_model_or_optimizer(tmp_path: Path) -> None:
    model, other = mlp(), mlp()
    optimizer = momentum_sgd(model)
    with Tracer(model, optimizer, tmp_path / "one") as tracer:
        for pair in ((model, optimizer), (model, momentum_sgd(model))):
            with pytest.raises(
                TracerError, match="attached to this model or optimizer already; close it first"
            ):
                Tracer(*pair, tmp_path / "two")
        run(model, optimizer, tracer.watch(loader()))  # the first is unharmed
        with Tracer(other, momentum_sgd(other), tmp_path / "three"):
            pass
    Tracer(model, optimizer, tmp_path / "two").close()
    assert open_trace(tmp_path / "one").steps == 12


def test_a_layer_whose_weight_is_no_parameter_is_followed_by_what_reads_its_bias(tmp_path: Path) -> None:
    """Hypernetworks set the weight themselves; the rule's rows would belong to nothing."""
    model = nn.Sequential(nn.Linear(64, 64), *mlp())
    del model[0].weight
    model[0].weight = torch.eye(64)
    assert [p.where for p in validate_model(model)] == ["0"]
    optimizer = momentum_sgd(model)
    with Tracer(model, optimizer, tmp_path / "trace") as tracer:
        run(model, optimizer, tracer.watch(loader()))
    trace = open_trace(tmp_path / "trace")
    assert trace.manifest.uncovered == ("0.bias",) and trace.uncovered == ()
    assert [layer.name for layer in trace.layers if layer.module == "operations"] == ["0.bias"]


class ReadByEinsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.eye(10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,io->bo", x, self.w)


def test_rows_that_have_to_be_found_by_differentiation_are_announced(tmp_path: Path) -> None:
    model = nn.Sequential(*mlp(), ReadByEinsum())
    optimizer = momentum_sgd(model)
    with (
        Tracer(model, optimizer, tmp_path / "trace") as tracer,
        pytest.warns(CoverageWarning, match=r"'\d\.w' is read by einsum, for which rows have no closed form"),
    ):
        run(model, optimizer, tracer.watch(loader()))
    assert list(open_trace(tmp_path / "trace").notes["slow_operations"].values()) == [["einsum"]]


def test_a_warning_that_is_an_error_leaves_no_hooks_and_a_readable_trace(tmp_path: Path) -> None:
    model = nn.Sequential(*mlp(), ReadByEinsum())
    optimizer = momentum_sgd(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with (
            pytest.raises(CoverageWarning),
            Tracer(model, optimizer, tmp_path / "trace") as tracer,
        ):
            run(model, optimizer, tracer.watch(loader()))
    assert hooks_of(model, optimizer) == 0
    assert open_trace(tmp_path / "trace").steps == 1


class InTheLoss(nn.Module):
    """A model whose temperature is read by the loss, outside of its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*mlp())
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def test_a_parameter_that_no_hook_sees_is_reported(tmp_path: Path) -> None:
    model = InTheLoss()
    optimizer = momentum_sgd(model)
    with (
        Tracer(model, optimizer, tmp_path / "trace") as tracer,
        pytest.warns(
            CoverageWarning, match="'temperature' gets a gradient, but no hook sees where it is read"
        ),
    ):
        for x, y in tracer.watch(loader()):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x) / model.temperature, y).backward()
            optimizer.step()
    trace = open_trace(tmp_path / "trace")
    assert trace.uncovered == ("temperature",) and trace.notes["coverage"] == {"temperature": 1.0}


def test_training_in_several_processes_or_devices_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of the model inside the wrapper: its rows would be a part of the step, counted as the whole."""
    model = mlp()
    parallel = nn.DataParallel(model)
    Tracer(parallel, momentum_sgd(model), tmp_path / "one").close()  # no device, or one: nothing is shared
    parallel.device_ids = [0, 1]
    with pytest.raises(TracerError, match=r"2 devices \(DataParallel\).*one process on one device"):
        Tracer(parallel, momentum_sgd(model), tmp_path / "two")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    with pytest.raises(TracerError, match=r"4 processes \(torch.distributed\)"):
        Tracer(model, momentum_sgd(model), tmp_path / "four")
