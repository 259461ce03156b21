"""The recorded step under engines that compile it: median ms of a call, from random inputs.

    npx tsx nano-param-decomp.ts --preset toy --optimizer adamw --dry-run --save-graph toy.onnx
    python tools/time_graph.py --graph toy.onnx --threads 2

Needs onnxruntime and openvino. Denormal numbers are flushed, as engine/onnxruntime.ts does.
"""

import argparse
import statistics
import time

import numpy as np
import onnxruntime
import openvino


def main() -> None:
    parser = argparse.ArgumentParser(description="Times a saved step in ONNX Runtime and OpenVINO")
    parser.add_argument("--graph", required=True, help="the file of --save-graph")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--calls", type=int, default=50)
    args = parser.parse_args()

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = args.threads
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    session = onnxruntime.InferenceSession(args.graph, options)
    hint = {
        "INFERENCE_NUM_THREADS": args.threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = openvino.Core().compile_model(args.graph, "CPU", hint).create_infer_request()

    random = np.random.default_rng(0)
    feeds = {
        x.name: np.asarray(random.integers(0, 60, x.shape), np.int32)
        if "int" in x.type
        else np.asarray(0.1 * random.random(x.shape), np.float32)
        for x in session.get_inputs()
    }

    for name, call in {"onnxruntime": lambda: session.run(None, feeds), "openvino": lambda: request.infer(feeds)}.items():
        times = []
        for _ in range(3 + args.calls):
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
        print(f"{name} {statistics.median(times[3:]):.1f} ms")


if __name__ == "__main__":
    main()
