"""What makes a data worker faster: variants of reading a training photo, in alternating rounds.

    python tests/evidence/photos.py [--rand-augment 9] [--rounds 7]     # prints a table in Markdown

One worker reads 96 photos of ImageNet four times in batches of 32. Each variant changes one thing
of common.train_transform. The ratio is the median over rounds against "as it is".
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections import deque
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets, io
from torchvision.transforms import InterpolationMode, v2

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 2)]

import bench

import common

parser = argparse.ArgumentParser()
parser.add_argument("--rand-augment", type=int, default=0)
parser.add_argument("--rounds", type=int, default=7)
args = parser.parse_args()
shutil.unpack_archive(bench.DATA / "imagenet_photos.zip", folder := tempfile.mkdtemp())


def steps(interpolation=InterpolationMode.BICUBIC, antialias=True, inplace=False):
    now = common.train_transform(224, rand_augment=args.rand_augment).transforms
    crop = v2.RandomResizedCrop(224, interpolation=interpolation, antialias=antialias)
    return [now[0], crop, *now[2:-2], v2.Normalize(common.MEAN, common.STD, inplace)]


def draft(path):
    """Let the JPEG decoder halve each side while it stays above 224 pixels."""
    with Image.open(path) as image:
        image.draft("RGB", (224, 224))
        return image.convert("RGB")


def tv_decode(path):
    return io.decode_image(path, io.ImageReadMode.RGB)


def set_threads(count, _):
    torch.set_num_threads(count)


def dataset(transforms, loader=datasets.folder.default_loader):
    base = datasets.ImageFolder(folder, loader=loader)
    return common.Images(base, range(len(base)), v2.Compose(transforms))


def make_loader(images, threads=1):
    return DataLoader(images, 32, sampler=[*range(len(images))] * 4, num_workers=1,
                      persistent_workers=True, worker_init_fn=partial(set_threads, threads))


now = steps()
plain = datasets.ImageFolder(folder, v2.Compose(now))  # torchvision's own data set: no seeding
ways = {
    "as it is": make_loader(dataset(now)),
    "without a seed for each image": make_loader(plain),
    "crop and flip on the PIL image": make_loader(dataset([*now[1:3], now[0], *now[3:]])),
    "decode_image instead of PIL": make_loader(dataset(now[1:], tv_decode)),
    "JPEG draft": make_loader(dataset(now, draft)),
    "bilinear crop": make_loader(dataset(steps(InterpolationMode.BILINEAR))),
    "crop without antialiasing": make_loader(dataset(steps(antialias=False))),
    "uint8 batches": make_loader(dataset(now[:-2])),
    "Normalize in place": make_loader(dataset(steps(inplace=True))),
    "two threads": make_loader(dataset(now), threads=2)}
seconds, _ = bench.alternate({name: partial(deque, loader, 0) for name, loader in ways.items()},
                             args.rounds)
print(f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, RandAugment {args.rand_augment}, "
      f"{args.rounds} rounds\n\n| variant | photos/s | against as it is |\n|---|---|---|")
for name, found in seconds.items():
    ratio = [a / b for a, b in zip(seconds["as it is"], found)]
    print(f"| {name} | {4 * len(plain) / statistics.median(found):.0f} | "
          f"{statistics.median(ratio):.2f} ({min(ratio):.2f} to {max(ratio):.2f}) |")
