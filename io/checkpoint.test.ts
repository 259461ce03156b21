// Checkpoints cut off at every point, full disks, changed settings, signals and divergence.

import assert from 'node:assert/strict';
import { spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import fs from 'node:fs';
import { syncBuiltinESMExports } from 'node:module';
import os from 'node:os';
import path from 'node:path';
import { after, beforeEach, test } from 'node:test';
import {
  CHANGES_BITS,
  checkFinite,
  compareConfigs,
  compareData,
  compareRuns,
  DivergenceError,
  loadPair,
  MAY_CHANGE,
  resume,
  savePair,
} from '../io/checkpoints.ts';
import { openSafetensors } from '../io/safetensors.ts';
import { UsageError } from '../io/usage-error.ts';

const long = process.env.NANO_LONG_TESTS === '1';
const root = fs.mkdtempSync(path.join(os.tmpdir(), 'checkpoint-'));
const dir = path.join(root, 'run');
after(() => fs.rmSync(root, { recursive: true }));
beforeEach(() => {
  replaceFs(real);
  fs.rmSync(dir, { recursive: true, force: true });
  fs.mkdirSync(dir);
});

const { openSync, writeSync, fsyncSync, rmSync, renameSync, linkSync, copyFileSync } = fs;
const real = { openSync, writeSync, fsyncSync, rmSync, renameSync, linkSync, copyFileSync };
function replaceFs(functions: Partial<typeof real>) {
  Object.assign(fs, functions);
  syncBuiltinESMExports(); // for those who import * as fs
}

/** Saves a pair in which every number is `value`, so that a mixed pair shows. */
const save = (step: number, value = step, folder = dir, size = 4) =>
  savePair(
    folder,
    step,
    [{ name: 'components.a.V', shape: [size], data: () => new Float32Array(size).fill(value) }],
    [
      { name: 'moments', shape: [size], data: new Float32Array(size).fill(value) },
      { name: 'counter', shape: [1], data: () => new Float32Array([value]) },
    ],
  );

async function valuesIn(file: string): Promise<number[]> {
  const { tensors, readFloat32, close } = await openSafetensors(file);
  const values = [...tensors.keys()].flatMap(name => [...readFloat32(name)]);
  close();
  return values;
}

/** The one value in the checkpoint that loads, or undefined. */
async function load(folder = dir): Promise<number | undefined> {
  const checkpoint = await loadPair(folder);
  if (!checkpoint) return undefined;
  const values = new Set([...(await valuesIn(checkpoint.components)), ...(await valuesIn(checkpoint.state))]);
  assert.equal(values.size, 1, `a mixed pair was loaded: ${[...values]}`);
  return [...values][0];
}

// ---- a process that dies: from the n-th call that changes a file on, nothing has an effect any more ----

class Death extends Error {}
/** Replaces the calls of fs that change files; returns their growing list. A dying write writes half. */
function dieAt(n: number): string[] {
  const calls: string[] = [];
  const paths = new Map<number, string>();
  const short = (file: string) =>
    path
      .basename(file)
      .replace('.safetensors', '')
      .replace(/\.tmp-\d+$/, '~');
  const call = (name: string, ...files: string[]) => {
    calls.push([name, ...files.map(short)].join(' '));
    if (calls.length >= n) throw new Death();
  };
  const functions: object = {
    openSync(file: string, flags: string) {
      if (flags !== 'r') call('open', file);
      const fd = real.openSync(file, flags);
      paths.set(fd, file);
      return fd;
    },
    writeSync(fd: number, bytes: Uint8Array, offset: number, length: number) {
      if (calls.length + 1 === n) real.writeSync(fd, bytes, offset, length >> 1);
      call('write', paths.get(fd)!);
      return real.writeSync(fd, bytes, offset, length);
    },
    fsyncSync: (fd: number) => call('fsync', paths.get(fd)!), // nobody pulls the plug here, and disks are slow
    rmSync(file: string) {
      if (!fs.existsSync(file)) return;
      call('rm', file);
      real.rmSync(file);
    },
  };
  for (const name of ['renameSync', 'linkSync', 'copyFileSync'] as const)
    (functions as typeof real)[name] = (from, to) => {
      call(name.replace('Sync', ''), String(from), String(to));
      real[name](from, to);
    };
  replaceFs(functions);
  return calls;
}

async function saveAndDie(step: number, value: number, n: number): Promise<string[]> {
  const calls = dieAt(n);
  try {
    await save(step, value);
  } catch (error) {
    assert(error instanceof Death, (error as Error).stack ?? '');
  } finally {
    replaceFs(real);
  }
  return calls;
}

test('a save is this sequence: whole files beside, second names for the old pair, two renames, each put on disk', async () => {
  await save(1);
  const beside = (what: string) => [
    `open ${what}.next~`,
    ...(what === 'state' ? ['write', 'write', 'write'] : ['write', 'write']).map(call => `${call} ${what}.next~`),
    `fsync ${what}.next~`,
    `rename ${what}.next~ ${what}.next`,
    'fsync run',
  ];
  const keep = (what: string) => [
    `link ${what} ${what}.previous~`,
    `rename ${what}.previous~ ${what}.previous`,
    'fsync run',
  ];
  const publish = (what: string) => [`rename ${what}.next ${what}`, 'fsync run'];
  assert.deepEqual(await saveAndDie(2, 2, Number.POSITIVE_INFINITY), [
    ...['components', 'state'].flatMap(beside),
    ...['state', 'components'].flatMap(keep),
    ...['state', 'components'].flatMap(publish),
  ]);
  assert.deepEqual(fs.readdirSync(dir).sort(), [
    'components.previous.safetensors',
    'components.safetensors',
    'state.previous.safetensors',
    'state.safetensors',
  ]);
  assert.equal(await load(), 2);
  for (const what of ['components', 'state'])
    assert((await valuesIn(path.join(dir, `${what}.previous.safetensors`))).every(value => value === 1));
  const checkpoint = (await loadPair(dir))!;
  assert.deepEqual([checkpoint.step, checkpoint.warning], [2, undefined]);
});

test('any number of saves in a row, each cut off at any call: the last checkpoint always loads', async t => {
  // Which files are there, and which of them are of one save: folders of the same pattern go on in the same way, so one
  // of each is enough. The search ends when no new pattern appears. (Short form: leftovers, which a save removes before
  // anything else, are not told apart.)
  const pattern = async () => {
    const saves: number[] = [];
    const files: string[] = [];
    for (const name of fs.readdirSync(dir)) {
      const leftover = /\.tmp-|\.next\./.test(name);
      if (leftover && !long) files.push('leftover');
      else if (name.includes('.tmp-')) files.push(name.replace(/\d+$/, ''));
      else {
        const value = (await valuesIn(path.join(dir, name)))[0]!;
        if (!saves.includes(value)) saves.push(value);
        files.push(`${name} ${saves.indexOf(value)}`);
      }
    }
    return [...new Set(files.sort())].join();
  };
  const histories = new Map<string, number[]>([['', []]]); // pattern -> the call at which each save died on the way to it
  let tried = 0;
  let fallbacks = 0;
  for (const history of histories.values())
    for (let n = 1, ended = false; !ended; n++) {
      real.rmSync(dir, { recursive: true });
      fs.mkdirSync(dir);
      for (const [i, death] of history.entries()) await saveAndDie(((await load()) ?? 0) + 1, i + 1, death);
      const before = await load();
      const value = history.length + 1;
      const calls = await saveAndDie((before ?? 0) + 1, value, n);
      ended = calls.length < n;
      const now = await load();
      const where = `died at calls ${[...history, n]}, the last one ${calls.at(-1)}`;
      assert(now === value || (now === before && !ended), `loads save ${now}, not ${before} or ${value}: ${where}`);
      const components = path.join(dir, 'components.safetensors');
      assert.equal(fs.existsSync(components), now !== undefined, where);
      if (fs.existsSync(components)) assert.equal(new Set(await valuesIn(components)).size, 1, where);
      if (now !== undefined && (await loadPair(dir))!.warning) fallbacks++;
      const found = await pattern();
      if (!histories.has(found)) histories.set(found, [...history, n]);
      tried++;
    }
  t.diagnostic(`${tried} cuts, ${histories.size} patterns of folders, the previous pair was loaded ${fallbacks} times`);
  assert(tried > 200 && fallbacks > 5, 'the search has shrunk');
});

test('the previous pair loads with a warning when a file of the last one is missing, broken or of another save', async () => {
  await save(1);
  await save(2);
  const file = (name: string) => path.join(dir, `${name}.safetensors`);
  const whole = { components: fs.readFileSync(file('components')), state: fs.readFileSync(file('state')) };
  for (const what of ['components', 'state'] as const) {
    for (const content of [
      undefined,
      Buffer.alloc(0),
      whole[what].subarray(0, 100),
      Buffer.concat([whole[what], Buffer.alloc(1)]),
    ]) {
      fs.rmSync(file(what), { force: true });
      if (content) fs.writeFileSync(file(what), content);
      assert.equal(await load(), 1);
      assert.match((await loadPair(dir))!.warning!, /: the last save was cut off; going on from step 1$/);
    }
    fs.writeFileSync(file(what), whole[what]);
  }
  assert.equal(await load(), 2);
  for (const what of ['state', 'state.previous']) fs.rmSync(file(what));
  // not "no checkpoint yet": a run that began again would overwrite these components
  await assert.rejects(
    loadPair(dir),
    /run: state.safetensors and components.safetensors are broken or not of the same/,
  );
  for (const what of ['components', 'components.previous']) fs.rmSync(file(what));
  assert.equal(await loadPair(dir), undefined);
  assert.equal(await loadPair(path.join(root, 'gone')), undefined);
});

test('an error in a save leaves the last checkpoint and no litter', async () => {
  await save(1);
  await save(2);
  const files = fs.readdirSync(dir);
  for (let n = 1; n <= 5; n++) {
    let calls = 0;
    replaceFs({
      writeSync(...args: Parameters<typeof writeSync>) {
        if (++calls === n) throw Object.assign(new Error('ENOSPC: no space left on device'), { code: 'ENOSPC' });
        return writeSync(...args);
      },
    } as typeof real);
    await assert.rejects(save(3), /ENOSPC/);
    replaceFs(real);
    assert.deepEqual(fs.readdirSync(dir), files);
    assert.equal(await load(), 2);
  }
  fs.writeFileSync(path.join(dir, 'components.next.safetensors.tmp-999999'), 'left by a killed process');
  fs.writeFileSync(path.join(dir, 'state.next.safetensors'), 'left by a killed process');
  fs.writeFileSync(path.join(dir, 'my.components.tmp-1'), 'not ours');
  await save(3);
  assert.deepEqual(fs.readdirSync(dir).sort(), [...files, 'my.components.tmp-1'].sort());
  assert.equal(await load(), 3);
  fs.rmSync(dir, { recursive: true });
  await assert.rejects(save(4), /ENOENT/);
});

test('where there are no hard links the old pair is copied', async () => {
  replaceFs({
    linkSync() {
      throw Object.assign(new Error('EPERM: operation not permitted, link'), { code: 'EPERM' });
    },
  });
  for (const step of [1, 2, 3]) await save(step);
  fs.rmSync(path.join(dir, 'state.safetensors'));
  assert.equal(await load(), 2);
});

test('a full disk leaves the last checkpoint', async t => {
  if (spawnSync('mount', ['-t', 'tmpfs', '-o', 'size=256k', 'none', dir]).status !== 0)
    return t.skip('this machine does not let us mount a small tmpfs');
  try {
    await save(1, 1, dir, 4000); // two files of 16 kB
    await save(2, 2, dir, 4000);
    await assert.rejects(save(3, 3, dir, 40_000), /ENOSPC/);
    assert.equal(await load(), 2);
    assert.equal(fs.readdirSync(dir).length, 4);
    await save(4, 4, dir, 4000);
    assert.equal(await load(), 4);
  } finally {
    spawnSync('umount', [dir]);
  }
});

test('a run without a checkpoint begins again, whatever its metrics are', async () => {
  const metrics = path.join(dir, 'metrics.jsonl');
  fs.writeFileSync(metrics, '{"step":1,"loss/faith":1}\n{broken}\n');
  const said: string[] = [];
  assert.equal(await resume(dir, {}, {}, line => said.push(line)), undefined);
  assert.match(said.join(), /from the start/);
  assert.ok(!fs.existsSync(metrics));
});

type Settings = Record<string, unknown>;
test('a resumed run may change what training does not depend on, and nothing else', () => {
  const compare = (before: object, now: object) =>
    compareConfigs(before as Settings, now as Settings, MAY_CHANGE, CHANGES_BITS);
  const old = { nSteps: 100, seed: 1, components: { a: 4 }, logEvery: 10, engine: 'wasm', gradClipCi: 0 };
  assert.deepEqual(compare(old, { ...old }), []);
  assert.deepEqual(
    compare(old, { ...old, logEvery: 1, evalFreq: 3, saveEvery: 7, roundingThreshold: 0.1, model: '/moved' }),
    [],
  );
  assert.deepEqual(compare(old, { ...old, engine: 'tensorflow' }), [
    'engine was "wasm" and is now "tensorflow": not bit for bit the same run',
  ]);
  assert.throws(
    () => compare(old, { ...old, seed: 2, components: { a: 5 }, logEvery: 1 }),
    (error: Error) =>
      error instanceof UsageError &&
      error.message ===
        '--resume: seed was 1 and is now 2, components was {"a":4} and is now {"a":5}; start a new run for that',
  );
  const { seed, ...older } = old;
  assert.throws(() => compare(older, old), /seed was undefined and is now 1/);
  assert.throws(() => compare(old, older), /seed was 1 and is now undefined/);
});

const [then, later] = ['a'.repeat(40), 'b'.repeat(40)];
test('a resumed run whose model or data has moved on the hub is told which revision to pin', () => {
  const record = (model: object, data: object) => ({
    config: {},
    engine: { name: 'wasm' },
    modules: {},
    model: { path: 'org/tiny', sha256: '1', ...model },
    data: { path: 'org/texts@main', sha256: '1', ...data },
  });
  const compare = (old: object, now: object) => compareRuns(old as never, now as never, () => {});
  const old = record({ commit: then }, { commit: then });
  compare(old, record({ commit: later }, {})); // another commit with the same content
  const refusals: [object, string][] = [
    [
      record({ commit: later, sha256: '2' }, {}),
      '--resume: model is not the one of this run (org/tiny): its SHA-256 differs; ' +
        `org/tiny was read at another commit than now: pin it with --model org/tiny@${then}`,
    ],
    [
      record({}, { commit: later, sha256: '2' }),
      '--resume: data is not the one of this run (org/texts@main): its SHA-256 differs; ' +
        `org/texts was read at another commit than now: pin it with --data org/texts@${then}`,
    ],
    // the commit is the same, or there is none: it is no matter of revisions
    [
      record({}, { commit: then, sha256: '2' }),
      '--resume: data is not the one of this run (org/texts@main): its SHA-256 differs',
    ],
    [record({ sha256: '2' }, {}), '--resume: model is not the one of this run (org/tiny): its SHA-256 differs'],
  ];
  for (const [now, message] of refusals) assert.throws(() => compare(old, now), { name: 'UsageError', message });
});

test('a finished run is looked at with its own data; other data is refused by name, or said where it was meant', () => {
  const record = { path: 'corpus.txt', sha256: '1', heldOutSha256: '2' };
  const compare = (now: object, given: boolean, old: object = record) => {
    const said: string[] = [];
    return [compareData({ ...record, ...old }, { ...record, ...now }, given, line => said.push(line)), said];
  };
  assert.deepEqual(compare({}, false), [[], []]);
  assert.deepEqual(compare({ path: 'moved.txt' }, true), [[], []]);
  const both = 'the training rows and the held-out rows are not those of this run (corpus.txt): their SHA-256 differs';
  const others: [object, string][] = [
    [{ sha256: '3', heldOutSha256: '4' }, both],
    [{ sha256: '3' }, both.replace(' and the held-out rows', '')],
    [{ heldOutSha256: '4' }, both.replace('the training rows and ', '')],
  ];
  for (const [now, what] of others) {
    const refusal = { name: 'UsageError', message: `${what}; other data on purpose: --data or --eval-data` };
    assert.throws(() => compare(now, false), refusal);
    const parts = what.replace(/ are not.*/, '').split(' and ');
    assert.deepEqual(compare({ ...now, path: 'rows.json' }, true), [
      parts,
      [`warning  ${what}; the numbers are of rows.json`],
    ]);
  }
  assert.throws(() => compare({ sha256: '3', commit: later }, false, { path: 'org/texts', commit: then }), {
    message: new RegExp(`pin it with --data org/texts@${then}; other data on purpose`),
  });
  // a record of an older version has no hash of the held-out rows
  assert.deepEqual(compare({ heldOutSha256: '4' }, false, { heldOutSha256: undefined }), [[], []]);
  assert.throws(
    () => compare({ sha256: '3' }, false, { heldOutSha256: undefined }),
    /^UsageError: the training rows are/,
  );
});

test('a value that is not finite stops the run with its name, the step and the largest parameter', async () => {
  let reads = 0;
  const of = (values: () => number[]) => ({ data: async () => new Float32Array(values()) as never });
  const parameters = { V: of(() => [1, -2]), U: of(() => [-1234.5, ++reads]) };
  await checkFinite(7, { 'loss/faith': 0, 'loss/imp': 1e30, 'grad_norm/ci': 3 }, parameters);
  assert.equal(reads, 0);
  await assert.rejects(
    checkFinite(7, { 'loss/faith': 0, 'loss/imp': Number.NaN, 'grad_norm/ci': Number.POSITIVE_INFINITY }, parameters),
    (error: Error) =>
      error instanceof DivergenceError &&
      error.message ===
        'diverged at step 7: loss/imp is NaN, grad_norm/ci is Infinity; the largest parameter is in U (1.23e+3); the last checkpoint is untouched',
  );
  parameters.V = of(() => [0, Number.NaN]);
  await assert.rejects(checkFinite(7, { x: Number.NaN }, parameters), /largest parameter is in V \(not finite\)/);
});

// ---- signals ----

/** Runs steps of 300 ms that never wait, as a native call would, and reports each; it "saves" in 300 ms as well. */
const loop = `
import fs from 'node:fs';
import { watchSignals } from ${JSON.stringify(new URL('../io/console.ts', import.meta.url).href)};
const say = (line: string) => fs.writeSync(1, line + '\\n');
const busy = () => Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 300);
async function main() {
  const { interrupted } = watchSignals(say);
  for (let step = 1; step < 30; step++) {
    say('step ' + step);
    busy();
    const code = await interrupted();
    if (!code) continue;
    say('saving');
    busy();
    say('saved');
    process.exit(code);
  }
}
main();
`;

/** Starts the loop, sends each signal when the output contains its cue, returns how it ended. */
async function runLoop(...signals: [cue: string, signal: NodeJS.Signals][]) {
  const script = path.join(dir, 'loop.mts');
  fs.writeFileSync(script, loop);
  const child = spawn(process.execPath, ['--import', 'tsx', script], { stdio: ['ignore', 'pipe', 'inherit'] });
  let output = '';
  child.stdout.on('data', data => {
    output += data;
    while (signals[0] && output.includes(signals[0][0])) child.kill(signals.shift()![1]);
  });
  const [code, signal] = await once(child, 'close');
  return { code, signal, output };
}

const posix = { skip: process.platform === 'win32' && 'Windows has no POSIX signals' };
for (const [signal, expected] of [
  ['SIGINT', 130],
  ['SIGTERM', 143],
] as const) {
  test(`${signal} finishes the step, saves and exits with ${expected}`, posix, async () => {
    const { code, output } = await runLoop(['step 2', signal]);
    assert.equal(code, expected);
    assert.match(
      output,
      new RegExp(`step 2\n${signal}: saving after this step; once more stops at once\nsaving\nsaved\n$`),
    );
  });
  test(`a second ${signal} stops at once, even inside a save`, posix, async () => {
    const { code, signal: by, output } = await runLoop(['step 2', signal], ['saving\n', signal]);
    assert(by === signal || code === expected);
    assert.doesNotMatch(output, /saved/);
  });
}
test('on a terminal what a signal says starts on a line of its own, and so does what follows', posix, async () => {
  const script = path.join(dir, 'live.mts');
  fs.writeFileSync(
    script,
    `
import { startProgress, watchSignals } from ${JSON.stringify(new URL('../io/console.ts', import.meta.url).href)};
Object.defineProperty(process.stderr, 'isTTY', { value: process.argv[2] === 'terminal' });
const busy = (ms: number) => Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, ms);
const say = (line: string) => process.stderr.write(line + '\\n');
async function main() {
  const { interrupted } = watchSignals(say);
  const show = startProgress(100);
  for (let step = 1; step <= 100; step++) {
    show(step, () => 'step ' + step);
    await new Promise(next => setTimeout(next, 150)); // here the signal comes in
    if (step > 1) show(step, () => 'shown again');
    if (await interrupted()) break;
  }
  say('stopped');
}
main();
`,
  );
  for (const [where, signal] of [
    ['terminal', 'SIGINT'],
    ['terminal', 'SIGTERM'],
    ['pipe', 'SIGINT'],
  ] as const) {
    const child = spawn(process.execPath, ['--import', 'tsx', script, where], { stdio: ['ignore', 'ignore', 'pipe'] });
    let output = '';
    let sent = false;
    child.stderr.on('data', data => {
      output += data;
      if (!sent && output.includes(where === 'pipe' ? 'step 1 ' : 'step 2 ')) sent = child.kill(signal);
    });
    await once(child, 'close');
    const lines = output.replaceAll('\r\x1b[K', '\r').split('\n');
    assert.deepEqual(lines.slice(-2), ['stopped', ''], output);
    assert(lines.includes(`${signal}: saving after this step; once more stops at once`), output);
    if (where === 'terminal')
      assert(
        lines.some(line => line.includes('\rshown again ')),
        output,
      );
  }
});
test('two signals inside one step stop after it, without a save', posix, async () => {
  const { code, output } = await runLoop(['step 2', 'SIGTERM'], ['step 2', 'SIGINT']);
  assert(code === 130 || code === 143);
  assert.doesNotMatch(output, /saving\n/);
});
