"""DearKD: distil a CNN's early layers into a vision transformer, then train it without the CNN.

Chen et al., "DearKD: Data-Efficient Early Knowledge Distillation for Vision Transformers",
arXiv 2204.12997 (CVPR 2022).

A CNN learns from few images, since each of its neurons sees only nearby pixels. A ViT attends
anywhere: with many images it learns more than a CNN, with few it learns less. So the CNN teaches it
at first:
  - stage 1: early blocks learn the CNN's early maps (hints), the distillation token learns the
    class that the CNN sees. Multi-head convolutional attention (MHCA), attention with a learned
    position term, lets these blocks start out local, as convolutions are;
  - stage 2: only labels. The CNN does not run, and no hint holds attention to neighbours any more.
DF-DearKD uses no real image: noise is optimised until the CNN recognises a class in it, and the
inputs of its BatchNorms have their usual mean and variance. The intra-divergence loss keeps the
images of a class apart.

The paper's code was never released. From the paper: two stages, MHCA with dropout, an aligner, mean
squared error on early features, hard labels for DeiT's distillation token, the idea of the
intra-divergence loss. Ours: all formulas and defaults that fill in these words, and soft labels.
DeepInversion (arXiv 1912.08795) follows its authors' code, except where the comment on CIFAR below
says otherwise. The recipe is ViTKD's version of DeiT's. DeiT itself has 5 epochs of warm-up,
stochastic depth 0.1 for every student, repeated augmentation and no clipping. RandAugment is
without SolarizeAdd (torchvision has none).

DeiT-T with RegNetY-16GF as teacher on ImageNet-1k, and demos for a laptop:
    torchrun --nproc_per_node 8 dearkd.py --data data/imagenet --student deit_t
    python dearkd.py --demo                  # or --demo-data-free
Top-1 of DeiT-T (paper): 72.2 % alone, 74.8 % with DearKD.
Measured: CIFAR-10, mean (deviation) of two or three seeds. From half of the images, in 4 epochs,
micro has 51.1 (1.4) % alone and 68.0 (0.3) with ResNet-56 as teacher, 69.2 (0.3) with --soft 4 as
well. From a quarter of the images it has 58.0 (0.6) with the teacher. Without real images it learns
from 2,000 made ones, in one stage with --soft 4 --alpha 1: from DeepInversion's it has 41.2 (0.3),
from DF-DearKD's 42.8 (1.7). This difference is within the deviation. With the default loss it has
36.1 from DF-DearKD's (one seed). Each run had one core of an Intel Xeon or AMD EPYC, in bf16,
2026-11-27 and 28; tests/evidence/README.md.
"""

import argparse
import contextlib
import math
import re
import shutil
import tempfile
import time
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import StochasticDepth
from torchvision.transforms import v2
from torchvision.utils import save_image

import common

# ------------------------------------------------------------------ the loss


class Aligner(nn.Module):
    """Turns patch tokens into a map like a CNN's, for one hint (our reading).

    forward(tokens (B, N, D)) -> map (B, C_t, g, g); N patches in a square grid of g x g, C_t
    channels of the CNN.
    """

    def __init__(self, student_dim, teacher_channels):
        super().__init__()
        self.depthwise = nn.Conv2d(student_dim, student_dim, 3, padding=1, groups=student_dim)
        self.norm = nn.LayerNorm(student_dim, eps=1e-6)
        self.linear = nn.Linear(student_dim, teacher_channels)
        self.to(memory_format=torch.channels_last)  # as tokens lie in memory, channels last

    def forward(self, tokens):
        B, N, D = tokens.shape
        g = math.isqrt(N)
        x = tokens.transpose(1, 2).reshape(B, D, g, g)
        x = self.depthwise(x)                                               # (B, D, g, g)
        x = self.norm(x.permute(0, 2, 3, 1))                                # (B, g, g, D)
        # A CNN's stage ends in a ReLU: its map has no negative values, and GELU gives hardly any
        x = F.gelu(self.linear(x))                                          # (B, g, g, C_t)
        return x.permute(0, 3, 1, 2)                                        # (B, C_t, g, g)


def hint_loss(student_map, teacher_map):
    """L_h of one hint, a scalar: the mean squared error between two maps.

    student_map: (B, C_t, g, g). teacher_map: (B, C_t, h, h); it is averaged to g x g, or enlarged
    bilinearly if it is smaller.
    """
    for feature_map in (student_map, teacher_map):
        if feature_map.shape[2] != feature_map.shape[3]:
            raise ValueError(f"a map of shape {tuple(feature_map.shape)}: it must be square")
    g = student_map.shape[-1]
    mode = "area" if teacher_map.shape[-1] >= g else "bilinear"
    teacher_map = F.interpolate(teacher_map.float(), (g, g), mode=mode)
    return F.mse_loss(student_map.float(), teacher_map)


def soft_loss(student_logits, teacher_logits, temperature):
    """KL(teacher || student), a scalar, mean over images: for --soft (ours). Logits are (B, C).

    The distributions are softmax(logits / T). Gradients shrink as 1 / T^2; the factor T^2 undoes
    this.
    """
    log_p_s = (student_logits.float() / temperature).log_softmax(1)
    log_p_t = (teacher_logits.float() / temperature).log_softmax(1)
    kl = F.kl_div(log_p_s, log_p_t, reduction="batchmean", log_target=True)
    return temperature**2 * kl


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
        B, T, D = x.shape                                                   # T: all tokens
        qkv = self.qkv(x).view(B, T, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                # (B, H, T, D/H) each
        x = F.scaled_dot_product_attention(q, k, v)                         # (B, H, T, D/H)
        return self.proj(x.transpose(1, 2).reshape(B, T, D))


class ConvAttention(Attention):
    """MHCA: attention that can express a convolution (arXiv 2204.12997, section 3; our reading).

    forward(x (B, P+N, D)) -> (B, P+N, D); P = num_prefix_tokens, N = grid_size^2.

    Between patches at grid offset d = (d1, d2), in rows and columns, head h has the logit
        q.k / sqrt(D/H) + v_h . r_d,   r_d = (|d|^2, d1, d2),   v_h = pos_weight[h].
    v_h = -a (1, -2 c1, -2 c2) gives -a |d - c|^2 + const, a Gaussian around offset c. Heads start
    with a = 1 and the c of a 3x3 neighbourhood, centre first: three heads, as deit_t has, begin
    with the centre, the patch above and the one on the left. Prefix tokens (class, distillation)
    have no position: their rows and columns get 0. In training, dropout removes a head's whole
    position term from a forward pass: the head then attends by content alone.
    """

    def __init__(self, dim, num_heads, grid_size, num_prefix_tokens, pos_dropout=0.1):
        super().__init__(dim, num_heads)
        self.num_prefix_tokens = num_prefix_tokens
        self.pos_dropout = pos_dropout

        # c of each head: one of the nine offsets. A tenth head starts with the centre again.
        offset = torch.arange(-1, 2)
        offsets = torch.cartesian_prod(offset, offset)                      # (9, 2)
        centre_first = offsets.square().sum(1).argsort(stable=True)
        c = offsets[centre_first][torch.arange(num_heads) % 9]              # (H, 2)
        a = torch.ones(num_heads, 1)
        self.pos_weight = nn.Parameter(torch.cat([-a, 2 * a * c], 1))       # (H, 3)

        # r_d of each pair of patches: d points from the query to the key
        index = torch.arange(grid_size)
        position = torch.cartesian_prod(index, index).float()               # (N, 2)
        d = position[None, :] - position[:, None]                           # (N, N, 2)
        squared_length = d.square().sum(2, keepdim=True)
        r = torch.cat([squared_length, d], 2)                               # (N, N, 3)
        self.register_buffer("r", r, persistent=False)

    def position_term(self):
        """Return what is added to the logits of every image, (H, P+N, P+N)."""
        term = (self.pos_weight[:, None, None] * self.r).sum(3)             # (H, N, N), float32
        if self.training:
            # Without the usual factor 1 / (1 - p): it would sharpen the Gaussians that stay
            draws = torch.rand(self.num_heads, 1, 1, device=term.device)
            term = term * (draws >= self.pos_dropout)
        P = self.num_prefix_tokens
        return F.pad(term, (P, 0, P, 0))                                    # (H, P+N, P+N)

    def forward(self, x):
        B, T, D = x.shape                                                   # T = P+N tokens
        qkv = self.qkv(x).view(B, T, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                # (B, H, P+N, D/H) each
        term = self.position_term().to(q.dtype)                             # (H, P+N, P+N)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=term)         # (B, H, P+N, D/H)
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
    """DeiT with a class and a distillation token; its first `mhca_blocks` blocks have MHCA.

    forward(images (B, 3, S, S)) -> in training mode (class logits, distillation logits), (B, C)
    each; in eval mode their mean; the normed class token (B, D) if num_classes = 0.
    drop_path: stochastic depth of the last block; it grows linearly from 0 in the first.
    Parameters have timm's names, except blocks.{i}.attn.pos_weight.
    """

    def __init__(self, image_size=224, patch_size=16, dim=384, depth=12, num_heads=6,
                 num_classes=1000, mhca_blocks=0, pos_dropout=0.1, drop_path=0.0):
        super().__init__()
        self.num_classes = num_classes
        g = image_size // patch_size
        N = g**2
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch_size, patch_size)})
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02))
        self.dist_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02))
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 2 + N, dim), std=0.02))
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, drop_path * i / max(1, depth - 1)) for i in range(depth))
        for block in self.blocks[:mhca_blocks]:
            block.attn = ConvAttention(dim, num_heads, g, num_prefix_tokens=2,
                                       pos_dropout=pos_dropout)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        self.head_dist = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def features(self, images, after=()):
        """Return (hidden, (class logits, distillation logits)); logits are (B, C) each, or the
        normed tokens (B, D) if num_classes = 0.

        hidden: {block: patch tokens (B, N, D) after it}, for the blocks in `after`, counted from 0.
        """
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)     # (B, N, D)
        cls_token = self.cls_token.expand(len(x), -1, -1)
        dist_token = self.dist_token.expand(len(x), -1, -1)
        x = torch.cat([cls_token, dist_token, x], 1) + self.pos_embed       # (B, 2+N, D)
        hidden = {}
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in after:
                hidden[i] = x[:, 2:]
        x = self.norm(x)
        return hidden, (self.head(x[:, 0]), self.head_dist(x[:, 1]))

    def forward(self, images):
        _, (cls_logits, dist_logits) = self.features(images)
        if self.num_classes == 0:
            return cls_logits
        if self.training:
            return cls_logits, dist_logits
        return (cls_logits + dist_logits) / 2


# ------------------------------------------------------------------ weights from other ViTs


def resize_position(pos_embed, grid):
    """Resize a position embedding (1, 2 + g*g, D) to (1, 2 + grid*grid, D), bicubically.

    The first two rows belong to the class and the distillation token. They stay.
    """
    g = math.isqrt(pos_embed.shape[1])  # the root of 2 + g*g rounds down to g
    prefix = pos_embed[:, :2]
    patches = pos_embed[:, 2:]
    if g != grid:
        patches = patches.unflatten(1, (g, g)).permute(0, 3, 1, 2)          # (1, D, g, g)
        patches = F.interpolate(patches, (grid, grid), mode="bicubic")
        patches = patches.flatten(2).transpose(1, 2)                        # (1, grid*grid, D)
    return torch.cat([prefix, patches], 1)


def load_weights(vit, weights, source):
    """Load weights strictly, after resizing their position embedding to the ViT's image size."""
    pos_embed = weights.get("pos_embed")
    if pos_embed is not None and pos_embed.ndim == 3:
        rows = pos_embed.shape[1]
        if rows == 2 + math.isqrt(rows)**2:  # else it is of another kind of ViT, and does not load
            grid = math.isqrt(vit.pos_embed.shape[1])  # of 2 + grid*grid rows
            weights = {**weights, "pos_embed": resize_position(pos_embed, grid)}
    common.load_strictly(vit, weights, source)


def load_init(student, path):
    """Start a student from a student.pth of this script, or from a released DeiT-distilled file.

    Heads of another class count stay new. So do MHCA's weights if the file has none of them.
    """
    weights = common.read_weights(path)
    new = student.state_dict()
    heads = {name: x for name, x in new.items() if name.startswith("head")}
    if "head.bias" not in weights or weights["head.bias"].shape != heads["head.bias"].shape:
        weights = {name: x for name, x in weights.items() if not name.startswith("head")}
        weights.update(heads)
        common.print0(f"{path}: both heads are new")
    new_pos_weights = {name: x for name, x in new.items() if name.endswith("pos_weight")}
    if new_pos_weights and not any(name.endswith("pos_weight") for name in weights):
        weights.update(new_pos_weights)
        common.print0(f"{path}: MHCA's pos_weight is new (--mhca-blocks 0 would leave it out)")
    load_weights(student, weights, path)


# ------------------------------------------------------------------ the teacher


class CifarBlock(nn.Module):
    def __init__(self, channels_in, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.new_channels = channels - channels_in

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        # The shortcut has no weights: every stride-th pixel; new channels are 0, half on each side
        x = x[:, :, ::self.stride, ::self.stride]
        half = self.new_channels // 2
        x = F.pad(x, (0, 0, 0, 0, half, half))
        return F.relu(x + y)


class CifarResNet(nn.Module):
    """ResNet for images of 32 px (He et al., arXiv 1512.03385, section 4.2).

    blocks: in each of the three stages. The depth in the CNN's name is 6 * blocks + 2.
    """

    def __init__(self, blocks, num_classes=10):
        super().__init__()

        def stage(channels_in, channels, stride):
            first = CifarBlock(channels_in, channels, stride)
            others = [CifarBlock(channels, channels, 1) for _ in range(blocks - 1)]
            return nn.Sequential(first, *others)

        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = stage(16, 16, 1)
        self.layer2 = stage(16, 32, 2)
        self.layer3 = stage(32, 64, 2)
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


# {name: class}. ResNeXt and wide ResNets are of torchvision's class ResNet, too.
CNNS = {
    "cifar_resnet20": CifarResNet,
    "cifar_resnet32": CifarResNet,
    "cifar_resnet44": CifarResNet,
    "cifar_resnet56": CifarResNet,
    **dict.fromkeys(models.list_models(models, ["resnet*", "resnext*", "wide_*"]), models.ResNet),
    **dict.fromkeys(models.list_models(models, ["regnet*"]), models.RegNet),
}

# stages: the modules whose outputs are the maps. Each ends in a ReLU.
# landmark: a weight by which common.read_weights finds such a CNN in somebody's checkpoint.
KINDS = {
    CifarResNet: {
        "stages": ["layer1", "layer2", "layer3"],
        "classifier": "linear",
        "landmark": "layer1.0.conv1.weight",
    },
    models.ResNet: {
        "stages": ["layer1", "layer2", "layer3", "layer4"],
        "classifier": "fc",
        "landmark": "layer1.0.conv1.weight",
    },
    models.RegNet: {
        "stages": [f"trunk_output.block{stage}" for stage in (1, 2, 3, 4)],
        "classifier": "fc",
        "landmark": "stem.0.weight",
    },
}


def make_cnn(name, num_classes):
    """Return one of CNNS with random weights."""
    if CNNS[name] is CifarResNet:
        depth = int(name.removeprefix("cifar_resnet"))
        return CifarResNet((depth - 2) // 6, num_classes)
    return models.get_model(name, weights=None, num_classes=num_classes)


class Teacher(nn.Module):
    """A frozen CNN that also returns the map at the end of each of its stages.

    forward(images (B, 3, S, S), normalised by common.MEAN and STD) -> logits (B, C)
    """

    def __init__(self, cnn):
        super().__init__()
        kind = KINDS[type(cnn)]
        self.num_classes = cnn.get_submodule(kind["classifier"]).out_features
        self.cnn = create_feature_extractor(cnn.eval(), [*kind["stages"], kind["classifier"]])
        self.requires_grad_(False).eval()
        self.to(memory_format=torch.channels_last)  # the faster layout for convolutions

    def features(self, images):
        """Return (maps [(B, C_1, h_1, h_1), ...] of the stages, large first; logits (B, C))."""
        *maps, logits = self.cnn(images).values()
        return maps, logits

    def forward(self, images):
        return self.features(images)[1]


def load_cnn_weights(cnn, weights, source):
    """Load weights strictly into one of CNNS."""
    # Files from before torch 0.4.1 lack BatchNorm's counters, which nothing here reads
    counters = {name: x for name, x in cnn.state_dict().items() if name.endswith("batches_tracked")}
    common.load_strictly(cnn, {**counters, **weights}, source)


def load_cnn_init(cnn, path):
    """Start a CNN from a file of its weights. A classifier of another class count stays new."""
    kind = KINDS[type(cnn)]
    prefix = f"{kind['classifier']}."
    weights = common.read_weights(path, kind["landmark"])
    new = cnn.get_submodule(kind["classifier"]).state_dict(prefix=prefix)
    bias = f"{prefix}bias"
    if bias not in weights or weights[bias].shape != new[bias].shape:
        weights = {name: x for name, x in weights.items() if not name.startswith(prefix)}
        weights.update(new)
        common.print0(f"{path}: the classifier is new")
    load_cnn_weights(cnn, weights, path)


def find_teacher(name, weights):
    """Return (file or address of a teacher's weights, its name in CNNS)."""
    if name in CNNS:
        if weights:
            return weights, name
        if CNNS[name] is CifarResNet:
            raise common.InputError(f"{name} has no download: give its file as --teacher-weights")
        return models.get_model_weights(name).DEFAULT.url, name
    if not Path(name).is_file():
        raise common.InputError(f"unknown teacher {name}: choose {', '.join(CNNS)}, none, or the "
                                "path of a student.pth of --train-teacher")
    if weights:
        raise common.InputError(f"--teacher {name} is a file already: leave out --teacher-weights")
    saved = common.load_checkpoint(name)
    cnn_name = saved.get("cnn") if isinstance(saved, dict) else None
    if cnn_name not in list(CNNS):  # a list: a file may hold what cannot be a key
        raise common.InputError(
            f"{name} is not a student.pth of --train-teacher. For a file of other weights choose "
            f"the name, {', '.join(CNNS)}, and give the file as --teacher-weights")
    return name, cnn_name


def load_teacher(name, weights=None, num_classes=1000):
    """Return a frozen Teacher in eval mode.

    name: one of CNNS, with its weights in the file `weights` or else downloaded; or the path of a
    student.pth of --train-teacher. num_classes None: as many as the weights have. Raises
    common.InputError, a ValueError, if the name is unknown or the file does not fit.
    """
    source, cnn_name = find_teacher(name, weights)
    kind = KINDS[CNNS[cnn_name]]
    state = common.read_weights(source, kind["landmark"])
    bias = f"{kind['classifier']}.bias"
    if bias not in state:
        raise common.InputError(f"{source} has no {bias}: the teacher must be a classifier")
    teacher_classes = state[bias].numel()
    if num_classes is not None and num_classes != teacher_classes:
        raise common.InputError(
            f"the teacher has {teacher_classes} classes, the data {num_classes}: fine-tune it on "
            f"the data by --train-teacher {cnn_name} --init {source}, then take its student.pth")
    cnn = make_cnn(cnn_name, teacher_classes)
    load_cnn_weights(cnn, state, source)
    return Teacher(cnn)


# ------------------------------------------------------------------ training


class Distillation(nn.Module):
    """Everything that is trained, in one module for one DistributedDataParallel.

    forward(images, target, teacher_features) -> {name: loss term}; the loss is their sum.
    target: labels (B,), or (B, C) from MixUp and CutMix.
    teacher_features: what the teacher's features(images) returns; None in stage 2.
    hints: [(block, stage), ...], an aligner for each. Blocks count from 0, stages from 1.
    soft: temperature of soft labels; None or 0: the teacher's class is a hard label.
    """

    def __init__(self, student, aligners, hints, alpha=0.5, beta=10.0, label_smoothing=0.1,
                 soft=None):
        super().__init__()
        self.student = student
        self.aligners = aligners
        self.hints = hints
        self.alpha = alpha
        self.beta = beta
        self.label_smoothing = label_smoothing
        self.soft = soft

    def forward(self, images, target, teacher_features):
        blocks = [block for block, _ in self.hints]
        hidden, (cls_logits, dist_logits) = self.student.features(images, blocks)
        cls_logits = cls_logits.float()
        dist_logits = dist_logits.float()
        cls_ce = F.cross_entropy(cls_logits, target, label_smoothing=self.label_smoothing)
        losses = {}  # as they enter the sum: with their weights

        # Stage 2: CE of both heads against the labels, half each
        if teacher_features is None:
            dist_ce = F.cross_entropy(dist_logits, target, label_smoothing=self.label_smoothing)
            losses["ce"] = (cls_ce + dist_ce) / 2
            return losses

        # Stage 1: (1 - alpha) CE(class logits, y) + alpha L_logits + beta * sum of L_h, where
        # L_logits is CE(distillation logits, the CNN's class), or with `soft` the mean KL of both
        # heads from the CNN's distribution
        maps, teacher_logits = teacher_features
        losses["ce"] = (1 - self.alpha) * cls_ce
        if self.soft:
            cls_kl = soft_loss(cls_logits, teacher_logits, self.soft)
            dist_kl = soft_loss(dist_logits, teacher_logits, self.soft)
            losses["logits"] = self.alpha * (cls_kl + dist_kl) / 2
        else:  # as in DeiT: the distillation token learns the teacher's class
            dist_ce = F.cross_entropy(dist_logits, teacher_logits.argmax(1))
            losses["logits"] = self.alpha * dist_ce
        if self.hints:
            hint_sum = 0
            for align, (block, cnn_stage) in zip(self.aligners, self.hints):
                hint_sum = hint_sum + hint_loss(align(hidden[block]), maps[cnn_stage - 1])
            losses["hints"] = self.beta * hint_sum
        return losses


def parse_hints(text, depth, num_stages):
    """Return [(block, stage), ...]: "1:1,3:2" -> [(1, 1), (3, 2)], "none" -> []."""
    if text == "none":
        return []
    hints = []
    for pair in text.split(","):
        match = re.fullmatch(r"(\d+):(\d+)", pair)
        if not match:
            raise common.InputError(f"--hints {text}: write block:stage,block:stage,... or none")
        block = int(match[1])
        stage = int(match[2])
        if block >= depth or not 1 <= stage <= num_stages:
            raise common.InputError(f"--hints {text}: there are blocks 0 to {depth - 1} and "
                                    f"stages 1 to {num_stages}")
        hints.append((block, stage))
    return hints


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
            "num_classes": num_classes, "mhca_blocks": args.mhca_blocks}
    student = ViT(**arch, pos_dropout=args.pos_dropout, drop_path=args.drop_path)
    if args.init:
        load_init(student, args.init)

    teacher = None
    hints = []
    aligners = nn.ModuleList()
    if args.teacher != "none":
        teacher = load_teacher(args.teacher, args.teacher_weights, num_classes)
        maps, _ = teacher.features(torch.zeros(1, 3, args.image_size, args.image_size))
        hints = parse_hints(args.hints, arch["depth"], len(maps))
        for _, cnn_stage in hints:
            aligners.append(Aligner(arch["dim"], maps[cnn_stage - 1].shape[1]))
        teacher.to(device)

    model = Distillation(student, aligners, hints, args.alpha, args.beta, args.label_smoothing,
                         args.soft)
    model.to(device)
    ema = common.moving_average(student, args.ema_decay)  # what is evaluated and saved

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
        top1 = common.evaluate(teacher, val_batches, device, autocast)
        common.print0(f"teacher {args.teacher}: top-1 {top1:.1f} % on the validation images")

    # ---- compile, and several processes ----
    if args.compile:
        model.compile(dynamic=False)  # in place, so that names in state_dict() stay as they are
        if teacher:
            teacher.features = torch.compile(teacher.features, dynamic=False)
    ddp = None  # made at the start of a stage
    bad_steps_in_a_row = 0

    for epoch in range(len(log), args.epochs):
        # ---- stage 1 has the teacher; in stage 2 it does not run, and the aligners rest ----
        # A student alone is in stage 2 from the start
        stage = 1 if teacher and epoch < args.stage1_epochs else 2
        if ddp is None or epoch == args.stage1_epochs:
            # DDP expects a gradient of each parameter that requires one when DDP is made. In stage
            # 2 the aligners get none: they are switched off, and DDP is made anew.
            aligners.requires_grad_(stage == 1)
            ddp = DDP(model, gradient_as_bucket_view=True) if common.world_size() > 1 else model

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
                    teacher_features = teacher.features(x) if stage == 1 else None
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
            "stage": stage,
            **common.mean_over_processes(loss_sums, steps_per_epoch, device),
            "lr": lr,
            "skipped_steps": skipped_steps,
            **batches.speed(),
            "peak_memory_gb": common.peak_memory_gb(),
        }
        last_of_stage = epoch + 1 in (args.stage1_epochs, args.epochs)
        if (epoch + 1) % args.eval_every == 0 or last_of_stage:
            record["top1"] = common.evaluate(ema.module, val_batches, device, autocast)
        record["seconds"] = batches.seconds()
        log.append(record)
        common.log_epoch(args.out, log, args.epochs)

        # ---- checkpoints: the student as a plain ViT, and what --resume needs ----
        if common.rank() == 0:
            common.save_checkpoint(f"{args.out}/student.pth", model=common.cpu_weights(ema.module),
                                   arch=arch, script="dearkd", trained_on=trained_on)
            states = {name: part.state_dict() for name, part in stateful.items()}
            common.save_checkpoint(f"{args.out}/last.pth", **states, log=log, args=settings)
    return log[-1]


def train_cnn(args, device):
    """Train the CNN args.train_teacher on the labels. Return the record of the last epoch.

    There is no MixUp, CutMix, stochastic depth, moving average or torch.compile here. In a step the
    BatchNorms of each process use the statistics of its own part of the batch.
    """

    # ---- precision ----
    args.amp = args.amp or common.best_precision(device)
    common.describe_run(device, args.amp)
    autocast = torch.autocast(device.type, common.DTYPES[args.amp], enabled=args.amp != "off")
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")

    # ---- data ----
    if args.batch_size < 2 * common.world_size():
        raise common.InputError(f"--batch-size {args.batch_size}: BatchNorm needs two images or "
                                "more in each process")
    train_images, val_images = common.load_data(args.data, args.val, args.image_size)
    num_classes = len(train_images.classes)
    indices = common.class_balanced_subset(train_images.targets, args.data_fraction)
    augment = common.train_transform(args.image_size, (args.crop_scale, 1.0), args.rand_augment,
                                     args.random_erasing)
    train_set = common.Images(train_images, indices, augment, args.seed)
    val_set = common.Images(val_images, range(len(val_images)),
                            common.val_transform(args.image_size), replace_unreadable=False)
    common.print_counts(train_set, val_set)
    train_batches = common.train_loader(train_set, args.batch_size, 1, args.workers, args.seed)
    val_batches = common.val_loader(val_set, args.batch_size // common.world_size(), args.workers)
    steps_per_epoch = len(train_batches)

    # ---- model and optimiser ----
    torch.manual_seed(args.seed)
    cnn = make_cnn(args.train_teacher, num_classes)
    if args.init:
        load_cnn_init(cnn, args.init)
    cnn.to(device, memory_format=torch.channels_last)
    groups = common.parameter_groups(cnn, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.999), fused=True)

    # ---- classes and image size of --init and a resumed CNN ----
    trained_on = {"classes": list(train_images.classes), "image_size": args.image_size}
    resumed = f"{args.out}/student.pth" if args.resume else None
    for path in (args.init, resumed):
        common.compare_with_training(path, **trained_on)

    # ---- resume ----
    stateful = {"model": cnn, "optimizer": optimizer, "scaler": scaler}
    settings = {**vars(args), "num_classes": num_classes}  # --resume compares them
    log = []  # one record an epoch
    checkpoint = common.open_run(args.out, args.resume, settings)
    if checkpoint:
        log = checkpoint["log"]
        for name, part in stateful.items():
            part.load_state_dict(checkpoint[name])
    ddp = DDP(cnn) if common.world_size() > 1 else cnn
    bad_steps_in_a_row = 0

    for epoch in range(len(log), args.epochs):
        train_batches.sampler.set_epoch(epoch)  # the order of images
        train_set.epoch = epoch  # their augmentation
        cnn.train()
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

            # ---- forward and backward ----
            statistics = [buffer.clone() for buffer in cnn.buffers()]
            with autocast:
                logits = ddp(images)
            loss = F.cross_entropy(logits.float(), target, label_smoothing=args.label_smoothing)
            scaler.scale(loss).backward()
            loss_sums["ce"] += loss.detach().nan_to_num(0, 0, 0)

            # ---- step, if the averaged gradients are finite; all processes agree on that ----
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(cnn.parameters(), args.clip_grad or math.inf)
            if norm.isfinite():
                scaler.step(optimizer)
                bad_steps_in_a_row = 0
            else:
                for buffer, before in zip(cnn.buffers(), statistics):
                    buffer.copy_(before)  # BatchNorm's averages would keep a NaN for ever
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
        if common.world_size() > 1:
            for buffer in cnn.buffers():
                # Each process has BatchNorm statistics of its own images since the last forward
                # pass. All take those of the first, which are saved.
                torch.distributed.broadcast(buffer, 0)
        record = {
            "epoch": epoch + 1,
            **common.mean_over_processes(loss_sums, steps_per_epoch, device),
            "lr": lr,
            "skipped_steps": skipped_steps,
            **batches.speed(),
            "peak_memory_gb": common.peak_memory_gb(),
        }
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
            record["top1"] = common.evaluate(cnn, val_batches, device, autocast)
        record["seconds"] = batches.seconds()
        log.append(record)
        common.log_epoch(args.out, log, args.epochs)

        # ---- checkpoints: the CNN as a teacher, and what --resume needs ----
        if common.rank() == 0:
            common.save_checkpoint(f"{args.out}/student.pth", model=common.cpu_weights(cnn),
                                   cnn=args.train_teacher, trained_on=trained_on)
            states = {name: part.state_dict() for name, part in stateful.items()}
            common.save_checkpoint(f"{args.out}/last.pth", **states, log=log, args=settings)
    return log[-1]


# ------------------------------------------------------------------ no real images: DF-DearKD

# Images x of classes y are made from the weights of a CNN alone. From noise, Adam minimises
#     CE(CNN(x), y)            each image shows its class
#     + tv * TV(x)             neighbouring pixels are alike: total variation
#     + l2 * mean_i ||x_i||    colours are moderate
#     + bn * sum_l w_l (||mean_l(x) - mean_l|| + ||var_l(x) - var_l||)
#                              the input of BatchNorm l has the mean and variance of real images
#     + divergence * L_bp      images of a class differ: DF-DearKD; without it DeepInversion
# The next function is L_bp, the paper's boundary-preserving intra-divergence loss.


def intra_divergence_loss(features, labels):
    """L_bp of DF-DearKD (our reading), a scalar: spreads the images of a class up to its boundary.

    features: (B, D), L2-normalised here; labels: (B,). Image i and its nearest class-mate e are
    pushed apart. The farthest one, h, marks the boundary of the class and is fixed in this term:
        L_bp = mean_i max(0, stopgrad(d_ih) - d_ie)
    The mean is over images with two class-mates or more: with fewer than three images of each class
    L_bp is 0. d is the Euclidean distance: unlike that of 1 - cosine, its gradient does not vanish
    between near-copies.
    """
    f = F.normalize(features.float(), dim=1)
    is_mate = labels[:, None] == labels                                     # (B, B)
    is_mate.fill_diagonal_(False)
    with torch.no_grad():
        # Matrix products, which cdist may use, are inexact for near-copies
        d = torch.cdist(f, f, compute_mode="donot_use_mm_for_euclid_dist")  # (B, B)
        farthest = d.masked_fill(~is_mate, -math.inf).amax(1)               # d_ih, (B,)
        e = d.masked_fill(~is_mate, math.inf).argmin(1)                     # (B,)
    # The same distance again, with gradients
    nearest = (f - f[e]).norm(dim=1)                                        # d_ie, (B,)
    has_two_mates = is_mate.sum(1) >= 2                                     # (B,)
    terms = (farthest - nearest).clamp(min=0) * has_two_mates
    return terms.sum() / has_two_mates.sum().clamp(min=1)


def total_variation(x):
    """Return the sum of four L2 norms over all images x (B, 3, S, S), a scalar.

    They are those of the differences between neighbours: right, below, and on both diagonals. As in
    DeepInversion's code the sum grows with the root of B: more images at once are smoother.
    """
    right = x[..., :, 1:] - x[..., :, :-1]
    below = x[..., 1:, :] - x[..., :-1, :]
    diagonal = x[..., 1:, 1:] - x[..., :-1, :-1]
    other_diagonal = x[..., 1:, :-1] - x[..., :-1, 1:]
    return right.norm() + below.norm() + diagonal.norm() + other_diagonal.norm()


def batch_norm_loss(inputs, first_weight=10.0):
    """Return sum_l w_l (||mean_l(x) - mean_l|| + ||var_l(x) - var_l||), a scalar.

    inputs: {BatchNorm: its input (B, C, h, w)}, in the order of the network. mean_l and var_l, (C,)
    each, are stored in BatchNorm l. first_weight: w_0; the other weights are 1.
    """
    distances = []
    for batch_norm, x in inputs.items():
        # Only the sums are float32: a copy of x in float32 would cost more time than the rest. The
        # rounding of x * x averages out.
        x = x.permute(0, 2, 3, 1).flatten(0, 2)                             # (B*h*w, C)
        mean = x.sum(0, dtype=torch.float32) / len(x)                       # (C,)
        mean_square = (x * x).sum(0, dtype=torch.float32) / len(x)          # (C,)
        var = mean_square - mean.square()                                   # (C,)
        mean_distance = (mean - batch_norm.running_mean).norm()
        var_distance = (var - batch_norm.running_var).norm()
        distances.append(mean_distance + var_distance)
    return first_weight * distances[0] + sum(distances[1:])


class Observer(nn.Module):
    """A Teacher that also measures how far its BatchNorms' inputs are from those of real images.

    forward(images (B, 3, S, S), first_weight of batch_norm_loss, autocast of the teacher) ->
    features before the classifier (B, D), logits (B, C), batch_norm_loss. It is a module of its own
    so that torch.compile can fuse BatchNorm with its statistics: observer.compile().
    """

    def __init__(self, teacher):
        super().__init__()
        self.teacher = teacher
        self.inputs = {}  # {BatchNorm: its input in the latest forward pass}
        norms = [module for module in teacher.modules() if isinstance(module, nn.BatchNorm2d)]
        self.hooks = [norm.register_forward_pre_hook(self.remember_input) for norm in norms]

    def remember_input(self, norm, arguments):
        self.inputs[norm] = arguments[0]

    def remove_hooks(self):
        for hook in self.hooks:
            hook.remove()

    def forward(self, images, first_weight, autocast):
        with autocast:
            maps, logits = self.teacher.features(images)
        features = maps[-1].float().mean((2, 3))                            # (B, D)
        return features, logits.float(), batch_norm_loss(self.inputs, first_weight)


# Above 64 px. All but divergence are DeepInversion's for ImageNet, tuned on torchvision's first
# weights of ResNet-50 (V1). Flags of the same names replace them.
IMAGENET = {
    "half_steps": 2000,      # steps in which the CNN sees the images average-pooled by 2
    "steps": 1000,           # then steps at full size
    "image_lr": 0.25,        # Adam's learning rate
    "betas": (0.5, 0.9),     # Adam's
    "tv": 1e-4,
    "l2": 1e-5,
    "bn": 0.01,
    "first_bn": 10.0,        # w_0, the weight of the first BatchNorm; the others have 1
    "jitter": 30,            # in each step images of full size are rolled by up to 30 pixels
    "divergence": 1.0,
}

# Up to 64 px. image_lr, betas, l2 and jitter are DeepInversion's for CIFAR-10. Ours are divergence,
# bn (theirs: 10 or 100), first_bn (theirs: 1) and tv (theirs: 2.5e-5 to 1e-3), chosen by how well
# other networks recognise the images (tests/evidence/README.md). Schedule, clipping and flips, too,
# are those of IMAGENET: their code for CIFAR-10 has none of them.
CIFAR = {
    "half_steps": 0,
    "steps": 2000,
    "image_lr": 0.1,
    "betas": (0.9, 0.999),
    "tv": 3e-3,
    "l2": 0.0,
    "bn": 0.05,
    "first_bn": 10.0,
    "jitter": 2,
    "divergence": 1.0,
}


def synthesize(teacher, labels, image_size, *, half_steps, steps, image_lr, betas, tv, l2, bn,
               first_bn, jitter, divergence, seed=0, autocast=contextlib.nullcontext()):
    """Make images of the classes `labels` (B,) from a Teacher's weights alone: (B, 3, S, S).

    S = image_size. The images are normalised by common.MEAN and STD. The teacher is not changed.
    It may be an Observer of one, which can be compiled and then serves many calls.
    The settings from half_steps to divergence are explained above and at IMAGENET:
    synthesize(teacher, labels, 224, **IMAGENET). Take many classes at once, since BatchNorm's
    statistics are those of all. autocast: a context manager for the teacher's forward pass.
    """
    device = labels.device
    generator = torch.Generator().manual_seed(seed)
    mean = torch.tensor(common.MEAN, device=device)[:, None, None]          # (3, 1, 1)
    std = torch.tensor(common.STD, device=device)[:, None, None]
    black = (0 - mean) / std
    white = (1 - mean) / std
    noise = torch.randn(len(labels), 3, image_size, image_size, generator=generator)
    images = noise.to(device).clamp(black, white).requires_grad_()

    observer = teacher if isinstance(teacher, Observer) else Observer(teacher)

    # First the CNN sees the images at half size, then as they are
    for pool, num_steps in ((2, half_steps), (1, steps)):
        optimizer = torch.optim.Adam([images], image_lr, betas)
        for step in range(num_steps):
            # ---- learning rate: warm-up over 100 steps, at most a tenth of all; then cosine ----
            # common.learning_rate counts epochs, here steps. At the start of step 0 the rate would
            # be 0, hence the middle of each step.
            optimizer.param_groups[0]["lr"] = common.learning_rate(
                step + 0.5, num_steps, image_lr, min_lr=0, warmup_epochs=100)

            # ---- a random roll and flip: the class must not depend on the position ----
            x = F.avg_pool2d(images, pool)                              # (B, 3, S/pool, S/pool)
            max_shift = jitter // pool
            shift = torch.randint(-max_shift, max_shift + 1, (2,), generator=generator)
            x = x.roll(shift.tolist(), dims=(2, 3))
            if torch.rand((), generator=generator) < 0.5:
                x = x.flip(3)

            # ---- loss ----
            features, logits, batch_norm = observer(x, first_bn, autocast)
            losses = {
                "ce": F.cross_entropy(logits, labels),
                "tv": tv * total_variation(x),
                "l2": l2 * x.flatten(1).norm(dim=1).mean(),
                "bn": bn * batch_norm,
                "divergence": divergence * intra_divergence_loss(features, labels)}

            # ---- step: the gradient of the images alone; then back into the range of photos ----
            images.grad = torch.autograd.grad(sum(losses.values()), images)[0]
            optimizer.step()
            with torch.no_grad():
                images.clamp_(black, white)

            if (step + 1) % 500 == 0 or step + 1 == num_steps:
                terms = "  ".join(f"{name} {term:.3f}" for name, term in losses.items())
                common.print0(f"step {step + 1}/{num_steps} at {x.shape[-1]} px  {terms}")

    if observer is not teacher:
        observer.remove_hooks()
    return images.detach()


def plan_batches(num_classes, images_per_class, batch_size, seed):
    """Return the batches, lists of (class, number). Each image is in one of them.

    At least four images of a class are together, if it has that many: L_bp compares class-mates.
    """
    # Groups of 4 to 7 images of a class, or of all if there are fewer; classes in random order
    generator = np.random.default_rng(seed)
    groups = []
    for numbers in np.array_split(np.arange(images_per_class), max(1, images_per_class // 4)):
        for label in generator.permutation(num_classes):
            groups.append([(int(label), int(number)) for number in numbers])

    # Batches whose numbers of groups differ by at most one
    groups_per_batch = max(1, batch_size // len(groups[0]))  # the first group is a largest one
    num_batches = math.ceil(len(groups) / groups_per_batch)
    batches = []
    for indices in np.array_split(np.arange(len(groups)), num_batches):
        batch = []
        for i in indices:
            batch += groups[i]
        batches.append(batch)
    return batches


def open_folder(out, resume, settings, class_names):
    """Make out/train/CLASS, or continue there. Refuse a folder of images from elsewhere."""
    train_folder = out / "train"
    is_ours = (out / "last.pth").exists()
    if not is_ours and train_folder.exists() and any(train_folder.iterdir()):
        raise common.InputError(f"--synthesize {out}: {train_folder} holds files that it did not "
                                "write, and would mix with them. Choose another folder")
    checkpoint = common.open_run(out, resume, settings)
    if checkpoint is None:  # written before the first image, so that no image is without it
        common.save_checkpoint(out / "last.pth", args=settings, log=[])
    train_folder.mkdir(parents=True, exist_ok=True)
    other_classes = sorted(set(common.class_folders(train_folder)) - set(class_names))
    if other_classes:
        raise common.InputError(f"{train_folder} has other classes, {common.listed(other_classes)}:"
                                " continue with the --val of the first time")
    for name in class_names:
        (train_folder / name).mkdir(exist_ok=True)


def fill_folder(args, device):
    """Fill args.synthesize with images from the weights of args.teacher: train/CLASS/NUMBER.png.

    preview.png shows up to 64 of the first batch. A batch depends on the seed and its number alone,
    and a batch whose files exist is skipped. So with --resume the same command continues after a
    kill, and ends with the same files (on a CPU, bit for bit).
    """
    out = Path(args.synthesize)

    # ---- precision ----
    args.amp = args.amp or common.best_precision(device)
    if args.amp == "fp16":
        args.amp = "off"  # fp16 is too coarse for the gradients of pixels
    common.describe_run(device, args.amp)
    autocast = torch.autocast(device.type, common.DTYPES[args.amp], enabled=args.amp != "off")

    # ---- teacher, and the names of its classes ----
    teacher = load_teacher(args.teacher, args.teacher_weights, num_classes=None).to(device)
    observer = Observer(teacher)
    if args.compile:
        observer.compile(dynamic=False)
    # Numbers of one length, so that sorted names are in the order of the CNN's outputs
    class_names = [f"{label:05d}" for label in range(teacher.num_classes)]
    if args.val:
        # Later --val measures a student: training and validation need folders of the same names
        try:
            class_names = common.class_folders(args.val)
        except OSError as error:
            raise common.InputError(f"--val {args.val}: {error}") from error
        if len(class_names) != teacher.num_classes:
            raise common.InputError(f"the teacher has {teacher.num_classes} classes, --val "
                                    f"{args.val} {len(class_names)}")

    # ---- settings: those of the image size, then the flags that the user gave ----
    given = {name: value for name, value in vars(args).items()
             if name in IMAGENET and value is not None}
    settings = {**(CIFAR if args.image_size <= 64 else IMAGENET), **given}
    if settings["divergence"] and args.images_per_class < 3:
        common.print0("fewer than 3 images of a class: the intra-divergence loss is 0, so this is "
                      "DeepInversion")
    for path in (args.teacher, args.teacher_weights):
        common.compare_with_training(path, class_names if args.val else None, args.image_size)
    if common.rank() == 0:
        open_folder(out, args.resume, {**vars(args), **settings}, class_names)
    if common.world_size() > 1:
        torch.distributed.barrier()

    # ---- batches ----
    mean = torch.tensor(common.MEAN)[:, None, None]
    std = torch.tensor(common.STD)[:, None, None]
    batches = plan_batches(len(class_names), args.images_per_class, args.images_per_batch,
                           args.seed)
    for i in range(common.rank(), len(batches), common.world_size()):
        files = [out / "train" / class_names[label] / f"{number:05d}.png"
                 for label, number in batches[i]]
        if all(file.exists() for file in files):
            continue
        start = time.time()
        labels = torch.tensor([label for label, _ in batches[i]], device=device)
        images = synthesize(observer, labels, args.image_size, **settings,
                            seed=common.seed_of(args.seed, i), autocast=autocast)
        if not images.isfinite().all():
            raise common.InputError("the images became NaN: lower --image-lr, or try --amp off")
        with torch.no_grad(), autocast:
            seen = (teacher(images).argmax(1) == labels).float().mean()

        pixels = images.cpu() * std + mean                              # (B, 3, S, S), 0 to 1
        if i == 0:
            save_whole(pixels[:64], out / "preview.png", out)
        for image, file in zip(pixels, files):
            save_whole(image, file, out)
        seconds = time.time() - start
        batches_left = (len(batches) - 1 - i) // common.world_size()
        left = common.duration(batches_left * seconds)
        judged = f"the CNN sees the class in {seen:.0%} of {len(files)} images"
        speed = f"{len(files) / seconds:.3g} images/s"
        common.print0(f"batch {i + 1} of {len(batches)}: {judged}  {speed}  left {left}")
    if common.world_size() > 1:
        torch.distributed.barrier()
    common.print0(f"{out / 'train'} is complete: {args.images_per_class} images of each of "
                  f"{len(class_names)} classes")


def save_whole(pixels, path, folder):
    """Write a PNG whole or not at all: a kill leaves no half file in a class."""
    temporary = folder / f"{common.rank()}.tmp"
    save_image(pixels, temporary, format="png")
    temporary.replace(path)


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

    nets = parser.add_argument_group("models")
    nets.add_argument("--student", choices=SIZES, default="deit_t",
                      help="the ViT to train; micro, of 0.7 million parameters, is for CPUs "
                           "(%(default)s)")
    nets.add_argument("--init", metavar="FILE",
                      help="start from the weights of a student.pth of this script, or of a "
                           "released DeiT with distillation token; with --train-teacher from "
                           "those of that CNN, such as torchvision's. Heads for another number of "
                           "classes are replaced by new ones")
    nets.add_argument("--teacher", default="regnet_y_16gf",
                      help=f"{', '.join(CNNS)}; or the path of a student.pth of --train-teacher; "
                           "or none, to learn from labels alone (%(default)s)")
    nets.add_argument("--teacher-weights", metavar="FILE",
                      help="file or https address of the named teacher's weights, instead of the "
                           "usual download; cifar_* need it")
    nets.add_argument("--train-teacher", choices=CNNS, metavar="CNN",
                      help="train this CNN on the labels: student.pth in --out is then a teacher. "
                           "Use --init, because from random weights it needs many images. MixUp, "
                           "CutMix, --drop-path, --ema-decay and --compile have no effect here")
    nets.add_argument("--patch-size", type=common.positive_int, default=16,
                      help="side length of a patch in pixels (%(default)s)")
    nets.add_argument("--mhca-blocks", type=common.non_negative_int, default=4,
                      help="how many of the first blocks have attention with a position term, "
                           "MHCA (%(default)s)")
    nets.add_argument("--pos-dropout", type=common.fraction, default=0.1,
                      help="probability that a head of MHCA does without its position term in a "
                           "training step (%(default)s)")

    loss = parser.add_argument_group("loss")
    loss.add_argument("--stage1-epochs", type=common.non_negative_int,
                      help="epochs with the teacher; those after them have only labels (5/6 of "
                           "all)")
    loss.add_argument("--hints", default="1:1,3:2", metavar="BLOCK:STAGE,...",
                      help="1:1 means that the tokens after block 1 learn the CNN's map after "
                           "stage 1; blocks count from 0, stages from 1; or none (%(default)s)")
    loss.add_argument("--alpha", type=common.fraction, default=0.5,
                      help="stage 1: weight of the loss against the teacher's class; that against "
                           "the labels has 1 - alpha (%(default)s)")
    loss.add_argument("--beta", type=common.non_negative, default=10.0,
                      help="stage 1: weight of the hints. Their scale differs from CNN to CNN: "
                           "compare hints with ce in the log (%(default)s)")
    loss.add_argument("--soft", type=common.non_negative, metavar="T",
                      help="learn the teacher's distribution at this temperature instead of its "
                           "class, with both heads; in short runs 4 was better than the class; "
                           "--alpha 1 then leaves out the labels (off)")

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

    free = parser.add_argument_group(
        "no real images", "Of two defaults the first is for images up to 64 px.")

    def both(name):
        return f"({CIFAR[name]:g}; {IMAGENET[name]:g})"

    free.add_argument("--synthesize", metavar="DIR",
                      help="make images from the teacher's weights, in DIR/train/CLASS; --resume "
                           "continues, --compile makes it faster. Classes have the names of the "
                           "folders in --val, or numbers. Then train with --data DIR --val FOLDER "
                           "at the same --image-size")
    free.add_argument("--images-per-class", type=common.positive_int, default=100,
                      help="how many to make (%(default)s)")
    free.add_argument("--images-per-batch", type=common.positive_int, default=128,
                      help="how many to make at once, 7 or more; with more, BatchNorm's "
                           "statistics fit better, and total variation weighs more (%(default)s)")
    free.add_argument("--half-steps", type=common.non_negative_int,
                      help=f"first steps, at half the image size {both('half_steps')}")
    free.add_argument("--steps", type=common.non_negative_int,
                      help=f"steps at the full size {both('steps')}")
    free.add_argument("--image-lr", type=common.non_negative,
                      help=f"learning rate of the pixels {both('image_lr')}")
    free.add_argument("--tv", type=common.non_negative,
                      help=f"weight of total variation; more makes images smoother {both('tv')}")
    free.add_argument("--bn", type=common.non_negative,
                      help=f"weight of BatchNorm's statistics {both('bn')}")
    free.add_argument("--divergence", type=common.non_negative,
                      help="weight of the intra-divergence loss, which needs 3 images a class; 0: "
                           f"DeepInversion {both('divergence')}")

    run = parser.add_argument_group("run")
    run.add_argument("--amp", choices=common.DTYPES,
                     help="precision of matrix products, off is float32; without this flag the "
                          "fastest that the device computes natively")
    run.add_argument("--compile", action="store_true",
                     help="torch.compile student and teacher: the first step is slow, later ones "
                          "are faster")
    run.add_argument("--out", default="out/dearkd",
                     help="folder for student.pth, last.pth, log.jsonl, args.json (%(default)s)")
    run.add_argument("--resume", action="store_true",
                     help="continue the run in --out after its last whole epoch, if there is one")
    run.add_argument("--eval-every", type=common.positive_int, default=1,
                     help="epochs between evaluations (%(default)s)")
    run.add_argument("--log-every", type=common.positive_int, default=50,
                     help="steps between progress lines (%(default)s)")
    run.add_argument("--demo", action="store_true",
                     help="train a CNN and two small ViTs on drawn shapes, without data, download "
                          "or GPU; of the other flags only --workers and --seed count")
    run.add_argument("--demo-data-free", action="store_true",
                     help="train a CNN on drawn shapes, then make images from its weights, see "
                          "out/demo-*.png; of the other flags only --workers and --seed count")
    args = parser.parse_args(argv)
    common.refuse_empty_flags(args)

    is_for_student = not (args.train_teacher or args.synthesize)  # a CNN has no patches
    if is_for_student and args.image_size % args.patch_size:
        parser.error(f"--image-size {args.image_size} is not a multiple of --patch-size "
                     f"{args.patch_size}")
    modes = {"--train-teacher": args.train_teacher, "--synthesize": args.synthesize,
             "--demo": args.demo, "--demo-data-free": args.demo_data_free}
    chosen = [flag for flag, value in modes.items() if value]
    if len(chosen) > 1:
        parser.error(f"{' and '.join(chosen)} are different tasks: give one of them")
    if args.synthesize and args.amp == "fp16":
        parser.error("--amp fp16 is too coarse for the gradients of pixels: take bf16 or off")
    if args.teacher == "none" and args.teacher_weights:
        parser.error("--teacher-weights needs the name of its --teacher, not none")
    if args.synthesize and args.teacher == "none":
        parser.error("--synthesize needs a --teacher")
    if args.train_teacher and args.teacher_weights:
        parser.error("--train-teacher takes no --teacher-weights: give its first weights as --init")
    if args.train_teacher and args.accum > 1:
        parser.error("--train-teacher takes no --accum: BatchNorm needs the whole batch")
    if args.mhca_blocks > SIZES[args.student]["depth"]:
        parser.error(f"--mhca-blocks {args.mhca_blocks}: {args.student} has "
                     f"{SIZES[args.student]['depth']} blocks")
    if args.images_per_batch < 7:
        parser.error("--images-per-batch must be 7 or more: up to 7 images of a class stay "
                     "together")
    if args.stage1_epochs is None:
        args.stage1_epochs = round(args.epochs * 5 / 6)
    if args.stage1_epochs > args.epochs:
        parser.error(f"--stage1-epochs {args.stage1_epochs} is more than --epochs {args.epochs}")
    has_teacher = is_for_student and args.teacher != "none"
    if has_teacher and args.alpha == 1 and not args.soft and args.stage1_epochs == args.epochs:
        parser.error("--alpha 1 without a second stage: the class token would learn nothing; add "
                     "--soft, or lower --alpha or --stage1-epochs")
    if args.lr is None:
        args.lr = 1e-3 * math.sqrt(args.batch_size / 1024)
    if args.drop_path is None:
        args.drop_path = 0.1 if args.student == "deit_b" else 0.0
    if args.ema_decay is None:
        args.ema_decay = 0.99996 if args.student == "deit_b" else 0.0
    return args


# The recipe of the demos: no augmentation but crop and flip, which suits ten classes of flat shapes
DEMO = ("--data shapes --image-size 24 --patch-size 8 --student micro --batch-size 25 --lr 2e-3 "
        "--crop-scale 0.5 --label-smoothing 0 --mixup 0 --cutmix 0 --rand-augment 0 "
        "--random-erasing 0 --eval-every 1000")


def demo(args, device):
    """Train a CNN, a student alone and one with DearKD. Print a table of their top-1."""
    if common.world_size() > 1:
        raise common.InputError("--demo runs in one process, without torchrun")
    torch.set_num_threads(1)  # steps are so small that more threads mostly wait for each other
    shared = f"{DEMO} --data-fraction 0.8 --workers {args.workers} --seed {args.seed}"
    table = []
    with tempfile.TemporaryDirectory() as out:
        runs = {
            "CNN": ["--train-teacher", "cifar_resnet20", "--epochs", "1"],
            "student alone": ["--teacher", "none", "--mhca-blocks", "0", "--epochs", "3"],
            "student, DearKD": ["--teacher", f"{out}/CNN/student.pth", "--epochs", "3"],
        }
        for name, flags in runs.items():
            folder = f"{out}/{name.split()[-1]}"
            command = f"python dearkd.py {shared} {' '.join(flags)} --out {folder}"
            # The folder is temporary: show a command that also works later
            common.print0(f"\n{name}: {command.replace(out, 'out/demo')}")
            run_args = parse_args([*shared.split(), *flags, "--out", folder])
            run = train_cnn if run_args.train_teacher else train
            record = run(run_args, device)
            table.append(f"{name:24s} top-1 {record['top1']:5.1f} %")
    common.print0("\n" + "\n".join(table))


def demo_data_free(args, device):
    """Train a CNN, then make images from its weights without and with L_bp. Print what it sees.

    That is the CNN's top-1 on the images, and the mean distance between features of a class.
    """
    if common.world_size() > 1:
        raise common.InputError("--demo-data-free runs in one process, without torchrun")
    shared = (f"{DEMO} --workers {args.workers} --seed {args.seed} "
              "--train-teacher cifar_resnet20 --epochs 1")
    # Few steps. The shapes are flat: three times the weight that total variation has for photos
    made = f"--image-size 24 --images-per-class 12 --steps 150 --tv 0.01 --seed {args.seed}"
    divergence = {"DeepInversion": "0", "DF-DearKD": "1"}
    table = []
    with tempfile.TemporaryDirectory() as out:
        common.print0(f"\nCNN: python dearkd.py {shared} --out out/demo/CNN")
        record = train_cnn(parse_args([*shared.split(), "--out", f"{out}/CNN"]), device)
        table.append(f"{'CNN':24s} top-1 {record['top1']:5.1f} %")
        for name, weight in divergence.items():
            flags = ["--divergence", weight, "--teacher", f"{out}/CNN/student.pth",
                     "--synthesize", f"{out}/{name}"]
            command = f"python dearkd.py {made} {' '.join(flags)}"
            common.print0(f"\n{name}: {command.replace(out, 'out/demo')}")
            fill_folder(parse_args([*made.split(), *flags]), device)
            picture = Path("out") / f"demo-{name}.png"
            picture.parent.mkdir(exist_ok=True)
            shutil.copyfile(f"{out}/{name}/preview.png", picture)
            common.print0(f"64 of its images: {picture}")
            teacher = load_teacher(f"{out}/CNN/student.pth", None, 10).to(device)
            top1, distance = judge(f"{out}/{name}/train", teacher, device)
            table.append(f"{name:16s} images: top-1 of the CNN {top1:5.1f} %, "
                         f"distance {distance:.3f}")
    common.print0("\n" + "\n".join(table))


@torch.no_grad()
def judge(folder, teacher, device):
    """Return (a CNN's top-1 in percent, mean distance of class-mates) for the images in folder.

    Distances are Euclidean, between L2-normalised features before the classifier.
    """
    dataset = common.ImageFolder(folder, common.class_folders(folder))
    labels = torch.tensor(dataset.targets)
    pixels = torch.stack([v2.functional.pil_to_tensor(image) for image, _ in dataset]) / 255
    images = v2.functional.normalize(pixels, common.MEAN, common.STD)
    maps, logits = teacher.features(images.to(device))
    features = F.normalize(maps[-1].mean((2, 3)), dim=1).cpu()              # (B, D)
    is_mate = labels[:, None] == labels                                     # (B, B)
    is_mate.fill_diagonal_(False)
    distance = torch.cdist(features, features)[is_mate].mean()
    top1 = 100 * (logits.argmax(1).cpu() == labels).float().mean()
    return top1.item(), distance.item()


def main(argv=None):
    args = parse_args(argv)
    device = common.init_processes()
    try:
        if args.demo:
            demo(args, device)
        elif args.demo_data_free:
            demo_data_free(args, device)
        elif args.synthesize:
            fill_folder(args, device)
        elif args.train_teacher:
            train_cnn(args, device)
        else:
            train(args, device)
    except common.InputError as error:
        common.fail(error)
    common.leave_processes()


if __name__ == "__main__":
    main()
