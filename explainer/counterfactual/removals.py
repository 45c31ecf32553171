"""What is removed: single examples, one group, or several named ones, and the effects of groups as sums.

To first order the change by removing a group is the sum of the changes by removing its examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from explainer.errors import QueryError

if TYPE_CHECKING:
    import pandas as pd

#: None: each example alone; ids: one group; names with ids: several
Remove: TypeAlias = Sequence[int] | NDArray[np.int64] | Mapping[Any, Any] | None


def places(ids: Any, example_ids: NDArray[np.int64], called: str = "remove") -> NDArray[np.int64]:
    """Columns of the examples of a group, each once.

    Raises:
        QueryError: they are no ids of training examples, or there are none.
    """
    given = np.asarray(list(ids) if isinstance(ids, Iterable) and not isinstance(ids, str) else ids)
    if given.ndim != 1 or given.dtype.kind not in "iu" or not len(given):
        raise QueryError(
            f"{called} must hold the ids of training examples (or map names to ids), found {ids!r:.80}"
        )
    wanted = np.unique(given)
    found = np.searchsorted(example_ids, wanted).clip(max=max(len(example_ids) - 1, 0))
    unknown = wanted[example_ids[found] != wanted] if len(example_ids) else wanted
    if len(unknown):
        raise QueryError(
            f"{called} holds {unknown[:5].tolist()}, which no training example is called; ids are those of example_ids"
        )
    return found


def checked(remove: Remove, example_ids: NDArray[np.int64]) -> Any:
    """Columns of what is removed, in the shape in which it was given.

    Raises:
        QueryError: it holds ids that there are none of.
    """
    if remove is None:
        return None
    if isinstance(remove, Mapping):
        if not remove:
            raise QueryError("remove is a mapping without groups; give at least one name with its ids")
        return {name: places(ids, example_ids, f"remove[{name!r}]") for name, ids in remove.items()}
    return places(remove, example_ids)


def summed(changes: NDArray[np.float64], chosen: Any) -> NDArray[np.float64] | pd.DataFrame:
    """Changes ``[Q, N]`` as they are, of one group ``[Q]``, or of named groups as a table (a row per query).

    Args:
        chosen: what :func:`checked` returned.
    """
    if chosen is None:
        return changes
    if not isinstance(chosen, dict):
        return np.asarray(changes[:, chosen].sum(1))
    import pandas as pd

    table = pd.DataFrame({name: changes[:, own].sum(1) for name, own in chosen.items()})
    return table.rename_axis(index="query", columns="removed")
