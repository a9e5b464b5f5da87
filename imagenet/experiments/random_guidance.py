"""Test on small models if random guidance weights make MeanFlow but not TVM unstable (sec. 7.2, fig. 7); vary beta2.

    python -m imagenet.experiments.random_guidance                                           two moons
    python -m imagenet.experiments.random_guidance --data digits --batch-size 64             digits, half an hour
    python -m imagenet.experiments.random_guidance --cases TVM:random MeanFlow:random        some

Moons are trained as the toy is (SOAP, gradients clipped at norm 1), digits as the paper says (AdamW, no clipping, here
with a cosine). Guidance is `constant`, w = 2; `random`, 1/w uniform between 1/3 and 1; or `mixed`, eq. 96 of the paper:
w ~ U(1, 3) and kappa ~ U(0, 3), whose sum is the weight, with kappa u(x_t, t, c) for a part of v (methods of one x_t).
"TVM, no 1/w^2" and "MeanFlow, 1/w^2" exchange the weight of the loss; ":0.999" is beta2 in place of 0.95.

The table has, of the second half of training, the median of the gradient's norm before clipping, its 99 % quantile and
maximum over that, and the same quantile of the jump's loss; then, at w = 2, paired RMSE to the exact guided map or the
Frechet distance of digits, in one step and in four. Writes results.json, with the largest norm of every ten steps, into
a folder.
"""

import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from imagenet.config import Config
from imagenet.data import batches
from imagenet.data.image_sets import load_data
from imagenet.metrics.digits import digit_metrics
from imagenet.metrics.own import measure_model
from imagenet.model.distributed import World
from imagenet.sampler import Generator
from imagenet.training.step import Training
from tvm_ref.cli.errors import UserError, user_files
from tvm_ref.cli.files import require_free, write_atomically
from tvm_ref.cli.options import OneLineParser, require_at_least, run
from tvm_ref.cli.progress import progress
from tvm_ref.experiments.family_measures import line_with_velocity
from tvm_ref.experiments.relatives import GuidedLSD
from tvm_ref.flow_map import Flow, FlowMap
from tvm_ref.guidance import Condition, draw_beta
from tvm_ref.interpolant import conditional_velocity, interpolate
from tvm_ref.objectives import TVM, ImprovedMeanFlow, LossTerms, MeanFlow, Objective
from tvm_ref.seeding import generator as generator_of
from tvm_ref.shapes import Sample, over
from tvm_ref.time_samplers import Times
from tvm_ref.toy import training as toy
from tvm_ref.toy.config import ToyConfig, use_one_thread
from tvm_ref.toy.report.metrics import Reference, make_reference, paired_errors

W, W_MIN, W_MAX, KAPPA_MAX = 2.0, 1.0, 3.0, 3.0  # constant; bounds of random weights; bound of kappa
DEFAULT, OTHER = 0.95, 0.999  # beta2
POINTS = 1000  # samples to measure errors on
NFES = (1, 4)
EVERY = 10  # steps per recorded norm
TRIANGLE = {"time_sampler": "triangle", "equal_share": 0.75}  # times of LSD


class Reweighted(Objective):
    """An objective whose loss is multiplied by w^-power: 2 gives it TVM's 1/w^2, and -2 takes that from TVM."""

    def __init__(self, objective: Objective, power: float):
        super().__init__(objective.flow_map)
        self.objective, self.power = objective, power

    def forward(
        self, x0: Sample, x1: Sample, times: Times, condition: Condition | None = None, target: Flow | None = None
    ) -> LossTerms:
        """Return the loss terms [B], see Objective."""
        assert condition is not None
        terms, weight = self.objective(x0, x1, times, condition, target), condition.beta**self.power
        return LossTerms(weight * terms.jump, weight * terms.flow_matching)


class Method(NamedTuple):
    """A method: options of both configurations, decay of its target, its objective of a model and a null label."""

    options: Mapping[str, Any]
    target_ema: float
    make: Callable[[FlowMap, int], Objective]
    one_x: bool = True  # x_t, at which v is asked for


METHODS = {
    "TVM": Method({}, 0.99, lambda m, k: TVM(m, null_label=k), one_x=False),
    "TVM, no 1/w^2": Method({}, 0.99, lambda m, k: Reweighted(TVM(m, null_label=k), -2), one_x=False),
    "LSD": Method(TRIANGLE, 0.0, lambda m, k: GuidedLSD(m, null_label=k), one_x=False),
    "MeanFlow": Method({"objective": "meanflow"}, 0.0, lambda m, k: MeanFlow(m, null_label=k, power=0)),
    "MeanFlow, 1/w^2": Method(
        {"objective": "meanflow"}, 0.0, lambda m, k: Reweighted(MeanFlow(m, null_label=k, power=0), 2)
    ),
    "improved MeanFlow": Method({"objective": "imf"}, 0.0, lambda m, k: ImprovedMeanFlow(m, null_label=k, power=0)),
}
GUIDANCE = ("constant", "random", "mixed")
CASES = (
    *(f"{name}:{guidance}" for name in METHODS for guidance in GUIDANCE[:2]),
    *(f"{name}:mixed" for name in ("TVM", "TVM, no 1/w^2", "MeanFlow", "MeanFlow, 1/w^2")),
    "TVM:constant:0.999",
    "MeanFlow:constant:0.999",
)

AnyBatch = TypeVar("AnyBatch", toy.Batch, batches.Batch)


class Case(NamedTuple):
    """A case to train."""

    method: str
    guidance: str
    beta2: float = DEFAULT

    @classmethod
    def read(cls, text: str) -> "Case":
        """Read a case, see CASES.

        Raises:
            UserError: an unknown one.
        """
        method, _, rest = text.partition(":")
        guidance, _, beta2 = rest.partition(":")
        if method not in METHODS or guidance not in GUIDANCE or beta2 not in ("", str(OTHER)):
            raise UserError(f"--cases must be of {', '.join(CASES)}; got '{text}'")
        return cls(method, guidance, float(beta2 or DEFAULT))


def guide(batch: AnyBatch, case: Case, model: FlowMap, null_label: int, source: torch.Generator) -> AnyBatch:
    """Give the samples of a batch that have a class the guidance weights of a case; with "mixed" see eq. 96."""
    assert batch.condition is not None
    label = batch.condition.label
    n, classless = len(label), label == null_label
    w, kappa = torch.full((n,), W), torch.zeros(n)
    if case.guidance == "random":
        w = 1 / draw_beta(n, W_MIN, W_MAX, generator=source)
    elif case.guidance == "mixed":
        w = W_MIN + (W_MAX - W_MIN) * torch.rand(n, generator=source)
        kappa = KAPPA_MAX * torch.rand(n, generator=source)
    w, kappa = w.masked_fill(classless, 1.0), kappa.masked_fill(classless, 0.0)
    total = w + kappa
    batch = batch._replace(condition=Condition(label, 1 / total))
    if case.guidance != "mixed" or not METHODS[case.method].one_x:
        return batch
    # eq. 14 with (w v + kappa u) / (w + kappa) for v is eq. 96
    x, t = interpolate(batch.x0, batch.x1, batch.times.t), batch.times.t
    with torch.no_grad():
        u = model.velocity(x, t, Condition(label, torch.ones(n)))
    v = over(w / total, x) * conditional_velocity(batch.x0, batch.x1) + over(kappa / total, x) * u
    x0, x1 = line_with_velocity(x, t, v)
    return batch._replace(x0=x0, x1=x1)


class Moons(toy.Training):
    """A guided training on two moons, whose batches have the guidance of a case."""

    def __init__(self, case: Case, seed: int, steps: int, batch_size: int):
        method = METHODS[case.method]
        config = ToyConfig(conditional=True, w=W, steps=steps, batch_size=batch_size, lr=0.01, seed=seed,
                           target_ema=method.target_ema, **method.options)  # fmt: skip
        super().__init__(config, config.make_distribution())
        self.case, self.null_label = case, self.distribution.num_classes
        self.objective = method.make(self.model, self.null_label)
        self.optimizer.param_groups[0]["betas"] = (0.95, case.beta2)

    def batch(self, step: int) -> toy.Batch:
        """Return the data of a step."""
        source = generator_of(self.config.seed, step)
        return guide(super().batch(step), self.case, self.model, self.null_label, source)

    def follow(self) -> Tensor:
        """Train to the end, or until a number is not finite; returns the jump's loss and the gradient's norm [N, 2]."""
        rows = []
        while self.step < self.config.steps:
            try:
                losses = self.train_step()
            except FloatingPointError:
                break
            rows.append([float(losses[0]), self.gradient_norm])
        return torch.tensor(rows)

    def quality(self, reference: Reference) -> dict[str, float]:
        """Measure the paired RMSE by the number of steps."""
        found = {n: paired_errors(self.evaluated, reference, n)[1].square().mean().sqrt() for n in NFES}
        return {str(n): float(value) for n, value in found.items()}


class Digits:
    """The same on the digits."""

    def __init__(self, case: Case, seed: int, steps: int, batch_size: int):
        method = METHODS[case.method]
        self.config = Config(
            w=W, steps=steps, batch_size=batch_size, optimizer="adamw", lr=2e-3, clip=0.0, seed=seed,
            beta2=case.beta2, target_ema=method.target_ema, **method.options,
        )  # fmt: skip
        self.case, self.batches = case, batches.Batches(self.config, load_data(self.config))
        self.training = Training(self.config, World())
        self.training.objective = method.make(self.training.model, self.config.classes)

    def follow(self) -> Tensor:
        """Train, see Moons.follow."""
        rows = []
        for step in range(self.config.steps):
            source = generator_of(self.config.seed, step)
            batch = guide(self.batches[step], self.case, self.training.model, self.config.classes, source)
            try:
                metrics = self.training.train_step(batch)
            except FloatingPointError:
                break
            rows.append([metrics.losses[0], metrics.gradient_norm])
        return torch.tensor(rows)

    def quality(self, reference: Reference | None) -> dict[str, float]:
        """Measure the Frechet distance by the number of steps."""
        generator = Generator(self.training.ema.module, self.config, w=W)
        return {str(n): scores["frechet"] for n, scores in measure_model(generator, NFES, digit_metrics()).items()}


def steadiness(rows: Tensor) -> dict[str, float]:
    """Summarise losses and norms [N, 2] of a training in its second half, as the table's columns have it."""
    loss, norm = rows[len(rows) // 2 :].double().T
    median = norm.median()
    return {
        "norm": float(median),
        "q99": float(norm.quantile(0.99) / median),
        "max": float(norm.max() / median),
        "loss q99": float(loss.quantile(0.99) / loss.median()),
    }


def table(report: Mapping[str, Any]) -> str:
    """Format the medians over seeds, and ranges, of each case."""
    columns = ("norm", "q99", "max", "loss q99", *map(str, NFES))
    heads = ("norm", "99 %", "largest", "loss 99 %", *(f"NFE {n}" for n in NFES))
    lines = [f"{'method:guidance':<27}" + "".join(f"{head:^20}" for head in heads)]
    for case, runs in report["cases"].items():
        cells = []
        for column in columns:
            values = sorted(r["found"][column] for r in runs if r["found"])
            text = f"{statistics.median(values):.3g} ({values[0]:.3g}-{values[-1]:.3g})" if values else "diverged"
            cells.append(f"{text:^20}")
        lines.append(f"{case:<27}{''.join(cells)}")
    return "\n".join(lines)


def parser() -> OneLineParser:
    """Build the command line."""
    p = OneLineParser("python -m imagenet.experiments.random_guidance", __doc__)
    p.add_argument("--data", choices=("moons", "digits"), default="moons", help="data to learn")
    p.add_argument("--cases", nargs="+", default=CASES, help="method:guidance, or method:guidance:0.999")
    p.add_argument("--steps", type=int, default=300, help="number of steps of each training")
    p.add_argument("--batch-size", type=int, default=128, help="number of samples per step")
    p.add_argument("--seeds", type=int, default=3, help="number of seeds per case")
    p.add_argument("--out", type=Path, help="folder to write (default: runs/imagenet/random-guidance-DATA)")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    command = parser()
    o = command.parse_args(argv)
    use_one_thread()
    with command.errors(), user_files():
        require_at_least(1, seeds=o.seeds, batch_size=o.batch_size)
        require_at_least(4, steps=o.steps)
        cases = {text: Case.read(text) for text in o.cases}
        out = o.out or Path(f"runs/imagenet/random-guidance-{o.data}")
        require_free(out, ["results.json"], "measurements")
        out.mkdir(parents=True, exist_ok=True)
    with command.errors(f"{out} holds the trainings that were finished"):
        moons = o.data == "moons"
        reference = make_reference(ToyConfig().make_distribution(), w=W, points=POINTS) if moons else None
        sizes = {"data": o.data, "steps": o.steps, "batch_size": o.batch_size}
        report: dict[str, Any] = sizes | {"cases": {text: [] for text in cases}}
        runs = [(text, seed) for seed in range(o.seeds) for text in cases]
        for text, seed in progress(runs, unit="run", desc="training"):
            kind: Any = Moons if moons else Digits
            training = kind(cases[text], seed, o.steps, o.batch_size)
            rows = training.follow()
            quality = training.quality(reference) if len(rows) == o.steps else {}
            found = steadiness(rows) | quality if quality else {}
            norms = [float(f"{float(part.max()):.3g}") for part in rows[:, 1].split(EVERY)]
            report["cases"][text].append({"seed": seed, "norms": norms, "found": found})
            write_atomically(out / "results.json", json.dumps(report) + "\n")
    print(f"{table(report)}\n{out}")
    return 0


if __name__ == "__main__":
    run(main)
