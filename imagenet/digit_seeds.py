"""Train the preset digits with several seeds, and score it and its controls.

    python imagenet/digit_seeds.py                      three seeds, two at a time
    python imagenet/digit_seeds.py --seeds 5 --jobs 1

Each seed is a run of train.py; the controls are one-step samples of flow matching and the mean image of each class.
The exit status is 0 if every seed passes what digits.py accepts and every control fails, else 1.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from tvm_ref.command_line import OneLineParser, require_at_least, require_free, run

Scores = dict[str, float]


def parser() -> OneLineParser:
    """Build the command line."""
    p = OneLineParser("digit_seeds.py", __doc__)
    p.add_argument("--seeds", type=int, default=3, help="how many")
    p.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    p.add_argument("--out", type=Path, default=Path("runs/imagenet/digits-seeds"), help="folder of the runs")
    p.add_argument("--steps", type=int, help="training steps (default: the preset's)")
    return p


def train_and_judge(folder: Path, options: list[str]) -> dict[str, Scores]:
    """Run train.py on the preset; returns the scores by number of steps.

    Raises:
        RuntimeError: it failed, with its last words.
    """
    command = [sys.executable, "-m", "imagenet.train", "digits", "--out", str(folder), *options]
    done = subprocess.run(command, env={"OMP_NUM_THREADS": "1"} | os.environ, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise RuntimeError(f"the run in {folder} failed: {said}")
    scores: dict[str, Scores] = json.loads((folder / "metrics.json").read_text())["nfe"]
    return scores


def train_all(out: Path, seeds: int, jobs: int, steps: int | None = None) -> dict[str, dict[str, Scores]]:
    """Train seed0, seed1, ... and flow matching (fm), `jobs` at a time; returns scores by run and number of steps.

    Raises:
        RuntimeError: see train_and_judge.
    """
    more = [] if steps is None else ["--steps", str(steps)]
    runs = {f"seed{k}": ["--seed", str(k), *more] for k in range(seeds)} | {"fm": ["--objective", "fm", *more]}
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(train_and_judge, out / name, options): name for name, options in runs.items()}
        try:
            return {futures[f]: f.result() for f in tqdm(as_completed(futures), "trainings", len(futures), unit="run")}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # begin no other; on Ctrl-C those under way save and leave
            raise


def table(runs: Mapping[str, Mapping[str, Scores]], test: Scores, means: Scores) -> tuple[str, bool]:
    """Format the scores, and tell whether every seed passes and every control fails.

    Args:
        runs: what train_all gives.
        test: scores of the held-out images.
        means: scores of the class means.
    """
    from imagenet.digits import ACCEPTED, accepted

    plain, seeds = runs["fm"], [runs[f"seed{k}"] for k in range(len(runs) - 1)]
    medians = {nfe: {key: statistics.median(run[nfe][key] for run in seeds) for key in ACCEPTED} for nfe in ("1", "4")}
    rows = {
        "held-out images": test,
        "class means": means,
        "flow matching, 1 step": plain["1"],
        "flow matching, 4 steps": plain["4"],
        **{f"TVM, 1 step, seed {k}": run["1"] for k, run in enumerate(seeds)},
        "TVM, 1 step, median": medians["1"],
        "TVM, 4 steps, median": medians["4"],
    }
    lines = [f"{'':<30} " + "  ".join(f"{key:>8}" for key in ACCEPTED)]
    for name, scores in rows.items():
        cells = "  ".join(f"{scores[key]:8.3f}" for key in ACCEPTED)
        lines.append(f"{name:<30} {cells}  {'passes' if accepted(scores) else 'fails'}")
    fine = all(accepted(run["1"]) for run in seeds) and not accepted(means) and not accepted(plain["1"])
    return "\n".join(lines), fine


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 if all is as it should be, else 1."""
    command = parser()
    options = command.parse_args(argv)
    with command.bad_input():
        steps = {} if options.steps is None else {"steps": options.steps}
        require_at_least(1, seeds=options.seeds, jobs=options.jobs, **steps)
        require_free(options.out, ("seed0/config.json",), "runs")
        from imagenet.digits import Judges, class_means, load_digits

        judges = Judges()
    with command.failures():
        runs = train_all(options.out, options.seeds, options.jobs, options.steps)
    text, fine = table(runs, judges.judge(load_digits().test[0]), judges.judge(class_means(judges.labels)))
    print(text)
    return 0 if fine else 1


if __name__ == "__main__":
    run(main)
