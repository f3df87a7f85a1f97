"""Fixtures of several files of unit tests."""

import pytest
from snapshots import dumped

from memscope.exchange.torch_reader import import_snapshot


@pytest.fixture
def imported(tmp_path):
    """The trace of a snapshot."""

    def imported(data, protocol=4, **options):
        return import_snapshot(dumped(data, tmp_path, protocol), **options)

    return imported
