/** The pool of a small model with random weights: what it says fires is what the importances say. */
import assert from 'node:assert/strict';
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import * as tf from '@tensorflow/tfjs';
import { importances } from '../nano-param-decomp.ts';
import { fixtureJob } from './fixture.ts';
import { splitExamples } from './interpret.ts';
import { readPool } from './interpret-pool.ts';
import type { Example, Harvest, HarvestComponent } from './run-files.ts';

const dir = mkdtempSync(join(tmpdir(), 'pool-'));
before(async () => {
  await tf.setBackend('cpu');
});
after(() => rmSync(dir, { recursive: true }));

test('windows of a component: random, its importances at each token, the same at every start', async () => {
  mkdirSync(dir, { recursive: true });
  writeFileSync(join(dir, 'components.safetensors'), 'for the hash');
  const job = await fixtureJob('simple_mlp', dir);
  const window = 5;
  const { modules } = job.problem;
  const components = modules.flatMap(({ path: module, offset, C }) =>
    Array.from({ length: C }, (_, index) => ({ module, index, column: offset + index })),
  );
  const harvest = { settings: { threshold: 0, window }, components } as unknown as Harvest;
  const hashes = { components: 'a', harvest: 'b' };
  const g = (await importances(
    job.problem,
    job.params,
    tf.tensor2d(job.rows, undefined, 'int32'),
  ).g.array()) as number[][];
  const S = job.rows[0]!.length;
  const { pool, firings } = await readPool(job, harvest, hashes, 2);
  let [windows, bounded] = [0, 0];
  for (const { module, index, column } of components) {
    const firing = g.map(values => values[column]! > 0);
    for (const p of firing.keys()) assert.equal(pool.fires(module, index, Math.floor(p / S), p % S), firing[p]);
    const found = firings({ module, index });
    // at most one of each stretch of 5 tokens (7 a row: two stretches), 2 in all
    const stretches = new Set(
      firing.flatMap((f, p) => (f ? [2 * Math.floor(p / S) + Math.floor((p % S) / window)] : [])),
    );
    assert.equal(found.length, Math.min(2, stretches.size), `${module}:${index}`);
    bounded += Number(stretches.size > 2);
    for (const { tokens, ci } of found) {
      windows++;
      assert.ok(ci.some(x => x > 0));
      const places = job.rows.flatMap((row, r) =>
        row.flatMap((_, start) =>
          row.slice(start, start + tokens.length).join() === tokens.join() ? [r * S + start] : [],
        ),
      );
      const off = places.map(p =>
        Math.max(...ci.map((x, k) => Math.abs(x - Math.max(0, Math.min(1, g[p + k]![column]!))))),
      );
      assert.ok(Math.min(...off) <= 1 / 255 + 1e-6, `${module}:${index}: ${off}`);
    }
  }
  assert.ok(windows > 10 && bounded > 0, `${windows} windows, ${bounded} components with more than fit`);
  const file = join(dir, 'interpretations.windows.json');
  const before = readFileSync(file, 'utf8');
  rmSync(file);
  await readPool(job, harvest, hashes, 2);
  assert.equal(readFileSync(file, 'utf8'), before);
});

test('a label is made from 30 windows of held-out text; with few of them the harvest lends half of its own', () => {
  const windowsOf = (n: number) => Array.from({ length: n }, (_, i) => ({ tokens: [i], ci: [1] }));
  const random = windowsOf(10) as unknown as Example[];
  const component = { examples: { top: [], random } } as unknown as HarvestComponent;
  const sizes = (heldOut: number) => {
    const { forLabel, forTrials } = splitExamples(component, windowsOf(heldOut));
    assert.ok(!forTrials.some(e => forLabel.includes(e)), 'no trial has a window of the label');
    return [forLabel.length, forTrials.length];
  };
  assert.deepEqual(sizes(40), [30, 10]);
  assert.deepEqual(sizes(10), [10, 10]);
  assert.deepEqual(sizes(3), [8, 5]);
  assert.deepEqual(sizes(0), [5, 5]);
});
