/** The marks on matrices whose marks are known, each beside a control that is shuffled or random. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { range, sum, uniformArray } from '../nano-param-decomp.ts';
import { assignment, denseCiError, identityCiError, matchFeatures } from './metrics.ts';

const random = (rows: number, columns: number, seed: number) =>
  range(0, rows).map(r => Array.from(uniformArray(columns, seed, r, 0)));
/** The numbers from 0 to n − 1 in another order. */
const shuffled = (n: number, seed: number) => {
  const draws = uniformArray(n, seed, 0, 1);
  return range(0, n).sort((a, b) => draws[a]! - draws[b]!);
};
const permutations = (items: number[]): number[][] =>
  items.length === 0
    ? [[]]
    : items.flatMap(first => permutations(items.filter(x => x !== first)).map(rest => [first, ...rest]));

test('the assignment is the best of all, and no column is taken twice', () => {
  for (const seed of range(0, 20)) {
    const score = random(4, 6, seed);
    const columns = assignment(score);
    const total = (order: number[]) => sum(score.map((row, i) => row[order[i]!]!));
    assert.equal(new Set(columns).size, 4);
    const best = Math.max(...permutations(range(0, 6)).map(total));
    assert.ok(Math.abs(total(columns) - best) < 1e-9, `seed ${seed}: ${total(columns)} of ${best}`);
  }
  // taking each row's largest in turn would give 9 + 0
  assert.deepEqual(
    assignment([
      [9, 8],
      [8, 0],
    ]),
    [1, 0],
  );
  assert.throws(() => assignment([[1], [1]]), RangeError);
});

test('identity-CI error: 0 for a shuffled identity, and each kind of error counts once', () => {
  const order = shuffled(20, 3);
  const identity = () => range(0, 12).map(i => range(0, 20).map(c => Number(c === order[i])));
  assert.equal(identityCiError(identity()), 0);
  const weak = identity();
  weak[0]![order[0]!] = 0.85; // below 1 − 0.1, above 1 − 0.2
  assert.equal(identityCiError(weak), 1);
  assert.equal(identityCiError(weak, 0.2), 0);
  const two = identity();
  two[0]![order[1]!] = 1; // one input needs two components
  assert.equal(identityCiError(two), 1);
  const shared = identity();
  shared[1] = [...shared[0]!]; // one component for two inputs: the second has none, and one too many
  assert.equal(identityCiError(shared), 2);
  assert.ok(identityCiError(random(12, 20, 1)) > 200, 'random importances are far from any identity');
});

test('dense error: k components in use, whatever their order; the others quiet', () => {
  const order = shuffled(10, 4);
  const dense = () => range(0, 6).map(i => range(0, 10).map(c => Number(order[c]! < 3 && (i + c) % 2 === 0)));
  assert.equal(denseCiError(dense(), 3), 0);
  assert.equal(denseCiError(dense(), 4), 1); // the fourth is never important
  assert.equal(denseCiError(dense(), 2), 3); // the third is, at three inputs
  assert.ok(denseCiError(random(6, 10, 2), 3) > 30);
});

test('MMCS and ML2R: 1 for the true factors in any order and scale, small for random ones', () => {
  const [m, d, C] = [40, 10, 60];
  const centred = (rows: number, columns: number, seed: number) =>
    random(rows, columns, seed).map(row => row.map(x => x - 0.5));
  const w = centred(m, d, 5);
  const order = shuffled(C, 6);
  // Component order[j] reads feature j with strength −2 and writes −w_j / 2; the others are random and small.
  const u = centred(C, d, 7);
  const v = range(0, m).map(() => new Array<number>(C).fill(0));
  for (const j of range(0, m)) {
    u[order[j]!] = w[j]!.map(x => -x / 2);
    v[j]![order[j]!] = -2;
  }
  const found = matchFeatures(w, v, u);
  assert.ok(Math.abs(found.mmcs - 1) < 1e-12 && Math.abs(found.ml2r - 1) < 1e-12);
  const shorter = matchFeatures(
    w,
    v,
    u.map(row => row.map(x => 0.9 * x)),
  );
  assert.ok(Math.abs(shorter.mmcs - 1) < 1e-12 && Math.abs(shorter.ml2r - 0.9) < 1e-12);
  // a dead component that points along w_0 exactly, while the true one is a little off
  const off = u.map((row, c) => (c === order[0] ? row.map((x, i) => x + 0.01 * ((i % 2) - 0.5)) : row));
  const dead = range(0, C).find(c => !order.slice(0, m).includes(c))!;
  off[dead] = w[0]!.map(x => 1e-3 * x);
  const withDead = v.map((row, j) => row.map((x, c) => (j === 0 && c === dead ? 1 : x)));
  const [all, long] = [matchFeatures(w, withDead, off), matchFeatures(w, withDead, off, 0.01)];
  assert.ok(Math.abs(all.ml2r - (m - 1 + 1e-3) / m) < 1e-9, `ML2R ${all.ml2r}: of the dead one`);
  assert.ok(Math.abs(long.ml2r - 1) < 1e-2 && long.mmcs < all.mmcs, `ML2R ${long.ml2r} of those with a length`);
  assert.deepEqual(matchFeatures(w, v, u, 2), { mmcs: 0, ml2r: 0 }, 'none is twice as long');
  const control = matchFeatures(w, centred(m, C, 8), centred(C, d, 9));
  assert.ok(control.mmcs < 0.9, `random components: ${control.mmcs}`);
  const others = shuffled(m, 10);
  const wrong = matchFeatures(
    others.map(j => w[j]!),
    v,
    u,
  ); // components of other features
  assert.ok(wrong.mmcs < 0.5, `shuffled features: ${wrong.mmcs}`);
});
