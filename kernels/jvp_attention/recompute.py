"""torch.utils.checkpoint inside a JVP: what is checkpointed is the block's own JVP.

PyTorch's checkpoint knows nothing of tangents: it recomputes after the JVP has ended, finds fewer tensors than were
saved, and its backward fails. The JVP of the block, on the other hand, is an ordinary function of values and tangents.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils import checkpoint as pytorch
from torch.utils._pytree import tree_flatten, tree_unflatten

from jvp_attention.rules import has_tangent, unpack_dual

OPTIONS = {"preserve_rng_state"} | {  # of checkpoint itself; other keywords are the function's
    name
    for name, parameter in inspect.signature(pytorch.checkpoint).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY or name == "use_reentrant"
}


def recomputed(
    checkpoint: Callable[..., Any], mode: type, function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Call PyTorch's `checkpoint`; where an argument has a tangent, around the JVP of the function under the mode.

    Raises:
        NotImplementedError: a function that uses a tensor with a tangent that is none of its arguments.
    """
    options = {name: kwargs.pop(name) for name in OPTIONS & set(kwargs)}
    leaves, tree = tree_flatten((args, kwargs))
    moving = [i for i, x in enumerate(leaves) if has_tangent(x)]
    if not moving:
        if any(isinstance(entered, mode) for entered in _get_current_function_mode_stack()):
            function = _under(mode, function)
        return checkpoint(function, *args, **kwargs, **options)

    rest: list[Any] = []  # of results that are not one tensor: a JVP returns only tensors

    def of_moving(*values: Tensor) -> Any:
        given = list(leaves)
        for i, x in zip(moving, values, strict=True):
            given[i] = x
        args, kwargs = tree_unflatten(given, tree)
        result = _under(mode, function)(*args, **kwargs)
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
        return forward_ad.make_dual(y, dy)
    shape, others = rest
    duals = map(forward_ad.make_dual, y, dy)
    return tree_unflatten([next(duals) if x is None else x for x in others], shape)


def _under(mode: type, function: Callable[..., Any]) -> Callable[..., Any]:
    """Run a function in the mode in the backward, too, which may come after the mode was left."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with mode():
            return function(*args, **kwargs)

    return call


@functools.cache
def install(mode: type) -> None:
    """Let torch.utils.checkpoint.checkpoint come by here, under every name that it was imported by.

    PyTorch keeps, as an attribute of the function, the form of it that eager mode calls; this sets the attribute. It is
    done once for the process: where no argument has a tangent nothing changes.
    """
    inner = getattr(pytorch.checkpoint, "__wrapped__", None)
    if inner is None:
        return

    def first_call(*args: Any, **kwargs: Any) -> Any:  # torch._dynamo takes a second to import
        import torch._dynamo

        here = torch._dynamo.disable(functools.partial(recomputed, inner, mode), wrapping=False)
        setattr(inner, "__dynamo_disable", here)
        return here(*args, **kwargs)

    setattr(inner, "__dynamo_disable", first_call)
