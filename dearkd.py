"""DearKD: distil a CNN's early layers into a vision transformer, then let the transformer go.

Chen et al., "DearKD: Data-Efficient Early Knowledge Distillation for Vision Transformers",
arXiv 2204.12997 (CVPR 2022). No code of it was ever released.

The idea. Convolution is the better teacher where data are few, free attention the better student
where they are many. So a ViT learns in two stages:
  1. from a CNN: its early feature maps (hints, through an aligner) and its predicted class. The
     first blocks can express convolution: a term of the relative position is added to their
     attention (MHCA), with dropout so that they don't lock onto their neighbourhood;
  2. from the labels alone. The teacher is gone, attention may leave the neighbourhood.
DF-DearKD does so without one real image: the CNN is inverted (DeepInversion, arXiv 1912.08795:
noise is optimised until the CNN sees a class in it, and its BatchNorms what they are used to), and
images of a class are kept from collapsing into copies of each other (intra-divergence loss).

The paper's: the two stages, MHCA with dropout in early blocks, the aligner with mean squared error
on hidden features, hard-label logits on DeiT's distillation token, RegNetY-16GF as teacher; the
idea of a boundary-preserving intra-divergence loss. Our reading, for want of code: everything
else, that is the form and start of the position term, the aligner's layers, which block learns
from which stage and their weight, the stages' losses, how a CNN's stages are found, and the
formula of the intra-divergence loss. DeepInversion's formulas and settings are its authors'.

Measured (an AMD EPYC, bf16, 2026-11-20 and 21; logs and commands in tests/evidence/): CIFAR-10,
micro <- cifar_resnet56, 6 epochs of 10,000 images, means of seeds 0 to 2: alone 42.6 % top-1, with
the CNN's class 43.4, with hints 51.5, with MHCA, too, 50.4. 10 epochs, seeds 0 / 1: alone 50.0 /
48.9, DearKD 63.3 / 60.7; there the hints' weight beta = 10 was chosen (beta = 1: 56.4). The stages
to learn from were chosen on Tiny-ImageNet-20 (tiny_dearkd.log).

The paper's headline, DearKD-Ti on ImageNet-1k, 74.8 against DeiT-Ti's 72.2 top-1 (paper):
    torchrun --nproc_per_node 8 dearkd.py --data data/imagenet --student deit_t
A CNN trained on your own images, then distilled:
    python dearkd.py --data my/images --train-teacher resnet18 --out out/cnn
    python dearkd.py --data my/images --teacher out/cnn/student.pth --student deit_t
No images at all but for the test (days; the paper's DF-DearKD-Ti: 71.2 top-1):
    torchrun --nproc_per_node 8 dearkd.py --synthesize out/images --images-per-class 1000 \\
        --teacher regnet_y_16gf --verifier resnet50 --val data/imagenet/val
    torchrun --nproc_per_node 8 dearkd.py --data out/images --val data/imagenet/val
On a laptop, in minutes, with nothing to download:
    python dearkd.py --demo
    python dearkd.py --demo-data-free
"""

import collections
import contextlib
import copy
import datetime
import difflib
import functools
import json
import math
import pickle
import re
import sys
import tempfile
import time
import types
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import distributed as dist
from torch import nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Subset
from torchvision import models
from torchvision.models.feature_extraction import (
    create_feature_extractor,
    get_graph_node_names,
)
from torchvision.ops import StochasticDepth
from torchvision.transforms import v2
from torchvision.utils import draw_bounding_boxes, make_grid, save_image
from tqdm import tqdm

import common_before as common

# ------------------------------------------------------------------ the method


class ConvAttention(nn.Module):
    """MHCA: self-attention that can express a convolution (arXiv 2204.12997, section 3.2).

    Between patches at grid offset d = (d1, d2), rows and columns from query to key, head h has the
    logit  q.k / sqrt(D/H) + dropout(v_h . r_d),  r_d = (|d|^2, d1, d2),  v_h = pos_weight[h].
    v_h = -a (1, -2 c1, -2 c2) gives -a |d - c|^2 and a constant: a Gaussian around offset c. At
    first a = 1 and the heads' c are the nearest offsets. Prefix tokens (class, distillation) have
    no place: their rows and columns get 0. Dropout strikes a head's whole offset, for all images:
    there a term that may be -300 is 0, so that far patches are looked at, too, while it learns.

    forward: (B, P+N, D) -> (B, P+N, D), P = num_prefix_tokens, N = grid_size^2
    """

    def __init__(self, dim, num_heads, grid_size, num_prefix_tokens, pos_dropout=0.1):
        super().__init__()
        self.num_heads, self.num_prefix_tokens = num_heads, num_prefix_tokens
        self.pos_dropout = pos_dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        nearest = sorted(((i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)),
                         key=lambda c: c[0]**2 + c[1]**2)
        c = torch.tensor([nearest[h % 9] for h in range(num_heads)]).float()
        self.pos_weight = nn.Parameter(torch.cat([-torch.ones(num_heads, 1), 2 * c], 1))  # (H, 3)
        # All offsets d on the grid, their r_d, and which of them lies between patches i and j.
        g = grid_size
        d = torch.cartesian_prod(*2 * [torch.arange(1 - g, g)])             # ((2g-1)^2, 2)
        r = torch.cat([d.square().sum(1, keepdim=True), d], 1).float()      # ((2g-1)^2, 3)
        place = torch.cartesian_prod(*2 * [torch.arange(g)])                # (N, 2)
        between = place[None] - place[:, None] + g - 1                      # (N, N, 2), from 0
        self.register_buffer("r", r, persistent=False)
        self.register_buffer("offset", between[..., 0] * (2 * g - 1) + between[..., 1],
                             persistent=False)                              # (N, N)

    def position_term(self):
        """(H, P+N, P+N), added to the logits: computed once for all images."""
        term = (self.pos_weight[:, None] * self.r).sum(2)   # (H, (2g-1)^2), float32: no @
        term = F.dropout(term, self.pos_dropout, self.training)
        P = self.num_prefix_tokens
        return F.pad(term[:, self.offset], (P, 0, P, 0))                    # (H, P+N, P+N)

    def forward(self, x):
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                # (B, H, N, D/H) each
        term = self.position_term().to(q.dtype)                             # (H, P+N, P+N)
        if x.is_cpu:  # there torch's fused kernel has a slow backward pass (tests/bench.py)
            x = (q / math.sqrt(q.shape[-1]) @ k.transpose(2, 3) + term).softmax(-1) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v, term)               # (B, H, P+N, D/H)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class Aligner(nn.Module):
    """Patch tokens (B, N, D) -> a map (B, C_t, g, g) to be compared with a CNN's: 3x3 depth-wise
    convolution, LayerNorm over channels, Linear(D, C_t), GELU."""

    def __init__(self, student_dim, teacher_channels):
        super().__init__()
        self.depthwise = nn.Conv2d(student_dim, student_dim, 3, padding=1, groups=student_dim)
        self.depthwise.to(memory_format=torch.channels_last)  # as the tokens are
        self.norm = nn.LayerNorm(student_dim, eps=1e-6)
        self.linear = nn.Linear(student_dim, teacher_channels)

    def forward(self, tokens):
        B, N, D = tokens.shape
        g = math.isqrt(N)
        x = self.depthwise(tokens.transpose(1, 2).reshape(B, D, g, g))      # (B, D, g, g)
        x = F.gelu(self.linear(self.norm(x.permute(0, 2, 3, 1))))           # (B, g, g, C_t)
        return x.permute(0, 3, 1, 2)                                        # (B, C_t, g, g)


def hint_loss(student_map, teacher_map):
    """L_h of one hint: mean squared error over all elements, the CNN's map (B, C_t, h, h) brought
    to the student's grid (B, C_t, g, g), averaged where it is larger, enlarged where smaller."""
    size = student_map.shape[-2:]
    mode = "area" if teacher_map.shape[-1] >= size[-1] else "bilinear"  # area: the mean
    teacher_map = F.interpolate(teacher_map.float(), size, mode=mode)
    return F.mse_loss(student_map.float(), teacher_map)


def intra_divergence_loss(features, labels):
    """L_bp of DF-DearKD: spreads the images of a class up to where the class now ends.

    Features (B, D), L2-normalised here, labels (B,). Among its class-mates image i has an easiest
    positive e, the nearest, which is pushed away up to where the hardest one h is, the farthest,
    on which this term has no pull (d: Euclidean distance; its gradient does not vanish between
    near-copies, as that of 1 - cosine does):  L_bp = mean_i max(0, stopgrad(d_ih) - d_ie).
    Images with fewer than two class-mates contribute nothing.
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


class Block(nn.Module):
    def __init__(self, dim, attention, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, patch_size, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)                 # (B, N, D)


class ViT(nn.Module):
    """DeiT with a class and a distillation token, its first `mhca_blocks` blocks with MHCA;
    parameters have timm's names, and attn.pos_weight.

    forward(images (B, 3, S, S)): in training mode the pair (class logits, distillation logits),
    (B, C) each; in eval mode their mean; with num_classes=0 the normed class token (B, D).
    drop_path: stochastic depth of the last block, growing linearly from 0 at the first.
    """

    def __init__(self, image_size=224, patch_size=16, dim=384, depth=12, num_heads=6,
                 num_classes=1000, mhca_blocks=0, pos_dropout=0.1, drop_path=0.0):
        super().__init__()
        self.image_size, self.patch_size = image_size, patch_size
        self.grid_size = image_size // patch_size
        self.patch_embed = PatchEmbed(patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 2 + self.grid_size**2, dim))
        self.blocks = nn.ModuleList(
            Block(dim, ConvAttention(dim, num_heads, self.grid_size, 2, pos_dropout)
                  if i < mhca_blocks else Attention(dim, num_heads),
                  drop_path * i / max(1, depth - 1))
            for i in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes) if num_classes else None
        self.head_dist = nn.Linear(dim, num_classes) if num_classes else None
        for parameter in (self.cls_token, self.dist_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def embed(self, images):
        if images.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(f"images of {tuple(images.shape[-2:])} pixels, but this ViT is built "
                             f"for image_size={self.image_size}")
        x = self.patch_embed(images)                                        # (B, N, D)
        prefix = [token.expand(len(x), -1, -1) for token in (self.cls_token, self.dist_token)]
        return torch.cat([*prefix, x], 1) + self.pos_embed                  # (B, 2+N, D)

    def features(self, images, after=()):
        """(hidden, logits): patch tokens (B, N, D) after each of the blocks numbered in `after`
        (from 0); what forward() gives."""
        x, hidden = self.embed(images), {}
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in after:
                hidden[i] = x[:, 2:]
        x = self.norm(x)
        if self.head is None:
            return hidden, x[:, 0]
        logits = self.head(x[:, 0]), self.head_dist(x[:, 1])
        return hidden, logits if self.training else (logits[0] + logits[1]) / 2

    def forward(self, images):
        return self.features(images)[1]


@torch.no_grad()
def attention_distance(model, images):
    """(depth, H) float64: per block and head the mean over patches i of sum_j a_ij |p_i - p_j|, in
    patches; attention among patches alone, rows made to sum 1. images (B, 3, S, S)."""
    x, g = model.embed(images), model.grid_size
    place = torch.cartesian_prod(*2 * [torch.arange(g, device=x.device)]).double()
    distance, rows = torch.cdist(place, place), []                          # (N, N)
    for block in model.blocks:
        attention, y = block.attn, block.norm1(x)
        B, N, D = y.shape
        qkv = attention.qkv(y).view(B, N, 3, attention.num_heads, D // attention.num_heads)
        q, k, _ = qkv.permute(2, 0, 3, 1, 4)
        logits = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])             # (B, H, 2+N, 2+N)
        if isinstance(attention, ConvAttention):
            logits = logits + attention.position_term()
        a = logits[..., 2:, 2:].double().softmax(-1)                        # (B, H, N, N)
        rows.append((a * distance).sum(-1).mean((0, 2)))
        x = block(x)
    return torch.stack(rows)


def resize_pos_embed(pos_embed, grid):  # for eval_knn.py, at another --image-size
    """(1, [1+]N, D) -> (1, [1+]grid*grid, D): the patch part bicubically, the class row as it is.

    antialias=True turns torch's cubic kernel from a = -0.75 into a = -0.5, which keeps ramps."""
    old = math.isqrt(pos_embed.shape[1])
    cls, patches = pos_embed[:, :-old * old], pos_embed[:, -old * old:]
    if grid != old:
        patches = patches.reshape(1, old, old, -1).permute(0, 3, 1, 2)      # (1, D, old, old)
        patches = F.interpolate(patches.float(), (grid, grid), mode="bicubic", antialias=True)
        patches = patches.flatten(2).transpose(1, 2)                        # (1, grid*grid, D)
    return torch.cat([cls, patches], 1)


# ------------------------------------------------------------------ the teacher


class CifarBlock(nn.Module):
    def __init__(self, channels_in, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.more = stride, channels - channels_in

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        # the shortcut has no weights: every stride-th pixel, new channels zero on both sides
        x = x[:, :, ::self.stride, ::self.stride]
        return F.relu(y + F.pad(x, (0, 0, 0, 0, self.more // 2, self.more // 2)))


class CifarResNet(nn.Module):
    """ResNet for 32 px (He et al., arXiv 1512.03385, section 4.2): depth = 6 * blocks + 2."""

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


CIFAR_RESNETS = {f"cifar_resnet{depth}": (depth - 2) // 6 for depth in (20, 32, 44, 56)}


def check_name(name):
    """Raise common.Abort unless there is a CNN of that name."""
    known = [*models.list_models(models, exclude=("vit*", "swin*", "maxvit*")), *CIFAR_RESNETS]
    if name not in known:
        near = difflib.get_close_matches(name, known, 5, 0.5)
        raise common.Abort(f"no CNN {name} in torchvision"
                           + (f": did you mean {', '.join(near)}?" if near else "")
                           + "; also the path of a student.pth of --train-teacher, or none")


def make_cnn(name, num_classes):
    """A CNN of that name with random weights; raises common.Abort for an unknown name."""
    check_name(name)
    if name in CIFAR_RESNETS:
        return CifarResNet(CIFAR_RESNETS[name], num_classes)
    keywords = {}
    if name in ("googlenet", "inception_v3"):  # as their weights were trained; no extra heads
        keywords = {"transform_input": True, "aux_logits": False, "init_weights": False}
    return models.get_model(name, weights=None, num_classes=num_classes, **keywords)


class Teacher(nn.Module):
    """A CNN that also gives its stages' maps. Images (B, 3, S, S) of any size S, normalised as
    common.MEAN and STD say, are brought to the size and normalisation that the CNN was trained at.

    forward(images) -> logits (B, C)
    features(images) -> (maps: [(B, C_1, h_1, h_1), ...], large ones first; logits)

    A CNN's stage is a resolution: its map is the last one of that size through which everything
    that follows is computed. That makes the stages of a ResNet conv1, conv2_x, .., conv5_x, after
    their ReLU. (Where a CNN has none there, DenseNet or ConvNeXt, maps have negative values, too.)
    """

    def __init__(self, cnn, image_size, mean=common.MEAN, std=common.STD):
        super().__init__()
        self.image_size = image_size
        ours, its = torch.tensor([[common.MEAN, common.STD], [mean, std]])[..., None, None]
        self.register_buffer("scale", ours[1] / its[1], persistent=False)           # (3, 1, 1)
        self.register_buffer("shift", (ours[0] - its[0]) / its[1], persistent=False)
        cnn.eval()
        last = get_graph_node_names(cnn)[1][-1]
        self.cnn = create_feature_extractor(cnn, [last]).eval()
        graph = self.cnn.graph
        with torch.no_grad():
            ShapeProp(self.cnn).propagate(torch.zeros(1, 3, image_size, image_size))
        nodes = [node for node in graph.nodes if node.op != "get_attr"]
        place, reach, stages = {node: i for i, node in enumerate(nodes)}, 0, {}
        for i, node in enumerate(nodes[:-1]):
            shape = getattr(node.meta.get("tensor_meta"), "shape", ())
            image_like = len(shape) == 4 and shape[1] > 3 and shape[2] == shape[3] > 1
            if i >= reach and image_like and shape[2] <= min(stages, default=shape[2]):
                stages[shape[2]] = node  # nothing reaches past it: no path leads around it
            reach = max([reach, *(place[user] for user in node.users)])
        self.stages = [(node.name, *node.meta["tensor_meta"].shape[1:3])
                       for node in stages.values()]  # (name, channels, height)
        output = nodes[-1]
        logits, = output.args[0].values()
        self.num_classes = logits.meta["tensor_meta"].shape[1]
        output.args = ((list(stages.values()), logits),)
        self.cnn.recompile()

    def train(self, mode=True):
        return super().train(False)  # frozen, BatchNorm's statistics too

    def features(self, images):
        if images.shape[-1] != self.image_size:
            images = F.interpolate(images, 2 * [self.image_size], mode="bilinear", antialias=True)
        return self.cnn(images * self.scale + self.shift)

    def forward(self, images):
        return self.features(images)[1]


def load_teacher(name, weights=None, num_classes=1000):
    """A frozen Teacher in eval mode.

    name: a classification CNN of torchvision, its weights read from the file `weights` or else the
    released ones, downloaded; cifar_resnet20, 32, 44, 56 (file only); or the path of a student.pth
    that --train-teacher wrote. Images are brought to the size and normalisation of its training.
    Raises common.Abort: unknown name, weights missing, damaged or of another model, a head that
    has not `num_classes` classes (None: any number).
    """
    mean, std = common.MEAN, common.STD
    if Path(name).is_file():
        source, checkpoint = name, common.load_export(name)
        state, arch = checkpoint["model"], checkpoint["arch"]
        cnn_name, size = arch.get("cnn"), arch.get("image_size")
        if not isinstance(cnn_name, str) or not isinstance(size, int) or not 1 <= size <= 4096:
            raise common.Abort(f"{name} was not written by --train-teacher (arch: {arch})")
    else:
        cnn_name = name
        check_name(name)
        if name in CIFAR_RESNETS:
            size = 32
            if not weights:
                raise common.Abort(f"{name} cannot be downloaded: give its file with "
                                   f"--teacher-weights FILE, or train one: --train-teacher {name}")
        else:
            release = models.get_model_weights(name).DEFAULT
            transform = release.transforms()
            size, mean, std = transform.crop_size[0], transform.mean, transform.std
        source = weights or release.url
        state = common.load_checkpoint(weights) if weights else download(source)
        state = state if isinstance(state, dict) else {}
        for wrapper in ("state_dict", "model"):
            state = state[wrapper] if isinstance(state.get(wrapper), dict) else state
    state = {str(k).removeprefix("module."): v for k, v in state.items()}
    state = {re.sub(r"(denselayer\d+\.\w+)\.([12])\.", r"\1\2.", k): v  # DenseNet's norm.1 is norm1
             for k, v in state.items() if not k.startswith(("aux", "AuxLogits"))}
    bias = [v for k, v in state.items() if k.endswith("bias") and getattr(v, "ndim", 0) == 1]
    classes = min(len(bias[-1]), 2**20) if bias else num_classes or 1000
    cnn = make_cnn(cnn_name, classes)
    whole = cnn.state_dict()  # old files lack BatchNorm's counter, which nothing here reads
    state = {k: v for k, v in whole.items() if k.endswith("num_batches_tracked")} | state
    problems = common.unlike(state, whole)
    if problems:
        raise common.Abort(f"{source} does not hold a {cnn_name}: {'; '.join(problems)}")
    if num_classes not in (None, classes):
        raise common.Abort(f"the teacher in {source} has {classes} classes, the data {num_classes}")
    whole.update(state)  # it carries the version that MNASNet asks for
    cnn.load_state_dict(whole)
    return Teacher(cnn, size, mean, std).requires_grad_(False).eval()


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


# ------------------------------------------------------------------ training


class Objective(nn.Module):
    """The student and its aligners: one module, so that DistributedDataParallel averages every
    gradient. hints: [(block, stage), ...], blocks from 0, stages from 1."""

    def __init__(self, student, aligners, hints, args):
        super().__init__()
        self.student, self.aligners, self.hints, self.args = student, aligners, hints, args

    def forward(self, images, target, guide):
        """Loss terms by name, as they are added up. images (B, 3, S, S), target (B,) or (B, C);
        guide: what the teacher's features() gives for the same images, None in stage 2."""
        cross_entropy = functools.partial(F.cross_entropy,
                                          label_smoothing=self.args.label_smoothing)
        if not isinstance(self.student, ViT):  # a CNN that is to become a teacher
            return {"ce": cross_entropy(self.student(images).float(), target)}
        alpha, beta = self.args.alpha, self.args.beta
        hidden, logits = self.student.features(images, [block for block, _ in self.hints])
        by_class, by_distillation = (x.float() for x in logits)
        if guide is None:  # stage 2, or no teacher at all
            return {"ce": (cross_entropy(by_class, target)
                           + cross_entropy(by_distillation, target)) / 2}
        # (1 - alpha) CE(class, y) + alpha CE(distillation, argmax teacher) + beta * sum L_h
        maps, teacher_logits = guide
        losses = {"ce": (1 - alpha) * cross_entropy(by_class, target),
                  "logits": alpha * F.cross_entropy(by_distillation, teacher_logits.argmax(1))}
        if self.hints:
            losses["hints"] = beta * sum(
                hint_loss(aligner(hidden[block]), maps[stage - 1])
                for aligner, (block, stage) in zip(self.aligners, self.hints))
        return losses


def train(args, device):
    """Train args.student, with args.teacher or alone; or the CNN args.train_teacher. Returns the
    last epoch's record."""
    started = time.perf_counter()
    common.check_flags(args)
    transform = common.train_transform(args.image_size, (args.crop_scale, 1.0), args.rand_augment,
                                       args.random_erasing)
    train_set, val_set, num_classes = common.rank_zero_first(
        lambda: common.load_data(args, transform))
    args.num_classes = num_classes
    autocast, scaler = common.set_precision(args, device)

    teacher, hints, aligners = None, [], nn.ModuleList()
    torch.manual_seed(args.seed)
    if args.train_teacher:
        arch = {"cnn": args.train_teacher, "image_size": args.image_size,
                "num_classes": num_classes}
        student = make_cnn(args.train_teacher, num_classes)
        check_image_size(student, args.train_teacher, min(2, args.micro_batch), args.image_size)
    else:
        dim, depth, num_heads = SIZES[args.student]
        arch = {"image_size": args.image_size, "patch_size": args.patch_size, "dim": dim,
                "depth": depth, "num_heads": num_heads, "num_classes": num_classes,
                "mhca_blocks": args.mhca_blocks}
        student = ViT(**arch, pos_dropout=args.pos_dropout, drop_path=args.drop_path)
        if args.teacher != "none":
            teacher = common.rank_zero_first(lambda: load_teacher(
                args.teacher, args.teacher_weights, num_classes)).to(device)
            args.teacher_checksum = common.checksum(teacher)
            hints = parse_hints(args.hints, depth, teacher.stages, student.grid_size)
            aligners.extend(Aligner(dim, teacher.stages[stage - 1][1]) for _, stage in hints)
    cnn = student if args.train_teacher else teacher
    if cnn:
        cnn.to(memory_format=torch.channels_last)  # convolutions are faster so
    model = Objective(student, aligners, hints, args).to(device)
    ema = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(args.ema)) if args.ema else None
    trained = ema.module if ema else student  # what is evaluated and exported
    optimizer = torch.optim.AdamW(common.parameter_groups(model, args.weight_decay), lr=args.lr,
                                  betas=(0.9, 0.999), fused=True)

    checkpoint = common.open_run(args)
    first_epoch, best = 0, -1.0
    if checkpoint:
        first_epoch, best = checkpoint["epoch"], checkpoint["best"]
        student.load_state_dict(checkpoint["model"])
        aligners.load_state_dict(checkpoint["aligners"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        if ema:
            ema.load_state_dict(checkpoint["ema"])
        del checkpoint  # its memory

    loader, val_batches = common.train_loader(train_set, args), common.val_loader(val_set, args)
    if teacher and not first_epoch:
        check_teacher(teacher, hints, val_batches, device, autocast, args)
    mix = [v2.MixUp(alpha=args.mixup, num_classes=num_classes)] if args.mixup else []
    mix += [v2.CutMix(alpha=args.cutmix, num_classes=num_classes)] if args.cutmix else []
    mix = v2.RandomChoice(mix) if mix else lambda *batch: batch  # one of them per batch
    teach = teacher and teacher.features
    if args.compile:  # in place: the names in state_dict() stay; evaluation runs eagerly
        model.compile(dynamic=False)
        teach = teach and torch.compile(teach, dynamic=False)
    prepared, began, record = time.perf_counter() - started, time.perf_counter(), None

    epochs, timed = range(first_epoch, args.epochs), []
    if args.dry_run:  # one epoch of each stage
        epochs = sorted({0, args.stage1_epochs if teacher else 0} - {args.epochs})
    for epoch in epochs:
        stage = 1 if teacher and epoch < args.stage1_epochs else 2
        if epoch in (first_epoch, args.stage1_epochs):  # in stage 2 the aligners are out of it
            aligners.requires_grad_(stage == 1)
            ddp = model
            if common.world_size() > 1:
                ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
                ddp.broadcast_buffers = bool(args.train_teacher)  # MHCA's are constants
        torch.manual_seed(common.mix_seed(args.seed, epoch, common.rank()))
        books = common.Epoch(loader, epoch, args, device)
        model.train()
        for step, (images, target, parts) in enumerate(books.batches()):
            lr = common.learning_rate(epoch * len(loader) + step, args, len(loader))
            for group in optimizer.param_groups:
                group["lr"] = lr
            images, target = mix(images, target)
            statistics = [b.clone() for b in student.buffers()] if args.train_teacher else []
            for part, weight, last in parts:  # micro-batches; weight: share of the step's mean
                with contextlib.nullcontext() if last or ddp is model else ddp.no_sync():
                    with autocast():
                        with torch.no_grad():
                            guide = teach(images[part]) if stage == 1 else None
                        losses = ddp(images[part], target[part], guide)
                    scaler.scale(weight * sum(losses.values())).backward()
                books.add(losses, weight)
            skipped = books.optimizer_step(optimizer, scaler)  # clips; skips what is not finite
            for now, before in zip(student.buffers(), statistics if skipped else []):
                now.copy_(before)  # or BatchNorm would stay NaN
            if ema:
                ema.update_parameters(student)
        if args.dry_run:
            until = args.stage1_epochs if stage == 1 else args.epochs
            timed.append((books, until - epoch))
            if until < args.epochs:
                continue
            return common.report_dry_run(args, timed, trained, teacher, [val_set],
                                         autocast, prepared)

        record = {**books.record(), **({"stage": stage} if teacher else {}), "lr": lr}
        top1 = None
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
            for buffer in trained.buffers() if args.train_teacher and ddp is not model else []:
                dist.broadcast(buffer, 0)  # each rank's BatchNorm has seen other images
            record.update(common.evaluate(trained, val_batches, device, autocast))
            top1 = record["top1"]
        stage_ends = epoch + 1 == args.epochs or teacher and epoch + 1 == args.stage1_epochs
        if stage_ends and not args.train_teacher and common.rank() == 0:
            some = Subset(val_set, range(0, len(val_set), math.ceil(len(val_set) / 64)))
            batches = [common.normalize(images, device)
                       for images, *_ in DataLoader(some, batch_size=8)]
            distance = sum(len(images) * attention_distance(trained.eval(), images).mean(1)
                           for images in batches) / len(some)
            record["attention_distance"] = distance.tolist()  # of each block, in patches
        record["seconds"] = time.perf_counter() - books.started
        per_epoch = (time.perf_counter() - began) / (epoch + 1 - first_epoch)
        common.log_epoch(args, record, per_epoch * (args.epochs - epoch - 1))
        if "attention_distance" in record:
            common.say((f"stage {stage} ends; " if teacher else "")
                       + "attention distance, in patches, from block 0 on: "
                       + " ".join(f"{d:.2f}" for d in distance))
        if common.rank() == 0:
            export = {"model": trained.state_dict(), "arch": arch, "script": "dearkd", "top1": top1}
            common.save_checkpoint(f"{args.out}/student.pth", **export)
            if top1 is not None and top1 > best:
                best = top1
                common.save_checkpoint(f"{args.out}/best.pth", **export)
            common.save_checkpoint(
                f"{args.out}/last.pth", **{**export, "model": student.state_dict()},
                aligners=aligners.state_dict(), ema=ema.state_dict() if ema else None,
                optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), epoch=epoch + 1,
                stage=stage, best=best, args=common.comparable(args))
    return record


def check_image_size(cnn, name, count, size):
    """Raise common.Abort where the CNN cannot take `count` images of this size at once."""
    try:
        copy.deepcopy(cnn).cpu()(torch.zeros(count, 3, size, size))
    except (RuntimeError, ValueError) as error:
        raise common.Abort(f"{name} cannot take {count} images of {size} px at once: "
                           f"{str(error).splitlines()[0]}")


def parse_hints(text, depth, stages, grid):
    """"1:2,3:-1" -> [(1, 2), (3, len(stages))]: blocks from 0, stages from 1 or, negative, from
    the last. "auto": block 3 learns the first stage whose map is no larger than the student's grid,
    block 1 the stage before. Raises common.Abort for a block or a stage that does not exist."""
    hints, last = [], len(stages)
    if text == "auto":
        own = next((i for i, (_, _, size) in enumerate(stages, 1) if size <= grid), last)
        text = f"1:{max(1, own - 1)},3:{own}"
    for pair in text.split(",") if text != "none" else []:
        try:
            block, stage = map(int, pair.split(":"))
        except ValueError:
            raise common.Abort(f"--hints {text}: {pair} is not block:stage, such as 1:2; "
                               f"or none for no hints")
        if not 0 <= block < depth:
            raise common.Abort(f"--hints {text}: the student has blocks 0 to {depth - 1}")
        number = stage if stage > 0 else last + 1 + stage
        if not 1 <= number <= last:
            found = ", ".join(f"{i} ({channels} x {size} x {size})"
                              for i, (_, channels, size) in enumerate(stages, 1))
            raise common.Abort(f"--hints {text}: the teacher has stages {found}")
        hints.append((block, number))
    return hints


def check_teacher(teacher, hints, val_batches, device, autocast, args):
    """Print the teacher's top-1 on the run's images and what is learned from which stage."""
    few = 4 if args.dry_run else None
    top1 = common.evaluate(teacher, val_batches, device, autocast, few)["top1"]
    common.say(f"teacher {args.teacher}: top-1 {top1:.2f} % at {teacher.image_size} px"
               + (f", on the first {few} batches" if few else ""))
    for block, stage in hints:
        name, channels, size = teacher.stages[stage - 1]
        common.say(f"hint after block {block}: stage {stage} of {len(teacher.stages)}, "
                   f"{channels} x {size} x {size} ({name})")


def load_student(path):
    """The frozen ViT of a student.pth, in eval mode; raises common.Abort if it holds none."""
    checkpoint = common.load_export(path)
    if "mhca_blocks" not in checkpoint["arch"]:
        raise common.Abort(f"{path} is no student of dearkd.py")
    problems = common.mismatches(checkpoint["model"], ViT, checkpoint["arch"])
    if problems:
        raise common.Abort(f"{path} is damaged: {'; '.join(problems)}")
    model = ViT(**checkpoint["arch"])
    model.load_state_dict(checkpoint["model"])
    return model.requires_grad_(False).eval()


# ------------------------------------------------------------------ no real images: DF-DearKD


def total_variation(x):
    """Sum of the L2 norms, over the batch, of the differences of neighbours: right, down and both
    diagonals. x (B, 3, S, S)."""
    return sum((a - b).norm() for a, b in (
        (x[..., :, 1:], x[..., :, :-1]), (x[..., 1:, :], x[..., :-1, :]),
        (x[..., 1:, 1:], x[..., :-1, :-1]), (x[..., 1:, :-1], x[..., :-1, 1:])))


def competition_loss(teacher_logits, student_logits):
    """1 - JS(teacher, student), both at temperature 3 (arXiv 1912.08795, eq. 7 and 8): small where
    they disagree. Logits (B, C); the mean over the batch."""
    p, q = ((logits / 3).log_softmax(1) for logits in (teacher_logits, student_logits))
    m = torch.logaddexp(p, q) - math.log(2)                                 # log of their mean
    return 1 - sum(F.kl_div(m, x, reduction="batchmean", log_target=True) for x in (p, q)) / 2


def batch_norms(cnn):
    layers = [layer for layer in cnn.modules() if isinstance(layer, nn.BatchNorm2d)]
    if not layers:
        raise common.Abort("a teacher without BatchNorm cannot be inverted: the running statistics "
                           "are all that it remembers of its training images")
    return layers


@contextlib.contextmanager
def watch(cnn):
    """Within the `with`, a forward pass adds to .batch_norm of what is yielded, for each BatchNorm,
    |mu_l(x) - mu_l| + |var_l(x) - var_l| (its input against its running statistics, norms over
    channels, float32), and leaves the input (B, D) of the last Linear in .features."""
    seen, hooks = types.SimpleNamespace(batch_norm=[], features=None), []

    def batch_norm(layer, inputs):
        x = inputs[0].permute(0, 2, 3, 1).flatten(0, 2).float()             # (B*h*w, C)
        mean = x.mean(0)                                                    # (C,)
        var = x.square().mean(0) - mean.square()  # on a CPU many times as fast as torch.var
        seen.batch_norm.append((mean - layer.running_mean).norm()
                               + (var - layer.running_var).norm())

    def last_linear(layer, inputs):
        seen.features = inputs[0].float()

    try:
        for layer in batch_norms(cnn):
            hooks.append(layer.register_forward_pre_hook(batch_norm))
        linear = [layer for layer in cnn.modules() if isinstance(layer, nn.Linear)]
        hooks.append(linear[-1].register_forward_pre_hook(last_linear))
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def synthesis_settings(image_size):
    """Defaults: DeepInversion's, for CIFAR-10's size or, above 64 px, for ImageNet's; but tv, bn
    and divergence at CIFAR-10's size are ours (tests/evidence/cifar10_dfdearkd.log)."""
    if image_size <= 64:
        return {"half_steps": 0, "steps": 2000, "image_lr": 0.1, "betas": [0.9, 0.999],
                "tv": 2.5e-5, "l2": 0.0, "bn": 0.2, "divergence": 1.0, "jitter": 2}
    return {"half_steps": 2000, "steps": 1000, "image_lr": 0.25, "betas": [0.5, 0.9],
            "tv": 1e-4, "l2": 1e-5, "bn": 0.01, "divergence": 1.0,
            "jitter": round(30 * image_size / 224)}


def synthesize(teacher, labels, image_size, seed=0, competitor=None, competition=1.0,
               autocast=contextlib.nullcontext, report=None, **settings):
    """Images (B, 3, S, S) of the classes `labels` (B,), made from the teacher's weights alone and
    normalised as its forward() expects them, on the device of the labels; S = image_size.

    From noise, Adam minimises  CE + tv TV + l2 mean_i |x_i| + bn sum_l w_l(...) + divergence L_bp
    first with the image average-pooled by 2, for half_steps, then at full size, there with
    + competition * competition_loss against a student if there is a `competitor`. Each step sees
    the images rolled by up to `jitter` pixels and flipped. settings: see synthesis_settings().
    report(step, losses, images) is called after every step. The teacher is not changed.
    Raises common.Abort if it has no BatchNorm, or if the images become NaN.
    """
    defaults = synthesis_settings(image_size)
    if settings.keys() - defaults.keys():
        raise TypeError(f"settings are {', '.join(defaults)}")
    s = types.SimpleNamespace(**{**defaults, **settings})
    generator = torch.Generator().manual_seed(seed)
    mean, std = (torch.tensor(t, device=labels.device)[:, None, None]
                 for t in (common.MEAN, common.STD))
    black, white = -mean / std, (1 - mean) / std
    images = torch.randn(len(labels), 3, image_size, image_size, generator=generator)
    images = images.to(labels.device, memory_format=torch.channels_last).clamp(black, white)
    images.requires_grad_()
    with watch(teacher.cnn) as seen:
        for pool, steps, before in ((2, s.half_steps, 0), (1, s.steps, s.half_steps)):
            optimizer = torch.optim.Adam([images], s.image_lr, s.betas)
            jitter = s.jitter // pool
            for step in range(steps):
                cosine = (1 + math.cos(math.pi * step / steps)) / 2
                optimizer.param_groups[0]["lr"] = s.image_lr * cosine
                roll = torch.randint(-jitter, jitter + 1, (2,), generator=generator).tolist()
                x = F.avg_pool2d(images, pool).roll(roll, (2, 3))
                if torch.rand((), generator=generator) < 0.5:
                    x = x.flip(3)
                seen.batch_norm.clear()
                with autocast():
                    logits = teacher.cnn(x * teacher.scale + teacher.shift)[1].float()  # (B, C)
                bn = 9 * seen.batch_norm[0] + sum(seen.batch_norm)  # w_0 = 10, the others 1
                losses = {"ce": F.cross_entropy(logits, labels),
                          "tv": s.tv * total_variation(x),
                          "l2": s.l2 * x.flatten(1).norm(dim=1).mean(),
                          "bn": s.bn * bn,
                          "divergence": s.divergence * intra_divergence_loss(seen.features, labels)}
                if competitor and pool == 1:
                    with autocast():
                        rival = competitor(x).float()                                   # (B, C)
                    losses["competition"] = competition * competition_loss(logits, rival)
                # with respect to the images alone: no gradient of the weights is computed
                images.grad, = torch.autograd.grad(sum(losses.values()), images)
                optimizer.step()
                with torch.no_grad():
                    images.clamp_(black, white)
                if (step % 100 == 0 or step == steps - 1) and not images.isfinite().all():
                    raise common.Abort("the images became NaN: try a lower --image-lr, or --amp "
                                       "off", 1, alone=True)
                if report:
                    report(before + step, losses, images)
    return images.detach()


def plan_batches(num_classes, images_per_class, batch_size, seed):
    """[(labels (B,), numbers (B,)), ...]: every image number of every class once; B <= batch_size,
    which is 8 or more; no class with fewer than 4 images in a batch, unless that is all it has."""
    numbers = torch.arange(images_per_class).tensor_split(max(1, images_per_class // 4))
    generator = torch.Generator().manual_seed(seed)
    groups = [(torch.full_like(part, label), part) for part in numbers  # each class in turn
              for label in torch.randperm(num_classes, generator=generator).tolist()]
    batches = math.ceil(len(groups) / (batch_size // min(batch_size, len(numbers[0]))))
    return [tuple(torch.cat(column) for column in zip(*(groups[i] for i in batch)))
            for batch in torch.arange(len(groups)).tensor_split(batches)]


def class_names(cnn, num_classes):
    """Folder names that sort in the order of the CNN's outputs: numbers, and the categories of
    torchvision's weights where they are known."""
    names = []
    if not Path(cnn).is_file() and cnn not in CIFAR_RESNETS:
        names = models.get_model_weights(cnn).DEFAULT.meta["categories"]
    names = names if len(names) == num_classes else num_classes * [""]
    digits = len(str(num_classes - 1))
    return [f"{i:0{digits}d} {name}".strip().replace("/", " ") for i, name in enumerate(names)]


@torch.no_grad()
def figures(kind, base, teacher, verifier, args, device, autocast):
    """What the first 100 images of each class are like, by name: top-1 of teacher and verifier and
    the teacher's probability of the right class, in percent; distance of class-mates in the
    teacher's L2-normalised penultimate features, "diversity" (mean) and "nearest"."""
    targets, S = torch.tensor(base.targets), args.image_size
    chosen = torch.cat([(targets == c).nonzero()[:100, 0] for c in range(len(base.classes))])
    workers = 0
    if not isinstance(base, common.Shapes):  # no margin is cut off: images of S px stay as they are
        workers, base = args.workers, common.Photos(base, v2.Compose([
            v2.PILToTensor(), v2.Resize(S, interpolation=v2.InterpolationMode.BICUBIC),
            v2.CenterCrop(S)]))
    sums, features, labels = collections.Counter(), [], []
    with watch(teacher) as seen:
        for images, target, _ in common.make_loader(Subset(base, chosen.tolist()), workers,
                                                    batch_size=100):
            if common.signalled():
                common.stop(common.signalled(), "while judging images, which are all kept")
            images, target = common.normalize(images, device), target.to(device)
            with autocast():
                p = teacher(images).float().softmax(1)                      # (B, C)
                votes = verifier(images) if verifier else None              # (B, C)
            sums["teacher_top1"] += (p.argmax(1) == target).sum().item()
            sums["confidence"] += p.gather(1, target[:, None]).sum().item()
            if verifier:
                sums["verifier_top1"] += (votes.argmax(1) == target).sum().item()
            features.append(F.normalize(seen.features, dim=1))
            labels.append(target)
            seen.batch_norm.clear()
    result = {name: 100 * value / len(chosen) for name, value in sums.items()}
    features, labels, mean, nearest = torch.cat(features), torch.cat(labels), [], []
    for c in labels.unique():
        f = features[labels == c]
        if len(f) > 1:
            mean.append(torch.pdist(f).mean().item())
            d = torch.cdist(f, f, compute_mode="donot_use_mm_for_euclid_dist")
            nearest.append(d.fill_diagonal_(math.inf).amin(1).mean().item())
    if mean:
        result |= {"diversity": sum(mean) / len(mean), "nearest": sum(nearest) / len(nearest)}
    common.say(f"{kind} images: " + ", ".join(f"{k} {v:.3g}" for k, v in result.items()))
    return result


def open_folder(out, record, dry_run):
    """Make or check a folder of --synthesize; returns the content of its synthesis.json."""
    file = out / "synthesis.json"
    try:
        if file.exists():
            then = json.loads(file.read_text())
            before, now = ({**r["settings"], "classes": r["classes"]} for r in (then, record))
            changed = [f"{key} {str(before.get(key))[:40]} -> {str(now[key])[:40]}"
                       for key in now if before.get(key) != now[key]]
            if changed and any((out / "train").glob("*/*.png")):
                raise common.Abort(f"{out} holds images of another synthesis ("
                                   f"{', '.join(changed)}): take another folder")
            record = record if changed else then
        elif (out / "train").exists():
            raise common.Abort(f"{out}/train is not of --synthesize, there is no {file}: take "
                               f"another folder")
        if not dry_run:
            out.mkdir(parents=True, exist_ok=True)
            common.write_json(file, record)
            for name in record["classes"]:
                (out / "train" / name).mkdir(parents=True, exist_ok=True)
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise common.Abort(f"cannot use --synthesize {out}: {error!r}")
    return record


def write_png(path, image):
    """Normalised (3, H, W) -> uint8 PNG."""
    mean, std = (torch.tensor(t)[:, None, None] for t in (common.MEAN, common.STD))
    image = image.detach().cpu() * std + mean
    common.write_whole(path, lambda file: save_image(image, file, format="png"))


def project_synthesis(args, teacher, competitor, batches, todo, settings, autocast):
    """--dry-run: 20 steps of the first batch at either size; hours of what is left to do."""
    labels, seconds = batches[0][0].to(teacher.scale.device), 0
    for size in filter(settings.get, ("half_steps", "steps")):
        for steps in (5, 15):  # the first five warm up
            started = time.perf_counter()
            synthesize(teacher, labels, args.image_size, 0, competitor, args.competition, autocast,
                       **{**settings, "half_steps": 0, "steps": 0, size: steps})
        seconds += settings[size] * (time.perf_counter() - started) / steps
    memory, seconds = common.all_reduce([common.peak_memory_gb(labels.device), seconds],
                                        labels.device, dist.ReduceOp.MAX)
    hours = math.ceil(len(todo) / common.world_size()) * seconds / 3600
    common.say(f"dry run: {seconds / len(labels):.3g} s an image and process, peak memory "
               f"{memory:.2f} GiB; {len(todo)} of {len(batches)} batches are left, {hours:.3g} "
               f"hours")


def fill_folder(args, device):
    """--synthesize: makes DIR/train/CLASS/NUMBER.png, DIR/preview.png, DIR/synthesis.json.

    Batches depend on nothing but the seed and their number. They are shared out among processes,
    and a restart skips those whose files are all there. Returns synthesis.json's content."""
    autocast, _ = common.set_precision(args, device)
    if args.amp == "fp16":
        raise common.Abort("--synthesize: gradients of pixels underflow in fp16: take --amp bf16 "
                           "or off")
    teacher = common.rank_zero_first(lambda: load_teacher(
        args.teacher, args.teacher_weights, None)).to(device, memory_format=torch.channels_last)
    num_classes, settings = teacher.num_classes, synthesis_settings(args.image_size)
    settings |= {k: getattr(args, k) for k in settings if getattr(args, k, None) is not None}
    batch_norms(teacher)
    for size in (args.image_size, *([args.image_size // 2] if settings["half_steps"] else [])):
        check_image_size(teacher.cnn, args.teacher, 2, size)
    if args.image_size != teacher.image_size:
        common.warn(f"{args.teacher} was trained at {teacher.image_size} px, --image-size is "
                    f"{args.image_size}")
    verifier = args.verifier and common.rank_zero_first(lambda: load_teacher(
        args.verifier, args.verifier_weights, num_classes)).to(device)
    competitor = args.competitor and common.rank_zero_first(
        lambda: load_student(args.competitor)).to(device)
    if competitor and (competitor.image_size, competitor.head.out_features) != (
            args.image_size, num_classes):
        raise common.Abort(f"--competitor {args.competitor} must be for {args.image_size} px and "
                           f"{num_classes} classes")
    source = args.val or args.data
    real = source and common.rank_zero_first(lambda: common.read_split(source, "val", args))
    names = real.classes if real else class_names(args.teacher, num_classes)
    if len(names) != num_classes:
        raise common.Abort(f"the teacher has {num_classes} classes, {source} {len(names)}")

    out = Path(args.synthesize)
    settled = {**settings, "weights": common.checksum(teacher),
               "competitor": competitor and common.checksum(competitor)}
    for name in ("amp", "image_size", "images_per_class", "images_per_batch", "competition",
                 "seed"):
        settled[name] = getattr(args, name)
    record = common.on_rank_zero(lambda: open_folder(
        out, {"settings": settled, "classes": names}, args.dry_run))
    batches = plan_batches(num_classes, args.images_per_class, args.images_per_batch, args.seed)

    def files(i):
        return (out / "train" / names[c] / f"{n:05d}.png" for c, n in zip(*batches[i]))

    todo = common.on_rank_zero(lambda: [
        i for i in range(len(batches)) if not all(file.exists() for file in files(i))])
    if len(todo) < len(batches):
        common.say(f"{len(batches) - len(todo)} of {len(batches)} batches are there already")
    if args.dry_run:
        return project_synthesis(args, teacher, competitor, batches, todo, settings, autocast)
    if real and common.rank() == 0:
        record["real"] = figures("real", real, teacher, verifier, args, device, autocast)
        chance = 100 / num_classes
        if record["real"]["teacher_top1"] < chance + 0.1 * (100 - chance):
            common.warn(f"that is near chance: do {source}'s class folders sort in the order of "
                        f"the teacher's outputs?")

    # Ranks meet after days, so not within the usual limit of an hour.
    meet = functools.partial(dist.barrier, dist.new_group(
        backend="gloo", timeout=datetime.timedelta(365))) if dist.is_initialized() else list
    mine, done = todo[common.rank()::common.world_size()], 0
    steps, started = settings["half_steps"] + settings["steps"], time.perf_counter()
    bar = tqdm(total=len(mine) * steps, leave=False, desc="synthesis",
               disable=None if common.rank() == 0 else True)

    def report(step, losses, images):
        if not bar.disable and step % 10 == 0:
            bar.set_postfix({name: f"{loss.item():.3g}" for name, loss in losses.items()})
        bar.update()
        if common.rank() == 0 and (step + 1) % args.preview_every == 0:
            write_png(out / "preview.png", make_grid(images[:64], 8, 1))
        if common.signalled() and step + 1 < steps:
            common.stop(common.signalled(), f"in batch {done + 1} of {len(mine)}; finished ones "
                        f"are kept, the same command goes on")

    common.hold_signals()
    with bar:
        for done, i in enumerate(mine):
            images = synthesize(teacher, batches[i][0].to(device), args.image_size,
                                common.mix_seed(args.seed, i), competitor, args.competition,
                                autocast, report, **settings)
            for file, image in zip(files(i), images):
                write_png(file, image)
            seconds = (time.perf_counter() - started) / (done + 1)
            common.say(f"batch {done + 1}/{len(mine)}: {len(images) / seconds:.3g} images/s, "
                       f"{common.duration(seconds * (len(mine) - done - 1))} left")
    meet()  # all are done
    if common.rank() == 0:
        record["images"] = num_classes * args.images_per_class
        if todo:
            made = sum(len(batches[i][0]) for i in todo)
            record["images_per_second"] = made / (time.perf_counter() - started)
        record["synthetic"] = figures("synthetic", common.ClassFolders(out / "train"), teacher,
                                      verifier, args, device, autocast)
        common.write_json(out / "synthesis.json", record)
    meet()
    return record


# ------------------------------------------------------------------ pictures


@torch.no_grad()
def visualize(args):
    """attention_distance.png: a row a block, a bar a head, its mean attention distance over the
    images; the full width is the longest distance on the grid."""
    if not args.weights:
        raise common.Abort("--visualize needs the student: --weights out/.../student.pth")
    model = load_student(args.weights)
    transform = common.val_transform(model.image_size)
    try:
        images = torch.stack([transform(common.open_rgb(path)) for path in args.visualize])
        images = common.normalize(images, "cpu")
    except Exception as error:  # noqa: BLE001 - decoders raise whatever they like
        raise common.Abort(f"cannot read the images: {error}")
    distance = attention_distance(model, images)                            # (depth, H)
    longest, width, tiles = math.sqrt(2) * max(1, model.grid_size - 1), 240, []
    for block, heads in enumerate(distance.tolist()):
        tile = torch.zeros(3, 16 + 12 * len(heads), width, dtype=torch.uint8)
        mean, name = sum(heads) / len(heads), type(model.blocks[block].attn).__name__
        tile = draw_bounding_boxes(tile, torch.tensor([[0, 0, width, 16]]),
                                   [f"block {block}, {name}: {mean:.2f} patches"], "white", width=0)
        for h, d in enumerate(heads):
            tile[:, 18 + 12 * h:26 + 12 * h, :max(1, round(width * d / longest))] = torch.tensor(
                [[[240]], [[180 - 40 * (h % 3)]], [[60]]], dtype=torch.uint8)
        tiles.append(tile)
        common.say(f"block {block}: " + " ".join(f"{d:.2f}" for d in heads))
    out = Path(args.out or Path(args.weights).parent) / "attention_distance.png"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_image(make_grid(torch.stack(tiles) / 255, nrow=1), out)
    except OSError as error:
        raise common.Abort(f"cannot write {out}: {error}")
    common.say(str(out))


# ------------------------------------------------------------------ command line


def parse_args():
    parser = common.Parser(__doc__)
    parser.add_flags("data", common.data_flags())
    parser.add_flags("models", [
        ("--student", "deit_t", f"the ViT to train: {', '.join(SIZES)}"),
        ("--teacher", "regnet_y_16gf", "see above"),
        ("--teacher-weights", str, "file of the named CNN's weights (default: download them)"),
        ("--train-teacher", str, "train the CNN of this name from scratch instead, with labels"),
        ("--patch-size", 16, "pixels a side of the student's patches", "[1, inf)"),
        ("--mhca-blocks", 4, "first blocks that have MHCA", "[0, inf)"),
        ("--pos-dropout", 0.1, "dropout of MHCA's position term", "[0, 1)"),
        ("--drop-path", float, "stochastic depth (default: 0.1 for deit_b, else 0)", "[0, 1)")],
        "Teachers: any classification CNN of torchvision; cifar_resnet20, 32, 44, 56 (at 32 px,\n"
        "--teacher-weights FILE); the path of a student.pth of --train-teacher; or none: train\n"
        "the student alone.")
    parser.add_flags("loss", [
        ("--stage1-epochs", int, "epochs with the teacher (default: five sixths of --epochs)",
         "[0, inf)"),
        ("--hints", "auto", "block:stage,... or none: which blocks learn which CNN maps"),
        ("--alpha", 0.5, "weight of the teacher's class against the label's", "[0, 1]"),
        ("--beta", 10.0, "weight of the hints", "[0, inf)")],
        "Hints: blocks count from 0; a CNN's stages are its resolutions, from 1, or from the\n"
        "last: -1. auto: block 3 learns the stage at the student's resolution, block 1 the stage\n"
        "before it.")
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
    parser.add_flags("no real images (DF-DearKD)", [
        ("--synthesize", str, "fill the folder with images made from the teacher; don't train"),
        ("--images-per-class", int, "how many of them, of each class", "[1, inf)"),
        ("--images-per-batch", 128, "made together: statistics and L_bp are theirs", "[8, inf)"),
        ("--divergence", float, "weight of L_bp, 0: plain DeepInversion (default: 1)", "[0, inf)"),
        ("--competitor", str, "student.pth to compete with, Adaptive DeepInversion's term"),
        ("--competition", 1.0, "weight of that term", "[0, inf)"),
        ("--half-steps", int, "steps at half size (default: 2000; up to 64 px: 0)", "[0, inf)"),
        ("--steps", int, "steps at full size (default: 1000; up to 64 px: 2000)", "[0, inf)"),
        ("--image-lr", float, "Adam's (default: 0.25; up to 64 px: 0.1)", "(0, inf)"),
        ("--tv", float, "weight of total variation (default: 1e-4; 2.5e-5)", "[0, inf)"),
        ("--l2", float, "weight of the images' norm (default: 1e-5; 0)", "[0, inf)"),
        ("--bn", float, "weight of BatchNorm's statistics (default: 0.01; 0.2)", "[0, inf)"),
        ("--verifier", str, "another CNN that judges the images; as --teacher"),
        ("--verifier-weights", str, "file of its weights"),
        ("--preview-every", 100, "steps between pictures, DIR/preview.png", "[1, inf)"),
        ("--demo-data-free", False, "synthesis and training on it in minutes, nothing needed")],
        "Then train on them: --data DIR --val REAL/val. A restart of the same command goes on.\n"
        "Class folders are named as in --val or --data if given, whose images are also measured.")
    parser.add_flags("run", common.run_flags())
    group = parser.add_flags("pictures", [
        ("--weights", str, "the student.pth whose attention distance is drawn")],
        "--visualize writes attention_distance.png to --out, or else beside --weights.")
    group.add_argument("--visualize", nargs="+", metavar="IMAGE", help="draw, don't train: how far "
                       "each head looks, on these images")
    args = parser.parse_args()

    if args.weights and not args.visualize:
        parser.error("--weights goes with --visualize")
    if args.visualize:
        return args
    if args.train_teacher:
        args.teacher, args.patch_size = "none", 1  # a CNN has no patches
    if args.teacher_weights and (args.teacher == "none" or Path(args.teacher).is_file()):
        parser.error(f"--teacher-weights goes with a teacher's name, not with {args.teacher}")
    if args.verifier_weights and (not args.verifier or Path(args.verifier).is_file()):
        parser.error("--verifier-weights goes with a --verifier's name")
    if args.synthesize:
        if args.teacher == "none" or not args.images_per_class:
            parser.error("--synthesize goes with a --teacher and with --images-per-class")
        if not any(word.split("=")[0] == "--data" for word in sys.argv):
            args.data = None  # not its default
        return args
    if args.student not in SIZES:
        parser.error(f"no student {args.student}: take {', '.join(SIZES)}")
    depth = SIZES[args.student][1]
    if args.mhca_blocks > depth:
        parser.error(f"--mhca-blocks {args.mhca_blocks}: {args.student} has {depth} blocks")
    if args.stage1_epochs is None:
        args.stage1_epochs = round(args.epochs * 5 / 6)
    if args.stage1_epochs > args.epochs:
        parser.error(f"--stage1-epochs {args.stage1_epochs} is longer than --epochs {args.epochs}")
    if args.lr is None:
        args.lr = 1e-3 * args.batch_size / 1024
    if args.warmup_epochs is None:
        args.warmup_epochs = min(20, args.epochs / 10)
    if args.drop_path is None:
        args.drop_path = 0.1 if args.student == "deit_b" and not args.train_teacher else 0.0
    if args.ema is None:
        args.ema = 0.99996 if args.student == "deit_b" and not args.train_teacher else 0.0
    if args.out is None:
        teacher = Path(args.teacher)
        args.out = (f"out/dearkd-teacher-{args.train_teacher}" if args.train_teacher else
                    f"out/dearkd-{args.student}-{teacher.parent.name or teacher.name}")
    return args


def demo(args, device):
    """On shapes, the same seed for all: a CNN teacher, the student alone, with its logits, with
    DearKD. Or, data-free, students that see only images made from the CNN: noise that is labelled,
    plain DeepInversion's, DF-DearKD's; tested on real shapes."""
    if common.world_size() > 1:
        raise common.Abort("a demo is for a single process")
    args.data, args.image_size, args.patch_size, args.batch_size = "shapes", 32, 4, 50
    args.student, args.lr, args.eval_every, args.teacher_weights = "micro", 1e-3, 10**9, None
    args.dry_run, args.resume, args.verifier, args.competitor = False, None, None, None
    args.mixup = args.cutmix = args.label_smoothing = args.ema = args.drop_path = 0.0
    args.rand_augment, args.random_erasing, args.crop_scale = 0, 0.0, 0.5
    args.preview_every, args.images_per_class, args.images_per_batch = 10**9, 48, 160
    args.train_teacher, table = None, []
    with tempfile.TemporaryDirectory() as folder:
        rows = [("alone", 8, {"mhca_blocks": 0, "teacher": "none"}),
                ("logits only", 8, {"mhca_blocks": 0, "hints": "none"}),
                ("DearKD", 8, {})]
        if args.demo_data_free:
            rows = [("noise", 40, {"steps": 0}),
                    ("DeepInversion", 40, {"steps": 200, "divergence": 0.0}),
                    ("DF-DearKD", 40, {"steps": 200})]
        for name, epochs, changes in [
                ("CNN", 5, {"train_teacher": "cifar_resnet20", "teacher": "none"}), *rows]:
            common.say(f"--- {name}, {epochs} epochs")
            run, started, images = copy.copy(args), time.perf_counter(), ""
            run.out, run.teacher = f"{folder}/{name}", f"{folder}/CNN/student.pth"
            run.epochs, run.warmup_epochs = epochs, epochs / 10
            run.stage1_epochs = round(epochs * 5 / 6)
            vars(run).update(changes)
            if "steps" in changes:
                run.synthesize, run.data = f"{folder}/images of {name}", None
                made = fill_folder(run, device)["synthetic"]
                images = f"diversity of images {made['diversity']:.2f}, "
                run.data, run.val = run.synthesize, "shapes"
            top1 = train(run, device)["top1"]
            name = name if name == "CNN" else f"student, {name}"
            table.append(f"{name:24s}{images}top-1 {top1:5.1f} %  "
                         f"{time.perf_counter() - started:4.0f} s")
    common.say("\n" + "\n".join(table))


def main():
    args = parse_args()
    if args.visualize:
        return visualize(args)
    device = common.init_processes()
    if args.demo or args.demo_data_free:
        return demo(args, device)
    if args.synthesize:
        return fill_folder(args, device)
    train(args, device)


if __name__ == "__main__":
    common.run(main)
