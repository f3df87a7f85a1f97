"""Recorders in the training loops of frameworks. Those that are not installed are skipped."""

import importlib
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from memscope import Trace
from memscope.errors import UsageError

WIDTH, ROWS = 32, 8
STEPS, OF = 3, 4
"""Steps recorded, and steps trained, each of two micro-batches."""
WEIGHT_BYTES = 4 * (WIDTH * WIDTH + WIDTH) * 2


def net():
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))


def samples():
    return TensorDataset(torch.ones(OF * 2 * ROWS, WIDTH))


def require_steps(trace, logged):
    """The trace has the steps that were asked for, and what was logged of each is what the trace says."""
    assert trace.steps == tuple(range(STEPS))
    assert set(trace.mark_micro_batch) == {0, 1}
    assert len(logged) == STEPS
    for step, figures in enumerate(logged):
        at_peak = trace.by_category(trace.peak_of(step).event)
        assert figures["memory/peak_allocated"] == trace.peak_of(step).allocated_bytes
        assert figures["memory/parameter"] == WEIGHT_BYTES
        for category in ("gradient", "optimizer_state", "activation", "temporary"):
            assert figures.get(f"memory/{category}", 0) == at_peak[category]
        assert "memory/peak_reserved" not in figures  # the CPU has no allocator that reserves
    assert logged[-1]["memory/optimizer_state"] == 2 * WEIGHT_BYTES + 4 * 4  # two moments; a counter a parameter


def out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def require_cut_short(trace):
    assert trace.steps == (0,)
    assert trace.meta["notes"] == [
        "The recording ended with OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB: "
        "what follows is not in the trace"
    ]


class Loss(nn.Module):
    """A model as transformers' Trainer calls it."""

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x, labels=None):
        return {"loss": self.net(x).square().mean()}


@pytest.fixture
def trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Averaging(transformers.Trainer):
        """As TRL's trainers: what `log` is called with leaves together with figures averaged since the last call."""

        def log(self, logs, *about):
            super().log({**logs, "averaged": 1.0}, *about)

    options = transformers.TrainingArguments(
        tmp_path / "out",
        max_steps=OF,
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        logging_steps=2,
        disable_tqdm=True,
    )
    data = [{"x": x} for (x,) in samples()]
    return Averaging(Loss(), options, train_dataset=data)


def test_a_trainer_of_transformers_logs_each_step_and_leaves_a_trace(trainer, tmp_path):
    from memscope.integrations.transformers import TrainerRecorder

    trainer.add_callback(TrainerRecorder(trainer, tmp_path / "train.npz", steps=STEPS))
    trainer.train()
    logged = [row for row in trainer.state.log_history if "memory/parameter" in row]
    assert [row["step"] for row in logged] == [1, 2, 3]
    require_steps(Trace.load(tmp_path / "train.npz"), logged)
    averaged = [row["step"] for row in trainer.state.log_history if "averaged" in row]
    assert averaged == [2, 4, 4]  # its own logging, and the summary at the end


def test_a_trainer_of_transformers_that_runs_out_of_memory_leaves_a_trace(trainer, tmp_path):
    from memscope.integrations.transformers import TrainerRecorder

    recorder = TrainerRecorder(trainer, tmp_path / "train.npz")
    callbacks = list(trainer.callback_handler.callbacks)
    trainer.create_optimizer_and_scheduler(OF)
    trainer.optimizer.register_step_post_hook(out_of_memory)
    with pytest.raises(torch.OutOfMemoryError), recorder:
        trainer.train()
    require_cut_short(Trace.load(tmp_path / "train.npz"))
    assert trainer.callback_handler.callbacks == callbacks


def test_a_recorder_records_the_first_training_alone(trainer, tmp_path):
    from memscope.integrations.transformers import TrainerRecorder

    with TrainerRecorder(trainer, tmp_path / "train.npz", steps=1):
        trainer.train()
        trainer.train()
    assert len([row for row in trainer.state.log_history if "memory/parameter" in row]) == 0  # of the second
    assert Trace.load(tmp_path / "train.npz").steps == (0,)


def test_a_training_that_failed_leaves_its_trace_when_it_is_started_again(trainer, tmp_path):
    from memscope.integrations.transformers import TrainerRecorder

    trainer.add_callback(TrainerRecorder(trainer, tmp_path / "train.npz"))
    trainer.create_optimizer_and_scheduler(OF)
    hook = trainer.optimizer.register_step_post_hook(out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()
    assert not (tmp_path / "train.npz").exists()
    hook.remove()
    trainer.train()
    assert Trace.load(tmp_path / "train.npz").steps == (0,)


class Tracker:
    """Collects what `accelerator.log` is given."""

    def __init__(self):
        self.rows = []

    def log(self, values, step=None):
        self.rows.append((step, values))

    name = "collected"


def accelerated(output, *, after_step=None, **options):
    accelerate = pytest.importorskip("accelerate")
    from memscope.integrations.accelerate import AccelerateRecorder

    accelerator, tracker = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2), Tracker()
    accelerator.trackers.append(tracker)
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer, batches = accelerator.prepare(model, optimizer, DataLoader(samples(), batch_size=ROWS))
    steps = 0
    with AccelerateRecorder(accelerator, model, optimizer, output, **options) as recorder:
        for (batch,) in batches:
            with accelerator.accumulate(model):
                accelerator.backward(model(batch).square().mean())
                optimizer.step()
                optimizer.zero_grad()
            steps += accelerator.sync_gradients
            if steps and after_step:
                after_step()
            recorder.step(steps)
    assert steps == OF
    return tracker.rows


def test_a_loop_of_accelerate_logs_each_step_and_leaves_a_trace(tmp_path):
    rows = accelerated(tmp_path / "train.npz", steps=STEPS)
    assert [number for number, _ in rows] == [1, 2, 3]
    require_steps(Trace.load(tmp_path / "train.npz"), [figures for _, figures in rows])


def test_a_loop_of_accelerate_that_runs_out_of_memory_leaves_a_trace(tmp_path):
    with pytest.raises(torch.OutOfMemoryError):
        accelerated(tmp_path / "train.npz", after_step=out_of_memory)
    require_cut_short(Trace.load(tmp_path / "train.npz"))


def fitted(output, *, fails=False, **options):
    lightning = pytest.importorskip("lightning.pytorch")
    from memscope.integrations.lightning import LightningRecorder

    rows = []

    class Logger(lightning.loggers.logger.DummyLogger):
        def log_metrics(self, metrics, step=None):
            rows.append((step, metrics))

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net()

        def training_step(self, batch, index):
            if fails and self.trainer.global_step:
                out_of_memory()
            loss = self.net(batch[0]).square().mean()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        accumulate_grad_batches=2,
        logger=Logger(),
        log_every_n_steps=1,
        callbacks=[LightningRecorder(output, **options)],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(Module(), DataLoader(samples(), batch_size=ROWS))
    return rows


def test_a_trainer_of_lightning_logs_each_step_and_leaves_a_trace(tmp_path):
    rows = fitted(tmp_path / "train.npz", steps=STEPS)
    logged = [(number, figures) for number, figures in rows if "memory/parameter" in figures]
    losses = [number for number, figures in rows if "loss" in figures]
    assert [number for number, _ in logged] == losses[:STEPS]
    require_steps(Trace.load(tmp_path / "train.npz"), [figures for _, figures in logged])


def test_a_trainer_of_lightning_that_runs_out_of_memory_leaves_a_trace(tmp_path):
    with pytest.raises(torch.OutOfMemoryError):
        fitted(tmp_path / "train.npz", fails=True)
    trace = Trace.load(tmp_path / "train.npz")
    assert trace.meta["notes"][0].startswith("The recording ended with OutOfMemoryError")


@pytest.mark.parametrize("steps", [0, -1, 2.5, "all"])
def test_a_number_of_steps_that_is_none_is_refused(steps, tmp_path):
    with pytest.raises(UsageError, match="expected the number of optimizer steps to record, or None for all"):
        accelerated(tmp_path / "train.npz", steps=steps)


@pytest.mark.parametrize("framework", ["transformers", "lightning", "accelerate"])
def test_a_framework_that_is_not_installed_is_one_error_with_the_extra(framework, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(f"memscope.integrations.{framework}")]:
        monkeypatch.delitem(sys.modules, name)
    for name in (framework, f"{framework}.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError) as missing:
        importlib.import_module(f"memscope.integrations.{framework}")
    assert str(missing.value) == (
        f"memscope.integrations.{framework} needs {framework}, which is not installed: "
        f'pip install "torch-memscope[{framework}]"'
    )
