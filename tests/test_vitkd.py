"""vitkd.py: the losses against float64, ViT and teachers against independent forward passes."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torchvision
from conftest import MICRO, float64_vit, in_process, released_state

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
    """(L_m, L_g) from METHODS' formulas, in float64."""
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


def test_vitkd_defaults_are_the_papers():
    loss = vitkd.ViTKDLoss(8, 12)
    assert (loss.alpha, loss.beta, loss.mask_ratio) == (3e-5, 3e-6, 0.5)
    assert not loss.mask_token.any()


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


def test_only_masked_positions_count(seen_masks):
    loss = vitkd.ViTKDLoss(8, 12)
    inputs = list(vitkd_inputs(8, 12))
    torch.manual_seed(1)
    before = loss(*inputs)[1]
    mask = seen_masks[0][..., None]
    for where, changes in ((~mask, False), (mask, True)):
        inputs_now = [*inputs[:3], inputs[3] + 5 * where]
        torch.manual_seed(1)
        assert (loss(*inputs_now)[1] != before) == changes
    # ... and the masked tokens of the student are not seen at all
    torch.manual_seed(1)
    assert loss(inputs[0], inputs[1] + 5 * mask, *inputs[2:])[1] == before


@pytest.mark.parametrize("student_dim", [8, 12])
def test_gradients_reach_all_but_the_teacher(student_dim):
    student = vitkd.ViT(16, 4, student_dim, 3, 2, 5)
    teacher = vitkd.ViT(16, 4, 12, 3, 2, 5).requires_grad_(False)
    loss = vitkd.ViTKDLoss(student_dim, 12, mask_ratio=0.5)
    images = torch.randn(4, 3, 16, 16)
    shallow, deep, logits = student.features(images)
    t_shallow, t_deep, t_logits = teacher.features(images)
    total = sum(loss(shallow, deep, t_shallow, t_deep))
    (total + vitkd.nkd_loss(logits, t_logits, torch.arange(4))).backward()
    for module in (student, loss):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert all(p.grad is None for p in teacher.parameters())


def test_deep_gradient_comes_from_unmasked_tokens_only(seen_masks):
    inputs = vitkd_inputs(8, 12)
    vitkd.ViTKDLoss(8, 12, beta=1.0)(*inputs)[1].backward()
    moved = inputs[1].grad.abs().sum(2) > 0
    assert not (moved & seen_masks[0]).any() and moved.any()


def test_loss_is_float32_under_autocast():
    loss = vitkd.ViTKDLoss(8, 12, alpha=1.0)
    inputs = [[x.detach() for x in part] if isinstance(part, list) else part.detach()
              for part in vitkd_inputs(8, 12)]
    inputs[0] = [x * 300 for x in inputs[0]]  # squares that fp16 cannot hold
    with torch.autocast("cpu", torch.float16):
        mimicking, generation = loss(*inputs)
    assert mimicking.dtype == generation.dtype == torch.float32
    assert mimicking > 65504 and mimicking.isfinite()


def test_grids_that_differ_are_an_error():
    loss = vitkd.ViTKDLoss(8, 8)
    shallow, deep, *_ = vitkd_inputs(8, 8, N=16)
    *_, t_shallow, t_deep = vitkd_inputs(8, 8, N=25)
    with pytest.raises(ValueError, match="16 patch tokens, teacher 25"):
        loss(shallow, deep, t_shallow, t_deep)


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


def test_nkd_is_smallest_at_the_teacher_and_survives_extremes():
    teacher, target = torch.randn(5, 7), torch.tensor([0, 1, 2, 3, 4])
    student = teacher.clone().requires_grad_()
    vitkd.nkd_loss(student, teacher, target, 1.0, 1.0).backward()
    others = torch.ones_like(teacher).scatter(1, target[:, None], 0).bool()
    # the non-target part has its minimum there: what is left pulls all others down in proportion
    rest = student.grad[others].view(5, 6) / teacher.softmax(1)[others].view(5, 6)
    assert torch.allclose(rest, rest[:, :1].expand_as(rest), atol=1e-5)
    sure = (200 * torch.nn.functional.one_hot(target, 7).float()).requires_grad_()
    loss = vitkd.nkd_loss(sure, 500 * teacher, target)
    loss.backward()
    assert loss.isfinite() and sure.grad.isfinite().all()


# ------------------------------------------------------------------ the ViT and its teachers


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Files in the released formats: {name: path}, made when first asked for."""
    folder, files = tmp_path_factory.mktemp("released"), {}

    def get(name):
        if name not in files:
            dim, depth, _, deit3, _ = vitkd.TEACHERS[name]
            files[name] = folder / f"{name}.pth"
            torch.save({"model": released_state(dim, depth, deit3)}, files[name])
        return files[name]

    return get


@pytest.mark.parametrize("name, num_heads", [("deit_t", 3), ("deit_s", 6), ("deit3_s", 6)])
def test_released_formats_load_and_give_their_logits(name, num_heads, released):
    state = torch.load(released(name))["model"]
    teacher = vitkd.load_teacher(name, released(name))
    images = torch.randn(2, 3, 224, 224)
    expected = float64_vit(state, images, num_heads)[0]
    assert torch.allclose(teacher(images).double(), expected, rtol=1e-3, atol=1e-3)
    assert torch.allclose(teacher.double()(images.double()), expected, rtol=1e-10, atol=1e-10)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


def from_torchvision(state):
    """torchvision's vit state dict under timm's names."""
    names = {"class_token": "cls_token", "encoder.pos_embedding": "pos_embed",
             "conv_proj": "patch_embed.proj", "encoder.ln": "norm", "heads.head": "head",
             "encoder.layers.encoder_layer_": "blocks.", "ln_1": "norm1", "ln_2": "norm2",
             "self_attention.in_proj_": "attn.qkv.", "self_attention.out_proj": "attn.proj",
             "mlp.0": "mlp.fc1", "mlp.3": "mlp.fc2"}
    renamed = {}
    for key, value in state.items():
        for theirs, ours in names.items():
            key = key.replace(theirs, ours)
        renamed[key] = value
    return renamed


def test_deit_b_equals_torchvisions_vit_b_16(tmp_path):
    reference = torchvision.models.vit_b_16().eval()
    torch.nn.init.normal_(reference.heads.head.weight, std=0.05)  # torchvision's starts at zero
    torch.save({"model": from_torchvision(reference.state_dict())}, tmp_path / "b.pth")
    teacher = vitkd.load_teacher("deit_b", tmp_path / "b.pth")
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        logits = reference(images)
        assert logits.std() > 0.5  # not an empty comparison
        assert torch.allclose(teacher(images), logits, rtol=1e-4, atol=1e-4)


def test_state_dict_has_released_names_and_nothing_else():
    assert vitkd.ViT(**dict(zip(("dim", "depth", "num_heads"), vitkd.SIZES["deit_t"]))
                     ).state_dict().keys() == released_state(192, 12, False).keys()


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


def test_wrong_image_size_says_so():
    with pytest.raises(ValueError, match="image_size=16"):
        vitkd.ViT(16, 4, 24, 2, 3)(torch.randn(1, 3, 32, 32))


def test_drop_path_grows_with_depth_and_rests_in_eval():
    model = vitkd.ViT(16, 4, 24, 5, 3, drop_path=0.2)
    assert [b.drop_path.p for b in model.blocks] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    images = torch.randn(8, 3, 16, 16)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


def test_position_embedding_resize_keeps_constants_and_ramps():
    cls = torch.full((1, 1, 3), 7.0)
    ramp = torch.linspace(-1, 1, 14).repeat(14, 1)
    patches = torch.stack([torch.full((14, 14), 0.3), ramp, ramp**2], -1).reshape(1, 196, 3)
    for grid in (7, 16, 28):
        new = vitkd.resize_pos_embed(torch.cat([cls, patches], 1), grid)
        assert torch.equal(new[:, :1], cls)
        new = new[:, 1:].reshape(grid, grid, 3)
        assert torch.allclose(new[..., 0], torch.tensor(0.3))
        # pixel centres: column j of the new grid lies at (j + 0.5) * 14 / grid - 0.5 of the old
        at = (torch.arange(grid) + 0.5) * 14 / grid - 0.5
        reach = 2 * max(1, 14 / grid)  # of the bicubic kernel, in old columns
        inner = (at > reach) & (at < 13 - reach)
        assert inner.sum() >= 3
        expected = (-1 + 2 * at / 13)[inner].expand(grid, -1)
        assert torch.allclose(new[:, inner, 1], expected, atol=1e-5)
        if grid > 14:  # the cubic kernel keeps parabolas, too, where it only interpolates
            assert torch.allclose(new[:, inner, 2], expected**2, atol=1e-5)
    same = vitkd.resize_pos_embed(patches, 14)  # DeiT III: no class row
    assert torch.equal(same, patches)
    assert vitkd.resize_pos_embed(patches, 7).shape == (1, 49, 3)


def test_teacher_at_another_image_size(released):
    teacher = vitkd.load_teacher("deit3_s", released("deit3_s"), image_size=64)
    assert teacher.pos_embed.shape == (1, 16, 384)
    assert teacher(torch.randn(1, 3, 64, 64)).shape == (1, 1000)


def test_project_checkpoint_as_teacher(tmp_path):
    arch = {"image_size": 16, "patch_size": 4, "dim": 24, "depth": 3, "num_heads": 3,
            "num_classes": 5}
    model = vitkd.ViT(**arch).eval()
    common.save_checkpoint(tmp_path / "student.pth", model=model.state_dict(), arch=arch,
                           script="vitkd", top1=None)
    teacher = vitkd.load_teacher(str(tmp_path / "student.pth"), num_classes=5, image_size=16)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(teacher(images), model(images))
    common.save_checkpoint(tmp_path / "other.pth", model={}, arch=arch, script="dearkd", top1=None)
    with pytest.raises(common.Abort, match=r"written by dearkd\.py"):
        vitkd.load_teacher(str(tmp_path / "other.pth"), num_classes=5, image_size=16)


def spoil(state, how):
    if how == "wrong size":
        return released_state(192, 12, False)
    if how == "no head":
        return {k: v for k, v in state.items() if not k.startswith("head")}
    if how == "extra keys":
        return {**state, **{f"decoder.{i}": torch.zeros(1) for i in range(9)}}
    if how == "NaN":
        state["norm.weight"][3] = math.nan
    if how == "DeiT III":
        return released_state(384, 12, True)
    if how == "bare list":
        return list(state)
    if how == "numbers":
        return {1: torch.zeros(1), 2: torch.zeros(1)}
    return state


@pytest.mark.parametrize("how, message", [
    ("wrong size", r"does not hold a deit_s: \d+ of another shape: .* it fits --teacher deit_t"),
    ("no head", r"2 missing: head\.bias, head\.weight"),
    ("extra keys", r"9 unexpected: decoder\.0, decoder\.1, decoder\.2, decoder\.3, decoder\.4$"),
    ("NaN", r"NaN or infinite: norm\.weight"),
    ("DeiT III", r"24 unexpected: blocks\.0\.ls1\.gamma.*it fits --teacher deit3_s"),
    ("bare list", r"missing"),
    ("numbers", r"2 unexpected: 1, 2"),
    ("classes", r"has 1000 classes, the data 10"),
])
def test_weights_of_another_model(how, message, tmp_path):
    state = spoil(released_state(384, 12, False), how)
    torch.save({"model": state} if isinstance(state, dict) else state, tmp_path / "w.pth")
    with pytest.raises(common.Abort, match=message) as error:
        vitkd.load_teacher("deit_s", tmp_path / "w.pth", 10 if how == "classes" else 1000)
    assert "\n" not in str(error.value) and error.value.status == 2


def test_a_model_that_is_no_dictionary(tmp_path):
    torch.save({"model": "vit_small"}, tmp_path / "w.pth")
    with pytest.raises(common.Abort, match="1 unexpected: model"):
        vitkd.load_teacher("deit_s", tmp_path / "w.pth")


def test_unknown_teacher_lists_the_names():
    with pytest.raises(common.Abort, match="deit_t, deit_s, deit_b, deit3_s, deit3_b, deit3_l"):
        vitkd.load_teacher("deit_xl")


def test_no_download_names_url_and_flag(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # an empty cache
    monkeypatch.setattr(vitkd, "RELEASES", "http://127.0.0.1:9/deit/")  # nobody listens there
    with pytest.raises(common.Abort, match=r"127\.0\.0\.1:9/deit/deit_3_small.*--teacher-weights"):
        vitkd.load_teacher("deit3_s")


def test_download_checks_the_hash_in_the_name(monkeypatch, tmp_path, released):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(vitkd, "RELEASES", f"file://{tmp_path}/")
    name = vitkd.TEACHERS["deit_t"][-1]
    (tmp_path / name).write_bytes(released("deit_t").read_bytes())  # right format, wrong hash
    with pytest.raises(common.Abort, match="hash"):
        vitkd.load_teacher("deit_t")
    name = vitkd.TEACHERS["deit3_s"][-1]  # a name without a hash
    (tmp_path / name).write_bytes(released("deit3_s").read_bytes())
    assert vitkd.load_teacher("deit3_s").head.out_features == 1000


@pytest.mark.parametrize("content", ["<html>please log in</html>" * 100, ""])
def test_a_login_page_in_the_cache_is_named(content, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(vitkd, "RELEASES", f"file://{tmp_path}/")
    name = vitkd.TEACHERS["deit3_b"][-1]  # no hash in the name would tell
    (tmp_path / name).write_text(content)
    with pytest.raises(common.Abort, match=f"not a weights file: delete .*cache/.*{name}"):
        vitkd.load_teacher("deit3_b")


# ------------------------------------------------------------------ training, in this process


def train(capsys, monkeypatch, *arguments):
    status, out, err = in_process(vitkd, capsys, monkeypatch, *MICRO, *arguments)
    assert status == 0, err
    return out, err


def test_training_leaves_the_teacher_as_it_was(photos, tmp_path, capsys, monkeypatch):
    data = ["--data", photos, "--epochs", "2"]
    train(capsys, monkeypatch, *data, "--teacher", "none", "--out", tmp_path / "t")
    teachers, load = [], vitkd.load_teacher

    def remember(*arguments):
        teacher = load(*arguments)
        teachers.append((teacher, {k: v.clone() for k, v in teacher.state_dict().items()}))
        return teacher

    monkeypatch.setattr(vitkd, "load_teacher", remember)
    out, err = train(capsys, monkeypatch, *data, "--teacher", tmp_path / "t" / "student.pth",
                     "--out", tmp_path / "s")
    (teacher, before), = teachers
    assert not any(module.training for module in teacher.modules())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    # the teacher was evaluated first, and the weights' hint is what METHODS says
    assert "teacher" in out.splitlines()[0] and "top-1" in out.splitlines()[0]
    scale = 196 * 384 / (16 * 96)
    assert f"--alpha {3e-5 * scale:.2g} --beta {3e-6 * scale:.2g}" in err
    # and the exported student is a plain ViT
    student = common.load_checkpoint(tmp_path / "s" / "student.pth")
    assert student.keys() == {"model", "arch", "script", "top1"}
    assert student["model"].keys() == released_state(96, 6, False).keys()
    rebuilt = vitkd.ViT(**student["arch"])
    rebuilt.load_state_dict(student["model"])


def test_ema_is_what_is_exported(photos, tmp_path, capsys, monkeypatch):
    """With decay 0.5 the exported weights lie between those of the steps, not at the last."""
    train(capsys, monkeypatch, "--data", photos, "--epochs", "1", "--teacher", "none", "--ema",
          "0.5", "--out", tmp_path)
    last, student = (common.load_checkpoint(tmp_path / f) for f in ("last.pth", "student.pth"))
    assert not torch.equal(last["model"]["head.weight"], student["model"]["head.weight"])
    assert torch.equal(last["ema"]["module.head.weight"], student["model"]["head.weight"])


def test_a_weak_teacher_is_warned_of(capsys, monkeypatch):
    """Evaluating at the run's size shows what a teacher of another size is worth."""
    args = vitkd.common.argparse.Namespace(
        student="deit_t", teacher="deit3_s", dry_run=False, num_classes=1000, image_size=16,
        alpha=1.0, beta=1.0, amp="off")
    teacher = vitkd.ViT(16, 4, 24, 2, 3, 1000).eval()
    images = [(torch.randn(8, 3, 16, 16), torch.arange(8), torch.zeros(8))]
    autocast, _ = common.set_precision(args, torch.device("cpu"))
    vitkd.check_teacher(teacher, images, torch.device("cpu"), autocast, args)
    out, err = capsys.readouterr()
    assert "teacher deit3_s: top-1" in out and "below deit_t trained alone (74.42 %, paper)" in err
