"""ViTKD: distil a supervised vision transformer into a smaller one through its features.

Yang et al., "ViTKD: Practical Guidelines for ViT Feature Knowledge Distillation", arXiv 2209.02432,
with NKD, the logit loss of Yang et al., arXiv 2303.13005.

In their first blocks teacher and student attend to similar patches, so the student can copy what
the teacher computes there. In their last blocks they do not, and copying harms. Therefore
  - shallow (after blocks 0 and 1): the student MIMICS the teacher's patch tokens;
  - deep (after the final norm): half of the student's patch tokens are masked, and a small
    convolutional network must GENERATE the teacher's tokens there from the other half;
  - logits: NKD distils the probability of the target class and the distribution over the other
    classes as two terms.

Formulas, constants and recipe are the authors' (papers and released code). Ours:
  - alpha and beta are scaled to other numbers of tokens and widths;
  - the learning rate is scaled by the root of the batch size;
  - warm-up takes at most a tenth of the run;
  - a step without finite gradients is skipped;
  - all linear layers begin with DeiT's deviation of 0.02;
  - the moving average of the weights begins with a small decay, which grows to --ema-decay;
  - RandAugment lacks SolarizeAdd, as torchvision's does.

DeiT-T distilled from DeiT III-S on ImageNet-1k, and a demo for a laptop:
    torchrun --nproc_per_node 8 vitkd.py --data data/imagenet --teacher deit3_s --student deit_t
    python vitkd.py --demo
Top-1 of DeiT-T (paper): 74.42 % alone, 76.06 % with ViTKD, 77.78 % with ViTKD and NKD.
Measured: micro from a fine-tuned DeiT-T of 92 %, 3 epochs of CIFAR-10 at 112 px, batch 64, crop
and flip only, three seeds. Top-1 is 50.2 % alone, 62.8 % with ViTKD, 61.1 % with ViTKD and NKD. So
in short runs NKD did not add to ViTKD; --no-nkd leaves it out (one AMD EPYC core, bf16 or float32,
2026-11-27 and 28; tests/evidence/README.md).
"""

import argparse
import math
import tempfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torchvision.ops import StochasticDepth
from torchvision.transforms import v2

import common

# ------------------------------------------------------------------ the loss


class ViTKDLoss(nn.Module):
    """Feature distillation between two ViTs with the same patch grid (arXiv 2209.02432, section 3).

    forward(student_shallow, student_deep, teacher_shallow, teacher_deep) -> (L_m, L_g), scalars:
        shallow: list of two (B, N, D_s or D_t), patch tokens after blocks 0 and 1
        deep: (B, N, D_s or D_t), patch tokens after the final norm, of a square grid
    Leave the class token out, and run the teacher under torch.no_grad(). Add both terms to the
    cross-entropy. This module has parameters: train them with the student, then drop them.

    L_m sums over tokens, channels and the two blocks, L_g over masked tokens and channels, so both
    grow with N * D_t. The defaults of alpha and beta are the paper's, for N = 196 and a teacher of
    width D_ref: 384 for the student DeiT-T, 768 for DeiT-S, 1024 for DeiT-B. For other sizes
    multiply both by 196 * D_ref / (N * D_t). mask_ratio is the paper's lambda. Only the student's
    output tokens are masked: it sees the whole image.
    """

    def __init__(self, student_dim, teacher_dim, alpha=3e-5, beta=3e-6, mask_ratio=0.5):
        super().__init__()
        if not 0 < mask_ratio <= 1:
            raise ValueError(f"mask_ratio {mask_ratio}: it must be above 0 and at most 1")
        self.alpha = alpha
        self.beta = beta
        self.mask_ratio = mask_ratio

        def make_align():  # from the student's width to the teacher's
            if student_dim == teacher_dim:
                return nn.Identity()
            return nn.Linear(student_dim, teacher_dim)

        self.align_shallow = nn.ModuleList([make_align(), make_align()])
        self.align_deep = make_align()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, teacher_dim))
        self.generator = nn.Sequential(
            nn.Conv2d(teacher_dim, teacher_dim, 3, padding=1), nn.ReLU(),
            nn.Conv2d(teacher_dim, teacher_dim, 3, padding=1))

    def forward(self, student_shallow, student_deep, teacher_shallow, teacher_deep):
        B, N, _ = student_deep.shape
        g = math.isqrt(N)
        for tokens in (student_deep, teacher_deep, *student_shallow, *teacher_shallow):
            if tokens.shape[1] != g * g:
                raise ValueError(f"{N} and {tokens.shape[1]} patch tokens: no common square grid")

        # L_m = alpha/B * sum over blocks i = 0, 1 of || A_i(F_i^s) - F_i^t ||^2
        mimicking = 0
        pairs = zip(self.align_shallow, student_shallow, teacher_shallow, strict=True)
        for align, s, t in pairs:
            mimicking = mimicking + (align(s).float() - t.float()).square().sum()
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
    """Return (B, N) bool, True = masked: N - floor(N * (1 - mask_ratio)) tokens of each image."""
    # 10 * (1 - 0.9) is 0.9999... in floating point: 1e-9 makes it a whole 1 again
    num_visible = math.floor(num_tokens * (1 - mask_ratio) + 1e-9)
    num_masked = num_tokens - num_visible
    # The order of random numbers is a random permutation of 0 .. N-1, one for each image
    permutation = torch.rand(batch_size, num_tokens, device=device).argsort(dim=1)
    return permutation < num_masked


def nkd_loss(student_logits, teacher_logits, target, gamma=1.0, temperature=1.0):
    """NKD (arXiv 2303.13005, section 3), a scalar: a term for the target class, one for the others.

    logits: (B, C). target: (B,) classes, or (B, C) mixed labels, where the largest is the target.
    Run the teacher under torch.no_grad(). The defaults are those used beside ViTKD; NKD alone takes
    gamma 1.5 on ImageNet.
    """
    student_logits = student_logits.float()
    teacher_logits = teacher_logits.float()
    if target.ndim == 2:
        if target.shape != student_logits.shape:
            raise ValueError(f"labels of shape {tuple(target.shape)}: give (B,) or (B, C)")
        target = target.argmax(1)
    target = target[:, None]                                                        # (B, 1)

    # - p_t(y) log p_s(y), t: teacher, s: student
    p_t = teacher_logits.softmax(1).gather(1, target)
    log_p_s = student_logits.log_softmax(1).gather(1, target)
    target_term = -p_t * log_p_s                                                    # (B, 1)

    # - sum_{i != y} n_t(i) log n_s(i), n: softmax over the other logits / tau, tau: temperature
    def others(logits):
        # exp(-1e30) is 0, so the target leaves the softmax. With -inf, n * log n would be NaN.
        return (logits / temperature).scatter(1, target, -1e30)

    n_t = others(teacher_logits).softmax(1)
    log_n_s = others(student_logits).log_softmax(1)
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
        B, T, D = x.shape                                                   # T: all tokens
        qkv = self.qkv(x).view(B, T, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                # (B, H, T, D/H) each
        x = F.scaled_dot_product_attention(q, k, v)                         # (B, H, T, D/H)
        return self.proj(x.transpose(1, 2).reshape(B, T, D))


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


# ------------------------------------------------------------------ weights from other ViTs


def fold_layer_scale(weights):
    """Multiply LayerScale into the layer before it: gamma * (W x + b) = (gamma W) x + gamma b.

    So a plain ViT computes what DeiT III (gamma_1, gamma_2) or DINOv2 (ls1.gamma) computes.
    """
    folded = dict(weights)
    for name, gamma in weights.items():                                     # gamma: (D,)
        block = ".".join(name.split(".")[:2])                               # "blocks.0"
        if name.endswith((".gamma_1", ".ls1.gamma")):
            layer = f"{block}.attn.proj"
        elif name.endswith((".gamma_2", ".ls2.gamma")):
            layer = f"{block}.mlp.fc2"
        else:
            continue
        weight = weights.get(f"{layer}.weight")                             # (D, D_in)
        bias = weights.get(f"{layer}.bias")                                 # (D,)
        if weight is None or bias is None or bias.shape != gamma.shape:
            continue  # another model: load_strictly will say so
        folded[f"{layer}.weight"] = gamma[:, None] * weight
        folded[f"{layer}.bias"] = gamma * bias
        del folded[name]
    return folded


def fold_normalization(weights, mean, std):
    """Let a ViT made for (pixel - mean) / std take images normalised by common.MEAN and STD.

    The ViT needs (x * STD + MEAN - mean) / std instead of such an image x: in each channel
    scale * x + shift. The first layer, a convolution without padding, can absorb both.
    """
    scale = torch.tensor(common.STD) / torch.tensor(std)                    # (3,)
    shift = (torch.tensor(common.MEAN) - torch.tensor(mean)) / torch.tensor(std)
    weight = weights["patch_embed.proj.weight"]                             # (D, 3, P, P)
    bias = weights["patch_embed.proj.bias"]                                 # (D,)
    return {
        **weights,
        "patch_embed.proj.weight": weight * scale[:, None, None],
        "patch_embed.proj.bias": bias + weight.sum((2, 3)) @ shift,
    }


def resize_position(pos_embed, grid):
    """Resize a position embedding (1, P + g*g, D) to (1, 1 + grid*grid, D), bicubically.

    P = 1: the first row belongs to the class token and stays. P = 0 in DeiT III, which adds no
    position to the class token: then a row of zeros is put in front. This is the way of DeiT, MAE
    and timm. DINO, iBOT and DINOv2 resize slightly differently (attndistill.py).
    """
    g = math.isqrt(pos_embed.shape[1])  # the root of 1 + g*g rounds down to g
    class_token, patches = pos_embed.tensor_split([pos_embed.shape[1] - g**2], dim=1)
    if class_token.shape[1] == 0:
        class_token = torch.zeros_like(patches[:, :1])
    if g != grid:
        patches = patches.unflatten(1, (g, g)).permute(0, 3, 1, 2)          # (1, D, g, g)
        patches = F.interpolate(patches, (grid, grid), mode="bicubic")
        patches = patches.flatten(2).transpose(1, 2)                        # (1, grid*grid, D)
    return torch.cat([class_token, patches], 1)


def load_weights(vit, weights, source):
    """Load weights strictly, after resizing their position embedding to the ViT's image size."""
    position = weights.get("pos_embed", torch.empty(0))
    if position.ndim == 3 and position.shape[1] > 1:  # else load_strictly will refuse it
        grid = math.isqrt(vit.pos_embed.shape[1])  # of 1 + grid*grid rows
        weights = {**weights, "pos_embed": resize_position(position, grid)}
    common.load_strictly(vit, weights, source)


def load_init(student, path):
    """Start a student from a file of ViT weights. It keeps its new head if class counts differ."""
    weights = fold_layer_scale(common.read_weights(path))
    # Parts of self-supervised training (DINOv2, iBOT, MAE's decoder)
    unused = ("mask_token", "masked_embed", "decoder_")
    weights = {name: x for name, x in weights.items() if not name.startswith(unused)}
    head = student.head.state_dict(prefix="head.")
    if "head.bias" not in weights or weights["head.bias"].shape != head["head.bias"].shape:
        weights = {name: x for name, x in weights.items() if not name.startswith("head.")}
        weights.update(head)
        common.print0(f"{path}: the head is new")
    load_weights(student, weights, path)


# ------------------------------------------------------------------ the teacher

# file: below https://dl.fbaipublicfiles.com/deit/, or None if there is no download. Hex digits at
# the end of a file's name are the start of its sha256, and are checked. DeiT III's have none; 21k
# in their names: trained on ImageNet-21k, then fine-tuned on ImageNet-1k.
# mean, std: of the images that the ViT was made for, where they are not ImageNet's.
HALF = (0.5, 0.5, 0.5)
TEACHERS = {
    "deit_t": {"size": "deit_t", "file": "deit_tiny_patch16_224-a1311bcf.pth"},
    "deit_s": {"size": "deit_s", "file": "deit_small_patch16_224-cd65a155.pth"},
    "deit_b": {"size": "deit_b", "file": "deit_base_patch16_224-b5f2ef4d.pth"},
    "deit3_s": {"size": "deit_s", "file": "deit_3_small_224_21k.pth"},
    "deit3_b": {"size": "deit_b", "file": "deit_3_base_224_21k.pth"},
    "deit3_l": {"size": "deit_l", "file": "deit_3_large_224_21k.pth"},
    # timm's vit_{tiny,small,base,large}_patch16_224
    "augreg_t16": {"size": "deit_t", "file": None, "mean": HALF, "std": HALF},
    "augreg_s16": {"size": "deit_s", "file": None, "mean": HALF, "std": HALF},
    "augreg_b16": {"size": "deit_b", "file": None, "mean": HALF, "std": HALF},
    "augreg_l16": {"size": "deit_l", "file": None, "mean": HALF, "std": HALF},
}


def find_teacher(name, weights):
    """Return (file or address of the weights, arguments of ViT, row of TEACHERS or {})."""
    if name in TEACHERS:
        row = TEACHERS[name]
        if not weights and not row["file"]:
            raise common.InputError(f"{name} has no download: give its file as --teacher-weights")
        source = weights or f"https://dl.fbaipublicfiles.com/deit/{row['file']}"
        return source, SIZES[row["size"]], row
    if not Path(name).is_file():
        raise common.InputError(f"unknown teacher {name}: choose {', '.join(TEACHERS)}, none, "
                                "or the path of a student.pth")
    if weights:
        raise common.InputError(f"--teacher {name} is a file already: leave out --teacher-weights")
    saved = common.load_checkpoint(name)
    if not (isinstance(saved, dict) and saved.get("script") == "vitkd" and "arch" in saved):
        raise common.InputError(
            f"{name} is not a student.pth of vitkd.py. For a file of other weights choose the "
            f"name, {', '.join(TEACHERS)}, and give the file as --teacher-weights")
    return name, saved["arch"], {}


def load_teacher(name, weights=None, num_classes=1000, image_size=224):
    """Return a frozen ViT in eval mode, for images of `image_size` pixels.

    name: one of TEACHERS, with its weights in the file `weights` or else downloaded; or the path
    of a student.pth. The patch size is that of the weights. Raises common.InputError, a
    ValueError, if the name is unknown or the file does not fit.
    """
    source, arch, row = find_teacher(name, weights)
    state = fold_layer_scale(common.read_weights(source))
    kernel = state["patch_embed.proj.weight"]                               # (D, 3, P, P)
    if kernel.ndim != 4 or kernel.shape[1] != 3 or "patch_embed.proj.bias" not in state:
        raise common.InputError(f"{source}: patch_embed.proj must be a convolution of RGB images "
                                "with a bias")
    if "mean" in row:
        state = fold_normalization(state, row["mean"], row["std"])

    patch_size = kernel.shape[-1]
    if image_size % patch_size:
        raise common.InputError(f"image size {image_size} is not a multiple of the patch size "
                                f"{patch_size} of {source}")
    if "head.bias" not in state:
        raise common.InputError(f"{source} has no head: the teacher must be a classifier")
    teacher_classes = len(state["head.bias"])
    if teacher_classes != num_classes:
        raise common.InputError(
            f"the teacher has {teacher_classes} classes, the data {num_classes}: see 'An ImageNet "
            "teacher for some of its classes' in README.md")

    arch = {**arch, "image_size": image_size, "patch_size": patch_size, "num_classes": num_classes}
    teacher = ViT(**arch)
    load_weights(teacher, state, source)
    return teacher.requires_grad_(False).eval()


# ------------------------------------------------------------------ training

# On ImageNet-1k (paper): top-1 without a teacher, and the width of the teacher. micro is ours.
STUDENTS = {
    "micro": {"paper_top1": 0.0, "paper_teacher_dim": 384},
    "deit_t": {"paper_top1": 74.42, "paper_teacher_dim": 384},
    "deit_s": {"paper_top1": 80.55, "paper_teacher_dim": 768},
    "deit_b": {"paper_top1": 81.76, "paper_teacher_dim": 1024},
}


class Distillation(nn.Module):
    """Everything that is trained, in one module for one DistributedDataParallel.

    forward(images, target, teacher_features) -> {name: loss term}; the loss is their sum.
    teacher_features: what the teacher's features(images) returns; None for a student alone.
    """

    def __init__(self, student, vitkd_loss, label_smoothing=0.1, nkd=True, gamma=1.0):
        super().__init__()
        self.student = student
        self.vitkd_loss = vitkd_loss
        self.label_smoothing = label_smoothing
        self.nkd = nkd
        self.gamma = gamma

    def forward(self, images, target, teacher_features):
        shallow, deep, logits = self.student.features(images)
        losses = {}
        losses["ce"] = F.cross_entropy(logits.float(), target, label_smoothing=self.label_smoothing)
        if teacher_features is not None:
            teacher_shallow, teacher_deep, teacher_logits = teacher_features
            losses["mimicking"], losses["generation"] = self.vitkd_loss(
                shallow, deep, teacher_shallow, teacher_deep)
            if self.nkd:
                losses["nkd"] = nkd_loss(logits, teacher_logits, target, self.gamma)
        return losses


def train(args, device):
    """Train args.student with args.teacher, or alone. Return the record of the last epoch."""

    # ---- precision ----
    args.amp = args.amp or common.best_precision(device)
    common.describe_run(device, args.amp)
    common.choose_attention_kernel(device, args.amp)
    autocast = torch.autocast(device.type, common.DTYPES[args.amp], enabled=args.amp != "off")
    # fp16 rounds small gradients to 0: the scaler multiplies the loss first. It is idle otherwise.
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")

    # ---- data ----
    train_images, val_images = common.load_data(args.data, args.val, args.image_size)
    num_classes = len(train_images.classes)
    indices = common.class_balanced_subset(train_images.targets, args.data_fraction)
    augment = common.train_transform(args.image_size, (args.crop_scale, 1.0), args.rand_augment,
                                     args.random_erasing)
    train_set = common.Images(train_images, indices, augment, args.seed)
    val_set = common.Images(val_images, range(len(val_images)),
                            common.val_transform(args.image_size), replace_unreadable=False)
    common.print_counts(train_set, val_set)
    train_batches = common.train_loader(train_set, args.batch_size, args.accum, args.workers,
                                        args.seed)
    # Images of one forward pass: what fits into memory in training also fits in evaluation
    chunk_size = args.batch_size // (common.world_size() * args.accum)
    val_batches = common.val_loader(val_set, chunk_size, args.workers)
    steps_per_epoch = len(train_batches)

    mixers = []
    if args.mixup:
        mixers.append(v2.MixUp(alpha=args.mixup, num_classes=num_classes))
    if args.cutmix:
        mixers.append(v2.CutMix(alpha=args.cutmix, num_classes=num_classes))
    mix = v2.RandomChoice(mixers) if mixers else None  # one of the two for each batch

    # ---- models ----
    torch.manual_seed(args.seed)
    arch = {**SIZES[args.student], "image_size": args.image_size, "patch_size": args.patch_size,
            "num_classes": num_classes}
    student = ViT(**arch, drop_path=args.drop_path)
    if args.init:
        load_init(student, args.init)

    teacher = None
    vitkd_loss = None
    if args.teacher != "none":
        teacher = load_teacher(args.teacher, args.teacher_weights, num_classes, args.image_size)
        teacher.to(device)
        teacher_patch_size = teacher.patch_embed["proj"].kernel_size[0]
        if teacher_patch_size != args.patch_size:
            raise common.InputError("teacher and student need the same patch size: add "
                                    f"--patch-size {teacher_patch_size}")
        # As ViTKDLoss says, this keeps the weight of each element as it is in the paper
        num_patches = (args.image_size // args.patch_size) ** 2
        teacher_dim = teacher.pos_embed.shape[2]
        scale = 196 * STUDENTS[args.student]["paper_teacher_dim"] / (num_patches * teacher_dim)
        vitkd_loss = ViTKDLoss(arch["dim"], teacher_dim, args.alpha * scale, args.beta * scale,
                               args.mask_ratio)

    model = Distillation(student, vitkd_loss, args.label_smoothing, not args.no_nkd, args.gamma)
    model.to(device)
    ema = common.moving_average(student, args.ema_decay)  # evaluated and saved; 0: the student

    # ---- optimiser ----
    groups = common.parameter_groups(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.999), fused=True)

    # ---- classes and image size of --init, --teacher and a resumed student ----
    trained_on = {"classes": list(train_images.classes), "image_size": args.image_size}
    resumed = f"{args.out}/student.pth" if args.resume else None
    for path in (args.init, args.teacher, args.teacher_weights, resumed):
        common.compare_with_training(path, **trained_on)

    # ---- resume, or measure the teacher ----
    stateful = {"model": model, "ema": ema, "optimizer": optimizer, "scaler": scaler}
    settings = {**vars(args), "num_classes": num_classes}  # --resume compares them
    log = []  # one record an epoch
    checkpoint = common.open_run(args.out, args.resume, settings)
    if checkpoint:
        log = checkpoint["log"]
        for name, part in stateful.items():
            part.load_state_dict(checkpoint[name])
    elif teacher:
        # A teacher made for another image size can be so bad that it harms the student
        top1 = common.evaluate(teacher, val_batches, device, autocast)
        common.print0(f"teacher {args.teacher}: top-1 {top1:.1f} % on the validation images")
        alone = STUDENTS[args.student]["paper_top1"]
        if num_classes == 1000 and top1 < alone:
            common.print0(f"WARNING: that is less than {args.student} reaches without a teacher, "
                          f"{alone} % (paper)")

    # ---- compile, and several processes ----
    if args.compile:
        model.compile(dynamic=False)  # in place, so that names in state_dict() stay as they are
        if teacher:
            teacher.features = torch.compile(teacher.features, dynamic=False)
    ddp = DDP(model, gradient_as_bucket_view=True) if common.world_size() > 1 else model
    bad_steps_in_a_row = 0

    for epoch in range(len(log), args.epochs):
        # A resumed run draws the same random numbers as an uninterrupted one
        torch.manual_seed(common.seed_of(args.seed, epoch, common.rank()))
        train_batches.sampler.set_epoch(epoch)  # the order of images
        train_set.epoch = epoch  # their augmentation
        model.train()
        loss_sums = defaultdict(float)
        skipped_steps = 0
        batches = common.TimedBatches(train_batches, epoch, args.epochs, args.batch_size)

        for step, (images, target) in enumerate(batches, start=1):
            images = images.to(device, non_blocking=True)
            target = target.to(device, non_blocking=True)

            # ---- learning rate ----
            lr = common.learning_rate(epoch + step / steps_per_epoch, args.epochs, args.lr,
                                      args.min_lr, args.warmup_epochs)
            for group in optimizer.param_groups:
                group["lr"] = lr

            # ---- MixUp or CutMix: the teacher sees the mixed images, too ----
            if mix:
                images, target = mix(images, target)                        # target: (B, C)

            # ---- forward and backward, in equal chunks to save memory ----
            chunks = zip(images.chunk(args.accum), target.chunk(args.accum))
            for i, (x, y) in enumerate(chunks):
                # Gradients add up from chunk to chunk. DDP averages them over the processes, which
                # is needed only once: in the last backward pass. Without DDP this has no effect.
                ddp.require_backward_grad_sync = i == args.accum - 1
                with torch.no_grad(), autocast:
                    teacher_features = teacher.features(x) if teacher else None
                with autocast:
                    losses = ddp(x, y, teacher_features)
                loss = sum(losses.values()) / args.accum
                scaler.scale(loss).backward()
                for name, term in losses.items():
                    # For the log alone. NaN and inf count as 0, or the epoch's mean would be NaN.
                    loss_sums[name] += term.detach().nan_to_num(0, 0, 0) / args.accum

            # ---- step, if the averaged gradients are finite; all processes agree on that ----
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad or math.inf)
            if norm.isfinite():
                scaler.step(optimizer)
                ema.update_parameters(student)
                bad_steps_in_a_row = 0
            else:
                skipped_steps += 1
                bad_steps_in_a_row += 1
                if bad_steps_in_a_row == 20:
                    raise common.InputError("20 steps in a row had no finite gradients: lower "
                                            "--lr, or add --amp off")
            scaler.update()
            optimizer.zero_grad()

            if step % args.log_every == 0:
                batches.print_progress(loss_sums, lr)

        # ---- evaluation and log ----
        record = {
            "epoch": epoch + 1,
            **common.mean_over_processes(loss_sums, steps_per_epoch, device),
            "lr": lr,
            "skipped_steps": skipped_steps,
            **batches.speed(),
            "peak_memory_gb": common.peak_memory_gb(),
        }
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
            record["top1"] = common.evaluate(ema.module, val_batches, device, autocast)
        record["seconds"] = batches.seconds()
        log.append(record)
        common.log_epoch(args.out, log, args.epochs)

        # ---- checkpoints: the student as a plain ViT, and what --resume needs ----
        if common.rank() == 0:
            common.save_checkpoint(f"{args.out}/student.pth", model=common.cpu_weights(ema.module),
                                   arch=arch, script="vitkd", trained_on=trained_on)
            states = {name: part.state_dict() for name, part in stateful.items()}
            common.save_checkpoint(f"{args.out}/last.pth", **states, log=log, args=settings)
    return log[-1]


# ------------------------------------------------------------------ command line


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], usage="%(prog)s [--flag value ...]",
        epilog="Defaults are in parentheses.", allow_abbrev=False)
    parser.error = common.fail  # one line, also under torchrun

    data = parser.add_argument_group("data")
    data.add_argument("--data", default="data/imagenet",
                      help="folder that holds train/CLASS/* and val/CLASS/*; or cifar10, cifar100 "
                           "(downloaded to data/), shapes (drawn in memory) (%(default)s)")
    data.add_argument("--val", metavar="FOLDER",
                      help="folder of CLASS/* with the validation images, instead of val/")
    data.add_argument("--data-fraction", type=common.fraction, default=1.0,
                      help="share of the training images to use, the same in each class "
                           "(%(default)s)")
    data.add_argument("--image-size", type=common.positive_int, default=224,
                      help="side length in pixels, in training and validation (%(default)s)")
    data.add_argument("--workers", type=common.non_negative_int, default=common.WORKERS,
                      help="processes that load images, for each GPU; try more if the progress "
                           "lines show waiting for data (here %(default)s)")

    models = parser.add_argument_group("models")
    models.add_argument("--student", choices=STUDENTS, default="deit_t",
                        help="the ViT to train; micro, of 0.7 million parameters, is for CPUs "
                             "(%(default)s)")
    models.add_argument("--init", metavar="FILE",
                        help="start from a plain ViT of the student's size and patch size that was "
                             "made for ImageNet's mean and deviation (not AugReg, not MoCo v3's "
                             "ViT-S); a file or https address; a head for another number of "
                             "classes is replaced by a new one")
    models.add_argument("--teacher", default="deit3_s",
                        help=f"{', '.join(TEACHERS)}; or the path of a student.pth of this script; "
                             "or none, to learn from labels alone (%(default)s)")
    models.add_argument("--teacher-weights", metavar="FILE",
                        help="file or https address of the named teacher's weights, instead of the "
                             "usual download; augreg_* need it")
    models.add_argument("--patch-size", type=common.positive_int, default=16,
                        help="side length of a patch in pixels; the teacher must have the same "
                             "(%(default)s)")

    loss = parser.add_argument_group("loss")
    loss.add_argument("--alpha", type=common.non_negative, default=3e-5,
                      help="weight of the loss between shallow features (mimicking), for 196 "
                           "patches and the paper's teacher; scaled to others (%(default)s)")
    loss.add_argument("--beta", type=common.non_negative, default=3e-6,
                      help="weight of the loss between deep features (generation), scaled in the "
                           "same way (%(default)s)")
    loss.add_argument("--mask-ratio", type=common.fraction, default=0.5,
                      help="part of the patch tokens that must be generated (%(default)s)")
    loss.add_argument("--no-nkd", action="store_true", help="leave out NKD, the loss on logits")
    loss.add_argument("--gamma", type=common.non_negative, default=1.0,
                      help="weight, within NKD, of the classes other than the target (%(default)s)")

    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--batch-size", type=common.positive_int, default=1024,
                        help="images per step, of all GPUs together (%(default)s)")
    recipe.add_argument("--accum", type=common.positive_int, default=1,
                        help="gradient accumulation: compute a step in this many parts, one after "
                             "the other; 2, 4, ... if the GPU's memory is full (%(default)s)")
    recipe.add_argument("--epochs", type=common.positive_int, default=300,
                        help="passes over the training images (%(default)s)")
    recipe.add_argument("--lr", type=common.non_negative,
                        help="peak learning rate (1e-3 * sqrt(batch size / 1024))")
    recipe.add_argument("--min-lr", type=common.non_negative, default=1e-5,
                        help="learning rate at the end of the cosine (%(default)s)")
    recipe.add_argument("--warmup-epochs", type=common.non_negative, default=20,
                        help="epochs of linear warm-up, at most a tenth of --epochs (%(default)s)")
    recipe.add_argument("--weight-decay", type=common.non_negative, default=0.05,
                        help="weight decay of AdamW (%(default)s)")
    recipe.add_argument("--clip-grad", type=common.non_negative, default=5.0,
                        help="largest norm of the gradient, 0: no limit (%(default)s)")
    recipe.add_argument("--drop-path", type=common.fraction,
                        help="stochastic depth of the last block, 0: off (0.1 for deit_b, else 0)")
    recipe.add_argument("--ema-decay", type=common.fraction,
                        help="evaluate and save a moving average of the weights, 0: off (0.99996 "
                             "for deit_b, else 0)")
    recipe.add_argument("--crop-scale", type=common.fraction, default=0.08,
                        help="smallest share of an image's area that a random crop keeps; larger, "
                             "such as 0.4, for small images (%(default)s)")
    recipe.add_argument("--label-smoothing", type=common.fraction, default=0.1,
                        help="label smoothing of the cross-entropy (%(default)s)")
    recipe.add_argument("--mixup", type=common.non_negative, default=0.8,
                        help="alpha of MixUp, larger mixes more, 0: off (%(default)s)")
    recipe.add_argument("--cutmix", type=common.non_negative, default=1.0,
                        help="alpha of CutMix, larger mixes more, 0: off (%(default)s)")
    recipe.add_argument("--rand-augment", type=int, choices=range(11), default=9, metavar="0..10",
                        help="magnitude of RandAugment, 0: off (%(default)s)")
    recipe.add_argument("--random-erasing", type=common.fraction, default=0.25,
                        help="probability that a rectangle of an image is erased (%(default)s)")
    recipe.add_argument("--seed", type=common.non_negative_int, default=0,
                        help="seed of the random numbers; --data-fraction takes the same images "
                             "with every seed (%(default)s)")

    run = parser.add_argument_group("run")
    run.add_argument("--amp", choices=common.DTYPES,
                     help="precision of matrix products, off is float32; without this flag the "
                          "fastest that the device computes natively")
    run.add_argument("--compile", action="store_true",
                     help="torch.compile student and teacher: the first step is slow, later ones "
                          "are faster")
    run.add_argument("--out", default="out/vitkd",
                     help="folder for student.pth, last.pth, log.jsonl, args.json (%(default)s)")
    run.add_argument("--resume", action="store_true",
                     help="continue the run in --out after its last whole epoch, if there is one")
    run.add_argument("--eval-every", type=common.positive_int, default=1,
                     help="epochs between evaluations (%(default)s)")
    run.add_argument("--log-every", type=common.positive_int, default=50,
                     help="steps between progress lines (%(default)s)")
    run.add_argument("--demo", action="store_true",
                     help="train three small ViTs on drawn shapes, without data, download or GPU; "
                          "of the other flags only --workers and --seed count")
    args = parser.parse_args(argv)
    common.refuse_empty_flags(args)

    if args.teacher == "none" and args.teacher_weights:
        parser.error("--teacher-weights needs the name of its --teacher, not none")
    if args.image_size % args.patch_size:
        parser.error(f"--image-size {args.image_size} is not a multiple of --patch-size "
                     f"{args.patch_size}")
    if args.mask_ratio == 0:
        parser.error("--mask-ratio 0 leaves nothing to generate: --beta 0 switches generation off")
    if args.lr is None:
        args.lr = 1e-3 * math.sqrt(args.batch_size / 1024)
    if args.drop_path is None:
        args.drop_path = 0.1 if args.student == "deit_b" else 0.0
    if args.ema_decay is None:
        args.ema_decay = 0.99996 if args.student == "deit_b" else 0.0
    return args


def demo(args, device):
    """Train a teacher, a student alone and a distilled student. Print a table of their top-1."""
    if common.world_size() > 1:
        raise common.InputError("--demo runs in one process, without torchrun")
    torch.set_num_threads(1)  # steps are so small that more threads mostly wait for each other
    # A minute is enough for 1,280 steps of 25 small images
    shared = ("--data shapes --image-size 24 --patch-size 8 --student micro --batch-size 25 "
              "--lr 1e-3 --crop-scale 0.5 --label-smoothing 0 --mixup 0 --cutmix 0 "
              "--rand-augment 0 --random-erasing 0 --eval-every 1000 "
              f"--workers {args.workers} --seed {args.seed}")
    table = []
    with tempfile.TemporaryDirectory() as out:
        runs = {
            "teacher": ["--teacher", "none", "--epochs", "4"],
            "student alone": ["--teacher", "none", "--epochs", "2"],
            "student distilled": ["--teacher", f"{out}/teacher/student.pth", "--epochs", "2"],
        }
        for name, flags in runs.items():
            folder = f"{out}/{name.split()[-1]}"
            command = f"python vitkd.py {shared} {' '.join(flags)} --out {folder}"
            # The folder is temporary: show a command that also works later
            common.print0(f"\n{name}: {command.replace(out, 'out/demo')}")
            record = train(parse_args([*shared.split(), *flags, "--out", folder]), device)
            table.append(f"{name:18s} top-1 {record['top1']:5.1f} %")
    common.print0("\n" + "\n".join(table))


def main(argv=None):
    args = parse_args(argv)
    device = common.init_processes()
    try:
        if args.demo:
            demo(args, device)
        else:
            train(args, device)
    except common.InputError as error:
        common.fail(error)
    common.leave_processes()


if __name__ == "__main__":
    main()
