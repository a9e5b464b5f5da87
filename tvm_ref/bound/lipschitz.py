"""Measure how fast a velocity field changes in space: spectral norms of its Jacobian, exact in 2D."""

from collections.abc import Callable

import torch
from torch import Tensor

from tvm_ref.flow_map import jvp
from tvm_ref.shapes import PerSample, Sample

Field = Callable[[Tensor], Tensor]  # x [B, ...] to u(x) [B, ...], each sample independently
POWER_ITERATIONS = 30


def jacobian_norms(field: Field, x: Sample) -> PerSample:
    """Return the spectral norm ||du/dx|| [B] at points x [B, ...]: exact for one or two elements, else by iteration."""
    return exact_norms(field, x) if x[0].numel() <= 2 else power_iteration_norms(field, x)


def exact_norms(field: Field, x: Sample) -> PerSample:
    """Return the largest singular value [B] of the Jacobian at points x [B, ...], by a backward per element."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        u = field(x).flatten(1)
        rows = [torch.autograd.grad(a.sum(), x, retain_graph=True)[0].flatten(1) for a in u.unbind(1)]
    return torch.linalg.matrix_norm(torch.stack(rows, 1), 2)  # of [B, D, D]


def power_iteration_norms(field: Field, x: Sample, iterations: int = POWER_ITERATIONS) -> PerSample:
    """Estimate the largest singular value [B] of the Jacobian at x [B, ...] from below, by power iteration on J^T J."""
    generator = torch.Generator(x.device).manual_seed(0)
    direction = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    norm = direction.new_zeros(len(x))
    for _ in range(iterations):
        direction = direction / _norms(direction).clamp_min(torch.finfo(x.dtype).tiny)
        image = jvp(field, (x,), (direction,))[1]
        norm = torch.maximum(norm, _norms(image).flatten())
        variable = x.detach().requires_grad_()
        with torch.enable_grad():
            (direction,) = torch.autograd.grad(field(variable), variable, image)
    return norm.detach()


def _norms(x: Tensor) -> Tensor:
    """Take the norm ||x|| of each sample [B, 1, ..., 1]."""
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True)


def largest_on_segments(field: Field, x: Sample, y: Sample) -> float:
    """Find the largest ||du/dx|| over the points x and y [B, ...] and those halfway between each pair."""
    return max(float(jacobian_norms(field, torch.lerp(x, y, part)).max()) for part in (0.0, 0.5, 1.0))
