"""Weights as safetensors, with the configuration that they need in the metadata: the format of trained models."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from imagenet.config import Config, build_model
from imagenet.data.provenance import Provenance
from tvm_ref import FlowMap
from tvm_ref.cli.errors import UserError, first_line, require, user_errors
from tvm_ref.cli.files import find

WEIGHTS = "weights.safetensors"  # the evaluation weights, in a run's folder and in each of its checkpoints
CONFIG = "config.json"
DATA = "data.json"
CHECKPOINTS = "checkpoints"
PRETRAINED = Path(__file__).parent / "pretrained"  # weights that come along, known by their names without an ending
# fields that decide which weights fit; time_init decides only how new ones start
NETWORK = ("input_size", "in_channels", "classes", "patch_size", "hidden_size", "depth", "heads", "norms", "scaled")


def checkpoints(run: Path) -> list[Path]:
    """List the folders of a run's checkpoints, oldest first."""
    return sorted(path for path in (run / CHECKPOINTS).glob("*") if path.name.isdigit() and path.is_dir())


def save_weights(path: Path, state_dict: Mapping[str, Tensor], config: Config, **metadata: str) -> None:
    """Write a network's weights and the configuration that they need, atomically.

    Args:
        path: a .safetensors file.
        state_dict: that of the DiT, without a prefix.
        config: the configuration.
        metadata: further entries of the file's metadata.

    Raises:
        OSError: the file could not be written; an existing file stays.
    """
    partial = path.with_name(path.name + ".partial")
    tensors = {name: a.detach().cpu().contiguous() for name, a in state_dict.items()}
    partial.touch()
    mode = partial.stat().st_mode  # that of a new file; save_file would leave it to its owner alone
    try:
        save_file(tensors, partial, {"format": "pt", "config": config.to_json(), **metadata})
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {first_line(error)}") from error
    _sort_metadata(partial)
    partial.chmod(mode)
    os.replace(partial, path)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a .safetensors file, whose order is random, so that equal weights give equal files."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= size  # the same entries, in another order
        file.seek(8)
        file.write(text.ljust(size))


def load_weights(path: str | Path, *, attention: str | None = None) -> tuple[FlowMap, Config]:
    """Load the model of a .safetensors file or of a run's folder, without gradients, and its configuration.

    For an unfinished run these are the evaluation weights of the newest checkpoint.

    Args:
        path: the file or folder, or the name of a model in PRETRAINED.
        attention: a key of ATTENTION that replaces the configuration's.

    Raises:
        UserError: no weights there, damaged ones, or weights that do not fit their configuration.
    """
    path = weights_file(find_model(path))
    metadata, weights = _open(path, tensors=True)
    require("config" in metadata, f"{path} does not say which configuration its weights need (metadata 'config')")
    with user_errors(path, UserError):
        config = Config.from_json(metadata["config"])
    with torch.device("meta"):
        model = build_model(config, attention=attention)
    with user_errors(f"{path} does not fit its configuration", UserError):
        check_weights(weights, model.network.state_dict())
    model.network.load_state_dict({name: a.float() for name, a in weights.items()}, assign=True)
    return model.eval().requires_grad_(False), config


def find_model(source: str | Path) -> Path:
    """Return a file or folder that exists, or else the weights of that name in PRETRAINED.

    Raises:
        UserError: neither is there; lists the names.
    """
    return find(source, PRETRAINED.glob("*.safetensors"))


def weights_file(source: Path) -> Path:
    """Return the file itself, or the evaluation weights of a run's folder.

    Raises:
        UserError: a folder without weights.
    """
    if not source.is_dir() or (source / WEIGHTS).is_file():
        return source / WEIGHTS if source.is_dir() else source
    read_config(source)
    found = [path / WEIGHTS for path in checkpoints(source) if (path / WEIGHTS).is_file()]
    require(bool(found), f"{source} holds no weights yet: it has not reached its first checkpoint")
    return found[-1]


def load_initial(config: Config) -> dict[str, Tensor]:
    """Load the weights that a configuration starts from (init), as the state dict of its FlowMap.

    Raises:
        UserError: no weights there, or those of another network or parameterisation, which is named.
    """
    assert config.init is not None
    model, stored = load_weights(config.init, attention="plain")
    for name in NETWORK:
        there, here = getattr(stored, name), getattr(config, name)
        require(there == here, f"init: {config.init} has {name} {there}, this run {here}")
    return model.state_dict()


def check_weights(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Check names, shapes and values of weights against those of a network, which may lie on the device "meta".

    Raises:
        UserError: a tensor too few, too many, of another shape or kind, or with numbers that are not finite.
    """
    missing, unknown = (sorted(a.keys() - b.keys()) for a, b in ((expected, weights), (weights, expected)))
    if missing:
        raise UserError(f"{missing[0]} is missing ({len(missing)} tensors are)")
    if unknown:
        raise UserError(f"{unknown[0]!r:.80} is no tensor of this network ({len(unknown)} are not)")
    for name, tensor in weights.items():
        shape, wanted = list(tensor.shape), list(expected[name].shape)
        require(shape == wanted, f"{name} is of shape {shape}, not {wanted}")
        require(tensor.is_floating_point(), f"{name} holds {tensor.dtype}, not floating-point numbers")
        require(bool(torch.isfinite(tensor).all()), f"{name} holds numbers that are not finite")


def read_provenance(source: str | Path) -> Provenance | None:
    """Read the origin of the data of a .safetensors file's or run's model; None if it is not recorded.

    Raises:
        UserError: damaged files.
    """
    source = find_model(source)
    if source.is_dir():
        path = source / DATA
        stored = path.read_text() if path.exists() else None
    else:
        path, stored = source, _open(source)[0].get("data")
    with user_errors(path, UserError):
        return None if stored is None else Provenance.from_json(stored)


def _open(path: Path, tensors: bool = False) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read the metadata of a .safetensors file, and its tensors if asked."""
    with user_errors(f"{path} cannot be read", OSError, SafetensorError), safe_open(path, "pt") as file:
        return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys() if tensors}  # noqa: SIM118


def read_config(folder: Path) -> Config:
    """Read the configuration of a run.

    Raises:
        UserError: no run there, or a config.json that is not ours.
    """
    path = folder / CONFIG
    require(path.is_file(), f"{folder} holds no run (no {CONFIG})")
    with user_errors(path, UserError):
        return Config.from_json(path.read_text(errors="replace"))
