def transpose(source: int, target: int, blocks: int, rows: int, columns: int, threads: int) -> None:
    """From `[blocks, rows, columns]` to `[blocks, columns, rows]`, 16 bits an element."""

def sum_parts(parts: int, count: int, size: int, target: int, to_float: bool, threads: int) -> None:
    """Sum of bf16 parts `[count, size]`, fp32 or bf16 `[size]`."""

def sum_parts_transposed(
    parts: int, count: int, rows: int, columns: int, target: int, to_float: bool, threads: int
) -> None:
    """Transpose of the sum of bf16 parts `[count, rows, columns]`, fp32 or bf16 `[columns, rows]`."""
