"""The blocks by their formulas, and what the published weights rely on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from autoregressive.models.cache import KVCache
from autoregressive.models.config import ModelArgs, find_multiple
from autoregressive.models.layers import Attention, FeedForward, RMSNorm, TransformerBlock, aligned_attention
from autoregressive.models.rope import apply_rotary_emb, precompute_freqs_cis_2d
from autoregressive.models.text_condition import text_attention_mask
from tests.autoregressive.models.tiny import NO_DROPOUT, captions, random_model


def args(**fields) -> ModelArgs:
    return ModelArgs(**{"dim": 32, "n_head": 4, "multiple_of": 8, "block_size": 9, **NO_DROPOUT, **fields})


def test_norm_casts_back_before_it_scales():
    torch.manual_seed(0)
    norm = RMSNorm(64).bfloat16()
    norm.weight.data.normal_()
    x = torch.randn(50, 64).bfloat16()
    wide = x.float() / (x.float().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(norm(x), wide.bfloat16() * norm.weight, atol=0, rtol=0.01)
    scaled_first = (wide * norm.weight.float()).bfloat16()
    assert not torch.equal(norm(x), scaled_first)
    assert torch.equal(norm(x), (x.float() * (x.float() ** 2).mean(-1, keepdim=True).add(1e-5).rsqrt())
                       .bfloat16() * norm.weight)  # fmt: skip


def test_norm_statistics_are_float32_and_eps_counts():
    x = torch.full((1, 4), 300.0, dtype=torch.float16)  # its square overflows float16
    torch.testing.assert_close(RMSNorm(4).half()(x), torch.ones(1, 4, dtype=torch.float16))
    torch.testing.assert_close(RMSNorm(4)(torch.full((1, 4), 1e-3)), torch.full((1, 4), 1e-3 / 1.1e-5**0.5))
    assert RMSNorm(4).half()(x.float()).dtype == torch.float32  # result by type promotion


def test_w1_is_gated_and_w3_linear():
    torch.manual_seed(0)
    layer, x = FeedForward(args()), torch.randn(3, 32)
    gate, linear = x @ layer.w1.weight.T, x @ layer.w3.weight.T
    torch.testing.assert_close(layer(x), (F.silu(gate) * linear) @ layer.w2.weight.T)
    assert layer.w1.weight.shape == (88, 32)


def test_hidden_width_is_rounded_up():
    assert [find_multiple(n, 256) for n in (1, 256, 257)] == [256, 256, 512]
    assert ModelArgs(dim=768).ffn_hidden == 2048
    assert ModelArgs(dim=3200, n_head=32).ffn_hidden == 8704
    assert ModelArgs(dim=64, ffn_dim_multiplier=1.3, multiple_of=32).ffn_hidden == 224  # int(1.3 * 170) = 221


@pytest.mark.parametrize("n_kv_head", [None, 2, 1])
def test_attention_by_its_formula(n_kv_head):
    """Rows of wqkv are Q, K, V; consecutive query heads share a K/V head; the scale is 1 / sqrt(head_dim)."""
    torch.manual_seed(0)
    config = args(n_kv_head=n_kv_head)
    layer, x = Attention(config), torch.randn(2, 10, 32)
    table = precompute_freqs_cis_2d(3, 8, cls_token_num=1)
    kv = config.kv_heads
    w_q, w_k, w_v = layer.wqkv.weight.split([32, 8 * kv, 8 * kv])
    heads = []
    for h in range(4):
        shared = h // (4 // kv)
        q = apply_rotary_emb((x @ w_q[8 * h : 8 * h + 8].T)[:, :, None], table)[:, :, 0]
        k = apply_rotary_emb((x @ w_k[8 * shared : 8 * shared + 8].T)[:, :, None], table)[:, :, 0]
        v = x @ w_v[8 * shared : 8 * shared + 8].T
        scores = (q @ k.mT / 8**0.5).masked_fill(~torch.ones(10, 10, dtype=torch.bool).tril(), -torch.inf)
        heads.append(scores.softmax(-1) @ v)
    torch.testing.assert_close(layer(x, table), torch.cat(heads, -1) @ layer.wo.weight.T)


def test_head_width_100_keeps_its_own_scale(monkeypatch):
    calls, real = [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda q, *a, **k: calls.append((q.shape[-1], k)) or real(q, *a, **k),
    )
    layer = Attention(args(dim=200, n_head=2))
    layer(torch.randn(1, 10, 200), precompute_freqs_cis_2d(3, 100, cls_token_num=1))
    assert calls[0][0] == 100 and "scale" not in calls[0][1]  # the default is 1 / sqrt(100)


def gradients(attend, parts: list[torch.Tensor], **options) -> list[torch.Tensor]:
    """The result for queries, keys and values, and the gradients of its squares with respect to them."""
    leaves = [part.clone().requires_grad_() for part in parts]
    out = attend(*leaves, **options)
    return [out, *torch.autograd.grad(out.square().sum(), leaves)]


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_heads_of_another_width_are_padded_without_a_trace(kv_heads, masked, monkeypatch):
    widths, real = [], F.scaled_dot_product_attention
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, heads, 7, 100, generator=generator).double() for heads in (4, kv_heads, kv_heads)]
    mask = torch.ones(7, 7, dtype=torch.bool).tril(2) if masked else None
    options = {"attn_mask": mask, "is_causal": not masked, "enable_gqa": kv_heads != 4}
    expected = gradients(real, parts, **options)
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, *a, **k: widths.append(q.shape[-1]) or real(q, *a, **k)
    )
    found = gradients(aligned_attention, parts, **options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert widths == [104] and found[0].shape == (2, 4, 7, 100)


def test_heads_of_a_multiple_of_8_are_not_padded():
    parts = [torch.randn(1, 2, 5, 16) for _ in range(3)]
    expected = gradients(F.scaled_dot_product_attention, parts, is_causal=True)
    assert all(map(torch.equal, gradients(aligned_attention, parts, is_causal=True), expected))


def test_a_mask_takes_the_place_of_causality():
    layer, x = Attention(args()), torch.randn(1, 10, 32)
    table = precompute_freqs_cis_2d(3, 8, cls_token_num=1)
    everything = torch.ones(1, 1, 10, 10, dtype=torch.bool)
    torch.testing.assert_close(layer(x, table, mask=everything.tril()), layer(x, table))
    assert (layer(x, table, mask=everything) - layer(x, table)).abs().max() > 1e-3


def test_text_attends_uniformly_and_the_class_scores_zero():
    torch.manual_seed(0)
    layer, x = Attention(args()), torch.randn(1, 12, 32)
    table = precompute_freqs_cis_2d(3, 8, cls_token_num=3)
    visible = text_attention_mask(torch.tensor([[0, 1, 1] + [1] * 9]).bool())
    v = x @ layer.wqkv.weight[64:].T
    out = layer(x, table, mask=visible)
    torch.testing.assert_close(out[:, 2], v[:, 1:3].mean(1) @ layer.wo.weight.T)
    torch.testing.assert_close(out[:, 0], v[:, 0] @ layer.wo.weight.T)  # padding sees itself


def test_padded_text_has_no_influence():
    model = random_model(model_type="t2i", cls_token_num=4)
    features, emb_masks = captions(1, [2], 4)
    mask = text_attention_mask(torch.cat([emb_masks.bool(), torch.ones(1, 5, dtype=torch.bool)], dim=1))
    tokens = torch.randint(50, (1, 5))
    with torch.no_grad():
        expected, _ = model(tokens, features, mask=mask)
        features[:, :2] = 7.0
        torch.testing.assert_close(model(tokens, features, mask=mask)[0], expected)
        features[:, 2] = 7.0
        assert (model(tokens, features, mask=mask)[0] - expected).abs().max() > 1e-3


def test_a_token_is_rotated_with_its_own_cell():
    model, seen = random_model(n_layer=1), []
    model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.long), torch.tensor([0]))
    assert torch.equal(seen[0], precompute_freqs_cis_2d(3, 8, cls_token_num=1)[:5])


def test_weights_tell_nothing_of_the_image_size():
    small, large = random_model(), random_model(block_size=16)
    large.load_state_dict(small.state_dict())
    assert {k: v.shape for k, v in small.state_dict().items()} == {k: v.shape for k, v in large.state_dict().items()}


def test_residuals_are_bfloat16_when_cast_and_float32_under_autocast():
    tokens, label, seen = torch.zeros(1, 4, dtype=torch.long), torch.tensor([0]), []

    def run(model, autocast: bool) -> torch.dtype:
        model.layers[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model(tokens, label)
        return seen[-1]

    assert run(random_model().bfloat16(), False) == torch.bfloat16
    assert run(random_model(), True) == torch.float32


def test_block_by_its_formula():
    config = args()
    block, x = TransformerBlock(config, drop_path=0.0), torch.randn(2, 10, 32)
    table = precompute_freqs_cis_2d(3, 8, cls_token_num=1)
    h = x + block.attention(block.attention_norm(x), table)
    torch.testing.assert_close(block(x, table), h + block.feed_forward(block.ffn_norm(h)))


def test_residual_and_attention_dropout_act_in_training_only():
    table = precompute_freqs_cis_2d(3, 8, cls_token_num=1)
    x = torch.randn(1, 10, 32)
    for fields in ({"resid_dropout_p": 0.5}, {"attn_dropout_p": 0.5}):
        layer = Attention(args(**fields))
        assert not torch.equal(layer(x, table), layer(x, table))
        layer.eval()
        assert torch.equal(layer(x, table), layer(x, table))


def test_the_cache_keeps_rotated_keys_of_the_first_rows():
    cache = KVCache(4, 5, 2, 8, torch.float32)
    k, v = torch.randn(3, 2, 2, 8), torch.randn(3, 2, 2, 8)
    keys, values = cache.update(torch.tensor([1, 3]), k, v)
    assert keys.shape == values.shape == (3, 2, 5, 8)
    assert torch.equal(keys[:, :, [1, 3]], k) and torch.equal(values[:, :, [1, 3]], v)
    assert cache.k_cache[3].abs().max() == 0 and keys[:, :, [0, 2, 4]].abs().max() == 0
    cache.length = 4
    assert cache.update(torch.tensor([0]), k[:, :, :1], v[:, :, :1])[0].shape == (3, 2, 4, 8)


def test_the_cache_casts_what_it_stores():
    cache = KVCache(1, 2, 1, 4, torch.bfloat16)
    k = torch.randn(1, 1, 1, 4)
    keys, _ = cache.update(torch.tensor([1]), k, k)
    assert keys.dtype == torch.bfloat16
    assert torch.equal(keys[:, :, 1:], k.bfloat16())
