"""Test whether trained models need the JVP: measure the error of dF/ds by central differences in s.

    python -m imagenet.experiments.differences runs/imagenet/digits
    python -m imagenet.experiments.differences runs/imagenet/a runs/imagenet/b        ranges over several models

The table is that of python -m tvm_ref.experiments.relatives: errors relative to a JVP in float64, of the JVP and of
differences by their step, with matmuls in a data type, and with times rounded to it as well. The points are
those of a training batch, on the CPU. Prints one line of JSON per model with --json.
"""

import json
from dataclasses import replace

from imagenet.config import Config
from imagenet.data.batches import Batches
from imagenet.data.image_sets import load_data
from imagenet.weights import load_weights
from tvm_ref.cli.errors import user_files
from tvm_ref.cli.options import OneLineParser, require_at_least, run
from tvm_ref.cli.progress import progress
from tvm_ref.experiments.differences import Errors, derivative_errors, derivative_table
from tvm_ref.flow_map import FlowMap
from tvm_ref.interpolant import interpolate


def parser() -> OneLineParser:
    """Build the command line."""
    p = OneLineParser("python -m imagenet.experiments.differences", __doc__)
    p.add_argument("sources", nargs="+", help="folders of runs, or .safetensors files")
    p.add_argument("--data-path", help="folder of the data that the models learned; of pictures, a run's folder")
    p.add_argument("--batch-size", type=int, default=256, help="number of samples to measure on")
    p.add_argument("--json", action="store_true", help="print JSON instead of the table")
    return p


def measure(flow_map: FlowMap, config: Config, data_path: str | None, batch_size: int) -> Errors:
    """Measure derivative_errors on the first batch of a model's training."""
    config = replace(config, batch_size=batch_size, accumulate=1)
    x0, x1, (t, s, _), condition = Batches(config, load_data(config, data_path))[0]
    return derivative_errors(flow_map.network, interpolate(x0, x1, t), t, s, condition)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    command = parser()
    o = command.parse_args(argv)
    with command.errors(), user_files():
        require_at_least(1, batch_size=o.batch_size)
        models = [load_weights(source, attention="plain") for source in o.sources]
        found = [measure(flow_map, config, o.data_path, o.batch_size) for flow_map, config in progress(models)]
    print("\n".join(map(json.dumps, found)) if o.json else derivative_table(found))
    return 0


if __name__ == "__main__":
    run(main)
