"""Where computation runs: the choice of a device, compilation, and CPU threads."""

import os
import shutil
import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch


def choose_device(device, dtype):
    """The settings `device` and `dtype`, either of which may be "auto" -> (device, torch dtype). auto is the first of
    cuda, mps and cpu that is here, and bfloat16 where the device multiplies it. Raises ValueError."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun's number of this process on its node
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    kind, _, index = device.partition(":")
    if not counts.get(kind) or (index and not (index.isdecimal() and int(index) < counts[kind])):
        available = ", ".join(f"{d}{f':0 to {n - 1}' * (n > 1)}" for d, n in counts.items() if n)
        raise ValueError(f"device {device} is not available; this machine has {available}")
    if dtype == "auto":
        dtype = "bfloat16" if kind == "cuda" or (kind == "cpu" and cpu_multiplies_bf16()) else "float32"
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be auto, float32 or bfloat16, not {dtype}")
    if kind == "cuda":
        # The allocator reads this at its first use. Each step has other numbers of targets and blocks, which leave gaps
        # between fixed segments; expandable ones close them, for all tensors, and no shape need be padded.
        if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
            os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans half a second for every new shape, and ours vary
    return device, getattr(torch, dtype)


def cpu_multiplies_bf16():
    """Whether this CPU has instructions for products of bfloat16, at least twice as fast as fp32's."""
    return any(getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("avx512_bf16", "amx_tile"))


def free_memory(device):
    """Bytes that a device has free, of a CPU at most 16 GB, which is also the guess where the system does not tell."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()  # of memory that tensors of before have left to the allocator
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    available = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
    return min([16 * 10**9, *available])


def missing_compiler():
    """The name of the C++ compiler that torch.compile would start, if it is not here, else None."""
    compiler = os.environ.get("CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++"))
    return None if shutil.which(compiler) else compiler


@cache
def compiled(function, dynamic=False, fixed_threads=False, tune=False):
    """torch.compile(function), one for all callers. fixed_threads: compiled anew for another number of CPU threads.
    tune: measure several kernels, and take the fastest."""
    torch._dynamo.config.recompile_limit = 64  # beyond it, a call runs uncompiled; generation has shapes of its own
    options = {"cpp.dynamic_threads": not fixed_threads, "max_autotune": tune}  # the first for ThreadsByLoad
    options["cpp.vec_isa_ok"] = True  # else it first compiles test programs with AVX2 and AVX-512, for 4 to 10 s
    return torch.compile(function, dynamic=dynamic, options=options)


class ThreadsByLoad:
    """torch's number of CPU threads, fitted to the cores that are free. OpenMP's threads wait for each other many times
    a second, so one without a core of its own makes all of them up to ten times slower. On Linux; elsewhere, and where
    OMP_NUM_THREADS is set, the number stays. Another number changes results by rounding."""

    def __init__(self):
        self.most, self.lowered = torch.get_num_threads(), 0.0
        self.fixed = "OMP_NUM_THREADS" in os.environ or not Path("/proc/self/schedstat").exists()
        self.clock, self.waited = time.monotonic(), self._waited()

    def _waited(self):
        """Seconds for which this process's threads, all together, have been ready to run and had no core."""
        total = 0
        for path in () if self.fixed else Path("/proc/self/task").glob("*/schedstat"):
            with suppress(OSError, IndexError):  # the thread has ended
                total += int(path.read_text().split()[1])
        return total / 1e9

    def adapt(self, device):
        """Call this often; it looks once a second. Returns the number when it falls for the first time, else None."""
        now, n = time.monotonic(), torch.get_num_threads()
        if self.fixed or device.type != "cpu" or now - self.clock < 1:
            return None
        waited = self._waited()
        missing, self.clock, self.waited = (waited - self.waited) / (now - self.clock), now, waited  # cores
        if missing > 0.25 and n > 1:
            torch.set_num_threads(max(1, n // 2))  # few numbers, as compiled code is compiled again for each
            first, self.lowered = not self.lowered, now
            return torch.get_num_threads() if first else None
        if n < self.most and now - self.lowered > 60:
            torch.set_num_threads(self.most)  # the next look shows whether they have cores


@cache
def cpu_threads():
    """The ThreadsByLoad of this process."""
    return ThreadsByLoad()


def upload(tensor, device):
    """The tensor on `device`, without waiting for the device."""
    if torch.device(device).type == "cuda" and not tensor.is_cuda:
        return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)
    return tensor.to(device)
