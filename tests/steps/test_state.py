"""Loading a state that does not fit: refused by name, with nothing changed."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from models import MLP, data, factors, peft_mlp, plain_mlp, train
from peft import LoraConfig, get_peft_model
from states import State, assert_equal, everything, headed, stepped
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from psilora import LoRALinear, PSILoRA
from psilora.checkpoint import save_checkpoint
from psilora.options import OPTION_NAMES
from psilora.options.base import as_group

EXACT: State = {"step": "gradient"}
TANGENT: State = {"step": "gradient", "gradient": "tangent"}
DENSE: State = {"step": "gradient", "gradient": "dense"}
SLOPE: State = {"controller": "slope"}


@pytest.mark.parametrize(
    ("saved", "loading"),
    [
        (EXACT, {}),
        ({}, EXACT),
        (TANGENT, EXACT),
        (EXACT, TANGENT),
        (DENSE, EXACT),
        ({**DENSE, "metric": "kfac"}, DENSE),
        ({**TANGENT, "metric": "kfac"}, TANGENT),
    ],
    ids=str,
)
def test_settings_that_need_other_hooks_are_refused(saved: State, loading: State) -> None:
    """The trap: the groups say "exact" and nothing is captured, so that the step takes the tangent gradient."""
    state = everything(stepped(headed(), **saved))
    optimizer = stepped(headed(), **loading)
    before = everything(optimizer)
    with pytest.raises(ValueError, match=r"l1: step=.* needs other captures than step=.*, with which the optimizer"):
        optimizer.load_state_dict(state)
    assert_equal(before, everything(optimizer))


@pytest.mark.parametrize(
    ("built", "change"),
    [
        ({}, EXACT | {"gradient": "exact", "metric": None}),
        (EXACT, {"step": "spectral", "gradient": "tangent"}),
        (TANGENT, {"gradient": "exact"}),
        (EXACT, {"gradient": "tangent"}),
        (DENSE, {"metric": "kfac"}),
    ],
    ids=str,
)
def test_groups_changed_by_hand_to_need_other_hooks_are_refused(built: State, change: State) -> None:
    model = headed()
    optimizer = stepped(model, **built)
    optimizer.param_groups[0].update(as_group(change))
    before = factors(model)
    with pytest.raises(ValueError, match="needs other captures"):
        train(model, optimizer, [data()])
    assert all(torch.equal(before[name], value) for name, value in factors(model).items())


def test_what_the_hooks_serve_may_be_loaded() -> None:
    """Rows of X and S serve every metric."""
    source = headed()
    state = everything(stepped(source, step="gradient", metric="kfac"))
    model = headed()
    model.load_state_dict(source.state_dict())
    optimizer = PSILoRA(model, 0.05, step="gradient")
    optimizer.load_state_dict(state)
    assert_equal(state, everything(optimizer))
    train(model, optimizer, [data()])


@pytest.mark.parametrize("kind", [{}, {"step": "gradient", "metric": "kfac"}, {"controller": "slope"}], ids=str)
def test_options_that_a_state_lacks_stay_as_they_are(kind: State) -> None:
    model = headed()
    state = everything(stepped(model, **kind))
    for names in (["fade"], ["nesterov", "joint", "prox"], [name for name in OPTION_NAMES if name != "lr"]):
        older = copy.deepcopy(state)
        for group in older["param_groups"]:
            for name in names:
                group.pop(name, None)
        older["param_groups"][1].pop("amsgrad")
        twins = [copy.deepcopy(model) for _ in range(2)]
        batch = data()
        for twin, loaded in zip(twins, (state, older), strict=True):
            optimizer = PSILoRA(twin, 0.05, **kind)
            optimizer.load_state_dict(loaded)
            assert_equal(state, everything(optimizer))
            train(twin, optimizer, [batch])
        assert all(torch.equal(a, b) for a, b in zip(twins[0].parameters(), twins[1].parameters(), strict=True))


def test_a_state_of_the_version_that_kept_the_kind_of_step_under_step() -> None:
    model = headed()
    state = everything(stepped(model, step="gradient", groups=[{"layers": "l1", "step": "spectral"}]))
    older = copy.deepcopy(state)
    for group in older["param_groups"][:-1]:
        group["step"] = group.pop("step_kind")
    optimizer = PSILoRA(model, 0.05, step="gradient", groups=[{"layers": "l1", "step": "spectral"}])
    optimizer.load_state_dict(older)
    assert_equal(state, everything(optimizer))
    assert [group["step_kind"] for group in optimizer.param_groups[:-1]] == ["gradient", "spectral"]
    for group in optimizer.param_groups[:-1]:
        group["step"] = "gradient"
        with pytest.raises(ValueError, match="'step': 'gradient' in a param group. The kind of step is 'step_kind'"):
            optimizer.step()
        del group["step"]


@pytest.mark.parametrize("kind", ["spectral", "gradient"])
def test_a_wrapper_counts_its_own_steps_in_the_groups(kind: str) -> None:
    """Apex and wrappers of other libraries keep an integer "step" there."""
    models = [headed(), headed()]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        optimizer = PSILoRA(model, 0.05, step=kind)
        assert all("step" not in group for group in optimizer.param_groups) and "step" not in optimizer.defaults
        torch.manual_seed(1)
        for _ in range(3):
            if model is models[1]:
                for group in optimizer.param_groups:
                    group["step"] = group.get("step", 0) + 1
            train(model, optimizer, [data()])
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))
    resumed = PSILoRA(models[1], 0.05, step=kind)
    resumed.load_state_dict(optimizer.state_dict())
    assert [group["step"] for group in resumed.param_groups] == [3] * len(resumed.param_groups)


def adamw() -> State:
    model = headed()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    train(model, optimizer, [data()])
    return everything(optimizer)


def without_head() -> State:
    return everything(stepped(plain_mlp()))


def fewer_layers() -> State:
    model = headed()
    model.l2.requires_grad_(False)
    return everything(stepped(model))


def other_rank() -> State:
    return everything(stepped(headed(rank=3)))


def other_head() -> State:
    state = everything(stepped(headed()))
    state["state"][6]["exp_avg"] = torch.zeros(5)
    return state


def bad_value() -> State:
    state = everything(stepped(headed()))
    state["param_groups"][0]["momentum"] = 1.5
    return state


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (adamw, r"param groups of the kinds \[None\], this optimizer \['lora', 'adamw'\]: it is not"),
        (dict, r"of the kinds \[\], this optimizer \['lora', 'adamw'\]"),
        (without_head, r"of the kinds \['lora'\], this optimizer \['lora', 'adamw'\]"),
        (fewer_layers, r"param group 0 has 6 parameters, but 4 were saved"),
        (other_rank, r"l1.lora_B: the state 'momentum' has shape \(20, 6\). Must be \(20, 8\)."),
        (other_head, r"parameter 0 of param group 1: the state 'exp_avg' has shape \(5,\). Must be \(6,\)."),
        (bad_value, r"Invalid momentum=1.5"),
    ],
)
def test_a_state_of_something_else_is_refused(make: Callable[[], State], message: str) -> None:
    """The trap: torch replaces the groups before it looks at anything else."""
    state = make()
    model = headed()
    optimizer = stepped(model)
    before = everything(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert_equal(before, everything(optimizer))
    train(model, optimizer, [data()])


#: What a state of these settings is made of that is not whole, by number of the parameter: lora_A and lora_B of l1
#: are 0 and 1, the bias is 6.
HALVES: list[tuple[State, Callable[[State], object], str]] = [
    ({}, lambda state: state.pop("state"), "the state dict has no 'state', or none that is a dict of dicts"),
    ({}, lambda state: state.update(state={0: 1}), "the state dict has no 'state', or none that is a dict of dicts"),
    ({}, lambda state: state["param_groups"][0].pop("params"), "Invalid 'param_groups' in the state. Must be a list"),
    ({}, lambda state: state["state"].pop(0), "l1.lora_A: the state lacks 'step', which the other factor's has"),
    ({}, lambda state: state["state"].pop(1), "l1.lora_B: the state lacks 'step', which the other factor's has"),
    ({}, lambda state: state["state"][0].pop("metric"), "l1.lora_A: the state lacks 'metric', which the other"),
    (EXACT, lambda state: state["state"][1].pop("momentum"), "l1.lora_B: the state lacks 'momentum', which the other"),
    ({}, lambda state: state["state"][0].update(metric=[1.0]), "l1.lora_A: the state 'metric' is of type list. Must"),
    (SLOPE, lambda state: state["state"][1].pop("change"), "l1.lora_B: the state lacks 'change', which the other"),
    (
        SLOPE,
        lambda state: state["state"][0].update(controller=torch.zeros(6)),
        r"l1.lora_A: the state 'controller' has shape \(6,\). Must be \(7,\).",
    ),
    (
        {},
        lambda state: state["state"][6].pop("exp_avg_sq"),
        "parameter 0 of param group 1: the state lacks 'exp_avg_sq'",
    ),
    ({}, lambda state: state["state"][6].pop("step"), "parameter 0 of param group 1: the state lacks 'step', but has"),
    ({}, lambda state: state["state"][6].update(step=1), "group 1: the state 'step' is of type int. Must be a tensor."),
]


@pytest.mark.parametrize(("settings", "spoil", "message"), HALVES, ids=[message for *_, message in HALVES])
def test_a_state_that_is_not_whole_is_refused(settings: State, spoil: Callable[[State], object], message: str) -> None:
    optimizer = stepped(model := headed(), **settings)
    before = everything(optimizer)
    state = everything(optimizer)
    spoil(state)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert_equal(before, everything(optimizer))
    train(model, optimizer, [data()])


@pytest.mark.parametrize("other", [[], 5, None], ids=str)
def test_what_is_no_state_is_refused(other: object) -> None:
    optimizer = PSILoRA(headed(), 0.05)
    with pytest.raises(ValueError, match=f"Invalid state of type {type(other).__name__}. Must be a dict"):
        optimizer.load_state_dict(other)  # type: ignore[arg-type]


def test_what_both_factors_lack_begins_with_the_next_step() -> None:
    model = headed()
    optimizer = stepped(model)
    state = everything(optimizer)
    for number in (0, 1):
        del state["state"][number]["momentum"], state["state"][number + 2]
    optimizer.load_state_dict(state)
    weight, other = model.l1.lora_A.weight, model.l2.lora_A.weight
    assert "momentum" not in optimizer.state[weight] and not optimizer.state[other]
    train(model, optimizer, [data()])
    assert optimizer.state[weight]["step"] == 2 and optimizer.state[other]["step"] == 1
    assert bool(optimizer.state[weight]["momentum"].any()) and bool(optimizer.state[other]["momentum"].any())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (EXACT, r"l1.lora_B: the state 'momentum' has shape \(20, 3\). Must be \(20, 4\)."),
        ({"step": "gradient", "metric": "kfac-low-rank", "momentum": 0.0}, r"'metric' has shape \(20, 3\). Must be"),
        ({"controller": "slope", "momentum": 0.0}, r"l1.lora_B: the state 'change' has shape \(20, 3\). Must be"),
    ],
    ids=str,
)
def test_every_state_of_another_rank_is_refused_by_layer_and_sizes(settings: State, message: str) -> None:
    state = everything(stepped(headed(rank=3), **settings))
    optimizer = stepped(headed(), **settings)
    before = everything(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert_equal(before, everything(optimizer))


def square(names: str = "q_proj k_proj") -> nn.Module:
    """Layers of one shape, under the names of an attention, in this order."""
    model = nn.ModuleDict()
    for name in names.split():
        model[name] = LoRALinear(nn.Linear(12, 12), 3)
    return model.double()


def stepped_square(model: nn.Module, **settings: Any) -> PSILoRA:
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    optimizer = PSILoRA(model, 0.05, **settings)
    x = torch.randn(5, 12, dtype=torch.float64)
    sum(layer(x).square().sum() for layer in layers).backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("names", ["k_proj q_proj", "q_proj o_proj"])
def test_the_state_of_another_layer_of_the_same_shape_is_refused(names: str) -> None:
    """The trap: torch matches by position, and all shapes agree."""
    state = everything(stepped_square(square()))
    optimizer = stepped_square(square(names=names))
    before = everything(optimizer)
    saved, ours = next((a, b) for a, b in zip(["q_proj", "k_proj"], names.split(), strict=True) if a != b)
    with pytest.raises(ValueError, match=rf"group 0 of '{saved}' would be loaded into '{ours}'.*delete 'names'"):
        optimizer.load_state_dict(state)
    assert_equal(before, everything(optimizer))
    for group in state["param_groups"]:  # by an earlier version
        del group["names"]
    optimizer.load_state_dict(state)
    loaded = everything(optimizer)
    assert all(torch.equal(v, loaded["state"][i][k]) for i, s in state["state"].items() for k, v in s.items())
    assert loaded["param_groups"][0]["names"] == names.split()


def test_the_state_of_another_adapter_or_head_is_refused() -> None:
    model = peft_mlp(dtype=torch.float32)
    state = everything(stepped_float(model))
    other = get_peft_model(MLP((24, 20, 16, 6)), LoraConfig(r=4, target_modules=["l1", "l2", "l3"]), "other")
    with pytest.raises(ValueError, match=r"'base_model.model.l1' would be loaded into 'base_model.model.l1 \(other\)'"):
        PSILoRA(other, 0.1).load_state_dict(state)
    heads = [plain_mlp((24, 20, 20, 20)) for _ in range(2)]
    heads[0].l2.base.bias.requires_grad_()
    heads[1].l3.base.bias.requires_grad_()
    with pytest.raises(ValueError, match=r"group 1 of 'l2.base.bias' would be loaded into 'l3.base.bias'"):
        PSILoRA(heads[1], 0.1).load_state_dict(PSILoRA(heads[0], 0.1).state_dict())


def stepped_float(model: nn.Module) -> PSILoRA:
    optimizer = PSILoRA(model, 0.05)
    train(model, optimizer, [data(dtype=torch.float32)])
    return optimizer


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: model,
        lambda model: nn.Sequential(OrderedDict(module=model)),
        lambda model: nn.Sequential(OrderedDict(_orig_mod=nn.Sequential(OrderedDict(module=model)))),
        lambda model: nn.Sequential(OrderedDict(encoder=model)),
    ],
    ids=["plain", "ddp", "compiled ddp", "part of a model"],
)
def test_a_wrapped_model_loads_the_state_of_the_plain_one_and_back(wrap: Callable[[nn.Module], nn.Module]) -> None:
    plain, wrapped = stepped_square(square()), stepped_square(wrap(square()))
    states = [everything(plain), everything(wrapped)]
    plain.load_state_dict(states[1])
    wrapped.load_state_dict(states[0])
    for optimizer, state in ((plain, states[1]), (wrapped, states[0])):
        now = everything(optimizer)
        assert all(torch.equal(v, now["state"][i][k]) for i, s in state["state"].items() for k, v in s.items())


def test_a_layer_by_itself_loads_what_it_was_in_the_model() -> None:
    model = square(names="q_proj")
    whole, alone = stepped_square(model), stepped_square(model["q_proj"])
    assert everything(alone)["param_groups"][0]["names"] == [""]
    alone.load_state_dict(whole.state_dict())
    whole.load_state_dict(alone.state_dict())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # it is, and dcp says so
def test_the_names_survive_files_accelerate_and_distributed_checkpoints(tmp_path: Path) -> None:
    model = headed()
    optimizer = stepped(model)
    names = [["l1", "l2", "l3"], ["l3.base.bias"]]
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    save_checkpoint(tmp_path / "own", 1, model, optimizer=optimizer)
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path / "dcp")
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(stepped(headed()))
    accelerator.save_state(str(tmp_path / "accelerate"))
    from_dcp = {"optimizer": get_optimizer_state_dict(model, stepped(model))}
    for group in from_dcp["optimizer"]["param_groups"]:
        group["names"] = ["unread"] * len(group["names"])
    dcp.load(from_dcp, checkpoint_id=tmp_path / "dcp")
    read = torch.load(tmp_path / "own/step-00000001.pt", weights_only=True)["parts"]["optimizer"]
    files = [tmp_path / "state.pt", *(tmp_path / "accelerate").glob("optimizer*")]
    assert len(files) == 2
    for state in [from_dcp["optimizer"], read, *(torch.load(file, weights_only=True) for file in files)]:
        assert [group["names"] for group in state["param_groups"]] == names
    prepared.load_state_dict(torch.load(files[0], weights_only=True))
    set_optimizer_state_dict(model, optimizer, from_dcp["optimizer"])
    for group in from_dcp["optimizer"]["param_groups"]:
        group["names"].reverse()
    with pytest.raises(ValueError, match="group 0 of 'l3' would be loaded into 'l1', and 1 more differ"):
        set_optimizer_state_dict(model, optimizer, from_dcp["optimizer"])


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        (EXACT, {"momentum_rank": 2}, "l1: the state holds a momentum of rank 4, and momentum_rank=2 asks for rank 2"),
        ({**EXACT, "momentum_rank": 2}, {"momentum_rank": None}, "of rank 2, and momentum_rank=None asks for rank 4"),
        (TANGENT, {"momentum_rank": 6}, "of rank 4, and momentum_rank=6 asks for rank 6"),
        ({"metric": None}, {"joint": False}, "of rank 8, and joint=False asks for rank 4"),
    ],
    ids=str,
)
def test_a_momentum_of_another_rank_than_its_group_asks_for_is_refused(
    settings: State, change: State, message: str
) -> None:
    """The trap: the step goes on at the old rank, and what is saved then does not load."""
    model = headed()
    optimizer = stepped(model, **settings)
    kept = {key: optimizer.param_groups[0][key] for key in change}
    state, before = everything(optimizer), factors(model)
    optimizer.param_groups[0].update(change)
    with pytest.raises(RuntimeError, match=message):
        train(model, optimizer, [data()])
    assert all(torch.equal(before[name], value) for name, value in factors(model).items())
    optimizer.param_groups[0].update(kept)
    assert_equal(state, everything(optimizer))
    train(model, optimizer, [data()])
    optimizer.load_state_dict(optimizer.state_dict())


def test_a_momentum_begins_at_the_rank_that_the_group_asks_for_by_then() -> None:
    model = headed()
    optimizer = PSILoRA(model, 0.05, **EXACT)
    optimizer.param_groups[0]["momentum_rank"] = 2
    train(model, optimizer, [data()])
    assert optimizer.state[model.l1.lora_A.weight]["momentum"].shape == (2, 24)
    optimizer.load_state_dict(optimizer.state_dict())
