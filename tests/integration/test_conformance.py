"""The conformance kit: the built-in strategies pass it, and it notices every broken promise."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any, ClassVar

import pytest
import torch
from installed import SHIPPED, Install
from torch import Tensor, nn

from memscope.errors import UsageError
from memscope.strategies import Plan, Problem, Stage, Strategy, available, plan
from memscope.strategies.loss.parts import has_fused
from memscope.testing import check_strategy, conformance, toy_workload
from memscope.workload.description import Workload
from memscope.workload.target import find_target

FEW = ("amp", "bf16", "lora")
"""Strategies beside one that is made up here."""


@pytest.mark.parametrize("name", SHIPPED)
def test_the_strategies_that_come_with_memscope_keep_their_promises(install: Install, name: str) -> None:
    install(beside=(name, *(["lora"] if available()[name].requires else [])))  # together: see the tests below
    check_strategy(available()[name])


def seeded_toy() -> Workload:
    torch.manual_seed(0)
    return toy_workload()


def joined(names: Iterable[str]) -> Plan | None:
    """The plan of some strategies and of those they require; None if they cannot be combined on the toy."""
    # With the default number of micro-batches, each has one sample of the toy, and nothing can be packed.
    found = {name: Plan.parse("ga:steps=2").strategies[0] if name == "ga" else available()[name]() for name in names}
    if any(strategy.requires for strategy in found.values()):
        found.setdefault("lora", available()["lora"]())
    try:
        together = Plan.of(*found.values())
        together.check(seeded_toy())
    except UsageError:
        return None
    return together


@cache
def groups() -> dict[str, list[str]]:
    """Plans of up to five strategies, in which each pair that can be combined occurs; by the first name."""
    pairs = [pair for pair in combinations(SHIPPED, 2) if joined(pair)]
    waiting, found = dict.fromkeys(pairs), {}
    while waiting:
        group = list(next(iter(waiting)))
        first = group[0]
        for name in SHIPPED:
            new = sum(tuple(sorted((name, one))) in waiting for one in group)
            if name not in group and 2 * new >= len(group) and len(group) < 5 and joined([*group, name]):
                group.append(name)
        for pair in combinations(sorted(group), 2):
            waiting.pop(pair, None)
        found.setdefault(first, []).append(str(joined(group)))
    return found


@pytest.mark.parametrize("first", SHIPPED)
def test_strategies_together_are_simulated_as_they_run(first: str) -> None:
    for text in groups().get(first, []):
        conformance._check_traces([*Plan.parse(text).strategies], seeded_toy)


@pytest.mark.parametrize(
    "spec",
    [
        "optim:adamw-8bit",
        "optim:fused",
        "optim:muon",
        "optim:foreach=false",
        "amp:dtype=bf16",
        "ckpt:layers=every-2",
        "ga:steps=2",
        pytest.param("loss:fused", marks=pytest.mark.skipif(not has_fused(), reason="came with PyTorch 2.13")),
        "lora:r=2,alpha=4,dropout=0,targets=wk+wo+head",
        "lora:dora,r=2,rslora=true,targets=wk+up,bias=lora_only",
        "lora:pissa,r=2",
        "peft:vera,r=4,targets=wk+up",
        "peft:adalora,total_step=9,init_r=3",
        "bitfit:head,bias=up",
        "freeze:layers=1,embeddings=false",
        "offload:optimizer",
        "qlora:type=fp4,double=false,compute=fp32,r=2,alpha=2,targets=wq",
        "int8:threshold=0",
    ],
)
def test_the_strategies_keep_their_promises_with_other_settings(install: Install, spec: str) -> None:
    # Pairs, which take most of the time, are the claim of the test above: one other strategy is enough here.
    name = spec.partition(":")[0]
    # With DoRA, gradients of fp16 overflow on the CPU, and a real run leaves out a step that a simulation takes.
    beside = "lora" if name in ("amp", "int8") else "bf16" if "dora" in spec else "amp"
    install(beside=(name, beside))
    check_strategy(spec)


def test_the_strategies_keep_their_promises_on_the_users_own_workload(install: Install) -> None:
    install(beside=("ga", "amp"))
    target = find_target("llama2")
    small = target.configure(
        "debug",
        {"n_layers": "2", "dim": "24", "n_heads": "2", "vocab_size": "1024", "seq_len": "16", "accumulation": "4"},
    )
    check_strategy("ga:steps=2", workload=lambda: target.build(small))


def test_the_toy_is_small_and_its_batch_splits() -> None:
    # embed and head 40·16 each; a layer: norm 2·16, wq wk wv wo 16·16 each, up 16·32 + 32, down 32·16 + 16
    block = 2 * 16 + 4 * 16 * 16 + (16 * 32 + 32) + (32 * 16 + 16)
    toy = toy_workload()
    assert toy.parameter_counts() == (2 * 40 * 16 + 2 * block,) * 2
    assert {p.dtype for p in toy.model.parameters()} == {torch.float32}
    assert {len(toy.split(batch, parts)) for batch in toy.batches for parts in (1, 2, 4, 8)} == {1, 2, 4, 8}


def test_the_kit_leaves_the_random_state_alone(install: Install) -> None:
    install(beside=("ga",))
    before = torch.get_rng_state()
    check_strategy("ga")
    assert torch.equal(torch.get_rng_state(), before)


@dataclass(frozen=True)
class Nothing:
    """No settings."""


class Frozen(Strategy):
    """Freezes the head: sound, and the base of the broken strategies below."""

    name = "frozen"
    stage = Stage.ADAPT
    exact = False
    changes = "whether the head is trained"
    Config: ClassVar[type] = Nothing

    def apply(self, workload: Workload) -> None:
        workload.model.get_submodule("head").requires_grad_(False)


def test_a_sound_strategy_of_another_package_passes(install: Install) -> None:
    install(Frozen, beside=FEW)
    check_strategy(Frozen)


@dataclass(frozen=True)
class Unexplained:
    size: int = 1


@dataclass(frozen=True)
class Unwritable:
    sizes: dict[str, int] | None = None
    """A kind of value that a plan cannot write."""


@dataclass(frozen=True)
class Unreadable:
    separator: str = ","
    """A text that a plan splits."""


class Undescribed(Frozen):
    """Does not document its setting."""

    Config = Unexplained


class WithoutWords(Frozen):
    """Its setting cannot be written."""

    Config = Unwritable


class OneWay(Frozen):
    """Its setting cannot be read back."""

    Config = Unreadable


class Silent(Frozen):
    """Changes something without describing it."""

    changes = ""


class Fancy(Frozen):
    """Its candidates cannot be used."""

    @classmethod
    def candidates(cls, workload: Workload) -> list[Unexplained]:
        return [Unexplained(2)]


class Greedy(Frozen):
    """Changes the workload before it is applied."""

    @classmethod
    def candidates(cls, workload: Workload) -> list[Nothing]:
        workload.model.requires_grad_(False)
        return [Nothing()]


class Slower(Frozen):
    """Claims to carry out the same step, but learns half as fast."""

    exact = True
    stage = Stage.OPTIM

    def apply(self, workload: Workload) -> None:
        workload.optimizer_factory = lambda parameters: torch.optim.AdamW(parameters, lr=5e-4)


class Idle(Frozen):
    """Changes nothing."""

    def apply(self, workload: Workload) -> None:
        workload.model.requires_grad_(True)


class Picky(Frozen):
    """Accepts no workload."""

    def check(self, workload: Workload) -> list[Problem]:
        return [Problem("it is too small", "take a larger one")]


class Needy(Frozen):
    """Requires a feature that no strategy provides."""

    requires = frozenset({"eight GPUs"})


class Unpredictable(Frozen):
    """Takes a different number of bytes in each run."""

    runs: ClassVar[int] = 0

    def apply(self, workload: Workload) -> None:
        Unpredictable.runs += 1
        workload.model.register_buffer("cache", torch.zeros(Unpredictable.runs))


class Freezes(Frozen):
    """Claims to keep gradients, but removes one."""

    exact = True


class Rounds(Frozen):
    """Claims to keep losses, but changes them by a part in 10⁶."""

    exact = True

    def apply(self, workload: Workload) -> None:
        loss = workload.loss
        workload.loss = lambda model, batch: loss(model, batch) * (1 + 1e-6)


class Twice(Frozen):
    """Claims to be exact for every model, but runs the forward pass again."""

    exact = True
    stage = Stage.WRAP

    def apply(self, workload: Workload) -> None:
        loss = workload.loss

        def twice(model: nn.Module, batch: Any) -> Tensor:
            with torch.no_grad():
                loss(model, batch)
            return loss(model, batch)

        workload.loss = twice


class Clashing(Frozen):
    """Conflicts with autocast without declaring it."""

    stage = Stage.STEP
    name = "zz"

    def apply(self, workload: Workload) -> None:
        super().apply(workload)
        if workload.plan.autocast:
            raise RuntimeError("no kernel for autocast")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (
            Undescribed,
            r"described, .* are provided\. Config has no docstring, which is the help text, under size",
        ),
        (WithoutWords, r"read back\. A setting of kind dict\[str, int\] cannot be written in a plan"),
        (OneWay, r'read back\. malformed plan "frozen:separator=,x": expected KEY=VALUE after "frozen"'),
        (
            Silent,
            r"described, .* are provided\. It is not always exact, but its `changes` is empty: say what it changes",
        ),
        (Fancy, r"candidates are settings .*\. Its candidate Unexplained\(size=2\) is not a Fancy\.Config"),
        (Greedy, r"finding them changes nothing\. candidates\(\) or check\(\) changed the plan, the model or the data"),
        (Slower, r"\(exact\)\. In step 0, the embed\.weight afterwards differs by 0\.000\d+; the largest value is"),
        (Idle, r"changes something\. Its apply\(\) did not change the plan, the model or the data"),
        (Picky, r"applied.*it is too small: take a larger one\. Pass another workload"),
        (
            Needy,
            r'features it requires are provided\. "frozen" requires "eight GPUs", which no installed strategy provides',
        ),
        (
            Unpredictable,
            r'same allocations\. With "frozen", allocation \d+ is simulated as \(\d+, .*, but measured as \(\d+, ',
        ),
        (Freezes, r"\(exact\)\. In step 0, only the baseline or only the strategy has gradient of head\.weight"),
        (Rounds, r"\(exact\)\. In step 0, the loss differs by \S+e-06; the largest value is"),
        (
            Twice,
            r"buffers .* \(exact\)\. In step 0, the blocks\.0\.norm\.running_mean afterwards differs by 0\.\d+",
        ),
        (Clashing, r'combined with "amp", or one of the two declares a conflict\. .*no kernel for autocast'),
    ],
)
def test_the_kit_names_the_strategy_and_the_promise_that_it_breaks(
    install: Install, broken: type[Strategy], message: str
) -> None:
    install(broken, beside=FEW)
    with pytest.raises(AssertionError, match=rf'^strategy "{broken.name}" breaks a promise: .*{message}'):
        check_strategy(broken)


def test_a_strategy_that_is_not_installed_is_an_error() -> None:
    with pytest.raises(
        AssertionError, match=r'^strategy "frozen" breaks a promise: it is installed and .*expected .*Frozen'
    ):
        check_strategy(Frozen)


def test_a_plan_of_several_strategies_is_an_error() -> None:
    with pytest.raises(AssertionError, match="Expected one strategy, found 2"):
        check_strategy("ga,amp")


class Provider(Frozen):
    """Provides the feature that `Seeker` requires."""

    name = "provider"
    provides = frozenset({"a cold head"})


class Seeker(Frozen):
    """Requires the feature of `Provider`, and is exact together with it."""

    name = "seeker"
    requires = frozenset({"a cold head"})
    exact = True

    def apply(self, workload: Workload) -> None:
        assert not any(p.requires_grad for p in workload.model.get_submodule("head").parameters())
        workload.model.register_buffer("mark", torch.zeros(3))


def test_what_a_strategy_requires_is_added(install: Install) -> None:
    install(Provider, Seeker, beside=FEW)
    check_strategy(Seeker)


class Loner(Clashing):
    """Conflicts with autocast and declares it."""

    conflicts = frozenset({"autocast"})


def test_a_declared_conflict_is_accepted(install: Install) -> None:
    install(Loner, beside=FEW)
    check_strategy(Loner)


def test_a_declared_conflict_must_be_refused(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(Loner, beside=FEW)
    monkeypatch.setattr(plan, "_conflicts", lambda ordered: [])
    with pytest.raises(AssertionError, match=r'combined with "amp".*declared, but the plan was accepted'):
        check_strategy(Loner)
    Plan.parse("amp,zz")  # the kit complains about this


class Demanding(Frozen):
    """Applies to no small model, although its check passes."""

    name = "demanding"

    def check(self, workload: Workload) -> list[Problem]:
        return [Problem("too small", "take a larger one")]

    def apply(self, workload: Workload) -> None:
        raise RuntimeError("never applied")


def test_other_strategies_that_cannot_be_applied_are_left_out(install: Install) -> None:
    install(Demanding, beside=("ckpt", "amp"))
    check_strategy("ckpt")
    with pytest.raises(UsageError, match="demanding: too small"):
        Plan.parse("ckpt,demanding").apply(toy_workload())
