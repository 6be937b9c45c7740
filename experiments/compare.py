"""Several fusions, several seeds, one table.

    python -m experiments.compare mmimdb --fusions deq concat sum text image --seeds 5
    python -m experiments.compare multiomics --fusions deq concat --seeds 5 --data-dir DIR
    python -m experiments.compare features data.npz --fusions deq concat --seeds 5

Every run gets a directory of its own below the comparison's, which holds `compare.json` (the rows
of `results.json`, and mean and standard deviation over the seeds) and `compare.md`. Runs that are
there already, finished, are taken as they are; unfinished ones are resumed.
"""

import argparse
import dataclasses
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from deq_fusion_jax.baselines import FUSIONS
from experiments.common.cli import Parser
from experiments.common.errors import InputError, exit_cleanly
from experiments.common.files import write_json, write_text
from experiments.common.lock import folder_alone
from experiments.common.stopping import StoppedError
from experiments.reporting.comparison import comparison_table
from experiments.reporting.terminal import show
from experiments.run import EXPERIMENTS, experiment
from experiments.training.config import CommonConfig, build_fusion, require
from experiments.training.results import Results, compare_floors, compare_rows
from experiments.training.run_directory import finished


def parse_args(args: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The comparison's own options, and the rest, which are the experiment's."""
    description = "Trains several fusions with several seeds and prints one table."
    parser = Parser("compare", description, EXPERIMENTS)
    names = f"{', '.join(FUSIONS)}, or the name of one modality"
    parser.add_argument("--fusions", nargs="+", required=True, metavar="FUSION", help=names)
    return parser.own_and_rest(args)


def compare(options: argparse.Namespace, rest: list[str]) -> list[Results]:
    """Runs what is missing and returns all rows."""
    chosen = experiment(options.experiment)
    base: CommonConfig = chosen.parse_args(rest)
    alone = base.parallel != "processes"
    require(alone, "parallel", base.parallel, "none or devices; give processes to single runs")
    modalities = chosen.modalities(base)
    choices = {*FUSIONS, *modalities}
    if unknown := [name for name in options.fusions if name not in choices]:
        raise InputError(f"--fusions {' '.join(unknown)}: choose from {', '.join(sorted(choices))}")
    for fusion in options.fusions:
        build_fusion(dataclasses.replace(base, fusion=fusion), modalities)
    new = Path("runs/compare") / time.strftime("%Y%m%d-%H%M%S")
    with folder_alone(options.run_dir, new) as folder:
        rows = run_all(options, base, folder)
        groups = {"fusions": compare_rows(rows), "floors": compare_floors(rows)}
        write_json(folder / "compare.json", {"rows": rows, **groups})
        write_text(folder / "compare.md", comparison_table(rows))
    print(f"Folder: {folder}")
    return rows


def run_all(options: argparse.Namespace, base: CommonConfig, folder: Path) -> list[Results]:
    """The rows of the runs in the folder; runs what is missing.

    Raises:
      StoppedError: a run was stopped; it says how to go on with all of them.
    """
    chosen, rows = experiment(options.experiment), []
    for fusion in options.fusions:
        for seed in range(options.seeds):
            run_dir = folder / f"{fusion}-seed{seed}"
            there = (run_dir / "config.json").exists()
            changes = {"fusion": fusion, "seed": seed, "run_dir": run_dir, "resume": there}
            config = dataclasses.replace(base, **changes)
            try:
                rows.append(finished(options.experiment, config, run_dir) or chosen.run(config))
            except StoppedError as stopped:
                how = f"the same command with --run-dir {shlex.quote(str(folder))}"
                raise StoppedError(f"{run_dir}: {stopped.saved}", how, stopped.number) from None
        jax.clear_caches()  # compiled programs of a hundred runs are more than a process may map
    return rows


@exit_cleanly()
def main() -> None:
    options, rest = parse_args(sys.argv[1:])
    rows = compare(options, rest)
    show(comparison_table(rows))


if __name__ == "__main__":
    main()
