"""Initial weights of a DiT (paper, sec. 4 and table 6)."""

import torch
from torch import Tensor, nn

ZERO = ("adaLN_modulation.1", "final_layer.linear")  # ends of names: these make a new network F = 0
SCALARS = ("t_embedder", "s_embedder", "guidance_embedder")  # beginnings of names


@torch.no_grad()
def initialise(network: nn.Module, time_init: str) -> None:
    """Initialise spectrally, modulation and output as zero, biases as zero, embeddings of labels as N(0, 0.02^2).

    Args:
        network: a DiT.
        time_init: initial embeddings of t, t - s and beta: normal, N(0, 0.02^2), or spectral as the rest.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, nn.Linear | nn.Conv2d):
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if name.endswith(ZERO):
                nn.init.zeros_(module.weight)  # modulation and output: F = 0, every block the identity
            elif name.startswith(SCALARS) and time_init == "normal":
                nn.init.normal_(module.weight, std=0.02)  # table 6: the embeddings of times and beta, in two presets
            else:
                spectral_(module.weight)  # every other layer: largest singular value 1


def spectral_(weight: Tensor) -> None:
    """Fill a weight [out, ...] with Xavier normal numbers, divided by its largest singular value.

    The singular value is the root of the largest eigenvalue of the smaller Gram matrix: far cheaper than all singular
    values, and in float64 exact to 1e-8.
    """
    matrix = weight.flatten(1)
    nn.init.xavier_normal_(matrix)
    wide = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T).double()
    # the singular values of W are the roots of the eigenvalues of W W^T
    matrix /= torch.linalg.eigvalsh(wide @ wide.T)[-1].sqrt()
