"""Plans as text: the grammar, the order of strategies, and error messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memscope.errors import UsageError
from memscope.strategies import Plan, Stage, Strategy, available, plugins
from memscope.strategies import plan as plan_module
from memscope.strategies import strategy as strategy_module
from memscope.strategies.amp import AMP
from memscope.strategies.bf16 import BF16
from memscope.strategies.ckpt import Checkpoint
from memscope.strategies.ga import GradientAccumulation
from memscope.strategies.lora import LoRA
from memscope.strategies.optim import KINDS, Optim
from memscope.testing import toy_workload
from memscope.workload.description import Workload

Install = Callable[..., None]


def contents(plan: Plan) -> list[tuple[type[Strategy], Any]]:
    return [(type(strategy), strategy.config) for strategy in plan.strategies]


def test_a_word_with_equals_before_any_colon_belongs_to_the_strategy_before_it() -> None:
    assert contents(Plan.parse("lora:r=4,targets=wq+wv+wo,amp:dtype=bf16,ckpt")) == [
        (LoRA, LoRA.Config(r=4, targets=("wq", "wv", "wo"))),
        (Checkpoint, Checkpoint.Config()),
        (AMP, AMP.Config(dtype="bf16")),
    ]


@pytest.mark.parametrize("text", ["lora:r=4,alpha=8", "lora,r=4,alpha=8", " lora:r=4 , alpha=8 ", "lora:alpha=8.0,r=4"])
def test_the_same_plan_can_be_written_in_several_ways(text: str) -> None:
    assert contents(Plan.parse(text)) == [(LoRA, LoRA.Config(r=4, alpha=8.0))]
    assert str(Plan.parse(text)) == "lora:r=4,alpha=8.0"


def test_a_value_may_hold_a_colon_and_a_list_may_hold_dots() -> None:
    (strategy,) = Plan.parse("lora:r=4,targets=blocks.0.wq+a:b").strategies
    assert strategy.config.targets == ("blocks.0.wq", "a:b")


@pytest.mark.parametrize("text", ["optim:fused", "optim:fused=true", "optim,fused=yes", "optim,fused", " optim:fused "])
def test_a_bare_word_that_is_a_switch_turns_it_on(text: str) -> None:
    assert contents(Plan.parse(text)) == [(Optim, Optim.Config(fused=True))]
    assert str(Plan.parse(text)) == "optim:fused"


def test_a_choice_is_written_alone_and_bare_words_after_it_go_on() -> None:
    plan = Plan.parse("ckpt,optim:adamw-8bit,embeddings=32,amp")
    assert plan.specs == ["ckpt", "optim:adamw-8bit,embeddings=32", "amp"]
    for text in ("optim:adamw,fused", "optim:fused,adamw", "optim,adamw,fused"):
        (strategy,) = Plan.parse(text).strategies
        assert (strategy.config, strategy.spec) == (Optim.Config("adamw", fused=True), "optim:adamw,fused")


def test_a_word_that_names_a_strategy_begins_it_though_it_is_also_a_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    other = type(made("other"))
    monkeypatch.setattr(plan_module, "available", lambda: {"switches": Switches, "other": other})
    monkeypatch.setattr(strategy_module, "installed_names", lambda: frozenset({"switches", "other"}))
    assert len(Plan.parse("switches:one,other").strategies) == 2
    both = Switches.Config(one=True, other=True)
    assert Switches(both).spec == "switches:one,other=true"
    assert contents(Plan.parse("switches:one,other=true")) == [(Switches, both)]


def test_settings_may_follow_a_switch_and_a_bare_word_after_a_comma_is_a_strategy() -> None:
    assert contents(Plan.parse("optim:fused,foreach=false,ckpt,amp")) == [
        (Checkpoint, Checkpoint.Config()),
        (Optim, Optim.Config(fused=True, foreach=False)),
        (AMP, AMP.Config()),
    ]


class Switches(Strategy):
    """A dummy strategy with several switches."""

    name, stage, exact = "switches", Stage.STEP, True

    @dataclass(frozen=True)
    class Config:
        pieces: int = 1
        one: bool = False
        other: bool | None = None
        usual: bool = True

    def apply(self, workload: Workload) -> None:
        raise AssertionError("never applied")


@pytest.mark.parametrize(
    ("spec", "settings"),
    [
        ("switches:one", {"one": True}),
        ("switches:other,pieces=2", {"other": True, "pieces": 2}),
        ("switches:one,other,pieces=2,usual=false", {"one": True, "other": True, "usual": False, "pieces": 2}),
        ("switches:usual=false", {"usual": False}),
        ("switches:other=false", {"other": False}),
    ],
)
def test_switches_that_are_on_are_written_bare_and_first(
    monkeypatch: pytest.MonkeyPatch, spec: str, settings: dict[str, Any]
) -> None:
    monkeypatch.setattr(plan_module, "available", lambda: {"switches": Switches})
    config = Switches.Config(**settings)
    assert Switches(config).spec == spec
    assert contents(Plan.parse(spec)) == [(Switches, config)]


def test_settings_at_their_defaults_are_left_out() -> None:
    assert Plan.parse("lora:r=16,dropout=0.05,ga:steps=8").specs == ["lora", "ga"]


@pytest.mark.parametrize("text", ["", "  "])
def test_an_empty_text_is_the_empty_plan(text: str) -> None:
    assert Plan.parse(text) == Plan()
    assert not Plan.parse(text)
    assert str(Plan()) == ""


NAMES = st.from_regex(r"[a-z][a-z0-9_.]{0,8}", fullmatch=True)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
CONFIGURED: dict[type[Strategy], st.SearchStrategy[Any]] = {
    LoRA: st.builds(
        LoRA.Config,
        r=st.integers(),
        alpha=FINITE,
        dropout=FINITE,
        targets=st.lists(NAMES, min_size=1, max_size=3).map(tuple),
    ),
    Checkpoint: st.builds(Checkpoint.Config, layers=st.sampled_from(["all", "every-2", "0-15", "3+7+11", "0-3+9"])),
    AMP: st.builds(AMP.Config, dtype=st.sampled_from(["fp16", "bf16"])),
    GradientAccumulation: st.builds(GradientAccumulation.Config, steps=st.integers()),
    Optim: st.builds(
        Optim.Config,
        st.sampled_from([None, *KINDS]),
        fused=st.booleans(),
        foreach=st.booleans(),
        momentum=st.none() | FINITE,
        embeddings=st.sampled_from([8, 32]),
    ),
    BF16: st.builds(BF16.Config),
}


@st.composite
def some_strategies(draw: st.DrawFn) -> list[Strategy]:
    kinds = draw(st.lists(st.sampled_from(list(CONFIGURED)), unique=True).filter(lambda k: not {AMP, BF16} <= {*k}))
    return [kind(draw(CONFIGURED[kind])) for kind in kinds]


@given(some_strategies())
def test_a_plan_reads_back_as_it_was_written(chosen: list[Strategy]) -> None:
    plan = Plan.of(*chosen)
    assert contents(Plan.parse(str(plan))) == contents(plan)
    assert str(Plan.parse(str(plan))) == str(plan)


@given(st.permutations(["lora", "ckpt", "optim", "amp", "ga"]))
def test_strategies_are_ordered_by_stage_then_by_name_however_they_are_given(words: list[str]) -> None:
    # lora changes the trained weights, ckpt wraps modules, optim changes the optimizer, amp and ga change the step.
    assert Plan.parse(",".join(words)).specs == ["lora", "ckpt", "optim", "amp", "ga"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("r=4", 'the setting "r=4" has no strategy before it; write STRATEGY:r=4'),
        ("lora,,amp", 'expected STRATEGY or STRATEGY:KEY=VALUE,… but found ""'),
        ("lora,", 'expected STRATEGY or STRATEGY:KEY=VALUE,… but found ""'),
        (",", 'expected STRATEGY or STRATEGY:KEY=VALUE,… but found ""'),
        (":r=4", 'expected STRATEGY or STRATEGY:KEY=VALUE,… but found ":r=4"'),
        ("lora:", 'expected STRATEGY or STRATEGY:KEY=VALUE,… but found "lora:"'),
        ("lora:r=", 'expected KEY=VALUE after "lora" but found "r="'),
        ("lora:=4", 'expected KEY=VALUE after "lora" but found "=4"'),
        ("lora,=4", 'expected KEY=VALUE after "lora" but found "=4"'),
        ("lora:r=4,r=8", '"r" is set twice for "lora"'),
        ("optim:fused,fused=false", '"fused" is set twice for "optim"'),
    ],
)
def test_a_malformed_plan_is_refused_with_the_words_that_are_wrong(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Plan.parse(text)
    assert str(caught.value) == f'malformed plan "{text}": {message}'


def test_an_unknown_strategy_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(
        UsageError, match=r'^unknown strategy "lorra" in plan "amp,lorra:r=4": did you mean "lora"\? Valid: .*\bckpt\b'
    ):
        Plan.parse("amp,lorra:r=4")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "ga:stesp=3",
            'strategy "ga" has no setting "stesp": did you mean "steps"? Valid: steps',
        ),
        ("amp:dtype=f16", 'strategy "amp": setting "dtype" cannot be "f16": did you mean "fp16"? Valid: bf16, fp16'),
        ("amp:dtype=int4", 'strategy "amp": setting "dtype" cannot be "int4": Valid: bf16, fp16'),
        ("ga:steps=1.5", 'strategy "ga": setting "steps" cannot be "1.5": expected a whole number'),
        ("lora:r=4=8", 'strategy "lora": setting "r" cannot be "4=8": expected a whole number'),
        ("lora:alpha=much", 'strategy "lora": setting "alpha" cannot be "much": expected a number'),
        ("lora:r", 'strategy "lora": setting "r" is not a switch: write r=VALUE'),
        ("lora:targets,r=4", 'strategy "lora": setting "targets" is not a switch: write targets=VALUE'),
        (
            "ga:step",
            'strategy "ga" has no setting "step": did you mean "steps"? Valid: steps',
        ),
        ("optim:fused=maybe", 'strategy "optim": setting "fused" cannot be "maybe": expected true or false'),
        ("optim:adamw,lion", 'strategy "optim" cannot be both "adamw" and "lion": choose one'),
        ("adamw", 'unknown strategy "adamw" in plan "adamw": write optim:adamw'),
        ("amp,adamw:fused", 'unknown strategy "adamw" in plan "amp,adamw:fused": write optim:adamw,fused'),
        (
            "adamw:foreach=false,amp",
            'unknown strategy "adamw" in plan "adamw:foreach=false,amp": write optim:adamw,foreach=false',
        ),
    ],
)
def test_an_unknown_key_or_value_is_refused_with_the_valid_ones(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Plan.parse(text)
    assert str(caught.value) == message


@dataclass(frozen=True)
class Nothing:
    pass


def made(called: str, *, stage_: Stage = Stage.STEP, **features: set[str]) -> Strategy:
    """A dummy strategy; `requires`, `provides` and `conflicts` by keyword."""

    class Made(Strategy):
        name, stage, exact, Config = called, stage_, False, Nothing

        def apply(self, workload: Workload) -> None:
            raise AssertionError("never applied")

    for feature, values in features.items():
        setattr(Made, feature, frozenset(values))
    return Made()


OF_FEATURE = ', because of "sharding": remove one, or change the setting that adds it'


@pytest.mark.parametrize(
    ("one", "other", "why"),
    [
        (made("a", conflicts={"b"}), made("b"), ": remove one"),
        (made("a"), made("b", conflicts={"a"}), ": remove one"),
        (made("a", conflicts={"sharding"}), made("b", provides={"sharding"}), OF_FEATURE),
        (made("a", provides={"sharding"}), made("b", conflicts={"sharding"}), OF_FEATURE),
    ],
    ids=["by name", "by name, of the other", "by feature", "by feature, of the other"],
)
def test_a_conflict_is_refused_whichever_strategy_declares_it(one: Strategy, other: Strategy, why: str) -> None:
    for given_order in [(one, other), (other, one)]:
        with pytest.raises(UsageError) as caught:
            Plan.of(*given_order)
        assert str(caught.value) == f'the plan cannot be used: "a" and "b" cannot be combined{why}'


def test_a_requirement_is_met_by_a_feature_or_a_name_and_refused_otherwise() -> None:
    needy = made("a", requires={"adapters", "c"})
    assert Plan.of(needy, made("b", provides={"adapters"}), made("c")).specs == ["a", "b", "c"]
    with pytest.raises(UsageError) as caught:
        Plan.of(needy, made("b", provides={"adapters"}))
    assert str(caught.value) == 'the plan cannot be used: "a" requires "c": add a strategy that provides it'


def test_every_problem_of_a_plan_is_reported_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        Plan.of(made("d"), made("c", requires={"y", "x"}), made("a", conflicts={"b"}), made("d"), made("b"))
    assert str(caught.value).splitlines() == [
        "the plan cannot be used:",
        '  - "d" occurs 2 times: name it once',
        '  - "a" and "b" cannot be combined: remove one',
        '  - "c" requires "x": add a strategy that provides it',
        '  - "c" requires "y": add a strategy that provides it',
    ]


def test_every_problem_of_every_strategy_is_reported_before_anything_changes() -> None:
    workload = toy_workload()
    step, modules = workload.plan, [type(module) for module in workload.model.modules()]
    with pytest.raises(UsageError) as caught:
        Plan.parse("amp,lora:r=0,targets=wq+nowhere,ckpt:layers=5,ga:steps=3").apply(workload)
    title, *problems = str(caught.value).splitlines()
    assert title.endswith('cannot be applied to "toy":')
    assert [problem.split()[1] for problem in problems] == ["lora:", "lora:", "ckpt:", "ga:"]
    assert workload.plan is step
    assert [type(module) for module in workload.model.modules()] == modules
    assert all(parameter.requires_grad for parameter in workload.model.parameters())


def test_the_only_candidate_of_a_strategy_is_its_defaults_by_default() -> None:
    assert type(made("a")).candidates(toy_workload()) == [Nothing()]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Replaces the table of installed strategies: `install((name, value), …)`."""

    def install(*points: tuple[str, str]) -> None:
        table = [EntryPoint(name, value, "memscope.strategies") for name, value in points]
        monkeypatch.setattr(plugins, "entry_points", lambda group: table)
        available.cache_clear()

    yield install
    available.cache_clear()


def test_a_strategy_of_another_package_is_found_by_its_entry_point(install: Install) -> None:
    install(("lora", "memscope.strategies.lora:LoRA"))
    assert available() == {"lora": LoRA}


def test_one_class_that_is_listed_twice_is_one_strategy(install: Install) -> None:
    install(("lora", "memscope.strategies.lora:LoRA"), ("lora", "memscope.strategies.lora:LoRA"))
    assert available() == {"lora": LoRA}


def test_a_name_used_by_two_packages_is_refused(install: Install) -> None:
    install(("lora", "memscope.strategies.lora:LoRA"), ("amp", "memscope.strategies.amp:AMP"), ("lora", "mine:LoRA"))
    with pytest.raises(UsageError) as caught:
        Plan.parse("amp")
    assert str(caught.value) == ('two installed packages provide a strategy "lora" (mine:LoRA): uninstall one of them')


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("no_such_package:Strategy", "No module named 'no_such_package'"),
        ("memscope.units:Strategy", "module 'memscope.units' has no attribute 'Strategy'"),
    ],
)
def test_a_strategy_that_cannot_be_imported_is_named(install: Install, value: str, reason: str) -> None:
    install(("mine", value))
    with pytest.raises(UsageError) as caught:
        available()
    assert str(caught.value) == f'strategy "mine" ({value}) cannot be imported: {reason}'
