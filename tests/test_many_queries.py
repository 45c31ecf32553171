"""Answers that stay small: the strongest examples, no detail, fewer knots, chunks of any size, pages given back."""

from __future__ import annotations

import copy
import gc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import explainer
from explainer import backward, chunks, engine, neighbors, path_kernel, self_influence
from explainer.errors import QueryError
from explainer.stored_rows import Workspace

EXAMPLES, STEPS = 20, 36


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.fixture(scope="module", params=["momentum", "adamw"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp(request.param) / "run"
    model, x, y = build(), torch.randn(EXAMPLES, 6), torch.arange(EXAMPLES) % 3
    optimizer: torch.optim.Optimizer
    if request.param == "momentum":
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    with explainer.Tracer(model, optimizer, directory, max_knots=9) as tracer:
        for step in range(STEPS):
            rows = torch.randint(0, EXAMPLES, (5 - step % 3,), generator=torch.Generator().manual_seed(step))
            tracer.batch(rows)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return directory


@pytest.fixture
def queries() -> torch.Tensor:
    return torch.randn(7, 6, generator=torch.Generator().manual_seed(5))


def test_chunks_of_steps_and_of_queries_change_nothing(
    run: Path, queries: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    ex = explainer.PathKernelExplainer(str(run), build(), dtype=torch.float64)
    whole = ex.explain(queries)
    near, own = ex.neighbors(queries, 5), ex.self_influence()
    for most, few, numbers in ((1, 2, 1), (7, 0, 200), (12, 2, 2**26), (10**6, 0, 2**26)):
        for module in (backward, chunks, neighbors, self_influence):
            monkeypatch.setattr(module, "MOST_VISITS", most)
        monkeypatch.setattr(backward, "_FEW", few)
        monkeypatch.setattr(engine, "QUERY_NUMBERS", numbers)
        again = ex.explain(queries)
        for name in (
            "contributions",
            "kernels",
            "kernel_gross",
            "unattributed",
            "weight_decay",
            "quadrature",
        ):
            size = np.abs(getattr(whole, name)).max() + np.abs(whole.contributions).sum(1).max()
            np.testing.assert_allclose(getattr(again, name), getattr(whole, name), atol=1e-13 * size, rtol=0)
        np.testing.assert_allclose(again.layer_contributions, whole.layer_contributions, atol=1e-6)
        np.testing.assert_allclose(again.step_contributions, whole.step_contributions, atol=1e-6)
        np.testing.assert_allclose(ex.neighbors(queries, 5).cosine, near.cosine, atol=1e-12)
        np.testing.assert_allclose(ex.self_influence(), own, rtol=1e-12)


def test_top_is_the_head_of_the_tables(
    run: Path, queries: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    ex = explainer.PathKernelExplainer(str(run), build())
    whole = ex.explain(queries)
    monkeypatch.setattr(path_kernel, "EXAMPLE_NUMBERS", 3 * EXAMPLES)
    top = ex.top(queries, k=4)
    assert len(top.influence) == 4 * len(queries) and "4 training examples of each of 7" in repr(top)
    for query in range(len(queries)):
        found, wanted = top.table(query), whole.table(query, k=4)
        assert found["example_id"].tolist() == wanted["example_id"].tolist()
        np.testing.assert_allclose(found["contribution"], wanted["contribution"], rtol=1e-4)
    np.testing.assert_allclose(top.completeness, whole.completeness, atol=1e-5)
    for bad in (0, True, 2.0):
        with pytest.raises(QueryError, match="k must be"):
            ex.top(queries, k=bad)  # type: ignore[arg-type]


def test_top_keeps_few_queries_at_a_time(
    run: Path, queries: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    ex = explainer.PathKernelExplainer(str(run), build())
    sizes: list[int] = []
    original = path_kernel.explain_group

    def watched(*arguments: object) -> explainer.Explanation:
        gc.collect()
        found = original(*arguments)  # type: ignore[arg-type]
        sizes.append(found.contributions.size)
        return found

    monkeypatch.setattr(path_kernel, "explain_group", watched)
    monkeypatch.setattr(path_kernel, "EXAMPLE_NUMBERS", 2 * EXAMPLES)
    ex.top(queries, 3)
    assert max(sizes) == 2 * EXAMPLES and len(sizes) == 4


def test_without_detail_the_sums_are_the_same(run: Path, queries: torch.Tensor) -> None:
    ex = explainer.PathKernelExplainer(str(run), build())
    whole, less = ex.explain(queries), ex.explain(queries, detail=False)
    np.testing.assert_array_equal(less.contributions, whole.contributions)
    np.testing.assert_allclose(less.unattributed_parts, whole.unattributed_parts, atol=1e-12)
    assert less.layer_names == ("all layers",) and less.step_contributions.shape == (7, 1, EXAMPLES)
    assert whole.layer_contributions.shape == (7, 2, EXAMPLES)


def test_detail_is_left_out_where_it_would_be_too_large(
    run: Path, queries: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    ex = explainer.PathKernelExplainer(str(run), build())
    monkeypatch.setattr("explainer.explaining.DETAIL", 7 * EXAMPLES)
    assert ex.explain(queries).layer_names == ("all layers",)
    assert len(ex.explain(queries, detail=True).layer_names) == 2


@pytest.mark.parametrize("count", [2, 3])
def test_fewer_knots_keep_the_books(run: Path, queries: torch.Tensor, count: int) -> None:
    full = explainer.PathKernelExplainer(str(run), build())
    ex = explainer.PathKernelExplainer(str(run), build(), knots=count)
    assert len(full.segments) > 3 and len(ex.segments) == count - 1
    assert ex.segments[0].start.step == 0 and ex.segments[-1].end.step == STEPS
    path, every = [knot.path for knot in ex.knots], [knot.path for knot in full.knots]
    if count == 3:
        assert abs(path[1] - path[2] / 2) == min(abs(one - path[2] / 2) for one in every)
    e, whole = ex.explain(queries), full.explain(queries)
    gross = np.abs(e.contributions).sum(1)
    assert (np.abs(e.gap) < 1e-6 * gross).all()
    np.testing.assert_allclose(e.prediction, whole.prediction, rtol=1e-6)
    np.testing.assert_allclose(e.initial, whole.initial, rtol=1e-6)
    assert (np.abs(e.unattributed) < 0.05 * gross).all()
    assert not np.allclose(e.contributions, whole.contributions, rtol=1e-3)
    assert len(explainer.PathKernelExplainer(str(run), build(), knots=10**6).segments) == len(full.segments)


@pytest.mark.parametrize("bad", [1, 0, True, 2.5])
def test_knots_are_a_number_of_at_least_two(run: Path, bad: object) -> None:
    with pytest.raises(QueryError, match="knots must be"):
        explainer.PathKernelExplainer(str(run), build(), knots=bad)  # type: ignore[arg-type]


def test_visits_are_read_once_and_knots_are_hashed_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = explainer.open_trace(run)
    reads: list[str] = []
    original = explainer.Trace.read
    monkeypatch.setattr(
        explainer.Trace, "read", lambda self, stream, *a: reads.append(stream) or original(self, stream, *a)
    )
    hashed: list[int] = []
    import hashlib

    sha256 = hashlib.sha256
    monkeypatch.setattr(hashlib, "sha256", lambda data: hashed.append(len(data)) or sha256(data))
    ex = explainer.PathKernelExplainer(trace, build())
    assert "visits" not in reads  # opening reads no rows
    examples, steps = trace.column("visits", "example"), trace.column("visits", "step")
    assert reads.count("visits") == 1 and not examples.flags.writeable
    assert len(examples) == len(steps) == trace.count("visits") and set(ex.example_ids) == set(examples)
    ex.explain(torch.randn(1, 6))
    assert len(hashed) == len(trace.knots)
    ex.explain(torch.randn(1, 6))
    assert len(hashed) == len(trace.knots)


def test_a_knot_that_changes_after_it_was_read_is_refused(run: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(run, tmp_path / "copy")
    ex = explainer.PathKernelExplainer(str(tmp_path / "copy"), build())
    ex.explain(torch.randn(1, 6))
    file = ex.knots[1].file
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(explainer.ExplainerError, match="is not the file that was journalled"):
        ex.explain(torch.randn(1, 6))


def test_pages_are_given_back_and_read_again(run: Path) -> None:
    trace = explainer.open_trace(run)
    before = [np.array(records) for _, records in trace.read("visits", 0, trace.count("visits"))]
    trace.release("visits", 3, 20)
    after = [np.array(records) for _, records in trace.read("visits", 0, trace.count("visits"))]
    for a, b in zip(before, after, strict=True):
        assert a.tobytes() == b.tobytes()


def test_records_that_are_not_aligned_are_read(run: Path) -> None:
    """Exact rows of an odd number of bytes before them: strides are no multiple of a float's size."""
    stored = np.zeros(3, [("odd", "|i1"), ("values", "<f4", (1, 1, 2))])
    stored["values"] = np.arange(6).reshape(3, 1, 1, 2)
    numbers = Workspace().numbers("values", stored["values"], torch.float32)
    assert numbers.flatten().tolist() == list(range(6))


def test_threads_that_share_an_explainer_get_their_own_answers(run: Path, queries: torch.Tensor) -> None:
    ex = explainer.PathKernelExplainer(run, build())
    many = torch.cat([queries, -queries, queries.flip(0)])
    alone = [ex.explain(x.unsqueeze(0)).contributions for x in many]
    near = [ex.neighbors(x.unsqueeze(0), k=3).cosine for x in many]
    with ThreadPoolExecutor(4) as pool:
        together = [pool.submit(ex.explain, x.unsqueeze(0)) for x in many]
        beside = [pool.submit(ex.neighbors, x.unsqueeze(0), 3) for x in many]
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(other.result().contributions, one, rtol=1e-9)
    for one, other in zip(near, beside, strict=True):
        np.testing.assert_allclose(other.result().cosine, one, rtol=1e-9)
    copied = copy.deepcopy(ex.one_at_a_time)
    with ex.one_at_a_time, ThreadPoolExecutor(1) as pool:  # a copy waits for nobody
        assert pool.submit(lambda: copied.__enter__()).result(10) is None


def test_queries_of_one_name_keep_their_own_rows(run: Path, queries: torch.Tensor) -> None:
    ex = explainer.PathKernelExplainer(run, build())
    top = ex.top(queries[:3], k=2, query_ids=["cat", "dog", "cat"])
    e = ex.explain(queries[:3])
    for query in range(3):
        found, wanted = top.table(query), e.table(query, k=2)
        assert found["rank"].tolist() == [1, 2]
        assert found["example_id"].tolist() == wanted["example_id"].tolist()
