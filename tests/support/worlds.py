"""Worlds of gloo processes: what each runs, and the same training in one process on the joint batch."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from convnets import LoRAConv
from models import bare
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from psilora import LoRALinear, PSILoRA

DIMS = (20, 16, 12, 6)
RANK = 3


class Net(nn.Module):
    """Linear–tanh–Linear–tanh–Linear under LoRA; `l2` can be left out or run without its LoRA modules."""

    def __init__(self, *, trainable_bias: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for name, (i, o) in zip(("l1", "l2", "l3"), zip(DIMS[:-1], DIMS[1:], strict=True), strict=True):
            setattr(self, name, LoRALinear(nn.Linear(i, o), RANK, 2 * RANK))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        self.l3.base.bias.requires_grad_(trainable_bias)
        self.mode = "whole"

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.l1(x))
        if self.mode == "whole":
            x = self.l2(x)
        elif self.mode == "bypassed":
            x = (
                x @ (self.l2.base.weight + self.l2.scaling * self.l2.lora_B.weight @ self.l2.lora_A.weight).T
                + self.l2.base.bias
            )
        else:
            x = x[..., : DIMS[2]]
        return self.l3(torch.tanh(x))


class ConvolvedNet(Net):
    """The same with a convolution, which takes a row for an image of 4 by 5, as first layer."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.conv = LoRAConv(nn.Conv2d(1, DIMS[0], (3, 2), padding=1), RANK)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.conv(x.view(-1, 1, 4, 5)).flatten(2).mean(-1))


@dataclass
class Case:
    """A training run.

    Attributes:
        settings: Of PSILoRA.
        rows: Rows of the batch of a process in a step (of each micro-batch), by (rank, step).
        micro: Number of micro-batches; all but the last run under `no_sync`.
        clip: Largest norm for `clip_grad_norm_`.
        loss_scale: Factor on the loss, divided out of `.grad` after backward, as a GradScaler does.
        modes: `Net.mode` by rank.
        poisoned: The (rank, step) whose batch is NaN.
        steps: Number of steps.
        net: The model.
        rounding: By how much, relative to its norm, a factor may differ from that of one process in the end.
    """

    settings: dict[str, Any]
    rows: Callable[[int, int], int] = lambda rank, step: 8
    micro: int = 1
    clip: float | None = None
    loss_scale: float = 1.0
    modes: dict[int, str] = field(default_factory=dict)
    poisoned: tuple[int, int] | None = None
    steps: int = 20
    net: Callable[[], Net] = Net
    rounding: float = 1e-6

    def batch(self, rank: int, step: int, micro: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1000 * step + 10 * rank + micro)
        rows = self.rows(rank, step)
        x, y = torch.randn(rows, DIMS[0], generator=generator), torch.randn(rows, DIMS[-1], generator=generator)
        return (x * float("nan") if self.poisoned == (rank, step) else x), y


def total(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The mean over rows; 0 with a graph for no rows."""
    x, y = batch
    return (model(x) - y).square().mean(1).sum() / max(1, len(x))


def make_optimizer(model: nn.Module, settings: dict[str, Any]) -> PSILoRA:
    return bare(model, **{"lr": 0.02, "step": "gradient", "prox": 0.5, "momentum": 0.0, **settings})


def after_backward(model: nn.Module, case: Case) -> None:
    gradients = [p for p in model.parameters() if p.grad is not None]
    for parameter in gradients:
        parameter.grad.div_(case.loss_scale)
    if case.clip is not None:
        nn.utils.clip_grad_norm_(gradients, case.clip)


def factors_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def train_in_world(case: Case, rank: int) -> dict[str, Any]:
    """Train under DDP in this process; return the factors, counts and traffic."""
    model = case.net()
    model.mode = case.modes.get(rank, "whole")
    short = any(mode == "short" for mode in case.modes.values())
    ddp = DistributedDataParallel(model, find_unused_parameters=short, gradient_as_bucket_view=case.micro > 1)
    optimizer = make_optimizer(model, case.settings)
    warned = []
    for step in range(case.steps):
        optimizer.zero_grad()
        for micro in range(case.micro):
            with ddp.no_sync() if micro < case.micro - 1 else contextlib.nullcontext():
                loss = total(ddp, case.batch(rank, step, micro)) / case.micro
                (loss * case.loss_scale).backward()
        after_backward(model, case)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        warned += [str(w.message) for w in caught]
    result = {
        "factors": factors_of(model),
        "stats": optimizer.stats(),
        "bytes": optimizer.communicator.bytes,
        "rounds": optimizer.communicator.rounds,
        "warned": warned,
    }
    optimizer.detach()
    return result


def train_alone(case: Case, world: int, *, trainable_bias: bool = False) -> dict[str, Tensor]:
    """The same training in one process: one batch of all rows, the loss being the mean of the processes' losses."""
    model = Net(trainable_bias=True) if trainable_bias else case.net()
    optimizer = make_optimizer(model, case.settings)
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(case.steps):
            optimizer.zero_grad()
            for micro in range(case.micro):
                joint_loss(model, case, world, step, micro).backward()
            after_backward(model, case)
            optimizer.step()
    return factors_of(model)


def joint_loss(model: Net, case: Case, world: int, step: int, micro: int) -> Tensor:
    batches = [case.batch(rank, step, micro) for rank in range(world)]
    scale = case.loss_scale / (case.micro * world)
    if case.modes:  # ranks that run another path keep a forward of their own
        losses = []
        for rank, batch in enumerate(batches):
            model.mode = case.modes.get(rank, "whole") if case.modes.get(rank) == "short" else "whole"
            losses.append(total(model, batch) * scale)
        return torch.stack(losses).sum()
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    weights = torch.cat([torch.full((len(b[0]),), scale / max(1, len(b[0]))) for b in batches])
    return ((model(x) - y).square().mean(1) * weights).sum()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One thread here and in processes started meanwhile, so that processes do not wait for each other's threads."""
    threads, variable = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        os.environ.pop("OMP_NUM_THREADS")
        if variable is not None:
            os.environ["OMP_NUM_THREADS"] = variable


@contextlib.contextmanager
def process_group(rank: int, world: int, store: str, timeout: float = 60.0) -> Iterator[None]:
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=timeout)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=limit)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def _enter(rank: int, world: int, folder: str, work: Callable[[int, int], Any]) -> None:
    with process_group(rank, world, os.path.join(folder, "store")):
        torch.save(work(rank, world), os.path.join(folder, f"{rank}.pt"))
        os._exit(0)  # gloo's clean-up may wait for a thread that waits for the GIL, which the clean-up holds


@contextlib.contextmanager
def _imports_found_here() -> Iterator[None]:
    """Processes started meanwhile find the modules that this one does; the server of forks asks for no other path."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [before])])
    try:
        yield
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


def run_world(work: Callable[[int, int], Any], world: int, folder: Path) -> list[Any]:
    """Run `work(rank, world)` in `world` processes that form a group; return what each returned, or None.

    The processes are forks of one that has imported everything and lives as long as this one, where there can be forks.
    """
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    with one_thread(), _imports_found_here():
        if method == "forkserver":
            multiprocessing.get_context(method).set_forkserver_preload(["world_cases"])
        mp.start_processes(_enter, args=(world, str(folder), work), nprocs=world, start_method=method)
    files = [folder / f"{rank}.pt" for rank in range(world)]
    return [torch.load(file, weights_only=True) if file.exists() else None for file in files]


def shard(model: Net) -> Net:
    """Spread the model over the default group, layer by layer (FSDP2)."""
    for layer in (model.l1, model.l2, model.l3):
        fully_shard(layer)
    fully_shard(model)
    return model


def train_sharded(case: Case, rank: int) -> dict[str, Any]:
    """Train under FSDP2 in this process; return the whole factors and the size of this process's part of them."""
    model = shard(Net(trainable_bias=True))
    optimizer = make_optimizer(model, case.settings)
    for step in range(case.steps):
        optimizer.zero_grad()
        total(model, case.batch(rank, step, 0)).backward()
        if case.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), case.clip)
        optimizer.step()
    part = sum(p.to_local().numel() for p in model.parameters() if p.requires_grad)
    whole = {name: p.full_tensor().detach() for name, p in model.named_parameters() if p.requires_grad}
    return {"factors": whole, "part": part, "stats": optimizer.stats()["skipped_steps"]}


def error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest relative error of a factor, in norm."""
    return max(float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted)
