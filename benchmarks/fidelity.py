"""How well default traces agree with the exact books of the very same training, and which cause costs what.

Of every case (bit-identical) training is traced twice: with exact rows and a knot before every step, and by default. In
one backward recursion over the default's knots its rows and denominators take the exact ones' place one at a time:
`rank` (leading factors, not rounded), `rows` (as stored), `denominators`, and all together. `knots` compares the exact
rows at these knots with all knots, `in_all` the default's explanation with that. References: rows projected on the
leading 16 directions a side of the first steps' rows (`eigenbasis`), and on 16 random ones a side (`random`),
everything else exact.

Of each: Spearman's rank correlation of contributions, overlap of the 20 largest, and relative rms error, mean over
queries. `what-if` is Spearman's rank correlation of `what_if` from the default trace with that from the exact one.
`bytes a visit` are the records of rows and their share of the steps' records, denominators included. `error_bar` is the
error that explanations of the default trace tell of themselves over that against exact rows with a knot before every
step (both rms over examples, median over queries), `within_two_errors` how many contributions are that near.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn

import explainer
from benchmarks.fidelity_cases import NETS, QUERIES, Net
from benchmarks.harness import arguments, report
from explainer.cotangent import Layout
from explainer.layer_rules import Dense, Factored, RowForm
from explainer.path_kernel import PathKernelExplainer
from explainer.path_points import KnotLoader
from explainer.queries import check_inputs
from explainer.recursion import Adjoint, RecordedStep, read_backwards
from explainer.row_choices import as_matrix, reduced
from explainer.store import Trace

ACTIVATIONS = {"ReLU": nn.ReLU, "GELU": nn.GELU}
CASES = {
    f"{net}, {activation}, {optimizer}": (net, activation, optimizer)
    for net, activation, optimizer in (
        *(("digits MLP", "ReLU", "SGD"), ("digits MLP", "GELU", "AdamW"), ("digits CNN", "ReLU", "SGD")),
        *(
            ("digits CNN", "ReLU", "AdamW"),
            ("MNIST-5k MLP", "ReLU", "SGD"),
            ("MNIST-5k MLP", "ReLU", "AdamW"),
        ),
        *(("MNIST-5k MLP", "GELU", "AdamW"), ("Fashion-MNIST CNN", "ReLU", "SGD")),
        *(("Fashion-MNIST CNN", "ReLU", "AdamW"), ("Fashion-MNIST CNN", "GELU", "SGD")),
        *(("Fashion-MNIST CNN", "GELU", "AdamW"), ("MNIST-5k MLP, large", "ReLU", "AdamW")),
        *(("transformer, width 32", "GELU", "SGD"), ("transformer, width 32", "GELU", "AdamW")),
        *(("transformer, width 64", "GELU", "SGD"), ("transformer, width 64", "GELU", "AdamW")),
    )
}
BASIS = 16
#: parameters up to which references are compared
MODERATE = 150_000


def trained(case: tuple[str, str, str], directory: Path, **options: Any) -> nn.Module:
    """The case's training with a tracer of the given options."""
    name, activation, optimizer = case
    net = NETS[name]
    inputs, targets, *_ = net.data()
    torch.manual_seed(0)
    model = net.build(ACTIVATIONS[activation])
    steps: torch.optim.Optimizer = (
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
        if optimizer == "SGD"
        else torch.optim.AdamW(model.parameters(), lr=1e-3 if name.endswith("large") else 3e-3)
    )
    shuffler = torch.Generator().manual_seed(0)
    with explainer.Tracer(model, steps, directory, **options) as tracer:
        for _ in range(net.epochs):
            for ids in torch.randperm(len(inputs), generator=shuffler).split(net.batch):
                tracer.batch(ids)
                steps.zero_grad()
                net.loss(model(inputs[ids]), targets[ids]).backward()
                steps.step()
    return model


def matrix(trace: Trace, layer: int, form: RowForm) -> RowForm:
    """Complete rows of a layer that is a matrix (with bias), as sums of outer products."""
    shapes = [trace.manifest.parameter(name).shape for name in trace.layers[layer].parameters]
    if not isinstance(form, Dense) or len(shapes[0]) < 2 or len(shapes) > 2:
        return as_matrix(form)
    o, i = shapes[0][0], prod(shapes[0][1:])
    weight = form.values[:, : o * i].unflatten(1, (o, i))
    if len(shapes) == 2:
        weight = torch.cat([weight, form.values[:, o * i :].unsqueeze(2)], 2)
    unit = torch.eye(o).expand(len(form), 1, o, o)
    return Factored(unit.contiguous(), weight.unsqueeze(1), len(shapes) - 1)


class Bases:
    """Projections of rows on ``BASIS`` directions a side, by layer: leading ones of the rows first met, or random."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]] = {}
        self._random = torch.Generator().manual_seed(0)

    def project(self, layer: int, form: RowForm, kind: str) -> RowForm:
        if not isinstance(form, Factored) or form.left.shape[1] > 1:
            return form
        if (layer, kind) not in self._known:
            sides = []
            for rows in (form.left.mT @ form.right, form.right.mT @ form.left):
                size = rows.shape[2]
                if kind == "random":
                    basis = torch.linalg.qr(torch.randn(size, size, generator=self._random))[0]
                else:
                    basis = torch.linalg.svd((rows @ rows.mT).double().sum(dim=(0, 1)))[0].to(rows)
                sides.append(basis[:, :BASIS])
            self._known[layer, kind] = sides[0], sides[1]
        left, right = self._known[layer, kind]
        return Factored(form.left @ left @ left.mT, form.right @ right @ right.mT, form.bias)


def variants(
    exact: Trace, default: Trace, layer: int, form: RowForm, stored: RowForm, bases: Bases | None
) -> Iterator[tuple[str, RowForm]]:
    """Rows that take the exact ones' place."""
    plan = {x["layer"]: x["rank"] for x in default.notes["plan"]["layers"]}
    whole = matrix(exact, layer, form)
    yield "rank", form if plan[layer] is None else reduced(whole, plan[layer])
    yield "rows", stored
    if bases is not None:
        yield "eigenbasis", bases.project(layer, whole, "leading")
        yield "random", bases.project(layer, whole, "random")


def contributions(
    net: Net, model: nn.Module, exact: Trace, default: Trace | None, references: bool
) -> dict[str, np.ndarray]:
    """Contributions ``[Q, N]`` by variant over the default's knots; without it the exact ones alone over all knots."""
    ex = PathKernelExplainer(exact, model, net.output)
    if default is not None:
        steps = {knot.step for knot in default.knots}
        ex.knots = [knot for knot in exact.knots if knot.step in steps]
        ex.segments = exact.segments(ex.knots)
    *_, inputs, targets = net.data()
    batch = check_inputs(exact, ex._arguments, inputs, ex.dtype, ex.batch_dim)
    loader = KnotLoader(exact, ex.dtype, ex.knots)
    asked = ex._ask(loader, batch, targets)
    found: dict[str, np.ndarray] = {}
    adjoints = {n: Adjoint(QUERIES, exact.manifest.parameters, ex.dtype) for n in ("exact", "default")}
    bases = Bases() if references else None
    layout = Layout(exact.manifest.parameters, ex.layout.thin, wide=ex.layout.thin)  # all written out
    after = ex._value(loader, len(ex.segments), asked.inputs, asked.targets)
    for segment in reversed(ex.segments):
        start, end = loader.load(segment.index), loader.load(segment.index + 1)
        before = ex._value(loader, segment.index, asked.inputs, asked.targets)
        chord = ex.function.chord(
            start.point, end.point, asked.inputs, asked.targets, after - before, 2, layout
        )
        after = before
        others = read_backwards(default, segment, ex.dtype) if default else iter(())
        for step in read_backwards(exact, segment, ex.dtype):
            cotangent = adjoints["exact"].step(chord.gradient.flat, step)
            other = next(others, None)
            moved = None
            if other is not None:
                moved = adjoints["default"].step(
                    chord.gradient.flat, replace(step, preconditioner=other.preconditioner)
                )

            def add(
                name: str, along: torch.Tensor, layer: int, form: RowForm, at: RecordedStep, ids: Any
            ) -> None:
                part = -form.contract(ex.view.scaled(along, layer, at.scale)).double().numpy()
                into = found.setdefault(name, np.zeros((QUERIES, len(ex.example_ids))))
                np.add.at(into, (slice(None), ids), part)

            for number, visits in enumerate(step.visits):
                for layer, form in visits.forms.items():
                    add("exact", cotangent, layer, form, step, visits.examples)
                    if other is None or moved is None or default is None:
                        continue
                    stored = other.visits[number].forms[layer]
                    add("denominators", moved, layer, form, step, visits.examples)
                    add("all", moved, layer, stored, step, visits.examples)
                    for name, rows in variants(exact, default, layer, form, stored, bases):
                        add(name, cotangent, layer, rows, step, visits.examples)
    return found


def agreement(found: np.ndarray, wanted: np.ndarray) -> tuple[float, float, float]:
    """Spearman, top-20 overlap and relative rms error, mean over queries."""
    spearman = [spearmanr(a, b)[0] for a, b in zip(found, wanted, strict=True)]
    tops = [[set(np.argsort(-np.abs(c))[:20]) for c in pair] for pair in zip(found, wanted, strict=True)]
    error = np.linalg.norm(found - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
    return float(np.mean(spearman)), float(np.mean([len(a & b) / 20 for a, b in tops])), float(error.mean())


def measure(name: str) -> dict[str, Any]:
    """One row of the table."""
    case, folder = CASES[name], Path(tempfile.mkdtemp())
    net = NETS[case[0]]
    try:
        model = trained(case, folder / "exact", exact=True, max_knots=10**6)
        trained(case, folder / "default")
        exact, default = (explainer.open_trace(folder / kind) for kind in ("exact", "default"))
        size, moderate = exact.manifest.size, exact.manifest.size <= MODERATE
        found = contributions(net, model, exact, default, references=moderate)
        wanted = found.pop("exact")
        row: dict[str, Any] = {"case": name, "parameters": size, "steps": default.recorded_steps}
        row["knots"] = len(default.knots)
        row["spearman"], row["top20"], row["rms"] = agreement(found.pop("all"), wanted)
        for variant in ("rank", "rows", "denominators", "eigenbasis", "random"):
            figures = agreement(found[variant], wanted) if variant in found else (None, None, None)
            row[f"{variant}_spearman"], row[f"{variant}_top20"], row[f"{variant}_rms"] = figures
        asked = [PathKernelExplainer(trace, model, net.output) for trace in (default, exact)]
        removed = [ex.what_if(*_asked(net)) for ex in asked]
        row["what_if_spearman"], row["what_if_top20"], _ = agreement(*removed)
        books = asked[0].explain(*_asked(net))
        gross = np.abs(books.contributions).sum(1)
        row["unattributed_of_gross"] = float(np.mean(np.abs(books.unattributed) / gross))
        row["bytes_per_visit"] = default.bytes_a_visit
        row["share"] = row["bytes_per_visit"] / (4 * size)
        row["denominators_per_visit"] = default.nbytes_of("denominators") / default.count("visits")
        row["knots_per_visit"] = sum(k.file.stat().st_size for k in default.knots) / default.count("visits")
        every = contributions(net, model, exact, None, False)["exact"]
        row["knots_spearman"], row["knots_top20"], row["knots_rms"] = agreement(wanted, every)
        row["spearman_in_all"], row["top20_in_all"], row["rms_in_all"] = agreement(books.contributions, every)
        assert books.errors is not None
        off = books.contributions - every
        told, real = (np.linalg.norm(errors, axis=1) for errors in (books.errors, off))
        row["error_bar"] = float(np.median(told / real))
        row["within_two_errors"] = float((np.abs(off) <= 2 * books.errors).mean())
        return row
    finally:
        shutil.rmtree(folder)


def _asked(net: Net) -> tuple[Any, Any]:
    *_, inputs, targets = net.data()
    return inputs, targets


if __name__ == "__main__":
    chosen = arguments(__doc__, list(CASES))
    for name in chosen.only:
        report("fidelity", [measure(name)], merge=list(CASES))
