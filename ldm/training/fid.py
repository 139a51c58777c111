"""The Fréchet distance of samples to training images while a pixel model trains."""

from typing import Any

import numpy as np
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import Callback
from torch.utils.data import default_collate

from ldm.config import Config
from ldm.evaluation.features import WHOLE, FeatureNetwork, finite_features, load_network
from ldm.evaluation.frechet import frechet_distance, statistics_of
from ldm.evaluation.inception import POOLED, load_inception
from ldm.images import tensor_to_pil
from ldm.training.ema import EMA


class SampleDistance(Callback):
    """Every `logging.fid_every` steps samples images by averaged weights, and logs `val/fid`.

    Samples have the labels, and upsamplers the small versions, of the training images with which they are compared.
    Each process samples its share. The distance depends on the network of `logging.fid_features`, which its log line
    names, and on the number of images: compare it only with itself.
    """

    network: FeatureNetwork | None = None

    def __init__(self, config: Config, ema: EMA) -> None:
        self.options, self.batch_size, self.ema = config.logging, config.data.val_batch_size, ema

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        step, every = trainer.global_step, self.options.fid_every
        if every == 0 or step % every or (trainer.fit_loop.total_batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if self.network is None:
            kind, _, file = self.options.fid_features.partition(":")
            self.network = load_inception(file) if kind == "inception" else load_network(self.options.fid_features)
            self.network.to(pl_module.device)
        data: Any = trainer.datamodule.train_set  # pyright: ignore[reportAttributeAccessIssue]
        count = min(self.options.fid_samples, len(data)) // trainer.world_size
        own = range(trainer.global_rank * count, (trainer.global_rank + 1) * count)
        self.ema.on_validation_epoch_start(trainer, pl_module)
        pl_module.eval()
        features = []
        for start in range(0, count, self.batch_size):
            samples = [data[0, i] for i in own[start : start + self.batch_size]]
            batch = pl_module.transfer_batch_to_device(default_collate(samples), pl_module.device, 0)
            features.append(np.stack([self._features(x) for x in pl_module.preview(batch, self.options)], axis=1))
        pl_module.train()
        self.ema.on_validation_epoch_end(trainer, pl_module)
        shares: Any = trainer.strategy.all_gather(torch.from_numpy(np.concatenate(features)).to(pl_module.device))
        pairs = shares.reshape(-1, 2, shares.shape[-1]).cpu().numpy().astype(np.float64)
        distance = frechet_distance(statistics_of(pairs[:, 0]), statistics_of(pairs[:, 1]))
        if trainer.is_global_zero:
            print(f"step {step}: FID ({self.network.name}, {len(pairs)} images) {distance:.4g}", flush=True)
        for logger in trainer.loggers:
            logger.log_metrics({"val/fid": distance}, step)

    def _features(self, images: torch.Tensor) -> np.ndarray:
        assert self.network is not None
        views = [self.network.preprocess(tensor_to_pil(image), WHOLE) for image in images]
        features = finite_features(self.network, torch.stack(views), range(len(views)))
        return features[:, POOLED] if self.options.fid_features.startswith("inception") else features
