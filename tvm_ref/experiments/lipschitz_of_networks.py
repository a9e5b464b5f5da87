"""Measure int L of networks, plain and Lipschitz-controlled by RMSNorm and spectral initialisation (sec. 4, in 2D).

    python -m tvm_ref.experiments.lipschitz_of_networks --dist moons    trains four networks, 1,500 steps each

Theorem 1 grows with exp(2 int L); the paper controls L by RMSNorm (appendix B.1) and by how weights are initialised.
Here both are put into the toy's MLP, one at a time and together, and int L is measured before and after training.
Writes lipschitz.json. L is the largest slope seen on the paths, an estimate from below.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tvm_ref.bound.chain import Bound, measure
from tvm_ref.bound.lipschitz import jacobian_norms
from tvm_ref.bound.measuring import Measuring, to_json
from tvm_ref.bound.paths import at, integral
from tvm_ref.cli.errors import user_files
from tvm_ref.cli.files import write_atomically
from tvm_ref.cli.options import run
from tvm_ref.cli.progress import progress
from tvm_ref.exact_flow import exact_path
from tvm_ref.experiments.bound_over_training import end, make_parser, prepare
from tvm_ref.flow_map import FlowMap
from tvm_ref.toy.config import ToyConfig, use_one_thread
from tvm_ref.toy.data.mixture import GaussianMixture
from tvm_ref.toy.network import ToyNetwork
from tvm_ref.toy.training import Training

STEPS = 1500  # of training for each network, unless --steps says otherwise
EPSILON = 1e-6  # of RMSNorm, as is usual in float32


class Control(NamedTuple):
    """Changes to a plain MLP that keep its Lipschitz constant small.

    Attributes:
        rms_norm: normalise each hidden layer's output before its activation.
        spectral: start with hidden weights of spectral norm min(1, sqrt(outputs / inputs)) and biases of zero.
    """

    rms_norm: bool
    spectral: bool


CONTROLS = {
    "plain MLP": Control(rms_norm=False, spectral=False),
    "RMSNorm": Control(rms_norm=True, spectral=False),
    "spectral initialisation": Control(rms_norm=False, spectral=True),
    "both": Control(rms_norm=True, spectral=True),
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


def apply_control(network: ToyNetwork, control: Control) -> ToyNetwork:
    """Change a network's hidden layers in place, and return it."""
    for i, layer in enumerate(network.hidden):
        assert isinstance(layer, nn.Linear)
        if control.spectral:
            spectral_initialisation(layer)
        if control.rms_norm:
            network.hidden[i] = nn.Sequential(layer, RMSNorm())
    return network


class ControlledTraining(Training):
    """Training of a Lipschitz-controlled network."""

    def __init__(self, config: ToyConfig, distribution: GaussianMixture, control: Control):
        self.control = control
        super().__init__(config, distribution)

    def _make_network(self) -> ToyNetwork:
        return apply_control(super()._make_network(), self.control)


def at_random(config: ToyConfig, distribution: GaussianMixture, control: Control) -> FlowMap:
    """Make a network as initialised, except for its last layer, which is drawn as the others are: its own is zero."""
    model = ControlledTraining(config, distribution, control).model
    output = model.network.output
    assert isinstance(output, nn.Linear)
    nn.Linear.reset_parameters(output)
    if control.spectral:
        spectral_initialisation(output)
    return model


def diagnose(config: ToyConfig, measuring: Measuring) -> dict[str, dict[str, Any]]:
    """Measure the chain of each network, at random and trained: {control: {"random": metrics, "trained": metrics}}.

    Raises:
        FloatingPointError: training that diverges.
    """
    distribution = config.make_distribution()
    draws, s = measuring.draw(distribution), measuring.times(distribution)

    def metrics_of(model: FlowMap) -> dict[str, Any]:
        return metrics(measure(model, distribution, draws, s, distribution.time_scale))

    results: dict[str, dict[str, Any]] = {}
    with progress(total=len(CONTROLS) * config.steps, unit="step", desc="training") as bar:
        for name, control in CONTROLS.items():
            bar.set_postfix_str(name)
            random = metrics_of(at_random(config, distribution, control))
            training = ControlledTraining(config, distribution, control)
            while training.step < config.steps:
                training.train_step()
                bar.update()
            results[name] = {"random": random, "trained": metrics_of(training.ema.module)}
    return results


def exact_lipschitz(distribution: GaussianMixture, measuring: Measuring) -> dict[str, float]:
    """Measure int L and the largest L of the exact u along its own paths: a model that has learned u has no less."""
    s = measuring.times(distribution)
    start = measuring.draw(distribution).at(s[-1])
    largest = []
    for time, y in zip(s, exact_path(distribution, start, s, distribution.time_scale), strict=True):
        largest.append(float(jacobian_norms(partial(distribution.velocity, t=at(time, y)), y).max()))
    L = torch.tensor(largest, dtype=s.dtype)
    return {"path_lipschitz": float(integral(L, s)), "largest_lipschitz": float(L.max())}


def metrics(bound: Bound) -> dict[str, Any]:
    """Pick what is kept of a measurement."""
    return {
        "path_lipschitz": bound.path_length,
        "largest_lipschitz": float(bound.lipschitz.max()),
        **bound.values,
        "violations": bound.violations(),
    }


def table(results: dict[str, dict[str, Any]], exact: dict[str, float]) -> str:
    """Format the metrics as a table, the exact flow in its last line."""
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


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 done, 1 a violated link."""
    command = make_parser("lipschitz_of_networks", __doc__)
    arguments = command.parse_args(argv)
    use_one_thread()
    with command.errors(), user_files():
        config, measuring, out = prepare(arguments, "lipschitz", "lipschitz.json", steps=STEPS)
    with command.errors():
        results = diagnose(config, measuring)
        exact = exact_lipschitz(config.make_distribution(), measuring)
        report: dict[str, Any] = {"t": measuring.time, "points": measuring.points, "grid": measuring.grid}
        report |= {"training_steps": config.steps, "networks": results, "exact_flow": exact}
        write_atomically(out / "lipschitz.json", to_json(report))
    print(table(results, exact))
    print(f"L is the largest slope seen on the paths, an estimate from below; lipschitz.json: {out}")
    measured = [(f"{name}, {state}", m) for name, states in results.items() for state, m in states.items()]
    return end(command, [f"{what}: {link}" for what, m in measured for link in m["violations"]])


if __name__ == "__main__":
    run(main)
