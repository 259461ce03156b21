/** The harvest against hand-computed numbers and a plain recount; the report's data against hostile texts. */
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { test } from 'node:test';
import { fileURLToPath } from 'node:url';
import * as tf from '@tensorflow/tfjs';
import { PRESETS } from '../io/presets.ts';
import { chooseModules, DEFAULTS, importances, initialParams, linearLayers, loadTarget } from '../nano-param-decomp.ts';
import { type Harvest, type HarvestOptions, type HarvestPass, harvest, harvestDefaults } from './harvest.ts';
import { asciiJson, renderReport } from './page.ts';

const range = (n: number) => Array.from({ length: n }, (_, i) => i);
const sum = (numbers: Iterable<number>) => [...numbers].reduce((a, b) => a + b, 0);
/** Equal, but for the rounding of harvest.json. */
const near = (a: number, b: number, what: string) =>
  assert.ok(Math.abs(a - b) <= 5.1e-3 * Math.abs(b) + 1e-9, `${what}: ${a}, expected ${b}`);

/** Numbers in [0, 1) from a seed. */
function seeded(seed: number): () => number {
  let state = seed;
  return () => {
    state = (Math.imul(state, 1664525) + 1013904223) | 0;
    return (state >>> 0) / 2 ** 32;
  };
}

/** What a "network" does at a token: CI and activation of every component, and its prediction. */
interface Tables {
  ci: number[][]; // [vocab][ΣC]
  activation: number[][];
  probs: number[][]; // [vocab][vocab]
}
const modulesOf = (sizes: number[]) =>
  sizes.map((C, i) => ({
    ...{ path: `m${i}`, dIn: 1, dOut: 1, hasBias: false },
    ...{ C, offset: sum(sizes.slice(0, i)) },
  })) as unknown as HarvestOptions['modules'];

const rowsOf = (rows: number[][]): HarvestOptions['rows'] => ({
  ...{ count: rows.length, seqLen: rows[0]?.length ?? 0, row: i => Int32Array.from(rows[i]!) },
});
/** Batches of two rows, unless the settings say otherwise. */
function run(tables: Tables, rows: number[][], options: Partial<HarvestOptions> = {}): Promise<Harvest> {
  const lookUp = (table: number[][], tokens: tf.Tensor) => tf.gather(tf.tensor2d(table), tf.reshape(tokens, [-1]));
  return harvest({
    pass: tokens => ({
      ci: lookUp(tables.ci, tokens),
      activation: lookUp(tables.activation, tokens),
      probs: lookUp(tables.probs, tokens),
    }),
    engine: { compile: (_name, fn) => async feeds => tf.tidy(() => fn(feeds)) },
    modules: modulesOf([tables.ci[0]!.length]),
    vocabSize: tables.ci.length,
    tokenText: id => `<${id}>`,
    rows: rowsOf(rows),
    passages: [],
    ...options,
    settings: { batchPositions: 2 * (rows[0]?.length ?? 0), ...options.settings },
  });
}

function randomTables(random: () => number, vocab: number, columns: number): Tables {
  const table = (width: number, value: () => number) => range(vocab).map(() => range(width).map(value));
  const probs = table(vocab, () => random() ** 4);
  return {
    ci: table(columns, () => (random() < 0.3 ? Math.fround(Math.min(1, 1.5 * random())) : 0)),
    activation: table(columns, () => Math.fround(random() - 0.5)),
    probs: probs.map(row => row.map(p => p / sum(row))),
  };
}
const randomRows = (random: () => number, rows: number, S: number, vocab: number) =>
  range(rows).map(() => range(S).map(() => Math.floor(vocab * random() ** 2)));

test('a fixture computed by hand', async () => {
  // Components a, b (module m0) and c (m1); c never fires. Tokens 0 to 3.
  const tables: Tables = {
    ci: [
      [0, 0, 0],
      [1, 0, 0],
      [0.5, 0.25, 0],
      [0, 0.5, 0],
    ],
    activation: [
      [9, 9, 9],
      [2, 9, 9],
      [-4, 3, 9],
      [9, 1, 9],
    ],
    probs: [
      [1, 0, 0, 0],
      [0, 1, 0, 0],
      [0, 0.5, 0.5, 0],
      [0.25, 0.25, 0.25, 0.25],
    ],
  };
  const rows = [
    [0, 1, 2, 3],
    [1, 1, 2, 0],
    [3, 2, 1, 0],
  ]; // N = 12; the last batch has one row of two
  const settings = { minCount: 1, minTogether: 1, examples: 2, window: 3, lowCount: 6 };
  const result = await run(tables, rows, { modules: modulesOf([2, 1]), settings });
  assert.equal(result.positions, 12);
  assert.equal(result.pairPositions, 12);
  assert.deepEqual(
    result.modules.map(({ path, alive, meanCi }) => ({ path, alive, meanCi })),
    [
      { path: 'm0', alive: 2, meanCi: [0.4583, 0.1458] }, // (4·1 + 3·0.5) / 12 and (3·0.25 + 2·0.5) / 12
      { path: 'm1', alive: 0, meanCi: [0] },
    ],
  );
  const [a, b, ...others] = result.components;
  assert.equal(others.length, 0, 'a component that never fires is not listed');
  assert.ok(a && b);
  assert.deepEqual([a.module, a.index, a.column, a.firings, b.firings], ['m0', 0, 0, 7, 5]);
  near(a.density, 7 / 12, 'density');
  near(a.meanCi, 5.5 / 12, 'mean CI');
  near(a.meanActivation, (4 * 2 - 3 * 4) / 7, 'mean activation');
  assert.deepEqual([a.lowCount, b.lowCount], [false, true]);
  // a fires on token 1 four times of 4 and on token 2 three times of 3: PMI ln(4·12/(7·4)) = ln(12/7), the same.
  assert.deepEqual(a.input.top, [
    [1, 4, 0.539],
    [2, 3, 0.539],
  ]);
  // Token 0 (3 times, 1.75 expected) and token 3 (2 times, 1.17 expected) never: PMI −∞, the commoner one first.
  assert.deepEqual(a.input.bottom, [
    [0, 0, null],
    [3, 0, null],
  ]);
  // Softmax mass where a fires: token 1: 4 + 3/2 = 5.5, token 2: 1.5. In all: token 0: 3.5, 1: 6, 2: 2, 3: 0.5.
  near(a.output.top[0]![2]!, Math.log((5.5 * 12) / (7 * 6)), 'output PMI');
  assert.deepEqual(a.output.top, [
    [1, 5.5, 0.452],
    [2, 1.5, 0.2513],
  ]);
  assert.deepEqual(a.output.bottom, [[0, 0, null]]);
  // Both fire on token 2 only: 3 of 7 + 5 − 3 = 9.
  assert.deepEqual(a.partners.jaccard, [[1, 3, 0.3333, 0.02817]]); // PMI ln(3·12/(7·5))
  assert.deepEqual(b.partners.pmi, [[0, 3, 0.3333, 0.02817]]);
  // Examples: windows of 3, clipped to the row. Strongest: CI 1 at token 1, one a row, the earliest first.
  assert.deepEqual(a.examples.top, [
    { row: 0, start: 0, at: 1, tokens: [0, 1, 2], ci: [0, 1, 0.5], activation: [9, 2, -4] },
    { row: 1, start: 0, at: 0, tokens: [1, 1], ci: [1, 1], activation: [2, 2] },
  ]);
  assert.deepEqual(result.vocabulary, { 0: '<0>', 1: '<1>', 2: '<2>', 3: '<3>' });
});

test('all numbers equal a plain recount', async () => {
  const random = seeded(3);
  const [vocab, S, columns] = [23, 17, 9];
  const tables = randomTables(random, vocab, columns);
  const rows = randomRows(random, 41, S, vocab);
  const settings = { threshold: 0.2, examples: 4, window: 7, listLength: 5, partners: 3, minCount: 4, minTogether: 8 };
  const result = await run(tables, rows, { modules: modulesOf([4, 5]), settings });
  const tokens = rows.flat();
  const N = tokens.length;
  const fires = (c: number, t: number) => tables.ci[t]![c]! > settings.threshold;
  const alive = range(columns).filter(c => tokens.some(t => fires(c, t)));
  assert.deepEqual(
    result.components.map(c => c.column),
    alive,
  );
  for (const { column: c, ...found } of result.components) {
    const firings = tokens.filter(t => fires(c, t));
    assert.equal(found.firings, firings.length);
    near(found.density, firings.length / N, 'density');
    near(found.meanCi, sum(tokens.map(t => tables.ci[t]![c]!)) / N, 'mean CI');
    near(found.meanActivation, sum(firings.map(t => tables.activation[t]![c]!)) / firings.length, 'mean activation');

    for (const kind of ['input', 'output'] as const) {
      const count = (where: number[], t: number) =>
        kind === 'input' ? where.filter(u => u === t).length : sum(where.map(u => tables.probs[u]![t]!));
      const stats = range(vocab)
        .map(t => ({ t, n: count(firings, t), expected: (firings.length * count(tokens, t)) / N }))
        .filter(({ n, expected }) => Math.max(n, expected) >= settings.minCount)
        .map(s => ({ ...s, pmi: Math.log((s.n * N) / (firings.length * count(tokens, s.t))) }));
      const check = (list: Harvest['components'][number]['input']['top'], wanted: typeof stats) => {
        assert.equal(list.length, Math.min(settings.listLength, wanted.length));
        for (const [i, [t, n, pmi]] of list.entries()) {
          const own = stats.find(s => s.t === t)!;
          near(n, own.n, `${kind} count`);
          near(pmi ?? -1e9, Math.max(own.pmi, -1e9), `${kind} PMI`);
          near(Math.max(own.pmi, -1e9), Math.max(wanted[i]!.pmi, -1e9), `${kind} order`);
        }
      };
      const { top, bottom } = found[kind];
      check(
        top,
        stats.filter(s => s.pmi > 1e-9).sort((x, y) => y.pmi - x.pmi),
      );
      check(
        bottom,
        stats.filter(s => s.pmi < -1e-9).sort((x, y) => (x.pmi < y.pmi ? -1 : 1)),
      );
    }

    const partners = alive
      .filter(d => d !== c)
      .map(d => ({ d, n: firings.filter(t => fires(d, t)).length, nD: tokens.filter(t => fires(d, t)).length }))
      .filter(({ n }) => n > 0)
      .map(p => ({ ...p, jaccard: p.n / (firings.length + p.nD - p.n) }))
      .map(p => ({ ...p, pmi: Math.log((p.n * N) / (firings.length * p.nD)) }));
    for (const kind of ['jaccard', 'pmi'] as const) {
      const wanted = partners
        .filter(p => kind === 'jaccard' || p.n >= settings.minTogether)
        .sort((x, y) => y[kind] - x[kind])
        .slice(0, settings.partners);
      assert.equal(found.partners[kind].length, wanted.length);
      for (const [i, [d, n, jaccard, pmi]] of found.partners[kind].entries()) {
        const own = partners.find(p => p.d === d)!;
        assert.equal(n, own.n);
        near(jaccard, own.jaccard, 'Jaccard');
        near(pmi, own.pmi, 'partner PMI');
        near(own[kind], wanted[i]![kind], `order by ${kind}`);
      }
    }

    for (const e of [...found.examples.top, ...found.examples.random]) {
      const row = rows[e.row]!;
      assert.ok(fires(c, e.tokens[e.at]!));
      assert.equal(e.start, Math.max(0, e.start + e.at - 3));
      assert.deepEqual(e.tokens, row.slice(e.start, e.start + e.at + 4));
      for (const [k, t] of e.tokens.entries()) {
        near(e.ci[k]!, tables.ci[t]![c]!, 'example CI');
        near(e.activation[k]!, tables.activation[t]![c]!, 'example activation');
      }
    }
    // The strongest firing of each row, by CI and then |activation|; the four strongest of those.
    const strength = (t: number) => tables.ci[t]![c]! * 1e6 + Math.abs(tables.activation[t]![c]!);
    const best = rows.map(row => Math.max(...row.filter(t => fires(c, t)).map(strength)));
    const wanted = best
      .filter(Number.isFinite)
      .sort((x, y) => y - x)
      .slice(0, settings.examples);
    assert.deepEqual(
      found.examples.top.map(e => strength(e.tokens[e.at]!)),
      wanted,
    );
    assert.equal(new Set(found.examples.top.map(e => e.row)).size, wanted.length, 'one example a row');
  }
});

test('on the toy, all numbers equal a plain recount', async () => {
  const toy = fileURLToPath(new URL('../assets/toy/', import.meta.url));
  const target = await loadTarget(toy);
  const config = { ...DEFAULTS, ...PRESETS.toy!.config };
  const modules = chooseModules(linearLayers(target.arch), config.components);
  const problem = { target, modules, config };
  const params = initialParams(problem);
  const weights = modules.map(({ path }) => ({
    path,
    V: params[`components.${path}.V`]!,
    U: params[`components.${path}.U`]!,
  }));
  const pass: HarvestPass = tokens => {
    const { pass, g } = importances(problem, params, tokens);
    const parts = weights.map(({ path, V, U }) => tf.mul(tf.matMul(pass.acts[path]!, V), tf.norm(U, 2, 1)));
    return { ci: g, activation: tf.concat(parts, 1), probs: pass.output.softmax() };
  };
  const rows = (JSON.parse(readFileSync(`${toy}eval.json`, 'utf8')) as number[][]).slice(0, 8);
  const batches = { batchPositions: 3 * rows[0]!.length }; // 3, 3 and 2 rows
  const settings = { ...batches, minTogether: 1, minCount: 1, listLength: 100, pairsPerPosition: 1e9, partners: 5 };
  const { components, positions } = await harvest({
    ...{ pass, modules, vocabSize: target.arch.vocab, tokenText: String, passages: [], settings },
    engine: { compile: (_name, fn) => async feeds => tf.tidy(() => fn(feeds)) },
    rows: rowsOf(rows),
  });

  // All positions in one pass, then plain loops over them.
  const [ci, activation, probs] = tf.tidy(() => {
    const all = pass(tf.tensor2d(rows, undefined, 'int32'));
    return [all.ci, all.activation, all.probs].map(t => t.arraySync() as number[][]);
  }) as unknown as [number[][], number[][], number[][]];
  const tokens = rows.flat();
  const N = tokens.length;
  assert.equal(positions, N);
  const firings = ci[0]!.map((_, c) => range(N).filter(n => ci[n]![c]! > 0));
  assert.deepEqual(
    components.map(c => c.column),
    [...firings.keys()].filter(c => firings[c]!.length > 0),
  );
  const samePmi = (pmi: number | null, lift: number) =>
    assert.ok(pmi === null ? lift === 0 : Math.abs(pmi - Math.log(lift)) < 1e-3 * Math.max(1, Math.abs(pmi)));
  for (const { column: c, ...found } of components) {
    const own = firings[c]!;
    near(found.density, own.length / N, 'density');
    near(found.meanCi, sum(ci.map(g => g[c]!)) / N, 'mean CI');
    const mean = sum(own.map(n => activation[n]![c]!)) / own.length;
    assert.ok(Math.abs(found.meanActivation - mean) < 1e-3 * Math.max(1, Math.abs(mean)), 'mean activation');
    for (const [t, n, pmi] of [...found.input.top, ...found.input.bottom]) {
      assert.equal(n, own.filter(n => tokens[n] === t).length);
      samePmi(pmi, (n * N) / (own.length * tokens.filter(u => u === t).length));
    }
    for (const [t, mass, pmi] of [...found.output.top, ...found.output.bottom]) {
      const exact = sum(own.map(n => probs[n]![t]!));
      near(mass, exact, 'output mass');
      samePmi(pmi, (exact * N) / (own.length * sum(probs.map(p => p[t]!))));
    }
    for (const [d, n, jaccard, pmi] of [...found.partners.jaccard, ...found.partners.pmi]) {
      const both = own.filter(n => ci[n]![d]! > 0).length;
      assert.equal(n, both);
      near(jaccard, both / (own.length + firings[d]!.length - both), 'Jaccard');
      samePmi(pmi, (both * N) / (own.length * firings[d]!.length));
    }
  }
});

test('a passage lists what fires at each position, the strongest first', async () => {
  const random = seeded(5);
  const tables = randomTables(random, 11, 8);
  const row = [3, 1, 4, 1, 5];
  const settings = { passageFirings: 2 };
  const { passages } = await run(tables, [row], { passages: [Int32Array.from(row)], settings });
  assert.deepEqual(passages[0]!.tokens, row);
  for (const [i, { fired, firing, predictions }] of passages[0]!.positions.entries()) {
    const ci = tables.ci[row[i]!]!;
    const order = range(8)
      .filter(c => ci[c]! > 0)
      .sort((a, b) => ci[b]! - ci[a]!);
    assert.equal(fired, order.length);
    assert.deepEqual(
      firing.map(([c]) => c),
      order.slice(0, 2),
    );
    const probs = tables.probs[row[i]!]!;
    const likely = range(11).sort((a, b) => probs[b]! - probs[a]!);
    assert.deepEqual(
      predictions.map(([t]) => t),
      likely.slice(0, 5),
    );
    near(predictions[0]![1], probs[likely[0]!]!, 'probability');
  }
});

test('memory is bounded by the settings, not by the data', async () => {
  const random = seeded(7);
  const [vocab, columns] = [60, 12];
  const tables = randomTables(random, vocab, columns);
  const settings = { outputCells: 10 * columns, inputTokens: 16, pairedComponents: 5, pairsPerPosition: 2 };
  const size = async (rows: number) => {
    const random = seeded(8);
    return run(tables, randomRows(random, 2 * rows, 20, vocab), { settings: { ...settings, seed: 1 } });
  };
  const [small, large] = [await size(20), await size(200)];
  assert.ok(JSON.stringify(large).length < 1.2 * JSON.stringify(small).length, 'ten times the data');
  assert.equal(large.positions, 200 * 40);
  assert.equal(large.outputTokens, 10);
  const share = large.pairPositions / large.positions;
  assert.ok(share > 0.05 && share < 0.6, `pairs at ${share} of the positions`);
  const paired = new Set(large.components.flatMap(c => c.partners.jaccard.map(([column]) => column)));
  assert.ok(paired.size <= 5, `${paired.size} components with partners`);
  // Misra-Gries: a count is never too high, and short by at most `missed`, which is at most a share of the firings.
  const again = seeded(8);
  const tokens = randomRows(again, 400, 20, vocab).flat();
  for (const { column, firings, input } of large.components) {
    assert.ok(input.missed <= firings / 8, `missed ${input.missed} of ${firings}`);
    for (const [t, n] of input.top) {
      const exact = tables.ci[t]![column]! > 0 ? tokens.filter(u => u === t).length : 0;
      assert.ok(n <= exact && n >= exact - input.missed, `${n} of ${exact}, missed ${input.missed}`);
    }
  }
});

test('when nearly all components fire at every position, all counts are exact', async () => {
  const random = seeded(11);
  const [vocab, columns, S] = [13, 150, 16];
  const tables = randomTables(random, vocab, columns);
  for (const row of tables.ci)
    for (const c of row.keys()) row[c] = c % 10 === 0 ? 0 : Math.fround(0.1 + 0.9 * random());
  const rows = randomRows(random, 60, S, vocab);
  const { components, positions, pairPositions } = await run(tables, rows, { settings: { seed: 3, minCount: 1 } });
  const tokens = rows.flat();
  assert.equal(components.length, 135);
  // 135²/2 pairs fire at a position and 512 are counted, so 0.056 of the 960 positions: 54, standard deviation 7.
  assert.ok(pairPositions > 20 && pairPositions < 90, `pairs at ${pairPositions} of ${positions} positions`);
  for (const { column, firings, meanCi, input, partners } of components) {
    assert.equal(firings, positions);
    near(meanCi, sum(tokens.map(t => tables.ci[t]![column]!)) / positions, 'mean CI');
    assert.deepEqual(input, { top: [], bottom: [], missed: 0 }, 'no token is more or less frequent than elsewhere');
    for (const [, n, jaccard, pmi] of partners.jaccard) assert.deepEqual([n, jaccard, pmi], [pairPositions, 1, 0]);
    assert.equal(partners.jaccard.length, harvestDefaults.partners);
  }
});

test('the size of the batches changes nothing', async () => {
  const random = seeded(12);
  const tables = randomTables(random, 30, 40);
  const rows = randomRows(random, 23, 12, 30);
  const settings = { seed: 5, pairsPerPosition: 20, minTogether: 2 };
  const results = await Promise.all(
    [1, 4, 23].map(async size => {
      const { components, pairPositions, positions } = await run(tables, rows, {
        settings: { ...settings, batchPositions: 12 * size },
      });
      // sums of floats are rounded, and of equal partners the first to fire comes first
      const exact = components.map(({ column, firings, examples, input, partners: { jaccard, pmi } }) => ({
        ...{ column, firings, examples, input, jaccard: jaccard.map(p => p[2]), pmi: pmi.map(p => p[3]) },
      }));
      return { exact, pairPositions, positions };
    }),
  );
  assert.ok(results[0]!.pairPositions < results[0]!.positions, 'pairs are sampled');
  assert.deepEqual(results[1], results[0]);
  assert.deepEqual(results[2], results[0]);
});

test('random examples are the same for the same seed, one a row, and every firing is equally likely', async () => {
  const tables: Tables = { ci: [[0, 0], [0.5, 0], [1, 1]], activation: range(3).map(() => [1, 1]), probs: range(3).map(() => [1, 0, 0]) }; // biome-ignore format: one line a table
  // 80 rows, all with two firings of the first component, of different strength, at changing positions
  const rows = range(80).map(r => range(4).map(s => (s === r % 4 ? 1 : s === (r + 1) % 4 ? 2 : 0)));
  const draw = async (seed: number) => {
    const { components } = await run(tables, rows, { settings: { examples: 5, window: 1, seed } });
    return components.map(c => c.examples.random.map(e => 4 * e.row + e.start)) as [number[], number[]];
  };
  assert.deepEqual(await draw(1), await draw(1));
  assert.notDeepEqual(await draw(1), await draw(2));
  const counts = new Map<number, number>();
  const runs = 600;
  let shared = 0;
  for (let seed = 0; seed < runs; seed++) {
    const [kept, other] = await draw(seed);
    assert.equal(new Set(kept.map(n => Math.floor(n / 4))).size, 5, 'five rows');
    for (const n of kept) counts.set(n, (counts.get(n) ?? 0) + 1);
    shared += kept.filter(n => other.includes(n)).length;
  }
  assert.equal(counts.size, 160, 'every firing is chosen at some time, and nothing else');
  const expected = (runs * 5) / 160;
  const chiSquare = sum([...counts.values()].map(n => (n - expected) ** 2 / expected));
  assert.ok(chiSquare > 90 && chiSquare < 240, `chi-square ${chiSquare} with 159 degrees of freedom`);
  // Of 5 firings the second component, which fires at half of them, would have 5 · 5/160 by chance.
  assert.ok(shared / runs < 0.35, `${shared / runs} of 5 random examples are shared`);
});

test('no rows are refused', async () => {
  await assert.rejects(run(randomTables(seeded(1), 4, 2), []), /no data/);
});

// ---- Report ----

const HOSTILE = [
  '</script><script>alert(1)</script>',
  '<!--<script>',
  '-->',
  ']]>',
  `"'\`\\`,
  "$& $` $' $1 $$",
  '\u0000\u0001\u001b[31m\u007f\u0085\u009f\r\n\t',
  '\ud800 lone high',
  'lone low \udc00',
  '\u202eright to left\u202c\u200f\u2066\u2069\u061c',
  '\u2028\u2029\ufeff',
  '&lt;b&gt;&amp;&#60;',
  '😀 ✓ 中文 ا',
  '__proto__',
];

test('no text can end the script, start a comment or turn the reading direction', () => {
  for (const text of HOSTILE) {
    const json = asciiJson({ [text]: [text] });
    assert.match(json, /^[\x20-\x7e]*$/, 'printable ASCII only');
    assert.doesNotMatch(json, /[<>&]/);
    assert.deepEqual(JSON.parse(json), JSON.parse(JSON.stringify({ [text]: [text] })));
    assert.equal(JSON.parse(asciiJson(text)), text, 'the text survives, even a lone surrogate');
  }
});

test('the report inlines the data once, whatever it contains', async () => {
  const tables = randomTables(seeded(2), HOSTILE.length, 6);
  const rows = randomRows(seeded(9), 30, 12, HOSTILE.length);
  const result = await run(tables, rows, { tokenText: id => HOSTILE[id]!, modules: modulesOf([6]) });
  const data = { config: { note: HOSTILE }, metrics: { a: 1 }, history: [{ step: 0, a: 1 }], harvest: result };
  const page = renderReport(data, '<script id="data">"@@report-data@@"</script>');
  const [, inlined] = /^<script id="data">([^<]*)<\/script>$/.exec(page) ?? [];
  assert.ok(inlined, "the only < and > are the template's");
  const { harvest: packed, config } = JSON.parse(inlined);
  assert.deepEqual(config.note, HOSTILE);
  assert.deepEqual(packed.texts, HOSTILE);

  // The examples unpack to what was packed: tokens exactly, CI to 1/255, activation to 1/127 of the largest.
  const { scale, top } = packed.components[0].examples;
  const original = result.components[0]!.examples.top[0]!;
  const [row, start, at, base64] = top[0];
  const bytes = Buffer.from(base64, 'base64');
  const L = original.tokens.length;
  assert.deepEqual([row, start, at, bytes.length], [original.row, original.start, original.at, 4 * L]);
  for (const [k, token] of original.tokens.entries()) {
    assert.equal(packed.ids[bytes.readUInt16LE(2 * k)], token);
    assert.ok(Math.abs(bytes[2 * L + k]! / 255 - original.ci[k]!) < 1 / 254);
    assert.equal(bytes[2 * L + k]! > 0, original.ci[k]! > 0, 'what fires does not look like 0');
    assert.ok(Math.abs((bytes.readInt8(3 * L + k) / 127) * scale - original.activation[k]!) <= scale / 253);
  }
  assert.throws(() => renderReport(data, 'no placeholder'), /exactly once/);
  assert.throws(() => renderReport(data, '"@@report-data@@" "@@report-data@@"'), /exactly once/);
});

test('a large harvest makes a page of bounded size', async () => {
  const tables = randomTables(seeded(4), 50, 20);
  const result = await run(tables, randomRows(seeded(5), 40, 41, 50), {});
  for (const copies of [1000]) {
    const many = range(copies).flatMap(() => result.components); // 20,000 components
    const data = { config: {}, metrics: {}, history: [], harvest: { ...result, components: many } };
    const megabytes = renderReport(data, '"@@report-data@@"').length / 1e6;
    assert.ok(megabytes > 10 && megabytes < 20, `${megabytes} MB`);
  }
});
