"""`experiments.benchmarks.positions`: whose memory grows with what, and a run of it."""

import json

import pytest

from experiments.benchmarks import positions
from experiments.common.errors import InputError


@pytest.mark.slow
def test_memory_of_an_equilibrium_does_not_grow_with_its_steps(run_command, tmp_path):
    args = "--positions", 4, 8, "--features", 8, "--batch", 2, "--rounds", 1, "--run-dir", tmp_path
    status, out, err = run_command(positions.main, *args)
    assert status == 0, err
    assert (tmp_path / "positions.md").read_text() in out
    found = json.loads((tmp_path / "positions.json").read_text())
    rows = {(row["positions"], row["fusion"]): row for row in found["rows"]}
    loose, tight = rows[4, "equilibrium to 1e-02"], rows[4, "equilibrium to 1e-05"]
    assert tight["evaluations"] > loose["evaluations"] > 1
    assert tight["temporaries"] == loose["temporaries"]
    once, often = (rows[4, f"map {times}"]["temporaries"] for times in ("once", "10 times"))
    assert often > 3 * once
    assert rows[4, "map once"]["ratio"] == 1
    assert rows[8, "map once"]["temporaries"] > once


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["--rounds", "0"], "--rounds 0: expected 1 or more"),
        (["--positions", "4", "0"], "--positions 0: expected 1 or more"),
        (["--features", "6"], "--features 6: expected a multiple of the 4 heads"),
        (["--batch", "x"], "invalid int value"),
    ],
)
def test_what_cannot_be_used_is_refused(args, complaint):
    with pytest.raises(InputError, match=complaint):
        positions.parse_args(args)
