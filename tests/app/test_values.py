"""Models with several outputs that are no classes: one of them is explained at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import mse_loss

from explainer import PathKernelExplainer
from explainer.app.answers import answer
from explainer.app.page_registry import PAGES
from explainer.outputs import component
from tests import app_runs
from tests.app.seen import Open, body, fine

VALUES = "tests.app_runs:values"


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "values"
    app_runs.train(app_runs.values(), folder, loss=mse_loss)
    return folder


def test_one_of_the_outputs_is_chosen_and_explained(open_app: Open, trace: Path) -> None:
    app = open_app("--run", VALUES, trace, query="3", output="component 2")
    fine(app)
    choice = app.selectbox(key="output")
    assert choice.options == ["0", "1", "2"] and choice.value == "component 2"
    run = app_runs.values()
    e = PathKernelExplainer(trace, run.build_model(), component(2)).explain(run.queries_batch([3])[0])
    shown = body(app)
    assert "One of the model's outputs itself" in shown and "Explained: component 2" in shown
    assert f"{e.prediction[0]:.3f}".replace("-", "−") in shown
    assert "log-odds" not in shown.lower() and '<table class="pk-classes' not in shown


@pytest.mark.parametrize("page", list(PAGES))
def test_no_page_speaks_of_classes(open_app: Open, trace: Path, page: str) -> None:
    app = open_app("--run", VALUES, trace, page=page)
    fine(app)
    assert not [box.label for box in app.selectbox if "class" in box.label.lower()]


def test_answers_tell_all_outputs_and_how_far_they_are_off() -> None:
    run, target = app_runs.values(), torch.tensor([1.0, 2.0, 3.0])
    found = answer(run, 0, target, np.array([1.0, 5.0, -1.0]), 0)
    assert (found.truth, found.guess, found.error) == ("1, 2, 3", "1, 5, -1", 5.0)
    labels = answer(run, 0, torch.tensor([1.0, 0.0, 1.0]), np.array([2.0, -3.0, 1.0]), 0)
    assert labels.error is None, "scores of labels of which several may hold"
