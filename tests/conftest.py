"""One thread for every test: faster with small tensors, and results do not depend on the number of cores.

Files that take longest start first, so that the processes of `make test` end together.
"""

import pytest
import torch

torch.set_num_threads(1)

_LONGEST = (
    "test_gpu_script test_checkpoint_plans test_conformance test_profile_command test_nothing_lost test_page"
    " test_terminal test_fit_command test_navigation test_advise_command test_advisor_exhaustive"
    " test_simulation_equals_run test_published test_advisor test_llama2_sizes test_moment test_exactness test_finetune"
    " test_hf_target test_interrupts test_published_libraries test_exit_codes test_docs test_planner test_fit"
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: index for index, name in enumerate(_LONGEST.split())}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(scope="module")
def kept_workspaces():
    """cuBLAS keeps its workspaces, as before PyTorch 2.15."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_CUBLAS_WORKSPACE_CACHE", "1")
        yield
