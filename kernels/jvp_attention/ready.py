"""jvp_ready: a mode in which ordinary networks are right under a differentiated JVP.

A `torch.overrides.TorchFunctionMode` sees every call of PyTorch's functions in its own thread, under whatever name a
network imported them, and torch.compile traces it. Replacing the names in torch.nn.functional would miss those imported
by value, and reach other threads; other rules for the operators would stay in the process, and escape torch.compile.

While a mode answers, PyTorch takes it off, so it does not see what a function written in Python calls. Of those only
nn.MultiheadAttention's matters, and `opened` shows it. What is called in C++ stays unseen: nn.LSTM is right, but
multiplies by absent tangents. A checkpoint is no such function; recompute.py sets one attribute for it.
"""

import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from jvp_attention import rules
from jvp_attention.recompute import install, recomputed


class jvp_ready(TorchFunctionMode):
    """Enter a context in which PyTorch's functions are right, and waste nothing, where they meet a tangent.

    >>> with jvp_ready():
    ...     y, dy = torch.func.jvp(network, (x,), (dx,))
    >>> loss(y, dy).backward()  # right also for layer norms, scaled_dot_product_attention and checkpoints

    - `F.scaled_dot_product_attention` is answered by `attention`, inside nn.MultiheadAttention and
      nn.TransformerEncoderLayer too; with an additive mask or dropout by attention written out.
    - `layer_norm`, `instance_norm`, `batch_norm` without running statistics, `linalg.solve`, `tensorsolve`, `det` and
      `slogdet`, whose gradient through a JVP PyTorch gets wrong, and `glu` and `hardsigmoid`, which it refuses, are
      written out.
    - Linear layers, convolutions and matrix products leave out the product with a tangent that is not there.
    - `torch.utils.checkpoint` recomputes the block's JVP.

    Values are PyTorch's up to rounding, and bit for bit where no argument has a tangent. Needs no GPU and no triton.

    Raises:
        NotImplementedError: in the network, from a norm that updates running statistics.
    """

    def __enter__(self) -> "jvp_ready":
        if not torch.compiler.is_compiling():
            install(jvp_ready)
        return super().__enter__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer one call."""
        kwargs = kwargs or {}
        if func is torch.Tensor.unflatten:  # which calls super(): torch.compile of PyTorch 2.11 cannot follow from here
            func = torch.unflatten
        if func is checkpoint:  # which only torch.compile asks about
            return recomputed(checkpoint, jvp_ready, *args, **kwargs)
        answer = ANSWERS.get(func)
        if answer is None:
            return func(*args, **kwargs)
        if rules.tangents_are_hidden() or any(map(rules.has_tangent, (*args, *kwargs.values()))):
            return answer(*args, **kwargs)
        return func(*args, **kwargs)


def opened(function: Callable[..., Any]) -> Callable[..., Any]:
    """Copy a function of torch.nn.functional without its question who else may answer: what it calls is then seen."""
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


AFFINE = (
    F.linear, torch.conv1d, torch.conv2d, torch.conv3d,
    torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
)  # fmt: skip
PRODUCTS = (
    torch.matmul, torch.mm, torch.bmm, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.mm, torch.Tensor.bmm,
)  # fmt: skip
ANSWERS: dict[Any, Callable[..., Any]] = {
    F.scaled_dot_product_attention: rules.scaled_dot_product_attention,
    F.multi_head_attention_forward: multi_head_attention,
    F.layer_norm: rules.layer_norm,
    torch.layer_norm: rules.layer_norm,
    F.instance_norm: rules.instance_norm,
    F.batch_norm: rules.batch_norm,
    torch.linalg.solve: rules.solve,
    torch.linalg.tensorsolve: rules.tensorsolve,
    **dict.fromkeys((torch.linalg.det, torch.det, torch.Tensor.det), rules.det),
    **dict.fromkeys((torch.linalg.slogdet, torch.slogdet, torch.Tensor.slogdet), rules.slogdet),
    F.glu: rules.glu,
    F.hardsigmoid: rules.hardsigmoid,
    **{function: _with(rules.affine, function) for function in AFFINE},
    **{function: _with(rules.product, function) for function in PRODUCTS},
}
