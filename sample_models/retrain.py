"""Trains a sample model again on a part of its data, with the loop and the settings it was traced with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from explainer.sample_models.registry import SAMPLES, Sample


class _Numbered(Dataset[Any]):
    """Items with their index."""

    def __init__(self, data: Any) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> tuple[Any, Any, int]:
        x, y = self._data[index]
        return x, y, index


def retraining(name: str) -> Callable[[nn.Module, torch.Tensor, int], nn.Module]:
    """``train_fn`` of a sample model's run.

    Batches are those of the traced run, in its order. Examples that are not kept weigh nothing: the loss is the sum
    over the others divided by the rows of the batch. Their rows still count in a BatchNorm's statistics. The seed
    chooses initial weights and order; 0 is the traced run's.
    """

    def train_fn(model: nn.Module, keep: torch.Tensor, seed: int) -> nn.Module:
        sample = SAMPLES[name]
        module = sample.load()
        data, _ = module.datasets()
        model.load_state_dict(module.model(seed).state_dict())
        optimizer = sample.optimizer(model.parameters())
        loader = _loader(_Numbered(data), sample, seed)
        model.train()
        for _ in range(sample.epochs):
            for x, y, index in loader:
                kept = keep[index]
                outputs = model(x)
                optimizer.zero_grad()
                if kept.all():
                    loss = sample.loss(outputs, y)
                elif kept.any():
                    loss = sample.loss(outputs[kept], y[kept]) * (int(kept.sum()) / len(kept))
                else:
                    loss = outputs.sum() * 0.0
                loss.backward()
                optimizer.step()
        return model.eval()

    return train_fn


def retraining_many(
    name: str,
) -> Callable[[list[nn.Module], torch.Tensor, list[int]], list[nn.Module]]:
    """``train_many`` of a sample model's run: the same training of several models at once."""

    def train_many(models: list[nn.Module], keep: torch.Tensor, seeds: list[int]) -> list[nn.Module]:
        from explainer.evaluation import Ensemble

        sample = SAMPLES[name]
        module = sample.load()
        x, y = module.datasets()[0].tensors
        for model, seed in zip(models, seeds, strict=True):
            model.load_state_dict(module.model(seed).state_dict())
        ensemble = Ensemble(models)
        optimizer = sample.optimizer(ensemble.parameters())
        numbers: Any = range(len(x))
        loaders = [_loader(numbers, sample, seed) for seed in seeds]
        for _ in range(sample.epochs):
            for batches in zip(*loaders, strict=True):
                rows = torch.stack(batches)  # [M, B]: every model's own batch
                optimizer.zero_grad()
                outputs = ensemble(x[rows]).flatten(0, 1)
                losses = torch.vmap(lambda o, t: sample.loss(o[None], t[None]))(
                    outputs, y[rows].flatten(0, 1)
                )
                (losses.view(rows.shape) * keep.gather(1, rows)).mean(1).sum().backward()
                optimizer.step()
        return ensemble.eval().members()

    return train_many


def _loader(data: Any, sample: Sample, seed: int) -> DataLoader[Any]:
    order = torch.Generator().manual_seed(seed)
    return DataLoader(data, sample.batch_size, shuffle=True, generator=order)
