"""README.md: its commands parse, its snippets run, its links lead somewhere."""

import importlib
import inspect
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from helpers import ROOT

import attndistill
import common
import vitkd

README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def block_with(words):
    return next(code for code in blocks("python") if words in code)


SNIPPETS = [code for code in blocks("python") if "\nloss = " in code]


@pytest.mark.parametrize("code", SNIPPETS)
def test_a_snippet_runs_as_pasted(code):
    if "import timm" in code:
        pytest.importorskip("timm")
    names = {}
    exec(code, names)  # noqa: S102 - the README is ours
    assert names["loss"].isfinite() and names["loss"] > 0


def snippet_with(function):
    """Return a function that a snippet defines for timm's ViTs."""
    pytest.importorskip("timm")
    names = {}
    code = block_with(f"def {function}(")
    with torch.enable_grad():  # the snippet ends in loss.backward()
        exec(code, names)  # noqa: S102
    return names[function]


@torch.no_grad()
def test_timms_features_are_those_of_vitkd_bit_for_bit():
    features = snippet_with("features")
    import timm
    vit = timm.create_model("deit_tiny_patch16_224").eval()
    ours = vitkd.ViT(**vitkd.SIZES["deit_t"])
    ours.load_state_dict(vit.state_dict())
    images = torch.randn(2, 3, 224, 224)
    shallow, deep, logits = features(vit, images)
    our_shallow, our_deep, our_logits = ours.features(images)
    assert torch.equal(shallow[0], our_shallow[0]) and torch.equal(shallow[1], our_shallow[1])
    assert torch.equal(deep, our_deep) and torch.equal(logits, our_logits)


@torch.no_grad()
@pytest.mark.parametrize(("name", "sizes"), [
    ("deit_tiny_patch16_224", {"patch_size": 16}),
    ("vit_small_patch14_reg4_dinov2", {"patch_size": 14, "num_registers": 4})])
def test_timms_attention_is_that_of_attndistill(name, sizes):
    class_token_and_attention = snippet_with("class_token_and_attention")
    import timm
    vit = timm.create_model(name, img_size=224, num_classes=0).eval()
    size = "vit_t" if "tiny" in name else "vit_s"
    ours = attndistill.ViT(**attndistill.SIZES[size], num_classes=0, **sizes)
    attndistill.load_weights(ours, attndistill.prepare_weights(vit.state_dict()), name)
    images = torch.randn(2, 3, 224, 224)
    cls, attn = class_token_and_attention(vit, images)
    our_cls, our_attn = ours.class_token_and_attention(images)
    torch.testing.assert_close(cls, our_cls, rtol=0, atol=1e-5)
    torch.testing.assert_close(attn, our_attn, rtol=0, atol=1e-6)


def test_the_heads_rows_of_some_classes_are_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "imagenet_classes.txt").write_text("\n".join(f"n{i:08d}" for i in range(1000)))
    for i in (907, 13):
        (tmp_path / "my" / "images" / "train" / f"n{i:08d}").mkdir(parents=True)
    weights = vitkd.ViT(**vitkd.SIZES["deit_t"]).state_dict()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # as if it had been downloaded already
    kept = tmp_path / "hub/checkpoints/dl.fbaipublicfiles.com/deit/deit_tiny_patch16_224-a1311bcf.pth"
    kept.parent.mkdir(parents=True)
    torch.save({"model": weights}, kept)
    exec(block_with("imagenet_classes.txt"), {})  # noqa: S102
    teacher = vitkd.load_teacher("deit_t", "teacher.pth", num_classes=2)
    assert torch.equal(teacher.head.weight, weights["head.weight"][[13, 907]])


def test_every_tenth_photo_of_a_class_moves_to_validation(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(photos / "train", "my/images/train")
    album = Path("my/images/train/cat/album")  # 32 photos of a class, here in a folder within it
    Path("my/images/train/cat").rename("cat")
    album.parent.mkdir()
    Path("cat").rename(album)
    Path("my/images/train/.DS_Store").write_text("")
    exec(block_with("photo.rename"), {})  # noqa: S102
    train_images, val_images = common.load_data("my/images", None, 16)
    assert len(train_images) == 3 * 29 and len(val_images) == 3 * 3
    assert set(val_images.targets) == {0, 1, 2}


def test_a_photo_is_classified_and_the_student_loads_in_timm(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arch = {"image_size": 32, "patch_size": 8, **vitkd.SIZES["micro"], "num_classes": 3}
    student = vitkd.ViT(**arch).eval()
    student.head.bias.data[1] = 1e3  # it sees bees everywhere
    Path("out/distilled").mkdir(parents=True)
    trained_on = {"classes": ["ant", "bee", "cat"], "image_size": 32}
    common.save_checkpoint("out/distilled/student.pth", model=student.state_dict(), arch=arch,
                           script="vitkd", trained_on=trained_on)
    shutil.copy(photos / "val" / "cat" / "000.jpg", "photo.jpg")
    exec(block_with("photo.jpg"), {})  # noqa: S102
    assert capsys.readouterr().out == "bee\n"

    pytest.importorskip("timm")
    names = {}
    exec(block_with("embed_dim=arch"), names)  # noqa: S102
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(names["vit"].eval()(images), student(images))


def commands():
    lines = re.findall(r"`(python \w+\.py [^`]+)`", README)
    variables = {}  # they stay for later blocks, as in a shell
    for block in blocks("bash"):
        variables |= dict(re.findall(r"^(\w+)=\((.*)\)$", block, re.MULTILINE))
        for name, words in variables.items():
            block = block.replace(f'"${{{name}[@]}}"', words)
        lines += block.splitlines()
    return [line for line in lines if re.search(r"\w+\.py", line)]


@pytest.mark.parametrize("line", commands())
def test_a_command_parses(line, monkeypatch):
    words = shlex.split(line.split("&&")[-1])
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    monkeypatch.setattr("sys.argv", words[at:])
    script = importlib.import_module(words[at].removesuffix(".py"))
    if "--help" in words:
        with pytest.raises(SystemExit) as end:
            script.parse_args()
        assert end.value.code == 0
    else:
        script.parse_args()


def test_the_heading_that_an_error_names_is_there():
    heading = "An ImageNet teacher for some of its classes"
    assert f"### {heading}\n" in README
    assert heading in " ".join(inspect.getsource(vitkd.load_teacher).replace('"', "").split())


def test_links_and_headings_lead_somewhere():
    for folder in (ROOT, ROOT / "tests" / "evidence"):
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", (folder / "README.md").read_text()):
            assert target.startswith("https://") or (folder / target).exists(), target
