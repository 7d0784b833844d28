"""The tokenizer's training recipe in one process, without commands."""

import argparse
import copy
import math
import shutil

import pytest
import torch

from autoregressive.train.extraction import encode_crops
from tests.commands.shell import make_images
from tests.tokenizer.builders import tiny_vq
from tokenizer.build import add_vq_args, load_tokenizer
from tokenizer.coding import decode_codes
from tokenizer.tokenizer_image import recipe, train_step, vq_train
from tokenizer.tokenizer_image.evaluation import evaluate_reconstruction
from tokenizer.tokenizer_image.lpips import vgg16
from tokenizer.tokenizer_image.quantizers import QUANTIZERS
from tokenizer.tokenizer_image.recipe import HeldOut, new_model, train
from tokenizer.tokenizer_image.train_step import TrainStep, ema_decay, make_optimizers
from utils import checkpoint
from utils.distributed import Launch
from utils.logger import read_metrics

CPU = torch.device("cpu")


def arguments(*flags):
    size = "--data-path x --vq-model VQ-4-S --codebook-size 32 --image-size 16"
    losses = "--perceptual-weight 0 --disc-weight 0 --mixed-precision none --lr 1e-3 --val-features none"
    return vq_train.parser().parse_args([*size.split(), *losses.split(), *flags])


def images(count=4, side=16):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


class Pictures(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return images(8)[index], 0


def test_psnr_is_measured_on_8_bit_pictures_of_range_one():
    class Darker(torch.nn.Module):
        """Gives back every grey image 0.2 darker in [-1, 1]: 26 of 255 steps darker as an 8-bit picture."""

        class quantize:
            n_e = 4

        def encode(self, x):
            return x, None, (None, None, torch.tensor([0, 0, 0, 1] * len(x)))

        def decode_code(self, codes, shape):
            return torch.zeros(shape) - 0.2

    values = evaluate_reconstruction(Darker(), [(torch.zeros(2, 3, 8, 8), torch.zeros(2))], CPU)
    assert values["psnr"] == pytest.approx(-20 * math.log10(26 / 255), abs=1e-4)
    assert values["codebook_usage"] == 0.5
    assert values["perplexity"] == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))


def test_evaluation_leaves_the_model_as_it_was():
    model = tiny_vq().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    evaluate_reconstruction(model, [(images(), torch.zeros(4))], CPU)
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_is_trained_by_exactly_one_optimizer(optimizer):
    args = arguments("--optimizer", optimizer)
    model = new_model(args)
    trained = [id(p) for p in make_optimizers(model, args, CPU).parameters]
    assert len(trained) > 50
    assert sorted(trained) == sorted(id(p) for p in model.parameters())


def test_training_lowers_the_loss_and_accumulation_sees_every_micro_batch():
    torch.manual_seed(0)
    args = arguments("--optimizer", "muon", "--codebook-init", "kmeans", "--revive-every", "4")
    step = TrainStep(args, new_model(args), Pictures(), CPU, total_steps=20)
    batches = [(images()[:2], None), (images()[2:], None)]
    losses = [step(batches, number)["loss"].item() for number in range(1, 13)]
    assert losses[-1] < 0.7 * losses[0]


def test_codes_start_from_the_data_with_kmeans():
    def used(init):
        torch.manual_seed(0)
        args = arguments("--codebook-init", init)
        step = TrainStep(args, new_model(args), Pictures(), CPU, total_steps=20)
        step([(images(8), None)], 1)
        return len(step.model.quantize.codebook_used[-128:].unique())

    assert used("kmeans") == 32 > used("uniform")


def test_the_established_optimizer_state_continues():
    """Adam over all parameters in one group, as established checkpoints hold it."""
    args = arguments()
    model = new_model(args)
    theirs = torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.9, 0.95))
    quant, losses, _ = model.train().encode(images())
    (model.decode(quant).square().mean() + losses[0] + losses[1]).backward()
    theirs.step()
    ours = make_optimizers(model, args, CPU)
    ours.load_state_dict(theirs.state_dict())
    weight = model.encoder.conv_in.weight
    assert torch.equal(ours.members[0].state[weight]["exp_avg"], theirs.state[weight]["exp_avg"])
    assert ours.members[0].param_groups[0]["lr"] == 1e-3


def test_the_discriminator_rests_before_its_start():
    args = arguments("--disc-weight", "0.5", "--disc-start", "3", "--disc-type", "stylegan")
    step = TrainStep(args, new_model(args), Pictures(), CPU, total_steps=20)
    before = {key: value.clone() for key, value in step.discriminator.state_dict().items()}
    for number in (1, 2):
        assert "logits_real" not in step([(images(), None)], number)
    assert all(torch.equal(before[key], value) for key, value in step.discriminator.state_dict().items())
    assert "logits_real" in step([(images(), None)], 3)
    assert not all(torch.equal(before[key], value) for key, value in step.discriminator.state_dict().items())


def new_step(*flags, total_steps=20):
    torch.manual_seed(0)
    args = arguments("--image-size", "32", *flags)
    return TrainStep(args, new_model(args), Pictures(), CPU, total_steps)


def trained(step, steps=2):
    """All weights after a few steps on the same images."""
    for number in range(1, steps + 1):
        torch.manual_seed(number)
        step([(images(2, 32), None)], number)
    return torch.cat([p.detach().flatten() for p in step.model.parameters()])


GAN = ["--disc-weight", "0.5", "--disc-start", "1"]
ALIVE = [
    "--codebook-weight 3", "--commit-loss-beta 2", "--entropy-loss-ratio 0.5", "--reconstruction-weight 3",
    "--reconstruction-loss l1", "--gradient-weight 1", "--no-codebook-l2-norm", "--codebook-init kmeans",
    "--revive-every 1", "--dropout-p 0.3", "--lr 2e-3", "--weight-decay 0.5", "--beta1 0.5", "--beta2 0.5",
    "--max-grad-norm 0.01", "--warmup-steps 4", "--lr-schedule linear", "--optimizer muon", "--mixed-precision bf16",
    "--disc-weight 0.9", "--disc-start 2", "--disc-loss vanilla", "--gen-loss non-saturating",
    "--disc-adaptive-weight", "--disc-lr 0.1", "--disc-layers 2", "--disc-loss non-saturating",
]  # fmt: skip


@pytest.fixture(scope="module")
def unchanged():
    return trained(new_step(*GAN))


def test_the_same_flags_learn_the_same(unchanged):
    assert torch.equal(trained(new_step(*GAN)), unchanged)


@pytest.mark.parametrize("flag", ALIVE)
def test_every_flag_changes_what_is_learned(flag, unchanged):
    changed = trained(new_step(*GAN, *flag.split()))
    assert changed.shape == unchanged.shape and changed.isfinite().all() and not torch.equal(changed, unchanged)


def test_activations_computed_twice_give_the_same_weights():
    plain, twice = new_step("--ema"), new_step("--ema", "--gradient-checkpointing")
    calls = []
    twice.model.decoder.mid[0].register_forward_pre_hook(lambda *_: calls.append(1))
    conv = twice.model.decoder.mid[0].conv1
    conv.register_forward_pre_hook(lambda *_: calls.append(2))
    assert torch.equal(trained(plain), trained(twice))
    assert calls.count(2) == 4 and calls.count(1) == 2  # two steps, each with one forward and one again
    assert twice.ema.decoder.mid[0].forward.__self__ is twice.ema.decoder.mid[0]
    assert plain.model.state_dict().keys() == twice.model.state_dict().keys()


def test_fp16_keeps_the_scales_of_both_sides_for_the_next_start():
    step = new_step("--mixed-precision", "fp16", *GAN)
    weights = trained(step)
    assert weights.isfinite().all()
    parts = step.stateful()
    assert parts["scaler"] is not parts["scaler_disc"]
    assert all(parts[name].state_dict()["scale"] > 1 for name in ("scaler", "scaler_disc"))
    assert parts["scaler"].state_dict()["_growth_tracker"] == 2
    again = new_step("--mixed-precision", "fp16", *GAN)
    again.stateful()["scaler"].load_state_dict(parts["scaler"].state_dict())
    assert again.scaler.state_dict() == step.scaler.state_dict()


def test_the_average_starts_fast_and_takes_the_buffers_along():
    assert [ema_decay(n, 0.9999) for n in (1, 90, 10**6)] == pytest.approx([2 / 11, 0.91, 0.9999])
    step = new_step("--ema", "--quantizer", "ema", "--revive-every", "0")
    first = step.model.encoder.conv_in.weight.detach().clone()
    trained(step, 1)
    expected = torch.lerp(step.model.encoder.conv_in.weight, first, 2 / 11)
    torch.testing.assert_close(step.ema.encoder.conv_in.weight, expected)
    assert torch.equal(step.ema.quantize.cluster_size, step.model.quantize.cluster_size)
    slow = new_step("--ema", "--ema-decay", "0")
    assert torch.equal(trained(slow), torch.cat([p.flatten() for p in slow.ema.parameters()]))


def test_usage_is_that_of_all_processes_and_known_at_log_steps_alone(monkeypatch):
    step = new_step("--log-every", "2")
    assert "codebook_usage" not in step([(images(), None)], 1)
    alone = step([(images(), None)], 2)["codebook_usage"]
    others = torch.zeros(32)
    others[20:] = 1  # what the other process has seen
    assert not step.model.quantize.seen()[20:].all()
    monkeypatch.setattr(train_step, "sum_over_ranks", lambda own: own + others if own.shape == (32,) else own)
    together = step([(images(), None)], 4)["codebook_usage"]
    assert together == (step.model.quantize.seen() + others > 0).float().mean() > alone


def test_a_code_that_any_process_uses_is_not_revived(monkeypatch):
    step = new_step("--revive-every", "1", "--lr", "0")
    step.model.quantize.codebook_used.zero_()
    before = step.model.quantize.embedding.weight.detach().clone()
    others = torch.zeros(32)
    others[5] = 1
    monkeypatch.setattr(train_step, "sum_over_ranks", lambda own: own + others if own.shape == (32,) else own)
    step.codebook.before_step(images(), 3)
    moved = (step.model.quantize.embedding.weight != before).any(1)
    assert moved.tolist() == [i not in (0, 5) for i in range(32)]


@pytest.mark.parametrize("kind", ["fsq", "lfq"])
def test_fixed_codes_cannot_be_placed(kind):
    with pytest.raises(ValueError, match="--codebook-init and --revive-every"):
        new_step("--quantizer", kind, "--codebook-size", "64", "--codebook-init", "kmeans")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("recipe") / "images")


def command(folder, run_dir, *flags, steps=4):
    line = f"--data-path {folder} --run-dir {run_dir} --global-batch-size 4 --num-workers 0 --log-every 1"
    train(arguments(*line.split(), "--max-steps", str(steps), "--codebook-size", "64", "--image-size", "24", *flags))
    return checkpoint.read(run_dir / f"checkpoints/{steps:07d}.pt")


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_every_quantizer_trains_continues_bit_equal_and_loads(kind, folder, tmp_path):
    flags = ["--quantizer", kind, "--val-data-path", str(folder), "--ema", *GAN]
    flags += ["--codebook-init", "kmeans", "--revive-every", "2"] if kind not in ("fsq", "lfq") else []
    flags += [] if kind == "vq" else ["--disc-weight", "0"]
    flags += ["--ckpt-every", "2"]
    whole = command(folder, tmp_path / "whole", *flags)
    (tmp_path / "parts/checkpoints").mkdir(parents=True)
    shutil.copy(tmp_path / "whole/checkpoints/0000002.pt", tmp_path / "parts/checkpoints")
    parts = command(folder, tmp_path / "parts", *flags)
    for name in sorted({"model", "ema", "discriminator"} & whole.keys()):
        assert all(torch.equal(value, parts[name][key]) for key, value in whole[name].items()), name
    metrics = read_metrics(tmp_path / "whole/metrics.jsonl")
    measured = metrics[-1]
    assert {"val/psnr", "val/ssim", "val/perplexity", "val/unigram_bits", "val/ema_psnr"} <= measured.keys()
    assert (tmp_path / "whole/pictures/0000004-reconstruction.png").is_file()
    model = load(tmp_path / "whole/checkpoints/0000004.pt", "--quantizer", kind)
    assert model.config.quantizer == kind and not model.training
    codes = encode_crops(model, images(2)[None])
    assert codes.shape == (1, 2, 16) and codes.max() < 64
    with torch.no_grad():
        torch.testing.assert_close(decode_codes(model, codes[0]), model(images(2))[0], atol=1e-4, rtol=1e-3)
    other = "lfq" if kind == "vq" else "vq"
    named = "--codebook-size 64" if kind == "vq" else f"--quantizer {kind}"
    with pytest.raises(checkpoint.CheckpointError, match=f"it would fit --vq-model VQ-4-S .*{named}"):
        load(tmp_path / "whole/checkpoints/0000004.pt", "--quantizer", other)


def load(path, *flags):
    parser = argparse.ArgumentParser()
    add_vq_args(parser)
    return load_tokenizer(
        parser.parse_args(["--vq-model", "VQ-4-S", "--codebook-size", "64", "--vq-ckpt", str(path), *flags]), CPU
    )


def test_codes_trained_without_normalisation_are_not_decoded_with_it(folder, tmp_path):
    command(folder, tmp_path, "--no-codebook-l2-norm", steps=1)
    path = tmp_path / "checkpoints/0000001.pt"
    with pytest.raises(checkpoint.CheckpointError, match="--no-codebook-l2-norm"):
        load(path)
    assert not load(path, "--no-codebook-l2-norm").quantize.l2_norm


def test_fine_tuning_from_weights_alone_starts_the_rest_afresh(folder, tmp_path):
    weights = {key: value + 0.01 for key, value in new_model(arguments("--codebook-size", "64")).state_dict().items()}
    checkpoint.save({"model": weights}, tmp_path / "released.pt")
    flags = ["--vq-ckpt", str(tmp_path / "released.pt"), "--finetune", "--lr", "0", "--ema", *GAN]
    tuned = command(folder, tmp_path / "run", *flags, steps=1)
    assert tuned["steps"] == 1 and {"discriminator", "optimizer_disc", "ema"} <= tuned.keys()
    for part in ("model", "ema"):
        same = [torch.allclose(tuned[part][k], v) for k, v in weights.items() if "codebook_used" not in k]
        assert all(same), part
    log = (tmp_path / "run/log.txt").read_text()
    assert "has no optimizer state: it starts afresh" in log and "has no discriminator state" in log


def test_held_out_images_are_measured_with_features_and_shown(folder, monkeypatch):
    class Colours:
        comparable, label = False, "colours (mean of each channel)"

        def __call__(self, pictures):
            return {"pool": pictures.float().mean(dim=(1, 2))}

    monkeypatch.setattr(recipe, "feature_network", lambda name, device, weights: {"lite0": Colours()}[name])
    args = arguments("--val-data-path", str(folder), "--val-features", "lite0", "--val-images", "10", "--ema")
    step = new_step("--ema")
    step.model.train()
    held_out = HeldOut(args, step, CPU)
    before = copy.deepcopy(step.model.state_dict())
    values = held_out.measure()
    assert {"psnr", "KD-colours", "FD-colours", "ema_psnr", "ema_FD-colours"} <= values.keys()
    assert values["FD-colours"] == pytest.approx(values["ema_FD-colours"])  # not trained yet: the same weights
    monkeypatch.setattr(Colours, "comparable", True)
    assert {"rFID", "KID", "ema_rFID"} <= HeldOut(args, step, CPU).measure().keys()
    shown = held_out.pictures()["reconstruction"]
    assert shown.shape == (20, 3, 16, 16)
    assert torch.equal(shown[:8], torch.stack([held_out.images[i][0] for i in range(8)]))
    assert step.model.training and all(torch.equal(before[k], v) for k, v in step.model.state_dict().items())


def test_one_process_of_a_machine_builds_the_losses_first(monkeypatch):
    """It downloads the perceptual network; the others find it in the cache."""
    order = []
    monkeypatch.setattr(train_step, "barrier", lambda: order.append("barrier"))
    monkeypatch.setattr(train_step, "new_loss", lambda args: order.append("build"))
    for rank, expected in ((0, ["build", "barrier"]), (1, ["barrier", "build"])):
        order.clear()
        monkeypatch.setattr(train_step, "read_launch", lambda: Launch(rank=8, local_rank=rank))  # noqa: B023
        train_step.new_loss_once_downloaded(arguments())
        assert order == expected


def test_the_loss_that_is_reported_is_that_of_both_sides():
    step = new_step(*GAN)
    terms = step([(images(1, 32), None), (images(1, 32), None)], 1)
    names = ("rec_loss", "perceptual_loss", "vq_loss", "commit_loss", "entropy_loss", "generator_adv_loss")
    expected = sum(terms[name] for name in (*names, "discriminator_adv_loss"))
    torch.testing.assert_close(terms["loss"], expected, atol=1e-4, rtol=0)


def test_the_log_says_what_is_trained_on_what(folder, tmp_path):
    command(folder, tmp_path, "--ema", *GAN, steps=1)
    log = (tmp_path / "log.txt").read_text()
    for line in (
        "Starting rank=0, seed=0, world_size=1.", f"Dataset contains 12 images ({folder})",
        "Quantizer vq: 64 codes of 8 channels", "VQ Model Parameters: 851,435", "VQ Model EMA Parameters: 851,435",
        "Discriminator Parameters: 2,765,633", "Initial state: steps=0, epochs=0", "(Generator) rec_loss: ",
        "(Discriminator) discriminator_adv_loss: ", "(step=0000001) Train Loss: ", "Saved checkpoint to ", "Done!",
    ):  # fmt: skip
        assert line in log, line


def test_the_perceptual_loss_reads_a_local_file_and_is_measured(folder, tmp_path):
    torch.manual_seed(0)
    trunk = vgg16(pretrained=False).state_dict()  # 'slice1.0.weight' -> torchvision's 'features.0.weight'
    checkpoint.save({f"features.{key.split('.', 1)[1]}": value for key, value in trunk.items()}, tmp_path / "vgg.pth")
    flags = ["--perceptual-weight", "2", "--vgg-path", str(tmp_path / "vgg.pth")]
    step = new_step(*flags)
    terms = step([(images(2, 32), None)], 1)
    assert terms["perceptual_loss"] > 0 and not any(p.requires_grad for p in step.loss.perceptual_loss.parameters())
    args = arguments(*flags, "--image-size", "32", "--val-data-path", str(folder), "--val-images", "3")
    assert HeldOut(args, step, CPU).measure()["lpips"] > 0


def test_settings_that_cannot_be(folder):
    with pytest.raises(ValueError, match=r"--ema-decay must lie in \[0, 1\)"):
        new_step("--ema-decay", "1")
    args = arguments("--val-data-path", str(folder), "--val-images", "0")
    with pytest.raises(ValueError, match="--val-images is 0, of 12 images"):
        HeldOut(args, new_step(), CPU)
    assert "codebook_usage" not in new_step("--log-every", "0", *GAN)([(images(2, 32), None)], 1)


def test_lpips_is_measured_where_training_has_it():
    class Distance(torch.nn.Module):
        def forward(self, reference, seen):
            return (reference - seen).abs().mean((1, 2, 3), keepdim=True)

    model = tiny_vq().eval()
    values = evaluate_reconstruction(model, [(images(), None), (images(2), None)], CPU, Distance())
    assert list(values) == ["psnr", "ssim", "lpips", "codebook_usage", "perplexity", "unigram_bits"]
    assert 0 < values["lpips"] < 1
