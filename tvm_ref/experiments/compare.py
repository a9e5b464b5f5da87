"""TVM beside its relatives on equal terms: one network, one optimizer, equal training time.

    python -m tvm_ref.experiments.compare --dist moons                                          all, an hour of one core
    python -m tvm_ref.experiments.compare --dist moons --methods TVM MeanFlow "flow matching"   some
    python -m tvm_ref.experiments.compare --dist moons --ablation                               from MeanFlow to TVM
    python -m tvm_ref.experiments.compare --dist moons --resume                                 go on after Ctrl-C

Each method trains as long as TVM takes for --steps steps: step times are measured side by side first. A load on the
machine changes their ratios, by up to 45 % beside three busy programs: compare on an idle one. Each has its own law of
times and its own sweep, of learning rates and of the one setting that its paper stresses, on a seed of its own, judged
at the NFE that it is for (1; 64 for flow matching). While a method's best rate is the lowest or highest tried, one
beyond it is tried as well; if it still is after four, an asterisk marks it. With the best rate and setting the method
is then trained on --seeds seeds.
Writes results.json, a table and error.png: error against the number of function evaluations (NFE). On the way
comparison.json holds the step times, and each training as it finishes; --resume goes on from it, to the same results.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tvm_ref.cli.errors import user_files
from tvm_ref.cli.files import require_free, write_atomically
from tvm_ref.cli.options import OneLineParser, add_options, given, require_at_least, run
from tvm_ref.cli.progress import progress
from tvm_ref.experiments.comparison import FILE, SHARED, Plan, Stored
from tvm_ref.experiments.methods import ABLATION, SETTINGS, family_of, named
from tvm_ref.experiments.sweep import train_as_finished
from tvm_ref.objectives import OBJECTIVES
from tvm_ref.toy.config import ToyConfig, use_one_thread
from tvm_ref.toy.report.metrics import Reference, paired_errors
from tvm_ref.toy.run import distribution_of, fingerprint
from tvm_ref.toy.training import Training

NFES = (1, 2, 4, 8, 16, 32, 64)
UNIT = "a TVM step"  # in which the budget is counted
SWEEP_SEED = 1000  # apart from the seeds that are reported
ROUNDS, REPEATS = 8, 20  # of step times: turns of each method, and steps in a turn
EXTRA = 4  # rates that a sweep is extended by at most
LADDER = [float(f"{digit}e{exponent}") for exponent in range(-9, 3) for digit in (1, 3)]  # the rates beyond


def step_seconds(configs: dict[str, ToyConfig]) -> dict[str, float]:
    """Measure median CPU seconds per training step of each configuration, in turns, as loads come and go."""
    trainings = {name: Training(config, distribution_of(config)) for name, config in configs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in trainings}
    turns = [turn for _ in range(ROUNDS) for turn in trainings.items()]
    for name, training in progress(turns, unit="turn", desc="measuring step times"):
        begun = time.process_time()
        for _ in range(REPEATS):
            training.train_step()
        seconds[name].append((time.process_time() - begun) / REPEATS)
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
    """Trainings of equal time, each stored as it finishes, and the report of their results.

    Args:
        stored: what is compared, and what of it is done.
        jobs: trainings at a time, one thread each.
        out: folder of comparison.json.
    """

    def __init__(self, stored: Stored, *, jobs: int, out: Path):
        base, plan, per_step = stored.base, stored.plan, stored.step_seconds
        self.stored, self.jobs, self.out = stored, jobs, out
        self.settings = {name: SETTINGS.get(name, ({},)) for name in plan.changes}
        self.seconds = plan.steps * per_step[UNIT]
        self.configs = {
            name: replace(config, steps=max(1, round(self.seconds / per_step[name])))
            for name, config in plan.configs(base).items()
        }
        self.report: dict[str, Any] = {
            "dist": base.name,
            "tvm_steps": plan.steps,
            "step_milliseconds": {name: round(1e3 * value, 3) for name, value in per_step.items()},
            "sweeps": {name: [] for name in plan.changes},
            "methods": {},
        }

    def train(self, plan: Sequence[tuple[str, dict[str, Any], float, int]], into: Any, label: str) -> None:
        """Train each (method, setting, rate, seed) of a plan that is not done; append all results to into[method]."""
        runs = [replace(self.configs[named(name, setting)], lr=rate, seed=seed) for name, setting, rate, seed in plan]
        done = self.stored.trainings
        left = [config for config in runs if config not in done]
        if left:
            minutes = len(left) * self.seconds / self.jobs / 60
            each = f"{len(left)} trainings of {self.seconds:.2g} s"
            print(f"{label}: {each}, {self.jobs} at a time: {minutes:.0f} minutes")
            points = self.stored.plan.points
            for number, result in train_as_finished(left, errors, jobs=self.jobs, points=points, label=label):
                done[left[number]] = result
                self.stored.write(self.out)
        for (name, setting, _, _), config in zip(plan, runs, strict=True):
            into[name].append(done[config] | {"setting": setting})

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
    p.add_argument("--out", type=Path, help="folder to write (default: runs/toy/NAME-compare, or -ablation)")
    existing = p.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace a comparison that is already there")
    existing.add_argument(
        "--resume", action="store_true", help="go on with the comparison that is there, with its own options"
    )
    return p


def prepare(arguments: argparse.Namespace) -> tuple[Path, Stored | None, ToyConfig, Plan]:
    """Return the folder, the comparison in it if it is to go on, and what is compared.

    Raises:
        ValueError, OSError: bad options, a folder that is in the way or has nothing to resume, unusable points.
    """
    require_at_least(1, jobs=arguments.jobs)
    base = ToyConfig(**{name: value for name, value in given(arguments, ToyConfig).items() if name in SHARED})
    plan = Plan(**given(arguments, Plan))
    out = arguments.out or Path("runs/toy") / f"{base.name}-{'ablation' if plan.ablation else 'compare'}"
    if arguments.resume:
        stored = Stored.resume(out, arguments)
        return out, stored, stored.base, stored.plan
    require_free(out, (FILE,), "a comparison", "--resume, --overwrite", overwrite=arguments.overwrite)
    distribution_of(base)
    out.mkdir(parents=True, exist_ok=True)
    for name in (FILE, "results.json", "error.png"):  # of an earlier comparison
        (out / name).unlink(missing_ok=True)
    return out, None, base, plan


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    command = parser()
    arguments = command.parse_args(argv)
    use_one_thread()
    with command.errors(), user_files():
        out, stored, base, plan = prepare(arguments)
    if stored is None:
        with command.errors():
            seconds = step_seconds({UNIT: base, **plan.configs(base)})
            stored = Stored(base, plan, fingerprint(distribution_of(base)), seconds)
            stored.write(out)
    else:
        print(f"{out}: {len(stored.trainings)} trainings are done")
    with command.errors("the same command with --resume goes on after the trainings that are done"):
        comparison = Comparison(stored, jobs=arguments.jobs, out=out)
        comparison.sweep(plan.rates)
        comparison.run(plan.seeds)
        write_atomically(out / "results.json", json.dumps(comparison.report, indent=2) + "\n")
        draw(comparison.report, out / "error.png")
    print(f"paired RMSE to the exact flow map, median over seeds (range), seeds: {plan.seeds}")
    print(f"{table(comparison.report)}\n{out}")
    return 0


if __name__ == "__main__":
    run(main)
