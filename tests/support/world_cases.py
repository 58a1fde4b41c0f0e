"""What the processes of a world do in the tests: training runs, and attempts that must fail."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from worlds import (
    Case,
    ConvolvedNet,
    Net,
    factors_of,
    joint_loss,
    make_optimizer,
    shard,
    total,
    train_in_world,
    train_sharded,
)

from psilora.distributed import Communicator
from psilora.steps import verify

UNEVEN = lambda rank, step: 3 + 5 * rank + step % 3  # noqa: E731
SOMETIMES_EMPTY = lambda rank, step: 0 if (rank + step) % 3 == 0 else 6  # noqa: E731

CASES: dict[str, Case] = {
    "exact": Case({}),
    "exact, K = 2, momentum": Case({"num_iters": 2, "momentum": 0.8}),
    "exact, K-FAC": Case({"metric": "kfac", "damping": 1e-2}, rows=UNEVEN, steps=50),
    "exact, K-FAC, K = 2, momentum, B first": Case(
        {"metric": "kfac", "damping": 1e-2, "num_iters": 2, "momentum": 0.8, "first": "B"},
    ),
    # finds factors and not increments: every step rounds all of them
    "ritz, momentum": Case({"solver": "ritz", "num_iters": 2, "momentum": 0.8}, rows=UNEVEN, rounding=1e-5),
    "exact, K = 0": Case({"num_iters": 0, "momentum": 0.5}),
    "two settings": Case({"groups": [{"layers": "l2", "num_iters": 2, "momentum": 0.8}]}),
    "tangent, momentum": Case({"gradient": "tangent", "momentum": 0.8}),
    "tangent, K = 2, K-FAC": Case({"gradient": "tangent", "num_iters": 2, "metric": "kfac", "damping": 1e-2}, steps=50),
    "tangent, Shampoo": Case({"gradient": "tangent", "metric": "shampoo", "damping": 1e-2}, rows=UNEVEN),
    "exact, dense K-FAC": Case({"metric": "kfac-dense", "damping": 1e-2, "num_iters": 2}, rows=UNEVEN),
    "exact, low-rank K-FAC": Case({"metric": "kfac-low-rank", "damping": 1e-2, "num_iters": 2}, rows=UNEVEN),
    "tangent, dense Shampoo": Case({"gradient": "tangent", "metric": "shampoo-dense", "damping": 1e-2}, rows=UNEVEN),
    "spectral, controller": Case(
        {"step": "spectral", "momentum": 0.8, "prox": None, "controller": "slope"}, rows=UNEVEN
    ),
    "uneven": Case({"momentum": 0.8}, rows=UNEVEN),
    "dense": Case(
        {"gradient": "dense", "metric": "kfac", "damping": 1e-2, "momentum": 0.8}, rows=SOMETIMES_EMPTY, micro=2
    ),
    "clipped by the full norm": Case({"max_grad_norm": 0.2, "norm": "full", "num_iters": 2}, rows=UNEVEN),
    "auto": Case({"gradient": "auto", "momentum": 0.8, "capture_budget": 1500}, rows=UNEVEN),
    "sometimes empty": Case({"momentum": 0.8, "metric": "kfac", "damping": 1e-2}, rows=SOMETIMES_EMPTY),
    "no_sync": Case({"momentum": 0.8}, rows=UNEVEN, micro=3),
    "clipped": Case({"momentum": 0.8}, clip=0.2),
    "scaled and clipped, no_sync": Case({"num_iters": 2}, rows=UNEVEN, micro=2, clip=0.2, loss_scale=1024.0),
    "spectral": Case(
        {"step": "spectral", "metric": "lora", "momentum": 0.9, "prox": None, "controller": "slope"}, rows=UNEVEN
    ),
    "a layer that one process skips": Case({"momentum": 0.8}, modes={1: "short"}),
    "a convolution": Case({"metric": "kfac", "damping": 1e-2}, rows=SOMETIMES_EMPTY, net=ConvolvedNet),
    "a convolution, auto": Case({"gradient": "auto", "momentum": 0.8}, rows=UNEVEN, micro=2, net=ConvolvedNet),
}


LARGE = 3
IN_LARGE = ("exact", "exact, K = 2, momentum", "exact, K-FAC", "two settings", "tangent, momentum", "no_sync")


def cases_of(world: int) -> tuple[str, ...]:
    """Every case in a small world, and a choice in a large one, where they take longer."""
    return IN_LARGE if world == LARGE else tuple(CASES)


def run_cases(rank: int, world: int) -> dict[str, Any]:
    results: dict[str, Any] = {name: train_in_world(CASES[name], rank) for name in cases_of(world)}
    results["poisoned"] = train_in_world(Case({}, poisoned=(1, 3), steps=5), rank)
    results["bypassed"] = train_in_world(Case({}, modes={1: "bypassed"}, steps=10), rank)
    results["probes"] = few_probes(rank)
    results["naive"] = naive(rank)
    results["refused"] = refused(rank)
    return results


def few_probes(rank: int) -> str:
    """No layer is watched in both processes: each keeps one probe, of another layer."""
    model, case = Net(), Case({})
    optimizer = make_optimizer(model, {})
    total(model, case.batch(rank, 0, 0)).backward()
    for i, record in enumerate(optimizer._capture.records.values()):
        record.left = record.left if i == rank else None
    for parameter in factors_with_gradients(model):
        distributed.all_reduce(parameter.grad)
    return message(optimizer.step)


def factors_with_gradients(model: Net) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.grad is not None]


def message(act: Any) -> str:
    try:
        act()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


def naive(rank: int) -> dict[str, Any]:
    """What a process does that takes its own captures for everybody's: with and without the check of `.grad`."""

    class Alone(Communicator):
        world_size = 1

    def attempt() -> dict[str, Tensor]:
        model, case = Net(), Case({})
        ddp = torch.nn.parallel.DistributedDataParallel(model)
        optimizer = make_optimizer(model, {})
        optimizer.communicator = Alone()
        for step in range(5):
            optimizer.zero_grad()
            total(ddp, case.batch(rank, step, 0)).backward()
            optimizer.step()
        return factors_of(model)

    noticed = message(attempt)
    check, verify._refuse = verify._refuse, lambda *_: None
    try:
        return {"noticed": noticed, "factors": attempt()}
    finally:
        verify._refuse = check


def refused(rank: int) -> dict[str, Any]:
    """Errors that every process must raise, with nothing changed."""
    model = Net()
    found: dict[str, Any] = {"shampoo": message(lambda: make_optimizer(model, {"metric": "shampoo"}))}
    optimizer = make_optimizer(model, {})
    if rank == 0:
        total(model, Case({}).batch(rank, 0, 0)).backward()
    before = factors_of(model)
    found["one-sided"] = message(optimizer.step)
    found["unchanged"] = all(torch.equal(before[name], p) for name, p in factors_of(model).items())
    found["left over"] = left_over(rank)
    return found


def left_over(rank: int) -> list[str]:
    """What two steps say of which the second finds the gradients of the first, in one process, among its own."""
    model = Net()
    optimizer = make_optimizer(model, {})
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    said = []
    for step in range(2):
        if rank > 0:
            optimizer.zero_grad(set_to_none=False)
        total(ddp, Case({}).batch(rank, step, 0)).backward()
        said.append(message(optimizer.step))
    return said


SHARDED: dict[str, Case] = {
    "tangent": Case({"gradient": "tangent", "momentum": 0.8, "num_iters": 2}, rows=UNEVEN),
    "tangent, own clipping": Case({"gradient": "tangent", "max_grad_norm": 0.2}),
    "spectral": Case({"step": "spectral", "momentum": 0.8, "metric": "lora", "prox": None}, rows=UNEVEN, clip=0.5),
}


def run_sharded(rank: int, world: int, folder: str) -> dict[str, Any]:
    results: dict[str, Any] = {name: train_sharded(case, rank) for name, case in SHARDED.items()}
    model = shard(Net())
    refusals = ({}, {"gradient": "tangent", "metric": "kfac"}, {"step": "spectral", "controller": "slope"})
    results["refused"] = [message(lambda s=settings: make_optimizer(model, s)) for settings in refusals]
    results["saved"] = save_sharded(rank, folder)
    return results


def save_sharded(rank: int, folder: str) -> dict[str, Tensor]:
    """Train, save a distributed checkpoint halfway, train on; return the factors at the end."""
    case = SHARDED["tangent"]
    model = shard(Net())
    optimizer = make_optimizer(model, case.settings)
    for step in range(6):
        if step == 3:
            states = get_state_dict(model, optimizer)
            dcp.save(dict(zip(("model", "optimizer"), states, strict=True)), checkpoint_id=folder)
        optimizer.zero_grad()
        total(model, case.batch(rank, step, 0)).backward()
        optimizer.step()
    return {name: p.full_tensor().detach() for name, p in model.named_parameters() if p.requires_grad}


def resumed_alone(folder: str, world: int) -> dict[str, Tensor]:
    """Load that checkpoint in one process, without sharding, and train on."""
    case = SHARDED["tangent"]
    model = Net()
    optimizer = make_optimizer(model, case.settings)
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(states, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    for step in range(3, 6):
        optimizer.zero_grad()
        joint_loss(model, case, world, step, 0).backward()
        optimizer.step()
    return factors_of(model)


def one_dies(rank: int, world: int) -> dict[str, Any]:
    """The last process is gone when the others step."""
    model = Net()
    optimizer = make_optimizer(model, {})
    total(model, Case({}).batch(0, 0, 0)).backward()
    distributed.barrier()
    if rank == world - 1:
        os._exit(0)
    before, start = factors_of(model), time.monotonic()
    found = message(optimizer.step)
    unchanged = all(torch.equal(before[name], p) for name, p in factors_of(model).items())
    return {"message": found, "seconds": time.monotonic() - start, "unchanged": unchanged}
