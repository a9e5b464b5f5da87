"""The digits that ship with scikit-learn: 1437 images to learn from, 360 held out, and the judges of what is generated.

Judged are as many samples as there are held-out images, of the same labels, each from noise:

    accuracy         share that a support vector machine, trained on the real images, gives the label asked for
    frechet          Frechet distance of the pixels (64 numbers in [0, 1]) to the real images'
    frechet_floor    that of the held-out images: what a perfect generator scores, as a sample this small is never exact
    recall           share of the real images within reach of the samples (Kynkaanniemi et al. 2019, k = 3), by the
                     features of a small network that was trained to tell digits

`python imagenet/digits.py --seeds 3` trains the preset with three seeds, and judges the runs and their controls.
"""

import contextlib
import functools
import json
import multiprocessing
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from imagenet.metrics import Gaussian, frechet_distance, gaussian_statistics, precision_recall
from tvm_ref.command_line import OneLineParser, require_at_least

TEST = 360  # images held out
NEIGHBOURS = 3  # k of the recall
FEATURES = 64  # hidden units of the network that the recall looks through
# what one-step samples must reach: at least, or at most for the distance; the controls do not
ACCEPTED = {"accuracy": 0.95, "frechet": 0.40, "recall": 0.45}

Pixels = NDArray[np.float32]  # [N, 64], each in [0, 1]


class Split(NamedTuple):
    """Images float32 [N, 1, 8, 8] in [-1, 1] and labels [N], to learn from and held out.

    Attributes:
        train: images, labels.
        test: images, labels.
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@functools.cache
def load_digits() -> Split:
    """The digits, split once and for all, with every class in both parts in proportion.

    Raises:
        ValueError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise ValueError("the digits come with scikit-learn: pip install -e '.[imagenet]'") from None
    stored = datasets.load_digits()
    x = (stored.images[:, None] / 8 - 1).astype(np.float32)
    parts = train_test_split(x, stored.target.astype(np.int64), test_size=TEST, stratify=stored.target, random_state=0)
    x_train, x_test, y_train, y_test = map(torch.from_numpy, parts)
    return Split((x_train, y_train), (x_test, y_test))


def pixels(x: Tensor) -> Pixels:
    """Images [N, 1, 8, 8] in [-1, 1] as rows of 64 numbers in [0, 1], cut off where they leave it."""
    return ((x.float().cpu().clamp(-1, 1) + 1) / 2).flatten(1).numpy()


class Judges:
    """Classifiers and statistics of the real digits."""

    def __init__(self) -> None:
        from sklearn.neural_network import MLPClassifier
        from sklearn.svm import SVC

        (x_train, y_train), (x_test, self.labels) = load_digits()
        self._train, self._test = pixels(x_train), pixels(x_test)
        self._machine = SVC(kernel="rbf", gamma="scale").fit(self._train, y_train.numpy())
        self._network = MLPClassifier((FEATURES,), random_state=0, max_iter=60, early_stopping=True)
        self._network.fit(self._train, y_train.numpy())
        self._real = gaussian_statistics(self._train)
        self.floor = self._frechet(self._test)

    def judge(self, x: Tensor) -> dict[str, float]:
        """The figures of samples x [360, 1, 8, 8] of the labels `self.labels`."""
        samples = pixels(x)
        accuracy = float((self._machine.predict(samples) == self.labels.numpy()).mean())
        recall = precision_recall(self._features(self._train), self._features(samples), NEIGHBOURS)[1]
        figures = {
            "accuracy": accuracy, "frechet": self._frechet(samples), "frechet_floor": self.floor, "recall": recall,
        }  # fmt: skip
        return {name: round(value, 4) for name, value in figures.items()}

    def _frechet(self, samples: Pixels) -> float:
        generated: Gaussian = gaussian_statistics(samples)
        return frechet_distance(*self._real, *generated)

    def _features(self, samples: Pixels) -> NDArray[np.float64]:
        """What the network's hidden layer makes of pixels: [N, FEATURES]."""
        return np.maximum(samples @ self._network.coefs_[0] + self._network.intercepts_[0], 0)


def class_means(labels: Tensor) -> Tensor:
    """The mean image of each label's class [N, 1, 8, 8]: accurate and without variety, it must not pass."""
    x, y = load_digits().train
    means = torch.stack([x[y == label].mean(0) for label in range(10)])
    return means[labels]


def accepted(figures: dict[str, float]) -> bool:
    """Whether figures reach ACCEPTED."""
    return (
        figures["accuracy"] >= ACCEPTED["accuracy"]
        and figures["frechet"] <= ACCEPTED["frechet"]
        and figures["recall"] >= ACCEPTED["recall"]
    )


def _row(name: str, figures: dict[str, float]) -> str:
    cells = "  ".join(f"{figures[key]:8.3f}" for key in ACCEPTED)
    return f"{name:<30} {cells}  {'passes' if accepted(figures) else 'fails'}"


def _train(folder: Path, options: list[str]) -> dict[str, dict[str, float]]:
    """Figures by number of steps of a run of the preset, whose progress stays unseen."""
    from imagenet import train

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with open(os.devnull, "w") as unseen, contextlib.redirect_stdout(unseen):
        status = train.main(["digits", "--out", str(folder), *options])
    if status:
        raise RuntimeError(f"the run in {folder} ended with status {status}")
    figures: dict[str, dict[str, float]] = json.loads((folder / "metrics.json").read_text())["nfe"]
    return figures


def main(argv: list[str] | None = None) -> int:
    """Train, judge, print the table; returns 0 if every seed passes and every control fails, else 1."""
    p = OneLineParser("digits.py", description="Train the preset digits with several seeds; judge it and its controls.")
    p.add_argument("--seeds", type=int, default=3, help="how many (default: 3)")
    p.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each (default: 2)")
    p.add_argument("--out", type=Path, default=Path("runs/imagenet/digits-seeds"), help="folder of the runs")
    p.add_argument("--steps", type=int, help="training steps (default: the preset's)")
    arguments = p.parse_args(argv)
    try:
        require_at_least(1, seeds=arguments.seeds, jobs=arguments.jobs)
        if arguments.out.exists():
            raise ValueError(f"{arguments.out} exists already; choose another --out")
        judges = Judges()
    except ValueError as error:
        p.error(str(error))
    steps = ["--steps", str(arguments.steps)] if arguments.steps is not None else []
    trainings = {f"seed{k}": ["--seed", str(k), *steps] for k in range(arguments.seeds)}
    trainings["fm"] = ["--objective", "fm", *steps]
    with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(_train, arguments.out / name, options): name for name, options in trainings.items()}
        done = {futures[f]: f.result() for f in tqdm(as_completed(futures), "trainings", len(futures), unit="run")}
    plain, runs = done["fm"], [done[f"seed{k}"] for k in range(arguments.seeds)]
    medians = {nfe: {key: statistics.median(run[nfe][key] for run in runs) for key in ACCEPTED} for nfe in ("1", "4")}
    controls = {"class means": judges.judge(class_means(judges.labels)), "flow matching, 1 step": plain["1"]}
    print(f"{'':<30} " + "  ".join(f"{key:>8}" for key in ACCEPTED))
    print(_row("held-out images", judges.judge(load_digits().test[0])))
    for name, figures in controls.items():
        print(_row(name, figures))
    print(_row("flow matching, 4 steps", plain["4"]))
    for k, run in enumerate(runs):
        print(_row(f"TVM, 1 step, seed {k}", run["1"]))
    print(_row("TVM, 1 step, median", medians["1"]))
    print(_row("TVM, 4 steps, median", medians["4"]))
    fine = all(accepted(run["1"]) for run in runs) and not any(map(accepted, controls.values()))
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
