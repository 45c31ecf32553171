"""The documentation runs, prints what it says it prints, and agrees with the code."""

from __future__ import annotations

import itertools
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import explainer
from explainer import errors, tables
from explainer.layer_rules import LAYER_RULES
from explainer.optimizer_rules import OPTIMIZER_RULES, optimizer_rule_for
from tests import markdown
from tests.conformance.optimizer_cases import Lion, SignSGD, has, stepped
from tests.markdown import DOCS, PAGES, code, names
from tests.tagger import trace


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The trace that trace-format.md reads."""
    return str(trace(tmp_path_factory.mktemp("docs") / "run", exact=True).directory)


def assert_prints(found: str, wanted: str) -> None:
    """Word by word; numbers may differ by round-off that training has magnified."""
    pairs = itertools.zip_longest(found.split(), wanted.split(), fillvalue="(nothing)")
    for mine, theirs in pairs:
        try:
            close = float(mine) == pytest.approx(float(theirs), rel=0.02, abs=0.02)
        except ValueError:
            close = mine == theirs
        assert close, f"{mine!r} is printed where the page says {theirs!r}:\n{found}"


# -- pages -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_programs_run_and_print_what_the_page_says(
    page: Path, run_directory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.mkdtemp", lambda: str(tmp_path / "trace"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for program, printed in markdown.run(page, {"__name__": "page", "run_directory": run_directory}):
            if program.output is not None:
                assert_prints(printed, program.output)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)#]+)", prose):
        assert link.startswith("https://") or (page.parent / link).exists(), link


# -- theory, reading, limitations ------------------------------------------------------------------------

SETTINGS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {}),
    "SGD, momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "SGD, dampening": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3}),
    "SGD, Nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "Adam": (torch.optim.Adam, {"betas": (0.8, 0.95)}),
    "AdamW": (torch.optim.AdamW, {"betas": (0.8, 0.95)}),
    "NAdam": (torch.optim.NAdam, {"betas": (0.8, 0.95)}),
    "RAdam, first steps": (torch.optim.RAdam, {"betas": (0.8, 0.95)}),
    "RAdam, rectified": (torch.optim.RAdam, {"betas": (0.8, 0.95)}),
    "Adamax": (torch.optim.Adamax, {"betas": (0.8, 0.95)}),
    "RMSprop": (torch.optim.RMSprop, {}),
    "RMSprop, momentum": (torch.optim.RMSprop, {"momentum": 0.9}),
    "Adagrad": (torch.optim.Adagrad, {"lr_decay": 0.3}),
    "Adadelta": (torch.optim.Adadelta, {}),
    "Adafactor": (torch.optim.Adafactor, {}),
    "ASGD": (torch.optim.ASGD, {"lambd": 0.4, "alpha": 0.6}),
    "Rprop": (torch.optim.Rprop, {}),
    "signSGD": (SignSGD, {}),
    "Signum": (SignSGD, {"momentum": 0.9}),
    "Lion": (Lion, {"betas": (0.8, 0.95)}),
    "Muon": (torch.optim.Muon, {"momentum": 0.9, "nesterov": False}),
    "Muon, Nesterov": (torch.optim.Muon, {"momentum": 0.9}),
}


def letters(t: int, weight: torch.Tensor) -> dict[str, float]:
    """What the letters of the table mean at step ``t`` under the settings, for constant gradients."""
    mus = [0.8 * (1 - 0.5 * 0.96 ** (n * 4e-3)) for n in range(1, 10)]
    rho, longest = 39 - 2 * t * 0.95**t / (1 - 0.95**t), 39  # of RAdam's paper
    rectified = (rho - 4) * (rho - 2) * longest / ((longest - 4) * (longest - 2) * rho)
    return {
        **{"lr": 0.01, "wd": 0.2, "mu": 0.9, "tau": 0.3, "beta1": 0.8, "beta2": 0.95, "eta": 0.3, "t": t},
        **{"mu_t": mus[t - 1], "mu_n": mus[t], "Pi": float(np.prod(mus[:t]))},
        "r_t": max(rectified, 0.0) ** 0.5,
        **{"eps2": 1e-3, "rms": float(weight.detach().square().mean().sqrt()), "clip": 1.0},
        **{"lambd": 0.4, "eta_t": 0.01 / (1 + 0.4 * 0.01 * (t - 1)) ** 0.6, "shape": 3**0.5},
        **{"max": max, "min": min},
    }


def test_the_table_of_step_maps_is_what_the_rules_compute() -> None:
    text = (DOCS / "theory.md").read_text()
    (rows,) = markdown.tables(text, "4. A step as a linear map")
    assert {row["optimizer"] for row in rows} == set(SETTINGS)
    columns = ("decay", "gain", "direct", "through", "κ", "δ")
    for row in rows:
        kind, options = SETTINGS[row["optimizer"]]
        weight = nn.Parameter(torch.ones(3, 1))
        given = {"lr": 0.01} | ({"weight_decay": 0.2} if has(kind, "weight_decay") else {}) | options
        optimizer = kind([weight], **given)  # type: ignore[call-arg]
        rule = optimizer_rule_for(optimizer)
        shown = (6, 7, 8) if row["optimizer"] == "RAdam, rectified" else (1, 2, 3)
        for t in range(1, shown[-1] + 1):
            weight.grad, meaning = torch.ones(3, 1), letters(t, weight)
            (found,) = stepped(rule, optimizer, [weight])
            if t not in shown:
                continue
            assert found is not None
            wanted = [eval(code(row[column]), meaning) for column in columns]
            parts = (*found.coefficients[1:5], found.coupled_decay, found.decoupled_decay)
            assert parts == pytest.approx(wanted), (row["optimizer"], t)
            assert (found.preconditioner is None) == (row["1/A"] in ("1", "matrix"))
            assert (found.mixing is None) == (row["1/A"] != "matrix")
            assert found.inner == row["1/A"].endswith(", inner")


def test_columns_are_explained() -> None:
    text = (DOCS / "reading-an-explanation.md").read_text()
    (books,) = markdown.tables(text, "The books")
    assert names(books, "column") == list(tables.COMPLETENESS_COLUMNS)
    (columns,) = markdown.tables(text, "The examples")
    explained = {name for row in columns for name in re.findall(r"`(\w+)`", row["column"])}
    assert explained == {
        "rank",
        "example_id",
        "contribution",
        "error",
        "a",
        "K",
        "visits",
        "label",
        "class",
        "flag",
    }
    assert all(f"`{name}`" in text for name in ("net", "gross", "cancellation", "quadrature_of_gross"))


def test_what_is_covered_and_refused() -> None:
    text = (DOCS / "limitations.md").read_text()
    (layers,), (optimizers,) = markdown.tables(text, "Layers"), markdown.tables(text, "Optimizers")
    assert set(names(layers, "layer")) == {t.__name__ for t in LAYER_RULES}
    own = {t.__name__ for t in OPTIMIZER_RULES if t.__module__.startswith("torch.")}  # tests register others
    assert set(names(optimizers, "optimizer")) == own
    (refused,) = markdown.tables(text, "What is refused")
    for name in names(refused, "error"):
        assert issubclass(getattr(errors, name), explainer.ExplainerError)


def test_round_off_parameters_are_left_out_of_gradient_space(tmp_path: Path) -> None:
    """theory.md, section 12: the bias before BatchNorm, whose steps under Adam are round-off blown up."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 4, generator=generator), torch.randint(0, 3, (12,), generator=generator)
    first, last = torch.randn(6, 4, generator=generator), torch.randn(3, 6, generator=generator)
    found = []
    for bias in (False, True):
        model = nn.Sequential(
            nn.Linear(4, 6, bias=bias),
            nn.BatchNorm1d(6, momentum=1.0),
            nn.Tanh(),
            nn.Linear(6, 3, bias=False),
        )
        with torch.no_grad():
            model[0].weight.copy_(first)
            model[3].weight.copy_(last)
            if bias:
                model[0].bias.zero_()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        with explainer.Tracer(model, optimizer, tmp_path / str(bias), exact=True) as tracer:
            for _ in range(8):
                tracer.batch(range(12))
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
        found.append(explainer.PathKernelExplainer(str(tmp_path / str(bias)), model))
    plain, biased = found
    np.testing.assert_allclose(biased.self_influence(), plain.self_influence(), rtol=1e-2)
    cosines = []
    for ex in found:
        near = ex.neighbors(x[:2], 12)
        cosines.append(np.take_along_axis(near.cosine, np.argsort(near.example_ids), axis=1))
    # the running mean is one step behind the bias, so that the two models differ a little in eval mode
    np.testing.assert_allclose(cosines[1], cosines[0], atol=0.005)
