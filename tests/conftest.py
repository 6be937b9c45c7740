"""Fixtures shared by the tests of the library."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from deq_fusion_jax import FusionState
from deq_fusion_jax.official import params_from_official

# Most of the time here goes into compiling what runs once, most of that into XLA's optimisations
# and its newer fusions. README's code and the commands run with them, as a user's programs.
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_num_cpu_devices", 8)  # for the tests of several; the others use the first
if jax.__version_info__ < (0, 11):  # later ones have no other
    with pytest.MonkeyPatch.context() as environment:
        flags = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"
        environment.setenv("XLA_FLAGS", flags + " --xla_cpu_parallel_codegen_split_count=1")
        jax.devices()  # reads them

# `--hypothesis-profile thorough` draws forty times as many examples.
FIXED = {"deadline": None, "database": None, "derandomize": True}
FIXED["suppress_health_check"] = list(HealthCheck)
settings.register_profile("brief", max_examples=25, **FIXED)
settings.register_profile("thorough", max_examples=1000, **FIXED)
settings.load_profile("brief")

ROOT = Path(__file__).resolve().parents[1]
GOLDENS = (ROOT / "tests" / "goldens", ROOT.parent / "shared" / "goldens")


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Compiled programs go before there are more than Linux lets a process map, 65,530 pieces."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


@pytest.fixture
def x64():
    """The test computes in float64, in every thread: callbacks run in others."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture
def run_command(monkeypatch, capsys):
    """Runs a command's main() in this process: (exit status, stdout, stderr)."""

    def run(main, *args):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, args)])
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def refuses(main, tmp_path, monkeypatch):
    """`main` of the test's own file ends with status 2 and one line that says what is wrong."""
    monkeypatch.chdir(tmp_path)

    def check(message, *args):
        status, _, err = main(*args)
        assert status == 2 and err.startswith("error: ") and err.count("\n") == 1, err
        assert message in err

    return check


@pytest.fixture
def refused_alone():
    """`python -m …` in a process of its own ends with status 2 and one line, which is returned."""

    def check(*words):
        done = subprocess.run(
            [sys.executable, "-m", *map(str, words)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=300,
        )
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        return done.stderr

    return check


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 2 MB, where the system lets us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here: it takes root on Linux")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def interruptible():
    """Children take Ctrl-C, which tests that run in a shell's background ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Golden:
    """Weights, inputs and results of the official PyTorch module, in float64."""

    def __init__(self, path):
        with np.load(path) as file:
            self.arrays = {name: file[name] for name in file.files}
        meta = json.loads(str(self.arrays["meta_json"]))
        self.features = meta["dim"]
        self.names = tuple("abc"[: meta["num_modals"]])
        self.inputs = {n: jnp.asarray(self.arrays[f"x{i}"]) for i, n in enumerate(self.names)}
        self.params = self.tree("W:")

    def __getitem__(self, name):
        return self.arrays[name]

    def tree(self, prefix):
        """The arrays called prefix + weight name as our parameters; zero where there is none."""
        weights = [name[2:] for name in self.arrays if name.startswith("W:")]
        zeros = {name: np.zeros_like(self.arrays["W:" + name]) for name in weights}
        found = {name: self.arrays.get(prefix + name, zeros[name]) for name in weights}
        return params_from_official(found, self.names)

    def input_tree(self, prefix):
        """The arrays called prefix + input name; zero where there is none."""
        return {
            name: self.arrays.get(f"{prefix}x{i}", np.zeros_like(self.arrays[f"x{i}"]))
            for i, name in enumerate(self.names)
        }

    def state(self, z):
        """The official state [..., (M + 1) d] as a `FusionState`."""
        *parts, fused = jnp.split(jnp.asarray(z), len(self.names) + 1, axis=-1)
        return FusionState(dict(zip(self.names, parts, strict=True)), fused)


OTHERS = ("p2_m3_d8_b1", "p3_m2_d64_b16", "p4_m3_d64_b5")  # the two here have all that these have


@pytest.fixture(
    params=[
        "p1_m2_d8_b5",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("p5_m3_d16_b16", *OTHERS)),
    ]
)
def golden(request, x64):
    for folder in GOLDENS:
        if (path := folder / f"{request.param}.npz").exists():
            return Golden(path)
    pytest.skip(f"{request.param}.npz is not in tests/goldens and there is no ../shared/goldens")
