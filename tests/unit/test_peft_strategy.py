"""The strategy `peft`: methods by name, their settings, and models and programs that PEFT changes."""

from __future__ import annotations

import sys
from collections import Counter

import pytest
import torch

from memscope import simulate
from memscope.errors import UsageError
from memscope.program.applied_plan import AppliedPlan
from memscope.strategies import Plan
from memscope.testing import toy_workload
from memscope.trace import PHASES
from memscope.workload.description import Workload

pytest.importorskip("peft")

DIM = 16  # in the toy: wq, wk, wv, wo are [16, 16], up is [32, 16], down is [16, 32]


def toy(plan: str = "") -> Workload:
    torch.manual_seed(0)
    workload = toy_workload()
    Plan.parse(plan).apply(workload)
    return workload


def language_model() -> Workload:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=64))
    return Workload(
        model=model,
        batches=[torch.arange(64).view(2, 32)],
        loss=lambda model, x: model(input_ids=x, labels=x, use_cache=False).loss,
        optimizer_factory=torch.optim.AdamW,
        name="tiny",
    )


def refused(plan: str, workload: Workload | None = None) -> str:
    with pytest.raises(UsageError) as caught:
        Plan.parse(plan).apply(workload or toy_workload())
    return str(caught.value)


@pytest.mark.parametrize(
    ("plan", "trained"),
    [
        ("peft:ia3", 2 * 2 * DIM),  # a factor for each output of wq and wv, in two layers
        ("peft:vera,r=4", 2 * 2 * (4 + DIM)),  # lambda_d and lambda_b; A and B are shared, and not trained
        ("peft:loha,r=2,targets=up", 2 * 2 * 2 * (DIM + 32)),  # two pairs of factors for each up
        ("peft:ln_tuning", 2 * 2 * DIM),  # weight and bias of both layer norms
    ],
)
def test_the_library_decides_what_is_trained(plan: str, trained: int) -> None:
    assert toy(plan).parameter_counts()[1] == trained


def test_the_matrices_that_vera_shares_are_counted_once() -> None:
    r = 4
    trace = simulate(toy_workload, device="cpu", strategies=f"peft:vera,r={r},targets=wq+wv+wo")
    setup = trace.phase == PHASES.index("setup")
    assert Counter(trace.requested[setup].tolist())[4 * r * DIM] == 2  # A [r, 16] and B [16, r] in float32


def test_a_method_inside_the_model_leaves_its_names_and_one_around_it_does_not() -> None:
    inside, around = toy("peft:ia3"), toy("peft:adalora,total_step=10")
    assert type(inside.model) is type(toy_workload().model)
    assert type(around.model).__name__ == "PeftModel"  # its forward adds a loss of its own


def test_settings_are_read_as_the_fields_of_the_method_and_read_back() -> None:
    plan = Plan.parse("peft:lokr,r=4,decompose_both=true,targets=wq+up")
    assert str(plan) == "peft:lokr,targets=wq+up,r=4,decompose_both=true"
    assert Plan.parse(str(plan)).strategies[0].config == plan.strategies[0].config
    workload = toy_workload()
    plan.apply(workload)
    config = workload.model.get_submodule("blocks.0.wq").r
    assert dict(config) == {"default": 4}
    assert str(Plan.parse("peft")) == "peft:ia3"


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ("peft:lora", "LoRA is a strategy of its own: write lora: in place of peft:lora"),
        ("peft:vara", 'has no method "vara": did you mean "vera"? Valid: adalora, '),
        ("peft:vera,rank=4", 'peft: VeraConfig has no setting "rank": Valid: '),
        ("peft:vera,r=four", 'peft: setting "r" cannot be "four": expected a whole number'),
        ("peft:vera,target_modules=wq", 'setting "target_modules" is called targets here: write targets=NAME+NAME'),
        ("peft:vera,targets=nope", 'peft: targets=nope matches no module of "toy"'),
        ("peft:vera,targets=auto+wq", "targets=auto stands alone"),
        ("peft:xlora", "peft: xlora mixes LoRA adapters that have been trained before: call PEFT in a program"),
        ("peft:adalora", "peft: AdaLoraConfig rejects its settings: AdaLoRA does not work when `total_step` is None"),
        ("peft:miss,r=64", "peft:miss,r=64: PEFT rejects it: `r` (64) must be less than or equal to in_features (16)"),
        (
            "peft:prompt_tuning,num_virtual_tokens=4",
            "peft: prompt_tuning makes inputs for a transformers model, and _Toy is none: use a target hf:…",
        ),
        ("lora,peft:ia3", '"lora" and "peft" cannot be combined, because of "adapters"'),
        ("bitfit,peft:ia3", '"bitfit" and "peft" cannot be combined, because of "adapters"'),
        ("bitfit,lora", '"bitfit" and "lora" cannot be combined, because of "adapters"'),
        ("freeze,lora", '"freeze" and "lora" cannot be combined, because of "adapters"'),
    ],
)
def test_what_cannot_be_used_is_refused(plan: str, said: str) -> None:
    assert said in refused(plan)


def test_virtual_tokens_go_before_the_inputs_of_a_transformers_model() -> None:
    workload = language_model()
    assert "prompt_tuning has no length: write num_virtual_tokens=20" in refused("peft:prompt_tuning", workload)
    assert "changes no module inside the model: leave targets out" in refused(
        "peft:prompt_tuning,num_virtual_tokens=4,targets=q_proj", workload
    )
    with_prompt = simulate(language_model, device="cpu", strategies="peft:prompt_tuning,num_virtual_tokens=4")
    assert with_prompt.meta["parameters"]["trainable"] == 4 * 32
    logits = 2 * (4 + 32) * 64 * 4  # 2 samples, virtual and other tokens, vocabulary, float32
    assert logits in with_prompt.requested


def test_a_missing_library_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == "peft" or name.startswith("peft.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Without("peft"), *sys.meta_path])
    assert refused("peft:ia3") == (
        'the plan "peft:ia3" cannot be applied to "toy": peft: PEFT is not installed: pip install peft'
    )


class _Without:
    """Finds no package of this name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == self._name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=self._name)


def test_a_program_gets_the_modules_of_a_method_and_is_told_of_one_that_needs_another_model() -> None:
    with AppliedPlan(Plan.parse("peft:ia3,targets=wq")) as applied:
        model = toy_workload().model
        optimizer = torch.optim.AdamW(model.parameters())
        applied.require_use(built=True)
    (group,) = optimizer.param_groups
    assert [one.shape for one in group["params"]] == [(DIM, 1), (DIM, 1)]
    other = toy_workload().model
    with AppliedPlan(Plan.parse("peft:adalora,total_step=9")), pytest.raises(UsageError) as caught:
        torch.optim.AdamW(other.parameters())
    said = "the training loop, which is the program's own: build the model as peft.get_peft_model(model, config) in the"
    assert said in str(caught.value)


def test_a_model_with_adapters_is_refused() -> None:
    assert "peft: the model has modules of PEFT already: remove this strategy" in refused("peft:vera", toy("peft:ia3"))
