"""That the guarded tensors of other tests are guarded."""

import pytest

from .guarded import check_guarded, run_guarded

READ = """
import ctypes
t = guarded((5,), torch.float32)
assert t.new_empty(2, 3).isnan().all() and torch.empty_like(t, dtype=torch.int32).lt(0).all()
ctypes.c_float.from_address(t.data_ptr() + {}).value
"""


@pytest.mark.parametrize(("offset", "printed"), [(-4, ""), (20, "start 2\n")], ids=["before", "behind"])
def test_access_outside_ends_the_process(offset, printed):
    run = run_guarded(READ.format(offset))
    assert run.returncode < 0, "a page that must not be touched can be read"
    assert run.stdout == printed


def test_access_inside_is_counted():
    check_guarded(READ.format(0), 1)
