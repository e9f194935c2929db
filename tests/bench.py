"""The speed table: ours against the plain version of the same computation, in alternating rounds.

    python tests/bench.py [--device cpu|cuda] [--rows NAME ...] [--compile]     # prints Markdown

plain   what a first version does: attention as a written-out softmax, all blocks in full, the
        projector on all tokens, one pass a k, statistics by torch.var; float32 on a CPU, fp16
        autocast on a GPU
ours    what the scripts do, in bf16 autocast

Each row first checks that both compute the same. A step is forward, backward, AdamW; images/s are
medians over rounds, ratios the median (smallest to largest) of the rounds' ratios, memory the peak
of this process (on a GPU: of what is allocated), share the arithmetic of our step per second over
that of a large matrix product in bf16, measured in the same run.
"""

import argparse
import copy
import functools
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets
from torchvision.transforms import InterpolationMode, v2

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import attndistill
import common
import dearkd
import eval_knn
import vitkd

DATA = Path(os.environ.get("VIT_DISTILL_DATA", ROOT.parent / "shared" / "data"))

# ------------------------------------------------------------------ measuring


def precision(amp, device):
    """autocast(), with attention as the scripts have it on this device."""
    return common.set_precision(argparse.Namespace(amp=amp), device)[0]


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def alternate(ways, device, rounds, repeat=2):
    """({way: seconds a call, one number a round}, {way: peak GiB}) of {way: function}; a first
    round warms up."""
    seconds, peak = {way: [] for way in ways}, {}
    for turn in range(rounds + 1):
        for way, call in ways.items():
            call()
            wait(device)
            forget_peak(device)
            began = time.perf_counter()
            for _ in range(repeat):
                call()
            wait(device)
            if turn:
                seconds[way].append((time.perf_counter() - began) / repeat)
                peak[way] = peak_gib(device)
    return seconds, peak


def forget_peak(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM


def peak_gib(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", status).group(1)) / 2**20
    return math.nan


@functools.cache
def matmul_rate(device):
    """Operations per second of a large matrix product in bf16: the best of ten."""
    n = 16384 if device.type == "cuda" else 4096
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds, _ = alternate({"": lambda: a @ b}, device, rounds=10, repeat=1)
    return 2 * n**3 / min(seconds[""])


def operations(call):
    """Of all matrix products and convolutions of a call; a multiplication and an addition are 2."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


HEAD = ("| {} | images/s plain | ours{} | ours / plain | GiB plain | ours | share |\n"
        "|---|---|---|---|---|---|---|{}")


def row(name, items, ways, args, repeat=2):
    """Measure {"plain": f, "ours": f, ...} and print their row; items: images of a call."""
    seconds, peak = alternate(ways, args.device, args.rounds, repeat)
    medians = {way: statistics.median(s) for way, s in seconds.items()}
    share = operations(ways["ours"]) / min(m for way, m in medians.items() if way != "plain")
    print(f"| {name} | " + " | ".join(f"{items / m:.3g}" for m in medians.values())
          + f" | {ratios(seconds)} | {peak['plain']:.2f} | {peak['ours']:.2f} | "
          f"{100 * share / matmul_rate(args.device):.0f} % |", flush=True)


def ratios(seconds):
    best = "compiled" if "compiled" in seconds else "ours"
    found = [plain / ours for plain, ours in zip(seconds["plain"], seconds[best])]
    return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"


# ------------------------------------------------------------------ training steps


def written_out(self, x):
    """The forward() of Attention and ConvAttention with the softmax by hand."""
    B, N, D = x.shape
    qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, D // self.num_heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)                                    # (B, H, N, D/H) each
    logits = q @ k.transpose(-2, -1) * q.shape[-1]**-0.5                    # (B, H, N, N)
    if isinstance(self, dearkd.ConvAttention):
        logits = logits + self.position_term()
    return self.proj((logits.softmax(-1) @ v).transpose(1, 2).reshape(B, N, D))


def all_tokens(self, images):
    """ViT.class_token_and_attention() with the last block in full: (tokens (B, 1+N, D) after the
    final norm, the class token's attention (B, H, 1+N))."""
    x = self.embed(images)
    for block in self.blocks[:-1]:
        x = block(x)
    last, y = self.blocks[-1], self.blocks[-1].norm1(x)
    B, N, D = y.shape
    q, k, _ = last.attn.qkv(y).reshape(B, N, 3, last.attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    attn = (q @ k.transpose(-2, -1) * q.shape[-1]**-0.5).softmax(-1)        # (B, H, 1+N, 1+N)
    return self.norm(last(x)), attn[:, :, 0]


def pair(method, student, teacher, image_size, patch_size):
    """(Objective, teacher, the teacher's method that it needs) with random weights."""
    sizes = vitkd.SIZES | attndistill.SIZES
    dims = [sizes[name] for name in (student, teacher) if name in sizes]
    if method == "attndistill":
        s, t = (attndistill.ViT(image_size, patch_size, *size, 0) for size in dims)
        args = argparse.Namespace(lambda_a=0.1, temperature=10.0)
        model = attndistill.Objective(s, attndistill.projector(dims[0][0], dims[1][0]), args)
        return model, t.requires_grad_(False).eval(), "class_token_and_attention"
    if method == "vitkd":
        s, t = (vitkd.ViT(image_size, patch_size, *size) for size in dims)
        args = argparse.Namespace(label_smoothing=0.1, no_nkd=False, gamma=1.0, tau=1.0)
        model = vitkd.Objective(s, vitkd.ViTKDLoss(dims[0][0], dims[1][0], mask_ratio=1.0), args)
        return model, t.requires_grad_(False).eval(), "features"
    s = dearkd.ViT(image_size, patch_size, *dims[0], mhca_blocks=4, pos_dropout=0.0)
    t = dearkd.Teacher(dearkd.make_cnn(teacher, 1000), image_size).requires_grad_(False).eval()
    hints = dearkd.parse_hints("auto", dims[0][1], t.stages, image_size // patch_size)
    aligners = torch.nn.ModuleList(dearkd.Aligner(dims[0][0], t.stages[n - 1][1]) for _, n in hints)
    args = argparse.Namespace(label_smoothing=0.1, alpha=0.5, beta=10.0)
    return dearkd.Objective(s, aligners, hints, args), t, "features"


def steps(method, student, teacher, image_size, patch_size, batch_size, device):
    """{"plain": f, "ours": f, "compiled": f}: each a training step that returns its loss terms."""
    torch.manual_seed(0)
    model, guide, method_name = pair(method, student, teacher, image_size, patch_size)
    model.to(device)
    guide.to(device)
    if method == "dearkd":
        guide.to(memory_format=torch.channels_last)
    images = torch.randn(batch_size, 3, image_size, image_size, device=device)
    target = torch.rand(batch_size, 1000, device=device).softmax(1)
    plain_model, plain_guide = copy.deepcopy(model), copy.deepcopy(guide)
    plain_guide.to(memory_format=torch.contiguous_format)
    for module in (*plain_model.modules(), *plain_guide.modules()):
        if type(module).__name__ in ("Attention", "ConvAttention"):
            module.forward = types.MethodType(written_out, module)
        if method == "attndistill" and isinstance(module, attndistill.ViT):
            module.class_token_and_attention = types.MethodType(all_tokens, module)

    def make(model, guide, amp, fused):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused)
        scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")

        def step():
            with precision(amp, device)():
                with torch.no_grad():
                    guidance = getattr(guide, method_name)(images)
                losses = (model(images, *guidance) if method == "attndistill" else
                          model(images, target, guidance))
            scaler.scale(sum(losses.values())).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            return losses

        return step

    compiled_model, compiled_guide = copy.deepcopy(model), copy.deepcopy(guide)
    compiled_model.compile(dynamic=False)
    setattr(compiled_guide, method_name, torch.compile(getattr(compiled_guide, method_name),
                                                       dynamic=False))
    for a, b in zip(make(copy.deepcopy(plain_model), plain_guide, "off", False)().values(),
                    make(copy.deepcopy(model), guide, "off", True)().values(), strict=True):
        assert abs(a - b) < 1e-3 * abs(a), (method, a, b)  # the same computation
    return {"plain": make(plain_model, plain_guide, "fp16" if device.type == "cuda" else "off",
                          False),
            "ours": make(model, guide, "bf16", True),
            "compiled": make(compiled_model, compiled_guide, "bf16", True)}


STEPS = {  # row: method, student, teacher, image size, patch size, batch on a CPU
    "attndistill": ("attndistill", "vit_s", "vit_b", 224, 16, 16),
    "vitkd": ("vitkd", "deit_t", "deit_s", 224, 16, 16),
    "dearkd": ("dearkd", "deit_t", "resnet50", 224, 16, 16),
    "attndistill32": ("attndistill", "micro", "vit_t", 32, 4, 128),
    "vitkd32": ("vitkd", "micro", "deit_t", 32, 4, 128),
    "dearkd32": ("dearkd", "micro", "cifar_resnet56", 32, 4, 128)}


def bench_steps(args):
    names = [name for name in STEPS if name in args.rows]
    if names:
        print(HEAD.format("step", *((" | compiled", "---|") if args.compile else ("", ""))))
    for name in names:
        method, student, teacher, size, patch, batch = STEPS[name]
        batch = args.batch_size or (batch if args.device.type == "cpu" else 256)
        ways = steps(method, student, teacher, size, patch, batch, args.device)
        if not args.compile:
            del ways["compiled"]
        row(f"{method}: {student} <- {teacher}, {size} px, {(size // patch)**2} tokens, batch "
            f"{batch}", batch, ways, args)


# ------------------------------------------------------------------ k-NN, inversion, images


def textbook_knn(train, labels, test, k, num_classes, temperature=0.07, chunks=100):
    """(N_test, num_classes) classes, best first: what a first version of a weighted vote does."""
    train, best = train.T.contiguous(), []
    for part in test.chunk(chunks):
        similarity, neighbour = (part @ train).topk(k)
        one_hot = torch.zeros(len(part), k, num_classes, device=part.device)  # (B, k, C)
        one_hot.scatter_(2, labels[neighbour][..., None], 1)
        score = (one_hot * (similarity / temperature).exp()[..., None]).sum(1)
        best.append(score.sort(dim=1, descending=True).indices)
    return torch.cat(best)


def clusters(N, N_test, D, C, device):
    """Normalised (training features, labels, test features) around C centres."""
    torch.manual_seed(0)
    centres, labels = torch.randn(C, D), torch.randint(0, C, (N,))
    train = F.normalize(centres[labels] + 3 * torch.randn(N, D))
    test = F.normalize(centres[torch.randint(0, C, (N_test,))] + 3 * torch.randn(N_test, D))
    return train.to(device), labels.to(device), test.to(device)


def bench_knn(args, N=50_000, N_test=10_000, D=384, C=1000):
    train, labels, test = clusters(N, N_test, D, C, args.device)
    found = {}

    def plain():  # a pass for each k
        found["plain"] = {k: textbook_knn(train, labels, test, k, C) for k in eval_knn.KS}

    def ours():
        found["ours"] = eval_knn.knn_predict(train, labels, test, num_classes=C)

    print(HEAD.format("k-NN votes", "", ""))
    row(f"{N} x {N_test} x {D}, {C} classes, k = 10, 20, 100, 200", N_test,
        {"plain": plain, "ours": ours}, args, repeat=1)
    some = test[:500].double()                                              # float64, brute force
    similarity, neighbour = (some @ train.double().T).sort(1, descending=True)
    for k in eval_knn.KS:
        score = torch.zeros(len(some), C, dtype=torch.float64, device=args.device)
        score.scatter_add_(1, labels[neighbour[:, :k]], (similarity[:, :k] / 0.07).exp())
        assert (score.argmax(1) == found["ours"][k][:500, 0]).all()
        agree = (found["plain"][k][:, 0] == found["ours"][k][:, 0]).float().mean()
        assert agree > 0.999, (k, agree)


def bench_inversion(args, batch_size=256, steps=2):
    device = args.device
    torch.manual_seed(0)
    teacher = dearkd.Teacher(dearkd.make_cnn("cifar_resnet56", 10), 32)  # parameters ask for gradients
    ours = copy.deepcopy(teacher).requires_grad_(False)
    teacher.to(device).eval()
    ours.to(device, memory_format=torch.channels_last).eval()
    labels, found = torch.arange(batch_size, device=device) % 10, {}
    settings = {**dearkd.synthesis_settings(32), "steps": steps, "divergence": 0.0}
    black = -torch.tensor(common.MEAN)[:, None, None] / torch.tensor(common.STD)[:, None, None]
    black, white = black.to(device), (black + 1 / torch.tensor(common.STD)[:, None, None]).to(device)

    def plain(amp="fp16" if device.type == "cuda" else "off"):
        generator, terms = torch.Generator().manual_seed(0), []
        images = torch.randn(batch_size, 3, 32, 32, generator=generator).to(device)
        images = images.clamp(black, white).requires_grad_()
        optimizer = torch.optim.Adam([images], settings["image_lr"], settings["betas"])

        def hook(layer, inputs, output):
            x = inputs[0].float()
            rows = x.transpose(0, 1).reshape(x.shape[1], -1)
            terms.append((x.mean((0, 2, 3)) - layer.running_mean).norm()
                         + (rows.var(1, correction=0) - layer.running_var).norm())

        hooks = [layer.register_forward_hook(hook) for layer in dearkd.batch_norms(teacher)]
        for step in range(steps):
            terms.clear()
            optimizer.param_groups[0]["lr"] = settings["image_lr"] * (
                1 + math.cos(math.pi * step / steps)) / 2
            x = images.roll(torch.randint(-2, 3, (2,), generator=generator).tolist(), (2, 3))
            x = x.flip(3) if torch.rand((), generator=generator) < 0.5 else x
            with precision(amp, device)():
                logits = teacher(x).float()
            loss = (F.cross_entropy(logits, labels) + settings["tv"] * dearkd.total_variation(x)
                    + settings["bn"] * (sum(terms) + 9 * terms[0]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            images.data.clamp_(black, white)
        for hook in hooks:
            hook.remove()
        teacher.zero_grad()
        found["plain"] = loss.item()

    def fast(amp="bf16"):
        dearkd.synthesize(ours, labels, 32, autocast=precision(amp, device),
                          report=lambda _, losses, images: found.update(
                              ours=sum(losses.values()).item()), **settings)

    plain("off")
    fast("off")  # the same computation
    assert abs(found["ours"] - found["plain"]) < 1e-3 * found["plain"], found
    print(HEAD.format("DeepInversion step", "", ""))
    row(f"cifar_resnet56, 32 px, batch {batch_size}", steps * batch_size,
        {"plain": plain, "ours": fast}, args, repeat=1)


def bench_input(args):
    """Training images on one core, in this process: read, decoded, augmented, batches of 16."""
    threads, bicubic = torch.get_num_threads(), InterpolationMode.BICUBIC
    torch.set_num_threads(1)
    print("| photos, one core | images/s plain | ours | ours / plain |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "zipfile", "-e", DATA / "imagenet_photos.zip",
                        folder], check=True)
        for name, magnitude, erasing in (("RandomResizedCrop 224, flip", 0, 0),
                                         ("... RandAugment", 9, 0),
                                         ("... RandAugment, RandomErasing", 9, 0.25)):
            augment = [v2.RandAugment(2, 9, num_magnitude_bins=11, fill=[124, 116, 104],
                                      interpolation=bicubic)] if magnitude else []
            erase = [v2.RandomErasing(erasing, value="random")] if erasing else []
            plain = datasets.ImageFolder(folder, v2.Compose([
                v2.RandomResizedCrop(224, interpolation=bicubic), v2.RandomHorizontalFlip(),
                *augment, v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(common.MEAN, common.STD), *erase]))
            ours = common.Photos(common.ClassFolders(folder), common.train_transform(
                224, rand_augment=magnitude, random_erasing=erasing))
            seed = iter(range(10**9))

            def read(dataset, ready):  # both with the random numbers of image and epoch
                epoch = next(seed) // 2
                for batch in torch.arange(len(dataset)).split(16):
                    images = []
                    for i in batch.tolist():
                        torch.manual_seed(common.mix_seed(0, epoch * len(dataset) + i))
                        images.append(dataset[epoch * len(dataset) + i if dataset is ours else i])
                    ready(torch.utils.data.default_collate(images)[0])

            seconds, _ = alternate(
                {"plain": lambda: read(plain, lambda images: images),
                 "ours": lambda: read(ours, lambda images: common.normalize(images, "cpu"))},
                torch.device("cpu"), args.rounds, repeat=1)
            print(f"| {name} | " + " | ".join(
                f"{len(ours) / statistics.median(s):.0f}" for s in seconds.values())
                + f" | {ratios(seconds)} |", flush=True)
    torch.set_num_threads(threads)
