"""FlashAttention 2 and 3 inside a simulation: what they allocate, what they refuse, and what is left afterwards."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memscope import Workload, record, simulate
from memscope.errors import TargetError
from memscope.trace import PHASES

BATCH, SEQ, HEADS, KEY_HEADS, SIZE = 2, 200, 4, 2, 64
TOKENS = BATCH * SEQ
SAVED = [TOKENS * HEADS * SIZE * 2, BATCH * HEADS * SEQ * 4, 16]
"""The output in bfloat16, the log-sum-exp of each row in float32, and two numbers of the generator."""


class Attention(nn.Module):
    """Projects to `width` values a token and attends as `run` does."""

    def __init__(self, width: int, run: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.project, self.run = nn.Linear(16, width, bias=False, dtype=dtype), run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.project(x.to(self.project.weight.dtype)))


def workload(run: Any, width: int = (HEADS + 2 * KEY_HEADS) * SIZE, dtype: torch.dtype = torch.bfloat16) -> Workload:
    batch = torch.zeros(BATCH, SEQ, 16)
    return Workload(
        Attention(width, run, dtype), [batch], lambda model, x: model(x).float().sum(), lambda p: torch.optim.SGD(p)
    )


def simulated(run: Any, device: str = "a100-40gb", **settings: Any) -> Any:
    return simulate(lambda: workload(run, **settings), device=device, steps=1)


def taken(trace: Any, operator: str) -> list[int]:
    """Bytes that an operator asks for, in order."""
    chosen = [name.startswith(f"memscope.{operator}") for name in trace.ops]
    return [int(size) for size, op in zip(trace.requested, trace.op, strict=True) if chosen[int(op)]]


def in_phase(trace: Any, phase: str) -> list[int]:
    """Bytes that are asked for in a phase."""
    return [int(size) for size in trace.requested[trace.phase == PHASES.index(phase)]]


def heads(x: Tensor) -> tuple[Tensor, ...]:
    """Query, key and value `[batch, seq, heads, head size]`."""
    return tuple(x.unflatten(-1, (-1, SIZE)).split((HEADS, KEY_HEADS, KEY_HEADS), dim=-2))


def dense(x: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(*heads(x), causal=True)


def packed_by_length(x: Tensor) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    begins = torch.tensor([0, 150, TOKENS], dtype=torch.int32, device=x.device)
    return flash_attn_varlen_func(*heads(x.flatten(0, 1)), begins, begins, 250, 250, deterministic=True)


@pytest.fixture(scope="module")
def trace() -> Any:
    return simulated(dense)


def test_a_call_saves_output_log_sum_exp_and_generator(trace: Any) -> None:
    assert taken(trace, "flash_attn_2_forward") == SAVED


def test_the_backward_pass_takes_an_accumulator_and_gradients_of_every_head(trace: Any) -> None:
    rows = BATCH * HEADS * 256  # 200 queries, rounded up to blocks of 128
    expanded = TOKENS * HEADS * SIZE * 2
    assert taken(trace, "flash_attn_2_backward") == [rows * 4, rows * SIZE * 4, expanded, expanded]


def test_the_trace_says_that_the_functions_stand_in(trace: Any) -> None:
    (note,) = trace.meta["notes"]
    assert note.startswith("flash_attn is not installed: its functions stand in, with the memory of version 2.8.3")


def test_samples_packed_by_length_lie_128_rows_apart() -> None:
    trace = simulated(packed_by_length)
    rows, splits = HEADS * (TOKENS + 128 * 2), 14  # 108 multiprocessors for 2 samples of 4 heads: 13.5
    expanded = TOKENS * HEADS * SIZE * 2
    assert taken(trace, "flash_attn_2_forward") == [SAVED[0], HEADS * TOKENS * 4, 16]
    assert taken(trace, "flash_attn_2_backward") == [rows * 4, splits * rows * SIZE * 4, expanded, expanded]


def test_heads_are_padded_to_a_multiple_of_8() -> None:
    def narrow(x: Tensor) -> Tensor:
        from flash_attn import flash_attn_kvpacked_func

        x = x.unflatten(-1, (3, 1, 12))
        out = flash_attn_kvpacked_func(x[:, :, 0], x[:, :, 1:])
        assert out.shape == (BATCH, SEQ, 1, 12)
        return out

    assert taken(simulated(narrow, width=36), "flash_attn_2_forward")[0] == TOKENS * 16 * 2


def test_gradients_of_a_stacked_tensor_are_one_tensor() -> None:
    def stacked(x: Tensor) -> Tensor:
        from flash_attn.flash_attn_interface import flash_attn_qkvpacked_func

        return flash_attn_qkvpacked_func(x.unflatten(-1, (3, HEADS, SIZE)), 0.1)

    trace = simulated(stacked, width=3 * HEADS * SIZE)
    rows = BATCH * HEADS * 256
    assert taken(trace, "flash_attn_2_backward") == [rows * 4, rows * SIZE * 4]
    assert TOKENS * 3 * HEADS * SIZE * 2 in in_phase(trace, "backward")


def test_flash_attention_3_accumulates_gradients_of_keys_and_values_in_float32() -> None:
    def run(x: Tensor) -> Tensor:
        from flash_attn_interface import flash_attn_func

        return flash_attn_func(*heads(x), causal=True)

    trace = simulated(run, device="h100-80gb")
    rows, key_rows = BATCH * HEADS * 256, BATCH * KEY_HEADS * 256  # heads of 64: blocks of 128 queries, 128 keys
    accumulators = [rows * SIZE * 4, key_rows * SIZE * 4, key_rows * SIZE * 4]
    assert taken(trace, "flash_attn_3_forward") == [SAVED[0], SAVED[1], 4]
    assert taken(trace, "flash_attn_3_backward") == [rows * 4, rows * 4, *accumulators, 4 * 2 * BATCH * HEADS]


def test_padding_is_removed_by_the_values_of_the_mask() -> None:
    def run(x: Tensor) -> Tensor:
        from flash_attn.bert_padding import pad_input, unpad_input

        mask = (torch.arange(SEQ) < torch.tensor([[SEQ], [50]])).to(x.device)
        tokens, indices, begins, longest, _ = unpad_input(x, mask)
        assert (tokens.shape, begins.tolist(), longest) == ((250, 16), [0, 200, 250], SEQ)
        return pad_input(tokens, indices, BATCH, SEQ)

    assert simulated(run, width=16).meta["assumptions"] == []


def test_the_rotary_embedding_is_one_tensor() -> None:
    def run(x: Tensor) -> Tensor:
        from flash_attn.layers.rotary import apply_rotary_emb

        table = torch.zeros(SEQ, 8, dtype=x.dtype, device=x.device)
        return apply_rotary_emb(x.unflatten(-1, (1, 16)), table, table)

    trace = simulated(run, width=16)
    assert in_phase(trace, "forward").count(TOKENS * 16 * 2) == 3  # the input in bfloat16, projected, turned


def test_the_rotary_module_turns_in_place_and_keeps_its_tables() -> None:
    def run(x: Tensor) -> Tensor:
        from flash_attn.layers.rotary import RotaryEmbedding

        return RotaryEmbedding(8, device=x.device)(x.unflatten(-1, (3, 1, 16)))

    trace = simulated(run, width=48)
    stacked, table = TOKENS * 48 * 2, SEQ * 4 * 2
    assert in_phase(trace, "forward").count(stacked) == 1  # projected
    assert in_phase(trace, "forward").count(table) == 2  # cosine and sine of half the rotated values
    assert in_phase(trace, "backward").count(stacked) == 1  # from float32


@pytest.mark.parametrize("inplace", [False, True])
def test_the_loss_keeps_one_number_a_token_beside_the_logits(inplace: bool) -> None:
    def run(x: Tensor) -> Tensor:
        from flash_attn.losses.cross_entropy import CrossEntropyLoss

        labels = torch.zeros(TOKENS, dtype=torch.int64, device=x.device)
        return CrossEntropyLoss(inplace_backward=inplace)(x.flatten(0, 1), labels)

    trace = simulated(run, width=512)
    logits = TOKENS * 512 * 2
    assert in_phase(trace, "forward").count(logits) == 1  # projected
    assert in_phase(trace, "forward").count(TOKENS * 4) == 3  # losses, log-sum-exp, and its part of the losses
    assert in_phase(trace, "backward").count(logits) == (0 if inplace else 1)


def test_the_norm_keeps_the_sum_with_the_residual_and_one_number_a_token() -> None:
    def run(x: Tensor) -> Tensor:
        from flash_attn.ops.triton.layer_norm import RMSNorm

        norm = RMSNorm(256, device=x.device, dtype=x.dtype)
        out, residual = norm(x, prenorm=True, residual_in_fp32=True)
        return out + residual

    trace = simulated(run, width=256)
    values = TOKENS * 256
    assert in_phase(trace, "forward").count(values * 2) == 2  # projected, normalized
    assert in_phase(trace, "forward").count(values * 4) == 2  # the residual in float32, and the last sum
    assert in_phase(trace, "forward").count(TOKENS * 4) == 1  # the reciprocal of each norm
    assert 8 * 108 * 256 * 4 in in_phase(trace, "backward")  # a gradient of the weights for each program


def module_of_the_package(x: Tensor) -> Tensor:
    from flash_attn.modules.mha import MHA

    return MHA(16)(x)


def inference(x: Tensor) -> Tensor:
    from flash_attn import flash_attn_with_kvcache

    return flash_attn_with_kvcache(x, x, x)


def hopper(x: Tensor) -> Tensor:
    from flash_attn_interface import flash_attn_func

    return flash_attn_func(*heads(x))


def huge(x: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(*(x.unflatten(-1, (1, -1)),) * 3)


@pytest.mark.parametrize(
    ("run", "settings", "message"),
    [
        (dense, {"dtype": torch.float32}, "flash_attn takes float16 or bfloat16, and got float32.*dtype=bf16"),
        (dense, {"device": "t4"}, "compute capability 8.0 or later; t4 has 7.5. Use another attention"),
        (huge, {}, "heads of at most 256 values, and got 512"),
        (hopper, {}, "FlashAttention-3 needs a Hopper GPU.*a100-40gb has 8.0"),
        (inference, {}, "is for inference"),
        (module_of_the_package, {}, "flash_attn.modules.mha is not simulated: nothing stands in"),
        (dense, {"device": "cpu"}, "No module named 'flash_attn'"),
    ],
)
def test_what_the_package_refuses_is_refused_with_the_line(run: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TargetError, match=f"(?s){message}.*test_flash_attn.py"):
        simulated(run, **settings)


def test_a_recorded_run_without_the_package_fails_as_usual() -> None:
    with pytest.raises(TargetError, match="No module named 'flash_attn'"):
        record(workload(dense), device="cpu")


def test_nothing_is_left_after_a_simulation_and_nothing_is_seen_by_what_it_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "outlives.py").write_text("import importlib.util\nSEES = importlib.util.find_spec('flash_attn')\n")
    monkeypatch.syspath_prepend(tmp_path)
    finders, kept = [*sys.meta_path], []

    def run(x: Tensor) -> Tensor:
        import flash_attn

        assert importlib.metadata.version("flash-attn") == flash_attn.__version__ == "2.8.3"
        assert importlib.metadata.packages_distributions()["flash_attn_interface"] == ["flash_attn_3"]
        assert importlib.import_module("outlives").SEES is None
        assert importlib.util.find_spec("flash_attn") is not None
        kept.append(flash_attn.flash_attn_func)
        raise KeyError("an error of the target")

    with pytest.raises(TargetError, match="an error of the target"):
        simulated(run)
    assert not any(name.startswith("flash_attn") for name in sys.modules)
    assert sys.meta_path == finders
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("flash-attn")
    with pytest.raises(TargetError, match="in a simulation that has ended"):
        kept[0](*(torch.zeros(1, 1, 1, 8),) * 3)


def test_a_module_of_the_target_may_import_the_package_at_its_top(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = "import flash_attn.bert_padding\nfrom flash_attn import flash_attn_func as attend\n"
    (tmp_path / "own_attention.py").write_text(top)
    monkeypatch.syspath_prepend(tmp_path)

    def run(x: Tensor) -> Tensor:
        return importlib.import_module("own_attention").attend(*heads(x))

    assert taken(simulated(run), "flash_attn_2_forward") == SAVED
    with pytest.raises(ModuleNotFoundError, match="flash_attn"):
        importlib.import_module("own_attention")


def test_an_installed_package_is_replaced_and_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flash_attn.py").write_text("def flash_attn_func(*args, **kwargs): raise RuntimeError('no GPU')\n")
    (tmp_path / "flash_attn-2.7.4.dist-info").mkdir()
    (tmp_path / "flash_attn-2.7.4.dist-info/METADATA").write_text("Name: flash_attn\nVersion: 2.7.4\n")
    monkeypatch.syspath_prepend(tmp_path)
    real = importlib.import_module("flash_attn")
    try:
        (note,) = simulated(dense).meta["notes"]
        assert note.startswith("flash_attn 2.7.4 does not run in a simulation: its functions stand in")
        assert sys.modules["flash_attn"] is real
    finally:
        del sys.modules["flash_attn"]
