/** Dataset attributions against the same sums taken edge by edge, and stopping and going on. */

import assert from 'node:assert/strict';
import { before, test } from 'node:test';
import * as tf from '@tensorflow/tfjs';
import { importances, V } from '../nano-param-decomp.ts';
import { datasetAttributions } from './attributions.ts';
import { fixtureJob } from './fixture.ts';
import { type Attributions, attributionDefaults } from './formats.ts';
import { componentForm } from './forward.ts';
import { attribute, type Wanted } from './graph.ts';

before(async () => {
  await tf.setBackend('cpu');
});
const settings = { ...attributionDefaults, strongest: 1000, batchPositions: 14 }; // of 21: two batches

test('A and Aabs are the sums of α g over texts, positions and paths', async () => {
  const job = await fixtureJob('simple_mlp');
  const { problem, params, rows } = job;
  const { modules } = problem;
  const file = await datasetAttributions(job, settings, 1e9);
  assert.ok(file.complete && file.positions === 21 && file.targets.length === file.alive);
  const expected = new Map<string, { A: number; Aabs: number }>();
  const add = (key: string, A: number, sign: number) => {
    const sum = expected.get(key) ?? { A: 0, Aabs: 0 };
    expected.set(key, { A: sum.A + A, Aabs: sum.Aabs + sign * A });
  };
  for (const tokens of rows) {
    const input = tf.tensor2d([tokens], undefined, 'int32');
    const g = (await importances(problem, params, input).g.array()) as number[][];
    const form = componentForm(problem, params, input, false);
    const acts = (await Promise.all(form.acts.map(a => a.array()))) as number[][][];
    const wanted: (Wanted & { reader: number; index: number })[] = [];
    for (const [reader, m] of modules.entries()) {
      const vectors = (await tf.transpose(V(params, m)).array()) as number[][];
      for (let index = 0; index < m.C; index++)
        for (const position of tokens.keys())
          wanted.push({ reader, index, position, vector: Float32Array.from(vectors[index]!) });
    }
    await attribute(form, wanted, 4096, (k, { embedding, same, across }) => {
      const { reader, index, position: t } = wanted[k]!;
      const to = `${modules[reader]!.path}:${index}`;
      const sign = Math.sign(acts[reader]![t]![index]!);
      add(`#${tokens[t]} > ${to}`, embedding, sign);
      for (const [i, m] of modules.entries())
        for (let c = 0; c < m.C; c++) {
          const from = `${m.path}:${c}`;
          if (same[i]) add(`${from} > ${to}`, same[i]![c]! * g[t]![m.offset + c]!, sign);
          for (let s = 0; across[i] && s <= t; s++)
            add(`${from} > ${to}`, across[i]![s * m.C + c]! * g[s]![m.offset + c]!, sign);
        }
    });
  }
  let compared = 0;
  for (const { module, index, sources } of file.targets) {
    for (const source of sources) {
      const from = 'token' in source ? `#${source.token}` : `${source.module}:${source.index}`;
      const sum = expected.get(`${from} > ${module}:${index}`);
      const scale = Math.abs(sources[0]!.Aabs);
      assert.ok(Math.abs(source.A - (sum?.A ?? 0)) < 1e-4 * scale + 1e-5, `${from} > ${module}:${index} A`);
      assert.ok(Math.abs(source.Aabs - (sum?.Aabs ?? 0)) < 1e-4 * scale + 1e-5, `${from} > ${module}:${index}`);
      compared++;
    }
  }
  assert.ok(compared > 50, `${compared}`);
});

test('stopped and started again, it is the same file; a list holds the strongest', async () => {
  const job = await fixtureJob('simple_mlp');
  const few = { ...settings, strongest: 3 };
  const whole = await datasetAttributions(job, few, 1e9);
  let part: Attributions = await datasetAttributions(job, few, 0);
  assert.equal(part.targets.length, 1);
  assert.equal(part.complete, false);
  for (let i = 0; i < 200 && !part.complete; i++)
    part = await datasetAttributions(job, few, 0, JSON.parse(JSON.stringify(part)));
  assert.deepEqual(part, whole);
  const all = await datasetAttributions(job, settings, 1e9);
  for (const [i, { sources, share }] of whole.targets.entries()) {
    assert.deepEqual(sources, all.targets[i]!.sources.slice(0, 3));
    const sum = (list: typeof sources) => list.reduce((total, s) => total + Math.abs(s.Aabs), 0);
    assert.ok(Math.abs(share - sum(sources) / sum(all.targets[i]!.sources)) < 1e-4);
  }
  const { module, index, targets } = whole.feeds[0]!;
  const into = all.targets.find(t => t.module === targets[0]!.module && t.index === targets[0]!.index)!;
  const back = into.sources.find(s => 'module' in s && s.module === module && s.index === index)!;
  assert.equal(back.A, targets[0]!.A);
});
