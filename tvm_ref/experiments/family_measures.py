"""Measure the objectives of the family where the exact flow map is known: their noise, cost, bias and signal.

Residuals and gradients come from the objectives' own code; no formula is repeated here.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tvm_ref.flow_map import Flow, FlowMap
from tvm_ref.guidance import Condition
from tvm_ref.interpolant import interpolate
from tvm_ref.objectives import OBJECTIVES, Objective, ResidualObjective, mean_square
from tvm_ref.seeding import EVALUATION, generator, uniform_numbers
from tvm_ref.shapes import Sample, Time, over
from tvm_ref.time_samplers import Times, TimeSampler
from tvm_ref.toy.config import ToyConfig
from tvm_ref.toy.data.mixture import GaussianMixture
from tvm_ref.toy.training import make_network

# What is measured: name, key of OBJECTIVES, settings
MEMBERS = tuple((name, key, settings) for key, kind in OBJECTIVES.items() for name, settings in kind.method.measured_as)


class ExactNetwork(nn.Module):
    """The exact average velocity F = (psi(x, t, s) - x) / (s - t), u at t = s, plus an offset per sample.

    Args:
        distribution: its flow.
        offset: [B, D] added to F at every (x, t, s); the gradient with respect to it is dL/dF.
    """

    def __init__(self, distribution: GaussianMixture, offset: Tensor | None = None):
        super().__init__()
        self.distribution = distribution
        self.offset = offset

    def forward(self, x: Sample, t: Time, s: Time, condition: Condition | None = None) -> Sample:
        """Return F [B, D]: the velocity where t = s, elsewhere from the solved flow."""
        F, jumps = self.distribution.velocity(x, t), over(t != s, x)
        if bool(jumps.any()):
            average = self.distribution.displacement(x, t, s) / over(torch.where(t == s, 1.0, s - t), x)
            F = torch.where(jumps, average, F)
        return F if self.offset is None else F + self.offset


def batch(
    distribution: GaussianMixture, n: int, times: TimeSampler, *key: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Times]:
    """Draw data [n, D], noise [n, D] and times, seeded by `key`."""
    source = generator(EVALUATION, *key)
    x0 = distribution.sample(n, source)[0].to(dtype)
    x1 = torch.randn(x0.shape, generator=source, dtype=torch.float64).to(dtype)
    return x0, x1, Times(*(a.to(dtype) for a in times.draw(n, source)))


def gradient_at_the_solution(
    key: str,
    settings: dict[str, Any],
    distribution: GaussianMixture,
    x0: Tensor,
    x1: Tensor,
    times: Times,
    whole: bool = False,
) -> Tensor:
    """Return dL/dF [B, D] of every sample's loss, with the exact flow map as model and target.

    L is the term of the jumps, or the whole loss if `whole`. Methods with one residual need only jumps, or none.
    """
    offset = torch.zeros_like(x0, requires_grad=True)
    objective = OBJECTIVES[key](FlowMap(ExactNetwork(distribution, offset)), **settings)
    terms = objective(x0, x1, times, target=FlowMap(ExactNetwork(distribution)))
    loss = terms.total if whole else terms.jump
    return torch.autograd.grad(loss.sum(), offset)[0]


def noise_of_the_loss(key: str, settings: dict[str, Any], distribution: GaussianMixture, samples: int) -> float:
    """Measure the mean ||dL/dF||^2 of the whole loss at the exact flow map, under the method's own times."""
    x0, x1, times = batch(distribution, samples, OBJECTIVES[key].default_times)
    total = 0.0
    for rows in (times.t != times.s, times.t == times.s):
        part = Times(*(a[rows] for a in times))
        if bool(rows.any()):
            gradient = gradient_at_the_solution(key, settings, distribution, x0[rows], x1[rows], part, whole=True)
            total += float(gradient.square().sum())
    return total / samples


def noise_at_the_solution(distribution: GaussianMixture, samples: int) -> dict[str, dict[str, float]]:
    """Measure ||dL/dF||^2 at the exact flow map, of the jump term and of the whole loss, over flow matching's.

    Jumps are TVM's (gap*) for all, and flow matching is at the same x_t; the whole loss has the method's own times. The
    expectation of dL/dF is zero for a method whose solution this is; so this measures the noise of single samples.
    Returns mean, its standard error, and median of every member's jump term, and the mean of its whole loss: where a
    jump tears modes apart its derivative in x is large, and so are the few samples that decide MeanFlow's mean.
    """
    x0, x1, times = batch(distribution, samples, TimeSampler())
    diagonal = Times(times.t, times.t, times.t)
    unit = gradient_at_the_solution("fm", {}, distribution, x0, x1, diagonal, whole=True).square().sum(1).mean()
    whole = noise_of_the_loss("fm", {}, distribution, samples)
    noise = {}
    for name, key, settings in MEMBERS:
        square = gradient_at_the_solution(key, settings, distribution, x0, x1, times).square().sum(1) / unit
        noise[name] = {
            "mean": float(square.mean()),
            "error": float(square.std() / math.sqrt(samples)),
            "median": float(square.median()),
            "whole loss": noise_of_the_loss(key, settings, distribution, samples) / whole,
        }
    return noise


def count_products(work: Callable[[], Any]) -> int:
    """Count the matmuls of a piece of work."""
    from torch.utils.flop_counter import FlopCounterMode  # imports triton: not for --help

    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def step_products(config: ToyConfig, make: Callable[[FlowMap], Objective] | None = None, dim: int = 2) -> float:
    """Return the matmuls of a loss and its gradient, in plain forwards of the same batch; without the optimizer's.

    Times are the configuration's, of evenly spread numbers, so that its fraction with t = s is met; a curriculum is
    averaged over. `make` makes another objective than the configuration's; `dim` is the data's dimension.
    """
    x0, x1, u = torch.randn(64, dim), torch.randn(64, dim), uniform_numbers(64, 4, EVALUATION)
    model = FlowMap(make_network(config, dim, 0))
    target = copy.deepcopy(model).requires_grad_(False)
    objective = config.make_objective(model, None) if make is None else make(model)
    times = config.sampler().from_uniform(u.T)
    with torch.no_grad():
        forward = count_products(lambda: model.velocity(x0, times.t))
    stages = [(i + 0.5) / 20 for i in range(20)] if objective.has_curriculum else [0.0]
    flops = 0
    for progress in stages:
        objective.set_progress(progress)
        flops += count_products(lambda: objective(x0, x1, times, target=target).total.mean().backward())
    return flops / len(stages) / forward


def cost(width: int = 64, depth: int = 4) -> dict[str, float]:
    """Return step_products of every objective, with its own times."""
    return {
        name: step_products(ToyConfig(objective=key, settings=settings, width=width, depth=depth))
        for name, key, settings in (("flow matching", "fm", {}), *MEMBERS)
    }


def adaptive_minimiser(v: Tensor, p: Tensor, eps: float, iterations: int = 300) -> Tensor:
    """Solve E[(F - v) / (||F - v||^2 / D + eps)] = 0 for F [N, D], where the D coordinates of v are independent.

    Coordinate i of sample n is v[n, i, k] with probability p[n, i, k]. As 1/a is the integral of exp(-a y) over y > 0,
    an expectation over the D coordinates becomes a product, and one integral is left. F is found by iterating the
    weighted mean, from E v.
    """
    y = torch.linspace(-28, 0, 400, dtype=torch.float64).exp() * 30 / eps  # exp(-a y) from 1 to 0 for all a >= eps
    log_measure = y.log() - eps * y  # dy = y d(log y), in equal steps of log y
    F = (p * v).sum(-1)
    for _ in range(iterations):
        square = (F[..., None] - v).square() / v.shape[1]  # [N, D, K]
        log_terms = p.log()[..., None] - square[..., None] * y  # [N, D, K, Y]
        log_factor = torch.logsumexp(log_terms, dim=2)  # [N, D, Y]
        mean = ((log_terms - log_factor[:, :, None]).exp() * v[..., None]).sum(2)  # [N, D, Y]
        weight = (log_factor.sum(1) + log_measure).softmax(-1)  # [N, Y], of the y that the D coordinates agree on
        F, before = (mean * weight[:, None]).sum(-1), F
        if float((F - before).abs().max()) < 1e-9:
            break
    return F


def adaptive_bias(dim: int, mass: float, samples: int, *, t: float = 0.8, eps: float = 1e-3) -> float:
    """Return the bias of MeanFlow's adaptive weight at s = t: RMS of F - u over the deviation of v given x_t.

    Each coordinate of the data is one of two values, of probability `mass` and 1 - mass, of mean 0 and variance 1,
    independent of the others: given x_t, so is each coordinate of v.
    """
    a, b = -math.sqrt((1 - mass) / mass), math.sqrt(mass / (1 - mass))
    source = generator(EVALUATION, dim)
    points, masses = torch.tensor([a, b], dtype=torch.float64), torch.tensor([mass, 1 - mass], dtype=torch.float64)
    x0 = points[torch.multinomial(masses, samples * dim, replacement=True, generator=source)].view(samples, dim)
    x = (1 - t) * x0 + t * torch.randn(x0.shape, generator=source, dtype=torch.float64)
    p = (masses.log() - (x[..., None] - (1 - t) * points).square() / (2 * t**2)).softmax(-1)
    v = (x[..., None] - points) / t
    u = (p * v).sum(-1)
    deviation = (p * (v - u[..., None]).square()).sum(-1).mean().sqrt()
    return float((adaptive_minimiser(v, p, eps) - u).square().mean().sqrt() / deviation)


def adaptive_velocity(
    mixture: GaussianMixture, x: Tensor, t: Tensor, eps: float = 1e-3, iterations: int = 100
) -> Tensor:
    """Solve E[(F - v) / (||F - v||^2 / D + eps) | x_t = x] = 0 for F [N, D], of a mixture without classes.

    Given x_t and the component k, v is N(mu_k, tau^2 I). As 1/a is the integral of exp(-a y) over y > 0, F is the mean
    of the mu_k with weights

        P(k | x) int exp(-eps y) q^(D/2 + 1) exp(-q y ||F - mu_k||^2 / D) dy,    q = 1 / (1 + 2 tau^2 y / D),

    and is found by iterating this formula, from u = E v.
    """
    m, t, dim = mixture.centres, t[:, None, None], mixture.dim
    variance = (1 - t) ** 2 * mixture.sigma**2 + t**2  # of x_t given k [N, 1, 1]
    residual = x[:, None] - (1 - t) * m  # [N, K, D]
    mu = (t - (1 - t) * mixture.sigma**2) / variance * residual - m
    log_posterior = (mixture.log_weights - residual.square().sum(2) / (2 * variance[:, 0])).log_softmax(1)
    y = torch.linspace(-20, 0, 40, dtype=torch.float64).exp() * 30 / eps  # in equal steps of log y
    q = 1 / (1 + 2 * mixture.sigma**2 / variance * y / dim)  # tau^2 = sigma^2 / variance; [N, 1, Y]
    log_measure = y.log() - eps * y + (dim / 2 + 1) * q.log()
    F = torch.einsum("nk,nkd->nd", log_posterior.exp(), mu)
    for _ in range(iterations):
        square = (F[:, None] - mu).square().sum(2, keepdim=True) / dim  # [N, K, 1]
        weight = (log_posterior + torch.logsumexp(log_measure - q * y * square, dim=2)).softmax(1)
        F, before = torch.einsum("nk,nkd->nd", weight, mu), F
        if float((F - before).abs().max()) < 1e-6:
            break
    return F


def line_with_velocity(x: Sample, t: Time, velocity: Sample) -> tuple[Sample, Sample]:
    """Return x0 and x1 [B, D] whose line passes x at time t with a given velocity: x_t = x and x1 - x0 = velocity.

    For a method that uses the data at one x_t, this replaces the random v by an exact velocity.
    """
    return x - over(t, x) * velocity, x + over(1 - t, x) * velocity


class Gradients(NamedTuple):
    """Statistics of the gradients of some jumps' loss, see gradients_of_jumps."""

    noise_scale: float | None
    cosine: float | None


def gradients_of_jumps(
    model: FlowMap, distribution: GaussianMixture, gaps: Sequence[float], chunks: int = 32, size: int = 256
) -> dict[str, list[Gradients]]:
    """Measure, by t - s, noise and direction of the gradient of the jump term; the model is its own target.

    The noise scale is the batch at which noise is as large as signal: tr(covariance of one sample's gradient) /
    ||mean gradient||^2 (McCandlish and others, 1812.06162). The cosine is that between the mean gradient and the
    gradient of the true error E||X - psi||^2 of the same jumps: 1 if a step of the method lowers it as fast as can be.
    Norms are estimated without bias from the gradients of `chunks` batches of `size`; None where noise and signal
    would be equal with as many samples as these, or more. Under "exact u" the oracle's velocity stands for the
    target's, or for v; the latter is MeanFlow's own gradient in the mean over v, which it is linear in.

    Args:
        model: a flow map.
        distribution: the data.
        gaps: t - s of the jumps; s is uniform on what is left.
        chunks: batches.
        size: samples of each.
    """
    model = copy.deepcopy(model).requires_grad_(True)
    target = copy.deepcopy(model).requires_grad_(False)
    members = [m for m in MEMBERS if m[1] not in ("pid", "sct", "lsd", "shortcut")]  # other jumps; TVM's; PSD's
    found: dict[str, list[Gradients]] = {name: [] for name, *_ in members}
    found |= {f"{name}, exact u": [] for name, key, settings in members if takes_exact_velocity(key, settings)}
    for gap in gaps:
        n, sampler = chunks * size, TimeSampler("triangle")
        x0, x1, (u, _, fraction) = batch(distribution, n, sampler, 3, dtype=torch.float32)
        s = u.square() * (1 - gap)  # u^2 is uniform: u is the larger of two uniform times
        times = Times(s + gap, s, fraction)
        x = interpolate(x0, x1, times.t)
        lines = line_with_velocity(x, times.t, distribution.velocity(x, times.t))
        error = mean_square(model.jump(x, times.t, s) - distribution.jump(x, times.t, s))
        true = flat_gradient(error, model)
        for name, key, settings in members:
            objective = OBJECTIVES[key](model, **settings)
            found[name].append(_compare(objective, target, (x0, x1), times, true, size))
            if takes_exact_velocity(key, settings):
                found[f"{name}, exact u"].append(_compare(objective, distribution, lines, times, true, size))
    return found


def takes_exact_velocity(key: str, settings: dict[str, Any]) -> bool:
    """Return whether a method uses only u of the target, or has a gradient linear in v."""
    asks = key == "tvm" or (key == "esd" and settings.get("stops") in ("convex", "all"))
    return asks or (key in ("meanflow", "imf") and settings.get("power") == 0)


def flat_gradient(loss: Tensor, model: FlowMap) -> Tensor:
    """Return the gradient of the mean of losses [B] with respect to all of the model's weights, as a vector."""
    gradients = torch.autograd.grad(loss.mean(), list(model.parameters()), allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in gradients]).double()


def _compare(
    objective: Objective, target: Flow, ends: tuple[Tensor, Tensor], times: Times, true: Tensor, size: int
) -> Gradients:
    parts = torch.arange(len(times.t)).split(size)
    losses = (objective(*(a[p] for a in ends), Times(*(a[p] for a in times)), target=target) for p in parts)
    residual = isinstance(objective, ResidualObjective)
    model: Any = objective.flow_map
    gradients = torch.stack([flat_gradient(terms.total if residual else terms.jump, model) for terms in losses])
    variance = gradients.var(0).sum()  # of a mean over `size` samples
    mean = gradients.mean(0)
    signal = mean.square().sum() - variance / len(parts)
    if signal <= variance / len(parts):
        return Gradients(None, None)
    return Gradients(float(size * variance / signal), float(mean @ true / (signal.sqrt() * true.norm())))
