"""The path from data to noise that flow matching conditions on (paper, sec. 2)."""

from tvm_ref.checks import checked_data
from tvm_ref.shapes import Sample, Time, over


@checked_data
def interpolate(x0: Sample, x1: Sample, t: Time) -> Sample:
    """Return x_t = (1 - t) x0 + t x1 [B, ...] (sec. 2), from data x0 and noise x1, both [B, ...], at times t [B].

    Raises:
        ValueError: shapes that do not fit.
        TypeError: integer data, such as raw images.
    """
    # a straight line from data (t = 0) to noise (t = 1), so that its velocity does not depend on t
    return over(1 - t, x0) * x0 + over(t, x0) * x1


def conditional_velocity(x0: Sample, x1: Sample) -> Sample:
    """Return the velocity v = d/dt x_t = x1 - x0 [B, ...] (sec. 2)."""
    return x1 - x0
