"""TVM beside its relatives on equal terms: one network, one optimizer, equal training time.

    python -m tvm_ref.toy.compare --dist moons                                          all, hours of one core
    python -m tvm_ref.toy.compare --dist moons --methods TVM MeanFlow "flow matching"   some

Step times are measured side by side first; each method then gets the number of steps that fits in --seconds. Each has
its own law of times and its own sweep, of learning rates and of the one setting that its paper stresses, on a seed of
its own, judged at the NFE that it is for (1; 64 for flow matching). With the best of both it is then trained on --seeds
seeds. A rate at the sweep's edge is marked by an asterisk: the best may lie beyond.
Writes results.json, a table and error.png: error against the number of function evaluations (NFE).
"""

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tvm_ref.command_line import (
    OneLineParser,
    add_options,
    given,
    require_at_least,
    require_free,
    run,
    write_atomically,
)
from tvm_ref.objectives import OBJECTIVES
from tvm_ref.toy.config import ToyConfig, use_one_thread
from tvm_ref.toy.metrics import POINTS, Reference, paired_errors
from tvm_ref.toy.run import distribution_of
from tvm_ref.toy.sweep import train_many
from tvm_ref.toy.training import Training

NFES = (1, 2, 4, 8, 16, 32, 64)
SHARED = ("dist", "data", "bandwidth", "batch_size", "width", "depth", "time_sampler", "noise_share")
SWEEP_SEED = 1000  # apart from the seeds that are reported
METHODS: dict[str, dict[str, Any]] = {
    "TVM": {},
    "TVM, JVP detached": {"detach_jvp": True},
    "LSD": {"objective": "lsd"},
    "PID": {"objective": "pid"},
    "ESD": {"objective": "esd"},
    "MeanFlow": {"objective": "meanflow"},
    "improved MeanFlow": {"objective": "imf"},
    "sCT": {"objective": "sct"},
    "alpha-Flow": {"objective": "alphaflow"},
    "SoFlow": {"objective": "soflow"},
    "PSD": {"objective": "psd"},
    "shortcut": {"objective": "shortcut"},
    "flow matching": {"objective": "fm"},
}
SETTINGS: dict[str, tuple[dict[str, Any], ...]] = {  # what is swept beside the rate; the first is the method's default
    "TVM": ({}, {"time_sampler": "trunc"}),
    "LSD": ({}, {"settings": "learned_weight=True"}),
    "PID": ({}, {"time_sampler": "trunc"}),
    "ESD": ({}, {"settings": "stops='full'"}),
    "MeanFlow": ({}, {"settings": "power=0"}),
    "improved MeanFlow": ({}, {"settings": "power=0"}),
    "sCT": ({}, {"settings": "constant=None"}),
    "alpha-Flow": ({}, {"settings": "power=0"}),
    "SoFlow": ({}, {"settings": "power=0"}),
    "PSD": ({}, {"settings": "split='uniform'"}),
    "shortcut": ({}, {"equal_share": 0.5}),
}


def step_seconds(configs: dict[str, ToyConfig], rounds: int = 8, steps: int = 20) -> dict[str, float]:
    """Measure median seconds per training step of each configuration, in turns: a noisy machine is then fair to all."""
    trainings = {name: Training(config, distribution_of(config)) for name, config in configs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in trainings}
    for _ in range(rounds):
        for name, training in trainings.items():
            begun = time.perf_counter()
            for _ in range(steps):
                training.train_step()
            seconds[name].append((time.perf_counter() - begun) / steps)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}  # the first round warms up


def errors(training: Training, reference: Reference) -> dict[str, float]:
    """Measure the paired RMSE at every NFE."""
    kind = OBJECTIVES[training.config.objective]
    nfes = NFES if kind.learns_all_jumps or not kind.learns_jumps else NFES[:1]
    return {str(n): float(paired_errors(training.evaluated, reference, n)[1].square().mean().sqrt()) for n in nfes}


def error(result: dict[str, Any], nfe: int) -> float:
    """Look up a training's paired RMSE: infinite if it diverged, NaN at an NFE that the method is not for."""
    return result["figures"].get(str(nfe), float("nan") if result["figures"] else float("inf"))


def best(results: Sequence[dict[str, Any]]) -> int:
    """Choose the training with the lowest error at the NFE that the method is for: 1, or 64 for flow matching."""
    nfes = [1 if OBJECTIVES[result["objective"]].learns_jumps else 64 for result in results]
    return min(range(len(results)), key=lambda i: error(results[i], nfes[i]))


def table(report: dict[str, Any]) -> str:
    """Format the median paired RMSE over seeds, and the range, per method and NFE."""
    columns = (1, 2, 4, 16, 64)
    lines = [f"{'method':<18} {'lr':>7} {'steps':>6}  " + " ".join(f"{f'NFE {n}':^21}" for n in columns) + "  setting"]
    for name, method in report["methods"].items():
        cells = []
        for n in columns:
            values = sorted(error(result, n) for result in method["runs"])
            cell = f"{statistics.median(values):.3f} ({values[0]:.3f}-{values[-1]:.3f})"
            cells.append("" if any(a != a for a in values) else cell)
        rate = f"{method['lr']:g}" + "*" * method["at_edge"]
        setting = ", ".join(f"{key}={value}" for key, value in method["setting"].items())
        lines.append(
            f"{name:<18} {rate:>7} {method['steps']:>6}  " + " ".join(f"{c:^21}" for c in cells) + f"  {setting}"
        )
    return "\n".join(lines)


def compare(
    base: ToyConfig,
    *,
    methods: Sequence[str],
    rates: Sequence[float],
    seeds: int,
    seconds: float,
    jobs: int,
    points: int,
    out: Path,
) -> dict[str, Any]:
    """Sweep, train and measure methods; results.json is rewritten after every training."""
    print("measuring step times")
    per_step = step_seconds({name: replace(base, **METHODS[name]) for name in methods})
    configs = {name: replace(base, steps=max(1, round(seconds / per_step[name])), **METHODS[name]) for name in methods}
    plans = {name: [s | {"lr": lr} for s in SETTINGS.get(name, ({},)) for lr in rates] for name in methods}
    trainings = sum(len(plan) + seeds for plan in plans.values())
    print(f"{trainings} trainings of {seconds:g} s, {jobs} at a time: {trainings * seconds / jobs / 60:.0f} minutes")
    report: dict[str, Any] = {
        "dist": base.name,
        "seconds": seconds,
        "seeds": seeds,
        "step_milliseconds": {name: round(1e3 * value, 3) for name, value in per_step.items()},
        "sweeps": {name: [] for name in configs},
        "methods": {},
    }

    def train(plan: list[tuple[list[dict[str, Any]], ToyConfig]], label: str) -> None:
        results = train_many([config for _, config in plan], errors, jobs=jobs, points=points, label=label)
        for (runs, _), result in zip(plan, results, strict=True):
            runs.append(result)
            write_atomically(out / "results.json", json.dumps(report, indent=2) + "\n")

    sweeps = report["sweeps"]
    train(
        [(sweeps[name], replace(c, **plan, seed=SWEEP_SEED)) for name, c in configs.items() for plan in plans[name]],
        "sweeping",
    )
    chosen = {}
    for name, config in configs.items():
        plan = plans[name][best(sweeps[name])]
        chosen[name] = replace(config, **plan)
        report["methods"][name] = {
            "lr": plan["lr"],
            "at_edge": len(rates) > 1 and plan["lr"] in (min(rates), max(rates)),
            "setting": {key: value for key, value in plan.items() if key != "lr"},
            "steps": config.steps,
            "runs": [],
        }
    train(
        [
            (report["methods"][name]["runs"], replace(config, seed=seed))
            for name, config in chosen.items()
            for seed in range(seeds)
        ],
        "training",
    )
    return report


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw error against NFE into a PNG file."""
    from tvm_ref.toy import plots  # matplotlib, which --help need not wait for

    values = {
        name: [[error(result, n) for result in method["runs"]] for n in NFES]
        for name, method in report["methods"].items()
    }
    title = f"{report['dist']}: {report['seconds']:g} s of training each, seeds: {report['seeds']}"
    plots.save_figure(plots.plot_errors(values, NFES, title), path)


def parser() -> OneLineParser:
    """Make the command line."""
    p = OneLineParser("python -m tvm_ref.toy.compare", __doc__)
    add_options(p, ToyConfig, SHARED)
    p.add_argument(
        "--methods", nargs="+", choices=tuple(METHODS), default=tuple(METHODS), metavar="METHOD",
        help=f"of {', '.join(METHODS)} (default: all)",
    )  # fmt: skip
    p.add_argument("--seconds", type=float, default=30.0, help="training time of each run, in seconds of one thread")
    p.add_argument("--seeds", type=int, default=3, help="seeds per method")
    p.add_argument("--rates", type=float, nargs="+", default=[0.003, 0.01, 0.03, 0.1], help="learning rates to sweep")
    p.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    p.add_argument("--points", type=int, default=POINTS, help="samples that errors are measured on")
    p.add_argument("--out", type=Path, help="folder to write (default: runs/toy/NAME-compare)")
    p.add_argument("--overwrite", action="store_true", help="replace results that are already there")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    command = parser()
    arguments = command.parse_args(argv)
    use_one_thread()
    with command.bad_input():
        base = ToyConfig(**given(arguments, ToyConfig))
        require_at_least(0.1, seconds=arguments.seconds)
        if arguments.seconds == float("inf"):
            raise ValueError("--seconds must be finite")
        require_at_least(1, seeds=arguments.seeds, jobs=arguments.jobs)
        require_at_least(10, points=arguments.points)
        if not all(0 < rate < float("inf") for rate in arguments.rates):
            raise ValueError("--rates must be positive and finite")
        out = arguments.out or Path("runs/toy") / f"{base.name}-compare"
        require_free(out, ("results.json",), "a comparison", "--overwrite", overwrite=arguments.overwrite)
        distribution_of(base)
        out.mkdir(parents=True, exist_ok=True)
    with command.failures(f"trainings that were finished are in {out}"):
        size = {name: getattr(arguments, name) for name in ("methods", "rates", "seeds", "seconds", "jobs", "points")}
        report = compare(base, out=out, **size)
        draw(report, out / "error.png")
    print(f"paired RMSE to the exact flow map, median over seeds (range), seeds: {arguments.seeds}")
    print(f"{table(report)}\n{out}")
    return 0


if __name__ == "__main__":
    run(main)
