export { checkSize } from './estimate.ts';
export { accumulate } from './shards.ts';

import { spawnSync } from 'node:child_process';
import * as os from 'node:os';
import * as tf from '@tensorflow/tfjs';
import { loadOnnxRuntime, onnxCompiler } from './onnxruntime.ts';
import { registerUniform } from './random.ts';
import { startTensorFlow } from './tensorflow.ts';
import { startWasm } from './wasm.ts';
import { startWebGpu } from './webgpu.ts';

/** Wrong input, known by its name to whoever reports it. */
function refuse(message: string): never {
  throw Object.assign(new Error(message), { name: 'UsageError' });
}

/** A WebAssembly heap ends at 4 GiB, whatever the machine has. */
const WASM_BYTES = 2 ** 32;
/** What the GPU's driver says it has, in bytes; 0 where there is none. */
function gpuBytes(): number {
  const { stdout } = spawnSync('nvidia-smi', ['--query-gpu=memory.total', '--format=csv,noheader,nounits']);
  return Number.parseInt(`${stdout}`, 10) * 2 ** 20 || 0;
}

/**
 * Starts the engine that is asked for; `auto`: TensorFlow where it finds a GPU, else ONNX Runtime, else TensorFlow on the
 * CPU, else WASM: the first that loads, and the description says why the others did not.
 * @throws UsageError if it isn't there
 */
export async function startEngine(options: Options) {
  const engine = await start(options);
  const { name, gpu } = engine;
  // a GPU without that driver's tool says nothing about its memory
  const memory = () =>
    gpu ? gpuBytes() || Infinity : name === 'wasm' ? Math.min(WASM_BYTES, os.totalmem()) : os.totalmem();
  // ONNX Runtime's state lies in WASM's heap
  const limits: { heapLimit?: number } = name === 'onnx' ? { heapLimit: WASM_BYTES } : {};
  return { ...engine, memoryBytes: memory, ...limits };
}

type Options = Parameters<typeof startTensorFlow>[0] & { engine: string };
async function start(options: Options) {
  const { engine: wanted, precision, graph, threads, verify = true } = options;
  const tried: string[] = []; // what does not load, and why
  const or = async <E>(name: string, job: () => Promise<E>): Promise<E | undefined> => {
    if (wanted !== name && wanted !== 'auto') return undefined;
    return job().catch((error: Error) => {
      tried.push(error.message.split('\n')[0]!);
      return wanted === 'auto' ? undefined : refuse(`--engine ${wanted}: ${tried}`);
    });
  };
  if (wanted === 'webgpu') return (await or('webgpu', startWebGpu))!;
  const short = /tf32|bf16/.test(precision);
  const onnx = () => (graph && !short ? or('onnx', loadOnnxRuntime) : undefined);
  const tensorflow = () => or('tensorflow', () => startTensorFlow(options));
  const gpu = wanted === 'auto' && gpuBytes() > 0;
  const first = gpu ? await tensorflow() : undefined;
  const ort = first ? undefined : await onnx();
  const started = first ?? (ort || gpu ? undefined : await tensorflow());
  if (started) return started;
  if (short) refuse(`--precision ${precision}: only on TensorFlow${tried.length ? `; ${tried}` : ''}`);
  const missing = await startWasm().then(
    () => '',
    (error: NodeJS.ErrnoException) => {
      if (error.code !== 'ERR_MODULE_NOT_FOUND') throw error;
      return 'plain JavaScript, slow (no @tensorflow/tfjs-backend-wasm)';
    },
  );
  registerUniform();
  const name = tf.getBackend();
  const why = tried.map(line => `; ${line}`).join('');
  if (!ort || missing)
    return { name, gpu: false, description: `TFJS ${tf.version.tfjs} on ${missing || 'WASM'}${why}` };
  const { compile, picture } = onnxCompiler(ort, { threads, tolerance: 1e-3, products: 2 ** -16, verify });
  const description = `ONNX Runtime ${ort.env.versions.node} on the CPU${why}`;
  return { name: 'onnx', gpu: false, description, compile, picture };
}
