"""How a DiT starts (paper, sec. 4 and table 6)."""

import torch
from torch import Tensor, nn

ZERO = ("adaLN_modulation.1", "final_layer.linear")  # ends of names: these make a new network F = 0
SCALARS = ("t_embedder", "s_embedder", "guidance_embedder")  # beginnings of names


@torch.no_grad()
def initialise(network: nn.Module, time_init: str) -> None:
    """Spectral initialisation; zero modulation and output; biases zero, embeddings of labels N(0, 0.02^2).

    Args:
        network: a DiT.
        time_init: of the embeddings of t, t - s and beta: normal, N(0, 0.02^2), or spectral as the rest.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, nn.Linear | nn.Conv2d):
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if name.endswith(ZERO):
                nn.init.zeros_(module.weight)
            elif name.startswith(SCALARS) and time_init == "normal":
                nn.init.normal_(module.weight, std=0.02)
            else:
                spectral_(module.weight)


def spectral_(weight: Tensor) -> None:
    """Fill a weight [out, ...] with Xavier normal numbers, divided by its largest singular value.

    The singular value is the root of the largest eigenvalue of the smaller Gram matrix: far cheaper than all singular
    values, and in float64 exact to 1e-8.
    """
    matrix = weight.flatten(1)
    nn.init.xavier_normal_(matrix)
    wide = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T).double()
    matrix /= torch.linalg.eigvalsh(wide @ wide.T)[-1].sqrt()
