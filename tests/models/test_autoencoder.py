"""The first stage against the reference's outputs, and its posterior."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ldm.config import AutoencoderConfig
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.autoencoder import AutoencoderKL, DiagonalGaussian

Close = Callable[[Tensor, Tensor], None]


def test_encode(golden: dict[str, Tensor], tiny_model: LatentDiffusion, close: Close) -> None:
    posterior = tiny_model.first_stage_model.encode(golden["vae/img"])
    mean, logvar = golden["vae/moments"].chunk(2, dim=1)
    close(posterior.mean, mean)
    close(posterior.mode(), golden["vae/mode"])
    close(posterior.logvar, logvar.clamp(-30, 20))


def test_sample(golden: dict[str, Tensor], tiny_model: LatentDiffusion, close: Close) -> None:
    generator = torch.Generator().manual_seed(11)
    noise = torch.randn(golden["vae/noise_seed11"].shape, generator=generator)
    assert torch.equal(noise, golden["vae/noise_seed11"])  # the same draws as the reference's
    posterior = tiny_model.first_stage_model.encode(golden["vae/img"])
    close(posterior.sample(generator.manual_seed(11)), golden["vae/sample_seed11"])
    latent = tiny_model.encode_image(golden["vae/img"], generator.manual_seed(11))
    close(latent, golden["vae/latent_scaled_seed11"])


def test_decode(golden: dict[str, Tensor], tiny_model: LatentDiffusion, close: Close) -> None:
    close(tiny_model.first_stage_model.decode(golden["vae/z"]), golden["vae/decoded"])
    close(tiny_model.decode_latents(golden["vae/z"]), golden["vae/decode_first_stage"])


def test_posterior_is_a_clamped_gaussian() -> None:
    logvar = torch.tensor([-100.0, -2.0, 0.0, 100.0])
    moments = torch.stack([torch.full_like(logvar, 0.5), logvar])[None, :, None]  # (1, 2, 1, 4)
    posterior = DiagonalGaussian(moments)
    assert posterior.logvar.flatten().tolist() == [-30.0, -2.0, 0.0, 20.0]
    exact = Normal(posterior.mean.double(), (0.5 * posterior.logvar.double()).exp())
    expected = kl_divergence(exact, Normal(0.0, 1.0)).sum().float()
    # a sum that is dominated by exp(20) / 2 = 2.4e8, in float32
    torch.testing.assert_close(posterior.kl(), expected[None], rtol=1e-6, atol=0)


def test_samples_have_the_posteriors_moments() -> None:
    moments = torch.cat([torch.full((1, 1, 100, 100), 2.0), torch.full((1, 1, 100, 100), math.log(0.25))], dim=1)
    sample = DiagonalGaussian(moments).sample(torch.Generator().manual_seed(0))
    # 10,000 draws of standard deviation 0.5: standard errors 0.005 and 0.0035, four of each
    assert sample.mean().item() == pytest.approx(2.0, abs=0.02)
    assert sample.std().item() == pytest.approx(0.5, abs=0.014)


def test_equal_generators_equal_samples_whatever_the_batch() -> None:
    moments = torch.randn(3, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    together = DiagonalGaussian(moments).sample([torch.Generator().manual_seed(seed) for seed in (7, 8, 9)])
    for i, seed in enumerate((7, 8, 9)):
        alone = DiagonalGaussian(moments[i : i + 1]).sample([torch.Generator().manual_seed(seed)])
        assert torch.equal(together[i : i + 1], alone)
    with pytest.raises(ValueError, match="got 2 generators for a batch of 3"):
        DiagonalGaussian(moments).sample([torch.Generator(), torch.Generator()])


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("ch_mult", [[1], [1, 2], [1, 1, 2], [1, 2, 4, 4]])
def test_downsampling(ch_mult: list[int], patch_size: int) -> None:
    model = AutoencoderKL(AutoencoderConfig(ch=32, ch_mult=ch_mult, num_res_blocks=1, patch_size=patch_size))
    factor = model.downsampling
    assert factor == patch_size * 2 ** (len(ch_mult) - 1)
    with torch.no_grad():
        z = model.encode(torch.zeros(1, 3, 2 * factor, 3 * factor)).mode()
        assert z.shape == (1, 4, 2, 3)
        assert model.decode(z).shape == (1, 3, 2 * factor, 3 * factor)


def test_without_norms_brightness_is_not_normalised_away() -> None:
    """Group norms give nearly the same latent for a picture at any contrast; without them it follows the contrast."""
    picture = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    spread = {}
    for groups in (0, 1):
        torch.manual_seed(0)
        model = AutoencoderKL(AutoencoderConfig(ch=8, ch_mult=[1, 2], num_res_blocks=1, norm_groups=groups))
        with torch.no_grad():
            strong, weak = (model.encode(contrast * picture).mean for contrast in (400.0, 100.0))
        spread[groups] = (strong.std() / weak.std()).item()
    assert spread[0] == pytest.approx(4.0, rel=0.1)  # so large that biases hardly count
    assert spread[1] == pytest.approx(1.0, rel=0.1)
    assert not any(
        "norm" in name for name, _ in AutoencoderKL(AutoencoderConfig(ch=8, norm_groups=0)).named_parameters()
    )
