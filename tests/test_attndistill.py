"""attndistill.py: the loss against float64, the cheap last block, every released format, runs."""

import argparse
import ast
import json
import math
import signal

import numpy as np
import pytest
import torch
from conftest import (
    DATA,
    ROOT,
    finish,
    float64_vit,
    in_process,
    make_photos,
    released_state,
    run,
    start,
    wait_for,
)
from PIL import Image

import attndistill
import common
import eval_knn
import vitkd

# ------------------------------------------------------------------ attention guidance


def bicubic_matrix(old, new):
    """(new, old): cubic convolution with a = -0.75, pixel centres, the border repeated."""
    def kernel(x, a=-0.75):
        x = abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    matrix = np.zeros((new, old))
    for i in range(new):
        at = (i + 0.5) * old / new - 0.5
        for tap in range(math.floor(at) - 1, math.floor(at) + 3):
            matrix[i, min(max(tap, 0), old - 1)] += kernel(at - tap)
    return matrix


def numpy_guidance(student, teacher, T):
    """L_a from METHODS' four steps, in float64."""
    s, t = (x.detach().double().numpy() for x in (student, teacher))
    g_s, g_t = (math.isqrt(x.shape[-1] - 1) for x in (s, t))
    if g_s != g_t:
        cls, patches = t[..., :1], t[..., 1:].reshape(*t.shape[:2], g_t, g_t)
        matrix = bicubic_matrix(g_t, g_s)
        patches = np.einsum("ij,bhjk,lk->bhil", matrix, patches, matrix).reshape(*t.shape[:2], -1)
        t = np.concatenate([cls, patches * (1 - cls) / patches.sum(-1, keepdims=True)], -1)
    if s.shape[1] != t.shape[1]:
        def merge(a):
            mean = np.exp(np.log(np.maximum(a, 1e-8)).sum(1, keepdims=True) / T)
            return mean / mean.sum(-1, keepdims=True)
        s, t = merge(s), merge(t)
    s, t = (np.clip(a, 1e-5, 0.996) for a in (s, t))
    s, t = (a / a.sum(-1, keepdims=True) for a in (s, t))
    return (t * np.log(t / s)).sum() / len(s)


def attention(B, H, grid, sharpness=2.0):
    return (sharpness * torch.randn(B, H, 1 + grid**2)).softmax(-1).requires_grad_()


CASES = [  # student heads and grid, teacher heads and grid
    (3, 4, 3, 4), (3, 4, 6, 4), (6, 14, 6, 28), (6, 14, 12, 28), (3, 14, 12, 16), (6, 8, 3, 4),
    (3, 5, 3, 7)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sharpness, T", [(0.5, 10.0), (2.0, 10.0), (5.0, 3.0)])
def test_guidance_equals_float64(case, sharpness, T):
    H_s, g_s, H_t, g_t = case
    student, teacher = attention(4, H_s, g_s, sharpness), attention(4, H_t, g_t, sharpness)
    loss = attndistill.attention_guidance_loss(student, teacher, T)
    assert loss.item() == pytest.approx(numpy_guidance(student, teacher, T), rel=1e-5)
    assert loss.ndim == 0 and loss.dtype == torch.float32


@pytest.mark.parametrize("case", CASES[:4])
def test_guidance_gradient_equals_differences(case):
    H_s, g_s, H_t, g_t = case
    student, teacher = attention(2, H_s, g_s, 1.0), attention(2, H_t, g_t, 1.0).detach()
    attndistill.attention_guidance_loss(student, teacher).backward()
    direction = torch.randn_like(student).double() * student.detach()
    step = 1e-5 * direction
    slope = (numpy_guidance(student.double() + step, teacher, 10.0)
             - numpy_guidance(student.double() - step, teacher, 10.0)) / 2e-5
    assert (student.grad.double() * direction).sum().item() == pytest.approx(slope, rel=1e-3)


def test_equal_attentions_give_zero():
    attn = attention(4, 6, 7)
    assert attndistill.attention_guidance_loss(attn, attn.detach()).item() == 0.0
    permuted = attn.detach()[:, torch.randperm(6)]
    assert attndistill.attention_guidance_loss(attn, permuted).item() > 0.1  # head by head
    merged = attndistill.merge_heads(attn, 10.0)  # ... but merged, their order is nothing
    assert torch.allclose(merged, attndistill.merge_heads(permuted, 10.0), atol=1e-6)


def peaked(kind, B, H, grid):
    attn = torch.full((B, H, 1 + grid**2), 1e-30 if kind == "1e-30" else 0.0)
    where = torch.randint(0, 1 + grid**2, (B, H, 1))
    where[0] = 0  # all on the class token itself
    return attn.scatter_(-1, where, 1.0).requires_grad_()


@pytest.mark.parametrize("case", [*CASES, (3, 14, 3, 37), (3, 4, 6, 37)])
@pytest.mark.parametrize("kind", ["1e-30", "one-hot"])
def test_peaked_attention_is_finite(case, kind):
    H_s, g_s, H_t, g_t = case
    student, teacher = peaked(kind, 64, H_s, g_s), peaked(kind, 64, H_t, g_t).detach()
    loss = attndistill.attention_guidance_loss(student, teacher)
    loss.backward()
    assert loss.isfinite() and loss > 0 and student.grad.isfinite().all()


def test_rows_sum_to_one_after_each_step():
    def sums_to_one(attn):
        assert torch.allclose(attn.sum(-1), torch.ones(()), atol=1e-5)

    for make in (lambda *shape: attention(*shape).detach(),
                 lambda *shape: peaked("1e-30", *shape).detach(),
                 lambda *shape: peaked("one-hot", *shape).detach()):
        for g_t in (8, 28, 37):
            attn = make(50, 3, g_t)
            resized = attndistill.resize_attention(attn, 14)
            assert resized.shape == (50, 3, 197)
            sums_to_one(resized)
            assert torch.equal(resized[..., 0], attn[..., 0])  # the class token keeps its share
            merged = attndistill.merge_heads(resized, 10.0)
            assert merged.shape == (50, 1, 197)
            sums_to_one(merged)
            for step in (resized, merged):
                clamped = attndistill.clamp_attention(step)
                sums_to_one(clamped)
                assert clamped.min() > 1e-6 and clamped.max() < 1


def test_a_peak_that_resizing_cannot_see_is_spread():
    """37 -> 14 reads 4 of every 2.6 pixels with weights that may be negative: not every single
    pixel has a positive share of the result."""
    lone = torch.zeros(37**2, 1, 1 + 37**2)
    lone[:, 0, 1:] = torch.eye(37**2) * 0.7
    lone[:, 0, 0] = 0.3
    raw = torch.nn.functional.interpolate(lone[:, :, 1:].view(-1, 1, 37, 37), (14, 14),
                                          mode="bicubic").flatten(1).sum(1)
    assert (raw < 0).any()
    resized = attndistill.resize_attention(lone, 14)
    assert torch.allclose(resized.sum(-1), torch.ones(()), atol=1e-5)
    assert torch.allclose(resized[raw < 0][:, 0, 1:], torch.tensor(0.7 / 196))
    assert (resized[raw > 0.1][:, 0, 1:].amax(-1) > 0.1).all()  # the others keep a peak


def test_attention_of_half_precision_counts_in_float32():
    student, teacher = attention(4, 6, 14), attention(4, 12, 28)
    exact = attndistill.attention_guidance_loss(student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attndistill.attention_guidance_loss(student, teacher), exact)
        rounded = attndistill.attention_guidance_loss(student.half(), teacher.half())
    assert rounded.dtype == torch.float32 and rounded.item() == pytest.approx(exact.item(), rel=.01)


def test_guidance_of_no_square_grid_says_so():
    with pytest.raises(ValueError, match="15 patches, which is no square"):
        attndistill.attention_guidance_loss(attention(1, 3, 3), torch.full((1, 3, 16), 1 / 16))


def test_projector_has_the_papers_form():
    P = attndistill.projector(12, 20)
    assert P(torch.randn(5, 12)).shape == (5, 20)
    assert [tuple(layer.weight.shape) for layer in P if hasattr(layer, "weight")] == [
        (24, 12), (12, 24), (24, 12), (20, 24), (20,)]
    p = {k: v.double().numpy() for k, v in P.state_dict().items()}
    x = torch.randn(5, 12)
    h = x.double().numpy()
    for i in (0, 2, 4, 6):
        h = h @ p[f"{i}.weight"].T + p[f"{i}.bias"]
        if i < 6:
            h = h * 0.5 * (1 + np.vectorize(math.erf)(h / math.sqrt(2)))
    h = (h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 1e-5)
    assert np.allclose(P(x).detach().numpy(), h, atol=1e-4)


# ------------------------------------------------------------------ the ViT


def sharp_vit(layer_scale=False, **keywords):
    """A small float64 ViT whose attention is far from uniform."""
    model = attndistill.ViT(20, 4, 24, 3, 3, **keywords, layer_scale=layer_scale).double()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3)
        if "norm" in name and name.endswith("weight"):
            parameter.data += 1
    return model


@pytest.mark.parametrize("layer_scale", [False, True])
def test_the_cheap_last_block_has_the_full_ones_numbers(layer_scale):
    """Class token, attention, and the gradient of every parameter and pixel, to 1e-10."""
    model = sharp_vit(layer_scale, num_classes=0)
    images = torch.randn(3, 3, 20, 20).double().requires_grad_()
    weigh_cls, weigh_attn = torch.randn(3, 24).double(), torch.randn(3, 3, 26).double()
    inputs = [images, *model.parameters()]

    def gradients(cls, attn):
        return torch.autograd.grad((weigh_cls * cls).sum() + (weigh_attn * attn).sum(), inputs)

    cheap = model.class_token_and_attention(images)
    full = float64_vit(dict(model.named_parameters()), images, 3)
    ordinary = model(images)  # what a plain ViT with these weights gives
    assert full[1].max() > 0.4  # attention far from uniform, 1/26
    for ours, theirs in ((cheap[0], full[0]), (cheap[0], ordinary), (cheap[1], full[1])):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(gradients(*cheap), gradients(*full)):
        assert (ours - theirs).abs().max() <= 1e-10 * max(1, theirs.abs().max())


def test_the_last_block_is_computed_for_one_token():
    """Count the rows that the last block's MLP and projection see, and the projector."""
    model, seen = sharp_vit(num_classes=0), {}
    P = attndistill.projector(24, 36).double()
    last = model.blocks[-1]
    for name, module in {"mlp": last.mlp, "proj": last.attn.proj, "norm": model.norm, "P": P,
                         "first": model.blocks[0].mlp}.items():
        module.register_forward_hook(
            lambda module, inputs, output, name=name: seen.update({name: inputs[0].shape}))
    P(model.class_token_and_attention(torch.randn(5, 3, 20, 20).double())[0])
    assert seen.pop("first") == (5, 26, 24)
    assert set(seen.values()) == {(5, 24)} and len(seen) == 4


def test_vit_is_vitkds_vit():
    """Same names, same numbers: a student is a plain ViT."""
    arch = {"image_size": 16, "patch_size": 4, "dim": 24, "depth": 3, "num_heads": 3,
            "num_classes": 5}
    ours, theirs = attndistill.ViT(**arch), vitkd.ViT(**arch)
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(ours(images), theirs(images))
    with pytest.raises(ValueError, match="image_size=16"):
        ours.class_token_and_attention(torch.randn(1, 3, 32, 32))


def test_what_is_the_same_in_the_methods_is_the_same_text():
    def texts(script):
        tree = ast.parse((ROOT / script).read_text())
        named = {node.name: node for node in tree.body if hasattr(node, "name")}
        for name in ("Attention", "ViT"):
            named.update({f"{name}.{part.name}": part for part in named[name].body
                          if hasattr(part, "name")})
        return {name: ast.unparse(node) for name, node in named.items()}

    ours, theirs = texts("attndistill.py"), texts("vitkd.py")
    same = ["Attention.__init__", "Attention.forward", "Mlp", "LayerScale", "PatchEmbed",
            "download", "resize_pos_embed"]
    assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}


# ------------------------------------------------------------------ the teacher


def prefixed(state, prefix):
    return {prefix + k: v for k, v in state.items()}


def plain(dim=384, depth=12, **keywords):
    state = released_state(dim, depth, False, **keywords)
    return {k: v for k, v in state.items() if not k.startswith("head")}


def dino_head(dim):
    return {"head.mlp.0.weight": torch.zeros(8, dim), "head.mlp.0.bias": torch.zeros(8),
            "head.last_layer.weight_g": torch.ones(8, 1),
            "head.last_layer.weight_v": torch.ones(8, 8)}


def released_file(family):
    """(name, checkpoint as the family's authors save it, the plain ViT in it, number of heads)"""
    other = {k: torch.full_like(v, 9.0) for k, v in plain().items()}  # weights not to be taken
    name, heads, state = "vit_s16", 6, plain()
    if family == "DINO":
        name, checkpoint = "dino_s16", state
    elif family == "DINO, patch 8":
        name, state = "dino_s8", plain(patch_size=8, grid=28)
        checkpoint = state
    elif family == "DINO, training":
        name = "dino_s16"
        checkpoint = {"student": prefixed({**other, **dino_head(384)}, "module.backbone."),
                      "teacher": {**prefixed(state, "backbone."), **dino_head(384)},
                      "optimizer": {"param_groups": [{"lr": np.float64(0.1)}]}, "epoch": 100,
                      "args": argparse.Namespace(arch="vit_small", lr=0.1), "dino_loss": {}}
    elif family == "iBOT":
        extra = {"masked_embed": torch.zeros(1, 384)}
        head = {**dino_head(384), "head.mlp2.0.weight": torch.zeros(8, 384)}
        checkpoint = {"student": prefixed(other, "module.backbone."), "epoch": 800,
                      "teacher": {**prefixed({**state, **extra}, "backbone."), **head},
                      "args": argparse.Namespace(arch="vit_small")}
    elif family == "iBOT, backbone":
        checkpoint = {"state_dict": {**state, "masked_embed": torch.zeros(1, 384)}}
    elif family == "Mugs":
        name = "mugs_s16"
        relation = {f"relation_blocks.0.{k.removeprefix('blocks.0.')}": v
                    for k, v in state.items() if k.startswith("blocks.0.")}
        heads_of = {f"module.{head}.projector.0.weight": torch.zeros(8, 384)
                    for head in ("instance_head", "local_group_head", "group_head")}
        checkpoint = {"student": prefixed(other, "module.backbone."),
                      "teacher": {**prefixed(state, "module.backbone."),
                                  **prefixed(relation, "module.backbone."), **heads_of}}
    elif family == "Mugs, backbone":
        name, checkpoint = "mugs_s16", {"state_dict": prefixed(state, "module.backbone.")}
    elif family == "MoCo v3":
        heads = 12  # its ViT-S has twelve heads of 32
        projector = {"head.0.weight": torch.zeros(8, 384), "head.1.running_mean": torch.zeros(8),
                     "head.1.num_batches_tracked": torch.tensor(3)}
        checkpoint = {"epoch": 300, "arch": "vit_small", "optimizer": {}, "state_dict": {
            **prefixed({**state, **projector}, "module.base_encoder."),
            **prefixed({**other, **projector}, "module.momentum_encoder."),
            "module.predictor.0.weight": torch.zeros(8, 8)}}
    elif family == "MAE":
        name, heads, state = "vit_b16", 12, plain(768)
        decoder = {"mask_token": torch.zeros(1, 1, 512), "decoder_norm.bias": torch.zeros(512),
                   "decoder_pos_embed": torch.zeros(1, 197, 512),
                   "decoder_embed.weight": torch.zeros(512, 768),
                   "decoder_blocks.0.norm1.weight": torch.zeros(512)}
        checkpoint = {"model": {**state, **decoder}}
    elif family == "DINOv2":
        name, state = "dinov2_s14", plain(patch_size=14, grid=37)
        for i in range(12):
            for scale in ("ls1", "ls2"):
                state[f"blocks.{i}.{scale}.gamma"] = torch.rand(384)
        checkpoint = {**state, "mask_token": torch.zeros(1, 384)}
    elif family == "timm":
        name, heads, state = "vit_t16", 3, plain(192)
        checkpoint = {**state, "head.weight": torch.zeros(9, 192), "head.bias": torch.zeros(9)}
    return name, checkpoint, state, heads


@pytest.mark.parametrize("family", [
    "DINO", "DINO, patch 8", "DINO, training", "iBOT", "iBOT, backbone", "Mugs", "Mugs, backbone",
    "MoCo v3", "MAE", "DINOv2", "timm"])
def test_released_formats_load_and_give_their_class_token(family, tmp_path):
    name, checkpoint, state, heads = released_file(family)
    torch.save(checkpoint, tmp_path / "w.pth")
    teacher = attndistill.load_teacher(name, tmp_path / "w.pth")
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    patches = (224 // teacher.patch_size)**2
    if family == "DINOv2":
        assert teacher.patch_size == 14 and patches == 256 and state["pos_embed"].shape[1] == 1370
        assert torch.equal(teacher.pos_embed[:, 0], state["pos_embed"][:, 0])
        state["pos_embed"] = attndistill.resize_pos_embed(state["pos_embed"], 16)
    images = torch.randn(1, 3, 224, 224)
    expected = float64_vit(state, images, heads)
    found = teacher.double().class_token_and_attention(images.double())
    assert found[1].shape == (1, heads, 1 + patches)
    for ours, theirs in zip(found, expected):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("script", ["attndistill", "vitkd"])
def test_project_checkpoints_as_teacher(script, tmp_path):
    arch = {"image_size": 16, "patch_size": 4, "dim": 24, "depth": 3, "num_heads": 3,
            "num_classes": 5 if script == "vitkd" else 0}
    model = {"vitkd": vitkd, "attndistill": attndistill}[script].ViT(**arch).eval()
    common.save_checkpoint(tmp_path / "student.pth", model=model.state_dict(), arch=arch,
                           script=script, top1=None)
    teacher = attndistill.load_teacher(str(tmp_path / "student.pth"), image_size=16)
    model.head, images = torch.nn.Identity(), torch.randn(2, 3, 16, 16)
    assert torch.equal(teacher(images), model(images)) and teacher(images).shape == (2, 24)


def test_a_vitkd_student_by_its_size(tmp_path):
    model = vitkd.ViT(dim=192, depth=12, num_heads=3, num_classes=7)
    common.save_checkpoint(tmp_path / "s.pth", model=model.state_dict(), script="vitkd", arch={})
    assert attndistill.load_teacher("vit_t16", tmp_path / "s.pth").cls_token.shape[-1] == 192


def broken_file(how):
    state = plain(192)
    if how == "other size":
        return "vit_s16", state
    if how == "same family":
        return "dino_s8", plain()
    if how == "extra keys":
        return "dino_s16", {**plain(), "masked_embed": torch.zeros(1), "registers": torch.zeros(1)}
    if how == "other family":
        return "dino_s16", {**plain(), "masked_embed": torch.zeros(1, 384)}
    if how == "flat":
        return "vit_t16", {**state, "pos_embed": torch.zeros(5)}
    if how == "numbers":
        return "vit_t16", {1: torch.zeros(1), 2: torch.zeros(1)}
    if how == "distilled":
        return "vit_t16", {**state, "dist_token": torch.zeros(1, 1, 192)}
    if how == "no LayerScale":
        return "dinov2_s14", plain(patch_size=14, grid=37)
    if how == "NaN":
        state["norm.bias"][0] = math.nan
        return "vit_t16", state
    if how == "not a dict":
        return "vit_t16", [1, 2]
    return "vit_t16", {"teacher": state, "epoch": 3} if how == "size" else state


@pytest.mark.parametrize("how, message", [
    ("other size", r"does not hold a vit_s16: \d+ of another shape: .* it fits --teacher vit_t16"),
    ("same family", r"of another shape: .*; it fits --teacher dino_s16$"),
    ("extra keys", r"2 unexpected: masked_embed, registers$"),
    ("distilled", r"1 unexpected: dist_token"),
    ("other family", r"1 unexpected: masked_embed; it fits --teacher vit_s16"),
    ("flat", r"of another shape: pos_embed \(5,\)"), ("numbers", r"2 unexpected: 1, 2"),
    ("no LayerScale", r"24 missing: blocks\.0\.ls1\.gamma"),
    ("NaN", r"NaN or infinite: norm\.bias"),
    ("not a dict", r"150 missing"),
    ("size", r"--image-size 200 is not a multiple of the teacher's patch size 16: take 192 or 208"),
])
def test_weights_of_another_model(how, message, tmp_path):
    name, checkpoint = broken_file(how)
    torch.save(checkpoint, tmp_path / "w.pth")
    with pytest.raises(common.Abort, match=message) as error:
        attndistill.load_teacher(name, tmp_path / "w.pth", 200 if how == "size" else 224)
    assert "\n" not in str(error.value) and error.value.status == 2


def test_teachers_without_a_download_or_a_name(tmp_path, monkeypatch):
    with pytest.raises(common.Abort, match="mugs_s16 cannot be downloaded.*--teacher-weights"):
        attndistill.load_teacher("mugs_s16")
    with pytest.raises(common.Abort, match="no teacher dino_xl: take dino_s16, dino_s8, .*vit_l16"):
        attndistill.load_teacher("dino_xl")
    (tmp_path / "w.pth").write_bytes(b"nothing")
    with pytest.raises(common.Abort, match="w.pth is "):
        attndistill.load_teacher(str(tmp_path / "w.pth"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # an empty cache
    monkeypatch.setattr(attndistill, "RELEASES", "http://127.0.0.1:9/")  # nobody listens there
    with pytest.raises(common.Abort, match=r"127.0.0.1:9/dinov2/dinov2_vits14/dinov2_vits14_pretr"):
        attndistill.load_teacher("dinov2_s14")


def test_position_embedding_resize_keeps_constants_and_ramps():
    """DINOv2's 37 x 37 to 16 x 16, and DINO's 28 x 28 to 14 x 14."""
    for old, grid in ((37, 16), (28, 14), (14, 28)):
        ramp = torch.linspace(-1, 1, old).repeat(old, 1)
        patches = torch.stack([torch.full((old, old), 0.3), ramp, ramp.T], -1).reshape(1, old**2, 3)
        new = attndistill.resize_pos_embed(torch.cat([torch.ones(1, 1, 3), patches], 1), grid)
        assert torch.equal(new[:, 0], torch.ones(1, 3))
        new = new[0, 1:].view(grid, grid, 3)
        at = (torch.arange(grid) + 0.5) * old / grid - 0.5
        inner = (at > 2 * max(1, old / grid)) & (at < old - 1 - 2 * max(1, old / grid))
        expected = (-1 + 2 * at / (old - 1))[inner]
        assert torch.allclose(new[..., 0], torch.tensor(0.3)) and inner.sum() >= 5
        assert torch.allclose(new[:, inner, 1], expected.expand(grid, -1), atol=2e-4)  # of 2
        assert torch.allclose(new[inner, :, 2], expected[:, None].expand(-1, grid), atol=2e-4)


# ------------------------------------------------------------------ runs

SMALL = ["--student", "micro", "--image-size", "16", "--patch-size", "4", "--workers", "2",
         "--batch-size", "16", "--lr", "1e-3"]


def lines_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """(data, path): a folder of photos; a random teacher with other patches, heads and width than
    the student's."""
    folder = tmp_path_factory.mktemp("attndistill")
    data = make_photos(folder / "photos", counts=(("train", 64), ("val", 13)))
    arch = {"image_size": 16, "patch_size": 2, "dim": 48, "depth": 2, "num_heads": 4,
            "num_classes": 0}
    torch.manual_seed(3)
    model = attndistill.ViT(**arch)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    common.save_checkpoint(folder / "student.pth", model=model.state_dict(), arch=arch,
                           script="attndistill", top1=None)
    return data, folder / "student.pth"


def test_help_and_defaults_are_the_recipe(monkeypatch):
    out, _ = run("attndistill.py", "--help")
    for flag in ("--lambda-a", "--temperature", "--visualize", "--eval-every", "--teacher-weights",
                 "--demo", "--dry-run", "--resume", "--micro-batch"):
        assert f"\n  {flag}" in out
    assert max(map(len, out.splitlines())) <= 110
    monkeypatch.setattr("sys.argv", ["attndistill.py"])
    args = attndistill.parse_args()
    common.check_flags(args)
    recipe = {"batch_size": 4096, "epochs": 800, "lr": 1.5e-4 * 16, "min_lr": 0.0,
              "warmup_epochs": 40, "weight_decay": 0.05, "crop_scale": 0.2, "lambda_a": 0.1,
              "temperature": 10.0, "clip_grad": 0.0, "student": "vit_s", "teacher": "dino_s8",
              "out": "out/attndistill-vit_s-dino_s8"}
    assert {name: getattr(args, name) for name in recipe} == recipe


@pytest.mark.parametrize("lambda_a, amp", [("0", "off"), ("0.1", "bf16")])
def test_a_run_and_what_it_leaves(lambda_a, amp, teacher, tmp_path, capsys, monkeypatch):
    data, weights = teacher
    before = common.load_checkpoint(weights)["model"]
    teachers, load = [], attndistill.load_teacher
    monkeypatch.setattr(attndistill, "load_teacher",
                        lambda *a: teachers.append(load(*a)) or teachers[-1])
    status, out, err = in_process(
        attndistill, capsys, monkeypatch, *SMALL, "--data", data, "--teacher", weights, "--epochs",
        4, "--eval-every", 2, "--lambda-a", lambda_a, "--amp", amp, "--out", tmp_path)
    assert status == 0, err
    assert {p.name for p in tmp_path.iterdir()} == {".lock", "last.pth", "best.pth", "student.pth",
                                                    "log.jsonl", "args.json"}
    log = lines_of(tmp_path)
    assert log[-1]["alignment"] < log[0]["alignment"]
    assert all(("guidance" in line) == (lambda_a != "0") for line in log)
    assert [{"knn10", "knn20", "knn100", "knn200"} <= line.keys() for line in log] == [
        False, True, False, True]
    assert out.splitlines()[0].startswith(f"teacher {weights}, k-NN top-1: ")
    best = max(line["knn20"] for line in log if "knn20" in line)
    assert common.load_checkpoint(tmp_path / "best.pth")["top1"] == best
    # the teacher: as it was, and never in training mode
    model, = teachers
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    # the student: a plain ViT, in any of the scripts
    student = common.load_checkpoint(tmp_path / "student.pth")
    assert student["top1"] == log[-1]["knn20"] and student["script"] == "attndistill"
    assert student["model"].keys() == plain(96, 6).keys()
    rebuilt, images = attndistill.ViT(**student["arch"]).eval(), torch.randn(2, 3, 16, 16)
    rebuilt.load_state_dict(student["model"])
    theirs = vitkd.ViT(**student["arch"]).eval()
    theirs.load_state_dict(student["model"])
    # the k-NN of training is eval_knn.py's
    status, table, err = in_process(
        eval_knn, capsys, monkeypatch, "--weights", tmp_path / "student.pth", "--data", data,
        "--workers", 2, "--amp", "bf16" if amp == "bf16" else "off", "--micro-batch", 16)
    assert status == 0, err
    for k in (10, 20, 100, 200):
        assert f"k = {k:<4d} top-1 {log[-1][f'knn{k}']:6.2f} %" in table
    cheap = rebuilt.double().class_token_and_attention(images.double())[0]
    assert torch.allclose(theirs.double()(images.double()), cheap, rtol=1e-10, atol=1e-10)


def test_the_objective_is_both_terms_and_reaches_every_parameter():
    args = argparse.Namespace(lambda_a=0.3, temperature=7.0)
    student, teacher = sharp_vit(num_classes=0), sharp_vit(num_classes=0).requires_grad_(False)
    model = attndistill.Objective(student, attndistill.projector(24, 24).double(), args)
    images = torch.randn(3, 3, 20, 20).double()
    z_t, a_t = teacher.class_token_and_attention(images)
    losses = model(images, z_t, a_t)
    z_s, a_s = student.class_token_and_attention(images)
    alignment = (model.project(z_s) - z_t).square().mean()
    assert losses["alignment"].item() == pytest.approx(alignment.item(), rel=1e-5)
    assert losses["guidance"].item() == pytest.approx(0.3 * numpy_guidance(a_s, a_t, 7.0), rel=1e-5)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert sum(p.grad.abs().sum() == 0 for p in model.parameters()) == 0
    args.lambda_a = 0
    assert model(images, z_t, a_t).keys() == {"alignment"}


def test_labels_are_never_read(teacher, tmp_path, capsys, monkeypatch):
    """Shuffled labels in training: the very same student."""
    data, weights = teacher
    load = common.load_data
    for name in ("true", "shuffled"):
        def load_data(args, transform, name=name):
            train, val, classes = load(args, transform)
            if name == "shuffled":
                labels = np.random.default_rng(0).permutation(train.base.targets)
                train.base.samples = [(path, int(label)) for (path, _), label
                                      in zip(train.base.samples, labels)]
            return train, val, classes
        monkeypatch.setattr(common, "load_data", load_data)
        status, _, err = in_process(attndistill, capsys, monkeypatch, *SMALL, "--data", data,
                                    "--teacher", weights, "--epochs", 1, "--out", tmp_path / name)
        assert status == 0, err
    a, b = (common.load_checkpoint(tmp_path / n / "student.pth") for n in ("true", "shuffled"))
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    assert a["top1"] != b["top1"]  # the measure does read them


def test_resume_after_kill_equals_the_uninterrupted_run_bit_for_bit(teacher, tmp_path):
    data, weights = teacher
    command = ["attndistill.py", *SMALL, "--data", data, "--teacher", weights, "--batch-size", 4,
               "--epochs", 3, "--eval-every", 1]
    run(*command, "--out", tmp_path / "whole")
    process = start(*command, "--out", tmp_path / "killed")
    wait_for((tmp_path / "killed" / "last.pth").exists, process)
    process.kill()
    finish(process)
    assert common.load_checkpoint(tmp_path / "killed" / "last.pth")["epoch"] < 3
    run(*command, "--out", tmp_path / "killed", "--resume")
    for name in ("student.pth", "best.pth", "last.pth"):
        a, b = (common.load_checkpoint(tmp_path / folder / name) for folder in ("whole", "killed"))
        for part in ("model", "projector") if name == "last.pth" else ("model",):
            assert all(torch.equal(a[part][k], b[part][k]) for k in a[part])
    for a, b in zip(lines_of(tmp_path / "whole"), lines_of(tmp_path / "killed")):
        assert all(a[k] == b[k] for k in ("alignment", "guidance", "lr", "knn10", "knn200"))


def test_two_processes_train_and_evaluate_like_one(teacher, tmp_path):
    data, weights = teacher
    flags = [*SMALL, "--amp", "off", "--data", data, "--epochs", 1, "--teacher", weights]
    one, _ = run("attndistill.py", *flags, "--out", tmp_path / "one")
    two, _ = run("attndistill.py", *flags, "--micro-batch", 4, "--out", tmp_path / "two",
                 processes=2)
    assert one.splitlines()[0] == two.splitlines()[0]  # the teacher's k-NN
    torch.manual_seed(0)
    begin = attndistill.ViT(16, 4, 96, 6, 3, 0).state_dict()
    a, b = (common.load_checkpoint(tmp_path / name / "student.pth")["model"]
            for name in ("one", "two"))
    for key in a:
        moved = (a[key] - begin[key]).norm()
        assert (a[key] - b[key]).norm() <= 0.02 * moved + 1e-6, key
    one, two = lines_of(tmp_path / "one")[0], lines_of(tmp_path / "two")[0]
    for key in ("alignment", "guidance"):
        assert one[key] == pytest.approx(two[key], rel=1e-3)


def test_nan_on_one_rank_is_skipped_by_all(tmp_path):
    """Rank 1 sees NaN in the third batch: both skip that step, and end alike."""
    program = ROOT / "tests" / "nan_on_one_rank.py"
    run(program, tmp_path / "run", 1, processes=2)
    assert [line["skipped_steps"] for line in lines_of(tmp_path / "run")] == [1, 0]
    student = common.load_checkpoint(tmp_path / "run" / "student.pth")["model"]
    assert all(v.isfinite().all() for v in student.values())
    # ten in a row end the run on all ranks, with one line
    _, err = run(program, tmp_path / "bad", 100, processes=2, status=1)
    assert err.count("error: the loss was not finite ten steps in a row, in epoch 2 of 2") == 1


def test_signal_while_features_are_computed(tmp_path):
    weights = tmp_path / "t.pth"
    arch = {"image_size": 32, "patch_size": 2, "dim": 96, "depth": 12, "num_heads": 3,
            "num_classes": 0}
    common.save_checkpoint(weights, model=attndistill.ViT(**arch).state_dict(), arch=arch,
                           script="attndistill", top1=None)
    process = start("attndistill.py", "--data", "shapes", "--teacher", weights, "--student",
                    "micro", "--image-size", 32, "--patch-size", 8, "--batch-size", 50, "--epochs",
                    1, "--out", tmp_path / "run")
    wait_for((tmp_path / "run" / "log.jsonl").exists, process)  # the teacher's features are next
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 143 and "stopped by SIGTERM while computing features" in err
    assert len(err.splitlines()) == 1


def test_dry_run_writes_nothing(teacher, tmp_path):
    for data in (teacher[0], "shapes"):
        out, err = run("attndistill.py", *SMALL, "--data", data, "--teacher", teacher[1],
                       "--dry-run", "--epochs", 30, "--out", tmp_path / "run")
        assert not err and "dry run, 30 epochs: " in out and "30 epochs of" in out
        assert not (tmp_path / "run").exists()


def test_wrong_flags_are_one_line(teacher, tmp_path, capsys, monkeypatch):
    data, weights = teacher
    sizeless = common.load_checkpoint(weights)
    sizeless["arch"]["image_size"] = None
    common.save_checkpoint(tmp_path / "none.pth", **sizeless)
    here = [*SMALL, "--data", data, "--out", tmp_path / "o"]
    for arguments, message in (
            ([*here, "--teacher", "none"], "no teacher none: take dino_s16"),
            ([*here, "--teacher", "vit_t16"], "vit_t16 cannot be downloaded"),
            ([*SMALL[:2], "--teacher", "dinov2_s14", "--image-size", 32],
             "patch sizes, student's 16 and teacher's 14: take 112 or 224"),
            ([*here, "--weights", weights], "--weights goes with --visualize"),
            ([*here, "--teacher", weights, "--lambda-a", -1], "--lambda-a: -1 is not in [0, inf)"),
            ([*here, "--teacher", weights, "--student", "deit_t"], "no student deit_t: take micro"),
            ([*here, "--teacher", weights, "--image-size", 15, "--patch-size", 5],
             "--image-size 15 is not a multiple of the teacher's patch size 2: take 14 or 16"),
            (["--visualize", "x.jpg", "--teacher", weights], "--visualize needs the student"),
            (["--visualize", "x.jpg", "--teacher", weights, "--weights", tmp_path / "none.pth"],
             "what it says of itself is no model"),
            (["--visualize", "x.jpg", "--teacher", weights, "--weights", weights],
             "cannot read the image x.jpg")):
        status, _, err = in_process(attndistill, capsys, monkeypatch, *arguments)
        assert status == 2 and message in err and len(err.splitlines()) == 1, err


def test_visualize_draws_what_the_models_attend_to(teacher, tmp_path, capsys, monkeypatch):
    """A teacher and a student whose class tokens look at one known patch each."""
    def looks_at(patch, grid, patch_size, heads, path):
        arch = {"image_size": 32, "patch_size": patch_size, "dim": 12, "depth": 1,
                "num_heads": heads, "num_classes": 0}
        model = attndistill.ViT(**arch)
        for parameter in model.parameters():
            parameter.data.zero_()
        model.blocks[0].norm1.weight.data.fill_(1)
        model.cls_token.data[..., 0], model.pos_embed.data[:, 1 + patch, 1] = 3, 3
        d = 12 // heads
        for h in range(heads):  # q of the class token, k of that patch
            model.blocks[0].attn.qkv.weight.data[h * d, 0] = 4
            model.blocks[0].attn.qkv.weight.data[12 + h * d, 1] = 4
        common.save_checkpoint(path, model=model.state_dict(), arch=arch, script="attndistill",
                               top1=None)

    looks_at(0, 4, 8, 2, tmp_path / "t.pth")    # top left of 4 x 4
    looks_at(63, 8, 4, 3, tmp_path / "s.pth")   # bottom right of 8 x 8
    data, wide = teacher
    photos = sorted((data / "val" / "ant").iterdir())[:2]
    status, out, err = in_process(attndistill, capsys, monkeypatch, "--visualize", *photos,
                                  "--weights", tmp_path / "s.pth", "--teacher", tmp_path / "t.pth",
                                  "--out", tmp_path / "pictures")
    assert status == 0, err
    assert "image, teacher mean, head 1, head 2, student mean, head 1, head 2, head 3" in out
    picture = np.asarray(Image.open(tmp_path / "pictures" / "attention.png")).astype(int)
    columns, tile = 1 + 3 + 4, 160 + 2
    assert picture.shape[1] == columns * tile + 2
    header, body = picture[:-(2 * tile)], picture[-(2 * tile):]
    assert all((header[:, c * tile + 2:(c + 1) * tile] > 200).any() for c in range(columns))
    for row in range(2):
        for column in range(1, columns):
            part = body[row * tile:(row + 1) * tile - 2, column * tile + 2:(column + 1) * tile]
            heat = part.sum(-1)  # over a photo of noise: compare means of corners
            corners = {"top left": heat[:20, :20].mean(), "bottom right": heat[-10:, -10:].mean()}
            looked, other = ("top left", "bottom right") if column <= 3 else (
                "bottom right", "top left")
            assert corners[looked] > corners[other] + 200, (row, column, corners)


    # at another size; and to a folder that cannot be
    for image_size, out, status in ((48, tmp_path / "large", 0), (32, "/proc/nowhere", 2)):
        found, _, err = in_process(
            attndistill, capsys, monkeypatch, "--visualize", *photos, "--weights",
            tmp_path / "s.pth", "--teacher", wide, "--image-size", image_size, "--out", out)
        assert found == status and ("cannot write /proc/nowhere" in err) == (status == 2)


@pytest.mark.slow
def test_demo_prints_its_table():
    out, _ = run("attndistill.py", "--demo", timeout=900)
    table = out.splitlines()[-3:]
    assert [line.split("  ")[0] for line in table] == ["teacher", "student, PA", "student, PA + AG"]


@pytest.mark.skipif(not (DATA / "cifar10_val.zip").exists(), reason=f"no real images in {DATA}")
def test_real_images_through_the_ordinary_command_line(tmp_path):
    import zipfile
    with zipfile.ZipFile(DATA / "cifar10_val.zip") as archive:
        names = sorted(n for n in archive.namelist() if n.endswith(".jpg"))
        for name in names[::25]:  # 400 of the 10,000
            split = "val" if names.index(name) % 100 == 0 else "train"
            target = tmp_path / "data" / split / name.split("/")[-2] / name.split("/")[-1]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(name))
    arch = {"image_size": 32, "patch_size": 4, "dim": 48, "depth": 2, "num_heads": 4,
            "num_classes": 0}
    common.save_checkpoint(tmp_path / "t.pth", model=attndistill.ViT(**arch).state_dict(),
                           arch=arch, script="attndistill", top1=None)
    out, _ = run("attndistill.py", "--student", "micro", "--data", tmp_path / "data", "--teacher",
                 tmp_path / "t.pth", "--image-size", 32, "--patch-size", 8, "--batch-size", 50,
                 "--epochs", 2, "--workers", 2, "--out", tmp_path / "run")
    assert "knn20" in out
