"""AttnDistill: distil a self-supervised vision transformer into a smaller one, without labels.

Wang et al., "Attention Distillation: self-supervised vision transformer students need more
guidance", arXiv 2210.00944 (BMVC 2022). Formulas, constants and recipe are the authors' (paper,
released code). Ours: the last block and the projector run for the class token alone, and attention
to registers is left out. k-NN reads class tokens after the final norm; theirs is not trained.

The teacher's last class token holds what it knows of an image, and that token's attention shows
which patches the knowledge came from. Therefore
  - projector alignment: an MLP on the student's class token must predict the teacher's;
  - attention guidance: the student's class token must attend to the patches in the last block as
    the teacher's does. The two may differ in patch grid and number of heads.

ViT-S/16 <- DINO's ViT-S/8 (a pair of the paper), and a demo for a laptop:
    torchrun --nproc_per_node 8 attndistill.py --teacher dino_s8 --student vit_s
    python attndistill.py --demo
Measured: in the demo, guidance adds 5.9 points of k-NN top-1 (37.3 -> 43.3 %, deviation 1.5, seeds
0 to 4; one AMD EPYC core, bf16, 2026-11-25; tests/evidence/demo_attndistill.log).
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
from torchvision import datasets
from torchvision.utils import save_image
from tqdm import tqdm

import common

# ------------------------------------------------------------------ the loss


def attention_guidance_loss(student_attn, teacher_attn, temperature=10.0):
    """L_a, the KL divergence of class-token attentions (arXiv 2210.00944, section 3), a scalar.

    student_attn (B, H_s, 1+N_s), teacher_attn (B, H_t, 1+N_t): probabilities over the class token
    itself, which comes first, and the patches, which must be a square grid.
    """
    a_s, a_t = student_attn.float(), teacher_attn.float()
    if a_t.shape[-1] != a_s.shape[-1]:
        a_t = resize_attention(a_t, math.isqrt(a_s.shape[-1] - 1))          # (B, H_t, 1+N_s)
    if a_t.shape[1] != a_s.shape[1]:
        # All heads become one. The floor keeps log(0) finite; a larger one would change gradients
        a_s, a_t = (a.clamp(min=1e-30).log().sum(1, keepdim=True) for a in (a_s, a_t))
        a_s, a_t = ((a / temperature).softmax(-1) for a in (a_s, a_t))      # (B, 1, 1+N)

    # L_a = 1/B * sum over heads and tokens of KL(a_t || a_s), both within the authors' limits
    a_s, a_t = (F.normalize(a.clamp(1e-5, 0.996), p=1, dim=-1) for a in (a_s, a_t))
    return (a_t * (a_t.log() - a_s.log())).sum() / len(a_s)


def resize_attention(attn, grid):
    """Resize (B, H, 1+N) to (B, H, 1 + grid^2): the class token's own share stays as it is."""
    g = math.isqrt(attn.shape[-1] - 1)
    own, patches = attn[..., :1], attn[..., 1:].unflatten(-1, (g, g))       # (B, H, g, g)
    patches = F.interpolate(patches, (grid, grid), mode="bicubic").flatten(2)
    patches = patches.clamp(min=1e-8)  # bicubic weights can be negative, and so can be the result
    return torch.cat([own, (1 - own) * patches / patches.sum(-1, keepdim=True)], -1)


def projector(student_dim, teacher_dim):
    """Return P: (B, D_s) -> (B, D_t). The student's final norm is its first, released LayerNorm."""
    project = nn.Sequential(
        nn.Linear(student_dim, 2 * student_dim), nn.GELU(), nn.Linear(2 * student_dim, student_dim),
        nn.GELU(), nn.Linear(student_dim, 2 * student_dim), nn.GELU(),
        nn.Linear(2 * student_dim, teacher_dim), nn.LayerNorm(teacher_dim, eps=1e-6))
    for linear in project[:7:2]:
        nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
    return project


# ------------------------------------------------------------------ the ViT

SIZES = {"micro": {"dim": 96, "depth": 6, "num_heads": 3},
         "vit_t": {"dim": 192, "depth": 12, "num_heads": 3},
         "vit_s": {"dim": 384, "depth": 12, "num_heads": 6},
         "vit_b": {"dim": 768, "depth": 12, "num_heads": 12},
         "vit_l": {"dim": 1024, "depth": 24, "num_heads": 16}}


class RotaryEmbedding(nn.Module):
    """DINOv3's position embedding: rotates queries and keys of patches by their row and column.

    forward(x (B, H, 1+R+N, D/H)) -> the same shape; class token and R registers are not rotated.
    """

    def __init__(self, head_dim, num_prefix):
        super().__init__()
        self.num_prefix = num_prefix
        self.register_buffer("periods", torch.ones(head_dim // 4))  # the file has the values

    def forward(self, x):
        prefix, x = x.tensor_split([self.num_prefix], dim=2)                # x: (B, H, N, D/H)
        g = math.isqrt(x.shape[2])
        centres = 2 * (torch.arange(g).to(self.periods) + 0.5) / g - 1      # (g,), in [-1, 1]
        angles = 2 * math.pi * torch.cartesian_prod(centres, centres)[..., None] / self.periods
        angles = angles.flatten(1).repeat(1, 2)       # (N, 2, D/H/4) for row, column -> (N, D/H)
        a, b = x.chunk(2, dim=-1)
        rotated = x * angles.cos() + torch.cat([-b, a], -1) * angles.sin()  # float32
        return torch.cat([prefix, rotated.to(x.dtype)], 2)


class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, rope):
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                # (B, H, N, D/H) each
        x = F.scaled_dot_product_attention(rope(q), rope(k), v)             # (B, H, N, D/H)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))

    def class_token(self, x, rope):
        """Return row 0 of forward(x, rope), (B, D), and its attention probabilities, (B, H, N)."""
        B, N, D = x.shape
        w, b = self.qkv.weight, self.qkv.bias
        q = F.linear(x[:, 0], w[:D], b[:D]).view(B, self.num_heads, 1, -1)  # (B, H, 1, D/H)
        kv = F.linear(x, w[D:], b[D:]).view(B, N, 2, self.num_heads, -1)
        k, v = kv.permute(2, 0, 3, 1, 4)                                    # (B, H, N, D/H) each
        # The loss compares attn. Under autocast a matrix product runs in bf16, this sum in float32
        attn = ((q.float() * rope(k)).sum(-1) / math.sqrt(q.shape[-1])).softmax(-1)  # (B, H, N)
        return self.proj((attn[:, :, None].to(v.dtype) @ v).view(B, D)), attn


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

    def class_token(self, x, rope):
        """Return row 0 of forward(x, rope), (B, D), and its attention, (B, H, N)."""
        # A sixth of the multiplications: of the other tokens only keys and values are computed
        cls, attn = self.attn.class_token(self.norm1(x), rope)
        cls = x[:, 0] + cls
        return cls + self.mlp(self.norm2(cls)), attn


class ViT(nn.Module):
    """Pre-norm vision transformer with a class token; parameters have timm's names.

    forward(images (B, 3, S, S)) -> logits (B, C); the normed class token (B, D) if num_classes = 0.
    num_registers (tokens between class token and patches), rope and eps are for teachers.
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
        rotary = RotaryEmbedding(dim // num_heads, 1 + num_registers) if rope else None
        self.rope_embed = rotary or nn.Identity()
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
        cls, attn = self.blocks[-1].class_token(x, self.rope_embed)
        if self.num_registers:  # the student has none: leave them out, let rows sum to 1 again
            attn = torch.cat([attn[..., :1], attn[..., 1 + self.num_registers:]], -1)
            attn = attn / attn.sum(-1, keepdim=True)                        # (B, H, 1+N)
        return self.norm(cls), attn

    def forward(self, images):
        return self.head(self.class_token_and_attention(images)[0])


def load_weights(vit, state, **resize):
    """Load a state dict into a ViT, strictly; resize the position embedding to its image size."""
    position = state.get("pos_embed", vit.pos_embed)                        # (1, 1+N, D)
    if math.isqrt(position.shape[1]) ** 2 == position.shape[1]:
        position = F.pad(position, (0, 0, 1, 0))  # DeiT III has none for the class token: zeros
    old, grid = (math.isqrt(p.shape[1]) for p in (position, vit.pos_embed))
    if position.shape[1] == 1 + old * old:  # else it is another model's: torch names the keys
        patches = position[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)  # (1, D, old, old)
        patches = F.interpolate(patches, mode="bicubic", **(resize or {"size": grid}))
        position = torch.cat([position[:, :1], patches.flatten(2).transpose(1, 2)], 1)
    vit.load_state_dict({**state, "pos_embed": position} if "pos_embed" in state else state)


# ------------------------------------------------------------------ the teacher

TEACHERS = {  # name: (size, patch size, what else is special, file to download or None)
    **{f"dino_{s}{p}": (f"vit_{s}", p, {}, f"dino/dino_{x}{p}_pretrain/dino_{x}{p}_pretrain.pth")
       for s, x in (("s", "deitsmall"), ("b", "vitbase")) for p in (16, 8)},
    **{f"dinov2_{s}14{reg}": (
        f"vit_{s}", 14, {"num_registers": 4} if reg else {},
        f"dinov2/dinov2_vit{s}14/dinov2_vit{s}14{reg and '_reg4'}_pretrain.pth")
       for reg in ("", "_reg") for s in "sbl"},
    **{f"dinov3_{s}16": (f"vit_{s}", 16, {"num_registers": 4, "rope": True, "eps": 1e-5}, None)
       for s in "sbl"},
    **{f"mugs_{s}16": (f"vit_{s}", 16, {}, None) for s in "sbl"},
    "moco_s16": ("vit_s", 16, {"num_heads": 12}, None), "moco_b16": ("vit_b", 16, {}, None),
    **{f"vit_{s}{p}": (f"vit_{s}", p, {}, None) for s in "tsbl" for p in (16, 8)}}  # MAE, iBOT, ..

# What released files hold beside the ViT, by the start of the key. All else is an error.
LEFT_OUT = (
    "head.", "mask_token", "masked_embed", "decoder_",  # DINO and others, DINOv2, iBOT, MAE
    "momentum_encoder.", "predictor.",  # MoCo v3
    "relation_blocks.", "instance_head.", "local_group_head.", "group_head.")  # Mugs


def load_teacher(name, weights=None, image_size=224):
    """Return a frozen ViT without head in eval mode, for images of `image_size` pixels.

    name: one of TEACHERS, with its weights in the file `weights` or else downloaded; or the path of
    a student.pth of attndistill.py or vitkd.py. Raises ValueError (unknown name, unreadable
    weights, image size) or RuntimeError (another model: torch names the keys)."""
    if name in TEACHERS:
        size, patch_size, special, file = TEACHERS[name]
        if not (weights or file):
            raise ValueError(f"{name} cannot be downloaded: give its weights as a file")
        saved = common.load_checkpoint(weights or f"https://dl.fbaipublicfiles.com/{file}")
        arch = {**SIZES[size], "patch_size": patch_size, **special}
    elif Path(name).is_file() and not weights:
        saved = common.load_checkpoint(name)
        if saved.get("script") not in ("attndistill", "vitkd"):
            raise ValueError(f"{name} is no student.pth. Did you mean --teacher-weights?")
        arch = saved["arch"]
    else:
        raise ValueError(f"no teacher {name}: choose {', '.join(TEACHERS)}, or a student.pth")
    if image_size % arch["patch_size"]:
        raise ValueError(f"patch size {arch['patch_size']} of {name} does not divide {image_size}")

    # Training checkpoints hold several networks: take DINO's teacher, MoCo v3's base encoder
    for wrapper in ("teacher", "state_dict", "model"):
        saved = saved.get(wrapper, saved)
    prefix = "base_encoder." if name.startswith("moco") else "backbone."
    state = {key.removeprefix("module.").removeprefix(prefix): x for key, x in saved.items()}
    state = {key: x for key, x in state.items() if not key.startswith(LEFT_OUT)}
    # DINOv2 and DINOv3 multiply outputs by LayerScale's ls1.gamma: multiply weights by it
    state = {key.replace("gamma_", "ls").removesuffix(".gamma"): x for key, x in state.items()}
    for key in [key for key in state if key.endswith((".ls1", ".ls2"))]:
        gamma, layer = state.pop(key), key.replace("ls1", "attn.proj").replace("ls2", "mlp.fc2")
        state[f"{layer}.weight"] = gamma[:, None] * state[f"{layer}.weight"]
        state[f"{layer}.bias"] = gamma * state[f"{layer}.bias"]
    if arch.get("rope"):  # DINOv3
        state = {key.replace("storage_", "register_"): value for key, value in state.items()}
        state["pos_embed"] = torch.zeros(1, 2, arch["dim"])  # rope replaces it. Will be resized
        for key in [key for key in state if key.endswith("bias_mask")]:  # 0 for keys, else 1
            state[key.removesuffix("_mask")] = state[key.removesuffix("_mask")] * state.pop(key)

    resize = {}  # DINOv2's authors resize the position embedding, of 37 x 37, in ways of their own
    if name.endswith("_reg"):
        resize = {"size": image_size // 14, "antialias": True}
    elif name.startswith("dinov2") and image_size != 518:
        resize = {"scale_factor": (image_size // 14 + 0.1) / 37}  # rounded down: the same grid
    teacher = ViT(**{**arch, "image_size": image_size, "num_classes": 0})
    load_weights(teacher, state, **resize)
    return teacher.requires_grad_(False).eval()


# ------------------------------------------------------------------ training


class AnyFolder(datasets.ImageFolder):
    """Every image below a folder, at any depth. All have the label 0."""

    def find_classes(self, directory):
        return [""], {"": 0}  # one class, whose folder is the whole folder


def load_data(args, transform):
    """Return (training set, validation set, number of classes); for photos (.., None, None)."""
    if args.val or not Path(args.data).is_dir() or (Path(args.data) / "train").exists():
        return common.load_data(args, transform)
    base = AnyFolder(args.data, allow_empty=True)
    common.say(f"{len(base)} images below {args.data}, which has no train/: no k-NN")
    kept = common.class_balanced_subset(base.targets, args.data_fraction) if len(base) else []
    return common.Images(base, kept, transform, args.seed), None, None


class Distillation(nn.Module):
    """All that is trained, in one module for one DDP. Returns {name: loss term}."""

    def __init__(self, student, project, lambda_a):
        super().__init__()
        self.student, self.project, self.lambda_a = student, project, lambda_a

    def forward(self, images, teacher_features):
        teacher_cls, teacher_attn = teacher_features
        cls, attn = self.student.class_token_and_attention(images)
        # L_c = mean over B and D_t of (P(z_s) - z_t)^2
        losses = {"alignment": F.mse_loss(self.project(cls).float(), teacher_cls.float())}
        if self.lambda_a:
            losses["guidance"] = self.lambda_a * attention_guidance_loss(attn, teacher_attn)
        return losses


def train(args, device):
    """Train args.student with args.teacher. Return the last epoch's record."""
    autocast, scaler = common.precision(args, device)

    # ---- data: each process loads its part of a batch ----
    transform = common.train_transform(args.image_size, (args.crop_scale, 1.0))
    train_set, val_set, num_classes = load_data(args, transform)
    loader = common.make_loader(train_set, args, train=True)

    def knn_top1(vit):  # in percent, weighted k-NN on the ViT's class tokens, k = 20
        import eval_knn  # only here: training without k-NN needs common.py alone
        bank = common.Images(train_set.base, train_set.indices, val_set.transform)
        return eval_knn.evaluate(vit, bank, val_set, num_classes, args, device, autocast)[20][0]

    # ---- models ----
    torch.manual_seed(args.seed)
    arch = {**SIZES[args.student], "image_size": args.image_size, "patch_size": args.patch_size,
            "num_classes": 0}
    student = ViT(**arch)
    try:
        if args.init:
            state = common.load_checkpoint(args.init).get("model", {})
            load_weights(student, {k: v for k, v in state.items() if not k.startswith("head.")})
        teacher = load_teacher(args.teacher, args.teacher_weights, args.image_size).to(device)
    except (AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        common.fail(f"--init or --teacher: {error}")
    project = projector(arch["dim"], teacher.cls_token.shape[-1])
    model = Distillation(student, project, args.lambda_a).to(device)

    # ---- optimiser ----
    groups = common.parameter_groups(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)

    # ---- resume ----
    resumed = {"model": model, "optimizer": optimizer, "scaler": scaler}
    checkpoint, log = common.open_run(args), []  # log: one record an epoch
    if checkpoint:
        log = checkpoint["log"]
        for name, part in resumed.items():
            part.load_state_dict(checkpoint[name])

    teach = teacher.class_token_and_attention
    if args.compile:  # in place, so that the names in state_dict() stay; k-NN runs uncompiled
        model.compile(dynamic=False)
        teach = torch.compile(teach, dynamic=False)
    ddp = DDP(model, gradient_as_bucket_view=True) if common.world_size() > 1 else model
    skipped = []  # for each step: was it skipped?

    for epoch in range(len(log), args.epochs):
        # Seed: order and crops depend on the epoch's number, also in a resumed run
        loader.sampler.set_epoch(epoch)
        train_set.epoch.fill_(epoch)  # a tensor that the workers share
        model.train()
        started, totals = time.time(), defaultdict(float)

        bar = tqdm(loader, f"epoch {epoch + 1}", leave=False, disable=common.rank() > 0 or None)
        for step, (images, _) in enumerate(bar):  # _: the labels, which are never read
            # Learning rate
            lr = common.learning_rate(epoch + (step + 1) / len(loader), args)
            for group in optimizer.param_groups:
                group["lr"] = lr

            # Forward and backward, in equal chunks to save memory
            images = images.to(device, non_blocking=True)
            for i, x in enumerate(images.chunk(args.accum)):
                # DDP averages gradients over processes once a step: in the last backward pass
                ddp.require_backward_grad_sync = i == args.accum - 1  # one process: no effect
                with autocast():
                    with torch.no_grad():
                        teacher_features = teach(x)
                    losses = ddp(x, teacher_features)
                scaler.scale(sum(losses.values()) / args.accum).backward()
                for name, loss in losses.items():
                    totals[name] += loss.detach().nan_to_num(0, 0, 0) / args.accum  # NaN adds 0

            # Finite check and step: gradients are averaged, so all processes skip or none does
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad or math.inf)
            skipped.append(not norm.isfinite())
            if not skipped[-1]:
                scaler.step(optimizer)
            elif sum(skipped[-20:]) == 20:
                common.fail("20 steps in a row had no finite gradients: try a lower --lr")
            scaler.update()
            optimizer.zero_grad()

        # Evaluation and log
        record = {"epoch": epoch + 1, **common.mean_losses(totals, len(loader), device), "lr": lr,
                  "skipped_steps": sum(skipped[-len(loader):]),
                  "images_per_second": len(loader) * args.batch_size / (time.time() - started)}
        if val_set and ((epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs):
            record["knn20"] = knn_top1(student)
        if val_set and epoch + 1 == args.epochs:
            record["teacher_knn20"] = knn_top1(teacher)
        log.append({**record, "seconds": time.time() - started})
        common.log_epoch(args, log)

        # Checkpoints: the student as a plain ViT, and all that --resume needs
        if common.rank() == 0:
            common.save_checkpoint(f"{args.out}/student.pth", model=student.state_dict(),
                                   arch=arch, script="attndistill")
            states = {name: part.state_dict() for name, part in resumed.items()}
            common.save_checkpoint(f"{args.out}/last.pth", **states, log=log, args=vars(args))
    return log[-1]


# ------------------------------------------------------------------ command line


@torch.no_grad()
def visualize(args, device):
    """Draw attention.png in args.out, one row an image: the image, then the class token's attention
    in the last block, for the teacher and the student: the mean of heads, then each head."""
    size, tiles = args.image_size, []
    try:
        vits = [load_teacher(args.teacher, args.teacher_weights, size).to(device),
                load_teacher(f"{args.out}/student.pth", None, size).to(device)]
        for path in args.visualize:
            image = common.val_transform(size)(datasets.folder.default_loader(path)).to(device)
            tiles.append(image)                                             # (3, S, S)
            for vit in vits:
                attn = vit.class_token_and_attention(image[None])[1][0, :, 1:]  # (H, N)
                g = math.isqrt(attn.shape[1])
                maps = torch.cat([attn.mean(0, keepdim=True), attn]).view(-1, 1, g, g)
                tiles += F.interpolate(maps, (size, size)).expand(-1, 3, -1, -1)
        save_image(tiles, f"{args.out}/attention.png", nrow=len(tiles) // len(args.visualize),
                   normalize=True, scale_each=True)
    except (AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        common.fail(f"--visualize: {error}")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=29, width=100))
    parser.error = common.fail  # one line instead of the usage

    group = parser.add_argument_group
    flag = group("data", "A folder with train/CLASS/* and val/CLASS/*, or any photos.").add_argument
    flag("--data", default="data/imagenet", help="folder, cifar10, cifar100, shapes (%(default)s)")
    flag("--val", help="another folder of CLASS/* with validation images")
    flag("--data-fraction", type=float, default=1.0, help="part of each class to use (%(default)s)")
    flag("--image-size", type=int, default=224, help="side length in pixels (%(default)s)")
    flag("--workers", type=int, default=common.WORKERS, help="data workers per GPU (%(default)s)")

    flag = group("models", f"Teachers: {', '.join(TEACHERS)}, a student.pth.").add_argument
    flag("--student", choices=SIZES, default="vit_s", help="the ViT to train (%(default)s)")
    flag("--init", metavar="FILE", help="student.pth to start from, its head is left out")
    flag("--teacher", default="dino_s8", help="a name or a path, see above (%(default)s)")
    flag("--teacher-weights", metavar="FILE", help="dinov3_*, mugs_*, moco_*, vit_* need it")
    flag("--patch-size", type=int, default=16, help="of the student, in pixels (%(default)s)")

    flag = group("recipe").add_argument
    flag("--lambda-a", type=float, default=0.1, help="weight of guidance, 0: off (%(default)s)")
    flag("--batch-size", type=int, default=4096, help="global batch size (%(default)s)")
    flag("--accum", type=int, default=1, help="gradient accumulation steps (%(default)s)")
    flag("--epochs", type=int, default=800, help="passes over the training images (%(default)s)")
    flag("--lr", type=float, help="peak learning rate (2.4e-3 * sqrt(batch size / 4096))")
    flag("--min-lr", type=float, default=0.0, help="learning rate at the end (%(default)s)")
    flag("--warmup-epochs", type=float, default=40, help="capped at epochs / 10 (%(default)s)")
    flag("--weight-decay", type=float, default=0.05, help="AdamW's (%(default)s)")
    flag("--clip-grad", type=float, default=0.0, help="largest gradient norm, 0: off (%(default)s)")
    flag("--crop-scale", type=float, default=0.2, help="smallest share of the area (%(default)s)")
    flag("--seed", type=int, default=0, help="weights, order, augmentation (%(default)s)")

    flag = group("run").add_argument
    flag("--amp", choices=("bf16", "fp16", "off"), help="precision (the fastest the device has)")
    flag("--compile", action="store_true", help="torch.compile student and teacher")
    flag("--out", default="out/attndistill", help="folder for the results (%(default)s)")
    flag("--resume", action="store_true", help="continue the run in --out, if there is one")
    flag("--eval-every", type=int, default=20, help="epochs between k-NN evaluations (%(default)s)")
    flag("--demo", action="store_true", help="three small runs; reads only --workers and --seed")
    flag("--visualize", nargs="+", metavar="IMAGE", help="draw attention maps: --out/attention.png")
    args = parser.parse_args(argv)

    common.check_args(args, {})
    args.lr = args.lr or 2.4e-3 * math.sqrt(args.batch_size / 4096)
    return args


def train_with_labels(path, args, device):
    """Train the demo's teacher by cross-entropy on the class token and save it."""
    autocast, scaler = common.precision(args, device)
    train_set, _, _ = load_data(args, common.train_transform(32, (args.crop_scale, 1.0)))
    loader = common.make_loader(train_set, args, train=True)
    torch.manual_seed(args.seed)
    arch = {**SIZES["micro"], "patch_size": args.patch_size}
    vit = ViT(**arch, image_size=32, num_classes=10).to(device)
    optimizer = torch.optim.AdamW(vit.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, 30 * len(loader))
    for epoch in range(30):
        loader.sampler.set_epoch(epoch)
        train_set.epoch.fill_(epoch)
        for images, target in loader:
            with autocast():
                loss = F.cross_entropy(vit(images.to(device)), target.to(device))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            schedule.step()
    common.save_checkpoint(path, model=vit.state_dict(), arch=arch, script="attndistill")


def demo(args, device):
    """Train a teacher with labels (without would take hours), a student without guidance and one
    with it; print their k-NN on shapes."""
    if common.world_size() > 1:
        common.fail("--demo runs in one process, without torchrun")
    flags = ("--data shapes --image-size 32 --patch-size 8 --student micro --batch-size 50 "
             "--lr 1e-3 --crop-scale 0.5 --epochs 8 --eval-every 1000 "
             f"--workers {args.workers} --seed {args.seed}")
    table = []
    with tempfile.TemporaryDirectory() as out:
        train_with_labels(f"{out}/teacher.pth", parse_args(flags.split()), device)
        for name, lambda_a in (("alignment", 0), ("alignment + guidance", 0.1)):
            more = f"--teacher {out}/teacher.pth --lambda-a {lambda_a} --out {out}/{lambda_a}"
            record = train(parse_args(f"{flags} {more}".split()), device)
            table.append(f"student, {name:21s} k-NN top-1 {record['knn20']:5.1f} %")
    table.insert(0, f"teacher, with labels           k-NN top-1 {record['teacher_knn20']:5.1f} %")
    common.say("\n" + "\n".join(table))


def main(argv=None):
    args, device = parse_args(argv), common.init_processes()
    run = visualize if args.visualize else demo if args.demo else train
    run(args, device)
    if common.world_size() > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
