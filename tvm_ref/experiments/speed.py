"""Measure how fast training is: time per step of every objective next to a flow-matching step.

    python -m tvm_ref.experiments.speed

Step times are taken in turns, as ratios to flow matching on the same network: as they are, and of the loss and its
gradients only, without optimizer and data. `seeds --steps N` says what quality N steps give.
"""

import json
import statistics
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from tvm_ref.cli.errors import user_files
from tvm_ref.cli.files import require_new, write_atomically
from tvm_ref.cli.options import OneLineParser, add_options, given, require_at_least, run
from tvm_ref.experiments.methods import METHODS
from tvm_ref.toy.config import ToyConfig, use_one_thread
from tvm_ref.toy.training import Batch, Training


def gradients(training: Training, batch: Batch) -> None:
    """Compute loss and gradients of one batch."""
    terms = training.objective(batch.x0, batch.x1, batch.times, batch.condition, training.target.module)
    terms.total.mean().backward()


def step_times(trainings: dict[str, Training], rounds: int, repeats: int) -> dict[str, dict[str, float]]:
    """Measure milliseconds per step, and per loss with gradients: medians over rounds, in which all take turns."""
    times: dict[str, dict[str, list[float]]] = {name: {"step": [], "gradients": []} for name in trainings}
    batches = {name: training.batch(training.step) for name, training in trainings.items()}
    for _ in range(rounds + 1):
        for name, training in trainings.items():
            for kind, call in (
                ("step", training.train_step),
                ("gradients", partial(gradients, training, batches[name])),
            ):
                started = time.perf_counter()
                for _ in range(repeats):
                    call()
                times[name][kind].append(1e3 * (time.perf_counter() - started) / repeats)
    # the first round warms up
    return {name: {kind: statistics.median(v[1:]) for kind, v in kinds.items()} for name, kinds in times.items()}


def table(times: dict[str, dict[str, float]]) -> str:
    """Format step times and their ratios to flow matching."""
    base = times["flow matching"]
    lines = [f"{'':<18} {'step':>9} {'ratio':>6} {'gradients':>10} {'ratio':>6}"]
    for name, t in times.items():
        lines.append(
            f"{name:<18} {t['step']:>6.2f} ms {t['step'] / base['step']:>6.2f} "
            f"{t['gradients']:>7.2f} ms {t['gradients'] / base['gradients']:>6.2f}"
        )
    return "\n".join(lines)


def parser() -> OneLineParser:
    """Make the command line."""
    p = OneLineParser("python -m tvm_ref.experiments.speed", __doc__)
    add_options(p, ToyConfig, ["batch_size", "width", "depth"])
    p.add_argument("--rounds", type=int, default=10, help="rounds of timing")
    p.add_argument("--repeats", type=int, default=20, help="steps per method and round")
    p.add_argument("--out", type=Path, help="also write the times to this JSON file")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    command = parser()
    arguments = command.parse_args(argv)
    use_one_thread()
    with command.errors(), user_files():
        base = ToyConfig(**given(arguments, ToyConfig))
        require_at_least(1, rounds=arguments.rounds, repeats=arguments.repeats)
        require_new(arguments.out)
    with command.errors():
        distribution = base.make_distribution()
        trainings = {name: Training(replace(base, **changes), distribution) for name, changes in METHODS.items()}
        times = step_times(trainings, arguments.rounds, arguments.repeats)
        print(f"batch size {base.batch_size}, width {base.width}, depth {base.depth}, one thread\n{table(times)}")
        if arguments.out is not None:
            write_atomically(arguments.out, json.dumps({"milliseconds": times}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    run(main)
