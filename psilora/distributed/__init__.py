"""Several processes: sums of thin products, and factors of which each holds a part."""

from psilora.distributed.communicator import Communicator, Steps, lockstep

__all__ = ["Communicator", "Steps", "lockstep"]
