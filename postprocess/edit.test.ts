/** Edits: the folder that `edit` writes says what `ask` says, and a written token is said where the component fires. */
import assert from 'node:assert/strict';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, before, test } from 'node:test';
import * as tf from '@tensorflow/tfjs';
import { importances, loadTarget, ownLinear, type Target } from '../nano-param-decomp.ts';
import { answer, editedLogits, parseEdits } from './ask.ts';
import { edit, editedWeights, measureEdit, parseWrite } from './edit.ts';
import { fixtureJob } from './fixture.ts';
import type { EditFile } from './formats.ts';
import { withWeights } from './forward.ts';
import { pageParts } from './parts.ts';

const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'edit-'));
before(async () => {
  await tf.setBackend('cpu');
});
after(() => fs.rmSync(folder, { recursive: true }));
function runFolder(name: string): string {
  const dir = path.join(folder, `run-${name}`);
  fs.mkdirSync(dir);
  fs.writeFileSync(path.join(dir, 'components.safetensors'), 'for the hash');
  return dir;
}
/** What the command prints, as JSON. */
async function printed(job: () => Promise<number>) {
  const log = console.log;
  const lines: string[] = [];
  console.log = (line: string) => void lines.push(line);
  try {
    assert.equal(await job(), 0);
  } finally {
    console.log = log;
  }
  return JSON.parse(lines.join('\n'));
}
const largest = (a: tf.Tensor, b: tf.Tensor) => tf.max(tf.abs(tf.sub(a, b))).dataSync()[0]!;

const EDITED = {
  llama: ['model.layers.0.mlp.gate_proj:2', 'model.layers.1.self_attn.o_proj:1'],
  simple_mlp: ['h.0.attn.k_proj:1', 'h.1.mlp.down_proj:0'],
};
for (const name of ['llama', 'simple_mlp'] as const) {
  test(`${name}: the edited folder gives the logits that ask gives, removed and scaled`, async () => {
    const job = await fixtureJob(name, runFolder(name));
    const out = path.join(folder, name);
    const [removed, scaled] = EDITED[name];
    const report = await printed(() => edit(job, { remove: removed!, scale: `${scaled}=-2`, out, json: true }));
    const tokens = tf.tensor2d(job.rows, undefined, 'int32');
    const ofTarget = (target: Target) => target.forward(tokens, ownLinear(target));
    const edits = parseEdits(job.problem.modules, removed!, `${scaled}=-2`);
    const ours = editedLogits(job, tokens, edits, false);
    const theirs = ofTarget(await loadTarget(out));
    assert.ok(largest(ours, theirs) < 1e-4, `${largest(ours, theirs)}`);
    assert.ok(largest(ours, ofTarget(job.problem.target)) > 0.01, 'the edit changes something');
    const asked = await answer(job, {
      ...{ tokens: job.rows[0]!, edits, onlyWhereActive: false, length: 0, temperature: 0, seed: 0 },
    });
    assert.ok(Math.abs(asked.klHeldOut - report.kl) < 1e-5 && report.kl > 1e-3, `${asked.klHeldOut}, ${report.kl}`);
    assert.deepEqual(
      fs.readdirSync(folder).filter(f => f.includes('tmp')),
      [],
    );
  });
}

test('without an edit nothing changes; only-where-active leaves the other positions alone', async () => {
  const job = await fixtureJob('simple_mlp');
  const tokens = tf.tensor2d(job.rows, undefined, 'int32');
  const own = job.problem.target.forward(tokens, ownLinear(job.problem.target));
  assert.ok(largest(own, editedLogits(job, tokens, [], false)) < 1e-5);
  // a component of the last layer, whose absence at a position changes the prediction there alone
  const m = job.problem.modules.findIndex(({ path: p }) => p === 'h.1.mlp.down_proj');
  const { offset, C } = job.problem.modules[m]!;
  const g = (await importances(job.problem, job.params, tokens).g.array()) as number[][];
  const column = Array.from({ length: C }, (_, c) => offset + c).find(
    c => g.some(r => r[c]! > 0) && g.some(r => !r[c]),
  );
  assert.ok(column !== undefined, 'no component that fires at some positions and not at others');
  const edited = editedLogits(job, tokens, [{ column, factor: 0 }], true);
  const change = (await tf.max(tf.abs(tf.sub(edited, own)), 1).array()) as number[];
  for (const [n, row] of g.entries()) assert.equal(change[n]! > 1e-5, row[column]! > 0, `position ${n}: ${change[n]}`);
});

test('a component made to write a token raises its probability where it fires', async () => {
  const job = await fixtureJob('simple_mlp');
  const write = parseWrite(job, 'h.1.mlp.down_proj:1=#5:40');
  const changed = await editedWeights(job, [], write);
  const report = await measureEdit(job, withWeights(job.problem.target, changed), [write.column], write.token);
  assert.ok(report.firing > 0 && report.token!.after! > report.token!.before! + 0.1, JSON.stringify(report));
  assert.deepEqual([...changed.keys()], ['h.1.mlp.down_proj']);
});

test('the run keeps what an edit does, for its page; of other components nothing is shown', async () => {
  const run = runFolder('kept');
  const job = await fixtureJob('simple_mlp', run);
  const out = path.join(folder, 'written');
  const report = await printed(() =>
    edit(job, { scale: 'h.0.attn.k_proj:1=3', write: 'h.1.mlp.down_proj:1=#5:40', out, json: true }),
  );
  const shown = pageParts(run, job.problem.modules).edits as EditFile[];
  assert.equal(shown.length, 1);
  const { edits, write, folder: written, kl, token } = shown[0]!;
  assert.deepEqual(edits, [{ module: 'h.0.attn.k_proj', index: 1, factor: 3 }]);
  assert.deepEqual(write, { module: 'h.1.mlp.down_proj', index: 1, strength: 40 });
  assert.deepEqual([written, kl, token], [out, report.kl, report.token]);
  fs.writeFileSync(path.join(run, 'components.safetensors'), 'others');
  assert.equal(pageParts(run, job.problem.modules).edits, undefined);
});

test('the same seed continues the same way; temperature 0 takes the likeliest', async () => {
  const job = await fixtureJob('simple_mlp');
  const question = { tokens: job.rows[1]!, edits: [], onlyWhereActive: false, length: 12, seed: 3 };
  const [greedy, warm, again] = [
    await answer(job, { ...question, temperature: 0 }),
    await answer(job, { ...question, temperature: 5 }),
    await answer(job, { ...question, temperature: 5 }),
  ];
  assert.equal(greedy.continuation.split(' ')[0], `${greedy.before[0]![0]}`);
  assert.equal(greedy.continuation.split(' ').length, 12);
  assert.equal(warm.continuation, again.continuation);
  assert.notEqual(warm.continuation, greedy.continuation);
  assert.ok(Math.abs(greedy.klHeldOut) < 1e-6);
});

test('what makes no sense is refused in one line', async () => {
  const job = await fixtureJob('simple_mlp');
  const { modules } = job.problem;
  const refusals: [() => unknown, RegExp][] = [
    [() => parseEdits(modules, 'h.0.attn.k_proj', ''), /takes module:index/],
    [() => parseEdits(modules, 'h.7.attn.k_proj:0', ''), /takes module:index/],
    [() => parseEdits(modules, 'h.0.attn.k_proj:2', ''), /has 2 components/],
    [() => parseEdits(modules, '', 'h.0.attn.k_proj:1=x'), /=factor/],
    [() => parseEdits(modules, 'h.0.attn.k_proj:1', 'h.0.attn.k_proj:1=2'), /twice/],
    [() => parseWrite(job, 'h.0.attn.k_proj:1=#5:2'), /residual stream/],
    [() => parseWrite(job, 'h.0.mlp.down_proj:1=#5'), /TOKEN:strength/],
    [() => parseWrite(job, 'h.0.mlp.down_proj:1=#99:2'), /not one token/],
  ];
  for (const [make, message] of refusals) assert.throws(make, { name: 'UsageError', message });
  await assert.rejects(edit(job, { remove: 'h.0.attn.k_proj:1', out: folder }), /is there already/);
  await assert.rejects(edit(job, { out: path.join(folder, 'new') }), /takes --remove/);
});
