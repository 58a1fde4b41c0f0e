"""Several models in one optimizer, adapters that change while it lives, groups of other parameters, and copies."""

from __future__ import annotations

import copy
import pickle
import warnings

import peft
import pytest
import torch
from models import MLP, bare, data, factors, mse, peft_mlp, plain_mlp, train
from torch import Tensor, nn

from psilora import LoRALinear, PSILoRA

KINDS = [{}, {"step": "gradient"}, {"step": "gradient", "metric": "kfac", "num_iters": 2}]


def twins() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(3)
    return plain_mlp(), plain_mlp((24, 10, 9, 6))


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("several", [list, tuple, lambda models: {"unet": models[0], "te": models[1]}])
def test_several_models_train_as_each_alone(kind: dict, several: object) -> None:
    together, alone = twins(), twins()
    joint = PSILoRA(several(together), 0.05, **kind)  # type: ignore[operator]
    each = [PSILoRA(model, 0.05, **kind) for model in alone]
    for _ in range(3):
        batch = data()
        joint.zero_grad()
        sum(mse(model, batch) for model in together).backward()
        joint.step()
        for model, optimizer in zip(alone, each, strict=True):
            train(model, optimizer, [batch])
    for ours, theirs in zip(together, alone, strict=True):
        assert equal(factors(ours), factors(theirs))


def test_names_begin_with_the_model_s_and_states_follow_them() -> None:
    unet, encoder = twins()
    optimizer = PSILoRA(
        {"unet": unet, "text_encoder": encoder}, 0.05, groups=[{"layers": r"^text_encoder\.", "lr": 0.01}]
    )
    assert [info.name for info in optimizer.pairs()][0] == "unet.l1"
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.01]
    optimizer.init_state()
    state = optimizer.state_dict()
    assert state["param_groups"][1]["names"] == ["text_encoder.l1", "text_encoder.l2", "text_encoder.l3"]
    a, b = plain_mlp(), plain_mlp()
    same = PSILoRA({"a": a, "b": b}, 0.05)
    same.init_state()
    with pytest.raises(ValueError, match="'a.l1' would be loaded into 'b.l1'"):
        PSILoRA({"b": b, "a": a}, 0.05).load_state_dict(same.state_dict())


@pytest.mark.parametrize(
    ("models", "error"),
    [
        ({"a.b": plain_mlp()}, r"Invalid name 'a.b' of a model. Must be a string without a dot"),
        ({"forward": plain_mlp()}, "nn.Module has an attribute of that name"),
        ([nn.DataParallel(plain_mlp()), plain_mlp()], "DataParallel"),
    ],
)
def test_what_cannot_be_joined_is_named(models: object, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        PSILoRA(models, 0.05)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="several in a list or a dict"):
        PSILoRA(list(plain_mlp().parameters()), 0.05)  # type: ignore[arg-type]


def with_head(**settings: object) -> tuple[nn.Module, PSILoRA]:
    model = plain_mlp(dtype=torch.float32)
    model.norm, model.head = nn.LayerNorm(6), nn.Linear(6, 6)
    return model, PSILoRA(model, 0.05, **settings)  # type: ignore[arg-type]


def test_other_parameters_take_rates_and_decay_by_name() -> None:
    groups = [
        {"parameters": r"norm|bias", "weight_decay": 0.0},
        {"layers": "l1", "lr": 0.01},
        {"parameters": ["head.weight"], "lr": 3e-4},
    ]
    model, optimizer = with_head(groups=groups, adamw_lr=1e-2, adamw_weight_decay=0.5)
    kinds = [(g["kind"], g["lr"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups]
    assert kinds == [("lora", 0.05, 0.0, 4), ("lora", 0.01, 0.0, 2), ("adamw", 1e-2, 0.0, 3), ("adamw", 3e-4, 0.5, 1)]
    plain = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters() if "lora" not in name}
    no_decay = [p for name, p in plain.items() if p.requires_grad and ("norm" in name or name == "head.bias")]
    adamw = torch.optim.AdamW(
        [
            {"params": no_decay, "lr": 1e-2, "weight_decay": 0.0},
            {"params": [plain["head.weight"]], "lr": 3e-4, "weight_decay": 0.5},
        ]
    )
    x, y = data(dtype=torch.float32)
    (model.head(model.norm(model(x))) - y).square().mean().backward()
    for name, parameter in model.named_parameters():
        if name in plain and parameter.grad is not None:
            plain[name].grad = parameter.grad.clone()
    optimizer.step()
    adamw.step()
    for name in ("norm.weight", "norm.bias", "head.weight", "head.bias"):
        torch.testing.assert_close(model.get_parameter(name), plain[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("entry", "error"),
    [
        ({"parameters": "nothing"}, r"no parameter is left for parameters='nothing'; .* there are norm.weight"),
        ({"parameters": "head", "momentum": 0.5}, r"unknown keys \['momentum'\]; allowed are lr, betas"),
        ({"parameters": "("}, "Must be a regular expression"),
        ({"parameters": 3}, "Invalid parameters=3"),
        ({"parameters": "head", "lr": "x"}, "Invalid lr='x'. Must be finite and >= 0."),
        ({"parameters": "head", "betas": 0.9}, r"Invalid betas=0.9. Must be two numbers in \[0, 1\)."),
        (
            {"parameters": ["head.weight", "typo"]},
            r"Invalid parameters=\['head.weight', 'typo'\]. Must be names of what is trained, which typo is not; there "
            "are norm.weight",
        ),
        (
            {"layers": ["l1", "l9", "l0"]},
            r"Invalid layers=\['l1', 'l9', 'l0'\]. Must be names .*, which l0, l9 are not; there are l1, l2, l3",
        ),
        ({"layers": "l1", "lr_ratio": 16}, r"\['lr_ratio'\]: the step is one on the weight"),
        ({"lr": 0.1}, "no 'layers'"),
    ],
)
def test_wrong_groups_of_parameters_are_named(entry: dict, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        with_head(groups=[entry])


def test_a_list_may_name_what_an_earlier_entry_takes_or_what_is_gone() -> None:
    groups = [{"layers": "l1"}, {"layers": ["l1", "l2"], "lr": 0.01}, {"parameters": ["head.weight", "norm.weight"]}]
    model, optimizer = with_head(groups=groups)
    assert [len(g["params"]) for g in optimizer.param_groups] == [2, 2, 2, 2, 2]
    model.norm.requires_grad_(False)
    model.l2 = model.l2.base
    optimizer.rebind()
    assert [len(g["params"]) for g in optimizer.param_groups] == [2, 2, 0, 1, 1]


def test_more_numbers_for_adamw_than_for_lora_are_said_unless_asked_for() -> None:
    """The trap: a base that nobody froze trains in full under AdamW, without a word."""
    model = plain_mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PSILoRA(model, 0.05)
    model.l1.base.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"AdamW trains 500 numbers .* have 408; .* l1.base.weight \(480\)"):
        PSILoRA(model, 0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PSILoRA(model, 0.05, groups=[{"parameters": "base", "lr": 1e-4}])


def test_rebind_says_it_again_only_of_other_parameters() -> None:
    model = plain_mlp()
    model.l1.base.requires_grad_(True)
    with pytest.warns(UserWarning, match="AdamW trains 500 numbers"):
        optimizer = PSILoRA(model, 0.05)
    model.l3 = LoRALinear(model.l3.base, 3, 8).double()
    added = model.l2.base.weight.requires_grad_(True)
    optimizer.add_param_group({"params": [added]})  # whoever adds it knows
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert optimizer.rebind() == ["l1", "l2", "l3"]
        assert optimizer.rebind() == ["l1", "l2", "l3"]
    model.l3.base.weight.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"AdamW trains 596 numbers .* have 386; .* l3.base.weight \(96\)"):
        optimizer.rebind()


def test_an_adapter_added_later_trains_like_one_that_was_there() -> None:
    model = peft_mlp()
    optimizer = PSILoRA(model, 0.05, depth_scale=1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    train(model, optimizer, [data() for _ in range(2)])
    schedule.step()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["l1", "l3"]))
    model.base_model.set_adapter("second")
    for module in model.modules():
        if isinstance(module, nn.ModuleDict) and "second" in module:
            module["second"].double()
    assert optimizer.rebind() == ["base_model.model.l1 (second)", "base_model.model.l3 (second)"]
    twin = copy.deepcopy(model)
    fresh = PSILoRA(twin, 0.025, depth_scale=1)
    assert optimizer.param_groups[0]["lr"] == 0.025  # as the schedule has left it
    assert len(optimizer.param_groups) == 1 and len(optimizer.param_groups[0]["params"]) == 4
    batches = [data() for _ in range(3)]
    train(model, optimizer, batches)
    train(twin, fresh, batches)
    assert equal(factors(model), factors(twin))
    schedule.step()


@pytest.mark.parametrize("kind", [*KINDS, {"controller": "slope"}], ids=str)
def test_pairs_that_stay_keep_their_state_and_replaced_ones_begin_anew(kind: dict) -> None:
    model = plain_mlp()
    optimizer = PSILoRA(model, 0.05, **kind)
    train(model, optimizer, [data() for _ in range(2)])
    kept = {name: t.clone() for name, t in optimizer.state[model.l1.lora_A.weight].items()}
    steps = float(optimizer.state[model.l2.lora_B.weight]["step"])
    model.l2 = LoRALinear(model.l2.base, 7, 14).double()  # another rank
    assert optimizer.rebind() == ["l2"]
    assert all(torch.equal(optimizer.state[model.l1.lora_A.weight][name], t) for name, t in kept.items())
    assert len(optimizer.state) == 4  # of the two pairs that stay; nothing is held of the old one
    assert [info.rank for info in optimizer.pairs()] == [4, 7, 4]
    before = factors(model)
    train(model, optimizer, [data()])
    moved = {name for name, t in factors(model).items() if not torch.equal(t, before[name])}
    assert "l2.lora_B.weight" in moved
    assert float(optimizer.state[model.l2.lora_B.weight]["step"]) == 1 and steps == 2
    assert float(optimizer.state[model.l1.lora_B.weight]["step"]) == 3
    again = PSILoRA(model, 0.05, **kind)
    again.load_state_dict(optimizer.state_dict())


def test_captures_follow_to_new_layers() -> None:
    """The trap: the hooks are still on the old layers, and the new ones train along the tangent gradient, or not."""
    model = plain_mlp()
    optimizer = bare(model, 0.05)
    model.l2 = LoRALinear(model.l2.base, 4, 8).double()
    nn.init.normal_(model.l2.lora_B.weight)
    optimizer.rebind()
    twin = copy.deepcopy(model)
    fresh = bare(twin, 0.05)
    batch = data()
    train(model, optimizer, [batch])
    train(twin, fresh, [batch])
    assert optimizer.gradients() == {"l1": "exact", "l2": "exact", "l3": "exact"}
    assert equal(factors(model), factors(twin))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_relora_merges_and_begins_anew(kind: dict) -> None:
    """Merge, draw A anew, B = 0, rebind(reset=True): the run is that of a new optimizer on the merged model."""
    model = peft_mlp()
    optimizer = PSILoRA(model, 0.05, **kind)
    train(model, optimizer, [data() for _ in range(2)])
    x = data()[0]
    want = model(x)
    model.merge_adapter()
    for module in model.modules():
        if hasattr(module, "merged_adapters"):
            module.merged_adapters = []
            module.reset_lora_parameters("default", True)
    torch.testing.assert_close(model(x), want)  # B = 0, and the base holds what was learnt
    assert optimizer.rebind(reset=True) == [info.name for info in optimizer.pairs()]
    twin = copy.deepcopy(model)
    fresh = PSILoRA(twin, 0.05, **kind)
    batches = [data() for _ in range(3)]
    train(model, optimizer, batches)
    train(twin, fresh, batches)
    assert equal(factors(model), factors(twin))


def test_rebind_names_what_is_missing() -> None:
    model = plain_mlp()
    optimizer = PSILoRA(model, 0.05)
    merged = MLP((24, 20, 16, 6))
    with pytest.raises(ValueError, match="add adapters"):
        optimizer.rebind(merged)
    train(model, optimizer, [data()])  # and it goes on with what it had
    del model
    import gc

    gc.collect()
    with pytest.raises(RuntimeError, match=r"is gone; call rebind\(model\)"):
        optimizer.rebind()


class Bare(nn.Module):
    """LoRA with bare parameters as factors, whose inputs cannot be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(6, 2))
        self.scaling = 1.0


def beyond_the_rank(optimizer: PSILoRA) -> nn.Module:
    optimizer.param_groups[0]["momentum_rank"] = 7  # of 6 × 8
    return LoRALinear(nn.Linear(8, 6), 2).double()


@pytest.mark.parametrize(
    ("settings", "layer", "error"),
    [
        ({"metric": "kfac"}, lambda _: Bare().double(), "cannot be captured for extra"),
        ({"momentum_rank": 7}, lambda _: LoRALinear(nn.Linear(8, 6), 2).double(), "extra: invalid momentum_rank=7"),
        ({}, beyond_the_rank, "extra: invalid momentum_rank=7"),
    ],
    ids=["captures", "settings", "settings of the group"],
)
@pytest.mark.parametrize("other_model", [False, True])
def test_a_refused_rebind_changes_nothing(settings: dict, layer: object, error: str, other_model: bool) -> None:
    """The trap: it is found out that settings do not fit once groups and hooks are gone."""
    pair = []
    for _ in range(2):
        torch.manual_seed(3)
        model = plain_mlp((24, 20, 16, 7))
        model.head = nn.Linear(6, 6).double()
        optimizer = PSILoRA(model, 0.05, step="gradient", **settings)
        torch.manual_seed(4)
        train(model, optimizer, [data(d_out=7) for _ in range(2)])
        pair.append((model, optimizer))
    (model, optimizer), (twin, same) = pair
    given = copy.deepcopy(model) if other_model else model
    given.extra = layer(optimizer)  # type: ignore[operator]
    with pytest.raises(ValueError, match=error):
        optimizer.rebind(given if other_model else None)
    del given.extra
    optimizer.param_groups[0]["momentum_rank"] = same.param_groups[0]["momentum_rank"]
    assert [len(group["params"]) for group in optimizer.param_groups] == [6, 2]
    batches = [data(d_out=7) for _ in range(2)]
    train(model, optimizer, batches)
    train(twin, same, batches)
    assert equal(factors(model), factors(twin)) and optimizer.gradients() == same.gradients()
    assert optimizer.rebind() == []


def test_standing_still_says_rebind() -> None:
    model = plain_mlp()
    optimizer = PSILoRA(model, 0.05)
    for name in ("l1", "l2", "l3"):
        setattr(model, name, LoRALinear(getattr(model, name).base, 4, 8).double())
    with pytest.warns(UserWarning, match=r"call optimizer.rebind\(\)"):
        for _ in range(3):
            mse(model, data()).backward()
            optimizer.step()
    optimizer.rebind()
    before = factors(model)
    train(model, optimizer, [data() for _ in range(2)])
    assert not equal(before, factors(model))


def test_a_layer_unfrozen_late_is_trained_by_adamw() -> None:
    model = plain_mlp(dtype=torch.float32)
    optimizer = PSILoRA(model, 0.05, adamw_lr=0.02)
    bias = model.l3.base.bias.requires_grad_(True)
    twin = bias.detach().clone().requires_grad_(True)
    adamw = torch.optim.AdamW([twin], lr=0.003, weight_decay=0.0)
    optimizer.add_param_group({"params": [bias], "lr": 0.003})
    assert optimizer.state_dict()["param_groups"][1]["names"] == ["l3.base.bias"]
    for _ in range(2):
        optimizer.zero_grad()
        mse(model, data(dtype=torch.float32)).backward()
        twin.grad = bias.grad.clone()
        optimizer.step()
        adamw.step()
    torch.testing.assert_close(bias, twin, rtol=1e-6, atol=1e-7)
    optimizer.rebind()
    assert len(optimizer.param_groups) == 2 and "exp_avg" in optimizer.state[bias]
    with pytest.raises(ValueError, match=r"LoRA factors, of l1; call rebind\(\)"):
        optimizer.add_param_group({"params": [model.l1.lora_A.weight]})
    with pytest.raises(ValueError, match=r"unknown keys \['momentum'\]"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "momentum": 0.1})


@pytest.mark.parametrize(
    ("group", "error", "message"),
    [
        ({}, TypeError, "a later group needs 'params': nn.Parameters"),
        ({"params": None}, TypeError, "a later group needs 'params': nn.Parameters"),
        ({"params": [("name",)]}, TypeError, "a later group needs 'params': nn.Parameters"),
        ({"params": torch.ones(())}, TypeError, "a later group needs 'params': nn.Parameters"),
        ([nn.Parameter(torch.ones(1))], TypeError, "Invalid later group of type list. Must be a dict"),
        (
            {"params": nn.Parameter(torch.ones(1, dtype=torch.complex64))},
            ValueError,
            r"added.0 is complex \(torch.comp",
        ),
        ({"params": [("w", nn.Parameter(torch.ones(1, device="meta")))]}, ValueError, "w is on the meta device"),
        ({"params": nn.Parameter(torch.ones(1)), "lr": "x"}, ValueError, "Invalid lr='x'. Must be finite and >= 0."),
        ({"params": nn.Parameter(torch.ones(1)), "eps": None}, ValueError, "Invalid eps=None. Must be finite and"),
    ],
)
def test_a_wrong_later_group_is_named_and_nothing_is_added(group: object, error: type, message: str) -> None:
    model = plain_mlp()
    optimizer = PSILoRA(model, 0.05)
    with pytest.raises(error, match=message):
        optimizer.add_param_group(group)  # type: ignore[arg-type]
    assert len(optimizer.param_groups) == 1
    train(model, optimizer, [data()])


def test_a_default_optimizer_can_be_copied_with_its_model() -> None:
    model = plain_mlp()
    model.head = nn.Linear(6, 6).double()
    optimizer = PSILoRA(model, 0.05)
    train(model, optimizer, [data() for _ in range(2)])
    twin, copied = copy.deepcopy((model, optimizer))
    batches = [data() for _ in range(2)]
    train(model, optimizer, batches)
    train(twin, copied, batches)
    assert equal(factors(model), factors(twin))
    assert equal(dict(model.named_parameters()), dict(twin.named_parameters()))
    loaded_model, loaded = pickle.loads(pickle.dumps((model, optimizer)))
    batch = data()
    train(model, optimizer, [batch])
    train(loaded_model, loaded, [batch])
    assert equal(factors(model), factors(loaded_model))
    assert loaded.summary() == optimizer.summary()
    loaded.rebind(loaded_model)


def test_the_copy_of_one_with_a_scheduler_steps_itself() -> None:
    """The trap: a scheduler wraps `step` of the original, on the instance, where a copy of its attributes finds it."""
    model = plain_mlp()
    optimizer = PSILoRA(model, 0.05)
    optimizer.register_step_post_hook(lambda *_: None)  # as a local function it cannot be pickled
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    train(model, optimizer, [data()])
    for twin, copied in (copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))):
        before, start = factors(model), factors(twin)
        train(twin, copied, [data()])
        assert equal(before, factors(model)) and not equal(start, factors(twin))
        torch.optim.lr_scheduler.LambdaLR(copied, lambda step: 1 / (1 + step))


def test_one_that_holds_hooks_is_not_copied() -> None:
    with pytest.raises(TypeError, match="use state_dict"):
        pickle.dumps(bare(plain_mlp(), 0.1))
