"""Draw eight pictures of classes with vLLM.

    .venv-vllm/bin/python autoregressive/serve/sample_c2i.py --gpt-model GPT-L --gpt-ckpt c2i_L_384.pt \
        --vq-ckpt vq_ds16_c2i.pt --image-size 384

`bash scripts/setup_vllm.sh` makes the environment. In one without vLLM the pictures are drawn all the same, by this
project's own engine. Picture i is that of seed SEED+i, as in autoregressive/sample/sample_c2i.py.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from pathlib import Path

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor
from tqdm import tqdm

from autoregressive.build import add_gpt_args, latent_grid, load_gpt, require_null_class
from autoregressive.engine.build import make_engine
from autoregressive.models.generate import generate
from autoregressive.models.sampling import check_sampling
from autoregressive.sample.pipeline import image_generators
from autoregressive.sample.sample_c2i import IMAGENET_LABELS
from autoregressive.serve.export import export_checkpoint
from autoregressive.serve.vllm_engine import vllm_installed
from tokenizer.build import add_vq_args, load_tokenizer
from tokenizer.coding import decode_codes
from utils.args import add_seed_arg, make_parser
from utils.distributed import process_group
from utils.errors import run
from utils.image import make_grid_image, save_png
from utils.precision import DTYPES, allow_tf32
from utils.progress import progress


def parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    flags = make_parser(__doc__)
    add_gpt_args(flags, image_size=384)
    add_vq_args(flags)
    flags.add_argument("--from-fsdp", action="store_true", help="accepted, not needed: formats are recognised")
    flags.add_argument("--compile", action="store_true", help="accepted, without effect: vLLM compiles as it sees fit")
    group = flags.add_argument_group("sampling")
    group.add_argument("--class-labels", type=int, nargs="+", default=list(map(int, IMAGENET_LABELS)), help="class ids")
    group.add_argument("--cfg-scale", type=float, default=4.0, help="guidance scale; 1 and less is no guidance")
    group.add_argument("--top-k", type=int, default=2000, help="draw from the k likeliest codes; 0: all")
    group.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest codes of this mass; 1: all")
    group.add_argument("--temperature", type=float, default=1.0, help="below 1: likelier codes, above 1: more variety")
    group.add_argument("--precision", choices=["none", "fp16", "bf16"], default="bf16", help="of the GPT's weights")
    group.add_argument("--export-dir", help="where the weights are kept as vLLM reads them; default: beside --gpt-ckpt")
    flags.add_argument("--device", help="cuda or cpu, of the decoder; vLLM works on what it was built for")
    add_seed_arg(flags, "--seed")
    return flags


def code_bar(args: argparse.Namespace) -> tqdm:
    """A bar over the codes of all pictures."""
    return progress(len(args.class_labels) * latent_grid(args) ** 2, "token")


def vllm_codes(args: argparse.Namespace, vocab_size: int) -> tuple[Tensor, float]:
    """Codes (B, N) from vLLM, and the seconds that drawing took."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in this process: it starts ten times as fast
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    import vllm

    from autoregressive.serve.llm import LLM

    print(f"drawing with vLLM {vllm.__version__}")
    folder = export_checkpoint(args, vocab_size, args.export_dir)
    options = {name: getattr(args, name) for name in ("cfg_scale", "top_k", "top_p", "temperature")}
    with LLM(folder, guidance=args.cfg_scale > 1, max_images=len(args.class_labels)) as llm:
        started = time.perf_counter()
        with code_bar(args) as bar:
            codes = llm.generate(args.class_labels, seeds=args.seed, on_codes=bar.update, **options)
        return codes, time.perf_counter() - started


def own_codes(args: argparse.Namespace, vocab_size: int, device: torch.device) -> tuple[Tensor, float]:
    """The same from the engine that this project has for `device`."""
    gpt = load_gpt(args, vocab_size, device, DTYPES[args.precision])
    require_null_class(gpt, args)
    engine = make_engine(gpt)
    print(
        f"vLLM is not installed in this environment (bash scripts/setup_vllm.sh makes one): drawing with the "
        f"{engine.name} engine in its place"
    )
    labels = torch.tensor(args.class_labels, device=device)
    noise = image_generators(range(args.seed, args.seed + len(labels)), device)
    started = time.perf_counter()
    with code_bar(args) as bar:
        codes = generate(
            engine,
            labels,
            engine.block_size,
            cfg_scale=args.cfg_scale,
            top_k=args.top_k,
            top_p=args.top_p,
            temperature=args.temperature,
            generators=noise,
            on_token=lambda _: bar.update(len(labels)),
        )
    if device.type == "cuda":
        torch.cuda.synchronize()
    return codes, time.perf_counter() - started


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot be drawn before anything is loaded; ValueError says what."""
    if args.gpt_type != "c2i":
        raise ValueError(f"this command draws classes; --gpt-type {args.gpt_type} is not for it")
    check_sampling(args.cfg_scale, args.top_k, args.top_p, args.temperature)
    wrong = [label for label in args.class_labels if not 0 <= label < args.num_classes]
    if wrong:
        raise ValueError(
            f"class {wrong[0]} is out of range: the model has classes 0 .. {args.num_classes - 1} (--num-classes); "
            f"give others with --class-labels"
        )


def main(args: argparse.Namespace) -> None:
    """Draw, decode, and write the grid."""
    check(args)
    allow_tf32()
    with process_group(args.device) as device:
        draw(args, device)


@torch.no_grad()
def draw(args: argparse.Namespace, device: torch.device) -> None:
    """Codes, pictures, the grid."""
    tokenizer = load_tokenizer(args, device)
    size = tokenizer.config.codebook_size
    codes, seconds = vllm_codes(args, size) if vllm_installed() else own_codes(args, size, device)
    print(f"gpt sampling takes about {seconds:.2f} seconds.")
    started = time.perf_counter()
    images = decode_codes(tokenizer, codes.to(device)).cpu()
    print(f"decoder takes about {time.perf_counter() - started:.2f} seconds.")
    output = f"sample_{args.gpt_type}_vllm.png"
    settings = {name: value for name, value in vars(args).items() if value is not None}
    save_png(make_grid_image(images, 4), output, {"settings": settings, "class_ids": args.class_labels})
    print(f"image is saved to {output}")


if __name__ == "__main__":
    run(lambda: main(parser().parse_args()))
