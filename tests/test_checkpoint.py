"""Checkpoints: atomic, recognised when cut off; a run that resumes from one is bit for bit the one never killed."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models import data, factors, mse, plain_mlp, train

from psilora import PSILoRA
from psilora.checkpoint import IncompleteCheckpointError, latest_checkpoint, load_checkpoint, save_checkpoint

KILLS = 20


class Server:
    """Starts training runs in forks of a process that has imported everything; see crash_server.py."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, str(Path(__file__).with_name("support") / "crash_server.py"), str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def run(self, folder: Path, kill_after: float | None = None) -> int:
        """Train in `folder`, killing −9 after so many seconds; return the exit status as of waitpid."""
        assert self.process.stdin is not None
        print(folder, file=self.process.stdin, flush=True)
        child = int(self._line())
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(child, signal.SIGKILL)
        print("wait", file=self.process.stdin, flush=True)
        return int(self._line())

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        self.process.wait(10)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("warm"))
    yield started
    started.close()


def whole(path: Path) -> bool:
    try:
        torch.load(path, weights_only=True)
    except Exception:
        return False
    return True


@pytest.mark.slow
@pytest.mark.scenario(
    5, "PyTorch loop", gradient="exact", tested="kill −9 at 20 random moments: resumed runs are bit-exact"
)
def test_killed_at_random_moments(server: Server, tmp_path: Path) -> None:
    start = time.monotonic()
    assert server.run(tmp_path / "whole") == 0
    duration = time.monotonic() - start
    expected = torch.load(tmp_path / "whole" / "end.pt")
    moments = random.Random(0)
    killed = 0
    for trial in range(KILLS):
        folder = tmp_path / f"killed-{trial}"
        folder.mkdir()
        if server.run(folder, kill_after=moments.uniform(0, duration)) == signal.SIGKILL:
            killed += 1
        else:  # the first run was slower, on a machine that was busier
            duration *= 0.8
        for path in folder.iterdir():
            assert path.suffix == ".incomplete" or whole(path) or path.name == "end.pt"
        newest = latest_checkpoint(folder)
        assert newest is not None or not list(folder.glob("step-*.pt"))
        (folder / "end.pt").unlink(missing_ok=True)
        assert server.run(folder) == 0
        resumed = torch.load(folder / "end.pt")
        assert all(torch.equal(a, b) for a, b in zip(expected, resumed, strict=True))
    assert killed >= KILLS // 2, f"only {killed} of {KILLS} runs were killed before they ended"


def one_step(**options: object) -> tuple[torch.nn.Module, PSILoRA]:
    model = plain_mlp()
    optimizer = PSILoRA(model, 0.1, step="gradient", metric="kfac", **options)
    train(model, optimizer, [data()])
    return model, optimizer


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_an_interrupted_save_leaves_the_one_before(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trap: a save that writes to its final name destroys the checkpoint that it replaces."""
    model, optimizer = one_step()
    first = save_checkpoint(tmp_path, 1, model, optimizer=optimizer)
    told = first.read_bytes()
    saved = factors(model)
    train(model, optimizer, [data()])

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    real = torch.save

    def half(content: object, file: object) -> None:
        real(content, file)
        os.truncate(file.fileno(), file.tell() // 2)
        fail()

    with monkeypatch.context() as patch:
        if where == "write":
            patch.setattr(torch, "save", half)
        else:
            patch.setattr(os, where, fail)
        with pytest.raises(OSError, match="no space left"):
            save_checkpoint(tmp_path, 2, model, optimizer=optimizer)
        naive = tmp_path / "naive.pt"
        naive.write_bytes(told)
        if where == "write":
            with naive.open("wb") as file, pytest.raises(OSError, match="no space left"):
                torch.save({"format": 1}, file)
            with pytest.raises(IncompleteCheckpointError, match=r"naive.pt is cut off"):
                load_checkpoint(naive, model, optimizer=optimizer)
    assert latest_checkpoint(tmp_path) == first and first.read_bytes() == told
    assert load_checkpoint(first, model, optimizer=optimizer) == 1
    assert all(torch.equal(saved[name], value) for name, value in factors(model).items())
    assert save_checkpoint(tmp_path, 2, model, optimizer=optimizer) == latest_checkpoint(tmp_path)
    assert not list(tmp_path.glob("*.incomplete"))


def test_damaged_files_are_recognised_at_every_length(tmp_path: Path) -> None:
    model, optimizer = one_step()
    path = save_checkpoint(tmp_path, 3, model, optimizer=optimizer)
    content = path.read_bytes()
    before = factors(model)
    for length in range(0, len(content), max(1, len(content) // 40)):
        path.write_bytes(content[:length])
        assert latest_checkpoint(tmp_path) is None
        with pytest.raises(IncompleteCheckpointError):
            load_checkpoint(path, model, optimizer=optimizer)
    assert all(torch.equal(before[name], value) for name, value in factors(model).items())
    damaged = bytearray(content)
    damaged[content.index(model.l1.lora_A.weight.detach().numpy().tobytes()) + 100] ^= 0x40
    path.write_bytes(damaged)
    with pytest.raises(IncompleteCheckpointError, match="is damaged"):
        load_checkpoint(path, model, optimizer=optimizer)
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "none.pt", model)
    path.write_bytes(content)
    assert load_checkpoint(path, model, optimizer=optimizer) == 3


def test_old_checkpoints_go_and_bad_arguments_are_named(tmp_path: Path) -> None:
    model, optimizer = one_step()
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, step, model, optimizer=optimizer)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000002.pt", "step-00000010.pt"]
    for bad in (0, 1.5, True, "2", None):
        with pytest.raises(ValueError, match=rf"Invalid keep={bad!r}. Must be an integer >= 1."):
            save_checkpoint(tmp_path, 11, model, keep=bad)  # type: ignore[arg-type]
    for bad in (-1, 5.0, False, "5", torch.tensor(5.0)):
        with pytest.raises(ValueError, match=rf"Invalid step={re.escape(repr(bad))}. Must be an integer >= 0."):
            save_checkpoint(tmp_path, bad, model)  # type: ignore[arg-type]
    assert names(tmp_path) == ["step-00000002.pt", "step-00000010.pt"]
    with pytest.raises(IsADirectoryError, match=r"is a folder; pass one of its files, such as latest_checkpoint\("):
        load_checkpoint(tmp_path, model)
    path = latest_checkpoint(tmp_path)
    assert path is not None
    with pytest.raises(
        ValueError, match=r"parts differ: only in the checkpoint \['optimizer'\], only here \['scaler'\]"
    ):
        load_checkpoint(path, model, scaler=optimizer)
    other = plain_mlp(rank=3)
    with pytest.raises(ValueError, match=r"l1.lora_A.weight has shape \(3, 24\), but \(4, 24\) was saved"):
        load_checkpoint(path, other, optimizer=optimizer)
    torch.save({"weights": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="is not a checkpoint of format 1"):
        load_checkpoint(tmp_path / "other.pt", model, optimizer=optimizer)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("keep", [1, 2])
def test_a_save_after_a_roll_back_stays_and_the_run_left_behind_goes(keep: int, tmp_path: Path) -> None:
    """The trap: sorted by step, the file just written is the oldest, and what is newest belongs to another run."""
    model, optimizer = one_step()
    saved = [save_checkpoint(tmp_path, step, model, optimizer=optimizer) for step in (10, 20)]
    load_checkpoint(saved[0], model, optimizer=optimizer)
    path = save_checkpoint(tmp_path, 11, model, keep=keep, optimizer=optimizer)
    assert latest_checkpoint(tmp_path) == path and load_checkpoint(path, model, optimizer=optimizer) == 11
    assert names(tmp_path) == ["step-00000010.pt", "step-00000011.pt"][-keep:]


def test_other_files_are_left_alone_and_leftovers_are_not(tmp_path: Path) -> None:
    model, optimizer = one_step()
    others = ["step-5-mine.pt", "step-7.pt", "step-best.pt", "mine.incomplete", "step-5-mine.pt.incomplete"]
    for name in [*others, "step-00000003.pt.incomplete"]:
        (tmp_path / name).write_bytes(b"")
    for step in (99_999_999, 100_000_000):  # whose names do not sort as the numbers do
        path = save_checkpoint(tmp_path, step, model, keep=1, optimizer=optimizer)
        assert names(tmp_path) == sorted([*others, path.name]) and latest_checkpoint(tmp_path) == path


def test_every_generator_is_restored(tmp_path: Path) -> None:
    import numpy

    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), random.random(), float(numpy.random.rand())

    model, optimizer = one_step()
    path = save_checkpoint(tmp_path, 1, model, optimizer=optimizer)
    first = draw()
    assert draw() != first
    load_checkpoint(path, model, optimizer=optimizer)
    assert draw() == first


def test_numbers_of_numpy_come_back_as_numbers(tmp_path: Path) -> None:
    """A rate that is computed with numpy is one of them, and torch refuses to load it."""
    import numpy

    model, optimizer = one_step()
    optimizer.param_groups[0]["lr"] = numpy.float64(0.02)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, numpy.int64(3))
    step, keep = numpy.int64(1), torch.tensor(1)
    path = save_checkpoint(tmp_path, step, model, keep=keep, optimizer=optimizer, schedule=schedule)
    assert load_checkpoint(path, model, optimizer=optimizer, schedule=schedule) == 1
    assert type(optimizer.param_groups[0]["lr"]) is float and optimizer.param_groups[0]["lr"] == 0.02
    assert type(schedule.step_size) is int and schedule.get_last_lr() == [0.02]


def test_what_could_not_be_loaded_is_not_saved_and_not_called_damaged(tmp_path: Path) -> None:
    model, optimizer = one_step()
    first = save_checkpoint(tmp_path, 1, model, optimizer=optimizer)
    optimizer.param_groups[0]["note"] = tmp_path
    with pytest.raises(ValueError, match=r"a state holds other things .*\(pathlib.*nothing was saved"):
        save_checkpoint(tmp_path, 2, model, optimizer=optimizer)
    assert names(tmp_path) == [first.name]
    torch.save({"format": 1, "note": tmp_path}, first)
    with pytest.raises(ValueError, match="is whole, but torch does not load it"):
        load_checkpoint(first, model, optimizer=optimizer)


class Refusing:
    """A part whose state is loaded in halves: a number, and then it may fail."""

    def __init__(self) -> None:
        self.fails, self.number = False, torch.zeros(1)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.number.copy_(state["number"])
        if self.fails and float(self.number):
            raise KeyError("scale")


@pytest.mark.parametrize("where", ["optimizer", "scaler"])
@pytest.mark.parametrize("begun", [False, True])
def test_a_refused_part_leaves_everything_as_it_was(where: str, begun: bool, tmp_path: Path) -> None:
    """The trap: the schedule is at the step of the checkpoint, and the optimizer at that of before."""

    def run(steps: int, **options: object) -> tuple[torch.nn.Module, dict[str, object]]:
        torch.manual_seed(steps)
        model = plain_mlp()
        optimizer = PSILoRA(model, torch.tensor(0.1), **options)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2])
        scaler = Refusing()
        for _ in range(steps):
            train(model, optimizer, [data()])
            schedule.step()
            scaler.number += 1
        return model, {"schedule": schedule, "optimizer": optimizer, "scaler": scaler}

    def told(model: torch.nn.Module, parts: dict[str, object]) -> bytes:
        folder = tmp_path / "told"
        return save_checkpoint(folder, 0, model, **parts).read_bytes()

    path = save_checkpoint(tmp_path, 3, *run(3)[:1], **run(3)[1])
    groups = [{"layers": "l1"}] if where == "optimizer" else []
    model, parts = run(2 if begun else 0, groups=groups)
    parts["scaler"].fails = where == "scaler"
    before, rate = told(model, parts), parts["optimizer"].param_groups[0]["lr"]
    with pytest.raises((ValueError, KeyError), match="scale" if where == "scaler" else "it is not the state"):
        load_checkpoint(path, model, **parts)
    assert told(model, parts) == before
    assert where == "scaler" or parts["optimizer"].param_groups[0]["lr"] is rate  # which others may hold, and set
    train(model, parts["optimizer"], [data()])
    parts["schedule"].step()
    parts["scaler"].fails = False
    if where == "scaler":
        assert load_checkpoint(path, model, **parts) == 3 and parts["schedule"].last_epoch == 3


def test_sixteen_bit_adapters_resume_bit_exactly(tmp_path: Path) -> None:
    model = plain_mlp(dtype=torch.bfloat16)
    optimizer = PSILoRA(model, 5.0, step="gradient")
    batches = [data(dtype=torch.bfloat16) for _ in range(3)]
    train(model, optimizer, batches[:1])
    path = save_checkpoint(tmp_path, 1, model, optimizer=optimizer)
    train(model, optimizer, batches[1:])
    expected = factors(model)
    load_checkpoint(path, model, optimizer=optimizer)
    train(model, optimizer, batches[1:], loss=mse)
    assert all(torch.equal(expected[name], value) for name, value in factors(model).items())


def test_no_checkpoint_yet_is_said(tmp_path: Path) -> None:
    """The first start of a loop that always resumes: `latest_checkpoint` has found nothing."""
    found = latest_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="where there is no checkpoint: begin at step 0"):
        load_checkpoint(found, plain_mlp())
