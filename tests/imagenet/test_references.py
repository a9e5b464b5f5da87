import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from imagenet.image_files import save_png
from imagenet.inception import Features
from imagenet.metrics import gaussian_statistics
from imagenet.references import read_reference

rng = np.random.default_rng(0)
FEATURES = rng.standard_normal((50, 4))
MEAN, COVARIANCE = gaussian_statistics(FEATURES)


def dump(path: Path, value: object) -> Path:
    path.write_bytes(pickle.dumps(value))
    return path


def check(gaussian) -> None:
    np.testing.assert_allclose(gaussian.mean, MEAN, rtol=1e-12)
    np.testing.assert_allclose(gaussian.covariance, COVARIANCE, rtol=1e-12)


def test_adm_s_npz_has_statistics_of_both_kinds_and_images(tmp_path):
    images = rng.integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "adm.npz", mu=MEAN, sigma=COVARIANCE, mu_s=MEAN, sigma_s=COVARIANCE, arr_0=images)
    reference = read_reference(tmp_path / "adm.npz")
    check(reference.pool)
    check(reference.spatial)
    np.testing.assert_array_equal(next(reference.images.batches(6)).permute(0, 2, 3, 1), images)


def test_edm_s_npz_has_statistics_for_fid_alone(tmp_path):
    np.savez(tmp_path / "edm.npz", mu=MEAN, sigma=COVARIANCE)
    reference = read_reference(tmp_path / "edm.npz")
    check(reference.pool)
    assert (reference.spatial, reference.images) == (None, None)


def test_edm2_s_pickle_has_statistics_by_metric(tmp_path):
    statistics = {"mu": MEAN, "sigma": COVARIANCE}
    check(read_reference(dump(tmp_path / "a.pkl", {"fid": statistics, "fd_dinov2": {"mu": MEAN[:2]}})).pool)
    check(read_reference(dump(tmp_path / "b.pkl", statistics)).pool)


def test_stylegan_s_pickle_has_sums_over_images(tmp_path):
    """Its own covariance would divide by N; here it divides by N - 1, as everywhere else."""
    sums = {"raw_mean": FEATURES.sum(0), "raw_cov": FEATURES.T @ FEATURES, "num_items": 50, "capture_all": False}
    check(read_reference(dump(tmp_path / "a.pkl", sums)).pool)


def test_images_alone_give_all_statistics(tmp_path):
    (tmp_path / "images").mkdir()
    save_png(tmp_path / "images" / "a.png", np.zeros((2, 2, 3), np.uint8))
    reference = read_reference(tmp_path / "images")
    assert reference.pool is None
    features = Features(*(torch.from_numpy(FEATURES),) * 3)
    check(reference.completed(features).pool)
    check(reference.completed(features).spatial)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("a.npz", lambda p: np.savez(p, sigma=COVARIANCE), "neither mu and sigma nor images"),
        ("a.npz", lambda p: np.savez(p, mu=MEAN[:2], sigma=COVARIANCE), "do not fit"),
        ("a.npz", lambda p: np.savez(p, mu=np.array([{}], dtype=object), sigma=COVARIANCE), "allow_pickle"),
        ("a.npz", lambda p: dump(p, {"mu": MEAN}), "cannot be read"),
        ("a.npz", lambda p: p.write_bytes(b"PK\x03\x04"), "cannot be read"),
        ("a.pkl", lambda p: dump(p, {"mu": MEAN}), "holds no statistics"),
        ("a.pkl", lambda p: dump(p, [MEAN]), "holds no statistics"),
        ("a.pkl", lambda p: dump(p, {"fid": Path("a")}), "is refused: it asks for pathlib"),
        ("a.txt", lambda p: p.write_text(""), "is no reference"),
    ],
)
def test_files_that_are_no_reference_are_named(tmp_path, name, make, message):
    make(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        read_reference(tmp_path / name)
