/**
 * `compile`, for every engine that runs recordings: a function with the meaning of `fn`, recorded at its first call for
 * each set of feed shapes. That call is checked (engine/check.ts); the next one records again with its new feeds, and what
 * was baked in shows as a difference of the two recordings. Later calls do not run the JavaScript.
 */
import * as tf from '@tensorflow/tfjs';
import { type CheckOptions, checkCall, type Evaluate } from './check.ts';
import { onnxModel } from './onnx.ts';
import { type Recording, record, type Tensors, UnknownKernel, type Value } from './record.ts';

/** What an engine does with a recording. Calls come one at a time. */
export interface Runtime<Loaded> {
  /** @throws UnknownKernel */
  load(recording: Recording): Promise<Loaded>;
  /** Gives the outputs and moves the state on. */
  run(loaded: Loaded, feeds: Tensors): Promise<Tensors>;
  /** see engine/check.ts: in a small model of its own */
  evaluate: Evaluate;
}
export interface CompileOptions extends CheckOptions {
  /** check the first two calls of each function, see above (default true) */
  verify?: boolean;
  log?: (line: string) => void;
}
/** What a function became: kernels called, and nodes without duplicates and dead ones. */
export type FunctionStats = { name: string; calls: number; nodes: number };

export function compiler<Loaded>(runtime: Runtime<Loaded>, options: CompileOptions) {
  const { verify = true, log = () => {} } = options;
  const functions: FunctionStats[] = [];
  const recorders: (() => Recording)[] = []; // of the functions, which say where their nodes are
  let last: Promise<unknown> = Promise.resolve(); // a function that is called while another runs waits

  /** Records, loads and checks one call. @returns its outputs */
  async function first(
    fn: (feeds: Tensors) => Tensors,
    feeds: Tensors,
    known?: { recording: Recording; loaded: Loaded },
  ) {
    const recording = record(feeds, fn, known?.recording);
    const loaded = known?.loaded ?? (await runtime.load(recording));
    const run = () => runtime.run(loaded, feeds);
    if (!verify || known) return { recording, loaded, outputs: await run() };
    const evaluate: Evaluate = (...args) => runtime.evaluate(...args);
    const { wrong, outputs } = await checkCall(recording, feeds, run, evaluate, options);
    if (wrong.length === 0) return { recording, loaded, outputs };
    const more = wrong.length > 5 ? `, and ${wrong.length - 5} more` : '';
    throw new Error(`the graph and the run op by op disagree: ${wrong.slice(0, 5).join(', ')}${more}`);
  }

  function compile<F extends Tensors, O extends Tensors>(name: string, fn: (feeds: F) => O): (feeds: F) => Promise<O> {
    const plain = fn as unknown as (feeds: Tensors) => Tensors;
    const ready = new Map<string, { recording?: Recording | undefined; loaded: Loaded }>(); // by shapes
    let opByOp = false;
    const call = async (feeds: Tensors): Promise<Tensors> => {
      if (opByOp) return tf.tidy(() => plain(feeds));
      const entries = Object.entries(feeds).sort(([a], [b]) => (a < b ? -1 : 1));
      const shapes = entries.map(([key, { dtype, shape }]) => `${key}: ${dtype}[${shape}]`).join(', ');
      const known = ready.get(shapes);
      if (known && !known.recording) return runtime.run(known.loaded, feeds);
      ready.delete(shapes); // until this call has succeeded
      try {
        const { recording, loaded, outputs } = await first(plain, feeds, known as never);
        const { calls, nodes } = recording;
        if (!known) {
          functions.push({ name: `${name}(${shapes})`, calls, nodes: nodes.length });
          const like = entries.map(([key, { shape, dtype }]) => [key, shape, dtype] as const);
          const zeros = () => Object.fromEntries(like.map(([key, shape, dtype]) => [key, tf.zeros(shape, dtype)]));
          recorders.push(() => tf.tidy(() => record(zeros(), plain, undefined, true) as never));
        }
        if (!known) log(`${name}(${shapes}): ${calls} kernels became ${nodes.length} nodes`);
        ready.set(shapes, { loaded, recording: known || !verify ? undefined : recording });
        return outputs;
      } catch (error) {
        const { message } = error as Error;
        if (!(error instanceof UnknownKernel)) throw new Error(`${name}(${shapes}): ${message}`, { cause: error });
        process.stderr.write(`engine   ${name} runs op by op: the kernel ${message} is not known to the recorder\n`);
        opByOp = true;
        return tf.tidy(() => plain(feeds));
      }
    };
    return feeds => {
      const done = last.then(() => call(feeds));
      last = done.catch(() => {});
      return done as Promise<O>;
    };
  }
  /** The largest function so far as an ONNX file, whose nodes' names are those of the functions that make them. */
  function picture(): { name: string; nodes: number; bytes: Uint8Array } {
    const k = functions.reduce((best, { nodes }, i) => (nodes > functions[best]!.nodes ? i : best), 0);
    const { nodes, feeds, variables, outputs, assigned } = recorders[k]!();
    const state = [...variables].map(([{ name }, value]) => [value, `state/${name}`] as const);
    const named = new Map([...state, ...[...feeds].map(([key, value]) => [value, key] as const)]);
    const moved = [...assigned].map(([{ name }, value]): [string, Value] => [`state/${name}/new`, value]);
    const { bytes } = onnxModel(nodes, named.keys(), [...outputs, ...moved], { names: named, inOrder: true });
    return { ...functions[k]!, nodes: nodes.length, bytes };
  }
  return { compile, functions, picture };
}
