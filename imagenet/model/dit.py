"""The semi-Lipschitz DiT (paper, sec. 4, appendices B and F.1): a diffusion transformer of Lipschitz-controlled layers.

The DiT of Peebles and Xie (2023), conditioned on t, t - s, beta = 1/w and a label. Terminal Velocity Matching needs a
network that is Lipschitz in its inputs, so

- RMSNorm without parameters replaces LayerNorm (appendix B.1), and RMSNorm with a gain normalises queries and keys;
- each modulation vector passes through an RMSNorm (eq. 16);
- every linear layer starts with a largest singular value of 1, except modulation and output, which start at zero, and,
  in some presets, the embeddings of times and beta (see initialise.py).

Names in the state dict are those of the released weights, in which s_embedder embeds t - s.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from imagenet.model.initialise import initialise
from jvp_attention import attention
from tvm_ref import Condition, Linear
from tvm_ref.flow_map import jvp
from tvm_ref.shapes import Sample, Time

EPS = 1e-6  # inside the square root of every norm
FREQUENCIES = 128  # in the embedding of a scalar, each as a cosine and a sine

Tokens = Float[Tensor, "b n d"]
PerHead = Float[Tensor, "b h n d"]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # queries, keys, values [B, H, N, D] to [B, H, N, D]


@dataclass(frozen=True)
class DiTConfig:
    """The sizes of a DiT, and its norms and initial weights.

    The last four fields default to the paper's choices; other values are for its ablation (fig. 4) and table 6.

    Raises:
        ValueError: sizes below 1 or that do not fit together, or an unknown time_init or block_norm.
    """

    input_size: int = 32  # side of x [B, in_channels, input_size, input_size]
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    heads: int = 18
    classes: int = 1000  # label `classes` is the null label
    time_init: Literal["normal", "spectral"] = "normal"  # initial embeddings of t, t - s and beta (table 6)
    block_norm: Literal["rms", "layer"] = "rms"
    qk_norm: bool = True
    modulation_norm: bool = True

    def __post_init__(self) -> None:
        for name in ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "heads", "classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.input_size % self.patch_size:
            raise ValueError(f"patch_size {self.patch_size} does not divide input_size {self.input_size}")
        if self.hidden_size % self.heads:
            raise ValueError(f"heads {self.heads} does not divide hidden_size {self.hidden_size}")
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size must be a multiple of 4 for its 2D positions, got {self.hidden_size}")
        if self.time_init not in ("normal", "spectral") or self.block_norm not in ("rms", "layer"):
            raise ValueError("time_init is normal or spectral, block_norm rms or layer")


def plain_attention(q: PerHead, k: PerHead, v: PerHead) -> PerHead:
    """Return softmax(q k^T / sqrt(D)) v [B, H, N, D] as written: on any device, with every derivative and JVP."""
    return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1) @ v


ATTENTION: dict[str, Attend] = {"plain": plain_attention, "fused": attention}


def rms_norm(x: Float[Tensor, "*d"]) -> Float[Tensor, "*d"]:
    """Normalise without a gain: x / sqrt(mean(x^2) + eps) over the last axis, in at least float32 (eq. 66)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


def layer_norm(x: Float[Tensor, "*d"]) -> Float[Tensor, "*d"]:
    """Apply LayerNorm without parameters over the last axis: the ablation of fig. 4.

    Written out, because the gradient of F.layer_norm is wrong where it goes through a JVP (outside jvp_ready).
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return rms_norm(wide - wide.mean(-1, keepdim=True)).to(x.dtype)  # the RMS of centred x is its standard deviation


def modulate(x: Tokens, shift: Float[Tensor, "b 1 d"], scale: Float[Tensor, "b 1 d"]) -> Tokens:
    """Scale and shift tokens: x (1 + scale) + shift [B, N, D]."""
    return x * (1 + scale) + shift


def embed_scalar(a: Time) -> Float[Tensor, "b 256"]:
    """Return cos(f_k a) and sin(f_k a) [B, 256] in float64, with f_k = 10000^(-k/128) and a in [0, 1]."""
    frequencies = torch.exp(-math.log(1e4) / FREQUENCIES * torch.arange(FREQUENCIES, device=a.device).double())
    angles = a.double()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def embed_positions(side: int, width: int) -> Float[Tensor, "1 n d"]:
    """Embed the cells of a side x side grid, row by row, [1, side^2, width]: first their column, then their row."""
    frequencies = 1e4 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side).double()[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=-1)  # [side, width / 2]
    column, row = line.expand(side, -1, -1), line[:, None].expand(-1, side, -1)
    return torch.cat([column, row], dim=-1).flatten(0, 1)[None].float()


class RMSNorm(nn.Module):
    """rms_norm with a gain, for queries and keys."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: PerHead) -> PerHead:
        """Normalise the last axis."""
        return rms_norm(x) * self.weight.to(x.dtype)


class PatchEmbedding(nn.Module):
    """Embed each patch of x as a token, by a linear layer whose weights are stored as those of a convolution."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        p = config.patch_size
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, p, stride=p)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Tokens:
        """Embed x as tokens [B, N, D] in row order."""
        p = self.proj.kernel_size[0]  # as one matmul: on a CPU the convolution takes longer, for small images tenfold
        patches = x.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)  # [B, N, C p p]
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class ScalarEmbedding(nn.Module):
    """Embed a time or beta: cosines and sines, then an MLP of two layers."""

    def __init__(self, size: int):
        super().__init__()
        self.mlp = nn.Sequential(Linear(2 * FREQUENCIES, size), nn.SiLU(), Linear(size, size))

    def forward(self, a: Time) -> Float[Tensor, "b d"]:
        """Embed a [B] as vectors [B, D]."""
        return self.mlp(embed_scalar(a).to(next(self.parameters()).dtype))


class LabelEmbedding(nn.Module):
    """A vector per class, and one for no class."""

    def __init__(self, classes: int, size: int):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, size)

    def forward(self, label: Tensor) -> Float[Tensor, "b d"]:
        """Embed labels [B] as vectors [B, D]."""
        return self.embedding_table(label)


class Modulation(nn.Sequential):
    """Map the conditioning vector c [B, D] to shifts, scales and gates [B, 1, D], each normalised alone (eq. 16)."""

    def __init__(self, config: DiTConfig, vectors: int):
        super().__init__(nn.SiLU(), Linear(config.hidden_size, vectors * config.hidden_size))
        self.vectors = vectors
        self.normalised = config.modulation_norm

    def forward(self, c: Float[Tensor, "b d"]) -> tuple[Tensor, ...]:
        """Return the vectors, [B, 1, D] each, in the order in which the weight stacks them."""
        m = super().forward(c).unflatten(-1, (self.vectors, 1, -1))  # [B, vectors, 1, D]
        # eq. 16: each vector through an RMSNorm of its own, which bounds it whatever the condition
        return (rms_norm(m) if self.normalised else m).unbind(1)


class SelfAttention(nn.Module):
    """Multi-head self-attention with normalised queries and keys."""

    def __init__(self, config: DiTConfig, attention: Attend):
        super().__init__()
        size = config.hidden_size
        self.heads = config.heads
        self.attention = attention
        self.qkv = Linear(size, 3 * size)
        self.q_norm, self.k_norm = (
            RMSNorm(size // config.heads) if config.qk_norm else nn.Identity() for _ in range(2)
        )
        self.proj = Linear(size, size)

    def forward(self, x: Tokens) -> Tokens:
        """Attend from every token [B, N, D] to all."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, H, N, D / H]
        q, k = self.q_norm(q), self.k_norm(k)  # RMSNorm per head (eq. 66), which bounds their products
        return self.proj(self.attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """The MLP of a block: two layers, applied to each token."""

    def __init__(self, size: int):
        super().__init__()
        self.fc1 = Linear(size, 4 * size)
        self.fc2 = Linear(4 * size, size)

    def forward(self, x: Tokens) -> Tokens:
        """Apply both layers to tokens [B, N, D]."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """A residual block: attention, then MLP, each on a normalised, modulated input and behind a gate."""

    def __init__(self, config: DiTConfig, attention: Attend):
        super().__init__()
        self.norm = rms_norm if config.block_norm == "rms" else layer_norm
        self.attn = SelfAttention(config, attention)
        self.mlp = MLP(config.hidden_size)
        self.adaLN_modulation = Modulation(config, 6)

    def forward(self, x: Tokens, c: Float[Tensor, "b d"]) -> Tokens:
        """Apply the block to tokens x [B, N, D], modulated by c [B, D]."""
        # six normalised vectors (eq. 16); at initialisation all are zero, so the block is the identity
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c)
        # RMSNorm, which is Lipschitz, instead of LayerNorm (appendix B.1, eq. 66)
        x = x + gate_a * self.attn(modulate(self.norm(x), shift_a, scale_a))
        return x + gate_m * self.mlp(modulate(self.norm(x), shift_m, scale_m))


class FinalLayer(nn.Module):
    """Map each token to the values of its patch."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.norm = rms_norm if config.block_norm == "rms" else layer_norm
        self.linear = Linear(config.hidden_size, config.patch_size**2 * config.in_channels)
        self.adaLN_modulation = Modulation(config, 2)

    def forward(self, x: Tokens, c: Float[Tensor, "b d"]) -> Float[Tensor, "b n p"]:
        """Map tokens x [B, N, D] to patches [B, N, p p C], modulated by c [B, D]."""
        shift, scale = self.adaLN_modulation(c)  # also normalised (eq. 16)
        return self.linear(modulate(self.norm(x), shift, scale))


class DiT(nn.Module):
    """The network F(x, t, s, condition) for images or latents x [B, C, H, W].

    Args:
        config: sizes, norms and initial weights.
        attention: maps queries, keys and values [B, H, N, D] to outputs [B, H, N, D]; see ATTENTION.
        checkpointing: keep only each block's input and recompute the rest in the backward: less memory, more time.
    """

    pos_embed: Tensor

    def __init__(self, config: DiTConfig, attention: Attend = plain_attention, *, checkpointing: bool = False):
        super().__init__()
        self.config = config
        self.checkpointing = checkpointing
        size = config.hidden_size
        self.x_embedder = PatchEmbedding(config)
        self.t_embedder = ScalarEmbedding(size)
        self.s_embedder = ScalarEmbedding(size)
        self.guidance_embedder = ScalarEmbedding(size)
        self.y_embedder = LabelEmbedding(config.classes, size)
        self.register_buffer("pos_embed", embed_positions(config.input_size // config.patch_size, size))
        self.blocks = nn.ModuleList(Block(config, attention) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        initialise(self, config.time_init)

    def forward(self, x: Sample, t: Time, s: Time, condition: Condition | None = None) -> Sample:
        """Return F [B, C, H, W] at x [B, C, H, W], times t and s [B], and a condition; None is no class and w = 1."""
        label = torch.full_like(t, self.config.classes, dtype=torch.long) if condition is None else condition.label
        beta = torch.ones_like(t) if condition is None else condition.beta
        # in the JVP in s only t - s has a tangent; the other embeddings are constants, and so are added first
        c = self.s_embedder(t - s) + (self.t_embedder(t) + self.guidance_embedder(beta) + self.y_embedder(label))
        tokens = self.x_embedder(x) + self.pos_embed  # [B, N, D]
        for block in self.blocks:
            tokens = recomputed(block, tokens, c) if self.checkpointing else block(tokens, c)
        return self._image(self.final_layer(tokens, c)).to(x.dtype)

    def _image(self, patches: Tokens) -> Float[Tensor, "b c h w"]:
        """Assemble patches [B, N, p p C] into images [B, C, H, W]."""
        p, side = self.config.patch_size, self.config.input_size // self.config.patch_size
        grid = patches.unflatten(-1, (p, p, -1)).unflatten(1, (side, side))  # [B, row, column, p, p, C]
        return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def recomputed(block: nn.Module, x: Tokens, c: Float[Tensor, "b d"]) -> Tokens:
    """Compute block(x, c) [B, N, D] by activation checkpointing: the backward recomputes what it needs.

    torch.utils.checkpoint ignores tangents, so inside a JVP the JVP of the block is checkpointed instead.
    """
    (x, dx), (c, dc) = forward_ad.unpack_dual(x), forward_ad.unpack_dual(c)
    if dx is None and dc is None:  # an ordinary forward
        return checkpoint(block, x, c, use_reentrant=False, preserve_rng_state=False)
    tangents = tuple(torch.zeros_like(a) if da is None else da for a, da in ((x, dx), (c, dc)))
    # value and tangent are two ordinary outputs to checkpoint, which has gradients for both
    y, dy = checkpoint(jvp, block, (x, c), tangents, use_reentrant=False, preserve_rng_state=False)
    return forward_ad.make_dual(y, dy)
