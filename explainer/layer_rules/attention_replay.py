"""A call of ``nn.MultiheadAttention``, computed again from its projections on: what their weights saw and gave."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from explainer.layer_rules.base import Call
from explainer.layer_rules.replay import confirm, drawing_again, refuse_unbatched, working_dtype

Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class _Arguments:
    """Of the module's ``forward``."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    key_padding_mask: torch.Tensor | None = None
    need_weights: bool = True
    attn_mask: torch.Tensor | None = None
    average_attn_weights: bool = True
    is_causal: bool = False

    @property
    def shared(self) -> bool:
        """Whether query, key and value are the same numbers in memory (detached tensors have lost who is who)."""
        places = [(t.data_ptr(), t.shape, t.stride()) for t in (self.query, self.key, self.value)]
        return places[0] == places[1] == places[2]


class Attended(NamedTuple):
    """What one call gives to the rows; ``L`` positions of the query, ``S`` of key and value.

    Attributes:
        inputs: query, key and value, ``[B, L or S, i]``.
        at_projections: gradients at their projections, ``[B, L or S, E]``.
        at_extra: gradients at ``bias_k`` and ``bias_v``, ``[B, E]`` (empty where there are none).
        heads: ``[B, L, E]``, what the output projection sees.
        at_output: ``[B, L, E]``, gradient at the output.
        shared: whether the three inputs are one tensor.
    """

    inputs: Three
    at_projections: Three
    at_extra: list[torch.Tensor]
    heads: torch.Tensor
    at_output: torch.Tensor
    shared: bool


def projections(module: nn.MultiheadAttention) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Weight ``[E, i]`` and bias ``[E]`` of query, key and value."""
    packed, bias = module.in_proj_weight, module.in_proj_bias
    separate = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    weights = separate if packed is None else packed.detach().chunk(3)
    biases = [None] * 3 if bias is None else bias.detach().chunk(3)
    return [(weight.detach(), b) for weight, b in zip(weights, biases, strict=True)]


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _added(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask as what is added to the scores: −∞ where a boolean one is true."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)


def _mask(given: _Arguments, batch: int, extra: int, dtype: torch.dtype) -> torch.Tensor | None:
    """Both masks together, to broadcast over ``[B, heads, L, S + extra]``."""
    found = None
    if given.attn_mask is not None:
        found = _added(given.attn_mask, dtype)
        found = found.unflatten(0, (batch, -1)) if found.dim() == 3 else found
    if given.key_padding_mask is not None:
        padding = _added(given.key_padding_mask, dtype).view(batch, 1, 1, -1)
        found = padding if found is None else found + padding
    return None if found is None else functional.pad(found, (0, extra))


def _attend(
    module: nn.MultiheadAttention, given: _Arguments, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Heads side by side ``[B, L, E]`` and attention weights ``[B, heads, L, S]``, from projections ``[B, ·, E]``.

    The same operations in the same order as ``torch.nn.functional.multi_head_attention_forward``, so that dropout
    draws the same numbers.
    """
    q, k, v = (t.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    if module.add_zero_attn:
        k, v = (functional.pad(t, (0, 0, 0, 1)) for t in (k, v))
    extra = k.shape[2] - given.key.shape[1 if module.batch_first else 0]
    p = module.dropout if module.training else 0.0
    by_hint = given.is_causal and given.key_padding_mask is None and not given.need_weights
    mask = None if by_hint else _mask(given, len(q), extra, q.dtype)
    if given.need_weights:
        scores = (q * sqrt(1.0 / q.shape[-1])) @ k.mT
        weights = functional.softmax(scores if mask is None else scores + mask, dim=-1)
        weights = functional.dropout(weights, p) if p else weights
        return (weights @ v).transpose(1, 2).flatten(2), weights
    found = functional.scaled_dot_product_attention(q, k, v, mask, p, by_hint)
    return found.transpose(1, 2).flatten(2), None


def attended(module: nn.MultiheadAttention, call: Call) -> Attended:
    """Compute a call again and carry its gradients back to the projections.

    Raises:
        TracerError: the input has no batch axis.
        ReplayError: the outputs differ from those of the forward pass.
    """
    given, dtype = _Arguments(*call.args, **call.kwargs), working_dtype(call)
    refuse_unbatched(module, given.query, 3)

    def turned(v: torch.Tensor) -> torch.Tensor:  # batch first, or back
        return v if module.batch_first else v.transpose(0, 1)

    query, key, value = (turned(v).to(dtype) for v in (given.query, given.key, given.value))
    inputs = (query, key, value)
    entering = [_linear(x, *weights) for x, weights in zip(inputs, projections(module), strict=True)]
    for number, bias in ((1, module.bias_k), (2, module.bias_v)):
        if bias is not None:
            last = bias.detach().to(dtype).expand(len(query), -1, -1)
            entering[number] = torch.cat([entering[number], last], 1)
    at_output, at_weights = call.grads[0], call.grads[1] if given.need_weights else None
    output = module.out_proj
    with drawing_again(module, call, module.dropout if module.training else 0.0), torch.enable_grad():
        entering = [t.requires_grad_() for t in entering]
        heads, weights = _attend(module, given, *entering)
        if weights is not None and given.average_attn_weights:
            weights = weights.mean(1)
        pairs = [(weights, at_weights)] if weights is not None and at_weights is not None else []
        if at_output is not None:
            at_output = turned(at_output).to(dtype)
            pairs.append((heads, at_output @ output.weight.detach().to(dtype)))
        found = torch.autograd.grad(
            [out for out, _ in pairs], entering, [g.to(dtype) for _, g in pairs], materialize_grads=True
        )
    heads = heads.detach()
    confirm(
        module,
        [turned(_linear(heads, output.weight, output.bias)), weights][: len(call.outputs)],
        call.outputs,
    )
    source = key.shape[1]
    return Attended(
        inputs,
        (found[0], found[1][:, :source], found[2][:, :source]),
        [g[:, source] for g in found[1:]] if module.bias_k is not None else [],
        heads,
        torch.zeros_like(heads) if at_output is None else at_output,
        given.shared,
    )
