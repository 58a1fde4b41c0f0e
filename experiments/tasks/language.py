"""GLUE with RoBERTa-base, SQuAD v2 with T5-small, WikiText-103 with GPT-2, from local files. Not run here.

`--data` names a folder with `model/` (weights and tokenizer as `save_pretrained` leaves them) and the data in its
published form: GLUE's folders of TSV files, SQuAD's two JSON files, WikiText's three token files. The development sets
are halved, in alternation, into validation and test, since GLUE's and SQuAD's test labels are not public.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.tasks import Scores, Task, device_of, moved

Example = dict[str, Any]
Batch = dict[str, Tensor]
IGNORED = -100
NO_ANSWER = "unanswerable"


@dataclass(frozen=True)
class GlueTask:
    """A GLUE task's files: folder, columns of the text(s) and the label, the labels (None: a number), its score."""

    folder: str
    texts: tuple[str, ...]
    label: str
    labels: tuple[str, ...] | None
    score: str = "accuracy"
    header: tuple[str, ...] | None = None
    development: str = "dev.tsv"


ENTAILMENT = ("entailment", "not_entailment")
GLUE = {
    "cola": GlueTask("CoLA", ("text",), "label", ("0", "1"), "matthews", ("source", "label", "mark", "text")),
    "mnli": GlueTask(
        "MNLI",
        ("sentence1", "sentence2"),
        "gold_label",
        ("contradiction", "neutral", "entailment"),
        development="dev_matched.tsv",
    ),
    "mrpc": GlueTask("MRPC", ("#1 String", "#2 String"), "Quality", ("0", "1"), "f1"),
    "qnli": GlueTask("QNLI", ("question", "sentence"), "label", ENTAILMENT),
    "qqp": GlueTask("QQP", ("question1", "question2"), "is_duplicate", ("0", "1"), "f1"),
    "rte": GlueTask("RTE", ("sentence1", "sentence2"), "label", ENTAILMENT),
    "sst2": GlueTask("SST-2", ("sentence",), "label", ("0", "1")),
    "stsb": GlueTask("STS-B", ("sentence1", "sentence2"), "score", None, "pearson"),
}


@dataclass(frozen=True)
class Settings:
    """How a task trains."""

    epochs: int
    batch: int
    length: int
    targets: tuple[str, ...]
    head_lr: float = 1e-3


SETTINGS = {
    "glue": Settings(epochs=3, batch=32, length=128, targets=("query", "value")),
    "squad": Settings(epochs=2, batch=16, length=384, targets=("q", "v")),
    "wikitext": Settings(epochs=1, batch=8, length=512, targets=("c_attn",)),
}


def read_glue(folder: Path, task: GlueTask, name: str) -> list[tuple[tuple[str, ...], float]]:
    """[(texts, label index or number)] of a TSV file; rows without a known label are left out, as in MNLI."""
    with (folder / task.folder / name).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, task.header, delimiter="\t", quoting=csv.QUOTE_NONE))
    missing = {*task.texts, task.label} - set(rows[0] if rows else {})
    if missing:
        raise ValueError(f"{task.folder}/{name} lacks the columns {', '.join(sorted(missing))}")
    found = []
    for row in rows:
        label = row[task.label]
        if task.labels is None:
            found.append((tuple(row[t] for t in task.texts), float(label)))
        elif label in task.labels:
            found.append((tuple(row[t] for t in task.texts), task.labels.index(label)))
    return found


def read_squad(path: Path) -> list[tuple[str, str, list[str]]]:
    """[(question, context, accepted answers)] of a SQuAD v2 file; no answers where the question has none."""
    found = []
    for article in json.loads(path.read_text(encoding="utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                answers = [] if qa.get("is_impossible") else [answer["text"] for answer in qa["answers"]]
                found.append((qa["question"], paragraph["context"], answers))
    return found


def normalised_answer(text: str) -> list[str]:
    """SQuAD's normalisation: lower case, no punctuation, no articles; as words."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def answer_f1(predicted: str, accepted: Sequence[str]) -> float:
    """SQuAD's F1 over words, the best over the accepted answers; without an answer, 1 for saying so."""
    words = [] if predicted.strip() == NO_ANSWER else normalised_answer(predicted)
    best = 0.0
    for gold in map(normalised_answer, accepted or [""]):
        if not words or not gold:
            best = max(best, float(words == gold))
            continue
        shared = sum((Counter(words) & Counter(gold)).values())
        best = max(best, 2 * shared / (len(words) + len(gold)))
    return best


class LanguageSession:
    """A transformers model that computes its own loss from `labels`, and tokenised examples.

    Args:
        model: With adapters.
        tokenizer: To pad with.
        data: {"train", "validation", "test"} of {"input_ids", "labels"}; labels are padded where they are lists.
        settings: Of the task.
        seed: Of the order of the batches.
        score: (model, examples) to the task's own score, or None.
        causal: Whether labels are shifted by one inside the model.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        data: Mapping[str, list[Example]],
        settings: Settings,
        seed: int,
        score: Callable[[LanguageSession, list[Example]], float | None] | None = None,
        causal: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.data, self.settings, self.seed = model, tokenizer, data, settings, seed
        self.score, self.causal, self.head_lr = score, causal, settings.head_lr
        self.steps = settings.epochs * -(-len(data["train"]) // settings.batch)
        self.digest = hashlib.sha256(repr(data["train"]).encode()).hexdigest()[:16]

    def batches(self) -> Iterator[Batch]:
        """Shuffled epochs."""
        generator = torch.Generator().manual_seed(self.seed)
        order: list[int] = []
        for _ in range(self.steps):
            if not order:
                order = torch.randperm(len(self.data["train"]), generator=generator).tolist()
            chosen, order = order[: self.settings.batch], order[self.settings.batch :]
            yield self.collate([self.data["train"][i] for i in chosen])

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Pad the inputs, and labels that are token lists, to the longest."""
        batch = dict(self.tokenizer.pad({"input_ids": [e["input_ids"] for e in examples]}, return_tensors="pt"))
        labels = [e["labels"] for e in examples]
        if isinstance(labels[0], list):
            longest = max(map(len, labels))
            labels = [row + [IGNORED] * (longest - len(row)) for row in labels]
        batch["labels"] = torch.tensor(labels)
        return batch

    def loss(self, batch: Batch) -> Tensor:
        """The model's own loss."""
        return self.model(**batch).loss

    def evaluate(self, split: str) -> Scores:
        """The mean loss per label (token or example) and the task's score."""
        total, count = 0.0, 0
        for first in range(0, len(self.data[split]), self.settings.batch):
            batch = moved(self.collate(self.data[split][first : first + self.settings.batch]), device_of(self.model))
            labels = batch["labels"][:, 1:] if self.causal else batch["labels"]
            weight = int((labels != IGNORED).sum()) if labels.dim() > 1 else len(labels)
            total += weight * float(self.model(**batch).loss)
            count += weight
        return Scores(total / count, None if self.score is None else self.score(self, self.data[split]))


def pretrained(folder: Path, kind: str, **settings: Any) -> tuple[Any, Any]:
    """(model of the Auto class `kind`, tokenizer) from `folder`/model, without asking the hub."""
    import transformers

    path = folder / "model"
    if not (path / "config.json").is_file():
        raise SystemExit(f"error: {path} holds no model: put there what save_pretrained writes")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = getattr(transformers, kind).from_pretrained(path, local_files_only=True, **settings)
    return model.float(), tokenizer


def with_lora(model: nn.Module, rank: int, seed: int, settings: Settings, head: str | None = None) -> nn.Module:
    """PEFT adapters (alpha = r, no dropout) on the task's target modules."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=list(settings.targets),
        modules_to_save=[head] if head else None,
        fan_in_fan_out="c_attn" in settings.targets,
    )
    return get_peft_model(model, config)


def halves(examples: list[Example]) -> dict[str, list[Example]]:
    """Every other example validates, the others test."""
    return {"validation": examples[::2], "test": examples[1::2]}


def glue_score(name: str, predictions: Sequence[float], labels: Sequence[float]) -> float:
    """Accuracy, F1, Matthews' or Pearson's correlation."""
    from sklearn import metrics

    if name == "pearson":
        return float(torch.corrcoef(torch.tensor([predictions, labels], dtype=torch.float64))[0, 1])
    rules = {"accuracy": metrics.accuracy_score, "f1": metrics.f1_score, "matthews": metrics.matthews_corrcoef}
    return float(rules[name](labels, predictions))


def make_glue(condition: str, rank: int, seed: int, folder: Path) -> LanguageSession:
    """RoBERTa on one GLUE task."""
    task, settings = GLUE[condition], SETTINGS["glue"]
    torch.manual_seed(seed)  # of the new head
    count = 1 if task.labels is None else len(task.labels)
    model, tokenizer = pretrained(folder, "AutoModelForSequenceClassification", num_labels=count)

    def encode(rows: list[tuple[tuple[str, ...], float]]) -> list[Example]:
        encoded = (tokenizer(*texts, truncation=True, max_length=settings.length)["input_ids"] for texts, _ in rows)
        return [{"input_ids": ids, "labels": label} for ids, (_, label) in zip(encoded, rows, strict=True)]

    def score(session: LanguageSession, examples: list[Example]) -> float:
        predictions: list[float] = []
        for first in range(0, len(examples), settings.batch):
            batch = moved(session.collate(examples[first : first + settings.batch]), device_of(session.model))
            logits = session.model(**batch).logits
            predictions += (logits[:, 0] if task.labels is None else logits.argmax(1)).tolist()
        return glue_score(task.score, predictions, [e["labels"] for e in examples])

    data = {"train": encode(read_glue(folder, task, "train.tsv"))}
    data |= halves(encode(read_glue(folder, task, task.development)))
    return LanguageSession(with_lora(model, rank, seed, settings, "classifier"), tokenizer, data, settings, seed, score)


def make_squad(condition: str, rank: int, seed: int, folder: Path) -> LanguageSession:
    """T5 on SQuAD v2, text to text; unanswerable questions have the answer "unanswerable"."""
    settings = SETTINGS["squad"]
    model, tokenizer = pretrained(folder, "AutoModelForSeq2SeqLM")

    def encode(path: Path) -> list[Example]:
        examples = []
        for question, context, answers in read_squad(path):
            text = f"question: {question} context: {context}"
            examples.append(
                {
                    "input_ids": tokenizer(text, truncation=True, max_length=settings.length)["input_ids"],
                    "labels": tokenizer(answers[0] if answers else NO_ANSWER)["input_ids"],
                    "answers": answers,
                }
            )
        return examples

    def score(session: LanguageSession, examples: list[Example]) -> float:
        total = 0.0
        for first in range(0, len(examples), settings.batch):
            part = examples[first : first + settings.batch]
            batch = moved(session.collate(part), device_of(session.model))
            batch.pop("labels")
            produced = session.model.generate(**batch, max_new_tokens=32)
            texts = tokenizer.batch_decode(produced, skip_special_tokens=True)
            total += sum(answer_f1(text, e["answers"]) for text, e in zip(texts, part, strict=True))
        return total / len(examples)

    data = {"train": encode(folder / "train-v2.0.json"), **halves(encode(folder / "dev-v2.0.json"))}
    return LanguageSession(with_lora(model, rank, seed, settings), tokenizer, data, settings, seed, score)


def make_wikitext(condition: str, rank: int, seed: int, folder: Path) -> LanguageSession:
    """GPT-2 on WikiText-103 in blocks of equal length; nats per token."""
    settings = SETTINGS["wikitext"]
    model, tokenizer = pretrained(folder, "AutoModelForCausalLM")
    length = min(settings.length, model.config.n_positions)

    def blocks(name: str) -> list[Example]:
        ids = tokenizer((folder / f"wiki.{name}.tokens").read_text(encoding="utf-8"))["input_ids"]
        parts = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
        return [{"input_ids": part, "labels": part} for part in parts]

    data = {"train": blocks("train"), "validation": blocks("valid"), "test": blocks("test")}
    return LanguageSession(with_lora(model, rank, seed, settings), tokenizer, data, settings, seed, causal=True)


def task(name: str, conditions: tuple[str, ...], make: Callable[..., LanguageSession], paper_lr: float) -> Task:
    """A task whose data is local; AdamW's grid is centred on its usual rate for LoRA."""
    centres = {"adamw": 5e-4, "nadam": 5e-4, f"psilora-{name}": paper_lr}
    return Task(name, conditions, make, centres=centres, local_data=True)


TASKS = {
    "glue": task("glue", tuple(GLUE), make_glue, 0.2),
    "squad": task("squad", ("v2",), make_squad, 0.2),
    "wikitext": task("wikitext", ("103",), make_wikitext, 0.2),
}
