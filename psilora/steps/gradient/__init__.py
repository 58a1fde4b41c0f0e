"""The gradient step: LoRSum of the weight, the gradient and the momentum."""

from psilora.options import GradientOptions, Options
from psilora.steps.gradient.reference import gradient_updates
from psilora.steps.gradient.state import init_state
from psilora.steps.kind import StepKind


def _balances(options: Options) -> bool:
    return GradientOptions.of(options).solver == "ritz"


KIND = StepKind(GradientOptions, init_state, gradient_updates, remembers_gradient=True, balances=_balances)
