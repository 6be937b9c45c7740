"""Checkpoints of a training state: Orbax writes them, a checksum file beside each step seals it.

```
checkpoints/
  40/  60/                     one directory a step, written by orbax.checkpoint.Checkpointer
  40.sha256  60.sha256         checksum of every file of the step; `sha256sum -c 60.sha256` agrees
```

Why the seal: Orbax restores a file with one flipped byte without a word. A step counts only when
every byte is as it was saved; a damaged step is logged and the next older whole one is taken. Nor
is a damaged step ever read, which is why this is no CheckpointManager: that reads all steps' own
metadata, and one flipped byte of them would keep it from any other.

A run keeps two of these: `checkpoints/` (the newest steps, to go on from) and `best/` (`keep=1`,
the best by validation, to evaluate). They are independent, so neither can push the other out.
"""

import contextlib
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from experiments.common.errors import InputError, disk_is_full
from experiments.common.files import write_text
from experiments.training.devices import is_first, wait_for_all

PyTree = Any
UNSEALED = "This step is being saved.\n"  # in place of its checksums until it is
logger = logging.getLogger(__name__)


class Checkpoints:
    """The newest `keep` states of a run in `directory`, which appears with the first save.

    A save is `due` once `every` seconds have passed since the last one: where an epoch takes less
    time than its save, most of a run would be saving.
    """

    def __init__(self, directory: Path, keep: int = 2, every: float = 0.0):
        if keep < 1:
            raise InputError(f"keep={keep}: at least one checkpoint has to be kept; give 1 or more")
        self.directory = Path(directory).absolute()  # Orbax takes absolute paths only
        self.keep = keep
        self.every = every
        self.saved_at = time.monotonic()
        if self.directory.exists() and not self.directory.is_dir():
            raise InputError(f"{directory} is a file, expected a directory of checkpoints")

    def steps(self) -> list[int]:
        """Every step that was saved, whole or damaged, oldest first."""
        return [step for step in self._found() if not self._was_interrupted(step)]

    def _found(self) -> list[int]:
        if not self.directory.exists():
            return []
        entries = self.directory.iterdir()
        names = [p.stem for p in entries if p.suffix == ".sha256" or (p.is_dir() and not p.suffix)]
        return sorted({int(name) for name in names if name.isdecimal()})

    def _was_interrupted(self, step: int) -> bool:
        """Whether it is what a save that was killed has left: no damage, as it never was whole."""
        seal = self._seal(step)
        return seal.exists() and seal.read_bytes() == UNSEALED.encode()

    def due(self) -> bool:
        return time.monotonic() - self.saved_at >= self.every

    def save(self, step: int, state: PyTree, metadata: dict[str, Any]) -> None:
        """Write `state` and `metadata` (JSON: epoch, history, …) as `step`; returns once sealed.

        The run's history ends at `step`. The same or later steps, left over where a run went on
        from an older checkpoint, go after the new one is sealed, as older ones do, so a crash at
        any moment loses no whole step.
        """
        leaves = _named_leaves(state)
        about = {"leaves": {name: _form(leaf) for name, leaf in leaves.items()}}
        about["metadata"] = json.loads(json.dumps(metadata))  # a TypeError now, not half way
        arrays = {name: _array(leaf) for name, leaf in leaves.items() if np.size(leaf)}

        for other in [s for s in self.steps() if s >= step]:
            logger.warning("%s: step %d is replaced by a save at step %d", self, other, step)
        self._move_aside(step)
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays), about=ocp.args.JsonSave(about)
        )
        try:
            if is_first():
                self._drop_partial()
                if not self._seal(step).exists():
                    write_text(self._seal(step), UNSEALED)
            with _quiet(), _checkpointer() as orbax:
                orbax.save(self.directory / str(step), args=items)
            if is_first():
                write_text(self._seal(step), self._checksums(step))
        except (OSError, ValueError) as error:
            if not disk_is_full(error):
                raise
            self._give_up(step, error)
        wait_for_all("checkpoint sealed")
        kept = [s for s in self.steps() if s <= step][-self.keep :]
        self._remove([s for s in self._found() if s not in kept])
        self.saved_at = time.monotonic()

    def _give_up(self, step: int, error: Exception) -> None:
        """Clears away what a full disk has left of a step."""
        self._drop_partial()
        if self._aside(step).exists():
            self._put_back(step)
        else:
            self._clear([step])
        whole = [s for s in self.steps() if self._damage(s) is None]
        kept = f"step {whole[-1]}, the newest, is kept" if whole else "there is none yet"
        raise InputError(
            f"{self.directory}: no space is left on the disk for the checkpoint of step {step}; "
            f"{kept}. Make room and go on with --resume"
        ) from error

    def restore(self, template: PyTree) -> tuple[int, PyTree, dict[str, Any]] | None:
        """(step, state, metadata) of the newest whole step; None when nothing was ever saved.

        `template` is a state of the same structure, shapes and dtypes; its values are not read.
        Each leaf returns bit for bit, as the kind of array (and on the devices) of its template.
        """
        damaged = {}
        for step in reversed(self.steps()):
            if is_first():
                self._put_back(step)
            wait_for_all("checkpoint looked at")
            damage = self._damage(step)
            if damage is None:
                return step, *self._read(step, template)
            damaged[step] = f"step {step} {damage}"
            logger.warning("%s: %s; trying an older step", self, damaged[step])
        if damaged:
            raise InputError(
                f"{self.directory} has no whole checkpoint: {'; '.join(damaged.values())}. "
                "Bring back an undamaged copy, or start again in another run directory."
            )
        return None

    def _read(self, step: int, template: PyTree) -> tuple[PyTree, dict[str, Any]]:
        leaves = _named_leaves(template)
        where = self.directory / str(step)
        with _checkpointer() as orbax:
            args = ocp.args.Composite(about=ocp.args.JsonRestore())
            about = orbax.restore(where, args=args).about
            self._check_fit(step, about["leaves"], {n: _form(leaf) for n, leaf in leaves.items()})
            arrays = {n: _array(leaf) for n, leaf in leaves.items() if np.size(leaf)}
            blank = {n: np.empty(a.shape, a.dtype) for n, a in arrays.items()}  # asks for NumPy
            args = ocp.args.Composite(state=ocp.args.StandardRestore(blank))
            arrays = orbax.restore(where, args=args).state
        values = [_like(leaf, arrays[n]) if n in arrays else leaf for n, leaf in leaves.items()]
        return jax.tree.unflatten(jax.tree.structure(template), values), about["metadata"]

    def _check_fit(self, step: int, saved: dict[str, str], wanted: dict[str, str]) -> None:
        for name in [*wanted, *saved]:
            was, now = saved.get(name, "absent"), wanted.get(name, "absent")
            if was != now:
                raise InputError(
                    f"{self.directory / str(step)} does not fit this run: {name} is {was} in the "
                    f"checkpoint, {now} here. Use the options it was saved with, or another run "
                    "directory."
                )

    def _damage(self, step: int) -> str | None:
        """What is wrong with a step, or None when every byte is as it was saved."""
        if not self._seal(step).exists():
            return f"has no checksum file {self._seal(step).name} (an interrupted save?)"
        saved, found = self._seal(step).read_bytes(), self._checksums(step).encode()
        if saved == found:
            return None
        lines = {*saved.splitlines()} ^ {*found.splitlines()}
        names = sorted({line.decode(errors="replace").partition("  ")[2] for line in lines})
        return f"differs from its checksums at {', '.join(names[:3]) or self._seal(step).name}"

    def _checksums(self, step: int) -> str:
        """One line `sha256  path` for each file of the step, as `sha256sum` writes them."""
        lines = []
        for path in sorted((self.directory / str(step)).rglob("*")):
            if path.is_file():
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                lines.append(f"{digest}  {path.relative_to(self.directory).as_posix()}\n")
        return "".join(lines)

    def _seal(self, step: int) -> Path:
        return self.directory / f"{step}.sha256"

    def _aside(self, step: int) -> Path:
        """Where a step waits until what replaces it is sealed; its seal stays where it is."""
        return self.directory / f"{step}.replaced"

    def _move_aside(self, step: int) -> None:
        """Makes room for a save at this step; every process has to have listed it before."""
        wait_for_all("checkpoint to be replaced")
        if is_first() and (self.directory / str(step)).exists():
            shutil.rmtree(self._aside(step), ignore_errors=True)
            (self.directory / str(step)).rename(self._aside(step))
        wait_for_all("checkpoint moved aside")

    def _put_back(self, step: int) -> None:
        """Undoes `_move_aside`, unless what replaces the step is whole."""
        if self._aside(step).exists() and self._damage(step) is not None:
            shutil.rmtree(self.directory / str(step), ignore_errors=True)
            self._aside(step).rename(self.directory / str(step))

    def _remove(self, steps: list[int]) -> None:
        """Removes steps; every process has to have listed them before."""
        wait_for_all("checkpoints to be removed")
        if is_first():
            for left in [*self.directory.glob("*.replaced"), *self.directory.glob("*.removed")]:
                shutil.rmtree(left)
            self._clear(steps)
        wait_for_all("checkpoints removed")

    def _clear(self, steps: list[int]) -> None:
        """Each step goes at once, whatever happens meanwhile."""
        for step in steps:
            self._seal(step).unlink(missing_ok=True)
            if (self.directory / str(step)).exists():
                (self.directory / str(step)).rename(self.directory / f"{step}.removed")
            shutil.rmtree(self.directory / f"{step}.removed", ignore_errors=True)

    def _drop_partial(self) -> None:
        """Removes what saves that were killed have left."""
        for partial in self.directory.glob("*.orbax-checkpoint-tmp"):
            shutil.rmtree(partial, ignore_errors=True)

    def __str__(self) -> str:
        return str(self.directory)


def _checkpointer() -> ocp.Checkpointer:
    """Synchronous, because a step is sealed only once all of it is on disk."""
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the tracebacks that Orbax's threads log; the error is raised all the same."""
    log = logging.getLogger("absl")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    """The leaves by path, in tree order: {"['params']['head']['bias']": array, …}."""
    return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _form(leaf: Any) -> str:
    """Shape and dtype in words that compare: "(3, 4) float32"."""
    leaf = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
    return f"{leaf.shape} {leaf.dtype}"


def _array(leaf: Any) -> jax.Array | np.ndarray:
    """What goes to disk: arrays as they are, a typed PRNG key as its words."""
    if _is_key(leaf):
        return jax.random.key_data(leaf)
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def _like(leaf: Any, value: np.ndarray) -> Any:
    """`value` as the kind of thing `leaf` is: PRNG key, JAX array, NumPy array, Python number."""
    if _is_key(leaf):
        return jax.random.wrap_key_data(jnp.asarray(value), impl=jax.random.key_impl(leaf))
    if isinstance(leaf, jax.Array):
        return jax.device_put(value, leaf.sharding if leaf.committed else None)
    return value if isinstance(leaf, (np.ndarray, np.generic)) else value.item()
