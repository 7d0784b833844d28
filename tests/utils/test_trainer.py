"""The training loop on a toy problem: exact resume, signals, broken losses, checkpoints, metrics."""

import os
import re
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

from dataset.sampler import training_loader
from utils import checkpoint
from utils import trainer as trainer_module
from utils.args import add_optimizer_args, add_run_args, add_runtime_args, add_seed_arg, make_parser
from utils.errors import Interrupted
from utils.logger import create_logger, read_metrics
from utils.optim import Optimizers, adamw, decay_groups
from utils.run_folder import open_run
from utils.throughput import StepCost
from utils.trainer import REFUSED, Trainer, TrainSettings

CPU = torch.device("cpu")


def arguments(tmp_path, *flags):
    parser = make_parser(None)
    add_optimizer_args(parser, epochs=1, global_batch_size=4)
    add_run_args(parser, str(tmp_path / "results"))
    add_runtime_args(parser)
    add_seed_arg(parser)
    return parser.parse_args(["--lr", "0.01", "--num-workers", "0", "--log-every", "2", *flags])


def toy_trainer(args, after_step=lambda number: None, loss_scale=lambda number: 1.0):
    """A linear model with dropout on 10 random points; `after_step` sees each step's number."""
    torch.manual_seed(0)
    points = torch.randn(10, 3, generator=torch.Generator().manual_seed(1))
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    optimizers = Optimizers(adamw(decay_groups(model.named_parameters(), 0.1), args.lr, (0.9, 0.95), CPU))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    sampler, loader = training_loader(TensorDataset(points), args, CPU)

    def step(batches, number):
        losses = []
        for (x,) in batches:
            loss = (model(x) - x.sum(1, keepdim=True)).square().mean() * loss_scale(number)
            (loss / len(batches)).backward()
            losses.append(loss.detach())
        optimizers.update(scaler, args.max_grad_norm)
        after_step(number)
        return {"loss": torch.stack(losses).mean()}

    run = open_run(args, "toy")
    trainer = Trainer(
        run, create_logger(run.path), CPU, loader, step, {"model": model, "optimizer": optimizers},
        TrainSettings.from_args(args, sampler.batches_per_epoch), {"args": vars(args)},
    )  # fmt: skip
    sampler.start = trainer.resume()
    return trainer


def final_weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.stateful["model"].parameters()])


def test_a_stopped_and_resumed_run_equals_one_that_never_stopped(tmp_path):
    whole = toy_trainer(arguments(tmp_path, "--max-steps", "9", "--run-dir", str(tmp_path / "whole")))
    whole.fit()
    stop_at_5 = lambda number: number == 5 and os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    args = arguments(tmp_path, "--max-steps", "9", "--run-dir", str(tmp_path / "parts"))
    with pytest.raises(Interrupted) as stop:
        toy_trainer(args, after_step=stop_at_5).fit()
    assert stop.value.signum == signal.SIGTERM
    resumed = toy_trainer(args)
    assert resumed.steps_done == 5
    resumed.fit()
    assert torch.equal(final_weights(whole), final_weights(resumed))
    losses = [
        [(e["step"], e["loss"]) for e in read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("whole", "parts")
    ]
    assert losses[0][0] == losses[1][0] and losses[0][-1] == losses[1][-1]


def test_metrics_written_after_the_last_checkpoint_of_a_killed_run_are_dropped(tmp_path):
    args = arguments(tmp_path, "--max-steps", "6", "--ckpt-every", "3", "--run-dir", str(tmp_path / "run"))
    toy_trainer(args).fit()
    (tmp_path / "run" / "checkpoints" / "0000006.pt").unlink()  # as if killed between step 3 and 6
    toy_trainer(args).fit()
    assert [e["step"] for e in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [2, 4, 6]


def test_the_last_step_is_saved_and_only_the_newest_are_kept(tmp_path):
    args = arguments(tmp_path, "--max-steps", "7", "--ckpt-every", "2", "--keep-last", "2")
    trainer = toy_trainer(args)
    trainer.fit()
    folder = trainer.run.path / "checkpoints"
    assert sorted(os.listdir(folder)) == ["0000006.pt", "0000007.pt"]
    content = checkpoint.read(folder / "0000007.pt")
    assert content["steps"] == 7 and content["args"]["lr"] == 0.01


def test_a_finished_run_dir_does_nothing_more(tmp_path):
    args = arguments(tmp_path, "--max-steps", "3", "--run-dir", str(tmp_path / "run"))
    first = toy_trainer(args)
    first.fit()
    again = toy_trainer(args, after_step=lambda number: pytest.fail("trained on"))
    again.fit()
    assert torch.equal(final_weights(first), final_weights(again))


def test_the_same_command_continues_an_unfinished_run_and_starts_a_new_one_after_a_finished_one(tmp_path):
    args = arguments(tmp_path, "--max-steps", "4")
    with pytest.raises(Interrupted):
        toy_trainer(args, after_step=lambda number: number == 2 and os.kill(os.getpid(), signal.SIGINT)).fit()
    second = toy_trainer(args)
    assert (second.run.path.name, second.steps_done) == ("000-toy", 2)
    second.fit()
    assert toy_trainer(args).run.path.name == "001-toy"
    assert toy_trainer(arguments(tmp_path, "--max-steps", "4", "--no-resume")).run.path.name == "002-toy"


def test_a_nan_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    args = arguments(tmp_path, "--max-steps", "9", "--ckpt-every", "3", "--log-every", "100")
    trainer = toy_trainer(args, loss_scale=lambda number: float("nan") if number >= 5 else 1.0)
    with pytest.raises(ValueError, match=r"loss is not a finite number at step 6.*0000003\.pt"):
        trainer.fit()
    assert os.listdir(trainer.run.path / "checkpoints") == ["0000003.pt"]


def test_accumulated_micro_batches_give_the_gradients_of_the_whole_batch(tmp_path):
    def weights(*flags):
        trainer = toy_trainer(
            arguments(tmp_path, "--max-steps", "3", "--run-dir", str(tmp_path / flags[-1]), *flags[:-1])
        )
        trainer.stateful["model"][1].p = 0.0
        trainer.fit()
        return final_weights(trainer)

    torch.testing.assert_close(weights("--gradient-accumulation-steps", "2", "two"), weights("one"))


def test_learning_rate_of_the_command_wins_over_the_checkpoint(tmp_path):
    toy_trainer(arguments(tmp_path, "--max-steps", "2", "--run-dir", str(tmp_path / "run"))).fit()
    args = arguments(tmp_path, "--max-steps", "4", "--run-dir", str(tmp_path / "run"))
    args.lr = 0.5
    assert toy_trainer(args).stateful["optimizer"].members[0].param_groups[0]["lr"] == 0.5


def test_no_local_save_needs_somewhere_else(tmp_path):
    with pytest.raises(ValueError, match="--cloud-save-path"):
        toy_trainer(arguments(tmp_path, "--no-local-save"))


def test_checkpoints_go_to_the_second_place_too_and_are_found_there(tmp_path):
    args = arguments(tmp_path, "--max-steps", "3", "--no-local-save", "--cloud-save-path", str(tmp_path / "cloud"),
                     "--run-dir", str(tmp_path / "run"))  # fmt: skip
    toy_trainer(args).fit()
    (found,) = (tmp_path / "cloud").rglob("*.pt")
    assert found.name == "0000003.pt" and found.parent.parent.name == "run"
    assert toy_trainer(args).steps_done == 3


def test_pictures_are_written_with_each_validation(tmp_path):
    args = arguments(tmp_path, "--max-steps", "5", "--val-every", "2", "--run-dir", str(tmp_path / "run"))
    trainer = toy_trainer(args)
    trainer.pictures = lambda: {"shade": torch.full((10, 3, 4, 4), trainer.steps_done / 4)}
    trainer.fit()
    folder = tmp_path / "run" / "pictures"
    assert sorted(os.listdir(folder)) == ["0000002-shade.png", "0000004-shade.png", "0000005-shade.png"]
    grid = np.asarray(Image.open(folder / "0000002-shade.png"))
    assert grid.shape == (2 * 6 + 2, 8 * 6 + 2, 3)  # rows of eight, lines of two pixels
    assert grid[3, 3].tolist() == [191] * 3 and not grid[10, 3 * 6 :].any()


def test_the_log_line_the_metrics_and_the_summary_of_a_run(tmp_path):
    args = arguments(tmp_path, "--max-steps", "4", "--run-dir", str(tmp_path / "run"))
    trainer = toy_trainer(args)
    trainer.cost = StepCost(tokens=12, flops=1e9)
    trainer.fit()
    line = r"\(step=0000002\) Train Loss: \d+\.\d{4}, Train Steps/Sec: \d+\.\d\d, Tokens/Sec: .*Memory: .* ETA: 00"
    assert re.search(line, (tmp_path / "run" / "log.txt").read_text())
    entry = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert entry["tokens_per_second"] == pytest.approx(12 * entry["steps_per_second"], rel=1e-4)
    assert (tmp_path / "run" / "summary.png").is_file()


def test_validation_and_saving_do_not_count_as_training_time(monkeypatch):
    clock = iter([0.0, 10.0, 110.0, 120.0])
    monkeypatch.setattr(trainer_module.time, "perf_counter", lambda: next(clock))
    window = trainer_module._Window(CPU)
    window.add({"loss": torch.tensor(1.0)})
    with window.paused():  # from 10 to 110
        pass
    assert window.steps_per_second() == pytest.approx(1 / 20)


def test_means_leave_out_the_steps_that_were_refused_on_the_device():
    window = trainer_module._Window(CPU)
    for loss, refused in ((1.0, 0.0), (float("nan"), 1.0), (4.0, 0.0), (100.0, 1.0)):
        window.add({"loss": torch.tensor(loss), "lr": 0.5, REFUSED: torch.tensor(refused)})
    assert window.means() == {"loss": 2.5, "lr": 0.5} and window.count == 4
    window.reset()
    window.add({"loss": torch.tensor(float("nan")), REFUSED: torch.tensor(1.0)})
    assert window.means() == {}
    window.add({"loss": torch.tensor(float("nan")), REFUSED: torch.tensor(0.0)})
    assert np.isnan(window.means()["loss"])  # what was not refused is not hidden


def test_numbers_of_the_host_stay_there_until_the_means_are_asked_for():
    window = trainer_module._Window(torch.device("meta"))
    window.add({"loss": torch.ones((), device="meta"), "lr": 0.5})
    assert [value.device.type for values in window.values.values() for value in values] == ["meta", "cpu"]


def test_the_last_verdict_is_awaited_before_a_checkpoint(tmp_path):
    args = arguments(tmp_path, "--max-steps", "5", "--ckpt-every", "2")
    trainer, settled = toy_trainer(args), []

    def settle():
        folder = trainer.run.path / "checkpoints"
        settled.append((trainer.steps_done, sorted(os.listdir(folder)) if folder.is_dir() else []))

    trainer.settle = settle
    trainer.fit()
    assert settled == [(2, []), (4, ["0000002.pt"]), (5, ["0000002.pt", "0000004.pt"])]
