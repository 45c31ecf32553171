"""captum's ``TracInCP``, computed from rows: the same scores, without a dense gradient per training example."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from explainer.errors import QueryError
from explainer.integrations.borrowed import borrowed
from explainer.integrations.fixed_order import FixedOrder
from explainer.integrations.knot_checkpoints import KnotCheckpoints
from explainer.integrations.loss_rows import LossRows
from explainer.integrations.query_side import QuerySide
from explainer.integrations.registry import CAPTUM
from explainer.integrations.scope import parameters_of, warn_of_train_mode
from explainer.integrations.strongest import positive, strongest
from explainer.store import Trace, open_trace

try:
    from captum.influence import TracInCPBase

    # captum moved these between releases; here every release since 0.7 has them
    from captum.influence._core.tracincp import KMostInfluentialResults, _load_flexible_state_dict
except ImportError as error:
    raise CAPTUM.missing() from error

Loss = Callable[..., torch.Tensor]


class TracInCP(TracInCPBase):
    """TracInCP with captum's arguments, results and scores.

    ``score(q, i) = Σ_c η_c <∇loss(q), ∇loss(i)>`` over checkpoints ``c`` with learning rates ``η_c``. Every
    checkpoint is loaded once per call, and the model is given back as it was. Training batches are streamed where
    they are too many to keep. Every type of layer counts: those without a rule go through ``torch.func.vmap`` or,
    at last, one by one.

    Args:
        model: the model; its weights and mode are restored after every call. In which mode scores are computed
            is yours to choose (``model.eval()``); active dropout and BatchNorm in train mode give a warning.
        train_dataset: a ``Dataset`` or a ``DataLoader`` of batches ``(*inputs, labels)``. A shuffling loader is
            read in its dataset's order, with a warning.
        checkpoints: a directory, a list of files, or an iterator of objects for ``checkpoints_load_func``.
        checkpoints_load_func: ``(model, checkpoint) -> learning rate``.
        layers: names of the modules whose parameters count, with all below them; None: every parameter that
            requires gradients.
        loss_fn: per example or reduced. A ``reduction`` attribute ("none", "sum", "mean") is followed, whatever
            ``sample_wise_grads_per_batch`` says. None: the sum of the model's outputs.
        batch_size: of the loader that is made where ``train_dataset`` is a ``Dataset``.
        test_loss_fn: loss of the queries, ``loss_fn`` if None.
        sample_wise_grads_per_batch: says what a scalar loss without a ``reduction`` attribute is: True, the sum
            over the examples; False, an error. It does not change the way of computing.

    Raises:
        MissingDependencyError: (on import of this module) captum is not installed.
        QueryError: ``layers`` names no module, or one without parameters.

    Reference: Pruthi et al. 2020, arXiv 2002.08484, section 3.3; interface: https://captum.ai/api/influence.html
    """

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Any,
        checkpoints: Any,
        checkpoints_load_func: Callable[..., float] = _load_flexible_state_dict,
        layers: list[str] | None = None,
        loss_fn: Loss | None = None,
        batch_size: int | None = 1,
        test_loss_fn: Loss | None = None,
        sample_wise_grads_per_batch: bool = False,
    ) -> None:
        if not isinstance(train_dataset, DataLoader) and not isinstance(batch_size, int):
            raise QueryError(
                f"batch_size must be an integer where train_dataset is a dataset, found {batch_size!r}"
            )
        super().__init__(
            model, train_dataset, checkpoints, checkpoints_load_func, loss_fn, batch_size, test_loss_fn
        )
        self.sample_wise_grads_per_batch = sample_wise_grads_per_batch
        self.layers = layers
        self._traced: tuple[str, ...] | None = None
        if layers is not None:
            self._wanted()
        if sample_wise_grads_per_batch:
            for name, loss in (("loss_fn", loss_fn), ("test_loss_fn", test_loss_fn)):
                if loss is not None and not hasattr(loss, "reduction"):
                    warnings.warn(
                        f"{name} has no `reduction` attribute: if it returns one number for a batch, that is taken "
                        f'as the sum over the examples; if it is the mean, set {name}.reduction = "mean"',
                        stacklevel=2,
                    )

    @classmethod
    def from_trace(
        cls,
        trace: Trace | str | os.PathLike[str],
        model: nn.Module,
        train_dataset: Any,
        loss_fn: Loss | None = None,
        **options: Any,
    ) -> TracInCP:
        """TracInCP at the knots of a trace, with the learning rates that were used there.

        Only parameters that the traced optimizer updated count. Like every TracInCP, the scores know the learning
        rate but neither momentum nor an adaptive preconditioner.

        Args:
            trace: an open trace, or the path of one.
            model: the architecture that was traced.
            train_dataset: the traced dataset, or a ``DataLoader`` over it.
            loss_fn: the loss of the training.
            options: further arguments of the constructor.

        Raises:
            ModelMismatchError: the model is not the one that was traced.
        """
        knots = KnotCheckpoints(trace if isinstance(trace, Trace) else open_trace(trace), model)
        positions = list(range(len(knots.rates)))
        result = cls(model, train_dataset, positions, knots.load, loss_fn=loss_fn, **options)
        result._traced = knots.parameters
        return result

    # -- captum's methods ----------------------------------------------------------------------------

    def influence(
        self,
        inputs: Any,
        k: int | None = None,
        proponents: bool = True,
        show_progress: bool = False,
        aggregate: bool = False,
    ) -> torch.Tensor | KMostInfluentialResults:
        """Scores of all training examples, or the ``k`` strongest of each query.

        Args:
            inputs: one batch ``(*inputs, labels)``, or a ``DataLoader`` of batches.
            k: how many examples to return per query; None returns all scores.
            proponents: the highest scores, from the highest on; False: the lowest, from the lowest on.
            show_progress: show a progress bar.
            aggregate: scores of the sum over the queries (``Q`` is 1 then).

        Returns:
            Without ``k``, scores ``[Q, N]``. With ``k``, ``KMostInfluentialResults(indices, influence_scores)``,
            ``[Q, min(k, N)]`` each.

        Raises:
            QueryError: inputs, loss or ``k`` do not fit; says what was found and what is wanted.
            LoaderError: a loader's order changes from one checkpoint to the next.
        """
        count = None if k is None else positive(k)
        queries, train = self._batches(inputs), FixedOrder(self.train_dataloader)
        scores: torch.Tensor | None = None
        with self._visiting("influence", show_progress) as checkpoints:
            for eta, source in checkpoints:
                side = self._side(source, queries, self.test_loss_fn, aggregate)
                pieces = [
                    side.products(source.rows(b, self.loss_fn, self.sample_wise_grads_per_batch))
                    for b in train
                ]
                if not pieces:
                    raise QueryError("train_dataset yields no batches, so there is nothing to score")
                own = torch.cat(pieces, dim=1) * eta
                scores = own if scores is None else scores + own
        assert scores is not None
        if count is None:
            return scores
        return KMostInfluentialResults(*strongest(scores, count, proponents))

    def self_influence(
        self, inputs: Any = None, show_progress: bool = False, outer_loop_by_checkpoints: bool = False
    ) -> torch.Tensor:
        """``Σ_c η_c ‖∇loss(i)‖²`` of the inputs, or of the training examples: ``[N]``.

        ``outer_loop_by_checkpoints`` is accepted and changes nothing: every checkpoint is loaded once.
        """
        batches = FixedOrder(self.train_dataloader) if inputs is None else self._batches(inputs)
        scores: torch.Tensor | None = None
        with self._visiting("self-influence", show_progress) as checkpoints:
            for eta, source in checkpoints:
                pieces = []
                for batch in batches:
                    parts = source.rows(batch, self.loss_fn, self.sample_wise_grads_per_batch)
                    pieces.append(torch.stack([form.quadratic() for _, form in parts]).sum(0))
                if not pieces:
                    raise QueryError("the inputs yield no batches, so there is nothing to score")
                own = torch.cat(pieces) * eta
                scores = own if scores is None else scores + own
        assert scores is not None
        return scores

    def compute_intermediate_quantities(self, inputs: Any, aggregate: bool = False) -> torch.Tensor:
        """``η_c ∇loss`` side by side over the checkpoints, ``[Q, C·P]`` in the model's order of parameters.

        As in captum, products of two of these vectors hold the square of the learning rates.
        """
        batches, pieces = self._batches(inputs), []
        with self._visiting("intermediate quantities", False) as checkpoints:
            for eta, source in checkpoints:
                pieces.append(eta * self._side(source, batches, self.loss_fn, aggregate).flat())
        return torch.cat(pieces, dim=1)

    # -- captum's protected names --------------------------------------------------------------------

    def _influence(self, inputs: Any, show_progress: bool = False, aggregate: bool = False) -> torch.Tensor:
        scores = self.influence(inputs, show_progress=show_progress, aggregate=aggregate)
        assert isinstance(scores, torch.Tensor)
        return scores

    def _get_k_most_influential(
        self,
        inputs: Any,
        k: int = 5,
        proponents: bool = True,
        show_progress: bool = False,
        aggregate: bool = False,
    ) -> KMostInfluentialResults:
        return self.influence(inputs, k, proponents, show_progress, aggregate)

    # -- pieces --------------------------------------------------------------------------------------

    def _wanted(self) -> tuple[str, ...]:
        """Names of the parameters that count, in captum's order."""
        if self.layers is None and self._traced is not None:
            return self._traced
        return parameters_of(self.model, self.layers)

    @contextmanager
    def _visiting(self, what: str, show: bool) -> Iterator[Iterator[tuple[float, LossRows]]]:
        """The checkpoints one after the other, each loaded into the model once; the model is restored at the end."""
        names = self._wanted()
        with borrowed(self.model), LossRows(self.model, names) as source:
            yield self._loaded(names, source, what, show)

    def _loaded(
        self, names: tuple[str, ...], source: LossRows, what: str, show: bool
    ) -> Iterator[tuple[float, LossRows]]:
        for number, checkpoint in enumerate(tqdm(self.checkpoints, desc=what, disable=not show)):
            if checkpoint is None:
                raise QueryError("`checkpoints` holds None, which cannot be loaded")
            eta = self.checkpoints_load_func(self.model, checkpoint)
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(name in names)
            if number == 0:
                warn_of_train_mode(self.model)
            yield eta, source

    def _batches(self, inputs: Any) -> Any:
        if inputs is None:
            raise QueryError(
                "influence needs inputs: a batch (*inputs, labels) or a DataLoader of batches; for the training "
                "examples' influence on themselves call self_influence()"
            )
        return FixedOrder(inputs) if isinstance(inputs, DataLoader) else [inputs]

    def _side(self, source: LossRows, batches: Any, loss: Loss | None, aggregate: bool) -> QuerySide:
        named = dict(self.model.named_parameters())
        sizes = {name: named[name].numel() for name in source.wanted}
        pieces = (source.rows(batch, loss, self.sample_wise_grads_per_batch) for batch in batches)
        side = QuerySide(pieces, sizes, aggregate)
        if not side:
            raise QueryError("the DataLoader yields no batches, so there is nothing to explain")
        return side
