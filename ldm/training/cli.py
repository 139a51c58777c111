"""The command line of training: options, the run to resume, errors in one line."""

import argparse
import contextlib
import datetime
import glob
import itertools
import os
import pdb
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.config import Config, ConfigError, dump_config, load_config, split_overrides
from ldm.files import check_writable, claim, verify_zip

RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")  # not 0 in all processes of a run but the first
MEMORY = "lower data.batch_size, raise trainer.accumulate_grad_batches, model.unet.activation_checkpointing=true"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; `overrides` collects the arguments of the form section.key=value."""
    about = "Train or resume: a config to a run directory with checkpoints, curves and image grids."
    more = "Further arguments, section.key=value, override the config."
    parser = argparse.ArgumentParser(description=about, epilog=more)
    add = parser.add_argument
    flag: dict[str, Any] = {"nargs": "?", "const": True, "type": _boolean, "metavar": "BOOL"}
    add("-b", "--base", nargs="+", default=[], metavar="YAML", help="configs, merged from left to right")
    add("-l", "--logdir", default="logs", help="folder for run directories (default: logs)")
    add("-n", "--name", default="", help="name of the run, appended to its date (default: the last config's)")
    resume = "run directory or checkpoint to continue; auto: the newest run of that --name in --logdir, or a new run"
    add("-r", "--resume", metavar="RUN", help=resume)
    add("--pretrained-model", "--pretrained_model", metavar="FILE", help="checkpoint with the initial weights")
    scratch = "allow trained parts that the checkpoint lacks to start from random weights"
    add("--train-from-scratch", "--train_from_scratch", **flag, default=False, help=scratch)
    scale = "learning rate = accumulation * processes * batch size * base_lr"
    add("--scale-lr", "--scale_lr", **flag, default=False, help=scale)
    add("-s", "--seed", type=int, help="seed of weights, order and noise (default: the config's)")
    add("-t", "--train", **flag, default=True, help="train (default)")
    unused = "accepted for the original's command lines; there is no test stage"
    add("--no-test", "--no_test", **flag, default=True, help=unused)
    add("-d", "--debug", **flag, default=False, help="start the post-mortem debugger on an error")
    add("--dry-run", action="store_true", help="print config, parameter counts and steps per epoch, and stop")
    words, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words)
    if not args.base and args.resume in (None, "auto"):
        parser.error("nothing to train: give --base CONFIG, for instance --base configs/v1.yaml, or --resume RUN")
    args.overrides = overrides if args.seed is None else [*overrides, f"seed={args.seed}"]
    return args


def _boolean(text: str) -> bool:
    if text.lower() not in ("yes", "true", "t", "y", "1", "no", "false", "f", "n", "0"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected true or false")
    return text.lower() in ("yes", "true", "t", "y", "1")


def resolve_run(args: argparse.Namespace) -> tuple[Config, Path, Path | None]:
    """Return config, run directory and, when resuming, the checkpoint to continue from."""
    run_dir, checkpoint, logdir = None, None, Path(args.logdir)
    name = args.name or Path(*args.base[-1:]).stem
    if args.resume == "auto":  # the newest run of this name with a whole checkpoint
        runs = sorted(logdir.glob(f"????-??-??T??-??-??_{glob.escape(name)}"), reverse=True)
        run_dir, checkpoint = next(((run, path) for run in runs if (path := _newest_checkpoint(run))), (None, None))
    elif args.resume:
        given = Path(args.resume)
        run_dir = given.parent.parent if given.is_file() else given
        if not (run_dir / "config.yaml").is_file():
            raise ConfigError(f"--resume {given}: not a run directory or a checkpoint of one: no {run_dir}/config.yaml")
        if given.is_file() and (damage := verify_zip(given)):
            raise ConfigError(f"--resume {given}: damaged ({damage}); give {run_dir} for the last whole checkpoint")
        checkpoint = given if given.is_file() else _newest_checkpoint(run_dir)
        if checkpoint is None:
            raise ConfigError(f"--resume {given}: no whole checkpoint in {run_dir / 'checkpoints'}; start a new run")
    if run_dir is None:
        config, now = load_config(*args.base, overrides=args.overrides), datetime.datetime.now()
        # Of runs that start together each gets a second of its own. A number behind the name would be part of another
        # run's name, which `--resume auto` would then take for this one.
        moments = (now + datetime.timedelta(seconds=seconds) for seconds in itertools.count())
        run_dirs = (logdir / f"{moment:%Y-%m-%dT%H-%M-%S}_{name}" for moment in moments)
        is_first = all(os.environ.get(rank, "0") == "0" for rank in RANKS)
        if is_first and args.train and not args.dry_run:  # to other processes Lightning sends the checkpoints' place
            check_writable(logdir)
            return config, claim(run_dirs, folder=True), None
        return config, next(run_dirs), None
    return load_config(run_dir / "config.yaml", *args.base, overrides=args.overrides), run_dir, checkpoint


def _newest_checkpoint(run_dir: Path) -> Path | None:
    """Return the run's last checkpoint, or if that is damaged the one before; None without any."""
    folder = run_dir / "checkpoints"
    # Periodic ones are second names of earlier `last.ckpt`.
    for path in [folder / "last.ckpt", *sorted(folder.glob("step*.ckpt"), reverse=True), folder / "best.ckpt"]:
        if path.is_file():
            if not (damage := verify_zip(path)):
                return path
            print(f"warning: {path}: damaged ({damage}); trying the one before", file=sys.stderr)
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says and return the exit status."""
    args, run_dir = parse_args(argv), Path()
    try:
        config, run_dir, checkpoint = resolve_run(args)
        from ldm.training.run import Run  # seconds of imports that a mistyped config should not cost

        run = Run(config, run_dir, scale_lr=args.scale_lr and checkpoint is None)
        run.initialise(args.pretrained_model, from_scratch=args.train_from_scratch, resuming=checkpoint is not None)
        if not args.dry_run and args.train:
            return run.fit(checkpoint)
        if run.trainer.is_global_zero:
            print(f"{dump_config(config)}\n{run.summary()}")
        return 0
    except (OSError, ValueError, RuntimeError) as error:  # including UserError
        message = str(error)
        if isinstance(error, RuntimeError):
            if type(error).__name__ != "OutOfMemoryError":  # torch's
                raise
            message = f"{message.splitlines()[0]} do: {MEMORY}"
        print(f"error: {message}", file=sys.stderr)
        if args.debug:
            pdb.post_mortem()
        return 2
    finally:
        with contextlib.suppress(OSError):
            run_dir.rmdir()  # of a run that has written nothing
            run_dir.parent.rmdir()
