"""The product with a quantized kernel and its gradient, compared with the dequantized kernel in float64."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax.errors import UserError
from lora_jax.quant.dequantize import dequantize
from lora_jax.quant.encode import quantize, quantize_int8
from lora_jax.quant.matmul import matmul
from lora_jax.quant.stack import empty_stack, place
from tests.quant.reference import IN, OUT

pytestmark = pytest.mark.slow

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# Relative to the sum of the products' sizes: rounding of each weight and of the result, and of the sums in float32.
BOUNDS = {"float32": 2e-6, "bfloat16": 2**-7}
KERNELS: dict[str, Any] = {
    "nf4": partial(quantize, quant_type="nf4", double_quant=False),
    "nf4, double": partial(quantize, quant_type="nf4", double_quant=True),
    "fp4": partial(quantize, quant_type="fp4", double_quant=False),
    "int8": quantize_int8,
}
LAYERS, WIDTH = 3, 256


def kernel_of(kind: str, out: int, rows: int, seed: int = 0) -> Any:
    values = np.random.default_rng(seed).normal(size=(out, rows)) / np.sqrt(rows)
    return KERNELS[kind](values.astype(np.float32))


def stack_of(kind: str, seed: int, out: int = WIDTH, rows: int = WIDTH) -> Any:
    kernels = [kernel_of(kind, out, rows, seed + layer) for layer in range(LAYERS)]
    stack = empty_stack(kernels[0], LAYERS)
    for layer, kernel in enumerate(kernels):
        stack = place(stack, kernel, layer)
    return stack


@jax.jit
def both_ways(x: Any, kernel: Any, dy: Any) -> tuple[Any, Any]:
    y, pull = jax.vjp(partial(matmul, kernel=kernel), x)
    return y, pull(dy)[0]


@pytest.mark.slow
@settings(max_examples=15)
@given(
    st.sampled_from(sorted(KERNELS)),
    st.sampled_from(sorted(DTYPES)),
    st.sampled_from(OUT),
    st.sampled_from(IN),
    st.sampled_from([(1,), (5,), (2, 3), (0,)]),
    st.integers(0, 2**32 - 1),
)
def test_product_and_gradient_match_the_dequantized_kernel(
    kind: str, dtype: str, out: int, rows: int, batch: tuple[int, ...], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    kernel = kernel_of(kind, out, rows, seed)
    weight = np.asarray(dequantize(kernel, jnp.float32), np.float64)
    x, dy = (jnp.asarray(rng.normal(size=(*batch, size)), DTYPES[dtype]) for size in (rows, out))
    y, dx = both_ways(x, kernel, dy)
    for found, given_, matrix in ((y, x, weight), (dx, dy, weight.T)):
        wide = np.asarray(given_, np.float64)
        assert found.dtype == x.dtype
        bound = BOUNDS[dtype] * (np.abs(wide) @ np.abs(matrix)) + 1e-30
        assert (np.abs(np.asarray(found, np.float64) - wide @ matrix) <= bound).all()


@pytest.mark.parametrize("kind", KERNELS)
def test_nothing_extra_is_kept_for_the_backward_pass(kind: str) -> None:
    kernel = kernel_of(kind, 64, 256)
    _, pull = jax.vjp(partial(matmul, kernel=kernel), jnp.ones((2, 256)))
    stored = [(array.shape, array.dtype) for array in jax.tree.leaves(kernel)]
    kept = [(array.shape, array.dtype) for array in jax.tree.leaves(pull)]
    assert sorted(map(str, kept)) == sorted(map(str, stored))


@pytest.mark.parametrize("kind", KERNELS)
def test_a_kernel_has_no_gradient(kind: str) -> None:
    kernel = kernel_of(kind, 64, 128)
    program = jax.jit(jax.grad(lambda kernel: matmul(jnp.ones((2, 128)), kernel).sum(), allow_int=True))
    gradient = program(kernel)
    for array in jax.tree.leaves(gradient):
        assert array.dtype == jax.dtypes.float0 or not np.asarray(array).any()


def layer(x: Any, leaves: Any) -> tuple[Any, None]:
    first, second, adapter = leaves
    x = jnp.tanh(matmul(x, first) + (x @ adapter) @ adapter.T)
    return jnp.tanh(matmul(x, second)), None


def plain_layer(x: Any, leaves: Any) -> tuple[Any, None]:
    first, second, adapter = leaves
    x = jnp.tanh(x @ first + (x @ adapter) @ adapter.T)
    return jnp.tanh(x @ second), None


def loss(adapter: Any, kernels: Any, x: Any, remat: bool, body: Any) -> Any:
    step = jax.checkpoint(body, prevent_cse=False) if remat else body
    return jnp.sum(jax.lax.scan(step, x, (*kernels, adapter))[0] ** 2)


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("remat", [False, True])
def test_scanned_stack_gives_the_gradients_of_the_dequantized_stack(kind: str, remat: bool) -> None:
    kernels = (stack_of(kind, 0), stack_of(kind, 10))
    adapter = 0.1 * jax.random.normal(jax.random.key(0), (LAYERS, WIDTH, 4))
    x = jax.random.normal(jax.random.key(1), (5, WIDTH))
    found = jax.jit(jax.grad(partial(loss, remat=remat, body=layer)))(adapter, kernels, x)
    plain = tuple(dequantize(stack, jnp.float32) for stack in kernels)
    expected = jax.jit(jax.grad(partial(loss, remat=remat, body=plain_layer)))(adapter, plain, x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("remat", [False, True])
def test_compiled_step_holds_at_most_one_dequantized_weight(kind: str, remat: bool) -> None:
    kernels = (stack_of(kind, 0), stack_of(kind, 10))
    adapter, x = jnp.zeros((LAYERS, WIDTH, 4)), jnp.ones((2, WIDTH))
    step = jax.jit(jax.value_and_grad(partial(loss, remat=remat, body=layer)))
    compiled = step.lower(adapter, kernels, x).compile()
    memory: Any = compiled.memory_analysis()
    weight, codes = 4 * WIDTH**2, kernels[0].nbytes / LAYERS
    activations = 16 * LAYERS * x.nbytes + 4 * adapter.nbytes
    assert memory.temp_size_in_bytes < weight + 2 * codes + activations
    assert (
        memory.argument_size_in_bytes
        < sum(stack.nbytes for stack in kernels) + adapter.nbytes + x.nbytes + 512
    )


@pytest.mark.parametrize("rows", [128, 48])
def test_flax_scans_over_a_stack_in_a_collection(rows: int) -> None:
    class Cell(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> tuple[Any, None]:
            return jnp.tanh(matmul(x, self.get_variable("params", "kernel"))), None

    scanned = nn.scan(nn.remat(Cell, prevent_cse=False), variable_axes={"params": 0}, length=LAYERS)()
    stack, x = stack_of("nf4, double", 0, rows, rows), jnp.ones((2, rows))
    found, _ = jax.jit(scanned.apply)({"params": {"kernel": stack}}, x)
    expected = x
    for kernel in dequantize(stack, jnp.float32):
        expected = jnp.tanh(expected @ kernel)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_layers_quantized_differently_are_one_clear_error() -> None:
    stack = empty_stack(kernel_of("nf4", 8, 64), LAYERS)
    with pytest.raises(UserError, match=r"different ways by layer: layers\.1\.up_proj") as caught:
        place(stack, kernel_of("fp4", 8, 64), 1, name="layers.1.up_proj")
    assert "\n" not in str(caught.value)


@settings(max_examples=5)
@given(st.sampled_from(["nf4", "int8"]), st.sampled_from([jnp.nan, jnp.inf]))
def test_nan_stays_in_its_own_row(kind: str, bad: float) -> None:
    kernel, product = kernel_of(kind, 16, 128), jax.jit(matmul)
    x = np.random.default_rng(0).normal(size=(3, 128)).astype(np.float32)
    clean = product(x, kernel)
    x[0, 0] = bad
    found = product(x, kernel)
    np.testing.assert_array_equal(found[1:], clean[1:])
    assert not np.isfinite(found[0]).any()
