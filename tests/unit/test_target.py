"""Finding a target: shipped, in a folder, in a file; and errors for anything else."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from memscope.errors import TargetError, UsageError
from memscope.workload.target import Target, find_target, shipped_targets

LLAMA2 = importlib.import_module("memscope.targets.llama2.target")

OWN = """
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Config:
        layers: int = 2
        name: str = "small"

    PRESETS = {"small": Config(), "large": Config(layers=20, name="large")}

    def build(config: Config):
        return ("built", config)
"""


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs each test in an empty working folder, from which names are looked up."""
    monkeypatch.chdir(tmp_path)


def write(path: str, code: str = OWN) -> Path:
    """Write a file and its folders below the working folder."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(dedent(code), encoding="utf-8")
    return file


def failure(text: str) -> str:
    with pytest.raises(TargetError) as caught:
        find_target(text)
    return str(caught.value)


def is_llama2(target: Target) -> bool:
    return target.name == "llama2" and target.build is LLAMA2.build


def test_shipped_targets_are_listed() -> None:
    assert shipped_targets() == ["gpt", "hf", "llama2"]


@pytest.mark.parametrize("text", ["llama2", "targets/llama2", "targets/llama2/", "./llama2"])
def test_shipped_target_is_found_by_name(text: str) -> None:
    target = find_target(text)
    assert is_llama2(target)
    assert list(target.presets) == list(LLAMA2.PRESETS)


def test_shipped_target_is_found_by_its_path() -> None:
    file = LLAMA2.__file__
    assert file is not None
    assert is_llama2(find_target(file))
    assert is_llama2(find_target(str(Path(file).parent)))


def test_own_folder_takes_precedence_over_a_shipped_target_of_its_name() -> None:
    write("llama2/target.py")
    write("targets/llama2/target.py")
    for text in ("llama2", "./llama2", "targets/llama2"):
        assert list(find_target(text).presets) == ["small", "large"]


def test_folder_without_a_target_does_not_hide_the_shipped_one() -> None:
    Path("llama2").mkdir()
    assert is_llama2(find_target("llama2"))


@pytest.mark.parametrize("text", ["mine/llama2", "targets/llama2/other.py", "targets/mine/llama2"])
def test_wrong_path_does_not_select_a_shipped_target(text: str) -> None:
    with pytest.raises(UsageError, match=f'no target "{text}"'):
        find_target(text)


@pytest.mark.parametrize(
    ("file", "text", "name"),
    [
        ("mine/target.py", "mine", "mine"),
        ("mine/target.py", "mine/", "mine"),
        ("mine/target.py", "mine/target.py", "mine"),
        ("mine/train.py", "mine/train.py", "train"),
        ("train.py", "train.py", "train"),
    ],
)
def test_own_folder_or_file_is_a_target(file: str, text: str, name: str) -> None:
    write(file)
    target = find_target(text)
    assert target.name == name
    assert target.configure() == target.presets["small"]
    built: Any = target.build(target.configure("large"))
    assert built == ("built", target.presets["large"])


def test_working_folder_is_a_target_named_for_itself(tmp_path: Path) -> None:
    write("target.py")
    assert find_target(".").name == tmp_path.name


def test_the_text_after_a_colon_fills_the_setting_that_the_target_names() -> None:
    write("mine/target.py", OWN + '    ARGUMENT = "layers"\n')
    target = find_target("mine:7")
    assert [preset.layers for preset in target.presets.values()] == [7, 7]
    with pytest.raises(UsageError, match=r'setting "layers" cannot be "seven": expected a whole number'):
        find_target("mine:seven")


def test_an_argument_that_is_no_setting_is_refused() -> None:
    write("mine/target.py", OWN + '    ARGUMENT = "layer"\n')
    assert "has the ARGUMENT 'layer', which is not a setting: expected one of layers, name" in failure("mine:7")


def test_own_target_may_import_files_next_to_it() -> None:
    write("mine/memscope_test_plain.py", "LAYERS = 3")
    write("mine/memscope_test_relative.py", "NAME = 'beside'")
    code = OWN.replace("layers: int = 2", "layers: int = LAYERS").replace('"small"\n', "NAME\n")
    imports = "    from memscope_test_plain import LAYERS\n    from .memscope_test_relative import NAME\n"
    write("mine/target.py", imports + code)
    path = list(sys.path)
    config = find_target("mine").configure()
    assert (config.layers, config.name) == (3, "beside")
    assert sys.path == path


def test_settings_change_fields_of_the_chosen_preset() -> None:
    write("mine/target.py")
    target = find_target("mine")
    config = target.configure("large", {"layers": "5"})
    assert (config.layers, config.name) == (5, "large")
    assert target.presets["large"].layers == 20


def test_target_without_presets_has_its_defaults_as_one() -> None:
    write("mine/target.py", OWN.replace("PRESETS", "OTHERS"))
    target = find_target("mine")
    assert list(target.presets) == ["default"]
    assert target.configure().layers == 2


def test_unknown_preset_is_refused_with_the_nearest() -> None:
    write("mine/target.py")
    with pytest.raises(UsageError) as caught:
        find_target("mine").configure("larg")
    assert str(caught.value) == 'target "mine" has no preset "larg": did you mean "large"? Valid: large, small'


def test_unknown_setting_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        find_target("llama2").configure("debug", {"n_layer": "1"})
    assert str(caught.value).startswith('target "llama2" has no setting "n_layer": did you mean "n_layers"? Valid: ')


def test_wrong_value_names_target_and_setting() -> None:
    write("mine/target.py")
    with pytest.raises(UsageError) as caught:
        find_target("mine").configure(words={"layers": "two"})
    assert str(caught.value) == 'target "mine": setting "layers" cannot be "two": expected a whole number'


@pytest.mark.parametrize(
    ("text", "nearest"),
    [("lama2", 'did you mean "llama2"? '), ("mine/llama3", 'did you mean "llama2"? '), ("bert", "")],
)
def test_unknown_target_is_refused_with_the_expected_kinds(text: str, nearest: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_target(text)
    assert str(caught.value) == (
        f'no target "{text}": expected a folder with target.py, a Python file, or a shipped target. '
        f"{nearest}Valid: gpt, hf, llama2"
    )


def test_folder_without_target_and_file_without_python_are_refused() -> None:
    write("mine/notes.txt", "")
    for text in ("mine", "mine/notes.txt"):
        with pytest.raises(UsageError, match=f'no target "{text}": expected a folder with target.py, a Python file'):
            find_target(text)


@pytest.mark.parametrize(
    ("code", "lacking"),
    [("def build(config): ...", "Config"), ("class Config: ...", "build"), ("x = 1", "Config and build")],
)
def test_target_that_lacks_a_part_is_refused_with_its_name(code: str, lacking: str) -> None:
    write("mine/target.py", code)
    expected = "expected a Config dataclass and build(config) -> Workload"
    assert failure("mine") == f'target "mine" lacks {lacking}: {expected}'


def test_config_that_is_not_a_dataclass_is_refused() -> None:
    write("mine/target.py", "class Config: ...\ndef build(config): ...")
    assert failure("mine") == (
        'target "mine" has a Config that is not a dataclass: expected a Config dataclass and build(config) -> Workload'
    )


def test_config_without_defaults_and_presets_is_refused() -> None:
    write("mine/target.py", OWN.replace("layers: int = 2", "layers: int").replace('"small": Config(), ', ""))
    assert find_target("mine").configure().layers == 20
    write("other/target.py", OWN.partition("PRESETS")[0].replace("int = 2", "int") + "def build(config): ...")
    assert failure("other").startswith(
        'target "other" cannot be loaded: TypeError: Config.__init__() missing 1 required'
    )


@pytest.mark.parametrize(
    ("code", "message", "line"),
    [
        ("import torch\nx = undefined", "NameError: name 'undefined' is not defined", 2),
        ("\n\nimport no_such_package", "ModuleNotFoundError: No module named 'no_such_package'", 3),
        ("raise SystemExit('usage: train DATA')", "SystemExit: usage: train DATA", 1),
    ],
)
def test_error_in_own_code_is_shown_with_its_line(code: str, message: str, line: int, tmp_path: Path) -> None:
    write("mine/target.py", code)
    shown = failure("mine")
    assert shown.startswith(f'target "mine" cannot be loaded: {message}')
    assert f"{Path('mine/target.py')}:{line}, in <module>" in shown


def test_syntax_error_in_own_code_is_shown_with_its_line() -> None:
    write("mine/target.py", "x = 1\ny = (")
    assert failure("mine") == "target \"mine\" cannot be loaded: SyntaxError: '(' was never closed (target.py, line 2)"


def test_error_in_a_file_next_to_the_target_is_shown_with_its_line() -> None:
    write("mine/memscope_test_broken.py", "def scale(x):\n    return x / 0\n")
    write("mine/target.py", "import memscope_test_broken\nmemscope_test_broken.scale(1)")
    shown = failure("mine")
    assert "ZeroDivisionError: division by zero" in shown
    assert "memscope_test_broken.py:2, in scale: return x / 0" in shown


def test_target_that_failed_to_load_leaves_nothing_behind() -> None:
    write("mine/target.py", "raise ValueError('no')")
    modules, path = set(sys.modules), list(sys.path)
    failure("mine")
    assert {name for name in set(sys.modules) - modules if name.startswith("memscope_target")} == set()
    assert sys.path == path


def test_error_that_memscope_already_explains_passes_through() -> None:
    write("mine/target.py", "from memscope.errors import UsageError\nraise UsageError('data.json: no such file')")
    with pytest.raises(UsageError) as caught:
        find_target("mine")
    assert str(caught.value) == "data.json: no such file"


def test_own_build_may_import_files_next_to_it_when_it_is_called() -> None:
    write("mine/memscope_test_late.py", "LAYERS = 7")
    late = "def build(config: Config):\n        from memscope_test_late import LAYERS\n        return LAYERS"
    write("mine/target.py", OWN.split("def build")[0] + late)
    path = list(sys.path)
    target = find_target("mine")
    built: Any = target.build(target.configure())
    assert built == 7
    assert sys.path == path


@pytest.mark.parametrize(
    ("presets", "said"),
    [
        ("[Config()]", "has PRESETS of type list: expected a dict of settings by name"),
        ('"small"', "has PRESETS of type str: expected a dict"),
        ('{"small": 3}', "has PRESETS in which 'small' is 3: expected a dict"),
        ('{"small": Config}', "has PRESETS in which 'small' is <class"),
        ("{1: Config()}", "has PRESETS in which 1 is Config"),
    ],
)
def test_presets_of_the_wrong_kind_are_refused(presets: str, said: str) -> None:
    write("mine/target.py", OWN.replace('{"small": Config(), "large": Config(layers=20, name="large")}', presets))
    assert said in failure("mine")


def test_a_build_that_is_not_a_function_is_refused() -> None:
    write("mine/target.py", OWN.split("def build")[0] + "build = 3")
    assert "has a build that is not a function" in failure("mine")


def test_the_workload_of_an_own_target_keeps_its_settings(tmp_path: Path) -> None:
    (tmp_path / "target.py").write_text(
        dedent("""
        from dataclasses import dataclass
        from pathlib import Path
        import torch
        from memscope import Workload

        @dataclass(frozen=True)
        class Config:
            width: int = 8
            data: Path = Path("rows.json")

        def build(config):
            return Workload(torch.nn.Linear(config.width, 1), [torch.ones(2, config.width)], lambda m, x: m(x).sum(),
                            torch.optim.SGD, name="mine")
        """)
    )
    target = find_target(str(tmp_path))
    built = target.build(target.configure(None, {"width": "16"}))
    assert built.settings == {"width": 16, "data": "rows.json"}
