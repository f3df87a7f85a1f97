"""Overhead of the loop of a fine-tuning run, relative to the model and its optimizer.

The benchmark runs steps of the `debug` preset with everything a user sees: metrics and a live progress bar. A bare loop
of the same model would consist of forward, loss, backward and optimizer only, so these are timed within the same steps:
the CPU time of their thread, compared with the CPU time of the whole process, which includes data, learning rate,
metrics and drawing the bar. The model uses one thread. With a larger model, steps take longer and the loop's share is
smaller.
"""

import time

import torch

from memscope.targets.llama2.job import Job
from memscope.targets.llama2.session import prepare
from memscope.targets.llama2.target import PRESETS
from memscope.targets.training.run_folder import RunFolder
from memscope.targets.training.train import train
from memscope.targets.training.watch import watched

# 3 epochs of the 64 shipped instructions in steps of 8; the first step, with much one-time work, is not timed.
JOB = {"samples": "64", "epochs": "3", "held_out": "0", "clip_grad_norm": "none", "lr": "1e-3"}


class Clock:
    """Sums the time in the functions it wraps, from the end of the first step to the end of the last."""

    def __init__(self, watch):
        self.watch, self.inside, self.began = watch, 0.0, None

    def timed(self, function):
        """Wrap a function so that its time is added."""

        def call(*args, **kwargs):
            began = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.inside += time.thread_time() - began

        return call

    def metric(self, metric):
        """Pass on a step's metric, and start timing after the first step."""
        self.watch.metric(metric)
        if self.began is None:
            self.began, self.inside = time.process_time(), 0.0

    def stopped(self):
        """Record the times at the end of a step, before a checkpoint."""
        self.ended, self.inside_steps = time.process_time(), self.inside
        return self.watch.stopped()


def backward(loss, run=torch.Tensor.backward):
    run(loss)
    loss.detach_()  # frees the graph here, within the model's time, and not when the loss is deleted


def ratio(folder, patch):
    session, folder = prepare(Job.of(JOB, PRESETS["debug"])), RunFolder(folder)
    folder.begin(session.job.settings)
    with watched(session, folder) as watch:
        clock = Clock(watch)
        patch.setattr(torch.Tensor, "backward", clock.timed(backward))
        session.training.workload.loss = clock.timed(session.training.workload.loss)
        session.training.optimizer.step = clock.timed(session.training.optimizer.step)
        train(session, folder, clock)
    return (clock.ended - clock.began) / clock.inside_steps


def test_the_loop_adds_less_than_two_percent_to_model_and_optimizer(benchmark, tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich draws a live bar only if it detects a terminal
    monkeypatch.setenv("TERM", "xterm")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = benchmark.pedantic(ratio, args=(tmp_path / "run", monkeypatch), rounds=1)
    finally:
        torch.set_num_threads(threads)
    benchmark.extra_info["ratio"] = found
    print(f"\nwhole loop / model and optimizer: {found:.4f}")
    assert found < 1.02
