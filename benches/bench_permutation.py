"""Routes: the plan, rows moved to their experts and back, into FP8 on the way, and the gradients of the way back."""

ROWS = ("permute",)


def test_permutation(timed):
    timed()
