"""Train the preset digits with several seeds, by TVM or by several objectives, and score it and its controls.

    python imagenet/digit_seeds.py                                               three seeds, two at a time
    python imagenet/digit_seeds.py --seeds 5 --jobs 1
    python imagenet/digit_seeds.py --objectives tvm lsd imf --rates 3e-3 1e-2    relatives, each at its best rate
    python imagenet/digit_seeds.py --steps 2000 --options --noise-share 0.5      longer, half of the jumps from noise

Each seed is a run of train.py; the controls are one-step samples of flow matching and the mean image of each class.
Every objective draws times by the law of its paper. With --rates, every objective is first trained with
each on a seed of its own, and the rate with the least Frechet distance in one step is taken. All take the same number
of steps, which cost some less than others. results.json in the folder has every score.
The exit status is 0 if every seed of the first objective passes what digits.py accepts and every control fails, else 1.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tvm_ref import OBJECTIVES
from tvm_ref.cli.errors import UserError, user_files
from tvm_ref.cli.files import require_free, write_atomically
from tvm_ref.cli.options import OneLineParser, require_at_least, run
from tvm_ref.cli.progress import progress

Scores = dict[str, float]
CHOICES = tuple(key for key, kind in OBJECTIVES.items() if kind.learns_jumps and not kind.one_step_only)
SWEEP_SEED = 1000  # apart from the seeds that are reported
DIVERGED = {nfe: {"accuracy": 0.0, "frechet": float("inf"), "recall": 0.0} for nfe in ("1", "4")}


def parser() -> OneLineParser:
    """Build the command line."""
    p = OneLineParser("digit_seeds.py", __doc__)
    p.add_argument("--seeds", type=int, default=3, help="how many")
    p.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    p.add_argument("--out", type=Path, default=Path("runs/imagenet/digits-seeds"), help="folder of the runs")
    p.add_argument("--steps", type=int, help="training steps (default: the preset's)")
    p.add_argument("--objectives", nargs="+", choices=CHOICES, default=["tvm"], help="what to minimise")
    p.add_argument("--rates", nargs="+", type=float, default=[], help="learning rates to sweep (default: the preset's)")
    p.add_argument(
        "--options", nargs=argparse.REMAINDER, default=[], help="put last: further options of train.py, for every run"
    )
    return p


def train_and_judge(folder: Path, options: list[str]) -> dict[str, Scores]:
    """Run train.py on the preset; returns the scores by number of steps, DIVERGED if it did.

    Raises:
        RuntimeError: it failed, with its last words.
    """
    command = [sys.executable, "-m", "imagenet.train", "digits", "--out", str(folder), *options]
    done = subprocess.run(command, env={"OMP_NUM_THREADS": "1"} | os.environ, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        if "is NaN or infinite" in said:
            return DIVERGED
        raise RuntimeError(f"the run in {folder} failed: {said}")
    scores: dict[str, Scores] = json.loads((folder / "metrics.json").read_text())["nfe"]
    return scores


def train_all(out: Path, runs: Mapping[str, list[str]], jobs: int) -> dict[str, dict[str, Scores]]:
    """Train a run per name, with its options, `jobs` at a time; returns scores by run and number of steps.

    Raises:
        RuntimeError: see train_and_judge.
    """
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(train_and_judge, out / name, options): name for name, options in runs.items()}
        try:
            done = {
                futures[f]: f.result() for f in progress(as_completed(futures), "trainings", len(futures), unit="run")
            }
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # begin no other; on Ctrl-C those under way save and leave
            raise
    return {name: done[name] for name in runs}


def sweep(out: Path, keys: Sequence[str], rates: Sequence[float], more: list[str], jobs: int) -> dict[str, float]:
    """Train every objective with every learning rate; returns the rate of the least Frechet distance in one step.

    Empty without rates. sweep.json has every score.

    Raises:
        RuntimeError: see train_and_judge.
    """
    if not rates:
        return {}
    seed = ["--seed", str(SWEEP_SEED), *more]
    runs = {f"{key}-lr{rate:g}": ["--objective", key, "--lr", str(rate), *seed] for key in keys for rate in rates}
    scores = train_all(out, runs, jobs)
    write_atomically(out / "sweep.json", json.dumps(scores, indent=2) + "\n")
    return {key: min(rates, key=lambda rate: scores[f"{key}-lr{rate:g}"]["1"]["frechet"]) for key in keys}


def plan(keys: Sequence[str], rates: Mapping[str, float], seeds: int, more: list[str]) -> dict[str, list[str]]:
    """List the options of every run by name: KEY-seed0, KEY-seed1, ... of each objective, and fm."""
    runs = {"fm": ["--objective", "fm", *more]}
    for key in keys:
        rate = ["--lr", str(rates[key])] if key in rates else []
        runs |= {f"{key}-seed{k}": ["--objective", key, *rate, "--seed", str(k), *more] for k in range(seeds)}
    return runs


def table(runs: Mapping[str, Mapping[str, Scores]], test: Scores, means: Scores) -> tuple[str, bool]:
    """Format the scores, and tell whether every seed of the first objective passes and every control fails.

    Args:
        runs: scores by run (see plan) and number of steps.
        test: scores of the held-out images.
        means: scores of the class means.
    """
    from imagenet.metrics.digits import ACCEPTED, accepted

    members: dict[str, list[Mapping[str, Scores]]] = {}
    for name, by_nfe in runs.items():
        if name != "fm":
            members.setdefault(name.split("-seed")[0], []).append(by_nfe)
    lines = [f"{'':<30} " + "  ".join(f"{key:<19}" for key in ACCEPTED)]

    def add(name: str, scores: Sequence[Scores]) -> None:
        """Add a row of medians, and of several scores their range."""
        columns = {key: sorted(s[key] for s in scores) for key in ACCEPTED}
        median = {key: statistics.median(values) for key, values in columns.items()}
        ranges = {key: f" ({values[0]:.3f}-{values[-1]:.3f})" * (len(scores) > 1) for key, values in columns.items()}
        cells = "  ".join(f"{f'{median[key]:.3f}{ranges[key]}':<19}" for key in ACCEPTED)
        lines.append(f"{name:<30} {cells}  {'passes' if accepted(median) else 'fails'}")

    add("held-out images", [test])
    add("class means", [means])
    for nfe in ("1", "4"):
        add(f"flow matching, NFE {nfe}", [runs["fm"][nfe]])
    for key, seeds in members.items():
        for k, scores in enumerate(seeds):
            add(f"{key}, NFE 1, seed {k}", [scores["1"]])
        for nfe in ("1", "4"):
            add(f"{key}, NFE {nfe}", [scores[nfe] for scores in seeds])
    first = next(iter(members.values()))
    fine = all(accepted(scores["1"]) for scores in first) and not accepted(means) and not accepted(runs["fm"]["1"])
    return "\n".join(lines), fine


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 if all is as it should be, else 1."""
    command = parser()
    options = command.parse_args(argv)
    with command.errors(), user_files():
        steps = {} if options.steps is None else {"steps": options.steps}
        require_at_least(1, seeds=options.seeds, jobs=options.jobs, **steps)
        if not all(0 < rate < float("inf") for rate in options.rates):
            raise UserError("--rates must be positive and finite")
        require_free(options.out, (f"{options.objectives[0]}-seed0/config.json",), "runs")
        from imagenet.data.digits import load_digits
        from imagenet.metrics.digits import class_means, digit_metrics

        metrics = digit_metrics()
    with command.errors():
        options.out.mkdir(parents=True, exist_ok=True)
        more = [*([] if options.steps is None else ["--steps", str(options.steps)]), *options.options]
        rates = sweep(options.out, options.objectives, options.rates, more, options.jobs)
        if rates:
            print("learning rates: " + ", ".join(f"{key} {rate:g}" for key, rate in rates.items()))
        runs = plan(options.objectives, rates, options.seeds, more)
        scores = train_all(options.out, runs, options.jobs)
        write_atomically(options.out / "results.json", json.dumps({"rates": rates, "runs": scores}, indent=2) + "\n")
    text, fine = table(scores, metrics.measure(load_digits().test[0]), metrics.measure(class_means(metrics.labels)))
    print(text)
    return 0 if fine else 1


if __name__ == "__main__":
    run(main)
