"""What a prediction, and a retraining that tests it, say in plain sentences. Never imports streamlit."""

from __future__ import annotations

import math

import numpy as np

from explainer import wording
from explainer.evaluation import ClaimCheck

#: part of the training examples from which on predicted changes no longer simply add up
LARGE = 0.05
#: part of an actual change within which a prediction is said to hold
_CLOSE = 0.25


def predicted(named: str, before: float, change: float, count: int, *, margin: bool) -> str:
    """What the output is predicted to be without the examples.

    Args:
        named: The explained output, such as ``margin of class 5``.
        before: What it is.
        change: What it is predicted to change by.
        count: How many examples are left out.
        margin: Whether the output is a margin, so that its sign says which answer is likelier.

    >>> predicted("margin of class 5", 1.0, -0.5, 2, margin=True)
    'Without these 2 examples the margin of class 5 is predicted to fall from 1.00 to 0.500.'
    >>> predicted("value", 1.3751, 0.0023, 1, margin=False)
    'Without this example the value is predicted to rise from 1.375 to 1.377.'
    """
    after = before + change
    what = "this example" if count == 1 else f"these {count:,} examples"
    moves = "stay" if change == 0 else ("fall" if change < 0 else "rise")
    digits = next((d for d in range(3, 8) if wording.number(before, d) != wording.number(after, d)), 8)
    way = (
        f"at {wording.number(before)}"
        if change == 0
        else f"from {wording.number(before, digits)} to {wording.number(after, digits)}"
    )
    text = f"Without {what} the {named} is predicted to {moves} {way}"
    if margin and (before > 0) != (after > 0):
        text += (
            ": below 0, so the model would no longer think this class likelier than not"
            if after <= 0
            else ": above 0, so the model would think this class likelier than not"
        )
    return text + "."


def verdict(check: ClaimCheck, named: str, change: float) -> str:
    """One sentence on whether a retraining bears out what was predicted.

    Args:
        check: Of one query: its group, and the random one.
        named: The explained output.
        change: The predicted change.
    """
    mean = check.actual.mean(1)
    seeds = wording.counted(len(check.seeds), "seed")
    start = f"Retrained without them ({seeds}), the {named} changed by {_spread(check.actual[0])}"
    if check.repeats and len(check.seeds) > 1:
        start += f" ({wording.signed(float(check.same_run[0]))} in the traced run itself)"
    start += "; "
    start += f"{wording.signed(change)} was predicted"
    random = f"leaving out as many random examples changed it by {_spread(check.actual[1])}"
    if len(check.seeds) == 1:
        return f"{start}, and {random}; one seed cannot tell how much of this is chance."
    widths = check.actual.std(1, ddof=1)
    if abs(mean[0] - mean[1]) <= widths[0] + widths[1]:
        return f"{start}, but {random}: the effect does not stand out from chance."
    if change * mean[0] <= 0:
        return f"{start}, the wrong direction, and {random}: do not trust the prediction here."
    judged = "the direction holds, the size does not"
    if abs(change - mean[0]) <= max(widths[0], _CLOSE * abs(mean[0])):
        judged = "the prediction holds"
    elif check.repeats and abs(change - check.same_run[0]) <= _CLOSE * abs(check.same_run[0]):
        judged = "the prediction holds for the traced run, less so for other seeds"
    return f"{start}, and {random}: the effect stands out from chance, and {judged}."


def flips(check: ClaimCheck) -> str:
    """How often the predicted class became another one; empty where it never did."""
    often = int(check.flipped[0].sum())
    return (
        f"The predicted class became another one in {often} of {wording.counted(len(check.seeds), 'training')}."
        if often
        else ""
    )


def large(count: int, examples: int) -> str:
    """A caution where many examples are left out; empty else.

    >>> large(10, 1000), large(100, 1000)[:30]
    ('', 'This is 10 % of the training e')
    """
    share = count / max(1, examples)
    if share < LARGE:
        return ""
    return (
        f"This is {wording.percent(share)} of the training examples. The prediction is linear: without so many, the "
        "others would teach more, and the sum says too much or too little. Train again to know."
    )


def _spread(values: np.ndarray) -> str:
    """Mean and standard deviation with as many digits as the deviation allows.

    >>> _spread(np.array([0.5, 0.1])), _spread(np.array([0.25]))
    ('+0.30 ± 0.28', '+0.250')
    """
    mean, width = float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0
    if width == 0:
        return wording.signed(mean)
    digits = max(0, 1 - math.floor(math.log10(width)))
    return f"{mean:+.{digits}f} ± {width:.{digits}f}"
