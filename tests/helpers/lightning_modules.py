"""A LightningModule around a small mixture of experts."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule

from tests.helpers import models


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.inner = models.mixtral(attention_dropout=0.1).train()

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        loss: torch.Tensor = self.inner(batch, labels=batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)
