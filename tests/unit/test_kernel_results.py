"""Results of kernels: their storages, dtypes and order as on the device."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memscope import Workload, record, simulate
from memscope.errors import TargetError
from memscope.simulation import device_memory
from memscope.trace import CATEGORIES, PHASES

N = 1000 * 8


def bernoulli(x, y, reduction="mean"):
    return F.binary_cross_entropy(x.sigmoid(), y, reduction=reduction)


LOSSES = [
    F.mse_loss, F.smooth_l1_loss, F.huber_loss, F.soft_margin_loss, F.l1_loss, F.binary_cross_entropy_with_logits,
    F.poisson_nll_loss, bernoulli,
]  # fmt: skip


def workload(model, loss, batch=None, optimizer=torch.optim.SGD):
    def build():
        return Workload(model(), [torch.ones(1000, 8) if batch is None else batch], loss, optimizer, name="mine")

    return build


def made(trace, op, step=1):
    """Requested bytes of each allocation of an operator in a step, in order of birth."""
    code = trace.ops.index(op)
    return trace.requested[(trace.op == code) & (trace.step == step)].tolist()


def rows(trace):
    """Every allocation. The operator that moves the batch to the device differs if nothing is copied."""
    names = ["brought" if name in ("aten.clone.default", "aten.empty_strided.default") else name for name in trace.ops]
    return [
        (names[op], int(size), CATEGORIES[category], PHASES[phase], int(born), int(freed))
        for op, size, category, phase, born, freed in zip(
            trace.op, trace.requested, trace.category, trace.phase, trace.born, trace.freed, strict=True
        )
    ]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_simulated_loss_allocates_what_a_real_one_does(loss, reduction):
    build = workload(lambda: nn.Linear(8, 8), lambda m, x: loss(m(x), x, reduction=reduction).mean())
    assert rows(simulate(build, device="cpu")) == rows(record(build))


@pytest.mark.parametrize(
    ("loss", "op"),
    [
        (F.mse_loss, "aten.mse_loss.default"),
        (F.smooth_l1_loss, "aten.smooth_l1_loss.default"),
        (F.soft_margin_loss, "aten.soft_margin_loss.default"),
        (bernoulli, "aten.binary_cross_entropy.default"),
    ],
)
def test_a_mean_loss_keeps_a_storage_as_large_as_its_input(loss, op):
    sizes = made(simulate(workload(lambda: nn.Linear(8, 8), lambda m, x: loss(m(x), x))), op)
    assert sizes[0] == 4 * N


def test_on_a_gpu_mse_loss_holds_the_losses_twice_for_a_moment():
    trace = simulate(workload(lambda: nn.Linear(8, 8), lambda m, x: F.mse_loss(m(x), x)))
    assert made(trace, "aten.mse_loss.default") == [4 * N, 4 * N]  # the result and the losses
    of_loss = (trace.op == trace.ops.index("aten.mse_loss.default")) & (trace.step == 1)
    assert [CATEGORIES[category] for category in trace.category[of_loss]] == ["activation", "workspace"]


def test_fused_rms_norm_keeps_its_input_and_one_float_a_row():
    if not hasattr(torch.ops.aten, "_fused_rms_norm_backward"):
        pytest.skip("PyTorch before 2.9 has no fused kernel")
    trace = simulate(workload(lambda: nn.Sequential(nn.Linear(8, 8), nn.RMSNorm(8)), lambda m, x: m(x).sum()))
    forward = (trace.step == 1) & (trace.phase == PHASES.index("forward"))
    assert made(trace, "aten._fused_rms_norm.default") == [
        4 * N,
        4 * 1000,
    ]  # the result; 1 / root mean square of 1000 rows
    kept = forward & (trace.category == CATEGORIES.index("activation"))
    # The linear layer's output, which the norm keeps, and the 1000 floats; the norm's own result only feeds a sum.
    assert sorted(trace.requested[kept].tolist()) == [4 * 1000, 4 * N]
    assert made(trace, "aten._fused_rms_norm_backward.default") == [4 * N, 4 * 8]  # gradients of input and weight


def test_rms_norm_of_16_bit_weights_keeps_float32_statistics_and_16_bit_values():
    if not hasattr(torch.ops.aten, "_fused_rms_norm_backward"):
        pytest.skip("PyTorch before 2.9 has no fused kernel")
    model = lambda: nn.RMSNorm(8, dtype=torch.bfloat16)  # noqa: E731
    trace = simulate(workload(model, lambda m, x: m(x).sum(), torch.ones(1000, 8, dtype=torch.bfloat16)))
    assert made(trace, "aten._fused_rms_norm.default") == [2 * N, 4 * 1000]


def test_rms_norm_is_taken_apart_on_a_cpu_as_it_runs_there():
    build = workload(lambda: nn.Sequential(nn.Linear(8, 8), nn.RMSNorm(8)), lambda m, x: m(x).sum())
    assert rows(simulate(build, device="cpu")) == rows(record(build))


def test_layer_norm_of_16_bit_weights_keeps_float32_statistics():
    model = lambda: nn.LayerNorm(8, dtype=torch.bfloat16)  # noqa: E731
    trace = simulate(workload(model, lambda m, x: m(x).sum(), torch.ones(1000, 8, dtype=torch.bfloat16)))
    assert made(trace, "aten.native_layer_norm.default") == [2 * N, 4 * 1000, 4 * 1000]


def test_batch_norm_under_autocast_keeps_float32_statistics():
    def build():
        model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16))
        return Workload(model, [torch.ones(2, 3, 4, 4)], lambda m, x: m(x).sum(), torch.optim.SGD, name="convolution")

    trace = simulate(build, strategies="amp:dtype=bf16")
    assert made(trace, "aten.native_batch_norm.default") == [2 * 16 * 4 * 4 * 2, 4 * 16, 4 * 16]


def test_dropout_makes_its_mask_before_its_result():
    trace = simulate(workload(lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)), lambda m, x: m(x).sum()))
    assert made(trace, "aten.native_dropout.default") == [N, 4 * N]


class Attention(nn.Module):
    def __init__(self, dtype, dropout_p=0.0):
        super().__init__()
        self.project, self.dropout_p = nn.Linear(64, 3 * 64, dtype=dtype), dropout_p

    def forward(self, x):
        query, key, value = self.project(x).unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(query, key, value, dropout_p=self.dropout_p)


def attended(dtype, device, dropout_p=0.0):
    batch = torch.ones(2, 32, 64, dtype=dtype)
    return simulate(workload(lambda: Attention(dtype, dropout_p), lambda m, x: m(x).sum(), batch), device=device)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_seed_and_offset_of_memory_efficient_attention_stay_on_the_host(monkeypatch, dropout_p):
    monkeypatch.setattr(device_memory, "_torch_version", lambda: (2, 13))
    # Output [2, 2, 32, 32] and a float for each of 2 · 2 · 32 rows.
    assert made(attended(torch.float32, "a100-40gb", dropout_p), OP.format("efficient")) == [4 * 4096, 4 * 128]


def test_newer_pytorch_makes_seed_and_offset_on_the_gpu_first_if_there_is_no_dropout(monkeypatch):
    monkeypatch.setattr(device_memory, "_torch_version", lambda: (2, 14))
    assert made(attended(torch.float32, "a100-40gb"), OP.format("efficient")) == [8, 8, 4 * 4096, 4 * 128]
    assert made(attended(torch.float32, "a100-40gb", 0.1), OP.format("efficient")) == [4 * 4096, 4 * 128]


OP = "aten._scaled_dot_product_{}_attention.default"


def test_cudnn_attention_makes_seed_and_offset_first_and_its_workspace_is_named_as_an_estimate(monkeypatch):
    platform = device_memory.torch.__version__.split(".")[:2]
    if tuple(map(int, platform)) < (2, 11):
        pytest.skip("PyTorch before 2.11 comes with a cuDNN that it does not prefer")
    trace = attended(torch.bfloat16, "h100-80gb")
    assert made(trace, OP.format("cudnn")) == [8, 8, 2 * 4096, 4 * 128]
    assert "cuDNN attention workspace" in trace.meta["estimated_workspaces"]


@pytest.mark.parametrize("optimizer", [torch.optim.Adafactor, torch.optim.ASGD])
@pytest.mark.parametrize("device", ["gpu", "cpu"])
def test_an_optimizer_whose_step_depends_on_values_it_reads_is_simulated(optimizer, device):
    trace = simulate(workload(lambda: nn.Linear(8, 8), lambda m, x: m(x).sum(), None, optimizer), device=device)
    assert trace.max_by_category(1)["optimizer_state"] > 0


def test_adafactor_keeps_a_row_and_a_column_of_a_matrix():
    def build():
        model = nn.Linear(256, 128, bias=False)
        return Workload(model, [torch.ones(4, 256)], lambda m, x: m(x).sum(), torch.optim.Adafactor, name="factored")

    for trace in (simulate(build, device="cpu"), record(build)):
        assert trace.max_by_category(1)["optimizer_state"] == 4 * 256 + 4 * 128 + 4  # and its step counter


def test_adafactor_takes_the_same_memory_as_in_a_real_run():
    build = workload(lambda: nn.Linear(8, 8), lambda m, x: m(x).sum(), None, torch.optim.Adafactor)
    assert rows(simulate(build, device="cpu")) == rows(record(build))


def test_another_optimizer_that_reads_values_is_named():
    class Impatient(torch.optim.SGD):
        def step(self, closure=None):
            if self.param_groups[0]["params"][0].grad.norm().item() > 1:
                super().step(closure)

    with pytest.raises(TargetError, match=r"the optimizer Impatient needs the value of a tensor.*Use another"):
        simulate(workload(lambda: nn.Linear(8, 8), lambda m, x: m(x).square().sum(), None, Impatient), assume="refuse")


@pytest.mark.parametrize("device", ["gpu", "cpu"])
def test_sparse_gradients_are_refused_with_the_reason(device):
    def build():
        model = nn.Embedding(10, 8, sparse=True)
        return Workload(model, [torch.zeros(4, dtype=torch.long)], lambda m, x: m(x).sum(), torch.optim.SparseAdam)

    with pytest.raises(TargetError, match=r"sparse tensors.*cannot be simulated.*depends on values"):
        simulate(build, device=device)


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_refused_with_the_reason_where_only_a_library_knows_their_size(layer):
    build = workload(lambda: layer(8, 8), lambda m, x: m(x)[0].sum(), torch.ones(5, 2, 8))
    with pytest.raises(TargetError, match=r"cuDNN runs nn.LSTM.*only cuDNN knows.*in <lambda>"):
        simulate(build)
    if layer is nn.LSTM:
        with pytest.raises(TargetError, match=r"nn.LSTM cannot be simulated on a CPU: only oneDNN knows.*in <lambda>"):
            simulate(build, device="cpu")
    else:
        assert simulate(build, device="cpu").requested.tolist() == record(build).requested.tolist()


def spoken(lengths_as):
    """A workload with CTC loss of 12 steps, 2 samples and 32 labels; the targets have 3 and 5 labels."""

    def loss(model, x):
        log_probs = model(x).log_softmax(-1).transpose(0, 1)
        targets = torch.arange(1, 11).view(2, 5)
        return F.ctc_loss(log_probs, targets, lengths_as([12, 12]), lengths_as([3, 5]), zero_infinity=True)

    return workload(lambda: nn.Linear(8, 32), loss, torch.ones(2, 12, 8))


def test_ctc_loss_keeps_alpha_for_the_longest_target():
    build = spoken(torch.tensor)
    trace = simulate(build)
    # Lengths of targets and inputs and offsets of targets; 12 steps of 2 samples for 2 · 5 + 1 symbols; the losses.
    alpha = 4 * 2 * 12 * 11
    assert made(trace, "aten._ctc_loss.Tensor") == [8 * 2, 8 * 2, 8 * 2, alpha, 4 * 2]
    assert made(trace, "aten._ctc_loss_backward.Tensor") == [8 * 2, 8 * 2, 8 * 2, alpha, 4 * 12 * 2 * 32]
    assert rows(simulate(build, device="cpu")) == rows(record(build))


def test_ctc_loss_with_lengths_in_lists_is_refused_with_the_remedy():
    with pytest.raises(TargetError, match=r"lengths in tensors only: pass torch.tensor.*in loss: return F.ctc_loss"):
        simulate(spoken(tuple))


def test_the_gradient_of_log_softmax_is_dense_whatever_the_strides_of_its_argument():
    def loss(model, x):
        return (model(x).log_softmax(-1).transpose(0, 1) * torch.ones(3, 4, 8)).sum()

    build = workload(lambda: nn.Linear(8, 8), loss, torch.ones(4, 3, 8))
    assert rows(simulate(build, device="cpu")) == rows(record(build))


def test_the_gradient_of_layer_norm_is_dense_whatever_the_strides_of_its_argument():
    """As in Swin, which pools over positions: a gap would cost a copy in front of the linear layer's product."""

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

        def forward(self, x):
            return nn.functional.adaptive_avg_pool1d(self.norm(self.linear(x)).transpose(1, 2), 1)

    build = workload(Pooled, lambda m, x: m(x).sum(), torch.ones(4, 3, 8))
    assert rows(simulate(build, device="cpu")) == rows(record(build))


@pytest.mark.skipif(not hasattr(torch.ops.aten, "_grouped_mm"), reason="this PyTorch has no grouped product")
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_products_of_groups_pad_each_row_to_16_bytes(device):
    """Four experts of 8 to 21 features on 16 tokens: rows of 21 floats take 24, the last one 21."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 21, 8))

        def forward(self, x):
            offsets = torch.tensor([4, 8, 12, 16], dtype=torch.int32, device=x.device)
            return torch._grouped_mm(x, self.weight.transpose(1, 2), offs=offsets)

    def loss(model, x):
        return model(x).detach().sum() + model.weight.sum()

    build = workload(Experts, loss, torch.ones(16, 8))
    trace = simulate(build, device=device)
    assert made(trace, "aten._grouped_mm.default") == [4 * (15 * 24 + 21)]
    if device == "cpu":
        assert rows(trace) == rows(record(build))
