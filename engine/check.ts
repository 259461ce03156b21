/**
 * Checks a compiled function against TFJS's own kernels, so that no engine's mistake goes into a run unseen.
 *
 * Node by node: the compiled form computes every node of the recording, TFJS computes the same node from the very same
 * inputs (those that the compiled form had), and the two may differ by the rounding of that one node. So neither rounding
 * nor a flipped indicator spreads, and what is a step function (g > 0.1, sign, floor, top-k) must agree but for inputs
 * that lie on the step. Then the function as a whole, as it will run: its results are held to `tolerance`, and what a
 * step function or a division by nearly nothing may have moved a lot (results behind a step, state) only to its size.
 */
import * as tf from '@tensorflow/tfjs';
// biome-ignore format: kept on few lines
import {
  axesOf, bytesOf, type Dtype, type Node, type Numbers, type Recording, runNode, sizeOf, type Tensors, type Value,
} from './record.ts';

/** A value: on the backend, or outside of it (WASM's heap never shrinks). */
export type Data = tf.Tensor | Numbers;
/** The compiled form of some nodes: what they give for `given`, the values made before them. The caller disposes. */
export type Evaluate = (nodes: Node[], given: Map<Value, Data>, wanted: Value[]) => Promise<Data[]>;
export const toTensor = (x: Data, { shape, dtype }: Value): tf.Tensor =>
  x instanceof tf.Tensor ? x : tf.tensor(x, shape, dtype);
const sizeOfData = (x: Data) => (x instanceof tf.Tensor ? x.size : x.length);
export interface CheckOptions {
  /** allowed relative error of an output as a whole, in the Euclidean norm */
  tolerance: number;
  /** rounding of a matrix product, relative to the product of the factors' sizes: 2⁻¹⁶ of float32 sums, more below it */
  products: number;
}

const UNIT = 2 ** -16; // of one kernel: some roundings, and approximations such as that of erf
const TINY = 1e-35; // below it engines may flush to zero
/** A recording is computed in such parts, each by a model of its own: what a part makes is in memory at once. */
const [PARTS, PART_BYTES] = [512, 2 ** 24];
const SAMPLE = 2 ** 13; // elements of a node's large result that are compared, one after another
const LARGE = 2 ** 20; // elements of a vector that is not copied to the backend
const RUNS = 16; // of results of the whole function: so many runs of elements, evenly spread

const words = (names: string) => new Set(names.split(' '));
/** Step functions, with the distance of their inputs to the step, relative to their size. */
const STEPS = words('Equal NotEqual Greater GreaterEqual Less LessEqual Step Sign Floor Ceil Round Cast TopK OneHot');
/** Sums of many terms: as exact as the sum of the terms' sizes allows. */
const SUMS = words('AddN BatchMatMul Cumsum Mean Sum UnsortedSegmentSum');
/** Element by element, shorter inputs repeated. */
const POINTWISE = words(
  'Abs Add AddN Cast ClipByValue Exp Log Maximum Minimum Multiply Neg RealDiv Reciprocal Relu Select Sqrt Square Sub ZerosLike',
);
/** Functions that are computed to so many parts of 1, not of their value. */
const OF_ONE = words('Cos Erf Log Sigmoid Sin Softplus Tanh Elu');

/** Whether the node's results hang on a step function, by itself or through its inputs. */
function stepped({ nodes }: Recording): Set<Value> {
  const found = new Set<Value>();
  for (const { kernel, inputs, outputs, attrs } of nodes) {
    const steps = STEPS.has(kernel) && !(kernel === 'Cast' && attrs.dtype === 'float32');
    if (steps || inputs.some(x => found.has(x))) for (const output of outputs) found.add(output);
  }
  return found;
}

/**
 * Kernels whose row i (of the first axis) hangs on row i alone (or column i) of the inputs that have as many: which of them
 * do. Of such a result no more is computed here than is compared.
 */
function byRows({ kernel, inputs, outputs: [out], attrs }: Node): (boolean | 'columns')[] | undefined {
  const [n, ...row] = out!.shape;
  const asMany = inputs.map(({ shape }) => shape.length > row.length && shape[0] === n);
  if (POINTWISE.has(kernel)) return asMany;
  if (kernel === 'BatchMatMul') return row.length > 1 ? asMany : [attrs.transposeA ? 'columns' : true, false];
  const along = kernel === 'Sum' && axesOf(attrs.axis as number[], inputs[0]!.shape);
  return along && !along.includes(0) ? asMany : undefined;
}
type Typed = Pick<Value, 'shape' | 'dtype'>;
const rowsOf = (x: Data, { shape: [n = 1, ...row], dtype }: Typed, from: number, count: number): tf.Tensor =>
  x instanceof tf.Tensor
    ? tf.slice(x, [from], [count])
    : tf.tensor(x.subarray((from * x.length) / n, ((from + count) * x.length) / n), [count, ...row], dtype);
function columnsOf(x: Data, { shape: [rows = 1, n = 1] }: Typed, from: number, count: number): tf.Tensor {
  if (x instanceof tf.Tensor) return tf.slice(x, [0, from], [rows, count]);
  const at = (i: number) => x[Math.floor(i / count) * n + from + (i % count)]!;
  return tf.tensor2d(
    Float32Array.from({ length: rows * count }, (_, i) => at(i)),
    [rows, count],
  );
}
/** SAMPLE elements, from a place on. */
const stretch = (x: Data, from: number, dtype: Dtype): tf.Tensor =>
  rowsOf(x instanceof tf.Tensor ? x.flatten() : x, { shape: [sizeOfData(x)], dtype }, from, SAMPLE);
/** One of n places, which hangs on `salt`. */
const placeOf = (salt: number, n: number) => (Math.imul(salt, 0x9e3779b1) >>> 0) % n;

/** At most SAMPLE elements: all, or a run of them from a place that hangs on `salt`. */
function part(x: Data, value: Value, salt: number): tf.Tensor {
  if (sizeOfData(x) <= SAMPLE) return toTensor(x, value);
  return stretch(x, placeOf(salt, sizeOfData(x) - SAMPLE), value.dtype);
}
const sample = (x: tf.Tensor, value: Value, salt = value.id) => numbersOf(() => part(x, value, salt));
/** Not returned by tidy, which would look for tensors among the numbers. */
function numbersOf(make: () => tf.Tensor): Numbers {
  let numbers: Numbers | undefined;
  tf.tidy(() => {
    numbers = make().dataSync() as Numbers;
  });
  return numbers!;
}

/** One after another, in plain memory. */
const sideBySide = (all: Data[]): Numbers => {
  const parts = all.map(x => (x instanceof tf.Tensor ? (x.dataSync() as Numbers) : x));
  if (parts.length === 1) return parts[0]!;
  const joined = new Float32Array(parts.reduce((n, x) => n + x.length, 0));
  let at = 0;
  for (const x of parts) {
    joined.set(x, at);
    at += x.length;
  }
  return joined;
};
/** n terms added one after another are off by at most n roundings. */
const ofTerms = (unit: number, n: number) => unit + Math.min(2 ** -6, n * 2 ** -24);

/**
 * Where `got`, the compiled form's results of a node, are not what TFJS computes from the same inputs, in words; undefined
 * if they are. `products`: see CheckOptions.
 */
export function nodeError(node: Node, inputs: Data[], got: Data[], products: number): string | undefined {
  const { kernel, outputs } = node;
  for (const [k, { shape, dtype }] of outputs.entries()) {
    const x = got[k]!;
    const is =
      x instanceof tf.Tensor ? `${x.dtype}[${x.shape}]` : `${dtype}[${x.length === sizeOf(shape) ? shape : x.length}]`;
    if (is !== `${dtype}[${shape}]`) return `${kernel} gives ${is} for ${dtype}[${shape}]`;
  }
  if (Math.max(...node.inputs.map(x => sizeOf(x.shape))) >= LARGE) {
    const vectors = [...node.inputs, ...outputs].every(x => x.shape.length === 1);
    if (vectors && (kernel === 'Concat' || kernel === 'SplitV')) {
      const [before, after] = [inputs, got].map(sideBySide) as [Numbers, Numbers];
      const i = before.findIndex((x, i) => !Object.is(x, after[i]));
      return i < 0 ? undefined : `${kernel} gives ${after[i]} for ${before[i]}`;
    }
    if (kernel === 'Sum' && sizeOf(outputs[0]!.shape) === 1) {
      const [x, [mine = 0]] = [inputs, got].map(sideBySide) as [Numbers, Numbers];
      const sum = (part: (x: number) => number) =>
        (x as Float32Array).reduce((total: number, x: number) => total + part(x), 0);
      const [wanted, size] = [sum(x => x), sum(Math.abs)];
      return Math.abs(mine - wanted) <= ofTerms(UNIT, x.length) * size ? undefined : `Sum gives ${mine} for ${wanted}`;
    }
  }
  return tf.tidy(() => {
    const [{ id, shape }] = outputs as [Value];
    const [n = 1, count] = [shape[0], Math.ceil((SAMPLE * (shape[0] ?? 1)) / sizeOf(shape))]; // rows, and how many to compare
    const cut = count < n ? byRows(node) : undefined;
    const from = placeOf(id, n - count);
    const given = inputs.map((x, i) => {
      const value = node.inputs[i]!;
      return cut?.[i] ? (cut[i] === 'columns' ? columnsOf : rowsOf)(x, value, from, count) : toTensor(x, value);
    });
    const wanted = runNode(node, given);
    const mine = outputs.map((x, k) => {
      if (cut) return rowsOf(got[k]!, x, from, count);
      return kernel === 'TopK' ? toTensor(got[k]!, x) : part(got[k]!, x, x.id); // its indices are looked up
    });
    const how = wanted.map((x, k) => differs(node, k, given, x, mine[k]!, products)).find(Boolean);
    return (how && `${kernel} gives ${how}`) as never; // tidy wants tensors
  });
}
function differs(node: Node, k: number, inputs: tf.Tensor[], wanted: tf.Tensor, got: tf.Tensor, products: number) {
  const { kernel, outputs } = node;
  const { id, shape, dtype } = outputs[k]!;
  const [a, b] = [wanted, got].map(x => sample(x, outputs[k]!)) as [Numbers, Numbers];
  const like = (i: number) => (inputs[i]?.size === wanted.size ? sample(inputs[i]!, node.inputs[i]!, id) : undefined);
  let allowed = (i: number) => (dtype === 'float32' ? TINY + UNIT * Math.abs(a[i]!) : 0);
  if (kernel === 'TopK' && k === 1) {
    const [x, all, n] = [inputs[0]!.dataSync(), got.dataSync(), inputs[0]!.shape.at(-1)!];
    const [per, mine] = [shape.at(-1)!, wanted.dataSync()];
    const at = (of: ArrayLike<number>, i: number) => x[Math.floor(i / per) * n + of[i]!];
    const bad = all.findIndex((_, i) => at(all, i) !== at(mine, i));
    return bad < 0 ? undefined : `${all[bad]} for ${mine[bad]}`;
  }
  if (SUMS.has(kernel) && dtype === 'float32') {
    const absolute = inputs.map((x, i) => (isIds(node, i) ? x : x.abs()));
    const sizes = sample(runNode(node, absolute)[k]!, outputs[k]!);
    const { transposeA } = node.attrs as { transposeA?: boolean };
    const x = inputs[0]!;
    const terms = kernel === 'BatchMatMul' ? x.shape.at(transposeA ? -2 : -1)! : (x.size * inputs.length) / wanted.size;
    const unit = ofTerms(kernel === 'BatchMatMul' ? products : UNIT, terms);
    allowed = i => TINY + unit * Math.abs(sizes[i]!);
  } else if (OF_ONE.has(kernel)) allowed = i => UNIT * (1 + Math.abs(a[i]!));
  else if (STEPS.has(kernel) && !(kernel === 'Cast' && dtype === 'float32')) {
    const [x, y] = [like(0), like(1) ?? (inputs[1]?.size === 1 ? inputs[1]!.dataSync() : undefined)];
    const step = (i: number): number => {
      if (!x) return Infinity; // not here: broadcasts must agree to the bit
      if (['Floor', 'Ceil', 'Cast'].includes(kernel)) return x[i]! - Math.round(x[i]!);
      if (kernel === 'Round') return x[i]! - Math.floor(x[i]!) - 0.5;
      return x[i]! - (y ? y[y.length === 1 ? 0 : i]! : 0);
    };
    allowed = i => (Math.abs(step(i)) <= TINY + 2 ** -22 * Math.abs(x?.[i] ?? 0) ? 2 : 0);
  }
  for (let i = 0; i < a.length; i++)
    if (Number.isFinite(a[i]!) && !(Math.abs(b[i]! - a[i]!) <= allowed(i)))
      return `${b[i]} for ${a[i]}${like(0) ? ` of ${like(0)![i]}` : ''}`;
  return undefined;
}
/** Inputs that are no terms of the sum. */
const isIds = ({ kernel }: Node, i: number) => kernel === 'UnsortedSegmentSum' && i === 1;

/**
 * Computes the recording node by node, in both ways. @param given its feeds and variables
 * @returns what differed, a line for each node; `result` is told each value of `wanted` as soon as it is there
 */
async function checkNodes(
  { nodes }: Recording,
  given: ReadonlyMap<Value, tf.Tensor>,
  evaluate: Evaluate,
  { products }: CheckOptions,
  wanted: ReadonlySet<Value>,
  result: (value: Value, data: Data) => void,
): Promise<string[]> {
  const wrong: string[] = [];
  const lastUse = new Map(nodes.flatMap(({ inputs }, i) => inputs.map(x => [x, i])));
  const kept = new Map<Value, Numbers>(); // what later chunks need, outside of the backend: a heap never shrinks
  for (const [value, tensor] of given) if (wanted.has(value)) result(value, tensor);
  for (const value of wanted) if (value.constant) result(value, value.constant);
  const total = nodes.flatMap(({ outputs }) => outputs).reduce((sum, value) => sum + bytesOf(value), 0);
  for (let from = 0; from < nodes.length; ) {
    let [to, bytes] = [from, 0];
    while (to < nodes.length && bytes <= Math.max(PART_BYTES, total / PARTS))
      for (const output of nodes[to++]!.outputs) bytes += bytesOf(output);
    const chunk = nodes.slice(from, to);
    const have = new Map<Value, Data>(given);
    for (const x of chunk.flatMap(({ inputs }) => inputs)) {
      const numbers = x.constant ?? kept.get(x);
      if (numbers) have.set(x, numbers);
    }
    const values = chunk.flatMap(({ outputs }) => outputs);
    const made = await evaluate(chunk, have, values);
    for (const [i, value] of values.entries()) have.set(value, made[i]!);
    for (const node of chunk) {
      const [inputs, outputs] = [node.inputs, node.outputs].map(of => of.map(x => have.get(x)!)) as [Data[], Data[]];
      const how = nodeError(node, inputs, outputs, products);
      if (how) wrong.push(how);
    }
    for (const value of kept.keys()) if (lastUse.get(value)! < to) kept.delete(value);
    for (const [i, value] of values.entries()) {
      const data = made[i]!;
      if (wanted.has(value)) result(value, data);
      if ((lastUse.get(value) ?? -1) >= to)
        kept.set(value, data instanceof tf.Tensor ? (data.dataSync() as Numbers) : data);
      if (data instanceof tf.Tensor) data.dispose();
    }
    from = to;
  }
  return wrong;
}

/** Euclidean distance of two tensors, or the norm of one; equal infinities and NaNs are no distance. */
function distance(a: Numbers, b?: Numbers): number {
  let sum = 0;
  for (let i = 0; i < a.length; i++) {
    const [x, y] = [a[i]!, b ? b[i]! : 0];
    if (!Object.is(x, y)) sum += (x - y) ** 2;
  }
  return Math.sqrt(sum);
}

/**
 * The relative error of a result of the whole function, in the Euclidean norm, if it is more than allowed. An output may be
 * the small difference of large numbers: below 0.01 it is held to an absolute error. What `mayMove` (state, and what hangs on
 * a step function) is held to the size of its change alone, within a factor of 4: Adam's first step is hardly more than
 * the gradient's sign, which rounding flips where the gradient is nearly 0; a lost assignment is a change of 0.
 */
export function resultError(
  got: Numbers,
  wanted: Numbers,
  before: Numbers | undefined,
  mayMove: boolean,
  tolerance: number,
) {
  const size = distance(wanted);
  if (!Number.isFinite(size)) return undefined; // the caller sees that it diverged
  const floor = before ? 1e-5 * size + 1e-9 : 0.01 * Math.sqrt(wanted.length) + 1e-9;
  const [change, error] = [distance(wanted, before), distance(got, wanted) / (distance(wanted, before) + floor)];
  if (tolerance >= 0 && mayMove) {
    const mine = distance(got, before);
    return mine + floor >= change / 4 && mine <= 4 * (change + floor) ? undefined : error;
  }
  return error <= tolerance ? undefined : error;
}

/**
 * Checks a call and makes it: first every node, then the results of `run`, which gives the outputs and moves the state.
 * @returns the outputs, and what differs, a phrase for each; if anything does, there are no outputs. The state has moved only
 *   if every node by itself was right.
 */
export async function checkCall(
  recording: Recording,
  feeds: Tensors,
  run: () => Promise<Tensors>,
  evaluate: Evaluate,
  options: CheckOptions,
): Promise<{ wrong: string[]; outputs: Tensors }> {
  const given = new Map<Value, tf.Tensor>();
  for (const [key, value] of recording.feeds) given.set(value, feeds[key]!);
  for (const [variable, value] of recording.variables) given.set(value, variable);
  const expected = new Map<Value, Numbers>();
  const results = new Set([...recording.outputs.values(), ...recording.assigned.values()]);
  const keep = (value: Value, data: Data) => expected.set(value, read(data, value.dtype));
  const wrong = await checkNodes(recording, given, evaluate, options, results, keep);
  if (wrong.length > 0) return { wrong, outputs: {} };
  const before = new Map([...recording.assigned].map(([variable, { dtype }]) => [variable, read(variable, dtype)]));
  const outputs = await run();
  const behindSteps = stepped(recording);
  const judge = (name: string, value: Value, got: tf.Tensor, old?: Numbers) => {
    const mild = old !== undefined || behindSteps.has(value);
    const error = resultError(read(got, value.dtype), expected.get(value)!, old, mild, options.tolerance);
    if (error !== undefined) wrong.push(`${name} by ${error.toPrecision(2)}`);
  };
  for (const [key, value] of recording.outputs) judge(key, value, outputs[key]!);
  for (const [variable, value] of recording.assigned) judge(variable.name, value, variable, before.get(variable));
  if (wrong.length === 0) return { wrong, outputs };
  tf.dispose(outputs);
  return { wrong, outputs: {} };
}
/** The numbers, or RUNS runs of SAMPLE of them: the state may be most of the memory. */
function read(x: Data, dtype: Dtype): Numbers {
  const size = sizeOfData(x);
  if (size <= RUNS * SAMPLE) return x instanceof tf.Tensor ? (x.dataSync() as Numbers) : x;
  const from = (i: number) => Math.floor((i * (size - SAMPLE)) / (RUNS - 1));
  return numbersOf(() => tf.concat(Array.from({ length: RUNS }, (_, i) => stretch(x, from(i), dtype))));
}
