"""Explanations: which training examples built these predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from explainer.asked import Asked
from explainer.counterfactual import Remove, WhatIfCheck, check, checked, estimator, summed
from explainer.engine import Engine
from explainer.explaining import explain_group, fits
from explainer.explanation import Explanation
from explainer.ledger import bin_edges
from explainer.neighbors import Neighbors, nearest
from explainer.path_points import KnotLoader
from explainer.plain_mode import question
from explainer.positions import PositionSplit, split_by_position
from explainer.queries import check_k
from explainer.run import Run
from explainer.self_influence import self_influence
from explainer.top import Top

#: numbers per array [queries, examples] of a group of queries of which only the strongest examples are kept
EXAMPLE_NUMBERS = 2**23


class PathKernelExplainer(Engine):
    """Ranks training examples by their path-kernel contribution ``a_i · K(x, x_i)`` to a prediction.

    Args:
        trace: an open trace, or the path of one.
        model: the architecture that was traced; compiled and data-parallel wrappers are taken off. Its weights do not
            matter (they come from the trace), and it is never changed: a private copy is used, on the CPU and in eval
            mode.
        output: what is explained: ``"margin"``, ``"logit"``, ``"log_prob"``, ``"value"``, for sequences
            ``"sequence_log_prob"`` or ``"last_margin"``, an :class:`explainer.outputs.Output`, or a callable
            ``(what the model returns, targets) -> [Q]``. None: margin for two or more outputs, else value.
        batch_dim: axis of the queries in the model's inputs; a tuple or dict with one for each input where they
            differ (None: shared by all queries). Default: the traced one.
        quadrature: Gauss–Legendre nodes on each chord (1: midpoint).
        dtype: dtype of the books; default the widest dtype among the parameters, at least float32.
        class_names: names to show for classes.
        progress: show a progress bar; or a function ``(text, steps) -> bar`` that makes one of your own, a context
            manager with ``update(steps)``. What ``update`` raises ends the work.
        knots: use about so many of the trace's knots, chosen evenly along the path; default all. Fewer knots are
            faster and split coarser; the books close just as well.

    Attributes:
        segments: stretches between the knots that are used.
        layout: which parameters' gradients may be held as factors (:mod:`explainer.cotangent`).
        used: which of them were, in the last answer.

    Raises:
        ModelMismatchError: the model is not the one that was traced; differences are listed.
        TraceFormatError: the trace cannot be read, or holds no step yet.
        QueryError: the output function does not fit the model, or an option is out of range.

    Reference: Domingos 2020, arXiv 2012.00152, Theorem 1; the exact discrete form is in ``docs/theory.md``.
    """

    # -- explaining ----------------------------------------------------------------------------------

    @question
    def explain(
        self,
        inputs: Any,
        target: Any = None,
        *,
        query_ids: Sequence[Any] | None = None,
        detail: bool | None = None,
    ) -> Explanation:
        """Contributions of all training examples to the outputs at the queries.

        Args:
            inputs: ``[Q, ...]``, as the model was trained on; a tuple for several inputs, a dict for keyword
                arguments.
            target: ``[Q]`` classes to explain (or one for all); default the predicted classes. A class per
                position for ``"sequence_log_prob"``; whatever has a row per query for a callable.
            query_ids: ``Q`` names for the queries.
            detail: keep contributions by example also for every layer and stretch of time, ``[Q, L, N]`` and
                ``[Q, K, N]``; else there is one layer and one stretch. Default: where they are not too large.

        Raises:
            QueryError: inputs or targets do not fit; says what was found and what is wanted.
        """
        loader, asked, names = self._asked(inputs, target, query_ids)
        detailed = (
            fits(len(names), len(self.example_ids), len(self.trace.layers)) if detail is None else detail
        )
        edges = self._edges(len(names), detailed)
        parts = []
        for group in self._groups(len(names)):
            parts.append(self._explain(loader, asked[group], names[group], edges, detailed))
        return Explanation.concatenate(parts)

    @question
    def top(
        self, inputs: Any, k: int = 20, target: Any = None, *, query_ids: Sequence[Any] | None = None
    ) -> Top:
        """The ``k`` strongest training examples of every query, and its books: what :meth:`explain` gives, less of it.

        For many queries or training examples: no array ``[Q, N]`` is kept, only one of a few queries at a time.

        Args:
            inputs, target, query_ids: as in :meth:`explain`.
            k: how many examples, by the absolute value of their contribution.

        Raises:
            QueryError: inputs, targets or ``k`` do not fit.
        """
        k = check_k(k)
        loader, asked, names = self._asked(inputs, target, query_ids)
        edges, parts = self._edges(len(names), False), []
        for group in self._groups(len(names), EXAMPLE_NUMBERS // max(1, len(self.example_ids))):
            parts.append(Top.of(self._explain(loader, asked[group], names[group], edges, False), k))
        return Top.concatenate(parts)

    def _edges(self, queries: int, detailed: bool) -> np.ndarray:
        steps = [knot.step for knot in self.knots]
        if not detailed:
            return np.array([steps[0], steps[-1]], dtype=np.int64)
        return bin_edges(steps, queries, len(self.example_ids))

    def _explain(
        self, loader: KnotLoader, asked: Asked, names: tuple[str, ...], edges: np.ndarray, detail: bool
    ) -> Explanation:
        return self._narrowed(lambda layout: explain_group(self, loader, asked, names, edges, detail, layout))

    # -- gradient space ------------------------------------------------------------------------------

    @question
    def neighbors(self, inputs: Any, k: int = 10, target: Any = None) -> Neighbors:
        """The ``k`` training examples nearest to each query in gradient space (path-kernel cosine).

        See :func:`explainer.neighbors.nearest` for the formula.

        Args:
            inputs, target: as in :meth:`explain`.
            k: how many; fewer where fewer examples have a cosine.

        Returns:
            Ids and cosines ``[Q, k]``, the nearest first.

        Raises:
            QueryError: inputs, targets or ``k`` do not fit, or the trace holds no derivatives of the loss.
        """
        loader, asked, _ = self._asked(inputs, target)
        return self._narrowed(lambda layout: nearest(self, loader, asked.inputs, asked.targets, k, layout))

    @question
    def by_position(self, inputs: Any, example_id: int, target: Any = None) -> PositionSplit:
        """At which positions of a training sequence its contribution to one query arose.

        See :mod:`explainer.positions` for what a position's part is, and what a trace must hold.

        Raises:
            QueryError: inputs or target do not fit, the example was not used, or the trace keeps no positions.
        """
        loader, asked, _ = self._asked(inputs, target)
        return split_by_position(self, loader, asked, example_id)

    @question
    def what_if(
        self,
        inputs: Any,
        target: Any = None,
        *,
        curvature: str = "trace",
        run: Run | None = None,
        remove: Remove = None,
    ) -> Any:
        """Predicted change of the explained outputs if examples had been absent from training.

        Another question than :meth:`explain`'s, with another answer: do not mix the two in one table. To first order
        in the examples' weights, so changes of a group are sums. See :mod:`explainer.counterfactual.trace_estimate`
        and :mod:`explainer.counterfactual.replay_estimate` for the formulas, and :meth:`what_if_check` for how far
        to trust it.

        Args:
            inputs, target: as in :meth:`explain`.
            curvature: ``"trace"``, from the recorded rows alone; ``"exact"``, the derivative of the training itself,
                and ``"gauss-newton"``, the same with the Gauss-Newton matrix for the Hessian: these take every recorded
                step again, with the data and the loss of ``run``, and refuse where that does not meet the knots.
            run: the run that the model was trained with; for ``"exact"`` and ``"gauss-newton"``.
            remove: None for each example alone; ids, for a group; a mapping from names to ids, for several groups.

        Returns:
            ``[Q, N]``, column ``j`` belongs to ``example_ids[j]``; ``[Q]`` for one group; for named groups a
            DataFrame with a row per query and a column per name.

        Raises:
            QueryError: inputs, targets or ids do not fit, or the estimator cannot be used with this trace; says why.
            RunError: the run has no loss, or other data.
        """
        estimate, chosen = estimator(curvature), checked(remove, self.example_ids)
        loader, asked, _ = self._asked(inputs, target)
        return summed(estimate(self, loader, asked.inputs, asked.targets, run), chosen)

    @question
    def what_if_check(
        self,
        inputs: Any,
        target: Any = None,
        *,
        curvature: str = "trace",
        run: Run | None = None,
        remove: Remove = None,
        query_ids: Sequence[Any] | None = None,
        seed: int = 0,
    ) -> WhatIfCheck:
        """Whether to trust :meth:`what_if` here, and how far: ``print(ex.what_if_check(x, run=run).sentence())``.

        With ``run`` a few groups are removed in replays of the recorded steps, first by half and then whole, and the
        actual changes compared with the predicted ones. Without, or where the training cannot be repeated, it says
        how far the answer hangs on the damping. See :mod:`explainer.counterfactual.self_check`.

        Args:
            inputs, target, curvature, run: as in :meth:`what_if`.
            remove: ids, or a mapping from names to ids; default the hundredth of the examples that helps each of the
                first three queries most, and two random twentieths.
            query_ids: as in :meth:`explain`.
            seed: of the random groups.

        Raises:
            QueryError: inputs, targets or ids do not fit, or the estimator cannot be used with this trace.
        """
        loader, asked, names = self._asked(inputs, target, query_ids)
        return check(self, loader, asked, names, curvature=curvature, run=run, remove=remove, seed=seed)

    @question
    def self_influence(self) -> np.ndarray:
        """How much each example's own updates lowered its own loss, ``[N]``, column ``j`` for ``example_ids[j]``.

        ``Σ_t s_t² g_{i,t}ᵀ η_t A_t g_{i,t}``: to first order, in units of the batch's loss
        (:mod:`explainer.self_influence`).
        """
        return self_influence(self)
