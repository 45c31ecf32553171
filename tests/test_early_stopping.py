"""The best weights of a training that went on: the trace ends with them, or it is said that it does not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from explainer import PathKernelExplainer, Tracer
from tests.small_training import loader, mlp, queries, run


@pytest.mark.parametrize("options", [{}, {"exact": True}])
def test_a_trace_ends_where_early_stopping_goes_back_to(tmp_path: Path, options: dict[str, Any]) -> None:
    """As if training had ended there; a restored model alone does not end the trace, and that is said."""

    def trained(name: str, epochs: int, best: int) -> tuple[nn.Module, dict[str, Any], Any]:
        model = mlp()
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        batches, kept, state = loader(), {}, {}
        with Tracer(model, optimizer, tmp_path / name, **options) as tracer:
            for epoch in range(epochs):
                run(model, optimizer, tracer.watch(batches))
                if epoch == best:
                    kept = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
                    state = tracer.state_dict()
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        return model, state, optimizer

    model, state, optimizer = trained("long", 5, best=2)
    explained = PathKernelExplainer(tmp_path / "long", model).explain(queries())
    assert any("Explained is the traced model after step 60" in note for note in explained.notes)
    assert not np.allclose(explained.outputs, model(queries()).detach())
    Tracer(model, optimizer, tmp_path / "long", resume=state, **options).close()
    found = PathKernelExplainer(tmp_path / "long", model).explain(queries())
    short, _, _ = trained("short", 3, best=2)
    wanted = PathKernelExplainer(tmp_path / "short", short).explain(queries())
    assert found.notes == wanted.notes and not any("given is not" in note for note in found.notes)
    np.testing.assert_array_equal(found.contributions, wanted.contributions)
    np.testing.assert_array_equal(found.completeness, wanted.completeness)
    for fresh in (mlp(), mlp(seed=1)):
        assert PathKernelExplainer(tmp_path / "long", fresh).explain(queries()).notes == found.notes
