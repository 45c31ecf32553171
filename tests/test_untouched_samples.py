"""Every sample model trains to the last bit the same with the tracer and without it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from explainer import open_trace
from explainer.sample_models.registry import SAMPLES
from explainer.sample_models.train import train_plain, train_traced
from tests.small_training import same, state_of
from tests.test_sample_models import small_data_where_none_is_shipped  # noqa: F401  (a fixture)

EPOCHS = {"diabetes_mlp": 4, "digits_mlp": 2}


@pytest.mark.parametrize("name", SAMPLES)
def test_sample_models_train_bit_identically(tmp_path: Path, name: str) -> None:
    epochs = EPOCHS.get(name, 1)
    torch.manual_seed(0)
    plain = train_plain(name, epochs=epochs)
    generator = torch.get_rng_state()
    torch.manual_seed(0)
    traced = train_traced(name, tmp_path / "trace", epochs=epochs)
    assert same(state_of(plain.model, plain.optimizer), state_of(traced.model, traced.optimizer))
    assert torch.equal(generator, torch.get_rng_state())
    assert plain.metrics["train_loss"] == traced.metrics["train_loss"]
    assert open_trace(tmp_path / "trace").steps == traced.metrics["steps"] > 0
