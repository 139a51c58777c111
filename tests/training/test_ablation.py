"""The ablation's configs train, and its one command runs them, remembers what is done and makes the table."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.checkpoint.io import read_checkpoint
from ldm.checkpoint.keys import FIRST_STAGE, NEW_PARTS, TOWER
from ldm.config import Config, load_config
from ldm.files import UserError
from ldm.training import cli as train
from ldm.training.run import Run
from scripts import ablation, pipeline

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).parents[2] / "configs"
# Every row adds one technique: prior, augmentation (two keys), bottleneck, guidance (two keys).
SWITCHES = {
    "baseline": (False, False, 0.0, "all", 0.0, 1.0),
    "prior": (True, False, 0.0, "all", 0.0, 1.0),
    "augmentation": (True, True, 0.5, "all", 0.0, 1.0),
    "bottleneck": (True, True, 0.5, "pooled", 0.0, 1.0),
    "guidance": (True, True, 0.5, "pooled", 0.2, 5.0),
}
MakeConfig = Callable[..., Config]


def switches(config: Config) -> tuple[object, ...]:
    data, training = config.data, config.training
    tokens = config.model.exemplar_encoder.tokens
    holes, guidance = data.p_arbitrary_mask, config.logging.guidance_scale
    return training.use_prior, data.augment_exemplar, holes, tokens, training.p_uncond, guidance


class TestConfigs:
    @pytest.mark.parametrize("recipe", ["v1", "mini", "tiny"])
    def test_rows_are_cumulative_over_any_recipe(self, recipe: str) -> None:
        base = load_config(CONFIGS / f"{recipe}.yaml")
        rows = {row: load_config(CONFIGS / f"{recipe}.yaml", ablation.overlay(row)) for row in ablation.ROWS}
        assert {row: switches(config) for row, config in rows.items()} == SWITCHES
        for config in rows.values():  # and nothing else is touched
            config.model.exemplar_encoder = base.model.exemplar_encoder
            assert config.model == base.model
            assert config.trainer == base.trainer

    def test_the_last_row_is_the_paper_s_recipe(self) -> None:
        assert load_config(CONFIGS / "v1.yaml", ablation.overlay("guidance")) == load_config(CONFIGS / "v1.yaml")

    @pytest.mark.parametrize("row", ablation.ROWS)
    def test_each_trains(
        self, row: str, config_file: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments = ["-b", str(config_file), str(ablation.overlay(row)), "-l", str(tmp_path)]
        overrides = ["trainer.max_steps=2", "trainer.limit_val_batches=1", "logging.image_every=2"]
        assert train.main([*arguments, "--pretrained-model", str(pretrained), *overrides]) == 0
        assert ("random weights" in capsys.readouterr().out) is (row == "baseline")
        (checkpoint,) = tmp_path.glob(f"*_{row}/checkpoints/last.ckpt")
        trained, given = read_checkpoint(checkpoint), read_checkpoint(pretrained)
        assert {name: x.shape for name, x in trained.items() if name in given} == {n: x.shape for n, x in given.items()}
        assert list(checkpoint.parents[1].glob("images/*.png"))  # sampled with the row's context and guidance
        # One token leaves the queries without effect and they are frozen; several tokens train them.
        (query,) = [n for n in given if n.endswith("middle_block.1.transformer_blocks.0.attn2.to_q.weight")]
        pooled = row not in ("baseline", "prior", "augmentation")
        assert torch.equal(trained[query], given[query]) is pooled


class TestUsePrior:
    def test_only_frozen_parts_are_taken(self, make_config: MakeConfig, pretrained: Path, tmp_path: Path) -> None:
        run = Run(make_config("training.use_prior=false", "model.exemplar_encoder.tokens=all"), tmp_path)
        run.initialise(str(pretrained), from_scratch=False, resuming=False)
        given = read_checkpoint(pretrained)
        for name, parameter in run.module.named_parameters():
            taken = torch.equal(parameter, given[name])
            if name.startswith((FIRST_STAGE, TOWER)):
                assert taken, name
            elif given[name].std() > 0:  # norms start at one either way
                assert not taken, name

    def test_fresh_conditioning(self, make_config: MakeConfig, pretrained: Path, tmp_path: Path) -> None:
        run = Run(make_config("training.fresh_conditioning=true"), tmp_path)
        run.initialise(str(pretrained), from_scratch=False, resuming=False)
        given = read_checkpoint(pretrained)
        for name, parameter in run.module.named_parameters():
            if not name.startswith(NEW_PARTS):
                assert torch.equal(parameter, given[name]), name
            elif given[name].std() > 0:
                assert not torch.equal(parameter, given[name]), name

    def test_a_trained_tower_starts_from_nothing_too(
        self, make_config: MakeConfig, pretrained: Path, tmp_path: Path
    ) -> None:
        run = Run(make_config("training.use_prior=false", "training.train_tower=true"), tmp_path)
        run.initialise(str(pretrained), from_scratch=False, resuming=False)
        name = TOWER + "embeddings.patch_embedding.weight"
        assert not torch.equal(run.module.state_dict()[name], read_checkpoint(pretrained)[name])


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("bench"), np.random.default_rng(0)
    for name in ("GT_4", "Ref_4", "Mask_bbox_4"):
        (root / name).mkdir()
    for i in range(4):
        for name, size in ((f"GT_4/{i:012d}_GT", (24, 24)), (f"Ref_4/{i:012d}_ref", (9, 12))):
            pixels = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
            pixels.resize(size, Image.Resampling.BICUBIC).save(root / f"{name}.png")
        hole = Image.new("L", (24, 24), 0)
        hole.paste(255, (6, 7, 18, 17))
        hole.save(root / f"Mask_bbox_4/{i:012d}_mask.png")
    np.save(root / "id_list.npy", np.arange(4))
    return root


@pytest.fixture
def arguments(config_file: Path, pretrained: Path, dataset: Path, bench: Path, tmp_path: Path) -> list[str]:
    places = {"--out": tmp_path / "out", "--base": config_file, "--pretrained-model": pretrained}
    places |= {"--scenes": dataset, "--bench": bench}
    return [str(word) for place in places.items() for word in place]


def scripts_of(commands: list[list[str]]) -> list[str]:
    return [Path(command[0]).stem for command in commands]


class TestCommand:
    def test_dry_run(
        self, arguments: list[str], pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        more = [
            "--draws",
            "2",
            "--max-steps",
            "5",
            "--set",
            "data.kind=cached",
            "--limit",
            "3",
            "--device",
            "cpu",
            "--dry-run",
        ]
        assert ablation.main([*arguments, *more]) == 0
        lines = capsys.readouterr().out.splitlines()
        commands = {lines[i].removeprefix("# "): lines[i + 1] for i in range(0, len(lines), 2)}
        assert not (tmp_path / "out").exists()
        assert list(commands) == [
            *("cache-baseline", "cache-augmentation"),
            *(f"{step}-{r}" for r in SWITCHES for step in ("train", "sample", "evaluate")),
        ]
        out = tmp_path / "out"
        newest = f"{out}/guidance/train/*/"
        for row in SWITCHES:
            train_command = commands[f"train-{row}"]
            assert f"configs/ablation/{row}.yaml" in train_command
            assert "trainer.max_steps=5 data.root=" in train_command
            assert f"--pretrained-model {pretrained}" in train_command
            assert ("training.fresh_conditioning=true" in train_command) is (row != "baseline")
            drawn = "baseline" if row in ("baseline", "prior") else "augmentation"
            assert train_command.endswith(f"data.root={out}/cache/{drawn}")
            scale = 5 if row == "guidance" else 1
            assert f"--guidance-scale {scale} --batch-size 16 --limit 3 --device cpu" in commands[f"sample-{row}"]
        assert f"--checkpoint {newest}checkpoints/last.ckpt --config {newest}config.yaml" in commands["sample-guidance"]
        assert f"guidance={out}/guidance/samples --metrics fid clip identification" in commands["evaluate-guidance"]

    def test_a_given_prior(self, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert ablation.main([*arguments, "--prior", "sd.ckpt", "--rows", "prior", "--dry-run"]) == 0
        out = capsys.readouterr().out
        assert "--pretrained-model sd.ckpt" in out
        assert "fresh_conditioning" not in out  # what it has of the conditioning is its own
        assert "cache" not in out  # this recipe draws its samples anew in every epoch

    def test_the_table(
        self, arguments: list[str], in_process: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Two rows with all that they need; then nothing is left to do; then a third row is added."""
        more = ["--max-steps", "2", "--set", "data.kind=cached", "training.ema_decay=0.0"]
        more += ["--metrics", "clip", "identification", "copying", "--protocol", "ours"]
        assert ablation.main([*arguments, *more, "--rows", "baseline", "guidance"]) == 0, capsys.readouterr().err
        row = ["main", "inference_test_bench", "evaluate"]
        assert scripts_of(in_process) == ["cache_latents", "cache_latents", *row, *row]
        out = tmp_path / "out"
        markdown = (out / "ablation.md").read_text().splitlines()
        assert markdown[0].endswith("| paper: FID | paper: QS | paper: CLIP score |")
        assert markdown[2].startswith("| Baseline |")
        assert markdown[3].endswith("| 3.18 | 77.80 | 84.97 |")
        record = json.loads((out / "ablation.json").read_text())["rows"]
        assert record["guidance"]["figures"]["identification"]["n"] == 4
        assert record["guidance"]["figures"]["copying"]["n"] == 4
        assert record["guidance"]["paper"]["FID"] == 3.18
        settings = [json.loads((out / name / "samples" / "settings.json").read_text()) for name in record]
        assert "1.0" in str(settings[0]) and "5.0" in str(settings[1])

        in_process.clear()
        assert ablation.main([*arguments, *more, "--rows", "baseline", "guidance"]) == 0
        assert in_process == []
        assert ablation.main([*arguments, *more, "--rows", "baseline", "bottleneck", "guidance"]) == 0
        assert scripts_of(in_process) == row
        assert sum(line.startswith("|") for line in (out / "ablation.md").read_text().splitlines()) == 5

        capsys.readouterr()
        assert ablation.main([*arguments, *more, "--rows", "baseline", "--max-steps", "3"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "trainer.max_steps=3" in error and "choose another --out" in error

    def test_a_stopped_training_resumes(
        self, arguments: list[str], in_process: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        execute = pipeline.execute
        more = ["--rows", "baseline", "--max-steps", "2", "--metrics", "identification"]

        def stopped(command: list[str]) -> int:
            assert execute([*command, "trainer.max_steps=1"]) == 0
            return 143

        monkeypatch.setattr(pipeline, "execute", stopped)
        assert ablation.main([*arguments, *more]) == 2
        monkeypatch.setattr(pipeline, "execute", execute)
        in_process.clear()
        (checkpoint,) = (tmp_path / "out").glob("baseline/train/*/checkpoints/last.ckpt")
        config = checkpoint.parents[1] / "config.yaml"
        config.write_text(config.read_text().replace("max_steps: 1", "max_steps: 2"))  # what the stop stood for
        assert ablation.main([*arguments, *more]) == 0
        assert in_process[0][1:] == ["--resume", str(checkpoint.parents[1])]
        assert torch.load(checkpoint, weights_only=True)["global_step"] == 2

    def test_errors_are_one_line(self, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert ablation.main([*arguments, "--set", "data.colour=red", "--dry-run"]) == 2
        assert ablation.main([*arguments[:2], "--base", "/nowhere.yaml"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 2
        assert "data.colour" in error and "/nowhere.yaml" in error

    @pytest.mark.parametrize("text", ["{", "[]", '{"runs": {}}', '{"runs": {"prior": {"figures": {"fid": {}}}}}'])
    def test_unusable_figures(self, text: str, tmp_path: Path) -> None:
        path = tmp_path / "metrics.json"
        path.write_text(text)
        with pytest.raises(UserError, match=re.escape(str(path))):
            ablation.read_figures(path, "prior")


class TestExecute:
    def test_exit_status(self) -> None:
        assert pipeline.execute(["-c", "raise SystemExit(3)"]) == 3

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_leaves_the_script_time_to_save(self, number: int, tmp_path: Path) -> None:
        """SIGTERM is handed on; SIGINT, which a terminal sends to the script itself, is not."""
        ready = tmp_path / "ready"
        code = f"""if True:
            import pathlib, signal, sys, time
            signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), sys.exit(143)))
            pathlib.Path({str(ready)!r}).touch()
            time.sleep(1.5 if {number == signal.SIGINT} else 30)
            sys.exit(7)
        """

        def stop() -> None:
            while not ready.exists():
                time.sleep(0.02)
            os.kill(os.getpid(), number)

        before = signal.getsignal(number)
        thread = threading.Thread(target=stop)
        thread.start()
        assert pipeline.execute(["-c", code]) == (143 if number == signal.SIGTERM else 7)
        thread.join()
        assert signal.getsignal(number) is before
