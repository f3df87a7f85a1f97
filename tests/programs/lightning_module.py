"""Train a LightningModule with 16-bit mixed precision."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(32, 64), nn.ReLU())
        self.head = nn.Linear(64, 4)

    def training_step(self, batch, index):
        x, y = batch
        loss = nn.functional.cross_entropy(self.head(self.encoder(x)), y)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, index):
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self.head(self.encoder(x)), y))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def main():
    data = TensorDataset(torch.randn(64, 32), torch.randint(0, 4, (64,)))
    on_gpu = torch.cuda.is_available()
    trainer = L.Trainer(
        max_epochs=2, accelerator="gpu" if on_gpu else "cpu", devices=1,
        precision="16-mixed" if on_gpu else "bf16-mixed", gradient_clip_val=1.0, enable_model_summary=True,
        default_root_dir="lightning",
    )  # fmt: skip
    trainer.fit(
        Classifier(), DataLoader(data, batch_size=8, num_workers=2 if on_gpu else 0), DataLoader(data, batch_size=16)
    )


if __name__ == "__main__":
    main()
