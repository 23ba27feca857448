"""Small networks of each kind, for the recipes: the digits as images, rows or tokens.

    python examples/architectures.py fit --model ResidualNet --config examples/recipes/residual.yaml

Every recipe says in its head which network it is for.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from digits import Digits
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.nn import functional as F


class Classifier(pl.LightningModule):
    """Learn to tell the digits apart; `network` gives a score for each from images of 1 x 8 x 8 pixels, 0 to 1."""

    network: nn.Module

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Return the loss of a batch."""
        loss = self._loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        """Log the loss on images that are not learned from."""
        self.log("val_loss", self._loss(batch), prog_bar=True)

    def configure_optimizers(self) -> dict[str, Any]:
        """Return AdamW, with torch's weight decay of 0.01 on everything, and a learning rate that falls to 0."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.003)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _loss(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)


class FullyConnected(Classifier):
    """Two hidden layers.

    Args:
        width: Units of a hidden layer.
        dropout: Probability that a unit is left out of a training step.
    """

    def __init__(self, width: int = 128, dropout: float = 0.0) -> None:
        super().__init__()
        hidden = [nn.Linear(64, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, width), nn.ReLU()]
        self.network = nn.Sequential(nn.Flatten(), *hidden, nn.Dropout(dropout), nn.Linear(width, 10))


class ConvolutionalNet(Classifier):
    """Convolutions, each before a BatchNorm, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((1, 16), (16, 32), (32, 32)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        self.network = nn.Sequential(*layers, nn.AvgPool2d(4), nn.Flatten(), nn.Linear(128, 10))


class ResidualBlock(nn.Module):
    """Add what two convolutions find to what comes in."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return as many channels and pixels as come in."""
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class ResidualNet(Classifier):
    """A stem, three residual blocks and a linear head."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        stem = [nn.Conv2d(1, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        blocks = [ResidualBlock(channels) for _ in range(3)]
        self.network = nn.Sequential(*stem, *blocks, nn.AvgPool2d(4), nn.Flatten(), nn.Linear(4 * channels, 10))


class TransformerNetwork(nn.Module):
    """Read the pixels as 64 tokens of 17 grey levels, as a language model reads words."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(17, width)
        self.pos_embedding = nn.Parameter(0.02 * torch.randn(64, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return a score for each digit."""
        tokens = (16 * images).long().flatten(1)
        return self.head(self.encoder(self.token_embedding(tokens) + self.pos_embedding).mean(1))


class Transformer(Classifier):
    """A transformer encoder with token and position embeddings.

    Args:
        width: Features of a token.
        depth: Number of layers.
    """

    def __init__(self, width: int = 32, depth: int = 4) -> None:
        super().__init__()
        self.network = TransformerNetwork(width, depth)


class RecurrentNetwork(nn.Module):
    """Read an image row by row."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return a score for each digit."""
        return self.head(self.lstm(images.squeeze(1))[0][:, -1])


class Recurrent(Classifier):
    """A long short-term memory of two layers.

    Args:
        width: Units of a layer.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.network = RecurrentNetwork(width)


class WarmupStableDecay(Transformer):
    """The same with a learning rate that rises for a tenth of the steps, stays, and falls to 0 in the last fifth."""

    def configure_optimizers(self) -> dict[str, Any]:
        """Return AdamW and the schedule."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.003)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, 10 * (step + 1) / steps, 5 * (steps - step) / steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class MuonAndAdamW(Transformer):
    """The same, its hidden matrices trained by Muon and all else by AdamW, which manual optimization steps in turn."""

    def __init__(self, width: int = 32, depth: int = 4) -> None:
        super().__init__(width, depth)
        self.automatic_optimization = False

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        """Make a step of both optimizers."""
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Return Muon and AdamW."""
        hidden = {name: p for name, p in self.named_parameters() if p.ndim == 2 and "encoder" in name}
        others = [p for name, p in self.named_parameters() if name not in hidden]
        return [torch.optim.Muon(hidden.values(), lr=0.02), torch.optim.AdamW(others, lr=0.003)]


class LowRankLinear(nn.Module):
    """A linear layer that stays as it is, and a product of two small matrices that is trained in its place.

    Args:
        linear: The layer.
        rank: Columns of the first matrix and rows of the second.
    """

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.lora_A = nn.Linear(linear.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, linear.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what both give together."""
        return self.linear(x) + self.lora_B(self.lora_A(x))


class LowRankAdapted(FullyConnected):
    """Two hidden layers that stay, as if they were pretrained, each with an adapter of low rank, and a new head.

    Args:
        rank: Rank of the adapters.
    """

    def __init__(self, rank: int = 4) -> None:
        super().__init__()
        for index in (1, 4):
            self.network[index] = LowRankLinear(self.network[index], rank)


if __name__ == "__main__":
    LightningCLI(Classifier, Digits, subclass_mode_model=True, seed_everything_default=0)
