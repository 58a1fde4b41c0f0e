"""Numbers that kernels and hosts share, once and as plain integers; `layout`, `solve` and `spectral_gram` wrap them."""

from __future__ import annotations

# Kinds of Grams, as slots of a tile's partials; a mask of kinds has bit 1 << slot. See `layout` for the formulas.
WEIGHTED = 0
WEIGHTED_STEP = 1
CROSS = 2
OWN = 3
OWN_STEP = 4
START = 5
SLOPE = 6
OWN_START = 7
OWN_SLOPE = 8
#: Slots where no turn needs a tangent gradient, and all.
EXACT_KINDS = 5
ALL_KINDS = 9

# Where a turn's product with the gradient comes from: nowhere, `.grad` itself, partial sums left by stz, P₁·L + P₂·F₁.
NONE = 0
KNOWN = 1
PRODUCT = 2
TANGENT = 3

# Columns of a spectral step's numbers (fp64, one row per layer): those that the kernels read, then the host's own.
BETA = 0
DAMPING = 1
POWER = 2
MU = 3
FRESH = 4
DECAY = 5
RIDGE = 6
FACTOR = 7
ROOT = 8
SIGN = 9
RATE = 10
CAP = 11
NUMBERS = 12
