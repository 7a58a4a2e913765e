"""What all tests share: property tests without a deadline, since no test may depend on a clock; and
what tests of short runs with a window in them need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from mda_lightning.corpora import TokenRows

settings.register_profile("no_clock", deadline=None)
settings.load_profile("no_clock")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def no_pictures() -> Iterator[None]:
    """Monitors measure and write no files."""
    from mda_lightning.callbacks.monitor_output import MonitorOutput

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MonitorOutput, "write", lambda *_, **__: None)
        yield


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> TokenRows:
    """The rows that tests/window_runs.py trains on."""
    from window_runs import write_rows

    return write_rows(tmp_path_factory.mktemp("rows") / "rows")
