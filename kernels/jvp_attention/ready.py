"""jvp_ready: a mode that makes ordinary networks correct under a differentiated JVP.

A `torch.overrides.TorchFunctionMode` sees every call of PyTorch's functions in its own thread, under whatever name a
network imported them, and torch.compile traces it. Replacing the names in torch.nn.functional would miss those imported
by value, and reach other threads; other rules for the operators would stay in the process, and escape torch.compile.

While a mode handles a call, PyTorch disables it, so it does not see calls inside a function written in Python. Only
nn.MultiheadAttention's matter, and `opened` exposes them. Calls in C++ stay unseen: nn.LSTM is right, but multiplies
by absent tangents. torch.utils.checkpoint is not such a function; one attribute is set for it.
"""

import functools
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from jvp_attention import rules
from jvp_attention.rules import has_tangent, unpack_dual

CHECKPOINT_OPTIONS = {"preserve_rng_state"} | {  # of checkpoint itself; other keywords are the function's
    name
    for name, parameter in inspect.signature(checkpoint).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY or name == "use_reentrant"
}


class jvp_ready(TorchFunctionMode):
    """Context in which PyTorch's functions handle tangents correctly and without wasted work.

    >>> with jvp_ready():
    ...     y, dy = torch.func.jvp(network, (x,), (dx,))
    >>> loss(y, dy).backward()  # right also for layer norms, scaled_dot_product_attention and checkpoints

    - `F.scaled_dot_product_attention` is answered by `attention`, inside nn.MultiheadAttention and
      nn.TransformerEncoderLayer too; with an additive mask or dropout by attention written out.
    - `layer_norm`, `instance_norm`, `batch_norm` without running statistics, `linalg.solve`, `tensorsolve`, `det`,
      `slogdet` and `logdet`, whose gradient through a JVP PyTorch gets wrong, and `glu` and `hardsigmoid`, which it
      refuses, are written out.
    - Linear layers, convolutions and matmuls leave out the product with an absent tangent.
    - `softmax` and the second derivative of `gelu` in its tanh form take fewer passes.
    - `torch.utils.checkpoint` recomputes the block's JVP.

    Values are PyTorch's up to rounding, and bit for bit where no argument has a tangent. Needs no GPU and no triton.

    Raises:
        NotImplementedError: in the network, from a norm that updates running statistics, and from rarer functions that
            PyTorch gets wrong, with what to call instead.
    """

    def __enter__(self) -> "jvp_ready":
        if not torch.compiler.is_compiling():
            see_checkpoints()
        return super().__enter__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Handle one call."""
        kwargs = kwargs or {}
        if func is torch.Tensor.unflatten:  # it calls super(), which torch.compile of PyTorch 2.11 cannot trace here
            func = torch.unflatten
        if func is checkpoint:  # seen only under torch.compile
            return recomputed(checkpoint, *args, **kwargs)
        answer = ANSWERS.get(func)
        if answer is None:
            return func(*args, **kwargs)
        if rules.tangents_are_hidden() or any(map(has_tangent, (*args, *kwargs.values()))):
            factors = [kwargs[name] for name in FACTORS if name in kwargs]  # their names differ between functions
            return answer(*args, *factors, **{k: v for k, v in kwargs.items() if k not in FACTORS})
        return func(*args, **kwargs)


class InBlock(jvp_ready):
    """The mode inside a checkpointed block."""


def opened(function: Callable[..., Any]) -> Callable[..., Any]:
    """Copy a function of torch.nn.functional without its check for overrides, so that the mode sees its calls."""
    space = types.ModuleType(f"{__name__}.opened")  # a module, as torch.compile looks a function's names up in one
    space.__dict__.update(function.__globals__, has_torch_function=lambda _: False, __name__=space.__name__)
    sys.modules[space.__name__] = space
    return types.FunctionType(
        function.__code__, space.__dict__, function.__name__, function.__defaults__, function.__closure__
    )


MULTI_HEAD_ATTENTION = opened(F.multi_head_attention_forward)


def multi_head_attention(*args: Any, **kwargs: Any) -> Any:
    """Run nn.MultiheadAttention with the mode on."""
    with jvp_ready():
        return MULTI_HEAD_ATTENTION(*args, **kwargs)


def _with(rule: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """Bind a rule that calls PyTorch's own function to it."""

    def answer(*args: Any, **kwargs: Any) -> Any:
        return rule(function, *args, **kwargs)

    return answer


def recomputed(checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call PyTorch's `checkpoint`; where an argument has a tangent, around the JVP of the function in the mode.

    PyTorch's checkpoint knows nothing of tangents: it recomputes after the JVP has ended, finds fewer tensors than were
    saved, and its backward fails. The JVP of the block, on the other hand, is an ordinary function of values and
    tangents.

    Raises:
        NotImplementedError: a function that uses a tensor with a tangent that is not among its arguments.
    """
    options = {name: kwargs.pop(name) for name in CHECKPOINT_OPTIONS & set(kwargs)}
    leaves, tree = tree_flatten((args, kwargs))
    moving = [i for i, x in enumerate(leaves) if has_tangent(x)]
    entered = _get_current_function_mode_stack()
    if not moving:
        if any(isinstance(mode, jvp_ready) for mode in entered):
            function = in_mode(function)
        return checkpoint(function, *args, **kwargs, **options)
    if any(isinstance(mode, InBlock) for mode in entered):  # PyTorch fails to recompute a block of a block
        return function(*args, **kwargs)

    rest: list[Any] = []  # the structure of results that are not one tensor: a JVP returns only tensors

    def of_moving(*values: Tensor) -> Any:
        given = list(leaves)
        for i, x in zip(moving, values, strict=True):
            given[i] = x
        args, kwargs = tree_unflatten(given, tree)
        with InBlock():
            result = function(*args, **kwargs)
        if isinstance(result, Tensor):
            return result
        found, shape = tree_flatten(result)
        rest[:] = shape, [None if isinstance(x, Tensor) else x for x in found]
        return tuple(x for x in found if isinstance(x, Tensor))

    def dual(values: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Any:
        return torch.func.jvp(of_moving, values, tangents)

    values, tangents = zip(*(unpack_dual(leaves[i]) for i in moving), strict=True)
    y, dy = checkpoint(dual, values, tangents, **options | {"use_reentrant": False})
    if any(map(has_tangent, tree_flatten(y)[0])):
        raise NotImplementedError(
            "torch.utils.checkpoint inside a JVP: the function uses a tensor with a tangent that is not among its "
            "arguments; pass it, as in checkpoint(function, x, c, use_reentrant=False)"
        )
    if isinstance(y, Tensor):
        return _dual(y, dy)
    shape, others = rest
    duals = map(_dual, y, dy)
    return tree_unflatten([next(duals) if x is None else x for x in others], shape)


def _dual(y: Tensor, dy: Tensor) -> Tensor:
    return forward_ad.make_dual(y, dy) if y.is_floating_point() or y.is_complex() else y  # indices have no tangent


def in_mode(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function run in the mode in the backward, too, which may come after the mode was left."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with jvp_ready():
            return function(*args, **kwargs)

    return call


@functools.cache
def see_checkpoints() -> None:
    """Route torch.utils.checkpoint.checkpoint through here, under whatever name it was imported.

    PyTorch keeps, as an attribute of the function, the form of it that eager mode calls; this sets the attribute. It is
    done once for the process: where no argument has a tangent nothing changes.
    """
    inner = getattr(checkpoint, "__wrapped__", None)
    if inner is None:
        return

    def first_call(*args: Any, **kwargs: Any) -> Any:  # here, because torch._dynamo takes a second to import
        import torch._dynamo

        here = torch._dynamo.disable(functools.partial(recomputed, inner), wrapping=False)
        setattr(inner, "__dynamo_disable", here)
        return here(*args, **kwargs)

    setattr(inner, "__dynamo_disable", first_call)


FACTORS = ("input", "other", "mat2")
AFFINE = (
    F.linear, torch.conv1d, torch.conv2d, torch.conv3d,
    torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
)  # fmt: skip
SOFTMAX = (F.softmax, torch.softmax, torch.Tensor.softmax)
PRODUCTS = (
    torch.matmul, torch.mm, torch.bmm, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.mm, torch.Tensor.bmm,
)  # fmt: skip
REFUSED = {  # functions whose tangent, or the gradient through it, is wrong; what to call instead
    torch.native_layer_norm: "torch.nn.functional.layer_norm",
    torch.instance_norm: "torch.nn.functional.instance_norm",
    **dict.fromkeys((torch.batch_norm, torch.native_batch_norm), "torch.nn.functional.batch_norm"),
    torch.linalg.solve_ex: "torch.linalg.solve",
    **dict.fromkeys((torch.cholesky_inverse, torch.Tensor.cholesky_inverse), "cholesky_solve of the identity"),
    **dict.fromkeys((torch.linalg.householder_product, torch.orgqr, torch.Tensor.orgqr), "torch.linalg.qr"),
}
ANSWERS: dict[Any, Callable[..., Any]] = {
    F.scaled_dot_product_attention: rules.scaled_dot_product_attention,
    F.multi_head_attention_forward: multi_head_attention,
    F.layer_norm: rules.layer_norm,
    torch.layer_norm: rules.layer_norm,
    F.group_norm: rules.group_norm,
    F.instance_norm: rules.instance_norm,
    F.batch_norm: rules.batch_norm,
    torch.linalg.solve: rules.solve,
    torch.linalg.tensorsolve: rules.tensorsolve,
    **dict.fromkeys((torch.linalg.det, torch.det, torch.Tensor.det), rules.det),
    **dict.fromkeys((torch.linalg.slogdet, torch.slogdet, torch.Tensor.slogdet), rules.slogdet),
    **dict.fromkeys((torch.logdet, torch.Tensor.logdet), rules.logdet),
    F.gelu: rules.gelu,
    F.glu: rules.glu,
    F.hardsigmoid: rules.hardsigmoid,
    **{function: _with(rules.affine, function) for function in AFFINE},
    **{function: _with(rules.product, function) for function in PRODUCTS},
    **{function: _with(rules.softmax, function) for function in SOFTMAX},
    **{function: functools.partial(rules.refused, function, instead) for function, instead in REFUSED.items()},
}
