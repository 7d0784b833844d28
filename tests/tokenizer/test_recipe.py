"""The tokenizer's training recipe in one process, without commands."""

import math

import pytest
import torch

from tests.tokenizer.builders import tiny_vq
from tokenizer.tokenizer_image import vq_train
from tokenizer.tokenizer_image.evaluation import evaluate_reconstruction
from tokenizer.tokenizer_image.recipe import TrainStep, make_optimizers, new_model

CPU = torch.device("cpu")


def arguments(*flags):
    size = "--data-path x --vq-model VQ-4-S --codebook-size 32 --image-size 16"
    losses = "--perceptual-weight 0 --disc-weight 0 --mixed-precision none --lr 1e-3"
    return vq_train.parser().parse_args([*size.split(), *losses.split(), *flags])


def images(count=4):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


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
