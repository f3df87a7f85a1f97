"""The tensors of a batch are found in any container."""

from collections import UserDict, namedtuple
from dataclasses import dataclass, field

import pytest
import torch

from memscope.workload.batch import map_tensors, tensors_in
from memscope.workload.split import split_batch

ONE, TWO = torch.ones(1), torch.ones(2)


@dataclass
class Plain:
    one: torch.Tensor
    name: str = "text"
    rest: list = field(default_factory=list)
    made_later: torch.Tensor = field(init=False)


@dataclass(frozen=True, slots=True)
class Frozen:
    one: torch.Tensor


class Encoding(UserDict):
    """Like transformers' BatchEncoding: a UserDict with further attributes."""

    def __init__(self, data):
        super().__init__(data)
        self.encodings = ["kept"]


Pair = namedtuple("Pair", "first second")


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        (ONE, 1), ([ONE, (TWO, 3)], 2), ({"a": ONE, "b": None}, 1), (Pair(ONE, TWO), 2), (Plain(ONE, rest=[TWO]), 2),
        (Frozen(ONE), 1), (Encoding({"ids": ONE, "mask": TWO}), 2), ({"nested": [Encoding({"x": Plain(ONE)})]}, 1),
        ("text", 0), (Plain, 0),
    ],
)  # fmt: skip
def test_every_tensor_is_found(batch, count):
    assert [tensor.numel() for tensor in tensors_in(batch)] == [1, 2][:count]


def test_a_mapped_batch_keeps_its_type_and_everything_else():
    batch = Encoding({"ids": ONE, "inner": Frozen(TWO), "text": "as it is"})
    mapped = map_tensors(lambda tensor: tensor + 1, batch)
    assert type(mapped) is Encoding
    assert mapped.encodings == ["kept"]
    assert (mapped["ids"].item(), mapped["inner"].one.tolist(), mapped["text"]) == (2.0, [2.0, 2.0], "as it is")


def test_the_batch_itself_is_unchanged():
    for batch in (Plain(ONE), Frozen(ONE), Encoding({"one": ONE})):
        map_tensors(torch.zeros_like, batch)
        assert tensors_in(batch)[0] is ONE


@pytest.mark.parametrize(
    "wrap", [lambda t: Plain(t, rest=None), lambda t: Frozen(t), lambda t: Encoding({"one": t, "n": 3})]
)
def test_a_batch_of_any_kind_is_split_into_pieces_of_its_kind(wrap):
    batch = wrap(torch.arange(6))
    pieces = split_batch(batch, 3)
    assert [type(piece) for piece in pieces] == [type(batch)] * 3
    assert [tensors_in(piece)[0].tolist() for piece in pieces] == [[0, 1], [2, 3], [4, 5]]
