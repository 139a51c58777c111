"""What the training modules of both stages share: batches, the check of the loss, optimizers and learning rates."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import Parameter

from ldm.checkpoint.keys import check_keys
from ldm.config import ConfigError
from ldm.files import UserError


class NonFiniteError(UserError):
    """A loss or weight became NaN or infinite; the last checkpoint from before is untouched."""

    def __init__(self, problem: str) -> None:
        remedy = "a lower learning rate, trainer.gradient_clip_val=1.0 or trainer.precision=32-true"
        super().__init__(f"{problem}: stopped; resume from the last checkpoint, which is good, with {remedy}")


class TrainingModule(pl.LightningModule):
    """A Lightning module whose samples carry a `key`, the seed of all their random draws."""

    options: Any  # TrainingConfig or FirstStageTrainingConfig, as the subclasses declare

    def __init__(self) -> None:
        super().__init__()
        self._curves: dict[str, Any] = {}  # (2,) sums and numbers of values

    def add_lora(self, seed: int) -> None:
        """Add trained parameters that no checkpoint to start from has; most modules have none."""

    def starting_weights(
        self, state: dict[str, Tensor], source: str | None, from_scratch: bool
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Return what is loaded from a checkpoint's tensors (module names) and the names that may be missing there."""
        return state, [] if state or not from_scratch else list(self.state_dict())

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Copy a batch to the device, except the keys: they seed generators on the CPU."""
        tensors = {name: value for name, value in batch.items() if name != "key"}
        return {**super().transfer_batch_to_device(tensors, device, dataloader_idx), "key": batch["key"]}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a state of another model, such as that of a run whose config was changed, before any is restored.

        Replace learning rates and weight decay of its parameter groups, which may be fewer, by the config's.
        """
        expected = {name: tensor.shape for name, tensor in self.state_dict().items()}
        check_keys(expected, checkpoint["state_dict"], source=self.trainer.ckpt_path)
        lrs, decay = [lr for lr, _ in self.parameter_groups()], getattr(self.options, "weight_decay", 0.0)
        for optimizer, scheduler in zip(checkpoint["optimizer_states"], checkpoint["lr_schedulers"], strict=True):
            factors = [lr / base for lr, base in zip(lrs, scheduler["base_lrs"], strict=False)]
            scheduler["base_lrs"] = lrs[: len(factors)]
            scheduler["_last_lr"] = [f * last for f, last in zip(factors, scheduler["_last_lr"], strict=True)]
            for group, lr, factor in zip(optimizer["param_groups"], lrs, factors, strict=False):
                group.update(initial_lr=lr, lr=factor * group["lr"], weight_decay=decay)

    def record(self, name: str, values: Tensor, chosen: Tensor | None = None) -> None:
        """Add values, or the `chosen` ones, to a curve. They stay on the device: reading one would wait for it."""
        chosen = torch.ones_like(values) if chosen is None else chosen
        pair = torch.stack(((values.detach() * chosen).sum().float(), chosen.sum()))
        self._curves[name] = self._curves.get(name, 0.0) + pair

    def read_curves(self) -> dict[str, float]:
        """Return the curves' means since the last call, in one transfer; those without a value are left out."""
        pairs = torch.stack(list(self._curves.values())).tolist() if self._curves else []
        means = {name: total / n for name, (total, n) in zip(self._curves, pairs, strict=True) if n}
        self._curves = {}
        return means

    def check_finite(self, loss: float, batch_idx: int) -> None:
        """Stop all processes with a NonFiniteError when the mean loss of one is NaN or infinite."""
        if self.trainer.strategy.reduce_boolean_decision(not math.isfinite(loss), all=False):
            process = "" if not math.isfinite(loss) else " here, NaN or infinite in another process,"
            raise NonFiniteError(f"loss is {loss}{process} at step {self.global_step - 1} or before, batch {batch_idx}")

    def parameter_groups(self) -> list[tuple[float, list[Parameter]]]:
        """Return learning rates with the trained parameters that have them."""
        return [(self.options.base_lr, [p for p in self.parameters() if p.requires_grad])]

    def with_lr_schedule(self, make: Callable[..., torch.optim.Optimizer], **settings: Any) -> OptimizerLRScheduler:
        """Make an optimizer with the config's learning-rate schedule, which may need a run with a last step."""
        total_steps = self.trainer.estimated_stepping_batches  # inf for trainer.max_epochs: -1
        if (schedule := self.options.lr_schedule) != "constant" and math.isinf(total_steps):
            raise ConfigError(
                f"lr_schedule: got {schedule} for an endless run, expected trainer.max_epochs or max_steps"
            )
        factor = lr_factor(self.options.warmup_steps, self.options.lr_schedule, total_steps)
        optimizer = make([{"params": part, "lr": lr} for lr, part in self.parameter_groups()], **settings)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def logs_step(trainer: pl.Trainer, step: int) -> bool:
    """Return whether the values of step `step`, counted from 1, are read and passed to the loggers."""
    every: int = trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
    return every > 0 and step % every == 0


def lr_factor(warmup_steps: int, schedule: str, total_steps: float) -> Callable[[int], float]:
    """Return the learning rate relative to its base value, as a function of the optimizer step.

    It rises linearly from 1e-6 to 1 over `warmup_steps`, as the original's `LambdaLinearScheduler`, then stays, or
    falls to `total_steps`: linearly to 0, or as a cosine to 0.05 (Loshchilov & Hutter 2017, Eq. 5).
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return 1e-6 + (1.0 - 1e-6) * step / warmup_steps
        if schedule == "constant" or total_steps <= warmup_steps:
            return 1.0
        progress = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
        if schedule == "linear":
            return 1.0 - progress
        return 0.05 + 0.95 * 0.5 * (1.0 + math.cos(math.pi * progress))

    return factor


def adamw(name: str) -> Callable[..., torch.optim.Optimizer]:
    """Return the AdamW (Loshchilov & Hutter 2019) of `training.optimizer`; adamw_8bit: Dettmers et al. 2022."""
    if name != "adamw_8bit":
        return partial(torch.optim.AdamW, fused=name == "adamw_fused" or None)
    try:
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError("training.optimizer: got adamw_8bit without its package; pip install bitsandbytes") from None
    return AdamW8bit


def parts_of(names: Iterable[str]) -> str:
    """List the parts of the model, such as `model.diffusion_model`, that tensors belong to."""
    return ", ".join(sorted({".".join(name.split(".")[:2]) for name in names}))
