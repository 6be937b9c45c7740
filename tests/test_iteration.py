"""`experiments.benchmarks.iteration`: its paired differences and worst epochs, and a run of it."""

import json

import pytest
from scipy.stats import sem

from experiments.benchmarks import iteration
from experiments.common.errors import InputError


def row(converged=None, backward=1.0, validation=1.0):
    if converged is None:
        return {"train": {}, "solver": None}
    train = {"converged": converged, "backward_converged": backward}
    return {"train": train, "solver": {"converged": validation}}


def found(variant, seed, score, *history):
    results = {
        "seed": seed,
        "test": {"accuracy": score},
        "validation": {"accuracy": score - 0.1},
        "solver": {"mean_steps": 7.0} if history else None,
        "parameters": 1000,
        "seconds": 3.0,
    }
    return {"variant": variant, "results": results, "history": history or [row()]}


def test_the_table_pairs_seeds_and_tells_the_worst_epoch():
    start = {"train": {}, "solver": {"converged": 0.1}}  # nothing has been trained yet
    history = [row(), start, row(0.999, 0.9), row(0.75, 1.0, 0.985)]
    runs = [found("equilibrium", seed, score, *history) for seed, score in enumerate([0.8, 0.9])]
    runs += [found("its map once", seed, score) for seed, score in ((1, 0.7), (0, 0.9), (2, 0.1))]
    lines = [line.split(" | ") for line in iteration.table(runs, "accuracy").splitlines()]
    equilibrium, once = lines[2], lines[3]
    assert "75.0 % / 90.0 % / 98.5 %" in equilibrium[5] and equilibrium[4].strip() == "–"
    assert equilibrium[6].strip() == "7.0" and once[5].strip() == once[6].strip() == "–"
    differences = [0.9 - 0.8, 0.7 - 0.9]  # seed 2 has no other run
    assert once[4].strip() == f"{sum(differences) / 2:+.3f} ± {sem(differences):.3f}"
    assert once[1].strip() == "3"
    assert equilibrium[2].strip() == "0.750 ± 0.071" and equilibrium[3].strip() == "0.850 ± 0.071"


def test_one_seed_has_no_standard_error():
    runs = [found("equilibrium", 0, 0.8), found("its map once", 0, 0.9)]
    assert iteration.paired(runs, "equilibrium", "its map once", "accuracy") == "–"


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["nothing"], "invalid choice: 'nothing'"),
        (["vqa", "--seeds", "0"], "--seeds 0: at least 1 is needed"),
        (["vqa", "--variants", "magic"], "invalid choice: 'magic'"),
        (["vqa", "--seed", "3"], "--seed is set by"),
        ([], "the following arguments are required: experiment"),
    ],
)
def test_what_cannot_be_used_is_refused(args, complaint):
    with pytest.raises(InputError, match=complaint):
        iteration.parse_args(args)


def test_a_variant_that_the_experiment_lacks_is_refused_before_any_run(run_command, tmp_path):
    status, _, err = run_command(iteration.main, "relations", "--run-dir", tmp_path)
    assert status == 2 and "--place" in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_stages_need_weights_to_start_from(run_command, tmp_path):
    args = "vqa", "--run-dir", tmp_path, "--epochs", 5, "--then", "--epochs", 9
    status, _, err = run_command(iteration.main, *args)
    assert status == 2 and "--then needs --start, which vqa does not have" in err


def test_a_stage_has_the_options_of_the_first_one_and_its_own():
    words = "relations --seeds 2 --deepest 1 --train 60 --then --deepest 2 --then --train 9"
    options = iteration.parse_args(words.split())
    stages = iteration.stages_of(options, "its map once")
    assert [(stage.deepest, stage.train) for stage in stages] == [(1, 60), (2, 60), (1, 9)]
    assert all(stage.fusion == "tokens_unrolled" for stage in stages)


def test_the_first_stages_may_be_those_of_another_variant():
    words = "relations,--begin,its map 3 times,--deepest,1,--then,--deepest,2"
    options = iteration.parse_args(words.split(","))
    first, last = iteration.stages_of(options, "equilibrium")
    assert (first.fusion, first.unroll_steps, last.fusion) == ("tokens_unrolled", 3, "tokens")
    first, last = iteration.stages_of(options, "cross-attention")
    assert first.fusion == last.fusion == "cross_attention"


def test_parts_are_told_apart():
    kinds = {"accuracy": 0.5, "yes/no": 0.8, "shape": 0.2}
    runs = [found("equilibrium", seed, 0.5) for seed in range(2)]
    runs[1]["results"]["test"] = runs[0]["results"]["test"] = kinds
    lines = iteration.parts_table(runs, lambda results: results["test"]).splitlines()
    assert lines[0].split(" | ")[2].strip() == "yes/no" and "0.800 ± 0.000" in lines[2]
    assert iteration.parts_table(runs, lambda results: {"accuracy": 0.5}) is None
    solver = {"mean_steps": 7.0, "mean_steps, depth 1": 6.0, "converged, depth 1": 1.0}
    assert iteration.steps_by_part({"fusion": "tokens", "solver": solver}) == {"depth 1": 6.0}
    assert iteration.steps_by_part({"fusion": "tokens_unrolled", "solver": solver}) == {}


@pytest.mark.slow
def test_a_run_of_it(run_command, tmp_path):
    args = [
        "relations", "--seeds", 1, "--run-dir", tmp_path, "--variants", "equilibrium",
        "its map 3 times", "--train", 60, "--validation", 12, "--test", 12,
        "--epochs", 1, "--features", 8, "--deepest", 1, "--then", "--deepest", 3,
    ]  # fmt: skip
    status, out, err = run_command(iteration.main, *args)
    assert status == 0, err
    again = run_command(iteration.main, *args)
    table = (tmp_path / "iteration.md").read_text()
    assert again[0] == 0 and table in again[1] and table in out
    runs = json.loads((tmp_path / "iteration.json").read_text())
    assert [run["results"]["seed"] for run in runs] == [0, 0]
    assert all(len(run["history"]) == 2 for run in runs)
    saved = json.loads((tmp_path / "equilibrium-seed-0-stage-2" / "config.json").read_text())
    config = saved["config"]
    assert config["deepest"] == 3 and config["epochs"] == 1
    assert config["start"].endswith("equilibrium-seed-0-stage-1")
    assert "depth 3" in table and "Steps of the solver" in table
