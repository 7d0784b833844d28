"""How the image tokenizer is trained: data, model, validation, and the loop. `vq_train.py` is its command."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from dataset.augmentation import eval_transform, train_transform
from dataset.build import build_dataset
from dataset.images import SkipBad
from dataset.sampler import training_loader
from evaluations.distance import DistanceMonitor
from evaluations.features import FeatureNetwork
from evaluations.networks import feature_network
from tokenizer.build import build_tokenizer, describe_weights
from tokenizer.tokenizer_image.evaluation import evaluate_reconstruction, reconstruct
from tokenizer.tokenizer_image.quantizers import QUANTIZERS
from tokenizer.tokenizer_image.train_step import TrainStep
from tokenizer.tokenizer_image.vq_model import VQModel
from utils.args import apply_threads
from utils.distributed import get_rank, get_world_size, process_group
from utils.image import to_uint8
from utils.logger import create_logger
from utils.precision import allow_tf32
from utils.run_folder import open_run
from utils.seeding import seed_step
from utils.trainer import Trainer, TrainSettings

_SHOWN = 16  # held-out images in the pictures of a run
# Weights that are usual for these two; without an entropy loss few codes of lfq survive.
_ENTROPY_RATIO = {"lfq": 0.1, "ibq": 0.05}


def train(args: argparse.Namespace) -> None:
    """Train a tokenizer as `args` says; see `vq_train.py --help`."""
    apply_threads(args)
    allow_tf32()
    with process_group(args.device) as device:
        images = training_images(args)
        seed_step(args.global_seed, 0, 0)  # equal initial weights on all ranks and in all restarts
        model = new_model(args).to(device, memory_format=torch.channels_last)
        if args.image_size % model.stride:
            raise ValueError(
                f"--image-size {args.image_size} is not a multiple of the stride {model.stride} of {args.vq_model}"
            )
        run = open_run(args, args.vq_model)
        logger = create_logger(run.path)
        logger.info(f"Experiment directory: {run.path}; settings: {args}")
        logger.info(f"Starting rank={get_rank()}, seed={args.global_seed}, world_size={get_world_size()}.")
        sampler, loader = training_loader(images, args, device)
        count = images.total if isinstance(images, IterableDataset) else len(images)  # type: ignore[attr-defined]
        steps = f"{sampler.batches_per_epoch:,} steps an epoch"
        logger.info(f"Dataset contains {count:,} images ({args.data_path}), {steps}")
        settings = TrainSettings.from_args(args, sampler.batches_per_epoch)
        step = TrainStep(args, model, images, device, settings.total_steps, logger)
        describe(step, logger)
        held_out = HeldOut(args, step, device) if args.val_data_path else None
        trainer = Trainer(
            run,
            logger,
            device,
            loader,
            step,
            step.stateful(),
            settings,
            {"args": vars(args)},
            held_out and held_out.measure,
            held_out and held_out.pictures,
        )
        sampler.start = trainer.resume(args.vq_ckpt, describe_weights, restart=args.finetune)
        epoch = sampler.start // sampler.batches_per_epoch
        logger.info(f"Initial state: steps={sampler.start}, epochs={epoch}")
        logger.info(f"Training for {settings.total_steps // sampler.batches_per_epoch} epochs...")
        trainer.fit()
        logger.info("Done!")


def describe(step: TrainStep, logger: logging.Logger) -> None:
    """Say what is trained."""
    config = step.model.config
    logger.info(f"Quantizer {config.quantizer}: {config.codebook_size:,} codes of {config.codebook_embed_dim} channels")
    parts = {"VQ Model": step.model, "VQ Model EMA": step.ema, "Discriminator": step.discriminator}
    for name, part in parts.items():
        if part is not None:
            logger.info(f"{name} Parameters: {sum(p.numel() for p in part.parameters()):,}")


def training_images(args: argparse.Namespace) -> Dataset:
    """The images of `args`, randomly cropped; unreadable ones are left out up to --max-bad-share."""
    images = build_dataset(args, transform=train_transform(args.image_size))
    return images if isinstance(images, IterableDataset) else SkipBad(images, args.max_bad_share)


def new_model(args: argparse.Namespace) -> VQModel:
    """An untrained tokenizer with the loss settings of `args`.

    Raises:
        ValueError: when flags do not go with the quantizer.
    """
    if not QUANTIZERS[args.quantizer].learned and (args.codebook_init != "uniform" or args.revive_every):
        raise ValueError(
            f"the codes of --quantizer {args.quantizer} are fixed: leave out --codebook-init and --revive-every"
        )
    ratio = args.entropy_loss_ratio
    return build_tokenizer(
        args,
        commit_loss_beta=args.commit_loss_beta,
        entropy_loss_ratio=_ENTROPY_RATIO.get(args.quantizer, 0.0) if ratio is None else ratio,
        dropout_p=args.dropout_p,
    )


class HeldOut:
    """The held-out images of a training: what is measured and shown of them at every validation."""

    def __init__(self, args: argparse.Namespace, step: TrainStep, device: torch.device) -> None:
        self.step, self.device = step, device
        layout = "imagenet" if args.dataset == "tars" else args.dataset  # held-out images need no streaming
        settings = argparse.Namespace(**{**vars(args), "data_path": args.val_data_path, "dataset": layout})
        images = build_dataset(settings, transform=eval_transform(args.image_size))
        self.images = Subset(images, range(min(len(images), args.val_images)))
        if not len(self.images):
            raise ValueError(f"nothing to validate with: --val-images is {args.val_images}, of {len(images)} images")
        models = {"": step.model} | ({"ema_": step.ema} if step.ema is not None else {})
        self.models = models
        network = feature_network(args.val_features, device, args.val_weights)
        self.monitors = {prefix: self._monitor(network, model) for prefix, model in models.items()} if network else {}

    def measure(self) -> dict[str, float]:
        """PSNR, SSIM, LPIPS where training has it, use of the codebook, feature distances; with --ema of both."""
        values: dict[str, float] = {}
        for prefix, model in self.models.items():
            batches = DataLoader(self.images, batch_size=32)
            found = evaluate_reconstruction(model, batches, self.device, self.step.loss.perceptual_loss)
            if self.monitors:
                # An FID between images and their reconstructions is called rFID.
                found |= {name.replace("FID", "rFID"): value for name, value in self.monitors[prefix]().items()}
            values |= {f"{prefix}{name}": value for name, value in found.items()}
        return values

    def pictures(self) -> Mapping[str, Tensor]:
        """Rows of eight images, each above the row of their reconstructions."""
        count = min(_SHOWN, len(self.images))
        images = self._originals(torch.linspace(0, len(self.images) - 1, count).long().tolist())
        rows = zip(images.split(8), self._reconstructed(self.step.model, images).split(8))
        return {"reconstruction": torch.cat([row for pair in rows for row in pair])}

    def _monitor(self, network: FeatureNetwork, model: VQModel) -> DistanceMonitor:
        def draw(numbers: list[int]) -> Tensor:
            return to_uint8(self._reconstructed(model, self._originals(numbers)))

        def originals(numbers: list[int]) -> Tensor:
            return to_uint8(self._originals(numbers))

        count = len(self.images)
        return DistanceMonitor(network, originals, count, draw, count)

    def _originals(self, numbers: list[int]) -> Tensor:
        return torch.stack([self.images[i][0] for i in numbers])

    def _reconstructed(self, model: VQModel, images: Tensor) -> Tensor:
        was_training = model.training
        outputs, _ = reconstruct(model.eval(), images.to(self.device))
        model.train(was_training)
        return outputs.cpu()
