"""The shape of the code: imports run one way, functions are short, the wheel holds the library."""

import ast
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

from importlinter.cli import lint_imports

import deq_fusion_jax

ROOT = Path(__file__).resolve().parents[1]
CODE = (ROOT / "deq_fusion_jax", ROOT / "experiments")
LONGEST = 45  # lines of a function, less its docstring


def test_imports_run_one_way(monkeypatch):
    """The contracts of pyproject.toml."""
    monkeypatch.chdir(ROOT)
    assert lint_imports(no_cache=True) == 0


def functions(path):
    """(lines without the docstring, name) of every function of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            docstring = node.body[0] if ast.get_docstring(node) else None
            lines = node.end_lineno - node.lineno + 1
            lines -= docstring.end_lineno - docstring.lineno + 1 if docstring else 0
            yield lines, f"{path.relative_to(ROOT)}: {node.name}"


def test_functions_fit_in_the_head():
    found = [one for folder in CODE for path in folder.rglob("*.py") for one in functions(path)]
    assert len(found) > 500
    assert [name for lines, name in found if lines > LONGEST] == []


def test_version_is_that_of_the_citation():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {deq_fusion_jax.__version__}\n" in citation
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## {deq_fusion_jax.__version__}" in changes


def test_the_wheel_holds_the_library_alone(tmp_path):
    words = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    library = {f"deq_fusion_jax/{path.name}" for path in (ROOT / "deq_fusion_jax").glob("*.py")}
    library.add("deq_fusion_jax/py.typed")
    assert {name for name in names if ".dist-info/" not in name} == library
    assert any(name.endswith("/LICENSE") for name in names)
    done = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *map(str, tmp_path.iterdir())],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_clone_without_the_extra_says_which_one(tmp_path):
    """In an environment with nothing in it."""
    venv.create(tmp_path / "empty", with_pip=False)
    python = next((tmp_path / "empty").glob("[bS]*/python*"))
    words = [python, "-m", "experiments.mmimdb"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "pip install -e '.[experiments]'" in done.stderr and "optax" in done.stderr
    words = [python, "-c", "import experiments"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert "ModuleNotFoundError: the experiments need" in done.stderr


def test_every_extra_names_ranges():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [project["dependencies"], *project["optional-dependencies"].values()]
    names = [name for extra in extras for name in extra if not name.startswith("deq_fusion_jax")]
    assert all(re.search(r"[<>=]=?\d", name) for name in names)
