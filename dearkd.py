"""DearKD: distil a CNN's early layers into a vision transformer, then train it without the CNN.

Chen et al., "DearKD: Data-Efficient Early Knowledge Distillation for Vision Transformers",
arXiv 2204.12997 (CVPR 2022). Its code was never released. The paper's: two stages, MHCA with
dropout, aligner, mean squared error on early features, hard labels for DeiT's distillation token,
the idea of the intra-divergence loss. Ours: all formulas and defaults that fill in these words.
DeepInversion (arXiv 1912.08795, code released) is its authors', except where CIFAR below says so.

A CNN learns from few images; a ViT whose attention is free learns more from many. Therefore
  - stage 1: early blocks learn the CNN's early maps (hints), the distillation token its class;
    MHCA, a position term in their attention, starts these blocks as convolutions;
  - stage 2: the labels alone. The CNN does not run, and attention may leave the neighbourhood.
DF-DearKD uses no real image: noise is optimised until the CNN sees a class in it and BatchNorm its
usual statistics. The intra-divergence loss keeps the images of a class apart.

DeiT-T <- RegNetY-16GF on ImageNet-1k, 72.2 -> 74.8 % top-1 (paper), and demos for a laptop:
    torchrun --nproc_per_node 8 dearkd.py --data data/imagenet --student deit_t
    python dearkd.py --demo                  # or --demo-data-free
Measured: CIFAR-10, 10,000 images, micro <- ResNet-56, seeds 0 to 2: 51.1 % top-1, 43.0 % alone
(one AMD EPYC core, bf16, 2026-11-25; tests/evidence/study/dearkd-3-*.log).
"""

import argparse
import contextlib
import math
import tempfile
import time
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision import datasets, models
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import StochasticDepth
from torchvision.transforms import v2
from torchvision.utils import save_image
from tqdm import tqdm

import common

# ------------------------------------------------------------------ the loss


class Aligner(nn.Module):
    """Maps patch tokens (B, N, D) to a CNN's map (B, C_t, g, g), N = g^2 (our reading): 3x3
    depth-wise convolution, LayerNorm over channels, Linear(D, C_t), GELU."""

    def __init__(self, student_dim, teacher_channels):
        super().__init__()
        self.depthwise = nn.Conv2d(student_dim, student_dim, 3, padding=1, groups=student_dim)
        self.norm = nn.LayerNorm(student_dim, eps=1e-6)
        self.linear = nn.Linear(student_dim, teacher_channels)
        self.to(memory_format=torch.channels_last)  # as tokens lie in memory

    def forward(self, tokens):
        B, N, D = tokens.shape
        g = math.isqrt(N)
        x = self.depthwise(tokens.transpose(1, 2).reshape(B, D, g, g))      # (B, D, g, g)
        x = F.gelu(self.linear(self.norm(x.permute(0, 2, 3, 1))))           # (B, g, g, C_t)
        return x.permute(0, 3, 1, 2)                                        # (B, C_t, g, g)


def hint_loss(student_map, teacher_map):
    """L_h of one hint, a scalar: the mean squared error. student_map (B, C_t, g, g); teacher_map
    (B, C_t, h, h) is averaged to g x g, or enlarged bilinearly if it is smaller."""
    g = student_map.shape[-1]
    mode = "area" if teacher_map.shape[-1] >= g else "bilinear"  # area: the mean
    return F.mse_loss(student_map.float(), F.interpolate(teacher_map.float(), (g, g), mode=mode))


def intra_divergence_loss(features, labels):
    """L_bp of DF-DearKD (our reading), a scalar: spreads the images of a class up to its boundary.

    features (B, D) are L2-normalised here; labels (B,). Image i is pushed away from its nearest
    class-mate e. The farthest one, h, marks the boundary of the class and is left where it is:
        L_bp = mean_i max(0, stopgrad(d_ih) - d_ie)
    The mean is over images with two class-mates or more. d is the Euclidean distance: its gradient
    does not vanish between near-copies, as that of 1 - cosine does.
    """
    f = F.normalize(features, dim=1)
    mates = (labels[:, None] == labels).fill_diagonal_(False)               # (B, B)
    with torch.no_grad():
        d = torch.cdist(f, f, compute_mode="donot_use_mm_for_euclid_dist")  # exact for near-copies
        d_h = d.masked_fill(~mates, -math.inf).amax(1)                      # (B,)
        e = d.masked_fill(~mates, math.inf).argmin(1)                       # (B,)
    d_e = (f - f[e]).norm(dim=1)                                            # (B,)
    enough = mates.sum(1) >= 2                                              # (B,)
    return ((d_h - d_e).clamp(min=0) * enough).sum() / enough.sum().clamp(min=1)


# ------------------------------------------------------------------ the ViT

SIZES = {"micro": {"dim": 96, "depth": 6, "num_heads": 3},
         "deit_t": {"dim": 192, "depth": 12, "num_heads": 3},
         "deit_s": {"dim": 384, "depth": 12, "num_heads": 6},
         "deit_b": {"dim": 768, "depth": 12, "num_heads": 12}}


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


class ConvAttention(Attention):
    """MHCA: attention that can express a convolution (arXiv 2204.12997, section 3; our reading).

    forward(x (B, P+N, D)) -> (B, P+N, D), P = num_prefix_tokens, N = grid_size^2.

    Between patches at grid offset d = (d1, d2), in rows and columns, head h has the logit
        q.k / sqrt(D/H) + v_h . r_d,   r_d = (|d|^2, d1, d2),   v_h = pos_weight[h].
    v_h = -a (1, -2 c1, -2 c2) gives -a |d - c|^2 + const, a Gaussian around offset c. Heads start
    with a = 1 and the c of a 3x3 neighbourhood, centre first. Prefix tokens (class, distillation)
    have no position and get 0. In training, dropout removes a head's whole position term from a
    forward pass: the head then attends by content alone, as it may later.
    """

    def __init__(self, dim, num_heads, grid_size, num_prefix_tokens, pos_dropout=0.1):
        super().__init__(dim, num_heads)
        self.num_prefix_tokens, self.pos_dropout = num_prefix_tokens, pos_dropout
        c = torch.cartesian_prod(torch.arange(-1, 2), torch.arange(-1, 2))  # (9, 2)
        c = c[c.square().sum(1).argsort(stable=True)]                       # centre first
        c = c[torch.arange(num_heads) % 9]                                  # (H, 2)
        self.pos_weight = nn.Parameter(torch.cat([-torch.ones(num_heads, 1), 2 * c], 1))  # (H, 3)
        position = torch.cartesian_prod(*[torch.arange(grid_size)] * 2).float()     # (N, 2)
        d = position[None] - position[:, None]                              # (N, N, 2)
        r = torch.cat([d.square().sum(2, keepdim=True), d], 2)              # (N, N, 3)
        self.register_buffer("r", r, persistent=False)

    def position_term(self):
        """Return what is added to the logits of every image, (H, P+N, P+N)."""
        term = (self.pos_weight[:, None, None] * self.r).sum(3)             # (H, N, N), float32
        if self.training:
            term = term * (torch.rand(len(term), 1, 1, device=term.device) >= self.pos_dropout)
        return F.pad(term, (self.num_prefix_tokens, 0) * 2)                 # (H, P+N, P+N)

    def forward(self, x):
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                # (B, H, P+N, D/H) each
        term = self.position_term().to(q.dtype)                             # (H, P+N, P+N)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=term)         # (B, H, P+N, D/H)
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
    """DeiT with a class and a distillation token; its first `mhca_blocks` blocks have MHCA.
    Parameters have timm's names, except blocks.{i}.attn.pos_weight.

    forward(images (B, 3, S, S)) -> in training mode (class logits, distillation logits), (B, C)
    each; in eval mode their mean; the normed class token (B, D) if num_classes = 0.
    drop_path: stochastic depth of the last block; it grows linearly from 0 in the first.
    """

    def __init__(self, image_size=224, patch_size=16, dim=384, depth=12, num_heads=6,
                 num_classes=1000, mhca_blocks=0, pos_dropout=0.1, drop_path=0.0):
        super().__init__()
        self.num_classes, g = num_classes, image_size // patch_size
        N = 2 + g**2
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch_size, patch_size)})
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02))
        self.dist_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02))
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, N, dim), std=0.02))
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, drop_path * i / max(1, depth - 1)) for i in range(depth))
        for block in self.blocks[:mhca_blocks]:
            block.attn = ConvAttention(dim, num_heads, g, 2, pos_dropout)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        self.head_dist = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def embed(self, images):
        """Return the tokens (B, 2+N, D) that enter block 0: class, distillation, patches."""
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)     # (B, N, D)
        prefix = [token.expand(len(x), -1, -1) for token in (self.cls_token, self.dist_token)]
        return torch.cat([*prefix, x], 1) + self.pos_embed

    def features(self, images, after=()):
        """Return ({block: patch tokens (B, N, D) after it} for the blocks in `after`, counted from
        0; (class logits, distillation logits), (B, C) each)."""
        x, hidden = self.embed(images), {}
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in after:
                hidden[i] = x[:, 2:]
        x = self.norm(x)
        return hidden, (self.head(x[:, 0]), self.head_dist(x[:, 1]))

    def forward(self, images):
        by_class, by_dist = self.features(images)[1]
        if not self.num_classes:
            return by_class
        return (by_class, by_dist) if self.training else (by_class + by_dist) / 2


def load_weights(vit, state):
    """Load a state dict into a ViT, strictly; resize the position embedding to its image size."""
    position = state.get("pos_embed", vit.pos_embed)                        # (1, 2+N, D)
    old, grid = (math.isqrt(p.shape[1] - 2) for p in (position, vit.pos_embed))
    patches = position[:, 2:].reshape(1, old, old, -1).permute(0, 3, 1, 2)  # (1, D, old, old)
    patches = F.interpolate(patches, (grid, grid), mode="bicubic").flatten(2).transpose(1, 2)
    position = torch.cat([position[:, :2], patches], 1)                     # (1, 2+grid*grid, D)
    vit.load_state_dict({**state, "pos_embed": position} if "pos_embed" in state else state)


@torch.no_grad()
def attention_distance(vit, images):
    """Return how far the patches attend, in patches, for each block and head: (depth, H). It is the
    mean over images and patches i of sum_j a_ij |p_i - p_j|: a is the attention among patches, p
    are positions on the grid. images (B, 3, S, S)."""
    x = vit.embed(images)                                                   # (B, 2+N, D)
    g = torch.arange(math.isqrt(x.shape[1] - 2))
    position = torch.cartesian_prod(g, g).to(x)                             # (N, 2)
    distance, rows = torch.cdist(position, position), []                    # (N, N)
    for block in vit.blocks:
        attn = block.attn
        qkv = attn.qkv(block.norm1(x)).unflatten(2, (3, attn.num_heads, -1))
        q, k, _ = qkv.permute(2, 0, 3, 1, 4)                                # (B, H, 2+N, D/H) each
        logits = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])             # (B, H, 2+N, 2+N)
        if isinstance(attn, ConvAttention):
            logits = logits + attn.position_term()
        a = logits[..., 2:, 2:].softmax(-1)                                 # (B, H, N, N)
        rows.append((a * distance).sum(3).mean((0, 2)))
        x = block(x)
    return torch.stack(rows)


# ------------------------------------------------------------------ the teacher

class CifarBlock(nn.Module):
    def __init__(self, channels_in, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.new = stride, channels - channels_in

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        # The shortcut has no weights: every stride-th pixel; new channels are 0, half on each side
        x = x[:, :, ::self.stride, ::self.stride]
        return F.relu(y + F.pad(x, (0, 0, 0, 0, self.new // 2, self.new // 2)))


class CifarResNet(nn.Module):
    """ResNet for 32 px images (He et al., arXiv 1512.03385, section 4.2); depth = 6 blocks + 2."""

    def __init__(self, blocks, num_classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(CifarBlock(16, 16, 1) for _ in range(blocks)))
        self.layer2, self.layer3 = (nn.Sequential(
            CifarBlock(C // 2, C, 2), *(CifarBlock(C, C, 1) for _ in range(blocks - 1)))
            for C in (32, 64))
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


CNNS = ["cifar_resnet20", "cifar_resnet32", "cifar_resnet44", "cifar_resnet56",
        *models.list_models(models, include=["resnet*", "resnext*", "wide_resnet*", "regnet*"])]
STAGES = {  # the modules that end a CNN's stages, each in a ReLU, and at last its classifier
    CifarResNet: ["layer1", "layer2", "layer3", "linear"],
    models.ResNet: ["layer1", "layer2", "layer3", "layer4", "fc"],  # ResNeXt and wide ones, too
    models.RegNet: [*(f"trunk_output.block{stage}" for stage in (1, 2, 3, 4)), "fc"]}


def make_cnn(name, num_classes):
    """Return one of CNNS with random weights."""
    if name.startswith("cifar"):
        return CifarResNet((int(name[-2:]) - 2) // 6, num_classes)
    return models.get_model(name, weights=None, num_classes=num_classes)


class Teacher(nn.Module):
    """A frozen CNN that also returns the map at the end of each of its stages.

    forward(images (B, 3, S, S), normalised by common.MEAN and STD) -> logits (B, C)
    """

    def __init__(self, cnn):
        super().__init__()
        self.num_classes = getattr(cnn, STAGES[type(cnn)][-1]).out_features
        self.cnn = create_feature_extractor(cnn.eval(), STAGES[type(cnn)])
        self.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    def features(self, images):
        """Return (maps [(B, C_1, h_1, h_1), ...] of the stages, large first; logits (B, C))."""
        *maps, logits = self.cnn(images).values()
        return maps, logits

    def forward(self, images):
        return self.features(images)[1]


def load_teacher(name, weights=None, num_classes=1000):
    """Return a frozen Teacher in eval mode.

    name: one of CNNS, with its weights in the file `weights` or else downloaded; or the path of a
    student.pth of --train-teacher. num_classes None: as many as the weights have. Raises ValueError
    (name, unreadable file) or RuntimeError (another model or class count: torch names the keys)."""
    if name in CNNS:
        if not weights and name.startswith("cifar"):
            raise ValueError(f"{name} cannot be downloaded: give its weights as a file")
        saved = common.load_checkpoint(weights or models.get_model_weights(name).DEFAULT.url)
    elif Path(name).is_file() and not weights:
        saved = common.load_checkpoint(name)
        name = saved.get("cnn", f"{name}, which --train-teacher did not write")
    if name not in CNNS:
        raise ValueError(f"no teacher {name}: choose {', '.join(CNNS)}, or a student.pth")
    state = saved.get("model", saved.get("state_dict", saved))
    state = {key.removeprefix("module."): value for key, value in state.items()}
    bias = state.get("fc.bias", state.get("linear.bias", []))
    cnn = make_cnn(name, num_classes or len(bias))
    cnn.load_state_dict(state)
    return Teacher(cnn)


# ------------------------------------------------------------------ training


class Distillation(nn.Module):
    """All that is trained, in one module for one DDP. Returns {name: weighted loss term}."""

    def __init__(self, student, aligners, hints, args):
        super().__init__()
        self.student, self.aligners, self.hints, self.args = student, aligners, hints, args

    def forward(self, images, target, teacher_features):
        alpha, smoothing = self.args.alpha, self.args.label_smoothing
        hidden, logits = self.student.features(images, [block for block, _ in self.hints])
        by_class, by_dist = (x.float() for x in logits)                     # (B, C) each
        ce = F.cross_entropy(by_class, target, label_smoothing=smoothing)
        if not teacher_features:  # stage 2: the labels, half for each head
            return {"ce": (ce + F.cross_entropy(by_dist, target, label_smoothing=smoothing)) / 2}

        # Stage 1: (1 - alpha) CE(class, y) + alpha CE(distillation, argmax teacher) + beta sum L_h
        maps, teacher_logits = teacher_features
        losses = {"ce": (1 - alpha) * ce,
                  "logits": alpha * F.cross_entropy(by_dist, teacher_logits.argmax(1))}
        if self.hints:
            losses["hints"] = self.args.beta * sum(
                hint_loss(align(hidden[block]), maps[stage - 1])
                for align, (block, stage) in zip(self.aligners, self.hints))
        return losses


def parse_hints(text, depth, num_stages):
    """Return [(block, stage), ...]: "1:1,3:2" -> [(1, 1), (3, 2)]. Raises ValueError."""
    pairs = [pair.split(":") for pair in text.split(",")] if text != "none" else []
    hints = [(int(block), int(stage)) for block, stage in pairs]
    if any(not (0 <= block < depth and 1 <= stage <= num_stages) for block, stage in hints):
        raise ValueError(f"there are blocks 0 to {depth - 1} and stages 1 to {num_stages}")
    return hints


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
            "num_classes": num_classes, "mhca_blocks": args.mhca_blocks}
    drop_path = 0.1 if args.student == "deit_b" else 0.0
    ema_decay = max(0, 1 - 15 / (args.epochs * len(loader))) if drop_path else 0  # DeiT: 0.99996
    student = ViT(**arch, pos_dropout=args.pos_dropout, drop_path=drop_path)
    teacher, hints, aligners = None, [], nn.ModuleList()
    try:
        if args.init:
            saved = common.load_checkpoint(args.init)
            if saved.get("script") != "dearkd":
                raise ValueError(f"{args.init} is no student.pth of dearkd.py")
            state = saved["model"]
            if len(state["head.bias"]) != num_classes:  # then both heads stay new
                state.update((k, v) for k, v in student.state_dict().items() if "head" in k)
            load_weights(student, state)
        if args.teacher != "none":
            teacher = load_teacher(args.teacher, args.teacher_weights, num_classes)
            maps, _ = teacher.features(torch.zeros(1, 3, args.image_size, args.image_size))
            hints = parse_hints(args.hints, arch["depth"], len(maps))
            aligners.extend(Aligner(arch["dim"], maps[stage - 1].shape[1]) for _, stage in hints)
            teacher.to(device)
    except (AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        common.fail(f"--init, --teacher or --hints (block:stage,...): {error}")
    model = Distillation(student, aligners, hints, args).to(device)
    ema = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(ema_decay))  # 0: just a copy

    # ---- optimiser ----
    groups = common.parameter_groups(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.999), fused=True)

    # ---- resume, or say how good the teacher is ----
    resumed = {"model": model, "ema": ema, "optimizer": optimizer, "scaler": scaler}
    checkpoint, log = common.open_run(args), []  # log: one record an epoch
    if checkpoint:
        log = checkpoint["log"]
        for name, part in resumed.items():
            part.load_state_dict(checkpoint[name])
    elif teacher:
        top1 = common.evaluate(teacher, val_batches, device, autocast)
        common.say(f"teacher {args.teacher}: top-1 {top1:.1f} % on the validation images")

    if args.compile:  # in place, so that the names in state_dict() stay
        model.compile(dynamic=False)
        if teacher:
            teacher.features = torch.compile(teacher.features, dynamic=False)
    first_epoch = len(log)
    skipped = []  # for each step: was it skipped?

    for epoch in range(first_epoch, args.epochs):
        # Stage 1 has the teacher. In stage 2 it does not run, and its aligners are not trained
        stage = 1 if teacher and epoch < args.stage1_epochs else 2
        if epoch in (first_epoch, args.stage1_epochs):  # DDP expects all gradients required here
            aligners.requires_grad_(stage == 1)
            ddp = DDP(model, gradient_as_bucket_view=True) if common.world_size() > 1 else model

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
                        teacher_features = teacher.features(x) if stage == 1 else None
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
        record = {"epoch": epoch + 1, "stage": stage,
                  **common.mean_losses(totals, len(loader), device), "lr": lr,
                  "skipped_steps": sum(skipped[-len(loader):]),
                  "images_per_second": len(loader) * args.batch_size / (time.time() - started)}
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 in (args.stage1_epochs, args.epochs):
            record["top1"] = common.evaluate(ema.module, val_batches, device, autocast)
            some = np.linspace(0, len(val_set) - 1, 32).astype(int)
            some = torch.stack([val_set[i][0] for i in some])               # (32, 3, S, S)
            distance = attention_distance(ema.module, some.to(device)).mean(1)
            record["attention_distance"] = distance.tolist()  # of each block, in patches
        log.append({**record, "seconds": time.time() - started})
        common.log_epoch(args, log)

        # Checkpoints: the student as a plain ViT, and all that --resume needs
        if common.rank() == 0:
            common.save_checkpoint(f"{args.out}/student.pth", model=ema.module.state_dict(),
                                   arch=arch, script="dearkd")
            states = {name: part.state_dict() for name, part in resumed.items()}
            common.save_checkpoint(f"{args.out}/last.pth", **states, log=log, args=vars(args))
    return log[-1]


def train_cnn(args, device):
    """Train the CNN args.train_teacher on the labels. Return the last epoch's record."""
    autocast, scaler = common.precision(args, device)
    transform = common.train_transform(args.image_size, (args.crop_scale, 1.0),
                                       args.rand_augment, args.random_erasing)
    train_set, val_set, num_classes = common.load_data(args, transform)
    loader = common.make_loader(train_set, args, train=True)
    val_batches = common.make_loader(val_set, args, train=False)
    torch.manual_seed(args.seed)
    cnn = make_cnn(args.train_teacher, num_classes).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(common.parameter_groups(cnn, args.weight_decay), fused=True)
    resumed, log = {"model": cnn, "optimizer": optimizer, "scaler": scaler}, []
    if checkpoint := common.open_run(args):
        log = checkpoint["log"]
        for name, part in resumed.items():
            part.load_state_dict(checkpoint[name])
    ddp = DDP(cnn) if common.world_size() > 1 else cnn
    for epoch in range(len(log), args.epochs):
        loader.sampler.set_epoch(epoch)
        train_set.epoch.fill_(epoch)
        ddp.train()
        started, total = time.time(), 0
        for step, (images, target) in enumerate(loader):
            for group in optimizer.param_groups:
                group["lr"] = common.learning_rate(epoch + (step + 1) / len(loader), args)
            with autocast():
                logits = ddp(images.to(device, non_blocking=True)).float()
            loss = F.cross_entropy(logits, target.to(device), label_smoothing=args.label_smoothing)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            if nn.utils.clip_grad_norm_(cnn.parameters(), math.inf).isfinite():  # does not clip
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            total += loss.detach().nan_to_num(0, 0, 0)
        for buffer in cnn.buffers() if ddp is not cnn else []:
            torch.distributed.broadcast(buffer, 0)  # BatchNorm's differ after the last step
        top1 = common.evaluate(cnn, val_batches, device, autocast)
        log.append({"epoch": epoch + 1, **common.mean_losses({"ce": total}, len(loader), device),
                    "top1": top1, "seconds": time.time() - started})
        common.log_epoch(args, log)
        if common.rank() == 0:
            state = {name: part.state_dict() for name, part in resumed.items()}
            common.save_checkpoint(f"{args.out}/student.pth", model=state["model"],
                                   cnn=args.train_teacher)
            common.save_checkpoint(f"{args.out}/last.pth", **state, log=log, args=vars(args))
    return log[-1]


# ------------------------------------------------------------------ no real images: DF-DearKD

# Settings of synthesize() up to 64 px; its defaults are for ImageNet. image_lr, betas, tv, l2 and
# jitter are the authors'. Ours: divergence, bn (theirs: 10 or 100), first_bn (theirs: 1), and here
# the schedule, the clipping and the flips, which the authors use for ImageNet alone.
CIFAR = {"half_steps": 0, "steps": 2000, "image_lr": 0.1, "betas": (0.9, 0.999), "tv": 2.5e-5,
         "l2": 0.0, "bn": 0.2, "first_bn": 10.0, "jitter": 2, "divergence": 1.0}


def total_variation(x):
    """Return the sum of the L2 norms, over the batch, of the differences between neighbours: right,
    below and on both diagonals. x (B, 3, S, S)."""
    return sum((a - b).norm() for a, b in (
        (x[..., :, 1:], x[..., :, :-1]), (x[..., 1:, :], x[..., :-1, :]),
        (x[..., 1:, 1:], x[..., :-1, :-1]), (x[..., 1:, :-1], x[..., :-1, 1:])))


def batch_norm_loss(inputs, first_weight=10.0):
    """Return sum_l w_l (|mu_l(x) - mu_l| + |var_l(x) - var_l|). mu_l and var_l are those stored in
    BatchNorm l. Norms are over channels. w_0 = first_weight, the other weights are 1. inputs:
    {BatchNorm: its input (B, C, h, w)}, in the order of the network."""
    distances = []
    for norm, x in inputs.items():
        # No x.mean() and no float32 copy of x: both are slow. The rounding of x * x averages out
        x = x.permute(0, 2, 3, 1).flatten(0, 2)                             # (B*h*w, C)
        mean = x.sum(0, dtype=torch.float32) / len(x)                       # (C,)
        var = (x * x).sum(0, dtype=torch.float32) / len(x) - mean.square()  # (C,)
        distances.append((mean - norm.running_mean).norm() + (var - norm.running_var).norm())
    return first_weight * distances[0] + sum(distances[1:])


def synthesize(teacher, labels, image_size, half_steps=2000, steps=1000, image_lr=0.25,
               betas=(0.5, 0.9), tv=1e-4, l2=1e-5, bn=0.01, first_bn=10.0, jitter=30,
               divergence=1.0, seed=0, autocast=contextlib.nullcontext):
    """Make images of the classes `labels` (B,) from a Teacher's weights alone: (B, 3, S, S).

    From noise, Adam minimises (arXiv 1912.08795, section 3; the last term is DF-DearKD's)
        CE + tv TV(x) + l2 mean_i |x_i| + bn sum_l w_l (...) + divergence L_bp,
    first with the images average-pooled by 2, for half_steps, then at full size. In each step the
    CNN sees them rolled by up to `jitter` pixels, and flipped or not. S = image_size. The images
    are normalised by common.MEAN and STD. The teacher is not changed. The defaults are, divergence
    aside, the authors' for torchvision's first weights (V1) of ResNet-50, given as file or URL."""
    generator = torch.Generator().manual_seed(seed)
    mean, std = (torch.tensor(x, device=labels.device)[:, None, None]
                 for x in (common.MEAN, common.STD))
    black, white = -mean / std, (1 - mean) / std  # the range of real images
    images = torch.randn(len(labels), 3, image_size, image_size, generator=generator)
    images = images.to(labels.device).clamp(black, white).requires_grad_()

    inputs = {}  # {BatchNorm: its input in the latest forward pass}
    hooks = [module.register_forward_pre_hook(lambda norm, x: inputs.update({norm: x[0]}))
             for module in teacher.modules() if isinstance(module, nn.BatchNorm2d)]

    for pool, phase in ((2, half_steps), (1, steps)):
        optimizer = torch.optim.Adam([images], image_lr, betas)
        warmup = min(100, phase / 10)
        for step in range(phase):
            # Learning rate: warm-up over 100 steps, at most a tenth of the phase; then cosine
            cosine = (1 + math.cos(math.pi * (step - warmup) / (phase - warmup))) / 2
            rate = (step + 1) / warmup if step + 1 < warmup else cosine
            optimizer.param_groups[0]["lr"] = image_lr * rate

            # A random roll and flip
            x = F.avg_pool2d(images, pool)                              # (B, 3, S/pool, S/pool)
            far = jitter // pool
            x = x.roll(torch.randint(-far, far + 1, (2,), generator=generator).tolist(), (2, 3))
            x = x.flip(3) if torch.rand((), generator=generator) < 0.5 else x

            # Loss
            with autocast():
                *maps, logits = teacher.cnn(x).values()
            features = maps[-1].float().mean((2, 3))                    # (B, D), the classifier's
            loss = (F.cross_entropy(logits.float(), labels) + tv * total_variation(x)
                    + l2 * x.flatten(1).norm(dim=1).mean()
                    + bn * batch_norm_loss(inputs, first_bn)
                    + divergence * intra_divergence_loss(features, labels))

            # Step: the gradient of the images alone, then back into the range of real images
            images.grad = torch.autograd.grad(loss, images)[0]
            optimizer.step()
            with torch.no_grad():
                images.clamp_(black, white)
    for hook in hooks:
        hook.remove()
    return images.detach()


def plan_batches(num_classes, images_per_class, batch_size, seed):
    """Return [[(class, number), ...], ...]: every image once; at least four of a class together,
    if it has that many, since the intra-divergence loss compares class-mates."""
    generator = np.random.default_rng(seed)
    parts = np.array_split(np.arange(images_per_class), max(1, images_per_class // 4))
    groups = [[(int(c), int(n)) for n in part]
              for part in parts for c in generator.permutation(num_classes)]
    count = math.ceil(len(groups) / max(1, batch_size // len(groups[0])))
    return [sum((groups[i] for i in part), [])
            for part in np.array_split(np.arange(len(groups)), count)]


def fill_folder(args, device):
    """Fill args.synthesize with images made from args.teacher: train/CLASS/NUMBER.png, preview.png.

    A batch depends on the seed and its number alone, and a batch whose files exist is skipped. So
    with --resume the same command continues after a kill, and ends with the same files."""
    autocast, _ = common.precision(args, device)
    if args.amp == "fp16":  # too coarse for the gradients of pixels
        args.amp = "off"
        autocast, _ = common.precision(args, device)
    out = Path(args.synthesize)
    try:
        teacher = load_teacher(args.teacher, args.teacher_weights, None).to(device)
        names = [f"{c:03d}" for c in range(teacher.num_classes)]
        if args.val:  # its folders, in alphabetical order, must be the teacher's classes
            names, _ = datasets.folder.find_classes(args.val)
        if len(names) != teacher.num_classes:
            raise ValueError(f"the teacher has {teacher.num_classes} classes, --val {len(names)}")
        for name in names:
            (out / "train" / name).mkdir(parents=True, exist_ok=True)
    except (AttributeError, KeyError, OSError, RuntimeError, ValueError) as error:
        common.fail(f"--synthesize: {error}")
    args.out = args.synthesize
    new = common.sum_over_processes([not common.open_run(args)], device)[0]  # waits for all
    if new and common.rank() == 0:  # images of other settings do not mix
        common.save_checkpoint(out / "last.pth", args=vars(args), log=[])
    settings = CIFAR if args.image_size <= 64 else {}
    settings = {**settings, **{name: x for name, x in vars(args).items() if name in CIFAR}}

    mean, std = (torch.tensor(x)[:, None, None] for x in (common.MEAN, common.STD))
    batches = plan_batches(len(names), args.images_per_class, args.images_per_batch, args.seed)
    for i in range(common.rank(), len(batches), common.world_size()):
        files = [out / "train" / names[c] / f"{n:05d}.png" for c, n in batches[i]]
        if all(file.exists() for file in files):
            continue
        started, labels = time.time(), torch.tensor([c for c, _ in batches[i]], device=device)
        images = synthesize(teacher, labels, args.image_size, seed=hash((args.seed, i)),
                            autocast=autocast, **settings)
        if not images.isfinite().all():
            common.fail("the images became NaN: try a lower --image-lr, or --amp off")
        pixels = images.cpu() * std + mean                                  # (B, 3, S, S) in [0, 1]
        for image, file in [(pixels[:64], out / "preview.png"), *zip(pixels, files)]:
            save_image(image, out / f"{i}.tmp", format="png")
            (out / f"{i}.tmp").replace(file)  # whole or not at all
        common.say(f"batch {i + 1} of {len(batches)}: "
                   f"{len(files) / (time.time() - started):.3g} images/s")


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

    flag = group("models", f"Teachers: {', '.join(CNNS)}, a student.pth, none.").add_argument
    flag("--student", choices=SIZES, default="deit_t", help="the ViT to train (%(default)s)")
    flag("--init", metavar="FILE", help="student.pth to start from; a head of another size is new")
    flag("--teacher", default="regnet_y_16gf", help="a name or a path, see above (%(default)s)")
    flag("--teacher-weights", metavar="FILE", help="file or URL with its weights (torchvision's)")
    flag("--train-teacher", choices=CNNS, metavar="CNN", help="train it, without MixUp, --accum")
    flag("--patch-size", type=int, default=16, help="of the student, in pixels (%(default)s)")
    flag("--mhca-blocks", type=int, default=4, help="how many blocks have MHCA (%(default)s)")
    flag("--pos-dropout", type=float, default=0.1, help="of MHCA's position term (%(default)s)")

    flag = group("loss", "Blocks are numbered from 0, stages of the CNN from 1.").add_argument
    flag("--stage1-epochs", type=int, help="epochs with the teacher (epochs * 5 / 6)")
    flag("--hints", default="1:1,3:2", help="block:stage,... or none (%(default)s)")
    flag("--alpha", type=float, default=0.5, help="weight of the teacher's class (%(default)s)")
    flag("--beta", type=float, default=10.0, help="weight of the hints (%(default)s)")

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

    flag = group("no real images", "Defaults (a; b): a up to 64 px, b above.").add_argument
    flag("--synthesize", metavar="DIR", help="fill DIR/train; class folders are named as in --val")
    flag("--images-per-class", type=int, default=100, help="how many to make (%(default)s)")
    flag("--images-per-batch", type=int, default=128, help="at once, at least 7 (%(default)s)")
    own = {"default": argparse.SUPPRESS}  # the defaults are those of synthesize()
    flag("--half-steps", type=int, **own, help="steps at half size (0; 2000)")
    flag("--steps", type=int, **own, help="steps at full size (2000; 1000)")
    flag("--image-lr", type=float, **own, help="learning rate of the pixels (0.1; 0.25)")
    flag("--tv", type=float, **own, help="weight of total variation (2.5e-5; 1e-4)")
    flag("--bn", type=float, **own, help="weight of BatchNorm's statistics (0.2; 0.01)")
    flag("--divergence", type=float, **own, help="weight of the intra-divergence loss (1.0)")

    flag = group("run").add_argument
    flag("--amp", choices=("bf16", "fp16", "off"), help="precision (the fastest the device has)")
    flag("--compile", action="store_true", help="torch.compile student and teacher")
    flag("--out", default="out/dearkd", help="folder for the results (%(default)s)")
    flag("--resume", action="store_true", help="continue the run in --out, if there is one")
    flag("--eval-every", type=int, default=1, help="epochs between evaluations (%(default)s)")
    flag("--demo", action="store_true", help="three small runs; reads only --workers and --seed")
    flag("--demo-data-free", action="store_true", help="a small CNN, images made from it")
    args = parser.parse_args(argv)

    if args.train_teacher or args.synthesize:
        args.patch_size = args.accum = 1  # a CNN has no patches: any --image-size will do
    if args.stage1_epochs is None:
        args.stage1_epochs = round(args.epochs * 5 / 6)
    common.check_args(args, {
        "label_smoothing": (0, 1), "rand_augment": (0, 10), "random_erasing": (0, 1),
        "alpha": (0, 1), "pos_dropout": (0, 1), "mhca_blocks": (0, SIZES[args.student]["depth"]),
        "stage1_epochs": (0, args.epochs)})
    args.lr = args.lr or 1e-3 * math.sqrt(args.batch_size / 1024)
    return args


def demo(args, device):
    """Train a CNN on shapes, then a student alone and one with DearKD; or, data-free, make images
    from the CNN without and with L_bp. Print top-1 and how far apart the images of a class are."""
    if common.world_size() > 1:
        common.fail("a demo runs in one process, without torchrun")
    flags = ("--data shapes --image-size 32 --patch-size 4 --student micro --batch-size 50 "
             "--lr 1e-3 --crop-scale 0.5 --label-smoothing 0 --mixup 0 --cutmix 0 --rand-augment 0 "
             f"--random-erasing 0 --eval-every 1000 --seed {args.seed} --workers {args.workers} ")
    table = []
    with tempfile.TemporaryDirectory() as out:
        cnn = f"{out}/0/student.pth"
        rows = [("CNN", train_cnn, "--train-teacher cifar_resnet20 --epochs 5"),
                ("student alone", train, "--teacher none --mhca-blocks 0 --epochs 5"),
                ("student, DearKD", train, f"--teacher {cnn} --epochs 5")]
        for number, (name, run, more) in enumerate(rows[:1] if args.demo_data_free else rows):
            record = run(parse_args(f"{flags} {more} --out {out}/{number}".split()), device)
            table.append(f"{name:24s} top-1 {record['top1']:5.1f} %")
        teacher, labels = load_teacher(cnn, None, 10).to(device), torch.arange(120) % 10
    if args.demo_data_free:
        for name, weight in (("DeepInversion", 0), ("DF-DearKD", 1)):
            # Few steps, flat shapes: less of BatchNorm, more of total variation than for photos
            settings = {**CIFAR, "steps": 150, "bn": 0.05, "tv": 0.03, "divergence": weight}
            images = synthesize(teacher, labels.to(device), 32, seed=args.seed, **settings)
            with torch.no_grad():
                maps, logits = teacher.features(images)
            f = F.normalize(maps[-1].mean((2, 3)), dim=1).cpu()             # (120, 64)
            apart = torch.cdist(f, f)[labels[:, None] == labels].sum() / (120 * 11)
            top1 = 100 * (logits.argmax(1).cpu() == labels).float().mean()
            table.append(f"{name:16s} images: top-1 of the CNN {top1:5.1f} %, distance {apart:.3f}")
    common.say("\n" + "\n".join(table))


def main(argv=None):
    args, device = parse_args(argv), common.init_processes()
    run = (demo if args.demo or args.demo_data_free else fill_folder if args.synthesize else
           train_cnn if args.train_teacher else train)
    run(args, device)
    if common.world_size() > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
