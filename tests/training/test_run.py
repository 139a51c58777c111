"""What a run starts from, writes and refuses."""

from __future__ import annotations

import json
import logging
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from pytorch_lightning.loggers import wandb as wandb_module
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ldm.checkpoint.io import CheckpointError, read_checkpoint, write_safetensors
from ldm.checkpoint.keys import NEW_PARTS, to_module_keys
from ldm.config import ConfigError
from ldm.editing.cli import build_parser
from ldm.latent_diffusion import load_model
from ldm.training.diffusion_module import DiffusionTraining
from ldm.training.run import Run
from tests.training.conftest import Fit, MakeConfig, StopAt, column, last

ROOT = Path(__file__).parents[2]

Weights = dict[str, Tensor]

ONE_STEP = "trainer.max_steps=1"
ADVERSARIAL = "first_stage_training.adversarial_weight=0.5"


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
    two_steps = ("trainer.max_epochs=1", "trainer.limit_train_batches=2", "trainer.limit_val_batches=1")
    common = (*two_steps, "logging.image_every=2", "model.image_size=32")
    first = make_config(
        "stage=first_stage",
        *common,
        "first_stage_training.adversarial_weight=0.5",
        "first_stage_training.adversarial_start=1",
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


def test_loggers_are_chosen_by_name(
    fit: Fit, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(make_config("logging.loggers=[csv]", ONE_STEP), tmp_path)
    assert (tmp_path / "metrics.csv").is_file() and not list(tmp_path.glob("events*"))
    with pytest.raises(ConfigError, match=r"logging\.loggers: got 'mlflow'"):
        make_config("logging.loggers=[mlflow]")
    monkeypatch.setattr(wandb_module, "_WANDB_AVAILABLE", False)
    with pytest.raises(ConfigError, match="pip install wandb"):
        Run(make_config("logging.loggers=[wandb]"), tmp_path)


def test_weights_and_biases(fit: Fit, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    options = ("logging.loggers=[wandb,csv]", "trainer.max_epochs=1", "logging.image_every=2")
    run, code = fit(make_config(*options), tmp_path / "a run")
    assert code == 0 and run.trainer.loggers[0].experiment.config["training"]["base_lr"] == 1e-3  # pyright: ignore[reportAttributeAccessIssue]
    wandb.finish()
    assert list((tmp_path / "a run").rglob("media/images/grid*.png"))


@pytest.mark.parametrize("tokens", ["pooled", "all"])
def test_lora_trains_additions_that_loading_adds_up(
    tokens: str, fit: Fit, make_config: MakeConfig, pretrained: Path, batch: Weights, tmp_path: Path
) -> None:
    options = ("training.lora_rank=4", "training.ema_decay=0", "trainer.max_steps=2", "training.warmup_steps=0")
    config = make_config(*options, f"model.exemplar_encoder.tokens={tokens}")
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
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
    try:
        facts = DistributedDataParallel(module)._get_ddp_logging_data()
    finally:
        torch.distributed.destroy_process_group()
    assert facts["total_parameter_size_bytes"] == sum(p.numel() * p.element_size() for p in trained)
    assert facts["num_parameter_tensors"] == len(trained)
    fit(make_config(ONE_STEP), tmp_path)
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert len(state["optimizer_states"][0]["state"]) == len(trained)
    assert len(state["current_model_state"]) == len(trained)


def test_a_run_tells_how_it_was_started(
    fit: Fit, make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(make_config(ONE_STEP), tmp_path)
    fit(make_config("trainer.max_steps=2"), tmp_path, resume=tmp_path / "checkpoints" / "last.ckpt")
    first, second = json.loads((tmp_path / "history.json").read_text())
    assert first["resumed_from"] is None
    assert second["resumed_from"] == str(tmp_path / "checkpoints" / "last.ckpt")
    assert first["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert first["command"] == sys.argv and first["seed"] == 23
    (tmp_path / "history.json").write_text("[{")
    fit(make_config("trainer.max_steps=3"), tmp_path, resume=tmp_path / "checkpoints" / "last.ckpt")
    assert len(json.loads((tmp_path / "history.json").read_text())) == 1
    assert "history.json: damaged" in capsys.readouterr().err


def test_a_state_that_does_not_fit_leaves_the_run_as_it_was(fit: Fit, make_config: MakeConfig, tmp_path: Path) -> None:
    fit(make_config(ONE_STEP), tmp_path)
    path, config = tmp_path / "checkpoints" / "last.ckpt", (tmp_path / "config.yaml").read_text()
    whole = last(tmp_path)
    state = whole["state_dict"]
    faults: list[tuple[dict[str, Any], list[str]]] = [
        (whole, ["model.exemplar_encoder.mapper_layers=2"]),  # another model
        ({**whole, "state_dict": {name: x for name, x in state.items() if name != "learnable_vector"}}, []),
        ({**whole, "state_dict": {**state, "model_ema.decay": torch.tensor(0.9)}}, []),
        ({name: value for name, value in whole.items() if name != "pytorch-lightning_version"}, []),
    ]
    for broken, overrides in faults:
        torch.save(broken, path)
        run = Run(make_config("trainer.max_steps=2", *overrides), tmp_path)
        run.initialise(None, from_scratch=False, resuming=True)
        with pytest.raises(CheckpointError, match=r"last\.ckpt"):
            run.fit(path)
        assert (tmp_path / "config.yaml").read_text() == config
        assert len(json.loads((tmp_path / "history.json").read_text())) == 1
    torch.save(whole, path)
    fit(make_config("trainer.max_steps=2"), tmp_path, resume=path)
    assert last(tmp_path)["global_step"] == 2


def last_words(out: str) -> tuple[dict[str, str], list[str]]:
    """What a run printed at its end, by name, and the words of the command that it recommends."""
    told = dict(line.split(": ", 1) for line in out.splitlines()[-5:] if ": " in line)
    python, script, *words = shlex.split(told["next"])
    assert python == "python" and (ROOT / script).is_file()
    return told, [script, *words]


@pytest.mark.parametrize("overrides", [(), ("trainer.limit_val_batches=0",)])
def test_a_run_ends_with_the_command_that_uses_it(
    overrides: tuple[str, ...],
    fit: Fit,
    make_config: MakeConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides = ("trainer.max_epochs=1", "trainer.limit_train_batches=1", *overrides)
    run, _ = fit(make_config(*overrides), tmp_path / "a run")
    told, (script, *words) = last_words(capsys.readouterr().out)
    used = "last" if "trainer.limit_val_batches=0" in overrides else "best"
    assert told["run directory"] == str(run.run_dir)
    assert ("best checkpoint" in told) is (used == "best")
    if used == "best":
        best = min(column(run.run_dir, "val/loss"))
        assert float(told["best checkpoint"].split("val/loss ")[1].rstrip(")")) == pytest.approx(best, rel=1e-3)
    args = build_parser("").parse_args(words)
    assert script == "inference.py" and args.image and args.mask and args.reference and "--prompt" not in words
    assert (args.config, args.checkpoint) == (run.run_dir / "config.yaml", run.run_dir / "checkpoints" / f"{used}.ckpt")
    moved = run.run_dir.rename(tmp_path / "moved")  # what was the best is then unknown to Lightning
    fit(make_config(*overrides), moved, resume=moved / "checkpoints" / "last.ckpt")
    assert str(moved / "checkpoints" / f"{used}.ckpt") in last_words(capsys.readouterr().out)[1]


@pytest.mark.parametrize(
    ("overrides", "options"),
    [
        (("model.condition=text",), {"--prompt"}),
        (("model.condition=both",), {"--prompt", "--reference"}),
        (("stage=first_stage",), {"--pretrained-model", "--train-from-scratch"}),
        (("stage=first_stage", "model.first_stage.decoder=asymmetric"), set()),
    ],
)
def test_the_command_suits_the_model(overrides: tuple[str, ...], options: set[str], make_config: MakeConfig) -> None:
    run = SimpleNamespace(config=make_config(*overrides), run_dir=Path("run"), trainer=None)
    _, words = last_words(Run.result(run))  # pyright: ignore[reportArgumentType]
    assert options <= set(words) and "run/checkpoints/last.ckpt" in words
    assert {"--prompt", "--reference"} & set(words) == {"--prompt", "--reference"} & options


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (("trainer.precision=bf16-true",), "trainer.precision: got bf16-true"),
        (
            ("training.optimizer=adamw_fused", "trainer.precision=bf16-mixed", "trainer.gradient_clip_val=1.0"),
            "training.optimizer: got adamw_fused",
        ),
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
    config = make_config("trainer.max_epochs=-1", "trainer.limit_train_batches=1")
    run, code = fit(config, tmp_path, callbacks=[StopAt(2)])
    assert code == 0 and run.trainer.global_step == 2
    with pytest.raises(ConfigError, match="lr_schedule: got cosine"):
        fit(make_config("trainer.max_epochs=-1", "training.lr_schedule=cosine"), tmp_path / "cosine")


def test_a_run_whose_time_is_up_is_saved(fit: Fit, make_config: MakeConfig, tmp_path: Path) -> None:
    run, code = fit(make_config("trainer.max_epochs=100000", "trainer.max_time={milliseconds: 1}"), tmp_path)
    assert code == 0 and last(tmp_path)["global_step"] == run.trainer.global_step > 0


def test_packages_that_are_not_installed_do_not_end_a_run(
    fit: Fit, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldm.training.run.PACKAGES", ("torch", "no-such-package"))
    assert fit(make_config(ONE_STEP), tmp_path)[1] == 0
    assert list(json.loads((tmp_path / "history.json").read_text())[0]["versions"]) == ["torch"]


def test_lightning_s_hints_are_passed_on_and_its_advertising_is_not(make_config: MakeConfig, tmp_path: Path) -> None:
    Run(make_config(), tmp_path)
    logger = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    assert logger.isEnabledFor(logging.INFO)
    texts = ("You are using a CUDA device that has Tensor Cores", "💡 Tip: install something")
    records = (logging.LogRecord(logger.name, logging.INFO, "", 0, text, None, None) for text in texts)
    assert [bool(logger.filter(record)) for record in records] == [True, False]


def test_keys_stay_on_the_cpu(make_config: MakeConfig, batch: Weights) -> None:
    moved = DiffusionTraining(make_config()).transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert moved.keys() == batch.keys()
    assert {name for name, tensor in moved.items() if tensor.device.type == "cpu"} == {"key"}


def test_accumulated_batches_are_one_step(fit: Fit, make_config: MakeConfig, tmp_path: Path) -> None:
    """Two accumulated batches of one give the gradient of one batch of two (rounding: 1e-4 of the largest)."""
    moments = []
    for name, overrides in (("whole", ()), ("halves", ("data.batch_size=1", "trainer.accumulate_grad_batches=2"))):
        fit(make_config("trainer.max_epochs=null", "trainer.max_steps=1", *overrides), tmp_path / name)
        state = last(tmp_path / name)
        assert state["global_step"] == 1
        moments.append([x["exp_avg"] for x in state["optimizer_states"][0]["state"].values()])
    assert_gradients_close(*moments)


def assert_gradients_close(first: list[Tensor], second: list[Tensor]) -> None:
    """Adam's first moment after one step is a tenth of the gradient. Only the order of float32 sums differs: 1e-5."""
    assert len(first) == len(second) > 100
    scale = max(x.abs().max().item() for x in first)
    assert scale > 1e-4
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * scale)


def test_checkpoints_hold_the_names_of_the_plain_model(
    fit: Fit, make_config: MakeConfig, weights: Weights, tmp_path: Path
) -> None:
    fit(make_config(ONE_STEP, "training.ema_decay=0"), tmp_path)
    saved = to_module_keys(read_checkpoint(tmp_path / "checkpoints" / "last.ckpt"))
    assert weights.keys() <= saved.keys()
