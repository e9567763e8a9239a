"""Layers: routed experts from decode to prefill, and a training step, in every format."""

ROWS = ("layer", "training")


def test_moe(timed):
    timed()
