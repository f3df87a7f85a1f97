"""What all commands have in common: exit codes for files, the next command, terminals of any width."""

import json
import re
import shlex

import pytest
from histories import BASE, block, segment
from snapshots import dumped, entry, frame, snapshot
from traces import TraceBuilder

MIB = 2**20
DEBUG = ["llama2", "--preset", "debug", "--set", "n_layers=1", "accumulation=1", "seq_len=16", "--device", "gpu"]


def saved(path, activation=2 * MIB, **meta):
    builder = TraceBuilder()
    builder.phase("setup")
    builder.new("optimizer_state", 2 * MIB, module="model.layers.0.a_module_with_quite_a_long_name.weight")
    builder.phase("forward", 0)
    builder.new("activation", activation, module="model.layers.0.a_module_with_quite_a_long_name", op="aten.mm")
    builder.phase("zero_grad", 0)
    path.parent.mkdir(exist_ok=True)
    return builder.trace({"target": "toy", "strategies": [], "device": {"name": "gpu", "simulated": True}} | meta).save(
        path
    )


@pytest.fixture
def files(tmp_path):
    """Files that commands read and write, in a folder whose name needs quotes."""
    saved(tmp_path / "my runs" / "base.npz")
    saved(tmp_path / "my runs" / "grown.npz", 4 * MIB, strategies=["amp"])
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "text.pickle").write_text("hello")
    (tmp_path / "text.toml").write_text("hello")
    (tmp_path / "text.json").write_text('{"neither": 1}')
    (tmp_path / "plan.json").write_text("{")
    made = entry("alloc", BASE, 2 * MIB, frame("forward", "/m/model.py", 12))
    dumped(snapshot([segment(block(2 * MIB), block(18 * MIB, "inactive"))], [made]), tmp_path)
    return tmp_path


TRACE = "my runs/base.npz"
WRONG_FILES = {
    "report: no such file": ("report", "nowhere.npz"),
    "report: not a trace": ("report", "text.npz"),
    "report: other JSON": ("report", "text.json"),
    "report: damaged JSON": ("report", "plan.json"),
    "report: no folder": ("report", TRACE, "-o", "nowhere/page.html"),
    "report: a folder": ("report", TRACE, "-o", "my runs", "-f"),
    "report: exists": ("report", TRACE, "-o", "text.json"),
    "diff: no such file": ("diff", TRACE, "nowhere.npz"),
    "diff: not a trace": ("diff", "text.npz", TRACE),
    "check: no such file": ("check", "nowhere.npz", "--budget", "1GB"),
    "check: not a trace": ("check", "text.npz", "--budget", "1GB"),
    "check: no such baseline": ("check", TRACE, "--baseline", "nowhere.npz", "--fail-if", "peak:+5%"),
    "import: no such file": ("import", "nowhere.pickle"),
    "import: not a snapshot": ("import", "text.pickle"),
    "import: no folder": ("import", "snapshot.pickle", "-o", "nowhere/trace.npz"),
    "import: a folder": ("import", "snapshot.pickle", "-o", "my runs", "-f"),
    "import: exists": ("import", "snapshot.pickle", "-o", "text.npz"),
    "export: no such file": ("export", "nowhere.npz", "--to", "csv"),
    "export: not a trace": ("export", "text.npz", "--to", "csv"),
    "export: no folder": ("export", TRACE, "--to", "csv", "-o", "nowhere/rows.csv"),
    "export: a folder": ("export", TRACE, "--to", "csv", "-o", "my runs", "-f"),
    "export: exists": ("export", TRACE, "--to", "csv", "-o", "text.json"),
    "profile: no such target": ("profile", "nowhere"),
    "profile: no such device file": ("profile", *DEBUG, "--device-file", "nowhere.toml"),
    "profile: not a device file": ("profile", *DEBUG, "--device-file", "text.toml"),
    "profile: no folder for the page": ("profile", *DEBUG, "--html", "nowhere/page.html"),
    "profile: a folder as page": ("profile", *DEBUG, "--html", "my runs", "-f"),
    "profile: a file as folder": ("profile", *DEBUG, "-o", "text.json"),
    "profile: no folder for the table": ("profile", *DEBUG, "--grid", "ga", "--table", "nowhere/t.csv"),
    "profile: no such checkpoint plan": ("profile", *DEBUG, "-s", "ckpt:plan=nowhere.json"),
    "profile: a damaged checkpoint plan": ("profile", *DEBUG, "-s", "ckpt:plan=plan.json"),
    "advise: no such target": ("advise", "nowhere", "--budget", "1GB"),
    "advise: no such device file": ("advise", *DEBUG, "--budget", "1GB", "--device-file", "nowhere.toml"),
    "advise: no folder": ("advise", *DEBUG, "--budget", "1GB", "-o", "nowhere/plan.json"),
    "advise: exists": ("advise", *DEBUG, "--budget", "1GB", "-o", "text.json"),
}


@pytest.mark.parametrize("words", WRONG_FILES.values(), ids=WRONG_FILES)
def test_a_wrong_file_or_folder_is_a_usage_error_of_every_command(run, files, words):
    before = {path: path.read_bytes() for path in files.rglob("*") if path.is_file()}
    code, out, err = run(*words)
    assert (code, out) == (2, ""), err
    assert "Traceback" not in err
    assert {path: path.read_bytes() for path in files.rglob("*") if path.is_file()} == before


def next_command(out):
    """The command of the line `Next: …`, as a shell splits it."""
    (line,) = [line for line in out.splitlines() if line.startswith("Next: ")]
    name, *words = shlex.split(line.removeprefix("Next: "))
    assert name == "memscope"
    return words


GROWN = ("my runs/base.npz", "my runs/grown.npz")
NAMES_A_NEXT = {
    "targets": (("targets",), "profile"),
    "strategies": (("strategies",), "profile"),
    "devices": (("devices",), "profile"),
    "diff": (("diff", *GROWN), "report"),
    "report of one": (("report", TRACE), "export"),
    "report of two": (("report", *GROWN), "diff"),
    "check with a baseline": (("check", GROWN[1], "--baseline", GROWN[0], "--fail-if", "peak:+5%"), "diff"),
    "check without": (("check", TRACE, "--budget", "1MiB"), "report"),
    "import": (("import", "snapshot.pickle", "-o", "my runs/taken.npz"), "report"),
    "export": (("export", TRACE, "--to", "csv"), "report"),
    "profile": (("profile", *DEBUG, "-o", "my profile"), "profile"),
    "profile of two": (("profile", *DEBUG, "-s", "lora", "-o", "my profile"), "diff"),
    "profile --grid": (("profile", *DEBUG, "--grid", "lora", "-o", "my profile"), "diff"),
}


NEXT_CASES = [
    pytest.param(*NAMES_A_NEXT[name], again, id=f"{name}, {'with files of an earlier run' if again else 'first'}")
    for name in NAMES_A_NEXT
    for again in (False, True)
    if not (again and NAMES_A_NEXT[name][1] == "profile")  # a profile goes into a new folder
]


_worked: set[tuple[str, ...]] = set()
"""Next commands that worked and read no file: several commands print the same one."""


@pytest.mark.parametrize(("words", "expected", "again"), NEXT_CASES)
def test_the_next_command_works_as_printed(run, files, monkeypatch, words, expected, again):
    if again:
        for name in ("base.html", "base.trace.json", "report.html", "taken.html"):
            (files / "my runs" / name).write_text("of an earlier run")
    monkeypatch.setenv("COLUMNS", "60")  # the line is not broken on a narrow terminal either
    overwrite = ["-f"] if again and words[0] == "report" else []
    code, out, err = run(*words, *overwrite)
    assert code == (3 if words[0] == "check" else 0), err
    following = next_command(out)
    assert following[0] == expected
    if tuple(following) in _worked:
        return
    code, out, err = run(*following)
    assert code == 0, err
    assert out
    if words[0] in ("targets", "strategies", "devices"):
        _worked.add(tuple(following))


TABLES = {
    "diff": ("diff", *GROWN),
    "check": ("check", *GROWN[1:], "--baseline", GROWN[0], "--fail-if", "optimizer_state:+5%", "--budget", "28GiB"),
    "report": ("report", *GROWN, "--format", "terminal"),
    "import": ("import", "snapshot.pickle"),
    "devices": ("devices",),
    "strategies": ("strategies",),
    "targets": ("targets",),
}


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("words", TABLES.values(), ids=TABLES)
def test_every_table_is_whole_on_every_terminal(run, files, monkeypatch, words, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, err = run(*words)
    assert code == 0, err
    lines = [line for line in out.splitlines() if not line.startswith(("Next: ", "Page: "))]
    assert max(map(len, lines)) <= columns
    assert "…" not in out
    assert not re.search(r"\d[ │]*$", "\n".join(line for line in lines if "MiB" in line)), "a size without its unit"
    assert all(line.endswith(line[0]) for line in lines if line[:1] in ("│", "┃")), "a row is cut"
    if columns < 70:
        assert "│" not in out
    if words[0] in ("diff", "report"):
        assert "a_module_with_quite_a_long_name" in out, "no name is broken"


def test_categories_and_phases_are_words_for_people_and_identifiers_in_json(run, files):
    said = [run(*TABLES[name])[1] for name in ("diff", "check", "report")]
    for text in said:
        assert "optimizer_state" not in text
        assert "zero_grad" not in text
    assert "optimizer state" in said[1]
    assert "optimizer state" in said[2]
    document = json.loads(run("report", TRACE, "--format", "json")[1])
    assert document["runs"][0]["at_peak"]["optimizer_state"] == 2 * MIB


def test_a_budget_is_shown_in_the_unit_in_which_it_was_given(run, files):
    for given, shown in (("28GiB", "28.0 GiB"), ("40GB", "40 GB"), ("500MB", "500 MB")):
        assert f"budget {shown} " in run("check", TRACE, "--budget", given)[1]


def test_debug_is_an_option_of_every_command(run, files):
    for name in (
        "profile",
        "report",
        "diff",
        "check",
        "import",
        "export",
        "advise",
        "strategies",
        "targets",
        "devices",
    ):
        assert "--debug" in run(name, "--help")[1]
