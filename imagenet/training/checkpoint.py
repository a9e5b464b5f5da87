"""States of a run, written atomically and checked when read; and weights for others, as safetensors.

RUN/checkpoints/00002000/      everything that continues the run bit for bit (sharded_state.py)
RUN/weights.safetensors        the evaluation weights, with the configuration in the metadata

A damaged checkpoint is detected and named, and the one before it serves.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from imagenet.config import Config, build_model
from imagenet.data.provenance import Provenance
from imagenet.distributed import World
from imagenet.training.disk import SUMMARY, flush_folder, sha256_of
from tvm_ref import FlowMap
from tvm_ref.cli.errors import UserError
from tvm_ref.cli.options import flag

WEIGHTS, ALL_WEIGHTS = "weights.safetensors", "weights*.safetensors"  # of the first decay (--ema), and of all
CONFIG = "config.json"
DATA = "data.json"


def checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("*") if path.name.isdigit() and path.is_dir())


class Saver:
    """Saves the states of a run, one at a time, while training goes on; it waits for the copy to host memory alone.

    As a context it waits, at its end, for what is being written.

    Args:
        folder: of the checkpoints.
        keep: how many of them, the newest.
        world: the processes; all take part in everything.
    """

    def __init__(self, folder: Path, keep: int, world: World | None = None):
        self.folder, self.keep, self.world = folder, keep, world or World()
        self._writing: Any = None  # a future
        self._step = 0

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with contextlib.suppress(Exception) if kind is not None else contextlib.nullcontext():  # the first one counts
            self.wait()

    def save(self, state: Any, step: int) -> None:
        """Start to write the state of a step, once the one before is written.

        A crash at any moment leaves a complete checkpoint, or none under that name.

        Raises:
            OSError: the one before could not be written; nothing that was there is touched.
        """
        from imagenet.training import sharded_state  # imports DTensor, which takes half a second

        self.wait()
        final, partial = self.folder / f"{step:08d}", self.folder / f"{step:08d}.partial"
        self._step = step
        self._writing = sharded_state.start_writing(
            partial, state, step, prepare=lambda: remove_leftovers(self.folder), commit=lambda: self._commit(final),
            rank=self.world.rank, size=self.world.size, group=self.world.saving,
        )  # fmt: skip

    @property
    def failed(self) -> bool:
        """Whether what was being written could not be, as far as this process knows; `wait` tells why."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def wait(self) -> None:
        """Wait until what is being written is on the disk.

        Raises:
            OSError: in every process, if it could not be written.
        """
        writing, self._writing = self._writing, None
        error = None if writing is None else writing.exception()
        if error is None:
            return
        from imagenet.training import sharded_state

        cause = sharded_state.cause_of(error)
        if not isinstance(cause, Exception):
            raise cause
        if self.world.first:
            shutil.rmtree(self.folder / f"{self._step:08d}.partial", ignore_errors=True)
        last = checkpoints(self.folder)[-1:]
        kept = f"; {last[0]} is whole" if last else ""
        raise OSError(f"the checkpoint of step {self._step} could not be written: {_reason(cause)}{kept}")

    def _commit(self, final: Path) -> None:
        """Give a state that is on the disk its name, and remove old ones; in the first process."""
        if final.exists():
            final.rename(final.with_suffix(".old"))
        final.with_suffix(".partial").rename(final)
        flush_folder(self.folder)
        for path in checkpoints(self.folder)[: -self.keep]:
            shutil.rmtree(path, ignore_errors=True)
        remove_leftovers(self.folder)


def remove_leftovers(folder: Path) -> None:
    """Remove what a crash in the middle of writing left."""
    for pattern in ("*.partial", "*.old"):
        for path in folder.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:  # of someone else's making, and in the way
                path.unlink()


def find_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """Find the newest checkpoint that is undamaged, and return it with a complaint about each newer one.

    Raises:
        ValueError: checkpoints are there, and all are damaged.
    """
    complaints: list[str] = []
    for path in reversed(checkpoints(folder)):
        fault = _fault(path)
        if fault is None:
            return path, complaints
        complaints.append(f"{path} is damaged ({fault})")
    if complaints:
        raise UserError("; ".join(complaints) + "; no other checkpoint is left")
    return None, []


def _fault(path: Path) -> str | None:
    """Say what is wrong with a checkpoint, or return None."""
    try:
        files = json.loads((path / SUMMARY).read_text())["files"]
        for name, about in files.items():
            size = (path / name).stat().st_size
            if size != about["bytes"]:
                return f"{name}: {size} bytes in place of {about['bytes']}"
        return next(
            (f"{n}: its checksum does not match" for n in files if sha256_of(path / n) != files[n]["sha256"]), None
        )
    except OSError as error:
        return f"{Path(error.filename or path).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{SUMMARY} cannot be read"


def read_checkpoint(path: Path, place: Callable[..., Tensor] | None = None, prefix: str = "") -> dict[str, Any]:
    """Read the state in a checkpoint, or the part whose names begin with `prefix`; see sharded_state.read_state.

    Raises:
        ValueError: it cannot be read.
    """
    from imagenet.training import sharded_state

    return sharded_state.read_state(path, place or sharded_state.on_cpu, prefix)


# Weights ------------------------------------------------------------------------------------------------------------


def save_weights(path: Path, state_dict: Mapping[str, Tensor], config: Config, **metadata: str) -> None:
    """Write a network's weights and the configuration that they need, atomically.

    Args:
        path: a .safetensors file.
        state_dict: of the DiT, without a prefix.
        config: the configuration.
        metadata: more to say in the file.

    Raises:
        OSError: the file could not be written; what was there stays.
    """
    partial = path.with_name(path.name + ".partial")
    tensors = {name: a.detach().cpu().contiguous() for name, a in state_dict.items()}
    try:
        save_file(tensors, partial, {"format": "pt", "config": config.to_json(), **metadata})
        os.replace(partial, path)
    except (SafetensorError, OSError) as error:
        raise OSError(f"{path} could not be written: {_reason(error)}") from None


def load_weights(path: str | Path, *, attention: str | None = None) -> tuple[FlowMap, Config]:
    """Load the model of a .safetensors file or of a run's folder, without gradients, and its configuration.

    Of a run that has not finished it is the evaluation weights of the newest checkpoint.

    Args:
        path: the file or folder.
        attention: a key of ATTENTION in place of the configuration's.

    Raises:
        ValueError: no weights there, damaged ones, or weights that do not fit their configuration.
    """
    path = Path(path)
    if path.is_dir() and not (path / WEIGHTS).is_file():
        config, weights = _weights_of_run(path)
    else:
        path = path / WEIGHTS if path.is_dir() else path
        config, weights = _read_weights(path)
    try:
        check_weights(weights, config)
    except ValueError as error:
        raise UserError(f"{path} does not fit its configuration: {error}") from None
    model = build_model(config, attention=attention)
    model.network.load_state_dict(weights)
    return model.eval().requires_grad_(False), config


def load_initial(config: Config) -> dict[str, Tensor]:
    """Load the weights that a configuration starts from (--init), as the state dict of its FlowMap.

    Raises:
        ValueError: no weights there, or those of another network or parameterisation, which is named.
    """
    assert config.init is not None
    model, stored = load_weights(config.init, attention="plain")
    shape = {f.name for f in fields(config.network())} - {"time_init"}  # how new weights start does not matter here
    for name in (*sorted(shape), "scaled"):
        there, here = getattr(stored, name), getattr(config, name)
        if there != here:
            raise UserError(f"--init {config.init} has {flag(name)} {there}, this run {here}")
    return model.state_dict()


def check_weights(weights: Mapping[str, Tensor], config: Config) -> None:
    """Check that tensors are all that the network of a configuration has, and numbers; nothing is built.

    Raises:
        ValueError: a tensor too few, too many, of another shape or kind, or with numbers that are not finite.
    """
    with torch.device("meta"):
        expected = build_model(config, attention="plain").network.state_dict()
    missing, unknown = (sorted(a.keys() - b.keys()) for a, b in ((expected, weights), (weights, expected)))
    if missing:
        raise UserError(f"{missing[0]} is missing ({len(missing)} tensors are)")
    if unknown:
        raise UserError(f"{unknown[0]!r:.80} is no tensor of this network ({len(unknown)} are not)")
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise UserError(f"{name} is of shape {list(tensor.shape)}, not {list(expected[name].shape)}")
        if not tensor.is_floating_point():
            raise UserError(f"{name} holds {tensor.dtype}, not floating-point numbers")
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{name} holds numbers that are not finite")


def read_provenance(source: str | Path) -> Provenance | None:
    """Read what the model of a .safetensors file or of a run's folder was trained on; None if it does not say.

    Raises:
        ValueError: damaged files.
    """
    source = Path(source)
    path = source / DATA if source.is_dir() else source
    try:
        if source.is_dir():
            stored = path.read_text() if path.exists() else None
        else:
            with safe_open(path, "pt") as file:
                stored = (file.metadata() or {}).get("data")
        return None if stored is None else Provenance.from_json(stored)
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {_reason(error)}") from None


def _read_weights(path: Path) -> tuple[Config, dict[str, Tensor]]:
    """Read a .safetensors file."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {_reason(error)}") from None
    if "config" not in metadata:
        raise UserError(f"{path} does not say which configuration its weights need (metadata 'config')")
    try:
        return Config.from_json(metadata["config"]), weights
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _weights_of_run(folder: Path) -> tuple[Config, dict[str, Tensor]]:
    """Read the evaluation weights of a run's newest checkpoint."""
    config = read_config(folder)
    checkpoint, _ = find_checkpoint(folder / "checkpoints")
    if checkpoint is None:
        raise UserError(f"{folder} holds no weights yet; go on with it by --resume")
    weights = read_checkpoint(checkpoint, prefix="ema/0/")["ema"][0]["module"]
    return config, {name.removeprefix("network."): a for name, a in weights.items()}


def read_config(folder: Path) -> Config:
    """Read the configuration of a run.

    Raises:
        ValueError: no run there, or a config.json that is not ours.
    """
    try:
        return Config.from_json((folder / CONFIG).read_text())
    except OSError:
        raise UserError(f"{folder} holds no run (no {CONFIG})") from None
    except ValueError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from None


def _reason(error: Exception, line: int = 0) -> str:
    """Say in one line what went wrong."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[min(line, len(lines) - 1)].strip()
