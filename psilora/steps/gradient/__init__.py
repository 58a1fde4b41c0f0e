"""The gradient step: LoRSum of the weight, the gradient and the momentum."""
