"""Types of the C++ extension built from file_mapping.cpp."""

import numpy as np
from numpy.typing import NDArray

def map_file(path: str | bytes) -> NDArray[np.uint8]:
    """The bytes of a file as a read-only memory map, which keeps no file descriptor open.  # [size of the file]

    Args:
        path: As text in UTF-8, or as the system has it (`os.fsencode`), since not every name is UTF-8.

    Raises:
        OSError: it cannot be opened or mapped.
    """

def release_pages(bytes: NDArray[np.uint8]) -> None:
    """Let go of the memory of what was read of a map; it stays usable, and in the page cache.

    Args:
        bytes: What `map_file` returned, itself.

    Raises:
        ValueError: it is another array.
    """
