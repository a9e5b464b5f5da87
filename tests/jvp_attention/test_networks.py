"""Networks that nobody here wrote, under jvp_ready: value, tangent and every gradient against float64 differences.

The first input is a time, and has the tangent; diffusers' embed it as 1000 t, rounded to float32.
"""

import pytest
import torch
from torch import Tensor, nn

from jvp_attention import jvp_ready
from tests.differences import assert_right, double

T = torch.tensor([0.3, 0.8], dtype=torch.float64)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


class Timed(nn.Module):
    """A network of x alone, at x sin(3 t)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.network(x * (3 * t).sin().view(-1, *(1,) * (x.ndim - 1)))


class Diffuser(nn.Module):
    """One of diffusers' networks, of x, the time and perhaps a label or context."""

    def __init__(self, network: nn.Module, **more: Tensor) -> None:
        super().__init__()
        self.network, self.more = network, more

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.network(x, timestep=t, return_dict=False, **self.more)[0]


def smooth_times(network: nn.Module) -> nn.Module:
    """Let an embedding of times take float64: rounded to float32, differences of values say little."""
    for module in network.modules():
        if type(module).__name__ == "Timesteps":
            half = module.num_channels // 2
            frequencies = torch.exp(-torch.arange(half).double() / half * 3)
            module.forward = lambda t, f=frequencies: torch.cat([(t[:, None] * f).sin(), (t[:, None] * f).cos()], -1)
    return network


def encoder(norm_first: bool, batch_first: bool = True) -> tuple[nn.Module, Tensor]:
    layer = nn.TransformerEncoderLayer(8, 2, 12, 0.0, "gelu", norm_first=norm_first, batch_first=batch_first)
    return Timed(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)), randn(2, 3, 8)


class CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.TransformerDecoderLayer(8, 2, 12, 0.0, "gelu", batch_first=True)
        self.context = nn.Parameter(randn(2, 5, 8))

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return self.decoder(x, self.context, tgt_mask=mask, tgt_is_causal=True)


def unet() -> tuple[nn.Module, Tensor]:
    diffusers = pytest.importorskip("diffusers")
    network = diffusers.UNet2DModel(
        sample_size=8, in_channels=2, out_channels=2, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip
    return Diffuser(smooth_times(network)), randn(2, 2, 4, 4)


def dit() -> tuple[nn.Module, Tensor]:
    diffusers = pytest.importorskip("diffusers")
    network = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=2, out_channels=2, num_layers=2, sample_size=4,
        patch_size=2, num_embeds_ada_norm=5, norm_num_groups=2,
    )  # fmt: skip
    return Diffuser(smooth_times(network).eval(), class_labels=torch.tensor([0, 4])), randn(2, 2, 4, 4)


def pixart() -> tuple[nn.Module, Tensor]:
    """Cross-attention with a padded context, which makes an additive mask."""
    diffusers = pytest.importorskip("diffusers")
    network = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=2, out_channels=2, num_layers=1, sample_size=4,
        patch_size=2, norm_num_groups=2, cross_attention_dim=8, caption_channels=6, use_additional_conditions=False,
    )  # fmt: skip
    seen = torch.tensor([[1.0, 1, 1], [1, 0, 0]], dtype=torch.float64)
    context = {"encoder_hidden_states": randn(2, 3, 6), "encoder_attention_mask": seen}
    added = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    return Diffuser(smooth_times(network).eval(), **context, **added), randn(2, 2, 4, 4)


def vit() -> tuple[nn.Module, Tensor]:
    timm = pytest.importorskip("timm")
    network = timm.models.vision_transformer.VisionTransformer(
        img_size=8, patch_size=4, in_chans=2, num_classes=3, embed_dim=8, depth=2, num_heads=2
    )
    return Timed(network), randn(2, 2, 8, 8)


NETWORKS = {
    "encoder, norm first": lambda: encoder(True),
    "encoder, norm last, length first": lambda: encoder(False, batch_first=False),
    "decoder with masks": lambda: (Timed(CrossAttention()), randn(2, 3, 8)),
    "UNet2DModel": unet,
    "DiTTransformer2DModel": dit,
    "PixArtTransformer2DModel": pixart,
    "timm's VisionTransformer": vit,
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::SyntaxWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_right_unchanged(name):
    network, x = NETWORKS[name]()
    network, t = double(network), T if len(x) == 2 else T[:1]
    assert_right(network, [t, x], parameters=list(network.parameters()), mode=jvp_ready, tolerance=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::SyntaxWarning")
def test_checkpointing_in_diffusers_changes_no_gradient():
    network, x = dit()
    network = double(network)

    def gradients() -> list[Tensor]:
        with jvp_ready():
            y, dy = torch.func.jvp(lambda t: network(t, x), (T,), (torch.ones_like(T),))
        return list(torch.autograd.grad((y.sin() * dy).sum(), list(network.parameters()), allow_unused=True))

    exact = gradients()
    network.network.enable_gradient_checkpointing()
    network.train()
    for found, plain in zip(gradients(), exact, strict=True):
        assert (found is None) == (plain is None)
        if plain is not None:
            torch.testing.assert_close(found, plain)
