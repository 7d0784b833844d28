"""The VQ model: parity with the established system, its sizes and state-dict layout, and its checks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests import golden
from tests.tokenizer.builders import (
    build_vq,
    count,
    gradient_norms,
    hash_fill,
    key_digest,
    keys_of,
    stored_keys,
    tiny_vq,
    uniform,
    without_gradient,
)
from tokenizer.tokenizer_image.vq_model import (
    VQ_8,
    VQ_16,
    AttnBlock,
    Decoder,
    Downsample,
    Encoder,
    ModelArgs,
    Normalize,
    ResnetBlock,
    Upsample,
    VQ_models,
)


@golden.cases("vq.train")
def test_training_step(case):
    model = case.fill(build_vq(case.config)).train()
    quant, losses, (_, _, indices) = model.encode(case.tensors["x"])
    dec = model.decode(quant)
    total = sum(losses[:3]) + (dec * case.tensors["r"]).mean()
    total.backward()
    outputs = {"quant": quant, "indices": indices, "dec": dec, "total": total, "usage_1": losses[3]}
    outputs |= dict(zip(("vq_loss", "commit_loss", "entropy_loss"), losses))
    outputs |= {f"grad.{name}": p.grad for name, p in model.named_parameters()}
    outputs |= {"grad_l2": gradient_norms(model), "params_without_grad": without_gradient(model)}
    outputs["usage_2"] = model.encode(case.tensors["x2"])[1][3]
    if case.config["codebook_show_usage"]:
        outputs["codebook_used_tail"] = model.quantize.codebook_used[-2 * len(indices) :]
    case.check(outputs)


@golden.cases("vq.eval")
@torch.no_grad()
def test_evaluation(case):
    model = case.fill(build_vq(case.config)).eval()
    codes = case.tensors["codes"]
    quant, losses, (perplexity, encodings, indices) = model.encode(case.tensors["x"])
    batch, channels, rows, columns = quant.shape
    case.check(
        {
            "pre_quant": model.quant_conv(model.encoder(case.tensors["x"])),
            "quant": quant,
            "indices": indices,
            "dec": model.decode(quant),
            "decode_code_of_indices": model.decode_code(indices, quant.shape),
            "decode_code_given": model.decode_code(codes, [batch, channels, rows, columns]),
            "entry_flat": model.quantize.get_codebook_entry(codes),
            "entry_channel_first": model.quantize.get_codebook_entry(codes, quant.shape),
            "entry_channel_last": model.quantize.get_codebook_entry(
                codes, (batch, rows, columns, channels), channel_first=False
            ),
            "losses_in_eval": list(losses),
            "info_first_two_are_none": perplexity is None and encodings is None,
        }
    )


@golden.cases("vq.full")
@torch.no_grad()
def test_full_size(case):
    model = case.fill(build_vq(case.config)).eval()
    quant, _, (_, _, indices) = model.encode(case.tensors["x"])
    case.check(
        {
            "pre_quant": model.quant_conv(model.encoder(case.tensors["x"])),
            "quant": quant,
            "indices": indices,
            "recon": model.decode(quant),
            "recon_of_codes": model.decode_code(case.tensors["codes"], quant.shape)[:, :, ::2, ::2],
            "param_count": count(model),
        }
    )


# Numbers of the established system in float64, with weights from an integer hash of their names.
HASHED = {
    "VQ-16": {
        "pre_quant": [0.088004318, 0.466348777, [-0.10822908, -0.12859219, -0.12550309], 0.08805147],
        "indices": [451, 14603, 3397, 6649, 5869, 1238, 15301, 9995, 9254, 12018, 6862, 9614],
        "decoded": [-0.446082382, 0.497747029, [-0.09571689, -0.1592485, -0.09443627], 0.04798135],
        "losses": [0.0150281183, 0.0037570296, -2.4433214697, 13],
    },
    "VQ-8": {
        "pre_quant": [0.024893483, 0.508471036, [0.16412794, 0.35000726, -0.14102901], None],
        "indices": [14944, 13216, 9448, 3842, 3290, 11228, 4789, 12380, 10426, 12262, 2673, 2294],
        "decoded": [-0.432633198, 0.492973760, [-0.10919292, 0.02643368, 0.04893463], -0.27460841],
        "losses": [0.0138019745, 0.0034504936, -3.8539578950, 49],
    },
}


def _check_statistics(tensor, mean, std, first, last):
    flat = tensor.flatten()
    assert flat.mean().item() == pytest.approx(mean, abs=1e-9)
    assert std is None or flat.std(correction=0).item() == pytest.approx(std, abs=1e-9)
    assert flat[: len(first)].tolist() == pytest.approx(first, abs=1e-8)
    assert last is None or flat[-1].item() == pytest.approx(last, abs=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("name", HASHED)
@torch.no_grad()
def test_hashed_weights(name):
    expected = HASHED[name]
    model = hash_fill(VQ_models[name](entropy_loss_ratio=1.0))
    x = uniform("input", (2, 3, 32, 48))
    _check_statistics(x, -0.003596875, 0.574857407, [], None)
    pre_quant = model.quant_conv(model.encoder(x))
    _check_statistics(pre_quant, *expected["pre_quant"])
    quant, _, (_, _, indices) = model.quantize(pre_quant)
    assert indices[:12].tolist() == expected["indices"]
    if name == "VQ-16":
        _check_statistics(quant, 0.053779150, None, [0.08024703, -0.16764697, -0.1962708], None)
    else:
        assert indices[-1] == 4253
    _check_statistics(model.decode_code(indices, quant.shape), *expected["decoded"])
    losses = model.quantize.train()(pre_quant)[1]
    assert [float(loss) for loss in losses[:3]] == pytest.approx(expected["losses"][:3], abs=1e-9)
    assert float(losses[3]) * 16384 == pytest.approx(expected["losses"][3], abs=1e-3)
    assert torch.equal(model.float().eval().encode(x.float())[2][2], indices)


@pytest.mark.parametrize(
    ("factory", "name", "params", "parts", "digest"),
    [
        (
            VQ_16,
            "vq-16",
            71_883_403,
            [29_298_176, 42_449_795],
            "075977841e91daf585d2e6e68931fad702b2497d5872bcab76f075cbbae6215d",
        ),
        (
            VQ_8,
            "vq-8",
            70_109_835,
            [28_559_232, 41_415_171],
            "144115543ea10c90f9cc45fd29af92263cf1790bd8fc7a34a75cef911cdee552",
        ),
    ],
)
def test_published_layout(factory, name, params, parts, digest):
    with torch.device("meta"):
        model = factory()
        without_usage = factory(codebook_show_usage=False)
    assert count(model) == params
    assert [count(model.encoder), count(model.decoder)] == parts
    assert [count(m) for m in (model.quantize, model.quant_conv, model.post_quant_conv)] == [
        131072,
        2056,
        2304,
    ]
    assert keys_of(model) == stored_keys(name)
    assert key_digest(model) == digest
    assert keys_of(model).keys() - keys_of(without_usage).keys() == {"quantize.codebook_used"}
    assert key_digest(model) != key_digest(without_usage)


def test_parameter_order():
    """Optimizer states are indexed by it."""
    names = [name for name, _ in tiny_vq().named_parameters()]
    first_seen = list(dict.fromkeys(".".join(name.split(".")[:2]) for name in names))
    assert first_seen == [
        *(f"encoder.{part}" for part in ("conv_in", "conv_blocks", "mid", "norm_out", "conv_out")),
        *(f"decoder.{part}" for part in ("conv_in", "mid", "conv_blocks", "norm_out", "conv_out")),
        *("quantize.embedding", "quant_conv.weight", "quant_conv.bias"),
        *("post_quant_conv.weight", "post_quant_conv.bias"),
    ]
    block = [name for name, _ in ResnetBlock(32, 64).named_children() if name != "dropout"]
    assert block == ["norm1", "conv1", "norm2", "conv2", "nin_shortcut"]
    assert [name for name, _ in AttnBlock(32).named_children()] == ["norm", "q", "k", "v", "proj_out"]


def test_registry_and_factories():
    assert list(VQ_models)[:2] == ["VQ-16", "VQ-8"]
    with torch.device("meta"):
        assert [VQ_models[name]().stride for name in ("VQ-16", "VQ-8", "VQ-8-S", "VQ-4-S")] == [16, 8, 8, 4]
        with pytest.raises(TypeError):
            VQ_16(encoder_ch_mult=[1, 2])
        with pytest.raises(TypeError):
            VQ_models["VQ-4-S"](decoder_ch_mult=[1, 2])
        small = VQ_models["VQ-4-S"](codebook_size=100, codebook_embed_dim=4)
    assert small.quantize.embedding.weight.shape == (100, 4)


def test_laptop_sizes():
    small = VQ_models["VQ-4-S"]()
    assert count(small) == 855_019
    assert (small.config.codebook_size, small.config.codebook_embed_dim) == (512, 8)
    assert VQ_models["VQ-8-S"]().config.codebook_size == 1024
    reconstruction, losses = small(torch.zeros(1, 3, 32, 24))
    assert reconstruction.shape == (1, 3, 32, 24)
    assert all(torch.isfinite(loss) for loss in losses)


def test_model_args_order():
    """Positional use and published config files rely on the first ten."""
    args = ModelArgs(10, 4, False, False, 0.5, 0.1, [1], [1], 32, 0.2)
    assert (args.z_channels, args.dropout_p, args.codebook_embed_dim) == (32, 0.2, 4)
    assert (args.ch, args.num_res_blocks, args.norm_groups) == (128, 2, 32)


@pytest.mark.parametrize("size", [(18, 17), (17, 16), (1, 1)])
def test_encode_refuses_sizes_that_lose_pixels(size):
    with pytest.raises(ValueError, match="multiples of 2"):
        tiny_vq().encode(torch.zeros(1, 3, *size))


def test_decode_code_layouts():
    """Channel-last codes are decoded like channel-first ones, also where the height equals the code width."""
    model = tiny_vq().eval()
    codes = torch.randint(64, (2 * 8 * 6,), generator=torch.Generator().manual_seed(0))
    expected = model.decode_code(codes, (2, 8, 8, 6))
    assert expected.shape == (2, 3, 16, 12)
    assert torch.equal(model.decode_code(codes, (2, 8, 6, 8), channel_first=False), expected)
    assert torch.equal(model.decode_code(codes.view(2, 48).int(), torch.Size((2, 8, 8, 6))), expected)
    with pytest.raises(ValueError, match="shape of the latents"):
        model.decode_code(codes)


def test_decoding_the_codes_is_the_forward_pass():
    model = tiny_vq().eval()
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    quant, _, (_, _, indices) = model.encode(x)
    torch.testing.assert_close(model.decode_code(indices, quant.shape), model(x)[0], atol=3e-5, rtol=0)
    assert quant.is_contiguous()


@pytest.mark.parametrize("window", [None, 10, 65_536, 70_000])
def test_loading_any_usage_window(window):
    model = tiny_vq()
    state = model.state_dict()
    stored = state.pop("quantize.codebook_used")
    if window is not None:
        state["quantize.codebook_used"] = torch.arange(1.0, window + 1)
    state["quantize.embedding.weight"] = torch.ones(64, 8)
    given = list(state)
    model.load_state_dict(state)
    assert list(state) == given
    expected = stored if window is None else torch.arange(window - 65_535.0, window + 1).clamp(min=0)
    assert torch.equal(model.quantize.codebook_used, expected)
    assert torch.equal(model.quantize.embedding.weight, torch.ones(64, 8))


def test_loading_is_strict_apart_from_the_usage_window():
    state = tiny_vq().state_dict()
    untracked = tiny_vq(codebook_show_usage=False)
    untracked.load_state_dict(state)
    assert "quantize.codebook_used" not in untracked.state_dict()
    for missing in ("encoder.conv_in.bias", "quantize.embedding.weight"):
        with pytest.raises(RuntimeError, match=missing):
            tiny_vq().load_state_dict({k: v for k, v in state.items() if k != missing})
    with pytest.raises(RuntimeError, match="surplus"):
        tiny_vq().load_state_dict({**state, "quantize.surplus": torch.zeros(1)})


def test_training_mode_works_anywhere_and_copies():
    """The usage window is no parameter, so that training runs on the CPU and a moved model can be copied."""
    model = tiny_vq().to(torch.float64).to(torch.float32).train()
    for _ in range(2):
        model(torch.rand(1, 3, 16, 16))
    window = model.quantize.codebook_used
    assert not isinstance(window, nn.Parameter)
    assert window.dtype == torch.float32 and not window.requires_grad and window.grad_fn is None
    twin = copy.deepcopy(model)
    model(torch.rand(1, 3, 16, 16))
    assert not torch.equal(twin.quantize.codebook_used, model.quantize.codebook_used)


@pytest.mark.slow
def test_compiles_into_one_graph():
    model = tiny_vq(entropy_loss_ratio=0.1).train()
    twin = copy.deepcopy(model)
    x = torch.rand(2, 3, 16, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs = []
    for run in (compiled, twin):
        reconstruction, losses = run(x)
        (reconstruction.mean() + sum(losses[:3])).backward()
        outputs.append([reconstruction, *losses])
    torch.testing.assert_close(outputs[0], outputs[1])
    assert torch.equal(model.quantize.codebook_used, twin.quantize.codebook_used)
    torch.testing.assert_close(gradient_norms(model), gradient_norms(twin))


def test_bfloat16_autocast_keeps_the_codes():
    """Latents are equal, so any other code could only come from a search in low precision."""
    model = tiny_vq().eval()
    model.encoder = nn.Identity()
    model.quant_conv = nn.Identity()
    z = torch.randn(4, 8, 32, 32, generator=torch.Generator().manual_seed(0))
    exact = model.encode(z)[2][2]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.encode(z)[2][2], exact)


def test_attention_is_softmax_of_scaled_products():
    block = AttnBlock(32)
    x = torch.randn(2, 32, 3, 5)
    q, k, v = (getattr(block, name)(block.norm(x)).flatten(2) for name in "qkv")
    weights = torch.einsum("bci,bcj->bij", q, k).mul(32**-0.5).softmax(-1)
    attended = torch.einsum("bij,bcj->bci", weights, v).view_as(x)
    torch.testing.assert_close(block(x), x + block.proj_out(attended), atol=1e-5, rtol=1e-5)


def test_resampling():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert torch.equal(Upsample(1, False)(x)[0, 0, :2, :4], torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1]]))
    assert Downsample(1, False)(x).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    down = Downsample(1, True)
    nn.init.ones_(down.conv.weight)
    nn.init.zeros_(down.conv.bias)
    # Windows start at rows and columns 0 and 2; beyond the right and lower border there are zeros.
    assert down(x).flatten().tolist() == [45.0, 3 + 7 + 11 + 2 + 6 + 10.0, 8 + 9 + 10 + 12 + 13 + 14.0, 50.0]


def test_normalisation_kinds():
    assert isinstance(Normalize(32, "batch"), nn.SyncBatchNorm)
    assert (Normalize(64).num_groups, Normalize(64).eps) == (32, 1e-6)
    with pytest.raises(ValueError, match="'group' or 'batch'"):
        Normalize(32, "layer")


def test_shortcuts():
    assert not any("shortcut" in name for name in keys_of(ResnetBlock(32)))
    assert keys_of(ResnetBlock(32, 64))["nin_shortcut.weight"] == (64, 32, 1, 1)
    block = ResnetBlock(32, 64, conv_shortcut=True)
    assert keys_of(block)["conv_shortcut.weight"] == (64, 32, 3, 3)
    assert block(torch.zeros(1, 32, 4, 4)).shape == (1, 64, 4, 4)


def test_encoder_and_decoder_alone():
    encoder = Encoder(ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=6)
    decoder = Decoder(z_channels=6, ch=32, ch_mult=(1, 2), num_res_blocks=1, out_channels=1)
    z = encoder(torch.rand(1, 3, 8, 12))
    assert z.shape == (1, 6, 4, 6)
    assert decoder(z).shape == (1, 1, 8, 12)
    assert decoder.last_layer is decoder.conv_out.weight


def test_dropout_reaches_all_residual_blocks():
    model = tiny_vq(dropout_p=0.3)
    blocks = [module for module in model.modules() if isinstance(module, ResnetBlock)]
    assert len(blocks) == 2 + 2 + 4 + 2
    assert {block.dropout.p for block in blocks} == {0.3}
