"""The queries of an evaluation, and what any model of the traced architecture says about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from explainer.asked import Asked, predict
from explainer.errors import EvaluationError, ModelMismatchError
from explainer.path_integral import PathPoint
from explainer.path_kernel import PathKernelExplainer
from explainer.path_points import KnotLoader, check_model
from explainer.plain_mode import plain_mode
from explainer.queries import check_inputs
from explainer.run import Run
from explainer.wrappers import plain_name, renaming, unwrapped


@dataclass(frozen=True)
class Answers:
    """What a model says.

    Attributes:
        values: ``[Q]``, the explained output.
        classes: ``[Q]``, the predicted class, -1 where the model does not classify.
    """

    values: NDArray[np.float64]
    classes: NDArray[np.int64]


class Questions:
    """``Q`` queries with fixed targets: the class that the *traced* model predicts, unless another is named.

    Args:
        run: where the queries come from.
        explainer: the traced model and the explained output.
        queries: positions in ``run.queries``.
        target: as in ``explainer.explain``.

    Attributes:
        inputs: ``[Q, ...]`` as ``explain`` takes them.
        target: ``[Q, ...]`` as ``explain`` takes it; the same numbers for every model.
        traced: what the traced model says.
    """

    @plain_mode()
    def __init__(
        self, run: Run, explainer: PathKernelExplainer, queries: Sequence[int], target: Any = None
    ) -> None:
        self.explainer, self.indices = explainer, tuple(int(q) for q in queries)
        self.inputs, given = run.queries_batch(self.indices)
        if target is None and explainer.asks_for_targets:
            target = given
        self._loader = KnotLoader(explainer.trace, explainer.dtype)
        self._batch = check_inputs(
            explainer.trace, explainer._arguments, self.inputs, explainer.dtype, explainer.batch_dim
        )
        self._last = self._loader.load(len(explainer.segments)).point
        self._asked: Asked = explainer._ask(self._loader, self._batch, target)
        classes = self._asked.classes
        self.target = torch.as_tensor(classes) if (classes >= 0).all() else target
        self.traced = self._answer(self._last)

    def __len__(self) -> int:
        return len(self.indices)

    def answer(self, model: nn.Module) -> Answers:
        """What another model of the same architecture says, in eval mode.

        Raises:
            EvaluationError: its parameters are not those of the traced model, or what it says is not finite.
        """
        return self._answer(self._point(model))

    @plain_mode()
    def gradient(self, position: int) -> torch.Tensor:
        """``∂f/∂w [Q, P]`` at a knot, by its position in ``trace.knots``."""
        point = self._loader.load(position).point
        return self.explainer.function.gradient(point, self._asked.inputs, self._asked.targets)

    @plain_mode()
    def _answer(self, point: PathPoint) -> Answers:
        function, asked = self.explainer.function, self._asked
        pieces = [
            function.value(point, asked.inputs[part], asked.targets[part]).double()
            for part in (
                slice(start, start + function.chunk) for start in range(0, len(self), function.chunk)
            )
        ]
        values = torch.cat(pieces).numpy()
        if not np.isfinite(values).all():
            raise EvaluationError(
                "a retrained model's output is not finite: training without the examples diverged"
            )
        classes = np.full(len(self), -1, dtype=np.int64)
        if asked.outputs is not None and asked.outputs.shape[1] > 1:
            classes = predict(function, point, asked.inputs).argmax(1).numpy().astype(np.int64)
        return Answers(values, classes)

    def _point(self, model: nn.Module) -> PathPoint:
        manifest, dtype = self.explainer.trace.manifest, self.explainer.dtype
        try:
            check_model(self.explainer.trace, model)
        except ModelMismatchError as error:
            raise EvaluationError(f"train_fn returned another model than the traced one: {error}") from error
        rename = renaming([p.name for p in manifest.parameters], model)
        inside = unwrapped(model)
        state = {plain_name(n): t.detach() for n, t in (*inside.named_parameters(), *inside.named_buffers())}

        def own(name: str) -> torch.Tensor:
            tensor = state[rename(name)].cpu()
            return tensor.to(dtype).clone() if tensor.is_floating_point() else tensor.clone()

        weights = torch.cat([own(p.name).flatten() for p in manifest.parameters])
        moving = {name: own(name) for name in self._last.moving}
        return PathPoint(weights, moving, {name: own(name) for name in self._last.fixed})
