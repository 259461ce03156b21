/**
 * The full harvest: one streaming pass that finds out what every component does: how often it fires, on which tokens,
 * ahead of which predictions, together with whom, and where in the text. A component *fires* at a position when its
 * causal importance g is above the threshold. The engine runs the network and one matmul (which tokens does the target
 * predict where c fires?); the rest is counted in JavaScript, a row and a component at a time.
 *
 * Memory is bounded by the settings, never by the data, and nothing but the order of equals depends on the batches.
 * Densities, means and top examples are exact. Exact until a bound is reached: output statistics cover only the
 * likeliest tokens when components x vocabulary > outputCells; a component has cells for `inputTokens` input tokens
 * (when the vocabulary is larger, they are a summary that reports its error); pairs are counted at a random share of
 * the positions when more than `pairsPerPosition` fire together, and only among the first `pairedComponents` that fire.
 */
import type { Tokenizer } from '@huggingface/tokenizers';
import * as tf from '@tensorflow/tfjs';
import {
  type Engine,
  importances,
  indicator,
  inputBatch,
  type Module,
  matmul,
  numbers,
  type Params,
  type Problem,
  PURPOSE,
  type Rows,
  range,
  scramble,
  type T,
  type Tensors,
  totalC,
  U,
  V,
} from '../nano-param-decomp.ts';

/** The target's and the CI function's forward on rows of tokens: N = B·S positions, ΣC components. */
export type HarvestPass = (tokens: T<'B S'>) => {
  ci: T<'N ΣC'>; // g
  activation: T<'N ΣC'>; // (x V_c)·‖U_c‖
  probs: T<'N vocab'>; // the target's softmax
};

export const harvestDefaults = {
  threshold: 0, // a component fires where its CI is above this
  examples: 10, // of each kind (top, random) per component
  window: 41, // tokens of an example, the firing one in the middle
  listLength: 10, // tokens in each top and bottom list
  partners: 8, // of each kind (Jaccard, PMI) per component
  minCount: 3, // a token enters a list when it was counted, or was expected, this often
  minTogether: 10, // a partner enters the PMI list when both fired together this often
  lowCount: 100, // components with fewer firings are marked: their statistics are noisy
  passageFirings: 256, // components listed per position of a passage
  batchPositions: 4096, // positions of a batch,
  batchCells: 2 ** 22, // and cells of its [N, ΣC] matrices, which are read back: 16 MB each
  outputCells: 2 ** 25, // cells of the component x output token table (128 MiB)
  inputTokens: 4096, // distinct input tokens counted per component
  pairsPerPosition: 512, // pairs counted per position, on average
  pairedComponents: 12_000, // components whose pairs are counted (at most 288 MB)
  seed: 0,
};
export type HarvestSettings = typeof harvestDefaults;

export interface HarvestOptions {
  pass: HarvestPass;
  engine: Pick<Engine, 'compile'>;
  modules: readonly Module[];
  vocabSize: number;
  tokenText: (id: number) => string;
  rows: Rows;
  passages: Int32Array[]; // held-out rows for the page's passage view
  settings?: Partial<HarvestSettings>;
  progress?: (positions: number) => void;
}

/** How often a token was counted, and PMI = ln(n_ct·N/(n_c·n_t)) in nats; null: never counted, PMI is −∞. */
export type TokenStat = [token: number, count: number, pmi: number | null];
/** A partner's n_ab, Jaccard index n_ab/(n_a + n_b − n_ab) and PMI = ln(n_ab·N/(n_a·n_b)) in nats. */
export type Partner = [column: number, together: number, jaccard: number, pmi: number];

/** A window around one firing, clipped to its row: three lists of one length. */
export interface Example {
  row: number; // of the data, from 0
  start: number; // position in the row of the window's first token
  at: number; // index in the lists of the token where the component fired
  tokens: number[];
  ci: number[];
  activation: number[];
}

export interface HarvestComponent {
  module: string;
  index: number; // in its module
  column: number; // offset of the module + index, the number that partners and passages use
  firings: number; // positions where it fires, n_c
  density: number; // firings / positions
  meanCi: number; // over all positions
  meanActivation: number; // of ‖U_c‖·(x V_c) over its firings; (−V, −U) is the same component, so the sign is free
  lowCount: boolean;
  examples: { top: Example[]; random: Example[] }; // one a row; top: by CI, then |activation|; random: uniform
  input: { top: TokenStat[]; bottom: TokenStat[]; missed: number }; // counts are short by at most `missed`
  output: { top: TokenStat[]; bottom: TokenStat[] }; // counts: the target's softmax, summed over the firings
  partners: { jaccard: Partner[]; pmi: Partner[] };
}

/** A held-out row, position by position. */
export interface Passage {
  tokens: number[];
  positions: {
    fired: number; // how many components fire
    firing: [column: number, ci: number, activation: number][]; // these, by CI, at most `passageFirings`
    predictions: [token: number, probability: number][]; // the target's five likeliest next tokens
  }[];
}

/** The content of harvest.json. */
export interface Harvest {
  formatVersion: 1;
  inputs?: 'features'; // of features.ts: names of inputs and outputs stand where tokens do
  positions: number; // N
  pairPositions: number; // positions at which pairs were counted: N in partners
  outputTokens: number; // tokens that the output statistics cover
  settings: HarvestSettings;
  modules: { path: string; offset: number; C: number; alive: number; meanCi: number[] }[]; // meanCi by index
  components: HarvestComponent[]; // those that fired, by column; the others are C − alive
  passages: Passage[];
  vocabulary: Record<number, string>; // the text of every token above
}

export async function harvest(options: HarvestOptions): Promise<Harvest> {
  const settings = { ...harvestDefaults, ...options.settings };
  const { pass, modules, rows, vocabSize } = options;
  if (rows.count === 0) throw new Error('harvest: no data');
  const [S, columns] = [rows.seqLen, totalC(modules)]; // ΣC
  const positions = Math.min(settings.batchPositions, settings.batchCells / columns);
  const B = Math.max(1, Math.min(rows.count, Math.floor(positions / S)));
  const covered = Math.min(vocabSize, Math.floor(settings.outputCells / columns)); // T
  const { outputTokens, pairShare } = await survey(pass, rows, covered, settings);
  const mass = zeros([columns, covered]); // softmax mass of a token where c fires
  const totalMass = zeros([1, covered]);
  const reduce = options.engine.compile('harvest', ({ tokens, weight, outputTokens }: Tensors) => {
    const { ci, activation, probs } = pass(tokens!);
    const p = covered < vocabSize ? tf.gather(probs, outputTokens!, 1) : probs; // [N, T]
    const fire = indicator(tf.greater(ci, settings.threshold)); // [N, ΣC]
    mass.assign(tf.add(mass, tf.matMul(fire, tf.mul(p, weight!), true)));
    totalMass.assign(tf.add(totalMass, tf.matMul(weight!, p, true)));
    return { ci: tf.transpose(ci), activation: tf.transpose(activation) }; // [ΣC, N]
  });

  const seed = scramble(scramble(settings.seed) ^ PURPOSE.harvest);
  const counts: Counts = {
    positions: 0,
    pairPositions: 0,
    inputTotal: new Float64Array(vocabSize),
    tallies: [],
    ciSum: new Float64Array(columns),
    slotOf: new Int32Array(columns).fill(-1),
  };
  for (let first = 0; first < rows.count; first += B) {
    const end = Math.min(first + B, rows.count);
    const N = (end - first) * S;
    const tokens = new Int32Array(B * S); // a short last batch is padded: a traced graph has one shape
    for (let row = first; row < end; row++) tokens.set(rows.row(row), (row - first) * S);
    const feeds = {
      tokens: tf.tensor2d(tokens, [B, S], 'int32'),
      weight: tf.tensor2d(new Float32Array(B * S).fill(1, 0, N), [B * S, 1]), // 0 on the padding
      outputTokens: tf.tensor1d(outputTokens, 'int32'),
    };
    const out = await reduce(feeds);
    const [ci, activation] = (await Promise.all([out.ci, out.activation].map(numbers))) as [Float32Array, Float32Array];
    tf.dispose([feeds, out]);
    const draws = Int32Array.from({ length: N }, (_, n) => scramble(seed ^ (first * S + n)));
    const batch = { first, S, N, tokens, ci, activation, draws, fired: new Int32Array(N + 1) };
    countBatch(counts, batch, pairShare, settings);
    options.progress?.(end * S);
  }

  const output = { tokens: outputTokens, mass: await numbers(mass), total: await numbers(totalMass) };
  tf.dispose([mass, totalMass]);
  const components = describe(counts, modules, output, settings);
  const passages: Passage[] = [];
  for (const row of options.passages) passages.push(await readPassage(pass, row, settings));
  return {
    formatVersion: 1,
    positions: counts.positions,
    pairPositions: counts.pairPositions,
    outputTokens: covered,
    settings,
    modules: modules.map(({ path, offset, C }) => ({
      path,
      offset,
      C,
      alive: components.filter(c => c.module === path).length,
      meanCi: Array.from(counts.ciSum.subarray(offset, offset + C), sum => round(sum / counts.positions)),
    })),
    components,
    passages,
    vocabulary: vocabularyOf(components, passages, options.tokenText),
  };
}

/** What the first rows say: the T tokens with the largest softmax mass, and at which share of positions to count pairs. */
async function survey(pass: HarvestPass, rows: Rows, T: number, { threshold, pairsPerPosition }: HarvestSettings) {
  const some = inputBatch(rows, range(0, Math.min(rows.count, Math.ceil(512 / rows.seqLen))));
  const out = tf.tidy(() => {
    const { ci, probs } = pass(some);
    return [tf.sum(probs, 0), tf.sum(indicator(tf.greater(ci, threshold)), 1)];
  });
  const [mass, firing] = (await Promise.all(out.map(numbers))) as [Float32Array, Float32Array]; // [vocab], [N]
  tf.dispose([some, out]);
  const byMass = Int32Array.from(mass.keys());
  if (T < mass.length) byMass.sort((a, b) => mass[b]! - mass[a]!);
  const pairs = firing.reduce((sum, n) => sum + n ** 2 / 2, 0) / firing.length; // per position
  return { outputTokens: byMass.subarray(0, T), pairShare: pairsPerPosition / pairs };
}

/** What is kept while the data streams by. */
interface Counts {
  positions: number;
  pairPositions: number;
  inputTotal: Float64Array; // [vocab] n_t
  ciSum: Float64Array; // [ΣC] over all positions
  slotOf: Int32Array; // [ΣC] order of appearance; -1: has not fired
  tallies: Tally[]; // by slot
}
interface Tally {
  column: number;
  slot: number;
  firings: number; // n_c
  activationSum: number; // over the firings
  inputs: Uint32Array; // [vocab] firings on each token
  summary: Map<number, number> | undefined; // instead, when the vocabulary is large: on the most frequent ones
  missed: number; // by how much a count in it may be short
  together: Uint32Array; // [slot + 1] positions shared with each lower slot; last: its own; empty: not counted
  top: Scored<Example>[];
  random: Scored<Example>[];
}
/** What the engine gave for the rows from `first` on. */
interface Batch {
  first: number;
  S: number;
  N: number; // positions, without the padding
  tokens: Int32Array; // [N or more]
  ci: Float32Array; // [ΣC, N or more]
  activation: Float32Array;
  draws: Int32Array; // [N] random from -2³¹ to 2³¹, by seed and position in the data alone: batches don't matter
  fired: Int32Array; // [N + 1] room for the positions where one component fires
}
/** Lists of these have the largest score first. */
interface Scored<X> {
  score: number;
  item: X;
}

function countBatch(counts: Counts, batch: Batch, pairShare: number, settings: HarvestSettings): void {
  const { N, tokens, draws, fired } = batch;
  const paired = draws.map(draw => Number(draw / 2 ** 32 + 0.5 < pairShare));
  const firing = range(0, N).map((): number[] => []); // slots that fire at a paired position: few on average
  for (let c = 0; c < counts.ciSum.length; c++) {
    const count = listFirings(counts.ciSum, batch, c, settings.threshold);
    if (count === 0) continue;
    const tally = tallyOf(counts, c, settings);
    countFirings(tally, batch, count, settings);
    for (let k = 0; k < count; k++) if (paired[fired[k]!]) firing[fired[k]!]!.push(tally.slot);
  }
  for (let n = 0; n < N; n++) {
    counts.inputTotal[tokens[n]!]!++;
    if (paired[n]) countPairs(counts, Int32Array.from(firing[n]!).sort());
  }
  counts.positions += N;
}

// The next two are what a harvest costs beyond the forward passes: no objects in the loops, sums in local variables.

/** Lists the positions where c fires, without a branch: a processor that has to guess would often guess wrong. */
function listFirings(ciSum: Float64Array, { N, tokens, ci, fired }: Batch, c: number, threshold: number): number {
  const first = c * tokens.length;
  const limit = Math.fround(threshold); // what the engine compares with
  let count = 0;
  let sum = 0;
  for (let n = 0; n < N; n++) {
    const g = ci[first + n]!;
    sum += g;
    fired[count] = n; // overwritten by the next if c does not fire here
    count += Number(g > limit);
  }
  ciSum[c]! += sum;
  return count;
}

/** Counts a component's firings in a batch, which are at fired[0 .. count]; the best of each row may be an example. */
function countFirings(tally: Tally, batch: Batch, count: number, settings: HarvestSettings): void {
  const { column, inputs, summary, top, random } = tally;
  const { S, tokens, ci, activation, draws, fired } = batch;
  const { examples, window, inputTokens } = settings;
  const first = column * tokens.length;
  const shift = scramble(column); // so that components that fire together have different random examples
  let sum = 0;
  let k = 0;
  for (let rowEnd = S; k < count; rowEnd += S) {
    let topScore = floor(top, examples);
    let randomScore = floor(random, examples);
    let topAt = -1;
    let randomAt = -1;
    for (; k < count && fired[k]! < rowEnd; k++) {
      const n = fired[k]!;
      const a = activation[first + n]!;
      sum += a;
      if (summary) countInput(tally, summary, tokens[n]!, inputTokens);
      else inputs[tokens[n]!]!++;
      const strength = ci[first + n]! + 1e-9 * Math.abs(a); // CI, then |activation|: a CI of exactly 1 is common
      if (strength > topScore) {
        topScore = strength;
        topAt = n;
      }
      const draw = Math.imul(draws[n]! ^ shift, 0x85ebca6b); // random for each firing: the largest are a random choice
      if (draw > randomScore) {
        randomScore = draw;
        randomAt = n;
      }
    }
    if (topAt >= 0) insert(top, examples, topScore, windowAround(batch, column, topAt, window));
    if (randomAt >= 0) insert(random, examples, randomScore, windowAround(batch, column, randomAt, window));
  }
  tally.firings += count;
  tally.activationSum += sum;
}

function tallyOf({ slotOf, tallies, inputTotal }: Counts, column: number, settings: HarvestSettings): Tally {
  if (slotOf[column]! >= 0) return tallies[slotOf[column]!]!;
  const slot = tallies.length;
  const vocabSize = inputTotal.length;
  const tally: Tally = {
    column,
    slot,
    firings: 0,
    activationSum: 0,
    missed: 0,
    top: [],
    random: [],
    inputs: new Uint32Array(vocabSize <= settings.inputTokens ? vocabSize : 0),
    summary: vocabSize <= settings.inputTokens ? undefined : new Map(),
    together: new Uint32Array(slot < settings.pairedComponents ? slot + 1 : 0),
  };
  slotOf[column] = slot;
  tallies.push(tally);
  return tally;
}

/** Misra-Gries: over the limit, every count loses 1 and the zeros go. What is frequent stays. */
function countInput(tally: Tally, summary: Map<number, number>, token: number, limit: number): void {
  summary.set(token, (summary.get(token) ?? 0) + 1);
  if (summary.size <= limit) return;
  tally.missed++;
  for (const [t, n] of summary) n === 1 ? summary.delete(t) : summary.set(t, n - 1);
}

function windowAround({ first, S, tokens, ci, activation }: Batch, column: number, n: number, window: number): Example {
  const row = Math.floor(n / S);
  const before = Math.floor(window / 2);
  const start = Math.max(row * S, n - before);
  const end = Math.min((row + 1) * S, n - before + window);
  const example: Example = {
    row: first + row,
    start: start - row * S,
    at: n - start,
    tokens: [],
    ci: [],
    activation: [],
  };
  for (let k = start; k < end; k++) {
    example.tokens.push(tokens[k]!);
    example.ci.push(ci[column * tokens.length + k]!);
    example.activation.push(activation[column * tokens.length + k]!);
  }
  return example;
}

/** Pair counts are a triangle whose rows are made as components appear: memory goes with the alive ones squared. */
function countPairs(counts: Counts, slots: Int32Array): void {
  for (let k = 0; k < slots.length; k++) {
    const { together } = counts.tallies[slots[k]!]!;
    if (together.length === 0) break; // later slots have no row either
    for (let j = 0; j <= k; j++) together[slots[j]!]!++;
  }
  counts.pairPositions++;
}

/** The score that a list of at most `size` takes no longer. */
const floor = (list: Scored<unknown>[], size: number) => (list.length < size ? -Infinity : list[size - 1]!.score);

/** Puts an item into a list of at most `size`; equal ones keep their order. */
function insert<X>(list: Scored<X>[], size: number, score: number, item: X): void {
  if (score <= floor(list, size)) return;
  let i = list.length;
  while (i > 0 && score > list[i - 1]!.score) i--;
  list.splice(i, 0, { score, item });
  if (list.length > size) list.pop();
}

/** The counts as densities, means, lists and partners, by column. */
function describe(
  counts: Counts,
  modules: readonly Module[],
  output: { tokens: Int32Array; mass: Float32Array; total: Float32Array }, // [T], [ΣC, T], [T]
  settings: HarvestSettings,
): HarvestComponent[] {
  const { positions, inputTotal } = counts;
  const T = output.tokens.length;
  const byFrequency = (total: Float64Array | Float32Array) =>
    range(0, total.length)
      .filter(t => total[t]! >= settings.minCount)
      .sort((a, b) => total[b]! - total[a]!);
  const [inputOrder, outputOrder] = [byFrequency(inputTotal), byFrequency(output.total)];
  const partners = partnersOf(counts, settings);
  const shown = (list: Scored<Example>[]) =>
    list.map(({ item }): Example => {
      const [ci, activation] = [item.ci, item.activation].map(values => values.map(x => round(x, 3)));
      return { ...item, ci: ci!, activation: activation! };
    });
  const all = counts.tallies.map((tally, slot): HarvestComponent => {
    const { column, inputs, summary, missed, firings } = tally;
    const { path, offset } = modules.findLast(m => m.offset <= column)!;
    const onInput = (t: number) => (summary ? (summary.get(t) ?? 0) : inputs[t]!);
    const input = tokenLists(inputOrder, inputTotal, firings / positions, onInput, settings);
    const onOutput = (t: number) => output.mass[column * T + t]!;
    const { top, bottom } = tokenLists(outputOrder, output.total, firings / positions, onOutput, settings);
    const named = (list: TokenStat[]) => list.map(([t, ...rest]): TokenStat => [output.tokens[t]!, ...rest]);
    return {
      module: path,
      index: column - offset,
      column,
      firings,
      density: round(firings / positions),
      meanCi: round(counts.ciSum[column]! / positions),
      meanActivation: round(tally.activationSum / firings),
      lowCount: firings < settings.lowCount,
      examples: { top: shown(tally.top), random: shown(tally.random) },
      // After a summary has dropped tokens, "never counted" no longer means "never there".
      input: { ...input, bottom: input.bottom.filter(([, n]) => missed === 0 || n > 0), missed },
      output: { top: named(top), bottom: named(bottom) },
      partners: partners[slot]!,
    };
  });
  return all.sort((a, b) => a.column - b.column);
}

/** Tokens counted more (top) and less (bottom) often than chance would have it: PMI = ln(count / expected). */
function tokenLists(
  order: number[], // by falling frequency, which decides between equals
  total: Float64Array | Float32Array, // n_t
  density: number, // n_c / N
  countOf: (token: number) => number,
  { minCount, listLength }: HarvestSettings,
): { top: TokenStat[]; bottom: TokenStat[] } {
  const top: Scored<TokenStat>[] = [];
  const bottom: Scored<TokenStat>[] = [];
  for (const token of order) {
    const [count, expected] = [countOf(token), density * total[token]!];
    if (Math.max(count, expected) < minCount) continue;
    const pmi = Math.log(count / expected);
    if (Math.abs(pmi) < 1e-4) continue; // no more than the rounding of sums in float32
    const stat: TokenStat = [token, round(count), count > 0 ? round(pmi) : null];
    if (pmi > 0) insert(top, listLength, pmi, stat);
    else insert(bottom, listLength, -pmi, stat);
  }
  return { top: top.map(({ item }) => item), bottom: bottom.map(({ item }) => item) };
}

/** By slot. */
function partnersOf({ tallies, pairPositions }: Counts, settings: HarvestSettings): HarvestComponent['partners'][] {
  const lists = tallies.map(() => ({ jaccard: [] as Scored<Partner>[], pmi: [] as Scored<Partner>[] }));
  const offer = (to: number, partner: number, n: number, jaccard: number, pmi: number) => {
    const byPmi = n >= settings.minTogether && pmi > floor(lists[to]!.pmi, settings.partners);
    if (!byPmi && jaccard <= floor(lists[to]!.jaccard, settings.partners)) return; // most pairs
    const item: Partner = [tallies[partner]!.column, n, round(jaccard), round(pmi)];
    insert(lists[to]!.jaccard, settings.partners, jaccard, item);
    if (byPmi) insert(lists[to]!.pmi, settings.partners, pmi, item);
  };
  for (let a = 0; a < tallies.length; a++) {
    const { together } = tallies[a]!;
    for (let b = 0; b + 1 < together.length; b++) {
      const n = together[b]!;
      if (n === 0) continue;
      const [nA, nB] = [together[a]!, tallies[b]!.together[b]!];
      const [jaccard, pmi] = [n / (nA + nB - n), Math.log((n * pairPositions) / (nA * nB))];
      offer(a, b, n, jaccard, pmi);
      offer(b, a, n, jaccard, pmi);
    }
  }
  const items = (list: Scored<Partner>[]) => list.map(({ item }) => item);
  return lists.map(({ jaccard, pmi }) => ({ jaccard: items(jaccard), pmi: items(pmi) }));
}

async function readPassage(pass: HarvestPass, row: Int32Array, settings: HarvestSettings): Promise<Passage> {
  const out = tf.tidy(() => {
    const { ci, activation, probs } = pass(tf.tensor2d(row, [1, row.length], 'int32'));
    const { values, indices } = tf.topk(probs, Math.min(5, probs.shape[1]!));
    return [ci, activation, values, indices];
  });
  const read = await Promise.all(out.map(numbers));
  tf.dispose(out);
  // One position: its line of each [S, ·] matrix.
  const positions = range(0, row.length).map((n): Passage['positions'][number] => {
    const [ci, activation, p, ids] = read.map(x =>
      x.subarray((n * x.length) / row.length, ((n + 1) * x.length) / row.length),
    );
    const fired = [...ci!.keys()].filter(c => ci![c]! > settings.threshold).sort((a, b) => ci![b]! - ci![a]!);
    const strongest = fired.slice(0, settings.passageFirings);
    return {
      fired: fired.length,
      firing: strongest.map(c => [c, round(ci![c]!, 3), round(activation![c]!, 3)]),
      predictions: Array.from(p!, (q, k) => [ids![k]!, round(q, 3)]),
    };
  });
  return { tokens: [...row], positions };
}

function vocabularyOf(components: HarvestComponent[], passages: Passage[], tokenText: (id: number) => string) {
  const used: boolean[] = []; // by id; faster than a Set
  const use = (tokens: number[]) => {
    for (const t of tokens) used[t] = true;
  };
  for (const { examples, input, output } of components) {
    for (const { tokens } of [...examples.top, ...examples.random]) use(tokens);
    for (const list of [input.top, input.bottom, output.top, output.bottom]) use(list.map(([t]) => t));
  }
  for (const { tokens, positions } of passages)
    use([...tokens, ...positions.flatMap(p => p.predictions.map(([t]) => t))]);
  return Object.fromEntries([...used.keys()].filter(t => used[t]).map(t => [t, tokenText(t)]));
}

/** To so many significant digits (toPrecision takes ten times as long). */
function round(x: number, digits = 4): number {
  if (Number.isInteger(x)) return x;
  const scale = 10 ** (digits - 1 - Math.floor(Math.log10(Math.abs(x))));
  return Math.round(x * scale) / scale;
}

/** What the harvest reads of a run on tokens. Where one answer stands for a whole row, it is that of each position. */
export function harvestPass(problem: Problem, params: Params): HarvestPass {
  return tokens => {
    const { pass, g, N } = importances(problem, params, tokens);
    const activation = problem.modules.map(m => {
      const norms = tf.sqrt(tf.sum(tf.square(U(params, m)), 1)); // ‖U_c‖ [C]
      return tf.mul(matmul(pass.acts[m.path]!, V(params, m)), norms);
    });
    const answers = pass.output.logSoftmax().exp();
    const perAnswer = N / answers.shape[0]!;
    const probs =
      perAnswer === 1 ? answers : answers.reshape([-1, 1, answers.shape[1]!]).tile([1, perAnswer, 1]).reshape([N, -1]);
    return { ci: g, activation: tf.concat(activation, 1), probs };
  };
}

const zeros = (shape: number[]): tf.Variable => tf.tidy(() => tf.variable(tf.zeros(shape), false));

/** A token as text, with its leading space. */
export function tokenText(tokenizer: Tokenizer | undefined, id: number): string {
  const token = tokenizer?.id_to_token(id);
  if (tokenizer === undefined || token === undefined) return `#${id}`;
  if (token.includes('▁')) return token.replaceAll('▁', ' ');
  return tokenizer.decode([id], { skip_special_tokens: false }) || token;
}
