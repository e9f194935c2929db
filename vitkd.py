"""ViTKD: distil a supervised vision transformer into a smaller one through its features.

Yang et al., "ViTKD: Practical Guidelines for ViT Feature Knowledge Distillation", arXiv 2209.02432,
with NKD, the logit loss of Yang et al., arXiv 2303.13005. Formulas, constants and recipe are the
authors' (papers, released code). Ours: torchvision's RandAugment; scaling to other sizes and steps.

The first blocks of teacher and student have similar attention maps, the last do not. Therefore
  - shallow (after blocks 0 and 1): the student MIMICS the teacher's patch tokens;
  - deep (after the final norm): half of the student's patch tokens are masked, and a small
    convolutional network must GENERATE the teacher's tokens there from the other half;
  - logits: NKD separates the target class from the distribution over the other classes.

DeiT-T <- DeiT III-S on ImageNet-1k, 74.42 -> 77.78 % top-1 (paper), and a demo for a laptop:
    torchrun --nproc_per_node 8 vitkd.py --data data/imagenet --teacher deit3_s --student deit_t
    python vitkd.py --demo
Measured: in the demo, ViTKD + NKD adds 18.7 points of top-1 (27.5 -> 46.2 %, deviation 1.0, seeds
0 to 4; one AMD EPYC core, bf16, 2026-11-25; tests/evidence/demo_vitkd.log).
"""

import argparse
import math
import tempfile
import time
from collections import OrderedDict, defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.ops import StochasticDepth
from torchvision.transforms import v2
from tqdm import tqdm

import common

# ------------------------------------------------------------------ the loss


class ViTKDLoss(nn.Module):
    """Feature distillation between two ViTs with the same patch grid (arXiv 2209.02432, section 3).

    forward(student_shallow, student_deep, teacher_shallow, teacher_deep) -> (L_m, L_g), scalars:
        shallow: list of two (B, N, D_s or D_t), patch tokens after blocks 0 and 1
        deep: (B, N, D_s or D_t), patch tokens after the final norm; N must be a square
    Both are sums over N * D_t, means over B: alpha and beta are for N = 196 and the paper's D_t.
    """

    def __init__(self, student_dim, teacher_dim, alpha=3e-5, beta=3e-6, mask_ratio=0.5):
        super().__init__()
        self.alpha, self.beta, self.mask_ratio = alpha, beta, mask_ratio
        align = nn.Identity if student_dim == teacher_dim else nn.Linear  # A. Identity: no sizes
        self.align_shallow = nn.ModuleList(align(student_dim, teacher_dim) for _ in range(2))
        self.align_deep = align(student_dim, teacher_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, teacher_dim))
        self.generator = nn.Sequential(
            nn.Conv2d(teacher_dim, teacher_dim, 3, padding=1), nn.ReLU(),
            nn.Conv2d(teacher_dim, teacher_dim, 3, padding=1))

    def forward(self, student_shallow, student_deep, teacher_shallow, teacher_deep):
        B, N, _ = student_deep.shape
        g = math.isqrt(N)
        if g * g != N or teacher_deep.shape[1] != N:
            raise ValueError(f"{N} and {teacher_deep.shape[1]} patch tokens: no common square grid")

        # L_m = alpha/B * sum over blocks i = 0, 1 of || A_i(F_i^s) - F_i^t ||^2
        mimicking = self.alpha / B * sum(
            (align(s).float() - t.float()).square().sum()
            for align, s, t in zip(self.align_shallow, student_shallow, teacher_shallow))

        # L_g = beta/(lambda*B) * || M * (G(x) - F_L^t) ||^2,  x = A(F_L^s) with tokens masked out
        mask = random_mask(B, N, self.mask_ratio, student_deep.device)[..., None]   # (B, N, 1)
        x = self.align_deep(student_deep)                                           # (B, N, D_t)
        x = torch.where(mask, self.mask_token.to(x.dtype), x)
        x = self.generator(x.reshape(B, g, g, -1).permute(0, 3, 1, 2))              # (B, D_t, g, g)
        x = x.permute(0, 2, 3, 1).reshape(B, N, -1)                                 # (B, N, D_t)
        generation = (mask * (x.float() - teacher_deep.float())).square().sum()
        return mimicking, self.beta / (self.mask_ratio * B) * generation


def random_mask(batch_size, num_tokens, mask_ratio, device=None):
    """Return (B, N) bool, True = masked: N - floor(N * (1 - mask_ratio)) tokens of each image."""
    masked = num_tokens - math.floor(num_tokens * (1 - mask_ratio) + 1e-9)  # 1e-9: for rounding
    permutation = torch.rand(batch_size, num_tokens, device=device).argsort(dim=1)
    return permutation < masked


def nkd_loss(student_logits, teacher_logits, target, gamma=1.0, temperature=1.0):
    """NKD (arXiv 2303.13005, section 3), a scalar: a term for the target class, one for the others.

    logits: (B, C). target: (B,) classes, or (B, C) mixed labels, where the largest is the target.
    The defaults are those used beside ViTKD; NKD alone takes gamma 1.5 on ImageNet.
    """
    student, teacher = student_logits.float(), teacher_logits.float()
    target = (target.argmax(1) if target.ndim == 2 else target)[:, None]            # (B, 1)

    # - p_t(y) log p_s(y)
    p_t = teacher.softmax(1).gather(1, target)
    target_term = -p_t * student.log_softmax(1).gather(1, target)                   # (B, 1)

    # - gamma tau^2 * sum_{i != y} n_t(i) log n_s(i), n = softmax over the other logits / tau
    without_target = lambda x: (x / temperature).scatter(1, target, -1e30)  # its softmax becomes 0
    n_t, log_n_s = without_target(teacher).softmax(1), without_target(student).log_softmax(1)
    other_term = -(n_t * log_n_s).sum(1, keepdim=True)                              # (B, 1)
    return (target_term + gamma * temperature**2 * other_term).mean()


# ------------------------------------------------------------------ the ViT

SIZES = {"micro": {"dim": 96, "depth": 6, "num_heads": 3},
         "deit_t": {"dim": 192, "depth": 12, "num_heads": 3},
         "deit_s": {"dim": 384, "depth": 12, "num_heads": 6},
         "deit_b": {"dim": 768, "depth": 12, "num_heads": 12},
         "deit_l": {"dim": 1024, "depth": 24, "num_heads": 16}}


class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                # (B, H, N, D/H) each
        x = F.scaled_dot_product_attention(q, k, v)                         # (B, H, N, D/H)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class Block(nn.Module):
    def __init__(self, dim, num_heads, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """Pre-norm vision transformer with a class token; parameters have timm's names.

    forward(images (B, 3, S, S)) -> logits (B, C); the normed class token (B, D) if num_classes = 0.
    drop_path: stochastic depth of the last block; it grows linearly from 0 in the first.
    """

    def __init__(self, image_size=224, patch_size=16, dim=384, depth=12, num_heads=6,
                 num_classes=1000, drop_path=0.0):
        super().__init__()
        N = (image_size // patch_size) ** 2
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch_size, patch_size)})
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02))
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1 + N, dim), std=0.02))
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, drop_path * i / max(1, depth - 1)) for i in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def features(self, images):
        """Return (shallow, deep, logits): patch tokens after blocks 0 and 1, list of two (B, N, D);
        patch tokens after the final norm (B, N, D); logits (B, C)."""
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)     # (B, N, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        shallow = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i < 2:
                shallow.append(x[:, 1:])
        x = self.norm(x)
        return shallow, x[:, 1:], self.head(x[:, 0])

    def forward(self, images):
        return self.features(images)[2]


def load_weights(vit, state):
    """Load a state dict into a ViT, strictly; resize the position embedding to its image size."""
    position = state.get("pos_embed", vit.pos_embed)                        # (1, 1+N, D)
    if math.isqrt(position.shape[1]) ** 2 == position.shape[1]:
        position = F.pad(position, (0, 0, 1, 0))  # DeiT III has none for the class token: zeros
    old, grid = (math.isqrt(p.shape[1]) for p in (position, vit.pos_embed))
    if position.shape[1] == 1 + old * old:  # else it is another model's: torch names the keys
        patches = position[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)  # (1, D, old, old)
        patches = F.interpolate(patches, (grid, grid), mode="bicubic").flatten(2).transpose(1, 2)
        position = torch.cat([position[:, :1], patches], 1)                 # (1, 1+grid*grid, D)
    vit.load_state_dict({**state, "pos_embed": position} if "pos_embed" in state else state)


# ------------------------------------------------------------------ the teacher

TEACHERS = {  # name: (size, file; the download is checked against the start of its sha256)
    "deit_t": ("deit_t", "deit_tiny_patch16_224-a1311bcf.pth"),
    "deit_s": ("deit_s", "deit_small_patch16_224-cd65a155.pth"),
    "deit_b": ("deit_b", "deit_base_patch16_224-b5f2ef4d.pth"),
    "deit3_s": ("deit_s", "deit_3_small_224_21k.pth"),
    "deit3_b": ("deit_b", "deit_3_base_224_21k.pth"),
    "deit3_l": ("deit_l", "deit_3_large_224_21k.pth")}


def load_teacher(name, weights=None, num_classes=1000, image_size=224):
    """Return a frozen ViT in eval mode, for images of `image_size` pixels.

    name: one of TEACHERS, with its weights in the file `weights` or else downloaded; or the path of
    a student.pth. Raises ValueError (unknown name, unreadable file) or RuntimeError (weights of
    another model or class count: torch names the keys)."""
    if name in TEACHERS:
        size, file = TEACHERS[name]
        saved = common.load_checkpoint(weights or f"https://dl.fbaipublicfiles.com/deit/{file}")
        state, arch = dict(saved.get("model", saved)), SIZES[size]
    elif Path(name).is_file() and not weights:
        saved = common.load_checkpoint(name)
        if saved.get("script") != "vitkd":
            raise ValueError(f"{name} is no student.pth of vitkd.py: is it --teacher-weights?")
        state, arch = saved["model"], saved["arch"]
    else:
        raise ValueError(f"no teacher {name}: choose {', '.join(TEACHERS)}, none, or a student.pth")
    # DeiT III multiplies outputs by LayerScale's gamma_1, in timm ls1.gamma: multiply weights by it
    state = {key.replace("gamma_", "ls").removesuffix(".gamma"): x for key, x in state.items()}
    for key in [key for key in state if key.endswith((".ls1", ".ls2"))]:
        gamma, layer = state.pop(key), key.replace("ls1", "attn.proj").replace("ls2", "mlp.fc2")
        state[f"{layer}.weight"] = gamma[:, None] * state[f"{layer}.weight"]
        state[f"{layer}.bias"] = gamma * state[f"{layer}.bias"]
    teacher = ViT(**{**arch, "image_size": image_size, "num_classes": num_classes})
    load_weights(teacher, state)
    return teacher.requires_grad_(False).eval()


# ------------------------------------------------------------------ training

STUDENTS = {  # ImageNet-1k top-1 without a teacher, width of the teacher (paper; micro is ours)
    "micro": (0, 384), "deit_t": (74.42, 384), "deit_s": (80.55, 768), "deit_b": (81.76, 1024)}


class Distillation(nn.Module):
    """All that is trained, in one module for one DDP. Returns {name: loss term}."""

    def __init__(self, student, vitkd, args):
        super().__init__()
        self.student, self.vitkd, self.args = student, vitkd, args

    def forward(self, images, target, teacher_features):
        shallow, deep, logits = self.student.features(images)
        losses = {"ce": F.cross_entropy(logits.float(), target,
                                        label_smoothing=self.args.label_smoothing)}
        if teacher_features:
            t_shallow, t_deep, t_logits = teacher_features
            mimicking, generation = self.vitkd(shallow, deep, t_shallow, t_deep)
            losses |= {"mimicking": mimicking, "generation": generation}
            if not self.args.no_nkd:
                losses["nkd"] = nkd_loss(logits, t_logits, target, self.args.gamma)
        return losses


def train(args, device):
    """Train args.student, with args.teacher or alone. Return the last epoch's record."""
    autocast, scaler = common.precision(args, device)

    # ---- data: each process loads its part of a batch ----
    transform = common.train_transform(args.image_size, (args.crop_scale, 1.0),
                                       args.rand_augment, args.random_erasing)
    train_set, val_set, num_classes = common.load_data(args, transform)
    loader = common.make_loader(train_set, args, train=True)
    val_batches = common.make_loader(val_set, args, train=False)
    mix = [v2.MixUp(alpha=args.mixup, num_classes=num_classes)] if args.mixup else []
    mix += [v2.CutMix(alpha=args.cutmix, num_classes=num_classes)] if args.cutmix else []

    # ---- models ----
    torch.manual_seed(args.seed)
    arch = {**SIZES[args.student], "image_size": args.image_size, "patch_size": args.patch_size,
            "num_classes": num_classes}
    drop_path = 0.1 if args.student == "deit_b" else 0.0
    ema_decay = max(0, 1 - 15 / (args.epochs * len(loader))) if drop_path else 0  # paper: 0.99996
    student, teacher, vitkd_loss = ViT(**arch, drop_path=drop_path), None, None
    try:
        if args.init:
            state = common.load_checkpoint(args.init)
            state = dict(state.get("model", state))
            if len(state.get("head.bias", [])) != num_classes:  # then the head stays new
                state.update((f"head.{k}", v) for k, v in student.head.state_dict().items())
            load_weights(student, state)
        if args.teacher != "none":
            teacher = load_teacher(args.teacher, args.teacher_weights, num_classes, args.image_size)
            if teacher.patch_embed["proj"].kernel_size[0] != args.patch_size:
                raise ValueError("teacher and student need the same --patch-size")
            # Both terms are sums over N * D_t: keep each element's weight as in the paper
            scale = 196 * STUDENTS[args.student][1] / teacher.pos_embed[:, 1:].numel()
            vitkd_loss = ViTKDLoss(arch["dim"], teacher.pos_embed.shape[2], args.alpha * scale,
                                   args.beta * scale, args.mask_ratio)
            teacher.to(device)
    except (AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        common.fail(f"--init or --teacher: {error}")
    model = Distillation(student, vitkd_loss, args).to(device)
    ema = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(ema_decay))  # 0: just a copy

    # ---- optimiser ----
    groups = common.parameter_groups(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.999), fused=True)

    # ---- resume, or check the teacher: one trained at another image size can do harm ----
    resumed = {"model": model, "ema": ema, "optimizer": optimizer, "scaler": scaler}
    checkpoint, log = common.open_run(args), []  # log: one record an epoch
    if checkpoint:
        log = checkpoint["log"]
        for name, part in resumed.items():
            part.load_state_dict(checkpoint[name])
    elif teacher:
        top1 = common.evaluate(teacher, val_batches, device, autocast)
        common.say(f"teacher {args.teacher}: top-1 {top1:.1f} % on the validation images")
        if num_classes == 1000 and top1 < STUDENTS[args.student][0]:
            common.say(f"WARNING: {args.student} alone has {STUDENTS[args.student][0]} % (paper)")

    if args.compile:  # in place, so that the names in state_dict() stay
        model.compile(dynamic=False)
        if teacher:
            teacher.features = torch.compile(teacher.features, dynamic=False)
    ddp = DDP(model, gradient_as_bucket_view=True) if common.world_size() > 1 else model
    skipped = []  # for each step: was it skipped?

    for epoch in range(len(log), args.epochs):
        # Seed: a resumed run draws the same random numbers as an uninterrupted one
        torch.manual_seed(hash((args.seed, epoch, common.rank())))
        loader.sampler.set_epoch(epoch)
        train_set.epoch.fill_(epoch)  # a tensor that the workers share
        model.train()
        started, totals = time.time(), defaultdict(float)

        bar = tqdm(loader, f"epoch {epoch + 1}", leave=False, disable=common.rank() > 0 or None)
        for step, batch in enumerate(bar):
            # Learning rate
            lr = common.learning_rate(epoch + (step + 1) / len(loader), args)
            for group in optimizer.param_groups:
                group["lr"] = lr

            # MixUp or CutMix, one of the two per batch; the teacher sees the same images
            batch = [tensor.to(device, non_blocking=True) for tensor in batch]
            images, target = v2.RandomChoice(mix)(*batch) if mix else batch

            # Forward and backward, in equal chunks to save memory
            for i, (x, y) in enumerate(zip(images.chunk(args.accum), target.chunk(args.accum))):
                # DDP averages gradients over processes once a step: in the last backward pass
                ddp.require_backward_grad_sync = i == args.accum - 1  # one process: no effect
                with autocast():
                    with torch.no_grad():
                        teacher_features = teacher.features(x) if teacher else None
                    losses = ddp(x, y, teacher_features)
                scaler.scale(sum(losses.values()) / args.accum).backward()
                for name, loss in losses.items():
                    totals[name] += loss.detach().nan_to_num(0, 0, 0) / args.accum  # NaN adds 0

            # Finite check and step: gradients are averaged, so all processes skip or none does
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad or math.inf)
            skipped.append(not norm.isfinite())
            if not skipped[-1]:
                scaler.step(optimizer)
                ema.update_parameters(student)
            elif sum(skipped[-20:]) == 20:
                common.fail("20 steps in a row had no finite gradients: try a lower --lr")
            scaler.update()
            optimizer.zero_grad()

        # Evaluation and log
        record = {"epoch": epoch + 1, **common.mean_losses(totals, len(loader), device), "lr": lr,
                  "skipped_steps": sum(skipped[-len(loader):]),
                  "images_per_second": len(loader) * args.batch_size / (time.time() - started)}
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
            record["top1"] = common.evaluate(ema.module, val_batches, device, autocast)
        log.append({**record, "seconds": time.time() - started})
        common.log_epoch(args, log)

        # Checkpoints: the student as a plain ViT, and all that --resume needs
        if common.rank() == 0:
            common.save_checkpoint(f"{args.out}/student.pth", model=ema.module.state_dict(),
                                   arch=arch, script="vitkd")
            states = {name: part.state_dict() for name, part in resumed.items()}
            common.save_checkpoint(f"{args.out}/last.pth", **states, log=log, args=vars(args))
    return log[-1]


# ------------------------------------------------------------------ command line


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=29, width=100))
    parser.error = common.fail  # one line instead of the usage

    group = parser.add_argument_group
    flag = group("data", "A folder holds train/CLASS/* and val/CLASS/*.").add_argument
    flag("--data", default="data/imagenet", help="folder, cifar10, cifar100, shapes (%(default)s)")
    flag("--val", help="another folder of CLASS/* with validation images")
    flag("--data-fraction", type=float, default=1.0, help="part of each class to use (%(default)s)")
    flag("--image-size", type=int, default=224, help="side length in pixels (%(default)s)")
    flag("--workers", type=int, default=common.WORKERS, help="data workers per GPU (%(default)s)")

    flag = group("models", f"Teachers: {', '.join(TEACHERS)}, a student.pth, none.").add_argument
    flag("--student", choices=STUDENTS, default="deit_t", help="the ViT to train (%(default)s)")
    flag("--init", metavar="FILE", help="student.pth or a DeiT file; a head of another size is new")
    flag("--teacher", default="deit3_s", help="a name or a path, see above (%(default)s)")
    flag("--teacher-weights", metavar="FILE", help="the named teacher's weights (else downloaded)")
    flag("--patch-size", type=int, default=16, help="in pixels; also the teacher's (%(default)s)")

    flag = group("loss", "Alpha, beta: weights, scaled to other tokens and widths.").add_argument
    flag("--alpha", type=float, default=3e-5, help="of mimicking, at 196 tokens (%(default)s)")
    flag("--beta", type=float, default=3e-6, help="of generation, at 196 tokens (%(default)s)")
    flag("--mask-ratio", type=float, default=0.5, help="masked part of the tokens (%(default)s)")
    flag("--no-nkd", action="store_true", help="leave out NKD, the logit loss")
    flag("--gamma", type=float, default=1.0, help="NKD: weight of the other classes (%(default)s)")

    flag = group("recipe").add_argument
    flag("--batch-size", type=int, default=1024, help="global batch size (%(default)s)")
    flag("--accum", type=int, default=1, help="gradient accumulation steps (%(default)s)")
    flag("--epochs", type=int, default=300, help="passes over the training images (%(default)s)")
    flag("--lr", type=float, help="peak learning rate (1e-3 * sqrt(batch size / 1024))")
    flag("--min-lr", type=float, default=1e-5, help="learning rate at the end (%(default)s)")
    flag("--warmup-epochs", type=float, default=20, help="capped at epochs / 10 (%(default)s)")
    flag("--weight-decay", type=float, default=0.05, help="AdamW's (%(default)s)")
    flag("--clip-grad", type=float, default=5.0, help="largest gradient norm, 0: off (%(default)s)")
    flag("--crop-scale", type=float, default=0.08, help="smallest share of the area (%(default)s)")
    flag("--label-smoothing", type=float, default=0.1, help="of the cross-entropy (%(default)s)")
    flag("--mixup", type=float, default=0.8, help="alpha of MixUp, 0: off (%(default)s)")
    flag("--cutmix", type=float, default=1.0, help="alpha of CutMix, 0: off (%(default)s)")
    flag("--rand-augment", type=int, default=9, help="magnitude, 0 (off) to 10 (%(default)s)")
    flag("--random-erasing", type=float, default=0.25, help="probability (%(default)s)")
    flag("--seed", type=int, default=0, help="weights, order, augmentation (%(default)s)")

    flag = group("run").add_argument
    flag("--amp", choices=("bf16", "fp16", "off"), help="precision (the fastest the device has)")
    flag("--compile", action="store_true", help="torch.compile student and teacher")
    flag("--out", default="out/vitkd", help="folder for the results (%(default)s)")
    flag("--resume", action="store_true", help="continue the run in --out, if there is one")
    flag("--eval-every", type=int, default=1, help="epochs between evaluations (%(default)s)")
    flag("--demo", action="store_true", help="three small runs; reads only --workers and --seed")
    args = parser.parse_args(argv)

    common.check_args(args, {"mask_ratio": (1e-6, 1), "label_smoothing": (0, 1),
                             "rand_augment": (0, 10), "random_erasing": (0, 1)})
    args.lr = args.lr or 1e-3 * math.sqrt(args.batch_size / 1024)
    return args


def demo(args, device):
    """Train a teacher, a student alone and a distilled student; print their top-1 on shapes."""
    flags = ("--data shapes --image-size 32 --patch-size 8 --student micro --batch-size 50 "
             "--lr 1e-3 --crop-scale 0.5 --label-smoothing 0 --mixup 0 --cutmix 0 --rand-augment 0 "
             f"--random-erasing 0 --eval-every 1000 --workers {args.workers} --seed {args.seed}")
    if common.world_size() > 1:
        common.fail("--demo runs in one process, without torchrun")
    table = []
    with tempfile.TemporaryDirectory() as out:
        for name, teacher, epochs in (("teacher", "none", 24), ("student alone", "none", 8),
                                      ("student distilled", f"{out}/0/student.pth", 8)):
            more = ["--teacher", teacher, "--epochs", str(epochs), "--out", f"{out}/{len(table)}"]
            top1 = train(parse_args(flags.split() + more), device)["top1"]
            table.append(f"{name:18s} top-1 {top1:5.1f} %")
    common.say("\n" + "\n".join(table))


def main(argv=None):
    args, device = parse_args(argv), common.init_processes()
    demo(args, device) if args.demo else train(args, device)
    if common.world_size() > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
