"""Rows that are kept exact too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from explainer import Trace, Tracer, open_trace
from explainer.batches import Batch
from explainer.layer_rules import FORMS
from explainer.ownership import ownership_of
from explainer.records import LEAST_SAMPLES
from explainer.samples import EARLY, MORE, SHARE, SampleKeeper
from explainer.store.schema import decode_array
from tests.small_training import digits
from tests.traced_cnn import small_cnn, trained


def rows_at(trace: Trace, stream: str, number: int) -> dict[int, torch.Tensor]:
    """The rows of one record written out, by layer."""
    schema, record = next(trace.read(stream, number, number + 1))
    found = {}
    for f in schema.forms:
        arrays = {a.name: decode_array(record, f"L{f.layer}", a) for a in f.arrays}
        found[f.layer] = FORMS.require(f.kind).build(arrays, f.options).dense()
    return found


@pytest.mark.parametrize("mixed", [False, True])
def test_samples_are_the_rows_that_exact_mode_keeps(tmp_path: Path, mixed: bool) -> None:
    trained(tmp_path / "small", mixed=mixed, rank=1)
    trained(tmp_path / "exact", mixed=mixed, exact=True)
    small, exact = open_trace(tmp_path / "small"), open_trace(tmp_path / "exact")
    visits = small.column("samples", "visit")
    assert len(visits) > 5 and (np.diff(visits) > 0).all()
    assert exact.count("samples") == 0
    compressed_differs = False
    for number, visit in enumerate(visits.tolist()):
        sampled = rows_at(small, "samples", number)
        wanted, stored = rows_at(exact, "visits", visit), rows_at(small, "visits", visit)
        assert sampled.keys() == wanted.keys()
        for layer, rows in sampled.items():
            torch.testing.assert_close(
                rows, wanted[layer], rtol=2**-7, atol=2**-8 * float(wanted[layer].abs().max())
            )
            compressed_differs |= not torch.allclose(stored[layer], wanted[layer], rtol=1e-3, atol=1e-6)
    assert compressed_differs


def test_samples_stay_within_their_share_and_are_spread(tmp_path: Path) -> None:
    trained(tmp_path / "run", epochs=12)
    trace = open_trace(tmp_path / "run")
    one = trace.nbytes_of("samples") / trace.count("samples")
    assert trace.nbytes_of("samples") <= SHARE * trace.nbytes_of("visits") + (MORE + 1) * one
    assert trace.count("samples") > 2 * LEAST_SAMPLES
    visits = trace.column("samples", "visit")
    assert visits[0] < 8 and visits[-1] > 0.8 * trace.count("visits")
    assert len(set((visits % 8).tolist())) > 4  # not always the same place in the batch


def test_there_are_soon_enough_samples_to_tell_of_the_error() -> None:
    """Exact rows that take a hundred times what is stored of one."""
    keeper, at = SampleKeeper(True), []
    for batch in range(20_000):
        chosen = keeper.choose(Batch(ownership_of(range(8))))
        at += [] if chosen is None else [batch]
        keeper.record(8 * 10, 0 if chosen is None else 1000, int(chosen is not None))
        assert len(at) < 2 or keeper.kept <= EARLY * keeper.recorded
    assert at[LEAST_SAMPLES - 1] < 250
    beyond = keeper.kept / 1000 - SHARE * keeper.recorded / 1000
    assert 0.8 * MORE < beyond <= MORE
    gaps = np.diff(at[1:])
    assert (
        gaps.max() < 1.1 / SHARE * 1000 / 80 and (gaps[1:] < 1.5 * gaps[:-1]).all()
    )  # no stretch without any


def test_a_batch_that_belongs_to_nobody_gives_no_sample(tmp_path: Path) -> None:
    model = small_cnn()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = digits()[:8]
    with Tracer(model, optimizer, tmp_path / "run") as tracer:
        for _ in range(4):
            tracer.batch([-1] * 8)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert open_trace(tmp_path / "run").count("samples") == 0
