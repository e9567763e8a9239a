"""onnxruntime's com.microsoft.MoE in float32; its own softmax and top-k are part of the operator."""

from __future__ import annotations

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

from . import Work, column, package_version

NAME = "onnxruntime"
_threads = 1


def version() -> str:
    return package_version("onnxruntime")


def set_threads(n: int) -> None:
    global _threads
    _threads = n


@column("layer", "onnxruntime MoE float32")
def layer(p):
    if not p.wide or p.shape.config.score != "softmax":
        return None
    s, (gate_up, down) = p.shape, p.weights.pair("float32")
    inputs = {
        "x": p.x,
        "router": p.logits,
        "gate_up": p.weights.memo("ort", lambda: interleaved(gate_up)),
        "down": down,
    }
    node = helper.make_node(
        "MoE",
        ["x", "router", "gate_up", "", "down"],
        ["y"],
        domain="com.microsoft",
        k=s.top_k,
        activation_type="swiglu",
        swiglu_fusion=1,
        activation_alpha=1.0,
        activation_beta=0.0,
        normalize_routing_weights=0,
    )
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape) for name, value in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, p.x.shape)],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = _threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding, out = session.io_binding(), np.zeros_like(p.x)
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in inputs.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("y", "cpu", 0, np.float32, out.shape, out.ctypes.data)

    def run():
        session.run_with_iobinding(binding)
        return out

    return Work(run)


def interleaved(gate_up: np.ndarray) -> np.ndarray:
    """Rows of gate and up in turn, as the operator wants them fused."""
    experts, double, hidden = gate_up.shape
    return np.ascontiguousarray(gate_up.reshape(experts, 2, double // 2, hidden).swapaxes(1, 2)).reshape(gate_up.shape)
