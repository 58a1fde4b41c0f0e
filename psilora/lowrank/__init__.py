"""The mathematics of low-rank matrices: projections, thin products of a gradient, the momentum, the spectral step."""
