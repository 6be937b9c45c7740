"""`experiments.benchmarks.learning`: what it measures, against dense linear algebra and NumPy."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from deq_fusion_jax.tokens import PoolTokens
from experiments import relations
from experiments.benchmarks import learning
from experiments.datasets import Split
from experiments.training.recipe import Recipe
from experiments.training.step import gradient_of, init_state, solver_start

SMALL = [
    "--train", "40", "--validation", "12", "--test", "12", "--features", "8", "--batch-size", "10",
]  # fmt: skip


@pytest.fixture(scope="module")
def followed():
    """A job, its first state, and the gradient of its first rows."""
    job = relations.job(relations.parse_args([*SMALL, "--tol", "1e-5"]))
    state = init_state(job.task, job.optimiser, job.dataset.train.inputs, 0)
    split = Split(*jax.tree.map(lambda x: x[:3], tuple(job.dataset.train)))
    start = solver_start(job.task, state, split.inputs, None)
    return job, state, split, gradient_of(job.task, state, *split, start)


@pytest.mark.slow
def test_amplification_is_that_of_the_dense_inverse(followed):
    job, state, split, gradient = followed
    found = learning.amplification(job.task, state.variables, split.inputs, gradient.ends)
    once, params = Recipe().shallow(job.task.model), state.variables.params
    for row in range(3):
        inputs = {name: x[row : row + 1] for name, x in split.inputs.items()}
        z = jax.tree.map(lambda x, row=row: x[row : row + 1], gradient.ends.z0)
        flat, unravel = ravel_pytree(z)

        def image(flat, inputs=inputs, unravel=unravel):
            out = once.apply(state.variables._asdict(), inputs, z0=unravel(flat)).fusion
            return ravel_pytree(out.modalities)[0]

        def loss(flat, row=row, unravel=unravel):
            z = unravel(flat)
            there = {name: jnp.any(x != 0, axis=2, keepdims=True) for name, x in z.items()}
            fused = PoolTokens(8).apply({"params": params["fusion"]["pool"]}, z, there)
            logits = fused @ params["head"]["kernel"] + params["head"]["bias"]
            return -jax.nn.log_softmax(logits)[0, split.labels[row, 0]]

        jacobian = np.asarray(jax.jacrev(image)(flat), np.float64)
        g = np.asarray(jax.grad(loss)(flat), np.float64)
        u = np.linalg.solve(np.eye(len(g)) - jacobian.T, g)
        assert found[row] == pytest.approx(np.linalg.norm(u) / np.linalg.norm(g), rel=1e-3)


def test_signal_is_the_share_of_the_mean():
    rng = np.random.default_rng(0)
    common = np.full(400, 0.5)  # ‖common‖² = 100, the noise's trace 400 · 4
    shares = [learning.signal_share(common + 2 * rng.standard_normal((16, 400))) for _ in range(99)]
    assert np.mean(shares) == pytest.approx(100 / 1700, rel=0.05)
    assert learning.signal_share(np.ones((4, 3))) == 1
    assert learning.signal_share(np.array([[1.0], [-1.0]])) == 0
    assert np.isnan(learning.signal_share(np.zeros((4, 3))))


def run_of(variant, rate, *scores):
    rows = [{"epoch": i, "validation": score, "radius": 0.5} for i, score in enumerate(scores)]
    return {"variant": variant, "rate": rate, "seed": 0, "rows": rows}


def test_the_best_rate_is_that_of_the_best_epochs():
    runs = [run_of("a", 0.1, 0.3, 0.9, 0.2), run_of("a", 0.2, 0.8, 0.8, 0.8)]
    assert learning.best_rates(runs) == {"a": 0.1}
    assert "0.900" in learning.rates_table(runs)
    course = [line.split("|")[2:5] for line in learning.course_table(runs).splitlines()[2:]]
    assert [[cell.strip() for cell in line] for line in course] == [
        ["0.1", "0", "0.300"], ["0.1", "1", "0.900"], ["0.1", "2", "0.200"]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["--variants", "equilibrium, shallow start", "--epochs", "9"], "--shallow-epochs"),
        (["--batch-size", "40"], "--batch-size 40: expected at most half of the 40 training rows"),
        (["--learning-rate", "2", "--rates", "much"], "invalid float value: 'much'"),
    ],
)
def test_what_cannot_be_followed_is_refused(run_command, tmp_path, args, complaint):
    status, _, err = run_command(
        learning.main, "relations", "--run-dir", tmp_path, *SMALL, *args, "--seeds", 1
    )
    assert status == 2 and complaint in err and err.count("\n") == 1


@pytest.mark.slow
def test_a_run_of_it(run_command, tmp_path):
    args = ["relations", "--run-dir", tmp_path, *SMALL, "--seeds", 1, "--rates", 1e-3]
    args += ["--epochs", 2, "--variants", "equilibrium"]
    status, out, err = run_command(learning.main, *args)
    assert status == 0, err
    runs = json.loads((tmp_path / "learning.json").read_text())["runs"]
    assert [run["variant"] for run in runs] == ["equilibrium"]
    equilibrium = runs[0]["rows"]
    assert [row["epoch"] for row in equilibrium] == [0, 1, 2]
    assert all(row["max amplification"] > 0.5 and row["failed"] == 0 for row in equilibrium)
    assert all(0 < row["radius"] <= row["max radius"] < 1 for row in equilibrium)
    assert (tmp_path / "learning.png").stat().st_size > 10_000
    assert (tmp_path / "learning.md").read_text() in out
