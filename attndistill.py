"""AttnDistill: distil a self-supervised vision transformer into a cheaper one, without labels.

Wang et al., "Attention Distillation: self-supervised vision transformer students need more
guidance", arXiv 2210.00944 (BMVC 2022).

The teacher's final class token summarises the image, and that token's attention shows which patches
the summary came from. Therefore
  - projector alignment: an MLP on the student's class token must predict the teacher's;
  - attention guidance: the student's class token must attend to the patches in the last block as
    the teacher's does. The two may differ in patch grid and number of heads.

Formulas, constants and recipe are the authors' (paper and released code). Ours:
  - the last block and the projector run only for the class token;
  - the teacher's attention to register tokens is left out;
  - resized attention below 1e-8 becomes 1e-8; then the patches of a head get their old sum again;
  - tokens and position embedding have no weight decay;
  - the learning rate grows with the square root of the batch size, theirs with the batch size;
  - warm-up takes at most a tenth of the run;
  - mixed precision is bf16 where the device has it; theirs is fp16;
  - the projector's first LayerNorm is the student's final norm, so that the student is a plain ViT.

A pair of the paper, from DINO's ViT-S/8 to a ViT-S/16 with a quarter of the patches; and a demo for
a laptop:
    torchrun --nproc_per_node 8 attndistill.py --teacher dino_s8 --student vit_s
    python attndistill.py --demo
Measured: k-NN top-1 of students in percent, alignment alone -> with guidance, mean and (deviation)
of three seeds, on CIFAR-10: from a weak teacher 50.7 (0.2) -> 51.4 (0.2), from ImageNet's DeiT-T
49.9 (0.8) -> 52.9 (0.2). On Tiny-ImageNet-20 the gain is within the deviation. (One AMD EPYC core,
bf16 or float32, 2026-11-25 to 28; tests/evidence/README.md)
"""

import argparse
import json
import math
import re
import tempfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torchvision.utils import save_image

import common

# ------------------------------------------------------------------ the loss


def attention_guidance_loss(student_attn, teacher_attn, temperature=10.0):
    """L_a = KL(teacher || student) between attentions, a scalar (arXiv 2210.00944, section 3).

    It is summed over heads and averaged over images. student_attn (B, H_s, 1+N_s), teacher_attn
    (B, H_t, 1+N_t): how the class token attends to itself, which comes first, and to the patches of
    a square grid; each row sums to 1. temperature: the paper's T, which softens the product of all
    heads if student and teacher have different numbers of them.
    """
    if student_attn.ndim != 3 or teacher_attn.ndim != 3:
        raise ValueError(f"attention of shapes {tuple(student_attn.shape)} and "
                         f"{tuple(teacher_attn.shape)}: give the class token's rows, (B, H, 1+N)")
    a_s = student_attn.float()
    a_t = teacher_attn.float()
    if a_t.shape[2] != a_s.shape[2]:
        a_t = resize_attention(a_t, grid=math.isqrt(a_s.shape[2] - 1))      # (B, H_t, 1+N_s)
    if a_t.shape[1] != a_s.shape[1]:
        a_s = merge_heads(a_s, temperature)                                 # (B, 1, 1+N_s)
        a_t = merge_heads(a_t, temperature)

    # The authors' limits keep the logarithms moderate. A probability beyond them gets no gradient.
    # Then each row is scaled to sum to 1 again.
    a_s = F.normalize(a_s.clamp(1e-5, 0.996), p=1, dim=2)
    a_t = F.normalize(a_t.clamp(1e-5, 0.996), p=1, dim=2)

    # L_a = 1/B * sum over images and heads of KL(a_t || a_s)
    return (a_t * (a_t.log() - a_s.log())).sum() / len(a_s)


def resize_attention(attn, grid):
    """Resize (B, H, 1+N) to (B, H, 1 + grid^2). The class token's own share stays as it is."""
    g = math.isqrt(attn.shape[2] - 1)
    own = attn[..., :1]                                                     # (B, H, 1)
    patches = attn[..., 1:].unflatten(2, (g, g))                            # (B, H, g, g)
    patches = F.interpolate(patches, (grid, grid), mode="bicubic").flatten(2)
    # Bicubic weights can be negative, and so can the result. Such a patch has no true value: any
    # small number will do.
    patches = patches.clamp(min=1e-8)
    patches = patches * (1 - own) / patches.sum(2, keepdim=True)
    return torch.cat([own, patches], 2)


def merge_heads(attn, temperature):
    """Merge heads into one, (B, H, 1+N) -> (B, 1, 1+N): softmax(1/T * sum over h of log a_h)."""
    # The floor keeps log(0) finite. It is far below 1e-8, because a true probability may be less
    # than that where attention is sharp, and would be changed.
    log_attn = attn.clamp(min=1e-30).log().sum(1, keepdim=True)
    return (log_attn / temperature).softmax(2)


def projector(student_dim, teacher_dim):
    """Return P: (B, D_s) -> (B, D_t), which predicts the teacher's class token."""
    # The released projector begins with one more LayerNorm: here it is the student's final norm
    project = nn.Sequential(
        nn.Linear(student_dim, 2 * student_dim), nn.GELU(),
        nn.Linear(2 * student_dim, student_dim), nn.GELU(),
        nn.Linear(student_dim, 2 * student_dim), nn.GELU(),
        nn.Linear(2 * student_dim, teacher_dim),
        nn.LayerNorm(teacher_dim, eps=1e-6))
    for layer in project:
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    return project


# ------------------------------------------------------------------ the ViT

SIZES = {"micro": {"dim": 96, "depth": 6, "num_heads": 3},
         "vit_t": {"dim": 192, "depth": 12, "num_heads": 3},
         "vit_s": {"dim": 384, "depth": 12, "num_heads": 6},
         "vit_b": {"dim": 768, "depth": 12, "num_heads": 12},
         "vit_l": {"dim": 1024, "depth": 24, "num_heads": 16}}


class RotaryEmbedding(nn.Module):
    """DINOv3's position embedding: rotates queries and keys by the row and column of their patch.

    forward(x (B, H, 1+R+N, D/H)) -> the same shape; class token and R registers are not rotated.
    """

    def __init__(self, head_dim, num_registers):
        super().__init__()
        self.num_prefix = 1 + num_registers
        # Released files hold these periods. timm's copies do not, so they are computed here.
        self.register_buffer("periods", 100 ** (torch.arange(head_dim // 4) / (head_dim // 4)))

    def forward(self, x):
        prefix = x[:, :, :self.num_prefix]
        patches = x[:, :, self.num_prefix:]                                 # (B, H, N, D/H)
        g = math.isqrt(patches.shape[2])

        # An angle for each channel: a quarter of the channels have the row's, a quarter the
        # column's, and the second half has the angles of the first
        numbers = torch.arange(g, dtype=self.periods.dtype, device=self.periods.device)
        centres = 2 * (numbers + 0.5) / g - 1                               # (g,), in -1 .. 1
        positions = torch.cartesian_prod(centres, centres)                  # (N, 2)
        angles = 2 * math.pi * positions[:, :, None] / self.periods         # (N, 2, D/H/4)
        angles = angles.flatten(1).repeat(1, 2)                             # (N, D/H)

        # Channel i of the first half and channel i of the second half rotate as one pair
        a, b = patches.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()                               # (N, D/H), float32
        rotated = patches * cos + torch.cat([-b, a], -1) * sin              # so this is float32
        return torch.cat([prefix, rotated.to(x.dtype)], 2)


class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, rope):
        B, T, D = x.shape                                                   # T: all tokens
        qkv = self.qkv(x).view(B, T, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                # (B, H, T, D/H) each
        x = F.scaled_dot_product_attention(rope(q), rope(k), v)             # (B, H, T, D/H)
        return self.proj(x.transpose(1, 2).reshape(B, T, D))

    def class_token_and_attention(self, x, rope):
        """Return row 0 of forward(x, rope), (B, D), and its attention probabilities, (B, H, T).

        Of the other tokens only keys and values are needed.
        """
        B, T, D = x.shape
        weight = self.qkv.weight                                            # (3D, D)
        bias = self.qkv.bias                                                # (3D,)
        q = F.linear(x[:, 0], weight[:D], bias[:D])                         # (B, D)
        q = q.view(B, self.num_heads, 1, D // self.num_heads)
        kv = F.linear(x, weight[D:], bias[D:])                              # (B, T, 2D)
        kv = kv.view(B, T, 2, self.num_heads, D // self.num_heads)
        k, v = kv.permute(2, 0, 3, 1, 4)                                    # (B, H, T, D/H) each

        # The loss compares these probabilities. A matrix product would run in bf16 under autocast,
        # this sum runs in float32. The class token has no position, so rope would not rotate q.
        logits = (q.float() * rope(k)).sum(-1) / math.sqrt(q.shape[-1])     # (B, H, T)
        attn = logits.softmax(-1)
        out = attn[:, :, None].to(v.dtype) @ v                              # (B, H, 1, D/H)
        return self.proj(out.reshape(B, D)), attn


class Block(nn.Module):
    def __init__(self, dim, num_heads, eps):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))

    def forward(self, x, rope):
        x = x + self.attn(self.norm1(x), rope)
        return x + self.mlp(self.norm2(x))

    def class_token_and_attention(self, x, rope):
        """Return row 0 of forward(x, rope), (B, D), and its attention, (B, H, T).

        For each other token this takes 2 D^2 multiplications, for key and value, instead of 12 D^2.
        """
        attended, attn = self.attn.class_token_and_attention(self.norm1(x), rope)
        cls = x[:, 0] + attended
        return cls + self.mlp(self.norm2(cls)), attn


class ViT(nn.Module):
    """Pre-norm vision transformer with a class token; a student's parameters have timm's names.

    forward(images (B, 3, S, S)) -> logits (B, C); the normed class token (B, D) if num_classes = 0.
    For teachers: num_registers tokens between class token and patches, rope (DINOv3's rotary
    position embedding), and the eps of all LayerNorms.
    """

    def __init__(self, image_size=224, patch_size=16, dim=384, depth=12, num_heads=6,
                 num_classes=1000, num_registers=0, rope=False, eps=1e-6):
        super().__init__()
        N = (image_size // patch_size) ** 2
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch_size, patch_size)})
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02))
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1 + N, dim), std=0.02))
        self.num_registers = num_registers
        if num_registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, num_registers, dim))
        self.rope_embed = nn.Identity()
        if rope:
            self.rope_embed = RotaryEmbedding(dim // num_heads, num_registers)
        self.blocks = nn.ModuleList(Block(dim, num_heads, eps) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def class_token_and_attention(self, images):
        """Return what AttnDistill reads: the class token after the final norm, (B, D), and its
        attention over itself and the patches in the last block, (B, H, 1+N)."""
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)     # (B, N, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        if self.num_registers:  # they have no position, so they come after the position embedding
            registers = self.register_tokens.expand(len(x), -1, -1)
            x = torch.cat([x[:, :1], registers, x[:, 1:]], 1)               # (B, 1+R+N, D)
        for block in self.blocks[:-1]:
            x = block(x, self.rope_embed)
        cls, attn = self.blocks[-1].class_token_and_attention(x, self.rope_embed)
        if self.num_registers:  # a student has none: leave them out, let rows sum to 1 again
            attn = torch.cat([attn[..., :1], attn[..., 1 + self.num_registers:]], -1)
            attn = attn / attn.sum(-1, keepdim=True)                        # (B, H, 1+N)
        return self.norm(cls), attn

    def forward(self, images):
        cls, _ = self.class_token_and_attention(images)
        return self.head(cls)


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


# How teachers' authors resize a position embedding from old x old to new x new, as arguments of
# F.interpolate. "tenth": they add 0.1 to the new grid, so that it is not rounded down. The result
# has the same size as "plain", and slightly different values.
RESIZE = {
    "plain": lambda old, new: {"size": (new, new)},
    "tenth": lambda old, new: {"scale_factor": (new + 0.1) / old},
    "antialiased": lambda old, new: {"size": (new, new), "antialias": True},
}


def resize_position(pos_embed, grid, resize="plain"):
    """Resize a position embedding (1, P + g*g, D) to (1, 1 + grid*grid, D), bicubically.

    P = 1: the first row belongs to the class token and stays. P = 0 in DeiT III and in timm's
    DINOv2 with registers, which add no position to the class token: then a row of zeros is put in
    front. resize: a key of RESIZE. Where the grids agree nothing is resized.
    """
    g = math.isqrt(pos_embed.shape[1])  # the root of 1 + g*g rounds down to g
    class_token, patches = pos_embed.tensor_split([pos_embed.shape[1] - g**2], dim=1)
    if class_token.shape[1] == 0:
        class_token = torch.zeros_like(patches[:, :1])
    if g != grid:
        patches = patches.unflatten(1, (g, g)).permute(0, 3, 1, 2)          # (1, D, g, g)
        patches = F.interpolate(patches, mode="bicubic", **RESIZE[resize](g, grid))
        patches = patches.flatten(2).transpose(1, 2)                        # (1, grid*grid, D)
    return torch.cat([class_token, patches], 1)


# What released files hold besides the ViT, by the start of the name. All else is an error.
LEFT_OUT = (
    "head.",            # a classifier, or the projection head of DINO, iBOT, MoCo v3
    "mask_token",       # DINOv2, DINOv3, MAE
    "masked_embed",     # iBOT
    "decoder_",         # MAE
    "relation_blocks.",  # Mugs
    "local_cls_norm.",  # DINOv3 for satellite images: used only in its training
)


def prepare_weights(weights, rope=False):
    """Return released weights as ViT expects them: renamed, without LEFT_OUT, LayerScale folded in.

    rope: the weights are DINOv3's.
    """
    state = {}
    for name, tensor in weights.items():
        # DINOv2's training code cuts the blocks into chunks: blocks.0.3 is block 3
        name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)
        if name in ("storage_tokens", "reg_token"):  # DINOv3, timm
            name = "register_tokens"
        if not name.startswith(LEFT_OUT):
            state[name] = tensor
    if rope:
        state = prepare_dinov3(state)
    return fold_layer_scale(state)


def prepare_dinov3(state):
    """Add what ViT has and DINOv3 does not: a position embedding and a bias of the keys, both 0."""
    state = dict(state)
    dim = len(state["patch_embed.proj.weight"])
    # Of a class token and a grid of 1 x 1: load_weights enlarges it
    state["pos_embed"] = torch.zeros(1, 2, dim)
    blocks = {name.rpartition(".attn.qkv.")[0] for name in state if ".attn.qkv." in name}
    for block in blocks:
        # Meta's files hold a bias of queries, keys and values, and a mask that is 0 for the keys.
        # timm's hold those of queries and values alone, or none if all are 0.
        zeros = torch.zeros(dim)
        bias = state.get(f"{block}.attn.qkv.bias", torch.zeros(3 * dim))
        mask = state.pop(f"{block}.attn.qkv.bias_mask", torch.ones(3 * dim))
        query_bias = state.pop(f"{block}.attn.q_bias", zeros)
        value_bias = state.pop(f"{block}.attn.v_bias", zeros)
        state[f"{block}.attn.qkv.bias"] = bias * mask + torch.cat([query_bias, zeros, value_bias])
    return state


def load_weights(vit, state, source, resize="plain"):
    """Load weights strictly, after resizing their position embedding to the ViT's image size."""
    position = state.get("pos_embed", torch.empty(0))
    if position.ndim == 3 and position.shape[1] > 1:  # else load_strictly will refuse it
        grid = math.isqrt(vit.pos_embed.shape[1])  # of 1 + grid*grid rows
        state = {**state, "pos_embed": resize_position(position, grid, resize)}
    common.load_strictly(vit, state, source)


# ------------------------------------------------------------------ the teacher

REGISTERS = {"num_registers": 4}
DINOV3 = {"num_registers": 4, "rope": True, "eps": 1e-5}
HALF = (0.5, 0.5, 0.5)

# Each row:
#   size: a key of SIZES. The patch size is read from the weights.
#   file: path below https://dl.fbaipublicfiles.com/. A teacher without it needs --teacher-weights.
#   vit: further arguments of ViT. resize: a key of RESIZE, "plain" if left out.
#   mean, std: of the images that the ViT was made for, where they are not ImageNet's.
TEACHERS = {
    "dino_s16": {"size": "vit_s", "resize": "tenth",
                 "file": "dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth"},
    "dino_s8": {"size": "vit_s", "resize": "tenth",
                "file": "dino/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth"},
    "dino_b16": {"size": "vit_b", "resize": "tenth",
                 "file": "dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth"},
    "dino_b8": {"size": "vit_b", "resize": "tenth",
                "file": "dino/dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth"},
    "dinov2_s14": {"size": "vit_s", "resize": "tenth",
                   "file": "dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth"},
    "dinov2_b14": {"size": "vit_b", "resize": "tenth",
                   "file": "dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth"},
    "dinov2_l14": {"size": "vit_l", "resize": "tenth",
                   "file": "dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"},
    "dinov2_s14_reg": {"size": "vit_s", "resize": "antialiased", "vit": REGISTERS,
                       "file": "dinov2/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth"},
    "dinov2_b14_reg": {"size": "vit_b", "resize": "antialiased", "vit": REGISTERS,
                       "file": "dinov2/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth"},
    "dinov2_l14_reg": {"size": "vit_l", "resize": "antialiased", "vit": REGISTERS,
                       "file": "dinov2/dinov2_vitl14/dinov2_vitl14_reg4_pretrain.pth"},
    "dinov3_s16": {"size": "vit_s", "vit": DINOV3},
    "dinov3_b16": {"size": "vit_b", "vit": DINOV3},
    "dinov3_l16": {"size": "vit_l", "vit": DINOV3},
    # of satellite images, SAT-493M
    "dinov3_l16_sat": {"size": "vit_l", "vit": DINOV3,
                       "mean": (0.430, 0.411, 0.296), "std": (0.213, 0.156, 0.143)},
    "ibot_s16": {"size": "vit_s", "resize": "tenth"},
    "ibot_b16": {"size": "vit_b", "resize": "tenth"},
    "ibot_l16": {"size": "vit_l", "resize": "tenth"},
    "mugs_s16": {"size": "vit_s", "resize": "tenth"},
    "mugs_b16": {"size": "vit_b", "resize": "tenth"},
    "mugs_l16": {"size": "vit_l", "resize": "tenth"},
    "moco_s16": {"size": "vit_s", "vit": {"num_heads": 12}},  # MoCo v3
    "moco_b16": {"size": "vit_b"},
    # timm's vit_{tiny,small,base,large}_patch16_224
    "augreg_t16": {"size": "vit_t", "mean": HALF, "std": HALF},
    "augreg_s16": {"size": "vit_s", "mean": HALF, "std": HALF},
    "augreg_b16": {"size": "vit_b", "mean": HALF, "std": HALF},
    "augreg_l16": {"size": "vit_l", "mean": HALF, "std": HALF},
    # any other plain ViT of the size: MAE, DeiT, DeiT III, your own
    "vit_t": {"size": "vit_t"},
    "vit_s": {"size": "vit_s"},
    "vit_b": {"size": "vit_b"},
    "vit_l": {"size": "vit_l"},
    # the same: names that were in use when the patch size was not read from the file
    "vit_t16": {"size": "vit_t"},
    "vit_s16": {"size": "vit_s"},
    "vit_b16": {"size": "vit_b"},
    "vit_l16": {"size": "vit_l"},
    "vit_t8": {"size": "vit_t"},
    "vit_s8": {"size": "vit_s"},
    "vit_b8": {"size": "vit_b"},
    "vit_l8": {"size": "vit_l"},
}


def find_teacher(name, weights):
    """Return (file or address of the weights, arguments of ViT, row of TEACHERS or {})."""
    if name in TEACHERS:
        row = TEACHERS[name]
        if not weights and "file" not in row:
            raise common.InputError(f"{name} has no download: give its file as --teacher-weights "
                                    "(eval_knn.py: --weights)")
        source = weights or f"https://dl.fbaipublicfiles.com/{row['file']}"
        return source, {**SIZES[row["size"]], **row.get("vit", {})}, row
    if not Path(name).is_file():
        raise common.InputError(f"unknown teacher {name}: choose {', '.join(TEACHERS)}, or the "
                                "path of a student.pth")
    if weights:
        raise common.InputError(f"{name} is a file already: leave out --teacher-weights "
                                "(eval_knn.py: --weights)")
    saved = common.load_checkpoint(name)
    is_student = (isinstance(saved, dict) and saved.get("script") in ("attndistill", "vitkd")
                  and "arch" in saved)
    if not is_student:
        raise common.InputError(
            f"{name} is not a student.pth of attndistill.py or vitkd.py. For a file of other "
            "weights choose the name, such as dino_s16 or vit_s, and give the file as "
            "--teacher-weights")
    return name, saved["arch"], {}


def load_teacher(name, weights=None, image_size=224):
    """Return a frozen ViT without head in eval mode, for images of `image_size` pixels.

    name: one of TEACHERS, with its weights in the file `weights` or else downloaded; or the path
    of a student.pth of attndistill.py or vitkd.py. The patch size is that of the weights. Raises
    common.InputError, a ValueError, if the name is unknown or the file does not fit.
    """
    source, arch, row = find_teacher(name, weights)
    rope = arch.get("rope", False)
    state = common.read_weights(source)
    if rope and "pos_embed" in state:
        raise common.InputError(f"{source} has a position embedding, so it is not a DINOv3: choose "
                                "the name of its model")
    if "local_cls_norm.weight" in state and "mean" not in row:
        common.print0(f"WARNING: {source} was trained on satellite images, with a normalisation of "
                      "their own: choose dinov3_l16_sat")
    state = prepare_weights(state, rope)
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
    arch = {**arch, "image_size": image_size, "patch_size": patch_size, "num_classes": 0}
    teacher = ViT(**arch)
    if rope:  # files without the periods keep those of the formula
        state = {**teacher.rope_embed.state_dict(prefix="rope_embed."), **state}
    load_weights(teacher, state, source, row.get("resize", "plain"))
    return teacher.requires_grad_(False).eval()


# ------------------------------------------------------------------ training


class Distillation(nn.Module):
    """Everything that is trained, in one module for one DistributedDataParallel.

    forward(images, teacher_features) -> {name: loss term}; the loss is their sum. The term
    "guidance" is lambda_a * L_a. teacher_features: what the teacher's
    class_token_and_attention(images) returns.
    """

    def __init__(self, student, project, lambda_a=0.1):
        super().__init__()
        self.student = student
        self.project = project
        self.lambda_a = lambda_a

    def forward(self, images, teacher_features):
        teacher_cls, teacher_attn = teacher_features
        cls, attn = self.student.class_token_and_attention(images)
        losses = {}
        # L_c = mean over B and D_t of (P(z_s) - z_t)^2, z: class tokens, P: the projector
        losses["alignment"] = F.mse_loss(self.project(cls).float(), teacher_cls.float())
        if self.lambda_a:
            losses["guidance"] = self.lambda_a * attention_guidance_loss(attn, teacher_attn)
        return losses


def load_init(student, path):
    """Start a student from a file of ViT weights, without their head."""
    load_weights(student, prepare_weights(common.read_weights(path)), path)


def load_data(data, val, image_size):
    """Return (training images, validation images), or (training images, None) without labels.

    There are labels if classes have folders, in train/ and in val/. Else every image below train/,
    or below `data` if it holds no train/, is used for training.
    """
    folder = Path(data)
    train_folder = folder / "train"
    val_folder = folder / "val"
    # --val asks for labels. If `data` is not a folder, common.load_data reports the error.
    if val or data in common.NAMED_DATA or not folder.is_dir():
        return common.load_data(data, val, image_size)
    if all(part.is_dir() and common.class_folders(part) for part in (train_folder, val_folder)):
        return common.load_data(data, val, image_size)
    photos = train_folder if train_folder.is_dir() else folder
    others = sorted(set(common.class_folders(folder)) - {"train", "val", "test"})
    if photos == train_folder and others:  # "train" may be one folder of photos among others
        common.print0(f"WARNING: of {folder} only train/ is used, not {common.listed(others)}")
    images = common.ImageFolder(photos, classes=[""])  # one class: its folder is the whole folder
    if len(images) == 0:
        raise common.InputError(f"--data {data}: there are no images below {photos}")
    return images, None


def train(args, device):
    """Train args.student with args.teacher. Return the record of the last epoch."""

    # ---- precision ----
    args.amp = args.amp or common.best_precision(device)
    common.describe_run(device, args.amp)
    common.choose_attention_kernel(device, args.amp)
    autocast = torch.autocast(device.type, common.DTYPES[args.amp], enabled=args.amp != "off")
    # fp16 rounds small gradients to 0: the scaler multiplies the loss first. It is idle otherwise.
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")

    # ---- data ----
    train_images, val_images = load_data(args.data, args.val, args.image_size)
    num_classes = len(train_images.classes)
    indices = common.class_balanced_subset(train_images.targets, args.data_fraction)
    augment = common.train_transform(args.image_size, (args.crop_scale, 1.0))
    train_set = common.Images(train_images, indices, augment, args.seed)
    train_batches = common.train_loader(train_set, args.batch_size, args.accum, args.workers,
                                        args.seed)
    steps_per_epoch = len(train_batches)

    # In k-NN the training images are the neighbours, without augmentation
    bank = None
    val_set = None
    if val_images:
        test_transform = common.val_transform(args.image_size)
        bank = common.Images(train_images, indices, test_transform, replace_unreadable=False)
        val_set = common.Images(val_images, range(len(val_images)), test_transform,
                                replace_unreadable=False)
        common.print_counts(train_set, val_set)
    else:
        common.print0(f"{len(train_set)} training images in {train_images.folder}. Without "
                      "train/CLASS/* and val/CLASS/* k-NN is not measured")

    def knn_top1(vit):  # in percent, weighted k-NN on the ViT's class tokens, k = 20
        import eval_knn  # only here: training without k-NN needs common.py alone
        # Images of one forward pass: what fits into memory in training also fits in evaluation
        chunk_size = args.batch_size // (common.world_size() * args.accum)
        accuracies = eval_knn.evaluate(vit, bank, val_set, num_classes, chunk_size, args.workers,
                                       device, autocast, ks=(20,))
        top1, _ = accuracies[20]
        return top1

    # ---- models ----
    torch.manual_seed(args.seed)
    arch = {**SIZES[args.student], "image_size": args.image_size, "patch_size": args.patch_size,
            "num_classes": 0}
    student = ViT(**arch)
    if args.init:
        load_init(student, args.init)
    teacher = load_teacher(args.teacher, args.teacher_weights, args.image_size)
    teacher.to(device)
    teacher_features_of = teacher.class_token_and_attention

    teacher_dim = teacher.cls_token.shape[2]
    project = projector(arch["dim"], teacher_dim)
    model = Distillation(student, project, args.lambda_a)
    model.to(device)

    # ---- optimiser ----
    groups = common.parameter_groups(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)

    # ---- image size of --init and --teacher ----
    trained_on = {"classes": None, "image_size": args.image_size}  # None: no label is read
    for path in (args.init, args.teacher, args.teacher_weights):
        common.compare_with_training(path, **trained_on)

    # ---- resume ----
    stateful = {"model": model, "optimizer": optimizer, "scaler": scaler}
    settings = {**vars(args), "num_classes": num_classes}  # --resume compares them
    log = []  # one record an epoch
    checkpoint = common.open_run(args.out, args.resume, settings)
    if checkpoint:
        log = checkpoint["log"]
        for name, part in stateful.items():
            part.load_state_dict(checkpoint[name])

    # ---- compile, and several processes ----
    if args.compile:
        model.compile(dynamic=False)  # in place, so that names in state_dict() stay as they are
        teacher_features_of = torch.compile(teacher_features_of, dynamic=False)
    ddp = DDP(model, gradient_as_bucket_view=True) if common.world_size() > 1 else model
    bad_steps_in_a_row = 0

    for epoch in range(len(log), args.epochs):
        # A resumed run sees the same images as an uninterrupted one
        train_batches.sampler.set_epoch(epoch)  # the order of images
        train_set.epoch = epoch  # their augmentation
        model.train()
        loss_sums = defaultdict(float)
        skipped_steps = 0
        batches = common.TimedBatches(train_batches, epoch, args.epochs, args.batch_size)

        for step, (images, _) in enumerate(batches, start=1):  # _: the labels, which are never read
            images = images.to(device, non_blocking=True)

            # ---- learning rate ----
            lr = common.learning_rate(epoch + step / steps_per_epoch, args.epochs, args.lr,
                                      args.min_lr, args.warmup_epochs)
            for group in optimizer.param_groups:
                group["lr"] = lr

            # ---- forward and backward, in equal chunks to save memory ----
            for i, x in enumerate(images.chunk(args.accum)):
                # Gradients add up from chunk to chunk. DDP averages them over the processes, which
                # is needed only once: in the last backward pass. Without DDP this has no effect.
                ddp.require_backward_grad_sync = i == args.accum - 1
                with torch.no_grad(), autocast:
                    teacher_features = teacher_features_of(x)
                with autocast:
                    losses = ddp(x, teacher_features)
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
        if val_set and epoch == 0:
            # Weights under the wrong teacher's name can load and compute nonsense: this shows it
            record["teacher_knn20"] = knn_top1(teacher)
        if val_set and ((epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs):
            record["knn20"] = knn_top1(student)
        record["seconds"] = batches.seconds()
        log.append(record)
        common.log_epoch(args.out, log, args.epochs)

        # ---- checkpoints: the student as a plain ViT, and what --resume needs ----
        if common.rank() == 0:
            common.save_checkpoint(f"{args.out}/student.pth", model=common.cpu_weights(student),
                                   arch=arch, script="attndistill", trained_on=trained_on)
            states = {name: part.state_dict() for name, part in stateful.items()}
            common.save_checkpoint(f"{args.out}/last.pth", **states, log=log, args=settings)
    return log[-1]


# ------------------------------------------------------------------ command line


@torch.no_grad()
def visualize(args, device):
    """Draw attention.png in args.out, a row for each image in args.visualize.

    A row shows the image, then the class token's attention in the last block, of the teacher and
    of the student: the mean of the heads, then each head. Each map has its own range from black to
    white.
    """
    student_file = f"{args.out}/student.pth"
    if not Path(student_file).is_file():
        raise common.InputError(f"there is no {student_file}: give --out of a run to --visualize")
    _, arch, _ = find_teacher(student_file, weights=None)
    image_size = arch["image_size"]
    transform = common.val_transform(image_size)
    student = load_teacher(student_file, None, image_size).to(device)  # it loads any student.pth

    name = args.teacher
    weights = args.teacher_weights
    if name is None:  # the teacher of the run
        run_file = Path(args.out) / "args.json"
        if not run_file.is_file():
            raise common.InputError(f"there is no {run_file}: give the --teacher to draw")
        run = json.loads(run_file.read_text())
        name = run["teacher"]
        weights = weights or run["teacher_weights"]
    teacher = load_teacher(name, weights, image_size).to(device)

    tiles = []
    for path in args.visualize:
        try:
            image = transform(common.load_image(path)).to(device)           # (3, S, S)
        except OSError as error:
            raise common.InputError(f"--visualize: {error}") from error
        tiles.append(image)
        for vit in (teacher, student):
            _, attn = vit.class_token_and_attention(image[None])            # (1, H, 1+N)
            heads = attn[0, :, 1:]                                          # (H, N)
            maps = torch.cat([heads.mean(0, keepdim=True), heads])          # (1+H, N)
            g = math.isqrt(maps.shape[1])
            maps = F.interpolate(maps.view(-1, 1, g, g), (image_size, image_size))
            tiles.extend(maps.expand(-1, 3, -1, -1))                        # (1+H, 3, S, S)
    tiles_in_a_row = len(tiles) // len(args.visualize)
    save_image(tiles, f"{args.out}/attention.png", nrow=tiles_in_a_row, normalize=True,
               scale_each=True)
    common.print0(f"drawn: {args.out}/attention.png, with the teacher {name}")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], usage="%(prog)s [--flag value ...]",
        epilog="Defaults are in parentheses.", allow_abbrev=False)
    parser.error = common.fail  # one line, also under torchrun

    data = parser.add_argument_group("data")
    data.add_argument("--data", default="data/imagenet",
                      help="folder that holds train/CLASS/* and val/CLASS/*; or any folder of "
                           "photos, without k-NN; or cifar10, cifar100 (downloaded to data/), "
                           "shapes (drawn in memory) (%(default)s)")
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
    models.add_argument("--student", choices=SIZES, default="vit_s",
                        help="the ViT to train; micro, of 0.7 million parameters, is for CPUs "
                             "(%(default)s)")
    models.add_argument("--init", metavar="FILE",
                        help="start from a plain ViT of the student's size and patch size that was "
                             "made for ImageNet's mean and deviation (not AugReg, not MoCo v3's "
                             "ViT-S); a file or https address; its head is left out")
    models.add_argument("--teacher",
                        help=f"{', '.join(TEACHERS)}; or the path of a student.pth of "
                             "attndistill.py or vitkd.py. moco_*: MoCo v3. augreg_*: timm's own "
                             "ViTs. vit_*: MAE, DeiT, DeiT III, any other plain ViT (dino_s8; "
                             "with --visualize the run's own)")
    models.add_argument("--teacher-weights", metavar="FILE",
                        help="file or https address of the named teacher's weights, instead of the "
                             "usual download; all but dino_* and dinov2_* need it")
    models.add_argument("--patch-size", type=common.positive_int, default=16,
                        help="side length of the student's patches in pixels; the teacher may have "
                             "another (%(default)s)")

    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--lambda-a", type=common.non_negative, default=0.1,
                        help="weight of attention guidance, 0: off (%(default)s)")
    recipe.add_argument("--batch-size", type=common.positive_int, default=4096,
                        help="images per step, of all GPUs together (%(default)s)")
    recipe.add_argument("--accum", type=common.positive_int, default=1,
                        help="gradient accumulation: compute a step in this many parts, one after "
                             "the other; 2, 4, ... if the GPU's memory is full (%(default)s)")
    recipe.add_argument("--epochs", type=common.positive_int, default=800,
                        help="passes over the training images (%(default)s)")
    recipe.add_argument("--lr", type=common.non_negative,
                        help="peak learning rate (2.4e-3 * sqrt(batch size / 4096))")
    recipe.add_argument("--min-lr", type=common.non_negative, default=0.0,
                        help="learning rate at the end of the cosine (%(default)s)")
    recipe.add_argument("--warmup-epochs", type=common.non_negative, default=40,
                        help="epochs of linear warm-up, at most a tenth of --epochs (%(default)s)")
    recipe.add_argument("--weight-decay", type=common.non_negative, default=0.05,
                        help="weight decay of AdamW (%(default)s)")
    recipe.add_argument("--clip-grad", type=common.non_negative, default=0.0,
                        help="largest norm of the gradient, 0: no limit (%(default)s)")
    recipe.add_argument("--crop-scale", type=common.fraction, default=0.2,
                        help="smallest share of an image's area that a random crop keeps; larger, "
                             "such as 0.4, for small images (%(default)s)")
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
    run.add_argument("--out", default="out/attndistill",
                     help="folder for student.pth, last.pth, log.jsonl, args.json (%(default)s)")
    run.add_argument("--resume", action="store_true",
                     help="continue the run in --out after its last whole epoch, if there is one")
    run.add_argument("--eval-every", type=common.positive_int, default=20,
                     help="epochs between k-NN evaluations (%(default)s)")
    run.add_argument("--log-every", type=common.positive_int, default=50,
                     help="steps between progress lines (%(default)s)")
    run.add_argument("--demo", action="store_true",
                     help="train three small ViTs on drawn shapes, without data, download or GPU; "
                          "of the other flags only --workers and --seed count")
    run.add_argument("--visualize", nargs="+", metavar="IMAGE",
                     help="do not train, but draw where the student in --out and its teacher "
                          "attend in these images: attention.png in --out")
    args = parser.parse_args(argv)
    common.refuse_empty_flags(args)

    if args.teacher is None and not args.visualize:
        args.teacher = "dino_s8"
    if args.image_size % args.patch_size:
        parser.error(f"--image-size {args.image_size} is not a multiple of --patch-size "
                     f"{args.patch_size}")
    if args.lr is None:
        args.lr = 2.4e-3 * math.sqrt(args.batch_size / 4096)
    return args


def demo(args, device):
    """Train a teacher and distil it without and with guidance. Print a table of k-NN.

    vitkd.py trains the teacher with labels: without them it would take hours. The students read
    no label.
    """
    import vitkd  # only here: AttnDistill itself needs nothing of it
    if common.world_size() > 1:
        raise common.InputError("--demo runs in one process, without torchrun")
    torch.set_num_threads(1)  # steps are so small that more threads mostly wait for each other
    shared = ("--data shapes --image-size 24 --patch-size 8 --student micro --batch-size 25 "
              "--lr 1e-3 --crop-scale 0.5 --eval-every 1000 "
              f"--workers {args.workers} --seed {args.seed}")
    of_teacher = ("--teacher none --epochs 4 --label-smoothing 0 --mixup 0 --cutmix 0 "
                  "--rand-augment 0 --random-erasing 0")
    runs = {
        "untrained": "--epochs 1 --lr 0 --batch-size 1000",
        "alignment": "--epochs 1 --lambda-a 0",
        "alignment + guidance": "--epochs 1 --lambda-a 0.1",
    }
    table = []
    with tempfile.TemporaryDirectory() as out:
        teacher = f"{out}/teacher"
        common.print0(f"\nteacher: python vitkd.py {shared} {of_teacher} --out out/demo/teacher")
        vitkd.main([*shared.split(), *of_teacher.split(), "--out", teacher])
        for name, flags in runs.items():
            folder = f"{out}/{len(table)}"
            flags = ["--teacher", f"{teacher}/student.pth", *flags.split()]
            command = f"python attndistill.py {shared} {' '.join(flags)} --out {folder}"
            common.print0(f"\nstudent, {name}: {command.replace(out, 'out/demo')}")
            record = train(parse_args([*shared.split(), *flags, "--out", folder]), device)
            table.append(f"student, {name:21s} k-NN top-1 {record['knn20']:5.1f} %")
    table.insert(0, f"teacher, with labels           k-NN top-1 {record['teacher_knn20']:5.1f} %")
    common.print0("\n" + "\n".join(table))


def main(argv=None):
    args = parse_args(argv)
    device = common.init_processes()
    try:
        if args.visualize:
            visualize(args, device)
        elif args.demo:
            demo(args, device)
        else:
            train(args, device)
    except common.InputError as error:
        common.fail(error)
    common.leave_processes()


if __name__ == "__main__":
    main()
