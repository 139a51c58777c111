"""Training of the autoencoder: reconstruction, KL, perceptual distance, adversarial game."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from ldm.checkpoint.io import CheckpointError
from ldm.config import Config, ConfigError
from ldm.data.datamodule import DataModule
from ldm.training.first_stage_module import FirstStageTraining, PerceptualDistance

MakeConfig = Callable[..., Config]
Batch = dict[str, Tensor]

# The discriminator halves its input three times.
ADVERSARIAL = ("stage=first_stage", "model.image_size=32", "first_stage_training.adversarial_weight=0.5")


@pytest.fixture
def picture_batch(make_config: MakeConfig) -> Batch:
    return next(iter(DataModule(make_config("stage=first_stage", "model.image_size=32")).train_dataloader()))


def gradients(module: torch.nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in module.parameters()]


def test_loss_falls_on_one_batch(make_config: MakeConfig, batch: Batch) -> None:
    torch.manual_seed(0)
    module = FirstStageTraining(make_config("stage=first_stage"))
    optimizer = torch.optim.Adam(module.parameters(), lr=2e-3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = module.losses(batch)[0]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_each_side_of_the_game_gets_its_own_gradient(make_config: MakeConfig, picture_batch: Batch) -> None:
    torch.manual_seed(0)
    module = FirstStageTraining(make_config(*ADVERSARIAL, "first_stage_training.adversarial_start=0"))
    autoencoder, discriminator = module.first_stage_model, module.discriminator
    assert discriminator is not None
    module.losses(picture_batch)[0].backward()
    got = gradients(autoencoder), gradients(discriminator)
    module.zero_grad(set_to_none=True)

    # The same, side by side: first what the autoencoder minimises, the discriminator a constant.
    image = picture_batch["image"]
    generators = [torch.Generator().manual_seed(key) for key in picture_batch["key"].tolist()]
    posterior = autoencoder.encode(image)
    reconstruction = autoencoder.decode(posterior.sample(generators))
    constant = {name: p.detach() for name, p in discriminator.named_parameters()}
    fooled = functional_call(discriminator, constant, (reconstruction,))
    (F.l1_loss(reconstruction, image) + 1e-6 * posterior.kl().mean() - 0.5 * fooled.mean()).backward()
    assert all(g is None for g in gradients(discriminator))
    expected_autoencoder = gradients(autoencoder)
    module.zero_grad(set_to_none=True)

    # Then what the discriminator minimises.
    real, fake = discriminator(image), discriminator(reconstruction.detach())
    (0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())).backward()
    assert all(g is None for g in gradients(autoencoder))
    torch.testing.assert_close(got, (expected_autoencoder, gradients(discriminator)), rtol=1e-4, atol=1e-6)


def test_the_game_begins_at_its_step(make_config: MakeConfig, picture_batch: Batch) -> None:
    module = FirstStageTraining(make_config(*ADVERSARIAL, "first_stage_training.adversarial_start=1"))
    assert module.discriminator is not None
    module.losses(picture_batch)[0].backward()  # step 0
    assert all(g is None for g in gradients(module.discriminator))
    module.options.adversarial_start = 0
    module.losses(picture_batch)[0].backward()
    assert all(g is not None for g in gradients(module.discriminator))


def test_perceptual_distance() -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    distance = PerceptualDistance()
    torch.manual_seed(0)
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    reconstruction = (image + 0.1 * torch.randn_like(image)).requires_grad_()
    near = distance(reconstruction, image)
    assert near.shape == (2,)
    assert not distance(image, image).any()
    assert (near > 0).all() and (near < distance(torch.zeros_like(image), image)).all()
    near.sum().backward()
    assert reconstruction.grad is not None
    assert reconstruction.grad.any()


def test_perceptual_network_is_no_part_of_the_checkpoint(make_config: MakeConfig, picture_batch: Batch) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    plain = FirstStageTraining(make_config("stage=first_stage"))
    module = FirstStageTraining(make_config("stage=first_stage", "first_stage_training.perceptual_weight=1.0"))
    module.load_state_dict(plain.state_dict())
    assert module.losses(picture_batch)[0] > plain.losses(picture_batch)[0]
    assert module.state_dict().keys() == plain.state_dict().keys()
    assert {name for name, _ in module.named_parameters()} == {name for name, _ in plain.named_parameters()}


def test_the_perceptual_term_waits_for_its_step(make_config: MakeConfig, picture_batch: Batch) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    changes = ("stage=first_stage", "first_stage_training.perceptual_weight=1.0")
    module = FirstStageTraining(make_config(*changes, "first_stage_training.perceptual_start=1"))
    early = module.losses(picture_batch)[0]
    module.options.perceptual_start = 0  # and the step is 0
    assert module.losses(picture_batch)[0] > early


@pytest.mark.parametrize("decoder", ["plain", "asymmetric"])
def test_plain_images_are_previewed(make_config: MakeConfig, batch: Batch, decoder: str) -> None:
    config = make_config("stage=first_stage", f"model.first_stage.decoder={decoder}")
    shown = FirstStageTraining(config).preview({"image": batch["image"]}, config.logging)
    assert [x.shape for x in shown] == 2 * [batch["image"].shape]


def test_cached_latents_have_no_pixels_to_train_on(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"data\.kind"):
        DataModule(make_config("stage=first_stage", "data.kind=cached"))


# ---- a decoder that sees what is known ----

ASYMMETRIC = ("stage=first_stage", "model.first_stage.decoder=asymmetric")


def test_masks_depend_on_keys_and_half_are_blind(make_config: MakeConfig) -> None:
    module = FirstStageTraining(make_config(*ASYMMETRIC))
    batch = {"image": torch.zeros(400, 3, 16, 16), "key": torch.arange(400)}
    keep_mask = module.keep_masks(batch)
    assert keep_mask.shape == (400, 1, 16, 16) and set(keep_mask.unique().tolist()) == {0.0, 1.0}
    blind = (keep_mask == 0).flatten(1).all(1)
    assert 150 < blind.sum() < 250  # five standard errors
    assert torch.equal(module.keep_masks({"image": batch["image"][:2], "key": torch.tensor([7, 3])}), keep_mask[[7, 3]])
    for share in (0.0, 1.0):
        module.options.p_no_condition = share
        assert ((module.keep_masks(batch) == 0).flatten(1).all(1).float().mean() > 0.5) == (share == 1)


@pytest.mark.parametrize("alone", ["model.first_stage.decoder=asymmetric", "first_stage_training.trainable=decoder"])
def test_a_decoder_is_trained_alone(make_config: MakeConfig, picture_batch: Batch, alone: str) -> None:
    config = make_config(*ADVERSARIAL, alone, "first_stage_training.adversarial_start=0")
    module = FirstStageTraining(config)
    loss, terms = module.losses(picture_batch)
    loss.backward()
    trained = {name.split(".")[1] for name, p in module.named_parameters() if p.grad is not None}
    assert {"decoder"} == trained - {name.split(".")[0] for name, _ in module.discriminator.named_parameters()}  # pyright: ignore[reportOptionalMemberAccess]
    assert "kl" not in terms and "discriminator" in terms
    assert not any(p.requires_grad for p in module.first_stage_model.encoder.parameters())


@pytest.mark.parametrize("linear_path", ["false", "true"])
def test_a_trained_posterior_starts_at_the_same_width(
    make_config: MakeConfig, picture_batch: Batch, linear_path: str
) -> None:
    options = ("stage=first_stage", "model.image_size=32", f"model.first_stage.linear_path={linear_path}")
    logvar = FirstStageTraining(make_config(*options)).first_stage_model.encode(picture_batch["image"]).logvar
    assert abs(logvar.mean() + 6) < 0.5


def test_the_decoder_of_a_linear_encoder_needs_no_checkpoint(make_config: MakeConfig, picture_batch: Batch) -> None:
    linear = ("model.first_stage.linear_path=true", "model.first_stage.encoder=linear")
    module = FirstStageTraining(make_config("stage=first_stage", "model.image_size=32", *linear))
    assert module.starting_weights({}, None, from_scratch=False) == ({}, ["first_stage_model."])
    loss, terms = module.losses(picture_batch)
    loss.backward()
    assert "kl" not in terms
    trained = {name.split(".")[1] for name, p in module.named_parameters() if p.grad is not None}
    assert trained == {"decoder"}
    with pytest.raises(CheckpointError):
        FirstStageTraining(make_config(*ASYMMETRIC)).starting_weights({}, None, from_scratch=False)


@pytest.mark.parametrize("unknown", [0.0, 1.0])
def test_the_branch_learns_from_what_is_known(make_config: MakeConfig, batch: Batch, unknown: float) -> None:
    module = FirstStageTraining(make_config(*ASYMMETRIC, f"first_stage_training.p_no_condition={unknown}"))
    module.losses(batch)[0].backward()
    branch = [p.grad for name, p in module.named_parameters() if "decoder.encoder." in name]
    assert branch and all((grad is not None and bool(grad.any())) == (unknown == 0) for grad in branch)
