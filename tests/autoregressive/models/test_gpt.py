"""The forward pass against the goldens, the modes of `forward`, the loss, and what a state dict holds."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from autoregressive.models import gpt
from autoregressive.models.generate import generate
from autoregressive.models.gpt import GPT_models, ModelArgs, Transformer
from autoregressive.models.text_condition import text_attention_mask
from tests import golden
from tests.autoregressive.models.tiny import (
    captions,
    formula_model,
    formula_values,
    from_golden,
    random_model,
)

LAYER_KEYS = [
    "attention.wqkv.weight",
    "attention.wo.weight",
    "feed_forward.w1.weight",
    "feed_forward.w3.weight",
    "feed_forward.w2.weight",
    "attention_norm.weight",
    "ffn_norm.weight",
]


def formula_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Image tokens (2, 16) and labels (2,) that go with `formula_model`."""
    i = torch.arange(16)
    return torch.stack([(7 * i + 3) % 64, (11 * i + 5) % 64]), torch.tensor([1, 9])


def formula_captions() -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded features (2, 120, 24) of 7 and 20 tokens, and their mask."""
    mask = torch.arange(120) >= torch.tensor([[113], [100]])
    features = formula_values(99, 2 * 120 * 24).float().reshape(2, 120, 24)
    return features * mask[..., None], mask.long()


@golden.cases("gpt.train")
def test_training_forward_and_gradients_match_the_golden(case):
    model = from_golden(case).train()
    if "seed_before_forward" in case.params:
        torch.manual_seed(case.params["seed_before_forward"])
        drop_ids = (torch.rand(len(case.tensors["cond"])) < model.cls_embedding.dropout_prob).int().tolist()
        torch.manual_seed(case.params["seed_before_forward"])
    else:
        drop_ids = None
    arguments = {k: v for k, v in case.tensors.items() if k in ("targets", "mask", "valid")}
    logits, loss = model(case.tensors["idx"], case.tensors["cond"], **arguments)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    case.check(
        {
            "logits": logits,
            "loss": loss,
            "drop_ids": drop_ids,
            "params_without_grad": [name for name, grad in gradients.items() if grad is None],
            "grad_l2": torch.stack([gradients[name].norm() for name in sorted(gradients)]),
            **{f"grad.{name}": grad for name, grad in gradients.items()},
        }
    )


@golden.cases("gpt.eval_full")
def test_evaluation_forward_matches_the_golden(case):
    model = from_golden(case)
    given = {k: v for k, v in case.tensors.items() if k in ("input_pos", "targets")}
    with torch.no_grad():
        logits, loss = model(case.tensors["idx"], case.tensors["cond"], **given)
    case.check({"logits": logits, "loss": loss})


@golden.cases("gpt.big_forward")
def test_full_size_forward_matches_the_golden(case):
    model = from_golden(case)
    tensors = dict(case.tensors)
    if "cond" not in tensors:  # made by the recipe that its golden entry names
        normals = np.random.Generator(np.random.PCG64(133)).standard_normal((1, 120, 2048), dtype=np.float32)
        tensors["cond"] = torch.from_numpy(normals).to(tensors["idx"].device)
    with torch.no_grad():
        logits, loss = model(tensors["idx"], tensors["cond"], targets=tensors["targets"])
        model.train()
        _, train_loss = model(tensors["idx"], tensors["cond"], targets=tensors["targets"])
    rows, columns = case.params["slice_stride"]
    case.check(
        {
            "logits_slice": logits[:, ::rows, ::columns],
            "argmax": logits.argmax(-1),
            "logsumexp": logits.logsumexp(-1),
            "row_mean": logits.mean(-1),
            "row_l2": logits.norm(dim=-1),
            "train_loss": train_loss,
            "eval_ce": loss.item(),
            "param_count": sum(p.numel() for p in model.parameters()),
        }
    )


@golden.cases("keys")
def test_published_sizes_have_the_published_keys_and_counts(case):
    for size, facts in case.expect.items():
        if size not in GPT_models:
            continue
        stored = json.loads((golden.FOLDER / "keys" / f"{size.lower()}.json").read_text())
        for model_type, prefix in (("c2i", 1), ("t2i", 120)):
            with torch.device("meta"):
                model = GPT_models[size](model_type=model_type, cls_token_num=prefix)
            state = model.state_dict()
            keys = [[k, list(state[k].shape), str(state[k].dtype).removeprefix("torch.")] for k in sorted(state)]
            body = [entry for entry in stored["keys_c2i"] if not entry[0].startswith("cls_embedding.")]
            assert keys == (stored["keys_c2i"] if model_type == "c2i" else [*stored["cond_keys_t2i"], *body])
            assert len(keys) == 7 * facts["config"]["n_layer"] + (4 if model_type == "c2i" else 6)
            assert sum(p.numel() for p in model.parameters()) == facts[f"params_{model_type}"]
            shape = facts["config"]
            assert {name: getattr(model.config, name) for name in shape} == shape


@pytest.mark.parametrize(
    ("size", "block_params"),
    [("GPT-B", 7_079_424), ("GPT-3B", 124_524_800), ("GPT-7B", 202_383_360)],
)
def test_parameters_of_one_block(size, block_params):
    with torch.device("meta"):
        block = GPT_models[size]().get_fsdp_wrap_module_list()[0]
    assert sum(p.numel() for p in block.parameters()) == block_params


def test_state_dict_order_is_that_of_optimizer_states():
    blocks = [f"layers.{i}.{key}" for i in range(2) for key in LAYER_KEYS]
    body = ["tok_embeddings.weight", *blocks, "norm.weight", "output.weight"]
    assert list(random_model().state_dict()) == ["cls_embedding.embedding_table.weight", *body]
    projections = ["cls_embedding.cap_proj.fc1.weight", "cls_embedding.cap_proj.fc2.weight"]
    text_model = random_model(model_type="t2i", cls_token_num=3)
    assert list(text_model.state_dict()) == ["cls_embedding.uncond_embedding", *projections, *body]
    assert [name for name, _ in text_model.named_parameters()] == [*projections, *body]


def test_small_sizes_let_multiple_of_be_overridden():
    small = GPT_models["GPT-XS"](vocab_size=16, num_classes=3)
    assert (small.config.n_layer, small.config.n_head, small.config.dim) == (4, 4, 128)
    assert small.layers[0].feed_forward.w1.weight.shape == (384, 128)
    assert gpt.GPT_S(vocab_size=16).layers[0].feed_forward.w1.weight.shape == (512, 192)
    assert gpt.GPT_S(vocab_size=16, multiple_of=256).config.multiple_of == 256
    assert gpt.GPT_S(vocab_size=16, multiple_of=100).layers[0].feed_forward.w1.weight.shape == (600, 192)


def test_factories_fix_depth_heads_and_width():
    with pytest.raises(TypeError):
        gpt.GPT_B(dim=512)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"model_type": "i2i"}, "model_type"),
        ({"block_size": 15}, "square"),
        ({"dim": 30}, "n_head"),
        ({"dim": 24, "n_head": 4}, "multiple of 4"),
        ({"n_kv_head": 3}, "n_kv_head"),
        ({"cls_token_num": 2}, "cls_token_num"),
    ],
)
def test_impossible_configurations_are_refused(fields, word):
    with pytest.raises(ValueError, match=word):
        random_model(**fields)


def test_first_loss_is_that_of_a_uniform_guess():
    torch.manual_seed(0)
    model = Transformer(ModelArgs(dim=32, n_layer=2, n_head=4, block_size=16, multiple_of=8))
    tokens = torch.randint(16384, (2, 16))
    _, loss = model(tokens[:, :-1], torch.tensor([3, 7]), targets=tokens)
    assert loss.item() == pytest.approx(math.log(16384), abs=1e-5)
    assert loss.item() == pytest.approx(9.7041, abs=1e-4)
    assert model.output.weight.abs().max() == 0
    assert model.layers[1].feed_forward.w2.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_formula_weights_give_the_published_class_conditional_numbers():
    model = formula_model().train()
    model.cls_embedding.dropout_prob = 0.0
    tokens, labels = formula_batch()
    logits, loss = model(tokens[:, :-1], labels, targets=tokens)
    assert loss.item() == pytest.approx(4.63180, abs=1e-5)
    first = torch.tensor([0.15765, -2.56381, 0.62300, 1.24112, -0.48850, -0.83331])
    last = torch.tensor([-1.07916, 1.04852, -1.15134, 1.33588, -0.09134, -0.43673])
    torch.testing.assert_close(logits[0, 0, :6], first, atol=2e-5, rtol=0)
    torch.testing.assert_close(logits[1, 15, :6], last, atol=2e-5, rtol=0)
    _, loss = model(tokens[:, :-1], labels, targets=tokens, valid=torch.tensor([1, 0]))
    assert loss.item() == pytest.approx(4.89999, abs=1e-5)


def test_formula_weights_give_the_published_text_conditional_numbers():
    model = formula_model(model_type="t2i", cls_token_num=120).train()
    model.cls_embedding.uncond_prob = 0.0
    (tokens, _), (features, emb_masks) = formula_batch(), formula_captions()
    visible = torch.cat([emb_masks.bool(), torch.ones(2, 16, dtype=torch.bool)], dim=1)
    mask = text_attention_mask(visible)[..., :-1, :-1]
    logits, loss = model(tokens[:, :-1], features, targets=tokens, mask=mask, valid=torch.tensor([1, 1]))
    assert loss.item() == pytest.approx(4.65485, abs=1e-5)
    first = torch.tensor([1.13556, 0.77157, -0.17535, 1.97885, 1.41701, -0.27464])
    torch.testing.assert_close(logits[0, 0, :6], first, atol=2e-5, rtol=0)


@pytest.mark.parametrize("model_type", ["c2i", "t2i"])
def test_validation_loss_in_evaluation_mode_equals_the_training_loss(model_type):
    model = random_model(model_type=model_type, cls_token_num=1 if model_type == "c2i" else 4)
    model.cls_embedding.dropout_prob = model.cls_embedding.uncond_prob = 0.0  # whichever it has
    cond = torch.tensor([0, 4]) if model_type == "c2i" else captions(2, [2, 4], 4)[0]
    tokens = torch.randint(50, (2, 9))
    with torch.no_grad():
        logits, loss = model(tokens[:, :-1], cond, targets=tokens)
        train_logits, train_loss = model.train()(tokens[:, :-1], cond, targets=tokens)
    assert logits.shape == (2, 9, 50)
    torch.testing.assert_close(logits, train_logits)
    torch.testing.assert_close(loss, train_loss)
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), tokens.flatten()))


def test_evaluation_forward_takes_any_number_of_tokens():
    model = random_model(model_type="t2i", cls_token_num=4)
    cond, _ = captions(2, [2, 4], 4)
    tokens = torch.randint(50, (2, 5))
    with torch.no_grad():
        whole, _ = model(tokens, cond, torch.arange(9))
        cut, _ = model(tokens, cond)
        last, _ = model(tokens, cond, last_only=True)
    assert whole.shape == (2, 9, 50)
    torch.testing.assert_close(cut, whole[:, 3:])
    torch.testing.assert_close(last, whole[:, -1:])


def test_loss_of_no_valid_sample_is_zero_and_has_a_gradient():
    model = random_model().train()
    tokens = torch.randint(50, (2, 9))
    _, loss = model(tokens[:, :-1], torch.tensor([0, 1]), targets=tokens, valid=torch.zeros(2))
    loss.backward()
    assert loss.item() == 0
    assert model.output.weight.grad.abs().max() == 0


def test_the_loss_waits_for_no_value_on_the_device():
    model = random_model().to("meta")
    tokens, labels = torch.zeros(2, 9, dtype=torch.long, device="meta"), torch.zeros(2, dtype=torch.long)
    _, loss = model(tokens[:, :-1], labels.to("meta"), targets=tokens, valid=labels.to("meta"))
    assert loss.is_meta  # reading a value of a tensor without data would have failed


def test_logits_are_float32_in_a_bfloat16_model_and_under_autocast():
    tokens, label = torch.randint(50, (1, 8)), torch.tensor([2])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert random_model()(tokens, label)[0].dtype == torch.float32
    with torch.no_grad():
        assert random_model().bfloat16()(tokens, label)[0].dtype == torch.float32


def test_foreign_keys_are_dropped_and_everything_else_is_strict():
    model = random_model()
    state = model.state_dict()
    changed = {key: value + 1 for key, value in state.items()}
    extra = {"freqs_cis": torch.zeros(3), "layers.0.attention.kv_cache.k_cache": torch.zeros(3)}
    given = {**changed, **extra}
    model.load_state_dict(given)
    torch.testing.assert_close(model.norm.weight, changed["norm.weight"])
    assert set(extra) <= set(given)  # the caller's dictionary is left alone
    with pytest.raises(RuntimeError, match=r"layers\.0\.attention\.other"):
        model.load_state_dict({**state, "layers.0.attention.other": torch.zeros(3)})
    with pytest.raises(RuntimeError, match=r"norm\.weight"):
        model.load_state_dict({k: v for k, v in state.items() if k != "norm.weight"})


@pytest.mark.parametrize("assign", [False, True])
def test_a_model_made_on_the_meta_device_works_once_loaded(assign):
    source = random_model(n_kv_head=2)
    with torch.device("meta"):
        model = Transformer(source.config)
    assert model.freqs_cis.is_meta
    if not assign:
        model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict(), assign=assign)
    label = torch.tensor([1, 2])
    tokens = generate(model, label, 9, sample_logits=False)
    assert torch.equal(tokens, generate(source, label, 9, sample_logits=False))
    assert torch.equal(model.freqs_cis, source.freqs_cis)


def test_rotary_table_stays_float32_and_out_of_the_state_dict():
    model = random_model().bfloat16()
    assert model.freqs_cis.dtype == torch.float32
    assert model.freqs_cis.shape == (10, 4, 2)
    assert not any("rotary" in key or "freqs" in key for key in model.state_dict())
    assert not list(model.buffers())


def test_training_after_sampling_in_inference_mode():
    with torch.device("meta"):
        model = Transformer(random_model().config)
    model.load_state_dict(random_model().state_dict(), assign=True)  # its rotary table is yet to be made
    with torch.inference_mode():
        generate(model, torch.tensor([1]), 3)
    tokens = torch.randint(50, (1, 9))
    _, loss = model.train()(tokens[:, :-1], torch.tensor([1]), targets=tokens)
    loss.backward()
    assert model.tok_embeddings.weight.grad.abs().sum() > 0


def test_uncond_embedding_is_an_ordinary_buffer():
    model = random_model(model_type="t2i", cls_token_num=4, class_dropout_prob=0.9).train()
    buffer = model.cls_embedding.uncond_embedding
    assert not isinstance(buffer, torch.nn.Parameter) and not buffer.requires_grad
    tokens = torch.randint(50, (2, 9))
    _, loss = model(tokens[:, :-1], captions(2, [2, 4], 4)[0], targets=tokens)
    loss.backward()
    assert buffer.grad is None
    clone = copy.deepcopy(model.to(torch.float64))
    assert torch.equal(clone.cls_embedding.uncond_embedding, model.cls_embedding.uncond_embedding)


def test_dropped_captions_work_for_any_number_of_positions():
    for positions in (4, 130):
        model = random_model(model_type="t2i", cls_token_num=positions, class_dropout_prob=1.0).train()
        assert model.cls_embedding.uncond_embedding.shape == (max(120, positions), 6)
        tokens = torch.randint(50, (2, 9))
        features, _ = captions(2, [3, 2], positions)
        logits, _ = model(tokens[:, :-1], features)
        nothing = model.cls_embedding.uncond_embedding[-positions:].expand(2, -1, -1)
        expected, _ = model.eval()(tokens[:, :-1], nothing)
        torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("shape", [(2, 3, 6), (2, 4, 5), (2, 4)])
def test_captions_of_the_wrong_shape_are_refused(shape):
    model = random_model(model_type="t2i", cls_token_num=4)
    with pytest.raises(ValueError, match="caption features"):
        model(torch.zeros(2, 3, dtype=torch.long), torch.zeros(shape))


def test_too_many_tokens_and_no_input_are_refused():
    model = random_model()
    with pytest.raises(ValueError, match="too many"):
        model(torch.zeros(1, 10, dtype=torch.long), torch.tensor([1]))
    with pytest.raises(ValueError, match="image tokens"):
        model(None, None)
    with pytest.raises(ValueError, match="setup_caches"):
        model(None, torch.tensor([1]), torch.arange(1))


def test_drop_path_rates_rise_linearly_and_blocks_are_the_wrap_units():
    model = random_model(n_layer=5, drop_path_rate=0.4)
    rates = [getattr(layer.drop_path, "drop_prob", 0.0) for layer in model.layers]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert isinstance(model.layers[0].drop_path, torch.nn.Identity)
    assert model.get_fsdp_wrap_module_list() == list(model.layers)


def test_token_dropout_covers_prefix_and_tokens():
    model = random_model(token_dropout_p=1.0).train()
    tokens = torch.randint(50, (1, 8))
    a, _ = model(tokens, torch.tensor([1]))
    b, _ = model(tokens.flip(1), torch.tensor([3]))
    assert torch.equal(a, b)  # nothing of the input is left
