"""report.html: what the Markdown says, all in one file; and several runs side by side."""

import base64
import html
import json
import re
from functools import partial
from html.parser import HTMLParser

import pytest
from PIL import Image

from experiments.common.page import page
from experiments.common.text import markdown_table, note
from experiments.report import main as report_main
from experiments.reporting.comparison import Run, side_by_side
from tests.test_report import assert_tables_align, row

TABLE = [["class", "F1"], ["a & b", "0.500"], ["<script>x</script>", "0.250"]]


class Reader(HTMLParser):
    """The cells, the images, and whether every element is closed in its turn."""

    VOID = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.cells, self.images, self.tags = [], [], [], set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


def test_a_note_breaks_between_words_alone():
    path = "/data/" + "long-folder/" * 9
    lines = note(f"{path} is on another disk, which is slower than all others we know").splitlines()
    assert lines[0] == "Note:" and lines[1] == f"      {path}"
    assert all(len(line) <= 80 for line in lines[2:])


def test_a_page_holds_tables_and_text_as_they_are(tmp_path):
    reader = Reader(page(f"# One & two\n\n{markdown_table(TABLE)}\n", tmp_path))
    assert reader.cells == [cell for line in TABLE for cell in line]
    assert "script" not in reader.tags


def test_a_page_carries_its_pictures_and_fetches_nothing(tmp_path):
    (tmp_path / "figures").mkdir()
    Image.new("RGB", (6, 4)).save(tmp_path / "figures" / "a.png")
    text = page('# T\n\n![Loss "by" epoch](figures/a.png)\n', tmp_path)
    (image,) = Reader(text).images
    data = image["src"].removeprefix("data:image/png;base64,")
    assert base64.b64decode(data) == (tmp_path / "figures" / "a.png").read_bytes()
    assert image["alt"] == 'Loss "by" epoch'
    assert (image["width"], image["height"]) == ("3", "2")  # two dots a pixel: sharp
    assert not re.search(r"https?:|src=\"(?!data:)|url\(", text)


def test_a_command_breaks_between_words_alone(tmp_path):
    """Browsers break at hyphens too, where nothing keeps them from it."""
    text = page("# T\n\n```\npython -m x --max-steps 3 <a&b>\n```\n", tmp_path)
    words = re.findall(r"<span>(.*?)</span>", text.split("<body>")[1])
    assert words == ["python", "-m", "x", "--max-steps", "3", "&lt;a&amp;b&gt;"]
    assert "pre span { white-space: nowrap; }" in text


def run(name, fusion="deq", seed=0, **config):
    history = [
        {"epoch": e, "loss": 1 / (e + 1), "validation": {"macro_f1": e / 4}, "solver": None}
        for e in range(3)
    ]
    options = {"fusion": fusion, "seed": seed, "run_dir": name, "solver": {"tol": 1e-3}, **config}
    return Run(
        name, options, f"python -m experiments.mmimdb --seed {seed}", row(fusion, seed), history
    )


def test_runs_side_by_side_name_what_differs_and_nothing_else():
    runs = [run("first"), run("second", "concat", 1, dropout=0.5)]
    text = side_by_side(runs, {"figures/a.png": "Curves"})
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    differ = cells[cells.index(["option", "first", "second"]) + 2 :]
    assert differ[: differ.index([])] == [
        ["fusion", "deq", "concat"],
        ["seed", "0", "1"],
        ["dropout", "–", "0.5"],
    ]
    scores = ["first", *(f"{row()['test'][m]:.3f}" for m in ("micro_f1", "macro_f1"))]
    assert any(line[:3] == scores for line in cells)
    assert ["Drama", "0.740", "0.740"] in cells
    assert "![Curves](figures/a.png)" in text and "--seed 1" in text
    assert_tables_align(text)


def tables(text):
    """The first line of every table, as cells."""
    heads = (block.splitlines()[0] for block in text.split("\n\n") if block.startswith("|"))
    return [[cell.strip() for cell in head.split("|")[1:-1]] for head in heads]


@pytest.mark.parametrize("number", [2, 5, 12])
def test_a_hash_takes_twelve_characters_and_many_runs_a_row_each(number):
    names = [f"{i:x}" * 64 for i in range(number)]
    text = side_by_side([run(name, seed=i, data_sha256=name) for i, name in enumerate(names)])
    assert not re.search(r"[0-9a-f]{13}", text)
    short = [name[:12] for name in names]
    differ = ["option", *short] if number == 2 else ["run", "seed", "data_sha256"]
    assert differ in tables(text) and ["class", *short] in tables(text)
    assert_tables_align(text)


def written(folder, fusion):
    found = run(folder.name, fusion)
    folder.mkdir()
    about = {"experiment": "mmimdb", "command": found.command, "config": found.config}
    (folder / "config.json").write_text(json.dumps(about))
    (folder / "results.json").write_text(json.dumps(found.results))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in found.history))
    return folder


@pytest.fixture
def main(run_command):
    return partial(run_command, report_main)


def test_the_command_writes_a_folder(main, tmp_path):
    runs = [written(tmp_path / name, name) for name in ("deq", "concat")]
    status, out, err = main(*runs, "--out", tmp_path / "both")
    assert (status, err) == (0, "") and "2 runs side by side" in out
    text = (tmp_path / "both" / "report.html").read_text(encoding="utf-8")
    assert len(Reader(text).images) == 1 and "concat" in html.unescape(text)
    assert (tmp_path / "both" / "report.md").exists()


def test_runs_of_one_name_are_told_apart(main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for parent in ("one", "two"):
        (tmp_path / parent).mkdir()
        written(tmp_path / parent / "deq", "deq")
    assert main("one/deq", "two/deq", "--out", "both")[0] == 0
    text = (tmp_path / "both" / "report.md").read_text(encoding="utf-8")
    assert "| one/deq " in text and "| two/deq " in text


def test_what_is_no_finished_run_is_refused(refuses, tmp_path):
    good = written(tmp_path / "good", "deq")
    refuses("no runs given")
    refuses("given twice", good, good)
    refuses("nowhere has no config.json", tmp_path / "nowhere")
    half = written(tmp_path / "half", "deq")
    (half / "results.json").unlink()
    refuses("half has no results.json", good, half)
    (half / "results.json").write_text('{"experiment": ')
    refuses("half cannot be read", half)
