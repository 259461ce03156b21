import * as tf from '@tensorflow/tfjs';
import { startTensorFlow } from './tensorflow.ts';
import { refuse } from './usage-error.ts';
import { startWasm } from './wasm.ts';
import { startWebGpu } from './webgpu.ts';

/**
 * Starts the engine that is asked for; `auto`: TensorFlow if it loads, else WASM, and the description says why.
 * @throws UsageError if it isn't there
 */
export async function startEngine(options: Parameters<typeof startTensorFlow>[0] & { engine: string }) {
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
