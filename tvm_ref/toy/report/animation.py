"""Animate a run: noise falling through the exact flow in many steps, beside one jump of the model to the same time.

    python -m tvm_ref.toy.report.animation runs/toy/moons                      writes runs/toy/moons/animation.gif
    python -m tvm_ref.toy.report.animation runs/toy/moons --out moons.gif

On the left every frame goes one step on from the frame before. On the right every frame is one single evaluation of the
network, from the noise to the time s that the frame shows, and s sweeps from 1 to 0.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

from tvm_ref.cli.errors import UserError, user_files
from tvm_ref.cli.files import require_suffix
from tvm_ref.cli.options import OneLineParser
from tvm_ref.cli.options import run as run_command
from tvm_ref.cli.progress import progress
from tvm_ref.objectives import OBJECTIVES
from tvm_ref.sampling import sample_path
from tvm_ref.seeding import EVALUATION
from tvm_ref.toy.config import use_one_thread
from tvm_ref.toy.run import load_run

POINTS = 600
STEPS = 40  # of the left picture: one per frame


def paths(run: Path) -> tuple[list[float], Tensor, Tensor]:
    """Return times [S + 1] from 1 to 0, and at each the same noise by the exact flow and by one jump: [S + 1, N, 2].

    Raises:
        ValueError, OSError: a folder without a finished run, or one with classes or without jumps.
    """
    config, distribution, model = load_run(run)
    if config.conditional:
        raise UserError(f"{run} is conditioned on classes; this animation shows runs without --conditional")
    if not OBJECTIVES[config.objective].learns_jumps:
        raise UserError(f"{run} was trained by --objective {config.objective}, which teaches no jumps")
    noise = torch.randn(POINTS, 2, generator=torch.Generator().manual_seed(EVALUATION))
    times = [1 - i / STEPS for i in range(STEPS + 1)]
    print(f"carrying {POINTS} points by the exact flow, in {STEPS} steps")
    exact = torch.stack(sample_path(distribution.jump, noise, times))
    start = torch.ones(POINTS)
    with torch.no_grad():
        jumps = torch.stack([model.jump(noise, start, torch.full((POINTS,), s)) for s in times])
    return times, exact, jumps


def animate(run: Path, out: Path) -> None:
    """Write the animation of a run as a GIF that repeats forever.

    Raises:
        ValueError, OSError: see paths; a file that cannot be written.
    """
    times, exact, jumps = paths(run)
    from tvm_ref.toy.report import frames  # matplotlib and Pillow, which --help and bad options need not wait for

    out.parent.mkdir(parents=True, exist_ok=True)
    steps = progress(range(len(times)), desc="drawing", unit="frame", file=sys.stdout)
    frames.write_gif([frames.draw_frame(times, exact, jumps, step) for step in steps], out)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = OneLineParser("python -m tvm_ref.toy.report.animation", __doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--out", type=Path, help="file to write, replaced if it is there (default: RUN/animation.gif)")
    options = parser.parse_args(argv)
    out = options.out or options.run / "animation.gif"
    use_one_thread()
    with parser.errors(), user_files():
        require_suffix(out, ".gif")
        animate(options.run, out)
    print(f"{out}: {out.stat().st_size / 1e3:,.0f} kB")
    return 0


if __name__ == "__main__":
    run_command(main)
