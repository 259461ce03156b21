/** Circuits: what the optimisation keeps is enough, and the interventions are what they say. */

import assert from 'node:assert/strict';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, before, test } from 'node:test';
import * as tf from '@tensorflow/tfjs';
import { importances, maskedForward, totalC } from '../nano-param-decomp.ts';
import { circuitTable, findCircuit, intervene } from './circuit.ts';
import { fixtureJob } from './fixture.ts';
import { circuitDefaults } from './formats.ts';
import type { LmRun } from './run.ts';

const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'circuit-'));
let job: LmRun & { rows: number[][] };
before(async () => {
  await tf.setBackend('cpu');
  fs.writeFileSync(path.join(folder, 'components.safetensors'), 'for the hash');
  job = await fixtureJob('simple_mlp', folder);
});
after(() => fs.rmSync(folder, { recursive: true }));

test('the regimes are masked forwards, and the adversary is at least as bad as nothing outside the set', async () => {
  const { problem, params, rows } = job;
  const tokens = rows[0]!;
  const sumC = totalC(problem.modules);
  const input = tf.tensor2d([tokens], undefined, 'int32');
  const { g, pass } = importances(problem, params, input);
  const alive = Float32Array.from(await g.data(), x => Number(x > 0));
  const set = alive.map((a, i) => (i % 3 === 0 ? a : 0));
  const regimes = await intervene(job, tokens, 5, 4, set, alive, circuitDefaults, id => `w${id}`);
  assert.deepEqual(
    regimes.map(r => r.regime),
    ['target', 'only these', 'stochastic', 'adversarial', 'without these'],
  );
  const probability = async (mask: tf.Tensor, delta?: tf.Tensor) => {
    const logits = maskedForward(problem, params, input, { mask, ...(delta && { delta }) });
    return ((await tf.softmax(logits).array()) as number[][])[5]![4]!;
  };
  const near = (a: number, b: number) => assert.ok(Math.abs(a - b) < 1e-5, `${a}, ${b}`);
  const chosen = tf.tensor2d(set, [7, sumC]);
  near(regimes[0]!.probability, ((await tf.softmax(pass.output).array()) as number[][])[5]![4]!);
  near(regimes[0]!.kl, 0);
  near(regimes[1]!.probability, await probability(chosen));
  near(regimes[4]!.probability, await probability(tf.sub(1, chosen), tf.ones([1, problem.modules.length])));
  const neutral = await probability(chosen.add(tf.tensor2d(alive, [7, sumC]).sub(chosen).mul(0.5)));
  assert.ok(regimes[3]!.probability < neutral, `${regimes[3]!.probability}, ${neutral} at half strength`);
});

test('the importance coefficient trades size for fidelity; nothing that was dead comes in', async () => {
  const { problem, params, rows } = job;
  const tokens = rows[1]!;
  const question = { text: 'x', tokens, position: 6, token: undefined };
  const settings = { ...circuitDefaults, steps: 15, adversarySteps: 1, interventionSteps: 4, draws: 2 };
  const cheap = await findCircuit(job, question, { ...settings, coefficient: 0 });
  const dear = await findCircuit(job, question, { ...settings, coefficient: 10 });
  assert.ok(dear.nodes.length < cheap.nodes.length, `${dear.nodes.length}, ${cheap.nodes.length}`);
  const g = (await importances(problem, params, tf.tensor2d([tokens], undefined, 'int32')).g.array()) as number[][];
  for (const { position, module, index } of cheap.nodes)
    assert.ok(g[position]![problem.modules.find(m => m.path === module)!.offset + index]! > 0);
  assert.equal(cheap.alive, g.flat().filter(x => x > 0).length);
  const again = await findCircuit(job, question, { ...settings, coefficient: 10 });
  assert.deepEqual(again, dear);
  assert.match(circuitTable(dear), /only these[\s\S]*stochastic[\s\S]*adversarial[\s\S]*without these/);
});
