"""A plain PyTorch loop: schedule, accumulation, clipping, checkpoints that survive a kill, figures of the optimizer.

python examples/plain_loop.py --checkpoints out/plain       # run it again: it goes on where it was
"""

from __future__ import annotations

import argparse

import torch
from offline import rows, tiny_llama
from peft import LoraConfig, get_peft_model
from torch.optim.lr_scheduler import LambdaLR

from psilora import PSILoRA
from psilora.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint

ACCUMULATE, BATCH = 2, 8


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--checkpoints", default=None, help="folder; none are kept without it")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    config = LoraConfig(r=8, target_modules="all-linear", lora_dropout=0.05, modules_to_save=["lm_head"])
    model = get_peft_model(tiny_llama(), config)
    head = {"parameters": "lm_head", "lr": 3e-3}  # trained by AdamW
    optimizer = PSILoRA(model, lr=0.1, max_grad_norm=1.0, groups=[head])
    schedule = LambdaLR(optimizer, lambda step: min(step / 5, 1.0, (options.steps - step) / options.steps))
    parts = {"optimizer": optimizer, "schedule": schedule}

    newest = latest_checkpoint(options.checkpoints) if options.checkpoints else None
    done = load_checkpoint(newest, model, **parts) if newest else 0
    data, losses = rows(), []
    for step in range(done, options.steps):
        optimizer.zero_grad()
        loss = torch.zeros(())
        for _ in range(ACCUMULATE):
            picked = torch.randint(len(data), (BATCH,)).tolist()
            batch = {key: torch.stack([data[i][key] for i in picked]) for key in ("input_ids", "labels")}
            part = model(**batch).loss / ACCUMULATE
            part.backward()
            loss += part.detach()
        if step % 20 == 0:
            optimizer.observe_next_step()
        optimizer.step()
        schedule.step()
        losses.append(float(loss))
        if step % 20 == 0:
            figures = {name: round(value, 4) for name, value in optimizer.stats().items()}
            print(f"step {step}: loss {losses[-1]:.3f}, {figures}")
        if options.checkpoints and (step + 1) % 10 == 0:
            save_checkpoint(options.checkpoints, step + 1, model, **parts)
    return losses


if __name__ == "__main__":
    main()
