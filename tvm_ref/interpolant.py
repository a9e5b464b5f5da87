"""The path from data to noise that flow matching conditions on (paper, sec. 2)."""

import warnings

from tvm_ref.shapes import Sample, Time, check_batch, over, values_are_cheap

FAR = 100.0  # of the noise's standard deviations: bytes as floats go further


def interpolate(x0: Sample, x1: Sample, t: Time) -> Sample:
    """Return x_t = (1 - t) x0 + t x1 [B, ...] (sec. 2), from data x0 and noise x1, both [B, ...], at times t [B].

    Raises:
        ValueError: shapes that do not fit.
        TypeError: whole numbers, as image files hold them.
    """
    if not x0.is_floating_point():
        raise TypeError(f"data must be floating-point numbers, got {x0.dtype}; scale images to [-1, 1]: x0 / 127.5 - 1")
    if values_are_cheap(x0) and x0.numel() and float(x0.detach().abs().amax()) > FAR:
        warnings.warn(f"data reach beyond {FAR:g}, where noise has standard deviation 1; scale them", stacklevel=3)
    if x0.shape != x1.shape:
        raise ValueError(f"x0 and x1 must have the same shape, got {list(x0.shape)} and {list(x1.shape)}")
    check_batch(x0, t)
    return over(1 - t, x0) * x0 + over(t, x0) * x1


def conditional_velocity(x0: Sample, x1: Sample) -> Sample:
    """Return the velocity v = d/dt x_t = x1 - x0 [B, ...] (sec. 2)."""
    return x1 - x0
