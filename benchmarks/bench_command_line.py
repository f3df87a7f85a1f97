"""Times of whole commands, as users experience them. The project set the bounds itself."""

import subprocess
import sys
import time


def seconds(*words):
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "memscope", *words], check=True, capture_output=True)
    return time.perf_counter() - began


def test_help_answers_within_three_tenths_of_a_second(benchmark):
    taken = benchmark.pedantic(seconds, args=("--help",), rounds=5, warmup_rounds=1)
    bare = min(_bare() for _ in range(3))
    benchmark.extra_info["bare_python"] = bare
    assert benchmark.stats.stats.min < 0.3, f"{taken:.2f} s, of which Python alone takes {bare:.2f} s"


def _bare():
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    return time.perf_counter() - began


def test_profiling_7b_with_lora_and_amp_takes_less_than_a_minute(benchmark, tmp_path):
    words = ("profile", "targets/llama2", "--strategies", "lora,amp", "-o", str(tmp_path / "runs"))
    taken = benchmark.pedantic(seconds, args=words, rounds=1)
    assert taken < 60
