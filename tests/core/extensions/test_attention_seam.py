"""Which attention backend computes what, which one `auto` takes, what the others say, and the table about it."""

from pathlib import Path

import pytest
import torch

from megatron.core.config import ComputeConfig, ModelConfig
from megatron.core.errors import UserError
from megatron.core.extensions import attention, packages
from megatron.core.extensions.attention import MODULES, AttentionRequest, attention_backend, choose_attention
from megatron.core.models.T5.t5_model import T5Model

ROOT = Path(__file__).parents[3]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def request(**fields):
    defaults = {"device": GPU, "dtype": torch.bfloat16, "head_dim": 64, "has_diagonals": True}
    return AttentionRequest(**{**defaults, **fields})


@pytest.fixture
def packages_there(monkeypatch):
    """Everything is installed but what is named."""

    def without(*names):
        monkeypatch.setattr(attention, "installed", lambda package: package not in names)

    without()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return without


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "triton"),
        ({"has_diagonals": False}, "sdpa"),  # flash attention, which takes no bias
        ({"has_diagonals": False, "causal": True}, "sdpa"),
        ({"has_diagonals": False, "has_segments": True}, "triton"),
        ({"has_mask": True}, "sdpa"),
        ({"dtype": torch.float64}, "sdpa"),
        ({"head_dim": 320}, "sdpa"),
        ({"device": CPU}, "cpu"),
        ({"device": CPU, "dtype": torch.float32, "has_segments": True, "dropout": 0.1}, "cpu"),
        ({"device": CPU, "dtype": torch.float16}, "unfused"),
        ({"device": CPU, "dtype": torch.float16, "training": False}, "sdpa"),
        ({"device": torch.device("meta")}, "sdpa"),
    ],
)
def test_auto(packages_there, fields, expected):
    assert choose_attention("auto", request(**fields)).name == expected


def test_auto_without_triton(packages_there):
    packages_there("triton")
    assert choose_attention("auto", request()).name == "sdpa"


@pytest.mark.parametrize(
    ("backend", "fields", "reason"),
    [
        ("cpu", {}, "computes on cpu, not cuda:0"),
        ("cpu", {"device": CPU, "dtype": torch.float16}, "computes in float32, bfloat16, not float16"),
        ("triton", {"dtype": torch.float64}, "not float64"),
        ("triton", {"head_dim": 8}, "takes --kv-channels from 16 to 256, not 8"),
        ("flex", {"dropout": 0.1}, "has no --attention-dropout"),
    ],
)
def test_what_a_backend_cannot_compute_is_one_line(packages_there, backend, fields, reason):
    with pytest.raises(UserError, match=reason) as raised:
        choose_attention(backend, request(**fields))
    message = str(raised.value)
    assert message.startswith(f"--attention-backend {backend} ") and "\n" not in message and "use " in message


@pytest.mark.parametrize("backend", ["triton", "transformer_engine"])
def test_an_absent_package_is_named(packages_there, backend):
    packages_there(backend)
    with pytest.raises(UserError, match=f"--attention-backend {backend} needs the package {backend}, .* not installed"):
        choose_attention(backend, request())


def test_backends_are_imported_when_they_are_asked_for(packages_there):
    with pytest.raises(UserError, match="needs the package no_such_package, which is not installed"):
        packages.require("--flag value", "no_such_package", "rest")
    assert {attention_backend(name).name for name in MODULES} == set(MODULES)


@pytest.mark.parametrize("position", ["relative", "none"])
@pytest.mark.parametrize("per_layer", [False, True])
@torch.no_grad()
def test_every_backend_of_the_cpu_computes_the_same_model(position, per_layer):
    if per_layer and position == "none":
        pytest.skip("only a position bias can be each layer's own")
    config = ModelConfig(
        encoder_num_layers=2, hidden_size=32, num_attention_heads=2, kv_channels=16, vocab_size=50,
        position_embedding_type=position, relative_attention_bias_per_layer=per_layer,
    )  # fmt: skip
    reference = T5Model(config, ComputeConfig(attention_backend="unfused")).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in reference.parameters():
        parameter.normal_(std=0.3, generator=generator)
    ids = torch.randint(1, 50, (2, 21), generator=generator), torch.randint(1, 50, (2, 18), generator=generator)
    segments = 1 + (torch.arange(21) >= torch.tensor([[9], [13]])).int()
    masks = {"encoder_segment_ids": segments, "decoder_segment_ids": segments[:, :18]}
    for inputs in ({}, {"encoder_mask": torch.arange(21) < torch.tensor([[21], [8]])}, masks):
        expected = reference(*ids, **inputs).logits
        for backend in ("cpu", "sdpa", "auto"):
            model = T5Model(config, ComputeConfig(attention_backend=backend)).eval()
            model.load_state_dict(reference.state_dict())
            torch.testing.assert_close(model(*ids, **inputs).logits, expected, rtol=1e-4, atol=1e-4)


def table_of_backends():
    """The rows of docs/backends.md, from what backends declare."""
    yes = {True: "yes", False: "no"}
    for name in MODULES:
        backend = attention_backend(name)
        dtypes = ", ".join({"float64": "fp64", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[str(dtype)[6:]]
                           for dtype in backend.dtypes)  # fmt: skip
        left_out = {"meta", "cpu"} if name == "triton" else {"meta"}  # its interpreter is for tests
        devices = ", ".join(
            {"cpu": "CPU", "cuda": "GPU"}[device] for device in backend.devices if device not in left_out
        )
        low, high = backend.head_dims
        widths = "any" if high >= 1 << 16 else f"{low} to {high}"
        cells = (
            f"`{name}`", devices, dtypes, widths, backend.bias, yes[backend.bias_gradient], backend.segments or "no",
            yes[backend.dropout], yes[backend.deterministic], yes[backend.compiles], backend.package or "",
        )  # fmt: skip
        yield "| " + " | ".join(cells) + " |"


def test_the_table_in_the_docs_is_what_backends_declare():
    text = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")
    for row in table_of_backends():
        assert row in text, f"docs/backends.md lacks: {row}"
