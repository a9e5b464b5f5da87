"""Average a run's weights with another decay than it was trained with, from the averages in its checkpoints.

    torchrun imagenet/train.py --save-every 50 --keep 100                          keep them: all are needed
    python imagenet/average.py runs/imagenet/digits --decay 0.995 --out longer.safetensors
    python imagenet/average.py runs/imagenet/digits --width 0.1 --out tenth.safetensors
    python imagenet/evaluate.py longer.safetensors

What comes out is the average that training would have ended with, up to the error that is printed, and a model like
any other. Averages longer than those stored come out well; shorter ones need checkpoints as close as they are long.
"""

from pathlib import Path

import torch

from imagenet.data.provenance import Provenance
from imagenet.weights import WEIGHTS, checkpoints, load_weights, read_config, read_provenance, save_weights
from tvm_ref.cli.errors import require
from tvm_ref.cli.files import require_new, require_suffix
from tvm_ref.cli.options import OneLineParser, run
from tvm_ref.post_hoc_ema import combine, ema_profile, power_profile


def parser() -> OneLineParser:
    """Build the command line."""
    p = OneLineParser("average.py", __doc__)
    p.add_argument("run", type=Path, help="a run's folder")
    p.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    kind = p.add_mutually_exclusive_group(required=True)
    kind.add_argument("--decay", type=float, help="of an exponential average, as the run's own --ema")
    kind.add_argument("--width", type=float, help="of EDM2's power-function average: sigma_rel, as 0.1")
    return p


def average(folder: Path, out: Path, decay: float | None, width: float | None) -> float:
    """Write the average of a run's weights with a decay, or of a width; returns the relative error of its profile.

    Raises:
        UserError: no run there, no checkpoints, a bad decay or width; `out` exists or is not .safetensors.
    """
    require(decay is None or 0 <= decay < 1, f"--decay must lie in [0, 1), got {decay}")
    require(width is None or 0 < width < 0.28, f"--width must lie between 0 and 0.28, got {width}")
    require_suffix(out, ".safetensors")
    require_new(out)
    config, paths = read_config(folder), checkpoints(folder)
    require(bool(paths), f"{folder} has no checkpoints")
    steps = [int(path.name) for path in paths]
    stored = [torch.nn.functional.pad(ema_profile(config.ema, n), (0, steps[-1] - n)) for n in steps]
    wanted = power_profile(width, steps[-1]) if width is not None else ema_profile(decay or 0.0, steps[-1])
    coefficients, error = combine(stored, wanted)
    model = load_weights(paths[-1] / WEIGHTS)[0]
    for i, path in enumerate(paths):
        part = load_weights(path / WEIGHTS)[0]
        for a, b in zip(model.parameters(), part.parameters(), strict=True):
            a.mul_(i > 0).add_(b, alpha=coefficients[i])
    about = {"average": f"width {width:g}" if width is not None else f"decay {decay:g}", "step": str(steps[-1])}
    provenance = read_provenance(folder) or Provenance(config.data)
    save_weights(out, model.network.state_dict(), config, data=provenance.to_json(), **about)
    return error


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status, 0."""
    command = parser()
    o = command.parse_args(argv)
    with command.errors():
        error = average(o.run, o.out, o.decay, o.width)
    print(f"{o.out}: its profile over steps is met to {error:.2g}")
    return 0


if __name__ == "__main__":
    run(main)
