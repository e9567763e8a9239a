import numpy as np
from numpy.typing import NDArray

def keep_places(previous: NDArray[np.int32], slot_to_expert: NDArray[np.int32], num_devices: int) -> None: ...
def improve_within(
    load: NDArray[np.float64], slot_to_expert: NDArray[np.int32], num_devices: int, max_moves: int
) -> None: ...
