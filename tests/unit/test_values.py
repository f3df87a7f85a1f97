"""The values of integer and boolean tensors that a simulation knows: what a target may ask, and what it may not."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from memscope import StepPlan, Workload, record, simulate
from memscope.errors import TargetError


class Positions(nn.Module):
    """A linear layer with the buffer `positions`, 0 to 7, and a norm whose weights begin as ones."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.positions = nn.Buffer(torch.arange(8))


def workload(question, answers, integers, convert=lambda model: model):
    """A workload whose loss asks `question(model, integers, floats)` and keeps the answer."""

    def loss(model, batch):
        floats, integers = batch
        answers.append(question(model, integers, floats))
        return model.norm(model.linear(floats)).square().mean()

    return Workload(
        model=convert(Positions()),
        batches=[[torch.randn(4, 8), integers]],
        loss=loss,
        optimizer_factory=torch.optim.SGD,
    )


def answer(question, integers=None, device="gpu", convert=lambda model: model):
    """The answer to `question(model, integers, floats)` in each of two simulated steps; the integers are `[4, 8]`.

    Nothing may be assumed.
    """
    answers = []
    integers = torch.ones(4, 8, dtype=torch.int64) if integers is None else integers
    simulate(lambda: workload(question, answers, integers, convert), device=device, assume="refuse")
    first, second = answers
    assert first == second
    return first


@pytest.mark.parametrize("device", ["gpu", "cpu"])
def test_a_mask_of_the_batch_has_its_values(device):
    padded = torch.ones(4, 8, dtype=torch.int64)
    padded[1, 5:] = 0
    ask = lambda model, mask, floats: bool(mask.to(torch.bool).sum() == mask.numel())  # noqa: E731
    assert answer(ask, device=device) is True
    assert answer(ask, padded, device=device) is False
    assert answer(lambda model, mask, floats: mask.sum(-1).tolist(), padded, device=device) == [8, 5, 8, 8]


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        (lambda model, ids, floats: ids[0, :3].tolist(), [1, 1, 1]),
        (lambda model, ids, floats: torch.arange(3, 6, device=ids.device).tolist(), [3, 4, 5]),
        (lambda model, ids, floats: model.positions.max().item(), 7),
        (lambda model, ids, floats: floats.new_ones(2, dtype=torch.bool).all().item(), True),
        (lambda model, ids, floats: torch.zeros_like(floats, dtype=torch.int32).sum().item(), 0),
        (lambda model, ids, floats: torch.equal(ids, torch.ones_like(ids)), True),
        (lambda model, ids, floats: int(ids.T.contiguous().cpu().cuda().sum()), 32),
        (lambda model, ids, floats: torch.full((2,), 5, pin_memory=True).tolist(), [5, 5]),
        (lambda model, ids, floats: torch.ones(4, 8)[:, None].to(torch.bool).all().item(), True),
        (lambda model, ids, floats: (torch.full((4,), fill_value=0.5) > 0.4).sum().item(), 4),
        (lambda model, ids, floats: bool((torch.zeros_like(floats) == 0).all()), True),
        (lambda model, ids, floats: torch.linspace(0, 1, 3).tolist(), [0.0, 0.5, 1.0]),
        (lambda model, ids, floats: (2.0 ** torch.arange(0, 4, device=ids.device).float()).sum().item(), 15.0),
        (lambda model, ids, floats: (torch.ones(4).mul_(2) == 1).any().item(), False),
        (lambda model, ids, floats: (torch.ones(4) + 1).max().item(), 2.0),
        (lambda model, ids, floats: torch.ones(2**22 + 1, dtype=torch.bool).logical_not().any().item(), False),
        (lambda model, ids, floats: torch.empty(3, dtype=torch.int64).fill_(5).tolist(), [5, 5, 5]),
        (lambda model, ids, floats: [*floats[ids.triu().bool()].shape], [8 + 7 + 6 + 5]),
        (lambda model, ids, floats: torch.arange(4, device=ids.device).remainder(2).nonzero().tolist(), [[1], [3]]),
        (lambda model, ids, floats: torch.bincount(ids.flatten()).tolist(), [0, 32]),
        (lambda model, ids, floats: torch.tensor([ids.sum(), ids[0, 0]]).tolist(), [32, 1]),
        (lambda model, ids, floats: np.asarray(ids.cpu()).shape, (4, 8)),
        (lambda model, ids, floats: torch.arange(3).float().numpy().tolist(), [0.0, 1.0, 2.0]),
    ],
    ids=[
        "view", "arange", "buffer", "new_ones", "zeros_like", "equal", "copies", "pinned", "ones", "full", "filled",
        "linspace", "power", "changed", "computed", "large", "fill_", "mask", "nonzero", "bincount", "list of numbers",
        "array", "array of floats",
    ],
)  # fmt: skip
def test_numbers_that_follow_from_known_ones_are_known(question, expected):
    assert answer(question) == expected


def test_a_buffer_keeps_its_values_when_its_module_is_copied_or_given():
    ask = lambda model, ids, floats: model.positions.tolist()  # noqa: E731
    assert answer(ask, convert=copy.deepcopy) == list(range(8))
    answers = []
    simulate(workload(ask, answers, torch.ones(1, dtype=torch.int64)))
    assert answers == [list(range(8))] * 2


def test_a_target_may_read_integers_while_it_builds_its_model():
    def convert(model):
        assert model.positions[2:].tolist() == [2, 3, 4, 5, 6, 7]
        return model

    answer(lambda model, ids, floats: None, convert=convert)


def test_an_operation_in_place_on_a_view_changes_the_values_of_all_views():
    def question(model, mask, floats):
        mask = mask.clone()
        flat = mask.view(-1)
        mask[1, 5:] = 0
        flat[0] += 4
        return flat.sum().item(), mask[0, 0].item()

    assert answer(question) == (32 - 3 + 4, 5)


def test_the_values_of_the_batch_are_those_of_the_host_in_every_step():
    def question(model, mask, floats):
        mask.zero_()
        return mask.sum().item()

    kept = torch.ones(4, 8, dtype=torch.int64)
    assert answer(question, kept) == 0
    assert kept.sum() == 32


@pytest.mark.parametrize(
    "question",
    [
        lambda model, ids, floats: model.linear(floats).sum().item(),
        lambda model, ids, floats: (model.linear(floats) > 0).any().item(),
        lambda model, ids, floats: torch.randint(0, 9, (3,)).sum().item(),
        lambda model, ids, floats: torch.empty(3, dtype=torch.int64).sum().item(),
        lambda model, ids, floats: ids.random_(0, 4).sum().item(),
        lambda model, ids, floats: ids.copy_(model.linear(floats)).sum().item(),
        lambda model, ids, floats: ids[0].copy_(model.linear(floats)[0]) is not None and ids.sum().item(),
        lambda model, ids, floats: ids.view(torch.float64).copy_(model.linear(floats)) is not None and ids.sum().item(),
        lambda model, ids, floats: torch.ones(2**16 + 1).view(torch.int32).sum().item(),
        lambda model, ids, floats: bool((model.linear.weight == 1).all()),
        lambda model, ids, floats: model.linear(floats).relu().nonzero(),
        lambda model, ids, floats: floats[model.linear(floats) > 0],
        lambda model, ids, floats: model.linear(floats).cpu().numpy(),
    ],
    ids=[
        "float",
        "of floats",
        "random",
        "empty",
        "random in place",
        "written",
        "view written",
        "as floats",
        "other type",
        "weight",
        "nonzero",
        "mask",
        "array",
    ],
)
def test_a_value_that_depends_on_unknown_numbers_is_refused(question):
    with pytest.raises(TargetError, match=r"needs the values? of a tensor"):
        answer(question)


def test_values_add_no_allocation_and_change_no_size():
    def sizes(question):
        return simulate(lambda: workload(question, [], torch.ones(4, 8, dtype=torch.int64))).requested.tolist()

    shapes = sizes(lambda model, ids, floats: ids.to(torch.bool).sum())
    values = sizes(lambda model, ids, floats: ids.to(torch.bool).sum().item())
    assert values == shapes  # reading a number makes no tensor on the device


def test_a_target_cannot_tell_a_fake_tensor_from_another():
    fake = torch._subclasses.FakeTensor
    ask = lambda model, ids, floats: isinstance(floats, torch._subclasses.FakeTensor)  # noqa: E731
    assert answer(ask) is False
    assert torch._subclasses.FakeTensor is fake
    assert not hasattr(torch._subclasses, "__getattr__")


def test_a_class_that_a_target_keeps_tells_fake_tensors_again_after_the_simulation():
    kept = []
    answer(lambda model, ids, floats: kept.append(torch._subclasses.FakeTensor))
    with torch._subclasses.FakeTensorMode():
        assert isinstance(torch.ones(1), kept[0])
    assert not isinstance(torch.ones(1), kept[0])


def test_a_batch_that_the_target_builds_has_its_values_too():
    answers = []

    def build():
        labels = torch.tensor([[1, 2, -100, -100]] * 4)
        built = workload(lambda model, ids, floats: (ids != -100).sum().item(), answers, labels)
        built.weight = lambda batch: float((batch[1] != -100).sum())
        built.plan = StepPlan(micro_batches=2)
        return built

    simulate(build)
    assert answers == [4] * 4  # two labels in each of two samples, in two micro-batches of two steps


def test_a_result_that_a_kernel_shrinks_keeps_its_memory_and_its_values():
    # unique_consecutive allocates as many numbers as it is given, 32, and returns 8 of them.
    def build():
        return workload(lambda model, integers, floats: integers.unique_consecutive().tolist(), answers, repeated)

    answers, repeated = [], torch.arange(8).repeat_interleave(4).view(4, 8)
    simulated, real = simulate(build, device="cpu"), record(build)
    assert answers == 4 * [list(range(8))]
    assert simulated.requested.tolist() == real.requested.tolist()


def test_real_numbers_of_the_host_stay_what_they_are_while_the_batch_is_split():
    def split(batch, parts):
        counts = torch.tensor([2, 1])
        seen.append((torch.arange(2).repeat_interleave(counts).tolist(), counts.nonzero().tolist()))
        return list(batch.chunk(parts))

    seen: list[tuple[list[int], list[list[int]]]] = []
    model = nn.Linear(4, 4)
    plan = StepPlan(micro_batches=2)
    batches = [torch.ones(2, 4)]
    simulate(Workload(model, batches, lambda m, x: m(x).sum(), torch.optim.SGD, plan=plan, split=split), steps=1)
    assert seen[0] == ([0, 0, 1], [[0], [1]])
