"""Hard problems for the fusion layer, and for training: finite answers, and honest statistics.

python -m pytest tests/test_hard.py -m endurance    (whole runs on the sample, partly corrupted)
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_fusion_jax import Anderson, DEQFusion
from experiments import mmimdb
from experiments.datasets.stream import Stream
from experiments.training import train

D, B = 32, 6
LAYER = DEQFusion(D, solver=Anderson(tol=1e-4, max_steps=60))
X = {
    name: jax.random.normal(key, (B, D))
    for name, key in zip("ab", jax.random.split(jax.random.key(0)), strict=True)
}
VARIABLES = LAYER.init(jax.random.key(1), X)


@jax.jit
def solved(variables, x):
    """Output, and the gradients of a loss in weights and inputs."""

    def loss(variables, x):
        out = LAYER.apply(variables, x, rngs={"jacobian": jax.random.key(2)})
        return jnp.sum(out.fused**2) + out.jacobian_penalty, out

    gradients, out = jax.grad(loss, (0, 1), has_aux=True)(variables, x)
    return out, gradients


def finite(tree):
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e3, 1e6])
def test_inputs_of_every_scale(scale):
    out, gradients = solved(VARIABLES, {name: scale * x for name, x in X.items()})
    assert out.stats.converged.all() and finite(out) and finite(gradients)


@pytest.mark.filterwarnings("ignore::deq_fusion_jax.ConvergenceWarning")
@pytest.mark.parametrize("value", [0.0, 1.0, -1e6, 1e-6])
def test_constant_inputs(value):
    """Zero variance under the group normalisation."""
    out, gradients = solved(VARIABLES, {name: jnp.full_like(x, value) for name, x in X.items()})
    assert finite(out) and finite(gradients)
    np.testing.assert_array_equal(out.stats.converged, out.stats.residual <= 1e-4)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_sample_without_numbers_fails_alone(bad):
    whole, _ = solved(VARIABLES, X)
    out, _ = solved(VARIABLES, X | {"b": X["b"].at[2, 5].set(bad)})
    others = np.arange(B) != 2
    assert whole.stats.converged.all()
    np.testing.assert_array_equal(out.stats.converged, others)
    np.testing.assert_array_equal(out.stats.steps[others], whole.stats.steps[others])
    np.testing.assert_allclose(out.fused[others], whole.fused[others], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::deq_fusion_jax.ConvergenceWarning")
@pytest.mark.parametrize("factor", [30, 1e3, 1e6])
def test_weights_that_let_nothing_converge(factor):
    """Finite states of finite residual, none of them called converged that is not."""
    wild = jax.tree.map(partial(jnp.multiply, factor), VARIABLES)
    out, gradients = solved(wild, X)
    assert finite((out.fused, out.modalities, out.stats))
    assert finite(gradients) or factor == 1e6  # where squares overflow float32
    np.testing.assert_array_equal(out.stats.converged, out.stats.residual <= 1e-4)


# --- training on the sample ------------------------------------------------------------------


class Faulty(Stream):
    """A stream of which five batches in a hundred are spoilt."""

    def __init__(self, stream, spoil):
        super().__init__(len(stream), stream.read)
        self.spoil, self.spoilt, self.rng = spoil, 0, np.random.default_rng(1)

    def batches(self, *args, **options):
        """Several batches at a time, as training asks for them."""
        size = mmimdb.SAMPLE.batch_size
        for rows in super().batches(*args, **options):
            for first in range(0, len(rows.labels), size):
                if self.rng.random() < 0.05:
                    self.spoilt += 1
                    for x in rows.inputs.values():
                        x[first : first + size] = self.spoil(self.rng, x[first : first + size])
            yield rows


SPOILERS = {
    "nan": lambda rng, x: np.full_like(x, np.nan),
    "some infinite": lambda rng, x: np.where(rng.random(x.shape) < 0.01, np.float32(np.inf), x),
    "a million times": lambda rng, x: np.float32(1e6) * x,
    "noise": lambda rng, x: np.float32(1e3) * rng.standard_normal(x.shape, np.float32),
}


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """The sample's own settings, its rows on disk, and 100 epochs: after 40 it still learns, and
    one in twenty of them less is a point.
    """
    home = tmp_path_factory.mktemp("sample")
    config = dataclasses.replace(mmimdb.SAMPLE, stream=True, cache_dir=home, epochs=100)
    jax.config.update("jax_disable_most_optimizations", False)  # what runs long pays for them
    yield mmimdb.job(dataclasses.replace(config, patience=100))
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module")
def clean(sample):
    """The score of a clean run."""
    return macro_f1(fitted(sample, sample.dataset.stream))


def fitted(job, rows):
    return train.fit(job.task, job.optimiser, rows, job.dataset.validation, job.schedule, 0)


def macro_f1(run):
    row = next(row for row in run.history if row["epoch"] == run.best_epoch)
    return row["validation"]["macro_f1"]


@pytest.mark.endurance
@pytest.mark.parametrize("spoiler", SPOILERS)
def test_one_batch_in_twenty_corrupted(sample, clean, spoiler):
    rows = Faulty(sample.dataset.stream, SPOILERS[spoiler])
    run = fitted(sample, rows)
    bad = sum(row["train"].get("bad_steps", 0) for row in run.history)
    print(f"{spoiler}: validation macro-F1 {macro_f1(run):.3f}, clean {clean:.3f}")
    assert bad == rows.spoilt > 50  # they change nothing
    assert macro_f1(run) > clean - 0.02


@pytest.mark.endurance
@pytest.mark.parametrize("factor", [100, 1000])
def test_a_learning_rate_far_too_high(sample, factor):
    config = dataclasses.replace(mmimdb.SAMPLE, learning_rate=factor * 1e-3)
    job = sample._replace(optimiser=mmimdb.optimiser(config))
    job = job._replace(schedule=job.schedule._replace(epochs=5))
    run = fitted(job, job.dataset.stream)
    assert finite(run.last.variables) and run.ending == "all 5 epochs are done"


@pytest.mark.endurance
@pytest.mark.parametrize("factor", [30, 1e6])
def test_weights_with_which_nothing_converges(sample, monkeypatch, factor):
    begin = train.init_state

    def wild(*args):
        state = begin(*args)
        params = state.variables.params
        params |= {"fusion": jax.tree.map(partial(jnp.multiply, factor), params["fusion"])}
        return state._replace(variables=state.variables._replace(params=params))

    monkeypatch.setattr(train, "init_state", wild)
    run = fitted(sample, sample.dataset.stream)
    assert finite(run.last.variables) and run.history[-1]["solver"]["converged"] < 0.1
    assert run.ending.startswith("the last 1") and "steps were bad" in run.ending
