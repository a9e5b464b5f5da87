"""Averages of weights that nobody tracked, found after training from stored ones (Karras et al. 2024, EDM2, sec. 3).

An average of weights is sum_i p_i theta_i with theta_i the weights after step i; its profile p is known whatever they
are. A profile that was not tracked is, nearly, a combination of stored ones. The same combination of the stored
averages is then, as nearly, the average.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Profile = Float[Tensor, " n"]  # entry i is the weight of theta_i, and entry 0 that of the initial weights; float64


def ema_profile(decay: float, steps: int) -> Profile:
    """Return the profile [steps + 1] of an EMA (ema.py) with one update per step."""
    n = torch.arange(steps, dtype=torch.float64)
    d = ((1 + n) / (10 + n)).clamp(max=decay)  # of each update, as EMA.update has it
    # what the average holds of theta_0 to theta_i together is the product of the decays of later updates
    held = torch.cat([d, torch.ones(1, dtype=torch.float64)]).flip(0).cumprod(0).flip(0)
    return torch.diff(held, prepend=torch.zeros(1, dtype=torch.float64))


def power_profile(width: float, steps: int) -> Profile:
    """Return the profile [steps + 1] of an average that grows with training: p_i is proportional to i^gamma (EDM2).

    Args:
        width: standard deviation of i / steps under p: EDM2's sigma_rel, 0.05 to 0.15 there; below 0.28.
        steps: of the training.
    """
    # width^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), a cubic in gamma
    gamma = max(np.roots([1, 7, 16 - width**-2, 12 - width**-2]).real)
    held = torch.linspace(0, 1, steps + 1, dtype=torch.float64) ** (gamma + 1)
    return torch.diff(held, prepend=held[:1])


def combine(stored: list[Profile], wanted: Profile) -> tuple[list[float], float]:
    """Return the coefficients of the combination of stored profiles nearest to a wanted one, and its relative error."""
    profiles = torch.stack(stored, -1)
    # what only rounding tells apart is left out (rcond)
    solution = torch.linalg.lstsq(profiles, wanted[:, None], rcond=1e-6, driver="gelsd").solution[:, 0]
    return solution.tolist(), float((profiles @ solution - wanted).norm() / wanted.norm())
