"""A training step of everything, on a pretended GPU and compiled. No kernel runs on the GPU: its
tensors are PyTorch's fake ones, which have shapes, types and a device but no values. To mix devices
is an error as it is on a real one, and so is all that would wait for a value, as item() or bool().
"""
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import (_DummyBackendModule,
                                              _setup_privateuseone_for_python_backend)

import heatmap_landmarks
import kprpe
import lddmm_face
import sdfl
import stn_align
from common import run


class Backend(_DummyBackendModule):
    """What PyTorch asks of a device."""
    def current_device(self):
        return 0

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend("gpu", backend_module=Backend())
FakeTensorMode.avoid_device_init = True
GPU = torch.device("gpu", 0)
# PyTorch has no fake form of this one. It works in place.
META = torch.library.Library("aten", "IMPL", "Meta")
META.impl("_fused_sgd_", lambda *args, **kwargs: None)


class PretendedGPU(TorchDispatchMode):
    """Operators on GPU's tensors are fake, all others run. From `no_waiting` on, a copy to or from
    the GPU must be one that does not wait."""
    no_waiting = False
    fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __enter__(self):
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=GPU) is a copy
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(False)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if FakeTensor not in types and kwargs.get("device") != GPU:
            return function(*args, **kwargs)
        if self.no_waiting and function.name() in ("aten::_to_copy", "aten::copy_"):
            ends = {x.device for x in args if isinstance(x, torch.Tensor)}
            ends.add(kwargs.get("device") or args[0].device)
            waits = not (kwargs.get("non_blocking") or args[-1] is True)
            assert len(ends) == 1 or not waits, "this copy waits"
        with self.fake:
            return function(*args, **kwargs)


@pytest.mark.parametrize("work", [
    lambda x: x.item(), lambda x: bool(x.any()), lambda x: x.nonzero(), lambda x: x.cpu(),
    lambda x: x[[0]], lambda x: x + torch.ones(1), lambda x: torch.tensor([1.0], device=GPU)])
def test_the_pretended_gpu_notices_what_waits_or_mixes_devices(work):
    with PretendedGPU() as mode:
        x = torch.ones(1).to(GPU)
        mode.no_waiting = True
        x[:1] = 2 * x.square()
        torch.ones(1).to(GPU, non_blocking=True)
        with pytest.raises(Exception):
            work(x)


class Done(Exception):
    """Two steps of training are done."""


class Job(run.Job):
    """A run that ends after two steps, on a device of the test's."""
    mode = None

    def begin(self, data, batches=None, loader=None):
        super().begin(data, batches, loader)
        self.bar.close()

    def steps_of(self, epoch):
        batches = iter(self.loader)
        yield 0, next(batches)  # constants and the optimizer's state are made
        if self.mode:
            self.mode.no_waiting = True
        yield 1, next(batches)
        raise Done

    def note(self, step, **losses):
        loss = next(iter(losses.values()))
        assert loss.device == self.device and loss.dtype == torch.float32 and loss.ndim == 0
        for group in self.optimizer.param_groups:
            for weight in group["params"]:  # a gradient each, or DistributedDataParallel would wait
                assert weight.grad is not None or not weight.requires_grad


SHARED = "--limit 16 --batch-size 4 --epochs 1 --cache="
RUNS = [
    (sdfl, "--size 64 --backbone resnet18 --optimizer sgd --cache device"),
    (sdfl, "--size 64 --backbone resnet18 --head fc --optimizer adam --loss l1"),
    (sdfl, "--size 64 --backbone resnet18 --adjacency binary --loss wing"),
    (heatmap_landmarks, "--size 64 --backbone resnet18 --strategy SD --erase 1"),
    (lddmm_face, "--size 64"),
    (lddmm_face, "--size 64 --train-points 50 --squared"),
    (lddmm_face, "--size 32 --backbone dan"),
    (lddmm_face, "--size 64 --method coord"),
    (lddmm_face, "--size 64 --method heatmap"),
    *((stn_align, f"--depth 10 --width 8 --method {name}") for name in stn_align.METHODS),
    (stn_align, "--depth 10 --width 8 --align-at input --template fixed --alpha fixed"),
    (stn_align, "--depth 10 --width 8 --lam 0"),
    *((kprpe, f"--depth 2 --rpe {name}") for name in kprpe.RPES),
    *((kprpe, f"--depth 2 --rpe none --loss {name}") for name in kprpe.MARGINS),
    (kprpe, "--depth 2 --sample-rate 0.5 --draw-keypoints --clip 0"),
    (kprpe, "--task dfa --size 64"),
    *((kprpe, f"--task gait --batch-size 8 --frames 2 --dim 32 --rpe {name}")
      for name in ("swin", "kp-multihead")),
]


def train(script, flags, device, folder, monkeypatch):
    """Two steps of a script's own training."""
    args = script.parse_args(f"{SHARED} {flags} --output {folder}/run".split())
    monkeypatch.setattr(run, "setup", lambda args: (0, 1, device))
    monkeypatch.setattr(run, "Job", Job)
    with pytest.raises(Done), warnings.catch_warnings(action="ignore"):
        (kprpe.main if script is kprpe else script.train)(args)


@pytest.mark.parametrize("script, flags", RUNS)
def test_a_step_on_a_gpu_waits_for_nothing(script, flags, tmp_path, monkeypatch):
    monkeypatch.setattr(lddmm_face, "HRModule", torch.nn.Identity)  # 300 blocks alike
    with PretendedGPU() as mode:
        monkeypatch.setattr(Job, "mode", mode)
        train(script, flags, GPU, tmp_path, monkeypatch)


COMPILED = [
    (sdfl, "--size 32 --backbone resnet18"),
    (heatmap_landmarks, "--size 32 --backbone resnet18 --strategy SD"),
    (lddmm_face, "--size 32 --backbone dan"),
    *((stn_align, f"--depth 10 --width 8 --method {name}")
      for name in ("affine2d", "proj", "tps8", "fullalign")),
    *((kprpe, f"--depth 2 --rpe {name}") for name in ("none", "euclidean", "irpe", "kp-multihead")),
    (kprpe, "--task dfa --size 64"),
    (kprpe, "--task gait --batch-size 8 --frames 2 --dim 32 --rpe none"),
]


@pytest.mark.parametrize("script, flags", COMPILED)
def test_a_network_compiles_once_and_whole(script, flags, tmp_path, monkeypatch):
    """The batches of training all have one size. With --amp, whose types are checked on the way."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def whole(net, mode):
        assert mode == "default"
        talks = isinstance(net, kprpe.GaitLoss)  # to the other processes, and is not compiled
        return compiler(net, fullgraph=not talks, backend=backend)

    torch.compiler.reset()
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", whole)
    train(script, f"{flags} --compile --amp", torch.device("cpu"), tmp_path, monkeypatch)
    assert len(graphs) == 1


@pytest.mark.parametrize("device, mode", [("cpu", "default"), ("cuda", "reduce-overhead")])
def test_compiled_steps_are_cuda_graphs_on_a_gpu(device, mode, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda net, mode: mode)
    args = run.argparse.Namespace(compile=True)
    job = run.argparse.Namespace(args=args, world=1, device=torch.device(device))
    assert run.Job.wrap(job, torch.nn.Identity()) == mode
