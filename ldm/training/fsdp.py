"""A model that is divided among processes (FSDP2), with checkpoints as any other run writes them.

Source: Rajbhandari et al. 2020 (ZeRO, stage 3), as PyTorch's `fully_shard` does it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from pytorch_lightning.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2 over all processes, as `trainer.strategy: fsdp2`.

    The first process writes whole tensors through the trainer's checkpoint IO, with optimizer states numbered in the
    optimizer's own order, so that any strategy resumes what any other one wrote.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **kwargs)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(checkpoint_path)

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        assert self.lightning_module is not None
        set_model_state_dict(self.lightning_module, dict(checkpoint["state_dict"]), options=WHOLE)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        assert self.lightning_module is not None
        optimizer = getattr(optimizer, "optimizer", optimizer)  # out of Lightning's wrapper
        state: dict[str, Any] = get_optimizer_state_dict(self.lightning_module, optimizer, options=WHOLE)
        if not state:
            return state  # in all processes but the first
        numbers = {name: number for number, name in enumerate(self._names(optimizer))}
        groups = [
            {**group, "params": sorted(numbers[name] for name in group["params"])} for group in state["param_groups"]
        ]
        return {"state": {numbers[name]: moments for name, moments in state["state"].items()}, "param_groups": groups}

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        assert self.lightning_module is not None
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            names = self._names(optimizer)
            groups = [
                {**group, "params": [names[number] for number in group["params"]]} for group in saved["param_groups"]
            ]
            state = {
                "state": {names[number]: moments for number, moments in saved["state"].items()},
                "param_groups": groups,
            }
            set_optimizer_state_dict(self.lightning_module, optimizer, state, options=WHOLE)

    def _names(self, optimizer: torch.optim.Optimizer) -> list[str]:
        """Of the optimizer's parameters, in its order."""
        assert self.lightning_module is not None
        names = {parameter: name for name, parameter in self.lightning_module.named_parameters()}
        return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


StrategyRegistry.register("fsdp2", ShardedStrategy, description="FSDP2 over all processes")


def shard(module: nn.Module, mesh: DeviceMesh, blocks: Iterable[nn.Module], entries: Iterable[str]) -> None:
    """Divide a module's parameters among the processes of a mesh, in place.

    Args:
        blocks: parts whose parameters are gathered when they run and dropped again afterwards.
        entries: methods that the module is called by; around them the remaining parameters are gathered.
    """
    for block in blocks:
        fully_shard(block, mesh=mesh)
    # By default the outermost module keeps what it gathered, and would miss an average that is swapped in.
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for entry in entries:
        register_fsdp_forward_method(module, entry)


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: all of it unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor gathered from all processes, who must call this together; itself unless it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def copy_whole(source: Tensor, target: Tensor) -> None:
    """Copy a whole tensor, which all processes have, into one that may be sharded."""
    if isinstance(target, DTensor):
        source = distribute_tensor(source.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
    local_part(target).copy_(local_part(source))
