"""What a run starts from, writes and refuses."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import wandb as wandb_module
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from ldm.checkpoint.io import CheckpointError, read_checkpoint, write_safetensors
from ldm.checkpoint.keys import NEW_PARTS, to_module_keys
from ldm.config import Config, ConfigError, load_config
from ldm.latent_diffusion import load_model
from ldm.training.callbacks import batch_flops
from ldm.training.cli import main
from ldm.training.diffusion_module import DiffusionTraining
from ldm.training.ema import EMA
from ldm.training.first_stage_module import FirstStageTraining
from ldm.training.module import NonFiniteError
from ldm.training.run import Run

ROOT = Path(__file__).parents[2]

Fit = Callable[..., tuple[Run, int]]
MakeConfig = Callable[..., Config]
Weights = dict[str, Tensor]

ADVERSARIAL = "first_stage_training.adversarial_weight=0.5"


def last(run_dir: Path) -> dict[str, Any]:
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)


class TestStart:
    """Which tensors a checkpoint may leave out."""

    @pytest.fixture
    def start(self, make_config: MakeConfig, weights: Weights, tmp_path: Path) -> Callable[..., Run]:
        def run(*without: str, overrides: tuple[str, ...] = (), from_scratch: bool = False) -> Run:
            path = tmp_path / "start.safetensors"
            write_safetensors(path, {name: x for name, x in weights.items() if not name.startswith(without or "-")})
            run = Run(make_config(*overrides), tmp_path)
            run.initialise(str(path), from_scratch=from_scratch, resuming=False)
            return run

        return run

    def test_the_new_parts_may_be_missing_and_are_listed(
        self, start: Callable[..., Run], weights: Weights, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = start(*NEW_PARTS)
        listed = capsys.readouterr().out
        for part in ("cond_stage_model.mapper", "cond_stage_model.final_ln", "proj_out", "learnable_vector"):
            assert part in listed
        for name, tensor in run.module.state_dict().items():
            if name in weights and not name.startswith(NEW_PARTS):
                assert torch.equal(tensor, weights[name]), name

    def test_a_complete_checkpoint_leaves_nothing_random(
        self, start: Callable[..., Run], capsys: pytest.CaptureFixture[str]
    ) -> None:
        start()
        assert "random" not in capsys.readouterr().out

    @pytest.mark.parametrize("part", ["first_stage_model.decoder", "cond_stage_model.transformer"])
    @pytest.mark.parametrize("from_scratch", [False, True])
    def test_a_frozen_part_is_never_random(self, part: str, from_scratch: bool, start: Callable[..., Run]) -> None:
        with pytest.raises(CheckpointError, match=part):
            start(part, from_scratch=from_scratch)

    def test_other_trained_parts_start_from_scratch_when_asked(self, start: Callable[..., Run]) -> None:
        with pytest.raises(CheckpointError, match=r"model\.diffusion_model.*--train-from-scratch"):
            start("model.")
        start("model.", from_scratch=True)
        start("model.", "cond_stage_model.", from_scratch=True, overrides=("training.train_tower=true",))

    def test_another_model_s_checkpoint(self, start: Callable[..., Run]) -> None:
        with pytest.raises(CheckpointError, match="of another shape"):
            start(overrides=("model.unet.context_dim=64",))

    def test_first_stage(self, make_config: MakeConfig, pretrained: Path, weights: Weights, tmp_path: Path) -> None:
        run = Run(make_config("stage=first_stage"), tmp_path)
        run.initialise(str(pretrained), from_scratch=False, resuming=False)
        for name, tensor in run.module.state_dict().items():
            assert torch.equal(tensor, weights[name])
        partial = tmp_path / "partial.safetensors"
        write_safetensors(partial, {n: x for n, x in weights.items() if "decoder" not in n})
        with pytest.raises(CheckpointError, match="missing"):
            run.initialise(str(partial), from_scratch=False, resuming=False)


def test_an_asymmetric_decoder_starts_from_a_model_and_serves_it(
    fit: Fit, make_config: MakeConfig, pretrained: Path, weights: Weights, tmp_path: Path
) -> None:
    options = ("stage=first_stage", "model.first_stage.decoder=asymmetric", "trainer.max_epochs=1")
    run, status = fit(make_config(*options, "logging.image_every=2"), tmp_path / "run")
    assert status == 0
    picture = Image.open(tmp_path / "run" / "images" / "step0000002.png")
    assert picture.size == (2 * 16, 3 * 16)  # two samples; scene, nothing known, all but the hole known
    for name, tensor in run.module.state_dict().items():
        if name.startswith(("first_stage_model.encoder.", "first_stage_model.quant_conv.")):
            assert torch.equal(tensor, weights[name]), name
    model = load_model(make_config(), pretrained, decoder=tmp_path / "run" / "checkpoints" / "last.ckpt")
    trained = last(tmp_path / "run")["state_dict"]
    for name, tensor in model.first_stage_model.state_dict().items():
        assert torch.equal(tensor, trained[f"first_stage_model.{name}"]), name


def test_what_of_an_asymmetric_decoder_starts_at_random(
    make_config: MakeConfig, pretrained: Path, weights: Weights, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("stage=first_stage", "model.first_stage.decoder=asymmetric")
    run = Run(make_config(*options), tmp_path)
    with pytest.raises(CheckpointError, match="--pretrained-model"):
        run.initialise(None, from_scratch=True, resuming=False)
    run.initialise(str(pretrained), from_scratch=False, resuming=False)
    assert "first_stage_model.decoder" in capsys.readouterr().out
    for name, tensor in run.module.state_dict().items():
        assert name.startswith("first_stage_model.decoder.encoder.") or torch.equal(tensor, weights[name]), name
    wide = Run(make_config(*options, "model.first_stage.decoder_width=2.0"), tmp_path)
    wide.initialise(str(pretrained), from_scratch=False, resuming=False)
    assert "first_stage_model.decoder" in capsys.readouterr().out
    partial = tmp_path / "partial.safetensors"
    write_safetensors(partial, {n: x for n, x in weights.items() if "first_stage_model.encoder.mid" not in n})
    with pytest.raises(CheckpointError, match="missing"):
        wide.initialise(str(partial), from_scratch=False, resuming=False)


def test_a_first_stage_with_its_discriminator_starts_a_diffusion_run(
    fit: Fit, make_config: MakeConfig, tmp_path: Path
) -> None:
    """What the two recipes of a small model do, one after the other; with pictures of both."""
    common = ("trainer.max_epochs=1", "logging.image_every=2", "model.image_size=32")
    first = make_config(
        "stage=first_stage",
        *common,
        "first_stage_training.adversarial_weight=0.5",
        "first_stage_training.adversarial_start=2",
        "first_stage_training.ema_decay=0.9",
    )
    assert fit(first, tmp_path / "first")[1] == 0
    picture = Image.open(tmp_path / "first" / "images" / "step0000002.png")
    assert picture.size == (2 * 32, 2 * 32)  # two samples; scene, reconstruction

    run = Run(make_config(*common, "training.train_tower=true"), tmp_path / "second")
    autoencoder = tmp_path / "first" / "checkpoints" / "last.ckpt"
    run.initialise(str(autoencoder), from_scratch=True, resuming=False)
    assert run.fit(None) == 0
    picture = Image.open(tmp_path / "second" / "images" / "step0000002.png")
    assert picture.size == (2 * 32, 4 * 32)  # scene, masked scene, exemplar, sample

    # The run's own checkpoint is an ordinary model file, with the averaged weights.
    model = load_model(tmp_path / "second" / "config.yaml", tmp_path / "second" / "checkpoints" / "last.ckpt")
    averaged = last(tmp_path / "second")["state_dict"]["proj_out.weight"]
    assert torch.equal(model.proj_out.weight, averaged)
    assert not torch.equal(averaged, last(tmp_path / "second")["current_model_state"]["proj_out.weight"])


def test_what_a_run_leaves_behind(fit: Fit, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("logging.checkpoint_every=2", "logging.keep_last=2")
    fit(config, tmp_path)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {
        "last.ckpt",
        "best.ckpt",
        "step0000010.ckpt",
        "step0000012.ckpt",
    }
    assert load_config(tmp_path / "config.yaml") == config
    assert list(tmp_path.glob("events.out.tfevents*"))
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {"train/loss", "train/loss_t1of4", "train/lr", "train/param_norm", "val/loss"} <= rows[0].keys()

    def column(name: str) -> list[float]:
        return [float(row[f"train/{name}"]) for row in rows if row[f"train/{name}"]]

    assert len(column("grad_norm")) == 12
    parts = zip(*(column(f"grad_norm_{part}") for part in ("unet", "mapper", "null_token")), strict=True)
    assert column("grad_norm") == pytest.approx([math.hypot(*norms) for norms in parts], rel=1e-5)
    assert all(0 <= share < 1 for share in column("data_wait"))
    for samples, seconds in zip(column("samples_per_s"), column("step_s"), strict=True):
        assert samples * seconds == pytest.approx(4)
    # operations: the same for every step, and the encoders' with the UNet's forward and backward passes
    operations = [a * b for a, b in zip(column("tflops"), column("step_s"), strict=True)]
    assert min(operations) > 0 and max(operations) == pytest.approx(min(operations))


def test_epochs_shorter_than_the_logging_interval_are_logged(fit: Fit, make_config: MakeConfig, tmp_path: Path) -> None:
    """Four batches in an epoch, two in a step."""
    fit(
        make_config("trainer.log_every_n_steps=5", "trainer.accumulate_grad_batches=2", "trainer.max_epochs=5"),
        tmp_path,
    )
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert [int(row["step"]) for row in rows] == [4, 9]
    assert all(row[f"train/{name}"] for row in rows for name in ("grad_norm", "lr", "samples_per_s", "step_s"))


def test_loggers_are_chosen_by_name(
    fit: Fit, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(make_config("logging.loggers=[csv]", "trainer.max_epochs=1"), tmp_path)
    assert (tmp_path / "metrics.csv").is_file() and not list(tmp_path.glob("events*"))
    with pytest.raises(ConfigError, match=r"logging\.loggers: got 'mlflow', expected"):
        make_config("logging.loggers=[mlflow]")
    monkeypatch.setattr(wandb_module, "_WANDB_AVAILABLE", False)
    with pytest.raises(ConfigError, match="pip install wandb"):
        Run(make_config("logging.loggers=[wandb]"), tmp_path)


def test_weights_and_biases(fit: Fit, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    options = ("logging.loggers=[wandb,csv]", "trainer.max_epochs=1", "logging.image_every=2")
    run, code = fit(make_config(*options), tmp_path / "a run")
    assert code == 0 and run.trainer.loggers[0].experiment.config["training"]["base_lr"] == 1e-3
    wandb.finish()
    assert list((tmp_path / "a run").rglob("media/images/grid*.png"))


@pytest.mark.parametrize("tokens", ["pooled", "all"])
def test_lora_trains_additions_that_loading_adds_up(
    tokens: str, fit: Fit, make_config: MakeConfig, pretrained: Path, batch: Weights, tmp_path: Path
) -> None:
    config = make_config("training.lora_rank=4", "training.ema_decay=0", f"model.exemplar_encoder.tokens={tokens}")
    run, _ = fit(config, tmp_path)
    trained = {name for name, p in run.module.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in name and (".attn1." in name or ".attn2." in name) for name in trained)
    assert any("attn2.to_q" in name for name in trained) is (tokens == "all")
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    model = load_model(config, checkpoint)  # plain names, nothing missing, nothing left over
    given = to_module_keys(read_checkpoint(pretrained))
    moved = {name for name, tensor in model.state_dict().items() if name in given and not tensor.equal(given[name])}
    stems = {name.split(".lora_")[0] for name in trained}
    assert moved == {f"{stem}.weight" for stem in stems}
    run.module.eval()
    x_t, t = torch.randn(2, 9, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 500])
    context = model.null_context().expand(2, 1, -1)
    with torch.no_grad():
        # a sum of weights against a sum of products: the order of roundings
        torch.testing.assert_close(model.unet(x_t, t, context), run.module.unet(x_t, t, context), rtol=1e-4, atol=1e-5)


def test_lora_trains_nothing_that_is_random(make_config: MakeConfig, weights: Weights, tmp_path: Path) -> None:
    path = tmp_path / "sd.safetensors"
    write_safetensors(path, {name: tensor for name, tensor in weights.items() if not name.startswith(NEW_PARTS)})
    run = Run(make_config("training.lora_rank=4"), tmp_path)
    with pytest.raises(CheckpointError, match="would stay random"):
        run.initialise(str(path), from_scratch=False, resuming=False)


def test_half_of_a_lora_is_refused() -> None:
    state = {"a.base_layer.weight": torch.zeros(2, 2), "a.lora_A.default.weight": torch.zeros(1, 2)}
    with pytest.raises(CheckpointError, match="incomplete"):
        to_module_keys(state)


def test_frozen_parts_have_no_moments_and_no_buckets(make_config: MakeConfig, fit: Fit, tmp_path: Path) -> None:
    module = DiffusionTraining(make_config())
    trained = [p for p in module.parameters() if p.requires_grad]
    assert 0 < len(trained) < len(list(module.parameters()))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        facts = DistributedDataParallel(module)._get_ddp_logging_data()
    finally:
        torch.distributed.destroy_process_group()
    assert facts["total_parameter_size_bytes"] == sum(p.numel() * p.element_size() for p in trained)
    assert facts["num_parameter_tensors"] == len(trained)
    fit(make_config("trainer.max_epochs=1"), tmp_path)
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert len(state["optimizer_states"][0]["state"]) == len(trained)
    assert len(state["current_model_state"]) == len(trained)


def test_a_run_tells_how_it_was_started(fit: Fit, make_config: MakeConfig, tmp_path: Path) -> None:
    fit(make_config("trainer.max_epochs=1"), tmp_path)
    fit(make_config("trainer.max_epochs=2"), tmp_path, resume=tmp_path / "checkpoints" / "last.ckpt")
    first, second = json.loads((tmp_path / "history.json").read_text())
    assert first["resumed_from"] is None
    assert second["resumed_from"] == str(tmp_path / "checkpoints" / "last.ckpt")
    assert first["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert first["command"] == sys.argv and first["seed"] == 23


def test_average_follows_its_formula(fit: Fit, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("trainer.max_epochs=1", "logging.checkpoint_every=1", "logging.keep_last=9")
    fit(config, tmp_path)
    steps = [torch.load(path, weights_only=True) for path in sorted(tmp_path.glob("checkpoints/step*.ckpt"))]
    average = steps[0]["current_model_state"]["proj_out.weight"]  # the first step's weights are its start
    for n, state in enumerate(steps):
        if n > 0:
            decay = min(0.9, (1 + n) / (10 + n))
            average = decay * average + (1 - decay) * state["current_model_state"]["proj_out.weight"]
        torch.testing.assert_close(state["state_dict"]["proj_out.weight"], average, rtol=1e-5, atol=1e-7)


def test_the_average_is_float32_and_gives_the_weights_back() -> None:
    """With a decay of 0.999 a bfloat16 average would stay where it is."""
    module = torch.nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    ema, trainer = EMA(0.999), SimpleNamespace(global_step=0)
    ema._count = 10**6  # the warm-up is over
    with torch.no_grad():
        module.weight.fill_(1.0)
        ema.on_train_start(trainer, module)  # pyright: ignore[reportArgumentType]
        module.weight.fill_(2.0)
    for step in range(1, 101):
        trainer.global_step = step
        ema.on_train_batch_end(trainer, module, None, None, 0)  # pyright: ignore[reportArgumentType]
    checkpoint = {"state_dict": module.state_dict()}
    ema.on_save_checkpoint(trainer, module, checkpoint)  # pyright: ignore[reportArgumentType]
    assert float(checkpoint["state_dict"]["weight"]) == pytest.approx(2 - 0.999**100, rel=1e-5)
    ema.swap_in(module)  # pyright: ignore[reportArgumentType]
    assert module.weight.item() == pytest.approx(2 - 0.999**100, rel=2**-8)
    ema.swap_out(module)  # pyright: ignore[reportArgumentType]
    assert module.weight.item() == 2.0
    ema.on_save_checkpoint(trainer, module, checkpoint := {"state_dict": module.state_dict()})  # pyright: ignore[reportArgumentType]
    assert float(checkpoint["state_dict"]["weight"]) == pytest.approx(2 - 0.999**100, rel=1e-5)


@pytest.mark.parametrize("stage", ["diffusion", "first_stage"])
def test_image_grids_show_the_average(
    stage: str, fit: Fit, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module_class = DiffusionTraining if stage == "diffusion" else FirstStageTraining
    weights, original = [], module_class.preview

    def preview(self: Any, *args: Any) -> list[Tensor]:
        weights.append({name: p.detach().clone() for name, p in self.named_parameters() if p.requires_grad})
        return original(self, *args)

    monkeypatch.setattr(module_class, "preview", preview)
    options = ("logging.image_every=4", "logging.checkpoint_every=4", "first_stage_training.ema_decay=0.9")
    run, _ = fit(make_config(f"stage={stage}", "trainer.max_epochs=1", *options), tmp_path)
    state = last(tmp_path)
    assert len(weights) == 1 and state["global_step"] == 4
    for name, shown in weights[0].items():
        assert torch.equal(shown, state["state_dict"][name]), name
    for name, parameter in run.module.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, state["current_model_state"][name]), name


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (("trainer.precision=bf16-true",), "trainer.precision: got bf16-true"),
        (("trainer.strategy=fsdp2", "training.compile=true"), "training.compile: got true"),
        (("trainer.strategy=fsdp2", "stage=first_stage"), "trainer.strategy: got fsdp2"),
        (
            ("stage=first_stage", "trainer.devices=2", "trainer.strategy=ddp", ADVERSARIAL),
            "trainer.strategy: got ddp, expected ddp_find_unused_parameters_true",
        ),
    ],
)
def test_combinations_that_cannot_work(
    overrides: tuple[str, ...], key: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=re.escape(key)):
        Run(make_config(*overrides), tmp_path)


def test_a_run_without_an_end(fit: Fit, make_config: MakeConfig, tmp_path: Path) -> None:
    """Lightning's -1 means forever: no last step is known to the learning rate's schedule."""
    run, code = fit(make_config("trainer.max_epochs=-1"), tmp_path, callbacks=[StopAt(5)])
    assert code == 0 and run.trainer.global_step == 5
    with pytest.raises(ConfigError, match="lr_schedule: got cosine"):
        fit(make_config("trainer.max_epochs=-1", "training.lr_schedule=cosine"), tmp_path / "cosine")


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, trainer: pl.Trainer, *args: Any
    ) -> None:
        trainer.should_stop = trainer.global_step >= self.step


def test_packages_that_are_not_installed_do_not_end_a_run(
    fit: Fit, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldm.training.run.PACKAGES", ("torch", "no-such-package"))
    assert fit(make_config("trainer.max_epochs=1"), tmp_path)[1] == 0
    assert list(json.loads((tmp_path / "history.json").read_text())[0]["versions"]) == ["torch"]


def test_keys_stay_on_the_cpu(make_config: MakeConfig, batch: Weights) -> None:
    moved = DiffusionTraining(make_config()).transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert moved.keys() == batch.keys()
    assert {name for name, tensor in moved.items() if tensor.device.type == "cpu"} == {"key"}


def test_operations_are_counted_without_a_trace(make_config: MakeConfig, batch: Weights) -> None:
    """As PyTorch counts them in a real step, and no random number is drawn."""
    config, before = make_config(), torch.get_rng_state()
    counted = batch_flops(config, batch)
    assert torch.equal(torch.get_rng_state(), before)
    module = DiffusionTraining(config)
    with FlopCounterMode(display=False) as counter:
        module.losses(batch)[0].mean().backward()
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_accumulated_batches_are_one_step(fit: Fit, make_config: MakeConfig, tmp_path: Path) -> None:
    """Two accumulated batches of two give the gradient of one batch of four (rounding: 1e-4 of the largest)."""
    moments = []
    for name, overrides in (("whole", ()), ("halves", ("data.batch_size=2", "trainer.accumulate_grad_batches=2"))):
        fit(make_config("trainer.max_epochs=null", "trainer.max_steps=1", *overrides), tmp_path / name)
        state = last(tmp_path / name)
        assert state["global_step"] == 1
        moments.append([x["exp_avg"] for x in state["optimizer_states"][0]["state"].values()])
    assert_gradients_close(*moments)


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one(
    fit: Fit, make_config: MakeConfig, config_file: Path, pretrained: Path, tmp_path: Path
) -> None:
    """Gloo, DDP, two samples each, against one process with all four."""
    end = ["trainer.max_epochs=null", "trainer.max_steps=1"]
    command = [
        sys.executable,
        "main.py",
        "-b",
        str(config_file),
        "-l",
        str(tmp_path),
        "-n",
        "two",
        "--pretrained-model",
        str(pretrained),
        *end,
        "data.batch_size=2",
        "trainer.devices=2",
        "trainer.strategy=ddp",
    ]
    # Processes without a network: rendezvous and rings stay on the loopback device.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "batch: 4 samples per step" in done.stdout
    (two,) = tmp_path.glob("*_two")
    fit(make_config(*end), tmp_path / "one")
    one_state, two_state = last(tmp_path / "one"), last(two)
    assert two_state["global_step"] == 1
    assert_gradients_close(
        *([x["exp_avg"] for x in s["optimizer_states"][0]["state"].values()] for s in (one_state, two_state))
    )


def assert_gradients_close(first: list[Tensor], second: list[Tensor]) -> None:
    """Adam's first moment after one step is a tenth of the gradient. Only the order of float32 sums differs: 1e-5."""
    assert len(first) == len(second) > 100
    scale = max(x.abs().max().item() for x in first)
    assert scale > 1e-4
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * scale)


class TestNonFinite:
    def test_loss(
        self,
        config_file: Path,
        pretrained: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        original = DiffusionTraining.losses

        def losses(self: DiffusionTraining, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            values, t = original(self, batch)
            return (values * torch.nan if self.training and self.global_step == 5 else values), t

        monkeypatch.setattr(DiffusionTraining, "losses", losses)
        arguments = ["-b", str(config_file), "-l", str(tmp_path), "--pretrained-model", str(pretrained)]
        assert main([*arguments, "logging.checkpoint_every=1"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "loss is nan at step 5, batch 1" in error
        (run_dir,) = tmp_path.iterdir()
        assert last(run_dir)["global_step"] == 5  # the state before the step that failed
        assert all(x.isfinite().all() for x in last(run_dir)["current_model_state"].values())

    def test_weights_are_not_saved(
        self, fit: Fit, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original = DiffusionTraining.losses

        def losses(self: DiffusionTraining, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            values, t = original(self, batch)
            if self.training and self.global_step == 2:  # finite, but with an infinite slope
                values = values + (self.learnable_vector - self.learnable_vector.detach()).abs().sqrt().sum()
            return values, t

        monkeypatch.setattr(DiffusionTraining, "losses", losses)
        with pytest.raises(NonFiniteError, match="after step 3"):
            fit(make_config("logging.checkpoint_every=1"), tmp_path)
        assert last(tmp_path)["global_step"] == 2


def test_resuming_from_weights_alone(fit: Fit, make_config: MakeConfig, tmp_path: Path) -> None:
    path = tmp_path / "weights.ckpt"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(CheckpointError, match="no training state"):
        fit(make_config(), tmp_path / "run", resume=path)


def test_a_malicious_checkpoint_is_not_run(fit: Fit, make_config: MakeConfig, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "owned",))

    path = tmp_path / "bad.ckpt"
    torch.save({"optimizer_states": [], "payload": Payload()}, path)
    with pytest.raises(CheckpointError):
        fit(make_config(), tmp_path / "run", resume=path)
    assert not (tmp_path / "owned").exists()


def test_checkpoints_hold_the_names_of_the_plain_model(
    fit: Fit, make_config: MakeConfig, weights: Weights, tmp_path: Path
) -> None:
    fit(make_config("trainer.max_epochs=1", "training.ema_decay=0"), tmp_path)
    saved = to_module_keys(read_checkpoint(tmp_path / "checkpoints" / "last.ckpt"))
    assert weights.keys() <= saved.keys()
