/**
 * Turns plain TFJS functions into one TensorFlow graph.
 *
 * TFJS on TensorFlow runs a step as thousands of small calls from JavaScript. `Graph.compile(name, fn)` gives a
 * function with the meaning of `fn` (like Python's tf.function) that runs as ONE call, with stock tfjs-node-gpu:
 *
 *   const graph = new Graph();
 *   const step = graph.compile('step', ({ x, lr }) => { w.assign(w.sub(…)); return { loss }; });
 *   const { loss } = await step({ x, lr });
 *
 * The trick. Every TFJS kernel of this backend ends in `backend.binding.executeOp(name, attrs, inputIds, n)`, and
 * every upload in `binding.createTensor`. At the first call `fn` runs op by op while `binding` is a proxy that lets
 * the real call happen and writes down a node. Tensor ids are never reused, so a map id -> node is all the
 * bookkeeping. What `fn` sees from outside becomes
 *   - a feed            -> Placeholder
 *   - a tf.Variable     -> VarHandleOp + ReadVariableOp; if `fn` assigned it, also AssignVariableOp
 *   - any other tensor  -> Const
 * All functions go into one SavedModel, so that they share one session and its variables.
 *
 * Rules for `fn`: what changes between calls must be a feed (never a JavaScript number), no JavaScript branch may
 * depend on a tensor's value, randomness must come from an op keyed by a fed seed, and variables are made outside.
 * The first two calls of each function check that it keeps them (option `verify`).
 *
 * State lives in the session. A variable's TFJS data becomes a stub, fetched when somebody looks at it; a variable
 * that was assigned outside is sent before the next run. So variables can be used anywhere, without ceremony.
 *
 * Not handled: control-flow ops, complex and string tensors, shapes that depend on values.
 */
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import * as tf from '@tensorflow/tfjs';

export type Feeds = Record<string, tf.Tensor>;
export type Outputs = Record<string, tf.Tensor>;
export interface GraphOptions {
  /** compile with XLA; the environment must allow it before TensorFlow loads, see engine/tensorflow.ts */
  xla?: boolean;
  /** check the first two calls of each function against the same function run op by op (default true) */
  verify?: boolean;
  /** allowed relative difference (Euclidean norm) of an output or of a variable's change (default 1e-3) */
  tolerance?: number;
  log?: (line: string) => void;
}
/** What a traced function became: `ops` recorded calls, `nodes` after removing duplicates and dead ones. */
export interface FunctionStats {
  name: string;
  ops: number;
  nodes: number;
  byOp: Record<string, number>;
}

// ---- The parts of tfjs-node that are used -----------------------------------------------------------------------

type Values = Float32Array | Int32Array | Uint8Array;
interface Attr {
  name: string;
  type: number;
  value: unknown;
}
interface Meta {
  id: number;
  shape: number[];
  dtype: number;
}
interface Binding {
  createTensor(shape: number[], dtype: number, values: Values): number;
  deleteTensor(id: number): void;
  tensorDataSync(id: number): Values;
  executeOp(name: string, attrs: Attr[], inputs: number[], outputs: number): Meta[];
  loadSavedModel(folder: string, tags: string): number;
  deleteSavedModel(session: number): void;
  runSavedModel(session: number, inputs: number[], inputNames: string, outputNames: string): Meta[];
}
interface Backend {
  binding: Binding;
  tensorMap: {
    has(dataId: object): boolean;
    get(dataId: object): Meta & { values: Values | null; refCount: number };
  };
  getInputTensorIds(tensors: tf.TensorInfo[]): number[];
  createOutputTensor(meta: Meta): tf.Tensor;
  readSync(dataId: object): Values;
}

// TensorFlow's enums: DataType, and TF_AttrType as the binding takes it
const [FLOAT, INT32, BOOL] = [1, 3, 10];
const DTYPES: Record<string, number> = { float32: FLOAT, int32: INT32, bool: BOOL };
const [ATTR_STRING, ATTR_INT, ATTR_FLOAT, ATTR_BOOL, ATTR_TYPE, ATTR_SHAPE] = [0, 1, 2, 3, 4, 5];
const ATTR_TENSOR = -1; // ours: base64 of a TensorProto
const MAX_CONST_BYTES = 1 << 20;
const GRAPH_VERSION = 1087; // TensorFlow 2.9's; later ones read it too

// ---- Protobuf: the few messages of a SavedModel (field numbers from TensorFlow's .proto files) --------------------

const varint = (value: number): Buffer => {
  const out: number[] = [];
  let rest = BigInt.asUintN(64, BigInt(value)); // a negative number takes ten bytes
  for (; rest > 127n; rest >>= 7n) out.push(Number(rest & 127n) | 128);
  return Buffer.from([...out, Number(rest)]);
};
const int = (field: number, value: number) => Buffer.concat([varint(field << 3), varint(value)]);
const float = (field: number, value: number) =>
  Buffer.concat([varint((field << 3) | 5), Buffer.from(Float32Array.of(value).buffer)]);
const message = (field: number, ...parts: (string | Uint8Array)[]) => {
  const body = Buffer.concat(parts.map(part => (typeof part === 'string' ? Buffer.from(part) : part)));
  return Buffer.concat([varint((field << 3) | 2), varint(body.length), body]);
};
const shapeProto = (shape: number[]) => shape.map(size => message(2, int(1, size)));

/** An AttrValue; a list repeats the same fields one level down. */
function attrProto(type: number, value: unknown): Buffer {
  if (Array.isArray(value) && type !== ATTR_SHAPE) {
    return message(1, ...value.map(item => attrProto(type, item)));
  }
  if (type === ATTR_STRING) return message(2, value as string);
  if (type === ATTR_INT) return int(3, value as number);
  if (type === ATTR_FLOAT) return float(4, value as number);
  if (type === ATTR_BOOL) return int(5, Number(value));
  if (type === ATTR_TYPE) return int(6, value as number);
  if (type === ATTR_SHAPE) return message(7, ...shapeProto(value as number[]));
  if (type === ATTR_TENSOR) return message(8, Buffer.from(value as string, 'base64'));
  throw new Error(`cannot write an attribute of type ${type}`);
}

const nodeProto = ({ name, op, inputs, attrs }: Node) =>
  message(
    1, // GraphDef.node
    message(1, name),
    message(2, op),
    ...inputs.map(input => message(3, input)),
    ...attrs.map(attr => message(5, message(1, attr.name), message(2, attrProto(attr.type, attr.value)))),
  );

function savedModelProto(nodes: Node[]): Buffer {
  const parts = nodes.map(nodeProto);
  const size = parts.reduce((sum, part) => sum + part.length, 0);
  if (size > 2 ** 31 - 2 ** 20)
    throw new Error(`the graph takes ${size} bytes, TensorFlow reads at most 2 GiB`);
  const graph = message(2, ...parts, message(4, int(1, GRAPH_VERSION)));
  return Buffer.concat([int(1, 1), message(2, message(1, message(4, 'serve')), graph)]);
}

// ---- Nodes --------------------------------------------------------------------------------------------------------

interface Node {
  name: string;
  op: string;
  inputs: string[];
  attrs: Attr[];
}
interface Recorded extends Node {
  key: string; // op, inputs and attributes: equal keys, equal results
  values?: Values | undefined; // of a Const, to tell what changed
}
const attr = (name: string, type: number, value: unknown): Attr => ({ name, type, value });
const dtypeAttr = (name: string, dtype: number) => attr(name, ATTR_TYPE, dtype);

function constAttrs(shape: number[], dtype: number, values: Values): Attr[] {
  const raw = new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
  const uniform = dtype === FLOAT && values.length > 1 && values.every(value => value === values[0]);
  const data = uniform ? message(5, raw.subarray(0, 4)) : message(4, raw); // tf.zeros: one number, repeated
  if (data.length > MAX_CONST_BYTES + 8) {
    throw new Error(
      `a tensor of shape [${shape}] would be baked into the graph as a constant: make it a tf.variable (state) or a feed`,
    );
  }
  const proto = Buffer.concat([int(1, dtype), message(2, ...shapeProto(shape)), data]);
  return [dtypeAttr('dtype', dtype), attr('value', ATTR_TENSOR, proto.toString('base64'))];
}

/**
 * A variable inside the session. `stub` is the TFJS data id that stands for the session's value: while the variable
 * still has it, nobody assigned the variable outside.
 */
interface Slot {
  name: string;
  variable: tf.Variable;
  stub?: object | undefined;
}

/** The nodes of a variable: handle, read, and a way to set it (feed /new, fetch /done). */
function slotNodes({ name, variable }: Slot): Node[] {
  const dtype = DTYPES[variable.dtype]!;
  const typed = [dtypeAttr('dtype', dtype)];
  const shaped = [...typed, attr('shape', ATTR_SHAPE, variable.shape)];
  const handle = [...shaped, attr('shared_name', ATTR_STRING, name), attr('container', ATTR_STRING, '')];
  return [
    { name: `${name}/handle`, op: 'VarHandleOp', inputs: [], attrs: handle },
    { name: `${name}/read`, op: 'ReadVariableOp', inputs: [`${name}/handle`], attrs: typed },
    { name: `${name}/new`, op: 'Placeholder', inputs: [], attrs: shaped },
    copyNode(`${name}/copy`, `${name}/new`, dtype),
    { name: `${name}/set`, op: 'AssignVariableOp', inputs: [`${name}/handle`, `${name}/copy`], attrs: typed },
    doneNode(`${name}/done`, [`^${name}/set`]),
  ];
}

// A fed tensor may lie in JavaScript's memory, which must not become a variable's: TensorFlow's threads would free it
const copyNode = (name: string, input: string, dtype: number): Node => ({
  name,
  op: 'DeepCopy',
  inputs: [input],
  attrs: [dtypeAttr('T', dtype)],
});
/** Something to fetch when only the side effects before it are wanted. */
const doneNode = (name: string, after: string[]): Node => ({
  name,
  op: 'Const',
  inputs: after,
  attrs: constAttrs([], INT32, Int32Array.of(0)),
});

// ---- Recording one function -------------------------------------------------------------------------------------

/** A tensor of the trace: `ref` names it as an input; `varies` tells whether it depends on feeds or state. */
interface Value {
  ref: string;
  varies: boolean;
  shape: number[];
  dtype: number;
}

/** Ops that do nothing when shape and dtype stay the same. */
const SHAPERS = new Set(['Identity', 'Cast', 'Reshape', 'BroadcastTo', 'Tile', 'Slice', 'Pad', 'PadV2']);
/** Ops with hidden state: they neither repeat nor agree with a run op by op. */
const STATEFUL = /^(Random|Multinomial|TruncatedNormal|ParameterizedTruncatedNormal|StatefulRandom)/;

class Trace {
  readonly nodes: Recorded[] = [];
  readonly reads = new Set<string>(); // the variables read
  ops = 0;
  private readonly byKey = new Map<string, Recorded>();
  private readonly values = new Map<number, Value>(); // by tensor id
  private readonly constants = new Map<number, { shape: number[]; dtype: number; values?: Values }>();

  readonly prefix: string;
  private readonly binding: Binding;
  private readonly slotOf: (dataId: object) => Slot | undefined;
  private readonly like: Trace | undefined;

  /** `like`: an earlier trace of the same function, which this one must repeat node by node. */
  constructor(
    prefix: string,
    binding: Binding,
    slotOf: (dataId: object) => Slot | undefined,
    like: Trace | undefined,
  ) {
    this.prefix = prefix;
    this.binding = binding;
    this.slotOf = slotOf;
    this.like = like;
  }

  /** Stands in for the binding while the function runs op by op: the real calls happen, and are written down. */
  proxy(): Binding {
    const createTensor: Binding['createTensor'] = (shape, dtype, values) => {
      const id = this.binding.createTensor(shape, dtype, values);
      this.constants.set(id, { shape: [...shape], dtype, values });
      return id;
    };
    const executeOp: Binding['executeOp'] = (op, attrs, ids, count) => {
      if (STATEFUL.test(op)) {
        throw new Error(`${op} draws from hidden state: use a random op keyed by a fed seed`);
      }
      const outputs = this.binding.executeOp(op, attrs, ids, count);
      this.record(op, attrs, ids, outputs);
      return outputs;
    };
    return Object.create(this.binding, {
      createTensor: { value: createTensor },
      executeOp: { value: executeOp },
    });
  }

  private record(op: string, attrs: Attr[], ids: number[], outputs: Meta[]): void {
    this.ops++;
    const inputs = ids.map(id => this.value(id, op));
    const [x, y] = [inputs[0], outputs[0]];
    if (x && y && SHAPERS.has(op) && x.dtype === y.dtype && `${x.shape}` === `${y.shape}`) {
      this.values.set(y.id, x);
      return;
    }
    const refs = inputs.map(input => input.ref);
    const { name } = this.add(op, refs, attrs);
    const varies = inputs.some(input => input.varies);
    outputs.forEach(({ id, shape, dtype }, k) => {
      this.values.set(id, { ref: k ? `${name}:${k}` : name, varies, shape, dtype });
    });
  }

  /** A new node, or the equal one that is there already, so that computing something twice costs nothing. */
  add(op: string, inputs: string[], attrs: Attr[], values?: Values, user = op): Recorded {
    const key = JSON.stringify([op, inputs, attrs]);
    const twin = this.byKey.get(key);
    if (twin) return twin;
    const node = { name: `${this.prefix}/${this.nodes.length}`, op, inputs, attrs, key, values };
    const before = this.like?.nodes[this.nodes.length];
    if (this.like && before?.key !== key) throw new Error(difference(before, node, user));
    this.byKey.set(key, node);
    this.nodes.push(node);
    return node;
  }

  /** A fed tensor, as the function will see it. */
  feed(id: number, tensor: tf.Tensor): string {
    const [shape, dtype] = [tensor.shape, DTYPES[tensor.dtype]!];
    // the number in the name keeps two feeds of one shape apart
    const name = `${this.prefix}/feed${this.nodes.length}`;
    const attrs = [dtypeAttr('dtype', dtype), attr('shape', ATTR_SHAPE, shape)];
    this.nodes.push({ name, op: 'Placeholder', inputs: [], attrs, key: name });
    const copy = this.add('DeepCopy', [name], [dtypeAttr('T', dtype)]);
    this.values.set(id, { ref: copy.name, varies: true, shape, dtype });
    return name;
  }

  /** Called with every tensor that is about to be used: learns what the tensors from outside are. */
  see({ dataId, shape, dtype }: tf.TensorInfo, id: number): void {
    if (this.values.has(id)) return;
    const slot = this.slotOf(dataId);
    const value = { shape, dtype: DTYPES[dtype]! };
    if (slot) {
      this.reads.add(slot.name);
      this.values.set(id, { ref: `${slot.name}/read`, varies: true, ...value });
    } else if (!this.constants.has(id)) {
      this.constants.set(id, value);
    }
  }

  value(id: number, user: string): Value {
    const known = this.values.get(id);
    if (known) return known;
    const { shape, dtype, values = this.binding.tensorDataSync(id) } = this.constants.get(id)!;
    const { name } = this.add('Const', [], constAttrs(shape, dtype, values), values.slice(), user);
    const value = { ref: name, varies: false, shape, dtype };
    this.values.set(id, value);
    return value;
  }

  /** Whether the tensor's value depends on feeds or state. */
  varies(dataId: object, id: number): boolean {
    return this.values.get(id)?.varies ?? this.slotOf(dataId) !== undefined;
  }
}

/** What a second trace did otherwise than the first, and what to do about it. */
function difference(before: Recorded | undefined, now: Recorded, user: string): string {
  if (before?.op === 'Const' && now.op === 'Const') {
    const [a, b] = [before.values ?? [], now.values ?? []];
    const at = b.findIndex((value, i) => value !== a[i]);
    return (
      `a constant that ${user} uses was ${a[at]} in the first call and is ${b[at]} now: a JavaScript number or a ` +
      `new tensor that changes between calls was baked into the graph. Pass it as a feed`
    );
  }
  return (
    `the first call did ${before?.op ?? 'nothing more'} where this one does ${now.op} (for ${user}): the operations or ` +
    'their attributes depend on something that changes between calls. Pass it as a feed, and branch with tf.where'
  );
}

// ---- The hooks in tfjs-node's backend, set once -------------------------------------------------------------------

let tracing: Trace | undefined;
let reading = false; // a kernel that checks its arguments reads them
const owners = new WeakMap<object, () => void>(); // stub -> what fetches its value

function hook(backend: Backend & { hooked?: boolean }): void {
  if (backend.hooked) return;
  backend.hooked = true;
  const { getInputTensorIds, readSync } = backend;
  backend.getInputTensorIds = tensors => {
    for (const { dataId } of tensors) owners.get(dataId)?.();
    const ids = getInputTensorIds.call(backend, tensors);
    tensors.forEach((tensor, i) => {
      if (tensor.dataId) tracing?.see(tensor, ids[i]!);
    });
    return ids;
  };
  backend.readSync = dataId => {
    owners.get(dataId)?.();
    if (!reading && tracing?.varies(dataId, backend.tensorMap.get(dataId).id)) {
      throw new Error(
        'the value of a tensor was read: a graph cannot follow a branch that depends on it. Use tf.where, or return it',
      );
    }
    return readSync.call(backend, dataId);
  };
  // tf.gather reads its indices to check them; TensorFlow checks them again when the graph runs
  const gather = tf.getKernel('GatherV2', 'tensorflow');
  tf.unregisterKernel('GatherV2', 'tensorflow');
  tf.registerKernel({
    ...gather,
    kernelFunc: args => {
      reading = true;
      try {
        return gather.kernelFunc(args);
      } finally {
        reading = false;
      }
    },
  });
}

// ---- The graph of all functions -----------------------------------------------------------------------------------

interface Traced {
  trace: Trace;
  nodes: Node[]; // what the outputs and assignments need
  feeds: string[]; // placeholders, in the order of the sorted feed names
  outputs: string[]; // keys of the outputs
  assigned: Slot[];
  expected: Expected[];
  checked: boolean;
}
/** What the run op by op gave for an output or a variable; `before`: the variable's value when the call began. */
interface Expected {
  key: string;
  output?: string;
  eager: Values;
  variable?: tf.Variable;
  before?: Values;
}

export class Graph {
  /** For reports: each traced function, the size of the graph's file and the time it last took to load. */
  readonly stats = { functions: [] as FunctionStats[], bytes: 0, loadMs: 0 };
  private readonly backend: Backend;
  private readonly binding: Binding;
  private readonly options: Required<GraphOptions>;
  private readonly slots = new Map<tf.Variable, Slot>();
  private readonly functions: Traced[] = [];
  private loaded: Slot[] = []; // the slots of the present session
  private session: number | undefined;

  constructor(options: GraphOptions = {}) {
    if (tf.getBackend() !== 'tensorflow') throw new Error("Graph works on TFJS's backend 'tensorflow' only");
    this.backend = tf.backend() as unknown as Backend;
    this.binding = this.backend.binding;
    this.options = { xla: false, verify: true, tolerance: 1e-3, log: () => {}, ...options };
    hook(this.backend);
  }

  /** A function with the meaning of `fn`, traced at its first call for each set of feed shapes. */
  compile<F extends Feeds, O extends Outputs>(name: string, fn: (feeds: F) => O): (feeds: F) => Promise<O> {
    const byShape = new Map<string, Traced>();
    return async feeds => {
      const entries = Object.entries<tf.Tensor>(feeds).sort(([a], [b]) => (a < b ? -1 : 1));
      const signature = entries.map(([key, { dtype, shape }]) => `${key} ${dtype}[${shape}]`).join(', ');
      const known = byShape.get(signature);
      if (known && (known.checked || !this.options.verify)) return this.run(known, entries) as O;
      try {
        const traced = this.trace(fn as unknown as (feeds: Feeds) => Outputs, entries, known);
        if (!known) this.load(traced, `${name}(${signature})`);
        const outputs = this.run(traced, entries);
        this.check(traced, outputs);
        traced.checked = known !== undefined;
        byShape.set(signature, traced);
        return outputs as O;
      } catch (error) {
        byShape.delete(signature);
        throw new Error(`${name}(${signature}): ${(error as Error).message}`, { cause: error });
      }
    };
  }

  /** Runs `fn` op by op and records it. The variables are put back: only the session advances the state. */
  private trace(fn: (feeds: Feeds) => Outputs, entries: [string, tf.Tensor][], known?: Traced): Traced {
    this.pull();
    const engine = tf.engine();
    engine.startScope();
    const variables = new Set(Object.values(engine.registeredVariables));
    const before = new Map([...variables].map(variable => [variable, variable.clone()]));
    const state = new Map<object, tf.Variable>([...variables].map(variable => [variable.dataId, variable]));
    const slotOf = (dataId: object) => (state.has(dataId) ? this.slot(state.get(dataId)!) : undefined);
    const prefix = known?.trace.prefix ?? `f${this.functions.length}`;
    const trace = new Trace(prefix, this.binding, slotOf, known?.trace);
    const id = (tensor: tf.Tensor) => this.backend.getInputTensorIds([tensor])[0]!;
    const ref = (tensor: tf.Tensor) => trace.value(id(tensor), 'an output').ref;
    const read = (tensor: tf.Tensor) => this.binding.tensorDataSync(id(tensor));
    const traced: Traced = {
      trace,
      nodes: [],
      feeds: [],
      outputs: [],
      assigned: [],
      expected: [],
      checked: false,
    };
    try {
      const feeds: Feeds = {};
      for (const [key, tensor] of entries) {
        // an id of its own for each feed, even when one tensor is fed twice
        const attrs = [dtypeAttr('T', DTYPES[tensor.dtype]!)];
        const [meta] = this.binding.executeOp('Identity', attrs, [id(tensor)], 1);
        feeds[key] = this.backend.createOutputTensor(meta!);
        traced.feeds.push(trace.feed(meta!.id, tensor));
      }
      this.backend.binding = trace.proxy();
      tracing = trace;
      const results: Node[] = [];
      const outputs = fn(feeds);
      for (const [key, tensor] of Object.entries(outputs)) {
        const name = `${prefix}/out${results.length}`;
        const attrs = [dtypeAttr('T', DTYPES[tensor.dtype]!)];
        results.push({ name, op: 'Identity', inputs: [ref(tensor)], attrs });
        traced.outputs.push(key);
        traced.expected.push({ key: `output ${key}`, output: key, eager: read(tensor) });
      }
      for (const [variable, old] of before) {
        if (variable.dataId === old.dataId) continue;
        const slot = this.slot(variable);
        const inputs = [`${slot.name}/handle`, ref(variable)];
        const attrs = [dtypeAttr('dtype', DTYPES[variable.dtype]!)];
        results.push({ name: `${prefix}/${slot.name}`, op: 'AssignVariableOp', inputs, attrs });
        traced.assigned.push(slot);
        traced.expected.push({
          key: `variable ${variable.name}`,
          eager: read(variable),
          variable,
          before: read(old),
        });
      }
      if (Object.values(engine.registeredVariables).some(variable => !variables.has(variable))) {
        throw new Error('a tf.variable was made inside: make it outside, or dispose it inside');
      }
      traced.nodes = this.finish(trace, results, traced.feeds);
    } finally {
      tracing = undefined;
      this.backend.binding = this.binding;
      for (const [variable, old] of before) if (variable.dataId !== old.dataId) variable.assign(old);
      engine.endScope();
    }
    return traced;
  }

  /** What gets written: the nodes that the results need, the results, and the node that waits for assignments. */
  private finish(trace: Trace, results: Node[], feeds: string[]): Node[] {
    const assigns = results.filter(node => node.op === 'AssignVariableOp');
    // every read happens before any assignment
    for (const node of assigns) for (const name of trace.reads) node.inputs.push(`^${name}/read`);
    const live = new Set(feeds);
    const byName = new Map(trace.nodes.map(node => [node.name, node]));
    const queue = results.flatMap(node => node.inputs);
    for (let input = queue.pop(); input !== undefined; input = queue.pop()) {
      const name = input.replace(/:\d+$/, '');
      if (live.has(name)) continue;
      live.add(name);
      queue.push(...(byName.get(name)?.inputs ?? []));
    }
    const nodes: Node[] = trace.nodes.filter(node => live.has(node.name));
    const done = doneNode(
      `${trace.prefix}/done`,
      assigns.map(node => `^${node.name}`),
    );
    return [...nodes, ...results, done];
  }

  /** A new session with all functions; the state stays in the variables until the next run sends it. */
  private load(traced: Traced, name: string): void {
    this.close();
    const byOp: Record<string, number> = {};
    for (const { op } of traced.nodes) byOp[op] = (byOp[op] ?? 0) + 1;
    const functions = [...this.functions, traced];
    const slots = [...this.slots.values()];
    const proto = savedModelProto([...slots.flatMap(slotNodes), ...functions.flatMap(({ nodes }) => nodes)]);
    const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'graph-'));
    const start = performance.now();
    try {
      fs.writeFileSync(path.join(folder, 'saved_model.pb'), proto);
      this.session = this.binding.loadSavedModel(folder, 'serve');
    } finally {
      fs.rmSync(folder, { recursive: true });
    }
    this.loaded = slots;
    this.functions.push(traced);
    this.stats.bytes = proto.length;
    this.stats.loadMs = performance.now() - start;
    this.stats.functions.push({ name, ops: traced.trace.ops, nodes: traced.nodes.length, byOp });
    this.options.log(
      `traced ${name}: ${traced.trace.ops} operations, ${traced.nodes.length} nodes; ` +
        `graph of ${(proto.length / 2 ** 20).toFixed(1)} MiB loaded in ${this.stats.loadMs.toFixed(0)} ms`,
    );
  }

  private run(traced: Traced, entries: [string, tf.Tensor][]): Outputs {
    this.push();
    for (const slot of traced.assigned) this.expire(slot);
    const { outputs, feeds, trace } = traced;
    const ids = this.backend.getInputTensorIds(entries.map(([, tensor]) => tensor));
    const fetches = [...outputs.map((_, i) => `${trace.prefix}/out${i}`), `${trace.prefix}/done`];
    const metas = this.binding.runSavedModel(this.session!, ids, feeds.join(), fetches.join());
    this.binding.deleteTensor(metas.pop()!.id);
    return Object.fromEntries(metas.map((meta, i) => [outputs[i]!, this.backend.createOutputTensor(meta)]));
  }

  /** Compares a run with what the same call gave op by op; a difference puts the state back and throws. */
  private check(traced: Traced, outputs: Outputs): void {
    const { expected } = traced;
    traced.expected = [];
    if (!this.options.verify) return;
    const wrong = expected.flatMap(({ key, output, variable, eager, before }) => {
      const graph = this.backend.readSync((variable ?? outputs[output!]!).dataId);
      // a variable is judged by its change; what rounding makes of its value is allowed too
      const scale = before ? distance(eager, before) + 1e-3 * distance(eager) : distance(eager);
      const error = distance(graph, eager) / (scale + 1e-9);
      return error <= this.options.tolerance ? [] : [`${key} (off by ${error.toPrecision(2)})`];
    });
    if (wrong.length === 0) return;
    for (const { variable, before } of expected) {
      if (variable) tf.tidy(() => variable.assign(tf.tensor(before!, variable.shape, variable.dtype)));
    }
    tf.dispose(outputs);
    throw new Error(`the graph and the run op by op disagree: ${wrong.join(', ')}`);
  }

  private slot(variable: tf.Variable): Slot {
    let slot = this.slots.get(variable);
    if (!slot) {
      slot = { name: `v${this.slots.size}`, variable };
      this.slots.set(variable, slot);
    }
    return slot;
  }

  /** Sends the variables that were assigned outside to the session. Every run does this by itself. */
  push(): void {
    const changed = this.loaded.filter(
      ({ variable, stub }) => !variable.isDisposed && variable.dataId !== stub,
    );
    if (changed.length === 0) return;
    const names = (end: string) => changed.map(({ name }) => `${name}/${end}`).join();
    const ids = this.backend.getInputTensorIds(changed.map(({ variable }) => variable));
    for (const slot of changed) this.settle(slot);
    const metas = this.binding.runSavedModel(this.session!, ids, names('new'), names('done'));
    for (const { id } of metas) this.binding.deleteTensor(id);
    for (const slot of changed) this.attach(slot);
  }

  /** Fetches all variables at once. Looking at a variable fetches it by itself, one by one. */
  pull(): void {
    const absent = this.loaded.filter(
      ({ variable, stub }) =>
        !variable.isDisposed && variable.dataId === stub && this.backend.tensorMap.get(stub).id < 0,
    );
    if (absent.length === 0) return;
    const names = absent.map(({ name }) => `${name}/read`).join();
    const metas = this.binding.runSavedModel(this.session!, [], '', names);
    absent.forEach(({ stub }, i) => {
      this.backend.tensorMap.get(stub!).id = metas[i]!.id;
    });
  }

  /** Gives the variable a stub in place of its data, which is freed unless somebody else holds it. */
  private attach(slot: Slot): void {
    const { name, variable } = slot;
    const stub = this.backend.createOutputTensor({
      id: -1,
      shape: variable.shape,
      dtype: DTYPES[variable.dtype]!,
    });
    variable.assign(stub);
    stub.dispose();
    slot.stub = variable.dataId;
    const data = this.backend.tensorMap.get(slot.stub);
    owners.set(slot.stub, () => {
      if (data.id < 0) data.id = this.binding.runSavedModel(this.session!, [], '', `${name}/read`)[0]!.id;
    });
  }

  /** The stub becomes ordinary data with the session's present value, for whoever still holds it. */
  private settle(slot: Slot): void {
    if (slot.stub && this.backend.tensorMap.has(slot.stub)) owners.get(slot.stub)?.();
    if (slot.stub) owners.delete(slot.stub);
    slot.stub = undefined;
  }

  /** Before the session changes a variable: a fetched value is out of date, unless a clone made outside holds it. */
  private expire(slot: Slot): void {
    if (slot.variable.isDisposed) return;
    const data = this.backend.tensorMap.get(slot.stub!);
    if (data.refCount > 1) {
      this.settle(slot);
      this.attach(slot);
    } else if (data.id >= 0) {
      this.binding.deleteTensor(data.id);
      data.id = -1;
    }
  }

  private close(): void {
    this.pull();
    for (const slot of this.loaded) this.settle(slot);
    this.loaded = [];
    if (this.session !== undefined) this.binding.deleteSavedModel(this.session);
    this.session = undefined;
  }

  /** Frees the session; the variables keep their values. Compiled functions can no longer be called. */
  dispose(): void {
    this.close();
    this.functions.length = 0;
  }
}

/** Euclidean distance of two tensors' values, or the norm of one. Equal infinities and NaNs are no distance. */
function distance(a: Values, b?: Values): number {
  let sum = 0;
  for (let i = 0; i < a.length; i++) {
    const [x, y] = [a[i]!, b ? b[i]! : 0];
    if (!Object.is(x, y)) sum += (x - y) ** 2;
  }
  return Math.sqrt(sum);
}
