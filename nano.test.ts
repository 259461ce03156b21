/**
 * The method, on every engine there is, against what PyTorch computes on two tiny targets (tools/make_fixtures.py says
 * what each key of tools/fixtures/method/ holds), and against formulas that are written out here once more. Then the
 * command line, and whole runs of the toy as child processes.
 */
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, type TestContext, test } from 'node:test';
import * as tf from '@tensorflow/tfjs';
import * as nano from './nano-param-decomp.ts';

// ---- Tolerances -----------------------------------------------------------------------------------------------------
// The fixtures are computed in float64, the engines compute in float32; PyTorch's own float32 stays within these, too.

/** of losses and metrics, relative */
const LOSS = 1e-5;
/** of logits and activations, relative to the tensor's largest value */
const LOGITS = 1e-5;
/** of gradients and of Adam's moments, relative to the tensor's largest value */
const GRADIENT = 1e-4;
/** of parameters after steps, relative to the tensor's largest value … */
const PARAMETER = 1e-5;
/** … and of how far they moved, relative to the tensor's largest move */
const MOVE = 1e-4;
/** of the adversary's sources, which lie in [0, 1], absolute */
const SOURCE = 1e-5;
/** of finite differences in float32, relative */
const DIFFERENCE = 2e-3;
/** of what is the same computation in another order of float32 operations */
const REORDERED = 1e-5;

type T = tf.Tensor;
type Numbers = ArrayLike<number>;
const numbers = (x: T | Numbers): number[] => Array.from(x instanceof tf.Tensor ? x.dataSync() : x);
const largest = (x: Numbers) => Array.from(x).reduce((max, value) => Math.max(max, Math.abs(value)), 0);

/** Every |actual − expected| ≤ tolerance × scale, by default the largest |expected|: never 0, so it compares something. */
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
function closeRecords(actual: Record<string, number>, expected: Record<string, number>, tolerance: number) {
  assert.deepEqual(Object.keys(actual).sort(), Object.keys(expected).sort());
  for (const [name, value] of Object.entries(expected)) close([actual[name]!], [value], tolerance, name);
}

// ---- Engines --------------------------------------------------------------------------------------------------------

const project = import.meta.dirname;
const temporary = fs.mkdtempSync(path.join(os.tmpdir(), 'nano-test-'));
after(() => fs.rmSync(temporary, { recursive: true }));

// op by op: the traced graph is tested in engine/graph.test.ts, and here in the runs of the toy
const options = { ...nano.DEFAULTS, precision: 'float32', graph: false, threads: 1 };
const engines: nano.Engine[] = [await nano.startEngine({ ...options, engine: 'wasm', precision: 'auto' })];
let noTensorFlow: string | false = false;
try {
  engines.push(await nano.startEngine({ ...options, engine: 'tensorflow' }));
} catch (error) {
  if (!(error instanceof nano.UsageError)) throw error;
  noTensorFlow = error.message;
  test('tensorflow', { skip: noTensorFlow });
}

/** A test once on every engine; the tensors that it makes are disposed of. */
function onEveryEngine(name: string, body: (engine: nano.Engine) => void | Promise<void>): void {
  for (const engine of engines)
    test(`${engine.name}: ${name}`, async () => {
      await tf.setBackend(engine.name);
      await nano.tidyAsync(async () => body(engine));
    });
}

// ---- Fixtures -------------------------------------------------------------------------------------------------------

type Losses = Record<'faith' | 'imp' | 'stoch' | 'ppgd', number>;
type StepNumbers = Losses & Record<'total' | 'clipNorm', number>;
/** fixture.json */
interface Answers {
  config: Partial<nano.Config>;
  modules: Record<string, { dIn: number; dOut: number; C: number }>;
  tokens: number[][];
  tokens2: number[][];
  p: number;
  lr: number;
  lrPpgd: number;
  t: number;
  sourcesT: number;
  losses: Losses & { imp3: number };
  step1: StepNumbers;
  step2: StepNumbers;
  accum: StepNumbers;
  warmup: number[];
  schedules: Record<'nSteps' | 'step' | 'mainLr' | 'ppgdLr' | 'p', number>[];
  eval: Record<string, number>;
}
const TARGETS = ['simple_mlp', 'llama'] as const;
const LOSSES = ['faith', 'imp', 'stoch', 'ppgd'] as const;
const COEFFICIENTS = { faith: 'coeffFaith', imp: 'coeffImp', stoch: 'coeffStoch', ppgd: 'coeffPpgd' };

/** A target with its decomposition, and PyTorch's answers. B = 3 rows of S = 7 tokens, N = 21. */
function fixture(name: (typeof TARGETS)[number], changes: Partial<nano.Config> = {}) {
  const dir = path.join(project, 'tools/fixtures/method', name);
  const answers: Answers = JSON.parse(fs.readFileSync(path.join(dir, 'fixture.json'), 'utf8'));
  const file = nano.openSafetensors(path.join(dir, 'fixture.safetensors'));
  const stored = new Map(
    [...file.tensors].map(([key, { shape }]) => [key, { shape, data: file.readFloat32(key) }]),
  );
  file.close();
  const get = (key: string): T => {
    const { data, shape } = stored.get(key) ?? assert.fail(`no ${key} in the fixture of ${name}`);
    return tf.tensor(data, [...shape]);
  };
  const target = nano.loadTarget(dir);
  const components = Object.entries(answers.modules).map(([module, { C }]) => `${module}=${C}`);
  const modules = nano.chooseModules(target.linears, components.join());
  const config = { ...nano.DEFAULTS, ...answers.config, batchSize: 3, seqLen: 7, ...changes };
  const problem: nano.Problem = { target, modules, config };
  const params = nano.initialParams(problem);
  for (const [param, variable] of Object.entries(params)) variable.assign(get(param)); // throws on another shape
  const draws = (key: string): nano.Draws => ({
    ...{ u: get(`${key}/u`), delta: get(`${key}/u_delta`), route: get(`${key}/route`) },
  });
  const tokens = tf.tensor2d(answers.tokens, [3, 7], 'int32');
  return { ...answers, config, problem, modules, params, get, draws, tokens, rows: answers.tokens, N: 21 };
}
type Fixture = ReturnType<typeof fixture>;

/** fixture() of both targets on every engine. */
function onEveryTarget(
  name: string,
  body: (f: Fixture, engine: nano.Engine, target: string) => void | Promise<void>,
) {
  for (const target of TARGETS)
    onEveryEngine(`${name} (${target})`, engine => body(fixture(target), engine, target));
}

/** The optimiser and the adversary in the middle of a run. */
function midRun(f: Fixture): nano.State {
  const state = nano.initialState(f.problem, f.params);
  const names = Object.keys(f.params);
  const m = nano.flatten(Object.fromEntries(names.map(name => [name, f.get(`moments/m/${name}`)])));
  const v = nano.flatten(
    Object.fromEntries(
      names.map(name => [name, tf.mul(tf.onesLike(f.params[name]!), f.get(`moments/v/${name}`))]),
    ),
  );
  for (const group of ['components', 'ci_fn'] as const) {
    state.m[group].assign(m[group]);
    state.v[group].assign(v[group]);
  }
  for (const part of ['s', 'm', 'v'] as const) state.sources[part].assign(f.get(`sources/${part}`));
  return state;
}

/** The feeds of step `n` (0, 1, …) after `midRun`. */
function feeds(f: Fixture, n: number, tokens: T): nano.StepFeeds {
  const { beta1, beta2 } = { beta1: f.config.ppgdBeta1, beta2: f.config.ppgdBeta2 };
  const moves = f.config.ppgdInnerSteps + 1;
  const t = Array.from({ length: moves }, (_, k) => f.sourcesT + n * moves + k + 1);
  return {
    ...{ tokens, key: nano.randomKey(0, n), p: tf.scalar(f.p) },
    ...{ lrMain: tf.scalar(f.lr), lrPpgd: tf.scalar(f.lrPpgd) },
    ...{ c1: tf.scalar(1 - 0.9 ** (f.t + n + 1)), c2: tf.scalar(1 - 0.999 ** (f.t + n + 1)) },
    ppgdC1: tf.tensor1d(t.map(i => 1 - beta1 ** i)),
    ppgdC2: tf.tensor1d(t.map(i => 1 - beta2 ** i)),
  };
}

/** A training step by its parts, with given draws. */
function trainStep(f: Fixture, state: nano.State, stepFeeds: nano.StepFeeds, draws: nano.Draws) {
  const result = nano.lossesAndGradients(f.problem, state.params, state.sources, stepFeeds, draws);
  for (const part of ['s', 'm', 'v'] as const) state.sources[part].assign(result.sources[part]);
  const norms = nano.applyGradients(f.problem, state, nano.flatten(result.gradients), stepFeeds);
  return { ...result, norms };
}

/** The parts of a group's vector (of moments) by parameter. */
function unflatten(f: Fixture, vectors: Record<'components' | 'ci_fn', T>): Record<string, T> {
  const parts: Record<string, T> = {};
  for (const group of ['components', 'ci_fn'] as const) {
    const names = Object.keys(f.params).filter(name => name.startsWith(group));
    const split = tf.split(
      vectors[group],
      names.map(name => f.params[name]!.size),
    );
    for (const [i, name] of names.entries()) parts[name] = split[i]!;
  }
  return parts;
}

/** Parameters after steps: right, and moved by the right amount. */
function closeParams(f: Fixture, key: string, params: Record<string, T>, names: string[]): void {
  for (const name of names) {
    const [now, want, old] = [params[name]!, f.get(`${key}/${name}`), f.get(name)];
    close(now, want, PARAMETER, `${key}/${name}`);
    close(tf.sub(now, old), tf.sub(want, old), MOVE, `${key}/${name}, its move`);
  }
}
const componentNames = (f: Fixture) => Object.keys(f.params).filter(name => name.startsWith('components.'));

// ---- B. Engine: random numbers --------------------------------------------------------------------------------------

const mean = (x: Numbers) => Array.from(x).reduce((sum, value) => sum + value, 0) / x.length;
const variance = (x: Numbers) => {
  const center = mean(x);
  return mean(Array.from(x, value => (value - center) ** 2));
};
/** Pearson's Σ (count − expected)² / expected. */
const chiSquare = (counts: Numbers, expected: Numbers) =>
  Array.from(counts).reduce((sum, n, i) => sum + (n - expected[i]!) ** 2 / expected[i]!, 0);
/** Above this by chance once in 1,000 times, by degrees of freedom. (The keys are fixed: a test passes always or never.) */
const CHI_SQUARE: Record<number, number> = { 3: 16.27, 9: 27.88, 14: 36.12 };

onEveryEngine('random numbers repeat from their key, and differ by seed, step and purpose', () => {
  const draw = (seed: number, step: number, purpose: number) =>
    Array.from(numbers(nano.uniform([40, 25], nano.randomKey(seed, step), purpose)));
  const first = draw(1, 2, 3);
  assert.deepEqual(draw(1, 2, 3), first);
  for (const other of [draw(2, 2, 3), draw(1, 3, 3), draw(1, 2, 4), draw(3, 2, 1), draw(2, 1, 3)]) {
    const same = other.filter((x, i) => x === first[i]).length;
    assert.ok(same <= 2, `${same} of 1,000 numbers are the same`);
    const together = mean(other.map((x, i) => (x - 0.5) * (first[i]! - 0.5))) * 12;
    assert.ok(Math.abs(together) < 0.12, `correlation ${together}`); // 4 standard deviations
  }
});

onEveryEngine('random numbers are uniform in [0, 1)', () => {
  const n = 100_000;
  const x = Array.from(numbers(nano.uniform([n], nano.randomKey(5, 6), 7)));
  assert.ok(x.every(value => value >= 0 && value < 1));
  close([mean(x)], [0.5], 4 * Math.sqrt(1 / 12 / n), 'mean', 1); // 4 standard deviations
  close([variance(x)], [1 / 12], 4 * Math.sqrt(1 / 180 / n), 'variance', 1);
  const bins = new Array(10).fill(0);
  for (const value of x) bins[Math.floor(10 * value)]++;
  assert.ok(chiSquare(bins, new Array(10).fill(n / 10)) < CHI_SQUARE[9]!);
  const next = mean(x.slice(1).map((value, i) => (value - 0.5) * (x[i]! - 0.5))) * 12;
  assert.ok(Math.abs(next) < 4 / Math.sqrt(n), `correlation ${next} of a number with the next`);
});

// ---- C. Target model ------------------------------------------------------------------------------------------------

onEveryTarget('the target gives the logits and pre-weight inputs of PyTorch', f => {
  close(nano.targetForward(f.problem.target, f.tokens), f.get('target/logits'), LOGITS, 'logits');
  const { acts, logProbs, probs } = nano.targetPass(f.problem.target, f.tokens);
  for (const { path: module } of f.modules)
    close(acts[module]!, f.get(`target/input/${module}`), LOGITS, module);
  close(logProbs, tf.logSoftmax(f.get('target/logits')), LOGITS, 'log-probabilities');
  close(tf.sum(probs, 1), tf.ones([f.N]), LOGITS, 'sums of the probabilities');
});

test('F32, F16 and BF16 files of the same weights give the same model', async () => {
  await tf.setBackend('wasm');
  const source = path.join(project, 'tools/fixtures/method/llama');
  const file = nano.openSafetensors(path.join(source, 'model.safetensors'));
  // multiples of 1/16 up to 4 have 7 bits: all three types hold them
  const exact = (x: number) => Math.round(Math.max(-4, Math.min(4, x)) * 16) / 16;
  const tensors = [...file.tensors].map(([name, { shape }]) => ({
    ...{ name, shape, data: file.readFloat32(name).map(exact) },
  }));
  file.close();
  const bits = (x: number) => new Uint32Array(Float32Array.of(x).buffer)[0]!;
  const half = (x: number) =>
    x === 0
      ? 0
      : ((bits(x) >>> 16) & 0x8000) | ((((bits(x) >>> 23) & 255) - 112) << 10) | ((bits(x) >>> 13) & 1023);
  const encodings = {
    F32: (x: number) => [bits(x) & 255, (bits(x) >>> 8) & 255, (bits(x) >>> 16) & 255, bits(x) >>> 24],
    F16: (x: number) => [half(x) & 255, half(x) >>> 8],
    BF16: (x: number) => [(bits(x) >>> 16) & 255, bits(x) >>> 24],
  };
  const logits = Object.entries(encodings).map(([dtype, encode]) => {
    const dir = path.join(temporary, dtype);
    fs.mkdirSync(dir);
    fs.copyFileSync(path.join(source, 'config.json'), path.join(dir, 'config.json'));
    let end = 0;
    const header = Object.fromEntries(
      tensors.map(({ name, shape, data }) => {
        const begin = end;
        end += data.length * encode(1).length;
        return [name, { dtype, shape, data_offsets: [begin, end] }];
      }),
    );
    const json = Buffer.from(JSON.stringify(header));
    const length = Buffer.alloc(8);
    length.writeBigUInt64LE(BigInt(json.length));
    const bytes = Buffer.from(tensors.flatMap(({ data }) => Array.from(data).flatMap(encode)));
    fs.writeFileSync(path.join(dir, 'model.safetensors'), Buffer.concat([length, json, bytes]));
    const target = nano.loadTarget(dir);
    const embedding = target.weights.get('model.embed_tokens.weight')!;
    assert.deepEqual(
      Array.from(embedding.dataSync()),
      Array.from(tensors.find(({ name }) => name === embeddingName)!.data),
    );
    return Array.from(
      tf.tidy(() => nano.targetForward(target, tf.tensor2d([[1, 2, 3]], [1, 3], 'int32'))).dataSync(),
    );
  });
  assert.ok(largest(logits[0]!) > 0.1);
  assert.deepEqual(logits[1], logits[0]);
  assert.deepEqual(logits[2], logits[0]);
});
const embeddingName = 'model.embed_tokens.weight';

// ---- D. Data --------------------------------------------------------------------------------------------------------

const toy = path.join(project, 'assets/toy');

test('the tokenizer of the toy reads and writes every line of its corpus', async () => {
  const tokenizer = await nano.loadTokenizer(toy);
  const lines = fs.readFileSync(path.join(toy, 'corpus.txt'), 'utf8').trimEnd().split('\n');
  assert.ok(lines.length > 1000);
  for (const line of lines) {
    const { ids } = tokenizer.encode(line);
    assert.equal(ids.length, line.split(' ').length + 1); // a word each, after begin-of-text
    assert.equal(tokenizer.decode(ids, { skip_special_tokens: true }), line);
  }
});

/** A copy of the toy's folder with changed files, and data files beside it. */
function toyFolder(name: string, files: Record<string, string>): string {
  const dir = path.join(temporary, name);
  fs.cpSync(toy, dir, { recursive: true });
  for (const [file, content] of Object.entries(files)) fs.writeFileSync(path.join(dir, file), content);
  return dir;
}
const rowsOf = (rows: nano.Rows) => Array.from({ length: rows.count }, (_, i) => [...rows.row(i)]);
const load = (dir: string, file: string, changes: Partial<nano.Config> = {}) =>
  nano.loadData(nano.loadTarget(dir), {
    ...{ ...nano.DEFAULTS, seqLen: 4, data: path.join(dir, file), ...changes },
  });
/** 40 documents of 1 to 5 words, and their ids without marks. */
const documents = Array.from({ length: 40 }, (_, i) => 'ben saw a duck .'.split(' ').slice(0, 1 + (i % 5)));
const plainTokenizer = await nano.loadTokenizer(toy);
const plainIds = (words: string[]) =>
  plainTokenizer.encode(words.join(' '), { add_special_tokens: false }).ids;
const cut = (ids: number[], length: number) =>
  Array.from({ length: Math.floor(ids.length / length) }, (_, i) => ids.slice(i * length, (i + 1) * length));

test('documents are joined by the begin-of-text that the tokenizer adds, and cut into rows', async () => {
  const dir = toyFolder('bos', { 'data.txt': documents.map(words => words.join(' ')).join('\n') });
  const { train, heldOut } = await load(dir, 'data.txt');
  const marked = documents.map(words => [1, ...plainIds(words)]);
  assert.deepEqual(rowsOf(train), cut(marked.slice(0, 38).flat(), 4));
  assert.deepEqual(rowsOf(heldOut), cut(marked.slice(38).flat(), 4), 'the last 5 % of the documents');
  assert.ok(train.count > 30 && heldOut.count === 2);
});

test('documents are joined by the end-of-text of the model when the tokenizer adds nothing', async () => {
  const { post_processor: _, ...tokenizer } = JSON.parse(
    fs.readFileSync(path.join(toy, 'tokenizer.json'), 'utf8'),
  );
  const config = JSON.parse(fs.readFileSync(path.join(toy, 'config.json'), 'utf8'));
  const dir = toyFolder('eos', {
    'tokenizer.json': JSON.stringify(tokenizer),
    'config.json': JSON.stringify({ ...config, eos_token_id: [2, 1] }),
    'data.txt': documents.map(words => words.join(' ')).join('\n\n'),
    'data.jsonl': documents.map(words => JSON.stringify({ text: words.join(' ') })).join('\n'),
  });
  const marked = documents.map(words => [...plainIds(words), 2]);
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
    'other.json': JSON.stringify([[7, 8, 9]]),
  });
  const joined = await load(dir, 'ids.jsonl');
  assert.deepEqual(rowsOf(joined.train), cut(ids.slice(0, 28).flat(), 4));
  const rows = await load(dir, 'ids.json', { evalData: path.join(dir, 'other.json') });
  assert.deepEqual(rowsOf(rows.train), ids);
  assert.deepEqual(rowsOf(rows.heldOut), [[7, 8, 9]]);
  const few = { 'few.json': JSON.stringify(ids.slice(0, 5)) }; // too few documents to spare one: a row of them
  const { train, heldOut } = await load(toyFolder('few', few), 'few.json');
  assert.deepEqual([rowsOf(train), rowsOf(heldOut)], [ids.slice(0, 4), ids.slice(4, 5)]);
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
  const cases: [file: string, message: RegExp][] = [
    ['vocab.json', /vocab\.json: 89 is no token id of the model \(0 to 88\)/],
    ['ragged.json', /ragged\.json: takes .* rows of equal length/],
    ['broken.jsonl', /broken\.jsonl:2: takes/],
    ['short.txt', /short\.txt.*: too short for one row of 4 tokens/],
    ['data.csv', /data\.csv: takes \.txt, \.jsonl or \.json/],
    ['long.json', /long\.json: rows of 33 tokens; the target's max_position_embeddings is 32/],
    ['absent.txt', /absent\.txt/],
  ];
  for (const [file, message] of cases)
    await assert.rejects(
      load(dir, file),
      error => error instanceof nano.UsageError && message.test(error.message),
      file,
    );
});

test('every epoch is a new shuffle of all rows, a function of seed and epoch alone', () => {
  const sequence = (batch: number, steps: number, seed: number) =>
    Array.from({ length: steps }, (_, step) => nano.batchIndices(10, batch, step, seed)).flat();
  const order = sequence(4, 15, 3);
  const epochs = cut(order, 10);
  for (const epoch of epochs) assert.deepEqual([...epoch].sort(), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
  assert.equal(new Set(epochs.map(String)).size, 6, 'no two of the 6 epochs are alike');
  assert.deepEqual(sequence(5, 12, 3), order, 'batches of another size cut the same sequence');
  assert.deepEqual(nano.batchIndices(10, 4, 7, 3), order.slice(28, 32), 'a step can be asked for alone');
  assert.notDeepEqual(sequence(4, 15, 4), order);
});

test('a batch holds the rows asked for, in their order', async () => {
  await tf.setBackend('wasm');
  const rows: nano.Rows = { count: 3, seqLen: 2, row: i => Int32Array.of(10 * i, 10 * i + 1) };
  const batch = nano.tokenBatch(rows, [2, 0]);
  assert.deepEqual(
    [batch.dtype, batch.arraySync()],
    [
      'int32',
      [
        [20, 21],
        [0, 1],
      ],
    ],
  );
});

// ---- E. Components --------------------------------------------------------------------------------------------------

/** Method 1 to the letter: y = r [ ((x V) ⊙ m) U + δ (x Δᵀ) ] + (1 − r) x Wᵀ + b, the delta formed. */
function literalLinear(f: Fixture, { mask, delta, route }: Required<nano.Masks>): nano.Linear {
  const { weights } = f.problem.target;
  const product = (a: T, b: T) => tf.matMul(a as tf.Tensor2D, b as tf.Tensor2D);
  return (name, x) => {
    const W = weights.get(name)!; // Wᵀ
    const own = product(x, W);
    const i = f.modules.findIndex(module => module.path === name);
    let y: T = own;
    if (i >= 0) {
      const { C, offset } = f.modules[i]!;
      const [V, U] = [f.params[`components.${name}.V`]!, f.params[`components.${name}.U`]!];
      const m = tf.slice(mask, [0, offset], [f.N, C]);
      const [δ, r] = [delta, route].map(wide => tf.slice(wide, [0, i], [f.N, 1])) as [T, T];
      const Δ = tf.sub(W, product(V, U));
      const parts = tf.add(product(tf.mul(product(x, V), m), U), tf.mul(δ, product(x, Δ)));
      y = tf.add(tf.mul(r, parts), tf.mul(tf.sub(1, r), own));
    }
    const bias = weights.get(`${name}.bias`);
    return bias ? tf.add(y, bias) : y;
  };
}
const givenMasks = (f: Fixture) => ({
  ...{ mask: f.get('masked/m'), delta: f.get('masked/delta'), route: f.get('masked/route') },
});
const maskedLogits = (f: Fixture, masks: nano.Masks) =>
  nano.maskedLogits(f.problem, f.params, f.tokens, masks);

onEveryTarget('the masked forward is that of PyTorch, with and without routing', f => {
  const { mask, delta, route } = givenMasks(f);
  close(maskedLogits(f, { mask, delta, route }), f.get('masked/logits'), LOGITS, 'routed');
  close(maskedLogits(f, { mask, delta }), f.get('masked/logits_unrouted'), LOGITS, 'not routed');
});

onEveryTarget('the masked forward is the literal formula, whichever masks are given', f => {
  const { mask, delta, route } = givenMasks(f);
  const [all, none] = [tf.onesLike(delta), tf.zerosLike(delta)];
  const cases: Record<string, [nano.Masks, Required<nano.Masks>]> = {
    'all three': [
      { mask, delta, route },
      { mask, delta, route },
    ],
    'no routing': [
      { mask, delta },
      { mask, delta, route: all },
    ],
    'no delta': [
      { mask, route },
      { mask, delta: none, route },
    ],
    neither: [{ mask }, { mask, delta: none, route: all }],
  };
  const results = Object.entries(cases).map(([what, [given, written]]) => {
    const literal = nano.targetForward(f.problem.target, f.tokens, literalLinear(f, written));
    close(maskedLogits(f, given), literal, LOGITS, what);
    return numbers(literal);
  });
  assert.equal(new Set(results.map(String)).size, 4); // the cases are different ones
});

onEveryTarget('nothing changes where all is on, or nothing is routed through components', f => {
  const { mask, delta } = givenMasks(f);
  const on = { mask: tf.onesLike(mask), delta: tf.onesLike(delta) };
  close(maskedLogits(f, on), f.get('target/logits'), LOGITS, 'all components and deltas on');
  const route = tf.zerosLike(delta);
  close(maskedLogits(f, { mask, delta, route }), f.get('target/logits'), LOGITS, 'no module routed');
});

const LINEARS: nano.LinearLayer[] = [
  ...[
    { path: 'h.1.attn.q_proj', dIn: 8, dOut: 6 },
    { path: 'h.0.mlp.c_fc', dIn: 8, dOut: 32 },
  ],
  ...[
    { path: 'h.0.attn.q_proj', dIn: 8, dOut: 6 },
    { path: 'h.0.attn.o_proj', dIn: 6, dOut: 8 },
  ],
];
const chosen = (spec: string) => nano.chooseModules(LINEARS, spec).map(m => `${m.path} ${m.C} ${m.offset}`);

test('--components: the first matching pattern gives C; modules are sorted by path and lie side by side', () => {
  assert.deepEqual(chosen('h.0.attn.q_proj=3,*.attn.*=5'), [
    ...['h.0.attn.o_proj 5 0', 'h.0.attn.q_proj 3 5', 'h.1.attn.q_proj 5 8'],
  ]);
  assert.deepEqual(chosen('auto'), [
    ...['h.0.attn.o_proj 8 0', 'h.0.attn.q_proj 8 8', 'h.0.mlp.c_fc 32 16', 'h.1.attn.q_proj 8 48'],
  ]);
  assert.deepEqual(nano.chooseModules(LINEARS, '*c_fc=2'), [
    { path: 'h.0.mlp.c_fc', dIn: 8, dOut: 32, C: 2, offset: 0 },
  ]);
  assert.equal(nano.totalC(nano.chooseModules(LINEARS, 'auto')), 56);
});

test('--components: what is no pattern=C, or matches nothing, is refused', () => {
  for (const [spec, message] of [
    ['*.q_proj', /got \*\.q_proj, takes pattern=C/],
    ['*.q_proj=0', /got \*\.q_proj=0, takes pattern=C/],
    ['*.q_proj=1.5', /takes pattern=C/],
    ['*.q_proj=3,', /takes pattern=C/],
    ['=3', /takes pattern=C/],
    ['*.q_proj=3,*.gate=4', /\*\.gate matches none of .*h\.0\.mlp\.c_fc/],
    ['h.0.attn.q=3', /h\.0\.attn\.q matches none/], // the whole path
    ['h.0.attnXq_proj=3', /matches none/],
    ['h.0.attn.q.proj=3', /matches none/], // a dot is a dot
  ] as const)
    assert.throws(
      () => nano.chooseModules(LINEARS, spec),
      error => error instanceof nano.UsageError && message.test(error.message),
      spec,
    );
});

// ---- F. CI function -------------------------------------------------------------------------------------------------

onEveryTarget('the CI function gives the logits and importances of PyTorch', f => {
  const { z, g } = nano.importances(f.problem, f.params, f.tokens);
  close(z, f.get('ci/z'), LOGITS, 'z');
  close(g, f.get('ci/g'), LOGITS, 'g');
  close(nano.upperLeaky(z, f.config.leakyAlpha), f.get('ci/g_upper'), LOGITS, 'g⁺');
  const { length } = numbers(g).filter(x => x > 0 && x < 1);
  assert.ok(length > 0.2 * g.size && length < g.size, 'the importances spread over [0, 1]');
});

onEveryEngine(
  'both leaky-hard sigmoids have the values and gradients of PyTorch at hand-picked points',
  () => {
    const f = fixture('simple_mlp');
    const [z, upstream] = [f.get('sigmoid/z'), f.get('sigmoid/upstream')];
    for (const [name, sigmoid] of Object.entries({ lower: nano.lowerLeaky, upper: nano.upperLeaky })) {
      const { value, grad } = tf.valueAndGrad((x: T) => sigmoid(x, f.config.leakyAlpha))(z, upstream);
      close(value, f.get(`sigmoid/${name}`), LOGITS, `${name}-leaky`);
      close(grad, f.get(`sigmoid/${name}_grad`), LOGITS, `gradient of the ${name}-leaky`);
    }
  },
);

/** d f(x + h·direction) / dh at h = 0, by finite differences and by the gradient. */
function slopes(f: (x: T) => T, x: T, h: number): { difference: number; gradient: number } {
  const direction = tf.sin(tf.mul(tf.range(1, x.size + 1, 1, 'float32').reshape(x.shape), 7));
  const at = (side: number) => numbers(f(tf.add(x, tf.mul(direction, side * h))))[0]!;
  const gradient = tf.sum(tf.mul(tf.grad(f as (x: T) => T)(x), direction));
  return { difference: (at(1) - at(-1)) / (2 * h), gradient: numbers(gradient)[0]! };
}

onEveryEngine('hand-made gradients are those of finite differences', () => {
  const wave = (n: number, frequency: number) => tf.sin(tf.mul(tf.range(0, n, 1, 'float32'), frequency));
  const x = tf.mul(wave(60, 1.3), 2).reshape([5, 12]);
  const weights = tf.add(1, wave(60, 2.1)).reshape([5, 12]);
  const target = tf.logSoftmax(wave(60, 0.9).reshape([5, 12]));
  const pass = { logProbs: target, probs: tf.exp(target) } as nano.TargetPass;
  // the sigmoids: away from their kinks, the lower-leaky one only where its gradient is the true one
  const inside = tf.tensor2d([0.05, 0.3, 0.6, 0.95, 1.2, 3], [2, 3]);
  const anywhere = tf.tensor2d([-2, -0.2, 0.3, 0.6, 1.2, 3], [2, 3]);
  const six = tf.tensor2d([1, -2, 3, 1.5, -1, 2], [2, 3]);
  const cases: Record<string, [f: (x: T) => T, x: T]> = {
    rmsNormalize: [x => tf.sum(tf.mul(weights, nano.rmsNormalize(x, 1e-3))), x],
    klLoss: [x => nano.klLoss(pass, x), x],
    lowerLeaky: [x => tf.sum(tf.mul(six, nano.lowerLeaky(x, 0.1))), inside],
    upperLeaky: [x => tf.sum(tf.mul(six, nano.upperLeaky(x, 0.1))), anywhere],
  };
  for (const [name, [f, point]] of Object.entries(cases)) {
    const { difference, gradient } = slopes(f, point, 0.01);
    close([gradient], [difference], DIFFERENCE, name);
  }
});

test('the CI function has the names and shapes of the contract', () => {
  const modules = nano.chooseModules(LINEARS, '*.attn.*=5');
  const config = { ...nano.DEFAULTS, ciDModel: 8, ciNBlocks: 1, ciNHeads: 2, ciMlpHidden: 12 };
  assert.deepEqual(Object.entries(nano.ciShapes({ modules, config } as unknown as nano.Problem)), [
    ...[
      ['ci_fn.proj_in.weight', [8, 22]],
      ['ci_fn.proj_in.bias', [8]],
    ],
    ...[
      ['ci_fn.blocks.0.attn.q_proj.weight', [8, 8]],
      ['ci_fn.blocks.0.attn.k_proj.weight', [8, 8]],
    ],
    ...[
      ['ci_fn.blocks.0.attn.v_proj.weight', [8, 8]],
      ['ci_fn.blocks.0.attn.o_proj.weight', [8, 8]],
    ],
    ...[
      ['ci_fn.blocks.0.mlp.0.weight', [12, 8]],
      ['ci_fn.blocks.0.mlp.0.bias', [12]],
    ],
    ...[
      ['ci_fn.blocks.0.mlp.2.weight', [8, 12]],
      ['ci_fn.blocks.0.mlp.2.bias', [8]],
    ],
    ...[
      ['ci_fn.proj_out.weight', [15, 8]],
      ['ci_fn.proj_out.bias', [15]],
    ],
  ]);
});

// ---- G. Losses ------------------------------------------------------------------------------------------------------

onEveryTarget('every loss is that of PyTorch', f => {
  const { pass, z, g } = nano.importances(f.problem, f.params, f.tokens);
  const [gUpper, p] = [nano.upperLeaky(z, f.config.leakyAlpha), tf.scalar(f.p)];
  const losses = {
    faith: nano.faithfulnessLoss(f.problem, f.params),
    imp: nano.importanceLoss(gUpper, p, f.config),
    imp3: nano.importanceLoss(gUpper, p, f.config, 3),
    stoch: nano.stochasticLoss(f.problem, f.params, pass, g, f.draws('draws')),
    ppgd: nano.adversarialLoss(f.problem, f.params, pass, g, f.get('sources/s')),
  };
  const values = Object.entries(losses).map(([name, loss]) => [name, numbers(loss)[0]!]);
  closeRecords(Object.fromEntries(values), f.losses, LOSS);
});

onEveryTarget('the KL is 0 from the target to itself, and above that otherwise', f => {
  const pass = nano.targetPass(f.problem.target, f.tokens);
  close(nano.klLoss(pass, f.get('target/logits')), [0], 1e-6, 'KL', 1);
  assert.ok(numbers(nano.klLoss(pass, f.get('masked/logits')))[0]! > 0.1);
});

for (const loss of LOSSES)
  onEveryTarget(`the gradients of ${loss} alone are those of PyTorch`, f => {
    const off = { coeffFaith: 0, coeffImp: 0, coeffStoch: 0, coeffPpgd: 0, ppgdInnerSteps: 0 };
    const problem = { ...f.problem, config: { ...f.config, ...off, [COEFFICIENTS[loss]]: 1 } };
    const sources = { s: f.get('sources/s'), m: f.get('sources/m'), v: f.get('sources/v') };
    const given = f.draws('draws');
    const { gradients, losses } = nano.lossesAndGradients(
      problem,
      f.params,
      sources,
      feeds(f, 0, f.tokens),
      given,
    );
    close(
      losses,
      LOSSES.map(name => f.losses[name]),
      LOSS,
      'losses',
      f.losses[loss],
    );
    for (const [name, gradient] of Object.entries(gradients)) {
      const depends =
        loss === 'faith' || loss === 'imp' ? name.startsWith('ci_fn') === (loss === 'imp') : true;
      if (depends) close(gradient, f.get(`grad/${loss}/${name}`), GRADIENT, name);
      else assert.equal(largest(numbers(gradient)), 0, name);
    }
    assert.deepEqual(Object.keys(gradients).sort(), Object.keys(f.params).sort());
  });

onEveryTarget("the sources' gradient of the adversarial loss is that of PyTorch", f => {
  const { pass, g } = nano.importances(f.problem, f.params, f.tokens);
  const loss = (s: T) => nano.adversarialLoss(f.problem, f.params, pass, g, s);
  close(tf.grad(loss)(f.get('sources/s')), f.get('grad/ppgd/sources'), GRADIENT, 'sources');
});

onEveryTarget('routes that follow from given draws are those of PyTorch', f => {
  for (const draws of ['draws', 'draws2']) {
    const route = nano.randomRouting(f.get(`${draws}/u_route`), f.get(`${draws}/u_k`));
    assert.deepEqual(numbers(route), numbers(f.get(`${draws}/route`)));
  }
});

onEveryEngine('routing takes k uniform in 1 … M modules, and every subset of k equally often', () => {
  const [M, N] = [4, 24_000];
  const modules = Array.from({ length: M }, (_, i) => ({ path: `${i}`, dIn: 1, dOut: 1, C: 1, offset: i }));
  const { u, delta, route } = nano.stochasticDraws(
    { modules } as unknown as nano.Problem,
    N,
    nano.randomKey(11, 12),
  );
  const routes = numbers(route);
  const subsets = new Array(1 << M).fill(0);
  for (let n = 0; n < N; n++) {
    let subset = 0;
    for (let i = 0; i < M; i++) subset += routes[n * M + i]! << i;
    subsets[subset]++;
  }
  const bits = (subset: number) => [0, 1, 2, 3].filter(i => subset & (1 << i)).length;
  const choose = [1, 4, 6, 4, 1];
  assert.equal(subsets[0], 0, 'no position goes without a module');
  const expected = subsets.map((_, subset) => N / M / choose[bits(subset)]!);
  assert.ok(chiSquare(subsets.slice(1), expected.slice(1)) < CHI_SQUARE[14]!, `subsets ${subsets}`);
  const sizes = [1, 2, 3, 4].map(k => subsets.reduce((n, m, subset) => n + (bits(subset) === k ? m : 0), 0));
  assert.ok(chiSquare(sizes, new Array(M).fill(N / M)) < CHI_SQUARE[3]!, `sizes ${sizes}`);
  for (let i = 0; i < M; i++) {
    const share = subsets.reduce((n, m, subset) => n + (subset & (1 << i) ? m : 0), 0) / N;
    // each with probability Σ_k k/M / M = 5/8; 4 standard deviations
    close([share], [5 / 8], 4 * Math.sqrt(((5 / 8) * (3 / 8)) / N), `module ${i}`, 1);
  }
  // masks and deltas are other numbers, uniform ones
  for (const part of [u, delta]) close([mean(numbers(part))], [0.5], 4 / Math.sqrt(12 * N * M), 'mean', 1);
  assert.notDeepEqual(numbers(u), numbers(delta));
});

onEveryEngine('a mask lies between the importance and 1, as the random number says', () => {
  const [g, u] = [tf.tensor1d([0, 0, 0.25, 0.25, 1]), tf.tensor1d([0, 0.7, 0, 0.5, 0.3])];
  close(nano.interpolate(g, u), [0, 0.7, 0.25, 0.625, 1], LOGITS, 'mask');
});

// ---- H. Persistent PGD ----------------------------------------------------------------------------------------------

onEveryEngine('Adam is the formula, from its first step on', () => {
  const betas = { beta1: 0.8, beta2: 0.95, eps: 1e-3 };
  const gradients = [0.5, -2, 0.03, 1e-4];
  let [m, v]: [T, T] = [tf.zeros([4]), tf.zeros([4])];
  const [plainM, plainV] = [
    [0, 0, 0, 0],
    [0, 0, 0, 0],
  ];
  for (let t = 1; t <= 3; t++) {
    const grad = gradients.map(x => x * t);
    const corrections = [tf.scalar(1 - 0.8 ** t), tf.scalar(1 - 0.95 ** t)] as const;
    const step = nano.adam(tf.tensor1d(grad), m, v, betas, ...corrections);
    [m, v] = [step.m, step.v];
    const expected = grad.map((x, i) => {
      plainM[i] = 0.8 * plainM[i]! + 0.2 * x;
      plainV[i] = 0.95 * plainV[i]! + 0.05 * x * x;
      return plainM[i]! / (1 - 0.8 ** t) / (Math.sqrt(plainV[i]! / (1 - 0.95 ** t)) + 1e-3);
    });
    close(step.direction, expected, LOGITS, `direction ${t}`);
    close(m, plainM, LOGITS, `m ${t}`);
    close(v, plainV, LOGITS, `v ${t}`);
  }
});

onEveryEngine('the adversary ascends, and its sources stay in [0, 1]', () => {
  const zeros = tf.zeros([4]);
  const before = { s: tf.tensor1d([0.5, 0.5, 0.99, 0.01]), m: zeros, v: zeros };
  const config = { ...nano.DEFAULTS, ppgdBeta1: 0.5, ppgdBeta2: 0.99 };
  const rates = [tf.scalar(0.1), tf.scalar(0.5), tf.scalar(0.01)] as const;
  const { s, m, v } = nano.ascend(before, tf.tensor1d([3, -3, 3, -3]), config, ...rates);
  close(s, [0.6, 0.4, 1, 0], SOURCE, 'sources', 1); // a first step has the size of the learning rate
  assert.ok(largest(numbers(s)) <= 1);
  close(m, [1.5, -1.5, 1.5, -1.5], LOGITS, 'm');
  close(v, [0.09, 0.09, 0.09, 0.09], LOGITS, 'v');
});

// ---- I. Optimisation ------------------------------------------------------------------------------------------------

test('the schedules are those of PyTorch under the default settings', () => {
  const { schedules } = JSON.parse(
    fs.readFileSync(path.join(project, 'tools/fixtures/method/llama/fixture.json'), 'utf8'),
  ) as Answers;
  assert.ok(schedules.length > 20);
  for (const { nSteps, step, mainLr, ppgdLr, p } of schedules) {
    const { lrMain, lrPpgd, p: exponent } = nano.schedule({ ...nano.DEFAULTS, nSteps }, step);
    close([lrMain, lrPpgd, exponent], [mainLr, ppgdLr, p], 1e-12, `step ${step} of ${nSteps}`);
    close([lrMain], [mainLr], 1e-9, `main rate of step ${step} of ${nSteps}`);
    close([lrPpgd], [ppgdLr], 1e-12, `PGD rate of step ${step} of ${nSteps}`, 0.01);
  }
});

test('cosines reach their end with the last step; bias corrections count every step of both Adams', () => {
  close(
    [0, 5, 10].map(step => nano.cosine(step, 11, 0.2)),
    [1, 0.6, 0.2],
    1e-12,
    'cosine',
  );
  const config = { ...nano.DEFAULTS, ppgdInnerSteps: 2 };
  const [first, second] = [nano.schedule(config, 0), nano.schedule(config, 1)];
  close([first.c1, first.c2, second.c1, second.c2], [0.1, 0.001, 0.19, 0.001999], 1e-12, 'AdamW');
  const [c1, c2] = [
    [...first.ppgdC1, ...second.ppgdC1],
    [...first.ppgdC2, ...second.ppgdC2],
  ];
  close(
    c1,
    [1, 2, 3, 4, 5, 6].map(t => 1 - 0.5 ** t),
    1e-12,
    'c1 of the adversary',
  );
  close(
    c2,
    [1, 2, 3, 4, 5, 6].map(t => 1 - 0.99 ** t),
    1e-12,
    'c2 of the adversary',
  );
});

onEveryTarget('three steps of the faithfulness warm-up end where PyTorch ends', async (f, engine) => {
  const state = nano.initialState(f.problem, f.params);
  const losses: number[] = [];
  await nano.warmUp(engine, f.problem, state, async (done, loss) => {
    assert.equal(losses.push(loss), done);
    return true;
  });
  assert.equal(losses.length, 3);
  for (const [i, loss] of f.warmup.entries()) close([losses[i]!], [loss], LOSS, `loss ${i}`);
  closeParams(f, 'warmup', f.params, componentNames(f));
  for (const [name, param] of Object.entries(f.params))
    if (name.startsWith('ci_fn')) assert.deepEqual(numbers(param), numbers(f.get(name)), name);
  assert.equal(largest([...numbers(state.m.components), ...numbers(state.v.components)]), 0);
});

onEveryEngine('the warm-up follows its cosine, and stops when told to', async engine => {
  const run = async (stopAfter: number, changes: Partial<nano.Config>) => {
    const f = fixture('simple_mlp', changes);
    await nano.warmUp(engine, f.problem, nano.initialState(f.problem, f.params), async n => n < stopAfter);
    return numbers(f.params['components.h.0.mlp.c_fc.V']!);
  };
  const toZero = { faithfulnessWarmupLrFinalFrac: 0 };
  assert.deepEqual(await run(3, toZero), await run(2, toZero), 'the rate of the last step is 0');
  assert.notDeepEqual(await run(3, {}), await run(2, {}));
});

onEveryTarget(
  'a training step gives the losses, gradients, parameters, moments and sources of PyTorch',
  (f, _, target) => {
    const state = midRun(f);
    const { losses, gradients, norms } = trainStep(f, state, feeds(f, 0, f.tokens), f.draws('draws'));
    const names = Object.keys(f.params);
    for (const [i, loss] of LOSSES.entries()) close([numbers(losses)[i]!], [f.step1[loss]], LOSS, loss);
    for (const name of names) close(gradients[name]!, f.get(`step1/grad/${name}`), GRADIENT, name);
    close(norms.components, [f.step1.clipNorm], GRADIENT, 'gradient norm before clipping');
    closeParams(f, 'step1/params', state.params, names);
    close(state.sources.s, f.get('step1/sources/s'), SOURCE, 'sources', 1);
    for (const moment of ['m', 'v'] as const) {
      close(state.sources[moment], f.get(`step1/sources/${moment}`), GRADIENT, `${moment} of the sources`);
      if (target === 'llama') continue; // not in its fixture
      const parts = unflatten(f, state[moment]);
      for (const name of names)
        close(parts[name]!, f.get(`step1/${moment}/${name}`), GRADIENT, `${moment} of ${name}`);
    }
  },
);

onEveryEngine('and so does the step after it', () => {
  const f = fixture('simple_mlp');
  const state = midRun(f);
  trainStep(f, state, feeds(f, 0, f.tokens), f.draws('draws'));
  const tokens2 = tf.tensor2d(f.tokens2, [3, 7], 'int32');
  const { losses, norms } = trainStep(f, state, feeds(f, 1, tokens2), f.draws('draws2'));
  for (const [i, loss] of LOSSES.entries()) close([numbers(losses)[i]!], [f.step2[loss]], LOSS, loss);
  close(norms.components, [f.step2.clipNorm], GRADIENT, 'gradient norm before clipping');
  closeParams(f, 'step2/params', state.params, Object.keys(f.params));
  close(state.sources.s, f.get('step2/sources/s'), SOURCE, 'sources', 1);
});

onEveryEngine('a batch in three shards gives the averaged gradients and the sources of PyTorch', () => {
  const f = fixture('simple_mlp', { microBatches: 3 });
  const [all, draws] = [feeds(f, 0, f.tokens), f.draws('draws')];
  const rows = (x: T, r: number) => tf.slice(x, [7 * r, 0], [7, -1]);
  const shards = [0, 1, 2].map(r => {
    const sources = { s: f.get('sources/s'), m: f.get('sources/m'), v: f.get('sources/v') };
    const mine = { s: rows(sources.s, r), m: rows(sources.m, r), v: rows(sources.v, r) };
    const given = { u: rows(draws.u, r), delta: rows(draws.delta, r), route: rows(draws.route!, r) };
    const tokens = tf.slice(f.tokens, [r, 0], [1, 7]);
    return nano.lossesAndGradients(f.problem, f.params, mine, { ...all, tokens }, given);
  });
  const average = (parts: T[]) => tf.div(tf.addN(parts), 3);
  const losses = numbers(average(shards.map(shard => shard.losses)));
  for (const [i, loss] of LOSSES.entries()) close([losses[i]!], [f.accum[loss]], LOSS, loss);
  for (const name of Object.keys(f.params))
    close(average(shards.map(s => s.gradients[name]!)), f.get(`accum/grad/${name}`), GRADIENT, name);
  const sources = tf.concat(
    shards.map(shard => shard.sources.s),
    0,
  );
  close(sources, f.get('accum/sources/s'), SOURCE, 'sources', 1);
});

/** The fixture's rows as training data. */
const rowsOfTokens = (f: Fixture): nano.Rows => ({
  ...{ count: 3, seqLen: 7, row: (i: number) => Int32Array.from(f.rows[i]!) },
});

for (const R of [1, 3])
  onEveryEngine(
    `the compiled step with ${R} micro-batch(es) is its parts, one after another`,
    async engine => {
      const settings = { microBatches: R, gradClipCi: 0.05, mainLr: 0.01, seed: 9 };
      const [compiled, manual] = [fixture('simple_mlp', settings), fixture('simple_mlp', settings)];
      const [state, expected] = [compiled, manual].map(midRun) as [nano.State, nano.State];
      const data = rowsOfTokens(compiled);
      const step = nano.compileStep(engine, compiled.problem, state);
      for (const n of [4, 5]) {
        const metrics = await step(n, data);
        const scheduled = nano.schedule(manual.config, n);
        const shared = {
          ...{
            p: tf.scalar(scheduled.p),
            lrMain: tf.scalar(scheduled.lrMain),
            lrPpgd: tf.scalar(scheduled.lrPpgd),
          },
          ...{ c1: tf.scalar(scheduled.c1), c2: tf.scalar(scheduled.c2) },
          ...{ ppgdC1: tf.tensor1d(scheduled.ppgdC1), ppgdC2: tf.tensor1d(scheduled.ppgdC2) },
        };
        const order = nano.batchIndices(3, 3, n, 9);
        const size = 21 / R;
        const shards = Array.from({ length: R }, (_, r) => {
          const rows = (x: T) => tf.slice(x, [r * size, 0], [size, -1]);
          const { s, m, v } = expected.sources;
          const tokens = nano.tokenBatch(data, order.slice((r * 3) / R, ((r + 1) * 3) / R));
          return nano.lossesAndGradients(
            manual.problem,
            manual.params,
            { s: rows(s), m: rows(m), v: rows(v) },
            { ...shared, tokens, key: nano.randomKey(9, n * R + r) },
          );
        });
        for (const part of ['s', 'm', 'v'] as const)
          expected.sources[part].assign(
            tf.concat(
              shards.map(shard => shard.sources[part]),
              0,
            ),
          );
        const average = (parts: T[]) => tf.div(tf.addN(parts), R);
        const gradients = Object.fromEntries(
          Object.keys(manual.params).map(name => [
            name,
            average(shards.map(shard => shard.gradients[name]!)),
          ]),
        );
        const norms = nano.applyGradients(manual.problem, expected, nano.flatten(gradients), shared);
        const losses = Array.from(numbers(average(shards.map(shard => shard.losses))));
        const { coeffFaith, coeffImp, coeffStoch, coeffPpgd } = manual.config;
        const [faith = 0, imp = 0, stoch = 0, ppgd = 0] = losses;
        const total = coeffFaith * faith + coeffImp * imp + coeffStoch * stoch + coeffPpgd * ppgd;
        const l0 = numbers(average(shards.map(shard => shard.l0)))[0]!;
        const rest = [total, l0, numbers(norms.components)[0]!, numbers(norms.ci_fn)[0]!];
        assert.equal(metrics.length, 8);
        for (const [i, value] of [...losses, ...rest].entries())
          close([metrics[i]!], [value], REORDERED, `metric ${i}`);
        for (const name of Object.keys(manual.params))
          close(compiled.params[name]!, manual.params[name]!, REORDERED, name);
        for (const part of ['s', 'm', 'v'] as const)
          close(state.sources[part], expected.sources[part], REORDERED, `sources ${part}`);
      }
    },
  );

const vectors = (f: Fixture, fill: (n: number) => T) =>
  nano.flatten(
    Object.fromEntries(
      Object.entries(f.params).map(([name, param]) => [name, fill(param.size).reshape(param.shape)]),
    ),
  );
const stepRates = { lrMain: 0.1, c1: 1 - 0.9, c2: 1 - 0.999 };
const rates = () => ({
  ...{ lrMain: tf.scalar(stepRates.lrMain), c1: tf.scalar(stepRates.c1), c2: tf.scalar(stepRates.c2) },
});

onEveryEngine('gradients are clipped by the norm of their group, jointly, and only above the limit', () => {
  for (const [gradClipComponents, gradClipCi] of [
    [0.5, 0],
    [0, 0.25],
    [1e6, 1e6],
  ] as const) {
    const f = fixture('simple_mlp', { gradClipComponents, gradClipCi });
    const state = nano.initialState(f.problem, f.params);
    const gradients = vectors(f, n => tf.sin(tf.range(1, n + 1, 1, 'float32')));
    const norms = nano.applyGradients(f.problem, state, gradients, rates());
    const limits = { components: gradClipComponents, ci_fn: gradClipCi };
    for (const group of ['components', 'ci_fn'] as const) {
      const norm = Math.hypot(...numbers(gradients[group]));
      close(norms[group], [norm], LOSS, `norm of ${group}`);
      const factor = limits[group] > 0 ? Math.min(1, limits[group] / norm) : 1;
      // from moments 0: m = (1 − β1) × the clipped gradient
      close(state.m[group], tf.mul(gradients[group], 0.1 * factor), GRADIENT, `clipped ${group}`);
    }
  }
});

onEveryEngine('a gradient that is not finite moves nothing', () => {
  const f = fixture('simple_mlp');
  const state = nano.initialState(f.problem, f.params);
  const { components, ci_fn } = vectors(f, n => tf.ones([n]));
  const norms = nano.applyGradients(f.problem, state, { components, ci_fn: tf.div(ci_fn, 0) }, rates());
  assert.ok(!Number.isFinite(numbers(norms.ci_fn)[0]!));
  for (const [name, param] of Object.entries(f.params))
    assert.deepEqual(numbers(param), numbers(f.get(name)), name);
  nano.applyGradients(f.problem, state, { components, ci_fn }, rates());
  for (const [name, param] of Object.entries(f.params))
    close(tf.sub(f.get(name), param), tf.fill(param.shape, 0.1), MOVE, `${name}, a step later`); // the learning rate
});

test('parameters and sources start from their distributions, a function of the seed', async () => {
  await tf.setBackend('wasm');
  const modules: nano.Module[] = [
    ...[
      { path: 'a', dIn: 50, dOut: 100, C: 80, offset: 0 },
      { path: 'b', dIn: 100, dOut: 50, C: 60, offset: 80 },
    ],
  ];
  const ci = { ciDModel: 64, ciNBlocks: 1, ciNHeads: 4, ciMlpHidden: 128 };
  const start = (seed: number) => {
    const config = { ...nano.DEFAULTS, ...ci, seed, batchSize: 5, seqLen: 9 };
    const problem = { modules, config } as unknown as nano.Problem;
    const params = nano.initialParams(problem);
    return { params, state: nano.initialState(problem, params) };
  };
  const { params, state } = start(1);
  const [again, other] = [start(1), start(2)];
  for (const { path: name, dIn, dOut, C } of modules) {
    const parts = { V: [dIn, C, 1 / dIn], U: [C, dOut, 1 / C] } as const; // shape and variance
    for (const [part, [rows, columns, expected]] of Object.entries(parts)) {
      const param = params[`components.${name}.${part}`]!;
      assert.deepEqual(param.shape, [rows, columns]);
      const x = Array.from(numbers(param), value => value / Math.sqrt(expected));
      close([mean(x)], [0], 4 / Math.sqrt(x.length), 'mean', 1);
      close([variance(x)], [1], 4 * Math.sqrt(2 / x.length), 'variance', 1);
      const within = x.filter(value => Math.abs(value) < 1).length / x.length;
      close([within], [0.6827], 4 * Math.sqrt(0.22 / x.length), 'share within a standard deviation', 1);
    }
  }
  for (const name of Object.keys(params).filter(name => name.startsWith('ci_fn'))) {
    // uniform within 1 / √fan_in, biases as their weights
    const bound = 1 / Math.sqrt(params[name.replace(/bias$/, 'weight')]!.shape[1]!);
    const x = Array.from(numbers(params[name]!), value => value / bound);
    assert.ok(largest(x) <= 1 && largest(x) > 0.9, name);
    close([mean(x)], [0], 4 / Math.sqrt(3 * x.length), `mean of ${name}`, 1);
    close([variance(x)], [1 / 3], 4 * Math.sqrt(4 / 45 / x.length), `variance of ${name}`, 1);
  }
  const values = Object.entries(params).map(([name, param]) => [name, numbers(param)] as const);
  for (const [name, value] of values) {
    assert.deepEqual(numbers(again.params[name]!), value, name);
    assert.notDeepEqual(numbers(other.params[name]!), value, name);
  }
  const starts = values.map(([, value]) => String(value.slice(0, 3).map(x => x / value[0]!)));
  assert.equal(new Set(starts).size, starts.length, 'no two parameters share their numbers');

  const { s, m, v } = state.sources;
  assert.deepEqual(s.shape, [45, 142]);
  const sources = numbers(s);
  assert.ok(sources.every(x => x >= 0 && x < 1));
  close([mean(sources)], [0.5], 4 / Math.sqrt(12 * s.size), 'mean of the sources', 1);
  close([variance(sources)], [1 / 12], 4 * Math.sqrt(1 / 180 / s.size), 'variance of the sources', 1);
  for (const moment of [m, v, ...Object.values(state.m), ...Object.values(state.v)])
    assert.equal(largest(numbers(moment)), 0);
});

test('sizes that are left open follow the target, by a rule that gives the published ones', () => {
  const arch = (dModel: number, nLayers: number) =>
    ({ dModel, nLayers, context: 512, contextField: 'n_ctx' }) as nano.Architecture;
  const sizes = (dModel: number, nLayers: number) => {
    const c = nano.resolveConfig(nano.DEFAULTS, arch(dModel, nLayers), new Set(), true);
    return [c.ciDModel, c.ciNBlocks, c.ciNHeads, c.ciMlpHidden, c.batchSize, c.evalBatchSize];
  };
  assert.deepEqual(sizes(768, 4), [2048, 8, 16, 8192, 64, 64]); // pile-4L
  assert.deepEqual(sizes(192, 2), [512, 4, 8, 2048, 64, 64]); // simplestories-2L
  const [d = 0, , heads = 0] = sizes(50, 1);
  assert.equal(d % (2 * heads), 0);
  const small = nano.resolveConfig(nano.DEFAULTS, { ...arch(64, 1), context: 32 }, new Set(), false);
  assert.deepEqual([small.batchSize, small.seqLen], [4, 32], 'on a CPU engine, and a target with short rows');
  for (const [changes, message] of [
    [{ batchSize: 6, microBatches: 4 }, /--micro-batches 4 does not divide --batch-size 6/],
    [{ ciDModel: 20, ciNHeads: 4 }, /--ci-d-model 20 is no even number for each of 4/],
    [{ seqLen: 513 }, /--seq-len 513: the target's n_ctx is 512/],
  ] as const) {
    const given = new Set(Object.keys(changes));
    assert.throws(
      () => nano.resolveConfig({ ...nano.DEFAULTS, ...changes }, arch(64, 1), given, true),
      message,
    );
  }
});

for (const R of [1, 3])
  onEveryEngine(
    `the number of tensors is flat over steps and evaluations, with ${R} micro-batch(es)`,
    async engine => {
      const f = fixture('simple_mlp', { microBatches: R, evalBatchSize: 2, pgdEvalNSteps: 2 });
      const state = nano.initialState(f.problem, f.params);
      const step = nano.compileStep(engine, f.problem, state);
      const evaluate = nano.compileEvaluation(engine, f.problem, f.params);
      const counts: number[] = [];
      for (let n = 0; n < 5; n++) {
        await step(n, rowsOfTokens(f));
        if (n % 2 === 0) await evaluate(rowsOfTokens(f), { step: n, slow: true });
        counts.push(tf.memory().numTensors);
      }
      assert.deepEqual(counts, new Array(5).fill(counts[0]));
    },
  );

// ---- J. Evaluation --------------------------------------------------------------------------------------------------

/** Metrics that follow from the parameters and the tokens alone. */
const isRandom = (name: string) => /stoch_masked|random_masked|PGDRecon|Stochastic/.test(name);
const deterministic = (metrics: nano.Metrics) =>
  Object.fromEntries(Object.entries(metrics).filter(([name]) => !isRandom(name)));

onEveryTarget(
  'the evaluation has the names of the original, and every deterministic metric of PyTorch',
  async (f, engine) => {
    // p does not change over this run
    const config = { ...f.config, evalBatchSize: 3, pStart: f.p, pEnd: f.p };
    const evaluate = nano.compileEvaluation(engine, { ...f.problem, config }, f.params);
    const { metrics, meanCi } = await evaluate(rowsOfTokens(f), { step: 1, slow: true });
    const { 'eval/n_alive': alive, ...named } = metrics;
    assert.deepEqual(Object.keys(named).sort(), Object.keys(f.eval).sort());
    closeRecords(deterministic(named), deterministic(f.eval), LOSS);
    const expected = tf.mean(f.get('ci/g'), 0);
    close(meanCi, expected, LOGITS, 'mean CI');
    assert.equal(alive, numbers(expected).filter(ci => ci >= 1e-6).length);
    assert.ok(alive < meanCi.length, 'some components are dead');
  },
);

test('the names of the metrics, written out', async () => {
  await tf.setBackend('wasm');
  const f = fixture('llama', { evalBatchSize: 3, pgdEvalNSteps: 1 });
  const evaluate = nano.compileEvaluation(engines[0]!, f.problem, f.params);
  const masks = ['ci_masked', 'unmasked', 'stoch_masked', 'random_masked', 'rounded_masked', 'zero_masked'];
  const fast = [
    ...[
      'ce_target',
      'kl_alive',
      ...masks.flatMap(m => [`kl_${m}`, `ce_difference_${m}`, `ce_unrecovered_${m}`]),
    ].map(name => `ce_kl/${name}`),
    ...['FaithfulnessLoss', 'ImportanceMinimalityLoss', 'StochasticReconSubsetLoss', 'PGDReconLoss'].map(
      name => `loss/${name}`,
    ),
    ...[...f.modules.map(m => m.path), 'total'].map(name => `l0/0.1_${name}`),
    'n_alive',
  ];
  const slow = ['CI', 'Stochastic'].flatMap(kind =>
    [...f.modules.map(m => m.path), 'total'].map(name => `loss/${kind}HiddenActsReconLoss/${name}`),
  );
  const names = async (withSlow: boolean) =>
    Object.keys((await evaluate(rowsOfTokens(f), { step: 1, slow: withSlow })).metrics).sort();
  assert.deepEqual(await names(false), fast.map(name => `eval/${name}`).sort());
  assert.deepEqual(await names(true), [...fast, ...slow].map(name => `eval/${name}`).sort());
});

onEveryTarget('metrics with random masks are those of PyTorch when given its random numbers', f => {
  const draws = { stoch: f.draws('draws'), random: f.get('masked/m'), subset: f.draws('draws2') };
  const { active, meanCi, ...scalars } = nano.evaluateMasks(
    f.problem,
    f.params,
    f.tokens,
    tf.scalar(f.p),
    draws,
  );
  assert.equal(active.size, meanCi.size);
  const values = Object.entries(scalars as Record<string, T>).map(([name, x]) => [
    `eval/${name}`,
    numbers(x)[0]!,
  ]);
  const expected = Object.entries(f.eval).filter(([name]) => values.some(([n]) => n === name));
  closeRecords(Object.fromEntries(values), Object.fromEntries(expected), LOSS);
  assert.ok(expected.some(([name]) => name === 'eval/ce_kl/kl_stoch_masked'));

  const hidden = nano.hiddenActsErrors(f.problem, f.params, f.tokens, f.draws('draws2'));
  for (const [kind, errors] of Object.entries(hidden))
    for (const [i, { path: module }] of f.modules.entries())
      close([numbers(errors)[i]!], [f.eval[`eval/loss/${kind}HiddenActsReconLoss/${module}`]!], LOSS, module);

  const alive = tf.cast(tf.greaterEqual(tf.mean(f.get('ci/g'), 0, true), 1e-6), 'float32');
  const kl = nano.klAlive(f.problem, f.params, f.tokens, alive);
  close(kl, [f.eval['eval/ce_kl/kl_alive']!], LOSS, 'KL when the dead are deleted');
});

onEveryTarget('the fresh adversary ends where that of PyTorch ends', f => {
  let source = f.get('eval/pgd_start');
  for (let i = 0; i < f.config.pgdEvalNSteps; i++)
    source = nano.pgdStep(f.problem, f.params, f.tokens, source).next;
  close(source, f.get('eval/pgd_end'), SOURCE, 'sources', 1);
  const { kl } = nano.pgdStep(f.problem, f.params, f.tokens, source);
  close(kl, [f.eval['eval/loss/PGDReconLoss']!], LOSS, 'KL');
});

onEveryEngine('rows that fill no whole batch count as much as the others', async engine => {
  const evaluate = async (evalBatchSize: number, rows: number[]) => {
    const f = fixture('simple_mlp', { evalBatchSize, pStart: 0.9, pEnd: 0.9, pgdEvalNSteps: 1 });
    const row = (i: number) => Int32Array.from(f.rows[rows[i]!]!);
    const data = { count: rows.length, seqLen: 7, row };
    const { metrics, meanCi } = await nano.compileEvaluation(
      engine,
      f.problem,
      f.params,
    )(data, { step: 1, slow: true });
    return { metrics: deterministic(metrics), meanCi };
  };
  const whole = await evaluate(3, [0, 1, 2]);
  const batches = await evaluate(2, [0, 1, 2]);
  const [first, second] = [await evaluate(2, [0, 1]), await evaluate(2, [2])];
  // over all three rows the importance loss is no mean of its batches; the others are
  const imp = 'eval/loss/ImportanceMinimalityLoss';
  const expected = (2 / 3) * first.metrics[imp]! + (1 / 3) * second.metrics[imp]!;
  closeRecords(batches.metrics, { ...whole.metrics, [imp]: expected }, REORDERED);
  assert.ok(Math.abs(expected / whole.metrics[imp]! - 1) > 1e-3);
  close(batches.meanCi, whole.meanCi, REORDERED, 'mean CI');
});

onEveryEngine(
  'an evaluation repeats to the bit, and its random numbers are not those of another seed',
  async engine => {
    const evaluate = async (seed: number) => {
      const f = fixture('simple_mlp', { evalBatchSize: 3, pgdEvalNSteps: 1, seed });
      for (const [name, param] of Object.entries(f.params)) param.assign(f.get(name));
      const { metrics } = await nano.compileEvaluation(
        engine,
        f.problem,
        f.params,
      )(rowsOfTokens(f), { step: 1, slow: true });
      return metrics;
    };
    const [first, again, other] = [await evaluate(1), await evaluate(1), await evaluate(2)];
    assert.deepEqual(again, first);
    for (const [name, value] of Object.entries(other))
      if (isRandom(name)) assert.notEqual(value, first[name], name);
      else close([value], [first[name]!], REORDERED, name);
  },
);

// ---- N. Command line ------------------------------------------------------------------------------------------------

/** What a command line is refused with, without a process of its own. */
async function refusal(t: TestContext, args: string[]): Promise<string> {
  const said = t.mock.method(process.stderr, 'write', () => true);
  try {
    const code = await nano.main(args);
    return assert.fail(`exit code ${code}`);
  } catch (error) {
    if (!(error instanceof nano.UsageError)) throw error;
    return error.message;
  } finally {
    said.mock.restore();
  }
}
const text = path.join(temporary, 'text.txt');
fs.writeFileSync(text, 'ben saw a duck .\n'.repeat(40));
const onToy = [
  '--engine=wasm',
  `--model=${toy}`,
  `--data=${text}`,
  '--seq-len=4',
  `--out=${temporary}/never`,
];

test('whatever is wrong on the command line is refused in one line that names it', async t => {
  fs.mkdirSync(path.join(temporary, 'finished'));
  fs.writeFileSync(path.join(temporary, 'finished/config.json'), '{}');
  const cases: [args: string[], message: RegExp][] = [
    [['--no-such-flag'], /--no-such-flag/],
    [['--no-such-flag=3'], /--no-such-flag/],
    [['train'], /train/],
    [['--n-steps'], /--n-steps/],
    [['--n-steps=many'], /--n-steps: got "many", takes an integer from 1/],
    [['--n-steps=1.5'], /--n-steps: got "1\.5", takes an integer/],
    [['--n-steps=0'], /--n-steps: got "0", takes an integer from 1/],
    [['--n-steps='], /--n-steps: got "", takes an integer/],
    [['--seed=-1'], /--seed: got "-1", takes an integer from 0/],
    [['--coeff-imp=nan'], /--coeff-imp: got "nan", takes a number/],
    [['--coeff-imp=-1'], /--coeff-imp: got "-1", takes a number from 0/],
    [['--ppgd-beta1=1'], /--ppgd-beta1: got "1", takes a number from 0 to 0\.999999/],
    [['--engine=gpu'], /--engine: got "gpu", takes one of auto tensorflow webgpu wasm/],
    [['--harvest'], /--harvest/],
    [['--no-harvest=yes'], /--no-harvest/],
    [['--preset=none'], /--preset: got none, takes one of toy, simplestories-2L, pile-4L/],
    [[], /--model: missing/],
    [[`--model=${toy}`], /--data: missing/],
    [['--resume'], /--resume: takes --out DIR/],
    [['--resume', `--out=${temporary}/absent`], /absent.config\.json/],
    [['eval'], /eval: takes --run DIR/],
    [['harvest'], /harvest: takes --run DIR/],
    [['eval', `--run=${temporary}/absent`], /absent.config\.json/],
    [[...onToy, `--out=${temporary}/finished`], /finished: holds a run; --resume goes on/],
    [['--engine=wasm', '--precision=bf16', ...onToy], /--precision bf16: only on TensorFlow/],
    [[...onToy, `--model=${temporary}`], /config\.json/],
    [[...onToy, `--data=${temporary}/absent.txt`], /absent\.txt/],
    [[...onToy, '--components=*.gate=3'], /--components: \*\.gate matches none/],
    [[...onToy, '--batch-size=6', '--micro-batches=4'], /--micro-batches 4 does not divide/],
    [[...onToy, '--seq-len=33'], /--seq-len 33: the target's max_position_embeddings is 32/],
    [[...onToy, '--seq-len=32', `--data=${temporary}/F32/config.json`], /config\.json: takes \[\[ids/],
    [[...onToy, `--labels=${toy}/config.json`], /config\.json: takes \{"rules"/],
  ];
  for (const [args, message] of cases) {
    const refused = await refusal(t, args);
    assert.match(refused, message, args.join(' '));
    assert.ok(!refused.includes('\n'), `${args.join(' ')}: ${refused}`);
  }
  assert.ok(!fs.existsSync(path.join(temporary, 'never')), 'a refused run leaves no folder');
});

/** A command line in a process of its own. */
function command(...args: string[]): Promise<{ code: number; result: string; talk: string }> {
  const file = path.join(project, 'nano-param-decomp.ts');
  return new Promise(resolve => {
    const child = execFile(
      process.execPath,
      ['--import', 'tsx', file, ...args],
      { cwd: project, env: { ...process.env, NO_COLOR: '1' } },
      (_error, result, talk) => resolve({ code: child.exitCode ?? -1, result, talk }),
    );
  });
}

test('a refused command line ends with exit code 2, one line on standard error and nothing on standard output', async () => {
  const cases: [args: string[], talk: RegExp][] = [
    [['--no-such-flag'], /^nano-param-decomp: .*--no-such-flag.*\n$/],
    [['--n-steps=many'], /^nano-param-decomp: --n-steps: got "many", .*\n$/],
    // the engine has introduced itself by then
    [[...onToy, `--model=${temporary}/absent`], /^engine .*\nnano-param-decomp: .*absent.*\n$/],
  ];
  const ends = await Promise.all(cases.map(([args]) => command(...args)));
  for (const [i, { code, result, talk }] of ends.entries()) {
    assert.match(talk, cases[i]![1]);
    assert.deepEqual([code, result], [2, '']);
  }
});

test('--help lists every field with its flag, --version is a version', async t => {
  const log = t.mock.method(console, 'log', () => {});
  assert.deepEqual([await nano.main(['--help']), await nano.main(['eval', '--version'])], [0, 0]);
  log.mock.restore();
  const [help, version] = log.mock.calls.map(call => String(call.arguments[0])) as [string, string];
  for (const [field, value] of Object.entries(nano.DEFAULTS)) {
    const flag = field.replace(/[A-Z]/g, c => `-${c.toLowerCase()}`);
    assert.match(help, new RegExp(`^ +--${value === true ? 'no-' : ''}${flag} +\\S.* .*$`, 'm'), field);
  }
  for (const preset of Object.keys(nano.PRESETS)) assert.match(help, new RegExp(`^ +${preset} `, 'm'));
  assert.match(version, /^\d+\.\d+\.\d+$/);
});

// ---- Whole runs -----------------------------------------------------------------------------------------------------

const TOY_MODULES = {
  'h.0.attn.k_proj': { dIn: 48, dOut: 48, C: 48 },
  'h.0.attn.o_proj': { dIn: 48, dOut: 48, C: 48 },
  'h.0.attn.q_proj': { dIn: 48, dOut: 48, C: 48 },
  'h.0.attn.v_proj': { dIn: 48, dOut: 48, C: 48 },
  'h.0.mlp.c_fc': { dIn: 48, dOut: 192, C: 128 },
  'h.0.mlp.down_proj': { dIn: 192, dOut: 48, C: 128 },
};

for (const [engine, skip] of [
  ['wasm', false],
  ['tensorflow', noTensorFlow],
] as const)
  test(`${engine}: a short run of the toy leaves a whole run folder, and eval finds its metrics again`, {
    skip,
  }, async () => {
    const out = path.join(temporary, `run-${engine}`);
    const args = [
      ...[
        '--preset=toy',
        `--engine=${engine}`,
        '--threads=1',
        `--out=${out}`,
        '--n-steps=6',
        '--log-every=2',
      ],
      ...['--batch-size=8', '--micro-batches=2', '--faithfulness-warmup-steps=5', '--eval-freq=0'],
      ...['--eval-batch-size=16', '--pgd-eval-n-steps=3', '--harvest-rows=32'],
    ];
    const { code, result, talk } = await command(...args);
    assert.equal(code, 0, talk);
    assert.match(talk, /^engine .*$/m);
    assert.match(talk, /^loss +0\.[67]\d+ nats per token/m); // the grammar's entropy is 0.70
    assert.match(result, /fresh PGD, 3 steps.*\d/);
    assert.match(result, /mean F1 0\.\d+; \d+ of 43 rules/);

    const files = ['components.safetensors', 'config.json', 'harvest.json', 'metrics.jsonl', 'report.html'];
    assert.deepEqual(fs.readdirSync(out).sort(), [...files, 'state.safetensors']);
    const read = (file: string) => fs.readFileSync(path.join(out, file), 'utf8');

    const record = JSON.parse(read('config.json'));
    const parts = ['command', 'config', 'data', 'engine', 'formatVersion', 'model', 'modules', 'versions'];
    assert.deepEqual(Object.keys(record).sort(), parts);
    assert.deepEqual(Object.keys(record.config).sort(), Object.keys(nano.DEFAULTS).sort());
    assert.deepEqual([record.formatVersion, record.command, record.modules], [1, args, TOY_MODULES]);
    assert.deepEqual([record.config.nSteps, record.config.ppgdLr, record.engine.name], [6, 0.05, engine]);
    assert.deepEqual([record.model.type, record.model.sha256.length], ['llama_simple_mlp', 64]);

    const lines: Record<string, number>[] = read('metrics.jsonl')
      .trimEnd()
      .split('\n')
      .map(line => JSON.parse(line));
    assert.deepEqual(
      lines.map(line => line.step),
      [2, 4, 6, 6],
    );
    for (const line of lines)
      for (const [name, value] of Object.entries(line))
        assert.ok(Number.isFinite(value), `${name} is ${value}`);
    const logged = [...LOSSES.map(loss => `loss/${loss}`), 'lr/main', 'lr/ppgd', 'time/ms_per_step'];
    for (const name of [...logged, 'memory/tensors', 'memory/bytes']) assert.ok(name in lines[0]!, name);
    const { step, ...last } = lines[3]!;
    assert.ok(Object.keys(last).every(name => name.startsWith('eval/')));
    assert.ok(last['eval/ce_kl/kl_zero_masked']! > 5 && last['eval/ce_kl/ce_target']! < 1);

    const components = nano.openSafetensors(path.join(out, 'components.safetensors'));
    const shapes = Object.fromEntries([...components.tensors].map(([name, { shape }]) => [name, shape]));
    const ci = {
      ...{ 'ci_fn.proj_in.weight': [64, 432], 'ci_fn.proj_in.bias': [64] },
      ...Object.fromEntries([...'qkvo'].map(p => [`ci_fn.blocks.0.attn.${p}_proj.weight`, [64, 64]])),
      ...{ 'ci_fn.blocks.0.mlp.0.weight': [256, 64], 'ci_fn.blocks.0.mlp.0.bias': [256] },
      ...{ 'ci_fn.blocks.0.mlp.2.weight': [64, 256], 'ci_fn.blocks.0.mlp.2.bias': [64] },
      ...{ 'ci_fn.proj_out.weight': [448, 64], 'ci_fn.proj_out.bias': [448] },
    };
    const learned = Object.entries(TOY_MODULES).flatMap(([name, { dIn, dOut, C }]) => [
      [`components.${name}.V`, [dIn, C]],
      [`components.${name}.U`, [C, dOut]],
    ]);
    assert.deepEqual(shapes, { ...Object.fromEntries(learned), ...ci });
    assert.deepEqual(
      Object.keys(shapes),
      [...learned.map(([name]) => name), ...Object.keys(ci)],
      'their order',
    );
    for (const name of components.tensors.keys()) {
      const x = components.readFloat32(name);
      assert.ok(x.every(Number.isFinite) && largest(x) > 0, name);
    }
    components.close();
    assert.equal(nano.loadCheckpoint(out)?.step, 6);

    const harvest = JSON.parse(read('harvest.json'));
    assert.ok(Object.keys(harvest).length > 0);
    assert.match(read('report.html'), /<html[\s\S]*<\/html>/);

    const evaluation = await command('eval', `--run=${out}`, '--threads=1');
    assert.equal(evaluation.code, 0, evaluation.talk);
    assert.equal(evaluation.result.trimEnd().split('\n').length, 1);
    const found = JSON.parse(evaluation.result) as nano.Metrics;
    assert.deepEqual(Object.keys(found).sort(), Object.keys(last).sort());
    closeRecords(deterministic(found), deterministic(last), REORDERED);
  });

const stories = path.join(project, '../shared/models/stories260K');
const noStories = fs.existsSync(stories)
  ? false
  : 'needs ../shared/models/stories260K, a trained Llama of 5 layers';
test('a trained Llama is read right: 35 linear layers, 1.28 nats a token', { skip: noStories }, async () => {
  await tf.setBackend('wasm');
  const target = nano.loadTarget(stories);
  assert.equal(nano.chooseModules(target.linears, 'auto').length, 35);
  const data = path.join(stories, 'corpus.txt');
  const { heldOut } = await nano.loadData(target, { ...nano.DEFAULTS, data, seqLen: 256 });
  const tokens = nano.tokenBatch(heldOut, [0, 1, 2, 3, 4, 5, 6, 7]);
  const loss = tf.tidy(() => nano.crossEntropy(nano.targetPass(target, tokens).logProbs, tokens));
  close(loss, [1.28], 0.1, 'loss', 1);
});
