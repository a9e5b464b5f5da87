"""Checkpoints of a run: each is complete or absent, whatever happens while it is written.

    RUN/checkpoints/00002000/    everything that continues the run bit for bit
        *.distcp, .metadata      tensors (state.py)
        weights.safetensors      the evaluation weights, for other commands (weights.py)
        checkpoint.json          the rest of the state, and the size of every file; written last

A checkpoint is written into 00002000.partial and renamed. A damaged one is reported, and the one before it is used.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagenet.model.distributed import World
from imagenet.weights import CHECKPOINTS, checkpoints
from tvm_ref.cli.errors import UserError, first_line
from tvm_ref.cli.files import read_json

if TYPE_CHECKING:
    from imagenet.training.state import Slot

SUMMARY = "checkpoint.json"


class Saver:
    """Saves the states of a run, one at a time. As a context manager it waits at its end for the last write.

    On a GPU training continues as soon as the state is copied to host memory. On a CPU nothing is copied, and training
    waits: a copy of the state of DiT-XL/2 takes 13.6 GB.

    Args:
        run: folder of the run.
        keep: number of checkpoints that stay, the newest.
        world: the processes; all take part in everything.
        asynchronous: train while writing; None: if not on a CPU.
    """

    def __init__(self, run: Path, keep: int, world: World | None = None, *, asynchronous: bool | None = None):
        self.folder, self.keep, self.world = run / CHECKPOINTS, keep, world or World()
        self.asynchronous = self.world.device.type != "cpu" if asynchronous is None else asynchronous
        self._writing: Any = None  # a future
        self._step = 0

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with contextlib.suppress(Exception) if kind is not None else contextlib.nullcontext():  # the first one counts
            self.wait()

    def save(self, state: Any, step: int, write_more: Callable[[Path], None] = lambda folder: None) -> None:
        """Write the state of a step, or start to, once the one before is written.

        Args:
            state: nested dicts and lists of tensors, which may be sharded, and of what JSON can hold.
            step: names the checkpoint.
            write_more: writes more files into the checkpoint's folder; called in the first process.

        Raises:
            OSError: in every process, if a state could not be written; older checkpoints are untouched.
        """
        from imagenet.training import state as states  # imports DTensor, which takes half a second

        self.wait()
        self._step = step
        self.world.on_first(lambda: remove_leftovers(self.folder))
        partial = self.folder / f"{step:08d}.partial"
        rest, tensors = states.flatten(state)

        def finish() -> None:
            write_more(partial)
            sizes = {path.name: path.stat().st_size for path in partial.iterdir()}
            (partial / SUMMARY).write_text(json.dumps({"step": step, "state": rest, "files": sizes}))
            self._commit(partial)

        with self._failing():
            self._writing = states.write_tensors(partial, tensors, finish, self.world, asynchronous=self.asynchronous)

    @property
    def failed(self) -> bool:
        """Return whether the last save is known to have failed in this process; `wait` raises the error."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def wait(self) -> None:
        """Wait until the current save is on the disk.

        Raises:
            OSError: in every process, if it could not be written.
        """
        writing, self._writing = self._writing, None
        with self._failing():
            if writing is not None:
                writing.result()

    @contextlib.contextmanager
    def _failing(self) -> Any:
        """Raise an error that names the step that could not be written, and remove its files."""
        try:
            yield
        except BaseException as error:
            from imagenet.training.state import cause_of

            cause = cause_of(error)
            if not isinstance(cause, Exception):
                raise cause from None
            if self.world.first:
                shutil.rmtree(self.folder / f"{self._step:08d}.partial", ignore_errors=True)
            kept = f"; {last[-1]} is complete" if (last := checkpoints(self.folder.parent)) else ""
            failure = OSError if isinstance(cause, OSError) else RuntimeError
            reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else first_line(cause)
            raise failure(f"the checkpoint of step {self._step} could not be written: {reason}{kept}") from error

    def _commit(self, partial: Path) -> None:
        """Rename a complete state to its final name, and remove old ones; in rank 0."""
        final = partial.with_suffix("")
        for path in (*partial.iterdir(), partial):
            flush(path)
        if final.exists():
            final.rename(final.with_suffix(".old"))
        partial.rename(final)
        flush(self.folder)
        saved = checkpoints(self.folder.parent)
        for path in saved[: saved.index(final) + 1][: -self.keep]:  # later ones were passed over, as unreadable
            shutil.rmtree(path, ignore_errors=True)
        remove_leftovers(self.folder)


def flush(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Remove files left behind by a crash while writing."""
    for path in (*folder.glob("*.partial"), *folder.glob("*.old")):
        shutil.rmtree(path)


def load_newest(run: Path, slot: "Slot", world: World) -> dict[str, Any] | None:
    """Load the newest checkpoint that can be read; those that cannot are named. All processes take part.

    Args:
        run: folder of the run.
        slot: returns the tensor that a stored one is read into.
        world: the processes.

    Returns:
        its state; None if there are no checkpoints.

    Raises:
        UserError: there are, and none can be read.
    """
    paths = world.broadcast(checkpoints(run)[::-1])
    for path in paths:
        state, damage = None, ""
        try:
            state = read_checkpoint(path, slot)
        except UserError as error:
            damage = first_line(error)
        if not world.all_gather([float(state is None)]).any():
            return state
        if world.first:
            print(f"{damage or f'{path} could not be read by another process'}; trying the one before", flush=True)
    if paths:
        raise UserError(f"no checkpoint in {run / CHECKPOINTS} can be read")
    return None


def read_checkpoint(path: Path, slot: "Slot | None" = None) -> dict[str, Any]:
    """Read the state in a checkpoint.

    Args:
        path: its folder.
        slot: returns the tensor that a stored one is read into; None allocates all on the CPU.

    Raises:
        UserError: a file is missing or damaged.
    """
    from imagenet.training.state import on_cpu, read_tensors, unflatten

    summary = read_json(path / SUMMARY, "checkpoint", ("state", "files"))
    for name, size in summary["files"].items():
        there = (path / name).stat().st_size if (path / name).is_file() else 0
        if there != size:
            raise UserError(f"{path} is damaged ({name} has {there} bytes of {size})")
    state: dict[str, Any] = unflatten(summary["state"], read_tensors(path, slot or on_cpu))
    return state
