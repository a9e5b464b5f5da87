"""A small autoencoder with random weights, of the kind that encode.py and sample.py load."""

import torch
from diffusers import AutoencoderKL


def tiny_vae(seed: int = 0) -> AutoencoderKL:
    """An AutoencoderKL for 3 channels with 4 latent channels, half the side of the image."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            layers_per_block=1,
        )
    return vae.eval().requires_grad_(False)
