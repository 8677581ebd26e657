"""Which kernels of integers onnxruntime runs of a file, and how long they take on this machine beside float32's."""

from __future__ import annotations

import collections
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx

from converters.onnx.check import Errors, session

KERNELS = (  # of products
    *("MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulInteger", "QLinearMatMul", "MatMulNBits"),
    *("QLinearConv", "ConvInteger", "QGemm"),
)
SECONDS = 8.0  # that the runs of all files take together, about
TURNS = 7
SLOWER = 1.02  # times float32's; less is noise


class Opened:
    """A file as it is run, with what it was last asked, so that it can be asked again.

    Args:
      path: of the file.
      kernels: of integers, where it quantises inputs; else it computes in float32 what they stand for.
      counted: whether kernels are counted, for which the graph is written once.

    Attributes:
      counts: {kind of kernel: how many} of integers, in the graph as onnxruntime optimises it.
    """

    def __init__(self, path: Path, kernels: bool = True, counted: bool = True):
        kinds: collections.Counter = collections.Counter()
        with tempfile.TemporaryDirectory() as folder:
            optimized = Path(folder) / "optimized.onnx" if counted else None
            self._session = session(path, kernels and quantizes_inputs(path), optimized)
            if optimized:
                kinds.update(node.op_type for node in _nodes(optimized))
        self.counts = {kind: kinds[kind] for kind in KERNELS if kinds[kind]}
        self._asked: tuple[Any, Any] = None, {}

    def run(self, names: Sequence[str] | None, inputs: dict[str, Any]) -> list[Any]:
        self._asked = names, inputs
        return self._session.run(names, inputs)

    def seconds(self) -> float:
        """Of the last question, asked again."""
        start = time.perf_counter()
        self._session.run(*self._asked)
        return time.perf_counter() - start


def _nodes(path: Path) -> Any:
    return onnx.load(path, load_external_data=False).graph.node


def quantizes_inputs(path: Path) -> bool:
    """Whether a file's layers have inputs that become integers."""
    return any(node.op_type == "QuantizeLinear" for node in _nodes(path))


def by_turns(files: Sequence[Opened]) -> list[float]:
    """Seconds of each, the medians of turns in which one follows the other, so that a busy machine is fair to them."""
    first = sum(each.seconds() for each in files)
    turns = max(1, min(TURNS, int(SECONDS / max(first, 1e-9))))
    taken = [[each.seconds() for each in files] for _ in range(turns)]
    return [statistics.median(each) for each in zip(*taken, strict=True)]


def summary(errors: Errors, score: str) -> str:
    """A line about a pair of files; `score`: what masks are ranked by, in words."""
    return (
        f"largest error relative to the largest value: embedding {errors.embedding:.1e}, masks {errors.masks:.1e}, "
        f"{score} {errors.iou:.1e}; masks agree to {100 * errors.agreement:.2f} %"
    )


def saturation(errors: Errors, limit: float) -> str:
    """What to say, behind the errors of kernels of integers, where they are larger than those of the graph may be.

    The graph is right when they are measured. Without VNNI onnxruntime's kernels of signed integers saturate.
    """
    if errors.embedding <= limit:
        return ""
    return (
        "\n  its kernels of integers give other masks here, as onnxruntime's of signed inputs do without VNNI: quantise"
        "\n  with unsigned inputs (quantize.ranges=minmax), or open the file with session.disable_quant_qdq=1"
    )


def describe(plain: Sequence[Opened], own: Sequence[Opened], names: Sequence[str]) -> list[str]:
    """Lines about kernels and time of files, encoder and decoder, beside those of float32."""
    some = lambda counts: ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "none"
    lines = [
        "  kernels of integers in onnxruntime's graph: "
        + "; ".join(f"{name} {some(each.counts)}" for name, each in zip(names, own, strict=True))
    ]
    slower = []
    for name, before, after in zip(names, plain, own, strict=True):
        float32, integers = by_turns([before, after])
        lines.append(f"  {name}: {1000 * integers:.1f} ms, float32 {1000 * float32:.1f} ms, by turns on this machine")
        slower += [name] if integers > SLOWER * float32 else []
    if slower:
        lines.append(f"  integers are slower than float32 here: {' and '.join(slower)}")
    return lines
