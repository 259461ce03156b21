/**
 * The method on every engine there is: against what PyTorch computes for two tiny targets (tools/make_fixtures.py says
 * what each key of tools/fixtures/method/ holds), and against formulas that are written out here once more. Then the
 * command line, and whole runs of the toy as child processes. The letters are those of nano-param-decomp.ts.
 */
import assert from 'node:assert/strict';
import { execFile, spawnSync } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import * as tf from '@tensorflow/tfjs';
import { loadPair } from './io/checkpoints.ts';
import { PRESETS } from './io/presets.ts';
import { openSafetensors } from './io/safetensors.ts';
import { loadTokenizer } from './io/tokenizer.ts';
import * as nano from './nano-param-decomp.ts';
import * as post from './postprocess/index.ts';
import type { Labels } from './postprocess/scoreboard.ts';

// ---- Tolerances -----------------------------------------------------------------------------------------------------
// The fixtures are computed in float64, the engines compute in float32.

/** of losses and metrics, relative */
const LOSS = 1e-5;
/** of logits, activations and other direct results, relative to the tensor's largest value */
const FORWARD = 1e-5;
/** of gradients and of Adam's moments, relative to the tensor's largest value */
const GRADIENT = 1e-4;
/** of parameters after steps, relative to the tensor's largest value … */
const PARAMETER = 1e-5;
/** … and of how far they moved, relative to the tensor's largest move */
const MOVE = 1e-4;
/** of the adversary's sources, which lie in [0, 1], absolute */
const SOURCE = 1e-5;
/** of what is the same computation with its float32 operations in another order, relative */
const REORDERED = 1e-5;
/** of slopes by differences in float32, relative */
const DIFFERENCE = 1e-3;
/** of what JavaScript computes in float64, relative */
const FLOAT64 = 1e-9;
/** of statistics, in standard deviations: chance is beyond it once in 16,000 times, but the keys are fixed */
const SIGMAS = 4;

type T = tf.Tensor;
type Numbers = ArrayLike<number>;
const numbers = (x: T | Numbers): number[] => Array.from(x instanceof tf.Tensor ? x.dataSync() : x);
const number = (x: T): number => numbers(x)[0]!;
const largest = (x: Numbers) => Array.from(x).reduce((max, value) => Math.max(max, Math.abs(value)), 0);

/** All |actual − expected| ≤ tolerance × scale: by default the largest |expected|, so never a comparison of zeros. */
function close(
  actual: T | Numbers,
  expected: T | Numbers,
  tolerance: number,
  what: string,
  scale = largest(numbers(expected)),
): void {
  const [a, b] = [numbers(actual), numbers(expected)];
  assert.equal(a.length, b.length, `${what}: number of values`);
  assert.ok(scale > 0, `${what}: nothing but zeros is expected`);
  const worst = largest(a.map((x, i) => x - b[i]!)) / scale; // NaN if one is
  assert.ok(worst <= tolerance, `${what}: off by ${worst.toExponential(2)}, allowed ${tolerance}`);
}
/** The same names, and each number close, relative to itself. */
function closeRecords(actual: Record<string, number>, expected: Record<string, number>, tolerance: number) {
  assert.deepEqual(Object.keys(actual).sort(), Object.keys(expected).sort());
  for (const [name, value] of Object.entries(expected)) close([actual[name]!], [value], tolerance, name);
}
/** The job ends with an error of use, in one line that names what is wrong. */
async function refused(message: RegExp, job: () => unknown): Promise<void> {
  const isRefusal = (error: Error) => {
    assert.equal(error.name, 'UsageError', error.stack);
    assert.match(error.message, message);
    assert.ok(!error.message.includes('\n'), error.message);
    return true;
  };
  await assert.rejects(async () => job(), isRefusal, `${message} was to be refused`);
}

// ---- Engines --------------------------------------------------------------------------------------------------------

const project = import.meta.dirname;
const toy = path.join(project, 'assets/toy');
const read = (dir: string, file: string) => fs.readFileSync(path.join(dir, file), 'utf8');
const temporary = fs.mkdtempSync(path.join(os.tmpdir(), 'nano-test-'));
after(() => fs.rmSync(temporary, { recursive: true }));

// All awaits of this file come before its first test: else node's runner may take the tests so far for all of them.
const toyTokenizer = loadTokenizer(toy);
// op by op: the traced graph is tested in engine/graph.test.ts, and by the runs of the toy below
const options = { ...nano.DEFAULTS, graph: false, threads: 1 };
const engines = [await nano.startEngine({ ...options, engine: 'wasm' })];
let noTensorFlow: string | false = false;
try {
  engines.push(await nano.startEngine({ ...options, engine: 'tensorflow', precision: 'float32' }));
} catch (error) {
  if ((error as Error).name !== 'UsageError') throw error;
  noTensorFlow = (error as Error).message;
}
test('tensorflow is an engine here', { skip: noTensorFlow }, () => assert.equal(engines.length, 2));

type Body = (engine: nano.Engine) => void | Promise<void>;
const onEngine = (engine: nano.Engine, name: string, body: Body) =>
  test(`${engine.name}: ${name}`, async () => {
    await tf.setBackend(engine.name);
    await nano.tidyAsync(async () => body(engine));
  });
const onWasm = (name: string, body: Body) => onEngine(engines[0]!, name, body);
const onEveryEngine = (name: string, body: Body) => {
  for (const engine of engines) onEngine(engine, name, body);
};

// ---- Fixtures -------------------------------------------------------------------------------------------------------

const TARGETS = ['simple_mlp', 'llama'] as const;
type TargetName = (typeof TARGETS)[number];
const LOSSES = ['faith', 'imp', 'stoch', 'ppgd'] as const;
const GROUPS = ['components', 'ci_fn'] as const;
const PARTS = ['s', 'm', 'v'] as const; // of the sources

type Losses = Record<(typeof LOSSES)[number], number>;
type StepNumbers = Losses & Record<'total' | 'clipNorm', number>;
/** fixture.json */
interface Answers extends Record<'p' | 'lr' | 'lrPpgd' | 't' | 'sourcesT', number> {
  config: Partial<nano.Config>;
  modules: Record<string, Record<'dIn' | 'dOut' | 'C', number>>;
  tokens: number[][];
  tokens2: number[][];
  losses: Losses & { imp3: number };
  step1: StepNumbers;
  step2: StepNumbers;
  accum: StepNumbers;
  whole: Losses & Record<'total' | 'ciNorm', number>;
  warmup: number[];
  schedules: Record<'nSteps' | 'step' | 'mainLr' | 'ppgdLr' | 'p', number>[];
  eval: nano.Metrics;
}
const fixtureFolder = (name: TargetName) => path.join(project, 'tools/fixtures/method', name);
const readAnswers = (name: TargetName): Answers => JSON.parse(read(fixtureFolder(name), 'fixture.json'));

/** A target with its decomposition, and PyTorch's answers. 3 rows of 7 tokens: N = 21 positions. */
async function fixture(name: TargetName, changes: Partial<nano.Config> = {}) {
  const dir = fixtureFolder(name);
  const { tokens: rows, tokens2: rows2, ...answers } = readAnswers(name);
  const file = await openSafetensors(path.join(dir, 'fixture.safetensors'));
  const stored = new Map([...file.tensors].map(([key, { shape }]) => [key, { shape, data: file.readFloat32(key) }]));
  file.close();
  const get = (key: string): T => {
    const { data, shape } = stored.get(key) ?? assert.fail(`no ${key} in the fixture of ${name}`);
    return tf.tensor(data, [...shape]);
  };
  const target = await nano.loadTarget(dir);
  const components = Object.entries(answers.modules).map(([module, { C }]) => `${module}=${C}`);
  const modules = nano.chooseModules(target.linears, components.join());
  const config = { ...nano.DEFAULTS, ...answers.config, batchSize: 3, seqLen: 7, ...changes };
  const problem: nano.Problem = { target, modules, config };
  const params = nano.initialParams(problem);
  for (const [param, variable] of Object.entries(params)) variable.assign(get(param)); // throws on another shape
  const draws = (key: string): nano.Draws => {
    return { u: get(`${key}/u`), delta: get(`${key}/u_delta`), route: get(`${key}/route`) };
  };
  const data: nano.Rows = { count: 3, seqLen: 7, row: i => Int32Array.from(rows[i]!) };
  const [tokens, tokens2] = [rows, rows2].map(x => tf.tensor2d(x, [3, 7], 'int32')) as [T, T];
  return { ...answers, name, config, problem, modules, params, get, draws, data, tokens, tokens2, N: 21 };
}
type Fixture = Awaited<ReturnType<typeof fixture>>;

const onEveryTarget = (name: string, body: (f: Fixture, engine: nano.Engine) => void | Promise<void>) => {
  for (const target of TARGETS)
    onEveryEngine(`${name} (${target})`, async engine => body(await fixture(target), engine));
};

type Vectors = Record<(typeof GROUPS)[number], T>;
const namesOf = (tensors: object, group: string) => Object.keys(tensors).filter(name => name.startsWith(group));
/** Tensors by name, side by side in one vector for each group. */
const sideBySide = (tensors: Record<string, T>) =>
  Object.fromEntries(
    GROUPS.map(group => [group, tf.concat(namesOf(tensors, group).map(name => tensors[name]!.flatten()))]),
  ) as Vectors;
/** And back: by the names and shapes of the parameters. */
function apart(vectors: Vectors, params: Record<string, T>): Record<string, T> {
  const tensors: Record<string, T> = {};
  for (const group of GROUPS) {
    const names = namesOf(params, group);
    const parts = tf.split(
      vectors[group],
      names.map(name => params[name]!.size),
    );
    for (const [i, name] of names.entries()) tensors[name] = parts[i]!.reshape(params[name]!.shape);
  }
  return tensors;
}

/** The state in the middle of a run, before the fixture's step1. */
function midRun(f: Fixture): nano.State {
  const state = nano.initialState(f.problem, f.params);
  const each = (make: (name: string, param: T) => T) =>
    sideBySide(Object.fromEntries(Object.entries(f.params).map(([name, p]) => [name, make(name, p)])));
  const m = each(name => f.get(`moments/m/${name}`));
  const v = each((name, param) => tf.mul(tf.onesLike(param), f.get(`moments/v/${name}`)));
  for (const group of GROUPS) {
    state.m[group].assign(m[group]);
    state.v[group].assign(v[group]);
  }
  for (const part of PARTS) state.sources[part].assign(f.get(`sources/${part}`));
  return state;
}

/** A step's numbers as feeds. */
function toFeeds({ ppgdC1, ppgdC2, p, lrMain, lrPpgd, c1, c2 }: ReturnType<typeof nano.schedule>) {
  return {
    ...{ p: tf.scalar(p), lrMain: tf.scalar(lrMain), lrPpgd: tf.scalar(lrPpgd) },
    ...{ c1: tf.scalar(c1), c2: tf.scalar(c2), ppgdC1: tf.tensor1d(ppgdC1), ppgdC2: tf.tensor1d(ppgdC2) },
  };
}
/** The feeds of the fixture's step1 (n = 0) and step2 (n = 1). */
function fixtureFeeds(f: Fixture, n: number) {
  const { ppgdBeta1, ppgdBeta2 } = f.config;
  const t = [1, 2, 3].map(k => f.sourcesT + 3 * n + k); // two inner steps and the one after the update
  return toFeeds({
    ...{ p: f.p, lrMain: f.lr, lrPpgd: f.lrPpgd },
    ...{ c1: 1 - 0.9 ** (f.t + n + 1), c2: 1 - 0.999 ** (f.t + n + 1) },
    ...{ ppgdC1: t.map(i => 1 - ppgdBeta1 ** i), ppgdC2: t.map(i => 1 - ppgdBeta2 ** i) },
  });
}

type Shard = { tokens: T; key: T; draws?: nano.Draws };
/** A training step by its parts: the shards one after another, each with its rows of the sources, then the update. */
function trainStep(f: Fixture, state: nano.State, feeds: ReturnType<typeof toFeeds>, shards: Shard[]) {
  const size = f.N / shards.length;
  const results = shards.map(({ tokens, key, draws }, r) => {
    const rows = (x: T) => tf.slice(x, [r * size, 0], [size, -1]);
    const sources = { s: rows(state.sources.s), m: rows(state.sources.m), v: rows(state.sources.v) };
    return nano.lossesAndGradients(f.problem, state.params, sources, { ...feeds, inputs: tokens, key }, draws);
  });
  const average = (part: (result: (typeof results)[number]) => T) => tf.div(tf.addN(results.map(part)), shards.length);
  const [components, ciFn] = GROUPS.map(group => average(result => result.gradients[group])) as [T, T];
  const vectors = { components, ci_fn: ciFn };
  for (const part of PARTS) {
    const shardsOfIt = results.map(({ sources }) => sources[part]);
    state.sources[part].assign(tf.concat(shardsOfIt, 0));
  }
  const norms = nano.applyGradients(f.problem, state, vectors, feeds);
  const gradients = apart(vectors, state.params);
  return { losses: numbers(average(r => r.losses)), l0: number(average(r => r.l0)), gradients, norms };
}
/** A step as one shard, or one shard a row, with given draws. */
function givenShards(tokens: T, draws: nano.Draws, R: number): Shard[] {
  return Array.from({ length: R }, (_, r) => {
    const rows = (x: T, n: number) => tf.slice(x, [(r * n) / R, 0], [n / R, -1]);
    const mine = { u: rows(draws.u, 21), delta: rows(draws.delta, 21), route: rows(draws.route!, 21) };
    return { tokens: rows(tokens, 3), key: nano.randomKey(0, 0), draws: mine };
  });
}

/** Parameters after steps: where they should be, and moved as far as they should. */
function closeParams(f: Fixture, key: string, names: string[]): void {
  for (const name of names) {
    const [now, want, old] = [f.params[name]!, f.get(`${key}/${name}`), f.get(name)];
    close(now, want, PARAMETER, `${key}/${name}`);
    close(tf.sub(now, old), tf.sub(want, old), MOVE, `${key}/${name}, its move`);
  }
}

// ---- The method finds what is there ---------------------------------------------------------------------------------

/** A layer that is the sum of three known rank-one mechanisms v_i u_iᵀ, of which each input uses one: x is along one v_i. */
function threeMechanisms(seed: number) {
  const [dIn, dOut] = [3, 6];
  const draws = nano.uniformArray(dIn * dIn + 3 * dOut, seed, 0, 99).map(x => 2 * x - 1);
  const unit = (x: number[]) => x.map(value => value / Math.hypot(...x));
  const dot = (x: number[], y: number[]) => x.reduce((sum, value, i) => sum + value * y[i]!, 0);
  const read: number[][] = []; // v_i, orthonormal
  for (let i = 0; i < 3; i++) {
    let v = [...draws.subarray(i * dIn, (i + 1) * dIn)];
    for (const other of read) v = v.map((x, k) => x - dot(v, other) * other[k]!);
    read.push(unit(v));
  }
  const written = [0, 1, 2].map(i => unit([...draws.subarray(9 + i * dOut, 9 + (i + 1) * dOut)]));
  const outer = (v: number[], u: number[]) => v.flatMap(a => u.map(b => a * b));
  const mechanisms = read.map((v, i) => outer(v, written[i]!));
  const W = mechanisms[0]!.map((_, k) => mechanisms.reduce((sum, m) => sum + m[k]!, 0));
  const target: nano.Target = {
    linears: [{ path: 'layer', dIn, dOut }],
    weights: new Map([['layer', nano.makeVariable(Float32Array.from(W), [dIn, dOut])]]),
    forward: (inputs, linear) => linear('layer', inputs.reshape([-1, dIn])),
    compare: nano.mse,
  };
  const row = (i: number) => {
    const [which, size] = nano.uniformArray(2, seed, i, 98);
    return Float32Array.from(read[Math.floor(3 * which!)]!, v => v * (0.5 + size!));
  };
  /** How far a component V_c U_c lies along the mechanism that it is nearest to. */
  const cosine = (v: number[], u: number[]) => Math.max(...mechanisms.map(m => dot(unit(outer(v, u)), m)));
  return { target, rows: (count: number) => ({ count, seqLen: 1, row }), cosine };
}

for (const seed of [0, 1, 2])
  test(`three known mechanisms in one layer come out as three components, seed ${seed}`, async () => {
    const { target, rows, cosine } = threeMechanisms(seed);
    const data = { train: rows(Number.POSITIVE_INFINITY), heldOut: rows(256) };
    const run = await nano.newRun(target, data, {
      ...{ engine: 'wasm', seed, nSteps: 500, batchSize: 32, components: '*=6', faithfulnessWarmupSteps: 100 },
      ...{ faithfulnessWarmupLr: 1e-2, mainLr: 1e-2, gradClipComponents: 1, ppgdLr: 0.05, evalBatchSize: 256 },
      ...{ coeffFaith: 10, coeffImp: 1e-2, coeffStoch: 1, coeffPpgd: 1, evalFreq: 0, slowEvalFreq: 0 },
      ...{ ciDModel: 16, ciNBlocks: 1, ciNHeads: 2, ciMlpHidden: 32 },
    });
    const [module] = run.problem.modules;
    const found = () => {
      const all = tf.tidy(() =>
        nano.importances(run.problem, run.params, nano.inputBatch(data.heldOut, [...Array(256).keys()])).g.max(0),
      );
      const g = numbers(all); // the largest of each component
      const [V, U] = [nano.V, nano.U].map(part => part(run.params, module!).arraySync() as number[][]) as [
        number[][],
        number[][],
      ];
      return [...g.keys()]
        .filter(c => g[c]! > 0.1)
        .map(c =>
          cosine(
            V.map(line => line[c]!),
            U[c]!,
          ),
        );
    };
    const before = found();
    const metrics = (await nano.decompose(run))!;
    const after = found();
    assert.ok(
      before.every(x => x < 0.99),
      `untrained, none lies along a mechanism: ${before}`,
    );
    assert.ok(Math.abs(metrics['eval/l0/0.0_total']! - 1) < 0.05, `L0 ${metrics['eval/l0/0.0_total']}`);
    assert.equal(after.length, 3, `alive: ${after}`);
    assert.ok(
      after.every(x => x > 0.99),
      `cosines ${after}`,
    );
    const [zero, adversary] = ['recon/mse_zero_masked', 'loss/PGDReconLoss'].map(name => metrics[`eval/${name}`]!);
    assert.ok(adversary! < 0.01 * zero!, `a fresh adversary gets ${adversary} of ${zero}`);
  });

// ---- B. Engine: random numbers --------------------------------------------------------------------------------------

const mean = (x: Numbers) => Array.from(x).reduce((sum, value) => sum + value, 0) / x.length;
/** The first two moments of uniform numbers in [0, 1). */
function uniformIn01(x: number[], what: string): void {
  assert.ok(x.every(value => value >= 0 && value < 1));
  close([mean(x)], [1 / 2], SIGMAS * Math.sqrt(1 / 12 / x.length), `mean of ${what}`, 1);
  const square = mean(x.map(value => (value - 1 / 2) ** 2));
  close([square], [1 / 12], SIGMAS * Math.sqrt(1 / 180 / x.length), `variance of ${what}`, 1);
}
const correlation = (x: number[], y: number[]) => 12 * mean(x.map((value, i) => (value - 0.5) * (y[i]! - 0.5)));
/** Pearson's Σ (count − expected)² / expected is below what chance exceeds once in 1,000 times. */
function asOftenAs(counts: number[], expected: number[], what: string): void {
  const critical: Record<number, number> = { 4: 16.27, 10: 27.88, 15: 36.12 }; // one degree of freedom less
  const chiSquare = counts.reduce((sum, n, i) => sum + (n - expected[i]!) ** 2 / expected[i]!, 0);
  assert.ok(chiSquare < critical[counts.length]!, `${what}: ${counts}, χ² ${chiSquare}`);
}

onEveryEngine('random numbers repeat from their key, and differ by seed, step and purpose', () => {
  const draw = (seed: number, step: number, purpose: number) =>
    numbers(nano.uniform([40, 25], nano.randomKey(seed, step), purpose));
  const first = draw(1, 2, 3);
  assert.deepEqual(draw(1, 2, 3), first);
  for (const other of [draw(2, 2, 3), draw(1, 3, 3), draw(1, 2, 4), draw(3, 2, 1), draw(2, 1, 3)]) {
    assert.ok(other.filter((x, i) => x === first[i]).length <= 2); // of 1,000
    assert.ok(Math.abs(correlation(first, other)) < SIGMAS / Math.sqrt(1000));
  }
});

onEveryEngine('random numbers are uniform in [0, 1)', () => {
  const x = numbers(nano.uniform([100_000], nano.randomKey(5, 6), 7));
  uniformIn01(x, 'x');
  const bins = new Array(10).fill(0);
  for (const value of x) bins[Math.floor(10 * value)]++;
  asOftenAs(bins, new Array(10).fill(10_000), 'tenths');
  assert.ok(Math.abs(correlation(x.slice(1), x)) < SIGMAS / Math.sqrt(x.length), 'of neighbours');
});

// ---- C. Target model ------------------------------------------------------------------------------------------------

onEveryTarget('the target gives the logits and pre-weight inputs of PyTorch', f => {
  const { acts, output } = nano.recordedForward(f.problem.target, f.tokens);
  close(output, f.get('target/logits'), FORWARD, 'logits');
  for (const m of f.modules) close(acts[m.path]!, f.get(`target/input/${m.path}`), FORWARD, m.path);
});

onWasm('F32, F16 and BF16 files of the same weights give the same model', async () => {
  const file = await openSafetensors(path.join(fixtureFolder('llama'), 'model.safetensors'));
  // odd multiples of 1/16 up to 4 have 7 bits: all three types hold them
  const weights = [...file.tensors].map(([name, { shape }]) => {
    const data = file.readFloat32(name).map(x => (Math.floor(Math.max(-4, Math.min(3.9, x)) * 8) + 0.5) / 8);
    return { name, shape, data };
  });
  file.close();
  // float32 is sign 1, exponent 8 (bias 127), mantissa 23; half is 1, 5 (bias 15), 10; bfloat16 the upper half
  const half = (b: number) => ((b >>> 16) & 0x8000) | ((((b >>> 23) & 255) - 112) << 10) | ((b >>> 13) & 1023);
  const encodings: Record<string, (bits: Uint32Array) => Uint32Array | Uint16Array> = {
    F32: bits => bits,
    F16: bits => Uint16Array.from(bits, half),
    BF16: bits => Uint16Array.from(bits, b => b >>> 16),
  };
  const logits: number[][] = [];
  for (const [dtype, encode] of Object.entries(encodings)) {
    const header: Record<string, object> = {};
    const pieces: Buffer[] = [];
    let end = 0;
    for (const { name, shape, data } of weights) {
      const piece = Buffer.from(encode(new Uint32Array(data.buffer)).buffer);
      header[name] = { dtype, shape, data_offsets: [end, end + piece.length] };
      end += piece.length;
      pieces.push(piece);
    }
    const json = Buffer.from(JSON.stringify(header));
    const length = Buffer.alloc(8);
    length.writeBigUInt64LE(BigInt(json.length));
    const dir = path.join(temporary, dtype);
    fs.cpSync(fixtureFolder('llama'), dir, { recursive: true });
    fs.writeFileSync(path.join(dir, 'model.safetensors'), Buffer.concat([length, json, ...pieces]));
    const target = await nano.loadTarget(dir);
    for (const name of ['model.embed_tokens.weight', 'model.layers.1.mlp.up_proj.bias'])
      assert.deepEqual(numbers(target.weights.get(name)!), numbers(weights.find(w => w.name === name)!.data));
    logits.push(numbers(target.forward(tf.tensor2d([[1, 2, 3]], [1, 3], 'int32'), nano.ownLinear(target))));
  }
  assert.ok(largest(logits[0]!) > 0.1);
  assert.deepEqual(logits[1], logits[0]);
  assert.deepEqual(logits[2], logits[0]);
});

const stories = path.join(project, '../shared/models/stories260K');
const noStories = fs.existsSync(stories) ? false : 'needs ../shared/models/stories260K, a trained Llama of 5 layers';
test('a trained Llama has the loss on its corpus that transformers finds', { skip: noStories }, async () => {
  await tf.setBackend('wasm');
  const target = await nano.loadTarget(stories);
  assert.equal(nano.chooseModules(target.linears, 'auto').length, 35);
  const { train } = await nano.loadData(target, { ...nano.DEFAULTS, data: path.join(stories, 'corpus.txt') });
  const loss = tf.tidy(() => {
    const tokens = nano.inputBatch(train, [0, 1, 2, 3]);
    return number(nano.crossEntropy(target.forward(tokens, nano.ownLinear(target)).logSoftmax(), tokens));
  });
  close([loss], [1.4251636], LOSS, 'of the first 4 rows of 512 tokens, LlamaForCausalLM in float32');
});

// ---- D. Data --------------------------------------------------------------------------------------------------------

test('the tokenizer of the toy reads and writes every line of its corpus', () => {
  const lines = read(toy, 'corpus.txt').trimEnd().split('\n');
  assert.ok(lines.length > 1000);
  for (const line of lines) {
    const { ids } = toyTokenizer.encode(line);
    assert.equal(ids.length, 1 + line.split(' ').length); // begin-of-text, then a word each
    assert.equal(toyTokenizer.decode(ids, { skip_special_tokens: true }), line);
  }
});

/** A copy of the toy's folder with other files, among them the data. */
function toyFolder(name: string, files: Record<string, string>): string {
  const dir = path.join(temporary, name);
  fs.cpSync(toy, dir, { recursive: true });
  for (const [file, content] of Object.entries(files)) fs.writeFileSync(path.join(dir, file), content);
  return dir;
}
const load = async (dir: string, file: string, changes: Partial<nano.Config> = {}) => {
  const config = { ...nano.DEFAULTS, seqLen: 4, data: path.join(dir, file), out: dir, ...changes };
  return nano.loadData(await nano.loadTarget(dir), config);
};
const rowsOf = (rows: nano.Rows) => Array.from({ length: rows.count }, (_, i) => [...rows.row(i)]);
const cut = (ids: number[], length: number) =>
  Array.from({ length: Math.floor(ids.length / length) }, (_, i) => ids.slice(i * length, (i + 1) * length));
/** 40 documents of 1 to 5 words, and their ids without marks. */
const documents = Array.from({ length: 40 }, (_, i) =>
  'ben saw a duck .'
    .split(' ')
    .slice(0, 1 + (i % 5))
    .join(' '),
);
const plainIds = (text: string) => toyTokenizer.encode(text, { add_special_tokens: false }).ids;

test('documents are joined by the begin-of-text that the tokenizer adds, and cut into rows', async () => {
  const { train, heldOut } = await load(toyFolder('bos', { 'data.txt': documents.join('\n') }), 'data.txt');
  const marked = documents.map(text => [1, ...plainIds(text)]);
  assert.deepEqual(rowsOf(train), cut(marked.slice(0, 38).flat(), 4));
  assert.deepEqual(rowsOf(heldOut), cut(marked.slice(38).flat(), 4), 'the last 5 % of the documents');
  assert.ok(train.count > 30 && heldOut.count === 2);
});

test('documents are joined by the end-of-text of the model when the tokenizer adds nothing', async () => {
  const json = (file: string) => JSON.parse(read(toy, file));
  const dir = toyFolder('eos', {
    'tokenizer.json': JSON.stringify({ ...json('tokenizer.json'), post_processor: null }),
    'config.json': JSON.stringify({ ...json('config.json'), eos_token_id: [80, 1] }), // no document ends in it
    'data.txt': documents.join('\n\n'), // separated by blank lines
    'data.jsonl': documents.map(text => JSON.stringify({ text })).join('\n'),
  });
  const marked = documents.map(text => [...plainIds(text), 80]);
  for (const file of ['data.txt', 'data.jsonl']) {
    const { train, heldOut } = await load(dir, file);
    assert.deepEqual(rowsOf(train), cut(marked.slice(0, 38).flat(), 4));
    assert.deepEqual(rowsOf(heldOut), cut(marked.slice(38).flat(), 4));
  }
});

test('ids are taken as they are: joined from .jsonl, as rows from .json', async () => {
  const ids = Array.from({ length: 30 }, (_, i) => [i, i + 1, i + 2]);
  const dir = toyFolder('ids', {
    'ids.jsonl': ids.map(input_ids => JSON.stringify({ input_ids })).join('\n'),
    'ids.json': JSON.stringify(ids),
    'few.json': JSON.stringify(ids.slice(0, 5)),
    'other.json': JSON.stringify([[7, 8, 9]]),
  });
  const joined = await load(dir, 'ids.jsonl');
  assert.deepEqual(rowsOf(joined.train), cut(ids.slice(0, 28).flat(), 4));
  const rows = await load(dir, 'ids.json', { evalData: path.join(dir, 'other.json') });
  assert.deepEqual(rowsOf(rows.train), ids);
  assert.deepEqual(rowsOf(rows.heldOut), [[7, 8, 9]]);
  const few = await load(dir, 'few.json'); // 5 % of 5 rows: one
  assert.deepEqual([rowsOf(few.train), rowsOf(few.heldOut)], [ids.slice(0, 4), ids.slice(4, 5)]);
});

test('data that cannot be used is refused by the name of the file', async () => {
  const dir = toyFolder('refused', {
    'vocab.json': '[[1, 2], [3, 89]]',
    'ragged.json': '[[1, 2], [3]]',
    'broken.jsonl': '{"text": "ben"}\n{"text": 5}',
    'short.txt': 'ben',
    'data.csv': 'ben',
    'long.json': JSON.stringify(new Array(30).fill(new Array(33).fill(1))),
  });
  const cases: Record<string, RegExp> = {
    'vocab.json': /vocab\.json: 89 is no token id of the model \(0 to 88\)/,
    'ragged.json': /ragged\.json: a row has 1 tokens, the first 2/,
    'broken.jsonl': /broken\.jsonl:2: text is a number; takes a string/,
    'short.txt': /short\.txt.*: too short for one row of 4 tokens/,
    'data.csv': /data\.csv: takes \.txt, \.jsonl/,
    'long.json': /long\.json: rows of 33 tokens.* 32 .*max_position_embeddings/,
    'absent.txt': /absent\.txt: no such file/,
  };
  for (const [file, message] of Object.entries(cases)) await refused(message, () => load(dir, file));
});

test('every epoch is a new shuffle of all rows, a function of seed and epoch alone', () => {
  const sequence = (batchSize: number, steps: number, seed: number) =>
    Array.from({ length: steps }, (_, step) => nano.batchIndices(10, batchSize, step, seed)).flat();
  const order = sequence(4, 15, 3);
  const epochs = cut(order, 10);
  for (const epoch of epochs) assert.deepEqual(epoch.toSorted(), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
  assert.equal(new Set(epochs.map(String)).size, 6, 'no two of the 6 epochs are alike');
  assert.deepEqual(sequence(5, 12, 3), order, 'batches of another size cut the same sequence');
  assert.deepEqual(nano.batchIndices(10, 4, 7, 3), order.slice(28, 32), 'a step alone');
  assert.notDeepEqual(sequence(4, 15, 4), order, 'another seed');
});

onWasm('a batch holds the rows asked for, in their order', () => {
  const rows: nano.Rows = { count: 3, seqLen: 2, row: i => Int32Array.of(10 * i, 10 * i + 1) };
  const batch = nano.inputBatch(rows, [2, 0]);
  assert.deepEqual([batch.dtype, batch.shape, numbers(batch)], ['int32', [2, 2], [20, 21, 0, 1]]);
});

// ---- E. Components --------------------------------------------------------------------------------------------------

/** Method 1 to the letter: y = r [ ((x V) ⊙ m) U + δ (x Δᵀ) ] + (1 − r) x Wᵀ + b, the delta formed. */
function literalLinear(f: Fixture, { mask, delta, route }: Required<nano.Masks>): nano.Linear {
  const { weights } = f.problem.target;
  const product = (a: T, b: T) => tf.matMul(a as tf.Tensor2D, b as tf.Tensor2D);
  return (name, x) => {
    const W = weights.get(name)!; // Wᵀ
    let y: T = product(x, W);
    const i = f.modules.findIndex(module => module.path === name);
    if (i >= 0) {
      const { C, offset } = f.modules[i]!;
      const [V, U] = [f.params[`components.${name}.V`]!, f.params[`components.${name}.U`]!];
      const m = tf.slice(mask, [0, offset], [f.N, C]);
      const [δ, r] = [delta, route].map(wide => tf.slice(wide, [0, i], [f.N, 1])) as [T, T];
      const Δ = tf.sub(W, product(V, U));
      const parts = tf.add(product(tf.mul(product(x, V), m), U), tf.mul(δ, product(x, Δ)));
      y = tf.add(tf.mul(r, parts), tf.mul(tf.sub(1, r), y));
    }
    const bias = weights.get(`${name}.bias`);
    return bias ? tf.add(y, bias) : y;
  };
}
const givenMasks = (f: Fixture): Required<nano.Masks> => {
  return { mask: f.get('masked/m'), delta: f.get('masked/delta'), route: f.get('masked/route') };
};
const masked = (f: Fixture, masks: nano.Masks) => nano.maskedForward(f.problem, f.params, f.tokens, masks);

onEveryTarget('the masked forward is that of PyTorch, with and without routing', f => {
  const { mask, delta, route } = givenMasks(f);
  close(masked(f, { mask, delta, route }), f.get('masked/logits'), FORWARD, 'routed');
  close(masked(f, { mask, delta }), f.get('masked/logits_unrouted'), FORWARD, 'not routed');
});

onEveryTarget('the masked forward is the literal formula, whichever masks are given', f => {
  const all = givenMasks(f);
  const { mask, delta, route } = all;
  const [ones, zeros] = [tf.onesLike(delta), tf.zerosLike(delta)];
  const results = new Set<string>();
  const compare = (what: string, given: nano.Masks, spelledOut: Required<nano.Masks>) => {
    const literal = f.problem.target.forward(f.tokens, literalLinear(f, spelledOut));
    close(masked(f, given), literal, FORWARD, what);
    results.add(`${numbers(literal)}`);
  };
  compare('all three', all, all);
  compare('no routing', { mask, delta }, { mask, delta, route: ones });
  compare('no delta', { mask, route }, { mask, delta: zeros, route });
  compare('mask alone', { mask }, { mask, delta: zeros, route: ones });
  assert.equal(results.size, 4, 'these are four functions');
});

onEveryTarget('nothing changes where all is on, or nothing is routed through components', f => {
  const { mask, delta } = givenMasks(f);
  const on = { mask: tf.onesLike(mask), delta: tf.onesLike(delta) };
  close(masked(f, on), f.get('target/logits'), FORWARD, 'all components and deltas on');
  const route = tf.zerosLike(delta);
  close(masked(f, { mask, delta, route }), f.get('target/logits'), FORWARD, 'no module routed');
});

const linear = (name: string, dIn: number, dOut: number): nano.LinearLayer => ({ path: name, dIn, dOut });
const LINEARS = [
  linear('h.1.attn.q_proj', 8, 6),
  linear('h.0.mlp.c_fc', 8, 32),
  linear('h.0.attn.q_proj', 8, 6),
  linear('h.0.attn.o_proj', 6, 8),
];

test('--components: the first pattern that matches gives C; modules lie side by side, sorted by path', () => {
  const chosen = (spec: string) => nano.chooseModules(LINEARS, spec).map(m => `${m.path} C ${m.C} from ${m.offset}`);
  const some = ['h.0.attn.o_proj C 5 from 0', 'h.0.attn.q_proj C 3 from 5', 'h.1.attn.q_proj C 5 from 8'];
  assert.deepEqual(chosen('h.0.attn.q_proj=3, *.attn.*=5'), some);
  const heads = ['h.0.attn.o_proj C 8 from 0', 'h.0.attn.q_proj C 8 from 8'];
  assert.deepEqual(chosen('auto'), [...heads, 'h.0.mlp.c_fc C 32 from 16', 'h.1.attn.q_proj C 8 from 48']);
  assert.deepEqual(nano.chooseModules(LINEARS, '*c_fc=2'), [{ ...LINEARS[1], C: 2, offset: 0 }]);
  assert.equal(nano.totalC(nano.chooseModules(LINEARS, 'auto')), 56);
});

test('--components: what is no pattern=C, or matches no whole path, is refused', async () => {
  const refuses = (spec: string, message: RegExp) => refused(message, () => nano.chooseModules(LINEARS, spec));
  for (const rule of ['*.q_proj', '*.q_proj=0', '*.q_proj=1.5', '=3'])
    await refuses(`*.c_fc=1,${rule}`, /^--components: got (\*\.q_proj)?[=\d.]*, takes pattern=C/);
  await refuses('*.q_proj=3,', /takes pattern=C/);
  await refuses('*.q_proj=3,*.gate=4', /^--components: \*\.gate matches none of .*h\.0\.mlp\.c_fc/);
  for (const part of ['h.0.attn.q', '0.attn.q_proj', 'h.0.attn.q.proj', 'h.0.mlp'])
    await refuses(`${part}=3`, /matches none of/);
});

// ---- F. CI function -------------------------------------------------------------------------------------------------

onEveryTarget('the CI function gives the logits and importances of PyTorch', f => {
  const { z, g } = nano.importances(f.problem, f.params, f.tokens);
  close(z, f.get('ci/z'), FORWARD, 'z');
  close(g, f.get('ci/g'), FORWARD, 'g');
  close(nano.upperLeaky(z, f.config.leakyAlpha), f.get('ci/g_upper'), FORWARD, 'g⁺');
  const between = numbers(g).filter(x => x > 0 && x < 1).length;
  assert.ok(between > g.size / 5 && between < g.size, 'the importances spread over [0, 1]');
});

onEveryEngine('both leaky sigmoids have the values and gradients of PyTorch at hand-picked points', async () => {
  const f = await fixture('simple_mlp');
  const [z, upstream] = [f.get('sigmoid/z'), f.get('sigmoid/upstream')];
  for (const [name, sigmoid] of Object.entries({ lower: nano.lowerLeaky, upper: nano.upperLeaky })) {
    const { value, grad } = tf.valueAndGrad((x: T) => sigmoid(x, f.config.leakyAlpha))(z, upstream);
    close(value, f.get(`sigmoid/${name}`), FORWARD, `${name}-leaky`);
    close(grad, f.get(`sigmoid/${name}_grad`), FORWARD, `gradient of the ${name}-leaky`);
  }
});

onEveryEngine('gradients made by hand are the slopes of finite differences', () => {
  const wave = (n: number, frequency: number) => tf.sin(tf.mul(tf.range(1, n + 1, 1, 'float32'), frequency));
  const slopes = (what: string, f: (x: T) => T, at: T) => {
    const direction = wave(at.size, 1.1).reshape(at.shape);
    const ends = [0.01, -0.01].map(h => number(f(tf.add(at, tf.mul(direction, h)))));
    const gradient = tf.sum(tf.mul(tf.grad(f as (x: T) => T)(at), direction));
    close(gradient, [(ends[0]! - ends[1]!) / 0.02], DIFFERENCE, what);
  };
  const x = tf.mul(wave(60, 1.3), 2).reshape([5, 12]);
  const weights = tf.add(1, wave(60, 2.1)).reshape([5, 12]);
  slopes('rmsNormalize', y => tf.sum(tf.mul(weights, nano.rmsNormalize(y, 1e-3))), x);
  const own = wave(60, 0.9).reshape([5, 12]);
  slopes('kl', y => nano.kl.loss(own, y), x);
  slopes('mse', y => nano.mse.loss(own, y), x);
  // off the kinks, and the lower-leaky one only where its gradient is meant to be the true one
  const [weight, p] = [tf.tensor1d([1, -2, 3, 1.5, -1, 2]), tf.scalar(0.7)];
  const [inside, anywhere] = [tf.tensor1d([0.05, 0.3, 0.6, 0.95, 1.2, 3]), tf.tensor1d([-2, -0.2, 0.3, 0.6, 1.2, 3])];
  slopes('lowerLeaky', z => tf.sum(tf.mul(weight, nano.lowerLeaky(z, 0.1))), inside);
  slopes('upperLeaky', z => tf.sum(tf.mul(weight, nano.upperLeaky(z, 0.1))), anywhere);
  const g = tf.add(inside, 0.2).reshape([3, 2]);
  slopes('importanceLoss', x => nano.importanceLoss(x, p, nano.DEFAULTS, 1), g);
});

/** The names and shapes of a CI function with one block, as the contract has them. */
const ciNames = (d: number, mlp: number, sumIn: number, sumC: number) => [
  ...[`proj_in.weight ${d},${sumIn}`, `proj_in.bias ${d}`],
  ...[...'qkvo'].map(p => `blocks.0.attn.${p}_proj.weight ${d},${d}`),
  ...[`blocks.0.mlp.0.weight ${mlp},${d}`, `blocks.0.mlp.0.bias ${mlp}`],
  ...[`blocks.0.mlp.2.weight ${d},${mlp}`, `blocks.0.mlp.2.bias ${d}`],
  ...[`proj_out.weight ${sumC},${d}`, `proj_out.bias ${sumC}`],
];
test('the CI function has the names and shapes of the contract', () => {
  const modules = nano.chooseModules(LINEARS, '*.attn.*=5');
  const config = { ...nano.DEFAULTS, ciDModel: 8, ciNBlocks: 1, ciNHeads: 2, ciMlpHidden: 12 };
  const shapes = Object.entries(nano.ciTransformer.shapes({ modules, config } as unknown as nano.Problem));
  const expected = ciNames(8, 12, 8 + 6 + 8, 15).map(line => `ci_fn.${line}`);
  assert.deepEqual(
    shapes.map(([name, shape]) => `${name} ${shape}`),
    expected,
  );
});

// ---- G. Losses ------------------------------------------------------------------------------------------------------

/** Where a fork that changes a formula changes PyTorch's answer too. */
const PINNED = 'pinned by tools/reference.py; tools/make_fixtures.py writes the fixtures anew';
/** Each loss alone, so that a fork which changes one has only its own tests red. */
const LOSS_VALUES: Record<keyof Answers['losses'], (f: Fixture) => T> = {
  faith: f => nano.faithfulnessLoss(f.problem, f.params),
  imp: f => importance(f, 1),
  imp3: f => importance(f, 3),
  stoch: f => {
    const { pass, g } = nano.importances(f.problem, f.params, f.tokens);
    return nano.stochasticLoss(f.problem, f.params, pass, g, f.draws('draws'));
  },
  ppgd: f => {
    const { pass, g } = nano.importances(f.problem, f.params, f.tokens);
    return nano.adversarialLoss(f.problem, f.params, pass, g, f.get('sources/s'));
  },
};
function importance(f: Fixture, R: number): T {
  const { z } = nano.importances(f.problem, f.params, f.tokens);
  return nano.importanceLoss(nano.upperLeaky(z, f.config.leakyAlpha), tf.scalar(f.p), f.config, R);
}
for (const [loss, value] of Object.entries(LOSS_VALUES))
  onEveryTarget(`the loss ${loss} is that of PyTorch`, f =>
    close(value(f), [f.losses[loss as keyof Answers['losses']]], LOSS, `${loss}, ${PINNED}`),
  );

onEveryTarget('the KL is 0 from the target to itself, and above that otherwise', f => {
  const own = f.get('target/logits');
  close(nano.kl.loss(own, own), [0], 1e-6, 'nats', 1);
  assert.ok(number(nano.kl.loss(own, f.get('masked/logits'))) > 0.1);
  close(nano.kl.measure(own, f.get('masked/logits')), nano.kl.loss(own, f.get('masked/logits')), LOSS, 'both ways');
});

for (const loss of LOSSES)
  onEveryTarget(`the gradients of ${loss} alone are those of PyTorch`, f => {
    const off = { coeffFaith: 0, coeffImp: 0, coeffStoch: 0, coeffPpgd: 0, ppgdInnerSteps: 0 };
    const problem = { ...f.problem, config: { ...f.config, ...off, [nano.LOSSES[loss].coefficient]: 1 } };
    const feeds = { ...fixtureFeeds(f, 0), inputs: f.tokens, key: nano.randomKey(0, 0) };
    const sources = { s: f.get('sources/s'), m: f.get('sources/m'), v: f.get('sources/v') };
    const result = nano.lossesAndGradients(problem, f.params, sources, feeds, f.draws('draws'));
    close([numbers(result.losses)[LOSSES.indexOf(loss)]!], [f.losses[loss]], LOSS, loss);
    for (const [name, gradient] of Object.entries(apart(result.gradients, f.params))) {
      const ofCi = name.startsWith('ci_fn');
      const depends = loss === 'faith' ? !ofCi : loss === 'imp' ? ofCi : true;
      if (depends) close(gradient, f.get(`grad/${loss}/${name}`), GRADIENT, `${name}, ${PINNED}`);
      else assert.equal(largest(numbers(gradient)), 0, name);
    }
  });

onEveryTarget("the sources' gradient of the adversarial loss is that of PyTorch", f => {
  const { pass, g } = nano.importances(f.problem, f.params, f.tokens);
  const loss = (s: T) => nano.adversarialLoss(f.problem, f.params, pass, g, s);
  close(tf.grad(loss)(f.get('sources/s')), f.get('grad/ppgd/sources'), GRADIENT, 'sources');
});

onEveryTarget('the routes that follow from given random numbers are those of PyTorch', f => {
  for (const draws of ['draws', 'draws2']) {
    const route = nano.randomRouting(f.get(`${draws}/u_route`), f.get(`${draws}/u_k`));
    assert.deepEqual(numbers(route), numbers(f.get(`${draws}/route`)));
  }
});

onEveryEngine('routing takes k modules, k uniform in 1 … M, and every subset of k equally often', () => {
  const [M, N] = [4, 24_000];
  const modules = Array.from({ length: M }, (_, i) => ({ ...linear(`${i}`, 1, 1), C: 1, offset: i }));
  const draws = nano.stochasticDraws({ modules } as unknown as nano.Problem, N, nano.randomKey(11, 12));
  const subsets: number[] = new Array(2 ** M).fill(0); // how often each came; bit i is module i
  for (const routed of cut(numbers(draws.route!), M))
    subsets[routed.reduce((subset, r, i) => subset + r * 2 ** i, 0)]!++;
  const total = (of: (subset: number) => boolean) => subsets.reduce((sum, n, i) => sum + (of(i) ? n : 0), 0);
  const size = (subset: number) => [0, 1, 2, 3].filter(i => subset & (1 << i)).length;
  const binomial = [1, 4, 6, 4, 1];
  const expected = subsets.map((_, subset) => N / M / binomial[size(subset)]!);
  assert.equal(subsets[0], 0, 'no position without a module');
  asOftenAs(subsets.slice(1), expected.slice(1), 'subsets');
  const bySize = [1, 2, 3, 4].map(k => total(subset => size(subset) === k));
  asOftenAs(bySize, new Array(M).fill(N / M), 'sizes');
  for (let i = 0; i < M; i++) {
    const share = total(subset => (subset & (1 << i)) !== 0) / N;
    close([share], [5 / 8], SIGMAS * Math.sqrt(15 / 64 / N), `share of module ${i}`, 1); // Σ_k k / M²
  }
  const [u, delta] = [numbers(draws.u), numbers(draws.delta)];
  uniformIn01(u, 'u');
  uniformIn01(delta, 'delta');
  assert.ok(Math.abs(correlation(u, delta)) < SIGMAS / Math.sqrt(N * M), 'they are other numbers');
});

onEveryEngine('a mask lies between the importance and 1, where the random number says', () => {
  const [g, u] = [tf.tensor1d([0, 0, 0.25, 0.25, 1]), tf.tensor1d([0, 0.7, 0, 0.5, 0.3])];
  close(nano.interpolate(g, u), [0, 0.7, 0.25, 0.625, 1], FORWARD, 'mask');
});

// ---- H. Persistent PGD ----------------------------------------------------------------------------------------------

onEveryEngine('Adam is the formula, from its first step on', () => {
  const betas = { beta1: 0.8, beta2: 0.95, eps: 1e-3 };
  let [m, v]: T[] = [tf.zeros([4]), tf.zeros([4])];
  const [plainM, plainV] = [new Array(4).fill(0), new Array(4).fill(0)];
  for (let t = 1; t <= 3; t++) {
    const grad = [0.5, -2, 0.03, 1e-4].map(x => x * t);
    const [c1, c2] = [1 - 0.8 ** t, 1 - 0.95 ** t];
    const step = nano.adam(tf.tensor1d(grad), m!, v!, betas, tf.scalar(c1), tf.scalar(c2));
    [m, v] = [step.m, step.v];
    const direction = grad.map((x, i) => {
      plainM[i] = 0.8 * plainM[i] + 0.2 * x;
      plainV[i] = 0.95 * plainV[i] + 0.05 * x * x;
      return plainM[i] / c1 / (Math.sqrt(plainV[i] / c2) + 1e-3);
    });
    close(step.direction, direction, FORWARD, `direction ${t}`);
    close(m, plainM, FORWARD, `m ${t}`);
    close(v, plainV, FORWARD, `v ${t}`);
  }
});

onEveryEngine('the adversary ascends, and its sources stay in [0, 1]', () => {
  const before = { s: tf.tensor1d([0.5, 0.5, 0.99, 0.01]), m: tf.zeros([4]), v: tf.zeros([4]) };
  const config = { ...nano.DEFAULTS, ppgdBeta1: 0.5, ppgdBeta2: 0.99 };
  const [lr, c1, c2] = [tf.scalar(0.1), tf.scalar(0.5), tf.scalar(0.01)];
  const { s, m, v } = nano.ascend(before, tf.tensor1d([3, -3, 3, -3]), config, lr, c1, c2);
  close(s, [0.6, 0.4, 1, 0], SOURCE, 'sources', 1); // a first step is as long as the learning rate
  assert.ok(numbers(s).every(x => x >= 0 && x <= 1));
  close(m, [1.5, -1.5, 1.5, -1.5], FORWARD, 'm');
  close(v, [0.09, 0.09, 0.09, 0.09], FORWARD, 'v');
});

// ---- I. Optimisation ------------------------------------------------------------------------------------------------

test('the schedules are those of PyTorch, with the default settings', () => {
  const { schedules } = readAnswers('llama');
  assert.ok(schedules.length > 20);
  for (const { nSteps, step, mainLr, ppgdLr, p } of schedules) {
    const schedule = nano.schedule({ ...nano.DEFAULTS, nSteps }, step);
    close([schedule.lrMain], [mainLr], FLOAT64, `main rate of step ${step} of ${nSteps}`);
    close([schedule.lrPpgd], [ppgdLr], FLOAT64, `PGD rate of step ${step} of ${nSteps}`, 0.01);
    close([schedule.p], [p], FLOAT64, `p of step ${step} of ${nSteps}`);
  }
});

test('cosines reach their end with the last step; bias corrections count all steps of both Adams', () => {
  const halfway = [0, 5, 10].map(step => nano.cosine(step, 11, 0.2));
  close(halfway, [1, 0.6, 0.2], FLOAT64, 'cosine');
  const config = { ...nano.DEFAULTS, ppgdInnerSteps: 2, ppgdBeta1: 0.5, ppgdBeta2: 0.99 };
  const [first, second] = [nano.schedule(config, 0), nano.schedule(config, 1)];
  close([first.c1, first.c2, second.c1, second.c2], [0.1, 0.001, 0.19, 0.001999], FLOAT64, 'AdamW');
  const corrections = (beta: number) => [1, 2, 3, 4, 5, 6].map(t => 1 - beta ** t);
  close([...first.ppgdC1, ...second.ppgdC1], corrections(0.5), FLOAT64, 'c1 of the adversary');
  close([...first.ppgdC2, ...second.ppgdC2], corrections(0.99), FLOAT64, 'c2 of the adversary');
});

onEveryTarget('three steps of the faithfulness warm-up end where PyTorch ends', async (f, engine) => {
  const state = nano.initialState(f.problem, f.params);
  const losses: number[] = [];
  for await (const loss of nano.warmUp(engine, f.problem, state)) losses.push(loss);
  assert.equal(losses.length, 3);
  for (const [i, loss] of f.warmup.entries()) close([losses[i]!], [loss], LOSS, `loss ${i}`);
  const [components, ci] = GROUPS.map(group => Object.keys(f.params).filter(name => name.startsWith(group)));
  closeParams(f, 'warmup', components!);
  for (const name of ci!) assert.deepEqual(numbers(f.params[name]!), numbers(f.get(name)), name);
  assert.equal(largest([...numbers(state.m.components), ...numbers(state.v.components)]), 0, 'moments');
});

onEveryEngine('the warm-up follows its cosine, and stops when told to', async engine => {
  const afterSteps = async (steps: number, changes: Partial<nano.Config>) => {
    const f = await fixture('simple_mlp', changes);
    let done = 0;
    for await (const _ of nano.warmUp(engine, f.problem, nano.initialState(f.problem, f.params)))
      if (++done === steps) break;
    return numbers(f.params['components.h.0.mlp.c_fc.V']!);
  };
  const toZero = { faithfulnessWarmupLrFinalFrac: 0 }; // the rate of the last step
  assert.deepEqual(await afterSteps(3, toZero), await afterSteps(2, toZero));
  assert.notDeepEqual(await afterSteps(3, {}), await afterSteps(2, {}));
});

/** The steps of the fixture leave the importance loss out, so that a fork which changes it keeps these tests. */
const WITHOUT_IMP = { coeffImp: 0 };
const OTHERS = LOSSES.filter(loss => loss !== 'imp');
const closeOthers = (actual: Numbers, expected: Losses) => {
  for (const loss of OTHERS) close([actual[LOSSES.indexOf(loss)]!], [expected[loss]], LOSS, loss);
};

onEveryTarget(
  'a training step is that of PyTorch: losses, gradients, parameters, moments, sources',
  async ({ name }) => {
    const f = await fixture(name, WITHOUT_IMP);
    const state = midRun(f);
    const names = Object.keys(f.params);
    const step = trainStep(f, state, fixtureFeeds(f, 0), givenShards(f.tokens, f.draws('draws'), 1));
    closeOthers(step.losses, f.step1);
    for (const name of names) close(step.gradients[name]!, f.get(`step1/grad/${name}`), GRADIENT, name);
    close(step.norms.components, [f.step1.clipNorm], GRADIENT, 'gradient norm before clipping');
    closeParams(f, 'step1/params', names);
    close(state.sources.s, f.get('step1/sources/s'), SOURCE, 'sources', 1);
    for (const moment of ['m', 'v'] as const) {
      close(state.sources[moment], f.get(`step1/sources/${moment}`), GRADIENT, `${moment} of the sources`);
      for (const group of f.name === 'simple_mlp' ? GROUPS : []) {
        const rest = numbers(state[moment][group]); // in this target's fixture alone
        for (const name of names.filter(name => name.startsWith(group))) {
          const mine = rest.splice(0, f.params[name]!.size);
          close(mine, f.get(`step1/${moment}/${name}`), GRADIENT, `${moment} of ${name}`);
        }
        assert.deepEqual(rest, []);
      }
    }
  },
);

onEveryTarget(`a step with the importance loss is that of PyTorch, ${PINNED}`, f => {
  const step = trainStep(f, midRun(f), fixtureFeeds(f, 0), givenShards(f.tokens, f.draws('draws'), 1));
  for (const [i, loss] of LOSSES.entries()) close([step.losses[i]!], [f.whole[loss]], LOSS, loss);
  close(step.norms.ci_fn, [f.whole.ciNorm], GRADIENT, "norm of the CI function's gradient");
});

onEveryEngine('and so is the step after it', async () => {
  const f = await fixture('simple_mlp', WITHOUT_IMP);
  const state = midRun(f);
  trainStep(f, state, fixtureFeeds(f, 0), givenShards(f.tokens, f.draws('draws'), 1));
  const step = trainStep(f, state, fixtureFeeds(f, 1), givenShards(f.tokens2, f.draws('draws2'), 1));
  closeOthers(step.losses, f.step2);
  close(step.norms.components, [f.step2.clipNorm], GRADIENT, 'gradient norm before clipping');
  closeParams(f, 'step2/params', Object.keys(f.params));
  close(state.sources.s, f.get('step2/sources/s'), SOURCE, 'sources', 1);
});

onEveryEngine('a batch in three shards has the averaged gradients and the sources of PyTorch', async () => {
  const f = await fixture('simple_mlp', { microBatches: 3, ...WITHOUT_IMP });
  const state = midRun(f);
  const step = trainStep(f, state, fixtureFeeds(f, 0), givenShards(f.tokens, f.draws('draws'), 3));
  closeOthers(step.losses, f.accum);
  for (const name of Object.keys(f.params)) close(step.gradients[name]!, f.get(`accum/grad/${name}`), GRADIENT, name);
  close(step.norms.components, [f.accum.clipNorm], GRADIENT, 'gradient norm before clipping');
  close(state.sources.s, f.get('accum/sources/s'), SOURCE, 'sources', 1);
});

for (const R of [1, 3])
  onEveryEngine(`the compiled step is its parts one after another, micro-batches: ${R}`, async engine => {
    const settings = { microBatches: R, gradClipCi: 0.05, mainLr: 0.01, seed: 9 };
    const [f, byParts] = [await fixture('simple_mlp', settings), await fixture('simple_mlp', settings)];
    const [state, expected] = [midRun(f), midRun(byParts)];
    const compiled = nano.compileStep(engine, f.problem, state);
    for (const n of [4, 5]) {
      const metrics = await compiled(n, f.data);
      const rows = nano.batchIndices(3, 3, n, 9);
      const shards = Array.from({ length: R }, (_, r) => {
        const tokens = nano.inputBatch(f.data, rows.slice((3 * r) / R, (3 * (r + 1)) / R));
        return { tokens, key: nano.randomKey(9, n * R + r) };
      });
      const step = trainStep(byParts, expected, toFeeds(nano.schedule(f.config, n)), shards);
      const coefficients = LOSSES.map(loss => f.config[nano.LOSSES[loss].coefficient]);
      const total = coefficients.reduce((sum, coefficient, i) => sum + Number(coefficient) * step.losses[i]!, 0);
      const norms = GROUPS.map(group => number(step.norms[group]));
      const expectedMetrics: nano.Metrics = {
        ...Object.fromEntries(LOSSES.map((loss, i) => [`loss/${loss}`, step.losses[i]!])),
        'train/l0': step.l0,
        'loss/total': total,
        'grad_norm/components': norms[0]!,
        'grad_norm/ci_fn': norms[1]!,
      };
      closeRecords(metrics, expectedMetrics, REORDERED);
      for (const [name, param] of Object.entries(f.params)) close(param, byParts.params[name]!, REORDERED, name);
      for (const part of PARTS) close(state.sources[part], expected.sources[part], REORDERED, part);
    }
  });

/** Gradients of all parameters, as long as they are. */
const allGradients = (f: Fixture, make: (n: number) => T) =>
  sideBySide(Object.fromEntries(Object.entries(f.params).map(([name, p]) => [name, make(p.size)])));
/** AdamW's first step. */
const firstStep = () => ({ lrMain: tf.scalar(0.1), c1: tf.scalar(1 - 0.9), c2: tf.scalar(1 - 0.999) });

onEveryEngine('gradients are clipped by the joint norm of their group, and only above the limit', async () => {
  const clip = async (gradClipComponents: number, gradClipCi: number) => {
    const f = await fixture('simple_mlp', { gradClipComponents, gradClipCi });
    const state = nano.initialState(f.problem, f.params);
    const gradients = allGradients(f, n => tf.sin(tf.range(1, n + 1, 1, 'float32')));
    const norms = nano.applyGradients(f.problem, state, gradients, firstStep());
    const limits = { components: gradClipComponents, ci_fn: gradClipCi };
    for (const group of GROUPS) {
      const norm = Math.hypot(...numbers(gradients[group]));
      close(norms[group], [norm], LOSS, `norm of ${group}`);
      const factor = limits[group] > 0 ? Math.min(1, limits[group] / norm) : 1;
      // from moments 0: m = (1 − β1) × the clipped gradient
      close(state.m[group], tf.mul(gradients[group], 0.1 * factor), GRADIENT, `clipped ${group}`);
    }
  };
  await clip(0.5, 0);
  await clip(0, 0.25);
  await clip(1e6, 1e6);
});

onEveryEngine('Muon moves matrices as that of PyTorch does, and vectors as Adam does', async () => {
  type Arrays = Record<string, number[]>;
  type MuonFixture = { lr: number; shapes: Arrays; start: Arrays; gradients: Arrays[]; after: Arrays[] };
  const f: MuonFixture = JSON.parse(read(project, 'tools/fixtures/muon.json'));
  const tensors = (arrays: Arrays) =>
    Object.fromEntries(Object.entries(arrays).map(([name, x]) => [name, tf.tensor(x, f.shapes[name]!)]));
  const params = Object.fromEntries(Object.entries(tensors(f.start)).map(([name, x]) => [name, tf.variable(x)]));
  const config = { ...nano.DEFAULTS, optimizer: 'muon', gradClipComponents: 0, gradClipCi: 0 };
  const zeros = () => {
    const { components, ci_fn } = sideBySide(params);
    return { components: tf.variable(tf.zerosLike(components)), ci_fn: tf.variable(tf.zerosLike(ci_fn)) };
  };
  const state = { params, m: zeros(), v: zeros() } as unknown as nano.State;
  for (const [i, gradients] of f.gradients.entries()) {
    const feeds = { lrMain: tf.scalar(f.lr), c1: tf.scalar(1 - 0.9 ** (i + 1)), c2: tf.scalar(1 - 0.999 ** (i + 1)) };
    nano.applyGradients({ config } as nano.Problem, state, sideBySide(tensors(gradients)), feeds);
    for (const [name, want] of Object.entries(f.after[i]!)) {
      const moved = (to: readonly number[]) => to.map((x, k) => x - f.start[name]![k]!);
      close(moved(numbers(params[name]!)), moved(want), MOVE, `${name} after ${i + 1} steps`);
    }
  }
});

onEveryEngine('a gradient that is not finite moves nothing', async () => {
  const f = await fixture('simple_mlp');
  const state = nano.initialState(f.problem, f.params);
  const gradients = allGradients(f, n => tf.ones([n]));
  const broken = { ...gradients, ci_fn: tf.div(gradients.ci_fn, 0) };
  const norms = nano.applyGradients(f.problem, state, broken, firstStep());
  assert.ok(!Number.isFinite(number(norms.ci_fn)));
  const params = Object.entries(f.params);
  for (const [name, param] of params) assert.deepEqual(numbers(param), numbers(f.get(name)), name);
  nano.applyGradients(f.problem, state, gradients, firstStep());
  for (const [name, param] of params)
    close(tf.sub(f.get(name), param), tf.fill(param.shape, 0.1), MOVE, `${name} with a finite one`);
});

onWasm('parameters and sources start from their distributions, a function of the seed', () => {
  const ci = { ciDModel: 64, ciNBlocks: 1, ciNHeads: 4, ciMlpHidden: 128 };
  const modules = nano.chooseModules([linear('a', 50, 100), linear('b', 100, 50)], 'a=80,b=60');
  const start = (seed: number) => {
    const config = { ...nano.DEFAULTS, ...ci, seed, batchSize: 5, seqLen: 9 };
    const problem = { modules, config } as unknown as nano.Problem;
    const params = nano.initialParams(problem);
    return { params, state: nano.initialState(problem, params) };
  };
  const [{ params, state }, again, other] = [start(1), start(1), start(2)];

  const normal = (name: string, shape: number[], variance: number) => {
    const param = params[name]!;
    assert.deepEqual(param.shape, shape);
    const x = numbers(param).map(value => value / Math.sqrt(variance));
    const within = x.filter(value => Math.abs(value) < 1).length / x.length;
    close([mean(x)], [0], SIGMAS / Math.sqrt(x.length), `mean of ${name}`, 1);
    const square = mean(x.map(value => value ** 2));
    close([square], [1], SIGMAS * Math.sqrt(2 / x.length), `variance of ${name}`, 1);
    close([within], [0.6827], SIGMAS * Math.sqrt(0.2166 / x.length), `${name} within a deviation`, 1);
  };
  for (const { path: name, dIn, dOut, C } of modules) {
    normal(`components.${name}.V`, [dIn, C], 1 / dIn);
    normal(`components.${name}.U`, [C, dOut], 1 / C);
  }
  for (const name of Object.keys(params).filter(name => name.startsWith('ci_fn'))) {
    // uniform in ± 1 / √fan_in; a bias as its weight
    const bound = 1 / Math.sqrt(params[name.replace(/bias$/, 'weight')]!.shape[1]!);
    const x = numbers(params[name]!).map(value => (value / bound + 1) / 2);
    uniformIn01(x, name);
  }
  const values = Object.entries(params).map(([name, param]) => [name, numbers(param)] as const);
  for (const [name, value] of values) {
    assert.deepEqual(numbers(again.params[name]!), value, name);
    assert.notDeepEqual(numbers(other.params[name]!), value, name);
  }
  const ratios = values.map(([, value]) => (value[1]! / value[0]!).toFixed(4)); // scales aside
  assert.equal(new Set(ratios).size, ratios.length, 'no two parameters share their numbers');

  const { s, m, v } = state.sources;
  assert.deepEqual(s.shape, [5 * 9, 140 + 2]);
  uniformIn01(numbers(s), 'sources');
  for (const moment of [m, v, ...Object.values(state.m), ...Object.values(state.v)])
    assert.equal(largest(numbers(moment)), 0);
});

test('sizes that are left open follow the target, by a rule that gives the published ones', async () => {
  const arch = (dModel: number, nLayers: number, context = 512) =>
    ({ dModel, nLayers, context, contextField: 'n_ctx' }) as nano.Architecture;
  const ci = (dModel: number, nLayers: number) => {
    const c = nano.resolveConfig(nano.DEFAULTS, arch(dModel, nLayers), new Set(), true);
    return [c.ciDModel, c.ciNBlocks, c.ciNHeads, c.ciMlpHidden];
  };
  assert.deepEqual(ci(768, 4), [2048, 8, 16, 8192]); // pile-4L
  assert.deepEqual(ci(192, 2), [512, 4, 8, 2048]); // simplestories-2L
  const odd = nano.resolveConfig(nano.DEFAULTS, arch(50, 1, 32), new Set(), false);
  assert.equal(odd.ciDModel % (2 * odd.ciNHeads), 0);
  assert.deepEqual([odd.batchSize, odd.evalBatchSize, odd.seqLen], [2, 2, 32], 'on a CPU, and short rows');
  const refuses = (changes: Partial<nano.Config>, message: RegExp) => {
    const config = { ...nano.DEFAULTS, ...changes };
    return refused(message, () => nano.resolveConfig(config, arch(64, 1), new Set(Object.keys(changes)), true));
  };
  await refuses({ batchSize: 6, microBatches: 4 }, /--micro-batches 4 does not divide --batch-size 6/);
  await refuses({ ciDModel: 20, ciNHeads: 4 }, /--ci-d-model 20 is no even number for each of 4/);
  await refuses({ seqLen: 513 }, /--seq-len 513: the target's n_ctx is 512/);
});

for (const R of [1, 3])
  onEveryEngine(`steps leave no tensor behind, micro-batches: ${R}`, async engine => {
    const f = await fixture('simple_mlp', { microBatches: R });
    const step = nano.compileStep(engine, f.problem, nano.initialState(f.problem, f.params));
    const counts: number[] = [];
    for (let n = 0; n < 5; n++) {
      await step(n, f.data);
      counts.push(tf.memory().numTensors);
    }
    assert.deepEqual(counts, new Array(5).fill(counts[0]));
  });

// ---- J. Evaluation --------------------------------------------------------------------------------------------------

const isRandom = (name: string) => /stoch_masked|random_masked|PGDRecon|Stochastic/.test(name);
const deterministic = (metrics: nano.Metrics) =>
  Object.fromEntries(Object.entries(metrics).filter(([name]) => !isRandom(name)));
/** All metrics of the fixture's rows, with p as in the fixture. */
const evaluate = async (f: Fixture, engine: nano.Engine, rows = f.data, slow = true) => {
  const problem = { ...f.problem, config: { ...f.config, pStart: f.p, pEnd: f.p } };
  return nano.compileEvaluation(engine, problem, f.params)(rows, 1, slow);
};

const IMP_METRIC = 'eval/loss/ImportanceMinimalityLoss';
/** It has a test of its own, so that a fork which changes the importance loss keeps the others. */
const withoutImp = ({ [IMP_METRIC]: _, ...others }: nano.Metrics): nano.Metrics => others;
onEveryTarget(`the metric of the importance loss is that of PyTorch, ${PINNED}`, async (f, engine) => {
  const { metrics } = await evaluate(await fixture(f.name, { evalBatchSize: 3, pgdEvalNSteps: 0 }), engine);
  close([metrics[IMP_METRIC]!], [f.eval[IMP_METRIC]!], LOSS, IMP_METRIC);
});

for (const name of TARGETS)
  onEveryEngine(`every deterministic metric is that of PyTorch, by name and value (${name})`, async engine => {
    const f = await fixture(name, { evalBatchSize: 3 });
    const { metrics, meanCi } = await evaluate(f, engine);
    const { 'eval/n_alive': alive, ...named } = metrics;
    const { 'eval/ce_kl/kl_alive': _, ...theirs } = f.eval; // that is one of postprocess/measures.ts
    assert.deepEqual(Object.keys(named).sort(), Object.keys(theirs).sort());
    closeRecords(withoutImp(deterministic(named)), withoutImp(deterministic(theirs)), LOSS);
    const expected = numbers(tf.mean(f.get('ci/g'), 0));
    close(meanCi, expected, FORWARD, 'mean CI');
    assert.equal(alive, expected.filter(ci => ci >= 1e-6).length);
    assert.ok(alive < meanCi.length, 'some components are dead');
  });

onWasm('the names of the metrics, written out', async engine => {
  const f = await fixture('llama', { evalBatchSize: 3, pgdEvalNSteps: 1 });
  const masks = ['ci_masked', 'unmasked', 'stoch_masked', 'random_masked', 'rounded_masked', 'zero_masked'];
  const modules = [...f.modules.map(module => module.path), 'total'];
  const fast = [
    ...['ce_kl/ce_target', 'n_alive', 'loss/FaithfulnessLoss', 'loss/PGDReconLoss'],
    ...['loss/ImportanceMinimalityLoss', 'loss/StochasticReconSubsetLoss'],
    ...masks.flatMap(m => ['kl', 'ce_difference', 'ce_unrecovered'].map(kind => `ce_kl/${kind}_${m}`)),
    ...modules.map(name => `l0/0.1_${name}`),
  ];
  const slow = ['CI', 'Stochastic'].flatMap(kind => modules.map(name => `loss/${kind}HiddenActsReconLoss/${name}`));
  const names = async (withSlow: boolean) => Object.keys((await evaluate(f, engine, f.data, withSlow)).metrics).sort();
  assert.deepEqual(await names(false), fast.map(name => `eval/${name}`).sort());
  assert.deepEqual(await names(true), [...fast, ...slow].map(name => `eval/${name}`).sort());
});

onEveryTarget('metrics with random masks are those of PyTorch, given its random numbers', f => {
  const draws = { stoch: f.draws('draws'), random: f.get('masked/m'), subset: f.draws('draws2') };
  const given = nano.evaluateMasks(f.problem, f.params, f.tokens, tf.scalar(f.p), draws);
  const { active: _, meanCi: __, ...scalars } = given as Record<string, T>;
  const values = Object.entries(scalars).map(([name, x]) => [`eval/${name}`, number(x)] as const);
  assert.ok(values.filter(([name]) => isRandom(name)).length >= 5);
  for (const [name, value] of values) if (name !== IMP_METRIC) close([value], [f.eval[name]!], LOSS, name);

  const hidden = nano.hiddenActsErrors(f.problem, f.params, f.tokens, f.draws('draws2'));
  for (const [kind, errors] of Object.entries(hidden))
    for (const [i, module] of f.modules.entries()) {
      const name = `eval/loss/${kind}HiddenActsReconLoss/${module.path}`;
      close([numbers(errors)[i]!], [f.eval[name]!], LOSS, name);
    }
});

onEveryTarget('the fresh adversary ends where that of PyTorch ends', f => {
  let source = f.get('eval/pgd_start');
  for (let i = 0; i < f.config.pgdEvalNSteps; i++) source = nano.pgdStep(f.problem, f.params, f.tokens, source).next;
  close(source, f.get('eval/pgd_end'), SOURCE, 'sources', 1);
  const { loss } = nano.pgdStep(f.problem, f.params, f.tokens, source);
  close(loss, [f.eval['eval/loss/PGDReconLoss']!], LOSS, 'KL');
});

onEveryEngine('rows that fill no whole batch count as much as the others', async engine => {
  const ofRows = async (evalBatchSize: number, indices: number[]) => {
    const f = await fixture('simple_mlp', { evalBatchSize, pgdEvalNSteps: 1 });
    const rows = { ...f.data, count: indices.length, row: (i: number) => f.data.row(indices[i]!) };
    const { metrics, meanCi } = await evaluate(f, engine, rows);
    return { metrics: deterministic(metrics), meanCi };
  };
  const [whole, batches] = [await ofRows(3, [0, 1, 2]), await ofRows(2, [0, 1, 2])];
  const [first, second] = [await ofRows(2, [0, 1]), await ofRows(2, [2])];
  // of all rows at once the importance loss is not the mean of its batches; everything else is
  const imp = 'eval/loss/ImportanceMinimalityLoss';
  const ofBatches = (2 * first.metrics[imp]! + second.metrics[imp]!) / 3;
  assert.ok(Math.abs(ofBatches / whole.metrics[imp]! - 1) > 1e-3);
  closeRecords(batches.metrics, { ...whole.metrics, [imp]: ofBatches }, REORDERED);
  close(batches.meanCi, whole.meanCi, REORDERED, 'mean CI');
});

onEveryEngine('evaluations leave no tensor behind', async engine => {
  const f = await fixture('simple_mlp', { evalBatchSize: 2, pgdEvalNSteps: 2 });
  const before = tf.memory().numTensors;
  for (const slow of [true, false]) {
    await evaluate(f, engine, f.data, slow);
    assert.equal(tf.memory().numTensors, before);
  }
});

onEveryEngine('an evaluation repeats to the bit; its random numbers change with the seed', async engine => {
  const metricsOf = async (seed: number) =>
    (await evaluate(await fixture('simple_mlp', { evalBatchSize: 3, pgdEvalNSteps: 1, seed }), engine)).metrics;
  const [first, again, other] = [await metricsOf(1), await metricsOf(1), await metricsOf(2)];
  assert.deepEqual(again, first);
  assert.deepEqual(deterministic(other), deterministic(first));
  for (const name of Object.keys(first).filter(isRandom)) assert.notEqual(other[name], first[name], name);
});

// ---- M. Command line ------------------------------------------------------------------------------------------------

const sentences = path.join(temporary, 'sentences.txt');
fs.writeFileSync(sentences, 'ben saw a duck .\n'.repeat(40));
const never = path.join(temporary, 'never');
const onToy = `--engine=wasm --model=${toy} --data=${sentences} --seq-len=4 --out=${never}`;

test('whatever is wrong on the command line is refused in one line that names it', async t => {
  t.mock.method(process.stderr, 'write', () => true); // the engine and the target introduce themselves
  const refuses = (line: string, message: RegExp) =>
    refused(message, () =>
      nano.main(
        line.split(' ').filter(word => word),
        post,
      ),
    );
  await refuses('--no-such-flag', /--no-such-flag/);
  await refuses('train', /train/);
  await refuses('--n-steps', /--n-steps/);
  await refuses('--n-steps=many', /--n-steps: got "many", takes an integer from 1/);
  await refuses('--n-steps=1.5', /--n-steps: got "1\.5", takes an integer/);
  await refuses('--n-steps=0', /--n-steps: got "0", takes an integer from 1/);
  await refuses('--n-steps=', /--n-steps: got "", takes an integer/);
  await refuses('--seed=-1', /--seed: got "-1", takes an integer from 0/);
  await refuses('--coeff-imp=nan', /--coeff-imp: got "nan", takes a number/);
  await refuses('--coeff-imp=-1', /--coeff-imp: got "-1", takes a number from 0/);
  await refuses('--ppgd-beta1=1', /--ppgd-beta1: got "1", takes a number from 0 to 0\.999999/);
  await refuses('--engine=gpu', /--engine: got "gpu", takes one of auto onnx tensorflow webgpu wasm/);
  await refuses('--no-harvest=yes', /--harvest. does not take an argument/);
  await refuses('--preset=none', /--preset: got none, takes one of toy, small-lm, simplestories-2L, pile-4L/);
  await refuses('--save-graph=x.onnx', /--save-graph: goes with --dry-run/);
  await refuses('', /--model: missing/);
  await refuses(`--model=${toy}`, /--data: missing/);
  await refuses('--resume', /--resume: takes --out DIR/);
  await refuses(`--resume --out=${never}`, /never.config\.json/);
  await refuses('eval', /eval: takes --run DIR/);
  await refuses('harvest', /harvest: takes --run DIR/);
  await refuses(`eval --run=${never}`, /never.config\.json/);
  await refuses(`${onToy} --out=${toyFolder('finished', {})}`, /finished: holds a run; --resume goes on/);
  await refuses(`${onToy} --precision=bf16`, /--precision bf16: only on TensorFlow/);
  await refuses(`${onToy} --model=${temporary}`, /config\.json/);
  await refuses(`${onToy} --data=${never}.txt`, /never\.txt/);
  await refuses(`${onToy} --data=${toy}/model.safetensors`, /model\.safetensors/);
  await refuses(`${onToy} --components=*.gate=3`, /--components: \*\.gate matches none/);
  await refuses(`${onToy} --batch-size=6 --micro-batches=4`, /--micro-batches 4 does not divide/);
  await refuses(`${onToy} --seq-len=33`, /--seq-len 33: the target's max_position_embeddings is 32/);
  const picture = `${onToy} --dry-run --save-graph`;
  await refuses(`${picture}=${never}/x.onnx`, /--save-graph .*never.x\.onnx: cannot be written/);
  await refuses(`${picture}=${toy}`, /--save-graph .*: cannot be written \(it is a folder\)/);
  await refuses(`${onToy} --labels=${toy}/config.json`, /config\.json: takes \{"rules"/);
  assert.ok(!fs.existsSync(never), 'what is refused leaves no folder');
});

/** A command line in a process of its own. */
function command(...args: string[]): Promise<{ code: number | null; result: string; talk: string }> {
  const argv = ['--import', 'tsx', path.join(project, 'nano-param-decomp.ts'), ...args];
  const options = { cwd: project, env: { ...process.env, NO_COLOR: '1' } };
  return new Promise(resolve => {
    const child = execFile(process.execPath, argv, options, (_, result, talk) =>
      resolve({ code: child.exitCode, result, talk }),
    );
  });
}

test('a refused command line ends with exit code 2 and one line on standard error', async () => {
  const cases: Record<string, RegExp> = {
    '--no-such-flag': /^nano-param-decomp: .*--no-such-flag.*\n$/,
    '--n-steps=many': /^nano-param-decomp: --n-steps: got "many", .*\n$/,
    [`${onToy} --model=${never}`]: /^engine .*\nnano-param-decomp: .*never.*\n$/, // the engine had started by then
  };
  const ends = await Promise.all(Object.keys(cases).map(line => command(...line.split(' '))));
  for (const [i, message] of Object.values(cases).entries()) {
    assert.match(ends[i]!.talk, message);
    assert.deepEqual([ends[i]!.code, ends[i]!.result], [2, '']);
  }
});

test('what fails after the last step loses nothing: one line that says how to go on, exit code 1', async t => {
  const said: string[] = [];
  t.mock.method(process.stderr, 'write', (line: string) => said.push(line) > 0);
  const out = path.join(temporary, 'fails-at-its-end');
  const small =
    '--n-steps=2 --faithfulness-warmup-steps=1 --components=*=4 --ci-d-model=16 --ci-n-heads=2 --ci-n-blocks=1';
  const finish = async () => {
    throw new Error('no page today\n    at somewhere');
  };
  const line = `${onToy} --out=${out} ${small} --pgd-eval-n-steps=1`;
  assert.equal(await nano.main(line.split(' '), { ...post, finish }), 1);
  assert.match(said.at(-1)!, /^nano-param-decomp: no page today[^\n]*; it is saved: go on with --resume --out .*\n$/);
  assert.equal((await loadPair(out))?.step, 2);
  const finished: nano.Metrics[] = [];
  const go = { ...post, finish: async (_: nano.Run, metrics: nano.Metrics) => void finished.push(metrics) };
  assert.equal(await nano.main(['--resume', `--out=${out}`], go), 0, 'and so it goes on');
  assert.ok(finished[0]!['eval/n_alive']! > 0);
});

test('a step that does not fit into the heap of WASM is refused before it starts', async t => {
  t.mock.method(process.stderr, 'write', () => true);
  const wasm = await nano.startEngine({ ...nano.DEFAULTS, engine: 'wasm' });
  assert.ok(wasm.memoryBytes!() <= 2 ** 32, `${wasm.memoryBytes!()}`);
  const large = `${onToy} --batch-size=20000 --components=*=100000`.split(' ');
  await refused(/a step takes about [\d.]+ GiB and there are [\d.]+ GiB/, () => nano.main(large, post));
});

test('--help lists every field with its flag, and --version prints the version', async t => {
  const log = t.mock.method(console, 'log', () => {});
  assert.equal(await nano.main(['--help'], post), 0);
  assert.equal(await nano.main(['eval', '--version'], post), 0);
  log.mock.restore();
  const [help = '', version = ''] = log.mock.calls.map(call => String(call.arguments[0]));
  for (const [field, value] of Object.entries(nano.DEFAULTS)) {
    const flag = field.replace(/[A-Z]/g, c => `-${c.toLowerCase()}`);
    assert.match(help, new RegExp(`^ +--${value === true ? '\\[no-\\]' : ''}${flag} +\\S.{9}`, 'm'), field);
  }
  for (const preset of Object.keys(PRESETS)) assert.match(help, new RegExp(`^ +${preset} +\\S`, 'm'));
  assert.equal(version, JSON.parse(read(project, 'package.json')).version);
});

// ---- Whole runs -----------------------------------------------------------------------------------------------------

const attention = { dIn: 48, dOut: 48, C: 48 };
const TOY_MODULES = {
  ...{ 'h.0.attn.k_proj': attention, 'h.0.attn.o_proj': attention },
  ...{ 'h.0.attn.q_proj': attention, 'h.0.attn.v_proj': attention },
  'h.0.mlp.c_fc': { dIn: 48, dOut: 192, C: 128 },
  'h.0.mlp.down_proj': { dIn: 192, dOut: 48, C: 128 },
};

/** Trains for 6 steps, checks every file of the run folder, and evaluates it once more. */
async function shortRun(engine: string): Promise<void> {
  const out = path.join(temporary, `run-${engine}`);
  const cutOff = (file: string, first32: (json: never) => unknown) => {
    const copy = path.join(temporary, `${engine}-${file}`);
    fs.writeFileSync(copy, JSON.stringify(first32(JSON.parse(read(toy, file)) as never)));
    return copy;
  };
  const evalData = cutOff('eval.json', (rows: number[][]) => rows.slice(0, 32));
  const data = path.join(temporary, `${engine}-corpus.txt`);
  fs.writeFileSync(data, read(toy, 'corpus.txt').split('\n').slice(0, 400).join('\n'));
  const labels = cutOff('labels.json', (all: Labels) => ({ ...all, labels: all.labels.slice(0, 32) }));
  const args = [
    ...['--preset=toy', `--engine=${engine}`, '--threads=1', `--out=${out}`, '--n-steps=6', '--log-every=2'],
    ...[`--data=${data}`, '--batch-size=8', '--micro-batches=2', '--faithfulness-warmup-steps=5', '--eval-freq=0'],
    ...[`--eval-data=${evalData}`, `--labels=${labels}`, '--eval-batch-size=16', '--pgd-eval-n-steps=3'],
    ...['--harvest-rows=32', ...(engine === 'tensorflow' ? ['--optimizer=adamw'] : [])], // the preset's is Muon
  ];
  const { code, result, talk } = await command(...args);
  assert.equal(code, 0, talk);
  assert.match(talk, /^engine +\S/m);
  assert.match(talk, /^loss +0\.[67]\d+ nats per token/m); // the grammar's entropy is 0.70
  assert.match(result, /fresh PGD, 3 steps +\d/);
  assert.match(result, /mean F1 0\.\d+; \d+ of 43 rules/);

  const files = ['components.safetensors', 'config.json', 'harvest.json', 'metrics.jsonl', 'report.html'];
  assert.deepEqual(fs.readdirSync(out).sort(), [...files, 'state.safetensors']);
  const record = JSON.parse(read(out, 'config.json'));
  const parts = ['command', 'config', 'data', 'engine', 'formatVersion', 'model', 'modules', 'versions'];
  assert.deepEqual(Object.keys(record).sort(), parts);
  assert.deepEqual(Object.keys(record.config).sort(), Object.keys(nano.DEFAULTS).sort());
  assert.deepEqual([record.formatVersion, record.command, record.modules], [1, args, TOY_MODULES]);
  const { nSteps, ppgdLr, ppgdBeta1 } = record.config;
  assert.deepEqual([nSteps, ppgdLr, ppgdBeta1], [6, 0.05, 0.5], 'from a flag, the preset and the defaults');
  assert.deepEqual([record.engine.name, record.model.type], [engine, 'llama_simple_mlp']);
  assert.match(record.model.sha256, /^[\da-f]{64}$/);

  const jsonLines = read(out, 'metrics.jsonl').trimEnd().split('\n');
  const lines = jsonLines.map(line => JSON.parse(line) as Record<string, number>);
  const steps = lines.map(line => line.step);
  assert.deepEqual(steps, [2, 4, 6, 6]);
  for (const [name, value] of lines.flatMap(line => Object.entries(line)))
    assert.ok(Number.isFinite(value), `${name} is ${value}`);
  const logged = [...LOSSES.map(loss => `loss/${loss}`), 'lr/main', 'lr/ppgd', 'time/ms_per_step'];
  for (const name of [...logged, 'memory/tensors', 'memory/bytes']) assert.ok(name in lines[0]!, name);
  const { step: _, ...last } = lines[3]!;
  assert.ok(Object.keys(last).every(name => name.startsWith('eval/')));
  assert.ok(last['eval/ce_kl/kl_zero_masked']! > 5 && last['eval/ce_kl/ce_target']! < 1);

  const components = await openSafetensors(path.join(out, 'components.safetensors'));
  const shapes = [...components.tensors].map(([name, { shape }]) => `${name} ${shape}`);
  const learned = Object.entries(TOY_MODULES).flatMap(([name, { dIn, dOut, C }]) => {
    return [`components.${name}.V ${dIn},${C}`, `components.${name}.U ${C},${dOut}`];
  });
  assert.deepEqual(shapes, [...learned, ...ciNames(64, 256, 5 * 48 + 192, 448).map(line => `ci_fn.${line}`)]);
  for (const name of components.tensors.keys()) {
    const x = components.readFloat32(name);
    assert.ok(x.every(Number.isFinite) && largest(x) > 0, name);
  }
  components.close();
  assert.equal((await loadPair(out))?.step, 6, 'state.safetensors belongs to it');
  assert.ok(Object.keys(JSON.parse(read(out, 'harvest.json'))).length > 0);
  assert.match(read(out, 'report.html'), /<html[\s\S]*<\/html>/);

  const evaluation = await command('eval', `--run=${out}`);
  assert.equal(evaluation.code, 0, evaluation.talk);
  assert.equal(evaluation.result.trimEnd().split('\n').length, 1);
  const found: nano.Metrics = JSON.parse(evaluation.result);
  assert.deepEqual(Object.keys(found).sort(), Object.keys(last).sort());
  closeRecords(deterministic(found), deterministic(last), REORDERED);
}

test('wasm: a short run leaves a whole run folder, and eval finds its metrics again', () => shortRun('wasm'));
test('onnx: and so does one on ONNX Runtime', () => shortRun('onnx'));
test('tensorflow: and so does one as a traced graph', { skip: noTensorFlow }, () => shortRun('tensorflow'));

test('the one file alone, in an empty folder with the packages, still runs', async () => {
  const alone = path.join(temporary, 'alone');
  fs.mkdirSync(alone);
  fs.copyFileSync(path.join(import.meta.dirname, 'nano-param-decomp.ts'), path.join(alone, 'nano-param-decomp.ts'));
  fs.symlinkSync(path.join(import.meta.dirname, 'node_modules'), path.join(alone, 'node_modules'));
  const toy = (file: string) => path.join(import.meta.dirname, 'assets/toy', file);
  const flags = [
    `--model=${toy('')}`,
    `--data=${toy('corpus.txt')}`,
    '--seq-len=32',
    '--components=*=4',
    '--n-steps=2',
  ];
  const small = ['--ci-d-model=16', '--ci-n-heads=2', '--ci-n-blocks=1', '--faithfulness-warmup-steps=2'];
  const others = ['--engine=wasm', '--harvest-rows=8', `--out=${path.join(alone, 'run')}`];
  const argv = ['--import', 'tsx', 'nano-param-decomp.ts', ...flags, ...small, ...others];
  const child = spawnSync(process.execPath, argv, { cwd: alone, encoding: 'utf8' });
  assert.equal(child.status, 0, child.stderr);
  const files = ['components.safetensors', 'config.json', 'harvest.json', 'metrics.jsonl'];
  assert.deepEqual(fs.readdirSync(path.join(alone, 'run')).sort(), files);
  const harvested: nano.ShortHarvest = JSON.parse(read(path.join(alone, 'run'), 'harvest.json'));
  assert.equal(harvested.positions, 8 * 32);
  assert.ok(harvested.components.some(c => c.examples.some(text => /»[^«]+«/.test(text))));
  const components = await openSafetensors(path.join(alone, 'run/components.safetensors')); // the strict reader
  assert.deepEqual(components.tensors.get('components.h.0.attn.q_proj.V')?.shape, [48, 4]);
  for (const name of components.tensors.keys()) assert.ok(components.readFloat32(name).every(Number.isFinite), name);
  components.close();

  const refused: [string[], RegExp][] = [
    ...['--n-stepz=3', '--n-steps=abc', '--n-steps=-3', '--n-steps', '--no-n-steps', '--data', '--harvest=false'].map(
      flag => [[...argv, flag], new RegExp(`${flag}: without io/ takes --name=value`)] as [string[], RegExp],
    ),
    [[...argv, `--data=${toy('eval.json')}`], /eval\.json: without io\/ takes one \.txt file/],
    [[...argv, `--eval-data=${toy('eval.json')}`], /without io\/ takes one \.txt file/],
    [[...argv, '--seq-len=30000'], /too short for rows of 30000 tokens|--seq-len 30000: the target's/],
    [[...argv, '--engine=webgpu'], /--engine webgpu, --precision auto: not without the folder engine\//],
    [[...argv, '--precision=bf16'], /--engine wasm, --precision bf16: not without the folder engine\//],
    [[...argv.slice(0, 3), '--resume', '--out=run'], /--resume: without io\/ takes --name=value/],
    [[...argv.slice(0, 3), 'eval', '--run=run'], /eval: without io\/ takes --name=value/],
  ];
  const [first] = refused;
  const { status, stderr } = spawnSync(process.execPath, [...first![0], '--out=new'], { cwd: alone, encoding: 'utf8' });
  assert.equal(status, 2, stderr);
  assert.match(stderr.trimEnd().split('\n').at(-1)!, first![1]);
  // the others in one process: starting takes a second
  const further = refused.slice(1);
  const script = `const { main } = require('./nano-param-decomp.ts');
    const lines = ${JSON.stringify(further.map(([args]) => [...args.slice(3), '--out=new']))};
    const told = args => main(args).then(code => ({ name: 'none', message: code }), ({ name, message }) => ({ name, message }));
    (async () => {
      const errors = [];
      for (const args of lines) errors.push(await told(args));
      console.log(JSON.stringify(errors));
    })();`;
  fs.writeFileSync(path.join(alone, 'refusals.cjs'), script);
  const all = spawnSync(process.execPath, ['--import', 'tsx', 'refusals.cjs'], { cwd: alone, encoding: 'utf8' });
  assert.equal(all.status, 0, all.stderr);
  const errors: Error[] = JSON.parse(all.stdout.trimEnd().split('\n').at(-1)!);
  for (const [i, [args, message]] of further.entries()) {
    assert.equal(errors[i]!.name, 'UsageError', `${args}: ${errors[i]!.message}`);
    assert.match(errors[i]!.message, message);
  }
});
