"""The diffusion process against improved-diffusion's numbers, and what is computed of its schedules by others."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from ldm.config import ScheduleConfig
from ldm.diffusion import (
    NoiseSchedule,
    discretised_log_likelihood,
    make_schedule,
    min_snr_weight,
    normal_kl,
    p_mean_variance,
    prior_bpd,
    q_sample,
    target,
    vlb_term,
)
from ldm.samplers import spaced_timesteps
from ldm.training.denoising import LossAwareTimesteps
from tests.lineage import lineage, near, relative, schedule_of

SCHEDULES = ("linear", "cosine")
VARIANCES = {"learned_range": "learned_range", "fixed_small": "posterior", "fixed_large": "beta"}  # theirs => ours
C = 3  # image channels; a learned variance follows them


def keys_with(group: str, start: str, end: str) -> list[str]:
    return sorted(key for key in lineage(group) if key.startswith(start) and key.endswith(end))


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_0, noise, t and the output of a network, (6, 2 C, ...)."""
    golden = lineage("improved_process")
    return golden["in/x_0"], golden["in/noise"], golden["in/t"], golden["in/model_output"]


# --- Schedules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "T"), product(SCHEDULES, (1000, 4000)))
def test_schedules(name: str, T: int) -> None:
    golden, schedule = lineage("improved_schedules"), schedule_of(name, T)
    near(schedule.betas, golden[f"{name}{T}/betas"], 1e-12)
    near(schedule.alphas_cumprod, golden[f"{name}{T}/alphas_cumprod"], 1e-12)
    near(schedule.log_variances[0], golden[f"{name}{T}/posterior_log_variance_clipped"], 1e-12)
    if T == 1000:
        names = ("posterior_mean_coef1", "posterior_mean_coef2", "posterior_variance")
        for ours, theirs in zip(schedule.posterior, names, strict=True):
            near(ours, golden[f"{name}{T}/{theirs}"], 1e-12)


@pytest.mark.parametrize("key", keys_with("improved_schedules", "", "/timesteps"))
def test_shorter_chains(key: str) -> None:
    golden, (chain, _, _, _) = lineage("improved_schedules"), key.split("/")
    schedule = schedule_of(chain.rstrip("0123456789"), int(chain.lstrip("lineracos")))
    spaced = schedule.spaced(golden[key].tolist())
    near(spaced.betas, golden[key.replace("timesteps", "betas")], 1e-12)
    near(spaced.alphas_cumprod, golden[key.replace("timesteps", "alphas_cumprod")], 1e-12)
    near(spaced.log_variances[0], golden[key.replace("timesteps", "posterior_log_variance_clipped")], 1e-12)


@pytest.mark.parametrize("name", ["linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("T", [1000, 250])
def test_schedules_of_denoising_diffusion_pytorch(name: str, T: int) -> None:
    expected, schedule = lineage("ddp_schedules")[f"{name}{T}/betas"], schedule_of(name, T)
    if name != "sigmoid":
        near(schedule.betas, expected, 1e-12)
    else:  # its ends are rounded to float32 by them, which is seen where almost nothing of x_0 is left
        near(schedule.alphas_cumprod, (1 - expected).cumprod(0), 5e-8)
        near(schedule.betas, expected, 1e-5)


def test_offset_of_the_cosine() -> None:
    config = ScheduleConfig(name="cosine", num_timesteps=1000, cosine_s=0.02)
    near(make_schedule(config).betas, lineage("ddp_schedules")["cosine1000_s0.02/betas"], 1e-12)


def test_buffers_of_denoising_diffusion_pytorch() -> None:
    """Twelve float32 buffers in its checkpoints have our names and values."""
    golden, prefix = lineage("ddp_schedules"), "cosine1000/buffers_f32/"
    buffers = schedule_of("cosine").buffers()
    expected = {key.removeprefix(prefix): tensor for key, tensor in golden.items() if key.startswith(prefix)}
    assert expected.keys() <= buffers.keys()
    for name, tensor in expected.items():
        relative(buffers[name], tensor, 2e-7)


@pytest.mark.parametrize(
    "key", keys_with("ddp_schedules", "", "/min_snr_False") + keys_with("ddp_schedules", "", "_True")
)
def test_loss_weights(key: str) -> None:
    """Its default weights are ours with gamma = inf, those with min-SNR ours with gamma = 5."""
    name, _, objective, min_snr = key.split("/")
    parameterization = {"pred_noise": "eps", "pred_x0": "x0", "pred_v": "v"}[objective]
    gamma = 5.0 if min_snr.endswith("True") else math.inf
    ac = schedule_of(name).alphas_cumprod
    weights = min_snr_weight(torch.arange(1000), gamma, parameterization, ac)
    # They round alphas_cumprod to float32 before they subtract it from 1: 6e-8 of 4e-5 at the cleanest timesteps. And
    # the sigmoid's ends, see above.
    expected, bar = lineage("ddp_schedules")[key].double(), 3e-5 if name == "sigmoid" else 4e-7
    assert ((weights - expected).abs() <= expected * (bar + 6e-8 / (1 - ac))).all()


def test_one_step_is_a_chain() -> None:
    """Theirs fails: it looks for the variance of a second step."""
    schedule = schedule_of("cosine").spaced([999])
    assert all(table.isfinite().all() for table in (*schedule.log_variances, *schedule.posterior))
    x = torch.ones(1, 3, 2, 2)
    for variance, channels in (("posterior", 3), ("beta", 3), ("learned_range", 6)):
        p = p_mean_variance(
            torch.zeros(1, channels, 2, 2), x, torch.tensor([0]), schedule, variance=variance, clip=True
        )
        assert p.mean.isfinite().all()
        assert p.log_variance.isfinite().all()
    assert len(make_schedule(ScheduleConfig(name="linear", num_timesteps=1)).log_variances[0]) == 1


# --- What is computed of a schedule and a network's output ------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_forward_process(name: str) -> None:
    golden, (x_0, noise, t, _), schedule = lineage("improved_process"), inputs(), schedule_of(name)
    ac = schedule.alphas_cumprod[t]
    near(q_sample(x_0, t, noise, schedule.alphas_cumprod), golden[f"{name}/q_sample"], 5e-7)
    near(ac.sqrt().reshape(-1, 1, 1, 1) * x_0, golden[f"{name}/q_mean_variance/mean"], 5e-7)
    relative(1 - ac, golden[f"{name}/q_mean_variance/variance"], 1e-6)
    coef_x_0, coef_x_t, variance = (values[t].reshape(-1, 1, 1, 1) for values in schedule.posterior)
    mean = coef_x_0 * x_0 + coef_x_t * golden[f"{name}/q_sample"]
    near(mean, golden[f"{name}/q_posterior/mean"], 1e-6)
    relative(variance.flatten(), golden[f"{name}/q_posterior/variance"], 1e-6)
    relative(schedule.log_variances[0][t], golden[f"{name}/q_posterior/log_variance"], 1e-6)
    # a KL of 1e-5 bits, the difference of numbers near 1
    near(prior_bpd(x_0, schedule), golden[f"{name}/prior_bpd"], 2e-7)


@pytest.mark.parametrize(
    ("name", "mean", "theirs", "clip"), product(SCHEDULES, ("eps", "x0"), VARIANCES, (True, False))
)
def test_steps_back(name: str, mean: str, theirs: str, clip: bool) -> None:
    golden, (_, _, t, output) = lineage("improved_process"), inputs()
    output = output if theirs == "learned_range" else output[:, :C]
    options = {"parameterization": mean, "variance": VARIANCES[theirs], "clip": clip}
    p = p_mean_variance(output, golden[f"{name}/q_sample"], t, schedule_of(name), **options)
    prefix = f"{name}/p_mean_variance/{mean}/{theirs}/clip_{clip}"
    # x_0 of eps is divided by alpha_t: where it is not clipped, values reach 1e5 at the noisiest timestep
    near(p.mean, golden[f"{prefix}/mean"], 5e-7, of_largest=not clip)
    near(p.x_0, golden[f"{prefix}/pred_xstart"], 5e-7, of_largest=not clip)
    if clip:
        near(p.log_variance, golden[f"{prefix}/log_variance"], 2e-6)


def test_the_range_of_variances_has_no_bounds() -> None:
    """As in the published code: v beyond [-1, 1] leaves the range."""
    schedule, x, t = schedule_of("linear"), torch.zeros(1, 3, 1, 1), torch.tensor([500])
    low, high = (float(table[500]) for table in schedule.log_variances)
    for v, expected in ((-1.0, low), (1.0, high), (3.0, 2 * high - low)):
        output = torch.cat([x, torch.full_like(x, v)], dim=1)
        got = p_mean_variance(output, x, t, schedule, variance="learned_range").log_variance
        assert got.flatten().tolist() == pytest.approx([expected] * 3, rel=1e-6)


def loss(name: str, mean: str, theirs: str, kind: str, output: Tensor) -> tuple[Tensor, Tensor]:
    """One of their losses and its squared error, (B,) each, by our functions."""
    x_0, noise, t, _ = inputs()
    schedule = schedule_of(name)
    x_t = q_sample(x_0, t, noise, schedule.alphas_cumprod)
    expected = target(x_0, noise, t, mean, schedule.alphas_cumprod)
    error = (output[:, :C] - expected).square().flatten(1).mean(1)

    def term(output: Tensor) -> Tensor:
        options = {"parameterization": mean, "variance": VARIANCES[theirs]}
        return vlb_term(x_0, x_t, t, p_mean_variance(output, x_t, t, schedule, **options), schedule)

    if "kl" in kind:
        return term(output) * (1000 if kind == "rescaled_kl" else 1), error
    if theirs != "learned_range":
        return error, error
    return error + term(torch.cat([output[:, :C].detach(), output[:, C:]], dim=1)), error  # T / 1000 is 1


@pytest.mark.parametrize(
    "key", [key for name in SCHEDULES for key in keys_with("improved_process", f"{name}/losses", "/loss")]
)
def test_losses_and_their_gradients(key: str) -> None:
    golden, output = lineage("improved_process"), inputs()[-1]
    name, _, mean, theirs, kind, _ = key.split("/")
    output = (output if theirs == "learned_range" else output[:, :C]).clone().requires_grad_()
    got, error = loss(name, mean, theirs, kind, output)
    # A KL is the difference of a ratio of variances and 1, and of their logarithms, some 10 in size: rounding of
    # 1e-6 nats is seen where it is small, at the noisiest timesteps and everywhere of x_0, relative to its 1e-6 bits.
    expected, scale = golden[key], 1000 if kind == "rescaled_kl" else 1
    torch.testing.assert_close(got.detach(), expected, rtol=1e-6, atol=1e-6 * scale if got is not error else 0)
    if "mse" in kind:
        relative(error, golden[f"{key.removesuffix('loss')}mse"], 1e-6)
    got.sum().backward()
    gradient = golden.get(f"{key.removesuffix('loss')}grad_of_sum")
    if gradient is not None:
        assert output.grad is not None
        near(output.grad, gradient, 1e-5, of_largest=True)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("name", SCHEDULES)
def test_terms_of_the_bound(name: str, clip: bool) -> None:
    golden, (x_0, _, t, output), schedule = lineage("improved_process"), inputs(), schedule_of(name)
    x_t = golden[f"{name}/q_sample"]
    p = p_mean_variance(output, x_t, t, schedule, variance="learned_range", clip=clip)
    got = vlb_term(x_0, x_t, t, p, schedule)
    torch.testing.assert_close(got, golden[f"{name}/vb_terms/clip_{clip}"], rtol=1e-6, atol=1e-6)


def test_respaced_losses() -> None:
    """The hybrid loss and the bound in the 25-step chain of "ddim25" out of 4,000 cosine steps."""
    golden, (x_0, noise, _, output) = lineage("improved_process"), inputs()
    timesteps, t = spaced_timesteps(4000, "ddim25")[::-1], golden["spaced/t"]
    schedule = schedule_of("cosine", 4000).spaced(timesteps)
    assert torch.tensor(timesteps)[t].tolist() == golden["spaced/model_timesteps"].tolist()
    relative(torch.tensor(timesteps)[t] * (1000 / 4000), golden["spaced/model_timesteps_rescaled"], 1e-7)
    x_t = q_sample(x_0, t, noise, schedule.alphas_cumprod)
    near(x_t, golden["spaced/q_sample"], 5e-7)
    p = p_mean_variance(output, x_t, t, schedule, variance="learned_range")
    term = vlb_term(x_0, x_t, t, p, schedule)
    error = (output[:, :C] - noise).square().flatten(1).mean(1)
    relative(error, golden["spaced/rescaled_mse/mse"], 1e-6)
    weight = len(timesteps) / 1000
    torch.testing.assert_close(weight * term, golden["spaced/rescaled_mse/vb"], rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(error + weight * term, golden["spaced/rescaled_mse/loss"], rtol=1e-6, atol=0)
    torch.testing.assert_close(25 * term, golden["spaced/rescaled_kl"], rtol=2e-6, atol=1e-6)


def test_likelihoods() -> None:
    golden = lineage("improved_process")
    kl = normal_kl(*(golden[f"kl/{name}"] for name in ("mean1", "logvar1", "mean2", "logvar2")))
    relative(kl, golden["kl/out"], 1e-6)
    got = discretised_log_likelihood(*(golden[f"discretized/{name}"] for name in ("x", "means", "log_scales")))
    relative(got, golden["discretized/out"], 1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-6])
def test_discretised_likelihood_is_a_distribution(scale: float) -> None:
    """The 256 levels have all of the probability, in the tails too, but for the tanh's approximation."""
    levels = torch.arange(256) / 127.5 - 1
    for mean in (-1.5, -1.0, 0.1, 1.0):
        log_p = discretised_log_likelihood(levels, torch.full((256,), mean), torch.full((256,), math.log(scale)))
        assert log_p.isfinite().all()
        assert log_p.double().exp().sum().item() == pytest.approx(1, abs=2e-5)


@pytest.mark.parametrize("name", ["linear", "cosine", "sigmoid"])
def test_everything_is_finite_at_both_ends(name: str) -> None:
    """At t = 0 the posterior has no variance, at T - 1 almost nothing of x_0 is left."""
    schedule, t = schedule_of(name), torch.tensor([0, 0, 999, 999])
    generator = torch.Generator().manual_seed(0)
    x_0, eps = torch.rand(4, C, 4, 4, generator=generator) * 2 - 1, torch.randn(4, C, 4, 4, generator=generator)
    x_t = q_sample(x_0, t, eps, schedule.alphas_cumprod)
    for variance, mean in product(VARIANCES.values(), ("eps", "v", "x0")):
        output = torch.randn(4, 2 * C if variance == "learned_range" else C, 4, 4, generator=generator)
        output.requires_grad_()
        p = p_mean_variance(output, x_t, t, schedule, parameterization=mean, variance=variance)
        term = vlb_term(x_0, x_t, t, p, schedule)
        term.sum().backward()
        assert term.isfinite().all()
        assert output.grad is not None
        assert output.grad.isfinite().all()


def test_perfect_posterior_costs_nothing() -> None:
    """KL 0 for the right mean and the least variance, for t > 0."""
    (x_0, noise, _, _), schedule = inputs(), schedule_of("cosine")
    t = torch.tensor([1, 2, 10, 300, 900, 999])
    x_t = q_sample(x_0, t, noise, schedule.alphas_cumprod)
    p = p_mean_variance(x_0, x_t, t, schedule, parameterization="x0", variance="posterior")
    near(vlb_term(x_0, x_t, t, p, schedule), torch.zeros(6), 1e-9)


def test_chain_of_noise_levels() -> None:
    sigmas = torch.tensor([0.002, 0.5, 3.0, 80.0], dtype=torch.float64)
    schedule = NoiseSchedule.of_sigmas(sigmas)
    relative(schedule.sigmas, sigmas, 1e-9)
    near((1 - schedule.betas).cumprod(0), schedule.alphas_cumprod, 1e-15)


# --- Timesteps by their losses ----------------------------------------------------------------------------------------


def test_resampler() -> None:
    """Probabilities after 6, 21 and 40 batches of 8 losses among 12 timesteps."""
    golden, timesteps = lineage("improved_resampler"), LossAwareTimesteps(12)
    cold = golden["weights/cold"]
    relative(timesteps.weight(torch.arange(12)), 1 / (12 * cold / cold.sum()), 1e-6)
    for step, (t, losses) in enumerate(zip(golden["t"], golden["losses"], strict=True), start=1):
        timesteps.record(t, losses)
        timesteps.update(1)
        if f"weights/after{step}" in golden:
            weights = golden[f"weights/after{step}"]
            relative(timesteps.weight(torch.arange(12)), 1 / (12 * weights / weights.sum()), 1e-6)
            assert timesteps.counts.clamp(max=10).tolist() == golden[f"counts/after{step}"].tolist()
    relative(timesteps.weight(torch.arange(12)), golden["importance_weights"], 1e-6)
    p = timesteps._cumulated.diff(prepend=torch.zeros(1, dtype=torch.float64))
    near(p, golden["probabilities"], 1e-12)
    relative(timesteps.losses.square().mean(1), golden["history"].square().mean(1), 1e-12)


def test_draws_of_the_resampler_follow_its_probabilities() -> None:
    golden, timesteps = lineage("improved_resampler"), LossAwareTimesteps(12)
    timesteps.record(golden["t"].flatten(), golden["losses"].flatten())
    timesteps.update(1)
    generator, n = torch.Generator().manual_seed(0), 20_000
    drawn = torch.stack([timesteps.draw(generator) for _ in range(n)]).bincount(minlength=12) / n
    p = golden["probabilities"]
    assert ((drawn - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all()
