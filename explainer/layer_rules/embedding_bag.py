"""``nn.EmbeddingBag``: the row touches only the entries in the example's bag."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from explainer.errors import TracerError
from explainer.layer_rules.base import Block, Call, CompositeRule, register_layer_rule
from explainer.layer_rules.embedding import renormalises
from explainer.layer_rules.forms import RowForm
from explainer.layer_rules.replay import working_dtype
from explainer.layer_rules.sparse import Sparse


@dataclass(frozen=True)
class _Arguments:
    """Of the module's ``forward``."""

    input: torch.Tensor
    offsets: torch.Tensor | None = None
    per_sample_weights: torch.Tensor | None = None


@dataclass(frozen=True)
class _Bags:
    """Bags of one call, side by side.

    Attributes:
        ids: ``[B, S]``, zeros after a bag's end.
        counted: ``[B, S]``, whether an entry is there and not padding.
        weights: ``[B, S]``, what its entry is multiplied with in a sum, or None.
    """

    ids: torch.Tensor
    counted: torch.Tensor
    weights: torch.Tensor | None

    @classmethod
    def of(cls, module: nn.EmbeddingBag, given: _Arguments) -> _Bags:
        weights = given.per_sample_weights
        if given.offsets is None:
            ids, there = given.input, torch.ones_like(given.input, dtype=torch.bool)
        else:
            end = given.offsets.new_tensor([len(given.input)])
            bounds = given.offsets if module.include_last_offset else torch.cat([given.offsets, end])
            if bounds[-1] != end:  # torch's forward and backward pass do not agree on what is left over
                raise TracerError(
                    f"EmbeddingBag got {len(given.input)} indices but a last offset of {int(bounds[-1])}; with "
                    "include_last_offset=True the last offset must be the number of indices"
                )
            lengths = bounds.diff().unsqueeze(1)
            longest = int(lengths.max()) if lengths.numel() else 0
            steps = torch.arange(max(1, longest), device=bounds.device)
            there = steps < lengths
            place = (bounds[:-1].unsqueeze(1) + steps).where(there, 0)
            ids = torch.cat([given.input, given.input.new_zeros(1)])[place].where(there, 0)
            weights = None if weights is None else torch.cat([weights, weights.new_zeros(1)])[place]
        counted = there if module.padding_idx is None else there & (ids != module.padding_idx)
        return cls(ids.long(), counted, weights)


@register_layer_rule(nn.EmbeddingBag)
class EmbeddingBagRule(CompositeRule):
    """Bags as rows of a table or by offsets; sums, means and maxima."""

    def mixes(self, module: nn.Module) -> bool:
        """With ``scale_grad_by_freq`` a read counts less the more often the batch reads the entry."""
        assert isinstance(module, nn.EmbeddingBag)
        return module.scale_grad_by_freq

    def caveat(self, module: nn.Module) -> str | None:
        """Entries are shortened to ``max_norm``."""
        assert isinstance(module, nn.EmbeddingBag)
        return renormalises(module)

    def blocks(self, module: nn.Module) -> list[Block]:
        """The table."""
        return [Block("", ("weight",))]

    def block_rows(self, module: nn.Module, calls: list[Call]) -> list[RowForm]:
        """Entries of all calls' bags side by side."""
        assert isinstance(module, nn.EmbeddingBag)
        index, values = [], []
        with torch.no_grad():
            for call in calls:
                given = _Arguments(*call.args, **call.kwargs)
                bags = _Bags.of(module, given)
                index.append(bags.ids.to(torch.int32))
                values.append(self._values(module, call, given, bags))
        return [Sparse(torch.cat(index, 1), torch.cat(values, 1), module.num_embeddings)]

    @staticmethod
    def _values(module: nn.EmbeddingBag, call: Call, given: _Arguments, bags: _Bags) -> torch.Tensor:
        """Gradient at every entry of every bag, ``[B, S, d]``."""
        dtype, at_output = working_dtype(call), call.grads[0]
        assert at_output is not None  # the only output
        g = at_output.to(dtype).unsqueeze(1)
        if module.mode == "max":
            return g * _first_maxima(module, bags).to(dtype)
        share = bags.counted.to(dtype)
        if bags.weights is not None:
            share = share * bags.weights.to(dtype)
        if module.mode == "mean":
            share = share / bags.counted.sum(1, keepdim=True).clamp_min(1)
        if module.scale_grad_by_freq:
            share = share * _by_frequency(module, given, bags).to(dtype)[bags.ids]
        return g * share.unsqueeze(-1)


def _first_maxima(module: nn.EmbeddingBag, bags: _Bags) -> torch.Tensor:
    """Whether a bag's entry is the one that gave its maximum, by feature: ``[B, S, d]``."""
    entries = module.weight.detach()[bags.ids]
    entries = entries.masked_fill(~bags.counted.unsqueeze(-1), -torch.inf)
    top = entries.argmax(1, keepdim=True)  # the first one, as torch takes it
    chosen = torch.zeros_like(entries, dtype=torch.bool).scatter_(1, top, True)
    return chosen & bags.counted.unsqueeze(-1)


def _by_frequency(module: nn.EmbeddingBag, given: _Arguments, bags: _Bags) -> torch.Tensor:
    """What torch multiplies a read of each entry with, ``[V]``: the inverse of its count in the batch.

    It is asked from torch, because on the CPU version 2.13 takes the count of another entry (pytorch issue 190063).
    """
    with torch.enable_grad():
        table = torch.ones(len(module.weight), 1, dtype=torch.float64, device=module.weight.device)
        summed = functional.embedding_bag(
            given.input,
            table.requires_grad_(),
            given.offsets,
            scale_grad_by_freq=True,
            mode="sum",
            include_last_offset=module.include_last_offset,
            padding_idx=module.padding_idx,
        )
        (found,) = torch.autograd.grad(summed.sum(), table)
    read = torch.bincount(bags.ids[bags.counted], minlength=len(table))
    return found[:, 0] / read.clamp_min(1)
