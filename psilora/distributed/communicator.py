"""Sums over the processes of a data-parallel group: flattened into one all-reduce per round, and counted.

Under data parallelism the loss is the mean of the processes' losses, so the joint batch has the rows of all of them and
each row's output gradient is S/W of the process it belongs to, W = number of processes. Every thin product of the joint
batch is then the sum over processes of the local one, and d×r numbers per layer travel instead of X and S.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import torch
from torch import Tensor, distributed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


#: A computation in progress: it yields lists of tensors to be summed over the processes, and is sent the sums.
Steps: TypeAlias = Generator[list[Tensor], list[Tensor], T]


class Communicator:
    """The all-reduces of one optimizer. With one process it does nothing and costs nothing.

    Args:
        group: The data-parallel process group; None means the default group, once it is initialised.

    Attributes:
        bytes: Payload all-reduced so far by this process: bytes of the tensors handed over, as one counts the bytes of
            a gradient that DDP all-reduces.
        rounds: Number of all-reduces so far.

    Raises:
        ValueError: `group` is something else.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        if group is not None and not (distributed.is_available() and isinstance(group, distributed.ProcessGroup)):
            raise ValueError(f"Invalid process_group={group!r}. Must be a torch.distributed.ProcessGroup or None.")
        self.group = group
        self.bytes = 0
        self.rounds = 0

    @property
    def world_size(self) -> int:
        """The number of processes W; 1 where no process group is initialised."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return 1
        return distributed.get_world_size(self.group)

    def sums(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors summed over the processes, by one all-reduce per dtype and device.

        Raises:
            RuntimeError: Another process died or never arrives; within the group's timeout.
        """
        if self.world_size == 1 or not tensors:
            return list(tensors)
        kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for i, tensor in enumerate(tensors):
            kinds.setdefault((tensor.dtype, tensor.device), []).append(i)
        results = list(tensors)
        for members in kinds.values():
            flat = torch.cat([tensors[i].reshape(-1) for i in members])
            if not flat.numel():
                continue
            distributed.all_reduce(flat, group=self.group)
            self.bytes += flat.numel() * flat.element_size()
            self.rounds += 1
            for i, part in zip(members, flat.split([tensors[i].numel() for i in members]), strict=True):
                results[i] = part.view(tensors[i].shape)
        return results


def lockstep(steps: Sequence[Steps[T]], communicator: Communicator | None = None) -> list[T]:
    """Run computations to their end, side by side: what all of them ask for in a round is summed together.

    Without a communicator, or with one process, what one asks for is handed straight back to it.
    """
    results: dict[int, T] = {}
    asked: dict[int, list[Tensor]] = {}

    def advance(i: int, answer: list[Tensor] | None) -> None:
        try:
            asked[i] = next(steps[i]) if answer is None else steps[i].send(answer)
        except StopIteration as end:
            asked.pop(i, None)
            results[i] = end.value

    for i in range(len(steps)):
        advance(i, None)
    while asked:
        requests = dict(asked)
        everything = [tensor for request in requests.values() for tensor in request]
        answers = iter(everything if communicator is None else communicator.sums(everything))
        for i, request in requests.items():
            advance(i, [next(answers) for _ in request])
    return [results[i] for i in range(len(steps))]
