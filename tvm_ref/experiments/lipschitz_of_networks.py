"""Measure int L of networks, plain and tamed by RMSNorm and spectral initialisation (sec. 4, in the small).

Theorem 1 grows with exp(2 int L); the paper tames L by RMSNorm (appendix B.1) and by how weights begin. Here both are
put into the toy's MLP, one at a time and together, and int L is measured before and after training.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tvm_ref.bound.chain import Bound, measure
from tvm_ref.bound.lipschitz import jacobian_norms
from tvm_ref.bound.paths import at, integral, time_grid
from tvm_ref.cli.progress import progress
from tvm_ref.flow_map import FlowMap
from tvm_ref.interpolant import interpolate
from tvm_ref.toy.config import ToyConfig
from tvm_ref.toy.data.mixture import GaussianMixture, exact_path
from tvm_ref.toy.network import ToyNetwork
from tvm_ref.toy.training import Training

EPSILON = 1e-6  # of RMSNorm, as is usual in float32


class Taming(NamedTuple):
    """What is done to a plain MLP.

    Attributes:
        rms_norm: normalise each hidden layer's output before its activation.
        spectral: start with hidden weights of spectral norm min(1, sqrt(outputs / inputs)) and biases of zero.
    """

    rms_norm: bool
    spectral: bool


TAMINGS = {
    "plain MLP": Taming(rms_norm=False, spectral=False),
    "RMSNorm": Taming(rms_norm=True, spectral=False),
    "spectral initialisation": Taming(rms_norm=False, spectral=True),
    "both": Taming(rms_norm=True, spectral=True),
}


class RMSNorm(nn.Module):
    """RMSNorm without weights, y = x / sqrt(mean(x^2) + eps): Lipschitz with constant 1 / sqrt(eps) (appendix B.1)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis of x [..., D]; of plain operations, so that a JVP passes through."""
        return x * (x.square().mean(-1, keepdim=True) + EPSILON).rsqrt()


@torch.no_grad()
def spectral_initialisation(linear: nn.Linear) -> None:
    """Scale W to the spectral norm min(1, sqrt(outputs / inputs)): then layers neither grow nor mute their input."""
    target = min(1.0, (linear.out_features / linear.in_features) ** 0.5)
    linear.weight.mul_(target / torch.linalg.matrix_norm(linear.weight, 2))
    nn.init.zeros_(linear.bias)


def tame(network: ToyNetwork, taming: Taming) -> ToyNetwork:
    """Change a network's hidden layers in place, and return it."""
    for i, layer in enumerate(network.hidden):
        assert isinstance(layer, nn.Linear)
        if taming.spectral:
            spectral_initialisation(layer)
        if taming.rms_norm:
            network.hidden[i] = nn.Sequential(layer, RMSNorm())
    return network


class TamedTraining(Training):
    """Training of a tamed network."""

    def __init__(self, config: ToyConfig, distribution: GaussianMixture, taming: Taming):
        self.taming = taming
        super().__init__(config, distribution)

    def _make_network(self) -> ToyNetwork:
        return tame(super()._make_network(), self.taming)


def at_random(config: ToyConfig, distribution: GaussianMixture, taming: Taming) -> FlowMap:
    """Make a network as initialised, except for its last layer, which is drawn as the others are: its own is zero."""
    model = TamedTraining(config, distribution, taming).model
    output = model.network.output
    assert isinstance(output, nn.Linear)
    nn.Linear.reset_parameters(output)
    if taming.spectral:
        spectral_initialisation(output)
    return model


def diagnose(
    config: ToyConfig, distribution: GaussianMixture, x0: Tensor, x1: Tensor, *, t: float, steps: int
) -> dict[str, dict[str, Any]]:
    """Measure the chain of each taming, at random and trained: {taming: {"random": figures, "trained": figures}}.

    Raises:
        FloatingPointError: training that diverges.
    """
    scale = distribution.time_scale
    results: dict[str, dict[str, Any]] = {}
    with progress(total=len(TAMINGS) * config.steps, unit="step", desc="training") as bar:
        for name, taming in TAMINGS.items():
            bar.set_postfix_str(name)
            model = at_random(config, distribution, taming)
            random = measure(model, distribution, x0, x1, t=t, scale=scale, steps=steps)
            training = TamedTraining(config, distribution, taming)
            while training.step < config.steps:
                training.train_step()
                bar.update()
            trained = measure(training.ema.module, distribution, x0, x1, t=t, scale=scale, steps=steps)
            results[name] = {"random": figures(random), "trained": figures(trained)}
    return results


def exact_lipschitz(distribution: GaussianMixture, x0: Tensor, x1: Tensor, *, t: float, steps: int) -> dict[str, float]:
    """Measure int L and the largest L of the exact u along its own paths: a model that has learned u has no less."""
    scale = distribution.time_scale
    s = time_grid(t, scale, steps)
    largest = []
    for time, y in zip(s, exact_path(distribution, interpolate(x0, x1, at(s[-1], x0)), s, scale), strict=True):
        now = at(time, y)
        largest.append(float(jacobian_norms(partial(distribution.velocity, t=now), y).max()))
    L = torch.tensor(largest, dtype=s.dtype)
    return {"path_lipschitz": float(integral(L, s)), "largest_lipschitz": float(L.max())}


def figures(bound: Bound) -> dict[str, Any]:
    """Pick what the diagnostic keeps of a measurement."""
    return {
        "path_lipschitz": bound.path_length,
        "largest_lipschitz": float(bound.lipschitz.max()),
        **bound.values,
        "violations": bound.violations(),
    }


def table(results: dict[str, dict[str, Any]], exact: dict[str, float]) -> str:
    """Format the diagnostic as a table, the exact flow in its last line."""
    lines = [
        f"{'':<24}{'untrained':^17}  {'trained':^60}",
        f"{'':<24}{'int L':>8}{'max L':>9}  {'int L':>8}{'max L':>9}"
        f"{'W2':>9}{'displ.':>9}{'one-sided':>12}{'global':>13}",
    ]
    for name, states in results.items():
        before, after = states["random"], states["trained"]
        lines.append(
            f"{name:<24}{before['path_lipschitz']:>8.2f}{before['largest_lipschitz']:>9.2f}  "
            f"{after['path_lipschitz']:>8.2f}{after['largest_lipschitz']:>9.2f}{after['w2']:>9.3f}"
            f"{after['displacement']:>9.3f}{after['pathwise_one_sided']:>12.3g}{after['global']:>13.3g}"
        )
    lines.append(f"{'exact flow':<43}{exact['path_lipschitz']:>8.2f}{exact['largest_lipschitz']:>9.2f}")
    return "\n".join(lines)
