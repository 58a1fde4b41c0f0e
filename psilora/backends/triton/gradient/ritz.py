"""Rayleigh–Ritz on the Triton backend: the reference's steps, whose products with X and S are launches of the kernels.

What is expensive in a step is reading X and S. The rest, small singular value decompositions and products of thin
factors, is PyTorch on all layers of a shape at once; on CUDA the decompositions wait for the device.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from psilora.distributed.communicator import lockstep
from psilora.lowrank.gradient_operator import Chunks
from psilora.steps.gradient.reference import reference_steps
from psilora.steps.problem import Problem, Scales, grouped
from psilora.steps.update import Update
from psilora.triton_kernels.stz import STZPlan
from psilora.triton_kernels.tables import ALIGNMENT, PointerTable, partial_buffers
from psilora.triton_kernels.xv import XVPlan

#: Prepared products kept per optimizer, the least recently used of which is forgotten.
KEPT_PRODUCTS = 32


@dataclass
class RitzUpdate(Update):
    """The update of layers of one shape, whose products with X and S were launches of the kernels."""


def ritz_updates(problems: Sequence[Problem], scales: Scales, products: PreparedProducts) -> list[RitzUpdate]:
    """Return the updates of problems with solver="ritz" and captured X and S, without changing anything."""
    groups = grouped(problems)
    gradient = functools.partial(KernelGradient, products=products)
    updates = lockstep([reference_steps(group, scales, gradient) for group in groups])
    return [RitzUpdate(**vars(update)) for update in updates]


class KernelGradient:
    """`psilora.lowrank.gradient_operator.ActivationGradient` by the kernels: a product is one launch over each of S, X.

    Args:
        chunks: Per layer, the captured (X_j, S_j) of shapes (N_j, d_in) and (N_j, d_out), bf16, fp16 or fp32.
        scale: c, (L,) fp32.
        products: What launches them.
    """

    def __init__(self, chunks: Sequence[Chunks], scale: Tensor, products: PreparedProducts) -> None:
        self._layers = [layer for layer, calls in enumerate(chunks) for _ in calls]
        self._x = [x for calls in chunks for x, _ in calls]
        self._s = [s for calls in chunks for _, s in calls]
        self._scale = scale[:, None, None]
        self._products = products

    def left(self, B: Tensor) -> Tensor:
        """Return BᵀG, (L, k, d_in), for B (L, d_out, k) fp32."""
        return self._products(self._s, self._x, self._layers, B.mT).mul_(self._scale)

    def right(self, A: Tensor) -> Tensor:
        """Return GAᵀ, (L, d_out, k), for A (L, k, d_in) fp32."""
        return self._products(self._x, self._s, self._layers, A).mul_(self._scale).mT


class PreparedProducts:
    """Σ_j F·N_jᵀW_j of all layers in two launches, `xv` and `stz`, whose tables are kept from step to step."""

    def __init__(self) -> None:
        self._kept: collections.OrderedDict[object, Prepared] = collections.OrderedDict()

    def __call__(self, narrow: Sequence[Tensor], wide: Sequence[Tensor], layers: Sequence[int], rows: Tensor) -> Tensor:
        """Return (L, k, d_wide) fp32.

        Args:
            narrow: N_j, (n_j, d_narrow), what is multiplied with F first.
            wide: W_j, (n_j, d_wide).
            layers: The layer of each, not decreasing.
            rows: F of every layer, (L, k, d_narrow) fp32, any strides.
        """
        device, k = rows.device, rows.shape[1]
        out = torch.empty(len(rows), k, wide[0].shape[1], device=device)
        factors = [rows[layer] for layer in layers]
        between = [p for p in partial_buffers([(x.shape[0], k) for x in narrow], device) if p is not None]
        tensors = (narrow, factors, between, wide, [h.mT for h in out])
        key = (tuple(layers), *(_layout(t) for t in (*narrow, *wide, rows)))
        product = self._kept.get(key)
        if product is None:
            product = self._kept[key] = Prepared(*tensors, layers)
        else:
            product.bind(*tensors)
        self._kept.move_to_end(key)
        while len(self._kept) > KEPT_PRODUCTS:
            self._kept.popitem(last=False)
        product.launch()
        return out


def _layout(t: Tensor) -> tuple[object, ...]:
    """What the tables of a product depend on."""
    return t.shape, t.stride(), t.dtype, t.data_ptr() % ALIGNMENT == 0


class Prepared:
    """The tables of one product."""

    def __init__(
        self,
        narrow: Sequence[Tensor],
        factors: Sequence[Tensor],
        between: Sequence[Tensor],
        wide: Sequence[Tensor],
        out: Sequence[Tensor],
        layers: Sequence[int],
    ) -> None:
        self._table = PointerTable(out[0].device)
        self._xv = XVPlan(narrow, factors, between, table=self._table)
        self._stz = STZPlan(wide, between, layers, out, table=self._table)

    def bind(
        self,
        narrow: Sequence[Tensor],
        factors: Sequence[Tensor],
        between: Sequence[Tensor],
        wide: Sequence[Tensor],
        out: Sequence[Tensor],
    ) -> None:
        """Stage the addresses of one more product."""
        self._xv.bind(narrow, factors, between)
        self._stz.bind(wide, between, out)

    def launch(self) -> None:
        """Run both kernels."""
        self._table.upload()
        self._xv.launch()
        self._stz.launch()
