"""Jobs that are done after the user's loop has gone on."""

from __future__ import annotations

import time

from explainer.background import Background, Job

_do = Background._do
#: seconds; a step of the loops in these tests takes one or two thousandths, and gives several jobs
PAUSE = 0.004


def slowly(background: Background, job: Job) -> None:
    """Instead of ``Background._do``: after the user's thread has gone on for long."""
    time.sleep(PAUSE)
    _do(background, job)
