"""Every guard and warning of the method, attached by decorators, so that the equations stay free of them.

A function decorated with `@checked` checks its arguments once, where a user calls it; what it calls in turn is not
checked again. Values are read only where that costs nothing: on the CPU, outside torch.compile. In the first steps of
a guided training, labels are read on other devices too.
"""

import functools
import inspect
import itertools
import math
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any, NoReturn, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tvm_ref.shapes import over

P = ParamSpec("P")
R = TypeVar("R")

FAR = 100.0  # standard deviations of the noise; images left in 0 to 255 exceed it
PATIENCE = 5  # steps before a warning; a zero-initialised DiT depends on s from its third step
LONG = 200  # losses before a warning of missing dropped labels or target; a step may sum over many
ONE_DTYPE = (
    "data, noise and weights must have the same dtype: data.float(); for bfloat16 put torch.autocast around the call"
)
CHANNELS = "if they are images, x.permute(0, 3, 1, 2) puts channels first, as PyTorch's convolutions expect"
HINTS = {  # text of an error raised inside the user's network: what to do
    "in-place operation": "a JVP cannot run through a layer that changes a buffer in its forward, as BatchNorm "
    "does in training; use GroupNorm or RMSNorm",
    "must have the same dtype": ONE_DTYPE,
    "should be the same": ONE_DTYPE,
    "channels, but got": CHANNELS,
    "index out of range in self": "labels are 0 to C - 1, or C for no class: the embedding needs C + 1 rows",
}


def require(true: bool, otherwise: str) -> None:
    """Raise ValueError(otherwise) unless `true` holds."""
    if not true:
        raise ValueError(otherwise)


def require_one_of(name: str, value: str, choices: Collection[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    require(value in choices, f"{name} must be one of {', '.join(choices)}; got '{value}'")


def has_values(a: Tensor) -> bool:
    """Return whether a tensor's values can be read: not under torch.compile, on "meta" or in a fake tensor."""
    return not torch.compiler.is_compiling() and not a.is_meta and type(a) in (Tensor, nn.Parameter)


def values_are_cheap(a: Tensor) -> bool:
    """Return whether reading values costs nothing: only on the CPU, as an accelerator's queue would stall."""
    return has_values(a) and a.device.type == "cpu"


def require_kind(true: bool, otherwise: str, a: Any) -> None:
    """Raise TypeError with the message `otherwise` and the type of `a` unless `true` holds."""
    if not true:
        raise TypeError(f"{otherwise}; got {type(a).__name__}")


def check_batch(x: Tensor, *per_sample: Tensor) -> None:
    """Raise ValueError unless x is [B, ...] and every other tensor is [B], TypeError for what is not a tensor."""
    require_kind(isinstance(x, Tensor), "x must be a tensor [B, ...] (torch.from_numpy converts arrays)", x)
    require(x.ndim >= 2, f"x must be of shape [B, ...] with at least two axes, got {list(x.shape)}")
    check_per_sample(len(x), *per_sample)


def check_per_sample(n: int, *tensors: Tensor) -> None:
    """Raise TypeError for what is not a tensor, ValueError for one that is not [n]."""
    for a in tensors:
        require_kind(isinstance(a, Tensor), "times, labels and beta must be tensors, one number per sample", a)
        require(a.shape == (n,), f"times, labels and beta must be of shape [{n}], one per sample; got {list(a.shape)}")


def check_times(t: Tensor, s: Tensor) -> None:
    """Raise ValueError unless 0 <= s <= t <= 1 everywhere; NaN is refused too."""
    if values_are_cheap(t) and not bool(((s >= 0) & (s <= t) & (t <= 1)).all()):
        if bool(((s >= 0) & (t <= 1)).all()):
            raise ValueError("the end time s must not exceed the start time t: a flow map runs from noise to data")
        raise ValueError("times must lie in [0, 1] (0 is data, 1 is noise)")


def check_condition(condition: Any, flow_map: Any) -> None:
    """Raise TypeError for a wrong type, ValueError for None if the flow map is scaled; warn if beta may be w."""
    if condition is None:
        scaled = getattr(flow_map, "scaled", False)
        require(not scaled, "a scaled flow map, f = (s - t) w F, needs a condition: Condition(label, beta=1/w)")
    elif not hasattr(condition, "beta"):
        require_kind(False, "the condition must be Condition(label, beta); beta = 1/w, 1 without guidance", condition)
    elif isinstance(label := condition.label, Tensor) and (label.is_floating_point() or label.dtype == torch.bool):
        raise TypeError(f"labels must be whole numbers, the classes 0, 1, ...; got {label.dtype}")
    elif isinstance(condition.beta, Tensor) and values_are_cheap(condition.beta) and bool((condition.beta > 1).any()):
        warnings.warn("beta = 1/w is above 1, a guidance weight w below 1; did you pass w as beta?", stacklevel=4)


def check_classes(condition: Any, null_label: int) -> None:
    """Raise ValueError for labels beyond 0 to null_label, or for guidance of samples without a class."""
    label, beta = condition
    if values_are_cheap(label) and len(label):
        seen = f"{int(label.min())} to {int(label.max())}"
        fit = bool(((label >= 0) & (label <= null_label)).all())
        require(fit, f"labels must lie in 0 to {null_label - 1}, or be the null label {null_label}; got {seen}")
        guided = bool(((label == null_label) & (beta != 1)).any())
        require(not guided, f"label {null_label} means no class and needs beta = 1; classes are 0 to {null_label - 1}")


def check_data(x0: Tensor, x1: Tensor, t: Tensor) -> None:
    """Raise TypeError for integer data, ValueError for shapes that do not fit; warn of suspicious values or axes."""
    for a in (x0, x1):
        require_kind(
            isinstance(a, Tensor), "data and noise must be tensors [B, ...] (torch.from_numpy converts arrays)", a
        )
    if not x0.is_floating_point():
        raise TypeError(f"data must be floating-point numbers, got {x0.dtype}; scale images to [-1, 1]: x0 / 127.5 - 1")
    require(x0.shape == x1.shape, f"x0 and x1 must have the same shape, got {list(x0.shape)} and {list(x1.shape)}")
    check_batch(x0, t)
    if x0.ndim == 4 and x0.shape[1] == x0.shape[2] > 4 > x0.shape[3]:
        warnings.warn(f"data are of shape {list(x0.shape)}; {CHANNELS}", stacklevel=4)
    if values_are_cheap(x0) and x0.numel() and not (farthest := float(x0.detach().abs().amax())) <= FAR:
        far = f"reach beyond {FAR:g}, where noise has standard deviation 1; scale them"
        # no error: raised in one of several processes it would leave the others waiting; a NaN loss ends them all
        warnings.warn(f"data {far if math.isfinite(farthest) else 'hold NaN or infinite numbers'}", stacklevel=4)


def is_average(a: Any) -> bool:
    """Return whether something is an EMA, which holds a model but is not one."""
    return not isinstance(a, nn.Module) and hasattr(a, "decay") and hasattr(a, "module")


def require_network(network: Any) -> None:
    """Raise TypeError unless a FlowMap can wrap the network, which is called as network(x, t, s, condition)."""
    fit = not hasattr(network, "displacement") and not is_average(network)
    require_kind(fit, "a FlowMap is made around a network itself", network)
    try:
        signature = inspect.signature(getattr(network, "forward", network))
    except (TypeError, ValueError):  # compiled code has no signature
        return
    try:
        signature.bind("x", "t", "s", "condition")
    except TypeError:
        raise TypeError(
            f"the network is called as network(x, t, s, condition); {type(network).__name__}.forward takes {signature}"
        ) from None


def check_objective(kind: Any, flow_map: Any, null_label: int | None) -> None:
    """Raise TypeError for a bare network, ValueError for guidance that the method does not support."""
    require(null_label is None or kind.has_guidance, f"{kind.__name__} takes no null_label: it has no guidance here")
    if not hasattr(flow_map, "velocity"):
        raise TypeError(f"{kind.__name__} trains a flow map; wrap the network: FlowMap(network)")


def check_sampling(jump: Any, noise: Any, times: Any) -> None:
    """Raise TypeError if `jump` cannot take steps, ValueError for a time grid that does not fall within [0, 1]."""
    if is_average(jump):
        raise TypeError("an EMA holds a model but is not one: sample from its .module")
    if isinstance(jump, Tensor):
        raise TypeError("sample(model, noise, steps): the model comes first")
    model = getattr(jump, "flow", jump)  # an EulerStep holds a flow
    if isinstance(model, nn.Module) and not hasattr(model, "displacement"):
        raise TypeError(f"{type(model).__name__} is a network, not a flow map; wrap it: FlowMap(network)")
    require_kind(isinstance(noise, Tensor), "noise must be a tensor [B, ...], such as torch.randn(64, 2)", noise)
    fit = not isinstance(times, float) and getattr(times, "ndim", 1) != 0
    require_kind(fit, f"times must be a number of steps, an int, or a grid ([1.0, 0.5, 0.0]), not {times}", times)
    if isinstance(times, int):
        return
    grid = [float(a) for a in times]
    falls = len(grid) >= 2 and all(1 >= a > b >= 0 for a, b in itertools.pairwise(grid))
    require(falls, f"a time grid must fall strictly within [0, 1] and hold at least two times, got {grid}")


class _Inside(threading.local):
    checked = False  # True inside a checked call: what it calls is not checked again


_inside = _Inside()


def checks(
    before: Callable[..., None] | None = None, after: Callable[..., None] | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a decorator that calls `before(**arguments)`, then the function, then `after(result, **arguments)`.

    `before` is skipped inside another checked call. Errors raised inside the user's network keep their type and
    traceback, and get a note that says what to do.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        names = tuple(inspect.signature(function).parameters)

        @functools.wraps(function)
        def checked_function(*arguments: P.args, **options: P.kwargs) -> R:
            given: dict[str, Any] = dict(zip(names, arguments, strict=False)) | options
            compiling = torch.compiler.is_compiling()  # then shapes are checked everywhere, while the graph is traced
            if before is not None and (compiling or not _inside.checked):
                before(**given)
            if before is None or compiling or _inside.checked:
                result = function(*arguments, **options)
            else:
                result = _call(function, *arguments, **options)
            if after is not None:
                after(result, **given)
            return result

        return checked_function

    return decorate


def _call(function: Callable[P, R], *arguments: P.args, **options: P.kwargs) -> R:
    """Call a function without checking the calls inside it."""
    _inside.checked = True
    try:
        return function(*arguments, **options)
    except (RuntimeError, IndexError) as error:  # also NotImplementedError
        for hint in (hint for words, hint in HINTS.items() if words in str(error)):
            error.add_note(hint)
        raise
    finally:
        _inside.checked = False


def _check_exact(self: Any, x: Tensor, t: Tensor, s: Tensor | None = None, **others: Any) -> None:
    """Check a call of an exact flow, (x, t[, s]): shapes, and times in [0, 1], in either order."""
    for time in (t,) if s is None else (t, s):
        check_batch(x, time)
        check_times(time, time)


def _check(self: Any, x: Tensor, t: Tensor, s: Tensor | None = None, condition: Any = None, **others: Any) -> None:
    """Check a call of a FlowMap, (x, t[, s], condition): shapes, 0 <= s <= t <= 1, a condition where one is needed."""
    s = t if s is None else s
    check_condition(condition, self)
    check_batch(x, t, s, *(condition or ()))
    check_times(t, s)


def _check_labels(condition: Any, null_label: int, rate: float = 0.1, **others: Any) -> None:
    """Check the arguments of drop_labels."""
    check_condition(condition, None)
    check_per_sample(len(condition.label), *condition)
    require(0 <= rate <= 1, f"the label dropout rate must lie in [0, 1], got {rate}")
    check_classes(condition, null_label)


def _check_loss(
    self: Any, x0: Tensor, x1: Tensor, times: Any, condition: Any = None, target: Any = None, **others: Any
) -> None:
    """Check the arguments of an objective: data, noise, times, condition with its null label, and target."""
    drawn = "times must be Times(t, s, s_prime), as TimeSampler().draw(len(x0)) returns"
    require_kind(hasattr(times, "s_prime"), drawn, times)
    check_data(x0, x1, times.t)
    check_condition(condition, self.flow_map)
    check_batch(x0, *times, *(condition or ()))
    check_times(times.t, times.s)
    check_times(times.s_prime, times.s_prime)
    if condition is None:
        require(self.null_label is None, "an objective with a null_label needs a condition: Condition(label, beta)")
    elif self.null_label is not None:
        check_classes(condition, self.null_label)
    elif values_are_cheap(condition.beta):
        require(bool((condition.beta == 1).all()), "guidance (beta other than 1) needs the objective's null_label")
    fit = target is None or is_average(target) or hasattr(target, "velocity")
    require_kind(fit, "the target must be a flow map, such as EMA(FlowMap(network), decay).module", target)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        _warn_of_training(self, condition, target)


_counts: WeakKeyDictionary[nn.Module, Counter[str]] = WeakKeyDictionary()  # per objective: losses, dropped labels
_averages: WeakKeyDictionary[nn.Module, weakref.ref[Any]] = WeakKeyDictionary()  # the EMA that a module belongs to


def register_average(ema: Any) -> None:
    """Remember which EMA owns a module, to warn if the EMA is never updated."""
    _averages[ema.module] = weakref.ref(ema)


def _warn_of_training(objective: Any, condition: Any, target: Any) -> None:
    """After LONG losses, warn of guidance without dropped labels and of a target that is missing or never updated."""
    counts, null = _counts.setdefault(objective, Counter()), objective.null_label
    counts["all"] += 1
    if counts["all"] > LONG:
        return
    guided = condition is not None and null is not None and has_values(condition.label)
    counts["dropped"] += guided and not counts["dropped"] and bool((condition.label == null).any())
    if counts["all"] != LONG:
        return
    if guided and not counts["dropped"]:
        drop = f"guidance needs: drop_labels(condition, {null})"
        warnings.warn(f"in {LONG} losses no label was the null label, which {drop}", stacklevel=4)
    if target is None and objective.default_target_ema > 0 and (guided or objective.learns_jumps):
        own = "pass target=ema.module, or target=model if that is meant"
        warnings.warn(f"in {LONG} losses no target was given, so it is the model itself: {own}", stacklevel=4)
    if target in _averages and getattr(_averages[target](), "updates", 1) == 0:
        update = "call ema.update(model) after each step"
        warnings.warn(f"in {LONG} losses the target's average was never updated: {update}", stacklevel=4)


def _check_output(F: Tensor, x: Tensor, **others: Any) -> None:
    """Raise ValueError unless the network's output F(x, ...) has the shape of x."""
    if F.shape != x.shape:
        raise ValueError(f"the network must return the shape of x, {list(x.shape)}; it returned {list(F.shape)}")


_steps_blind: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # per flow map: how often dF/ds was zero


def _warn_if_blind(result: tuple[Tensor, Tensor], self: nn.Module, t: Tensor, s: Tensor, **others: Any) -> None:
    """Warn once, judging by f and d/ds f, if after PATIENCE training steps the network does not depend on s."""
    f, df_ds = result
    if torch.compiler.is_compiling() or not f.requires_grad or not values_are_cheap(f):
        return
    steps = _steps_blind.get(self, 0)
    if steps >= PATIENCE or not bool(f.any()):  # an output of zeros says nothing: many networks start there
        return
    if not torch.equal(over(s - t, f) * df_ds, f):  # d/ds f = F + (s - t) dF/ds differs from F
        _steps_blind[self] = PATIENCE  # it depends on s: no need to look again
        return
    _steps_blind[self] = steps + 1
    if steps + 1 == PATIENCE:
        blind = "the network's output does not depend on s: it can learn no jumps unless it embeds s or t - s"
        warnings.warn(blind, stacklevel=3)


checked_flow = checks(_check_exact)
checked = checks(_check)
checked_data = checks(check_data)
checked_labels = checks(_check_labels)
checked_loss = checks(_check_loss)
checked_output = checks(after=_check_output)
warns_if_blind = checks(after=_warn_if_blind)


class NotALoss:
    """Base class of per-sample terms, which are easily mistaken for the loss."""

    def __getattr__(self, name: str) -> NoReturn:
        """Raise an AttributeError that says what to do, for `backward`, `mean` and other methods of a tensor."""
        raise AttributeError(f"LossTerms have no {name!r}, they are per sample: call terms.total.mean().backward()")
