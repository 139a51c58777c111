"""Training in pixel space: losses against formulas, sample by sample, and what runs refuse, log and end with."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import Callback
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.utils.data import default_collate

from ldm.config import Config, ConfigError
from ldm.data.image_folder import ImageDataset
from ldm.files import UserError
from ldm.pixel_diffusion import Classifier, PixelDiffusion, load_pixel_model
from ldm.training.module import NonFiniteError, lr_factor
from ldm.training.pixel_module import PixelTraining
from ldm.training.run import Run
from tests.training.conftest import MakeConfig, column, filled, last, train

FIXED = ("model.variance=posterior", "model.unet.out_channels=1")
SIMPLE = (*FIXED, "training.objective=simple")
EDM = (*SIMPLE, "model.schedule.name=edm")
TWICE = "model.unet.in_channels=2"
SELF = (TWICE, "model.input_channels=[x_t,x_0_pred]", "training.self_condition_rate=0.5")
UPSAMPLER = (TWICE, "model.input_channels=[x_t,low_res]", "model.small_size=4")
BAR = {"rtol": 1e-4, "atol": 1e-5}  # of float32 through the network; another batch is another order of sums

Batch = dict[str, Any]


def batch_of(config: Config, *indexes: int) -> Batch:
    data = ImageDataset(config, "train")
    return default_collate([data[0, i] for i in indexes or range(6)])


# --- One loss, computed by its formula --------------------------------------------------------------------------------


def expected_loss(module: PixelTraining, x_0: Tensor, label: Tensor, key: Tensor) -> Tensor:
    """The loss of one sample, () float64: draws in the order t, (sigma), eps, (offset), two uniform numbers."""
    config, options, T = module.config, module.options, module.config.schedule.num_timesteps
    generator = torch.Generator().manual_seed(int(key))
    t = int(torch.randint(T, (), generator=generator))
    edm = config.schedule.name == "edm"
    sigma = math.exp(-1.2 + 1.2 * float(torch.randn((), generator=generator))) if edm else 0.0
    eps = torch.randn(x_0.shape, generator=generator)
    if options.offset_noise:
        eps = eps + options.offset_noise * torch.randn(x_0.shape[0], 1, 1, generator=generator)
    u_label, u_self = torch.rand(2, generator=generator).tolist()
    classes = label[None] if u_label >= options.p_uncond else torch.tensor([-1])
    inputs: list[Tensor] = []
    if config.small_size:
        small = F.avg_pool2d(x_0[None], x_0.shape[-1] // config.small_size)
        inputs = [F.interpolate(small, x_0.shape[1:], mode="bilinear")]
    if edm:  # Karras et al. 2022, Table 1, with sigma_data 0.5
        noisy, total = x_0 + sigma * eps, sigma**2 + 0.25
        F_out = module.unet((noisy / math.sqrt(total))[None], torch.tensor([math.log(sigma) / 4]), classes)[0]
        denoised = 0.25 / total * noisy + sigma * 0.5 / math.sqrt(total) * F_out
        return total / (sigma * 0.5) ** 2 * (denoised - x_0).square().mean().double()
    f = [math.cos((n / T + 0.008) / 1.008 * math.pi / 2) ** 2 for n in range(T + 1)]  # iDDPM, Eq. 17
    betas = [min(1 - f[n + 1] / f[n], 0.999) for n in range(T)]
    ac = [math.prod(1 - beta for beta in betas[: n + 1]) for n in range(T)]
    alpha, noise = math.sqrt(ac[t]), math.sqrt(1 - ac[t])
    x_t = alpha * x_0 + noise * eps

    def x_0_of(prediction: Tensor) -> Tensor:
        by_kind = {"eps": (x_t - noise * prediction) / alpha, "v": alpha * x_t - noise * prediction, "x0": prediction}
        return by_kind[config.parameterization]

    def network(*further: Tensor) -> Tensor:
        return module.unet(torch.cat([x_t[None], *inputs, *further], dim=1), torch.tensor([t]), classes)[0]

    if "x_0_pred" in config.input_channels:
        first = x_0_of(network(torch.zeros_like(x_0)[None])[:1])
        output = network((first if u_self < options.self_condition_rate else torch.zeros_like(x_0))[None])
    else:
        output = network()
    prediction, rest = output[:1], output[1:]
    expected = {"eps": eps, "v": alpha * eps - noise * x_0, "x0": x_0}[config.parameterization]
    error = (prediction - expected).square().mean().double()
    if options.objective == "simple":
        return error
    assert t > 0, "at t = 0 the term is a likelihood, which other tests compute"
    before, kept = ac[t - 1], 1 - betas[t]
    posterior = betas[t] * (1 - before) / (1 - ac[t])  # DDPM, Eqs. 6 and 7

    def mean(x: Tensor) -> Tensor:
        return (math.sqrt(before) * betas[t] * x + math.sqrt(kept) * (1 - before) * x_t).double() / (1 - ac[t])

    log_variance = torch.tensor(math.log({"posterior": posterior}.get(config.variance, betas[t])))
    if config.variance == "learned_range":  # iDDPM, Eq. 15
        share = (rest.double() + 1) / 2
        log_variance = share * math.log(betas[t]) + (1 - share) * math.log(posterior)
    p = Normal(mean(x_0_of(prediction)), (log_variance / 2).exp())
    term = kl_divergence(Normal(mean(x_0), math.sqrt(posterior)), p).mean() / math.log(2)
    weight = T / 1000 if options.vlb_weight is None else options.vlb_weight
    return T * term if options.objective == "vlb" else error + weight * term


@pytest.mark.parametrize(
    "overrides",
    [
        *(pytest.param((*SIMPLE, f"model.parameterization={kind}"), id=kind) for kind in ("eps", "v", "x0")),
        pytest.param(("model.parameterization=v",), id="hybrid"),
        pytest.param(("training.vlb_weight=1.0",), id="hybrid with a weight"),
        pytest.param(("training.objective=vlb",), id="vlb"),
        pytest.param(("training.objective=vlb", *FIXED), id="vlb, posterior variance"),
        pytest.param(("training.objective=vlb", FIXED[1], "model.variance=beta"), id="vlb, variance beta"),
        pytest.param(EDM, id="edm"),
        pytest.param((*SIMPLE, "training.offset_noise=0.3"), id="offset noise"),
        pytest.param((*SIMPLE, "training.p_uncond=0.5"), id="labels dropped"),
        pytest.param((*SIMPLE, "model.unet.num_classes=null"), id="no labels"),
        pytest.param((*SIMPLE, *SELF, "model.parameterization=v"), id="self-conditioning"),
        pytest.param(UPSAMPLER, id="upsampler"),
    ],
)
def test_a_sample_s_loss_is_its_formula_s(overrides: tuple[str, ...], pixel_config: MakeConfig) -> None:
    """Each sample alone and by formula, all in one batch and by the module: neighbours do not matter either."""
    config = pixel_config(*overrides)
    module, batch = filled(config), batch_of(config)
    with torch.no_grad():
        losses, t = module.losses(batch)
        samples = zip(batch["image"], batch["label"], batch["key"], strict=True)
        expected = torch.stack([expected_loss(module, *sample) for sample in samples])
    torch.testing.assert_close(losses.double(), expected, **BAR)
    assert len(set(t.tolist())) > 3 and len(set(losses.tolist())) == len(losses)


def test_the_bound_trains_only_the_variance_in_the_hybrid(pixel_config: MakeConfig) -> None:
    """iDDPM, section 3.1: the gradient of the mean is that of the error alone, that of the variance the bound's."""
    gradients = {}
    for name, overrides in (("hybrid", ("training.vlb_weight=2.0",)), ("vlb", ("training.objective=vlb",))):
        config = pixel_config(*overrides)
        module = filled(config)
        module.losses(batch_of(config))[0].mean().backward()
        gradients[name] = module.unet.out[2].weight.grad
    plain = filled(config := pixel_config("training.vlb_weight=0.0"))
    plain.losses(batch_of(config))[0].mean().backward()
    error = plain.unet.out[2].weight.grad
    torch.testing.assert_close(gradients["hybrid"][:1], error[:1])
    assert not error[1:].any()
    torch.testing.assert_close(gradients["hybrid"][1:], 2 * gradients["vlb"][1:] / 100)  # T = 100
    assert gradients["vlb"][:1].abs().max() > 0  # where the bound trains alone it trains the mean as well


def test_immiscible_noise_is_assigned_and_is_the_target(pixel_config: MakeConfig) -> None:
    """Of all orders of a batch's noises the nearest one; t stays, and the loss is that of images with their noises."""
    config = pixel_config(*SIMPLE, "training.immiscible=true")
    module, batch = filled(config), batch_of(config, 3, 8, 11, 20)
    draws = []
    for key in batch["key"].tolist():
        generator = torch.Generator().manual_seed(key)
        draws.append((torch.randint(100, (), generator=generator), torch.randn(1, 8, 8, generator=generator)))
    t, eps = (torch.stack(column) for column in zip(*draws, strict=True))
    orders = list(itertools.permutations(range(4)))
    best = min(orders, key=lambda order: (batch["image"] - eps[list(order)]).flatten(1).norm(dim=1).sum())
    assert best != orders[0]  # there is something to assign
    with torch.no_grad():
        losses, got_t = module.losses(batch)
        expected = module.loss(batch["image"], t, eps[list(best)], batch["label"], objective="simple")
        plain = module.loss(batch["image"], t, eps, batch["label"], objective="simple")
    assert got_t.equal(t)
    torch.testing.assert_close(losses, expected, **BAR)
    assert not torch.allclose(losses, plain, **BAR)


@pytest.mark.parametrize(
    ("overrides", "stage"),
    [((), "diffusion"), ((*SIMPLE, *SELF, "training.p_uncond=0.5"), "diffusion"), ((), "classifier")],
)
def test_losses_do_not_depend_on_the_batch(overrides: tuple[str, ...], stage: str, pixel_config: MakeConfig) -> None:
    config = pixel_config(*overrides, stage=stage)
    module = filled(config)
    with torch.no_grad():
        together = module.losses(batch_of(config, 5, 2, 9))[0]
        other = module.losses(batch_of(config, 7, 9, 4))[0]
        alone = module.losses(batch_of(config, 9))[0]
    for loss in (together[2], other[1]):
        torch.testing.assert_close(loss, alone[0], **BAR)


def test_the_classifier_s_loss(pixel_config: MakeConfig) -> None:
    """Cross-entropy on the noisy image at its timestep; accuracy is that of the likeliest class."""
    config = pixel_config(stage="classifier")
    module, batch = filled(config), batch_of(config)
    with torch.no_grad():
        losses, correct = module.losses(batch)
        for i, key in enumerate(batch["key"].tolist()):
            generator = torch.Generator().manual_seed(key)
            t = torch.randint(100, (), generator=generator)
            eps = torch.randn(1, 8, 8, generator=generator)
            ac = module.ac[t].float()
            logits = module((ac.sqrt() * batch["image"][i] + (1 - ac).sqrt() * eps)[None], t[None])[0]
            expected = logits.logsumexp(0) - logits[batch["label"][i]]
            torch.testing.assert_close(losses[i], expected, **BAR)
            assert bool(correct[i]) == (int(logits.argmax()) == int(batch["label"][i]))


# --- Runs -------------------------------------------------------------------------------------------------------------


def test_linear_annealing_ends_at_zero(pixel_config: MakeConfig, tmp_path: Path) -> None:
    """As guided-diffusion's lr_anneal_steps: step n of N has 1 - n / N, also behind a warm-up."""
    config = pixel_config("training.lr_schedule=linear", "training.base_lr=1.0e-3", "trainer.max_steps=4")
    train(config, tmp_path)
    assert column(tmp_path, "train/lr") == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    scheduler = last(tmp_path)["lr_schedulers"][0]
    assert scheduler["_last_lr"] == [0.0]
    factor = lr_factor(10, "linear", 110)
    assert [factor(n) for n in (10, 60, 110, 200)] == pytest.approx([1.0, 0.5, 0.0, 0.0])


def test_losses_of_timesteps_are_recorded(pixel_config: MakeConfig, tmp_path: Path) -> None:
    config = pixel_config("training.timesteps=loss_aware", "training.objective=vlb", "trainer.max_steps=3")
    train(config, tmp_path)
    state = last(tmp_path)["timesteps"]
    assert int(state["counts"].sum()) + state["pending"].shape[-1] * len(state["pending"]) >= 8
    assert float(state["losses"].max()) > 0
    assert all(math.isfinite(value) for value in column(tmp_path, "train/loss"))


class Poison(Callback):
    """Makes a weight NaN before a step."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 1:
            with torch.no_grad():
                next(pl_module.parameters()).fill_(float("nan"))


@pytest.mark.parametrize("stage", ["diffusion", "classifier"])
def test_a_nan_stops_the_run(stage: str, pixel_config: MakeConfig, tmp_path: Path) -> None:
    config = pixel_config("logging.checkpoint_every=1", "trainer.max_steps=3", stage=stage)
    with pytest.raises(NonFiniteError, match=r"loss is nan at step 1 or before.*lower learning rate"):
        train(config, tmp_path, callbacks=[Poison()])
    state = last(tmp_path)
    assert state["global_step"] == 1 and all(tensor.isfinite().all() for tensor in state["state_dict"].values())


@pytest.mark.parametrize("stage", ["diffusion", "classifier"])
def test_mixed_precision(stage: str, pixel_config: MakeConfig, tmp_path: Path) -> None:
    """The first loss, before any step, is that of float32 to bfloat16's 8 bits; weights stay float32."""
    losses, start = [], tmp_path / "start.ckpt"
    torch.save({"state_dict": filled(pixel_config(stage=stage)).state_dict()}, start)
    for precision in ("32-true", "bf16-mixed"):
        train(pixel_config(f"trainer.precision={precision}", stage=stage), tmp_path / precision, weights=start)
        losses.append(column(tmp_path / precision, "train/loss")[0])
        assert {tensor.dtype for tensor in last(tmp_path / precision)["state_dict"].values()} == {torch.float32}
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.02)


WRONG = {
    "stage: got classifier, expected diffusion with model.kind pixel": ("stage=classifier",),
    "stage: got first_stage, expected diffusion with model.kind pixel": ("stage=first_stage",),
    "stage: got diffusion, expected classifier with model.kind classifier": ("model.kind=classifier",),
    "data.kind: got images": ("model.kind=latent", "model.input_channels=[x_t,z_masked,keep_mask]"),
    "data.kind: got coco": ("data.kind=coco",),
    "training.objective: got hybrid": FIXED,
    "training.objective: got simple": ("training.objective=simple",),
    "model.schedule.name: got edm": (*EDM, "training.timesteps=loss_aware"),
    "model.image_size: got 9, expected a multiple of 2": ("model.image_size=9",),
    "model.unet.in_channels: got 1, expected 2": ("model.input_channels=[x_t,low_res]",),
    "model.unet.context_dim: got 16, expected 0": ("model.unet.context_dim=16",),
    "logging.fid_every: got 5": ("logging.fid_every=5", "stage=classifier", "model.kind=classifier"),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_together_is_one_line(message: str, pixel_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        Run(pixel_config(*WRONG[message]), tmp_path)
    assert "\n" not in str(caught.value) and "expected" in str(caught.value)


@pytest.mark.parametrize(
    ("stage", "key"), [("diffusion", "model.unet.num_classes"), ("classifier", "model.classifier.num_classes")]
)
def test_the_number_of_classes_is_the_data_s(stage: str, key: str, pixel_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(f"10 classes (0000, 0001, 0002, 0003, 0004 …), but {key} is 12")):
        Run(pixel_config(f"{key}=12", stage=stage), tmp_path)


@pytest.mark.parametrize(
    ("stage", "command"),
    [
        ("diffusion", "python scripts/sample_images.py {}"),
        ("classifier", "python scripts/sample_images.py MODEL --classifier {}"),
    ],
)
def test_the_end_names_the_command_that_uses_the_run(
    stage: str, command: str, pixel_config: MakeConfig, tmp_path: Path
) -> None:
    run, _ = train(pixel_config(stage=stage), tmp_path)
    path = tmp_path / "checkpoints" / "last.ckpt"
    assert run.result().splitlines()[-1] == "next: " + command.format(path)
    model = load_pixel_model(path, tmp_path / "config.yaml")  # the averaged weights, by their plain names
    assert isinstance(model, Classifier if stage == "classifier" else PixelDiffusion)
    for name, tensor in last(tmp_path)["state_dict"].items():
        assert torch.equal(model.state_dict()[name], tensor), name
