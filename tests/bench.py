"""The speed table: ours against the plain version of the same computation, in alternating rounds.

    python tests/bench.py [vitkd] [attndistill] [knn] [inversion]   # prints Markdown

vitkd: steps (student alone; student, teacher, ViTKD and NKD) in three precisions:
    plain    float32, attention by torch's fused CPU kernel
    fused    bf16 autocast, attention by torch's fused CPU kernel
    ours     bf16 autocast, attention as matrix products (common.set_precision)
attndistill: steps of ViT-S/16 <- ViT-B/16, 224 px:
    plain    float32; every block in full, attention written out with its softmax, the projector
             on all tokens
    full     the same in bf16 autocast
    ours     bf16 autocast, the last block and the projector for the class token alone
knn: votes of 50,000 training for 10,000 test features of width 384, 1000 classes, in all four ks:
    plain    one pass for each k: 100 chunks of test features, one-hot votes, all classes sorted
    ours     eval_knn.knn_predict
inversion: DeepInversion steps of cifar_resnet56, 32 px, batch 256:
    plain    float32, contiguous, gradients of the CNN's parameters, too, statistics by torch.var
    ours     dearkd.synthesize in bf16 autocast, channels_last
"""

import argparse
import functools
import math
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import attndistill
import common
import dearkd
import eval_knn
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


def alternate(ways, rounds=ROUNDS, repeat=2):
    """{way: seconds a call, one number a round} of {way: function}; a first round warms up."""
    seconds = {way: [] for way in ways}
    for turn in range(rounds + 1):
        for way, call in ways.items():
            call()
            began = time.perf_counter()
            for _ in range(repeat):
                call()
            if turn:
                seconds[way].append((time.perf_counter() - began) / repeat)
    return seconds


def ratio(seconds, way):
    """How many times as fast as `way` ours is: median (smallest to largest of a round)."""
    ratios = [a / b for a, b in zip(seconds[way], seconds["ours"])]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def per_second(seconds, items):
    return " | ".join(f"{items / statistics.median(s):.3g}" for s in seconds.values())


def precision(amp, fused=False):
    autocast, _ = common.set_precision(argparse.Namespace(amp=amp), torch.device("cpu"))
    torch.backends.cuda.enable_flash_sdp(fused)
    return autocast


def bench_vitkd():
    print("| ViTKD step | images/s plain | fused | ours | ours / plain | ours / fused |\n"
          "|---|---|---|---|---|---|")
    for row in ROWS:
        student, teacher, image_size, patch_size, batch_size = row
        step = make_step(*row)
        seconds = alternate({way: functools.partial(lambda step, amp, fused: step(
            precision(amp, fused)), step, *setting) for way, setting in WAYS.items()})
        name = f"{student} <- {teacher}" if teacher else f"{student} alone"
        print(f"| {name}, {image_size} px, patch {patch_size}, batch {batch_size} | "
              f"{per_second(seconds, batch_size)} | {ratio(seconds, 'plain')} | "
              f"{ratio(seconds, 'fused')} |", flush=True)


def written_out(vit, images):
    """(tokens after the final norm, last attention): every block in full, softmax by hand."""
    x = vit.embed(images)
    for block in vit.blocks:
        attention, (B, N, D) = block.attn, x.shape
        qkv = attention.qkv(block.norm1(x)).view(B, N, 3, attention.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attn = (q @ k.transpose(2, 3) * q.shape[-1]**-0.5).softmax(-1)      # (B, H, N, N)
        x = x + attention.proj((attn @ v).transpose(1, 2).reshape(B, N, D))
        x = x + block.mlp(block.norm2(x))
    return vit.norm(x), attn[:, :, 0]


def bench_attndistill(batch_size=16):
    torch.manual_seed(0)
    dims = {name: attndistill.SIZES[name] for name in ("vit_s", "vit_b")}
    student, teacher = (attndistill.ViT(224, 16, *dims[name], 0) for name in dims)
    teacher.requires_grad_(False).eval()
    project = attndistill.projector(384, 768)
    args = argparse.Namespace(lambda_a=0.1, temperature=10)
    model = attndistill.Objective(student, project, args)
    images = torch.randn(batch_size, 3, 224, 224)

    def plain(amp):
        with precision(amp)():
            with torch.no_grad():
                z_t, a_t = written_out(teacher, images)
            z_s, a_s = written_out(student, images)
            alignment = F.mse_loss(project(z_s)[:, 0].float(), z_t[:, 0].float())
            guidance = attndistill.attention_guidance_loss(a_s, a_t)
        (alignment + 0.1 * guidance).backward()
        model.zero_grad()
        return alignment.item(), guidance.item()

    def ours(amp="bf16"):
        with precision(amp)():
            with torch.no_grad():
                guide = teacher.class_token_and_attention(images)
            losses = model(images, *guide)
        sum(losses.values()).backward()
        model.zero_grad()
        return losses["alignment"].item(), losses["guidance"].item() / 0.1

    for a, b in zip(plain("off"), ours("off")):  # the same computation
        assert abs(a - b) < 1e-4 * abs(a), (a, b)
    seconds = alternate({"plain": lambda: plain("off"), "full": lambda: plain("bf16"),
                         "ours": ours})
    print("| AttnDistill step | images/s plain | full | ours | ours / plain | ours / full |\n"
          "|---|---|---|---|---|---|\n"
          f"| vit_s <- vit_b, 224 px, patch 16, batch {batch_size} | "
          f"{per_second(seconds, batch_size)} | {ratio(seconds, 'plain')} | "
          f"{ratio(seconds, 'full')} |", flush=True)


def textbook_knn(train, labels, test, k, num_classes, temperature=0.07, chunks=100):
    """(N_test, num_classes) classes, best first: what a first version of a weighted vote does."""
    train, best = train.T.contiguous(), []
    for part in test.chunk(chunks):
        similarity, neighbour = (part @ train).topk(k)
        one_hot = torch.zeros(len(part), k, num_classes)                    # (B, k, C)
        one_hot.scatter_(2, labels[neighbour][..., None], 1)
        score = (one_hot * (similarity / temperature).exp()[..., None]).sum(1)
        best.append(score.sort(dim=1, descending=True).indices)
    return torch.cat(best)


def bench_knn(N=50_000, N_test=10_000, D=384, C=1000):
    torch.manual_seed(0)
    centres, labels = torch.randn(C, D), torch.randint(0, C, (N,))
    train = F.normalize(centres[labels] + 3 * torch.randn(N, D))
    test = F.normalize(centres[torch.randint(0, C, (N_test,))] + 3 * torch.randn(N_test, D))
    found = {}

    def plain():
        found["plain"] = {k: textbook_knn(train, labels, test, k, C) for k in eval_knn.KS}

    def ours():
        found["ours"] = eval_knn.knn_predict(train, labels, test, num_classes=C)

    seconds = alternate({"plain": plain, "ours": ours}, rounds=3, repeat=1)
    for k in eval_knn.KS:
        agree = (found["plain"][k][:, 0] == found["ours"][k][:, 0]).float().mean()
        assert agree > 0.999, (k, agree)
    print("| k-NN votes | seconds plain | ours | ours / plain |\n|---|---|---|---|\n"
          f"| {N} x {N_test} x {D}, k = 10, 20, 100, 200 | "
          + " | ".join(f"{statistics.median(s):.1f}" for s in seconds.values())
          + f" | {ratio(seconds, 'plain')} |", flush=True)


def bench_inversion(batch_size=256, steps=2):
    torch.manual_seed(0)
    cnn = dearkd.make_cnn("cifar_resnet56", 10)
    teacher = dearkd.Teacher(cnn, 32)  # its parameters ask for gradients
    ours = dearkd.Teacher(dearkd.make_cnn("cifar_resnet56", 10), 32).requires_grad_(False)
    ours.load_state_dict(teacher.state_dict())
    ours.to(memory_format=torch.channels_last)
    labels, found = torch.arange(batch_size) % 10, {}
    settings = {**dearkd.synthesis_settings(32), "steps": steps, "divergence": 0.0}

    def plain():
        generator, terms = torch.Generator().manual_seed(0), []
        images = torch.randn(batch_size, 3, 32, 32, generator=generator)
        black = -torch.tensor(common.MEAN)[:, None, None] / torch.tensor(common.STD)[:, None, None]
        white = black + 1 / torch.tensor(common.STD)[:, None, None]
        images = images.clamp(black, white).requires_grad_()
        optimizer = torch.optim.Adam([images], settings["image_lr"], settings["betas"])

        def hook(layer, inputs, output):
            x = inputs[0]
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
            loss = (F.cross_entropy(teacher(x), labels) + settings["tv"] * dearkd.total_variation(x)
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
        dearkd.synthesize(ours, labels, 32, autocast=precision(amp),
                          report=lambda _, losses, images: found.update(
                              ours=sum(losses.values()).item()), **settings)

    plain()
    fast("off")  # the same computation
    assert abs(found["ours"] - found["plain"]) < 1e-3 * found["plain"], found
    seconds = alternate({"plain": plain, "ours": fast}, repeat=1)
    print("| DeepInversion step | images/s plain | ours | ours / plain |\n|---|---|---|---|\n"
          f"| cifar_resnet56, 32 px, batch {batch_size} | {per_second(seconds, steps * batch_size)}"
          f" | {ratio(seconds, 'plain')} |", flush=True)


def main():
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}, {time.strftime('%Y-%m-%d')}; alternating rounds, median "
          f"(ratios: smallest to largest of a round)\n")
    benches = {"vitkd": bench_vitkd, "attndistill": bench_attndistill, "knn": bench_knn,
               "inversion": bench_inversion}
    for name in sys.argv[1:] or benches:
        benches[name]()
        print(flush=True)


if __name__ == "__main__":
    main()
