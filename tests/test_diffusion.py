"""Noise schedules and the algebra of x_0, x_t, eps and v."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ldm.config import ConfigError, ScheduleConfig, load_config
from ldm.diffusion import make_schedule, min_snr_weight, posterior_coefficients, q_sample, target, to_eps

BUFFERS = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)
SCHEDULES = ("scaled_linear", "linear", "cosine")


def test_buffers_are_the_published_ones(golden: dict[str, Tensor]) -> None:
    buffers = make_schedule(ScheduleConfig()).buffers()
    assert tuple(buffers) == BUFFERS
    for name in BUFFERS:
        expected = golden[f"schedule/{name}"]
        # both are float64 results rounded to float32: at most the last bit may differ
        torch.testing.assert_close(buffers[name], expected, rtol=1.2e-7, atol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_q_sample_and_its_inverse_reproduce_the_golden_data(golden: dict[str, Tensor]) -> None:
    x_0, eps, t, x_t, x_0_back = (golden[f"q/{name}"] for name in ("x0", "noise", "t", "out", "predict_start"))
    ac = make_schedule(ScheduleConfig()).buffers()["alphas_cumprod"]
    # float32 rounding of alphas_cumprod[0] = 0.99915 moves sigma_0 = 0.029 by 4e-7, times |eps| < 4; measured: 1.1e-6
    torch.testing.assert_close(q_sample(x_0, t, eps, ac), x_t, rtol=0, atol=4e-6)
    # the reference's x_0 for this noise: at t = 0 the division by sigma = 0.029 enlarges the last bits of x_t
    torch.testing.assert_close(to_eps(x_0_back, x_t, t, "x0", ac), eps, rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_timesteps", [1, 50, 1000])
def test_schedules_are_valid(name: str, num_timesteps: int) -> None:
    schedule = make_schedule(ScheduleConfig(name=name, num_timesteps=num_timesteps))
    assert len(schedule.betas) == num_timesteps
    assert schedule.betas.dtype == schedule.alphas_cumprod.dtype == torch.float64
    assert ((schedule.betas > 0) & (schedule.betas < 1)).all()
    assert (schedule.alphas_cumprod > 0).all()
    assert (schedule.alphas_cumprod.diff() < 0).all()
    assert all(buffer.isfinite().all() and buffer.dtype == torch.float32 for buffer in schedule.buffers().values())


def test_linear_and_scaled_linear_spacing() -> None:
    linear = make_schedule(ScheduleConfig(name="linear", linear_start=1e-4, linear_end=0.02)).betas
    torch.testing.assert_close(linear.diff(), torch.full((999,), (0.02 - 1e-4) / 999, dtype=torch.float64))
    roots = make_schedule(ScheduleConfig()).betas.sqrt()
    torch.testing.assert_close(roots.diff(), roots.diff()[:1].expand(999))
    assert roots[0].item() ** 2 == pytest.approx(0.00085)
    assert roots[-1].item() ** 2 == pytest.approx(0.012)


def test_cosine_follows_its_definition_until_betas_are_clipped() -> None:
    schedule = make_schedule(ScheduleConfig(name="cosine"))
    t = torch.arange(1, 1001, dtype=torch.float64)
    f = torch.cos((t / 1000 + 0.008) / 1.008 * torch.pi / 2) ** 2
    f_0 = torch.cos(torch.tensor(0.008 / 1.008 * torch.pi / 2, dtype=torch.float64)) ** 2
    torch.testing.assert_close(schedule.alphas_cumprod[:-1], (f / f_0)[:-1])
    assert schedule.betas[-1] == 0.999
    assert 0 < schedule.alphas_cumprod[-1] < 1e-8


@pytest.mark.parametrize("name", ["scaled_linear", "linear"])
def test_zero_terminal_snr_moves_the_end_and_keeps_the_start(name: str) -> None:
    plain = make_schedule(ScheduleConfig(name=name))
    stretched = make_schedule(ScheduleConfig(name=name, zero_terminal_snr=True))
    assert stretched.alphas_cumprod[-1] == 1e-8
    torch.testing.assert_close(stretched.alphas_cumprod[0], plain.alphas_cumprod[0])
    assert (stretched.alphas_cumprod.diff() < 0).all() and ((stretched.betas > 0) & (stretched.betas < 1)).all()
    torch.testing.assert_close(torch.cumprod(1 - stretched.betas, 0), stretched.alphas_cumprod)
    # alpha is an affine function of what it was
    ratio = stretched.alphas_cumprod.sqrt()[:-1].diff() / plain.alphas_cumprod.sqrt()[:-1].diff()
    torch.testing.assert_close(ratio, ratio[:1].expand(998))
    assert all(buffer.isfinite().all() for buffer in stretched.buffers().values())


def test_eps_prediction_does_not_go_with_zero_terminal_snr() -> None:
    with pytest.raises(ConfigError, match=r"model\.schedule\.zero_terminal_snr"):
        load_config(overrides=["model.schedule.zero_terminal_snr=true"])
    load_config(overrides=["model.schedule.zero_terminal_snr=true", "model.parameterization=v"])


def test_schedule_stays_on_the_cpu_while_a_model_is_built_on_meta() -> None:
    with torch.device("meta"):
        for name in SCHEDULES:
            assert make_schedule(ScheduleConfig(name=name)).buffers()["alphas_cumprod_prev"].device.type == "cpu"


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"num_timesteps": 0}, "num_timesteps"),
        ({"linear_start": 0.0}, "linear_start"),
        ({"linear_start": 0.5, "linear_end": 0.1}, "linear_end"),
        ({"linear_end": 1.0}, "linear_end"),
    ],
)
def test_impossible_schedules_are_refused(settings: dict[str, float], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        make_schedule(ScheduleConfig(**settings))  # pyright: ignore[reportArgumentType]


def test_posterior_is_bayes_rule() -> None:
    """Product of q(x_prev | x_0) and q(x_t | x_prev), also across several timesteps."""
    ac = make_schedule(ScheduleConfig()).alphas_cumprod
    ac_t, ac_prev = ac[[10, 500, 999]], ac[[9, 450, 0]]
    alpha = ac_t / ac_prev
    precision = 1 / (1 - ac_prev) + alpha / (1 - alpha)
    coef_x_0, coef_x_t, variance = posterior_coefficients(1 - alpha, ac_t, ac_prev)
    torch.testing.assert_close(variance, 1 / precision)
    torch.testing.assert_close(coef_x_0, ac_prev.sqrt() / (1 - ac_prev) / precision)
    torch.testing.assert_close(coef_x_t, alpha.sqrt() / (1 - alpha) / precision)


@settings(deadline=None, max_examples=50)
@given(
    name=st.sampled_from(SCHEDULES), seed=st.integers(0, 2**31), t=st.lists(st.integers(0, 999), min_size=1, max_size=4)
)
def test_predictions_are_inverses_of_targets(name: str, seed: int, t: list[int]) -> None:
    ac = make_schedule(ScheduleConfig(name=name)).buffers()["alphas_cumprod"]
    x_0, eps = torch.randn(2, len(t), 4, 3, 3, generator=torch.Generator().manual_seed(seed))
    steps = torch.tensor(t)
    x_t = q_sample(x_0, steps, eps, ac)
    sigma = (1 - ac)[steps].sqrt().reshape(-1, 1, 1, 1)
    # rounding errors of a few 1e-7 in x_t and v; x_0 is divided by sigma, which enlarges them
    for parameterization, tolerance in (("eps", 0.0), ("v", 3e-6), ("x0", 3e-6 / sigma)):
        prediction = target(x_0, eps, steps, parameterization, ac)
        assert ((to_eps(prediction, x_t, steps, parameterization, ac) - eps).abs() <= tolerance).all()


@pytest.mark.parametrize("parameterization", ["eps", "v", "x0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_perfect_network_of_any_parameterization_gives_the_noise(parameterization: str, dtype: torch.dtype) -> None:
    ac = make_schedule(ScheduleConfig(name="cosine")).buffers()["alphas_cumprod"]
    x_0, eps = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    t = torch.tensor([200, 500, 999])
    x_t = q_sample(x_0, t, eps, ac)
    prediction = target(x_0, eps, t, parameterization, ac)
    assert x_t.dtype == prediction.dtype == torch.float32  # the schedule's arithmetic is float32 for any network
    eps_pred = to_eps(prediction, x_t, t, parameterization, ac)
    torch.testing.assert_close(eps_pred, eps.float(), rtol=0, atol=1e-5)  # sigma >= 0.3: errors grow threefold


@settings(deadline=None, max_examples=50)
@given(
    parameterization=st.sampled_from(("eps", "v", "x0")),
    seed=st.integers(0, 2**31),
    t=st.integers(50, 950),
    gamma=st.floats(0.1, 20),
)
def test_min_snr_weighs_errors_of_x_0(parameterization: str, seed: int, t: int, gamma: float) -> None:
    """Whatever is predicted: the weighted squared error is that of the x_0 it stands for, times min(SNR, gamma)."""
    ac = make_schedule(ScheduleConfig(name="cosine")).buffers()["alphas_cumprod"]
    x_0, eps, error = torch.randn(3, 1, 4, 3, 3, generator=torch.Generator().manual_seed(seed))
    steps = torch.tensor([t])
    x_t = q_sample(x_0, steps, eps, ac)
    prediction = target(x_0, eps, steps, parameterization, ac) + error
    eps_pred = to_eps(prediction, x_t, steps, parameterization, ac)
    implied = (x_t - (1 - ac[t]).sqrt() * eps_pred) / ac[t].sqrt()
    snr = ac[t] / (1 - ac[t])
    weighted = min_snr_weight(steps, gamma, parameterization, ac) * error.square().mean()
    # float32, with a division by alpha that is at least 0.07 and one by sigma that is at least 0.08
    torch.testing.assert_close(
        weighted[0], snr.clamp(max=gamma) * (implied - x_0).square().mean(), rtol=2e-3, atol=1e-6
    )
