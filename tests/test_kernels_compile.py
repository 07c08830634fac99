"""The operators on a GPU inside what training wraps around them: torch.compile, autocast,
checkpointing, FSDP2; and that nothing is compiled again when shapes change.

What the same call gives eagerly is the truth here; that the kernels are right is tested elsewhere.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from compare import assert_same
from ops_cases import Arguments, conv_arguments, scan_arguments, ssd_arguments
from tamba.model.config import BlockSpec, Mamba1Spec, Mamba2Spec, MLPSpec, TambaConfig
from tamba.model.modeling import TambaForCausalLM
from tamba.ops import causal_conv1d, selective_scan, ssd

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # torch's compiler and process groups warn of much that is not ours.
    pytest.mark.filterwarnings("default"),
]

Make = Callable[..., Arguments]
OPERATORS: dict[str, tuple[Callable[..., tuple[Tensor, Tensor]], Make]] = {
    "ssd": (ssd, partial(ssd_arguments, heads=4, head_dim=32, groups=2, d_state=16, chunk_size=64)),
    "scan": (selective_scan, partial(scan_arguments, channels=64, groups=1, d_state=16)),
    "conv": (causal_conv1d, partial(conv_arguments, channels=64)),
}
each_operator = pytest.mark.parametrize("name", sorted(OPERATORS))


@pytest.fixture(autouse=True)
def _as_in_training() -> Iterator[None]:
    """Deterministic mode is the tests' own and would stop parts of torch's compiler."""
    torch.use_deterministic_algorithms(False)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def on_gpu(arguments: Arguments, dtype: torch.dtype = torch.float32) -> Arguments:
    """The same on the device, as leaves."""
    tensors = {
        n: t.detach().to("cuda", dtype).requires_grad_() for n, t in arguments.tensors.items()
    }
    masks = {n: None if m is None else m.cuda() for n, m in arguments.masks.items()}
    return replace(arguments, tensors=tensors, masks=masks)


def results(operator: Callable[..., tuple[Tensor, Tensor]], arguments: Arguments) -> list[Tensor]:
    """Output, last state, and gradients of a weighted sum of both."""
    y, last = arguments.call(operator)
    generator = torch.Generator("cuda").manual_seed(1)
    grads = [
        torch.randn(t.shape, generator=generator, device="cuda").to(t.dtype) for t in (y, last)
    ]
    found = torch.autograd.grad([y, last], list(arguments.tensors.values()), grads)
    return [y, last, *found]


def assert_equal(got: list[Tensor], want: list[Tensor], arguments: Arguments) -> None:
    names = ["y", "last", *(f"gradient of {name}" for name in arguments.tensors)]
    for name, a, b in zip(names, got, want, strict=True):
        assert a.dtype == b.dtype, name
        half = b.dtype in (torch.bfloat16, torch.float16)
        assert_same(a, b, "half" if half else "fp32", name)


@each_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("starts", [False, True])
def test_compiled_without_a_graph_break(name, dtype, starts):
    operator, make = OPERATORS[name]
    arguments = on_gpu(make(length=100, starts=starts), dtype)
    compiled = torch.compile(operator, fullgraph=True)
    assert_equal(results(compiled, arguments), results(operator, arguments), arguments)


@each_operator
def test_compiled_once_for_all_lengths(name):
    """With dynamic shapes, lengths and batches after the first two bring no new graph."""
    operator, make = OPERATORS[name]
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(operator, fullgraph=True, dynamic=True, backend=backend)
    for length, batch in [(100, 2), (65, 3)]:
        on_gpu(make(length=length, batch=batch)).call(compiled)
    known = len(graphs)
    for length, batch in [(333, 2), (1000, 4), (127, 5)]:
        arguments = on_gpu(make(length=length, batch=batch))
        y, last = arguments.call(compiled)
        want_y, want_last = arguments.call(operator)
        assert_same(y, want_y, "fp32", "y")
        assert_same(last, want_last, "fp32", "last")
    assert len(graphs) == known


@each_operator
def test_fake_tensors_have_the_right_shapes_and_types(name):
    from torch._subclasses.fake_tensor import FakeTensorMode

    operator, make = OPERATORS[name]
    arguments = on_gpu(make(length=70, starts=True), torch.bfloat16)
    want = arguments.call(operator)
    plain = {n: t.detach() for n, t in arguments.tensors.items()}
    with FakeTensorMode() as mode:
        fakes = {n: mode.from_tensor(t) for n, t in plain.items()}
        masks = {n: None if m is None else mode.from_tensor(m) for n, m in arguments.masks.items()}
        got = replace(arguments, tensors=fakes, masks=masks).call(operator)
    for a, b in zip(got, want, strict=True):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        assert a.stride() == b.stride()


@each_operator
def test_autocast_changes_nothing(name):
    operator, make = OPERATORS[name]
    arguments = on_gpu(make(length=100))
    want = results(operator, arguments)
    with torch.autocast("cuda", torch.bfloat16):
        assert_equal(results(operator, arguments), want, arguments)
        compiled = torch.compile(operator, fullgraph=True)
        assert_equal(results(compiled, arguments), want, arguments)


@each_operator
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(name, reentrant):
    operator, make = OPERATORS[name]
    arguments = on_gpu(make(length=100), torch.bfloat16)
    names = list(arguments.tensors)

    def again(**given):
        rest = {n: t for n, t in given.items() if n not in names}

        def call(*tensors):
            return operator(**dict(zip(names, tensors, strict=True)), **rest)

        return checkpoint(call, *(given[n] for n in names), use_reentrant=reentrant)

    def loss(y, last):
        return y.float().square().sum() + last.float().square().sum()

    for leaf in arguments.tensors.values():
        leaf.grad = None
    loss(*arguments.call(again)).backward()  # reentrant checkpoints know only backward()
    got = [leaf.grad for leaf in arguments.tensors.values()]
    want = torch.autograd.grad(loss(*arguments.call(operator)), list(arguments.tensors.values()))
    for n, a, b in zip(names, got, want, strict=True):
        assert_same(a, b, "half", f"gradient of {n}")


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Names of Triton kernels that meet arguments they have no binary for."""
    knobs = pytest.importorskip("triton").knobs
    found: list[str] = []

    def hook(*, fn, **_):
        found.append(fn.name)

    before = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = hook
    try:
        yield found
    finally:
        knobs.runtime.jit_cache_hook = before


@each_operator
@pytest.mark.parametrize("starts", [False, True])
def test_no_kernel_is_compiled_again(name, starts):
    """One binary a kernel, whatever the length, the batch and where documents start."""
    operator, make = OPERATORS[name]

    def run(batch: int, length: int, seed: int = 0) -> None:
        case = make(batch=batch, length=length, starts=starts, seed=seed)
        results(operator, on_gpu(case, torch.bfloat16))

    run(2, 512)
    with compilations() as names:
        for batch, length in [(2, 1000), (2, 63), (1, 512), (3, 128), (16, 65), (1, 4097), (1, 16)]:
            run(batch, length, seed=batch + length)
    assert not names


def test_a_compilation_is_seen():
    """The count above can fail: an argument that is specialised is compiled again."""
    triton = pytest.importorskip("triton")
    probe = importlib.import_module("triton_probe").probe
    out = torch.zeros(4, device="cuda")
    with compilations() as names:
        for size in (1, 16, 17):
            probe[(1,)](out, size)
    assert len(names) == 3
    assert triton.__version__


def hybrid() -> TambaForCausalLM:
    """Both recurrent mixers at sizes that the kernels know, float32, on the device."""
    blocks = {
        "mamba1": BlockSpec(mixer=Mamba1Spec(d_inner=64, d_state=16, dt_rank=4), mlp=None),
        "mamba2": BlockSpec(
            mixer=Mamba2Spec(n_heads=4, head_dim=16, d_state=16, n_groups=2, norm_groups=1),
            mlp=MLPSpec(d_mlp=64),
        ),
    }
    layers = ["mamba2", "mamba1", "mamba2"]
    config = TambaConfig(vocab_size=64, hidden_size=32, blocks=blocks, layers=layers)
    torch.manual_seed(0)
    return TambaForCausalLM(config).cuda()


def test_a_model_trains_the_same_under_fsdp2(tmp_path):
    """One process: parameters become DTensors, gathered before and reduced after each block."""
    from torch.distributed.fsdp import fully_shard

    ids = torch.randint(0, 64, (2, 100), generator=torch.Generator().manual_seed(0)).cuda()
    want = hybrid()
    want(ids, labels=ids).loss.backward()
    model = hybrid()
    torch.distributed.init_process_group(
        "nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        model(ids, labels=ids).loss.backward()
        truth = dict(want.named_parameters())
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert_same(parameter.grad.full_tensor(), truth[name].grad, "fp32", name)
    finally:
        torch.distributed.destroy_process_group()


def test_a_whole_model_compiles_without_a_graph_break():
    ids = torch.randint(0, 64, (2, 100), generator=torch.Generator().manual_seed(0)).cuda()
    model = hybrid()
    want = model.model(ids, use_cache=False).last_hidden_state
    compiled = torch.compile(model.model, fullgraph=True)
    assert_same(compiled(ids, use_cache=False).last_hidden_state, want, "fp32", "hidden")
