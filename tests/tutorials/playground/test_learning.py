"""The JavaScript that computes and learns in the page, run by node: its numbers are PyTorch's."""

import json
import shutil
import subprocess

import pytest
import torch

from tutorials.playground.page import PARTS, flatten
from tvm_ref.flow_map import FlowMap
from tvm_ref.objectives.tvm import TVM
from tvm_ref.sampling import EulerStep
from tvm_ref.time_samplers import Times, TimeSampler
from tvm_ref.toy.data.distributions import make_distribution
from tvm_ref.toy.network import ToyNetwork

NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="no node here (Debian: apt-get install nodejs)")
TIGHT = {"rtol": 1e-5, "atol": 1e-6}


def run_js(expression: str, *values, files: tuple[str, ...] = ("network.js", "learn.js")):
    """The value of an expression in A, B, ... (what `values` hold), after the page's own files."""
    code = "".join((PARTS / name).read_text(encoding="utf-8") for name in files)
    given = [value.tolist() if isinstance(value, torch.Tensor) else value for value in values]
    letters = ", ".join("ABCDEFGH"[: len(given)])
    code += f"""
        const numbers = a => Float64Array.from(a), [{letters}] = JSON.parse(require('fs').readFileSync(0));
        console.log(JSON.stringify({expression}));"""
    done = subprocess.run([NODE, "-e", code], input=json.dumps(given), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def make_model(width: int, depth: int) -> FlowMap:
    """A model whose last layer and biases are not zero, in float64."""
    network = ToyNetwork(width=width, depth=depth).double()
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1 + 0.9 / p.shape[-1] ** 0.5)
    return FlowMap(network)


def flat(model: FlowMap) -> list[float]:
    return flatten(model.network.state_dict(), len(model.network.hidden)).tolist()


def draw(n: int):
    """x0, x1, t, s, s' in float64, one sample with t = s."""
    x0, x1 = torch.randn(2, n, 2, dtype=torch.float64)
    times = [a.double() for a in TimeSampler().draw(n)]
    times[1][0] = times[0][0]
    return x0, x1, Times(*times)


@pytest.mark.parametrize(("width", "depth", "n"), [(64, 3, 32), (17, 2, 5), (8, 1, 2)])
def test_the_loss_and_its_gradient_are_those_of_tvm(width, depth, n):
    """Both terms and the gradient through d/ds f, with a target that is another network."""
    model, target = make_model(width, depth), make_model(width, depth)
    x0, x1, times = draw(n)
    terms = TVM(model)(x0, x1, times, target=target)
    terms.total.mean().backward()
    gradients = {name: p.grad for name, p in model.network.named_parameters()}
    expected = flatten({"projection": torch.zeros_like(model.network.projection)} | gradients, depth)
    batch = {"x0": x0.flatten(), "x1": x1.flatten(), "t": times.t, "s": times.s, "sPrime": times.s_prime}
    batch = {name: value.tolist() for name, value in batch.items()}
    losses, gradient = run_js(
        f"""(() => {{
            for (const name in C) C[name] = numbers(C[name]);
            const make = a => new Network(numbers(a), {width}, {depth}), gradient = new Float64Array(A.length);
            return [tvmLoss(make(A), make(B), C, gradient), [...gradient]];
        }})()""",
        flat(model), flat(target), batch,
    )  # fmt: skip
    assert losses == pytest.approx([terms.jump.mean().item(), terms.flow_matching.mean().item()], rel=1e-5)
    gradient = torch.tensor(gradient, dtype=torch.float64)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert float((gradient - expected).norm() / expected.norm()) < 1e-5


def test_times_are_drawn_as_gap_star_draws():
    """Means, spreads and extremes of t, s, s' and t - s, within five standard errors."""
    n = 40_000
    actual = torch.tensor(run_js(f"(r => Array.from({{ length: {n} }}, () => drawTimes(r)))(makeRandom(3))"))
    expected = TimeSampler().draw(n)
    for a, b in zip([*actual.T, actual[:, 0] - actual[:, 1]], [*expected, expected.t - expected.s], strict=True):
        for moment in (1, 2, 3):
            difference = a.pow(moment).mean() - b.pow(moment).mean()
            assert abs(difference) < 5 * b.pow(moment).std() * (2 / n) ** 0.5
    assert bool((actual[:, 1] <= actual[:, 0]).all())
    assert float(actual.max()) <= 1


def test_a_model_is_sampled_as_pytorch_samples_it():
    """The jump, d/ds f and u, and Euler's step; at both ends, at t = s, and with weights as a page stores them."""
    model, oracle = make_model(17, 3), make_distribution("moons")
    x = 2 * torch.randn(20, 2, dtype=torch.float64)
    times = torch.tensor([(1, 0), (0, 0), (0.7, 0.7), (0.6, 0.25), (1, 0.9)], dtype=torch.float64)
    mixture = torch.cat([oracle.centres, oracle.log_weights[:, None]], dim=1).flatten()
    results = run_js(
        f"""(() => {{
            const model = new Model(new Network(numbers(A), 17, 3), true), mixture = new Mixture(D, {oracle.sigma});
            const x = numbers(B.flat()), exact = (t, s) => B.flatMap(([x, y]) => mixture.path(x, y, t, s).at(-1));
            return C.map(([t, s]) => [model.jump(x, t, s), model.terminalVelocity(x, t, s), model.velocity(x, t),
                model.jump(x, t, s, true), exact(t, s)].map(a => [...a]));
        }})()""",
        flat(model), x, times, mixture, files=("network.js", "model.js"),
    )  # fmt: skip
    for (t, s), actual in zip(times, results, strict=True):
        t, s = t.expand(len(x)), s.expand(len(x))
        rate = model.displacement_and_terminal_velocity(x, t, s)[1]
        expected = [model.jump(x, t, s), rate, model.velocity(x, t), EulerStep(model)(x, t, s), oracle.jump(x, t, s)]
        for a, b in zip(actual, expected, strict=True):
            a = torch.tensor(a, dtype=torch.float64).view(-1, 2)
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().clamp_min(1).item())


def test_the_cloud_and_its_density_are_the_mixtures():
    """The cloud is solved with fewer steps and interpolated, for speed: to 1e-3 of a data's standard deviation."""
    oracle, x = make_distribution("moons"), torch.randn(50, 2, dtype=torch.float64)
    mixture, times = torch.cat([oracle.centres, oracle.log_weights[:, None]], dim=1), [1.0, 0.93, 0.5, 0.111, 0.0]
    clouds, grid = run_js(
        f"""(() => {{
            const mixture = new Mixture(A, {oracle.sigma}), cloud = new ExactCloud(mixture, B);
            while (!cloud.solved) cloud.advance();
            return [C.map(time => [...cloud.at(time)]), [...mixture.density(0.3, 8, 2)]];
        }})()""",
        mixture.flatten(), x.flatten(), times, files=("network.js", "model.js"),
    )  # fmt: skip
    for time, actual in zip(times, clouds, strict=True):
        expected = oracle.jump(x, torch.ones(50), torch.full((50,), time))
        torch.testing.assert_close(torch.tensor(actual, dtype=torch.float64).view(-1, 2), expected, rtol=0, atol=1e-3)
    middles = (torch.arange(8, dtype=torch.float64) + 0.5) / 2 - 2
    y, x = torch.meshgrid(-middles, middles, indexing="ij")  # rows from the top
    expected = oracle.log_density(torch.stack([x, y], -1).view(-1, 2), torch.full((64,), 0.3)).exp()
    actual = torch.tensor(grid, dtype=torch.float64)
    torch.testing.assert_close(actual / actual.sum(), expected / expected.sum(), rtol=1e-3, atol=1e-6)


def test_learning_lowers_the_loss():
    """On two far clusters: from that of a Gaussian to nearly the floor of flow matching."""
    losses = run_js("(l => Array.from({ length: 150 }, () => l.learn()[1]))(new Learner([-1, 1, 1, -1], 0.1, 150))")
    assert sum(losses[-30:]) / 30 < 0.8 * sum(losses[:30]) / 30
