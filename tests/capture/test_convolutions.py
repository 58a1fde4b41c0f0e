"""Convolutions under LoRA: what is captured is X and S of the linear layer on their patches."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from captures import VARIANTS, assert_exact, captured_gradients, held
from convnets import POSITIONS, ConvNet, LoRAConv, images, peft_convnet
from models import Checkpointed, bare, factors, mse, train
from torch import Tensor, nn

from psilora import doctor
from psilora.adapters import find_pairs
from psilora.adapters.convolution import convolution, unfolded
from psilora.adapters.pair import mebibytes
from psilora.backends.triton import backend as triton_backend
from psilora.capture.policy import choose

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")

PATTERNS = {"rank_pattern": {"c1": 2, "c2": 7}, "alpha_pattern": {"c3": 5}}
ALL_VARIANTS = {**VARIANTS, "patterns": PATTERNS}


# ---- what is captured ------------------------------------------------------------------------------------------------


@pytest.mark.scenario(
    9, "PEFT", gradient="exact", tested="convolutions: rsLoRA, DoRA, dropout, lora_bias, rank_pattern, alpha_pattern"
)
@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_peft_variants(variant: str) -> None:
    model = peft_convnet(**ALL_VARIANTS[variant]).train()
    optimizer = bare(model)
    mse(model, images()).backward()
    assert_exact(optimizer)
    assert [record.rows for record in optimizer.captured()] == [5 * POSITIONS] * 3


class OneLayer(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).flatten(2).mean(-1)


GEOMETRIES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "1d": (nn.Conv1d(3, 4, 4, stride=3, padding=2), (14,)),
    "1d, same": (nn.Conv1d(3, 4, 5, padding="same"), (14,)),
    "2d, valid": (nn.Conv2d(3, 4, (2, 3), padding="valid"), (6, 7)),
    "2d, same, even": (nn.Conv2d(3, 4, (2, 4), padding="same"), (6, 7)),
    "2d, stride beyond the kernel": (nn.Conv2d(3, 4, 1, stride=2), (6, 7)),
    "3d": (nn.Conv3d(3, 4, (2, 3, 1), stride=(1, 2, 1), padding=(1, 1, 0)), (4, 5, 3)),
}


@pytest.mark.scenario(9, "PEFT", gradient="exact", tested="Conv1d, Conv2d, Conv3d with any stride and padding")
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_one_to_three_dimensions(name: str, dora: bool) -> None:
    conv, size = GEOMETRIES[name]
    model = peft_convnet(OneLayer(conv), targets=["conv"], use_dora=dora)
    optimizer = bare(model)
    mse(model, images(size=size)).backward()
    assert_exact(optimizer)
    optimizer.step()


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("dilation", [1, 2])
def test_modules_of_ones_own_with_any_padding_and_dilation(mode: str, dilation: int) -> None:
    base = nn.Conv2d(3, 4, 3, padding=2, padding_mode=mode, dilation=dilation)
    model = OneLayer(LoRAConv(base, rank=2)).double()
    optimizer = bare(model)
    mse(model, images()).backward()
    assert_exact(optimizer)


def test_any_memory_format_and_no_batch_dimension() -> None:
    model = peft_convnet().to(memory_format=torch.channels_last)
    optimizer = bare(model)
    x, _ = images()
    model(x.contiguous(memory_format=torch.channels_last)).square().mean().backward()
    model(x[0]).square().mean().backward()
    assert not optimizer.pairs()[0].lora_A.is_contiguous()
    assert_exact(optimizer)


@pytest.mark.parametrize(
    ("kind", "tolerance"),  # a polar factor magnifies the rounding of small singular values
    [({"gradient": "dense"}, 1e-10), ({"step": "spectral", "metric": "lora", "controller": "slope"}, 1e-3)],
    ids=str,
)
def test_the_memory_format_of_the_model_does_not_matter(kind: dict[str, Any], tolerance: float) -> None:
    """The trap: a kernel in channels_last memory is no matrix without a copy, and what is written there is lost."""
    plain, last = peft_convnet(), peft_convnet().to(memory_format=torch.channels_last)
    kernel = last.base_model.model.c1.lora_A.default.weight
    assert kernel.detach().flatten(1).data_ptr() != kernel.data_ptr()
    before, batches = factors(plain), [images() for _ in range(4)]
    for model in (plain, last):
        train(model, bare(model, 0.3, **kind), batches)
    wanted = factors(plain)
    for name, value in factors(last).items():
        moved = (wanted[name] - before[name]).norm()
        assert moved > 1e-6 * before[name].norm()
        assert (value - wanted[name]).norm() <= tolerance * moved, name


def test_accumulation_and_several_forwards() -> None:
    model = peft_convnet()
    optimizer = bare(model)
    (mse(model, images()) + 2 * mse(model, images(2, (5, 11)))).backward()
    mse(model, images(3)).backward()
    assert_exact(optimizer)
    assert all(r.calls == 3 and r.rows == 8 * POSITIONS + 2 * 3 * 6 for r in optimizer.captured())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_of_both_kinds(use_reentrant: bool) -> None:
    seen: list[weakref.ref[Tensor]] = []
    model = peft_convnet(lora_dropout=0.2).train()
    optimizer = bare(model)
    model.base_model.model.c2.lora_A.default.register_forward_pre_hook(
        lambda _m, args: seen.append(weakref.ref(args[0]))
    )
    x, y = images()
    for _ in range(2):
        loss = mse(Checkpointed(model, use_reentrant), (x.requires_grad_(), y))
        gc.collect()
        assert seen[-1]() is None  # nothing is kept until backward runs the layers again
        loss.backward()
    assert_exact(optimizer)
    assert all(record.calls == 2 for record in optimizer.captured())


def saved_by_autograd(model: nn.Module, batch: tuple[Tensor, Tensor]) -> int:
    """Bytes kept between forward and backward, each storage once."""
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        mse(model, batch)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept.values()}
    return sum(storages.values())


def test_between_forward_and_backward_the_input_is_kept_and_not_its_patches() -> None:
    """The trap: unfolding in the forward pass keeps every input ∏k times, for all layers together."""
    model, batch = peft_convnet(), images()
    plain = saved_by_autograd(model, batch)
    optimizer = bare(model)
    assert saved_by_autograd(model, batch) == plain
    naive = [
        module.register_forward_pre_hook(
            lambda m, args: (args[0] + 0 * unfolded(args[0], convolution(m)).square().sum(),)
        )
        for module in (pair.sites[0][0] for pair in optimizer._pairs.values())
    ]
    assert saved_by_autograd(model, batch) > 2 * plain
    for handle in naive:
        handle.remove()


def test_a_process_without_rows_stands_in_with_none() -> None:
    model = peft_convnet()
    for gradient in ("exact", "dense"):
        optimizer = bare(model, gradient=gradient, metric="kfac")
        for pair in optimizer._pairs.values():
            record = optimizer._capture.record(pair)
            record.stand_in()
            assert (record.calls, record.rows) == (1, 0)
            assert torch.equal(record.held.dB(pair), torch.zeros_like(pair.B))


def test_forwards_without_gradients_or_adapters_leave_no_trace() -> None:
    model = peft_convnet().train()
    optimizer = bare(model)
    with torch.no_grad():
        model(images()[0])
    with model.disable_adapter():
        model(images()[0])
    model(images()[0])
    mse(model, images()).backward()
    assert_exact(optimizer)
    assert all(record.calls == 1 for record in optimizer.captured())


def test_16_bit_models_with_wide_adapters_keep_16_bit_patches() -> None:
    model = peft_convnet(dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    optimizer = bare(model)
    x, y = images(dtype=torch.bfloat16)
    mse(model, (x.requires_grad_(), y)).backward()
    for pair, record in held(optimizer):
        ((X, S),) = record.chunks
        assert X.dtype == torch.bfloat16 and S.dtype == torch.float32
        for found, wanted in zip(captured_gradients(pair, record), (pair.lora_A, pair.lora_B), strict=True):
            torch.testing.assert_close(found, wanted.grad.flatten(1), rtol=1e-4, atol=1e-5)
    optimizer.step()


def test_autocast() -> None:
    model = peft_convnet(dtype=torch.float32)
    optimizer = bare(model)
    x, y = images(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = mse(model, (x, y))
    loss.backward()
    for pair, record in held(optimizer):
        ((X, S),) = record.chunks
        assert X.dtype == S.dtype == torch.bfloat16
        gradients = captured_gradients(pair, record, torch.float32)
        for found, wanted in zip(gradients, (pair.lora_A, pair.lora_B), strict=True):
            size = float(found.abs().max())
            torch.testing.assert_close(found, wanted.grad.flatten(1), rtol=3e-2, atol=3e-2 * size)
    optimizer.step()


@pytest.mark.scenario(12, "torch.compile", gradient="exact", tested="convolutions in a full graph, equal to eager")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_full_graph_captures_and_trains_as_eager_does(backend: str) -> None:
    torch._dynamo.reset()
    eager, traced = peft_convnet(), peft_convnet()
    ours, theirs = (bare(model, metric="kfac") for model in (traced, eager))
    compiled = torch.compile(traced, backend=backend, fullgraph=True)
    for count in (5, 3):
        batch = images(count)
        ours.zero_grad()
        mse(compiled, batch).backward()
        assert_exact(ours)
        ours.step()
        train(eager, theirs, [batch])
    assert_equal(factors(traced), factors(eager))


# ---- what cannot be captured -----------------------------------------------------------------------------------------


@pytest.mark.scenario(9, "PEFT", gradient="refused", tested="convolutions with groups: refused by name")
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning")
def test_groups_are_refused_by_name() -> None:
    """PEFT gives each group a lora_B of its own on its share of the rank: B is block-diagonal, which no step keeps."""
    model = peft_convnet(OneLayer(nn.Conv2d(6, 4, 3, groups=2)), targets=["conv"])
    with pytest.raises(ValueError, match=r"base_model.model.conv \(its convolution has groups=2, each with a product"):
        bare(model)
    own = OneLayer(LoRAConv(nn.Conv2d(6, 4, 3), rank=2, groups=2))
    with pytest.raises(ValueError, match=r"conv \(its convolution has groups=2"):
        bare(own)


class CastingConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


def test_modules_that_share_a_kernel_but_read_in_two_ways_fall_back_by_name() -> None:
    first, second = (LoRAConv(nn.Conv2d(3, 4, 3), rank=2) for _ in range(2))
    second.lora_A, second.lora_B = first.lora_A, first.lora_B
    model = nn.ModuleList([OneLayer(first), OneLayer(second)]).double()
    optimizer = bare(model)
    (mse(model[0], images()) + mse(model[1], images(2))).backward()
    assert_exact(optimizer)
    assert [(r.calls, r.rows) for r in optimizer.captured()] == [(2, 7 * 7 * 5)]
    for lora_A, reason in (
        (nn.Conv2d(3, 2, 3, stride=2), "it shares its factors with 1.conv, which reads its input in another way"),
        (CastingConv(3, 2, 3), "its CastingConv has a forward of its own"),
    ):
        second.lora_A = lora_A
        lora_A.weight = first.lora_A.weight
        with pytest.warns(UserWarning, match=rf"0.conv \({reason}"):
            bare(model)


# ---- steps -----------------------------------------------------------------------------------------------------------


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=tolerance, atol=tolerance * 1e-1, msg=name)


def trained(settings: dict[str, Any], micro: int = 1, clip: float | None = None) -> dict[str, Tensor]:
    """The factors after three steps on images of changing number and size."""
    model = peft_convnet()
    torch.manual_seed(1)
    optimizer = bare(model, **{"lr": 0.1, **settings})
    for step in range(3):
        optimizer.zero_grad()
        for part in range(micro):
            (mse(model, images(2 + step, (9, 7 + 2 * part))) / micro).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return factors(model)


KINDS: list[dict[str, Any]] = [
    {},
    {"num_iters": 0},
    {"num_iters": 2, "first": "B", "momentum": 0.0},
    {"metric": "kfac"},
    {"metric": "shampoo", "weight_decay": 0.1, "maximize": True},
    {"metric": "kfac-dense", "damping": 1e-2},
    {"max_grad_norm": 0.05, "norm": "full"},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_dense_is_exact_also_under_accumulation_and_clipping(kind: dict[str, Any]) -> None:
    exact, dense = ({**kind, "gradient": gradient} for gradient in ("exact", "dense"))
    wanted = trained(exact, micro=2, clip=0.05)
    assert_equal(trained(dense, micro=2, clip=0.05), wanted)
    tangent = trained({**kind, "gradient": "tangent"}, micro=2, clip=0.05)
    assert max(float((tangent[name] - wanted[name]).norm()) for name in wanted) > 1e-6


@pytest.mark.parametrize("kind", [{}, {"weight_decay": 0.3}, {"max_grad_norm": 0.05}], ids=str)
def test_backward_and_auto_are_exact(kind: dict[str, Any]) -> None:
    wanted = trained({**kind, "momentum": 0.0, "gradient": "exact"}, clip=0.1)
    assert_equal(trained({**kind, "momentum": 0.0, "gradient": "backward"}, clip=0.1), wanted, 1e-8)
    for tokens in (1, 1000):
        assert_equal(trained({**kind, "momentum": 0.0, "gradient": "auto", "tokens": tokens}, clip=0.1), wanted)


@pytest.mark.parametrize("metric", ["kfac", "kfac-dense"])
@pytest.mark.parametrize("gradient", ["dense", "tangent"])
def test_the_sums_of_k_fac_need_no_rows(gradient: str, metric: str) -> None:
    model, batch = peft_convnet(), images()
    exact = bare(model, metric=metric)
    mse(model, batch).backward()
    chunks = [record.chunks[0] for record in exact.captured()]
    exact.detach()
    model.zero_grad()
    sums = bare(model, metric=metric, gradient=gradient)
    mse(model, batch).backward()
    for (X, S), record in zip(chunks, sums._capture.records.values(), strict=True):
        assert record.chunks == [] and record.rows == len(X)
        wanted = (X.T @ X, S.T @ S) if metric == "kfac-dense" else (X.square().sum(0), S.square().sum(0))
        torch.testing.assert_close((record.sum_x2, record.sum_s2), wanted, rtol=1e-12, atol=1e-14)


def test_a_change_of_grad_beyond_a_factor_is_refused_and_a_wrong_capture_too() -> None:
    model = peft_convnet()
    optimizer = bare(model)
    mse(model, images()).backward()
    pair = optimizer.pairs()[0]
    pair.lora_B.grad[0] *= 2
    with pytest.raises(RuntimeError, match=r"changed since backward by more than a common factor .*c1 with"):
        optimizer.step()
    optimizer.zero_grad()
    mse(model, images()).backward()
    ((X, _),) = optimizer.captured()[0].chunks
    X.copy_(X.unflatten(1, (3, 9)).mT.flatten(1))  # the columns in the order of channels_last memory
    with pytest.raises(RuntimeError, match=r"activations do not reproduce .grad .*c1 with"):
        optimizer.step()


class Patched(nn.Module):
    """The `ConvNet` with each convolution as a linear layer on patches that are unfolded in front of it."""

    def __init__(self, net: ConvNet) -> None:
        super().__init__()
        self.how = {}
        for name, conv in net.named_children():
            linear = nn.Linear(conv.weight[0].numel(), conv.out_channels)
            with torch.no_grad():
                linear.weight.copy_(conv.weight.flatten(1))
                linear.bias.copy_(conv.bias)
            setattr(self, name, linear)
            self.how[name] = convolution(conv)

    def forward(self, x: Tensor) -> Tensor:
        grid = (len(x), 5, 4)
        for name, how in self.how.items():
            y = getattr(self, name)(unfolded(x, how)).unflatten(0, grid).movedim(-1, 1)
            x = torch.tanh(y)
        return y.mean((-1, -2))


MORE = [{"gradient": "dense"}, {"gradient": "tangent"}, {"metric": "kfac-low-rank", "damping": 1e-2}]


@pytest.mark.parametrize("kind", [*KINDS, *MORE], ids=str)
def test_training_equals_that_of_linear_layers_on_the_patches(kind: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = ConvNet()
    theirs, ours = peft_convnet(Patched(net)), peft_convnet(net)
    own = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(own[name].reshape(parameter.shape))
    optimizers = [bare(model, 1.0, **kind) for model in (ours, theirs)]
    before, batches = factors(theirs), [images() for _ in range(6)]
    for model, optimizer in zip((ours, theirs), optimizers, strict=True):
        train(model, optimizer, batches)
    wanted = factors(theirs)
    for name, value in factors(ours).items():
        moved = (wanted[name] - before[name]).norm()
        assert moved > 1e-3 * before[name].norm()
        assert (value.flatten(1) - wanted[name]).norm() <= 1e-11 * moved, name


@pytest.mark.parametrize("gradient", ["exact", "dense"])
def test_the_same_inputs_give_bitwise_the_same_factors(gradient: str) -> None:
    first, second = (trained({"gradient": gradient, "metric": "kfac"}, micro=2) for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("kind", [{}, {"metric": "kfac", "momentum": 0.0}, {"gradient": "dense"}], ids=str)
def test_no_rate_and_no_gradient_are_bitwise_no_ops(kind: dict[str, Any]) -> None:
    model = peft_convnet(dtype=torch.float32)
    before = factors(model)
    train(model, bare(model, 0.0, **kind), [images(dtype=torch.float32)] * 2)
    optimizer = bare(model, 0.5, **kind)
    optimizer.zero_grad()
    (model(images(dtype=torch.float32)[0]) * 0.0).sum().backward()
    optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in factors(model).items())


@pytest.mark.skipif(triton_backend.unavailable_reason() is not None, reason=str(triton_backend.unavailable_reason()))
@pytest.mark.parametrize("count", [1, 3])
def test_the_kernels_take_patches_as_rows(count: int) -> None:
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        model = peft_convnet(dtype=torch.float64).to(dtype)
        optimizer = bare(model, 0.1, backend=backend, metric="kfac")
        torch.manual_seed(2)
        train(model, optimizer, [(x.to(dtype), y.to(dtype)) for x, y in (images(count), images(count))])
        results.append(factors(model))
    triton, reference, exact = results
    for name, value in exact.items():
        errors = [float((found[name] - value).norm() / value.norm()) for found in (triton, reference)]
        assert errors[0] <= 2 * errors[1] + 2e-6, name


# ---- memory ----------------------------------------------------------------------------------------------------------

D_IN, D_OUT = (3 * 9, 8 * 15, 6), (8, 6, 4)


@pytest.mark.parametrize("gradient", ["exact", "dense", "backward", "tangent"])
def test_what_is_held_until_the_step_is_what_the_estimates_say(gradient: str) -> None:
    model, rows = peft_convnet(dtype=torch.float32), 5 * POSITIONS
    optimizer = bare(model, gradient=gradient, momentum=0.0)
    mse(model, images(dtype=torch.float32)).backward()
    expected = {
        "exact": 4 * rows * (sum(D_IN) + sum(D_OUT)),
        "dense": 4 * sum(i * o for i, o in zip(D_IN, D_OUT, strict=True)),
        "backward": 4 * 2 * 4 * sum(D_OUT),
        "tangent": 0,
    }
    assert optimizer.capture_bytes() == expected[gradient]
    pairs, _ = find_pairs(model)
    if gradient in ("exact", "dense"):
        chosen = choose(pairs, 5 * POSITIONS if gradient == "dense" else 1, None)
        assert {c.gradient for c in chosen} == {gradient}
        assert sum(c.bytes for c in chosen) * (rows if gradient == "exact" else 1) == expected[gradient]


def test_auto_counts_the_rows_of_each_layer() -> None:
    """Of one batch the first convolution sees thousands of positions, the last linear layer a row per image."""

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool, self.head = nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(4), nn.Linear(8 * 16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.pool(self.conv(x)).flatten(1))

    model = peft_convnet(Classifier(), targets=["conv", "head"])
    optimizer = bare(model, gradient="auto")
    conv, head = optimizer.pairs()
    assert optimizer.gradients() == {conv.name: "dense", head.name: "exact"}  # before it knows
    train(model, optimizer, [images(2, (20, 20))])
    assert optimizer.gradients() == {conv.name: "dense", head.name: "exact"}
    reasons = [optimizer._planner.choices[pair.name].reason for pair in (conv, head)]
    assert f"X and S of {2 * 18 * 18} rows {mebibytes(2 * 18 * 18 * (27 + 8) * 8)}" in reasons[0]
    assert f"X and S of 2 rows hold {mebibytes(2 * (128 + 4) * 8)}, SᵀX {mebibytes(128 * 4 * 8)}" in reasons[1]
    small = bare(model, gradient="auto")
    train(model, small, [images(1, (4, 4))])
    assert set(small.gradients().values()) == {"exact"}


def test_the_doctor_counts_patches_and_no_shared_input() -> None:
    pairs, _ = find_pairs(peft_convnet())
    assert doctor.layers(pairs, []) == [
        "1 × c1 8×27, r = 4: captured exactly, by patches of 3×3",
        "1 × c2 6×120, r = 4: captured exactly, by patches of 3×5",
        "1 × c3 4×6, r = 4: captured exactly, by patches of 1×1",
        "together 3 pairs with 684 trainable numbers",
    ]
    lines = doctor.memory(pairs, tokens=1024, itemsize=2)
    size = mebibytes(2 * sum(D_IN) * 1024)
    assert lines[0].startswith(f"gradient='exact': X {size} (shared) to {size}")
    twice = find_pairs(peft_convnet(nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)), targets=["0", "1"]))[0]
    size = mebibytes(108 * 1024)
    assert doctor.memory(twice, tokens=1024, itemsize=2)[0].startswith(f"gradient='exact': X {size} (shared) to {size}")
