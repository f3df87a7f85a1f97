"""Predict the memory of published runs with the libraries that they name, and write docs/scoreboard.md.

`benchmarks/scoreboard.py` runs every case; with ids, such as 'peft-mm-*', it runs those and keeps the results of the
others; with --page it only writes the page, from the remembered results.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from scoreboard_cases import BUILD, FOLDER, PredictingCommand, load_groups, models, remembered, requirements
from scoreboard_page import page

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/scoreboard.md"


def main() -> None:
    """Run the chosen cases, remember their results and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=["*"], metavar="CASE", help="ids, with * and ?; default: all")
    parser.add_argument("--page", action="store_true", help="only write the page")
    options = parser.parse_args()
    if not options.page:
        _run(options.cases)
    PAGE.write_text(page(load_groups(), remembered()), encoding="utf-8")


def _run(patterns: list[str]) -> None:
    chosen = [
        (group, case)
        for group in load_groups()
        for case in group.cases
        if case.attempts and any(fnmatch.fnmatch(case.id, pattern) for pattern in patterns)
    ]
    if not chosen:
        raise SystemExit(f"scoreboard: no case with a command is called {' or '.join(patterns)}")
    _write_models()
    environments = {name: _environment(name) for name in dict.fromkeys(group.environment for group, _ in chosen)}
    for group, case in chosen:
        results = {name: _predicted(one, environments[group.environment]) for name, one in case.attempts.items()}
        _remember(case.id, results)
        for name, result in results.items():
            print(f"{case.id}, {name}: {result.get('error') or result['peak']}", flush=True)


def _write_models() -> None:
    for name, config in models().items():
        folder = ROOT / BUILD / "models" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def _environment(name: str) -> Path | str:
    """The Python of an environment, made if it is missing; or why it cannot be made."""
    if name == "current":
        return Path(sys.executable)
    folder, packages = ROOT / BUILD / name, requirements()[name]
    python, stamp = folder / "bin/python", folder / "requirements.txt"
    if stamp.exists() and stamp.read_text(encoding="utf-8").split() == list(packages):
        return python
    print(f"making the environment {name}: {' '.join(packages)}", flush=True)
    install = [str(python), "-m", "pip", "install", "--quiet", *packages, "-e", f"{ROOT}[hf]"]
    for words in ([sys.executable, "-m", "venv", "--clear", str(folder)], install):
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"the environment {name} cannot be made: {_last_line(done.stderr)}"
    stamp.write_text("\n".join(packages), encoding="utf-8")
    return python


def _predicted(attempt: PredictingCommand, python: Path | str) -> dict[str, Any]:
    result: dict[str, Any] = {"command": " ".join(("memscope", *attempt.words))}
    if isinstance(python, str):
        return {**result, "error": python}
    with tempfile.TemporaryDirectory() as folder:
        words = [str(python), "-m", "memscope", *attempt.words]
        output = ["-o", folder, "--force", "--json"]
        done = subprocess.run([*words[:5], *output, *words[5:]], capture_output=True, text=True, cwd=ROOT, check=False)
    if not done.stdout.strip():
        return {**result, "error": _last_line(done.stderr).removeprefix("memscope: error: ")}
    last = json.loads(done.stdout)["runs"][-1]
    peak = {name: last["peak"][name] for name in ("allocated", "reserved", "device")}
    return {**result, "versions": _versions(python), "peak": peak, "notes": last["notes"]}


def _versions(python: Path) -> dict[str, str]:
    code = (
        "import json, importlib.metadata as m; "
        "print(json.dumps({n: m.version(n).partition('+')[0] for n in ('torch', 'transformers', 'peft')}))"
    )
    told = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    return json.loads(told.stdout)  # type: ignore[no-any-return]


def _remember(case: str, results: dict[str, Any]) -> None:
    known = {**remembered(), case: results}
    order = [case.id for group in load_groups() for case in group.cases]
    text = json.dumps({key: known[key] for key in order if key in known}, indent=1, ensure_ascii=False)
    (FOLDER / "results.json").write_text(f"{text}\n", encoding="utf-8")


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no message"


if __name__ == "__main__":
    main()
