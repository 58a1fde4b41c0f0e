"""The spectral step: LoRSum of the weight and a polar factor of the momentum."""

from psilora.options import SpectralOptions
from psilora.steps.kind import StepKind
from psilora.steps.spectral.reference import spectral_updates
from psilora.steps.spectral.state import init_state

KIND = StepKind(SpectralOptions, init_state, lambda groups, scales, communicator: spectral_updates(groups, scales))
