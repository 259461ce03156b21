/**
 * cluster: groups of components that fire together, by minimum description length.
 *
 * At n sampled positions component c fires where g_c > τ. A group is active where one of its members is; s_i counts the
 * positions at which group i is active, r_i its members, k the groups. To say which groups are active, and what they
 * do, takes L = Σ_i s_i (log2 k + α r_i) bits: a group's name costs log2 k, and each member that comes along α.
 * Groups are merged pair by pair, the pair with the smallest ΔL first, down to one; the answer is the partition with
 * the smallest L on the way. With S = Σ s_i and co the positions at which both are active,
 *   ΔL = S log2((k−1)/k) − co log2(k−1) + α [ s_i r_j + s_j r_i − co (r_i + r_j) ]
 * (the paper's form with s_or = s_i + s_j − co put in): of two pairs that never fire together the counts alone decide.
 */
import * as path from 'node:path';
import * as tf from '@tensorflow/tfjs';
import { importances, inputBatch, totalC, uniformArray } from '../nano-param-decomp.ts';
import * as files from './run-files.ts';
import { nameOf } from './stages.ts';

export const FLAGS = {
  alpha: 'string', // α, bits per member, default 1
  alphas: 'string', // further α to report group counts for, default 0.1,1,10; none: no further ones
  tau: 'string', // τ, default 0.1
  positions: 'string', // n, default 100,000
  'per-row': 'string', // positions sampled in a row, default 8
  sampler: 'string', // best (default), or range: a random one of the pairs within 5 % of the range above the best
  ensemble: 'string', // how many seeds of --sampler range, default 4
  'cluster-seed': 'string', // of positions and sampler, default the run's
} as const;

// ---- Firing sets ----------------------------------------------------------------------------------------------------

/** Where components fire: bit p of bits[c] (Uint32Array of ⌈positions / 32⌉) says whether component c does at p. */
export type Firings = { readonly positions: number; readonly bits: readonly Uint32Array[] };

const popcount = (x: number): number => {
  const pairs = x - ((x >>> 1) & 0x55555555);
  const fours = (pairs & 0x33333333) + ((pairs >>> 2) & 0x33333333);
  return Math.imul((fours + (fours >>> 4)) & 0x0f0f0f0f, 0x01010101) >>> 24;
};
/** How many bits are set. */
export function countBits(bits: Uint32Array): number {
  let count = 0;
  for (let w = 0; w < bits.length; w++) count += popcount(bits[w]!);
  return count;
}
/** Calls `visit` with each position at which both fire. */
function eachCommon(a: Uint32Array, b: Uint32Array, visit: (position: number) => void): void {
  for (let w = 0; w < a.length; w++) {
    for (let both = a[w]! & b[w]!; both !== 0; both &= both - 1) visit(32 * w + 31 - Math.clz32(both & -both));
  }
}

// ---- Merging --------------------------------------------------------------------------------------------------------

export type MergeOptions = {
  alpha: number;
  /** best: the pair with the smallest ΔL; range: uniform among those at most 5 % of the range of ΔL above it */
  sampler?: 'best' | 'range';
  seed?: number; // of the range sampler
  onMerge?: (groupsLeft: number) => void;
};
/** Groups are numbered: leaves 0 … k−1 in the order of the firing sets, then k + t is what merge t made. */
export interface MergeTree {
  merges: [i: number, j: number, dL: number][]; // k − 1 of them
  L: number[]; // in bits, before the first merge, after it, … : k numbers
  best: number; // after so many merges L is smallest (the first of equals)
}

/** Groups that a group fires together with, and at how many positions; ids of groups merged away may still be there. */
type Row = { ids: Int32Array; counts: Int32Array; length: number };
/** The state of a merging: slots hold groups; a merged group takes the slot of its first half. */
interface Groups {
  readonly alpha: number;
  readonly leaves: number;
  alive: Int32Array; // slots of the k groups
  S: number; // Σ s_i
  W: number; // Σ s_i r_i: L = S log2 k + α W, in whole numbers until here
  readonly bits: Uint32Array[]; // by slot, as all that follows
  readonly s: Float64Array;
  readonly r: Float64Array;
  readonly id: Int32Array;
  readonly rows: Row[];
  readonly slotOfId: Int32Array; // −1: merged away
  readonly slotOfLeaf: Int32Array;
  readonly at: Lists;
  // of each group: no pair with it costs less than `bound`; exact, with this partner, if `fresh` is the merge's number
  readonly bound: Float64Array;
  readonly partner: Int32Array;
  readonly fresh: Int32Array;
  readonly together: Int32Array; // room for one row spread out by slot; zeros between uses
}
/** By position the leaves that stand for the groups active there, one for each group: entries start … start + length. */
type Lists = { start: Float64Array; length: Int32Array; leaves: Uint32Array };

function positionLists({ positions, bits }: Firings): Lists {
  const length = new Int32Array(positions);
  for (const set of bits) eachCommon(set, set, p => length[p]!++);
  const start = new Float64Array(positions);
  for (let p = 1; p < positions; p++) start[p] = start[p - 1]! + length[p - 1]!;
  const leaves = new Uint32Array(positions > 0 ? start[positions - 1]! + length[positions - 1]! : 0);
  const end = start.slice();
  for (const [leaf, set] of bits.entries()) {
    eachCommon(set, set, p => {
      leaves[end[p]!] = leaf;
      end[p]!++;
    });
  }
  return { start, length, leaves };
}

function append(row: Row, id: number, count: number): void {
  if (row.length === row.ids.length) {
    const grown = (old: Int32Array) => {
      const larger = new Int32Array(Math.max(8, Math.ceil(1.25 * old.length)));
      larger.set(old);
      return larger;
    };
    [row.ids, row.counts] = [grown(row.ids), grown(row.counts)];
  }
  row.ids[row.length] = id;
  row.counts[row.length] = count;
  row.length++;
}

/** Every pair of leaves that ever fire together: memory goes with these, not with k². */
function firstRows({ bits }: Firings, { start, length, leaves }: Lists): Row[] {
  const rows = bits.map((): Row => ({ ids: new Int32Array(0), counts: new Int32Array(0), length: 0 }));
  const counts = new Int32Array(bits.length);
  for (const [leaf, set] of bits.entries()) {
    eachCommon(set, set, p => {
      // a list is in the order of the leaves: those before this one have counted the pair already
      for (let e = start[p]! + length[p]! - 1; leaves[e]! > leaf; e--) counts[leaves[e]!]!++;
    });
    for (let other = leaf + 1; other < counts.length; other++) {
      if (counts[other] === 0) continue;
      append(rows[leaf]!, other, counts[other]!);
      append(rows[other]!, leaf, counts[other]!);
      counts[other] = 0;
    }
  }
  return rows;
}

function startGroups(firings: Firings, alpha: number): Groups {
  const k = firings.bits.length;
  const s = Float64Array.from(firings.bits, countBits);
  const at = positionLists(firings);
  const S = s.reduce((sum, n) => sum + n, 0);
  return {
    ...{ alpha, leaves: k, S, W: S, s, at },
    alive: Int32Array.from(s.keys()),
    bits: firings.bits.map(set => set.slice()),
    r: new Float64Array(k).fill(1),
    id: Int32Array.from(s.keys()),
    rows: firstRows(firings, at),
    slotOfId: Int32Array.from({ length: 2 * k }, (_, id) => (id < k ? id : -1)),
    slotOfLeaf: Int32Array.from(s.keys()),
    bound: new Float64Array(k).fill(-Infinity),
    partner: new Int32Array(k).fill(-1),
    fresh: new Int32Array(k).fill(-1),
    together: new Int32Array(k),
  };
}

const description = ({ S, W, alpha, alive }: Groups) => S * Math.log2(alive.length) + alpha * W;

/** Writes co of this group with every other into `together`, by slot, and forgets groups merged away. */
function spread({ rows, slotOfId, together }: Groups, slot: number): void {
  const row = rows[slot]!;
  let kept = 0;
  for (let e = 0; e < row.length; e++) {
    const other = slotOfId[row.ids[e]!]!;
    if (other < 0) continue;
    together[other] = row.counts[e]!;
    row.ids[kept] = row.ids[e]!;
    row.counts[kept] = row.counts[e]!;
    kept++;
  }
  row.length = kept;
}
function unspread({ rows, slotOfId, together }: Groups, slot: number): void {
  const { ids, length } = rows[slot]!;
  for (let e = 0; e < length; e++) together[slotOfId[ids[e]!]!] = 0;
}

/**
 * ΔL without S log2((k−1)/k), which all pairs share. It only rises as k falls (by co), as long as the two groups stay
 * as they are: what was the smallest at a larger k is a lower bound ever after.
 */
const pairCost = (alpha: number, logNext: number, si: number, ri: number, sj: number, rj: number, co: number) =>
  alpha * (si * rj + sj * ri) - co * (logNext + alpha * (ri + rj));

function setBest(g: Groups, slot: number, cost: number, partner: number, merge: number): void {
  g.bound[slot] = cost;
  g.partner[slot] = partner;
  g.fresh[slot] = merge;
}

/** Finds the best partner of a group among all others, whether they ever fire together or not. */
function refresh(g: Groups, slot: number, merge: number): void {
  const { alive, alpha, s, r, together } = g;
  const logNext = Math.log2(alive.length - 1);
  const [si, ri] = [s[slot]!, r[slot]!];
  let best = Infinity;
  let partner = -1;
  spread(g, slot);
  for (let a = 0; a < alive.length; a++) {
    const other = alive[a]!;
    const cost = pairCost(alpha, logNext, si, ri, s[other]!, r[other]!, together[other]!);
    if (cost < best && other !== slot) {
      best = cost;
      partner = other;
    }
  }
  unspread(g, slot);
  setBest(g, slot, best, partner, merge);
}

/** The pair with the smallest ΔL: only groups whose bound is below the best found so far are looked at again. */
function bestPair(g: Groups, merge: number): [number, number] {
  const { alive, bound, fresh, partner } = g;
  while (true) {
    let low = alive[0]!;
    for (let a = 1; a < alive.length; a++) if (bound[alive[a]!]! < bound[low]!) low = alive[a]!;
    if (fresh[low] === merge) return [low, partner[low]!];
    refresh(g, low, merge);
  }
}

const RANGE_SHARE = 0.05;
/** Uniform among the pairs within 5 % of the range of ΔL above the best; looks at all pairs, three times. */
function pairInRange(g: Groups, random: () => number): [number, number] {
  const { alive, alpha, s, r, together } = g;
  const logNext = Math.log2(alive.length - 1);
  const eachPair = (visit: (cost: number, i: number, j: number) => void) => {
    for (let a = 1; a < alive.length; a++) {
      const i = alive[a]!;
      spread(g, i);
      for (let b = 0; b < a; b++) {
        const j = alive[b]!;
        visit(pairCost(alpha, logNext, s[i]!, r[i]!, s[j]!, r[j]!, together[j]!), i, j);
      }
      unspread(g, i);
    }
  };
  let [least, most, within] = [Infinity, -Infinity, 0];
  eachPair(cost => {
    if (cost < least) least = cost;
    if (cost > most) most = cost;
  });
  const limit = least + RANGE_SHARE * (most - least);
  eachPair(cost => {
    if (cost <= limit) within++;
  });
  let left = Math.min(within - 1, Math.floor(random() * within));
  let chosen: [number, number] = [alive[0]!, alive[1]!];
  eachPair((cost, i, j) => {
    if (cost <= limit && left-- === 0) chosen = [i, j];
  });
  return chosen;
}

/**
 * At how many positions both i and j are active and a third group is, by slot; there, j's entry leaves the list. Each
 * visit shortens a list, so that all merges together visit no more positions than there are firings.
 */
function joinLists({ bits, at, slotOfLeaf }: Groups, i: number, j: number): Int32Array {
  const three = new Int32Array(bits.length);
  const { start, length, leaves } = at;
  eachCommon(bits[i]!, bits[j]!, p => {
    const last = start[p]! + length[p]! - 1;
    let own = last;
    for (let e = start[p]!; e <= last; e++) {
      const slot = slotOfLeaf[leaves[e]!]!;
      three[slot]!++;
      if (slot === j) own = e;
    }
    leaves[own] = leaves[last]!;
    length[p]!--;
  });
  for (let leaf = 0; leaf < slotOfLeaf.length; leaf++) if (slotOfLeaf[leaf] === j) slotOfLeaf[leaf] = i;
  return three;
}

/** Merges the groups in slots i and j. @returns what the tree keeps of it */
function merge(g: Groups, i: number, j: number, number: number): [number, number, number] {
  const { alpha, bits, s, r, id, rows, slotOfId } = g;
  const before = description(g);
  // co(i ∪ j, l) = co(i, l) + co(j, l) − positions where all three are active
  const co = joinLists(g, i, j);
  const common = co[i]!;
  for (let l = 0; l < co.length; l++) co[l] = -co[l]!;
  for (const half of [i, j]) {
    const { ids, counts, length } = rows[half]!;
    for (let e = 0; e < length; e++) {
      const slot = slotOfId[ids[e]!]!;
      if (slot >= 0) co[slot]! += counts[e]!;
    }
  }
  const halves: [number, number] = [id[i]!, id[j]!];
  const own = bits[i]!;
  for (let w = 0; w < own.length; w++) own[w]! |= bits[j]![w]!;
  bits[j] = new Uint32Array(0);
  const both = s[i]! + s[j]! - common;
  g.S -= common;
  g.W += both * (r[i]! + r[j]!) - s[i]! * r[i]! - s[j]! * r[j]!;
  [s[i], r[i], id[i]] = [both, r[i]! + r[j]!, g.leaves + number];
  for (const half of halves) slotOfId[half] = -1;
  slotOfId[id[i]!] = i;
  g.alive = g.alive.filter(slot => slot !== j);
  rows[i] = { ids: new Int32Array(0), counts: new Int32Array(0), length: 0 };
  rows[j] = rows[i]!;

  const logNext = Math.log2(g.alive.length - 1);
  g.bound[i] = Infinity;
  for (let a = 0; a < g.alive.length; a++) {
    const l = g.alive[a]!;
    if (l === i) continue;
    if (co[l]! > 0) {
      append(rows[i]!, id[l]!, co[l]!);
      append(rows[l]!, id[i]!, co[l]!);
    }
    const cost = pairCost(alpha, logNext, s[i]!, r[i]!, s[l]!, r[l]!, co[l]!);
    // at or under the bound of all other pairs: exact
    if (cost < g.bound[l]!) setBest(g, l, cost, i, number + 1);
    if (cost < g.bound[i]!) setBest(g, i, cost, l, number + 1);
  }
  return [...halves, description(g) - before];
}

/** Merges down to one group. Exact: co is recounted from the firing sets at every merge. */
export function mergeGroups(firings: Firings, { alpha, sampler = 'best', seed = 0, onMerge }: MergeOptions): MergeTree {
  const k = firings.bits.length;
  const g = startGroups(firings, alpha);
  const draws = sampler === 'range' ? uniformArray(k, seed, 0, PURPOSE_PAIR) : undefined;
  const tree: MergeTree = { merges: [], L: k > 0 ? [description(g)] : [], best: 0 };
  for (let n = 0; n + 1 < k; n++) {
    const [i, j] = draws ? pairInRange(g, () => draws[n]!) : bestPair(g, n);
    tree.merges.push(merge(g, i, j, n));
    tree.L.push(description(g));
    if (tree.L[n + 1]! < tree.L[tree.best]!) tree.best = n + 1;
    onMerge?.(g.alive.length);
  }
  return tree;
}

/** The group of each of k leaves after so many merges; groups are numbered by their first leaf. */
export function partitionAfter(k: number, merges: MergeTree['merges'], count: number): number[] {
  const parent = Array.from({ length: k + count }, (_, id) => id);
  for (const [t, [i, j]] of merges.slice(0, count).entries()) {
    parent[i] = k + t;
    parent[j] = k + t;
  }
  for (let id = k + count - 1; id >= 0; id--) parent[id] = parent[parent[id]!]!; // parents come later: top down
  const numbers = new Map<number, number>();
  return parent.slice(0, k).map(root => {
    if (!numbers.has(root)) numbers.set(root, numbers.size);
    return numbers.get(root)!;
  });
}

/**
 * The adjusted Rand index of two partitions of the same things: 1 where they agree, 0 on average by chance (Hubert and
 * Arabie 1985): (pairs together in both − expected) / (mean of the pairs together in each − expected).
 */
export function adjustedRand(a: readonly number[], b: readonly number[]): number {
  const pairs = (labels: readonly (number | string)[]) => {
    const counts = new Map<number | string, number>();
    for (const label of labels) counts.set(label, (counts.get(label) ?? 0) + 1);
    return [...counts.values()].reduce((sum, n) => sum + (n * (n - 1)) / 2, 0);
  };
  const both = pairs(a.map((label, i) => `${label},${b[i]}`));
  const [inA, inB, all] = [pairs(a), pairs(b), (a.length * (a.length - 1)) / 2];
  const expected = all > 0 ? (inA * inB) / all : 0;
  const most = (inA + inB) / 2;
  return most === expected ? 1 : (both - expected) / (most - expected);
}

// ---- The run --------------------------------------------------------------------------------------------------------

const PURPOSE_PAIR = 10; // of random numbers, beside those of the method
const PURPOSE_POSITION = 11;
const BATCH_CELLS = 1 << 22; // positions times components of one pass
const MAX_BITS = 32e9; // of all firing sets: 4 GB
const MAX_FIRINGS = 4e8; // entries of the lists by position: 1.6 GB
const LEAST_CI = 0.1; // components whose largest g stays under it are left out

/** Firing sets of the components that fire, with their columns. */
export type SampledFirings = Firings & { columns: number[]; rows: number; leftOut: number };

/** Runs rows through the target and keeps where g > τ at a few random positions of each. */
async function sampleFirings(
  { engine, problem, params, data }: files.Run,
  { positions, perRow, tau, seed }: { positions: number; perRow: number; tau: number; seed: number },
): Promise<SampledFirings> {
  const rows = data.train;
  const [S, columns] = [rows.seqLen, totalC(problem.modules)];
  const each = Math.min(perRow, S);
  const affordable = Math.floor(Math.min(positions, MAX_BITS / columns) / each);
  const count = Math.max(1, Math.min(rows.count, affordable));
  const B = Math.max(1, Math.min(count, Math.floor(BATCH_CELLS / columns / S)));
  const bits: (Uint32Array | undefined)[] = Array.from({ length: columns });
  const largest = new Float32Array(columns);
  const limit = Math.fround(tau);
  const gOf = engine.compile('cluster', ({ tokens, chosen }: Record<'tokens' | 'chosen', tf.Tensor>) => ({
    g: tf.gather(importances(problem, params, tokens).g, chosen),
  }));
  const show = files.liveLine();
  let firings = 0;
  let used = 0; // rows; evenly spaced, the same whatever the batch
  for (; used < count && firings < MAX_FIRINGS; used += B) {
    const indices = Array.from({ length: B }, (_, b) =>
      Math.floor((Math.min(used + b, count - 1) * rows.count) / count),
    );
    const chosen = indices.flatMap((row, b) => somePositions(S, each, seed, row).map(p => b * S + p));
    const feeds = { tokens: inputBatch(rows, indices), chosen: tf.tensor1d(chosen, 'int32') };
    const { g } = await gOf(feeds);
    const values = (await g.data()) as Float32Array; // [B · each, ΣC]
    tf.dispose([feeds, g]);
    const real = Math.min(B, count - used) * each; // the last batch is filled up with its last row
    for (let n = 0; n < real; n++) {
      const p = used * each + n;
      for (let c = 0; c < columns; c++) {
        const value = values[n * columns + c]!;
        if (value > largest[c]!) largest[c] = value;
        if (value <= limit) continue;
        bits[c] ??= new Uint32Array(Math.ceil((count * each) / 32));
        bits[c]![p >>> 5]! |= 1 << (p & 31);
        firings++;
      }
    }
    show(() => `cluster  ${p100(used + B, count)} of the positions`);
  }
  const fired = [...bits.keys()].filter(c => bits[c] !== undefined);
  const kept = fired.filter(c => largest[c]! >= LEAST_CI);
  const sampled = Math.min(used, count);
  return {
    positions: sampled * each,
    bits: kept.map(c => bits[c]!.subarray(0, Math.ceil((sampled * each) / 32))),
    columns: kept,
    rows: sampled,
    leftOut: columns - kept.length,
  };
}
const p100 = (done: number, total: number) => `${Math.round(100 * Math.min(1, done / total))} %`;

/** Distinct random positions of a row, a function of (seed, row) alone. */
function somePositions(S: number, count: number, seed: number, row: number): number[] {
  const draws = uniformArray(S, seed, row, PURPOSE_POSITION);
  return [...draws.keys()]
    .sort((a, b) => draws[a]! - draws[b]! || a - b)
    .slice(0, count)
    .sort((a, b) => a - b);
}

/** The number of the layer in a module's path, as in h.3.mlp.c_fc; the path itself where it has none. */
const layerOf = (module: string) => /(?:^|\.)(\d+)(?:\.|$)/.exec(module)?.[1] ?? module;

/** How many groups have several members, and which share of these has members of several modules, or layers. */
export function groupSizes(partition: readonly number[], modules: readonly string[]) {
  const groups = new Map<number, string[]>();
  for (const [leaf, group] of partition.entries()) groups.set(group, [...(groups.get(group) ?? []), modules[leaf]!]);
  const several = [...groups.values()].filter(members => members.length > 1);
  const share = (part: (module: string) => string) =>
    several.filter(members => new Set(members.map(part)).size > 1).length / Math.max(1, several.length);
  return {
    groups: groups.size,
    several: several.length,
    shareSpanningModules: share(module => module),
    shareSpanningLayers: share(layerOf),
  };
}

/** The content of clusters.json. */
export interface Clusters {
  formatVersion: 1;
  components: string; // SHA-256 of components.safetensors
  alpha: number;
  tau: number;
  positions: number; // n
  settings: { positions: number; perRow: number; rows: number; sampler: string; ensemble: number; seed: number };
  bounds: { leftOut: number; leastCi: number; maxFirings: number; maxBits: number };
  leaves: [module: string, index: number][]; // group i of `merges` for i < k
  groups: { members: [module: string, index: number][]; active: number }[]; // active: positions; the largest first
  merges: MergeTree['merges'];
  L: number[];
  best: number; // merges after which L is smallest
  alphas: ({ alpha: number; L: number } & ReturnType<typeof groupSizes>)[];
  /** of --sampler range: what each seed found, and 1 − adjusted Rand index between them; `groups` is the shortest L's */
  ensemble?: { seeds: { seed: number; groups: number; L: number }[]; distances: number[][] };
}

function readSettings(flags: files.Flags, runSeed: number) {
  const alphas = files.textFlag(flags, 'alphas') ?? '0.1,1,10';
  return {
    alpha: files.numberFlag(flags, 'alpha', 1, { min: 0, max: 1e6 }),
    alphas: (alphas === 'none' ? [] : alphas.split(',')).map(text =>
      files.numberFlag({ alphas: text }, 'alphas', 1, { min: 0, max: 1e6 }),
    ),
    tau: files.numberFlag(flags, 'tau', 0.1, { min: 0, max: 1 }),
    positions: files.numberFlag(flags, 'positions', 100_000, { min: 1, max: 1e8, integer: true }),
    perRow: files.numberFlag(flags, 'per-row', 8, { min: 1, max: 1e6, integer: true }),
    sampler: files.choiceFlag(flags, 'sampler', ['best', 'range']),
    ensemble: files.numberFlag(flags, 'ensemble', 4, { min: 1, max: 1000, integer: true }),
    seed: files.numberFlag(flags, 'cluster-seed', runSeed, { min: 0, max: 2 ** 31 - 1, integer: true }),
  };
}

/** All that clusters.json says, from firing sets whose leaf c is component `leaves[c]`. */
export function describeClusters(
  firings: Firings & { rows: number; leftOut: number },
  leaves: Clusters['leaves'],
  settings: ReturnType<typeof readSettings>,
  components: string,
): Clusters {
  const { alpha, tau, sampler, seed } = settings;
  const k = leaves.length;
  const modules = leaves.map(([module]) => module);
  const show = files.liveLine();
  const treeOf = (options: MergeOptions) =>
    mergeGroups(firings, { ...options, onMerge: left => show(() => `cluster  α ${options.alpha}: ${left} groups`) });
  const partitionOf = ({ merges, best }: MergeTree) => partitionAfter(k, merges, best);
  const seeds = sampler === 'range' ? Array.from({ length: settings.ensemble }, (_, n) => seed + n) : [];
  const trees = seeds.map(one => treeOf({ alpha, sampler: 'range', seed: one }));
  const shortest = (list: MergeTree[]) => list.reduce((a, b) => (b.L[b.best]! < a.L[a.best]! ? b : a));
  const tree = trees.length > 0 ? shortest(trees) : treeOf({ alpha });
  const partition = partitionOf(tree);
  const groups: Clusters['groups'] = [];
  const active: Uint32Array[] = [];
  for (const [leaf, number] of partition.entries()) {
    groups[number] ??= { members: [], active: 0 };
    active[number] ??= new Uint32Array(firings.bits[leaf]!.length);
    groups[number].members.push(leaves[leaf]!);
    for (let w = 0; w < active[number].length; w++) active[number][w]! |= firings.bits[leaf]![w]!;
  }
  for (const [number, group] of groups.entries()) group.active = countBits(active[number]!);
  const partitions = trees.map(partitionOf);
  return {
    formatVersion: 1,
    ...{ components, alpha, tau, positions: firings.positions },
    settings: {
      ...{ positions: settings.positions, perRow: settings.perRow, rows: firings.rows },
      ...{ sampler, ensemble: seeds.length, seed },
    },
    bounds: { leftOut: firings.leftOut, leastCi: LEAST_CI, maxFirings: MAX_FIRINGS, maxBits: MAX_BITS },
    leaves,
    groups: groups.sort((a, b) => b.members.length - a.members.length || b.active - a.active),
    ...tree,
    alphas: settings.alphas.map(other => {
      const its = other === alpha && trees.length === 0 ? tree : treeOf({ alpha: other });
      return { alpha: other, L: its.L[its.best]!, ...groupSizes(partitionOf(its), modules) };
    }),
    ...(trees.length > 0 && {
      ensemble: {
        seeds: trees.map((t, n) => ({ seed: seeds[n]!, groups: k - t.best, L: t.L[t.best]! })),
        distances: partitions.map(a => partitions.map(b => 1 - adjustedRand(a, b))),
      },
    }),
  };
}

/** cluster --run DIR: writes clusters.json and prints how groups come out. @throws UsageError at a bad flag */
export async function cluster(job: files.Run, flags: files.Flags): Promise<number> {
  const { problem } = job;
  const dir = problem.config.out;
  const settings = readSettings(flags, problem.config.seed);
  const components = files.componentsHash(dir);
  const firings = await sampleFirings(job, settings);
  if (firings.columns.length < 2)
    files.refuse(`${dir}: ${firings.columns.length} components reach a CI of ${settings.tau}; groups take two`);
  const leaves = firings.columns.map((column): [string, number] => {
    const { module, index } = nameOf(problem.modules, column);
    return [module, index];
  });
  const clusters = describeClusters(firings, leaves, settings, components);
  files.writeAtomic(path.join(dir, 'clusters.json'), `${JSON.stringify(clusters)}\n`);
  console.log(summarise(clusters));
  return 0;
}

function summarise({ leaves, groups, positions, L, best, alphas, ensemble, alpha }: Clusters): string {
  const several = groups.filter(({ members }) => members.length > 1).length;
  const percent = (share: number) => `${Math.round(100 * share)} %`.padStart(8);
  const lines = [
    `${leaves.length} components at ${positions} positions: ${groups.length} groups at α ${alpha}, ${several} of several members`,
    `description ${(L[0]! / positions).toFixed(2)} bits a position as they are, ${(L[best]! / positions).toFixed(2)} in groups`,
    ...(alphas.length > 0 ? ['       α  groups  of several  spanning modules  layers'] : []),
    ...alphas.map(
      a =>
        `${String(a.alpha).padStart(8)}${String(a.groups).padStart(8)}${String(a.several).padStart(12)}` +
        `${percent(a.shareSpanningModules).padStart(18)}${percent(a.shareSpanningLayers)}`,
    ),
  ];
  for (const { seed, groups: found, L: length } of ensemble?.seeds ?? [])
    lines.push(`seed ${seed}: ${found} groups, ${(length / positions).toFixed(2)} bits a position`);
  const apart = ensemble?.distances.flatMap((row, a) => row.slice(0, a)) ?? [];
  if (apart.length > 0)
    lines.push(
      `distance between seeds (1 − adjusted Rand) ${(apart.reduce((a, b) => a + b) / apart.length).toFixed(3)}`,
    );
  return lines.join('\n');
}
