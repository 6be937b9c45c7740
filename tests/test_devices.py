"""Data parallelism: eight CPU devices, and two processes, against one device."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deq_fusion_jax import Anderson, Broyden, DEQFusion, Phantom, Picard, deq_fixed_point
from experiments.common.errors import InputError
from experiments.common.lock import folder_alone
from experiments.datasets import Split
from experiments.models.encoders import MaxoutMLP
from experiments.training.devices import BATCH, mesh_of, put, shard_model, share_of
from experiments.training.schedule import Schedule
from experiments.training.step import init_state, train_step
from experiments.training.task import Prediction, Task, evaluate
from experiments.training.train import fit

ROOT = Path(__file__).resolve().parents[1]
RNG = np.random.default_rng(0)


@pytest.fixture
def mesh():
    with mesh_of("devices"):
        yield


# --- the primitive ---------------------------------------------------------------------------

W = jnp.asarray(0.2 * RNG.standard_normal((6, 6)), jnp.float32)
X = jnp.asarray(RNG.standard_normal((16, 6)), jnp.float32)


def step(z, w, x):
    return jnp.tanh(z @ w + x)


@pytest.mark.parametrize("gradient", [None, Phantom(3)], ids=["implicit", "phantom"])
@pytest.mark.parametrize("solver", [Picard(1e-5), Anderson(1e-5), Broyden(1e-5, trace=True)])
def test_a_shard_of_a_fixed_point_is_a_part_of_the_whole(mesh, solver, gradient):
    """Under `jax.shard_map` as it comes, with its check of what varies over the devices."""
    options = {"solver": solver} | ({"gradient": gradient} if gradient else {})

    def solve(w, x):
        z, stats = deq_fixed_point(step, jnp.zeros_like(x), w, x, **options)
        return z, (stats.steps, stats.residual, stats.converged)

    def loss(solve, w, x):
        z, seen = solve(w, x)
        return jnp.sum(z**2), seen

    shards = jax.shard_map(solve, in_specs=(P(), P(BATCH)), out_specs=P(BATCH))
    found, expected = (
        jax.jit(jax.value_and_grad(lambda w, x, s=s: loss(s, w, x), (0, 1), has_aux=True))(W, X)
        for s in (shards, solve)
    )
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_each_device_stops_by_itself(mesh):
    """Device i gets a map that contracts by slopes[i]: it evaluates f as often as its own needs."""
    slopes = jnp.asarray([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])[:, None]
    counts = np.zeros(8, int)

    def count(device):
        counts[device] += 1

    def f(z, slope):
        jax.debug.callback(count, jax.lax.axis_index(BATCH))
        return slope * z + 1

    def solve(slope):
        return deq_fixed_point(f, jnp.zeros_like(slope), slope, solver=Picard(1e-4))[1].steps

    steps = jax.jit(jax.shard_map(solve, in_specs=P(BATCH), out_specs=P(BATCH)))(slopes)
    jax.effects_barrier()
    assert steps[0] == 2 and steps[7] > 15
    np.testing.assert_array_equal(counts, steps)


# --- training --------------------------------------------------------------------------------


class Net(nn.Module):
    """Maxout encoders with dropout and batch statistics → DEQ with dropout → linear."""

    fusion: nn.Module

    @nn.compact
    def __call__(self, inputs, train=False, **start):
        encoded = {name: MaxoutMLP((16,), 0.3)(x, train) for name, x in inputs.items()}
        out = self.fusion(encoded, train=train, **start)
        return Prediction(nn.Dense(1)(out.fused), out)


def cross_entropy(prediction, labels):
    return optax.sigmoid_binary_cross_entropy(prediction.logits[:, 0], labels).mean()


def accuracy(labels, logits):
    return {"accuracy": float(np.mean((logits[:, 0] > 0) == labels))}


FUSION = DEQFusion(32, solver=Picard(tol=1e-5, max_steps=99), dropout=0.2)
TASK = Task(Net(FUSION), cross_entropy, accuracy, jnp.asarray, "accuracy", jacobian_weight=0.1)
ADAM = optax.adam(1e-2)


def rows(n):
    labels = RNG.integers(0, 2, n).astype(np.float32)
    a = RNG.standard_normal((n, 5)).astype(np.float32) + labels[:, None]
    return Split({"a": a, "b": RNG.standard_normal((n, 3)).astype(np.float32)}, labels)


TRAIN, VALIDATION = rows(50), rows(11)  # no multiples of the eight devices


def spread(task):
    return Task(**task.__dict__ | {"model": shard_model(task.model)})


@pytest.mark.slow
def test_fit_on_eight_devices_is_fit_on_one():
    task = Task(**TASK.__dict__ | {"warm_start": True})  # which needs the batch's row numbers
    data, schedule = (TRAIN, VALIDATION), Schedule(2, batch_size=16)
    one = fit(task, ADAM, *data, schedule, 3)
    with mesh_of("devices"):
        eight = fit(spread(task), ADAM, *data, schedule, 3)
        found = evaluate(spread(task), eight.best, VALIDATION)
    assert len(jax.tree.leaves(eight.best)[0].sharding.device_set) == 8
    for x, y in zip(eight.history, one.history, strict=True):
        assert x["solver"]["converged"] == y["solver"]["converged"] == 1
        assert x["validation"] == y["validation"]
        for key in x["train"]:  # iterations may stop a step sooner or later
            tolerance = 5e-2 if key in ("residual", "mean_steps", "max_steps") else 1e-3
            np.testing.assert_allclose(
                x["train"][key], y["train"][key], rtol=tolerance, err_msg=key
            )
    # Adam divides by the size of the gradient, so a gradient near 0 passes its rounding on.
    for x, y in zip(jax.tree.leaves(eight.best), jax.tree.leaves(one.best), strict=True):
        np.testing.assert_allclose(x, y, atol=3e-4)
    expected = evaluate(task, one.best, VALIDATION)
    np.testing.assert_allclose(found.probabilities, expected.probabilities, atol=3e-3)
    assert found.stats.steps.shape == expected.stats.steps.shape == (11,)


COLLECTIVE = re.compile(r"= \S+ (all-reduce|all-gather|all-to-all|collective-permute)[-a-z]*\(")


def loops_and_collectives(text):
    """How many loops an HLO program has, how many of them a collective, and the collectives."""
    bodies = {}
    for body in re.split(r"\n(?=%|ENTRY )", text):
        name = re.match(r"(?:ENTRY )?(%[\w.-]+)", body)
        if name:
            bodies[name[1]] = body

    def within(name):
        """The text of a computation and of all that it calls."""
        called = set(re.findall(r"%[\w.-]+", bodies[name])) & bodies.keys() - {name}
        return bodies[name] + "".join(within(other) for other in called)

    loops = re.findall(r" while\(.*condition=(%[\w.-]+), body=(%[\w.-]+)", text)
    waiting = [pair for pair in loops if any(COLLECTIVE.search(within(name)) for name in pair)]
    return len(loops), len(waiting), len(COLLECTIVE.findall(text))


@pytest.mark.slow
def test_no_device_waits_inside_a_solve(mesh):
    """The HLO has a collective, the mean of the gradients, but none within a loop."""
    task = spread(Task(**TASK.__dict__ | {"model": Net(FUSION.clone(solver=Anderson()))}))
    state = init_state(task, ADAM, TRAIN.inputs, 0)
    batch = jax.tree.map(lambda x: put(x[:16]), TRAIN)
    training = jax.jit(lambda state, batch: train_step(task, ADAM, state, batch))
    text = training.lower(state, batch).compile().as_text()
    loops, waiting, collectives = loops_and_collectives(text)
    assert loops >= 4 and waiting == 0 and collectives > 0
    solve = jax.jit(lambda x: deq_fixed_point(step, jnp.zeros_like(x), W, x, solver=Picard())[0])
    left_to_jit = solve.lower(jax.device_put(X, NamedSharding(jax.sharding.get_mesh(), P(BATCH))))
    assert loops_and_collectives(left_to_jit.compile().as_text())[1] > 0


def test_a_batch_is_shared_evenly(mesh):
    assert share_of(16, 50) == 16
    assert share_of(100, 50) == 48  # all rows, but for two, which change every epoch
    with pytest.raises(InputError, match=r"--batch-size 20: 8 devices .* multiple"):
        share_of(20, 50)
    with pytest.raises(InputError, match="7 training rows are too few for 8 devices"):
        share_of(16, 7)


# --- processes -------------------------------------------------------------------------------


class Pair:
    """Two processes of one run on one CPU device each, as SLURM would start them.

    The fusion is one without a solver, which compiles in no time.
    """

    def __init__(self, tmp_path, *more):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.processes = []
        for rank in "01":
            slurm = {"JOB_ID": "1", "STEP_NODELIST": "localhost", "NTASKS": "2"}
            slurm |= {"PROCID": rank, "LOCALID": rank}
            environment = os.environ | {f"SLURM_{name}": value for name, value in slurm.items()}
            environment |= {"JAX_COORDINATOR_PORT": str(port)}
            environment |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
            process = subprocess.Popen(
                command(tmp_path, "--parallel", "processes", *more),
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            self.processes.append(process)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.communicate()

    def wait_for_row(self, path, count):
        """Until metrics.jsonl has so many lines."""
        deadline = time.monotonic() + 240
        while not path.exists() or len(path.read_text().splitlines()) < count:
            ended = [process.communicate() for process in self.processes if process.poll()]
            assert not ended and time.monotonic() < deadline, ended
            time.sleep(0.02)


def command(tmp_path, *more):
    words = [sys.executable, "-m", "experiments.features", tmp_path / "data.npz", "--fusion", "sum"]
    words += [
        "--features",
        8,
        "--hidden",
        8,
        "--batch-size",
        8,  # so small that every epoch is evaluated
        "--epochs",
        5000,
        "--patience",
        5000,
        "--run-dir",
        tmp_path / "run",
    ]
    return [*map(str, words), *more]


def history(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_train_save_go_on_and_notice_a_loss(tmp_path, run_command, interruptible):
    data = rows(400)
    np.savez(tmp_path / "data.npz", **data.inputs, labels=data.labels.astype(int))
    metrics = tmp_path / "run" / "metrics.jsonl"

    with Pair(tmp_path) as pair:
        pair.wait_for_row(metrics, 3)
        pair.processes[1].send_signal(signal.SIGTERM)  # the other one hears of it
        ended = [process.communicate(timeout=60) for process in pair.processes]
    assert [process.returncode for process in pair.processes] == [143, 143]
    assert all("stopped: epoch " in err for _, err in ended)
    assert "stopping: " in ended[1][1] and "stopping: " not in ended[0][1]
    assert "epoch" in ended[0][0] and "epoch" not in ended[1][0]  # one of them speaks
    stopped = len(history(metrics))

    with folder_alone(tmp_path / "run", tmp_path), Pair(tmp_path, "--resume") as pair:
        ended = [process.communicate(timeout=60) for process in pair.processes]
    assert [process.returncode for process in pair.processes] == [2, 2]
    assert [err.count("error: ") for _, err in ended] == [1, 0]
    assert f"in use by process {os.getpid()} on " in ended[0][1]
    assert [err.count("\n") for _, err in ended] == [2, 1]  # each has said that it joined

    with Pair(tmp_path, "--resume") as pair:
        pair.wait_for_row(metrics, stopped + 3)
        for process in pair.processes:  # as Ctrl-C in their terminal
            process.send_signal(signal.SIGINT)
        ended = [process.communicate(timeout=60) for process in pair.processes]
    assert [process.returncode for process in pair.processes] == [130, 130]
    assert all("stopped: epoch " in err for _, err in ended)

    stopped = len(history(metrics))
    with Pair(tmp_path, "--resume") as pair:
        pair.wait_for_row(metrics, stopped + 3)
        pair.processes[1].kill()
        _, err = pair.processes[0].communicate(timeout=60)
    assert pair.processes[0].returncode == 1
    line = err.splitlines()[-1]
    assert line.startswith("error: process 0 of 2 cannot go on: another one has ended")
    assert "Traceback" not in err and "start all processes again with --resume" in line

    stopped = len(history(metrics))
    with Pair(tmp_path, "--resume") as pair:
        pair.wait_for_row(metrics, stopped + 3)
        pair.processes[0].kill()
        _, err = pair.processes[1].communicate(timeout=60)
    assert pair.processes[1].returncode not in (0, None)
    assert err.startswith("Process 1 of 2 has joined. If another one is lost, this one ends too")
    assert "another task died" in err or "another one has ended" in err

    from experiments import features

    run_dir = tmp_path / "alone"
    options = command(tmp_path, "--epochs", "4", "--run-dir", str(run_dir))[3:]
    status, _, err = run_command(features.main, *options)
    assert status == 0, err
    alone, together = history(run_dir / "metrics.jsonl"), history(metrics)[:5]
    for key in ("loss", "validation_loss"):
        x, y = ([row[key] for row in rows[1:]] for rows in (alone, together))
        np.testing.assert_allclose(x, y, rtol=1e-3)


def test_without_a_launcher_it_says_so(tmp_path):
    data = rows(40)
    np.savez(tmp_path / "data.npz", **data.inputs, labels=data.labels.astype(int))
    words = command(tmp_path, "--parallel", "processes")
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "no launcher that JAX knows (SLURM," in done.stderr
