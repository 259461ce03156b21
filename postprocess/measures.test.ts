/** Measures that do not flatter: PyTorch's numbers for them (tools/reference.py), and formulas written out once more. */
import assert from 'node:assert/strict';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { before, test } from 'node:test';
import { fileURLToPath } from 'node:url';
import * as tf from '@tensorflow/tfjs';
import { openSafetensors } from '../io/safetensors.ts';
import {
  compileEvaluation,
  decompose,
  importances,
  maskedForward,
  pgdStep,
  type Rows,
  totalC,
} from '../nano-param-decomp.ts';
import { fixtureJob } from './fixture.ts';
import { BINS, climb, compileMeasures, flatFrom, ladderOf, rungsOf, worstModule } from './measures.ts';
import { summary } from './summary.ts';

const TARGETS = ['simple_mlp', 'llama'] as const;
const STEPS = 1; // of the fresh adversary, where PyTorch's 20 are not compared with
before(async () => {
  await tf.setBackend('cpu');
});

/** A fixture as a run with other settings, and what PyTorch says of it. */
async function world(name: (typeof TARGETS)[number], changes: Record<string, number> = {}) {
  const job = await fixtureJob(name);
  const config = { ...job.problem.config, evalBatchSize: 3, ...changes };
  const folder = fileURLToPath(new URL(`../tools/fixtures/method/${name}`, import.meta.url));
  const answers: Record<string, number> = JSON.parse(
    fs.readFileSync(path.join(folder, 'fixture.json'), 'utf8'),
  ).measures;
  const { readFloat32, close } = await openSafetensors(path.join(folder, 'fixture.safetensors'));
  const start = readFloat32('eval/pgd_start');
  close();
  return { job: { ...job, problem: { ...job.problem, config } }, answers, start };
}
function near(actual: number | undefined, expected: number, name: string, tolerance = 1e-5) {
  const off = Math.abs(actual! - expected);
  assert.ok(off <= tolerance * Math.max(Math.abs(expected), 1e-3), `${name}: ${actual}, expected ${expected}`);
}

for (const name of TARGETS) {
  test(`${name}: every measure but the ladder is PyTorch's, by name and value`, async () => {
    const { job, answers } = await world(name, { pgdEvalNSteps: 0 });
    const metrics = await compileMeasures(job)();
    const theirs = Object.entries(answers).filter(([key]) => !key.startsWith('eval/pgd/'));
    assert.ok(theirs.length > 60);
    for (const [key, value] of theirs) near(metrics[key], value, key);
    const more = Object.keys(metrics).filter(key => !(key in answers));
    const faith = 'eval/loss/RelativeFaithfulnessLoss';
    assert.deepEqual(more.sort(), ['eval/alive/positions', `${faith}/mean`, `${faith}/worst`]);
    assert.equal(metrics['eval/alive/positions'], 21);

    const ratios = theirs.filter(([key]) => key.startsWith(faith)).map(([, ratio]) => ratio);
    assert.ok(Math.max(...ratios) > 1.05 * Math.min(...ratios), 'modules differ');
    near(metrics[`${faith}/worst`], Math.max(...ratios), 'worst');
    near(metrics[`${faith}/mean`], ratios.reduce((a, b) => a + b) / ratios.length, 'mean');
    const worst = worstModule(metrics)!;
    near(worst.ratio, answers[`${faith}/${worst.module}`]!, 'the worst by its name');
    assert.equal(worst.ratio, metrics[`${faith}/worst`]);
  });

  test(`${name}: the ladder, whose rungs go on, is PyTorch's, whose rungs start anew`, async () => {
    const { job, answers, start } = await world(name);
    const { problem, params, rows } = job;
    const tokens = tf.tensor2d(rows, undefined, 'int32');
    const rungs = ladderOf(answers).map(([steps]) => steps);
    assert.deepEqual(rungs, [0, 20, 40, 80]);
    const losses = await climb(rungs.slice(1), tf.tensor2d(start, [1, start.length]), async source =>
      pgdStep(problem, params, tokens, source),
    );
    for (const [i, steps] of rungs.entries()) near(losses[i], answers[`eval/pgd/${steps}`]!, `${steps} steps`, 1e-4);
    assert.ok(losses[1]! > 1.2 * losses[0]!, 'the adversary finds something');
  });
}

test('rung 0 is the loss at the random start, rung 1 the evaluation’s own adversary; batches are averaged', async () => {
  const { job } = await world('simple_mlp', { pgdEvalNSteps: STEPS, evalBatchSize: 2 }); // of 2 rows and of 1
  const { engine, problem, params, data } = job;
  const own = (await compileEvaluation(engine, problem, params)(data.heldOut, 0, false)).metrics;
  const metrics = await compileMeasures(job)();
  assert.deepEqual(
    ladderOf(metrics).map(([steps]) => steps),
    [0, 1, 2, 4, 8, 16],
    'without rows: the evaluation batch alone',
  );
  const all = await compileMeasures(job)(data.heldOut);
  near(all[`eval/pgd/${STEPS}`], own['eval/loss/PGDReconLoss']!, 'the evaluation’s adversary', 1e-6);
  near(all['eval/l0/0.0_total'], own['eval/l0/0.0_total']!, 'and its L0', 1e-6);
  assert.notEqual(all['eval/pgd/0'], metrics['eval/pgd/0'], 'three rows, not two');

  const none = { ...problem, config: { ...problem.config, pgdEvalNSteps: 0 } };
  const start = (await compileEvaluation(engine, none, params)(data.heldOut, 0, false)).metrics;
  near(all['eval/pgd/0'], start['eval/loss/PGDReconLoss']!, 'control: an adversary that makes no step', 1e-6);
});

test('a batch has the adversary of its own that it has alone, so parts average to the whole', async () => {
  const { job } = await world('llama', { pgdEvalNSteps: 1, evalBatchSize: 1 });
  const { heldOut } = job.data;
  const measured = compileMeasures(job);
  const whole = await measured(heldOut);
  const rowAlone = (i: number): Rows => ({ ...heldOut, count: 1, row: () => heldOut.row(i) });
  const parts = [await measured(rowAlone(0)), await measured(rowAlone(1)), await measured(rowAlone(2))];
  for (const key of Object.keys(whole).filter(k => /l0|g_bins/.test(k)))
    near(whole[key], parts.reduce((total, part) => total + part[key]!, 0) / 3, key);
  near(whole['eval/z/min/total'], Math.min(...parts.map(part => part['eval/z/min/total']!)), 'smallest z');
  near(whole['eval/z/max/total'], Math.max(...parts.map(part => part['eval/z/max/total']!)), 'largest z');
});

test('bins add up: to C, to each L0, to the total of the modules', async () => {
  const { job } = await world('simple_mlp', { pgdEvalNSteps: 0 });
  const { modules } = job.problem;
  const metrics = await compileMeasures(job)();
  const bin = (i: number, path: string) => metrics[`eval/g_bins/${BINS[i]}_${path}`]!;
  const above = (i: number, path: string) => BINS.slice(i).reduce((total, _, k) => total + bin(i + k, path), 0);
  for (const { path, C } of [...modules, { path: 'total', C: totalC(modules) }]) {
    near(above(0, path), C, `C of ${path}`);
    for (const [i, t] of [[1, '0.0'] as const, [2, '0.01'] as const, [3, '0.1'] as const])
      near(above(i, path), metrics[`eval/l0/${t}_${path}`]!, `L0 above ${t} of ${path}`);
  }
  for (const i of BINS.keys())
    near(
      bin(i, 'total'),
      modules.reduce((total, m) => total + bin(i, m.path), 0),
      `bin ${BINS[i]}`,
    );
  assert.ok(bin(0, 'total') > 0 && bin(6, 'total') > 0 && bin(3, 'total') > 0, 'there are zeros, ones and others');
});

test('who is alive is decided on training rows, what deleting the others costs is measured on held-out ones', async () => {
  const { job } = await world('llama', { pgdEvalNSteps: 0 });
  const { problem, params, data } = job;
  const { heldOut } = data;
  // One training position, 21 held-out ones: some components fire only on those that do not decide.
  const train: Rows = { count: 1, seqLen: 1, row: () => heldOut.row(0).slice(0, 1) };
  const metrics = await compileMeasures({ ...job, data: { ...data, train } })();
  const { ever, kl } = tf.tidy(() => {
    const row = tf.tensor2d([...train.row(0)], [1, 1], 'int32');
    const all = tf.tensor2d(job.rows, undefined, 'int32');
    const fires = importances(problem, params, row).g.max(0, true).greater(0).cast('float32');
    const [own, others] = [problem.target.forward(all, (p, x) => plain(p, x)), fires].map(x => x as tf.Tensor);
    const masked = maskedForward(problem, params, all, { mask: others! });
    const [p, q] = [own!.logSoftmax(), masked.logSoftmax()];
    return { ever: fires.sum().dataSync()[0]!, kl: p.exp().mul(p.sub(q)).sum(1).mean().dataSync()[0]! };
  });
  function plain(layer: string, x: tf.Tensor): tf.Tensor {
    const y = tf.matMul(x as tf.Tensor2D, problem.target.weights.get(layer) as unknown as tf.Tensor2D);
    const bias = problem.target.weights.get(`${layer}.bias`);
    return bias ? y.add(bias) : y;
  }
  assert.equal(metrics['eval/alive/positions'], 1);
  assert.equal(metrics['eval/alive/n_ever'], ever);
  near(metrics['eval/ce_kl/kl_alive_ever'], kl, 'KL');
  const onAll = await compileMeasures(job)();
  assert.ok(onAll['eval/alive/n_ever']! > ever, 'more positions, more alive ones');
});

test('measures leave no tensor behind and repeat to the bit', async () => {
  const { job } = await world('simple_mlp', { pgdEvalNSteps: 2, evalBatchSize: 2 });
  const measured = compileMeasures(job);
  const first = await measured();
  const tensors = tf.memory().numTensors;
  assert.deepEqual(await measured(), first);
  assert.equal(tf.memory().numTensors, tensors);
});

test('a training takes them at slow evaluations and at its end, beside the others', async t => {
  t.mock.method(process.stderr, 'write', () => true);
  const small = { batchSize: 3, seqLen: 7, pgdEvalNSteps: 1, nSteps: 5, faithfulnessWarmupSteps: 0 };
  const { job } = await world('llama', { ...small, evalFreq: 1, slowEvalFreq: 2, ppgdInnerSteps: 0 });
  const out = fs.mkdtempSync(path.join(os.tmpdir(), 'measures-'));
  try {
    const config = { ...job.problem.config, out, saveEvery: 0 };
    const run = { ...job, problem: { ...job.problem, config } };
    let calls = 0;
    const last = await decompose(run, { measures: () => async () => ({ 'eval/calls': ++calls }) });
    const lines = fs.readFileSync(path.join(out, 'metrics.jsonl'), 'utf8').trim().split('\n');
    const evaluated = lines.map(line => JSON.parse(line)).filter(line => 'eval/n_alive' in line);
    assert.deepEqual(
      evaluated.map(line => [line.step, line['eval/calls']]),
      [
        [1, undefined],
        [2, 1],
        [3, undefined],
        [4, 2],
        [5, 3],
      ],
    );
    assert.equal(last?.['eval/calls'], 3);
    assert.ok('eval/loss/PGDReconLoss' in last);
  } finally {
    fs.rmSync(out, { recursive: true });
  }
});

test('a source that goes to and fro is left alone, with the same losses as if it went on', async () => {
  /** Sign ascent of −(s − best)², which goes up to the place and then changes sides. */
  const ladderOn = async (best: number, rungs: number[]) => {
    let steps = 0;
    const losses = await climb(rungs, tf.tensor1d([0.25]), async source => {
      steps++;
      const next = source.add(source.sub(best).neg().sign().mul(0.125)).clipByValue(0, 1); // exact in binary
      return { loss: source.sub(best).square().neg().sum(), next };
    });
    return { steps, losses };
  };
  const literal = (best: number, rungs: number[]) =>
    [0, ...rungs].map(rung => {
      let s = 0.25;
      for (let i = 0; i < rung; i++) s = Math.min(1, Math.max(0, s + 0.125 * Math.sign(best - s)));
      return -((s - best) ** 2);
    });
  for (const [rungs, steps] of [
    [[2, 4, 8, 16, 32], 4], // at 4 it is where it was at 2
    [[5, 10, 20, 40], 12], // at 10 it is on the other side than at 5
    [[], 1],
  ] as const)
    for (const best of [0.53125, 0.5625]) {
      const found = await ladderOn(best, [...rungs]);
      for (const [i, loss] of literal(best, [...rungs]).entries()) near(found.losses[i], loss, `rung ${i} of ${rungs}`);
      assert.equal(found.losses.length, rungs.length + 1);
      assert.equal(found.steps, steps);
    }
});

test('the number where the ladder flattens: the first rung after which doubling adds less than 5 %', () => {
  const rungs = rungsOf(20);
  assert.deepEqual(rungs, [20, 40, 80, 160, 320]);
  assert.deepEqual(rungsOf(0), []);
  assert.equal(flatFrom(rungs, [1, 2, 3, 3.1, 3.2]), 80);
  assert.equal(flatFrom(rungs, [1, 1.04, 9, 9, 9]), 20, 'the first, whatever comes after it');
  assert.equal(flatFrom(rungs, [1, 2, 1.5, 1.4, 1.3]), 40, 'a fall is flat');
  assert.equal(flatFrom(rungs, [0.83, 1.35, 3.8, 25, 40]), undefined, 'the paper’s run');
  assert.equal(flatFrom([], []), undefined);
});

test('the summary prints them, and does without where a run has none', async () => {
  const { job } = await world('simple_mlp', { pgdEvalNSteps: STEPS });
  const { engine, problem, params, data } = job;
  const { metrics } = await compileEvaluation(engine, problem, params)(data.heldOut, 0, true);
  const sizes = { components: totalC(problem.modules), pgdSteps: STEPS };
  const plain = summary(metrics, sizes);
  assert.match(plain, /fresh PGD, 1 steps +\d/);
  assert.doesNotMatch(plain, /NaN|undefined|dead ones/);
  const more = await compileMeasures(job)();
  const full = summary({ ...metrics, ...more }, sizes);
  assert.doesNotMatch(full, /NaN|undefined/);
  const { module } = worstModule(more)!;
  assert.ok(full.includes(`in ${module}`), full);
  assert.match(full, /dead ones deleted +\d.*21 positions/);
  for (const steps of [1, 2, 4, 8, 16]) assert.match(full, new RegExp(`fresh PGD, +${steps} steps +\\d`));
  assert.match(full, /still rising|flat from \d+ steps on/);
  assert.match(full, /z from [−-]\d.* to \d/);
});
