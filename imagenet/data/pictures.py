"""Images as pixels, and grids of them."""

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

GAP = 1  # pixels between images, before enlarging
SMALL = 480  # grids narrower than this are enlarged

Pixels = NDArray[np.uint8]  # [B, H, W, 3]


def to_pixels(x: Float[Tensor, "n c h w"]) -> Pixels:
    """Convert images with values about [-1, 1] to uint8 [N, H, W, 3]: one channel is grey, three are colours.

    Of latents these are the first three channels, at half contrast.
    """
    x = x.float().cpu()
    if x.shape[1] not in (1, 3):
        x = x[:, :3] / 2
    x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def grid(images: Pixels, columns: int) -> Pixels:
    """Arrange images [N, H, W, 3] in rows of `columns`, on white, as one image [H', W', 3]."""
    n, h, w, _ = images.shape
    rows = -(-n // columns)
    canvas = np.full((rows * (h + GAP) + GAP, columns * (w + GAP) + GAP, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = GAP + i // columns * (h + GAP), GAP + i % columns * (w + GAP)
        canvas[y : y + h, x : x + w] = image
    factor = max(1, -(-SMALL // canvas.shape[1]))
    return canvas.repeat(factor, 0).repeat(factor, 1)
