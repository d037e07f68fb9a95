"""The CUDA kernels of csrc/cuda: what nvcc makes of them, and what they do on the CPU.

Their results are compared in the tests of the operators, as the backend "cuda on host" (see ``cuda_on_host``).
"""

from __future__ import annotations

import collections
import re
from typing import Any

import cuda_on_host
import pytest
import torch
from samples import allocated_by_the_loss, check_against_oracle, outputs_and_gradients, sample_inputs
from torch import Tensor

from benchmarks import inspect_cuda, measure

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
TARGETS = (80, 90)
needs_nvcc = pytest.mark.skipif(inspect_cuda.NVCC is None, reason="no nvcc")
needs_compiler = pytest.mark.skipif(cuda_on_host.COMPILER is None, reason="no g++")

ELEMENTWISE = 64  # registers with which a multiprocessor runs 1024 threads
REGISTERS = 168  # with 128 threads: three blocks on a multiprocessor of 65536 registers


@pytest.fixture(scope="module")
def compiled() -> list[tuple[str, dict[str, Any]]]:
    """(kernel, what it uses), of each target."""
    return [
        (f"{name} sm_{c}", used) for c, found in inspect_cuda.inspect(TARGETS).items() for name, used in found.items()
    ]


def _plain(name: str) -> str:
    return name.split("<")[0].split(" ")[0]


@needs_nvcc
def test_every_kernel_is_compiled_for_every_target(compiled: list[tuple[str, dict[str, Any]]]) -> None:
    written = set()
    for path in (*inspect_cuda.SOURCES, *inspect_cuda.SOURCES[0].parent.glob("*.cuh")):
        written |= set(re.findall(r"__global__ void (?:__launch_bounds__\(.*\) )?(\w+)\(", path.read_text()))
    for capability in TARGETS:
        assert {_plain(name) for name, _ in compiled if name.endswith(f"sm_{capability}")} == written
    reported = {kernel for calls in inspect_cuda.CASES.values() for call in calls for kernel, _, _ in call.launches}
    assert {_plain(kernel) for kernel in reported} == written


@needs_nvcc
def test_nothing_is_spilled(compiled: list[tuple[str, dict[str, Any]]]) -> None:
    for name, used in compiled:
        assert (used["local"], used["stack"]) == (0, 0), (name, used)


@needs_nvcc
def test_registers_and_shared_memory(compiled: list[tuple[str, dict[str, Any]]]) -> None:
    for name, used in compiled:
        assert used["registers"] <= (REGISTERS if "embedding" in name else ELEMENTWISE), (name, used)
        assert used["shared"] <= 48 * 1024, (name, used)


SIZES = {"float": 4, "double": 8, "BFloat16": 2, "Half": 2}
OF_A_FEW = ("sum_partials_kernel", "flowmap_loss_means_kernel", "dmd_gradient_normalisers_kernel")  # sums, that is
COMBINATIONS = {  # of dtypes
    **dict.fromkeys(("gate_blend_fwd", "gate_blend_bwd", "interval_inputs_fwd", "interval_inputs_bwd"), 10),
    **dict.fromkeys(("rollout_step_fwd", "rollout_step_bwd"), 6),
    **dict.fromkeys(("flowmap_loss_fwd", "dmd_gradient_sums"), 10),
    **dict.fromkeys(("flowmap_loss_bwd", "dmd_gradient_fwd", "dmd_gradient_bwd"), 4),
}


def _arrays(name: str, sizes: list[int]) -> tuple[list[int], list[int]]:
    """Bytes of an element of each array that a kernel reads, and of each that it writes, by those of its types."""
    first, last = sizes[0], sizes[-1]
    wide = max(*sizes, 4)
    arrays = {
        "gate_blend_fwd": ([first, last], [first]),
        "gate_blend_bwd": ([first, first, last], [first, last]),
        "rollout_step_fwd": ([first, wide, last, last], [wide, wide, last]),
        "rollout_step_bwd": ([wide, wide, last], [first, last, last]),
        "interval_inputs_fwd": ([first, first], [wide, last, last, last]),
        "interval_inputs_bwd": ([wide, last, last, last], [first, first]),
        "flowmap_loss_fwd": ([first, *2 * sizes[1:]], [wide]),
        "flowmap_loss_bwd": ([wide], [first]),
        "dmd_gradient_sums": ([*sizes, last, last], [wide]),
        "dmd_gradient_fwd": ([last, last, last], [wide]),
        "dmd_gradient_bwd": ([wide], [first]),
    }
    return arrays[name.removesuffix("_kernel")]


@needs_nvcc
def test_elements_are_read_and_written_16_bytes_at_a_time(compiled: list[tuple[str, dict[str, Any]]]) -> None:
    seen: collections.Counter[str] = collections.Counter()
    for name, used in compiled:
        if "embedding" in name or _plain(name) in OF_A_FEW:
            continue
        sizes = [SIZES[kind] for kind in re.findall(r"\w+", name.split("<")[1].split(">")[0])]
        loads, stores = _arrays(_plain(name), sizes)
        elements = 16 // min(loads + stores)
        for kind, each in (("loads", loads), ("stores", stores)):
            assert used[kind][16] == sum(elements * size // 16 for size in each), (name, kind, used)
        seen[_plain(name).removesuffix("_kernel")] += 1
    assert seen == {name: len(TARGETS) * count for name, count in COMBINATIONS.items()}


@needs_nvcc
def test_weights_are_read_16_bytes_at_a_time(compiled: list[tuple[str, dict[str, Any]]]) -> None:
    """A loop for each dtype of the weights, which reads a piece of every unit's."""
    for name, used in compiled:
        layers = re.match(r"flowmap_embedding_(\w+)_kernel<(float|double), (\d)>", name)
        if layers is None or layers[1] == "bwd_hidden":
            continue
        rows = int(layers[3])
        units, dtypes = (1 if rows <= 2 else 2), (3 if layers[2] == "float" else 1)
        assert used["loads"][16] >= units * dtypes, (name, used)


@needs_nvcc
@pytest.mark.usefixtures("compiled")
def test_the_report_lists_every_launch() -> None:
    entries = list(inspect_cuda.report(TARGETS))
    launches = {
        (case, kernel) for case, calls in inspect_cuda.CASES.items() for c in calls for kernel, _, _ in c.launches
    }
    for capability in TARGETS:
        listed = {(e["case"], e["kernel"]) for e in entries if e["target"] == f"sm_{capability}"}
        assert listed == {(f"{case}, CUDA C++", kernel) for case, kernel in launches}
    for entry in entries:
        # Elementwise operators move nothing twice, but for the scores of a sample that is the work of several blocks;
        # the embedding's backward reads the second layers twice, and the hidden units again and again.
        limit = {3: 1.376, 5: 1.6}.get(entry["operator_launches"], 1.1 if "embedding" in entry["case"] else 1.002)
        assert 1 <= entry["operator_moved_over_floor"] <= limit, entry
        assert entry["programs"] > 0 and sum(entry["loads"].values()) > 0


# ---- on the CPU


@pytest.fixture
def on_host() -> Any:
    with cuda_on_host.installed():
        yield


UNDER_TIMES = ("rollout_step", "interval_inputs", "flowmap_loss", "dmd_gradient")
LARGER: dict[str, dict[str, Any]] = {  # several blocks of every kernel, and ends that fill none
    "gate_blend": {"size": (3, 2011)},
    "flowmap_embedding": {"rows": (11,), "channels": 270, "hidden": (140, 85), "width": 77},
    **{operator: {"size": (3, 2, 7, 203), "times": (3, 1, 7, 1)} for operator in UNDER_TIMES},
}
OF_SAMPLES = ("flowmap_loss", "dmd_gradient")


@needs_compiler
@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("dtypes", [(F32, F32), (F32, BF16), (F64, F64)], ids=str)
@pytest.mark.parametrize("operator", cuda_on_host.OPERATORS)
def test_larger_inputs(operator: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    span = {"time_dtype": F64} if operator == "flowmap_embedding" else {}  # phases that float32 itself keeps
    check_against_oracle(
        sample_inputs(operator, "cpu", dtypes[0], True, second_dtype=dtypes[1], **LARGER[operator], **span)
    )


@needs_compiler
@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 9, 16, 33, 64])
@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
def test_any_number_of_rows(rows: int, dtype: torch.dtype) -> None:
    check_against_oracle(
        sample_inputs("flowmap_embedding", "cpu", dtype, True, rows=(rows,), hidden=(16, 40), width=24)
    )


@needs_compiler
@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("size", [(3, 2, 5, 3), (2, 4, 50, 1)], ids=str)
@pytest.mark.parametrize("operator", UNDER_TIMES)
def test_rows_shorter_than_what_a_thread_takes(operator: str, size: tuple[int, ...]) -> None:
    for times in ((size[0], 1, size[2], 1), size):
        check_against_oracle(sample_inputs(operator, "cpu", F32, True, second_dtype=BF16, size=size, times=times))


@needs_compiler
@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("size", [1, 8, 1023, 1024, 1025, 2047, 2048, 2049, 2056, 5000])
@pytest.mark.parametrize("dtypes", [(F32, F32), (F32, BF16)], ids=str)
@pytest.mark.parametrize("operator", OF_SAMPLES)
def test_samples_of_less_and_more_than_a_block(
    operator: str, dtypes: tuple[torch.dtype, torch.dtype], size: int
) -> None:
    """A block takes 1024 elements of float32, 2048 of bfloat16; and what one sample has is nothing to the others."""
    sample = sample_inputs(operator, "cpu", dtypes[0], True, second_dtype=dtypes[1], size=(3, size))
    check_against_oracle(sample)
    outputs, _ = outputs_and_gradients(sample, sample.run)
    alone = sample.replaced(**{name: tensor[1:2].clone() for name, tensor in sample.tensors.items()})
    for whole, part in zip(outputs, outputs_and_gradients(alone, alone.run)[0], strict=True):
        assert torch.equal(whole[1:2], part)


@needs_compiler
@pytest.mark.usefixtures("on_host")
def test_differences_in_float32_cost_no_copy() -> None:
    assert allocated_by_the_loss() < 2048  # two sums of each of 32 blocks, and the results


@needs_compiler
@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize(("size", "scratch"), [(2048, 0), (2049, 3 * 2 * 2)], ids=str)
@pytest.mark.parametrize("operator", OF_SAMPLES)
def test_a_sample_that_a_block_has_for_itself_leaves_no_sums(operator: str, size: int, scratch: int) -> None:
    """Nor, then, is there a launch that adds them up."""
    sample = sample_inputs(operator, "cpu", F32, second_dtype=BF16, size=(3, size))
    normalisers = 3 if operator == "dmd_gradient" and scratch else 0
    results = sum(result.nbytes for result in sample.run(**sample.tensors))
    allocated = measure.peak_bytes(lambda: sample.run(**sample.tensors), "cpu")
    assert allocated == results + 4 * (scratch + normalisers)


def _all(operator: str, dtypes: tuple[torch.dtype, torch.dtype], **shape: Any) -> list[Tensor]:
    sample = sample_inputs(operator, "cpu", dtypes[0], True, second_dtype=dtypes[1], **shape)
    outputs, gradients = outputs_and_gradients(sample, sample.run)
    return [*outputs, *gradients.values()]


@needs_compiler
@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("dtypes", [(F32, BF16), (F64, F64)], ids=str)
@pytest.mark.parametrize("operator", cuda_on_host.OPERATORS)
def test_the_order_of_threads_and_blocks_changes_nothing(
    operator: str, dtypes: tuple[torch.dtype, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    for shape in (LARGER[operator], {**LARGER[operator], "rows": (2,)} if operator == "flowmap_embedding" else {}):
        expected = _all(operator, dtypes, **shape)
        monkeypatch.setenv("CUDA_ON_HOST_ORDER", "reverse")
        found = _all(operator, dtypes, **shape)
        monkeypatch.delenv("CUDA_ON_HOST_ORDER")
        for f, e in zip(found, expected, strict=True):
            assert torch.equal(f, e)


@needs_compiler
@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("dtypes", [(F32, F32), (F32, BF16), (BF16, F16), (F64, F64)], ids=str)
@pytest.mark.parametrize("operator", cuda_on_host.OPERATORS)
def test_inputs_that_are_not_aligned(operator: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Contiguous, but 8 bytes or less past a multiple of 16: read one by one, with the same result to the bit."""
    sample = sample_inputs(operator, "cpu", dtypes[0], True, second_dtype=dtypes[1])
    moved = sample.replaced(
        **{
            n: torch.cat((t.detach().reshape(-1)[:1], t.detach().reshape(-1)))[1:].view(t.shape)
            for n, t in sample.tensors.items()
        }
    )
    assert any(t.data_ptr() % 16 for t in moved.tensors.values())
    expected, found = (outputs_and_gradients(s, s.run) for s in (sample, moved))
    for f, e in zip((*found[0], *found[1].values()), (*expected[0], *expected[1].values()), strict=True):
        assert torch.equal(f, e)
