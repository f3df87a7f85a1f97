"""What a recorder writes into the history of PyTorch's allocator, where PyTorch can annotate it."""

import json
from types import SimpleNamespace

import pytest
import torch

from memscope.gpu.watch import _block_annotation
from memscope.hooks.allocations import UNKNOWN, Allocations
from memscope.hooks.labels import number_of, read_label
from memscope.hooks.lifetimes import Lifetimes
from memscope.hooks.moments import Moments
from memscope.trace import PHASES

FORWARD = PHASES.index("forward")


@pytest.fixture
def followed(monkeypatch):
    """Lifetimes of storages on the host as if they were on a GPU, and the labels: of operators, and of blocks."""
    monkeypatch.setattr(Lifetimes, "_has_memory", lambda self, tensor: True)
    of_operators, of_blocks = [], []
    moments = Moments()
    moments.name_with(["", "aten.mm.default"], ["(model)", 'head."x"'])
    moments.annotate_with(of_operators.append, lambda address, text: of_blocks.append((address, json.loads(text))))
    here = SimpleNamespace(module=0, phase=FORWARD, step=2, micro_batch=1, serves_backward=True, is_recorded=True)
    seen = Allocations()
    return SimpleNamespace(
        lifetimes=Lifetimes(seen, here, moments),
        seen=seen,
        moments=moments,
        of_operators=of_operators,
        of_blocks=of_blocks,
    )


def test_an_operator_is_told_with_its_module_and_place(followed):
    followed.moments.begin(1, 1, FORWARD, 2, 1)
    followed.moments.end()
    text, cleared = followed.of_operators
    assert json.loads(text) == {
        "memscope": 1,
        "number": 0,
        "phase": "forward",
        "step": 2,
        "micro_batch": 1,
        "op": "aten.mm.default",
        "module": 'head."x"',
    }
    assert read_label(text) == json.loads(text)
    assert number_of(text) == 0
    assert cleared == ""
    assert number_of("step 3") == number_of(cleared) == -1


def test_a_block_is_told_when_its_category_is_known_and_only_then(followed):
    weight, kept, dies = torch.ones(4), torch.ones(8), torch.ones(16)
    followed.lifetimes.own(weight, "parameter", module=1)
    followed.lifetimes.own(weight, "parameter", module=1)
    told = [(weight.data_ptr(), {"memscope": 1, "category": "parameter", "module": 'head."x"'})]
    assert followed.of_blocks == told
    before = len(followed.of_blocks)
    followed.lifetimes.see(kept, 1, UNKNOWN)
    followed.lifetimes.see(dies, 1, UNKNOWN)
    del dies
    assert len(followed.of_blocks) == before
    followed.seen.keep_pending()
    assert followed.of_blocks[before:] == [
        (kept.data_ptr(), {"memscope": 1, "category": "activation", "module": "(model)"})
    ]


def test_memory_that_is_not_the_allocators_is_left_alone(monkeypatch):
    told = []

    def annotate(address, text):  # PyTorch 2.15, tried with its compiled allocator
        if address != 512:
            raise RuntimeError(f"annotateMemory: no live allocation found at pointer {address:#x}")
        told.append(text)

    monkeypatch.setattr(torch._C, "_cuda_annotateMemory", annotate, raising=False)
    annotate_block = _block_annotation()
    annotate_block(1024, "elsewhere")
    annotate_block(512, "here")
    assert told == ["here"]


def test_a_pytorch_that_cannot_annotate_a_block_is_not_asked(monkeypatch):
    monkeypatch.delattr(torch._C, "_cuda_annotateMemory", raising=False)
    assert _block_annotation() is None
