"""The family of quantizers: what all have in common, and what each paper says of its own."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from tests.tokenizer.builders import tiny_vq
from tokenizer import nearest
from tokenizer.tokenizer_image.codebook import kmeans_init, revive_dead_codes
from tokenizer.tokenizer_image.quantizers import QUANTIZERS, code_shape, kind_of, new_quantizer
from tokenizer.tokenizer_image.quantizers.ema import EMAQuantizer
from tokenizer.tokenizer_image.quantizers.entropy import compute_entropy_loss
from tokenizer.tokenizer_image.quantizers.fsq import FSQ, LEVELS
from tokenizer.tokenizer_image.quantizers.ibq import IBQ
from tokenizer.tokenizer_image.quantizers.lfq import LFQ, mean_joint

KINDS = list(QUANTIZERS)


def _new(kind: str, size: int = 64, width: int = 8, ratio: float = 0.1, **more):
    size, width = code_shape(kind, size, width, more.get("levels"))
    torch.manual_seed(0)
    return new_quantizer(kind, size, width, beta=0.25, entropy_loss_ratio=ratio, l2_norm=True, show_usage=True, **more)


def _latents(quantizer, batch: int = 2, side: int = 4, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, quantizer.e_dim, side, side, generator=generator)


def _sum_of(*values: torch.Tensor):
    """Stands in for the sum over processes: what the others have is `values`."""
    return lambda own: own + sum(values)


@pytest.mark.parametrize("kind", KINDS)
class TestInterface:
    """The same for every kind."""

    def test_shapes_and_the_way_back_from_indices(self, kind):
        quantizer = _new(kind).eval()
        z = _latents(quantizer)
        quant, losses, (perplexity, encodings, indices) = quantizer(z)
        assert quant.shape == z.shape and quant.is_contiguous() and losses == (None, None, None, 0)
        assert indices.shape == (32,) and indices.dtype == torch.int64 and perplexity is encodings is None
        assert len(indices.unique()) > 5
        torch.testing.assert_close(quantizer.get_codebook_entry(indices, z.shape), quant)
        rows = quantizer.get_codebook_entry(torch.arange(quantizer.n_e))
        assert rows.shape == (quantizer.n_e, quantizer.e_dim) and torch.equal(rows, quantizer.codebook())
        assert len(rows.unique(dim=0)) == quantizer.n_e

    def test_quantizing_a_code_gives_its_own_index(self, kind):
        quantizer = _new(kind).eval()
        if kind == "ibq":  # the largest product finds a code again if codes have one length
            quantizer.embedding.weight.data = F.normalize(quantizer.embedding.weight.data, dim=1)
        every = torch.arange(quantizer.n_e)
        codes = quantizer.get_codebook_entry(every, (1, quantizer.e_dim, quantizer.n_e, 1))
        if kind == "fsq":  # what is put in is squeezed, and the codes are the outcome
            codes = _unbound(quantizer, every)
        assert torch.equal(quantizer(codes)[2][2], every)

    def test_gradients_reach_the_encoder_and_the_losses_are_finite(self, kind):
        quantizer = _new(kind).train()
        z = _latents(quantizer).requires_grad_()
        quant, losses, _ = quantizer(z)
        (quant * torch.randn_like(quant)).sum().backward()
        assert z.grad.abs().sum() > 0 and z.grad.isfinite().all()
        assert all(loss.shape == () and loss.isfinite() for loss in losses)
        assert 0 < losses[3] <= 1

    def test_latents_that_are_far_away_give_finite_gradients(self, kind):
        quantizer = _new(kind).train()
        z = (_latents(quantizer) * 1e3).requires_grad_()
        quant, losses, _ = quantizer(z)
        (quant.sum() + sum(losses[:3])).backward()
        assert z.grad.isfinite().all()

    def test_indices_do_not_depend_on_autocast(self, kind):
        quantizer = _new(kind).eval()
        z = _latents(quantizer, 4, 16)
        plain = quantizer(z)[2][2]
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(quantizer(z)[2][2], plain)
        low, _, (_, _, indices) = quantizer(z.bfloat16())
        assert low.dtype == torch.bfloat16
        assert torch.equal(indices, quantizer(z.bfloat16().float())[2][2])

    def test_the_state_dict_tells_the_kind_and_fits_itself_only(self, kind):
        state = _new(kind).state_dict()
        assert kind_of(list(state)) == kind
        again = _new(kind)
        again.load_state_dict({key: value for key, value in state.items() if key != "codebook_used"})
        for other in set(KINDS) - {kind}:
            with pytest.raises(RuntimeError):
                _new(other).load_state_dict(state)

    def test_the_model_around_it_decodes_what_it_encodes(self, kind):
        torch.manual_seed(0)
        model = tiny_vq(quantizer=kind, codebook_size=64).eval()
        assert model.config.codebook_embed_dim == model.quantize.e_dim == model.quant_conv.out_channels
        x = torch.rand(2, 3, 8, 8) * 2 - 1
        with torch.no_grad():
            quant, _, (_, _, indices) = model.encode(x)
            width = model.config.codebook_embed_dim
            torch.testing.assert_close(model.decode_code(indices, (2, width, 4, 4)), model.decode(quant))

    def test_compiled_it_is_one_graph_with_the_same_results(self, kind):
        results = []
        for compiled in (False, True):
            quantizer = _new(kind).train()
            call = torch.compile(quantizer, backend="aot_eager", fullgraph=True) if compiled else quantizer
            z = _latents(quantizer).requires_grad_()
            quant, losses, (_, _, indices) = call(z)
            (quant.square().sum() + sum(losses[:3])).backward()
            results.append((quant.detach(), z.grad, indices, losses[3], dict(quantizer.named_buffers())))
        torch.testing.assert_close(*results)

    def test_placing_codes(self, kind):
        quantizer, latents = _new(kind), torch.randn(100, code_shape(kind, 64, 8)[1])
        if not quantizer.learned:
            with pytest.raises(ValueError, match="fixed"):
                kmeans_init(quantizer, latents)
            return
        kmeans_init(quantizer, latents)
        before = quantizer.codebook().clone()
        used = torch.arange(64) % 4 != 0
        assert revive_dead_codes(quantizer, used, latents) == 16
        assert torch.equal(quantizer.codebook()[used], before[used])
        distance = torch.cdist(quantizer.codebook()[~used], quantizer.place(latents))
        assert (distance.min(1).values < 1e-2).all()


def _unbound(quantizer: FSQ, indices: torch.Tensor) -> torch.Tensor:
    """Latents (1, D, N, 1) that lie in the middle of each code's cell: the squeezing of FSQ, undone by bisection."""
    wanted = quantizer.get_codebook_entry(indices) * (quantizer.levels // 2)
    low, high = torch.full_like(wanted, -20.0), torch.full_like(wanted, 20.0)
    for _ in range(60):
        middle = (low + high) / 2
        below = quantizer._bound(middle) < wanted
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low.T[None, :, :, None]


class TestEMA:
    """Van den Oord et al. 2017, appendix A.1."""

    def _small(self, decay: float = 0.9) -> EMAQuantizer:
        quantizer = EMAQuantizer(2, 1, 0.25, show_usage=True, decay=decay).train()
        quantizer.replace(torch.ones(2, dtype=torch.bool), torch.tensor([[0.0], [10.0]]))
        return quantizer

    def test_codes_are_running_means_of_their_latents(self):
        quantizer = self._small()
        quantizer(torch.tensor([1.0, 2.0, 3.0, 9.0]).view(1, 1, 2, 2))
        quantizer.update(lambda x: x)
        # sizes 0.9 + 0.1 * (3, 1), sums 0.9 * (0, 10) + 0.1 * (6, 9)
        assert quantizer.cluster_size.tolist() == pytest.approx([1.2, 1.0])
        assert quantizer.codebook().flatten().tolist() == pytest.approx([0.6 / 1.2, 9.9 / 1.0])

    def test_two_processes_learn_what_one_learns_of_both_batches(self):
        one, mine, other = (self._small() for _ in range(3))
        first, second = torch.randn(2, 1, 1, 4, 4).unbind(0)
        one(torch.cat([first, second]))
        one.update(lambda x: x)
        mine(first), other(second)
        mine.update(_sum_of(other.fresh.clone()))
        torch.testing.assert_close(mine.codebook(), one.codebook())
        torch.testing.assert_close(mine.cluster_size, one.cluster_size)

    def test_micro_batches_add_up_and_evaluation_adds_nothing(self):
        parts, whole = self._small(), self._small()
        z = torch.randn(4, 1, 2, 2)
        whole(z)
        parts(z[:2]), parts(z[2:])
        parts.eval()(z)
        for quantizer in (parts, whole):
            quantizer.update(lambda x: x)
        torch.testing.assert_close(parts.codebook(), whole.codebook())

    def test_codes_that_nobody_chooses_stay_where_they_are(self):
        quantizer = self._small(decay=0.5)
        for _ in range(200):  # the size of the second falls below the smallest float
            quantizer(torch.zeros(1, 1, 2, 2))
            quantizer.update(lambda x: x)
        assert quantizer.codebook()[1].item() == pytest.approx(10.0)
        assert quantizer.in_use().tolist() == [1, 0]

    def test_a_broken_batch_does_not_reach_the_codes(self):
        quantizer = self._small()
        before = quantizer.codebook().clone()
        quantizer(torch.full((1, 1, 2, 2), math.nan))
        quantizer.update(lambda x: x)
        assert torch.equal(quantizer.codebook(), before)
        quantizer(torch.ones(1, 1, 2, 2))
        quantizer.update(lambda x: x)
        assert quantizer.codebook().isfinite().all() and not torch.equal(quantizer.codebook(), before)

    def test_gradients_leave_the_codes_alone(self):
        quantizer = self._small()
        assert not [p for p in quantizer.parameters() if p.requires_grad]

    def test_a_revived_code_lives_until_it_is_chosen(self):
        quantizer = self._small()
        quantizer.cluster_size[1] = 1e-8
        revive_dead_codes(quantizer, quantizer.in_use() > 0, torch.tensor([[4.0]]))
        assert quantizer.codebook().flatten().tolist() == [0, 4] and quantizer.in_use().all()
        quantizer.update(lambda x: x)  # without latents nothing moves
        assert quantizer.codebook().flatten().tolist() == pytest.approx([0, 4])


class TestFSQ:
    """Mentzer et al. 2023."""

    @pytest.mark.parametrize("levels", [(2,), (3,), (8,), (8, 6, 5), (7, 5, 5, 5, 5)])
    def test_every_level_is_reached_and_nothing_else(self, levels):
        quantizer = FSQ(levels, show_usage=False)
        steps = torch.linspace(-30, 30, 20_001)
        z = steps[None, None, :, None].repeat(1, len(levels), 1, 1)
        quant = quantizer(z)[0]
        for channel, count in enumerate(levels):
            found = quant[0, channel].unique()
            half = count // 2
            expected = (torch.arange(count) - half) / half
            torch.testing.assert_close(torch.unique((found * half).round() / half), expected.float())

    def test_zero_is_a_level(self):
        quant = FSQ((8, 5), show_usage=False)(torch.zeros(1, 2, 1, 1))[0]
        assert quant.abs().max() < 1e-6

    def test_index_counts_in_mixed_radix_with_the_first_channel_fastest(self):
        quantizer = FSQ((3, 4, 5), show_usage=False)
        assert quantizer.n_e == 60
        entry = quantizer.get_codebook_entry(torch.tensor([0, 1, 3, 12, 59]))
        low, high = [-1.0, -1.0, -1.0], [1.0, 0.5, 1.0]
        expected = [low, [0.0, -1, -1], [-1, -0.5, -1], [-1, -1, -0.5], high]
        assert entry.tolist() == expected

    def test_known_levels_multiply_to_their_size(self):
        assert all(math.prod(levels) == size for size, levels in LEVELS.items())

    def test_there_is_nothing_to_learn(self):
        quantizer = FSQ((8, 8), show_usage=True).train()
        losses = quantizer(torch.randn(1, 2, 4, 4))[1]
        assert losses[:3] == (0, 0, 0) and not list(quantizer.parameters())

    def test_weights_of_other_levels_are_refused(self):
        with pytest.raises(RuntimeError, match=r"levels are \[8, 6, 5\], the model has \[6, 8, 5\]"):
            FSQ((6, 8, 5), False).load_state_dict(FSQ((8, 6, 5), False).state_dict())

    def test_sizes_without_known_levels(self):
        with pytest.raises(ValueError, match="--fsq-levels"):
            code_shape("fsq", 100, 8)
        assert code_shape("fsq", 100, 8, [5, 5]) == (25, 2)
        with pytest.raises(ValueError, match="at least two levels"):
            FSQ((1, 5), False)


class TestLFQ:
    """Yu et al. 2023."""

    def test_the_index_is_read_off_the_signs(self):
        quantizer = LFQ(8, 0.25, 0.0, show_usage=False).eval()
        quant, _, (_, _, indices) = quantizer(torch.tensor([0.3, -2.0, 0.1]).view(1, 3, 1, 1))
        assert quant.flatten().tolist() == pytest.approx([1, -1, 1]) and indices.tolist() == [0b101]
        assert quantizer.codebook()[0b101].tolist() == [1, -1, 1]

    def test_a_codebook_is_a_power_of_two(self):
        with pytest.raises(ValueError, match="power of two"):
            LFQ(1000, 0.25, 0.0, False)

    def test_entropy_is_that_of_the_softmax_over_all_codes(self):
        quantizer = LFQ(16, 0.25, 1.0, show_usage=False).train()
        z = torch.randn(1, 4, 5, 5) * 0.3
        flat = z.permute(0, 2, 3, 1).reshape(-1, 4)
        distance = torch.cdist(flat, quantizer.codebook()).square()
        expected = compute_entropy_loss(-distance, temperature=1.0)
        assert quantizer(z)[1][2].item() == pytest.approx(expected.item(), abs=1e-4)

    def test_joint_of_many_bits_is_bounded_by_its_groups(self):
        quantizer = LFQ(2**20, 0.25, 1.0, show_usage=False).train()
        loss = quantizer(torch.zeros(1, 20, 2, 2))[1][2]
        assert loss.item() == pytest.approx(0, abs=0.05)  # every bit undecided: own and joint entropy are 20 bits each

    def test_joint_in_chunks(self, monkeypatch):
        ones = torch.rand(50, 3)
        whole = mean_joint(ones)
        assert whole.sum().item() == pytest.approx(1)
        monkeypatch.setattr(nearest, "_MAX_SCORES", 8 * 7)
        torch.testing.assert_close(mean_joint(ones), whole)

    def test_the_entropy_loss_spreads_the_codes(self):
        torch.manual_seed(0)
        quantizer = LFQ(64, 0.25, 1.0, show_usage=False).train()
        shift = torch.full((1, 6, 1, 1), 2.0, requires_grad=True)  # all tokens have the same code at first
        optimizer, z = torch.optim.Adam([shift], lr=0.1), torch.randn(4, 6, 4, 4)
        for _ in range(60):
            optimizer.zero_grad()
            _, losses, (_, _, indices) = quantizer(z + shift)
            losses[2].backward()
            optimizer.step()
        assert len(indices.unique()) > 20


class TestIBQ:
    """Shi et al. 2024."""

    def test_every_code_gets_a_gradient(self):
        quantizer = _new("ibq", ratio=0.0).train()
        quant = quantizer(_latents(quantizer))[0]
        (quant * torch.randn_like(quant)).sum().backward()
        assert (quantizer.embedding.weight.grad.abs().sum(1) > 0).all()
        plain = _new("vq").train()
        quant = plain(_latents(plain))[0]
        (quant.sum() + 0 * plain.embedding.weight.sum()).backward()
        assert not plain.embedding.weight.grad.any()

    def test_gradients_are_those_of_the_one_hot_index(self):
        """The idea as it stands: a one-hot matrix with the gradient of the softmax, times the codebook."""
        quantizer = _new("ibq", 32, 4, ratio=0.0).train()
        quantizer.embedding.weight.data.normal_()
        z, r = _latents(quantizer).requires_grad_(), torch.randn(2, 4, 4, 4)
        (quantizer(z)[0] * r).sum().backward()
        weight = quantizer.embedding.weight.detach().clone().requires_grad_()
        other = z.detach().clone().requires_grad_()
        soft = (other.permute(0, 2, 3, 1).reshape(-1, 4) @ weight.T).softmax(1)
        hard = F.one_hot(soft.argmax(1), 32).float()
        codes = (hard - soft.detach() + soft) @ weight
        (codes * r.permute(0, 2, 3, 1).reshape(-1, 4)).sum().backward()
        torch.testing.assert_close(z.grad, other.grad, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(quantizer.embedding.weight.grad, weight.grad, atol=1e-5, rtol=1e-4)

    def test_chunks_change_nothing(self, monkeypatch):
        results = []
        for most in (2**25, 64 * 7):
            monkeypatch.setattr(nearest, "_MAX_SCORES", most)
            quantizer = _new("ibq").train()
            z = _latents(quantizer).requires_grad_()
            quant, losses, _ = quantizer(z)
            (quant.square().sum() + sum(losses[:3])).backward()
            results.append((quant.detach(), z.grad, quantizer.embedding.weight.grad))
        torch.testing.assert_close(results[0], results[1])

    def test_never_holds_the_full_matrix(self, monkeypatch):
        largest = []
        softmax = F.softmax
        monkeypatch.setattr(F, "softmax", lambda x, **k: largest.append(x.numel()) or softmax(x, **k))
        monkeypatch.setattr(nearest, "_MAX_SCORES", 64 * 8)
        quantizer = IBQ(64, 4, 0.25, 0.0, False).train()
        quantizer(torch.randn(1, 4, 8, 8))
        assert max(largest) <= 64 * 8 and sum(largest) == 64 * 64


def test_unknown_kind():
    with pytest.raises(ValueError, match="must be one of"):
        code_shape("rvq", 64, 8)
