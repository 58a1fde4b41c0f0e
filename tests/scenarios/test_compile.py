"""torch.compile: capturing breaks no graph, and a graph compiled too early is noticed."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from captures import scales_and_residuals
from models import data, factors, mse, peft_mlp, plain_mlp, train
from tiny import adapted, tokens
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from psilora import PSILoRA

pytestmark = [
    # torch.compile's own tracer looks at .grad of its graph inputs, which torch itself warns about
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning"),
]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def residuals(optimizer: PSILoRA) -> list[float]:
    """‖dB − S_Bᵀ(XAᵀ)‖ / ‖dB‖ of every pair."""
    return [error for _, error in scales_and_residuals(optimizer, scaled=False).values()]


def opaque_hooks(model: nn.Module) -> None:
    """The naive capture: an autograd node linked to another by a Python object, out of the tracer's sight."""
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.lora_A.register_forward_pre_hook(
                torch.compiler.disable(lambda _m, args: (args[0].view_as(args[0]),))
            )


@pytest.mark.scenario(
    12, "torch.compile", gradient="exact", tested="fullgraph=True, changing batch sizes, equals eager"
)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_full_graph_captures_and_trains_as_eager_does(backend: str) -> None:
    naive = plain_mlp()
    opaque_hooks(naive)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(naive, backend=backend, fullgraph=True)(data()[0])
    torch._dynamo.reset()

    eager, traced = peft_mlp(), peft_mlp()
    traced.load_state_dict(eager.state_dict())
    ours, theirs = (PSILoRA(m, 0.1, step="gradient", metric="kfac") for m in (traced, eager))
    compiled = torch.compile(traced, backend=backend, fullgraph=True)
    for rows in (32, 32, 7):
        batch = data(rows)
        ours.zero_grad()
        (mse(compiled, batch) + mse(compiled, batch)).backward()
        assert max(residuals(ours)) < 1e-12
        assert all(record.calls == 2 and record.rows == 2 * rows for record in ours.captured())
        ours.step()
        theirs.zero_grad()
        (2 * mse(eager, batch)).backward()
        theirs.step()
    a, b = factors(eager), factors(traced)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-12)


@pytest.mark.scenario(
    12, "torch.compile", gradient="exact", tested="Inductor, whose buffers are reused: copies are kept"
)
@pytest.mark.skipif(shutil.which("c++") is None, reason="Inductor needs a C++ compiler on the CPU")
def test_inductor_captures_what_its_buffers_held() -> None:
    model = plain_mlp((24, 16, 16, 6), dtype=torch.float32)
    optimizer = PSILoRA(model, 0.1, step="gradient")
    compiled = torch.compile(model, fullgraph=True)
    mse(compiled, data(dtype=torch.float32)).backward()
    junk = [torch.randn(32, 16) for _ in range(64)]  # would land in memory that had been given back
    assert len(junk) == 64 and max(residuals(optimizer)) < 1e-5
    optimizer.step()


@pytest.mark.scenario(12, "torch.compile", gradient="exact", tested="a PEFT language model: no graph break is ours")
def test_no_graph_break_is_ours_in_a_language_model() -> None:
    model = adapted(lora_dropout=0.1).train()
    batch = tokens()
    bare = torch._dynamo.explain(model)(**batch)
    optimizer = PSILoRA(model, 0.1, step="gradient")
    torch._dynamo.reset()
    hooked = torch._dynamo.explain(model)(**batch)
    assert hooked.graph_break_count == bare.graph_break_count
    torch._dynamo.reset()
    torch.compile(model, backend="aot_eager")(**batch).loss.backward()
    assert max(residuals(optimizer)) < 1e-4


@pytest.mark.scenario(12, "torch.compile", gradient="exact", tested="checkpointed regions inside a full graph: X once")
def test_a_checkpointed_region_inside_a_full_graph() -> None:
    """The trap: a region that is recomputed may change nothing outside it, so hooks cannot keep X on their objects."""
    model = plain_mlp()
    held: dict[str, Tensor] = {}
    naive = model.l1.lora_A.register_forward_pre_hook(lambda _m, args: held.update(x=args[0]))

    def region(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=False)

    with pytest.raises(torch._dynamo.exc.Unsupported, match="side effect"):
        torch.compile(region, backend="aot_eager", fullgraph=True)(data()[0])
    naive.remove()
    torch._dynamo.reset()
    optimizer = PSILoRA(model, 0.1, step="gradient")
    x, y = data()
    (torch.compile(region, backend="aot_eager", fullgraph=True)(x) - y).square().mean().backward()
    assert max(residuals(optimizer)) < 1e-12
    assert all(record.calls == 1 for record in optimizer.captured())


@pytest.mark.scenario(
    12, "torch.compile", gradient="exact", tested="optimizer built after the first compiled call: compiled again"
)
def test_an_optimizer_built_after_the_first_compiled_call_captures() -> None:
    """The trap: Dynamo does not look at hooks again, so nothing would be captured, and nothing said."""
    model, other = plain_mlp(), plain_mlp()
    other.load_state_dict(model.state_dict())
    compiled = torch.compile(model, backend="eager")
    batch = data()
    mse(compiled, batch)
    seen: list[Tensor] = []
    model.l1.lora_A.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    mse(compiled, batch)
    assert not seen, "the naive hook is silently ignored"

    late = PSILoRA(model, 0.1, step="gradient")
    late.zero_grad()
    mse(compiled, batch).backward()
    assert max(residuals(late)) < 1e-12
    late.step()
    train(other, PSILoRA(other, 0.1, step="gradient"), [batch])
    a, b = factors(model), factors(other)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-12)


class InPlace(nn.Module):
    """A layer that goes on in place with what lora_B gives, a view where there is a bias and a sequence dimension."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.base, self.scaling = nn.Linear(6, 6).requires_grad_(False), 2.0
        self.lora_A, self.lora_B = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.lora_B(self.lora_A(x))
        h *= self.scaling
        return h.add_(self.base(x))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(("shape", "bias"), [((5, 6), False), ((2, 3, 6), True), ((6,), False)], ids=str)
def test_a_full_graph_may_change_the_output_in_place_and_take_a_vector(
    shape: tuple[int, ...], bias: bool, backend: str
) -> None:
    plain = nn.Sequential(InPlace(bias)).double()
    model = copy.deepcopy(plain)
    optimizer = PSILoRA(model, 0.1, step="gradient")
    x = torch.randn(shape).double()
    for m in (plain, torch.compile(model, backend=backend, fullgraph=True)):
        m(x).square().mean().backward()
    assert max(residuals(optimizer)) < 1e-12
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_graph_without_hooks_does_not_serve_a_model_of_the_same_code_that_has_them() -> None:
    """The trap: Dynamo keeps graphs by code object, so the second model would run the first one's."""
    plain, model, batch = plain_mlp(), plain_mlp(), data()
    PSILoRA(plain, 0.05)
    mse(torch.compile(plain, backend="eager"), batch).backward()
    optimizer = PSILoRA(model, 0.05, step="gradient", metric="kfac")
    compiled = torch.compile(model, backend="eager")
    mse(compiled, batch).backward()
    assert max(residuals(optimizer)) < 1e-12
    optimizer.step()


def test_a_compiled_graph_serves_the_optimizer_of_the_day() -> None:
    model, batch = plain_mlp(), data()
    first = PSILoRA(model, 0.1, step="gradient")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    mse(compiled, batch).backward()
    second = PSILoRA(model, 0.1, step="gradient")
    second.zero_grad()
    mse(compiled, batch).backward()
    assert max(residuals(second)) < 1e-12
    assert first.capture_bytes() == 0
    second.step()
    second.detach()
    second.zero_grad()
    mse(compiled, batch).backward()
    assert second.capture_bytes() == 0
    with pytest.warns(UserWarning, match="or the optimizer was detached"):
        second.step()


def test_equal_blocks_compiled_one_by_one_share_their_graphs() -> None:
    """The trap: a number that differs from block to block makes Dynamo compile each block again, up to its limit."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    model = nn.Sequential(*(plain_mlp((12, 12, 12, 12)) for _ in range(10)))
    optimizer = PSILoRA(model, 0.1, step="gradient")
    for block in model:
        block.compile(backend=backend, fullgraph=True)
    model(torch.randn(9, 12, dtype=torch.float64)).square().mean().backward()
    assert max(residuals(optimizer)) < 1e-12
    assert len(graphs) == 2  # the first block's input needs no gradient


def test_the_operator_is_well_formed() -> None:
    arguments = (torch.randn(5, 3), torch.randn(5, 4), torch.tensor(10**6), False)
    torch.library.opcheck(torch.ops.psilora.capture, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
@pytest.mark.parametrize("kind", [{}, {"step": "gradient"}], ids=str)
def test_a_compiled_step_is_the_plain_one(kind: dict[str, str]) -> None:
    """The trap: an attribute that the first step creates is lost where the tracer breaks the step in two."""
    model, other = plain_mlp(), plain_mlp()
    other.load_state_dict(model.state_dict())
    ours, theirs = PSILoRA(model, 0.1, **kind), PSILoRA(other, 0.1, **kind)
    step = torch.compile(ours.step, backend="eager")
    for batch in (data(), data()):
        for m, optimizer, take in ((model, ours, step), (other, theirs, theirs.step)):
            optimizer.zero_grad()
            mse(m, batch).backward()
            take()
    a, b = factors(model), factors(other)
    assert all(torch.equal(a[name], b[name]) for name in a)
