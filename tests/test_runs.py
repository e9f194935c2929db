"""Real runs of the scripts: the command line, its errors, kills and resumes, torchrun."""

import contextlib
import fcntl
import json
import os
import pickle
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
import torch
from conftest import (
    DATA,
    MICRO,
    ROOT,
    a_teacher,
    children,
    command_of,
    environment,
    finish,
    in_process,
    make_photos,
    run,
    start,
    top1s,
    torchrun,
    wait_for,
)

import common
import vitkd

PLAIN = ["--mixup", "0", "--cutmix", "0", "--amp", "off"]


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """(data, path): a folder of photos, a micro teacher trained on it by the ordinary command."""
    folder = tmp_path_factory.mktemp("teacher")
    data = make_photos(folder / "photos", counts=(("train", 64), ("val", 13)))
    run("vitkd.py", *MICRO, "--data", data, "--teacher", "none", "--epochs", 2, "--lr", 1e-3,
        "--out", folder / "teacher")
    return data, folder / "teacher" / "student.pth"


# ------------------------------------------------------------------ the command line


def test_help_is_grouped_and_every_flag_explained():
    out, _ = run("vitkd.py", "--help")
    titles = re.findall(r"^(\w+):$", out, re.MULTILINE)
    assert titles == ["options", "data", "models", "loss", "recipe", "run"]
    flags = re.findall(r"^  (--[\w-]+)", out, re.MULTILINE)
    design = """--data --data-root --data-fraction --teacher --teacher-weights --student
        --patch-size --image-size --batch-size --micro-batch --epochs --lr --min-lr --warmup-epochs
        --weight-decay --clip-grad --seed --amp --compile --out --resume --dry-run --eval-every
        --workers --demo --no-nkd --alpha --beta --mask-ratio --gamma --tau"""
    assert set(design.split()) <= set(flags)
    for block in re.split(r"^  (?=-)", out, flags=re.MULTILINE)[1:]:
        head, *words = block.split(maxsplit=1)
        assert len(" ".join(words)) > 12, head
    assert max(map(len, out.splitlines())) <= 110


def test_defaults_are_the_recipe(monkeypatch):
    monkeypatch.setattr("sys.argv", ["vitkd.py"])
    args = vitkd.parse_args()
    common.check_flags(args)
    recipe = {"batch_size": 1024, "epochs": 300, "lr": 1e-3, "min_lr": 1e-5, "warmup_epochs": 20,
              "weight_decay": 0.05, "clip_grad": 5.0, "label_smoothing": 0.1, "mixup": 0.8,
              "cutmix": 1.0, "rand_augment": 9, "random_erasing": 0.25, "student": "deit_t",
              "teacher": "deit3_s", "alpha": 3e-5, "beta": 3e-6, "mask_ratio": 0.5, "gamma": 1.0,
              "tau": 1.0, "drop_path": 0.0, "ema": 0.0, "out": "out/vitkd-deit_t-deit3_s"}
    assert {name: getattr(args, name) for name in recipe} == recipe
    monkeypatch.setattr("sys.argv", ["vitkd.py", "--student", "deit_b", "--batch-size", "256"])
    args = vitkd.parse_args()
    common.check_flags(args)
    assert (args.drop_path, args.ema, args.lr) == (0.1, 0.99996, 2.5e-4)


class Malicious:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


def bad_inputs(photos, tmp):
    """(name, arguments, what the one line must say)"""
    none = ["--teacher", "none"]
    here = ["--data", photos, "--out", tmp / "out"]
    for split in ("train", "val"):
        (tmp / "empty" / split / "ant").mkdir(parents=True)
    shutil.copytree(photos, tmp / "differ")
    (tmp / "differ" / "val" / "bee").rename(tmp / "differ" / "val" / "wasp")
    (tmp / "half" / "train").mkdir(parents=True)
    torch.save({"model": {"fc.weight": torch.zeros(1)}}, tmp / "resnet.pth")
    (tmp / "cut.pth").write_bytes((tmp / "resnet.pth").read_bytes()[:500])
    (tmp / "code.pth").write_bytes(pickle.dumps(Malicious(), protocol=2))
    (tmp / "occupied").mkdir()
    (tmp / "occupied" / "last.pth").write_text("")
    deit = ["--teacher", "deit_t", "--teacher-weights"]
    return [
        ("no data", ["--data", tmp / "nowhere", *none], "no folder .*nowhere/train.*CLASS"),
        ("no split", ["--data", tmp / "half", *none], "no folder .*half/val|no images in .*half"),
        ("no images", ["--data", tmp / "empty", *none], "no images in .*ant"),
        ("classes differ", ["--data", tmp / "differ", *none], "differ: bee, wasp"),
        ("unknown teacher", [*here, "--teacher", "resnet50"], "no teacher resnet50: take deit_t, "),
        ("unknown student", [*here, *none, "--student", "huge"], "micro.*deit_t"),
        ("no weights", [*here, *deit, tmp / "no.pth"], "no file .*no.pth"),
        ("truncated", [*here, *deit, tmp / "cut.pth"], "cut.pth is damaged"),
        ("code", [*here, *deit, tmp / "code.pth"], "code.pth .*holds code, which is never run"),
        ("another model", [*here, *deit, tmp / "resnet.pth"],
         "152 missing: blocks.0.attn.proj.bias, .*1 unexpected: fc.weight"),
        ("weights of nobody", [*here, *none, "--teacher-weights", "x"], "goes with a teacher's"),
        ("image size", [*here, *none, "--image-size", 18], "18 is not a multiple.* 16 or 20"),
        ("micro-batch", [*here, *none, "--micro-batch", 5], "5 does not divide the 16"),
        ("mask ratio", [*here, *none, "--mask-ratio", 0], r"--mask-ratio: 0 is not in \(0, 1\]"),
        ("fraction", [*here, "--data-fraction", 2], r"--data-fraction: 2 is not in \(0, 1\]"),
        ("warm-up", [*here, *none, "--epochs", 3, "--warmup-epochs", 3], "leaves nothing"),
        ("nothing to resume", [*here, *none, "--resume"], "no file .*out/last.pth"),
        ("occupied", ["--data", photos, *none, "--out", tmp / "occupied"], "already holds a run"),
        ("unknown flag", [*here, "--epoch", 3], "unrecognized arguments: --epoch"),
        ("not a number", [*here, "--epochs", "many"], "--epochs: many is not a number"),
        ("no epochs", [*here, *none, "--epochs", 0], r"--epochs: 0 is not in \[1, inf\)"),
        ("negative", [*here, *none, "--mixup", -1], r"--mixup: -1 is not in \[0, inf\)"),
        ("nan", [*here, *none, "--lr", "nan"], r"--lr: nan is not in"),
        ("no folder", ["--data", photos, *none, "--out", "/proc/nowhere"], "cannot write to --out"),
        ("no data download", ["--data", "cifar10", "--data-root", tmp / "c", *none],
         "cannot download http.*cifar"),
        ("no teacher download", [*here, "--teacher", "deit_s"],
         "cannot download http.*deit_small_patch16_224-cd65a155.pth .*--teacher-weights FILE"),
    ]


def test_bad_inputs_are_one_line_and_status_2(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # no download: nobody listens there
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    for name, arguments, message in bad_inputs(photos, tmp_path):
        status, _, err = in_process(vitkd, capsys, monkeypatch, *MICRO, *arguments)
        assert status == 2, (name, err)
        line, = err.splitlines()
        assert line.startswith("vitkd.py: error: ") and re.search(message, line), (name, line)
    assert not (tmp_path / "out").exists()


def test_bad_input_of_a_real_process_has_no_traceback(tmp_path):
    out, err = run("vitkd.py", "--data", tmp_path, status=2)
    assert out == "" and err == (f"vitkd.py: error: no folder {tmp_path}/train: --data must hold "
                                 "train/CLASS/* and val/CLASS/* (or --val another folder of "
                                 "CLASS/*), or be one of cifar10, cifar100, shapes\n")


def test_batch_not_divisible_by_the_processes():
    _, err = run("vitkd.py", "--batch-size", 15, "--data", "shapes", processes=2, status=2)
    line, = (line for line in err.splitlines() if line.startswith("vitkd.py:"))
    assert line == ("vitkd.py: error: --batch-size 15 is not divisible by the 2 processes: "
                    "take 14")


def test_a_teacher_for_other_classes_or_patches(teacher, tmp_path, capsys, monkeypatch):
    _, weights = teacher
    for arguments, message in (
            (["--data", "shapes", "--teacher", weights], "has 3 classes, the data 10"),
            (["--data", teacher[0], "--teacher", weights, "--patch-size", 8],
             "patch size is 4, and ViTKD needs the same patches: --patch-size 4")):
        status, _, err = in_process(vitkd, capsys, monkeypatch, *MICRO, "--out", tmp_path / "out",
                                    *arguments)
        assert status == 2 and message in err and len(err.splitlines()) == 1


# ------------------------------------------------------------------ a run and its files


def test_a_run_and_what_it_leaves(teacher, tmp_path):
    data, weights = teacher
    folder = tmp_path / "run"
    out, _ = run("vitkd.py", *MICRO, "--data", data, "--teacher", weights, "--epochs", 3, "--lr",
                 1e-3, "--eval-every", 2, "--alpha", 1e-3, "--beta", 1e-3, "--out", folder)
    assert {p.name for p in folder.iterdir()} == {".lock", "last.pth", "best.pth", "student.pth",
                                                  "log.jsonl", "args.json"}
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in log] == [1, 2, 3]
    for line in log:
        assert {"ce", "mimicking", "generation", "nkd", "lr", "images_per_second", "data_wait",
                "peak_memory_gb", "unreadable", "skipped_steps", "seconds"} <= line.keys()
    assert ["top1" in line for line in log] == [False, True, True]
    assert log[2]["mimicking"] < log[0]["mimicking"]
    assert json.loads((folder / "args.json").read_text())["teacher"] == str(weights)
    best = max(line.get("top1", 0) for line in log)
    assert common.load_checkpoint(folder / "best.pth")["top1"] == best
    assert common.load_checkpoint(folder / "student.pth")["top1"] == log[2]["top1"]
    assert len(top1s(out)) == 3  # the teacher's and two of the student's
    assert out.splitlines()[-1].endswith("0 s left") and "\r" not in out  # not a terminal: no bar

    # A second run into the same folder, and a resume with other settings, are refused.
    again = ["vitkd.py", *MICRO, "--data", data, "--teacher", weights, "--epochs", 3, "--lr", 1e-3,
             "--beta", 1e-3, "--out", folder]
    _, err = run(*again, "--alpha", 1e-3, status=2)
    assert "already holds a run" in err
    _, err = run(*again, "--alpha", 0.5, "--resume", status=2)
    assert "other settings: --alpha 0.001 -> 0.5\n" in err
    # A finished run resumed has nothing left to do, and --resume auto accepts it.
    before = (folder / "log.jsonl").read_text()
    out, _ = run(*again, "--alpha", 1e-3, "--resume", "auto")
    assert "nothing is left to do" in out
    assert (folder / "log.jsonl").read_text() == before


@pytest.mark.parametrize("amp", ["off", "bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_learning_shows_with_every_precision(amp, teacher, tmp_path, capsys, monkeypatch):
    """Three tints are easy: a few epochs get far above one in three."""
    status, out, err = in_process(
        vitkd, capsys, monkeypatch, *MICRO, "--data", teacher[0], "--teacher", "none", "--epochs",
        5, "--lr", 1e-3, "--mixup", 0, "--cutmix", 0, "--amp", amp, "--out", tmp_path)
    assert status == 0, err
    assert top1s(out)[-1] > 60


def test_accumulation_and_processes_share_one_gradient(tmp_path):
    """1 x 12 images = micro-batches of 5 = 2 processes of 6 (and of 6 and 5) = both together."""
    program = ROOT / "tests" / "ddp_gradients.py"
    results = {}
    for name, processes, images in (("whole", 1, 12), ("parts", 1, 5), ("ranks", 2, 6),
                                    ("both", 2, 4)):
        run(program, tmp_path / name, images, processes=processes)
        results[name] = torch.load(tmp_path / name)
    whole = results.pop("whole")
    assert len(whole["gradients"]) > 60
    for name, result in results.items():
        for key, gradient in whole["gradients"].items():
            assert (result["gradients"][key] - gradient).abs().max() <= 1e-6 * gradient.abs().max()
        for key, loss in whole["losses"].items():
            assert result["losses"][key] == pytest.approx(loss, rel=1e-6), (name, key)


@pytest.mark.slow  # test_two_nodes_and_then_one_process is its short form
def test_two_processes_train_and_evaluate_like_one(teacher, tmp_path):
    """The same images in the same batches: one epoch's weights agree up to rounding, and both
    evaluate the same teacher to the same top-1 (39 images: shards of 20 and 19)."""
    data, weights = teacher
    flags = [*MICRO, *PLAIN, "--data", data, "--epochs", 1, "--lr", 1e-3, "--teacher", weights,
             "--mask-ratio", 1, "--no-nkd", "--clip-grad", 0]
    one, _ = run("vitkd.py", *flags, "--out", tmp_path / "one")
    two, _ = run("vitkd.py", *flags, "--out", tmp_path / "two", processes=2)
    assert top1s(one)[0] == top1s(two)[0]
    a, b = (common.load_checkpoint(tmp_path / name / "student.pth")["model"]
            for name in ("one", "two"))
    start_weights = vitkd.ViT(16, 4, 96, 6, 3, 3).state_dict()
    for key in a:
        moved = (a[key] - start_weights[key]).norm()
        assert (a[key] - b[key]).norm() <= 0.02 * moved + 1e-6, key
    log = [json.loads((tmp_path / name / "log.jsonl").read_text()) for name in ("one", "two")]
    for key in ("ce", "mimicking", "generation"):
        assert log[0][key] == pytest.approx(log[1][key], rel=1e-3)
    assert log[1]["unreadable"] == 0 and len(two.splitlines()) == len(one.splitlines())


def test_on_a_terminal_a_bar_shows_the_loss_terms(tmp_path):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "vitkd.py", *MICRO, "--data", "shapes", "--data-fraction", "0.1",
         "--teacher", "none", "--epochs", "1", "--out", tmp_path / "run"],
        cwd=ROOT, env=environment(), stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
    os.close(ours)
    assert process.wait() == 0
    lines = shown.decode().replace("\r", "\n").splitlines()
    assert any(re.match(r"epoch 1/1: .* \d+/25 .*ce=2\.\d", line) for line in lines)
    assert any(re.match(r"epoch 1/1  ce 2\.\d.* 0 s left", line) for line in lines)


# ------------------------------------------------------------------ kills, signals, resumes


@pytest.mark.parametrize("number, status, to", [
    (signal.SIGTERM, 143, "the script"), (signal.SIGINT, 130, "its process group, as Ctrl-C"),
    (signal.SIGTERM, 143, "its workers, too"), (signal.SIGTERM, 143, "then its workers are gone")])
def test_a_signal_ends_the_run_in_order(number, status, to, photos, tmp_path):
    process = start("vitkd.py", *MICRO, "--data", photos, "--teacher", "none", "--epochs", 500,
                    "--out", tmp_path / "run")
    wait_for(lambda: (tmp_path / "run" / "last.pth").exists(), process)
    time.sleep(0.2)
    workers = children(process.pid)
    assert len(workers) >= 2
    for pid in workers if "workers" in to else []:
        os.kill(pid, signal.SIGSTOP if "then" in to else number)
    time.sleep(0.5 if "then" in to else 0)  # the loop has run out of images: it waits
    os.killpg(process.pid, number) if "group" in to else process.send_signal(number)
    for pid in workers if "then" in to else []:
        os.kill(pid, signal.SIGKILL)
    code, _, err = finish(process, timeout=30)
    assert code == status
    assert len(err.splitlines()) == 1, err
    assert re.match(rf"vitkd\.py: stopped by {number.name} (in epoch|while evaluating|together)",
                    err)
    assert "last.pth" in err
    common.load_checkpoint(tmp_path / "run" / "last.pth")


def test_a_signal_before_training_is_one_line(tmp_path):
    """While it reads its teacher's weights: a pipe on which nothing comes."""
    os.mkfifo(tmp_path / "pipe.pth")
    process = start("vitkd.py", *MICRO, "--data", "shapes", "--teacher", "deit_t",
                    "--teacher-weights", tmp_path / "pipe.pth", "--out", tmp_path / "run")

    def is_read():
        with contextlib.suppress(OSError):  # there is no reader yet
            return os.open(tmp_path / "pipe.pth", os.O_WRONLY | os.O_NONBLOCK)

    wait_for(is_read, process)
    process.send_signal(signal.SIGINT)
    assert finish(process, timeout=30) == (
        130, "", "vitkd.py: stopped by SIGINT before anything was kept\n")


def test_sigterm_under_torchrun_ends_all_ranks(teacher, tmp_path):
    data, _ = teacher
    folder = tmp_path / "run"
    command = [*MICRO, "--data", data, "--teacher", "none", "--epochs", 2000, "--out", folder]
    process = start(*torchrun(2, "vitkd.py", *command))
    wait_for(lambda: (folder / "last.pth").exists(), process)
    ranks = children(process.pid)
    workers = [worker for rank in ranks for worker in children(rank)]
    assert len(ranks) == 2 and len(workers) >= 4
    process.send_signal(signal.SIGTERM)
    _, _, err = finish(process, timeout=60)
    assert err.count("vitkd.py: stopped by SIGTERM") == 1
    deadline = time.monotonic() + 30  # the workers notice that their parents are gone
    while any(os.path.exists(f"/proc/{pid}") for pid in (*ranks, *workers)):
        assert time.monotonic() < deadline, "a process is left"
        time.sleep(0.1)
    # and one process goes on where two stopped
    epoch = common.load_checkpoint(folder / "last.pth")["epoch"]
    process = start("vitkd.py", *command, "--resume")
    wait_for(lambda: f'"epoch": {epoch + 1}' in (folder / "log.jsonl").read_text(), process)
    process.kill()
    finish(process)


# ------------------------------------------------------------------ dry run, demo, real images


def test_dry_run_measures_and_writes_nothing(teacher, tmp_path):
    data, weights = teacher
    out, _ = run("vitkd.py", *MICRO, "--data", data, "--teacher", weights, "--dry-run", "--out",
                 tmp_path / "run")
    assert re.search(r"dry run, 300 epochs: [\d.]+ images/s, \d+ % of the time waiting for data\n"
                     r"the whole run, 300 epochs of 12 steps: .* hours .*, peak memory [\d.]+ GiB "
                     r"a process", out)
    assert "on the first 4 batches" in out and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_dry_run_tells_the_truth(teacher, tmp_path):
    """Its projection against the same run done, within 20 %, with real files and workers."""
    flags = [*MICRO, "--image-size", 32, "--data", teacher[0], "--teacher", teacher[1],
             "--epochs", 40]
    out, _ = run("vitkd.py", *flags, "--dry-run")
    projected = 3600 * float(re.search(r"([\d.e-]+) hours", out).group(1))
    began = time.perf_counter()
    run("vitkd.py", *flags, "--out", tmp_path / "run")
    seconds = time.perf_counter() - began - 4  # imports, before the script's clock starts
    assert projected == pytest.approx(seconds, rel=0.2)


@pytest.mark.slow
def test_demo_prints_its_table():
    out, _ = run("vitkd.py", "--demo", timeout=900)
    rows = re.findall(r"^(teacher|student \w+) +top-1 +(\d+\.\d) %", out, re.MULTILINE)
    top1 = {name: float(value) for name, value in rows}
    assert len(top1) == 3 and top1["student distilled"] > top1["student alone"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("script", ["vitkd", "attndistill", "dearkd"])
def test_compiled_steps_are_one_graph_and_the_same_steps(script, processes, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_LOGS", "graph_breaks,recompiles")
    base = [sys.executable,  # a new one: torch reads that variable when it is imported
            *command_of(script, tmp_path, "--teacher", a_teacher(script, tmp_path), "--student",
                        "micro", "--batch-size", 16, "--epochs", 2, "--amp", "off")]
    if script != "attndistill":
        base += ["--mixup", 0, "--cutmix", 0]
    base += {"vitkd": ["--mask-ratio", 1], "dearkd": ["--pos-dropout", 0]}.get(script, [])
    logs = []
    for more in ([], ["--compile"]):
        out = tmp_path / f"run{len(more)}"
        command = [*base, *more, "--out", out]
        _, err = run(*command, processes=processes, timeout=600)
        assert "Graph break" not in err, err[-3000:]
        logs.append([json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()])
    assert err.count("Recompiling") <= 2 * processes, err[-3000:]  # stage 2, eval mode
    losses = {"ce", "mimicking", "generation", "nkd", "logits", "hints", "alignment", "guidance"}
    for a, b in zip(*logs, strict=True):
        assert len(losses & a.keys()) >= 1
        for name in losses & a.keys():
            assert a[name] == pytest.approx(b[name], rel=1e-3), name
    if script != "attndistill":
        command = [*base, "--compile", "--drop-path", 0.2, "--out", tmp_path / "drop"]
        _, err = run(*command, processes=processes, timeout=600)
        assert "Graph break" not in err, err[-3000:]


@pytest.mark.skipif(not (DATA / "cifar10_val.zip").exists(), reason=f"no real images in {DATA}")
def test_real_images_through_the_ordinary_command_line(tmp_path):
    """CIFAR-10 JPEGs: a teacher, then a student of it; one epoch of 200 images each."""
    import zipfile
    with zipfile.ZipFile(DATA / "cifar10_val.zip") as archive:
        names = [n for n in archive.namelist() if re.search(r"/00[0-2]\d\.jpg$", n)]
        archive.extractall(tmp_path, names)
    folder = tmp_path / "cifar10"
    for path in sorted(folder.glob("val/*/00[0-1]?.jpg")):
        target = folder / "train" / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    flags = ["--data", folder, "--student", "micro", "--image-size", 32, "--patch-size", 4,
             "--batch-size", 50, "--epochs", 1]
    run("vitkd.py", *flags, "--teacher", "none", "--out", tmp_path / "t")
    run("vitkd.py", *flags, "--teacher", tmp_path / "t" / "student.pth", "--out", tmp_path / "s")
    log = json.loads((tmp_path / "s" / "log.jsonl").read_text())
    assert log["unreadable"] == 0
    assert all(log[name] > 0 for name in ("ce", "mimicking", "generation", "nkd"))
