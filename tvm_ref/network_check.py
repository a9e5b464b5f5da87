"""Compare a network's derivatives, as Terminal Velocity Matching takes them, with differences of its values.

The loss contains dF/ds, so reverse mode runs through a JVP, where layers may be silently wrong. check_network compares
value, tangent and gradient with finite differences in float64. Where they disagree, it checks every submodule
separately, on the inputs that it received, and names the innermost ones that are wrong.
"""

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from tvm_ref.checks import check_batch, check_condition
from tvm_ref.flow_map import FlowMap, jvp
from tvm_ref.guidance import Condition
from tvm_ref.shapes import Sample, over

STEP = 1e-4  # of five-point differences: their error is STEP^4, plus 1e-16 / STEP^2 for a difference of differences
TOLERANCE = 1e-4  # relative; correct layers reach 1e-8, wrong ones 1e-2 to 1
DIRECTIONS = 3  # random directions, over all parameters, along which the gradient is compared
STATISTICS = nn.modules.batchnorm._NormBase  # norms that update running statistics while they train

WORDS = {
    "": "",
    "value": "its value under a JVP differs from that of a plain call; does its forward change a buffer?",
    "tangent": "its tangent is wrong; does an autograd.Function in it have a wrong jvp?",
    "gradient": "value and tangent are right, the gradient through the tangent is wrong; "
    "take the JVP inside jvp_attention.jvp_ready(); if you do, look for detach, no_grad or an autograd.Function",
}
JVP: TypeAlias = Callable[[Callable[..., Tensor], tuple[Tensor, ...], tuple[Tensor, ...]], tuple[Tensor, Tensor]]
Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Call: TypeAlias = tuple[list[Any], Any]  # leaves of a module's arguments, and their tree


class Errors(NamedTuple):
    """Relative errors of a JVP and of the gradient through it, less the uncertainty of the differences."""

    value: float
    tangent: float
    gradient: float

    @property
    def wrong(self) -> str:
        """The name of the first wrong result; empty if there is none."""
        return next((name for name, error in self._asdict().items() if not error <= TOLERANCE), "")


class NetworkCheck(NamedTuple):
    """The result of check_network: print it, or read `ok`."""

    errors: Errors | None  # of the whole network; None where its JVP fails
    findings: tuple[str, ...]  # what is wrong, in words

    @property
    def ok(self) -> bool:
        """True if nothing is wrong."""
        return not self.findings

    def __str__(self) -> str:
        if self.ok:
            return "right: value, tangent and gradient agree with differences"
        found = [] if self.errors is None else [f"{k} {e:.0e}" for k, e in self.errors._asdict().items()]
        return "\n".join(["wrong" + (f", relative errors: {', '.join(found)}" if found else ""), *self.findings])


def check_network(
    network: nn.Module, x: Sample, condition: Condition | None = None, *, jvp: JVP = jvp, samples: int = 4
) -> NetworkCheck:
    """Compare value, dF/ds and the gradient of the terminal-velocity loss with differences; name the layers at fault.

    It works on a float64 copy, where parameters that are all zero are made random, dropout is off and other noise is
    the same in every call. It takes seconds for a small network. It also warns of what is wrong.

    Args:
        network: called as network(x, t, s, condition), or a FlowMap of one.
        x: samples [B, ...]; only the first `samples` are used.
        condition: labels and beta [B], or None.
        jvp: FlowMap's JVP, which runs inside `jvp_attention.jvp_ready`. Give torch.func.jvp if your training loop
            calls it outside of that.
        samples: how many samples to use.
    """
    network = _ready_to_differ(network.network if isinstance(network, FlowMap) else network)
    check_batch(x)
    check_condition(condition, None)
    x = x[:samples].detach().double()
    if condition is not None:
        condition = Condition(condition.label[:samples], condition.beta[:samples].double())
    t, s = (torch.linspace(*ends, len(x), dtype=x.dtype, device=x.device) for ends in ((0.9, 0.6), (0.5, 0.2)))
    model = FlowMap(network)

    @_with_one_noise
    def F(s: Tensor) -> Tensor:
        return model.F(x, t, s, condition)

    with torch.no_grad():  # the target of eq. 12, where the jump lands, is frozen
        target = model.velocity(x + model.displacement(x, t, s, condition), s, condition)

    def loss(F: Tensor, dF_ds: Tensor) -> Tensor:
        return (F + over(s - t, x) * dF_ds - target).square().mean()  # eq. 8 and 17

    findings, errors = [], None
    try:
        errors = measure(F, [s], [torch.ones_like(s)], list(network.parameters()), loss, jvp)
        wrong = errors.wrong
    except Exception as error:  # any error that a layer raises is a finding
        wrong = _first_line(error)
    if wrong:
        findings += _layers_at_fault(network, F, s, jvp)
        explained = findings if errors else [found for found in findings if "refused: " in found]
        if not explained:
            findings.append(f"the network: {WORDS.get(wrong, wrong)}")
    if errors is not None and not any((F(s + e) != F(s)).any() for e in (-0.1, 0.1)):
        findings.append("the output does not depend on s: it can learn no jumps unless it embeds s or t - s")
    check = NetworkCheck(errors, tuple(findings))
    if not check.ok:
        warnings.warn(str(check), stacklevel=2)
    return check


def measure(
    function: Callable[..., Tensor],
    values: Sequence[Tensor],
    tangents: Sequence[Tensor],
    parameters: Sequence[Tensor],
    loss: Loss,
    jvp: JVP = jvp,
) -> Errors:
    """Compare a function's value, its tangent by `jvp`, and the gradient of a loss of both, with differences."""
    values = [v.detach().clone().requires_grad_() for v in values]
    variables = [*values, *(p for p in parameters if p.requires_grad)]

    def derivative(step: float) -> Tensor:
        return difference(lambda e: function(*(v + e * d for v, d in zip(values, tangents, strict=True))), step)

    y, dy = jvp(function, tuple(values), tuple(tangents))
    total = loss(y, dy)
    gradients: tuple[Tensor, ...] = tuple(map(torch.zeros_like, variables))
    if total.requires_grad:  # else it does not depend on any of them
        gradients = torch.autograd.grad(total, variables, allow_unused=True, materialize_grads=True)
    with torch.no_grad():
        error_of_value = float((y - function(*values)).norm() / y.norm().clamp(min=1e-12))
        error_of_tangent = _error(dy, derivative)
        generator = torch.Generator().manual_seed(0)
        errors = [
            _error_along(variables, gradients, lambda step: loss(function(*values), derivative(step)), generator)
            for _ in range(DIRECTIONS)
        ]
    return Errors(error_of_value, error_of_tangent, max(errors))


def difference(function: Callable[[float], Tensor], step: float) -> Tensor:
    """Return the derivative at 0 of a function of one number, by a five-point difference."""
    at = {k: function(k * step) for k in (-2, -1, 1, 2)}
    return (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * step)


def _error(found: Tensor, derivative: Callable[[float], Tensor], scale: float = 0.0) -> float:
    """Return the relative error of a derivative, less ten times the change when the differences take other steps.

    That change is large near a kink, or where a network rounds to float32 inside.
    """
    exact, wide, narrow = (derivative(step) for step in (STEP, 3 * STEP, STEP / 3))
    doubt = 10 * max(float((exact - wide).norm()), float((exact - narrow).norm()))
    return max(float((found - exact).norm()) - doubt, 0.0) / max(float(exact.norm()), scale, 1e-12)


def _error_along(
    variables: list[Tensor], gradients: Sequence[Tensor], loss: Callable[[float], Tensor], generator: torch.Generator
) -> float:
    """Return the error of a gradient along a random direction, relative to its norm; `loss` takes its own step."""
    starts = [v.detach().clone() for v in variables]
    ds = [torch.randn(v.shape, generator=generator, dtype=v.dtype).to(v.device) for v in variables]
    length = float(torch.stack([d.norm() for d in ds]).norm())
    ds = [d * min(1.0, 10 / length) for d in ds]  # short, to cross few kinks

    def derivative(step: float) -> Tensor:
        def moved(e: float) -> Tensor:
            for v, start, d in zip(variables, starts, ds, strict=True):
                v.data.copy_(start + e * d)
            return loss(step)

        found = difference(moved, step)
        moved(0.0)
        return found

    norm = float(torch.stack([g.norm() for g in gradients]).norm())
    found = torch.stack([(g.conj() * d).sum().real for g, d in zip(gradients, ds, strict=True)]).sum()
    return _error(found, derivative, norm * min(1.0, 10 / length))


def _with_one_noise(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*values: Tensor) -> Tensor:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            torch.manual_seed(0)
            return function(*values)

    return call


def _ready_to_differ(network: nn.Module) -> nn.Module:
    """Copy a network to float64, without torch.compile and dropout, its all-zero parameters made random."""
    network = copy.deepcopy(getattr(network, "_orig_mod", network)).double()
    for p in network.parameters():  # module.double() skips complex tensors and plain attributes
        p.data = _double(p.data)
    for module in network.modules():
        for tensors in (module._buffers, vars(module)):
            tensors.update({name: _double(a) for name, a in tensors.items() if isinstance(a, Tensor)})
    generator = torch.Generator().manual_seed(1)
    for p in network.parameters():
        if not p.any():
            p.data.add_(0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device))
    for module in network.modules():
        names = ["p"] if isinstance(module, nn.modules.dropout._DropoutNd) else ["dropout", "dropout_p", "drop_prob"]
        for name in names:  # the names in dropout layers, attention and stochastic depth
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return network


def _double(a: Tensor) -> Tensor:
    return a.to(torch.complex128) if a.is_complex() else a.double() if a.is_floating_point() else a


def _record(network: nn.Module, F: Callable[[Tensor], Tensor], s: Tensor) -> dict[nn.Module, list[Call]]:
    """Return the arguments of each module's calls in F(s), in order."""
    calls: dict[nn.Module, list[Call]] = {}

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        leaves, tree = tree_flatten((args, kwargs))  # cloned below, as a layer may work in place
        calls.setdefault(module, []).append(([a.clone() if isinstance(a, Tensor) else a for a in leaves], tree))

    hooks = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in network.modules()]
    try:
        with torch.no_grad():
            F(s)
    finally:
        for handle in hooks:
            handle.remove()
    return calls


def _layers_at_fault(network: nn.Module, F: Callable[[Tensor], Tensor], s: Tensor, jvp: JVP) -> list[str]:
    """Describe the innermost wrong modules, each tested separately on the inputs and tangents that it received."""
    here, before, after = (_record(network, F, s + e) for e in (0.0, -STEP, STEP))
    blamed: dict[tuple[str, str], list[str]] = {}
    done: list[str] = []
    for name, module in sorted(network.named_modules(), key=lambda pair: -pair[0].count(".") - bool(pair[0])):
        if module not in here or any(not name or inner.startswith(name + ".") for inner in done):
            continue
        calls = zip(here[module], before[module], after[module], strict=False)  # a branch may differ
        words = next((words for call in calls if (words := _fault(module, *call, jvp)) is not None), None)
        if words:
            done.append(name)
            blamed.setdefault((type(module).__name__, words), []).append(name or "the network itself")
    return [
        f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''} ({kind}): {words}"
        for (kind, words), names in blamed.items()
    ]


def _fault(module: nn.Module, here: Call, before: Call, after: Call, jvp: JVP) -> str | None:
    """Describe what is wrong in one call of a module: "" if nothing, None if it has no tangent or returns no tensor."""
    met, tree = here
    moving = [i for i, a in enumerate(met) if _is_number(a) and not torch.equal(before[0][i], after[0][i])]
    if not moving:
        return None
    tangents = [(after[0][i] - before[0][i]) / (2 * STEP) for i in moving]

    @_with_one_noise
    def function(*values: Tensor) -> Tensor:
        leaves = [a.clone() if isinstance(a, Tensor) else a for a in met]
        for i, v in zip(moving, values, strict=True):
            leaves[i] = v.clone()
        args, kwargs = tree_unflatten(leaves, tree)
        results = [a for a in tree_flatten(module(*args, **kwargs))[0] if _is_number(a)]
        parts = [torch.view_as_real(a) if a.is_complex() else a for a in results]
        return torch.cat([a.flatten() for a in parts]) if parts else torch.empty(0)

    def loss(y: Tensor, dy: Tensor) -> Tensor:
        c = torch.linspace(-1, 1, len(y), dtype=y.dtype, device=y.device)
        return (c * (y + 1) * dy + dy.square()).mean()

    values = [met[i] for i in moving]
    try:
        if not function(*values).numel():  # it returned indices, or no tensor
            return None
        wrong = measure(function, values, tangents, list(module.parameters()), loss, jvp).wrong
    except Exception as error:  # as in check_network
        if isinstance(module, STATISTICS) and module.training and module.track_running_stats:
            return "refused: it updates running statistics, and a JVP cannot run through that: use GroupNorm or RMSNorm"
        return f"refused: {_first_line(error)}"
    return WORDS[wrong]


def _is_number(a: Any) -> bool:
    return isinstance(a, Tensor) and (a.is_floating_point() or a.is_complex())


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
