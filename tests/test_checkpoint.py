"""Checkpoints come back bit for bit or not at all."""

import logging
import random
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from identical import bits

from experiments.common.errors import InputError
from experiments.training.checkpoint import Checkpoints


def make_state(seed=0, width=4):
    """Everything a training state is made of."""
    key = jax.random.key(seed)
    weights = jax.random.normal(key, (3, width))
    params = {"w": weights, "half": weights.astype(jnp.bfloat16), "none": jnp.zeros((0, 2))}
    optimiser = optax.adamw(1e-3)
    updates, opt_state = optimiser.update(params, optimiser.init(params), params)
    return {
        "params": optax.apply_updates(params, updates),
        "opt_state": opt_state,
        "step": jnp.int32(seed),
        "key": key,
        "keys": jax.random.split(jax.random.key(seed, impl="rbg"), 2),
        "raw": jnp.array([jnp.nan, -0.0, jnp.inf]),
        "numpy": np.arange(5, dtype=np.float64) / 7,
        "number": 3,
    }


def blank(state):
    """A template with other values: what restore returns must come from the file."""

    def zero(x):
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(
                jnp.zeros_like(jax.random.key_data(x)), impl=jax.random.key_impl(x)
            )
        return x * 0

    return jax.tree.map(zero, state)


def assert_identical(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert type(x) is type(y)
        assert bits(x) == bits(y)
        if hasattr(x, "dtype"):
            assert (x.dtype, x.shape) == (y.dtype, y.shape)


@pytest.fixture
def two_steps(tmp_path):
    """Steps 1 and 2, each holding the state of its number."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (1, 2):
        checkpoints.save(step, make_state(step), {"epoch": step})
    return checkpoints


def test_round_trip_is_bit_identical(tmp_path):
    state = make_state(7)
    metadata = {"epoch": 3, "best": 0.1 + 0.2, "history": [{"loss": 1 / 3}], "none": None}
    Checkpoints(tmp_path).save(12, state, metadata)
    step, restored, about = Checkpoints(tmp_path).restore(blank(state))
    assert (step, about) == (12, metadata)
    assert_identical(state, restored)
    assert jax.random.bits(restored["key"]) == jax.random.bits(state["key"])


def test_leaves_return_to_the_sharding_of_the_template(tmp_path):
    placed = jax.device_put(jnp.arange(4.0), jax.devices()[-1])
    Checkpoints(tmp_path).save(1, {"a": placed, "b": jnp.ones(2)}, {})
    _, restored, _ = Checkpoints(tmp_path).restore({"a": placed, "b": jnp.ones(2)})
    assert restored["a"].sharding == placed.sharding
    assert restored["a"].committed and not restored["b"].committed


def test_nothing_saved_is_none_and_creates_nothing(tmp_path):
    assert Checkpoints(tmp_path / "absent").restore(make_state()) is None
    assert not (tmp_path / "absent").exists()


def test_the_newest_are_kept_and_best_can_be_one(tmp_path):
    newest, best = Checkpoints(tmp_path / "checkpoints"), Checkpoints(tmp_path / "best", keep=1)
    for step in (9, 10, 11):
        newest.save(step, {"x": jnp.float32(step)}, {})
    for step in (9, 10):
        best.save(step, {"x": jnp.float32(step)}, {})
    assert (newest.steps(), best.steps()) == ([10, 11], [10])
    assert best.restore({"x": jnp.float32(0)})[1]["x"] == 10
    assert sorted(p.name for p in best.directory.iterdir()) == ["10", "10.sha256"]


def test_a_save_ends_the_history_at_its_step(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step, value in [(1, 1), (2, 2), (3, 3), (2, 20)]:
        checkpoints.save(step, {"x": jnp.float32(value)}, {})
    assert checkpoints.steps() == [1, 2]
    assert "step 3 is replaced by a save at step 2" in caplog.text
    assert checkpoints.restore({"x": jnp.float32(0)})[1]["x"] == 20


def test_any_flipped_byte_is_detected_and_the_older_step_used(two_steps):
    rng, template = random.Random(0), make_state()
    directory = two_steps.directory
    files = [directory / "2.sha256", *(p for p in (directory / "2").rglob("*") if p.is_file())]
    for trial in range(200):
        path = files[trial % len(files)]
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= rng.randrange(1, 256)
        path.write_bytes(damaged)
        assert two_steps.restore(template)[0] == 1, path
        path.write_bytes(whole)
    assert two_steps.restore(template)[0] == 2


def spoil_the_metadata(directory):
    """JSON still, and of a wrong type: what one flipped byte of a number can come to."""
    path = directory / "2" / "_CHECKPOINT_METADATA"
    path.write_text(re.sub(r"(init_timestamp_nsecs\": \d{9})\d", r"\1.", path.read_text()))


def cut_short(directory):
    path = max((directory / "2").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    path.write_bytes(path.read_bytes()[:-1])


def add_a_file(directory):
    (directory / "2" / "extra").write_text("")


def lose_a_file(directory):
    (directory / "2" / "_CHECKPOINT_METADATA").unlink()


def lose_the_step(directory):
    shutil.rmtree(directory / "2")


def lose_the_checksums(directory):
    (directory / "2.sha256").unlink()


DAMAGES = [
    spoil_the_metadata,
    cut_short,
    add_a_file,
    lose_a_file,
    lose_the_step,
    lose_the_checksums,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_named_and_the_older_step_used(two_steps, damage, caplog):
    damage(two_steps.directory)
    with caplog.at_level(logging.WARNING):
        step, restored, about = two_steps.restore(blank(make_state()))
    assert (step, about) == (1, {"epoch": 1})
    assert_identical(restored, make_state(1))
    assert "step 2 has no checksum file" in caplog.text or "differs from its" in caplog.text

    two_steps.save(2, make_state(5), {})  # and training goes on over the damaged step
    assert_identical(two_steps.restore(blank(make_state()))[1], make_state(5))
    assert two_steps.steps() == [1, 2]


def test_no_whole_step_lists_the_bad_ones(two_steps):
    lose_a_file(two_steps.directory)
    (two_steps.directory / "1.sha256").unlink()
    with pytest.raises(InputError, match=r"step 2 differs from .*_CHECKPOINT_METADATA; step 1 has"):
        two_steps.restore(make_state())


def test_a_crash_between_save_and_seal_leaves_the_older_step(tmp_path, monkeypatch):
    """And where there is none nothing: a first save that was killed is no damage."""
    checkpoints, template = Checkpoints(tmp_path, keep=1), {"x": jnp.float32(0)}

    def crash(self, step):
        raise KeyboardInterrupt

    def killed(step):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Checkpoints, "_checksums", crash)
            checkpoints.save(step, {"x": jnp.float32(step)}, {})
        assert (tmp_path / str(step) / "state").is_dir()

    killed(1)
    assert checkpoints.steps() == [] and checkpoints.restore(template) is None
    checkpoints.save(2, {"x": jnp.float32(2)}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "2.sha256"]
    killed(3)
    assert checkpoints.steps() == [2] and checkpoints.restore(template)[0] == 2
    killed(3)  # again, over what the first time has left
    checkpoints.save(3, {"x": jnp.float32(30)}, {})
    assert checkpoints.restore(template)[1]["x"] == 30
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "3.sha256"]


@pytest.mark.parametrize("at", ["save", "write_text", "fsync", "_clear"])
def test_a_crash_while_steps_are_replaced_loses_none(tmp_path, monkeypatch, at, caplog):
    """A save at step 2 where 2 and 3 are there, which dies before, at, or after its seal."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, {"x": jnp.float32(step)}, {})
    owner = {
        "save": "orbax.checkpoint.Checkpointer",
        "write_text": "experiments.training.checkpoint",
        "fsync": "experiments.common.files.os",
        "_clear": "experiments.training.checkpoint.Checkpoints",
    }

    def crash(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(f"{owner[at]}.{at}", crash)
        checkpoints.save(2, {"x": jnp.float32(20)}, {})
    fresh, template = Checkpoints(tmp_path), {"x": jnp.float32(0)}
    assert [(*fresh.restore(template)[:1], float(fresh.restore(template)[1]["x"]))] == [(3, 3)]
    lose(tmp_path, 3)
    sealed = at == "_clear"
    assert fresh.restore(template)[1]["x"] == (20 if sealed else 2)
    fresh.save(2, {"x": jnp.float32(200)}, {})  # and it goes on from there
    assert fresh.steps()[-1] == 2 and fresh.restore(template)[1]["x"] == 200
    assert not list(tmp_path.glob("*.replaced"))


def lose(directory, step):
    (directory / f"{step}.sha256").unlink()


def test_foreign_content_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "photos").mkdir()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore(make_state()) is None
    checkpoints.save(1, {"x": jnp.ones(2)}, {})
    assert checkpoints.restore({"x": jnp.ones(2)})[0] == 1
    assert (tmp_path / "notes.txt").read_text() == "mine" and (tmp_path / "photos").is_dir()


def test_a_foreign_step_and_a_file_are_refused(tmp_path):
    (tmp_path / "5").mkdir()
    with pytest.raises(InputError, match=r"step 5 has no checksum file 5\.sha256"):
        Checkpoints(tmp_path).restore(make_state())
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file, expected a directory"):
        Checkpoints(tmp_path / "file")
    with pytest.raises(InputError, match="keep=0"):
        Checkpoints(tmp_path, keep=0)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({"a": jnp.ones((2, 4)), "b": jnp.ones(2)}, r"\['a'\] is \(2, 3\) float32 .* \(2, 4\)"),
        ({"a": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.ones(2)}, "float32 in .* bfloat16 here"),
        ({"a": jnp.ones((2, 3)), "c": jnp.ones(2)}, r"\['c'\] is absent in .* \(2,\) float32 here"),
        ({"a": jnp.ones((2, 3))}, r"\['b'\] is \(2,\) float32 in the checkpoint, absent here"),
        ({"a": jax.random.split(jax.random.key(0), (2, 3)), "b": jnp.ones(2)}, "key<fry> here"),
    ],
)
def test_a_template_that_differs_is_refused(tmp_path, template, message):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"a": jnp.ones((2, 3)), "b": jnp.ones(2)}, {})
    with pytest.raises(InputError, match=message):
        checkpoints.restore(template)


def test_metadata_that_is_not_json_leaves_the_old_step_alone(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, {"x": jnp.ones(2)}, {})
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoints.save(1, {"x": jnp.ones(2)}, {"loss": np.float32(1)})
    assert checkpoints.restore({"x": jnp.ones(2)})[0] == 1


# TensorStore's second write of a step may fail after the first has, when nobody waits for it.
@pytest.mark.filterwarnings("ignore:Exception ignored:pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_said_and_the_newest_step_kept(small_disk, capfd):
    def noise(size):
        return {"a": jnp.asarray(np.random.default_rng(0).random(size), jnp.float32)}

    checkpoints = Checkpoints(small_disk / "checkpoints")
    with pytest.raises(InputError, match=r"no space is left .* step 1; there is none yet"):
        checkpoints.save(1, noise(900_000), {})
    checkpoints.save(1, noise(100_000), {"epoch": 1})
    with pytest.raises(InputError, match=r"step 2; step 1, the newest, is kept\. Make room"):
        checkpoints.save(2, noise(900_000), {})
    assert checkpoints.steps() == [1]
    assert not list(checkpoints.directory.glob("*tmp*"))
    step, restored, about = checkpoints.restore(noise(100_000))
    assert (step, about) == (1, {"epoch": 1})
    assert_identical(restored, noise(100_000))
    checkpoints.save(3, noise(100_001), {})  # there is room again
    assert capfd.readouterr().err == ""
