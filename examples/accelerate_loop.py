"""accelerate: `prepare` takes the optimizer like any other.

python examples/accelerate_loop.py        # or: accelerate launch examples/accelerate_loop.py
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from offline import rows, tiny_llama
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader

from psilora import PSILoRA


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    losses = []
    # --8<-- [start:loop]
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = get_peft_model(tiny_llama(), LoraConfig(r=8, target_modules="all-linear"))
    optimizer = PSILoRA(model, lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 5, 1.0))
    loader = DataLoader(rows(), batch_size=8, shuffle=True)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    for _ in range(options.epochs):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    # --8<-- [end:loop]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
