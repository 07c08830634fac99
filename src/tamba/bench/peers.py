"""The libraries that our operators are measured against, each imported only when its turn comes.

A peer is a `Side`: how to load it, and how its arguments and results map to ours. It may be
installed, or lie unpacked in a folder (`Peers(folder)`); archives whose package import needs a
compiled extension are entered below their own ``__init__``. A peer that is missing, refuses or
fails raises `Refusal` or its own error, which the table shows in place of a time.

Every side takes our argument names. `adapt` turns an argument into the side's layout before the
clock starts, `restore` turns a result or gradient back.

Shape letters: `B` batch, `T` tokens, `D` channels, `H` heads, `G` groups, `P` head_dim,
`N` d_state.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.machinery import ExtensionFileLoader
from importlib.util import find_spec, module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Call = Callable[..., tuple[Tensor, Tensor | None]]
"""Tensors by our names to the output and the last state (None where the side gives none)."""


class Refusal(Exception):
    """Why a side cannot take part."""


def _as_it_is(name: str, tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Side:
    """One implementation of an operator.

    Args:
        load: imports it and gives the call; raises `Refusal` or what the import raises.
        adapt: (argument name, tensor) to its layout, outside the clock.
        restore: (argument name, or ``y`` and ``last``; tensor) back to our layout.
        without: results it cannot give and gradients it does not compute.
    """

    load: Callable[[], Call]
    adapt: Callable[[str, Tensor], Tensor] = _as_it_is
    restore: Callable[[str, Tensor], Tensor] = _as_it_is
    without: frozenset[str] = frozenset()


def _plain(module: str, name: str) -> Callable[..., Any]:
    """transformers' own code of a function that it would take from a kernel library it finds."""
    found = getattr(importlib.import_module(module), name)
    return getattr(found, "__wrapped__", found)


def _rounded_product(x: Tensor, y: Tensor) -> Tensor:
    """x · y in float32, rounded to the type of x; in one pass where no gradient is asked for."""
    if torch.is_grad_enabled():
        return (x * y).to(x.dtype)
    return torch.mul(x, y, out=torch.empty_like(x))


def _time_last(*names: str) -> Callable[[str, Tensor], Tensor]:
    """The named tensors with their axes 1 and 2 exchanged: [B, T, D] to [B, D, T] and back."""

    def swap(name: str, tensor: Tensor) -> Tensor:
        return tensor.transpose(1, 2).contiguous() if name in names else tensor

    return swap


_SCAN_TIME_LAST = _time_last("x", "dt", "z", "B", "C", "y")


def _without_group(swap: Callable[[str, Tensor], Tensor]) -> Callable[[str, Tensor], Tensor]:
    """The same, with B and C [B, T, 1, N] as [B, N, T]."""
    return lambda name, t: swap(name, t[:, :, 0] if name in "BC" else t)


def _with_group(swap: Callable[[str, Tensor], Tensor]) -> Callable[[str, Tensor], Tensor]:
    return lambda name, t: swap(name, t)[:, :, None] if name in "BC" else swap(name, t)


@dataclass
class Peers:
    """Where peers are found, and what was built of them.

    Args:
        folder: holds unpacked archives of mamba-ssm, causal-conv1d and fla-core, or None to use
            what is installed.
        build_seconds: how long compilers may take in all, from `start_builds` on.
        may_build: whether what was not built before may be.
    """

    folder: Path | None = None
    build_seconds: float = 120.0
    may_build: bool = True
    _builds: dict[str, _Build] = field(default_factory=dict)

    # SSD (Mamba-2)

    def mamba_ssd(self, chunk_size: int = 256) -> Side:
        """mamba_ssm's Triton SSD."""

        def load() -> Call:
            combined = self.mamba_ssm("ops.triton.ssd_combined").mamba_chunk_scan_combined

            def call(**t: Tensor) -> tuple[Tensor, Tensor | None]:
                return combined(
                    t["x"],
                    t["dt"],
                    t["A"],
                    t["B"],
                    t["C"],
                    chunk_size,
                    D=t.get("D"),
                    z=t.get("z"),
                    dt_bias=t.get("dt_bias"),
                    initial_states=t.get("state"),
                    seq_idx=t.get("starts"),
                    dt_softplus=True,
                    return_final_states=True,
                )

            return call

        def adapt(name: str, tensor: Tensor) -> Tensor:
            return tensor.cumsum(1, dtype=torch.int32) if name == "starts" else tensor

        return Side(load, adapt)

    def fla_ssd(self, *, expanded: bool = False, guard: bool = True) -> Side:
        """fla's gated linear attention as SSD, with step sizes before it, skip and gate after it.

        It knows no groups: B and C are repeated to every head.

        Args:
            expanded: repeat them outside the clock.
            guard: False to let its backward pass run where it refuses to (Hopper with Triton 3.6);
                the row's comparison with float64 then says whether the result is right.
        """

        def load() -> Call:
            self._fla()
            chunk = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla
            guarded: Any = importlib.import_module("fla.ops.common.chunk_o")
            is_fixed = guarded.TRITON_ABOVE_3_7_1

            def call(**t: Tensor) -> tuple[Tensor, Tensor | None]:
                if "starts" in t:
                    raise Refusal("packed rows need one row of all documents (cu_seqlens)")
                guarded.TRITON_ABOVE_3_7_1 = is_fixed or not guard
                x, B, C = t["x"], t["B"], t["C"]
                share = x.shape[2] // B.shape[2]
                if share > 1:
                    B, C = (s.repeat_interleave(share, dim=2) for s in (B, C))
                dt = F.softplus(t["dt"] + t["dt_bias"])
                inputs = _rounded_product(x, dt[..., None])
                state = t["state"].transpose(2, 3) if "state" in t else None
                y, last = chunk(
                    q=C,
                    k=B,
                    v=inputs,
                    g=dt * t["A"],
                    scale=1.0,
                    initial_state=state,
                    output_final_state=True,
                )
                y = torch.addcmul(y, x, t["D"].to(x.dtype)[:, None])
                if "z" in t:
                    y = y * F.silu(t["z"])
                return y, last.transpose(2, 3)

            return call

        def adapt(name: str, tensor: Tensor) -> Tensor:
            if not expanded or name not in ("B", "C"):
                return tensor
            return tensor.repeat_interleave(heads[0] // tensor.shape[2], dim=2)

        heads = [0]

        def note_heads(name: str, tensor: Tensor) -> Tensor:
            # Arguments come in order, x first.
            if name == "x":
                heads[0] = tensor.shape[2]
            return adapt(name, tensor)

        return Side(load, note_heads, without=frozenset("BC" if expanded else ""))

    def transformers_ssd(self, chunk_size: int = 256) -> Side:
        """The plain-torch SSD of transformers."""

        def load() -> Call:
            scan = _plain("transformers.models.mamba2.modeling_mamba2", "mamba2_chunk_scan")

            def call(**t: Tensor) -> tuple[Tensor, Tensor | None]:
                if {"z", "starts"} & t.keys():
                    raise Refusal("has no gate and no document starts")
                given = {name: t[name] for name in ("x", "dt", "A", "B", "C")}
                return scan(
                    *given.values(),
                    chunk_size,
                    D=t.get("D"),
                    dt_bias=t.get("dt_bias"),
                    initial_states=t.get("state"),
                    dt_softplus=True,
                    return_final_states=True,
                )

            return call

        return Side(load)

    # The selective scan (Mamba-1)

    def cuda_scan(self) -> Side:
        """mamba_ssm's CUDA selective scan, built from the archive."""

        def load() -> Call:
            sys.modules["selective_scan_cuda"] = self._built("selective_scan_cuda")
            scan = self.mamba_ssm("ops.selective_scan_interface").selective_scan_fn

            def call(**t: Tensor) -> tuple[Tensor, Tensor | None]:
                return scan(
                    t["x"],
                    t["dt"],
                    t["A"],
                    t["B"],
                    t["C"],
                    t.get("D"),
                    t.get("z"),
                    t.get("dt_bias"),
                    delta_softplus=True,
                    return_last_state=True,
                )

            return call

        return Side(load, _without_group(_SCAN_TIME_LAST), _with_group(_SCAN_TIME_LAST))

    def transformers_scan(self, *, mambapy: bool = False) -> Side:
        """transformers' loop over tokens, or the parallel scan of mambapy that it may call."""

        def load() -> Call:
            if mambapy and find_spec("mambapy") is None:
                raise Refusal("mambapy is not installed")
            scan = _plain("transformers.models.mamba.modeling_mamba", "mamba_selective_scan")

            def call(**t: Tensor) -> tuple[Tensor, Tensor | None]:
                y = scan(
                    t["x"],
                    t["dt"],
                    t["A"],
                    t["B"],
                    t["C"],
                    t.get("D"),
                    t.get("z"),
                    t.get("dt_bias"),
                    delta_softplus=True,
                    use_mambapy=mambapy,
                )
                return y, None

            return call

        # Views, as its mixer makes them.
        swap = {"x", "dt", "z", "B", "C", "y"}

        def adapt(name: str, tensor: Tensor) -> Tensor:
            tensor = tensor[:, :, 0] if name in "BC" else tensor
            return tensor.mT if name in swap else tensor

        def restore(name: str, tensor: Tensor) -> Tensor:
            tensor = tensor.mT if name in swap else tensor
            return tensor[:, :, None] if name in "BC" else tensor

        return Side(load, adapt, restore, frozenset({"last"}))

    # The convolution

    def fla_conv(self) -> Side:
        """fla's Triton convolution."""

        def load() -> Call:
            self._fla()
            conv = importlib.import_module("fla.modules.convolution").causal_conv1d

            def call(**t: Tensor) -> tuple[Tensor, Tensor | None]:
                return conv(t["x"], t["weight"], t["bias"], activation="silu")[0], None

            return call

        return Side(load, without=frozenset({"last"}))

    def cuda_conv(self) -> Side:
        """causal-conv1d's CUDA kernel, built from the archive; it takes channel-last tensors."""

        def load() -> Call:
            self._causal_conv1d()
            conv = importlib.import_module("causal_conv1d.causal_conv1d_interface").causal_conv1d_fn

            def call(**t: Tensor) -> tuple[Tensor, Tensor | None]:
                y = conv(t["x"].mT, t["weight"], t["bias"], activation="silu")
                return y.mT, None

            return call

        return Side(load, without=frozenset({"last"}))

    def transformers_conv(self) -> Side:
        """The grouped convolution of torch, as transformers calls it."""

        def load() -> Call:
            conv = _plain("transformers.models.mamba2.modeling_mamba2", "causal_conv1d_fn")

            def call(**t: Tensor) -> tuple[Tensor, Tensor | None]:
                return conv(t["x"].mT, t["weight"], t["bias"], activation="silu").mT, None

            return call

        return Side(load, without=frozenset({"last"}))

    # The loss of distillation: (hidden, head, targets, teacher_hidden, teacher_head) to a scalar

    def torch_loss(self, *, ce: float = 0.0) -> Side:
        """All logits at once, widened: what `log_softmax`, `kl_div` and autograd make of it."""

        def call(**t: Tensor) -> tuple[Tensor, Tensor | None]:
            with torch.no_grad():
                log_p = F.linear(t["teacher_hidden"], t["teacher_head"]).float().log_softmax(-1)
            logits = F.linear(t["hidden"], t["head"]).float()
            log_q = logits.log_softmax(-1)
            loss = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
            if ce:
                loss = loss + ce * F.nll_loss(log_q, t["targets"])
            return loss, None

        return Side(lambda: call)

    def liger_loss(self, beta: float = 0.0) -> Side:
        """liger-kernel's fused linear Jensen-Shannon divergence; KL(teacher, student) for 0."""

        def load() -> Call:
            self._liger()
            fused = importlib.import_module("liger_kernel.ops").LigerFusedLinearJSDFunction

            def call(**t: Tensor) -> tuple[Tensor, Tensor | None]:
                names = ("hidden", "head", "teacher_hidden", "teacher_head")
                loss = fused.apply(*(t[name] for name in names), None, beta, -100, 1.0)
                return loss, None

            return call

        return Side(load)

    def liger_ce(self) -> Side:
        """liger-kernel's fused linear cross-entropy."""

        def load() -> Call:
            self._liger()
            fused = importlib.import_module("liger_kernel.ops").LigerFusedLinearCrossEntropyFunction

            def call(**t: Tensor) -> tuple[Tensor, Tensor | None]:
                found = fused.apply(t["hidden"], t["head"], t["targets"])
                return found[0] if isinstance(found, tuple) else found, None

            return call

        return Side(load)

    def fla_loss(self) -> Side:
        """fla's fused linear KL divergence."""

        def load() -> Call:
            self._fla()
            fused = importlib.import_module("fla.modules.fused_kl_div").fused_kl_div_loss

            def call(**t: Tensor) -> tuple[Tensor, Tensor | None]:
                names = ("hidden", "teacher_hidden", "head", "teacher_head")
                return fused(*(t[name] for name in names)), None

            return call

        return Side(load)

    def cut_cross_entropy(self) -> Side:
        """Apple's cut-cross-entropy, which never writes logits."""

        def load() -> Call:
            if find_spec("cut_cross_entropy") is None:
                found = self._find("cut_cross_entropy/linear_cross_entropy.py", "cut-cross-entropy")
                sys.path.append(str(found.parents[1]))
            cut = importlib.import_module("cut_cross_entropy").linear_cross_entropy

            def call(**t: Tensor) -> tuple[Tensor, Tensor | None]:
                return cut(t["hidden"], t["head"], t["targets"]), None

            return call

        return Side(load)

    # Finding and building

    def start_builds(self, *names: str) -> None:
        """Let compilers work on the named extensions while other rows are measured."""
        for name in names:
            if name not in self._builds and find_spec(name) is None:
                with contextlib.suppress(Refusal):
                    self._builds[name] = _Build.start(name, self._archive_of(name), self.may_build)

    def close(self) -> None:
        """Stop the compilers that nobody waited for."""
        for build in self._builds.values():
            if build.process is not None and build.process.poll() is None:
                build.process.kill()
                build.process.wait()

    def _archive_of(self, extension: str) -> Path:
        if extension == "selective_scan_cuda":
            return self._find("selective_scan.cpp", "mamba-ssm's source archive").parent
        return self._find("causal_conv1d.cpp", "causal-conv1d's source archive").parent

    def _built(self, name: str) -> ModuleType:
        if name in sys.modules:
            return sys.modules[name]
        if find_spec(name) is not None:
            return importlib.import_module(name)
        self.start_builds(name)
        if name not in self._builds:
            self._archive_of(name)
        return self._builds[name].module(self.build_seconds)

    def _causal_conv1d(self) -> None:
        if find_spec("causal_conv1d") is not None:
            return
        sys.modules["causal_conv1d_cuda"] = self._built("causal_conv1d_cuda")
        init = self._find("causal_conv1d_interface.py", "causal-conv1d's source archive")
        sys.path.append(str(init.parents[1]))

    def mamba_ssm(self, module: str) -> ModuleType:
        """A module of mamba_ssm, entered below the package's own import."""
        if "mamba_ssm" not in sys.modules:
            spec = find_spec("mamba_ssm")
            root = (
                Path(spec.origin).parent
                if spec is not None and spec.origin is not None
                else self._find("ssd_combined.py", "mamba-ssm's source archive").parents[2]
            )
            package = ModuleType("mamba_ssm")
            package.__path__ = [str(root)]
            sys.modules["mamba_ssm"] = package
        self._einops()
        return importlib.import_module(f"mamba_ssm.{module}")

    def _fla(self) -> None:
        if find_spec("fla") is None:
            found = self._find("ops/simple_gla/__init__.py", "fla-core")
            sys.path.append(str(found.parents[3]))
        self._einops()

    def _liger(self) -> None:
        if find_spec("liger_kernel") is None:
            found = self._find("liger_kernel/ops/fused_linear_jsd.py", "liger-kernel")
            sys.path.append(str(found.parents[2]))

    def _einops(self) -> None:
        if find_spec("einops") is None:
            sys.path.append(str(self._find("einops/__init__.py", "einops").parents[1]))

    def _find(self, tail: str, what: str) -> Path:
        if self.folder is None:
            raise Refusal(f"{what} is neither installed nor in a --peers folder")
        for path in sorted(self.folder.rglob(Path(tail).name)):
            if path.as_posix().endswith(f"/{tail}"):
                return path
        raise Refusal(f"{what} is neither installed nor in {self.folder.name}/")


@dataclass(frozen=True)
class _Build:
    """A compiler at work on an extension, in a process of its own."""

    name: str
    folder: Path
    process: subprocess.Popen[str] | None
    begun: float

    @classmethod
    def start(cls, name: str, source: Path, may_build: bool) -> _Build:
        if not torch.cuda.is_available():
            raise Refusal("needs a CUDA device")
        capability = "".join(str(n) for n in torch.cuda.get_device_capability())
        home = Path(os.environ.get("TAMBA_BENCH_BUILDS", "~/.cache/tamba/bench")).expanduser()
        built_of = f"{name}-{_digest(source)}-torch{torch.__version__}-sm{capability}"
        folder = home / built_of
        if (folder / f"{name}.so").exists():
            return cls(name, folder, None, time.monotonic())
        if not may_build:
            raise Refusal("is not built yet")
        if shutil.which("nvcc") is None and "CUDA_HOME" not in os.environ:
            raise Refusal("needs nvcc to build it")
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "tamba.bench.peers", name, str(source), str(folder)]
        with (folder / "log.txt").open("w") as log:
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, "TORCH_CUDA_ARCH_LIST": ".".join(capability)},
            )
        return cls(name, folder, process, time.monotonic())

    def module(self, limit: float) -> ModuleType:
        """Wait for the rest of `limit` seconds, and import what was built."""
        if self.process is not None:
            self._wait(self.process, limit)
        before = sys.getdlopenflags()
        sys.setdlopenflags(os.RTLD_LAZY)
        loader = ExtensionFileLoader(self.name, str(self.folder / f"{self.name}.so"))
        spec = spec_from_loader(self.name, loader)
        assert spec is not None
        try:
            module = module_from_spec(spec)
            loader.exec_module(module)
        finally:
            sys.setdlopenflags(before)
        sys.modules[self.name] = module
        return module

    def _wait(self, process: subprocess.Popen[str], limit: float) -> None:
        left = max(0.0, limit - (time.monotonic() - self.begun))
        try:
            status = process.wait(left)
        except subprocess.TimeoutExpired:
            process.kill()
            raise Refusal(f"not built within {limit:.0f} s") from None
        if status:
            log = (self.folder / "log.txt").read_text().splitlines()
            error = next((line for line in log if "error" in line.lower()), "no message")
            raise Refusal(f"does not build: {error.strip()}"[:300])


def _digest(source: Path) -> str:
    """Of what is compiled: the archive's files and what is taken from them."""
    found = hashlib.sha256(_SCAN_UNIT.encode())
    for path in sorted(source.iterdir()):
        found.update(path.read_bytes())
    return found.hexdigest()[:10]


# One branch of every switch: the rows have B and C by token, softplus, a gate and whole blocks.
_SCAN_UNIT = """
#include <c10/util/Exception.h>
#include "static_switch.h"
#undef BOOL_SWITCH
#define BOOL_SWITCH(COND, NAME, ...) [&] {{ \\
    TORCH_CHECK(COND, "this variant is not built"); \\
    constexpr bool NAME = true; return __VA_ARGS__(); }}()
#include "{kind}_kernel.cuh"
template void {kind}_cuda<at::BFloat16, float>({parameters} &, cudaStream_t);
"""
_SCAN_KINDS = {"selective_scan_fwd": "SSMParamsBase", "selective_scan_bwd": "SSMParamsBwd"}


def _build(name: str, source: Path, folder: Path) -> None:
    """Compile an extension; the main program of the process that `_Build` starts.

    Only what the rows call is compiled: bfloat16, and of the selective scan real numbers and one
    branch of each switch. What else the dispatchers name stays undefined and is never looked up.
    """
    from torch.utils import cpp_extension

    if name == "selective_scan_cuda":
        units = {
            f"{kind}.cu": _SCAN_UNIT.format(kind=kind, parameters=parameters)
            for kind, parameters in _SCAN_KINDS.items()
        }
    else:
        units = {path.name: _only_bfloat16(path.read_text()) for path in source.glob("*.cu")}
    for file, text in units.items():
        _write(folder / file, text)
    operators = [f"-U__CUDA_NO_{t}_OPERATORS__" for t in ("HALF", "BFLOAT16", "BFLOAT162")]
    conversions = [f"-U__CUDA_NO_{t}_CONVERSIONS__" for t in ("HALF", "BFLOAT16", "BFLOAT162")]
    sys.setdlopenflags(os.RTLD_LAZY)
    cpp_extension.load(
        name,
        [*(str(path) for path in source.glob("*.cpp")), *(str(folder / file) for file in units)],
        extra_include_paths=[str(source)],
        extra_cflags=["-O3"],
        extra_cuda_cflags=[
            "-O3",
            "--expt-relaxed-constexpr",
            "--expt-extended-lambda",
            "--use_fast_math",
            *operators,
            *conversions,
        ],
        extra_ldflags=["-Wl,-z,lazy"],
        build_directory=str(folder),
        verbose=True,
    )


def _only_bfloat16(text: str) -> str:
    """A source file without the instantiations for other types at its end."""
    return "".join(
        line
        for line in text.splitlines(keepends=True)
        if not line.startswith("template void ") or "<at::BFloat16, at::BFloat16>" in line
    )


def _write(path: Path, text: str) -> None:
    """Only when it changes, so that what is built of it stays."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def autotuners() -> Iterator[Any]:
    """Every autotuned Triton kernel of the loaded peers, once."""
    tuner = importlib.import_module("triton.runtime.autotuner").Autotuner
    seen: set[int] = set()
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in ("mamba_ssm", "fla"):
            continue
        for value in list(vars(module).values()):
            # Heuristics lie around a tuner, a tuner around heuristics.
            for _ in range(4):
                if isinstance(value, tuner) and id(value) not in seen:
                    seen.add(id(value))
                    yield value
                value = getattr(value, "fn", None)


def tune_briefly() -> None:
    """Let autotuned peers spend 30 ms on a configuration instead of 125; the choice is theirs.

    It is kept in Triton's cache beside the binaries, as the tuner does for those who ask for it, so
    that another row or run does not time some 200 configurations again.
    """
    do_bench = importlib.import_module("triton.testing").do_bench

    def brief(call: Callable[[], object], quantiles: Any) -> Any:
        return do_bench(call, warmup=5, rep=25, quantiles=quantiles)

    for tuner in autotuners():
        tuner._do_bench = brief
        tuner.cache_results = True
        tuner.__dict__.pop("do_bench", None)


def _all_the_same(call: Callable[[], object], quantiles: Any) -> Any:
    """A stand-in for a benchmark: runs the call, and finds all calls equal."""
    call()
    return [1.0] * len(quantiles)


def keep_share_of_configurations(part: int, parts: int) -> None:
    """Leave every autotuned peer one share of its configurations, to be compiled and not timed."""

    for tuner in autotuners():
        if tuner._do_bench is not _all_the_same:
            tuner.configs = tuner.configs[part::parts] or tuner.configs[:1]
            tuner._do_bench = _all_the_same
            tuner.cache_results = False  # nothing was timed
            tuner.__dict__.pop("do_bench", None)


def compile_in_parallel(module: str, arguments: Sequence[str], seconds: float) -> None:
    """Fill Triton's cache with the peers' autotuned configurations, many processes at a time.

    mamba_ssm alone has some 200 for forward and backward, which one process would compile one after
    another. What is missing when the time is over is compiled when its turn comes.

    Args:
        module: its main program takes `arguments`, its part and the number of parts.
        seconds: for all processes together.
    """
    parts = min(16, os.cpu_count() or 1)
    children = [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments, str(part), str(parts)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for part in range(parts)
    ]
    deadline = time.monotonic() + seconds
    try:
        for child in children:
            child.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    finally:
        for child in children:
            child.kill()
            child.wait()


def versions() -> dict[str, str]:
    """Of what was loaded in this process."""
    found = {}
    for name in ("fla", "mamba_ssm", "mambapy", "causal_conv1d", "liger_kernel"):
        module = sys.modules.get(name)
        if module is None:
            continue
        version = getattr(module, "__version__", None)
        if version is None:
            version = _version_in(Path(next(iter(module.__path__))) / "__init__.py")
        if version is None:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                version = importlib.metadata.version(name)
        found[name] = version or "unknown"
    return found


def _version_in(path: Path) -> str | None:
    for line in path.read_text().splitlines():
        if line.startswith("__version__"):
            return str(json.loads(line.split("=")[1].strip().replace("'", '"')))
    return None


if __name__ == "__main__":
    _build(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
