"""The pictures of a run: how it was trained, how it solves, which classes it confuses."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from deq_fusion_jax.iterated import Equilibrium
from experiments.common.text import percent
from experiments.datasets import Dataset
from experiments.reporting import figures
from experiments.reporting.figures.style import Figure
from experiments.training.metrics import confusion_counts
from experiments.training.task import Evaluation, Task
from experiments.training.train import Fitted

TRACED_SAMPLES = 256  # validation rows whose solves are drawn step by step


def draw(
    folder: Path, task: Task, dataset: Dataset, fitted: Fitted, on_test: Evaluation
) -> dict[str, str]:
    """Writes the pictures of a run; returns {path relative to the run directory: caption}."""
    scores = [{**row, "solver": None} for row in fitted.history]  # the solver has its own
    pictures = {"learning_curve": (figures.learning_curve(scores), "Training, by epoch")}
    if (counts := confusion_of(dataset, on_test)) is not None:
        pictures["confusion"] = (
            figures.confusion(counts, dataset.classes),
            "True and predicted classes, test rows",
        )
    if on_test.stats is not None:
        pictures["solver_health"] = (
            figures.solver_health(fitted.history),
            "Solves by epoch: forward those of the validation rows, from before the first step; "
            "backward those of training",
        )
    if (solves := traced(task, dataset, fitted)) is not None:
        pictures |= _pictures_of(solves)
    if on_test.gates:
        pictures["gates"] = (
            figures.gate_strength(on_test.gates),
            "Gate strength per modality, test rows",
        )
    for name, (figure, _) in pictures.items():
        figure.save(folder / f"{name}.png")
    return {f"figures/{name}.png": caption for name, (_, caption) in pictures.items()}


def confusion_of(dataset: Dataset, on_test: Evaluation) -> np.ndarray | None:
    """How often a class is taken for which [C, C] on test; None where a row may have several."""
    labels = dataset.test.labels
    if not dataset.classes or labels.ndim != 1:
        return None
    return confusion_counts(labels, on_test.probabilities)


class Traced(NamedTuple):
    """Solves of some validation rows, looked at closely.

    Attributes:
      residuals: [max_steps, B] relative, NaN after the end of a row's solve.
      radius: [B] spectral radius at the fixed point.
      tol: the tolerance.
    """

    residuals: np.ndarray
    radius: np.ndarray
    tol: float


def traced(task: Task, dataset: Dataset, fitted: Fitted) -> Traced | None:
    """The solves of TRACED_SAMPLES validation rows; None where the fusion solves nothing."""
    fusion = getattr(task.model, "fusion", None)
    if not isinstance(fusion, Equilibrium) or not dataclasses.is_dataclass(fusion.solver):
        return None
    solver = dataclasses.replace(fusion.solver, trace=True)
    model = task.model.clone(fusion=fusion.clone(solver=solver))
    validation = dataset.validation
    assert validation is not None
    inputs = {name: x[:TRACED_SAMPLES] for name, x in validation.inputs.items()}
    variables = jax.device_get(fitted.best._asdict())  # off the mesh
    trace, radius = map(np.asarray, _trace_and_radius(model, variables, inputs))
    return Traced(trace, radius, solver.tol)


@partial(jax.jit, static_argnames="model")  # compiled once for all seeds
def _trace_and_radius(model: nn.Module, variables: Any, inputs: Any) -> tuple[jax.Array, jax.Array]:
    prediction: Any = model.apply(variables, inputs, rngs={"radius": jax.random.key(0)})
    return prediction.fusion.stats.trace, prediction.fusion.spectral_radius


def _pictures_of(solves: Traced) -> dict[str, tuple[Figure, str]]:
    rows = f"{len(solves.radius):,} validation rows"
    trace = figures.residual_traces({rows: solves.residuals}, solves.tol)
    pictures = {"residuals": (trace, "Relative residual against solver step")}
    radius = solves.radius[np.isfinite(solves.radius)]
    if len(radius):
        picture = figures.radii(radius, "validation rows")
        pictures["spectral_radius"] = (picture, _edge(radius, rows))
    return pictures


def _edge(radius: np.ndarray, rows: str) -> str:
    """How near the map is to where iteration stops converging, in words."""
    share = float(np.mean(radius >= 1))
    what = f"Spectral radius of the map where the solves of {rows} ended"
    values = f"{np.median(radius):.2f} in the median, {radius.max():.2f} at most"
    if not share:
        return f"{what}: {values}. Below 1 plain iteration converges too."
    return f"{what}: {values}. At 1 or more, {percent(share)} of them, plain iteration diverges."
