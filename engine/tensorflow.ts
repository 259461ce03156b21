/**
 * TensorFlow as TFJS's backend: loads @tensorflow/tfjs-node-gpu as `npm run tensorflow` installs it, and makes its
 * matrix products bfloat16 on request. Importing this file loads nothing: TensorFlow reads its environment only
 * once, so `loadTensorFlow` sets that first.
 */
import util from 'node:util';
import * as tf from '@tensorflow/tfjs';
import { registerUniform } from './random.ts';

export interface TensorFlowOptions {
  /** CPU threads; TensorFlow takes all cores by itself */
  threads?: number;
  /** of matrix products on CUDA: float32 turns TF32 off; bf16 also needs a call of `useBf16Products` */
  precision?: 'float32' | 'tf32' | 'bf16';
}

/** The part of tfjs-node that is used here. Its own types can't be: the package is optional. */
interface Backend {
  isUsingGpuDevice: boolean;
  binding: {
    TF_Version: string;
    TF_FLOAT: number;
    TF_ATTR_BOOL: number;
    TF_ATTR_TYPE: number;
    executeOp(name: string, attrs: object[], inputIds: number[], outputs: number): { id: number }[];
    deleteTensor(id: number): void;
  };
  getInputTensorIds(tensors: tf.TensorInfo[]): number[];
  createOutputTensor(output: { id: number }): tf.Tensor;
}

/** Loads TensorFlow, makes it TFJS's backend, and tells its version and whether it computes on a GPU. */
export async function loadTensorFlow(options: TensorFlowOptions = {}): Promise<{ version: string; gpu: boolean }> {
  const { threads, precision } = options;
  const { env } = process;
  env.TF_CPP_MIN_LOG_LEVEL ??= '2'; // errors only
  env.TF_ENABLE_ONEDNN_OPTS ??= '0'; // its ops double a step's time at small sizes
  // oneDNN's AVX2 and AVX-512 products let the stack pointer point into the heap (its issue 4845), where a signal's handler
  // (Ctrl-C, a profiler's) then writes. Its AVX products don't, and take a step a seventh longer.
  env.ONEDNN_MAX_CPU_ISA ??= 'AVX';
  env.TF_FORCE_GPU_ALLOW_GROWTH ??= 'true'; // else it takes the whole GPU at once
  if (threads !== undefined) env.TF_NUM_INTRAOP_THREADS = env.TF_NUM_INTEROP_THREADS = String(threads);
  if (precision === 'float32') env.NVIDIA_TF32_OVERRIDE = '0';
  // tfjs-node calls these two: gone in Node 23, and Node 22 warns at each first call
  Object.assign(util, { isArray: Array.isArray, isNullOrUndefined: (value: unknown) => value == null });

  const name: string = '@tensorflow/tfjs-node-gpu'; // a plain string, so that types are checked without the package
  const argv = process.argv;
  process.argv = argv.slice(0, 2); // its loader (node-pre-gyp) would take our flags for its own
  try {
    await import(name);
  } catch (error) {
    const { message, code } = error as NodeJS.ErrnoException;
    const missing = code?.endsWith('MODULE_NOT_FOUND') && message.includes(name);
    const problem = missing ? 'is not installed' : `does not load (${message.split('\n')[0]!.replace(/[. ]+$/, '')})`;
    throw new Error(`TensorFlow ${problem}: run \`npm run tensorflow\``, { cause: error });
  } finally {
    process.argv = argv;
  }
  if (!(await tf.setBackend('tensorflow'))) throw new Error('TensorFlow loaded, but TFJS refused it as its backend');
  const { binding, isUsingGpuDevice } = tf.backend() as unknown as Backend;
  return { version: binding.TF_Version, gpu: isUsingGpuDevice };
}

/**
 * Starts it as nano-param-decomp.ts wants an engine: its name, what it is, and, unless `graph` is off, functions compiled
 * into a graph. XLA by itself only where it was measured to pay: on a CPU it saves a tenth to a third of a step, after
 * compiling for a minute in all.
 */
export async function startTensorFlow(options: {
  precision: string;
  graph: boolean;
  xla: string;
  threads: number;
  nSteps?: number;
  verify?: boolean; // check the first calls, as engine/check.ts says
}) {
  const { precision, graph, xla, threads, nSteps = 0, verify = true } = options;
  const { version, gpu } = await loadTensorFlow({
    ...(precision === 'auto' ? {} : { precision: precision as 'float32' | 'tf32' | 'bf16' }),
    ...(threads > 0 ? { threads } : {}),
  });
  if (precision === 'bf16') useBf16Products();
  const useXla = xla === 'on' || (xla === 'auto' && nSteps >= 10_000 && !gpu);
  const compiled = useXla ? ', XLA, which compiles for up to minutes before the first steps' : '';
  const how = graph ? `traced graph${compiled}` : 'op by op';
  const engine = {
    name: 'tensorflow',
    gpu,
    xla: graph && useXla,
    description: `TensorFlow ${version} on ${gpu ? 'CUDA' : 'the CPU'}, ${how}`,
  };
  registerUniform();
  if (!graph) return engine;
  const graphs = await import('./graph.ts');
  // Short products are rounded at other places in a graph than op by op, and a threshold turns that into 0 or 1.
  const tolerance = precision === 'bf16' ? 0.03 : gpu && precision !== 'float32' ? 0.01 : 1e-3;
  const products = precision === 'bf16' ? 2 ** -6 : gpu && precision !== 'float32' ? 2 ** -9 : 2 ** -16;
  const traced = new graphs.Graph({ xla: useXla, bf16: precision === 'bf16', tolerance, products, verify });
  return { ...engine, compile: traced.compile, picture: traced.picture };
}

const DT_BFLOAT16 = 14; // of TensorFlow's DataType; TFJS has no name for it

/**
 * From now on float32 matrix products (tf.matMul, forward and backward, and what is fused from it) round both
 * factors to bfloat16, accumulate in float32, and round the product to bfloat16, as PyTorch's autocast does. What
 * goes in and comes out stays float32, so parameters, losses and the optimiser never see the short type.
 */
export function useBf16Products(): void {
  const stock = tf.getKernel('BatchMatMul', 'tensorflow');
  tf.unregisterKernel('BatchMatMul', 'tensorflow'); // registering over it would warn
  tf.registerKernel({
    ...stock,
    kernelFunc: args => {
      const { a, b } = args.inputs as { a: tf.TensorInfo; b: tf.TensorInfo };
      if (a.dtype !== 'float32') return stock.kernelFunc(args);
      const backend = args.backend as Backend;
      const { binding } = backend; // looked up at each call: it is another one while a graph is traced
      const bool = (name: string, value: unknown) => ({ name, type: binding.TF_ATTR_BOOL, value });
      const type = (name: string, value: number) => ({ name, type: binding.TF_ATTR_TYPE, value });
      const execute = (op: string, attrs: object[], ids: number[]) => binding.executeOp(op, attrs, ids, 1)[0]!;
      const cast = (id: number, from: number, to: number) =>
        execute('Cast', [type('SrcT', from), type('DstT', to), bool('Truncate', false)], [id]);

      const factors = backend.getInputTensorIds([a, b]).map(id => cast(id, binding.TF_FLOAT, DT_BFLOAT16).id);
      const transposes = [bool('adj_x', args.attrs?.transposeA), bool('adj_y', args.attrs?.transposeB)];
      const product = execute('BatchMatMulV2', [type('T', DT_BFLOAT16), ...transposes], factors);
      const result = cast(product.id, DT_BFLOAT16, binding.TF_FLOAT);
      for (const id of [...factors, product.id]) binding.deleteTensor(id);
      return backend.createOutputTensor(result);
    },
  });
}
