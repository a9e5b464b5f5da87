"""The report of a run: measure its evaluation weights, draw them, and write samples as a table."""

import csv
import io
import json
import sys
from typing import Any

import torch

from tvm_ref.cli.files import write_atomically
from tvm_ref.cli.progress import progress
from tvm_ref.interpolant import interpolate
from tvm_ref.objectives import OBJECTIVES, ResidualObjective
from tvm_ref.sampling import Jump, sample
from tvm_ref.seeding import SAMPLING
from tvm_ref.toy.config import ToyConfig
from tvm_ref.toy.data.points import OwnPoints, Units, units_of
from tvm_ref.toy.report.metrics import EULER_STEPS, NFES, evaluate, make_reference
from tvm_ref.toy.run import METRICS, PICTURES, SAMPLES, Run
from tvm_ref.toy.training import draw_block

BAR = "measuring and drawing: {percentage:3.0f}%|{bar}| {elapsed}"


def write_report(run: Run, points: int) -> dict[str, Any]:
    """Measure and draw with progress; write weights, samples, pictures and metrics.json, and return the metrics."""
    from tvm_ref.toy.report import plots  # slow to import: not for --help
    from tvm_ref.toy.report.map_plot import plot_map

    config, data, jump = run.config, run.distribution, run.training.evaluated
    for name in (METRICS, *PICTURES):  # remove results of other weights
        (run.folder / name).unlink(missing_ok=True)
    run.write_weights()
    if isinstance(data, OwnPoints):
        write_atomically(run.folder / SAMPLES, samples_table(config, jump, units_of(data), points))
    kind = OBJECTIVES[config.objective]
    nfes = NFES[:1] if kind.one_step_only else NFES if kind.learns_jumps else (*NFES, EULER_STEPS)
    shown = nfes if kind.one_step_only else None
    with progress(total=1 + len(nfes) + len(PICTURES), file=sys.stdout, mininterval=0.1, bar_format=BAR) as bar:
        reference = make_reference(data, w=config.w if config.conditional else None, points=points)
        bar.update()
        nfe = {}
        for n in nfes:
            nfe[str(n)] = evaluate(jump, reference, n)
            bar.update()
        for name, draw in {
            "samples.png": lambda: plots.plot_samples(data, jump, reference, shown),
            "trajectories.png": lambda: plots.plot_trajectories(data, jump, reference),
            "map.png": lambda: plot_map(data, jump, reference),
            "losses.png": lambda: plots.plot_losses(run.log, least_flow_matching_loss(run)),
        }.items():
            plots.save_figure(draw(), run.folder / name)
            bar.update()
    metrics = {
        "nfe": nfe,
        "seconds": {"training": round(run.training.seconds, 2)},
        "steps": {"done": run.training.step, "planned": config.steps},
        "points": points,
    }
    write_atomically(run.folder / METRICS, json.dumps(metrics, indent=2) + "\n")
    return metrics


def least_flow_matching_loss(run: Run) -> float | None:
    """Measure the flow-matching loss of the exact velocity: the mean variance of v given x_t.

    That is less noisy than a mean of squared errors. None for objectives whose term covers only some of the samples, or
    is weighted.
    """
    if isinstance(run.training.objective, ResidualObjective):
        return None
    variances = []
    for batch in draw_block(run.config, run.distribution, 0):
        x, label = interpolate(batch.x0, batch.x1, batch.times.s_prime), batch.condition and batch.condition.label
        variances.append(run.distribution.velocity_variance(x, batch.times.s_prime, label).mean())
    return float(torch.stack(variances).mean())


def samples_table(config: ToyConfig, jump: Jump, units: Units, points: int) -> str:
    """Draw samples in one step (in 64 Euler steps where no jumps were learned) and write them as comma-separated text.

    Args:
        config: what the model was trained with.
        jump: takes a step of the model.
        units: the data's units.
        points: rows of the table, next to the line of names.
    """
    noise = torch.randn(points, 2, generator=torch.Generator().manual_seed(SAMPLING))
    x = units.restore(sample(jump, noise, 1 if OBJECTIVES[config.objective].learns_jumps else EULER_STEPS))
    rows = [",".join(f"{a:.10g}" for a in row) for row in x.tolist()]
    header = io.StringIO()
    csv.writer(header).writerow(units.columns)  # with quotes around a name that needs them
    return "\n".join([header.getvalue().rstrip(), *rows]) + "\n"
