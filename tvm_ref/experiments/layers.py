"""Which of PyTorch's layers and functions are right when a gradient goes through a JVP: the table of a page.

python -m tvm_ref.experiments.layers                               print the page
python -m tvm_ref.experiments.layers --out tutorials/site/layers_under_jvp.md
python -m tvm_ref.experiments.layers --also OTHER/bin/python       also with another environment's PyTorch
"""

import json
import subprocess
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tvm_ref.cli.errors import user_errors, user_files
from tvm_ref.cli.files import write_atomically
from tvm_ref.cli.options import OneLineParser, run
from tvm_ref.flow_map import jvp
from tvm_ref.network_check import JVP, measure

TRIED = {  # shape of x: layers, and expressions in x
    (2, 5, 8): """nn.LayerNorm(8); nn.RMSNorm(8); nn.Linear(8, 3); weight_norm(nn.Linear(8, 3));
        spectral_norm(nn.Linear(8, 3)).eval(); nn.RNN(8, 6, batch_first=True); nn.LSTM(8, 6, batch_first=True);
        nn.GRU(8, 6, batch_first=True); nn.MultiheadAttention(8, 2, batch_first=True);
        nn.TransformerEncoderLayer(8, 2, 8, 0.0, "gelu", batch_first=True); torch.softmax(x @ x.mT, -1) @ x""",
    (2, 4, 6, 6): """nn.GroupNorm(2, 4); nn.LocalResponseNorm(2); nn.InstanceNorm2d(4);
        nn.InstanceNorm2d(4, affine=True); nn.BatchNorm2d(4); nn.BatchNorm2d(4).eval();
        nn.BatchNorm2d(4, track_running_stats=False); nn.Conv2d(4, 3, 3); nn.Conv2d(4, 4, 3, groups=2, dilation=2);
        nn.ConvTranspose2d(4, 3, 3, stride=2); nn.AvgPool2d(2); nn.MaxPool2d(2); nn.LPPool2d(2, 2);
        nn.AdaptiveAvgPool2d(2); nn.AdaptiveMaxPool2d(2); nn.PixelShuffle(2); nn.Unfold(2); nn.Flatten();
        nn.ReflectionPad2d(1); nn.ReplicationPad2d(1); nn.CircularPad2d(1); nn.ZeroPad2d(1);
        nn.Upsample(scale_factor=2); nn.Upsample(scale_factor=2, mode="bilinear");
        nn.Upsample(scale_factor=2, mode="bicubic"); F.grid_sample(x, grid, align_corners=False)""",
    (2, 4, 8): """nn.InstanceNorm1d(4); nn.BatchNorm1d(4); nn.Conv1d(4, 3, 3); nn.ConvTranspose1d(4, 3, 3);
        nn.AvgPool1d(2); nn.MaxPool1d(2); torch.view_as_real(torch.fft.rfft(x)); torch.fft.ifft2(x).abs()""",
    (1, 4, 3, 3, 3): """nn.InstanceNorm3d(4); nn.Conv3d(4, 3, 2); nn.ConvTranspose3d(4, 3, 2)""",
    (2, 2, 5, 4): """F.scaled_dot_product_attention(x, x.sin(), x.cos());
        F.scaled_dot_product_attention(x, x, x, mask); F.scaled_dot_product_attention(x, x, x, is_causal=True)""",
    (3, 8): """nn.LSTMCell(8, 6); nn.CELU(); nn.ELU(); nn.GELU(); nn.GLU(); nn.Hardshrink(); nn.Hardsigmoid();
        nn.Hardswish(); nn.Hardtanh(); nn.LeakyReLU(); nn.LogSigmoid(); nn.Mish(); nn.PReLU(); nn.ReLU(); nn.ReLU6();
        nn.SELU(); nn.SiLU(); nn.Sigmoid(); nn.Softplus(); nn.Softshrink(); nn.Softsign(); nn.Tanh(); nn.Tanhshrink();
        nn.Threshold(0.1, 20); nn.Softmax(-1); nn.LogSoftmax(-1); F.cross_entropy(x, torch.tensor([0, 2, 1]))""",
    (4, 4): """F.binary_cross_entropy_with_logits(x, target); F.mse_loss(x, w); F.huber_loss(x, w);
        F.smooth_l1_loss(x, w); F.kl_div(x, target); F.cosine_similarity(x, w); F.normalize(x); F.pdist(x);
        torch.cdist(x, w); x.std(-1); x.var(-1); x.prod(-1); x.norm(dim=-1); x.logsumexp(-1); x.cumprod(-1);
        x.cumsum(-1); x.sort(-1).values; x.topk(2).values; x.median(-1).values; x.amax(-1); x.gather(0, indices);
        x.scatter_add(0, indices, x.sin()); x[[0, 2]]; torch.where(x > 0, x.sin(), x); x.clamp(-1, 1); x.roll(1);
        x.square() ** 1.3; torch.einsum("ij,kj->ik", x, w); x @ w; torch.linalg.solve(regular(x), w);
        torch.linalg.tensorsolve(regular(x), w[0]); torch.linalg.det(regular(x));
        torch.linalg.slogdet(regular(x)).logabsdet; torch.linalg.lstsq(regular(x), w).solution;
        torch.linalg.inv(regular(x)); torch.linalg.solve_triangular(regular(x), w, upper=True);
        torch.linalg.cholesky(positive(x)); torch.cholesky_solve(w, torch.linalg.cholesky(positive(x)));
        torch.linalg.svdvals(x); torch.linalg.matrix_norm(x); torch.linalg.svd(x).S; torch.linalg.pinv(regular(x));
        torch.linalg.matrix_exp(x); torch.linalg.lu(regular(x)).U; torch.linalg.eigvalsh(positive(x));
        torch.linalg.eigh(positive(x))[1].square(); torch.linalg.qr(regular(x)).R""",
}  # fmt: skip
UNARY = (
    "abs acos asin asinh atan atanh cos cosh digamma erf erfc erfinv exp exp2 expm1 lgamma log log10 log1p log2 "
    "logit reciprocal rsqrt sigmoid sin sinc sinh special.i0 sqrt square tan tanh trapezoid"
)
TRIED[4, 4] += "".join(f"; torch.{name}(x.sigmoid())" for name in UNARY.split())


def names_in_expressions() -> dict[str, Any]:
    """Return the names that the expressions use."""
    numbers = torch.linspace(-1, 1, 40, dtype=torch.float64).sin()
    return {
        "torch": torch, "nn": nn, "F": F, "weight_norm": nn.utils.parametrizations.weight_norm,
        "spectral_norm": nn.utils.parametrizations.spectral_norm, "w": numbers[:16].reshape(4, 4),
        "target": numbers[:16].reshape(4, 4).sigmoid(), "indices": torch.arange(16).reshape(4, 4) % 3,
        "mask": numbers[:25].reshape(5, 5), "grid": numbers[:32].reshape(2, 2, 4, 2),
        "regular": lambda A: 0.3 * A + 2 * torch.eye(4, dtype=A.dtype),  # it has an inverse
        "positive": lambda A: 0.1 * A @ A.mT + torch.eye(4, dtype=A.dtype),  # symmetric, with positive eigenvalues
    }  # fmt: skip


def verdict(expression: str, shape: tuple[int, ...], jvp: JVP) -> str:
    """Try one layer or function: right, wrong with its relative error, or refused."""
    torch.manual_seed(0)
    x, dx = torch.randn(2, *shape, dtype=torch.float64)
    names = names_in_expressions()
    layer = eval(expression, names | {"x": x})
    parameters = list(layer.double().parameters()) if isinstance(layer, nn.Module) else []

    def function(x: Tensor) -> Tensor:
        if not isinstance(layer, nn.Module):
            return eval(expression, names | {"x": x})
        y = layer(x, x, x) if isinstance(layer, nn.MultiheadAttention) else layer(x)
        while not isinstance(y, Tensor):
            y = y[0]
        return y

    def loss(y: Tensor, dy: Tensor) -> Tensor:
        return (torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape) * (y + 1).sin() * dy).sum()

    try:
        errors = measure(function, [x], [dx], parameters, loss, jvp)
    except (RuntimeError, NotImplementedError):  # PyTorch's own: there is no derivative
        return "refused"
    return f"wrong ({errors.wrong}, {getattr(errors, errors.wrong):.1g})" if errors.wrong else "right"


def verdicts() -> dict[str, Any]:
    """Try everything, in PyTorch's own rules and in jvp_ready."""
    plain: JVP = torch.func.jvp  # type: ignore[assignment]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {
            " ".join(expression.split()): (
                verdict(expression.strip(), shape, plain),
                verdict(expression.strip(), shape, jvp),
            )
            for shape, expressions in TRIED.items()
            for expression in expressions.split(";")
        }
    return {"torch": torch.__version__.split("+")[0], "found": found}


def page(results: list[dict[str, Any]]) -> str:
    """Write the page."""
    names = list(results[0]["found"])
    versions = [r["torch"] for r in results]

    def of(name: str) -> list[str]:
        return [v for r in results for v in r["found"].get(name, ("-", "-"))]

    odd = [name for name in names if any(v != "right" for v in of(name))]
    head = [f"{v}{mode}" for v in versions for mode in ("", ", jvp_ready")]
    table = "\n".join(f"| `{n}` | {' | '.join(of(n))} |" for n in odd)
    return PAGE.format(
        count=len(names), versions=" and ".join(versions), head=" | ".join(head), rule=" --- |" * len(head),
        table=table, right=", ".join(f"`{n}`" for n in names if n not in odd),
    )  # fmt: skip


PAGE = """# PyTorch's layers when the gradient goes through a JVP

Terminal Velocity Matching, Lagrangian and Eulerian self-distillation and others train *through* a tangent: reverse
mode runs over `torch.func.jvp`. Not all of PyTorch's rules for this are right. Here {count} layers and functions were
tried with PyTorch {versions}: for y, dy = jvp(layer)(x, dx) the gradient of sum(c sin(y + 1) dy) in x and all
parameters, in float64, against differences of values (`tvm_ref.network_check.measure`). "wrong" says what is wrong,
and its relative error in random directions; "refused" means that PyTorch, or the mode, raises.

`with jvp_attention.jvp_ready():` replaces most of them by correct forms; columns with its name say what remains refused
or wrong. `tvm_ref.FlowMap` enters this mode by itself; enter it yourself around your own JVPs. `tvm_ref.check_network`
tests a whole network and names the layers at fault.

## Wrong or refused

| x passes through | {head} |
| --- |{rule}
{table}

Why: the tangent rules of `native_layer_norm` and similar functions read results of the forward, such as mean and scale,
which reverse mode treats as constants. Value and tangent are right, and so are losses that detach the tangent, such as
MeanFlow's. The mode sees calls from Python; it misses calls inside PyTorch's C++ code.

## Right

{right}.

## Products with an absent tangent

A layer's weights have no tangent, yet PyTorch's rule for linear layers and convolutions multiplies by it: 3 products in
a JVP and 8 with its backward, where 2 and 6 suffice. The mode leaves them out (`pytest tests/jvp_attention -k absent`
counts).

This page is written by `python -m tvm_ref.experiments.layers --out tutorials/site/layers_under_jvp.md`; `--also` adds
another environment's PyTorch.
"""


def parser() -> OneLineParser:
    """Make the command line."""
    p = OneLineParser("python -m tvm_ref.experiments.layers", __doc__)
    p.add_argument("--out", type=Path, help="write the page to this file instead of printing it")
    p.add_argument("--also", type=Path, help="path of another Python, whose PyTorch is tried too")
    p.add_argument("--json", action="store_true", help="print only the verdicts, as JSON")
    return p


def main() -> int:
    """Run the command."""
    command = parser()
    options = command.parse_args()
    torch.set_num_threads(1)
    if options.json:
        print(json.dumps(verdicts()))
        return 0
    with command.errors(), user_files():
        others = []
        if options.also is not None:  # first, as it may fail at once; its own complaints appear on stderr
            other = [str(options.also), "-W", "ignore", "-m", "tvm_ref.experiments.layers", "--json"]
            with user_errors(f"--also {options.also} cannot run this", subprocess.CalledProcessError, ValueError):
                others = [json.loads(subprocess.run(other, check=True, stdout=subprocess.PIPE, text=True).stdout)]
        text = page([verdicts(), *others])
        if options.out is None:
            print(text)
        else:
            write_atomically(options.out, text)
    return 0


if __name__ == "__main__":
    run(main)
