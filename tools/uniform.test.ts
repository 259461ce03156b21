import assert from 'node:assert/strict';
import { test } from 'node:test';
import { uniformArray } from '../nano-param-decomp.ts';

const KEYS: [seed: number, step: number, purpose: number][] = [
  [0, 0, 0],
  [0, 0, 1],
  [0, 1, 0],
  [1, 0, 0],
  [7, 123456, 5],
  [-1, 2 ** 31 - 1, 16],
];

/** χ² of counts that should be equal, in standard deviations from its mean */
function chiSquare(counts: ArrayLike<number>): number {
  const list = Array.from(counts);
  const expected = list.reduce((x, y) => x + y) / list.length;
  const chi2 = list.reduce((sum, x) => sum + (x - expected) ** 2 / expected, 0);
  return (chi2 - (list.length - 1)) / Math.sqrt(2 * (list.length - 1));
}
/** Kolmogorov and Smirnov's distance from the uniform distribution, times √n: above 1.95 once in a thousand */
function kolmogorovSmirnov(xs: Float32Array): number {
  const n = xs.length;
  const distance = (x: number, i: number) => Math.max(x - i / n, (i + 1) / n - x);
  return Math.sqrt(n) * xs.toSorted().reduce((d, x, i) => Math.max(d, distance(x, i)), 0);
}
/** Correlation in standard deviations */
function correlation(xs: Float32Array, ys: Float32Array): number {
  let sum = 0;
  for (let i = 0; i < xs.length; i++) sum += (xs[i]! - 0.5) * (ys[i]! - 0.5);
  return (12 * sum) / Math.sqrt(xs.length);
}

test('the same key gives the same numbers, a longer array begins with the shorter one', () => {
  assert.deepEqual(uniformArray(100, 1, 2, 3), uniformArray(1000, 1, 2, 3).slice(0, 100));
  assert.equal(uniformArray(0, 1, 2, 3).length, 0);
  // pinned: runs of old checkpoints must be repeatable
  assert.deepEqual(
    [...uniformArray(3, 1, 2, 3)].map(x => x * 2 ** 24),
    [8191487, 5594449, 12913078],
  );
});
test('uniform in [0, 1): moments, every byte, the distribution, the next number', () => {
  for (const key of KEYS) {
    const xs = uniformArray(1 << 19, ...key);
    assert.ok(xs.every(x => x >= 0 && x < 1));
    const mean = xs.reduce((a, b) => a + b, 0) / xs.length;
    const variance = xs.reduce((a, b) => a + (b - 0.5) ** 2, 0) / xs.length;
    assert.ok(Math.abs(mean - 0.5) < 4 * Math.sqrt(1 / 12 / xs.length), `mean ${mean}`);
    assert.ok(Math.abs(variance - 1 / 12) < 4 * Math.sqrt(1 / 180 / xs.length), `variance ${variance}`);
    for (const shift of [0, 8, 16]) {
      const counts = new Int32Array(256);
      for (const x of xs) counts[((x * 2 ** 24) >>> shift) & 255]!++;
      assert.ok(Math.abs(chiSquare(counts)) < 4.5, `byte ${shift} of ${key}: ${chiSquare(counts)}`);
    }
    assert.ok(kolmogorovSmirnov(xs) < 2.2, `distribution of ${key}`);
    for (const lag of [1, 2, 3, 4, 449])
      assert.ok(Math.abs(correlation(xs.subarray(lag), xs.subarray(0, -lag))) < 4.5, `lag ${lag} of ${key}`);
    const pairs = new Int32Array(4096);
    for (let i = 0; i + 1 < xs.length; i += 2) pairs[((xs[i]! * 64) << 6) | (xs[i + 1]! * 64)]!++;
    assert.ok(Math.abs(chiSquare(pairs)) < 4.5, `pairs of ${key}`);
  }
});

test('streams of neighbouring keys are independent', () => {
  const n = 1 << 16;
  for (const [seed, step, purpose] of KEYS) {
    const streams = [
      [0, 0, 0],
      [1, 0, 0],
      [0, 1, 0],
      [0, 0, 1],
      [1, 1, 0],
      [1, 0, 1],
      [0, 1, 1],
      [2, 0, 0],
      [0, 2, 0],
      [0, 0, 2],
    ].map(([a = 0, b = 0, c = 0]) => uniformArray(n, seed + a, step + b, purpose + c));
    for (const [i, xs] of streams.entries())
      for (const ys of streams.slice(i + 1)) {
        assert.ok(Math.abs(correlation(xs, ys)) < 4.5, `${seed} ${step} ${purpose}: ${correlation(xs, ys)}`);
        const pairs = new Int32Array(256);
        for (let k = 0; k < n; k++) pairs[((xs[k]! * 16) << 4) | (ys[k]! * 16)]!++;
        assert.ok(Math.abs(chiSquare(pairs)) < 4.5);
      }
  }
});

test('so are the first numbers of ten thousand neighbouring streams', () => {
  const n = 10_000;
  const along: ((i: number) => [number, number, number])[] = [
    i => [i, 0, 0],
    i => [0, i, 0],
    i => [0, 0, i],
    i => [i, i, i],
  ];
  for (const key of along)
    for (const place of [0, 1, 5]) {
      const xs = Float32Array.from({ length: n }, (_, i) => uniformArray(place + 1, ...key(i))[place]!);
      assert.ok(kolmogorovSmirnov(xs) < 2.2);
      assert.ok(Math.abs(correlation(xs.subarray(1), xs.subarray(0, -1))) < 4.5);
    }
});

test('no key shares its state with another', () => {
  const seen = new Set<string>();
  for (let seed = 0; seed < 20; seed++)
    for (let step = 0; step < 100; step++)
      for (let purpose = 0; purpose < 20; purpose++) seen.add(uniformArray(4, seed, step, purpose).join());
  assert.equal(seen.size, 20 * 100 * 20);
});
