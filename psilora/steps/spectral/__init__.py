"""The spectral step: LoRSum of the weight and a polar factor of the momentum."""
