"""ViTKD: distil a supervised vision transformer into a smaller one through its features.

Yang et al., "ViTKD: Practical Guidelines for ViT Feature Knowledge Distillation",
arXiv 2209.02432; with the logit loss of Yang et al., "From Knowledge Distillation to
Self-Knowledge Distillation: A Unified Approach with Normalized Loss", arXiv 2303.13005 (NKD).

The idea. A ViT's first blocks look alike in teacher and student, its last ones don't. So:
  - shallow (blocks 0 and 1): the student MIMICS the teacher's patch tokens, through a linear map;
  - deep (after the last norm): half of the student's patch tokens are masked out, and a small
    convolutional decoder must GENERATE the teacher's tokens there from the other half;
  - logits: NKD separates the target class from how the other classes share what is left.
All are added to the usual cross-entropy. What is distilled is the residual stream after whole
blocks, that is after their FFNs, not attention maps.

Formulas and constants are the authors' (papers and released code). Ours: RandAugment is
torchvision's, whose operations differ a little from timm's; --lr follows the batch size; an
epoch's batches are evened out instead of dropping the last; position embeddings are resized
with antialiasing.

The paper's headline, DeiT-T <- DeiT III-S on ImageNet-1k, 74.42 -> 77.78 top-1 (paper):
    torchrun --nproc_per_node 8 vitkd.py --data data/imagenet --teacher deit3_s --student deit_t
On a laptop, in minutes, with nothing to download:
    python vitkd.py --demo

Measured (an AMD EPYC, bf16, 2026-11-20 and 21; logs and commands in tests/evidence/): CIFAR-10,
micro <- deit_t (56.5 % top-1), 8 epochs of 10,000 images in 16 patches, means of seeds 0 to 2:
alone 43.8 %, with NKD 49.4, with ViTKD 51.1, with both 52.4; deviations up to 0.4. The demo over
seeds 0 to 4: alone 57.4 %, distilled 68.7 (gains 9.1 to 14.0), 2 min on two cores.
"""

import contextlib
import copy
import math
import pickle
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.ops import StochasticDepth
from torchvision.transforms import v2

import common

# ------------------------------------------------------------------ the loss

ALPHA, BETA = 3e-5, 3e-6  # for N = 196 patch tokens, i.e. 224 px and patch 16


class ViTKDLoss(nn.Module):
    """Feature distillation between two ViTs with the same patch grid (arXiv 2209.02432, section 3).

    forward(student_shallow, student_deep, teacher_shallow, teacher_deep) -> (L_m, L_g), scalars:
        shallow: list of two (B, N, D_s or D_t), patch tokens after blocks 0 and 1
        deep: (B, N, D_s or D_t), patch tokens after the final norm; N must be a square
    Both are sums over N * D_t, means over B: alpha's and beta's defaults are for N = 196 (224 px).
    """

    def __init__(self, student_dim, teacher_dim, alpha=ALPHA, beta=BETA, mask_ratio=0.5):
        super().__init__()
        self.alpha, self.beta, self.mask_ratio = alpha, beta, mask_ratio

        def align():  # A, where the widths differ
            same = student_dim == teacher_dim
            return nn.Identity() if same else nn.Linear(student_dim, teacher_dim)

        self.align_shallow = nn.ModuleList([align(), align()])
        self.align_deep = align()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, teacher_dim))
        self.generator = nn.Sequential(
            nn.Conv2d(teacher_dim, teacher_dim, 3, padding=1), nn.ReLU(),
            nn.Conv2d(teacher_dim, teacher_dim, 3, padding=1))

    def forward(self, student_shallow, student_deep, teacher_shallow, teacher_deep):
        B, N, _ = student_deep.shape
        g = math.isqrt(N)
        if g * g != N or teacher_deep.shape[1] != N:
            raise ValueError(f"student has {N} patch tokens, teacher {teacher_deep.shape[1]}: "
                             f"ViTKD needs the same square grid for both")

        # L_m = alpha/B * sum over blocks i = 0, 1 of || A_i(F_i^s) - F_i^t ||^2
        mimicking = sum(
            (align(s).float() - t.float()).square().sum()
            for align, s, t in zip(self.align_shallow, student_shallow, teacher_shallow))
        mimicking = self.alpha / B * mimicking

        # L_g = beta/(lambda*B) * || M * (G(x) - F_L^t) ||^2,  x = A(F_L^s) with tokens masked out
        mask = random_mask(B, N, self.mask_ratio, student_deep.device)[..., None]   # (B, N, 1)
        x = self.align_deep(student_deep)                                           # (B, N, D_t)
        x = torch.where(mask, self.mask_token.to(x.dtype), x)
        x = self.generator(x.reshape(B, g, g, -1).permute(0, 3, 1, 2))              # (B, D_t, g, g)
        x = x.permute(0, 2, 3, 1).reshape(B, N, -1)                                 # (B, N, D_t)
        generation = (mask * (x.float() - teacher_deep.float())).square().sum()
        generation = self.beta / (self.mask_ratio * B) * generation
        return mimicking, generation


def random_mask(batch_size, num_tokens, mask_ratio, device=None):
    """(B, N) bool, True = masked: N - floor(N * (1 - mask_ratio)) random tokens of each image."""
    # 1e-9: 10 * (1 - 0.9) falls just short of 1
    masked = num_tokens - math.floor(num_tokens * (1 - mask_ratio) + 1e-9)
    chosen = torch.rand(batch_size, num_tokens, device=device).topk(masked, dim=1).indices
    mask = torch.zeros(batch_size, num_tokens, dtype=torch.bool, device=device)
    return mask.scatter(1, chosen, True)


def nkd_loss(student_logits, teacher_logits, target, gamma=1.0, temperature=1.0):
    """NKD (arXiv 2303.13005, section 3): soft target loss and normalised non-target loss, scalar.

    logits: (B, C); target: (B,) classes, or (B, C) mixed labels, of which the largest counts.
    temperature 1 beside ViTKD; the paper's 1.5 where NKD is used alone.
    """
    student, teacher = student_logits.float(), teacher_logits.float()
    target = (target.argmax(1) if target.ndim == 2 else target)[:, None]            # (B, 1)

    # - p_t(y) log p_s(y)
    p_t = teacher.softmax(1).gather(1, target)
    soft_target = -p_t * student.log_softmax(1).gather(1, target)                   # (B, 1)

    # - gamma tau^2 * sum_{i != y} n_t(i) log n_s(i), n = softmax over the non-target logits / tau
    def without_target(logits):
        return (logits / temperature).scatter(1, target, -1e30)  # then n(y) = 0, and 0 log n(y) = 0

    n_t, log_n_s = without_target(teacher).softmax(1), without_target(student).log_softmax(1)
    non_target = -(n_t * log_n_s).sum(1, keepdim=True)
    return (soft_target + gamma * temperature**2 * non_target).mean()


# ------------------------------------------------------------------ the ViT

SIZES = {  # name: (dim, depth, num_heads)
    "micro": (96, 6, 3), "deit_t": (192, 12, 3), "deit_s": (384, 12, 6), "deit_b": (768, 12, 12)}


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
        if x.is_cpu:  # there torch's fused kernel has a slow backward pass (tests/bench.py)
            x = (q / math.sqrt(q.shape[-1]) @ k.transpose(2, 3)).softmax(-1) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v)                     # (B, H, N, D/H)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class Mlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 1e-4))

    def forward(self, x):
        return self.gamma * x


class Block(nn.Module):
    def __init__(self, dim, num_heads, drop_path, layer_scale):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.ls1 = LayerScale(dim) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)
        self.ls2 = LayerScale(dim) if layer_scale else nn.Identity()
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x):
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class PatchEmbed(nn.Module):
    def __init__(self, patch_size, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)                 # (B, N, D)


class ViT(nn.Module):
    """Pre-norm vision transformer with a class token; parameters have timm's names.

    forward(images (B, 3, S, S)) -> logits (B, C); the normed class token (B, D) if num_classes = 0.
    drop_path: stochastic depth of the last block, growing linearly from 0 at the first.
    For DeiT III: layer_scale; class_position=False (the class token has no position embedding).
    """

    def __init__(self, image_size=224, patch_size=16, dim=384, depth=12, num_heads=6,
                 num_classes=1000, drop_path=0.0, layer_scale=False, class_position=True):
        super().__init__()
        self.image_size, self.patch_size = image_size, patch_size
        self.class_position = class_position
        num_patches = (image_size // patch_size) ** 2
        self.patch_embed = PatchEmbed(patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, num_patches + class_position, dim))
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, drop_path * i / max(1, depth - 1), layer_scale)
            for i in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        for parameter in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def embed(self, images):
        if images.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(f"images of {tuple(images.shape[-2:])} pixels, but this ViT is built "
                             f"for image_size={self.image_size}")
        x, cls = self.patch_embed(images), self.cls_token.expand(len(images), -1, -1)
        if self.class_position:
            return torch.cat([cls, x], 1) + self.pos_embed                  # (B, 1+N, D)
        return torch.cat([cls, x + self.pos_embed], 1)                      # (B, 1+N, D)

    def features(self, images):
        """(shallow, deep, logits): patch tokens after blocks 0 and 1, list of two (B, N, D); patch
        tokens after the final norm (B, N, D); logits (B, C)."""
        x, shallow = self.embed(images), []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i < 2:
                shallow.append(x[:, 1:])
        x = self.norm(x)
        return shallow, x[:, 1:], self.head(x[:, 0])

    def forward(self, images):
        return self.features(images)[2]


# ------------------------------------------------------------------ the teacher

RELEASES = "https://dl.fbaipublicfiles.com/deit/"
TEACHERS = {  # name: (dim, depth, num_heads, is DeiT III, file; hex digits start its sha256)
    "deit_t": (192, 12, 3, False, "deit_tiny_patch16_224-a1311bcf.pth"),
    "deit_s": (384, 12, 6, False, "deit_small_patch16_224-cd65a155.pth"),
    "deit_b": (768, 12, 12, False, "deit_base_patch16_224-b5f2ef4d.pth"),
    "deit3_s": (384, 12, 6, True, "deit_3_small_224_21k.pth"),
    "deit3_b": (768, 12, 12, True, "deit_3_base_224_21k.pth"),
    "deit3_l": (1024, 24, 16, True, "deit_3_large_224_21k.pth")}


def load_teacher(name, weights=None, num_classes=1000, image_size=224):
    """A frozen ViT in eval mode, for images of `image_size` pixels.

    name: one of TEACHERS, its weights read from the file `weights` or else downloaded; or the path
    of a student.pth of vitkd.py. Patch size, native image size and class count are read off
    released weights; at another image size the position embedding is resized.
    Raises common.Abort: unknown name, no download, weights missing, damaged or of another model, a
    head that has not `num_classes` classes, an image size that the patch size does not divide.
    """
    if name in TEACHERS:
        source = weights or RELEASES + TEACHERS[name][-1]
        state = common.load_checkpoint(weights) if weights else download(source)
        state = state if isinstance(state, dict) else {}
        state = state["model"] if isinstance(state.get("model"), dict) else state
        state = {str(k).replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma"): v
                 for k, v in state.items()}
        arch = released_arch(name, state)
    elif Path(name).is_file():
        source, checkpoint = name, common.load_export(name)
        if checkpoint["script"] != "vitkd":
            raise common.Abort(f"{name} was written by {checkpoint['script']}.py, whose ViT has "
                               f"no classes, or is another one")
        state, arch = checkpoint["model"], checkpoint["arch"]
    else:
        raise common.Abort(f"no teacher {name}: take {', '.join(TEACHERS)}, "
                           f"the path of a student.pth, or none")

    problems = common.mismatches(state, ViT, arch)
    if problems:
        fits = [n for n in TEACHERS if not common.mismatches(state, ViT, released_arch(n, state))]
        raise common.Abort(f"{source} does not hold a {name}: " + "; ".join(problems)
                           + (f"; it fits --teacher {fits[0]}" if fits else ""))
    if arch["num_classes"] != num_classes:
        raise common.Abort(f"the teacher in {source} has {arch['num_classes']} classes, "
                           f"the data {num_classes}")
    if image_size % arch["patch_size"]:
        raise common.Abort(f"--image-size {image_size} is not a multiple of the teacher's patch "
                           f"size {arch['patch_size']}")
    state["pos_embed"] = resize_pos_embed(state["pos_embed"], image_size // arch["patch_size"])
    teacher = ViT(**{**arch, "image_size": image_size})
    teacher.load_state_dict(state)
    return teacher.requires_grad_(False).eval()


def download(url):
    try:
        with contextlib.redirect_stderr(sys.stdout):  # its progress is no error
            return torch.hub.load_state_dict_from_url(  # into torch.hub's cache, or from it
                url, map_location="cpu", weights_only=True, check_hash="-" in Path(url).name)
    except (OSError, RuntimeError) as error:  # no network; another file's hash
        raise common.Abort(f"cannot download {url} ({error}); fetch it elsewhere and give it "
                           f"with --teacher-weights FILE")
    except (EOFError, pickle.UnpicklingError):  # EOFError: an empty file
        raise common.Abort(f"what was downloaded from {url} is not a weights file: delete "
                           f"{torch.hub.get_dir()}/checkpoints/{Path(url).name}")


def released_arch(name, state):
    """ViT's arguments for the teacher `name`: its size, and what the weights themselves say.

    Where the weights lack a key, any value serves: mismatches() will report the key. DeiT III's
    pos_embed has N = g*g rows, DeiT's 1 + N."""
    dim, depth, num_heads, deit3, _ = TEACHERS[name]

    def shape(key, otherwise):
        found = getattr(state.get(key), "shape", ())
        return found if len(found) == len(otherwise) and 0 not in found else otherwise

    rows = shape("pos_embed", (1, 197, dim))[1]
    patch_size = shape("patch_embed.proj.weight", (dim, 3, 16, 16))[-1]
    return {"image_size": math.isqrt(rows) * patch_size, "patch_size": patch_size, "dim": dim,
            "depth": depth, "num_heads": num_heads, "layer_scale": deit3,
            "class_position": math.isqrt(rows) ** 2 != rows,
            "num_classes": shape("head.weight", (1000, dim))[0]}


def resize_pos_embed(pos_embed, grid):
    """(1, [1+]N, D) -> (1, [1+]grid*grid, D): the patch part bicubically, the class row as it is.

    antialias=True turns torch's cubic kernel from a = -0.75 into a = -0.5, which keeps ramps."""
    old = math.isqrt(pos_embed.shape[1])
    cls, patches = pos_embed[:, :-old * old], pos_embed[:, -old * old:]
    if grid != old:
        patches = patches.reshape(1, old, old, -1).permute(0, 3, 1, 2)      # (1, D, old, old)
        patches = F.interpolate(patches.float(), (grid, grid), mode="bicubic", antialias=True)
        patches = patches.flatten(2).transpose(1, 2)                        # (1, grid*grid, D)
    return torch.cat([cls, patches], 1)


# ------------------------------------------------------------------ training

# ImageNet-1k top-1 of the students trained alone (paper): a teacher below that makes them worse.
PUBLISHED_BASELINE = {"deit_t": 74.42, "deit_s": 80.55, "deit_b": 81.76}
PAPER_TEACHER_DIM = {"micro": 384, "deit_t": 384, "deit_s": 768, "deit_b": 1024}


class Objective(nn.Module):
    """The student and all that is trained with it: one module, so that DistributedDataParallel
    averages every gradient."""

    def __init__(self, student, distiller, args):
        super().__init__()
        self.student, self.distiller, self.args = student, distiller, args

    def forward(self, images, target, teacher_features):
        """Loss terms by name. images (B, 3, S, S), target (B,) or (B, C); what the teacher's
        features() gives for the same images, or None."""
        shallow, deep, logits = self.student.features(images)
        losses = {"ce": F.cross_entropy(logits.float(), target,
                                        label_smoothing=self.args.label_smoothing)}
        if teacher_features is not None:
            teacher_shallow, teacher_deep, teacher_logits = teacher_features
            losses["mimicking"], losses["generation"] = self.distiller(
                shallow, deep, teacher_shallow, teacher_deep)
            if not self.args.no_nkd:
                losses["nkd"] = nkd_loss(logits, teacher_logits, target,
                                         self.args.gamma, self.args.tau)
        return losses


def train(args, device):
    """Train args.student, with args.teacher or alone. Returns the last epoch's record."""
    started = time.perf_counter()
    common.check_flags(args)
    transform = common.train_transform(args.image_size, (args.crop_scale, 1.0), args.rand_augment,
                                       args.random_erasing)
    train_set, val_set, num_classes = common.rank_zero_first(
        lambda: common.load_data(args, transform))
    args.num_classes = num_classes
    autocast, scaler = common.set_precision(args, device)

    teacher, distiller = None, None
    dim, depth, num_heads = SIZES[args.student]
    arch = {"image_size": args.image_size, "patch_size": args.patch_size, "dim": dim,
            "depth": depth, "num_heads": num_heads, "num_classes": num_classes}
    torch.manual_seed(args.seed)
    student = ViT(**arch, drop_path=args.drop_path)
    if args.teacher != "none":
        teacher = common.rank_zero_first(lambda: load_teacher(
            args.teacher, args.teacher_weights, num_classes, args.image_size)).to(device)
        args.teacher_checksum = common.checksum(teacher)
        if teacher.patch_size != args.patch_size:
            raise common.Abort(f"the teacher's patch size is {teacher.patch_size}, and ViTKD needs "
                               f"the same patches: --patch-size {teacher.patch_size}")
        distiller = ViTKDLoss(dim, teacher.cls_token.shape[-1], args.alpha, args.beta,
                              args.mask_ratio)
    model = Objective(student, distiller, args).to(device)
    ema = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(args.ema)) if args.ema else None
    trained = ema.module if ema else student  # what is evaluated and exported
    optimizer = torch.optim.AdamW(common.parameter_groups(model, args.weight_decay), lr=args.lr,
                                  betas=(0.9, 0.999), fused=True)

    checkpoint = common.open_run(args)
    first_epoch, best = 0, -1.0
    if checkpoint:
        first_epoch, best = checkpoint["epoch"], checkpoint["best"]
        student.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        if distiller:
            distiller.load_state_dict(checkpoint["distiller"])
        if ema:
            ema.load_state_dict(checkpoint["ema"])
        del checkpoint  # its memory

    loader, val_batches = common.train_loader(train_set, args), common.val_loader(val_set, args)
    if teacher and not first_epoch:
        check_teacher(teacher, val_batches, device, autocast, args)
    mix = [v2.MixUp(alpha=args.mixup, num_classes=num_classes)] if args.mixup else []
    mix += [v2.CutMix(alpha=args.cutmix, num_classes=num_classes)] if args.cutmix else []
    mix = v2.RandomChoice(mix) if mix else lambda *batch: batch  # one of them per batch
    teach = teacher and teacher.features
    if args.compile:  # in place: the names in state_dict() stay; evaluation runs eagerly
        model.compile(dynamic=False)
        teach = teach and torch.compile(teach, dynamic=False)
    ddp = model
    if common.world_size() > 1:
        ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    prepared, began, record = time.perf_counter() - started, time.perf_counter(), None

    for epoch in range(first_epoch, args.epochs):
        torch.manual_seed(common.mix_seed(args.seed, epoch, common.rank()))
        books = common.Epoch(loader, epoch, args, device)
        model.train()
        for step, (images, target, parts) in enumerate(books.batches()):
            lr = common.learning_rate(epoch * len(loader) + step, args, len(loader))
            for group in optimizer.param_groups:
                group["lr"] = lr
            images, target = mix(images, target)
            for part, weight, last in parts:  # micro-batches; weight: share of the step's mean
                with contextlib.nullcontext() if last or ddp is model else ddp.no_sync():
                    with autocast():
                        with torch.no_grad():
                            guide = teach(images[part]) if teach else None
                        losses = ddp(images[part], target[part], guide)
                    scaler.scale(weight * sum(losses.values())).backward()
                books.add(losses, weight)
            books.optimizer_step(optimizer, scaler)  # clips; skips a step that is not finite
            if ema:
                ema.update_parameters(student)
        if args.dry_run:
            return common.report_dry_run(args, [(books, args.epochs)], trained, teacher, [val_set],
                                         autocast, prepared)

        record = {**books.record(), "lr": lr}
        top1 = None
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
            record.update(common.evaluate(trained, val_batches, device, autocast))
            top1 = record["top1"]
        record["seconds"] = time.perf_counter() - books.started
        per_epoch = (time.perf_counter() - began) / (epoch + 1 - first_epoch)
        common.log_epoch(args, record, per_epoch * (args.epochs - epoch - 1))
        if common.rank() == 0:
            export = {"model": trained.state_dict(), "arch": arch, "script": "vitkd", "top1": top1}
            common.save_checkpoint(f"{args.out}/student.pth", **export)
            if top1 is not None and top1 > best:
                best = top1
                common.save_checkpoint(f"{args.out}/best.pth", **export)
            common.save_checkpoint(
                f"{args.out}/last.pth", **{**export, "model": student.state_dict()},
                distiller=distiller.state_dict() if distiller else None,
                ema=ema.state_dict() if ema else None,
                optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), epoch=epoch + 1,
                best=best, args=common.comparable(args))
    return record


def check_teacher(teacher, val_batches, device, autocast, args):
    """Print the teacher's top-1 at this run's size; warn if it can only do harm."""
    few = 4 if args.dry_run else None
    top1 = common.evaluate(teacher, val_batches, device, autocast, few)["top1"]
    common.say(f"teacher {args.teacher}: top-1 {top1:.2f} % at {args.image_size} px"
               + (f", on the first {few} batches" if few else ""))
    baseline = PUBLISHED_BASELINE.get(args.student, 0) if args.num_classes == 1000 else 0
    if top1 < baseline:
        common.warn(f"that is below {args.student} trained alone ({baseline} %, paper): it would "
                    f"make the student worse. Were its weights made for another image size?")
    N, D_t = teacher.pos_embed.shape[1] - teacher.class_position, teacher.cls_token.shape[-1]
    scale = 196 * PAPER_TEACHER_DIM[args.student] / (N * D_t)
    if scale != 1 and (args.alpha, args.beta) == (ALPHA, BETA):
        common.warn(f"--alpha and --beta are the paper's; the same weight per element with {N} "
                    f"tokens of width {D_t}: --alpha {ALPHA * scale:.2g} --beta {BETA * scale:.2g}")


# ------------------------------------------------------------------ command line


def parse_args():
    parser = common.Parser(__doc__)
    parser.add_flags("data", common.data_flags())
    parser.add_flags("models", [
        ("--student", "deit_t", f"the ViT to train: {', '.join(SIZES)}"),
        ("--teacher", "deit3_s", "see above"),
        ("--teacher-weights", str, "file of the named teacher's weights (default: download them)"),
        ("--patch-size", 16, "pixels a side of a patch; the teacher's must be the same",
         "[1, inf)"),
        ("--drop-path", float, "stochastic depth (default: 0.1 for deit_b, else 0)", "[0, 1)")],
        f"Teachers: {', '.join(TEACHERS)};\nthe path of a student.pth; "
        "or none: train the student without a teacher.")
    parser.add_flags("loss", [
        ("--alpha", ALPHA, "weight of mimicking, L_m", "[0, inf)"),
        ("--beta", BETA, "weight of generation, L_g", "[0, inf)"),
        ("--mask-ratio", 0.5, "lambda: part of the student's deep tokens that is masked",
         "(0, 1]"),
        ("--no-nkd", False, "leave out NKD, the logit loss"),
        ("--gamma", 1.0, "NKD: weight of the non-target term", "[0, inf)"),
        ("--tau", 1.0, "NKD: temperature of the non-target term", "(0, inf)")],
        "L_m and L_g are sums over N tokens x D_t channels: alpha and beta are for N = 196.\n"
        "Elsewhere multiply them by (196 * D_ref) / (N * D_t) to keep the weight per element;\n"
        "D_ref is the paper's teacher width: 384, 768, 1024 for deit_t, deit_s, deit_b.")
    parser.add_flags("recipe", [
        *common.recipe_flags(batch_size=1024, epochs=300, min_lr=1e-5, weight_decay=0.05,
                             clip_grad=5.0),
        ("--crop-scale", 0.08, "smallest part of an image's area that a random crop keeps",
         "(0, 1]"),
        ("--label-smoothing", 0.1, "of the supervised loss", "[0, 1]"),
        ("--mixup", 0.8, "alpha of MixUp, 0: none", "[0, inf)"),
        ("--cutmix", 1.0, "alpha of CutMix, 0: none; with both, one of them per batch", "[0, inf)"),
        ("--rand-augment", 9, "magnitude of RandAugment, 0 to 10, 0: none", "[0, 10]"),
        ("--random-erasing", 0.25, "probability of RandomErasing", "[0, 1]"),
        ("--ema", float, "decay of averaged weights to export, 0: none (default: deit_b 0.99996)",
         "[0, 1)")],
        "Peak learning rate: 1e-3 for batches of 1024, in proportion for others.\n"
        "Warm-up: 20 epochs, or a tenth of --epochs where that is less.")
    parser.add_flags("run", common.run_flags())
    args = parser.parse_args()

    if args.student not in SIZES:
        parser.error(f"no student {args.student}: take {', '.join(SIZES)}")
    if args.teacher_weights and args.teacher not in TEACHERS:
        parser.error(f"--teacher-weights goes with a teacher's name, not with {args.teacher}")
    if args.lr is None:
        args.lr = 1e-3 * args.batch_size / 1024
    if args.warmup_epochs is None:
        args.warmup_epochs = min(20, args.epochs / 10)
    if args.drop_path is None:
        args.drop_path = 0.1 if args.student == "deit_b" else 0.0
    if args.ema is None:
        args.ema = 0.99996 if args.student == "deit_b" else 0.0
    if args.out is None:
        teacher = Path(args.teacher)
        args.out = f"out/vitkd-{args.student}-{teacher.parent.name or teacher.name}"
    return args


def demo(args, device):
    """Teacher, student alone, student distilled, on shapes: the same seed for both students."""
    if common.world_size() > 1:
        raise common.Abort("--demo is for a single process")
    args.data, args.image_size, args.patch_size, args.batch_size = "shapes", 32, 8, 50
    args.student, args.lr, args.eval_every = "micro", 1e-3, 10**9
    args.dry_run, args.resume = False, None
    args.mixup = args.cutmix = args.label_smoothing = args.ema = args.drop_path = 0.0
    scale = 196 * 384 / (16 * 96)  # to 16 tokens of width 96
    args.alpha, args.beta = ALPHA * scale, BETA * scale
    table = []
    with tempfile.TemporaryDirectory() as folder:
        for name, teacher, epochs in (("teacher", "none", 40), ("student alone", "none", 10),
                                      ("student distilled", f"{folder}/teacher/student.pth", 10)):
            run = copy.copy(args)
            run.out, run.teacher = f"{folder}/{name.split()[-1]}", teacher
            run.epochs, run.warmup_epochs = epochs, epochs / 10
            common.say(f"--- {name}, {epochs} epochs")
            started = time.perf_counter()
            top1 = train(run, device)["top1"]
            table.append(f"{name:20s} top-1 {top1:5.1f} %  {time.perf_counter() - started:4.0f} s")
    common.say("\n" + "\n".join(table))


def main():
    args = parse_args()
    device = common.init_processes()
    if args.demo:
        return demo(args, device)
    train(args, device)


if __name__ == "__main__":
    common.run(main)
