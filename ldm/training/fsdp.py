"""FSDP2, which shards a model among processes: the strategy, and checkpoints as any other run writes them.

Source: Rajbhandari et al. 2020 (ZeRO, stage 3), as PyTorch's `fully_shard` does it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor
from torch.distributed.checkpoint import state_dict as whole_states
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from ldm.models.efficientnet import EfficientNetTower
from ldm.models.layers import AttentionBlock, SpatialTransformer
from ldm.models.unet import ResBlock

if TYPE_CHECKING:
    from ldm.training.denoising import DenoisingTraining

WHOLE = whole_states.StateDictOptions(full_state_dict=True, cpu_offload=True)


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2 over all processes, as `trainer.strategy: fsdp2`.

    The first process writes whole tensors through the trainer's checkpoint IO, with optimizer states numbered in the
    optimizer's own order, so that any strategy resumes what any other one wrote.
    """

    lightning_module: DenoisingTraining  # pyright: ignore[reportIncompatibleMethodOverride]
    lightning_restore_optimizer = True  # pyright: ignore[reportIncompatibleMethodOverride, reportAssignmentType]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **kwargs)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(checkpoint_path)

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        whole_states.set_model_state_dict(self.lightning_module, dict(checkpoint["state_dict"]), options=WHOLE)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        optimizer = getattr(optimizer, "optimizer", optimizer)  # out of Lightning's wrapper
        state: Any = whole_states.get_optimizer_state_dict(self.lightning_module, optimizer, options=WHOLE)
        if not state:
            return state  # in all processes but the first
        state = _renamed(state, {name: number for number, name in enumerate(self._names(optimizer))})
        for group in state["param_groups"]:
            group["params"].sort()
        return state

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            state: Any = _renamed(saved, dict(enumerate(self._names(optimizer))))
            whole_states.set_optimizer_state_dict(self.lightning_module, optimizer, state, options=WHOLE)

    def _names(self, optimizer: torch.optim.Optimizer) -> list[str]:
        """Return the names of the optimizer's parameters, in its order."""
        names = {parameter: name for name, parameter in self.lightning_module.named_parameters()}
        return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def _renamed(state: dict[str, Any], names: dict[Any, Any]) -> dict[str, Any]:
    """Return an optimizer's state with other names or numbers for its parameters."""
    groups = [{**group, "params": [names[p] for p in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[p]: moments for p, moments in state["state"].items()}, "param_groups": groups}


StrategyRegistry.register("fsdp2", ShardedStrategy, description="FSDP2 over all processes")


def shard(module: DenoisingTraining, mesh: DeviceMesh) -> None:
    """Shard the module's parameters among the processes of a mesh, in place.

    The blocks of the UNet and the layers of the towers are gathered when they run and dropped again afterwards; the
    remaining parameters are gathered around the methods by which the module is called.
    """
    module.unet.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
    blocks = [m for m in module.unet.modules() if isinstance(m, ResBlock | SpatialTransformer | AttentionBlock)]
    for tower in getattr(module, "towers", ()):
        blocks += [] if isinstance(tower, EfficientNetTower) else tower.encoder.layers
    for block in blocks:
        fully_shard(block, mesh=mesh)
        if isinstance(block, ResBlock | SpatialTransformer):
            register_fsdp_forward_method(block, "project")
    # By default the outermost module keeps what it gathered, and would miss an average that is swapped in.
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for entry in ("training_step", "validation_step", "preview"):
        register_fsdp_forward_method(module, entry)


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Return the L2 norm, a scalar, of all tensors together; all processes must call this if they are sharded."""
    norm = torch.nn.utils.get_total_norm(list(tensors))
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
