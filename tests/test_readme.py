"""What README says runs: its snippets, its commands, its files."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from experiments.errors import InputError
from experiments.readme import insert, update

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = sorted(set(re.findall(r"python (-m experiments\.[^`\n]*)", README)))


def test_snippets_run():
    """One after the other, as a reader types them."""
    names = {"__name__": "readme"}
    for snippet in SNIPPETS:
        exec(compile(snippet, "README.md", "exec"), names)


def test_there_are_snippets_and_commands():
    assert len(SNIPPETS) == 3 and len(COMMANDS) >= 5


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command, tmp_path, monkeypatch):
    """Every option that README shows exists; nothing is run."""
    monkeypatch.chdir(tmp_path)
    _, module, *arguments = shlex.split(command.replace("DIR", "somewhere"))
    for name in arguments:
        if name.endswith((".npz", ".csv")):
            Path(name).touch()
    experiment = importlib.import_module(module)
    if module in ("experiments.compare", "experiments.ablation"):
        options, arguments = experiment.parse_args(arguments)
        experiment = importlib.import_module(f"experiments.{options.experiment}")
    if module != "experiments.readme":
        experiment.parse_args(arguments)


def test_set_up_is_one_line_each():
    lines = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert [line.split(" -m ")[-1] for line in lines] == ["experiments.mmimdb", "pytest -n 2"]


def test_files_named_exist():
    for name in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"^\| `(\w+\.py)`", README, re.MULTILINE):
        assert (ROOT / "deq_fusion_jax" / name).exists(), name


def test_insert_replaces_between_the_marks_only():
    text = "a\n<!-- begin t -->\nold\n<!-- end t -->\nb\n"
    once = insert(text, "t", "# Title\n\n| new |\n")
    assert once == "a\n<!-- begin t -->\n| new |\n<!-- end t -->\nb\n"
    assert insert(once, "t", "| new |") == once


def test_insert_needs_marks_and_files(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("nothing\n")
    table = tmp_path / "table.md"
    table.write_text("| x |\n")
    for arguments, message in (
        ([], "nothing to insert"),
        ([f"t={table}"], "no marks"),
        ([f"t={tmp_path / 'missing.md'}"], "No such file"),
    ):
        with pytest.raises(InputError, match=message):
            update(arguments, readme)
    assert readme.read_text() == "nothing\n"
