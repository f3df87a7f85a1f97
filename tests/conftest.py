"""One thread for every test: faster with small tensors, and results do not depend on the number of cores.

Files that take longest start first, so that the processes of `make test` end together.
"""

import pytest
import torch

torch.set_num_threads(1)

_LONGEST = (
    "test_gpu_script test_advisor_exhaustive test_conformance test_advise_command test_programs"
    " test_programs_launch test_profile_command test_docs test_nothing_lost test_terminal test_advisor"
    " test_interrupts test_machine_pretrained test_advisor_programs test_exit_codes test_hf_target"
    " test_programs_strategies test_page test_exactness test_navigation test_llama2_sizes"
    " test_published_libraries test_fit_command test_simulation_equals_run test_advisor_allowed test_published"
    " test_checkpoint_plans test_finetune test_fit test_advisor_search test_moment test_would_free"
    " test_machine_moves test_advisor_layers"
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
