import threading
import time

import pytest

from ngc_jax.conversion.thread_map import thread_map


@pytest.mark.parametrize("width", [10, 10_000])
def test_results_come_in_order(width):
    items = list(range(40))
    found = thread_map(lambda item: -item, items, costs=[(7 * item) % 11 for item in items], widths=[width] * 40)
    assert list(found) == [-item for item in items]
    assert list(thread_map(abs, [], costs=[], widths=[])) == []


def test_the_longest_begins_first_unless_there_is_a_large_one():
    def begun(widths):
        order, lock = [], threading.Lock()

        def run(item):
            with lock:
                order.append(item)
            time.sleep(0.01)

        list(thread_map(run, [0, 1, 2, 3], costs=[1.0, 2.0, 4.0, 3.0], widths=widths))
        return order

    assert begun([5, 5, 5, 5])[-1] == 0
    assert begun([5, 5, 5, 5])[-2] == 1
    assert begun([5, 5, 10_000, 5]) == [0, 1, 2, 3]


def test_an_error_reaches_the_caller():
    with pytest.raises(ZeroDivisionError):
        list(thread_map(lambda item: 1 / item, [1, 0, 2], costs=[1.0] * 3, widths=[3] * 3))
