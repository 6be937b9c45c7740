"""The reference that `pdoc` renders: every public name, no name of Flax's, formulas as formulas."""

import html
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import deq_fusion_jax
from deq_fusion_jax import baselines, official, token_baselines

ROOT = Path(__file__).resolve().parents[1]
COMMAND = (
    "python -m pdoc -d google --math -t .ci/pdoc -o runs/api "
    "deq_fusion_jax deq_fusion_jax.baselines deq_fusion_jax.token_baselines deq_fusion_jax.official"
)
MODULES = (deq_fusion_jax, baselines, token_baselines, official)
WITH_FORMULAS = {
    deq_fusion_jax: [
        *("Anderson", "Broyden", "Picard", "Implicit", "Phantom", "Unrolled"),
        *("DEQFusion", "FusionCell", "deq_fixed_point", "jacobian_penalty", "spectral_radius"),
        *("TokenFusion", "coupling"),
    ],
    baselines: ["Attention", "Concat", "GMU", "LowRank", "Sum", "Unimodal", "WeightTied"],
    token_baselines: ["CrossAttention", "TokensUnrolled"],
    official: [],
}
FLAX = {"parent", "name", "scope", "setup", "copy", "clone", "apply", "init", "bind", "variables"}

each_module = pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """{module: html}, rendered once."""
    out = tmp_path_factory.mktemp("api")
    words = shlex.split(COMMAND.replace("runs/api", shlex.quote(str(out))))
    done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    paths = {module: out / f"{module.__name__.replace('.', '/')}.html" for module in MODULES}
    return {module: path.read_text(encoding="utf-8") for module, path in paths.items()}


def navigation(page):
    return page.split("<nav", 1)[1].split("</nav>", 1)[0]


def sections(page):
    """{public name: its part of the page}."""
    _, *parts = page.split("</main>", 1)[0].split('<section id="')
    return {part.split('"', 1)[0]: part for part in parts}


def docstrings(page):
    """Those of a page or a part of it, without their code: the text that MathJax gets to see."""
    main = page.split("</main>", 1)[0]
    found = re.findall(r'<div class="docstring">(.*?)</div>\n', main, re.DOTALL)
    return [re.sub(r"<(pre|code)\b.*?</\1>", "", one, flags=re.DOTALL) for one in found]


def formulas(text):
    """(displayed, inline) formulas; a dollar that is left over is an error."""
    displayed, inline = r"\$\$(.+?)\$\$", r"\$([^$]+)\$"
    rest = re.sub(displayed, "", text, flags=re.DOTALL)
    assert "$" not in re.sub(inline, "", rest), text
    return re.findall(displayed, text, re.DOTALL), re.findall(inline, rest)


def test_readme_shows_the_command():
    assert COMMAND in (ROOT / "README.md").read_text(encoding="utf-8")


@each_module
def test_every_public_name_has_a_section_with_a_docstring(pages, module):
    found = sections(pages[module])
    assert set(found) == set(module.__all__)
    assert [name for name, part in found.items() if not docstrings(part)] == []
    assert all(f'href="#{name}"' in navigation(pages[module]) for name in found)


@pytest.mark.parametrize(
    ("module", "parts"),
    [(baselines, {"ConcatDense"}), (token_baselines, {"Add"}), (official, set())],
)
def test_what_a_module_defines_is_public_or_a_part_of_it(module, parts):
    named = {k: getattr(x, "__module__", None) for k, x in vars(module).items() if k[0] != "_"}
    own = {name for name, home in named.items() if home == module.__name__}
    assert own - parts == set(module.__all__) - {"FUSIONS", "TOKEN_FUSIONS"}


def test_the_package_leads_to_its_modules(pages):
    side = navigation(pages[deq_fusion_jax])
    for module in MODULES[1:]:
        assert f'href="{module.__name__.replace(".", "/")}.html"' in side


@each_module
def test_the_side_lists_no_name_of_flax(pages, module):
    listed = re.findall(r'href="#([\w.]+)"', navigation(pages[module]))
    assert listed and not FLAX & {name.split(".")[-1] for name in listed}
    for owner, name in (one.split(".") for one in listed if "." in one):
        assert name == "__init__" or getattr(vars(getattr(module, owner))[name], "__doc__", None)
    assert "_Sentinel" not in pages[module]  # the default of Flax's `parent`


@each_module
def test_links_within_a_page_lead_somewhere(pages, module):
    ids = set(re.findall(r' id="([^"]+)"', pages[module]))
    assert set(re.findall(r' href="#([^"]+)"', pages[module])) <= ids


@each_module
def test_formulas_reach_the_page_as_they_are(pages, module):
    """Nothing in them is Markdown, and none has lost a backslash or a star on the way."""
    assert "MathJax" in pages[module]
    assert [one for one in docstrings(pages[module]) if "<em>" in one] == []
    for name, part in sections(pages[module]).items():
        shown = [html.unescape(one) for one in docstrings(part)]
        if not name.endswith("FUSIONS"):
            assert formulas(inspect.getdoc(getattr(module, name))) == formulas(shown[0]), name
        for formula in (one for text in shown for kind in formulas(text) for one in kind):
            assert formula.count("{") == formula.count("}") and "<" not in formula, formula


@each_module
def test_the_main_formulas_are_displayed(pages, module):
    found = sections(pages[module])
    for name in WITH_FORMULAS[module]:
        displayed, _ = formulas(docstrings(found[name])[0])
        assert displayed, name
