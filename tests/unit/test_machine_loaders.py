"""A simulated program: its data come from its own process, and it forks, reads, exits and evaluates as it likes."""

import io

import pytest
from program_runs import run_source

from memscope.errors import MemscopeError
from memscope.trace import PHASES


def test_workers_are_replaced_and_every_sample_comes_once(tmp_path):
    ran = run_source(
        tmp_path,
        """
        from torch.utils.data import DataLoader, IterableDataset, TensorDataset, get_worker_info

        class Stream(IterableDataset):
            def __iter__(self):
                worker = get_worker_info()
                first, step = (worker.id, worker.num_workers) if worker else (0, 1)
                yield from torch.arange(64).float()[first::step]

        workers = {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 4, "pin_memory": True, "timeout": 9}
        def begin(number):
            assert get_worker_info().id == number == 0 and isinstance(get_worker_info().dataset, Stream)

        spawned = {"multiprocessing_context": "spawn", "worker_init_fn": begin}
        loader = DataLoader(Stream(), batch_size=8, **spawned, **workers)
        for epoch in range(2):
            seen = torch.cat(list(loader))
            assert sorted(seen.tolist()) == list(range(64)) and not seen.is_cuda
        data = TensorDataset(torch.randn(64, 64), torch.arange(64))
        assert [len(x) for x, _ in DataLoader(data, batch_size=32, shuffle=True, **workers)] == [32, 32]
        assert get_worker_info() is None
        train(nn.Linear(64, 64).cuda())
        """,
    )
    assert ran.notes == ["a DataLoader with 2 workers loads its batches in the program's own process"]


def test_forks_pools_stdin_and_an_exit_code_are_the_programs_own(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("64\n"))
    ran = run_source(
        tmp_path,
        """
        import multiprocessing, os, sys
        width = int(input())
        model = nn.Linear(width, 64).cuda()
        train(model)
        with multiprocessing.get_context("fork").Pool(1) as pool:
            assert pool.map(abs, [-1, 2]) == [1, 2]
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.arange(3).sum().item() == 3 else 1)
        assert os.waitpid(child, 0)[1] == 0
        sys.exit(0)
        """,
        steps=None,
    )
    assert (ran.code, ran.trace.steps) == (0, (0, 1, 2))


def test_evaluation_with_numpy_and_nested_modes_is_inference(tmp_path):
    ran = run_source(
        tmp_path,
        """
        import numpy as np
        model = nn.Linear(64, 64).cuda()
        train(model)
        with torch.no_grad(), torch.inference_mode():
            scores = model(torch.randn(8, 64).cuda()).softmax(-1)
        right = scores.argmax(-1).cpu().numpy() == np.arange(8)
        assert right.shape == (8,) and 0 <= right.mean() <= 1
        assert scores.cpu().detach().numpy().shape == (8, 64) and len(scores.tolist()) == 8
        """,
        steps=None,
    )
    assert PHASES.index("inference") in ran.trace.phase
    assert "the choices of torch.argmax" in ran.assumed


def test_gradients_of_own_functions_checkpoints_and_masks(tmp_path):
    ran = run_source(
        tmp_path,
        """
        from torch.utils.checkpoint import checkpoint

        class Square(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return x * x

            @staticmethod
            def backward(ctx, gradient):
                (x,) = ctx.saved_tensors
                return 2 * x * gradient

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
                self.register_buffer("mask", torch.tril(torch.ones(1024, 1024)))

            def forward(self, x):
                x = checkpoint(self.first, x, use_reentrant=False)
                x = checkpoint(self.second, x, use_reentrant=True)
                return Square.apply(x.masked_fill(self.mask[:8, :64] == 0, 0.0))

        train(Model().cuda())
        """,
    )
    assert ran.peak_of("buffer") == 4 * 1024 * 1024
    assert ran.peak_of("optimizer_state") == 2 * 2 * (64 * 64 * 4 + 512)


def test_a_policy_that_generates_has_an_inference_phase_with_its_cache(tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    ran = run_source(
        tmp_path,
        """
        from transformers import AutoModelForCausalLM, GPT2Config
        config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64, eos_token_id=1)
        model = AutoModelForCausalLM.from_config(config).cuda()
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(3):
            prompt = torch.randint(2, 64, (4, 8)).cuda()
            with torch.no_grad():
                tokens = model.generate(
                    prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=True, pad_token_id=0
                )
            assert tokens.shape == (4, 12)
            rewards = torch.tensor([float(len(set(one))) for one in tokens.tolist()]).cuda()
            chosen = model(tokens).logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
            (-(chosen.sum(-1) * rewards).mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
        """,
    )
    trace = ran.trace
    phases = zip(trace.op, trace.phase, strict=True)
    generating = [trace.ops[op] for op, phase in phases if phase == PHASES.index("inference")]
    assert generating.count("aten.cat.default") >= 2 * 2 * 3  # keys and values of two layers, for each further token


def test_a_program_that_puts_nothing_on_the_gpu_is_told_so(tmp_path):
    with pytest.raises(MemscopeError, match="the program put nothing on the GPU: it trains on the CPU"):
        run_source(tmp_path, "train(nn.Linear(64, 64), batch=lambda: torch.randn(8, 64))")
