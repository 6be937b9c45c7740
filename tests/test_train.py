"""`fit` and `evaluate`: resuming, the best epoch, patience, NaN, every row once, one compilation.

Two models stand in for the experiments': `Net` has all that is random or hidden in training
(dropout, batch statistics, a solver); `Line` has a weight w that grows by one a step, so that
everything the loop decides can be foretold.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from identical import bits, timeless

from deq_fusion_jax import Anderson, DEQFusion, FusionOutput, Implicit, Picard
from deq_fusion_jax.baselines import Sum
from experiments.common.errors import InputError
from experiments.common.stopping import StoppedError
from experiments.datasets import Dataset, Split
from experiments.models.encoders import MaxoutMLP
from experiments.run import with_warm_starts
from experiments.training.checkpoint import Checkpoints
from experiments.training.feed import run_epochs
from experiments.training.schedule import Schedule
from experiments.training.step import TrainState, init_state, train_step
from experiments.training.task import Prediction, Task, Variables, evaluate
from experiments.training.train import fit, refit
from experiments.training.warm import needed_bytes


class Net(nn.Module):
    """Maxout encoders with dropout and batch normalisation → DEQ with dropout → linear."""

    fusion: nn.Module

    @nn.compact
    def __call__(self, inputs, train=False, **start):
        encoded = {name: MaxoutMLP((8,), 0.3)(x, train) for name, x in inputs.items()}
        out = self.fusion(encoded, train=train, **start)
        return Prediction(nn.Dense(1)(out.fused), out)


class Line(nn.Module):
    """logits = w x; the fusion's Jacobian penalty is w²."""

    start: float = 0.0

    @nn.compact
    def __call__(self, inputs, train=False):
        x = inputs["x"]
        w = self.param("w", lambda key: jnp.full(x.shape[1:], self.start))
        penalty = jnp.sum(w * w) if self.has_rng("jacobian") else None
        return Prediction(x @ w, FusionOutput(x, jacobian_penalty=penalty))


def cross_entropy(prediction, labels):
    return optax.sigmoid_binary_cross_entropy(prediction.logits[:, 0], labels).mean()


def accuracy(labels, probabilities):
    return {"accuracy": float(np.mean((probabilities[:, 0] > 0) == labels))}


def line_task(score, power=1, start=0.0, weight=0.0, average=0.0):
    """Training adds 1 to w a step (power 1, rate 1); the validation score is score(w)."""
    return Task(
        Line(start),
        loss=lambda prediction, labels: -jnp.mean(prediction.logits**power),
        metrics=lambda labels, logits: {"score": float(score(float(np.mean(logits))))},
        probabilities=jnp.asarray,
        monitor="score",
        jacobian_weight=weight,
        average=average,
    )


ONES = Split({"x": np.ones((4, 1), np.float32)}, np.zeros(4, np.float32))


def fit_line(score, schedule, rate=1.0, checkpoints=None, **options):
    task = line_task(score, **options)
    return fit(task, optax.sgd(rate), ONES, ONES, schedule, seed=0, checkpoints=checkpoints)


def weight(variables):
    return float(variables.params["w"][0])


class Deq:
    """A task with a DEQ and the way to fit it; `traces` counts the tracings of its loss."""

    def __init__(self):
        self.traces = 0
        rng = np.random.default_rng(0)

        def rows(n):
            labels = rng.integers(0, 2, n).astype(np.float32)
            a = rng.standard_normal((n, 5)).astype(np.float32) + labels[:, None]
            return Split({"a": a, "b": rng.standard_normal((n, 3)).astype(np.float32)}, labels)

        self.train, self.validation = rows(22), rows(11)

        def loss(prediction, labels):
            self.traces += 1
            return cross_entropy(prediction, labels)

        fusion = DEQFusion(8, solver=Picard(tol=1e-3, max_steps=40), dropout=0.2)
        self.task = Task(Net(fusion), loss, accuracy, jnp.asarray, "accuracy")
        self.optimiser = optax.adamw(3e-2)
        self.after = []  # tracings seen at each row of the first fit
        self.whole = self.fit(4, report=lambda row: self.after.append(self.traces))

    def fit(self, epochs, checkpoints=None, report=lambda row: None):
        schedule = Schedule(epochs, batch_size=8)
        data = (self.train, self.validation)
        return fit(self.task, self.optimiser, *data, schedule, 3, checkpoints, report)


@pytest.fixture(scope="module")
def deq():
    return Deq()


class KilledError(Exception):
    pass


class TestResume:
    @pytest.mark.parametrize("stops", [(1,), (2, 3)])
    def test_killed_and_resumed_is_the_uninterrupted_run_bit_for_bit(self, deq, tmp_path, stops):
        for epoch in stops:

            def kill(row, last=epoch):
                if row["epoch"] == last:
                    raise KilledError

            with pytest.raises(KilledError):
                deq.fit(4, Checkpoints(tmp_path), kill)
        seen = []
        again = deq.fit(4, Checkpoints(tmp_path), seen.append)
        assert bits(again.last) == bits(deq.whole.last)
        assert bits(again.best) == bits(deq.whole.best)
        assert timeless(again.history) == timeless(deq.whole.history)
        assert again.best_epoch == deq.whole.best_epoch
        assert seen == again.history  # the rows of before are reported too
        seconds = [row["seconds"] for row in again.history]
        assert seconds == sorted(seconds)

    def test_saves_when_due_and_at_the_end(self, deq, tmp_path):
        seldom = Checkpoints(tmp_path, keep=9, every=1e6)
        first = deq.fit(3, seldom)
        assert seldom.steps() == [int(first.last.step)]
        assert bits(deq.fit(4, seldom).last) == bits(deq.whole.last)

    def test_a_finished_run_goes_on_to_more_epochs(self, deq, tmp_path):
        first = deq.fit(2, Checkpoints(tmp_path))
        assert [row["epoch"] for row in first.history] == [0, 1, 2]
        assert bits(first.last) != bits(deq.whole.last)
        again = deq.fit(4, Checkpoints(tmp_path))
        assert bits(again.last) == bits(deq.whole.last)
        assert timeless(again.history) == timeless(deq.whole.history)

    def test_dropout_and_batch_statistics_are_at_work(self, deq):
        """Else the tests above would say little."""
        start = init_state(deq.task, deq.optimiser, deq.train.inputs, 3)
        assert bits(start.variables.batch_stats) != bits(deq.whole.last.variables.batch_stats)
        step = jax.make_jaxpr(lambda s: train_step(deq.task, deq.optimiser, s, deq.train)[0])
        assert "random_bits" in str(step(start))

    def test_the_seed_decides(self, deq):
        task = dataclasses.replace(deq.task, model=Net(Sum(8)))

        def start(seed):
            state = init_state(task, deq.optimiser, deq.train.inputs, seed)
            return bits(state.variables.params), bits(state.key)

        assert start(3) == start(3)
        assert all(a != b for a, b in zip(start(3), start(4), strict=True))

    def test_a_stop_asked_for_in_the_last_epoch_is_heard(self, tmp_path):
        """Or a comparison would go on with its next run. All is saved, so nothing is left to do."""
        task, saved = line_task(lambda w: w), Checkpoints(tmp_path)
        how = task, optax.sgd(1.0), ONES, ONES, Schedule(2, 4), 0, saved
        asked = iter([False, True])
        with pytest.raises(StoppedError, match="epoch 2 is saved"):
            fit(*how, stop=lambda: next(asked))
        again = fit(*how, stop=lambda: pytest.fail("it trains"))
        assert [row["epoch"] for row in again.history] == [0, 1, 2] and weight(again.best) == 2

    def test_a_run_stopped_by_infinity_stays_stopped(self, tmp_path):
        options = {"rate": 1e10, "power": 4, "start": 1.0, "checkpoints": Checkpoints(tmp_path)}
        first = fit_line(lambda w: -abs(w), Schedule(9, 4, bad_steps=2), **options)
        again = fit_line(lambda w: -abs(w), Schedule(9, 4, bad_steps=2), **options)
        assert len(first.history) == 4 and again.ending == first.ending
        assert str(timeless(again.history)) == str(timeless(first.history))


class TestHistory:
    def test_rows_say_what_happened(self, deq):
        first, *others = deq.whole.history
        assert [row["epoch"] for row in deq.whole.history] == [0, 1, 2, 3, 4]
        assert first["loss"] is None and first["train"] == {} and first["seconds"] == 0
        for row in deq.whole.history:
            assert set(row["validation"]) == {"accuracy"} and row["validation_loss"] > 0
            assert set(row["gates"]) == {"a", "b"}
            assert set(row["solver"]) == {"converged", "mean_steps", "max_steps", "residual"}
            assert 1 <= row["solver"]["mean_steps"] <= row["solver"]["max_steps"]
            assert (row["solver"]["converged"] == 1) == (0 < row["solver"]["residual"] <= 1e-3)
        for row in others:
            backward = {"backward_converged", "backward_steps"}
            assert set(row["train"]) == {
                *("loss", "gradient_norm", "bad_steps"),
                *backward,
                *row["solver"],
            }
            assert row["loss"] == row["train"]["loss"] > 0 and row["train"]["gradient_norm"] > 0

    def test_loss_is_the_mean_over_the_steps_of_the_epoch(self):
        """w is 0, 1, 2, … at the steps, two of them an epoch, and the loss is -w."""
        fitted = fit_line(lambda w: w, Schedule(2, batch_size=2))
        assert [row["loss"] for row in fitted.history] == [None, -0.5, -2.5]
        assert [row["validation"]["score"] for row in fitted.history] == [0, 2, 4]

    def test_one_compilation_serves_all_epochs_and_resumed_runs(self, deq, tmp_path):
        assert deq.after[1] > deq.after[0] > 0
        assert len(set(deq.after[1:])) == 1
        before = deq.traces
        with jax.log_compiles(), pytest.MonkeyPatch.context() as patch:
            compiled = []
            patch.setattr("logging.Logger.handle", lambda self, r: compiled.append(r.getMessage()))
            deq.fit(1, Checkpoints(tmp_path))
            deq.fit(2, Checkpoints(tmp_path))
        assert deq.traces == before
        again = [m for m in compiled if "run_epochs" in m or "_predict" in m]
        assert not [m for m in again if m.startswith(("Compiling", "Finished XLA"))], again


class TestStopping:
    @pytest.mark.parametrize("peak", [1, 3, 6])
    def test_best_epoch_is_where_the_validation_score_is_highest(self, peak):
        fitted = fit_line(lambda w: -abs(w - peak), Schedule(6, 4))
        scores = [row["validation"]["score"] for row in fitted.history]
        assert fitted.best_epoch == np.argmax(scores) == peak
        assert weight(fitted.best) == peak and weight(fitted.last.variables) == 6

    def test_a_smooth_selection_is_by_the_mean_of_the_last_scores(self):
        """Of 0 5 0 4 4 1 the means of two are 0 2.5 2.5 2 4 2.5: the peak of 5 was luck."""
        scores = [0, 5, 0, 4, 4, 1]
        fitted = fit_line(lambda w: scores[int(w)], Schedule(5, 4, smooth=2))
        assert fitted.best_epoch == weight(fitted.best) == 4

    def test_the_best_epoch_is_never_the_one_before_training(self):
        fitted = fit_line(lambda w: -w, Schedule(3, 4))
        assert (fitted.best_epoch, weight(fitted.best)) == (1, 1)

    def test_of_equal_scores_the_one_with_the_smallest_loss_is_the_best(self):
        """The loss is -w."""
        fitted = fit_line(lambda w: min(w, 2), Schedule(4, 4))
        assert (fitted.best_epoch, weight(fitted.best)) == (4, 4)

    @pytest.mark.parametrize("patience", [1, 2])
    def test_patience(self, patience):
        fitted = fit_line(lambda w: -abs(w - 3), Schedule(20, 4, patience=patience))
        assert fitted.history[-1]["epoch"] == 3 + patience
        assert weight(fitted.best) == 3

    def test_patience_counts_evaluations_and_a_gain_renews_it(self):
        gains = {0: 0, 2: 5, 4: 1, 6: 7, 8: 1, 10: 1}
        schedule = Schedule(20, 4, evaluate_every=2, patience=2)
        fitted = fit_line(lambda w: gains[int(w)], schedule)
        assert [row["epoch"] for row in fitted.history] == [0, 2, 4, 6, 8, 10]
        assert weight(fitted.best) == fitted.best_epoch == 6

    def test_no_more_epochs_than_asked_for(self):
        """Also where evaluations do not divide them."""
        fitted = fit_line(lambda w: w, Schedule(5, 4, evaluate_every=3))
        assert fitted.history[-1]["epoch"] == weight(fitted.last.variables) == 5

    def test_no_epochs_is_the_model_at_the_start(self):
        fitted = fit_line(lambda w: w, Schedule(0, 4))
        assert len(fitted.history) == 1 and weight(fitted.best) == 0

    @pytest.mark.parametrize("score", [lambda w: -abs(w), lambda w: math.nan], ids=["inf", "nan"])
    def test_steps_without_a_finite_loss_change_nothing_and_end_training(self, score):
        """The first step leads to where w⁴ overflows."""
        schedule = Schedule(9, 4, bad_steps=3)
        fitted = fit_line(score, schedule, rate=1e10, power=4, start=1.0)
        assert [row["train"]["bad_steps"] for row in fitted.history[1:]] == [0, 1, 1, 1]
        assert [np.isfinite(row["loss"]) for row in fitted.history[1:]] == [True] + 3 * [False]
        assert fitted.ending.startswith("the last 3 steps were bad: no finite gradient")
        assert fitted.best_epoch == 1
        assert weight(fitted.best) == weight(fitted.last.variables) == pytest.approx(4e10)

    def test_the_loss_of_an_epoch_is_that_of_its_good_steps(self):
        schedule = Schedule(2, 1, bad_steps=9)
        fitted = fit_line(lambda w: -abs(w), schedule, rate=1e10, power=4, start=1.0)
        assert str([row["loss"] for row in fitted.history[1:]]) == "[-1.0, nan]"
        assert [row["train"]["bad_steps"] for row in fitted.history[1:]] == [3, 4]
        assert fitted.ending == "all 2 epochs are done"

    def test_bad_steps_count_only_in_a_row(self):
        """One bad row among four: three good steps an epoch."""
        data = ONES._replace(inputs={"x": np.array([[1], [np.nan], [1], [1]], np.float32)})
        task, schedule = line_task(lambda w: w), Schedule(4, 1, bad_steps=3)
        fitted = fit(task, optax.sgd(1.0), data, ONES, schedule, seed=0)
        assert [row["train"]["bad_steps"] for row in fitted.history[1:]] == 4 * [1]
        assert weight(fitted.last.variables) == weight(fitted.best) == 12


class TestAverage:
    def test_a_bad_step_leaves_it_as_it_is(self):
        """One good step leads from 1 to 4e10, where w⁴ overflows; the mean with decay ½ is 2e10."""
        schedule = Schedule(4, 4, bad_steps=9)
        fitted = fit_line(lambda w: w, schedule, rate=1e10, power=4, start=1.0, average=0.5)
        assert [row["train"]["bad_steps"] for row in fitted.history[1:]] == [0, 1, 1, 1]
        assert weight(fitted.last.learned) == pytest.approx(2e10)

    def test_the_running_mean_is_what_is_evaluated_and_kept(self):
        """w is t after t steps, so that its mean with decay ½ is t - 1 + 2⁻ᵗ."""
        fitted = fit_line(lambda w: w, Schedule(4, 4), average=0.5)
        means = [t - 1 + 0.5**t for t in range(5)]
        assert [row["validation"]["score"] for row in fitted.history] == means
        assert weight(fitted.best) == weight(fitted.last.learned) == means[-1]
        assert weight(fitted.last.variables) == 4

    def test_resumed_it_is_the_same(self, tmp_path):
        options = {"average": 0.5, "checkpoints": Checkpoints(tmp_path)}
        for epochs in (2, 4):
            resumed = fit_line(lambda w: w, Schedule(epochs, 4), **options)
        whole = fit_line(lambda w: w, Schedule(4, 4), average=0.5)
        assert bits(resumed.last) == bits(whole.last) and bits(resumed.best) == bits(whole.best)


class TestRefit:
    def fit(self, score, schedule, rate=1.0, **options):
        """The first training has one step of 4 rows an epoch, the second two, of 8 rows."""
        dataset = Dataset("Ones", "real", (), ONES, ONES, ONES)
        task, sgd = line_task(score, **options), optax.sgd(rate)
        chosen = fit(task, sgd, ONES, ONES, schedule, seed=0)
        return chosen, refit(chosen, task, sgd, dataset, schedule, 0)

    def test_it_keeps_the_chosen_epoch_of_a_training_on_all_rows(self):
        schedule = Schedule(9, 4, evaluate_every=2, patience=2)
        chosen, again = self.fit(lambda w: -abs(w - 4), schedule)
        assert (chosen.best_epoch, weight(chosen.best)) == (4, 4)
        assert (again.best_epoch, weight(again.best)) == (4, 8)
        assert again.history[-1]["epoch"] == chosen.history[-1]["epoch"] == 8
        assert weight(again.last.variables) == 16

    def test_where_it_breaks_down_it_says_so(self):
        """One step here and two there, after which the model has no score any more."""
        with pytest.raises(InputError, match="on all rows broke down before epoch 1, which"):
            self.fit(lambda w: w if w < 1.5 else math.nan, Schedule(1, 4))


class TestEvaluate:
    def test_batch_size_does_not_change_a_row(self, deq):
        variables, split = deq.whole.best, deq.validation
        one = evaluate(deq.task, variables, split, 4)
        other = evaluate(deq.task, variables, split)
        assert one.probabilities.shape == (11, 1)
        np.testing.assert_allclose(one.probabilities, other.probabilities, atol=1e-5)
        np.testing.assert_array_equal(one.stats.steps, other.stats.steps)
        assert one.stats.converged.shape == one.gates["a"].shape == (11,)
        right = np.mean((one.probabilities[:, 0] > 0) == split.labels)
        assert one.metrics == other.metrics == {"accuracy": pytest.approx(right)}
        row = deq.whole.history[deq.whole.best_epoch]  # the history is of these variables
        assert row["validation"]["accuracy"] == one.metrics["accuracy"]
        assert row["gates"] == pytest.approx({m: g.mean() for m, g in one.gates.items()}, rel=1e-4)
        assert row["solver"]["mean_steps"] == pytest.approx(one.stats.steps.mean())

    @pytest.mark.parametrize("batch_size", [1, 3, 4, 6, 7, 256])
    def test_loss_is_the_mean_over_the_rows(self, batch_size):
        """A last batch is filled up, and what fills it must not count."""
        split = Split({"x": np.float32([[1], [2], [4], [8], [16], [32], [64]])}, np.zeros(7))
        variables = Variables({"w": jnp.ones(1)}, {})
        result = evaluate(line_task(lambda w: w), variables, split, batch_size)
        assert result.loss == pytest.approx(-127 / 7, rel=1e-6)
        assert result.metrics["score"] == pytest.approx(127 / 7)
        assert (result.stats, result.gates) == (None, None)

    def test_training_does_not_use_validation_rows_for_batch_statistics(self, deq):
        means = deq.whole.best.batch_stats
        evaluate(deq.task, deq.whole.best, deq.validation, 4)
        assert bits(means) == bits(deq.whole.best.batch_stats)


class TestRows:
    """Row i is the i-th unit vector and the step adds its gradient: w counts the visits."""

    def visits(self, rows, batch_size, epochs, seed=0):
        data = Split({"x": np.eye(rows, dtype=np.float32)}, np.zeros(rows, np.float32))
        task = line_task(lambda w: w)
        optimiser = optax.sgd(float(batch_size))  # undoes the mean over the batch
        state = init_state(task, optimiser, data.inputs, seed)
        counts = []
        for _ in range(epochs):
            state, _ = run_epochs(task, optimiser, state, data, batch_size, 1)
            counts.append(np.asarray(state.variables.params["w"]))
        return np.diff(counts, axis=0, prepend=np.zeros((1, rows))).round(5)

    def test_every_row_once_an_epoch(self):
        assert (self.visits(12, 4, 3) == 1).all()

    def test_rows_left_over_change_every_epoch(self):
        visits = self.visits(11, 4, 6)
        assert set(np.unique(visits)) == {0, 1} and (visits.sum(axis=1) == 8).all()
        assert len(np.unique(visits, axis=0)) > 1

    def test_the_order_is_the_seed_s(self):
        one, same, other = (self.visits(11, 4, 4, seed) for seed in (0, 0, 1))
        assert (one == same).all() and (one != other).any()

    def test_two_epochs_in_one_scan_are_two_epochs(self):
        data = Split({"x": np.eye(6, dtype=np.float32)}, np.zeros(6, np.float32))
        task, optimiser = line_task(lambda w: w, power=2, start=0.5), optax.sgd(0.3)

        def start():
            return init_state(task, optimiser, data.inputs, 0)

        together, seen = run_epochs(task, optimiser, start(), data, 4, 2)
        first, _ = run_epochs(task, optimiser, start(), data, 4, 1)
        apart, _ = run_epochs(task, optimiser, first, data, 4, 1)
        assert bits(together) == bits(apart)
        assert seen["loss"].shape == (2,)


class Bare(nn.Module):
    """DEQ → linear: a row's features are the same in every epoch."""

    fusion: nn.Module

    @nn.compact
    def __call__(self, inputs, train=False, **start):
        out = self.fusion(inputs, train=train, **start)
        return Prediction(nn.Dense(1)(out.fused), out)


class TestWarmStarts:
    def task(self, deq, warm=True, tol=1e-5, gradient=Implicit()):
        solver = Anderson(tol=tol, max_steps=60)
        model = Bare(DEQFusion(32, solver=solver, gradient=gradient))
        return dataclasses.replace(deq.task, model=model, loss=cross_entropy, warm_start=warm)

    def fit(self, deq, optimiser, warm=True, epochs=6, checkpoints=None, **options):
        task, schedule = self.task(deq, warm, **options), Schedule(epochs, batch_size=8)
        return fit(task, optimiser, deq.train, deq.validation, schedule, 3, checkpoints)

    @pytest.mark.slow
    def test_every_row_gets_its_own_equilibrium_and_adjoint_back(self, deq):
        task, still = self.task(deq), optax.sgd(0.0)
        state = init_state(task, still, deq.train.inputs, 3)
        variables = state.variables._asdict()
        rows = jnp.array([5, 2, 19, 7])

        def batch(rows):
            return jax.tree.map(lambda x: x[rows], deq.train)

        state, first = train_step(task, still, state, batch(rows), rows)
        solved = task.model.apply(variables, jax.tree.map(lambda x: x[rows], deq.train.inputs))
        np.testing.assert_allclose(state.warm.z0.fused[rows], solved.fusion.fused, atol=1e-5)
        others = jnp.delete(state.warm.z0.fused, rows, axis=0)
        assert not others.any() and state.warm.z0.fused[rows].any(axis=1).all()
        state, second = train_step(task, still, state, batch(rows[::-1]), rows[::-1])
        assert first["mean_steps"] > 3 and first["backward_steps"] > 3
        assert second["mean_steps"] == second["backward_steps"] == 1

    @pytest.mark.slow
    def test_what_is_learned_is_the_same_in_fewer_steps(self, deq):
        cold, warm = (self.fit(deq, optax.adam(1e-4), on).history for on in (False, True))
        for key in ("loss", "validation_loss"):
            got, want = ([row[key] for row in history[1:]] for history in (warm, cold))
            np.testing.assert_allclose(got, want, rtol=1e-4)
        for key in ("mean_steps", "backward_steps"):
            assert warm[-1]["train"][key] < 0.8 * cold[-1]["train"][key]
        assert warm[-1]["train"]["converged"] == warm[-1]["train"]["backward_converged"] == 1

    @pytest.mark.slow
    def test_killed_and_resumed_is_the_uninterrupted_run_bit_for_bit(self, deq, tmp_path):
        whole = self.fit(deq, deq.optimiser, epochs=3)
        self.fit(deq, deq.optimiser, epochs=2, checkpoints=Checkpoints(tmp_path))
        again = self.fit(deq, deq.optimiser, epochs=3, checkpoints=Checkpoints(tmp_path))
        assert bits(again.last) == bits(whole.last)
        assert again.last.warm is not None

    def test_the_bytes_are_counted_before_they_are_taken(self, deq, capsys):
        inputs, model = deq.train.inputs, self.task(deq).model
        taken = init_state(self.task(deq), deq.optimiser, inputs, 0).warm
        needed = needed_bytes(model, inputs)
        assert needed == sum(x.nbytes for x in jax.tree.leaves(taken))
        assert needed == 22 * 4 * (2 * 3 * 32 + 3)  # z and u: 3 states of 32; 3 statistics
        cold = self.task(deq, warm=False)
        assert with_warm_starts(cold, inputs, free=2 * needed).warm_start
        assert not with_warm_starts(cold, inputs, free=2 * needed - 1).warm_start
        said = capsys.readouterr().out.splitlines()
        assert said[0].startswith("Warm starts are on: 0.0 MiB for 22 rows")
        assert said[1].startswith("Warm starts are off: ")

    def test_a_failing_backward_solve_is_seen(self, deq):
        short = Implicit(Picard(tol=1e-6, max_steps=2))
        seen = self.fit(deq, optax.sgd(0.0), warm=False, epochs=1, gradient=short).history[-1]
        assert seen["train"]["backward_converged"] == 0
        assert seen["train"]["backward_steps"] == 2
        assert seen["train"]["converged"] == 1


class TestStep:
    def test_the_jacobian_penalty_counts_with_its_weight(self):
        """d/dw of -w + γ w² at w = 3 is -1 + 6 γ."""
        optimiser = optax.sgd(1.0)
        for gamma in (0.0, 0.5):
            task = line_task(lambda w: w, weight=gamma)
            params = {"w": jnp.full(1, 3.0)}
            state = TrainState(
                Variables(params, {}),
                optimiser.init(params),
                jnp.int32(0),
                jax.random.key(0),
                jnp.int32(0),
                {"x": jnp.float32(0)},
            )
            after, seen = train_step(task, optimiser, state, ONES)
            assert weight(after.variables) == pytest.approx(3 + 1 - 6 * gamma)
            assert float(seen["loss"]) == -3  # without the penalty, which has its own entry
            assert (float(seen["jacobian_penalty"]) == 9) if gamma else (len(seen) == 3)
            assert int(after.step) == 1 and bits(after.key) == bits(state.key)
