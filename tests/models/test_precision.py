"""Precision variants: sheet E section 11, "It works when" 1-3 and the variant part of 4."""

from __future__ import annotations

import copy
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pliant.errors import ConfigError, PlanError
from pliant.models import int8, kernels, layers, precision
from pliant.models.dit import DiT, DiTConfig
from pliant.models.int8 import Int8Linear, quantized_input, quantized_rows
from pliant.models.mixed import MixedLinear
from pliant.models.precision import BLOCK_LINEARS, known_precisions, register_precision, resolve_precision, variant


def random_dit(width: int = 64, depth: int = 4, side: int = 8, **options: object) -> DiT:
    torch.manual_seed(0)
    network = DiT(DiTConfig(input_size=(side, side), width=width, depth=depth, heads=2, num_classes=3, **options))
    nn.init.normal_(network.modulation.weight, std=0.05)
    nn.init.normal_(network.modulation.bias, std=0.3)
    nn.init.normal_(network.head.weight, std=0.05)
    return network.eval().requires_grad_(False)


def has_int8() -> bool:
    try:
        return int8.weight_levels() > 0
    except ConfigError:
        return False


needs_int8 = pytest.mark.skipif(not has_int8(), reason="this PyTorch has no 8-bit linear")


def call(network: DiT, batch: int = 2) -> Tensor:
    x = torch.randn(batch, 4, *network.config.input_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return network(x, torch.full((batch,), 400.0), torch.zeros(batch, dtype=torch.long)).float()


def stack_error(network: DiT, exact: DiT) -> float:
    """||y - y_exact|| / ||y_exact - x|| over the blocks, from the same tokens x."""
    torch.manual_seed(2)
    tokens = torch.randn(2, 16, exact.config.width)
    rows = exact.modulations(torch.full((2,), 400.0), torch.zeros(2, dtype=torch.long))
    outs = []
    for net in (network, exact):
        dtype = net.head.weight.dtype
        y, mod = tokens.to(dtype), rows.to(dtype)
        with torch.no_grad():
            for i, block in enumerate(net.blocks):
                y = block(y, mod[:, 6 * i : 6 * i + 6])
        outs.append(y.float())
    return float((outs[0] - outs[1]).norm() / (outs[1] - tokens).norm())


def pointers(network: DiT) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in network.state_dict().items()}


# --- sheet E 11 -----------------------------------------------------------------------------------------------------


@needs_int8
def test_int8_error_is_that_of_eight_bits() -> None:
    """Check 1: at most 6e-2, and more than 1e-3, or nothing was quantised."""
    network = random_dit(width=384)
    assert 1e-3 < stack_error(variant(network, "int8d"), network) < 6e-2


@needs_int8
def test_int8_is_where_it_should_be_and_nowhere_else() -> None:
    """Check 2, and sharing: what is not quantised is the base network's memory."""
    network = random_dit()
    quantised = variant(network, "int8d")
    for block, original in zip(quantised.blocks, network.blocks, strict=True):
        for name in BLOCK_LINEARS:
            layer = getattr(block, name)
            assert type(layer) is Int8Linear and layer.weight.dtype == torch.int8
            assert layer.weight.to_dense().dtype == torch.int8
            assert layer.bias.data_ptr() == getattr(original, name).bias.data_ptr()
    base = pointers(network)
    shared = pointers(quantised)
    assert shared.keys() == {name for name in base if not name.startswith("blocks.")} and len(shared) > 8
    assert all(base[name] == pointer for name, pointer in shared.items())
    assert {p.dtype for p in quantised.parameters()} == {torch.float32}


def test_mixed_keeps_more_than_half_of_the_digits_bf16_loses() -> None:
    """Check 3, for our own scheme (bf16 products, stream as stored) in place of autocast."""
    network = random_dit(width=384)
    mixed, pure = (stack_error(variant(network, key), network) for key in ("bf16-mixed", "bf16"))
    assert 1e-4 < mixed < pure / 2


def test_each_name_gives_its_own_variant() -> None:
    """The variant part of check 4."""
    network = random_dit()
    before = copy.deepcopy(network.state_dict())
    assert variant(network, "fp32") is network and variant(network, "own") is network
    bf16 = variant(network, "bf16")
    assert type(bf16.blocks[0].qkv) is nn.Linear and {p.dtype for p in bf16.parameters()} == {torch.bfloat16}
    assert variant(bf16, "bf16") is bf16 and variant(bf16, "fp32").head.weight.dtype == torch.float32
    mixed = variant(network, "bf16-mixed")
    assert all(type(getattr(b, n)) is MixedLinear for b in mixed.blocks for n in BLOCK_LINEARS)
    assert mixed.blocks[0].fc1.weight.dtype == torch.bfloat16
    shared, base = pointers(mixed), pointers(network)
    assert all(base[name] == pointer for name, pointer in shared.items())
    assert mixed.positions.data_ptr() == network.positions.data_ptr()
    keys = ["fp32", "bf16", "bf16-mixed"] + ["int8d"] * has_int8()
    outputs = [call(variant(network, key)) for key in keys]
    assert all(not torch.equal(a, b) for i, a in enumerate(outputs) for b in outputs[:i])
    assert torch.equal(outputs[0], call(network))
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("key", ["bf16-mixed", pytest.param("int8d", marks=needs_int8)])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float64])
def test_variants_of_networks_stored_otherwise(key: str, stored: torch.dtype) -> None:
    exact = random_dit()
    network = precision.converted(exact, stored)
    made = variant(network, key)
    assert made.head.weight.dtype == (torch.bfloat16 if stored == torch.bfloat16 else torch.float32)
    error = (call(made) - call(exact)).norm() / call(exact).norm()
    assert 0 < error < 5e-2


@needs_int8
def test_cut_blocks_are_quantised_at_their_own_widths() -> None:
    network = random_dit(depth=2, block_heads=(1, 2), block_hidden=(40, 256))
    assert stack_error(variant(network, "int8d"), network) < 6e-2


# --- some blocks only -----------------------------------------------------------------------------------------------


@needs_int8
def test_blocks_have_the_format_of_their_span() -> None:
    network = random_dit(depth=4)
    made = variant(network, "0:1=bf16-mixed, 2:4=int8d")
    kinds = [{type(getattr(block, name)) for name in BLOCK_LINEARS} for block in made.blocks]
    assert kinds == [{MixedLinear}, {nn.Linear}, {Int8Linear}, {Int8Linear}]
    base, shared = pointers(network), pointers(made)
    assert all(base[k] == v for k, v in shared.items() if k.startswith("blocks.1."))
    whole = variant(network, "0:4=int8d")
    assert torch.equal(call(whole), call(variant(network, "int8d")))
    assert torch.equal(call(variant(network, "1:3=own")), call(network))
    errors = [float((call(variant(network, key)) - call(network)).norm()) for key in ("3:4=int8d", "0:4=int8d")]
    assert 0 < errors[0] < errors[1]


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("0:2=bf16", "own, bf16-mixed, int8d"),
        ("0-2=int8d", "first:last=format"),
        ("2:2=int8d", "is empty"),
        ("0:2=own,1:3=int8d", "begins before"),
        ("0:9=bf16-mixed", "has 4"),
    ],
)
def test_bad_spans_are_refused_in_one_line(key: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        variant(random_dit(depth=4), key)
    with pytest.raises(ConfigError, match=words):
        precision.check_precision(key, 4)
    with pytest.raises(ConfigError, match="'='"):
        precision.register_precision("0:2=int8d", lambda n: n)


# --- the 8-bit linear against integer arithmetic --------------------------------------------------------------------


def by_hand(x: Tensor, layer: nn.Linear) -> Tensor:
    """What `Int8Linear` should give, in integers and float64."""
    weight, scales = quantized_rows(layer.weight, int8.weight_levels())
    scale = x.float().abs().max().double() / 127
    codes = (x.double() / scale).round().long()
    total = codes @ weight.long().T
    return total.double() * scale * scales.double() + layer.bias.double()


@needs_int8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(24,), (3, 24), (2, 5, 24)])
def test_int8_linear_equals_integer_arithmetic(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(24, 16).requires_grad_(False)
    plain.weight[3] *= 50  # one large output feature must not cost the others their digits
    x = torch.randn(shape).to(dtype)
    layer = Int8Linear(plain, torch.float32)
    expected = by_hand(x, plain)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    gelu = F.gelu(expected, approximate="tanh")
    torch.testing.assert_close(layer.gelu(x).double(), gelu, rtol=1e-4, atol=1e-4)
    assert Int8Linear(plain, torch.bfloat16)(x).dtype == torch.bfloat16


@given(seed=st.integers(0, 2**31), magnitude=st.sampled_from([1e-20, 1e-3, 1.0, 1e4, 1e30]), bf16=st.booleans())
def test_quantising_rounds_to_the_nearest_code(seed: int, magnitude: float, bf16: bool) -> None:
    x = torch.randn(7, 13, generator=torch.Generator().manual_seed(seed)) * magnitude
    x = x.bfloat16() if bf16 else x
    codes, scale = quantized_input(x)  # type: ignore[misc]
    assert codes.dtype == torch.uint8 and (codes.long() - 128).abs().max() == 127
    assert ((codes.double() - 128) * scale - x.double()).abs().max() <= scale * (0.5 + 1e-4)
    weight, scales = quantized_rows(x, 127)
    assert (weight.double() * scales[:, None].double() - x.double()).abs().max() <= scales.max() * (0.5 + 1e-4)


def test_every_output_feature_has_a_scale_of_its_own() -> None:
    """Rows whose sizes differ a hundredfold: the error of one scale for all is at least twice as large (sheet E, 4)."""
    sizes = torch.logspace(-2, 0, 32)[:, None]
    weight = sizes * torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    codes, scales = quantized_rows(weight, 127)
    assert scales.shape == (32,) and torch.equal(scales, weight.abs().amax(1) / 127)
    one = weight.abs().max() / 127
    ours = (codes * scales[:, None] - weight).square().mean()
    assert 2 * ours < ((weight / one).round() * one - weight).square().mean()


def test_large_inputs_are_quantised_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 5, 7).transpose(0, 2)  # not contiguous either
    whole, scale = quantized_input(x)  # type: ignore[misc]
    monkeypatch.setattr(int8, "CHUNK", 8)
    parts, same = quantized_input(x)  # type: ignore[misc]
    assert torch.equal(whole, parts) and scale == same and parts.shape == x.shape
    assert torch.equal(whole.long() - 128, (x / scale).round().long())


@needs_int8
def test_the_8bit_product_is_not_the_reference_loop() -> None:
    """Codes of a kind that oneDNN has no kernel for here run 2000 times slower, with the right answer."""
    plain, x = nn.Linear(96, 288).requires_grad_(False), torch.randn(640, 96)
    layer = Int8Linear(plain, torch.float32)

    def seconds(call: nn.Module) -> float:
        call(x)
        begun = time.process_time()
        call(x)
        return time.process_time() - begun

    assert min(seconds(layer) for _ in range(3)) < 50 * max(1e-4, min(seconds(plain) for _ in range(3)))


@needs_int8
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_visible(value: float) -> None:
    layer = Int8Linear(nn.Linear(8, 4), torch.float32)
    x = torch.zeros(2, 8)
    assert torch.equal(layer(x), layer.bias.expand(2, 4))
    x[1, 3] = value
    assert layer(x).isnan().all() and layer(x).shape == (2, 4)


@needs_int8
def test_gradients_are_refused_not_lost() -> None:
    layer = Int8Linear(nn.Linear(8, 4), torch.float32)
    with pytest.raises(PlanError, match="no gradients"):
        layer(torch.randn(2, 8, requires_grad=True))


@needs_int8
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="an x86 matter")
def test_processors_without_8bit_dot_products_do_not_saturate() -> None:
    """AVX2 adds pairs of products in 16 bits: with weights of 127 the largest sums would come out wrong, silently."""
    program = (
        "import torch; from torch import nn; from pliant.models import int8\n"
        "layer = nn.Linear(64, 8).requires_grad_(False); layer.weight.fill_(0.5); layer.bias.zero_()\n"
        "print(float(int8.Int8Linear(layer, torch.float32)(torch.ones(4, 64))[0, 0]))"
    )
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    out = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True).stdout
    assert float(out) == pytest.approx(32.0, rel=1e-5)


# --- layers, registry, defaults -------------------------------------------------------------------------------------


def test_plain_linears_still_run_on_our_kernels() -> None:
    x, layer = torch.randn(3, 8), nn.Linear(8, 4)
    with torch.no_grad():
        assert torch.equal(layers.linear(x, layer, None), kernels.linear(x, layer.weight, layer.bias))
        assert torch.equal(layers.linear_gelu(x, layer, None), kernels.linear_gelu(x, layer.weight, layer.bias))
        mixed = MixedLinear(layer, torch.float32)
        delta = layers.LowRank(8, 4, 2, 2.0)
        nn.init.normal_(delta.up)
        both = layers.linear_gelu(x, mixed, delta)
    assert torch.equal(both, F.gelu(mixed(x) + delta(x), approximate="tanh"))


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(precision, "VARIANTS", dict(precision.VARIANTS))
    yield


@pytest.mark.usefixtures("registry")
def test_users_register_their_own() -> None:
    network = random_dit(depth=1)
    register_precision("fp64", lambda network: precision.converted(network, torch.float64))
    assert "fp64" in known_precisions() and resolve_precision("fp64", network) == "fp64"
    assert variant(network, "fp64").head.weight.dtype == torch.float64
    with pytest.raises(ConfigError, match="registered already"):
        register_precision("bf16", lambda network: network)
    with pytest.raises(ConfigError, match="needs a name"):
        register_precision(" ", lambda network: network)


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'int8d'"):
        variant(random_dit(depth=1), "int8")


@pytest.mark.parametrize(
    ("width", "stored", "fast", "expected"),
    [
        (64, torch.float32, True, "bf16"),
        (64, torch.float32, False, "fp32"),
        (32, torch.float32, True, "fp32"),
        (32, torch.bfloat16, True, "bf16"),
        (32, torch.float64, True, "own"),
        (64, torch.float64, True, "bf16"),
    ],
)
def test_default(width: int, stored: torch.dtype, fast: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_multiplies_bf16_faster", lambda: fast)
    assert resolve_precision(None, precision.converted(random_dit(width, depth=1), stored)) == expected


def test_gpus_without_torchao_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ConfigError, match="pip install torchao"):
        variant(random_dit(depth=1).to("meta"), "int8d")  # any device that is not the CPU


def check_torchao(exact: DiT) -> None:
    network = precision.converted(exact, torch.bfloat16)
    quantised = precision._int8_torchao(network)
    for block in quantised.blocks:
        for name in BLOCK_LINEARS:
            inner = getattr(block, name).weight
            assert inner.qdata.dtype == torch.int8 and inner.scale.numel() == len(inner)  # a scale per output feature
    assert quantised.head.weight.data_ptr() == network.head.weight.data_ptr()
    assert 1e-3 < stack_error(quantised, exact) < 6e-2


def test_torchao_quantises_the_same_layers() -> None:
    """The GPU's route, run on the CPU where torchao is installed."""
    pytest.importorskip("torchao")
    check_torchao(random_dit(width=64, depth=2))


@pytest.mark.gpu
def test_int8_on_a_gpu() -> None:
    pytest.importorskip("torchao")
    network = random_dit(width=384).to("cuda")
    x, t, y = torch.randn(2, 4, 8, 8), torch.full((2,), 400.0), torch.zeros(2, dtype=torch.long)
    args = [tensor.to("cuda") for tensor in (x, t, y)]
    with torch.no_grad():
        exact, ours = network(*args), variant(network, "int8d")(*args).float()
    assert 1e-3 < (ours - exact).norm() / exact.norm() < 6e-2


# --- compiled -------------------------------------------------------------------------------------------------------


def test_without_a_compiler_one_line_says_so() -> None:
    from torch._inductor import config

    none_there = config.patch({"cpp.cxx": (None, "/no/such/compiler")})
    with none_there, pytest.raises(ConfigError, match=r"needs a C\+\+ compiler"):
        variant(random_dit(depth=1), "bf16-compiled")


def compiled_here() -> bool:
    from pliant.models.compiled import require_compiler

    try:
        require_compiler(torch.device("cpu"))
    except ConfigError:
        return False
    return True


def test_masks_and_gradients_take_the_plain_route() -> None:
    if not compiled_here():
        pytest.skip("no C++ compiler")
    made, plain = (variant(random_dit(depth=1), key).blocks[0] for key in ("bf16-compiled", "bf16"))
    x, rows = torch.randn(1, 4, 64, dtype=torch.bfloat16), torch.randn(1, 6, 64, dtype=torch.bfloat16)
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    assert torch.equal(made(x, rows, None, mask), plain(x, rows, None, mask))
    made(x.requires_grad_(), rows).sum().backward()
    assert x.grad is not None


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no compiler to rely on")
def test_compiled_blocks_are_frozen_and_not_mixed_up() -> None:
    """Freezing, proven by what it does: a weight zeroed after the first call no longer matters. For each shape anew."""
    if not compiled_here():
        pytest.skip("no C++ compiler")
    network, other = random_dit(depth=1), random_dit(depth=1)
    nn.init.normal_(other.blocks[0].fc1.weight)
    made, second = variant(network, "bf16-compiled"), variant(other, "bf16-compiled")
    for key_of, compiled in ((network, made), (other, second)):
        eager = call(variant(key_of, "bf16"))
        torch.testing.assert_close(call(compiled), eager, rtol=0, atol=0.05 * float(eager.abs().max()))
    first, more = call(made), call(made, batch=3)
    with torch.no_grad():
        for block in made.blocks:
            block.fc2.weight.zero_()
            block.proj.weight.zero_()
    assert torch.equal(call(made), first) and torch.equal(call(made, batch=3), more)
    changed = variant(network, "bf16")
    for block in changed.blocks:
        block.fc2.weight.zero_()
    assert not torch.allclose(call(changed), first, atol=0.05 * float(first.abs().max()))  # the test could have failed
