// Whole runs as child processes: interrupted, killed, resumed, changed, diverged. Whatever happens in between, the end
// must be the same bytes as in a run left alone. NANO_LONG_TESTS=1 kills 40 runs instead of
// 3 and does on ONNX Runtime and TensorFlow, whose graphs take seconds to trace, all that is done on WASM.

import assert from 'node:assert/strict';
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, before, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import * as tf from '@tensorflow/tfjs';
import { loadPair } from '../io/checkpoints.ts';
import { openSafetensors } from '../io/safetensors.ts';
import { main } from '../nano-param-decomp.ts';
import * as post from '../postprocess/index.ts';

const long = process.env.NANO_LONG_TESTS === '1';
const project = path.join(import.meta.dirname, '..');
const root = fs.mkdtempSync(path.join(os.tmpdir(), 'trust-'));
after(() => fs.rmSync(root, { recursive: true }));
const inRoot = (name: string) => path.join(root, name);
const toy = (file: string) => path.join(project, 'assets/toy', file);

/** The toy's target with a very small decomposition, and few rows: four batches. */
const rows: number[][] = JSON.parse(fs.readFileSync(toy('eval.json'), 'utf8'));
const data = inRoot('few.json');
fs.writeFileSync(data, JSON.stringify(rows.slice(0, 16)));
const small = [
  ...['--preset=toy', `--data=${data}`, `--eval-data=${data}`, '--labels=', '--no-harvest'],
  ...['--optimizer=adamw', '--components=*=8', '--ci-d-model=16', '--ci-mlp-hidden=32', '--batch-size=4'],
  ...['--eval-batch-size=2', '--pgd-eval-n-steps=2', '--log-every=1'],
];
// a step of a traced graph takes 2 ms, so such a run has more of them
const traced = ['--threads=1', '--n-steps=150', '--save-every=4', '--eval-freq=40', '--faithfulness-warmup-steps=0'];
const engines = {
  wasm: [...small, '--engine=wasm', '--n-steps=14', '--save-every=1', '--eval-freq=4', '--faithfulness-warmup-steps=3'],
  onnx: [...small, '--engine=onnx', ...traced],
  tensorflow: [...small, '--engine=tensorflow', ...traced],
};
type EngineName = keyof typeof engines;

/** A profiler sends the process five thousand signals a second, which must not disturb it either. */
const profiled = ['--cpu-prof', '--cpu-prof-interval=200', `--cpu-prof-dir=${inRoot('profiles')}`];

interface Run {
  child: ChildProcess;
  ended: Promise<{ code: number | null; signal: NodeJS.Signals | null; talk: string }>;
}
function start(...args: string[]): Run {
  const node = args.includes('--engine=tensorflow') ? profiled : [];
  const child = spawn(process.execPath, [...node, '--import', 'tsx', 'nano-param-decomp.ts', ...args], {
    cwd: project,
    stdio: ['ignore', 'ignore', 'pipe'],
  });
  let talk = '';
  child.stderr!.on('data', data => {
    talk += data;
  });
  return { child, ended: once(child, 'close').then(([code, signal]) => ({ code, signal, talk })) };
}
const begin = (engine: EngineName, out: string, ...args: string[]) =>
  start(...engines[engine], `--out=${out}`, ...args);
const resume = (out: string, ...args: string[]) => start('--resume', `--out=${out}`, ...args);

async function finish(run: Run) {
  const { code, talk } = await run.ended;
  assert.equal(code, 0, talk);
  return talk;
}

type Line = Record<string, number>;
const metricsOf = (out: string): Line[] =>
  fs
    .readFileSync(path.join(out, 'metrics.jsonl'), 'utf8')
    .trim()
    .split('\n')
    .map(line => JSON.parse(line));

/** Waits until the run has logged this step, or has ended. */
async function logged(run: Run, out: string, step: number) {
  const file = path.join(out, 'metrics.jsonl');
  const isThere = () => fs.existsSync(file) && fs.readFileSync(file, 'utf8').includes(`{"step":${step},`);
  while (run.child.exitCode === null && !isThere()) await sleep(5);
}

/** What a run leaves: the bytes of both files, and the metrics without times and memory. */
const result = (out: string) => ({
  components: fs.readFileSync(path.join(out, 'components.safetensors')).toString('latin1'),
  state: fs.readFileSync(path.join(out, 'state.safetensors')).toString('latin1'),
  metrics: metricsOf(out).map(line =>
    JSON.stringify(Object.entries(line).filter(([name]) => !/^(time|memory)\//.test(name))),
  ),
});
function assertSame(out: string, engine: EngineName, what: string) {
  const [actual, expected] = [result(out), result(inRoot(engine))];
  assert.deepEqual(actual.metrics, expected.metrics, what);
  assert(actual.components === expected.components, `${what}: other components`);
  assert(actual.state === expected.state, `${what}: another state`);
}

// ---- the runs left alone, that all others are compared with ----

const missing: Partial<Record<EngineName, string>> = {};
const duration = { wasm: 0, onnx: 0, tensorflow: 0 };
const names = Object.keys(engines) as EngineName[];
before(async () => {
  for (const engine of names) {
    const started = performance.now();
    const { code, talk } = await begin(engine, inRoot(engine)).ended;
    duration[engine] = performance.now() - started;
    if (engine !== 'wasm' && code === 2) missing[engine] = talk.trim();
    else assert.equal(code, 0, talk);
  }
});

for (const engine of names) {
  const onEngine = (name: string, run: () => Promise<void>) =>
    test(`${engine}: ${name}`, async t => (missing[engine] ? t.skip(missing[engine]) : run()));
  const all = long || engine === 'wasm';

  for (const [signal, expected] of [
    ['SIGINT', 130],
    ['SIGTERM', 143],
  ] as const) {
    if (!long && signal === 'SIGINT') continue; // io/checkpoint.test.ts has it too
    onEngine(`${signal} saves and exits with ${expected}; going on gives the same bytes`, async () => {
      const out = inRoot(`${engine}-${signal}`);
      const run = begin(engine, out, '--save-every=0');
      await logged(run, out, 3);
      run.child.kill(signal);
      const { code, talk } = await run.ended;
      assert.equal(code, expected, talk);
      assert.match(talk, new RegExp(`\n${signal}: saving after this step; once more stops at once\n`));
      const checkpoint = (await loadPair(out))!;
      assert.equal(checkpoint.step, metricsOf(out).at(-1)!.step, 'it was saved at the step it stopped at');
      assert(checkpoint.step < 150);
      assert.match(await finish(resume(out)), new RegExp(`\nresume {3}from step ${checkpoint.step}\n`));
      assertSame(out, engine, signal);
    });
  }

  onEngine('the number of tensors and bytes is the same at every step, evaluations included', async () => {
    for (const what of ['memory/tensors', 'memory/bytes']) {
      const values = metricsOf(inRoot(engine)).flatMap(line => line[what] ?? []);
      assert(values.length > 10);
      assert.deepEqual([...new Set(values.slice(1))], [values[1]], what);
    }
  });

  if (!all) continue;
  onEngine('a run that diverges names term, step and parameter, and leaves the last checkpoint', async () => {
    const out = inRoot(`${engine}-diverged`);
    const { code, talk } = await begin(engine, out, '--main-lr=1e12', '--save-every=1').ended;
    assert.equal(code, 1, talk);
    const [, step, largest] =
      /\nnano-param-decomp: diverged at step (\d+): (?:loss\/|grad_norm\/)\S+ is (?:NaN|Infinity).*; the largest parameter is in (\S+) \([\d.e+]+\); the last checkpoint is untouched\n$/.exec(
        talk,
      ) ?? [];
    assert(step && largest, talk);
    const checkpoint = (await loadPair(out))!;
    assert.equal(checkpoint.step, Number(step) - 1);
    const { tensors, readFloat32, close } = await openSafetensors(checkpoint.components);
    assert(tensors.has(largest), largest);
    for (const name of tensors.keys()) assert(readFloat32(name).every(Number.isFinite), name);
    close();
  });
}

test('two signals at once end the run, and the last checkpoint is whole', async () => {
  const out = inRoot('twice');
  const run = begin('wasm', out);
  await logged(run, out, 3);
  run.child.kill('SIGTERM');
  run.child.kill('SIGINT');
  const { code, signal } = await run.ended;
  assert(code === 130 || code === 143 || signal !== null);
  await finish(resume(out));
  assertSame(out, 'wasm', 'after two signals');
});

test('a resumed run refuses another config, model or data by name, and takes what training does not see', async t => {
  const out = inRoot('changed');
  fs.cpSync(inRoot('wasm'), out, { recursive: true });
  const otherModel = inRoot('other-model');
  fs.cpSync(toy(''), otherModel, { recursive: true });
  const weights = path.join(otherModel, 'model.safetensors');
  const bytes = fs.readFileSync(weights);
  bytes[bytes.length - 4]! ^= 1; // the lowest bit of the last weight
  fs.writeFileSync(weights, bytes);
  const movedModel = inRoot('moved-model');
  fs.cpSync(toy(''), movedModel, { recursive: true });
  const [[first, ...others] = [], ...rest] = rows.slice(0, 16);
  fs.writeFileSync(inRoot('rows.json'), JSON.stringify([[first === 1 ? 2 : 1, ...others], ...rest]));

  const refused: [string, RegExp][] = [
    ['--seed=5', /--resume: seed was 0 and is now 5; start a new run/],
    ['--n-steps=20', /--resume: nSteps was 14 and is now 20/],
    ['--coeff-imp=1e-3', /--resume: coeffImp was 0.0005 and is now 0.001/],
    ['--components=*=9', /--resume: components was "\*=8" and is now "\*=9"/],
    [`--model=${otherModel}`, /--resume: model is not the one of this run/],
    [`--data=${inRoot('rows.json')}`, /--resume: data is not the one of this run/],
  ];
  const before = result(out);
  t.mock.method(process.stderr, 'write', () => true);
  t.mock.method(console, 'log', () => {});
  const goOn = (...flags: string[]) => main(['--resume', `--out=${out}`, ...flags], post);
  for (const [flag, message] of refused) await assert.rejects(goOn(flag), { name: 'UsageError', message });
  assert.equal(await goOn(`--model=${movedModel}`, '--log-every=7', '--eval-freq=0', '--rounding-threshold=0.1'), 0);
  assert.deepEqual(result(out), before);
  await assert.rejects(main([...engines.wasm, `--out=${out}`], post), /: holds a run; --resume goes on with it/);
  await assert.rejects(main(['--resume', `--out=${inRoot('nothing')}`], post), { name: 'UsageError' });
});

test('eval and harvest leave no tensors behind', async t => {
  t.mock.method(process.stderr, 'write', () => true);
  t.mock.method(console, 'log', () => {});
  const grown: string[] = [];
  for (const command of ['eval', 'harvest', 'harvest']) {
    const { numTensors, numBytes } = tf.memory();
    await main([command, `--run=${inRoot('wasm')}`], post);
    grown.push(`${tf.memory().numTensors - numTensors} tensors, ${tf.memory().numBytes - numBytes} bytes`);
  }
  assert.equal(new Set(grown).size, 1, grown.join('; ')); // the target and the components, which each of them loads
});

test('killed at any moment, a run goes on to the same bytes', async t => {
  const seen: string[] = [];
  for (let i = 0; i < (long ? 40 : 3); i++) {
    const engine = long && i % 4 > 1 && !missing.tensorflow ? 'tensorflow' : 'wasm';
    const out = inRoot(`killed-${i}`);
    const moment = (i * 0.618034 + 0.3) % 1; // spread evenly, early and late mixed
    const run = begin(engine, out);
    // by the clock, or by the step: then mostly while that step's checkpoint is written
    const nSteps = engine === 'wasm' ? 14 : 150;
    await (i % 2
      ? Promise.race([run.ended, sleep(moment * duration[engine])])
      : logged(run, out, 1 + Math.floor(moment * nSteps)));
    run.child.kill('SIGKILL');
    const { signal, talk } = await run.ended;
    if (signal) {
      const started = fs.existsSync(path.join(out, 'config.json'));
      const { step, warning } = (await loadPair(out)) ?? { step: started ? 0 : -1 };
      seen.push(`${engine} ${step}${warning ? '!' : ''}`);
      await finish(started ? resume(out) : begin(engine, out));
    } else assert.equal(run.child.exitCode, 0, talk);
    assertSame(out, engine, `killed at ${seen.at(-1)}`);
    fs.rmSync(out, { recursive: true });
  }
  t.diagnostic(`killed at steps (-1: before config.json; !: the previous checkpoint was loaded): ${seen.join(', ')}`);
  assert(seen.length > (long ? 20 : 1), 'most runs ended before they could be killed');
});
