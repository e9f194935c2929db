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
from torch.utils.data import Dataset
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


HEAD = ("| {} | images/s plain | ours{} | {} / plain | GiB plain | ours | share |\n"
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
    """ViT.class_token_and_attention() with the last block in full; a student gives all tokens
    (B, 1+N, D), for the projector."""
    x = self.embed(images)
    for block in self.blocks[:-1]:
        x = block(x)
    last, y = self.blocks[-1], self.blocks[-1].norm1(x)
    B, N, _ = y.shape
    q, k, _ = last.attn.qkv(y).reshape(B, N, 3, last.attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    attn = (q @ k.transpose(-2, -1) * q.shape[-1]**-0.5).softmax(-1)        # (B, H, 1+N, 1+N)
    tokens = self.norm(last(x))                                             # (B, 1+N, D)
    return tokens if self.training else tokens[:, 0], attn[:, :, 0]


def of_all_tokens(self, tokens):
    """The projector's forward() on all tokens, of which the loss reads the first."""
    return torch.nn.Sequential.forward(self, tokens)[:, 0]


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
    def build():
        torch.manual_seed(0)
        model, guide, name = pair(method, student, teacher, image_size, patch_size)
        return model.to(device), guide.to(device), name

    (model, guide, name), (plain_model, plain_guide, _) = build(), build()
    if method == "dearkd":
        guide.to(memory_format=torch.channels_last)
    images = torch.randn(batch_size, 3, image_size, image_size, device=device)
    target = torch.rand(batch_size, 1000, device=device).softmax(1)
    for module in (*plain_model.modules(), *plain_guide.modules()):
        if type(module).__name__ in ("Attention", "ConvAttention"):
            module.forward = types.MethodType(written_out, module)
        if method == "attndistill" and isinstance(module, attndistill.ViT):
            module.class_token_and_attention = types.MethodType(all_tokens, module)
    if method == "attndistill":
        plain_model.project.forward = types.MethodType(of_all_tokens, plain_model.project)

    def make(model, look, amp, fused):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused)
        scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")

        def step():
            with precision(amp, device)():
                with torch.no_grad():
                    guidance = look(images)
                losses = (model(images, *guidance) if method == "attndistill" else
                          model(images, target, guidance))
            scaler.scale(sum(losses.values())).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            return losses

        return step

    look, plain_look = getattr(guide, name), getattr(plain_guide, name)
    for a, b in zip(make(copy.deepcopy(plain_model), plain_look, "off", False)().values(),
                    make(copy.deepcopy(model), look, "off", True)().values(), strict=True):
        assert abs(a - b) < 1e-3 * abs(a), (method, a, b)  # the same computation
    compiled = copy.deepcopy(model)
    compiled.compile(dynamic=False)
    return {"plain": make(plain_model, plain_look, "fp16" if device.type == "cuda" else "off",
                          False),
            "ours": make(model, look, "bf16", True),
            "compiled": make(compiled, torch.compile(look, dynamic=False), "bf16", True)}


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
        print(HEAD.format("step", *((" | compiled", "compiled", "---|") if args.compile
                                   else ("", "ours", ""))))
    for name in names:
        method, student, teacher, size, patch, batch = STEPS[name]
        batch = args.batch_size or (batch if args.device.type == "cpu" else 256)
        ways = steps(method, student, teacher, size, patch, batch, args.device)
        if not args.compile:
            del ways["compiled"]
        row(f"{method}: {student} <- {teacher}, {size} px, {(size // patch)**2} tokens, batch "
            f"{batch}", batch, ways, args, repeat=1)


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

    print(HEAD.format("k-NN votes", "", "ours", ""))
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
    teacher = dearkd.Teacher(dearkd.make_cnn("cifar_resnet56", 10), 32)
    ours = copy.deepcopy(teacher).requires_grad_(False)  # plain: gradients of the parameters, too
    teacher.to(device).eval()
    ours.to(device, memory_format=torch.channels_last).eval()
    labels, found = torch.arange(batch_size, device=device) % 10, {}
    settings = {**dearkd.synthesis_settings(32), "steps": steps, "divergence": 0.0}
    mean, std = common.channel_statistics(device)
    black, white = -mean / std, (255 - mean) / std

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
    print(HEAD.format("DeepInversion step", "", "ours", ""))
    row(f"cifar_resnet56, 32 px, batch {batch_size}", steps * batch_size,
        {"plain": plain, "ours": fast}, args, repeat=1)


class Seeded(Dataset):
    """A data set's items by key = epoch * len + index, with the random numbers of Photos' items."""

    def __init__(self, base):
        self.base = base

    def __getitem__(self, key):
        torch.manual_seed(common.mix_seed(0, key))
        return self.base[key % len(self.base)]


def drain(loader):
    for _ in loader:
        pass


def bench_input(args, epochs=4):
    """Training images as a loop gets them, in batches of 32 from one worker: read, decoded,
    augmented. Plain: torchvision's ImageFolder and its transforms of PIL images; these normalise,
    too, which ours leave to the device."""
    bicubic = InterpolationMode.BICUBIC
    print("| photos, one worker | images/s plain | ours | ours / plain |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "zipfile", "-e", DATA / "imagenet_photos.zip",
                        folder], check=True)
        for name, magnitude in (("RandomResizedCrop 224, flip", 0), ("the same, RandAugment", 9)):
            augment = [v2.RandAugment(2, 9, num_magnitude_bins=11, fill=[124, 116, 104],
                                      interpolation=bicubic)] if magnitude else []
            plain = datasets.ImageFolder(folder, v2.Compose([
                v2.RandomResizedCrop(224, interpolation=bicubic), v2.RandomHorizontalFlip(),
                *augment, v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(common.MEAN, common.STD)]))
            ours = common.Photos(common.ClassFolders(folder), common.train_transform(
                224, rand_augment=magnitude))
            keys = range(epochs * len(ours))
            loaders = {way: common.make_loader(dataset, 1, batch_size=32, sampler=keys,
                                               persistent_workers=True)
                       for way, dataset in (("plain", Seeded(plain)), ("ours", ours))}
            seconds, _ = alternate({way: functools.partial(drain, loader)
                                    for way, loader in loaders.items()},
                                   torch.device("cpu"), args.rounds, repeat=1)
            print(f"| {name} | " + " | ".join(
                f"{len(keys) / statistics.median(s):.0f}" for s in seconds.values())
                + f" | {ratios(seconds)} |", flush=True)
            del loaders  # and their workers


# ------------------------------------------------------------------ beside the steps, and growth


def bench_overhead(args, images=1_281_167, val=50_000):
    """What an ImageNet epoch of ViTKD, DeiT-T <- DeiT III-S, costs beside its steps."""
    device, batch = args.device, args.batch_size or (16 if args.device.type == "cpu" else 256)
    torch.manual_seed(0)
    step = steps("vitkd", "deit_t", "deit_s", 224, 16, batch, device)["ours"]
    student = vitkd.ViT(224, 16, *vitkd.SIZES["deit_t"]).to(device)
    optimizer = torch.optim.AdamW(student.parameters())
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    x = torch.randn(batch, 3, 224, 224, device=device)

    def look():
        with torch.inference_mode(), precision("bf16", device)():
            student(x)

    with tempfile.TemporaryDirectory() as folder:
        export = {"model": student.state_dict(), "arch": {}, "script": "vitkd", "top1": 0.0}

        def write():
            for name in ("student", "best"):
                common.save_checkpoint(f"{folder}/{name}.pth", **export)
            common.save_checkpoint(f"{folder}/last.pth", **export, optimizer=optimizer.state_dict())

        seconds, _ = alternate({"step": step, "look": look, "write": write, "read": lambda: (
            common.load_checkpoint(f"{folder}/last.pth"))}, device, args.rounds, repeat=1)
    step, look, write, read = (statistics.median(s) for s in seconds.values())
    epoch = images / batch * step
    print("| beside the steps of an ImageNet epoch | seconds | of the epoch |\n|---|---|---|\n"
          f"| the epoch's steps, {batch / step:.3g} images/s | {epoch:.3g} | |")
    for name, cost in (("evaluation on 50,000 images, every epoch", val / batch * look),
                       ("writing student.pth, best.pth and last.pth, every epoch", write),
                       ("reading last.pth, once a resume (no batch is read again)", read)):
        print(f"| {name} | {cost:.3g} | {100 * cost / epoch:.2g} % |", flush=True)


def exponent(sizes, seconds):
    """Slope of log seconds over log size."""
    slope, _ = np.polyfit(np.log(sizes), np.log(seconds), 1)
    return f"{slope:.2f}"


def bench_growth(args):
    """How the time of a step, and of the k-NN votes, grows."""
    cases = {"tokens 49, 196, 784 (112, 224, 448 px), batch 8": (
                 (49, 196, 784), lambda tokens: (math.isqrt(tokens) * 16, 8)),
             "batch 4, 8, 16, 32, 196 tokens": ((4, 8, 16, 32), lambda batch: (224, batch))}
    print("| ours, bf16 | seconds | exponent |\n|---|---|---|")
    for name, (sizes, setting) in cases.items():
        calls = {}
        for size in sizes:
            image_size, batch = setting(size)
            calls[size] = steps("vitkd", "deit_t", "deit_s", image_size, 16, batch,
                                args.device)["ours"]
        report(f"vitkd step, deit_t <- deit_s, {name}", sizes, calls, args)
    sizes = (12_500, 25_000, 50_000, 100_000, 200_000)
    train, labels, test = clusters(sizes[-1], 2000, 384, 1000, args.device)
    report(f"k-NN votes, 2,000 x 384, {', '.join(f'{n:,}' for n in sizes)} training features",
           sizes, {n: functools.partial(eval_knn.knn_predict, train[:n], labels[:n], test,
                                        num_classes=1000) for n in sizes}, args)


def report(name, sizes, calls, args):
    seconds, _ = alternate(calls, args.device, args.rounds, repeat=1)
    medians = [statistics.median(s) for s in seconds.values()]
    print(f"| {name} | {', '.join(f'{s:.3g}' for s in medians)} | {exponent(sizes, medians)} |",
          flush=True)


def bench_processes(args):
    """The ordinary command with --dry-run: one process with two threads, two with one."""
    flags = ["vitkd.py", "--data", "shapes", "--teacher", "none", "--student", "deit_t",
             "--batch-size", "32", "--dry-run"]
    ways = {"1 process, 2 threads": [sys.executable, *flags],
            "2 processes, 1 thread": [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                      "--nproc_per_node", "2", *flags]}
    speeds = {way: [] for way in ways}
    for _ in range(3):
        for way, command in ways.items():
            threads = "1" if "2 processes" in way else "2"
            out = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True,
                                 env={**os.environ, "OMP_NUM_THREADS": threads}).stdout
            speeds[way].append(float(re.search(r"([\d.]+) images/s", out).group(1)))
    print("| deit_t alone, 224 px, batch 32 | images/s, three runs |\n|---|---|")
    for way, found in speeds.items():
        print(f"| {way} | {', '.join(map(str, found))} |", flush=True)


BENCHES = {"knn": bench_knn, "inversion": bench_inversion, "input": bench_input,
           "overhead": bench_overhead, "growth": bench_growth, "processes": bench_processes}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    there = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=torch.device(there),
                        help="cpu or cuda (default: what is there)")
    parser.add_argument("--rows", nargs="+", choices=[*STEPS, *BENCHES], metavar="NAME",
                        default=[*STEPS, *BENCHES], help=f"of {', '.join([*STEPS, *BENCHES])}")
    parser.add_argument("--rounds", type=int, default=5, help="that are timed (default: 5)")
    parser.add_argument("--batch-size", type=int, help="of steps (default: 16 or 128; GPU: 256)")
    parser.add_argument("--compile", action="store_true", help="time compiled steps, too")
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if args.device.type == "cuda" else (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")
    print(f"{name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}; {args.rounds} "
          f"alternating rounds; a matrix product in bf16 makes "
          f"{matmul_rate(args.device) / 1e9:.0f} GFLOP/s\n")
    bench_steps(args)
    for name, bench in BENCHES.items():
        if name in args.rows:
            print()
            bench(args)


if __name__ == "__main__":
    main()
