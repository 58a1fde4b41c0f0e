"""Experiments: PSILoRA beside its rivals under one written protocol (PROTOCOL.md); `python -m experiments --help`."""
