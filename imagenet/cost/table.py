"""Print the cost of each preset, by arithmetic only: nothing is run.

    python -m imagenet.cost.table
    python -m imagenet.cost.table --objectives        a step of every objective, and its memory; three minutes

The columns: trained weights; the state of a training (weights, two averages, the optimizer's moments); floating-point
operations of matmuls per image, in a forward, in a TVM step, and in one whose gradient through the JVP is
detached (flops.py); and those of the whole training. With --objectives: matmuls of a step in units of a plain forward
of the same batch, and the measured peak memory of a step on digits relative to flow matching (memory.py).
"""

from dataclasses import replace

from imagenet.config import PRESETS
from imagenet.cost.flops import counted_step_flops, forward_flops, least_step_flops, weights_of
from imagenet.cost.memory import state_bytes, step_bytes
from tvm_ref import OBJECTIVES
from tvm_ref.cli.options import OneLineParser, run
from tvm_ref.cli.progress import progress

MEASURED = 64  # samples of the batch whose memory is measured


def parser() -> OneLineParser:
    """Build the command line."""
    p = OneLineParser("python -m imagenet.cost.table", __doc__)
    p.add_argument(
        "--objectives",
        action="store_true",
        help="print the cost of a step of every objective instead, without guidance; takes about three minutes",
    )
    return p


def presets() -> str:
    """Format the table of presets."""
    head = f"{'preset':<18}{'weights':>10}{'state':>11}{'forward':>12}{'step':>12}{'detached':>12}{'training':>11}"
    lines = [head]
    for name, config in PRESETS.items():
        network, guided = config.network(), config.guided
        step = least_step_flops(network, guided=guided)
        detached = least_step_flops(network, detach_jvp=True, guided=guided)
        weights = sum(shape.numel() for shape in weights_of(config))
        lines.append(
            f"{name:<18}{weights / 1e6:>8.4g} M{state_bytes(config) / 1e9:>8.3g} GB"
            f"{forward_flops(network) / 1e9:>10.4g} G{step / 1e9:>10.4g} G{detached / 1e9:>10.4g} G"
            f"{step * config.batch_size * config.steps:>11.2g}"
        )
    return "\n".join(lines)


def objectives(presets: tuple[str, ...] = ("digits", "imagenet256-w2")) -> str:
    """Format the products of a step of every objective, and the memory of the first preset's.

    Products are in forwards of the same batch, memory (memory.py) in flow matching's; both are without guidance.
    """
    lines = [f"{'objective':<12}" + "".join(f"{name:>16}" for name in presets) + f"{'memory':>10}"]
    small = replace(PRESETS[presets[0]], w=1.0, batch_size=MEASURED)
    unit = step_bytes(replace(small, objective="fm"))
    for key in progress(OBJECTIVES, unit="objective", desc="counting"):
        configs = [replace(PRESETS[name], objective=key, w=1.0) for name in presets]
        ratios = [counted_step_flops(config) / forward_flops(config.network()) for config in configs]
        peak = step_bytes(replace(small, objective=key)) / unit
        lines.append(f"{key:<12}" + "".join(f"{ratio:>16.1f}" for ratio in ratios) + f"{peak:>10.1f}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Print a table; returns the exit status."""
    print(objectives() if parser().parse_args(argv).objectives else presets())
    return 0


if __name__ == "__main__":
    run(main)
