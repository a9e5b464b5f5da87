"""The arguments of attention, their shapes, and the one check of them at the package's boundary."""

import math
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Queries: TypeAlias = Float[Tensor, "b h n d"]  # batch, heads, queries, channels of a head
Keys: TypeAlias = Float[Tensor, "b g m d"]  # keys and values share their length; g divides h
Lengths: TypeAlias = Int[Tensor, " b"]  # how many keys each batch element has
Mask: TypeAlias = Bool[Tensor, "..."]  # which keys are visible to a query; broadcasts to [B, H, N, M]

LARGEST_HEAD = 256  # channels of a head
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LOWERED = (torch.float16, torch.bfloat16, torch.float32)  # dtypes that autocast casts


class Given(NamedTuple):
    """The arguments that every implementation of attention starts with; a tangent that is None is zero."""

    q: Tensor
    k: Tensor
    v: Tensor
    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None
    lengths: Tensor | None
    mask: Tensor | None
    scale: float  # None, for 1/sqrt(D), before the check
    causal: bool

    @classmethod
    def split(cls, arguments: tuple[Any, ...]) -> tuple["Given", tuple[Any, ...]]:
        """Gather the arguments of an operator: these, and what follows them."""
        count = len(cls._fields)
        return cls(*arguments[:count]), arguments[count:]

    @property
    def has_tangent(self) -> bool:
        """Return whether an input has a tangent, so that there is a JVP to compute."""
        return self.dv is not None or self.logits_have_tangent

    @property
    def logits_have_tangent(self) -> bool:
        """Return whether q or k has a tangent; with v's only, T, mu and U are zero."""
        return self.dq is not None or self.dk is not None

    def without_tangents(self) -> "Given":
        """Return the same problem as ordinary attention."""
        return self._replace(dq=None, dk=None, dv=None)


def default_scale(q: Tensor, scale: float | None) -> float:
    """Return the factor of the logits: 1/sqrt(D) unless given, as in scaled_dot_product_attention."""
    return q.shape[-1] ** -0.5 if scale is None else scale


def check_and_cast(given: Given) -> Given:
    """Cast as autocast wants the inputs of matmuls, check the arguments, and fill in what they leave out.

    Raises:
        TypeError: inputs that are not tensors, or nested; dtypes that differ or are not supported; a tensor as scale;
            lengths that are not an int32 or int64 tensor; a mask that is not boolean.
        ValueError: shapes that do not fit, no queries, keys or channels, more than LARGEST_HEAD channels per head, or a
            scale that is not finite.
    """
    tensors = dict(zip(Given._fields, given[:6], strict=False))
    for name, x in tensors.items():
        if not isinstance(x, Tensor) and not (x is None and name.startswith("d")):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if isinstance(x, Tensor) and x.is_nested:
            raise TypeError(f"{name} is a nested tensor; pad it, and give each length in `lengths`")
    device = given.q.device.type
    # devices without autocast, such as meta, would raise; torch.compile of PyTorch 2.11 cannot ask which those are
    if (torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)  # float64 is left alone, as by scaled_dot_product_attention
        casts = {name: x.to(dtype) for name, x in tensors.items() if x is not None and x.dtype in LOWERED}
        given = given._replace(**casts)  # type: ignore[arg-type]
    _check(given)
    q, k, mask = given.q, given.k, given.mask
    if mask is not None:  # broadcast as in scaled_dot_product_attention, except batch and heads
        mask = mask[(None,) * (4 - mask.ndim)].expand(-1, -1, q.shape[2], k.shape[2])
    return given._replace(scale=default_scale(q, given.scale), mask=mask)


def _check(given: Given) -> None:
    # one expression each, to save time on the host
    q, k, v, *tangents = given[:6]
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(_misfit(q, k, v))
    (batch, heads, _, channels), (_, groups, _, _) = q.shape, k.shape
    if k.shape != v.shape or k.shape[0] != batch or k.shape[3] != channels or (heads % groups if groups else heads):
        raise ValueError(_misfit(q, k, v))
    if 0 in q.shape[2:] or k.shape[2] == 0:
        raise ValueError(f"attention takes no empty axis but the batch's, got q {list(q.shape)} and k {list(k.shape)}")
    if channels > LARGEST_HEAD:
        raise ValueError(f"heads have at most {LARGEST_HEAD} channels, got {channels}")
    if any(x.dtype != q.dtype for x in (k, v)) or q.dtype not in DTYPES:
        raise TypeError(
            "attention takes inputs of one dtype among float16, bfloat16, float32 and float64, "
            f"got {', '.join(str(x.dtype) for x in (q, k, v))}"
        )
    for x, dx in zip((q, k, v), tangents, strict=True):
        if dx is not None and dx.shape != x.shape:
            raise ValueError(f"a tangent must have its input's shape {list(x.shape)}, got {list(dx.shape)}")
        if dx is not None and dx.dtype != x.dtype:
            raise TypeError(f"a tangent must have its input's dtype {x.dtype}, got {dx.dtype}")
    others = [k, v, *(dx for dx in tangents if dx is not None)]
    if any(x.device != q.device for x in others):
        raise ValueError(f"attention takes inputs on one device, got {', '.join(str(x.device) for x in (q, *others))}")
    if isinstance(given.scale, Tensor):
        raise TypeError(
            "scale must be a number; multiply a scale that is a tensor, and may have derivatives, into q: "
            "attention(scale * q, k, v, scale=1.0)"
        )
    if given.scale is not None and not math.isfinite(given.scale):
        raise ValueError(f"scale must be finite, got {given.scale}")
    if given.lengths is not None:
        _check_lengths(q, given.lengths)
    if given.mask is not None:
        _check_mask(q, k, given.mask)


def _misfit(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Say what shapes are taken and which were given."""
    return (
        "attention takes q [B, H, N, D] and k, v [B, H, M, D], the heads of k and v perhaps fewer by a factor, "
        f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    )


def _check_lengths(q: Tensor, lengths: Tensor) -> None:
    """Raise unless lengths is [B], of int32 or int64, on q's device. It never reads the values, to wait for no GPU."""
    if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int32, torch.int64):
        found = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"lengths must be a tensor of int32 or int64, got {found}")
    if lengths.shape != q.shape[:1]:
        raise ValueError(f"lengths must have one number per batch element, {[q.shape[0]]}, got {list(lengths.shape)}")
    if lengths.device != q.device:
        raise ValueError(f"lengths must be on the inputs' device {q.device}, got {lengths.device}")


def _check_mask(q: Tensor, k: Tensor, mask: Tensor) -> None:
    """Raise unless mask is boolean, of two to four axes that broadcast to [B, H, N, M], on q's device."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a boolean tensor, true where a key is visible to a query, got {found}")
    full = (*q.shape[:3], k.shape[2])
    fits = all(n in (1, size) for n, size in zip(mask.shape[::-1], full[::-1], strict=False))
    if mask.ndim not in (2, 3, 4) or not fits:
        raise ValueError(f"mask must broadcast to {list(full)}, got {list(mask.shape)}")
    if mask.device != q.device:
        raise ValueError(f"mask must be on the inputs' device {q.device}, got {mask.device}")
