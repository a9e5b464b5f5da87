"""Features of images for FID and related metrics: the Inception network of 2015, from torch-fidelity.

`pool` [B, 2048] is for FID, precision and recall; `logits` [B, 1008] for the inception score, without the last layer's
bias, as in the first implementations.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tvm_ref.cli.errors import require, user_errors

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d"  # start of the digest of these weights: no other network is accepted
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS}"


class Features(NamedTuple):
    """The features of a batch of images: [B, ...] each."""

    pool: Tensor
    logits: Tensor


Extractor = Callable[[Tensor], Features]  # of images uint8 [B, 3, H, W]


class Inception:
    """The extractor of published FID scores.

    Args:
        weights: file of the weights; None: the download folder of torch.hub.
        device: device to run on.

    Raises:
        UserError: torch-fidelity is not installed, or the weights are not there, or are others.
    """

    def __init__(self, weights: Path | None = None, device: str | torch.device = "cpu"):
        with user_errors("FID needs torch-fidelity (pip install -e '.[imagenet]')", ImportError):
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        weights = weights or Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS
        check_weights(weights)
        layers = ["2048", "logits_unbiased"]
        self.network = FeatureExtractorInceptionV3("inception", layers, feature_extractor_weights_path=str(weights))
        self.network.to(device).eval().requires_grad_(False)
        self.device = device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Extract features of images uint8 [B, 3, H, W], on the CPU; they are resized to 299 x 299 as by TensorFlow."""
        pool, logits = self.network(images.to(self.device))
        return Features(pool.cpu(), logits.cpu())


def check_weights(path: Path) -> None:
    """Check that a file holds the weights of 2015's Inception, and nothing that loading would execute.

    Raises:
        UserError: no such file, another one, or one that does more than hold weights.
    """
    there = path.is_file()
    require(there, f"the weights of Inception are not here ({path}): fetch {URL}, and give its path as inception")
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    right = digest.startswith(SHA256)
    require(right, f"{path} is not Inception as published figures use it (sha256 {digest[:8]}, not {SHA256})")
    # torch-fidelity loads it with weights_only=False, and the beginning of a checksum can be forged
    with user_errors(f"{path} holds more than weights", Exception):
        torch.load(path, map_location="cpu", weights_only=True)
