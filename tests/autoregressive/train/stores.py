"""Small stores of random codes, as extraction writes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dataset.codes import CodeFolder, caption_codes_path, write_array, write_codes

TOKENS, VOCABULARY, CLASSES, WIDTH, POSITIONS = 16, 64, 3, 6, 5
C2I = ["--gpt-model", "GPT-XS", "--num-classes", "3", "--image-size", "16", "--downsample-size", "4",
       "--vocab-size", "64"]  # fmt: skip
T2I = [*C2I, "--gpt-type", "t2i", "--cls-token-num", str(POSITIONS), "--caption-dim", str(WIDTH)]


def class_codes(folder: Path, count: int = 7, seed: int = 0) -> Path:
    """Two views of 4 x 4 codes of 64, in files."""
    generator = np.random.default_rng(seed)
    codes = CodeFolder.named(folder, "imagenet", 16)
    for i in range(count):
        write_codes(codes, i, generator.integers(0, VOCABULARY, (2, TOKENS)), i % CLASSES)
    return folder


def caption_codes(folder: Path, count: int = 5) -> tuple[Path, Path]:
    """4 x 4 codes of 64 and features of 1, 2, ... tokens of one list; the last record has no features."""
    generator = np.random.default_rng(0)
    for i in range(count):
        write_array(caption_codes_path(folder / "codes", "a", i), generator.integers(0, VOCABULARY, (1, TOKENS)))
    (folder / "features/a").mkdir(parents=True)
    for i in range(count - 1):
        np.save(folder / f"features/a/{i}.npy", generator.standard_normal((1, i + 1, WIDTH)).astype(np.float32))
    return folder / "codes", folder / "features"
