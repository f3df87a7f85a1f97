"""The mark and the fixture, in another project."""

import sys

import pytest

from memscope import simulate
from memscope.testing.toy import toy_workload

pytest_plugins = ["pytester"]

LAYER = """
import pytest, torch
from memscope import Workload

def build():
    # 1 MiB of weights: 512 x 512 numbers of 4 bytes.
    model = torch.nn.Linear(512, 512, bias=False)
    return Workload(model, [torch.ones(4, 512)], lambda model, x: model(x).sum(), torch.optim.SGD)
"""


@pytest.fixture(autouse=True, scope="module")
def _torch_is_loaded():
    """pytester drops the modules that a run imported, and torch cannot be imported twice."""
    simulate(toy_workload)


def outcome(pytester, test):
    pytester.makepyfile(LAYER + test)
    return pytester.runpytest_inprocess("-p", "no:cacheprovider", "--strict-markers")


def test_a_test_below_its_limit_passes_and_has_the_trace(pytester):
    result = outcome(
        pytester,
        """
@pytest.mark.memscope(limit="1GiB")
def test_small(memscope_trace):
    trace = memscope_trace(build, device="cpu", steps=1)
    assert trace.by_category()["parameter"] == 512 * 512 * 4
""",
    )
    result.assert_outcomes(passed=1)


def test_a_test_above_its_limit_fails_and_lists_the_memory(pytester):
    result = outcome(
        pytester,
        """
@pytest.mark.memscope(limit="1MiB")
def test_large(memscope_trace):
    memscope_trace(build, device="cpu")
""",
    )
    result.assert_outcomes(failed=1)
    # Weights and their gradient are 1 MiB each.
    result.stdout.fnmatch_lines(
        ["*above the limit of 1.00 MiB (1,048,576 bytes), simulated on cpu*parameter 1.00 MiB*"]
    )


def test_without_the_mark_there_is_no_limit(pytester):
    result = outcome(
        pytester,
        """
def test_any(memscope_trace):
    assert memscope_trace(build, strategies="bf16").peak.allocated_bytes > 0
""",
    )
    result.assert_outcomes(passed=1)


def test_a_mark_that_would_check_nothing_is_an_error(pytester):
    result = outcome(
        pytester,
        """
@pytest.mark.memscope(limit="1GiB")
def test_unchecked():
    build()
""",
    )
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*limits the traces of the fixture memscope_trace*does not use that fixture*"])


@pytest.mark.parametrize(
    ("mark", "says"),
    [
        ('limit="1 parsec"', '*unknown unit "parsec"*'),
        ('limit="5"', '*takes one limit with its unit: @pytest.mark.memscope(limit="1GiB")*'),
        ("limit=5", '*takes one limit with its unit: @pytest.mark.memscope(limit="1GiB")*'),
        ('"1GiB"', "*takes one limit with its unit*"),
        ("", "*takes one limit with its unit*"),
    ],
)
def test_a_limit_that_cannot_be_read_is_an_error(pytester, mark, says):
    result = outcome(
        pytester,
        f"""
@pytest.mark.memscope({mark})
def test_wrong(memscope_trace):
    pass
""",
    )
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([says])


def test_other_projects_do_not_import_torch_for_it(pytester):
    pytester.makepyfile(
        """
import sys

def test_that_needs_no_memscope(request):
    assert request.config.pluginmanager.has_plugin("memscope")
    assert "torch" not in sys.modules
    assert "numpy" not in sys.modules
"""
    )
    result = pytester.run(
        sys.executable, "-m", "pytest", "-W", "error", "-p", "no:hypothesispytest", "-p", "no:benchmark"
    )
    result.assert_outcomes(passed=1)
