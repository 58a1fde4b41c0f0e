"""What is kept of a layer's input X and output gradient S between backward and step."""

from psilora.capture.hooks import Capture
from psilora.capture.record import PROBES, Captured, Record

__all__ = ["Capture", "Captured", "PROBES", "Record"]
