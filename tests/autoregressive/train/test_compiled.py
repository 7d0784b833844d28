"""torch.compile makes training faster, not different."""

import pytest
import torch

from autoregressive.train.step import TrainStep
from autoregressive.train.train_c2i import parser
from tests.autoregressive.train.stores import C2I, CLASSES, TOKENS, VOCABULARY

CPU = torch.device("cpu")
FLAGS = [*C2I, "--code-path", "none", "--lr", "0.003", "--mixed-precision", "none",
         "--dropout-p", "0", "--token-dropout-p", "0", "--class-dropout-prob", "0"]  # fmt: skip


def losses(*flags):
    """The losses of four steps, and the weights after them."""
    step = TrainStep(parser().parse_args([*FLAGS, *flags]), CPU, total_steps=10)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(VOCABULARY, (4, 1, TOKENS), generator=generator)
    labels = torch.randint(CLASSES, (4, 1), generator=generator)
    found = torch.stack([step([(codes, labels)], number)["loss"] for number in range(1, 5)])
    return found, torch.nn.utils.parameters_to_vector(step.model.parameters())


@pytest.mark.slow
def test_compiled_training_has_the_losses_of_eager_training():
    eager, weights = losses("--no-compile")
    compiled, compiled_weights = losses("--compile")
    assert eager[0] > eager[-1] + 0.1
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compiled_weights, weights, rtol=1e-2, atol=1e-3)
