// The sweep: what its file may say, tiny runs that are made, left out, gone on with and compared, and the picture.

import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, describe, test } from 'node:test';
import { flagsOf, main, picture, type Result, readSweep, table } from './sweep.ts';

const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'sweep-'));
after(() => fs.rmSync(folder, { recursive: true }));

function sweepFile(name: string, content: unknown): string {
  const file = path.join(folder, name);
  fs.writeFileSync(file, typeof content === 'string' ? content : JSON.stringify(content));
  return file;
}
/** Few rows: an evaluation reads up to 32,768 positions. */
const corpus = fs.readFileSync(path.join(import.meta.dirname, '../assets/toy/corpus.txt'), 'utf8');
const data = path.join(folder, 'corpus.txt');
fs.writeFileSync(data, corpus.split('\n').slice(0, 60).join('\n'));
/** Small enough for seconds: the toy's model, a few steps. */
const tiny = {
  ...{
    preset: 'toy',
    data,
    engine: 'wasm',
    optimizer: 'adamw',
    nSteps: 3,
    batchSize: 2,
    seqLen: 8,
    evalBatchSize: 4,
    logEvery: 1,
    harvest: false,
  },
  ...{
    faithfulnessWarmupSteps: 2,
    pgdEvalNSteps: 1,
    ciDModel: 16,
    ciMlpHidden: 16,
    components: '*.attn.*=4,*.mlp.*=6',
  },
  ...{ evalFreq: 0, ppgdInnerSteps: 1, labels: '', evalData: '' },
};
const { log } = console;
const quietly = async (args: string[]): Promise<number> => {
  console.log = () => {};
  try {
    return await main(args);
  } finally {
    console.log = log;
  }
};
const metricsOf = (out: string, run: string) => fs.readFileSync(path.join(out, run, 'metrics.jsonl'), 'utf8');
const untimed = (jsonl: string) => jsonl.replace(/"(time|memory)\/\w+":[\d.e+-]+,?/g, '');

// They wait for their runs: two at a time, for this file comes last.
describe('runs', { concurrency: 2 }, () => {
  test('settings × seeds become run folders, a table and a picture; finished runs are left out, a missing one is remade', async () => {
    const settings = { weak: {}, strong: { coeffImp: 0.05 } };
    const file = sweepFile('tiny.json', { base: tiny, seeds: [0, 3], settings });
    const out = path.join(folder, 'tiny');
    const args = ['--file', file, '--out', out, '--jobs', '2'];
    assert.equal(await quietly(args), 0);
    const runs = ['weak-seed0', 'weak-seed3', 'strong-seed0', 'strong-seed3'];
    for (const run of runs) {
      const { config } = JSON.parse(fs.readFileSync(path.join(out, run, 'config.json'), 'utf8'));
      assert.equal(config.seed, Number(run.slice(-1)));
      assert.equal(config.coeffImp, run.startsWith('strong') ? 0.05 : 5e-4);
      assert.equal(config.nSteps, 3);
    }
    const lines = fs.readFileSync(path.join(out, 'sweep.md'), 'utf8').trimEnd().split('\n');
    assert.equal(lines.length, 2 + runs.length + 2); // two settings of two seeds: two means
    const last = JSON.parse(metricsOf(out, runs[2]!).trimEnd().split('\n').at(-1)!);
    const cells = lines.find(line => line.includes('strong-seed0'))!.split(' | ');
    assert.equal(Number(cells[6]), Number(last['eval/loss/PGDReconLoss'].toPrecision(3)));
    assert.match(cells.at(-1)!, /finished/);
    const means = lines.filter(line => line.includes('mean of 2'));
    const seeds = ['strong-seed0', 'strong-seed3'].map(run =>
      Number(lines.find(l => l.includes(run))!.split(' | ')[6]),
    );
    const mean = Number(means.find(line => line.includes('strong'))!.split(' | ')[6]);
    assert.ok(Math.abs(mean - (seeds[0]! + seeds[1]!) / 2) < 0.01 * mean, `${mean} of ${seeds}`);
    const svg = fs.readFileSync(path.join(out, 'sweep.svg'), 'utf8');
    assert.equal(svg.match(/<circle/g)!.length, runs.length);

    const before = metricsOf(out, 'weak-seed3');
    const stamps = runs.map(run => fs.statSync(path.join(out, run, 'metrics.jsonl')).mtimeMs);
    fs.rmSync(path.join(out, 'weak-seed3'), { recursive: true });
    assert.equal(await quietly(args), 0);
    const again = runs.map(run => fs.statSync(path.join(out, run, 'metrics.jsonl')).mtimeMs);
    assert.deepEqual(
      again.map((stamp, i) => stamp !== stamps[i]),
      [false, true, false, false],
    );
    assert.equal(untimed(metricsOf(out, 'weak-seed3')), untimed(before));

    const changed = sweepFile('changed.json', { base: { ...tiny, nSteps: 4 }, seeds: [0], settings: { weak: {} } });
    await assert.rejects(quietly(['--file', changed, '--out', out]), /weak-seed0: was made with another nSteps/);
  });

  test('a signal stops the sweep and its runs, and the next call goes on with them', async () => {
    const base = { ...tiny, nSteps: 40, evalBatchSize: 2 };
    const file = sweepFile('long.json', { base, settings: { only: {}, next: { nSteps: 2 } } });
    const out = path.join(folder, 'long');
    const tool = path.join(import.meta.dirname, 'sweep.ts');
    const args = [...process.execArgv.filter(arg => !arg.startsWith('--test')), tool, '--file', file, '--out', out];
    const child = spawn(process.execPath, args, { stdio: ['ignore', 'pipe', 'pipe'] });
    const metrics = path.join(out, 'only-seed0', 'metrics.jsonl');
    while (!fs.existsSync(metrics) && child.exitCode === null) await new Promise(resolve => setTimeout(resolve, 20));
    child.kill('SIGTERM');
    const [code] = await once(child, 'exit');
    assert.equal(code, 143);
    assert.match(fs.readFileSync(path.join(out, 'sweep.md'), 'utf8'), /only-seed0 .* stopped \|/);
    assert.ok(!fs.existsSync(path.join(out, 'next-seed0')), 'the next run was not started');
    assert.equal(await quietly(['--file', file, '--out', out]), 0);
    assert.match(fs.readFileSync(path.join(out, 'only-seed0', 'log.txt'), 'utf8'), /resume {3}from step \d+/);
    const steps = metricsOf(out, 'only-seed0')
      .trimEnd()
      .split('\n')
      .map(line => JSON.parse(line).step);
    const each = Array.from({ length: base.nSteps }, (_, i) => i + 1);
    assert.deepEqual([...new Set(steps)], each, 'no step is missing, and none was made from older state');
  });

  test('a run that fails is named, stops no other, and is the exit code', async () => {
    const settings = { broken: { components: '*.nowhere=4' }, good: {} };
    const file = sweepFile('failing.json', { base: tiny, settings });
    const out = path.join(folder, 'failing');
    assert.equal(await quietly(['--file', file, '--out', out]), 1);
    const report = fs.readFileSync(path.join(out, 'sweep.md'), 'utf8');
    assert.match(report, /\| broken-seed0 .* failed \|/);
    assert.match(report, /\| good-seed0 .* finished \|/);
    assert.match(fs.readFileSync(path.join(out, 'broken-seed0', 'log.txt'), 'utf8'), /nowhere matches none/);
  });
});

test('what the file says wrong is refused in one line', async () => {
  const settings = { a: {} };
  const refusals: [content: unknown, says: RegExp][] = [
    ['{', /wrong\.json: /],
    [[], /is no object/],
    [{ settings: {} }, /settings: takes an object of named settings/],
    [{ settings, sedes: [1] }, /has "sedes"; takes base, seeds and settings/],
    [{ settings, seeds: [1, 1] }, /seeds: takes a list of different whole numbers/],
    [{ settings, seeds: [-1] }, /seeds: /],
    [{ settings: { '../up': {} } }, /the setting "\.\.\/up"/],
    [{ settings: { '..': {} } }, /the setting "\.\."/],
    [{ settings: { a: { coefImp: 1 } } }, /a: coefImp is no field of the config/],
    [{ settings: { a: { coeffImp: '1' } } }, /a: coeffImp takes a number, got string/],
    [{ settings: { a: { seed: 1 } } }, /a: seed is the sweep's own/],
    [{ base: { preset: 'big' }, settings }, /base: preset: got big, takes one of toy/],
  ];
  for (const [content, says] of refusals) {
    const refused = (error: Error) => error.name === 'UsageError' && says.test(error.message);
    assert.throws(() => readSweep(sweepFile('wrong.json', content), folder), refused, `${says}`);
  }
  await assert.rejects(main(['--file', 'x.json']), /takes npx tsx/);
  await assert.rejects(main(['--file', 'x.json', '--out', folder, '--jobs', '0']), /--jobs: got 0/);
  assert.deepEqual(flagsOf({ coeffImp: 2e-7, harvest: false, graph: true, model: 'a b' }), [
    '--coeff-imp=2e-7',
    '--no-harvest',
    '--graph',
    '--model=a b',
  ]);
});

test('the picture puts each run at its L0 and PGD, and takes names as text', () => {
  const result = (name: string, l0: number, pgd: number): Result => ({
    ...{ name, setting: name, seed: 0, dir: '', fields: {}, state: 'finished', msPerStep: 5 },
    metrics: { step: 9, 'eval/l0/0.1_total': l0 / 2, 'eval/l0/0.0_total': l0, 'eval/loss/PGDReconLoss': pgd },
  });
  const svg = picture([result('a', 10, 4), result('b', 100, 0.04), result('<script>&"', 31.6, 0.4)]);
  const circles = [...svg.matchAll(/cx="([\d.]+)" cy="([\d.]+)"/g)].map(([, x, y]) => [Number(x), Number(y)]);
  const [a, b, c] = circles as [[number, number], [number, number], [number, number]];
  assert.equal(circles.length, 3);
  assert.ok(a[0] < c[0] && c[0] < b[0] && a[1] < c[1] && c[1] < b[1], 'to the right and downwards');
  assert.ok(Math.abs(c[0] - (a[0] + b[0]) / 2) < 0.5, 'the axis is logarithmic');
  assert.ok(!svg.includes('<script>'));
  assert.equal(svg.match(/<title>/g)!.length, 3);
  assert.match(table([result('a', 10, 4)]), /\| a \| 9 \| 10 \| - \| - \| - \| 4 \|/);
  assert.match(picture([]), /no run has been evaluated yet/);
});
