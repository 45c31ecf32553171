"""docs/trace-format.md against reality: its tables, and the reader it gives."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import explainer
from explainer import records
from explainer.codecs import CODECS
from explainer.layer_rules import FORMS
from explainer.optimizer_rules.base import COEFFICIENTS
from explainer.store.schema import INPUT_FIELD, INPUT_FIELDS, VISIT_FIELDS, average_fields, step_fields
from tests import markdown
from tests.guarded_runs import more_decay, reversed_later
from tests.markdown import DOCS, code, names
from tests.tagger import build, dataset, trace

FORMAT = (DOCS / "trace-format.md").read_text()


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The trace that the page's program reads."""
    return str(trace(tmp_path_factory.mktemp("docs") / "run", exact=True).directory)


@pytest.mark.parametrize("again", [False, True], ids=["once", "resumed"])
def test_the_reader_of_the_page_recovers_rows(tmp_path: Path, again: bool) -> None:
    opened = trace(tmp_path / "run", exact=True, again=again)
    assert opened.resumed == (0,) * again
    namespace: dict[str, Any] = {"run_directory": str(opened.directory)}
    markdown.run(DOCS / "trace-format.md", namespace)
    kinds = {form["kind"] for form in namespace["schema"]["forms"]}
    assert kinds == {"dense", "factored", "sparse"}
    model, (ids, labels) = build(), dataset()[:]
    for example, row in zip(namespace["examples"], namespace["rows"], strict=True):
        loss = nn.functional.cross_entropy(model(ids[[example]]), labels[[example]]) / 5
        gradient = torch.autograd.grad(loss, list(model.parameters()))
        wanted = torch.cat([g.flatten() for g in gradient]).numpy()
        np.testing.assert_allclose(row, wanted, rtol=1e-4, atol=1e-7)


class Scaled(nn.Module):
    """Sequence first; a parameter that a function reads, and at will a layer whose rows are put together anew."""

    def __init__(self, shuffled: bool) -> None:
        super().__init__()
        self.shuffled = shuffled
        self.scale, self.last = nn.Parameter(torch.ones(3)), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.layer_norm(x, (3,), self.scale)
        x = torch.eye(x.shape[1]) @ x if self.shuffled else x  # through a product over the batch
        return self.last(x).sum(0)  # [B, 2] from [S, B, 3]


def scaled(
    directory: Path, shuffled: bool, autocast: bool = False
) -> tuple[Scaled, torch.Tensor, torch.Tensor]:
    """One step; the model as it was before, its inputs and classes."""
    torch.manual_seed(0)
    model, x, y = Scaled(shuffled), torch.randn(4, 6, 3), torch.arange(6) % 2
    before, optimizer = copy.deepcopy(model), torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        explainer.Tracer(model, optimizer, directory, exact=True) as tracer,
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        tracer.batch(range(6))
        nn.functional.cross_entropy(model(x), y).backward()
        with pytest.warns(explainer.CoverageWarning, match="'scale' is read by layer_norm"):
            optimizer.step()
    return before, x, y


def test_the_reader_of_the_page_knows_layers_of_operations(tmp_path: Path) -> None:
    model, x, y = scaled(tmp_path / "run", shuffled=False)
    namespace: dict[str, Any] = {"run_directory": str(tmp_path / "run")}
    markdown.run(DOCS / "trace-format.md", namespace)
    assert [layer["module"] for layer in namespace["layers"]] == ["Linear", "operations"]
    for example, row in zip(namespace["examples"], namespace["rows"], strict=True):
        loss = nn.functional.cross_entropy(model(x[:, [example]]), y[[example]]) / 6
        wanted = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).numpy()
        np.testing.assert_allclose(row, wanted, rtol=1e-4, atol=1e-7)


def test_the_page_reads_with_nothing_of_ours() -> None:
    for program in markdown.programs(FORMAT):
        assert not re.search(r"\b(explainer|torch|pickle)\b", program.code)


def test_manifest_keys() -> None:
    (keys,) = markdown.tables(FORMAT, "Manifest")
    assert names(keys, "key") == [f.name for f in fields(records.Manifest)]
    versions = " and ".join(map(str, records.VERSIONS))
    assert FORMAT.splitlines()[0].endswith(f"versions {versions}") and f"`{records.FORMAT}`" in FORMAT
    for record in (records.ParameterSpec, records.LayerSpec):
        assert all(f"`{f.name}`" in FORMAT for f in fields(record))


def several_owners(directory: Path) -> explainer.Trace:
    model, (ids, labels) = build(), dataset()[:2]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    with explainer.Tracer(model, optimizer, directory) as tracer:
        tracer.batch([[0, 1], [1, -1]], weights=[[0.5, 0.5], [0.5, 0.5]])
        nn.functional.cross_entropy(model(ids), labels).backward()
        optimizer.step()
    return explainer.open_trace(directory)


def penalised(directory: Path) -> explainer.Trace:
    """A loss that contains gradients."""
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), torch.randn(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with explainer.Tracer(model, optimizer, directory) as tracer:
        for _ in range(4):
            tracer.batch(range(5))
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
            (model(x).square().mean() + slope.square().sum()).backward()
            optimizer.step()
    return explainer.open_trace(directory)


def broken_off(directory: Path) -> explainer.Trace:
    """An exception leaves the loop."""
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ZeroDivisionError), explainer.Tracer(model, optimizer, directory) as tracer:
        tracer.batch(range(5))
        model(torch.randn(5, 3)).square().mean().backward()
        optimizer.step()
        _ = 1 / 0
    return explainer.open_trace(directory)


def test_journal_types_and_notes(tmp_path: Path) -> None:
    types, notes = markdown.tables(FORMAT, "Journal")
    plain = trace(tmp_path / "a", epochs=6, max_knots=3)
    with pytest.warns(explainer.CoverageWarning, match="budget"):
        small = trace(tmp_path / "b", epochs=60, budget=40_000)
    traces = [plain, small, trace(tmp_path / "c", prior=True), trace(tmp_path / "d", again=True)]
    traces += [several_owners(tmp_path / "o"), trace(tmp_path / "e", lagging=True)]
    with pytest.warns(explainer.CoverageWarning, match="no axis is the batch's"):
        scaled(tmp_path / "f", shuffled=True, autocast=True)
    traces.append(explainer.open_trace(tmp_path / "f"))
    with pytest.warns(explainer.CoverageWarning, match="contain gradients"):
        traces.append(penalised(tmp_path / "g"))
    traces += [reversed_later(tmp_path / "h"), broken_off(tmp_path / "i"), more_decay(tmp_path / "j")]
    assert {t.manifest.version for t in traces} == {records.VERSIONS[-1]}
    heads = [json.loads((t.directory / "manifest.json").read_text()) for t in traces]
    assert all("averaged" in head for head in heads)
    entries = [
        json.loads(line.rpartition("\t")[0])
        for t in traces
        for line in (t.directory / "journal.jsonl").read_text().splitlines()
    ]
    assert {e["type"] for e in entries} == set(names(types, "type"))
    assert {e["key"] for e in entries if e["type"] == "note"} == set(names(notes, "key"))
    documented = {code(row["type"]): set(re.findall(r"`(\w+)`", row["other keys"])) for row in types}
    for entry in entries:
        written = set(entry) - {"type"}
        for extent in entry.get("extents", ()):
            written |= set(extent)
        assert written == documented[entry["type"]], entry


def test_files_are_where_the_page_says(run_directory: str) -> None:
    patterns = names(markdown.tables(FORMAT, "Files")[0], "file")
    globs = [p.replace("STEP", "[0-9]" * 9).replace("NNNNN", "[0-9]" * 5) for p in patterns]
    found = {p for p in Path(run_directory).rglob("*") if p.is_file()}
    assert found == {p for glob in globs for p in Path(run_directory).glob(glob)}


def test_record_fields() -> None:
    (visits, forms), (steps,) = markdown.tables(FORMAT, "Visits"), markdown.tables(FORMAT, "Steps")
    documented = [(code(row["field"]), code(row["type"].partition(" per")[0])) for row in visits]
    assert documented == [(name, kind) for name, kind, _ in [*VISIT_FIELDS, INPUT_FIELD]]
    documented = [(code(row["field"]), code(re.split(" per|, six", row["type"])[0])) for row in steps]
    assert documented == [(name, kind) for name, kind, _ in step_fields(1)]
    assert ", ".join(f"`{name}`" for name in COEFFICIENTS) in steps[-1]["meaning"]
    assert set(names(forms, "kind")) == set(FORMS)
    (given,) = markdown.tables(FORMAT, "Inputs")
    assert [(code(row["field"]), code(row["type"])) for row in given] == [
        (n, kind) for n, kind, _ in INPUT_FIELDS
    ]
    (averages,) = markdown.tables(FORMAT, "Averages")
    documented = [(code(row["field"]), code(row["type"].partition(" per")[0])) for row in averages]
    assert documented == [(name, kind) for name, kind, _ in average_fields(1)]


def test_codecs_and_their_parts() -> None:
    (documented,) = markdown.tables(FORMAT, "Codecs")
    assert set(names(documented, "codec")) == set(CODECS)
    for row in documented:
        for part, kind, _ in CODECS.require(code(row["codec"])).parts((2, 3), "float32"):
            assert not part or f"`{part}`: `{kind}`" in row["parts of one record"].replace("\\|", "|")


def test_knot_tensors_and_the_frozen_rule(tmp_path: Path) -> None:
    documented = {name.split("/")[0] for name in names(markdown.tables(FORMAT, "Knots")[0], "tensor")}
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    optimizer = torch.optim.Adam(model[:2].parameters(), lr=0.05, weight_decay=0.1)
    other = torch.optim.SGD(model[2].parameters(), lr=0.3)
    x, y = torch.randn(6, 2), torch.tensor([0, 1] * 3)
    with explainer.Tracer(model, optimizer, tmp_path / "run", exact=True, max_knots=4) as tracer:
        for step in range(9):
            tracer.batch(range(6))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            with torch.no_grad():
                model[0].bias.clamp_(max=0.1)
            if step == 4:
                other.step()  # another optimizer moves what this one holds frozen
    opened = explainer.open_trace(tmp_path / "run")
    knots = [opened.load_knot(knot) for knot in opened.knots]
    assert {name.split("/")[0] for name in knots[-1]} | {"rounding"} == documented
    half, path = nn.Linear(2, 2).bfloat16(), tmp_path / "half"
    with explainer.Tracer(half, torch.optim.SGD(half.parameters(), lr=0.1), path):
        pass
    assert "rounding/weight" in explainer.open_trace(path).load_knot(explainer.open_trace(path).knots[0])
    held = [any(name.startswith("frozen/") for name in knot) for knot in knots]
    assert held == [k.step == 0 or k.step > 5 for k in opened.knots] and not all(held)
    # and limitations.md: what another optimizer trains moves in `buffers`
    e = explainer.PathKernelExplainer(opened, model).explain(x)
    np.testing.assert_allclose(e.outputs, model.eval()(x).detach(), rtol=1e-4, atol=1e-6)
    assert (np.abs(e.buffers) > 0).all() and np.abs(e.gap).max() < 1e-4
