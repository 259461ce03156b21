/**
 * The check of compiled functions, on all functions of the method: a stand-in for an engine computes with the WASM kernels,
 * but rounds as an engine of that precision would. It must pass; one with a wrong node must not.
 */
import assert from 'node:assert/strict';
import path from 'node:path';
import { test } from 'node:test';
import * as tf from '@tensorflow/tfjs';
import * as nano from '../nano-param-decomp.ts';
import { harvest, harvestPass } from '../postprocess/harvest.ts';
import { compileMeasures } from '../postprocess/measures.ts';
import { scoreRules } from '../postprocess/scoreboard.ts';
import { type CheckOptions, checkCall, nodeError, toTensor } from './check.ts';
import { compiler, type Runtime } from './compile.ts';
import { type Node, type Recording, record, runNode, type Tensors, type Value } from './record.ts';

const wasm = await nano.startEngine({ ...nano.DEFAULTS, engine: 'wasm' });
const target = await nano.loadTarget(path.join(import.meta.dirname, '../tools/fixtures/method/simple_mlp'));

// ---- The stand-in ----

/** Numbers with so many bits of mantissa. */
function rounded(x: tf.Tensor, bits: number): tf.Tensor {
  const raw = new Int32Array((x.dataSync() as Float32Array).slice().buffer);
  const low = 23 - bits;
  return tf.tensor(new Float32Array(raw.map(i => ((i + (1 << (low - 1))) >> low) << low).buffer), x.shape);
}
const NOISE = nano.uniformArray(4099, 0, 0, 1);
let place = 0;
/** A relative error of up to 2⁻²², as from another order of summation or another approximation. */
function jittered(x: tf.Tensor): tf.Tensor {
  const numbers = (x.dataSync() as Float32Array).slice();
  for (let i = 0; i < numbers.length; i++) {
    place = (place + 1) % NOISE.length;
    numbers[i]! *= 1 + (NOISE[place]! - 0.5) * 2 ** -21;
  }
  return tf.tensor(numbers, x.shape);
}
type Precision = CheckOptions & { bits: number };
const PRECISIONS: Record<string, Precision> = {
  float32: { bits: 23, tolerance: 1e-3, products: 2 ** -16 },
  tf32: { bits: 10, tolerance: 0.01, products: 2 ** -9 },
  bf16: { bits: 7, tolerance: 0.03, products: 2 ** -6 },
};
const INEXACT = /^(BatchMatMul|Sum|Mean|Exp|Log|Tanh|Erf|Softmax|RealDiv|Sqrt|Rsqrt|Cos|Sin)$/;

/** A node's results, with the rounding of that precision. */
function standIn(node: Node, inputs: tf.Tensor[], { bits }: Precision): tf.Tensor[] {
  const short = node.kernel === 'BatchMatMul' && bits < 23;
  let outputs = runNode(node, short ? inputs.map(x => rounded(x, bits)) : inputs);
  if (bits === 7 && short) outputs = outputs.map(x => rounded(x, bits));
  return INEXACT.test(node.kernel) ? outputs.map(jittered) : outputs;
}
type Values = Map<Value, tf.Tensor>;
const tensorOf = (x: Value, have: ReadonlyMap<Value, tf.Tensor>) =>
  x.constant ? tf.tensor(x.constant, x.shape, x.dtype) : have.get(x)!;
/** Computes the nodes; `wrong`: what stands in place of a node. */
function compute(nodes: Node[], have: Values, precision: Precision, wrong = (node: Node) => node): void {
  for (const right of nodes) {
    const node = wrong(right);
    const inputs = node.inputs.map(x => tensorOf(x, have));
    const outputs = standIn(node, inputs, precision);
    for (const [k, output] of right.outputs.entries()) have.set(output, outputs[k]!);
  }
}
/** Feeds and variables as they are now. */
function givenOf({ feeds, variables }: Recording, fed: Tensors): Values {
  const fromFeeds = [...feeds].map(([key, value]) => [value, fed[key]!] as const);
  return new Map([...fromFeeds, ...[...variables].map(([variable, value]) => [value, variable.clone()] as const)]);
}
/** Runs the recording, moves the state on. */
function run(recording: Recording, feeds: Tensors, precision: Precision, wrong?: (node: Node) => Node): Tensors {
  const { nodes, outputs, assigned } = recording;
  const have = givenOf(recording, feeds);
  compute(nodes, have, precision, wrong);
  for (const [variable, value] of assigned) variable.assign(tensorOf(value, have));
  return Object.fromEntries([...outputs].map(([key, value]) => [key, tensorOf(value, have).clone()]));
}
const evaluateWith =
  (precision: Precision, wrong?: (node: Node) => Node): Runtime<Recording>['evaluate'] =>
  async (nodes, given, wanted) =>
    tf.tidy(() => {
      const have = new Map([...given].map(([value, x]) => [value, toTensor(x, value)]));
      compute(nodes, have, precision, wrong);
      return wanted.map(x => tensorOf(x, have).clone());
    });

// ---- All functions that the method compiles ----

/** What is to be done with a call of a function. It returns the results, and moves the state on. */
type OnCall = (name: string, recording: Recording, feeds: Tensors) => Promise<Tensors>;
let onCall: OnCall;
/** Recordings by name and shapes: they are the same for all states. */
const recordings = new Map<string, Recording>();
const engine = {
  ...wasm,
  compile: (name: string, fn: (feeds: Tensors) => Tensors) => (feeds: Tensors) => {
    const key = `${name} ${Object.entries(feeds).map(([as, { shape }]) => `${as} ${shape}`)}`;
    const recording = recordings.get(key) ?? record(feeds, fn);
    if (name !== 'harvest') recordings.set(key, recording); // each harvest has variables of its own
    return onCall(name, recording, feeds);
  },
} as unknown as nano.Engine;
const FUNCTIONS = 'alive answers evaluate harvest hidden~acts ladder pgd read shard step update use warm-up without'
  .split(' ')
  .map(name => name.replace('~', ' '));

const [ROWS, LENGTH] = [2, 5];
function world(microBatches: number) {
  const ci = { ciDModel: 8, ciNBlocks: 1, ciNHeads: 2, ciMlpHidden: 12 };
  const sizes = { batchSize: ROWS, evalBatchSize: ROWS, seqLen: LENGTH, microBatches, ppgdInnerSteps: 1, nSteps: 3 };
  const few = { faithfulnessWarmupSteps: 1, pgdEvalNSteps: 1, ciAliveThreshold: 0.05, gradClipCi: 1 };
  const config: nano.Config = { ...nano.DEFAULTS, ...ci, ...sizes, ...few };
  const problem: nano.Problem = { target, modules: nano.chooseModules(target.linears, '*=6'), config };
  const params = nano.initialParams(problem);
  const state = nano.initialState(problem, params);
  const { m, v, sources } = state;
  const squares = [v.components, v.ci_fn, sources.v];
  const moments = [m.components, m.ci_fn, sources.m, ...squares];
  const starts = [...Object.values(params), sources.s].map(x => [x, x.clone()] as const);
  /** From the first step of a run to the last: components of all sizes, an importance near every threshold. */
  const shuffle = (seed: number) => {
    const random = (x: tf.Tensor, purpose: number) =>
      tf.tensor(nano.uniformArray(x.size, seed, microBatches, purpose), x.shape, 'float32');
    const [pEnd = 0, size = 0] = nano.uniformArray(2, seed, microBatches, 999);
    config.pEnd = 0.3 + pEnd;
    tf.tidy(() => {
      for (const [i, [x, start]] of starts.entries()) {
        const part = random(x, 2000 + i);
        x.assign(x === sources.s ? part : start.mul(part.mul(0.2 + 2 * size)));
      }
      for (const [i, x] of moments.entries()) {
        const drawn = random(x, 3000 + i).sub(squares.includes(x) ? 0 : 0.5);
        x.assign(seed % 4 === 0 ? tf.zerosLike(x) : drawn.mul(1e-3 * size)); // 0 at a run's first step
      }
    });
  };
  return { problem, params, state, shuffle, step: nano.compileStep(engine, problem, state) };
}
const [one, shards] = [world(1), world(2)];
const evaluation = nano.compileEvaluation(engine, one.problem, one.params);

/** Calls every function once or more. */
async function everything(seed: number): Promise<void> {
  const { vocab } = target.arch;
  const token = nano.uniformArray(ROWS * LENGTH, seed, 0, 998).map(x => Math.floor(x * vocab));
  const row = (i: number) => Int32Array.from(token.subarray(i * LENGTH, (i + 1) * LENGTH));
  const rows: nano.Rows = { count: ROWS, seqLen: LENGTH, row };
  for (const { shuffle } of [one, shards]) shuffle(seed);
  const { problem, params } = one;
  await evaluation(rows, 1, true);
  const inForce = [...Array(ROWS)].map((_, i) => [...Array(LENGTH)].map((_, k) => ((i + k) % 2 ? [0] : [])));
  const data = { train: rows, heldOut: rows } as nano.Data;
  await compileMeasures({ engine, problem, params, data })();
  await scoreRules({ engine, problem, params, data }, { rules: [{ name: 'a' }], labels: inForce });
  const texts = { vocabSize: vocab, tokenText: String, passages: [] };
  await harvest({ ...texts, engine, pass: harvestPass(problem, params), modules: problem.modules, rows });
  for (const { step } of [one, shards]) await step(seed % 3, rows);
  for await (const loss of nano.warmUp(engine, problem, one.state)) assert.ok(loss > 0);
}

/** The check's complaints about a call; the state moves on. */
async function complaints(recording: Recording, feeds: Tensors, precision: Precision, wrong?: (node: Node) => Node) {
  const before = new Map([...recording.variables.keys()].map(x => [x, x.clone()]));
  const call = async () => tf.tidy(() => run(recording, feeds, precision, wrong));
  const { wrong: found, outputs } = await checkCall(recording, feeds, call, evaluateWith(precision, wrong), precision);
  const back = () => {
    for (const variable of recording.assigned.keys()) variable.assign(before.get(variable)!);
  };
  return { found, outputs, back };
}

const STATES = process.env.NANO_LONG_TESTS ? 50 : 1;
test(`no false alarm: random states (${STATES}), all functions, rounding of float32, tf32 and bf16`, async () => {
  for (let seed = 0; seed < STATES; seed++) {
    const functions = new Set<string>();
    onCall = async (name, recording, feeds) => {
      // the functions that are called again and again are checked once
      const kinds = Object.entries(functions.has(name) ? {} : PRECISIONS);
      functions.add(name);
      for (const [kind, precision] of kinds) {
        const { found, back } = await complaints(recording, feeds, precision);
        assert.deepEqual(found, [], `${name}, ${kind}, state ${seed}`);
        back();
      }
      return tf.tidy(() => run(recording, feeds, PRECISIONS.float32!));
    };
    await nano.tidyAsync(() => everything(seed));
    assert.deepEqual([...functions].sort(), FUNCTIONS);
  }
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
  'a baked-in key': (node, recording) => {
    const i = node.inputs.findIndex(x => fed(x, recording) && x.dtype === 'int32');
    return i < 0 ? undefined : withInput(node, i, constant(node.inputs[i]!, 1));
  },
  'a constant off by 1%': node => {
    const i = node.inputs.findIndex(x => x.constant && x.dtype === 'float32');
    const x = node.inputs[i];
    return x && withInput(node, i, { ...x, constant: (x.constant as Float32Array).map(v => 1.01 * v) });
  },
  'another reduction': node => {
    const kernel = { Sum: 'Mean', Mean: 'Sum' }[node.kernel];
    return kernel ? { ...node, kernel } : undefined;
  },
};

const SEEDS = process.env.NANO_LONG_TESTS ? [0, 1, 2, 3, 4] : [1];
test('every wrong node of every function is found', async () => {
  const found = new Map(Object.keys(MUTATIONS).map(kind => [kind, 0]));
  const functions = new Set<string>();
  const missed: string[] = [];
  let same = 0;
  onCall = async (name, recording, feeds) => {
    const kinds = Object.entries(functions.has(name) ? {} : PRECISIONS).slice(0, process.env.NANO_LONG_TESTS ? 3 : 1);
    functions.add(name);
    for (const [as, precision] of kinds)
      tf.tidy(() => {
        const have = givenOf(recording, feeds);
        for (const [n, node] of recording.nodes.entries()) {
          compute([node], have, precision);
          for (const [kind, mutation] of Object.entries(MUTATIONS)) {
            const wrong = mutation(node, recording);
            if (!wrong) continue;
            const inputs = node.inputs.map(x => tensorOf(x, have));
            const outputs = standIn(
              wrong,
              wrong.inputs.map(x => tensorOf(x, have)),
              precision,
            );
            const error = nodeError(node, inputs, outputs, precision.products);
            if (error) found.set(kind, found.get(kind)! + 1);
            else {
              const [a, b] = [have.get(node.outputs[0]!)!, outputs[0]!].map(x => x.cast('float32'));
              const [off, norm] = [tf.norm(tf.sub(a!, b!)), tf.norm(a!)].map(x => x.dataSync()[0]!);
              // what is lost in the rounding (+ 1e-8, times 1) is no mistake in these numbers
              if (off! <= 1e-4 * norm!) same++;
              else missed.push(`${kind} in ${name}, ${as}, node ${n}: ${node.kernel} off by ${off! / norm!}`);
            }
          }
        }
      });
    return tf.tidy(() => run(recording, feeds, PRECISIONS.float32!));
  };
  for (const seed of SEEDS) {
    functions.clear();
    await nano.tidyAsync(() => everything(seed));
  }
  assert.deepEqual(missed, []);
  assert.deepEqual([...functions].sort(), FUNCTIONS);
  for (const [kind, n] of found) assert.ok(n >= 10, `${kind}: ${n} times`);
  const all = [...found.values()].reduce((a, b) => a + b, same);
  assert.ok(same < all / 4, `${same} of ${all} make no difference`);
});

test('a call with a wrong node is refused, and the state stays where the nodes show it', async () => {
  const precision = PRECISIONS.float32!;
  // a wrong node in the checked form and the one that runs; in the latter alone one that the loss shows: what such a one
  // does to the state is seen by its size alone, since at some states a few roundings send a step another way
  const cases: [both: boolean, place: number][] = [
    [true, 0.5],
    [false, 0],
  ];
  for (const [both, part] of cases) {
    let wrong: ((node: Node) => Node) | undefined;
    const runtime: Runtime<Recording> = {
      load: async recording => {
        const places = recording.nodes.filter(node => MUTATIONS['a dropped factor']!(node, recording));
        const place = places[Math.floor(part * (places.length - 1))]!;
        wrong = node => (node === place ? MUTATIONS['a dropped factor']!(node, recording)! : node);
        return recording;
      },
      run: async (recording, feeds) => tf.tidy(() => run(recording, feeds, precision, wrong)),
      evaluate: (...args) => evaluateWith(precision, both ? wrong : undefined)(...args),
    };
    one.shuffle(1);
    const { compile } = compiler(runtime, precision);
    const params = Object.values(one.params);
    const before = params.map(x => [...x.dataSync()]);
    const warmUp = nano.warmUp({ ...wasm, compile } as nano.Engine, one.problem, one.state);
    await assert.rejects(
      nano.tidyAsync(() => warmUp.next()),
      /^Error: warm-up\(.*disagree: /,
    );
    const after = params.map(x => [...x.dataSync()]);
    if (both) assert.deepEqual(after, before);
  }
});

test('a named recording of the step tells every loss, the adversary and the optimizer apart', async () => {
  const places = new Set<string>();
  const compile = (_: string, fn: (feeds: Tensors) => Tensors) => async (feeds: Tensors) => {
    for (const { where = '' } of record(feeds, fn, undefined, true).nodes) places.add(where);
    return { none: tf.scalar(0) };
  };
  const { problem, state } = one;
  const row = () => Int32Array.from({ length: LENGTH }, (_, i) => i);
  await nano.compileStep(
    { ...wasm, compile } as unknown as nano.Engine,
    problem,
    state,
  )(0, { count: 9, seqLen: LENGTH, row });
  const losses = ['faithfulnessLoss', 'importanceLoss', 'stochasticLoss', 'adversarialLoss'];
  for (const part of [
    ...losses.map(loss => `losses/of/${loss}`),
    'ascend/adam',
    'adamUpdate/adam',
    'importances/ciLogits',
  ])
    for (const end of part.startsWith('losses') ? ['', '/gradient'] : [''])
      assert.ok(
        [...places].some(place => place.includes(part) && place.endsWith(end)),
        `${part}${end}`,
      );
  assert.equal(
    record({}, () => ({ a: tf.add(problem.target.weights.values().next().value!, 1) })).nodes[0]!.where,
    undefined,
  );
});
