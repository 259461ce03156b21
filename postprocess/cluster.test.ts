/** Clustering against plain counts from scratch on random firing sets, and against the known rules of the toy. */
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { test } from 'node:test';
import { adjustedRand, countBits, type Firings, groupSizes, mergeGroups, partitionAfter } from './cluster.ts';

const range = (n: number) => Array.from({ length: n }, (_, i) => i);
const sum = (numbers: Iterable<number>) => [...numbers].reduce((a, b) => a + b, 0);

/** Numbers in [0, 1) from a seed. */
function seeded(seed: number): () => number {
  let state = seed;
  return () => {
    state = (Math.imul(state, 1664525) + 1013904223) | 0;
    return (state >>> 0) / 2 ** 32;
  };
}
/** Firing sets from lists of positions. */
const firingsOf = (positions: number, sets: Iterable<number>[]): Firings => ({
  positions,
  bits: sets.map(set => {
    const bits = new Uint32Array(Math.ceil(positions / 32));
    for (const p of set) bits[p >>> 5]! |= 1 << (p & 31);
    return bits;
  }),
});
/** Some fire together, some never with any other, one always. */
function randomSets(seed: number, positions: number, count: number): Set<number>[] {
  const random = seeded(seed);
  const causes = range(4).map(() => range(positions).filter(() => random() < 0.1));
  return range(count).map(c => {
    if (c === count - 1) return new Set(range(positions));
    if (c % 5 === 4) return new Set([Math.floor(random() * positions)]);
    return new Set([...causes[c % 4]!.filter(() => random() < 0.7), Math.floor(random() * positions)]);
  });
}
/** L of a list of groups of sets, from its definition. */
function lengthOf(groups: Set<number>[][], alpha: number): number {
  const active = (group: Set<number>[]) => new Set(group.flatMap(set => [...set])).size;
  return sum(groups.map(group => active(group) * (Math.log2(groups.length) + alpha * group.length)));
}
const joined = (groups: Set<number>[][], i: number, j: number) => [
  ...groups.filter((_, g) => g !== i && g !== j),
  [...groups[i]!, ...groups[j]!],
];

test('every merge is the best there is, and its ΔL is the difference of L from scratch', () => {
  for (const [seed, alpha] of [
    [1, 1],
    [2, 0.1],
    [3, 10],
    [4, 0],
  ] as const) {
    const sets = randomSets(seed, 203, 26);
    const { merges, L, best } = mergeGroups(firingsOf(203, sets), { alpha });
    assert.equal(merges.length, 25);
    let groups = sets.map(set => [set]);
    const ids = new Map(groups.map((group, id) => [id, group]));
    for (const [t, [i, j, dL]] of merges.entries()) {
      const before = lengthOf(groups, alpha);
      assert.ok(
        Math.abs(L[t]! - before) < 1e-8 * before + 1e-8,
        `L before merge ${t}: ${L[t]}, from scratch ${before}`,
      );
      const pairs = range(groups.length).flatMap(a =>
        range(a).map(b => lengthOf(joined(groups, a, b), alpha) - before),
      );
      const [a, b] = [groups.indexOf(ids.get(i)!), groups.indexOf(ids.get(j)!)];
      assert.ok(a >= 0 && b >= 0 && a !== b, `merge ${t} takes two groups that are there`);
      const merged = joined(groups, a, b);
      const difference = lengthOf(merged, alpha) - before;
      assert.ok(Math.abs(dL - difference) < 1e-7, `ΔL of merge ${t}: ${dL}, from scratch ${difference}`);
      assert.ok(
        difference <= Math.min(...pairs) + 1e-7,
        `merge ${t} costs ${difference}, the best ${Math.min(...pairs)}`,
      );
      groups = merged;
      ids.set(sets.length + t, groups.at(-1)!);
    }
    assert.equal(best, L.indexOf(Math.min(...L)));
  }
});

test('groups that never fire together are merged by counts alone', () => {
  // α 1, k 3, nothing in common: ΔL = S log2(2/3) + s_i + s_j, so the two rarest go first
  const { merges } = mergeGroups(firingsOf(70, [range(30), range(20).map(p => p + 30), [55, 66]]), { alpha: 1 });
  assert.deepEqual(merges[0]!.slice(0, 2).sort(), [1, 2]);
  assert.ok(Math.abs(merges[0]![2] - (52 * Math.log2(2 / 3) + 22)) < 1e-9);
});

test('the range sampler repeats from its seed, takes only pairs in its range, and not always the best', () => {
  const sets = randomSets(7, 150, 14);
  const firings = firingsOf(150, sets);
  const tree = (seed: number) => mergeGroups(firings, { alpha: 1, sampler: 'range', seed });
  assert.deepEqual(tree(1), tree(1));
  const taken = range(12).map(seed => tree(seed));
  assert.ok(new Set(taken.map(t => JSON.stringify(t.merges))).size > 1, 'all seeds merge alike');
  for (const { merges } of taken) {
    let groups = sets.map(set => [set]);
    const ids = new Map(groups.map((group, id) => [id, group]));
    for (const [t, [i, j, dL]] of merges.entries()) {
      const before = lengthOf(groups, 1);
      const pairs = range(groups.length).flatMap(a => range(a).map(b => lengthOf(joined(groups, a, b), 1) - before));
      const [least, most] = [Math.min(...pairs), Math.max(...pairs)];
      assert.ok(dL <= least + 0.05 * (most - least) + 1e-7, `merge ${t}: ${dL} in ${least} … ${most}`);
      groups = joined(groups, groups.indexOf(ids.get(i)!), groups.indexOf(ids.get(j)!));
      ids.set(sets.length + t, groups.at(-1)!);
    }
  }
});

test('partitions, bits and sizes by hand', () => {
  assert.deepEqual(partitionAfter(4, [[1, 3, 0], [0, 4, 0], [5, 2, 0]], 0), [0, 1, 2, 3]); // biome-ignore format: a line
  assert.deepEqual(partitionAfter(4, [[1, 3, 0], [0, 4, 0], [5, 2, 0]], 1), [0, 1, 2, 1]); // biome-ignore format: a line
  assert.deepEqual(partitionAfter(4, [[1, 3, 0], [0, 4, 0], [5, 2, 0]], 2), [0, 0, 1, 0]); // biome-ignore format: a line
  assert.equal(countBits(Uint32Array.of(0xffffffff, 0, 0x80000001)), 34);
  assert.deepEqual(groupSizes([0, 0, 1, 1, 2, 3, 3], ['h.0.q', 'h.0.q', 'h.0.q', 'h.1.q', 'h.1.q', 'h.0.q', 'h.0.k']), {
    groups: 4,
    several: 3,
    shareSpanningModules: 2 / 3,
    shareSpanningLayers: 1 / 3,
  });
});

test('the adjusted Rand index: an example by hand, equality up to names, chance', () => {
  // pairs together in both 2, in a 6, in b 3 of 15: expected 6·3/15 = 1.2; (2 − 1.2) / (4.5 − 1.2)
  assert.ok(Math.abs(adjustedRand([0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 2, 2]) - 0.8 / 3.3) < 1e-12);
  assert.equal(adjustedRand([0, 0, 1, 2], [5, 5, 3, 1]), 1);
  const random = seeded(5);
  const labels = () => range(300).map(() => Math.floor(random() * 7));
  assert.ok(Math.abs(sum(range(20).map(() => adjustedRand(labels(), labels()))) / 20) < 0.01);
});

/** A decomposed toy on its held-out rows (tools/make-cluster-fixture.ts), and the rule that each component answers to. */
function toy() {
  const read = (file: string) => JSON.parse(readFileSync(new URL(file, import.meta.url), 'utf8'));
  const { positions, leaves, sets } = read('../tools/fixtures/cluster/toy.json');
  const { rules, labels } = read('../assets/toy/labels.json') as { rules: unknown[]; labels: number[][][] };
  const inForce = labels.flat();
  assert.equal(inForce.length, positions);
  const fires: Set<number>[] = sets.map((text: string) => {
    const bytes = Buffer.from(
      text.replace(/~(\d+)~/g, (_, n) => 'A'.repeat(Number(n))),
      'base64',
    );
    return new Set(range(positions).filter(p => (bytes[p >> 3]! & (1 << (p & 7))) !== 0));
  });
  const known = rules.map((_, rule) => range(positions).filter(p => inForce[p]!.includes(rule)));
  const answers = fires.map(set => {
    const scores = known.map(at => (2 * at.filter(p => set.has(p)).length) / (at.length + set.size)); // F1
    const best = scores.indexOf(Math.max(...scores));
    return scores[best]! >= 0.8 ? best : undefined;
  });
  const firings = firingsOf(positions, fires);
  return { firings, answers, modules: (leaves as [string, number][]).map(([module]) => module) };
}

test('the toy: components that answer to the same rule come into the same group, and L falls down to its minimum', t => {
  const { firings, answers, modules } = toy();
  const labelled = range(answers.length).filter(leaf => answers[leaf] !== undefined);
  assert.ok(labelled.length >= 50, `${labelled.length} components answer to a rule`);
  const random = seeded(9);
  for (const alpha of [0.1, 1, 10]) {
    const { merges, L, best } = mergeGroups(firings, { alpha });
    for (let t = 0; t < best; t++) assert.ok(L[t + 1]! < L[t]!, `α ${alpha}: L rises at merge ${t}`);
    assert.ok(best > 0);
    const partition = partitionAfter(modules.length, merges, best);
    const [groups, rules] = [partition, answers].map(list => labelled.map(leaf => list[leaf]!)) as [number[], number[]];
    const index = adjustedRand(groups, rules);
    const shuffled = range(50).map(() => {
      const order = range(rules.length).map(i => [random(), i] as const).sort(([a], [b]) => a - b); // biome-ignore format: a line
      return adjustedRand(groups, order.map(([, i]) => rules[i]!)); // biome-ignore format: a line
    });
    const { groups: count, several, shareSpanningModules } = groupSizes(partition, modules);
    t.diagnostic(
      `α ${alpha}: ${count} groups, ${several} of several, ${shareSpanningModules.toFixed(2)} of these span modules; ` +
        `adjusted Rand ${index.toFixed(3)}, shuffled ${(sum(shuffled) / 50).toFixed(3)}, at most ${Math.max(...shuffled).toFixed(3)}`,
    );
    if (alpha === 0.1) continue;
    assert.ok(
      index > 0.5 && index > 5 * Math.max(...shuffled),
      `α ${alpha}: ${index}, shuffled ${Math.max(...shuffled)}`,
    );
  }
});
