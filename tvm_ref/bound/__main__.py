"""Measure the 2-Wasserstein bound (theorem 1) with every constant, on data where every term of it is known.

    python -m tvm_ref.bound runs/toy/moons                 a finished run of python -m tvm_ref.toy
    python -m tvm_ref.bound runs/toy/moons --time 0.5      the jump from t = 0.5 instead of from noise
    python -m tvm_ref.bound runs/toy/moons-*               several runs, as of several seeds: medians and ranges, too
    python -m tvm_ref.bound --dist moons --train           over training: does lowering the loss lower W2?
    python -m tvm_ref.bound --dist moons --lipschitz       how RMSNorm and spectral initialisation change int L

The first three print the chain W2 <= displacement <= bounds as a table, and write bound.json and bound.png into a run's
folder. The others train first (a minute or more; --lipschitz trains four networks, 1,500 steps each unless --steps is
given) and write into --out. "/ W2" says how loose a term is. The exit status is 1 if a link of the chain is violated,
which the theory excludes.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tvm_ref.bound.chain import Bound, measure
from tvm_ref.bound.paths import STEPS
from tvm_ref.bound.terms import LABELS, TERMS
from tvm_ref.cli.errors import UserError, user_files
from tvm_ref.cli.files import require_free, write_atomically
from tvm_ref.cli.options import OneLineParser, add_options, flag, given, run
from tvm_ref.cli.progress import progress
from tvm_ref.distances import sampling_floor, wasserstein2
from tvm_ref.experiments import bound_over_training, lipschitz_of_networks
from tvm_ref.flow_map import FlowMap
from tvm_ref.guidance import Condition
from tvm_ref.objectives import OBJECTIVES
from tvm_ref.seeding import BOUND
from tvm_ref.toy.config import ToyConfig, use_one_thread
from tvm_ref.toy.data.distributions import DISTRIBUTIONS
from tvm_ref.toy.data.mixture import GaussianMixture
from tvm_ref.toy.run import distribution_of, load_run, read_config

TRAINING_OPTIONS = ["dist", "data", "bandwidth", "objective", "steps", "batch_size", "width", "depth", "lr",
                    "time_sampler", "noise_share", "equal_share", "target_ema", "ema", "seed"]  # fmt: skip
PAIRINGS = 4  # of data and noise, for the loss of a finished run
LIPSCHITZ_STEPS = 1500  # of training for each of the four networks of --lipschitz, unless --steps says otherwise
MAX_POINTS = 5000  # exact optimal transport holds points^2 costs


def parser() -> OneLineParser:
    """Make the command line."""
    p = OneLineParser("python -m tvm_ref.bound", __doc__)
    p.add_argument("runs", nargs="*", metavar="run", type=Path, help="folders of finished runs")
    mode = p.add_mutually_exclusive_group()
    mode.add_argument("--train", action="store_true", help="train while measuring, and draw the chain over training")
    mode.add_argument("--lipschitz", action="store_true", help="compare int L of a plain and of tamed networks")
    p.add_argument("--time", type=float, default=1.0, help="t in (0, 1], where the jump to 0 starts")
    p.add_argument("--points", type=int, help="points measured on (default: 2000; with --train or --lipschitz: 500)")
    p.add_argument("--grid", type=int, help=f"time steps of the integrals, even (default: {STEPS}; else {STEPS // 2})")
    p.add_argument("--out", type=Path, help="folder of --train or --lipschitz (default: runs/toy/NAME-bound)")
    p.add_argument("--overwrite", action="store_true", help="replace results that are already in that folder")
    add_options(p.add_argument_group("what --train and --lipschitz train"), ToyConfig, TRAINING_OPTIONS)
    return p


def draw(
    distribution: GaussianMixture, points: int, *, conditional: bool = False
) -> tuple[Tensor, Tensor, Condition | None]:
    """Draw data x0 and noise x1 [points, D] to measure on, and their classes."""
    generator = torch.Generator().manual_seed(BOUND)
    x0, label = distribution.sample(points, generator)
    x1 = torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
    return x0, x1, Condition(label, torch.ones(points, dtype=x0.dtype)) if conditional else None


def load_finished(folder: Path) -> tuple[ToyConfig, GaussianMixture, FlowMap]:
    """Load a run that the bound can be measured on, as load_run does.

    Raises:
        ValueError, OSError: no run, an unfinished or damaged one, one with guidance, or one that learned no jumps.
    """
    if not folder.is_dir():
        what = f"--dist {folder.name}" if folder.name in DISTRIBUTIONS else "--dist NAME (or --data FILE)"
        raise UserError(f"{folder} is not a folder; train first: python -m tvm_ref.toy {what} --out {folder}")
    check_objective(read_config(folder))
    try:
        config, distribution, model = load_run(folder)
        done = json.loads((folder / "metrics.json").read_text())["steps"]["done"]
    except FileNotFoundError as error:
        if error.filename and Path(error.filename).name == "metrics.json":
            raise UserError(f"{folder} is not finished (no metrics.json); go on with --resume") from None
        raise
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"{folder} is damaged: {str(error).splitlines()[0]}") from None
    if done < config.steps:
        raise UserError(f"{folder} stopped at step {done} of {config.steps}; go on with --resume")
    return config, distribution, model


def check_objective(config: ToyConfig) -> None:
    """Raise ValueError for training that theorem 1 does not cover."""
    if config.guided:
        raise UserError(
            f"the bound is stated without guidance, and this run has --w {config.w:g}: "
            "its labels have no distribution in closed form"
        )
    if not OBJECTIVES[config.objective].learns_jumps:
        raise UserError("flow matching learns no jumps to bound; choose --objective tvm, pid or meanflow")


def watch(times: Any, name: str) -> Any:
    """Show progress over times."""
    return progress(times, desc=f"measuring the {name}", unit="time", leave=False)


# A finished run -----------------------------------------------------------------------------------------------------


def measure_runs(
    finished: dict[Path, tuple[ToyConfig, GaussianMixture, FlowMap]], t: float, points: int, steps: int
) -> list[str]:
    """Measure finished runs by folder, print the chain of each and, of several, medians; returns the violated links.

    Raises:
        FloatingPointError: as measure_run.
    """
    reports = {folder: measure_run(folder, *run, t, points, steps) for folder, run in finished.items()}
    if len(reports) == 1:
        return next(iter(reports.values()))["violations"]
    print(table_over_runs(list(reports.values())))
    return [f"{folder}: {link}" for folder, report in reports.items() for link in report["violations"]]


def measure_run(
    folder: Path, config: ToyConfig, distribution: GaussianMixture, model: FlowMap, t: float, points: int, steps: int
) -> dict[str, Any]:
    """Measure a finished run, print the chain, write bound.json and bound.png; returns what bound.json holds.

    Raises:
        FloatingPointError: a model whose path, or whose bounds, are not finite.
    """
    from tvm_ref.bound.plots import plot_bound
    from tvm_ref.toy.report.plots import save_figure

    x0, x1, condition = draw(distribution, points, conditional=config.conditional)
    bound = measure(
        model.cpu(), distribution, x0, x1,
        t=t, scale=distribution.time_scale, steps=steps, pairings=PAIRINGS, condition=condition, watch=watch,
    )  # fmt: skip
    report = summary(bound) | {"points": points, "grid": steps}
    report["w2_data"], report["w2_floor"], report["w2_floor_deviation"] = against_data(bound, distribution)
    write_atomically(folder / "bound.json", dumps(report))
    save_figure(plot_bound(bound, config.name), folder / "bound.png")
    print(table(bound, report))
    print(f"bound.json and bound.png: {folder}")
    return report


def against_data(bound: Bound, distribution: GaussianMixture) -> tuple[float, float, float]:
    """Measure W2 of the model's samples against fresh data; then what perfect ones have: mean, standard deviation."""
    generator = torch.Generator().manual_seed(BOUND + 1)
    samples = bound.paths.x[0]
    floor = sampling_floor(lambda n, g: distribution.sample(n, g)[0], len(samples), seed=BOUND + 2)
    return wasserstein2(samples, distribution.sample(len(samples), generator)[0]), *floor


def summary(bound: Bound) -> dict[str, Any]:
    """List what bound.json holds: every term as a distance, and how sure each is."""
    return {
        "t": bound.t,
        **bound.values,
        "quadrature_error": bound.quadrature_error,
        "quadrature_errors": bound.errors,
        "medians": bound.medians,
        "standard_error": bound.standard_error,
        "path_lipschitz": bound.path_length,
        "loss": bound.loss,
        "loss_minimum": bound.loss_minimum,
        "constant": bound.constant,
        "violations": bound.violations(),
    }


def table(bound: Bound, report: dict[str, Any]) -> str:
    """Format the chain as a table."""
    w2 = max(bound.values["w2"], torch.finfo(torch.float64).tiny)
    lines = [f"{'t = ' + format(bound.t, 'g'):<28}{'value':>11}{'/ W2':>11}{'median':>11}{'quadrature error':>18}"]
    for name in TERMS:
        value, median = bound.values[name], bound.medians.get(name)
        cells = f"{value:>11.4g}{value / w2:>11.4g}{'' if median is None else format(median, '.4g'):>11}"
        note = f"   +- {bound.standard_error:.2g} (draws)" if name == "global_from_loss" else ""
        lines.append(f"{LABELS[name]:<28}{cells}{bound.errors[name]:>18.1e}{note}")
    lines += [
        f"W2 to fresh data {report['w2_data']:.4f}; two clouds of as many data ({report['points']:,}) are "
        f"{report['w2_floor']:.4f} apart, +- {report['w2_floor_deviation']:.2g} by the draw",
        f"int L = {bound.path_length:.2f}, from L(s), the largest slope seen: an estimate from below of the true one",
        f"loss (eq. 9, mean over s) {bound.loss:.4f}, of which {bound.loss_minimum:.4f} cannot be learned",
    ]
    return "\n".join(lines)


def table_over_runs(reports: list[dict[str, Any]]) -> str:
    """Format every term's median over runs, its range, and how many times W2 it is in the median."""
    lines = [f"{f'over {len(reports)} runs':<28}{'median':>11}{'(least - greatest)':>24}{'/ W2':>11}"]
    for name in TERMS:
        values = sorted(report[name] for report in reports)
        ratio = statistics.median(report[name] / report["w2"] if report["w2"] else float("inf") for report in reports)
        spread = f"({values[0]:.4g} - {values[-1]:.4g})"
        lines.append(f"{LABELS[name]:<28}{statistics.median(values):>11.4g}{spread:>24}{ratio:>11.4g}")
    return "\n".join(lines)


def dumps(report: dict[str, Any]) -> str:
    """Write a report as JSON.

    Raises:
        FloatingPointError: numbers that JSON has no word for.
    """
    try:
        return json.dumps(report, indent=2, allow_nan=False) + "\n"
    except ValueError:
        raise FloatingPointError("a bound is too large for a float64, or not a number") from None


# Training -----------------------------------------------------------------------------------------------------------


def measure_training(config: ToyConfig, out: Path, t: float, points: int, steps: int) -> list[str]:
    """Train and measure; writes training.json (after every measurement) and training.png, returns violated links."""
    from tvm_ref.bound.plots import plot_training
    from tvm_ref.toy.report.plots import save_figure

    distribution = distribution_of(config)
    x0, x1, _ = draw(distribution, points)
    records: list[bound_over_training.Record] = []
    for record in bound_over_training.measure_over_training(config, distribution, x0, x1, t=t, steps=steps):
        records.append(record)
        write_atomically(out / "training.json", dumps({"t": t, "points": points, "grid": steps, "records": records}))
    correlations = bound_over_training.rank_correlations(records)
    known = {name: value if value == value else None for name, value in correlations.items()}
    report = {"t": t, "points": points, "grid": steps, "records": records, "rank_correlation_with_w2": known}
    write_atomically(out / "training.json", dumps(report))
    save_figure(plot_training(records, correlations, config.name), out / "training.png")
    print(bound_over_training.table(records, correlations))
    print(f"training.json and training.png: {out}")
    return [f"step {r['step']}: {link}" for r in records for link in r["violations"]]


def compare_tamings(config: ToyConfig, out: Path, t: float, points: int, steps: int) -> list[str]:
    """Compare networks by int L; prints a table, writes lipschitz.json, returns violated links."""
    distribution = distribution_of(config)
    x0, x1, _ = draw(distribution, points)
    results = lipschitz_of_networks.diagnose(config, distribution, x0, x1, t=t, steps=steps)
    exact = lipschitz_of_networks.exact_lipschitz(distribution, x0, x1, t=t, steps=steps)
    report = {"t": t, "points": points, "grid": steps, "training_steps": config.steps, "networks": results}
    report["exact_flow"] = exact
    write_atomically(out / "lipschitz.json", dumps(report))
    print(lipschitz_of_networks.table(results, exact))
    print(f"L is the largest slope seen on the paths, an estimate from below; lipschitz.json: {out}")
    return [
        f"{name}, {state}: {link}"
        for name, states in results.items()
        for state, figures in states.items()
        for link in figures["violations"]
    ]


# The command --------------------------------------------------------------------------------------------------------


def check(arguments: dict[str, Any], training: dict[str, Any]) -> None:
    """Raise ValueError for options that do not fit together or are out of range."""
    trains = arguments["train"] or arguments["lipschitz"]
    if bool(arguments["runs"]) == trains:
        raise UserError("give either the folder of a finished run, or --dist NAME with --train or --lipschitz")
    if not trains and (training or arguments["out"] or arguments["overwrite"]):
        option = flag(next(iter(training))) if training else "--out" if arguments["out"] else "--overwrite"
        raise UserError(f"{option} goes with --train or --lipschitz; a finished run has its own options and folder")
    if not 0 < arguments["time"] <= 1:
        raise UserError(f"--time must lie in (0, 1], got {arguments['time']}")
    if not 10 <= arguments["points"] <= MAX_POINTS:
        raise UserError(f"--points must lie in [10, {MAX_POINTS}], got {arguments['points']}")
    if arguments["grid"] < 4 or arguments["grid"] % 2:
        raise UserError(f"--grid must be even and at least 4, got {arguments['grid']}")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 done, 1 a violated link; other failures and bad input are exits."""
    command = parser()
    arguments = command.parse_args(argv)
    options, trains = given(arguments, ToyConfig), arguments.train or arguments.lipschitz
    points = arguments.points if arguments.points is not None else 500 if trains else 2000
    grid = arguments.grid if arguments.grid is not None else STEPS // 2 if trains else STEPS
    use_one_thread()
    with command.errors(), user_files():
        check(vars(arguments) | {"points": points, "grid": grid}, options)
        if trains:
            config = ToyConfig(**({"steps": LIPSCHITZ_STEPS} if arguments.lipschitz else {}) | options)
            check_objective(config)
            kind = "training" if arguments.train else "lipschitz"
            out = arguments.out or Path("runs/toy") / f"{config.name}-{'bound' if arguments.train else 'lipschitz'}"
            what = f"results of --{'train' if arguments.train else 'lipschitz'}"
            require_free(out, (f"{kind}.json",), what, "--overwrite", overwrite=arguments.overwrite)
            distribution_of(config)
            out.mkdir(parents=True, exist_ok=True)
        else:
            finished = {folder: load_finished(folder) for folder in arguments.runs}
    with command.errors():
        if trains:
            work = measure_training if arguments.train else compare_tamings
            violated = work(config, out, arguments.time, points, grid)
        else:
            violated = measure_runs(finished, arguments.time, points, grid)
    for link in violated:
        print(f"{command.prog}: violated: {link}", file=sys.stderr)
    return 1 if violated else 0


if __name__ == "__main__":
    run(main)
