"""What README and the pages beside it say runs: snippets, commands, files."""

import ast
import dataclasses
import importlib
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

import deq_fusion_jax
from experiments.common.errors import InputError
from experiments.reporting import overview
from experiments.reporting.readme import PAGES, insert, up_to_first_table, update

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = sorted(set(re.findall(r"python (-m experiments\.[^`\n]*)", "".join(TEXTS.values()))))


def test_snippets_run():
    """One after the other, as a reader types them."""
    names = {"__name__": "readme"}
    for snippet in SNIPPETS:
        exec(compile(snippet, "README.md", "exec"), names)


def test_there_are_snippets_and_commands():
    assert len(SNIPPETS) == 5 and len(COMMANDS) >= 15


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command, tmp_path, monkeypatch):
    """Every option that README shows exists; nothing is run."""
    monkeypatch.chdir(tmp_path)
    words = command.replace("DIR", "somewhere").removesuffix('"')  # one handed to a launcher
    _, module, *arguments = shlex.split(words)
    for name in arguments:
        if name.endswith((".npz", ".csv")):
            Path(name).touch()
    experiment = importlib.import_module(module)
    if module in ("experiments.compare", "experiments.ablation"):
        options, arguments = experiment.parse_args(arguments)
        experiment = importlib.import_module(f"experiments.{options.experiment}")
    if module != "experiments.reporting.readme":
        experiment.parse_args(arguments)


@pytest.mark.parametrize("call", re.findall(r"`((?:[A-Z]\w+)\([^`)]*\))`", README))
def test_defaults_in_tables_are_the_defaults(call):
    """`Anderson(history=5, …)` in a table is what Anderson() is."""
    rule = eval(call, vars(deq_fusion_jax))
    assert rule == type(rule)()


def test_shared_options_of_solvers_are_all_listed():
    table = README.split("| option of all three |")[1].split("\n\n")[0]
    listed = re.findall(r"\| `(\w+)` \| (\S+) \|", table)
    shared = dataclasses.fields(deq_fusion_jax.Picard)
    assert [name for name, _ in listed] == [field.name for field in shared]
    assert [ast.literal_eval(value) for _, value in listed] == [f.default for f in shared]


def test_set_up_is_one_line_each():
    lines = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert [line.split(" -m ")[-1] for line in lines] == ["experiments.mmimdb", "pytest -n 2"]


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(((?!http)[^)]+)\)", TEXTS[page]):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in slugs, link


def test_files_and_rooms_are_all_listed():
    library, experiments = README.split("## Design")[1].split("The experiments, likewise")
    listed = re.findall(r"^\| `(\w+\.py)`", library, re.MULTILINE)
    there = {path.name for path in (ROOT / "deq_fusion_jax").glob("*.py")}
    assert set(listed) == there - {"__init__.py"}
    first_cells = re.findall(r"^\| (`[^|]*)\|", experiments.split("\n\n## ")[0], re.MULTILINE)
    listed = {name for cell in first_cells for name in re.findall(r"`([^`]+)`", cell)}
    files = {path.name for path in (ROOT / "experiments").glob("*.py")} - {"__init__.py"}
    rooms = {f"{path.parent.name}/" for path in (ROOT / "experiments").glob("*/__init__.py")}
    assert listed == files | rooms


def test_tables_of_readme_are_those_of_the_pages_it_links_to():
    pattern = r"<!-- begin (\w+): first table -->\n(.*?)\n<!-- end \1 -->"
    found = re.findall(pattern, README, re.DOTALL)
    assert len(found) == 4
    others = "".join(TEXTS[page] for page in PAGES[1:])
    for name, table in found:
        whole = re.search(f"<!-- begin {name} -->\n(.*?)\n<!-- end {name} -->", others, re.DOTALL)
        assert table == up_to_first_table(whole.group(1))


def test_the_picture_is_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    overview.main()
    assert "Picture: notebooks/overview.png" in capsys.readouterr().out
    with Image.open(tmp_path / "notebooks/overview.png") as picture:
        assert picture.width > 1000


def test_insert_replaces_between_the_marks_only():
    text = "a\n<!-- begin t -->\nold\n<!-- end t -->\nb\n"
    once = insert(text, "t", "# Title\n\n| new |\n")
    assert once == "a\n<!-- begin t -->\n| new |\n<!-- end t -->\nb\n"
    assert insert(once, "t", "| new |") == once


def test_insert_takes_the_first_table_where_the_marks_say_so():
    page = "<!-- begin t: first table -->\n<!-- end t -->"
    table = "# Title\n\nabout\n\n| a |\n| - |\n| 1 |\n\n| b |\n"
    assert "about\n\n| a |\n| - |\n| 1 |\n<!-- end" in insert(page, "t", table)


def test_insert_needs_marks_and_files(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("nothing\n")
    table = tmp_path / "table.md"
    table.write_text("| x |\n")
    for arguments, message in (
        ([], "nothing to insert"),
        ([f"t={table}"], "no page has marks for t"),
        ([f"t={tmp_path / 'missing.md'}"], "No such file"),
    ):
        with pytest.raises(InputError, match=message):
            update(arguments, [readme])
    assert readme.read_text() == "nothing\n"
