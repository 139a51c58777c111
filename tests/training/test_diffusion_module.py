"""One training step of the diffusion model."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm.checkpoint.keys import TOWER
from ldm.config import Config, ConfigError
from ldm.training.denoising import LossAwareTimesteps
from ldm.training.diffusion_module import DiffusionTraining
from ldm.training.run import Run

Fit = Callable[..., tuple[Run, int]]
MakeConfig = Callable[..., Config]
Batch = dict[str, Tensor]

FROZEN = ("first_stage_model.", "cond_stage_model.transformer.")
DEAD = ("attn2.to_q.weight", "attn2.to_k.weight", "norm2.weight", "norm2.bias")


@pytest.fixture
def make_module(make_config: MakeConfig, weights: dict[str, Tensor]) -> Callable[..., DiffusionTraining]:
    def make(*overrides: str) -> DiffusionTraining:
        module = DiffusionTraining(make_config(*overrides))
        module.load_state_dict(weights, strict=False)
        return module.train()

    return make


def test_gradients_reach_what_is_trained_and_nothing_else(
    make_module: Callable[..., DiffusionTraining], batch: Batch
) -> None:
    module = make_module("training.p_uncond=0.5")
    losses, t = module.losses(batch)
    assert losses.shape == t.shape == (4,)
    assert losses.isfinite().all()
    losses.mean().backward()
    for name, parameter in module.named_parameters():
        frozen = name.startswith(FROZEN) or name.endswith(DEAD)
        assert parameter.requires_grad is not frozen, name
        assert (parameter.grad is None) is frozen, name
        if parameter.grad is not None:
            assert parameter.grad.any(), name


def test_cached_features_stand_for_the_exemplar(make_module: Callable[..., DiffusionTraining], batch: Batch) -> None:
    module = make_module("training.p_uncond=0.5").eval()
    features = module.cond_stage_model.features(batch["exemplar"])
    losses, _ = module.losses({**batch, "exemplar_features": features, "exemplar": torch.zeros(4, 0)})
    torch.testing.assert_close(losses, module.losses(batch)[0])


def test_the_tower_is_trained_where_the_config_says_so(
    make_module: Callable[..., DiffusionTraining], batch: Batch
) -> None:
    module = make_module("training.train_tower=true", "training.p_uncond=0")
    module.losses(batch)[0].mean().backward()
    tower = module.cond_stage_model.transformer
    assert tower.training
    assert all(p.grad is not None for p in tower.parameters())
    assert not any(p.requires_grad for p in module.first_stage_model.parameters())


def test_a_trained_tower_sees_the_exemplar_though_features_are_cached(
    make_module: Callable[..., DiffusionTraining], batch: Batch
) -> None:
    module = make_module("training.train_tower=true", "training.p_uncond=0")
    features = module.cond_stage_model.features(batch["exemplar"]).detach()
    module.losses({**batch, "exemplar_features": features})[0].mean().backward()
    assert all(p.grad is not None for p in module.cond_stage_model.transformer.parameters())


def test_min_snr_weights_scale_the_optimised_loss_and_not_the_logged_one(
    make_module: Callable[..., DiffusionTraining], batch: Batch
) -> None:
    logged, optimised = [], []
    for gamma in (0, 5):
        module = make_module(f"training.min_snr_gamma={gamma}")
        optimised.append(module.training_step(batch, 0).item())
        logged.append(module.read_curves()["train/loss"])
    losses, t = module.losses(batch)
    snr = module.alphas_cumprod[t] / (1 - module.alphas_cumprod[t])
    assert optimised[0] == pytest.approx(losses.mean().item(), rel=1e-6)
    assert optimised[1] == pytest.approx((losses * snr.clamp(max=5) / snr).mean().item(), rel=1e-5)  # predicts eps
    assert logged == pytest.approx([optimised[0]] * 2, rel=1e-6)


def test_the_perceptual_term_adds_to_the_loss_and_trains_the_unet(
    make_module: Callable[..., DiffusionTraining], batch: Batch
) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    model = ("model.image_size=32", "model.first_stage.linear_path=true")
    plain, perceptual = (make_module(*model, f"training.perceptual_weight={weight}") for weight in (0, 0.5))
    doubled = {name: batch[name].repeat(1, 1, 2, 2) for name in ("image", "masked_image", "keep_mask")}
    batch = {**batch, **doubled}
    assert perceptual.state_dict().keys() == plain.state_dict().keys()
    perceptual.options.perceptual_start = 1
    assert torch.equal(perceptual.losses(batch)[0], plain.losses(batch)[0])  # step 0
    perceptual.options.perceptual_start = 0
    difference = perceptual.losses(batch)[0] - plain.losses(batch)[0]
    assert (difference > 0).all()
    gradient = torch.autograd.grad(difference.sum(), perceptual.unet.out[-1].weight)[0]
    assert gradient.any()
    z = torch.randn(2, 4, 16, 16)
    assert not perceptual.perceptual_distance(z, z).any()
    torch.testing.assert_close(  # of images, in pixels
        perceptual.perceptual_distance(z, 0 * z),
        0.5 * perceptual.perceptual(*(plain.first_stage_model.decode_linear(x / 0.18215) for x in (z, 0 * z))),
    )


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.image_size=32"],
        ["model.first_stage.linear_path=true"],  # of 16 px
        ["model.image_size=32", "model.first_stage.linear_path=true", "model.kind=pixel"],
    ],
)
def test_the_perceptual_term_needs_a_linear_path(make_config: MakeConfig, overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"training\.perceptual_weight"):
        make_config("training.perceptual_weight=1", *overrides)


def test_frozen_parts_stay_and_trained_parts_move(
    fit: Callable[..., tuple[Run, int]], make_config: MakeConfig, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    run, code = fit(make_config("trainer.max_epochs=1"), tmp_path)
    assert code == 0
    for name, parameter in run.module.named_parameters():
        frozen = name.startswith(FROZEN) or name.endswith(DEAD)
        assert torch.equal(parameter, weights[name]) is frozen, name
    assert not run.module.first_stage_model.training


def test_losses_are_the_sample_s_own(make_module: Callable[..., DiffusionTraining], batch: Batch) -> None:
    """Timestep, noise and null-drop hang on the sample's key, not on its neighbours."""
    module = make_module().eval()
    with torch.no_grad():
        together, t = module.losses(batch)
        alone = [module.losses({name: tensor[i : i + 1] for name, tensor in batch.items()}) for i in range(4)]
    assert [int(x) for _, x in alone] == t.tolist()
    # Sums of other batch sizes are ordered differently: a few units in the last place.
    torch.testing.assert_close(torch.cat([x for x, _ in alone]), together, rtol=1e-5, atol=1e-6)


def test_activation_checkpointing_changes_no_gradient(
    make_module: Callable[..., DiffusionTraining], batch: Batch
) -> None:
    gradients = []
    for flag in ("false", "true"):
        module = make_module(f"model.unet.activation_checkpointing={flag}")
        module.losses(batch)[0].mean().backward()
        gradients.append([p.grad for p in module.parameters() if p.requires_grad])
    for with_all, recomputed in zip(*gradients, strict=True):
        assert torch.equal(with_all, recomputed)


def test_cached_latents_give_the_same_loss(make_module: Callable[..., DiffusionTraining], batch: Batch) -> None:
    module = make_module().eval()
    with torch.no_grad():
        expected, _ = module.losses(batch)
        moments = {}
        for name, key in (("image", "image_moments"), ("masked_image", "masked_moments")):
            posterior = module.first_stage_model.encode(batch[name])
            moments[key] = torch.cat([posterior.mean, posterior.logvar], dim=1)
        cached = {name: batch[name] for name in ("keep_mask", "exemplar", "key")} | moments
        got, _ = module.losses(cached)
    # The moments come from batches of four instead of eight.
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def draw(module: DiffusionTraining, keys: range) -> tuple[Tensor, Tensor, Tensor]:
    """Timesteps, noise and null-drop of one batch of samples with these keys."""
    return module.draw(torch.Size([len(keys), 4, 8, 8]), [torch.Generator().manual_seed(key) for key in keys])


def test_logit_normal_timesteps(make_module: Callable[..., DiffusionTraining]) -> None:
    t, _, _ = draw(make_module("training.timesteps=logit_normal"), range(4000))
    z = torch.logit((t.double() + 0.5) / 1000)
    assert t.min() >= 0 and t.max() <= 999
    assert abs(z.mean()) < 4 / 4000**0.5  # four standard deviations, here and below
    assert abs(z.std() - 1) < 4 / (2 * 4000) ** 0.5
    t, _, _ = draw(make_module(), range(4000))
    assert abs(t.double().mean() - 499.5) < 4 * 288.7 / 4000**0.5


@pytest.mark.parametrize("timesteps", ["uniform", "logit_normal"])
def test_timesteps_that_sampling_never_takes_are_not_trained(
    make_module: Callable[..., DiffusionTraining], timesteps: str
) -> None:
    t, _, _ = draw(make_module("model.last_level=0.4", f"training.timesteps={timesteps}"), range(4000))
    assert 400 <= t.min() < 420 and 980 < t.max() <= 999
    assert abs(t.double().mean() - 699.5) < 4 * 173.2 / 4000**0.5  # both are symmetric; uniform is the wider one


def test_offset_noise_is_one_constant_per_channel(make_module: Callable[..., DiffusionTraining]) -> None:
    _, plain, _ = draw(make_module(), range(2000))
    _, offset, _ = draw(make_module("training.offset_noise=0.1"), range(2000))
    added = offset - plain
    torch.testing.assert_close(added, added[..., :1, :1].expand_as(added), rtol=0, atol=1e-6)
    constants = added[..., 0, 0].flatten()
    assert abs(constants.std() - 0.1) < 4 * 0.1 / (2 * 8000) ** 0.5  # four standard deviations
    assert abs(constants.mean()) < 4 * 0.1 / 8000**0.5


def test_the_tower_can_have_a_learning_rate_of_its_own(fit: Fit, make_config: MakeConfig, tmp_path: Path) -> None:
    options = ["training.train_tower=true", "training.warmup_steps=0"]
    run, _ = fit(make_config(*options, "training.tower_lr_scale=0.1", "trainer.max_steps=1"), tmp_path)
    rest, tower = run.trainer.optimizers[0].param_groups
    assert (rest["lr"], tower["lr"]) == pytest.approx((1e-3, 1e-4))
    names = {id(p): name for name, p in run.module.named_parameters()}
    assert all(names[id(p)].startswith(TOWER) for p in tower["params"])
    assert not any(names[id(p)].startswith(TOWER) for p in rest["params"])
    changed = make_config(*options, "training.tower_lr_scale=0.5", "trainer.max_steps=2")
    run, _ = fit(changed, tmp_path, resume=tmp_path / "checkpoints" / "last.ckpt")
    assert [group["lr"] for group in run.trainer.optimizers[0].param_groups] == pytest.approx([1e-3, 5e-4])


def test_the_fused_optimizer_computes_the_same(fit: Fit, make_config: MakeConfig, tmp_path: Path) -> None:
    losses = []
    for name in ("adamw", "adamw_fused"):
        run, _ = fit(make_config(f"training.optimizer={name}", "trainer.max_epochs=1"), tmp_path / name)
        losses.append(float(run.trainer.callback_metrics["val/loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # the order of roundings differs, in four steps


class TestNullDrop:
    @staticmethod
    def dropped(module: DiffusionTraining, keys: range, rows: int) -> Tensor:
        """(batches, rows) of samples with these keys."""
        return torch.stack([draw(module, keys[i : i + rows])[2] for i in range(0, len(keys), rows)])

    def test_per_sample(self, make_module: Callable[..., DiffusionTraining]) -> None:
        dropped = self.dropped(make_module("training.p_uncond=0.2"), range(4000), rows=8)
        rate = dropped.float().mean().item()
        assert abs(rate - 0.2) < 4 * math.sqrt(0.2 * 0.8 / 4000)  # four standard deviations
        assert (dropped.any(1) & ~dropped.all(1)).any()  # samples of a batch are dropped separately

    def test_per_batch(self, make_module: Callable[..., DiffusionTraining]) -> None:
        module = make_module("training.p_uncond=0.2", "training.null_drop=per_batch")
        dropped = self.dropped(module, range(4000), rows=8)
        assert (dropped.any(1) == dropped.all(1)).all()
        rate = dropped[:, 0].float().mean().item()
        assert abs(rate - 0.2) < 4 * math.sqrt(0.2 * 0.8 / 500)

    @pytest.mark.parametrize(("p_uncond", "expected"), [(0, False), (1, True)])
    def test_extremes(self, p_uncond: int, expected: bool, make_module: Callable[..., DiffusionTraining]) -> None:
        dropped = self.dropped(make_module(f"training.p_uncond={p_uncond}"), range(64), rows=8)
        assert bool((dropped == expected).all())


# ---- timesteps drawn by their losses ----

LOSSES = torch.tensor([1.0, 2.0, 5.0, 2.0])


@pytest.fixture
def trained() -> LossAwareTimesteps:
    timesteps = LossAwareTimesteps(4)
    for _ in range(10):
        timesteps.record(torch.arange(4), LOSSES)
        timesteps.update(every=1)
    return timesteps


def shares(timesteps: LossAwareTimesteps, n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([timesteps.draw(generator) for _ in range(n)])
    return torch.bincount(drawn, minlength=4) / n


def test_timesteps_are_drawn_alike_until_all_are_known() -> None:
    timesteps = LossAwareTimesteps(4)
    for _ in range(20):
        timesteps.record(torch.tensor([0, 1, 2]), LOSSES[:3])
        timesteps.update(every=1)
    assert torch.equal(timesteps.weight(torch.arange(4)), torch.ones(4))
    # 4,000 draws: a share of a quarter has a standard deviation of 0.007
    torch.testing.assert_close(shares(timesteps, 4000), torch.full((4,), 0.25), atol=0.03, rtol=0)


def test_larger_losses_are_drawn_more_often_and_count_less(trained: LossAwareTimesteps) -> None:
    expected = 0.999 * LOSSES / LOSSES.sum() + 0.001 / 4
    torch.testing.assert_close(shares(trained, 4000), expected, atol=0.03, rtol=0)
    weights = trained.weight(torch.arange(4))
    torch.testing.assert_close(weights, 1 / (4 * expected))
    torch.testing.assert_close((expected * weights * LOSSES).sum(), LOSSES.mean())  # the objective of uniform draws


def test_old_losses_are_forgotten(trained: LossAwareTimesteps) -> None:
    for _ in range(10):
        trained.record(torch.tensor([2]), torch.tensor([1.0]))
        trained.update(every=1)
    expected = torch.tensor([1.0, 2.0, 1.0, 2.0]) / 6
    torch.testing.assert_close(trained.weight(torch.arange(4)), 1 / (4 * expected), rtol=5e-3, atol=0)


def test_losses_that_were_not_read_are_saved(trained: LossAwareTimesteps) -> None:
    trained.record(torch.tensor([2, 3]), torch.tensor([1.0, 9.0]))
    other = LossAwareTimesteps(4)
    other.load_state_dict(trained.state_dict())
    before = other.weight(torch.arange(4))
    for timesteps in (trained, other):
        timesteps.record(torch.tensor([2, 0]), torch.tensor([3.0, 5.0]))
        timesteps.update(every=3)
        assert torch.equal(timesteps.weight(torch.arange(4)), before)  # two batches are not three
        timesteps.update(every=2)
        assert not torch.equal(timesteps.weight(torch.arange(4)), before)
    assert torch.equal(other.weight(torch.arange(4)), trained.weight(torch.arange(4)))
    assert shares(other, 50).tolist() == shares(trained, 50).tolist()


def test_curves_by_quarters_are_means_over_steps(make_module: Callable[..., DiffusionTraining], batch: Batch) -> None:
    module, all_losses, all_t = make_module(), [], []
    for keys in (batch["key"], batch["key"] + 1000):
        part = {name: tensor[:1] for name, tensor in {**batch, "key": keys}.items()}
        losses, t = module.losses(part)
        all_losses.append(losses.detach())
        all_t.append(t)
        module.training_step(part, 0)
    losses, quarter = torch.cat(all_losses), torch.cat(all_t) // 250
    expected = {f"train/loss_t{q + 1}of4": losses[quarter == q].mean().item() for q in quarter.unique().tolist()}
    assert len(expected) < 4  # no value for a quarter without samples
    assert module.read_curves() == pytest.approx({**expected, "train/loss": losses.mean().item()}, rel=1e-5)
    assert module.read_curves() == {}
