"""Gating: routers of released models, one token to 4096, forward and backward."""

ROWS = ("gate",)


def test_gating(timed):
    timed()
