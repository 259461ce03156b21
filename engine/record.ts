/**
 * One recorder for every engine: a TFJS backend that computes nothing. Each of its kernels only writes down a node and
 * gives back a tensor without data, whose shape a rule below tells. So a plain TFJS function becomes a list of TFJS's
 * own kernels, which engine/onnx.ts writes as an ONNX model and engine/saved-model.ts as a TensorFlow graph.
 *
 * What the function sees from outside becomes a feed, a tf.Variable (the state), or a constant. Rules for the
 * function: what changes between calls is a feed, never a JavaScript number; no branch of JavaScript depends on a
 * tensor's value; variables are made outside.
 *
 * Not handled: control flow by value, complex and string tensors, shapes that depend on values.
 */
import * as tf from '@tensorflow/tfjs';

export type Tensors = Record<string, tf.Tensor>;
export type Numbers = Float32Array | Int32Array | Uint8Array;
export type Dtype = 'float32' | 'int32' | 'bool';
type Shaped = { shape: number[]; dtype: Dtype };
/** A tensor of the recording: a constant, a node's result, or (neither) a feed or a variable. */
export interface Value extends Shaped {
  id: number;
  constant?: Numbers;
  node?: Node;
}
/** A kernel as TFJS calls it; `inputs` by the names in `keys`. */
export interface Node {
  kernel: string;
  keys: string[];
  inputs: Value[];
  attrs: Record<string, unknown>;
  outputs: Value[];
  where?: string; // the functions that called it, `losses/importanceLoss`, if the recording was asked for them
}
/** A recorded function: its live nodes, and `entries`, everything in the order it was written down. */
export interface Recording {
  calls: number;
  nodes: Node[];
  entries: Entry[];
  feeds: Map<string, Value>;
  variables: Map<tf.Variable, Value>; // those that it uses or assigns, with the value they have at the start
  outputs: Map<string, Value>;
  assigned: Map<tf.Variable, Value>;
}
/** A node or a constant; what has the same key has the same value, and is written down once. */
type Entry = { key: string; kernel: string; constant?: Numbers | undefined; outputs: Value[] };

const MAX_CONST_BYTES = 2 ** 20;
export const KINDS = { float32: Float32Array, int32: Int32Array, bool: Uint8Array };
export const sizeOf = (shape: number[]): number => tf.util.sizeFromShape(shape);
export const bytesOf = ({ shape, dtype }: Shaped): number => sizeOf(shape) * KINDS[dtype].BYTES_PER_ELEMENT;
/** A kernel for which the recorder, or an engine, has no rule: the function then runs op by op. */
export class UnknownKernel extends Error {}

// ---- Shapes: what each kernel gives -----------------------------------------------------------------------

// biome-ignore lint/suspicious/noExplicitAny: attributes are what TFJS says they are
type Rule = (inputs: Shaped[], attrs: any) => Shaped | Shaped[];
const like: Rule = ([x]) => x!;
const broadcast = (xs: Shaped[]) => xs.map(x => x.shape).reduce(tf.broadcast_util.assertAndGetBroadcastShape);
const binary: Rule = xs => ({ shape: broadcast(xs), dtype: xs[0]!.dtype });
const comparison: Rule = xs => ({ shape: broadcast(xs), dtype: 'bool' });
const predicate: Rule = ([x]) => ({ shape: x!.shape, dtype: 'bool' });
const reduction: Rule = ([x], { axis, reductionIndices, keepDims }) => {
  const axes = axesOf(axis ?? reductionIndices, x!.shape); // Max calls it so
  const [out] = tf.backend_util.computeOutAndReduceShapes(x!.shape, axes);
  return { shape: keepDims ? tf.backend_util.expandShapeToKeepDim(out, axes) : out, dtype: x!.dtype };
};
/** All axes of a reduction, and one axis, counted from 0. */
export const axesOf = (axis: number | number[] | null | undefined, shape: number[]): number[] =>
  tf.util.parseAxisParam(axis ?? shape.map((_, i) => i), shape);
export const axisOf = (axis: number | undefined, shape: number[]): number => axesOf(axis ?? 0, shape)[0]!;
const kernels = (names: string, rule: Rule) => Object.fromEntries(names.split(' ').map(name => [name, rule]));
const RULES: Record<string, Rule> = {
  ...kernels('Abs Ceil ClipByValue Cos Cumsum Elu Erf Exp Floor LeakyRelu Log Neg Reciprocal Relu Round Rsqrt', like),
  ...kernels('Sigmoid Sign Sin Softmax Softplus Sqrt Square Step Tanh TensorScatterUpdate ZerosLike', like),
  ...kernels('Add AddN Sub Multiply RealDiv Maximum Minimum Pow SquaredDifference', binary),
  ...kernels('Equal NotEqual Greater GreaterEqual Less LessEqual LogicalAnd LogicalOr', comparison),
  ...kernels('IsNan IsFinite IsInf LogicalNot', predicate),
  ...kernels('Sum Mean Max Min', reduction),
  BatchMatMul: ([a, b], { transposeA, transposeB }) => {
    const [rows, cols] = [a!.shape.at(transposeA ? -1 : -2)!, b!.shape.at(transposeB ? -2 : -1)!];
    return {
      shape: [...broadcast([a!, b!].map(x => ({ ...x, shape: x.shape.slice(0, -2) }))), rows, cols],
      dtype: a!.dtype,
    };
  },
  Cast: ([x], { dtype }) => ({ shape: x!.shape, dtype }),
  Concat: (xs, { axis }) => {
    const shapes = xs.map(x => x.shape);
    return { shape: tf.backend_util.computeOutShape(shapes, axisOf(axis, shapes[0]!)), dtype: xs[0]!.dtype };
  },
  Fill: (_, { shape, value, dtype }) => ({ shape, dtype: dtype ?? tf.util.inferDtype(value) }),
  GatherV2: ([x, i], { axis, batchDims }) => {
    if (batchDims) throw new UnknownKernel('GatherV2 with batchDims');
    return { shape: x!.shape.toSpliced(axisOf(axis, x!.shape), 1, ...i!.shape), dtype: x!.dtype };
  },
  OneHot: ([i], { depth, dtype }) => ({ shape: [...i!.shape, depth], dtype: dtype ?? 'int32' }),
  Pack: (xs, { axis }) => ({ shape: xs[0]!.shape.toSpliced(axis, 0, xs.length), dtype: xs[0]!.dtype }),
  PadV2: ([x], { paddings }) => {
    const padded = (n: number, i: number) => n + paddings[i][0] + paddings[i][1];
    return { shape: x!.shape.map(padded), dtype: x!.dtype };
  },
  Reshape: ([x], { shape }) => ({ shape: tf.util.inferFromImplicitShape(shape, sizeOf(x!.shape)), dtype: x!.dtype }),
  Select: ([, t]) => t!,
  Slice: ([x], { begin, size }) => {
    const [, shape = []] = tf.slice_util.parseSliceParams(x as tf.Tensor, begin, size);
    return { shape, dtype: x!.dtype };
  },
  SplitV: ([x], { numOrSizeSplits, axis }) => {
    const at = axisOf(axis, x!.shape);
    const sizes = tf.backend_util.prepareSplitSize(x as tf.Tensor, numOrSizeSplits, at);
    return sizes.map(size => ({ shape: x!.shape.with(at, size), dtype: x!.dtype }));
  },
  Tile: ([x], { reps }) => ({ shape: x!.shape.map((n, i) => n * reps[i]), dtype: x!.dtype }),
  TopK: ([x], { k }) => [x!.dtype, 'int32' as const].map(dtype => ({ shape: x!.shape.with(-1, k), dtype })),
  Transpose: ([x], { perm }) => ({ shape: perm.map((p: number) => x!.shape[p]), dtype: x!.dtype }),
  Uniform: (_, { shape }) => ({ shape, dtype: 'float32' }), // ours: see engine/index.ts
  Unpack: ([x], { axis }) => {
    const at = axisOf(axis, x!.shape);
    return Array.from({ length: x!.shape[at]! }, () => ({ shape: x!.shape.toSpliced(at, 1), dtype: x!.dtype }));
  },
  UnsortedSegmentSum: ([x, ids], { numSegments }) => ({
    shape: [numSegments, ...x!.shape.slice(ids!.shape.length)],
    dtype: x!.dtype,
  }),
};
/** Kernels that do nothing when they leave shape and type as they are. */
const SHAPERS = ['Cast', 'PadV2', 'Reshape', 'Slice', 'Tile'];

// ---- The backend ------------------------------------------------------------------------------------------

/** What is being recorded; `like`: the recording that this one must repeat. */
interface Tape {
  calls: number;
  entries: Entry[];
  byKey: Map<string, Entry>;
  values: WeakMap<object, Value>; // by TFJS's dataId
  uploads: WeakMap<object, Shaped & { numbers: ArrayLike<number> }>; // made while recording, not used yet
  next: number;
  like: Entry[] | undefined;
  named: boolean;
}
let tape: Tape;
/** What TFJS knows of a tensor's data. */
const infoOf = (dataId: object): { backend: tf.KernelBackend } =>
  (tf.engine() as unknown as { state: { tensorInfo: WeakMap<object, never> } }).state.tensorInfo.get(dataId)!;

class Recorder extends tf.KernelBackend {
  private readonly counts = new WeakMap<object, number>(); // of tensors that share the data, 1 if not told
  private count(dataId: object, more: number): number {
    const n = (this.counts.get(dataId) ?? 1) + more;
    this.counts.set(dataId, n);
    return n;
  }
  override write(numbers: tf.BackendValues, shape: number[], dtype: tf.DataType): object {
    const dataId = {};
    tape.uploads.set(dataId, { numbers: numbers as Numbers, shape, dtype: dtype as Dtype });
    return dataId;
  }
  override move(): void {
    throw new Error('a tensor of another backend moved into the recording');
  }
  override readSync(dataId: object): Numbers {
    const upload = tape.uploads.get(dataId);
    const numbers = upload ? KINDS[upload.dtype].from(upload.numbers) : tape.values.get(dataId)?.constant;
    if (numbers) return numbers;
    throw new Error('a tensor was read, but no JavaScript may depend on its value: use tf.where, or return it');
  }
  override read = async (dataId: object) => this.readSync(dataId);
  override numDataIds = () => 0;
  override disposeData = (dataId: object) => this.count(dataId, -1) <= 0;
  /** TFJS asks the present backend, even when it assigns one of the home backend's tensors to a variable. */
  override incRef(dataId: object): void {
    const { backend } = infoOf(dataId);
    if (backend !== this) backend.incRef(dataId);
    else this.count(dataId, 1);
  }
  decRef(): void {}
  override refCount = (dataId: object) => this.count(dataId, 0);
  override memory = () => ({ unreliable: true }) as never;
  override floatPrecision = () => 32 as const;
  override epsilon = () => 1e-7;
  override dispose(): void {}
}

const newValue = ({ shape, dtype }: Shaped): Value => ({ id: tape.next++, shape: [...shape], dtype });
/** A tensor of TFJS for it. */
const info = (value: Value): tf.TensorInfo => {
  const dataId = {};
  tape.values.set(dataId, value);
  return { dataId, shape: value.shape, dtype: value.dtype };
};

/** The entry, or the same one that is there already: so computing something twice costs nothing. */
function enter(key: string, kernel: string, make: () => Value[], user = kernel, constant?: Numbers): Entry {
  const twin = tape.byKey.get(key);
  if (twin) return twin;
  const entry: Entry = { key, kernel, constant, outputs: make() };
  const first = tape.like?.[tape.entries.length];
  if (tape.like && first?.key !== key) throw new Error(difference(first, entry, user));
  tape.byKey.set(key, entry);
  tape.entries.push(entry);
  return entry;
}

/** The value of a tensor; what is neither recorded nor a variable becomes a constant. `user`: the kernel that takes it. */
function seen({ dataId, shape, dtype }: tf.TensorInfo, user: string): Value {
  const known = tape.values.get(dataId);
  if (known) return known;
  const kind = KINDS[dtype as Dtype];
  if (!kind) throw new Error(`a graph cannot hold a tensor of type ${dtype}`);
  const raw = tape.uploads.get(dataId)?.numbers ?? (infoOf(dataId).backend.readSync(dataId) as ArrayLike<number>);
  const one = (raw as Float32Array)[0]!;
  const repeated = Number.isFinite(one) && !Object.is(one, -0) && (raw as Float32Array).every(x => x === one);
  if (sizeOf(shape) > 1 && repeated) {
    const [filled] = addNode('Fill', [], [], { shape, value: Number(one), dtype });
    tape.values.set(dataId, filled!);
    return filled!;
  }
  if (sizeOf(shape) * kind.BYTES_PER_ELEMENT > MAX_CONST_BYTES)
    throw new Error(`${user} uses a tensor of shape [${shape}] that would be a constant: make it a tf.variable`);
  const constant: Numbers = kind.from(raw as Float32Array); // a copy
  const bits = Buffer.from(constant.buffer).toString('base64');
  const make = () => [{ ...newValue({ shape, dtype: dtype as Dtype }), constant }];
  const [value] = enter(`${dtype}[${shape}]${bits}`, 'Const', make, user, constant).outputs;
  tape.values.set(dataId, value!);
  return value!;
}

const isOnes = ({ node }: Value) => node?.kernel === 'Fill' && node.attrs.value === 1;
/** What a tensor repeats along its axes: TFJS writes it out, though elementwise kernels repeat by themselves. */
function unrepeated(x: Value): Value {
  const { kernel, inputs: [a, b] = [], attrs } = x.node ?? {};
  if (kernel === 'Multiply' && isOnes(b!)) return a!;
  const reps = (kernel === 'Tile' ? attrs!.reps : []) as number[];
  return reps.length > 0 && reps.every((n, axis) => n === 1 || a!.shape[axis] === 1) ? a! : x;
}

function addNode(kernel: string, keys: string[], given: Value[], attrs: object): Value[] {
  let inputs = given;
  if (RULES[kernel] === binary && kernel !== 'AddN') {
    const shape = `${broadcast(given)}`;
    for (const [i, x] of given.entries()) {
      const fewer = inputs.with(i, unrepeated(x));
      if (`${broadcast(fewer)}` === shape) inputs = fewer;
    }
    const [a, b] = inputs as [Value, Value];
    if (kernel === 'Multiply' && isOnes(b) && `${a.shape}` === shape) return [a];
    // gradients of differences: a + (−b) is a − b, to the bit
    if (kernel === 'Add' && b.node?.kernel === 'Neg') return addNode('Sub', keys, [a, b.node.inputs[0]!], attrs);
    if (kernel === 'Add' && a.node?.kernel === 'Neg') return addNode('Sub', keys, [b, a.node.inputs[0]!], attrs);
  }
  const found = RULES[kernel]!(inputs, attrs);
  const shapes = Array.isArray(found) ? found : [found];
  const [x, y] = [inputs[0], shapes[0]!];
  if (SHAPERS.includes(kernel) && x!.dtype === y.dtype && `${x!.shape}` === `${y.shape}`) return [x!];
  const make = () => {
    const node: Node = { kernel, keys, inputs, attrs: { ...attrs }, outputs: [] };
    if (tape.named) node.where = callers(inputs);
    node.outputs = shapes.map(shape => ({ ...newValue(shape), node }));
    return node.outputs;
  };
  return enter(JSON.stringify([kernel, inputs.map(({ id }) => id), attrs]), kernel, make).outputs;
}

/**
 * The functions of the recorded one that are running, outermost first, without TFJS's and the engine's own. A gradient runs in none of
 * them: it is where the latest of its inputs that is no gradient was made, under `gradient`.
 */
function callers(inputs: Value[]): string {
  const { prepareStackTrace, stackTraceLimit } = Error;
  Error.stackTraceLimit = 200;
  Error.prepareStackTrace = (_, sites) => sites;
  const sites = new Error().stack as unknown as NodeJS.CallSite[];
  Object.assign(Error, { prepareStackTrace, stackTraceLimit });
  const inside = sites.slice(
    0,
    sites.findIndex(site => site.getFunctionName() === 'record'),
  );
  const ours = inside.filter(site => !/node_modules|^node:|engine.record\.ts/.test(site.getFileName() ?? 'node:'));
  const names = ours.flatMap(site => site.getFunctionName()?.split('.').at(-1) ?? []).reverse();
  const path = names.filter((name, i) => name !== names[i - 1]).join('/');
  if (!inside.some(site => site.getFunctionName()?.includes('backprop'))) return path;
  const places = inputs.toSorted((a, b) => b.id - a.id).flatMap(({ node }) => node?.where ?? []);
  const forward = places.find(where => !where.endsWith('gradient')) ?? places[0] ?? path;
  return forward.endsWith('gradient') ? forward : `${forward}/gradient`;
}

const recorder = () => tf.findBackend('recorder') as Recorder;

function install(): void {
  if (tf.findBackendFactory('recorder')) return;
  tf.registerBackend('recorder', () => new Recorder(), 0);
  const register = (kernelName: string, kernelFunc: tf.KernelFunc) =>
    tf.registerKernel({ kernelName, backendName: 'recorder', kernelFunc });
  register('Identity', ({ inputs }) => info(seen(inputs.x as tf.TensorInfo, 'Identity')));
  register('Range', ({ attrs }) => {
    const { start, stop, step, dtype } = attrs as unknown as Record<'start' | 'stop' | 'step', number> & {
      dtype: Dtype;
    };
    const n = Math.max(0, Math.ceil((stop - start) / step));
    const numbers = Float64Array.from({ length: n }, (_, i) => start + i * step);
    return { dataId: tf.backend().write(numbers as never, [n], dtype), shape: [n], dtype };
  });
  for (const [kernel, rule] of Object.entries(RULES))
    register(kernel, ({ inputs, attrs }) => {
      tape.calls++;
      const named = Object.entries(inputs).filter(([, x]) => x);
      const values = named.map(([, x]) => seen(x as tf.TensorInfo, kernel));
      const outputs = addNode(
        kernel,
        named.map(([key]) => key),
        values,
        attrs ?? {},
      ).map(info);
      return Array.isArray(rule(values, attrs)) ? outputs : outputs[0]!;
    });
}

/** What a second recording has otherwise than the first, and what to do about it. */
function difference(first: Entry | undefined, now: Entry, user: string): string {
  const [before, after] = [first?.constant, now.constant];
  if (before && after && before.length === after.length) {
    const at = after.findIndex((number, i) => !Object.is(number, before[i]));
    return (
      `a constant that ${user} uses was ${before[at]} in the first call and is ${after[at]} now: a ` +
      'JavaScript number, or a tensor made from some, became part of the graph. Pass it as a feed'
    );
  }
  const was = first?.kernel === now.kernel ? 'another one' : (first?.kernel ?? 'nothing');
  return (
    `a ${now.kernel}${user === now.kernel ? '' : ` for ${user}`} was recorded where the first call had ${was}: the ` +
    'operations depend on something that changes between calls. Pass it as a feed and choose with tf.where'
  );
}

/**
 * Records `fn` on feeds of these shapes, without computing anything. The variables are put back.
 * @param first a recording that this one must repeat
 * @param named whether nodes say where they are
 * @throws UnknownKernel, or an Error that says what a graph can't hold, or what differs from the first recording
 */
export function record(feeds: Tensors, fn: (feeds: Tensors) => Tensors, first?: Recording, named = false): Recording {
  install();
  const engine = tf.engine();
  const home = tf.getBackend();
  const state = Object.values(engine.registeredVariables);
  const before = new Map(state.map(variable => [variable, tf.keep(variable.clone())]));
  const started = new Map<tf.Variable, Value>();
  const fed = new Map<string, Value>();
  const [outputs, assigned] = [new Map<string, Value>(), new Map<tf.Variable, Value>()];
  const values = new WeakMap<object, Value>();
  const empty = { calls: 0, entries: [], byKey: new Map(), uploads: new WeakMap(), next: 0 };
  tape = { ...empty, values, like: first?.entries, named };
  const backend = tf.backend();
  const { readSync } = backend;
  backend.readSync = dataId => (values.has(dataId) ? recorder().readSync(dataId) : readSync.call(backend, dataId));
  engine.startScope();
  tf.setBackend('recorder');
  try {
    for (const variable of state) {
      const value = newValue(variable as unknown as Shaped);
      started.set(variable, value);
      values.set(variable.dataId, value); // and so for its clones, which share the id
    }
    const inside: Tensors = {};
    for (const [key, tensor] of Object.entries(feeds)) {
      const value = newValue(tensor as unknown as Shaped);
      fed.set(key, value);
      inside[key] = engine.makeTensorFromTensorInfo(info(value));
    }
    const returned = fn(inside);
    for (const [key, tensor] of Object.entries(returned)) outputs.set(key, seen(tensor, 'an output'));
    for (const [variable, old] of before)
      if (variable.dataId !== old.dataId) assigned.set(variable, seen(variable, `the assignment of ${variable.name}`));
    if (Object.values(engine.registeredVariables).some(variable => !before.has(variable)))
      throw new Error('a tf.variable was made and left: make it outside, or dispose of it inside');
  } catch (error) {
    const [, kernel] = /Kernel '(\w+)' not registered for backend 'recorder'/.exec((error as Error).message) ?? [];
    throw kernel ? new UnknownKernel(kernel) : error;
  } finally {
    tf.setBackend(home);
    backend.readSync = readSync;
    for (const variable of Object.values(engine.registeredVariables)) if (!before.has(variable)) variable.dispose();
    for (const [variable, old] of before) {
      if (variable.dataId !== old.dataId) variable.assign(old);
      old.dispose();
    }
    engine.endScope();
  }
  if (first && tape.entries.length < first.entries.length)
    throw new Error(difference(first.entries[tape.entries.length], { ...tape.entries.at(-1)! }, 'the end'));
  const live = new Set([...outputs.values(), ...assigned.values()]);
  const all = [...new Set(tape.entries.flatMap(entry => entry.outputs[0]?.node ?? []))];
  for (const node of all.toReversed())
    if (node.outputs.some(o => live.has(o))) for (const x of node.inputs) live.add(x);
  const nodes = all.filter(node => node.outputs.some(o => live.has(o)));
  const variables = new Map([...started].filter(([variable, value]) => live.has(value) || assigned.has(variable)));
  return { calls: tape.calls, nodes, entries: tape.entries, feeds: fed, variables, outputs, assigned };
}

/** Runs one node on the present backend, as TFJS itself would. */
export function runNode({ kernel, keys, attrs }: Node, inputs: tf.Tensor[]): tf.Tensor[] {
  const array = keys.every(key => /^\d+$/.test(key)) && keys.length > 0;
  const named = array ? inputs : Object.fromEntries(keys.map((key, i) => [key, inputs[i]!]));
  return [tf.engine().runKernel(kernel, named as tf.NamedTensorMap, attrs as tf.NamedAttrMap) as tf.Tensor].flat();
}
