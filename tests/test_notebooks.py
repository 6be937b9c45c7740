"""Every notebook runs from top to bottom, uses public names only, and carries its outputs.

The cells are plain Python, without IPython magics.
"""

import ast
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import deq_fusion_jax

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
DOCUMENTED_MODULES = {
    f"deq_fusion_jax.{name}" for name in ("baselines", "token_baselines", "official")
}
MACHINE_PATH = re.compile(
    r"(?<![\w.:/])/(home|Users|root|tmp|work|usr|opt|var|mnt|media|srv|content)/|\b[A-Z]:\\"
)

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def private_imports(source):
    """What `source` imports of the library beside its public names and documented modules."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] == "deq_fusion_jax"]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("deq_fusion_jax"):
            names = {alias.name for alias in node.names}
            if node.module == "deq_fusion_jax":
                private = names - set(deq_fusion_jax.__all__)
            elif node.module in DOCUMENTED_MODULES:
                private = {name for name in names if name.startswith(("_", "*"))}
            else:
                private = names
            found += [f"{node.module}.{name}" for name in sorted(private)]
    return found


def texts(output):
    """The readable parts of an output: streams, tracebacks and data other than images."""
    yield output.get("text", "")
    yield "\n".join(output.get("traceback", []))
    for kind, data in output.get("data", {}).items():
        if not kind.startswith("image/"):
            yield data if isinstance(data, str) else repr(data)


def problems(notebook):
    """Cells that failed or wrote to stderr."""
    for cell in code_cells(notebook):
        for output in cell.outputs:
            if output.output_type == "error" or output.get("name") == "stderr":
                yield "\n".join([cell.source, *texts(output)])


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from deq_fusion_jax import Anderson, deq_fixed_point", []),
        ("from deq_fusion_jax.official import params_from_official", []),
        ("from deq_fusion_jax import solvers", ["deq_fusion_jax.solvers"]),
        ("from deq_fusion_jax import *", ["deq_fusion_jax.*"]),
        ("from deq_fusion_jax.solvers import Anderson", ["deq_fusion_jax.solvers.Anderson"]),
        ("import deq_fusion_jax.solvers as s", ["deq_fusion_jax.solvers"]),
    ],
)
def test_private_imports_are_found(source, found):
    assert private_imports(source) == found


@each_notebook
def test_imports_public_names_only(path):
    cells = code_cells(nbformat.read(path, as_version=4))
    assert [name for cell in cells for name in private_imports(cell.source)] == []


@each_notebook
def test_is_committed_as_one_clean_run(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any(cell.outputs for cell in cells)
    assert list(problems(notebook)) == []
    assert not any("execution" in cell.metadata for cell in cells), "timing metadata"


@each_notebook
def test_every_picture_has_a_text_in_its_place(path):
    notebook = nbformat.read(path, as_version=4)
    outputs = [out for cell in code_cells(notebook) for out in cell.outputs]
    drawn = [
        out.metadata.get(kind, {}).get("alt", "")
        for out in outputs
        for kind in out.get("data", {})
        if kind.startswith("image/")
    ]
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert "<img" not in prose
    linked = re.findall(r"!\[(.*?)\]", prose, re.DOTALL)
    assert drawn and [text for text in drawn + linked if len(text.split()) < 5] == []


@each_notebook
def test_outputs_name_no_path_of_a_machine(path):
    notebook = nbformat.read(path, as_version=4)
    shown = [text for cell in code_cells(notebook) for out in cell.outputs for text in texts(out)]
    assert [text for text in shown if MACHINE_PATH.search(text)] == []


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_runs(path, tmp_path, monkeypatch):
    """In an empty directory, on this checkout of the library, with warnings as errors."""
    inherited = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *inherited]))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))  # no start-up files of the user's
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # half of the time is compilation
    notebook = nbformat.read(path, as_version=4)
    # Not by PYTHONWARNINGS, which would judge the imports of the kernel itself.
    strict = "import warnings\n\nwarnings.simplefilter('error')"
    origin = f"import deq_fusion_jax\n\nassert deq_fusion_jax.__file__.startswith({str(ROOT)!r})"
    preamble = [nbformat.v4.new_code_cell(source) for source in (strict, origin)]
    notebook.cells = [*preamble, *notebook.cells]
    workplace = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(
        notebook, timeout=600, startup_timeout=120, kernel_name="python3", resources=workplace
    ).execute()
    assert list(problems(notebook)) == []
