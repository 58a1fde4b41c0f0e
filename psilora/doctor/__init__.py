"""`python -m psilora.doctor`: what works here, what a model would be trained with, and a numerical self-test."""

from psilora.doctor.command import backends, devices, main, tritons, versions
from psilora.doctor.self_test import Result, self_test
from psilora.doctor.survey import adapted_skeleton, automatic, layers, memory, rows_of_images

__all__ = [
    "Result",
    "adapted_skeleton",
    "automatic",
    "backends",
    "devices",
    "layers",
    "main",
    "memory",
    "rows_of_images",
    "self_test",
    "tritons",
    "versions",
]
