"""The average of the weights over a run."""

from collections.abc import Iterator
from typing import Any

import torch
from pytorch_lightning import LightningModule as Module
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import Callback
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


class EMA(Callback):
    """Exponential moving average of the trained weights, with a warm-up: decay = min(decay, (1 + n) / (10 + n)).

    The average is in float32 whatever the weights' type: in bfloat16 a decay of 0.9999 would never move it. Validation
    and image grids use the average. Checkpoints hold it in `state_dict` and the trained weights beside it. Of sharded
    weights each process keeps its share. Lightning's own callback averages frozen parts too, but no sharded model.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._average: dict[str, Tensor] = {}
        self._trained: dict[str, Tensor] = {}  # the trained weights, while the average is in their place
        self._loaded: dict[str, Tensor] = {}  # the average in a checkpoint
        self._count = 0  # of updates
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        for name, parameter in trained_parameters(pl_module):
            self._average[name] = parameter.detach().to(torch.float32, copy=True)
            if name in self._loaded:
                self._load(self._average[name], self._loaded[name])
        self._loaded = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Module, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step <= self._step:
            return  # between accumulated batches
        weight = 1.0 - min(self.decay, (1.0 + self._count) / (10.0 + self._count)) if self._count else 1.0
        current = [p.detach().float() for _, p in trained_parameters(pl_module)]
        # average += weight * (current - average)
        torch._foreach_lerp_(list(self._average.values()), current, weight)  # pyright: ignore[reportPrivateImportUsage]
        self._count, self._step = self._count + 1, trainer.global_step

    @torch.no_grad()
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Put the average in the place of the trained weights; no effect before the first step of a run."""
        for name, parameter in trained_parameters(pl_module) if self._average else ():
            self._trained[name] = parameter.detach().clone()
            parameter.copy_(self._average[name])

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Put the trained weights back."""
        for name, parameter in trained_parameters(pl_module) if self._trained else ():
            parameter.copy_(self._trained.pop(name))

    def state_dict(self) -> dict[str, Any]:
        return {"latest_update_step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._step = state_dict["latest_update_step"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]  # for a sharded model empty except in the first process
        checkpoint["current_model_state"] = {name: state[name] for name in self._average if name in state}
        for name, average in self._average.items():
            whole = average.full_tensor().cpu() if isinstance(average, DTensor) else average  # in all processes
            if name in state:
                state[name] = whole
        checkpoint["averaging_state"] = {"n_averaged": torch.tensor(self._count)}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None:
        if "current_model_state" in checkpoint:
            self._loaded = checkpoint["state_dict"]
            self._count = int(checkpoint["averaging_state"]["n_averaged"])
            parameters = dict(pl_module.named_parameters())
            for name, tensor in checkpoint["current_model_state"].items():
                if name in parameters:
                    self._load(parameters[name], tensor)

    @torch.no_grad()
    def _load(self, target: Tensor, source: Tensor) -> None:
        """Copy a tensor of a checkpoint, which is whole, into a parameter or an average, which may be sharded."""
        if isinstance(target, DTensor):
            source = source.to(target.device, target.dtype)  # all processes have it: nothing to send
            source = distribute_tensor(source, target.device_mesh, target.placements, src_data_rank=None)
        target.copy_(source)


class FurtherEMA(EMA):
    """An average of another decay: checkpoints hold it as `ema.DECAY`, nothing else uses it."""

    @property
    def state_key(self) -> str:
        return f"FurtherEMA {self.decay}"

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        pass

    on_validation_epoch_end = on_validation_epoch_start

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None:
        whole = {n: x.full_tensor().cpu() if isinstance(x, DTensor) else x for n, x in self._average.items()}
        checkpoint[f"ema.{self.decay}"] = {"average": whole, "n_averaged": torch.tensor(self._count)}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None:
        if state := checkpoint.get(f"ema.{self.decay}"):
            self._loaded, self._count = state["average"], int(state["n_averaged"])


def trained_parameters(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Iterate over the names and parameters of a module that have gradients."""
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)
