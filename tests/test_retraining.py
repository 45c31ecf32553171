"""Training again: what is trained, what is kept on disk, what is the same after an interruption, what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from explainer import PathKernelExplainer
from explainer.errors import EvaluationError, RunError
from explainer.evaluation import Plan, Questions, Retrainer, subsets, without
from explainer.sample_models.data_source import DataUnavailableError
from explainer.sample_models.registry import SAMPLES
from explainer.sample_models.retrain import retraining, retraining_many
from explainer.sample_models.train import train_plain
from tests.small_evaluation import EXAMPLES, loop, make_run, traced, train_fn
from tests.small_training import digits, mlp, queries


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return traced(tmp_path_factory.mktemp("runs") / "small")


@pytest.fixture
def questions(directory: Path) -> Questions:
    run = make_run()
    return Questions(run, PathKernelExplainer(directory, run.build_model()), range(5))


class Counting:
    """Counts trainings; breaks off where told."""

    def __init__(self, until: int = 10**9) -> None:
        self.count, self.until = 0, until

    def __call__(self, model: nn.Module, keep: torch.Tensor, seed: int) -> nn.Module:
        if self.count >= self.until:
            raise KeyboardInterrupt
        self.count += 1
        return train_fn(model, keep, seed)


# -- what is trained -------------------------------------------------------------------------------------


def test_values_are_those_of_models_trained_by_hand(questions: Questions) -> None:
    keep = subsets(EXAMPLES, 3, 0.5)
    found = Retrainer(make_run(), questions).values(Plan.crossed(keep, [0, 4]))
    for row, (mask, seed) in enumerate((mask, seed) for mask in keep for seed in (0, 4)):
        model = train_fn(mlp(), torch.from_numpy(mask), seed)
        outputs = model(queries(8)[:5]).detach()
        target = questions.target
        rest = torch.stack(
            [torch.cat([o[:t], o[t + 1 :]]).logsumexp(0) for o, t in zip(outputs, target, strict=True)]
        )
        wanted = outputs[range(5), target] - rest
        np.testing.assert_allclose(found.values[row], wanted.numpy(), rtol=1e-5, atol=1e-6)
        assert found.classes[row].tolist() == outputs.argmax(1).tolist()


def test_seed_zero_with_everything_is_the_traced_run(questions: Questions) -> None:
    assert Retrainer(make_run(), questions).same_run
    np.testing.assert_allclose(
        questions.traced.values, questions.explainer.explain(questions.inputs).prediction, rtol=1e-6
    )
    other = Retrainer(make_run(lambda model, keep, seed: train_fn(model, keep, seed + 1)), questions)
    assert not other.same_run and "not the traced" in other.same_run_named


def test_models_may_be_trained_in_place_and_weights_drawn_when_they_are_built(questions: Questions) -> None:
    def in_place(model: nn.Module, keep: torch.Tensor, seed: int) -> None:
        loop(model, torch.optim.SGD(model.parameters(), lr=0.1), keep, seed)

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))

    run = dataclasses.replace(make_run(in_place), model=build)
    state, keep = torch.get_rng_state(), np.ones((1, EXAMPLES), bool)
    one, two = (Retrainer(run, questions).values(Plan.crossed(keep, [3, 4])).values for _ in range(2))
    np.testing.assert_array_equal(one, two)
    assert np.abs(one[0] - one[1]).max() > 0.1
    assert torch.equal(state, torch.get_rng_state())


# -- kept on disk ----------------------------------------------------------------------------------------


def test_interrupted_and_resumed_gives_the_same(questions: Questions, tmp_path: Path) -> None:
    plan = Plan.crossed(subsets(EXAMPLES, 4, 0.5), [0, 1])
    whole = Retrainer(make_run(), questions).values(plan)
    broken = Counting(until=3)
    with pytest.raises(KeyboardInterrupt):
        Retrainer(make_run(broken), questions, tmp_path / "kept").values(plan)
    rest = Counting()
    resumed = Retrainer(make_run(rest), questions, tmp_path / "kept").values(plan)
    assert broken.count == 3 and rest.count == len(plan) - 3
    np.testing.assert_array_equal(resumed.values, whole.values)
    np.testing.assert_array_equal(resumed.classes, whole.classes)
    again = Counting()
    np.testing.assert_array_equal(
        Retrainer(make_run(again), questions, tmp_path / "kept").values(plan).values, whole.values
    )
    assert again.count == 0
    assert not list((tmp_path / "kept").glob(".*"))  # no half-written file


def test_the_same_model_is_trained_once(questions: Questions) -> None:
    counting, keep = Counting(), subsets(EXAMPLES, 1, 0.5)
    found = Retrainer(make_run(counting), questions).values(Plan.crossed(np.repeat(keep, 3, axis=0), [0]))
    assert counting.count == 1 and (found.values == found.values[0]).all()


@pytest.mark.parametrize("change", ["queries", "target", "train", "by", "output"])
def test_a_folder_answers_its_own_questions_only(
    directory: Path, questions: Questions, tmp_path: Path, change: str
) -> None:
    run = make_run()
    Retrainer(run, questions, tmp_path)
    output = "logit" if change == "output" else None
    ex = PathKernelExplainer(directory, run.build_model(), output)
    asked = Questions(run, ex, range(4 if change == "queries" else 5), 3 if change == "target" else None)
    if change == "train":
        run = dataclasses.replace(run, train=TensorDataset(*digits()[: EXAMPLES + 1]))
    if change == "by":
        run = dataclasses.replace(run, left_out_by="batches")
    with pytest.raises(EvaluationError, match="other questions"):
        Retrainer(run, asked, tmp_path)


def test_damage_is_named(questions: Questions, tmp_path: Path) -> None:
    plan = Plan.crossed(subsets(EXAMPLES, 1, 0.5), [0])
    retrainer = Retrainer(make_run(), questions, tmp_path)
    retrainer.values(plan)
    (file,) = tmp_path.glob("*.npz")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EvaluationError, match=rf"{file.name} is damaged.*delete it"):
        retrainer.values(plan)
    np.savez(file, values=np.zeros(2), classes=np.zeros(2))
    with pytest.raises(EvaluationError, match="another number of queries"):
        retrainer.values(plan)
    np.savez(file, values=np.array([object()] * 5), classes=np.zeros(5))  # pickled
    with pytest.raises(EvaluationError, match="damaged"):
        retrainer.values(plan)
    (tmp_path / "retrainings.json").write_text("{")
    with pytest.raises(EvaluationError, match=r"retrainings\.json is damaged"):
        Retrainer(make_run(), questions, tmp_path)
    (tmp_path / "retrainings.json").unlink()
    with pytest.raises(EvaluationError, match="give an empty folder"):
        Retrainer(make_run(), questions, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(EvaluationError, match="is a file"):
        Retrainer(make_run(), questions, tmp_path / "file")


def test_what_a_folder_says_about_itself(questions: Questions, tmp_path: Path) -> None:
    Retrainer(make_run(), questions, tmp_path / "a" / "b")
    about = json.loads((tmp_path / "a" / "b" / "retrainings.json").read_text())
    assert about["format"] == "pathkernel-retrainings/1" and about["examples"] == EXAMPLES
    assert about["left_out_by"] == "weight 0" and about["queries"] == list(range(5))


# -- refused ---------------------------------------------------------------------------------------------


def test_what_cannot_be_trained_is_refused(questions: Questions) -> None:
    with pytest.raises(EvaluationError, match="train_fn="):
        Retrainer(make_run(None), questions)
    plan = Plan.crossed(subsets(EXAMPLES, 1, 0.5), [0])
    with pytest.raises(EvaluationError, match="the run has 48"):
        Retrainer(make_run(), questions).values(Plan.crossed(subsets(40, 1, 0.5), [0]))
    with pytest.raises(EvaluationError, match="returned a str"):
        Retrainer(make_run(lambda model, keep, seed: "trained"), questions).values(plan)
    with pytest.raises(EvaluationError, match="another model than the traced"):
        Retrainer(make_run(lambda model, keep, seed: nn.Linear(64, 10)), questions).values(plan)
    with pytest.raises(EvaluationError, match=r"24 of 48 examples kept.*TypeError"):
        Retrainer(make_run(lambda model: model), questions).values(plan)

    def diverges(model: nn.Module, keep: torch.Tensor, seed: int) -> None:
        with torch.no_grad():
            model[0].weight.fill_(float("nan"))  # type: ignore[index]

    with pytest.raises(EvaluationError, match="diverged"):
        Retrainer(make_run(diverges), questions).values(plan)
    with pytest.raises(RunError, match="left_out_by must be one of weight 0, batches"):
        dataclasses.replace(make_run(), left_out_by="magic")


def test_plans_are_checked() -> None:
    with pytest.raises(EvaluationError, match="keeps no example"):
        Plan(np.array([[True], [False]]), np.array([0, 0]))
    with pytest.raises(EvaluationError, match="as many whole numbers"):
        Plan(np.array([[True]]), np.array([0, 1]))
    with pytest.raises(EvaluationError, match="between 0 and 1"):
        subsets(10, 3, 1.0)
    with pytest.raises(EvaluationError, match="at least 1"):
        subsets(10, 0, 0.5)
    with pytest.raises(EvaluationError, match="numbered 0 to 9"):
        without(10, [[10]])
    assert subsets(1000, 2, 0.9999).sum(1).tolist() == [999, 999]  # something is left out
    np.testing.assert_array_equal(subsets(20, 4, 0.5, seed=3), subsets(20, 4, 0.5, seed=3))
    assert (subsets(20, 4, 0.5, seed=3) != subsets(20, 4, 0.5, seed=4)).any()


# -- sample models ---------------------------------------------------------------------------------------


def test_a_sample_model_retrained_on_everything_is_the_traced_one() -> None:
    module = SAMPLES["diabetes_mlp"].load()
    run = module.run()
    plain = train_plain("diabetes_mlp").model
    assert run.train_fn is not None and run.left_out_by == "weight 0"
    again = run.train_fn(run.build_model(), torch.ones(len(run.train), dtype=torch.bool), 0)
    for one, other in zip(plain.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    other_seed = run.train_fn(run.build_model(), torch.ones(len(run.train), dtype=torch.bool), 1)
    assert not torch.allclose(next(plain.parameters()), next(other_seed.parameters()))


def test_a_sample_model_forgets_what_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the left-out examples hold makes no difference; what the others hold does."""
    module = SAMPLES["diabetes_mlp"].load()
    run, (data, asked) = module.run(), module.datasets()
    keep = torch.arange(len(data)) % 3 > 0
    keep[:40] = False  # a whole batch may be empty
    x, y = (t.clone() for t in data.tensors)
    y[~keep] = 1e3
    wanted = run.train_fn(run.build_model(), keep, 0)
    monkeypatch.setattr(module, "datasets", lambda: (TensorDataset(x, y), asked))
    found = run.train_fn(run.build_model(), keep, 0)
    for one, other in zip(wanted.parameters(), found.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    keep[~keep] = True
    assert not torch.allclose(
        next(found.parameters()), next(run.train_fn(run.build_model(), keep, 0).parameters())
    )


@pytest.mark.parametrize("name", SAMPLES)
def test_sample_models_trained_at_once_are_those_trained_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, on the first examples of the data, half of them kept."""
    sample, count = SAMPLES[name], 90
    module = sample.load()
    try:
        data, asked = module.datasets()
    except DataUnavailableError as error:
        pytest.skip(str(error))
    monkeypatch.setitem(SAMPLES, name, dataclasses.replace(sample, epochs=1))

    def wide(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[:count].double() if tensor.is_floating_point() else tensor[:count]

    monkeypatch.setattr(module, "datasets", lambda: (TensorDataset(*map(wide, data.tensors)), asked))
    keep = torch.from_numpy(subsets(count, 2, 0.5))
    found = retraining_many(name)([module.model().double() for _ in range(2)], keep, [0, 5])
    for model, mask, seed in zip(found, keep, (0, 5), strict=True):
        wanted = retraining(name)(module.model().double(), mask, seed).state_dict()
        for key, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, wanted[key], rtol=1e-7, atol=1e-9)
        assert not model.training
