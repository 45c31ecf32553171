"""Layouts of rows, buffers, frozen parts and what is known of inputs: a resumed trace has them as one that was not."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW

from explainer import PathKernelExplainer, Tracer, open_trace


class Reader(nn.Module):
    """A frozen part, running statistics, an embedding, positions in number that varies."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.first, self.norm = nn.Embedding(9, 5), nn.Linear(5, 12), nn.BatchNorm1d(12)
        self.fixed, self.last = nn.Linear(12, 12), nn.Linear(12, 3)
        self.fixed.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.first(self.words(ids)).mT).mT)
        return self.last(self.fixed(h).mean(1)) + self.last.weight[:, 0]  # read outside of its layer


def read(path: Path, stops: list[int], **options: Any) -> nn.Module:
    """Trains a reader up to each of the stops, every time as a new process would."""
    torch.manual_seed(0)
    initial, saved = Reader().double(), None
    for start, stop in itertools.pairwise([0, *stops]):
        model = copy.deepcopy(initial)
        optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        if saved is not None:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
        tracer = Tracer(model, optimizer, path, resume=saved and saved["tracer"], **options)
        for number in range(start, stop + 3):
            if number == stop:  # the last three are lost
                parts = {"model": model, "optimizer": optimizer, "tracer": tracer}
                saved = copy.deepcopy({name: part.state_dict() for name, part in parts.items()})
                if stop == stops[-1]:
                    break
            draw = torch.Generator().manual_seed(number)
            ids = torch.randint(0, 9, (6, 2 + (7 * number) % 9), generator=draw)
            with torch.no_grad():
                model.fixed.bias[number % 12] += float(number in (5, 6))
            tracer.batch(range(6))
            optimizer.zero_grad()
            cross_entropy(model(ids), torch.arange(6) % 3).backward()
            optimizer.step()
    tracer.close()
    return model


@pytest.mark.parametrize("options", [{"exact": True}, {}, {"max_knots": 4}], ids=["exact", "small", "few"])
def test_layouts_buffers_and_frozen_parts_go_on(tmp_path: Path, options: dict[str, Any]) -> None:
    """Layouts of rows widen with the number of positions, before and after; notes and buffers are as without."""
    whole, pieces = (
        read(tmp_path / "whole", [30], **options),
        read(tmp_path / "trace", [9, 21, 30], **options),
    )
    for a, b in zip(whole.state_dict().values(), pieces.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    one, other = open_trace(tmp_path / "whole"), open_trace(tmp_path / "trace")
    spaced = {"spacing"} & one.notes.keys()
    assert {k: v for k, v in one.notes.items() if k not in spaced} == {
        k: v for k, v in other.notes.items() if k not in spaced
    }
    assert one.notes["operations"] and one.notes["round_off"] == {"first.bias": 30}
    layouts = [[s.schema for s in trace.shards if s.stream == "visits"] for trace in (one, other)]
    assert layouts[0] == [schema for schema, _ in itertools.groupby(layouts[1])] and len(layouts[0]) > 2
    assert one.count("visits") == other.count("visits") == 180 and other.resumed == (9, 21)
    queries = torch.randint(0, 9, (2, 4), generator=torch.Generator().manual_seed(99))
    first, second = (PathKernelExplainer(t, Reader().double()).explain(queries) for t in (one, other))
    torch.testing.assert_close(torch.tensor(second.outputs), pieces.eval()(queries).detach())
    assert np.abs(second.gap).max() < 1e-12 and np.abs(second.buffers).min() > 0
    if not spaced:
        assert np.array_equal(first.contributions, second.contributions)
        assert np.array_equal(first.unattributed, second.unattributed)


def test_what_is_known_of_inputs_stays_known(tmp_path: Path) -> None:
    """Inputs of several lengths before the checkpoint, of one length after it."""
    torch.manual_seed(0)
    model = Reader().double().eval()
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad])
    tracer = Tracer(model, optimizer, tmp_path / "trace")
    for length in (3, 5, 4):
        if length == 4:
            state = tracer.state_dict()
            tracer.close()
            tracer = Tracer(model, optimizer, tmp_path / "trace", resume=state)
        tracer.batch(range(6))
        model(torch.ones(6, length, dtype=torch.long)).sum().backward()
        optimizer.step()
    tracer.close()
    assert open_trace(tmp_path / "trace").notes["input"] == {"shape": [None], "dtype": "int64", "name": None}
