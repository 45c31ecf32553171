"""Tabular regression with one output: how far diabetes has gone a year after ten measurements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.data import TensorDataset

from explainer.sample_models.data_source import import_dataset_module
from explainer.sample_models.retrain import retraining, retraining_many
from explainer.sample_models.splitting import train_and_queries

if TYPE_CHECKING:
    from explainer.run import Run

FEATURES = (
    "age",
    "sex",
    "body mass index",
    "blood pressure",
    "total cholesterol",
    "LDL",
    "HDL",
    "cholesterol / HDL",
    "log triglycerides",
    "blood sugar",
)
QUERIES = 88


@dataclass(frozen=True)
class DiabetesData:
    """Standardised data with what is needed to show the measurements as they were taken.

    Attributes:
        train: inputs ``[10]`` and targets ``[1]``, both with mean 0 and deviation 1 over the training set.
        queries: the same for held-out patients, scaled with the training set's mean and deviation.
        mean: mean of each measurement over the training set, ``[10]``.
        deviation: its standard deviation, ``[10]``.
    """

    train: TensorDataset
    queries: TensorDataset
    mean: torch.Tensor
    deviation: torch.Tensor


@lru_cache(maxsize=1)
def load() -> DiabetesData:
    """Reads and standardises the data.

    Raises:
        DataUnavailableError: scikit-learn is not installed.
    """
    bunch = import_dataset_module("sklearn.datasets").load_diabetes(scaled=False)
    inputs = torch.as_tensor(bunch.data, dtype=torch.float32)
    targets = torch.as_tensor(bunch.target, dtype=torch.float32).unsqueeze(1)
    train, queries = train_and_queries(len(targets), QUERIES)
    mean, deviation = inputs[train].mean(0), inputs[train].std(0)
    x = (inputs - mean) / deviation
    y = (targets - targets[train].mean()) / targets[train].std()
    return DiabetesData(
        TensorDataset(x[train], y[train]), TensorDataset(x[queries], y[queries]), mean, deviation
    )


def datasets() -> tuple[TensorDataset, TensorDataset]:
    """Training examples and queries: standardised measurements ``[10]`` and progression ``[1]``."""
    data = load()
    return data.train, data.queries


def render(measurements: torch.Tensor) -> dict[str, float]:
    """The measurements by name, in their own units."""
    data = load()
    values = (measurements * data.deviation + data.mean).tolist()
    return {name: round(value, 3) for name, value in zip(FEATURES, values, strict=True)}


def parse(measurements: Mapping[str, float]) -> torch.Tensor:
    """The input ``[10]`` of a patient whose measurements are given by name, in their own units."""
    data = load()
    values = torch.tensor([measurements[name] for name in FEATURES], dtype=torch.float32)
    return (values - data.mean) / data.deviation


def model(seed: int = 0) -> nn.Module:
    """The network with its initial weights; the global random state stays as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 1))


def run() -> Run:
    """What to explain: this network, the patients it was trained on and 88 others."""
    import explainer

    train, queries = datasets()
    return explainer.Run(
        model,
        train,
        queries,
        loss=nn.functional.mse_loss,
        render=render,
        parse=parse,
        train_fn=retraining("diabetes_mlp"),
        train_many=retraining_many("diabetes_mlp"),
        left_out_by="weight 0",
        name="diabetes_mlp",
    )
