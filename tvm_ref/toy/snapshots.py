"""What the evaluated weights were on the way: a few snapshots of training, in one small file of the run's folder."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from tvm_ref.cli.errors import UserError

SNAPSHOTS = "snapshots.safetensors"
SHARES = (0.0, 0.01, 0.03, 0.1, 0.3)  # of the steps; the end is weights.safetensors


def snapshot_steps(steps: int) -> set[int]:
    """List the steps after which a snapshot is kept, of a training of `steps` steps."""
    return {round(share * steps) for share in SHARES}


def add_snapshot(folder: Path, step: int, network: nn.Module) -> None:
    """Add a network's weights after `step` to the folder's snapshots, in place of those it had of that step or later.

    Raises:
        ValueError: a damaged file.
        OSError: a file that cannot be read or written.
    """
    snapshots = {k: weights for k, weights in load_snapshots(folder).items() if k < step}
    snapshots[step] = network.state_dict()
    tensors = {f"{k}/{name}": a.cpu().contiguous() for k, weights in snapshots.items() for name, a in weights.items()}
    partial = folder / f"{SNAPSHOTS}.partial"
    partial.write_bytes(save(tensors))
    partial.replace(folder / SNAPSHOTS)


def load_snapshots(folder: Path) -> dict[int, dict[str, Tensor]]:
    """Load the networks' weights by step, earliest first; empty if the folder has none.

    Raises:
        ValueError: a damaged file.
        OSError: a file that cannot be read.
    """
    if not (folder / SNAPSHOTS).exists():
        return {}
    try:
        snapshots: dict[int, dict[str, Tensor]] = {}
        for key, a in load((folder / SNAPSHOTS).read_bytes()).items():
            step, name = key.split("/", 1)
            snapshots.setdefault(int(step), {})[name] = a
    except (SafetensorError, ValueError):
        raise UserError(f"{folder / SNAPSHOTS} is damaged; without that file its snapshots begin anew") from None
    return dict(sorted(snapshots.items()))
