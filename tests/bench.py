"""The speed table: ours against the plain version of the same computation, in alternating rounds.

    python tests/bench.py          # prints Markdown; evidence/bench_cpu.md is what it gave

ViTKD steps (student alone; student, teacher, ViTKD and NKD) in three precisions:
    plain    float32, attention by torch's fused CPU kernel
    fused    bf16 autocast, attention by torch's fused CPU kernel
    ours     bf16 autocast, attention as matrix products (common.set_precision)
"""

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import vitkd

ROWS = [  # student, teacher, image size, patch size, batch size
    ("micro", None, 32, 8, 128), ("micro", None, 32, 4, 128), ("micro", "deit_t", 32, 4, 128),
    ("deit_t", None, 224, 16, 16), ("deit_t", "deit_s", 224, 16, 16)]
WAYS = {"plain": ("off", True), "fused": ("bf16", True), "ours": ("bf16", False)}
ROUNDS = 5


def build(size, image_size, patch_size):
    dim, depth, num_heads = vitkd.SIZES[size]
    return vitkd.ViT(image_size, patch_size, dim, depth, num_heads)


def make_step(student, teacher, image_size, patch_size, batch_size):
    """A function that does one step, forward and backward, in the autocast context it is given."""
    torch.manual_seed(0)
    args = argparse.Namespace(label_smoothing=0.1, no_nkd=False, gamma=1.0, tau=1.0)
    dims = [vitkd.SIZES[name][0] for name in (student, teacher) if name]
    model = vitkd.Objective(build(student, image_size, patch_size),
                            vitkd.ViTKDLoss(*dims) if teacher else None, args)
    guide = build(teacher, image_size, patch_size).requires_grad_(False).eval() if teacher else None
    images = torch.randn(batch_size, 3, image_size, image_size)
    target = torch.rand(batch_size, 1000).softmax(1)

    def step(autocast):
        with autocast():
            with torch.no_grad():
                features = guide.features(images) if guide else None
            losses = model(images, target, features)
        sum(losses.values()).backward()
        model.zero_grad()

    return step


def measure(row):
    """{way: seconds a step, one number a round}"""
    step, seconds = make_step(*row), {way: [] for way in WAYS}
    for turn in range(ROUNDS + 1):
        for way, (amp, fused) in WAYS.items():
            autocast, _ = common.set_precision(argparse.Namespace(amp=amp), torch.device("cpu"))
            torch.backends.cuda.enable_flash_sdp(fused)
            step(autocast)
            began = time.perf_counter()
            step(autocast)
            step(autocast)
            if turn:  # the first round warms up
                seconds[way].append((time.perf_counter() - began) / 2)
    return seconds


def main():
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}, {time.strftime('%Y-%m-%d')}; {ROUNDS} alternating rounds, median "
          f"(ratios: smallest to largest of a round)\n")
    print("| step | images/s plain | fused | ours | ours / plain | ours / fused |\n"
          "|---|---|---|---|---|---|")
    for row in ROWS:
        student, teacher, image_size, patch_size, batch_size = row
        seconds = measure(row)
        cells = [f"{batch_size / statistics.median(s):.0f}" for s in seconds.values()]
        for way in ("plain", "fused"):
            ratios = [a / b for a, b in zip(seconds[way], seconds["ours"])]
            cells.append(f"{statistics.median(ratios):.2f} "
                         f"({min(ratios):.2f} to {max(ratios):.2f})")
        name = f"{student} <- {teacher}" if teacher else f"{student} alone"
        print(f"| {name}, {image_size} px, patch {patch_size}, batch {batch_size} | "
              + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
