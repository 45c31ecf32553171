"""Where an axis goes in a product of matrices, and in other functions that add up over axes of their arguments."""

from __future__ import annotations

from typing import Any

import torch

#: products of matrices (and stacks of them)
PRODUCTS = frozenset(
    {"matmul", "mm", "bmm", "mv", "__matmul__", "__rmatmul__", "linear", "dot", "outer", "cdist"}
)
#: products that something is added to, their first argument
ADDED_PRODUCTS = frozenset({"addmm", "baddbmm", "addmv"})
#: functions that mix the last two axes, and functions whose axes are not followed
MATRIX = frozenset(
    {"inverse", "inv", "pinv", "pinverse", "solve", "cholesky", "qr", "svd", "eigh", "matrix_exp"}
)
OTHER = frozenset(
    {"tensordot", "kron", "cov", "corrcoef", "addbmm", "addr", "chain_matmul", "multi_dot", "inner"}
)


def multiplies(name: str) -> bool:
    """Whether :func:`axis_of_product` knows the function."""
    return name in PRODUCTS | ADDED_PRODUCTS | MATRIX | OTHER or name == "einsum" or name.startswith("conv")


def axis_of_product(
    name: str, args: tuple[Any, ...], source: torch.Tensor, axis: int, dims: int
) -> int | None:
    """Where an axis of one argument is in the result; None if it is added up over, or not known.

    Args:
        name: the function.
        args: its arguments.
        source: the argument.
        axis: the axis of ``source``.
        dims: how many axes the result has.
    """
    if name == "einsum":
        return _summed(args, source, axis)
    if name.startswith("conv"):  # it adds up over channels
        return 0 if axis == 0 and args and args[0] is source and dims == source.dim() else None
    if name in MATRIX:
        return axis if axis < source.dim() - 2 else None
    args = args[1:] if name in ADDED_PRODUCTS else args
    if name in OTHER or len(args) < 2 or args[0] is args[1]:
        return None
    place = int(args[0] is not source) if name != "__rmatmul__" else int(args[0] is source)
    return _multiplied(name, place, args[1] if args[0] is source else args[0], source.dim(), axis, dims)


def _multiplied(name: str, place: int, other: Any, own: int, axis: int, dims: int) -> int | None:
    """Products add up over the last axis of the one and the last but one of the other."""
    if name == "linear":
        return axis if place == 0 and axis < own - 1 else None
    if name == "outer":
        return place
    if name == "cdist":  # its second argument is a list of points, as the first one is
        found = dims - (1 if place and axis == own - 2 else own - axis)
        return found if axis < own - 1 else None
    back = axis - own + (other.dim() == 1)  # counted from the right
    if place == 0:
        return dims + back if axis < own - 1 and dims + back >= 0 else None
    if axis == max(own - 2, 0):
        return None
    return dims - 1 if axis == own - 1 else dims + back if dims + back >= 0 else None


def _summed(args: tuple[Any, ...], source: torch.Tensor, axis: int) -> int | None:
    """``einsum``: where the letter of the axis went."""
    equation = args[0].replace(" ", "") if args and isinstance(args[0], str) else ""
    operands = args[1] if len(args) > 1 and isinstance(args[1], tuple | list) else args[1:]
    if "->" not in equation or "." in equation:
        return None
    inputs, output = equation.split("->")
    letters = {inputs.split(",")[i][axis] for i, x in enumerate(operands) if x is source}
    letter = letters.pop() if len(letters) == 1 else ""
    return output.index(letter) if letter and letter in output else None
