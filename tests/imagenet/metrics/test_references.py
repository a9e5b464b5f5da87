import pickle
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from imagenet.data.image_files import save_png
from imagenet.metrics.frechet import Gaussian, gaussian_statistics
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


def sums(**changed: object) -> dict[str, object]:
    return {"raw_mean": FEATURES.sum(0), "raw_cov": FEATURES.T @ FEATURES, "num_items": 50} | changed


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
        ("a.npz", lambda p: np.savez(p, **{"\x1b[2J": MEAN}), r"neither mu and sigma nor images .* only '\\x1b\[2J'"),
        ("a.npz", lambda p: np.savez(p, mu=MEAN[:2], sigma=COVARIANCE), "do not fit"),
        ("a.npz", lambda p: np.savez(p, mu=np.array([{}]), sigma=COVARIANCE), r"mu is an array \[1\] of object"),
        ("a.npz", lambda p: np.savez(p, mu=MEAN, sigma=np.inf * COVARIANCE), "not finite"),
        ("a.npz", lambda p: np.savez(p, mu=MEAN, sigma=COVARIANCE.astype("c16")), "sigma is an array"),
        ("a.npz", lambda p: p.write_bytes(b"PK\x03\x04"), "cannot be read"),
        ("a.npz", inflated, r"mu is an array \[11000\] of float64"),
        ("a.pkl", lambda p: dump(p, {"mu": MEAN}), "holds no statistics"),
        ("a.pkl", lambda p: dump(p, [MEAN]), "holds no statistics"),
        ("a.pkl", lambda p: dump(p, {"fid": Path("a")}), "is refused: it asks for 'pathlib"),
        ("a.pkl", lambda p: dump(p, sums(num_items="fifty")), "num_items must be a number of at least 2"),
        ("a.pkl", lambda p: dump(p, sums(num_items=1)), "num_items must be a number of at least 2"),
        ("a.pkl", lambda p: dump(p, sums(num_items=float("nan"))), "num_items must be a number of at least 2"),
        ("a.pkl", lambda p: dump(p, sums(num_items=10**200)), "num_items must be a number of at least 2"),
        ("a.pkl", lambda p: dump(p, sums(raw_cov="many")), "must be arrays of numbers"),
        ("a.pkl", lambda p: dump(p, sums(raw_mean=np.full(4, 1e200))), "not finite"),
        ("a.pkl", lambda p: dump(p, {"mu": MEAN[:0], "sigma": COVARIANCE[:0, :0]}), "do not fit"),
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
    with pytest.raises(ValueError, match="mu is an array"):
        read_reference(tmp_path / "a.npz")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6


def features(pool: int, spatial: int) -> Features:
    return Features(*(torch.zeros(1, size) for size in (pool, 3, spatial)))


def test_references_are_checked_against_features_of_any_image():
    reference = Reference("ours", pool=gaussian_statistics(FEATURES), spatial=gaussian_statistics(FEATURES[:, :2]))
    check_reference(reference, features(4, 2))
    check_reference(Reference("ours"), features(4, 2))
    with pytest.raises(ValueError, match="ours holds statistics of 4 numbers, where pool features have 5"):
        check_reference(reference, features(5, 2))
    with pytest.raises(ValueError, match="ours holds statistics of 2 numbers, where spatial features have 3"):
        check_reference(reference, features(4, 3))


@pytest.mark.parametrize(
    ("covariance", "message"),
    [(COVARIANCE + np.triu(np.ones((4, 4)), 1), "must be symmetric"), (-COVARIANCE, "negative eigenvalues")],
)
def test_what_is_no_covariance_is_noticed_before_it_is_measured_against(covariance, message):
    with pytest.raises(ValueError, match=message):
        check_reference(Reference("ours", pool=Gaussian(MEAN, covariance)), features(4, 4))
