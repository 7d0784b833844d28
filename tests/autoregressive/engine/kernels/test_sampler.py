"""The fused end of a decode step against guidance, filtering and noise as the models define them.

The `check_` functions run interpreted here, and as compiled kernels when they are called with device "cuda".
"""

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from autoregressive.engine.kernels.sampler import advance, exponential, philox_words, sample_tokens
from autoregressive.models.guidance import guided_logits
from autoregressive.models.noise import ImageNoise, exponential_noise, philox
from autoregressive.models.sampling import sample, top_k_top_p_filtering
from tests.autoregressive.engine.kernels.interpreted import run_interpreted

POISON = -7
SEEDS = [2**62 + 12345678901, -1, 77, 0, 1, 2**32, 2**63 - 9, -(2**63)]


class Step:
    """Inputs and outputs of one step, the same for the same arguments; N is `count`, five at most."""

    def __init__(
        self,
        device: str,
        images: int = 3,
        vocabulary: int = 1000,
        with_uncond: bool = False,
        dtype: torch.dtype = torch.float32,
        spread: float = 0.3,
        count: int = 5,
        index: int = 3,
    ) -> None:
        g = torch.Generator().manual_seed(vocabulary + images)
        rows = 2 * images if with_uncond else images
        self.logits = (torch.randn(rows, vocabulary, generator=g) * spread).to(device, dtype)
        self.scales = torch.tensor([1.0, 2.0, 7.5, 4.25, 1.75], device=device)[:count].clone()
        self.temperatures = torch.tensor([1.0, 0.5, 1.5, 0.9, 1e-5], device=device)[:count].clone()
        self.index = torch.tensor([index], device=device)
        seeds = [SEEDS[i % len(SEEDS)] + i // len(SEEDS) for i in range(images)]
        self.seeds = torch.tensor(seeds, device=device)
        self.noise_from = torch.tensor([254], device=device)
        self.forced_tokens = torch.full((images, count), -1, device=device)
        self.buffer = torch.full((images + 2, count + 2), POISON, device=device)  # room around the tokens
        self.tokens = self.buffer[1:-1, 1:-1]
        self.next_token = torch.full((images, 1), POISON, device=device)
        self.with_uncond = with_uncond

    def run(self, **options) -> Tensor:
        """The sampled tokens (B,); AssertionError unless both places have them."""
        sample_tokens(
            self.logits, self.scales, self.temperatures, self.index, self.seeds, self.noise_from, self.forced_tokens,
            self.tokens, self.next_token, with_uncond=self.with_uncond, **options,
        )  # fmt: skip
        assert torch.equal(self.tokens[:, self.index.item()], self.next_token[:, 0])
        return self.next_token[:, 0].clone()

    def heated(self) -> Tensor:
        """Guided logits divided by the temperature, float32 (B, V)."""
        index, logits = self.index.item(), self.logits.float()
        if self.with_uncond:
            logits = guided_logits(logits, max(self.scales[index].item(), 1.0))
        return logits / self.temperatures[index]

    def expected(self, top_k: int | None = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
        """The tokens (B,) that `sampling.sample` takes, all ties at the edge of top-p kept."""
        logits = top_k_top_p_filtering(self.heated(), top_k)
        nucleus = top_k_top_p_filtering(logits, 0, top_p)
        least = nucleus.masked_fill(nucleus == -torch.inf, torch.inf).amin(dim=-1, keepdim=True)
        logits = logits.masked_fill(logits < least, -torch.inf)
        noise = ImageNoise(self.seeds, self.seeds.device, (self.noise_from + self.index).item())
        return sample(logits[:, None], generators=noise, min_p=min_p)[0][:, 0]


def _assert_as_expected(step: Step, **options) -> None:
    expected, tokens = step.expected(**options), step.run(**options)
    assert torch.equal(tokens, expected), (options, tokens.tolist(), expected.tolist())


@triton.jit
def _words_kernel(seeds, position, out, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    words = philox_words(tl.load(seeds + row), tl.load(position), BLOCK)
    tl.store(out + row * BLOCK + tl.arange(0, BLOCK), words.to(tl.int64))


@triton.jit
def _exponential_kernel(words, out, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, exponential(tl.load(words + at).to(tl.uint32)))


def _words(device: str) -> None:
    seeds = torch.tensor(SEEDS, device=device)
    for position, block in itertools.product((0, 1, 255, 2**31 + 5), (16, 1024)):
        out = torch.full((len(SEEDS), block), POISON, device=device)
        _words_kernel[(len(SEEDS),)](seeds, torch.tensor([position], device=device), out, BLOCK=block)
        b, zero = torch.arange(block // 4, device=device)[None], torch.zeros(1, 1, dtype=torch.int64, device=device)
        key = seeds[:, None] & 0xFFFFFFFF, (seeds[:, None] >> 32) & 0xFFFFFFFF
        words = philox((b, zero + position, zero, zero), key)
        assert torch.equal(out, torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(1))


def _exponential(device: str) -> None:
    edges = [2**k + d for k in range(33) for d in (-200, -129, -128, -127, -3, -2, -1, 0, 1, 2, 3, 127, 128, 129)]
    edges = torch.tensor([w for w in edges if 0 <= w < 2**32])
    spaced = torch.arange(0, 2**32, 65521)
    words = torch.cat([torch.arange(4096), edges, spaced, 2**32 - 1 - torch.arange(4096)])
    words = words[: len(words) // 1024 * 1024].to(device)
    out = torch.empty(len(words), device=device)
    _exponential_kernel[(len(words) // 1024,)](words, out, BLOCK=1024)
    u = (words.float() + 0.5) * 2.0**-32
    exact = -torch.log1p(-u.double())
    finite = u < 1
    assert torch.equal(out.isinf(), ~finite)
    assert not finite.all() and (out > 0).all()
    error = ((out.double() - exact).abs() / exact)[finite].max() * 2**24  # in half to one units in the last place
    assert error < (3 if device == "cuda" else 5), error  # NumPy's logarithm, which the interpreter has, is less good
    torch.testing.assert_close(out, -torch.log1p(-u), rtol=4e-7, atol=0)
    seeds = torch.tensor(SEEDS, device=device)
    own = torch.empty(len(SEEDS), 1024, device=device)
    drawn = torch.empty(len(SEEDS), 1024, dtype=torch.int64, device=device)
    _words_kernel[(len(SEEDS),)](seeds, torch.tensor([9], device=device), drawn, BLOCK=1024)
    _exponential_kernel[(len(SEEDS),)](drawn, own, BLOCK=1024)
    torch.testing.assert_close(own, exponential_noise(seeds, 9, 1024), rtol=4e-7, atol=0)


def _filters(device: str) -> None:
    every = list(itertools.product((0, 1, 50, 1000, 2000), (1.0, 0.9, 0.3), (0.0, 0.05)))
    for dtype, with_uncond in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        step = Step(device, with_uncond=with_uncond, dtype=dtype)
        all_here = with_uncond == (dtype == torch.float32)  # each type in one of the two ways: the time it takes
        for top_k, top_p, min_p in every if all_here else every[::7]:
            step.noise_from += 1
            _assert_as_expected(step, top_k=top_k, top_p=top_p, min_p=min_p)


def _plain_sample(device: str) -> None:
    """`sampling.sample` itself, from logits without ties."""
    step = Step(device, with_uncond=True, index=0)
    step.scales[0] = 4.0
    for options in ({}, {"top_k": 50}, {"top_p": 0.5}, {"top_k": 200, "top_p": 0.8, "min_p": 0.02}, {"top_k": None}):
        noise = ImageNoise(step.seeds, device, 254)
        expected, _ = sample(guided_logits(step.logits, 4.0)[:, None], 1.0, generators=noise, **options)
        assert torch.equal(step.run(**options), expected[:, 0])


def _vocabularies(device: str) -> None:
    for vocabulary, dtype in ((3, torch.float32), (64, torch.float16), (1001, torch.bfloat16), (16384, torch.float32)):
        step = Step(device, images=3, vocabulary=vocabulary, with_uncond=True, dtype=dtype)
        for options in ({}, {"top_k": 2000}, {"top_k": 2, "min_p": 0.1}, {"top_k": 2000, "top_p": 0.95}):
            _assert_as_expected(step, **options)
    step = Step(device, images=2, vocabulary=32768)
    _assert_as_expected(step, top_k=2000, top_p=0.9)


def _edges_of_filters(device: str) -> None:
    """Nearly equal logits: the last token kept, and the first one dropped, would be sampled often."""
    step = Step(device, images=20, vocabulary=64, spread=0.01)
    step.logits[:] = step.logits[0]
    ranked = step.logits[0].argsort(descending=True)
    for k in (1, 3, 63):
        tokens = step.run(top_k=k)
        assert torch.equal(tokens, step.expected(top_k=k))
        assert k == 63 or set(tokens.tolist()) == set(ranked[:k].tolist())
    probs = step.heated()[0].softmax(-1)[ranked].cumsum(-1)
    for kept in (1, 3):  # the last of these takes the sum over top_p
        top_p = (probs[kept - 1] - 0.1 / 64).item()
        assert set(step.run(top_p=top_p).tolist()) == set(ranked[:kept].tolist())
    assert set(step.run(top_p=0.6, top_k=4).tolist()) == set(ranked[:3].tolist())  # of what top-k has left
    assert set(step.run(top_p=0.0).tolist()) == set(ranked[:1].tolist())
    assert set(step.run(min_p=1.0).tolist()) == set(ranked[:1].tolist())
    heated = step.heated()[0]
    share = (heated[ranked[3]] - heated[ranked[0]]).exp().item() * 0.999999
    assert set(step.run(min_p=share).tolist()) == set(ranked[:4].tolist())


def _ties(device: str) -> None:
    """Ties at the k-th place and at the edge of top-p are all kept; signed zeros are equal."""
    step = Step(device, images=24, vocabulary=100, index=0)
    step.logits[:] = -1.0
    step.logits[:, 40] = 0.5
    step.logits[:, [10, 60, 99]], step.logits[:, 61] = 0.0, -0.0
    for options in ({"top_k": 2}, {"top_k": 5}, {"top_k": 1, "top_p": 0.9}, {"top_k": 3, "top_p": 0.5}):
        tokens = step.run(**options)
        assert torch.equal(tokens, step.expected(**options))
        assert set(tokens.tolist()) == ({40} if options["top_k"] == 1 else {10, 40, 60, 61, 99})
    step.logits[:] = 2.0
    assert torch.equal(step.run(top_k=1), step.expected())


def _impossible_tokens(device: str) -> None:
    """Logits of -inf are never sampled, also when fewer than k are finite; rows of NaN give a token in range."""
    step = Step(device, images=8, vocabulary=100)
    finite = step.logits[:, [3, 50, 98]].clone()
    step.logits[:] = -torch.inf
    step.logits[:, [3, 50, 98]] = finite
    for options in ({}, {"top_k": 5}, {"top_k": 2}, {"top_k": 5, "top_p": 0.9}):
        tokens = step.run(**options)
        assert torch.equal(tokens, step.expected(**options))
        assert set(tokens.tolist()) <= {3, 50, 98}
    step.logits[:] = torch.nan
    tokens = step.run(top_k=5, top_p=0.9)
    assert ((tokens >= 0) & (tokens < 100)).all()


def _guidance(device: str) -> None:
    """Scales above 1 guide; up to 1 the uncond rows do not matter, whatever they hold."""
    step = Step(device, with_uncond=True)
    alone = Step(device)
    alone.logits = step.logits[:3].clone()
    assert not torch.equal(step.run(), alone.run())
    for scale, noise in itertools.product((1.0, 0.0, -3.0), (torch.nan, torch.inf, -torch.inf)):
        step.scales[3] = scale
        step.logits[3:] = noise
        assert torch.equal(step.run(top_k=50), alone.run(top_k=50))


def _greedy(device: str) -> None:
    for with_uncond, dtype in itertools.product((False, True), (torch.float32, torch.bfloat16)):
        step = Step(device, with_uncond=with_uncond, dtype=dtype)
        best = step.heated().argmax(dim=-1)
        assert torch.equal(step.run(greedy=True), best)
        assert torch.equal(step.run(greedy=True, top_k=5, top_p=0.1, min_p=0.5), best)
        assert torch.equal(step.run(top_k=1), best)
    step = Step(device)
    assert not torch.equal(step.run(), step.run(greedy=True))
    step.logits[:, [7, 400, 999]] = 9.0
    assert step.run(greedy=True).tolist() == [7] * 3


def _temperature(device: str) -> None:
    """Each token has its own; the smallest is as good as greedy."""
    step = Step(device)
    for index in range(5):
        step.index.fill_(index)
        _assert_as_expected(step, top_k=100)
    assert torch.equal(step.run(), step.run(greedy=True))


def _forced_tokens(device: str) -> None:
    step = Step(device, images=4)
    sampled = step.run(top_k=50)
    step.forced_tokens[1, 3], step.forced_tokens[2, 3], step.forced_tokens[0, 2] = 0, 998, 5
    for greedy in (False, True):
        tokens = step.run(top_k=50, greedy=greedy)
        assert tokens[1:3].tolist() == [0, 998]
    assert torch.equal(step.run(top_k=50)[[0, 3]], sampled[[0, 3]])


def _batch_and_singles(device: str) -> None:
    """A token depends on its own image alone."""
    batch = Step(device, with_uncond=True)
    options = {"top_k": 300, "top_p": 0.9, "min_p": 0.01}
    tokens = batch.run(**options)
    for i in range(3):
        single = Step(device, images=1, with_uncond=True)
        single.logits, single.seeds = batch.logits[[i, 3 + i]], batch.seeds[i : i + 1]
        assert single.run(**options).tolist() == tokens[i : i + 1].tolist()


def _writes(device: str) -> None:
    """One column of the tokens and the next token are written, nothing else."""
    step = Step(device, with_uncond=True, vocabulary=1001)
    inputs = [
        step.logits, step.scales, step.temperatures, step.index, step.seeds, step.noise_from, step.forced_tokens
    ]  # fmt: skip
    before = [x.clone() for x in inputs]
    tokens = step.run(top_k=50)
    assert ((tokens >= 0) & (tokens < 1001)).all()
    expected = torch.full_like(step.buffer, POISON)
    expected[1:-1, 1 + 3] = tokens
    assert torch.equal(step.buffer, expected)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before))


def _strided_logits(device: str) -> None:
    """The last position of logits (B, S, V) need not be copied."""
    step = Step(device)
    expected = step.run(top_k=50)
    wide = torch.full((3, 2, 1000), torch.nan, device=device)
    wide[:, 1] = step.logits
    step.logits = wide[:, 1]
    assert torch.equal(step.run(top_k=50), expected)


def _steps(device: str) -> None:
    """All tokens one after the other; on a GPU one captured graph is replayed for all of them."""
    step = Step(device, with_uncond=True, index=0)
    position = torch.tensor([11], device=device)
    expected = []
    for index in range(5):
        step.index.fill_(index)
        expected.append(step.expected(top_k=50))
    step.index.fill_(0)

    def one() -> None:
        sample_tokens(
            step.logits, step.scales, step.temperatures, step.index, step.seeds, step.noise_from, step.forced_tokens,
            step.tokens, step.next_token, with_uncond=True, top_k=50,
        )  # fmt: skip
        advance(position, step.index)

    if device == "cuda":
        one()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            one()
        step.index.fill_(0), position.fill_(11), step.tokens.fill_(POISON)
        one = graph.replay
    for _ in range(5):
        one()
    assert torch.equal(step.tokens, torch.stack(expected, dim=1))
    assert (position.item(), step.index.item()) == (16, 5)


def check_noise(device: str = "cpu") -> None:
    _words(device)
    _exponential(device)


def check_filtering(device: str = "cpu") -> None:
    _filters(device)
    _plain_sample(device)
    _vocabularies(device)


def check_edges(device: str = "cpu") -> None:
    _edges_of_filters(device)
    _ties(device)
    _impossible_tokens(device)


def check_step(device: str = "cpu") -> None:
    _guidance(device)
    _greedy(device)
    _temperature(device)
    _forced_tokens(device)
    _batch_and_singles(device)
    _writes(device)
    _strided_logits(device)
    _steps(device)


def test_noise_is_that_of_the_plain_generator() -> None:
    run_interpreted(__name__, "check_noise")


def test_tokens_are_those_of_the_plain_sampler() -> None:
    run_interpreted(__name__, "check_filtering")


def test_exactly_the_right_tokens_can_be_sampled() -> None:
    run_interpreted(__name__, "check_edges")


def test_step() -> None:
    run_interpreted(__name__, "check_step")


def test_what_does_not_fit_is_refused() -> None:
    changes = {
        "logits": (lambda x: x.double(), "float32, bfloat16 or float16"),
        "scales": (lambda x: x.double(), "scales is torch.float32"),
        "temperatures": (lambda x: x[:-1], "temperatures is"),
        "index": (lambda x: x.int(), "index is torch.int64"),
        "seeds": (lambda x: x[:-1], "logits is"),
        "noise_from": (lambda x: x[0], "noise_from is"),
        "forced_tokens": (lambda x: x.T.contiguous().T, "last dimension contiguous"),
        "tokens": (lambda x: x[:, :-1], "tokens is"),
        "next_token": (lambda x: x[:, 0], "next_token is"),
    }
    for name, (change, message) in changes.items():
        step = Step("cpu")
        setattr(step, name, change(getattr(step, name)))
        assert message in _refusal(step), name
    for options in ({"top_k": -1}, {"top_p": 1.5}, {"min_p": -0.1}):
        assert "top_p and min_p are 0 to 1" in _refusal(Step("cpu"), **options)


def _refusal(step: Step, **options) -> str:
    try:
        step.run(**options)
    except ValueError as error:
        return str(error)
    return ""
