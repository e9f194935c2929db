"""attndistill.py: the loss against float64, the cheap last block, every released format, runs."""

import argparse
import inspect
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from PIL import Image
from test_runs import records

import attndistill
import common
import dearkd
import eval_knn
import vitkd

# ------------------------------------------------------------------ attention guidance


def exact_guidance(student, teacher, T=10.0):
    """L_a in float64 from the method's four steps; differentiable."""
    s, t = student.double(), teacher.double()
    g_s, g_t = (math.isqrt(x.shape[-1] - 1) for x in (s, t))
    if g_s != g_t:
        patches = F.interpolate(t[..., 1:].unflatten(-1, (g_t, g_t)), (g_s, g_s), mode="bicubic")
        patches = torch.where(patches < 1e-8, 1e-8, patches).flatten(2)
        t = torch.cat([t[..., :1], patches * (1 - t[..., :1]) / patches.sum(-1, True)], -1)
    if s.shape[1] != t.shape[1]:
        s, t = (torch.where(x < 1e-30, 1e-30, x).prod(1, True) ** (1 / T) for x in (s, t))
        s, t = (x / x.sum(-1, True) for x in (s, t))
    s, t = (x.clip(1e-5, 0.996) for x in (s, t))
    s, t = (x / x.sum(-1, True) for x in (s, t))
    return (t * (t / s).log()).sum() / len(s)


def attention(B, H, grid, sharpness=2.0):
    return (sharpness * torch.randn(B, H, 1 + grid**2)).softmax(-1)


CASES = [  # student's heads and grid, teacher's heads and grid: each same or different
    (3, 4, 3, 4), (3, 4, 6, 4), (6, 14, 6, 28), (6, 14, 12, 28), (3, 14, 12, 16), (3, 5, 3, 7)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sharpness, T", [(0.5, 10.0), (4.0, 10.0), (4.0, 3.0)])
def test_guidance_and_its_gradient_equal_float64(case, sharpness, T):
    H_s, g_s, H_t, g_t = case
    student = attention(4, H_s, g_s, sharpness).requires_grad_()
    teacher = attention(4, H_t, g_t, sharpness)
    loss = attndistill.attention_guidance_loss(student, teacher, T)
    expected = exact_guidance(student, teacher, T)
    assert loss.shape == () and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    # Gradients are compared at the logits: at a probability near 0 they are as large as 1 / it
    ours, exact = (torch.autograd.grad(x, student)[0] * student for x in (loss, expected))
    assert (ours - exact).norm() <= 1e-3 * exact.norm()


@pytest.mark.parametrize("case", [*CASES, (3, 14, 6, 37)])
@pytest.mark.parametrize("floor", [0.0, 1e-30])
def test_peaked_attention_is_finite(case, floor):
    H_s, g_s, H_t, g_t = case

    def peaked(H, grid):
        where = torch.randint(0, 1 + grid**2, (64, H, 1))
        where[0] = 0  # all on the class token itself
        return torch.full((64, H, 1 + grid**2), floor).scatter_(-1, where, 1.0)

    student, teacher = peaked(H_s, g_s).requires_grad_(), peaked(H_t, g_t)
    loss = attndistill.attention_guidance_loss(student, teacher)
    loss.backward()
    assert loss.isfinite() and loss > 0 and student.grad.isfinite().all()


# ------------------------------------------------------------------ the ViT


def sharp_vit(**keywords):
    """A small ViT whose attention is far from uniform."""
    model = attndistill.ViT(20, 4, 24, 3, 3, num_classes=0, **keywords)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3)
        if "norm" in name and name.endswith("weight"):
            parameter.data += 1
    return model


def test_the_cheap_last_block_has_the_full_ones_numbers_and_gradients():
    model, images = sharp_vit().double(), torch.randn(3, 3, 20, 20).double().requires_grad_()
    inputs = [images, *model.parameters()]
    seen = []
    model.blocks[-1].register_forward_pre_hook(lambda block, x: seen.append(x))
    cheap, attn = model.class_token_and_attention(images)
    assert not seen  # the full last block does not run
    x = model.patch_embed["proj"](images).flatten(2).transpose(1, 2)
    x = torch.cat([model.cls_token.expand(3, -1, -1), x], 1) + model.pos_embed
    for block in model.blocks:
        x = block(x, torch.nn.Identity())
    full = model.norm(x)[:, 0]
    assert torch.allclose(cheap, full, rtol=1e-5, atol=1e-5) and attn.max() > 0.4
    weights = torch.randn(3, 24).double()
    for a, b in zip(*(torch.autograd.grad((weights * y).sum(), inputs) for y in (cheap, full))):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6


def test_attention_is_float32_under_autocast():
    model, images = sharp_vit(), torch.randn(4, 3, 20, 20)
    with torch.autocast("cpu", torch.bfloat16):
        _, attn = model.class_token_and_attention(images)
    assert attn.dtype == torch.float32 and (attn.bfloat16().float() != attn).float().mean() > 0.9
    assert torch.allclose(attn.sum(-1), torch.ones(()), atol=1e-6)


def test_what_is_the_same_in_the_methods_is_the_same_text():
    for name, script in (("Attention.__init__", "attndistill"), ("Attention", "dearkd"),
                         ("Block", "dearkd")):
        a, b = (inspect.getsource(eval(f"{m}.{name}")) for m in (script, "vitkd"))
        assert a == b
    theirs = inspect.getsource(vitkd.train).splitlines()
    for script in (attndistill, dearkd):
        ours = inspect.getsource(script.train).splitlines()
        own = [line for line in ours if line not in theirs]
        assert len(own) < len(ours) / 3, "\n".join(own)


# ------------------------------------------------------------------ the teacher


def float64_vit(state, images, num_heads, eps=1e-6):
    """(class token, its last attention without registers) in float64 from the released names."""
    p = {k: v.double() for k, v in state.items()}
    P, D = p["patch_embed.proj.weight"].shape[-1], p["cls_token"].shape[-1]
    B, g, d = len(images), images.shape[-1] // P, D // num_heads

    def norm(x, name):
        return F.layer_norm(x, (D,), p[f"{name}.weight"], p[f"{name}.bias"], eps)

    def linear(x, name):
        bias = p[f"{name}.bias"] * p.get(f"{name}.bias_mask", torch.ones(()))
        return torch.einsum("...i,oi->...o", x, p[f"{name}.weight"]) + bias

    x = F.conv2d(images.double(), p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], P)
    cls = p["cls_token"]
    if "pos_embed" in p:
        old = math.isqrt(p["pos_embed"].shape[1] - 1)
        position = p["pos_embed"][0, 1:].T.reshape(1, D, old, old)
        how = {"size": (g, g), "antialias": "register_tokens" in p}  # dinov2_*_reg
        if old == 37 and "register_tokens" not in p:  # dinov2_*14, whose grid g is not quite g
            how = {"scale_factor": (g + 0.1) / 37}
        x = x + F.interpolate(position, mode="bicubic", **how)
        cls = cls + p["pos_embed"][:, :1]
    registers = p.get("register_tokens", p.get("storage_tokens", torch.zeros(1, 0, D)))
    R = registers.shape[1]
    tokens = [cls.expand(B, -1, -1), registers.expand(B, -1, -1), x.flatten(2).transpose(1, 2)]
    x = torch.cat(tokens, 1)

    rotation = torch.ones(1 + R + g * g, d // 2, dtype=torch.complex128)
    if "rope_embed.periods" in p:  # the pair (i, i + d/2) of a patch's query or key turns as one
        for row in range(g):
            for column in range(g):
                centre = [2 * (at + 0.5) / g - 1 for at in (row, column)]
                angle = torch.cat([2 * math.pi * c / p["rope_embed.periods"] for c in centre])
                rotation[1 + R + row * g + column] = torch.exp(1j * angle)

    def rotate(x):                                                          # (B, N, H, d)
        x = torch.complex(*x.chunk(2, -1)) * rotation[:, None]
        return torch.cat([x.real, x.imag], -1)

    for i in range(1 + max(int(k.split(".")[1]) for k in p if k.startswith("blocks."))):
        b = f"blocks.{i}"
        qkv = linear(norm(x, f"{b}.norm1"), f"{b}.attn.qkv")
        q, k, v = qkv.reshape(B, -1, 3, num_heads, d).unbind(2)
        attn = torch.einsum("bihd,bjhd->bhij", rotate(q), rotate(k)) / math.sqrt(d)
        attn = attn.softmax(-1)
        mixed = torch.einsum("bhij,bjhd->bihd", attn, v).flatten(2)
        x = x + p.get(f"{b}.ls1.gamma", 1) * linear(mixed, f"{b}.attn.proj")
        h = F.gelu(linear(norm(x, f"{b}.norm2"), f"{b}.mlp.fc1"))
        x = x + p.get(f"{b}.ls2.gamma", 1) * linear(h, f"{b}.mlp.fc2")
    row = torch.cat([attn[:, :, 0, :1], attn[:, :, 0, 1 + R:]], -1)
    return norm(x, "norm")[:, 0], row / row.sum(-1, keepdim=True)


SMALL = {"dim": 48, "depth": 3, "num_heads": 3}  # what vit_s is in these tests


def plain(patch_size=16, grid=14, layer_scale=False, std=0.15):
    """Random weights under the keys and shapes of a released ViT, which are those of vitkd's."""
    keys = vitkd.ViT(patch_size * grid, patch_size, **SMALL, num_classes=0).state_dict()
    if layer_scale:
        for i in range(SMALL["depth"]):
            keys[f"blocks.{i}.ls1.gamma"] = keys[f"blocks.{i}.ls2.gamma"] = torch.ones(48)
    ones = ("gamma", "norm.weight", "norm1.weight", "norm2.weight")
    return {name: std * torch.randn(v.shape) + name.endswith(ones) for name, v in keys.items()}


def prefixed(state, prefix):
    return {prefix + k: v for k, v in state.items()}


def released_file(family):
    """(name, checkpoint as its authors save it, the ViT in it, number of heads, eps)"""
    name, heads, eps, state, zeros = "vit_s16", 3, 1e-6, plain(), torch.zeros(8)
    other = {k: v + 9 for k, v in state.items()}  # weights that must not be taken
    if family == "DINO":
        name, checkpoint = "dino_s16", state
    elif family in ("DINO, training", "iBOT, training"):
        extra = {"masked_embed": zeros} if "iBOT" in family else {}
        teacher = {**prefixed({**state, **extra}, "backbone."), "head.mlp.0.weight": zeros}
        name = "dino_s16" if family == "DINO, training" else "vit_s16"
        checkpoint = {"student": prefixed(other, "module.backbone."), "teacher": teacher,
                      "optimizer": {"param_groups": [{"lr": np.float64(0.1)}]}, "epoch": 100,
                      "args": argparse.Namespace(arch="vit_small")}
    elif family == "Mugs":
        name, heads_of = "mugs_s16", ("instance_head", "local_group_head", "group_head")
        relation = {"backbone.relation_blocks.0.norm1.weight": zeros}
        checkpoint = {"state_dict": prefixed(
            {**prefixed(state, "backbone."), **relation,
             **{f"{head}.projector.0.weight": zeros for head in heads_of}}, "module.")}
    elif family == "MoCo v3":
        name, heads, head = "moco_s16", 12, {"head.0.weight": zeros}
        checkpoint = {"epoch": 300, "state_dict": {
            **prefixed({**state, **head}, "module.base_encoder."),
            **prefixed({**other, **head}, "module.momentum_encoder."),
            "module.predictor.0.weight": zeros}}
    elif family == "MAE":
        decoder = ("mask_token", "decoder_norm.bias", "decoder_pos_embed", "decoder_blocks.0.x")
        checkpoint = {"model": {**state, **dict.fromkeys(decoder, zeros), "head.bias": zeros}}
    elif family in ("DINOv2", "DINOv2 with registers"):
        name, state = "dinov2_s14", plain(14, 37, layer_scale=True)
        if family != "DINOv2":
            name, state["register_tokens"] = "dinov2_s14_reg", torch.randn(1, 4, 48)
        checkpoint = {**state, "mask_token": torch.zeros(1, 48)}
    elif family == "DINOv3":
        name, eps, state = "dinov3_s16", 1e-5, plain(layer_scale=True)
        del state["pos_embed"]
        state["storage_tokens"] = torch.randn(1, 4, 48)
        state["rope_embed.periods"] = 100.0 ** (torch.arange(4) / 4)  # D/H/4 of them
        for i in range(3):
            state[f"blocks.{i}.attn.qkv.bias_mask"] = torch.ones(144)
            state[f"blocks.{i}.attn.qkv.bias_mask"][48:96] = 0
            state[f"blocks.{i}.attn.qkv.bias"][48:96] = 5.0  # is there, but does not count
        checkpoint = {**state, "mask_token": torch.zeros(1, 1, 48)}
    return name, checkpoint, state, heads, eps


@pytest.mark.parametrize("family", [
    "DINO", "DINO, training", "iBOT, training", "Mugs", "MoCo v3", "MAE",
    "DINOv2", "DINOv2 with registers", "DINOv3"])
def test_released_formats_load_and_give_class_token_and_attention(family, tmp_path, monkeypatch):
    monkeypatch.setitem(attndistill.SIZES, "vit_s", SMALL)
    name, checkpoint, state, heads, eps = released_file(family)
    torch.save(checkpoint, tmp_path / "w.pth")
    for size in (224, 112):
        teacher = attndistill.load_teacher(name, tmp_path / "w.pth", size)
        assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
        images = torch.randn(1, 3, size, size)
        cls, attn = teacher.double().class_token_and_attention(images.double())
        expected_cls, expected_attn = float64_vit(state, images, heads, eps)
        assert attn.shape == expected_attn.shape and attn.max() > 3 / attn.shape[-1]
        assert torch.allclose(cls, expected_cls, rtol=1e-5, atol=1e-5)
        assert torch.allclose(attn, expected_attn, rtol=1e-5, atol=1e-5)
        assert torch.equal(teacher(images.double()), cls)


def test_wrong_teachers_say_what_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setitem(attndistill.SIZES, "vit_s", SMALL)
    registers = released_file("DINOv2 with registers")[1]
    for name, checkpoint, size, message in (
            ("resnet50", None, 224, "no teacher resnet50: choose dino_s16"),
            ("mugs_s16", None, 224, "mugs_s16 cannot be downloaded: give its weights as a file"),
            ("dinov2_s14", {}, 256, "patch size 14 of dinov2_s14 does not divide 256"),
            ("vit_s16", released_file("MoCo v3")[1], 224, "Unexpected.*base_encoder"),
            ("dinov2_s14", registers, 224, "Unexpected key.*register_tokens"),
            ("dinov3_s16", plain(), 224, "Missing key.*register_tokens"),
            ("vit_s16", {"fc.weight": torch.zeros(1)}, 224, "Missing key.*Unexpected key.*fc.w"),
            ("vit_s16", {**plain(), "dist_token": torch.zeros(1)}, 224, "Unexpected.*dist_token")):
        if checkpoint is not None:
            torch.save(checkpoint, tmp_path / "w.pth")
        weights = None if checkpoint is None else tmp_path / "w.pth"
        with pytest.raises((ValueError, RuntimeError), match=f"(?s){message}"):
            attndistill.load_teacher(name, weights, size)


# ------------------------------------------------------------------ runs

def main(*words):
    attndistill.main([str(word) for word in words])


@pytest.mark.parametrize("lambda_a, amp", [("0", "off"), ("0.1", "bf16")])
def test_a_run_measures_knn_of_student_and_teacher(
        lambda_a, amp, teacher, photos, tmp_path, capsys):
    main(*TINY, "--data", photos, "--teacher", teacher, "--epochs", 3, "--eval-every", 2, "--amp",
         amp, "--lambda-a", lambda_a, "--out", tmp_path)
    log = records(tmp_path)
    assert log[-1]["alignment"] < log[0]["alignment"]
    assert all(("guidance" in record) == (lambda_a != "0") for record in log)
    assert ["knn20" in record for record in log] == [False, True, True]
    assert ["teacher_knn20" in record for record in log] == [False, False, True]
    # The k-NN of training is eval_knn.py's
    eval_knn.main(["--weights", f"{tmp_path}/student.pth", "--data", str(photos), "--workers", "0",
                   "--amp", amp, "--batch-size", "16"])
    assert f"k = 20   top-1 {log[-1]['knn20']:6.2f} %" in capsys.readouterr().out


def test_the_loss_is_both_terms_and_reaches_every_parameter():
    student, teacher = sharp_vit(), sharp_vit().requires_grad_(False)
    model = attndistill.Distillation(student, attndistill.projector(24, 24), 0.3)
    images = torch.randn(3, 3, 20, 20)
    z_t, a_t = teacher.class_token_and_attention(images)
    losses = model(images, (z_t, a_t))
    z_s, a_s = student.class_token_and_attention(images)
    alignment = ((model.project(z_s) - z_t)**2).sum() / (3 * 24)
    assert losses["alignment"].item() == pytest.approx(alignment.item(), rel=1e-5)
    guidance = 0.3 * exact_guidance(a_s, a_t).item()
    assert losses["guidance"].item() == pytest.approx(guidance, rel=1e-4)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_labels_are_never_read(teacher, photos, tmp_path, monkeypatch):
    load, students, knn = attndistill.load_data, [], []
    for shuffle in (False, True):
        def load_data(args, transform, shuffle=shuffle):
            train, val, classes = load(args, transform)
            if shuffle:
                train.base.samples = [(path, (c + i) % 3) for i, (path, c)
                                      in enumerate(train.base.samples)]
            return train, val, classes
        monkeypatch.setattr(attndistill, "load_data", load_data)
        out = tmp_path / str(shuffle)
        main(*TINY, "--data", photos, "--teacher", teacher, "--epochs", 1, "--out", out)
        students.append(common.load_checkpoint(out / "student.pth")["model"])
        knn.append(records(out)[0]["knn20"])
    assert all(torch.equal(students[0][k], students[1][k]) for k in students[0])
    assert knn[0] != knn[1]  # the measure does read them


def test_any_folder_of_photos_trains_without_knn(teacher, photos, tmp_path, capsys):
    data = tmp_path / "any"
    shutil.copytree(photos / "train" / "ant", data)
    shutil.copytree(photos / "train" / "bee", data / "deep" / "down")
    (data / "deep" / "notes.txt").write_text("no image")
    (data / "deep" / "broken.jpg").write_bytes(b"no image")
    with pytest.warns(UserWarning, match="broken.jpg, the next one is taken"):
        main(*TINY, "--data", data, "--teacher", teacher, "--epochs", 1, "--out", tmp_path / "a",
             "--batch-size", 65)
    out = capsys.readouterr().out
    assert "65 images below" in out and "knn20" not in out
    with pytest.raises(SystemExit, match="more than the 6 training images"):
        main(*TINY, "--data", data, "--data-fraction", 0.1, "--teacher", teacher, "--out",
             tmp_path / "b")


def test_visualize_draws_image_teacher_and_student(teacher, photos, tmp_path):
    arch = {"image_size": 16, "patch_size": 4, "dim": 24, "depth": 1, "num_heads": 3}
    student = attndistill.ViT(**arch, num_classes=0)
    common.save_checkpoint(tmp_path / "student.pth", model=student.state_dict(), arch=arch,
                           script="attndistill")
    images = sorted((photos / "val" / "ant").iterdir())[:2]
    words = ["--teacher", teacher, "--image-size", 32, "--out", tmp_path]
    main("--visualize", *images, *words)
    picture = np.asarray(Image.open(tmp_path / "attention.png"))[..., 0]
    assert picture.shape == (2 * 34 + 2, 10 * 34 + 2)  # the image, 1 + 4 maps, 1 + 3 maps
    image = common.val_transform(32)(Image.open(images[1]))[None]
    vit = attndistill.load_teacher(f"{tmp_path}/student.pth", image_size=32)
    attn = vit.class_token_and_attention(image)[1][0, 2, 1:]
    assert picture[36:68:4, 308:340:4].argmax() == attn.argmax()  # the last map
    with pytest.raises(SystemExit, match="--visualize: .*no.jpg"):
        main("--visualize", "no.jpg", *words)
