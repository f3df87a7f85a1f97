"""Activations over the number of layers, without checkpoints and with three kinds, from simulations of LLaMA2 layers.

    python benchmarks/checkpoint_scaling.py [PICTURE]

prints a table, and draws `docs/pictures/checkpoint-scaling.webp`, or PICTURE, in the system's Chromium.
"""

from __future__ import annotations

import base64
import json
import sys
import tempfile
from functools import partial
from pathlib import Path

from memscope.dashboards.layer_scaling import activation_by_layers
from memscope.simulation.simulate import simulate
from memscope.targets.llama2.config import Config
from memscope.targets.llama2.target import build
from scripts.make_docs_pictures import PICTURES, chromium

LAYERS = (1, 2, 4, 9, 16, 25, 36, 49, 64)
TOKENS = 2048
WAYS = {
    "no checkpoints: O(n)": "bf16",
    "every layer, ckpt: O(n), one input a layer": "bf16,ckpt",
    "√n segments, ckpt:sqrt: O(√n)": "bf16,ckpt:sqrt",
    "every layer to the host, offload: O(1)": "bf16,ckpt:plan={}",
}
"""Name of a curve → plan; {} is a plan with the option `offload` for every layer."""


def activations(layers: int, plan: str) -> int:
    """Bytes of the largest activations of a step of LLaMA2-7B with this many layers, on one sample."""
    config = Config(
        n_layers=layers, attention="sdpa", seq_len=TOKENS, max_seq_len=TOKENS, accumulation=1, samples=1
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "offload.json"
        options = {f"layers.{index}": "offload" for index in range(layers)}
        file.write_text(json.dumps({"format": "memscope-checkpoint-plan", "schema_version": 1, "layers": options}))
        trace = simulate(partial(build, config), device="a100-80gb", strategies=plan.format(file))
    return trace.max_by_category(step=1)["activation"]


def main(picture: Path) -> None:
    """Simulate, print and draw."""
    curves = {name: {layers: activations(layers, plan) for layers in LAYERS} for name, plan in WAYS.items()}
    for name, curve in curves.items():
        print(name, *(f"{size / 2**20:,.1f}" for size in curve.values()), "MiB", sep=" | ")
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        page = Path(folder) / "figure.html"
        activation_by_layers(curves).write_html(page, include_plotlyjs=True, config={"displayModeBar": False})
        shown = browser.new_page(viewport={"width": 900, "height": 400})
        shown.goto(page.as_uri())
        shown.locator(".main-svg").first.wait_for()
        taken = shown.context.new_cdp_session(shown).send("Page.captureScreenshot", {"format": "webp", "quality": 72})
        picture.write_bytes(base64.b64decode(taken["data"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURES / "checkpoint-scaling.webp")
