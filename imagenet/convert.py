"""Convert weights that Luma released into safetensors, without executing anything in them.

    python imagenet/convert.py im256_w2.pkl imagenet256-w2.safetensors
    python imagenet/convert.py network-snapshot-500.pkl out.safetensors --preset imagenet256-w1.75

The released .pkl files are pickles that carry Python source, and loading them as usual runs it. Here they are read by
a reader that can build tensors and nothing else (pickled_tensors.py lists the names that it knows); a file that asks
for any other name is refused, and the name is printed. Names, shapes and numbers of the tensors are checked against the
preset, which the file's name decides for Luma's own files and --preset for others. The result holds the preset's
configuration, so that sample.py and evaluate.py need nothing else. The weights keep their owner's terms.
"""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from imagenet.config import PRESETS, Config
from imagenet.data.latents import LATENT_SIDE, NORMALISATION, VAE
from imagenet.data.provenance import Provenance
from imagenet.foreign.pickle_scan import shown
from imagenet.foreign.pickled_tensors import module_state, read_module, tensors_of
from imagenet.training.checkpoint import check_weights, save_weights
from tvm_ref.cli.errors import UserError
from tvm_ref.cli.files import require_new
from tvm_ref.cli.options import OneLineParser, run

RELEASED = {  # by name of the file
    "im256_w2": "imagenet256-w2",
    "im256_w1p75": "imagenet256-w1.75",
    "im512_w2p5": "imagenet512-w2.5",
    "im512_w2p25": "imagenet512-w2.25",
}
WRAPPERS = ("_orig_mod.", "model.")  # around the network, in front of its names


def parser() -> OneLineParser:
    """Build the command line."""
    p = OneLineParser("convert.py", __doc__)
    p.add_argument("source", type=Path, help="a .pkl file")
    p.add_argument("out", type=Path, help="the .safetensors file to write")
    p.add_argument(
        "--preset", choices=list(PRESETS), help="what the weights were trained as (default: by the file's name)"
    )
    return p


def preset_of(source: Path, preset: str | None) -> str:
    """Return the preset of a file.

    Raises:
        ValueError: neither its name nor `preset` says.
    """
    preset = preset or RELEASED.get(source.stem)
    if preset is None:
        names = ", ".join(f"{name}.pkl" for name in RELEASED)
        raise UserError(f"the name {source.name} is not one of {names}: say the preset with --preset")
    return preset


def network_of(data: Any) -> Any:
    """Find the network in the content of a .pkl file: a dict with the averaged one as "ema" or "net", or the network.

    Raises:
        ValueError: no module is there.
    """
    if not isinstance(data, dict):
        return data
    found = [data[key] for key in ("ema", "net") if data.get(key) is not None]
    if not found:
        keys = ", ".join(shown(repr(key)) for key in list(data)[:5])
        raise UserError(f"no network ('ema' or 'net') in it, only {keys or 'nothing'}")
    return found[0]


def without_wrappers(name: str) -> str:
    """Strip the wrappers around the network from the name of a tensor."""
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return name


def data_of(config: Config) -> Provenance:
    """Describe what released weights were trained on: latents of ImageNet, of the sizes that are known."""
    known = NORMALISATION.get(LATENT_SIDE * config.input_size) if config.data == "latents" else None
    return Provenance(config.data, autoencoder=VAE if known else None, normalisation=known)


def convert(source: Path, out: Path, preset: str | None = None) -> Config:
    """Convert a file; returns the configuration that its weights need.

    Raises:
        ValueError: a file that is refused, or does not hold what it should; `out` exists or is not .safetensors.
        OSError: it cannot be read or written.
    """
    if out.suffix != ".safetensors":
        raise UserError(f"{out} must end in .safetensors")
    require_new(out)
    config, preset = PRESETS[preset_of(source, preset)], preset_of(source, preset)
    try:
        module = network_of(read_module(source))
        scaled = module_state(module).get("do_scale_param", config.scaled)  # the file knows best how it was trained
        if not isinstance(scaled, bool):
            raise UserError(f"do_scale_param is a {type(scaled).__name__}, neither true nor false")
        config = replace(config, scaled=scaled)
        tensors = {without_wrappers(name): a for name, a in tensors_of(module).items()}
        check_weights(tensors, config)
    except ValueError as error:
        raise UserError(str(error) if str(source) in str(error) else f"{source}: {error}") from None
    with source.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    about = {"preset": preset, "source": source.name, "source_sha256": digest}
    about["data"] = data_of(config).to_json()
    tensors = {name: a.float().clone(memory_format=torch.contiguous_format) for name, a in tensors.items()}
    save_weights(out, tensors, config, w=f"{config.w:g}", scaled=str(config.scaled).lower(), **about)
    return config


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status, 0."""
    command = parser()
    options = command.parse_args(argv)
    with command.errors():
        config = convert(options.source, options.out, options.preset)
    kind, side = "scaled" if config.scaled else "plain", 8 * config.input_size
    print(f"{options.out}: w = {config.w:g}, {kind} parameterisation, {side} x {side}")
    return 0


if __name__ == "__main__":
    run(main)
