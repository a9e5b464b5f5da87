"""The configuration of a run, one frozen dataclass with a description of each field, and the presets."""

import argparse
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from imagenet.model.dit import ATTENTION, DiT, DiTConfig
from tvm_ref import OBJECTIVES, TIME_SAMPLERS, FlowMap, TimeSampler
from tvm_ref.cli.errors import UserError, require, user_errors
from tvm_ref.cli.options import check_types, flag, option, read_settings, require_at_least
from tvm_ref.objectives import Objective

FORMAT = 1  # of stored configurations: raise it when a field changes its meaning or is removed
LABEL_DROPOUT = 0.1  # fraction of labels replaced by "no class" (sec. 3)
OF_DATA = ("data", "in_channels", "classes")  # decided by the preset and the data, not by options
# sizes that no machine can hold, so that a bad file is refused before its network is built
LARGEST = {
    "input_size": 2**12, "in_channels": 2**12, "patch_size": 2**12, "classes": 2**24,
    "hidden_size": 2**16, "depth": 2**8, "heads": 2**12,
}  # fmt: skip
SWITCH = {"action": argparse.BooleanOptionalAction}  # off by default, but a stored run may have it on


@dataclass(frozen=True)
class Config:
    """All that decides a run; stored as JSON in its folder and with its weights. The defaults are the preset `digits`.

    A new field needs a default that leaves earlier runs unchanged: they are read with it.

    Raises:
        ValueError: a bad value, named by its option.
    """

    # Data
    data: Literal["digits", "fashion", "cifar10", "folder", "latents", "synthetic"] = option("digits", "data to learn")
    input_size: int = option(8, "side of the images or latents; pictures of a folder are resized to it")
    in_channels: int = option(1, "channels of the images or latents")
    classes: int = option(10, "number of classes of the data")
    flip: bool = option(False, "mirror half of a folder's pictures, others at each visit (cifar10: always)")
    # Network
    patch_size: int = option(4, "side of the square patch that becomes a token")
    hidden_size: int = option(64, "width of a token (S 384, B 768, L 1024, XL 1152)")
    depth: int = option(4, "number of blocks (S 12, B 12, L 24, XL 28)")
    heads: int = option(2, "number of attention heads (S 6, B 12, L 16, XL 18)")
    time_init: Literal["normal", "spectral"] = option(
        "normal", "initial weights of the embeddings of times and beta (table 6)"
    )
    norms: Literal["all", "no-block", "no-qk", "no-modulation", "none"] = option(
        "all", "norms of blocks, of queries and keys, of modulations (eq. 16): all, or some left out (ablation, fig. 4)"
    )
    scaled: bool = option(True, "scaled parameterisation f = (s - t) w F (sec. 4)")
    # Objective
    objective: str = option("tvm", "what to minimise: TVM or a related method", choices=OBJECTIVES)
    settings: Mapping[str, Any] = option(
        {}, "the objective's own settings, such as power=0 or stops=none (tvm_ref/objectives/README.md)"
    )
    w: float = option(1.0, "classifier-free guidance weight to learn (eq. 15); 1: no guidance")
    w_max: float | None = option(None, "draw beta = 1/w between 1/w_max and 1/w (F.1); default: only w")
    time_sampler: str = option(
        "own", "how times are drawn (sec. 7.3); own: as in the objective's paper, gap* in TVM",
        choices=("own", *TIME_SAMPLERS),
    )  # fmt: skip
    noise_share: float = option(
        0.0, "fraction of samples with t = 1, where one-step sampling starts (not in the paper)"
    )
    equal_share: float | None = option(
        None, "fraction of samples with t = s, table 4d (default: the objective's own; 0 in TVM)"
    )
    # Optimisation
    init: str | None = option(None, "start from these weights: a .safetensors file or a run's folder (default: new)")
    steps: int = option(1000, "training steps")
    batch_size: int = option(128, "samples per step, summed over processes")
    optimizer: Literal["adamw", "soap"] = option(
        "soap", "AdamW as in the paper; SOAP (Adam in a basis learned from gradients) learns digits faster"
    )
    lr: float = option(1e-2, "peak learning rate")
    beta2: float = option(0.95, "decay of the second moment: 0.95 keeps TVM steady (sec. 4)")
    warmup: int = option(50, "steps of linear warm-up (the paper: none)")
    schedule: Literal["constant", "cosine"] = option("cosine", "learning rate after warm-up (the paper: constant)")
    clip: float = option(1.0, "largest norm of the gradient; 0: no clipping, as in the paper")
    target_ema: float = option(0.99, "decay of the target's weights theta* (table 4b)")
    ema: float = option(0.99, "decay of the evaluated weights theta** (the paper: 0.9999)")
    seed: int = option(0, "seed of initial weights, order of the data, noise and times")
    # How to compute it: --resume may change these
    precision: Literal["float32", "bfloat16"] = option(
        "float32", "data type of matmuls; weights stay float32", resume=True
    )
    attention: str = option(
        "plain", "plain: any device; fused: one kernel for value and tangent", choices=ATTENTION, resume=True
    )
    compile: bool = option(False, "torch.compile the loss", resume=True, **SWITCH)
    checkpointing: bool = option(
        False, "keep only each block's input for the backward: less memory, a third more time", resume=True, **SWITCH
    )
    parallel: Literal["ddp", "fsdp"] = option(
        "ddp", "ddp: a copy per process; fsdp: weights sharded over processes", resume=True
    )
    accumulate: int = option(1, "number of micro-batches per step and process; more need less memory", resume=True)

    def __post_init__(self) -> None:
        check_types(self)
        for name, value in dataclasses.asdict(self).items():
            largest = LARGEST.get(name, 2**63 - 1)
            require(not isinstance(value, int) or abs(value) <= largest, f"{flag(name)} must be at most {largest}")
        require_at_least(1, **{k: getattr(self, k) for k in ("steps", "batch_size", "accumulate")})
        require_at_least(0, warmup=self.warmup, clip=self.clip, seed=self.seed)
        finite = 0 < self.lr < float("inf") and self.clip < float("inf")
        require(finite, f"--lr must be positive and finite, and --clip finite; got {self.lr} and {self.clip}")
        ordered = 0 < self.w <= (self.w if self.w_max is None else self.w_max) < float("inf")
        require(ordered, f"--w must be positive and at most --w-max, got {self.w} and {self.w_max}")
        for name in ("beta2", "target_ema", "ema"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"{flag(name)} must lie in [0, 1], got {value}")
        require(self.beta2 < 1, "--beta2 must be below 1")
        divides = self.batch_size % self.accumulate == 0
        require(divides, f"--accumulate {self.accumulate} does not divide --batch-size {self.batch_size}")
        if self.parallel == "fsdp":
            require(
                self.optimizer != "soap",
                "--optimizer soap does not go with --parallel fsdp, which shards weights",
            )
            require(not self.compile, "--compile has not been tried with --parallel fsdp: choose one")
        kind = OBJECTIVES[self.objective]
        settings = read_settings(f"--settings of --objective {self.objective}", kind, self.settings, ("null_label",))
        object.__setattr__(self, "settings", settings)
        able = kind.has_guidance or not self.guided
        require(able, f"--objective {self.objective} has no guidance here: it goes with --w 1")
        try:
            self.sampler()
            self.network()
            self.make_objective(FlowMap(nn.Module()))
        except ValueError as error:  # sizes, fractions and settings that the method refuses
            raise UserError(str(error)) from error

    @property
    def guided(self) -> bool:
        """True if guidance is learned; the target is then called a second time, without a class."""
        return self.w != 1 or self.w_max is not None

    @property
    def detach_jvp(self) -> bool:
        """True if TVM's gradient through the JVP is stopped (--settings detach_jvp=true)."""
        return bool(self.settings.get("detach_jvp"))

    def network(self) -> DiTConfig:
        """Return the sizes of the network."""
        sizes = {f.name: getattr(self, f.name) for f in dataclasses.fields(DiTConfig) if hasattr(self, f.name)}
        return DiTConfig(
            **sizes,
            block_norm="layer" if self.norms in ("no-block", "none") else "rms",
            qk_norm=self.norms not in ("no-qk", "none"),
            modulation_norm=self.norms not in ("no-modulation", "none"),
        )

    def make_objective(self, model: FlowMap) -> Objective:
        """Build the objective with its settings."""
        null_label = self.classes if self.guided else None
        return OBJECTIVES[self.objective](model, null_label=null_label, **self.settings)

    def sampler(self) -> TimeSampler:
        """Return the sampler of times."""
        times = None if self.time_sampler == "own" else TimeSampler(self.time_sampler)
        return OBJECTIVES[self.objective].make_times(times, self.equal_share, self.noise_share)

    def to_json(self) -> str:
        """Write one JSON object, a key per field, and the version of the format."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=2)

    @staticmethod
    def from_json(text: str) -> "Config":
        """Read the output of to_json, also of an earlier version: missing fields get their defaults.

        Raises:
            UserError: not JSON, a later format, unknown keys, bad values.
        """
        damaged = (ValueError, TypeError, KeyError, AttributeError, RecursionError)
        with user_errors("not a configuration of this program", *damaged):
            stored = json.loads(text)
            require(stored.pop("format") <= FORMAT, "it is of a later version")
            return Config(**stored)


RESUMABLE = tuple(f.name for f in dataclasses.fields(Config) if f.metadata.get("resume"))

# table 6 of the paper, its first column: XL/2 with heads of 64
_IMAGENET256_W2 = Config(
    data="latents", input_size=32, in_channels=4, classes=1000, hidden_size=1152, depth=28, heads=18, patch_size=2,
    time_init="spectral", scaled=True, w=2.0, steps=300_000, batch_size=2048, optimizer="adamw", lr=1e-4, warmup=0,
    schedule="constant", clip=0.0, ema=0.9999, precision="bfloat16", attention="fused",
)  # fmt: skip

PRESETS = {
    "digits": Config(),
    "fashion": replace(
        Config(), data="fashion", input_size=28, hidden_size=128, heads=4, steps=4000, batch_size=64, lr=5e-3,
        warmup=100, ema=0.998,
    ),
    "cifar10": replace(
        Config(), data="cifar10", input_size=32, in_channels=3, hidden_size=384, depth=12, heads=6, patch_size=2,
        w=1.5, steps=200_000, batch_size=256, lr=2e-4, warmup=2000, schedule="cosine", ema=0.9999, optimizer="adamw",
        precision="bfloat16", attention="fused",
    ),
    "folder": replace(
        Config(), data="folder", input_size=32, in_channels=3, classes=1, hidden_size=128, heads=4, steps=5000,
        batch_size=64, lr=5e-3, warmup=100, ema=0.999,
    ),
    "imagenet256-w2": _IMAGENET256_W2,
    "imagenet256-w1.75": replace(_IMAGENET256_W2, w=1.75, time_init="normal"),
    "imagenet512-w2.5": replace(_IMAGENET256_W2, input_size=64, w=2.5, scaled=False, time_init="normal"),
    "imagenet512-w2.25": replace(_IMAGENET256_W2, input_size=64, w=2.25),
    "synthetic": replace(_IMAGENET256_W2, data="synthetic", steps=100),
}  # fmt: skip


def build_model(config: Config, *, attention: str | None = None) -> FlowMap:
    """Build the flow map of a configuration, with new weights.

    Args:
        config: sizes and parameterisation.
        attention: a key of ATTENTION that replaces the configuration's; the weights are the same for all.
    """
    attend = ATTENTION[attention or config.attention]
    return FlowMap(DiT(config.network(), attend, checkpointing=config.checkpointing), scaled=config.scaled)
