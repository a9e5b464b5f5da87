"""Count the arithmetic of a TVM step: the least possible, and what runs.

Only matmuls count; everything else (norms, GELU, softmax, optimizer) is a few per cent of them.

A layer y = x W^T costs one product in a forward, and two in its backward: one for x, one for W. In the pass with a
tangent, y' = x' W^T is a second product, and its backward two more. Both factors of attention's two products have
tangents, S = Q K^T and O = P V, so that S' = Q' K^T + Q K'^T: two products for the tangent, four more in its backward.
In products per forward product,

                                          a layer            attention
    forward, value and tangent             1 + 1               1 + 2
    backward of both                       2 + 2               2 + 4
    flow matching, forward and backward    1 + 2               1 + 2
    two forwards of the target             2                   2
    TVM step                               11                  14
    the same, gradient of JVP detached     9                   10

Layers with nothing trained before them (patches, the first of each scalar embedding) save the product for x, and
layers that do not depend on s (patches, embeddings of t and of beta) save those of tangents.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from imagenet.config import Config, build_model
from imagenet.model.dit import FREQUENCIES, DiTConfig
from tvm_ref import OBJECTIVES, Condition, Times
from tvm_ref.objectives import ResidualObjective
from tvm_ref.seeding import uniform_numbers


class Part(NamedTuple):
    """Some of a network's products.

    Attributes:
        macs: multiplications with addition in a forward of one sample.
        moves: factors of each product that have a tangent once s has one: 0, 1 (a layer) or 2 (attention).
        gradients: factors of each product that need a gradient: the weight, and the input if it is trained.
    """

    macs: int
    moves: int
    gradients: int


def parts(config: DiTConfig) -> list[Part]:
    """List the products of a DiT."""
    d, patch = config.hidden_size, config.patch_size**2 * config.in_channels
    tokens = (config.input_size // config.patch_size) ** 2
    first, second = 2 * FREQUENCIES * d, d * d
    return [
        Part(config.depth * tokens * 12 * d**2, 1, 2),  # qkv, proj: 4 d^2; MLP: 8 d^2
        Part(config.depth * 2 * tokens**2 * d, 2, 2),  # scores, and values weighted by them
        Part((6 * config.depth + 2) * d**2, 1, 2),  # modulations
        Part(tokens * d * patch, 1, 2),  # output
        Part(tokens * patch * d, 0, 1),  # patches
        Part(first, 1, 1),  # t - s
        Part(second, 1, 2),
        Part(2 * first, 0, 1),  # t and beta
        Part(2 * second, 0, 2),
    ]


def forward_flops(config: DiTConfig) -> int:
    """Return the floating-point operations of one forward of one sample."""
    return 2 * sum(part.macs for part in parts(config))


def least_step_flops(config: DiTConfig, *, detach_jvp: bool = False, guided: bool = True) -> int:
    """Return the floating-point operations that a TVM step needs per sample, by the table above.

    Args:
        config: the network.
        detach_jvp: no gradient through dF/ds.
        guided: the target is called a second time, without a class, for classifier-free guidance.
    """
    total = 0
    for macs, moves, gradients in parts(config):
        dual = 1 + moves + gradients * (1 if detach_jvp else 1 + moves)
        total += macs * (dual + 1 + gradients + 1 + guided)
    return 2 * total


def count_flops(step: Callable[[], object]) -> int:
    """Count the floating-point operations of the matmuls that `step` runs; it may run on the device "meta"."""
    from torch.utils.flop_counter import FlopCounterMode  # imports triton: not for --help

    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def counted_step_flops(config: Config) -> int:
    """Count the floating-point operations that the training step of a configuration runs, per sample.

    Nothing is computed (it runs on the device "meta"), and attention is plain: a fused kernel hides its products. A
    curriculum is at its end, where alpha-Flow is MeanFlow. Where a method's times decide whether a sample is a jump or
    flow matching, both are counted, weighted by how often the times are equal.
    """
    objective = OBJECTIVES[config.objective]
    if not issubclass(objective, ResidualObjective):
        return _count_step(config)
    t, s, _ = config.sampler().from_uniform(uniform_numbers(4096, 4, 0).T)
    equal = float((t == s).double().mean())
    jump, velocity = _count_step(config), _count_step(replace(config, objective="fm", settings={}))
    return round((1 - equal) * jump + equal * velocity)


def _count_step(config: Config) -> int:
    b, side = 2, config.input_size
    with torch.device("meta"):
        model, target = (build_model(config, attention="plain") for _ in range(2))
        objective = config.make_objective(model)
        objective.set_progress(1.0)
        x, t = torch.empty(b, config.in_channels, side, side), torch.empty(b)
        condition = Condition(torch.empty(b, dtype=torch.long), t)

        def step() -> None:
            terms = objective(x, x, Times(t, t, t), condition, target.requires_grad_(False))
            terms.total.mean().backward()

        return count_flops(step) // b


def weights_of(config: Config) -> list[torch.Size]:
    """List the shapes of the trained weights of a configuration's network, which is not built."""
    with torch.device("meta"):
        return [p.shape for p in build_model(config, attention="plain").parameters()]
