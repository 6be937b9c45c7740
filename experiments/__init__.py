"""What a user runs from a clone, `python -m experiments.NAME`; not in the installed package."""

import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path


def _not_installed() -> list[str]:
    """The packages that pyproject.toml names for the experiments and that are not here."""
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    needed = project["dependencies"] + project["optional-dependencies"]["experiments"]
    missing = []
    for name in (re.split(r"[^\w.-]", requirement, maxsplit=1)[0] for requirement in needed):
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
    return missing


if _missing := _not_installed():
    _message = (
        f"the experiments need packages that are not installed ({', '.join(_missing)}): run "
        "pip install -e '.[experiments]' in the project's top folder"
    )
    if sys.argv[:1] != ["-m"]:  # imported by a program, not run as a command
        raise ModuleNotFoundError(_message)
    print(f"error: {_message}", file=sys.stderr)
    raise SystemExit(2)
