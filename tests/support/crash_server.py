"""A process that has imported everything and forks a training run for every folder it reads.

It answers a line with a folder by the pid, and the line after that by the child's wait status. A run resumes from the
newest checkpoint of its folder, saves after every step, and leaves `end.pt` when it is done.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import torch
from models import MLP, data, mse
from torch import nn

from psilora import LoRALinear, PSILoRA
from psilora.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint

STEPS = 12


def build() -> tuple[nn.Module, PSILoRA, torch.optim.lr_scheduler.LRScheduler]:
    torch.manual_seed(0)
    model = MLP((24, 20, 16, 6))
    for name in ("l1", "l2", "l3"):
        setattr(model, name, LoRALinear(getattr(model, name), 4, 8.0, dropout=0.2))
    optimizer = PSILoRA(model, 0.2, step="gradient", metric="kfac", momentum=0.9)
    return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)


def run(folder: Path) -> None:
    model, optimizer, schedule = build()
    parts = {"optimizer": optimizer, "schedule": schedule}
    newest = latest_checkpoint(folder)
    done = 0 if newest is None else load_checkpoint(newest, model, **parts)
    for step in range(done, STEPS):
        optimizer.zero_grad()
        mse(model, data(16, dtype=torch.float32)).backward()  # rows and dropout from the saved generator
        optimizer.step()
        schedule.step()
        save_checkpoint(folder, step + 1, model, **parts)
    torch.save([p.detach() for p in model.parameters()], folder / "end.pt")


def serve() -> None:
    torch.set_num_threads(1)
    run(Path(sys.argv[1]))  # warms up
    print("ready", flush=True)
    while line := sys.stdin.readline():
        child = os.fork()
        if child == 0:
            try:
                run(Path(line.strip()))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print(child, flush=True)
        sys.stdin.readline()  # until then the child may be killed: it is not reaped
        print(os.waitpid(child, 0)[1], flush=True)


if __name__ == "__main__":
    serve()
