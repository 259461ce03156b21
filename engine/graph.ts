/**
 * TensorFlow as the engine of compiled functions: ONE call of a session in place of thousands from JavaScript, on stock
 * tfjs-node, like Python's tf.function:
 *
 *   const graph = new Graph();
 *   const step = graph.compile('step', ({ x, lr }) => { w.assign(w.sub(…)); return { loss }; });
 *   const { loss } = await step({ x, lr });
 *
 * The nodes of all functions are written as one SavedModel and loaded into one session: they share its variables. A feed
 * is a Placeholder; a tf.Variable is a VarHandleOp and ReadVariableOp, and an AssignVariableOp where a function assigns it.
 *
 * The state lives in the session. In TFJS a variable then has a stub for its data, which is fetched when somebody looks
 * at it; a variable that was assigned outside is sent before the next run. So variables work anywhere.
 */
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import * as tf from '@tensorflow/tfjs';
import { type Data, toTensor } from './check.ts';
import { type CompileOptions, compiler, type Runtime } from './compile.ts';
import { graphNodes, shapeAttr, typeAttr } from './graph-def.ts';
import { registerUniform } from './random.ts';
import type { Node as Kernel, Numbers, Recording, Tensors, Value } from './record.ts';
import { type Attr, AttrType, constAttrs, DataType, type Node, savedModel } from './saved-model.ts';

export interface GraphOptions extends Partial<CompileOptions> {
  /** compile with XLA what it can: then every function takes long once, and again when a new one joins */
  xla?: boolean;
  /** round matrix products to bfloat16, as `useBf16Products` does for those outside of graphs */
  bf16?: boolean;
}

/** Variables are fetched in groups of so many bytes: a session makes a plan for every new set of fetches, in 50 ms. */
const GROUP_BYTES = 2 ** 27;

// ---- The parts of tfjs-node that are used -----------------------------------------------------------------

interface Meta {
  id: number; // of the binding's tensor; -1: none yet
  shape: number[];
  dtype: number;
}
interface Binding {
  createTensor(shape: number[], dtype: number, values: Numbers): number;
  deleteTensor(id: number): void;
  tensorDataSync(id: number): Numbers;
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
  readSync(dataId: object): Numbers;
}

const dtypeOf = (tensor: tf.TensorInfo): number => {
  const dtype = DataType[tensor.dtype];
  if (dtype === undefined) throw new Error(`a graph cannot hold a tensor of type ${tensor.dtype}`);
  return dtype;
};
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

/** A recorded function as it stands in the session. */
interface Loaded {
  nodes: Node[];
  feeds: [key: string, name: string][];
  fetches: string; // the outputs' names, and the last is of what waits for the assignments
  recording: Recording;
}

const fetchers = new WeakMap<object, () => void>(); // stub -> what fetches its value

/** Whoever looks at a stub has it fetched. Set once. */
function hook(backend: Backend & { hooked?: boolean }): void {
  if (backend.hooked) return;
  backend.hooked = true;
  const { getInputTensorIds, readSync } = backend;
  backend.getInputTensorIds = tensors => {
    for (const { dataId } of tensors) fetchers.get(dataId)?.();
    return getInputTensorIds.call(backend, tensors);
  };
  backend.readSync = dataId => {
    fetchers.get(dataId)?.();
    return readSync.call(backend, dataId);
  };
}

/** A placeholder, and a copy of what is fed: that may lie in JavaScript's memory, which TensorFlow's threads must not free. */
const feedNodes = (name: string, shape: number[], dtype: number): Node[] => [
  { name, op: 'Placeholder', inputs: [], attrs: [typeAttr('dtype', dtype), shapeAttr(shape)] },
  { name: `${name}/copy`, op: 'DeepCopy', inputs: [name], attrs: [typeAttr('T', dtype)] },
];

export class Graph implements Runtime<Loaded> {
  readonly compile: ReturnType<typeof compiler<Loaded>>['compile'];
  readonly picture: ReturnType<typeof compiler<Loaded>>['picture'];
  /** For reports. */
  readonly functions: ReturnType<typeof compiler<Loaded>>['functions'];
  private readonly backend: Backend;
  private readonly binding: Binding;
  private readonly options: GraphOptions;
  private readonly slots = new Map<tf.Variable, Slot>();
  private readonly all: Loaded[] = [];
  private loaded: Slot[] = []; // the slots that the session has
  private session: number | undefined;
  private made = 0; // functions, for their names

  constructor(options: GraphOptions = {}) {
    if (tf.getBackend() !== 'tensorflow') throw new Error("Graph needs TFJS's backend 'tensorflow'");
    this.backend = tf.backend() as unknown as Backend;
    this.binding = this.backend.binding;
    this.options = options;
    hook(this.backend);
    registerUniform();
    ({
      compile: this.compile,
      functions: this.functions,
      picture: this.picture,
    } = compiler(this, { tolerance: 1e-3, products: 2 ** -16, ...options }));
  }

  /** The nodes of a function. */
  private lower(recording: Recording): Loaded {
    const prefix = `f${this.made++}`;
    const names = new Map<Value, string>();
    const feeds: Loaded['feeds'] = [];
    const before: Node[] = [];
    for (const [key, value] of recording.feeds) {
      const name = `${prefix}/feed${feeds.length}`;
      before.push(...feedNodes(name, value.shape, DataType[value.dtype]!));
      names.set(value, `${name}/copy`);
      feeds.push([key, name]);
    }
    for (const [variable, value] of recording.variables) names.set(value, `${this.slot(variable).name}/read`);
    const { nodes, refOf } = graphNodes(recording.nodes, prefix, names, this.options);
    const fetches: string[] = [];
    for (const value of recording.outputs.values()) {
      const name = `${prefix}/out${fetches.length}`;
      const ref = refOf(value);
      nodes.push({ name, op: 'Identity', inputs: [ref], attrs: [typeAttr('T', DataType[value.dtype]!)] });
      fetches.push(name);
    }
    // every read happens before any assignment
    const reads = [...recording.variables.keys()].map(variable => `^${this.slot(variable).name}/read`);
    const sets: string[] = [];
    for (const [variable, value] of recording.assigned) {
      const name = `${prefix}/set${sets.length}`;
      const inputs = [`${this.slot(variable).name}/handle`, refOf(value), ...reads];
      nodes.push({ name, op: 'AssignVariableOp', inputs, attrs: [typeAttr('dtype', dtypeOf(variable))] });
      sets.push(`^${name}`);
    }
    nodes.push({ name: `${prefix}/done`, op: 'Const', inputs: sets, attrs: NOTHING });
    return { nodes: [...before, ...nodes], feeds, fetches: [...fetches, `${prefix}/done`].join(), recording };
  }

  /** A session of these nodes. */
  private open(nodes: Node[]): number {
    const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'graph-'));
    try {
      fs.writeFileSync(path.join(folder, 'saved_model.pb'), savedModel(nodes));
      return this.binding.loadSavedModel(folder, 'serve');
    } finally {
      fs.rmSync(folder, { recursive: true });
    }
  }

  /** A new session with all functions. The state is in the variables until the next run sends it. */
  async load(recording: Recording): Promise<Loaded> {
    const loaded = this.lower(recording);
    this.close();
    const slots = [...this.slots.values()];
    this.session = this.open([...slots.flatMap(slotNodes), ...[...this.all, loaded].flatMap(({ nodes }) => nodes)]);
    this.loaded = slots;
    let bytes = 0;
    let group: Slot[] = [];
    for (const slot of slots) {
      bytes += 4 * slot.variable.size;
      if (bytes > GROUP_BYTES) [bytes, group] = [4 * slot.variable.size, []];
      group.push(slot);
      slot.group = group;
    }
    this.all.push(loaded);
    return loaded;
  }

  async run({ feeds, fetches, recording }: Loaded, given: Tensors): Promise<Tensors> {
    if (this.session === undefined) throw new Error('the graph was disposed of');
    this.push();
    for (const variable of recording.assigned.keys()) this.expire(this.slot(variable));
    const ids = this.backend.getInputTensorIds(feeds.map(([key]) => given[key]!));
    const metas = this.binding.runSavedModel(this.session, ids, feeds.map(([, name]) => name).join(), fetches);
    this.binding.deleteTensor(metas.pop()!.id);
    const keys = [...recording.outputs.keys()];
    return Object.fromEntries(metas.map((meta, i) => [keys[i]!, this.backend.createOutputTensor(meta)]));
  }

  /** In a session of their own, without XLA. */
  async evaluate(kernels: Kernel[], given: Map<Value, Data>, wanted: Value[]): Promise<tf.Tensor[]> {
    const inside = new Set(kernels.flatMap(({ outputs }) => outputs));
    const used = new Set(
      kernels.flatMap(({ inputs }) => inputs).filter(x => given.has(x) && !x.constant && !inside.has(x)),
    );
    const inputs = [...used].map((value, i) => ({ value, name: `in${i}` }));
    const placeholders = inputs.flatMap(({ value, name }) => feedNodes(name, value.shape, DataType[value.dtype]!));
    const names = new Map(inputs.map(({ value, name }) => [value, `${name}/copy`]));
    const { nodes, refOf } = graphNodes(kernels, 'n', names, { ...this.options, xla: false });
    const session = this.open([...placeholders, ...nodes]);
    const tensors = inputs.map(({ value }) => toTensor(given.get(value)!, value));
    const ids = this.backend.getInputTensorIds(tensors);
    const metas = this.binding.runSavedModel(
      session,
      ids,
      inputs.map(({ name }) => name).join(),
      wanted.map(refOf).join(),
    );
    this.binding.deleteSavedModel(session);
    for (const [i, { value }] of inputs.entries()) if (tensors[i] !== given.get(value)) tensors[i]!.dispose();
    return metas.map(meta => this.backend.createOutputTensor(meta));
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
    this.all.length = 0;
    this.slots.clear();
  }
}
