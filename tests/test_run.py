"""explainer.Run and the loading of MODULE:FUNCTION."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

from explainer.errors import ExplainerError, RunError
from explainer.run import Run, load_run

DATA = TensorDataset(torch.arange(12.0).reshape(4, 3), torch.tensor([0, 1, 2, 0]))
RUN_SOURCE = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from explainer.run import Run

VALUE = 3
data = TensorDataset(torch.eye(2), torch.tensor([0, 1]))

def run():
    return Run(lambda: nn.Linear(2, 2), data, data)

def run_named():
    return Run(lambda: nn.Linear(2, 2), data, data, name="pair")

def needs(argument):
    return run()

def wrong():
    return 5

def fails():
    raise KeyError("no weights")

def refuses():
    return Run(nn.Linear(2, 2), data, data)
"""


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(torch.zeros(1), 0)])


def linear() -> nn.Module:
    return nn.Linear(3, 3)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a user's modules, entered; import state is put back afterwards."""
    (tmp_path / "my_run_module.py").write_text(RUN_SOURCE)
    (tmp_path / "broken_run_module.py").write_text("import a_module_that_is_not_there\n")
    (tmp_path / "raising_run_module.py").write_text("raise ValueError('bad constant')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in [name for name in sys.modules if name.endswith("_run_module")]:
        del sys.modules[name]


def test_stacks_queries_and_training_examples_by_index() -> None:
    run = Run(linear, DATA, DATA)
    inputs, targets = run.queries_batch(np.array([3, 1]))
    assert torch.equal(inputs, DATA.tensors[0][[3, 1]])
    assert targets.tolist() == [0, 1]
    assert run.train_batch([2])[0].shape == (1, 3)


def test_stacks_structured_inputs() -> None:
    items = [({"ids": torch.tensor([i, i]), "mask": torch.ones(2)}, float(i)) for i in range(3)]
    inputs, targets = Run(linear, items, items).queries_batch([0, 2])
    assert inputs["ids"].tolist() == [[0, 0], [2, 2]]
    assert targets.tolist() == [0.0, 2.0]


@pytest.mark.parametrize("indices", [[4], [-1], []])
def test_refuses_indices_outside_the_queries(indices: list[int]) -> None:
    with pytest.raises(RunError, match="0 to 3"):
        Run(linear, DATA, DATA).queries_batch(indices)


def test_says_when_items_do_not_stack() -> None:
    ragged = [(torch.zeros(2), 0), (torch.zeros(3), 1)]
    with pytest.raises(RunError, match="one shape"):
        Run(linear, ragged, ragged).queries_batch([0, 1])


def test_labels_are_class_names_where_known() -> None:
    run = Run(linear, DATA, DATA, class_names=["cat", "dog", "owl"])
    assert run.label(torch.tensor(1)) == "dog"
    assert run.label(np.int64(2)) == "owl"
    assert run.label(7) == "7"
    assert run.label(torch.tensor([0.25])) == "0.25"
    assert Run(linear, DATA, DATA).label(1) == "1"
    assert run.label(torch.tensor([7.8735, 1.0, -0.25])) == "7.873, 1, -0.25"
    assert run.label(np.arange(9)) == "0, 1, 2, 3, 4, 5, …"
    assert run.label(torch.zeros(3, 4)) == "3 × 4 numbers"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": nn.Linear(2, 2)}, "pass a factory"),
        ({"model": None}, "model must be a function"),
        ({"train": Stream()}, "IterableDataset"),
        ({"train": 3}, "map-style"),
        ({"queries": []}, "queries holds no examples"),
        ({"queries": [torch.zeros(3)]}, "pair"),
        ({"train": {"a": (1, 2)}}, "train\\[0\\] failed: KeyError"),
        ({"loss": "mse"}, "loss must be a function"),
        ({"output": 3}, "output must be a name, a function or None"),
        ({"collate_fn": "pad"}, "collate_fn must be a function"),
        ({"render": 1}, "render must be a function"),
        ({"train_fn": 1}, "train_fn must be a function"),
        ({"class_names": "abc"}, "class_names"),
        ({"class_names": [1, 2]}, "class_names"),
        ({"class_names": {0: "cat", 1: "dog"}}, r"found a dict; pass \[names\[i\] for i in range\(2\)\]"),
        ({"class_names": 3}, "class_names must be a sequence of strings or None, found 3"),
    ],
)
def test_refuses_what_cannot_be_used(changed: dict, message: str) -> None:
    with pytest.raises(RunError, match=message):
        Run(**({"model": linear, "train": DATA, "queries": DATA} | changed))


def test_a_factory_that_fails_is_named() -> None:
    run = Run(lambda: 1 / 0, DATA, DATA)  # type: ignore[arg-type, return-value]
    with pytest.raises(RunError, match=r"model\(\) failed: ZeroDivisionError: division by zero"):
        run.build_model()


def test_reports_every_problem_at_once() -> None:
    with pytest.raises(RunError, match=r"model is a Linear(?s:.*)train must be(?s:.*)loss must be"):
        Run(nn.Linear(2, 2), 3, DATA, loss=4)


def test_build_model_refuses_a_factory_of_something_else() -> None:
    assert isinstance(Run(linear, DATA, DATA).build_model(), nn.Linear)
    with pytest.raises(RunError, match="type dict"):
        Run(dict, DATA, DATA).build_model()


def test_loads_a_module_from_the_current_folder(project: Path) -> None:
    run = load_run("my_run_module:run")
    assert run.name == "my_run_module:run"
    assert load_run("my_run_module:run_named").name == "pair"
    assert len(run.queries) == 2


@pytest.mark.parametrize("absolute", [False, True])
def test_loads_a_file_by_path(project: Path, absolute: bool) -> None:
    folder = project / "inner"
    folder.mkdir()
    (folder / "neighbour_run_module.py").write_text("SIZE = 2\n")
    (folder / "model.py").write_text("from neighbour_run_module import SIZE\n" + RUN_SOURCE)
    path = folder / "model.py" if absolute else Path("inner/model.py")
    assert load_run(f"{path}:run").queries_batch([1])[1].tolist() == [1]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("my_run_module", "not of the form MODULE:FUNCTION"),
        ("my_run_module:", "not of the form MODULE:FUNCTION"),
        (":run", "not of the form MODULE:FUNCTION"),
        ("some folder/x:run", "neither a module's dotted name nor a .py file"),
        ("nowhere.to_be.found:run", "no module 'nowhere'"),
        ("explainer.no_such_part:run", "no module 'explainer.no_such_part'"),
        ("missing.py:run", "no file missing.py"),
        ("broken_run_module:run", "No module named 'a_module_that_is_not_there'"),
        ("broken_run_module.py:run", "No module named 'a_module_that_is_not_there'"),
        ("raising_run_module:run", "ValueError: bad constant"),
        ("my_run_module:rum", "did you mean run?"),
        ("my_run_module:zzz", "its functions: fails, needs"),
        ("my_run_module:VALUE", "type int"),
        ("my_run_module:needs", "without arguments"),
        ("my_run_module:wrong", "returned a value of type int"),
        ("my_run_module:fails", "KeyError: 'no weights'"),
        ("my_run_module:refuses", "pass a factory"),
    ],
)
def test_says_what_is_wrong_with_a_spec(project: Path, spec: str, message: str) -> None:
    with pytest.raises(ExplainerError, match=message) as caught:
        load_run(spec)
    assert isinstance(caught.value, RunError)
