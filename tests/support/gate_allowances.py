"""What a compiled kernel may take beyond its variant's limits, by Triton.

What is spilled, and how many registers are taken, is each compiler's own affair. So an allowance belongs to one release
and is what that release was seen to take: the gates object to more and to less. A release without figures of its own is
held to those of the newest one before it, and may spill less.
"""

from __future__ import annotations

from psilora.triton_kernels.releases import Release, release

#: By variant and compute capability.
Allowances = dict[str, dict[int, int]]

#: Bytes of stack. The Gram kernel holds six sums and their operands, `moments` three parts of a root's rows and of
#: `.grad`, in more than 255 registers.
SPILLED: dict[Release, Allowances] = {
    (3, 6): {
        "joint_apply_r32": {90: 40},
        "joint_apply_r128": {90: 8},
        "joint_apply_fp32_r128": {90: 8},
        "joint_finish_r64": {80: 64},
        "joint_finish_r128": {80: 56, 90: 88},
        "joint_finish_twofold_r128": {90: 32},
        "joint_gram_r8": {90: 104},
        "joint_gram_r32": {90: 728},
        "joint_gram_r64": {90: 712},
        "joint_gram_r128": {90: 712},
        "joint_gram_alone_r32": {90: 64},
        "joint_gram_alone_r128": {90: 336},
        "joint_gram_alone_fp32_r32": {90: 16},
        "joint_gram_alone_fp32_r128": {90: 168},
        "joint_gram_alone_fp32_narrow_r64": {80: 152},
        "joint_gram_alone_fp32_narrow_r128": {80: 224},
        "joint_gram_alone_narrow_r32": {80: 96},
        "joint_gram_alone_narrow_r64": {80: 208},
        "joint_gram_alone_narrow_r128": {80: 368},
        "joint_gram_fp32_r8": {90: 32},
        "joint_gram_fp32_r32": {90: 224},
        "joint_gram_fp32_r64": {90: 224},
        "joint_gram_fp32_r128": {90: 224},
        "joint_gram_fp32_narrow_r8": {80: 24},
        "joint_gram_fp32_narrow_r16": {80: 152, 86: 152, 89: 152, 120: 176},
        "joint_gram_fp32_narrow_r32": {80: 240},
        "joint_gram_fp32_narrow_r64": {80: 240},
        "joint_gram_fp32_narrow_r128": {80: 240},
        "joint_gram_narrow_r8": {80: 136},
        "joint_gram_narrow_r16": {80: 208, 86: 208, 89: 208, 120: 240},
        "joint_gram_narrow_r32": {80: 728},
        "joint_gram_narrow_r64": {80: 752},
        "joint_gram_narrow_r128": {80: 752},
        "joint_moments_r64": {90: 48},
        "joint_moments_r128": {90: 48},
        "joint_moments_fp32_r64": {80: 8},
        "joint_moments_fp32_r128": {80: 24, 90: 32},
        "joint_tangent_r64": {80: 40},
        "joint_tangent_r128": {80: 16},
        "joint_apply_fp32_r64": {80: 8},
        "joint_gram_r16": {90: 24},
    },
    (3, 9): {
        "joint_apply_r8": {90: 8},
        "joint_apply_r32": {90: 40},
        "joint_apply_fp32_r16": {80: 8, 90: 8, 100: 8},
        "joint_apply_r64": {80: 8, 90: 16},
        "joint_apply_fp32_r64": {80: 8},
        "joint_apply_r128": {90: 32},
        "joint_apply_fp32_r128": {80: 8, 90: 48},
        "joint_finish_r32": {90: 24},
        "joint_finish_r64": {80: 16},
        "joint_finish_r128": {80: 24, 90: 56},
        "joint_finish_twofold_r32": {90: 16},
        "joint_finish_twofold_r128": {90: 152},
        "joint_gram_r8": {90: 88},
        "joint_gram_r32": {90: 768},
        "joint_gram_r64": {90: 744},
        "joint_gram_r128": {90: 744},
        "joint_gram_alone_r32": {90: 72},
        "joint_gram_alone_r128": {90: 488},
        "joint_gram_alone_fp32_r32": {90: 8},
        "joint_gram_alone_fp32_r128": {90: 184},
        "joint_gram_alone_fp32_narrow_r32": {80: 8},
        "joint_gram_alone_fp32_narrow_r64": {80: 120},
        "joint_gram_alone_fp32_narrow_r128": {80: 216},
        "joint_gram_alone_narrow_r32": {80: 112},
        "joint_gram_alone_narrow_r64": {80: 192},
        "joint_gram_alone_narrow_r128": {80: 408},
        "joint_gram_fp32_r8": {90: 48},
        "joint_gram_fp32_r32": {90: 248},
        "joint_gram_fp32_r64": {90: 248},
        "joint_gram_fp32_r128": {90: 248},
        "joint_gram_fp32_narrow_r8": {80: 16},
        "joint_gram_fp32_narrow_r16": {80: 144, 86: 144, 89: 144, 120: 264},
        "joint_gram_fp32_narrow_r32": {80: 240},
        "joint_gram_fp32_narrow_r64": {80: 240},
        "joint_gram_fp32_narrow_r128": {80: 240},
        "joint_gram_narrow_r8": {80: 120},
        "joint_gram_narrow_r16": {80: 168, 86: 168, 89: 168, 120: 288},
        "joint_gram_narrow_r32": {80: 624},
        "joint_gram_narrow_r64": {80: 672},
        "joint_gram_narrow_r128": {80: 672},
        "joint_moments_r64": {80: 56, 90: 56},
        "joint_moments_r128": {80: 56, 90: 80},
        "joint_moments_fp32_r128": {90: 48},
        "joint_tangent_r64": {80: 56},
        "joint_tangent_r128": {80: 40, 90: 8},
        "solve_b_tangent_r16": {90: 8, 100: 8},
        "spread_r16": {90: 24, 100: 64},
        "spread_single_r16": {90: 8, 100: 8},
    },
}

#: Registers above the budget: two programs share a multiprocessor, not three. A bound of 168 would spill 88 and 40
#: bytes; eight warps would take 79 and 106, but read more of shared memory for each product.
REGISTERS: dict[Release, Allowances] = {
    (3, 9): {"stz_float32_r64_ampere": {80: 205}, "xv_float32_r64_order1_ampere": {80: 200}},
}


def allowed(table: dict[Release, Allowances], version: str, name: str, target: int) -> int:
    """Return what a table allows a variant when this version of Triton compiles it for a target, or 0."""
    known = [found for found in table if found <= release(version)]
    return table[max(known)].get(name, {}).get(target, 0) if known else 0


def measured(version: str) -> bool:
    """Whether the figures are this very release's."""
    return release(version) in SPILLED
