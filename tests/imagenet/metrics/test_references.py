import pickle
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from imagenet.metrics.frechet import gaussian_statistics
from imagenet.metrics.inception import Features
from imagenet.metrics.references import Reference, check_reference, read_reference

rng = np.random.default_rng(0)
FEATURES = rng.standard_normal((50, 4))
MEAN, COVARIANCE = gaussian_statistics(FEATURES)


def dump(path: Path, value: object) -> Path:
    path.write_bytes(pickle.dumps(value))
    return path


def check(gaussian) -> None:
    np.testing.assert_allclose(gaussian.mean, MEAN, rtol=1e-12)
    np.testing.assert_allclose(gaussian.covariance, COVARIANCE, rtol=1e-12)


def test_adm_s_npz_has_statistics_and_images(tmp_path):
    images = rng.integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "adm.npz", mu=MEAN, sigma=COVARIANCE, mu_s=MEAN, sigma_s=COVARIANCE, arr_0=images)
    reference = read_reference(tmp_path / "adm.npz")
    check(reference.pool)
    np.testing.assert_array_equal(next(reference.images.batches(6)).permute(0, 2, 3, 1), images)


def test_edm2_s_pickle_has_statistics_by_metric(tmp_path):
    statistics = {"mu": MEAN, "sigma": COVARIANCE}
    check(read_reference(dump(tmp_path / "a.pkl", {"fid": statistics, "fd_dinov2": {"mu": MEAN[:2]}})).pool)


def inflated(path: Path) -> None:
    """An archive of 1 MB whose sigma is 1 GB of zeros, or says so."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, shape in (("mu", (11_000,)), ("sigma", (11_000, 11_000))):
            with archive.open(f"{name}.npy", "w") as stream:
                header = {"descr": "<f8", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(stream, header)
                stream.write(bytes(1 << 20))


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("a.npz", lambda p: np.savez(p, **{"\x1b[2J": MEAN}), "neither mu and sigma nor images"),
        ("a.npz", lambda p: np.savez(p, mu=MEAN[:2], sigma=COVARIANCE), "do not fit"),
        ("a.npz", lambda p: np.savez(p, mu=np.array([{}]), sigma=COVARIANCE), r"mu is an array \[1\] of object"),
        ("a.npz", lambda p: np.savez(p, mu=MEAN, sigma=np.inf * COVARIANCE), "not finite"),
        ("a.npz", lambda p: p.write_bytes(b"PK\x03\x04"), "cannot be read"),
        ("a.pkl", lambda p: dump(p, [MEAN]), "holds no statistics"),
        ("a.pkl", lambda p: dump(p, {"fid": Path("a")}), "is refused: it asks for 'pathlib"),
        ("a.pkl", lambda p: dump(p, {"fid": {"mu": 1, "sigma": COVARIANCE}}), "where an array belongs"),
        ("a.txt", lambda p: p.write_text(""), "is no reference"),
    ],
)
def test_files_that_are_no_reference_are_named(tmp_path, name, make, message):
    make(tmp_path / name)
    with pytest.raises(ValueError, match=message) as error:
        read_reference(tmp_path / name)
    assert str(error.value).isprintable()


def test_an_archive_is_inflated_no_further_than_statistics_need(tmp_path):
    inflated(tmp_path / "a.npz")
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"mu is an array \[11000\] of float64"):
        read_reference(tmp_path / "a.npz")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6


def test_references_are_checked_against_features_of_any_image():
    reference = Reference("ours", gaussian_statistics(FEATURES))
    check_reference(reference, Features(torch.zeros(1, 4), torch.zeros(1, 3)))
    with pytest.raises(ValueError, match="ours holds statistics of 4 numbers, where features have 5"):
        check_reference(reference, Features(torch.zeros(1, 5), torch.zeros(1, 3)))
