"""Print what each preset costs, by arithmetic alone: nothing is run.

    python imagenet/preset_costs.py

Floating-point operations of matrix products per image, once forward, in a TVM step, and in one whose gradient through
the JVP is detached (flops.py); of the whole training; memory of weights, gradient, optimizer and averages.
"""

from imagenet.flops import count_weights, forward_flops, least_step_flops
from imagenet.presets import PRESETS
from tvm_ref.command_line import OneLineParser, run

STATE_BYTES = 24  # per weight, in float32: weight, gradient, two moments of Adam, two averages


def parser() -> OneLineParser:
    """Build the command line."""
    return OneLineParser("preset_costs.py", __doc__)


def table() -> str:
    """Format the cost of each preset: weights, FLOP per image and of all training, memory of what a step changes."""
    head = f"{'preset':<18}{'weights':>10}{'forward':>12}{'step':>12}{'detached':>12}{'training':>11}{'state':>12}"
    lines = [head]
    for name, config in PRESETS.items():
        network, weights, guided = config.network(), count_weights(config), config.guided
        step = least_step_flops(network, guided=guided)
        detached = least_step_flops(network, detach_jvp=True, guided=guided)
        numbers = f"{forward_flops(network) / 1e9:>10.4g} G{step / 1e9:>10.4g} G{detached / 1e9:>10.4g} G"
        training = f"{step * config.batch_size * config.steps:>11.2g}"
        lines.append(f"{name:<18}{weights / 1e6:>8.4g} M{numbers}{training}{STATE_BYTES * weights / 1e9:>9.3g} GB")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Print the table; returns the exit status."""
    parser().parse_args(argv)
    print(table())
    return 0


if __name__ == "__main__":
    run(main)
