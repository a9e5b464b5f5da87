"""Train the digits with several seeds, by TVM or by several objectives, and score them and their controls.

    python imagenet/digit_seeds.py                                               three seeds, two at a time
    python imagenet/digit_seeds.py --seeds 5 --jobs 1
    python imagenet/digit_seeds.py --objectives tvm lsd imf --rates 3e-3 1e-2    relatives, each at its best rate
    python imagenet/digit_seeds.py --objectives tvm lsd --budget products        with equal arithmetic
    python imagenet/digit_seeds.py --options --steps 2000 --target-ema 0.5       with options of train.py

Each run is one of train.py. The controls are one-step samples of flow matching and the mean image of each class. With
--rates, every objective is first trained with each on a separate seed, and the rate with the least Frechet distance
in one step is used. All take the same number of steps, or, with --budget products, as many as cost the same matmuls as
those of the first objective. results.json has every score. An interrupted comparison continues with the same command.
The exit status is 0 if every seed of the first objective passes (metrics/digits.py) and every control fails, else 1.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from tvm_ref import OBJECTIVES
from tvm_ref.cli.errors import UserError, user_files
from tvm_ref.cli.files import require_free, write_atomically
from tvm_ref.cli.options import OneLineParser, add_options, given, require_at_least, run
from tvm_ref.cli.progress import progress

Scores = dict[str, float]
CHOICES = tuple(key for key, kind in OBJECTIVES.items() if kind.learns_jumps and not kind.one_step_only)
SWEEP_SEED = 1000  # not among the seeds that are reported
DIVERGED = {nfe: {"accuracy": 0.0, "frechet": float("inf"), "recall": 0.0} for nfe in ("1", "4")}


def parser() -> OneLineParser:
    """Build the command line."""
    p = OneLineParser("digit_seeds.py", __doc__)
    p.add_argument("--seeds", type=int, default=3, help="number of seeds")
    p.add_argument("--jobs", type=int, default=2, help="number of runs at a time, one thread each")
    p.add_argument("--out", type=Path, default=Path("runs/imagenet/digits-seeds"), help="folder of the runs")
    p.add_argument("--objectives", nargs="+", choices=CHOICES, default=["tvm"], help="objectives to compare")
    p.add_argument("--budget", choices=("steps", "products"), default="steps", help="what all get equally")
    p.add_argument("--rates", nargs="+", type=float, default=[], help="learning rates to try (default: the preset's)")
    p.add_argument(
        "--options", nargs=argparse.REMAINDER, default=[], help="put last: further options of train.py, for every run"
    )
    return p


def train_and_score(folder: Path, options: Sequence[str]) -> dict[str, Scores]:
    """Run train.py on the preset, or continue the run; return the scores by number of steps, or DIVERGED.

    Raises:
        UserError: it failed; with the last line of its output.
    """
    resume = ["--resume"] if (folder / "config.json").exists() else []
    command = [sys.executable, "-m", "imagenet.train", "digits", "--out", str(folder), *options, *resume]
    done = subprocess.run(command, env={"OMP_NUM_THREADS": "1"} | os.environ, capture_output=True, text=True)
    if done.returncode:
        if "is NaN or infinite" in done.stderr:
            return DIVERGED
        said = [line for line in done.stderr.strip().splitlines() if "--resume continues" not in line]
        raise UserError(f"the run in {folder} failed: {(said or [f'status {done.returncode}'])[-1]}")
    scores: dict[str, Scores] = json.loads((folder / "metrics.json").read_text())["nfe"]
    return scores


def train_all(out: Path, runs: Mapping[str, Sequence[str]], jobs: int) -> dict[str, dict[str, Scores]]:
    """Train a run per name, with its options, `jobs` at a time; returns scores by run and number of steps."""
    pool = ThreadPoolExecutor(jobs)
    try:
        scores = pool.map(lambda name: train_and_score(out / name, runs[name]), runs)
        return dict(zip(runs, progress(scores, "trainings", len(runs), unit="run"), strict=True))
    finally:
        pool.shutdown(cancel_futures=True)  # after a failure or Ctrl-C no other run is started


def equal_products(keys: Sequence[str], more: Sequence[str]) -> dict[str, list[str]]:
    """Return options of train.py for each objective and fm: the steps that cost what those of the first key cost."""
    from imagenet.config import PRESETS, Config
    from imagenet.cost.flops import counted_step_flops

    fields = OneLineParser("train.py", "")
    add_options(fields, Config)
    config = replace(PRESETS["digits"], **given(fields.parse_known_args(more)[0], Config))
    cost = {key: counted_step_flops(replace(config, objective=key)) for key in (*keys, "fm")}
    return {key: [*more, "--steps", str(round(config.steps * cost[keys[0]] / cost[key]))] for key in cost}


def best_rates(out: Path, rates: Sequence[float], more: Mapping[str, Sequence[str]], jobs: int) -> Scores:
    """Train every objective with every learning rate; returns the rate of the least Frechet distance in one step."""
    keys = [key for key in more if key != "fm"]
    runs = {
        f"{key}-lr{rate:g}": ["--objective", key, "--lr", str(rate), "--seed", str(SWEEP_SEED), *more[key]]
        for key in keys
        for rate in rates
    }
    scores = train_all(out, runs, jobs)
    write_atomically(out / "sweep.json", json.dumps(scores, indent=2) + "\n")
    return {key: min(rates, key=lambda rate: scores[f"{key}-lr{rate:g}"]["1"]["frechet"]) for key in keys}


def plan(more: Mapping[str, Sequence[str]], rates: Mapping[str, float], seeds: int) -> dict[str, list[str]]:
    """List the options of every run by name: fm, and KEY-seed0, KEY-seed1, ... of each other objective."""
    runs = {"fm": ["--objective", "fm", *more["fm"]]}
    for key in more:
        rate = ["--lr", str(rates[key])] if key in rates else []
        options = ["--objective", key, *rate, *more[key]]
        runs |= {f"{key}-seed{k}": [*options, "--seed", str(k)] for k in range(seeds) if key != "fm"}
    return runs


def table(rows: Mapping[str, Sequence[Scores]]) -> str:
    """Format rows of scores: their medians, and of several their ranges."""
    from imagenet.metrics.digits import ACCEPTED, accepted

    lines = [f"{'':<30} " + "  ".join(f"{key:<19}" for key in ACCEPTED)]
    for name, scores in rows.items():
        columns = {key: sorted(s[key] for s in scores) for key in ACCEPTED}
        median = {key: statistics.median(values) for key, values in columns.items()}
        ranges = {key: f" ({values[0]:.3f}-{values[-1]:.3f})" * (len(scores) > 1) for key, values in columns.items()}
        cells = "  ".join(f"{f'{median[key]:.3f}{ranges[key]}':<19}" for key in ACCEPTED)
        lines.append(f"{name:<30} {cells}  {'passes' if accepted(median) else 'fails'}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return the exit status: 0 if seeds pass and controls fail, else 1."""
    command = parser()
    options = command.parse_args(argv)
    with command.errors():
        require_at_least(1, seeds=options.seeds, jobs=options.jobs)
        if not all(0 < rate < float("inf") for rate in options.rates):
            raise UserError("--rates must be positive and finite")
        if (options.out / "results.json").exists() or not any(options.out.glob("*/config.json")):
            require_free(options.out, ("results.json",), "a comparison")
        with user_files():
            options.out.mkdir(parents=True, exist_ok=True)
        from imagenet.data.digits import load_digits
        from imagenet.metrics.digits import accepted, class_means, digit_metrics

        keys, jobs = options.objectives, options.jobs
        more = dict.fromkeys((*keys, "fm"), options.options)
        if options.budget == "products":
            more = equal_products(keys, options.options)
            print("steps: " + ", ".join(f"{key} {words[-1]}" for key, words in more.items()))
        rates = best_rates(options.out, options.rates, more, jobs) if options.rates else {}
        if rates:
            print("learning rates: " + ", ".join(f"{key} {rate:g}" for key, rate in rates.items()))
        scores = train_all(options.out, plan(more, rates, options.seeds), jobs)
        write_atomically(options.out / "results.json", json.dumps({"rates": rates, "runs": scores}, indent=2) + "\n")
    metrics = digit_metrics()
    controls = {
        "class means": [metrics.measure(class_means(*load_digits().train, metrics.labels))],
        "flow matching, NFE 1": [scores["fm"]["1"]],
    }
    rows = {"held-out images": [metrics.measure(load_digits().test[0])], **controls}
    rows["flow matching, NFE 4"] = [scores["fm"]["4"]]
    for key in keys:
        for nfe in ("1", "4"):
            rows[f"{key}, NFE {nfe}"] = [scores[f"{key}-seed{k}"][nfe] for k in range(options.seeds)]
    print(table(rows))
    fine = all(map(accepted, rows[f"{keys[0]}, NFE 1"])) and not any(accepted(row[0]) for row in controls.values())
    return 0 if fine else 1


if __name__ == "__main__":
    run(main)
