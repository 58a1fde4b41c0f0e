"""The data of the fine-tuning demo: a real task that every Python carries, or a text set of your own.

The task is to tell which library package a docstring comes from. The documentation strings of the running
interpreter's standard library are read from its source files with `ast` (nothing is imported or executed),
cleaned of copies and near copies, labelled with the top-level package or module they come from, and split
once and for all by a hash of the text: the same Python gives the same data on every machine.

`load_texts` makes the same structure from a CSV, JSON or JSON Lines file, or from a data set of the
`datasets` library.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import json
import random
import re
import sysconfig
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

MIN_CLASSES = 12
MIN_TRAIN = 2000
TARGET_CLASSES = 15
TARGET_EXAMPLES = 2800
MAX_PER_CLASS = 250
MIN_PER_CLASS = 30
MIN_WORDS = 4
MAX_OVERLAP = 0.7
VALIDATION_SHARE = 0.25
TEXT_COLUMNS = ("text", "sentence", "content", "review", "question", "body")
LABEL_COLUMNS = ("label", "labels", "class", "category", "target", "coarse_label")
FILES = (".csv", ".tsv", ".json", ".jsonl")
#: Largest field of a CSV file, in characters; Python's own limit is 131,072.
FIELD_LIMIT = 2**30
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


class DataError(ValueError):
    """The data a user asked for cannot be used; the message says what to change."""


@dataclass(frozen=True)
class TextData:
    """A labelled text set, split: parallel lists of texts and label indices; label names in index order."""

    name: str
    label_names: list[str]
    train_texts: list[str]
    train_labels: list[int]
    validation_texts: list[str]
    validation_labels: list[int]

    def describe(self) -> str:
        """One line: the name, the classes and the sizes of the two splits."""
        sizes = f"{len(self.train_texts)} training and {len(self.validation_texts)} validation texts"
        return f"{self.name}: {len(self.label_names)} classes, {sizes}"

    def digest(self) -> str:
        """A hash of all texts, labels and the split: equal for equal data."""
        return hashlib.sha256(repr(self).encode("utf-8", "surrogatepass")).hexdigest()

    def part(self, train: int, validation: int, seed: int = 0) -> TextData:
        """A random part with at most so many texts in each split, the same for equal seeds."""
        kept = []
        for texts, labels, count in (
            (self.train_texts, self.train_labels, train),
            (self.validation_texts, self.validation_labels, validation),
        ):
            chosen = random.Random(seed).sample(range(len(texts)), min(count, len(texts)))
            kept += [[texts[i] for i in chosen], [labels[i] for i in chosen]]
        return TextData(self.name, self.label_names, *kept)


def normalise(text: str) -> str:
    """The text's words in lower case, letters only: texts that agree in this are the same docstring."""
    return " ".join(re.findall(r"[a-z]+", text.lower()))


def standard_library_docstrings(root: Path | None = None) -> Iterator[tuple[str, str]]:
    """Yield (top-level name, docstring) of each documented module, class and function, in path order.

    `root` is the library folder to read, by default the running interpreter's own. Test suites, private
    top-level modules and files that do not parse are left out.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        name = parts[0].removesuffix(".py")
        if name.startswith("_") or SKIPPED_FOLDERS.intersection(parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, documented) and (text := ast.get_docstring(node)):
                yield name, text


def overlap(first: frozenset[str], second: frozenset[str]) -> float:
    """The Jaccard similarity of two word sets: 1 for the same words, 0 for none in common."""
    return len(first & second) / max(1, len(first | second))


def without_near_copies(texts: list[str], limit: int) -> list[str]:
    """The first `limit` texts whose words overlap by at most MAX_OVERLAP with every text kept before them."""
    kept: list[str] = []
    word_sets: list[frozenset[str]] = []
    for text in texts:
        words = frozenset(normalise(text).split())
        if len(kept) < limit and all(overlap(words, other) <= MAX_OVERLAP for other in word_sets):
            kept.append(text)
            word_sets.append(words)
    return kept


def unique_by_class(pairs: Iterator[tuple[str, str]]) -> dict[str, list[str]]:
    """{class: texts} without copies, at most MAX_PER_CLASS texts each.

    A text that two classes share is dropped, and so is one that nearly repeats an earlier text of its class
    (the same words but for a name) or has fewer than MIN_WORDS words. Within a class the order is that of a
    hash of the text: random with respect to the content and the same on every machine.
    """
    owners: dict[str, set[str]] = defaultdict(set)
    originals: dict[str, tuple[str, str]] = {}
    for name, text in pairs:
        key = normalise(text)
        if key.count(" ") + 1 >= MIN_WORDS:
            owners[key].add(name)
            originals.setdefault(key, (name, text))
    texts: dict[str, list[str]] = defaultdict(list)
    for key in sorted(originals, key=_digest):
        if len(owners[key]) == 1:
            name, text = originals[key]
            texts[name].append(text)
    return {name: without_near_copies(group, MAX_PER_CLASS) for name, group in texts.items()}


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def split(texts: dict[str, list[str]], name: str, share: float = VALIDATION_SHARE) -> TextData:
    """`texts` as a TextData: the first `share` of each class (at least one text) validates."""
    names = sorted(texts)
    data = TextData(name, names, [], [], [], [])
    for label, group in enumerate(texts[key] for key in names):
        held_out = max(1, round(share * len(group)))
        data.validation_texts.extend(group[:held_out])
        data.validation_labels.extend([label] * held_out)
        data.train_texts.extend(group[held_out:])
        data.train_labels.extend([label] * (len(group) - held_out))
    return data


def docstring_data(root: Path | None = None) -> TextData:
    """The docstring task: the largest classes, at most MAX_PER_CLASS texts each, a quarter for validation.

    Classes are added, largest first, until there are TARGET_CLASSES of them and TARGET_EXAMPLES texts, so
    that a Python built without some packages still makes a full task. Raises DataError when the library is
    too small or has no readable source (some embedded Pythons).
    """
    by_class = unique_by_class(standard_library_docstrings(root))
    ranking = sorted(by_class, key=lambda name: (-len(by_class[name]), name))
    chosen: dict[str, list[str]] = {}
    for name in ranking:
        enough = len(chosen) >= TARGET_CLASSES and sum(map(len, chosen.values())) >= TARGET_EXAMPLES
        if enough or len(by_class[name]) < MIN_PER_CLASS:
            break
        chosen[name] = by_class[name]
    data = split(chosen, "standard-library docstrings")
    if len(data.label_names) < MIN_CLASSES or len(data.train_texts) < MIN_TRAIN:
        raise DataError(
            f"this Python's library gives {len(data.label_names)} classes and {len(data.train_texts)} "
            f"training docstrings; the task needs {MIN_CLASSES} and {MIN_TRAIN}. Use --dataset."
        )
    return data


def load_texts(source: str, text_column: str | None = None, label_column: str | None = None) -> TextData:
    """The text set of `source`: a .csv, .tsv, .json or .jsonl file, or else the name of a `datasets` set.

    A column that is not named is looked for under TEXT_COLUMNS and LABEL_COLUMNS. A file has no split of its
    own: exact copies are dropped and a quarter of each class validates. NAME:CONFIG names a configuration of
    a data set, whose validation (or else test) split is used when it has one. Raises DataError for unusable
    data.
    """
    path = Path(source)
    if path.is_file() and path.suffix.lower() not in FILES:
        raise DataError(f"{source} is a file of the kind {path.suffix!r}; convert it to one of {', '.join(FILES)}")
    if path.suffix.lower() not in FILES:
        return _hub_texts(source, text_column, label_column)
    if not path.is_file():
        raise DataError(f"there is no file {source}")
    if path.stat().st_size == 0:
        raise DataError(f"{source} is empty; it must hold texts and their labels")
    pairs = _pairs(_rows(path), text_column, label_column, source)
    return split(_grouped(dict(pairs).items(), source), path.name)


def _rows(path: Path) -> list[dict[str, object]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() in {".csv", ".tsv"}:
                csv.field_size_limit(FIELD_LIMIT)
                return list(csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ","))
            rows = json.load(file) if path.suffix.lower() == ".json" else _json_lines(file, path)
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path} must hold a list of objects, one per example")
    return rows


def _json_lines(lines: Iterable[str], path: Path) -> list[dict[str, object]]:
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number} is not JSON: {error.msg} at column {error.colno}") from error
    return rows


def _column(columns: Iterable[str], wanted: str | None, usual: tuple[str, ...], option: str, source: str) -> str:
    columns = list(columns)
    found = [name for name in ((wanted,) if wanted else usual) if name in columns]
    if found:
        return found[0]
    missing = f"no column {wanted!r}" if wanted else f"none of the columns {', '.join(usual)}"
    raise DataError(f"{source} has {missing}; it has {', '.join(columns) or 'none'} (choose with {option})")


def _pairs(
    rows: Iterable[dict[str, object]], text_column: str | None, label_column: str | None, source: str
) -> list[tuple[str, str]]:
    """(text, label) of each row, both as strings; rows without one of them are left out."""
    rows = list(rows)
    if not rows:
        raise DataError(f"{source} has no rows; at least two labels with two different texts each are needed")
    columns = list(rows[0])
    text = _column(columns, text_column, TEXT_COLUMNS, "--text-column", source)
    label = _column(columns, label_column, LABEL_COLUMNS, "--label-column", source)
    pairs = []
    for number, row in enumerate(rows, start=1):
        value, name = row.get(text), row.get(label)
        if isinstance(value, (list, dict)) or isinstance(name, (list, dict)):
            column, found = (text, value) if isinstance(value, (list, dict)) else (label, name)
            raise DataError(
                f"{source}, row {number}: {column!r} is a {type(found).__name__}; each text and label must be one value"
            )
        if value is not None and name is not None and str(value).strip() and str(name).strip():
            pairs.append((str(value).strip(), str(name).strip()))
    return pairs


def _grouped(pairs: Iterable[tuple[str, str]], source: str) -> dict[str, list[str]]:
    """{label: texts in hash order}, refusing what cannot be split so that both parts know every label."""
    groups: dict[str, list[str]] = defaultdict(list)
    for text, label in sorted(pairs, key=lambda pair: _digest(pair[0])):
        groups[label].append(text)
    single = [label for label, texts in groups.items() if len(texts) < 2]
    if len(groups) < 2 or single:
        found = f"only one text for label {single[0]!r}" if single else f"{len(groups)} label(s)"
        raise DataError(f"{source} has {found}; at least two labels with two different texts each are needed")
    return groups


def _hub_texts(source: str, text_column: str | None, label_column: str | None) -> TextData:
    """A data set of the `datasets` library (a hub name or a local folder) as a TextData."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        message = f"--dataset {source} is no CSV or JSON file, so it needs the datasets library"
        raise DataError(f"{message} (pip install datasets)") from error
    name, _, config = source.partition(":")
    try:
        splits = load_dataset(name, config or None)
    except Exception as error:  # the library raises its own, the hub's and the operating system's errors
        raise DataError(f"the data set {source} cannot be loaded: {error}") from error
    train = splits.get("train")
    if train is None:
        raise DataError(f"the data set {source} has no train split, only {', '.join(splits)}")
    held_out = next((splits[key] for key in ("validation", "valid", "dev", "test") if key in splits), None)
    if held_out is None:
        return split(_grouped(dict(_pairs(train, text_column, label_column, source)).items(), source), source)
    training = _pairs(train, text_column, label_column, source)
    validation = _pairs(held_out, text_column, label_column, source)
    names = sorted({label for _, label in training}, key=lambda label: (len(label), label))
    unknown = {label for _, label in validation} - set(names)
    if unknown or len(names) < 2:
        problem = f"labels that training lacks: {', '.join(sorted(unknown))}" if unknown else "only one label"
        raise DataError(f"{source} has {problem}")
    index = {label: i for i, label in enumerate(names)}
    return TextData(
        source,
        names,
        [text for text, _ in training],
        [index[label] for _, label in training],
        [text for text, _ in validation],
        [index[label] for _, label in validation],
    )
