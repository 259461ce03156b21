/**
 * Every replaced kernel against the kernel it replaced and against TFJS's plain JavaScript backend, forward and
 * gradient; and nothing may leak. All cases run three times: on stock WASM, with the replacements, on 'cpu'.
 */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import * as tf from '@tensorflow/tfjs';
import type { BackendWasm } from '@tensorflow/tfjs-backend-wasm';
import { fastWasmKernels, loadWasm } from './wasm.ts';

type Case = [name: string, run: () => tf.Tensor | tf.Tensor[]];

/** Reproducible values in [-2, 2); the same as whole numbers from 0 to 9, as bools, and in [0.01, 2.01). */
const floats = (shape: number[], seed = 1): tf.Tensor => {
  const wave = (i: number) => Math.sin(12.9898 * (i + 1) + 78.233 * seed) * 43758.5453;
  const fill = (_: unknown, i: number) => 4 * (wave(i) - Math.floor(wave(i))) - 2;
  return tf.tensor(Float32Array.from({ length: tf.util.sizeFromShape(shape) }, fill), shape);
};
const ints = (shape: number[], seed = 1) => tf.cast(tf.mul(tf.abs(floats(shape, seed)), 4.99), 'int32');
const bools = (shape: number[], seed = 1) => tf.greater(floats(shape, seed), 0);
const positive = (shape: number[], seed = 1) => tf.add(tf.abs(floats(shape, seed)), 0.01);

// ---- Cases ----

const matMul = tf.matMul as (a: tf.Tensor, b: tf.Tensor, transposeA?: boolean, transposeB?: boolean) => tf.Tensor;
const products: Case[] = [
  ['matMul, broadcast batch', () => matMul(floats([2, 1, 4, 3]), floats([1, 3, 3, 5], 2))],
  ['matMul, batch and matrix', () => matMul(floats([2, 4, 3]), floats([3, 5], 2))],
  ['matMul, no rows', () => matMul(floats([0, 3]), floats([3, 5], 2))],
  ['matMul, no batch', () => matMul(floats([0, 2, 3]), floats([0, 3, 5], 2))],
  ['transpose', () => [tf.transpose(floats([128, 7])), tf.transpose(floats([128, 7]), [0, 1])]],
  ['transpose 4-D', () => tf.transpose(floats([2, 3, 4, 5]), [0, 2, 1, 3])],
  ['transpose bool', () => tf.transpose(bools([128, 3]))],
  ['transpose of a column, of nothing', () => [tf.transpose(floats([128, 1])), tf.transpose(floats([128, 0]))]],
];
for (const perm of [
  [0, 2, 1],
  [1, 0, 2],
  [2, 1, 0],
])
  products.push([`transpose ${perm}`, () => tf.transpose(ints([3, 256, 5]), perm)]);
// with 128 and 256 rows, which are transposed in blocks
const SIZES_OF_PRODUCTS = [
  [1, 1, 1],
  [1, 5, 3],
  [7, 1, 4],
  [5, 3, 1],
  [128, 6, 9],
  [9, 256, 33],
  [33, 128, 9],
];
for (const [s = 0, k = 0, t = 0] of SIZES_OF_PRODUCTS)
  for (const batch of [[], [1], [3], [2, 3]])
    for (const [ta, tb] of [
      [false, false],
      [false, true],
      [true, false],
      [true, true],
    ] as const) {
      const a = () => floats([...batch, ...(ta ? [k, s] : [s, k])]);
      const b = () => floats([...batch, ...(tb ? [t, k] : [k, t])], 2);
      products.push([`matMul [${batch}] ${s} ${k} ${t} ${ta} ${tb}`, () => matMul(a(), b(), ta, tb)]);
    }

const sums: Case[] = [];
for (const axes of [[0], [1], [0, 1], [1, 2], [0, 1, 2], [2], [0, 2], []])
  for (const shape of [
    [3, 4, 5],
    [1, 9, 2],
    [1, 1, 3],
    [17, 1, 1],
    [130, 2, 6],
  ])
    for (const keepDims of [true, false]) {
      sums.push([`sum [${axes}] of ${shape}`, () => tf.sum(floats(shape), axes, keepDims)]);
      sums.push([`mean [${axes}] of ${shape}`, () => tf.mean(floats(shape), axes, keepDims)]);
      sums.push([`sum [${axes}] of ints ${shape}`, () => tf.sum(ints(shape), axes, keepDims)]);
    }

const moves: Case[] = [];
for (const [kind, make] of Object.entries({ floats, ints, bools })) {
  const more: Case[] = [
    ['slice', () => [tf.slice(make([6, 5, 4]), [0, 1, 0], [6, 2, 4]), tf.slice(make([6, 40]), [2, 0], [3, 40])]],
    ['slice on two axes, of nothing', () => [tf.slice(make([6, 40]), [1, 3], [2, 20]), tf.slice(make([6]), [3], [0])]],
    ['slice of all', () => [tf.slice(make([6, 5]), [0, 0]), tf.slice(make([6]), 0, -1)]],
    ['split', () => [...tf.split(make([3, 30, 2]), [1, 9, 20], 1), ...tf.split(make([4, 6]), 3, -1)]],
    ['split in nothing and all', () => tf.split(make([3, 4]), [0, 4], 1)],
    ['concat', () => tf.concat([make([3, 2, 5]), make([3, 20, 5], 2), make([3, 1, 5], 3)], 1)],
    ['concat with nothing, alone', () => [tf.concat([make([2, 3]), make([0, 3])]), tf.concat([make([2, 3])], 1)]],
    ['stack, unstack', () => [tf.stack([make([3, 4]), make([3, 4], 2)], 1), ...tf.unstack(make([3, 4]), 1)]],
    ['tile', () => [tf.tile(make([3, 1, 2]), [1, 4, 1]), tf.tile(make([3, 2]), [2, 3]), tf.tile(make([3]), [1])]],
    ['broadcastTo', () => [tf.broadcastTo(make([5, 1]), [2, 5, 3]), tf.broadcastTo(make([]), [4, 3])]],
    ['gather none', () => tf.gather(make([10, 3]), ints([0]))],
    ['clone, cast', () => [make([3, 4]).clone(), tf.cast(make([3, 4]), 'float32'), tf.cast(make([3, 4]), 'int32')]],
  ];
  for (const axis of [0, 1, 2])
    more.push([`gather ${axis}`, () => [[7], [2, 3]].map(n => tf.gather(make([10, 10, 10]), ints(n), axis))]);
  // (of bools, the stock tf.where reads and writes past their ends)
  const where = (c: number[], t: number[], e: number[]) => tf.where(bools(c, 2), make(t), make(e, 3));
  if (make !== bools)
    more.push(
      ['where', () => [where([3, 5], [3, 5], [3, 5]), where([3], [3], [])]],
      ['where, broadcast', () => [where([3, 1], [3, 5], [1, 5]), where([], [3, 5], [3, 5])]],
    );
  moves.push(...more.map(([name, run]): Case => [`${name} ${kind}`, run]));
}

const SIZES = [0, 1, 3, 4, 5, 7, 64, 1001]; // around the four lanes
const SPECIAL = [0, -0, 1, -1, 0.5, 1e-12, 1e30, -1e30, 100, -100, 1e-3, -1e-3, Number.NaN, Infinity, -Infinity];
const elementwise: Case[] = [];
for (const [name, f] of Object.entries({
  exp: tf.exp,
  tanh: tf.tanh,
  erf: tf.erf,
  log: tf.log,
  sqrt: tf.sqrt,
  rsqrt: tf.rsqrt,
})) {
  elementwise.push([name, () => SIZES.map(n => f(floats([n])))]);
  elementwise.push([`${name} of special values`, () => f(tf.tensor1d(SPECIAL))]);
}
for (const p of [0.3, 0.9, -0.6, 1.7, 2, 3, 0, 1, -1]) {
  elementwise.push([`pow ${p}`, () => SIZES.map(n => tf.pow(positive([n]), p))]);
  elementwise.push([`pow ${p} of special values`, () => tf.pow(tf.tensor1d(SPECIAL.slice(0, -1)), p)]);
}
elementwise.push(['pow of tensors', () => [tf.pow(positive([9]), floats([9], 2)), tf.pow(1.5, floats([9]))]]);
const order = {
  greater: tf.greater,
  greaterEqual: tf.greaterEqual,
  less: tf.less,
  lessEqual: tf.lessEqual,
  equal: tf.equal,
};
for (const [name, f] of Object.entries({ ...order, maximum: tf.maximum, minimum: tf.minimum })) {
  elementwise.push([name, () => SIZES.map(n => f(floats([n]), floats([n], 2)))]);
  elementwise.push([
    `${name} of single values`,
    () => [f(floats([3, 5]), 0.25), f(0.25, floats([3, 5])), f(floats([1, 1]), floats([7], 2))],
  ]);
  elementwise.push([
    `${name}, broadcast`,
    () => [f(floats([3, 1]), floats([5], 2)), f(floats([4, 1]), floats([4], 2))],
  ]);
  elementwise.push([
    `${name} of ints`,
    () => [f(ints([3, 5]), ints([3, 5], 2)), f(ints([3, 5]), tf.scalar(3, 'int32'))],
  ]);
  const values = name in order ? SPECIAL : SPECIAL.filter(x => !Number.isNaN(x)); // backends differ in max(NaN, x)
  const n = values.length;
  const all = () => tf.broadcastTo(tf.tensor2d(values, [n, 1]), [n, n]);
  elementwise.push([`${name} of special values`, () => f(all(), tf.transpose(all()))]);
}
elementwise.push(['logicalAnd', () => SIZES.map(n => tf.logicalAnd(bools([n]), bools([n], 2)))]);
elementwise.push(['logicalAnd, broadcast', () => tf.logicalAnd(bools([3, 1]), bools([5], 2))]);

/** Gradients of Σ w f(x, ...) with fixed weights w */
function gradients(f: (...xs: tf.Tensor[]) => tf.Tensor, ...xs: tf.Tensor[]): tf.Tensor[] {
  const weighted = (y: tf.Tensor) => tf.sum(tf.mul(y, floats(y.shape, 7)));
  return tf.grads((...ys) => weighted(f(...ys)))(xs);
}
const gradientCases: Case[] = [
  ['split, concat', () => gradients(x => tf.concat(tf.split(x, [3, 20], 1).reverse(), 1), floats([4, 23]))],
  ['a piece of a split', () => gradients(x => tf.split(x, [3, 20], 1)[1]!, floats([4, 23]))],
  ['slice', () => gradients(x => tf.slice(x, [0, 2], [4, 3]), floats([4, 9]))],
  ['stack', () => gradients((x, y) => tf.stack([x!, y!], 1), floats([4, 3]), floats([4, 3], 2))],
  ['gather', () => gradients(x => tf.gather(x!, ints([3, 6])), floats([10, 4]))],
  ['gather on axis 1', () => gradients(x => tf.gather(x!, ints([6]), 1), floats([3, 10]))],
  ['where', () => gradients((x, y) => tf.where(bools([4, 1]), x!, y!), floats([4, 5]), floats([4, 5], 2))],
  ['clip', () => gradients(x => tf.clipByValue(x!, 0, 1), floats([9, 5]))],
  ['pow', () => gradients(x => tf.pow(x!, 0.7), positive([9, 5]))],
  ['max', () => gradients(x => tf.max(x!, 1), floats([9, 5]))],
  ['maximum', () => gradients((x, y) => tf.maximum(x!, y!), floats([9, 5]), floats([9, 5], 2))],
  [
    'sum, mean',
    () => [...gradients(x => tf.sum(x!, 0), floats([9, 5])), ...gradients(x => tf.mean(x!, 1), floats([9, 5]))],
  ],
  ['softmax', () => gradients(x => tf.softmax(x!), floats([3, 4, 5]))],
  ['logSoftmax', () => gradients(x => tf.logSoftmax(x!), floats([9, 5]))],
  ['transpose', () => gradients(x => tf.transpose(x!, [0, 2, 1]), floats([2, 128, 5]))],
  ['tile', () => gradients(x => tf.tile(x!, [2, 3]), floats([3, 4]))],
];
for (const f of [tf.exp, tf.tanh, tf.erf, tf.log, tf.sqrt, tf.rsqrt, tf.sigmoid])
  gradientCases.push([f.name, () => gradients(x => f(x!), positive([9, 5]))]);
for (const f of [tf.add, tf.sub, tf.mul, tf.div])
  for (const shape of [[5], [8, 1], [1, 5], [1, 1, 5]])
    gradientCases.push([
      `${f.name}, ${shape}`,
      () => gradients((x, y) => f(x!, y!), floats([4, 8, 5]), positive(shape)),
    ]);
for (const [ta, tb] of [
  [false, false],
  [false, true],
  [true, false],
  [true, true],
] as const)
  for (const batch of [[], [2, 3]]) {
    const [a, b] = [ta ? [128, 9] : [9, 128], tb ? [5, 128] : [128, 5]];
    const run = () =>
      gradients((x, y) => matMul(x!, y!, ta, tb), floats([...batch, ...a]), floats([...batch, ...b], 2));
    gradientCases.push([`matMul [${batch}] ${ta} ${tb}`, run]);
  }

// ---- The three runs ----

type Output = { shape: number[]; dtype: string; values: ArrayLike<number> };
type Outcome = Output[] | Error;
const outcome = ([, run]: Case): Outcome => {
  try {
    return tf.tidy(() => [run()].flat().map(t => ({ shape: t.shape, dtype: t.dtype, values: t.dataSync() })));
  } catch (error) {
    return error as Error;
  }
};
const GROUPS = { products, sums, moves, elementwise, gradients: gradientCases };
const CASES = Object.values(GROUPS).flat();
const runAll = () => new Map(CASES.map(c => [c, outcome(c)]));

const listeners = () => process.listenerCount('uncaughtException') + process.listenerCount('unhandledRejection');
const listenersBefore = listeners();
const { version, simd } = await loadWasm();
const listenersAfter = listeners();
const stock = runAll();
fastWasmKernels();
fastWasmKernels(); // a second call changes nothing
const fast = runAll();
await tf.setBackend('cpu');
const cpu = runAll();
await tf.setBackend('wasm');
const backend = tf.backend() as BackendWasm;
const wasm = backend.wasm as unknown as { HEAPU8: Uint8Array };

const near = (a: number, b: number): boolean =>
  Object.is(a, b) || a === b || Math.abs(a - b) <= 3e-5 + 1e-5 * Math.abs(b);
function compare(name: string, got: Outcome, wanted: Outcome): void {
  if (got instanceof Error) throw new Error(`${name}: ${got.message}`);
  if (wanted instanceof Error) throw new Error(`${name}: the other side: ${wanted.message}`);
  assert.equal(got.length, wanted.length, name);
  for (const [i, { shape, dtype, values }] of got.entries()) {
    const other: Output = wanted[i]!;
    assert.deepEqual([shape, dtype, values.length], [other.shape, other.dtype, other.values.length], name);
    for (let j = 0; j < values.length; j++)
      if (!near(values[j]!, other.values[j]!))
        assert.fail(`${name}: output ${i}, element ${j} is ${values[j]}, not ${other.values[j]}`);
  }
}

test('the backend loads, with SIMD, and leaves the handling of errors alone', () => {
  assert.equal(version, tf.version_core);
  assert.equal(simd, true);
  assert.equal(listenersAfter, listenersBefore);
});

for (const [group, cases] of Object.entries(GROUPS))
  test(`${group}: ${cases.length} cases like the cpu backend and like the stock kernels`, () => {
    for (const c of cases) {
      const inStock = group !== 'gradients' || !c[0].startsWith('gather'); // it lacks UnsortedSegmentSum
      compare(`${c[0]} (cpu)`, fast.get(c)!, cpu.get(c)!);
      if (inStock) compare(`${c[0]} (stock)`, fast.get(c)!, stock.get(c)!);
    }
  });

test('functions are right to a few roundings', () => {
  const n = 20_001;
  const grid = (from: number, to: number) =>
    Float32Array.from({ length: n }, (_, i) => from + ((to - from) * i) / (n - 1));
  /** The largest error of f on the grid, relative to the value but for values below `floor` */
  const error = (f: (x: tf.Tensor) => tf.Tensor, exact: (x: number) => number, xs: Float32Array, floor = 0) => {
    const ys = tf.tidy(() => f(tf.tensor1d(xs)).dataSync());
    return Math.max(...xs.map((x, i) => Math.abs(ys[i]! - exact(x)) / Math.max(floor, Math.abs(exact(x)))));
  };
  assert.ok(error(tf.exp, Math.exp, grid(-87, 88)) < 4e-7);
  assert.ok(
    error(
      tf.tanh,
      Math.tanh,
      grid(-9, 9).filter(x => x !== 0),
    ) < 1e-6,
  );
  assert.ok(error(tf.tanh, Math.tanh, grid(1e-9, 1e-3)) < 1e-6);
  assert.ok(error(tf.log, Math.log, grid(1e-6, 1e-2)) < 4e-7);
  assert.ok(error(tf.log, Math.log, grid(0.5, 2), 0.1) < 4e-6);
  for (const p of [0.4, 1.9, -0.6])
    assert.ok(
      error(
        x => tf.pow(x, p),
        x => x ** p,
        grid(1e-6, 1),
      ) < 2e-6,
    );
  assert.ok(
    error(
      x => tf.pow(x, 0.9),
      x => x ** 0.9,
      grid(1e-12, 1e-11),
    ) < 5e-6,
  );
  // erf by its series and its symmetry; the formula itself is within 1.5e-7
  const erf = (x: number) => {
    let [term, sum] = [x, x];
    for (let k = 1; k < 80; k++) {
      term *= (-x * x) / k;
      sum += term / (2 * k + 1);
    }
    return (2 / Math.sqrt(Math.PI)) * sum;
  };
  assert.ok(error(tf.erf, erf, grid(-3, 3), 1) < 5e-7);
});

test('sums of a million numbers are right to a few roundings', () => {
  const x = floats([1 << 18, 4]);
  const [square, exact] = [tf.tidy(() => tf.square(x)), [0, 0, 0, 0]];
  for (const [i, value] of square.dataSync().entries()) exact[i % 4]! += value;
  const total = exact.reduce((a, b) => a + b);
  const off = (t: tf.Tensor, expected: number[]) => {
    const values = t.dataSync();
    return Math.max(...expected.map((e, i) => Math.abs(values[i]! / e - 1)));
  };
  tf.tidy(() => {
    assert.ok(off(tf.sum(square), [total]) < 1e-6);
    assert.ok(off(tf.mean(square), [total / square.size]) < 1e-6);
    assert.deepEqual(tf.sum(square, null as never, true).shape, [1, 1]);
    const columns = off(tf.sum(square, 0), exact);
    assert.ok(columns < 1e-5, String(columns));
  });
  tf.dispose([x, square]);
});

test('the sign of a small number is its sign', () => {
  const signs = tf.tidy(() => tf.sign(tf.tensor1d([1e-8, -1e-8, 1e-20, -3, 0, 5])).dataSync());
  assert.deepEqual([...signs], [1, -1, 1, -1, 0, 1]);
});

test('an index out of range is still an error', () => {
  for (const index of [-1, 10])
    assert.throws(() => tf.tidy(() => tf.gather(floats([10, 2]), tf.tensor1d([index], 'int32'))), /not in \[0, 9\]/);
});

test('the heap may grow in the middle of a kernel', () => {
  const size = wasm.HEAPU8.length;
  tf.tidy(() => {
    const x = floats([64, 1000]);
    let wide = x;
    while (wasm.HEAPU8.length < 2 * size) wide = tf.concat([wide, wide], 1);
    const last = tf.slice(wide, [0, wide.shape[1]! - 1000], [64, 1000]);
    assert.deepEqual(last.dataSync(), x.dataSync());
  });
  for (const c of CASES) compare(c[0], outcome(c), fast.get(c)!);
});

test('nothing leaks: tensors, buffers, and the heap', () => {
  const { state } = tf.engine() as unknown as { state: { numDataBuffers: number } };
  const held = () => [tf.memory().numTensors, tf.memory().numBytes, state.numDataBuffers, backend.numDataIds()];
  const before = held();
  for (const c of CASES) {
    outcome(c);
    assert.deepEqual(held(), before, c[0]);
  }
  const work = () =>
    tf.tidy(() => {
      const f = (x: tf.Tensor, w: tf.Tensor) => {
        const parts = tf.split(matMul(tf.concat([x, x]), w, false, true), 2, 1).map(y => tf.pow(tf.abs(y), 0.9));
        const heads = tf.reshape(tf.concat(parts, 1), [4, 256, 64]);
        return tf.sum(tf.where(bools([64, 1]), matMul(heads, heads, true), tf.sum(tf.tanh(heads), [0, 1])));
      };
      tf.grads(f)([floats([512, 384]), floats([64, 384], 2)]);
    });
  for (let i = 0; i < 3; i++) work();
  const heap = wasm.HEAPU8.length;
  for (let i = 0; i < 40; i++) work(); // about 15 MB of outputs each time
  assert.equal(wasm.HEAPU8.length, heap);
  assert.deepEqual(held(), before);
});
