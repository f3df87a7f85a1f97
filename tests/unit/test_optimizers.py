"""The optimizers that `optim` builds by name: their state by hand, as simulated and as run, and the stand-in."""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from program_runs import run_source
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from memscope import record, simulate
from memscope.advisor.combinations import combinations
from memscope.errors import MemscopeError, UsageError
from memscope.strategies import Plan
from memscope.strategies.optim import KINDS, Optim, optimizer_named
from memscope.strategies.optim.blockwise import STANDS_IN, BlockwiseOptimizer
from memscope.testing.conformance import _allocations
from memscope.trace import Trace
from memscope.workload.description import Workload
from memscope.workload.step import Training

ROWS, WIDTH = 64, 128  # entries of the embedding, and its width
EMBEDDING = HEAD = ROWS * WIDTH
HIDDEN, BIAS = WIDTH * WIDTH, WIDTH
LARGE = EMBEDDING + HIDDEN + HEAD  # the elements of tensors with at least 4,096
ALL = LARGE + BIAS
TENSORS = 4


def build(width: int = WIDTH) -> Workload:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(ROWS, width), nn.Linear(width, width), nn.Linear(width, ROWS, bias=False))
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    return Workload(model, [tokens], lambda m, x: m(x).square().mean(), torch.optim.AdamW)


def state_bytes(trace: Trace) -> int:
    return trace.max_by_category(1)["optimizer_state"]


def scales(elements: int, block: int = 256) -> int:
    """Bytes of one float32 for each block of elements."""
    return 4 * elements // block


BOOK = 256 * 4  # a code book of 8 bits: 256 float32
STATE = {
    "adafactor": 4 * ((ROWS + WIDTH) * 2 + 2 * WIDTH + BIAS) + 4 * TENSORS + 4,  # rows, columns; RMS, the new one first
    "adafactor,beta1=0.9": 4 * ALL + 4 * ((ROWS + WIDTH) * 2 + 2 * WIDTH + BIAS) + 4 * TENSORS + 4,
    "adagrad": 4 * ALL + 4 * TENSORS,  # a step counter for each, on the CPU a tensor like others
    "adam": 8 * ALL + 4 * TENSORS,
    "adamw-4bit": 2 * LARGE // 2 + 2 * scales(LARGE, 128) + 3 * 2 * 16 * 4 + 8 * BIAS + 4 * TENSORS,
    "adamw-4bit,block=256": 2 * LARGE // 2 + 2 * scales(LARGE) + 3 * 2 * 16 * 4 + 8 * BIAS + 4 * TENSORS,
    "adamw-8bit": 2 * LARGE + 2 * scales(LARGE) + 2 * BOOK + 8 * BIAS,
    "adamw-8bit,embeddings=32": 2 * (LARGE - EMBEDDING) + 2 * scales(LARGE - EMBEDDING) + 2 * BOOK
    + 8 * (BIAS + EMBEDDING),
    "adamw-fp8": 2 * LARGE + 2 * scales(LARGE) + 8 * BIAS + 4 * TENSORS,
    # The projection keeps all rows of the singular vectors, of which it shows 16; the moments have 16 columns.
    "galore,rank=16": 4 * WIDTH * WIDTH + 2 * 4 * WIDTH * 16 + 8 * (ALL - HIDDEN),
    "lion": 4 * ALL,
    "lion-8bit": LARGE + scales(LARGE) + BOOK + 4 * BIAS,
    "muon": 4 * HIDDEN + 8 * (ALL - HIDDEN) + 4 * (TENSORS - 1),
    "paged-adamw": 8 * ALL,  # on the CPU, nothing is paged
    "rmsprop": 4 * ALL + 4 * TENSORS,
    "schedulefree-adamw": 8 * ALL,
    "sgd": 0,
    "sgd,momentum=0.9": 4 * ALL,
    "torchao-adamw-8bit": 2 * LARGE + 2 * scales(LARGE) + 3 * 2 * BOOK + 8 * BIAS + 4 * TENSORS,
}  # fmt: skip


@pytest.fixture(scope="module")
def code_books() -> None:
    """Computes torchao's code books, which it keeps for the process: the first run would have more allocations."""
    for bits in (4, 8):
        module = importlib.import_module(f"torchao.optim.subclass_{bits}bit")
        module.get_qmap_signed()
        module.get_qmap_unsigned()


@pytest.mark.usefixtures("code_books")
@pytest.mark.parametrize("spec", STATE)
def test_the_state_is_what_can_be_derived_and_the_run_allocates_what_was_simulated(spec: str) -> None:
    simulated = simulate(build, device="cpu", strategies=f"optim:{spec}")
    assert state_bytes(simulated) == STATE[spec]
    assert _allocations(simulated) == _allocations(record(build, strategies=f"optim:{spec}"))


def test_every_name_is_that_of_an_optimizer() -> None:
    names = next(kind for kind in get_args(get_type_hints(Optim.Config)["name"]) if kind is not type(None))
    assert set(get_args(names)) == set(KINDS)


def parameters_with_gradients() -> list[nn.Parameter]:
    """A tensor of whole blocks, one whose last block is not full, and one too small for 8 bits."""
    found = [nn.Parameter(torch.randn(shape)) for shape in ((64, 128), (4097,), (4095,))]
    for parameter in found:
        parameter.grad = torch.randn_like(parameter)
    return found


def layouts(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [
        {key: (one.dtype, [*one.shape]) if isinstance(one, torch.Tensor) else one for key, one in state.items()}
        for state in optimizer.state.values()
    ]


@pytest.mark.parametrize("name", ["adamw-8bit", "lion-8bit", "paged-adamw", "lion"])
def test_the_stand_in_makes_the_state_of_a_real_step_of_bitsandbytes(name: str) -> None:
    real = optimizer_named(name, [{"params": parameters_with_gradients()}], {}, nn.Identity())
    real.step()
    with FakeTensorMode():
        bits, states = (8 if "8bit" in name else 32), (1 if "lion" in name else 2)
        paged = name.startswith("paged")
        fake = BlockwiseOptimizer(parameters_with_gradients(), states=states, bits=bits, is_paged=paged)
        fake.step()
    assert layouts(fake) == layouts(real)
    if bits == 8:
        assert [len(state) for state in layouts(real)] == [1 + 3 * states, 1 + 3 * states, 1 + states]
        assert layouts(real)[1]["absmax1"] == (torch.float32, [17])  # 16 blocks of 256, and one element


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes libraries seem not to be installed."""
    real = importlib.util.find_spec

    def hide(*libraries: str) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in libraries else real(name, *a))

    return hide


def wide() -> Workload:
    return build(width=2048)  # 64 · 2048 elements and more: those that bitsandbytes pages


@pytest.mark.parametrize("device", ["a100-40gb", "cpu"])
@pytest.mark.parametrize("spec", ["adamw-8bit,embeddings=32", "paged-adamw-8bit", "paged-lion"])
def test_the_stand_in_is_simulated_like_bitsandbytes(without: Any, device: str, spec: str) -> None:
    real = simulate(wide, device=device, strategies=f"optim:{spec}")
    without("bitsandbytes")
    fake = simulate(wide, device=device, strategies=f"optim:{spec}")
    assert _allocations(fake) == _allocations(real)
    assert fake.meta["notes"] == [STANDS_IN, *real.meta.get("notes", [])]


def test_paged_state_takes_no_memory_of_the_gpu_and_is_told() -> None:
    trace = simulate(wide, device="a100-40gb", strategies="optim:paged-adamw-8bit")
    matrices = 2 * ROWS * 2048 + 2048 * 2048
    in_blocks_of_512 = 2 * (scales(matrices) + BOOK + 4 * 2048)
    assert state_bytes(trace) == in_blocks_of_512
    (note,) = trace.meta["notes"]
    assert note.startswith(f"{2 * matrices / 2**20:.2f} MiB of optimizer state are paged")
    assert trace.host is not None
    assert trace.host.by_category()["optimizer_state"] == 2 * matrices


def test_without_its_library_an_optimizer_is_refused_with_what_to_install(without: Any) -> None:
    without("galore_torch", "bitsandbytes")
    with pytest.raises(
        UsageError, match=r"optim: galore-torch is not installed, which has GaLoreAdamW: pip install ga"
    ):
        simulate(build, strategies="optim:galore")
    said = "bitsandbytes is not installed, which has AdamW8bit; only a simulation does without it: pip install bits"
    with pytest.raises(UsageError, match=said):
        record(build, strategies="optim:adamw-8bit")


def test_the_stand_in_refuses_to_train() -> None:
    with pytest.raises(UsageError, match="its stand-in cannot train: pip install bitsandbytes"):
        BlockwiseOptimizer(parameters_with_gradients(), states=2, bits=8, is_paged=False).step()


def two_groups(parameters: Iterable[nn.Parameter]) -> Optimizer:
    first, *others = parameters
    groups = [{"params": [first], "lr": 0.5, "layer": "first"}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.25, weight_decay=0.125, betas=(0.8, 0.9), eps=1e-5, amsgrad=False)


@pytest.mark.parametrize(
    ("name", "carried"),
    [
        ("adamw-8bit", {"betas": (0.8, 0.9), "eps": 1e-5}),
        ("galore", {"betas": (0.8, 0.9), "eps": 1e-5}),
        ("adafactor", {"eps": (1e-30, 1e-3)}),  # of another meaning there
        ("lion", {"betas": (0.9, 0.99)}),
        ("sgd", {"momentum": 0}),
    ],
)
def test_groups_stay_and_options_that_mean_the_same_are_taken_over(name: str, carried: dict[str, Any]) -> None:
    workload = build()
    workload.optimizer_factory = two_groups
    Plan.parse(f"optim:{name}").apply(workload)
    optimizer = Training.start(workload, "cpu", lambda data: data).optimizer
    first, *others = optimizer.param_groups
    assert [first["lr"], first["weight_decay"], first["layer"]] == [0.5, 0.125, "first"]
    assert {(group["lr"], group["weight_decay"], group.get("layer")) for group in others} == {(0.25, 0.0, None)}
    assert {key: first[key] for key in carried} == carried
    given = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in given} == {id(parameter) for parameter in workload.model.parameters()}


@pytest.mark.parametrize("name", ["muon", "galore"])
def test_matrices_between_embedding_and_output_layer_have_a_group_of_their_own(name: str) -> None:
    workload = build()
    workload.optimizer_factory = two_groups
    Plan.parse(f"optim:{name}").apply(workload)
    groups = Training.start(workload, "cpu", lambda data: data).optimizer.param_groups
    (chosen,) = [group for group in groups if group.get("use_muon") or "rank" in group]
    assert [id(parameter) for parameter in chosen["params"]] == [id(workload.model[1].weight)]  # type: ignore[index]
    assert chosen["eps"] == {"muon": 1e-7, "galore": 1e-5}[name]  # Muon's own is that of a matrix


def test_a_loaded_state_dict_is_what_muon_goes_on_with() -> None:
    def started() -> Training:
        workload = build()
        Plan.parse("optim:muon").apply(workload)
        training = Training.start(workload, "cpu", lambda data: data)
        workload.loss(workload.model, workload.batches[0]).backward()  # type: ignore[union-attr]
        training.optimizer.step()
        return training

    first, again = started(), started()
    again.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    for training in (first, again):
        training.optimizer.step()
    pairs = zip(first.workload.model.parameters(), again.workload.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    steps = [state["step"].item() for state in again.optimizer.state.values() if "step" in state]
    assert steps == [2.0] * (TENSORS - 1)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("optim:adamw,rank=4", "adamw has no setting rank: remove rank"),
        ("optim:adamw-8bit,fused", "adamw-8bit has no setting fused: remove fused"),
        ("optim:galore,rank=0", "rank=0: choose at least 1"),
        ("optim:rank=4", "rank is a setting of galore: name the optimizer: optim:galore,rank=…"),
    ],
)
def test_a_setting_that_the_optimizer_lacks_is_refused(spec: str, message: str) -> None:
    with pytest.raises(MemscopeError, match=message):
        Plan.parse(spec).check(build())


def test_only_another_implementation_of_the_same_optimizer_is_exact() -> None:
    exact = {"optim": True, "optim:fused": True, "optim:adamw,fused": True, "optim:adam": False, "optim:sgd": False}
    assert {spec: Plan.parse(spec).strategies[0].is_exact(build()) for spec in exact} == exact


def test_other_optimizers_are_tried_only_where_they_are_allowed() -> None:
    def tried(*allowed: str) -> list[str]:
        plans = combinations(build(), Plan.parse("ga:steps=1"), allowed)
        return [str(plan) for plan in plans if {strategy.name for strategy in plan.strategies} == {"ga", "optim"}]

    exact = ["optim:fused,ga:steps=1", "optim:foreach=false,ga:steps=1"]
    others = [f"optim:{name},ga:steps=1" for name in ("adamw-8bit", "paged-adamw-8bit", "adafactor")]
    assert (tried(), tried("optim")) == (exact, [*exact, *others])


def test_a_singular_value_decomposition_on_a_gpu_is_told() -> None:
    assert any("cuSOLVER" in note for note in simulate(build, strategies="optim:galore,rank=4").meta["notes"])
    assert "notes" not in simulate(build, device="cpu", strategies="optim:galore,rank=4").meta


@pytest.mark.parametrize(
    ("built", "state"),
    [
        ("bitsandbytes.optim.PagedAdamW8bit(parameters)", 2 * (scales(2**18) + BOOK + 4 * 512)),
        # The step counter of torchao stays on the host.
        ("importlib.import_module('torchao.optim').AdamWFp8(parameters)", 2 * (2**18 + scales(2**18) + 4 * 512)),
    ],
)
def test_a_program_that_builds_an_optimizer_of_a_library_is_simulated(tmp_path: Path, built: str, state: int) -> None:
    ran = run_source(
        tmp_path,
        f"""
        import importlib

        import bitsandbytes

        model = nn.Linear(512, 512).cuda()
        parameters = model.parameters()
        train(model, {built}, batch=lambda: torch.ones(8, 512).cuda())
        """,
    )
    assert state_bytes(ran.trace) == state
    assert any("256.0 KiB of" in note or "512.0 KiB of" in note for note in ran.notes) is ("Paged" in built)
