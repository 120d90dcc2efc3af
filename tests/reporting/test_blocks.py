"""The model as groups: counts, sharing and errors against the parameters themselves."""

import dataclasses

import jax
import numpy as np
import pytest

from ngc_jax.errors import UsageError
from ngc_jax.groups.plan import GroupPlan, Plan
from ngc_jax.models.config import DecoderConfig
from ngc_jax.models.save import save_model
from ngc_jax.models.sources import open_source
from ngc_jax.reporting.blocks import block_errors, kept_map, loss_map
from tests.models.compact import compact_model, dense_equivalent, dense_model, fixed_gauge_model
from tests.tiny import HF_CONFIGS


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A compact model and the dense one it stands for, on disk."""
    place = tmp_path_factory.mktemp("blocks")
    compact = compact_model()
    dense = dense_equivalent(compact)
    return compact, dense, save_model(compact, place / "compact"), save_model(dense, place / "dense")


@pytest.mark.parametrize("make", [compact_model, fixed_gauge_model])
def test_kept_shares_are_those_of_the_stored_arrays(make):
    model = make()
    chart = kept_map(model.config, model.plan, "tiny")
    assert len(chart.cells) == 2 * 7
    for cell in chart.cells:
        if cell.group is None:
            continue
        group = next(group for group in model.plan.groups if group.name == cell.group)
        stored = sum(leaf.size for leaf in jax.tree.leaves(model.params["groups"][cell.group]))
        biases = sum(member.d_out for member in group.members if member.bias)
        dense = sum(member.d_out * member.d_in for member in group.members) + biases
        assert cell.value == pytest.approx((stored + biases) / dense)
        assert cell.shared == len(group.members)


def test_blocks_left_dense_and_blocks_outside_the_plan_are_told_apart():
    model = compact_model()
    cells = {(cell.layer, cell.role): cell for cell in kept_map(model.config, model.plan, "tiny").cells}
    assert cells[0, "o"].value == 1.0
    assert cells[0, "o"].group is None
    assert cells[1, "o"].value is None
    assert "not planned" in cells[1, "o"].description
    assert "shares with key of layer 0, key of layer 1" in cells[0, "q"].description
    assert "rank 5 of" in cells[0, "q"].description


def test_the_sums_by_role_add_up_to_the_keep_ratio():
    model = compact_model()
    chart = kept_map(model.config, model.plan, "tiny")
    planned = {role: [b for b in model.plan.blocks() if b.name.endswith(f".{role}")] for role in chart.by_role}
    stored = sum(
        (chart.by_role[role] or 0.0) * sum(block.parameters for block in blocks) for role, blocks in planned.items()
    )
    assert stored == pytest.approx(model.plan.count_parameters())


def test_links_join_the_members_of_every_group_and_no_others():
    model = compact_model()
    chart = kept_map(model.config, model.plan, "tiny")
    for group in model.plan.groups:
        members = {index for index, cell in enumerate(chart.cells) if cell.group == group.name}
        links = [pair for pair in chart.links if pair[0] in members]
        assert all(other in members for _, other in links)
        reached = {min(members)}
        for _ in links:
            reached |= {end for pair in links if reached & set(pair) for end in pair}
        assert reached == members
        assert len(links) == len(members) - 1
    assert sum(len(group.members) - 1 for group in model.plan.groups) == len(chart.links)


def test_a_block_that_is_what_it_was_has_no_error_and_a_changed_one_its_own(saved, tmp_path):
    compact, dense, compact_path, dense_path = saved
    with open_source(str(compact_path)) as small, open_source(str(dense_path)) as large:
        errors = block_errors(small, large)
    assert set(errors) == {block.name for block in compact.plan.blocks()}
    assert max(errors.values()) < 1e-6

    params = jax.tree.map(np.asarray, dict(dense.params))
    q, o = params["layers"]["0"]["attn"]["q"]["kernel"], params["layers"]["0"]["attn"]["o"]["kernel"]
    params["layers"]["0"]["attn"]["q"]["kernel"] = 2 * q  # then What is half of W
    params["layers"]["0"]["attn"]["o"]["kernel"] = -o
    other = save_model(dataclasses.replace(dense, params=params), tmp_path / "other")
    with open_source(str(compact_path)) as small, open_source(str(other)) as large:
        changed = block_errors(small, large)
    assert changed["layers.0.attn.q"] == pytest.approx(0.5, abs=1e-5)
    assert changed["layers.0.attn.o"] == pytest.approx(2.0, abs=1e-5)
    assert changed["layers.1.attn.k"] < 1e-6


def test_the_loss_map_shows_each_error_and_their_root_mean_square(saved):
    compact, *_ = saved
    errors = {block.name: 0.1 * (index + 1) for index, block in enumerate(compact.plan.blocks())}
    chart = loss_map(compact.config, compact.plan, errors, "tiny")
    shown = {cell.row[0]: cell.value for cell in chart.cells}
    assert {name: value for name, value in shown.items() if value is not None} == errors
    keys = [errors["layers.0.attn.k"], errors["layers.1.attn.k"]]
    assert chart.by_role["k"] == pytest.approx(float(np.sqrt(np.mean(np.square(keys)))))
    assert chart.highest >= max(errors.values())
    assert not chart.links


def test_models_of_the_wrong_kind_are_refused(saved, tmp_path):
    _, _, compact, dense = saved
    other = save_model(dense_model(hidden_size=30), tmp_path / "other")
    for first, second, told in ((dense, dense, "is a dense model"), (compact, compact, "give the dense one")):
        with open_source(str(first)) as one, open_source(str(second)) as two, pytest.raises(UsageError, match=told):
            block_errors(one, two)
    with open_source(str(compact)) as one, open_source(str(other)) as two, pytest.raises(UsageError, match="differ"):
        block_errors(one, two)


def test_mlps_that_were_pruned_have_nothing_to_be_compared_with(saved, tmp_path):
    compact, _, directory, _ = saved
    wider = save_model(dense_model(intermediate_size=50), tmp_path / "wider")
    with open_source(str(directory)) as one, open_source(str(wider)) as two:
        errors = block_errors(one, two)
    planned = {block.name for block in compact.plan.blocks()}
    assert errors.keys() == {name for name in planned if ".attn." in name}
    (cell,) = [c for c in loss_map(compact.config, compact.plan, errors, "x").cells if c.row[0] == "layers.0.mlp.u"]
    assert cell.value is None


def test_many_layers_and_far_apart_members():
    config = DecoderConfig.from_hf({**HF_CONFIGS["llama"], "num_hidden_layers": 80})
    far = GroupPlan("far", tuple(config.block(layer, "q") for layer in (0, 40, 79)), 2)
    chart = kept_map(config, Plan((far,)), "deep")
    assert len(chart.cells) == 560
    ends = {frozenset(chart.cells[index].layer for index in pair) for pair in chart.links}
    assert ends == {frozenset({0, 40}), frozenset({40, 79})}
