"""Checkpoints of a training loop that survive a kill at any moment: written aside, flushed to disk, then renamed.

A checkpoint is one file, `step-00000012.pt`, with the trainable parameters, the state of whatever else is given
(optimizer, scheduler, GradScaler, …), the random number generators and the step. It holds tensors, numbers and strings
only and loads with weights_only=True. While it is written it is called `….incomplete`.
"""

from __future__ import annotations

import contextlib
import copy
import operator
import os
import pickle
import random
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

FORMAT = 1
_SUFFIX = ".incomplete"


class Stateful(Protocol):
    """An optimizer, scheduler, scaler or anything else that can tell and take its state."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return the state."""
        ...

    def load_state_dict(self, state_dict: Any) -> Any:
        """Take the state."""
        ...


class IncompleteCheckpointError(RuntimeError):
    """A file that is cut off or damaged."""


def save_checkpoint(folder: str | Path, step: int, model: nn.Module, *, keep: int = 2, **parts: Stateful) -> Path:
    """Save atomically and return the file; then delete all checkpoints but the last `keep` up to this step.

    At every moment the folder holds the previous checkpoint or the new one, whole. Of several processes, let one save.
    Checkpoints of a higher step belong to a run that was rolled back to an earlier one: they are deleted as well, so
    that the highest step is always the one that was saved last. Files with names of another form are left alone.

    Args:
        folder: Created if it is missing.
        step: Number of completed optimizer steps, an integer of Python, numpy or torch.
        model: Its trainable parameters are saved: adapters, heads. The frozen base is not.
        keep: At least 1.
        parts: What else has a state, e.g. optimizer=…, scheduler=…, scaler=….

    Raises:
        ValueError: `step` or `keep` is no integer or out of range, or a state holds what could not be loaded again;
            says what.
    """
    step, keep = _integer("step", step, 0), _integer("keep", keep, 1)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _name(step)
    for leftover in folder.glob(f"*{_SUFFIX}"):  # of saves that were killed
        if _step(leftover.with_suffix("")) is not None:
            leftover.unlink()
    content = {
        "format": FORMAT,
        "step": step,
        "model": {name: p.detach() for name, p in model.named_parameters() if p.requires_grad},
        "parts": {name: _plain(part.state_dict()) for name, part in parts.items()},
        "generators": generators(),
    }
    aside = path.with_name(path.name + _SUFFIX)
    with aside.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    _refuse_unloadable(aside)
    os.replace(aside, path)
    _flush_folder(folder)
    steps = sorted(_checkpoints(folder))
    kept = [saved for saved in steps if saved <= step][-keep:]
    for saved in steps:
        if saved not in kept:
            (folder / _name(saved)).unlink()
    return path


def latest_checkpoint(folder: str | Path) -> Path | None:
    """Return the checkpoint of the highest step in `folder`, or None; files that are cut off are passed over."""
    found = _checkpoints(Path(folder))
    return next((found[step] for step in sorted(found, reverse=True) if zipfile.is_zipfile(found[step])), None)


def load_checkpoint(path: str | Path | None, model: nn.Module, **parts: Stateful) -> int:
    """Load what `save_checkpoint` saved, the random number generators included, and return the step.

    The file is read and names and shapes are compared before anything is changed. Where a part then refuses its state,
    it, the parts before it, the parameters and the generators get back what they had.

    Args:
        path: The file; tensors go to the devices of the model's parameters.
        model: With the same trainable parameters as when it was saved.
        parts: The same names as when it was saved.

    Raises:
        FileNotFoundError: There is no such file, or `latest_checkpoint` found none (None).
        IsADirectoryError: It is a folder.
        IncompleteCheckpointError: The file is cut off or damaged.
        ValueError: Names, shapes or the format do not match, or it holds other objects; says which.
    """
    if path is None:
        raise FileNotFoundError(
            "load_checkpoint got None, which latest_checkpoint returns where there is no checkpoint: begin at step 0, "
            "as in `step = load_checkpoint(path, model, …) if path else 0`"
        )
    content = _read(Path(path))
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    _same_names("trainable parameters", trainable, content["model"])
    _same_names("parts", parts, content["parts"])
    for name, parameter in trainable.items():
        saved = content["model"][name]
        if saved.shape != parameter.shape:
            raise ValueError(f"{name} has shape {tuple(parameter.shape)}, but {tuple(saved.shape)} was saved")
    with contextlib.ExitStack() as undo:  # runs all of it, also where some of it fails
        undo.callback(_fill, trainable, _copied(trainable))
        undo.callback(set_generators, generators())
        for name, part in parts.items():
            undo.callback(_restore, part, _copied(part.state_dict()))
            part.load_state_dict(content["parts"][name])
        _fill(trainable, content["model"])
        set_generators(content["generators"])
        undo.pop_all()
    return int(content["step"])


def _fill(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])


def _restore(part: Stateful, state: Mapping[str, Any]) -> None:
    """Load a state, unless it is there: loading may put other tensors in the place of those that others hold."""
    if not _equal(_copied(part.state_dict()), state):
        part.load_state_dict(state)


def _equal(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(value, b[key]) for key, value in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a is b or bool(a == b)


def _copied(state: Any) -> Any:
    """A state that nothing changes any more; on the CPU, like one that was saved."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        found = copy.copy(state)
        for key, value in state.items():
            found[key] = _copied(value)
        return found
    return type(state)(map(_copied, state)) if type(state) in (list, tuple) else state


def _integer(name: str, value: Any, least: int) -> int:
    """The integer that a number of Python, numpy or torch is; ValueError for what is none, or is too small."""
    try:
        found = operator.index(value)
    except TypeError:
        found = least - 1
    if isinstance(value, bool) or found < least:
        raise ValueError(f"Invalid {name}={value!r}. Must be an integer >= {least}.")
    return found


def _name(step: int) -> str:
    return f"step-{step:08d}.pt"


def _step(path: Path) -> int | None:
    """The step in the name of a checkpoint, or None for any other file."""
    digits = path.name.removeprefix("step-").removesuffix(".pt")
    return int(digits) if digits.isdecimal() and path.name == _name(int(digits)) else None


def _checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints by step, without those still aside."""
    found = {_step(path): path for path in folder.glob("step-*.pt")}
    return {step: path for step, path in found.items() if step is not None}


def _read(path: Path) -> dict[str, Any]:
    path.stat()  # a missing file is not a damaged one
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; pass one of its files, such as latest_checkpoint({str(path)!r})")
    if not zipfile.is_zipfile(path):  # its table of contents comes last
        raise IncompleteCheckpointError(f"{path} is cut off: it has no table of contents")
    try:
        with zipfile.ZipFile(path) as archive:  # torch itself does not compare the checksums of tensors
            if (record := archive.testzip()) is not None:
                raise IncompleteCheckpointError(f"{path} is damaged: the checksum of {record} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (EOFError, zipfile.BadZipFile) as error:
        raise IncompleteCheckpointError(f"{path} is damaged: {error}") from error
    except pickle.UnpicklingError as error:  # what it says has the right checksum
        raise ValueError(f"{path} is whole, but torch does not load it with weights_only=True: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of format {FORMAT}")
    return content


def _plain(value: Any) -> Any:
    """The same with numpy's numbers as Python's: a rate computed with numpy is one, and would not load again."""
    numpy = _numpy()
    if numpy is not None and isinstance(value, numpy.generic):
        return value.item()
    if type(value) in (list, tuple):
        return type(value)(_plain(item) for item in value)
    if type(value) in (dict, OrderedDict):
        return type(value)((key, _plain(item)) for key, item in value.items())
    return value


def _refuse_unloadable(path: Path) -> None:
    """Raise ValueError, and delete the file, if it holds what does not load with weights_only=True."""
    unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    if unsafe:
        path.unlink()
        raise ValueError(
            f"a state holds other things than tensors, numbers and strings ({', '.join(sorted(unsafe))}), which do not "
            "load with weights_only=True; nothing was saved"
        )


def _same_names(what: str, ours: Mapping[str, object], saved: Mapping[str, object]) -> None:
    missing, extra = sorted(set(saved) - set(ours)), sorted(set(ours) - set(saved))
    if missing or extra:
        raise ValueError(f"the {what} differ: only in the checkpoint {missing}, only here {extra}")


def _flush_folder(folder: Path) -> None:
    """Make the renaming itself survive a power cut, where folders can be flushed."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def generators() -> dict[str, Any]:
    """Return the states of the random number generators of torch, Python and numpy."""
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    numpy = _numpy()
    if numpy is not None:
        kind, keys, *rest = numpy.random.get_state()
        states["numpy"] = [kind, torch.from_numpy(keys.astype("int64")), *rest]
    return states


def set_generators(states: Mapping[str, Any]) -> None:
    """Set the generators to what `generators` returned."""
    torch.set_rng_state(states["torch"])
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
    numpy = _numpy()
    if "numpy" in states and numpy is not None:
        kind, numpy_keys, *rest = states["numpy"]
        found: Tensor = numpy_keys
        numpy.random.set_state((kind, found.numpy().astype("uint32"), *rest))


def _numpy() -> Any:
    """numpy, where torch itself could import it."""
    try:
        import numpy
    except ImportError:
        return None
    return numpy
