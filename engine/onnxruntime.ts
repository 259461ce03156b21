/**
 * ONNX Runtime (onnxruntime-node: native libraries inside the npm package) as the engine of compiled functions. The state
 * and all else stay tensors of TFJS's WebAssembly backend; a run reads and writes them where they lie in its heap. A
 * variable is overwritten in place if whatever reads it has done so by then; else a run writes a second buffer.
 */
import os from 'node:os';
import * as tf from '@tensorflow/tfjs';
import type { BackendWasm } from '@tensorflow/tfjs-backend-wasm';
import { type Data, toTensor } from './check.ts';
import { type CompileOptions, compiler } from './compile.ts';
import { type Model, NO_TENSOR, nameOf, onnxModel } from './onnx.ts';
// biome-ignore format: kept on few lines
import {
  bytesOf, type Dtype, KINDS, type Node, type Numbers, type Recording, runNode, sizeOf, type Tensors, type Value,
} from './record.ts';

/** The parts of onnxruntime-node that are used: its own types can't be, the package is optional. */
type OrtTensors = Record<string, { dispose?(): void }>;
interface Session {
  run(feeds: OrtTensors, fetches: Record<string, OrtTensors[string] | null>): Promise<OrtTensors>;
  release(): Promise<void>;
}
interface Ort {
  env: { versions: { node?: string; common: string } };
  Tensor: new (type: Dtype, data: ArrayBufferView, dims: number[]) => OrtTensors[string];
  InferenceSession: { create(model: Uint8Array, options: object): Promise<Session> };
}
interface Loaded extends Model {
  session: Session;
  recording: Recording;
  inPlace: Set<tf.Variable>;
}

/**
 * From so many bytes of state on, a function that moves none of it gives its memory back after each call. A step keeps it for
 * the next: giving it back takes a tenth of its time.
 */
const LARGE = 2 ** 24;
/** Elementwise kernels, which may write where one of their inputs lies. */
const POINTWISE = new Set('Add AddN ClipByValue Multiply Maximum Minimum RealDiv Select Sub'.split(' '));
/** Kernels whose result may be the very memory that they are given: ONNX Runtime copies no reshape, and drops x + 0. */
const PASSING = new Set('Cast Concat PadV2 Reshape Slice SplitV Tile Transpose'.split(' '));
const passes = ({ kernel, inputs }: Node): boolean =>
  PASSING.has(kernel) || (POINTWISE.has(kernel) && inputs.some(x => x.constant || x.node?.kernel === 'Fill'));

/** The variables whose new value is made after the last use of the old one, in whatever order the nodes run. */
export function overwritable({ nodes, variables, assigned, outputs }: Recording): Set<tf.Variable> {
  const readers = new Map<Value, Node[]>();
  for (const node of nodes) for (const x of node.inputs) readers.set(x, [...(readers.get(x) ?? []), node]);
  const results = new Set([...outputs.values(), ...assigned.values()]);
  /** The nodes that may look at the value's memory. */
  const lookers = (value: Value, last: Node): Node[] =>
    (readers.get(value) ?? []).flatMap(reader =>
      reader !== last && passes(reader) ? [reader, ...reader.outputs.flatMap(x => lookers(x, last))] : [reader],
    );
  const before = (last: Node): Set<Node> => {
    const found = new Set([last]);
    for (const node of found) for (const { node: earlier } of node.inputs) if (earlier) found.add(earlier);
    return found;
  };
  const safe = [...assigned].filter(([variable, { node, shape }]) => {
    const old = variables.get(variable)!;
    if (!node || results.has(old)) return false;
    const [earlier, pointwise] = [before(node), POINTWISE.has(node.kernel) && `${shape}` === `${old.shape}`];
    return lookers(old, node).every(reader => (reader === node ? pointwise : earlier.has(reader)));
  });
  return new Set(safe.map(([variable]) => variable));
}

/** Loads the package. @throws Error where it isn't installed, or has no binary for this machine */
export async function loadOnnxRuntime(): Promise<Ort> {
  const name: string = 'onnxruntime-node'; // a plain string, so that types are checked without the package
  try {
    const module = (await import(name)) as Ort & { default?: Ort };
    return module.default ?? module;
  } catch (error) {
    const { message, code } = error as NodeJS.ErrnoException;
    const missing = code?.endsWith('MODULE_NOT_FOUND') && message.includes(`'${name}'`);
    const [, , binary] = /(bin.napi-v\d+.)(\w+.\w+)/.exec(code === 'MODULE_NOT_FOUND' ? message : '') ?? [];
    const broken = binary ? `has no binary for ${binary}` : `does not load (${message.split('\n')[0]})`;
    const problem = missing ? 'is not installed' : broken;
    throw new Error(`ONNX Runtime ${problem}`, { cause: error });
  }
}

/** `compile` on ONNX Runtime. TFJS's backend must be WASM, with a kernel Uniform. */
export function onnxCompiler(ort: Ort, { threads, ...options }: CompileOptions & { threads: number }) {
  const backend = tf.backend() as BackendWasm;
  const heap = backend.wasm as unknown as {
    HEAPU8: Uint8Array;
    tfjs: { registerTensor(id: number, size: number, at: number): void; disposeData(id: number): void };
  };
  const sessionOptions = {
    executionProviders: ['cpu'],
    intraOpNumThreads: threads || os.availableParallelism(),
    graphOptimizationLevel: 'all',
    enableMemPattern: false, // it takes a block for a whole run beside what the first run took, and gains nothing
    logSeverityLevel: 3,
    // A softmax behind a mask is full of denormal numbers, which take processors a hundred times as long.
    // A thread that waits spins for so many µs before it sleeps: being woken takes as long as a small node. Without an
    // end (the default) spinning doubles a step's time on a busy machine.
    extra: { session: { set_denormal_as_zero: '1', intra_op: { allow_spinning: '1', spin_duration_us: '50' } } },
  };
  const spares = new Map<tf.Variable, tf.Tensor>(); // the second buffers
  const sessions: Session[] = [];

  const empty = (shape: number[], dtype: tf.DataType): tf.Tensor =>
    tf.engine().makeTensorFromTensorInfo(backend.makeOutput(shape, dtype));
  const spareOf = (variable: tf.Variable): tf.Tensor => {
    const spare = spares.get(variable) ?? tf.keep(empty(variable.shape, variable.dtype));
    spares.set(variable, spare);
    return spare;
  };
  /** The tensor's own memory. Valid until something is allocated: the heap may then grow, which detaches all views. */
  const view = (x: Data, { dtype, shape }: Pick<Value, 'dtype' | 'shape'>) => {
    if (!(x instanceof tf.Tensor)) return new ort.Tensor(dtype, x, shape);
    const data = new KINDS[dtype](heap.HEAPU8.buffer as ArrayBuffer, backend.getMemoryOffset(x.dataId), x.size);
    return new ort.Tensor(dtype, data, shape);
  };
  /**
   * The numbers in this memory are about to be others. TFJS's never are: it keeps XNNPACK's packed copy of a right factor
   * for as long as the number by which it knows the memory, which is therefore given up and taken again.
   */
  const forget = ({ dataId, size }: tf.Tensor): void => {
    const { dataIdMap } = backend as unknown as { dataIdMap: { get(dataId: object): { id: number } } };
    const { id } = dataIdMap.get(dataId);
    heap.tfjs.disposeData(id);
    heap.tfjs.registerTensor(id, size, backend.getMemoryOffset(dataId));
  };
  /** A value computed here: the keys of random numbers. */
  const onHost = (value: Value, given: ReadonlyMap<Value, Data>): tf.Tensor => {
    const { constant, node } = value;
    const known = constant ?? given.get(value);
    return (
      (known && toTensor(known, value)) ??
      runNode(
        node!,
        node!.inputs.map(x => onHost(x, given)),
      )[node!.outputs.indexOf(value)]!
    );
  };
  async function runModel(
    session: Session,
    { inputs, drawn }: Model,
    given: ReadonlyMap<Value, Data>,
    fetches: (readonly [string, Value, Data])[],
  ): Promise<void> {
    const random = tf.tidy(() => drawn.map(({ outputs: [value] }) => onHost(value!, given)));
    const made = new Map(drawn.map(({ outputs: [value] }, i) => [value!, random[i]!]));
    const views = (places: (readonly [string, Value, Data])[]) =>
      Object.fromEntries(places.map(([key, value, x]) => [key, view(x, value)]));
    const ins = inputs.map(value => [nameOf(value), value, made.get(value) ?? given.get(value)!] as const);
    // Every result has its place, and the binding would still copy each into a new array: time, and as much memory as the
    // state. One that it can't return stands before them; its error comes when all are computed.
    await session.run(views(ins), { [NO_TENSOR]: null, ...views(fetches) }).catch((error: Error) => {
      if (!error.message.startsWith('Non tensor type')) throw error;
    });
    tf.dispose(random);
  }

  /** Numbers in pages of their own, which go back to the system when they are freed: malloc keeps what lies between others. */
  const inPages = ({ shape, dtype }: Value): Numbers => {
    const [n, Kind] = [sizeOf(shape), KINDS[dtype]];
    const maxByteLength = n * Kind.BYTES_PER_ELEMENT; // a buffer that may be resized is not malloc's
    return n < 2 ** 14 ? new Kind(n) : new Kind(new ArrayBuffer(maxByteLength, { maxByteLength }), 0, n);
  };
  const load = async (recording: Recording): Promise<Loaded> => {
    const given = [...recording.feeds.values(), ...recording.variables.values()];
    const results: [string, Value][] = [...recording.outputs].map(([key, value]) => [`out/${key}`, value]);
    for (const [k, value] of [...recording.assigned.values()].entries()) results.push([`new/${k}`, value]);
    const model = onnxModel(recording.nodes, given, results);
    const state = [...recording.variables.values()].reduce((sum, x) => sum + bytesOf(x), 0);
    const enableCpuMemArena = recording.assigned.size > 0 || state < LARGE;
    const session = await ort.InferenceSession.create(model.bytes, { ...sessionOptions, enableCpuMemArena });
    sessions.push(session);
    return { ...model, recording, session, inPlace: overwritable(recording) };
  };
  const run = async ({ session, recording, inPlace, ...model }: Loaded, feeds: Tensors): Promise<Tensors> => {
    const { outputs, assigned, variables } = recording;
    const given = new Map<Value, tf.Tensor>();
    for (const [key, value] of recording.feeds) given.set(value, feeds[key]!);
    for (const [variable, value] of variables) given.set(value, variable);
    const made: Tensors = Object.fromEntries([...outputs].map(([key, { shape, dtype }]) => [key, empty(shape, dtype)]));
    const fetches = [...outputs].map(([key, value]): [string, Value, Data] => [`out/${key}`, value, made[key]!]);
    // who holds a clone of the old value keeps it
    const held = (x: tf.Tensor) => backend.refCount(x.dataId) > 1;
    const targets = [...assigned.keys()].map(x => (inPlace.has(x) && !held(x) ? x : spareOf(x)));
    for (const [k, value] of [...assigned.values()].entries()) {
      forget(targets[k]!);
      fetches.push([`new/${k}`, value, targets[k]!]);
    }
    await runModel(session, model, given, fetches);
    for (const [k, variable] of [...assigned.keys()].entries()) {
      if (targets[k] === variable) continue;
      const old = tf.keep(variable.clone());
      variable.assign(targets[k]!);
      targets[k]!.dispose();
      if (held(old) || inPlace.has(variable)) {
        old.dispose();
        spares.delete(variable);
      } else spares.set(variable, old);
    }
    return made;
  };
  const compiled = compiler<Loaded>(
    {
      load,
      run,
      evaluate: async (nodes, given, wanted) => {
        // a value that is given or drawn comes through unchanged
        const outputs = wanted.map((value): [string, Value] => [
          value.node?.kernel === 'Uniform' ? `out/${value.id}` : nameOf(value),
          value,
        ]);
        const model = onnxModel(nodes, given.keys(), outputs);
        // each node by itself, and no memory that stays
        const plain = { ...sessionOptions, graphOptimizationLevel: 'disabled', enableCpuMemArena: false };
        const session = await ort.InferenceSession.create(model.bytes, plain);
        const made = wanted.map(inPages);
        await runModel(
          session,
          model,
          given,
          outputs.map(([name, value], i) => [name, value, made[i]!]),
        );
        await session.release();
        return made;
      },
    },
    options,
  );
  /** Frees the sessions: the compiled functions no longer work. The variables keep their values. */
  const dispose = async (): Promise<void> => {
    await Promise.all(sessions.splice(0).map(session => session.release()));
    tf.dispose([...spares.values()]);
    spares.clear();
  };
  return { ...compiled, dispose };
}
