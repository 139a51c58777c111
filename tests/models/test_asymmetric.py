"""The mask-conditioned decoder: against diffusers' class, what it looks at, and the files it is loaded from."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from diffusers import AsymmetricAutoencoderKL as Peer
from torch import Tensor

from ldm.checkpoint.first_stage import autoencoder_keys
from ldm.checkpoint.io import CheckpointError, write_safetensors, write_torch
from ldm.config import AutoencoderConfig, ConfigError
from ldm.latent_diffusion import replace_decoder
from ldm.models.autoencoder import AsymmetricAutoencoderKL, AutoencoderKL, build_autoencoder

PUBLISHED = [(1.0, 2), (1.5, 3), (2.0, 5)]  # width, blocks
SMALL = AutoencoderConfig(ch=16, num_res_blocks=2, norm_groups=8)


def small(width: float, blocks: int) -> AutoencoderConfig:
    return AutoencoderConfig(
        ch=16, num_res_blocks=2, norm_groups=8, decoder="asymmetric", decoder_width=width, decoder_res_blocks=blocks
    )


def peer(width: float, blocks: int, ch: int = 16, groups: int = 8) -> Peer:
    """diffusers' class in the published shape, but for the number of channels."""
    torch.manual_seed(0)
    return Peer(
        down_block_types=("DownEncoderBlock2D",) * 4,
        down_block_out_channels=(ch, 2 * ch, 4 * ch, 4 * ch),
        layers_per_down_block=2,
        up_block_types=("UpDecoderBlock2D",) * 4,
        up_block_out_channels=tuple(round(width * ch) * m for m in (1, 2, 4, 4)),
        layers_per_up_block=blocks,
        norm_num_groups=groups,
    )


@pytest.fixture(scope="module")
def scene() -> tuple[Tensor, Tensor]:
    """Pictures (2, 3, 32, 48) and holes in them, 1 in the hole."""
    generator = torch.Generator().manual_seed(1)
    hole = torch.zeros(2, 1, 32, 48)
    hole[0, :, 5:21, 9:30], hole[1, :, 16:, :7] = 1, 1
    return torch.rand(2, 3, 32, 48, generator=generator) * 2 - 1, hole


@pytest.fixture
def model() -> AsymmetricAutoencoderKL:
    torch.manual_seed(0)
    return AsymmetricAutoencoderKL(small(1.0, 1)).requires_grad_(False)


def as_far_apart(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the range of a picture: random weights give values up to 6, pictures are up to 1."""
    return ((got - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


@pytest.mark.parametrize(("width", "blocks"), PUBLISHED)
@torch.no_grad()
def test_diffusers(width: float, blocks: int, scene: tuple[Tensor, Tensor]) -> None:
    theirs, ours = peer(width, blocks), AsymmetricAutoencoderKL(small(width, blocks))
    ours.load_state_dict(autoencoder_keys(theirs.state_dict()))
    # 2e-5 is the project's bound for float32 (4.6e-6 found); in float64 only the algebra is left (7e-15 found)
    for dtype, bound in ((torch.float32, 2e-5), (torch.float64, 1e-12)):
        image, hole = (x.to(dtype) for x in scene)
        theirs, ours = theirs.to(dtype), ours.to(dtype)
        z = ours.encode(image).mean
        assert as_far_apart(z, theirs.encode(image).latent_dist.mean) < bound
        expected = theirs.decode(z, image=image, mask=hole).sample
        assert as_far_apart(ours.decode(z, image, 1 - hole), expected) < bound
        assert as_far_apart(ours.decode(z), theirs.decode(z).sample) < bound
        # masks the other way round are another picture: the polarity above is no accident
        assert as_far_apart(ours.decode(z, image, hole), expected) > 0.01


@torch.no_grad()
def test_what_is_in_the_hole_is_not_looked_at(model: AsymmetricAutoencoderKL, scene: tuple[Tensor, Tensor]) -> None:
    image, hole = scene
    z = model.encode(image).mean
    other = torch.where(hole > 0, torch.rand_like(image), image)
    assert torch.equal(model.decode(z, image, 1 - hole), model.decode(z, other, 1 - hole))
    changed = image.clone()
    changed[:, :, 0, 0] += 0.5
    assert not torch.equal(model.decode(z, image, 1 - hole), model.decode(z, changed, 1 - hole))


@torch.no_grad()
def test_nothing_known_is_decoding_as_before(model: AsymmetricAutoencoderKL, scene: tuple[Tensor, Tensor]) -> None:
    image, _ = scene
    z = model.encode(image).mean
    assert torch.equal(model.decode(z), model.decode(z, image, torch.zeros(2, 1, 32, 48)))
    plain = AutoencoderKL(AutoencoderConfig(ch=16, num_res_blocks=2, norm_groups=8))
    assert {n for n, _ in plain.encoder.named_parameters()} == {n for n, _ in model.encoder.named_parameters()}


@torch.no_grad()
def test_squares_of_pixels_count_as_known_when_all_of_them_is(scene: tuple[Tensor, Tensor]) -> None:
    """With pixels in channels, a hole of one pixel hides the features of its whole square, at full resolution."""
    config = AutoencoderConfig(
        ch=8, ch_mult=[1, 2], num_res_blocks=1, norm_groups=0, patch_size=2, decoder="asymmetric"
    )
    model = AsymmetricAutoencoderKL(config)
    image, _ = scene
    keep_mask = torch.ones(2, 1, 32, 48)
    keep_mask[:, :, 11, 21] = 0
    z = model.encode(image).mean
    seen: list[Tensor] = []
    model.decoder.norm_out.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.decode(z, image, keep_mask)
    features = model.decoder.encoder.layers[0](torch.nn.functional.pixel_unshuffle(image * keep_mask, 2))
    own = (seen[0] != features).any(1)
    assert own.nonzero().tolist() == [[0, 5, 10], [1, 5, 10]]


def test_the_config_builds_it() -> None:
    assert type(build_autoencoder(AutoencoderConfig(ch=32))) is AutoencoderKL
    assert type(build_autoencoder(small(1.0, 1))) is AsymmetricAutoencoderKL
    with pytest.raises(ConfigError, match=r"first_stage\.decoder: got 'heavy'"):
        AutoencoderConfig(decoder="heavy")
    with pytest.raises(ConfigError, match=r"decoder_width: got 0\.3"):
        AutoencoderConfig(decoder_width=0.3)


def authors_file(path: Path, state: dict[str, Tensor]) -> Path:
    """A file as the authors' trainer wrote it: Lightning's, with the loss and with layers that nothing goes through."""
    extra = {"loss.logvar": torch.zeros(()), "decoder.up_layers.0.deconv.weight": torch.zeros(2, 2, 4, 4)}
    write_torch(path, {**state, **extra})
    return path


def diffusers_folder(path: Path, theirs: Peer) -> Path:
    theirs.save_pretrained(path)
    return path


@pytest.mark.parametrize("layout", ["authors", "diffusers", "run", "bare"])
@torch.no_grad()
def test_files_of_every_layout(layout: str, tmp_path: Path, scene: tuple[Tensor, Tensor]) -> None:
    image, hole = scene
    theirs = peer(1.5, 3)
    state = autoencoder_keys(theirs.state_dict())
    path = tmp_path / "decoder.safetensors"
    if layout == "authors":
        path = authors_file(tmp_path / "decoder.ckpt", state)
    elif layout == "diffusers":
        path = diffusers_folder(tmp_path / "vae", theirs)
    else:
        prefix = "first_stage_model." if layout == "run" else ""
        write_safetensors(path, {prefix + name: tensor.half() for name, tensor in state.items()})
    plain = AutoencoderKL(SMALL)
    plain.load_state_dict({n: x for n, x in state.items() if not n.startswith("decoder.")}, strict=False)
    model = replace_decoder(plain, path)
    z = plain.encode(image).mean
    assert torch.equal(model.encode(image).mean, z)
    assert model.decode(z, image, 1 - hole).dtype == torch.float32  # whatever the file's
    assert (model.config.decoder_width, model.config.decoder_res_blocks) == (1.5, 3)
    if layout in ("authors", "diffusers"):
        assert as_far_apart(model.decode(z, image, 1 - hole), theirs.decode(z, image=image, mask=hole).sample) < 2e-5


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    state = autoencoder_keys(peer(1.0, 2).state_dict())
    plain = AutoencoderKL(SMALL)
    plain.load_state_dict({n: x for n, x in state.items() if not n.startswith("decoder.")}, strict=False)

    def refused(changed: dict[str, Tensor], reason: str) -> None:
        write_safetensors(tmp_path / "x.safetensors", changed)
        with pytest.raises(CheckpointError, match=reason) as caught:
            replace_decoder(plain, tmp_path / "x.safetensors")
        assert str(tmp_path / "x.safetensors") in str(caught.value)

    refused({n: x for n, x in state.items() if "decoder.encoder" not in n}, "holds no mask-conditioned decoder")
    refused({n: x for n, x in state.items() if n != "decoder.mid.attn_1.q.bias"}, "1 missing:\n.*attn_1.q.bias")
    refused({**state, "decoder.extra": torch.zeros(1)}, "1 unexpected:\n.*decoder.extra")
    refused({**state, "quant_conv.bias": state["quant_conv.bias"] + 1}, "trained for another encoder")
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "none.ckpt"))):
        replace_decoder(plain, tmp_path / "none.ckpt")


@pytest.mark.slow
@pytest.mark.parametrize(("width", "blocks"), PUBLISHED)
def test_published_sizes(width: float, blocks: int) -> None:
    """Names and shapes of the three published decoders, without memory for them."""
    with torch.device("meta"):
        theirs = peer(width, blocks, ch=128, groups=32)
        config = AutoencoderConfig(decoder="asymmetric", decoder_width=width, decoder_res_blocks=blocks)
        ours = AsymmetricAutoencoderKL(config)
    expected = {name: tensor.shape for name, tensor in autoencoder_keys(theirs.state_dict()).items()}
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == expected
