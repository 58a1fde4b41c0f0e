"""Lightning: the optimizer is built in `configure_optimizers`, from the module's own model.

python examples/lightning_module.py
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning
import torch
from offline import rows, tiny_llama
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader

from psilora import PSILoRA


# --8<-- [start:module]
class Adapted(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = get_peft_model(tiny_llama(), LoraConfig(r=8, target_modules="all-linear"))
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = PSILoRA(self.model, lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 5, 1.0))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


# --8<-- [end:module]


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    module = Adapted()
    trainer = lightning.Trainer(
        max_steps=options.steps,
        gradient_clip_val=1.0,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(rows(), batch_size=8, shuffle=True))
    print(f"loss {module.losses[0]:.3f} -> {module.losses[-1]:.3f}")
    return module.losses


if __name__ == "__main__":
    main()
