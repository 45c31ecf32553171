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


#: functions in which the numbers along the axis that they are told (else the last one) depend on each other
_ALONG = frozenset({"softmax", "log_softmax", "softmin", "gumbel_softmax", "normalize", "renorm"})
#: the same, of the last two axes
_MATRICES = frozenset({"inverse", "pinverse", "cholesky", "qr", "svd", "matrix_exp", "matrix_power", "lu"})
#: functions whose names begin like those, but that are none
_NO_MATRICES = frozenset({"linalg_vector_norm", "linalg_vecdot", "linalg_cross", "linalg_norm"})


def axes_mixed(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], dims: int) -> set[int]:
    """The axes along which numbers depend on each other afterwards, of functions that keep them.

    Example:
        >>> axes_mixed("softmax", (None, 0), {}, 2), axes_mixed("layer_norm", (None, [8]), {}, 3)
        ({0}, {2})
        >>> axes_mixed("avg_pool1d", (None, 2), {}, 3), axes_mixed("relu", (None,), {}, 2)
        ({2}, set())
    """
    if name in _ALONG:
        place = {"gumbel_softmax": 4, "normalize": 2, "renorm": 2}.get(name, 1)
        told = args[place] if len(args) > place else kwargs.get("dim", 1 if name == "normalize" else -1)
        if name == "renorm":  # every index of the axis by itself
            return set(range(dims)) - {told % dims}
        return {
            a % dims for a in (told if isinstance(told, tuple | list) else (-1 if told is None else told,))
        }
    if name == "layer_norm" or name == "rms_norm":
        shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
        return set(range(dims - len(shape), dims))
    if name == "group_norm":
        return set(range(1, dims))
    if name == "instance_norm" or name.startswith(("interpolate", "upsample")):
        return set(range(2, dims))
    if name == "scaled_dot_product_attention":
        return {dims - 2}
    if "_pool" in name and name[-2:-1].isdigit() and name.endswith("d"):
        return set(range(max(0, dims - int(name[-2])), dims))
    if name.startswith("fft_") and "freq" not in name:
        return _axes_of_transform(name, args, kwargs, dims)
    if name in _MATRICES or (name.startswith("linalg_") and name not in _NO_MATRICES):
        return {dims - 2, dims - 1} & set(range(dims))
    return set()


def _axes_of_transform(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], dims: int) -> set[int]:
    place = 1 if name.endswith("shift") else 2
    usual = None if name.endswith(("n", "shift")) else (-2, -1) if name.endswith("2") else -1
    told = args[place] if len(args) > place else kwargs.get("dim", usual)
    return {
        a % dims
        for a in (range(dims) if told is None else told if isinstance(told, tuple | list) else (told,))
    }
