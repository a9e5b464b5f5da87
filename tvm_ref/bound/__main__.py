"""Measure the 2-Wasserstein bound (theorem 1) with every constant, on data where every term of it is known.

    python -m tvm_ref.bound runs/toy/moons                 a finished run of python -m tvm_ref.toy
    python -m tvm_ref.bound runs/toy/moons --time 0.5      the jump from t = 0.5 instead of from noise
    python -m tvm_ref.bound runs/toy/moons-*               several runs, such as seeds: also medians and ranges

Prints the chain W2 <= displacement <= bounds as a table, and writes bound.json and bound.png into a run's folder.
"/ W2" says how loose a term is. The exit status is 1 if a link of the chain is violated, which the theory excludes.

    python -m tvm_ref.experiments.bound_over_training      the chain and the bounds of other losses over training
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tvm_ref.bound.chain import LABELS, TERMS, Bound, measure
from tvm_ref.bound.measuring import Measuring, require_covered
from tvm_ref.cli.errors import UserError, user_files
from tvm_ref.cli.files import write_atomically
from tvm_ref.cli.options import OneLineParser, add_options, given, run
from tvm_ref.cli.progress import progress
from tvm_ref.distances import sampling_floor, wasserstein2
from tvm_ref.flow_map import FlowMap
from tvm_ref.seeding import BOUND
from tvm_ref.toy.config import ToyConfig, use_one_thread
from tvm_ref.toy.data.distributions import DISTRIBUTIONS
from tvm_ref.toy.data.mixture import GaussianMixture
from tvm_ref.toy.run import load_run, read_config, steps_done

PAIRINGS = 4  # pairings of data and noise that the loss is averaged over
CALLS = 3 * (2 + PAIRINGS)  # network calls at each time: three for the paths, three for L, three per loss
Finished = tuple[ToyConfig, GaussianMixture, FlowMap]


def parser() -> OneLineParser:
    """Make the command line."""
    p = OneLineParser("python -m tvm_ref.bound", __doc__)
    p.add_argument("runs", nargs="+", metavar="run", type=Path, help="folders of finished runs")
    add_options(p, Measuring)
    return p


def load_finished(folder: Path) -> Finished:
    """Load a run, as load_run does, and check that the bound can be measured on it.

    Raises:
        ValueError, OSError: no run, an unfinished or damaged one, one with classes, or one that learned no jumps.
    """
    if not folder.is_dir():
        what = f"--dist {folder.name}" if folder.name in DISTRIBUTIONS else "--dist NAME (or --data FILE)"
        raise UserError(f"{folder} is not a folder; train first: python -m tvm_ref.toy {what} --out {folder}")
    require_covered(read_config(folder))
    config, distribution, model = load_run(folder)
    done = steps_done(folder)
    if done is None or done < config.steps:
        raise UserError(f"{folder} stopped at step {done or 0} of {config.steps}; go on with --resume")
    return config, distribution, model


def measure_run(folder: Path, finished: Finished, measuring: Measuring, bar: tqdm) -> dict[str, Any]:
    """Measure a finished run, print the chain, write bound.json and bound.png; return what bound.json holds.

    The bar advances with every call of the network.

    Raises:
        FloatingPointError: a model whose path, or whose bounds, are not finite.
    """
    from tvm_ref.bound.plots import plot_bound
    from tvm_ref.toy.report.plots import save_figure

    config, distribution, model = finished
    bar.write(f"measuring {folder}: {measuring.points:,} points at {measuring.grid + 1} times")

    def count(*_: Any) -> None:  # what a hook returns would replace the output
        bar.update()

    model.network.register_forward_hook(count)  # of its copies, too
    draws, s = measuring.draw(distribution), measuring.times(distribution)
    bound = measure(model, distribution, draws, s, distribution.time_scale, PAIRINGS)
    report = summary(bound) | {"points": measuring.points, "grid": measuring.grid}
    report["w2_data"], report["w2_floor"], report["w2_floor_deviation"] = against_data(bound, distribution)
    write_atomically(folder / "bound.json", json.dumps(report, indent=2) + "\n")
    save_figure(plot_bound(bound, config.name), folder / "bound.png")
    bar.write(f"{table(bound, report)}\nbound.json and bound.png: {folder}")
    return report


def against_data(bound: Bound, distribution: GaussianMixture) -> tuple[float, float, float]:
    """Measure W2 of the model's samples to fresh data; then mean and standard deviation of that for perfect samples."""
    generator = torch.Generator().manual_seed(BOUND + 1)
    samples = bound.paths.x[0]
    floor = sampling_floor(lambda n, g: distribution.sample(n, g)[0], len(samples), seed=BOUND + 2)
    return wasserstein2(samples, distribution.sample(len(samples), generator)[0]), *floor


def summary(bound: Bound) -> dict[str, Any]:
    """Return the contents of bound.json: every term as a distance, with its error."""
    names = ("t", "quadrature_error", "medians", "standard_error", "loss", "loss_minimum", "constant")
    known = {name: getattr(bound, name) for name in names} | {"quadrature_errors": bound.errors}
    return known | bound.values | {"path_lipschitz": bound.lipschitz_integral, "violations": bound.violations()}


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
        f"int L = {bound.lipschitz_integral:.2f}, the largest slopes at {3 * report['points']:,} points of each time, "
        "X_s, Y_s and halfway: an estimate from below",
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


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 done, 1 a violated link; other failures and bad input are exits."""
    command = parser()
    arguments = command.parse_args(argv)
    use_one_thread()
    with command.errors(), user_files():
        measuring = Measuring(**given(arguments, Measuring))
        finished = {folder: load_finished(folder) for folder in arguments.runs}
    calls = CALLS * (measuring.grid + 1) * len(finished)
    kept = "a run whose table was printed has its bound.json"
    with command.errors(kept), progress(total=calls, unit="call", desc="measuring", smoothing=0) as bar:
        reports = {folder: measure_run(folder, run, measuring, bar) for folder, run in finished.items()}
    if len(reports) > 1:
        print(table_over_runs(list(reports.values())))
    violated = [f"{folder}: {link}" for folder, report in reports.items() for link in report["violations"]]
    for link in violated:
        print(f"{command.prog}: violated: {link}", file=sys.stderr)
    return 1 if violated else 0


if __name__ == "__main__":
    run(main)
