import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngc_jax.errors import UsageError
from ngc_jax.groups.kernel_spec import Kernel, check_rank, count_parameters, logical_axes, metric_rank_at

KERNELS = st.one_of(
    st.just(Kernel()),
    st.builds(Kernel, st.just("riemannian"), metric_rank=st.integers(0, 40)),
    st.builds(
        Kernel,
        st.just("lifted"),
        lift=st.integers(2, 5000),
        seed=st.integers(0, 2**32 - 1),
        learned=st.booleans(),
    ),
)


@given(KERNELS)
def test_a_kernel_survives_json(kernel):
    assert Kernel.from_dict(json.loads(json.dumps(kernel.to_dict()))) == kernel


def test_to_dict_writes_only_the_kernel_s_own_options():
    assert Kernel().to_dict() == {"name": "bilinear"}
    assert Kernel("riemannian").to_dict() == {"name": "riemannian", "metric_rank": 0}
    assert Kernel("lifted", lift=9).to_dict() == {"name": "lifted", "lift": 9, "seed": 0, "learned": False}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"name": "bilinaer"}, "did you mean 'bilinear'?"),
        ({"name": "bilinear", "lift": 3}, "no option 'lift'"),
        ({"name": "riemannian", "seed": 3}, "no option 'seed'"),
        ({"name": "riemannian", "metric_rank": -1}, "metric_rank is -1"),
        ({"name": "riemannian", "metric_rank": True}, "metric_rank is True; expected int"),
        ({"name": "riemannian", "metric_rank": 2.0}, "metric_rank is 2.0; expected int"),
        ({"name": "lifted"}, "has lift 0"),
        ({"name": "lifted", "lift": 8, "learned": 1}, "learned is 1; expected bool"),
        ({"name": "lifted", "lift": 8, "seed": 2**32}, "seed is 4294967296"),
        ({"name": "lifted", "lfit": 8}, "did you mean 'lift'?"),
        ({"lift": 8}, "a mapping with a name"),
        ("lifted", "a mapping with a name"),
    ],
)
def test_a_wrong_kernel_is_refused_in_one_line(options, says):
    with pytest.raises(UsageError) as error:
        Kernel.from_dict(options)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_counts_by_hand():
    d_in, d_outs, rank = 7, (5, 3), 2
    states = 2 * 7 + 2 * 5 + 2 * 3
    assert count_parameters(Kernel(), rank, d_in, d_outs) == states
    assert count_parameters(Kernel("riemannian"), rank, d_in, d_outs) == states + 2
    assert count_parameters(Kernel("riemannian", metric_rank=1), rank, d_in, d_outs) == states + 2 + 2
    # A metric of the group's rank is already general: more columns would store nothing new.
    assert count_parameters(Kernel("riemannian", metric_rank=9), rank, d_in, d_outs) == states + 2 + 4
    # One gain, one amplitude per output neuron; P is free unless learned.
    assert count_parameters(Kernel("lifted", lift=11), rank, d_in, d_outs) == states + 1 + 8
    assert count_parameters(Kernel("lifted", lift=11, learned=True), rank, d_in, d_outs) == states + 1 + 8 + 22


def test_the_lift_bounds_the_rank():
    kernel = Kernel("lifted", lift=8)
    assert kernel.max_rank == 7
    assert Kernel().max_rank is None
    check_rank(kernel, 7)
    with pytest.raises(UsageError, match="lower the rank or raise lift"):
        check_rank(kernel, 8)
    with pytest.raises(UsageError, match="raise lift"):
        count_parameters(kernel, 8, 10, (10,))
    with pytest.raises(UsageError, match="expected at least 1"):
        check_rank(Kernel(), 0)


def test_signal_and_metric_widths():
    assert Kernel("riemannian", metric_rank=3).signal_width(5) == 5
    assert Kernel("lifted", lift=12).signal_width(5) == 12
    assert metric_rank_at(Kernel("riemannian", metric_rank=3), 2) == 2
    assert metric_rank_at(Kernel(), 2) == 0


def test_axes_are_named_for_what_the_kernel_stores():
    assert set(logical_axes(Kernel())) == {"input_states", "output_states"}
    assert "metric.factor" not in logical_axes(Kernel("riemannian"))
    assert "lift" not in logical_axes(Kernel("lifted", lift=4))
    assert logical_axes(Kernel("lifted", lift=4, learned=True))["lift"] == ("latent", "lift")


def test_plans_are_read_without_jax():
    code = "import sys, ngc_jax.groups.plan; sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
