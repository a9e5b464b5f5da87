import pytest
import torch

from imagenet.data.vae import NORMALISATION, Normalisation, decode, encode, load_vae


@pytest.mark.parametrize("size", NORMALISATION)
def test_normalisation_is_undone(size):
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    norm = NORMALISATION[size]
    torch.testing.assert_close(norm.denormalise(norm.normalise(x)), x)
    mean, std = (torch.tensor(a, dtype=torch.float64).view(4, 1, 1) for a in (norm.mean, norm.std))
    torch.testing.assert_close(norm.normalise(mean + 2 * std), torch.full((4, 1, 1), 2.0, dtype=torch.float64))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.0), (0.0, float("inf")), (float("nan"), 1.0), (0.0, -1.0)])
def test_normalisation_refuses_what_divides_by_nothing_or_everything(mean, std):
    with pytest.raises(ValueError, match="positive std"):
        Normalisation((mean,), (std,))


def test_encode_and_decode_call_the_autoencoder_on_its_own_scales():
    pytest.importorskip("diffusers")
    from tests.autoencoders import tiny_vae

    vae, images = tiny_vae(), torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    posterior = vae.encode(images / 127.5 - 1).latent_dist
    torch.testing.assert_close(encode(vae, images), torch.stack([posterior.mean, posterior.std], 1))
    x = NORMALISATION[256].normalise(posterior.mean)
    torch.testing.assert_close(decode(vae, x, NORMALISATION[256]), vae.decode(posterior.mean).sample)


def test_an_autoencoder_is_loaded_from_a_folder(tmp_path):
    pytest.importorskip("diffusers")
    from tests.autoencoders import tiny_vae

    vae = tiny_vae()
    vae.save_pretrained(tmp_path / "vae")
    loaded = load_vae(str(tmp_path / "vae"))
    assert all(torch.equal(a, b) for a, b in zip(vae.parameters(), loaded.parameters(), strict=True))
    with pytest.raises(ValueError, match="no autoencoder"):
        load_vae(str(tmp_path / "absent"))
