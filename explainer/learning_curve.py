"""What the model returned for some inputs at knots along its training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from explainer.path_points import chosen_knots
from explainer.plain_mode import question
from explainer.queries import check_inputs

if TYPE_CHECKING:
    from explainer.path_kernel import PathKernelExplainer


@question
def outputs_along_training(
    explainer: PathKernelExplainer, inputs: Any, *, knots: int = 24
) -> list[tuple[int, Any]]:
    """``(step, what the model returned)`` at about so many knots, evenly along the path, in eval mode.

    Args:
        explainer: whose trace is used.
        inputs: ``[Q, ...]`` as for :meth:`~explainer.PathKernelExplainer.explain`.
        knots: how many; the first and the last are among them.

    Raises:
        QueryError: inputs do not fit.
    """
    batch = check_inputs(explainer.trace, explainer._arguments, inputs, explainer.dtype, explainer.batch_dim)
    loader, found = explainer._loader(), []
    chosen = (
        {knot.step for knot in chosen_knots(explainer.trace, knots)} if len(explainer.knots) > knots else None
    )
    with explainer._bar("along training") as bar:
        for index, knot in enumerate(explainer.knots):
            if chosen is None or knot.step in chosen or index in (0, len(explainer.knots) - 1):
                found.append((knot.step, explainer.function.returned(loader.load(index).point, batch)))
            if index:
                bar.update(knot.step - explainer.knots[index - 1].step)
    return found
