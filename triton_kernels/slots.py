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

#: When a gradient step's low-rank momentum is mended, see `psilora.lowrank.momentum`: ‖B_m‖²/‖A_m‖² above which it is
#: balanced, and the condition of A_mA_mᵀ in fp32 above which it is split anew.
IMBALANCE = 2.0**16
SPREAD = 2.0**11

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

# Columns of the addresses of a joint spectral step (int64, one row per layer), A's before B's where there are two.
J_FACTOR = 0
J_GRAD = 2
J_MOMENTUM = 4
J_METRIC = 6  # √D, fp32
J_FRESH = 8  # workspace: the root of this step's second moments (d,), fp32
J_STEPS = 10  # where increments go that are only asked for: rows (r, d), fp32
J_COUNT = 12  # the state's "step", fp32
J_NORMS = 14  # t, n̂ and n̄, fp64
J_LR = 15  # η, fp32: the caller's own device tensor, or one of this table
J_ADDRESSES = 16

# Columns of its settings (fp32, one row per layer).
S_BETA = 0
S_BETA_REST = 1  # 1 − β₂
S_DAMPING = 2
S_POWER = 3
S_MU = 4
S_MU_REST = 5  # 1 − μ
S_FRESH = 6
S_DECAY = 7
S_RIDGE = 8
S_FACTOR = 9
S_SCALING = 10
S_SIGN = 11
S_CAP = 12
S_RATE = 13
S_LOOSE = 14  # 1/√v at most
S_SETTINGS = 16

#: Ridge of the Grams of the momentum's part outside the factors' spans, relative to the mean diagonal of the whole: the
#: square of what fp32 data resolve.
RESIDUAL_RIDGE = 1e-12
#: The largest gradient norm that is counted, in units of the mean: an outlier must not slow all that follows.
LARGEST = 4.0
#: A mean gradient norm below which a layer counts as one without a gradient: 1/norm has to be a number of fp32.
LEAST_NORM = 2.0**-120
#: A mean squared entry below which a factor counts as 0, for the same reason.
LEAST_SQUARE = 2.0**-120
#: ‖√s·B‖²/‖√s·A‖², or its inverse, above which a pair is balanced, see `psilora.steps.gauge`: norms 2⁴ apart.
APART = 2.0**8
#: The largest |k| of a balance by 2ᵏ: a power of two that fp16 holds.
LARGEST_SHIFT = 14
#: ε of what a channel counts in the size of a spectral step, see `psilora.lowrank.spectral.spread`: half where its
#: gradient is a tenth of the mean in size.
COUNTING = 1e-2
