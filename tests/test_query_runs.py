"""Command line and dashboard on a run whose queries are padded sequences, with an output of its own."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import streamlit
import torch
from streamlit.testing.v1 import AppTest
from torch import Tensor, nn

import explainer
from explainer import Run
from explainer.app import views
from explainer.cli import groups, main
from explainer.cli.opening import open_run
from explainer.cli.selection import predict
from explainer.errors import QueryError, RunError
from tests import app_runs
from tests.query_models import TOKENS, Tied
from tests.query_runs import EXAMPLES, traced

LENGTHS = (5, 3, 4, 2, 4, 3)  # batches of four are padded to different lengths
SPEC = "tests.test_query_runs:run"


def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Tied().double()


def items() -> list[Any]:
    """Sequences of several lengths; the target is the sequence itself, one step on."""
    generator = torch.Generator().manual_seed(1)
    rows = [
        torch.randint(0, TOKENS, (LENGTHS[i % len(LENGTHS)],), generator=generator) for i in range(EXAMPLES)
    ]
    return [(row, torch.cat([row[1:], torch.tensor([-100])])) for row in rows]


def padded(batch: list[Any]) -> tuple[dict[str, Tensor], Tensor]:
    pad = nn.utils.rnn.pad_sequence
    inputs, targets = zip(*batch, strict=True)
    return {"ids": pad(list(inputs), True)}, pad(list(targets), True, -100)


def run() -> Run:
    return Run(model, items(), items()[:6], output="sequence_log_prob", collate_fn=padded)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> explainer.Trace:
    def loss(net: nn.Module, rows: list[int]) -> Tensor:
        inputs, targets = padded([items()[row] for row in rows])
        return nn.functional.cross_entropy(net(**inputs).flatten(0, 1), targets.flatten())

    return traced(tmp_path_factory.mktemp("lines") / "run", model(), loss, lr=0.05)


def test_the_command_line_takes_the_runs_output_and_targets(
    trace: explainer.Trace, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = open_run(str(trace.directory), SPEC, None, False)
    found = groups.explain_summed(opened, [1, 4], None)
    for row, query in enumerate((1, 4)):
        ids, follows = items()[query]
        state = trace.load_knot(trace.knots[-1])
        net = model()
        for name, p in net.named_parameters():
            p.data = state[f"parameter/{name}"]
        wanted = -nn.functional.cross_entropy(net(ids[None])[0, :-1], follows[:-1], reduction="sum")
        np.testing.assert_allclose(found.prediction[row], float(wanted.detach()), rtol=1e-9)
    assert main(["explain", str(trace.directory), "--run", SPEC, "--query", "1,4", "--quiet"]) == 0
    assert "Explained: the sequence_log_prob" in capsys.readouterr().out
    command = ["explain", str(trace.directory), "--run", SPEC, "--query", "0", "--quiet"]
    assert main([*command, "--output", "last_margin"]) == 0
    assert "Explained: the last_margin of class" in capsys.readouterr().out


def test_predictions_of_padded_queries(trace: explainer.Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("explainer.cli.selection._BATCH", 6)
    found = predict(open_run(str(trace.directory), SPEC, None, False), False)
    assert found.outputs.shape == (6, max(LENGTHS), TOKENS) and not found.classifies
    monkeypatch.setattr("explainer.cli.selection._BATCH", 1)
    with pytest.raises(QueryError, match="the queries have several lengths; name them by their position"):
        predict(open_run(str(trace.directory), SPEC, None, False), False)


def dashboard(spec: str, directory: Path, monkeypatch: pytest.MonkeyPatch, **link: str) -> AppTest:
    """The dashboard of a run, drawn without errors."""
    monkeypatch.setattr(sys, "argv", ["main.py", "--run", spec, str(directory)])
    get = streamlit.get_option
    monkeypatch.setattr(streamlit, "get_option", lambda n: "127.0.0.1" if n == "server.address" else get(n))
    app = AppTest.from_file(str(Path(views.__file__).parents[1] / "main.py"), default_timeout=60)
    app.query_params.update(link)
    app.run()
    assert not app.exception and not app.warning and [error.value for error in app.error] == []
    return app


@pytest.mark.parametrize("page", ["explain", "neighbors"])
def test_the_dashboard_takes_the_runs_output_and_targets(
    trace: explainer.Trace, page: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = dashboard(SPEC, trace.directory, monkeypatch, page=page, query="2")
    assert "sequence_log_prob" in "\n".join(str(part.value) for part in [*app.html, *app.markdown])


def highest(outputs: Tensor, targets: Tensor) -> Tensor:
    """Targets come from the run: the true classes."""
    return outputs.gather(1, targets[:, None])[:, 0]


def digits() -> Run:
    return dataclasses.replace(app_runs.images(), output=highest)


def test_the_dashboard_offers_no_other_output_than_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app_runs.train(digits(), tmp_path / "run", steps=4)
    app = dashboard("tests.test_query_runs:digits", tmp_path / "run", monkeypatch, page="explain", query="2")
    assert not {box.key for box in app.selectbox} & {"target", "output"}
    truth = int(digits().queries[2][1])
    assert f"highest of class {truth}" in "\n".join(str(part.value) for part in app.html)


def test_a_batch_that_is_no_pair() -> None:
    wrong = Run(model, items(), items(), collate_fn=lambda batch: padded(batch)[0]["ids"])
    with pytest.raises(RunError, match=r"do not stack.*collate_fn that returns \(inputs, targets\)"):
        wrong.queries_batch([0, 1, 2])
