"""What older releases of other libraries lack: tests of it are skipped, for reasons that the support table shows."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
from typing import Any

import pytest
from packaging.requirements import Requirement
from peft import LoraConfig
from transformers import Trainer


def lora_config(**settings: Any) -> LoraConfig:
    """A LoraConfig, where this PEFT knows the settings."""
    missing = sorted(settings.keys() - {field.name for field in dataclasses.fields(LoraConfig)})
    if missing:
        pytest.skip(f"this PEFT has no {', '.join(missing)}")
    return LoraConfig(**settings)


def needs_factories() -> None:
    """Skip where the Trainer is handed an optimizer alone."""
    if "optimizer_cls_and_kwargs" not in inspect.signature(Trainer.__init__).parameters:
        pytest.skip("this transformers has no optimizer_cls_and_kwargs")


def unmet(distribution: str) -> list[str]:
    """The requirements of an installed distribution that are not met here, which then cannot be imported."""
    found = []
    for line in importlib.metadata.requires(distribution) or ():
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            found.append(requirement.name)
    return found
