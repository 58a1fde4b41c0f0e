"""FSDP2: base and adapters sharded over the processes, a distributed checkpoint that any number of processes can load.

torchrun --nproc-per-node 2 examples/fsdp.py             # gloo on CPUs, NCCL where every process has a GPU
"""

from __future__ import annotations

import argparse
import os
import time

import torch
from offline import shares, tiny_llama
from peft import LoraConfig, get_peft_model
from torch import distributed
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from psilora import PSILoRA

BATCH = 4


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--checkpoint", default="outputs/fsdp")
    options = parser.parse_args(arguments)

    gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if gpu else "gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    mesh = init_device_mesh("cuda" if gpu else "cpu", (world,))

    model = get_peft_model(tiny_llama(), LoraConfig(r=8, target_modules="all-linear")).to(mesh.device_type)
    for block in model.get_base_model().model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = PSILoRA(model, lr=0.1)  # after fully_shard, which replaces the parameters
    losses: list[float] = []
    for step, batch in enumerate(shares(options.steps, BATCH, rank, world)):
        optimizer.zero_grad()
        loss = model(**{key: rows.to(mesh.device_type) for key, rows in batch.items()}).loss
        loss.backward()
        optimizer.step()
        distributed.all_reduce(mean := loss.detach() / world)
        losses.append(float(mean))
        if rank == 0 and step % 10 == 0:
            print(f"step {step}: loss {losses[-1]:.3f}")

    adapters, state = get_state_dict(model, optimizer, options=StateDictOptions(ignore_frozen_params=True))
    checkpoint.save({"model": adapters, "optimizer": state}, checkpoint_id=options.checkpoint)
    held = sum(p.to_local().numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    time.sleep(0.5)  # gloo's thread drops tensors under the GIL, which the clean-up holds while it waits for it
    distributed.destroy_process_group()
    if rank == 0:
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; process 0 of {world} holds {held} of {total} LoRA weights")
    return losses


if __name__ == "__main__":
    main()
