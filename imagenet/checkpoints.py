"""States of a run, written atomically and checked when read; and weights for others, as safetensors.

RUN/checkpoints/00002000/state.pt           everything that continues the run bit for bit: tensors and numbers
RUN/checkpoints/00002000/checkpoint.json    its step, size and SHA-256
RUN/weights.safetensors                     the evaluation weights, with the configuration in the metadata

A damaged checkpoint is detected and named, and the one before it serves.
"""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from imagenet.pickle_scan import shown
from imagenet.presets import Config, build_model
from imagenet.provenance import Provenance
from tvm_ref import FlowMap
from tvm_ref.command_line import flag

STATE, SUMMARY = "state.pt", "checkpoint.json"
WEIGHTS = "weights.safetensors"
CONFIG = "config.json"
DATA = "data.json"


def checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("*") if path.name.isdigit() and path.is_dir())


def save_checkpoint(folder: Path, state: Mapping[str, Any], step: int, keep: int) -> Path:
    """Write the state of a step, and remove all but the newest `keep` checkpoints.

    A crash at any moment leaves a complete checkpoint, or none under that name.

    Raises:
        OSError: it could not be written; nothing that was there is touched.
    """
    final, partial = folder / f"{step:08d}", folder / f"{step:08d}.partial"
    try:
        remove_leftovers(folder)
        partial.mkdir(parents=True)
        with (partial / STATE).open("wb") as file:
            hashing = _HashingWriter(file)
            torch.save(dict(state), cast("IO[bytes]", hashing))  # it asks for no more than write and flush
            _flush(file)
        summary = {"step": step, "bytes": hashing.size, "sha256": hashing.sha256.hexdigest()}
        with (partial / SUMMARY).open("w") as text:
            json.dump(summary | {"torch": torch.__version__}, text, indent=2)
            _flush(text)
        _flush_folder(partial)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        last = checkpoints(folder)[-1:]
        kept = f"; {last[0]} is whole" if last else ""
        cause = error.__context__ if isinstance(error.__context__, OSError) else error  # torch.save hides it
        raise OSError(f"the checkpoint of step {step} could not be written: {_reason(cause)}{kept}") from None
    if final.exists():
        final.rename(final.with_suffix(".old"))
    partial.rename(final)
    _flush_folder(folder)
    for path in checkpoints(folder)[:-keep]:
        shutil.rmtree(path, ignore_errors=True)
    remove_leftovers(folder)
    return final


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
        raise ValueError("; ".join(complaints) + "; no other checkpoint is left")
    return None, []


def _fault(path: Path) -> str | None:
    """Say what is wrong with a checkpoint, or return None."""
    try:
        summary = json.loads((path / SUMMARY).read_text())
        size = (path / STATE).stat().st_size
        if size != summary["bytes"]:
            return f"{size} bytes in place of {summary['bytes']}"
        return None if _sha256(path / STATE) == summary["sha256"] else "its checksum does not match"
    except OSError as error:
        return f"{Path(error.filename or path).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError):
        return f"{SUMMARY} cannot be read"


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read the state in a checkpoint, on the CPU.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return torch.load(path / STATE, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{path / STATE} cannot be read: {_reason(error)}") from None


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
        raise ValueError(f"{path} does not fit its configuration: {error}") from None
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
            raise ValueError(f"--init {config.init} has {flag(name)} {there}, this run {here}")
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
        raise ValueError(f"{missing[0]} is missing ({len(missing)} tensors are)")
    if unknown:
        raise ValueError(f"{shown(unknown[0])} is no tensor of this network ({len(unknown)} are not)")
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(f"{name} is of shape {list(tensor.shape)}, not {list(expected[name].shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} holds {tensor.dtype}, not floating-point numbers")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} holds numbers that are not finite")


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
        raise ValueError(f"{path} cannot be read: {_reason(error)}") from None


def _read_weights(path: Path) -> tuple[Config, dict[str, Tensor]]:
    """Read a .safetensors file."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {_reason(error)}") from None
    if "config" not in metadata:
        raise ValueError(f"{path} does not say which configuration its weights need (metadata 'config')")
    try:
        return Config.from_json(metadata["config"]), weights
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _weights_of_run(folder: Path) -> tuple[Config, dict[str, Tensor]]:
    """Read the evaluation weights of a run's newest checkpoint."""
    config = read_config(folder)
    checkpoint, _ = find_checkpoint(folder / "checkpoints")
    if checkpoint is None:
        raise ValueError(f"{folder} holds no weights yet; go on with it by --resume")
    weights = read_checkpoint(checkpoint)["ema"]["module"]
    return config, {name.removeprefix("network."): a for name, a in weights.items()}


def read_config(folder: Path) -> Config:
    """Read the configuration of a run.

    Raises:
        ValueError: no run there, or a config.json that is not ours.
    """
    try:
        return Config.from_json((folder / CONFIG).read_text())
    except OSError:
        raise ValueError(f"{folder} holds no run (no {CONFIG})") from None
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from None


# Files --------------------------------------------------------------------------------------------------------------


def _reason(error: Exception, line: int = 0) -> str:
    """Say in one line what went wrong."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[min(line, len(lines) - 1)].strip()


class _HashingWriter:
    """A file that computes size and SHA-256 of what is written to it, so that nothing is read again for them."""

    def __init__(self, file: BinaryIO):
        self._file, self.size, self.sha256 = file, 0, hashlib.sha256()

    def write(self, content: bytes) -> int:
        """Write bytes, after one another: torch.save never goes back."""
        self.sha256.update(content)
        self.size += memoryview(content).nbytes
        return self._file.write(content)

    def flush(self) -> None:
        """Flush the file."""
        self._file.flush()


def _flush(file: Any) -> None:
    """Flush a file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Flush a folder's list of names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
