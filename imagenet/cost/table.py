"""Print what each preset costs, by arithmetic alone: nothing is run.

    python -m imagenet.cost.table
    python -m imagenet.cost.table --objectives        a step of every objective, in plain forwards; three minutes

First floating-point operations of matrix products per image, once forward, in a TVM step, and in one whose gradient
through the JVP is detached (flops.py); and of the whole training. Then memory (memory.py): of the state (weights, two
averages, the optimizer's moments) and of each image that is trained on at once, without and with --checkpointing; and
the smallest --accumulate that fits some machines, with --checkpointing where nothing else does.
"""

from dataclasses import replace

from imagenet.config import PRESETS, Config
from imagenet.cost.flops import counted_step_flops, forward_flops, least_step_flops
from imagenet.cost.memory import smallest_that_fits, state_bytes, weights_of, working_bytes
from tvm_ref import OBJECTIVES
from tvm_ref.cli.options import OneLineParser, run
from tvm_ref.cli.progress import progress

MACHINES = {"8 x 80 GB": (80e9, 8), "8 x 40 GB": (40e9, 8), "1 x 24 GB": (24e9, 1)}  # bytes of a card, and cards


def parser() -> OneLineParser:
    """Build the command line."""
    p = OneLineParser("python -m imagenet.cost.table", __doc__)
    p.add_argument(
        "--objectives",
        action="store_true",
        help="a step of every objective, without guidance, instead; takes some three minutes",
    )
    return p


def operations() -> str:
    """Format the operations of each preset: weights, FLOP per image and of all training."""
    lines = [f"{'preset':<18}{'weights':>10}{'forward':>12}{'step':>12}{'detached':>12}{'training':>11}"]
    for name, config in PRESETS.items():
        network, guided = config.network(), config.guided
        step = least_step_flops(network, guided=guided)
        detached = least_step_flops(network, detach_jvp=True, guided=guided)
        numbers = f"{forward_flops(network) / 1e9:>10.4g} G{step / 1e9:>10.4g} G{detached / 1e9:>10.4g} G"
        training = f"{step * config.batch_size * config.steps:>11.2g}"
        lines.append(f"{name:<18}{weights_of(config).all / 1e6:>8.4g} M{numbers}{training}")
    return "\n".join(lines)


def objectives(presets: tuple[str, ...] = ("digits", "imagenet256-w2")) -> str:
    """Format the products of a step of every objective in forwards of the same batch, without guidance."""
    lines = [f"{'objective':<12}" + "".join(f"{name:>16}" for name in presets)]
    for key in progress(OBJECTIVES, unit="objective", desc="counting"):
        configs = [replace(PRESETS[name], objective=key, w=1.0) for name in presets]
        ratios = [counted_step_flops(config) / forward_flops(config.network()) for config in configs]
        lines.append(f"{key:<12}" + "".join(f"{ratio:>16.1f}" for ratio in ratios))
    return "\n".join(lines)


def memory() -> str:
    """Format the memory of each preset: state, an image without and with checkpointing, and what fits machines."""
    head = f"{'preset':<18}{'state':>11}{'image':>11}{'checkpointed':>14}"
    lines = [head + "".join(f"{machine:>19}" for machine in MACHINES)]
    for name, config in PRESETS.items():
        images = [image_bytes(replace(config, checkpointing=on)) / 1e6 for on in (False, True)]
        fitting = (smallest_that_fits(config, size, cards) for size, cards in MACHINES.values())
        said = "".join(f"{settings(found):>19}" for found in fitting)
        state = state_bytes(config) / 1e9
        lines.append(f"{name:<18}{state:>8.3g} GB{images[0]:>8.4g} MB{images[1]:>11.4g} MB{said}")
    return "\n".join(lines)


def image_bytes(config: Config) -> int:
    """Return what one image more at once adds to a step."""
    return working_bytes(config, 65) - working_bytes(config, 64)


def settings(config: Config | None) -> str:
    """Format the settings that fit."""
    if config is None:
        return "nothing"
    return f"{config.accumulate}" + ", checkpointed" * config.checkpointing


def main(argv: list[str] | None = None) -> int:
    """Print the tables; returns the exit status."""
    options = parser().parse_args(argv)
    if options.objectives:
        print(objectives())
    else:
        print(operations(), memory(), sep="\n\n")
    return 0


if __name__ == "__main__":
    run(main)
