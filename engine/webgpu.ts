import * as tf from '@tensorflow/tfjs';

/** Makes WebGPU TFJS's backend. Node has no GPU object of its own: the npm package `webgpu` (Dawn) brings one. */
export async function startWebGpu() {
  try {
    const dawn = (await import('webgpu' as string)) as { create(options: string[]): unknown; globals: object };
    Object.assign(globalThis, dawn.globals);
    Object.defineProperty(globalThis, 'navigator', { value: { gpu: dawn.create([]) }, configurable: true });
    await import('@tensorflow/tfjs-backend-webgpu' as string);
    if (!(await tf.setBackend('webgpu'))) throw new Error('no adapter');
  } catch (error) {
    const reason = (error as Error).message.split('\n')[0];
    throw new Error(`${reason} (npm install --no-save webgpu @tensorflow/tfjs-backend-webgpu)`, { cause: error });
  }
  return { name: 'webgpu', gpu: true, description: `TFJS ${tf.version.tfjs} on WebGPU` };
}
