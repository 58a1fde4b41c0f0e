"""DistributedDataParallel: the exact gradient of the joint batch, with thin products summed over the processes.

torchrun --nproc-per-node 2 examples/ddp.py              # gloo on CPUs, NCCL where every process has a GPU
"""

from __future__ import annotations

import argparse
import os
import time

import torch
from offline import shares, tiny_llama
from peft import LoraConfig, get_peft_model
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from psilora import PSILoRA

BATCH = 4


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args(arguments)

    gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    distributed.init_process_group("nccl" if gpu else "gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")

    model = get_peft_model(tiny_llama(), LoraConfig(r=8, target_modules="all-linear")).to(device)
    optimizer = PSILoRA(model, lr=0.5, step="gradient", gradient="exact", momentum=0.9)
    parallel = DistributedDataParallel(model)
    losses: list[float] = []
    for step, batch in enumerate(shares(options.steps, BATCH, rank, world)):
        optimizer.zero_grad()
        loss = parallel(**{key: rows.to(device) for key, rows in batch.items()}).loss
        loss.backward()
        optimizer.step()
        distributed.all_reduce(mean := loss.detach() / world)
        losses.append(float(mean))
        if rank == 0 and step % 10 == 0:
            print(f"step {step}: loss {losses[-1]:.3f}, {optimizer.communicator.bytes} bytes summed so far")

    weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    everywhere = [torch.empty_like(weights) for _ in range(world)]
    distributed.all_gather(everywhere, weights)
    same = all(torch.equal(everywhere[0], other) for other in everywhere)
    time.sleep(0.5)  # gloo's thread drops tensors under the GIL, which the clean-up holds while it waits for it
    distributed.destroy_process_group()
    if rank == 0:
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; parameters of {world} processes equal: {same}")
    if not same:
        raise SystemExit("the processes have drifted apart")
    return losses


if __name__ == "__main__":
    main()
