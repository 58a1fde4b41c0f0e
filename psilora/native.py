"""The compiled operator by its public name; see `psilora.linalg.native`."""

from psilora.linalg.native import available, spd_solve, unavailable_reason

__all__ = ["available", "spd_solve", "unavailable_reason"]
