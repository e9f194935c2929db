"""Whole runs of the training scripts: the same cases for each of them."""

import importlib
import json
import shutil
import time

import pytest
import torch
from conftest import PLAIN, ROOT, TINY, run, start
from torch.distributed.elastic.utils.distributed import get_free_port

import common
import dearkd
import vitkd

SCRIPTS = ["vitkd", "attndistill", "dearkd"]


def flags(script, teacher, out, *more):
    """A run of 160 shapes, ten steps an epoch; later flags override earlier ones."""
    own = [] if script == "attndistill" else PLAIN
    words = [*TINY, *own, "--data", teacher.with_name("shapes"), "--eval-every", 100, "--teacher",
             teacher.with_name("cnn.pth") if script == "dearkd" else teacher, "--out", out, *more]
    return [str(word) for word in words]


def main(script, *arguments):
    importlib.import_module(script).main([str(word) for word in arguments])


def records(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def student(out):
    return common.load_checkpoint(out / "student.pth")["model"]


# ------------------------------------------------------------------ a run and its files


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_and_what_it_leaves(script, teacher, tmp_path, capsys):
    before = common.load_checkpoint(teacher)["model"]
    own = ["--stage1-epochs", 3] if script == "dearkd" else []
    main(script, *flags(script, teacher, tmp_path / "run", "--epochs", 3, "--data", "shapes",
                        "--data-fraction", 0.04, *own))
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("CPU") and "1 process(es), amp off" in out[0]
    assert out[-1].endswith("left 0:00:00") or "k-NN" in out[-1]
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "last.pth", "student.pth", "log.jsonl", "args.json"}
    log = records(tmp_path / "run")
    terms = {"vitkd": ["ce", "mimicking", "generation", "nkd"],
             "attndistill": ["alignment", "guidance"], "dearkd": ["ce", "logits", "hints"]}[script]
    assert [record["epoch"] for record in log] == [1, 2, 3]
    for record in log:
        assert {*terms, "lr", "images_per_second", "peak_memory_gb", "skipped_steps",
                "seconds"} <= record.keys()
    assert sum(log[2][term] for term in terms) < sum(log[0][term] for term in terms)
    exported = common.load_checkpoint(tmp_path / "run" / "student.pth")
    assert exported.keys() == {"model", "arch", "script"} and exported["script"] == script
    importlib.import_module(script).ViT(**exported["arch"]).load_state_dict(exported["model"])
    after = common.load_checkpoint(teacher)["model"]
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(script, teacher, tmp_path):
    words = flags(script, teacher, tmp_path / "a", "--epochs", 3, "--workers", 2)
    main(script, *words)
    words[words.index("--out") + 1] = str(tmp_path / "b")
    process = start(f"{script}.py", *words)
    while not (tmp_path / "b" / "last.pth").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.wait()
    done = len(common.load_checkpoint(tmp_path / "b" / "last.pth")["log"])
    assert 1 <= done < 3
    main(script, *words, "--resume", "--workers", 0, "--eval-every", 2)
    a, b = (common.load_checkpoint(tmp_path / name / "last.pth") for name in "ab")
    assert torch.equal(torch.cat([t.flatten() for t in a["model"].values()]),
                       torch.cat([t.flatten() for t in b["model"].values()]))
    for key, state in a["optimizer"]["state"].items():
        assert all(torch.equal(state[n], b["optimizer"]["state"][key][n]) for n in state)


# argv: JSON of runs, each [script, port where its processes meet, two losses become NaN, flags]
PROGRAM = """
import importlib, json, os, sys
import common

for name, port, bad, words in json.loads(sys.argv[1]):
    script = importlib.import_module(name)
    forward, calls = script.Distillation.forward, []

    def with_nan(self, *inputs):
        calls.append(0)
        factor = float("nan") if bad and common.rank() == 1 and len(calls) in (3, 4) else 1
        return {name: loss * factor for name, loss in forward(self, *inputs).items()}

    script.Distillation.forward = with_nan
    os.environ.update(MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="False")
    script.main(words)
    script.Distillation.forward = forward
"""


def one_step(script, teacher, out, *more):
    # All tokens masked and no dropout, since each process draws its own
    own = {"vitkd": ["--mask-ratio", 1], "attndistill": [], "dearkd": ["--pos-dropout", 0]}[script]
    return flags(script, teacher, out, "--epochs", 1, "--batch-size", 160, "--clip-grad", 0, *own,
                 *more)


@pytest.fixture(scope="module")
def two_processes(teacher, tmp_path_factory):
    """A folder with a run SCRIPT and a run SCRIPT-nan of two processes for each script."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "program.py").write_text(PROGRAM)
    runs = []
    for script in SCRIPTS:
        clean = one_step(script, teacher, folder / script, "--accum", 2)
        bad = flags(script, teacher, folder / f"{script}-nan", "--epochs", 2)
        runs += [(script, get_free_port(), 0, clean), (script, get_free_port(), 1, bad)]
    _, err = run("torchrun", "--nproc_per_node", 2, folder / "program.py", json.dumps(runs),
                 PYTHONPATH=str(ROOT))
    assert "Warning" not in err, err
    return folder


@pytest.mark.parametrize("script", SCRIPTS)
def test_processes_and_chunks_give_the_gradient_of_one_batch(
        script, teacher, two_processes, tmp_path):
    """After one step AdamW's first moment is a tenth of the gradient: compare those."""
    main(script, *one_step(script, teacher, tmp_path / "whole"))
    main(script, *one_step(script, teacher, tmp_path / "chunks", "--accum", 4))
    losses, moments = [], []
    for out in (tmp_path / "whole", tmp_path / "chunks", two_processes / script):
        state = common.load_checkpoint(out / "last.pth")["optimizer"]["state"].values()
        moments.append(torch.cat([tensors["exp_avg"].flatten() for tensors in state]))
        losses.append(records(out)[0])
    assert losses[0]["skipped_steps"] == 0
    for i in (1, 2):
        assert (moments[i] - moments[0]).norm() <= 1e-6 * moments[0].norm()
        for key in set(losses[0]) - {"seconds", "images_per_second", "peak_memory_gb"}:
            assert losses[i][key] == pytest.approx(losses[0][key], rel=1e-5)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_nan_on_one_rank_is_skipped_by_all(script, two_processes):
    out = two_processes / f"{script}-nan"
    assert [record["skipped_steps"] for record in records(out)] == [2, 0]
    assert all(value.isfinite().all() for value in student(out).values())


def test_twenty_bad_steps_in_a_row_end_the_run(teacher, tmp_path, monkeypatch):
    forward, calls = vitkd.Distillation.forward, []
    monkeypatch.setattr(vitkd.Distillation, "forward", lambda self, *inputs: calls.append(0) or {
        name: loss * (float("inf") if len(calls) > 15 else 1)
        for name, loss in forward(self, *inputs).items()})
    with pytest.raises(SystemExit, match="20 steps in a row had no finite gradients"):
        main("vitkd", *flags("vitkd", teacher, tmp_path, "--epochs", 9))
    assert len(calls) == 35 and len(records(tmp_path)) == 3  # the last checkpoint stays whole
    assert all(value.isfinite().all() for value in student(tmp_path).values())


# ------------------------------------------------------------------ resume, init, images


def test_resume_refuses_other_settings_and_finished_runs_stay(teacher, tmp_path):
    words = flags("vitkd", teacher, tmp_path / "run", "--epochs", 1)
    main("vitkd", *words, "--resume")  # nothing to continue: starts
    with pytest.raises(SystemExit, match="already holds a run: add --resume"):
        main("vitkd", *words)
    with pytest.raises(SystemExit, match="other settings: --lr 0.5, before 0.001$"):
        main("vitkd", *words, "--resume", "--lr", 0.5)
    before = student(tmp_path / "run")
    main("vitkd", *words, "--resume", "--workers", 2)  # finished: nothing is left to do
    assert all(torch.equal(v, before[k]) for k, v in student(tmp_path / "run").items())
    assert len(records(tmp_path / "run")) == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_init_starts_from_a_student_at_any_size_with_a_new_head(script, photos, teacher, tmp_path):
    of = dearkd if script == "dearkd" else vitkd  # attndistill takes vitkd's students
    arch = {**of.SIZES["micro"], "image_size": 16, "patch_size": 4, "num_classes": 10}
    torch.manual_seed(5)  # not the run's seed
    weights = of.ViT(**arch, **{"mhca_blocks": 4} if of is dearkd else {}).state_dict()
    headless = {key: value for key, value in weights.items() if not key.startswith("head")}
    still = ["--epochs", 1, "--lr", 1e-12, "--min-lr", 0, "--weight-decay", 0]
    alone = [] if script == "attndistill" else ["--teacher", "none"]
    shapes = teacher.with_name("shapes")
    cases = [(weights, shapes, 16), (weights, photos, 32), (headless, shapes, 16)]
    for state, data, size in cases[:2 if of is dearkd else 3]:  # its students always have heads
        common.save_checkpoint(tmp_path / "pre.pth", model=state, arch=arch, script=of.__name__)
        out = tmp_path / f"{size} {len(state)}"
        main(script, *flags(script, teacher, out, "--data", data, "--image-size", size, "--init",
                            tmp_path / "pre.pth", *still, *alone))
        tuned, prefix = student(out), weights["pos_embed"].shape[1] - 16
        for key, value in headless.items():
            now = tuned[key]
            if key == "pos_embed" and size == 32:  # the patches' part is resized
                now, value = now[:, :prefix], value[:, :prefix]
            assert torch.allclose(now, value, atol=1e-7), key
        assert tuned["pos_embed"].shape[1] == prefix + (size // 4)**2
        for key in weights.keys() & tuned.keys() - headless.keys():
            assert len(tuned[key]) == (3 if data == photos else 10)
            kept = torch.allclose(tuned[key][:3], weights[key][:3], atol=1e-7)
            assert kept == (state is weights and data == shapes) or "bias" in key
        assert ("head.weight" in tuned) == (script != "attndistill")
    with pytest.raises(SystemExit, match="Error.s. in loading state_dict|is no student.pth of de"):
        main(script, *flags(script, teacher, tmp_path / "x", "--init", teacher))


@pytest.mark.parametrize("module", [vitkd, dearkd])
def test_epochs_have_new_order_and_crops_and_deit_b_is_saved_as_a_moving_mean(
        module, teacher, tmp_path, monkeypatch):
    seen, forward = [], module.Distillation.forward
    monkeypatch.setitem(module.SIZES, "deit_b", {"dim": 24, "depth": 4, "num_heads": 2})
    monkeypatch.setattr(module.Distillation, "forward", lambda self, x, y, features: (seen.append(
        (x, y, self.student.norm.bias.detach().clone())), forward(self, x, y, features))[1])
    words = flags(module.__name__, teacher, tmp_path, "--teacher", "none", "--student", "deit_b",
                  "--min-lr", 1e-3)
    module.main(words)
    labels = [torch.cat([y for _, y, _ in epoch]) for epoch in (seen[:10], seen[10:])]
    pixels = [sum(x.double().sum() for x, _, _ in epoch) for epoch in (seen[:10], seen[10:])]
    assert torch.equal(labels[0].bincount(), labels[1].bincount())  # the same images
    assert not torch.equal(*labels) and abs(pixels[0] - pixels[1]) > 1
    last = common.load_checkpoint(tmp_path / "last.pth")["model"]["student.norm.bias"]
    mean = seen[1][2]  # after the first of 20 steps, which make a decay of 1 - 15 / 20
    for after_a_step in [*(weights for _, _, weights in seen[2:]), last]:
        mean = 0.25 * mean + 0.75 * after_a_step
    assert (student(tmp_path)["norm.bias"] - mean).norm() < 1e-3 * (last - mean).norm()


def test_full_recipe_with_mixing_and_every_precision(teacher, tmp_path):
    for amp in ("bf16", "fp16"):
        main("vitkd", *flags("vitkd", teacher, tmp_path / amp, "--amp", amp, "--mixup", 0.8,
                             "--cutmix", 1, "--rand-augment", 9, "--random-erasing", 0.25,
                             "--epochs", 1, "--data-fraction", 0.25))
        record, = records(tmp_path / amp)
        assert all(0 < record[name] < 10 for name in ("ce", "mimicking", "generation", "nkd"))


def test_alpha_and_beta_keep_the_papers_weight_of_an_element(teacher, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(vitkd.ViTKDLoss, "forward", lambda self, *features: seen.update(
        alpha=self.alpha, beta=self.beta) or (features[1].sum() * 0, features[1].sum() * 0))
    main("vitkd", *flags("vitkd", teacher, tmp_path, "--epochs", 1))
    scale = 196 * 384 / (16 * 48)  # to 16 tokens of width 48
    assert seen == pytest.approx({"alpha": 3e-5 * scale, "beta": 3e-6 * scale})


# ------------------------------------------------------------------ wrong input


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("more, message", [
    (["--data", "nowhere"], "--data nowhere: .*nowhere/train"),
    (["--data", "differ"], "only one of training and validation: bee, wasp"),
    (["--teacher", "vgg16"], "no teacher vgg16: choose "),
    (["--teacher", "cut.pth"], "cut.pth is missing, damaged, or holds code"),
    (["--init", "cut.pth"], "cut.pth is missing, damaged"),
    (["--image-size", 18], "18 is no multiple of --patch-size 4"),
    (["--batch-size", 15, "--accum", 2], "--batch-size 15 is not divisible by .* = 2"),
    (["--batch-size", 320], "--batch-size 320 is more than the 160 training images"),
    (["--epochs", 0], "--epochs 0 is not between 1 and inf"),
    (["--lr", "nan"], "--lr nan is not between 1e-12 and 1000"),
    (["--epoch", 3], "unrecognized arguments: --epoch 3"),
    (["--out", "/proc/nowhere"], "--out /proc/nowhere: "),
])
def test_wrong_input_is_one_line(script, more, message, teacher, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cut.pth").write_bytes(teacher.read_bytes()[:500])
    shutil.copytree(photos, tmp_path / "differ")
    (tmp_path / "differ" / "val" / "bee").rename(tmp_path / "differ" / "val" / "wasp")
    with pytest.raises(SystemExit, match=message) as error:
        main(script, *flags(script, teacher, tmp_path / "out", *more))
    assert len(str(error.value).splitlines()) == 1 and ": error: " in str(error.value)
    assert not (tmp_path / "out" / "student.pth").exists()


def test_wrong_vitkd_input(teacher, photos, tmp_path):
    for more, message in ((["--mask-ratio", 0], "--mask-ratio 0.0 is not between"),
                          (["--patch-size", 8], "need the same --patch-size"),
                          (["--data", photos], "size mismatch for head.weight")):
        with pytest.raises(SystemExit, match=message):
            main("vitkd", *flags("vitkd", teacher, tmp_path, *more))


def test_wrong_input_of_real_processes_is_one_line():
    _, err = run("torchrun", "--nproc_per_node", 2, "vitkd.py", "--batch-size", 15, status=1)
    assert [line for line in err.splitlines() if "error: " in line and "vitkd.py" in line] == [
        "vitkd.py: error: --batch-size 15 is not divisible by processes x --accum = 2"]


# ------------------------------------------------------------------ long tests


@pytest.mark.slow
@pytest.mark.parametrize("demo", [*(f"{script} --demo" for script in SCRIPTS),
                                  "dearkd --demo-data-free"])
def test_demo(demo):
    script, flag = demo.split()
    out, _ = run(f"{script}.py", flag)
    without, with_it = (float(line.strip(" %").split()[-1]) for line in out.splitlines()[-2:])
    assert with_it > 1.05 * without


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_nothing_recompiles(script, teacher, tmp_path):
    torch._dynamo.reset()
    own = ["--stage1-epochs", 3] if script == "dearkd" else []  # stage 2 is another graph
    with torch._dynamo.config.patch(error_on_recompile=True):
        main(script, *flags(script, teacher, tmp_path, "--compile", "--amp", "bf16", "--epochs", 3,
                            *own))
    assert len(records(tmp_path)) == 3
