from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def source_tree() -> Path:
    root = Path(__file__).resolve().parents[2]
    if not (root / "kernels").is_dir():
        pytest.skip(f"the sources of the kernels are not in {root}")
    return root
