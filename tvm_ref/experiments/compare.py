"""Compare TVM with its relatives on equal terms: one network, one optimizer, one budget.

    python -m tvm_ref.experiments.compare --dist moons                                          all, an hour of one core
    python -m tvm_ref.experiments.compare --dist moons --methods TVM MeanFlow "flow matching"   some
    python -m tvm_ref.experiments.compare --dist moons --budget time                            equal time

The budget is what TVM spends in --steps steps: matmuls of losses and gradients, which are counted and do not depend on
the machine, or time. The table has both for each method, as multiples of TVM's. Step times are measured side by side
first; a load on the machine changes their ratios, by up to 45 % with three other busy programs.
Each method has its own distribution of times and its own sweep, of learning rates and of the settings that its paper
stresses, on a separate seed, measured at the method's own NFE (1; 64 for flow matching). While a method's best rate
is the lowest or highest tried, the next one is tried too; if it still is after four, an asterisk marks it. With
the best rate and setting the method is then trained on --seeds seeds, and on two more if its median error at one step
is within 1.5 times the least.
Writes into a folder of its own results.json, which holds every training, and error.png: cost of a step, and error in 1,
4 and 64 function evaluations (NFE). An interrupted comparison continues with the same command: step times and each
training are kept in trainings/. --overwrite deletes those of a finished one.
"""

import json
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tvm_ref.cli.errors import UserError, user_files
from tvm_ref.cli.files import require_free, write_atomically
from tvm_ref.cli.options import OneLineParser, add_options, check_types, given, option, require_at_least, run
from tvm_ref.cli.progress import progress
from tvm_ref.experiments.family_measures import step_products
from tvm_ref.experiments.methods import METHODS, SETTINGS, family_of, method_named, named
from tvm_ref.experiments.sweep import file_of, kept, train_many
from tvm_ref.objectives import OBJECTIVES
from tvm_ref.toy.config import ToyConfig, use_one_thread
from tvm_ref.toy.report.metrics import POINTS, Reference, paired_errors
from tvm_ref.toy.training import Training

NFES = (1, 2, 4, 8, 16, 32, 64)
BUDGETS = ("products", "time")
UNIT = "a TVM step"  # in which the budget is counted
FILES = ("results.json", "error.png")
CLOSE, MORE_SEEDS = 1.5, 2  # methods within this factor of the best at one step are trained on more seeds
SWEEP_SEED = 1000  # distinct from the seeds that are reported
ROUNDS, REPEATS = 8, 20  # for step times: turns of each method, and steps in a turn
EXTRA = 4  # at most so many rates are added to a sweep
SHARED = ("dist", "data", "bandwidth", "batch_size", "width", "depth", "time_sampler")  # options of all trainings
LADDER = [float(f"{digit}e{exponent}") for exponent in range(-9, 3) for digit in (1, 3)]  # the rates beyond


@dataclass(frozen=True)
class Plan:
    """The methods to compare, and the budget of each training.

    Raises:
        ValueError: a bad value, named by its option.
    """

    methods: tuple[str, ...] = option(
        tuple(METHODS), "of " + ", ".join(map(repr, METHODS)) + ", or names of --objective (default: all)",
        choices=tuple(METHODS), nargs="+", metavar="METHOD", type=method_named,
    )  # fmt: skip
    budget: str = option("products", "what all methods get equally: matmuls or time", choices=BUDGETS)
    steps: int = option(1200, "budget of each training, in steps of TVM")
    seeds: int = option(3, "number of seeds per method")
    rates: tuple[float, ...] = option((0.003, 0.01), "learning rates to sweep first", nargs="+")
    points: int = option(POINTS, "number of samples to measure errors on")

    def __post_init__(self) -> None:
        check_types(self)
        require_at_least(1, steps=self.steps, seeds=self.seeds)
        require_at_least(10, points=self.points)
        if not all(0 < rate < float("inf") for rate in self.rates):
            raise UserError("--rates must be positive and finite")

    def configs(self, base: ToyConfig) -> dict[str, ToyConfig]:
        """Make the configuration of each method with each of its settings, by name, from the common options."""
        return {
            named(name, setting): replace(base, **METHODS[name] | setting)
            for name in self.methods
            for setting in SETTINGS.get(name, ({},))
        }


def step_seconds(configs: dict[str, ToyConfig]) -> dict[str, float]:
    """Measure median CPU seconds per training step of each configuration, in turns, as loads vary."""
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
    """Measure the paired RMSE at every NFE; infinite where samples are not finite."""
    nfes = NFES[:1] if OBJECTIVES[training.config.objective].one_step_only else NFES
    found = {n: float(paired_errors(training.evaluated, reference, n)[1].square().mean().sqrt()) for n in nfes}
    return {str(n): math.inf if math.isnan(value) else value for n, value in found.items()}


def error(result: dict[str, Any], nfe: int) -> float:
    """Look up a training's paired RMSE: infinite if it diverged, NaN at an NFE that was not measured."""
    return result["figures"].get(str(nfe), float("nan") if result["figures"] else float("inf"))


def best(results: Sequence[dict[str, Any]]) -> int:
    """Choose the training with the lowest error at the method's own NFE: 1, or 64 for flow matching."""
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


def cells(runs: Sequence[dict[str, Any]], columns: Sequence[int]) -> str:
    """Format the median paired RMSE of some trainings, and the range, at some NFEs; blank where there is none."""
    texts = []
    for n in columns:
        values = sorted(error(result, n) for result in runs)
        text = f"{statistics.median(values):.3f} ({values[0]:.3f}-{values[-1]:.3f})"
        texts.append("" if any(map(math.isnan, values)) else text)
    return " ".join(f"{text:^21}" for text in texts)


def table(report: dict[str, Any]) -> str:
    """Format per method the two costs over TVM's, and the median paired RMSE over seeds, with the range, per NFE."""
    columns = (1, 2, 4, 16, 64)
    head = f"{'method':<21} {'lr':>7} {'steps':>6} {'products':>8} {'time':>5} {'seeds':>5}  "
    lines = [head + " ".join(f"{f'NFE {n}':^21}" for n in columns) + "  setting"]
    for name, method in report["methods"].items():
        rate = f"{method['lr']:g}" + "*" * method["at_edge"]
        spent = [
            method["steps"] * each[named(name, method["setting"])] / (report["tvm_steps"] * each[UNIT])
            for each in (report["step_products"], report["step_milliseconds"])
        ]
        lines.append(
            f"{name:<21} {rate:>7} {method['steps']:>6} {spent[0]:>8.2f} {spent[1]:>5.2f} {len(method['runs']):>5}  "
            f"{cells(method['runs'], columns)}  {named('', method['setting'])}"
        )
    return "\n".join(lines)


class Comparison:
    """Trainings of one budget, and the report of their results.

    Args:
        base: the common options.
        plan: what is compared.
        costs: cost of a step of each configuration and of UNIT, by BUDGETS: matmuls, and CPU seconds.
        out: folder that keeps the trainings.
        jobs: trainings at a time, one thread each.
        bar: of all steps: those that are planned, and more as sweeps are extended and seeds added.
    """

    def __init__(
        self, base: ToyConfig, plan: Plan, costs: dict[str, dict[str, float]], out: Path, *, jobs: int, bar: tqdm
    ):
        self.plan, self.out, self.jobs, self.bar = plan, out, jobs, bar
        self.settings = {name: SETTINGS.get(name, ({},)) for name in plan.methods}
        cost = costs[plan.budget]
        self.configs = {
            name: replace(config, steps=max(1, round(plan.steps * cost[UNIT] / cost[name])))
            for name, config in plan.configs(base).items()
        }
        self.report: dict[str, Any] = {
            "dist": base.name,
            "budget": plan.budget,
            "tvm_steps": plan.steps,
            "step_products": {name: round(value, 3) for name, value in costs["products"].items()},
            "step_milliseconds": {name: round(1e3 * value, 3) for name, value in costs["time"].items()},
            "sweeps": {name: [] for name in plan.methods},
            "methods": {},
        }

    def train(
        self, runs: Sequence[tuple[str, dict[str, Any], float, int]], into: Any, label: str, later: int = 0
    ) -> None:
        """Train each (method, setting, rate, seed); append the results to into[method]. `later`: steps that follow."""
        configs = [
            replace(self.configs[named(name, setting)], lr=rate, seed=seed) for name, setting, rate, seed in runs
        ]
        self.bar.set_description(label, refresh=False)
        self.bar.total = self.bar.n + sum(config.steps for config in configs) + later
        results = train_many(configs, errors, jobs=self.jobs, points=self.plan.points, bar=self.bar, keep=self.out)
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
        later = self.plan.seeds * sum(self.configs[named(name, s[0])].steps for name, s in self.settings.items())
        for extra in range(EXTRA + 1):
            self.train(runs, sweeps, "sweeping" if extra == 0 else "sweeping further", later)
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
        """Train each method on seeds 0, 1, ... with what the sweep chose; those close to the best on more."""
        methods, seeds = self.report["methods"], self.plan.seeds
        into = {name: m["runs"] for name, m in methods.items()}

        def runs(names: Iterable[str], seeds: range) -> list[tuple[str, dict[str, Any], float, int]]:
            return [(name, methods[name]["setting"], methods[name]["lr"], seed) for name in names for seed in seeds]

        self.train(runs(methods, range(seeds)), into, "training")
        one_step = {name: statistics.median(error(result, 1) for result in m["runs"]) for name, m in methods.items()}
        close = [name for name in methods if one_step[name] <= CLOSE * min(one_step.values())]
        self.train(runs(close, range(seeds, seeds + MORE_SEEDS)), into, "more seeds")


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw cost and errors into a PNG file."""
    from tvm_ref.experiments.family_plots import plot_comparison  # slow to import: not for --help
    from tvm_ref.toy.report.plots import save_figure

    cost = report["step_products"]
    rows = {
        name: (cost[named(name, m["setting"])], {n: [error(result, n) for result in m["runs"]] for n in NFES})
        for name, m in report["methods"].items()
    }
    equal = {"products": "as many products as", "time": "the time of"}[report["budget"]]
    title = f"{report['dist']}: each trained with {equal} {report['tvm_steps']} steps of TVM"
    save_figure(plot_comparison(rows, family_of(rows), title), path)


def parser() -> OneLineParser:
    """Make the command line."""
    p = OneLineParser("python -m tvm_ref.experiments.compare", __doc__)
    add_options(p, ToyConfig, SHARED)
    add_options(p, Plan)
    p.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    p.add_argument("--out", type=Path, help="folder to write (default: runs/toy/NAME-compare)")
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
        out = arguments.out or Path("runs/toy") / f"{base.name}-compare"
        trainings = out / "trainings"
        finished = (out / FILES[0]).exists() or not trainings.is_dir()
        if finished:
            require_free(out, FILES, "a comparison", "--overwrite", overwrite=arguments.overwrite)
        base.make_distribution()  # raises for unusable points
        if finished:  # it may be overwritten; results go last, so that what is stopped here is still finished
            for path in (*trainings.glob("*.json"), out / FILES[0]):
                path.unlink(missing_ok=True)
        trainings.mkdir(parents=True, exist_ok=True)
    with command.errors(f"trainings that were finished, if any, are in {trainings}; the same command continues"):
        configs = {UNIT: base, **plan.configs(base)}
        products = {name: step_products(config) for name, config in configs.items()}
        seconds = file_of(trainings, "seconds", {name: asdict(config) for name, config in configs.items()})
        costs = {"products": products, "time": kept(seconds, lambda: step_seconds(configs))}
        planned = len(plan.rates) * (len(configs) - 1) + len(plan.methods) * plan.seeds
        print(f"{planned} trainings, and more at the edges of sweeps and close to the best; the bar estimates the time")
        with progress(unit="step", smoothing=0) as bar:
            comparison = Comparison(base, plan, costs, trainings, jobs=arguments.jobs, bar=bar)
            comparison.sweep()
            comparison.run()
        draw(comparison.report, out / FILES[1])
        write_atomically(out / FILES[0], json.dumps(comparison.report, indent=2) + "\n")  # last: it marks the end
    print(f"paired RMSE to the exact flow map, median over seeds (range), seeds: {plan.seeds}")
    print(f"{table(comparison.report)}\n{out}")
    return 0


if __name__ == "__main__":
    run(main)
