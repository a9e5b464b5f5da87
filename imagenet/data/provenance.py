"""The record of a model's training data. A run keeps it as data.json, weights in their metadata (`data`).

Latents of another autoencoder, by name, or of another normalisation are refused, because images would silently become
worse. Data are not compared: training may continue on others.
"""

import json
from dataclasses import asdict, dataclass

from imagenet.data.vae import Normalisation
from tvm_ref.cli.errors import UserError


@dataclass(frozen=True)
class Provenance:
    """The origin of a model's data; unknown fields are None.

    Attributes:
        data: name of the data, as in Config.
        path: folder that they were read from.
        autoencoder: name of the autoencoder of latents: a folder, or on the Hugging Face hub.
        normalisation: that of latents.
        classes: names of the classes, by number, where the data name them.
        brightness: mean of all pixels of pictures, from black 0 to white 1.
    """

    data: str
    path: str | None = None
    autoencoder: str | None = None
    normalisation: Normalisation | None = None
    classes: tuple[str, ...] | None = None
    brightness: float | None = None

    def to_json(self) -> str:
        """Write one JSON object."""
        return json.dumps(asdict(self), indent=2)

    @staticmethod
    def from_json(text: str) -> "Provenance":
        """Read the output of to_json.

        Raises:
            UserError: anything else.
        """
        try:
            values = json.loads(text)
            if values.get("normalisation") is not None:
                mean, std = (tuple(values["normalisation"][key]) for key in ("mean", "std"))
                values["normalisation"] = Normalisation(mean, std)
            if values.get("classes") is not None:
                values["classes"] = tuple(values["classes"])
            return Provenance(**values)
        except (AttributeError, TypeError, ValueError, KeyError, RecursionError):
            raise UserError(f"no description of data: {text!r:.80}") from None

    def check_latents(self, other: "Provenance", what: str) -> None:
        """Raise UserError, which begins with `what`, if latents are known to differ in autoencoder or normalisation.

        A folder and a name on the hub are the same autoencoder if their last parts are.
        """
        names = [a.autoencoder and a.autoencoder.rstrip("/").rpartition("/")[2] for a in (self, other)]
        if all(names) and names[0] != names[1]:
            raise UserError(f"{what}: their autoencoder is {names[0]!r:.80}, not {names[1]!r:.80}")
        normalisations = [a.normalisation for a in (self, other)]
        if all(normalisations) and normalisations[0] != normalisations[1]:
            raise UserError(f"{what}: their normalisation is {normalisations[0]}, not {normalisations[1]}")
