"""``python -m experiments.benchmark``: who takes part, what they find, how it is written down."""

import dataclasses
import json
import math
import re
from functools import partial

import jax
import numpy as np
import pytest

from deq_fusion_jax.official import params_from_official
from experiments import benchmark
from experiments.benchmarks import spread as benchmark_spread
from experiments.benchmarks import tables as benchmark_report
from experiments.benchmarks.contenders import picard_steps, unrolled
from experiments.benchmarks.problem import make_problem
from experiments.benchmarks.profile import STEPS, profiled, programs
from experiments.benchmarks.timing import Contender, interleaved
from experiments.benchmarks.training import Lesson, our_learner, taught
from experiments.common.errors import InputError

TOL = 1e-4
OWN = {"ours, joint", "ours, staged"}
PLAIN = {"unrolled", "unrolled, checkpoint"}
TORCH = {"torchdeq, implicit", "torchdeq, phantom 5"}


def is_there(*packages):
    return not benchmark.missing(*packages)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The folder of a quick run on one small layer, for which plain iteration settles."""
    folder = tmp_path_factory.mktemp("benchmark") / "run"
    options = f"--quick --part layer --rounds 2 --seed 2 --tolerances {TOL} --shapes 8 64 2"
    with pytest.MonkeyPatch.context() as patch:
        if is_there("torch", "torchdeq"):
            from experiments.benchmarks import contenders_torch

            patch.setattr(contenders_torch, "_thread_counts", lambda: [1])
        benchmark.run(benchmark.parse_args([*options.split(), "--run-dir", str(folder)]))
    return folder


@pytest.fixture
def rows(quick):
    written = json.loads((quick / "benchmark.json").read_text(encoding="utf-8"))
    return {row["contender"]: row for row in written["layer"]}


@pytest.fixture
def main(run_command):
    return partial(run_command, benchmark.main)


@pytest.mark.slow
class TestQuickRun:
    def test_everybody_who_is_installed_takes_part(self, quick, rows):
        expected = {*OWN, *PLAIN, "jaxopt", "jaxopt, BiCGStab", "floor"}
        expected |= {"optimistix, GMRES"} if is_there("optimistix") else set()
        expected |= TORCH if is_there("torch", "torchdeq") else set()
        assert set(rows) == expected
        text = (quick / "benchmark.md").read_text(encoding="utf-8")
        _, table = text.split("## One layer")
        for name in expected:
            assert table.count(f"\n| {name} ") == 2  # beside the other shapes, and in its own table
        assert (quick / "figures" / "layer.png").read_bytes().startswith(b"\x89PNG")
        complaint = "pip install '.[bench]'"
        assert (complaint in text) == bool(benchmark.missing("torch", "torchdeq", "optimistix"))

    def test_what_they_found(self, rows):
        for name in OWN:
            row = rows[name]
            assert 5 < row["forward"] < 55 and 5 < row["backward"] < 55
            assert row["temporaries"] > 0 and row["compile_seconds"] > 0
        # The joint schedule stops each sample by the residual of the whole state.
        assert rows["ours, joint"]["sample_residual"] <= 1.05 * TOL
        for name in set(rows) - {"floor", "torchdeq, phantom 5"}:
            assert rows[name]["reached"], name
            assert rows[name]["residual"] <= rows[name]["sample_residual"]
            assert rows[name]["gradient_error"] < 50 * TOL, name
        if "torchdeq, phantom 5" in rows:
            assert 0.01 < rows["torchdeq, phantom 5"]["gradient_error"] < 1

        fastest = min((rows[name] for name in OWN), key=lambda row: row["median"])
        for row in rows.values():
            assert len(row["seconds"]) == 2
            ratios = np.divide(row["seconds"], fastest["seconds"])
            assert row["ratio"] == pytest.approx(np.median(ratios))


@pytest.mark.slow
def test_unrolling_takes_as_many_steps_as_it_needs():
    problem = make_problem((4, 32, 3), 0)
    tol = 1e-2
    steps = picard_steps(problem, tol)
    enough, early = unrolled(problem, steps), unrolled(problem, steps - 1)
    assert enough.forward == enough.backward == steps
    _, residual = problem.residuals(enough.read(enough.step()).z)
    _, before = problem.residuals(early.read(early.step()).z)
    assert residual <= tol * (1 + 1e-3) and before > tol
    sparing = unrolled(problem, steps, checkpoint=True)
    assert sparing.forward == 2 * steps and sparing.temporaries < enough.temporaries


class TestTorch:
    @pytest.fixture
    def torch(self):
        if not is_there("torch", "torchdeq"):
            pytest.skip("torchdeq is not installed")
        import torch

        return torch

    def test_the_maps_are_ours(self, torch):
        from experiments.benchmarks.contenders_torch import apply_cell, inject, state_dict

        problem = make_problem((4, 32, 3), 0)
        names = tuple(problem.inputs)
        z = np.random.default_rng(0).normal(size=(4, 4, 32)).astype(np.float32)
        *parts, fused = z.swapaxes(0, 1)
        state = problem.start._replace(modalities=dict(zip(names, parts, strict=True)), fused=fused)
        want = problem.f(state, *problem.arguments(problem.params, problem.inputs))

        entries = state_dict(problem.params, names)
        weights = {name: torch.tensor(entry) for name, entry in entries.items()}
        x = [torch.tensor(problem.inputs[name]) for name in names]
        got = apply_cell(weights, x, inject(weights, x), torch.tensor(z)).numpy()
        for i, part in enumerate([*want.modalities.values(), want.fused]):
            np.testing.assert_allclose(got[:, i], part, atol=1e-5)

    def test_state_dict_and_back(self, torch):
        from experiments.benchmarks.contenders_torch import state_dict

        params = make_problem((4, 32, 3), 0).params
        names = ("modality2", "modality0", "modality1")
        back = params_from_official(state_dict(params, names), names)
        assert jax.tree.structure(back) == jax.tree.structure(params)
        jax.tree.map(np.testing.assert_array_equal, back, params)


def test_every_round_times_everyone_once_in_rotating_order():
    calls = []
    contenders = [Contender(name, step=partial(calls.append, name)) for name in "abc"]
    seconds = interleaved(contenders, rounds=4)
    assert "".join(calls) == "cab" + "abc" + "bca" + "cab" + "abc"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 4, "b": 4, "c": 4}


@pytest.mark.slow
class TestTraining:
    LESSON = Lesson("made up", 16, (16, 64, 2), dropout=0.0)  # a step is an epoch

    def test_all_learn_the_same(self):
        learners = [our_learner(self.LESSON, 1e-4, 2, "joint", warm) for warm in (False, True)]
        learners.append(our_learner(self.LESSON, 1e-4, 2, "staged", warm=True))
        if is_there("torch", "torchdeq"):
            from experiments.benchmarks.contenders_torch import torch_learner

            learners.append(torch_learner(self.LESSON, 1e-4, 2))
        taught = [[learner.step() for _ in range(4)] for learner in learners]
        losses = np.array([[means["loss"] for means in epochs] for epochs in taught])
        assert (np.diff(losses) < 0).all()
        np.testing.assert_allclose(losses[1:], np.broadcast_to(losses[0], losses[1:].shape), 2e-3)
        cold, warm, *_ = (epochs[-1] for epochs in taught)
        for steps in ("mean_steps", "backward_steps"):
            assert warm[steps] < 0.8 * cold[steps]

    def test_the_table(self):
        def learner(name, **means):
            return Contender(name, step=lambda: {"loss": 0.25, **means}, settings=f"as {name}")

        solver = {
            "mean_steps": 7.0,
            "backward_steps": 4.25,
            "converged": 1,
            "backward_converged": 0.5,
        }
        rows = taught(self.LESSON, [learner("ours", **solver), learner("theirs")], rounds=2)
        assert [len(row["seconds"]) for row in rows] == [2, 2] and rows[0]["ratio"] == 1
        text = "\n".join(benchmark_report.training_tables(rows))
        assert "made up, 16 rows, 16×64, M = 2, dropout 0:" in text and "Synthetic rows" in text
        assert re.search(r"\| ours +\|.*\| +7.0/4.2 \| +50.0% \| +0.2500 \|", text)
        assert re.search(r"\| theirs +\|.*\| +– \| +– \| +0.2500 \|", text)
        assert "Settings: ours: as ours; theirs: as theirs." in text


class TestProfile:
    @pytest.mark.slow
    def test_every_program_takes_its_steps(self):
        problem = make_problem((4, 32, 2), 0)
        z = {program.name: program.step() for program in programs(problem)}
        plain, accelerated = z["plain step"], z["accelerated step"]
        assert plain[1].steps.tolist() == accelerated[1].steps.tolist() == [STEPS] * 4
        # The solver returns the last state that it measured, which is one evaluation before.
        image = problem.f(plain[0], *problem.arguments(problem.params, problem.inputs))
        np.testing.assert_allclose(image.fused, z["f"].fused, rtol=1e-4, atol=1e-5)
        # The adjoint of z_f reaches the modalities.
        assert all(0 < benchmark.norm(u) < np.inf for u in z["backward"].modalities.values())

    def test_the_table(self):
        rows = profiled(make_problem((4, 32, 2), 0), rounds=2)
        assert all(len(row["seconds"]) == 2 for row in rows)
        text = "\n".join(benchmark_report.profile_tables(rows))
        assert re.search(r"\| accelerated step \| +0\.\d\d \(100%\) \|", text)
        assert text.count("\n| ") == 2 + 5


class TestSpread:
    def row(self, name, ratio, **fields):
        row = {"contender": name, "shape": [8, 64, 2], "tolerance": 1e-3, "ratio": ratio}
        return row | {"reached": True} | fields

    def run(self, jaxopt, theirs, floor):
        layer = [self.row("ours, joint", 1.0), self.row("jaxopt", jaxopt)]
        layer += [self.row("torchdeq, implicit", theirs), self.row("floor", floor)]
        lesson = {"name": "ROSMAP", "dropout": 0.0}
        training = [{**lesson, "contender": "torchdeq, implicit", "ratio": 2 * theirs}]
        return {"layer": layer, "training": training}

    def test_every_ratio_of_every_run(self):
        text = benchmark_spread.spread([self.run(1.5, 4.0, 0.5), self.run(1.25, 1.125, 0.4)])
        layer = r"8×64, M = 2, tolerance 0.001 \| +1.50 1.12 \| +4.00 1.12 \| +2.00 2.50 \|"
        assert re.search(layer, text), text
        assert re.search(r"training, ROSMAP, dropout 0 +\| +– \| +8.00 2.25 \| +– \|", text), text

    def test_command(self, tmp_path, run_command):
        def write(name, results):
            (tmp_path / name).mkdir()
            (tmp_path / name / "benchmark.json").write_text(json.dumps(results), encoding="utf-8")
            return tmp_path / name

        one, other = (write(str(i), self.run(1.5, 4.0, 0.5)) for i in range(2))
        status, out, _ = run_command(benchmark_spread.main, one, other)
        assert status == 0 and "4.00 4.00" in out
        assert "| 4.00 4.00" in (one / "spread.md").read_text(encoding="utf-8").replace("  ", "")
        different = write("different", {"depth": []})
        for folders, complaint in [
            ([], "no runs: give the folders"),
            (["--runs", one], "--runs: give the folders"),
            ([one, different], "the runs share no shapes"),
            ([tmp_path / "none"], "no benchmark.json there"),
        ]:
            status, _, err = run_command(benchmark_spread.main, *folders)
            assert status == 2 and complaint in err and "Traceback" not in err


class TestScaling:
    def test_exponents_of_a_power_law(self):
        x = np.array([16.0, 32.0, 64.0, 128.0])
        assert benchmark_report.power_law(x, 0.3 * x**1.7) == pytest.approx(1.7)
        noise = np.array([1.1, 0.9, 1.1, 0.9])
        assert 1.5 < benchmark_report.power_law(x, noise * x**1.7) < 1.9

    def test_fits_state_their_range(self):
        def row(axis, value, median, steps, size):
            own = {"axis": axis, "value": value, "contender": "ours, joint"}
            return {**own, "median": median, "forward": steps, "temporaries": size}

        batches = [row("batch", n, 3 * n, n**0.5, 10 * n**2) for n in (16, 32, 64)]
        tolerances = [row("tolerance", 10.0**-k, 1.0, 2 + 5 * k, 1) for k in range(1, 4)]
        batch, tolerance = benchmark_report.fits(batches + tolerances)
        exponents = {"time": 1.0, "time_per_evaluation": 0.5, "temporaries": 2.0}
        assert {name: batch[name] for name in exponents} == pytest.approx(exponents)
        assert (batch["from"], batch["to"]) == (16, 64)
        assert tolerance["evaluations_per_decade"] == pytest.approx(5)


class TestTable:
    def row(self, name, **fields):
        row = {"contender": name, "shape": (8, 64, 2), "tolerance": 1e-3, "median": 0.0123}
        row |= {"ratio": 2.0, "forward": 17, "backward": None, "settings": "", "reached": True}
        return row | {"temporaries": 1.5e6, "compile_seconds": 2.0, "residual": 9e-4} | fields

    def test_a_missed_tolerance_is_marked(self):
        rows = [self.row("a"), self.row("b", reached=False), self.row("c", reached=None)]
        text = "\n".join(benchmark_report.layer_tables(rows))
        beside, alone = text.split("8×64, M = 2, tolerance 0.001:")
        assert re.search(r"\| a +\| +12\.3 \(17\) \|", beside) and re.search(r"\| a +\|", alone)
        assert re.search(r"\| b +\| +12\.3 \(17\) \* \|", beside) and re.search(
            r"\| b \* +\|", alone
        )
        assert re.search(r"\| c +\| +12\.3 \(17\) \|", beside)  # one that has none to reach

    def test_the_next_library_and_the_floor(self):
        names = {"jaxopt": 3.0, "jaxopt, BiCGStab": 1.5, "optimistix, GMRES": 2.0}
        rows = [self.row("ours, joint", ratio=1.0), self.row("floor", ratio=0.4, reached=None)]
        rows += [self.row(name, ratio=ratio) for name, ratio in names.items()]
        rows += [self.row("unrolled", ratio=1.1), self.row("torchdeq, phantom 5", ratio=1.2)]
        missed = self.row("torchdeq, implicit", ratio=1.3, reached=False)
        text = "\n".join(benchmark_report.layer_tables([*rows, missed], details=False))
        assert re.search(r"\| next library / fastest of ours \| +1.50 \|", text)
        assert re.search(r"\| fastest of ours / floor +\| +2.50 \|", text)
        assert "ratio: to" not in text and text.count("| jaxopt ") == 1

    def test_a_gradient_that_is_not_finite_is_a_miss(self):
        problem = make_problem((4, 32, 3), 0)
        fine = unrolled(problem, 30)
        found = fine.read(fine.step())
        broken = found._replace(gradient=jax.tree.map(lambda x: x * np.nan, found.gradient))
        contender = Contender("broken", step=lambda: broken, read=lambda outcome: outcome)
        assert benchmark.described(problem, 0.5, fine, exact=False)["reached"]
        assert not benchmark.described(problem, 0.5, contender, exact=False)["reached"]


class TestCommand:
    @pytest.mark.slow
    def test_depth_and_scaling(self, main, tmp_path, monkeypatch):
        problem = make_problem((4, 32, 2), 0)
        shallow = unrolled(problem, 3)  # one program, instead of one for each shape

        def ours(problem, tol, schedule, max_steps=55):
            return dataclasses.replace(shallow, name=f"ours, {schedule}")

        monkeypatch.setattr(benchmark, "make_problem", lambda shape, seed: problem)
        monkeypatch.setattr(benchmark, "ours", ours)
        monkeypatch.setattr(benchmark, "find_spec", lambda name: None)
        options = "--quick --part depth scaling --rounds 1 --shapes 4 32 2 --run-dir"
        status, out, err = main(*options.split(), tmp_path / "run")
        assert status == 0, err
        assert "ours, staged, batch from 16 to 32: exponent" in " ".join(out.split())

        written = json.loads((tmp_path / "run" / "benchmark.json").read_text(encoding="utf-8"))
        assert {(row["steps"], row["contender"]) for row in written["depth"]} == {
            (steps, name) for steps in (10, 20) for name in {"ours, joint", *PLAIN}
        }
        counts = {axis: 4 for axis in ("batch", "channels", "modalities", "tolerance")}
        axes = [row["axis"] for row in written["scaling"]]
        assert {axis: axes.count(axis) for axis in axes} == counts
        assert {fit["axis"] for fit in written["fits"]} == set(counts)
        assert all(math.isfinite(fit["time"]) for fit in written["fits"] if "time" in fit)
        assert written["missing"] == ["torch", "torchdeq", "optimistix"]
        text = (tmp_path / "run" / "benchmark.md").read_text(encoding="utf-8")
        assert "Left out, not installed: torch, torchdeq, optimistix." in text
        assert (tmp_path / "run" / "figures" / "depth.png").stat().st_size > 1000
        assert (tmp_path / "run" / "figures" / "scaling.png").stat().st_size > 1000

    def test_all_parts_are_the_default(self):
        assert benchmark.Config().part == tuple(benchmark.PARTS)

    def test_quick_takes_the_smallest_shape(self):
        config = benchmark.parse_args(["--quick"])
        assert config.shapes == ((64, 64, 2),) and config.rounds == 3
        assert len(benchmark.layer(config)) == 2  # tolerances
        assert len(benchmark.layer(benchmark.Config())) == 8
        assert len(benchmark.scaling(benchmark.Config())) == 9 + 6 + 3 + 6

    def test_what_cannot_be_used(self, refuses, tmp_path):
        refuses(
            "--part speed: choose from layer, training, profile, depth, scaling", "--part", "speed"
        )
        refuses("--rounds 0: at least 1", "--rounds", 0)
        refuses("--shapes 8 63 2: expected", "--shapes", 8, 63, 2)
        refuses("--shapes 0 64 2: expected", "--shapes", 64, 64, 2, 0, 64, 2)
        refuses("--tolerances 1e-09: expected from 1.2e-07", "--tolerances", 1e-9)
        refuses("--tolerances 2.0", "--tolerances", 1e-3, 2)
        refuses("--help lists the options", "--speed")
        (tmp_path / "file").touch()
        refuses("file: File exists; give a folder", "--run-dir", tmp_path / "file")


def test_a_problem_without_an_equilibrium_is_refused(monkeypatch):
    def solve(params, inputs):
        return (0.0, (problem.start, np.array([True, False, True, False]))), inputs

    problem = dataclasses.replace(make_problem((4, 32, 3), 0))  # a copy without a reference yet
    monkeypatch.setattr(type(problem), "value_and_grad", lambda *_: solve)
    with pytest.raises(InputError, match=r"shape \(4, 32, 3\) with seed 0: 2 samples find no"):
        _ = problem.reference
