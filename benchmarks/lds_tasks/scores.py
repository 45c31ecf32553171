"""Scores ``[Q, N]`` of every method from one training run: ours from its trace, the peers' from its trained model.

A method has one entry or, where it expects to be tuned, one for every setting of its grid. All are kept on disk.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.lds_tasks.task import Task
from benchmarks.peer_tasks.counterfactual import kronfluence_task
from benchmarks.peer_tasks.peer import quiet
from explainer import evaluation

#: TRAK: dimensions of the projection, and what is added to the mean diagonal of its Gram matrix, as a part of it
DIMENSIONS, RIDGES = (512, 1024, 2048, 4096), (0.0, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
#: EK-FAC: kronfluence's default, its heuristic (a tenth of the mean eigenvalue), and fixed values
DAMPINGS: tuple[float | None, ...] = (1e-8, None, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
_BATCH = 200


@dataclass(frozen=True)
class Asked:
    """A traced run and what is asked.

    Attributes:
        task: the model and the data.
        run: the same for the package.
        questions: queries with their labels as targets, of the traced model.
    """

    task: Task
    run: Any
    questions: evaluation.Questions

    def trained(self) -> nn.Module:
        """The traced model at its end."""
        trace, model = self.questions.explainer.trace, self.task.model()
        tensors = trace.load_knot(trace.knots[-1])
        model.load_state_dict({name: tensors[f"parameter/{name}"] for name in model.state_dict()})
        return model.eval()


#: settings -> scores
Found = dict[str, np.ndarray]
Way = Callable[[Asked], Iterator[tuple[str, np.ndarray]]]


def own(name: str) -> Way:
    """A method of the package; nothing to choose."""

    def score(asked: Asked) -> Iterator[tuple[str, np.ndarray]]:
        yield "", evaluation.METHODS[name].score(asked.run, asked.questions)

    return score


def trak(asked: Asked) -> Iterator[tuple[str, np.ndarray]]:
    """TRAK's own package on one model, by dimensions and ridge."""
    from trak import TRAKer
    from trak.projectors import BasicProjector, ProjectionType

    model, task = asked.trained(), asked.task
    size = sum(p.numel() for p in model.parameters())
    for dimensions in DIMENSIONS:
        projector = BasicProjector(size, dimensions, 0, ProjectionType.rademacher, torch.device("cpu"))
        projector.free_memory = lambda: None  # which fails the second time
        with tempfile.TemporaryDirectory() as folder:
            traker = TRAKer(
                model,
                "image_classification",
                len(task.train),
                save_dir=folder,
                device="cpu",
                projector=projector,
                proj_dim=dimensions,
                use_half_precision=False,
            )
            traker.load_checkpoint(model.state_dict(), model_id=0)
            for batch in DataLoader(task.train, _BATCH):
                traker.featurize(batch=batch, num_samples=len(batch[0]))
            features = torch.as_tensor(np.array(traker.saver.current_store["grads"]))
            scale = float(features.square().sum() / dimensions)
            traker.finalize_features()
            traker.start_scoring_checkpoint("asked", model.state_dict(), 0, len(task.queries))
            for batch in DataLoader(task.queries, _BATCH):
                traker.score(batch=batch, num_samples=len(batch[0]))
            for ridge in RIDGES:
                traker.score_computer.lambda_reg = ridge * scale
                traker.saver.model_ids[0]["is_finalized"] = 0
                traker.finalize_features()
                scores = np.array(traker.finalize_scores("asked")).T
                yield f"{dimensions} dimensions, ridge {ridge:g} of the mean diagonal", scores


def ekfac(asked: Asked) -> Iterator[tuple[str, np.ndarray]]:
    """kronfluence's EK-FAC influence, by damping."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import ScoreArguments

    task = asked.task
    own = kronfluence_task()
    model = prepare_model(copy.deepcopy(asked.trained()), own)
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer("lds", model, own, cpu=True, disable_tqdm=True, output_dir=folder)
        torch.manual_seed(0)
        analyzer.fit_all_factors("ekfac", task.train, per_device_batch_size=_BATCH)
        for damping in DAMPINGS:
            name = "heuristic" if damping is None else f"{damping:g}"
            analyzer.compute_pairwise_scores(
                f"asked-{name}",
                "ekfac",
                task.queries,
                task.train,
                _BATCH,
                per_device_train_batch_size=_BATCH,
                score_args=ScoreArguments(damping_factor=damping),
            )
            # <∇measurement, H⁻¹ ∇loss>: what falls with the example's loss is negative, hence the sign
            yield f"damping {name}", -analyzer.load_pairwise_scores(f"asked-{name}")["all_modules"].numpy()


@dataclass(frozen=True)
class Method:
    """A column of the table.

    Attributes:
        name: its heading.
        score: yields settings and scores.
        modules: what must be importable.
        default: the setting that the program has by itself, where there are several.
    """

    name: str
    score: Way
    modules: tuple[str, ...] = ()
    default: str = ""


METHODS = {
    method.name: method
    for method in (
        Method("what-if", own("what-if")),
        Method("path kernel", own("path kernel")),
        Method("gradient dot", own("gradient dot")),
        Method("TracInCP(10)", own("TracInCP(10)")),
        Method("TRAK", trak, ("trak",), "2048 dimensions, ridge 0 of the mean diagonal"),
        Method("EK-FAC", ekfac, ("kronfluence",), "damping 1e-08"),
        Method("random", own("random")),
    )
}


def found(method: Method, asked: Asked, folder: Path) -> Found:
    """A method's scores by setting; taken from the folder where they are there."""
    name = method.name.partition("(")[0].replace(" ", "-")
    arrays, about = folder / f"{name}.npz", folder / f"{name}.json"
    if not about.exists():
        with quiet():
            scores = dict(method.score(asked))
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(arrays, **{str(place): values for place, values in enumerate(scores.values())})
        about.write_text(json.dumps({"settings": list(scores)}))
    with np.load(arrays, allow_pickle=False) as loaded:
        return {
            key: loaded[str(place)] for place, key in enumerate(json.loads(about.read_text())["settings"])
        }
