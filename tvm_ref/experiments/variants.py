"""Train variants of methods on one budget of matmuls, and report them; shared by causes and relatives."""

import contextlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tvm_ref.cli.errors import user_files
from tvm_ref.cli.files import require_free, write_atomically
from tvm_ref.cli.options import OneLineParser, add_options, given, require_at_least
from tvm_ref.cli.progress import progress
from tvm_ref.experiments.compare import cells, errors
from tvm_ref.toy.config import ToyConfig, use_one_thread
from tvm_ref.toy.report.metrics import Reference, make_reference
from tvm_ref.toy.training import Training

RATE = 0.01  # default learning rate, the best of compare.py
COLUMNS = (1, 2, 4, 16)  # NFEs of the table
RESULTS = "results.json"

Report = dict[str, Any]


def parser(name: str, description: str, variants: Collection[str]) -> OneLineParser:
    """Make the command line of the experiment called `name`."""
    p = OneLineParser(f"python -m tvm_ref.experiments.{name}", description)
    add_options(p, ToyConfig, ["dist", "batch_size", "width", "depth"])
    p.add_argument("--steps", type=int, default=500, help="budget of each training, in steps of TVM")
    p.add_argument("--variants", nargs="+", choices=tuple(variants), default=tuple(variants), help="(default: all)")
    p.add_argument("--seeds", type=int, default=3, help="number of seeds per variant")
    p.add_argument("--points", type=int, default=2000, help="number of samples to measure errors on")
    p.add_argument("--out", type=Path, help=f"folder to write (default: runs/toy/NAME-{name})")
    return p


def begin(name: str, command: OneLineParser, arguments: Any) -> tuple[ToyConfig, Path]:
    """Check the options and make the folder; return the common options, and the folder."""
    use_one_thread()
    with command.errors(), user_files():
        base = ToyConfig(**given(arguments, ToyConfig), lr=RATE)
        require_at_least(1, seeds=arguments.seeds)
        require_at_least(10, points=arguments.points)
        out: Path = arguments.out or Path("runs/toy") / f"{base.name}-{name}"
        require_free(out, [RESULTS], "measurements")
        out.mkdir(parents=True, exist_ok=True)
    return base, out


def train(
    configs: Mapping[str, ToyConfig],
    make: Callable[[str, ToyConfig], Training],
    arguments: Any,
    report: Report,
    out: Path,
    reference: Reference | None = None,
) -> Iterator[tuple[str, Training]]:
    """Train every variant on every seed; add its errors to the report, write that, and yield what did not diverge."""
    runs = [(name, seed) for name in configs for seed in range(arguments.seeds)]
    with progress(total=sum(configs[name].steps for name, _ in runs), unit="step", desc="training", smoothing=0) as bar:
        for done, (name, seed) in enumerate(runs):
            bar.set_postfix_str(f"{done} of {len(runs)} trainings", refresh=False)
            config = replace(configs[name], seed=seed)
            training = make(name, config)
            reference = reference or make_reference(training.distribution, points=arguments.points)
            found: dict[str, Any] = {"objective": config.objective, "seed": seed, "figures": {}}
            with contextlib.suppress(FloatingPointError):  # no figures: its errors count as infinite
                for _ in range(config.steps):
                    training.train_step()
                    bar.update()
                found["figures"] = errors(training, reference)
            bar.update(config.steps - training.step)
            row = {"lr": config.lr, "steps": config.steps, "runs": []}
            report["variants"].setdefault(name, row)["runs"].append(found)
            write_atomically(out / RESULTS, json.dumps(report, indent=2) + "\n")
            if found["figures"]:
                yield name, training


def table(report: Report) -> str:
    """Format the median paired RMSE over seeds, and the range, per variant and NFE."""
    lines = [f"{'variant':<27} {'lr':>6} {'steps':>6}  " + " ".join(f"{f'NFE {n}':^21}" for n in COLUMNS)]
    for name, variant in report["variants"].items():
        lines.append(f"{name:<27} {variant['lr']:>6g} {variant['steps']:>6}  {cells(variant['runs'], COLUMNS)}")
    return "\n".join(lines)
