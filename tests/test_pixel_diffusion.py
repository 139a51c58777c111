"""Models in pixel space against improved- and guided-diffusion: sampling, guidance, bits per dimension, training."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.config import ConfigError
from ldm.diffusion import q_sample
from ldm.pixel_diffusion import Guidance, PixelDiffusion, _Denoiser, load_pixel_model
from ldm.samplers import interpolate, invert
from tests.lineage import Draws, facts, lineage, near, pixel_model, relative, their_schedule, unet_config
from tests.models.test_unet_lineage import their_classifier

STEP, TRAJECTORY = 2e-5, 1e-4  # theirs differ from themselves by up to 4e-6 and 1e-5
RUNS = {name: rest for name, *rest in facts("improved_loops")["runs"]}


def network_b(schedule: str = "cosine", T: int = 1000, *, rescale: bool = False) -> PixelDiffusion:
    """improved-diffusion's, with classes; rescaled timesteps are those of 1,000 steps."""
    unet = unet_config(facts("improved_unet")["configs"]["b"])
    unet.time_scale = 1000 / T if rescale else 1.0
    return pixel_model(unet, their_schedule(schedule, T), "lineage/improved/b/")


def tiny(schedule: str = "cosine", T: int = 50, **settings: Any) -> PixelDiffusion:
    """A model of our own for 3 channels of any size."""
    flags = {**facts("improved_unet")["configs"]["a"], **settings.pop("unet", {})}
    return pixel_model(unet_config(flags), their_schedule(schedule, T), "tiny/", **settings)


def run(model: PixelDiffusion, draws: Draws, labels: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    """Sample from the first recorded draw; return x after every step, (S, B, ...), and the last x_0."""
    states: list[Tensor] = []
    last: list[Tensor] = []

    def keep(step: int, count: int, x: Tensor, x_0: Tensor) -> None:
        states.append(x)
        last[:] = [x_0]

    model.sample(draws(), labels, on_step=keep, **options)
    return torch.stack(states), last[0]


# --- Sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_loops(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = lineage("improved_loops")
    schedule, T, steps, kind, options, rescale = RUNS[name]
    draws = Draws(golden[f"{name}/draws"], monkeypatch)
    eta = options.get("eta", 0.0)
    states, x_0 = run(
        network_b(schedule, T, rescale=rescale),
        draws,
        golden["y"],
        sampler={"p": "ddpm", "d": "ddim"}[kind],
        steps=steps,
        eta=eta,
        clip=options.get("clip_denoised", True),
    )
    expected = golden[f"{name}/samples"]
    largest = expected.abs().amax((1, 2, 3, 4), keepdim=True).clamp(min=1)  # without clipping values reach 600
    near(states / largest, expected / largest, TRAJECTORY)
    if "noclip" not in name:
        near(x_0, golden[f"{name}/pred_xstart_last"], TRAJECTORY)
    # their script truncates: a value between two levels may fall on either side
    levels = ((states[-1] + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    assert (levels.int() - golden[f"{name}/uint8_nhwc"].int()).abs().max() <= 1
    # no noise is drawn without a use: with eta 0 none, else one for each step but the last
    assert draws.count == 1 + (0 if kind == "d" and eta == 0 else len(states) - 1)


def test_inversion_loop() -> None:
    """Nine of the ten steps of "ddim10" backwards; the tenth, in ours, goes on to noise alone."""
    golden, model = lineage("improved_loops"), network_b()
    chain = model.chain("ddim", "ddim10")
    denoiser = _Denoiser(model, chain, golden["y"], None, Guidance(), False)
    with torch.no_grad():
        results = invert(denoiser.eps, golden["reverse/x_0"], chain.alphas_cumprod, range(10)[::-1])
        states = torch.stack([x for x, _ in results])
    near(states[:9], golden["reverse/samples"], TRAJECTORY)


@pytest.mark.parametrize("clip", [True, False])
def test_bits_per_dim(clip: bool) -> None:
    golden = lineage("improved_loops")
    noises = iter(golden["bpd/noises"])
    model = network_b("cosine", 1000, rescale=True)
    result = model.bits_per_dim(golden["bpd/x_0"], golden["y"], steps="8", clip=clip, noise=lambda: next(noises))
    names = {"prior": "prior_bpd", "total": "total_bpd", "vb": "vb", "mse": "mse", "x_0_mse": "xstart_mse"}
    for ours, theirs in names.items():
        got, expected = result[ours], golden[f"bpd/clip_{clip}/{theirs}"]
        got = got.flip(1) if got.ndim == 2 else got  # their columns begin with the noisiest step
        # x_0 of the noisiest step is divided by alpha_T: its error is not small beside 1, if it is not clipped
        torch.testing.assert_close(got, expected, rtol=1e-4 if not clip else 2e-5, atol=STEP)
    near(result["total"], result["vb"].sum(1) + result["prior"], 1e-5)


def test_bits_of_a_shorter_chain_are_its_own() -> None:
    """A chain of 5 steps has 5 terms, and its own prior: the same x_T."""
    model, x_0 = tiny(), torch.zeros(2, 3, 4, 4)
    result = model.bits_per_dim(x_0, steps="5")
    assert result["vb"].shape == result["mse"].shape == (2, 5)
    near(result["prior"], model.bits_per_dim(x_0, steps="10")["prior"], 1e-9)


def test_unrecorded_noise_comes_from_the_generator() -> None:
    model, x = tiny(), torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {"sampler": "ddim", "steps": "5"}
    state = torch.get_rng_state()
    first = model.sample(x, **options, eta=0.0)
    assert torch.equal(torch.get_rng_state(), state)  # theirs draws at eta 0, and throws it away
    assert torch.equal(first, model.sample(x, **options, eta=0.0))
    noisy = [model.sample(x, **options, eta=1.0, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(noisy[0], noisy[1])
    assert not torch.equal(noisy[0], noisy[2])


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "plms", "dpm_solver_pp", "unipc", "heun"])
@pytest.mark.parametrize("steps", ["1", "4"])
def test_samplers_end_in_the_range_of_pixels(sampler: str, steps: str) -> None:
    """The last step leads to the clipped x_0 itself, whose range is that of the pixels."""
    x = 3 * torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    out = tiny().sample(x, sampler=sampler, steps=steps, clip=True)
    assert out.isfinite().all()
    # heun subtracts noise of sigma from x, 150 times larger than x_0; plms combines predictions after the clip
    assert out.abs().max() <= 1 + {"heun": 2e-4, "plms": math.inf}.get(sampler, 1e-5)


def test_ddim_ends_at_the_clipped_prediction() -> None:
    states: list[tuple[Tensor, Tensor]] = []
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    out = tiny().sample(x, sampler="ddim", steps="5", on_step=lambda s, n, x, x_0: states.append((x, x_0)), eta=1.0)
    assert torch.equal(out, states[-1][1])
    assert out.abs().max() == 1


@pytest.mark.parametrize(("sampler", "steps"), [("ddpm", "ddim0"), ("heun", "ddim5"), ("unipc", "0"), ("euler", "5")])
def test_steps_that_make_no_sense_are_refused(sampler: str, steps: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        tiny().sample(torch.zeros(1, 3, 4, 4), sampler=sampler, steps=steps)


def test_one_step_chain_trains_and_samples() -> None:
    """T = 1, at which theirs fails."""
    model = tiny("cosine", 1, unet={"out_channels": 6})
    x = torch.randn(1, 3, 4, 4)
    for objective in ("simple", "hybrid", "vlb"):
        assert model.loss(x.clamp(-1, 1), torch.tensor([0]), x, objective=objective).isfinite().all()
    assert model.sample(x, sampler="ddpm", steps="1").isfinite().all()


# --- Round trips of DDIM ----------------------------------------------------------------------------------------------


class Gaussian(torch.nn.Module):
    """The best noise prediction for data of mean 0.3 and standard deviation 0.5, in place of a network."""

    def __init__(self, alphas_cumprod: Tensor) -> None:
        super().__init__()
        self.alphas_cumprod = alphas_cumprod
        self.time_embed = torch.nn.Sequential(torch.nn.Linear(1, 1))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        ac = self.alphas_cumprod[t.long()].reshape(-1, 1, 1, 1).float()
        return (1 - ac).sqrt() * (x - ac.sqrt() * 0.3) / (ac * 0.25 + 1 - ac)


def gaussian(T: int = 1000) -> PixelDiffusion:
    model = tiny("linear", T)
    model.model["diffusion_model"] = Gaussian(model.schedule.alphas_cumprod)
    return model


def round_trip(model: PixelDiffusion, x_0: Tensor, steps: str, clip: bool) -> tuple[Tensor, Tensor]:
    chain = model.chain("ddim", steps)
    denoiser = _Denoiser(model, chain, None, None, Guidance(), clip)
    timesteps = range(len(chain.times))[::-1]
    with torch.no_grad():
        *_, (x_T, _) = invert(denoiser.eps, x_0, chain.alphas_cumprod, timesteps, clip=clip)
    return x_T, model.sample(x_T, sampler="ddim", steps=steps, clip=clip)


def test_inversion_returns_to_the_image() -> None:
    """The error falls with the number of steps; with 250 of 1,000 no pixel is further off than 0.06."""
    generator = torch.Generator().manual_seed(0)
    x_0 = 0.3 + 0.5 * torch.randn(4, 3, 8, 8, generator=generator)
    errors = []
    for steps in ("25", "100", "250"):
        x_T, back = round_trip(gaussian(), x_0, steps, clip=False)
        errors.append((back - x_0).abs().max().item())
        assert x_T.std().item() == pytest.approx(1, abs=0.1)
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.06


def test_interpolation_of_noises() -> None:
    """Spherical: the ends are the noises, and what is between them has their norm."""
    a, b = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    near(interpolate(a, b, 0.0), a, 1e-6)
    near(interpolate(a, b, 1.0), b, 1e-6)
    near(interpolate(a, a, 0.3), a, 1e-6)
    middle = interpolate(a, b, 0.5).flatten(1).norm(dim=1)
    low, high = torch.stack([a.flatten(1).norm(dim=1), b.flatten(1).norm(dim=1)]).aminmax(dim=0)
    assert ((middle > 0.97 * low) & (middle < 1.03 * high)).all()
    assert interpolate(a.double(), b.double(), 0.2).dtype == torch.float64


# --- Guidance by a classifier -----------------------------------------------------------------------------------------


def guided() -> tuple[PixelDiffusion, Guidance]:
    flags = facts("guided_guidance")["unet"]
    model = pixel_model(unet_config(flags), their_schedule("linear"), "lineage/guided/a/", by_head=False)
    classifier = their_classifier("attention").requires_grad_(False)
    return model, Guidance(classifier=classifier, classifier_scale=facts("guided_guidance")["classifier_scale"])


def test_guided_step() -> None:
    """Of a chain of 20 steps; at t = 19 eps is divided by alpha = 1 / 160, and guidance adds values of 79."""
    golden, (model, guidance) = lineage("guided_guidance"), guided()
    x, y, noise = (golden[name] for name in ("x", "y", "step_noise"))
    chain = model.chain("ddpm", "20")
    for i, k in enumerate(golden["t"].tolist()):
        part = slice(i, i + 1)
        plain = _Denoiser(model, chain, y[part], None, Guidance(), True)
        led = _Denoiser(model, chain, y[part], None, guidance, True)
        with torch.no_grad():
            p = plain.reverse(x[part], k)
            near(p.mean, golden["unguided/mean"][part], TRAJECTORY)
            near(p.x_0, golden["unguided/pred_xstart"][part], TRAJECTORY if k == 0 else 160 * 4e-6)
            near(p.log_variance, golden["unguided/log_variance"][part], STEP)
            gradient = led._gradient(x[part], k)
            near(gradient, golden["gradient"][part], STEP, of_largest=True)
            p = led.reverse(x[part], k)
            near(p.mean, golden["condition_mean/mean"][part], TRAJECTORY, of_largest=True)
            step = p.mean + (0.5 * p.log_variance).exp() * noise[part] * (k > 0)
            near(step, golden["p_sample"][part], TRAJECTORY, of_largest=True)
            eps, ac = led.eps(x[part], k), chain.alphas_cumprod[k].item()
            assert isinstance(eps, Tensor)
            x_0 = (x[part] - math.sqrt(1 - ac) * eps) / math.sqrt(ac)
            near(x_0, golden["condition_score/pred_xstart"][part], 2 * TRAJECTORY, of_largest=True)


@pytest.mark.parametrize(("name", "sampler", "steps"), [("ddpm6", "ddpm", "6"), ("ddim6", "ddim", "ddim5")])
def test_guided_loops(name: str, sampler: str, steps: str, monkeypatch: pytest.MonkeyPatch) -> None:
    golden, (model, guidance) = lineage("guided_guidance"), guided()
    draws = Draws(golden[f"loop/{name}/draws"], monkeypatch)
    states, _ = run(model, draws, golden["y"], sampler=sampler, steps=steps, guidance=guidance)
    expected = golden[f"loop/{name}/samples"]
    largest = expected.abs().amax((1, 2, 3, 4), keepdim=True).clamp(min=1)
    near(states / largest, expected / largest, TRAJECTORY)


def test_a_model_without_classes_is_guided_by_the_classifier_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    golden, (_, guidance) = lineage("guided_guidance"), guided()
    model = pixel_model(
        unet_config(facts("guided_unet")["configs"]["b"]), their_schedule("linear"), "lineage/guided/b/"
    )
    draws = Draws(golden["loop/uncond_b_4/draws"], monkeypatch)
    states, _ = run(model, draws, golden["y"], sampler="ddpm", steps="4", guidance=guidance)
    # theirs differs from itself by up to 2e-4 of values of 5.5
    near(states, golden["loop/uncond_b_4/samples"], TRAJECTORY, of_largest=True)


def test_classifier_is_told_the_timesteps_of_the_long_chain() -> None:
    told: list[list[float]] = []

    def classifier(x: Tensor, t: Tensor) -> Tensor:
        told.append(t.tolist())
        return x.flatten(1)[:, :5]

    model = tiny("linear", 1000)
    guidance = Guidance(classifier=classifier)
    model.sample(torch.zeros(1, 3, 4, 4), torch.tensor([1]), sampler="ddpm", steps="3", guidance=guidance)
    assert told == [[999], [500], [0]]


def test_guidance_scale_of_one_is_the_model_itself() -> None:
    """Theirs fails at 1, or mixes samples; here it costs one evaluation and changes nothing."""
    model = tiny(unet={"num_classes": 4})
    x, labels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3])
    options = {"sampler": "ddim", "steps": "5"}
    plain = model.sample(x, labels, **options)
    for guidance in (Guidance(scale=1.0), Guidance(scale=1.0, rescale=0.7, parallel=0.0)):
        assert torch.equal(model.sample(x, labels, guidance=guidance, **options), plain)
    for i in (0, 1):  # samples do not mix
        alone = model.sample(x[i : i + 1], labels[i : i + 1], guidance=Guidance(scale=3.0), **options)
        both = model.sample(x, labels, guidance=Guidance(scale=3.0), **options)
        near(both[i : i + 1], alone, TRAJECTORY)
    assert (both - plain).abs().max() > 1e-3


def test_no_label_is_no_class() -> None:
    model = tiny(unet={"num_classes": 4})
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = [model.sample(x, torch.tensor([label]), sampler="ddim", steps="5") for label in (-1, 0, 1)]
    assert all((a - b).abs().max() > 1e-3 for a, b in ((images[0], images[1]), (images[1], images[2])))


# --- Training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("project", ["improved", "guided"])
def test_three_training_steps(project: str) -> None:
    """Two microbatches of two, whose gradients are summed; AdamW; the rate falls before or after a step; two EMAs."""
    golden, settings = lineage(f"{project}_train"), facts(f"{project}_train")
    T, rate, end = settings["T"], settings["lr"], settings["lr_anneal_steps"]
    unet = unet_config(settings["config"])
    unet.time_scale = 1000 / T
    model = pixel_model(unet, their_schedule(settings["schedule"], T), f"lineage/{project}/train/")
    model.train().requires_grad_(True)
    parameters = dict(model.unet.named_parameters())
    averages = {decay: {name: p.detach().clone() for name, p in parameters.items()} for decay in settings["ema"]}
    optimizer = torch.optim.AdamW(parameters.values(), lr=rate, weight_decay=settings["weight_decay"])
    for step in range(3):
        if project == "improved":
            optimizer.param_groups[0]["lr"] = rate * (1 - step / end)
        optimizer.zero_grad()
        weighted = []
        for i in range(2):
            part, k = slice(2 * i, 2 * i + 2), 2 * step + i
            losses = model.loss(
                golden["images"][step, part],
                golden["t"][k],
                golden["noise"][step, i],
                golden["y"][step, part],
                objective="hybrid",
            )
            loss = (losses * golden["loss_weights"][k]).mean()
            loss.backward()
            weighted.append(loss.item())
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in parameters.values() if p.grad is not None))
        assert norm == pytest.approx(golden["grad_norm"][step].item(), rel=1e-5)
        assert weighted[-1] > 0
        optimizer.step()
        if project == "guided":
            optimizer.param_groups[0]["lr"] = rate * (1 - step / end)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(golden["lr_after_step"][step].item(), rel=1e-12)
        for decay, average in averages.items():
            for name, p in parameters.items():
                average[name].lerp_(p.detach(), 1 - decay)
        for key, expected in golden.items():
            start, _, name = key.partition("/")
            if start == f"step{step + 1}" and not name.startswith("ema"):
                near(parameters[name], expected, STEP)
            elif start == f"step{step + 1}":
                decay, _, name = name.removeprefix("ema").partition("/")
                near(averages[float(decay)][name], expected, STEP)


def test_hybrid_loss_trains_the_mean_by_the_error_alone() -> None:
    """And the weight of the bound is T / 1000: 4 with 4,000 steps."""
    x_0 = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    eps, t = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1999, 3999])
    model = tiny("cosine", 4000, unet={"out_channels": 6})
    simple, hybrid, bound = (model.loss(x_0, t, eps, objective=name) for name in ("simple", "hybrid", "vlb"))
    torch.testing.assert_close(hybrid, simple + 4 * bound / 4000, rtol=1e-5, atol=1e-6)
    bias = model.unet.out[2].bias.requires_grad_()
    gradients = [torch.autograd.grad(model.loss(x_0, t, eps, objective=o).sum(), bias)[0] for o in ("simple", "hybrid")]
    near(gradients[1][:3], gradients[0][:3], 1e-6)
    assert gradients[0][3:].abs().max() == 0
    assert gradients[1][3:].abs().min() > 0


@pytest.mark.parametrize("parameterization", ["eps", "v", "x0"])
def test_learned_variance_trains_what_the_config_says(parameterization: str) -> None:
    """denoising-diffusion-pytorch's class for it trains eps whatever its objective is, and samples as if it did not."""
    model = tiny(unet={"out_channels": 6}, parameterization=parameterization)
    ac = model.schedule.alphas_cumprod
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.rand(2, 3, 8, 8, generator=generator) * 2 - 1
    eps, t = torch.randn(2, 3, 8, 8, generator=generator), torch.tensor([5, 45])
    alpha, sigma = (c.reshape(-1, 1, 1, 1).float() for c in (ac[t].sqrt(), (1 - ac[t]).sqrt()))
    right = {"eps": eps, "v": alpha * eps - sigma * x_0, "x0": x_0}[parameterization]

    class Oracle(Gaussian):
        def forward(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
            return torch.cat([right, torch.full_like(right, -1)], dim=1)

    model.model["diffusion_model"] = Oracle(ac)
    near(model.loss(x_0, t, eps), torch.zeros(2), 1e-9)
    near(model.loss(x_0, t, eps, objective="vlb"), torch.zeros(2), 1e-4)
    # and the samplers agree: one step from x_t leads to x_0
    x_t = q_sample(x_0, t, eps, ac)
    for i, k in enumerate(t.tolist()):
        near(
            model.reverse(torch.cat([right, right], 1)[i : i + 1], x_t[i : i + 1], k, model.schedule).x_0,
            x_0[i : i + 1],
            1e-4,
        )


@pytest.mark.parametrize("size", [(8, 8), (16, 8), (4, 12)])
def test_sizes_and_shapes_are_free(size: tuple[int, int]) -> None:
    model = tiny()
    x = torch.randn(1, 3, *size)
    assert model.sample(x, sampler="ddim", steps="2").shape == x.shape
    assert model.loss(x, torch.tensor([3]), torch.randn_like(x)).shape == (1,)
    assert model.bits_per_dim(x.clamp(-1, 1), steps="2")["total"].shape == (1,)


def test_upsampler_enlarges_its_second_input() -> None:
    """[x_t, low_res enlarged bilinearly, without antialiasing]; their network's numbers."""
    golden = lineage("improved_unet")
    unet = unet_config(facts("improved_unet")["configs"]["sr"], low_res=True)
    settings = {"input_channels": ["x_t", "low_res"], "variance": "learned_range"}
    model = pixel_model(unet, their_schedule("linear", 4000), "lineage/improved/sr/", **settings)
    got = model.network(golden["sr/x"], golden["sr/t"], golden["sr/y"], golden["sr/low_res"])
    near(got, golden["sr/out"], STEP)


def test_channels_that_do_not_fit_are_refused() -> None:
    for settings in ({"input_channels": ["x_t", "low_res"]}, {"input_channels": ["x_t", "keep_mask"]}):
        with pytest.raises(ConfigError, match=r"in(put)?_channels"):
            tiny(**settings)


def test_their_files_are_asked_for_a_config_unless_published(tmp_path: Any) -> None:
    path = tmp_path / "own.pt"
    torch.save(tiny().unet.state_dict(), path)
    with pytest.raises(ConfigError, match=r"none of the published ones.*model\.schedule"):
        load_pixel_model(path)


def test_the_time_of_a_rescaled_model() -> None:
    """Timesteps of 4,000 are told as those of 1,000, fractions kept."""
    rescaled, plain = network_b("cosine", 4000, rescale=True), network_b("cosine", 1000)
    x, y = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2])
    got = rescaled.network(x, torch.tensor([10, 3999]), y)
    near(got, plain.network(x, torch.tensor([2.5, 999.75]), y), 1e-6)


def test_all_steps_are_the_schedule_itself() -> None:
    chain = tiny().chain("ddpm", "")
    assert list(chain.times) == list(range(50))
    relative(chain.betas, tiny().schedule.betas, 1e-12)
