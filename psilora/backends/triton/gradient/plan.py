"""Which launches a step takes on all layers at once: buckets, turns and tiles as pure data, from shapes alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from psilora.backends.triton.launch import BLOCK_COLUMNS, PADDED_RANKS, Parts, Tiles, tile_map
from psilora.lowrank.lorsum import turns
from psilora.triton_kernels import slots
from psilora.triton_kernels.tables import ALIGNMENT, launch_key

#: How kernels number the sides.
SIDES = {"A": 0, "B": 1}

# Kinds of Grams as bits of a mask.
WEIGHTED, WEIGHTED_STEP, CROSS, OWN, OWN_STEP, START, SLOPE, OWN_START, OWN_SLOPE = (
    1 << slot
    for slot in (
        slots.WEIGHTED,
        slots.WEIGHTED_STEP,
        slots.CROSS,
        slots.OWN,
        slots.OWN_STEP,
        slots.START,
        slots.SLOPE,
        slots.OWN_START,
        slots.OWN_SLOPE,
    )
)
#: Kinds that the commit can leave for the next step: they need neither its gradient nor its metric.
LASTING = WEIGHTED | CROSS | OWN | START | OWN_START

# Where a turn's product with the gradient comes from.
NONE, KNOWN, PRODUCT, TANGENT = slots.NONE, slots.KNOWN, slots.PRODUCT, slots.TANGENT


@functools.lru_cache(maxsize=4096)
def most_rows(rows: int) -> int:
    """Return how many rows a plan has room for that is made for so many: the next power of two, or half of one more.

    Batches differ in length from step to step; steps of up to this many share one plan, in which the tiles beyond the
    rows that are there end at once.
    """
    power = 1 << max(0, rows - 1).bit_length()
    least = 3 * power // 4
    return max(1, least if rows <= least else power)


@dataclass(frozen=True)
class Structure:
    """What decides the schedule of a step. `reuse`: `.grad` is precise enough to stand for the first products."""

    num_iters: int = 1
    first: str = "A"
    momentum: bool = False
    metric: str | None = None
    corrected: bool = True
    decay: bool = False
    exact: bool = True
    reuse: bool = True
    balance: bool = True


@dataclass(frozen=True)
class Layer:
    """Shapes and dtypes of one LoRA pair; `rows` are the numbers of rows of its captured calls."""

    d_out: int
    d_in: int
    rank: int
    momentum_rank: int
    structure: Structure
    A_dtype: torch.dtype = torch.float32
    B_dtype: torch.dtype = torch.float32
    dA_dtype: torch.dtype = torch.float32
    dB_dtype: torch.dtype = torch.float32
    X_dtype: torch.dtype = torch.float32
    S_dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    rows: tuple[int, ...] = ()

    @functools.cached_property
    def padded(self) -> int | None:
        """The padded rank of its bucket, or None above the largest."""
        return next((p for p in PADDED_RANKS if p >= max(self.rank, self.momentum_rank)), None)

    @functools.cached_property
    def key(self) -> tuple[object, ...]:
        """Layers with equal keys share their launches."""
        dtypes = (self.A_dtype, self.B_dtype, self.dA_dtype, self.dB_dtype)
        return (self.padded, dtypes, self.device, self.structure)


@dataclass(frozen=True)
class Turn:
    """One solve: the weight's factor on `side` ("A" or "B"), and the momentum's unless `own_source` is NONE.

    Attributes:
        source, own_source: Where T and T_m come from.
        moved, own_moved: Whether the other factor has changed since the start of the step.
        check: Whether this turn is the first to read the side's `.grad`, and looks for non-finite entries in it.
        emit: Whether the new factor is written as rows for later products.
        grams: The kinds of Grams that the next turn needs from this one.
    """

    side: str
    source: int
    own_source: int
    moved: bool
    own_moved: bool
    check: bool
    emit: bool
    grams: int

    @property
    def beside(self) -> bool:
        """Whether one product holds both the weight's and the momentum's columns."""
        return self.source == PRODUCT and self.own_source == PRODUCT

    @property
    def product(self) -> bool:
        """Whether the turn needs xv and stz."""
        return PRODUCT in (self.source, self.own_source)


@dataclass(frozen=True)
class Schedule:
    """The turns of a step, and what they need from the stored factors of each side.

    Attributes:
        grams: Kinds of Grams of the stored (A, B).
        rows: Whether the stored (A, B) are needed as fp32 rows.
        lasting: Whether the previous commit can leave all of that, so that no gram launch is needed.
    """

    turns: tuple[Turn, ...]
    grams: tuple[int, int]
    rows: tuple[bool, bool]
    lasting: bool


@functools.lru_cache
def schedule(structure: Structure, padded: int) -> Schedule:
    """Return the schedule of a step of this structure at this padded rank."""
    s = structure
    order = list(turns(max(s.num_iters, 1), s.first))
    sources = [_sources(s, t) for t in range(len(order))]
    grams, rows = [0, 0], [False, False]
    result = []
    for t, side in enumerate(order):
        other = 1 if side == "A" else 0
        moved, own_moved = t > 0 and s.num_iters > 0, t > 0
        source, own_source = sources[t]
        if not moved:
            grams[other] |= WEIGHTED | (CROSS if s.momentum else 0)
            rows[other] |= source == PRODUCT
        if s.momentum and not own_moved:
            grams[other] |= OWN | (OWN_START | OWN_SLOPE if own_source == TANGENT else 0)
            rows[other] |= own_source == PRODUCT
        if TANGENT in (source, own_source):
            grams = [grams[0] | START | SLOPE, grams[1] | START]
        following = sources[t + 1] if t + 1 < len(order) else None
        result.append(
            Turn(
                side,
                source,
                own_source,
                moved,
                own_moved,
                check=t < 2,
                emit=following is not None and s.num_iters > 0,
                grams=_following_grams(s, following),
            )
        )
    lasting = s.metric is None and not (grams[0] | grams[1]) & ~LASTING
    return Schedule(tuple(result), (grams[0], grams[1]), (rows[0], rows[1]), lasting)


def _sources(s: Structure, t: int) -> tuple[int, int]:
    """Where the weight's and the momentum's products of turn t come from."""
    asked = PRODUCT if s.exact else TANGENT
    at_start = t == 0 or s.num_iters == 0
    return (KNOWN if at_start and s.reuse else asked), (asked if s.momentum else NONE)


def _following_grams(s: Structure, following: tuple[int, int] | None) -> int:
    """The Grams that a turn leaves for the next one, whose sources are `following`."""
    if following is None:
        return 0
    kinds = 0
    if s.num_iters > 0:
        kinds |= WEIGHTED | WEIGHTED_STEP | (CROSS if s.momentum else 0)
        kinds |= START | SLOPE if following[0] == TANGENT else 0
    if s.momentum:
        kinds |= OWN | OWN_STEP | (OWN_START | OWN_SLOPE if following[1] == TANGENT else 0)
    return kinds


@dataclass(frozen=True)
class BucketPlan:
    """Layers that share their launches.

    Attributes:
        members: Positions of its layers in the step.
        tiles: (side, layer of the bucket, first column, end column) of every program; side 0 (A) comes first.
        parts: Per side and layer, the first of its tiles and their number.
    """

    members: tuple[int, ...]
    layers: tuple[Layer, ...]
    padded: int
    schedule: Schedule
    tiles: Tiles
    parts: tuple[Parts, Parts]

    @property
    def structure(self) -> Structure:
        """The structure that its layers share."""
        return self.layers[0].structure

    @property
    def kinds(self) -> int:
        """Slots of Grams in a tile's partials."""
        return slots.EXACT_KINDS if self.structure.exact else slots.ALL_KINDS

    def programs(self, side: int) -> int:
        """Number of tiles of a side."""
        first, count = self.parts[side][-1]
        return first + count - (self.parts[side][0][0])


@dataclass(frozen=True)
class StepPlan:
    """All buckets of a step. Products are shared by all buckets, turn by turn."""

    buckets: tuple[BucketPlan, ...]

    @property
    def num_turns(self) -> int:
        """Turns of the longest schedule."""
        return max(len(bucket.schedule.turns) for bucket in self.buckets)

    def asking(self, t: int) -> list[BucketPlan]:
        """The buckets whose turn t needs a product with X and S."""
        return [b for b in self.buckets if t < len(b.schedule.turns) and b.schedule.turns[t].product]

    def launches(self, *, stale: bool = False) -> list[str]:
        """Return the launches of a step in order; `stale`: the Grams left by the last commit cannot be used."""
        names = []
        metrics = [b for b in self.buckets if b.structure.metric is not None]
        if any(b.structure.metric == "kfac" and b.structure.exact for b in metrics):
            dtypes = {x for b in metrics for layer in b.layers for x in (layer.X_dtype, layer.S_dtype)}
            names += ["squares"] * len(dtypes)
        names += ["gram" for b in self.buckets if stale or not b.schedule.lasting]
        for t in range(self.num_turns):
            names += self._product_launches(t)
            for bucket in self.buckets:
                if t < len(bucket.schedule.turns):
                    turn = bucket.schedule.turns[t]
                    names += ["factor", f"solve_{turn.side.lower()}"]
        names += [name for b in self.buckets for name in ("norms", "verdict")[not b.structure.balance :]]
        return names + ["commit"] * len(self.buckets)

    def _product_launches(self, t: int) -> list[str]:
        xv, stz = set(), set()
        for bucket in self.asking(t):
            turn = bucket.schedule.turns[t]
            for layer in bucket.layers:
                k = columns(turn, layer)
                X, S = (layer.X_dtype, layer.d_in), (layer.S_dtype, layer.d_out)
                narrow, wide = (S, X) if turn.side == "A" else (X, S)
                fast_narrow, fast_wide = (width * dtype.itemsize % ALIGNMENT == 0 for dtype, width in (narrow, wide))
                xv.add(launch_key(narrow[0], fast_narrow, narrow[1] % 4 == 0, k))
                stz.add(launch_key(wide[0], fast_wide, k % 4 == 0, k))
        return ["xv"] * len(xv) + ["stz"] * len(stz)


def columns(turn: Turn, layer: Layer) -> int:
    """Return how many columns a layer's product has in a turn."""
    weight = layer.rank if turn.source == PRODUCT else 0
    return weight + (layer.momentum_rank if turn.own_source == PRODUCT else 0)


def make_plan(layers: Sequence[Layer]) -> StepPlan:
    """Return the plan of a step on these layers, whose ranks must be within `PADDED_RANKS`."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, layer in enumerate(layers):
        groups.setdefault(layer.key, []).append(i)
    return StepPlan(tuple(_bucket(members, [layers[i] for i in members]) for members in groups.values()))


def _bucket(members: Sequence[int], layers: Sequence[Layer]) -> BucketPlan:
    padded = layers[0].padded
    if padded is None:
        raise ValueError(f"rank {layers[0].rank} is above {PADDED_RANKS[-1]}, the largest that the kernels take")
    tiles, parts = tile_map(
        [[layer.d_in for layer in layers], [layer.d_out for layer in layers]], BLOCK_COLUMNS[padded]
    )
    return BucketPlan(tuple(members), tuple(layers), padded, schedule(layers[0].structure, padded), tiles, parts)
