from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

from pipeline.model import onnx_calibration, onnx_dynamic, onnx_quantize
from pipeline.model.agreement import onnx_logits
from pipeline.model.gptq import decode, encode, gptq, nearest
from pipeline.model.onnx_quantize import AllRounded, quantize
from pipeline.quantize import VariantConfig

ROWS = [list(range(n, n + 40)) for n in range(0, 120, 20)]
WEIGHTS = 2 * (64 * 128 + 64 * 64 + 3 * 64 * 128)  # of tiny_base: q, k, v as one, o, gate, up, down
HEAD = 64 * 258


def settings(**changed: object) -> VariantConfig:
    values = {
        "bits": 8,
        "algorithm": "rtn",
        "block_size": 32,
        "symmetric": True,
        "accuracy_level": 4,
        "dynamic": False,
        "smoothing": 0.5,
        "float_inputs": 0,
        "eight_bit_products": 0,
        "tuning_steps": 0,
    }
    return VariantConfig(**values | changed)  # type: ignore[arg-type]


def made(fused: Path, out: Path, cfg: VariantConfig) -> Counter[str]:
    out.mkdir(exist_ok=True)
    return quantize(fused / "model.onnx", out / "model.onnx", cfg, [(row, 0) for row in ROWS], errors)[0]


def errors(rounded: AllRounded) -> dict[str, float]:
    """Of the products' squared sum, in place of what a model would say."""
    return {name: found.error for name, (found, _) in rounded.items() if "lm_head" not in name}


@pytest.mark.parametrize(
    ("changed", "forms", "tolerance"),
    [
        ({}, {"8": WEIGHTS + HEAD}, 0.02),
        ({"dynamic": True}, {"8": HEAD, "8 dynamic": WEIGHTS}, 0.05),
        ({"dynamic": True, "float_inputs": 1}, None, 0.05),
        ({"bits": 4}, {"4": WEIGHTS + HEAD}, 0.3),
        ({"bits": 4, "algorithm": "gptq"}, {"4": WEIGHTS + HEAD}, 0.3),
        ({"bits": 8, "algorithm": "gptq"}, {"8": WEIGHTS + HEAD}, 0.02),
        ({"bits": 4, "symmetric": False}, {"4": WEIGHTS + HEAD}, 0.3),
    ],
)
def test_every_weight_is_quantized_and_logits_stay_near(
    tiny_fused: Path, tmp_path: Path, changed: dict[str, object], forms: dict[str, int] | None, tolerance: float
) -> None:
    counts = +made(tiny_fused, tmp_path, settings(**changed))
    assert counts == forms or (forms is None and counts.keys() == {"8", "8 dynamic"} and counts["8"] > HEAD)
    for expected, found in zip(onnx_logits(tiny_fused, ROWS), onnx_logits(tmp_path, ROWS), strict=True):
        assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()
    # The embedding is the head's weight, quantized, and nothing is stored twice.
    stored = sum(path.stat().st_size for path in tmp_path.glob("model.onnx.data"))
    assert stored < (WEIGHTS + HEAD) * (1.4 if "4" not in counts else 0.8) + 2 * 2048 * 8 * 4 + 10_000


def test_settings_that_an_algorithm_does_not_use_are_not_reported_as_used() -> None:
    given = settings(bits=4, eight_bit_products=20, tuning_steps=3, smoothing=0.5, float_inputs=2)
    assert given.in_effect() == settings(bits=4, smoothing=0.0)
    gptq_keeps = settings(bits=4, algorithm="gptq", eight_bit_products=20, tuning_steps=3, smoothing=0.0)
    assert gptq_keeps.in_effect() == gptq_keeps
    dynamic_keeps = settings(dynamic=True, smoothing=0.5, float_inputs=2)
    assert dynamic_keeps.in_effect() == dynamic_keeps


def test_gptq_is_plain_rounding_by_the_best_scale_when_inputs_do_not_correlate() -> None:
    """The best of nine, from that of the value furthest from zero to 0.6 of it, tried one by one here."""
    weight = np.random.default_rng(0).normal(size=(64, 10)).astype(np.float32)
    found = gptq(weight, np.eye(64), bits=4, block_size=32)
    for block in range(2):
        for number, column in enumerate(weight[32 * block : 32 * block + 32].T):
            widest = column[np.abs(column).argmax()] / -8
            tried = [widest * np.float32(1 - step / 20) for step in range(9)]
            lost = [float(np.square(column - (np.clip(np.rint(column / s), -8, 7) * s)).sum()) for s in tried]
            best = tried[int(np.argmin(lost))]
            np.testing.assert_allclose(found.scales[block, number], best, rtol=1e-5)
            np.testing.assert_array_equal(found.codes[32 * block : 32 * block + 32, number], encode(column, best, 4))
            assert min(lost) <= lost[0]


def test_gptq_loses_nothing_of_weights_that_were_put_on_its_grid() -> None:
    rng = np.random.default_rng(3)
    weight = rng.normal(size=(128, 40)).astype(np.float32)
    weight[:64, 7] = 0
    on_grid = nearest(weight, 4, 64)
    inputs = rng.normal(size=(500, 128)) @ rng.normal(size=(128, 128))
    found = gptq(on_grid, inputs.T @ inputs, bits=4, block_size=64)
    np.testing.assert_array_equal(decode(found.codes, found.scales.repeat(64, 0), 4), on_grid)
    np.testing.assert_array_equal(found.scales[1], found.scales[1].astype(np.float16))  # they are stored in 16 bits
    assert 0.05 < (on_grid - weight).std() < 0.15


def test_gptq_loses_less_than_rounding_when_inputs_correlate() -> None:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(500, 16)) @ rng.normal(size=(16, 64)) + 0.1 * rng.normal(size=(500, 64))
    weight = rng.normal(size=(64, 20)).astype(np.float32)

    def lost(gram: np.ndarray) -> float:
        found = gptq(weight, gram, bits=4, block_size=32)
        rounded = decode(found.codes, found.scales.repeat(32, axis=0), 4)
        return float(np.square(inputs @ (weight - rounded)).sum())

    exact = inputs.T @ inputs
    assert lost(exact) < 0.5 * lost(np.eye(64))
    expected = lost(exact) / np.square(inputs @ weight).sum()
    np.testing.assert_allclose(gptq(weight, exact, bits=4, block_size=32).error, expected, rtol=1e-3)


def test_what_loses_most_keeps_eight_bits(tiny_fused: Path, tmp_path: Path) -> None:
    four = +made(tiny_fused, tmp_path / "4", settings(bits=4, algorithm="gptq"))
    mixed = +made(tiny_fused, tmp_path / "mixed", settings(bits=4, algorithm="gptq", eight_bit_products=3))
    assert mixed["4"] + mixed["8"] == four["4"]
    assert 0 < mixed["8"] < mixed["4"]
    expected = np.concatenate(onnx_logits(tiny_fused, ROWS))
    lost = [np.square(np.concatenate(onnx_logits(tmp_path / name, ROWS)) - expected).sum() for name in ("4", "mixed")]
    assert lost[1] < lost[0]


@pytest.mark.parametrize(
    "changed",
    [{"bits": 4, "algorithm": "gptq", "eight_bit_products": 2}, {"dynamic": True, "float_inputs": 2}],
)
def test_products_are_listed_most_sensitive_first(tiny_fused: Path, tmp_path: Path, changed: dict[str, object]) -> None:
    rows = [(row, 0) for row in ROWS]
    counts, found = quantize(tiny_fused / "model.onnx", tmp_path / "model.onnx", settings(**changed), rows, errors)
    sizes = {
        "attn.qkv_proj": 8192,
        "attn.o_proj": 4096,
        "mlp.gate_proj": 8192,
        "mlp.up_proj": 8192,
        "mlp.down_proj": 8192,
    }
    products = {f"layers.{at}.{kind}": size for at in range(2) for kind, size in sizes.items()}
    assert {product.name for product in found} == products.keys()
    assert [product.finer for product in found] == [True, True, *[False] * 8]
    values = [product.sensitivity for product in found]
    assert values == sorted(values, reverse=True)
    assert values[0] > values[-1] > 0
    finer = sum(products[product.name] for product in found[:2])
    assert counts["8"] == finer + (HEAD if "dynamic" in changed else 0)


def test_gptq_refuses_a_block_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match="block_size 48 does not divide the 64 inputs"):
        gptq(np.zeros((64, 2), np.float32), np.eye(64), bits=4, block_size=48)


def test_smoothing_leaves_the_function_and_evens_out(tiny_fused: Path, tmp_path: Path) -> None:
    seen = onnx_calibration.activations(tiny_fused / "model.onnx", [(row, 0) for row in ROWS], gram=False)
    model = onnx.load(tiny_fused / "model.onnx")
    after = onnx_dynamic.smooth(model, seen.largest, 0.5)
    onnx.save(model, tmp_path / "model.onnx")
    for expected, found in zip(onnx_logits(tiny_fused, ROWS), onnx_logits(tmp_path, ROWS), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4)
    again = onnx_calibration.activations(tmp_path / "model.onnx", [(row, 0) for row in ROWS], gram=False)
    for name, largest in after.items():
        np.testing.assert_allclose(again.largest[name], largest, rtol=1e-3)
    assert sum(name in seen.largest and not np.array_equal(after[name], seen.largest[name]) for name in after) == 6


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bits": 5}, "bits"),
        ({"algorithm": "magic"}, "algorithm"),
        ({"algorithm": "gptq", "symmetric": False}, "gptq is symmetric true only"),
        ({"bits": 4, "dynamic": True}, "dynamic is 8 bits"),
        ({"algorithm": "k_quant"}, "k_quant is 4 bits"),
        ({"smoothing": 2.0}, "smoothing"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**changed)


@pytest.mark.parametrize(
    "changed", [{}, {"dynamic": True}, {"bits": 4, "algorithm": "gptq"}, {"bits": 4, "symmetric": False}]
)
def test_gate_and_up_are_one_product(
    tiny_fused: Path, tmp_path: Path, changed: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tiny_fused, tmp_path / "merged", settings(**changed))
    monkeypatch.setattr(onnx_quantize, "merge_gate_up", lambda _: 0)
    made(tiny_fused, tmp_path / "apart", settings(**changed))
    graphs = {
        name: onnx.load(tmp_path / name / "model.onnx", load_external_data=False).graph for name in ("merged", "apart")
    }
    names = {name: {node.name for node in graph.node if node.op_type != "Cast"} for name, graph in graphs.items()}
    assert sum("gate_up_proj" in name and "Split" not in name for name in names["merged"]) == 2
    assert len(names["apart"]) == len(names["merged"])  # a pair less, a product and a split more
    for expected, found in zip(*(onnx_logits(tmp_path / name, ROWS) for name in ("apart", "merged")), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
