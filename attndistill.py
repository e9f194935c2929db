"""AttnDistill: distil a self-supervised vision transformer into a smaller one. No labels.

Wang et al., "Attention Distillation: self-supervised vision transformer students need more
guidance", arXiv 2210.00944 (BMVC 2022).

The idea. What a self-supervised teacher knows of an image is in its final class token, and what
it looked at is in that token's attention. So the student gets two terms, both of the class token:
  - projector alignment (PA): an MLP on the student's class token must give the teacher's;
  - attention guidance (AG): the class token's attention over the patches, in the last block, must
    be the teacher's. Teacher and student may have other patch grids and numbers of heads.
The loss reads no label; labels only measure the result (k-NN on frozen features, eval_knn.py).

Formulas and constants are the authors' (paper and released code). Ours: the last block and the
projector are computed for the class token alone (same numbers, see Block.class_token); the
projector's first LayerNorm is the student's own final norm, so that the student is a plain ViT;
log-attention has a floor of 1e-8, and a peak that resizing cannot see is spread; an epoch's batches
are evened out instead of dropping the last; position embeddings are resized with antialiasing.
To copy the method, take this file, common.py and eval_knn.py.

A student with the teacher's width, at a quarter of its tokens (a pair of the paper):
    torchrun --nproc_per_node 8 attndistill.py --teacher dino_s8 --student vit_s
From today's self-supervised teachers (a grid of 16 x 16 patches of 14 px; the student's: 14 x 14):
    torchrun --nproc_per_node 8 attndistill.py --teacher dinov2_b14 --student vit_s
On a laptop, in minutes, with nothing to download:
    python attndistill.py --demo
What teacher and student look at, as a picture:
    python attndistill.py --visualize *.jpg --weights out/x/student.pth --teacher dino_s8

Measured (an AMD EPYC, bf16, 2026-11-20 and 21; logs and commands in tests/evidence/; k-NN top-1,
k = 20): CIFAR-10, micro <- deit_t (55.4 %), 8 epochs of 10,000 images in 16 patches, means of seeds
0 to 2, deviations up to 0.2: PA 50.2 %, PA + AG 51.2. In 64 patches, 4 epochs of 50,000 images, no
difference: PA 62.4 and 62.9 %, PA + AG 63.1 and 62.3, teacher 64.2. The demo over seeds 0 to 3: PA
55.4 %, PA + AG 63.1 (gains 5.1 to 10.3), 2 min 37 s on two cores.
"""

import contextlib
import copy
import math
import pickle
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.utils import draw_bounding_boxes, make_grid, save_image

import common_before as common
import eval_knn

# ------------------------------------------------------------------ the loss


def attention_guidance_loss(student_attn, teacher_attn, temperature=10.0):
    """L_a = KL(teacher || student) of their class tokens' attention, a scalar.

    student_attn (B, H_s, 1+N_s), teacher_attn (B, H_t, 1+N_t): probabilities, the class token's
    own first; N_s and N_t must be squares. What differs is brought together, the grids by
    resizing the teacher's, the heads by merging them on both sides (arXiv 2210.00944, section 3).
    """
    a_s, a_t = student_attn.float(), teacher_attn.float()
    if a_t.shape[-1] != a_s.shape[-1]:
        a_t = resize_attention(a_t, math.isqrt(a_s.shape[-1] - 1))
    if a_t.shape[1] != a_s.shape[1]:
        a_s, a_t = merge_heads(a_s, temperature), merge_heads(a_t, temperature)
    a_s, a_t = clamp_attention(a_s), clamp_attention(a_t)
    # KL(a_t || a_s), summed over heads and positions, divided by B
    return (a_t * (a_t.log() - a_s.log())).sum() / len(a_s)


def resize_attention(attn, grid):
    """(B, H, 1+N) -> (B, H, 1+grid*grid): the class token keeps its share, the patches' is
    resized bicubically and scaled to the rest."""
    B, H, rows = attn.shape
    g = math.isqrt(rows - 1)
    if g * g != rows - 1:
        raise ValueError(f"attention over {rows - 1} patches, which is no square grid")
    a_cls, patches = attn[..., :1], attn[..., 1:].reshape(B, H, g, g)
    patches = F.interpolate(patches, (grid, grid), mode="bicubic").flatten(2)  # (B, H, grid*grid)
    # A lone peak can fall between the points that a large reduction reads, or on the kernel's
    # negative side: where next to nothing is left to be scaled, all patches get the same.
    total, uniform = patches.sum(-1, keepdim=True), 1 / grid**2
    lost = total * (g / grid)**2 <= 1e-3 * attn[..., 1:].sum(-1, keepdim=True)
    patches = torch.where(lost, uniform, patches / torch.where(lost, 1.0, total))
    return torch.cat([a_cls, (1 - a_cls) * patches], -1)


def merge_heads(attn, temperature):
    """(B, H, 1+N) -> (B, 1, 1+N): softmax_j( (1/T) * sum_h log max(a_hj, 1e-8) )."""
    return (attn.clamp(min=1e-8).log().sum(1, keepdim=True) / temperature).softmax(-1)


def clamp_attention(attn):
    """From below and above to [1e-5, 0.996] (the authors' constants), then rows to sum 1 again."""
    attn = attn.clamp(1e-5, 0.996)
    return attn / attn.sum(-1, keepdim=True)


def projector(student_dim, teacher_dim):
    """P: student's class token (B, D_s) -> (B, D_t), to be compared with the teacher's."""
    return nn.Sequential(
        nn.Linear(student_dim, 2 * student_dim), nn.GELU(),
        nn.Linear(2 * student_dim, student_dim), nn.GELU(),
        nn.Linear(student_dim, 2 * student_dim), nn.GELU(),
        nn.Linear(2 * student_dim, teacher_dim), nn.LayerNorm(teacher_dim))


# ------------------------------------------------------------------ the ViT

SIZES = {  # name: (dim, depth, num_heads)
    "micro": (96, 6, 3), "vit_t": (192, 12, 3), "vit_s": (384, 12, 6), "vit_b": (768, 12, 12),
    "vit_l": (1024, 24, 16)}


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

    def class_token(self, x):
        """Row 0 of forward(x), (B, D), and its attention probabilities, (B, H, N)."""
        B, N, D = x.shape
        w_q, w_kv = self.qkv.weight.split([D, 2 * D])
        b_q, b_kv = self.qkv.bias.split([D, 2 * D])
        q = F.linear(x[:, 0], w_q, b_q).view(B, self.num_heads, 1, -1)      # (B, H, 1, D/H)
        kv = F.linear(x, w_kv, b_kv).view(B, N, 2, self.num_heads, -1)
        k, v = kv.permute(2, 0, 3, 1, 4)                                    # (B, H, N, D/H) each
        attn = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])               # (B, H, 1, N)
        attn = attn.softmax(-1, dtype=torch.promote_types(attn.dtype, torch.float32))
        return self.proj((attn.to(v.dtype) @ v).reshape(B, D)), attn.squeeze(2)


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
    def __init__(self, dim, num_heads, layer_scale):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.ls1 = LayerScale(dim) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)
        self.ls2 = LayerScale(dim) if layer_scale else nn.Identity()

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))

    def class_token(self, x):
        """Row 0 of forward(x), (B, D), and its attention, (B, H, 1+N), at a sixth of the cost.

        In the last block nothing reads the patch tokens that come out, so only what reaches the
        class token is computed. That needs the keys and values of all tokens, but one query, one
        row of attention, and output projection, norm and MLP of one token. Per token a block
        costs 12 D^2 multiplications (qkv 3, projection 1, MLP 8); keys and values are 2 of them.
        """
        cls, attn = self.attn.class_token(self.norm1(x))
        cls = x[:, 0] + self.ls1(cls)
        return cls + self.ls2(self.mlp(self.norm2(cls))), attn


class PatchEmbed(nn.Module):
    def __init__(self, patch_size, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)                 # (B, N, D)


class ViT(nn.Module):
    """Pre-norm vision transformer with a class token; parameters have timm's names.

    forward(images (B, 3, S, S)) -> logits (B, C); the normed class token (B, D) if num_classes = 0.
    layer_scale: for DINOv2.
    """

    def __init__(self, image_size=224, patch_size=16, dim=384, depth=12, num_heads=6,
                 num_classes=1000, layer_scale=False):
        super().__init__()
        self.image_size, self.patch_size = image_size, patch_size
        num_patches = (image_size // patch_size) ** 2
        self.patch_embed = PatchEmbed(patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + num_patches, dim))
        self.blocks = nn.ModuleList(Block(dim, num_heads, layer_scale) for _ in range(depth))
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
        return torch.cat([cls, x], 1) + self.pos_embed                      # (B, 1+N, D)

    def forward(self, images):
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])

    def class_token_and_attention(self, images):
        """(cls (B, D) after the final norm, its attention in the last block (B, H, 1+N)): what
        AttnDistill reads. The class token is forward()'s, at less cost: see Block.class_token."""
        x = self.embed(images)
        for block in self.blocks[:-1]:
            x = block(x)
        cls, attn = self.blocks[-1].class_token(x)
        return self.norm(cls), attn


# ------------------------------------------------------------------ the teacher

RELEASES = "https://dl.fbaipublicfiles.com/"
TEACHERS = {  # name: (size, patch size, file to download or None)
    "dino_s16": ("vit_s", 16, "dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth"),
    "dino_s8": ("vit_s", 8, "dino/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth"),
    "dino_b16": ("vit_b", 16, "dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth"),
    "dino_b8": ("vit_b", 8, "dino/dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth"),
    "dinov2_s14": ("vit_s", 14, "dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth"),
    "dinov2_b14": ("vit_b", 14, "dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth"),
    "dinov2_l14": ("vit_l", 14, "dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"),
    "mugs_s16": ("vit_s", 16, None), "mugs_b16": ("vit_b", 16, None),
    "mugs_l16": ("vit_l", 16, None),
    # any plain ViT: MoCo v3, MAE, iBOT, timm, this project's
    "vit_t16": ("vit_t", 16, None), "vit_s16": ("vit_s", 16, None), "vit_s8": ("vit_s", 8, None),
    "vit_b16": ("vit_b", 16, None), "vit_b8": ("vit_b", 8, None), "vit_l16": ("vit_l", 16, None)}

# What a family's files hold beside the ViT, by the start of the key; anything else is an error.
LEFT_OUT = {
    "dino": ("head.",),  # the projection head, in training checkpoints
    "dinov2": ("mask_token",),
    "mugs": ("head.", "relation_blocks.", "instance_head.", "local_group_head.", "group_head."),
    "vit": ("head.",  # classes, or the projection head of iBOT and MoCo v3
            "masked_embed",  # iBOT
            "mask_token", "decoder_")}  # MAE


def load_teacher(name, weights=None, image_size=224):
    """A frozen ViT without head in eval mode, for images of `image_size` pixels.

    name: one of TEACHERS, its weights read from the file `weights` or else downloaded; or the path
    of a student.pth of attndistill.py or vitkd.py. At another image size than the weights' the
    position embedding is resized. MoCo v3's ViT-S has 12 heads, which no shape tells: it is told
    by the names in its training checkpoint, so give that, not a file converted from it.
    Raises common.Abort: unknown name, weights missing, damaged or of another model, no download,
    an image size that the patch size does not divide.
    """
    if name in TEACHERS:
        if not (weights or TEACHERS[name][-1]):
            raise common.Abort(f"{name} cannot be downloaded: give its file with "
                               f"--teacher-weights FILE")
        source = weights or RELEASES + TEACHERS[name][-1]
        checkpoint = common.load_checkpoint(weights) if weights else download(source)
        state, is_moco = backbone(checkpoint, LEFT_OUT[name.split("_")[0]])
        arch = released_arch(name, state)
        if is_moco:  # its ViT-S has twelve heads
            arch["num_heads"] = max(12, arch["num_heads"])
    elif Path(name).is_file():
        source, checkpoint = name, common.load_export(name)
        if checkpoint["script"] not in ("attndistill", "vitkd"):
            raise common.Abort(f"{name} was written by {checkpoint['script']}.py, whose ViT is "
                               f"another one")
        state, _ = backbone(checkpoint, ("head.",))
        arch = {**checkpoint["arch"], "num_classes": 0}
    else:
        raise common.Abort(f"no teacher {name}: take {', '.join(TEACHERS)}, "
                           f"or the path of a student.pth")

    problems = common.mismatches(state, ViT, arch)
    if problems:
        fits = []
        for other in sorted(TEACHERS, key=lambda n: n.split("_")[0] != name.split("_")[0]):
            state, _ = backbone(checkpoint, LEFT_OUT[other.split("_")[0]])  # own family first
            fits += [] if common.mismatches(state, ViT, released_arch(other, state)) else [other]
        raise common.Abort(f"{source} does not hold a {name}: " + "; ".join(problems)
                           + (f"; it fits --teacher {fits[0]}" if fits else ""))
    patch_size = arch["patch_size"]
    grid = image_size // patch_size
    if image_size % patch_size:
        raise common.Abort(f"--image-size {image_size} is not a multiple of the teacher's patch "
                           f"size {patch_size}: take {max(1, grid) * patch_size} or "
                           f"{(max(1, grid) + 1) * patch_size}")
    state["pos_embed"] = resize_pos_embed(state["pos_embed"], grid)
    teacher = ViT(**{**arch, "image_size": image_size})
    teacher.load_state_dict(state)
    return teacher.requires_grad_(False).eval()


def backbone(checkpoint, left_out):
    """(the ViT's weights under their plain names, is it MoCo v3's?) out of whatever wraps them."""
    state = checkpoint if isinstance(checkpoint, dict) else {}
    wrappers = [w for w in ("teacher", "state_dict", "model") if isinstance(state.get(w), dict)]
    state = state[wrappers[0]] if wrappers else state
    state = {str(k).removeprefix("module."): v for k, v in state.items()}
    is_moco = any(k.startswith("base_encoder.") for k in state)
    if is_moco:
        left_out += ("momentum_encoder.", "predictor.")
    state = {k.removeprefix("base_encoder.").removeprefix("backbone."): v for k, v in state.items()}
    return {k: v for k, v in state.items() if not k.startswith(left_out)}, is_moco


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

    Where the weights lack a key, any value serves: mismatches() will report the key."""
    size, patch_size, _ = TEACHERS[name]
    dim, depth, num_heads = SIZES[size]
    shape = getattr(state.get("pos_embed"), "shape", ())
    rows = shape[1] if len(shape) == 3 and shape[1] > 1 else 197
    return {"image_size": math.isqrt(rows - 1) * patch_size, "patch_size": patch_size, "dim": dim,
            "depth": depth, "num_heads": num_heads, "num_classes": 0,
            "layer_scale": name.startswith("dinov2") or "blocks.0.ls1.gamma" in state}


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


class Objective(nn.Module):
    """The student and its projector: one module, so that DistributedDataParallel averages every
    gradient."""

    def __init__(self, student, project, args):
        super().__init__()
        self.student, self.project, self.args = student, project, args

    def forward(self, images, teacher_cls, teacher_attn):
        """Loss terms by name, as they are added up. images (B, 3, S, S); what the teacher's
        class_token_and_attention() gives for the same images."""
        cls, attn = self.student.class_token_and_attention(images)
        # L_c = mean over B * D_t of (P(z_s) - z_t)^2
        losses = {"alignment": F.mse_loss(self.project(cls).float(), teacher_cls.float())}
        if self.args.lambda_a:
            losses["guidance"] = self.args.lambda_a * attention_guidance_loss(
                attn, teacher_attn, self.args.temperature)
        return losses


def train(args, device):
    """Train args.student from args.teacher. Returns the last epoch's record."""
    started = time.perf_counter()
    common.check_flags(args)
    transform = common.train_transform(args.image_size, (args.crop_scale, 1.0))
    train_set, val_set, num_classes = common.rank_zero_first(
        lambda: common.load_data(args, transform))
    bank_set = copy.copy(train_set)  # the same images, as k-NN sees them
    bank_set.transform = common.val_transform(args.image_size)
    autocast, scaler = common.set_precision(args, device)

    teacher = common.rank_zero_first(lambda: load_teacher(
        args.teacher, args.teacher_weights, args.image_size)).to(device)
    args.teacher_checksum = common.checksum(teacher)
    dim, depth, num_heads = SIZES[args.student]
    arch = {"image_size": args.image_size, "patch_size": args.patch_size, "dim": dim,
            "depth": depth, "num_heads": num_heads, "num_classes": 0}
    torch.manual_seed(args.seed)
    student = ViT(**arch)
    project = projector(dim, teacher.cls_token.shape[-1])
    model = Objective(student, project, args).to(device)
    optimizer = torch.optim.AdamW(common.parameter_groups(model, args.weight_decay), lr=args.lr,
                                  betas=(0.9, 0.95), fused=True)

    checkpoint = common.open_run(args)
    first_epoch, best = 0, -1.0
    if checkpoint:
        first_epoch, best = checkpoint["epoch"], checkpoint["best"]
        student.load_state_dict(checkpoint["model"])
        project.load_state_dict(checkpoint["projector"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        del checkpoint  # its memory

    def knn(vit):  # {"knn10": top-1 in percent, "knn20": ..}
        top1 = eval_knn.evaluate(vit, bank_set, val_set, args, device, autocast, num_classes)
        return {f"knn{k}": top1[k][0] for k in top1}

    loader = common.train_loader(train_set, args)
    if not first_epoch and not args.dry_run:
        common.say(f"teacher {args.teacher}, k-NN top-1: " + ", ".join(
            f"{value:.2f} % ({name})" for name, value in knn(teacher).items()))
    teach = teacher.class_token_and_attention
    if args.compile:  # in place: the names in state_dict() stay; evaluation runs eagerly
        model.compile(dynamic=False)
        teach = torch.compile(teach, dynamic=False)
    ddp = model
    if common.world_size() > 1:
        ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    prepared, began, record = time.perf_counter() - started, time.perf_counter(), None

    for epoch in range(first_epoch, args.epochs):
        torch.manual_seed(common.mix_seed(args.seed, epoch, common.rank()))
        books = common.Epoch(loader, epoch, args, device)
        model.train()
        for step, (images, _, parts) in enumerate(books.batches()):  # _: the labels, never read
            lr = common.learning_rate(epoch * len(loader) + step, args, len(loader))
            for group in optimizer.param_groups:
                group["lr"] = lr
            for part, weight, last in parts:  # micro-batches; weight: share of the step's mean
                with contextlib.nullcontext() if last or ddp is model else ddp.no_sync():
                    with autocast():
                        with torch.no_grad():
                            guide = teach(images[part])
                        losses = ddp(images[part], *guide)
                    scaler.scale(weight * sum(losses.values())).backward()
                books.add(losses, weight)
            books.optimizer_step(optimizer, scaler)  # clips; skips a step that is not finite
        if args.dry_run:
            return common.report_dry_run(args, [(books, args.epochs)], student, teacher,
                                         [bank_set, val_set], autocast, prepared)

        record = {**books.record(), "lr": lr}
        top1 = None
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
            record.update(knn(student))
            top1 = record["knn20"]
        record["seconds"] = time.perf_counter() - books.started
        per_epoch = (time.perf_counter() - began) / (epoch + 1 - first_epoch)
        common.log_epoch(args, record, per_epoch * (args.epochs - epoch - 1))
        if common.rank() == 0:
            export = {"model": student.state_dict(), "arch": arch, "script": "attndistill",
                      "top1": top1}  # of k-NN, k = 20
            common.save_checkpoint(f"{args.out}/student.pth", **export)
            if top1 is not None and top1 > best:
                best = top1
                common.save_checkpoint(f"{args.out}/best.pth", **export)
            common.save_checkpoint(
                f"{args.out}/last.pth", **export, projector=project.state_dict(),
                optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), epoch=epoch + 1,
                best=best, args=common.comparable(args))
    return record


# ------------------------------------------------------------------ pictures


@torch.no_grad()
def visualize(args):
    """One PNG, a row an image: the image, then the class token's attention over it in the last
    block, teacher's mean of heads and each head, student's mean of heads and each head."""
    if not args.weights:
        raise common.Abort("--visualize needs the student: --weights out/.../student.pth")
    size = args.image_size or common.load_export(args.weights)["arch"].get("image_size", 224)
    student = load_teacher(args.weights, None, size)  # first: it checks the size that it names
    vits = {"teacher": load_teacher(args.teacher, args.teacher_weights, size), "student": student}
    transform, tile = common.val_transform(size), max(size, 160)
    tiles, captions = [], []
    for path in args.visualize:
        try:
            image = transform(common.open_rgb(path))[None]                  # (1, 3, S, S) uint8
        except Exception as error:  # noqa: BLE001 - decoders raise whatever they like
            raise common.Abort(f"cannot read the image {path}: {error}")
        pixels = enlarge(image / 255, tile)
        tiles.append(pixels)
        captions = ["image"]
        for name, vit in vits.items():
            x = common.normalize(image, "cpu")
            attn = vit.class_token_and_attention(x)[1][0, :, 1:]            # (H, N)
            maps = torch.cat([attn.mean(0, keepdim=True), attn])            # (1+H, N)
            maps = maps / maps.amax(1, keepdim=True)
            g = math.isqrt(maps.shape[1])
            maps = enlarge(maps.view(-1, 1, g, g), tile)                    # (1+H, 1, S, S)
            heat = torch.cat([3 * maps, 3 * maps - 1, 3 * maps - 2], 1)     # black, red, yellow
            tiles.append(0.3 * pixels.mean(1, keepdim=True) + 0.7 * heat.clamp(0, 1))
            captions += [f"{name} mean"] + [f"head {h + 1}" for h in range(len(attn))]
    blank, box = torch.zeros(3, 16, tile, dtype=torch.uint8), torch.tensor([[0, 0, tile, 16]])
    header = [draw_bounding_boxes(blank, box, [caption], "white", width=0) for caption in captions]
    grids = [make_grid(part, nrow=len(captions), padding=2) for part in (
        torch.stack(header) / 255, torch.cat(tiles))]
    out = Path(args.out or Path(args.weights).parent) / "attention.png"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_image(torch.cat(grids, 1), out)
    except OSError as error:
        raise common.Abort(f"cannot write {out}: {error}")
    common.say(f"{out}: {', '.join(captions)}")


def enlarge(images, size):
    return F.interpolate(images, (size, size), mode="bilinear").clamp(0, 1)


# ------------------------------------------------------------------ command line


def parse_args():
    parser = common.Parser(__doc__)
    parser.add_flags("data", common.data_flags(
        int, " (default: 224; to --visualize, the student's)"))
    parser.add_flags("models", [
        ("--student", "vit_s", f"the ViT to train: {', '.join(SIZES)}"),
        ("--teacher", "dino_s8", "see above"),
        ("--teacher-weights", str, "file of the named teacher's weights (default: download them)"),
        ("--patch-size", 16, "pixels a side of the student's patches; the teacher's may differ",
         "[1, inf)")],
        textwrap.fill(f"Teachers: {', '.join(TEACHERS)}; the path of a student.pth. Without "
                      "--teacher-weights those of dino and dinov2 are downloaded.", 98))
    parser.add_flags("loss", [
        ("--lambda-a", 0.1, "weight of attention guidance, 0: projector alignment only",
         "[0, inf)"),
        ("--temperature", 10.0, "T, where the heads of teacher or student are merged", "(0, inf)")])
    parser.add_flags("recipe", [
        *common.recipe_flags(batch_size=4096, epochs=800, min_lr=0.0, weight_decay=0.05,
                             clip_grad=0.0),
        ("--crop-scale", 0.2, "smallest part of an image's area that a random crop keeps",
         "(0, 1]")],
        "Peak learning rate: 1.5e-4 for batches of 256, in proportion for others.\n"
        "Warm-up: 40 epochs, or a tenth of --epochs where that is less.")
    parser.add_flags("run", common.run_flags(eval_every=20))
    group = parser.add_flags("pictures", [
        ("--weights", str, "the student.pth to draw beside the teacher")],
        "--visualize writes attention.png to --out, or else beside --weights.")
    group.add_argument("--visualize", nargs="+", metavar="IMAGE", help="draw, don't train: what "
                       "the class tokens of teacher and student look at, over these images")
    args = parser.parse_args()

    if args.student not in SIZES:
        parser.error(f"no student {args.student}: take {', '.join(SIZES)}")
    if args.teacher_weights and args.teacher not in TEACHERS:
        parser.error(f"--teacher-weights goes with a teacher's name, not with {args.teacher}")
    if args.weights and not args.visualize:
        parser.error("--weights goes with --visualize")
    if args.visualize:
        return args
    args.image_size = args.image_size or 224
    if args.teacher in TEACHERS:  # a size that both patches divide
        patch_sizes = args.patch_size, TEACHERS[args.teacher][1]
        step = math.lcm(*patch_sizes)
        lower = max(step, args.image_size // step * step)
        if args.image_size % step:
            parser.error(f"--image-size {args.image_size} is not a multiple of the patch sizes, "
                         f"student's {patch_sizes[0]} and teacher's {patch_sizes[1]}: take "
                         f"{lower} or {lower + step}")
    if args.lr is None:
        args.lr = 1.5e-4 * args.batch_size / 256
    if args.warmup_epochs is None:
        args.warmup_epochs = min(40, args.epochs / 10)
    if args.out is None:
        teacher = Path(args.teacher)
        args.out = f"out/attndistill-{args.student}-{teacher.parent.name or teacher.name}"
    return args


def train_with_labels(args, device):
    """The demo's teacher: a wider ViT with a head, by cross-entropy, to args.out/student.pth.
    Returns its k-NN top-1, k = 20."""
    common.check_flags(args)
    train_set, val_set, num_classes = common.load_data(args, None)
    autocast, scaler = common.set_precision(args, device)
    arch = {"image_size": args.image_size, "patch_size": args.patch_size, "dim": 144, "depth": 6,
            "num_heads": 3, "num_classes": num_classes}
    torch.manual_seed(args.seed)
    model = ViT(**arch).to(device)
    optimizer = torch.optim.AdamW(common.parameter_groups(model, args.weight_decay), lr=args.lr)
    common.open_run(args)
    loader = common.train_loader(train_set, args)
    for epoch in range(args.epochs):
        books = common.Epoch(loader, epoch, args, device)
        for step, (images, target, parts) in enumerate(books.batches()):
            lr = common.learning_rate(epoch * len(loader) + step, args, len(loader))
            for group in optimizer.param_groups:
                group["lr"] = lr
            with autocast():
                losses = {"ce": F.cross_entropy(model(images), target)}
            scaler.scale(losses["ce"]).backward()
            books.add(losses, 1.0)
            books.optimizer_step(optimizer, scaler)
        common.log_epoch(args, {**books.record(), "lr": lr}, 0)
    common.save_checkpoint(f"{args.out}/student.pth", model=model.state_dict(), arch=arch,
                           script="attndistill", top1=None)
    model.head = nn.Identity()
    return eval_knn.evaluate(model, train_set, val_set, args, device, autocast, num_classes)[20][0]


def demo(args, device):
    """Teacher, student by projector alignment, student by PA + AG, on shapes: k-NN of all three."""
    if common.world_size() > 1:
        raise common.Abort("--demo is for a single process")
    args.data, args.image_size, args.patch_size, args.batch_size = "shapes", 32, 8, 50
    args.student, args.lr, args.eval_every = "micro", 1e-3, 10**9
    args.dry_run, args.resume = False, None
    lambda_a, table = args.lambda_a, []
    with tempfile.TemporaryDirectory() as folder:
        for name, weight, epochs in (("teacher", None, 30), ("PA", 0.0, 10),
                                     ("PA + AG", lambda_a, 10)):
            run = copy.copy(args)
            run.out, run.teacher = f"{folder}/{name}", f"{folder}/teacher/student.pth"
            run.epochs, run.warmup_epochs, run.lambda_a = epochs, epochs / 10, weight
            common.say(f"--- {name}, {epochs} epochs")
            started = time.perf_counter()
            if name == "teacher":
                common.say("trained with labels: a minute of CPU is too little for "
                           "self-supervision. AttnDistill itself reads no label.")
                knn20 = train_with_labels(run, device)
            else:
                name, knn20 = f"student, {name}", train(run, device)["knn20"]
            table.append(f"{name:18s} k-NN top-1 {knn20:5.1f} %  "
                         f"{time.perf_counter() - started:4.0f} s")
    common.say("\n" + "\n".join(table))


def main():
    args = parse_args()
    if args.visualize:
        return visualize(args)
    device = common.init_processes()
    if args.demo:
        return demo(args, device)
    train(args, device)


if __name__ == "__main__":
    common.run(main)
