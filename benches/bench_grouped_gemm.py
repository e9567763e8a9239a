"""Products: gate_up projections from decode to prefill, and both gradients, in every format."""

ROWS = ("decode", "prefill", "backward")


def test_grouped_gemm(timed):
    timed()
