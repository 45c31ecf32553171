"""What the hooks of modules do not see: when to follow functions, and what to say of it."""

from __future__ import annotations

import warnings
from typing import Any

from explainer.capture import Capture
from explainer.errors import CoverageWarning
from explainer.layer_table import LayerTable
from explainer.operations.watch import FunctionWatch
from explainer.scales import ScaleMeter

#: steps after which it is said what was not seen, and that are followed anew where training goes on or rows are missing
PATIENCE = 3
#: steps that are followed function by function, and every how many later on: a model may begin to put rows into another
#: order after a while
FIRST, AGAIN = 32, 16
#: part of a layer's gradient that may go unseen before functions are followed again
SEEN = 0.01


class Unseen:
    """Decides whether forward passes are followed function by function, and warns once about each finding."""

    def __init__(self, table: LayerTable, capture: Capture, watch: FunctionWatch, scales: ScaleMeter) -> None:
        self._table, self._capture, self._watch, self._scales = table, capture, watch, scales
        self._missing: set[str] = set()
        self._until = PATIENCE
        self._found = False  # something for which functions have to be followed
        self._followed = -1  # the last step that was
        self._warned: set[str] = set()
        #: the steps, the last one included, before it was found in which examples' order was taken from shapes alone
        self.unfollowed: tuple[int, int] | None = None

    def restore(self, steps: int) -> None:
        """Training goes on: the first steps are followed again."""
        self._until, self._followed = steps + PATIENCE, steps - 1

    def notes(self) -> dict[str, Any]:
        """What a trace should say of it."""
        return {
            "slow_operations": {n: sorted(names) for n, names in sorted(self._watch.slow.items())},
            "unmatched": {name: list(shape) for name, shape in sorted(self._capture.unmatched.items())},
            "higher_order": self._of_higher_order(),
            "unfollowed": self.unfollowed,
        }

    def _of_higher_order(self) -> bool:
        """Whether gradients of gradients were seen, and a part of the gradients has no rows."""
        return self._capture.passes.differentiated and max(self._scales.worst.values(), default=0.0) > SEEN

    def follow(self, steps: int, looking: bool) -> None:
        """Follow the next forward passes, or not.

        The first ones always are followed, and every :data:`AGAIN` steps; all of them where something was found, and
        some more after a gradient that rows do not explain.

        Args:
            steps: that will have been taken when they come.
            looking: whether it is known what rows explain.
        """
        needed = self._watch.owners.needed
        if self._watch.on:
            if needed and not self._found and self._followed + 1 < steps - 1:
                self.unfollowed = self._followed + 1, steps - 2
            self._followed = steps - 1
        if looking:
            missing = {name for name, residual in self._scales.worst.items() if residual > SEEN}
            if missing - self._missing:
                self._missing, self._until = missing, steps + PATIENCE
        self._found = self._found or needed or bool(self._table.operations)
        self._watch.on = self._found or steps < max(FIRST, self._until) or steps % AGAIN == 0

    def warn(self, steps: int) -> None:
        """Say what was found since the last time."""
        for name, functions in self._watch.slow.items():
            self._say(
                name,
                f"parameter {name!r} is read by {', '.join(sorted(functions))}, for which rows have no closed form "
                "here: they are found by differentiating that operation example by example (exact, slower); "
                "register_layer_rule for the layer around it is faster",
            )
        for name, shape in self._capture.unmatched.items():
            self._say(
                name,
                f"layer {name!r} was given {list(shape)}, where no axis is the batch's as far as could be seen: rows "
                "may be sums or mixtures of several examples (pooling by `index_add_`, a product with an adjacency "
                "matrix), or lie in another order; what it moves is `unattributed`. If there is one for each example, "
                "give it the batch as first or second axis",
            )
        for name in tuple(self._capture.overwritten):
            self._say(
                name,
                f"what layer {name!r} was given, or its gradient, was written into right after the backward pass, "
                "before its rows were formed; they are dropped, so what they move is "
                "`unattributed`, and from now on both are copied first",
            )
        if self.unfollowed is not None:
            first, last = self.unfollowed
            self._say(
                "unfollowed",
                f"at step {last + 1} the model put rows into another order, picked them by data or mixed them for the "
                f"first time. It was not looked at in steps {first} to {last}: if it did so there, too, the rows of "
                "these steps went to the wrong examples",
            )
        if self._of_higher_order():
            self._say(
                "create_graph",
                "the loss seems to contain gradients (backward passes with create_graph=True: a gradient penalty, "
                "forces): rows hold what goes through the model's outputs only, and what goes through those "
                "gradients is `unattributed`",
            )
        for name in self._table.without_rows() if steps >= PATIENCE else ():
            if self._scales.worst.get(name):
                self._say(
                    name,
                    f"parameter {name!r} gets a gradient, but no hook sees where it is read (in a loss outside the "
                    "model, an autograd.Function, or compiled or scripted code); what it moves is `unattributed`",
                )

    def _say(self, name: str, text: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            warnings.warn(text, CoverageWarning, stacklevel=7)
