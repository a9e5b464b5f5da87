"""TVM beside its relatives on equal terms: one network, one optimizer, equal training time.

    python -m tvm_ref.toy.compare --dist moons                                          all, an hour of one core
    python -m tvm_ref.toy.compare --dist moons --methods TVM MeanFlow "flow matching"   some
    python -m tvm_ref.toy.compare --dist moons --ablation                               from MeanFlow to TVM

Each method trains as long as TVM takes for --steps steps: step times are measured side by side first, and a load on the
machine changes their ratios little. Each has its own law of times and its own sweep, of learning rates and of the one
setting that its paper stresses, on a seed of its own, judged at the NFE that it is for (1; 64 for flow matching). While
a method's best rate is the lowest or highest tried, one beyond it is tried as well; if it still is after four, an
asterisk marks it. With the best rate and setting the method is then trained on --seeds seeds.
Writes results.json, a table and error.png: error against the number of function evaluations (NFE).
"""

import json
import math
import statistics
import time
from collections.abc import Iterable, Sequence
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
SHARED = ("dist", "data", "bandwidth", "batch_size", "width", "depth", "time_sampler")
UNIT = "a TVM step"  # in which the budget is counted
SWEEP_SEED = 1000  # apart from the seeds that are reported
ROUNDS, REPEATS = 8, 20  # of step times: turns of each method, and steps in a turn
EXTRA = 4  # rates that a sweep is extended by at most
LADDER = [float(f"{digit}e{exponent}") for exponent in range(-9, 3) for digit in (1, 3)]  # the rates beyond
METHODS: dict[str, dict[str, Any]] = {
    "TVM": {},
    "TVM, noise 1/4": {"noise_share": 0.25},
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
# From MeanFlow to TVM, one change at a time. With target_ema 0 the target is the model itself, stopped.
_QUARTER = {"time_sampler": "sorted", "equal_share": 0.75}  # MeanFlow's law of times
ABLATION: dict[str, dict[str, Any]] = {
    "MeanFlow as published": {"objective": "meanflow"},
    "- its weight": {"objective": "meanflow", "settings": "power=0"},
    "v to u": {"objective": "esd", "settings": "stops='all'", "target_ema": 0.0, **_QUARTER},
    "fewer stops": {"objective": "esd", "target_ema": 0.0, **_QUARTER},
    "Lagrangian": {"objective": "lsd", "target_ema": 0.0, **_QUARTER},
    "target EMA": {"objective": "lsd", **_QUARTER},
    "gap*": {"objective": "lsd", "time_sampler": "gap*", "equal_share": 0.75},
    "TVM: both terms": {},
}


def step_seconds(configs: dict[str, ToyConfig]) -> dict[str, float]:
    """Measure median CPU seconds per training step of each configuration, in turns: a load is then the same for all."""
    trainings = {name: Training(config, distribution_of(config)) for name, config in configs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in trainings}
    for _ in range(ROUNDS):
        for name, training in trainings.items():
            begun = time.process_time()
            for _ in range(REPEATS):
                training.train_step()
            seconds[name].append((time.process_time() - begun) / REPEATS)
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
    found = [error(result, nfe) for result, nfe in zip(results, nfes, strict=True)]
    return min(range(len(results)), key=lambda i: float("inf") if math.isnan(found[i]) else found[i])


def beyond(results: Sequence[dict[str, Any]]) -> float | None:
    """Return the rate to try next with the best training's setting, if its rate is the lowest or highest tried.

    None if the best lies inside, or if only one rate was to be tried.
    """
    winner = results[best(results)]
    rates = [result["lr"] for result in results if result["setting"] == winner["setting"]]
    if len(rates) == 1:
        return None
    if winner["lr"] == min(rates):
        return max((rate for rate in LADDER if rate < winner["lr"] / 1.5), default=None)
    if winner["lr"] == max(rates):
        return min((rate for rate in LADDER if rate > winner["lr"] * 1.5), default=None)
    return None


def table(report: dict[str, Any]) -> str:
    """Format the median paired RMSE over seeds, and the range, per method and NFE."""
    columns = (1, 2, 4, 16, 64)
    lines = [f"{'method':<21} {'lr':>7} {'steps':>6}  " + " ".join(f"{f'NFE {n}':^21}" for n in columns) + "  setting"]
    for name, method in report["methods"].items():
        cells = []
        for n in columns:
            values = sorted(error(result, n) for result in method["runs"])
            cell = f"{statistics.median(values):.3f} ({values[0]:.3f}-{values[-1]:.3f})"
            cells.append("" if any(a != a for a in values) else cell)
        rate = f"{method['lr']:g}" + "*" * method["at_edge"]
        lines.append(
            f"{name:<21} {rate:>7} {method['steps']:>6}  "
            + " ".join(f"{c:^21}" for c in cells)
            + f"  {named('', method['setting'])}"
        )
    return "\n".join(lines)


def named(name: str, setting: dict[str, Any]) -> str:
    """Name a method, if it is given, with its setting."""
    words = [str(value) if key == "settings" else f"{key}={value}" for key, value in setting.items()]
    return ", ".join([name, *words] if name else words)


class Comparison:
    """Trainings of equal time, and the report that holds their results; results.json is rewritten after each.

    Args:
        base: what all have in common.
        methods: what each changes.
        steps: TVM steps that take as long as each training.
        jobs: trainings at a time, one thread each.
        points: samples that errors are measured on.
        out: folder of results.json.
    """

    def __init__(
        self, base: ToyConfig, methods: dict[str, dict[str, Any]], *, steps: int, jobs: int, points: int, out: Path
    ):
        self.settings = {name: SETTINGS.get(name, ({},)) for name in methods}
        self.jobs, self.points, self.out = jobs, points, out
        configs = {
            named(name, setting): replace(base, **methods[name] | setting)
            for name, settings in self.settings.items()
            for setting in settings
        }
        print("measuring step times")
        per_step = step_seconds({UNIT: base, **configs})
        self.seconds = steps * per_step[UNIT]
        self.configs = {n: replace(c, steps=max(1, round(self.seconds / per_step[n]))) for n, c in configs.items()}
        self.report: dict[str, Any] = {
            "dist": base.name,
            "tvm_steps": steps,
            "step_milliseconds": {name: round(1e3 * value, 3) for name, value in per_step.items()},
            "sweeps": {name: [] for name in methods},
            "methods": {},
        }

    def train(self, plan: Sequence[tuple[str, dict[str, Any], float, int]], into: Any, label: str) -> None:
        """Train each (method, setting, rate, seed) of a plan and append its result to into[method]."""
        minutes = len(plan) * self.seconds / self.jobs / 60
        print(f"{label}: {len(plan)} trainings of {self.seconds:.2g} s, {self.jobs} at a time: {minutes:.0f} minutes")
        runs = [replace(self.configs[named(name, setting)], lr=rate, seed=seed) for name, setting, rate, seed in plan]
        results = train_many(runs, errors, jobs=self.jobs, points=self.points, label=label)
        for (name, setting, _, _), result in zip(plan, results, strict=True):
            into[name].append(result | {"setting": setting})
            write_atomically(self.out / "results.json", json.dumps(self.report, indent=2) + "\n")

    def sweep(self, rates: Sequence[float]) -> None:
        """Choose each method's setting and rate, from `rates` and those beyond."""
        sweeps = self.report["sweeps"]
        plan = [
            (name, s, rate, SWEEP_SEED) for name, settings in self.settings.items() for s in settings for rate in rates
        ]
        for extra in range(EXTRA + 1):
            self.train(plan, sweeps, "sweeping" if extra == 0 else "sweeping further")
            winners = {name: results[best(results)] for name, results in sweeps.items()}
            further = {name: rate for name, results in sweeps.items() if (rate := beyond(results)) is not None}
            if not further:
                break
            plan = [(name, winners[name]["setting"], rate, SWEEP_SEED) for name, rate in further.items()]
        for name, winner in winners.items():
            self.report["methods"][name] = {
                "lr": winner["lr"],
                "at_edge": name in further,
                "setting": winner["setting"],
                "steps": self.configs[named(name, winner["setting"])].steps,
                "runs": [],
            }

    def run(self, seeds: int) -> None:
        """Train each method on seeds 0, 1, ... with what the sweep chose."""
        methods = self.report["methods"]
        plan = [(name, m["setting"], m["lr"], seed) for name, m in methods.items() for seed in range(seeds)]
        self.train(plan, {name: m["runs"] for name, m in methods.items()}, "training")


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw error against NFE into a PNG file."""
    from tvm_ref.toy import plots  # matplotlib, which --help need not wait for

    values = {
        name: [[error(result, n) for result in method["runs"]] for n in NFES]
        for name, method in report["methods"].items()
    }
    seeds = len(next(iter(report["methods"].values()))["runs"])
    title = f"{report['dist']}: each trained as long as {report['tvm_steps']} steps of TVM, seeds: {seeds}"
    families = None if set(values) <= set(ABLATION) else family_of(values)
    plots.save_figure(plots.plot_errors(values, NFES, title, families), path)


def family_of(methods: Iterable[str]) -> dict[str, str]:
    """Name the family of each method, its identity of the flow map: the file that holds the objective."""
    return {name: OBJECTIVES[METHODS[name].get("objective", "tvm")].__module__ for name in methods}


def method_named(text: str) -> str:
    """Find the method that a word names, which may be an objective's name, as in --objective of the toy."""
    plain = {
        options.get("objective", "tvm"): name for name, options in METHODS.items() if not {*options} - {"objective"}
    }
    return plain.get(text, text)


def parser() -> OneLineParser:
    """Make the command line."""
    p = OneLineParser("python -m tvm_ref.toy.compare", __doc__)
    add_options(p, ToyConfig, SHARED)
    p.add_argument(
        "--methods", nargs="+", choices=tuple(METHODS), default=tuple(METHODS), metavar="METHOD", type=method_named,
        help="of " + ", ".join(map(repr, METHODS)) + ", or names of --objective (default: all)",
    )  # fmt: skip
    p.add_argument(
        "--ablation", action="store_true", help=f"in their place, from MeanFlow to TVM: {', '.join(ABLATION)}"
    )
    p.add_argument("--steps", type=int, default=1200, help="training time of each run, in steps of TVM")
    p.add_argument("--seeds", type=int, default=3, help="seeds per method")
    p.add_argument("--rates", type=float, nargs="+", default=[0.003, 0.01, 0.03], help="learning rates to sweep first")
    p.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    p.add_argument("--points", type=int, default=POINTS, help="samples that errors are measured on")
    p.add_argument("--out", type=Path, help="folder to write (default: runs/toy/NAME-compare, or -ablation)")
    p.add_argument("--overwrite", action="store_true", help="replace results that are already there")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    command = parser()
    arguments = command.parse_args(argv)
    use_one_thread()
    with command.bad_input():
        shared = {name: value for name, value in given(arguments, ToyConfig).items() if name in SHARED}
        base = ToyConfig(**shared)
        require_at_least(1, steps=arguments.steps, seeds=arguments.seeds, jobs=arguments.jobs)
        require_at_least(10, points=arguments.points)
        if not all(0 < rate < float("inf") for rate in arguments.rates):
            raise ValueError("--rates must be positive and finite")
        kind = "ablation" if arguments.ablation else "compare"
        out = arguments.out or Path("runs/toy") / f"{base.name}-{kind}"
        require_free(out, ("results.json",), "a comparison", "--overwrite", overwrite=arguments.overwrite)
        distribution_of(base)
        out.mkdir(parents=True, exist_ok=True)
    with command.failures(f"trainings that were finished are in {out}"):
        methods = ABLATION if arguments.ablation else {name: METHODS[name] for name in arguments.methods}
        size = {name: getattr(arguments, name) for name in ("steps", "jobs", "points")}
        comparison = Comparison(base, methods, out=out, **size)
        comparison.sweep(arguments.rates)
        comparison.run(arguments.seeds)
        draw(comparison.report, out / "error.png")
    print(f"paired RMSE to the exact flow map, median over seeds (range), seeds: {arguments.seeds}")
    print(f"{table(comparison.report)}\n{out}")
    return 0


if __name__ == "__main__":
    run(main)
