"""One step: its problems, what all processes know of them, their state, and the update of each kind of step."""

from psilora.steps import gradient, spectral
from psilora.steps.kind import StepKind

#: The kinds of step by name. Nothing else tells them apart.
STEPS: dict[str, StepKind] = {kind.options.step: kind for kind in (spectral.KIND, gradient.KIND)}
