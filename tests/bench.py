"""Speed and memory of the scripts against a plain version of the same computation.

    python tests/bench.py [ROW ...] [--rounds 5] [--compile] [--amp off]     # prints a table

plain: attention with a written-out softmax; all tokens in the last block and the projector; a pass
       for each k of k-NN; CNNs in torch's layout; photos cropped by PIL; float32 (GPU: fp16).
ours:  what the scripts do, in their default precision (bf16 where the device multiplies it).

Both run in alternating rounds in one process. A step is a forward pass of teacher and student, a
backward pass and AdamW. Speeds and ratio are medians over rounds (ratio: smallest to largest). GiB
is the peak of a pass, models of both ways included. Share: our arithmetic per second over that of
a large matrix product in the same precision.
"""

import argparse
import copy
import ctypes
import gc
import math
import shutil
import statistics
import tempfile
import time
import types
from collections import deque
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from helpers import DATA
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

import attndistill
import common
import dearkd
import eval_knn
import vitkd

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {"plain": torch.half if DEVICE.type == "cuda" else torch.float, "check": torch.float}


def autocast(way):
    return torch.autocast(DEVICE.type, DTYPES[way], enabled=DTYPES[way] != torch.float32)


def alternate(ways, rounds):
    """Return ({way: [seconds of each round]}, {way: peak GiB}) of {way: function}."""
    seconds, peak = {way: [] for way in ways}, {}
    for way, call in ways.items():  # warms up
        gc.collect()  # models of the row before
        ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak of the process
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        call()
        high = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
        peak[way] = (torch.cuda.max_memory_allocated() or 1024 * int(high)) / 2**30
    for way, call in list(ways.items()) * rounds:
        getattr(torch, DEVICE.type).synchronize()
        started = time.perf_counter()
        call()
        getattr(torch, DEVICE.type).synchronize()
        seconds[way].append(time.perf_counter() - started)
    return seconds, peak


# ------------------------------------------------------------------ training steps


def make_models(method, student, teacher, image_size, patch_size, **own):
    """Return (Distillation, frozen teacher) with random weights. own: for a ViT teacher."""
    module = {"attndistill": attndistill, "vitkd": vitkd, "dearkd": dearkd}[method]
    mhca = {"mhca_blocks": 4} if method == "dearkd" else {}
    vit = module.ViT(image_size, patch_size, **module.SIZES[student], **mhca)
    dim = vit.norm.weight.shape[0]
    if method == "dearkd":
        guide = dearkd.Teacher(dearkd.make_cnn(teacher, 1000))
        maps, _ = guide.features(torch.zeros(1, 3, image_size, image_size))
        aligners = nn.ModuleList(dearkd.Aligner(dim, maps[stage].shape[1]) for stage in (0, 1))
        return dearkd.Distillation(vit, aligners, [(1, 1), (3, 2)]), guide
    guide = module.ViT(image_size, patch_size, **module.SIZES[teacher], **own)
    guide.requires_grad_(False).eval()
    teacher_dim = guide.norm.weight.shape[0]
    if method == "vitkd":
        return vitkd.Distillation(vit, vitkd.ViTKDLoss(dim, teacher_dim)), guide
    return attndistill.Distillation(vit, attndistill.projector(dim, teacher_dim)), guide


def make_step(model, teacher, batch, way):
    """Return a function that makes a training step and returns the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=way == "ours")
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=DTYPES[way] == torch.float16)
    look = getattr(teacher, "class_token_and_attention", None) or teacher.features

    def step():
        with autocast(way):
            with torch.no_grad():
                teacher_features = look(batch[0])
            loss = sum(model(*batch, teacher_features).values())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss

    return step


def written_out(self, x, rope=None):
    """Attention.forward and ConvAttention.forward with the softmax by hand."""
    q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
    logits = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])                 # (B, H, N, N)
    if isinstance(self, dearkd.ConvAttention):
        logits = logits + self.position_term()
    self.attn = logits.softmax(-1)
    return self.proj((self.attn @ v).transpose(1, 2).flatten(2))


def all_tokens(self, images):
    """ViT.class_token_and_attention with the last block in full; a student returns all tokens."""
    x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
    x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
    for block in self.blocks:
        x = block(x, nn.Identity())
    x = self.norm(x)                                                        # (B, 1+N, D)
    return x if self.training else x[:, 0], self.blocks[-1].attn.attn[:, :, 0]


class FirstToken(nn.Sequential):
    def forward(self, tokens):
        return super().forward(tokens)[:, 0]


def bench_step(method, student, teacher, image_size, patch_size, batch_size, compile=False):
    batch_size = 256 if DEVICE.type == "cuda" else batch_size
    model, guide = make_models(method, student, teacher, image_size, patch_size)
    for part in model.to(DEVICE).modules():  # nothing random, so that both ways compute the same
        part.mask_ratio, part.pos_dropout = 1.0, 0.0
    guide.to(DEVICE)
    plain = copy.deepcopy((model, guide))
    for part in [*plain[0].modules(), *plain[1].modules()]:
        if type(part).__name__ in ("Attention", "ConvAttention"):
            part.forward = types.MethodType(written_out, part)
        if isinstance(part, attndistill.ViT):
            part.class_token_and_attention = types.MethodType(all_tokens, part)
    if method == "attndistill":
        plain[0].project = FirstToken(*plain[0].project)
    batch = [torch.randn(batch_size, 3, image_size, image_size, device=DEVICE)]
    batch += [torch.arange(batch_size, device=DEVICE)] * (method != "attndistill")  # labels
    losses = [make_step(*copy.deepcopy(pair), batch, "check")() for pair in (plain, (model, guide))]
    torch.testing.assert_close(*losses, rtol=1e-3, atol=0)
    if compile:
        model.compile(dynamic=False)
        name = "class_token_and_attention" if method == "attndistill" else "features"
        setattr(guide, name, torch.compile(getattr(guide, name), dynamic=False))
    name = f"{method}: {student} <- {teacher}, {image_size} px, batch {batch_size}"
    return (name + ", compiled" * compile, batch_size, make_step(*plain, batch, "plain"),
            make_step(model, guide, batch, "ours"))


# ------------------------------------------------------------------ k-NN, DeepInversion, photos


def bench_knn(N=50_000, N_test=2000, D=384, C=1000):
    train, test = (F.normalize(torch.randn(n, D, device=DEVICE), dim=1) for n in (N, N_test))
    labels = torch.randint(0, C, (N,), device=DEVICE)

    def plain():
        for k in eval_knn.KS:
            for part in test.split(100):
                similarity, neighbour = (part @ train.T).topk(k)
                votes = F.one_hot(labels[neighbour], C) * (similarity / 0.07).exp()[..., None]
                votes.sum(1).topk(5)

    return (f"k-NN votes, {N} x {N_test} x {D}, {C} classes", N_test, plain,
            partial(eval_knn.knn_predict, train, labels, test, num_classes=C))


def bench_inversion(batch_size=128, steps=2, compile=False):
    teacher = dearkd.Teacher(dearkd.make_cnn("cifar_resnet56", 10)).to(DEVICE)
    plain = copy.deepcopy(teacher).to(memory_format=torch.contiguous_format)
    observer = dearkd.Observer(teacher)
    if compile:
        observer.compile(dynamic=False)
    labels = torch.arange(batch_size, device=DEVICE) % 10
    name = f"DeepInversion, cifar_resnet56, 32 px, batch {batch_size}"
    return (name + ", compiled" * compile, steps * batch_size, *(
        partial(dearkd.synthesize, cnn, labels, 32, autocast=autocast(way),
                **{**dearkd.CIFAR, "steps": steps})
        for cnn, way in ((plain, "plain"), (observer, "ours"))))


def bench_photos(magnitude, epochs=4):
    """Training images from 96 photos of 500 x 375 pixels or so, read by one worker."""
    folder = tempfile.mkdtemp()
    shutil.unpack_archive(DATA / "imagenet_photos.zip", folder)
    photos = common.ImageFolder(folder, common.class_folders(folder))
    ours = common.train_transform(224, rand_augment=magnitude)
    to_tensor, crop, flip, *rest = ours.transforms
    loaders = [DataLoader(common.Images(photos, range(len(photos)), transform), 32, num_workers=1,
                          sampler=[*range(len(photos))] * epochs, persistent_workers=True)
               for transform in (v2.Compose([crop, flip, to_tensor, *rest]), ours)]
    return (f"photos, one worker, RandAugment {magnitude}", epochs * len(photos),
            *(partial(deque, loader, 0) for loader in loaders))


ROWS = {
    "attndistill": partial(bench_step, "attndistill", "vit_s", "vit_b", 224, 16, 16),
    "vitkd": partial(bench_step, "vitkd", "deit_t", "deit_s", 224, 16, 16),
    "dearkd": partial(bench_step, "dearkd", "deit_t", "resnet50", 224, 16, 16),
    "attndistill32": partial(bench_step, "attndistill", "micro", "vit_t", 32, 4, 128),
    "vitkd32": partial(bench_step, "vitkd", "micro", "deit_t", 32, 4, 128),
    "dearkd32": partial(bench_step, "dearkd", "micro", "cifar_resnet56", 32, 4, 128),
    "inversion": bench_inversion, "knn": bench_knn,
    "photos": partial(bench_photos, 0), "photos_augmented": partial(bench_photos, 9)}
NOT_COMPILED = ("knn", "photos", "photos_augmented")


def matrix_rate(dtype):
    """Return the FLOP/s of a large matrix product."""
    n = 16384 if DEVICE.type == "cuda" else 4096
    a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
    seconds, _ = alternate({"product": lambda: a @ b}, 10)
    return 2 * n**3 / min(seconds["product"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("rows", nargs="*", help=f"of {', '.join(ROWS)} (all)")
    parser.add_argument("--rounds", type=int, default=5, help="that are timed (%(default)s)")
    parser.add_argument("--compile", action="store_true", help="our steps")
    parser.add_argument("--amp", choices=("bf16", "fp16", "off"), help="our precision")
    args = parser.parse_args()
    args.amp = args.amp or common.best_precision(DEVICE)
    common.describe_run(DEVICE, args.amp)
    common.choose_attention_kernel(DEVICE, args.amp)
    torch.backends.cudnn.benchmark = True  # as common.init_processes does
    DTYPES["ours"] = {"bf16": torch.bfloat16, "fp16": torch.half, "off": torch.float}[args.amp]
    rate = matrix_rate(DTYPES["ours"])
    print(f"{time.strftime('%Y-%m-%d')}, {torch.get_num_threads()} threads, {args.rounds} rounds; "
          f"a matrix product, amp {args.amp}, makes {rate / 1e9:.0f} GFLOP/s\n\n"
          "| row | images/s plain | ours | ours / plain | GiB plain | ours | share |\n"
          "|---|---|---|---|---|---|---|")
    for row in args.rows or ROWS:
        torch.manual_seed(0)
        own = {"compile": True} if args.compile and row not in NOT_COMPILED else {}
        name, images, *ways = ROWS[row](**own)
        seconds, peak = alternate(dict(zip(("plain", "ours"), ways)), args.rounds)
        with FlopCounterMode(display=False) as counter:  # last: data workers would inherit it
            ways[1]()
        plain, ours = (statistics.median(s) for s in seconds.values())
        ratio = [a / b for a, b in zip(*seconds.values())]
        print(f"| {name} | {images / plain:.3g} | {images / ours:.3g} | "
              f"{statistics.median(ratio):.2f} ({min(ratio):.2f} to {max(ratio):.2f}) | "
              f"{peak['plain']:.2f} | {peak['ours']:.2f} | "
              f"{counter.get_total_flops() / rate / ours:.0%} |", flush=True)


if __name__ == "__main__":
    main()
