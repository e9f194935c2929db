"""The GPU path. Without a GPU on fake CUDA tensors; with one, `pytest tests/test_gpu.py` runs it.

Fake tensors have a device and a shape but no values. So a tensor left on the CPU raises an error,
and so does an operation that reads a value, which on a GPU waits for it.
"""

import types

import pytest
import torch
from conftest import run
from test_runs import SCRIPTS, flags, main, records, student
from torch._subclasses.fake_tensor import FakeTensorMode

import attndistill
import common
import dearkd
import vitkd


def vitkd_step():
    """(what is trained, the teacher, its method, what the loss takes beside images)"""
    args = types.SimpleNamespace(label_smoothing=0.1, no_nkd=False, gamma=1.0)
    student, teacher = (vitkd.ViT(32, 8, **vitkd.SIZES[size]) for size in ("micro", "deit_t"))
    model = vitkd.Distillation(student, vitkd.ViTKDLoss(96, 192), args)
    return model, teacher, "features", lambda guide: (torch.rand(4, 1000, device="cuda"), guide)


def attndistill_step():
    """The same of attndistill.py; the teacher has what DINOv3's have."""
    student = attndistill.ViT(32, 8, **attndistill.SIZES["micro"], num_classes=0)
    teacher = attndistill.ViT(32, 4, **attndistill.SIZES["vit_t"], num_classes=0, num_registers=4,
                              rope=True, eps=1e-5)
    model = attndistill.Distillation(student, attndistill.projector(96, 192), 0.1)
    return model, teacher, "class_token_and_attention", lambda guide: (guide,)


def dearkd_step():
    """The same of dearkd.py, in stage 1."""
    args = types.SimpleNamespace(label_smoothing=0.1, alpha=0.5, beta=10.0)
    student = dearkd.ViT(32, 8, **dearkd.SIZES["micro"], mhca_blocks=4)
    aligners = torch.nn.ModuleList([dearkd.Aligner(96, 64), dearkd.Aligner(96, 128)])
    model = dearkd.Distillation(student, aligners, [(1, 1), (3, 2)], args)
    teacher = dearkd.Teacher(dearkd.make_cnn("resnet18", 1000))
    return model, teacher, "features", lambda guide: (torch.rand(4, 1000, device="cuda"), guide)


@pytest.mark.parametrize("build", [vitkd_step, attndistill_step, dearkd_step])
def test_a_step_on_fake_cuda_tensors(build):
    model, guide, method, inputs = build()
    guide.requires_grad_(False).eval()
    with FakeTensorMode() as fake:
        for module in [*model.modules(), *guide.modules()]:  # .to("cuda") of fake tensors
            for name, p in module.named_parameters(recurse=False):
                fake_p = fake.from_tensor(p).detach().to("cuda")
                setattr(module, name, torch.nn.Parameter(fake_p, p.requires_grad))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, fake.from_tensor(buffer).to("cuda"))
        optimizer = torch.optim.AdamW(common.parameter_groups(model, 0.05), fused=True)
        images = torch.randn(4, 3, 32, 32, device="cuda")
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        torch.set_autocast_enabled("cuda", True)  # torch.autocast would look for a real GPU
        with torch.no_grad():
            features = getattr(guide, method)(images)
        losses = model(images, *inputs(features))
        torch.set_autocast_enabled("cuda", False)
        for name, loss in losses.items():
            assert (loss.device.type, loss.dtype) == ("cuda", torch.float32), name
        for p in model.parameters():  # backward() needs a real GPU, even for fake tensors
            p.grad = torch.zeros_like(p)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        assert norm.isfinite().device.type == "cuda"
        optimizer.step()


# ------------------------------------------------------------------ on a real GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@needs_gpu
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("more", ["--amp bf16", "--amp fp16", "--amp bf16 --compile",
                                  "--amp fp16 --compile", "--amp off"])
def test_training_on_a_gpu(script, more, teacher, tmp_path, capsys):
    main(script, *flags(script, teacher, tmp_path, "--epochs", 3, *more.split()))
    assert torch.cuda.get_device_name() in capsys.readouterr().out
    log = records(tmp_path)
    assert len(log) == 3 and log[2]["skipped_steps"] == 0
    assert all(value.isfinite().all() for value in student(tmp_path).values())


@needs_gpu
@pytest.mark.parametrize("script", SCRIPTS)
def test_resume_and_torchrun_on_a_gpu(script, teacher, tmp_path):
    words = flags(script, teacher, tmp_path, "--epochs", 2, "--amp", "bf16", "--workers", 2)
    run("torchrun", "--nproc_per_node", 1, f"{script}.py", *words)
    last = common.load_checkpoint(tmp_path / "last.pth")
    last["log"] = last["log"][:1]  # as if the second epoch were still to come
    common.save_checkpoint(tmp_path / "last.pth", **last)
    main(script, *words, "--resume")
    assert len(records(tmp_path)) == 2
