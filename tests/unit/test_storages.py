"""Every birth and free of a storage is seen, whatever happens to its tensors.

The tests run on the CPU, so bytes are elements times item size.
"""

import gc

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from memscope import Recorder
from memscope.errors import MemscopeError
from memscope.trace import CATEGORIES


def sizes(trace):
    """`(bytes, was freed)` of every allocation made after the model, in order of birth."""
    made = trace.step >= -1
    taken_in = trace.op == 0
    return [
        (int(s), bool(f >= 0)) for s, f in zip(trace.size[made & ~taken_in], trace.freed[made & ~taken_in], strict=True)
    ]


@pytest.fixture
def watched():
    model = nn.Linear(2, 2)

    def run(body):
        with Recorder(model) as recorder:
            kept = body()
        trace = recorder.trace()
        del kept
        return trace

    return run


def test_views_and_aliases_share_one_allocation(watched):
    trace = watched(lambda: [t := torch.ones(10), t.view(2, 5), t[3:], t.detach(), t.data, t.t(), t.unsqueeze(0)])
    assert sizes(trace) == [(40, False)]


def test_in_place_operators_allocate_nothing(watched):
    def body():
        tensor = torch.ones(10)
        tensor.add_(1).mul_(2)
        tensor[2:4] = 0
        return tensor

    # Writing through an index fills a view with a number: the number itself is a 4-byte tensor, freed at once.
    assert [s for s in sizes(watched(body)) if s[0] > 8] == [(40, False)]


def test_a_storage_dies_with_its_last_view_not_with_its_tensor(watched):
    def body():
        view = torch.ones(10)[5:]
        marker = torch.ones(3)
        del view
        return marker

    trace = watched(body)
    first, marker = (int(i) for i in range(len(trace)) if trace.size[i] in (40, 12))
    assert trace.freed[first] > trace.born[marker]


def test_resizing_a_tensor_replaces_its_allocation(watched):
    trace = watched(lambda: torch.ones(10).resize_(100))
    assert sizes(trace) == [(40, True), (400, False)]


def test_a_storage_resized_to_nothing_is_freed_and_comes_back_with_its_new_size(watched):
    def body():
        tensor = torch.ones(10)
        tensor.untyped_storage().resize_(0)
        tensor.untyped_storage().resize_(80)
        return tensor

    assert sizes(watched(body)) == [(40, True), (80, False)]


def test_an_out_argument_of_the_wrong_size_grows(watched):
    def body():
        out = torch.empty(1)
        torch.add(torch.ones(50), torch.ones(50), out=out)
        return out

    with pytest.warns(UserWarning, match="resized"):
        trace = watched(body)
    assert (200, False) in sizes(trace)


def test_set_moves_a_tensor_to_another_storage_and_the_old_one_dies(watched):
    def body():
        tensor, other = torch.ones(10), torch.ones(20)
        tensor.set_(other)
        return tensor

    assert sizes(watched(body)) == [(40, True), (80, False)]


def test_empty_tensors_are_not_allocations(watched):
    assert sizes(watched(lambda: torch.empty(0))) == []


def test_a_sparse_tensor_counts_its_indices_and_values(watched):
    def body():
        return torch.eye(4).to_sparse()

    # 4 entries: indices 2 x 4 int64 = 64 bytes, values 4 float32 = 16 bytes.
    alive = sorted(size for size, freed in sizes(watched(body)) if not freed)
    assert 64 in alive
    assert 16 in alive


def test_pytorchs_resize_is_restored_after_recording_even_after_an_exception():
    before = torch.UntypedStorage.resize_
    with pytest.raises(RuntimeError, match="stop"), Recorder(nn.Linear(2, 2)):
        raise RuntimeError("stop")
    assert torch.UntypedStorage.resize_ is before


def test_recording_does_not_prolong_any_lifetime():
    recorder = Recorder(nn.Linear(2, 2))
    with recorder:
        tensor = torch.ones(1000)
        alive = torch.ones(1)
        del tensor
        gc.disable()
    gc.enable()
    trace = recorder.trace()
    assert [bool(f >= 0) for s, f in zip(trace.size, trace.freed, strict=True) if s == 4000] == [True]
    del alive


def test_a_recording_without_any_tensor_says_so():
    recorder = Recorder(nn.Identity())
    with recorder:
        pass
    with pytest.raises(MemscopeError, match="nothing was recorded"):
        recorder.trace()


def test_a_resize_allocates_before_it_frees(watched):
    trace = watched(lambda: torch.ones(10).resize_(100))
    old, new = (int(i) for i in range(len(trace)) if trace.size[i] in (40, 400))
    assert trace.freed[old] == trace.born[new] + 1
    assert trace.allocated[trace.born[new]] == trace.allocated[trace.born[new] - 1] + 400  # both at once


def test_a_storage_at_the_address_of_one_that_died_is_a_new_allocation(watched):
    def body():
        addresses = set()
        for count in range(1, 100):
            addresses.add(torch.ones(count).untyped_storage()._cdata)  # dies at once
        assert len(addresses) < 99, "no address was used again: the test shows nothing"

    assert sizes(watched(body)) == [(4 * count, True) for count in range(1, 100)]


def test_a_storage_at_the_address_of_one_on_the_host_is_an_allocation():
    recorder = Recorder(nn.Linear(2, 2), on_gpu=True)  # there, torch.tensor(x) stays on the host
    used_again = []
    with recorder:
        for _ in range(100):
            host = torch.tensor(1.0).untyped_storage()._cdata  # dies at once
            used_again.append(torch.ones(1).untyped_storage()._cdata == host)
    assert any(used_again), "no address was used again: the test shows nothing"
    assert sizes(recorder.trace()) == [(4, True)] * 100


def test_an_activation_at_the_address_of_an_unread_batch_that_died_is_no_input():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    with Recorder(model) as recorder:
        for _ in range(50):
            unread = torch.empty(16, 8).untyped_storage()._cdata  # dies unread
            del unread
            model(torch.ones(16, 8)).sum().backward()
    trace = recorder.trace()
    tanh = trace.op == trace.ops.index("aten.tanh.default")
    assert {CATEGORIES[code] for code in trace.category[tanh]} == {"activation"}


def test_resizes_are_seen_after_an_operator_was_taken_apart(watched):
    def body():
        tensor = torch.ones(10)
        with torch.inference_mode():
            torch.ones(3, 3).matmul(torch.ones(3, 3))  # a composite operator: taken apart under inference mode alone
        tensor.untyped_storage().resize_(0)
        torch.ones(7)
        return tensor

    trace = watched(body)
    resized, later = (int(i) for i in range(len(trace)) if trace.size[i] in (40, 28))
    assert 0 <= trace.freed[resized] < trace.born[later]


def test_an_operator_with_a_kernel_of_its_own_is_not_taken_apart():
    # PyTorch can also compute the gradient of SiLU from sigmoid, mul and sub; its CPU kernel makes one tensor.
    model = nn.Sequential(nn.Linear(8, 8), nn.SiLU())
    with Recorder(model) as recorder:
        model(torch.ones(16, 8)).sum().backward()
    trace = recorder.trace()
    assert (trace.op == trace.ops.index("aten.silu_backward.default")).sum() == 1
    assert not any(name.startswith("aten.sigmoid") for name in trace.ops)


def test_tensors_without_memory_are_no_allocations(watched):
    def body():
        with FakeTensorMode():
            fake = torch.ones(10) + 1  # works out a shape, as users and DTensor do
        return [fake, torch.ones(20, device="meta"), torch.ones(30)]

    assert sizes(watched(body)) == [(120, False)]
