"""What a model was trained on: fingerprints of its data, and the autoencoder and normalisation of latents.

A run keeps it as data.json, weights in their metadata (`data`). Going on with other data, or decoding latents with
another autoencoder or normalisation, is refused: it would give worse images without a word.
"""

import json
from dataclasses import asdict, dataclass, fields

from imagenet.data.vae import Normalisation
from tvm_ref.cli.errors import UserError


@dataclass(frozen=True)
class Provenance:
    """Where the data of a model are from; what is not known is None.

    Attributes:
        data: as --data.
        images: their number.
        fingerprint: of the data (fingerprints.py).
        autoencoder: name of the autoencoder of latents: a folder, or on the Hugging Face hub.
        autoencoder_fingerprint: of its weights.
        normalisation: of latents.

    Raises:
        ValueError: a bad value, as a file may have it.
    """

    data: str
    images: int | None = None
    fingerprint: str | None = None
    autoencoder: str | None = None
    autoencoder_fingerprint: str | None = None
    normalisation: Normalisation | None = None

    def __post_init__(self) -> None:
        texts = (self.data, self.fingerprint, self.autoencoder, self.autoencoder_fingerprint)
        if not all(a is None or isinstance(a, str) for a in texts) or not isinstance(self.images, int | None):
            raise UserError("a bad value")

    def to_json(self) -> str:
        """Write one JSON object."""
        return json.dumps(asdict(self), indent=2)

    @staticmethod
    def from_json(text: str) -> "Provenance":
        """Read what to_json wrote.

        Raises:
            ValueError: anything else.
        """
        try:
            values = json.loads(text)
            if values.get("normalisation") is not None:
                mean, std = (tuple(values["normalisation"][key]) for key in ("mean", "std"))
                values["normalisation"] = Normalisation(mean, std)
            return Provenance(**values)
        except (AttributeError, TypeError, ValueError, KeyError, RecursionError):
            raise UserError(f"no description of data: {text!r:.80}") from None

    def check_same(self, other: "Provenance", what: str) -> None:
        """Raise ValueError, which begins with `what`, unless everything that both know is the same."""
        self._compare(other, [f.name for f in fields(self) if f.name != "autoencoder"], what)

    def check_same_latents(self, other: "Provenance", what: str) -> None:
        """Raise ValueError, which begins with `what`, unless latents mean the same, as far as both know."""
        self._compare(other, ["autoencoder_fingerprint", "normalisation"], what)

    def _compare(self, other: "Provenance", names: list[str], what: str) -> None:
        """Compare some attributes. A name of an autoencoder is never among them: copies have other names."""
        for name in names:
            mine, others = getattr(self, name), getattr(other, name)
            if mine is not None and others is not None and mine != others:
                label = {"images": "number of images"}.get(name, name.replace("_", "'s "))
                raise UserError(f"{what}: another {label}, {others!s:.200} in place of {mine!s:.200}")
