"""Whole training steps through PEFT: tokens per second and peak memory, on random tokens.

All optimizers train one model in turn, blocks of a few steps each, so that drift of the machine hits all alike. The
check of an optimizer is that its first steps lower the loss of the batch they are taken on.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench import minilm
from bench.candidate import Row
from bench.measure import peak_bytes, summary
from bench.suites import Settings
from psilora import PSILoRA

#: Steps of a block: the first is not timed.
BLOCK = 3
GRADIENT: dict[str, Any] = {"step": "gradient", "gradient": "exact", "metric": None, "controller": None}
METHODS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "AdamW": lambda model: torch.optim.AdamW(_trainable(model), lr=1e-3, weight_decay=0.0),
    "Riemannian AdamW (PEFT)": lambda model: _riemannian(model),
    "PSILoRA exact": lambda model: PSILoRA(model, 1.0, momentum=0.0, **GRADIENT),
    "PSILoRA exact, momentum": lambda model: PSILoRA(model, 1.0, momentum=0.9, **GRADIENT),
    "PSILoRA tangent": lambda model: PSILoRA(model, 1.0, momentum=0.0, **{**GRADIENT, "gradient": "tangent"}),
    "PSILoRA spectral": lambda model: PSILoRA(model, 1e-2, step="spectral"),
}


@dataclass
class Job:
    """A model, a batch that its forward takes, and N."""

    name: str
    model: nn.Module
    batch: dict[str, Tensor]
    tokens: int

    def loss(self) -> Tensor:
        """One forward pass."""
        out = self.model(**self.batch)
        return out if isinstance(out, Tensor) else out.loss


def run(settings: Settings) -> list[Row]:
    """Return the rows of all models."""
    rows = []
    for job in _jobs(settings):
        rows += _rows(job, settings)
    return rows


def _jobs(settings: Settings) -> Iterator[Job]:
    if settings.device == "cuda":
        for checkpointing in (False, True):
            yield llama(small=settings.small, checkpointing=checkpointing, device="cuda")
        return
    texts, length = (2, 8) if settings.small else (16, 64)
    model = minilm.adapted(settings.small)
    name = "tiny BERT" if settings.small else "MiniLM"
    yield Job(f"{name}, r 8 on q and v, fp32", model, minilm.batch(model, texts, length), texts * length)
    if settings.small:
        yield llama(small=True, checkpointing=True, device="cpu")


def llama(*, small: bool, checkpointing: bool, device: str) -> Job:
    """Llama-3-8B's shape (or a tiny one) with random weights, LoRA r 16 on all linear layers, bf16 on CUDA."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    }  # fmt: skip
    if small:
        sizes = {key: 2 if "num" in key else 64 for key in sizes}
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.bfloat16 if device == "cuda" else torch.float32)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"))
    texts, length = (1, 16) if small else (2, 2048)
    ids = torch.randint(sizes["vocab_size"], (texts, length), device=device)
    name = f"{'tiny ' if small else ''}Llama-3-8B shape, r 16, all linear{', checkpointing' if checkpointing else ''}"
    return Job(name, model, {"input_ids": ids, "labels": ids}, texts * length)


def _rows(job: Job, settings: Settings) -> list[Row]:
    start = {name: p.detach().clone() for name, p in job.model.named_parameters() if p.requires_grad}
    rows: dict[str, Row] = {}
    readings: dict[str, list[tuple[float, float]]] = {}
    methods = list(METHODS)
    for name in methods:
        _reset(job, start)
        row = rows[name] = {"case": f"{job.name}, {job.tokens} tokens", "method": name, "tokens": job.tokens}
        row.update(_first_steps(job, name, settings.device))
        if row["error"] >= 1:
            row["red"] = f"the loss went from 1 to {row['error']:.3f} of itself in {BLOCK} steps: not timed"
    sound = [name for name in methods if "red" not in rows[name]]
    began = time.perf_counter()
    for number in range(2 if settings.small else 100):
        for name in sound[number % len(sound) :] + sound[: number % len(sound)] if sound else ():
            _reset(job, start)
            readings.setdefault(name, []).extend(_block(job, name, settings.device))
        if time.perf_counter() - began > 3.5 * settings.seconds:
            break
    for name, found in readings.items():
        rows[name].update(summary([wall for wall, _ in found]))
        if settings.device == "cpu":
            rows[name]["cpu_ms"] = statistics.median(busy for _, busy in found)
        rows[name]["tokens_per_second"] = job.tokens / (rows[name]["ms"] * 1e-3)
    return list(rows.values())


def _first_steps(job: Job, name: str, device: str) -> Row:
    """Return the loss after a few steps as a share of the one before, peak memory of a step and state bytes."""
    optimizer = METHODS[name](job.model)
    first = float(job.loss().detach())
    for _ in range(BLOCK):
        _step(job, optimizer)
    captured = 0
    job.loss().backward()
    if isinstance(optimizer, PSILoRA):
        captured = optimizer.capture_bytes()
    optimizer.zero_grad()
    row = {"error": float(job.loss().detach()) / first, "capture_bytes": captured}
    row["state_bytes"] = sum(
        v.nbytes for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)
    )
    row["peak_bytes"] = peak_bytes(lambda: _step(job, optimizer), device)
    _release(optimizer)
    return row


def _block(job: Job, name: str, device: str) -> list[tuple[float, float]]:
    """Return the wall and the processor's time of a block's steps in ms, the first left out."""
    optimizer = METHODS[name](job.model)
    times = []
    for _ in range(BLOCK):
        if device == "cuda":
            torch.cuda.synchronize()
        began, busy = time.perf_counter(), time.process_time()
        _step(job, optimizer)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((1e3 * (time.perf_counter() - began), 1e3 * (time.process_time() - busy)))
    _release(optimizer)
    return times[1:]


def _step(job: Job, optimizer: torch.optim.Optimizer) -> None:
    job.loss().backward()
    optimizer.step()
    optimizer.zero_grad()


def _release(optimizer: torch.optim.Optimizer) -> None:
    if isinstance(optimizer, PSILoRA):
        optimizer.detach()


@torch.no_grad()
def _reset(job: Job, start: dict[str, Tensor]) -> None:
    for name, parameter in job.model.named_parameters():
        if name in start:
            parameter.copy_(start[name])
            parameter.grad = None


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _riemannian(model: nn.Module) -> torch.optim.Optimizer:
    from peft.optimizers import create_riemannian_optimizer

    return create_riemannian_optimizer(model, torch.optim.AdamW, lr=1e-3, weight_decay=0.0)
