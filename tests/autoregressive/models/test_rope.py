"""The two-dimensional rotary embedding."""

from __future__ import annotations

import pytest
import torch

from autoregressive.models.rope import (
    RotaryTable,
    apply_rotary_emb,
    precompute_freqs_cis,
    precompute_freqs_cis_2d,
)
from tests import golden


@golden.cases("gpt.rope_table")
def test_tables_match_the_golden(case):
    outputs, shapes = {}, []
    for grid, width, prefix, base in case.params["cases_2d"]:
        table = precompute_freqs_cis_2d(grid, width, base, prefix)
        shapes.append([grid, width, prefix, base, list(table.shape)])
        outputs[f"2d_g{grid}_d{width}_c{prefix}_b{base}"] = table
    for length, width, prefix, base in case.params["cases_1d"]:
        outputs[f"1d_s{length}_d{width}_c{prefix}_b{base}"] = precompute_freqs_cis(length, width, base, prefix)
    strided = {
        name: table[:: case.params["stride"]] if table.numel() >= 20_000 else table for name, table in outputs.items()
    }
    case.check({**strided, "shapes_2d": shapes})


@golden.cases("gpt.rope_apply")
def test_rotation_matches_the_golden(case):
    p, x, pos = case.params, case.tensors["x"], case.tensors["pos"]
    table = precompute_freqs_cis_2d(p["grid"], p["head_dim"], p["base"], p["cls_token_num"])
    case.check(
        {
            "full": apply_rotary_emb(x, table),
            "subset": apply_rotary_emb(x[:, : len(pos)], table[pos]),
            "full_bf16": apply_rotary_emb(x.bfloat16(), table),
        }
    )


def test_row_turns_the_first_half_of_the_pairs_and_column_the_second():
    table = precompute_freqs_cis_2d(4, 8, cls_token_num=1)
    expected = [(0.54030, 0.84147), (0.99995, 0.01000), (-0.41615, 0.90930), (0.99980, 0.02000)]
    torch.testing.assert_close(table[1 + 6], torch.tensor(expected), atol=1e-5, rtol=0)  # row 1, column 2
    assert table.dtype == torch.float32


def test_neighbouring_channels_are_a_pair():
    x = torch.zeros(1, 1, 1, 8)
    x[..., 2] = 1.0
    table = torch.tensor([[[1.0, 0.0], [0.6, 0.8], [1.0, 0.0], [1.0, 0.0]]])
    turned = apply_rotary_emb(x, table)
    torch.testing.assert_close(turned.flatten(), torch.tensor([0, 0, 0.6, 0.8, 0, 0, 0, 0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pair_turns_forward_and_its_gradient_turns_back(dtype):
    """Bit for bit: (even cos - odd sin, odd cos + even sin) in float32, and its adjoint."""
    generator = torch.Generator().manual_seed(0)
    x, slope = (torch.randn(2, 5, 3, 8, generator=generator).to(dtype) for _ in range(2))
    table = precompute_freqs_cis_2d(2, 8, cls_token_num=1)
    turned = apply_rotary_emb(x.requires_grad_(), table)
    turned.backward(slope)
    cos, sin = table[:, None].unbind(-1)
    even, odd = x.detach().float().unflatten(-1, (-1, 2)).unbind(-1)
    up, down = slope.float().unflatten(-1, (-1, 2)).unbind(-1)
    assert turned.dtype == x.grad.dtype == dtype
    assert torch.equal(turned[..., 0::2], (even * cos - odd * sin).to(dtype))
    assert torch.equal(turned[..., 1::2], (odd * cos + even * sin).to(dtype))
    assert torch.equal(x.grad[..., 0::2], (up * cos + down * sin).to(dtype))
    assert torch.equal(x.grad[..., 1::2], (down * cos - up * sin).to(dtype))


def test_condition_positions_become_zero_vectors():
    turned = apply_rotary_emb(torch.randn(1, 7, 2, 8), precompute_freqs_cis_2d(2, 8, cls_token_num=3))
    assert turned[:, :3].abs().max() == 0
    assert turned[:, 3:].abs().min() > 0


def test_a_larger_grid_keeps_the_cells_of_the_smaller_one():
    small, large = (precompute_freqs_cis_2d(g, 16, cls_token_num=0).view(g, g, 8, 2) for g in (16, 32))
    assert torch.equal(large[:16, :16], small)


def test_scores_depend_on_the_offset_between_cells_alone():
    table = precompute_freqs_cis_2d(8, 16, cls_token_num=0)
    q, k = torch.randn(16), torch.randn(16)

    def score(a: tuple[int, int], b: tuple[int, int]) -> float:
        rows = table[[8 * a[0] + a[1], 8 * b[0] + b[1]]]
        turned = apply_rotary_emb(torch.stack([q, k])[None, :, None], rows)[0, :, 0]
        return float(turned[0] @ turned[1])

    assert score((2, 3), (1, 1)) == pytest.approx(score((5, 7), (4, 5)), abs=1e-4)
    assert score((2, 3), (1, 1)) != pytest.approx(score((2, 3), (1, 2)), abs=1e-2)


def test_head_width_must_be_a_multiple_of_four():
    with pytest.raises(ValueError, match="multiple of 4"):
        precompute_freqs_cis_2d(4, 6)


def test_a_table_made_on_the_meta_device_is_made_anew_elsewhere():
    rotary = RotaryTable(2, 8, 10000, 1)
    assert rotary.on(torch.device("meta")).is_meta
    with torch.device("meta"):
        table = rotary.on(torch.device("cpu"))
    assert torch.equal(table, precompute_freqs_cis_2d(2, 8, cls_token_num=1))
    assert rotary.on(torch.device("cpu")) is table
