export { checkSize } from './estimate.ts';
export { accumulate } from './shards.ts';

import { spawnSync } from 'node:child_process';
import * as os from 'node:os';
import * as tf from '@tensorflow/tfjs';
import { startTensorFlow } from './tensorflow.ts';
import { startWasm } from './wasm.ts';
import { startWebGpu } from './webgpu.ts';

/** Wrong input, known by its name to whoever reports it. */
function refuse(message: string): never {
  throw Object.assign(new Error(message), { name: 'UsageError' });
}

/** Of the GPU, as far as its driver tells, or of the machine. */
function memoryBytes(gpu: boolean): number {
  if (!gpu) return os.totalmem();
  const { stdout } = spawnSync('nvidia-smi', ['--query-gpu=memory.total', '--format=csv,noheader,nounits']);
  return Number.parseInt(`${stdout}`, 10) * 2 ** 20 || Infinity;
}

/**
 * Starts the engine that is asked for; `auto`: TensorFlow if it loads, else WASM, and the description says why.
 * @throws UsageError if it isn't there
 */
export async function startEngine(options: Options) {
  const engine = await start(options);
  return { ...engine, memoryBytes: () => memoryBytes(engine.gpu) };
}

type Options = Parameters<typeof startTensorFlow>[0] & { engine: string };
async function start(options: Options) {
  const { engine: wanted, precision } = options;
  let why = '';
  if (wanted !== 'wasm') {
    try {
      return await (wanted === 'webgpu' ? startWebGpu() : startTensorFlow(options));
    } catch (error) {
      why = `; ${(error as Error).message.split('\n')[0]}`;
      if (wanted !== 'auto') refuse(`--engine ${wanted}${why}`);
    }
  }
  if (/tf32|bf16/.test(precision)) refuse(`--precision ${precision}: only on TensorFlow${why}`);
  const missing = await startWasm().then(
    () => '',
    (error: NodeJS.ErrnoException) => {
      if (error.code !== 'ERR_MODULE_NOT_FOUND') throw error;
      return 'plain JavaScript, slow (no @tensorflow/tfjs-backend-wasm)';
    },
  );
  const description = `TFJS ${tf.version.tfjs} on ${missing || 'WASM'}${why}`;
  return { name: tf.getBackend(), gpu: false, description };
}
