"""Samplers and losses against improved-diffusion and denoising-diffusion-pytorch, whose UNet is in lineage_unet.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ldm.config import ScheduleConfig, UNetConfig
from ldm.diffusion import NoiseSchedule, Reverse, karras_sigmas, min_snr_weight, p_mean_variance, q_sample
from ldm.pixel_diffusion import Guidance, PixelDiffusion, _Denoiser
from ldm.samplers import (
    _ddim_step,
    classifier_free,
    ddim_steps,
    heun,
    invert,
    repaint,
    repaint_steps,
    spaced_timesteps,
)
from tests.lineage import Draws, facts, lineage, near, pixel_model, relative, schedule_of, their_schedule
from tests.lineage_unet import LineageUNet

STEP, TRAJECTORY = 2e-5, 1e-4  # theirs differ from themselves by up to 4e-6 and 1e-5
OBJECTIVES = {"pred_noise": "eps", "pred_x0": "x0", "pred_v": "v"}
UNETS = ("plain", "self_cond", "learned_var", "flash_full", "wide", "learned_sin")


# --- Timesteps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", sorted(key for key in lineage("improved_schedules") if key.endswith("/timesteps")))
def test_spaced_timesteps(key: str) -> None:
    chain, _, text, _ = key.split("/")
    T = int(chain.lstrip("lineracos"))
    assert spaced_timesteps(T, text)[::-1] == lineage("improved_schedules")[key].tolist()


@pytest.mark.parametrize("T", [1000, 4000])
def test_which_numbers_of_ddim_steps_there_are(T: int) -> None:
    accepted = []
    for n in range(1, T + 1):
        try:
            accepted.append(len(spaced_timesteps(T, f"ddim{n}")))
        except ValueError as error:
            assert str(n) in str(error)  # theirs names T, not what was asked for
    assert accepted == facts("improved_schedules")["ddimN_accepted"][str(T)]


@pytest.mark.parametrize("text", ["ddim0", "ddim-5", "ddim", "0", "1001", "ten", "500,501", "3,,3", "-1"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="timesteps"):
        spaced_timesteps(1000, text)


# --- Single steps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_single_steps(name: str) -> None:
    golden, schedule = lineage("improved_process"), schedule_of(name)
    x_t, t, ac = golden[f"{name}/q_sample"], golden["in/t"], schedule.alphas_cumprod
    output, noise = golden["in/model_output"], golden["in/step_noise"]
    p = p_mean_variance(output, x_t, t, schedule, variance="learned_range", clip=True)
    drawn = (0.5 * p.log_variance).exp() * noise * (t > 0).reshape(-1, 1, 1, 1)
    near(p.mean + drawn, golden[f"{name}/step/p_sample"], STEP)
    for i, k in enumerate(t.tolist()):
        x, eps = x_t[i : i + 1], output[i : i + 1, :3]
        for eta in (0.0, 0.6, 1.0):
            _, *step = next(ddim_steps(ac, [k, k - 1] if k else [0], eta))
            got = _ddim_step(x, eps, *step, clip=True)[0] + step[-1] * noise[i : i + 1]
            near(got, golden[f"{name}/step/ddim_eta{eta}"][i : i + 1], STEP)
        for clip, key in ((True, "ddim_reverse"), (False, "ddim_reverse_noclip")):
            timesteps = [k + 1, k] if k + 1 < len(ac) else [k]
            got, _ = next(invert(lambda x, t, eps=eps: eps, x, ac, timesteps, clip))
            near(got, golden[f"{name}/step/{key}"][i : i + 1], STEP, of_largest=not clip)


def test_steps_of_a_shorter_chain() -> None:
    golden = lineage("improved_process")
    schedule = schedule_of("cosine", 4000).spaced(spaced_timesteps(4000, "ddim25")[::-1])
    x_t, t, ac = golden["spaced/q_sample"], golden["spaced/t"], schedule.alphas_cumprod
    output, noise = golden["in/model_output"], golden["in/step_noise"]
    p = p_mean_variance(output, x_t, t, schedule, variance="learned_range", clip=True)
    drawn = (0.5 * p.log_variance).exp() * noise * (t > 0).reshape(-1, 1, 1, 1)
    near(p.mean + drawn, golden["spaced/p_sample"], STEP)
    for i, k in enumerate(t.tolist()):
        _, *step = next(ddim_steps(ac, [k, k - 1] if k else [0], 0.5))
        got = _ddim_step(x_t[i : i + 1], output[i : i + 1, :3], *step, clip=True)[0] + step[-1] * noise[i : i + 1]
        near(got, golden["spaced/ddim_eta0.5"][i : i + 1], STEP)


# --- denoising-diffusion-pytorch: network and losses ------------------------------------------------------------------


def network(name: str) -> LineageUNet:
    return LineageUNet(facts("ddp_unet")["configs"][name], f"lineage/ddp/{name}/")


@pytest.mark.parametrize("name", UNETS)
def test_their_unet(name: str) -> None:
    golden, unet = lineage("ddp_unet"), network(name)
    x, t = golden[f"{name}/x"], golden[f"{name}/t"]
    if name == "self_cond":
        near(unet(torch.cat([x, torch.zeros_like(x)], 1), t), golden[f"{name}/out_without_self_cond"], STEP)
        x = torch.cat([x, golden[f"{name}/x_self_cond"]], dim=1)
    out = unet(x, t)
    near(out, golden[f"{name}/out"], STEP)
    (out * golden[f"{name}/grad_weight"]).sum().backward()
    for key, expected in golden.items():
        if key.startswith(f"{name}/grad/"):
            near(unet.get_parameter(key.removeprefix(f"{name}/grad/")).grad, expected, STEP, of_largest=True)


def with_their_unet(
    name: str, schedule: ScheduleConfig, objective: str = "pred_noise", **settings: Any
) -> PixelDiffusion:
    unet = network(name)
    twice, doubled = 1 + unet.twice, unet.final_conv.out_channels // unet.channels
    config = UNetConfig(
        in_channels=3 * twice,
        out_channels=3 * doubled,
        model_channels=32,
        channel_mult=[1],
        num_res_blocks=1,
        attention_resolutions=[],
        num_heads=1,
        context_dim=0,
    )
    inputs = ["x_t", "x_0_pred"][:twice]
    variance = "learned_range" if doubled == 2 else "posterior"
    settings = {"parameterization": OBJECTIVES[objective], "input_channels": inputs, "variance": variance, **settings}
    model = pixel_model(config, schedule, **settings)
    model.model["diffusion_model"] = unet
    return model


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """x_0 in [-1, 1], t, noise."""
    golden = lineage("ddp_losses")
    return golden["images_01"] * 2 - 1, golden["t"], golden["noise"]


def weighted(model: PixelDiffusion, eps: Tensor, *, gamma: float = math.inf, x_0: Tensor | None = None) -> Tensor:
    """The loss with its weights; they have them always."""
    images, t, _ = batch()
    losses = model.loss(images if x_0 is None else x_0, t, eps)
    return losses * min_snr_weight(t, gamma, model.parameterization, model.schedule.alphas_cumprod)


def check_losses(got: Tensor, key: str, schedule: str) -> None:
    """Through a network and with weights: those of theirs are off near t = 0, see test_loss_weights."""
    _, t, _ = batch()
    ac = schedule_of(schedule).alphas_cumprod[t]
    expected = lineage("ddp_losses")[key].double()
    bar = (3e-5 if schedule == "sigmoid" else 1e-6) + 6e-8 / (1 - ac)
    assert ((got.detach().double() - expected).abs() <= expected * bar).all(), (got, expected, bar)


@pytest.mark.parametrize(("schedule", "objective"), product(("sigmoid", "linear"), OBJECTIVES))
def test_losses(schedule: str, objective: str) -> None:
    _, _, noise = batch()
    model, prefix = with_their_unet("plain", their_schedule(schedule), objective), f"{schedule}/{objective}"
    check_losses(weighted(model, noise), f"{prefix}/plain/loss", schedule)
    check_losses(weighted(model, noise, gamma=5.0), f"{prefix}/min_snr/loss", schedule)
    if schedule == "sigmoid":
        golden = lineage("ddp_losses")
        offset = 0.1 * golden["offset_draw"][:, :, None, None]
        check_losses(weighted(model, noise + offset), f"{prefix}/offset/loss", schedule)
        check_losses(weighted(model, noise, x_0=golden["images_01"]), f"{prefix}/raw_range/loss", schedule)
    model.requires_grad_(True)
    weighted(model, noise).mean().backward()
    gradient = model.unet.init_conv.bias.grad
    assert gradient is not None
    near(gradient, lineage("ddp_losses")[f"{prefix}/plain/grad_init_conv_bias"], 1e-3, of_largest=True)


def test_immiscible_noise_takes_its_target_along() -> None:
    """Each image gets the noise that is near to it; in theirs the target stays that of the image's old noise."""
    golden, (x_0, _, noise) = lineage("ddp_losses"), batch()
    cost = torch.cdist(x_0.flatten(1), noise.flatten(1))
    order = torch.from_numpy(linear_sum_assignment(cost)[1])
    assert order.tolist() == golden["immiscible/assignment"].tolist()
    for objective in ("pred_noise", "pred_v"):
        model = with_their_unet("plain", their_schedule("sigmoid"), objective)
        check_losses(weighted(model, noise[order]), f"immiscible/{objective}/loss_with_permuted_target", "sigmoid")


@pytest.mark.parametrize(("objective", "taken"), product(("pred_noise", "pred_v"), (True, False)))
def test_self_conditioning(objective: str, taken: bool) -> None:
    (x_0, t, noise), model = batch(), with_their_unet("self_cond", their_schedule("sigmoid"), objective)
    losses = model.loss(x_0, t, noise, self_condition=torch.full((4,), taken))
    losses = losses * min_snr_weight(t, math.inf, model.parameterization, model.schedule.alphas_cumprod)
    check_losses(losses, f"self_condition/taken_{taken}/{objective}/loss", "sigmoid")


def test_self_conditioning_is_a_choice_of_each_sample() -> None:
    """Theirs draws once for a batch."""
    (x_0, t, noise), model = batch(), with_their_unet("self_cond", their_schedule("sigmoid"))
    runs = {taken: model.loss(x_0, t, noise, self_condition=torch.full((4,), taken)) for taken in (True, False)}
    mixed = torch.tensor([True, False, False, True])
    near(model.loss(x_0, t, noise, self_condition=mixed), torch.where(mixed, runs[True], runs[False]), 1e-4)


# --- denoising-diffusion-pytorch: samples -----------------------------------------------------------------------------


def run(
    model: PixelDiffusion, key: str, patch: pytest.MonkeyPatch, chain: NoiseSchedule | None = None, **options: Any
) -> Tensor:
    """Sample from recorded noise; return x_T and x after every step in [0, 1], (B, S + 1, ...)."""
    draws = Draws(lineage("ddp_samples")[f"{key}/draws"], patch)
    if chain is not None:
        patch.setattr(model, "chain", lambda sampler, steps: chain)
    states = [draws()]
    model.sample(states[0], on_step=lambda s, n, x, x_0: states.append(x), **options)
    return (torch.stack(states, dim=1) + 1) / 2


def their_ddim(model: PixelDiffusion, steps: int) -> NoiseSchedule:
    """T - 1 and evenly down to -1, which is x_0."""
    times = torch.linspace(-1, len(model.schedule.betas) - 1, steps + 1).int()[1:].tolist()
    return model.schedule.spaced(times)


@pytest.mark.parametrize("objective", ["pred_noise", "pred_v"])
@pytest.mark.parametrize("kind", ["ddpm8", "ddim5of40_eta0.0", "ddim5of40_eta1.0"])
def test_samples(kind: str, objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule, key = their_schedule("sigmoid", 8), f"{kind}/{objective}"
    schedule = schedule if kind == "ddpm8" else their_schedule("cosine", 40)
    model = with_their_unet("plain", schedule, objective)
    if kind == "ddpm8":
        got = run(model, key, monkeypatch, sampler="ddpm", steps="8")
    else:
        got = run(model, key, monkeypatch, their_ddim(model, 5), sampler="ddim", steps="5", eta=float(kind[-3:]))
    near(got, lineage("ddp_samples")[f"{key}/out"], TRAJECTORY, of_largest=True)


@pytest.mark.parametrize("kind", ["ddpm6", "ddim3of9"])
def test_samples_with_self_conditioning(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is shown the clipped prediction of the one before."""
    model = with_their_unet("self_cond", their_schedule("sigmoid", 6 if kind == "ddpm6" else 9), "pred_v")
    chain = None if kind == "ddpm6" else their_ddim(model, 3)
    got = run(model, f"self_cond_{kind}", monkeypatch, chain, sampler=kind[:4], steps="6" if chain is None else "3")
    near(got, lineage("ddp_samples")[f"self_cond_{kind}/out"], TRAJECTORY)


# --- EDM --------------------------------------------------------------------------------------------------------------


def edm() -> PixelDiffusion:
    return with_their_unet("learned_sin", ScheduleConfig(name="edm"))


def test_edm_loss_and_preconditioning() -> None:
    golden, model = lineage("ddp_losses"), edm()
    x_0, sigma, noise = golden["images_01"] * 2 - 1, golden["elucidated/sigma"], golden["elucidated/noise"]
    x = golden["elucidated/denoised_in"]
    got = model.network(x / (1 + sigma**2).sqrt().reshape(-1, 1, 1, 1), sigma)
    near(got, golden["elucidated/denoised"], STEP, of_largest=True)
    relative(model.loss(x_0, sigma, noise), golden["elucidated/loss"], 5e-6)
    relative((sigma**2 + 0.25) / (sigma * 0.5) ** 2, golden["elucidated/loss_weight"], 1e-6)


def test_edm_noise_levels() -> None:
    sigmas = torch.tensor([*karras_sigmas(6, 0.002, 80.0), 0.0])
    near(sigmas, lineage("ddp_samples")["elucidated/sigmas"], 2e-6, of_largest=True)
    assert karras_sigmas(1, 0.002, 80.0) == pytest.approx([80.0])


@pytest.mark.parametrize("kind", ["heun6", "heun6_nochurn", "heun6_noclamp"])
def test_edm_sampler(kind: str) -> None:
    """Their defaults of churn: 80, for noise from 0.05 to 50, 0.3 % more of it. They draw noise without a use too."""
    golden, model = lineage("ddp_samples"), edm()
    start, *noises = golden[f"elucidated/{kind}/draws"]
    chain = model.chain("heun", "6")
    sigmas = chain.sigmas.tolist()[::-1]
    denoiser = _Denoiser(model, chain, None, None, Guidance(), "noclamp" not in kind)
    churn = {"churn": 80.0, "churn_range": (0.05, 50.0), "churn_noise": 1.003} if kind != "heun6_nochurn" else {}
    used = iter([z for z, s in zip(noises, sigmas, strict=True) if 0.05 <= s <= 50])
    with torch.no_grad():
        *_, (x, _) = heun(denoiser.x_0_at, start * sigmas[0], sigmas, lambda: next(used), **churn)
    expected = golden[f"elucidated/{kind}/out"]
    near(((x.clamp(-1, 1)) + 1) / 2, expected, TRAJECTORY)


def test_dpm_solver_on_edm_noise_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    golden, model = lineage("ddp_samples"), edm()
    draws = golden["elucidated/dpmpp6/draws"]
    # theirs starts from 80 times the noise, and the process at 80 has the image's own variance too: 1 / sqrt(6401)
    out = model.sample(draws[0] * (80 / math.sqrt(6401)), sampler="dpm_solver_pp", steps="6", clip=False)
    near((out.clamp(-1, 1) + 1) / 2, golden["elucidated/dpmpp6/out"], TRAJECTORY)


# --- Guidance without a classifier ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [3.0, 6.0])
@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("plain", {}),
        ("no_parallel", {"parallel": 0.0}),
        ("parallel0.4", {"parallel": 0.4}),
        ("no_parallel_rescale0.7", {"parallel": 0.0, "rescale": 0.7}),
        ("plain_rescale0.7", {"rescale": 0.7}),
    ],
)
def test_classifier_free_guidance(scale: float, key: str, options: dict[str, float]) -> None:
    golden = lineage("ddp_classifier_free")
    got = classifier_free(golden["cond"], golden["null"], scale, **options)
    near(got, golden[f"scale{scale}/{key}"], STEP)


def test_classifier_free_guidance_at_its_ends() -> None:
    golden = lineage("ddp_classifier_free")
    cond, null = golden["cond"], golden["null"]
    for options in ({}, {"rescale": 0.7}, {"parallel": 0.0}):
        near(classifier_free(cond, null, 1.0, **options), cond, 1e-6)
        near(classifier_free(cond, cond, 5.0, **options), cond, 1e-6)
    near(classifier_free(cond, null, 0.0), null, 1e-6)
    near(golden["mask_10"][1], null[1], 1e-6)  # the second sample's label was dropped


# --- RePaint ----------------------------------------------------------------------------------------------------------


def plain_repaint_steps(T: int, jump: int, resamples: int) -> list[int]:
    """The paper's listing: https://arxiv.org/abs/2201.09865, appendix B, with T steps."""
    jumps = dict.fromkeys(range(0, T - jump, jump), resamples - 1)
    t, steps = T, []
    while t >= 1:
        t -= 1
        steps.append(t)
        if jumps.get(t, 0) > 0:
            jumps[t] -= 1
            for _ in range(jump):
                t += 1
                steps.append(t)
    return [*steps, -1]


@pytest.mark.parametrize(("T", "jump", "resamples"), [(250, 10, 10), (20, 5, 3), (10, 3, 1), (6, 10, 10), (7, 1, 2)])
def test_repaint_schedule(T: int, jump: int, resamples: int) -> None:
    """A jump longer than the chain is none, where theirs fails."""
    steps = repaint_steps(T, jump, resamples)
    assert steps == plain_repaint_steps(T, jump, resamples)
    assert (steps[0], steps[-1]) == (T - 1, -1)
    assert all(abs(a - b) == 1 for a, b in pairwise(steps))


def test_repaint_against_its_algorithm() -> None:
    """Algorithm 1 in another order of its lines, on the paper's schedule; the known pixels come back exactly."""
    schedule = schedule_of("cosine", 12)
    generator = torch.Generator().manual_seed(0)
    x_0, x = torch.rand(2, 3, 4, 4, generator=generator), torch.randn(2, 3, 4, 4, generator=generator)
    keep = (torch.rand(2, 1, 4, 4, generator=generator) < 0.5).float()

    def reverse(x: Tensor, k: int) -> Reverse:
        return p_mean_variance(0.3 * x, x, k, schedule)

    def source(seed: int) -> Any:
        g = torch.Generator().manual_seed(seed)
        return lambda: torch.randn(2, 3, 4, 4, generator=g)

    *_, (got, _) = repaint(reverse, x, x_0, keep, schedule, source(1), 3, 4)
    expected = plain_repaint(reverse, x, x_0, keep, schedule, plain_repaint_steps(12, 3, 4), source(1))
    near(got, expected, 1e-5)
    whole = keep.expand_as(x_0) == 1
    assert torch.equal(got[whole], x_0[whole])


def plain_repaint(
    reverse: Any, x: Tensor, x_0: Tensor, keep: Tensor, schedule: NoiseSchedule, steps: Sequence[int], noise: Any
) -> Tensor:
    """Here the known part of step t - 1 is merged after the step; ours merges that of step t before it."""
    known = q_sample(x_0, steps[0], noise(), schedule.alphas_cumprod)
    x = keep * known + (1 - keep) * x
    for k, following in pairwise(steps):
        if following > k:
            beta = schedule.betas[following].item()
            x = math.sqrt(1 - beta) * x + math.sqrt(beta) * noise()
            known = None
            continue
        if known is None:
            x = keep * q_sample(x_0, k, noise(), schedule.alphas_cumprod) + (1 - keep) * x
        p = reverse(x, k)
        x = p.mean + (0.5 * p.log_variance).exp() * noise() if k else p.mean
        known = x_0 if following < 0 else None
        x = keep * known + (1 - keep) * x if known is not None else x
    return x


def test_repaint_continues_what_it_knows() -> None:
    """The best model of smooth data fills a hole from its surroundings better than from nothing."""
    T, schedule = 100, schedule_of("linear", 100)
    grid = torch.arange(16.0)
    covariance = torch.exp(-((grid[:, None] - grid[None]) ** 2) / 32).double() + 1e-4 * torch.eye(16).double()
    generator = torch.Generator().manual_seed(0)
    root = torch.linalg.cholesky(covariance)
    x_0 = (torch.randn(64, 16, generator=generator).double() @ root.T).float()
    keep = torch.ones(1, 16)
    keep[:, 6:10] = 0

    def reverse(x: Tensor, k: int) -> Reverse:
        ac = schedule.alphas_cumprod[k]
        gain = ac.sqrt() * covariance @ torch.linalg.inv(ac * covariance + (1 - ac) * torch.eye(16).double())
        return p_mean_variance((x.double() @ gain.T).float(), x, k, schedule, parameterization="x0")

    def noise() -> Tensor:
        return torch.randn(64, 16, generator=generator)

    errors = {}
    for resamples in (1, 5):
        *_, (x, _) = repaint(reverse, noise(), x_0, keep, schedule, noise, 10, resamples)
        assert torch.equal(x[:, :6], x_0[:, :6])
        errors[resamples] = (x - x_0)[:, 6:10].square().mean().sqrt().item()
    assert errors[5] < errors[1]
    assert errors[5] < 0.5, (T, errors)  # the data's deviation is 1, unrelated samples differ by 1.4
