"""The command line of `main.py`: the original's flags, the dry run, and errors in one line."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml

from ldm.config import load_config
from ldm.training.cli import main, parse_args, resolve_run

CONFIGS = Path(__file__).parents[2] / "configs"


def test_the_original_s_command_line() -> None:
    words = """--logdir models/x --pretrained_model sd.ckpt --base configs/v1.yaml --scale_lr False
    --train_from_scratch True --seed 7 --no-test -t True -n lr=3 -d data.batch_size=3"""
    args = parse_args(words.split())
    assert (args.logdir, args.pretrained_model, args.base) == ("models/x", "sd.ckpt", ["configs/v1.yaml"])
    assert (args.scale_lr, args.train_from_scratch, args.train, args.no_test) == (False, True, True, True)
    assert (args.name, args.debug, args.overrides) == ("lr=3", True, ["data.batch_size=3", "seed=7"])


def test_short_flags_and_overrides() -> None:
    words = "-b a.yaml b.yaml data.batch_size=3 -l logs -t trainer.max_steps=4 stage=first_stage -s 5"
    args = parse_args(words.split())
    assert args.base == ["a.yaml", "b.yaml"]
    assert args.overrides == ["data.batch_size=3", "trainer.max_steps=4", "stage=first_stage", "seed=5"]
    assert parse_args(["-r", "logs/run"]).resume == "logs/run"
    assert parse_args(["-b", "a.yaml", "--scale_lr"]).scale_lr is True


@pytest.mark.parametrize("words", ["", "-b a.yaml --frobnicate", "-b a.yaml --scale_lr maybe"])
def test_unusable_command_lines(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words.split())
    assert stop.value.code == 2
    assert capsys.readouterr().err


def test_dry_run(config_file: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = tmp_path / "logs"
    arguments = ["-b", str(config_file), "-l", str(logs), "--pretrained-model", str(pretrained), "--dry-run"]
    assert main([*arguments, "--scale-lr", "trainer.accumulate_grad_batches=2", "-s", "-1"]) == 0
    out = capsys.readouterr().out
    assert not logs.exists()
    printed = yaml.safe_load(out[: out.index("part ")])
    assert printed["seed"] == 2**64 - 1
    assert printed["training"]["base_lr"] == pytest.approx(4e-3)  # two batches of two
    assert "samples: 9 train, 4 validation" in out
    assert "batch: 4 samples per step, learning rate 0.004" in out
    assert "steps per epoch: 2" in out
    table = out[out.index("part ") : out.index("\nsamples: ")].replace("null token", "null_token").splitlines()[1:]
    counts = {name: [int(n.replace(",", "")) for n in numbers] for name, *numbers in map(str.split, table)}
    assert counts["first_stage_model"][0] == 0
    assert counts["null_token"] == [32, 0]
    total = counts.pop("total")
    assert [sum(column) for column in zip(*counts.values(), strict=True)] == total


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.batchsize=3"], "batchsize"),
        (["data.batch_size=many"], "data.batch_size"),
        (["trainer.gpus=1"], "gpus"),
        (["trainer.precision=7"], "trainer"),
        (["trainer.accelerator=abacus"], "trainer"),
        (["data.root=/nowhere"], "/nowhere"),
        (["data.kind=cached", "data.root=/nowhere"], "scripts/cache_latents.py"),
        (["data.batch_size=100"], "data.batch_size"),
        (["model.unet.in_channels=4"], "model.unet.in_channels"),
        (["--pretrained-model", "/nowhere.ckpt"], "/nowhere.ckpt"),
        (["--resume", "/nowhere"], "/nowhere"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str],
    message: str,
    config_file: Path,
    pretrained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    start = [] if "--pretrained-model" in arguments else ["--pretrained-model", str(pretrained)]
    assert main(["-b", str(config_file), "-l", str(tmp_path / "logs"), *start, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


def test_a_log_folder_that_cannot_be_made(
    config_file: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    arguments = ["-b", str(config_file), "-l", str(tmp_path / "file" / "logs")]
    assert main([*arguments, "--pretrained-model", str(pretrained)]) == 2
    assert f"{tmp_path / 'file' / 'logs'}: cannot write there" in capsys.readouterr().err


class TestRunDirectories:
    @pytest.fixture
    def words(self, config_file: Path, pretrained: Path, tmp_path: Path) -> list[str]:
        return ["-b", str(config_file), "-l", str(tmp_path / "a [x]"), "-n", "s", "--pretrained-model", str(pretrained)]

    def test_runs_of_one_name_that_start_together_have_their_own(self, words: list[str], tmp_path: Path) -> None:
        with ThreadPoolExecutor(4) as pool:
            made = [*pool.map(_run_dir, [words] * 8)]
        assert len(set(made)) == 8 and set(made) == set((tmp_path / "a [x]").iterdir())
        assert all(path.name.endswith("_s") and len(path.name) == len("2026-01-31T12-00-00_s") for path in made)

    @pytest.mark.parametrize("rank", ["RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"])
    def test_processes_of_one_run_share_one(
        self, rank: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for value in ("1", "0", "2"):
            monkeypatch.setenv(rank, value)
            _run_dir(words)
        assert len(list((tmp_path / "a [x]").iterdir())) == 1

    @pytest.mark.parametrize("more", [["--dry-run"], ["--train=no"], ["data.root=/nowhere"]])
    def test_what_does_not_train_leaves_none(self, more: list[str], words: list[str], tmp_path: Path) -> None:
        main([*words, *more])
        assert list(tmp_path.iterdir()) == []

    def test_auto_takes_runs_of_exactly_this_name(self, words: list[str], tmp_path: Path) -> None:
        for name in ("s", "s-2", "x_s"):
            folder = tmp_path / "a [x]" / f"2999-01-01T00-00-00_{name}" / "checkpoints"
            folder.mkdir(parents=True)
            torch.save({}, folder / "last.ckpt")
            (folder.parent / "config.yaml").touch()
        for name in ("s", "s-2"):
            run_dir = resolve_run(parse_args([*words, "-n", name, "--resume", "auto"]))[1]
            assert run_dir.name == f"2999-01-01T00-00-00_{name}"


def _run_dir(words: list[str]) -> Path:
    return resolve_run(parse_args(words))[1]


class TestResumeErrors:
    @pytest.fixture
    def run_dir(self, config_file: Path, tmp_path: Path) -> Path:
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "config.yaml").write_text(config_file.read_text())
        return tmp_path

    def test_no_checkpoint(self, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["-r", str(run_dir)]) == 2
        assert "checkpoint" in capsys.readouterr().err

    def test_no_run(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "a" / "model.ckpt"
        path.parent.mkdir()
        torch.save({}, path)
        assert main(["-r", str(path)]) == 2
        assert f"{tmp_path}/config.yaml" in capsys.readouterr().err

    @pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04 cut off"])
    def test_no_checkpoint_file(self, content: bytes, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (run_dir / "checkpoints" / "last.ckpt").write_bytes(content)
        assert main(["-r", str(run_dir)]) == 2
        warning, error = capsys.readouterr().err.splitlines()
        assert warning.startswith("warning: ") and "last.ckpt: damaged" in warning
        assert error.startswith("error: ") and "no whole checkpoint" in error


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_of_the_project_are_valid(path: Path) -> None:
    load_config(path)


def test_the_paper_s_recipe() -> None:
    config = load_config(CONFIGS / "v1.yaml")
    assert (config.model.image_size, config.model.scale_factor, config.model.parameterization) == (512, 0.18215, "eps")
    training = config.training
    assert (training.base_lr, training.lr_schedule, training.warmup_steps) == (1e-5, "constant", 10_000)
    assert (training.p_uncond, training.null_drop, training.train_tower) == (0.2, "per_sample", False)
    assert config.trainer["max_epochs"] == 40
