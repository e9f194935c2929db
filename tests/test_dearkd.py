"""dearkd.py: convolution by attention, hints, CNN teachers, the two stages, images from weights."""

import contextlib
import copy
import inspect
import math
import re
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DATA,
    ROOT,
    SMALL,
    cnn_beside,
    error_of,
    flags,
    float64_vit,
    main,
    plain,
    prefixed,
    records,
    student,
)
from PIL import Image
from torch import nn

import common
import dearkd

sys.path.append(str(ROOT / "tests" / "evidence"))
import attention_distance

# ------------------------------------------------------------------ MHCA


def test_no_position_weight_is_plain_attention():
    conv = dearkd.ConvAttention(24, 3, 4, 2)
    conv.pos_weight.data.zero_()
    plain_attention = dearkd.Attention(24, 3)
    shared = {k: v for k, v in conv.state_dict().items() if k != "pos_weight"}
    plain_attention.load_state_dict(shared)
    x = torch.randn(2, 18, 24)
    assert torch.allclose(conv.eval()(x), plain_attention(x), atol=1e-6)
    assert torch.allclose(conv.train()(x), plain_attention(x), atol=1e-6)  # dropout of zero is zero


def test_nine_sharp_heads_are_a_3x3_convolution():
    """Zero content and pos_weight of -a |d - c|^2 with a large a: each head is a shift by its c."""
    g = 6
    D = 27
    attention = dearkd.ConvAttention(D, 9, g, 0).double().eval()
    attention.pos_weight.data *= 1e3
    attention.qkv.weight.data[:2 * D] = 0
    attention.qkv.bias.data[:2 * D] = 0
    x = torch.randn(2, g * g, D).double()

    # The same as a convolution: kernel[i, j] = sum of the head with offset (i - 1, j - 1)
    c = (attention.pos_weight[:, 1:] / 2e3).round().int()
    assert sorted(map(tuple, c.tolist())) == [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    assert c.square().sum(1).tolist() == [0, 1, 1, 1, 1, 2, 2, 2, 2]
    W_v = attention.qkv.weight[2 * D:]
    b_v = attention.qkv.bias[2 * D:]
    W_out = attention.proj.weight
    kernel = torch.zeros(D, D, 3, 3).double()
    bias = attention.proj.bias
    for h in range(9):
        rows = slice(3 * h, 3 * h + 3)
        kernel[:, :, c[h, 0] + 1, c[h, 1] + 1] += W_out[:, rows] @ W_v[rows]
        bias = bias + W_out[:, rows] @ b_v[rows]
    expected = F.conv2d(x.transpose(1, 2).view(2, D, g, g), kernel, bias)   # interior: no padding
    found = attention(x).transpose(1, 2).view(2, D, g, g)[:, :, 1:-1, 1:-1]
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_position_term_in_closed_form():
    attention = dearkd.ConvAttention(12, 3, 4, 2).eval()
    nn.init.normal_(attention.pos_weight)
    term = attention.position_term()
    assert term.shape == (3, 18, 18)
    assert (term[:, :2] == 0).all() and (term[:, :, :2] == 0).all()  # class and distillation token
    row, column = np.divmod(np.arange(16), 4)
    d1 = row[None, :] - row[:, None]  # from the query to the key
    d2 = column[None, :] - column[:, None]
    for h in range(3):
        v0, v1, v2 = attention.pos_weight[h].tolist()
        expected = v0 * (d1**2 + d2**2) + v1 * d1 + v2 * d2
        assert np.allclose(term[h, 2:, 2:].detach().numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("grid", [8, 14])
def test_dropout_keeps_attention_in_the_neighbourhood(grid):
    """Its mass within the 3 x 3 neighbourhood of inner patches: in training at least 0.8 of it."""
    attention = dearkd.ConvAttention(48, 3, grid, 2)
    index = torch.arange(grid)
    position = torch.cartesian_prod(index, index)
    near = (position[:, None] - position[None]).abs().amax(2) <= 1          # (N, N)
    inner = ((position > 0) & (position < grid - 1)).all(1)

    def mass():  # with zero content
        a = attention.position_term().softmax(2)[:, 2:, 2:]
        return (a * near).sum(2)[:, inner].mean().item()

    attention.eval()
    in_evaluation = mass()
    attention.train()
    in_training = sum(mass() for _ in range(200)) / 200
    assert in_evaluation > 0.55
    assert in_training >= 0.8 * in_evaluation


def test_dropout_strikes_each_head_by_a_draw_of_its_own():
    attention = dearkd.ConvAttention(24, 3, 2, 2, pos_dropout=0.1)
    struck = torch.stack([attention.position_term().abs().amax((1, 2)) == 0 for _ in range(1000)])
    assert ((struck.float().mean(0) - 0.1).abs() < 0.04).all()
    assert not (struck.all(1) == struck.any(1)).all()
    kept = attention.position_term()[:, 2:, 2:].amin((1, 2))
    assert set(kept.tolist()) <= {0.0, *attention.eval().position_term().amin((1, 2)).tolist()}


# ------------------------------------------------------------------ the losses


def test_aligner_equals_float64():
    aligner = dearkd.Aligner(12, 20)
    tokens = torch.randn(2, 25, 12)
    p = {name: tensor.double() for name, tensor in aligner.state_dict().items()}
    padded = F.pad(tokens.double().view(2, 5, 5, 12), (0, 0, 1, 1, 1, 1))
    x = p["depthwise.bias"]
    for i in range(3):
        for j in range(3):
            x = x + padded[:, i:i + 5, j:j + 5] * p["depthwise.weight"][:, 0, i, j]
    x = x - x.mean(3, keepdim=True)
    x = x / (x.square().mean(3, keepdim=True) + 1e-6).sqrt()
    x = x * p["norm.weight"] + p["norm.bias"]
    x = x @ p["linear.weight"].T + p["linear.bias"]
    x = x * (1 + torch.erf(x / math.sqrt(2))) / 2
    found = aligner(tokens)
    assert found.shape == (2, 20, 5, 5)
    assert torch.allclose(found.permute(0, 2, 3, 1).double(), x, atol=1e-5)


def test_hint_loss_averages_a_larger_map_of_the_cnn():
    small = torch.randn(2, 3, 4, 4)
    large = torch.randn(2, 3, 12, 12)
    means = large.double().view(2, 3, 4, 3, 4, 3).mean((3, 5))
    expected = (small.double() - means).square().mean().item()
    assert dearkd.hint_loss(small, large).item() == pytest.approx(expected, rel=1e-5)
    assert dearkd.hint_loss(small, large.bfloat16()).dtype == torch.float32


def test_hint_loss_refuses_maps_that_are_not_square():
    square, wide = torch.zeros(2, 5, 8, 8), torch.zeros(2, 5, 4, 16)
    for maps in ((square, wide), (wide, square)):
        with pytest.raises(ValueError, match=r"\(2, 5, 4, 16\): it must be square"):
            dearkd.hint_loss(*maps)


def test_hint_loss_enlarges_a_smaller_map_of_the_cnn():
    ramp = torch.arange(4.0).expand(1, 1, 4, 4)
    row = torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])
    assert dearkd.hint_loss(row.expand(1, 1, 8, 8), ramp).item() == pytest.approx(0, abs=1e-12)


def float64_soft_loss(student_logits, teacher_logits, T):
    """T^2 * mean over images of sum_i p_t(i) log(p_t(i) / p_s(i)), p = softmax(logits / T)."""
    def softmax(logits):
        weights = np.exp(np.array(logits) / T)
        return weights / weights.sum()

    total = 0.0
    for s, t in zip(student_logits.double().tolist(), teacher_logits.double().tolist()):
        p_s = softmax(s)
        p_t = softmax(t)
        total += T**2 * (p_t * np.log(p_t / p_s)).sum()
    return total / len(student_logits)


@pytest.mark.parametrize("T", [1.0, 4.0, 0.5])
def test_soft_loss_equals_float64(T):
    student_logits = 3 * torch.randn(6, 10)
    teacher_logits = 3 * torch.randn(6, 10)
    expected = float64_soft_loss(student_logits, teacher_logits, T)
    found = dearkd.soft_loss(student_logits, teacher_logits, T)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    assert dearkd.soft_loss(teacher_logits, teacher_logits, T).item() == pytest.approx(0, abs=1e-6)
    assert dearkd.soft_loss(student_logits.half(), teacher_logits, T).dtype == torch.float32


# ------------------------------------------------------------------ the ViT


def test_vit_returns_a_pair_in_training_and_the_mean_in_evaluation():
    model = dearkd.ViT(16, 4, 24, 3, 3, 5, mhca_blocks=2, pos_dropout=0.0)
    images = torch.randn(2, 3, 16, 16)
    cls_logits, dist_logits = model(images)
    assert cls_logits.shape == dist_logits.shape == (2, 5)
    assert not torch.equal(cls_logits, dist_logits)
    assert torch.allclose(model.eval()(images), (cls_logits + dist_logits) / 2, atol=1e-6)


def test_vit_without_classes_returns_the_normed_class_token():
    model = dearkd.ViT(16, 4, 24, 2, 3, num_classes=0)
    seen = []
    model.norm.register_forward_hook(lambda module, given, output: seen.append(output))
    images = torch.randn(2, 3, 16, 16)
    for vit in (model.train(), model.eval()):
        assert torch.equal(vit(images), seen[-1][:, 0])


def test_features_are_the_patch_tokens_after_the_blocks_that_were_asked_for():
    model = dearkd.ViT(16, 4, 24, 3, 3, 5, mhca_blocks=2)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, given, output: seen.append(output))
    hidden, _ = model.features(torch.randn(2, 3, 16, 16), (0, 2))
    assert hidden.keys() == {0, 2}
    assert all(torch.equal(tokens, seen[i][:, 2:]) for i, tokens in hidden.items())


def test_only_the_first_blocks_have_mhca():
    names = set(dearkd.ViT(16, 4, 24, 3, 3, 5, mhca_blocks=2).state_dict())
    assert {"blocks.0.attn.pos_weight", "blocks.1.attn.pos_weight"} <= names
    assert "blocks.2.attn.pos_weight" not in names
    assert not any(name.endswith(".r") for name in names)


def test_attention_distance_in_closed_form():
    model = dearkd.ViT(16, 4, 24, 2, 3, 5, mhca_blocks=1).eval()
    for block in model.blocks:  # zero content: uniform in block 1, Gaussians in block 0
        block.attn.qkv.weight.data[:48] = 0
        block.attn.qkv.bias.data[:48] = 0
    position = np.array([(i, j) for i in range(4) for j in range(4)], float)
    d = position[None] - position[:, None]
    length = np.sqrt((d**2).sum(2))
    found = attention_distance.attention_distance(model, torch.randn(3, 3, 16, 16)).numpy()
    assert found.shape == (2, 3)
    assert np.allclose(found[1], length.mean(), rtol=1e-5)
    for h, c in enumerate(model.blocks[0].attn.pos_weight.detach().numpy()[:, 1:] / 2):
        a = np.exp(-((d - c)**2).sum(2))
        a /= a.sum(1, keepdims=True)
        assert found[0, h] == pytest.approx((a * length).sum(1).mean(), rel=1e-5)


def test_attention_distance_prints_a_number_for_each_block(photos, tmp_path, capsys):
    arch = {"image_size": 16, "patch_size": 4, "dim": 24, "depth": 2, "num_heads": 3,
            "num_classes": 3, "mhca_blocks": 1}
    common.save_checkpoint(tmp_path / "student.pth", model=dearkd.ViT(**arch).state_dict(),
                           arch=arch, script="dearkd")
    attention_distance.main(tmp_path / "student.pth", photos / "val")
    names = [line.partition(": ")[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["block 0", "block 1"]


# ------------------------------------------------------------------ --init


def distilled_deit(num_classes=1000):
    """Return random weights with the names of a released DeiT-distilled, for 32 px at patch 4."""
    weights = plain(patch_size=4, grid=8)
    D = SMALL["dim"]
    weights["dist_token"] = torch.randn(1, 1, D)
    weights["pos_embed"] = torch.randn(1, 2 + 64, D)
    for head in ("head", "head_dist"):
        weights[f"{head}.weight"] = torch.randn(num_classes, D)
        weights[f"{head}.bias"] = torch.randn(num_classes)
    return weights


def float64_distilled_deit(weights, images):
    """The mean of both heads' logits. A token that is not read is a register to float64_vit."""
    patches = weights["pos_embed"][:, 2:]
    cls_token = weights["cls_token"], weights["pos_embed"][:, :1], "head"
    dist_token = weights["dist_token"], weights["pos_embed"][:, 1:2], "head_dist"
    total = 0
    for read, other in ((cls_token, dist_token), (dist_token, cls_token)):
        token, position, head = read
        vit = {name: tensor for name, tensor in weights.items() if name != "dist_token"}
        vit["cls_token"] = token
        vit["pos_embed"] = torch.cat([position, patches], 1)
        vit["register_tokens"] = other[0] + other[1]
        feature, _ = float64_vit(vit, images, SMALL["num_heads"])
        W = weights[f"{head}.weight"].double()
        total = total + feature @ W.T + weights[f"{head}.bias"].double()
    return total / 2


def vit_for(num_classes, mhca_blocks, image_size=32):
    return dearkd.ViT(image_size, 4, **SMALL, num_classes=num_classes, mhca_blocks=mhca_blocks)


@pytest.mark.parametrize("form", ["released", "in half precision", "with prefixes"])
def test_init_from_a_released_distilled_deit_computes_what_it_computes(form, tmp_path, capsys):
    weights = distilled_deit()
    images = torch.randn(2, 3, 32, 32)
    if form == "in half precision":
        weights = {name: tensor.half() for name, tensor in weights.items()}
    content = {"model": weights}
    if form == "with prefixes":
        content = {"state_dict": prefixed(weights, "module._orig_mod."), "epoch": 3}
    torch.save(content, tmp_path / "x.pth")
    vit = vit_for(1000, mhca_blocks=0)
    dearkd.load_init(vit, tmp_path / "x.pth")
    expected = float64_distilled_deit({name: x.float() for name, x in weights.items()}, images)
    torch.testing.assert_close(vit.double().eval()(images.double()), expected)
    assert capsys.readouterr().out == ""  # nothing is new


def test_init_of_a_student_with_mhca_leaves_its_position_weight_new(tmp_path, capsys):
    weights = distilled_deit()
    torch.save({"model": weights}, tmp_path / "x.pth")
    vit = vit_for(1000, mhca_blocks=2)
    new = {name: x.clone() for name, x in vit.state_dict().items() if name.endswith("pos_weight")}
    dearkd.load_init(vit, tmp_path / "x.pth")
    assert len(new) == 2
    for name, tensor in vit.state_dict().items():
        assert torch.equal(tensor, {**weights, **new}[name]), name
    assert "MHCA's pos_weight is new" in capsys.readouterr().out


def test_init_makes_both_heads_new_where_the_class_count_differs(tmp_path, capsys):
    weights = distilled_deit()
    torch.save({"model": weights}, tmp_path / "x.pth")
    vit = vit_for(7, mhca_blocks=0)
    before = {name: x.clone() for name, x in vit.state_dict().items() if name.startswith("head")}
    dearkd.load_init(vit, tmp_path / "x.pth")
    after = vit.state_dict()
    assert len(before) == 4
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(after["blocks.0.attn.qkv.weight"], weights["blocks.0.attn.qkv.weight"])
    assert "both heads are new" in capsys.readouterr().out


def test_init_resizes_positions_of_patches_alone(tmp_path):
    weights = distilled_deit()
    torch.save({"model": weights}, tmp_path / "x.pth")
    vit = vit_for(1000, mhca_blocks=0, image_size=48)
    dearkd.load_init(vit, tmp_path / "x.pth")
    grid = weights["pos_embed"][:, 2:].view(1, 8, 8, -1).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, (12, 12), mode="bicubic").flatten(2).transpose(1, 2)
    assert torch.equal(vit.pos_embed[:, :2], weights["pos_embed"][:, :2])
    assert torch.allclose(vit.pos_embed[:, 2:], expected, atol=1e-6)


def test_init_from_a_student_keeps_its_learned_position_weight(tmp_path):
    old = vit_for(5, mhca_blocks=2)
    nn.init.normal_(old.blocks[1].attn.pos_weight)
    common.save_checkpoint(tmp_path / "student.pth", model=old.state_dict(), arch={},
                           script="dearkd")
    vit = vit_for(5, mhca_blocks=2)
    dearkd.load_init(vit, tmp_path / "student.pth")
    assert all(torch.equal(x, old.state_dict()[name]) for name, x in vit.state_dict().items())


@pytest.mark.parametrize("change, message", [
    (lambda w: w.pop("dist_token"), "it lacks dist_token$"),
    (lambda w: w.update({"blocks.0.attn.pos_weight": torch.zeros(3, 3)}),
     "unexpected blocks.0.attn.pos_weight"),
    (lambda w: w.update({"norm.weight": torch.zeros(9)}), r"norm.weight \(9,\) instead of \(48,\)"),
    # Of a ViT without the distillation token
    (lambda w: w.update(pos_embed=torch.zeros(1, 10, 48)), r"pos_embed \(1, 10, 48\) instead of"),
])
def test_init_is_strict_otherwise(change, message, tmp_path):
    weights = distilled_deit()
    change(weights)
    torch.save({"model": weights}, tmp_path / "x.pth")
    with pytest.raises(common.InputError, match=message):
        dearkd.load_init(vit_for(1000, mhca_blocks=0), tmp_path / "x.pth")


# ------------------------------------------------------------------ the teacher


@pytest.mark.parametrize("name, modules", [
    ("cifar_resnet20", ["layer1", "layer2", "layer3"]),
    ("resnet18", ["layer1", "layer2", "layer3", "layer4"]),
    ("regnet_y_400mf", [f"trunk_output.block{i}" for i in (1, 2, 3, 4)])])
def test_a_teacher_gives_the_maps_of_its_stages(name, modules):
    cnn = dearkd.make_cnn(name, 10).eval()
    teacher = dearkd.Teacher(copy.deepcopy(cnn))
    seen = []
    for module in modules:
        cnn.get_submodule(module).register_forward_hook(lambda m, given, out: seen.append(out))
    images = torch.randn(2, 3, 64, 64)
    logits = cnn(images)
    maps, teacher_logits = teacher.features(images)
    assert len(maps) == len(seen) == len(modules)
    for found, expected in zip(maps, seen):
        assert torch.allclose(found, expected, atol=1e-4)
        assert found.min() >= 0  # after a ReLU
    sizes = [found.shape[-1] for found in maps]
    assert sizes == sorted(sizes, reverse=True)
    assert torch.allclose(teacher_logits, logits, atol=1e-5)
    assert torch.equal(teacher(images), teacher_logits)
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())


# What people save: a CNN's weights, other weights that must not be taken
CNN_FILES = {
    "as released": lambda w, other: w,
    "torchvision's training": lambda w, other: {
        "model": other, "model_ema": {"n_averaged": torch.tensor(7), **prefixed(w, "module.")},
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}}, "epoch": 3},
    "DistributedDataParallel": lambda w, other: {"state_dict": prefixed(w, "module.")},
    "Lightning": lambda w, other: {
        "state_dict": {**prefixed(w, "model."), "criterion.weight": torch.zeros(3)}},
    "half precision": lambda w, other: {name: tensor.half() for name, tensor in w.items()},
    "before torch 0.4.1": lambda w, other: {
        name: tensor for name, tensor in w.items() if not name.endswith("num_batches_tracked")},
}


@pytest.mark.parametrize("name, form", [
    *(("cifar_resnet20", form) for form in CNN_FILES),
    ("resnet18", "torchvision's training"), ("regnet_x_400mf", "torchvision's training")])
def test_cnns_load_from_other_peoples_files(name, form, tmp_path):
    cnn = dearkd.make_cnn(name, 10).eval()
    weights = cnn.state_dict()
    other = {key: tensor + 1 for key, tensor in weights.items()}
    torch.save(CNN_FILES[form](weights, other), tmp_path / "cnn.pth")
    images = torch.randn(2, 3, 32, 32)
    if form == "half precision":
        cnn.load_state_dict({key: tensor.half() for key, tensor in weights.items()})
    teacher = dearkd.load_teacher(name, tmp_path / "cnn.pth", num_classes=10)
    torch.testing.assert_close(teacher(images), cnn(images), rtol=1e-4, atol=1e-5)


def test_a_teacher_has_as_many_classes_as_its_weights_if_none_are_given(teacher):
    assert dearkd.load_teacher(str(cnn_beside(teacher)), None, None).num_classes == 10


@pytest.mark.parametrize("name, content, message", [
    ("vgg16", None, "unknown teacher vgg16: choose cifar_resnet20, .*resnet50, .*student.pth"),
    ("cifar_resnet56", None, "cifar_resnet56 has no download: give its file as --teacher-weights"),
    ("resnet18", {"conv1.weight": torch.zeros(3)}, "no network with a layer1.0.conv1.weight"),
    ("resnet18", {"layer1.0.conv1.weight": torch.zeros(3)}, "has no fc.bias: .* a classifier"),
    ("resnet18", {"layer1.0.conv1.weight": torch.zeros(3), "fc.bias": torch.zeros(7)},
     "another model: it lacks conv1.weight, bn1.weight, bn1.bias, ... .*sizes: layer1.0.conv1"),
    ("regnet_y_400mf", {"stem.0.weight": torch.zeros(3), "fc.bias": torch.zeros(1000)},
     "the teacher has 1000 classes, the data 7: fine-tune it on the data by --train-teacher "
     "regnet_y_400mf --init .*cnn.pth"),
])
def test_wrong_teachers_say_what_is_wrong(name, content, message, tmp_path):
    weights = tmp_path / "cnn.pth" if content else None
    if content:
        torch.save(content, weights)
    with pytest.raises(common.InputError, match=message):
        dearkd.load_teacher(name, weights, num_classes=7)


def test_a_path_must_be_of_train_teacher(teacher):
    with pytest.raises(common.InputError, match="is not a student.pth of --train-teacher"):
        dearkd.load_teacher(str(teacher))
    with pytest.raises(common.InputError, match="is a file already: leave out --teacher-weights"):
        dearkd.load_teacher(str(cnn_beside(teacher)), "other.pth")
    with pytest.raises(common.InputError, match="the teacher has 10 classes, the data 7"):
        dearkd.load_teacher(str(cnn_beside(teacher)), num_classes=7)


def test_a_real_cnn_recognises_real_images():
    """Real weights and JPEGs of CIFAR-10: 83.2 % of all 10,000 are right; here every 40th."""
    photos = DATA / "cifar10_val.zip"
    weights = DATA / "cifar_resnet56.pth"
    if not (photos.exists() and weights.exists()):
        pytest.skip(f"no {photos} or {weights}")
    transform = common.train_transform(32, (1, 1))
    images = []
    classes = []
    with zipfile.ZipFile(photos) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        for name in names[::40]:
            with archive.open(name) as file:
                images.append(transform(Image.open(file)))
            classes.append(name.split("/")[-2])
    labels = torch.tensor([sorted(set(classes)).index(name) for name in classes])
    teacher = dearkd.load_teacher("cifar_resnet56", weights, 10)
    right = teacher(torch.stack(images)).argmax(1) == labels
    assert len(right) == 250
    assert 0.76 < right.float().mean() < 0.90  # within three deviations of 250 draws


# ------------------------------------------------------------------ training


@pytest.fixture
def distillation():
    """(Distillation, its two aligners, images, labels, what the teacher's features() returns)."""
    vit = dearkd.ViT(16, 4, 24, 3, 3, 10, mhca_blocks=2, pos_dropout=0.0)
    aligners = nn.ModuleList([dearkd.Aligner(24, 16), dearkd.Aligner(24, 64)])
    model = dearkd.Distillation(vit, aligners, [(0, 1), (1, 3)], 0.3, 2.0, 0.1)
    teacher = dearkd.Teacher(dearkd.make_cnn("cifar_resnet20", 10))
    images = torch.randn(4, 3, 16, 16)
    return model, images, torch.tensor([0, 1, 2, 3]), teacher.features(images)


def float64_ce(logits, target, smoothing):
    log_p = logits.double().log_softmax(1)
    right = log_p[torch.arange(len(target)), target]
    return -((1 - smoothing) * right + smoothing * log_p.mean(1)).mean().item()


def test_stage_1_is_the_labels_the_cnns_class_and_its_maps(distillation):
    model, images, target, teacher_features = distillation
    maps, logits = teacher_features
    losses = model(images, target, teacher_features)
    hidden, (cls_logits, dist_logits) = model.student.features(images, (0, 1))
    hints = [dearkd.hint_loss(model.aligners[0](hidden[0]), maps[0]),
             (model.aligners[1](hidden[1]) - maps[2]).square().mean()]  # both are 4 x 4
    assert losses.keys() == {"ce", "logits", "hints"}
    assert losses["ce"].item() == pytest.approx(0.7 * float64_ce(cls_logits, target, 0.1), rel=1e-5)
    assert losses["logits"].item() == pytest.approx(
        0.3 * float64_ce(dist_logits, logits.argmax(1), 0), rel=1e-5)
    assert losses["hints"].item() == pytest.approx(2 * sum(hints).item(), rel=1e-5)
    sum(losses.values()).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_stage_2_is_the_labels_for_both_heads(distillation):
    model, images, target, _ = distillation
    _, (cls_logits, dist_logits) = model.student.features(images)
    losses = model(images, target, None)
    ce = (float64_ce(cls_logits, target, 0.1) + float64_ce(dist_logits, target, 0.1)) / 2
    assert losses.keys() == {"ce"}
    assert losses["ce"].item() == pytest.approx(ce, rel=1e-5)
    losses["ce"].backward()
    assert all(p.grad is None for p in model.aligners.parameters())
    assert all(p.grad.abs().sum() > 0 for p in model.student.parameters())


def test_soft_labels_replace_the_cnns_class_for_both_heads(distillation):
    model, images, target, (maps, logits) = distillation
    teacher_features = maps, 20 * logits  # those of random weights are nearly uniform
    hard = model(images, target, teacher_features)
    model.soft = 4.0
    soft = model(images, target, teacher_features)
    _, (cls_logits, dist_logits) = model.student.features(images)
    cls_kl = float64_soft_loss(cls_logits, 20 * logits, 4.0)
    dist_kl = float64_soft_loss(dist_logits, 20 * logits, 4.0)
    assert soft["logits"].item() == pytest.approx(0.3 * (cls_kl + dist_kl) / 2, rel=1e-5)
    assert soft["ce"].item() == hard["ce"].item()
    assert soft["hints"].item() == hard["hints"].item()


def test_alpha_1_learns_from_soft_labels_alone(distillation):
    model, images, target, teacher_features = distillation
    model.soft = 4.0
    model.alpha = 1.0
    losses = model(images, target, teacher_features)
    assert losses["ce"].item() == 0
    model.zero_grad()
    losses["logits"].backward()
    assert all(p.grad.abs().sum() > 0 for p in model.student.parameters())


@pytest.mark.parametrize("soft, expected", [([], []), (["--soft", 0], []), (["--soft", 4], [4.0])])
def test_a_run_with_soft_labels(soft, expected, teacher, tmp_path, monkeypatch):
    temperatures = []
    soft_loss = dearkd.soft_loss

    def remember(student_logits, teacher_logits, temperature):
        temperatures.append(temperature)
        return soft_loss(student_logits, teacher_logits, temperature)

    monkeypatch.setattr(dearkd, "soft_loss", remember)
    main("dearkd", *flags("dearkd", teacher, tmp_path / "soft", "--epochs", 2, "--stage1-epochs", 1,
                          *soft, "--alpha", 1, "--hints", "none", "--data-fraction", 0.25))
    record = records(tmp_path / "soft")[0]  # stage 1
    assert record["ce"] == 0
    assert record["logits"] > 0
    assert "hints" not in record
    assert temperatures == expected * 4  # two heads, two steps


@pytest.fixture
def seen_teacher(monkeypatch):
    """A list: (the teacher that a run loads, its weights then), a 0 for each call in training."""
    seen = []
    load = dearkd.load_teacher

    def note_call(*_):
        if not torch.is_inference_mode_enabled():  # the case while it is validated
            seen.append(0)

    def load_and_remember(*arguments):
        loaded = load(*arguments)
        loaded.cnn.register_forward_hook(note_call)
        seen.append((loaded, copy.deepcopy(loaded.state_dict())))
        return loaded

    monkeypatch.setattr(dearkd, "load_teacher", load_and_remember)
    return seen


def test_the_teacher_rests_in_stage_2_and_stays_the_same_bits(teacher, tmp_path, seen_teacher):
    main("dearkd", *flags("dearkd", teacher, tmp_path, "--epochs", 4, "--stage1-epochs", 2,
                          "--data-fraction", 0.25))
    (loaded, before), *calls = seen_teacher
    assert all(torch.equal(x, before[name]) for name, x in loaded.state_dict().items())
    assert len(calls) == 1 + 2 * 2  # the shapes of its maps; two epochs of two steps
    log = records(tmp_path)
    assert [record["stage"] for record in log] == [1, 1, 2, 2]
    assert ["hints" in record for record in log] == [True, True, False, False]
    assert ["top1" in record for record in log] == [False, True, False, True]


@pytest.mark.parametrize("more, message", [
    (["--hints", "1:9"], "--hints 1:9: there are blocks 0 to 5 and stages 1 to 3"),
    (["--hints", "6:1"], "--hints 6:1: there are blocks 0 to 5 and stages 1 to 3"),
    (["--hints", "1:0"], "--hints 1:0: there are blocks 0 to 5 and stages 1 to 3"),
    (["--hints", "early"], "--hints early: write block:stage,block:stage,... or none"),
    (["--stage1-epochs", 3], "--stage1-epochs 3 is more than --epochs 2"),
    (["--alpha", 1, "--stage1-epochs", 2], "--alpha 1 without a second stage"),
    (["--mhca-blocks", 7], "--mhca-blocks 7: micro has 6 blocks"),
    (["--images-per-batch", 6], "--images-per-batch must be 7 or more"),
    (["--train-teacher", "resnet18", "--accum", 2], "--train-teacher takes no --accum"),
    (["--train-teacher", "resnet18", "--teacher-weights", "x.pth"],
     "--train-teacher takes no --teacher-weights: give its first weights as --init"),
    (["--train-teacher", "resnet18", "--batch-size", 1],
     "--batch-size 1: BatchNorm needs two images or more in each process"),
    (["--synthesize", "x", "--teacher", "none"], "--synthesize needs a --teacher"),
    (["--synthesize", "x", "--amp", "fp16"], "--amp fp16 is too coarse"),
    (["--synthesize", "x", "--train-teacher", "resnet18"],
     "--train-teacher and --synthesize are different tasks"),
    (["--demo", "--demo-data-free"], "--demo and --demo-data-free are different tasks"),
    (["--synthesize", "x", "--val", "."], "the teacher has 10 classes, --val . 0"),
    (["--synthesize", "x", "--val", "nowhere"], "--val nowhere: .*No such file"),
])
def test_wrong_input_is_one_line(more, message, teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = error_of("dearkd", *flags("dearkd", teacher, tmp_path / "run", *more))
    assert re.search(message, said), said


# ------------------------------------------------------------------ --train-teacher


@pytest.fixture
def cnn_flags(photos):
    return ["--train-teacher", "cifar_resnet20", "--data", photos, "--image-size", 16, "--workers",
            0, "--batch-size", 16, "--lr", 3e-3, "--amp", "off"]


def test_a_cnn_is_trained_and_becomes_a_teacher(teacher, photos, cnn_flags, tmp_path, capsys):
    main("dearkd", *cnn_flags, "--epochs", 6, "--log-every", 3, "--eval-every", 6, "--out",
         tmp_path / "cnn")
    log = records(tmp_path / "cnn")
    assert log[-1]["ce"] < log[0]["ce"]
    assert log[-1]["top1"] > 50
    assert "epoch 6/6  step 6/6  loss" in capsys.readouterr().out
    main("dearkd", *flags("dearkd", teacher, tmp_path / "vit", "--data", photos, "--epochs", 1,
                          "--teacher", tmp_path / "cnn" / "student.pth"))
    assert len(student(tmp_path / "vit")["head.bias"]) == 3
    top1 = log[-1]["top1"]
    assert f"top-1 {top1:.1f} % on the validation images" in capsys.readouterr().out


def test_a_cnn_that_was_interrupted_and_resumed_equals_an_uninterrupted_one(
        cnn_flags, tmp_path, monkeypatch):
    main("dearkd", *cnn_flags, "--epochs", 2, "--out", tmp_path / "a")
    save = common.save_checkpoint

    def save_and_stop(path, **state):
        save(path, **state)
        if str(path).endswith("last.pth"):
            raise KeyboardInterrupt

    words = [*cnn_flags, "--epochs", 2, "--out", tmp_path / "b"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common, "save_checkpoint", save_and_stop)
        main("dearkd", *words)
    assert len(records(tmp_path / "b")) == 1
    main("dearkd", *words, "--resume")
    assert len(records(tmp_path / "b")) == 2
    a = student(tmp_path / "a")
    assert all(torch.equal(x, a[name]) for name, x in student(tmp_path / "b").items())


@pytest.mark.parametrize("num_classes", [3, 1000])
def test_a_cnn_starts_from_init(num_classes, cnn_flags, tmp_path, capsys):
    torch.manual_seed(5)  # not the run's seed
    weights = dearkd.make_cnn("cifar_resnet20", num_classes).state_dict()
    torch.save({"state_dict": prefixed(weights, "module.")}, tmp_path / "init.pth")
    main("dearkd", *cnn_flags, "--epochs", 1, "--lr", 0, "--weight-decay", 0, "--init",
         tmp_path / "init.pth", "--out", tmp_path / "run")
    is_new = "the classifier is new" in capsys.readouterr().out
    assert is_new == (num_classes == 1000)
    for name, tensor in student(tmp_path / "run").items():
        if name == "linear.weight":
            assert len(tensor) == 3
            assert torch.equal(tensor, weights[name][:3]) != is_new
        elif not name.startswith(("linear", "bn")) and ".bn" not in name:
            assert torch.equal(tensor, weights[name]), name


def test_init_of_another_cnn_is_one_line(cnn_flags, tmp_path):
    torch.save(dearkd.make_cnn("cifar_resnet32", 3).state_dict(), tmp_path / "init.pth")
    said = error_of("dearkd", *cnn_flags, "--init", tmp_path / "init.pth", "--out", tmp_path)
    assert "another model: it has unexpected layer1.3.conv1.weight" in said


@pytest.mark.parametrize("bad_calls, skipped", [((2, 3), 2), (range(1, 99), None)])
def test_a_cnn_skips_steps_without_finite_gradients_but_not_20_in_a_row(
        bad_calls, skipped, cnn_flags, tmp_path, monkeypatch):
    forward = dearkd.CifarResNet.forward
    calls = []

    def with_nan(self, x):
        if not self.training:
            return forward(self, x)
        calls.append(0)
        # Into the network, not out of it: BatchNorm's averages must not keep the NaN
        return forward(self, x * (math.nan if len(calls) in bad_calls else 1))

    monkeypatch.setattr(dearkd.CifarResNet, "forward", with_nan)
    words = [*cnn_flags, "--epochs", 2, "--batch-size", 4, "--data-fraction", 0.9, "--out", tmp_path]
    if skipped is None:
        assert "20 steps in a row had no finite gradients" in error_of("dearkd", *words)
        assert len(calls) == 20
    else:
        main("dearkd", *words)
        assert [record["skipped_steps"] for record in records(tmp_path)] == [skipped, 0]
        assert all(x.isfinite().all() for x in student(tmp_path).values())


# ------------------------------------------------------------------ the terms of DF-DearKD


def small_cnn(num_classes=4):
    """Return a teacher whose BatchNorms have statistics that are not those of a new layer."""
    torch.manual_seed(3)
    cnn = dearkd.make_cnn("cifar_resnet20", num_classes)
    for layer in cnn.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    return dearkd.Teacher(cnn)


def brute_force_divergence(features, labels):
    f = np.asarray(features, float)
    f = f / np.sqrt((f**2).sum(1, keepdims=True))
    terms = []
    for i in range(len(f)):
        d = [math.dist(f[i], f[j]) for j in range(len(f)) if j != i and labels[i] == labels[j]]
        if len(d) >= 2:
            terms.append(max(d) - min(d))
    return sum(terms) / len(terms) if terms else 0.0


@pytest.mark.parametrize("labels", [[0] * 6 + [1] * 5 + [2] * 2 + [3], [0, 1, 0, 1, 0, 1, 1, 2],
                                    [0, 1, 2], [0, 0, 1, 1]])
def test_intra_divergence_equals_brute_force(labels):
    features = torch.randn(len(labels), 7, dtype=torch.float64) * 5
    loss = dearkd.intra_divergence_loss(features, torch.tensor(labels))
    assert loss.item() == pytest.approx(brute_force_divergence(features, labels), abs=1e-6)
    coarse = features.bfloat16()  # as a CNN gives them under autocast
    loss = dearkd.intra_divergence_loss(coarse, torch.tensor(labels))
    assert loss.item() == pytest.approx(brute_force_divergence(coarse.double(), labels), abs=1e-6)


def test_intra_divergence_of_equal_features_has_finite_gradients():
    copies = torch.ones(4, 3, requires_grad=True)  # no direction between them
    dearkd.intra_divergence_loss(copies, torch.zeros(4, dtype=torch.long)).backward()
    assert copies.grad.isfinite().all()


@pytest.fixture
def norm_and_its_images():
    """A BatchNorm, and images that have its mean and variance."""
    norm = nn.BatchNorm2d(3).eval()
    norm.running_mean.copy_(torch.tensor([1.0, -2.0, 30.0]))
    norm.running_var.copy_(torch.tensor([4.0, 0.25, 9.0]))
    x = torch.randn(64, 3, 32, 32) * norm.running_var.sqrt()[:, None, None]
    return norm, x + norm.running_mean[:, None, None]


@pytest.mark.parametrize("change", [lambda x: x, lambda x: x * 0.5 + 1,
                                    lambda x: (x * 0.5).to(memory_format=torch.channels_last)])
def test_batch_norm_loss_in_closed_form(change, norm_and_its_images):
    norm, x = norm_and_its_images
    images = change(x)
    pixels = images.double().transpose(0, 1).flatten(1).numpy()
    expected = (np.linalg.norm(pixels.mean(1) - norm.running_mean.numpy())
                + np.linalg.norm(pixels.var(1) - norm.running_var.numpy()))
    found = dearkd.batch_norm_loss({norm: images, nn.BatchNorm2d(3): x * 0}, 7.0).item()
    assert found == pytest.approx(7 * expected + math.sqrt(3), rel=1e-3, abs=0.02)


def test_batch_norm_loss_is_near_zero_on_its_own_statistics(norm_and_its_images):
    norm, x = norm_and_its_images
    assert dearkd.batch_norm_loss({norm: x}, 1.0) < 0.2
    assert dearkd.batch_norm_loss({norm: x * 0.5}, 1.0) > 10


# ------------------------------------------------------------------ synthesis


def float64_objective(model, images, labels, settings, roll, flip):
    """The objective, written out, of images that were rolled and flipped so."""
    half, tv, l2, bn, divergence = settings
    x = F.avg_pool2d(images, 2) if half else images
    x = torch.roll(x, roll, (2, 3))
    if flip:
        x = x.flip(3)
    seen = []
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_hook(lambda layer, given, _: seen.append((layer, given[0])))
    maps, logits = model.features(x)
    loss = -logits.log_softmax(1)[torch.arange(8), labels].mean()
    for kernel in ([[1, -1]], [[1], [-1]], [[1, 0], [0, -1]], [[0, 1], [-1, 0]]):  # neighbours
        loss = loss + tv * F.conv2d(x.flatten(0, 1)[:, None], x.new_tensor([[kernel]])).norm()
    loss = loss + l2 * x.flatten(1).square().sum(1).sqrt().mean()
    for i, (layer, given) in enumerate(seen):
        mu = given.mean((0, 2, 3))
        var = given.var((0, 2, 3), correction=0)
        distance = (mu - layer.running_mean).norm() + (var - layer.running_var).norm()
        loss = loss + bn * (10 if i == 0 else 1) * distance
    features = F.normalize(maps[-1].mean((2, 3)), dim=1)
    for i in range(6):  # labels 0 and 1 have two class-mates
        d = [(features[i] - features[j]).norm() for j in range(6) if i != j and i // 3 == j // 3]
        loss = loss + divergence * (max(d).detach() - min(d)) / 6
    return loss


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("tv, l2, bn, divergence", [
    (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 30), (0.3, 0.2, 0.5, 7)])
def test_first_step_follows_the_gradient_of_the_written_out_objective(half, tv, l2, bn, divergence):
    """Adam's first step is the rate times the gradient's sign: compare both, pixel by pixel."""
    model = small_cnn()
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    seed = 5 if half else 7  # seed 7 flips
    settings = {**dearkd.CIFAR, "half_steps": int(half), "steps": int(not half), "image_lr": 1e-3,
                "tv": tv, "l2": l2, "bn": bn, "divergence": divergence, "jitter": 4}
    found = dearkd.synthesize(model, labels, 16, **settings, seed=seed)

    # The same random numbers: noise, roll, flip
    generator = torch.Generator().manual_seed(seed)
    low = -torch.tensor(common.MEAN)[:, None, None] / torch.tensor(common.STD)[:, None, None]
    high = low + 1 / torch.tensor(common.STD)[:, None, None]
    noise = torch.randn(8, 3, 16, 16, generator=generator).clamp(low, high)
    max_shift = 2 if half else 4
    roll = torch.randint(-max_shift, max_shift + 1, (2,), generator=generator).tolist()
    flip = torch.rand((), generator=generator) < 0.5
    images = noise.double().requires_grad_()
    loss = float64_objective(model.double(), images, labels, (half, tv, l2, bn, divergence), roll,
                             flip)
    gradient, = torch.autograd.grad(loss, images)

    moved = (found - noise).double()
    clear = (gradient.abs() > 1e-3 * gradient.abs().mean()) & (moved != 0)
    assert clear.float().mean() > 0.5  # the others are at the limits of the range
    assert (moved.sign() == -gradient.sign())[clear].float().mean() > 0.995
    # The only step is at 0.5 of 1; warm-up ended at 0.1, then the rate falls as a cosine
    rate = 1e-3 * (1 + math.cos(math.pi * 0.4 / 0.9)) / 2
    assert moved[clear].abs().median().item() == pytest.approx(rate, rel=1e-3)
    assert (found >= low - 1e-6).all() and (found <= high + 1e-6).all()


def test_both_sizes_have_an_optimizer_with_the_given_momenta(monkeypatch):
    made = []

    class Adam(torch.optim.Adam):
        def __init__(self, *arguments):
            made.append(arguments[1:])
            super().__init__(*arguments)

    monkeypatch.setattr(torch.optim, "Adam", Adam)
    settings = {**dearkd.CIFAR, "half_steps": 1, "steps": 1, "betas": (0.3, 0.6)}
    dearkd.synthesize(small_cnn(), torch.tensor([0, 1]), 16, **settings)
    assert made == [(0.1, (0.3, 0.6))] * 2


def test_synthesis_is_seeded():
    model = small_cnn()
    labels = torch.tensor([0, 1, 2, 3])
    settings = {**dearkd.CIFAR, "steps": 2}
    first = dearkd.synthesize(model, labels, 16, **settings, seed=1)
    again = dearkd.synthesize(model, labels, 16, **settings, seed=1)
    other = dearkd.synthesize(model, labels, 16, **settings, seed=2)
    assert first.shape == (4, 3, 16, 16)
    assert not first.requires_grad
    assert torch.equal(first, again)
    assert (first - other).abs().mean() > 0.1


def test_synthesis_leaves_the_teacher_as_it_is():
    model = small_cnn().requires_grad_(True)
    before = copy.deepcopy(model.state_dict())
    dearkd.synthesize(model, torch.tensor([0, 1, 2, 3]), 16, **{**dearkd.CIFAR, "steps": 2})
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(layer.training or layer._forward_pre_hooks for layer in model.modules())


def test_an_observer_serves_many_calls_and_gives_the_same_images():
    model = small_cnn()
    labels = torch.tensor([0, 1, 2, 3])
    settings = {**dearkd.CIFAR, "steps": 2}
    expected = dearkd.synthesize(model, labels, 16, **settings)
    observer = dearkd.Observer(model)
    for _ in range(2):
        assert torch.equal(dearkd.synthesize(observer, labels, 16, **settings), expected)
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert all(len(norm._forward_pre_hooks) == 1 for norm in norms)
    observer.remove_hooks()
    assert not any(norm._forward_pre_hooks for norm in norms)


@pytest.mark.slow  # half a minute or more to compile
def test_a_compiled_observer_gives_the_same_losses_and_gradient():
    model = small_cnn()
    observer = dearkd.Observer(model)
    images = torch.randn(4, 3, 16, 16, requires_grad=True)
    found = []
    for _ in range(2):
        features, logits, loss = observer(images, 10.0, contextlib.nullcontext())
        total = features.square().mean() + logits.square().mean() + loss
        gradient, = torch.autograd.grad(total, images)
        found.append((features, logits, loss, gradient))
        observer.compile(dynamic=False)
    for eager, compiled in zip(*found):
        assert torch.allclose(eager, compiled, rtol=1e-4, atol=1e-5)


def test_both_dictionaries_hold_all_settings_of_synthesize():
    names = [name for name, parameter in inspect.signature(dearkd.synthesize).parameters.items()
             if parameter.kind == parameter.KEYWORD_ONLY and parameter.default is parameter.empty]
    assert list(dearkd.IMAGENET) == list(dearkd.CIFAR) == names


@pytest.mark.parametrize("image_size, defaults", [(64, dearkd.CIFAR), (65, dearkd.IMAGENET)])
def test_given_flags_replace_the_settings_of_the_image_size(
        image_size, defaults, teacher, tmp_path, monkeypatch):
    seen = []

    def remember(cnn, labels, size, seed, autocast, **settings):
        seen.append(settings)
        return torch.zeros(len(labels), 3, size, size)

    monkeypatch.setattr(dearkd, "synthesize", remember)
    main("dearkd", "--teacher", cnn_beside(teacher), "--image-size", image_size, "--amp", "off",
         "--images-per-class", 1, "--tv", 0, "--half-steps", 3, "--synthesize", tmp_path / "made")
    assert seen == [{**defaults, "tv": 0.0, "half_steps": 3}]


# ------------------------------------------------------------------ the folder


@pytest.mark.parametrize("classes, each, size", [(10, 13, 128), (1000, 3, 128), (3, 8, 8)])
def test_batches_hold_every_image_once_and_class_mates_together(classes, each, size):
    batches = dearkd.plan_batches(classes, each, size, 0)
    everything = [(label, number) for label in range(classes) for number in range(each)]
    assert sorted(sum(batches, [])) == everything
    for batch in batches:
        labels = [label for label, _ in batch]
        assert len(batch) <= size
        assert all(labels.count(label) >= min(4, each) for label in labels)


@pytest.fixture
def synthesis(tmp_path):
    """Flags of a synthesis of 24 images of 3 classes in three batches."""
    state = dearkd.make_cnn("cifar_resnet20", 3).state_dict()
    common.save_checkpoint(tmp_path / "cnn.pth", model=state, cnn="cifar_resnet20")
    return ["--teacher", tmp_path / "cnn.pth", "--image-size", 16, "--images-per-class", 8,
            "--images-per-batch", 8, "--amp", "off", "--steps", 3]


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.png")}


def test_an_interrupted_synthesis_is_resumed_to_the_same_files(synthesis, tmp_path, monkeypatch):
    a = tmp_path / "a"
    b = tmp_path / "b"
    main("dearkd", *synthesis, "--synthesize", a)
    synthesize = dearkd.synthesize
    calls = []

    def interrupted(*inputs, **settings):
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return synthesize(*inputs, **settings)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dearkd, "synthesize", interrupted)
        main("dearkd", *synthesis, "--synthesize", b)
    assert len(files(b)) == 8 + 1  # and preview.png
    next(b.glob("train/*/*.png")).unlink()  # as if stopped within a batch
    main("dearkd", *synthesis, "--synthesize", b, "--resume")
    assert files(b) == files(a)
    assert len(files(a)) == 24 + 1


def test_a_kill_while_an_image_is_written_leaves_none(synthesis, tmp_path, monkeypatch):
    def half(pixels, path, **options):
        Path(path).write_bytes(b"half an image")
        raise KeyboardInterrupt

    monkeypatch.setattr(dearkd, "save_image", half)
    with pytest.raises(KeyboardInterrupt):
        main("dearkd", *synthesis, "--synthesize", tmp_path / "made")
    assert list(tmp_path.rglob("*.png")) == []


def test_a_resumed_synthesis_notices_flags_left_out(synthesis, tmp_path):
    out = tmp_path / "made"
    main("dearkd", *synthesis, "--synthesize", out)
    said = error_of("dearkd", *synthesis, "--synthesize", out)
    assert "already holds a run: add --resume" in said
    without_steps = synthesis[:-2]
    said = error_of("dearkd", *without_steps, "--synthesize", out, "--resume")
    assert said.endswith("other settings: steps 2000, before 3. For other settings start a new run "
                         "in another folder")


def test_a_resumed_synthesis_does_not_mix_classes_or_cnns(synthesis, photos, tmp_path):
    out = tmp_path / "made"
    main("dearkd", *synthesis, "--synthesize", out)
    before = files(out)
    assert {path.name for path in (out / "train").iterdir()} == {"00000", "00001", "00002"}
    said = error_of("dearkd", *synthesis, "--synthesize", out, "--resume", "--val", photos / "val")
    assert "train has other classes, 00000, 00001, 00002: continue with the --val" in said
    other = dearkd.make_cnn("cifar_resnet20", 3)
    torch.save(other.state_dict(), tmp_path / "other.pth")
    said = error_of("dearkd", *synthesis, "--synthesize", out, "--resume", "--teacher",
                    "cifar_resnet20", "--teacher-weights", tmp_path / "other.pth")
    assert "other.pth, before None" in said
    assert files(out) == before
    assert {path.name for path in (out / "train").iterdir()} == {"00000", "00001", "00002"}


def test_a_synthesis_says_what_it_makes(synthesis, photos, tmp_path, capsys):
    saved = common.load_checkpoint(tmp_path / "cnn.pth")
    common.save_checkpoint(tmp_path / "cnn.pth", **saved,
                           trained_on={"classes": ["a", "b", "c"], "image_size": 32})
    few = ["--image-size", 8, "--images-per-class", 1, "--half-steps", 1, "--steps", 2]
    main("dearkd", *synthesis, *few, "--synthesize", tmp_path / "made")
    said = capsys.readouterr().out
    assert "cnn.pth learned from images of 32 px, here they have 8\n" in said
    assert "the intra-divergence loss is 0, so this is DeepInversion" in said
    assert re.search(r"step 1/1 at 4 px .*\nstep 2/2 at 8 px  ce \d+\.\d+  tv .* divergence 0.000\n",
                     said)
    assert re.search(r"the CNN sees the class in \d+% of 3 images", said)
    assert said.endswith("train is complete: 1 images of each of 3 classes\n")
    main("dearkd", *synthesis, "--synthesize", tmp_path / "three", "--images-per-class", 3,
         "--val", photos / "val")
    said = capsys.readouterr().out
    assert "intra-divergence loss is 0" not in said
    assert "cnn.pth learned 3 classes, here are 3\nFirst difference: output 0 was a, here it is ant\n" in said


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_folder_with_images_of_others_is_refused(resume, synthesis, photos, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train").symlink_to(photos / "train")
    before = files(photos)
    said = error_of("dearkd", *synthesis, "--synthesize", tmp_path / "mine", *resume)
    assert "train holds files that it did not write" in said
    assert files(photos) == before
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["train"]


def test_a_folder_of_a_training_run_is_refused(synthesis, tmp_path):
    (tmp_path / "run").mkdir()
    args = vars(dearkd.parse_args(["--train-teacher", "cifar_resnet20"]))
    common.save_checkpoint(tmp_path / "run" / "last.pth", args=args, log=[{"epoch": 1}])
    said = error_of("dearkd", *synthesis, "--synthesize", tmp_path / "run", "--resume")
    assert "was written with other settings" in said


def test_made_images_have_the_names_of_the_validation_classes_and_train_a_student(
        synthesis, photos, tmp_path):
    out = tmp_path / "made"
    main("dearkd", *synthesis, "--val", photos / "val", "--synthesize", out)
    assert sorted(path.name for path in (out / "train").iterdir()) == ["ant", "bee", "cat"]
    assert len(files(out / "train" / "ant")) == 8
    main("dearkd", *flags("dearkd", tmp_path / "cnn.pth", tmp_path / "vit", "--data", out, "--val",
                          photos / "val", "--batch-size", 8, "--epochs", 1, "--soft", 4))
    assert records(tmp_path / "vit")[0]["logits"] > 0
