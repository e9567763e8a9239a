"""The CUDA kernels on the current GPU: every row of ``pyroute bench --gpu``, whose clock and checks these are."""

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from pyroute.bench.suite.gpu import cases, clock  # noqa: E402


@pytest.mark.parametrize("row", cases.ROWS)
def test_cuda(row, small, benchmark):
    """What is benchmarked is a call of the row's first column from Python; the columns' own times stand beside it."""
    gpu = clock.Clock(torch.device("cuda"))
    problems = cases.ROWS[row](gpu, cases.Sizes(small), ())
    for problem in problems:
        for cell in clock.measure(problem.columns, gpu, 30, problem.check):
            assert cell.status == "ok", f"{problem.op} {problem.case}, {cell.name}: {cell.note}"
            benchmark.extra_info[f"{problem.op} {problem.case}, {cell.name}"] = cell.median
    call = problems[0].columns[0].calls[0]
    benchmark(lambda: (call(), gpu.wait()))
