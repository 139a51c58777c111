"""The UNet and the classifier against those of improved-diffusion and guided-diffusion: outputs, gradients, traps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config import ClassifierConfig, ConfigError, UNetConfig
from ldm.models.classifier import ClassifierModel
from ldm.models.layers import AttentionBlock, timestep_embedding
from ldm.models.unet import UNetModel
from tests.lineage import by_head, facts, fill, lineage, near, reorder, unet_config
from tests.procweights import weight

UNETS = [("improved", name) for name in ("a", "b", "c", "sr")] + [
    ("guided", name) for name in ("a", "b", "c", "d", "sr")
]
POOLS = ("attention", "adaptive", "spatial", "spatial_v2")
BAR = 2e-5  # of float32 through a network; theirs differs from itself by up to 4e-6


def their_unet(project: str, name: str) -> UNetModel:
    flags = facts(f"{project}_unet")["configs"][name]
    network = UNetModel(unet_config(flags, low_res=name == "sr"))
    fill(network, f"lineage/{project}/{name}/", by_head=not flags.get("use_new_attention_order"))
    return network


def their_classifier(pool: str) -> ClassifierModel:
    flags = facts("guided_classifier")["configs"][pool]
    config = ClassifierConfig(pool=pool, num_classes=flags["out_channels"])
    network = ClassifierModel(unet_config(flags), config, flags["image_size"])
    fill(network, f"lineage/guided/cls_{pool}/")
    return network


def run(network: UNetModel, project: str, name: str) -> Tensor:
    golden = lineage(f"{project}_unet")
    x = golden[f"{name}/x"]
    if f"{name}/low_res" in golden:
        low_res = golden[f"{name}/low_res"]
        x = torch.cat([x, F.interpolate(low_res, x.shape[2:], mode="bilinear", align_corners=False)], dim=1)
    return network(x, golden[f"{name}/t"], golden.get(f"{name}/y"))


@contextmanager
def outputs_of(network: nn.Module, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of submodules."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _module, _args, output: kept.update({name: output})

    hooks = [network.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    yield kept
    for hook in hooks:
        hook.remove()


def check_gradients(network: nn.Module, expected: dict[str, Tensor], norms: dict[str, float], *, order: bool) -> None:
    """Compare gradients of some parameters, in the file's order of attention channels, and the norms of all."""
    heads = {f"{name}.qkv": module.num_heads for name, module in network.named_modules() if hasattr(module, "qkv")}
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    assert gradients.keys() == norms.keys()
    for name, gradient in gradients.items():
        assert gradient is not None
        # a bias in front of a group norm of one channel each has the gradient 0, and rounding
        assert gradient.double().norm().item() == pytest.approx(norms[name], rel=1e-5, abs=BAR)
        if name in expected:
            module = name.rsplit(".", 1)[0]
            gradient = by_head(gradient, heads[module]) if order and module in heads else gradient
            near(gradient, expected[name], BAR * max(1.0, norms[name] / 8))


@pytest.mark.parametrize(("project", "name"), UNETS)
def test_outputs_and_gradients(project: str, name: str) -> None:
    golden, settings = lineage(f"{project}_unet"), facts(f"{project}_unet")
    network = their_unet(project, name)
    hooks = {key.removeprefix(f"{name}/hook/"): key for key in golden if key.startswith(f"{name}/hook/")}
    with outputs_of(network, list(hooks)) as kept:
        out = run(network, project, name)
    near(out, golden[f"{name}/out"], BAR)
    for block, key in hooks.items():
        near(kept[block], golden[key], BAR)
    if f"{name}/grad_weight" not in golden:
        assert name == "sr"
        return
    (out * golden[f"{name}/grad_weight"]).sum().backward()
    start, order = f"{name}/grad/", not settings["configs"][name].get("use_new_attention_order")
    expected = {key.removeprefix(start): tensor for key, tensor in golden.items() if key.startswith(start)}
    check_gradients(network, expected, settings["gradnorms"][name], order=order)


@pytest.mark.parametrize("pool", POOLS)
def test_classifiers(pool: str) -> None:
    golden, settings, network = lineage("guided_classifier"), facts("guided_classifier"), their_classifier(pool)
    x, t, y = (golden[name] for name in ("x", "t", "y"))
    logits = network(x, t)
    near(logits, golden[f"{pool}/logits"], BAR)
    losses = F.cross_entropy(logits, y, reduction="none")
    near(losses, golden[f"{pool}/cross_entropy"], BAR)
    losses.mean().backward()
    start = f"{pool}/grad/"
    expected = {key.removeprefix(start): tensor for key, tensor in golden.items() if key.startswith(start)}
    check_gradients(network, expected, settings["gradnorms"][pool], order=True)
    x = x.clone().requires_grad_()
    gradient = torch.autograd.grad(network(x, t).log_softmax(1).gather(1, y[:, None]).sum(), x)[0]
    near(gradient, golden[f"{pool}/grad_log_p_y"], BAR)


@pytest.mark.parametrize("dim", [32])
def test_timestep_embedding(dim: int) -> None:
    """Fractional timesteps too; the odd width of theirs, a column of zeros, is used by no model."""
    golden = lineage("improved_unet")
    t = golden["timestep_embedding/t"]
    difference = (timestep_embedding(t, dim) - golden[f"timestep_embedding/dim{dim}"]).abs().amax(dim=1)
    # frequencies come from the machine's own exp: one unit in their last place, 6e-8, times t
    assert (difference <= 6e-8 * t.abs().clamp(min=1)).all()


# --- Traps ------------------------------------------------------------------------------------------------------------


def small(**changes: Any) -> UNetModel:
    sizes: dict[str, Any] = {
        "in_channels": 3,
        "out_channels": 3,
        "model_channels": 32,
        "channel_mult": [1, 2],
        "num_res_blocks": 1,
        "attention_resolutions": [2],
        "num_heads": 2,
        "context_dim": 0,
    }
    network = UNetModel(UNetConfig(**{**sizes, **changes}))
    fill(network, "small/")
    return network


def test_order_of_attention_channels_matters() -> None:
    """The two orders have the same shapes: a wrong one loads without complaint and gives another image."""
    network = their_unet("guided", "a")
    expected = lineage("guided_unet")["a/out"]
    fill(network, "lineage/guided/a/", by_head=True)  # the file is in the other order
    assert (run(network, "guided", "a") - expected).abs().max() > 0.1
    tensor = torch.arange(24.0)
    assert torch.equal(by_head(reorder(tensor, 2), 2), tensor)
    assert reorder(tensor, 2).tolist() == [
        *range(4),
        *range(12, 16),
        *range(4, 8),
        *range(16, 20),
        *range(8, 12),
        *range(20, 24),
    ]


def test_attention_is_softmax_of_scaled_products() -> None:
    """Against the formula, in float64: heads first in theirs, each of q and k scaled by the 4th root of its width."""
    block = AttentionBlock(64, 2, 32).double()
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            parameter.copy_(weight(name, parameter.shape))
    x = torch.randn(2, 64, 3, 4, generator=torch.Generator().manual_seed(0)).double()
    q, k, v = block.qkv(block.norm(x).flatten(2)).reshape(2, 3, 2, 32, 12).unbind(1)
    weights = torch.einsum("bhct,bhcs->bhts", q * 32**-0.25, k * 32**-0.25).softmax(-1)
    hidden = torch.einsum("bhts,bhcs->bhct", weights, v).reshape(2, 64, 12)
    expected = x + block.proj_out(hidden).reshape(x.shape)
    near(block(x), expected, 1e-12)


@pytest.mark.parametrize("resample", ["conv", "pool", "res_block"])
def test_every_way_of_resampling_runs_and_has_its_names(resample: str) -> None:
    """improved-diffusion fails with conv_resample=False."""
    network = small(resample=resample)
    assert network(torch.randn(1, 3, 8, 8), torch.tensor([3.0]), None).shape == (1, 3, 8, 8)
    names = {name for name in network.state_dict() if ".op." in name or ".conv." in name}
    assert bool(names) == (resample == "conv")
    learned = any(name.startswith("input_blocks.2.") for name in network.state_dict())
    assert learned == (resample != "pool")


@pytest.mark.parametrize("size", [(8, 8), (16, 8), (6, 10), (32, 32)])
def test_sizes_are_free(size: tuple[int, int]) -> None:
    """Theirs knows 32, 64, 128, 256 and 512 pixels by name; here levels are a setting, and sides any even number."""
    network, classes = small(num_classes=3), torch.tensor([2])
    assert network(torch.randn(1, 3, *size), torch.tensor([3]), classes).shape == (1, 3, *size)


def test_no_label_leaves_the_embedding_of_time_alone() -> None:
    """-1 is no class: the embedding of class 0 is not added in its place."""
    network, x, t = small(num_classes=3), torch.randn(3, 3, 8, 8), torch.tensor([5, 5, 5])
    mixed = network(x, t, torch.tensor([-1, 0, 2]))
    with torch.no_grad():
        network.label_emb.weight.zero_()
    without = network(x, t, torch.tensor([0, 0, 0]))
    near(mixed[0], without[0].detach(), 1e-6)
    assert ((mixed[1:] - without[1:]).abs().amax((1, 2, 3)) > 1e-3).all()


def test_number_of_classes_is_free() -> None:
    """Theirs is 1,000, written into the code."""
    assert small(num_classes=7).label_emb.weight.shape == (7, 128)


def test_heads_that_do_not_divide_a_width_are_refused() -> None:
    with pytest.raises(ConfigError, match="head_channels"):
        small(head_channels=24)


def test_activation_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for enabled in (False, True):
        network = small(activation_checkpointing=enabled, resample="res_block", scale_shift=True)
        x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        network(x, torch.tensor([3]), None).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
    near(gradients[1], gradients[0], 1e-6, of_largest=True)


def test_nothing_but_parameters_in_a_file() -> None:
    """Manifests have no buffers."""
    network = small(num_classes=3, resample="res_block")
    assert not list(network.buffers())
