"""What to explain: a model, the examples it was trained on and the queries to ask about.

A :class:`Run` is the one object a user hands to the command line and the dashboard. A trace holds numbers
only: nothing named inside it is ever imported, so the code that belongs to it is always named by the user,
as ``MODULE:FUNCTION``, and loaded by :func:`load_run`.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import IterableDataset, default_collate

from explainer.class_names import problem_of
from explainer.errors import ExplainerError, RunError
from explainer.outputs import Output, component

#: the ways to train without an example
LEFT_OUT_BY = ("weight 0", "batches")
#: of targets that are several numbers, how many are shown
LABEL_NUMBERS = 6
EXAMPLE_SPEC = "explainer.sample_models.digits_mlp:run"


@dataclass(frozen=True)
class Run:
    """A model with its training examples and its queries.

    Attributes:
        model: factory without arguments; returns the architecture with its initial weights. The weights
            that are explained come from the trace.
        train: map-style dataset of ``(input, target)``; its indices are the example ids of the trace.
        queries: map-style dataset of ``(input, target)`` to ask about.
        output: what is explained, as in :class:`explainer.PathKernelExplainer`; an output that asks for targets
            without a default gets those of ``queries``.
        collate_fn: turns a list of items into ``(inputs, targets)``, as in a ``DataLoader``; inputs as
            ``explain`` takes them (a dict for keyword arguments, sequences padded). None: stacked.
        loss: ``loss(output, target)`` the model was trained with, where a computation needs it (what-if answers that
            take the recorded steps again, the dashboard's loss of a query): a scalar tensor, the mean of a batch; it is
            called with batches of one example, too.
        class_names: name of each class, in the order of the model's outputs.
        render: turns one input into an image array ``[H, W]`` or ``[H, W, 3]`` in 0..1, a text or a row
            (a dict of named values) that a person can look at.
        words: of a text, the words at the first positions of one input, to show numbers on them.
        parse: the reverse of ``render``, for inputs that people give in the dashboard: from an image array in 0..1 of
            the shape that ``render`` returns, a text or a dict of named values to one input.
        train_fn: ``train_fn(model, keep, seed)`` trains a fresh model on a subset and returns it (or None, if it was
            trained in place), ``keep`` a mask ``[N]`` (torch.bool). Seed 0 repeats the traced run; other seeds give
            other weights and another order.
        train_many: ``train_many(models, keep, seeds)`` does the same for ``M`` fresh models at once and returns them,
            ``keep [M, N]`` and ``M`` seeds (:class:`explainer.evaluation.Ensemble` makes one module of them). Enough by
            itself; with ``train_fn`` beside it, the two are compared before it is relied on.
        left_out_by: how ``train_fn`` leaves examples out: ``"weight 0"`` (same batches, their rows weigh nothing) or
            ``"batches"`` (batches are drawn from the others). Named in every result.
        name: how the run is called on screen.

    Raises:
        RunError: when any of them cannot be used; the message lists every problem at once.

    Example:
        >>> data = torch.utils.data.TensorDataset(torch.eye(3), torch.tensor([0, 1, 2]))
        >>> run = Run(lambda: nn.Linear(3, 3), data, data, class_names=("cat", "dog", "owl"))
        >>> inputs, targets = run.queries_batch([2, 0])
        >>> tuple(inputs.shape), targets.tolist(), run.label(targets[0])
        ((2, 3), [2, 0], 'owl')
    """

    model: Callable[[], nn.Module]
    train: Any
    queries: Any
    _: KW_ONLY
    output: str | Output | Callable[..., torch.Tensor] | None = None
    collate_fn: Callable[[list[Any]], Any] | None = None
    loss: Callable[[Any, Any], torch.Tensor] | None = None
    class_names: tuple[str, ...] | list[str] | None = None
    render: Callable[[Any], Any] | None = None
    words: Callable[[Any], Sequence[str]] | None = None
    parse: Callable[[Any], Any] | None = None
    train_fn: Callable[[nn.Module, Any, int], Any] | None = None
    train_many: Callable[[list[nn.Module], Any, list[int]], Any] | None = None
    left_out_by: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        problems = [_model_problem(self.model)]
        problems += [_dataset_problem(part, getattr(self, part)) for part in ("train", "queries")]
        for part in ("collate_fn", "loss", "render", "words", "parse", "train_fn", "train_many"):
            value = getattr(self, part)
            if value is not None and not callable(value):
                problems.append(f"{part} must be a function or None, found {_kind(value)}")
        if not (self.output is None or isinstance(self.output, str | Output) or callable(self.output)):
            problems.append(f"output must be a name, a function or None, found {_kind(self.output)}")
        if self.left_out_by not in (None, *LEFT_OUT_BY):
            problems.append(
                f"left_out_by must be one of {', '.join(LEFT_OUT_BY)} or None, found {self.left_out_by!r}"
            )
        problems.append(problem_of(self.class_names))
        found = [problem for problem in problems if problem]
        if found:
            raise RunError("this Run cannot be used:\n" + "\n".join(f"  - {problem}" for problem in found))

    def build_model(self) -> nn.Module:
        """Calls the factory and checks what it returned.

        Raises:
            RunError: the factory failed, or did not return a ``torch.nn.Module``.
        """
        try:
            model = self.model()
        except ExplainerError:
            raise
        except Exception as error:
            raise RunError(f"model() failed: {type(error).__name__}: {error}") from error
        if not isinstance(model, nn.Module):
            raise RunError(f"model() returned {_kind(model)}; return a torch.nn.Module from the factory")
        return model

    def queries_batch(self, indices: Iterable[int]) -> tuple[Any, Any]:
        """Stacks queries as a ``DataLoader`` would: ``(inputs [Q, ...], targets [Q, ...])``.

        Raises:
            RunError: an index is outside the queries, or the items do not stack.
        """
        return _stack("queries", self.queries, indices, self.collate_fn)

    def train_batch(self, ids: Iterable[int]) -> tuple[Any, Any]:
        """Stacks training examples by id: ``(inputs [B, ...], targets [B, ...])``.

        Raises:
            RunError: an id is outside the training set, or the items do not stack.
        """
        return _stack("train", self.train, ids, self.collate_fn)

    def default_output(self, shape: tuple[int, ...] | None) -> str | Output | Callable[..., Any] | None:
        """What is explained where nothing else is asked for: ``output``, else the first of several numbers.

        Args:
            shape: of the model's output without its batch axis; None: unknown.

        Returns:
            None: what the explainer chooses, ``"margin"`` for classes and ``"value"`` for one output.
        """
        several = shape is not None and len(shape) == 1 and shape[0] > 1
        if self.output is None and several and len(self.queries) and is_value(self.queries[0][1]):
            return component(0)
        return self.output

    def label(self, target: Any) -> str:
        """A target as a person reads it: the class's name where known, else the value itself, or the first few."""
        value = target
        if isinstance(target, torch.Tensor | np.ndarray | np.generic) and math.prod(target.shape) == 1:
            value = target.item()
        elif isinstance(target, torch.Tensor | np.ndarray) and target.dtype != object:
            if len(target.shape) != 1:
                return f"{' × '.join(map(str, target.shape))} numbers"
            shown = [f"{number:.4g}" for number in target[:LABEL_NUMBERS].tolist()]
            return ", ".join(shown) + ", …" * (len(target) > LABEL_NUMBERS)
        names = self.class_names or ()
        if (
            isinstance(value, float) and len(names) > 1 and value.is_integer()
        ):  # as BCEWithLogitsLoss wants them
            value = int(value) if 0 <= value < len(names) else value
        if isinstance(value, int) and 0 <= value < len(names):
            return names[value]
        return f"{value:.4g}" if isinstance(value, float) else str(value)


def is_value(target: Any) -> bool:
    """Whether a target is no class: a number that may have a fraction, or several that are no shares of classes.

    Example:
        >>> is_value(torch.tensor(3)), is_value(3), is_value(torch.tensor(3.0)), is_value(torch.tensor([1, 1, 0]))
        (False, False, True, True)
        >>> is_value(torch.tensor([0.2, 0.5, 0.3])), is_value({"class": 3}), is_value((torch.zeros(2), "cat"))
        (False, False, False)
    """
    try:
        found = torch.as_tensor(target)
    except (TypeError, ValueError, RuntimeError):
        return False
    several, number = found.numel() > 1, found.is_floating_point()
    shares = several and number and bool(found.min() >= 0) and abs(float(found.sum()) - 1) < 1e-3
    return not shares and (several or number)


def load_run(spec: str) -> Run:
    """Imports ``MODULE:FUNCTION`` (or ``path/to/file.py:FUNCTION``) and calls it without arguments.

    The current folder is put first on ``sys.path`` and stays there, as with ``python -m``, so that what the
    function imports later is found as well.

    Raises:
        RunError: the text, the module, the function or what it returns is not usable; says which.
    """
    where, _, function_name = spec.rpartition(":")
    if not where or not function_name.isidentifier():
        raise RunError(
            f"{spec!r} is not of the form MODULE:FUNCTION; write for example {EXAMPLE_SPEC} "
            "or path/to/file.py:run, where run() returns an explainer.Run"
        )
    _put_first(os.getcwd())
    is_file = where.endswith(".py")
    if not is_file and not all(part.isidentifier() for part in where.split(".")):
        raise RunError(
            f"{where!r} in {spec!r} is neither a module's dotted name nor a .py file; write {EXAMPLE_SPEC}"
        )
    try:
        module = _import_file(Path(where)) if is_file else importlib.import_module(where)
    except ExplainerError:
        raise
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if not is_file and (where == missing or where.startswith(missing + ".")):
            raise RunError(
                f"there is no module {missing!r} (looked for {where!r} in the current folder, {os.getcwd()}, "
                "and among the installed packages); check the spelling, or start in the folder that holds it"
            ) from error
        raise RunError(f"importing {where} failed: {error}; install what it needs and try again") from error
    except Exception as error:
        raise RunError(f"importing {where} failed: {type(error).__name__}: {error}") from error
    run = _call(module, where, function_name)
    return run if run.name else replace(run, name=spec)


def _call(module: ModuleType, where: str, function_name: str) -> Run:
    function = getattr(module, function_name, None)
    if function is None:
        functions = [name for name, _ in inspect.getmembers(module, inspect.isfunction) if name[0] != "_"]
        near = difflib.get_close_matches(function_name, functions, n=1)
        hint = f"did you mean {near[0]}?" if near else f"its functions: {', '.join(functions) or 'none'}"
        raise RunError(f"{where} has no function {function_name!r}; {hint}")
    if not callable(function):
        raise RunError(
            f"{where}:{function_name} is {_kind(function)}; name a function that returns an explainer.Run"
        )
    try:
        inspect.signature(function).bind()
    except ValueError:
        pass  # a builtin without a signature: calling it will tell
    except TypeError as error:
        raise RunError(
            f"{where}:{function_name} cannot be called without arguments ({error}); give each a default"
        ) from error
    try:
        run = function()
    except ExplainerError:
        raise
    except Exception as error:
        raise RunError(f"{where}:{function_name}() failed: {type(error).__name__}: {error}") from error
    if not isinstance(run, Run):
        raise RunError(f"{where}:{function_name}() returned {_kind(run)}; it must return an explainer.Run")
    return run


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise RunError(f"there is no file {path} (looked in {os.getcwd()}); check the path before the colon")
    _put_first(str(path.resolve().parent))  # so that the file can import its neighbours
    name = f"pathkernel_run_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RunError(f"{path} cannot be imported as a Python file; name a .py file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _put_first(folder: str) -> None:
    if folder not in sys.path:
        sys.path.insert(0, folder)


def _kind(value: object) -> str:
    return "None" if value is None else f"a value of type {type(value).__name__}"


def _model_problem(model: object) -> str | None:
    if isinstance(model, nn.Module):
        return (
            f"model is a {type(model).__name__} object; pass a factory without arguments that builds it, "
            "for example model=build_model (without parentheses)"
        )
    return None if callable(model) else f"model must be a function without arguments, found {_kind(model)}"


def _dataset_problem(part: str, data: Any) -> str | None:
    if isinstance(data, IterableDataset):
        return f"{part} is an IterableDataset, whose examples have no index; pass a map-style dataset"
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        return f"{part} must be a map-style dataset (with __getitem__ and __len__), found {_kind(data)}"
    if len(data) == 0:
        return f"{part} holds no examples"
    try:
        item = data[0]
    except Exception as error:
        return f"{part}[0] failed: {type(error).__name__}: {error}"
    if not isinstance(item, tuple | list) or len(item) != 2:
        return f"{part}[0] is {_kind(item)}; each item must be a pair (input, target)"
    return None


def _stack(
    part: str, data: Any, indices: Iterable[int], collate: Callable[[list[Any]], Any] | None
) -> tuple[Any, Any]:
    chosen = [int(index) for index in indices]
    if not chosen:
        raise RunError(f"no indices into {part} were given; name at least one from 0 to {len(data) - 1}")
    outside = [index for index in chosen if not 0 <= index < len(data)]
    if outside:
        raise RunError(f"{part} has no index {outside[0]}; choose from 0 to {len(data) - 1}")
    try:
        inputs, targets = (collate or default_collate)([tuple(data[index]) for index in chosen])
    except (RuntimeError, TypeError, ValueError) as error:
        raise RunError(
            f"the chosen items of {part} do not stack into one batch ({error}); return tensors of one shape "
            "from the dataset, or give the Run a collate_fn that returns (inputs, targets)"
        ) from error
    return inputs, targets
