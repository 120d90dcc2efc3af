import numpy as np
import pytest

from ngc_jax.errors import UsageError
from ngc_jax.train.stream import StreamBatches


def stream(**options):
    return StreamBatches(np.arange(103), length=5, batch_size=4, seed=7, **options)


def rows_of(batches, count):
    return [next(batches)["tokens"] for _ in range(count)]


def test_an_epoch_has_every_row_once_and_the_next_another_order():
    batches = stream()
    assert batches.batches_per_epoch == 5
    first, second = np.concatenate(rows_of(batches, 5)), np.concatenate(rows_of(batches, 5))
    np.testing.assert_array_equal(np.sort(first[:, 0]), np.arange(0, 100, 5))
    np.testing.assert_array_equal(first, first[:, :1] + np.arange(5))
    np.testing.assert_array_equal(np.sort(second[:, 0]), np.sort(first[:, 0]))
    assert (first != second).any()


def test_only_a_row_s_first_token_is_not_predicted():
    batch = next(stream())
    np.testing.assert_array_equal(batch["weights"], np.tile([0, 1, 1, 1, 1], (4, 1)))
    np.testing.assert_array_equal(batch["positions"], np.tile(np.arange(5), (4, 1)))
    assert not batch["starts"].any()


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_a_batch_and_a_position_holds_for_any_number(processes):
    expected = rows_of(stream(), 12)
    parts = [stream(process=process, processes=processes) for process in range(processes)]
    for wanted in expected[:7]:
        np.testing.assert_array_equal(np.concatenate([next(part)["tokens"] for part in parts]), wanted)
    whole = stream()
    whole.set_state(parts[0].get_state())
    np.testing.assert_array_equal(np.stack(rows_of(whole, 5)), np.stack(expected[7:]))


def test_bad_streams_are_refused():
    with pytest.raises(UsageError, match="a batch needs 4"):
        StreamBatches(np.arange(19), length=5, batch_size=4)
    with pytest.raises(UsageError, match="3 processes"):
        stream(processes=3)
    with pytest.raises(UsageError, match="rows of 1"):
        StreamBatches(np.arange(19), length=1, batch_size=4)
