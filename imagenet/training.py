"""One step of training (paper, algorithm 1) on one screen, and the state that continues it bit for bit."""

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from imagenet import parallel
from imagenet.data import Batch
from imagenet.parallel import World
from imagenet.presets import Config, build_model
from tvm_ref import EMA, OBJECTIVES, FlowMap
from tvm_ref.objectives import TERMS
from tvm_ref.sampling import Jump, stepper


@dataclass(frozen=True)
class Step:
    """What a step tells.

    Attributes:
        losses: mean of each of TERMS over all processes.
        gradient_norm: before clipping.
        asked_to_stop: whether any process was.
    """

    losses: tuple[float, float]
    gradient_norm: float
    asked_to_stop: bool


def learning_rate(config: Config, step: int) -> float:
    """Linear warm-up, then constant, or a cosine that reaches zero at the last step."""
    warmup = min(1.0, (step + 1) / (config.warmup + 1))
    decay = 0.5 * (1 + math.cos(math.pi * step / config.steps)) if config.schedule == "cosine" else 1.0
    return config.lr * warmup * decay


def make_optimizer(config: Config, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer, without weight decay."""
    if config.optimizer == "soap":
        from pytorch_optimizer import SOAP

        return SOAP(parameters, config.lr, (0.95, config.beta2), weight_decay=0, precondition_frequency=10)
    return torch.optim.AdamW(parameters, config.lr, (0.9, config.beta2), weight_decay=0, fused=True)


class Training:
    """A model being trained: weights, target EMA, evaluation EMA, optimizer, and how far it has come."""

    def __init__(self, config: Config, world: World):
        self.config, self.world = config, world
        torch.manual_seed(config.seed)
        self.model: FlowMap = build_model(config).to(world.device)
        self.target = EMA(self.model, config.target_ema)
        self.ema = EMA(self.model, config.ema)
        null_label = config.classes if config.guided else None
        options: dict[str, Any] = {"detach_jvp": True} if config.detach_jvp else {}
        objective = OBJECTIVES[config.objective](self.model, null_label=null_label, **options)
        if config.compile:
            objective.compile(dynamic=False)
        self.objective = parallel.wrap(objective, [self.target, self.ema], world, config.parallel)
        self._parameters = list(self.model.parameters())
        self.optimizer = make_optimizer(config, self._parameters)
        self.step = 0

    def train_step(self, batch: Batch, *, stop: bool = False) -> Step:
        """Train on this process's part of a step's batch; `stop`: this process was asked to stop.

        Raises:
            FloatingPointError: in every process, if a loss or gradient of any is NaN or infinite; the weights are those
                before the step.
        """
        config, n = self.config, len(batch.x0) // self.config.accumulate
        losses = torch.zeros(2, device=self.world.device)
        self.optimizer.zero_grad()
        for i in range(config.accumulate):
            part = batch.cut(i * n, (i + 1) * n).to(self.world.device)
            last = i == config.accumulate - 1
            with contextlib.nullcontext() if last else parallel.unsynchronised(self.objective):
                with torch.autocast(self.world.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
                    terms = self.objective(part.x0, part.x1, part.times, part.condition, self.target.module)
                (terms.total.mean() / config.accumulate).backward()
            losses += torch.stack([getattr(terms, name).detach().mean() for name in TERMS]) / config.accumulate
        norm = self._clip()
        told = self._share(losses, norm, stop)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step)
        self.optimizer.step()
        self.target.update(self.model)
        self.ema.update(self.model)
        self.step += 1
        return told

    def _clip(self) -> Tensor:
        """Clip the gradient's norm, and return what it was."""
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self.config.clip or float("inf"), foreach=True)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _share(self, losses: Tensor, norm: Tensor, stop: bool) -> Step:
        """What all processes must know before the weights move."""
        rows = self.world.gather([*losses.tolist(), float(norm), float(stop)])
        for name, column in zip((*(f"{name} loss" for name in TERMS), "gradient"), rows.T, strict=False):
            bad = (~torch.isfinite(column)).nonzero().flatten().tolist()
            if bad:
                ranks = f"rank{'s' * (len(bad) > 1)} {', '.join(map(str, bad))}"
                raise FloatingPointError(f"step {self.step}: the {name} is NaN or infinite on {ranks}")
        flow_map, flow_matching, gradient_norm, stops = rows.mean(0).tolist()
        return Step((flow_map, flow_matching), gradient_norm, stops > 0)

    def evaluated(self) -> Jump:
        """How the evaluation weights take a step: a jump, or, as flow matching learns none, Euler's."""
        return stepper(self.ema.module, self.config.objective)

    def state_dict(self) -> dict[str, Any]:
        """Everything that continues this training, whole and on the CPU. All processes take part."""
        return {
            "model": parallel.whole(self.model.state_dict()),
            "target": parallel.whole(self.target.state_dict()),
            "ema": parallel.whole(self.ema.state_dict()),
            "optimizer": parallel.whole(self.optimizer.state_dict()),
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what state_dict gave, on any number of processes."""
        self.model.load_state_dict(parallel.spread(state["model"], self.model.state_dict()))
        self.target.load_state_dict(parallel.spread(state["target"], self.target.state_dict()))
        self.ema.load_state_dict(parallel.spread(state["ema"], self.ema.state_dict()))
        self.optimizer.load_state_dict(parallel.spread_optimizer(state["optimizer"], self.optimizer))
        self.step = state["step"]
