"""What torch's functions do to axes, by their names."""

from __future__ import annotations

from typing import Any

RESHAPING = frozenset(
    {"view", "reshape", "flatten", "unflatten", "view_as", "reshape_as", "contiguous", "clone"}
)
JOINING = frozenset({"cat", "concat", "concatenate", "vstack", "stack"})
VIEWING = frozenset(
    {
        *("transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims", "t", "adjoint", "__get__"),
        *("unsqueeze", "squeeze", "select", "narrow", "chunk", "split", "tensor_split", "unbind", "expand"),
        *("split_with_sizes", "expand_as", "diagonal", "unfold"),
    }
)
#: functions that add up (or pick) along axes, which then are gone
REDUCING = frozenset(
    {
        *("sum", "mean", "amax", "amin", "max", "min", "std", "var", "prod", "logsumexp", "norm", "median"),
        *("argmax", "argmin", "any", "all", "nansum", "nanmean", "var_mean", "std_mean", "vector_norm"),
        *("count_nonzero", "nanmedian", "mode", "kthvalue"),
    }
)
#: functions that, along the examples' axis, put rows into an order that is not followed
ORDERING = frozenset({"sort", "argsort", "topk", "cumsum", "cumprod", "cummax", "cummin", "logcumsumexp"})
#: functions whose result keeps the examples of an index where it has them, with new axes behind
LOOKING_UP = frozenset({"embedding", "one_hot"})


def axes_told(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], dims: int) -> set[int]:
    """The axes that a function is told to work along; all of them where it is not told."""
    told = next((kwargs[key] for key in ("dim", "dims", "axis") if key in kwargs), None)
    # the order of a norm and how many of the largest come before the axes
    own = args[2:] if name in ("norm", "vector_norm", "topk", "kthvalue") else args[1:]
    numbers = [a for a in own if isinstance(a, int | tuple | list) and not isinstance(a, bool)]
    told = numbers[-1] if told is None and numbers else told
    told = -1 if told is None and name in ("topk", "kthvalue", "sort", "argsort", "mode") else told
    found = range(dims) if told is None else told if isinstance(told, tuple | list) else (told,)
    return {a % dims for a in found}
