"""Codes of classes from vLLM are those of `generate`."""

from __future__ import annotations

import pytest
import torch
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from autoregressive.serve.vllm_plugin import LOGITS_PROCESSOR, register
from tests.vllm.engines import drawn, engine, greedy, tiny

LABELS = [0, 1, 2, 3, 4, 0, 2, 4, 1, 3, 3, 1]


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def llm(model, tmp_path_factory):
    return engine(model, tmp_path_factory.mktemp("gpt"), max_images=5)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1.5, 4.0, 7.5])
def test_greedy_codes(llm, model, scale):
    codes = llm.generate(LABELS, cfg_scale=scale, temperature=0)
    assert codes.dtype == torch.int32
    assert torch.equal(codes, greedy(model, LABELS, [scale] * len(LABELS)))


def test_scales_of_neighbours_do_not_mix(llm, model):
    scales = [1.0, 4.0, 7.5, 1.5, 2.0, 0.5, 3.0, 1.0, 9.0, 4.0, 1.1, 6.0]
    codes = llm.generate(LABELS, cfg_scale=scales, temperature=0)
    assert torch.equal(codes, greedy(model, LABELS, scales))
    assert not torch.equal(codes, greedy(model, LABELS, [4.0] * len(LABELS)))


def test_requests_that_come_late_and_wait_for_seats(llm, model):
    scales = [1.0 + i / 2 for i in range(len(LABELS))]
    names, done = [], {}
    arrivals = {0: LABELS[:2], 3: LABELS[2:3], 4: LABELS[3:9], 25: LABELS[9:]}  # by the step before which they come
    for step in range(200):
        for label in arrivals.get(step, []):
            params = llm.model.sampling_params(cfg_scale=scales[len(names)], temperature=0.0)
            names.append(llm.submit(llm.model.prompt(label), params))
        done.update({name: codes for name, codes, finished in llm.step() if finished})
    assert torch.equal(torch.tensor([done[name] for name in names]), greedy(model, LABELS, scales).long())


def test_seeds_give_the_pictures_of_the_other_engines(llm, model):
    options = {"cfg_scale": 3.0, "top_k": 30, "top_p": 0.9, "temperature": 1.1}
    seeds = [7, 7, 0, 1, 2, 3, 4, 5, 6, 8, 9, 10]
    together = llm.generate(LABELS, seeds=seeds, **options)
    assert torch.equal(together, drawn(model, LABELS, seeds, **options))
    assert torch.equal(llm.generate(LABELS[3:4], seeds=seeds[3:4], **options), together[3:4])  # alone


@pytest.mark.parametrize("options", [{"top_k": 0}, {"top_k": 5}, {"top_p": 0.5, "top_k": 0}, {"temperature": 5.0}])
def test_each_filter(llm, model, options):
    settings = {"cfg_scale": 2.0, "top_k": 0, **options}
    assert torch.equal(llm.generate(LABELS, seeds=3, **settings), drawn(model, LABELS, range(3, 15), **settings))


def test_several_images_of_a_class(llm, model):
    codes = llm.generate([2, 0], n=3, seeds=10, cfg_scale=2.0, top_k=0)
    assert torch.equal(codes, drawn(model, [2, 2, 2, 0, 0, 0], range(10, 16), cfg_scale=2.0))


@pytest.mark.parametrize(
    ("conditions", "options", "words"),
    [
        ([5], {}, "classes are 0 to 4, not 5"),
        ([0, -1], {}, "classes are 0 to 4, not -1"),
        (["cat"], {}, "expected a number, got str"),
        ([0], {"temperature": -1.0}, "temperature"),
        ([0], {"temperature": float("nan")}, "temperature"),
        ([0], {"top_p": 1.5}, "top_p"),
        ([0], {"top_k": -1}, "top_k"),
        ([0], {"n": 0}, "at least one image"),
        ([0], {"cfg_scale": float("inf")}, "guidance scale"),
        ([0, 1], {"seeds": [0]}, "2 images need as many seeds"),
        ([0], {"seeds": -3}, "a seed is 0 or more"),
    ],
)
def test_mistakes_never_reach_the_engine(llm, conditions, options, words):
    with pytest.raises(ValueError, match=words):
        llm.generate(conditions, **options)
    assert not llm.engine.has_unfinished_requests()


def test_a_token_that_is_no_class_harms_nobody(llm, model):
    params = llm.model.sampling_params(temperature=0.0)
    llm.submit({"prompt_token_ids": [10**6]}, params)
    while llm.engine.has_unfinished_requests():
        list(llm.step())
    assert torch.equal(llm.generate([1], temperature=0), greedy(model, [1], [4.0]))


def test_an_interrupted_call_leaves_nothing_behind(llm, model):
    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm.generate(LABELS, on_codes=stop)
    assert not llm.engine.has_unfinished_requests()
    assert torch.equal(llm.generate([1], temperature=0), greedy(model, [1], [4.0]))


def test_progress_counts_every_code(llm):
    steps = []
    llm.generate(LABELS, on_codes=steps.append)
    assert sum(steps) == len(LABELS) * 16
    assert max(steps) <= 5  # as many as images are drawn at once


def test_vllm_draws_where_no_seed_of_ours_is_given(llm, model):
    def codes(params: SamplingParams) -> list[int]:
        llm.submit(llm.model.prompt(2), params)
        last: list[int] = []
        while llm.engine.has_unfinished_requests():
            last = [drawn_codes for _, drawn_codes, _ in llm.step()] or last
        return last[0]

    common = {"max_tokens": 16, "ignore_eos": True, "detokenize": False}
    greedily = codes(SamplingParams(temperature=0.0, **common))  # with the folder's own scale, 4
    assert greedily == greedy(model, [2], [4.0])[0].tolist()
    one = codes(SamplingParams(temperature=1.0, seed=3, extra_args={"cfg_scale": 2.0}, **common))
    assert one == codes(SamplingParams(temperature=1.0, seed=3, extra_args={"cfg_scale": 2.0}, **common))
    assert one != greedily


@pytest.mark.parametrize("extra", [{"cfg_scale": "4"}, {"image_seed": 1.5}, {"image_seed": -1}, {"image_top_k": True}])
def test_wrong_extra_arguments_are_refused_where_they_come_in(llm, extra):
    with pytest.raises(VLLMValidationError, match=next(iter(extra))):
        llm.submit(llm.model.prompt(0), SamplingParams(temperature=0.0, max_tokens=16, extra_args=extra))
    assert not llm.engine.has_unfinished_requests()


def test_an_engine_without_the_processor_does_not_start(model, tmp_path):
    with pytest.raises(ValueError, match=f"--logits-processors {LOGITS_PROCESSOR}"):
        engine(model, tmp_path, logits_processors=None)


def test_registering_twice_is_harmless():
    register()
    register()


def test_guidance_that_ends_early(model, tmp_path):
    llm = engine(model, tmp_path, cfg_interval=5)
    want = greedy(model, LABELS, [4.0] * len(LABELS), cfg_interval=5)
    assert torch.equal(llm.generate(LABELS, cfg_scale=4.0, temperature=0), want)
    assert not torch.equal(want, greedy(model, LABELS, [4.0] * len(LABELS)))


def test_an_engine_without_guidance(model, tmp_path):
    llm = engine(model, tmp_path, guidance=False)
    assert torch.equal(llm.generate(LABELS, cfg_scale=1.0, temperature=0), greedy(model, LABELS, [1.0] * 12))
    with pytest.raises(ValueError, match="guidance=False"):
        llm.generate([0], cfg_scale=4.0)


def test_a_model_without_a_null_class(tmp_path):
    model = tiny(class_dropout_prob=0.0)
    with pytest.raises(ValueError, match="no null class"):
        engine(model, tmp_path / "guided")
    llm = engine(model, tmp_path, guidance=False)
    assert torch.equal(llm.generate(LABELS, cfg_scale=1.0, temperature=0), greedy(model, LABELS, [1.0] * 12))


@pytest.mark.parametrize(
    "fields",
    [{"dim": 200, "n_head": 2}, {"dim": 80, "n_head": 4}, {"n_kv_head": 2}, {"dim": 128, "n_head": 2}],
    ids=["heads of 100", "heads of 20", "shared keys", "heads of 64"],
)
def test_heads_of_other_widths(tmp_path, fields):
    model = tiny(**fields)
    llm = engine(model, tmp_path)
    assert torch.equal(llm.generate(LABELS, cfg_scale=4.0, temperature=0), greedy(model, LABELS, [4.0] * 12))


def test_preempted_images_are_the_same(tmp_path, preemptions):
    model = tiny(block_size=64)
    llm = engine(model, tmp_path, block_size=32, num_gpu_blocks_override=9)
    scales = [1.0, 4.0, 7.5, 1.5, 2.0, 3.0, 5.0, 6.0]
    seeds = list(range(8))
    assert torch.equal(llm.generate(LABELS[:8], cfg_scale=scales, temperature=0), greedy(model, LABELS[:8], scales))
    assert preemptions() > 0
    codes = llm.generate(LABELS[:8], seeds=seeds, cfg_scale=4.0, top_k=20)
    assert torch.equal(codes, drawn(model, LABELS[:8], seeds, cfg_scale=4.0, top_k=20))


def test_half_precision(model, tmp_path):
    llm = engine(tiny().bfloat16(), tmp_path)
    codes = llm.generate(LABELS, cfg_scale=4.0, temperature=0)
    assert codes.shape == (12, 16)
    # the likeliest first code is clear enough to survive rounding in most images
    assert (codes[:, 0] == greedy(model, LABELS, [4.0] * 12)[:, 0]).float().mean() > 0.7
