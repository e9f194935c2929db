"""attndistill.py: the loss against float64, the cheap last block, every released format, runs."""

import argparse
import inspect
import math
import operator
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import SMALL, TINY, error_of, float64_vit, plain, prefixed, records
from PIL import Image
from torchvision.models import vit_b_16, vit_l_16

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


def test_guidance_refuses_whole_attention_matrices():
    row, matrix = torch.ones(2, 3, 17) / 17, torch.ones(2, 3, 17, 17) / 17
    for pair in ((row, matrix), (matrix, row)):
        with pytest.raises(ValueError, match=r"give the class token's rows, \(B, H, 1\+N\)"):
            attndistill.attention_guidance_loss(*pair)


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


def code(function):
    """Return the lines of a function or class as they stand."""
    return inspect.getsource(function).splitlines()


@pytest.mark.parametrize("name, scripts", [
    ("Attention", [dearkd]), ("Block", [dearkd]), ("fold_layer_scale", [attndistill]),
    ("fold_normalization", [attndistill]), ("Attention.__init__", [attndistill])])
def test_what_stands_in_several_scripts_is_the_same_text(name, scripts):
    get = operator.attrgetter(name)
    for script in scripts:
        assert code(get(script)) == code(get(vitkd))


def test_training_loops_are_the_same_text_but_for_the_method():
    shared = code(vitkd.train)
    for script in (attndistill, dearkd):
        ours = code(script.train)
        own = [line for line in ours if line not in shared]
        assert len(own) < len(ours) / 3, "\n".join(own)


def test_flags_of_several_scripts_have_the_same_help():
    """Defaults differ, and so may what a method says of its data, models and loss."""
    own = {"--alpha", "--beta", "--data", "--student", "--teacher", "--teacher-weights", "--init",
           "--patch-size", "--eval-every", "--out", "--demo"}
    helps = {}
    for script in (vitkd, attndistill, dearkd):
        for call in re.findall(r"add_argument\((.*?)\)\n", inspect.getsource(script.parse_args),
                               re.DOTALL):
            flag = re.match(r'"(--[a-z0-9-]+)"', call)[1]
            text = "".join(re.findall(r'"([^"]*)"', call.partition("help=")[2]))
            text = re.sub(r"\((%\(default\)s|.*)\)$", "", text)  # the default
            if flag not in own:
                helps.setdefault(flag, set()).add(text)
    different = {flag: texts for flag, texts in helps.items() if len(texts) > 1}
    assert not different


# ------------------------------------------------------------------ the teacher


def test_the_sizes_are_those_of_the_published_models():
    with torch.device("meta"):
        published = {"b": vit_b_16(), "l": vit_l_16()}
    for script, prefix in ((vitkd, "deit"), (attndistill, "vit"), (dearkd, "deit")):
        for letter, model in published.items():
            if f"{prefix}_{letter}" in script.SIZES:
                attention = model.encoder.layers[0].self_attention
                assert script.SIZES[f"{prefix}_{letter}"] == {
                    "dim": model.hidden_dim, "depth": len(model.encoder.layers),
                    "num_heads": attention.num_heads}
        for name, size in script.SIZES.items():
            if name != "micro":
                assert size["dim"] == 64 * size["num_heads"]


@pytest.mark.parametrize("script", [vitkd, attndistill])
def test_teachers_of_a_family_differ_in_size_and_file_alone(script):
    families = {}
    for name, row in script.TEACHERS.items():
        family, letter, variant = re.fullmatch(r"(\w+?)_([tsbl])\d*(_reg|_sat|)", name).groups()
        assert row["size"].endswith(f"_{letter}")
        if row.get("file"):
            words = {"t": "tiny|vitt", "s": "small|vits", "b": "base|vitb", "l": "large|vitl"}
            assert re.search(words[letter], row["file"])
            assert ("reg4" in row["file"]) == (variant == "_reg")
        settings = {key: value for key, value in row.items() if key not in ("size", "file")}
        if name == "moco_s16":
            assert settings.pop("vit") == {"num_heads": 12}
        families.setdefault(family + variant, []).append(settings)
    for family, settings in families.items():
        assert all(row == settings[0] for row in settings), family
    resizes = {family: rows[0].get("resize") for family, rows in families.items()}
    if script is attndistill:
        assert resizes == {
            "dino": "tenth", "dinov2": "tenth", "dinov2_reg": "antialiased", "ibot": "tenth",
            "mugs": "tenth", "dinov3": None, "dinov3_sat": None, "moco": None, "augreg": None,
            "vit": None}


@pytest.mark.parametrize("script, name, address, content", [
    ("vitkd", "deit_t", "deit/deit_tiny_patch16_224-a1311bcf.pth", None),
    ("vitkd", "deit3_s", "deit/deit_3_small_224_21k.pth", None),
    ("attndistill", "dino_s8", "dino/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth", None),
    ("attndistill", "dinov2_s14_reg", "dinov2/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth",
     "DINOv2 with registers")])
def test_a_teacher_without_a_file_is_the_download_of_its_authors(
        script, name, address, content, tmp_path, monkeypatch):
    """The addresses are the authors'. Here the file lies where a download would leave it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / "dl.fbaipublicfiles.com" / address
    path.parent.mkdir(parents=True)
    weights = plain() if content is None else released_file(content)[1]
    size = 224
    if script == "vitkd":
        monkeypatch.setitem(vitkd.SIZES, vitkd.TEACHERS[name]["size"], SMALL)
        weights = {**weights, "head.weight": torch.randn(9, 48), "head.bias": torch.randn(9)}
        torch.save(weights, path)
        teacher = vitkd.load_teacher(name, None, 9, size)
    else:
        monkeypatch.setitem(attndistill.SIZES, "vit_s", SMALL)
        torch.save(weights, path)
        teacher = attndistill.load_teacher(name, None, size)
    assert torch.equal(teacher.cls_token, weights["cls_token"])


def normalize(pixels, mean, std):
    mean = torch.tensor(mean)[:, None, None]
    std = torch.tensor(std)[:, None, None]
    return (pixels - mean) / std


def released_file(family):
    """Return a file as its authors save it, with random weights.

    (name in TEACHERS, the file's content, the ViT in it, keywords of float64_vit)
    """
    state = plain()
    zeros = torch.zeros(8)
    other = {name: tensor + 9 for name, tensor in state.items()}  # must not be taken
    how = {"num_heads": 3}
    if family == "DINO":
        return "dino_s16", state, state, {**how, "resize": "scale"}
    if family == "DINO, training":
        teacher = {**prefixed(state, "backbone."), "head.mlp.0.weight": zeros}
        content = {"student": prefixed(other, "module.backbone."), "teacher": teacher,
                   "optimizer": {"param_groups": [{"lr": np.float64(0.1)}]}, "epoch": 100,
                   "args": argparse.Namespace(arch="vit_small")}
        return "dino_s16", content, state, {**how, "resize": "scale"}
    if family == "iBOT, training":
        teacher = prefixed({**state, "masked_embed": zeros}, "backbone.")
        content = {"student": prefixed(other, "module.backbone."), "teacher": teacher}
        return "ibot_s16", content, state, {**how, "resize": "scale"}
    if family == "Mugs":
        weights = prefixed(state, "module.backbone.")
        weights["module.backbone.relation_blocks.0.norm1.weight"] = zeros
        for head in ("instance_head", "local_group_head", "group_head"):
            weights[f"module.{head}.projector.0.weight"] = zeros
        return "mugs_s16", {"state_dict": weights}, state, {**how, "resize": "scale"}
    if family == "MoCo v3":
        head = {"head.0.weight": zeros}
        weights = {**prefixed({**state, **head}, "module.base_encoder."),
                   **prefixed({**other, **head}, "module.momentum_encoder."),
                   "module.predictor.0.weight": zeros}
        return "moco_s16", {"epoch": 300, "state_dict": weights}, state, {"num_heads": 12}
    if family == "MAE":
        decoder = ("mask_token", "decoder_norm.bias", "decoder_pos_embed", "decoder_blocks.0.x")
        content = {"model": {**state, **dict.fromkeys(decoder, zeros), "head.bias": zeros}}
        return "vit_s16", content, state, how
    if family == "DeiT III":
        state = plain(layer_scale=True)
        state["pos_embed"][:, 0] = 0  # the class token has no position
        content = {name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): tensor
                   for name, tensor in state.items()}
        content["pos_embed"] = state["pos_embed"][:, 1:]
        return "vit_s16", {"model": content}, state, how
    if family == "DINOv2":
        state = plain(14, 37, layer_scale=True)
        content = {**state, "mask_token": torch.zeros(1, 48)}
        return "dinov2_s14", content, state, {**how, "resize": "scale"}
    if family == "DINOv2 of one's own at 224 px":
        state = plain(14, 16, layer_scale=True)
        return "dinov2_s14", state, state, {**how, "resize": "scale"}
    if family == "DINOv2, training with chunks of blocks":
        state = plain(14, 16, layer_scale=True)
        chunked = {re.sub(r"^blocks.(\d)", r"blocks.0.\1", name): x for name, x in state.items()}
        content = {"teacher": {**prefixed(chunked, "backbone."),
                               "dino_head.mlp.0.weight": zeros, "ibot_head.mlp.0.weight": zeros}}
        return "dinov2_s14", content, state, {**how, "resize": "scale"}
    if family.startswith("DINOv2 with registers"):
        state = plain(14, 37, layer_scale=True)
        if "half" in family:  # float16 numbers, exact in float64
            state = {name: tensor.half() for name, tensor in state.items()}
        state["register_tokens"] = torch.randn(1, 4, 48)
        content = {**state, "mask_token": torch.zeros(1, 48)}
        return "dinov2_s14_reg", content, state, {**how, "resize": "antialias"}
    if family.startswith("DINOv3"):
        state = plain(layer_scale=True)
        del state["pos_embed"]
        state["storage_tokens"] = torch.randn(1, 4, 48)
        state["rope_embed.periods"] = 100.0 ** (torch.arange(4) / 4)        # (D/H/4,)
        for i in range(3):
            mask = torch.ones(144)
            mask[48:96] = 0
            state[f"blocks.{i}.attn.qkv.bias_mask"] = mask
            state[f"blocks.{i}.attn.qkv.bias"][48:96] = 5.0  # is there, but does not count
        content = {**state, "mask_token": torch.zeros(1, 1, 48)}
        if "satellite" in family:
            content["local_cls_norm.weight"] = torch.zeros(48)
            content["local_cls_norm.bias"] = torch.zeros(48)
        return "dinov3_s16", content, state, {**how, "eps": 1e-5}
    raise ValueError(family)


SIZES_OF_IMAGES = {  # at which a family is compared, in pixels; else 224 and 112
    "DINO": (224, 112, 480), "DINOv2": (98, 224, 518), "DINOv2 with registers": (98, 224, 518),
    "DINOv3": (224, 256)}


@pytest.mark.parametrize("family", [
    "DINO", "DINO, training", "iBOT, training", "Mugs", "MoCo v3", "MAE", "DeiT III", "DINOv2",
    "DINOv2 of one's own at 224 px", "DINOv2, training with chunks of blocks",
    "DINOv2 with registers", "DINOv2 with registers, half precision", "DINOv3",
    "DINOv3 for satellite images"])
def test_released_formats_load_and_give_class_token_and_attention(family, tmp_path, monkeypatch):
    monkeypatch.setitem(attndistill.SIZES, "vit_s", SMALL)
    name, content, state, how = released_file(family)
    torch.save(content, tmp_path / "w.pth")
    for size in SIZES_OF_IMAGES.get(family, (224, 112)):
        teacher = attndistill.load_teacher(name, tmp_path / "w.pth", size)
        assert not teacher.training
        assert not any(p.requires_grad for p in teacher.parameters())
        images = torch.randn(1, 3, size, size).double()
        cls, attn = teacher.double().class_token_and_attention(images)
        expected_cls, expected_attn = float64_vit(state, images, **how)
        assert attn.shape == expected_attn.shape
        assert attn.max() > 3 / attn.shape[-1]  # far from uniform
        assert torch.allclose(cls, expected_cls, rtol=1e-5, atol=1e-5)
        assert torch.allclose(attn, expected_attn, rtol=1e-5, atol=1e-5)
        assert torch.equal(teacher(images), cls)


def test_dinov3_for_satellite_images_gets_their_normalisation(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(attndistill.SIZES, "vit_l", SMALL)
    _, content, state, how = released_file("DINOv3 for satellite images")
    torch.save(content, tmp_path / "sat.pth")
    pixels = torch.rand(1, 3, 64, 64).double()
    ours = attndistill.load_teacher("dinov3_l16_sat", tmp_path / "sat.pth", 64).double()
    found = ours(normalize(pixels, common.MEAN, common.STD))
    theirs = normalize(pixels, [0.430, 0.411, 0.296], [0.213, 0.156, 0.143])
    expected, _ = float64_vit(state, theirs, **how)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert "WARNING" not in capsys.readouterr().out
    attndistill.load_teacher("dinov3_l16", tmp_path / "sat.pth", 64)
    assert "was trained on satellite images" in capsys.readouterr().out


@pytest.mark.parametrize("timms_name, name, size", [
    ("vit_small_patch14_reg4_dinov2", "dinov2_s14_reg", 70),
    ("vit_small_patch16_dinov3", "dinov3_s16", 64),
    ("vit_small_patch16_dinov3", "dinov3_s16", 96),
    ("vit_small_patch16_dinov3_qkvb", "dinov3_s16", 64),
    ("vit_small_patch16_224", "augreg_s16", 64)])
def test_timms_copies_give_timms_class_token(timms_name, name, size, tmp_path):
    timm = pytest.importorskip("timm")
    size_of_model = {} if "dinov3" in timms_name else {"img_size": size}
    theirs = timm.create_model(timms_name, num_classes=0, **size_of_model).eval()
    for key, parameter in theirs.named_parameters():
        torch.nn.init.normal_(parameter, std=0.05)
        if "gamma" in key or re.search(r"norm\d?.weight", key):
            parameter.data += 1
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    ours = attndistill.load_teacher(name, tmp_path / "timm.pth", size).double()
    pixels = torch.rand(1, 3, size, size).double()
    mean, std = theirs.pretrained_cfg["mean"], theirs.pretrained_cfg["std"]
    expected = theirs.double().forward_features(normalize(pixels, mean, std))[:, 0]
    found = ours(normalize(pixels, common.MEAN, common.STD))
    assert expected.std() > 0.1
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name, patch_size, size", [("vit_s16", 4, 32), ("dino_s16", 8, 64)])
def test_the_patch_size_is_that_of_the_file(name, patch_size, size, tmp_path, monkeypatch):
    monkeypatch.setitem(attndistill.SIZES, "vit_s", SMALL)
    state = plain(patch_size, size // patch_size)
    torch.save({"model": prefixed(state, "module.")}, tmp_path / "w.pth")
    teacher = attndistill.load_teacher(name, tmp_path / "w.pth", size)
    images = torch.randn(2, 3, size, size)
    expected, _ = float64_vit(state, images, SMALL["num_heads"])
    assert torch.allclose(teacher.double()(images.double()), expected, rtol=1e-5, atol=1e-5)


def test_a_path_that_sounds_like_a_family_is_a_plain_student(tmp_path):
    arch = {"image_size": 32, "patch_size": 8, "dim": 24, "depth": 2, "num_heads": 3,
            "num_classes": 0}
    student = attndistill.ViT(**arch).eval()
    for folder in ("dinov2_run", "moco", "run_reg"):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "student.pth"
        common.save_checkpoint(path, model=student.state_dict(), arch=arch, script="attndistill")
        teacher = attndistill.load_teacher(str(path), None, 32)
        images = torch.randn(1, 3, 32, 32)
        assert torch.equal(teacher(images), student(images))


def test_wrong_teachers_say_what_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setitem(attndistill.SIZES, "vit_s", SMALL)
    registers = released_file("DINOv2 with registers")[1]
    distilled = {**plain(), "dist_token": torch.zeros(1, 1, 48)}
    for name, content, size, message in (
            ("resnet50", None, 224, "unknown teacher resnet50: choose dino_s16"),
            ("mugs_s16", None, 224, "mugs_s16 has no download: give its file"),
            ("dinov2_s14", plain(14, 16), 256, "256 is not a multiple of the patch size 14"),
            ("dinov2_s14", registers, 224, "it has unexpected register_tokens"),
            ("dinov3_s16", plain(), 224, "has a position embedding, so it is not a DINOv3"),
            ("dinov3_s16", registers, 224, "has a position embedding, so it is not a DINOv3"),
            ("vit_s16", distilled, 224, "it has unexpected dist_token"),
            ("vit_s16", {**plain(), "patch_embed.proj.weight": torch.zeros(48, 1, 16, 16)}, 224,
             "patch_embed.proj must be a convolution of RGB images with a bias"),
            ("vit_s16", {"fc.weight": torch.zeros(1)}, 224, "no network .* names are fc.weight")):
        weights = None
        if content is not None:
            weights = tmp_path / "w.pth"
            torch.save(content, weights)
        with pytest.raises(common.InputError, match=message):
            attndistill.load_teacher(name, weights, size)


# ------------------------------------------------------------------ runs

def main(*words):
    attndistill.main([str(word) for word in words])


def test_a_run_measures_knn_of_student_and_teacher(teacher, photos, tmp_path, capsys, monkeypatch):
    evaluate = eval_knn.evaluate
    widths = []

    def remember(model, *others, **settings):
        widths.append(model.cls_token.shape[2])
        return evaluate(model, *others, **settings)

    monkeypatch.setattr(eval_knn, "evaluate", remember)
    main(*TINY, "--data", photos, "--teacher", teacher, "--epochs", 3, "--eval-every", 2, "--out",
         tmp_path)
    log = records(tmp_path)
    assert log[-1]["alignment"] < log[0]["alignment"]
    assert ["knn20" in record for record in log] == [False, True, True]
    assert ["teacher_knn20" in record for record in log] == [True, False, False]
    assert widths == [48, 96, 96]  # the teacher, then the student twice
    # The k-NN of training is eval_knn.py's
    eval_knn.main(["--weights", f"{tmp_path}/student.pth", "--data", str(photos), "--workers", "0",
                   "--amp", "off", "--batch-size", "16"])
    assert f"k = 20   top-1 {log[-1]['knn20']:6.2f} %" in capsys.readouterr().out


def test_without_guidance_there_is_alignment_alone():
    student, teacher = sharp_vit(), sharp_vit()
    model = attndistill.Distillation(student, attndistill.projector(24, 24), lambda_a=0)
    images = torch.randn(2, 3, 20, 20)
    assert model(images, teacher.class_token_and_attention(images)).keys() == {"alignment"}


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
    load = attndistill.load_data
    students = []
    knn = []
    for shuffle in (False, True):
        def load_data(data, val, image_size, shuffle=shuffle):
            train, val = load(data, val, image_size)
            if shuffle:
                train.samples = [(path, (label + i) % 3)
                                 for i, (path, label) in enumerate(train.samples)]
            return train, val
        monkeypatch.setattr(attndistill, "load_data", load_data)
        out = tmp_path / str(shuffle)
        main(*TINY, "--data", photos, "--teacher", teacher, "--epochs", 1, "--out", out)
        students.append(common.load_checkpoint(out / "student.pth")["model"])
        knn.append(records(out)[0]["knn20"])
    assert all(torch.equal(students[0][k], students[1][k]) for k in students[0])
    assert knn[0] != knn[1]  # the measure does read them


def test_a_folder_beside_the_script_does_not_hide_a_data_set(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(photos / "train" / "ant", tmp_path / "shapes")
    train_images, val_images = attndistill.load_data("shapes", None, 16)
    assert isinstance(train_images, common.Shapes)
    assert len(val_images) == 1000


@pytest.mark.parametrize("kind, count", [
    ("photos", 64), ("train/photos", 64), ("train/CLASS without val", 96),
    ("train/photos and val/photos", 64), ("folders, one called val", 75),
    ("folders, one called train", 32)])
def test_photos_without_labels_train_without_knn(kind, count, teacher, photos, tmp_path, capsys):
    data = tmp_path / "data"
    if kind == "train/CLASS without val":
        shutil.copytree(photos / "train", data / "train")
    elif kind == "folders, one called val":  # 64 images beside 11
        shutil.copytree(photos / "train", data, ignore=shutil.ignore_patterns("cat"))
        shutil.copytree(photos / "val" / "cat", data / "val" / "cat")
    elif kind == "folders, one called train":
        shutil.copytree(photos / "train", data)
        (data / "cat").rename(data / "train")
    else:
        folder = data / "train" if kind.startswith("train") else data
        folder.mkdir(parents=True)
        for name in ("ant", "bee"):
            for path in (photos / "train" / name).iterdir():
                shutil.copy(path, folder / f"{name}-{path.name}")
    if kind.endswith("val/photos"):
        (data / "val").mkdir()
        shutil.copy(photos / "val" / "ant" / "000.jpg", data / "val")
    main(*TINY, "--data", data, "--teacher", teacher, "--epochs", 1, "--out", tmp_path / "out")
    out = capsys.readouterr().out
    read = data / "train" if (data / "train").is_dir() else data
    assert f"{count} training images in {read}. Without train/CLASS/* and val/CLASS/* " in out
    warning = f"WARNING: of {data} only train/ is used, not ant, bee\n"
    assert (warning in out) == (kind == "folders, one called train")
    record, = records(tmp_path / "out")
    assert record["alignment"] > 0
    assert "knn20" not in record


def test_photos_at_any_depth_without_hidden_and_broken_ones(teacher, photos, tmp_path, capfd):
    data = tmp_path / "any"
    shutil.copytree(photos / "train" / "ant", data)
    shutil.copytree(photos / "train" / "bee", data / "deep" / "down")
    shutil.copytree(photos / "train" / "cat", data / "deep" / "@eaDir")
    shutil.copy(photos / "train" / "cat" / "000.jpg", data / "deep" / "._a.jpg")
    (data / "deep" / "notes.txt").write_text("no image")
    (data / "deep" / "broken.jpg").write_bytes(b"no image")
    words = [*TINY, "--data", data, "--teacher", teacher, "--epochs", 1]
    main(*words, "--out", tmp_path / "a", "--batch-size", 65)
    out, err = capfd.readouterr()
    assert "65 training images in" in out
    assert "1 files below" in out and ".txt" in out
    assert err.count("WARNING: unreadable image") == 1 and "broken.jpg" in err
    few = error_of("attndistill", *words, "--data-fraction", 0.1, "--out", tmp_path / "b")
    assert few == "--batch-size 16 is more than the 6 training images: lower it"
    (tmp_path / "empty").mkdir()
    none = error_of("attndistill", *words, "--data", tmp_path / "empty", "--out", tmp_path / "c")
    assert "there are no images below" in none


@pytest.mark.parametrize("family", ["DINO", "MAE", "DeiT III", "DINO, training", "DINOv2"])
def test_init_starts_from_what_a_teacher_may_be(family, teacher, tmp_path, monkeypatch):
    """At the file's own size, without training: the student is the network in the file."""
    monkeypatch.setitem(attndistill.SIZES, "micro", SMALL)
    _, content, state, how = released_file(family)
    torch.save(content, tmp_path / "w.pth")
    patch_size = state["patch_embed.proj.weight"].shape[-1]
    size = patch_size * math.isqrt(state["pos_embed"].shape[1])
    student = attndistill.ViT(size, patch_size, **SMALL, num_classes=0)
    attndistill.load_init(student, tmp_path / "w.pth")
    images = torch.randn(1, 3, size, size).double()
    expected, _ = float64_vit(state, images, **how)
    assert torch.allclose(student.double()(images), expected, rtol=1e-5, atol=1e-5)


def test_visualize_draws_image_teacher_and_student_at_the_students_size(
        teacher, photos, tmp_path):
    arch = {"image_size": 32, "patch_size": 4, "dim": 24, "depth": 1, "num_heads": 3,
            "num_classes": 0}
    student = attndistill.ViT(**arch)
    common.save_checkpoint(tmp_path / "student.pth", model=student.state_dict(), arch=arch,
                           script="attndistill")
    images = sorted((photos / "val" / "ant").iterdir())[:2]
    words = ["--teacher", teacher, "--out", tmp_path]  # --image-size is 224 without the flag
    main("--visualize", *images, *words)
    picture = np.asarray(Image.open(tmp_path / "attention.png"))[..., 0]
    assert picture.shape == (2 * 34 + 2, 10 * 34 + 2)  # the image, 1 + 4 maps, 1 + 3 maps
    image = common.val_transform(32)(Image.open(images[1]))[None]
    vit = attndistill.load_teacher(f"{tmp_path}/student.pth", image_size=32)
    attn = vit.class_token_and_attention(image)[1][0, 2, 1:]
    assert picture[36:68:4, 308:340:4].argmax() == attn.argmax()  # the last map
    assert "no.jpg" in error_of("attndistill", "--visualize", "no.jpg", *words)
    nowhere = error_of("attndistill", "--visualize", "no.jpg", *words, "--out", "nowhere")
    assert nowhere == "there is no nowhere/student.pth: give --out of a run to --visualize"


def test_visualize_draws_the_teacher_of_the_run(teacher, photos, tmp_path, capsys):
    main(*TINY, "--data", photos, "--teacher", teacher, "--epochs", 1, "--out", tmp_path)
    drawing = ["--visualize", next((photos / "val" / "ant").iterdir()), "--out", tmp_path]
    main(*drawing, "--teacher", teacher)
    expected = (tmp_path / "attention.png").read_bytes()
    (tmp_path / "attention.png").unlink()
    main(*drawing)
    assert (tmp_path / "attention.png").read_bytes() == expected
    assert capsys.readouterr().out.endswith(f"with the teacher {teacher}\n")
    (tmp_path / "args.json").unlink()
    assert error_of("attndistill", *drawing).endswith("args.json: give the --teacher to draw")
