"""``python -m experiments.ablation``: the variants against their formulas, and a small run."""

import json
import os
import signal
import threading
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_fusion_jax import Anderson, DEQFusion, Picard, spectral_radius
from deq_fusion_jax.baselines import WeightTied
from deq_fusion_jax.cell import FusionCell, FusionState, as_map
from deq_fusion_jax.injection import Inject
from experiments import ablation
from experiments.common.lock import folder_alone
from experiments.models.variants import REFERENCE, VARIANTS
from experiments.reporting.ablation import ablation_table
from experiments.reporting.figures import ablation as drawn
from tests.test_multiomics import write_rosmap

NAMES = [variant.name for part in VARIANTS.values() for variant in part]
BASE = DEQFusion(32, solver=Picard(tol=1e-5, max_steps=500))  # compiles fastest
X = {name: jax.random.normal(jax.random.key(i), (5, 32)) for i, name in enumerate(("a", "b", "c"))}


def variant(name):
    (found,) = (v for part in VARIANTS.values() for v in part if v.name == name)
    return found


def applied(fusion, **rngs):
    params = jax.jit(fusion.init)(jax.random.key(9), X)
    return params, jax.jit(partial(fusion.apply, rngs=rngs))(params, X)


class TestVariants:
    def test_without_f_i_the_modalities_are_what_is_injected(self):
        _, out = applied(variant("without f_i").fusion(BASE))
        whole = BASE.apply(applied(BASE)[0], X)
        for name, x in X.items():  # at unit scale, lifted to √(r² + 2²)
            r2 = jnp.mean(x**2, axis=1, keepdims=True)
            expected = x * jnp.sqrt(1 + 4 / r2)
            np.testing.assert_allclose(out.modalities[name], expected, rtol=1e-4, atol=1e-5)
        assert float(jnp.abs(out.fused - whole.fused).max()) > 0.01
        assert out.stats.converged.all()

    def test_without_f_fuse_the_fused_state_is_the_sum(self):
        params, whole = applied(BASE)
        out = variant("without f_fuse").fusion(BASE).apply(params, X)
        for name in X:
            np.testing.assert_allclose(out.modalities[name], whole.modalities[name], atol=1e-4)
        np.testing.assert_allclose(out.fused, sum(out.modalities.values()), atol=1e-4)
        assert out.stats.converged.all()

    @pytest.mark.parametrize("name", ["without f_i", "without f_fuse"])
    def test_both_schedules_find_the_same(self, name):
        fusion = variant(name).fusion(BASE)
        params, staged = applied(fusion)
        joint = jax.jit(fusion.clone(schedule="joint").apply)(params, X)
        np.testing.assert_allclose(staged.fused, joint.fused, atol=1e-3)

    def test_an_unroll_is_the_same_cell(self):
        fusion = BASE.clone(gate_scale=0.5, groups=2)
        for steps in (1, 50):
            tied = variant(f"weight-tied, {steps} step{'s' * (steps > 1)}").fusion(fusion)
            assert isinstance(tied, WeightTied) and tied.steps == steps
            assert (tied.gate_scale, tied.groups, tied.tol) == (0.5, 2, 1e-5)
        params, out = applied(tied.clone(steps=500))
        np.testing.assert_allclose(out.fused, fusion.apply(params, X).fused, atol=1e-3)

    def test_each_of_the_others_changes_what_it_says(self):
        picard = variant("Picard").fusion(BASE.clone(solver=Anderson(tol=1e-5, max_steps=500)))
        assert picard == BASE
        official = variant("official initialisation").fusion(BASE)
        start = DEQFusion.official(32)
        names = ("gate_scale", "residual_scale", "lift")
        assert [getattr(official, n) for n in names] == [getattr(start, n) for n in names]
        assert variant("Jacobian weight 20").config == {"jacobian_weight": 20.0}
        assert len(set(NAMES)) == len(NAMES) and REFERENCE.fusion(BASE) is BASE


def test_the_spectral_radius_of_a_fusion_is_that_of_its_map():
    """Where the modalities are at rest, the radius of the whole map by its dense Jacobian."""
    params, out = applied(BASE, radius=jax.random.key(3))
    assert applied(BASE)[1].spectral_radius is None and out.spectral_radius.shape == (5,)
    injection = Inject(32).apply({"params": params["params"]["inject"]}, X)
    cell, state = FusionCell(("a", "b", "c"), 32), FusionState(out.modalities, out.fused)
    variables = {"params": params["params"]["cell"]}
    radius = spectral_radius(as_map(cell), state, variables, injection, key=jax.random.key(5))
    np.testing.assert_allclose(out.spectral_radius, radius, rtol=0.2)


@pytest.fixture
def main(run_command):
    return partial(run_command, ablation.main)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rosmap(tmp_path_factory.mktemp("ablation") / "data")


@pytest.mark.slow
def test_a_run_is_measured_and_goes_on(main, data, tmp_path):
    folder = tmp_path / "ablation"

    def run(seeds, *more):
        return main(
            "multiomics", "--data-dir", data, "--cache-dir", tmp_path / "cache", "--features", 8,
            "--epochs", 4, "--evaluate-every", 2, "--run-dir", folder, "--seeds", seeds, *more,
            "--no-refit", "--jacobian-weight", 0, "--parts",
        )  # fmt: skip

    status, out, err = run(2)
    assert status == 0 and "variants of DEQ fusion" in out, err
    row, second = json.loads((folder / "ablation.json").read_text())["rows"]
    assert (row["variant"], row["seed"], second["seed"]) == ("DEQ", 0, 1)
    assert set(row["metrics"]) == {"accuracy", "f1", "auc"} and row["data"] == "ROSMAP"
    assert set(row["without"]) == {"mRNA", "methylation", "miRNA"}
    assert row["cost"]["ms_per_step"] > 0 and row["cost"]["temporaries_mb"] > 0
    assert 0 <= row["converged"] <= 1 and 0 < row["spectral_radius"] < 10 and row["deep"] is None
    assert (folder / "ablation.png").exists() and (folder / "ablation.md").exists()
    assert run(2)[0] == 0  # both are there
    assert json.loads((folder / "ablation.json").read_text())["rows"] == [row, second]
    status, _, err = run(2, "--learning-rate", 0.5)
    assert status == 2 and "other options" in err and err.count("\n") == 1

    def send():
        while len(json.loads((folder / "ablation.json").read_text())["rows"]) < 4:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    status, _, err = run(500)
    sender.join()
    rows = json.loads((folder / "ablation.json").read_text())["rows"]
    assert status == 143 and rows[:2] == [row, second] and 4 <= len(rows) < 500
    assert "stopping: after this epoch, and what is trained is saved;" in err
    end = f"stopped: {len(rows)} of 500 trainings are saved; the same command with --run-dir "
    assert err.endswith(f"{end}{folder} goes on\n")


def test_the_second_ablation_in_a_folder_is_refused(main, tmp_path):
    with folder_alone(tmp_path, tmp_path):
        status, _, err = main("multiomics", "--sample", "--run-dir", tmp_path)
    assert status == 2 and f"{tmp_path} is in use by process" in err and err.count("\n") == 1


def made_up(name, seed, deep=None):
    return {
        "variant": name,
        "seed": seed,
        "metrics": {"accuracy": 0.5 + 0.1 * seed, "auc": 0.25},
        "converged": 0.5,
        "data": "ROSMAP sample (synthetic)",
        "steps": 3.0,
        "spectral_radius": 0.75,
        "without": {"a": {"accuracy": 0.1, "auc": 0.2}, "b": {"accuracy": 0.3, "auc": 0.4}},
        "deep": deep and {"metrics": {"accuracy": 0.4, "auc": 0.125}, "converged": 0.999},
        "cost": None if seed else {"ms_per_step": 12.34, "temporaries_mb": 5.0},
    }


ROWS = [made_up(name, seed, "steps" in name) for name in ("DEQ", *NAMES) for seed in (0, 1)]


def test_the_table_has_every_variant_once_and_its_numbers():
    table = ablation_table(ROWS, "title", "refit")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert "\nROSMAP sample (synthetic), test scores, mean ± standard deviation" in table
    assert ["DEQ", "0.550 ± 0.071", "0.250 ± 0.000"] in cells
    assert ["weight-tied, 2 steps", "50.0 %", "3.0", "0.75", "12.3", "5.0"] in cells
    assert ["weight-tied, 2 steps", "0.400 ± 0.000", "0.125 ± 0.000", "99.9 %"] in cells
    assert ["DEQ", "0.250 ± 0.000", "0.200 ± 0.000", "0.400 ± 0.000"] in cells
    assert all(len(line) <= 80 for line in table.splitlines() if line.startswith("|"))


def test_the_picture_has_a_point_and_a_bar_for_every_variant():
    spreads = {"auc": {name: {"mean": 0.5, "std": 0.1} for name in ("DEQ", "Picard")}}
    (panel,) = drawn(spreads).axes
    assert [label.get_text() for label in panel.get_yticklabels()] == ["DEQ", "Picard"]
    assert panel.get_xlabel() == "auc, test"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["nothing"], "invalid choice: 'nothing'"),
        (["multiomics", "--seeds", "0"], "--seeds 0"),
        (["multiomics", "--seed", "3"], "--seed is set by"),
        (["multiomics", "--parts", "wings"], "invalid choice: 'wings'"),
        (["multiomics", "--nope"], "--nope"),
        (["multiomics", "--sample", "--parallel", "devices"], "--parallel devices: expected none"),
    ],
)
def test_bad_options(main, words, complaint):
    status, _, err = main(*words)
    assert status == 2 and complaint in err and err.count("\n") == 1
