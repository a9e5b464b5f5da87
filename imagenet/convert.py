"""Convert weights that Luma released into safetensors, without executing anything in them.

    python imagenet/convert.py im256_w2.pkl imagenet256-w2.safetensors
    python imagenet/convert.py network-snapshot-500.pkl out.safetensors --preset imagenet256-w1.75

The released .pkl files are pickles that carry Python source, and loading them as usual runs it. Here a reader builds
tensors and nothing else (foreign/luma.py); a file that asks for more is refused, and its request is
printed. Names, shapes and numbers of the tensors are checked against the preset, which the file's name decides for
Luma's own files and --preset for others. The result holds the preset's configuration, so that sample.py and evaluate.py
need nothing else. The weights keep their owner's terms.
"""

import hashlib
from dataclasses import replace
from pathlib import Path

import torch

from imagenet.config import PRESETS, Config, build_model
from imagenet.data.provenance import Provenance
from imagenet.data.vae import LATENT_SIDE, NORMALISATION, VAE
from imagenet.foreign import luma
from imagenet.weights import check_weights, save_weights
from tvm_ref.cli.errors import UserError, user_errors
from tvm_ref.cli.files import require_new, require_suffix
from tvm_ref.cli.options import OneLineParser, run


def parser() -> OneLineParser:
    """Build the command line."""
    p = OneLineParser("convert.py", __doc__)
    p.add_argument("source", type=Path, help="the released .pkl file")
    p.add_argument("out", type=Path, help="the .safetensors file to write")
    p.add_argument("--preset", choices=list(PRESETS), help="preset of the weights (default: by the file's name)")
    return p


def data_of(config: Config) -> Provenance:
    """Describe the data of released weights: latents of ImageNet, where their size is known."""
    known = NORMALISATION.get(LATENT_SIDE * config.input_size) if config.data == "latents" else None
    return Provenance(config.data, autoencoder=VAE if known else None, normalisation=known)


def convert(source: Path, out: Path, preset: str | None = None) -> Config:
    """Convert a file; return the configuration that its weights need.

    Raises:
        UserError: a file that is refused, or does not hold what it should; `out` exists or is not .safetensors.
    """
    require_suffix(out, ".safetensors")
    require_new(out)
    preset = preset or luma.PRESETS.get(source.stem)
    if preset is None:
        names = ", ".join(f"{name}.pkl" for name in luma.PRESETS)
        raise UserError(f"the name {source.name} is not one of {names}: say the preset with --preset")
    tensors, scaled = luma.read_released(source)
    config = PRESETS[preset] if scaled is None else replace(PRESETS[preset], scaled=scaled)  # the file decides
    with torch.device("meta"):
        expected = build_model(config).network.state_dict()
    with user_errors(source, UserError):
        check_weights(tensors, expected)
    with source.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    tensors = {name: a.float().clone(memory_format=torch.contiguous_format) for name, a in tensors.items()}
    about = {"preset": preset, "source": source.name, "source_sha256": digest, "data": data_of(config).to_json()}
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
