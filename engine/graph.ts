/**
 * Turns plain TFJS functions into one TensorFlow graph.
 *
 * TFJS on TensorFlow runs a step as thousands of small calls from JavaScript. `compile` gives a function with
 * the same meaning (like Python's tf.function) that runs as ONE call, on stock tfjs-node:
 *
 *   const graph = new Graph();
 *   const step = graph.compile('step', ({ x, lr }) => { w.assign(w.sub(…)); return { loss }; });
 *   const { loss } = await step({ x, lr });
 *
 * The trick: every kernel of this backend ends in `binding.executeOp(name, attrs, inputIds, n)`, every upload
 * in `binding.createTensor`, and a tensor's id is never used again. At its first call the function runs with a
 * stand-in for `binding` that writes down a node and gives back an id without data; a map from ids to nodes is
 * all the bookkeeping. (The shapes of a result are those that the op gives for zeros, which are dropped at once:
 * so recording takes no memory to speak of.) What the function sees from outside becomes
 *   a feed           Placeholder
 *   a tf.Variable    VarHandleOp and ReadVariableOp, and AssignVariableOp when the function assigned it
 *   another tensor   Const
 * The nodes of all functions are written as one SavedModel and loaded into one session: they share its
 * variables.
 *
 * Rules for the function: what changes between calls is a feed, never a JavaScript number; no JavaScript
 * branch depends on a tensor's value; random ops are keyed by a fed seed; variables are made outside. The
 * first two calls check that (`verify`): both compare the graph's results with those of its nodes run one by one
 * outside of a session, each value freed after its last use, and the second records again, with its new feeds, and
 * compares the two recordings. Later calls do not run the JavaScript.
 *
 * The state lives in the session. In TFJS a variable then has a stub for its data, which is fetched when
 * somebody looks at it; a variable that was assigned outside is sent before the next run. So variables work
 * anywhere.
 *
 * Not handled: control flow by value, complex and string tensors, shapes that depend on values.
 */
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import * as tf from '@tensorflow/tfjs';
import { type Attr, AttrType, constAttrs, DataType, type Node, savedModel, type Values } from './saved-model.ts';

export type Feeds = Record<string, tf.Tensor>;
export type Outputs = Record<string, tf.Tensor>;
export interface GraphOptions {
  /** compile with XLA what it can: then every function takes long once, and again when a new one joins */
  xla?: boolean;
  /** check the first two calls of each function, see above (default true) */
  verify?: boolean;
  /** allowed relative error of an output, in the Euclidean norm (default 1e-3); see `check` for variables */
  tolerance?: number;
  log?: (line: string) => void;
}
/**
 * What a function became: calls recorded, and nodes without duplicates and dead ones. `byOp` tells where the
 * time goes: the nodes of each op, and how long they took when run one by one (on a CPU: a GPU lags behind).
 */
export interface FunctionStats {
  name: string;
  ops: number;
  nodes: number;
  byOp: Record<string, { nodes: number; ms: number }>;
}

const MAX_CONST_BYTES = 2 ** 20;
/** Variables are fetched in groups of so many bytes: a session makes a plan for every new set of fetches, in 50 ms. */
const GROUP_BYTES = 2 ** 27;
/** Ops that do nothing when they leave shape and type as they are. */
const SHAPERS = new Set(['Identity', 'Cast', 'Reshape', 'BroadcastTo', 'Tile', 'Slice', 'Pad', 'PadV2']);
/** Ops that are step functions of their inputs (and Cast, to whole numbers): rounding flips what is near the step. */
const STEPS = /^(Greater|Less|Equal|NotEqual|ApproximateEqual|Sign|Floor|Ceil|Round|Rint|ArgM|TopK)/;
/** Ops with hidden state: they neither repeat nor agree with a run op by op. */
const STATEFUL = /^(Random|Multinomial|TruncatedNormal|ParameterizedTruncatedNormal|StatefulRandom)/;

// ---- The parts of tfjs-node that are used -----------------------------------------------------------------

interface Meta {
  id: number; // of the binding's tensor; -1: none yet
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
  tensorMap: { has(dataId: object): boolean; get(dataId: object): Meta & { refCount: number } };
  getInputTensorIds(tensors: tf.TensorInfo[]): number[];
  createOutputTensor(meta: Meta): tf.Tensor;
  readSync(dataId: object): Values;
}

const dtypeOf = (tensor: tf.TensorInfo): number => {
  const dtype = DataType[tensor.dtype];
  if (dtype === undefined) throw new Error(`a graph cannot hold a tensor of type ${tensor.dtype}`);
  return dtype;
};
const typeAttr = (name: string, value: number): Attr => ({ name, type: AttrType.type, value });
const shapeAttr = (value: number[]): Attr => ({ name: 'shape', type: AttrType.shape, value });

/** On a node: XLA may compile it. */
const XLA: Attr = { name: '_XlaCompile', type: AttrType.bool, value: true };

/** For a Const that is fetched only for what must happen before it. */
const NOTHING = constAttrs([], DataType.int32!, Int32Array.of(0));

// ---- A variable in the session ----------------------------------------------------------------------------

/** `stub`: the TFJS data that stands for the session's value. Other data: it was assigned outside. */
interface Slot {
  name: string;
  variable: tf.Variable;
  stub?: object | undefined;
  group?: Slot[]; // fetched together
}

/** Handle, read, and what sets it from outside: feed /new, fetch /done. */
function slotNodes({ name, variable }: Slot): Node[] {
  const dtype = dtypeOf(variable);
  const type = typeAttr('dtype', dtype);
  const shape = shapeAttr(variable.shape);
  const shared: Attr = { name: 'shared_name', type: AttrType.string, value: name };
  const node = (end: string, op: string, inputs: string[], attrs: Attr[]): Node => ({
    name: `${name}/${end}`,
    op,
    inputs: inputs.map(input => input.replace('/', `${name}/`)),
    attrs,
  });
  return [
    node('handle', 'VarHandleOp', [], [type, shape, shared]),
    node('read', 'ReadVariableOp', ['/handle'], [type]),
    node('new', 'Placeholder', [], [type, shape]),
    // a copy, because a fed tensor may lie in JavaScript's memory, which TensorFlow's threads must not free
    node('copy', 'DeepCopy', ['/new'], [typeAttr('T', dtype)]),
    node('set', 'AssignVariableOp', ['/handle', '/copy'], [type]),
    node('done', 'Const', ['^/set'], NOTHING),
  ];
}

// ---- Recording one function -------------------------------------------------------------------------------

/** A tensor in the recording: `ref` names it as an input; `varies`: depends on feeds or variables. */
interface Value {
  ref: string;
  varies: boolean;
  shape: number[];
  dtype: number;
}
interface Recorded extends Node {
  key: string; // op, inputs and attributes: what has the same key has the same value
  outputs: Omit<Meta, 'id'>[];
  constant?: Values | undefined; // of a Const
  ms?: number; // what it took when it was run by itself
}
/** Shapes and types of results, by op, attributes, and inputs. */
type Shapes = Map<string, Omit<Meta, 'id'>[]>;
/** All nodes, and the shapes found for them: what a second recording is compared with, and need not find again. */
interface Recording {
  nodes: Recorded[];
  shapes: Shapes;
}
/** A recorded function, ready to be loaded and run. */
interface Compiled {
  prefix: string;
  ops: number;
  nodes: Recorded[];
  feeds: string; // names of the placeholders, by the feeds' sorted keys
  fetches: string; // names of the outputs, and of what waits for the assignments
  outputs: string[]; // the outputs' keys
  assigned: Slot[];
  results: string[]; // the refs of the outputs, then of what is assigned
  recording?: Recording | undefined; // until the second call has repeated it
}

class Trace {
  private readonly nodes: Recorded[] = [];
  private readonly byKey = new Map<string, Recorded>();
  private readonly values = new Map<number, Value>(); // by tensor id
  private readonly constants = new Map<number, { shape: number[]; dtype: number; values?: Values }>();
  private readonly reads = new Set<string>(); // the reads of variables
  private readonly feeds: string[] = [];
  private readonly outputs: [key: string, name: string][] = [];
  private readonly assigned: [slot: Slot, ref: string][] = [];
  private readonly shapes: Shapes;
  private nextId = -2; // of tensors without data; the binding's count up from 0, and -1 is a stub's
  private ops = 0;
  private readonly prefix: string; // of all names
  private readonly xla: boolean;
  private readonly binding: Binding;
  private readonly slotOf: (dataId: object) => Slot | undefined; // of the variables as they were at the start
  private readonly like: Recorded[] | undefined; // a recording that this one must repeat

  constructor(
    prefix: string,
    xla: boolean,
    binding: Binding,
    slotOf: (dataId: object) => Slot | undefined,
    known?: Recording,
  ) {
    this.prefix = prefix;
    this.xla = xla;
    this.binding = binding;
    this.slotOf = slotOf;
    this.like = known?.nodes;
    this.shapes = known?.shapes ?? new Map();
  }

  /** Stands in for the binding: what depends on feeds or variables is only written down. */
  standIn(): Binding {
    const createTensor: Binding['createTensor'] = (shape, dtype, values) => {
      const id = this.binding.createTensor(shape, dtype, values);
      this.constants.set(id, { shape, dtype, values });
      return id;
    };
    const executeOp: Binding['executeOp'] = (op, attrs, ids, count) => {
      if (STATEFUL.test(op)) throw new Error(`${op} has hidden state: use a random op keyed by a fed seed`);
      const inputs = ids.map(id => this.value(id, op));
      const varies = inputs.some(input => input.varies);
      const outputs = varies
        ? this.shapesOf(op, attrs, inputs, ids, count).map(meta => ({ ...meta, id: this.nextId-- }))
        : this.binding.executeOp(op, attrs, ids, count);
      this.record(op, attrs, inputs, outputs);
      return outputs;
    };
    const deleteTensor = (id: number) => {
      if (id >= 0) this.binding.deleteTensor(id);
    };
    const replaced = { createTensor, executeOp, deleteTensor };
    return Object.create(this.binding, Object.getOwnPropertyDescriptors(replaced));
  }

  /** What the op gives for inputs of these shapes: it is run on zeros in place of what varies. */
  private shapesOf(op: string, attrs: Attr[], inputs: Value[], ids: number[], count: number): Omit<Meta, 'id'>[] {
    const kinds = inputs.map(({ varies, ref, shape, dtype }) => (varies ? [shape, dtype] : ref));
    const key = JSON.stringify([op, attrs, kinds]);
    const known = this.shapes.get(key);
    if (known) return known;
    const used = inputs.map(({ varies, shape, dtype }, k) => (varies ? this.zeros(shape, dtype) : ids[k]!));
    const outputs = this.binding.executeOp(op, attrs, used, count);
    for (const id of used.filter((_, k) => inputs[k]!.varies)) this.binding.deleteTensor(id);
    for (const { id } of outputs) this.binding.deleteTensor(id);
    const shapes = outputs.map(({ shape, dtype }) => ({ shape, dtype }));
    this.shapes.set(key, shapes);
    return shapes;
  }

  private zeros(shape: number[], dtype: number): number {
    const dims = this.binding.createTensor([shape.length], DataType.int32!, Int32Array.from(shape));
    const float = this.binding.createTensor([], DataType.float32!, Float32Array.of(0));
    const casts = [typeAttr('SrcT', DataType.float32!), typeAttr('DstT', dtype)];
    const noRounding: Attr = { name: 'Truncate', type: AttrType.bool, value: false };
    const zero = this.binding.executeOp('Cast', [...casts, noRounding], [float], 1)[0]!.id; // of any type, bfloat16 too
    const attrs = [typeAttr('T', dtype), typeAttr('index_type', DataType.int32!)];
    const { id } = this.binding.executeOp('Fill', attrs, [dims, zero], 1)[0]!;
    for (const used of [dims, float, zero]) this.binding.deleteTensor(used);
    return id;
  }

  private record(op: string, attrs: Attr[], inputs: Value[], outputs: Meta[]): void {
    this.ops++;
    const [x, y] = [inputs[0], outputs[0]];
    if (x && y && SHAPERS.has(op) && x.dtype === y.dtype && `${x.shape}` === `${y.shape}`) {
      this.values.set(y.id, x);
      return;
    }
    // XLA's generator would draw other bits for a seed, so stateless random ops stay TensorFlow's
    const xla = { ...XLA, value: !op.startsWith('Stateless') };
    const refs = inputs.map(({ ref }) => ref);
    const { name } = this.add(op, refs, this.xla ? [...attrs, xla] : attrs, outputs);
    const varies = inputs.some(input => input.varies);
    outputs.forEach(({ id, shape, dtype }, k) => {
      this.values.set(id, { ref: k ? `${name}:${k}` : name, varies, shape, dtype });
    });
  }

  /** A new node, or the same one that is there already: so computing something twice costs nothing. */
  private add(
    op: string,
    inputs: string[],
    attrs: Attr[],
    outputs: Omit<Meta, 'id'>[],
    user = op,
    constant?: Values,
  ): Recorded {
    const key = JSON.stringify([op, inputs, attrs]);
    const twin = this.byKey.get(key);
    if (twin) return twin;
    const name = `${this.prefix}/${this.nodes.length}`;
    const node: Recorded = { name, op, inputs, attrs, key, outputs, constant };
    const first = this.like?.[this.nodes.length];
    if (this.like && first?.key !== key) throw new Error(difference(first, node, user));
    this.byKey.set(key, node);
    this.nodes.push(node);
    return node;
  }

  /** The tensor `id` is the feed `key`. */
  feed(key: string, tensor: tf.Tensor, id: number): void {
    const dtype = dtypeOf(tensor);
    const label: Attr = { name: '_feed', type: AttrType.string, value: key }; // keeps equal feeds apart
    const outputs = [{ shape: tensor.shape, dtype }];
    const { name } = this.add('Placeholder', [], [typeAttr('dtype', dtype), shapeAttr(tensor.shape), label], outputs);
    const copy = this.add('DeepCopy', [name], [typeAttr('T', dtype)], outputs); // why: see slotNodes
    this.feeds.push(name);
    this.values.set(id, { ref: copy.name, varies: true, shape: tensor.shape, dtype });
  }

  /** Told of every tensor before it is used, so as to know those from outside. */
  see(tensor: tf.TensorInfo, id: number): void {
    if (this.values.has(id)) return;
    const slot = this.slotOf(tensor.dataId);
    if (slot) {
      const ref = `${slot.name}/read`;
      this.reads.add(ref);
      this.values.set(id, { ref, varies: true, shape: tensor.shape, dtype: dtypeOf(tensor) });
    } else if (!this.constants.has(id)) {
      this.constants.set(id, { shape: tensor.shape, dtype: dtypeOf(tensor) });
    }
  }

  private value(id: number, user: string): Value {
    const known = this.values.get(id);
    if (known) return known;
    const { shape, dtype, values = this.binding.tensorDataSync(id) } = this.constants.get(id)!;
    const attrs = constAttrs(shape, dtype, values);
    if ((attrs[1]!.value as string).length > 1.4 * MAX_CONST_BYTES) {
      throw new Error(
        `${user} uses a tensor of shape [${shape}] that would be a constant of the graph: make it a tf.variable`,
      );
    }
    const { name } = this.add('Const', [], attrs, [{ shape, dtype }], user, values.slice());
    const value = { ref: name, varies: false, shape, dtype };
    this.values.set(id, value);
    return value;
  }

  /** Whether the tensor's value may differ between calls. */
  varies(dataId: object, id: number): boolean {
    return this.values.get(id)?.varies ?? this.slotOf(dataId) !== undefined;
  }

  output(key: string, id: number): void {
    const { ref, shape, dtype } = this.value(id, 'an output');
    const attrs = [typeAttr('T', dtype)];
    this.outputs.push([key, this.add('Identity', [ref], attrs, [{ shape, dtype }], 'an output').name]);
  }

  assign(slot: Slot, id: number): void {
    this.assigned.push([slot, this.value(id, `the assignment of ${slot.variable.name}`).ref]);
  }

  finish(): Compiled {
    // every read happens before any assignment
    const reads = [...this.reads].map(read => `^${read}`);
    const sets = this.assigned.map(([slot, ref]) => {
      const inputs = [`${slot.name}/handle`, ref, ...reads];
      const { name } = this.add('AssignVariableOp', inputs, [typeAttr('dtype', dtypeOf(slot.variable))], []);
      return `^${name}`;
    });
    const done = this.add('Const', sets, NOTHING, [], 'the end');
    const fetches = [...this.outputs.map(([, name]) => name), done.name];
    const live = new Set([...this.feeds, ...fetches]);
    for (const { name, inputs } of this.nodes.toReversed()) {
      if (live.has(name)) for (const input of inputs) live.add(input.replace(/^\^|:\d+$/g, ''));
    }
    return {
      prefix: this.prefix,
      ops: this.ops,
      nodes: this.nodes.filter(({ name }) => live.has(name)),
      feeds: this.feeds.join(),
      fetches: fetches.join(),
      outputs: this.outputs.map(([key]) => key),
      assigned: this.assigned.map(([slot]) => slot),
      results: [...this.outputs.map(([, name]) => name), ...this.assigned.map(([, ref]) => ref)],
      recording: { nodes: this.nodes, shapes: this.shapes },
    };
  }
}

/** What a second recording has otherwise than the first, and what to do about it. */
function difference(first: Recorded | undefined, now: Recorded, user: string): string {
  const [before, after] = [first?.constant, now.constant];
  if (before && after && before.length === after.length) {
    const at = after.findIndex((value, i) => !Object.is(value, before[i]));
    return (
      `a constant that ${user} uses was ${before[at]} in the first call and is ${after[at]} now: a ` +
      'JavaScript number, or a tensor made from some, became part of the graph. Pass it as a feed'
    );
  }
  const was = first?.op === now.op ? 'another one' : (first?.op ?? 'nothing');
  return (
    `a ${now.op}${user === now.op ? '' : ` for ${user}`} was recorded where the first call had ${was}: the ` +
    'operations depend on something that changes between calls. Pass it as a feed and choose with tf.where'
  );
}

// ---- The hooks in tfjs-node, set once ---------------------------------------------------------------------

let tracing: Trace | undefined;
let checking = false; // a kernel reads a tensor only to check its arguments
const fetchers = new WeakMap<object, () => void>(); // stub -> what fetches its value

function hook(backend: Backend & { hooked?: boolean }): void {
  if (backend.hooked) return;
  backend.hooked = true;
  const { getInputTensorIds, readSync } = backend;
  backend.getInputTensorIds = tensors => {
    for (const { dataId } of tensors) fetchers.get(dataId)?.();
    const ids = getInputTensorIds.call(backend, tensors);
    if (tracing) for (const [i, tensor] of tensors.entries()) if (tensor.dataId) tracing.see(tensor, ids[i]!);
    return ids;
  };
  backend.readSync = dataId => {
    fetchers.get(dataId)?.();
    const { id, shape } = backend.tensorMap.get(dataId);
    if (tracing?.varies(dataId, id)) {
      if (checking) return new Int32Array(tf.util.sizeFromShape(shape));
      throw new Error('a tensor was read, but no JavaScript may depend on its value: use tf.where, or return it');
    }
    return readSync.call(backend, dataId);
  };
  // tf.gather reads its indices to check them, here zeros; when the graph runs, TensorFlow checks them
  const gather = tf.getKernel('GatherV2', 'tensorflow');
  tf.unregisterKernel('GatherV2', 'tensorflow');
  const kernelFunc: tf.KernelFunc = args => {
    checking = true;
    try {
      return gather.kernelFunc(args);
    } finally {
      checking = false;
    }
  };
  tf.registerKernel({ ...gather, kernelFunc });
}

// ---- The graph of all functions ---------------------------------------------------------------------------

type Tensors = Map<tf.Variable, tf.Tensor>;

export class Graph {
  /** For reports: each function, the bytes of the whole graph and the time it last took to load. */
  readonly stats = { functions: [] as FunctionStats[], bytes: 0, loadMs: 0 };
  private readonly backend: Backend;
  private readonly binding: Binding;
  private readonly options: Required<GraphOptions>;
  private readonly slots = new Map<tf.Variable, Slot>();
  private readonly functions: Compiled[] = [];
  private loaded: Slot[] = []; // the slots that the session has
  private session: number | undefined;

  constructor(options: GraphOptions = {}) {
    if (tf.getBackend() !== 'tensorflow') throw new Error("Graph needs TFJS's backend 'tensorflow'");
    this.backend = tf.backend() as unknown as Backend;
    this.binding = this.backend.binding;
    this.options = { xla: false, verify: true, tolerance: 1e-3, log: () => {}, ...options };
    hook(this.backend);
  }

  /** A function with the meaning of `fn`, recorded at its first call for each set of feed shapes. */
  compile<F extends Feeds, O extends Outputs>(name: string, fn: (feeds: F) => O): (feeds: F) => Promise<O> {
    const byShapes = new Map<string, Compiled>();
    return async feeds => {
      const entries = Object.entries<tf.Tensor>(feeds).sort(([a], [b]) => (a < b ? -1 : 1));
      const tensors = entries.map(([, tensor]) => tensor);
      const shapes = entries.map(([key, { dtype, shape }]) => `${key}: ${dtype}[${shape}]`).join(', ');
      const known = byShapes.get(shapes);
      if (known && !known.recording) return this.run(known, tensors) as O;
      byShapes.delete(shapes); // until this call has succeeded
      try {
        this.pull();
        const state = Object.values(tf.engine().registeredVariables);
        const before: Tensors = new Map(state.map(variable => [variable, tf.keep(variable.clone())]));
        let outputs: Outputs;
        let compiled: Compiled;
        try {
          compiled = this.record(entries, fn as unknown as (feeds: Feeds) => Outputs, known, before);
          if (!known) this.load(`${name}(${shapes})`, compiled);
          outputs = this.run(compiled, tensors);
          if (this.options.verify) this.check(compiled, tensors, before, outputs);
        } finally {
          for (const copy of before.values()) copy.dispose();
        }
        if (!known) this.count(`${name}(${shapes})`, compiled);
        for (const slot of this.loaded) this.expire(slot); // what the recording fetched need not stay
        if (known || !this.options.verify) compiled.recording = undefined;
        byShapes.set(shapes, compiled);
        return outputs as O;
      } catch (error) {
        throw new Error(`${name}(${shapes}): ${(error as Error).message}`, { cause: error });
      }
    };
  }

  /** Records `fn`. The variables are put back: only the session moves the state on. */
  private record(
    entries: [string, tf.Tensor][],
    fn: (feeds: Feeds) => Outputs,
    known: Compiled | undefined,
    before: Tensors,
  ): Compiled {
    const engine = tf.engine();
    engine.startScope();
    const byData = new Map<object, tf.Variable>([...before.keys()].map(variable => [variable.dataId, variable]));
    const slotOf = (dataId: object) => (byData.has(dataId) ? this.slot(byData.get(dataId)!) : undefined);
    const prefix = known?.prefix ?? `f${this.functions.length}`;
    const trace = new Trace(prefix, this.options.xla, this.binding, slotOf, known?.recording);
    try {
      const feeds: Feeds = {};
      for (const [key, tensor] of entries) {
        // an id of its own for each feed, even if one tensor is fed twice
        const [fed] = this.binding.executeOp('Identity', [typeAttr('T', dtypeOf(tensor))], [this.idOf(tensor)], 1);
        feeds[key] = this.backend.createOutputTensor(fed!);
        trace.feed(key, tensor, fed!.id);
      }
      this.backend.binding = trace.standIn();
      tracing = trace;
      for (const [key, tensor] of Object.entries(fn(feeds))) trace.output(key, this.idOf(tensor));
      for (const [variable, old] of before) {
        if (variable.dataId !== old.dataId) trace.assign(this.slot(variable), this.idOf(variable));
      }
      if (Object.values(engine.registeredVariables).some(variable => !before.has(variable))) {
        throw new Error('a tf.variable was made and left: make it outside, or dispose of it inside');
      }
      return trace.finish();
    } finally {
      tracing = undefined;
      this.backend.binding = this.binding;
      for (const [variable, old] of before) if (variable.dataId !== old.dataId) variable.assign(old);
      engine.endScope();
    }
  }

  private idOf(tensor: tf.Tensor): number {
    return this.backend.getInputTensorIds([tensor])[0]!;
  }

  /** Compares a run with what its nodes give one by one. On a difference puts the state back and throws. */
  private check(compiled: Compiled, feeds: tf.Tensor[], before: Tensors, outputs: Outputs): void {
    const { tolerance } = this.options;
    const wrong: string[] = []; // by result
    const stepped = new Set<string>(); // what hangs on a step function, such as the indicator g > 0.1
    for (const { name, op, inputs, outputs } of compiled.nodes)
      if (
        STEPS.test(op) ||
        (op === 'Cast' && outputs[0]!.dtype !== DataType.float32) ||
        inputs.some(input => stepped.has(input))
      )
        for (const k of outputs.keys()) stepped.add(k ? `${name}:${k}` : name);
    const compare = (k: number, id: number) => {
      const key = compiled.outputs[k];
      const slot = compiled.assigned[k - compiled.outputs.length];
      const eager = this.binding.tensorDataSync(id);
      if (!Number.isFinite(distance(eager))) return; // nothing to compare: the caller sees that it diverged
      const actual = this.backend.readSync(slot ? slot.variable.dataId : outputs[key!]!.dataId);
      // A variable is judged by its change, and mildly: Adam's first step is hardly more than the gradient's
      // sign, which rounding flips where the gradient is nearly 0. A lost assignment would be an error of 1.
      // An output may be the small difference of large numbers: below 0.01 it is held to an absolute error.
      const scale = slot
        ? distance(eager, this.binding.tensorDataSync(this.idOf(before.get(slot.variable)!))) + 1e-5 * distance(eager)
        : distance(eager) + 0.01 * Math.sqrt(eager.length);
      const error = distance(actual, eager) / (scale + 1e-9);
      const allowed = slot || stepped.has(compiled.results[k]!) ? Math.min(0.75, 750 * tolerance) : tolerance;
      if (error > allowed) wrong[k] = `${slot ? slot.variable.name : key} by ${error.toPrecision(2)}`;
      if (slot) this.expire(slot); // one at a time is in memory
    };
    this.runNodes(compiled, feeds, before, compare);
    if (wrong.length === 0) return;
    for (const { variable } of compiled.assigned) variable.assign(before.get(variable)!);
    tf.dispose(outputs);
    throw new Error(`the graph and the run op by op disagree (relative error): ${Object.values(wrong).join(', ')}`);
  }

  /** Runs the nodes one by one outside of the session; `result` is told the k-th result's id as soon as it is there. */
  private runNodes(compiled: Compiled, feeds: tf.Tensor[], before: Tensors, result: (k: number, id: number) => void) {
    const { results } = compiled;
    const nodes = compiled.nodes.filter(({ op, outputs }) => op !== 'Placeholder' && outputs.length > 0);
    const ids = new Map<string, number>(); // by ref
    const uses = new Map<string, number>(); // still to come
    for (const { inputs } of nodes) for (const input of inputs) uses.set(input, (uses.get(input) ?? 0) + 1);
    const wanted = new Map<string, number[]>();
    for (const [k, ref] of results.entries()) wanted.set(ref, [...(wanted.get(ref) ?? []), k]);
    const notOurs = new Set<number>(); // the feeds' and the variables'
    const give = (ref: string, id: number, ours = true) => {
      ids.set(ref, id);
      if (!ours) notOurs.add(id);
      for (const k of wanted.get(ref) ?? []) result(k, id);
      if (ours && !uses.get(ref)) this.binding.deleteTensor(id);
    };
    for (const [variable, value] of before) {
      const slot = this.slots.get(variable);
      if (slot) give(`${slot.name}/read`, this.idOf(value), false);
    }
    for (const [k, name] of compiled.feeds.split(',').entries()) if (name) give(name, this.idOf(feeds[k]!), false);
    for (const node of nodes) {
      const { name, op, inputs, attrs, outputs, constant } = node;
      const start = performance.now();
      if (constant) give(name, this.binding.createTensor(outputs[0]!.shape, outputs[0]!.dtype, constant));
      else {
        const own = attrs.filter(attr => attr.name !== XLA.name);
        const refs = inputs.map(ref => ids.get(ref)!);
        const made = this.binding.executeOp(op, own, refs, outputs.length);
        made.forEach(({ id }, k) => {
          give(k ? `${name}:${k}` : name, id);
        });
      }
      node.ms = performance.now() - start;
      for (const ref of inputs) {
        const left = uses.get(ref)! - 1;
        uses.set(ref, left);
        const id = ids.get(ref)!;
        if (left === 0 && !notOurs.has(id)) this.binding.deleteTensor(id);
      }
    }
  }

  /** A new session with all functions. The state is in the variables until the next run sends it. */
  private load(name: string, compiled: Compiled): void {
    this.close();
    const slots = [...this.slots.values()];
    const functions = [...this.functions, compiled];
    const file = savedModel([...slots.flatMap(slotNodes), ...functions.flatMap(({ nodes }) => nodes)]);
    const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'graph-'));
    const start = performance.now();
    try {
      fs.writeFileSync(path.join(folder, 'saved_model.pb'), file);
      this.session = this.binding.loadSavedModel(folder, 'serve');
    } finally {
      fs.rmSync(folder, { recursive: true });
    }
    this.loaded = slots;
    let bytes = 0;
    let group: Slot[] = [];
    for (const slot of slots) {
      bytes += 4 * slot.variable.size;
      if (bytes > GROUP_BYTES) [bytes, group] = [4 * slot.variable.size, []];
      group.push(slot);
      slot.group = group;
    }
    this.functions.push(compiled);
    const loadMs = performance.now() - start;
    const [ops, nodes] = [compiled.ops, compiled.nodes.length];
    Object.assign(this.stats, { bytes: file.length, loadMs });
    this.options.log(
      `${name}: ${ops} operations became ${nodes} nodes of a graph of ${(file.length / 2 ** 20).toFixed(1)} MiB, ` +
        `loaded in ${loadMs.toFixed(0)} ms`,
    );
  }

  /** Into the reports. */
  private count(name: string, { ops, nodes }: Compiled): void {
    const byOp: FunctionStats['byOp'] = {};
    for (const { op, ms = 0 } of nodes) {
      const sum = byOp[op] ?? { nodes: 0, ms: 0 };
      byOp[op] = { nodes: sum.nodes + 1, ms: sum.ms + ms };
    }
    this.stats.functions.push({ name, ops, nodes: nodes.length, byOp });
  }

  private run({ feeds, fetches, outputs, assigned }: Compiled, tensors: tf.Tensor[]): Outputs {
    if (this.session === undefined) throw new Error('the graph was disposed of');
    this.push();
    for (const slot of assigned) this.expire(slot);
    const ids = this.backend.getInputTensorIds(tensors);
    const metas = this.binding.runSavedModel(this.session, ids, feeds, fetches);
    this.binding.deleteTensor(metas.pop()!.id);
    return Object.fromEntries(metas.map((meta, i) => [outputs[i]!, this.backend.createOutputTensor(meta)]));
  }

  private slot(variable: tf.Variable): Slot {
    const slot = this.slots.get(variable) ?? { name: `v${this.slots.size}`, variable };
    this.slots.set(variable, slot);
    return slot;
  }

  /** Sends the variables that were assigned outside to the session. Every run begins with it. */
  push(): void {
    const changed = this.loaded.filter(({ variable, stub }) => !variable.isDisposed && variable.dataId !== stub);
    if (changed.length === 0) return;
    const ids = this.backend.getInputTensorIds(changed.map(({ variable }) => variable));
    for (const slot of changed) this.settle(slot);
    const names = (end: string) => changed.map(({ name }) => `${name}/${end}`).join();
    const done = this.binding.runSavedModel(this.session!, ids, names('new'), names('done'));
    for (const { id } of done) this.binding.deleteTensor(id);
    for (const slot of changed) this.attach(slot);
  }

  /** Fetches variables, all if none are named. Looking at one fetches its group. */
  pull(wanted = this.loaded): void {
    const slots = wanted.filter(({ variable, stub }) => !variable.isDisposed && variable.dataId === stub);
    const stubs = slots.map(({ stub }) => this.backend.tensorMap.get(stub!));
    if (stubs.every(({ id }) => id >= 0)) return;
    const names = slots.map(({ name }) => `${name}/read`).join();
    this.binding.runSavedModel(this.session!, [], '', names).forEach(({ id }, i) => {
      if (stubs[i]!.id < 0) stubs[i]!.id = id;
      else this.binding.deleteTensor(id);
    });
  }

  /** The session has the variable's value: a stub replaces its data, which is freed unless shared. */
  private attach(slot: Slot): void {
    const { variable } = slot;
    const tensor = this.backend.createOutputTensor({ id: -1, shape: variable.shape, dtype: dtypeOf(variable) });
    variable.assign(tensor);
    tensor.dispose();
    const stub = this.backend.tensorMap.get(tensor.dataId);
    slot.stub = tensor.dataId;
    fetchers.set(tensor.dataId, () => {
      if (stub.id < 0) this.pull(slot.group);
    });
  }

  /** The stub becomes ordinary data with the session's present value, for whoever still has it. */
  private settle(slot: Slot): void {
    if (!slot.stub) return;
    if (this.backend.tensorMap.has(slot.stub)) fetchers.get(slot.stub)?.();
    fetchers.delete(slot.stub);
    slot.stub = undefined;
  }

  /** What was fetched of a variable is dropped: the session may change it. A clone made outside keeps it. */
  private expire(slot: Slot): void {
    if (slot.variable.isDisposed) return;
    const stub = this.backend.tensorMap.get(slot.stub!);
    if (stub.refCount > 1) {
      this.settle(slot);
      this.attach(slot);
    } else if (stub.id >= 0) {
      this.binding.deleteTensor(stub.id);
      stub.id = -1;
    }
  }

  private close(): void {
    this.pull();
    for (const slot of this.loaded) this.settle(slot);
    if (this.session !== undefined) this.binding.deleteSavedModel(this.session);
    this.session = undefined;
    this.loaded = [];
  }

  /** Frees the session. The variables keep their values, the compiled functions no longer work. */
  dispose(): void {
    this.close();
    this.functions.length = 0;
    this.slots.clear();
  }
}

/** Euclidean distance of two tensors, or the norm of one; equal infinities and NaNs are no distance. */
function distance(a: Values, b?: Values): number {
  let sum = 0;
  for (let i = 0; i < a.length; i++) {
    const [x, y] = [a[i]!, b ? b[i]! : 0];
    if (!Object.is(x, y)) sum += (x - y) ** 2;
  }
  return Math.sqrt(sum);
}
