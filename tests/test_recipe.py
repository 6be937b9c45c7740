"""The recipe: what happens in which step, against closed forms and against the unrolled cell."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict
from identical import bits, timeless

from deq_fusion_jax import Anderson, DEQFusion, TokenFusion
from deq_fusion_jax.baselines import Sum, WeightTied
from deq_fusion_jax.token_baselines import TokensUnrolled
from experiments import features, mmimdb
from experiments.common.errors import InputError
from experiments.common.stopping import StoppedError
from experiments.datasets import Split
from experiments.models.encoders import MaxoutMLP
from experiments.training.checkpoint import Checkpoints
from experiments.training.config import build_fusion
from experiments.training.recipe import Recipe, adamw
from experiments.training.schedule import Schedule
from experiments.training.step import Gradient, init_state, train_step, updated
from experiments.training.task import Prediction, Task
from experiments.training.train import fit

RNG = np.random.default_rng(0)
INPUTS = {name: RNG.standard_normal((16, 8)).astype(np.float32) for name in "ab"}
ROWS = Split(INPUTS, (INPUTS["a"][:, 0] > 0).astype(np.float32))
SOLVER = Anderson(tol=1e-3, max_steps=40)


class Net(nn.Module):
    """A fusion and a linear layer behind it."""

    fusion: nn.Module

    @nn.compact
    def __call__(self, inputs, train=False, **start):
        out = self.fusion(inputs, train=train, **start)
        return Prediction(nn.Dense(1, name="head")(out.fused), out)


def loss(prediction, labels):
    return optax.sigmoid_binary_cross_entropy(prediction.logits[:, 0], labels).mean()


def accuracy(labels, logits):
    return {"accuracy": float(np.mean((logits[:, 0] > 0) == labels))}


def task_of(fusion=None, **options):
    fusion = fusion or DEQFusion(8, solver=SOLVER)
    return Task(Net(fusion), loss, accuracy, jnp.asarray, "accuracy", **options)


def fitted(task, schedule, checkpoints=None, rate=1e-2, **options):
    return fit(task, adamw(rate, 0.0, 1.0), ROWS, ROWS, schedule, 0, checkpoints, **options)


def risen(recipe, *steps):
    return [float(recipe.risen(jnp.int32(step))) for step in steps]


def test_what_rises_is_linear_over_the_warm_up():
    recipe = Recipe(fusion_rate=0.5, warmup=4, jacobian_start=0.2, begin=10)
    assert risen(recipe, 9, 10, 11, 13, 14, 99) == [0, 0.25, 0.5, 1, 1, 1]
    assert risen(Recipe(), 0, 1) == [1, 1]
    assert float(recipe.rate(jnp.int32(11))) == 0.25
    assert float(recipe.jacobian_weight(10.0, jnp.int32(11))) == pytest.approx(10 * (0.2 + 0.4))


def test_the_tolerance_falls_by_equal_factors():
    recipe = Recipe(warmup=4, tol_start=1e-1)
    model = Net(DEQFusion(8, solver=SOLVER))
    found = [recipe.loosened(model, jnp.int32(step)).fusion.solver.tol for step in range(5)]
    np.testing.assert_allclose(found, 1e-3 * 100 ** np.array([0.75, 0.5, 0.25, 0, 0]), rtol=1e-5)
    assert Recipe(warmup=4).loosened(model, jnp.int32(0)) is model
    pooled = Net(Sum(8))
    assert recipe.loosened(pooled, jnp.int32(0)) is pooled


@pytest.mark.slow
def test_a_loose_tolerance_takes_fewer_steps_in_training():
    task = task_of(recipe=Recipe(warmup=100, tol_start=0.3))
    state = init_state(task, adamw(1e-2, 0.0), INPUTS, 0)
    step = jax.jit(lambda state: train_step(task, adamw(1e-2, 0.0), state, ROWS)[1])
    early, late = step(state), step(state._replace(step=jnp.int32(1000)))
    assert float(early["mean_steps"]) < float(late["mean_steps"])
    assert float(late["residual"]) <= 1e-3 < float(early["residual"]) <= 0.3


@pytest.mark.parametrize(("fusion_rate", "warmup"), [(0.1, 0), (1.0, 0), (0.5, 10)])
def test_the_fusion_alone_learns_at_its_own_rate(fusion_rate, warmup):
    """AdamW's first step is -rate (g / (|g| + 1e-8) + weight_decay p), on the real tree; that of
    the fusion rises from a tenth."""
    config = mmimdb.Config(features=8, fusion_rate=fusion_rate, warmup=warmup)
    encoders = {name: MaxoutMLP((8,)) for name in ("text", "image")}
    model = mmimdb.MMIMDBModel(FrozenDict(encoders), build_fusion(config, ("text", "image")))
    inputs = {"text": np.ones((2, 3), np.float32), "image": np.ones((2, 5), np.float32)}
    task = dataclasses.replace(task_of(recipe=config.recipe), model=model)
    optimiser = adamw(0.02, 0.3)
    state = init_state(task, optimiser, inputs, 0)
    params = state.variables.params
    grads = jax.tree.map(lambda x: jnp.asarray(RNG.standard_normal(x.shape), jnp.float32), params)
    after, _ = updated(task, optimiser, state, Gradient(grads, {}, {}, None))
    groups = {"encoders_text", "encoders_image", "fusion", "head"}
    assert set(params) == groups and set(params["fusion"]) == {"cell", "inject"}
    for name in groups:
        rate = 0.02 * (fusion_rate / (warmup or 1) if name == "fusion" else 1)
        trees = grads[name], params[name], after.params[name]
        for g, p, new in zip(*map(jax.tree.leaves, trees), strict=True):
            expected = -rate * (g / (jnp.abs(g) + 1e-8) + 0.3 * p)
            np.testing.assert_allclose(new - p, expected, rtol=1e-4, atol=1e-6, err_msg=name)


def test_gradients_are_clipped_to_a_norm():
    """SGD-like: of Adam the first step has the sign alone, so the second moment is looked at."""
    params, grads = {"w": jnp.zeros(2)}, {"w": jnp.array([30.0, 40.0])}
    optimiser = adamw(1.0, 0.0, 5.0)
    state = optimiser.update(grads, optimiser.init(params), params)[1]
    np.testing.assert_allclose(optax.tree.get(state, "nu")["w"], 1e-3 * np.array([9.0, 16.0]))
    assert adamw(1.0, 0.0, 5.0) is optimiser


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    ("solved", "unrolled"), [(DEQFusion, WeightTied), (TokenFusion, TokensUnrolled)]
)
def test_shallow_is_the_unroll_of_the_same_cell(solved, unrolled, steps):
    model = Net(solved(8, solver=SOLVER, dropout=0.1))
    shallow = Recipe(shallow_steps=steps).shallow(model)
    assert shallow.fusion == unrolled(8, steps=steps, dropout=0.1, tol=None)
    variables = model.init(jax.random.key(0), INPUTS)
    got = shallow.apply(variables, INPUTS).fusion
    expected = unrolled(8, steps=steps, dropout=0.1).apply(
        {"params": variables["params"]["fusion"]}, INPUTS
    )
    np.testing.assert_array_equal(got.fused, expected.fused)
    pooled = Net(Sum(8))
    assert Recipe().shallow(pooled) is pooled


SHALLOW = Schedule(epochs=6, batch_size=8, shallow=3)


@pytest.fixture(scope="module")
def whole():
    return fitted(task_of(jacobian_weight=0.1), SHALLOW)


@pytest.mark.slow
class TestAShallowStart:
    def test_it_trains_as_the_unroll_does(self, whole):
        tied = task_of(WeightTied(8, steps=1, tol=1e-3), jacobian_weight=0.1)
        expected = fitted(tied, Schedule(epochs=3, batch_size=8)).history
        for got, row in zip(whole.history[:4], expected, strict=True):
            assert got["validation_loss"] == pytest.approx(row["validation_loss"], rel=1e-5)
            assert got["loss"] == (row["loss"] and pytest.approx(row["loss"], rel=1e-5))

    def test_the_history_says_what_was_solved(self, whole):
        for row in whole.history:
            assert (row["solver"] is None) == (row["epoch"] <= 3)
            solved = {"converged", "mean_steps", "max_steps", "residual"} <= row["train"].keys()
            assert solved == (row["epoch"] > 3) == ("backward_converged" in row["train"])
        assert whole.history[-1]["train"]["converged"] == 1

    def test_none_of_its_epochs_is_selected(self, whole):
        assert whole.best_epoch > 3
        again = fitted(task_of(jacobian_weight=0.1), SHALLOW._replace(patience=1))
        assert again.best_epoch > 3 and again.history[-1]["epoch"] > 3

    @pytest.mark.parametrize("last", [2, 3, 4])
    def test_stopped_and_resumed_it_is_the_same_bit_for_bit(self, whole, tmp_path, last):
        task, rows = task_of(jacobian_weight=0.1), []
        with pytest.raises(StoppedError):
            checkpoints = Checkpoints(tmp_path)
            stop = lambda: len(rows) > last  # noqa: E731
            fitted(task, SHALLOW, checkpoints, report=rows.append, stop=stop)
        resumed = fitted(task, SHALLOW, Checkpoints(tmp_path))
        assert timeless(resumed.history) == timeless(whole.history)
        assert bits(resumed.best) == bits(whole.best) and bits(resumed.last) == bits(whole.last)

    @pytest.mark.slow
    def test_warm_starts_begin_with_the_solves(self):
        task = task_of(jacobian_weight=0.1, warm_start=True)
        history = fitted(task, Schedule(epochs=12, batch_size=8, shallow=3), rate=1e-4).history
        first, last = (history[epoch]["train"]["mean_steps"] for epoch in (4, 12))
        assert last < first / 2

    def test_the_last_epoch_without_a_solve_is_evaluated(self):
        schedule = Schedule(epochs=9, batch_size=8, evaluate_every=4, shallow=3)
        found = [schedule.next_epoch([{"epoch": epoch}]) for epoch in (0, 3, 7)]
        assert found == [3, 7, 9]


class TestOptions:
    def test_they_reach_the_fusion_and_the_task(self):
        config = features.Config(shallow_epochs=2, warmup=5, on_failure="zero", fusion_rate=0.1)
        fusion = build_fusion(config, ("a", "b"))
        assert fusion.gradient.on_failure == "zero" and config.shallow == 2
        assert config.recipe == Recipe(0.1, 1, 5, 1.0, None)
        assert dataclasses.replace(config, fusion="concat").shallow == 0

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"tol_start": 2.0}, "--tol-start 2.0: expected from 1.2e-07"),
            ({"tol_start": 0.1}, "--warmup 0: expected 1 or more with --tol-start"),
            ({"jacobian_start": 0.0}, "--warmup 0: expected 1 or more with --tol-start"),
            (
                {"shallow_epochs": 5, "epochs": 5},
                "--shallow-epochs 5: expected fewer",
            ),
            ({"shallow_epochs": -1}, "--shallow-epochs -1: expected 0 or more"),
            ({"shallow_steps": 0}, "--shallow-steps 0: expected 1 or more"),
            ({"fusion_rate": -1.0}, "--fusion-rate -1.0: expected 0 or more"),
            ({"clip": -1.0}, "--clip -1.0: expected 0 or more"),
        ],
    )
    def test_what_cannot_be_is_refused(self, options, message):
        with pytest.raises(InputError, match=message):
            features.Config(**options)
