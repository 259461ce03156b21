/**
 * The kernel Uniform: uniform numbers in [0, 1), a function of `key` (int32 [2]: seed and step) and of `purpose` alone.
 * TensorFlow makes them where it computes; elsewhere `generate` does, in JavaScript, so that WASM and ONNX Runtime draw
 * the same bits.
 */
import * as tf from '@tensorflow/tfjs';

type Attrs = {
  shape: number[];
  purpose: number;
  generate: (n: number, seed: number, step: number, purpose: number) => Float32Array;
};

/** Registers it for TFJS's present backend. */
export function registerUniform(): void {
  const backendName = tf.getBackend();
  if (tf.getKernel('Uniform', backendName)) return;
  const kernelFunc: tf.KernelFunc = ({ inputs, attrs, backend }) => {
    const { shape, purpose, generate } = attrs as unknown as Attrs;
    const key = inputs.key as tf.TensorInfo;
    if (backendName === 'tensorflow') return stateless(backend as TensorFlow, shape, key, purpose);
    const { readSync, write } = backend as { [K in 'readSync' | 'write']: tf.KernelBackend[K] };
    const [seed = 0, step = 0] = readSync.call(backend, key.dataId) as Int32Array;
    const numbers = generate(tf.util.sizeFromShape(shape), seed, step, purpose);
    return { dataId: write.call(backend, numbers, shape, 'float32'), shape, dtype: 'float32' };
  };
  tf.registerKernel({ kernelName: 'Uniform', backendName, kernelFunc });
}

interface TensorFlow {
  binding: Record<'TF_FLOAT' | 'TF_INT32' | 'TF_ATTR_TYPE', number>;
  executeSingleOutput(op: string, attrs: object[], inputs: tf.TensorInfo[]): tf.Tensor;
}
function stateless(backend: TensorFlow, shape: number[], key: tf.TensorInfo, purpose: number): tf.Tensor {
  const { TF_FLOAT, TF_INT32, TF_ATTR_TYPE: type } = backend.binding;
  const types = { dtype: TF_FLOAT, T: TF_INT32, Tseed: TF_INT32 };
  const attrs = Object.entries(types).map(([name, value]) => ({ name, type, value }));
  const [dims, seed] = [tf.tensor1d(shape, 'int32'), tf.add(key as tf.Tensor, tf.tensor1d([purpose, 0], 'int32'))];
  const out = backend.executeSingleOutput('StatelessRandomUniform', attrs, [dims, seed]);
  tf.dispose([dims, seed]);
  return out;
}
