"""Types of the C++ extension built from file_mapping.cpp."""

import numpy as np
from numpy.typing import NDArray

def map_file(path: str) -> NDArray[np.uint8]:
    """The bytes of a file as a read-only memory map, which keeps no file descriptor open.  # [size of the file]

    Raises:
        OSError: it cannot be opened or mapped.
    """
