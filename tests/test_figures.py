"""Figures show the numbers they are given, with their axes named."""

import io

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from experiments.reporting.figures import (
    confusion,
    gate_strength,
    learning_curve,
    phase_portrait,
    planes,
    radii,
    residual_traces,
    residuals,
    solver_health,
    steps_by_radius,
    sweep,
)

NAN = np.nan
HISTORY = [
    {
        "epoch": epoch,
        "loss": 1 / epoch,
        "validation": {"f1": 0.5, "auc": None},
        "solver": {"converged": 1.0, "mean_steps": 9.5, "max_steps": 20, "residual": 1e-5},
    }
    for epoch in (1, 2, 3)
]


def labels(figure):
    figure.savefig(io.BytesIO(), format="png")  # everything is drawn, without a warning
    return [" ".join(axes.get_ylabel().split()) for axes in figure.axes]


def line(axes, label):
    (found,) = (line for line in axes.lines if line.get_label() == label)
    return found.get_xydata()


def test_learning_curve_has_solver_panels_only_with_a_solver():
    plain = [{**row, "solver": None} for row in HISTORY]
    assert labels(learning_curve(plain)) == ["loss", "validation score"]
    assert labels(learning_curve(HISTORY))[2:] == ["samples converged", "solver steps"]
    assert len(labels(learning_curve(HISTORY[:1]))) == 4


def test_solver_health_draws_both_directions():
    figure = solver_health(HISTORY)
    assert labels(figure) == ["solver steps", "solves converged"]
    assert [line.get_label() for line in figure.axes[0].lines] == ["mean", "slowest sample"]
    backward = {"backward_steps": 4.0, "backward_converged": 0.5}
    rows = [{**HISTORY[0], "epoch": 0, "train": {}}, {**HISTORY[0], "train": backward}]
    figure = solver_health(rows)
    labels(figure)
    for axes, forward, value in zip(figure.axes, (9.5, 1.0), backward.values(), strict=True):
        assert_array_equal(line(axes, "forward")[:, 1], [forward, forward])
        assert_array_equal(line(axes, "backward")[:, 1], [NAN, value])
    with pytest.raises(ValueError, match="solves nothing"):
        solver_health([{**HISTORY[0], "solver": None}])


def test_radii_are_counted_beside_one():
    figure = radii(np.array([0.5] * 30 + [1.2] * 10), "rows")
    assert labels(figure) == ["rows"]
    (axes,) = figure.axes
    below = sum(bar.get_height() for bar in axes.patches if bar.get_x() < 1)
    assert below == 30 and sum(bar.get_height() for bar in axes.patches) == 40
    assert_array_equal(line(axes, "ρ = 1")[:, 0], [1, 1])


def test_confusion_writes_counts_where_they_can_be_read():
    counts = np.array([[8, 2, 0], [0, 5, 0], [0, 0, 0]])
    figure = confusion(counts, ["a", "b", "a class with a very long name"])
    assert labels(figure)[:1] == ["true class"] and figure.axes[0].get_xlabel() == "predicted class"
    assert_array_equal(figure.axes[0].images[0].get_array(), [[0.8, 0.2, 0], [0, 1, 0], [0, 0, 0]])
    written = {text.get_position()[::-1]: text.get_text() for text in figure.axes[0].texts}
    assert written == {(0, 0): "8", (0, 1): "2", (1, 1): "5"}
    many = confusion(np.eye(100, dtype=int), [f"class {i}" for i in range(100)])
    labels(many)
    assert not many.axes[0].texts and max(many.get_size_inches()) < 9
    with pytest.raises(ValueError, match=r"\(3, 3\) of 2 classes"):
        confusion(counts, ["a", "b"])


def test_learning_curve_against_another_unit():
    rows = [{"step": 10 * i, "loss": 1.0, "solver": HISTORY[0]["solver"]} for i in (1, 2)]
    figure = learning_curve(rows, "step")
    assert labels(figure) == ["loss", "samples converged", "solver steps"]
    assert figure.axes[-1].get_xlabel() == "step"
    assert_array_equal(figure.axes[0].lines[0].get_xdata(), [10, 20])


def test_residual_traces_keep_the_last_value_of_a_finished_sample():
    trace = np.array([[1, 1, 1, 1], [1e-6, 0.5, np.inf, 0.5], [NAN, 0, 0.5, 0.2], [NAN] * 4])
    figure = residual_traces({"four": trace, "two": trace[:2, :2]}, tol=1e-4)
    assert labels(figure)[2] == "converged"
    assert [axes.get_title() for axes in figure.axes[:2]] == ["four", "two"]
    assert_array_equal(figure.axes[2].lines[0].get_ydata(), [0, 0.25, 0.5])
    assert_array_equal(figure.axes[3].lines[0].get_ydata(), [0, 0.5, 0.5])  # to the longest's end
    with pytest.raises(ValueError, match=r"\(2, 2\): expected \[steps, B\]"):
        residual_traces({"none": np.full((2, 2), NAN)}, tol=1e-4)


def test_residuals_end_where_the_solve_did():
    figure = residuals({"a": [1, 0.1, NAN], "b": [1, 0.5, 0.25]}, tol=0.1, rate=0.5)
    assert labels(figure) == ["relative residual"]
    assert_array_equal(line(figure.axes[0], "a"), [[1, 1], [2, 0.1]])
    assert_array_equal(line(figure.axes[0], "proportional to 0.50ᵏ")[:, 1], [0.5, 0.25, 0.125])


def test_phase_portrait_has_arrows_a_path_and_the_fixed_point():
    figure = phase_portrait(
        lambda z: z / 2, {"halving": [[1, 1], [0.5, 0.5]]}, [[0, 0]], ((-1, 1), (-2, 2))
    )
    assert labels(figure) == ["$z_2$"] and figure.axes[0].get_title() == "halving"
    (arrows,) = figure.axes[0].collections
    assert_allclose(np.stack([arrows.U, arrows.V], axis=1), -arrows.get_offsets() / 2)
    assert [len(line.get_xdata()) for line in figure.axes[0].lines] == [2, 1, 1]
    drawn = "Drawn: arrows f(z) − z; path; its start; fixed point."
    assert figure.alternative_text().endswith(f"Horizontal axis: z_1. {drawn}")


def test_steps_by_radius_draws_what_plain_iteration_needs():
    figure = steps_by_radius({"a": ([0.5, 1.2], [10, 50])}, tol=1e-3)
    assert labels(figure) == ["solver steps"]
    rho, steps = line(figure.axes[0], "ln tol / ln ρ").T
    assert_allclose(rho**steps, 1e-3)


def test_sweep_draws_medians_and_shares():
    values = np.arange(20.0).reshape(2, 10)
    figure = sweep(
        [1, 10], {"steps": {"a": values}, "share converged": {"a": [1, 0.5]}}, "s", log=["s"]
    )
    assert labels(figure) == ["steps", "share converged"]
    assert_array_equal(line(figure.axes[0], "a"), [[1, 4.5], [10, 14.5]])
    assert figure.axes[0].get_xscale() == "log" and figure.axes[0].get_yscale() == "linear"
    assert figure.axes[1].get_ylim()[1] > 1


def test_sweep_shares_an_axis_that_holds_every_panel():
    figure = sweep([1, 2], {"low": {"a": [1, 2]}, "high": {"a": [1, 9]}}, "x", ylabel="y")
    assert labels(figure) == ["y", ""]
    assert [axes.get_title() for axes in figure.axes] == ["low", "high"]
    assert figure.axes[0].get_ylim()[1] > 9 and figure.axes[0].get_ylim()[0] == 0


def test_a_notebook_shows_a_figure():
    curves = {"low": {"a": [1, 2], "b": [3, 4]}, "high": {"a": [8, 9]}}
    png, metadata = sweep([1, 2], curves, "x", ylabel="y")._repr_png_()
    assert png.startswith(b"\x89PNG")
    assert metadata == {
        "alt": "2 panels: low; high. Vertical axis: y. Horizontal axis: x. Drawn: a; b."
    }


def test_planes_show_every_sample_in_its_class():
    points, group = np.arange(12.0).reshape(6, 2), [0, 1, 0, 1, 1, 0]
    panels = {"before": (points, group), "after": (-points[:2], [1, 1])}
    figure = planes(panels, ["no", "yes"])
    assert labels(figure) == ["2nd direction", ""]
    assert_array_equal(line(figure.axes[0], "yes"), points[[1, 3, 4]])
    assert_array_equal(line(figure.axes[1], "yes"), -points[:2])
    figure = planes(panels, ["no", "yes"], {"A": points[2]})
    for axes in figure.axes:
        (mark,) = axes.texts
        assert mark.get_text() == "A" and tuple(mark.xy) == tuple(points[2])
    assert figure.alternative_text().endswith("Drawn: no; yes. Marked: A.")


def test_gate_strength_by_modality_and_class():
    gates = {"image": -np.ones((6, 2, 3)), "text": np.zeros(6)}
    figure = gate_strength(gates)
    assert labels(figure) == ["mean |gate| of a sample"]
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["image", "text"]
    figure = gate_strength(gates, [0, 0, 0, 2, 2, 2], ["a", "b", "c"])
    ticks = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    assert ticks == ["a\nn = 3", "c\nn = 3"]
    with pytest.raises(ValueError, match="same number of samples"):
        gate_strength({"image": np.ones(3), "text": np.ones(4)})
