"""One step of training (paper, algorithm 1), and the state from which training resumes bit for bit."""

import contextlib
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from imagenet.config import Config, build_model
from imagenet.data.batches import Batch
from imagenet.model import parallelize
from imagenet.model.distributed import World
from tvm_ref import EMA, FlowMap
from tvm_ref.objectives import TERMS


class StepMetrics(NamedTuple):
    """The metrics of one step, averaged over all processes.

    Attributes:
        losses: mean of each of TERMS over the batch.
        gradient_norm: norm of the gradient of the mean loss, before clipping.
    """

    losses: tuple[float, float]
    gradient_norm: float


def learning_rate(config: Config, step: int) -> float:
    """Return the rate of a step (from 0): linear warm-up, times 1 or a cosine that is zero one step after the last."""
    warmup = min(1.0, (step + 1) / (config.warmup + 1))
    decay = 0.5 * (1 + math.cos(math.pi * step / config.steps)) if config.schedule == "cosine" else 1.0
    return config.lr * warmup * decay


def make_optimizer(config: Config, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Build SOAP or AdamW, without weight decay."""
    if config.optimizer == "soap":
        from pytorch_optimizer import SOAP

        return SOAP(parameters, config.lr, (0.95, config.beta2), weight_decay=0, precondition_frequency=10)
    return torch.optim.AdamW(parameters, config.lr, (0.9, config.beta2), weight_decay=0, fused=True)


class Training:
    """A model in training: its weights, their two EMAs, the optimizer and the number of steps taken.

    Attributes:
        model: the weights theta.
        weight: the learned weight of the loss; without the setting learned_weight a module without parameters.
        target: EMA theta* of the model's weights, the target of the loss.
        ema: slower EMA theta**, the weights to evaluate and sample from.
        step: number of steps taken.
    """

    def __init__(self, config: Config, world: World):
        self.config, self.world = config, world
        torch.manual_seed(config.seed)
        self.model: FlowMap = build_model(config).to(world.device)
        self.target = EMA(self.model, config.target_ema)
        self.ema = EMA(self.model, config.ema)
        objective = config.make_objective(self.model).to(world.device)
        self.weight = objective.learned_weight
        self._set_progress = objective.set_progress  # kept here, because DDP hides methods of what it wraps
        if config.compile:
            objective.compile(dynamic=False)
        self.objective = parallelize.wrap(objective, [self.target, self.ema], world, config.parallel)
        self._parameters = [*self.model.parameters(), *self.weight.parameters()]
        self.optimizer = make_optimizer(config, self._parameters)
        self.step = 0

    def train_step(self, batch: Batch) -> StepMetrics:
        """Take one step of algorithm 1 on this process's part of the batch.

        Raises:
            FloatingPointError: in every process, if a loss or gradient is NaN or infinite in any; the weights are
                still those before the step.
        """
        config, device = self.config, self.world.device
        n = len(batch.x0) // config.accumulate
        losses = torch.zeros(len(TERMS), device=device)
        self._set_progress(self.step / config.steps)  # for objectives with a curriculum
        self.optimizer.zero_grad()
        for i in range(config.accumulate):  # micro-batches; their gradients add up to the batch's
            # data x0 and noise x1 [n, C, H, W], times t, s, s' [n], condition (label, beta) [n], all drawn by Batches
            x0, x1, times, condition = batch.slice(i * n, (i + 1) * n).to(device)
            # gradients are averaged over processes once, in the last backward
            last = i == config.accumulate - 1
            with contextlib.nullcontext() if last else parallelize.no_sync(self.objective):
                with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
                    # TVM: both terms of eq. 15 for each sample; the target theta* gives u*, without gradients (eq. 12)
                    terms = self.objective(x0, x1, times, condition, self.target.module)
                # the expectation over samples and times is the mean of the batch
                (terms.total.mean() / config.accumulate).backward()
            losses += torch.stack([getattr(terms, name).detach().mean() for name in TERMS]) / config.accumulate
        norm = self._clip()
        metrics = self._gather_metrics(losses, norm)  # NaN in any process raises here, before the weights change
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step)
        self.optimizer.step()  # theta
        self.target.update(self.model)  # theta*, the target of the loss: a fast EMA
        self.ema.update(self.model)  # theta**, the weights to sample from: a slow EMA
        self.step += 1
        return metrics

    def _clip(self) -> Tensor:
        """Clip the gradient to a norm of at most config.clip (0: no limit), and return its norm before."""
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self.config.clip or float("inf"), foreach=True)
        return parallelize.full_tensor(norm)

    def _gather_metrics(self, losses: Tensor, norm: Tensor) -> StepMetrics:
        """Average losses [len(TERMS)] and the gradient's norm [] over all processes.

        Raises:
            FloatingPointError: in every process, if any has a loss or norm that is NaN or infinite.
        """
        rows = self.world.all_gather([*losses.tolist(), float(norm)])
        for name, column in zip((*(f"{name} loss" for name in TERMS), "gradient"), rows.T, strict=True):
            bad = (~torch.isfinite(column)).nonzero().flatten().tolist()
            if bad:
                ranks = f"rank{'s' * (len(bad) > 1)} {', '.join(map(str, bad))}"
                raise FloatingPointError(f"step {self.step}: the {name} is NaN or infinite on {ranks}")
        jump, flow_matching, gradient_norm = rows.mean(0).tolist()
        return StepMetrics((jump, flow_matching), gradient_norm)

    def load_initial(self, weights: dict[str, Tensor]) -> None:
        """Load weights, the state dict of a FlowMap, into the model and both EMAs."""
        for model in (self.model, self.target.module, self.ema.module):
            model.load_state_dict(parallelize.reshard(weights, model.state_dict()))

    def state_dict(self) -> dict[str, Any]:
        """Return all that a checkpoint needs: the training's own tensors, not copies, sharded as they are."""
        return {
            "model": self.model.state_dict(),
            "weight": self.weight.state_dict(),
            "target": self.target.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }

    def slot(self, name: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return the tensor to read a checkpoint's entry into: a weight itself, or a new one for the optimizer.

        Args:
            name: the entry's path in state_dict, joined by "/".
            size: the entry's shape.
            dtype: the entry's dtype.

        Raises:
            KeyError: this training has no such tensor.
        """
        kind, *path = name.split("/")
        if kind == "optimizer":
            like = self._parameters[int(path[1])]
            return torch.empty_like(like, dtype=dtype) if like.shape == size else torch.empty(size, dtype=dtype)
        modules = {"model": self.model, "weight": self.weight, "target": self.target.module, "ema": self.ema.module}
        weights: dict[str, Tensor] = modules[kind].state_dict()
        return weights[path[-1]]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state_dict whose tensors are sharded as this training's own are (see slot)."""
        self.model.load_state_dict(state["model"])
        self.weight.load_state_dict(state["weight"])
        self.target.load_state_dict(state["target"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
