"""ReLoRA: from time to time the adapters are merged into the base and begin anew, so that the ranks add up.

python examples/relora.py
"""

from __future__ import annotations

import argparse

import torch
from offline import rows, tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from psilora import PSILoRA

BATCH = 8


# --8<-- [start:restart]
def restart(model: PeftModel, optimizer: PSILoRA) -> None:
    """Merge ΔW into the base weights, draw A anew, set B = 0, and have the optimizer forget their state."""
    model.merge_adapter()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.merged_adapters.clear()
            module.reset_lora_parameters("default", init_lora_weights=True)
    optimizer.rebind(reset=True)


# --8<-- [end:restart]


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=20, help="steps between two restarts")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules="all-linear"))
    optimizer = PSILoRA(model, lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step % options.every + 1) / 5, 1.0))
    data, losses = rows(), []
    for step in range(options.steps):
        picked = torch.randint(len(data), (BATCH,)).tolist()
        batch = {key: torch.stack([data[i][key] for i in picked]) for key in ("input_ids", "labels")}
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % options.every == 0:
            print(f"step {step + 1}: loss {losses[-1]:.3f}")
            restart(model, optimizer)
    return losses


if __name__ == "__main__":
    main()
