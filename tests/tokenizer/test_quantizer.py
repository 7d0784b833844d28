"""The quantizer, its nearest-code search and entropy loss, and the care of the codebook."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from tests import golden
from tests.tokenizer.builders import hash_fill, keys_of, uniform
from tokenizer import nearest
from tokenizer.nearest import full_float32, lookup, nearest_codes
from tokenizer.tokenizer_image.codebook import kmeans_init, revive_dead_codes
from tokenizer.tokenizer_image.quantizers import vq
from tokenizer.tokenizer_image.vq_model import VectorQuantizer, compute_entropy_loss


def _quantizer(n_e=64, e_dim=8, beta=0.25, ratio=0.0, l2_norm=True, show_usage=True) -> VectorQuantizer:
    return VectorQuantizer(n_e, e_dim, beta, ratio, l2_norm, show_usage)


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def switches():
    """PyTorch's precisions of float32 products; afterwards all as they are at the start."""
    yield
    for one in (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        one.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


@golden.cases("vq.quantizer")
def test_quantizer(case):
    quantizer = VectorQuantizer(**case.config).train()
    quantizer.embedding.weight.data.copy_(case.tensors["codebook"])
    z = case.tensors["z"].requires_grad_()
    z_q, losses, (_, _, indices) = quantizer(z)
    (sum(losses[:3]) + (z_q * case.tensors["r"]).sum()).backward()
    outputs = {"z_q": z_q, "indices": indices, "usage_1": losses[3]}
    outputs |= dict(zip(("vq_loss", "commit_loss", "entropy_loss"), losses))
    outputs |= {"grad_z": z.grad, "grad_codebook": quantizer.embedding.weight.grad}
    outputs["usage_2"] = quantizer(case.tensors["z2"])[1][3]
    z_q, losses, (_, _, indices) = quantizer.eval()(z)
    case.check({**outputs, "z_q_eval": z_q, "indices_eval": indices, "losses_in_eval": list(losses)})


@torch.no_grad()
def test_hashed_weights():
    quantizer = hash_fill(VectorQuantizer(32, 4, 0.25, 1.0, l2_norm=False, show_usage=False)).train()
    assert list(keys_of(quantizer)) == ["embedding.weight"]
    _, losses, (_, _, indices) = quantizer(uniform("z", (2, 4, 3, 3)))
    expected = [0.0903867857, 0.0225966964, -2.4237897684]
    assert [float(loss) for loss in losses[:3]] == pytest.approx(expected, abs=1e-9)
    assert losses[3] == 0
    assert indices.tolist() == [31, 10, 10, 25, 4, 10, 3, 19, 1, 7, 29, 0, 15, 31, 10, 6, 16, 1]
    first = (uniform("abc", (4,)) + 1) / 2
    assert first.tolist() == pytest.approx([0.8334092, 0.83163303, 0.78811492, 0.98924478], abs=1e-8)


@golden.cases("vq.entropy")
def test_entropy_loss(case):
    affinity = case.tensors["affinity"].requires_grad_()
    loss = compute_entropy_loss(affinity, temperature=case.params["temperature"])
    loss.backward()
    case.check({"loss": loss, "grad": affinity.grad})


def test_entropy_loss_by_hand():
    affinity = torch.tensor([[0, -0.02], [-0.03, 0]], dtype=torch.float64)
    assert compute_entropy_loss(affinity).item() == pytest.approx(-0.412449598, abs=5e-8)
    with pytest.raises(ValueError, match="softmax"):
        compute_entropy_loss(affinity, loss_type="argmax")


class TestUsage:
    """The sliding window over the last 65,536 codes."""

    def test_is_a_plain_buffer_that_never_grows_the_graph(self):
        quantizer = _quantizer().to(torch.float64).to(torch.float32).train()
        for seed in range(3):
            quantizer(_random(1, 8, 4, 4, seed=seed).requires_grad_())
        assert [name for name, _ in quantizer.named_parameters()] == ["embedding.weight"]
        assert quantizer.codebook_used.grad_fn is None and not quantizer.codebook_used.requires_grad

    def test_newest_codes_are_at_the_end(self):
        quantizer = _quantizer().train()
        first = quantizer(_random(1, 8, 2, 3))[2][2]
        second = quantizer(_random(1, 8, 2, 2, seed=1))[2][2]
        assert torch.equal(quantizer.codebook_used[-10:].long(), torch.cat([first, second]))
        assert not quantizer.codebook_used[:-10].any()

    def test_a_fresh_window_counts_code_zero(self):
        quantizer = _quantizer(4, 2).train()
        quantizer.embedding.weight.data.copy_(torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]]))
        usage = quantizer(torch.tensor([0.0, 1.0]).view(1, 2, 1, 1))[1][3]
        assert usage.shape == () and usage == 0.5

    def test_more_codes_than_the_window_holds(self):
        quantizer = _quantizer(4, 2).train()
        z = torch.zeros(1, 2, 1, 65_540)
        z[0, 0, 0, :4], z[0, 1, 0, 4:] = 1, 1
        quantizer.embedding.weight.data.copy_(torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]]))
        usage = quantizer(z)[1][3]
        assert len(quantizer.codebook_used) == 65_536
        assert quantizer.codebook_used.eq(1).all()
        assert usage == 0.25

    def test_evaluation_leaves_the_window_alone(self):
        quantizer = _quantizer().eval()
        assert quantizer(_random(1, 8, 4, 4))[1] == (None, None, None, 0)
        assert not quantizer.codebook_used.any()


class TestNearestCodes:
    """The search behind every quantizer."""

    @pytest.mark.parametrize("unit_length", [True, False])
    @pytest.mark.parametrize("size", [300, 512])  # whole blocks, and not
    def test_matches_the_distance_matrix(self, unit_length, size, monkeypatch):
        vectors, codebook = _random(1000, 8), _random(size, 8, seed=1)
        if unit_length:
            vectors, codebook = F.normalize(vectors, dim=1), F.normalize(codebook, dim=1)
        expected = torch.cdist(vectors.double(), codebook.double()).argmin(1)
        assert torch.equal(nearest_codes(vectors, codebook, unit_length), expected)
        monkeypatch.setattr(nearest, "_CACHED_SCORES", size * 7)
        assert torch.equal(nearest_codes(vectors, codebook, unit_length), expected)

    def test_never_holds_the_full_matrix(self, monkeypatch):
        sizes = []
        largest = nearest._first_largest
        monkeypatch.setattr(nearest, "_first_largest", lambda scores: sizes.append(scores.numel()) or largest(scores))
        nearest_codes(_random(5000, 2), _random(16384, 2), False)
        assert max(sizes) <= 2**20 < 5000 * 16384
        assert sum(sizes) == 5000 * 16384

    def test_the_first_of_equals_wins(self):
        scores = torch.randint(0, 3, (50, 512), generator=torch.Generator().manual_seed(0)).float()
        scores[3], scores[4, 200] = -torch.inf, torch.nan
        assert torch.equal(nearest._first_largest(scores), scores.argmax(1))
        codes = torch.ones(512, 2)
        assert not nearest_codes(torch.ones(5, 2), codes, True).any()

    def test_no_vectors_have_no_codes(self):
        assert nearest_codes(torch.zeros(0, 2), _random(256, 2), False).shape == (0,)

    def test_is_exact_under_autocast(self):
        vectors, codebook = (
            F.normalize(_random(4096, 8), dim=1),
            F.normalize(_random(16384, 8, seed=1), dim=1),
        )
        expected = nearest_codes(vectors, codebook, True)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(nearest_codes(vectors, codebook, True), expected)
            low = (vectors @ codebook.T).argmax(1)
        assert (low != expected).float().mean() > 0.02

    def test_bfloat16_latents_are_searched_in_float32(self):
        quantizer = _quantizer(4096).eval()
        z = _random(1, 8, 32, 32).bfloat16()
        quant, _, (_, _, indices) = quantizer(z)
        assert quant.dtype == torch.bfloat16
        assert torch.equal(indices, quantizer(z.float())[2][2])

    @pytest.mark.parametrize("precision", ["highest", "high", "medium"])
    def test_tf32_is_off_inside_and_restored(self, precision, switches):
        matmul = torch.backends.cuda.matmul
        torch.set_float32_matmul_precision(precision)
        with full_float32("cpu"):
            assert not matmul.allow_tf32 and torch.get_float32_matmul_precision() == "highest"
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"  # "medium" is bfloat16 there
        assert torch.get_float32_matmul_precision() == precision
        assert matmul.allow_tf32 == (precision != "highest")

    def test_tf32_switched_on_and_off_around_a_search(self, switches):
        matmul, vectors = torch.backends.cuda.matmul, torch.eye(4)
        for allowed in (True, False, True):
            matmul.allow_tf32 = allowed
            assert nearest_codes(vectors, vectors, True).tolist() == [0, 1, 2, 3]
            assert matmul.allow_tf32 == allowed
            assert torch.get_float32_matmul_precision() == ("high" if allowed else "highest")

    @pytest.mark.parametrize("precision", ["high", "medium"])
    def test_tf32_switched_off_after_another_precision(self, precision, switches):
        matmul, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
        torch.set_float32_matmul_precision(precision)
        matmul.allow_tf32 = False
        before = matmul.fp32_precision, cpu.fp32_precision
        with pytest.raises(RuntimeError, match="mix of the legacy and new API"):
            torch.get_float32_matmul_precision()
        with full_float32("cpu"):
            assert not matmul.allow_tf32 and torch.get_float32_matmul_precision() == "highest"
            assert (matmul.fp32_precision, cpu.fp32_precision) == ("ieee", "ieee")
        assert (matmul.fp32_precision, cpu.fp32_precision) == before and not matmul.allow_tf32

    @pytest.mark.parametrize("everywhere", [False, True])
    def test_tf32_chosen_through_the_newer_switches(self, everywhere, switches):
        matmul, chosen = torch.backends.cuda.matmul, torch.backends if everywhere else torch.backends.cuda.matmul
        matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"
        chosen.fp32_precision = "tf32"
        with pytest.raises(KeyError), full_float32("cpu"):
            assert matmul.fp32_precision == "ieee" and not matmul.allow_tf32
            raise KeyError
        assert matmul.fp32_precision == "tf32"
        chosen.fp32_precision = "ieee"
        assert matmul.fp32_precision == "ieee"  # it still follows the switch of all backends


class TestGradients:
    """Straight through the quantization, and through the normalisation."""

    def test_encoder_gradient_passes_the_normalisation(self):
        quantizer = _quantizer().eval()
        z, r = _random(2, 8, 3, 3), _random(2, 8, 3, 3, seed=1)
        through, direct = z.clone().requires_grad_(), z.clone().requires_grad_()
        (quantizer(through)[0] * r).sum().backward()
        (F.normalize(direct, dim=1) * r).sum().backward()
        torch.testing.assert_close(through.grad, direct.grad)

    def test_each_loss_moves_one_side(self):
        quantizer = _quantizer().train()
        z = _random(2, 8, 3, 3).requires_grad_()
        vq_loss, commit_loss, _, _ = quantizer(z)[1]
        assert commit_loss.item() == pytest.approx(0.25 * vq_loss.item(), rel=1e-6)
        assert torch.autograd.grad(vq_loss, z, retain_graph=True, allow_unused=True) == (None,)
        assert torch.autograd.grad(commit_loss, quantizer.embedding.weight, allow_unused=True) == (None,)

    def test_entropy_loss_in_chunks(self, monkeypatch):
        z = _random(2, 8, 5, 5)
        results = []
        for most in (2**25, 64 * 7):
            monkeypatch.setattr(nearest, "_MAX_SCORES", most)
            torch.manual_seed(0)
            quantizer = _quantizer(ratio=0.3).train()
            latents = z.clone().requires_grad_()
            loss = quantizer(latents)[1][2]
            loss.backward()
            results.append([loss.detach(), latents.grad, quantizer.embedding.weight.grad])
        torch.testing.assert_close(results[0], results[1])
        unit = F.normalize(z.permute(0, 2, 3, 1).reshape(-1, 8), dim=1)
        distance = torch.cdist(unit, F.normalize(quantizer.embedding.weight, dim=1)).square()
        torch.testing.assert_close(results[0][0], 0.3 * compute_entropy_loss(-distance).detach(), atol=1e-4, rtol=0)

    def test_entropy_is_not_computed_at_ratio_zero(self, monkeypatch):
        monkeypatch.setattr(vq, "chunked_entropy_loss", None)
        losses = _quantizer(ratio=0.0).train()(_random(1, 8, 2, 2))[1]
        assert losses[2] == 0
        with pytest.raises(TypeError):
            _quantizer(ratio=0.1).train()(_random(1, 8, 2, 2))


class TestLookup:
    """From codes back to vectors."""

    def test_layouts(self):
        codebook = _random(10, 3)
        codes = torch.arange(8) % 10
        flat = lookup(codes, codebook)
        assert flat.shape == (8, 3) and torch.equal(flat, codebook[codes])
        assert lookup(codes.view(2, 4), codebook).shape == (2, 4, 3)
        nhwc = lookup(codes, codebook, (2, 2, 2, 3), channel_first=False)
        assert torch.equal(nhwc.reshape(8, 3), flat)
        nchw = lookup(codes.int().view(2, 4), codebook, [2, 3, 2, 2])
        assert nchw.is_contiguous() and torch.equal(nchw, nhwc.permute(0, 3, 1, 2))

    @pytest.mark.parametrize("bad", [-1, 10])
    def test_codes_out_of_range(self, bad):
        with pytest.raises(IndexError, match=r"\[0, 10\)"):
            lookup(torch.tensor([0, bad]), _random(10, 3))

    @pytest.mark.parametrize("shape", [(2, 4, 2, 2), (2, 3, 2, 3), (2, 3, 4)])
    def test_shapes_that_do_not_fit(self, shape):
        with pytest.raises(ValueError, match="shape"):
            lookup(torch.zeros(8, dtype=torch.long), _random(10, 3), shape)

    def test_entries_are_unit_length(self):
        quantizer = _quantizer()
        quantizer.embedding.weight.data.mul_(7)
        entries = quantizer.get_codebook_entry(torch.arange(64))
        torch.testing.assert_close(entries.norm(dim=1), torch.ones(64))


def test_initial_codebook():
    unit = _quantizer(500).embedding.weight
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(500))
    plain = _quantizer(500, l2_norm=False).embedding.weight
    assert plain.abs().max() <= 1 / 500 and plain.abs().max() > 0.9 / 500


class TestKmeans:
    """The codebook's start from data."""

    def _clusters(self, l2_norm: bool) -> tuple[torch.Tensor, torch.Tensor]:
        centres = torch.eye(8) * (1 if l2_norm else 5)
        latents = centres.repeat_interleave(50, 0) + 0.02 * _random(400, 8)
        return centres, latents

    @pytest.mark.parametrize("l2_norm", [True, False])
    def test_finds_clusters(self, l2_norm):
        centres, latents = self._clusters(l2_norm)
        quantizer = _quantizer(24, l2_norm=l2_norm)
        kmeans_init(quantizer, latents, generator=torch.Generator().manual_seed(0))
        weight = quantizer.embedding.weight.detach()
        assert quantizer.embedding.weight.requires_grad
        assert (torch.cdist(centres, weight).min(1).values < 0.1).all()
        if l2_norm:
            torch.testing.assert_close(weight.norm(dim=1), torch.ones(24))

    def test_every_code_lies_at_the_mean_of_its_latents(self):
        latents = _random(500, 8)
        quantizer = _quantizer(16, l2_norm=False)
        kmeans_init(quantizer, latents, iterations=100, generator=torch.Generator().manual_seed(0))
        weight = quantizer.embedding.weight.detach()
        nearest_code = torch.cdist(latents, weight).argmin(1)
        for k in range(16):
            torch.testing.assert_close(weight[k], latents[nearest_code == k].mean(0), atol=1e-5, rtol=1e-4)

    def test_repeats_with_the_same_generator(self):
        weights = []
        for _ in range(2):
            quantizer = _quantizer(16)
            kmeans_init(quantizer, _random(100, 8), generator=torch.Generator().manual_seed(3))
            weights.append(quantizer.embedding.weight.detach().clone())
        assert torch.equal(*weights)

    def test_fewer_latents_than_codes(self):
        quantizer = _quantizer(64)
        latents = _random(10, 8)
        kmeans_init(quantizer, latents)
        distance = torch.cdist(quantizer.embedding.weight.detach(), F.normalize(latents, dim=1))
        assert (distance.min(1).values < 1e-3).all()
        assert len(distance.argmin(1).unique()) == 10

    @pytest.mark.parametrize("shape", [(0, 8), (5, 7), (5, 8, 1)])
    def test_wrong_latents(self, shape):
        with pytest.raises(ValueError, match="latents must be"):
            kmeans_init(_quantizer(), torch.zeros(shape))


class TestRevival:
    """New places for unused codes."""

    def test_moves_only_unused_codes_onto_latents(self):
        quantizer = _quantizer(16)
        before = quantizer.embedding.weight.detach().clone()
        used = torch.arange(16) % 4 != 0
        latents = _random(50, 8)
        assert revive_dead_codes(quantizer, used, latents) == 4
        after = quantizer.embedding.weight.detach()
        assert torch.equal(after[used], before[used])
        distance = torch.cdist(after[~used], F.normalize(latents, dim=1))
        assert (distance.min(1).values < 1e-3).all()
        assert len(distance.argmin(1).unique()) == 4

    def test_nothing_to_do(self):
        quantizer = _quantizer(16)
        before = quantizer.embedding.weight.detach().clone()
        assert revive_dead_codes(quantizer, torch.ones(16, dtype=torch.bool), _random(5, 8)) == 0
        assert torch.equal(quantizer.embedding.weight, before)

    @pytest.mark.parametrize("used", [torch.ones(16), torch.ones(15, dtype=torch.bool)])
    def test_wrong_mask(self, used):
        with pytest.raises(ValueError, match="used must be"):
            revive_dead_codes(_quantizer(16), used, _random(5, 8))


def test_a_gpu_is_not_waited_for_when_codes_are_looked_up():
    """Fake tensors have a device and shapes, but no values that a host could read."""
    with FakeTensorMode():
        codes, codebook = torch.zeros(8, dtype=torch.long, device="cuda"), torch.zeros(10, 3, device="cuda")
        found = lookup(codes, codebook, (2, 3, 2, 2))
        assert found.device.type == "cuda" and found.shape == (2, 3, 2, 2)
        with pytest.raises(DataDependentOutputException):
            lookup(codes.cpu(), codebook.cpu(), (2, 3, 2, 2))
