"""Round trips on any layout, what lies on the disk, and what happens when something goes wrong."""

import contextlib
import errno
import json
import os
import pickle
import re
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from megatron.core.dist_checkpointing import (
    CheckpointError,
    checkpoint_path,
    latest_checkpoint,
    load_checkpoint,
    read_manifest,
    save_checkpoint,
    storage,
    verify_checkpoint,
)
from megatron.core.dist_checkpointing import format as checkpoint_format
from megatron.core.parallel_state import ParallelContext
from tests.distributed import run_distributed

CPU = ParallelContext(torch.device("cpu"))
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool]


def example(seed=0):
    """Tensors of many kinds: uneven rows, fewer rows than ranks, no rows, no dimensions, several dtypes."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "model/weight": torch.randn(7, 5, generator=generator),
        "model/row": torch.randn(1, 3, generator=generator),
        "model/norm": torch.randn(5, generator=generator).bfloat16(),
        "model/empty": torch.zeros(0, 3),
        "model/cube": torch.randn(4, 3, 2, generator=generator, dtype=torch.float64),
        "optimizer/step": torch.tensor(float(seed)),
        "ids": torch.randint(0, 2**40, (9,), generator=generator),
    }


def zeros_like(tensors):
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def save(root, iteration=1, seed=0):
    return save_checkpoint(root, iteration, example(seed), {"progress": {"consumed_samples": 12}}, CPU)


@settings(deadline=None, max_examples=30)
@given(
    st.dictionaries(
        st.text("abc./_0", min_size=1, max_size=8),
        st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from(DTYPES)),
        max_size=5,
    )
)
def test_round_trip(tmp_path_factory, description):
    tensors = {
        name: torch.randint(0, 2, shape).to(dtype) if shape else torch.ones((), dtype=dtype)
        for name, (shape, dtype) in description.items()
    }
    path = save_checkpoint(tmp_path_factory.mktemp("root"), 3, tensors, {}, CPU)
    loaded = zeros_like(tensors)
    load_checkpoint(path, loaded)
    assert_equal(loaded, tensors)
    verify_checkpoint(path)


def test_what_lies_on_the_disk(tmp_path):
    path = save(tmp_path / "made" / "here", iteration=100)
    assert path.name == "iter_0000100"
    assert {file.name for file in path.iterdir()} == {"manifest.json", "shard_00000_of_00001.safetensors"}
    assert {file.name for file in path.parent.iterdir()} == {"iter_0000100", "latest_checkpointed_iteration.txt"}
    assert (path.parent / "latest_checkpointed_iteration.txt").read_text() == "100\n"
    manifest = read_manifest(path)
    assert manifest["progress"] == {"consumed_samples": 12}
    assert manifest["iteration"] == 100
    assert manifest["tensors"]["model/weight"]["shape"] == [7, 5]
    with safe_open(path / "shard_00000_of_00001.safetensors", "pt") as shard:
        for name, tensor in example().items():
            if tensor.numel():
                assert torch.equal(shard.get_tensor(name), tensor)
    for file in path.iterdir():  # neither of pickle's opcodes nor a zip of torch.save
        content = file.read_bytes()
        assert not content.startswith((b"\x80", b"PK"))
        with pytest.raises(Exception):  # noqa: B017
            pickle.loads(content)


def test_tensors_that_are_not_contiguous(tmp_path):
    base = torch.arange(24.0).view(4, 6)
    tensors = {"transposed": base.T, "columns": base[:, 1:3], "leaf": torch.nn.Parameter(base.clone())}
    path = save_checkpoint(tmp_path, 1, tensors, {}, CPU)
    target = torch.zeros(4, 6)
    loaded = {
        "transposed": torch.zeros(4, 6).T,
        "columns": target[:, 1:3],
        "leaf": torch.nn.Parameter(torch.zeros(4, 6)),
    }
    load_checkpoint(path, loaded)
    assert_equal(loaded, tensors)
    assert target[:, 0].eq(0).all() and target[:, 3:].eq(0).all()


def _sharded(tensors, placements, shape):
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("a", "b")[: len(shape)])
    return {
        name: distribute_tensor(tensor, mesh, placements(tensor)) if tensor.ndim and name != "ids" else tensor.clone()
        for name, tensor in tensors.items()
    }


def _rows(tensor):
    return [Shard(0)]


def _rows_and_columns(tensor):
    return [Shard(0), Shard(1) if tensor.ndim > 1 else Replicate()]


LAYOUTS = {"rows2": (_rows, (2,)), "rows4": (_rows, (4,)), "grid": (_rows_and_columns, (2, 2))}


def _context(rank):
    return ParallelContext(torch.device("cpu"), torch.distributed.get_world_size(), rank, None)


def _save_sharded(rank, root, layout, seed):
    path = save_checkpoint(root, 5, _sharded(example(seed), *LAYOUTS[layout]), {}, _context(rank))
    assert path.is_dir()  # published before any rank returns


def _load_sharded(rank, path, layout):
    tensors = _sharded(zeros_like(example()), *LAYOUTS[layout])
    load_checkpoint(path, tensors)
    return {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_sharded_loaded_by_one_process(tmp_path, layout):
    ranks = 2 if layout == "rows2" else 4
    run_distributed(_save_sharded, ranks, tmp_path, layout, 3)
    path = latest_checkpoint(tmp_path)
    loaded = zeros_like(example())
    load_checkpoint(path, loaded)
    assert_equal(loaded, example(3))
    verify_checkpoint(path)
    assert len(list(path.glob("*.safetensors"))) == ranks
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            assert all(shard.get_tensor(name).numel() for name in shard.keys())  # noqa: SIM118


@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_by_one_process_loaded_sharded(tmp_path, layout):
    path = save(tmp_path, seed=4)
    for loaded in run_distributed(_load_sharded, 2 if layout == "rows2" else 4, path, layout):
        assert_equal(loaded, example(4))


def test_saved_on_a_grid_loaded_on_rows(tmp_path):
    run_distributed(_save_sharded, 4, tmp_path, "grid", 6)
    for loaded in run_distributed(_load_sharded, 2, latest_checkpoint(tmp_path), "rows2"):
        assert_equal(loaded, example(6))


def test_only_the_files_needed_are_opened(tmp_path):
    run_distributed(_save_sharded, 2, tmp_path, "rows2", 3)
    path = latest_checkpoint(tmp_path)
    second = path / "shard_00001_of_00002.safetensors"
    content = bytearray(second.read_bytes())
    content[:] = b"\xff" * len(content)
    second.write_bytes(content)
    where = {
        name: {chunk["file"] for chunk in entry["chunks"]} for name, entry in read_manifest(path)["tensors"].items()
    }
    first_only = {name: torch.zeros_like(t) for name, t in example().items() if second.name not in where[name]}
    assert first_only
    load_checkpoint(path, first_only, strict=False)
    with pytest.raises(CheckpointError, match=r"shard_00001_of_00002\.safetensors is damaged"):
        load_checkpoint(path, zeros_like(example()))


def test_names_shapes_and_dtypes_must_fit(tmp_path):
    path = save(tmp_path)
    tensors = zeros_like(example())
    with pytest.raises(CheckpointError, match="lacks other"):
        load_checkpoint(path, tensors | {"other": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="unexpected ids"):
        load_checkpoint(path, {name: tensor for name, tensor in tensors.items() if name != "ids"})
    with pytest.raises(CheckpointError, match=r"model/weight \(F32 \[7, 5\] there, F32 \[7, 6\] here\)"):
        load_checkpoint(path, tensors | {"model/weight": torch.zeros(7, 6)})
    with pytest.raises(CheckpointError, match="model/norm"):
        load_checkpoint(path, tensors | {"model/norm": torch.zeros(5)})
    with pytest.raises(CheckpointError, match="lacks other"):
        load_checkpoint(path, tensors | {"other": torch.zeros(1)}, strict=False)
    some = {"ids": torch.zeros(9, dtype=torch.int64)}
    load_checkpoint(path, some, strict=False)
    assert torch.equal(some["ids"], example()["ids"])


def test_latest_is_the_newest_complete_one(tmp_path, caplog):
    assert latest_checkpoint(tmp_path / "nowhere") is None
    assert latest_checkpoint(tmp_path) is None
    for iteration in (1, 2, 3, 4, 10_000_000):
        save(tmp_path, iteration)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1")  # only a hint
    (tmp_path / "iter_0000009.tmp-abc").mkdir()
    (tmp_path / "iter_99999999").write_text("not a directory")
    assert latest_checkpoint(tmp_path).name == "iter_10000000"
    (tmp_path / "iter_10000000" / "manifest.json").unlink()
    (tmp_path / "iter_0000004" / "shard_00000_of_00001.safetensors").unlink()
    with (tmp_path / "iter_0000003" / "shard_00000_of_00001.safetensors").open("ab") as file:
        file.write(b"x")
    assert latest_checkpoint(tmp_path).name == "iter_0000002"
    assert [r.name for r in caplog.records].count("megatron.core.dist_checkpointing.verification") == 3


def edit_manifest(path, **changes):
    """Change a manifest and give it the right checksum, as an attacker or a bug would."""
    file = path / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["manifest_checksum"]
    file.write_bytes(checkpoint_format.encode_manifest(manifest | changes))


def tensors_like(shape, offsets, sizes, key="a"):
    """Description of a tensor `a` of these chunks in the shard of one process."""
    file = "shard_00000_of_00001.safetensors"
    chunks = [{"file": file, "key": key, "offsets": o, "sizes": s} for o, s in zip(offsets, sizes, strict=True)]
    return {"a": {"dtype": "F32", "shape": shape, "chunks": chunks}}


@pytest.mark.parametrize(
    "changes",
    [
        {"format_version": 99},
        {"files": {"../../etc/passwd": {"bytes": 1, "crc32": 0}}},
        {"files": {"/etc/passwd": {"bytes": 1, "crc32": 0}}},
        {"files": {}},
        {"files": None},
        {"tensors": {"a": {"dtype": "PICKLE", "shape": [1], "chunks": []}}},
        {"tensors": {"a": {"dtype": "F32", "shape": [4], "chunks": []}}},
        {"tensors": {"a": {"dtype": "F32", "shape": ["x"], "chunks": []}}},
        {"tensors": {"a": {}}},
        {"files": {"shard_00000_of_00001.safetensors": {"bytes": True, "crc32": 0}}},
        {"files": {"shard_00000_of_00001.safetensors": {"bytes": 10**400, "crc32": 0}}},
        {"files": {"shard_00000_of_00001.safetensors": {"bytes": 8}}},
        {"tensors": tensors_like([2**60], [[0]], [[2**60]])},  # more than the file has
        {"tensors": tensors_like([4], [[0.0]], [[4]])},
        {"tensors": tensors_like([float("nan")], [[0]], [[4]])},
        {"tensors": tensors_like([4], [[0]], [[4]], key=["k"])},
        {"tensors": tensors_like([4], [[0], [0]], [[2], [2]])},  # one half twice, the other not at all
        {"tensors": tensors_like([2, 4], [[0, 0], [0, 2], [1, 0]], [[1, 3], [1, 2], [1, 3]])},
        {"tensors": tensors_like([1] * 65, [[0] * 65], [[1] * 65])},
        {"tensors": {f"t{i}": tensors_like([30], [[0]], [[30]])["a"] for i in range(99)}},  # all in the same bytes
        {"iteration": "7"},
    ],
)
def test_impossible_manifests_are_refused(tmp_path, changes):
    path = save(tmp_path)
    edit_manifest(path, **changes)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        read_manifest(path)
    assert latest_checkpoint(tmp_path) is None


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 100_000,
        b'{"a": ' * 50_000,
        b'{"format_version": 1, "format_version": 1}',
        b'{"format_version": ' + b"9" * 5000 + b"}",
        b"\xff\xfe\x00",
        b"{}",
        b"1",
        b"\x80\x04\x95",
    ],
)
def test_texts_that_are_no_manifest(tmp_path, text):
    path = save(tmp_path)
    (path / "manifest.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json") as error:
        read_manifest(path)
    assert str(error.value).isprintable() and len(str(error.value)) < 2000


def test_a_huge_manifest_is_not_read(tmp_path):
    path = save(tmp_path)
    with (path / "manifest.json").open("ab") as file:
        file.truncate(2**40)  # takes no space
    with pytest.raises(CheckpointError, match="1099511627776 bytes"):
        read_manifest(path)


def _link(file):
    file.rename(file.with_name("elsewhere"))
    file.symlink_to("elsewhere")


def _pipe(file):
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize("name", ["manifest.json", "shard_00000_of_00001.safetensors"])
@pytest.mark.parametrize("spoil", [_link, _pipe])
def test_links_and_pipes_are_not_opened(tmp_path, name, spoil):
    path = save(tmp_path)
    spoil(path / name)
    for call in (verify_checkpoint, lambda path: load_checkpoint(path, zeros_like(example()))):
        with pytest.raises(CheckpointError, match=f"{re.escape(name)} is not a regular file"):
            call(path)
    assert latest_checkpoint(tmp_path) is None


def test_a_linked_directory_is_refused(tmp_path, caplog):
    path = save(tmp_path / "elsewhere")
    (tmp_path / "iter_0000001").symlink_to(path)
    assert latest_checkpoint(tmp_path) is None
    assert "is a symbolic link" in caplog.text


@pytest.mark.parametrize("header", [b"[" * 64, b'{"model/weight": 1}', b"9" * 64, b"{" + b" " * 62 + b"}"])
def test_headers_that_say_something_else(tmp_path, header):
    path = save(tmp_path)
    shard = path / "shard_00000_of_00001.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + len(header) :])
    with pytest.raises(CheckpointError, match=r"\.safetensors (is damaged|does not hold)"):
        load_checkpoint(path, zeros_like(example()))
    shard.write_bytes((2**40).to_bytes(8, "little") + content[8:])
    with pytest.raises(CheckpointError, match="its header would have 1099511627776 bytes"):
        load_checkpoint(path, zeros_like(example()))


@pytest.mark.parametrize("offsets", [[2**70, 2**70 + 140], [-4, 136], [0, 2**60], ["0", 140], None])
def test_offsets_that_cannot_be(tmp_path, offsets):
    path = save_checkpoint(tmp_path, 1, {"model/weight": torch.ones(7, 5)}, {}, CPU)
    shard = path / "shard_00000_of_00001.safetensors"
    header = json.dumps({"model/weight": {"dtype": "F32", "shape": [7, 5], "data_offsets": offsets}}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(140)
    shard.write_bytes(content)
    edit_manifest(path, files={shard.name: {"bytes": len(content), "crc32": 0}})
    with pytest.raises(CheckpointError, match="impossible offsets"):
        load_checkpoint(path, {"model/weight": torch.ones(7, 5)})


def _verify_together(rank, root, damaged):
    """What each rank says of a checkpoint of which one file is damaged."""
    context = _context(rank)
    try:
        verify_checkpoint(damaged, context)
    except CheckpointError as error:
        message = str(error)
    return message, latest_checkpoint(root, context), latest_checkpoint(root, context, checksums=False)


def test_ranks_verify_together(tmp_path):
    older = save(tmp_path, 4)
    run_distributed(_save_sharded, 4, tmp_path, "rows4", 3)
    damaged = checkpoint_path(tmp_path, 5)
    for number in (1, 2):
        shard = damaged / f"shard_0000{number}_of_00004.safetensors"
        content = shard.read_bytes()
        shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        [first, second] = run_distributed(_verify_together, 2, tmp_path, damaged)
        assert first == second
        assert shard.name in first[0] and first[1:] == (older, damaged)
        shard.write_bytes(content)


def test_every_flipped_bit_is_found(tmp_path):
    path = save(tmp_path)
    generator = torch.Generator().manual_seed(0)
    for file in sorted(path.iterdir()):
        original = file.read_bytes()
        for _ in range(50):
            bit = int(torch.randint(0, 8 * len(original), (), generator=generator))
            content = bytearray(original)
            content[bit // 8] ^= 1 << bit % 8
            if file.name == "manifest.json" and _same_json(content, original):
                continue  # a changed blank
            file.write_bytes(content)
            with pytest.raises(CheckpointError):
                verify_checkpoint(path)
        file.write_bytes(original)
    verify_checkpoint(path)


def _same_json(content, original):
    try:
        return json.loads(content) == json.loads(original)
    except ValueError:
        return False


def test_a_checkpoint_that_cannot_be_read_is_passed_over(tmp_path, monkeypatch, caplog):
    older = save_checkpoint(tmp_path, 1, example(), {}, CPU)
    newer = save_checkpoint(tmp_path, 2, example(), {}, CPU)
    opened = Path.open

    def open_or_fail(path, mode="r", **options):
        if path.parent == newer and path.suffix == ".safetensors":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return opened(path, mode, **options)

    monkeypatch.setattr(Path, "open", open_or_fail)
    assert latest_checkpoint(tmp_path) == older
    assert "Input/output error" in caplog.text


def test_a_planted_pickle_never_runs(tmp_path):
    path, canary = save(tmp_path), tmp_path / "canary"

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(canary),))

    for file in [*path.iterdir(), tmp_path / "latest_checkpointed_iteration.txt"]:
        original = file.read_bytes()
        payload = pickle.dumps(Evil())
        file.write_bytes(payload + original[len(payload) :])  # of the same size where that is possible
        if latest_checkpoint(tmp_path) is not None:
            with contextlib.suppress(CheckpointError):
                load_checkpoint(path, zeros_like(example()))
        file.write_bytes(original)
    assert not canary.exists()


def test_the_same_iteration_again_replaces_it(tmp_path):
    save(tmp_path, seed=1)
    path = save(tmp_path, seed=2)
    loaded = zeros_like(example())
    load_checkpoint(path, loaded)
    assert_equal(loaded, example(2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000001", "latest_checkpointed_iteration.txt"]


class Crash(BaseException):
    """Ends a save the way a kill does: nothing is cleaned up."""


CALLS = ["os.fsync", "os.open", "Path.rename", "Path.replace", "Path.mkdir", "Path.open", "shutil.rmtree"]


def count_down(monkeypatch, calls):
    """Let `calls` more file operations through, then die at each."""
    left = [calls]
    owners = {"os": os, "Path": Path, "shutil": shutil}
    for name in CALLS:
        owner, attribute = name.split(".")
        original = getattr(owners[owner], attribute)

        def wrapped(*args, _original=original, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise Crash
            return _original(*args, **kwargs)

        monkeypatch.setattr(owners[owner], attribute, wrapped)
    return left


@pytest.mark.parametrize("same_iteration", [False, True])
def test_a_crash_at_any_instant_leaves_the_old_or_the_new(tmp_path, monkeypatch, same_iteration):
    second = 1 if same_iteration else 2
    outcomes = []
    for calls in range(100):
        root = tmp_path / str(calls)
        save(root, 1, seed=1)
        with (
            monkeypatch.context() as patch,
            contextlib.suppress(Crash, RuntimeError),
        ):  # torch reports it as RuntimeError
            left = count_down(patch, calls)
            save(root, second, seed=2)
        path = latest_checkpoint(root)
        verify_checkpoint(path)
        loaded = zeros_like(example())
        load_checkpoint(path, loaded)
        seed = int(loaded["optimizer/step"].item())
        assert seed in (1, 2)
        assert_equal(loaded, example(seed))
        outcomes.append(seed)
        save(root, 3, seed=3)  # the next save cleans up
        wanted = {"iter_0000001", "iter_0000003", "latest_checkpointed_iteration.txt"}
        if seed == 2:
            wanted.add(f"iter_{second:07d}")
        assert {p.name for p in root.iterdir()} == wanted
        if left[0] >= 0:
            break
    assert outcomes[0] == 1 and outcomes[-1] == 2 and len(outcomes) > 8
    assert outcomes == sorted(outcomes)


def test_full_disk(tmp_path):
    save(tmp_path, 1, seed=1)
    tensors = example(2) | {"big": torch.zeros(2**20)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        with pytest.raises(CheckpointError, match=re.escape(os.strerror(errno.EFBIG))):
            save_checkpoint(tmp_path, 2, tensors, {}, CPU)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000001", "latest_checkpointed_iteration.txt"]
    assert latest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 1)


def _one_rank_fails(rank, root):
    save_checkpoint(root, 1, _sharded(example(1), *LAYOUTS["rows2"]), {}, _context(rank))
    if rank == 1:

        def full(path, items, planner):
            path.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

        storage._write_shard = full
    try:
        save_checkpoint(root, 2, _sharded(example(2), *LAYOUTS["rows2"]), {}, _context(rank))
    except CheckpointError as error:
        return str(error)
    return "saved"


def test_a_failure_on_one_rank_is_raised_on_all(tmp_path):
    for message in run_distributed(_one_rank_fails, 2, tmp_path):
        assert "iter_0000002" in message and "rank 1" in message and "No space left" in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000001", "latest_checkpointed_iteration.txt"]


def _load_where_one_rank_sees_less(rank, path):
    if rank == 1:
        path = path.with_name("iter_0000009")
    try:
        load_checkpoint(path, zeros_like(example()))
    except CheckpointError as error:
        return str(error)
    return "loaded"


def test_a_rank_that_cannot_read_stops_all(tmp_path):
    path = save(tmp_path)
    for message in run_distributed(_load_where_one_rank_sees_less, 2, path, timeout=30):
        assert "iter_0000009 is not a complete checkpoint" in message


def test_saving_does_not_copy_the_tensors(tmp_path):
    """Peak memory grows by far less than the size of what is saved and loaded."""
    size_mib = 256
    tensors = {"big": torch.ones(size_mib * 2**18)}
    save_checkpoint(tmp_path, 1, {"small": torch.ones(1)}, {}, CPU)  # imports and the like
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path = save_checkpoint(tmp_path, 2, tensors, {}, CPU)
    load_checkpoint(path, tensors)
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib) / 1024
    assert grown_mib < size_mib / 4
