"""FP8: activations in blocks of 1x128, there and back."""

ROWS = ("quantize",)


def test_quantization(timed):
    timed()
