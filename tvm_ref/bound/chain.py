"""The 2-Wasserstein bound (theorem 1, proved in appendix A.4): every inequality of the proof, with every constant.

The model carries a point x_t to X_s = x_t + f(x_t, t, s), the exact flow to Y_s = psi(x_t, t, s). With the vectors

    a(s) = d/ds f(x_t, t, s) - u_theta(X_s, s)      the terminal velocity residual, on the model's path
    b(s) = u_theta(Y_s, s) - u(Y_s, s)              the flow-matching residual, on the exact path
    e(s) = X_s - Y_s,    e(t) = 0                   the displacement error

for which de/ds = a + b + u_theta(X_s, s) - u_theta(Y_s, s), the terms, all distances, are (norms over dimensions, E and
RMS over points)

    w2                   W2 between the points X_0 and Y_0, by the library POT
    displacement         sqrt(E ||e(0)||^2)                                                 (eq. 36-38)
    terminal_velocity    sqrt(t int_0^t E ||d/ds f - u(Y_s, s)||^2 ds)                      (eq. 7)
    mean_square          int_0^t exp(int_0^s M) sqrt(E ||a + b||^2) ds,   M = -E<du, dx> / E||dx||^2
    pathwise_one_sided   RMS of int_0^t exp(int_0^s m) ||a + b|| ds,   m = -<du, dx> / ||dx||^2
    pathwise_two_sided   the same with ||du|| / ||dx|| for m
    global               sqrt(int_0^t lambda(s) E(||a||^2 + ||b||^2) ds),   lambda = 2 t exp(2 int_0^s L)    (theorem 1)
    global_from_loss     sqrt(int_0^t lambda(s) L_TVM(t, s) ds + C),   C = -int_0^t lambda(s) E||v - u||^2 ds

with dx = X_s - Y_s and du = u_theta(X_s, s) - u_theta(Y_s, s). w2 <= displacement <= each of the others; LINKS has all
inequalities. global_from_loss estimates global from draws, so it may be on either side of it. M is the mean of m,
weighted by squared error. The weights keep single paths along a border between modes, where the field is steep, from
dominating M; they can dominate the path-wise bounds.

Groenwall's inequality needs only ||a + b||; the theorem needs two separate losses and splits it:
||a + b||^2 <= 2 ||a||^2 + 2 ||b||^2. The trapezoidal rule has positive weights that sum to t, and L is at least every
observed ||du||/||dx||; so mean_square <= global and pathwise_one_sided <= pathwise_two_sided <= global hold exactly on
any grid, not only in the limit.

L is the largest Jacobian norm or ratio ||du||/||dx|| found on the paths and between them: a lower estimate of the
field's Lipschitz constant.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tvm_ref.bound.lipschitz import largest_on_segments
from tvm_ref.bound.paths import (
    Draws,
    Paths,
    at,
    displacement_error,
    flow_matching_minimum,
    flow_matching_residual,
    follow,
    in_float64,
    integral,
    norms,
    repaired,
    running_integral,
    solver_error,
    terminal_velocity_residual,
    tvm_loss,
)
from tvm_ref.distances import wasserstein2
from tvm_ref.flow_map import Flow

LABELS = {  # every term, and its name in tables and figures
    "w2": "W2 (optimal transport)",
    "displacement": "displacement (eq. 36-38)",
    "terminal_velocity": "terminal velocity (eq. 7)",
    "mean_square": "mean-square, one-sided",
    "pathwise_one_sided": "path-wise, one-sided",
    "pathwise_two_sided": "path-wise, two-sided",
    "global": "global (theorem 1)",
    "global_from_loss": "global, from the TVM loss",
}
TERMS = tuple(LABELS)
LINKS = (  # every inequality that holds, (lower, upper)
    ("w2", "displacement"),
    ("displacement", "terminal_velocity"),
    ("displacement", "mean_square"),
    ("displacement", "pathwise_one_sided"),
    ("pathwise_one_sided", "pathwise_two_sided"),
    ("pathwise_two_sided", "global"),
    ("mean_square", "global"),
)
ROUNDING = 1e-9  # relative tolerance of the links that hold exactly on any grid
COINCIDENT = 1e-12  # X and Y closer than this count as equal: du/dx would be a ratio of rounding errors
W2_ROUNDING = 3e-7  # POT expands squared distances: a rounding error of 1e-13 there is 3e-7 in a distance of zero
Weight = Callable[[Tensor, Tensor], Tensor]  # called as weight(L, s): both [S], to log lambda [S]


def one_sided_rate(paths: Paths) -> Tensor:
    """Return m(s) = -<u_theta(X) - u_theta(Y), X - Y> / ||X - Y||^2 [S, N]: how fast X and Y drift apart.

    It is negative where the model's field contracts towards data.
    """
    # d||e||/ds = <a + b + du, e> / ||e||, and s falls from t to 0: du = c e with c > 0 shrinks e at rate c
    dx, du = (paths.x - paths.y).flatten(2), (paths.u_x - paths.u_y).flatten(2)
    return _ratio(-(du * dx).sum(2), displacement_error(paths).square(), displacement_error(paths))


def two_sided_rate(paths: Paths) -> Tensor:
    """Return ||u_theta(X) - u_theta(Y)|| / ||X - Y|| [S, N], at least |m(s)|."""
    e = displacement_error(paths)
    # by Cauchy-Schwarz |<du, e>| <= ||du|| ||e||, which ignores that the field may contract
    return _ratio(norms(paths.u_x - paths.u_y), e, e)


def _ratio(numerator: Tensor, denominator: Tensor, e: Tensor) -> Tensor:
    """Divide [S] or [S, N]; return 0 where the distance e is 0 and, at s = t, the value at the next smaller time.

    At s = t, where both paths start, the ratio is 0/0 with a continuous limit, so this errs by O(h) at a node of weight
    O(h).
    """
    apart = e > COINCIDENT
    ratio = torch.where(apart, numerator / torch.where(apart, denominator, 1.0), 0.0)
    return torch.cat([ratio[:-1], ratio[-2:-1]])


def rms(a: Tensor) -> float:
    """Return the root mean square of a [N] over points."""
    return float(a.square().mean().sqrt())


def displacement(paths: Paths) -> Tensor:
    """Return ||e(0)|| = ||X_0 - Y_0|| [N] (eq. 36-38): (X_0, Y_0) is a coupling, so W2 is at most its RMS."""
    return displacement_error(paths)[0]


def terminal_velocity(paths: Paths) -> Tensor:
    """Return sqrt(t int_0^t ||d/ds f - u(Y_s, s)||^2 ds) [N] (eq. 7, with the factor t of Cauchy-Schwarz)."""
    # (int_0^t ||.|| ds)^2 <= t int_0^t ||.||^2 ds; no Lipschitz constant: u is taken on the exact path
    return (paths.s[-1] * integral(norms(paths.df_ds - paths.exact).square(), paths.s)).sqrt()


def residual(paths: Paths) -> Tensor:
    """Return ||a(s) + b(s)|| [S, N]: what drives the paths apart besides the model's own field."""
    return norms(paths.df_ds - paths.u_x + paths.u_y - paths.exact)


def pathwise(rate: Tensor, paths: Paths) -> Tensor:
    """Bound ||e(0)|| by Groenwall's inequality along each path: int_0^t exp(int_0^s rate) ||a(s) + b(s)|| ds [N].

    `rate` [S, N] is one_sided_rate or two_sided_rate.
    """
    growth = running_integral(rate, paths.s).exp()  # of an error made at time s, on its way to time 0
    return integral(growth * residual(paths), paths.s)


def mean_square_rate(paths: Paths) -> Tensor:
    """Return M(s) = E[m ||e||^2] / E||e||^2 [S]: the mean of m, each path weighted by its squared error."""
    square = displacement_error(paths).square()
    return _ratio((one_sided_rate(paths) * square).mean(1), square.mean(1), square.mean(1).sqrt())


def mean_square(paths: Paths) -> float:
    """Bound sqrt(E ||e(0)||^2) by Groenwall's inequality for it: int_0^t exp(int_0^s M) sqrt(E ||a + b||^2) ds."""
    growth = running_integral(mean_square_rate(paths), paths.s).exp()
    return float(integral(growth * residual(paths).square().mean(1).sqrt(), paths.s))


def lipschitz(model: Flow, paths: Paths) -> Tensor:
    """Find L(s) [S]: the largest Jacobian norm of u_theta at X_s, at Y_s and halfway, or two_sided_rate if larger.

    It is a lower estimate of the true Lipschitz constant, but at least every rate that the path-wise bounds use.
    """
    values = []
    for time, x, y in zip(paths.s, paths.x, paths.y, strict=True):

        def field(z: Tensor, time: Tensor = time) -> Tensor:
            return model.velocity(z, at(time, z))

        values.append(largest_on_segments(field, x, y))
    return torch.maximum(torch.tensor(values, dtype=paths.s.dtype), two_sided_rate(paths).amax(1))


def log_lambda(lipschitz: Tensor, s: Tensor) -> Tensor:
    """Return the log of lambda[L](s) = 2 t exp(2 int_0^s L(r) dr) [S] (theorem 1, with its constants)."""
    # t is from Cauchy-Schwarz in time, 2 from ||a + b||^2 <= 2 ||a||^2 + 2 ||b||^2, 2 L from squaring the error
    return math.log(2 * float(s[-1])) + 2 * running_integral(lipschitz, s)


def weighted_root(log_weight: Tensor, values: Tensor, s: Tensor) -> float:
    """Return sqrt(int_0^t exp(log_weight) values ds) of values [S] or 0 if noise makes the integral negative."""
    return math.sqrt(max(float(integral(log_weight.exp() * values, s)), 0.0))


def split_squares(paths: Paths) -> Tensor:
    """Return ||a(s)||^2 + ||b(s)||^2 [S, N], at least residual^2 / 2; its mean is eq. 9 less its minimum."""
    return terminal_velocity_residual(paths).square() + flow_matching_residual(paths).square()


def global_bound(paths: Paths, lipschitz: Tensor, weight: Weight = log_lambda) -> float:
    """Return sqrt(int_0^t lambda(s) E(||a||^2 + ||b||^2) ds): theorem 1 from the exact residuals (eq. 10, 39-58)."""
    return weighted_root(weight(lipschitz, paths.s), split_squares(paths).mean(1), paths.s)


def constant(lipschitz: Tensor, minimum: Tensor, s: Tensor) -> float:
    """Return C = -int_0^t lambda(s) E||v - u(x_s, s)||^2 ds (theorem 1), from flow_matching_minimum [S, N]."""
    return -float(integral(log_lambda(lipschitz, s).exp() * minimum.mean(1), s))


@dataclass(frozen=True)
class Bound:
    """The measured terms of the chain, all as distances, with their errors.

    Attributes:
        t: the time at which the jump to 0 starts.
        values: every term by its name.
        errors: the quadrature error of every term: its change when every second time is left out; for w2 and
            displacement, which have no integral, the error of the exact flow's solver.
        medians: over points, of the terms that are root mean squares over points; those have heavy tails, because
            points near a border between modes end in the wrong one.
        standard_error: standard error of global_from_loss - global, over draws of data and noise.
        constant: C, a squared distance.
        loss: (1/t) int_0^t E L_TVM(t, s) ds, without lambda.
        loss_minimum: its minimum over models.
        lipschitz: L(s) [S].
        paths: the paths it was measured on.
    """

    t: float
    values: dict[str, float]
    errors: dict[str, float]
    medians: dict[str, float]
    standard_error: float
    constant: float
    loss: float
    loss_minimum: float
    lipschitz: Tensor
    paths: Paths

    @property
    def lipschitz_integral(self) -> float:
        """The integral of the Lipschitz constant L(s) from 0 to t."""
        return float(integral(self.lipschitz, self.paths.s))

    def tolerance(self, lower: str, upper: str) -> float:
        """Return by how much `lower` may exceed `upper`: rounding, or the quadrature error where the link has one."""
        if lower == "w2":
            return math.hypot(self.values[upper], W2_ROUNDING) - self.values[upper]
        if lower == "displacement":
            return self.errors[lower] + self.errors[upper]
        return ROUNDING * self.values[upper]

    @property
    def quadrature_error(self) -> float:
        """The largest quadrature error of any link: the ordering of terms that differ by less says nothing."""
        return max(self.tolerance(*link) for link in LINKS if link[0] == "displacement")

    def violations(self) -> list[str]:
        """List the links that do not hold; none if the theory, the code and the grid are right."""
        return [
            f"{lower} {self.values[lower]:.6g} > {upper} {self.values[upper]:.6g}"
            for lower, upper in LINKS
            if not self.values[lower] <= self.values[upper] + self.tolerance(lower, upper)
        ]


def pointwise_terms(paths: Paths) -> dict[str, Tensor]:
    """Return the terms that are root mean squares over points, at each point: [N] each."""
    return {
        "displacement": displacement(paths),
        "terminal_velocity": terminal_velocity(paths),
        "pathwise_one_sided": pathwise(one_sided_rate(paths), paths),
        "pathwise_two_sided": pathwise(two_sided_rate(paths), paths),
    }


def averaged_terms(paths: Paths, lipschitz: Tensor, log_weight: Tensor, excess: Tensor) -> dict[str, float]:
    """Return the terms that take a mean over points at every time; `excess` [S, N] is loss - minimum."""
    return {
        "mean_square": mean_square(paths),
        "global": global_bound(paths, lipschitz),
        "global_from_loss": weighted_root(log_weight, excess.mean(1), paths.s),
    }


def measure(model: Flow, oracle: Flow, draws: Draws, s: Tensor, scale: float, pairings: int = 1) -> Bound:
    """Measure the whole chain for a jump of the model from time t = s[-1] to 0.

    Args:
        model: a FlowMap (a float64 copy is measured) or another Flow in float64.
        oracle: the exact flow that the model should have learned.
        draws: data and noise to measure on; the jump starts at x_t = (1 - t) x0 + t x1.
        s: times [S], see time_grid.
        scale: the scale of that grid, see time_grid.
        pairings: how many random pairings of data and noise the loss is averaged over; more make global_from_loss less
            noisy, which matters where C is large.

    Raises:
        FloatingPointError: the model's path is not finite.
    """
    model, t = in_float64(model), float(s[-1])
    paths = follow(model, oracle, draws.at(s[-1]), s, scale)
    L = lipschitz(model, paths)
    pairs = []
    for noise in (repaired(draws.x1, len(s), seed) for seed in range(pairings)):
        given = (draws.x0, noise, s)
        pairs.append((tvm_loss(model, *given), flow_matching_minimum(oracle, *given)))
    loss, minimum = (torch.stack(column).mean(0) for column in zip(*pairs, strict=True))
    excess, weight = loss - minimum, log_lambda(L, s)  # over the same draws, so that most of the noise cancels

    terms, coarse = pointwise_terms(paths), pointwise_terms(paths.thinned())
    whole = averaged_terms(paths, L, weight, excess)
    coarse_whole = averaged_terms(paths.thinned(), L[::2], weight[::2], excess[::2])
    values = {name: rms(term) for name, term in terms.items()} | whole
    errors = {name: rms(term - coarse[name]) for name, term in terms.items()}  # opposite changes must not cancel
    errors |= {name: abs(value - coarse_whole[name]) for name, value in whole.items()}
    values["w2"] = wasserstein2(paths.x[0].flatten(1), paths.y[0].flatten(1))
    # neither has an integral; an error of Y_0 changes both by at most its RMS
    errors["w2"] = errors["displacement"] = rms(solver_error(oracle, paths, scale))
    return Bound(
        t=t,
        values={name: values[name] for name in TERMS},
        errors={name: errors[name] for name in TERMS},
        medians={name: float(term.median()) for name, term in terms.items()},
        standard_error=loss_standard_error(paths, L, excess),
        constant=constant(L, minimum, s),
        loss=float(integral(loss.mean(1), s)) / t,
        loss_minimum=float(integral(minimum.mean(1), s)) / t,
        lipschitz=L,
        paths=paths,
    )


def loss_standard_error(paths: Paths, lipschitz: Tensor, excess: Tensor) -> float:
    """Estimate the standard error of global_from_loss - global over draws; `excess` [S, N] is loss - minimum.

    Each draw gives one difference of squares, int lambda (excess - ||a||^2 - ||b||^2) ds. A difference of roots is the
    difference of the squares divided by the sum of the roots.
    """
    weight = log_lambda(lipschitz, paths.s).exp()[:, None]
    difference = integral(weight * (excess - split_squares(paths)), paths.s)  # [N], one per draw
    error, root = float(difference.std()) / math.sqrt(excess.shape[1]), global_bound(paths, lipschitz)
    return error / max(root, math.sqrt(error), torch.finfo(torch.float64).tiny)
