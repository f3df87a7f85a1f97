"""Fixtures of several files of unit tests."""

import pytest
from hypothesis import HealthCheck, settings
from snapshots import dumped

from memscope.exchange.torch_reader import import_snapshot

# A busy machine is no failure: no test depends on time.
settings.register_profile("memscope", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("memscope")


@pytest.fixture
def imported(tmp_path):
    """The trace of a snapshot."""

    def imported(data, protocol=4, **options):
        return import_snapshot(dumped(data, tmp_path, protocol), **options)

    return imported
