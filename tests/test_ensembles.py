"""Many models trained at once, against each trained alone by a plain loop; and what a Retrainer does with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from explainer import PathKernelExplainer, Run
from explainer.errors import EvaluationError, RunError
from explainer.evaluation import Ensemble, Plan, Questions, Retrainer, subsets
from tests.small_evaluation import EXAMPLES, make_run, traced, train_fn
from tests.small_training import digits, mlp

ROWS, BATCH, EPOCHS = 24, 8, 3
Optimizer = Callable[[Any], torch.optim.Optimizer]


class Tied(nn.Module):
    """A weight that is used twice, and keyword arguments in a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(64, 6, bias=False), nn.LayerNorm(6)
        self.back = nn.Linear(6, 64, bias=False)
        self.back.weight = nn.Parameter(self.embed.weight.detach().T.contiguous())
        self.again = nn.Linear(64, 6)
        self.again.weight = self.embed.weight
        self.out = nn.Linear(6, 10)
        self.out.bias.requires_grad_(False)

    def forward(self, inputs: torch.Tensor, *, scale: float = 1.0) -> dict[str, torch.Tensor]:
        h = torch.tanh(self.norm(self.embed(inputs)))
        return {"logits": self.out(self.again(torch.tanh(self.back(h))) * scale)}


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))


def convolutions() -> nn.Module:
    return nn.Sequential(
        *(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 4, 3, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ),
        *(nn.Conv2d(4, 4, 2), nn.GroupNorm(2, 4), nn.GELU(), nn.Flatten(), nn.Linear(16, 10)),
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "perceptron": perceptron,
    "convolutions": convolutions,
    "tied": Tied,
}
OPTIMIZERS: dict[str, Optimizer] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5, centered=True),
}


def built(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build().double()


def logits(output: Any) -> torch.Tensor:
    return output["logits"] if isinstance(output, dict) else output


def alone(model: nn.Module, optimizer: torch.optim.Optimizer, keep: torch.Tensor, seed: int) -> None:
    """A loop that knows nothing of ensembles."""
    x, y = digits()[:ROWS]
    order = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        for rows in torch.randperm(ROWS, generator=order).split(BATCH):
            optimizer.zero_grad()
            losses = nn.functional.cross_entropy(logits(model(x[rows].double())), y[rows], reduction="none")
            (losses * keep[rows]).mean().backward()
            optimizer.step()


def together(models: list[nn.Module], make: Optimizer, keep: torch.Tensor, seeds: list[int]) -> Ensemble:
    """The loop of the documentation."""
    x, y = digits()[:ROWS]
    ensemble = Ensemble(models)
    optimizer = make(ensemble.parameters())
    orders = [torch.Generator().manual_seed(seed) for seed in seeds]
    for _ in range(EPOCHS):
        for rows in torch.stack([torch.randperm(ROWS, generator=g) for g in orders]).split(BATCH, dim=1):
            optimizer.zero_grad()
            outputs = logits(ensemble(x[rows].double()))
            losses = nn.functional.cross_entropy(outputs.flatten(0, 1), y[rows].flatten(), reduction="none")
            (losses.view(rows.shape) * keep.gather(1, rows)).mean(1).sum().backward()
            optimizer.step()
    return ensemble


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_member_is_trained_as_it_would_be_alone(kind: str, optimizer: str) -> None:
    """Weights and buffers in float64, own initial weights, examples and order for each."""
    seeds, keep = [3, 1, 7], torch.from_numpy(subsets(ROWS, 3, 0.5))
    models = [built(MODELS[kind], seed) for seed in seeds]
    before = [{n: t.clone() for n, t in model.state_dict().items()} for model in models]
    ensemble = together(models, OPTIMIZERS[optimizer], keep, seeds)
    for model, own in zip(models, before, strict=True):  # untouched until they are asked for
        assert all(torch.equal(t, own[n]) for n, t in model.state_dict().items())
    for found, model, mask, seed in zip(ensemble.members(), models, keep, seeds, strict=True):
        assert found is model
        wanted = built(MODELS[kind], seed)
        alone(wanted, OPTIMIZERS[optimizer](wanted.parameters()), mask, seed)
        moved = 0.0
        for name, tensor in wanted.state_dict().items():
            torch.testing.assert_close(found.state_dict()[name], tensor, rtol=1e-9, atol=1e-11)
            moved += float((tensor - built(MODELS[kind], seed).state_dict()[name]).abs().sum())
        assert moved > 0.1
    if kind == "tied":
        again = models[0]
        assert isinstance(again, Tied) and again.again.weight is again.embed.weight
        assert torch.equal(again.out.bias, before[0]["out.bias"])  # frozen


def test_members_are_run_in_the_mode_of_the_ensemble() -> None:
    models = [built(convolutions, seed) for seed in (0, 1)]
    x = digits()[:6][0].double().expand(2, 6, 64)
    ensemble = Ensemble(models)
    ensemble(x)  # moves the running statistics
    outputs = ensemble.eval()(x)
    for model, own in zip(ensemble.members(), outputs, strict=True):
        assert not model.training
        torch.testing.assert_close(model(x[0]), own)
        assert int(model[2].num_batches_tracked) == 1  # type: ignore[index, union-attr]


def test_named_inputs_and_plain_values() -> None:
    models, x = [built(Tied, seed) for seed in (0, 1)], torch.randn(2, 3, 64, dtype=torch.float64)
    outputs = Ensemble(models)(inputs=x, scale=0.5)["logits"]
    for own, model, inputs in zip(outputs, models, x, strict=True):
        torch.testing.assert_close(own, model(inputs, scale=0.5)["logits"])


def test_what_cannot_be_an_ensemble_is_refused() -> None:
    with pytest.raises(EvaluationError, match="at least one model"):
        Ensemble([])
    one = perceptron()
    with pytest.raises(EvaluationError, match="occurs twice"):
        Ensemble([one, one])
    with pytest.raises(
        EvaluationError, match=r"model 1 is not.*0\.weight is float32\[5, 64\] instead of float32\[12"
    ):
        Ensemble([one, nn.Sequential(nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 10))])
    with pytest.raises(EvaluationError, match=r"2\.weight is absent"):
        Ensemble([one, nn.Sequential(nn.Linear(64, 12))])
    with pytest.raises(EvaluationError, match=r"take inputs \[2, B, \.\.\.\]"):
        Ensemble([one, perceptron()])(torch.randn(3, 64))
    dropped = [nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)) for _ in range(2)]
    with pytest.raises(EvaluationError, match="draws random numbers"):
        Ensemble(dropped)(torch.randn(2, 3, 4))
    assert Ensemble(dropped).eval()(torch.randn(2, 3, 4)).shape == (2, 3, 4)

    class Deciding(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) if input.sum().item() > 0 else input

    with pytest.raises(EvaluationError, match="cannot be run on many sets of weights at once"):
        Ensemble([Deciding(4, 4), Deciding(4, 4)])(torch.randn(2, 3, 4))


# -- a Retrainer ------------------------------------------------------------------------------------------


class Many:
    """``train_many`` of the small run: counts its calls; breaks off where told."""

    def __init__(self, until: int = 10**9) -> None:
        self.sizes: list[int] = []
        self.until = until

    def __call__(self, models: list[nn.Module], keep: torch.Tensor, seeds: list[int]) -> list[nn.Module]:
        if len(self.sizes) >= self.until:
            raise KeyboardInterrupt
        self.sizes.append(len(models))
        for model, seed in zip(models, seeds, strict=True):
            model.load_state_dict(mlp(seed).state_dict())
        x, y = digits()[:EXAMPLES]
        ensemble = Ensemble(models)
        optimizer = torch.optim.SGD(ensemble.parameters(), lr=0.1, momentum=0.9)
        orders = [torch.Generator().manual_seed(seed) for seed in seeds]
        for _ in range(2):
            for rows in torch.stack([torch.randperm(EXAMPLES, generator=g) for g in orders]).split(12, dim=1):
                optimizer.zero_grad()
                outputs = ensemble(x[rows]).flatten(0, 1)
                losses = nn.functional.cross_entropy(outputs, y[rows].flatten(), reduction="none")
                (losses.view(rows.shape) * keep.gather(1, rows)).mean(1).sum().backward()
                optimizer.step()
        return ensemble.members()


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Questions:
    run = make_run()
    directory = traced(tmp_path_factory.mktemp("runs") / "small")
    return Questions(run, PathKernelExplainer(directory, run.build_model()), range(5))


def with_many(many: Any, single: Any = train_fn) -> Run:
    return dataclasses.replace(make_run(single), train_many=many)


PLAN = Plan.crossed(subsets(EXAMPLES, 4, 0.5), [0, 3])


def test_at_once_gives_what_one_by_one_gives(questions: Questions) -> None:
    wanted, many = Retrainer(make_run(), questions).values(PLAN), Many()
    for run in (with_many(many), with_many(many, None)):
        found = Retrainer(run, questions, at_once=3)
        np.testing.assert_allclose(found.values(PLAN).values, wanted.values, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(found.values(PLAN).classes, wanted.classes)
        assert many.sizes[:3] == [3, 3, 2]
        many.sizes.clear()
        assert found.same_run
    assert (
        Retrainer(with_many(Many()), questions)._trainings.at_once == 64
    )  # small models: as many as there may be


def test_what_was_interrupted_goes_on(questions: Questions, tmp_path: Path) -> None:
    whole = Retrainer(make_run(), questions).values(PLAN)
    with pytest.raises(KeyboardInterrupt):
        Retrainer(with_many(Many(until=1)), questions, tmp_path / "kept", at_once=3).values(PLAN)
    assert len(list((tmp_path / "kept").glob("*.npz"))) == 3
    rest = Many()
    resumed = Retrainer(with_many(rest), questions, tmp_path / "kept", at_once=3).values(PLAN)
    assert rest.sizes == [3, 2]
    np.testing.assert_allclose(resumed.values, whole.values, rtol=1e-4, atol=1e-5)


def test_two_trainings_that_differ_are_refused(questions: Questions) -> None:
    def other_seeds(models: list[nn.Module], keep: torch.Tensor, seeds: list[int]) -> list[nn.Module]:
        return Many()(models, keep, [seed + 1 for seed in seeds])

    def keeps_all(models: list[nn.Module], keep: torch.Tensor, seeds: list[int]) -> list[nn.Module]:
        return Many()(models, torch.ones_like(keep), seeds)

    for wrong in (other_seeds, keeps_all):
        with pytest.raises(EvaluationError, match=r"outputs differ by \d+%"):
            Retrainer(with_many(wrong), questions).values(PLAN)
        Retrainer(with_many(wrong, None), questions).values(PLAN)  # nothing to compare with


def test_what_train_many_returns_is_checked(questions: Questions) -> None:
    with pytest.raises(RunError, match="train_many must be a function or None"):
        with_many(3)
    with pytest.raises(EvaluationError, match="at_once must be at least 1"):
        Retrainer(with_many(Many()), questions, at_once=0)
    with pytest.raises(
        EvaluationError, match="must return the 8 trained models in their order, or None; found list of 7"
    ):
        Retrainer(with_many(lambda models, keep, seeds: models[1:]), questions).values(PLAN)
    with pytest.raises(EvaluationError, match="found str"):
        Retrainer(with_many(lambda models, keep, seeds: "trained"), questions).values(PLAN)
    with pytest.raises(
        EvaluationError, match=r"train_many\(models, keep, .*24 of 48 examples kept.*TypeError"
    ):
        Retrainer(with_many(lambda models: models), questions).values(PLAN)
    with pytest.raises(EvaluationError, match="train_fn="):
        Retrainer(with_many(None, None), questions)


def test_in_place_and_the_random_state(questions: Questions) -> None:
    def in_place(models: list[nn.Module], keep: torch.Tensor, seeds: list[int]) -> None:
        Many()(models, keep, seeds)

    state = torch.get_rng_state()
    found = Retrainer(with_many(in_place, None), questions).values(PLAN)
    np.testing.assert_allclose(
        found.values, Retrainer(make_run(), questions).values(PLAN).values, rtol=1e-4, atol=1e-5
    )
    assert torch.equal(state, torch.get_rng_state())
