"""The autoencoder of latents: loading, encoding, decoding, and the normalisation of its latents."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tvm_ref.cli.errors import require, user_errors

LATENT_SIDE = 8  # pixels of the image per number of the latent
VAE = "stabilityai/sd-vae-ft-ema"


@dataclass(frozen=True)
class Normalisation:
    """The model's latents are (raw - mean) / std, channel by channel; raw latents are the autoencoder's.

    Attributes:
        mean: one number per channel.
        std: one number per channel, positive.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        finite = all(math.isfinite(a) for a in (*self.mean, *self.std))
        sound = len(self.mean) == len(self.std) and finite and all(s > 0 for s in self.std)
        require(sound, f"a normalisation needs a finite mean and a finite, positive std per channel, got {self}")

    def normalise(self, raw: Tensor) -> Tensor:
        """Scale raw latents [..., C, H, W] to those that the model sees."""
        return (raw - _over_channels(self.mean, raw)) / _over_channels(self.std, raw)

    def denormalise(self, x: Tensor) -> Tensor:
        """Undo normalise."""
        return x * _over_channels(self.std, x) + _over_channels(self.mean, x)


NORMALISATION = {  # of sd-vae-ft-ema on ImageNet, by image size
    256: Normalisation((0.86488, -0.27787343, 0.21616915, 0.3738409), (4.85503674, 5.31922414, 3.93725398, 3.9870003)),
    512: Normalisation((1.56, -0.695, 0.483, 0.729), (5.27, 5.91, 4.21, 4.31)),
}


def _over_channels(values: Sequence[float], x: Tensor) -> Tensor:
    """Shape a number per channel to be broadcast over x [..., C, H, W]."""
    return x.new_tensor(values).view(-1, 1, 1)


def load_vae(name: str = VAE) -> nn.Module:
    """Load a diffusers AutoencoderKL from a folder or, where there is a network, by its name on the Hugging Face hub.

    Raises:
        ValueError: diffusers is not installed, or no such autoencoder can be loaded.
    """
    with user_errors("the autoencoder needs diffusers (pip install -e '.[imagenet]')", ImportError):
        from diffusers import AutoencoderKL
    with user_errors(f"no autoencoder {name} here, and it could not be fetched", OSError, ValueError):
        vae = AutoencoderKL.from_pretrained(name, low_cpu_mem_usage=False)  # True prints a plea for accelerate
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode(vae: nn.Module, images: Tensor) -> Tensor:
    """Encode images uint8 [B, 3, H', W'] as posteriors [B, 2, C, H, W]: mean and standard deviation."""
    posterior = vae.encode(images.to(_dtype(vae)) / 127.5 - 1).latent_dist  # type: ignore[operator]
    return torch.stack([posterior.mean, posterior.std], 1)


@torch.no_grad()
def decode(vae: nn.Module, x: Tensor, normalisation: Normalisation) -> Tensor:
    """Decode normalised latents x [B, C, H, W] as images [B, 3, H', W'] with values about [-1, 1]."""
    return vae.decode(normalisation.denormalise(x).to(_dtype(vae))).sample.float()  # type: ignore[operator]


def _dtype(module: nn.Module) -> torch.dtype:
    """Return the data type of a module's weights."""
    return next(module.parameters()).dtype
