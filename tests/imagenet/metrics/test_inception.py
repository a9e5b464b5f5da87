import hashlib
from pathlib import Path

import pytest
import torch

pytest.importorskip("torch_fidelity")
from torch_fidelity import feature_extractor_inceptionv3 as library

from imagenet.metrics import inception
from imagenet.metrics.inception import Inception


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A file of random weights for the network."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(library.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = library.FeatureExtractorInceptionV3("random", ["2048"])
    torch.save(network.state_dict(), path)
    return path


def accept(weights: Path, monkeypatch) -> None:
    monkeypatch.setattr(inception, "SHA256", hashlib.sha256(weights.read_bytes()).hexdigest())


@pytest.mark.slow
def test_features_are_the_library_s(weights, monkeypatch):
    accept(weights, monkeypatch)
    extractor = Inception(weights)
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    features = extractor(images)
    pool, logits = extractor.network(images)
    torch.testing.assert_close(features.pool, pool)
    torch.testing.assert_close(features.logits, logits)


def test_other_weights_are_never_taken(weights, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="is not Inception as published figures use it"):
        Inception(weights)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match=r"are not here .* fetch https"):
        Inception()


def test_weights_that_do_more_are_refused(tmp_path, monkeypatch):
    torch.save(Path("a path is no weight"), tmp_path / "weights.pth")
    accept(tmp_path / "weights.pth", monkeypatch)
    with pytest.raises(ValueError, match="more than weights"):
        Inception(tmp_path / "weights.pth")
