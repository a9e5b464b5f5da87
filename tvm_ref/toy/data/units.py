"""The units of the data: what the numbers of a standardised plane mean in the table they came from."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from tvm_ref.shapes import Sample


@dataclass(frozen=True)
class Units:
    """Data in their own units are mean + scale x, per axis, where x are the standardised data that a model learns.

    Attributes:
        mean: of the data, per axis.
        scale: what 1 is worth, per axis.
        columns: names of the axes.
    """

    mean: tuple[float, ...] = (0.0, 0.0)
    scale: tuple[float, ...] = (1.0, 1.0)
    columns: tuple[str, ...] = ("x", "y")

    def restore(self, x: Sample) -> Sample:
        """Turn standardised points [N, D] into points in the data's own units [N, D] (float64)."""
        return self._tensor(self.mean) + self._tensor(self.scale) * x.double()

    def standardise(self, points: Sample) -> Sample:
        """Turn points in the data's own units [N, D] into standardised ones [N, D] (float64)."""
        return (points.double() - self._tensor(self.mean)) / self._tensor(self.scale)

    def metadata(self) -> dict[str, str]:
        """Write it as the metadata of a safetensors file, to the last bit: one entry, as their order is chance."""
        return {"units": json.dumps(asdict(self))}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> "Units":
        """Read what `metadata` wrote; without it, data are their own standardised units.

        Raises:
            ValueError: metadata that are damaged.
        """
        return cls(**{name: tuple(values) for name, values in json.loads(metadata.get("units", "{}")).items()})

    def _tensor(self, numbers: tuple[float, ...]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float64)
