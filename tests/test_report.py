"""What a run writes for people: complete, aligned, what went wrong first; and strict JSON."""

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from experiments.common.errors import InputError
from experiments.common.files import config_to_dict, versions, write_json, write_text
from experiments.common.text import markdown_table, number, percent
from experiments.reporting.comparison import comparison_table
from experiments.reporting.run import print_results, report_markdown
from experiments.reporting.terminal import show
from experiments.training.results import compare_rows

ROOT = Path(__file__).parents[1]

SOLVER = {"converged": 0.9996, "mean_steps": 14.25, "residual": 8.1e-5}
PER_CLASS = {
    "Drama": {"f1": 0.74, "support": 4142},
    "War": {"f1": 0.31, "support": 77},
    "[b]News": {"f1": 0.0, "support": 9},
    "Empty": {"f1": 0.0, "support": 0},
}
FLOORS = {"floor: frequent genres": {"micro_f1": 0.41, "macro_f1": 0.03}}


def row(fusion="deq", seed=0, **changes):
    rng = np.random.default_rng(seed + len(fusion))
    metrics = ("micro_f1", "macro_f1", "weighted_f1", "samples_f1")
    return {
        "experiment": "mmimdb",
        "dataset": "MM-IMDB",
        "data": "real",
        "fusion": fusion,
        "seed": seed,
        "selection": "validation",
        "test": {name: float(rng.random()) for name in metrics},
        "validation": {name: float(rng.random()) for name in metrics},
        "classes": PER_CLASS,
        "floors": FLOORS,
        "solver": SOLVER if fusion == "deq" else None,
        "parameters": 9_876_543,
        "seconds": 61.5 + seed,
        **changes,
    }


def printed(*args, **kwargs):
    console = Console(file=io.StringIO(), width=80)
    print_results(*args, console=console, **kwargs)
    return console.file.getvalue()


def table_lines(markdown):
    return [line for line in markdown.splitlines() if line.startswith("|")]


def assert_tables_align(markdown):
    blocks = [b.splitlines() for b in markdown.split("\n\n") if b.startswith("|")]
    assert blocks
    for block in blocks:
        bars = {tuple(i for i, c in enumerate(line) if c == "|") for line in block}
        assert len(bars) == 1


# Files


def test_write_json_is_strict_whole_and_repeatable(tmp_path):
    path = tmp_path / "run" / "results.json"
    value = {"auc": float("nan"), "low": -np.inf, "mean": np.float32(0.5), "n": np.int64(3)}
    for _ in range(2):
        write_json(path, {**value, "path": Path("a/b"), "steps": np.arange(2), "t": (1, True)})
    expected = {"auc": None, "low": None, "mean": 0.5, "n": 3}
    assert json.loads(path.read_text()) == {
        **expected,
        "path": "a/b",
        "steps": [0, 1],
        "t": [1, True],
    }
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_results_come_back_as_they_were(tmp_path):
    write_json(tmp_path / "results.json", row())
    assert json.loads((tmp_path / "results.json").read_text()) == row()


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "report.md"
    write_text(path, "old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_text(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@dataclasses.dataclass(frozen=True)
class Anderson:
    tol: float = 1e-4


@dataclasses.dataclass(frozen=True)
class Config:
    data_dir: Path | None = Path("data")
    hidden: tuple[int, ...] = (512, 512)
    solver: Anderson = Anderson()
    activation: object = np.tanh


def test_config_to_dict_is_json_and_names_nested_types():
    assert config_to_dict(Config()) == {
        "data_dir": "data",
        "hidden": [512, 512],
        "solver": {"type": "Anderson", "tol": 1e-4},
        "activation": "tanh",
    }


def test_versions_name_what_decides_the_numbers():
    found = versions()
    assert {"python", "jax", "flax", "optax", "jaxopt", "orbax-checkpoint", "device"} <= set(found)
    assert found["device"][0].isdigit()


# One run


def full_report(**changes):
    history = [
        {"epoch": 1, "loss": 0.4, "solver": {"converged": 1.0}},
        {"epoch": 2, "loss": float("nan"), "solver": {"converged": 0.87}},
    ]
    return report_markdown(
        row(**changes),
        config_to_dict(Config()),
        history,
        command="python -m experiments.mmimdb --seed 0",
        figures={"figures/learning_curve.png": "Loss and scores by epoch"},
        notes=["The audio of 3 clips was missing."],
    )


def test_report_holds_what_is_promised():
    text = full_report()
    for promised in [
        "# mmimdb: deq, seed 0, MM-IMDB data",
        "python -m experiments.mmimdb --seed 0",
        "best validation score",
        "| floor: frequent genres | ",
        "- Best classes by F1: Drama 0.740 (n=4142).",
        "- Worst classes by F1: [b]News 0.000 (n=9).",
        "- Solver: 99.9 % of the samples converged, 14.2 steps on average",
        "9,876,543 parameters",
        "![Loss and scores by epoch](figures/learning_curve.png)",
        "- The audio of 3 clips was missing.",
        "- 0.1 % of the samples did not converge in evaluation.",
        "- During training convergence was lowest in epoch 2: 87.0 %.",
        "- The loss was not finite in 1 epoch(s), the first 2.",
        "solver.type",
        "orbax-checkpoint",
    ]:
        assert promised in text, promised
    assert "synthetic" not in text and "nan" not in text.lower()
    assert_tables_align(text)


TROUBLED = [
    {"epoch": 0, "loss": None, "solver": {"converged": 1.0}, "train": {}},
    {
        "epoch": 1,
        "loss": 0.5,
        "solver": {"converged": 0.9},
        "train": {"backward_converged": 0.75, "bad_steps": 3.0},
    },
    {
        "epoch": 2,
        "loss": 0.4,
        "solver": {"converged": 1.0},
        "train": {"backward_converged": 1.0, "bad_steps": 0.0},
    },
]
WARNINGS = (
    "0.1 % of the samples did not converge in evaluation.",
    "During training convergence was lowest in epoch 1: 90.0 %.",
    "Convergence of the backward solves was lowest in epoch 1: 75.0 %.",
    "3 steps had no finite gradient, or inputs out of all range, and changed nothing.",
    "Test rows lack a modality.",
)
NOTES = ("Warning: Test rows lack a modality.", "The best epoch is 2.")


def test_warnings_stand_before_the_tables_and_notes_after_them():
    text = report_markdown(row(), {}, TROUBLED, command="x", notes=NOTES)
    before, after = text.split("## Results")
    assert all(f"\n- {warning}\n" in before for warning in WARNINGS)
    assert "- The best epoch is 2.\n" in after and "went wrong" not in text
    before, after = printed(row(), Path("run"), TROUBLED, NOTES).split("┏")
    said = " ".join(before.split("\n")[1:])
    assert said == " ".join(f"Warning: {warning}" for warning in WARNINGS) + " "
    assert "Warning" not in after


def test_synthetic_data_is_called_so_everywhere():
    sample = row(data="sample")
    assert "sample (synthetic)" in full_report(data="sample").splitlines()[0]
    assert "MM-IMDB data" not in full_report(data="sample")
    assert "sample (synthetic)" in printed(sample, Path("runs/a"))
    assert "sample (synthetic)" in comparison_table([sample]).splitlines()[0]


def test_a_run_selected_on_test_says_so():
    assert "best TEST score: optimistic, not a result" in full_report(selection="test")


def test_a_plain_fusion_without_history_reports_too():
    text = report_markdown(row("concat", classes=None), {}, command="python -m experiments.mmimdb")
    assert "Solver: none in this fusion." in text
    assert "Nothing went wrong that was looked for." in text
    assert "## Figures" not in text and "## Classes" not in text


def test_many_classes_show_both_ends():
    many = {f"answer {i}": {"f1": i / 100, "support": 5} for i in range(100)}
    text = report_markdown(row(classes=many), {}, command="x")
    assert "answer 99 " in text and "answer 0 " in text and "answer 50 " not in text


def test_terminal_output_fits_and_is_complete():
    text = printed(row(), Path("runs") / ("x" * 90))
    for promised in [
        "micro_f1",
        "macro_f1",
        "floor: frequent genres",
        "Drama 0.740",
        "[b]News",
        "14.2 steps",
        "did not converge",
        "Run directory: runs/" + "x" * 90,
    ]:
        assert promised in text, promised
    assert max(len(line) for line in text.splitlines() if "runs/" not in line) <= 80


def test_undefined_numbers_are_a_dash():
    undefined = {"accuracy": 1.0, "auc": float("nan")}
    text = printed(row(test=undefined, validation={"accuracy": 1.0, "auc": None}), Path("run"))
    assert "–" in text and "nan" not in text.lower() and "None" not in text
    assert "Not defined on this test set: auc." in text


# Several runs


def test_comparison_is_the_mean_and_sample_deviation():
    rows = [row(fusion, seed) for fusion in ("deq", "concat") for seed in range(5)]
    deq, concat = compare_rows(rows)
    for group in (deq, concat):
        mine = [r for r in rows if r["fusion"] == group["fusion"]]
        assert (group["n"], group["seeds"]) == (5, [0, 1, 2, 3, 4])
        for part in ("test", "validation"):
            for name, value in group[part].items():
                values = [r[part][name] for r in mine]
                assert value["mean"] == pytest.approx(np.mean(values))
                assert value["std"] == pytest.approx(np.std(values, ddof=1))
    assert deq["solver"]["mean_steps"] == {"mean": 14.25, "std": 0.0}
    assert concat["solver"] == {}
    assert concat["seconds"]["mean"] == 63.5
    json.dumps([deq, concat], allow_nan=False)


def test_comparison_table_shows_scores_and_costs():
    rows = [row(fusion, seed) for fusion in ("deq", "weight_tied") for seed in range(3)]
    text = comparison_table(rows)
    mean = np.mean([r["test"]["samples_f1"] for r in rows[:3]])
    std = np.std([r["test"]["samples_f1"] for r in rows[:3]], ddof=1)
    assert f"{mean:.3f} ± {std:.3f}" in text
    assert "ddof = 1" in text and "99.9 %" in text and "MM-IMDB data" in text
    assert_tables_align(text)
    costs = [line for line in table_lines(text) if "9,876,543" in line]
    assert len(costs) == 2 and costs[1].count("–") == 2


def test_one_seed_has_no_deviation_and_an_undefined_score_no_mean():
    group = compare_rows([row(test={"auc": None, "f1": 0.5})])[0]
    assert group["test"] == {
        "auc": {"mean": None, "std": None},
        "f1": {"mean": 0.5, "std": None},
    }
    text = comparison_table([row(test={"auc": None, "f1": 0.5})])
    assert "±" not in table_lines(text)[2] and "–" in table_lines(text)[2]


def test_floors_stand_below_the_fusions_once_a_seed():
    rows = [row(f, s, floors={"linear": {"micro_f1": 0.4 + s / 10}}) for f in "ab" for s in (0, 1)]
    table = table_lines(comparison_table(rows))
    assert table[4].split("|")[1:4] == [" linear ", "   2 ", " 0.450 ± 0.071 "]


def test_unequal_seeds_are_said():
    assert "not run with the same seeds" in comparison_table([row("deq", 0), row("concat", 1)])
    assert "same seeds" not in comparison_table([row("deq", 0), row("concat", 0)])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(), row("concat", data="sample")], "data real and sample cannot be compared"),
        ([row(), row("concat", selection="test")], "selection test and validation"),
        ([row(), row("concat", dataset="BRCA")], "dataset BRCA and MM-IMDB"),
        ([row(), row()], r"fusion deq has a seed twice in \[0, 0\]"),
        ([], "no results to compare"),
    ],
)
def test_rows_that_do_not_belong_together_are_refused(rows, message):
    with pytest.raises(InputError, match=message):
        comparison_table(rows)


# Text


def test_numbers_and_percentages():
    assert [number(x) for x in (None, float("nan"), 1234, 0.12345)] == ["–", "–", "1,234", "0.123"]
    shares = [percent(x) for x in (1, 0.9996, 0.993, 0.0001, 0, None)]
    assert shares == ["100.0 %", "99.9 %", "99.3 %", "0.1 %", "0.0 %", "–"]


WIDE = [["fusion", *(f"metric_{i}" for i in range(12))], ["a|b", *["0.123 ± 0.456"] * 12]]


def test_tables_of_a_file_are_whole_and_bars_escaped():
    text = markdown_table(WIDE)
    assert len(text.splitlines()) == 3 and r"a\|b" in text
    text = markdown_table([["血液", "n"], ["blood", "1"]])
    assert text.splitlines()[0] == "| 血液  |   n |"  # as wide on a terminal as "| blood |"


@pytest.mark.parametrize("width", [40, 80, 400])
def test_tables_on_a_terminal_are_as_wide_as_it_is(width):
    console = Console(file=io.StringIO(), width=width)
    show(f"# Title\n\n{markdown_table(WIDE)}\n\n![Curves](figures/a.png)\n", console)
    text = console.file.getvalue()
    lines = text.splitlines()
    heads = [line for line in lines if "fusion" in line]
    assert max(map(len, lines)) <= width and len(heads) == {40: 12, 80: 3, 400: 1}[width]
    assert all(f" metric_{i} " in text for i in range(12)) and text.count("0.123 ± 0.456") == 12
    assert "a|b" in text and "Curves: figures/a.png" in text


def test_what_an_encoding_lacks_is_no_traceback():
    """`errors` of a pipe's encoding, which a command sets as it begins."""
    code = (
        "from experiments.common.errors import exit_cleanly\n"
        "with exit_cleanly():\n"
        "    print('blood 血液 ±')\n"
    )
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=ascii_only, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "blood \\u8840\\u6db2 \\xb1\n", "")
