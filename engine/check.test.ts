/**
 * The check of compiled functions, on all functions of the method: a stand-in for an engine computes with the WASM kernels,
 * but rounds as an engine of that precision would. It must pass; one with a wrong node must not.
 */
import assert from 'node:assert/strict';
import path from 'node:path';
import { after, test } from 'node:test';
import * as tf from '@tensorflow/tfjs';
import * as nano from '../nano-param-decomp.ts';
import { harvest, harvestPass } from '../postprocess/harvest.ts';
import { scoreRules } from '../postprocess/scoreboard.ts';
import { type CompileOptions, compiler, type Runtime } from './compile.ts';
import { type Node, type Recording, runNode, type Value } from './record.ts';

const wasm = await nano.startEngine({ ...nano.DEFAULTS, engine: 'wasm' });
const target = await nano.loadTarget(path.join(import.meta.dirname, '../tools/fixtures/method/simple_mlp'));

// ---- The stand-in ----

/** Numbers with so many bits of mantissa. */
function rounded(x: tf.Tensor, bits: number): tf.Tensor {
  const raw = new Int32Array((x.dataSync() as Float32Array).slice().buffer);
  const low = 23 - bits;
  return tf.tensor(new Float32Array(raw.map(i => ((i + (1 << (low - 1))) >> low) << low).buffer), x.shape);
}
let noise = 1;
/** A relative error of up to 2⁻²², as from another order of summation or another approximation. */
const jittered = (x: tf.Tensor): tf.Tensor => {
  const next = () => {
    noise = (Math.imul(noise, 1664525) + 1013904223) | 0;
    return noise / 2 ** 31;
  };
  return tf.tensor(
    (x.dataSync() as Float32Array).map(v => v * (1 + next() * 2 ** -22)),
    x.shape,
  );
};
const PRECISIONS: Record<string, CompileOptions & { bits: number }> = {
  float32: { bits: 23, tolerance: 1e-3, products: 2 ** -16 },
  tf32: { bits: 10, tolerance: 0.01, products: 2 ** -9 },
  bf16: { bits: 7, tolerance: 0.03, products: 2 ** -6 },
};
const INEXACT = /^(BatchMatMul|Sum|Mean|Exp|Log|Tanh|Erf|Softmax|RealDiv|Sqrt|Rsqrt|Cos|Sin)$/;

/** The wrong node in place of one, if it is to be wrong. */
type Mutate = (node: Node, recording: Recording) => Node | undefined;
/** `effect`: the largest difference that a wrong node made, relative to its result's norm. */
function standIn(precision: string, mutate?: Mutate, effect = { size: 0 }) {
  let recorded: Recording;
  const { bits, ...options } = PRECISIONS[precision]!;
  const compute = (nodes: Node[], given: ReadonlyMap<Value, tf.Tensor>, wanted: Value[]): tf.Tensor[] =>
    tf.tidy(() => {
      const have = new Map(given);
      const of = (x: Value) => (x.constant ? tf.tensor(x.constant, x.shape, x.dtype) : have.get(x)!);
      for (const right of nodes) {
        const node = mutate?.(right, recorded) ?? right;
        const product = node.kernel === 'BatchMatMul' && bits < 23;
        const inputs = node.inputs.map(x => (product ? rounded(of(x), bits) : of(x)));
        let outputs = runNode(node, inputs);
        if (bits === 7 && product) outputs = outputs.map(x => rounded(x, bits));
        if (INEXACT.test(node.kernel)) outputs = outputs.map(jittered);
        if (node !== right) {
          const [a, b] = [runNode(right, right.inputs.map(of))[0]!, outputs[0]!].map(x => x.cast('float32'));
          const [off, norm] = [tf.norm(tf.sub(a!, b!)), tf.norm(a!)].map(x => x.dataSync()[0]!);
          effect.size = Math.max(effect.size, off! / (norm! + 1e-9));
        }
        for (const [k, output] of node.outputs.entries()) have.set(output, outputs[k]!);
      }
      return wanted.map(of).map(x => x.clone());
    });
  const runtime: Runtime<Recording> = {
    load: async recording => {
      recorded = recording;
      return recording;
    },
    evaluate: async (nodes, given, wanted) => compute(nodes, given, wanted),
    run: async ({ feeds, variables, nodes, outputs, assigned }, fed) => {
      const given = new Map<Value, tf.Tensor>();
      for (const [key, value] of feeds) given.set(value, fed[key]!);
      for (const [variable, value] of variables) given.set(value, variable);
      const results = compute(nodes, given, [...outputs.values(), ...assigned.values()]);
      const moved = results.splice(outputs.size);
      for (const [i, variable] of [...assigned.keys()].entries()) variable.assign(moved[i]!);
      tf.dispose(moved);
      return Object.fromEntries([...outputs.keys()].map((key, i) => [key, results[i]!]));
    },
  };
  return { ...wasm, ...compiler(runtime, options) } as nano.Engine;
}

// ---- All functions that the method compiles, on a random state ----

const rows: nano.Rows = {
  count: 3,
  seqLen: 7,
  row: i => Int32Array.from({ length: 7 }, (_, k) => (5 * i + 3 * k) % 20),
};
async function everything(engine: nano.Engine, seed: number): Promise<void> {
  const random = (n: number, purpose: number) => nano.uniformArray(n, seed, 1, purpose);
  const start = (R: number) => {
    const [pEnd = 0] = random(1, 1000);
    const sizes = {
      ciDModel: 16,
      ciNBlocks: 1,
      ciNHeads: 2,
      ciMlpHidden: 24,
      batchSize: 3,
      evalBatchSize: 3,
      seqLen: 7,
    };
    const run = { microBatches: R, nSteps: 3, faithfulnessWarmupSteps: 1, pgdEvalNSteps: 1, seed, pEnd: 0.3 + pEnd };
    const config = { ...nano.DEFAULTS, ...sizes, ...run, ciAliveThreshold: 0.05 };
    const modules = nano.chooseModules(target.linears, '*=9');
    const problem: nano.Problem = { target, modules, config };
    const params = nano.initialParams(problem);
    // from the first step of a run to the last: components of all sizes, an importance near every threshold
    const scale = 0.2 + 2 * random(1, 1001)[0]!;
    for (const [i, param] of Object.values(params).entries())
      param.assign(tf.mul(param, tf.tensor(random(param.size, 2000 + i), param.shape).mul(scale)));
    const state = nano.initialState(problem, params);
    return { problem, params, state };
  };
  for (const R of [1, 3]) {
    const { problem, state } = start(R);
    const step = nano.compileStep(engine, problem, state);
    await step(0, rows);
    await step(1, rows);
  }
  const { problem, params, state } = start(1);
  for await (const loss of nano.warmUp(engine, problem, state)) assert.ok(loss > 0);
  await nano.compileEvaluation(engine, problem, params)(rows, 1, true);
  const data = { train: rows, heldOut: rows } as nano.Data;
  const labels = {
    rules: [{ name: 'a' }],
    labels: [...Array(3)].map((_, i) => [...Array(7)].map((_, k) => ((i + k) % 2 ? [0] : []))),
  };
  await scoreRules({ engine, problem, params, data }, labels);
  const { vocab } = target.arch;
  const texts = { vocabSize: vocab, tokenText: String, passages: [] };
  await harvest({ ...texts, engine, pass: harvestPass(problem, params), modules: problem.modules, rows });
}
const STATES = process.env.NANO_LONG_TESTS ? 50 : 1;

for (const precision of Object.keys(PRECISIONS))
  test(`no false alarm: ${STATES} random states, all functions, rounding of ${precision}`, async () => {
    const names = new Set<string>();
    const engine = standIn(precision);
    const compile: nano.Engine['compile'] = (name, fn) => {
      names.add(name);
      return engine.compile(name, fn);
    };
    for (let seed = 0; seed < STATES; seed++) {
      await nano.tidyAsync(() => everything({ ...engine, compile }, seed));
      for (const variable of Object.values(tf.engine().registeredVariables))
        if (![...target.weights.values()].includes(variable)) variable.dispose();
    }
    const all = [
      'alive',
      'answers',
      'evaluate',
      'harvest',
      'hidden acts',
      'pgd',
      'shard',
      'step',
      'update',
      'warm-up',
      'without',
    ];
    assert.deepEqual([...names].sort(), all);
  });

// ---- Wrong nodes ----

const fed = (value: Value, { feeds }: Recording) => [...feeds.values()].includes(value);
const alike = (a: Value, b: Value) => a !== b && a.dtype === b.dtype && `${a.shape}` === `${b.shape}`;
const withInput = (node: Node, i: number, x: Value): Node => ({ ...node, inputs: node.inputs.with(i, x) });
const constant = (like: Value, x: number): Value => ({
  ...{ id: -1, shape: like.shape, dtype: like.dtype },
  constant: new { float32: Float32Array, int32: Int32Array, bool: Uint8Array }[like.dtype](
    tf.util.sizeFromShape(like.shape),
  ).fill(x),
});
/** What may be wrong with a node, by name; undefined where a node can't have that mistake. */
const MUTATIONS: Record<string, (node: Node, recording: Recording) => Node | undefined> = {
  'a dropped term': node =>
    /^(Add|Sub)$/.test(node.kernel) && alike(node.outputs[0]!, node.inputs[0]!)
      ? withInput(node, 1, constant(node.inputs[1]!, 0))
      : undefined,
  'a dropped factor': node =>
    /^(Multiply|RealDiv)$/.test(node.kernel) ? withInput(node, 1, constant(node.inputs[1]!, 1)) : undefined,
  'a wrong transpose': node => {
    const [, b] = node.inputs;
    const square = node.kernel === 'BatchMatMul' && b!.shape.at(-1) === b!.shape.at(-2);
    return square ? { ...node, attrs: { ...node.attrs, transposeB: !node.attrs.transposeB } } : undefined;
  },
  'swapped factors of a difference': node =>
    node.kernel === 'Sub' && `${node.inputs[0]!.shape}` === `${node.inputs[1]!.shape}`
      ? { ...node, inputs: node.inputs.toReversed() }
      : undefined,
  'a stale variable': (node, { variables }) => {
    for (const [i, x] of node.inputs.entries())
      for (const old of variables.values()) if (alike(x, old) && x.node) return withInput(node, i, old);
    return undefined;
  },
  'a baked-in number': (node, recording) => {
    const i = node.inputs.findIndex(x => fed(x, recording) && x.dtype === 'float32');
    return i < 0 ? undefined : withInput(node, i, constant(node.inputs[i]!, 0.123));
  },
  'another comparison': node =>
    ({ Greater: 'Less', GreaterEqual: 'Less', LessEqual: 'Greater' })[node.kernel]
      ? { ...node, kernel: { Greater: 'Less', GreaterEqual: 'Less', LessEqual: 'Greater' }[node.kernel]! }
      : undefined,
  'a sum over the wrong axis': node => {
    const { axis } = node.attrs as { axis?: number[] };
    const [a, b] = node.inputs[0]?.shape ?? [];
    return node.kernel === 'Sum' && axis?.length === 1 && node.inputs[0]!.shape.length === 2 && a === b
      ? { ...node, attrs: { ...node.attrs, axis: [1 - axis[0]!] } }
      : undefined;
  },
};
test('every wrong node is found', async () => {
  // every function with its feeds, as the method calls it
  type Function = (feeds: nano.Rows) => never;
  const calls = new Map<string, [Function, Record<string, tf.Tensor>]>();
  const compile = (name: string, fn: Function) => async (feeds: Record<string, tf.Tensor>) => {
    const copies = Object.entries(feeds).map(([key, x]) => [key, tf.keep(x.clone())]);
    if (!calls.has(name)) calls.set(name, [fn, Object.fromEntries(copies)]);
    return tf.tidy(() => fn(feeds as never));
  };
  await nano.tidyAsync(() => everything({ ...wasm, compile: compile as never }, 7));
  const found = new Map(Object.keys(MUTATIONS).map(kind => [kind, 0]));
  for (const [name, [fn, feeds]] of calls) {
    /** The error of a call with a wrong node, and what difference that node made. */
    const call = async (mutate: Mutate) => {
      const effect = { size: 0 };
      const engine = standIn('float32', mutate, effect);
      const job = () => engine.compile(name, fn as never)(feeds as never);
      const error = await nano.tidyAsync(() =>
        job().then(
          () => undefined,
          (error: Error) => error,
        ),
      );
      return { error, effect: effect.size };
    };
    for (const [kind, mutation] of Object.entries(MUTATIONS)) {
      let places: number[] = [];
      await call((_, recording) => {
        places = recording.nodes.flatMap((node, i) => (mutation(node, recording) ? [i] : []));
        return undefined;
      });
      // some places of each kind: the first, the last, and between
      for (const i of new Set([0, 0.4, 0.7, 1].map(part => places[Math.round(part * (places.length - 1))]))) {
        if (i === undefined) continue;
        const { error, effect } = await call((node, recording) =>
          node === recording.nodes[i] ? mutation(node, recording) : undefined,
        );
        const where = `${kind} in ${name}, node ${i}`;
        if (error) assert.match(error.message, /disagree/, where);
        // what is lost in the rounding (+ 1e-6, times 1) is no mistake in these numbers
        assert.ok(error || effect < 1e-4, `${where}: was not found, though it makes a difference of ${effect}`);
        if (error) found.set(kind, found.get(kind)! + 1);
      }
    }
  }
  for (const [kind, n] of found) assert.ok(n > 0, `${kind}: nowhere`);
});
after(() => tf.disposeVariables());
