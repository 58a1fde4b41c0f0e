"""The Triton backend: all layers at once, in a few launches."""
