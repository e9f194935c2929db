"""vitkd.py: losses against float64, the ViT against independent forward passes, real formats."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import DATA, SMALL, float64_vit, plain

import common
import vitkd

# ------------------------------------------------------------------ ViTKD


def numpy_conv3x3(x, weight, bias):
    """(B, g, g, D) -> the same, zero padding: nine shifted matrix products."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    g = x.shape[1]
    return bias + sum(padded[:, i:i + g, j:j + g] @ weight[:, :, i, j].T
                      for i in range(3) for j in range(3))


def numpy_vitkd(loss, s_shallow, s_deep, t_shallow, t_deep, mask):
    """(L_m, L_g) from the paper's formulas, in float64."""
    p = {name: value.detach().double().numpy() for name, value in loss.state_dict().items()}
    s_shallow, t_shallow = ([x.detach().double().numpy() for x in xs]
                            for xs in (s_shallow, t_shallow))
    s_deep, t_deep, mask = (x.detach().double().numpy() for x in (s_deep, t_deep, mask))
    B, N, _ = s_deep.shape

    def align(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"] if f"{name}.weight" in p else x

    mimicking = sum(np.sum((align(s, f"align_shallow.{i}") - t)**2)
                    for i, (s, t) in enumerate(zip(s_shallow, t_shallow)))
    x = align(s_deep, "align_deep")
    g = math.isqrt(N)
    x = np.where(mask[..., None] > 0, p["mask_token"], x).reshape(B, g, g, -1)
    x = np.maximum(numpy_conv3x3(x, p["generator.0.weight"], p["generator.0.bias"]), 0)
    x = numpy_conv3x3(x, p["generator.2.weight"], p["generator.2.bias"]).reshape(B, N, -1)
    generation = np.sum(mask[..., None] * (x - t_deep)**2)
    return (loss.alpha / B * mimicking, loss.beta / (loss.mask_ratio * B) * generation)


def vitkd_inputs(student_dim, teacher_dim, B=3, N=25):
    student = [torch.randn(B, N, student_dim, requires_grad=True) for _ in range(3)]
    teacher = [torch.randn(B, N, teacher_dim, requires_grad=True) for _ in range(3)]
    return student[:2], student[2], teacher[:2], teacher[2]


@pytest.fixture
def seen_masks(monkeypatch):
    """The masks that ViTKDLoss draws, in order."""
    masks, draw = [], vitkd.random_mask

    def spy(*arguments):
        masks.append(draw(*arguments))
        return masks[-1]

    monkeypatch.setattr(vitkd, "random_mask", spy)
    return masks


@pytest.mark.parametrize("student_dim, teacher_dim", [(12, 20), (16, 16)])
@pytest.mark.parametrize("mask_ratio", [0.5, 0.3, 1.0])
def test_vitkd_equals_float64(student_dim, teacher_dim, mask_ratio, seen_masks):
    loss = vitkd.ViTKDLoss(student_dim, teacher_dim, 3e-3, 2e-2, mask_ratio)
    torch.nn.init.normal_(loss.mask_token)
    inputs = vitkd_inputs(student_dim, teacher_dim)
    mimicking, generation = loss(*inputs)
    expected = numpy_vitkd(loss, *inputs, seen_masks[0])
    assert mimicking.item() == pytest.approx(expected[0], rel=1e-5)
    assert generation.item() == pytest.approx(expected[1], rel=1e-5)
    assert ("align_deep.weight" in loss.state_dict()) == (student_dim != teacher_dim)


@pytest.mark.parametrize("N", [1, 4, 16, 49, 100, 196])
@pytest.mark.parametrize("ratio", ["1/2", "1/10", "3/10", "7/10", "9/10", "1"])
def test_mask_hits_exactly(N, ratio):
    mask = vitkd.random_mask(64, N, float(Fraction(ratio)))
    assert mask.dtype == torch.bool and mask.shape == (64, N)
    assert (mask.sum(1) == N - math.floor(N * (1 - Fraction(ratio)))).all()


def test_masks_differ_between_images_and_hit_every_token_alike():
    mask = vitkd.random_mask(4000, 16, 0.5).float()
    assert len(mask.unique(dim=0)) > 1000
    # a token's mean over 4000 draws of probability 1/2 has a standard deviation of 0.008
    assert (mask.mean(0) - 0.5).abs().max() < 0.04


@pytest.mark.parametrize("student_dim", [8, 12])
def test_gradients_reach_the_student_and_the_whole_loss(student_dim):
    student = vitkd.ViT(16, 4, student_dim, 3, 2, 5)
    teacher = vitkd.ViT(16, 4, 12, 3, 2, 5)
    loss = vitkd.ViTKDLoss(student_dim, 12, mask_ratio=0.5)
    images = torch.randn(4, 3, 16, 16)
    shallow, deep, logits = student.features(images)
    with torch.no_grad():
        t_shallow, t_deep, t_logits = teacher.features(images)
    total = sum(loss(shallow, deep, t_shallow, t_deep))
    (total + vitkd.nkd_loss(logits, t_logits, torch.arange(4))).backward()
    for module in (student, loss):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_tokens_that_do_not_belong_together_are_refused():
    shallow, deep, teacher_shallow, teacher_deep = vitkd_inputs(8, 12)
    loss = vitkd.ViTKDLoss(8, 12)
    with_class_token = [torch.cat([x[:, :1], x], 1) for x in shallow]
    for inputs, message in (
            ((shallow[:1], deep, teacher_shallow, teacher_deep), "zip"),
            ((shallow, deep, [*teacher_shallow, teacher_deep], teacher_deep), "zip"),
            ((with_class_token, deep, teacher_shallow, teacher_deep), "no common square grid"),
            ((shallow, deep, teacher_shallow, teacher_deep[:, :4]), "no common square grid")):
        with pytest.raises(ValueError, match=message):
            loss(*inputs)
    with pytest.raises(ValueError, match="mask_ratio 0: it must be above 0"):
        vitkd.ViTKDLoss(8, 12, mask_ratio=0)


def test_loss_is_float32_under_autocast():
    loss = vitkd.ViTKDLoss(8, 12, alpha=1.0)
    inputs = [[x.detach() for x in part] if isinstance(part, list) else part.detach()
              for part in vitkd_inputs(8, 12)]
    inputs[0] = [x * 300 for x in inputs[0]]  # squares that fp16 cannot hold
    with torch.autocast("cpu", torch.float16):
        mimicking, generation = loss(*inputs)
    assert mimicking.dtype == generation.dtype == torch.float32
    assert mimicking > 65504 and mimicking.isfinite()


# ------------------------------------------------------------------ NKD


def plain_nkd(student, teacher, target, gamma, tau):
    """NKD with loops over images and classes, in float64."""
    total = 0.0
    for s, t, y in zip(student.double().tolist(), teacher.double().tolist(), target.tolist()):
        y = int(np.argmax(y)) if isinstance(y, list) else y
        others = [i for i in range(len(s)) if i != y]

        def softmax(logits, classes, tau=1.0):
            weights = {i: math.exp(logits[i] / tau) for i in classes}
            return {i: w / sum(weights.values()) for i, w in weights.items()}

        p_s, p_t = softmax(s, range(len(s))), softmax(t, range(len(t)))
        n_s, n_t = softmax(s, others, tau), softmax(t, others, tau)
        total -= p_t[y] * math.log(p_s[y])
        total -= gamma * tau**2 * sum(n_t[i] * math.log(n_s[i]) for i in others)
    return total / len(student)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("gamma, tau", [(1.0, 1.0), (1.5, 2.0), (0.0, 1.0)])
def test_nkd_equals_float64(mixed, gamma, tau):
    student, teacher = 3 * torch.randn(6, 10), 3 * torch.randn(6, 10)
    target = torch.rand(6, 10) if mixed else torch.randint(10, (6,))
    loss = vitkd.nkd_loss(student, teacher, target, gamma, tau)
    assert loss.item() == pytest.approx(plain_nkd(student, teacher, target, gamma, tau), rel=1e-5)


def test_nkd_refuses_labels_of_another_shape():
    logits = torch.randn(4, 5)
    for target in (torch.zeros(4, 1).long(), torch.zeros(4, 6)):
        with pytest.raises(ValueError, match=r"give \(B,\) or \(B, C\)"):
            vitkd.nkd_loss(logits, logits, target)


def test_nkd_survives_extreme_logits():
    target = torch.arange(5)
    sure = (200 * F.one_hot(target, 7).float()).requires_grad_()
    loss = vitkd.nkd_loss(sure, 500 * torch.randn(5, 7), target)
    loss.backward()
    assert loss.isfinite() and sure.grad.isfinite().all()


# ------------------------------------------------------------------ the sum of all terms


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("nkd", [True, False])
def test_the_terms_of_a_step_equal_float64(mixed, nkd, seen_masks):
    student = vitkd.ViT(20, 4, 12, 3, 2, 7)
    vitkd_loss = vitkd.ViTKDLoss(12, 20, 3e-3, 2e-2)
    model = vitkd.Distillation(student, vitkd_loss, label_smoothing=0.1, nkd=nkd, gamma=1.5)
    images = torch.randn(3, 3, 20, 20)
    target = torch.rand(3, 7).softmax(1) if mixed else torch.randint(7, (3,))
    teacher_features = vitkd.ViT(20, 4, 20, 3, 2, 7).features(images)
    losses = model(images, target, teacher_features)

    shallow, deep, logits = student.features(images)
    t_shallow, t_deep, t_logits = teacher_features
    soft = target if mixed else F.one_hot(target, 7)
    smooth = 0.9 * soft.double() + 0.1 / 7
    p = logits.double().exp() / logits.double().exp().sum(1, keepdim=True)
    mimicking, generation = numpy_vitkd(
        vitkd_loss, shallow, deep, t_shallow, t_deep, seen_masks[0])
    expected = {"ce": -(smooth * p.log()).sum(1).mean().item(), "mimicking": mimicking,
                "generation": generation}
    if nkd:
        expected["nkd"] = plain_nkd(logits, t_logits, target, 1.5, 1.0)
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, rel=1e-5)

    alone = vitkd.Distillation(student, None, label_smoothing=0.1)(images, target, None)
    assert {name: loss.item() for name, loss in alone.items()} == pytest.approx(
        {"ce": expected["ce"]}, rel=1e-5)


# ------------------------------------------------------------------ the ViT and its teachers


def released_weights(family):
    """Return (the file's weights, the same under timm's names), at 224 px with nine classes."""
    head = {"head.weight": torch.randn(9, 48), "head.bias": torch.randn(9)}
    if family == "DeiT":
        weights = {**plain(), **head}
        return weights, weights
    # DeiT III: LayerScale has other names, and the class token has no position
    timm = {**plain(layer_scale=True), **head}
    timm["pos_embed"][:, 0] = 0
    released = {}
    for name, tensor in timm.items():
        released[name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")] = tensor
    released["pos_embed"] = timm["pos_embed"][:, 1:]
    return released, timm


@pytest.mark.parametrize("image_size", [224, 112])
@pytest.mark.parametrize("family, name", [("DeiT", "deit_s"), ("DeiT III", "deit3_s")])
def test_released_formats_load_and_give_their_logits(
        family, name, image_size, tmp_path, monkeypatch):
    monkeypatch.setitem(vitkd.SIZES, "deit_s", SMALL)
    released, timm = released_weights(family)
    torch.save({"model": released}, tmp_path / "x.pth")
    teacher = vitkd.load_teacher(name, tmp_path / "x.pth", 9, image_size)
    images = torch.randn(2, 3, image_size, image_size)
    cls, _ = float64_vit(timm, images, SMALL["num_heads"])
    expected = F.linear(cls, timm["head.weight"].double(), timm["head.bias"].double())
    # 1e-5 and not less: LayerScale is multiplied into float32 weights
    assert torch.allclose(teacher.double()(images.double()), expected, rtol=1e-5, atol=1e-5)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


def test_a_student_is_a_teacher_with_its_own_size(tmp_path):
    arch = {"image_size": 16, "patch_size": 4, **SMALL, "num_classes": 9}
    student = vitkd.ViT(**arch).eval()
    common.save_checkpoint(tmp_path / "any name", model=student.state_dict(), arch=arch,
                           script="vitkd")
    teacher = vitkd.load_teacher(str(tmp_path / "any name"), num_classes=9, image_size=16)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(teacher(images), student(images))
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    larger = vitkd.load_teacher(str(tmp_path / "any name"), num_classes=9, image_size=32)
    assert larger(torch.randn(2, 3, 32, 32)).shape == (2, 9)


@pytest.mark.parametrize("rows, grid", [(1 + 16, 4), (1 + 16, 7), (16, 4), (16, 2)])
def test_a_position_embedding_is_resized_bicubically_or_not_at_all(rows, grid):
    position = torch.randn(1, rows, 6)
    resized = vitkd.resize_position(position, grid)
    assert resized.shape == (1, 1 + grid**2, 6)
    class_row = position[:, :1] if rows == 17 else torch.zeros(1, 1, 6)
    assert torch.equal(resized[:, :1], class_row)
    patches = position[:, -16:]
    if grid == 4:
        assert torch.equal(resized[:, 1:], patches)
        return
    square = patches[0].T.reshape(1, 6, 4, 4).double()
    expected = F.interpolate(square, (grid, grid), mode="bicubic").reshape(6, -1).T
    assert torch.allclose(resized[0, 1:].double(), expected, atol=1e-6)


def test_folding_changes_neither_its_input_nor_other_weights():
    weights = {**plain(layer_scale=True), "patch_embed.proj.bias": torch.randn(48)}
    before = {name: tensor.clone() for name, tensor in weights.items()}
    folded = vitkd.fold_layer_scale(weights)
    shifted = vitkd.fold_normalization(weights, [0.5] * 3, [0.5] * 3)
    assert weights.keys() == before.keys()
    assert all(torch.equal(weights[name], before[name]) for name in before)
    gammas = {name for name in before if name.endswith("gamma")}
    assert folded.keys() == before.keys() - gammas and len(gammas) == 6
    changed = {name for name in folded if not torch.equal(folded[name], before[name])}
    assert changed == {f"blocks.{i}.{layer}.{kind}" for i in range(3)
                       for layer in ("attn.proj", "mlp.fc2") for kind in ("weight", "bias")}
    assert {name for name in shifted if not torch.equal(shifted[name], before[name])} == {
        "patch_embed.proj.weight", "patch_embed.proj.bias"}


def test_features_are_the_residual_stream():
    model = vitkd.ViT(16, 4, 24, 3, 3, 5).eval()
    images, seen = torch.randn(2, 3, 16, 16), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    shallow, deep, logits = model.features(images)
    assert all(torch.equal(f, s[:, 1:]) for f, s in zip(shallow, seen)) and len(shallow) == 2
    assert torch.equal(deep, model.norm(seen[-1])[:, 1:])
    assert torch.equal(logits, model.head(model.norm(seen[-1])[:, 0]))
    assert torch.equal(logits, model(images))
    assert vitkd.ViT(16, 4, 24, 3, 3, num_classes=0)(images).shape == (2, 24)


def test_stochastic_depth_grows_and_rests_in_evaluation():
    model = vitkd.ViT(16, 4, 24, 3, 3, 5, drop_path=0.5)
    assert [block.drop_path.p for block in model.blocks] == [0.0, 0.25, 0.5]
    images = torch.randn(8, 3, 16, 16)
    assert not torch.equal(model(images), model(images))
    assert torch.equal(model.eval()(images), model(images))


def test_initialisation_is_truncated_normal():
    model = vitkd.ViT(32, 4, 192, 2, 3, 10)
    for tensor in (model.blocks[0].mlp.fc1.weight, model.pos_embed, model.head.weight):
        assert tensor.std().item() == pytest.approx(0.02, rel=0.1) and tensor.abs().max() < 0.12
    assert not model.blocks[1].attn.qkv.bias.any()


def test_real_deit_t_recognises_the_photos(tmp_path):
    """Real ImageNet weights on every third of 96 real photos: 26 of 32 right at 224 px."""
    weights, photos = DATA / "deit_tiny_imagenet.pth", DATA / "imagenet_photos.zip"
    if not (weights.exists() and photos.exists()):
        pytest.skip(f"no {weights} or {photos}")
    torchvision.datasets.utils.extract_archive(str(photos), str(tmp_path))
    wnids = (DATA / "imagenet_wnids.txt").read_text().split()
    transform = common.val_transform(224)
    teacher = vitkd.load_teacher("deit_t", weights)
    paths = sorted(tmp_path.rglob("*.JPEG"))[::3]
    with torch.inference_mode():
        images = torch.stack([transform(common.load_image(path)) for path in paths])
        found = torch.cat([teacher(part).argmax(1) for part in images.split(32)]).tolist()
    right = sum(path.name.startswith(wnids[label]) for path, label in zip(paths, found))
    assert len(paths) == 32
    assert 25 <= right <= 27
