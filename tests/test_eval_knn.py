"""eval_knn.py: votes against brute force in float64, features over processes, the linear probe."""

import re
import shutil
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from helpers import error_of
from torch.utils.data import TensorDataset
from torchvision import datasets

import attndistill
import common
import dearkd
import eval_knn
import vitkd

# ------------------------------------------------------------------ the vote


def brute_force(train, labels, test, k, temperature, C):
    """Scores (N_test, C), image by image, in float64 numpy."""
    train, test = (x.double().numpy() for x in (train, test))
    train = train / np.linalg.norm(train, axis=1, keepdims=True)
    scores = np.zeros((len(test), C))
    for i, x in enumerate(test):
        similarity = train @ (x / np.linalg.norm(x))
        for j in np.argsort(-similarity)[:k]:
            scores[i, labels[j]] += np.exp(similarity[j] / temperature)
    return scores


def problem(N=500, N_test=60, D=16, C=7):
    centres = 1.5 * torch.randn(C, D)
    labels, test_labels = torch.randint(0, C, (N,)), torch.randint(0, C, (N_test,))
    return (centres[labels] + 2 * torch.randn(N, D), labels,
            centres[test_labels] + 2 * torch.randn(N_test, D), test_labels)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("workspace", [1, 10**4, 2**28])
@pytest.mark.parametrize("N, N_test, D, C", [(500, 60, 16, 7), (300, 1, 8, 3), (40, 25, 5, 12),
                                             (1, 5, 4, 2)])
def test_votes_equal_brute_force(N, N_test, D, C, temperature, workspace, monkeypatch):
    """Also: one test image, k above the number of training images, fewer than five classes."""
    monkeypatch.setattr(eval_knn, "WORKSPACE", workspace)  # sets the size of the chunks
    train, labels, test, _ = problem(N, N_test, D, C)
    predicted = eval_knn.knn_predict(train, labels, test, (200, 1, 20, 10), temperature, C)
    assert set(predicted) == {1, 10, 20, 200}
    for k, classes in predicted.items():
        assert classes.shape == (N_test, min(5, C))
        scores = brute_force(train, labels, test, k, temperature, C)
        chosen = np.take_along_axis(scores, classes.numpy(), 1)
        best = -np.sort(-scores, 1)[:, :min(5, C)]
        assert np.allclose(chosen, best, rtol=1e-4)  # equal scores may stand in any order
        distinct = best[:, 0] > 1.001 * best[:, min(1, C - 1)]
        assert (classes[:, 0].numpy() == scores.argmax(1))[distinct].all()
        assert all(len(set(row)) == len(row) for row in classes.tolist())


def test_many_training_features_and_ties():
    """More training features than become float32 at a time; a collapsed model."""
    train = torch.randn(2**16 + 50, 4).half()
    labels = torch.arange(len(train)) % 3
    nearest = eval_knn.knn_predict(train, labels, train[-40:], ks=(1,), temperature=0.001)[1]
    assert (nearest[:, 0] == labels[-40:]).float().mean() > 0.9
    for same in (torch.ones(300, 8), torch.zeros(300, 8)):
        predicted = eval_knn.knn_predict(same, labels[:300], same[:4])
        assert all(sorted(p[0].tolist()) == [0, 1, 2] for p in predicted.values())


def test_accuracy_counts_top1_and_top5():
    train, labels, test, test_labels = problem(N=400, N_test=90, C=9)
    (top1, top5), = eval_knn.knn_accuracy((train, labels), (test, test_labels), 9, (50,)).values()
    order = np.argsort(-brute_force(train, labels, test, 50, 0.07, 9), 1)
    hits = order[:, :5] == test_labels.numpy()[:, None]
    assert (top1, top5) == pytest.approx((100 * hits[:, 0].mean(), 100 * hits.sum(1).mean()))
    assert top1 < top5


# ------------------------------------------------------------------ linear probe


def test_the_linear_probe_learns_and_chooses_on_held_out_training_features():
    train, labels, test, test_labels = problem(N=1500, N_test=300, C=5)
    top1, top5, rate, held_out = eval_knn.linear_probe((train, labels), (test, test_labels), 5)
    knn = eval_knn.knn_accuracy((train, labels), (test, test_labels), 5, ks=(20,))[20][0]
    assert knn - 5 < top1 < 100 and top5 == 100
    # The choice is the best on the tenth that training does not see
    fit, held = eval_knn.train_linear, torch.arange(1500) % 10 == 0
    scores = {}
    for lr in eval_knn.RATES:
        right = fit(train[~held], labels[~held], 5, lr)(train[held]).argmax(1) == labels[held]
        scores[lr] = 100 * right.float().mean().item()
    assert held_out == max(scores.values()) == scores[rate]


def test_a_linear_classifier_is_softmax_regression_on_standardised_features():
    features, labels, more, _ = problem(N=200, C=3)  # 200 images are one batch
    scaled = 100 * features + 7
    logits = eval_knn.train_linear(scaled, labels, 3, 0.3, epochs=20)(100 * more + 7)
    mean, std = features.double().mean(0), features.double().std(0, correction=0)
    x, target = (features.double() - mean) / std, torch.eye(3, dtype=torch.float64)[labels]
    W, b = torch.zeros(16, 3).double(), torch.zeros(3).double()
    speed_W, speed_b = 0, 0
    for step in range(20):
        error = ((x @ W + b).softmax(1) - target) / 200
        speed_W, speed_b = 0.9 * speed_W + x.T @ error, 0.9 * speed_b + error.sum(0)
        rate = 0.3 * (1 + np.cos(np.pi * step / 20)) / 2
        W, b = W - rate * speed_W, b - rate * speed_b
    expected = (more.double() - mean) / std @ W + b
    assert torch.allclose(logits.double(), expected, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------ the program


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with a student.pth of each script."""
    folder = tmp_path_factory.mktemp("eval_knn")
    torch.manual_seed(1)
    for script, num_classes in ((attndistill, 0), (vitkd, 3), (dearkd, 3)):
        arch = {"image_size": 16, "patch_size": 4, "dim": 24, "depth": 2, "num_heads": 3,
                "num_classes": num_classes}
        model = script.ViT(**arch)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        common.save_checkpoint(folder / f"{script.__name__}.pth", model=model.state_dict(),
                               arch=arch, script=script.__name__)
    return folder


def main(*words):
    eval_knn.main([str(word) for word in words])


@pytest.mark.parametrize("script", [attndistill, vitkd, dearkd])
def test_features_are_the_normed_class_tokens(script, weights, photos, capsys, monkeypatch):
    seen, vote = [], eval_knn.knn_predict
    monkeypatch.setattr(eval_knn, "knn_predict",
                        lambda *args, **kw: seen.append(args[:3]) or vote(*args, **kw))
    path = weights / f"{script.__name__}.pth"
    main("--weights", path, "--data", photos, "--workers", 0, "--batch-size", 7, "--amp", "off",
         "--linear")
    out = capsys.readouterr().out
    assert "96 training and 33 validation images of 3 classes" in out
    assert "features of width 24" in out
    assert len(re.findall(r"k-NN, k = \d+ +top-1 +\d+\.\d\d %  top-5 100.00 %", out)) == 4
    assert re.search(r"linear probe  top-1 +\d.*rate .* chosen by top-1 \d+.\d+ %", out)
    (train, labels, test), = seen
    saved = common.load_checkpoint(path)
    model = script.ViT(**saved["arch"])
    model.load_state_dict(saved["model"])
    model.head, model.num_classes = torch.nn.Identity(), 0
    val = datasets.ImageFolder(photos / "val", common.val_transform(16))
    with torch.no_grad():
        tokens = model.eval()(torch.stack([image for image, _ in val]))
    assert torch.allclose(test.float(), tokens, atol=5e-3)
    assert train.dtype == torch.float16 and labels.bincount().tolist() == [32, 32, 32]


class Flatten(torch.nn.Flatten):
    """A model whose features are the pixels, of width 2."""

    def __init__(self):
        super().__init__()
        self.cls_token = torch.zeros(1, 1, 2)


def features_of(data):
    return eval_knn.extract_features(Flatten(), data, 4, 0, torch.device("cpu"), nullcontext(),
                                     gather=False)


def test_a_feature_that_is_not_finite_counts_as_zero(capsys):
    data = TensorDataset(torch.tensor([[1, 2], [torch.nan, 1e9]]), torch.arange(2))
    features, _ = features_of(data)
    assert features.tolist() == [[1, 2], [0, 0]]
    assert capsys.readouterr().out.startswith("WARNING: the features of 1 images are NaN or inf")
    features_of(TensorDataset(torch.ones(2, 2), torch.arange(2)))
    assert capsys.readouterr().out == ""


def test_a_bad_image_is_in_no_feature_and_in_no_count():
    images = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    features, labels = features_of(TensorDataset(images, torch.tensor([1, -1, 0])))
    assert features.tolist() == [[1, 2], [5, 6]]
    assert labels.tolist() == [1, 0]
    top1, _ = eval_knn.accuracy(torch.tensor([[1], [1]]), labels)
    assert top1 == 50
    with pytest.raises(common.InputError, match="no training image can be read"):
        eval_knn.knn_accuracy((features[:0], labels[:0]), (features, labels), 2)


def test_bad_images_in_a_folder_are_left_out(weights, photos, tmp_path, capfd):
    """Two bad files: the numbers are those of the folder without them."""
    shutil.copytree(photos, tmp_path / "bad")
    (tmp_path / "bad" / "train" / "ant" / "000.jpg").write_bytes(b"no image")
    (tmp_path / "bad" / "val" / "bee" / "000.jpg").write_bytes(b"no image")
    shutil.copytree(tmp_path / "bad", tmp_path / "good")
    (tmp_path / "good" / "train" / "ant" / "000.jpg").unlink()
    (tmp_path / "good" / "val" / "bee" / "000.jpg").unlink()
    found = []
    for name in ("bad", "good"):
        main("--weights", weights / "vitkd.pth", "--data", tmp_path / name, "--workers", 0,
             "--amp", "off")
        out, err = capfd.readouterr()
        assert err.count("unreadable image") == (2 if name == "bad" else 0)
        found.append([line for line in out.splitlines() if line.startswith("k-NN")])
    assert found[0] == found[1] and len(found[0]) == 4


def test_one_training_image_is_enough_for_knn(weights, photos, tmp_path, capsys):
    for split in ("train", "val"):
        (tmp_path / split / "ant").mkdir(parents=True)
        shutil.copy(photos / split / "ant" / "000.jpg", tmp_path / split / "ant")
    words = ["--weights", weights / "vitkd.pth", "--data", tmp_path, "--workers", 0, "--amp", "off"]
    assert error_of("eval_knn", *words, "--linear") == (
        "a linear probe needs two training images or more")
    assert "k-NN, k = 20   top-1 100.00 %" in capsys.readouterr().out


def test_wrong_input_is_one_line(tmp_path, weights, photos):
    torch.save({"fc": torch.zeros(1)}, tmp_path / "other.pth")
    saved = common.load_checkpoint(weights / "attndistill.pth")
    del saved["model"]["norm.bias"]
    common.save_checkpoint(tmp_path / "part.pth", **saved)
    data = ["--data", photos, "--workers", 0]
    good = ["--weights", weights / "attndistill.pth"]
    for words, message in (
            (data, "give a student.pth as --weights, or the name of a released ViT as --arch"),
            ([*data, "--weights", tmp_path / "no.pth"], "no.pth cannot be read: No such file"),
            ([*data, "--weights", tmp_path / "other.pth"], "not the student.pth of a ViT of attndistill.py, .*. For a released"),
            ([*data, "--weights", tmp_path / "part.pth"], "it lacks norm.bias"),
            ([*data, "--arch", "dino_s15"], "unknown teacher dino_s15: choose dino_s16"),
            ([*data, "--arch", "mugs_s16"], "mugs_s16 has no download: give its file"),
            ([*data, *good, "--image-size", 18], "18 is not a multiple of the patch size 4"),
            ([*data, *good, "--batch-size", 0], "argument --batch-size: 0 is not between"),
            (["--data", tmp_path, *good], "--data .*train")):
        assert re.search(message, error_of("eval_knn", *words)), message
