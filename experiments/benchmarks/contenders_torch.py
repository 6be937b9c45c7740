"""Who solves the problems of `experiments.benchmark` in PyTorch: torchdeq, implicit and phantom.

The maps are the official module's, with our weights under its names. They take the gates in one
product, as ours do, so that libraries are compared and not maps.
"""

import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from deq_fusion_jax import FusionState
from deq_fusion_jax.official import params_from_official
from deq_fusion_jax.state import PyTree
from experiments.benchmarks.contenders import MAX_STEPS
from experiments.benchmarks.problem import Outcome, Problem, reaches
from experiments.benchmarks.timing import Contender, timed
from experiments.benchmarks.training import (
    RATE,
    Lesson,
    initial_params,
    layer_problem,
    synthetic,
)

with warnings.catch_warnings():  # of stray backslashes in its docstrings
    warnings.simplefilter("ignore")
    from torchdeq import get_deq
    from torchdeq.solver import register_solver
    from torchdeq.solver.anderson import anderson_solver

RIDGES = (1e-2, 1e-4, 1e-6, 1e-8)  # absolute; torchdeq's own is 1e-4

Weights = Mapping[str, Tensor]


# --- the maps --------------------------------------------------------------------------------

BLOCK = {"conv1": "dense1", "conv2": "dense2", "gn1": "norm1", "gn2": "norm2", "gn3": "norm3"}
FUSION = {"gate": "gate", "fuse": "fuse", "gn3": "norm"}


def state_dict(params: PyTree, modalities: Sequence[str]) -> dict[str, np.ndarray]:
    """Our parameters under the official module's names: undoes `params_from_official`."""
    cell, inject = params["cell"], params["inject"]
    entries = {"bias": inject["bias"].reshape(1)}
    entries |= {f"weights.{i}": inject[f"weight_{m}"].reshape(1) for i, m in enumerate(modalities)}
    branches = [(cell[f"blocks_{m}"], BLOCK) for m in modalities] + [(cell["fusion"], FUSION)]
    for i, (branch, names) in enumerate(branches):
        for theirs, ours in names.items():
            for kind, array in branch[ours].items():
                array_name = "bias" if kind == "bias" else "weight"
                entries[f"func_.branches.{i}.{theirs}.{array_name}"] = array.T
    return entries


def inject(weights: Weights, x: Sequence[Tensor]) -> Tensor:
    """x_f = Σ_i w_i x_i + b"""
    return sum((weights[f"weights.{i}"] * x_i for i, x_i in enumerate(x)), weights["bias"])


def apply_cell(weights: Weights, x: Sequence[Tensor], x_fused: Tensor, z: Tensor) -> Tensor:
    """f on the state z [B, M + 1, d], the fused part last."""
    *modalities, fused = z.unbind(1)
    new = [
        _block(weights, f"func_.branches.{i}", z_i, x_i)
        for i, (z_i, x_i) in enumerate(zip(modalities, x, strict=True))
    ]
    branch = f"func_.branches.{len(new)}"
    gates = len(new) * _linear(weights, f"{branch}.gate", sum(new) / len(new) + fused)
    h = _linear(weights, f"{branch}.fuse", fused * gates) + x_fused
    return torch.stack([*new, _norm(weights, f"{branch}.gn3", functional.relu(h))], dim=1)


def _block(weights: Weights, branch: str, z: Tensor, x: Tensor) -> Tensor:
    h = functional.relu(_norm(weights, f"{branch}.gn1", _linear(weights, f"{branch}.conv1", z)))
    h = _norm(weights, f"{branch}.gn2", _linear(weights, f"{branch}.conv2", h) + x)
    return _norm(weights, f"{branch}.gn3", functional.relu(h + z))


def _linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def _norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    return functional.group_norm(x, 4, weights[f"{name}.weight"], weights[f"{name}.bias"])


# --- contenders ------------------------------------------------------------------------------


def torch_contenders(problem: Problem, tol: float) -> list[Contender]:
    """Implicit differentiation, and the phantom gradient of 5 steps."""
    return [
        tuned("torchdeq, implicit", problem, tol, ift=True),
        tuned("torchdeq, phantom 5", problem, tol, grad=5),
    ]


def tuned(name: str, problem: Problem, tol: float, **gradient: Any) -> Contender:
    """With the settings of `tune`, and its evaluations counted."""
    best = torchdeq_anderson(name, problem, tol, *tune(problem, tol, **gradient), **gradient)
    evaluations: Counter[str] = Counter()

    def watch(image: Tensor) -> Tensor:
        evaluations["forward"] += 1
        if image.requires_grad:
            image.register_hook(lambda _: evaluations.update(["backward"]))
        return image

    best.step(watch)
    return replace(best, forward=evaluations["forward"], backward=evaluations["backward"])


def tune(problem: Problem, tol: float, **gradient: Any) -> tuple[float, int]:
    """The ridge, and then the number of threads, that reach the tolerance fastest.

    Where none reaches it, those with the lowest residual.
    """

    def rank(ridge: float, threads: int) -> tuple[bool, float]:
        contender = torchdeq_anderson("tried", problem, tol, ridge, threads, **gradient)
        assert contender.read is not None
        try:
            _, residual = problem.residuals(contender.read(contender.step()).z)
        except torch.linalg.LinAlgError:  # the ridge is too small for the mixing to be solved
            return True, math.inf
        if reaches(residual, tol):
            return False, min(timed(contender) for _ in range(3))
        return True, residual

    threads = _thread_counts()
    ridge = min(RIDGES, key=lambda ridge: rank(ridge, threads[-1]))
    return ridge, min(threads, key=lambda count: rank(ridge, count))


def torchdeq_anderson(
    name: str, problem: Problem, tol: float, ridge: float, threads: int, **gradient: Any
) -> Contender:
    """`gradient` is how torchdeq differentiates: `ift=True`, or `grad` = 5 for phantom steps.

    Its step takes a function that is shown every f(z).
    """
    deq, device = make_deq(tol, ridge, **gradient), device_name()
    tensor = partial(torch.tensor, device=device)
    names = tuple(problem.inputs)
    entries = state_dict(problem.params, names)
    weights = {name: tensor(entry, requires_grad=True) for name, entry in entries.items()}
    x = [tensor(problem.inputs[name], requires_grad=True) for name in names]
    c, (batch, features, modalities) = tensor(problem.c), problem.shape
    start = torch.zeros(batch, modalities + 1, features, device=device)

    def step(watch: Callable[[Tensor], Tensor] = lambda image: image) -> Any:
        torch.set_num_threads(threads)
        x_fused = inject(weights, x)
        z = deq(lambda z: watch(apply_cell(weights, x, x_fused, z)), start)[0][-1]
        value = torch.sum(z[:, -1] * c)
        found = torch.autograd.grad(value, [*weights.values(), *x])
        if device == "cuda":
            torch.cuda.synchronize()
        return z, found

    def read(result: Any) -> Outcome:
        z, found = result
        *parts, fused = z.detach().cpu().numpy().swapaxes(0, 1)
        found = [g.cpu().numpy() for g in found]
        by_weight = params_from_official(dict(zip(weights, found, strict=False)), names)
        by_input = dict(zip(names, found[len(weights) :], strict=True))
        z = FusionState(dict(zip(names, parts, strict=True)), fused)
        return Outcome(z, (jax.device_get(by_weight), by_input))

    return Contender(name, step, read, settings=_settings(ridge, threads))


def make_deq(tol: float, ridge: float, **gradient: Any) -> Any:
    """torchdeq's solver of f and of its adjoint."""
    solver = f"anderson, ridge {ridge:g}"
    # get_deq passes no ridge on to the solver of the adjoint, so the solver itself must have it.
    register_solver(solver, partial(anderson_solver, lam=ridge))
    forward = {"f_solver": solver, "f_max_iter": MAX_STEPS, "f_tol": tol, "f_stop_mode": "rel"}
    adjoint = {"b_solver": solver, "b_max_iter": MAX_STEPS, "b_tol": tol, "b_stop_mode": "rel"}
    return get_deq(**forward, **adjoint, **gradient)


def device_name() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _settings(ridge: float, threads: int) -> str:
    device = device_name()
    return f"ridge {ridge:g}, {f'threads {threads}' if device == 'cpu' else device}"


def torch_learner(lesson: Lesson, tol: float, seed: int) -> Contender:
    """As `our_learner`, with torchdeq's implicit differentiation."""
    ridge, threads = tune(layer_problem(lesson, seed), tol, ift=True)
    deq, device = make_deq(tol, ridge, ift=True), device_name()
    tensor = partial(torch.tensor, device=device)
    params, data = initial_params(lesson, seed), synthetic(lesson, seed)
    entries = state_dict(params["fusion"], tuple(data.inputs))
    weights = {name: tensor(entry, requires_grad=True) for name, entry in entries.items()}
    head, shift = (tensor(params["head"][k], requires_grad=True) for k in ("kernel", "bias"))
    x, labels = [tensor(rows) for rows in data.inputs.values()], tensor(data.labels).long()
    optimiser = torch.optim.Adam([*weights.values(), head, shift], lr=RATE)
    batch, features, modalities = lesson.shape
    start = torch.zeros(batch, modalities + 1, features, device=device)
    torch.manual_seed(seed)

    def step(rows: Tensor) -> float:
        dropped = [functional.dropout(x_i[rows], lesson.dropout) for x_i in x]
        x_fused = inject(weights, dropped)
        z = deq(lambda z: apply_cell(weights, dropped, x_fused, z), start)[0][-1]
        loss = functional.cross_entropy(z[:, -1] @ head + shift, labels[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return loss.item()

    def epoch() -> dict[str, float]:
        torch.set_num_threads(threads)
        order = torch.randperm(lesson.rows, device=device)
        full = order[: lesson.rows // batch * batch]
        return {"loss": float(np.mean([step(rows) for rows in full.split(batch)]))}

    return Contender("torchdeq, implicit", epoch, settings=_settings(ridge, threads))


def _thread_counts() -> list[int]:
    """Powers of two up to the number of cores, and that number."""
    cores = os.cpu_count() or 1
    return sorted({cores, *(2**k for k in range(cores.bit_length()))})
