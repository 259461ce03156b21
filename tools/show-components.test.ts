/** Which components are shown, what their deletion is said to do, and that token texts can't break a table. */
import assert from 'node:assert/strict';
import { before, test } from 'node:test';
import * as tf from '@tensorflow/tfjs';
import { importances, ownLinear, range, totalC } from '../nano-param-decomp.ts';
import { editedLogits } from '../postprocess/ask.ts';
import { fixtureJob } from '../postprocess/fixture.ts';
import { type Harvest, type HarvestComponent, harvest, harvestPass } from '../postprocess/harvest.ts';
import { choose, code, deletions, report } from './show-components.ts';

before(async () => {
  await tf.setBackend('cpu');
});
const made = (module: string, column: number, firings: number) =>
  ({ module, index: column, column, firings }) as HarvestComponent;

test('the most used of each part of a kind of module, with its neighbour in density as control', () => {
  // 23 in two layers of one kind, in no order: parts begin at places 0, 2, 4, 6, 9, 11, 13, 16, 18, 20 of the sorted list
  const up = range(0, 23).map(i => made(`h.${i % 2}.mlp.up`, i, 100 - ((i * 7) % 23)));
  const q = [made('h.0.q', 90, 5), made('h.0.q', 91, 9)];
  const found = choose([...up, ...q], 10);
  assert.deepEqual([...found.keys()], ['up', 'q']);
  const ups = found.get('up')!;
  assert.deepEqual(
    ups.map(c => 100 - c.component.firings),
    [0, 2, 4, 6, 9, 11, 13, 16, 18, 20],
  );
  assert.deepEqual(
    ups.map(c => 100 - c.control!.firings),
    [1, 3, 5, 7, 10, 12, 14, 17, 19, 21],
  );
  assert.deepEqual(
    found.get('q')!.map(c => [c.component.column, c.control?.column, c.part, c.parts]),
    [
      [91, 90, 1, 2],
      [90, 91, 2, 2],
    ],
    'fewer than parts: each is one, and the last has the one before it',
  );
  assert.equal(choose([made('h.0.q', 0, 1)], 10).get('q')![0]!.control, undefined);
});

test('a deletion costs what the edited model says, split by where it fires, later in the row, elsewhere', async () => {
  const base = await fixtureJob('llama');
  const job = { ...base, problem: { ...base.problem, config: { ...base.problem.config, evalBatchSize: 2 } } };
  const { problem, params, data } = job;
  const { vocab } = problem.target.arch;
  const rows = data.heldOut;
  const result = await harvest({
    ...{ pass: harvestPass(problem, params), engine: job.engine, modules: problem.modules, rows, passages: [] },
    ...{ vocabSize: vocab, tokenText: (id: number) => (id === 3 ? '|`<b>' : `t${id}`) },
    settings: { minCount: 0 },
  });
  const kinds = choose(result.components, 2);
  const chosen = [...kinds.values()].flat();
  const before = tf.memory().numTensors;
  const found = await deletions(job, chosen, 21);
  assert.equal(tf.memory().numTensors, before, 'no tensor is left behind');

  const [S, sumC] = [rows.seqLen, totalC(problem.modules)];
  const tokens = tf.tensor2d(job.rows, undefined, 'int32');
  const g = importances(problem, params, tokens).g.dataSync();
  const own = problem.target.forward(tokens, ownLinear(problem.target)).softmax();
  const [p, N] = [own.dataSync(), 21];
  const without = (column: number) =>
    editedLogits(job, tokens, [{ column, factor: 0 }], false)
      .softmax()
      .dataSync();
  const klAt = (q: ArrayLike<number>, n: number) =>
    range(0, vocab).reduce((sum, v) => sum + p[n * vocab + v]! * Math.log(p[n * vocab + v]! / q[n * vocab + v]!), 0);
  const mean = (list: number[]) => (list.length > 0 ? list.reduce((a, b) => a + b) / list.length : Number.NaN);
  let [some, later] = [0, 0];
  for (const [i, { component, control }] of chosen.entries()) {
    const fires = (n: number) => g[n * sumC + component.column]! > 0;
    const behind = (n: number) => range(n - (n % S), n).some(fires);
    const q = without(component.column);
    const on = range(0, N).filter(fires);
    const rest = range(0, N).filter(n => !fires(n));
    const token = component.output.top[0]?.[0] ?? 0;
    const expected = {
      firing: on.length,
      klFiring: mean(on.map(n => klAt(q, n))),
      klLater: mean(rest.filter(behind).map(n => klAt(q, n))),
      klElsewhere: mean(rest.filter(n => !behind(n)).map(n => klAt(q, n))),
      klControl: control ? mean(on.map(n => klAt(without(control.column), n))) : Number.NaN,
      before: mean(on.map(n => p[n * vocab + token]!)),
      after: mean(on.map(n => q[n * vocab + token]!)),
    };
    for (const [name, value] of Object.entries(expected)) {
      const actual = found[i]![name as keyof (typeof found)[number]];
      const close = Number.isNaN(value)
        ? Number.isNaN(actual)
        : Math.abs(actual - value) < 1e-5 + 1e-3 * Math.abs(value);
      assert.ok(close, `${component.module}:${component.index} ${name}: ${actual}, expected ${value}`);
    }
    some += Number(expected.klFiring > 1e-3);
    later += Number(expected.klLater > 0);
  }
  assert.ok(some > 5 && later > 2, 'most cost something, and some have positions behind a firing');

  const text = report(result, kinds, new Map(chosen.map((c, i) => [c, found[i]!])));
  const tables = text.split('\n').filter(line => line.startsWith('|'));
  assert.equal(tables.length, 2 * kinds.size + chosen.length);
  const cells = tables.map(line => line.replaceAll('\\|', '').split('|').length);
  assert.equal(new Set(cells).size, 1, 'a token with a bar is in no cell of its own');
  assert.doesNotMatch(text, /NaN|undefined/);
});

test('the report says what can’t be read', () => {
  const lists = { input: { top: [], bottom: [], missed: 0 }, output: { top: [], bottom: [] } };
  const examples = { top: [{ row: 0, start: 0, at: 0, tokens: [0], ci: [1], activation: [1] }], random: [] };
  const c = {
    ...made('h.0.q', 0, 3),
    density: 0.03,
    lowCount: true,
    examples,
    ...lists,
  } as unknown as HarvestComponent;
  const result = { components: [c], positions: 100, vocabulary: { 0: 'x' }, settings: { lowCount: 100 } };
  const kinds = choose([c], 10);
  const [chosen] = [...kinds.values()].flat();
  const nothing = { klFiring: 1e-4, klLater: Number.NaN, klElsewhere: 1e-4, klControl: 2e-4, before: 0, after: 0 };
  const text = report(result as unknown as Harvest, kinds, new Map([[chosen!, { firing: 2, ...nothing }]]));
  for (const what of [
    'fewer than 100 times',
    'prefer no token',
    'less than 0.01 nats',
    'no more there than their control',
  ])
    assert.match(text, new RegExp(`^- 1 .*${what}`, 'm'));
  assert.doesNotMatch(text, /none of the held-out positions|NaN/);
});

test('token texts are code spans that end where they should', () => {
  assert.equal(code(' the'), '` the`');
  assert.equal(code('a|b'), '`a\\|b`');
  assert.equal(code('`'), '`` ` ``');
  assert.equal(code('a``b`'), '``` a``b` ```');
  assert.equal(code('\n\t\u202e\ud800'), '`↵⇥··`');
  assert.equal(code(''), '∅');
});
