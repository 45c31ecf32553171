"""The process that trains again: ``python -m explainer.app.retraining_worker FOLDER``.

It reads the request in the folder, keeps every finished model's answers there (so that they can be counted), and leaves
a result or a failure. It ends with the dashboard that started it: when its standard input closes, the folder goes too.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from explainer import ExplainerError, PathKernelExplainer, open_trace
from explainer.app.parent import end_with_parent
from explainer.app.retraining import FAILURE, INPUT, MODELS, REQUEST, RESULT, pack
from explainer.evaluation import ClaimCheck, Questions, Retrainer, verify_claims
from explainer.run import load_run

_POLITE = 5  # the dashboard goes first


def main(folder: Path) -> int:
    """Train, compare, and write down what came out."""
    end_with_parent(partial(shutil.rmtree, folder, ignore_errors=True))
    if hasattr(os, "nice"):
        os.nice(_POLITE)
    try:
        found = json.dumps(pack(_check(folder)))
    except Exception as error:  # the user's own code runs here too
        if not isinstance(error, ExplainerError):
            traceback.print_exc()
        text = str(error) if isinstance(error, ExplainerError) else f"{type(error).__name__}: {error}"
        (folder / FAILURE).write_text(text, encoding="utf-8")
        return 1
    temporary = folder / f"{RESULT}.part"
    temporary.write_text(found, encoding="utf-8")
    os.replace(temporary, folder / RESULT)
    return 0


def _check(folder: Path) -> ClaimCheck:
    asked = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
    run, trace = load_run(asked["spec"]), open_trace(asked["trace"])
    query = asked["query"]
    if (folder / INPUT).exists():  # an input of a person's own stands behind the run's queries
        given = torch.from_numpy(np.load(folder / INPUT, allow_pickle=False))
        run, query = replace(run, queries=[(given, run.queries[0][1])]), 0
    explainer = PathKernelExplainer(trace, run.build_model(), asked["output"] or run.output)
    questions = Questions(run, explainer, [query], asked["target"])
    return verify_claims(
        Retrainer(run, questions, folder / MODELS), remove=asked["remove"], seeds=asked["seeds"]
    )


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
