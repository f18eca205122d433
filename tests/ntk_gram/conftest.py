import pytest


@pytest.fixture(autouse=True)
def _settings(one_thread_and_restored_capability: None) -> None:
    pass
