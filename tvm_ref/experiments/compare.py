"""Compare TVM with its relatives on equal terms: one network, one optimizer, equal training time.

    python -m tvm_ref.experiments.compare --dist moons                                          all, an hour of one core
    python -m tvm_ref.experiments.compare --dist moons --methods TVM MeanFlow "flow matching"   some
    python -m tvm_ref.experiments.compare --dist moons --ablation                               from MeanFlow to TVM

Each method trains as long as TVM takes for --steps steps: step times are measured side by side first. A load on the
machine changes their ratios, by up to 45 % with three other busy programs: compare on an idle one. Each method has its
own distribution of times and its own sweep, of learning rates and of the one setting that its paper stresses, on a seed
of its own, measured at the NFE that it is for (1; 64 for flow matching). While a method's best rate is the lowest or
highest tried, one beyond it is tried as well; if it still is after four, an asterisk marks it. With the best rate and
setting the method is then trained on --seeds seeds.
Writes into a folder of its own results.json, which holds every training, and error.png: error against the number of
function evaluations (NFE).
"""

import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tvm_ref.cli.errors import UserError, user_files
from tvm_ref.cli.files import require_free, write_atomically
from tvm_ref.cli.options import OneLineParser, add_options, check_types, given, option, require_at_least, run
from tvm_ref.cli.progress import progress
from tvm_ref.experiments.methods import ABLATION, METHODS, SETTINGS, family_of, method_named, named
from tvm_ref.experiments.sweep import train_many
from tvm_ref.objectives import OBJECTIVES
from tvm_ref.toy.config import ToyConfig, use_one_thread
from tvm_ref.toy.report.metrics import POINTS, Reference, paired_errors
from tvm_ref.toy.training import Training

NFES = (1, 2, 4, 8, 16, 32, 64)
UNIT = "a TVM step"  # in which the budget is counted
FILES = ("results.json", "error.png")
SWEEP_SEED = 1000  # apart from the seeds that are reported
ROUNDS, REPEATS = 8, 20  # of step times: turns of each method, and steps in a turn
EXTRA = 4  # rates that a sweep is extended by at most
SHARED = ("dist", "data", "bandwidth", "batch_size", "width", "depth", "time_sampler")  # options of all trainings
LADDER = [float(f"{digit}e{exponent}") for exponent in range(-9, 3) for digit in (1, 3)]  # the rates beyond


@dataclass(frozen=True)
class Plan:
    """The methods to compare, and for how long.

    Raises:
        ValueError: a bad value, named by its option.
    """

    methods: tuple[str, ...] = option(
        tuple(METHODS), "of " + ", ".join(map(repr, METHODS)) + ", or names of --objective (default: all)",
        choices=tuple(METHODS), nargs="+", metavar="METHOD", type=method_named,
    )  # fmt: skip
    ablation: bool = option(False, f"instead of methods, from MeanFlow to TVM: {', '.join(ABLATION)}")
    steps: int = option(1200, "training time of each run, in steps of TVM")
    seeds: int = option(3, "seeds per method")
    rates: tuple[float, ...] = option((0.003, 0.01, 0.03), "learning rates to sweep first", nargs="+")
    points: int = option(POINTS, "samples that errors are measured on")

    def __post_init__(self) -> None:
        check_types(self)
        require_at_least(1, steps=self.steps, seeds=self.seeds)
        require_at_least(10, points=self.points)
        if not all(0 < rate < float("inf") for rate in self.rates):
            raise UserError("--rates must be positive and finite")

    @property
    def changes(self) -> dict[str, dict[str, Any]]:
        """Options that each method changes."""
        return ABLATION if self.ablation else {name: METHODS[name] for name in self.methods}

    def configs(self, base: ToyConfig) -> dict[str, ToyConfig]:
        """Make the configuration of each method with each of its settings, by name, from what all have in common."""
        return {
            named(name, setting): replace(base, **changes | setting)
            for name, changes in self.changes.items()
            for setting in SETTINGS.get(name, ({},))
        }


def step_seconds(configs: dict[str, ToyConfig]) -> dict[str, float]:
    """Measure median CPU seconds per training step of each configuration, in turns, as loads come and go."""
    trainings = {name: Training(config, config.make_distribution()) for name, config in configs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in trainings}
    turns = [turn for _ in range(ROUNDS) for turn in trainings.items()]
    for name, training in progress(turns, unit="turn", desc="measuring step times"):
        started = time.process_time()
        for _ in range(REPEATS):
            training.train_step()
        seconds[name].append((time.process_time() - started) / REPEATS)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}  # the first round warms up


def errors(training: Training, reference: Reference) -> dict[str, float]:
    """Measure the paired RMSE at every NFE."""
    nfes = NFES[:1] if OBJECTIVES[training.config.objective].one_step_only else NFES
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


class Comparison:
    """Trainings of equal time, and the report of their results.

    Args:
        base: what all trainings have in common.
        plan: what is compared.
        step_seconds: measured CPU seconds of a training step, of each configuration and of UNIT.
        jobs: trainings at a time, one thread each.
    """

    def __init__(self, base: ToyConfig, plan: Plan, step_seconds: dict[str, float], *, jobs: int):
        self.plan, self.jobs = plan, jobs
        self.settings = {name: SETTINGS.get(name, ({},)) for name in plan.changes}
        self.seconds = plan.steps * step_seconds[UNIT]
        self.configs = {
            name: replace(config, steps=max(1, round(self.seconds / step_seconds[name])))
            for name, config in plan.configs(base).items()
        }
        self.report: dict[str, Any] = {
            "dist": base.name,
            "tvm_steps": plan.steps,
            "step_milliseconds": {name: round(1e3 * value, 3) for name, value in step_seconds.items()},
            "sweeps": {name: [] for name in plan.changes},
            "methods": {},
        }

    def train(self, runs: Sequence[tuple[str, dict[str, Any], float, int]], into: Any, label: str) -> None:
        """Train each (method, setting, rate, seed); append the results to into[method]."""
        configs = [
            replace(self.configs[named(name, setting)], lr=rate, seed=seed) for name, setting, rate, seed in runs
        ]
        minutes = len(runs) * self.seconds / self.jobs / 60
        each = f"{len(runs)} trainings of {self.seconds:.2g} s"
        print(f"{label}: {each}, {self.jobs} at a time: {minutes:.0f} minutes")
        results = train_many(configs, errors, jobs=self.jobs, points=self.plan.points, label=label)
        for (name, setting, _, _), result in zip(runs, results, strict=True):
            into[name].append(result | {"setting": setting})

    def sweep(self) -> None:
        """Choose each method's setting and rate, from those of the plan and the rates beyond."""
        sweeps = self.report["sweeps"]
        runs = [
            (name, setting, rate, SWEEP_SEED)
            for name, settings in self.settings.items()
            for setting in settings
            for rate in self.plan.rates
        ]
        for extra in range(EXTRA + 1):
            self.train(runs, sweeps, "sweeping" if extra == 0 else "sweeping further")
            winners = {name: results[best(results)] for name, results in sweeps.items()}
            further = {name: rate for name, results in sweeps.items() if (rate := beyond(results)) is not None}
            if not further:
                break
            runs = [(name, winners[name]["setting"], rate, SWEEP_SEED) for name, rate in further.items()]
        for name, winner in winners.items():
            self.report["methods"][name] = {
                "lr": winner["lr"],
                "at_edge": name in further,
                "setting": winner["setting"],
                "steps": self.configs[named(name, winner["setting"])].steps,
                "runs": [],
            }

    def run(self) -> None:
        """Train each method on seeds 0, 1, ... with what the sweep chose."""
        methods = self.report["methods"]
        runs = [(name, m["setting"], m["lr"], seed) for name, m in methods.items() for seed in range(self.plan.seeds)]
        self.train(runs, {name: m["runs"] for name, m in methods.items()}, "training")


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw error against NFE into a PNG file."""
    from tvm_ref.toy.report import plots  # matplotlib, which --help need not wait for

    values = {
        name: [[error(result, n) for result in method["runs"]] for n in NFES]
        for name, method in report["methods"].items()
    }
    seeds = len(next(iter(report["methods"].values()))["runs"])
    title = f"{report['dist']}: each trained as long as {report['tvm_steps']} steps of TVM, seeds: {seeds}"
    families = None if set(values) <= set(ABLATION) else family_of(values)
    plots.save_figure(plots.plot_errors(values, NFES, title, families), path)


def parser() -> OneLineParser:
    """Make the command line."""
    p = OneLineParser("python -m tvm_ref.experiments.compare", __doc__)
    add_options(p, ToyConfig, SHARED)
    add_options(p, Plan)
    p.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    p.add_argument("--out", type=Path, help="folder to write (default: runs/toy/NAME-compare, or NAME-ablation)")
    p.add_argument("--overwrite", action="store_true", help="replace a comparison that is already there")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    command = parser()
    arguments = command.parse_args(argv)
    use_one_thread()
    with command.errors(), user_files():
        require_at_least(1, jobs=arguments.jobs)
        base = ToyConfig(**{name: value for name, value in given(arguments, ToyConfig).items() if name in SHARED})
        plan = Plan(**given(arguments, Plan))
        out = arguments.out or Path("runs/toy") / f"{base.name}-{'ablation' if plan.ablation else 'compare'}"
        require_free(out, FILES, "a comparison", "--overwrite", overwrite=arguments.overwrite)
        base.make_distribution()  # refuses points that cannot be used
        out.mkdir(parents=True, exist_ok=True)
    with command.errors():
        seconds = step_seconds({UNIT: base, **plan.configs(base)})
        comparison = Comparison(base, plan, seconds, jobs=arguments.jobs)
        comparison.sweep()
        comparison.run()
        write_atomically(out / FILES[0], json.dumps(comparison.report, indent=2) + "\n")
        draw(comparison.report, out / FILES[1])
    print(f"paired RMSE to the exact flow map, median over seeds (range), seeds: {plan.seeds}")
    print(f"{table(comparison.report)}\n{out}")
    return 0


if __name__ == "__main__":
    run(main)
