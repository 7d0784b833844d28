"""What users of the established system import and type stays valid."""

import importlib

import pytest

from autoregressive.sample import sample_c2i, sample_c2i_ddp
from autoregressive.serve import sample_c2i as serve_sample_c2i
from autoregressive.train import extract_codes_c2i, extract_codes_t2i, train_c2i
from evaluations.t2i import evaluation as t2i_evaluation
from tokenizer.tokenizer_image import vq_train

NAMES = {
    "autoregressive.models.gpt": "ModelArgs Transformer LabelEmbedder CaptionEmbedder MLP RMSNorm "
    "FeedForward Attention "
    "TransformerBlock KVCache precompute_freqs_cis precompute_freqs_cis_2d apply_rotary_emb find_multiple "
    "GPT_B GPT_L GPT_XL GPT_XXL GPT_XXXL GPT_1B GPT_3B GPT_7B GPT_models",
    "autoregressive.models.generate": "generate sample top_k_top_p_filtering logits_to_probs prefill decode_one_token "
    "decode_n_tokens",
    "autoregressive.models.gpt_hf": "TransformerHF GPT_models_HF GPT_B GPT_L GPT_XL GPT_XXL "
    "GPT_XXXL GPT_1B GPT_3B GPT_7B",
    "autoregressive.train.train_c2i": "creat_optimizer",
    "tokenizer.tokenizer_image.vq_model": "ModelArgs VQModel Encoder Decoder VectorQuantizer ResnetBlock AttnBlock "
    "Upsample Downsample Normalize nonlinearity compute_entropy_loss VQ_8 VQ_16 VQ_models",
    "tokenizer.tokenizer_image.vq_model_hf": "VQModelHF VQ_8 VQ_16 VQ_models_HF ModelArgs VQModel",
    "tokenizer.tokenizer_image.vq_loss": "VQLoss hinge_d_loss vanilla_d_loss non_saturating_d_loss hinge_gen_loss "
    "non_saturating_gen_loss adopt_weight",
    "tokenizer.tokenizer_image.lpips": "LPIPS ScalingLayer NetLinLayer vgg16 normalize_tensor spatial_average "
    "get_ckpt_path download md5_hash URL_MAP CKPT_MAP MD5_MAP",
    "tokenizer.tokenizer_image.discriminator_patchgan": "NLayerDiscriminator ActNorm",
    "tokenizer.tokenizer_image.discriminator_stylegan": "Discriminator DiscriminatorBlock Blur leaky_relu exists",
    "tokenizer.tokenizer_image.discriminator": "PatchGANDiscriminator ActNorm StyleGANDiscriminator "
    "DiscriminatorBlock Blur",
    "tokenizer.vqgan.model": "VQModel VQGAN_FROM_TAMING",
    "tokenizer.vqgan.layer": "Encoder Decoder ResnetBlock AttnBlock Upsample Downsample Normalize nonlinearity",
    "tokenizer.vqgan.quantize": "VectorQuantizer VectorQuantizer2",
    "dataset.build": "build_dataset",
    "dataset.imagenet": "CustomDataset build_imagenet build_imagenet_code",
    "dataset.coco": "SingleFolderDataset build_coco",
    "dataset.openimage": "DatasetJson build_openimage",
    "dataset.pexels": "build_pexels",
    "dataset.t2i": "Text2ImgDatasetImg Text2ImgDataset Text2ImgDatasetCode build_t2i build_t2i_code build_t2i_image",
    "dataset.augmentation": "center_crop_arr random_crop_arr",
    "language.t5": "T5Embedder",
    "utils.data": "center_crop_arr",
    "utils.distributed": "init_distributed_mode setup_for_distributed",
    "utils.logger": "create_logger",
    "utils.ema": "update_ema requires_grad",
    "utils.drop_path": "drop_path DropPath",
}


@pytest.mark.parametrize("module", NAMES)
def test_names(module):
    found = vars(importlib.import_module(module))
    assert [name for name in NAMES[module].split() if name not in found] == []


LINES = [
    (
        t2i_evaluation,
        "--fake_dir f --ref_dir r --ref_data coco2014 --ref_type train --how_many 30000 --clip_model4eval ViT-G/14 "
        "--eval_res 256 --batch_size 8",
    ),
    (
        vq_train,
        "--data-path d --data-face-path f --cloud-save-path c --no-local-save --vq-model VQ-16 --vq-ckpt x "
        "--finetune --ema "
        "--codebook-size 16384 --codebook-embed-dim 8 --codebook-l2-norm --codebook-weight 1.0 "
        "--entropy-loss-ratio 0.0 "
        "--commit-loss-beta 0.25 --reconstruction-weight 1.0 --reconstruction-loss l2 --perceptual-weight 1.0 "
        "--disc-weight 0.5 --disc-start 20000 --disc-type patchgan --disc-loss hinge --gen-loss hinge --compile "
        "--dropout-p 0.0 --results-dir r --dataset t2i_image --image-size 256 --epochs 40 --lr 1e-4 "
        "--weight-decay 0.05 "
        "--beta1 0.9 --beta2 0.95 --max-grad-norm 1.0 --global-batch-size 128 --global-seed 0 --num-workers 16 "
        "--log-every 100 --ckpt-every 5000 --gradient-accumulation-steps 1 --mixed-precision bf16",
    ),
    (
        extract_codes_c2i,
        "--data-path d --code-path c --vq-model VQ-8 --vq-ckpt x --codebook-size 16384 --codebook-embed-dim 8 "
        "--dataset imagenet --image-size 448 --ten-crop --crop-range 1.05 --global-seed 0 --num-workers 24 --debug",
    ),
    (
        extract_codes_t2i,
        "--data-path d --code-path c --data-start 0 --data-end 3 --vq-model VQ-16 --vq-ckpt x --codebook-size 16384 "
        "--codebook-embed-dim 8 --image-size 512 --global-seed 0 --num-workers 24",
    ),
    (
        train_c2i,
        "--code-path c --cloud-save-path s --no-local-save --gpt-model GPT-XXXL --gpt-ckpt x --gpt-type c2i "
        "--vocab-size 16384 --ema --cls-token-num 1 --dropout-p 0.1 --token-dropout-p 0.1 --drop-path-rate 0.1 "
        "--no-compile --results-dir r --dataset imagenet_code --image-size 384 --downsample-size 16 "
        "--num-classes 1000 "
        "--epochs 300 --lr 1e-4 --weight-decay 0.05 --beta1 0.9 --beta2 0.95 --max-grad-norm 1.0 "
        "--global-batch-size 256 "
        "--global-seed 0 --num-workers 24 --log-every 100 --ckpt-every 5000 --gradient-accumulation-steps 1 "
        "--mixed-precision fp16",
    ),
    (
        sample_c2i,
        "--gpt-model GPT-3B --gpt-ckpt x --gpt-type c2i --from-fsdp --cls-token-num 1 --precision bf16 --compile "
        "--vq-model VQ-16 --vq-ckpt v --codebook-size 16384 --codebook-embed-dim 8 --image-size 384 "
        "--downsample-size 16 "
        "--num-classes 1000 --cfg-scale 4.0 --cfg-interval -1 --seed 0 --top-k 2000 --temperature 1.0 --top-p 1.0",
    ),
    (
        sample_c2i_ddp,
        "--gpt-model GPT-3B --gpt-ckpt x --gpt-type c2i --from-fsdp --cls-token-num 1 --precision bf16 --compile "
        "--vq-model VQ-16 --vq-ckpt v --codebook-size 16384 --codebook-embed-dim 8 --image-size 384 "
        "--image-size-eval 256 --downsample-size 16 --num-classes 1000 --cfg-scale 1.5 --cfg-interval -1 "
        "--sample-dir samples --per-proc-batch-size 32 --num-fid-samples 50000 --global-seed 0 --top-k 0 "
        "--temperature 1.0 --top-p 1.0",
    ),
    (
        serve_sample_c2i,
        "--gpt-model GPT-3B --gpt-ckpt x --gpt-type c2i --from-fsdp --cls-token-num 1 --precision bf16 --compile "
        "--vq-model VQ-16 --vq-ckpt v --codebook-size 16384 --codebook-embed-dim 8 --image-size 384 "
        "--downsample-size 16 --num-classes 1000 --cfg-scale 4.0 --seed 0 --top-k 2000 --temperature 1.0 --top-p 1.0",
    ),
]
REQUIRED = {
    t2i_evaluation: "--fake_dir f",
    vq_train: "--data-path d",
    extract_codes_c2i: "--data-path d --code-path c --vq-ckpt x",
    train_c2i: "--code-path c",
    sample_c2i: "",
    sample_c2i_ddp: "",
    serve_sample_c2i: "",
}
# Defaults that a published number depends on.
DEFAULTS = {
    t2i_evaluation: {"how_many": 30000, "clip_model4eval": "ViT-B/32", "eval_res": 256, "ref_data": "coco2014"},
    vq_train: {
        "lr": 1e-4,
        "beta2": 0.95,
        "global_batch_size": 128,
        "epochs": 40,
        "disc_start": 20000,
        "disc_weight": 0.5,
        "commit_loss_beta": 0.25,
        "mixed_precision": "bf16",
        "max_grad_norm": 1.0,
        "codebook_l2_norm": True,
    },
    extract_codes_c2i: {"image_size": 256, "crop_range": 1.1, "ten_crop": False, "vq_model": "VQ-16"},
    train_c2i: {
        "lr": 1e-4,
        "weight_decay": 0.05,
        "beta2": 0.95,
        "global_batch_size": 256,
        "epochs": 300,
        "dropout_p": 0.1,
        "token_dropout_p": 0.1,
        "class_dropout_prob": 0.1,
        "lr_schedule": "constant",
        "warmup_steps": 0,
    },
    sample_c2i: {
        "cfg_scale": 4.0,
        "cfg_interval": -1,
        "top_k": 2000,
        "top_p": 1.0,
        "temperature": 1.0,
        "image_size": 384,
        "precision": "bf16",
        "images_per_class": 1,
    },
    sample_c2i_ddp: {
        "cfg_scale": 1.5,
        "cfg_interval": -1,
        "cfg_schedule": "constant",
        "cfg_start": 0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "temperature": 1.0,
        "temperature_end": None,
        "image_size": 384,
        "precision": "bf16",
        "sample_dir": "samples",
        "per_proc_batch_size": 32,
        "num_fid_samples": 50000,
        "global_seed": 0,
        "balanced_labels": False,
    },
    serve_sample_c2i: {
        "gpt_model": "GPT-B",
        "cfg_scale": 4.0,
        "top_k": 2000,
        "top_p": 1.0,
        "temperature": 1.0,
        "seed": 0,
        "image_size": 384,
        "precision": "bf16",
        "class_labels": [207, 360, 387, 974, 88, 979, 417, 279],
    },
}


@pytest.mark.parametrize(("command", "line"), LINES, ids=lambda x: getattr(x, "__name__", ""))
def test_every_established_flag_is_accepted(command, line):
    command.parser().parse_args(line.split())


@pytest.mark.parametrize("command", DEFAULTS, ids=lambda x: x.__name__)
def test_defaults(command):
    args = vars(command.parser().parse_args(REQUIRED[command].split()))
    assert {name: args[name] for name in DEFAULTS[command]} == DEFAULTS[command]
