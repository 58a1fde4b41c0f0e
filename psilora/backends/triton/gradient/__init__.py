"""The gradient step on the Triton backend: its plan, workspaces and launches."""
